"""
What a run needs and takes: how its batch is divided, its disk, its memory, its time.
"""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gpt import steps
from gpt.data.order import Batch
from gpt.device import peak_memory
from gpt.log import duration
from gpt.settings import section
from gpt.trainer import Trainer
from gpt.validation import Validation, ValidationConfig
from gpt.world import World

MEASURED_UPDATES = 20
MEASURED_SECONDS = 60       # at most; of --minutes a tenth
DISK_BYTES_PER_SECOND = 300e6       # of an ordinary disk
VISITS = 0.1                # of --minutes, at most, for the validations on the way
FITS = 10                   # how often a run with --minutes looks whether it will end in time,
TOLERANCE = 0.03            # and how much of them it may be off
MEMORY = 50                 # recent updates that tell how fast the next ones will be
FITTED = ('max_iters', 'warmup_iters', 'lr_decay_iters', 'cooldown_iters', 'batch_warmup_iters',
          'eval_interval')


# The batch.

@dataclass(frozen=True)
class BatchConfig:
    """Settings of train.py, by the same names."""
    batch_size: int                     # sequences in a micro-batch, at most
    block_size: int
    total_batch_size: int = 0           # tokens
    gradient_accumulation_steps: int = 0
    batch_warmup_iters: int = 0


class BatchPlan:
    """The batch of every update. While it grows it is a quarter, then a half of the full one, in
    micro-batches of one shape: another one would be compiled again, in the middle of the run."""

    def __init__(self, config: BatchConfig, world_size: int, one_shape: bool = True):
        """one_shape=False: micro-batches grow too, as in runs that began that way.

        Raises ValueError, with the nearest size that works, if it cannot be divided evenly."""
        self.config, self.world_size, self.one_shape = config, world_size, one_shape
        if config.total_batch_size and config.gradient_accumulation_steps:
            raise ValueError(f'given total_batch_size={config.total_batch_size} and '
                             f'gradient_accumulation_steps={config.gradient_accumulation_steps}, '
                             f'expected one of them: both set the size of an update')
        self.tokens_per_update = config.total_batch_size or (
            max(1, config.gradient_accumulation_steps) * config.batch_size * config.block_size)
        self.divisors = (1, 2, 4) if config.batch_warmup_iters else (1,)
        for divisor in reversed(self.divisors):
            if not self.divide(self.tokens_per_update, divisor):
                self.refuse(divisor)

    @property
    def full(self) -> Batch:
        return self.divide(self.tokens_per_update, 1)

    def at(self, step: int) -> Batch:
        """The Batch of the update after `step` updates."""
        warmup = self.config.batch_warmup_iters
        divisor = 4 if 2 * step < warmup else 2 if step < warmup else 1
        return self.divide(self.tokens_per_update, divisor)

    def divide(self, tokens: int, divisor: int) -> Batch | None:
        """The Batch of tokens / divisor; None if it cannot be divided evenly."""
        c, n = self.config, self.world_size
        sequences = tokens // divisor // c.block_size
        least = tokens // max(self.divisors) // c.block_size if self.one_shape else sequences
        micro_batch = min(c.batch_size, max(1, least // n))
        if tokens % (micro_batch * n * c.block_size * divisor):
            return None
        return Batch(sequences, micro_batch, sequences // (micro_batch * n))

    def refuse(self, divisor: int) -> None:
        tokens, n, c = self.tokens_per_update, self.world_size, self.config
        unit = n * c.block_size * max(self.divisors)
        near = round(tokens / unit)
        sizes = (multiple * unit for i in count() for multiple in sorted(
            (near + i, near - i), key=lambda m: abs(m * unit - tokens)) if multiple > 0)
        nearest = next(size for size in sizes if all(self.divide(size, d) for d in self.divisors))
        part = '' if divisor == 1 else f'1/{divisor} of '
        processes = 'process' if n == 1 else 'processes'
        raise ValueError(f'{part}an update of {tokens:,} tokens cannot be divided over {n} '
                         f'{processes} in equal micro-batches of up to {c.batch_size} x '
                         f'{c.block_size} tokens; the nearest that can: '
                         f'--total_batch_size={nearest}')

    def full_updates(self, max_iters: int, step: int = 0) -> float:
        """How many updates of a full batch read as much as those from `step` to max_iters."""
        warmup = self.config.batch_warmup_iters
        quarter, half = min(max_iters, -(-warmup // 2)), min(max_iters, warmup)
        return (max(0, quarter - step) / 4 + max(0, half - max(step, quarter)) / 2 +
                max(0, max_iters - max(step, half)))

    def describe(self) -> str:
        _, micro_batch, micro_steps = self.full
        processes = f'{self.world_size} process' + ('' if self.world_size == 1 else 'es')
        micro = f'{micro_steps} micro-batch' + ('' if micro_steps == 1 else 'es')
        return (f'{self.tokens_per_update:,} tokens = {processes} x {micro} x {micro_batch} x '
                f'{self.config.block_size}')


def less_memory(cfg: Any, world_size: int, error: BaseException) -> str:
    """What to try after an out-of-memory error: the same update, in smaller micro-batches."""
    full = BatchPlan(section(cfg, BatchConfig), world_size).full
    same_update = section(cfg, BatchConfig, total_batch_size=full.sequences * cfg.block_size,
                          gradient_accumulation_steps=0)
    advice = ''
    for batch_size in range(full.micro_batch // 2, 0, -1):
        with suppress(ValueError):                      # raised for what cannot be divided
            BatchPlan(replace(same_update, batch_size=batch_size), world_size)
            advice = f'--batch_size={batch_size} --total_batch_size={same_update.total_batch_size}'
            break
    if advice and cfg.gradient_accumulation_steps:
        advice += ' --gradient_accumulation_steps=0'
    if advice and cfg.eval_iters:
        advice += f' --eval_iters={cfg.eval_iters * cfg.batch_size // batch_size}'
    if not cfg.checkpoint_activations:
        advice += ', or ' if advice else ''
        advice += '--checkpoint_activations=True'
    advice = advice or 'a smaller --block_size or model, or with several GPUs --parallel=fsdp'
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
    return f'out of memory ({first_line}). The same update with less memory: {advice}'


# The disk.

def checkpoint_bytes(model, optimizer: str) -> int:
    """Of one checkpoint: float32 weights and moments, one for Muon's matrices, two for the rest."""
    moments = 0
    for name, p in model.named_parameters():
        muon = optimizer == 'muon' and p.dim() >= 2 and name.startswith('h.')
        moments += (1 if muon else 2) * p.numel()
    return 4 * (moments + sum(p.numel() for p in model.parameters()))


def newest_kept(cfg: Any) -> int:
    """How many checkpoints are kept besides the best."""
    return cfg.keep if cfg.always_save_checkpoint or cfg.rollback else 1


def check_disk(cfg: Any, model) -> str:
    """How much room there is for the checkpoints a run holds: the newest, the best, and one being
    written. ValueError if there is too little."""
    one, folder = checkpoint_bytes(model, cfg.optimizer), Path(cfg.out_dir).resolve()
    used = sum(file.stat().st_size for step in steps.all_steps(folder).values()
               for file in step.iterdir())
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f'out_dir: {folder} cannot be written; give another --out_dir')
    number = newest_kept(cfg) + 2
    needed, free = number * one - used, shutil.disk_usage(folder).free
    text = f'{number} checkpoints of {amount(one)} in {cfg.out_dir}'
    text += f', {amount(used)} of it used already' if used else ''
    text += f'; {amount(free)} free'
    if needed > free:
        smaller = ', or --keep=1' if number > 3 and not cfg.rollback else ''
        raise ValueError(f'disk: {text}. Make room, give another --out_dir{smaller}')
    return text


def amount(size: float) -> str:
    return f'{size / 1e9:.1f} GB' if size >= 1e9 else f'{size / 1e6:.1f} MB'


# The time.

class Cost(NamedTuple):
    """Seconds of a full update."""
    passes: float           # forward and backward passes
    step: float             # the rest of it


def measure(trainer: Trainer, passes: Callable[[Batch], torch.Tensor], plan: BatchPlan,
            minutes: float) -> Cost:
    """Medians of MEASURED_UPDATES, of at most two micro-batches each, scaled up. The trainer is
    left as it was.

    passes(batch): the forward and backward passes of an update, for the loss.
    """
    world, (_, micro_batch, micro_steps) = trainer.world, plan.full
    # DDP reduces gradients once per update: one more micro-batch costs t(2) - t(1), not t(2) / 2
    counts = (1, 2) if micro_steps > 2 and world.size > 1 else (min(2, micro_steps),)
    limit = min(MEASURED_SECONDS, 6 * minutes or MEASURED_SECONDS)
    times, left = [], MEASURED_UPDATES
    with trainer.dry_run():
        while left:
            clock = [time.perf_counter()]
            for n in counts:
                trainer.optimizer.zero_grad()
                loss = world.reduce(passes(Batch(n * micro_batch * world.size, micro_batch, n)))
                loss.item()                                 # waits for a GPU
                clock.append(time.perf_counter())
            trainer.step(loss, trainer.grad_norm())
            if world.device.type == 'cuda':
                torch.cuda.synchronize()
            clock.append(time.perf_counter())
            times.append([after - before for before, after in pairwise(clock)])
            if left == MEASURED_UPDATES:                    # of slow ones fewer, at least three
                left = min(MEASURED_UPDATES, max(3, int(limit / sum(times[0]))))
            left = world.broadcast(left - 1)
    *measured, in_step = (sorted(part)[len(times) // 2] for part in zip(*times))
    one_more = measured[-1] / counts[-1]
    if len(counts) > 1:                                     # at least half of it, as times vary
        one_more = max(measured[1] - measured[0], measured[0] / 2)
    in_passes = measured[-1] + (micro_steps - counts[-1]) * one_more
    return Cost(*world.broadcast((in_passes, in_step)))


def save_seconds(trainer: Trainer) -> float:
    """Of writing a checkpoint to an ordinary disk."""
    optimizer = trainer.optimizer.config.optimizer
    return checkpoint_bytes(trainer.model, optimizer) / DISK_BYTES_PER_SECOND


def time_validation(validate: Callable[[ValidationConfig], Validation], config: ValidationConfig,
                    available: int, world: World) -> float:
    """Its seconds, from four batches of each process after one that warms up; `available` tokens
    are in the split."""
    tokens = world.size * config.batch_size * config.block_size
    validate(replace(config, eval_iters=0, eval_tokens=tokens))
    start = time.perf_counter()
    counted = validate(replace(config, eval_iters=0, eval_tokens=4 * tokens)).tokens
    seconds = (time.perf_counter() - start) * max(1, min(config.tokens, available) / counted)
    return world.broadcast(seconds)


class Forecast:
    """How long the rest of a run takes, from how long its parts took so far; with --minutes also
    the schedule that ends in time. A resumed run keeps the schedule it has."""

    def __init__(self, cfg: Any, plan: BatchPlan, save: float = 0.0):
        """save: seconds of writing a checkpoint."""
        self.cfg, self.plan, self.save = cfg, plan, save
        self.cost = Cost(1.0, 0.0)              # only its proportions matter, once there are
        self.seconds = self.expected = 0.0      # of recent updates: as measured, as by the cost
        self.took = {}                          # {'eval_interval': seconds of the last one, …}
        self.ends = math.inf                    # of rank 0: time.monotonic() of the end

    def updated(self, batch: Batch, seconds: float) -> None:
        """Count an update that took so long."""
        keep, part = 1 - 1 / MEMORY, batch.sequences / self.plan.full.sequences
        self.seconds = keep * self.seconds + seconds
        self.expected = keep * self.expected + self.cost.passes * part + self.cost.step

    @contextmanager
    def pause(self, interval: str) -> Iterator[None]:
        """Time what happens at this interval, the name of a setting."""
        start = time.perf_counter()
        yield
        self.took[interval] = time.perf_counter() - start

    def updates_left(self, step: int) -> float:
        """Seconds of all updates after `step`."""
        left = max(0, self.cfg.max_iters - step)
        expected = (self.cost.passes * self.plan.full_updates(self.cfg.max_iters, step)
                    + self.cost.step * left)
        return expected * (self.seconds / self.expected if self.expected else 1)

    def pauses_left(self, step: int) -> float:
        """Seconds of the validations, scores and samples from this step on, and of the last save.
        """
        end, left = self.cfg.max_iters, self.save
        for name, seconds in self.took.items():
            interval = getattr(self.cfg, name)
            at_the_end = name != 'sample_interval' and end % interval > 0
            left += seconds * (end // interval - (step - 1) // interval + at_the_end)
        return left

    def describe(self, step: int) -> str:
        """For a line of the log: what is left, and the size of a batch that grows."""
        batch = self.plan.at(max(0, step - 1)).sequences * self.cfg.block_size
        growing = f'batch {batch:,}  ' if self.cfg.batch_warmup_iters else ''
        return f'{growing}left {duration(self.updates_left(step) + self.pauses_left(step))}'

    def describe_length(self, step: int) -> str:
        """What is left after `step` updates."""
        cfg, hours = self.cfg, (self.updates_left(step) + self.pauses_left(step)) / 3600
        takes = f'{hours:.1f} hours' if hours > 1 else f'{60 * hours:.1f} minutes'
        tokens = self.plan.tokens_per_update * self.plan.full_updates(cfg.max_iters, step)
        validations = f', a validation every {cfg.eval_interval:,}' if cfg.minutes else ''
        return (f'{max(0, cfg.max_iters - step):,} updates, {tokens / 1e6:,.1f}M tokens: {takes}'
                f'{validations}')

    def use(self, fit: dict[str, int]) -> Any:
        """The settings with those of a fit."""
        self.cfg = replace(self.cfg, **fit)
        self.plan = BatchPlan(section(self.cfg, BatchConfig), self.plan.world_size,
                              self.plan.one_shape)
        return self.cfg

    def fit(self) -> dict[str, int]:
        """The schedule's settings, scaled so that a new run ends in time."""
        cfg, visit, now = self.cfg, self.took['eval_interval'], time.monotonic()
        each, room = self.updates_left(0) / cfg.max_iters, self.ends - now - self.save
        visits = max(1, int(min(cfg.max_iters // cfg.eval_interval, VISITS * room / visit)))
        updates = int((room - (1 + visits) * visit) / each)
        if updates < 1:
            spent, ends = 60 * cfg.minutes - (self.ends - now), 2 * visit + self.save
            raise ValueError(f'minutes: given {cfg.minutes}, expected more than '
                             f'{(spent + ends + each) / 60:.2f}, which starting and measuring '
                             f'({spent:.0f} s), two validations ({ends:.0f} s) and one update '
                             f'({each:.1f} s) take')
        return {**self.stretched(0, updates), 'eval_interval': -(-updates // visits)}

    def is_due(self, step: int) -> bool:
        """Whether to look if the run will end in time."""
        return (math.isfinite(self.ends) and step > 0
                and step % max(1, self.cfg.max_iters // FITS) == 0)

    def refit(self, step: int) -> dict[str, int]:
        """The settings with which what is left ends in time; {} if it does as it is."""
        left, planned = self.updates_left(step), self.cfg.max_iters - step
        room = self.ends - time.monotonic() - self.pauses_left(step + 1)
        updates = max(1, round(room / left * planned))
        near = abs(room - left) < TOLERANCE * 60 * self.cfg.minutes
        return {} if near or updates == planned else self.stretched(step, updates)

    def stretched(self, step: int, updates: int) -> dict[str, int]:
        """The settings of the schedule if `updates` follow `step`: what lies ahead of it is
        longer or shorter, what was reached stays."""
        cfg, factor = self.cfg, updates / (self.cfg.max_iters - step)
        ahead = {key: getattr(cfg, key) - step for key in FITTED if key.endswith('_iters')}
        fit = {key: step + max(1, round(factor * left)) for key, left in ahead.items() if left > 0}
        if step and 'batch_warmup_iters' in fit:        # a batch that has grown stays as large
            fit['batch_warmup_iters'] = min(fit['batch_warmup_iters'],
                                            max(cfg.batch_warmup_iters, 2 * step))
        return {**fit, 'cooldown_iters': round(factor * cfg.cooldown_iters)}


def fitted(cfg: Any, saved: dict) -> dict[str, int]:
    """What was fitted to its minutes when the run began, with the settings `saved`."""
    if not cfg.minutes:
        return {}
    if saved.get('minutes') != cfg.minutes:
        raise ValueError(f'minutes: given {cfg.minutes}, but the run in {cfg.out_dir} began '
                         f'with {saved.get("minutes")}; give that, or --minutes=0 --max_iters=…')
    return {key: saved[key] for key in FITTED}


def describe_cost(trainer: Trainer, cost: Cost, tokens: int) -> str:
    """Time, speed and memory of a full update of `tokens`."""
    rate, used = tokens / sum(cost), peak_memory(trainer.world.device)
    mfu = trainer.mfu(rate)
    reached = '' if mfu is None else f', mfu {mfu:.0%}'
    memory = f'; peak memory of this process: {amount(used)}' if used else ''
    return f'a full update takes {sum(cost):.3g} s: {rate:,.0f} tokens/s{reached}{memory}'
