"""What is printed is never worth the run: readers, terminals and disks under it that go away."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

LINES = ('device cpu', 'step 1/', 'finished 40 updates')


@pytest.fixture
def start(flags, tmp_path):
    """A function that starts a run of 40 updates in tmp_path/run; options: of Popen."""
    processes = []

    def begin(max_iters=40, **options):
        command = [sys.executable, *map(str, flags('run', max_iters=max_iters))]
        processes.append(subprocess.Popen(command, cwd=ROOT, **options))
        return processes[-1]
    yield begin
    for process in processes:
        process.kill()
        process.wait()


def wait_for(path, text='', seconds=300):
    deadline = time.monotonic() + seconds
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < deadline, f'{path}: no {text!r}'
        time.sleep(0.02)


def check_finished(process, folder):
    assert process.wait(300) == 0
    assert (folder / 'step_0000040/manifest.json').exists()
    text = (folder / 'train.log').read_text()
    assert all(line in text for line in LINES), text


def test_a_reader_that_leaves_after_a_line(start, tmp_path):
    process = start(stdout=subprocess.PIPE)
    assert process.stdout.readline().startswith(b'new run in')
    process.stdout.close()
    check_finished(process, tmp_path / 'run')


SLOW = pytest.mark.slow


@pytest.mark.parametrize('closed', [(1,), pytest.param((2,), marks=SLOW),
                                    pytest.param((0, 1, 2), marks=SLOW)])
def test_streams_that_are_closed(start, tmp_path, closed):
    process = start(preexec_fn=lambda: [os.close(number) for number in closed])
    check_finished(process, tmp_path / 'run')
    for path in (tmp_path / 'run').rglob('*.json*'):        # no line of output went into a file
        assert b'lr 1' not in path.read_bytes(), path


def test_a_full_disk_under_the_output(start, tmp_path):
    with open('/dev/full', 'w') as full:
        check_finished(start(stdout=full, stderr=full), tmp_path / 'run')


@SLOW
def test_lines_are_in_a_file_when_they_are_written(start, tmp_path):
    with open(tmp_path / 'out.txt', 'w') as out:
        process = start(100_000, stdout=out)
        wait_for(tmp_path / 'out.txt', 'step 5/')
        assert process.poll() is None


def test_the_last_line_is_seen_though_the_reader_has_left(start, tmp_path):
    """`| tee log` dies of the same Ctrl-C; the terminal still has standard error."""
    process = start(max_iters=10 ** 6, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(tmp_path / 'run/train.log', 'step 1/')
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert b'the same command resumes' in process.stderr.read() and process.wait(300) == 0


@pytest.mark.parametrize('number', [signal.SIGINT, pytest.param(signal.SIGTERM, marks=SLOW),
                                    pytest.param(signal.SIGHUP, marks=SLOW)])
def test_a_signal_after_the_reader_has_left(start, tmp_path, number):
    """As `train.py 2>&1 | tee log` gets Ctrl-C: a terminal signals both, and tee may end first."""
    process = start(100_000, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.readline()
    wait_for(tmp_path / 'run/train.log', 'step 5/')
    process.stdout.close()
    process.send_signal(number)
    check_stopped(process, tmp_path / 'run')


def test_a_terminal_that_is_gone(start, tmp_path):
    """As a connection that drops: SIGHUP, and an error for each write to the terminal."""
    master, slave = pty.openpty()
    process = start(100_000, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    wait_for(tmp_path / 'run/train.log', 'step 5/')
    os.close(master)
    process.send_signal(signal.SIGHUP)
    check_stopped(process, tmp_path / 'run')


def check_stopped(process, folder):
    assert process.wait(300) == 0
    text = (folder / 'train.log').read_text()
    step = int(text.partition('stopped at step ')[2].partition(',')[0])
    assert (folder / f'step_{step:07d}/manifest.json').exists()
    assert 'ending after this update, with a checkpoint' in text


def test_the_log_goes_on_when_the_run_resumes(start, tmp_path):
    assert start(20, stdout=subprocess.DEVNULL).wait(300) == 0
    check_finished(start(), tmp_path / 'run')
    text = (tmp_path / 'run/train.log').read_text()
    assert text.index('finished 20 updates') < text.index('resuming from')


@SLOW
def test_why_a_run_ended_is_in_its_log(start, tmp_path):
    process = start(100_000, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(tmp_path / 'run/train.log', 'step 5/')
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    assert process.wait(300) in (0, 130)                             # the second may come too late
    text = (tmp_path / 'run/train.log').read_text()
    assert 'ending after this update' in text
    assert 'stopped at step' in text or 'ended, without a checkpoint' in text


@pytest.mark.parametrize('command', [['plot.py', '--help'],
                                     ['sample.py', '--model=checkpoint', '-m', '1']])
def test_other_scripts_say_when_their_output_is_lost(command):
    with open('/dev/full', 'w') as full:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=full,
                              stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"{command[0]}: [Errno 28] No space left on device: 'standard output'")
    assert done.stderr.count('No space') == 1
