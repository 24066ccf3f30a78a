"""
The order in which training reads prepared text: a pure function of (seed, position).

Position counts sequences. Who reads them, and how many at once, changes nothing; nothing needs to
be saved but the position, and an epoch of any length costs no memory.
"""

import hashlib
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt import tokenizer
from gpt.data.shards import DATA_DIR, Tokens, load_facts

CYCLE = 1000                # sequences in which a mixture holds the exact fraction of each data set


@dataclass
class DataSet:
    """A prepared data set, and the fraction of the training sequences that comes from it."""
    name: str
    fraction: float
    manifest: dict                      # {} if it came without one
    train: Tokens
    val: Tokens


class Batch(NamedTuple):
    """The sequences of an update and how they are divided."""
    sequences: int          # in the update
    micro_batch: int        # in a micro-batch
    micro_steps: int        # micro-batches of each process


class Data:
    """What a run trains and validates on: the data sets, their tokenizer, and the training
    sequences in order, read ahead."""

    def __init__(self, text: str, data_dir: str | Path = '', val_datasets: str = ''):
        """text: the name of a data set, or of several with weights (see mixture()). val_datasets:
        names of others, which are only validated on."""
        self.sets, self.encoding = load_sets(text, data_dir)
        names = val_datasets.split(',') if val_datasets else []
        if ':' in val_datasets or len(set(names)) < len(names):
            raise ValueError(f'val_datasets: given {val_datasets!r}, expected names of data sets, '
                             f'each once, without weights')
        self.val_sets, encoding = load_sets(val_datasets, data_dir) if val_datasets else ([], None)
        for part in self.val_sets:
            if part.name in [own.name for own in self.sets]:
                raise ValueError(f'val_datasets: {part.name} is trained on, and validated anyway')
        if encoding and tokenizer.fingerprint(encoding) != tokenizer.fingerprint(self.encoding):
            raise ValueError(f'val_datasets: {val_datasets} holds tokens of {encoding.name}, '
                             f'{text} those of {self.encoding.name}; prepare it again with '
                             f'--tokenizer={Path(data_dir or "data") / self.sets[0].name}')

    def doubtful(self, block_size: int) -> list[str]:
        """Notes on validation splits that say little."""
        sizes = [(part.name, len(part.train), len(part.val)) for part in self.sets]
        return [f'note: {name} has {n_train:,} tokens to train on and {n_val:,} to validate on: '
                f'prepare more text, or with another --val_fraction'
                for name, n_train, n_val in sizes if n_val < block_size or n_val > n_train]

    @property
    def shards(self) -> list[str]:
        """The sha256 of every shard."""
        splits = [split for part in self.sets for split in part.manifest.get('splits', {}).values()]
        return [shard['sha256'] for split in splits for shard in split['shards']]

    def set_order(self, block_size: int, seed: int, doc_start: bool = False,
                  pin_memory: bool = False) -> None:
        """Fix the order of the training sequences; those of one data set come in its own order."""
        first = self.sets[0]
        eot = tokenizer.eot_id(self.encoding) if doc_start else None
        if doc_start and eot is None:
            raise ValueError(f'doc_start: given True, expected False: the tokens of {first.name} '
                             f'({self.encoding.name}) have no {tokenizer.EOT} that marks where a '
                             f'document begins; prepare it with another --tokenizer, such as '
                             f'bpe:4096')
        orders = [TokenBatches(part.train, block_size, seed, eot) for part in self.sets]
        counts = [round(part.fraction * CYCLE) for part in self.sets]
        self.order = orders[0] if len(orders) == 1 else Mixture(orders, counts, seed)
        self.prefetcher = Prefetcher(self.order, pin_memory)

    def micro_batches(self, position: int, batch: Batch, rank: int) -> Iterator[tuple]:
        """(index within the update, inputs, targets) of each micro-batch of this rank, for the
        update that begins at `position`."""
        for i in range(batch.micro_steps):
            index = rank * batch.micro_steps + i
            start = position + index * batch.micro_batch
            ahead = batch.micro_batch                               # to this rank's next one
            if i == batch.micro_steps - 1:                          # in the next update
                ahead = batch.sequences - i * batch.micro_batch
            yield index, *self.prefetcher.read(start, batch.micro_batch, then=start + ahead)

    def describe_epochs(self, block_size: int, sequences: int) -> str:
        """How many updates of `sequences` read each data set once."""
        updates = [len(part.train) // block_size / sequences / part.fraction for part in self.sets]
        if len(updates) == 1:
            return f'an epoch: {updates[0]:.1f} updates'
        return 'updates in an epoch: ' + ', '.join(
            f'{part.name} {number:.1f}' for part, number in zip(self.sets, updates))


def load_sets(text: str, data_dir: str | Path = '') -> tuple[list[DataSet], tokenizer.Encoding]:
    """(data sets, their tokenizer) for the name of a data set, or of several with weights."""
    is_name = (Path(data_dir or DATA_DIR) / text).is_dir()          # which may hold a comma
    counts = {text: CYCLE} if is_name else mixture(text)
    loaded = {name: load_facts(name, data_dir) for name in counts}
    (first, (_, encoding)), *others = loaded.items()
    for name, (_, other) in others:
        if tokenizer.fingerprint(other) != tokenizer.fingerprint(encoding):
            same = 'gpt2' if encoding.name == 'gpt2' else Path(data_dir or 'data') / first
            raise ValueError(f'the data sets {first} and {name} have different tokenizers, '
                             f'{encoding.name} ({encoding.n_vocab:,}) and {other.name} '
                             f'({other.n_vocab:,}); prepare {name} again with --tokenizer={same}')
    sets = [DataSet(name, count / CYCLE, loaded[name][0],
                    *(Tokens(name, split, encoding.n_vocab, data_dir)
                      for split in ('train', 'val'))) for name, count in counts.items()]
    for part in sets:
        if len(part.val) < 2:
            raise ValueError(f'{part.val.paths[0].parent}: the val split has one token, expected '
                             f'at least 2, since the first is not predicted; prepare it again '
                             f'with more text or a larger --val_fraction')
    return sets, encoding


def check_tokenizer(name: str, encoding: tokenizer.Encoding, folder: Path,
                    own: tokenizer.Encoding) -> None:
    """Refuse a data set whose tokens, of `encoding`, are not those of the model in `folder`."""
    if tokenizer.fingerprint(own) != tokenizer.fingerprint(encoding):
        raise ValueError(f'{folder} was trained on tokens of {own.name} ({own.n_vocab:,}), '
                         f'the data set {name} holds those of another tokenizer, '
                         f'{encoding.name} ({encoding.n_vocab:,}); prepare it with '
                         f'--tokenizer={folder}')


def mixture(text: str) -> dict[str, int]:
    """{name: sequences of every CYCLE} for 'books:0.7,openwebtext:0.3'; no weights: equal ones."""
    parts = [[word.strip() for word in part.partition(':')] for part in text.split(',')]
    names = [name for name, _, _ in parts]
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f'dataset: given {text!r}, expected names of data sets, each once, such '
                         f'as books or books:0.7,openwebtext:0.3')
    try:
        weights = [float(weight) if colon else 1.0 for _, colon, weight in parts]
    except ValueError:
        weights = [math.nan]
    if len({colon for _, colon, _ in parts}) > 1 or not all(0 < w < math.inf for w in weights):
        raise ValueError(f'dataset: given {text!r}, expected a weight above 0 for every data set '
                         f'or for none, such as books:0.7,openwebtext:0.3')
    exact = [CYCLE * weight / sum(weights) for weight in weights]
    counts = [int(number) for number in exact]
    largest_rest_first = sorted(range(len(parts)), key=lambda i: counts[i] - exact[i])
    for i in largest_rest_first[:CYCLE - sum(counts)]:
        counts[i] += 1
    if not all(counts):
        raise ValueError(f'dataset: given {text!r}, expected weights of at least one sequence in '
                         f'{CYCLE:,}: that of {names[counts.index(0)]} is too small')
    return dict(zip(names, counts))


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
