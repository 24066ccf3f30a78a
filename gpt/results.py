"""
Results of evaluations: the course of an evaluation, measures with intervals, JSON, comparisons.

A measure is a dict: value, low and high (95 %), count, the items it is a mean of (so that two
models can be compared item by item), and the published figures beside it.
"""

import json
import math
import os
import platform
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch

from gpt import checkpoints, scoring
from gpt.files import atomic_write, check_output, read_json
from gpt.hub import SIZES
from gpt.script import complain
from gpt.settings import check_bounds
from gpt.shapes import Count, Measured
from gpt.world import World

OUT = Path('out/results')   # of the folder in which a script is started, as out/ is for runs
Z = 1.959964                # standard deviations that hold 95 % of a normal distribution
Measure = dict[str, Any]

# Published figures: per cent of right answers, perplexities, bits.

TABLE3 = {                  # of the GPT-2 paper: result and measure; title, then a figure per size
    ('lambada-paper', 'perplexity'): ('LAMBADA (perplexity)', 35.13, 15.60, 10.87, 8.63),
    ('lambada-paper', 'accuracy'): ('LAMBADA (accuracy)', 45.99, 55.48, 60.12, 63.24),
    ('cbt-paper-valid-detok-CN-NE', 'CN'): ('CBT common nouns', 87.65, 92.35, 93.45, 93.30),
    ('cbt-paper-valid-detok-CN-NE', 'NE'): ('CBT named entities', 83.4, 87.1, 88.0, 89.05),
    ('wikitext2-paper', 'word'): ('WikiText-2 (perplexity)', 29.41, 22.76, 19.93, 18.34),
    ('ptb-paper', 'word'): ('PTB (perplexity)', 65.85, 47.33, 40.31, 35.76),
    ('enwik8-paper', 'byte'): ('enwik8 (bits per byte)', 1.16, 1.01, 0.97, 0.93),
    ('text8-paper', 'character'): ('text8 (bits per char)', 1.17, 1.06, 1.02, 0.98),
    ('wikitext103-paper', 'word'): ('WikiText-103 (perplexity)', 37.50, 26.37, 22.05, 17.48),
    ('1bw-paper', 'word'): ('1BW (perplexity)', 75.20, 55.72, 44.575, 42.16)}
LLM_C, HARNESS = 'llm.c and build-nanogpt', 'lm-evaluation-harness'
PUBLISHED = {               # by result, measure and model: value, source
    **{(*column, size): (value, 'GPT-2 paper')
       for column, (_, *row) in TABLE3.items() for size, value in zip(SIZES, row)},
    ('hellaswag-completion', 'acc_norm', 'gpt2'): (29.55, LLM_C),
    ('hellaswag-completion', 'acc', 'gpt2'): (28.59, LLM_C),
    ('hellaswag-completion', 'acc_norm', 'gpt2-medium'): (37.52, 'llm.c, bfloat16'),
    ('hellaswag-completion', 'acc_norm', 'gpt2-large'): (43.20, 'llm.c, bfloat16'),
    ('hellaswag-completion', 'acc_norm', 'gpt2-xl'): (48.93, LLM_C),
    ('hellaswag-completion', 'acc', 'gpt2-xl'): (38.42, LLM_C),
    ('hellaswag-lm-eval', 'acc_norm', 'gpt2'): (31.14, HARNESS),
    ('hellaswag-lm-eval', 'acc', 'gpt2'): (28.92, HARNESS),
    ('hellaswag-lm-eval', 'acc_norm', 'gpt2-xl'): (50.89, HARNESS),
    ('hellaswag-lm-eval', 'acc', 'gpt2-xl'): (40.04, HARNESS),
    **{('cbt-mindspore-valid-raw-CN-NE', subset, size): (value, 'MindSpore model zoo')
       for subset, row in (('CN', (87.85, 92.10, 93.70)), ('NE', (85.10, 87.55, 89.10)))
       for size, value in zip(SIZES, row)},
    ('cbt-seed-test-raw-CN', 'CN', 'gpt2'): (86.84, 'SeekDeeper'),
    ('lambada-harness', 'accuracy', 'gpt2'): (32.56, 'lm-evaluation-harness #2159'),
    ('lambada-harness', 'perplexity', 'gpt2'): (40.06, 'lm-evaluation-harness #2159'),
    ('lambada-last-token', 'accuracy', 'gpt2'): (46.67, 'cybertronai/bflm'),
    ('wikitext2-harness', 'word', 'gpt2'): (37.37, 'transformers #13761'),
    ('wikitext2-hf', 'token', 'gpt2'): (29.94, "transformers' documentation"),
    ('wikitext2-hf', 'token', 'gpt2-large'): (19.44, "transformers' documentation")}


