"""
Faults of real runs, injected into real processes; in the end each run equals one without a fault.

`make faults` runs all of it, marathons included.
"""

import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from conftest import ROOT, curve, losses, script
from test_processes import kill_all, pids, start, wait_for_step

import train
from gpt import budget, checkpoints, run, steps
from gpt.curves import read_lines
from gpt.progress import MAX_ROLLBACKS
from gpt.validation import Validation


def faulty(fault, args, torchrun=0, **options):
    """A run with a fault: its process when it has ended."""
    options = {'check': False, **options}
    env = {**os.environ, 'FAULT': fault, **options.pop('env', {})}
    return script('tests/faulty.py', *args[1:], torchrun=torchrun, env=env, **options)


def begin(fault, args, world, *launcher):
    """The same, started: a Popen."""
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone',
                f'--nproc_per_node={world}', *launcher]
    return subprocess.Popen(
        [*(torchrun if world > 1 else [sys.executable]), 'tests/faulty.py', *map(str, args[1:])],
        cwd=ROOT, env={**os.environ, 'FAULT': fault}, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def events(folder, kind=None):
    return [record for record in read_lines(folder / 'log.jsonl')
            if record.get('event') and kind in (None, record['event'])]


def weights(folder, step=12):
    return (folder / f'step_{step:07d}/model.safetensors').read_bytes()


def same_run(a, b):
    assert curve(a) == curve(b)
    last = max(steps.all_steps(a))
    assert weights(a, last) == weights(b, last)


# Numbers that are not numbers, and losses that jump.

@pytest.mark.slow
@pytest.mark.parametrize('rank', [pytest.param(0, marks=pytest.mark.faults), 1])
def test_nan_on_one_rank_is_skipped_by_all(flags, tmp_path, rank):
    done = faulty(f'nan {rank} 5', flags('run'), torchrun=2)
    assert done.returncode == 0 and 'finished 12 updates, skipped: 1' in done.stdout
    [event] = events(tmp_path / 'run')
    assert event['event'] == 'skipped' and event['step'] == 6
    found = losses(tmp_path / 'run')
    assert found[5] is None and all(found[:5]) and all(found[6:])


@pytest.mark.faults
def test_nan_again_and_again_ends_every_rank_with_status_3(flags, undisturbed, tmp_path):
    done = faulty('nan 1 5 5', flags('run', max_skipped=5), torchrun=2)
    assert done.stderr.count('exitcode  : 3') == 2 and '5 updates in a row' in done.stdout
    assert list(steps.all_steps(tmp_path / 'run')) == [4]  # none from the bad streak at 8
    script(*flags('run', max_skipped=5), torchrun=2)            # without the fault it continues
    expected = undisturbed(2, max_skipped=5)
    same_run(tmp_path / 'run', expected)


LONG = dict(max_iters=60, eval_interval=10, log_interval=1, max_skipped=4, learning_rate=1e-3)


def test_a_loss_that_jumps_once_is_a_spike_and_nothing_else(flags, tmp_path):
    done = faulty('high_loss all 40', flags('run', **LONG))
    assert done.returncode == 0 and 'spikes: 1' in done.stdout
    [event] = events(tmp_path / 'run')
    assert event['event'] == 'spike' and event['step'] == 41
    scores = losses(tmp_path / 'run', 'loss_z')
    assert scores[40] > 6 and max(z for z in scores[20:40] + scores[41:]) < 6
    assert len(losses(tmp_path / 'run', 'grad_norm_z')) == 60


@pytest.mark.parametrize('kind', [pytest.param('nan', marks=pytest.mark.faults), 'high_loss'])
def test_a_rollback_leaves_the_bad_data_out(flags, tmp_path, kind):
    """Killed after the rollback and before the next save, it rolls back again: the same run."""
    args = flags('run', **LONG, rollback=True)
    done = faulty(f'{kind} all 43 4', args)
    assert done.returncode == 0 and 'rollbacks: 1' in done.stdout
    [event] = events(tmp_path / 'run', 'rollback')
    assert event['step'] == 47 and 'rolled back to step 40, skipping 7,168 tokens' in event['words']
    saved = checkpoints.load_training(tmp_path / 'run/step_0000060')['progress']
    assert saved['rollbacks'] == 1 and saved['position'] == (60 + 7) * 64
    again = flags('again', **LONG, rollback=True)
    process = begin(f'{kind} all 43 4', again, 1)
    try:
        deadline = time.time() + 300
        while time.time() < deadline and not events(tmp_path / 'again', 'rollback'):
            time.sleep(0.005)
    finally:
        kill_all(process, tmp_path)
    assert faulty(f'{kind} all 43 4', again).returncode == 0
    same_run(tmp_path / 'run', tmp_path / 'again')


def scale_losses(monkeypatch, first, last, factor=math.nan):
    """Multiply the losses of the data of the updates first .. last - 1 of a run."""
    real = train.forward_backward

    def forward_backward(seed, data, trainer, p, batch):
        loss = real(seed, data, trainer, p, batch)
        return loss * factor if first <= p.position // batch.sequences < last else loss

    monkeypatch.setattr(train, 'forward_backward', forward_backward)


def test_a_rollback_does_not_forget_the_best_step(config, tmp_path, monkeypatch):
    found = iter([5.0, 4.0, 3.0, 2.0, 1.0])                     # the best: step 40
    scale_losses(monkeypatch, 43, 47)
    monkeypatch.setattr(train, 'validate', lambda *_: Validation(next(found, 9.0), {}, 100))
    assert train.main(config(**LONG, rollback=True)) == 0
    assert events(tmp_path / 'run', 'rollback')
    assert steps.best(tmp_path / 'run').name == 'step_0000040'


def test_what_was_evaluated_before_a_rollback_is_not_evaluated_again(config, tmp_path,
                                                                     monkeypatch):
    """Validation, HellaSwag score and sample of step 40 are made once, those of 50 as usual."""
    scored = []

    def score_hellaswag(trainer, encoding, questions):
        scored.append(questions)
        return {'hellaswag': 0.25, 'hellaswag_sum': 0.25}

    scale_losses(monkeypatch, 43, 47)
    monkeypatch.setattr(train, 'load_questions', lambda *_: ['a question'])
    monkeypatch.setattr(train, 'score_hellaswag', score_hellaswag)
    cfg = config(**LONG, rollback=True, sample_interval=10, hellaswag_interval=20)
    assert train.main(cfg) == 0
    [event] = events(tmp_path / 'run', 'rollback')
    assert (event['step'], event['to_step']) == (47, 40)
    log = read_lines(tmp_path / 'run/log.jsonl')
    for key, interval in (('val_loss', 10), ('hellaswag', 20)):
        assert [r['step'] for r in log if key in r] == list(range(0, 61, interval)), key
    samples = read_lines(tmp_path / 'run/samples.jsonl')
    assert [r['step'] for r in samples] == list(range(0, 61, 10)) and len(scored) == 4
    assert [r['step'] for r in log if 'loss' in r] == [*range(1, 48), *range(41, 61)]


@pytest.mark.slow
def test_a_new_level_is_accepted_without_rollback(flags, tmp_path):
    done = faulty('high_loss all 40 20', flags('run', **LONG))
    assert done.returncode == 0
    assert [event['event'] for event in events(tmp_path / 'run')] == ['spike', 'level']


def test_rollbacks_are_not_endless(flags, tmp_path):
    done = faulty('nan all 30 100', flags('run', **LONG, rollback=True))
    assert done.returncode == 3
    assert len(events(tmp_path / 'run', 'rollback')) == MAX_ROLLBACKS
    assert max(steps.all_steps(tmp_path / 'run')) == 30


def test_a_rollback_that_does_not_help_ends_the_run(config, tmp_path, monkeypatch, capsys):
    """From the 30th update on every loss is a thousandfold, whatever the data: no new level."""
    scale_losses(monkeypatch, 30, 10 ** 9, factor=1000)
    assert train.main(config(**LONG, rollback=True)) == 3
    assert len(events(tmp_path / 'run', 'rollback')) == MAX_ROLLBACKS
    assert 'far too high' in capsys.readouterr().out


@pytest.mark.faults
def test_all_ranks_roll_back_together(flags, tmp_path):
    for parallel in ('ddp', 'fsdp'):
        done = faulty('nan 1 43 4', flags(parallel, **LONG, rollback=True, parallel=parallel),
                      torchrun=2)
        assert done.returncode == 0 and 'rollbacks: 1' in done.stdout, done.stderr
    assert losses(tmp_path / 'fsdp')[-1] == pytest.approx(losses(tmp_path / 'ddp')[-1], rel=1e-5)


# Kills and signals.

@pytest.mark.slow
@pytest.mark.parametrize('number', [
    'SIGTERM', *(pytest.param(name, marks=pytest.mark.faults)
                 for name in ('SIGINT', 'SIGHUP', 'SIGUSR1'))])
def test_a_signal_to_one_rank_stops_all_within_an_update(flags, undisturbed, tmp_path, number):
    done = faulty(f'{number} 1 6', flags('run', eval_interval=12), torchrun=2)
    assert done.returncode == 0 and 'the same command resumes' in done.stdout
    assert list(steps.all_steps(tmp_path / 'run')) == [7]
    script(*flags('run', eval_interval=12), torchrun=2)
    expected = undisturbed(2, eval_interval=12)
    same_run(tmp_path / 'run', expected)


@pytest.mark.slow
@pytest.mark.parametrize('kind', [
    pytest.param('kill_before_manifest', marks=pytest.mark.faults), 'kill_after_manifest'])
def test_killed_in_a_save_the_step_before_is_used(flags, undisturbed, tmp_path, kind):
    done = faulty(f'{kind} 0 8', flags('run'))
    assert done.returncode == -signal.SIGKILL
    assert list(steps.all_steps(tmp_path / 'run')) == [4]
    assert (tmp_path / 'run/.step_0000008.partial').exists()
    script(*flags('run'))
    assert not list((tmp_path / 'run').glob('.step*'))
    expected = undisturbed()
    same_run(tmp_path / 'run', expected)


@pytest.mark.slow
@pytest.mark.parametrize('kind', [
    'SIGTERM_in_save', pytest.param('SIGINT_in_save', marks=pytest.mark.faults)])
def test_signals_in_a_save_let_it_end(flags, undisturbed, tmp_path, kind):
    """Two signals at once."""
    assert faulty(f'{kind} 0 8', flags('run')).returncode == 0
    assert 8 <= max(steps.all_steps(tmp_path / 'run')) < 12
    script(*flags('run'))
    same_run(tmp_path / 'run', undisturbed())


@pytest.mark.slow
def test_a_signal_before_a_validation_ends_it_within_a_batch(flags, undisturbed, tmp_path):
    """Requested in the update before it: the validation is left to the resume."""
    args = flags('run', eval_interval=6)
    assert faulty('SIGTERM 0 5', args).returncode == 0
    assert list(steps.all_steps(tmp_path / 'run')) == [6]
    assert len(losses(tmp_path / 'run', 'val_loss')) == 1
    script(*args)
    expected = undisturbed(eval_interval=6)
    same_run(tmp_path / 'run', expected)


@pytest.mark.faults
def test_the_ranks_of_a_sharded_model_leave_a_validation_together(flags, tmp_path):
    args = flags('run', eval_interval=6, parallel='fsdp')
    assert faulty('SIGTERM 1 5', args, torchrun=2).returncode == 0
    assert list(steps.all_steps(tmp_path / 'run')) == [6]
    assert len(losses(tmp_path / 'run', 'val_loss')) == 1


def test_a_stop_in_the_middle_of_validation_leaves_it_to_the_resume(config, tmp_path, monkeypatch):
    train.main(config())
    expected = curve(tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run')
    calls, real = [], train.validate

    def validate(*args):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(train, 'validate', validate)
    assert train.main(config()) == 0
    assert len(losses(tmp_path / 'run', 'val_loss')) == 1
    assert 4 in steps.all_steps(tmp_path / 'run')
    monkeypatch.undo()
    train.main(config())
    assert curve(tmp_path / 'run') == expected


@pytest.mark.slow
def test_killed_while_it_compiles_nothing_is_lost(flags, undisturbed, tmp_path):
    expected = undisturbed()
    script(*flags('run', max_iters=4, lr_decay_iters=12))
    environment = {**os.environ, 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'cold')}
    process = subprocess.Popen([sys.executable, '-u', *map(str, flags('run', compile=True))],
                               cwd=ROOT, text=True, env=environment, stdout=subprocess.PIPE)
    for line in process.stdout:
        if line.startswith('compile: on'):
            break
    time.sleep(1)
    process.terminate()
    assert process.wait(timeout=300) == -signal.SIGTERM
    script(*flags('run'))
    same_run(tmp_path / 'run', expected)


@pytest.mark.faults
def test_torchrun_restarts_after_a_killed_worker(flags, undisturbed, tmp_path):
    expected = undisturbed(2)
    process = begin('SIGKILL 1 7', flags('run'), 2, '--max-restarts=3')
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    same_run(tmp_path / 'run', expected)


@pytest.mark.faults
def test_a_rank_that_hangs_times_out_and_is_restarted(flags, undisturbed, tmp_path):
    expected = undisturbed(2)
    process = begin('SIGSTOP 1 7', flags('run', timeout_minutes=0.1), 2, '--max-restarts=1')
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and 'imed out' in output, output
    same_run(tmp_path / 'run', expected)


@pytest.mark.faults
def test_a_save_that_outlasts_the_grace_period_leaves_nothing(flags, undisturbed, tmp_path):
    expected = undisturbed(2, max_iters=60, eval_interval=30)
    process = begin('slow_save all 20 40', flags('run', max_iters=60, eval_interval=30), 2,
                    '--shutdown-timeout=3')
    try:
        wait_for_step(process, tmp_path / 'run', 20)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=300)
    finally:
        kill_all(process, tmp_path)
    assert list(steps.all_steps(tmp_path / 'run')) == []
    script(*flags('run', max_iters=60, eval_interval=30), torchrun=2)
    same_run(tmp_path / 'run', expected)


