"""
Files of text, read as documents, in batches of about a megabyte: their order depends on the files
alone, and memory is bounded by the longest document that is allowed.

A document is a .txt or .md file (or what lies between two separators in it), a line of .jsonl, a
row of .parquet; .gz and .zst are unpacked on the way. Batches hold bytes: to parse and decode them
is left to texts(), for other processes to do.
"""

import ast
import gzip
import inspect
import json
import re
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

PACKED = ('.gz', '.zst')
SUFFIXES = tuple(kind + packed for packed in ('', *PACKED) for kind in ('.txt', '.md', '.jsonl')
                 ) + ('.parquet',)
EXPECTED = '.txt, .md or .jsonl (these also as .gz or .zst) or .parquet'
BATCH_BYTES = 2 ** 20
BOM = b'\xef\xbb\xbf'
TOO_LONG = 'over max_document_mb'
ARRAY = "expected one object a line, as jq -c '.[]' makes of an array and jq -c . of objects"
MARKED = 'with <|endoftext|> as text'
WRAP_SLACK = 6                  # characters: lines were not always broken as late as possible


class Options(NamedTuple):
    """How documents are read."""
    text_key: str = 'text'          # the field or column that holds the text
    separator: str = ''             # ends a document within .txt and .md; '': a file is a document
    max_bytes: int = 64 * 2 ** 20   # a longer document (or line of .jsonl) is left out
    errors: str = 'strict'          # 'strict', 'skip' or 'replace', see prepare.py
    begins: str = ''                # a row of .parquet that matches begins a document; '': any
    unwrap: bool = False            # one paragraph a line, see unwrapped()


class Batch(NamedTuple):
    """Documents that follow one another, not decoded yet."""
    raws: list                      # the bytes of each
    names: object                   # of each: a list, or what stands before its number
    first: int                      # number of documents before these in the file
    after: tuple                    # (file, offset, number) where reading goes on behind these
    is_json: bool = False           # each is a line of JSON that holds the text
    left_out: tuple = ()            # (what, name) of documents that were passed over before them

    def name(self, i):
        return self.names[i] if type(self.names) is list else f'{self.names}{self.first + i + 1}'

    def size(self):
        return sum(map(len, self.raws))


def batches(files, start, options, path_of):
    """Batches of the documents in `files` from `start`, the `after` of an earlier batch, on.

    A file has a name, and path_of(i) says where the i-th lies. Raises ValueError for one that is
    not what its name says.
    """
    index, offset, number = start
    small = []                                  # batches of files that are a document each
    for i in range(index, len(files)):
        for batch in read(files[i].name, path_of(i), options, i, offset, number):
            if type(batch.names) is list:
                small.append(batch)
            if small and (small[-1] is not batch or len(small) == 1024 or
                          sum(one.size() for one in small) >= BATCH_BYTES):
                yield joined(small)
                small = []
            if type(batch.names) is not list:
                yield batch
        offset = number = 0
    if small:
        yield joined(small)


def joined(small):
    return Batch([raw for one in small for raw in one.raws],
                 [name for one in small for name in one.names], 0, small[-1].after,
                 left_out=tuple(what for one in small for what in one.left_out))


def read(name, path, options, i, offset, number):
    """Batches of file `i`, from its document `number` at `offset` (bytes, or rows) on."""
    kind = Path(name.lower().removesuffix('.gz').removesuffix('.zst')).suffix
    is_json, end = kind in ('.jsonl', '.json'), (i + 1, 0, 0)
    if kind == '.parquet':
        yield from parquet_batches(name, path, options, i, offset)
    elif kind == '.py':
        raws = [text.encode() for text in python_documents(path) if text]
        yield Batch(raws, [name] * len(raws), 0, end)
    elif is_json or options.separator:
        yield from parted_batches(name, path, is_json, options, i, offset, number)
    else:
        with opened(name, path) as file:
            raw = file.read(options.max_bytes + len(BOM) + 1).removeprefix(BOM)
        if len(raw) > options.max_bytes:
            yield Batch([], [], 0, end, left_out=((TOO_LONG, name),))
        else:
            yield Batch([raw], [name], 0, end)


@contextmanager
def opened(name, path):
    """The bytes of a file, unpacked if need be; damage in it is a ValueError that names it."""
    packed = Path(name.lower()).suffix
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
        if packed not in PACKED:
            raise
        raise ValueError(f'{name}: cannot be unpacked, damaged or cut off: {error}') from None


