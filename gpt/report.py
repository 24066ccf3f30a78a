"""
A page about a run: what its folder, its data set and its evaluations tell, as one file of HTML.

It holds no script, no font and no address: its pictures are in it, for light and dark, for a phone
and a screen. Whatever comes from a file is escaped.
"""

import ast
import html
import re
from base64 import b64encode
from itertools import takewhile
from pathlib import Path
from statistics import median

from gpt import results
from gpt.curves import read_lines, seconds_to, settings_of, summary
from gpt.data.shards import DATA_DIR, read_manifest

ROOT = Path(__file__).resolve().parent.parent
MOST_ROWS, MOST_SAMPLES = 200, 5        # shown; the files have the rest
WIDE = '50rem'                          # of a window that has room for panels side by side

STYLE = '''
:root { color-scheme: light dark; --page: #fdfdfb; --ink: #22262a; --quiet: #5a6066;
  --rule: #dddedb; --sheet: #f3f4f1; --link: #1f5f95 }
@media (prefers-color-scheme: dark) { :root { --page: #15181b; --ink: #e3e5e6; --quiet: #a3aab0;
  --rule: #353a3f; --sheet: #1d2125; --link: #84bdea } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 48rem; background: var(--page);
  color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", sans-serif;
  -webkit-text-size-adjust: 100%; overflow-wrap: anywhere }
h1, h2, h3 { font-family: Georgia, "Times New Roman", serif; font-weight: 400; line-height: 1.25 }
h1 { font-size: 2rem; margin: 1rem 0 .5rem }
h2 { font-size: 1.4rem; margin: 3rem 0 .75rem; padding-top: .75rem;
  border-top: 1px solid var(--rule) }
h3 { font-size: 1.1rem; margin: 1.75rem 0 .5rem }
p { margin: .5rem 0 }
.quiet, figcaption, summary { color: var(--quiet) }
code, td.mono { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono",
  monospace; font-size: .8125rem }
figure { margin: 1.5rem 0 }
img { display: block; width: 100%; height: auto }
.box { overflow-x: auto; margin: .75rem 0; overflow-wrap: normal }
table { border-collapse: collapse; min-width: 60% }
th, td { padding: .3rem 1rem .3rem 0; text-align: left; vertical-align: baseline;
  border-bottom: 1px solid var(--rule) }
th { color: var(--quiet); font-weight: 400; font-size: .875rem; white-space: nowrap }
td.mono { white-space: nowrap }
.right { text-align: right }
summary { cursor: pointer; padding: .35rem 0 }
details { margin: .5rem 0 }
blockquote { margin: .5rem 0 1.5rem; padding: .75rem 1rem; background: var(--sheet);
  white-space: pre-wrap; font-family: Georgia, "Times New Roman", serif }
footer { margin-top: 3rem; padding-top: .75rem; border-top: 1px solid var(--rule);
  color: var(--quiet); font-size: .875rem }
'''


def page(folder, records, pictures):
    """The HTML about the run in `folder`, whose log is `records`.

    pictures: {(theme, whether it is wide): SVG} for the themes 'light' and 'dark'.
    """
    name = folder.resolve().name
    found, log = settings_of(folder), read_lines(folder / 'log.jsonl')
    parts = {'Curves': pictured(pictures, records), 'Settings': changed(found),
             'Data': data(found), 'Samples': samples(read_lines(folder / 'samples.jsonl')),
             'Evaluation': evaluations(folder),
             'Events': events([record for record in log if 'event' in record]),
             'Environment': environment(read_lines(folder / 'starts.jsonl'))}
    body = '\n'.join(f'<section>\n<h2>{title}</h2>\n{part}\n</section>'
                     for title, part in parts.items())
    return f'''<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(name)}, a run of GPT-2</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(name)}</h1>
<p>{escape(summary(records))}.</p>
<p class="quiet">{escape(shape(found, records))}</p>
</header>
<main>
{body}
</main>
<footer>Made from the files of the run by <code>plot.py --report</code>.</footer>
</body>
</html>
'''


# Its parts, each from facts to HTML.