@pytest.mark.faults
def test_ranks_that_see_different_checkpoints_take_that_of_rank_0(flags, undisturbed, tmp_path):
    expected = undisturbed(2)
    script(*flags('run', max_iters=8, lr_decay_iters=12), torchrun=2)
    assert faulty('blind 1 0', flags('run'), torchrun=2).returncode == 0
    same_run(tmp_path / 'run', expected)


@pytest.mark.slow
def test_a_plan_names_what_another_machine_lacks(flags):
    done = faulty('no_data 1 0', flags('run', plan=True), torchrun=2)
    assert done.stderr.count('exitcode  : 2') == 2, done.stderr
    assert 'data        FAILS: no data here (rank 1)' in done.stdout
    assert 'update takes' not in done.stdout


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(flags, undisturbed, tmp_path):
    assert faulty('clock 0 0', flags('run', save_minutes=1000.0)).returncode == 0
    expected = undisturbed(save_minutes=1000.0)
    same_run(tmp_path / 'run', expected)


@pytest.mark.faults
def test_collectives_match(flags):
    """torch's own check of every collective: validations, saves and samples included. (With DDP
    on gloo torch 2.13 ends in a segmentation fault under this check, whatever it trains.)"""
    done = script(*flags('run', max_iters=5, sample_interval=2, parallel='fsdp'), torchrun=2,
                  env={**os.environ, 'TORCH_DISTRIBUTED_DEBUG': 'DETAIL'})
    assert 'finished 5 updates' in done.stdout


