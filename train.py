"""
Train a GPT, on one process or many.

    python train.py                                                 # a small GPT, offline corpus
    python train.py config/shakespeare_char_cpu.py --max_iters=500  # a config file, a flag on top
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

The same command again goes on where the run stopped, whatever stopped it.
"""

import json
import math
import os
import secrets
import shutil
import signal
import threading
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

import checkpoints
import distributed
import tokenizer
from configurator import as_config_file, run, settings
from data.batches import Ahead, describe_epochs, draw, load_data, make_batches
from model import GPT, GPTConfig, crop_block
from muon import Muon

# -----------------------------------------------------------------------------
# The defaults train a small GPT on the offline corpus in minutes, on a laptop.
# the run
out_dir = 'out/pydocs'      # checkpoints, log.jsonl and config.py of this run
init_from = 'auto'          # auto: resume if out_dir holds a checkpoint, else scratch; 'scratch';
                            # 'resume'; or where fine-tuning starts: gpt2, a folder, another run
seed = 1337                 # of weights, data order and dropout
max_iters = 1000            # updates in all
eval_interval = 100         # updates between validations; a checkpoint is saved before each
eval_tokens = 1_000_000     # validation tokens: the first of the split, or all it has
eval_iters = 0              # nanoGPT's spelling: eval_tokens = eval_iters * batch_size * block_size
eval_only = False           # validate once, write nothing, leave
log_interval = 10           # updates between lines in the log
sample_interval = 0         # updates between samples in samples.jsonl, 0: none
hellaswag_interval = 0      # updates between HellaSwag scores, each after a checkpoint, 0: none
hellaswag_limit = 0         # of its first so many questions, 0: of all 10,042
hellaswag_data = ''         # FILE with them; '': the official one, downloaded once
save_minutes = 10.0         # and a checkpoint every so many minutes; 0: only at validations
keep = 2                    # checkpoints kept: the newest so many, and the best
always_save_checkpoint = True   # False: keep only the newest and the best
patience = 0                # end after so many validations without a lower loss, 0: never
# wandb
wandb_log = False           # mirror the log there too (WANDB_MODE=offline needs no network)
wandb_project = 'gpt2'
wandb_run_name = ''         # '': the name of out_dir
# data
dataset = 'pydocs'          # a folder in data/, made by data/prepare.py; or several and what share
                            # of the sequences each gives: books:0.7,openwebtext:0.3
data_dir = ''               # where prepared data lies; '': data/ beside this script
total_batch_size = 0        # tokens in an update, over all processes; 0: batch_size * block_size
batch_size = 16             # sequences in a micro-batch of one process, as its memory allows
gradient_accumulation_steps = 0     # nanoGPT's way to say it: micro-batches over all processes
batch_warmup_iters = 0      # updates before the batch is whole: a quarter of it for the first half
                            # of them, half of it for the second; 0: whole from the start
block_size = 256            # tokens in a sequence
doc_start = False           # True: training sequences begin with a document, where one begins near
# model
n_layer = 4
n_head = 4
n_embd = 256
dropout = 0.0               # 0 for pretraining; 0.1 or more for text seen many times
bias = True                 # in Linear and LayerNorm, as GPT-2 has them
# optimizer and schedule
optimizer = 'adamw'         # or 'muon': Muon for the blocks' matrices, AdamW for all else
learning_rate = 1e-3        # of AdamW, at its highest
muon_learning_rate = 0.02   # of Muon, at its highest
weight_decay = 0.1          # of matrices; not of biases and LayerNorms
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0             # longest gradient, 0: any
schedule = 'cosine'         # or 'wsd': constant, then linear over the last cooldown_iters
decay_lr = True             # False: learning_rate throughout
warmup_iters = 100
lr_decay_iters = 0          # where min_lr is reached; 0: at max_iters
cooldown_iters = 300        # of 'wsd'
min_lr = 1e-4
max_skipped = 10            # so many non-finite updates in a row end the run (exit status 3)
# system
device = 'auto'             # 'cpu', 'cuda', 'cuda:1', 'mps'; auto: cuda, else mps, else cpu
dtype = 'auto'              # 'float32', 'bfloat16', 'float16'; auto: bfloat16 where native
compile = 'auto'            # True, False; auto: on CUDA, and on CPUs with a compiler when it pays
# -----------------------------------------------------------------------------
Config = settings(globals())

