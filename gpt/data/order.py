"""
The order in which training reads prepared text: a pure function of (seed, position).

Position counts sequences. Who reads them, and how many at once, changes nothing; nothing needs to
be saved but the position, and an epoch of any length costs no memory.
"""

import hashlib
import math
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt import tokenizer
from gpt.data.shards import DATA_DIR, Tokens, read_manifest

CYCLE = 1000                # sequences in which a mixture of data sets keeps its shares exactly


@dataclass
class DataSet:
    """A prepared data set, and the share of the training sequences that is drawn from it."""
    name: str
    share: float
    manifest: dict                      # {} where it came without one
    train: Tokens
    val: Tokens


def load_data(text, data_dir=''):
    """([DataSet], their encoding) for the name of a data set, or of several with weights."""
    alone = (Path(data_dir or DATA_DIR) / text).is_dir()            # a comma may be in a name
    shares = {text: CYCLE} if alone else mixture(text)
    facts = {name: load_facts(name, data_dir) for name in shares}
    (first, (_, encoding)), *others = facts.items()
    for name, (_, other) in others:
        if tokenizer.fingerprint(other) != tokenizer.fingerprint(encoding):
            kinds = [manifest['tokenizer']['name'] if manifest else 'gpt2'
                     for manifest, _ in (facts[first], facts[name])]
            same = 'gpt2' if kinds[0] == 'gpt2' else Path(data_dir or 'data') / first
            raise ValueError(f'the data sets {first} and {name} hold tokens of different '
                             f'tokenizers, {kinds[0]} ({encoding.n_vocab:,}) and {kinds[1]} '
                             f'({other.n_vocab:,}); prepare the second anew, with '
                             f'--tokenizer={same}')
    return [DataSet(name, share / CYCLE, facts[name][0],
                    *(Tokens(name, split, encoding.n_vocab, data_dir)
                      for split in ('train', 'val'))) for name, share in shares.items()], encoding


def load_facts(name, data_dir):
    """(manifest, encoding) of a data set; without a manifest it is taken to hold GPT-2's."""
    manifest, folder = read_manifest(name, data_dir), Path(data_dir or DATA_DIR) / name
    if not manifest and not (folder / 'tokenizer.json').exists():
        Tokens(name, 'train', 2 ** 16, data_dir)                    # refuses one that is not there
        return {}, tokenizer.gpt2()
    for file in ('manifest.json', 'tokenizer.json'):
        if not (folder / file).exists():
            raise ValueError(f'{folder}: its {file} is missing; prepare the data set again')
    encoding = tokenizer.load(folder / 'tokenizer.json')
    if tokenizer.fingerprint(encoding) != manifest['tokenizer']['fingerprint']:
        raise ValueError(f'data set {name}: its tokenizer.json is not the one that made it; '
                         f'prepare it again')
    return manifest, encoding


def make_batches(sets, encoding, block_size, seed, doc_start=False):
    """The training sequences of all data sets; those of one alone come in that one's own order."""
    eot = tokenizer.eot_id(encoding) if doc_start else None
    if doc_start and eot is None:
        raise ValueError(f'doc_start: given True, expected False: the tokens of {sets[0].name} '
                         f'({encoding.name}) have no {tokenizer.EOT} that says where a document '
                         f'begins; prepare it with another --tokenizer, such as bpe:4096')
    batches = [TokenBatches(data.train, block_size, seed, eot) for data in sets]
    return batches[0] if len(sets) == 1 else Mixture(
        batches, [round(data.share * CYCLE) for data in sets], seed)


