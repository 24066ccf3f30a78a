"""
What runs leave, read and reckoned with: their logs, curves and settings, and which run is better.
"""

import ast
import json
from contextlib import suppress
from itertools import pairwise
from math import sqrt
from statistics import mean, median, stdev, variance

MOST_POINTS = 400           # of a curve in a picture: more would not be seen

NOT_THE_RECIPE = ('out_dir', 'seed', 'data_dir', 'device', 'log_interval', 'save_minutes', 'keep',
                  'always_save_checkpoint', 'sample_interval', 'hellaswag_interval',
                  'hellaswag_limit', 'hellaswag_data', 'wandb_log', 'wandb_project',
                  'wandb_run_name', 'plan', 'timeout_minutes')


def read_lines(path):
    """The records of a .jsonl file as they stand there, [] without one."""
    records = []
    for line in path.read_text(encoding='utf-8').splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):                    # the line at which a run was killed
            records.append(json.loads(line))
    return records


def read_log(path):
    """The records of a log.jsonl in order of their steps;
    what a later one says of a step counts."""
    if not path.exists():
        others = [str(log.parent) for log in sorted(path.parent.parent.glob('*/log.jsonl'))]
        others[4:] = ['…'] * (len(others) > 4)
        raise ValueError(f'given {path.parent}, expected the folder of a run, with a log.jsonl in '
                         f'it; ' + (f"there are {', '.join(others)}" if others else
                                    'train.py makes one under out/'))
    steps = {}
    for record in read_lines(path):
        if 'event' not in record:                               # what went wrong has no curve
            steps.setdefault(record['step'], {}).update(record)
    if not steps:
        raise ValueError(f'{path}: this log is empty')
    return [steps[step] for step in sorted(steps)]


def points(records, key):
    """([tokens], [value]) of the records that have `key`."""
    chosen = [(record['tokens'], record[key]) for record in records if record.get(key) is not None]
    return tuple(map(list, zip(*chosen))) or ([], [])