COMPILE_PAYS = 60, 180      # on a CPU, for runs longer than so many seconds: of half precision, of
                            # float32 (it takes about 25 s, and saves less in float32)


@dataclass
class Progress:
    """How far a run has come: with weights and optimizer, all that a resume needs."""
    step: int = 0                       # updates done, skipped ones included
    position: int = 0                   # sequences consumed
    skipped: int = 0                    # updates that were not finite
    best_val_loss: float = math.inf
    best_step: int = -1


def main(cfg):
    check(cfg)
    world = distributed.join(cfg.device)
    say = print if world.is_main else no_one
    sequences, micro_batch, micro_steps = divide_batch(cfg, world.size)
    for share in (4, 2) if cfg.batch_warmup_iters else ():
        divide_batch(cfg, world.size, share)            # refuses what could only fail later
    tokens_per_update = sequences * cfg.block_size
    dtype, why = distributed.on_main(world, distributed.pick_dtype, cfg.dtype, world.device, True)
    say(f'device {world.device}; {str(dtype)[6:]}: {why}')
    if world.device.type == 'cuda':
        torch.set_float32_matmul_precision('high')      # TF32, where float32 is multiplied

    sets, encoding = load_data(cfg.dataset, cfg.data_dir)
    train_data = make_batches(sets, encoding, cfg.block_size, cfg.seed, cfg.doc_start)
    questions = load_questions(cfg, world, encoding)
    lock = take_lock(cfg, world)
    model, saved = start(cfg, world, encoding, say)
    shards = check_same_data(saved, sets, cfg)
    model.to(world.device).train()
    optimizers = make_optimizers(model, cfg, dtype)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    autocast = partial(torch.autocast, world.device.type, dtype, enabled=dtype != torch.float32)
    now = Progress(**saved.get('progress', {}))
    if cfg.eval_only:
        val_loss, others, count = validate(model, sets, cfg, world, autocast)
        say(f'step {now.step}: {describe(val_loss, others)}, over {count:,} tokens')
        return distributed.leave()
    if saved:
        checkpoints.restore_optimizers(model, optimizers, saved['optimizer'])
        scaler.load_state_dict(saved['scaler'])
    if world.is_main:
        write_config(cfg)

    say(f'{sum(p.numel() for p in model.parameters()):,} parameters; an update is '
        f'{tokens_per_update:,} tokens = {world.size} processes x {micro_steps} micro-batches x '
        f'{micro_batch} x {cfg.block_size}; {describe_epochs(sets, cfg.block_size, sequences)}')
    first = [part.to(world.device) for part in train_data.read(now.position, micro_batch)]
    ahead = Ahead(train_data, pin=world.device.type == 'cuda')
    peak = distributed.measure_peak(world.device, dtype)
    seconds = (model.flops_per_token() * tokens_per_update * max(0, cfg.max_iters - now.step) /
               (peak * world.size) if peak else math.inf)           # at the least
    replica = make_replica(model, cfg, world, autocast, first, dtype, seconds, say)
    log, stop, clock = Log(cfg, world, say), StopSignal(), Stopwatch()
    saved_at, saved_time, validated = now.step if saved else 0, time.monotonic(), -1
    asked_to_stop = save_due = False
    skipped_in_a_row, underway = 0, []

    while True:
        # once in a while: save, and only then validate: if validating fails, nothing is lost
        finished = now.step >= cfg.max_iters
        due = finished or now.step % cfg.eval_interval == 0
        quiz = questions and (finished or now.step % cfg.hellaswag_interval == 0)
        if (due or quiz or save_due or asked_to_stop) and saved_at != now.step:
            state = {'progress': asdict(now), 'settings': asdict(cfg), 'shards': shards,
                     'optimizer': checkpoints.optimizer_state(model, optimizers),
                     'scaler': scaler.state_dict()}
            distributed.on_main(world, checkpoints.save, cfg.out_dir, now.step, model, encoding,
                                state)
            saved_at, saved_time = now.step, time.monotonic()
        if due and (finished or not asked_to_stop) and validated != now.step:
            val_loss, others, _ = validate(model, sets, cfg, world, autocast)
            validated = now.step
            if val_loss < now.best_val_loss:
                now.best_val_loss, now.best_step = val_loss, now.step
                distributed.on_main(world, checkpoints.mark_best, cfg.out_dir, now.step, val_loss)
            rest = cfg.patience * cfg.eval_interval         # as long without a better one
            finished = finished or 0 < rest <= now.step - now.best_step
            log.write(step=now.step, tokens=now.position * cfg.block_size, val_loss=val_loss,
                      **others)
            say(f'step {now.step}: {describe(val_loss, others)}')
        if saved_at == now.step and world.is_main:
            keep_newest = cfg.keep if cfg.always_save_checkpoint else 1
            checkpoints.prune(cfg.out_dir, keep_newest, now.best_step)
        if quiz and not asked_to_stop:
            scores = score_hellaswag(model, encoding, questions, world)
            log.write(step=now.step, tokens=now.position * cfg.block_size, **scores)
            say(f"step {now.step}: hellaswag {scores['hellaswag']:.2%} of {len(questions):,}")
        if cfg.sample_interval and now.step % cfg.sample_interval == 0 and world.is_main:
            log.sample(now.step, draw_sample(model, encoding, cfg.seed))
        if finished or asked_to_stop or skipped_in_a_row >= cfg.max_skipped:
            break

        # one update: a forward and a backward pass for each micro-batch, then one step
        clock.start()
        lr = learning_rate_at(now.step, cfg)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group['lr'] = group['initial_lr'] * lr / cfg.learning_rate
        sequences, micro_batch, micro_steps = batch_at(now.step, cfg, world.size)
        loss = torch.zeros((), device=world.device)
        for i in range(micro_steps):
            index = world.rank * micro_steps + i            # of the micro-batch within the update
            here = now.position + index * micro_batch
            last = i == micro_steps - 1
            after = sequences - i * micro_batch if last else micro_batch    # to this rank's next
            x, y = ahead.read(here, micro_batch, then=here + after)
            x, y = (part.to(world.device, non_blocking=True) for part in (x, y))
            torch.manual_seed(int(draw(f'{cfg.seed}:{now.step}:{index}', 1)[0]))    # for dropout
            with reduce_gradients(replica, last):
                with autocast():
                    micro_loss = replica(x, y) / micro_steps
                scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = get_total_norm([p.grad for p in model.parameters()])
        save_due = world.is_main and 0 < cfg.save_minutes < (time.monotonic() - saved_time) / 60
        wishes = [torch.full_like(loss, wish) for wish in (stop.requested, save_due)]
        votes = distributed.all_reduce(torch.stack([loss / world.size, *wishes]))
        update(optimizers, votes[0], norm, cfg.grad_clip)
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        now.step, now.position = now.step + 1, now.position + sequences

        # what came of it: on a GPU read an update later, so that it never waits for us
        underway.append(Numbers(now.step, torch.cat([votes, norm[None]])))
        logging = now.step % cfg.log_interval == 0 or now.step == cfg.max_iters
        pause = logging or any(every and now.step % every == 0 for every in (
            cfg.eval_interval, cfg.hellaswag_interval, cfg.sample_interval))
        asked_to_stop = save_due = False
        while len(underway) > (world.device.type == 'cuda'
                               and not (pause or asked_to_stop or save_due)):
            step, (loss, stops, saves, norm) = underway.pop(0).read()
            asked_to_stop, save_due = stops > 0, saves > 0  # on all ranks, if any wishes so
            finite = math.isfinite(norm) and math.isfinite(loss)
            skipped_in_a_row = 0 if finite else skipped_in_a_row + 1
            if not finite:
                now.skipped += 1
                say(f'step {step}: loss {loss}, norm {norm}: skipped ({now.skipped} so far)')
        clock.stop(sequences * cfg.block_size)

        if logging:
            seconds, rate = clock.read()
            mfu = peak and model.flops_per_token() * rate / (peak * world.size)
            log.write(step=now.step, tokens=now.position * cfg.block_size, loss=loss, lr=lr,
                      grad_norm=norm, step_ms=1000 * seconds, tokens_per_second=rate, mfu=mfu)
            say(f'step {now.step}/{cfg.max_iters}  loss {loss:.4f}  lr {lr:.2e}  norm {norm:.2f}  '
                f'{1000 * seconds:.0f} ms  {rate:,.0f} tok/s  {f"mfu {mfu:.0%}  " if mfu else ""}'
                f'left {duration((cfg.max_iters - now.step) * seconds)}')

    diverged = skipped_in_a_row >= cfg.max_skipped
    say(closing_words(cfg, now, diverged, finished))
    log.finish()
    stop.restore()
    distributed.leave()
    lock.close()
    return 3 if diverged else 0


