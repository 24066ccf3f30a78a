"""
Run: the folder of a run, and all that is written there.
"""

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from gpt import checkpoints, files, steps
from gpt.budget import Forecast, newest_kept
from gpt.config_file import as_config_file
from gpt.data.sets import Data
from gpt.log import Log, Speed
from gpt.progress import MAX_ROLLBACKS, Event, Metrics, Progress
from gpt.start import is_read_only
from gpt.stop_signal import StopSignal
from gpt.trainer import Trainer
from gpt.validation import Validation
from gpt.world import World

TORCHRUN_SECONDS = 25       # it kills 30 after SIGTERM


class Run:
    """Used in `with`: on the way out it closes the log and wandb and releases the folder."""

    def __init__(self, cfg: Any, world: World):
        """cfg: the settings of train.py, which a run keeps and compares with those it began with.
        """
        self.cfg, self.world = cfg, world
        self.block_size_asked = cfg.block_size
        self.lock_file = self.log = self.signal = None
        self.writer, self.writing = ThreadPoolExecutor(1), None     # of rank 0: one save at a time
        self.saved_at, self.saved_time, self.save_error = -1, time.monotonic(), None
        self.validation = None                      # (step, loss) of one whose save is not settled
        self.is_warned = self.has_changed = False           # has_changed: the settings, on the way
        self.stop_requested = self.save_requested = False       # by any rank, as all ranks know

    def __enter__(self) -> 'Run':
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error:
            self.world.output.log(f'{kind.__name__}: {error}')
        self.world.output.close()
        if self.signal:
            self.signal.restore()
        self.writer.shutdown(wait=kind is not KeyboardInterrupt)
        if self.log and kind is not KeyboardInterrupt:          # a second Ctrl-C ends at once
            self.log.close(failed=error is not None)
        if self.lock_file:
            self.lock_file.close()

    def lock(self) -> None:
        """Hold the folder, on rank 0; ValueError on every rank if another process has it."""
        if not is_read_only(self.cfg):
            self.world.on_main(self.take_lock)

    def take_lock(self) -> None:
        folder = Path(self.cfg.out_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.lock_file = open(folder / '.lock', 'a')
        try:
            files.lock(self.lock_file, wait=False)
        except BlockingIOError:
            raise ValueError(f'{folder}: another process is training in this folder; '
                             f'give another --out_dir, or end that process') from None
        steps.remove_partial(folder)

    # While it runs.

    def begin(self, cfg: Any, progress: Progress, data: Data, is_new: bool) -> None:
        """Open what the run writes to. cfg: the settings as they are now final."""
        self.cfg, self.data = cfg, data
        self.world.on_main(self.write_config)
        if self.world.is_main:
            self.world.output.open(Path(cfg.out_dir) / 'train.log')
        self.log = Log(cfg.out_dir, self.world)
        if cfg.wandb_log:
            self.log.start_wandb(cfg.wandb_project, cfg.wandb_run_name, asdict(cfg))
        self.signal = StopSignal(self.world)
        if cfg.optimizer == 'muon':
            self.world.print(f"lr is AdamW's; Muon's is "
                             f'{cfg.muon_learning_rate / cfg.learning_rate:.3g} times as high')
        self.log.start(progress.step)
        self.saved_at, self.saved_time = 0 if is_new else progress.step, time.monotonic()

    def write_config(self) -> None:
        """The settings, as a config file that repeats the run."""
        path = Path(self.cfg.out_dir) / 'config.py'
        repeats = 'python train.py THIS_FILE --out_dir=out/again   # repeats this run'
        if path.exists():
            self.has_changed |= '# repeats this run' not in files.read_text(path)
        comment = 'the last settings of this run; some changed on the way' if (
            self.has_changed) else repeats
        files.atomic_write(path, as_config_file(replace(self.cfg, minutes=0.0), comment))

    def requests(self, like: torch.Tensor) -> list[torch.Tensor]:
        """Whether this process asks to stop, and to save: 0 or 1, as tensors like this one."""
        minutes = (time.monotonic() - self.saved_time) / 60
        save = self.world.is_main and 0 < self.cfg.save_minutes < minutes
        return [torch.full_like(like, request) for request in (self.signal.received, save)]

    def heed(self, m: Metrics) -> None:
        """Take the requests of all processes that came with an update."""
        self.stop_requested, self.save_requested = m.stop, m.save

    def write(self, progress: Progress, **record: Any) -> None:
        self.log.write(step=progress.step, tokens=progress.position * self.cfg.block_size, **record)

    def event(self, step: int, event: Event | None) -> None:
        if event:
            self.log.event(step, event.kind, event.text)

    def write_scores(self, progress: Progress, scores: dict[str, float]) -> None:
        self.write(progress, **scores)
        self.world.print(f"step {progress.step}: hellaswag {scores['hellaswag']:.2%}")

    def log_update(self, progress: Progress, m: Metrics, learning_rate: float, speed: Speed,
                   trainer: Trainer, forecast: Forecast) -> None:
        (loss_z, norm_z), mfu = progress.z_scores, trainer.mfu(speed.tokens_per_second)
        self.write(progress, loss=m.loss, lr=learning_rate, grad_norm=m.norm, loss_z=loss_z,
                   grad_norm_z=norm_z, step_ms=1000 * speed.step_seconds,
                   tokens_per_second=speed.tokens_per_second, mfu=mfu)
        reached = f'mfu {mfu:.0%}  ' if mfu and mfu >= 0.005 else ''
        self.world.print(
            f'step {progress.step}/{self.cfg.max_iters}  loss {m.loss:.4f}  '
            f'lr {learning_rate:.2e}  norm {m.norm:.2f}  {1000 * speed.step_seconds:.0f} ms  '
            f'{speed.tokens_per_second:,.0f} tok/s  {reached}{forecast.describe(progress.step)}')

    def save(self, progress: Progress, trainer: Trainer) -> None:
        """A checkpoint of this step, unless there is one: copied to memory, and written while the
        training goes on; settle() takes note of it."""
        self.save_requested = False
        if self.saved_at == progress.step or progress.diverged:
            return
        self.world.on_main(self.settle, progress, True)
        model, state = trainer.copied()
        if self.world.is_main:
            training = {**progress.state_dict(), **state, 'settings': asdict(self.cfg),
                        'shards': self.data.shards, 'block_size_asked': self.block_size_asked}
            self.writing = self.writer.submit(
                checkpoints.save, self.cfg.out_dir, progress.step, model, self.data.encoding,
                training)
        self.saved_at, self.saved_time = progress.step, time.monotonic()

    def validated(self, progress: Progress, validation: Validation) -> None:
        progress.count_validation(validation.loss)
        self.validation = progress.step, validation.loss
        self.write(progress, val_loss=validation.loss, **validation.others)
        self.world.print(f'step {progress.step}: {validation}')

    def settle(self, progress: Progress, wait: bool = False) -> None:
        """Take note of the last save on rank 0, once it has ended or after a `wait` for it: mark
        the step if it is the best, and delete checkpoints beyond those to keep. A failure is an
        event and not the end: there may be room for the next one."""
        if self.writing and (wait or self.writing.done()):
            self.save_error = self.writing.exception()
            if self.save_error and not isinstance(self.save_error, OSError):
                raise self.save_error
            if self.save_error:
                self.log.event(self.saved_at, 'save failed',
                               f'cannot save: {self.save_error}; continuing')
            self.warn_of_slow_saves(time.monotonic() - self.saved_time)
        elif self.writing or not self.validation or not self.world.is_main:
            return
        (step, loss), self.writing = self.validation or (-1, math.inf), None
        self.validation = None
        if self.save_error:
            return
        if step == self.saved_at and loss < progress.best_val_loss:
            self.mark_best(progress, step, loss)
        if progress.is_healthy:
            steps.prune(self.cfg.out_dir, newest_kept(self.cfg), progress.best_step)

    def mark_best(self, progress: Progress, step: int, val_loss: float) -> None:
        try:
            if step:                                    # step 0 is not saved, but counts
                steps.mark_best(self.cfg.out_dir, step, val_loss)
            progress.best_step, progress.best_val_loss = step, val_loss
        except OSError as error:
            self.log.event(step, 'save failed', f'cannot write best.json: {error}; continuing')

    def warn_of_slow_saves(self, seconds: float) -> None:
        if self.world.under_torchrun and seconds > TORCHRUN_SECONDS and not self.is_warned:
            self.is_warned = True
            self.world.print(f'writing a checkpoint took {seconds:.0f} s: torchrun kills 30 s '
                             f'after it is stopped, unless --shutdown_timeout allows more')

    def recover(self, progress: Progress, trainer: Trainer) -> Progress:
        """After max_skipped bad updates in a row: the progress to continue from. That of the last
        good checkpoint, if rollback is on; else the losses may be a new level, or diverged."""
        cfg = self.cfg
        may_roll_back = cfg.rollback and progress.rollbacks < MAX_ROLLBACKS
        if may_roll_back and (back := self.roll_back(progress, trainer)):
            return back
        if cfg.rollback or progress.not_finite >= cfg.max_skipped:
            progress.diverged = True
        elif not progress.not_finite:
            self.log.event(progress.step, 'level', f'the loss stays near '
                           f'{progress.last_loss:.4f}: new loss level; baseline reset')
            progress.accept_level()
        return progress

    def roll_back(self, progress: Progress, trainer: Trainer) -> Progress | None:
        """Load the last checkpoint from before the bad updates; the data since then is left out.
        None if there is no such checkpoint."""
        self.world.on_main(self.settle, progress, True)
        folder = self.world.on_main(steps.roll_back, self.cfg.out_dir, progress.good_until)
        if not folder:
            return None
        saved = checkpoints.load_training(folder)
        trainer.load_weights(checkpoints.load_folder(folder).model)
        trainer.load_state_dict(saved)
        back = progress.roll_back(saved)
        left_out = (progress.position - saved['progress']['position']) * self.cfg.block_size
        self.log.event(progress.step, 'rollback', f'{progress.bad} bad updates in a row: rolled '
                       f'back to step {back.step}, skipping {left_out:,} tokens',
                       to_step=back.step, left_out=left_out)
        self.saved_at, self.stop_requested, self.save_requested = back.step, False, False
        return back

    def finish(self, progress: Progress) -> None:
        """Wait for the last save, and print the summary."""
        self.world.on_main(self.settle, progress, True)
        self.save_error = self.world.broadcast(self.save_error)
        self.world.print(self.summary(progress), last=True)

    def summary(self, progress: Progress) -> str:
        """The last line of a run."""
        cfg, on_disk = self.cfg, steps.all_steps(self.cfg.out_dir)
        finished = not (progress.diverged or self.stop_requested)
        if progress.diverged:
            bad = 'not finite'
            if progress.not_finite < cfg.max_skipped:
                bad += ' or far too high'
            left = (f'The last checkpoint in {cfg.out_dir} is from before' if on_disk else
                    'There is no checkpoint from before')
            text = (f'stopped at step {progress.step}: {cfg.max_skipped} updates in a row were '
                    f'{bad}. Common causes: a learning rate too high, float16, damaged data. '
                    f'{left}')
        elif not finished:
            text = f'stopped at step {progress.step}, the same command resumes'
        elif progress.step < cfg.max_iters:
            text = f'ended at step {progress.step}, no lower loss in {cfg.patience} validations'
        else:
            text = f'finished {progress.step} updates'
        if finished and progress.lowest_step == 0 < progress.step:
            text += (f'; no validation was better than the one before training '
                     f'({progress.lowest_val_loss:.4f}): try a lower --learning_rate, in another '
                     f'--out_dir')
        for what, number in (('skipped', progress.skipped), ('spikes', progress.spikes),
                             ('rollbacks', progress.rollbacks)):
            text += f', {what}: {number}' if number else ''
        if progress.best_step in on_disk:
            text += (f'; best val_loss {progress.best_val_loss:.4f} at step {progress.best_step}. '
                     f'`python sample.py --model={cfg.out_dir}` samples from it')
        return text
