"""
How fast this machine trains, generates, scores and prepares, beside the limit of its hardware.

    python bench.py                                     # a few minutes, also `make bench`
    python bench.py train --model=gpt2-medium --compile=False
    python bench.py train generate --peers=../nanoGPT   # and its model.py and transformers

The limit is operations over the rate of a large matrix product, or bytes over the memory bandwidth,
both measured just before and after each line: speed drifts on shared machines. On a GPU that rate
is the datasheet's.
"""

import contextlib
import importlib.util
import io
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from gpt.settings import run, settings

# -----------------------------------------------------------------------------
parts = ()              # train, generate, evaluate, prepare, as plain arguments; none: all
model = 'gpt2'          # gpt2 to gpt2-xl, weights random: speed does not depend on them
batch_size = 0          # sequences of the training line; 0: 2 on a CPU, 16 elsewhere
block_size = 0          # tokens in each; 0: 512 on a CPU, 1024 elsewhere
optimizer = 'adamw'     # or 'muon'
checkpoint_activations = False      # True: as in train.py, less memory and speed
kernels = 'auto'        # False: without gpt/kernels.py
seconds = 20.0          # at least, for each line, after compiling; medians are shown
peers = ''              # FOLDER with nanoGPT's model.py, which is run: it and transformers race
                        # ours, in turn
device = 'auto'
dtype = 'auto'          # of training; 'float32', 'bfloat16'
compile = 'auto'        # of training; auto: as train.py would for a long run
# -----------------------------------------------------------------------------
Config = settings(globals())

import torch

from data import prepare
from gpt import cpu, scoring, tokenizer
from gpt.data import sources
from gpt.data.shards import read_manifest
from gpt.device import measure_peak, peak_memory, pick_dtype
from gpt.log import machine
from gpt.optim import OptimizerConfig
from gpt.trainer import Trainer, TrainerConfig
from gpt.world import World
from model import GPT, SIZES, GPTConfig

COLLECT = 'parts'       # takes the arguments without a flag
SMALL = GPTConfig(block_size=256, vocab_size=4096, n_layer=6, n_head=6, n_embd=384)     # 12M


class Line(NamedTuple):
    """One measurement."""
    name: str
    rate: float             # of `unit` per second
    limit: float | None     # of the hardware; None if unknown
    unit: str

    def __str__(self):
        share = f'{self.rate / self.limit:.0%}' if self.limit else ''
        return (f'{self.name:50}{number(self.rate):>9} {self.unit:6}'
                f'{number(self.limit):>9} {self.unit:6}{share:>9}')


def main(cfg):
    lines = {'train': train_lines, 'generate': generate_lines, 'evaluate': evaluate_lines,
             'prepare': prepare_lines}
    for part in cfg.parts:
        if part not in lines:
            raise ValueError(f"{part}: expected one of {', '.join(lines)}")
    if cfg.model not in SIZES:
        raise ValueError(f"model: given {cfg.model!r}, expected one of {', '.join(SIZES)}")
    world = World.join(cfg.device)
    if world.device.type == 'cuda':
        torch.set_float32_matmul_precision('high')      # TF32, as the other scripts do
    print(f'{machine(world.device)}; torch {torch.__version__}, Python {platform.python_version()}')
    print(f"{'':50}{'measured':>16}{'limit':>16}{'reached':>9}")
    for part in cfg.parts or lines:
        for line in lines[part](cfg, world):
            print(line, flush=True)


def number(rate):
    if rate is None:
        return ''
    return f'{rate:,.0f}' if rate >= 100 else f'{rate:.1f}'


# Time, operations, bytes.

def clock(step: Callable, device, seconds, least=5, pick=statistics.median, warm=True):
    """Seconds of step(): the median of as many as fit into `seconds`, after one that warms up."""
    if warm:
        step()
    times, ends = [], time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < ends:
        wait_for(device)
        start = time.perf_counter()
        step()
        wait_for(device)
        times.append(time.perf_counter() - start)
    return pick(times)


