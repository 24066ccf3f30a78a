"""The shard format, its refusals, and the order in which sequences come."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT, script

from data.shards import HEADER_BYTES, ShardWriter, TokenBatches, Tokens, permuted, verify


def write(folder, ids, shard_tokens=100, split='train'):
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, split, shard_tokens)
    for part in np.array_split(np.asarray(ids, np.uint16), 7):      # pieces cross the shards' ends
        writer.write(part)
    writer.close()
    return writer.shards


def tokens(tmp_path, n=1000, vocab_size=2 ** 16, **options):
    write(tmp_path / 'd', np.arange(n), **options)
    return Tokens('d', 'train', vocab_size, tmp_path)


def test_the_format_is_that_of_llm_c(tmp_path):
    """256 int32, the first three magic, version, count;
    then uint16 (llm.c, dev/data/data_common.py)."""
    shards = write(tmp_path / 'd', [5, 6, 50256])
    raw = (tmp_path / 'd/train_000000.bin').read_bytes()
    assert len(raw) == 1024 + 6 and np.frombuffer(raw, '<i4', 4).tolist() == [20240520, 1, 3, 0]
    assert (np.frombuffer(raw, '<u2', offset=1024).tolist() == [5, 6, 50256]
            and shards[0]['tokens'] == 3)


def test_reading_crosses_shards_and_goes_on_at_the_beginning(tmp_path):
    found = tokens(tmp_path)
    assert len(found.paths) == 10 and len(found) == 1000
    assert found.read(95, 10).tolist() == list(range(95, 105))
    assert found.read(990, 320)[:20].tolist() == [*range(990, 1000), *range(10)]
    assert found.read(0, 1000).tolist() == list(range(1000))


def test_nanogpt_s_files_without_header_are_read(tmp_path):
    (tmp_path / 'd').mkdir()
    np.arange(50, dtype=np.uint16).tofile(tmp_path / 'd/train.bin')
    assert Tokens('d', 'train', 50, tmp_path).read(0, 50).tolist() == list(range(50))


@pytest.mark.parametrize('damage, words', [
    (lambda path: path.write_bytes(path.read_bytes()[:-2]),
     'promises 100 tokens, the file holds 99'),
    (lambda path: path.write_bytes(b'\0' * 4 + path.read_bytes()[4:]), 'not a token shard'),
    (lambda path: path.write_bytes(b''), 'not a token shard'),
    (lambda path: path.write_bytes(path.read_bytes()[:4] + b'\7' + path.read_bytes()[5:]),
     'format 7')])
def test_a_damaged_shard_is_refused_by_name(tmp_path, damage, words):
    write(tmp_path / 'd', np.arange(300))
    damage(tmp_path / 'd/train_000001.bin')
    with pytest.raises(ValueError, match=f'train_000001.bin: .*{words}'):
        Tokens('d', 'train', 500, tmp_path)


def test_an_id_outside_of_the_vocabulary_is_refused(tmp_path):
    found = tokens(tmp_path, vocab_size=950)
    found.read(0, 900)
    words = 'train_000009.bin: holds token id 999, the vocabulary ends at 949'
    with pytest.raises(ValueError, match=words):
        found.read(900, 100)


def test_a_data_set_that_is_not_there_says_how_to_make_it(tmp_path):
    command = 'python data/prepare.py --dataset=shakespeare --tokenizer=chars'
    with pytest.raises(ValueError, match=command):
        Tokens('shakespeare_char', 'train', 65, tmp_path)


@pytest.mark.parametrize('size', [1, 2, 3, 5, 64, 1000, 4097])
def test_permuted_is_a_permutation_that_depends_on_its_key(size):
    once = permuted(np.arange(size), size, 'a')
    assert (sorted(once) == list(range(size))
            and (once == permuted(np.arange(size), size, 'a')).all())
    assert size < 64 or (once != permuted(np.arange(size), size, 'b')).mean() > 0.9


def test_permuted_mixes_well():
    """Neighbours land apart as in a uniform permutation: mean distance size / 3,
    positions uncorrelated."""
    size = 10_000
    once = permuted(np.arange(size), size, 'a')
    assert np.abs(np.diff(once)).mean() == pytest.approx(size / 3, rel=0.05)
    assert abs(np.corrcoef(np.arange(size), once)[0, 1]) < 0.05


@pytest.mark.parametrize('world', [1, 2, 3, 4])
def test_an_epoch_is_every_block_once_whatever_the_world_size(tmp_path, world):
    """1003 tokens in blocks of 10: 100 blocks an epoch;
    ranks read in turn and together see each once."""
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


@pytest.mark.slow
def test_reading_needs_no_memory_that_grows_with_the_corpus(tmp_path):
    """200 MB of (sparse) shards read in a random order: peak memory grows by less than 20 MB."""
    write(tmp_path / 'd', [0] * 8)
    path = tmp_path / 'd/train_000000.bin'
    with open(path, 'r+b') as file:
        file.seek(8)
        file.write(np.array([100_000_000], '<i4').tobytes())
        file.truncate(HEADER_BYTES + 200_000_000)
    code = (f"import resource, sys; sys.path.insert(0, {str(ROOT)!r})\n"
            f"from data.shards import Tokens, TokenBatches\n"
            f"batches = TokenBatches(Tokens('d', 'train', 9, {str(tmp_path)!r}), 1024, 1)\n"
            f"peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            f"batches.read(0, 16); before = peak()\n"
            f"for i in range(16, batches.blocks, 16): batches.read(i, 16)\n"
            f"print(peak() - before)")
    assert int(script('-c', code).stdout) < 20_000


@pytest.mark.parametrize('damage, words', [
    (lambda folder: (folder / 'val_000000.bin').write_bytes(b'x' * 2000), 'not a token shard'),
    (lambda folder: (folder / 'val_000000.bin').unlink(), 'No such file'),
    (lambda folder: flip(folder / 'train_000000.bin', HEADER_BYTES + 8), 'altered'),
    (lambda folder: (folder / 'manifest.json').unlink(), 'no manifest.json')])
def test_verify_names_what_is_wrong(stories, tmp_path, damage, words):
    shutil.copytree(stories / 'tiny', tmp_path / 'tiny')
    assert verify('tiny', tmp_path) == []
    damage(tmp_path / 'tiny')
    assert words in verify('tiny', tmp_path)[0]


def test_a_damaged_manifest_is_named(stories, tmp_path):
    shutil.copytree(stories / 'tiny', tmp_path / 'tiny')
    (tmp_path / 'tiny/manifest.json').write_text('{"format": 1,')
    with pytest.raises(ValueError, match='manifest.json is damaged'):
        verify('tiny', tmp_path)


def test_the_manifest_counts_what_is_there(stories):
    facts = json.loads((stories / 'tiny/manifest.json').read_text())
    assert sum(split['documents'] for split in facts['splits'].values()) == 40
    assert facts['tokenizer']['eot_id'] == 299 and facts['splits']['val']['xz_bytes'] > 0


def flip(path, place):
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)
