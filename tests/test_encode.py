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
from gpt.data.encode import SplitRule, divide, document_hash, val_threshold

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
    threshold = val_threshold(RAWS[:n], 1337, val_fraction)
    below = sum(document_hash(raw, 1337) < threshold for raw in RAWS[:n])
    assert 0 < below < n
    hashes = [document_hash(raw, 1337) for raw in RAWS[:n]]
    assert (threshold == val_fraction) == (min(hashes) < val_fraction <= max(hashes))


def test_one_document_is_cut_and_an_empty_corpus_has_no_threshold():
    assert val_threshold([], 1337, 0.1) is None
    assert val_threshold([b'same', b'same'], 1337, 0.1) == 0.0
    parts = divide('a' * 9 + 'é', ('a' * 9 + 'é').encode(), SplitRule(1337, 0.1, 0.0))
    assert parts == [('train', 'a' * 9, 9), ('val', 'é', 2)]


def test_any_number_of_workers_gives_the_same(tmp_path):
    vocabulary = tmp_path / 'tokenizer.json'
    vocabulary.write_text(tokenizer.to_json(tokenizer.build('bytes', None)))
    batches = [Batch(RAWS[i:i + 5], [(5, '', i)], Position(0, i, i)) for i in range(0, 50, 5)]
    found = [list(encode.tokenized(batches, workers, vocabulary, Options(), SplitRule(1, 0.3, 0.3)))
             for workers in (1, 2)]
    assert found[0] == found[1] and [after for after, _, _ in found[0]] == [
        batch.after for batch in batches]
    parts = [part for _, encoded, _ in found[0] for part in encoded.values()]
    assert sum(part.documents for part in parts) == 50
    assert sum(part.bytes for part in parts) == sum(map(len, RAWS))
    assert all(len(np.frombuffer(part.ids, np.uint16)) == part.tokens for part in parts)


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