def wait_for(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elif device.type == 'mps':
        torch.mps.synchronize()


def between(measure: Callable, work: Callable):
    """(work(), the mean of measure() before and after it, None if it is None)."""
    before = measure()
    result = work()
    return result, before and (before + measure()) / 2


def bandwidth(device):
    """Bytes per second at which a tensor that fits no cache is read, the best of several."""
    x = torch.ones(2 ** (26 if device.type == 'cpu' else 29), device=device)
    return 4 * x.numel() / clock(x.sum, device, 0, least=10, pick=min)


# The parts.

def train_lines(cfg, world):
    """Updates of train.py: loss, gradients, their norm, the optimizers."""
    dtype, _ = pick_dtype(cfg.dtype, world.device, for_training=True)
    world = replace(world, dtype=dtype)
    on_cpu = world.device.type == 'cpu'
    block_size = cfg.block_size or (512 if on_cpu else 1024)
    batch_size = cfg.batch_size or (2 if on_cpu else 16)
    yield train_line('a GPT of 12M', SMALL, 8, cfg, world)
    config = replace(SIZES[cfg.model], block_size=block_size)
    yield train_line(cfg.model, config, batch_size, cfg, world)
    if cfg.peers:
        batch = random_batch(config, batch_size, world.device)
        trainer, update = our_update(config, batch, cfg, world)
        race = {'ours': update, **peer_updates(config, batch, cfg, world, trainer.is_compiled)}
        yield from race_lines(f'train {cfg.model}', race, batch_size * block_size, cfg, world)


def random_batch(config, batch_size, device):
    ids = torch.randint(config.vocab_size, (batch_size, config.block_size + 1), device=device)
    return ids[:, :-1], ids[:, 1:]


def our_update(config, batch, cfg, world):
    """(Trainer, a function that makes an update)."""
    with contextlib.redirect_stdout(sys.stderr):        # what it prints is no line of the table
        trainer = Trainer(GPT(config), world, TrainerConfig(
            compile=cfg.compile, checkpoint_activations=cfg.checkpoint_activations,
            kernels=cfg.kernels), OptimizerConfig(optimizer=cfg.optimizer))
        trainer.prepare(batch, math.inf)

    def update():
        loss = trainer.backward(*batch, micro_steps=1, last=True)
        trainer.step(loss, trainer.grad_norm())
    return trainer, update


def train_line(name, config, batch_size, cfg, world):
    batch = random_batch(config, batch_size, world.device)
    on_gpu = world.device.type == 'cuda'
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer, update = our_update(config, batch, cfg, world)
    seconds, peak = between(lambda: measure_peak(world.device, world.dtype),
                            lambda: clock(update, world.device, cfg.seconds))
    memory = f', {peak_memory(world.device) / 1e9:.1f} GB' if on_gpu else ''
    return Line(f'train {name}, {batch_size} x {config.block_size}, {str(world.dtype)[6:]}{memory}',
                batch_size * config.block_size / seconds,
                peak and peak / trainer.model.flops_per_token(), 'tok/s')


def generate_lines(cfg, world):
    """64 tokens (on a GPU 400) after 16, as sample.py generates them: every weight is read for
    each. The first text, in which a GPU captures the step, does not count."""
    new = 400 if world.device.type == 'cuda' else 64
    device, (dtype, _) = world.device, pick_dtype('auto', world.device)
    model = GPT(SIZES[cfg.model]).to(device, dtype).eval()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    ids = torch.randint(model.config.vocab_size, (1, 16), device=device)
    for rows in (1, 8):
        if rows > 1 or dtype == torch.float32:
            cpu.pack(model)
        prompt = ids.repeat(rows, 1)

        def generate():
            model.generate(prompt, new, temperature=0.8, top_k=200, seed=0)
        seconds, rate = between(lambda: bandwidth(device),
                                lambda: clock(generate, device, cfg.seconds, least=3))
        plural = 's' if rows > 1 else ''
        yield Line(f'generate {cfg.model}, {rows} row{plural}, {str(dtype)[6:]}',
                   new * rows / seconds, rate / size * rows, 'tok/s')
    if cfg.peers:
        ours = GPT(SIZES[cfg.model]).to(device, dtype).eval()
        race = {'ours': lambda: ours.generate(ids, new, temperature=0),
                'transformers': transformers_generation(SIZES[cfg.model], ids, new, dtype)}
        yield from race_lines(f'generate {cfg.model}, 1 row', race, new, cfg, world)


# Peers.

def race_lines(name, race, tokens, cfg, world):
    """Lines of functions that do the same in turn, with how much slower than the first they are."""
    times = {who: [] for who in race}
    for step in race.values():
        step()                                          # compiles, or warms up
    ends = time.perf_counter() + cfg.seconds * len(race)
    while len(times['ours']) < 5 or time.perf_counter() < ends:
        for who, step in race.items():
            times[who].append(clock(step, world.device, 0, least=1, warm=False))
    medians = {who: statistics.median(found) for who, found in times.items()}
    for who, seconds in medians.items():
        ratio = '' if who == 'ours' else f': ours {seconds / medians["ours"]:.2f} times as fast'
        yield Line(f'{name} by {who}{ratio}', tokens / seconds, None, 'tok/s')


def peer_updates(config, batch, cfg, world, is_compiled):
    """{name: function} of updates by AdamW, clipped, as nanoGPT's train.py makes them: by its own
    model and optimizer, and by GPT2LMHeadModel with torch's."""
    from transformers import GPT2Config, GPT2LMHeadModel
    spec = importlib.util.spec_from_file_location('nanogpt', Path(cfg.peers) / 'model.py')
    nanogpt = sys.modules['nanogpt'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    shape = {key: getattr(config, key) for key in ('n_layer', 'n_head', 'n_embd')}
    with contextlib.redirect_stdout(sys.stderr):
        first = nanogpt.GPT(nanogpt.GPTConfig(
            **shape, block_size=config.block_size, vocab_size=config.padded_vocab_size,
            dropout=0.0, bias=config.bias)).to(world.device)
        optimizer = first.configure_optimizers(0.1, 6e-4, (0.9, 0.95), world.device.type)
    second = GPT2LMHeadModel(GPT2Config(
        **shape, n_positions=config.block_size, vocab_size=config.vocab_size, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0)).to(world.device)
    fast = torch.compile(first) if is_compiled else first
    x, y = batch
    return {
        'nanoGPT': peer_update(first, optimizer, lambda: fast(x, y)[1], world),
        'transformers': peer_update(
            second, torch.optim.AdamW(second.parameters(), lr=6e-4, fused=True),
            lambda: torch.nn.functional.cross_entropy(second(x).logits.flatten(0, 1), y.flatten()),
            world)}


def peer_update(net, optim, loss_of, world):
    half = world.dtype != torch.float32

    def update():
        with torch.autocast(world.device.type, world.dtype, enabled=half):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optim.step()
        optim.zero_grad(set_to_none=True)
    return update


def transformers_generation(config, ids, new, dtype):
    """Greedy, with the static cache on a GPU, which compiles."""
    from transformers import GPT2Config, GPT2LMHeadModel
    model = GPT2LMHeadModel(GPT2Config(n_layer=config.n_layer, n_head=config.n_head,
                                       n_embd=config.n_embd)).to(ids.device, dtype).eval()
    cache = {'cache_implementation': 'static'} if ids.device.type == 'cuda' else {}
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
                                  min_new_tokens=new, do_sample=False, pad_token_id=0, **cache)


# The other parts.

def evaluate_lines(cfg, world):
    """Questions like HellaSwag's: a context of 70 tokens, four endings of 25, float32."""
    device, model = world.device, cpu.pack(GPT(SIZES[cfg.model]).to(world.device).eval())
    n = 24 if device.type == 'cpu' else 960
    ids = torch.randint(model.config.vocab_size, (n, 170)).tolist()
    items = [(row[:70], [row[70 + 25 * k:95 + 25 * k] for k in range(4)]) for row in ids]
    c, scored, tokens = model.config, n * 100, n * (70 + 4 * 24)        # the last are not read
    flops = 2 * (12 * c.n_layer * c.n_embd ** 2 * tokens + c.padded_vocab_size * c.n_embd * scored)

    def score():
        scoring.ending_loglikelihoods(model, items)
    seconds, peak = between(lambda: measure_peak(device, torch.float32),
                            lambda: clock(score, device, cfg.seconds, least=3))
    yield Line(f'evaluate {cfg.model}, 4 endings, float32', n / seconds,
               peak and n * peak / flops, 'item/s')


def prepare_lines(cfg, world):
    """Python's own library as text, by prepare.py with one process, and by tiktoken alone."""
    texts = list({path.read_text(encoding='utf-8', errors='ignore'): None
                  for path in sources.python_files()})              # each text once
    try:
        encoding = tokenizer.gpt2()
    except ValueError:                                  # neither cached nor downloadable
        encoding = tokenizer.build('bpe:4096', lambda: texts[:200])
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, 'tokenizer.json').write_text(tokenizer.to_json(encoding), encoding='utf-8')
        source = Path(folder, 'library.jsonl')
        source.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
        config = prepare.Config(input=(str(source),), name='bench', data_dir=folder, workers=1,
                                tokenizer=folder)

        def prepare_once():
            start, unseen = time.perf_counter(), io.StringIO()
            with contextlib.redirect_stdout(unseen), contextlib.redirect_stderr(unseen):
                prepare.main(config)
            return time.perf_counter() - start

        def tiktoken_rate():
            start = time.perf_counter()
            tokens = sum(len(encoding.encode_ordinary(text)) for text in texts)
            return tokens / (time.perf_counter() - start)

        seconds, limit = between(tiktoken_rate, prepare_once)
        splits = read_manifest('bench', folder)['splits'].values()
    tokens = sum(split['tokens'] for split in splits)
    yield Line(f'prepare {sum(map(len, texts)) / 1e6:.0f} MB, one process', tokens / seconds,
               limit, 'tok/s')


if __name__ == '__main__':
    run(main, Config, collect=COLLECT)