# Disks.

def disk(folder, megabytes, *options):
    """A small file system of its own in `folder`, for root only."""
    folder.mkdir()
    made = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={megabytes}m', 'tmpfs', folder],
                          capture_output=True) if shutil.which('mount') else None
    if made is None or made.returncode:
        pytest.skip('small file systems need root: mount -t tmpfs')
    return folder


@pytest.fixture
def small(tmp_path):
    folder = disk(tmp_path / 'small', 16)
    yield folder
    subprocess.run(['umount', '-l', folder])


@pytest.mark.faults
def test_a_disk_that_fills_up_costs_a_checkpoint_and_not_the_run(flags, undisturbed, tmp_path,
                                                                 small):
    options = dict(max_iters=160, eval_interval=20, n_embd=64)
    process = start(flags('small/run', **options), 1)
    try:
        wait_for_step(process, small / 'run', 30)
        ballast = small / 'ballast'
        with open(ballast, 'wb', buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass
        deadline = time.time() + 300
        while time.time() < deadline and process.poll() is None:
            line = process.stdout.readline()
            if 'cannot save' in line:
                break
        assert 'No space left' in line and 'continuing' in line
        ballast.unlink()
        output = process.communicate(timeout=300)[0]
    finally:
        kill_all(process, tmp_path)
    assert process.returncode == 0 and 'finished 160 updates' in output, output
    expected = undisturbed(**options)
    assert weights(small / 'run', 160) == weights(expected, 160)
    assert not list((small / 'run').glob('.step*'))


@pytest.mark.slow
def test_when_the_last_save_fails_the_status_says_so(flags, undisturbed, tmp_path):
    """RLIMIT_FSIZE: no file may be longer; the log is shorter."""
    script(*flags('run', max_iters=4, lr_decay_iters=12))
    done = script(*flags('run'), check=False, preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (20_000, 20_000)))
    assert done.returncode == 2 and 'finished 12 updates' in done.stdout
    assert 'could not be saved' in done.stderr and 'Traceback' not in done.stderr
    assert list(steps.all_steps(tmp_path / 'run')) == [4]
    script(*flags('run'))
    expected = undisturbed()
    assert weights(tmp_path / 'run') == weights(expected)


