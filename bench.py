"""
How fast this machine trains, writes, scores and prepares, beside the least time it could take.

    python bench.py                                     # a few minutes, also `make bench`
    python bench.py train --model=gpt2-medium --compile=False

A floor is operations over the rate of a large matrix product, or bytes over the memory bandwidth,
both measured in the seconds around each line: machines have moods.
"""

import contextlib
import io
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.utils import get_total_norm

from gpt import distributed
from gpt import scoring as likelihood
from gpt import replicas
from gpt import tokenizer
import train
from gpt.settings import run, settings
from gpt.data import sources
from data import prepare
from gpt.data.shards import read_manifest
from gpt.journal import machine
from gpt.cpu import pack
from model import GPT, SIZES, GPTConfig

# -----------------------------------------------------------------------------
parts = ()              # of train, generate, evaluate, prepare, given bare; none: all of them
model = 'gpt2'          # gpt2 to gpt2-xl, weights random: speed does not depend on them
batch_size = 0          # sequences of the training line; 0: 2 on a CPU, 16 elsewhere
block_size = 0          # tokens in each; 0: 512 on a CPU, 1024 elsewhere
optimizer = 'adamw'     # or 'muon'
seconds = 20.0          # spent on each line, at the least, after compiling; medians are shown
device = 'auto'
dtype = 'auto'          # of training; 'float32', 'bfloat16'
compile = 'auto'        # of training; auto: as train.py would for a long run
# -----------------------------------------------------------------------------
Config = settings(globals())

COLLECT = 'parts'       # takes the arguments without a flag
SMALL = GPTConfig(block_size=256, vocab_size=4096, n_layer=6, n_head=6, n_embd=384)     # 12M


def main(cfg):
    lines = {'train': train_lines, 'generate': generate_lines, 'evaluate': evaluate_lines,
             'prepare': prepare_lines}
    for part in cfg.parts:
        if part not in lines:
            raise ValueError(f"{part}: expected one of {', '.join(lines)}")
    if cfg.model not in SIZES:
        raise ValueError(f"model: given {cfg.model!r}, expected one of {', '.join(SIZES)}")
    world = distributed.join(cfg.device)
    print(f'{machine(world.device)}; torch {torch.__version__}, Python {platform.python_version()}')
    print(f"{'':44}{'measured':>16}{'floor':>16}{'reached':>9}")
    for part in cfg.parts or lines:
        for name, rate, floor, unit in lines[part](cfg, world):
            print(f'{name:44}{shown(rate):>9} {unit:6}{shown(floor):>9} {unit:6}'
                  f'{f"{rate / floor:.0%}" if floor else "":>9}', flush=True)


def shown(rate):
    return '' if rate is None else f'{rate:,.0f}' if rate >= 100 else f'{rate:.1f}'


# Time, operations, bytes.

def clock(step, device, seconds, least=5, pick=statistics.median):
    """Seconds of one step, the median of as many as `seconds` allow, after one that is not counted.
    """
    step()
    times, ends = [], time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < ends:
        wait(device)
        began = time.perf_counter()
        step()
        wait(device)
        times.append(time.perf_counter() - began)
    return pick(times)


def wait(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def between(measure, work):
    """(work(), the mean of what measure() says before and after it); None stays None."""
    before = measure()
    result = work()
    return result, before and (before + measure()) / 2


def bandwidth(device):
    """Bytes per second at which a tensor that fits no cache is read, the best of several."""
    x = torch.ones(2 ** 26, device=device)
    return 4 * x.numel() / clock(x.sum, device, 0, least=10, pick=min)


# The parts: (what, what was reached, the floor's figure, their unit) of each line.

def train_lines(cfg, world):
    """Updates of train.py: loss, gradients, their norm, the optimizers."""
    small = world.device.type == 'cpu'
    block_size = cfg.block_size or (512 if small else 1024)
    yield train_line('a GPT of 12M', SMALL, 8, 256, cfg, world)
    yield train_line(cfg.model, SIZES[cfg.model], cfg.batch_size or (2 if small else 16),
                     block_size, cfg, world)


def train_line(name, shape, batch_size, block_size, cfg, world):
    device, say = world.device, partial(print, file=sys.stderr)
    dtype, _ = distributed.pick_dtype(cfg.dtype, device, for_training=True)
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    gpt = GPT(replace(shape, block_size=block_size)).to(device).train()
    settings = train.Config(optimizer=cfg.optimizer, compile=cfg.compile)
    optimizers = train.make_optimizers(gpt, settings, dtype)
    ids = torch.randint(shape.vocab_size, (batch_size, block_size + 1), device=device)
    batch = ids[:, :-1], ids[:, 1:]
    replica = replicas.make_replica(gpt, settings, world, autocast, batch, dtype, math.inf, say)

    def update():
        with autocast():
            loss = replica(*batch)
        loss.backward()
        norm = get_total_norm([p.grad for p in gpt.parameters()])
        train.update(optimizers, loss.detach(), norm, settings.grad_clip)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)

    took, peak = between(lambda: distributed.measure_peak(device, dtype),
                         lambda: clock(update, device, cfg.seconds))
    return (f'train {name}, {batch_size} x {block_size}, {str(dtype)[6:]}',
            batch_size * block_size / took, peak and peak / gpt.flops_per_token(), 'tok/s')


