"""
What a run trains and validates on: one prepared data set, or a mixture of several.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt import tokenizer
from gpt.data.order import CYCLE, Batch, Mixture, Prefetcher, TokenBatches
from gpt.data.shards import DATA_DIR, Tokens, load_facts


@dataclass
class DataSet:
    """A prepared data set, and the fraction of the training sequences that comes from it."""
    name: str
    fraction: float
    manifest: dict                      # {} if it came without one
    train: Tokens
    val: Tokens


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
        eot = self.encoding.eot if doc_start else None
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
