"""A step that a run deletes between finding and reading it, or while it is read."""

import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, command

from gpt import checkpoints, steps
import publish
import sample
import train
from gpt.world import World

PRUNING = '''
import sys
import time
from itertools import count
from gpt import checkpoints, steps
folder = sys.argv[1]
model, encoding = checkpoints.load_model(folder)
training = checkpoints.load_training(steps.newest(folder)[0])
first = max(steps.all_steps(folder)) + 1
for step in count(first):
    checkpoints.save(folder, step, model, encoding, training)
    steps.mark_best(folder, step, 1 / step)
    steps.prune(folder, keep=1, best=step)
    time.sleep(0.2)                     # else a reader on a busy machine never catches one
'''


@pytest.fixture
def live(config, tmp_path, monkeypatch):
    """The folder of a run, whose only step another process replaces many times a second."""
    monkeypatch.chdir(tmp_path)
    cfg = config(max_iters=2, out_dir=str(tmp_path / 'out/run'))
    train.main(cfg)
    process = subprocess.Popen([sys.executable, '-c', PRUNING, cfg.out_dir], cwd=ROOT)
    deadline = time.monotonic() + 300
    while len(steps.all_steps(cfg.out_dir)) != 1 or steps.best(cfg.out_dir).name < 'step_0000009':
        assert process.poll() is None and time.monotonic() < deadline
    yield cfg
    assert process.poll() is None
    process.kill()
    process.wait()


def test_a_step_that_is_pruned_meanwhile_is_looked_for_again(live, tmp_path, capsys, stories):
    """Its run, not another one, and its best step; also where the newest run is sampled."""
    vanished = []
    for name in (live.out_dir, ''):
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            folder = checkpoints.find(name or steps.newest_run())
            model, _, origin = sample.load(name, 'cpu', torch.float32)
            checkpoints.load_for_evaluation(World(), name, 'float32')
            vanished.append(not (folder / 'manifest.json').exists())
            assert origin.parent.name == 'run' and model.config.n_embd == 32
    assert any(vanished), 'nothing was pruned'
    for _ in range(4):
        train.main(train.Config(**{**vars(live), 'eval_only': True}))
        command(publish, f'--model={live.out_dir}', f'--to={tmp_path}/given', '--prompts=a',
                '--max_new_tokens=1', f'--data_dir={stories}')
    assert 'val_loss' in capsys.readouterr().out


@pytest.mark.parametrize('file', ['config.json', 'model.safetensors', 'tokenizer.json'])
def test_it_may_vanish_in_the_middle_of_reading(config, tmp_path, monkeypatch, file):
    """Whichever of its files is the first to be missing."""
    cfg, folders = config(max_iters=2), []
    train.main(cfg)
    read = checkpoints.load_folder

    def load(folder, *args, **options):
        if not folders:
            shutil.copytree(folder, folder.with_name('step_0000009'))
            (folder / file).unlink()
            (folder / 'manifest.json').unlink()
        folders.append(folder.name)
        return read(folder, *args, **options)
    monkeypatch.setattr(checkpoints, 'load_folder', load)
    assert sample.load(cfg.out_dir, 'cpu', torch.float32)[2].name == 'step_0000009'
    assert folders == ['step_0000002', 'step_0000009']


def test_what_is_missing_for_good_is_an_error(config):
    cfg = config(max_iters=2)
    train.main(cfg)
    folder = steps.newest(cfg.out_dir)[0]
    (folder / 'model.safetensors').unlink()
    for name in (folder, cfg.out_dir):
        with pytest.raises(ValueError, match='model.safetensors is missing'):
            sample.load(str(name), 'cpu', torch.float32)
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match='no such folder'):
        sample.load(str(folder), 'cpu', torch.float32)
