"""What a run starts from, and what is refused."""

import json
import shutil
from dataclasses import replace

import pytest
from conftest import losses

import train
from gpt import steps


def test_data_that_was_prepared_again_is_refused(config, stories, tmp_path):
    shutil.copytree(stories / 'tiny', tmp_path / 'data/tiny')
    cfg = config(data_dir=str(tmp_path / 'data'), max_iters=4)
    train.main(cfg)
    shard = tmp_path / 'data/tiny/train_000000.bin'
    shard.rename(tmp_path / 'elsewhere.bin')
    with pytest.raises(ValueError, match='train_000000.bin.* missing'):
        train.main(cfg)
    (tmp_path / 'elsewhere.bin').rename(shard)
    path = tmp_path / 'data/tiny/manifest.json'
    facts = json.loads(path.read_text())
    facts['splits']['train']['shards'][0]['sha256'] = '0' * 64
    path.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match='was prepared again'):
        train.main(cfg)


def test_without_an_intact_checkpoint_a_run_does_not_start_over(config, tmp_path):
    train.main(config())
    for folder in steps.all_steps(tmp_path / 'run').values():
        (folder / 'training.pt').write_bytes(b'')
    with pytest.raises(ValueError, match='no intact one:(.|\n)*training.pt is truncated'):
        train.main(config())


def test_changed_settings_win_and_are_named(config, tmp_path, capsys):
    train.main(config(max_iters=4))
    train.main(config(max_iters=6, learning_rate=1e-4, decay_lr=False))
    text = capsys.readouterr().out
    assert 'changed: max_iters 4 -> 6' in text and 'learning_rate 0.003 -> 0.0001' in text
    assert losses(tmp_path / 'run', 'lr')[-1] == 1e-4


def test_another_data_set_or_seed_is_refused_unless_it_is_asked_for(config, two_sets, tmp_path):
    """The best loss on one data set is not compared with that on another."""
    cfg = config(data_dir=str(two_sets), max_iters=4)
    train.main(cfg)
    for change in ({'dataset': 'other'}, {'seed': 2}):
        with pytest.raises(ValueError, match='holds a run with .* give another --out_dir'):
            train.main(replace(cfg, max_iters=8, **change))
    train.main(replace(cfg, dataset='other', eval_only=True))
    best = tmp_path / 'run/best.json'
    best.write_text(json.dumps({'step': 4, 'val_loss': 0.0}))
    train.main(replace(cfg, max_iters=8, dataset='other', init_from='resume'))
    assert json.loads(best.read_text())['val_loss'] == min(
        loss for loss in losses(tmp_path / 'run', 'val_loss')[-2:])


def test_scratch_over_an_existing_run(config):
    train.main(config(max_iters=4))
    with pytest.raises(ValueError, match="init_from='scratch', but .*step_0000004 holds a run"):
        train.main(config(init_from='scratch'))


def test_a_checkpoint_of_another_shape(config):
    train.main(config(max_iters=4))
    with pytest.raises(ValueError, match='step_0000004 has n_layer=2, given n_layer=3'):
        train.main(config(n_layer=3))


def test_a_checkpoint_of_another_tokenizer(config, stories, tmp_path):
    from data import prepare
    train.main(config(max_iters=4))
    prepare.main(prepare.Config(input=(str(stories / 'tiny.jsonl'),), tokenizer='bytes',
                                name='tiny', val_fraction=0.2, data_dir=str(tmp_path / 'data')))
    text = r'was trained on tokens of bpe:300.*holds those of another tokenizer, bytes'
    with pytest.raises(ValueError, match=text):
        train.main(config(data_dir=str(tmp_path / 'data')))


def test_a_checkpoint_of_another_optimizer(config):
    train.main(config(max_iters=4))
    with pytest.raises(ValueError, match='no matching optimizer state for h.0.attn.c_attn.weight'):
        train.main(config(optimizer='muon'))


def test_a_fine_tuned_run_records_the_model_it_has(config, tmp_path, capsys):
    """The header's defaults are not what was trained."""
    train.main(config(max_iters=2))
    cfg = config(init_from=str(tmp_path / 'run'), out_dir=str(tmp_path / 'tuned'), n_layer=7,
                 n_embd=64, bias=False, max_iters=2)
    train.main(cfg)
    assert 'which set n_layer=2, n_head=2, n_embd=32, bias=True' in capsys.readouterr().out
    text = (tmp_path / 'tuned/config.py').read_text()
    assert 'n_layer = 2\n' in text and 'n_embd = 32\n' in text and 'bias = True\n' in text
    train.main(replace(cfg, max_iters=4))
    assert 'changed: max_iters 2 -> 4\n' in capsys.readouterr().out
