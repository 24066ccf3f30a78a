"""Download a file: to a temporary name, checked against its sha256, then renamed."""

import hashlib
import os
import time
import urllib.error
import urllib.request
from pathlib import Path


def fetch(url, path, sha256, tries=3):
    """The Path `path`, holding what `url` gives;
    nothing is fetched when it is already there and right.

    Raises ValueError naming url, checksum and place when it cannot be had
    or is not what was expected.
    """
    path = Path(path)
    if path.exists() and digest(path) == sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'{path.name}.{os.getpid()}.partial')
    why = ''
    for attempt in range(tries):
        time.sleep(2 * attempt)
        try:
            with urllib.request.urlopen(url, timeout=30) as answer, open(partial, 'wb') as file:
                while chunk := answer.read(2 ** 20):
                    file.write(chunk)
            found = digest(partial)
            if found == sha256:
                os.replace(partial, path)
                return path
            why = f'its sha256 is {found}'
        except urllib.error.HTTPError as error:
            why = f'the server answers {error.code} {error.reason}'
        except (urllib.error.URLError, OSError) as error:
            why = str(getattr(error, 'reason', error))
        finally:
            partial.unlink(missing_ok=True)
    raise ValueError(f'could not download {url} ({why}). '
                     f'Get it by other means (sha256 {sha256}) and put it at {path}')


def digest(path):
    """sha256 of the file at `path`, in hexadecimal."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
