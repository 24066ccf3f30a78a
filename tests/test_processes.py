"""
Runs of several real processes under torchrun: the same bits after any stop, the same data on any
world size.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import ROOT, curve, losses, script

from gpt import steps

pytestmark = pytest.mark.slow


def start(args, world):
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone',
                f'--nproc_per_node={world}']
    return subprocess.Popen([*(launcher if world > 1 else [sys.executable]), *map(str, args)],
                            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)


def wait_for_step(process, folder, step):
    """Until the log of the run has reached `step`."""
    log, deadline = folder / 'log.jsonl', time.time() + 300
    while time.time() < deadline and process.poll() is None:
        if log.exists() and f'"step": {step},' in log.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(process.stdout.read())


def pids(folder):
    """The processes with `folder` on their command line: torchrun first, then its workers."""
    found = []
    for path in Path('/proc').glob('[0-9]*/cmdline'):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            pass                                                    # it has just ended
    return sorted(found)


def kill_all(process, folder):
    for pid in pids(folder):
        os.kill(pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize('world, optimizer', [
    (4, 'adamw'), *(pytest.param(*both, marks=pytest.mark.faults)
                    for both in ((2, 'adamw'), (4, 'muon')))])
def test_a_resume_is_exact_on_any_number_of_processes(flags, undisturbed, tmp_path, world,
                                                      optimizer):
    """Four ranks, since two cannot show that DDP adds in another order after a restart. (One
    process: test_train.py.)"""
    expected = undisturbed(world, optimizer=optimizer)
    script(*flags('stopped', optimizer=optimizer, max_iters=5, lr_decay_iters=12), torchrun=world)
    script(*flags('stopped', optimizer=optimizer), torchrun=world)
    uninterrupted, resumed = curve(expected), curve(tmp_path / 'stopped')
    resumed[5] = resumed[5][:3] + uninterrupted[5][3:]              # validated where it stopped
    assert resumed == uninterrupted and len(uninterrupted) == 13
    assert checkpoint_bytes(expected) == checkpoint_bytes(tmp_path / 'stopped')


def checkpoint_bytes(folder):
    return (folder / 'step_0000012/model.safetensors').read_bytes()


@pytest.mark.parametrize('optimizer, tolerance', [
    ('adamw', 1e-5), pytest.param('muon', 1e-4, marks=pytest.mark.faults)])
def test_world_sizes_agree_to_rounding_dropout_included(flags, tmp_path, optimizer, tolerance):
    """1 process x 4 micro-batches, 2 x 2, and 4 -> 1 -> 2 processes in one run: the same losses."""
    options = {'optimizer': optimizer, 'batch_size': 16}
    for world in (1, 2):
        script(*flags(f'w{world}', **options), torchrun=world)
    for world, max_iters in ((4, 4), (1, 8), (2, 12)):
        script(*flags('mixed', **options, max_iters=max_iters, lr_decay_iters=12), torchrun=world)
    reference = losses(tmp_path / 'w1')
    for name in ('w2', 'mixed'):
        found = losses(tmp_path / name)
        worst = max(abs(a - b) / a for a, b in zip(reference, found, strict=True))
        print(f'{optimizer} {name}: largest relative difference {worst:.1e}')
        assert worst < tolerance
        expected = losses(tmp_path / 'w1', 'val_loss')[-1]
        assert losses(tmp_path / name, 'val_loss')[-1] == pytest.approx(expected, rel=tolerance)


# Sharded.

@pytest.mark.faults
@pytest.mark.parametrize('optimizer, tolerance', [('adamw', 1e-5), ('muon', 1e-4)])
def test_a_sharded_model_trains_as_a_replicated_one_does(flags, undisturbed, tmp_path, optimizer,
                                                    tolerance):
    """On 2 and 4 processes; and one run on 2 replicated, 4 sharded, one process, 2 sharded."""
    options = {'optimizer': optimizer}
    uninterrupted = undisturbed(2, **options)
    for world in (2, 4):
        script(*flags(f's{world}', **options, parallel='fsdp', sample_interval=6), torchrun=world)
    for world, parallel, max_iters in ((2, 'ddp', 3), (4, 'fsdp', 6), (1, 'fsdp', 9),
                                       (2, 'fsdp', 12)):
        script(*flags('mixed', **options, parallel=parallel, max_iters=max_iters,
                      lr_decay_iters=12), torchrun=world)
    reference = losses(uninterrupted)
    for name in ('s2', 's4', 'mixed'):
        found = losses(tmp_path / name)
        worst = max(abs(a - b) / a for a, b in zip(reference, found, strict=True))
        print(f'{optimizer} {name}: largest relative difference {worst:.1e}')
        assert worst < tolerance
        expected = losses(uninterrupted, 'val_loss')[-1]
        assert losses(tmp_path / name, 'val_loss')[-1] == pytest.approx(expected, rel=tolerance)
    assert (tmp_path / 's2/samples.jsonl').read_text().count('\n') == 3


@pytest.mark.parametrize('world, optimizer', [
    (2, 'muon'), pytest.param(4, 'adamw', marks=pytest.mark.faults)])
def test_a_sharded_run_resumes_exactly(flags, undisturbed, tmp_path, world, optimizer):
    options = {'optimizer': optimizer, 'parallel': 'fsdp', 'checkpoint_activations': True}
    uninterrupted = undisturbed(world, **options)
    script(*flags('stopped', **options, max_iters=4, lr_decay_iters=12), torchrun=world)
    script(*flags('stopped', **options), torchrun=world)
    assert curve(uninterrupted) == curve(tmp_path / 'stopped')
    assert checkpoint_bytes(uninterrupted) == checkpoint_bytes(tmp_path / 'stopped')


@pytest.mark.faults
def test_a_sharded_model_computes_in_bfloat16(flags, undisturbed, tmp_path):
    """Parameters and gradient sums stay float32; what attention and MLP gather does not."""
    options = {'dtype': 'bfloat16', 'dropout': 0.0}
    script(*flags('run', **options, parallel='fsdp', checkpoint_activations=True), torchrun=2)
    found, expected = losses(tmp_path / 'run'), losses(undisturbed(2, **options))
    worst = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
    print(f'largest relative difference {worst:.1e}')
    assert worst < 1e-3
    weights = safetensors.torch.load_file(tmp_path / 'run/step_0000012/model.safetensors')
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())


@pytest.mark.faults
def test_a_sharded_model_compiles(flags, tmp_path):
    script(*flags('eager', parallel='fsdp', dropout=0.0, max_iters=4), torchrun=2)
    done = script(*flags('compiled', parallel='fsdp', dropout=0.0, max_iters=4, compile=True),
                  torchrun=2)
    assert 'compiled in' in done.stdout, done.stdout
    assert losses(tmp_path / 'compiled') == pytest.approx(losses(tmp_path / 'eager'), rel=1e-5)


@pytest.mark.faults
def test_sharding_takes_less_memory(flags):
    """43M parameters, 4 processes: the peak of one by --plan."""
    peaks = {}
    for parallel in ('ddp', 'fsdp'):
        done = script(*flags(parallel, parallel=parallel, n_layer=6, n_embd=768, plan=True,
                            total_batch_size=4 * 4 * 16),
                      torchrun=4)
        size, unit = re.search(r'peak memory of this process: ([\d.]+) ([MG])B',
                               done.stdout).groups()
        peaks[parallel] = float(size) * {'M': 1, 'G': 1000}[unit]
    print(peaks)
    assert peaks['fsdp'] < 0.75 * peaks['ddp']


@pytest.mark.parametrize('number, world', [
    (signal.SIGTERM, 1), *(pytest.param(*both, marks=pytest.mark.faults) for both in (
        (signal.SIGTERM, 2), (signal.SIGINT, 1), (signal.SIGINT, 2)))])
def test_a_signal_ends_in_a_checkpoint(flags, undisturbed, tmp_path, world, number):
    """SIGTERM or Ctrl-C, to the process or to torchrun: saved within an update, and the resumed
    run equals one without a stop."""
    torchrun = world if world > 1 else 0
    uninterrupted = undisturbed(torchrun, max_iters=60, eval_interval=60)
    process = start(flags('run', max_iters=60, eval_interval=60), world)
    try:
        wait_for_step(process, tmp_path / 'run', 20)
        process.send_signal(number)
        output = process.communicate(timeout=300)[0]
    finally:
        kill_all(process, tmp_path)
    assert output.count('ending after this update') == 1
    assert 'the same command resumes' in output and (world > 1 or process.returncode == 0), output
    step = max(steps.all_steps(tmp_path / 'run'))
    assert 20 <= step < 60 and not steps.problem(tmp_path / f'run/step_{step:07d}')
    script(*flags('run', max_iters=60, eval_interval=60), torchrun=torchrun)
    assert curve(tmp_path / 'run') == curve(uninterrupted)


@pytest.mark.faults
@pytest.mark.parametrize('victim', ['worker', 'everything'])
def test_kill_9_costs_the_steps_since_the_last_save(flags, undisturbed, tmp_path, victim):
    options = dict(max_iters=120, eval_interval=10)
    uninterrupted = undisturbed(2, **options)
    process = start(flags('run', **options), 2)
    try:
        wait_for_step(process, tmp_path / 'run', 25)
        if victim == 'worker':
            os.kill(pids(tmp_path)[-1], signal.SIGKILL)
            assert process.wait(timeout=300) != 0
    finally:
        kill_all(process, tmp_path)
    assert 120 not in steps.all_steps(tmp_path / 'run')
    script(*flags('run', **options), torchrun=2)
    assert curve(tmp_path / 'run') == curve(uninterrupted)


@pytest.mark.faults
def test_killed_in_a_save_the_checkpoint_before_is_used(flags, undisturbed, tmp_path):
    """Killed while files of step 40 are in the temporary folder, which has no final name: step 20
    is used."""
    options = dict(max_iters=60, eval_interval=20, n_embd=128)
    uninterrupted = undisturbed(**options)
    for _ in range(5):                                              # until a kill is in time
        process = start(flags('run', **options), 1)
        while process.poll() is None and not (tmp_path / 'run/.step_0000040.partial').exists():
            time.sleep(0.0005)
        kill_all(process, tmp_path)
        if not (tmp_path / 'run/step_0000040').exists():
            break
        subprocess.run(['rm', '-rf', tmp_path / 'run'])
    assert list(steps.all_steps(tmp_path / 'run')) == [20]
    script(*flags('run', **options))
    assert curve(tmp_path / 'run') == curve(uninterrupted)


@pytest.mark.faults
def test_orphans_of_a_killed_torchrun_keep_others_out(flags, tmp_path):
    process = start(flags('run', max_iters=100_000, eval_interval=100_000), 2)
    try:
        wait_for_step(process, tmp_path / 'run', 5)
        os.kill(process.pid, signal.SIGKILL)                    # torchrun alone, not its workers
        refused = script(*flags('run'), check=False)
        assert (refused.returncode == 2
                and 'another process is training in this folder' in refused.stderr)
    finally:
        kill_all(process, tmp_path)


def test_validation_is_the_same_on_any_world_size(flags, tmp_path):
    """Fewer validation batches than ranks, and a number of them that 3 does not divide."""
    found = []
    for world in (1, 2, 3):
        script(*flags(f'v{world}', max_iters=0, batch_size=3, total_batch_size=12 * 3 * 16,
                      eval_tokens=200), torchrun=world)
        found.append(losses(tmp_path / f'v{world}', 'val_loss')[0])
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


def test_bad_input_ends_every_rank_with_one_line(flags):
    done = script(*flags('run', dataset='nowhere'), torchrun=2, check=False)
    assert done.returncode != 0 and 'python data/prepare.py --name=nowhere' in done.stderr
    assert 'exitcode  : 2' in done.stderr


@pytest.mark.faults
def test_several_processes_with_bfloat16_and_compile(flags, tmp_path):
    script(*flags('uninterrupted', dtype='bfloat16', compile=True, max_iters=8), torchrun=2)
    script(*flags('stopped', dtype='bfloat16', compile=True, max_iters=4, lr_decay_iters=8),
           torchrun=2)
    script(*flags('stopped', dtype='bfloat16', compile=True, max_iters=8), torchrun=2)
    assert curve(tmp_path / 'uninterrupted') == curve(tmp_path / 'stopped')
    assert losses(tmp_path / 'uninterrupted', 'val_loss')[0] > 0
