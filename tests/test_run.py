"""The folder of a run: its lock, what it saves, wandb."""

import json
import shutil
import signal
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import losses

import train
from gpt import checkpoints, files, log, steps
from gpt.run import Run
from gpt.validation import Validation


# Its folder is its own.

def test_a_second_process_in_the_same_folder_is_refused(config, tmp_path):
    (tmp_path / 'run').mkdir()
    with open(tmp_path / 'run/.lock', 'a') as file:
        files.lock(file)
        with pytest.raises(ValueError, match='another process is training in this folder'):
            train.main(config())
        assert [path.name for path in (tmp_path / 'run').iterdir()] == ['.lock']
    assert train.main(config(max_iters=1)) == 0


@pytest.mark.parametrize('name', ['line\nbreak', '../above', 'space and "quote"'])
def test_a_run_writes_in_its_own_folder_only(config, tmp_path, monkeypatch, name):
    here = tmp_path / 'here'
    here.mkdir()
    monkeypatch.chdir(here)
    train.main(config(out_dir=name, max_iters=1))
    assert 1 in steps.all_steps(here / name)
    shutil.copytree(here / name, tmp_path / 'copy')
    before = {path: path.stat().st_mtime_ns for path in (here / name).rglob('*')}
    train.main(config(out_dir=str(tmp_path / 'copy'), max_iters=2))
    assert before == {path: path.stat().st_mtime_ns for path in (here / name).rglob('*')}
    assert 2 in steps.all_steps(tmp_path / 'copy')


# What it saves.

def save_except(monkeypatch, *failing):
    """Let the checkpoints of these steps fail."""
    write = checkpoints.write

    def fails(partial, model, encoding, training):
        if training['progress']['step'] in failing:
            raise OSError(28, 'No space left on device')
        write(partial, model, encoding, training)
    monkeypatch.setattr(checkpoints, 'write', fails)


def validate_as(monkeypatch, *values):
    """Let the validations of a run have these losses, from step 0 on."""
    found = iter(values)
    monkeypatch.setattr(train, 'validate',
                        lambda *_: Validation(next(found), {}, 100))


def test_a_better_loss_that_was_not_saved_counts_for_patience(config, tmp_path, monkeypatch,
                                                              capsys):
    """The lowest loss is that of step 8, whose save fails: two validations later, at 16, the run
    ends, and the step it names is one that is on the disk."""
    save_except(monkeypatch, 8)
    validate_as(monkeypatch, 5.0, 4.0, 3.0, 4.5, 4.5, 4.5)
    assert train.main(config(max_iters=40, patience=2)) == 0
    text = capsys.readouterr().out
    assert 'step 8: cannot save: ' in text and 'No space left on device; continuing' in text
    assert 'ended at step 16, no lower loss in 2 validations' in text
    assert 'best val_loss 4.0000 at step 4. `python sample.py' in text
    assert set(steps.all_steps(tmp_path / 'run')) == {4, 12, 16}
    assert json.loads((tmp_path / 'run/best.json').read_text()) == {'step': 4, 'val_loss': 4.0}
    saved = checkpoints.load_training(tmp_path / 'run/step_0000016')['progress']
    assert (saved['lowest_step'], saved['lowest_val_loss']) == (8, 3.0)
    train.main(config(max_iters=40, patience=2))                    # a resume ends as soon
    assert 'ended at step 16' in capsys.readouterr().out


def test_the_last_line_names_no_step_that_is_not_on_the_disk(config, tmp_path, monkeypatch,
                                                             capsys):
    save_except(monkeypatch, 8)
    validate_as(monkeypatch, 5.0, 6.0, 4.0, 6.0)
    assert train.main(config()) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == 'finished 12 updates'
    assert not (tmp_path / 'run/best.json').exists()


def test_a_last_save_that_fails_ends_with_an_error(config, monkeypatch, capsys):
    save_except(monkeypatch, 12)
    with pytest.raises(OSError, match='could not be saved .*the one before is intact'):
        train.main(config())
    assert 'finished 12 updates' in capsys.readouterr().out


@pytest.mark.parametrize('changes', [{}, {'optimizer': 'muon', 'bias': False}], ids=str)
def test_a_checkpoint_is_written_behind_the_training(config, tmp_path, monkeypatch, changes):
    """The save of step 8 is written after step 10 was logged, and is that of step 8; the next
    save waits for it."""
    changes |= {'max_iters': 16, 'log_interval': 1, 'keep': 5}
    train.main(config(**changes, out_dir=str(tmp_path / 'at once')))
    log_file, real = tmp_path / 'run/log.jsonl', checkpoints.save

    def slow(out_dir, step, *rest):
        while step == 8 and '"step": 10,' not in log_file.read_text():
            time.sleep(0.01)
        return real(out_dir, step, *rest)
    monkeypatch.setattr(checkpoints, 'save', slow)
    train.main(config(**changes))
    for step in (4, 8, 12, 16):
        expected, folder = (tmp_path / name / f'step_{step:07d}' for name in ('at once', 'run'))
        name = 'model.safetensors'
        assert files.sha256(folder / name) == files.sha256(expected / name)
        a, b = (checkpoints.load_training(path) for path in (folder, expected))
        assert all(torch.equal(value, b['optimizer'][key][name])
                   for key, state in a['optimizer'].items() for name, value in state.items())
        assert a['progress'] == b['progress'] and a['watch'] == b['watch']
    best = (tmp_path / 'run/best.json').read_bytes()
    assert best == (tmp_path / 'at once/best.json').read_bytes()


