"""
The order in which training reads prepared text: a pure function of (seed, position).

Position counts sequences. Who reads them, and how many at once, changes nothing; nothing needs to
be saved but the position, and an epoch of any length costs no memory.
"""

import hashlib
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gpt.data.shards import Tokens

CYCLE = 1000                # sequences in which a mixture holds the exact fraction of each data set


class Batch(NamedTuple):
    """The sequences of an update and how they are divided."""
    sequences: int          # in the update
    micro_batch: int        # in a micro-batch
    micro_steps: int        # micro-batches of each process


class TokenBatches:
    """Training sequences as a pure function of (seed, position), position counting sequences.

    An epoch is every block of block_size tokens once, in a seeded order. Each epoch shifts the grid
    of blocks by a seeded offset; the block that crosses the end continues at the beginning. The
    caller divides an update over ranks and micro-batches: the sequences at positions p .. p + n - 1
    are the same whoever reads them.

    With eot_id, the token before each document, a sequence begins at the first document within its
    block, or at the start of the block if none begins there. The cost: tokens between the start of
    the block and that document are skipped, unless the previous sequence reaches over them; and
    tokens that it reaches over are seen twice if the next sequence begins before its end. The next
    epoch, on a shifted grid, skips others; docs/benchmarks.md says how many.
    """

    def __init__(self, tokens: Tokens, block_size: int, seed: int, eot_id: int | None = None):
        self.tokens, self.block_size, self.seed, self.eot_id = tokens, block_size, seed, eot_id
        self.blocks = len(tokens) // block_size                     # in one epoch
        if self.blocks < 1:
            raise ValueError(f'{tokens.paths[0].parent}: the train split has {len(tokens):,} '
                             f'tokens, fewer than one block: given block_size={block_size}, '
                             f'expected at most {len(tokens):,}')

    def starts(self, positions: np.ndarray) -> np.ndarray:
        """Where in the tokens the block of each position begins."""
        starts = np.empty(len(positions), np.int64)
        for epoch in np.unique(positions // self.blocks):
            key = f'{self.seed}:{epoch}'
            here = positions // self.blocks == epoch
            block = permuted(positions[here] % self.blocks, self.blocks, key)
            starts[here] = block * self.block_size + int(draw(key, 1)[0]) % self.block_size
        return starts

    def sequences(self, positions: np.ndarray) -> np.ndarray:
        """The sequences at positions (n,): (n, block_size + 1) tokens."""
        size = self.block_size
        if self.eot_id is None:
            return np.stack([self.tokens.read(int(start), size + 1)
                             for start in self.starts(positions)])
        twice = np.stack([self.tokens.read(int(start), 2 * size)
                          for start in self.starts(positions)])
        first = (twice[:, :size] == self.eot_id).argmax(axis=1)     # 0 where there is none
        return np.take_along_axis(twice, first[:, None] + np.arange(size + 1), axis=1)

    def read(self, position: int, count: int) -> tuple:
        """Inputs and targets (count, block_size), int64 tensors: targets are the next tokens."""
        import torch                    # here: preparing text imports this module, but no torch
        rows = torch.from_numpy(self.sequences(np.arange(position, position + count)))
        return rows[:, :-1], rows[:, 1:]


class Mixture(TokenBatches):
    """Sequences of several TokenBatches, again a pure function of (seed, position).

    Of every CYCLE positions each part has exactly its count, in an order that depends on the seed
    and the cycle; each part goes through epochs of its own, without replacement.
    """

    def __init__(self, parts: Sequence[TokenBatches], counts: Sequence[int], seed: int):
        self.parts, self.ends, self.seed = parts, np.cumsum(counts), seed

    def sequences(self, positions: np.ndarray) -> np.ndarray:
        """The sequences at positions (n,): (n, block_size + 1) tokens, each of the part it falls
        to."""
        cycles, slots = positions // CYCLE, np.empty(len(positions), np.int64)
        for cycle in np.unique(cycles):
            here = cycles == cycle
            slots[here] = permuted(positions[here] % CYCLE, CYCLE, f'{self.seed}:mixture:{cycle}')
        rows = np.empty((len(positions), self.parts[0].block_size + 1), np.int64)
        for part, start, end in zip(self.parts, [0, *self.ends], self.ends):
            here = (start <= slots) & (slots < end)
            if here.any():
                rows[here] = part.sequences(cycles[here] * (end - start) + slots[here] - start)
        return rows


class Prefetcher:
    """Reads batches, and in a thread the one expected next, while others compute.

    A wrong guess costs only time. Prefetching never fails: what it could not read is read again
    when it is asked for, and the error is raised there.
    """

    def __init__(self, batches: TokenBatches, pin_memory: bool = False):
        self.batches, self.pin_memory = batches, pin_memory     # pinned: a GPU copies it faster
        self.thread, self.expected, self.ready = None, None, []

    def read(self, position: int, count: int, then: int | None = None) -> tuple:
        """batches.read(position, count); starts to read as many at position `then`."""
        if self.expected == (position, count):
            self.thread.join()
        else:
            self.ready = []
        found = self.ready.pop() if self.ready else self.fetch(position, count)
        if then is not None:
            self.expected, self.ready = (then, count), []
            self.thread = threading.Thread(target=self.fill, daemon=True,
                                           args=(self.ready, *self.expected))
            self.thread.start()         # a daemon, so that it never keeps the process alive
        return found

    def fill(self, ready: list, position: int, count: int) -> None:
        try:
            ready.append(self.fetch(position, count))
        except Exception:
            pass                        # read() meets it again, if the batch is asked for

    def fetch(self, position: int, count: int) -> tuple:
        parts = self.batches.read(position, count)
        return tuple(part.contiguous().pin_memory() for part in parts) if self.pin_memory else parts


def draw(key: str, count: int) -> np.ndarray:
    """`count` 64-bit numbers that depend on the text `key` alone."""
    return np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8 * count).digest(), '<u8')


def permuted(index: np.ndarray, size: int, key: str) -> np.ndarray:
    """Where a permutation of range(size), chosen by `key`, puts each of index (all < size).

    A Feistel network (Luby & Rackoff 1988) permutes the numbers of an even number of bits; results
    of `size` or more are permuted again until they are inside (cycle-walking, Black & Rogaway
    2002). It takes no memory, whatever the size.
    """
    half = max(1, (int(size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    half, out = np.uint64(half), np.asarray(index).astype(np.uint64)
    outside = np.ones(len(out), bool)
    while outside.any():
        left, right = out[outside] >> half, out[outside] & mask
        for number in draw(key, 8)[1:]:
            mixed = (right + number) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        out[outside] = left << half | right
        outside = out >= np.uint64(size)
    return out.astype(np.int64)
