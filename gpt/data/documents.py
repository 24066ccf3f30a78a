"""
Files of text, read as documents in batches of about a megabyte.

A document is a .txt or .md file (or a part of it between separators), a line of .jsonl, or a row
of .parquet; .gz and .zst are decompressed. The order of the documents depends on the files alone;
memory is bounded by the longest document allowed. Batches hold bytes: texts() parses and decodes
them, in another process if wanted.
"""

import ast
import gzip
import inspect
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from gpt.files import how_to_convert, plain_text

COMPRESSED, LINES = ('.gz', '.zst'), ('.jsonl', '.json')
SUFFIXES = tuple(kind + packed for packed in ('', *COMPRESSED) for kind in ('.txt', '.md', '.jsonl')
                 ) + ('.parquet',)
EXPECTED = '.txt, .md or .jsonl (these also as .gz or .zst) or .parquet'
BATCH_BYTES = 2 ** 20
BOM = b'\xef\xbb\xbf'
ONE_PER_LINE = "expected one object per line (jq -c '.[]' converts an array, jq -c . objects)"
WRAP_SLACK = 6                  # characters: lines are not always broken as late as possible

TOO_LONG = 'over max_document_mb'                   # remarks, counted by texts()
HAS_EOT = 'with <|endoftext|> as text'
REPAIRED = 'repaired with U+FFFD'
NO_SEPARATOR = 'without the separator'
PLAIN = 'with carriage returns or byte order marks, normalized'
SIMPLE = {'PLAIN', 'RLE', 'BIT_PACKED', 'DELTA_LENGTH_BYTE_ARRAY'}     # as large as decoded
DICTIONARY = {'PLAIN_DICTIONARY', 'RLE_DICTIONARY'}     # a value of several rows is stored once
LINE_END = rb'(?>\r\n|\r|\n)'    # atomic: \r\n is never two


class Options(NamedTuple):
    """How documents are read."""
    text_key: str = 'text'          # the field or column that holds the text
    separator: str = ''             # ends a document within .txt and .md; '': a file is a document
    max_bytes: int = 64 * 2 ** 20   # a longer document (or line of .jsonl) is left out
    errors: str = 'strict'          # 'strict', 'skip' or 'replace', see data/prepare.py
    begins: str = ''                # pattern of a .parquet row that begins a document; '': any row
    unwrap: bool = False            # one paragraph per line, see unwrapped()


class Position(NamedTuple):
    """Where reading starts or resumes."""
    file: int                       # index of the file
    offset: int = 0                 # bytes (after decompression) or rows before it
    number: int = 0                 # documents of the file before it


class Batch(NamedTuple):
    """Consecutive documents, not decoded yet."""
    raws: list[bytes]
    runs: list[tuple]               # (count, label, number of the first) of documents named alike;
                                    # without numbers None. Names are made when they are needed
    after: Position                 # where reading resumes after these
    is_json: bool = False           # each is a line of JSON that holds the text
    left_out: tuple = ()            # (remark, name) of documents left out before these

    def size(self) -> int:
        return sum(map(len, self.raws))

    def name(self, k: int) -> str:
        """Of document k, for error messages and remarks."""
        for count, label, first in self.runs:
            if k < count:
                return label if first is None else f'{label}{first + k}'
            k -= count


class BadDocument(ValueError):
    """A document that cannot be read: (remark, error message)."""


def batches(files: Sequence, start: Position, options: Options,
            path_of: Callable[[int], Path]) -> Iterator[Batch]:
    """Batches of the documents in `files`, from `start` on.

    files: each has a `name`, and path_of(i) is the path of the i-th. Raises ValueError for a file
    that is not what its name says.
    """
    start, small, size = Position(*start), [], 0    # small batches are joined
    for i in range(start.file, len(files)):
        for batch in read(files[i].name, path_of(i), options, start):
            is_full = size >= BATCH_BYTES // 2 or len(small) == 1024
            if small and (is_full or batch.is_json != small[0].is_json):
                yield joined(small)
                small, size = [], 0
            small.append(batch)
            size += batch.size()
        start = Position(i + 1)
    if small:
        yield joined(small)


def joined(small: list[Batch]) -> Batch:
    raws, runs, left_out = ([part for batch in small for part in getattr(batch, key)]
                            for key in ('raws', 'runs', 'left_out'))
    return small[-1]._replace(raws=raws, runs=runs, left_out=tuple(left_out))