def describe_epochs(sets, block_size, sequences):
    """How many updates of so many sequences go once through the text of each data set."""
    updates = [len(data.train) // block_size / sequences / data.share for data in sets]
    if len(sets) == 1:
        return f'an epoch: {updates[0]:.1f} updates'
    return 'updates in an epoch: ' + ', '.join(
        f'{data.name} {number:.1f}' for data, number in zip(sets, updates))


def mixture(text):
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
    shares = [int(share) for share in exact]
    rests = sorted(range(len(parts)), key=lambda i: shares[i] - exact[i])   # the largest first
    for i in rests[:CYCLE - sum(shares)]:
        shares[i] += 1
    if not all(shares):
        raise ValueError(f'dataset: given {text!r}, expected weights of at least one sequence in '
                         f'{CYCLE:,}: that of {names[shares.index(0)]} is too small')
    return dict(zip(names, shares))


# Sequences.

class TokenBatches:
    """Training sequences as a pure function of (seed, position), position counting sequences.

    An epoch is every block of block_size tokens once, in a seeded order; the grid of the blocks is
    shifted by a seeded offset each epoch, and the block that would cross the end goes on at the
    beginning. Who asks decides the division of an update over ranks and micro-batches: the
    sequences at positions p .. p + n - 1 are the same whoever reads them.

    With eot_id, the token before each document, a sequence begins at the first one within its
    block, or at the block's own place when no document begins there. What this costs: the tokens
    between the block's place and that document are skipped, unless the sequence of the block
    before reaches over them; and that reach is seen twice where the next sequence begins earlier.
    The next epoch, on a shifted grid, skips others; docs/benchmarks.md says how many.
    """

    def __init__(self, tokens, block_size, seed, eot_id=None):
        self.tokens, self.block_size, self.seed, self.eot_id = tokens, block_size, seed, eot_id
        self.blocks = len(tokens) // block_size                     # in one epoch
        if self.blocks < 1:
            raise ValueError(f'{tokens.paths[0].parent}: the train split has {len(tokens):,} '
                             f'tokens, fewer than one block: given block_size={block_size}, '
                             f'expected at most {len(tokens):,}')

    def starts(self, places):
        """Where in the tokens the block of each of the positions `places` (int array) begins."""
        starts = np.empty(len(places), np.int64)
        for epoch in np.unique(places // self.blocks):
            key = f'{self.seed}:{epoch}'
            here = places // self.blocks == epoch
            block = permuted(places[here] % self.blocks, self.blocks, key)
            starts[here] = block * self.block_size + int(draw(key, 1)[0]) % self.block_size
        return starts

    def sequences(self, places):
        """The sequences at `places`, block_size + 1 tokens each (len(places), block_size + 1)."""
        size = self.block_size
        if self.eot_id is None:
            return np.stack([self.tokens.read(int(start), size + 1)
                             for start in self.starts(places)])
        twice = np.stack([self.tokens.read(int(start), 2 * size) for start in self.starts(places)])
        first = (twice[:, :size] == self.eot_id).argmax(axis=1)     # 0 where there is none
        return np.take_along_axis(twice, first[:, None] + np.arange(size + 1), axis=1)

    def read(self, position, count):
        """Inputs and targets (count, block_size), int64: targets are the tokens that come next."""
        import torch                    # here, because preparing text needs none, and starts faster
        rows = torch.from_numpy(self.sequences(np.arange(position, position + count)))
        return rows[:, :-1], rows[:, 1:]


class Mixture(TokenBatches):
    """Sequences of several TokenBatches, again a pure function of (seed, position).

    Of every CYCLE positions each part has exactly its share (CYCLE in all), in an order of the
    seed and the cycle; each part goes through its own epochs, without replacement.
    """

    def __init__(self, parts, shares, seed):
        self.parts, self.ends, self.seed = parts, np.cumsum(shares), seed

    def sequences(self, places):
        """The sequences at `places` (len(places), block_size + 1), each of the part it falls to."""
        cycles, slots = places // CYCLE, np.empty(len(places), np.int64)
        for cycle in np.unique(cycles):
            here = cycles == cycle
            slots[here] = permuted(places[here] % CYCLE, CYCLE, f'{self.seed}:mixture:{cycle}')
        rows = np.empty((len(places), self.parts[0].block_size + 1), np.int64)
        for part, start, end in zip(self.parts, [0, *self.ends], self.ends):
            if (here := (start <= slots) & (slots < end)).any():
                rows[here] = part.sequences(cycles[here] * (end - start) + slots[here] - start)
        return rows


class Ahead:
    """Reads batches, and in a thread the one that will be asked for next, while others compute.

    A wrong guess costs only time. Reading ahead never fails: what it could not read is read again
    when it is asked for, and the error is raised there.
    """

    def __init__(self, batches, pin=False):
        self.batches, self.pin = batches, pin           # pin: into memory that a GPU copies from
        self.thread, self.place, self.box = None, None, []

    def read(self, position, count, then=None):
        """What batches.read gives; the batch of equal size at position `then` is begun."""
        if self.place == (position, count):
            self.thread.join()
        else:
            self.box = []
        found = self.box.pop() if self.box else self.fetch(position, count)
        if then is not None:
            self.place, self.box = (then, count), []
            self.thread = threading.Thread(target=self.fill, daemon=True,
                                           args=(self.box, *self.place))
            self.thread.start()         # a daemon: it never keeps a process that ends
        return found

    def fill(self, box, position, count):
        try:
            box.append(self.fetch(position, count))
        except Exception:
            pass                        # read() meets it again, if the batch is asked for

    def fetch(self, position, count):
        parts = self.batches.read(position, count)
        return tuple(part.contiguous().pin_memory() for part in parts) if self.pin else parts


def draw(key, count):
    """`count` 64-bit numbers that depend on the text `key` alone."""
    return np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8 * count).digest(), '<u8')


def permuted(index, size, key):
    """Where each of index (int array, all < size) goes in a permutation of range(size)
    chosen by `key`.

    A Feistel network (Luby & Rackoff 1988) permutes the numbers of an even number of bits; who
    lands beyond size walks on until inside (Black & Rogaway 2002). It needs no memory, whatever
    the size.
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
