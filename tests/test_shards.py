"""The shard format and its refusals."""

import json
import os
import shutil

import numpy as np
import pytest
from conftest import script

from gpt.data.order import load_data
from gpt.data.shards import HEADER_BYTES, ShardWriter, Tokens, verify


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


@pytest.mark.parametrize('damage, words', [
    (lambda folder: (folder / 'val_000000.bin').write_bytes(b'x' * 2000), 'not a token shard'),
    (lambda folder: (folder / 'val_000000.bin').unlink(), 'is missing'),
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


def test_preparing_text_needs_no_torch():
    code = 'import sys, data.shards, data.prepare; print([m for m in sys.modules if m == "torch"])'
    assert script('-c', code).stdout == '[]\n'


@pytest.mark.parametrize('text', ['[]', '{"a": 1}', '3'])
def test_a_manifest_that_says_too_little_is_damaged(stories, tmp_path, text):
    shutil.copytree(stories / 'tiny', tmp_path / 'tiny')
    (tmp_path / 'tiny/manifest.json').write_text(text)
    with pytest.raises(ValueError, match='manifest.json is damaged'):
        load_data('tiny', tmp_path)


@pytest.mark.parametrize('name', ['manifest.json', 'tokenizer.json'])
def test_a_set_of_which_a_part_is_missing_is_not_taken_for_another(stories, tmp_path, name):
    shutil.copytree(stories / 'tiny', tmp_path / 'tiny')
    (tmp_path / 'tiny' / name).unlink()
    with pytest.raises(ValueError, match=f'its {name} is missing'):
        load_data('tiny', tmp_path)


def test_shards_that_changed_places_are_refused(stories, tmp_path):
    shutil.copytree(stories / 'tiny', tmp_path / 'tiny')
    train, val = (tmp_path / 'tiny' / f'{split}_000000.bin' for split in ('train', 'val'))
    raw = train.read_bytes()
    train.write_bytes(val.read_bytes())
    val.write_bytes(raw)
    with pytest.raises(ValueError, match='train_000000.bin: .* the manifest has'):
        load_data('tiny', tmp_path)


def test_a_shard_that_is_written_anew_is_not_read_on(tmp_path):
    found = tokens(tmp_path)
    found.read(0, 10)
    os.utime(tmp_path / 'd/train_000000.bin', ns=(1, 1))
    found.read(500, 10)
    with pytest.raises(ValueError, match='train_000000.bin: has been written anew'):
        found.read(0, 10)
