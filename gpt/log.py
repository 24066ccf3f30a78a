"""
What a run writes down: numbers and events in log.jsonl and wandb, samples, and how long it takes.
"""

import json
import math
import os
import platform
import queue
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

import torch

from gpt.world import World

WANDB_SECONDS = 60          # that the end of a run waits for it


class Log:
    """The files of a run's folder to which lines are appended, and wandb; rank 0 writes.

    After a resume or a rollback some steps are there twice: readers keep the last record of each.
    """

    def __init__(self, folder: str | Path, world: World):
        self.folder, self.world, self.wandb, self.missed = Path(folder), world, None, 0
        if world.is_main:
            path = self.folder / 'log.jsonl'
            if path.exists():                                       # cut off a torn last line
                os.truncate(path, path.read_bytes().rfind(b'\n') + 1)
            self.file = open(path, 'ab', buffering=0)

    def start_wandb(self, project: str, name: str, settings: dict) -> None:
        """Mirror the numbers to wandb, in a thread: what it meets, raises or waits for does not
        concern the run."""
        if not self.world.is_main:
            return

        def start():
            import wandb
            id_file = self.folder / 'wandb_id.txt'                  # the same run after a resume
            if not id_file.exists():
                id_file.write_text(secrets.token_hex(4))
            self.run = wandb.init(project=project, id=id_file.read_text(), resume='allow',
                                  name=name or self.folder.name, dir=self.folder, config=settings)
            self.run.define_metric('*', step_metric='step')         # a rollback decreases the step
        self.wandb = BackgroundWorker(self.world.print, 'wandb')
        self.wandb.do(start)

    def write(self, **record) -> None:
        """A line in log.jsonl; what is not finite becomes null, which JSON has."""
        if not self.world.is_main:
            return
        record = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in record.items()}
        self.append(self.file, record)
        if self.wandb and 'event' not in record:
            self.wandb.do(lambda: self.run.log(record))

    def event(self, step: int, kind: str, text: str, quiet: bool = False, **facts) -> None:
        """Something unusual, in the log and, unless `quiet`, on the screen."""
        self.write(step=step, event=kind, words=text, **facts)
        if not quiet:
            self.world.print(f'step {step}: {text}')

    def sample(self, step: int, text: str) -> None:
        self.write_beside('samples.jsonl', {'step': step, 'text': text})
        self.world.print(f'step {step}: sample: {text[:200]!r}')

    def start(self, step: int) -> None:
        """Where, when and with what a run starts or resumes, for the report."""
        self.write_beside('starts.jsonl', {
            'step': step, 'time': time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime()),
            'device': str(self.world.device), 'machine': machine(self.world.device),
            'processes': self.world.size, 'dtype': str(self.world.dtype)[6:],
            'torch': torch.__version__, 'python': platform.python_version(),
            'system': f'{platform.system()} {platform.machine()}'})

    def write_beside(self, name: str, record: dict) -> None:
        """A line in another file of the folder."""
        if not self.world.is_main:
            return
        path = self.folder / name
        try:
            with open(path, 'ab', buffering=0) as file:
                self.append(file, record)
        except OSError as error:
            self.report_missed(path, error)

    def append(self, file: IO[bytes], record: dict) -> None:
        """A line in `file`; a full disk costs the record, not the run."""
        try:
            line = json.dumps(record).encode() + b'\n'
            if file.write(line) < len(line):    # only a part of it was written: end that line
                file.write(b'\n')
        except OSError as error:
            self.report_missed(file.name, error)

    def report_missed(self, name: str | Path, error: OSError) -> None:
        self.missed += 1
        if self.missed == 1:
            self.world.print(f'{name}: {error.strerror}; continuing without this part of the log')

    def close(self, failed: bool = False) -> None:
        if self.world.is_main:
            self.file.close()
        if self.wandb:
            self.wandb.do(lambda: self.run.finish(exit_code=int(failed)))
            self.wandb.end(WANDB_SECONDS)


class BackgroundWorker(threading.Thread):
    """Runs tasks one after another beside the run; after the first that fails, none."""

    def __init__(self, report: Callable[[str], object], name: str):
        super().__init__(name=name, daemon=True)
        self.report, self.tasks, self.failed = report, queue.Queue(), False
        self.start()

    def do(self, task: Callable[[], object]) -> None:
        if not self.failed:
            self.tasks.put(task)

    def run(self) -> None:
        while task := self.tasks.get():
            try:
                task()
            except Exception as error:
                self.report(f'{self.name}: {type(error).__name__}: {error}; continuing without it')
                self.failed = True
                return

    def end(self, seconds: float) -> None:
        """Wait at most so long for the tasks that are left."""
        self.tasks.put(None)
        self.join(seconds)
        if self.is_alive():
            self.report(f'{self.name}: no answer for {seconds} s; leaving without it')


class Speed(NamedTuple):
    step_seconds: float         # mean of an update
    tokens_per_second: float


class Stopwatch:
    """Time and tokens of the updates since it was last read."""

    def __init__(self):
        self.seconds, self.steps, self.tokens = 0.0, 0, 0

    def start(self) -> None:
        self.started = time.perf_counter()

    def stop(self, tokens: int) -> float:
        """Count an update; its seconds."""
        seconds = time.perf_counter() - self.started
        self.seconds += seconds
        self.steps, self.tokens = self.steps + 1, self.tokens + tokens
        return seconds

    def read(self) -> Speed:
        speed = Speed(self.seconds / self.steps, self.tokens / self.seconds)
        self.seconds, self.steps, self.tokens = 0.0, 0, 0
        return speed


def duration(seconds: float) -> str:
    """90 -> '1:30', 3725 -> '1:02:05'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02d}:{seconds:02d}' if hours else f'{minutes}:{seconds:02d}'


def machine(device: torch.device) -> str:
    """The name of the GPU, or of the CPU with the number of threads of one process."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                name = line.partition(': ')[2]
    return f'{name}, {torch.get_num_threads()} threads'