def test_a_slow_save_under_torchrun_is_said_once(capsys):
    run = Run(SimpleNamespace(eval_only=False, plan=False, block_size=1), SimpleNamespace(
        under_torchrun=True, print=print, output=None))
    for seconds in (24, 40, 50):
        run.warn_of_slow_saves(seconds)
    text = capsys.readouterr().out
    assert text.count('writing a checkpoint took 40 s: torchrun kills 30 s after') == 1
    assert text.count('took') == 1


def test_config_py_says_if_it_repeats_the_run(config, tmp_path):
    path = tmp_path / 'run/config.py'
    train.main(config(max_iters=4))
    assert path.read_text().startswith('# python train.py THIS_FILE --out_dir=out/again   # repea')
    for learning_rate in (1e-3, 1e-3):                  # also after an unchanged resume
        train.main(config(max_iters=8, learning_rate=learning_rate))
        assert path.read_text().startswith('# the last settings of this run; some changed on the')


# wandb.

@pytest.mark.slow
def test_wandb_offline_keeps_its_id_over_a_resume(config, tmp_path):
    pytest.importorskip('wandb')
    train.main(config(max_iters=3, wandb_log=True))
    name = (tmp_path / 'run/wandb_id.txt').read_text()
    train.main(config(max_iters=5, wandb_log=True))
    files = list((tmp_path / 'run/wandb').glob(f'offline-run-*-{name}/run-{name}.wandb'))
    assert len(files) == 2 and all(file.stat().st_size > 0 for file in files)


def test_wandb_that_fails_stops_nothing(config, tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip('wandb')
    monkeypatch.setattr(wandb, 'init', lambda **_: (_ for _ in ()).throw(ConnectionError('down')))
    assert train.main(config(max_iters=3, wandb_log=True)) == 0
    assert 'wandb: ConnectionError: down; continuing without it' in capsys.readouterr().out
    assert len(losses(tmp_path / 'run')) == 3


WANDB = """
import time
def fail(*args, **options):
    {action}
class Run:
    def define_metric(self, *args, **options): pass
    log = {log}
    finish = {finish}
init = {init}
"""


@pytest.mark.parametrize('action', ["raise ConnectionError('down')", 'time.sleep(1000)'])
@pytest.mark.parametrize('where', ['init', 'log', 'finish'])
def test_wandb_that_raises_or_hangs_stops_nothing(config, tmp_path, monkeypatch, where, action):
    fine = 'lambda *args, **options: None'
    parts = {'init': 'lambda *args, **options: Run()', 'log': fine, 'finish': fine, where: 'fail'}
    (tmp_path / 'stub').mkdir()
    (tmp_path / 'stub/wandb.py').write_text(WANDB.format(action=action, **parts))
    monkeypatch.syspath_prepend(tmp_path / 'stub')
    monkeypatch.setitem(sys.modules, 'wandb', None)
    sys.modules.pop('wandb')                            # restored after the test
    monkeypatch.setattr(log, 'WANDB_SECONDS', 0.2)
    started = time.monotonic()
    assert train.main(config(wandb_log=True)) == 0
    assert time.monotonic() - started < 60
    assert len(losses(tmp_path / 'run')) == 12
    sys.modules.pop('wandb', None)


def test_an_exception_finishes_wandb_and_releases_the_folder(config, tmp_path, monkeypatch):
    calls = []
    stub = SimpleNamespace(define_metric=lambda *args, **options: None,
                           log=lambda record: calls.append(record['step']),
                           finish=lambda exit_code: calls.append(f'exit code {exit_code}'))
    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(init=lambda **options: stub))
    first = train.forward_backward

    def fails(seed, data, trainer, p, batch):
        if p.step == 6:
            raise RuntimeError('a bug')
        return first(seed, data, trainer, p, batch)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(train, 'forward_backward', fails)
    with pytest.raises(RuntimeError, match='a bug') as caught:
        train.main(config(wandb_log=True))
    assert calls[-2:] == [6, 'exit code 1']
    assert caught.tb                        # holds the Run: what is released is so on purpose
    with open(tmp_path / 'run/.lock', 'a') as file:
        files.lock(file, wait=False)
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(init=lambda **options: stub))
    assert train.main(config(wandb_log=True)) == 0 and calls[-1] == 'exit code 0'
    assert max(steps.all_steps(tmp_path / 'run')) == 12


def test_dtype_and_compile_that_were_chosen_stay_when_the_run_resumes(
        config, tmp_path, monkeypatch, capsys):
    """A measurement that comes out differently would make other losses."""
    cfg = config(dtype='auto', compile='auto')
    chosen = iter([torch.float32, torch.bfloat16, torch.bfloat16])
    monkeypatch.setattr(train, 'pick_dtype', lambda *_: (next(chosen), 'measured'))
    monkeypatch.setattr(train.Trainer, 'eager_seconds', lambda *_: 0.0)
    train.main(cfg)
    shutil.rmtree(tmp_path / 'run/step_0000012')                        # as if it was killed there
    monkeypatch.setattr(train.Trainer, 'eager_seconds', lambda *_: 1e9)
    train.main(cfg)
    text = capsys.readouterr().out
    assert 'float32: measured' in text and 'float32: as before' in text
    assert text.count('compile: off') == 2
    train.main(replace(cfg, max_iters=24, compile=False))               # another run in length
    assert 'bfloat16: measured' in capsys.readouterr().out