def test_a_log_on_a_full_disk_loses_lines_and_not_the_run(config, monkeypatch, capsys):
    class FullLog(run.Log):
        def __init__(self, *args):
            super().__init__(*args)
            self.file = open('/dev/full', 'ab', buffering=0)

    monkeypatch.setattr(run, 'Log', FullLog)
    assert train.main(config()) == 0
    text = capsys.readouterr().out
    assert text.count('No space left') == 1 and 'finished 12 updates' in text


def test_too_little_room_is_found_before_the_first_update(config, monkeypatch):
    monkeypatch.setattr(budget.shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(
        10 ** 9, 10 ** 9 - 10 ** 5, 10 ** 5))
    with pytest.raises(ValueError, match=r'disk: 4 checkpoints of .* MB free\. Make room'):
        train.main(config())


def test_a_checkpoint_is_as_large_as_was_computed(config, tmp_path):
    for optimizer in ('adamw', 'muon'):
        cfg = config(n_embd=128, max_iters=1, optimizer=optimizer,
                     out_dir=str(tmp_path / optimizer))
        train.main(cfg)
        folder = tmp_path / optimizer / 'step_0000001'
        model, _ = checkpoints.load_folder(folder)
        found = sum(file.stat().st_size for file in folder.iterdir())
        assert budget.checkpoint_bytes(model, optimizer) == pytest.approx(found, rel=0.05)


