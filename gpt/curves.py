"""
Logs and settings of runs, their curves, and which of several runs is better.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from math import sqrt
from pathlib import Path
from statistics import mean, median, stdev, variance
from typing import Any, NotRequired, TypedDict

from gpt.config_file import assignments
from gpt.files import ROOT, read_text
from gpt.settings import header_defaults, typed
from gpt.shapes import AnyText, Count, Measured, NotJson, parse_json

MAX_POINTS = 400            # of a curve in a picture: more cannot be seen

NOT_THE_RECIPE = ('out_dir', 'seed', 'data_dir', 'device', 'log_interval', 'save_minutes', 'keep',
                  'always_save_checkpoint', 'sample_interval', 'hellaswag_interval',
                  'hellaswag_limit', 'hellaswag_data', 'wandb_log', 'wandb_project',
                  'wandb_run_name', 'plan', 'timeout_minutes')

Points = tuple[list, list]                              # (tokens, values)


# Files of a run.

Record = TypedDict('Record', {          # a line of log.jsonl: numbers of a step, or an event
    'step': Count, 'tokens': NotRequired[Count],        # read so far; events have none
    'event': NotRequired[AnyText], 'words': NotRequired[AnyText],
    'to_step': NotRequired[Count],                      # of a rollback
    'step_ms': NotRequired[Measured], 'tokens_per_second': NotRequired[Measured],
    **{key: NotRequired[Measured | None] for key in (   # null where not finite
        'loss', 'lr', 'grad_norm', 'val_loss', 'val_bits_per_byte', 'xz_bits_per_byte',
        'hellaswag')}})


def read_lines(path: Path, shape: Any = dict) -> list[dict]:
    """All records of a .jsonl file, [] if there is none."""
    records = []
    for number, line in enumerate(read_text(path).split('\n') if path.exists() else [], start=1):
        with suppress(NotJson):                         # of a line that a kill cut off
            records.append(parse_json(line, f'{path}:{number}', shape))
    return records


def read_log(path: Path) -> list[dict]:
    """One record for each logged step of a log.jsonl, in order; the last value of a step wins.

    Steps that a rollback undid are dropped: what remains is the history of the weights. `tokens`
    count what was read, so they jump where a rollback left some out.
    Raises ValueError if there is no log or nothing in it.
    """
    if not path.exists():
        raise ValueError(f'given {path.parent}, expected the folder of a run of train.py, with a '
                         f'log.jsonl in it')
    steps = {}
    for record in read_lines(path, Record):
        if record.get('event') == 'rollback':
            to_step = record.get('to_step', 0)
            steps = {step: kept for step, kept in steps.items() if step <= to_step}
        elif 'event' not in record:
            if 'tokens' not in record:
                raise ValueError(f"{path}: step {record['step']}: tokens: given nothing, "
                                 f"expected a whole number")
            before = steps.get(record['step'], record)
            # what is logged again of a step after a rollback counts tokens that it had not read
            tokens = min(before['tokens'], record['tokens'])
            steps[record['step']] = {**before, **record, 'tokens': tokens}
    if not steps:
        raise ValueError(f'{path}: this log is empty')
    return [steps[step] for step in sorted(steps)]


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings in the config.py of a run, {} if there is none."""
    path = folder / 'config.py'
    if not path.exists():
        return {}
    defaults = header_defaults(ROOT / 'train.py')
    return {name: typed(value, defaults.get(name, value), f'{where}: {name}')
            for name, value, where in assignments(path)}


def summary(records: Sequence[dict]) -> str:
    """How far a run came, and its best validation, in a line."""
    text = f"{records[-1]['step']:,} updates, {records[-1]['tokens']:,} tokens"
    validations = validations_of(records)
    if validations:
        best = min(validations, key=lambda record: record['val_loss'])
        text += f"; best val_loss {best['val_loss']:.4f} at update {best['step']:,}"
        if best.get('val_bits_per_byte') is not None:
            text += f", {best['val_bits_per_byte']:.3f} bits per byte"
        if best.get('xz_bits_per_byte') is not None:
            text += f" (xz -9e makes {best['xz_bits_per_byte']:.3f} of the same text)"
    return text


def validations_of(records: Iterable[dict]) -> list[dict]:
    return [record for record in records if record.get('val_loss') is not None]