def no_one(*words):
    """What a rank other than 0 says."""


# The settings, the batch, the data.

def check(cfg):
    """Refuse settings that could only fail later; ValueError names the first."""
    for key in ('batch_size', 'block_size', 'n_layer', 'n_head', 'n_embd', 'eval_interval',
                'eval_tokens', 'log_interval', 'max_skipped', 'keep'):
        if getattr(cfg, key) < 1:
            raise ValueError(f'{key}: given {getattr(cfg, key)}, expected 1 or more')
    for key in ('max_iters', 'eval_iters', 'sample_interval', 'hellaswag_interval',
                'hellaswag_limit', 'save_minutes', 'total_batch_size',
                'gradient_accumulation_steps', 'weight_decay', 'grad_clip', 'warmup_iters',
                'lr_decay_iters', 'cooldown_iters', 'min_lr', 'patience', 'batch_warmup_iters'):
        if getattr(cfg, key) < 0:
            raise ValueError(f'{key}: given {getattr(cfg, key)}, expected 0 or more')
    for key, choices in (('optimizer', ('adamw', 'muon')), ('schedule', ('cosine', 'wsd')),
                         ('compile', ('auto', True, False))):
        if getattr(cfg, key) not in choices:
            raise ValueError(f'{key}: given {getattr(cfg, key)!r}, expected one of '
                             f"{', '.join(map(repr, choices))}")
    for key in ('dropout', 'beta1', 'beta2'):
        if not 0 <= getattr(cfg, key) < 1:
            raise ValueError(f'{key}: given {getattr(cfg, key)}, expected 0 or more, less than 1')
    if not cfg.out_dir:
        raise ValueError("out_dir: given '', expected the name of a folder")
    if cfg.learning_rate <= 0:
        raise ValueError(f'learning_rate: given {cfg.learning_rate}, expected more than 0')


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
    tokens = (cfg.total_batch_size or
              max(1, cfg.gradient_accumulation_steps) * cfg.batch_size * cfg.block_size)
    sequences = tokens // share // cfg.block_size
    micro_batch = min(cfg.batch_size, max(1, sequences // world_size))
    unit = micro_batch * world_size * cfg.block_size * share
    if tokens % unit:
        nearest = max(1, round(tokens / unit)) * unit
        raise ValueError(f"{'' if share == 1 else f'1/{share} of '}an update of {tokens:,} tokens "
                         f'cannot be shared by {world_size} '
                         f'processes in micro-batches of {micro_batch} x {cfg.block_size} tokens; '
                         f'the nearest that can: --total_batch_size={nearest}')
    return sequences, micro_batch, sequences // (micro_batch * world_size)


def bits_per_byte(val_loss, count, manifest):
    """{'val_bits_per_byte': …, 'xz_bits_per_byte': what `xz -9e` makes of the same text}, where
    the bytes of the validation text are known. Unlike the loss it compares between tokenizers.
    When only `count` tokens of the split were validated, their bytes are estimated, and xz is
    left out."""
    if not manifest:
        return {}
    facts = manifest['splits']['val']
    found = {'val_bits_per_byte': val_loss / math.log(2) * facts['tokens'] / facts['bytes']}
    if 'xz_bytes' in facts and count == facts['tokens'] - 1:
        found['xz_bits_per_byte'] = 8 * facts['xz_bytes'] / facts['bytes']
    return found


def mixed_bits_per_byte(val_loss, sets):
    """{'val_bits_per_byte': …} of a mixture: the bits of its mean token over the bytes of its mean
    token; {} when the bytes of one data set are not known. No one file holds it, hence no xz."""
    if not all(data.manifest for data in sets):
        return {}
    facts = [data.manifest['splits']['val'] for data in sets]
    mean = sum(data.share * fact['bytes'] / fact['tokens'] for data, fact in zip(sets, facts))
    return {'val_bits_per_byte': val_loss / math.log(2) / mean}


def describe(val_loss, others):
    """What a validation found, in words."""
    words = f'val_loss {val_loss:.4f}'
    parts = [f"{key.partition('/')[2]} {loss:.4f}" for key, loss in others.items() if '/' in key]
    if parts:
        words += f" ({', '.join(parts)})"
    if 'val_bits_per_byte' in others:
        words += f", {others['val_bits_per_byte']:.3f} bits per byte"
    if 'xz_bits_per_byte' in others:
        words += f" (xz -9e: {others['xz_bits_per_byte']:.3f})"
    return words


# Where the run starts.

def take_lock(cfg, world):
    """The lock of the run's folder, held by rank 0; a second run there is refused on all ranks."""
    if cfg.eval_only:
        return nullcontext()
    held = [open(os.devnull)]
    distributed.on_main(world, lambda: held.insert(0, checkpoints.lock(cfg.out_dir)))
    return held[0]


def start(cfg, world, encoding, say):
    """(model, what was saved with it): of the newest step in out_dir, another model, or scratch.

    {} was saved where a run begins. Raises ValueError when init_from and the folder disagree.
    """
    folder, problems = distributed.on_main(world, checkpoints.newest_step, cfg.out_dir)
    for damaged, wrong in problems:
        say(f'passing over {damaged}: {wrong}')
        if not cfg.eval_only:
            distributed.on_main(world, checkpoints.set_aside, damaged)
    if folder and cfg.init_from == 'scratch':
        raise ValueError(f"init_from='scratch', but {folder} holds a run; --init_from=resume goes "
                         f'on with it, another --out_dir leaves it alone')
    if not folder and cfg.init_from == 'resume':
        raise ValueError(f"init_from='resume', but there is no checkpoint in {cfg.out_dir}")
    shape = GPTConfig(cfg.block_size, encoding.n_vocab, cfg.n_layer, cfg.n_head, cfg.n_embd,
                      cfg.dropout, cfg.bias)
    fine_tune = cfg.init_from not in ('auto', 'scratch', 'resume')
    torch.manual_seed(cfg.seed)
    if folder:
        model, saved = load_checked(folder, encoding, cfg, world), checkpoints.load_training(folder)
        began = saved['settings']['init_from']
        if fine_tune and began != cfg.init_from:
            raise ValueError(f'{cfg.out_dir} holds a run with init_from={began}, given '
                             f'{cfg.init_from}; give another --out_dir to begin from that')
        if fine_tune:                                               # all but the block is its own
            shape = replace(model.config, block_size=cfg.block_size)
        check_shape(model.config, shape, folder)
        changed = [f'{key} {saved["settings"].get(key)!r} -> {value!r}'
                   for key, value in asdict(cfg).items() if saved['settings'].get(key) != value]
        say(f'going on from {folder}' + (f"; changed: {', '.join(changed)}" if changed else ''))
    elif fine_tune:
        source = distributed.on_main(world, checkpoints.find, cfg.init_from)
        model, saved = load_checked(source, encoding, cfg, world), {}
        crop_block(model, cfg.block_size)
        say(f'a new run in {cfg.out_dir}, from the weights in {source}; '
            f'it reads {cfg.block_size} tokens at a time')
    else:
        model, saved = GPT(shape), {}
        say(f'a new run in {cfg.out_dir}')
    return model, saved


def load_checked(folder, encoding, cfg, world):
    """The model in `folder`, whose tokenizer must be that of the data set."""
    model, theirs = checkpoints.load_folder(folder, world.device, dropout=cfg.dropout)
    if tokenizer.fingerprint(theirs) != tokenizer.fingerprint(encoding):
        raise ValueError(f'{folder} was trained on tokens of {theirs.name} ({theirs.n_vocab:,}), '
                         f'the data set {cfg.dataset} holds those of another tokenizer, '
                         f'{encoding.name} ({encoding.n_vocab:,}); prepare it with '
                         f'--tokenizer={folder}')
    return model


def check_same_data(saved, sets, cfg):
    """The sha256 of all shards, which must be those that the run went on with until now."""
    shards = [shard['sha256'] for data in sets for split in data.manifest.get('splits', {}).values()
              for shard in split['shards']]
    if saved and saved['settings']['dataset'] == cfg.dataset and saved['shards'] != shards:
        raise ValueError(f'the data set {cfg.dataset} was prepared anew since {cfg.out_dir} was '
                         f'trained on it; to go on from these weights, give another --out_dir and '
                         f'--init_from={cfg.out_dir}')
    return shards


def check_shape(found, given, folder):
    for key, value in asdict(given).items():
        if value != getattr(found, key):
            raise ValueError(f'{folder} has {key}={getattr(found, key)}, given {key}={value}; '
                             f'give it so, or another --out_dir')


def write_config(cfg):
    """The resolved settings, as a config file that repeats the run."""
    path = Path(cfg.out_dir) / 'config.py'
    words = f'python train.py {path} --out_dir=out/again   # repeats this run'
    path.with_suffix('.partial').write_text(as_config_file(cfg, words), encoding='utf-8')
    os.replace(path.with_suffix('.partial'), path)


# Optimizer, schedule, replicas.

def make_optimizers(model, cfg, dtype=torch.float32):
    """[AdamW] or [AdamW, Muon], which multiplies in dtype; decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    for_muon = [p for p in model.h.parameters() if p.dim() >= 2] if cfg.optimizer == 'muon' else []
    ids = set(map(id, for_muon))
    others = [p for p in matrices if id(p) not in ids]
    groups = [{'params': others, 'weight_decay': cfg.weight_decay},
              {'params': vectors, 'weight_decay': 0.0}]
    betas = (cfg.beta1, cfg.beta2)
    optimizers = [torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=betas, fused=True)]
    if cfg.optimizer == 'muon':
        half = dtype if dtype == torch.float32 else torch.bfloat16
        optimizers.append(Muon(for_muon, lr=cfg.muon_learning_rate, weight_decay=cfg.weight_decay,
                               dtype=half))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group['initial_lr'] = group['lr']
    return optimizers


def update(optimizers, loss, norm, grad_clip):
    """One step of each, by gradients of length grad_clip at most; none if loss or norm is not
    finite. The device decides, and nobody waits for it."""
    finite = torch.isfinite(loss) & torch.isfinite(norm)
    if norm.device.type not in ('cpu', 'cuda'):         # elsewhere the fused kernels cannot
        if not finite:
            return
        scale = 1 / (norm / grad_clip).clamp(min=1) if grad_clip else 1
        for p in (p for o in optimizers for group in o.param_groups for p in group['params']):
            p.grad.mul_(scale)
    for optimizer in optimizers:
        if norm.device.type in ('cpu', 'cuda'):
            optimizer.grad_scale = (norm / grad_clip).clamp(min=1) if grad_clip else None
            optimizer.found_inf = (~finite).float()
        optimizer.step()


class Numbers:
    """What an update found, on its way from the device; read() waits until it is there."""

    def __init__(self, step, numbers):
        self.step, self.there = step, torch.cuda.Event() if numbers.is_cuda else None
        self.numbers = numbers.to('cpu', non_blocking=numbers.is_cuda)
        if self.there:
            self.there.record()

    def read(self):
        if self.there:
            self.there.synchronize()
        return self.step, self.numbers.tolist()


def learning_rate_at(step, cfg):
    """AdamW's learning rate for the update after `step` updates; Muon's follows in proportion."""
    if not cfg.decay_lr:
        return cfg.learning_rate
    end = cfg.lr_decay_iters or cfg.max_iters
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    if step >= end:
        return cfg.min_lr
    if cfg.schedule == 'cosine':
        progress = (step - cfg.warmup_iters) / (end - cfg.warmup_iters)
        share = 0.5 * (1 + math.cos(math.pi * progress))
    else:                                                           # 'wsd'
        cooldown = min(cfg.cooldown_iters, end - cfg.warmup_iters)  # it begins after the warmup
        share = min(1, (end - step) / max(1, cooldown))
    return cfg.min_lr + share * (cfg.learning_rate - cfg.min_lr)


def pick_compile(cfg, device, dtype, seconds):
    """(whether to compile, why), for a run that takes so many seconds at the matmul rate."""
    if isinstance(cfg.compile, bool):
        return cfg.compile, 'as set'
    if device.type == 'cuda':
        return True, 'on a GPU'
    if device.type != 'cpu':
        return False, 'not on this device'
    if not (compiler := shutil.which('g++') or shutil.which('clang++')):
        return False, 'no C++ compiler here'
    least = COMPILE_PAYS[dtype == torch.float32]
    return seconds > least, (f'what is left takes {seconds:.0f} s at the least, compiling pays '
                             f'above {least} s ({compiler})')


def make_replica(model, cfg, world, autocast, batch, dtype, seconds, say):
    """`model`, compiled when that is wanted and works, in DDP when there are several processes.

    Runs one backward pass, whose gradients are dropped. It compiles; and DDP, which reorders its
    buckets after the first one, then adds in the same order in a resumed run as in one that never
    stopped.
    """
    replica = model
    wanted, why = distributed.on_main(world, pick_compile, cfg, world.device, dtype, seconds)
    say(f'compile {wanted}: {why}')
    if wanted:
        began, failure, compiled = time.perf_counter(), '', torch.compile(model)
        try:
            with autocast():
                compiled(*batch).backward()
        except Exception as error:      # whatever a compiler can fail with
            failure = f'{type(error).__name__}: {str(error).strip()}'.splitlines()[0][:120]
        failed = torch.tensor(float(bool(failure)), device=world.device)
        if distributed.all_reduce(failed, 'max').item():
            say(f'compiling failed, going on without ({failure or "on another rank"})')
        else:
            replica = compiled
            say(f'compiled in {time.perf_counter() - began:.0f} s')
    if world.size > 1:
        on_gpu = world.device.type == 'cuda'
        replica = DistributedDataParallel(replica, device_ids=[world.device] if on_gpu else None)
        with autocast():
            replica(*batch).backward()
    model.zero_grad(set_to_none=True)
    return replica


def reduce_gradients(replica, last):
    """DDP sums gradients over ranks in the backward pass of the last micro-batch only."""
    if last or not isinstance(replica, DistributedDataParallel):
        return nullcontext()
    return replica.no_sync()


# Validation and samples.

def validate(model, sets, cfg, world, autocast):
    """(val_loss, {what else the log says of it}, tokens predicted) over all data sets.

    The loss of a mixture is that of its mean token: each data set counts by its share, also where
    its validation split is smaller than its share of eval_tokens.
    """
    found = [evaluate(model, data.val, cfg, world, autocast, data.share) for data in sets]
    val_loss = sum(loss * data.share for (loss, _), data in zip(found, sets))
    if len(sets) == 1:
        return val_loss, bits_per_byte(*found[0], sets[0].manifest), found[0][1]
    losses = {f'val_loss/{data.name}': loss for (loss, _), data in zip(found, sets)}
    return (val_loss, {**losses, **mixed_bits_per_byte(val_loss, sets)},
            sum(count for _, count in found))


@torch.no_grad()
def evaluate(model, tokens, cfg, world, autocast, share=1.0):
    """(mean cross-entropy, tokens predicted) over the first eval_tokens * share of a split.

    Consecutive blocks, the last one shorter; every rank takes its share, and the sum is the same
    for any number of them, up to rounding.
    """
    wanted = cfg.eval_iters * cfg.batch_size * cfg.block_size or cfg.eval_tokens
    wanted = max(1, round(wanted * share))
    count, size = min(wanted, len(tokens) - 1), cfg.block_size
    rows = count // size
    spans = [(row * size, min(cfg.batch_size, rows - row), size)
             for row in range(0, rows, cfg.batch_size)]
    if count > rows * size:
        spans.append((rows * size, 1, count - rows * size))
    model.eval()
    nats = torch.zeros(1, dtype=torch.float64)
    for start, n, length in spans[world.rank::world.size]:
        ids = torch.from_numpy(tokens.read(start, n * length + 1)).to(world.device)
        with autocast():
            loss = model(ids[:-1].view(n, length), ids[1:].view(n, length))
        nats += loss.item() * n * length
    model.train()
    nats = distributed.all_reduce(nats.to(world.device) if world.device.type == 'cuda' else nats)
    return nats.item() / count, count


def load_questions(cfg, world, encoding):
    """HellaSwag's rows, if the run is to be scored by them: what could fail, fails at the start."""
    if not cfg.hellaswag_interval:
        return []
    import hellaswag
    rows, _ = distributed.on_main(world, hellaswag.benchmarks.hellaswag, cfg.hellaswag_data)
    rows = rows[:cfg.hellaswag_limit or None]
    items = [hellaswag.render(row, encoding, 'completion') for row in rows]
    hellaswag.likelihood.check(items, cfg.block_size)
    return rows


def score_hellaswag(model, encoding, rows, world):
    """What `python hellaswag.py` would say of this step, on the uncompiled model in float32."""
    import hellaswag
    model.eval()
    answers = hellaswag.evaluate(model, encoding, rows, world=world)
    model.train()
    return {'hellaswag': sum(answers['acc_norm']) / len(rows),
            'hellaswag_sum': sum(answers['acc']) / len(rows)}


def draw_sample(model, encoding, seed):
    """A hundred tokens from <|endoftext|> (or token 0), by the same random numbers each time."""
    model.eval()
    ids = torch.tensor([[tokenizer.eot_id(encoding) or 0]], device=model.wte.weight.device)
    out = model.generate(ids, 100, top_k=200, seed=seed)
    model.train()
    return encoding.decode(out[0, 1:].tolist())


# Signals, time, the log.

class StopSignal:
    """SIGTERM, SIGINT and SIGUSR1 ask for a checkpoint and the end; another Ctrl-C ends at once."""

    def __init__(self):
        self.requested, self.since, self.before = False, 0.0, {}
        if threading.current_thread() is threading.main_thread():
            for name in ('SIGTERM', 'SIGINT', 'SIGUSR1'):
                if number := getattr(signal, name, None):
                    self.before[number] = signal.signal(number, self.receive)

    def receive(self, number, frame):
        if self.requested and number == signal.SIGINT and time.monotonic() - self.since > 2:
            raise KeyboardInterrupt                 # torchrun passes one Ctrl-C on twice: hence 2 s
        self.since = self.since or time.monotonic()
        self.requested = True

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Stopwatch:
    """Time and tokens of the updates since it was last read."""

    def __init__(self):
        self.seconds, self.steps, self.tokens = 0.0, 0, 0

    def start(self):
        self.began = time.perf_counter()

    def stop(self, tokens):
        self.seconds += time.perf_counter() - self.began
        self.steps, self.tokens = self.steps + 1, self.tokens + tokens

    def read(self):
        """(mean seconds of an update, tokens per second)."""
        found = self.seconds / self.steps, self.tokens / self.seconds
        self.seconds, self.steps, self.tokens = 0.0, 0, 0
        return found


def duration(seconds):
    """90 -> '1:30', 3725 -> '1:02:05'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02d}:{seconds:02d}' if hours else f'{minutes}:{seconds:02d}'


class Log:
    """log.jsonl in the run's folder, a record a line, and wandb beside it if asked; rank 0 writes.

    After a resume some steps stand there twice: readers keep the last record of a step.
    """

    def __init__(self, cfg, world, say):
        self.folder, self.say, self.is_main = Path(cfg.out_dir), say, world.is_main
        self.wandb = None
        if not self.is_main:
            return
        path = self.folder / 'log.jsonl'
        if path.exists():                                           # a torn last line is cut off
            os.truncate(path, path.read_bytes().rfind(b'\n') + 1)
        self.file = open(path, 'a', encoding='utf-8')
        if cfg.wandb_log:
            self.try_wandb(lambda: self.start_wandb(cfg))

    def start_wandb(self, cfg):
        import wandb
        id_file = self.folder / 'wandb_id.txt'                      # the same run after a resume
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        self.wandb = wandb.init(project=cfg.wandb_project, id=id_file.read_text(), resume='allow',
                                name=cfg.wandb_run_name or self.folder.name, dir=self.folder,
                                config=asdict(cfg))

    def try_wandb(self, action):
        """Whatever wandb may meet, training goes on, and the log is whole without it."""
        try:
            action()
        except Exception as error:
            self.say(f'wandb: {type(error).__name__}: {error}; going on without it')
            self.wandb = None

    def write(self, **record):
        if not self.is_main:
            return
        record = {key: value if value is None or math.isfinite(value) else None
                  for key, value in record.items()}                 # JSON has no NaN
        self.file.write(json.dumps(record) + '\n')
        self.file.flush()
        if self.wandb:
            self.try_wandb(lambda: self.wandb.log(record, step=record['step']))

    def sample(self, step, text):
        with open(self.folder / 'samples.jsonl', 'a', encoding='utf-8') as file:
            file.write(json.dumps({'step': step, 'text': text}) + '\n')
        self.say(f'step {step}: sample: {text[:200]!r}')

    def finish(self):
        if self.is_main:
            self.file.close()
        if self.wandb:
            self.try_wandb(self.wandb.finish)


def closing_words(cfg, now, diverged, finished):
    if diverged:
        return (f'stopped at step {now.step}: {cfg.max_skipped} updates in a row were not finite. '
                f'Common causes: a learning rate too high, float16, damaged data. The last '
                f'checkpoint in {cfg.out_dir} is from before')
    words = f'stopped at step {now.step}, the same command goes on'
    if finished:
        early = now.step < cfg.max_iters
        words = (f'ended at step {now.step}, {cfg.patience} validations after the best' if early
                 else f'finished {now.step} updates')
    if now.skipped:
        words += f', {now.skipped} of them skipped'
    if now.best_step >= 0:
        words += (f'; best val_loss {now.best_val_loss:.4f} at step {now.best_step}. '
                  f'`python sample.py --model={cfg.out_dir}` writes with that one, the best')
    return words


if __name__ == '__main__':
    run(main, Config)
