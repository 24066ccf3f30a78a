"""
What an evaluation found: measures with their intervals, printed, kept as JSON, and compared.

A measure is a dict: value, low and high (95 %), count, what it is measured on item by item (so that
two models can be compared on the same items), and the published figures beside it.
"""

import json
import math
import os
import platform
import re
import time
from pathlib import Path

import torch

OUT = Path(__file__).resolve().parent.parent / 'out' / 'results'
COLUMNS = {                 # of the GPT-2 paper's table 3: result and measure, title
    ('lambada-paper', 'perplexity'): 'LAMBADA (perplexity)',
    ('lambada-paper', 'accuracy'): 'LAMBADA (accuracy)',
    ('cbt-paper-valid-detok-CN-NE', 'CN'): 'CBT common nouns',
    ('cbt-paper-valid-detok-CN-NE', 'NE'): 'CBT named entities',
    ('wikitext2-paper', 'word'): 'WikiText-2 (perplexity)',
    ('ptb-paper', 'word'): 'PTB (perplexity)',
    ('enwik8-paper', 'byte'): 'enwik8 (bits per byte)',
    ('text8-paper', 'character'): 'text8 (bits per char)',
    ('wikitext103-paper', 'word'): 'WikiText-103 (perplexity)',
    ('1bw-paper', 'word'): '1BW (perplexity)'}
TABLE3 = {name: dict(zip(COLUMNS, row)) for name, row in {
    'gpt2': (35.13, 45.99, 87.65, 83.4, 29.41, 65.85, 1.16, 1.17, 37.50, 75.20),
    'gpt2-medium': (15.60, 55.48, 92.35, 87.1, 22.76, 47.33, 1.01, 1.06, 26.37, 55.72),
    'gpt2-large': (10.87, 60.12, 93.45, 88.0, 19.93, 40.31, 0.97, 1.02, 22.05, 44.575),
    'gpt2-xl': (8.63, 63.24, 93.30, 89.05, 18.34, 35.76, 0.93, 0.98, 17.48, 42.16)}.items()}
Z = 1.959964                # 95 % of a normal distribution lie within so many standard deviations


def accuracy(correct, about='', published=()):
    """The measure of a list of bools, with Wilson's interval.

    published: (value in per cent, source) of the same protocol and model.
    """
    n, k = len(correct), sum(correct)
    low, high = wilson(k, n)
    return {'value': k / n, 'low': low, 'high': high, 'correct': k, 'count': n, 'about': about,
            'published': list(published), 'items': ''.join('01'[right] for right in correct)}


def wilson(k, n):
    """The 95 % interval of a proportion k of n (Wilson 1927)."""
    p, z2 = k / n, Z * Z
    middle, half = p + z2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n))


def per_unit(nats, weights, unit, bits=False, about=''):
    """The measure of a text in pieces: nats[i] lost on the i-th, which has weights[i] units.

    It is the perplexity per unit, exp(nats / units), or with bits=True the bits per unit. The
    interval takes the pieces for independent; it is of the ratio of the sums (delta method).
    """
    total, units, k = math.fsum(nats), math.fsum(weights), len(nats)
    mean = total / units
    squares = math.fsum((a - mean * w) ** 2 for a, w in zip(nats, weights))
    half = Z * math.sqrt(squares * k / max(1, k - 1)) / units       # of one piece: 0, unknown
    value, low, high = (x / math.log(2) if bits else math.exp(min(x, 700))
                        for x in (mean, max(0.0, mean - half), mean + half))
    return {'value': value, 'low': low, 'high': high, 'unit': unit, 'bits': bits, 'nats': total,
            'count': round(units), 'about': about, 'published': [],
            'items': [round(a, 4) for a in nats]}


def check(cfg):
    """Refuse, before anything is measured, numbers below 0 and files that could not be written."""
    for key in ('limit', 'batch_tokens', 'stride'):
        if getattr(cfg, key, 0) < 0:
            raise ValueError(f'{key}: given {getattr(cfg, key)}, expected 0 or more')
    for path in filter(None, (cfg.out, getattr(cfg, 'dump', ''))):
        if Path(path).is_dir() or path.endswith('/'):
            raise ValueError(f'{path}: is a folder, expected the name of a file')
        Path(path).parent.mkdir(parents=True, exist_ok=True)


def limited(items, limit):
    """(the first `limit` of the items, limit); (all, 0) if there are no more, or limit is 0."""
    first = limit if limit < len(items) else 0
    return items[:first or None], first


def finish(cfg, world, started, **found):
    """Print what an evaluation has found, and write it as JSON to --out or to its own place.

    found: task, name, protocol, measures, notes, tokens (read), first (how many of the items were
    measured, 0: all), model (facts of checkpoints.open_for), data (facts of data.benchmarks).
    """
    found |= {'settings': vars(cfg), 'device': str(world.device), 'processes': world.size,
              'seconds': round(time.perf_counter() - started, 2),
              'versions': {'python': platform.python_version(), 'torch': torch.__version__}}
    path = Path(cfg.out) if cfg.out else place(found)
    write(path, found)
    print(show(found), f'  written to {path}', sep='\n')


