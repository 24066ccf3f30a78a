"""
A page about a run: what its folder, its data set and its evaluations tell, as one HTML file.

The page holds no script, no font and no address; its pictures are inside, for light and dark, for a
phone and a screen. The template report.html has the wording and escapes what comes from files.
"""

import re
from base64 import b64encode
from pathlib import Path
from statistics import median
from typing import Any, TypedDict

from gpt import results
from gpt.curves import Record, read_lines, seconds_to, settings_of, summary
from gpt.data.shards import DATA_DIR, read_manifest
from gpt.files import ROOT
from gpt.settings import header_defaults
from gpt.shapes import AnyText, Count

MAX_ROWS, MAX_SAMPLES = 200, 5          # on the page; the files have the rest
NOT_IN_HTML = re.compile('[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]')    # but models may write it
Start = dict[str, AnyText | float | bool | None]        # a line of starts.jsonl
Sample = TypedDict('Sample', {'step': Count, 'text': AnyText})      # of samples.jsonl


def page(folder: Path, records: list[dict], pictures: dict[tuple[str, bool], str]) -> str:
    """The HTML about the run in `folder`, whose log is `records`; pictures: {(theme, whether it is
    wide): SVG} for the themes 'light' and 'dark'."""
    import jinja2
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     undefined=jinja2.StrictUndefined, finalize=printable)
    environment.filters['thousands'] = '{:,}'.format
    template = environment.from_string(Path(__file__).with_suffix('.html').read_text('utf-8'))
    settings = settings_of(folder)
    samples = {one['step']: one['text'] for one in read_lines(folder / 'samples.jsonl', Sample)}
    events = [record for record in read_lines(folder / 'log.jsonl', Record) if 'event' in record]
    return template.render(
        name=folder.resolve().name, summary=summary(records), shape=shape(settings, records),
        pictures={key: data_url(svg) for key, svg in pictures.items()}, max_rows=MAX_ROWS,
        settings=compared_with_defaults(settings), mixture=settings.get('dataset'),
        data_sets=data_sets(settings), samples=spread(samples), n_samples=len(samples),
        evaluations=evaluations(folder), events=counted(events),
        starts=as_table(read_lines(folder / 'starts.jsonl', Start)))


def printable(value: Any) -> Any:
    """A value as the template prints it: numbers with thousands, text without control characters;
    HTML made by the template itself is left alone."""
    if type(value) is int:
        return f'{value:,}'
    return NOT_IN_HTML.sub('\ufffd', value) if type(value) is str else value


def data_url(svg: str) -> str:
    return f'data:image/svg+xml;base64,{b64encode(svg.encode()).decode()}'


def shape(settings: dict, records: list[dict]) -> str:
    """What ran, and how fast, in a line."""
    parts, origin = [], settings.get('init_from')
    if origin in ('auto', 'scratch', 'resume'):
        parts.append('{n_layer} layers of {n_embd}, {n_head} heads, {block_size:,} tokens at a time'
                     .format(**{**header_defaults(ROOT / 'train.py'), **settings}))
    elif origin:                                    # whose layers the settings do not tell
        parts.append(f'fine-tuned from {origin}')
    rates = [record['tokens_per_second'] for record in records if 'tokens_per_second' in record]
    if rates:
        minutes = seconds_to(records, records[-1]['tokens']) / 60
        time = f'{minutes / 60:,.1f} hours' if minutes > 90 else f'{minutes:.0f} minutes'
        parts.append(f'{median(rates):,.0f} tokens per second; {time} of updates')
    return '; '.join(parts) + '.' if parts else ''


def compared_with_defaults(settings: dict) -> dict:
    """Settings that are not the defaults of train.py, and those that are, as rows of a table."""
    defaults = header_defaults(ROOT / 'train.py')
    changed = [(key, text_of(value), text_of(defaults.get(key, 'none')))
               for key, value in settings.items() if defaults.get(key) != value]
    unchanged = [(key, text_of(value)) for key, value in settings.items()
                 if defaults.get(key) == value]
    return {'known': bool(settings), 'changed': changed, 'unchanged': unchanged}