def parted_batches(name, path, is_json, options, i, offset, number):
    """Batches of the lines of a .jsonl, or of what options.separator parts."""
    separator = b'\n' if is_json else options.separator.encode()
    label, width = f'{name}:' if is_json else f'{name}: document ', len(separator)
    with opened(name, path) as file:
        skip(file, offset)
        held, too_long = bytearray(), False     # what was read from `offset` on, of which document
        while chunk := file.read(BATCH_BYTES):
            if not offset and not held and chunk.startswith(BOM):
                chunk, offset = chunk[len(BOM):], len(BOM)
            held += chunk
            if held.find(separator, max(0, len(held) - len(chunk) - width + 1)) < 0:
                too_long = too_long or len(held) > options.max_bytes + width
                if too_long:                    # dropped, but for what may begin a separator
                    cut = len(held) - width + 1
                    del held[:cut]
                    offset += cut
                continue
            raws = bytes(held).split(separator)
            offset += len(held) - len(raws[-1])
            held, first, number = bytearray(raws.pop()), number, number + len(raws)
            yield batch_of_parts(raws, label, first, (i, offset, number), is_json, too_long)
            too_long = False
    if held or too_long:
        alone = () if number or is_json else (('without the separator', name),)
        yield batch_of_parts([bytes(held)], label, number, (i + 1, 0, 0), is_json, too_long, alone)


def batch_of_parts(raws, label, first, after, is_json, too_long, left_out=()):
    if too_long:                                # only the end of it is there
        raws, first, left_out = raws[1:], first + 1, ((TOO_LONG, f'{label}{first + 1}'),)
    return Batch([raw.strip(b'\r\n') for raw in raws], label, first, after, is_json, left_out)


def skip(file, offset):
    """Go on behind the first `offset` bytes."""
    if file.seekable():
        file.seek(offset)
        return
    while offset and (chunk := file.read(min(offset, BATCH_BYTES))):
        offset -= len(chunk)


def parquet_batches(name, path, options, i, first):
    """Batches of the rows from `first` on; a row group's text is held at most."""
    from pyarrow import ArrowException, parquet
    key, end = options.text_key, (i + 1, 0, 0)
    try:
        with parquet.ParquetFile(path) as table:
            columns = {field.name: str(field.type) for field in table.schema_arrow}
            if re.match('(dictionary<values=)?(large_)?string', columns.get(key, '')):
                found = column_batches(table, name, key, i, first)
                yield from regrouped(found, options.begins, i, first) if options.begins else found
                return
    except (ArrowException, OSError) as error:
        raise ValueError(f'{name}: not a parquet file, or a damaged one ({error})') from None
    if options.errors != 'skip':
        why = (f'{key} is {columns[key]}, expected a text (string)' if key in columns else
               f"no column {key!r} among {', '.join(columns)}")
        raise ValueError(f'{name}: {why}; --text_key names another, --errors=skip leaves such '
                         f'files out')
    yield Batch([], f'{name}: row ', 0, end, left_out=((f'files without {key}', name),))


def column_batches(table, name, key, i, first):
    import pyarrow
    row, rows = 0, table.metadata.num_rows
    for group in range(table.num_row_groups):
        about = table.metadata.row_group(group)
        if row + about.num_rows <= first:
            row += about.num_rows
            continue
        size = BATCH_BYTES * about.num_rows // max(1, about.total_byte_size)
        for part in table.iter_batches(min(max(1, size), 2 ** 16), row_groups=[group],
                                       columns=[key]):
            column = part.column(0)[max(0, first - row):]
            row += len(part)
            if not len(column):
                continue
            if pyarrow.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            raws = [raw or b'' for raw in column.cast(pyarrow.large_binary()).to_pylist()]
            yield Batch(raws, f'{name}: row ', row - len(raws),
                        (i, row, row) if row < rows else (i + 1, 0, 0))


def regrouped(found, begins, i, first):
    """Rows joined to documents, each from a row that matches `begins` to before the next one."""
    pattern, rows, row, name = re.compile(begins.encode()), [], first, ''
    for batch in found:
        raws, names = [], []
        for k, raw in enumerate(batch.raws):
            if rows and pattern.match(raw):
                raws.append(b''.join(rows))
                names.append(name)
                rows = []
            if not rows:
                row, name = batch.first + k, batch.name(k)
            rows.append(raw)
        yield Batch(raws, names, 0, (i, row, row))
    yield Batch([b''.join(rows)], [name], 0, (i + 1, 0, 0))


