"""The files that a run appends to, and the tasks that run beside it."""

import json
import math
import threading

import torch

from gpt.log import BackgroundWorker, Log, Stopwatch, duration
from gpt.world import World


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_not_finite_becomes_null(tmp_path):
    log = Log(tmp_path, World())
    log.write(step=1, loss=math.nan, norm=math.inf, lr=0.5, mfu=None)
    log.close()
    assert read(tmp_path / 'log.jsonl') == [
        {'step': 1, 'loss': None, 'norm': None, 'lr': 0.5, 'mfu': None}]


def test_a_torn_last_line_is_cut_off_and_the_others_stay(tmp_path):
    (tmp_path / 'log.jsonl').write_text('{"step": 1}\n{"step": 2, "lo')
    log = Log(tmp_path, World())
    log.write(step=2)
    log.close()
    assert read(tmp_path / 'log.jsonl') == [{'step': 1}, {'step': 2}]


def test_events_and_samples_are_logged_and_printed(tmp_path, capsys):
    log = Log(tmp_path, World())
    log.event(3, 'spike', 'a loss of 9', left_out=5)
    log.sample(4, 'Once')
    log.start(0)
    log.close()
    assert read(tmp_path / 'log.jsonl') == [
        {'step': 3, 'event': 'spike', 'words': 'a loss of 9', 'left_out': 5}]
    assert read(tmp_path / 'samples.jsonl') == [{'step': 4, 'text': 'Once'}]
    [start] = read(tmp_path / 'starts.jsonl')
    assert start['processes'] == 1 and start['torch'] == torch.__version__
    assert capsys.readouterr().out == "step 3: a loss of 9\nstep 4: sample: 'Once'\n"


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = Log(tmp_path, World(rank=1, size=2))
    log.start_wandb('project', 'name', {})
    log.event(3, 'spike', 'a loss of 9')
    log.sample(4, 'Once')
    log.start(0)
    log.close()
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_a_stopwatch_gives_means_since_it_was_read(monkeypatch):
    now = iter([0.0, 1.0, 5.0, 8.0, 10.0, 11.0])
    monkeypatch.setattr('gpt.log.time.perf_counter', lambda: next(now))
    watch = Stopwatch()
    for tokens in (100, 300):
        watch.start()
        watch.stop(tokens)
    assert watch.read() == (2.0, 100.0)
    watch.start()
    assert watch.stop(50) == 1.0
    assert watch.read() == (1.0, 50.0)


def test_durations():
    assert [duration(s) for s in (0, 90, 3725.4)] == ['0:00', '1:30', '1:02:05']


def test_tasks_are_done_in_order_beside_the_run_until_one_fails():
    done, reported, wait = [], [], threading.Event()
    worker = BackgroundWorker(reported.append, 'mirror')
    worker.do(lambda: wait.wait(10))
    worker.do(lambda: done.append(1))
    assert not done
    wait.set()
    worker.do(lambda: 1 / 0)
    worker.do(lambda: done.append(2))
    worker.end(10)
    assert done == [1]
    assert reported == ['mirror: ZeroDivisionError: division by zero; continuing without it']


def test_a_task_that_hangs_is_left_behind():
    reported, release = [], threading.Event()
    worker = BackgroundWorker(reported.append, 'mirror')
    worker.do(lambda: release.wait(10))
    worker.end(0.05)
    assert reported == ['mirror: no answer for 0.05 s; leaving without it']
    release.set()
