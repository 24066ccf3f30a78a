"""
Train a GPT, on one process or many.

    python train.py                                                 # a small GPT on the offline corpus
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
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import checkpoints
import distributed
import tokenizer
from configurator import as_config_file, run, settings
from data.shards import DATA_DIR, TokenBatches, Tokens, draw, read_manifest
from model import GPT, GPTConfig, crop_block

# -----------------------------------------------------------------------------
# The defaults train a small GPT on the offline corpus in minutes, on a laptop.
# the run
out_dir = 'out/pydocs'      # checkpoints, log.jsonl and config.py of this run
init_from = 'auto'          # auto: resume if out_dir holds a checkpoint, else scratch; 'scratch'; 'resume';
                            # or where fine-tuning starts: 'gpt2', a Hugging Face name or folder, a run
seed = 1337                 # of weights, data order and dropout
max_iters = 1000            # updates in all
eval_interval = 100         # updates between validations; a checkpoint is saved before each
eval_tokens = 1_000_000     # validation tokens: the first of the split, or all it has
eval_iters = 0              # nanoGPT's spelling: eval_tokens is eval_iters * batch_size * block_size
eval_only = False           # validate once, write nothing, leave
log_interval = 10           # updates between lines in the log
sample_interval = 0         # updates between samples in samples.jsonl, 0: none
save_minutes = 10.0         # and a checkpoint every so many minutes; 0: only at validations
keep = 2                    # checkpoints kept: the newest so many and the best
always_save_checkpoint = True   # False: keep only the newest and the best
# wandb
wandb_log = False           # mirror the log there too (WANDB_MODE=offline needs no network)
wandb_project = 'gpt2'
wandb_run_name = ''         # '': the name of out_dir
# data
dataset = 'pydocs'          # a folder in data/, made by data/prepare.py
data_dir = ''               # where prepared data lies; '': data/ beside this script
total_batch_size = 0        # tokens in an update, over all processes and micro-batches; 0: batch_size sequences
batch_size = 16             # sequences in a micro-batch of one process, at most: what its memory holds
gradient_accumulation_steps = 0 # nanoGPT's way to state total_batch_size: micro-batches over all processes
block_size = 256            # tokens in a sequence
# model
n_layer = 4
n_head = 4
n_embd = 256
dropout = 0.0               # 0 for pretraining; 0.1 or more for text seen many times
bias = True                 # in Linear and LayerNorm, as GPT-2 has them
# optimizer and schedule
optimizer = 'adamw'         # 'adamw', or 'muon': Muon for the blocks' matrices, AdamW for all else
learning_rate = 1e-3        # of AdamW, at its highest
muon_learning_rate = 0.02   # of Muon, at its highest
weight_decay = 0.1          # of matrices; not of biases and LayerNorms
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0             # longest gradient, 0: any
schedule = 'cosine'         # 'cosine', or 'wsd': constant, then linear over the last cooldown_iters
decay_lr = True             # False: learning_rate throughout
warmup_iters = 100
lr_decay_iters = 0          # where min_lr is reached; 0: at max_iters
cooldown_iters = 300        # of 'wsd'
min_lr = 1e-4
max_skipped = 10            # so many non-finite updates in a row end the run (exit status 3)
# system
device = 'auto'             # 'cpu', 'cuda', 'cuda:1', 'mps'; auto: cuda, else mps, else cpu
dtype = 'auto'              # 'float32', 'bfloat16', 'float16'; auto: bfloat16 where the hardware has it
compile = 'auto'            # True, False; auto: on CUDA, and on CPUs with a C++ compiler when it pays
# -----------------------------------------------------------------------------
Config = settings(globals())

COMPILE_FLOPS = 5e13        # on a CPU, compiling (about 30 s) pays for runs longer than this
PEAK_FLOPS = {              # dense bfloat16 (V100, T4: float16) of the makers' data sheets
    'B200': 2250e12, 'H200': 989e12, 'H100 PCIe': 756e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12,
    'RTX 6000 Ada': 364e12, 'A6000': 155e12, 'A10G': 70e12, 'L4': 121e12, 'RTX 5090': 209e12, 'RTX 4090': 165e12,
    'RTX 3090': 71e12, 'V100': 125e12, 'T4': 65e12}


def main(cfg):
    world = distributed.join(cfg.device)
    say = print if world.is_main else no_one
    cfg = with_eval_tokens(cfg)
    sequences, micro_batch, micro_steps = divide_batch(cfg, world.size)
    dtype, why = pick_dtype(cfg.dtype, world.device)
    say(f'device {world.device}, {world.size} process{"es" * (world.size > 1)}; {str(dtype)[6:]}: {why}')

    manifest, encoding = load_data_facts(cfg)
    train_data = TokenBatches(Tokens(cfg.dataset, 'train', encoding.n_vocab, cfg.data_dir), cfg.block_size, cfg.seed)
    val_data = Tokens(cfg.dataset, 'val', encoding.n_vocab, cfg.data_dir)
    run_lock = take_lock(cfg, world)
    model, state = start(cfg, world, encoding, say)
    model.to(world.device).train()
    optimizers = make_optimizers(model, cfg)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    step, position, best, skipped = restore(state, model, optimizers, scaler)
    autocast = partial(torch.autocast, world.device.type, dtype, enabled=dtype != torch.float32)
    if cfg.eval_only:
        val_loss, count = evaluate(model, val_data, cfg, world, autocast)
        say(f'step {step}: {describe_validation(val_loss, manifest)}, over {count:,} tokens')
        return distributed.leave()

    say(f'{sum(p.numel() for p in model.parameters()):,} parameters; an update is {sequences * cfg.block_size:,} tokens: '
        f'{world.size} processes x {micro_steps} micro-batches x {micro_batch} sequences x {cfg.block_size} tokens; '
        f'an epoch is {train_data.blocks / sequences:,.1f} updates')
    first_batch = [part.to(world.device) for part in train_data.read(position, micro_batch)]
    replica = make_replica(model, cfg, world, autocast, first_batch, sequences, say)
    peak = measure_peak(world.device, dtype)
    log = Log(cfg, world, say)
    stop = StopSignal()
    validated = saved_at = None
    last_save, clock, in_a_row, voted_stop, voted_save = time.monotonic(), Stopwatch(), 0, False, False

    while True:
        # once in a while: save, then validate (an evaluation that fails must not cost the training)
        finished = step >= cfg.max_iters
        due = step % cfg.eval_interval == 0 or finished
        if (due or voted_save or voted_stop) and step > 0 and saved_at != step:
            training = {'step': step, 'position': position, 'best': best, 'skipped': skipped,
                        'optimizer': optimizer_state(model, optimizers), 'scaler': scaler.state_dict(),
                        'settings': asdict(cfg)}
            distributed.on_main(world, checkpoints.save, cfg.out_dir, step, model, encoding, training)
            saved_at, last_save = step, time.monotonic()
        if due and not voted_stop and validated != step:
            val_loss, _ = evaluate(model, val_data, cfg, world, autocast)
            validated = step
            if step > 0 and val_loss < best[0]:
                best = (val_loss, step)
            log.write(step=step, tokens=position * cfg.block_size, val_loss=val_loss,
                      **bits_per_byte(val_loss, manifest))
            say(f'step {step}: {describe_validation(val_loss, manifest)}')
        if saved_at == step and world.is_main:
            checkpoints.prune(cfg.out_dir, cfg.keep if cfg.always_save_checkpoint else 1, best[1])
        if cfg.sample_interval and step % cfg.sample_interval == 0 and world.is_main:
            log.sample(step, draw_sample(model, encoding, cfg.seed))
        if finished or voted_stop:
            break

        # one update: a forward and a backward pass for each micro-batch, then one step
        clock.start()
        lr = learning_rate_at(step, cfg)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group['lr'] = group['initial_lr'] * lr / cfg.learning_rate
        loss = torch.zeros((), device=world.device)
        for i in range(micro_steps):
            index = world.rank * micro_steps + i                # of the micro-batch within the update
            x, y = train_data.read(position + index * micro_batch, micro_batch)
            x, y = x.to(world.device, non_blocking=True), y.to(world.device, non_blocking=True)
            torch.manual_seed(int(draw(f'{cfg.seed}:{step}:{index}', 1)[0]))    # dropout, on any world size
            with reduce_gradients(replica, i == micro_steps - 1):
                with autocast():
                    micro_loss = replica(x, y) / micro_steps
                scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = get_total_norm([p.grad for p in model.parameters()])
        if cfg.grad_clip:
            clip_grads_with_norm_(model.parameters(), cfg.grad_clip, norm)
        save_due = cfg.save_minutes and time.monotonic() - last_save > 60 * cfg.save_minutes
        vote = loss.new_tensor([float(stop.requested), float(bool(save_due) and world.is_main)])
        votes = distributed.all_reduce(torch.cat([loss[None] / world.size, vote]))
        *votes, norm = torch.cat([votes, norm[None]]).tolist()  # the one place that waits for the device
        loss, voted_stop, voted_save = votes[0], votes[1] > 0, votes[2] > 0
        finite = math.isfinite(norm) and math.isfinite(loss)    # the same on every rank: both are reduced
        if finite:
            for optimizer in optimizers:
                scaler.step(optimizer)
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        step, position = step + 1, position + sequences
        clock.stop()

        in_a_row = 0 if finite else in_a_row + 1
        if not finite:
            skipped += 1
            say(f'step {step}: loss {loss}, gradient norm {norm}: this update is skipped ({skipped} so far)')
            if in_a_row >= cfg.max_skipped and not scaler.is_enabled() or in_a_row >= cfg.max_skipped + 20:
                break
        if step % cfg.log_interval == 0 or step >= cfg.max_iters:
            seconds = clock.per_step()
            rate = sequences * cfg.block_size / seconds
            mfu = peak and model.flops_per_token() * rate / (peak * world.size)
            log.write(step=step, tokens=position * cfg.block_size, loss=loss, lr=lr, grad_norm=norm,
                      step_ms=1000 * seconds, tokens_per_second=rate, mfu=mfu)
            say(f'step {step}/{cfg.max_iters}  loss {loss:.4f}  lr {lr:.2e}  norm {norm:.2f}  {1000 * seconds:.0f} ms  '
                f'{rate:,.0f} tok/s  {f"mfu {mfu:.0%}  " if mfu else ""}left {duration((cfg.max_iters - step) * seconds)}')

    diverged = in_a_row > 0 and not (finished or voted_stop)
    say(closing_words(cfg, step, best, skipped, diverged, voted_stop))
    log.finish()
    stop.restore()
    distributed.leave()
    if run_lock:
        run_lock.close()
    return 3 if diverged else 0


def no_one(*words):
    """What a rank other than 0 says."""


# The batch and the data.

def with_eval_tokens(cfg):
    return replace(cfg, eval_tokens=cfg.eval_iters * cfg.batch_size * cfg.block_size, eval_iters=0) if cfg.eval_iters else cfg


def divide_batch(cfg, world_size):
    """(sequences in an update, sequences in a micro-batch, micro-batches of each process).

    Raises ValueError, with the nearest size that works, when the batch cannot be divided evenly.
    """
    if cfg.total_batch_size and cfg.gradient_accumulation_steps:
        raise ValueError(f'given total_batch_size={cfg.total_batch_size} and gradient_accumulation_steps='
                         f'{cfg.gradient_accumulation_steps}, expected one of them: both say how large an update is')
    tokens = (cfg.total_batch_size or
              max(1, cfg.gradient_accumulation_steps) * cfg.batch_size * cfg.block_size)
    sequences = tokens // cfg.block_size
    micro_batch = min(cfg.batch_size, max(1, sequences // world_size))
    unit = micro_batch * world_size * cfg.block_size
    if tokens % unit:
        nearest = max(1, round(tokens / unit)) * unit
        raise ValueError(f'an update of {tokens:,} tokens cannot be shared by {world_size} processes in micro-batches of '
                         f'{micro_batch} x {cfg.block_size} tokens; the nearest that can: --total_batch_size={nearest}')
    return sequences, micro_batch, sequences // (micro_batch * world_size)


def load_data_facts(cfg):
    """(manifest, encoding) of the data set; shards without a manifest are taken to be GPT-2's tokens."""
    manifest = read_manifest(cfg.dataset, cfg.data_dir)
    if not manifest:
        Tokens(cfg.dataset, 'train', 2 ** 16, cfg.data_dir)         # refuses a data set that is not there
        return {}, tokenizer.gpt2()
    encoding = tokenizer.load(Path(cfg.data_dir or DATA_DIR) / cfg.dataset / 'tokenizer.json')
    if tokenizer.fingerprint(encoding) != manifest['tokenizer']['fingerprint']:
        raise ValueError(f'data set {cfg.dataset}: tokenizer.json is not the one its tokens were made with')
    return manifest, encoding


