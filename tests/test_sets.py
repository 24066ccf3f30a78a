"""The data sets of a run: mixtures, what is refused, and the micro-batches of all ranks."""

import json
import shutil

import numpy as np
import pytest
from test_shards import write

from gpt.data.order import CYCLE, Batch
from gpt.data.sets import Data, load_sets, mixture


@pytest.mark.parametrize('text, counts', [
    ('a', {'a': 1000}), ('a:3', {'a': 1000}), ('a,b', {'a': 500, 'b': 500}),
    ('a:0.7,b:0.3', {'a': 700, 'b': 300}), (' a : 7 , b:3', {'a': 700, 'b': 300}),
    ('a,b,c', {'a': 334, 'b': 333, 'c': 333}), ('a:1,b:2,c:3', {'a': 167, 'b': 333, 'c': 500}),
    ('a:0.9994,b:0.0006', {'a': 999, 'b': 1})])
def test_weights_become_counts_of_a_cycle(text, counts):
    assert mixture(text) == counts and sum(counts.values()) == CYCLE


@pytest.mark.parametrize('text, message', [
    ('a,b,a', 'each once'), ('a,,b', 'expected names'), ('', 'expected names'),
    ('a:0.5,b', 'for every data set or for none'), ('a:0,b:1', 'a weight above 0'),
    ('a:-1,b:2', 'a weight above 0'), ('a:much,b:1', 'a weight above 0'),
    ('a:nan,b:1', 'a weight above 0'), ('a:inf,b:1', 'a weight above 0'),
    ('a:1,b:', 'a weight above 0'), ('a:1,b:0.0001', 'that of b is too small')])
def test_a_bad_mixture_is_refused(text, message):
    with pytest.raises(ValueError, match=f'dataset: given {text!r}, .*{message}'):
        mixture(text)


def test_validation_splits_that_say_little_are_named(two_sets):
    data = Data('tiny', two_sets)
    assert not data.doubtful(16)
    note, = data.doubtful(10 ** 6)
    assert note.startswith('note: tiny has ') and '--val_fraction' in note


@pytest.mark.parametrize('text, message', [
    ('tiny,bytes', 'data sets tiny and bytes have different tokenizers, '
     r'bpe:300 \(300\) and bytes .257.; .*--tokenizer=.*/tiny$'),
    ('tiny,nowhere', 'not prepared; run\n    python data/prepare.py --name=nowhere'),
    ('tiny,tiny', 'each once'), ('tiny:x,other:1', 'a weight above 0')])
def test_mixtures_that_are_refused(two_sets, text, message):
    with pytest.raises(ValueError, match=message):
        load_sets(text, str(two_sets))


def test_a_val_split_of_one_token_is_refused(stories, tmp_path):
    shutil.copytree(stories / 'tiny', tmp_path / 'tiny')
    path = tmp_path / 'tiny/manifest.json'
    manifest = json.loads(path.read_text())
    for tokens in (2, 1):
        [shard] = write(tmp_path / 'tiny', [5] * tokens, split='val')
        manifest['splits']['val'] |= {'tokens': tokens, 'shards': [shard]}
        path.write_text(json.dumps(manifest))
        if tokens == 2:
            assert len(load_sets('tiny', tmp_path)[0][0].val) == 2
    with pytest.raises(ValueError, match='/tiny: the val split has one token, expected at least 2'):
        load_sets('tiny', tmp_path)


@pytest.mark.parametrize('world', [1, 2])
def test_the_micro_batches_of_all_ranks_are_the_sequences_of_an_update(stories, world):
    """In order, and each rank's next one is read ahead, also across updates."""
    data = Data('tiny', stories)
    data.set_order(16, seed=1)
    batch = Batch(sequences=8, micro_batch=2, micro_steps=4 // world)
    for position in (0, 8):
        rows, indices = [], []
        for rank in range(world):
            for index, x, y in data.micro_batches(position, batch, rank):
                rows.append(x)
                indices.append(index)
        assert indices == [0, 1, 2, 3]
        assert (np.concatenate(rows) == data.order.read(position, 8)[0].numpy()).all()
        expected = position + 8 + (world - 1) * 4                   # the last rank's next one
        assert data.prefetcher.expected == (expected, 2)
