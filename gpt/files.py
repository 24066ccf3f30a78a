"""Download a file: to a temporary name, checked against its sha256, then renamed.

What has come stays when a download breaks off or is killed, and the next call goes on from there.
"""

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm


def fetch(url, path, sha256, tries=3):
    """The Path `path`, holding what `url` gives;
    nothing is fetched when it is already there and right.

    Raises ValueError naming url, checksum and place when it cannot be had
    or is not what was expected.
    """
    path, why = Path(path), ''
    if path.exists() and digest(path) == sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'{path.name}.partial')
    with open(partial, 'ab') as file:
        lock(file)                                  # another process may be at it
        if path.exists() and digest(path) == sha256:
            return path
        for attempt in range(tries):
            time.sleep(2 * attempt)
            try:
                receive(url, file)
                found = digest(partial)
                if found == sha256:
                    os.replace(partial, path)
                    return path
                why = f'its sha256 is {found}'
                file.truncate(0)
            except urllib.error.HTTPError as error:
                why = f'the server answers {error.code} {error.reason}'
                if error.code == 416:               # nothing after what is there, which is wrong
                    file.truncate(0)
            except (http.client.HTTPException, OSError) as error:
                why = str(getattr(error, 'reason', error))
    raise ValueError(f'could not download {url} ({why}). '
                     f'Get it by other means (sha256 {sha256}) and put it at {path}')


def receive(url, file):
    """Append to `file` what it lacks of `url`, or all of it from a server that cannot go on."""
    start = file.seek(0, os.SEEK_END)
    request = urllib.request.Request(url, headers={'Range': f'bytes={start}-'} if start else {})
    with urllib.request.urlopen(request, timeout=30) as answer:
        if answer.status != 206:
            start = file.truncate(0)
        length = answer.headers.get('Content-Length')
        length = length and int(length)
        with tqdm(desc=Path(file.name).stem, initial=start, total=length and start + length,
                  unit='B', unit_scale=True, disable=None, leave=False) as bar:
            while chunk := answer.read(2 ** 20):
                file.write(chunk)
                bar.update(len(chunk))
        file.flush()
        if length and file.seek(0, os.SEEK_END) < start + length:
            raise OSError('the connection broke off')


def lock(file, wait=True):
    """Hold the lock of an open file until it is closed; BlockingIOError if another has it."""
    with suppress(ImportError):                     # Windows: no lock
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def digest(path):
    """sha256 of the file at `path`, in hexadecimal."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
