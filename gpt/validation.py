"""
The loss on the validation splits, and what it means in bits.
"""

import math

import torch

from gpt import distributed
from gpt import replicas


def validate(model, sets, cfg, world, autocast, stop=None):
    """(val_loss, {what else the log says of it}, tokens predicted) over all data sets; None if
    `stop` was requested meanwhile, on any rank.

    The loss of a mixture is that of its mean token: each data set counts by its share, also where
    its validation split is smaller than its share of eval_tokens.
    """
    found = [evaluate(model, data.val, cfg, world, autocast, data.share, stop) for data in sets]
    if None in found:
        return None
    val_loss = sum(loss * data.share for (loss, _), data in zip(found, sets))
    if len(sets) == 1:
        return val_loss, bits_per_byte(*found[0], sets[0].manifest), found[0][1]
    losses = {f'val_loss/{data.name}': loss for (loss, _), data in zip(found, sets)}
    return (val_loss, {**losses, **mixed_bits_per_byte(val_loss, sets)},
            sum(count for _, count in found))


@torch.no_grad()
def evaluate(model, tokens, cfg, world, autocast, share=1.0, stop=None):
    """(mean cross-entropy, tokens predicted) over the first eval_tokens * share of a split; None if
    it was stopped.

    Consecutive blocks, the last one shorter; every rank takes its share, and the sum is the same
    for any number of them, up to rounding. A sharded model is asked equally often on every rank.
    """
    wanted = cfg.eval_iters * cfg.batch_size * cfg.block_size or cfg.eval_tokens
    wanted = max(1, round(wanted * share))
    count, size = min(wanted, len(tokens) - 1), cfg.block_size
    rows = count // size
    spans = [(row * size, min(cfg.batch_size, rows - row), size)
             for row in range(0, rows, cfg.batch_size)]
    if count > rows * size:
        spans.append((rows * size, 1, count - rows * size))
    mine, sharded = spans[world.rank::world.size], replicas.is_sharded(model)
    if sharded and len(mine) < -(-len(spans) // world.size):
        mine.append((0, 0, min(size, count)))           # takes part and does not count
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)          # nats, and whether to stop
    for start, n, length in mine:
        sums[1] = bool(stop and stop.requested)
        if sharded:                                     # nobody may leave alone
            sums[1] = distributed.any_rank(sums[1], world.device)
        if sums[1]:
            break
        ids = torch.from_numpy(tokens.read(start, max(n, 1) * length + 1)).to(world.device)
        with autocast():
            loss = model(ids[:-1].view(-1, length), ids[1:].view(-1, length))
        sums[0] += loss.item() * n * length
    model.train()
    sums = distributed.all_reduce(sums.to(world.device) if world.device.type == 'cuda' else sums)
    return None if sums[1] else (sums[0].item() / count, count)


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
