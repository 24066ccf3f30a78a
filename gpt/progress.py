"""
How far a run has come, how its updates went, and what to do when they go wrong.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch

MAX_ROLLBACKS = 5           # of a run: what happens again and again is not the data


class Event(NamedTuple):
    """Something the log should note."""
    kind: str
    text: str


class Metrics(NamedTuple):
    """The numbers of one update, as every rank sees them."""
    step: int               # updates done, this one included
    loss: float
    stop: bool              # whether any rank asks to stop,
    save: bool              # and to save
    norm: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.norm) and math.isfinite(self.loss)


class SpikeDetector:
    """How unusual an update is: z-scores of its loss and its gradient norm.

    Mean and variance are exponentially weighted over about the last MEMORY good updates; the first
    WARMUP are only learned from. `state` is all it knows, plain numbers for a checkpoint.
    """

    WARMUP, MEMORY = 20, 100

    def __init__(self, state: dict | None = None):
        self.state = dict(state or {'count': 0, 'loss': (0.0, 0.0), 'norm': (0.0, 0.0)})

    def scores(self, loss: float, norm: float) -> tuple[float | None, float | None]:
        """(z of loss, z of norm), None where it is unknown or not finite."""
        return self.z('loss', loss), self.z('norm', norm)

    def z(self, name: str, value: float) -> float | None:
        mean, variance = self.state[name]
        if self.state['count'] < self.WARMUP or not math.isfinite(value):
            return None
        return (value - mean) / max(math.sqrt(variance), 1e-3 * abs(mean), 1e-12)

    def learn(self, loss: float, norm: float) -> None:
        self.state['count'] += 1
        a = max(1 / self.state['count'], 1 / self.MEMORY)
        for name, value in (('loss', loss), ('norm', norm)):
            mean, variance = self.state[name]
            off = value - mean
            self.state[name] = mean + a * off, (1 - a) * (variance + a * off * off)


@dataclass
class Progress:
    """The counters of a run: with weights and optimizer state, all that a resume needs."""
    step: int = 0                       # updates done, skipped ones included
    position: int = 0                   # sequences consumed
    skipped: int = 0                    # updates that were not finite
    best_val_loss: float = math.inf     # of the saved steps, and of the start
    best_step: int = -1
    spikes: int = 0                     # times the loss jumped
    rollbacks: int = 0
    bad: int = 0                        # consecutive updates, up to now, not finite or spikes,
    not_finite: int = 0                 # and of these the last ones that were not finite
    good_until: int = 0                 # updates done before the first of them
    lowest_val_loss: float = math.inf   # of all validations, saved or not: what patience counts
    lowest_step: int = -1
    detector: SpikeDetector = field(default_factory=SpikeDetector)
    z_scores: tuple = (None, None)      # of the loss and gradient norm of the last update
    last_loss: float = math.nan
    one_shape: bool = True              # see BatchPlan; False: it began when there were several
    rolled_back_to: int = -1            # this step was evaluated before: not again
    diverged: bool = False

    NOT_SAVED = 'detector', 'z_scores', 'last_loss', 'rolled_back_to', 'diverged'

    def state_dict(self) -> dict:
        """For a checkpoint: plain types."""
        names = [f.name for f in fields(self) if f.name not in self.NOT_SAVED]
        return {'progress': {name: getattr(self, name) for name in names},
                'watch': dict(self.detector.state)}

    @classmethod
    def restore(cls, saved: dict) -> 'Progress':
        """From the dict of a checkpoint that holds a state_dict(), or {} for a new run."""
        counters = saved.get('progress', {})
        older = {'lowest_val_loss': counters.get('best_val_loss', math.inf),
                 'lowest_step': counters.get('best_step', -1),      # of checkpoints without them
                 'one_shape': not counters}
        return cls(**{**older, **counters}, detector=SpikeDetector(saved.get('watch')))

    @property
    def is_healthy(self) -> bool:
        """Whether the last update was good: what may be rolled back is not saved."""
        return not self.bad

    def due(self, interval: int) -> bool:
        """Whether something that happens every `interval` updates (0: never) is due now."""
        return interval > 0 and self.step % interval == 0 and self.step != self.rolled_back_to

    def out_of_patience(self, updates: int) -> bool:
        """Whether the last `updates` (0: never) brought no lower validation loss."""
        return 0 < updates <= self.step - self.lowest_step

    def advance(self, sequences: int) -> None:
        self.step += 1
        self.position += sequences

    def count_validation(self, val_loss: float) -> None:
        if val_loss < self.lowest_val_loss:
            self.lowest_val_loss, self.lowest_step = val_loss, self.step

    def forget_validations(self) -> None:
        """Losses on another text do not compare."""
        self.best_val_loss, self.best_step = math.inf, -1
        self.lowest_val_loss, self.lowest_step = math.inf, -1

    def judge(self, m: Metrics, spike_z: float) -> Event | None:
        """Count an update as good, skipped (not finite) or a spike (its loss more than spike_z
        standard deviations high, 0: no limit)."""
        self.last_loss, self.z_scores = m.loss, self.detector.scores(m.loss, m.norm)
        z = self.z_scores[0]
        is_spike = m.is_finite and spike_z and z is not None and z > spike_z
        if m.is_finite and not is_spike:
            self.detector.learn(m.loss, m.norm)
            self.bad = self.not_finite = 0
            self.good_until = m.step
            return None
        self.bad += 1
        self.not_finite = 0 if m.is_finite else self.not_finite + 1
        if not m.is_finite:
            self.skipped += 1
            return Event('skipped', f'loss {m.loss}, norm {m.norm}: skipped '
                                    f'({self.skipped} so far)')
        if self.bad > 1:
            return None
        self.spikes += 1
        return Event('spike', f'loss {m.loss:.4f}, {z:.1f} standard deviations above recent '
                              f'losses; norm {m.norm:.2f}')

    def accept_level(self) -> None:
        """Take the losses of the last updates for normal."""
        self.detector, self.bad = SpikeDetector(), 0

    def roll_back(self, saved: dict) -> 'Progress':
        """The progress of the checkpoint `saved`, with the counts of the run so far and at its
        present position: the data in between is left out."""
        back = Progress.restore(saved)
        for name in ('position', 'skipped', 'spikes', 'best_step', 'best_val_loss', 'lowest_step',
                     'lowest_val_loss'):
            setattr(back, name, getattr(self, name))
        back.rollbacks, back.rolled_back_to = self.rollbacks + 1, back.step
        return back


class PendingMetrics:
    """Numbers of updates on their way from the device. On a GPU the newest stays pending, so that
    nothing waits for it."""

    def __init__(self, device: torch.device):
        self.keep, self.pending = int(device.type == 'cuda'), []

    def push(self, step: int, values: torch.Tensor) -> None:
        """values: loss, stop, save and norm of Metrics, on the device."""
        ready_event = torch.cuda.Event() if values.is_cuda else None
        values = values.to('cpu', non_blocking=values.is_cuda)
        if ready_event:
            ready_event.record()
        self.pending.append((step, values, ready_event))

    def read(self, everything: bool) -> Iterator[Metrics]:
        """The Metrics that have arrived; all of them if asked, or if one asks to stop or save."""
        while len(self.pending) > (0 if everything else self.keep):
            step, values, ready_event = self.pending.pop(0)
            if ready_event:
                ready_event.synchronize()
            loss, stop, save, norm = values.tolist()
            everything |= stop > 0 or save > 0
            yield Metrics(step, loss, stop > 0, save > 0, norm)

    def clear(self) -> None:
        self.pending.clear()
