"""
The loss on the validation splits, and what it is in bits per byte.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from gpt.data.sets import DataSet
from gpt.data.shards import Tokens
from gpt.sharding import is_sharded
from gpt.world import World

SECONDS_TO_A_LINE = 30      # of a validation, that says how far it is


@dataclass(frozen=True)
class ValidationConfig:
    """Settings of train.py, by the same names."""
    batch_size: int
    block_size: int
    eval_tokens: int
    eval_iters: int = 0
    eval_train: bool = False

    @property
    def tokens(self) -> int:
        return self.eval_iters * self.batch_size * self.block_size or self.eval_tokens


class Validation(NamedTuple):
    loss: float             # nats per token
    others: dict            # what else the log says of it
    tokens: int             # predicted

    def __str__(self) -> str:
        text = f'val_loss {self.loss:.4f}'
        parts = [f"{key.partition('/')[2]} {loss:.4f}"
                 for key, loss in self.others.items() if '/' in key]
        if parts:
            text += f" ({', '.join(parts)})"
        if 'train_loss' in self.others:
            text += f", train_loss {self.others['train_loss']:.4f}"
        if 'val_bits_per_byte' in self.others:
            text += f", {self.others['val_bits_per_byte']:.3f} bits per byte"
        if 'xz_bits_per_byte' in self.others:
            text += f" (xz -9e: {self.others['xz_bits_per_byte']:.3f})"
        return text


def validate(model, sets: Sequence[DataSet], config: ValidationConfig, world: World,
             stopped: Callable[[], bool] = lambda: False,
             val_sets: Sequence[DataSet] = ()) -> Validation | None:
    """The loss over all data sets; None if stopped() was true meanwhile, on any rank.

    The loss of a mixture is that of its mean token: each data set counts by its fraction, even if
    its validation split is smaller than its fraction of eval_tokens. val_sets are not part of it.
    With config.eval_train also the loss on the training split, as nanoGPT prints it.
    """
    wanted = [(part.val, part.fraction) for part in sets] + [(part.val, 1.0) for part in val_sets]
    wanted += [(part.train, part.fraction) for part in sets if config.eval_train]
    results = []
    for tokens, fraction in wanted:
        results.append(evaluate(model, tokens, config, world, fraction, stopped))
        if results[-1] is None:
            return None
    losses, counts = zip(*results)
    n, loss = len(sets), mean_loss(losses, sets)
    others = bits_per_byte(loss, counts[0], sets[0].manifest) if n == 1 else {
        **{f'val_loss/{part.name}': own for part, own in zip(sets, losses)},
        **mixed_bits_per_byte(loss, sets)}
    others |= {f'val_loss/{part.name}': own for part, own in zip(val_sets, losses[n:])}
    if config.eval_train:
        others['train_loss'] = mean_loss(losses[-n:], sets)
    return Validation(loss, others, sum(counts[:n]))


def mean_loss(losses: Sequence[float], sets: Sequence[DataSet]) -> float:
    return sum(loss * part.fraction for loss, part in zip(losses, sets))


@torch.no_grad()
def evaluate(model, tokens: Tokens, config: ValidationConfig, world: World, fraction: float = 1.0,
             stopped: Callable[[], bool] = lambda: False) -> tuple[float, int] | None:
    """(mean cross-entropy, tokens predicted) over the first config.tokens * fraction of a split;
    None if it was stopped. The model is in eval mode.

    Consecutive blocks, the last one shorter, are dealt to the ranks; the sum does not depend on
    their number, up to rounding. A sharded model runs equally often on every rank.
    """
    wanted = max(1, round(config.tokens * fraction))
    count, size = min(wanted, len(tokens) - 1), config.block_size
    rows = count // size
    spans = [(row * size, min(config.batch_size, rows - row), size)     # (start, blocks, tokens)
             for row in range(0, rows, config.batch_size)]
    if count > rows * size:
        spans.append((rows * size, 1, count - rows * size))
    mine, sharded = spans[world.rank::world.size], is_sharded(model)
    if sharded and len(mine) < -(-len(spans) // world.size):
        mine.append((0, 0, min(size, count)))           # takes part and does not count
    on_gpu = world.device.type == 'cuda'
    nats = torch.zeros((), dtype=torch.float64, device=world.device if on_gpu else 'cpu')
    stop = False
    begun = said = time.monotonic()
    for number, (start, n, length) in enumerate(mine):
        if number and time.monotonic() - said > SECONDS_TO_A_LINE:
            said = time.monotonic()
            left = (said - begun) * (len(mine) / number - 1)
            world.print(f'validating: {number / len(mine):.0%}, {left:.0f} s left')
        stop = stopped()
        if sharded:         # all ranks stop together; to ask them is to wait for the GPU
            stop = number % (16 if on_gpu else 1) == 0 and world.any(stop)
        if stop:
            break
        ids = torch.from_numpy(tokens.read(start, max(n, 1) * length + 1))
        ids = (ids.pin_memory() if on_gpu else ids).to(world.device, non_blocking=on_gpu)
        with world.autocast():
            loss = model(ids[:-1].view(-1, length), ids[1:].view(-1, length))
        nats += loss.to(nats.device).double() * n * length      # a GPU is not waited for
    nats, stops = world.reduce(torch.stack([nats, torch.full_like(nats, stop)])).tolist()
    return None if stops else (nats / count, count)


def bits_per_byte(loss: float, count: int, manifest: dict) -> dict[str, float]:
    """{'val_bits_per_byte': …, 'xz_bits_per_byte': what `xz -9e` makes of the same text}, if the
    bytes of the validation text are known. Unlike the loss it compares between tokenizers.

    If only `count` tokens of the split were validated, their bytes are estimated, and xz is left
    out.
    """
    if not manifest:
        return {}
    split = manifest['splits']['val']
    bits = {'val_bits_per_byte': loss / math.log(2) * split['tokens'] / split['bytes']}
    if 'xz_bytes' in split and count == split['tokens'] - 1:
        bits['xz_bits_per_byte'] = 8 * split['xz_bytes'] / split['bytes']
    return bits


def mixed_bits_per_byte(loss: float, sets: Sequence[DataSet]) -> dict[str, float]:
    """{'val_bits_per_byte': …} of a mixture: the bits of its mean token over the bytes of its mean
    token; {} if the bytes of one data set are not known. No single file holds it: no xz."""
    if not all(part.manifest for part in sets):
        return {}
    splits = [part.manifest['splits']['val'] for part in sets]
    mean_bytes = sum(part.fraction * split['bytes'] / split['tokens']
                     for part, split in zip(sets, splits))
    return {'val_bits_per_byte': loss / math.log(2) / mean_bytes}