def read(name: str, path: Path, options: Options, start: Position) -> Iterator[Batch]:
    """Batches of one file, from `start` on."""
    (kind, packed), after = suffixes(name), Position(start.file + 1)
    if kind == '.parquet':
        yield from parquet_batches(name, path, options, start)
    elif kind == '.py':
        raws = [text.encode() for text in python_documents(path) if text]
        yield Batch(raws, [(len(raws), name, None)], after)
    elif kind in LINES or options.separator:
        yield from separated_batches(name, path, options, start)
    else:
        limit = options.max_bytes + len(BOM) + 1
        if not packed:                  # as much memory is set aside as read() asks for
            limit = min(limit, os.stat(path).st_size)
        with opened(name, path) as file:
            raw = file.read(limit).removeprefix(BOM)
        if len(raw) > options.max_bytes:
            yield Batch([], [], after, left_out=((TOO_LONG, name),))
        else:
            yield Batch([raw], [(1, name, None)], after)


def suffixes(name: str) -> tuple[str, str]:
    """(kind, compression) by the suffixes of a file name: ('.txt', '.gz') or ('.parquet', '')."""
    name, last = os.path.splitext(name.lower())
    return (os.path.splitext(name)[1], last) if last in COMPRESSED else (last, '')


@contextmanager
def opened(name: str, path: Path) -> Iterator[IO[bytes]]:
    """A file open for reading, decompressed; a damaged one raises ValueError with its name."""
    _, packed = suffixes(name)
    if packed == '.gz':
        file = gzip.open(path)
    elif packed == '.zst':
        import pyarrow
        file = pyarrow.input_stream(str(path), compression='zstd')
    else:
        file = open(path, 'rb')
    try:
        with file:
            yield file
    except (EOFError, zlib.error, OSError) as error:
        if not packed:
            raise
        raise ValueError(f'{name}: damaged or truncated ({error}); get it again') from None


# Lines, and parts between separators.

def separated_batches(name: str, path: Path, options: Options, start: Position) -> Iterator[Batch]:
    """Batches of the lines of a .jsonl, or of the parts between options.separator."""
    is_json, (_, offset, number) = suffixes(name)[0] in LINES, start
    separator = b'\n' if is_json else options.separator.encode()
    room = len(separator) + separator.count(b'\n')      # bytes of the longest one
    label = f'{name}:' if is_json else f'{name}: document '
    pending, too_long = bytearray(), False          # read from `offset` on, without a separator
    with opened(name, path) as file:
        seek(file, offset)
        for chunk in chunks(file):                  # the last one is empty
            pending += chunk
            has_bom = BOM in pending
            if chunk:
                raws = split(pending, separator, max(0, len(pending) - len(chunk) - room + 1))
            else:
                raws = [bytes(pending), b''] if pending or too_long else [b'']
            if len(raws) == 1:
                too_long = too_long or len(pending) > options.max_bytes + room
                if too_long:                        # keep only what may begin a separator
                    excess = len(pending) - room + 1
                    del pending[:excess]
                    offset += excess
                continue
            offset += len(pending) - len(raws[-1])
            pending = bytearray(raws.pop())
            left_out = () if number or chunk or is_json or too_long else ((NO_SEPARATOR, name),)
            first, number = number + 1, number + len(raws)
            after = Position(start.file, offset, number) if chunk else Position(start.file + 1)
            raws = stripped(raws, has_bom)
            if too_long:
                left_out = ((TOO_LONG, f'{label}{first}'),)
                raws, first, too_long = raws[1:], first + 1, False
            yield Batch(raws, [(len(raws), label, first)], after, is_json, left_out)


def chunks(file: IO[bytes]) -> Iterator[bytes]:
    """What is left of a file in pieces; none ends between \\r and \\n, and the last is empty."""
    held = b''
    while chunk := file.read(BATCH_BYTES):
        chunk, held = held + chunk, b''
        if chunk.endswith(b'\r'):
            chunk, held = chunk[:-1], b'\r'
        if chunk:
            yield chunk
    if held:
        yield held
    yield b''


def split(raw: bytearray, separator: bytes, start: int) -> list[bytes]:
    """The parts of `raw` between separators, of which the first is not before `start`.

    A line end within the separator stands for any: \\n, \\r\\n or \\r.
    """
    if b'\n' in separator and b'\r' in raw:
        pattern = re.compile(LINE_END.join(map(re.escape, separator.split(b'\n'))))
        return pattern.split(bytes(raw)) if pattern.search(raw, start) else [b'']
    return bytes(raw).split(separator) if raw.find(separator, start) >= 0 else [b'']


def stripped(raws: list[bytes], has_bom: bool) -> list[bytes]:
    """Documents without line ends around them, and without byte order marks at their beginning."""
    raws = [raw.strip(b'\r\n') for raw in raws]
    return [raw.removeprefix(BOM).lstrip(b'\r\n') for raw in raws] if has_bom else raws


def seek(file: IO[bytes], offset: int) -> None:
    """Move to `offset`, also in a stream that cannot seek."""
    if file.seekable():
        file.seek(offset)
        return
    while offset and (chunk := file.read(min(offset, BATCH_BYTES))):
        offset -= len(chunk)


