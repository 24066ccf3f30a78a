"""The shard format and its refusals."""

import hashlib
import json
import os
import random
import shutil

import numpy as np
import pytest

from gpt.data.shards import (HEADER_BYTES, ShardWriter, Tokens, documents, load_facts,
                             prepare_command, verify)


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


def test_reading_crosses_shards_and_wraps_around(tmp_path):
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
     'says 100 tokens, the file holds 99'),
    (lambda path: path.write_bytes(b'\0' * 4 + path.read_bytes()[4:]), 'not a token shard'),
    (lambda path: path.write_bytes(b''), 'not a token shard'),
    (lambda path: path.write_bytes(path.read_bytes()[:4] + b'\7' + path.read_bytes()[5:]),
     'not a token shard')])
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
    with pytest.raises(ValueError, match=r'is damaged \((not JSON|given|source: given).*; delete'):
        verify('tiny', tmp_path)


def test_the_manifest_counts_documents(stories):
    facts = json.loads((stories / 'tiny/manifest.json').read_text())
    assert sum(split['documents'] for split in facts['splits'].values()) == 40
    assert facts['tokenizer']['eot_id'] == 299 and facts['splits']['val']['xz_bytes'] > 0


def flip(path, place):
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize('text', ['[]', '{"a": 1}', '3'])
def test_a_manifest_without_its_keys_is_damaged(stories, tmp_path, text):
    shutil.copytree(stories / 'tiny', tmp_path / 'tiny')
    (tmp_path / 'tiny/manifest.json').write_text(text)
    with pytest.raises(ValueError, match=r'is damaged \((not JSON|given|source: given).*; delete'):
        load_facts('tiny', tmp_path)


@pytest.mark.parametrize('place, value, words', [
    ('tokenizer.vocab_size', '300', 'tokenizer.vocab_size: given .300., expected a whole number'),
    ('splits.train.shards', {}, 'splits.train.shards: given an object of 0, expected a list'),
    ('splits.val.bytes', 0, 'splits.val.bytes: given 0, expected a whole number, 1 or more'),
    ('splits.val', None, 'splits.val: given null, expected an object'),
    ('splits.test', {'tokens': 1, 'documents': 1, 'bytes': 1, 'shards': []}, "train, val'"),
    ('source.files', [['a', 1]], r'source.files\[0\]: given a list of 2'),
    ('splits.train.shards', [{'file': '/dev/zero', 'tokens': 1, 'sha256': ''}], 'without a folder'),
    ('remarks', {'x': 3}, 'remarks.x: given 3'), ('tokenizer.eot_id', 2 ** 64, 'eot_id: given')])
def test_a_manifest_of_another_shape_names_the_place(stories, tmp_path, place, value, words):
    shutil.copytree(stories / 'tiny', tmp_path / 'tiny')
    manifest = json.loads((tmp_path / 'tiny/manifest.json').read_text())
    *parents, last = place.split('.')
    part = manifest
    for key in parents:
        part = part[key]
    part[last] = value
    (tmp_path / 'tiny/manifest.json').write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f'manifest.json is damaged .*{words}'):
        load_facts('tiny', tmp_path)


@pytest.mark.parametrize('dtype', ['<u4', '>u4', '<i8', '<u2'])
def test_files_of_nanogpt_in_wider_numbers_are_refused(tmp_path, dtype):
    (tmp_path / 'd').mkdir()
    np.random.default_rng(0).integers(1, 50257, 1000).astype(dtype).tofile(tmp_path / 'd/train.bin')
    if dtype == '<u2':
        assert len(Tokens('d', 'train', 50257, tmp_path)) == 1000
    else:
        with pytest.raises(ValueError, match='train.bin: every second token is 0.*uint16'):
            Tokens('d', 'train', 50257, tmp_path)


def test_a_pipe_in_place_of_a_shard_is_not_waited_for(tmp_path):
    write(tmp_path / 'd', np.arange(300))
    (tmp_path / 'd/train_000001.bin').unlink()
    os.mkfifo(tmp_path / 'd/train_000001.bin')
    with pytest.raises(ValueError, match='train_000001.bin: is a device, pipe or socket'):
        Tokens('d', 'train', 500, tmp_path)


@pytest.mark.parametrize('name', ['manifest.json', 'tokenizer.json'])
def test_a_data_set_with_a_file_missing_is_refused(stories, tmp_path, name):
    shutil.copytree(stories / 'tiny', tmp_path / 'tiny')
    (tmp_path / 'tiny' / name).unlink()
    with pytest.raises(ValueError, match=f'its {name} is missing'):
        load_facts('tiny', tmp_path)


