"""
What a run needs and takes: how its batch is divided, its disk, its memory, its time.
"""

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gpt import steps
from gpt.data.order import Batch
from gpt.settings import section
from gpt.trainer import Trainer
from gpt.validation import Validation, ValidationConfig
from gpt.world import peak_memory

MEASURED_UPDATES = 20
MEASURED_SECONDS = 60       # at most; of --minutes a tenth
DISK_BYTES_PER_SECOND = 300e6       # of an ordinary disk
FITTED = 'max_iters', 'warmup_iters', 'lr_decay_iters', 'cooldown_iters', 'batch_warmup_iters'


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
    """The batch of every update. While it grows it is a quarter, then a half of the full one."""

    def __init__(self, config: BatchConfig, world_size: int):
        """Raises ValueError, with the nearest size that works, if it cannot be divided evenly."""
        self.config, self.world_size = config, world_size
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
        micro_batch = min(c.batch_size, max(1, sequences // n))
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

    def tokens_left(self, max_iters: int, step: int) -> float:
        return self.tokens_per_update * self.full_updates(max_iters, step)

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
    """Seconds."""
    passes: float           # forward and backward passes of a full update
    step: float             # the rest of it
    visit: float            # a validation and a save

    @property
    def update(self) -> float:
        return self.passes + self.step


def measure(trainer: Trainer, passes: Callable[[Batch], torch.Tensor], plan: BatchPlan,
            minutes: float) -> tuple[float, float]:
    """Seconds of (the passes, the step) of a full update: medians of MEASURED_UPDATES, of at most
    two micro-batches each, scaled up. The trainer is left as it was.

    passes(batch): the forward and backward passes of an update, for the loss.
    """
    world, (_, micro_batch, micro_steps) = trainer.world, plan.full
    few = min(2, micro_steps)
    small = Batch(few * micro_batch * world.size, micro_batch, few)
    limit = min(MEASURED_SECONDS, 6 * minutes or MEASURED_SECONDS)
    times, left = [], MEASURED_UPDATES
    with trainer.dry_run():
        while left:
            start = time.perf_counter()
            loss = world.reduce(passes(small))
            norm = trainer.grad_norm()
            loss.item()                                     # waits for a GPU
            halfway = time.perf_counter()
            trainer.step(loss, norm)
            if world.device.type == 'cuda':
                torch.cuda.synchronize()
            times.append((halfway - start, time.perf_counter() - halfway))
            if left == MEASURED_UPDATES:                    # of slow ones fewer, at least three
                left = min(MEASURED_UPDATES, max(3, int(limit / sum(times[0]))))
            left = world.broadcast(left - 1)
    in_passes, in_step = (sorted(part)[len(times) // 2] for part in zip(*times))
    return world.broadcast((in_passes * micro_steps / few, in_step))


def time_validation_and_save(validate: Callable[[ValidationConfig], Validation],
                             config: ValidationConfig, available: int, trainer: Trainer) -> float:
    """Seconds of both, from a validation of four batches of each process; `available` tokens are
    in the split."""
    start, world = time.perf_counter(), trainer.world
    tokens = 4 * world.size * config.batch_size * config.block_size
    counted = validate(replace(config, eval_iters=0, eval_tokens=tokens)).tokens
    seconds = (time.perf_counter() - start) * max(1, min(config.tokens, available) / counted)
    size = checkpoint_bytes(trainer.model, trainer.optimizer.config.optimizer)
    return world.broadcast(seconds + size / DISK_BYTES_PER_SECOND)


def update_seconds(cfg: Any, plan: BatchPlan, cost: Cost, step: int = 0) -> float:
    """Seconds of a mean update after `step`, with its part of the validations and saves."""
    mean_batch = plan.full_updates(cfg.max_iters, step) / max(1, cfg.max_iters - step)
    return cost.passes * mean_batch + cost.step + cost.visit / cfg.eval_interval


def fit(cfg: Any, plan: BatchPlan, cost: Cost, spent: float) -> dict[str, int]:
    """The schedule's settings, scaled so that the run ends cfg.minutes after its start, `spent`
    seconds ago."""
    ends, each = 2 * cost.visit, update_seconds(cfg, plan, cost)
    room = 60 * cfg.minutes - spent - ends
    if room < each:
        raise ValueError(f'minutes: given {cfg.minutes}; starting and measuring ({spent:.0f} s), '
                         f'two validations ({ends:.0f} s) and one update ({each:.1f} s) take '
                         f'{(spent + ends + each) / 60:.2f}')
    factor = int(room / each) / cfg.max_iters
    return {key: round(getattr(cfg, key) * factor) for key in FITTED}


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
    rate, used = tokens / cost.update, peak_memory(trainer.world.device)
    flops = trainer.model.flops_per_token() * rate
    mfu = f', mfu {flops / trainer.peak:.0%}' if trainer.peak else ''
    memory = f'; peak memory of this process: {amount(used)}' if used else ''
    return f'a full update takes {cost.update:.3g} s: {rate:,.0f} tokens/s{mfu}{memory}'


def describe_length(cfg: Any, plan: BatchPlan, cost: Cost, step: int) -> str:
    """What is left after `step` updates."""
    left, tokens = max(0, cfg.max_iters - step), plan.tokens_left(cfg.max_iters, step)
    hours = (left * update_seconds(cfg, plan, cost, step) + 2 * cost.visit) / 3600
    takes = f'{hours:.1f} hours' if hours > 1 else f'{60 * hours:.1f} minutes'
    return f'{left:,} updates, {tokens / 1e6:,.1f}M tokens: {takes}'