def generate_lines(cfg, world):
    """64 tokens after 16, as sample.py writes them: every weight is read for each."""
    dtype, _ = distributed.pick_dtype('auto', world.device)
    gpt = GPT(SIZES[cfg.model]).to(world.device, dtype).eval()
    size = sum(p.numel() * p.element_size() for p in gpt.parameters())
    ids = torch.randint(gpt.config.vocab_size, (1, 16), device=world.device)
    for rows in (1, 8):
        if rows > 1 or dtype == torch.float32:
            pack(gpt)
        prompt = ids.repeat(rows, 1)
        took, rate = between(
            lambda: bandwidth(world.device),
            lambda: clock(lambda: gpt.generate(prompt, 64, temperature=0.8, top_k=200, seed=0),
                          world.device, cfg.seconds, least=3))
        yield (f'generate {cfg.model}, {rows} row{"s" * (rows > 1)}, {str(dtype)[6:]}',
               64 * rows / took, rate / size * rows, 'tok/s')


def evaluate_lines(cfg, world):
    """Questions like HellaSwag's: a context of 70 tokens, four endings of 25, float32."""
    gpt = pack(GPT(SIZES[cfg.model]).to(world.device).eval())
    ids = torch.randint(gpt.config.vocab_size, (24, 170)).tolist()
    items = [(row[:70], [row[70 + 25 * k:95 + 25 * k] for k in range(4)]) for row in ids]
    c, scored = gpt.config, 24 * 100
    tokens, _ = likelihood.reading(items, c.block_size)
    flops = 2 * (12 * c.n_layer * c.n_embd ** 2 * tokens + c.padded_vocab_size * c.n_embd * scored)
    took, peak = between(
        lambda: distributed.measure_peak(world.device, torch.float32),
        lambda: clock(lambda: likelihood.ending_loglikelihoods(gpt, items, world=world),
                      world.device, cfg.seconds, least=3))
    yield (f'evaluate {cfg.model}, 4 endings, float32', 24 / took, peak and 24 * peak / flops,
           'item/s')


def prepare_lines(cfg, world):
    """Python's own library as text, by prepare.py with one process, and by tiktoken alone."""
    texts = list({path.read_text(encoding='utf-8', errors='ignore'): None
                  for path in sources.python_files()})              # each once
    try:
        encoding = tokenizer.gpt2()
    except ValueError:                  # neither here nor to be had
        encoding = tokenizer.build('bpe:4096', lambda: texts[:200])
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, 'tokenizer.json').write_text(tokenizer.to_json(encoding), encoding='utf-8')
        source = Path(folder, 'library.jsonl')
        source.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
        prepared = prepare.Config(input=(str(source),), name='bench', data_dir=folder, workers=1,
                                  tokenizer=folder)

        def once():
            began, unseen = time.perf_counter(), io.StringIO()
            with contextlib.redirect_stdout(unseen), contextlib.redirect_stderr(unseen):
                prepare.main(prepared)
            return time.perf_counter() - began

        def alone():
            began = time.perf_counter()
            tokens = sum(len(encoding.encode_ordinary(text)) for text in texts)
            return tokens / (time.perf_counter() - began)

        took, floor = between(alone, once)
        splits = read_manifest('bench', folder)['splits'].values()
    tokens = sum(split['tokens'] for split in splits)
    yield f'prepare {sum(map(len, texts)) / 1e6:.0f} MB, one process', tokens / took, floor, 'tok/s'


if __name__ == '__main__':
    run(main, Config, collect=COLLECT)
