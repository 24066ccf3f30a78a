"""
How a script ends: its exit status, errors in one line, and standard streams that are closed, full
or cannot show a character.
"""

import io
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpt.shapes import bounded

ROOT = Path(__file__).resolve().parent.parent


def finish(task: Callable) -> None:
    """Run `task`, print an error in one line, and exit.

    The status is 0 for done; 1 for a bug of ours, with its traceback; 2 for bad input or data (an
    OSError, an ImportError, too little memory, or a ValueError that our own code raised); otherwise
    what the task returned. It exits by os._exit after flushing: a process that used gloo may abort
    in a normal shutdown.
    """
    open_standard_streams()
    try:
        status = task() or 0
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        os._exit(141)                           # the reader of our output has closed it: `| head`
    except Exception as error:
        if isinstance(error, OSError | ImportError) or is_out_of_memory(error) or (
                isinstance(error, ValueError) and raised_here(error)):
            text = bounded(str(error) or 'not enough memory')
            complaint, status = f'{Path(sys.argv[0]).name}: {text}\n', 2
        else:
            complaint, status = traceback.format_exc(), 1
        complain(complaint)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        status = 141
    except OSError as error:                    # a full disk: what was printed is lost
        if not status:                          # else it has been said why it failed
            complain(f'{Path(sys.argv[0]).name}: {error}\n')
        status = status or 2
    os._exit(status)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is a MemoryError, or one of torch or of a library that it calls."""
    said = 'out of memory', "can't allocate memory", 'not enough memory', '_ALLOC_FAILED'
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in said))


def open_standard_streams() -> None:
    """Standard streams that were closed become /dev/null, so that no file takes their place; those
    that cannot show a character show its escape."""
    for name, mode in (('stdin', 'r'), ('stdout', 'w'), ('stderr', 'w')):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    out = sys.stdout
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(StandardOutput(out.fileno(), 'w', closefd=False)), out.encoding,
        'backslashreplace', line_buffering=out.isatty(), write_through=out.write_through)
    sys.stderr.reconfigure(errors='backslashreplace')
    sys.stdin.reconfigure(errors='surrogateescape')     # who reads a line says what is wrong in it


class StandardOutput(io.FileIO):
    """A standard output whose errors say that they are its own, as those of a file name it."""

    def write(self, content: Any) -> int | None:
        try:
            return super().write(content)
        except OSError as error:
            error.filename = 'standard output'
            raise


def complain(text: str) -> None:
    """Write to standard error, if it can be written to."""
    with suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


def raised_here(error: BaseException) -> bool:
    """Whether the innermost frame of `error` is in a file of this repository, not of a library."""
    *_, frame = traceback.extract_tb(error.__traceback__)
    folders = (ROOT, ROOT / 'data', ROOT / 'gpt', ROOT / 'gpt/data')
    return Path(frame.filename).resolve().parent in folders and not os.environ.get('TRACEBACK')
