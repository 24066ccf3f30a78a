"""
Files: reading text and JSON that others wrote, atomic writes, checksums, locks and resumable
downloads. Imports no torch.
"""

import hashlib
import http.client
import io
import os
import re
import secrets
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from gpt.shapes import parse_json

ROOT = Path(__file__).resolve().parent.parent       # the folder of this repository
PICTURES = ('.png', '.svg', '.pdf', '.jpg', '.jpeg', '.webp', '.eps')
BYTE_ORDER_MARKS = re.compile('^\ufeff+', re.MULTILINE)


# Reading what others wrote: text is decoded in one way, and JSON has a declared shape.

def plain_file(path: str | Path) -> Path:
    """A path with ~ expanded; ValueError if something else than a plain file is there.

    A folder cannot be read, and a device or a pipe may never end.
    """
    path = Path(os.path.expanduser(path))
    if path.exists() and not path.is_file():
        what = 'a folder' if path.is_dir() else 'a device, pipe or socket'
        raise ValueError(f'{path}: is {what}, expected a plain file')
    return path


def read_bytes(path: str | Path) -> bytes:
    """The content of a plain file; ValueError if it cannot be read."""
    path = plain_file(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f'{path}: cannot read this file ({error.strerror})') from None


def read_text(path: str | Path) -> str:
    """The text of a plain file, see decode()."""
    return decode(read_bytes(path), path)


def given_text(text: str, setting: str) -> str:
    """The text of a setting, or of the file it names as FILE:name, see decode(). Invalid bytes of a
    command line are surrogates."""
    if text.startswith('FILE:'):
        return read_text(text[5:])
    return decode(text.encode('utf-8', 'surrogateescape'), setting)


def read_json(path: str | Path, shape: Any) -> Any:
    """The JSON in a plain file, which has this shape (see gpt/shapes.py); ValueError if not."""
    return parse_json(read_text(path), path, shape)


def decode(raw: bytes, where: object) -> str:
    """UTF-8 as text, see plain_text(); ValueError with `where` and line for other encodings."""
    try:
        return plain_text(raw.decode())
    except UnicodeDecodeError as error:
        line = len(re.findall(rb'\r\n|\r|\n', raw[:error.start])) + 1
        raise ValueError(f'{where}:{line}: not UTF-8 ({error.reason} at byte {error.start:,}); '
                         f'{how_to_convert(raw)}') from None


def plain_text(text: str) -> str:
    """A text whose lines end in \\n, as in Python's text mode, without byte order marks.

    These are at its beginning, or at that of a line where files were joined.
    """
    if '\r' in text:
        text = text.replace('\r\n', '\n').replace('\r', '\n')
    return BYTE_ORDER_MARKS.sub('', text) if '\ufeff' in text else text


def how_to_convert(raw: bytes) -> str:
    """What to do about bytes that are not UTF-8."""
    encoding = 'cp1252' if re.search(b'[\x80-\x9f]', raw) else 'latin1'
    if raw[:2] in (b'\xff\xfe', b'\xfe\xff'):
        encoding = 'utf-16'
    return f'convert it (iconv -f {encoding} -t utf-8)'


# Writing, and checksums.

def check_output(path: str | Path, *inputs: str | Path) -> Path:
    """The path of a file to be written, ~ expanded, whose folder is made if it is missing.

    Raises ValueError for a folder, for a device, pipe or socket, for the file that is standard
    output, and for one of the inputs: none of these may be replaced; and where nothing can be
    written.
    """
    is_folder, path = str(path).endswith('/'), plain_file(path)
    if is_folder:
        raise ValueError(f'{path}: is a folder, expected the name of a file')
    taken = [1, 2, *(os.path.expanduser(text) for text in inputs if text)]
    if path.exists() and any(os.path.exists(one) and os.path.samefile(path, one) for one in taken):
        raise ValueError(f'{path}: is an input or a standard stream, expected another file')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))).close()
    except OSError as error:
        raise ValueError(f'{path}: cannot be written ({error.strerror})') from None
    return path


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Write a whole file or nothing: to a temporary file beside it, synced, then renamed.

    A text is written as UTF-8. A link is written through. Only a kill can leave a temporary file,
    .NAME.*.partial.
    """
    path = plain_file(os.path.realpath(path))
    temporary = path.with_name(f'.{path.name}.{secrets.token_hex(4)}.partial')
    try:
        with open(temporary, 'wb') as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and not error.filename:
            error.filename = str(path)              # that of a write does not say of which file
        raise


def picture_path(text: str) -> Path:
    """The path of a picture to be written, see check_output(); without a suffix it is a PNG."""
    name = os.path.basename(text)
    if name and '.' not in name and not os.path.isdir(os.path.expanduser(text)):
        text += '.png'
    path = check_output(text)
    if path.suffix.lower() not in PICTURES:
        raise ValueError(f'out: given {text!r}, expected the name of a picture, '
                         f"one of {', '.join(PICTURES)}")
    return path


def write_picture(path: Path, figure: Any, dpi: int) -> None:
    """Write a figure of matplotlib, in the format of the suffix of `path`."""
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:].lower(), dpi=dpi)
    atomic_write(path, content.getvalue())


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
    """Append what `file` lacks of `url`; returns what went wrong, '' for nothing.

    It is read from the start if the server ignores the range.
    """
    start = file.seek(0, os.SEEK_END)
    request = urllib.request.Request(url, headers={'Range': f'bytes={start}-'} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            if response.status != 206:
                start = file.truncate(0)
            length = int(response.headers.get('Content-Length') or 0)       # 0: not known
            with tqdm.wrapattr(response, 'read', desc=Path(file.name).stem, initial=start,
                               total=start + length if length else None, disable=None,
                               leave=False) as stream:
                shutil.copyfileobj(stream, file)
        file.flush()
        is_short = length and file.seek(0, os.SEEK_END) < start + length
        return 'the connection broke off' if is_short else ''
    except urllib.error.HTTPError as error:
        if error.code == 416:           # Range Not Satisfiable: the partial file is wrong
            file.truncate(0)
        return f'the server answers {error.code} {error.reason}'
    except (http.client.HTTPException, OSError) as error:
        return str(getattr(error, 'reason', error))