def python_documents(file):
    """The docstrings of the module `file`, joined, or each topic of pydoc_data.topics;
    nothing is imported."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return                                                      # a deliberately broken example
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

def texts(batch, options, counts):
    """(text, the same as UTF-8) of every document of `batch` that has text.

    What was left out or mended is counted in `counts`: {what: [how many, where the first]}.
    Raises ValueError, naming file and line, for what options.errors does not forgive.
    """
    for what, name in batch.left_out:
        note(counts, what, name)
    for i, raw in enumerate(batch.raws):
        if batch.is_json and not raw.strip():
            continue                            # an empty line
        if len(raw) > options.max_bytes:
            note(counts, TOO_LONG, batch.name(i))
            continue
        try:
            text, whole = decoded(raw, options.errors)
            text = field(text, options.text_key) if batch.is_json else text
        except ValueError as error:
            what, message = error.args
            if options.errors != 'skip':
                raise ValueError(f'{batch.name(i)}: {message}') from None
            note(counts, what, batch.name(i))
            continue
        text = unwrapped(text) if options.unwrap else text
        if not text:
            note(counts, 'empty', batch.name(i))
            continue
        try:
            raw = raw if whole and not batch.is_json and not options.unwrap else text.encode()
        except UnicodeEncodeError:              # lone surrogates, which UTF-8 has no form for
            text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
            raw, whole = text.encode(), False
        if not whole:
            note(counts, 'mended with U+FFFD', batch.name(i))
        if b'\0' in raw:
            note(counts, 'with NUL bytes, kept', batch.name(i))
        if b'<|endoftext|>' in raw:
            note(counts, MARKED, batch.name(i))
        yield text, raw


def unwrapped(text):
    """Text of lines broken at a width, as books of Project Gutenberg are, as a paragraph a line.

    A paragraph ends before an empty line, and where a line ends early: the next line's first word
    would have had room on it, and what it ends with is no comma and no small letter. Text of longer
    lines than 100 characters (nine in ten are no longer) loses its empty lines only.
    """
    lines = [' '.join(line.split()) for line in text.splitlines()]
    lengths = sorted(len(line) for line in lines if line)
    width = lengths[len(lengths) * 9 // 10] if lengths else 0
    if width > 100:
        return '\n'.join(line for line in lines if line)
    paragraphs, goes_on = [], False
    for line, following in zip(lines, [*lines[1:], '']):
        if line and goes_on:
            paragraphs[-1] += ' ' + line
        elif line:
            paragraphs.append(line)
        room = width - WRAP_SLACK - len(line)
        goes_on = bool(following) and (len(following.split()[0]) >= room or
                                       re.search('[a-z,]$', line) is not None) and bool(line)
    return '\n'.join(paragraphs)


def note(counts, what, name):
    counts.setdefault(what, [0, name])[0] += 1


def decoded(raw, errors):
    """(text, whether it is all that was there)."""
    try:
        return raw.decode(), True
    except UnicodeDecodeError as error:
        if errors == 'replace':
            return raw.decode(errors='replace'), False
        it_may_be = 'utf-16' if raw[:2] in (b'\xff\xfe', b'\xfe\xff') else 'latin1'
        raise ValueError('not UTF-8', f'byte {raw[error.start]:#04x} at {error.start:,} is not '
                         f'UTF-8; convert it, as in: iconv -f {it_may_be} -t utf-8, or give '
                         f'--errors=replace or --errors=skip') from None


def field(line, text_key):
    """The text in a line of JSON, '' for null."""
    try:
        text = json.loads(line)[text_key]
    except (ValueError, RecursionError) as error:   # RecursionError: thousands of brackets
        words = f'not JSON: {error}' + f'; {ARRAY}' * (line.strip() in ('[', '{'))
        raise ValueError('not JSON', words) from None
    except (KeyError, TypeError):
        raise ValueError(f'without {text_key}', ARRAY if line.startswith('[') else
                         f'no field {text_key!r} here; --text_key names another') from None
    if not isinstance(text, str | None):
        raise ValueError(f'with a {text_key} that is no text',
                         f'{text_key} is {type(text).__name__}, expected a text')
    return text or ''