def bits_per_byte(val_loss, manifest):
    """{'val_bits_per_byte': …, 'xz_bits_per_byte': what `xz -9e` makes of the same text}, where the bytes of
    the validation text are known. Unlike the loss it can be compared between tokenizers."""
    facts = manifest['splits']['val'] if manifest else {}
    found = {'val_bits_per_byte': val_loss / math.log(2) * facts['tokens'] / facts['bytes']} if facts else {}
    return found | ({'xz_bits_per_byte': 8 * facts['xz_bytes'] / facts['bytes']} if 'xz_bytes' in facts else {})


def describe_validation(val_loss, manifest):
    bits = bits_per_byte(val_loss, manifest)
    return (f'val_loss {val_loss:.4f}' + (f", {bits['val_bits_per_byte']:.3f} bits per byte" if bits else '') +
            (f" (xz -9e: {bits['xz_bits_per_byte']:.3f})" if 'xz_bits_per_byte' in bits else ''))


# Where the run starts.

def take_lock(cfg, world):
    """The lock of the run's folder, held by rank 0; another process there is refused on all ranks."""
    held = [None]
    if not cfg.eval_only:
        distributed.on_main(world, lambda: held.__setitem__(0, checkpoints.lock(cfg.out_dir)) or None)
    return held[0]