def shape(found, records):
    """What ran, and how fast, in a line."""
    words, began = [], found.get('init_from')
    if began in ('auto', 'scratch', 'resume'):
        words.append('{n_layer} layers of {n_embd}, {n_head} heads, {block_size:,} tokens at a time'
                     .format(**found))
    elif began:                                     # whose layers the settings do not tell
        words.append(f'fine-tuned from {began}')
    rates = [record['tokens_per_second'] for record in records if 'tokens_per_second' in record]
    if rates:
        minutes = seconds_to(records, records[-1]['tokens']) / 60
        words.append(f'{median(rates):,.0f} tokens per second; ' + (
            f'{minutes / 60:,.1f} hours' if minutes > 90 else f'{minutes:.0f} minutes') +
            ' of updates')
    return '; '.join(words) + '.' * bool(words)


def pictured(pictures, records):
    """The pictures, of which a browser shows the one for its theme and width."""
    sources = [f'<source media="{media}" srcset="{inline(pictures[which])}">' for media, which in (
        (f'(min-width: {WIDE}) and (prefers-color-scheme: dark)', ('dark', True)),
        (f'(min-width: {WIDE})', ('light', True)),
        ('(prefers-color-scheme: dark)', ('dark', False)))]
    said = escape(f'Curves over tokens, of the loss and of what else the log has. '
                  f'{summary(records)}.')
    return '\n'.join(['<figure>', '<picture>', *sources,
                      f'<img src="{inline(pictures["light", False])}" alt="{said}">', '</picture>',
                      '<figcaption>Losses of training are averaged around each point; steep '
                      'beginnings and single peaks may lie above a panel.</figcaption>',
                      '</figure>'])


def inline(svg):
    return f'data:image/svg+xml;base64,{b64encode(svg.encode()).decode()}'


def changed(found):
    """The settings, those first that are not the defaults of train.py."""
    if not found:
        return note('This folder has no config.py, so the settings are not known.')
    usual = defaults()
    other = {key: value for key, value in found.items() if usual.get(key, ...) != value}
    rows = [(key, plain(value), plain(usual[key]) if key in usual else 'none')
            for key, value in other.items()]
    rest = [(key, plain(value)) for key, value in found.items() if key not in other]
    return ((table(('setting', 'here', 'default'), rows, 'mmm') if rows else
             note('All are the defaults of train.py.'))
            + folded(f'{len(rest)} settings are the defaults',
                     table(('setting', 'value'), rest, 'mm')))


def plain(value):
    return str(value) or "''"


def defaults():
    """{setting: default} of train.py, read off its header: scripts are not imported here."""
    tree = ast.parse((ROOT / 'train.py').read_text(encoding='utf-8'))
    lines = [node for node in tree.body if isinstance(node, ast.Assign)]
    header = takewhile(lambda node: node.targets[0].id != 'Config', lines)
    return {node.targets[0].id: ast.literal_eval(node.value) for node in header}


def data(found):
    """What the manifests of its data sets say."""
    if 'dataset' not in found:
        return note('The data set is not known.')
    root, text = Path(found.get('data_dir') or DATA_DIR), found['dataset']
    names = [text] if (root / text).is_dir() else [
        part.partition(':')[0].strip() for part in text.split(',')]
    parts = [note(f'A mixture: {text}')] if len(names) > 1 else []
    for name in names:
        parts.append(f'<h3>{escape(name)}</h3>')
        try:
            facts = read_manifest(name, root)
        except ValueError as error:                     # damaged: the rest of the page is not
            parts.append(note(f'{error}'))
            continue
        parts.append(manifest(facts) if facts else
                     note('Its manifest.json is not here, so nothing is known of it.'))
    return '\n'.join(parts)


def manifest(facts):
    """A data set: where it comes from, how it was made, and the checksums of all its files."""
    source, kind = dict(facts['source']), facts['tokenizer']
    files = source.pop('files', [])                     # of Python's own library none are listed
    if files:
        size = sum(file[1] for file in files)
        source['files'] = f'{len(files):,}, together {size / 1e6:,.1f} MB'
    rows = [*source.items(), ('tokenizer', f"{kind['name']}, {kind['vocab_size']:,} tokens"),
            ('fingerprint', kind['fingerprint'])]
    rows += [(what, f'{count:,}, the first: {where}')
             for what, (count, where) in facts.get('remarks', {}).items()]
    splits = [(name, split['tokens'], split['documents'], split['bytes'])
              for name, split in facts['splits'].items()]
    shards = [(shard['file'], shard['tokens'], shard['sha256'])
              for split in facts['splits'].values() for shard in split['shards']]
    how = [(key, plain(value)) for key, value in facts['settings'].items()]
    return (table(('split', 'tokens', 'documents', 'bytes'), splits, ' rrr')
            + table(None, rows, ' m')
            + folded('How it was prepared', table(None, how, 'mm'))
            + folded('Checksums of the shards', table(
                ('shard', 'tokens', 'sha256'), shards, 'mrm', 'manifest.json'))
            + (folded('The files it was made from', table(
                ('file', 'bytes', 'sha256'), files, 'mrm', 'manifest.json')) if files else ''))


