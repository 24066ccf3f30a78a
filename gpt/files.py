"""
Files: atomic writes, checksums, locks and resumable downloads. Imports no torch.
"""

import hashlib
import http.client
import os
import secrets
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import IO

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent       # the folder of this repository


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Write a whole file or nothing: to a temporary file beside it, synced, then renamed.

    A text is written as UTF-8. Only a kill can leave a temporary file, .NAME.*.partial.
    """
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.{secrets.token_hex(4)}.partial')
    try:
        with open(temporary, 'wb') as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sha256(path: str | Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def lock(file: IO, wait: bool = True) -> None:
    """Hold the lock of an open file until it is closed.

    Raises BlockingIOError without `wait`, if another process has it. Windows: no lock.
    """
    with suppress(ImportError):
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def download(url: str, path: str | Path, expected: str, tries: int = 3) -> Path:
    """Download `url` to `path`, unless the file is there; `expected` is its sha256.

    What has arrived is kept in PATH.partial, and the next try or call resumes there.
    Raises ValueError with url, sha256 and path.
    """
    path, problem = Path(path), ''
    if path.exists() and sha256(path) == expected:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'{path.name}.partial')
    with open(partial, 'ab') as file:
        lock(file)                                  # another process may be downloading it
        if path.exists() and sha256(path) == expected:
            return path
        for attempt in range(tries):
            time.sleep(2 * attempt)
            problem = receive(url, file)
            if not problem:
                found = sha256(partial)
                if found == expected:
                    os.replace(partial, path)
                    return path
                problem = f'its sha256 is {found}'
                file.truncate(0)
    raise ValueError(f'could not download {url} ({problem}); '
                     f'get it by other means (sha256 {expected}) and put it at {path}')


def receive(url: str, file: IO[bytes]) -> str:
    """Append the rest of `url` to `file`; returns what went wrong, '' for nothing."""
    try:
        append_rest(url, file)
    except urllib.error.HTTPError as error:
        if error.code == 416:           # Range Not Satisfiable: the partial file is wrong
            file.truncate(0)
        return f'the server answers {error.code} {error.reason}'
    except (http.client.HTTPException, OSError) as error:
        return str(getattr(error, 'reason', error))
    return ''


def append_rest(url: str, file: IO[bytes]) -> None:
    """Append what `file` lacks of `url`; from the start if the server ignores the range."""
    start = file.seek(0, os.SEEK_END)
    request = urllib.request.Request(url, headers={'Range': f'bytes={start}-'} if start else {})
    with urllib.request.urlopen(request, timeout=30) as response:
        if response.status != 206:
            start = file.truncate(0)
        length = int(response.headers.get('Content-Length') or 0)       # 0: not known
        total = start + length if length else None
        with tqdm(desc=Path(file.name).stem, initial=start, total=total, unit='B',
                  unit_scale=True, disable=None, leave=False) as bar:
            while chunk := response.read(2 ** 20):
                file.write(chunk)
                bar.update(len(chunk))
        file.flush()
        if total and file.seek(0, os.SEEK_END) < total:
            raise OSError('the connection broke off')