def start(cfg, world, encoding, say):
    """(model, training state): from the newest checkpoint in out_dir, from another model, or from scratch.

    The state is {} for a run that begins. Raises ValueError when init_from and what lies there disagree.
    """
    folder, problems = distributed.on_main(world, checkpoints.newest_step, cfg.out_dir)
    for words in problems:
        say(f'passing over {words}')
    if folder and cfg.init_from == 'scratch':
        raise ValueError(f"init_from='scratch', but {folder} holds a run; --init_from=resume goes on with it, "
                         f"another --out_dir leaves it alone")
    if not folder and cfg.init_from == 'resume':
        raise ValueError(f"init_from='resume', but there is no checkpoint in {cfg.out_dir}")
    wanted = GPTConfig(cfg.block_size, encoding.n_vocab, cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.dropout, cfg.bias)
    torch.manual_seed(cfg.seed)
    if not folder and cfg.init_from in ('auto', 'scratch'):
        say(f'a new run in {cfg.out_dir}')
        write_config(cfg, world)
        return GPT(wanted), {}
    if not folder:
        model, theirs = checkpoints.load_model(distributed.on_main(world, checkpoints.find, cfg.init_from), 'cpu', cfg.dropout)
        check_tokenizer(theirs, encoding, cfg.init_from, cfg.dataset)
        crop_block(model, cfg.block_size)
        say(f'a new run in {cfg.out_dir}, from the weights of {cfg.init_from}')
        write_config(cfg, world)
        return model, {}
    model, theirs = checkpoints.load_model(folder, 'cpu', cfg.dropout)
    check_tokenizer(theirs, encoding, folder, cfg.dataset)
    if cfg.init_from in ('auto', 'resume'):                         # else the shape is that of init_from
        for key, value in asdict(wanted).items():
            if value != getattr(model.config, key):
                raise ValueError(f'{folder} has {key}={getattr(model.config, key)}, given {key}={value}; '
                                 f'give it so, or another --out_dir')
    state = checkpoints.load_training(folder)
    changed = [f'{key} {state["settings"].get(key)!r} -> {value!r}' for key, value in asdict(cfg).items()
               if state['settings'].get(key) != value]
    say(f'going on from {folder}' + (f"; changed: {', '.join(changed)}" if changed else ''))
    if not cfg.eval_only:
        write_config(cfg, world)
    return model, state