def text_of(value: Any) -> str:
    return str(value) or "''"


def data_sets(settings: dict) -> list[dict]:
    """What the manifest of each data set says, or what is wrong with it."""
    data_dir, text = Path(settings.get('data_dir') or DATA_DIR), settings.get('dataset', '')
    names = [text]
    if not (data_dir / text).is_dir():                  # a mixture: name:weight, name:weight
        names = [part.partition(':')[0].strip() for part in text.split(',')]
    described = []
    for name in filter(None, names):
        one = {'name': name, 'problem': 'Its manifest.json is not here, so nothing is known of it.'}
        try:
            manifest = read_manifest(name, data_dir)
            described.append({**one, **(from_manifest(manifest) if manifest else {})})
        except ValueError as error:                     # damaged: the rest of the page is not
            described.append({**one, 'problem': str(error)})
    return described


def from_manifest(manifest: dict) -> dict:
    """Where a data set comes from, how it was made, and the checksums of its files."""
    source, tokenizer = dict(manifest['source']), manifest['tokenizer']
    files = source.pop('files', [])                     # of Python's own library none are listed
    if files:
        size = sum(file[1] for file in files)
        source['files'] = f'{len(files):,}, together {size / 1e6:,.1f} MB'
    properties = [*source.items(),
                  ('tokenizer', f"{tokenizer['name']}, {tokenizer['vocab_size']:,} tokens"),
                  ('fingerprint', tokenizer['fingerprint'])]
    properties += [(remark, f'{count:,}, the first: {where}')
                   for remark, (count, where) in manifest.get('remarks', {}).items()]
    splits = manifest['splits']
    return {'problem': '', 'properties': properties, 'files': files,
            'splits': [(name, split['tokens'], split['documents'], split['bytes'])
                       for name, split in splits.items()],
            'shards': [(shard['file'], shard['tokens'], shard['sha256'])
                       for split in splits.values() for shard in split['shards']],
            'settings': [(key, text_of(value)) for key, value in manifest['settings'].items()]}


def spread(samples: dict[int, str]) -> list[tuple[int, str]]:
    """At most MAX_SAMPLES of the samples, at equal distances from the first to the last."""
    steps = sorted(samples)
    n = min(len(steps), MAX_SAMPLES)
    places = [round(i * (len(steps) - 1) / max(1, n - 1)) for i in range(n)]
    return [(steps[place], samples[steps[place]]) for place in places]


def evaluations(folder: Path) -> list[tuple]:
    """Rows of a table: the results under out/results/ of checkpoints of this run."""
    rows = []
    for path in sorted(results.OUT.glob('*/*.json')):
        try:
            result = results.read(path)
        except ValueError:                              # not a result, or half of one
            continue
        checkpoint = Path(result['model'].get('folder', '')).resolve()
        if not checkpoint.is_relative_to(folder.resolve()):
            continue
        first = f"first {result['first']:,}" if result.get('first') else ''
        other = '' if result['data'].get('official') else 'not known to be the official file'
        title = ', '.join(filter(None, (result['task'], result['protocol'], first, other)))
        for name, measure in result['measures'].items():
            value, _, interval = results.format_measure(measure).partition('  95 %: ')
            published = '; '.join(f'{figure:g} ({source})'
                                  for figure, source in measure['published'])
            rows.append((title, checkpoint.name, name, value, interval, published))
    return rows


def counted(events: list[dict]) -> dict:
    """Events of the log as rows, and how many there are of each kind."""
    kinds = [event['event'] for event in events]
    counts = ', '.join(f'{kinds.count(kind)} {kind}' for kind in dict.fromkeys(kinds))
    return {'counts': counts, 'rows': [(event['step'], event['event'], event.get('words', ''))
                                       for event in events]}


def as_table(records: list[dict]) -> dict:
    """Records as rows, with a column for every key."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    return {'columns': columns,
            'rows': [[record.get(key, '') for key in columns] for record in records]}