# What is read of a result.

INTERVAL = {'value': float, 'low': float, 'high': float, 'count': Count, 'about': str,
            'published': list[tuple[float, str]]}
Accuracy = TypedDict('Accuracy', {**INTERVAL, 'correct': Count, 'items': str})  # 0 or 1 each
PerUnit = TypedDict('PerUnit', {**INTERVAL, 'bits': bool, 'items': list[Measured]})     # of nats
RESULT = {
    'task': str, 'protocol': str, 'first': NotRequired[Count],
    'model': TypedDict('Weights', {'name': str, 'folder': NotRequired[str],
                                   'sha256': NotRequired[str]}),
    'data': TypedDict('Facts', {'sha256': str, 'official': NotRequired[bool]}),
    'measures': dict[str, Accuracy | PerUnit]}
Result = TypedDict('Result', RESULT)
Finished = TypedDict('Finished', {      # with what is printed of it
    **RESULT, 'notes': list[str], 'tokens': Count, 'tokens_before': Count, 'seconds': Measured})


# The course of an evaluation.

def run_evaluation(cfg: Any, read_data: Callable[..., tuple[Any, dict, str]],
                   measure: Callable[..., tuple[dict, list[str], list[dict]]]) -> None:
    """Run an evaluation on all processes: read the data, load the model, measure, print, write.

    read_data(cfg) runs on rank 0 alone, and returns what measure() takes; what identifies it: task
    (a title), name (of the file of the result), protocol, data (path, sha256, official), first
    (only the first N items were taken; 0: all) and unit (what N counts); and the name under which
    PUBLISHED has figures of the same. measure(cfg, model, encoding, items, options) runs on every
    rank, and returns measures, notes, and a row for each item, which --dump writes; options are
    those of gpt.scoring.ScoringOptions, as a dict. The same command after a kill continues, and
    after the end prints the result again.
    """
    if cfg.compare:
        return print(compare(cfg.compare))
    check_bounds(cfg, [('0 or more', lambda value: value >= 0, 'limit batch_tokens')])
    check_outputs(cfg, cfg.out)
    world = World.join(cfg.device, timeout_minutes=120)             # rank 0 may have to download
    items, about, published = world.on_main(read_data, cfg)
    if cfg.download:
        world.print(about['data']['path'])
        return world.leave()
    model, encoding, weights = checkpoints.load_for_evaluation(world, cfg.model, cfg.dtype)
    about |= {'model': weights, 'settings': vars(cfg), 'device': str(world.device),
              'versions': {'python': platform.python_version(), 'torch': torch.__version__}}
    path, key, before = world.on_main(measured_before, cfg, about)
    if before:
        world.print(f'{format_result(before)}\n  measured before, in {path}; delete it to measure '
                    f'again')
        return world.leave()
    kept = scoring.Kept(path.with_name(f'{path.name}.partial'), key, world)
    started = time.perf_counter()
    options = {'batch_tokens': cfg.batch_tokens, 'world': world, 'progress': True, 'kept': kept}
    try:
        measures, notes, rows = measure(cfg, model, encoding, items, options)
    except KeyboardInterrupt:
        if world.is_main and kept.path.exists():
            complain(f'stopped; what is measured so far is in {kept.path}, and the same command '
                     f'continues\n')
        raise
    for key, found in measures.items():
        figure = PUBLISHED.get((published, key, checkpoints.official_name(cfg.model)))
        if figure and about['data']['official'] and not about['first']:
            found['published'] = [figure]
    if world.is_main:
        result = {**about, 'measures': measures, 'notes': notes, 'tokens': kept.tokens,
                  'tokens_before': kept.tokens_before, 'processes': world.size,
                  'seconds': round(time.perf_counter() - started, 2)}
        world.print(format_result(result))      # first: nothing that fails below can lose it
        if getattr(cfg, 'dump', ''):
            atomic_write(cfg.dump, ''.join(json.dumps(row) + '\n' for row in rows))
        write(path, result)
        world.print(f'  written to {path}')
    kept.path.unlink(missing_ok=True)
    world.leave()


def measured_before(cfg: Any, about: dict) -> tuple[Path, str, dict | None]:
    """(where the result is kept, all that identifies it as text, the result if it is there).

    Only of the same weights, data, settings and versions is it the same result.
    """
    path, key = check_outputs(cfg, cfg.out or result_path(about)), json.dumps(about)
    dump = getattr(cfg, 'dump', '')
    with suppress(ValueError):
        found = read_json(path, Finished)
        if {**found, **json.loads(key)} == found and (not dump or Path(dump).exists()):
            return path, key, found
    return path, key, None