# Parquet.

def parquet_batches(name: str, path: Path, options: Options, start: Position) -> Iterator[Batch]:
    """Batches of rows, decoded about BATCH_BYTES at a time, however they are encoded."""
    from pyarrow import ArrowException, parquet
    key = options.text_key
    try:
        with parquet.ParquetFile(path) as table:
            columns = {field.name: str(field.type) for field in table.schema_arrow}
            is_text = re.match('null|(dictionary<values=)?(large_)?string', columns.get(key, ''))
            encodings = encodings_of(table.metadata, key) if is_text else set()
        if is_text:
            # a value that is stored once is one in memory, until its rows are decoded
            once = [key] if DICTIONARY & encodings and encodings <= SIMPLE | DICTIONARY else []
            with parquet.ParquetFile(path, read_dictionary=once) as table:
                rows = row_batches(table, name, key, start)
                yield from joined_rows(rows, options.begins, start) if options.begins else rows
                return
    except (ArrowException, OSError, KeyError, ValueError) as error:
        raise ValueError(f'{name}: not a parquet file, or damaged ({error})') from None
    if options.errors != 'skip':
        found = ', '.join(f'{column} ({kind})' for column, kind in columns.items())
        raise ValueError(f'{name}: given the columns {found}, expected {key!r} of strings; '
                         f'--text_key names another one, --errors=skip leaves such files out')
    yield Batch([], [], Position(start.file + 1), left_out=((f'files without {key}', name),))


def encodings_of(metadata: Any, key: str) -> set[str]:
    """The encodings of the pages of column `key`, in all row groups."""
    j = [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(key)
    return {encoding for i in range(metadata.num_row_groups)
            for encoding in metadata.row_group(i).column(j).encodings}


def row_batches(table: Any, name: str, key: str, start: Position) -> Iterator[Batch]:
    """Batches of column `key`, of about BATCH_BYTES and within a row group."""
    row, is_simple = 0, encodings_of(table.metadata, key) <= SIMPLE | DICTIONARY
    for i in range(table.num_row_groups):
        group = table.metadata.row_group(i)
        if row + group.num_rows <= start.offset:
            row += group.num_rows
            continue
        size = BATCH_BYTES * group.num_rows // max(1, group.total_byte_size) if is_simple else 4
        for part in table.iter_batches(min(max(1, size), 2 ** 16), row_groups=[i], columns=[key]):
            column = part.column(0)[max(0, start.offset - row):]
            first = row + len(part) - len(column)
            row += len(part)
            for raws in decoded_rows(column):
                runs = [(len(raws), f'{name}: row ', first + 1)]
                first += len(raws)
                yield Batch(raws, runs, Position(start.file, first, first))


def decoded_rows(column: Any) -> Iterator[list[bytes]]:
    """The rows of a column; of one of references to values about BATCH_BYTES at a time."""
    import numpy as np
    import pyarrow
    from pyarrow import compute
    first, ends = 0, []
    if pyarrow.types.is_dictionary(column.type):
        sizes = compute.binary_length(column.dictionary).take(column.indices).fill_null(0)
        ends = np.cumsum(sizes.to_numpy(), dtype=np.int64)
    while first < len(column):
        last = len(column)
        if len(ends):
            limit = int(ends[first - 1] if first else 0) + BATCH_BYTES
            last = max(first + 1, int(np.searchsorted(ends, limit, side='right')))
        rows = column[first:last]
        rows = rows.dictionary_decode() if len(ends) else rows
        yield [raw or b'' for raw in rows.cast(pyarrow.large_binary()).to_pylist()]
        first = last


def joined_rows(batches: Iterator[Batch], begins: str, start: Position) -> Iterator[Batch]:
    """Rows joined to documents; a row that matches `begins` starts the next one."""
    pattern, rows, row, label = re.compile(begins.encode()), [], start.offset, ''
    for batch in batches:
        raws, runs, first = [], [], batch.after.offset - len(batch.raws)
        label = batch.runs[0][1]
        for k, raw in enumerate(batch.raws):
            if rows and pattern.match(raw):
                raws.append(b''.join(rows))
                runs.append((1, label, row + 1))
                rows = []
            if not rows:
                row = first + k
            rows.append(raw)
        yield Batch(raws, runs, Position(start.file, row, row))
    yield Batch([b''.join(rows)], [(1, label, row + 1)], Position(start.file + 1))


def python_documents(file: Path) -> Iterator[str]:
    """The docstrings of the module `file`, joined; of pydoc_data.topics, each topic.

    Nothing is imported.
    """
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return                                      # broken on purpose, as an example
    if file.parts[-2:] == ('pydoc_data', 'topics.py'):
        for node in tree.body:
            if isinstance(node, ast.Assign):
                yield from ast.literal_eval(node.value).values()
        return
    with_docstring = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node, clean=False) for node in ast.walk(tree)
             if isinstance(node, with_docstring))
    yield '\n\n'.join(inspect.cleandoc(text) for text in found if text)