def samples(records):
    """Samples at equal distances, from the first to the last."""
    texts = {record['step']: record['text'] for record in records}      # a resume draws some again
    steps = sorted(texts)
    if not steps:
        return note('This run drew no samples; train.py does with --sample_interval=1000.')
    many = min(len(steps), MOST_SAMPLES)
    chosen = [steps[round(i * (len(steps) - 1) / max(1, many - 1))] for i in range(many)]
    words = f'{many} of {len(steps)}, drawn by the same random numbers; samples.jsonl has the rest.'
    return (note(words) if many < len(steps) else '') + '\n'.join(
        f'<h3>Update {step:,}</h3>\n<blockquote>{escape(texts[step])}</blockquote>'
        for step in chosen)


def evaluations(folder):
    """The results under out/results/ that were measured on a checkpoint of this run."""
    rows, remarks = [], []
    for path in sorted(results.OUT.glob('*/*.json')):
        try:
            found = results.read(path)
        except ValueError:
            continue                                    # no result, or half of one
        model = (ROOT / found['model'].get('folder', '')).resolve()
        if not model.is_relative_to(folder.resolve()):
            continue
        what = f"{found['task']}, {found['protocol']}"
        for name, measure in found['measures'].items():
            value, _, rest = results.shown(measure).partition('  95 %: ')
            published = '; '.join(f'{number:g} ({source})'
                                  for number, source in measure['published'])
            rows.append((what, model.name, name, value, rest, published))
        if found['first']:
            remarks.append(f"{what}: only the first {found['first']:,}; nothing published compares")
        if not found['data']['official']:
            remarks.append(f'{what}: not known to be the official file; nothing published compares')
    if not rows:
        return note('No result under out/results/ belongs to this run.')
    return table(('benchmark', 'checkpoint', 'measure', 'value', '95 %', 'published'), rows,
                 ' m mm ') + ''.join(map(note, remarks))


def events(records):
    """What did not go as planned."""
    if not records:
        return note('The log has none: no update was skipped, no loss jumped.')
    kinds = [record['event'] for record in records]
    words = ', '.join(f'{kinds.count(kind)} {kind}' for kind in dict.fromkeys(kinds))
    return note(words) + table(
        ('update', 'event', 'words'),
        [(record['step'], record['event'], record.get('words', '')) for record in records],
        'r  ', 'log.jsonl')


def environment(records):
    """A row for each time that the run began or went on."""
    if not records:
        return note('This run kept no starts.jsonl, so it is not known where it ran.')
    keys = list(dict.fromkeys(key for record in records for key in record))
    return table(keys, [[record.get(key, '') for key in keys] for record in records],
                 'm' * len(keys), 'starts.jsonl')


# HTML.

def table(head, rows, kinds, where=''):
    """Rows of cells in a box that scrolls by itself; of many the first, `where` has the rest.

    kinds: a letter for each column: 'm' monospaced, 'r' that and to the right, ' ' plain.
    """
    rows = list(rows)
    lines = [line('th', head, kinds)] if head else []
    lines += [line('td', row, kinds) for row in rows[:MOST_ROWS]]
    more = note(f'{len(rows) - MOST_ROWS:,} more are in {where}.') if rows[MOST_ROWS:] else ''
    return '\n'.join(['<div class="box"><table>', *lines, '</table></div>', more])


def line(tag, cells, kinds):
    named = {'m': 'mono', 'r': 'mono right', ' ': ''}
    words = (f'{cell:,}' if type(cell) is int else str(cell) for cell in cells)
    return ''.join(['<tr>', *(f'<{tag} class="{named[kind]}">{escape(word)}</{tag}>'
                              for word, kind in zip(words, kinds)), '</tr>'])


def escape(text):
    """Text as HTML; what HTML has no character for, models may write all the same."""
    return html.escape(re.sub('[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]', '\ufffd', text))


def note(words):
    return f'<p>{escape(words)}</p>\n'


def folded(words, inner):
    return f'<details><summary>{escape(words)}</summary>\n{inner}\n</details>\n'