def seconds_to(records: Sequence[dict], tokens: float) -> float:
    """Seconds of updates until `tokens` were read, without validation and saving."""
    seconds, step, done = 0.0, 0, 0
    for record in records:
        if 'step_ms' in record and done < tokens:
            took = (record['step'] - step) * record['step_ms'] / 1000
            seconds += took * min(1, (tokens - done) / max(1, record['tokens'] - done))
            step, done = record['step'], record['tokens']
    return seconds


# Curves of a picture.

def points(records: Iterable[dict], key: str) -> Points:
    """The curve of `key`, over the records that have it."""
    chosen = [record for record in records if record.get(key) is not None]
    return [record['tokens'] for record in chosen], [record[key] for record in chosen]


def smoothed(curve: Points, width: int) -> Points:
    """The mean of `width` points around each (0: a hundredth of all), fewer near the ends."""
    tokens, values = curve
    half = max(0, width or len(values) // 100) // 2
    around = (values[max(0, i - half):i + half + 1] for i in range(len(values)))
    return tokens, [sum(part) / len(part) for part in around]


def thinned(curve: Points) -> Points:
    """At most MAX_POINTS points of the curve at equal distances, the last one among them."""
    stride = -(-len(curve[0]) // MAX_POINTS) or 1
    tokens, values = (numbers[::-1][::stride][::-1] for numbers in curve)
    return tokens, values


def limits(curves: Sequence[Points], low: float | None = None) -> tuple[float, float] | None:
    """(lowest, highest) value to draw, with a margin, from `low` if given; None without values.

    The first twentieth of a run's tokens and the highest fiftieth of the rest are left out: a loss
    that begins at 10, or jumps there once, would flatten the rest of the curve.
    """
    late = [value for tokens, values in curves for place, value in zip(tokens, values)
            if place > tokens[-1] / 20]
    values = sorted(late or [value for _, values in curves for value in values])
    if not values:
        return None
    high = values[-1 - len(values) // 50]
    margin = 0.06 * (high - (values[0] if low is None else low)) or 0.06 * abs(high) or 1
    return values[0] - margin if low is None else low, high + margin


# Which of several runs is better.

class Curve:
    """The validations of a run, and what identifies its recipe."""

    def __init__(self, folder: Path):
        self.name, self.settings = str(folder), settings_of(folder)
        self.records = read_log(folder / 'log.jsonl')
        self.validations = validations_of(self.records)
        if not self.validations:
            raise ValueError(f'{folder}: there is no validation in its log to compare by')
        self.recipe = {key: value for key, value in self.settings.items()
                       if key not in NOT_THE_RECIPE}
        self.seed = self.settings.get('seed')
        self.xz = self.validations[0].get('xz_bits_per_byte')   # identifies the validation text

    def losses(self, key: str) -> list[float]:
        losses = [record.get(key) for record in self.validations]
        if None in losses:
            raise ValueError(f'{self.name}: not every validation in its log has {key}')
        return losses

    def tokens_to(self, target: float, key: str) -> float | None:
        """Tokens until `key` is at most `target`, on straight lines between validations; None if
        it never is."""
        if self.validations[0][key] <= target:
            return self.validations[0]['tokens']
        for one, two in pairwise(self.validations):
            if two[key] <= target:
                fraction = (one[key] - target) / (one[key] - two[key])
                return one['tokens'] + fraction * (two['tokens'] - one['tokens'])
        return None


class Group:
    """Runs of one recipe, which differ in the seed alone: means over them, None where unknown."""

    def __init__(self, curves: Sequence[Curve], key: str, target: float):
        self.curves, self.finals = curves, [curve.losses(key)[-1] for curve in curves]
        seeds = f' ({len(curves)} seeds)' if len(curves) > 1 else ''
        self.name, self.recipe = curves[0].name + seeds, curves[0].recipe
        self.final, self.best = mean(self.finals), mean(min(curve.losses(key)) for curve in curves)
        rates = [points(curve.records, 'tokens_per_second')[1] for curve in curves]
        rates = [median(one) for one in rates if one]
        tokens = [curve.tokens_to(target, key) for curve in curves]
        reached = None not in tokens
        self.cost = {
            f'tokens to {target:.4f}': mean(tokens) if reached else None,
            'seconds to it': mean(seconds_to(curve.records, n) for curve, n in zip(curves, tokens))
            if reached else None,
            'tokens/s': mean(rates) if rates else None}


def compared(folders: Sequence[Path], target: float = 0.0) -> list[str]:
    """The lines of a comparison: a table, then a verdict on all but the first group of runs that
    differ in the seed alone.

    target: of the columns "tokens to" and "seconds"; 0: the lowest loss that all runs reached.
    """
    curves = [Curve(folder) for folder in folders]
    key = common_key(curves)
    target = target or max(min(curve.losses(key)) for curve in curves)
    groups = [Group(runs, key, target) for runs in grouped(curves)]
    columns = ''.join(f'{title:>20}' for title in groups[0].cost)
    lines = [f'{"":32}{key:>22}{"best":>10}{columns}']
    for group in groups:
        final = f'{group.final:.4f}'
        if len(group.finals) > 1:
            final += f' ± {stdev(group.finals):.4f}'
        costs = ''.join(f'{"-" if value is None else format(value, ",.0f"):>20}'
                        for value in group.cost.values())
        lines.append(f'{group.name:32}{final:>22}{group.best:10.4f}{costs}')
    for group in groups[1:]:
        lines += ['', verdict(groups, group, key), *differences(groups[0], group)]
    return lines


def grouped(curves: Iterable[Curve]) -> list[list[Curve]]:
    """Lists of curves that differ in nothing but the seed, in the order of their first."""
    groups = []
    for curve in curves:
        for group in groups:
            if group[0].recipe == curve.recipe and curve.seed not in [one.seed for one in group]:
                group.append(curve)
                break
        else:
            groups.append([curve])
    return groups


def common_key(curves: Sequence[Curve]) -> str:
    """The key of the log by which these runs can be compared; ValueError if there is none."""
    first = curves[0]
    keys = ['dataset', 'eval_tokens', 'eval_iters']
    keys += ['batch_size', 'block_size'] if first.settings.get('eval_iters') else []
    for other in curves[1:]:
        a, b = ({key: curve.settings.get(key) for key in keys} for curve in (first, other))
        if first.xz != other.xz or (a != b and not first.xz):
            texts = '; '.join(', '.join(f'{key} {value!r}' for key, value in one.items() if value)
                              for one in (a, b))
            raise ValueError(f'{first.name} and {other.name} were validated on different texts '
                             f'({texts}): nothing says which is better')
    datasets = {curve.settings.get('dataset') for curve in curves}
    return 'val_loss' if len(datasets) == 1 else 'val_bits_per_byte'    # of different tokens


def verdict(groups: Sequence[Group], group: Group, key: str) -> str:
    """Whether `group` is better than the first of `groups`.

    Noise is what runs of one recipe differ by, pooled over all recipes with several seeds;
    Student's t at 95 %, two-sided.
    """
    first = groups[0]
    gain = first.final - group.final
    against = f'{group.name} against {first.name}'
    difference = f'{key} {abs(gain):.4f} {"lower" if gain > 0 else "higher"}'
    several = [one.finals for one in groups if len(one.finals) > 1]
    if not several:
        return (f'{against}: {difference}; how much of it is noise is not known: '
                f'give runs with other seeds as well')
    freedom = sum(len(finals) - 1 for finals in several)
    spread = sqrt(sum((len(finals) - 1) * variance(finals) for finals in several) / freedom)
    noise = t95(freedom) * spread * sqrt(1 / len(first.finals) + 1 / len(group.finals))
    word = 'within noise' if abs(gain) <= noise else 'better' if gain > 0 else 'worse'
    return (f'{against}: {word}: {difference}; seeds alone make differences up to {noise:.4f} '
            f'(95 %, standard deviation {spread:.4f} from {freedom + len(several)} runs)')


def differences(first: Group, group: Group) -> list[str]:
    """Lines on how `group` differs from `first` in cost and settings."""
    lines = []
    ends = sorted({curve.records[-1]['tokens'] for curve in (*first.curves, *group.curves)})
    if len(ends) > 1:
        lines.append(f'  note: different lengths, {", ".join(f"{end:,}" for end in ends)} '
                     f'tokens; --target compares at a loss')
    lines += [f'  {title}: {cost / first.cost[title]:.2f} times'
              for title, cost in group.cost.items() if cost and first.cost[title]]
    changed = [f'{name} {first.recipe.get(name)!r} -> {value!r}'
               for name, value in group.recipe.items() if first.recipe.get(name) != value]
    return [*lines, f'  {", ".join(changed) or "the settings are the same"}']


def t95(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to 0.01."""
    table = 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23
    return table[freedom - 1] if freedom <= len(table) else 1.96 + 2.37 / freedom + 2.8 / freedom**2