def check_outputs(cfg: Any, out: str | Path) -> Path | None:
    """The file of the result. Refuses files that cannot be written or must not be, as inputs and
    what is no result, before anything is measured."""
    inputs, dump = (cfg.data, getattr(cfg, 'file', '')), getattr(cfg, 'dump', '')
    if dump and out and os.path.realpath(dump) == os.path.realpath(Path(out).expanduser()):
        raise ValueError(f'dump: given {dump!r}, which is --out; expected another file')
    if dump:
        check_output(dump, *inputs)
    path = check_output(out, *inputs) if out else None
    if path and cfg.out and path.exists() and path.stat().st_size:
        try:
            read(path)
        except ValueError as error:
            raise ValueError(f'{error}; it is not replaced, give another --out') from None
    return path


def limited(items: Sequence, limit: int) -> tuple[Sequence, int]:
    """(the first `limit` items, limit), or (all, 0) if limit is 0 or there are no more."""
    if 0 < limit < len(items):
        return items[:limit], limit
    return items, 0


# Measures.

def accuracy(correct: Sequence[bool], about: str = '') -> Measure:
    """The measure of right and wrong answers, with Wilson's interval."""
    n, k = len(correct), sum(correct)
    low, high = wilson(k, n)
    return {'value': k / n, 'low': low, 'high': high, 'correct': k, 'count': n, 'about': about,
            'published': [], 'items': ''.join('01'[right] for right in correct)}


def by_group(pairs: Iterable[tuple[str | None, bool]]) -> list[str]:
    """A note on the accuracy of each group, from pairs of (group, whether an answer is right)."""
    groups = defaultdict(list)
    for group, is_right in pairs:
        groups[group].append(is_right)
    parts = [f'{group}: {sum(part) / len(part):.2%} of {len(part)}'
             for group, part in groups.items() if group]
    return [', '.join(parts)] if parts else []


