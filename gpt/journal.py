"""
What a run notices and writes down: signals, time, the log, and updates that are not like others.
"""

import json
import math
import os
import platform
import queue
import secrets
import signal
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch


WANDB_SECONDS = 60          # that the end of a run waits for it


class StopSignal:
    """SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask for a checkpoint and the end; another Ctrl-C ends at
    once. What this process was started to ignore (nohup), it ignores."""

    def __init__(self, is_main, under_torchrun):
        self.is_main, self.requested, self.since, self.before = is_main, False, 0.0, {}
        self.deaf_seconds = 2 * under_torchrun      # which passes one Ctrl-C on twice
        if threading.current_thread() is threading.main_thread():
            for name in ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1'):
                number = getattr(signal, name, None)                # Windows has not all of them
                if number and signal.getsignal(number) != signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self.receive)

    def receive(self, number, frame):
        if (self.requested and number == signal.SIGINT
                and time.monotonic() - self.since > self.deaf_seconds):
            if self.is_main:
                os.write(2, b'ended, without a checkpoint\n')
            raise KeyboardInterrupt
        if self.is_main and not self.requested:                         # an update may be long
            os.write(2, b'ending after this update, with a checkpoint' + b'; Ctrl-C again ends at '
                        b'once, without one' * (number == signal.SIGINT) + b'\n')
        self.since = self.since or time.monotonic()
        self.requested = True

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Stopwatch:
    """Time and tokens of the updates since it was last read."""

    def __init__(self):
        self.seconds, self.steps, self.tokens = 0.0, 0, 0

    def start(self):
        self.began = time.perf_counter()

    def stop(self, tokens):
        self.seconds += time.perf_counter() - self.began
        self.steps, self.tokens = self.steps + 1, self.tokens + tokens

    def read(self):
        """(mean seconds of an update, tokens per second)."""
        found = self.seconds / self.steps, self.tokens / self.seconds
        self.seconds, self.steps, self.tokens = 0.0, 0, 0
        return found


def duration(seconds):
    """90 -> '1:30', 3725 -> '1:02:05'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02d}:{seconds:02d}' if hours else f'{minutes}:{seconds:02d}'


def machine(device):
    """What computes, by its name: a GPU, or a CPU with the threads that one process has there."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                name = line.partition(': ')[2]
    return f'{name}, {torch.get_num_threads()} threads'


class Log:
    """log.jsonl in the run's folder, a record a line, and wandb beside it if asked; rank 0 writes.

    After a resume some steps stand there twice: readers keep the last record of a step.
    """

    def __init__(self, cfg, world, say):
        self.folder, self.say, self.is_main = Path(cfg.out_dir), say, world.is_main
        self.wandb = None
        if not self.is_main:
            return
        path = self.folder / 'log.jsonl'
        if path.exists():                                           # a torn last line is cut off
            os.truncate(path, path.read_bytes().rfind(b'\n') + 1)
        self.file = open(path, 'ab', buffering=0)
        self.missed = 0                             # records, when the disk was full
        if cfg.wandb_log:
            self.wandb = Aside(say, 'wandb')
            self.wandb.do(lambda: self.start_wandb(cfg))

    def start_wandb(self, cfg):
        import wandb
        id_file = self.folder / 'wandb_id.txt'                      # the same run after a resume
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        self.run = wandb.init(project=cfg.wandb_project, id=id_file.read_text(), resume='allow',
                              name=cfg.wandb_run_name or self.folder.name, dir=self.folder,
                              config=asdict(cfg))
        self.run.define_metric('*', step_metric='step')             # which a rollback takes back

    def write(self, **record):
        if not self.is_main:
            return
        record = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in record.items()}                 # JSON has no NaN
        self.append(self.file, record)
        if self.wandb and 'event' not in record:
            self.wandb.do(lambda: self.run.log(record))

    def append(self, file, record):
        """A line in `file`; a full disk costs the record, not the run."""
        try:
            line = json.dumps(record).encode() + b'\n'
            if file.write(line) < len(line):        # half of it: the next one begins
                file.write(b'\n')                                   # a line of its own
        except OSError as error:
            self.miss(file.name, error)

    def miss(self, name, error):
        self.missed += 1
        if self.missed == 1:
            self.say(f'{name}: {error.strerror}; going on without this part of the log')

    def event(self, step, kind, words, **facts):
        """What did not go as planned, in the log and on the screen."""
        self.write(step=step, event=kind, words=words, **facts)
        self.say(f'step {step}: {words}')

    def sample(self, step, text):
        self.beside('samples.jsonl', {'step': step, 'text': text})
        self.say(f'step {step}: sample: {text[:200]!r}')

    def start(self, step, world, dtype):
        """Where, when and with what a run begins or goes on: a report tells of all its starts."""
        self.beside('starts.jsonl', {
            'step': step, 'time': time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime()),
            'device': str(world.device), 'machine': machine(world.device),
            'processes': world.size, 'dtype': str(dtype)[6:],
            'torch': torch.__version__, 'python': platform.python_version(),
            'system': f'{platform.system()} {platform.machine()}'})

    def beside(self, name, record):
        """A line in another file of the run's folder: the log holds numbers and events only."""
        if not self.is_main:
            return
        path = self.folder / name
        try:
            with open(path, 'ab', buffering=0) as file:
                self.append(file, record)
        except OSError as error:
            self.miss(path, error)

    def finish(self):
        if self.is_main:
            self.file.close()
        if self.wandb:
            self.wandb.do(lambda: self.run.finish())
            self.wandb.end(WANDB_SECONDS)


class Aside(threading.Thread):
    """Does things one after the other, beside the run: whatever they may meet, raise or wait for,
    the run goes on, and after the first failure without them."""

    def __init__(self, say, name):
        super().__init__(name=name, daemon=True)
        self.say, self.tasks, self.failed = say, queue.Queue(), False
        self.start()

    def do(self, task):
        if not self.failed:
            self.tasks.put(task)

    def run(self):
        while task := self.tasks.get():
            try:
                task()
            except Exception as error:
                self.say(f'{self.name}: {type(error).__name__}: {error}; going on without it')
                self.failed = True
                return

    def end(self, seconds):
        self.tasks.put(None)
        self.join(seconds)
        if self.is_alive():
            self.say(f'{self.name}: has not answered for {seconds} s; leaving without it')


class Watch:
    """How unusual an update is: z-scores of its loss and its gradient norm.

    Mean and variance are exponentially weighted over about the last hundred good updates; the
    first 20 are only learnt from. All it knows is in `state`, plain numbers for a checkpoint.
    """

    FIRST, MEMORY = 20, 100

    def __init__(self, state=None):
        self.state = dict(state or {'count': 0, 'loss': (0.0, 0.0), 'norm': (0.0, 0.0)})

    def score(self, loss, norm):
        """(z of loss, z of norm), None where one is not known or not finite."""
        return tuple(self.z(name, value) for name, value in (('loss', loss), ('norm', norm)))

    def z(self, name, value):
        mean, variance = self.state[name]
        if self.state['count'] < self.FIRST or not math.isfinite(value):
            return None
        return (value - mean) / max(math.sqrt(variance), 1e-3 * abs(mean), 1e-12)

    def learn(self, loss, norm):
        self.state['count'] += 1
        a = max(1 / self.state['count'], 1 / self.MEMORY)
        for name, value in (('loss', loss), ('norm', norm)):
            mean, variance = self.state[name]
            off = value - mean
            self.state[name] = mean + a * off, (1 - a) * (variance + a * off * off)
