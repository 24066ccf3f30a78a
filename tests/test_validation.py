"""The validation loss and bits per byte, against sums by hand."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from conftest import losses

import train
from gpt import checkpoints, validation
from gpt.data.sets import DataSet
from gpt.data.shards import Tokens, read_manifest
from gpt.validation import Validation, ValidationConfig, bits_per_byte, evaluate, validate
from gpt.world import World
from model import GPT, GPTConfig

EVERYTHING = ValidationConfig(batch_size=4, block_size=16, eval_tokens=10 ** 9)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return GPT(GPTConfig(16, 300, 1, 2, 32))


def test_validation_is_the_mean_over_every_token_of_the_split(net, stories):
    """The last, shorter block counts by its tokens; eval_tokens beyond the split take all of it."""
    tokens = Tokens('tiny', 'val', 300, stories)
    found, count = evaluate(net, tokens, EVERYTHING, World())
    ids = torch.from_numpy(tokens.read(0, len(tokens)))
    assert count == len(ids) - 1 and count % 16 and count > 64
    total = 0.0
    for start in range(0, count, 16):
        x, y = ids[start:min(start + 16, count)], ids[start + 1:min(start + 16, count) + 1]
        total += torch.nn.functional.cross_entropy(net(x[None])[0], y, reduction='sum').item()
    assert found == pytest.approx(total / count, rel=1e-6)


def test_a_stop_ends_a_validation_without_a_result(net, stories):
    answers = iter([False, False, True])
    tokens = Tokens('tiny', 'val', 300, stories)
    assert evaluate(net, tokens, EVERYTHING, World(), stopped=lambda: next(answers)) is None
    assert next(answers, None) is None, 'it was asked before every batch'
    data = DataSet('tiny', 1.0, {}, tokens, tokens)
    assert validate(net, [data], EVERYTHING, World(), lambda: True) is None


def test_a_long_validation_says_how_far_it_is(net, stories, monkeypatch, capsys):
    tokens = Tokens('tiny', 'val', 300, stories)
    evaluate(net, tokens, EVERYTHING, World())
    assert not capsys.readouterr().out
    monkeypatch.setattr(validation, 'SECONDS_TO_A_LINE', 0)
    evaluate(net, tokens, EVERYTHING, World())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 3 and all(re.fullmatch(r'validating: \d+%, \d+ s left', line)
                                  for line in lines)


def test_a_mixture_counts_each_data_set_by_its_fraction(net, stories):
    """Even if a split is shorter than its fraction of eval_tokens."""
    splits = [Tokens('tiny', split, 300, stories) for split in ('train', 'val')]
    sets = [DataSet(name, fraction, {}, tokens, tokens)
            for name, fraction, tokens in zip('ab', (0.7, 0.3), splits)]
    config = ValidationConfig(batch_size=4, block_size=16, eval_tokens=1000)
    found = validate(net, sets, config, World())
    (a, tokens_a), (b, tokens_b) = (
        evaluate(net, tokens, ValidationConfig(4, 16, wanted), World())
        for tokens, wanted in zip(splits, (700, 300)))
    assert found.loss == pytest.approx(0.7 * a + 0.3 * b)
    assert found.others == {'val_loss/a': a, 'val_loss/b': b}
    assert found.tokens == tokens_a + tokens_b
    assert str(found) == f'val_loss {found.loss:.4f} (a {a:.4f}, b {b:.4f})'


def test_other_sets_and_the_training_split_are_validated_beside_it(config, two_sets, tmp_path,
                                                                   capsys):
    """They are in the log and change no loss; eval_train is as many tokens of the training split.
    """
    cfg = config(data_dir=str(two_sets), max_iters=4)
    train.main(cfg)
    train.main(replace(cfg, val_datasets='other', eval_train=True, out_dir=str(tmp_path / 'both')))
    both = [json.loads(line) for line in (tmp_path / 'both/log.jsonl').read_text().splitlines()]
    assert losses(tmp_path / 'both') == losses(tmp_path / 'run')
    assert losses(tmp_path / 'both', 'val_loss') == losses(tmp_path / 'run', 'val_loss')
    model, _ = checkpoints.load_folder(tmp_path / 'both/step_0000004')
    size = ValidationConfig(cfg.batch_size, cfg.block_size, cfg.eval_tokens)
    for key, place in (('val_loss/other', ('other', 'val')), ('train_loss', ('tiny', 'train'))):
        expected, _ = evaluate(model, Tokens(*place, 300, two_sets), size, World())
        assert both[-1][key] == pytest.approx(expected, rel=1e-6)
    text = capsys.readouterr().out
    assert re.search(rf"val_loss \S+ \(other \S+\), train_loss {both[-1]['train_loss']:.4f}", text)
    for name, message in (('bytes', 'bytes holds tokens of bytes'),
                          ('tiny', 'tiny is trained on'), ('other:0.5', "given 'other:0.5'"),
                          ('other,other', "given 'other,other'")):
        with pytest.raises(ValueError, match=f'val_datasets: {message}'):
            train.main(replace(cfg, val_datasets=name))


def test_a_validation_is_described():
    facts = {'val_bits_per_byte': 1.5, 'xz_bits_per_byte': 2.25}
    assert str(Validation(3.0, facts, 9)) == (
        'val_loss 3.0000, 1.500 bits per byte (xz -9e: 2.250)')


def test_bits_per_byte_is_what_it_says(stories):
    """nats / ln 2 over the bytes of the text; xz is given only for the same text."""
    manifest = read_manifest('tiny', stories)
    facts = manifest['splits']['val']
    whole = bits_per_byte(math.log(2), facts['tokens'] - 1, manifest)
    assert whole['val_bits_per_byte'] == pytest.approx(facts['tokens'] / facts['bytes'])
    assert whole['xz_bits_per_byte'] == 8 * facts['xz_bytes'] / facts['bytes']
    assert set(bits_per_byte(1.0, 50, manifest)) == {'val_bits_per_byte'}
    assert bits_per_byte(1.0, 50, {}) == {}


def test_eval_iters_is_nanogpt_s_spelling(net, stories):
    tokens = Tokens('tiny', 'val', 300, stories)
    config = ValidationConfig(4, 16, eval_tokens=10 ** 9, eval_iters=3)
    _, count = evaluate(net, tokens, config, World())
    assert count == 3 * 4 * 16