# From a batch to its texts.

def texts(batch: Batch, options: Options, counts: dict[str, list]) -> Iterator[tuple[str, bytes]]:
    """(text, the same as UTF-8) of every document of `batch` that has text.

    counts: {remark: [how many, name of the first]}, to which documents left out or repaired are
    added. Raises ValueError with file and line for what options.errors does not allow.
    """
    for remark, name in batch.left_out:
        counts.setdefault(remark, [0, name])[0] += 1
    for k, raw in enumerate(batch.raws):
        if batch.is_json and not raw.strip():
            continue                                # an empty line
        try:
            text, raw, remarks = parsed(raw, batch.is_json, options)
        except BadDocument as error:
            remark, message = error.args
            if options.errors != 'skip':
                raise ValueError(f'{batch.name(k)}: {message}') from None
            text, remarks = '', [remark]
        for remark in remarks:
            if remark not in counts:
                counts[remark] = [0, batch.name(k)]
            counts[remark][0] += 1
        if text:
            yield text, raw


def parsed(raw: bytes, is_json: bool, options: Options) -> tuple[str, bytes, list[str]]:
    """(text, the same as UTF-8, remarks) of a document; text '' leaves it out."""
    if len(raw) > options.max_bytes:
        return '', b'', [TOO_LONG]
    try:
        original, intact = raw.decode(), True
    except UnicodeDecodeError as error:
        if options.errors != 'replace':
            raise BadDocument('not UTF-8', f'byte {raw[error.start]:#04x} at {error.start:,} is '
                              f'not UTF-8; {how_to_convert(raw)}, or give --errors=replace or '
                              f'--errors=skip') from None
        original, intact = raw.decode(errors='replace'), False
    if is_json:
        original = json_text(original, options.text_key)
    text = plain_text(original)
    is_plain = text == original
    if options.unwrap:
        text = unwrapped(text)
    if not text:
        return '', b'', ['empty']
    if is_json or options.unwrap or not intact or not is_plain:
        try:
            raw = text.encode()
        except UnicodeEncodeError:                  # lone surrogates, which UTF-8 cannot encode
            text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
            raw, intact = text.encode(), False
    remarks = {REPAIRED: not intact, PLAIN: not is_plain, 'with NUL bytes, kept': b'\0' in raw,
               HAS_EOT: b'<|endoftext|>' in raw}
    return text, raw, [remark for remark, is_true in remarks.items() if is_true]


def unwrapped(text: str) -> str:
    """Text of lines broken at a width, as in books of Project Gutenberg, with a paragraph per line.

    A paragraph ends before an empty line, and where a line ends early: the first word of the next
    line would have fitted, and the line ends in neither a comma nor a small letter. Text with
    lines over 100 characters (nine in ten are shorter) only loses its empty lines.
    """
    lines = [' '.join(line.split()) for line in text.splitlines()]
    lengths = sorted(len(line) for line in lines if line)
    width = lengths[len(lengths) * 9 // 10] if lengths else 0
    if width > 100:
        return '\n'.join(line for line in lines if line)
    paragraphs, continues = [], False
    for line, following in zip(lines, [*lines[1:], '']):
        if line and continues:
            paragraphs[-1] += ' ' + line
        elif line:
            paragraphs.append(line)
        continues = False
        if line and following:
            room = width - WRAP_SLACK - len(line)
            no_room = len(following.split()[0]) >= room
            continues = no_room or re.search('[a-z,]$', line) is not None
    return '\n'.join(paragraphs)


def json_text(line: str, text_key: str) -> str:
    """The text in a line of JSON, '' for null."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:   # RecursionError: thousands of brackets
        message = f'not JSON: {error}'.partition(' for integer string')[0]
        if line.strip() in ('[', '{'):
            message += f'; {ONE_PER_LINE}'
        raise BadDocument('not JSON', message) from None
    if not isinstance(row, dict):
        raise BadDocument(f'without {text_key}', ONE_PER_LINE)
    if text_key not in row:
        found = ', '.join(key[:40] for key in list(row)[:8]) or 'none'
        raise BadDocument(f'without {text_key}', f'no field {text_key!r} among {found!r}; '
                                                 f'--text_key names another')
    text = row[text_key]
    if not isinstance(text, str | None):
        raise BadDocument(f'with a {text_key} that is not a string',
                          f'{text_key} is {type(text).__name__}, expected a string')
    return text or ''