def check_tokenizer(theirs, ours, name, dataset):
    if tokenizer.fingerprint(theirs) != tokenizer.fingerprint(ours):
        raise ValueError(f'{name} was trained on tokens of {theirs.name} ({theirs.n_vocab:,}), the data set {dataset} holds '
                         f'those of another tokenizer, {ours.name} ({ours.n_vocab:,}); prepare it with the same --tokenizer')


def write_config(cfg, world):
    """The resolved settings, as a config file that repeats the run."""
    if world.is_main and not cfg.eval_only:
        path = Path(cfg.out_dir) / 'config.py'
        path.with_suffix('.partial').write_text(as_config_file(
            cfg, f'python train.py {path} --out_dir=out/again   # repeats this run'), encoding='utf-8')
        os.replace(path.with_suffix('.partial'), path)


def restore(state, model, optimizers, scaler):
    """Put `state` back into optimizers and scaler; returns (step, position, best, skipped)."""
    if not state:
        return 0, 0, (math.inf, None), 0
    names = {p: name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for p in (p for group in optimizer.param_groups for p in group['params']):
            saved = state['optimizer'].get(names[p])
            expected = {'momentum_buffer'} if isinstance(optimizer, torch.optim.Muon) else {'step', 'exp_avg', 'exp_avg_sq'}
            if saved is None or set(saved) != expected:
                raise ValueError(f'the checkpoint has no matching optimizer state for {names[p]}: was it trained with '
                                 f'another --optimizer?')
            optimizer.state[p] = {key: value.to(p.device, copy=True) for key, value in saved.items()}
    scaler.load_state_dict(state['scaler'])
    return state['step'], state['position'], tuple(state['best']), state['skipped']


def optimizer_state(model, optimizers):
    """{parameter name: {key: tensor}} of all optimizers; step counts and moments, no learning rates."""
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: {key: value for key, value in state.items()}
            for optimizer in optimizers for p, state in optimizer.state.items()}


