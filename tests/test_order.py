"""The order in which sequences come, of one data set and of several, and reading ahead."""

import threading
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT, script
from test_shards import tokens, write

from gpt.data.order import CYCLE, Mixture, Prefetcher, TokenBatches, permuted
from gpt.data.shards import HEADER_BYTES, Tokens


@pytest.mark.parametrize('size', [1, 2, 3, 5, 64, 1000, 4097])
def test_permuted_is_a_permutation_that_depends_on_its_key(size):
    once = permuted(np.arange(size), size, 'a')
    assert (sorted(once) == list(range(size))
            and (once == permuted(np.arange(size), size, 'a')).all())
    assert size < 64 or (once != permuted(np.arange(size), size, 'b')).mean() > 0.9


def test_permuted_mixes_well():
    """Neighbours are as far apart as in a uniform permutation: mean distance size / 3, no
    correlation between positions."""
    size = 10_000
    once = permuted(np.arange(size), size, 'a')
    assert np.abs(np.diff(once)).mean() == pytest.approx(size / 3, rel=0.05)
    assert abs(np.corrcoef(np.arange(size), once)[0, 1]) < 0.05


@pytest.mark.parametrize('world', [1, 2, 3, 4])
def test_an_epoch_is_every_block_once_whatever_the_world_size(tmp_path, world):
    """1003 tokens in blocks of 10: 100 blocks in an epoch, and all ranks together read each
    once."""
    batches = TokenBatches(tokens(tmp_path, 1003), 10, seed=3)
    assert batches.blocks == 100
    for epoch in range(3):
        seen = Counter()
        for update in range(100 // 20):
            position = 100 * epoch + 20 * update
            for rank in range(world):
                share = range(rank * 20 // world, (rank + 1) * 20 // world)
                x, y = batches.read(position + share.start, len(share))
                assert ((x + 1) % 1003 == y).all()      # the tokens count up: y is what comes next
                seen.update(x[:, 0].tolist())
        assert len(seen) == 100 and set(seen.values()) == {1}
        assert len({start % 10 for start in seen}) <= 2         # one grid (shifted where it wraps)


def test_the_order_is_a_function_of_seed_and_position(tmp_path):
    found = tokens(tmp_path, 1003)
    whole = TokenBatches(found, 10, seed=3).read(0, 250)[0]         # across two ends of an epoch
    for start in (0, 93, 199):
        assert (TokenBatches(found, 10, seed=3).read(start, 7)[0] == whole[start:start + 7]).all()
    assert (TokenBatches(found, 10, seed=4).read(0, 100)[0] != whole[:100]).any()
    assert (whole[:100] != whole[100:200]).any()


def test_a_data_set_smaller_than_one_update(tmp_path):
    x, y = TokenBatches(tokens(tmp_path, 25), 10, seed=0).read(0, 16)
    assert x.shape == y.shape == (16, 10)
    with pytest.raises(ValueError, match='has 25 tokens, fewer than one block'):
        TokenBatches(tokens(tmp_path, 25), 26, seed=0)


def test_the_order_never_changes():
    """A run resumed by a newer version of this program reads the same data. The numbers cross two
    ends of an epoch, one of them of 10 ** 11 tokens."""
    small = TokenBatches(range(100_000), 64, 1337)
    assert small.starts(np.arange(4)).tolist() == [26828, 59916, 11916, 36044]
    assert small.starts(np.arange(1558, 1566)).tolist() == [
        72588, 67788, 70988, 60044, 34109, 28221, 6013, 82237]
    large = TokenBatches(range(10 ** 11), 1024, 7)
    assert large.starts(np.arange(4)).tolist() == [
        75962224093, 52824804829, 95627130333, 76932523485]
    assert large.starts(np.arange(large.blocks - 2, large.blocks + 2)).tolist() == [
        42233556445, 48459415005, 9595892301, 97400178253]


def test_a_hundred_billion_tokens_in_a_thousand_shards(tmp_path):
    """Sparse files with true headers: opened and read from everywhere with a few MB."""
    header = np.zeros(256, '<i4')
    header[:3] = 20240520, 1, 10 ** 8
    (tmp_path / 'd').mkdir()
    for i in range(1000):
        with open(tmp_path / f'd/train_{i:06d}.bin', 'wb') as file:
            file.write(header.tobytes())
            file.truncate(HEADER_BYTES + 2 * 10 ** 8)
    tracemalloc.start()
    found = Tokens('d', 'train', 50257, tmp_path)
    batches = TokenBatches(found, 1024, seed=1)
    x, y = batches.read(batches.blocks - 4, 8)                      # over the end of an epoch
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 10 ** 11 and x.shape == y.shape == (8, 1024) and not x.any()
    assert peak < 4_000_000
    starts = batches.starts(np.arange(10_000))
    assert len(set(starts)) == 10_000 and len(set(starts // 10 ** 8)) == 1000


# Documents.

@pytest.mark.parametrize('size, chance, seed', [(10, 0.3, 0), (10, 0.02, 1), (7, 0.1, 2),
                                                (10, 1.0, 3), (10, 0.0, 4), (1, 0.5, 5)])
def test_a_sequence_begins_with_the_first_document_of_its_block(tmp_path, size, chance, seed):
    """Against a search by hand, in two epochs, with the block that crosses the end."""
    rng = np.random.default_rng(seed)
    ids = np.where(rng.random(203) < chance, 9, rng.integers(0, 9, 203))
    write(tmp_path / 'd', ids)
    found = Tokens('d', 'train', 10, tmp_path)
    plain, batches = TokenBatches(found, size, 5), TokenBatches(found, size, 5, eot_id=9)
    around = [*ids, *ids, *ids]
    for epoch in range(2):
        begins = []
        for position in range(epoch * plain.blocks, (epoch + 1) * plain.blocks):
            place = int(plain.starts(np.array([position]))[0])
            begins.append(next((i for i in range(place, place + size) if around[i] == 9), place))
            x, y = batches.read(position, 1)
            assert x[0].tolist() == around[begins[-1]:begins[-1] + size]
            assert y[0].tolist() == around[begins[-1] + 1:begins[-1] + size + 1]
        assert len({start % 203 for start in begins}) == plain.blocks       # all different
    whole = batches.read(3, 11)
    assert (whole[0][4:6] == batches.read(7, 2)[0]).all()


# Mixtures.

def mixed(tmp_path, shares=(700, 250, 50), sizes=(20_000, 3_000, 900), seed=3):
    """Blocks of 10 tokens that count up from 0, 20,000 and 30,000."""
    parts = []
    for i, (first, size) in enumerate(zip((0, 20_000, 30_000), sizes)):
        if not (tmp_path / f'd{i}').exists():
            write(tmp_path / f'd{i}', first + np.arange(size), shard_tokens=5_000)
        found = Tokens(f'd{i}', 'train', 2 ** 16, tmp_path)
        parts.append(TokenBatches(found, 10, seed))
    return Mixture(parts, shares, seed)


def test_a_mixture_keeps_its_shares_in_every_cycle_and_epochs_of_its_own(tmp_path):
    batches = mixed(tmp_path)
    first = batches.read(0, 3 * CYCLE)[0][:, 0].numpy()
    kind = np.searchsorted([20_000, 30_000], first, side='right')
    for cycle in range(3):
        here = kind[cycle * CYCLE:(cycle + 1) * CYCLE]
        assert np.bincount(here).tolist() == [700, 250, 50]
        assert here[:500].tolist() != sorted(here[:500])            # not one after another
    assert (kind[:CYCLE] != kind[CYCLE:2 * CYCLE]).any()
    assert len(set(first[kind == 0][:2000])) == 2000        # its first epoch, no block twice
    for i, (part, share) in enumerate(zip(batches.parts, (700, 250, 50))):      # each one's own
        own = part.read(0, 3 * share)[0][:, 0]
        assert sorted(first[kind == i]) == sorted(own.tolist())


@pytest.mark.parametrize('world', [1, 2, 3, 4])
def test_a_mixture_is_a_function_of_seed_and_position(tmp_path, world):
    batches = mixed(tmp_path)
    whole = batches.read(0, 1200)[0]
    for update in range(0, 1200, 60):
        ranks = [range(rank * 60 // world, (rank + 1) * 60 // world) for rank in range(world)]
        parts = [batches.read(update + share.start, len(share))[0] for share in ranks]
        assert (np.concatenate(parts) == whole[update:update + 60].numpy()).all()
    assert (mixed(tmp_path, seed=4).read(0, 1200)[0] != whole).any()


# Prefetching.

class Counted:
    """Batches that record which thread read each; those at `broken` positions cannot be read."""

    def __init__(self, batches, broken=()):
        self.batches, self.broken, self.calls = batches, broken, []

    def read(self, position, count):
        self.calls.append((position, threading.current_thread() is threading.main_thread()))
        if position in self.broken:
            raise ValueError(f'{position} cannot be read')
        return self.batches.read(position, count)


def test_prefetching_gives_the_same_batches(tmp_path):
    batches = TokenBatches(tokens(tmp_path), 10, seed=3)
    counted = Counted(batches)
    prefetcher = Prefetcher(counted)
    asked = [(0, 4, 4), (4, 4, 8), (8, 4, 50), (50, 2, 52), (52, 2, 8), (8, 2, None), (8, 2, 10)]
    for position, count, then in asked:                             # right and wrong guesses
        x, y = prefetcher.read(position, count, then)
        assert (x == batches.read(position, count)[0]).all()
        assert (y == batches.read(position, count)[1]).all()
    prefetcher.thread.join()
    in_main = [position for position, main in counted.calls if main]
    assert in_main == [0, 50, 8]                                    # 50: of another size, 8: twice


def test_an_error_of_prefetching_is_raised_where_the_batch_is_asked_for(tmp_path):
    prefetcher = Prefetcher(Counted(TokenBatches(tokens(tmp_path), 10, seed=3), broken=(4, 12)))
    prefetcher.read(0, 4, then=4)
    prefetcher.read(8, 4, then=12)                                       # 4 is never asked for
    with pytest.raises(ValueError, match='12 cannot be read'):
        prefetcher.read(12, 4, then=16)
    assert prefetcher.read(16, 4)[0].shape == (4, 10)


def test_prefetching_keeps_no_process_alive():
    code = ('import time\nfrom gpt.data.order import Prefetcher\n'
            'class Slow:\n    def read(self, position, count): time.sleep(1000 * position)\n'
            'Prefetcher(Slow()).read(0, 1, then=1)')
    script('-c', code)


@pytest.mark.slow
def test_reading_needs_no_memory_that_grows_with_the_corpus(tmp_path):
    """40 MB of a (sparse) shard read in a random order: peak memory grows by less than 10 MB."""
    write(tmp_path / 'd', [0] * 8)
    path = tmp_path / 'd/train_000000.bin'
    with open(path, 'r+b') as file:
        file.seek(8)
        file.write(np.array([20_000_000], '<i4').tobytes())
        file.truncate(HEADER_BYTES + 40_000_000)
    code = (f"import resource, sys; sys.path.insert(0, {str(ROOT)!r})\n"
            f"from gpt.data.shards import Tokens; from gpt.data.order import TokenBatches\n"
            f"batches = TokenBatches(Tokens('d', 'train', 9, {str(tmp_path)!r}), 1024, 1)\n"
            f"peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            f"batches.read(0, 16); before = peak()\n"
            f"for i in range(16, batches.blocks, 16): batches.read(i, 16)\n"
            f"print(peak() - before)")
    assert int(script('-c', code).stdout) < 10_000