def place(found):
    """Where a record is kept if no other place is named: the bare name is for the whole of the
    official data."""
    end = f"-first{found['first']}" if found['first'] else ''
    end += '' if found['data']['official'] else '-own-data'
    return folder(found['model']['name']) / f"{found['name']}{end}.json"


def folder(model):
    return OUT / as_name(model)


def as_name(text):
    """`text` as the name of a file."""
    return re.sub(r'[^\w.-]+', '_', text).strip('_')


def write(path, found):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f'{path.name}.{os.getpid()}.partial')
    aside.write_text(json.dumps(found, indent=1) + '\n', encoding='utf-8')
    os.replace(aside, path)


def write_rows(path, rows):
    """Write a line of JSON on each of the items."""
    Path(path).write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')


def read(path):
    try:
        found = json.loads(Path(path).read_text(encoding='utf-8'))
        found['task'], found['protocol'], found['measures'], found['data']['sha256']
        return found
    except OSError as error:
        raise ValueError(f'{path}: cannot read this result ({error.strerror}); '
                         f'an evaluation writes one, where --out says') from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{path}: not the result of an evaluation') from None


def show(found):
    """The lines that an evaluation ends with."""
    data = found['data']
    lines = [f"{found['task']}, {found['model']['name']}, protocol {found['protocol']}, "
             f"{found['model']['dtype']}"]
    for name, measure in found['measures'].items():
        lines.append(f"  {name:12} {shown(measure):38} {measure['about']}".rstrip())
        for value, source in measure['published']:
            share = value / 100 if 'correct' in measure else value
            where = 'inside' if measure['low'] <= share <= measure['high'] else 'outside'
            lines.append(f'  {"":12} published {value:g}, {source}: {where} the interval')
    lines += [f'  {note}' for note in found.get('notes', ())]
    if found['first']:
        lines.append(f"  only the first {found['first']:,}: compare with nothing published")
    if not data['official']:
        lines.append(f"  {data['path']}: not known to be the official file: "
                     f'compare with nothing published')
    rate = found['tokens'] / max(found['seconds'], 1e-3)
    return '\n'.join([*lines, f"  {found['seconds']:.1f} s, {found['tokens']:,} tokens read, "
                              f"{rate:,.0f} tokens/s on {found['device']}"])


def shown(measure):
    """The value of a measure, its count and its interval."""
    value, low, high, count = (measure[key] for key in ('value', 'low', 'high', 'count'))
    if 'correct' in measure:
        return (f"{value:.2%}  {measure['correct']}/{count}  95 %: "
                f'{100 * low:.2f} to {100 * high:.2f}')
    digits = 4 if measure['bits'] else 2
    interval = f'  95 %: {low:.{digits}f} to {high:.{digits}f}' if low < high else ''
    return f'{value:.{digits}f}{interval}'


def compare(paths):
    """The lines that say whether the second of two results is better than the first.

    Both were measured on the same items, and so the items are compared one by one: those only one
    model has right (McNemar's exact test), or the differences of nats (a paired z-test).
    """
    if len(paths) != 2:
        raise ValueError('compare: expected two results, --compare=a.json,b.json')
    a, b = map(read, paths)
    for key in ('task', 'protocol'):
        if a[key] != b[key]:
            raise ValueError(f'{key}: {paths[0]} has {a[key]!r}, {paths[1]} {b[key]!r}; '
                             f'only results of the same can be compared')
    if (a['data']['sha256'], a.get('first')) != (b['data']['sha256'], b.get('first')):
        raise ValueError(f'{paths[0]} and {paths[1]} were measured on different data or subsets')
    lines = [f"{b['task']}, {b['protocol']}: {b['model']['name']} against {a['model']['name']}"]
    for name, one in a['measures'].items():
        if not one['items']:
            continue
        two = b['measures'].get(name)
        if two is None or len(one['items']) != len(two['items']):
            raise ValueError(f'{name}: the two results do not cover the same items; '
                             f'--limit and --subset have to be the same')
        better, p, why = paired(one, two)
        verdict = 'within noise' if p >= 0.05 else 'better' if better else 'worse'
        before, after = (shown(measure).partition('  95 %')[0] for measure in (one, two))
        lines.append(f'  {name:12} {verdict}: {after} against {before} (p = {p:.2g}; {why})')
    return '\n'.join(lines)


def paired(one, two):
    """(whether `two` is better, the p-value of no difference, what it was reckoned from)."""
    if 'correct' in one:
        pairs = list(zip(one['items'], two['items']))
        lost, won = pairs.count(('1', '0')), pairs.count(('0', '1'))
        n, tail = lost + won, sum(math.comb(lost + won, i) for i in range(min(lost, won) + 1))
        return won > lost, min(1.0, 2 * tail / 2 ** n), f'right only here {won}, only there {lost}'
    gaps = [x - y for x, y in zip(one['items'], two['items'])]
    mean, n = sum(gaps) / len(gaps), len(gaps)
    spread = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / max(1, n - 1) / n)
    p = math.erfc(abs(mean) / spread / math.sqrt(2)) if spread else float(mean == 0)
    return mean > 0, p, f'{sum(gap > 0 for gap in gaps)} of {n} pieces are better'