# Optimizer, schedule, precision, replicas.

def make_optimizers(model, cfg):
    """[AdamW] or [AdamW, Muon]; decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    for_muon = [p for p in model.h.parameters() if p.dim() >= 2] if cfg.optimizer == 'muon' else []
    muon_ids = set(map(id, for_muon))
    groups = [{'params': [p for p in matrices if id(p) not in muon_ids], 'weight_decay': cfg.weight_decay},
              {'params': vectors, 'weight_decay': 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=True)]
    if cfg.optimizer == 'muon':
        optimizers.append(torch.optim.Muon(for_muon, lr=cfg.muon_learning_rate, weight_decay=cfg.weight_decay))
    elif cfg.optimizer != 'adamw':
        raise ValueError(f"optimizer: given {cfg.optimizer!r}, expected 'adamw' or 'muon'")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['initial_lr'] = group['lr']
    return optimizers


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
        share = 0.5 * (1 + math.cos(math.pi * (step - cfg.warmup_iters) / (end - cfg.warmup_iters)))
    elif cfg.schedule == 'wsd':
        share = min(1, (end - step) / max(1, cfg.cooldown_iters))
    else:
        raise ValueError(f"schedule: given {cfg.schedule!r}, expected 'cosine' or 'wsd'")
    return cfg.min_lr + share * (cfg.learning_rate - cfg.min_lr)


def pick_dtype(name, device):
    """(torch dtype, why): bfloat16 where the hardware computes in it, else float16 on CUDA, else float32."""
    if name != 'auto':
        if name not in ('float32', 'bfloat16', 'float16'):
            raise ValueError(f"dtype: given {name!r}, expected 'auto', 'float32', 'bfloat16' or 'float16'")
        return getattr(torch, name), 'as set'
    if device.type == 'cuda':
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, 'this GPU has it'
        return torch.float16, 'this GPU has no bfloat16'
    if device.type == 'cpu':
        found = getattr(torch.cpu, 'get_capabilities', dict)()
        for feature in ('amx_bf16', 'avx512_bf16', 'sve_bf16', 'bf16'):
            if found.get(feature):
                return torch.bfloat16, f'this CPU has {feature}'
        return torch.float32, 'this CPU has no bfloat16'
    return torch.float32, 'the safe choice on this device'


def pick_compile(wanted, model, cfg, device, sequences):
    """(whether to compile, why)."""
    if isinstance(wanted, bool):
        return wanted, 'as set'
    if device.type == 'cuda':
        return True, 'on a GPU'
    if device.type == 'cpu' and (compiler := shutil.which('g++') or shutil.which('clang++')):
        work = model.flops_per_token() * sequences * cfg.block_size * cfg.max_iters
        return work > COMPILE_FLOPS, f'{work:.0e} operations ahead, it pays above {COMPILE_FLOPS:.0e} ({compiler})'
    return False, 'no C++ compiler here' if device.type == 'cpu' else 'not on this device'


def make_replica(model, cfg, world, autocast, batch, sequences, say):
    """`model`, compiled when that is wanted and works, in DDP when there are several processes.

    Runs one backward pass, whose gradients are dropped: it compiles, and DDP, which reorders its
    buckets after the first one, then adds in the same order in a resumed run as in one that never stopped.
    """
    replica = model
    wanted, why = pick_compile(cfg.compile, model, cfg, world.device, sequences)
    say(f'compile {wanted}: {why}')
    if wanted:
        started, failure, compiled = time.perf_counter(), '', torch.compile(model)
        try:
            with autocast():
                compiled(*batch).backward()
        except Exception as error:      # whatever a compiler can fail with
            failure = f'{type(error).__name__}: {str(error).strip().splitlines()[0][:100] if str(error).strip() else ""}'
        if distributed.all_reduce(torch.tensor(float(bool(failure)), device=world.device), 'max').item():
            say(f'compiling failed, going on without ({failure or "on another rank"})')
        else:
            replica = compiled
            say(f'compiled in {time.perf_counter() - started:.0f} s')
    if world.size > 1:
        replica = DistributedDataParallel(replica, device_ids=[world.device] if world.device.type == 'cuda' else None)
        with autocast():
            replica(*batch).backward()
    model.zero_grad(set_to_none=True)
    return replica


def reduce_gradients(replica, last):
    """DDP sums gradients over ranks in the backward pass of the last micro-batch only."""
    return nullcontext() if last or not isinstance(replica, DistributedDataParallel) else replica.no_sync()


def measure_peak(device, dtype):
    """Operations per second one process could do at best: of the data sheet, or measured on a CPU; None if unknown."""
    if device.type == 'cuda' and dtype != torch.float32:
        found = [peak for name, peak in PEAK_FLOPS.items() if name in torch.cuda.get_device_name(device)]
        return found[0] if found else None
    if device.type == 'cpu' and dtype != torch.float16:             # which CPUs compute very slowly
        a, times = torch.randn(1024, 1024).to(dtype), []
        for _ in range(30):
            started = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - started)
        return 2 * 1024 ** 3 / min(times)
    return None


# Validation and samples.

@torch.no_grad()
def evaluate(model, tokens, cfg, world, autocast):
    """(mean cross-entropy, tokens predicted) over the first eval_tokens of the validation split.

    Consecutive blocks, the last one shorter; every rank takes its share, and the sum is the same for
    any number of them, up to rounding.
    """
    model.eval()
    count, size = min(cfg.eval_tokens, len(tokens) - 1), cfg.block_size
    rows = count // size
    spans = [(row * size, min(cfg.batch_size, rows - row), size) for row in range(0, rows, cfg.batch_size)]
    spans += [(rows * size, 1, count - rows * size)] if count > rows * size else []
    nats = torch.zeros(1, dtype=torch.float64)
    for start, n, length in spans[world.rank::world.size]:
        ids = torch.from_numpy(tokens.read(start, n * length + 1)).to(world.device)
        with autocast():
            loss = model(ids[:-1].view(n, length), ids[1:].view(n, length))
        nats += loss.item() * n * length
    model.train()
    nats = distributed.all_reduce(nats.to(world.device) if world.device.type == 'cuda' else nats)
    return nats.item() / count, count


def draw_sample(model, encoding, seed):
    """A hundred tokens from <|endoftext|> (or token 0), the same at every step but for the weights."""
    model.eval()
    device = model.wte.weight.device
    ids = torch.tensor([[tokenizer.eot_id(encoding) or 0]], device=device)
    out = model.generate(ids, 100, top_k=200, generator=torch.Generator(device).manual_seed(seed))
    model.train()
    return encoding.decode(out[0, 1:].tolist())


# Signals, time, the log.

class StopSignal:
    """SIGTERM, SIGINT and SIGUSR1 ask for a checkpoint and the end; Ctrl-C once more ends at once."""

    def __init__(self):
        self.requested, self.since, self.before = False, 0.0, {}
        if threading.current_thread() is threading.main_thread():
            for name in ('SIGTERM', 'SIGINT', 'SIGUSR1'):
                if hasattr(signal, name):
                    number = getattr(signal, name)
                    self.before[number] = signal.signal(number, self.receive)

    def receive(self, number, frame):
        if self.requested and number == signal.SIGINT and time.monotonic() - self.since > 2:
            raise KeyboardInterrupt                 # torchrun passes one Ctrl-C on twice: hence the 2 seconds
        self.since = self.since or time.monotonic()
        self.requested = True

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Stopwatch:
    """Mean seconds of the updates since it was last asked."""

    def __init__(self):
        self.seconds, self.steps = 0.0, 0

    def start(self):
        self.began = time.perf_counter()

    def stop(self):
        self.seconds, self.steps = self.seconds + time.perf_counter() - self.began, self.steps + 1

    def per_step(self):
        mean = self.seconds / self.steps
        self.seconds, self.steps = 0.0, 0
        return mean


def duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f'{minutes // 60}:{minutes % 60:02d}:{seconds:02d}' if minutes >= 60 else f'{minutes}:{seconds:02d}'


class Log:
    """log.jsonl in the run's folder, one record a line, and wandb beside it when asked; rank 0 writes.

    After a resume some steps stand there twice: readers keep the last record of a step.
    """

    def __init__(self, cfg, world, say):
        self.folder, self.say, self.is_main, self.wandb = Path(cfg.out_dir), say, world.is_main, None
        if not self.is_main:
            return
        path = self.folder / 'log.jsonl'
        if path.exists():                                           # a torn last line is cut off
            whole = path.read_bytes().rpartition(b'\n')
            os.truncate(path, len(whole[0]) + len(whole[1]))
        self.file = open(path, 'a', encoding='utf-8')
        if cfg.wandb_log:
            self.try_wandb(lambda: self.start_wandb(cfg))

    def start_wandb(self, cfg):
        import wandb
        id_file = self.folder / 'wandb_id.txt'                      # the same run after a resume
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        self.wandb = wandb.init(project=cfg.wandb_project, name=cfg.wandb_run_name or self.folder.name,
                                id=id_file.read_text(), resume='allow', dir=self.folder, config=asdict(cfg))

    def try_wandb(self, action):
        """Whatever wandb may meet, training goes on, and the log is whole without it."""
        try:
            action()
        except Exception as error:
            self.say(f'wandb: {type(error).__name__}: {error}; going on without it')
            self.wandb = None

    def write(self, **record):
        if self.is_main:
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


def closing_words(cfg, step, best, skipped, diverged, stopped):
    if diverged:
        return (f'stopped at step {step}: {cfg.max_skipped} updates in a row were not finite. Common causes: a learning '
                f'rate too high, float16, damaged data. The last checkpoint in {cfg.out_dir} is from before')
    words = f'stopped at step {step}, the same command goes on' if stopped else f'finished {step} updates'
    if skipped:
        words += f', {skipped} of them skipped'
    if best[1] is not None:
        words += f'; best val_loss {best[0]:.4f} at step {best[1]}'
    return f'{words}: {cfg.out_dir}'


if __name__ == '__main__':
    run(main, Config)
