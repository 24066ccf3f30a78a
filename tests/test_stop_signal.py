"""The signals that end a run."""

import signal

import pytest

from gpt.stop_signal import StopSignal
from gpt.world import World


def test_a_second_ctrl_c_ends_at_once_but_not_the_one_that_torchrun_repeats(capfd):
    for under_torchrun in (True, False):
        stop = StopSignal(World())
        stop.debounce_seconds = 2 * under_torchrun
        try:
            signal.raise_signal(signal.SIGINT)
            assert stop.received
            if under_torchrun:
                signal.raise_signal(signal.SIGINT)
                stop.since -= 3                                  # later
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        finally:
            stop.restore()
    assert capfd.readouterr().err == 2 * (
        'ending after this update, with a checkpoint; Ctrl-C again ends at once, without one\n'
        'ended, without a checkpoint\n')


def test_a_signal_that_is_ignored_stays_ignored():
    """As nohup does."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopSignal(World())
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == stop.receive
        stop.restore()
        assert signal.getsignal(signal.SIGTERM) != stop.receive
    finally:
        signal.signal(signal.SIGHUP, before)