def test_a_folder_that_cannot_be_written(flags, small):
    subprocess.run(['mount', '-o', 'remount,ro', small], check=True)
    done = script(*flags('small/run'), check=False)
    assert done.returncode == 2 and 'Read-only file system' in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = script(*flags('small/run', plan=True), check=False)
    assert done.returncode == 2 and 'cannot be written' in done.stdout


# Memory.

def test_out_of_memory_names_the_next_micro_batch(flags):
    """With half of 4,096 sequences the same update would fit."""
    done = faulty('memory all 0', flags('run', batch_size=4096, total_batch_size=4096 * 16 * 2,
                                        n_embd=256))
    assert done.returncode == 2 and 'out of memory' in done.stderr, done.stderr
    assert '--batch_size=2048 --total_batch_size=131072' in done.stderr


# The long ones.

@pytest.mark.faults
def test_twenty_runs_end_cleanly(flags):
    """A process that used gloo may abort at a normal exit; none does."""
    for i in range(20):
        script(*flags(f'run{i}', max_iters=1, eval_interval=100), torchrun=2)


def chaos(flags, tmp_path, seconds, worlds, longest=12, **options):
    """Kills and signals at random moments, under an outer loop, until `seconds` have passed and
    the run has ended: (starts, hits)."""
    rng, ends, starts, hits = random.Random(time.time_ns()), time.time() + seconds, 0, 0
    while True:
        process = start(flags('run', **options), rng.choice(worlds))
        starts += 1
        try:
            wait = rng.uniform(3, longest) if time.time() < ends else 600
            process.communicate(timeout=wait)
        except subprocess.TimeoutExpired:
            hits += 1
            victims = pids(tmp_path / 'run')
            way = rng.choice(['all', 'worker', 'torchrun', 'SIGTERM', 'SIGINT'])
            if way in ('SIGTERM', 'SIGINT'):
                process.send_signal(getattr(signal, way))
            elif way != 'all' and victims:
                os.kill(victims[-1] if way == 'worker' else victims[0], signal.SIGKILL)
            try:
                process.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                pass
        finally:
            kill_all(process, tmp_path / 'run')
        if process.returncode == 0 and options['max_iters'] in steps.all_steps(tmp_path / 'run'):
            return starts, hits


@pytest.mark.faults
def test_half_a_minute_of_chaos(flags, undisturbed, tmp_path):
    options = dict(max_iters=400, eval_interval=20, save_minutes=0.02)
    expected = undisturbed(2, **options)
    starts, hits = chaos(flags, tmp_path, 20, [2], longest=8, **options)
    print(f'{starts} starts, {hits} kills')
    same_run(tmp_path / 'run', expected)


@pytest.mark.faults
def test_ten_minutes_of_chaos_on_changing_worlds(flags, undisturbed, tmp_path):
    seconds = 60 * float(os.environ.get('CHAOS_MINUTES', 10))
    options = dict(max_iters=2000, eval_interval=200)
    folders = tmp_path / 'run', undisturbed(**options)
    starts, hits = chaos(flags, tmp_path, seconds, [1, 2, 4], save_minutes=0.05, **options)
    found, expected = (losses(folder, 'val_loss')[-1] for folder in folders)
    print(f'{starts} starts, {hits} kills: {found} instead of {expected}')
    assert found == pytest.approx(expected, rel=1e-3)           # as worlds without faults differ