def wilson(k: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a proportion k of n (Wilson 1927)."""
    p, z2 = k / n, Z * Z
    middle, half = p + z2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n))


def per_unit(nats: Sequence[float], weights: Sequence[float], unit: str, bits: bool = False,
             about: str = '') -> Measure:
    """The measure of a text in pieces: piece i has a loss of nats[i] over weights[i] units.

    The value is the perplexity per unit, exp(nats / units), or with bits=True the bits per unit.
    The interval is of the ratio of the sums (delta method), with the pieces as independent.
    """
    total, units, n = math.fsum(nats), math.fsum(weights), len(nats)
    mean = total / units
    squares = math.fsum((a - mean * w) ** 2 for a, w in zip(nats, weights))
    half = Z * math.sqrt(squares * n / max(1, n - 1)) / units       # of one piece: 0, unknown
    value, low, high = (x / math.log(2) if bits else math.exp(min(x, 700))
                        for x in (mean, max(0.0, mean - half), mean + half))
    return {'value': value, 'low': low, 'high': high, 'unit': unit, 'bits': bits, 'nats': total,
            'count': round(units), 'about': about, 'published': [],
            'items': [round(a, 4) for a in nats]}


def format_measure(measure: Measure, interval: bool = True) -> str:
    """The value of a measure, its count, and its interval if wanted and known."""
    value, low, high, count = (measure[key] for key in ('value', 'low', 'high', 'count'))
    if 'correct' in measure:
        text = f"{value:.2%}  {measure['correct']}/{count}"
        bounds = f'{100 * low:.2f} to {100 * high:.2f}'
    else:
        digits = 4 if measure['bits'] else 2
        text = f'{value:.{digits}f}'
        bounds = f'{low:.{digits}f} to {high:.{digits}f}' if low < high else ''
    return f'{text}  95 %: {bounds}' if bounds and interval else text


# Results: measures with all that identifies them, as JSON.

def result_path(result: dict) -> Path:
    """Where a result is kept by default; the bare name is for all of the official data, in float32
    and with shared contexts."""
    dtype, first = result['model']['dtype'], result['first']
    parts = (result['name'], '' if result['settings'].get('share', True) else 'unshared',
             '' if dtype == 'float32' else dtype, f'first{first}' if first else '',
             '' if result['data']['official'] else file_id(result['data']))
    return folder_of(result['model']['name']) / f"{'-'.join(filter(None, parts))}.json"


def file_id(facts: dict) -> str:
    """The name and the beginning of the hash of a file of data, different for every content."""
    hashes = '-'.join(one[:8] for one in facts['sha256'].split('-'))
    return f"{file_name(Path(facts['path']).stem)[:60]}-{hashes}"


def folder_of(model: str) -> Path:
    """The folder of the results of a model."""
    return OUT / file_name(model)


def file_name(text: str) -> str:
    """`text` as the name of a file."""
    return re.sub(r'[^\w.-]+', '_', text).strip('_')


def write(path: str | Path, result: dict) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(result, indent=1) + '\n')


def read(path: str | Path) -> dict:
    """The result in a file; ValueError if it is none."""
    try:
        return read_json(path, Result)
    except ValueError as error:
        problem = str(error).removeprefix(f'{path}: ')
        raise ValueError(f'{path}: not the result of an evaluation ({problem})') from None


def format_result(result: dict) -> str:
    """The lines that an evaluation ends with."""
    data, model = result['data'], result['model']
    lines = [f"{result['task']}, {model['name']}, protocol {result['protocol']}, {model['dtype']}"]
    for name, measure in result['measures'].items():
        lines.append(f"  {name:12} {format_measure(measure):38} {measure['about']}".rstrip())
        for value, source in measure['published']:
            scaled = value / 100 if 'correct' in measure else value
            where = 'inside' if measure['low'] <= scaled <= measure['high'] else 'outside'
            lines.append(f'  {"":12} published {value:g}, {source}: {where} the interval')
    lines += [f'  {note}' for note in result.get('notes', ())]
    if result['first']:
        lines.append(f"  only the first {result['first']:,} {result['unit']}: compare with nothing "
                     f'published')
    if not data['official']:
        lines.append(f"  {data['path']}: not known to be the official file: "
                     f'compare with nothing published')
    tokens, before = result['tokens'], result['tokens_before']
    rate = (tokens - before) / max(result['seconds'], 1e-3)
    of_them = f' ({before:,} of them before it was continued)' if before else ''
    return '\n'.join([*lines, f"  {result['seconds']:.1f} s, {tokens:,} tokens read{of_them}, "
                              f"{rate:,.0f} tokens/s on {result['device']}"])


# Which of two models is better.

def compare(paths: Sequence[str]) -> str:
    """The lines that say whether the second of two results is better than the first, item by item;
    ValueError if they are not of the same measurement."""
    if len(paths) != 2:
        raise ValueError('compare: expected two results, --compare=a.json,b.json')
    a, b = map(read, paths)
    for key in ('task', 'protocol', 'data', 'first'):
        one, two = (found[key]['sha256'] if key == 'data' else found.get(key) for found in (a, b))
        if one != two:
            raise ValueError(f'{key}: {paths[0]} has {one!r}, {paths[1]} {two!r}; '
                             f'only results of the same can be compared')
    lines = [f"{b['task']}, {b['protocol']}: {b['model']['name']} against {a['model']['name']}"]
    for name, before in a['measures'].items():
        kinds = [(type(items), len(items)) for items in (
            before['items'], b['measures'].get(name, {'items': []})['items'])]
        if kinds[0] != kinds[1]:
            raise ValueError(f'{name}: the two results do not cover the same items; '
                             f'--limit and --subset have to be the same')
        if before['items']:
            lines.append(f"  {name:12} {verdict(before, b['measures'][name])}")
    return '\n'.join(lines)


def verdict(before: Measure, after: Measure) -> str:
    """Whether one measure is better than another of the same items."""
    test = mcnemar if 'correct' in before else paired_z
    better, p, basis = test(before['items'], after['items'])
    word = 'within noise' if p >= 0.05 else 'better' if better else 'worse'
    return (f'{word}: {format_measure(after, interval=False)} against '
            f'{format_measure(before, interval=False)} (p = {p:.2g}; {basis})')


def mcnemar(before: str, after: str) -> tuple[bool, float, str]:
    """(whether `after` has more right answers, the p-value of no difference, its basis), by
    McNemar's exact test over strings of 0 and 1."""
    pairs = list(zip(before, after))
    lost, won = pairs.count(('1', '0')), pairs.count(('0', '1'))
    n = lost + won
    tail = math.fsum(math.exp(math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
                              - n * math.log(2)) for i in range(min(lost, won) + 1))
    return won > lost, min(1.0, 2 * tail), f'right only here {won}, only there {lost}'


def paired_z(before: Sequence[float], after: Sequence[float]) -> tuple[bool, float, str]:
    """(whether `after` has a lower loss, the p-value of no difference, its basis), by a z-test of
    the differences of nats."""
    gains = [x - y for x, y in zip(before, after)]
    n = len(gains)
    mean = sum(gains) / n
    error = math.sqrt(sum((gain - mean) ** 2 for gain in gains) / max(1, n - 1) / n)
    p = math.erfc(abs(mean) / error / math.sqrt(2)) if error else float(mean == 0)
    return mean > 0, p, f'{sum(gain > 0 for gain in gains)} of {n} pieces are better'
