"""
What a run needs and what it takes: the division of its batch, its disk, its memory, its time.
"""

import math
import os
import shutil
import time
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch

from gpt import checkpoints
from gpt import distributed
from gpt.data.order import load_data
from model import GPT, GPTConfig
from gpt.optimizers import update
from gpt.validation import validate

TRIAL = 20                  # updates that are measured
FITTED = 'max_iters', 'warmup_iters', 'lr_decay_iters', 'cooldown_iters', 'batch_warmup_iters'


def batch_at(step, cfg, world_size):
    """divide_batch, for the update after `step` updates."""
    warm = cfg.batch_warmup_iters
    return divide_batch(cfg, world_size, 4 if 2 * step < warm else 2 if step < warm else 1)


def divide_batch(cfg, world_size, share=1):
    """(sequences in an update, sequences in a micro-batch, micro-batches of each process), of the
    whole batch or of a half or a quarter of it, `share` 2 or 4.

    Raises ValueError, with the nearest size that works, when the batch cannot be divided evenly.
    """
    if cfg.total_batch_size and cfg.gradient_accumulation_steps:
        raise ValueError(f'given total_batch_size={cfg.total_batch_size} and '
                         f'gradient_accumulation_steps={cfg.gradient_accumulation_steps}, expected '
                         f'one of them: both say how large an update is')

    def divided(tokens, share):
        sequences = tokens // share // cfg.block_size
        micro_batch = min(cfg.batch_size, max(1, sequences // world_size))
        even = tokens % (micro_batch * world_size * cfg.block_size * share) == 0
        return even and (sequences, micro_batch, sequences // (micro_batch * world_size))

    tokens = (cfg.total_batch_size or
              max(1, cfg.gradient_accumulation_steps) * cfg.batch_size * cfg.block_size)
    if found := divided(tokens, share):
        return found
    unit = world_size * cfg.block_size * max(shares(cfg))
    near = round(tokens / unit)
    sizes = (n * unit for i in count() for n in sorted(
        (near + i, near - i), key=lambda n: abs(n * unit - tokens)) if n > 0)
    nearest = next(size for size in sizes if all(divided(size, part) for part in shares(cfg)))
    raise ValueError(f"{'' if share == 1 else f'1/{share} of '}an update of {tokens:,} tokens "
                     f'cannot be shared by {world_size} process{"es" * (world_size > 1)} in equal '
                     f'micro-batches of up to {cfg.batch_size} x {cfg.block_size} tokens; '
                     f'the nearest that can: --total_batch_size={nearest}')


def shares(cfg):
    """The parts of a batch that a run uses: the whole, and while it grows a half and a quarter."""
    return (1, 2, 4) if cfg.batch_warmup_iters else (1,)


def look(cfg):
    """Print how all that a run needs stands, and what mends what is missing; whether all is well,
    on all processes."""
    world, known = distributed.World(0, 1, torch.device('cpu')), {}

    def device():
        nonlocal world
        world = distributed.join(cfg.device, cfg.timeout_minutes)
        return f'{world.device}, {world.size} process' + 'es' * (world.size > 1)

    def dtype():
        known['dtype'], why = distributed.pick_dtype(cfg.dtype, world.device, True)
        return f'{str(known["dtype"])[6:]}: {why}'

    def compiler():
        wanted, why = distributed.pick_compile(cfg.compile, world.device, known['dtype'], math.inf)
        if world.device.type != 'cpu' or cfg.compile != 'auto':
            return why
        return (f'{why}; on Debian and Ubuntu: apt-get install g++' if not wanted else
                'there is one; used if the run is long enough')

    def data():
        sets, known['encoding'] = load_data(cfg.dataset, cfg.data_dir)
        counts = ', '.join(f'{data.name} {len(data.train):,} + {len(data.val):,}' for data in sets)
        return f'{counts} tokens to train on and to validate'

    def vocabulary():
        encoding = known['encoding']
        return f'{encoding.name}, {encoding.n_vocab:,} tokens'

    def batch():
        parts = [divide_batch(cfg, world.size, share) for share in shares(cfg)]
        sequences, micro_batch, micro_steps = parts[0]
        return (f'{sequences * cfg.block_size:,} tokens an update, {micro_steps} micro-batches of '
                f'{micro_batch} x {cfg.block_size} on each process'
                + f'; less in the first {cfg.batch_warmup_iters:,} updates' * (len(parts) > 1))

    def disk():
        if is_fine_tune(cfg):
            return f'not known before {cfg.init_from} is loaded'
        with torch.device('meta'):
            gpt = GPT(GPTConfig(cfg.block_size, known['encoding'].n_vocab, cfg.n_layer, cfg.n_head,
                                cfg.n_embd, bias=cfg.bias))
        return check_disk(cfg, gpt)

    lines = []
    for part in (device, dtype, compiler, data, vocabulary, batch, disk):
        try:
            words = part()
        except (ValueError, OSError) as error:
            words = f'FAILS: {error}'
        except KeyError:                                # an earlier part could not say it
            words = 'not known, see above'
        lines.append(f'{part.__name__:11} {words}')
    found = distributed.gather(lines)
    for rank, theirs in enumerate(found if world.is_main else ()):
        for line in theirs:
            if rank == 0:
                print(line)
            elif 'FAILS' in line and line not in found[0]:
                print(f'{line} (rank {rank})')
    return not any('FAILS' in line for theirs in found for line in theirs)


def is_fine_tune(cfg):
    return cfg.init_from not in ('auto', 'scratch', 'resume')


def checkpoint_bytes(cfg, model):
    """Of one checkpoint: float32 weights and moments, one for Muon's matrices, two for all else."""
    moments = sum((1 if cfg.optimizer == 'muon' and p.dim() >= 2 and name.startswith('h.') else 2)
                  * p.numel() for name, p in model.named_parameters())
    return 4 * (moments + sum(p.numel() for p in model.parameters()))


def newest_kept(cfg):
    """How many checkpoints stay, besides the best."""
    return cfg.keep if cfg.always_save_checkpoint or cfg.rollback else 1


def check_disk(cfg, model):
    """How much room there is for the checkpoints that the run will hold: the newest, the best, and
    one that is being written. ValueError if too little."""
    one, there = checkpoint_bytes(cfg, model), Path(cfg.out_dir).resolve()
    kept = sum(file.stat().st_size for folder in checkpoints.steps(there).values()
               for file in folder.iterdir())
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f'out_dir: {there} cannot be written; give another --out_dir')
    many = newest_kept(cfg) + 2
    need, free = many * one - kept, shutil.disk_usage(there).free
    words = (f'{many} checkpoints of {amount(one)} in {cfg.out_dir}'
             + f', {amount(kept)} of which are there' * bool(kept) + f'; {amount(free)} are free')
    if need > free:
        raise ValueError(f'disk: {words}. Make room, give another --out_dir'
                         + ', or --keep=1' * (many > 3 and not cfg.rollback))
    return words


def amount(size):
    return f'{size / 1e9:.1f} GB' if size >= 1e9 else f'{size / 1e6:.1f} MB'


def trial(compute, now, cfg, optimizers, scaler, world):
    """(seconds of the passes of an update, of its step): medians of TRIAL of them, with at most two
    micro-batches each, counted up to a whole one. The learning rate is 0, and everything is left as
    it was."""
    _, micro_batch, micro_steps = divide_batch(cfg, world.size)
    few = min(2, micro_steps)
    small = replace(cfg, total_batch_size=few * micro_batch * world.size * cfg.block_size,
                    gradient_accumulation_steps=0, batch_warmup_iters=0)
    scale, times, left = scaler.state_dict(), [], TRIAL
    budget = min(60, 6 * cfg.minutes or 60)                 # seconds
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group['lr'] = 0.0
    while left:
        began = time.perf_counter()
        loss, norm, _ = compute(now, small, optimizers)
        loss = distributed.all_reduce(loss)
        loss.item()                                         # a GPU has come this far
        halfway = time.perf_counter()
        update(optimizers, loss, norm, cfg.grad_clip)
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        if world.device.type == 'cuda':
            torch.cuda.synchronize()
        times.append((halfway - began, time.perf_counter() - halfway))
        if left == TRIAL:                                   # of slow ones fewer, at least three
            left = min(TRIAL, max(3, int(budget / sum(times[0]))))
        left = distributed.broadcast(left - 1)
    for optimizer in optimizers:
        optimizer.state.clear()
    scaler.load_state_dict(scale)
    passes, steps = (sorted(part)[len(times) // 2] for part in zip(*times))
    return distributed.broadcast((passes * micro_steps / few, steps))


def time_visit(model, sets, cfg, world, autocast):
    """Seconds of a validation, by four micro-batches of it, and of a save, on an ordinary disk."""
    began, tokens = time.perf_counter(), world.size * 4 * cfg.batch_size * cfg.block_size
    *_, count = validate(model, sets, replace(cfg, eval_iters=0, eval_tokens=tokens), world,
                         autocast)
    wanted = cfg.eval_iters * cfg.batch_size * cfg.block_size or cfg.eval_tokens
    wanted = min(wanted, sum(len(data.val) for data in sets))
    checking = (time.perf_counter() - began) * max(1, wanted / count)
    return distributed.broadcast(checking + checkpoint_bytes(cfg, model) / 300e6)


def whole_updates(cfg, step=0):
    """How many updates of a whole batch read as much as those after `step` do: see batch_at."""
    quarter, half = (min(cfg.max_iters, n) for n in (-(-cfg.batch_warmup_iters // 2),
                                                     cfg.batch_warmup_iters))
    return (max(0, quarter - step) / 4 + max(0, half - max(step, quarter)) / 2 +
            max(0, cfg.max_iters - max(step, half)))


def update_seconds(cfg, times, step=0):
    """Seconds of an update after `step` on average, with its share of the validations and saves;
    `times` are those of its passes, of its step and of a validation with its save."""
    passes, own, visit = times
    mean_batch = whole_updates(cfg, step) / max(1, cfg.max_iters - step)
    return passes * mean_batch + own + visit / cfg.eval_interval


def fit(cfg, times, spent):
    """cfg with as many updates as fit into cfg.minutes, of which so many seconds are spent, and its
    schedule stretched to them."""
    ends, each = 2 * times[2], update_seconds(cfg, times)
    room = 60 * cfg.minutes - spent - ends
    if room < each:
        raise ValueError(f'minutes: given {cfg.minutes}; starting and measuring ({spent:.0f} s), '
                         f'two validations ({ends:.0f} s) and one update ({each:.1f} s) take '
                         f'{(spent + ends + each) / 60:.2f}')
    stretch = int(room / each) / cfg.max_iters
    return replace(cfg, **{key: round(getattr(cfg, key) * stretch) for key in FITTED})


def as_fitted(cfg, saved):
    """cfg with what was fitted to its minutes when the run began, whose settings are `saved`."""
    if not cfg.minutes:
        return cfg
    if saved.get('minutes') != cfg.minutes:
        raise ValueError(f'minutes: given {cfg.minutes}, but the run in {cfg.out_dir} was begun '
                         f'with {saved.get("minutes")}; give that, or --minutes=0 --max_iters=…')
    return replace(cfg, **{key: saved[key] for key in FITTED})


def describe_trial(model, world, times, tokens, peak):
    took = times[0] + times[1]
    rate = tokens / took
    mfu = f', mfu {model.flops_per_token() * rate / (peak * world.size):.0%}' if peak else ''
    most = distributed.peak_memory(world.device)
    memory = f'; memory of this process at its peak: {amount(most)}' if most else ''
    return f'a whole update takes {took:.3g} s: {rate:,.0f} tokens/s{mfu}{memory}'


def describe_length(cfg, step, times, tokens):
    """What is left after `step` updates; `tokens` are those of a whole update."""
    left = max(0, cfg.max_iters - step)
    hours = (left * update_seconds(cfg, times, step) + 2 * times[2]) / 3600
    takes = f'{hours:.1f} hours' if hours > 1 else f'{60 * hours:.1f} minutes'
    return f'{left:,} updates, {tokens * whole_updates(cfg, step) / 1e6:,.1f}M tokens: {takes}'


def less_memory(cfg, error):
    """What to try when memory does not suffice: the same update, in smaller micro-batches."""
    size = distributed.size()
    sequences, micro_batch, _ = divide_batch(cfg, size)
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
    smaller = replace(cfg, total_batch_size=sequences * cfg.block_size,
                      gradient_accumulation_steps=0)
    for half in range(micro_batch // 2, 0, -1):
        with suppress(ValueError):                      # raised by what cannot be divided
            for share in shares(cfg):
                divide_batch(replace(smaller, batch_size=half), size, share)
            advice = f'--batch_size={half} --total_batch_size={smaller.total_batch_size}'
            if cfg.gradient_accumulation_steps:
                advice += ' --gradient_accumulation_steps=0'
            if cfg.eval_iters:
                advice += f' --eval_iters={cfg.eval_iters * cfg.batch_size // half}'
            if not cfg.checkpoint_activations:
                advice += ', or --checkpoint_activations=True'
            break
    else:
        advice = ('--checkpoint_activations=True' if not cfg.checkpoint_activations else
                  'a smaller --block_size or model, or with several GPUs --parallel=fsdp')
    return f'out of memory ({first}). The same update in less: {advice}'
