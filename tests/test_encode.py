"""Documents to tokens in any number of processes, and the rule that divides train from val."""

import json
import os
import signal

import numpy as np
import pytest
from conftest import script

from gpt import tokenizer
from gpt.data import encode
from gpt.data.documents import Batch, Options, Position
from gpt.data.encode import SplitRule, divide, document_hash, val_range

RAWS = [f'document {i}'.encode() for i in range(50)]


def test_a_split_depends_on_the_text_and_the_seed_alone():
    rule = SplitRule(1337, 0.3, 0.3)
    splits = [divide(raw.decode(), raw, rule)[0][0] for raw in RAWS]
    assert splits == [divide(raw.decode(), raw, rule)[0][0] for raw in reversed(RAWS)][::-1]
    assert {'train', 'val'} == set(splits) and 5 < splits.count('val') < 25
    assert splits != [divide(raw.decode(), raw, rule._replace(seed=1))[0][0] for raw in RAWS]


@pytest.mark.parametrize('n', [2, 3, 50])
@pytest.mark.parametrize('val_fraction', [0.001, 0.5, 0.999])
def test_the_threshold_leaves_no_split_empty(n, val_fraction):
    low, threshold = val_range(RAWS[:n], 1337, val_fraction)
    assert low == 0.0
    below = sum(document_hash(raw, 1337) < threshold for raw in RAWS[:n])
    assert 0 < below < n
    hashes = [document_hash(raw, 1337) for raw in RAWS[:n]]
    assert (threshold == val_fraction) == (min(hashes) < val_fraction <= max(hashes))


def test_one_document_is_cut_and_an_empty_corpus_has_no_threshold():
    assert val_range([], 1337, 0.1) is None
    assert val_range([b'same', b'same'], 1337, 0.1) == (0.0, 0.0)
    parts = divide('a' * 9 + 'é', ('a' * 9 + 'é').encode(), SplitRule(1337, 0.1, 0.0))
    assert parts == [('train', 'a' * 9, 9), ('val', 'é', 2)]


@pytest.mark.parametrize('sizes', [
    [500, 800, 700, 900, 60_000], [9000, 9000, 9000], [100_000, 3, 3, 2], [5000] * 12, [1700] * 10])
@pytest.mark.parametrize('seed', range(6))
def test_few_documents_are_split_about_as_asked(sizes, seed):
    """Whatever the seed; where hashes alone do, they decide; no text is lost, none is in both."""
    raws = [(bytes([97 + i]) + b'.-') * (size // 3 + 1) for i, size in enumerate(sizes)]
    low, high = val_range(raws, seed, 0.05)
    assert (low, high) == val_range(reversed(raws), seed, 0.05)
    parts = [divide(raw.decode(), raw, SplitRule(seed, 0.05, high, low)) for raw in raws]
    assert [''.join(text for _, text, _ in part).encode() for part in parts] == raws
    found = {split: [text for part in parts for name, text, _ in part if name == split]
             for split in ('train', 'val')}
    share = sum(map(len, found['val'])) / sum(map(len, raws))
    assert 0.025 <= share <= 0.1 and not set(found['train']) & set(found['val'])
    by_hash = sum(len(raw) for raw in raws if document_hash(raw, seed) < 0.05) / sum(sizes)
    assert not 0.025 <= by_hash <= 0.1 or (low, high) == (0.0, 0.05)


def test_many_documents_are_split_by_hash_alone():
    raws = [b'%d' % i for i in range(1001)] + [b'a' * 10 ** 6]
    assert val_range(raws, 1337, 0.05) == (0.0, 0.05)


def test_any_number_of_workers_gives_the_same(tmp_path):
    vocabulary = tmp_path / 'tokenizer.json'
    vocabulary.write_text(tokenizer.to_json(tokenizer.build('bytes', None)))
    batches = [Batch(RAWS[i:i + 5], [(5, '', i)], Position(0, i, i)) for i in range(0, 50, 5)]
    found = [list(encode.tokenized(batches, workers, vocabulary, Options(), SplitRule(1, 0.3, 0.3)))
             for workers in (1, 2)]
    assert found[0] == found[1] and [after for after, _, _ in found[0]] == [
        batch.after for batch in batches]
    parts = [part for _, encoded, _ in found[0] for part in encoded.values()]
    assert sum(amounts['documents'] for _, amounts in parts) == 50
    assert sum(amounts['bytes'] for _, amounts in parts) == sum(map(len, RAWS))
    assert all(len(np.frombuffer(ids, np.uint16)) == amounts['tokens'] for ids, amounts in parts)


def test_ctrl_c_while_a_batch_is_submitted_is_not_lost():
    class Pool:
        def submit(self, *_):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        encode.submit(Pool(), None)


def test_preparing_text_imports_no_torch_in_any_process(tmp_path):
    """The parent and both workers of a real run list the modules that they imported."""
    source = tmp_path / 'a.jsonl'
    source.write_text('\n'.join(json.dumps({'text': f'{i} lorem ipsum ' * 200})
                                for i in range(3000)))
    (tmp_path / 'sitecustomize.py').write_text(
        'import atexit, os, pathlib, sys\n'
        'def note():\n'
        '    name = f"modules.{os.getpid()}"\n'
        f'    pathlib.Path({str(tmp_path)!r}, name).write_text(" ".join(sys.modules))\n'
        'atexit.register(note)\n'
        'leave = os._exit\n'                    # the end of run(), and of spawned processes
        'os._exit = lambda status: (note(), leave(status))\n')
    script('data/prepare.py', f'--data_dir={tmp_path}/data', '--name=d', '--tokenizer=bytes',
           '--workers=2', source, env={**os.environ, 'PYTHONPATH': str(tmp_path)})
    modules = [path.read_text().split() for path in tmp_path.glob('modules.*')]
    used = [names for names in modules if 'gpt.data.encode' in names]
    assert len(used) == 3 and not any('torch' in names for names in modules)
