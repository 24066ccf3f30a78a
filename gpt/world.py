"""
World: the processes that work together, and where this one computes. Thin over torch.distributed;
the same calls work in one process without it.
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gpt import cpu
from gpt.device import pick_device
from gpt.script import complain


class Output:
    """Lines for standard output and, once a run has its folder, for train.log there. Writing never
    fails: a reader, terminal or disk that is gone costs lines, not the run."""

    def __init__(self):
        self.file, self.before_file, self.is_lost = None, [], False

    def print(self, *words: object, last: bool = False) -> None:
        """last: if standard output is lost, to standard error."""
        text = ' '.join(map(str, words))
        self.log(text)
        try:
            print(text, flush=True)
        except (OSError, ValueError):           # from now on there is nobody to print to
            sys.stdout, self.is_lost = open(os.devnull, 'w'), True
        if last and self.is_lost:
            complain(f'{text}\n')

    def log(self, text: str) -> None:
        """A line for train.log alone."""
        if self.file is None:
            self.before_file.append(text)
            return
        with suppress(OSError, ValueError):
            self.file.write(f'{text}\n'.encode(errors='backslashreplace'))

    def open(self, path: str | Path) -> None:
        """Append to this file, at first the lines there have been."""
        with suppress(OSError):
            self.file = open(path, 'ab', buffering=0)
            for text in self.before_file:
                self.log(text)
        self.before_file = []

    def close(self) -> None:
        if self.file:
            self.file.close()
        self.file = None


@dataclass(frozen=True)
class World:
    rank: int = 0                               # of this process
    size: int = 1                               # number of processes
    device: torch.device = torch.device('cpu')  # where this process computes
    dtype: torch.dtype = torch.float32          # of autocast()
    output: Output = field(default_factory=Output, compare=False)

    @classmethod
    def join(cls, device: str = 'auto', timeout_minutes: float = 10.0) -> 'World':
        """The World of this process: what torchrun says, or one process alone.

        device: 'auto' (CUDA, else MPS, else CPU) or a name that torch.device takes.
        timeout_minutes: how long a process waits for the others before it gives up.
        Raises ValueError if there is no such device.
        """
        rank, size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
        device = pick_device(device, int(os.environ.get('LOCAL_RANK', 0)), size)
        if device.type == 'cpu':
            cpu.keep_freed_memory()
        if 'RANK' in os.environ and not dist.is_initialized():
            dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo',
                                    timeout=timedelta(minutes=timeout_minutes),
                                    device_id=device if device.type == 'cuda' else None)
        return cls(rank, size, device)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def under_torchrun(self) -> bool:
        return dist.is_initialized()

    def print(self, *words: object, last: bool = False) -> None:
        """Print on rank 0, see Output."""
        if self.is_main:
            self.output.print(*words, last=last)

    def autocast(self) -> torch.autocast:
        """Forward passes run under it. Its cache is off: a weight is used once in a pass."""
        return torch.autocast(self.device.type, self.dtype, cache_enabled=False,
                              enabled=self.dtype != torch.float32)

    def reduce(self, tensor: torch.Tensor, op: str = 'sum') -> torch.Tensor:
        """The sum (or 'max', 'min') of `tensor` over all processes, in place."""
        if dist.is_initialized():
            dist.all_reduce(tensor, getattr(dist.ReduceOp, op.upper()))
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any process."""
        return bool(self.reduce(torch.tensor(float(flag), device=self.device), 'max'))

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` (plain types), on every rank."""
        if not dist.is_initialized():
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def gather(self, value: Any) -> list:
        """The `value` of every rank (plain types and tensors on the CPU), on every rank."""
        if not dist.is_initialized():
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def on_main(self, function: Callable, *args: Any) -> Any:
        """function(*args), run on rank 0 alone: every rank gets its result, or its error."""
        result = error = None
        if self.is_main:
            try:
                result = function(*args)
            except (ValueError, OSError) as caught:
                error = caught
        result, error = self.broadcast((result, error))
        if error is not None:
            raise error
        return result

    def leave(self) -> None:
        """End the process group, if there is one."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