def test_shards_that_changed_places_are_refused(stories, tmp_path):
    shutil.copytree(stories / 'tiny', tmp_path / 'tiny')
    train, val = (tmp_path / 'tiny' / f'{split}_000000.bin' for split in ('train', 'val'))
    raw = train.read_bytes()
    train.write_bytes(val.read_bytes())
    val.write_bytes(raw)
    with pytest.raises(ValueError, match='train_000000.bin: .* the manifest has'):
        Tokens('tiny', 'train', 300, tmp_path)


@pytest.mark.parametrize('name', ['train_000000.bin', 'train.bin'])
def test_a_shard_that_is_touched_is_read_on_and_one_written_again_is_refused(stories, tmp_path,
                                                                            name):
    """With a manifest, and as nanoGPT's without: the bytes decide, not the time of the file."""
    shard = tmp_path / 'tiny' / name
    if name == 'train.bin':
        shard.parent.mkdir()
        np.arange(300, dtype=np.uint16).tofile(shard)
    else:
        shutil.copytree(stories / 'tiny', shard.parent)
    found = Tokens('tiny', 'train', 300, tmp_path)
    raw, first = shard.read_bytes(), found.read(0, 10).tolist()
    for same in (lambda: os.utime(shard, ns=(1, 1)), lambda: shard.write_bytes(raw),
                 lambda: (shard.rename(tmp_path / 'old'), shard.write_bytes(raw))):
        same()
        assert found.read(0, 10).tolist() == first
    shard.write_bytes(raw[:-4] + raw[-2:] + raw[-4:-2])             # of the same size
    with pytest.raises(ValueError, match=f'{name}: was written again'):
        found.read(0, 10)


def plain_documents(ids, eot):
    """Lists of the ids between the ids `eot`, by plain Python."""
    found = [[]]
    for i in ids:
        if i == eot:
            found.append([])
        else:
            found[-1].append(i)
    if not found[0]:
        return found[1:]
    return found[:-1] if len(found) > 1 and not found[-1] else found


@pytest.mark.parametrize('size', [1, 2, 3, 7, 10 ** 6])
def test_documents_are_what_is_between_the_eot_tokens(tmp_path, size):
    """Whatever the size of the pieces, also where documents are empty or longer than one."""
    rng = random.Random(size)
    for trial in range(40):
        ids = rng.choices([0, 1, 2, 3], [trial % 5, 3, 2, 1], k=rng.randrange(1, 25))
        write(tmp_path / 'd', ids)
        tokens = Tokens('d', 'train', 4, tmp_path)
        assert np.concatenate(list(tokens.chunks(size))).tolist() == ids
        assert list(documents(tokens, 0, size)) == list(map(hashed, plain_documents(ids, 0)))
        assert list(documents(tokens, None, size)) == [hashed(ids)]


def hashed(ids):
    raw = np.array(ids, '<u2').tobytes()
    return len(ids), hashlib.blake2b(raw, digest_size=16).digest()


def test_documents_refuse_ids_outside_of_the_vocabulary(tmp_path):
    write(tmp_path / 'd', [0, 1, 9])
    with pytest.raises(ValueError, match='holds token id 9, the vocabulary ends at 8'):
        list(documents(Tokens('d', 'train', 9, tmp_path), 0))


def test_the_command_that_makes_a_data_set_names_it_only_if_it_is_known():
    assert prepare_command('pydocs').endswith('--dataset=pydocs')
    assert prepare_command('fineweb-10B').endswith('--dataset=fineweb-10B')
    for name in ('pydocs_v2', 'openwebtext2', 'shakespeare_lines'):
        assert f'--name={name} FILES' in prepare_command(name)


def test_what_is_available_are_data_sets_alone(stories, tmp_path):
    """Models have a manifest.json as well; nanoGPT's data sets have none."""
    shutil.copytree(stories / 'tiny', tmp_path / 'tiny')
    for name, file in (('model', 'manifest.json'), ('model', 'model.safetensors'),
                       ('older', 'train.bin'), ('.killed.partial', 'train_000000.bin')):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / file).write_bytes(b'{}')
    with pytest.raises(ValueError, match='\nAvailable: older, tiny$'):
        Tokens('nowhere', 'train', 300, tmp_path)