def smoothed(curve, width):
    """The curve as the mean of `width` points around each, fewer near its ends; it never lags."""
    tokens, values = curve
    half = max(0, width or len(values) // 100) // 2
    around = (values[max(0, i - half):i + half + 1] for i in range(len(values)))
    return tokens, [sum(part) / len(part) for part in around]


def thinned(curve):
    """Points of the curve at equal distances, the last among them, as many as can be told apart."""
    every = -(-len(curve[0]) // MOST_POINTS) or 1
    return tuple(values[::-every][::-1] for values in curve)


def limits(curves, low=None):
    """(lowest, highest) value worth a picture, with a margin, from `low` if given; None without
    values.

    The first twentieth of a run's tokens and the highest fiftieth of the rest do not count: a loss
    that begins at 10, or jumps there once, would squash all that matters into a line.
    """
    late = [value for tokens, values in curves for place, value in zip(tokens, values)
            if place > tokens[-1] / 20]
    values = sorted(late or [value for _, values in curves for value in values])
    if not values:
        return None
    high = values[-1 - len(values) // 50]
    margin = 0.06 * (high - (values[0] if low is None else low)) or 0.06 * abs(high) or 1
    return values[0] - margin if low is None else low, high + margin


def settings_of(folder):
    """The settings in the config.py of a run, {} without one."""
    path, found = folder / 'config.py', {}
    for line in path.read_text(encoding='utf-8').splitlines() if path.exists() else []:
        key, is_setting, value = line.partition(' = ')
        if is_setting and not key.startswith('#'):
            found[key] = ast.literal_eval(value)
    return found


def summary(records):
    """How far a run came, and its best validation, in a line."""
    best = min((record for record in records if record.get('val_loss') is not None),
               key=lambda record: record['val_loss'], default=None)
    words = f"{records[-1]['step']:,} updates, {records[-1]['tokens']:,} tokens"
    if best:
        words += f"; best val_loss {best['val_loss']:.4f} at update {best['step']:,}"
    if best and 'val_bits_per_byte' in best:
        words += f", {best['val_bits_per_byte']:.3f} bits per byte"
    if best and 'xz_bits_per_byte' in best:
        words += f" (xz -9e makes {best['xz_bits_per_byte']:.3f} of the same text)"
    return words


def seconds_to(records, tokens):
    """Seconds of updates until so many tokens, without validations and saves."""
    seconds, step, done = 0.0, 0, 0
    for record in records:
        if 'step_ms' in record and done < tokens:
            took = (record['step'] - step) * record['step_ms'] / 1000
            seconds += took * min(1, (tokens - done) / max(1, record['tokens'] - done))
            step, done = record['step'], record['tokens']
    return seconds


# Which of several runs is better.

class Curve:
    """A run as comparisons see it."""

    def __init__(self, folder):
        self.name, self.settings = str(folder), settings_of(folder)
        self.records = read_log(folder / 'log.jsonl')
        self.validations = [record for record in self.records
                            if record.get('val_loss') is not None]
        if not self.validations:
            raise ValueError(f'{folder}: there is no validation in its log to compare by')
        self.recipe = {key: value for key, value in self.settings.items()
                       if key not in NOT_THE_RECIPE}
        self.seed = self.settings.get('seed')
        self.xz = self.validations[0].get('xz_bits_per_byte')       # a mark of its validation text

    def losses(self, key):
        return [record[key] for record in self.validations]

    def tokens_to(self, target, key):
        """Tokens until `key` is `target` or less, on straight lines between validations; None if
        it never is."""
        if self.validations[0][key] <= target:
            return self.validations[0]['tokens']
        for one, two in pairwise(self.validations):
            if two[key] <= target:
                share = (one[key] - target) / (one[key] - two[key])
                return one['tokens'] + share * (two['tokens'] - one['tokens'])
        return None

    def seconds_to(self, tokens):
        return seconds_to(self.records, tokens)


def compared(folders, target=0.0):
    """The lines of a comparison: a table, then for all but the first what is better or worse."""
    curves = [Curve(folder) for folder in folders]
    groups, key = grouped(curves), measure(curves)
    target = target or max(min(curve.losses(key)) for curve in curves)
    lines = [f'{"":32}{key:>22}{"best":>10}{f"tokens to {target:.4f}":>20}{"seconds":>10}'
             f'{"tokens/s":>12}']
    for group in groups:
        finals = [curve.losses(key)[-1] for curve in group]
        tokens, seconds, rate = facts(group, target, key)
        spread = f' ± {stdev(finals):.4f}' if len(group) > 1 else ''
        lines.append(f'{named(group):32}{f"{mean(finals):.4f}{spread}":>22}'
                     f'{mean(min(curve.losses(key)) for curve in group):10.4f}'
                     f'{shown(tokens):>20}{shown(seconds):>10}{shown(rate):>12}')
    return lines + [line for group in groups[1:] for line in verdict(groups, group, target, key)]


def grouped(curves):
    """Lists of curves that differ in nothing but the seed, in the order of their first."""
    groups = []
    for curve in curves:
        fitting = [group for group in groups if group[0].recipe == curve.recipe
                   and curve.seed not in [other.seed for other in group]]
        if fitting:
            fitting[0].append(curve)
        else:
            groups.append([curve])
    return groups


def measure(curves):
    """The key of the log by which they can be compared; ValueError if by none."""
    first = curves[0]
    text = ['dataset', 'eval_tokens', 'eval_iters']
    text += ['batch_size', 'block_size'] if first.settings.get('eval_iters') else []
    for other in curves[1:]:
        a, b = ({key: curve.settings.get(key) for key in text} for curve in (first, other))
        if first.xz != other.xz or (a != b and not first.xz):
            words = '; '.join(', '.join(f'{key} {value!r}' for key, value in settings.items()
                                        if value) for settings in (a, b))
            raise ValueError(f'{first.name} and {other.name} were validated on different texts '
                             f'({words}): nothing says which is better')
    same = len({curve.settings.get('dataset') for curve in curves}) == 1
    return 'val_loss' if same else 'val_bits_per_byte'              # of other tokens


def facts(group, target, key):
    """Means of (tokens to the target, seconds to it, tokens per second), None where not known."""
    tokens = [curve.tokens_to(target, key) for curve in group]
    rates = [median(rates) for curve in group
             if (rates := points(curve.records, 'tokens_per_second')[1])]
    rate = mean(rates) if rates else None
    if None in tokens:
        return None, None, rate
    return mean(tokens), mean(curve.seconds_to(t) for curve, t in zip(group, tokens)), rate


def verdict(groups, group, target, key):
    """The lines that say how `group` compares with the first of `groups`. The noise is what runs of
    one recipe differ by, over all recipes with several seeds; Student's t at 95 % (two-sided)."""
    first = groups[0]
    a, b = (mean(curve.losses(key)[-1] for curve in runs) for runs in (first, group))
    several = [[curve.losses(key)[-1] for curve in runs] for runs in groups if len(runs) > 1]
    freedom = sum(len(finals) - 1 for finals in several)
    how = f'{key} {abs(b - a):.4f} {"lower" if b < a else "higher"}'
    if not several:
        words = f'{how}; how much of it is noise is not known: give runs with other seeds as well'
    else:
        spread = sqrt(sum((len(finals) - 1) * variance(finals) for finals in several) / freedom)
        noise = t95(freedom) * spread * sqrt(1 / len(first) + 1 / len(group))
        words = (f'{"within noise" if abs(b - a) <= noise else "better" if b < a else "worse"}: '
                 f'{how}; seeds alone make differences up to {noise:.4f} (95 %, standard deviation '
                 f'{spread:.4f} from {freedom + len(several)} runs)')
    lines = ['', f'{named(group)} against {named(first)}: {words}']
    ends = sorted({curve.records[-1]['tokens'] for curve in (*first, *group)})
    if len(ends) > 1:
        lines.append(f'  beware, they ended at {", ".join(f"{end:,}" for end in ends)} '
                     f'tokens; --target compares at a loss')
    for what, one, two in zip((f'tokens to {target:.4f}', 'seconds to it', 'tokens/s'),
                              facts(first, target, key), facts(group, target, key)):
        if one and two:
            lines.append(f'  {what}: {two / one:.2f} times')
    before, after = first[0].recipe, group[0].recipe
    changed = [f'{name} {before.get(name)!r} -> {value!r}'
               for name, value in after.items() if before.get(name) != value]
    lines.append(f'  {", ".join(changed) or "the settings are the same"}')
    return lines


def t95(freedom):
    """The 97.5 % quantile of Student's t, to 0.01."""
    table = 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23
    return table[freedom - 1] if freedom <= len(table) else 1.96 + 2.37 / freedom + 2.8 / freedom**2


def named(group):
    return group[0].name + f' ({len(group)} seeds)' * (len(group) > 1)


def shown(value):
    return '-' if value is None else f'{value:,.0f}'
