"""The counters of a run, how its updates are judged, and the numbers on their way to it."""

import math
import random
from dataclasses import fields

import pytest
import torch

from gpt.progress import Metrics, PendingMetrics, Progress, SpikeDetector


def feed(p, *losses, spike_z=6.0, norm=1.0):
    """Updates with these losses: their events."""
    events = []
    for loss in losses:
        p.advance(4)
        events.append(p.judge(Metrics(p.step, loss, False, False, norm), spike_z))
    return events


def healthy(updates=30):
    """A Progress after updates with losses near 3."""
    p, rng = Progress(), random.Random(0)
    feed(p, *(rng.gauss(3, 0.1) for _ in range(updates)))
    return p


def test_a_spike_is_counted_once_and_the_updates_before_it_are_good():
    p = healthy()
    first, second = feed(p, 5.0, 6.0)
    assert first.kind == 'spike' and 'standard deviations above recent losses' in first.text
    assert second is None
    assert (p.spikes, p.bad, p.not_finite, p.good_until, p.is_healthy) == (1, 2, 0, 30, False)
    assert feed(p, 3.0) == [None]
    assert (p.spikes, p.bad, p.good_until, p.is_healthy) == (1, 0, 33, True)
    assert feed(p, 9.0, spike_z=0.0) == [None]                      # no limit


@pytest.mark.parametrize('loss, norm', [(math.nan, 1.0), (3.0, math.inf)])
def test_an_update_that_is_not_finite_is_skipped_and_not_learned_from(loss, norm):
    p = healthy()
    before = dict(p.detector.state)
    events = feed(p, loss, loss, norm=norm)
    assert [event.kind for event in events] == ['skipped', 'skipped']
    assert '(2 so far)' in events[1].text
    assert (p.skipped, p.bad, p.not_finite, p.spikes) == (2, 2, 2, 0)
    assert p.detector.state == before
    feed(p, 9.0)                                                    # a spike among them
    assert (p.bad, p.not_finite) == (3, 0)


def test_a_new_level_is_no_spike_after_the_baseline_was_reset():
    p = healthy()
    feed(p, *[9.0] * 4)
    p.accept_level()
    assert feed(p, *[9.0] * 40) == [None] * 40 and p.spikes == 1 and p.is_healthy


def test_what_is_due():
    p = Progress(step=12)
    assert p.due(4) and p.due(12) and not p.due(5) and not p.due(0)
    p.rolled_back_to = 12
    assert not p.due(4)
    p.advance(1)
    assert p.due(13)


def test_patience_counts_from_the_lowest_validation_saved_or_not():
    p = Progress(step=4)
    p.count_validation(4.0)
    p.step = 8
    p.count_validation(3.0)
    assert (p.lowest_step, p.lowest_val_loss, p.best_step) == (8, 3.0, -1)
    p.step = 12
    p.count_validation(3.5)
    assert p.lowest_step == 8
    assert not p.out_of_patience(8) and p.out_of_patience(4) and not p.out_of_patience(0)
    p.forget_validations()
    p.count_validation(9.0)
    assert p.lowest_step == 12


def test_a_state_dict_holds_all_that_a_resume_needs():
    p = healthy()
    feed(p, math.nan, 9.0)
    p.count_validation(2.0)
    p.diverged = True                                               # such a step is never saved
    saved = p.state_dict()
    plain = {int, float, str, bool, tuple, dict}
    assert all(type(value) in plain for part in saved.values() for value in part.values())
    again = Progress.restore(saved)
    for field in fields(Progress):
        if field.name not in Progress.NOT_SAVED:
            assert getattr(again, field.name) == getattr(p, field.name), field.name
    assert again.detector.state == p.detector.state and not again.diverged
    assert Progress.restore({}).state_dict() == Progress().state_dict()


def test_a_rollback_keeps_the_counts_and_the_position_of_the_run():
    p = healthy()
    saved = p.state_dict()
    feed(p, 9.0, math.nan, 9.0)
    p.count_validation(2.0)
    p.best_step = p.step
    back = p.roll_back(saved)
    assert (back.step, back.position) == (30, 33 * 4)
    assert (back.skipped, back.spikes, back.rollbacks) == (1, 1, 1)
    assert (back.bad, back.good_until, back.is_healthy) == (0, 30, True)
    assert (back.best_step, back.lowest_step, back.rolled_back_to) == (33, 33, 30)


def test_metrics_are_read_at_once_on_a_cpu():
    pending = PendingMetrics(torch.device('cpu'))
    pending.push(1, torch.tensor([3.0, 0.0, 2.0, 1.5]))
    assert list(pending.read(everything=False)) == [Metrics(1, 3.0, False, True, 1.5)]
    pending.push(2, torch.tensor([3.0, 1.0, 0.0, 1.5]))
    pending.clear()
    assert not list(pending.read(everything=True))


def test_on_a_gpu_the_newest_metrics_stay_pending_unless_one_asks_to_stop():
    pending = PendingMetrics(torch.device('cuda'))
    for step in (1, 2):
        pending.push(step, torch.tensor([3.0, 0.0, 0.0, 1.5]))
    assert [m.step for m in pending.read(everything=False)] == [1]
    assert [m.step for m in pending.read(everything=True)] == [2]
    for step, stop in ((3, 1.0), (4, 0.0)):
        pending.push(step, torch.tensor([3.0, stop, 0.0, 1.5]))
    assert [m.step for m in pending.read(everything=False)] == [3, 4]


# Spikes.

def test_z_scores_are_those_of_the_last_hundred():
    rng, detector = random.Random(0), SpikeDetector()
    for i in range(400):
        loss, norm = rng.gauss(3, 0.1), rng.gauss(1, 0.05)
        scores = detector.scores(loss, norm)
        assert (scores == (None, None)) == (i < SpikeDetector.WARMUP)
        detector.learn(loss, norm)
    assert abs(detector.z('loss', 3.5) - 5) < 1 and abs(detector.z('norm', 0.9) + 2) < 0.7
    assert detector.scores(float('nan'), float('inf')) == (None, None)
    again = SpikeDetector(detector.state)
    assert again.scores(3.3, 1.1) == detector.scores(3.3, 1.1)
    again.learn(9.0, 9.0)
    assert again.state != detector.state                               # a copy


def test_a_loss_that_falls_is_no_spike():
    detector = SpikeDetector()
    for i in range(300):
        loss = 8 * 0.99 ** i + 2
        z = detector.scores(loss, 1.0)[0]
        assert z is None or z < 1
        detector.learn(loss, 1.0)
