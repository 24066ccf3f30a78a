"""Files read as documents: the same whatever the batches, from any point on, in bounded memory."""

import gzip
import json
import random
import re
import textwrap
import tracemalloc
from types import SimpleNamespace

import pytest

from gpt.data import documents
from gpt.data.documents import Options

pyarrow = pytest.importorskip('pyarrow')
from pyarrow import parquet

TEXTS = [f'Document {i}: ' + 'wörd 世界 ' * (i % 9) + '\r\nend' * (i % 2) for i in range(50)]
TEXTS += ['', 'é']


def zst(path, raw):
    with pyarrow.CompressedOutputStream(str(path), 'zstd') as file:
        file.write(raw)


def as_lines(texts):
    return ''.join(json.dumps({'text': text, 'n': 1}, ensure_ascii=i % 2 == 0) + '\n'
                   for i, text in enumerate(texts)).encode()


def files_of(tmp_path, kind, texts=TEXTS):
    """These texts as files of a kind, in two halves."""
    paths = []
    for k, half in enumerate((texts[:20], texts[20:])):
        path = tmp_path / f'{k}.{kind}'
        raw = as_lines(half) if 'json' in kind else '<|end|>'.join(half).encode()
        if kind == 'parquet':
            parquet.write_table(pyarrow.table({'n': range(len(half)), 'text': half}), path,
                                row_group_size=6)
        elif kind == 'folder':
            for i, text in enumerate(half):
                path = tmp_path / f'{k}-{i:02d}.txt'
                path.write_bytes(text.encode())
                paths.append(path)
            continue
        elif kind.endswith('.gz'):
            path.write_bytes(gzip.compress(raw[:99]) + gzip.compress(raw[99:]))     # two members
        elif kind.endswith('.zst'):
            zst(tmp_path / 'a', raw[:99])
            zst(tmp_path / 'b', raw[99:])
            path.write_bytes((tmp_path / 'a').read_bytes() + (tmp_path / 'b').read_bytes())
        else:
            path.write_bytes(raw)
        paths.append(path)
    return paths


def batches_of(paths, options=Options(), start=(0, 0, 0)):
    files = [SimpleNamespace(name=str(path)) for path in paths]
    return documents.batches(files, start, options, lambda i: paths[i])


def texts_of(batches, options=Options(), counts=None):
    counts = {} if counts is None else counts
    return [text for batch in batches for text, raw in documents.texts(batch, options, counts)
            if text.encode() == raw or pytest.fail('raw is not the text')]


@pytest.mark.parametrize('size', [1, 40, 700, 2 ** 20])
@pytest.mark.parametrize('kind', ['jsonl', 'jsonl.gz', 'jsonl.zst', 'parquet', 'txt', 'md.gz',
                                  'txt.zst', 'folder'])
def test_any_batch_size_gives_the_same_and_resumes_anywhere(tmp_path, monkeypatch, kind, size):
    """Resuming relies on it: reading from `after` gives the batches that follow."""
    monkeypatch.setattr(documents, 'BATCH_BYTES', size)
    options = Options(separator='<|end|>' if kind[:2] in ('tx', 'md') else '')
    paths = files_of(tmp_path, kind)
    wanted = [text.replace('\r\n', '\n') for text in TEXTS if text]
    if options.separator:
        wanted = [text.strip('\n') for text in wanted]
    batches = list(batches_of(paths, options))
    assert texts_of(batches, options) == wanted
    for i in {len(batches) - 1, *random.Random(size).sample(range(len(batches)),
                                                            min(12, len(batches)))}:
        rest = batches_of(paths, options, batches[i].after)
        assert texts_of(rest, options) == texts_of(batches[i + 1:], options)


@pytest.mark.parametrize('kind', ['jsonl', 'jsonl.gz', 'jsonl.zst', 'txt', 'txt.gz'])
@pytest.mark.parametrize('ended', [True, False])
def test_a_document_that_is_too_long_is_skipped_in_little_memory(tmp_path, kind, ended):
    """60 MB in one document, among others; not a tenth of it is in memory."""
    options = Options(separator='' if 'json' in kind else '<|end|>', max_bytes=2 ** 20)
    long = b'{"text": "' + b'x' * 60_000_000
    raw = [as_lines(['a']).strip(), long, as_lines(['b']).strip()][:3 if ended else 2]
    raw = (b'\n' if 'json' in kind else b'<|end|>').join(raw)
    path = tmp_path / f'a.{kind}'
    path.write_bytes(gzip.compress(raw, 1)) if kind.endswith('gz') else (
        zst(path, raw) if kind.endswith('zst') else path.write_bytes(raw))
    del raw, long
    tracemalloc.start()
    counts = {}
    found = texts_of(batches_of([path], options), options, counts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 2 if ended else 1
    where = f'{path}:2' if 'json' in kind else f'{path}: document 2'
    assert counts == {documents.TOO_LONG: [1, where]}
    assert peak < 6_000_000


def test_too_long_files_and_rows_are_skipped(tmp_path):
    options = Options(max_bytes=100)
    (tmp_path / 'a.txt').write_text('x' * 101)
    (tmp_path / 'b.txt').write_text('x' * 100)
    parquet.write_table(pyarrow.table({'text': ['y' * 101, None, 'z']}), tmp_path / 'c.parquet')
    counts = {}
    found = texts_of(batches_of(sorted(tmp_path.iterdir()), options), options, counts)
    assert found == ['x' * 100, 'z']
    assert counts == {documents.TOO_LONG: [2, f'{tmp_path}/a.txt'],
                      'empty': [1, f'{tmp_path}/c.parquet: row 2']}


BAD = {'a.txt': b'caf\xe9', 'b.jsonl': b'{"text": "fine"}\n{"text": "caf\xe9"}\n\n{"text"\n'
       b'{"n": 1}\n{"text": 3}\n[1]\n{"text": "nul \\u0000"}\n{"text": "lone \\ud800"}\n'
       b'{"text": null}\n',
       'c.md': b'\xef\xbb\xbfmarked', 'd.jsonl': b'\xef\xbb\xbf{"text": "also"}\r\n{"text": "x"}'}


def bad_files(tmp_path):
    for name, content in BAD.items():
        (tmp_path / name).write_bytes(content)
    parquet.write_table(pyarrow.table({'body': ['no text here']}), tmp_path / 'e.parquet')
    return sorted(tmp_path.iterdir())


def test_skip_leaves_out_what_cannot_be_read_and_counts_it(tmp_path):
    options, counts = Options(errors='skip'), {}
    found = texts_of(batches_of(bad_files(tmp_path), options), options, counts)
    assert found == ['fine', 'nul \0', 'lone \ufffd', 'marked', 'also', 'x']
    found = {what: (n, where.rpartition('/')[2]) for what, (n, where) in counts.items()}
    assert found == {
        'not UTF-8': (2, 'a.txt'), 'not JSON': (1, 'b.jsonl:4'), 'without text': (2, 'b.jsonl:5'),
        'with a text that is not a string': (1, 'b.jsonl:6'),
        'with NUL bytes, kept': (1, 'b.jsonl:8'),
        documents.REPAIRED: (1, 'b.jsonl:9'), 'empty': (1, 'b.jsonl:10'),
        'files without text': (1, 'e.parquet')}


def test_replace_repairs_bytes_and_refuses_the_rest(tmp_path):
    options, counts = Options(errors='replace'), {}
    paths = bad_files(tmp_path)
    assert texts_of(batches_of(paths[:1], options), options, counts) == ['caf\ufffd']
    assert counts == {documents.REPAIRED: [1, str(paths[0])]}
    with pytest.raises(ValueError, match='b.jsonl:4: not JSON'):
        texts_of(batches_of(paths[1:], options), options)
    with pytest.raises(ValueError, match="e.parquet: given the columns body .*, expected 'text'"):
        texts_of(batches_of(paths[4:], options), options)


@pytest.mark.parametrize('name', ['a.jsonl.gz', 'a.jsonl.zst', 'a.parquet'])
def test_a_truncated_file_is_named(tmp_path, name):
    path = tmp_path / name
    raw = as_lines([random.Random(1).randbytes(99_000).hex()])
    if name.endswith('parquet'):
        parquet.write_table(pyarrow.table({'text': TEXTS}), path)
    else:
        path.write_bytes(gzip.compress(raw)) if name.endswith('gz') else zst(path, raw)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=f'{name}: (damaged or truncated|not a parquet file)'):
        texts_of(batches_of([path]))


def test_columns_of_any_string_type_are_read_and_numbers_refused(tmp_path):
    for i, kind in enumerate((pyarrow.string(), pyarrow.large_string(),
                              pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))):
        column = pyarrow.array(['a', None, 'bé'], pyarrow.string()).cast(kind)
        table = pyarrow.table({'text': column})
        parquet.write_table(table, tmp_path / f'{i}.parquet')
        assert texts_of(batches_of([tmp_path / f'{i}.parquet'])) == ['a', 'bé']
    parquet.write_table(pyarrow.table({'text': [1, 2]}), tmp_path / 'n.parquet')
    with pytest.raises(ValueError, match='n.parquet: given the columns text .int64., expected'):
        texts_of(batches_of([tmp_path / 'n.parquet']))


@pytest.mark.parametrize('size', [1, 40, 2 ** 20])
@pytest.mark.parametrize('encoding', ['PLAIN', 'DELTA_BYTE_ARRAY', 'DELTA_LENGTH_BYTE_ARRAY', None])
def test_rows_in_any_encoding_are_the_same_from_any_batch_on(tmp_path, monkeypatch, encoding, size):
    monkeypatch.setattr(documents, 'BATCH_BYTES', size)
    texts = [f'{i % 7} {"wörd " * (i % 5)}' for i in range(90)] + [None, '']
    path = tmp_path / 'a.parquet'
    options = {'use_dictionary': False, 'column_encoding': {'text': encoding}} if encoding else {}
    parquet.write_table(pyarrow.table({'text': texts}), path, row_group_size=40, **options)
    batches = list(batches_of([path]))
    assert texts_of(batches) == texts[:-2]
    for i in range(0, len(batches), 9):
        assert texts_of(batches_of([path], start=batches[i].after)) == texts_of(batches[i + 1:])


def test_rows_without_any_text_are_empty(tmp_path):
    for i, kind in enumerate((pyarrow.null(), pyarrow.string(), pyarrow.large_string())):
        table = pyarrow.table({'text': pyarrow.array([None] * 5, kind)})
        parquet.write_table(table, tmp_path / f'{i}.parquet')
    parquet.write_table(pyarrow.table({'text': ['a', None]}), tmp_path / '3.parquet')
    counts = {}
    assert texts_of(batches_of(sorted(tmp_path.iterdir())), counts=counts) == ['a']
    assert counts['empty'] == [16, f'{tmp_path}/0.parquet: row 1']


@pytest.mark.parametrize('size', [1, 100, 2 ** 20])
def test_lines_are_joined_to_articles(tmp_path, monkeypatch, size):
    """As in WikiText on the hub: a row per line, an article from a heading on."""
    monkeypatch.setattr(documents, 'BATCH_BYTES', size)
    articles = [''.join([f' = Title {i} = \n', '', f' text {i} \n' * (i % 4), ' = = Part = = \n'])
                for i in range(30)]
    rows = [row for article in articles for row in article.splitlines(keepends=True) + ['']]
    parquet.write_table(pyarrow.table({'text': rows}), tmp_path / 'a.parquet', row_group_size=11)
    options = Options(begins=' = [^=]')
    batches = list(batches_of([tmp_path / 'a.parquet'], options))
    assert texts_of(batches, options) == articles
    for i, batch in enumerate(batches):
        rest = batches_of([tmp_path / 'a.parquet'], options, batch.after)
        assert texts_of(rest, options) == texts_of(batches[i + 1:], options)


def test_a_line_end_may_be_the_separator(tmp_path):
    (tmp_path / 'a.txt').write_text('one\n{"text": "two"}\n\nthree')
    counts = {}
    found = texts_of(batches_of([tmp_path / 'a.txt'], Options(separator='\n')), counts=counts)
    assert found == ['one', '{"text": "two"}', 'three'] and counts['empty'][0] == 1
    found = texts_of(batches_of([tmp_path / 'a.txt'], Options(separator='%%')), counts=counts)
    assert len(found) == 1 and counts['without the separator'] == [1, f'{tmp_path}/a.txt']


@pytest.mark.parametrize('size', [*range(1, 12), 2 ** 20])
def test_overlapping_separators_divide_the_same_in_any_batch(tmp_path, monkeypatch,
                                                                           size):
    monkeypatch.setattr(documents, 'BATCH_BYTES', size)
    (tmp_path / 'a.txt').write_text('one\n----\ntwo---three\n-------four')
    options = Options(separator='---')
    batches = list(batches_of([tmp_path / 'a.txt'], options))
    assert texts_of(batches, options) == ['one', '-\ntwo', 'three', '-four']
    for i, batch in enumerate(batches):
        rest = batches_of([tmp_path / 'a.txt'], options, batch.after)
        assert texts_of(rest, options) == texts_of(batches[i + 1:], options)


@pytest.mark.parametrize('line', ['{"text": "a", "n": ' + '1' * 5000 + '}',
                                  '{"text": ' + '[' * 100_000, '"text"', '[{"text": "a"}]', '{}'])
def test_a_bad_line_of_json_is_named_or_skipped(tmp_path, line):
    path = tmp_path / 'a.jsonl'
    path.write_text(f'{{"text": "first"}}\n{line}\n{{"text": "last"}}\n')
    with pytest.raises(ValueError, match=r'a.jsonl:2: (not JSON|no field|expected one)'):
        texts_of(batches_of([path]))
    options = Options(errors='skip')
    assert texts_of(batches_of([path], options), options) == ['first', 'last']


@pytest.mark.parametrize('line, message', [
    ('[1,2]', documents.ONE_PER_LINE), ('[', f'{documents.ONE_PER_LINE}'),
    ('{"a": 1, "b": 2}', "no field 'text' among 'a, b'; --text_key names another"),
    ('{"text": "cut', 'starting at: line 1 column 10 (char 9)')])
def test_a_bad_line_of_json_says_what_is_wrong(tmp_path, line, message):
    path = tmp_path / 'a.jsonl'
    path.write_text(line)
    with pytest.raises(ValueError, match=re.escape(message) + '$'):
        texts_of(batches_of([path]))


def test_one_long_value_among_many_short_ones_is_decoded_by_the_bytes():
    column = pyarrow.array(['x' * 2 ** 21, *'ab' * 5000]).dictionary_encode()
    parts = list(documents.decoded_rows(column))
    assert [len(part) for part in parts] == [1, 10_000]
    assert b''.join(parts[1]) == b'ab' * 5000


def test_a_column_of_another_type_is_refused_or_skipped(tmp_path):
    table = pyarrow.table({'text': [['a'], ['b']]})
    parquet.write_table(table, tmp_path / 'a.parquet')
    with pytest.raises(ValueError, match='a.parquet: given the columns text .list.*expected'):
        texts_of(batches_of([tmp_path / 'a.parquet']))
    options, counts = Options(errors='skip'), {}
    assert texts_of(batches_of([tmp_path / 'a.parquet'], options), options, counts) == []
    assert counts == {'files without text': [1, f'{tmp_path}/a.parquet']}


def test_the_case_of_an_ending_does_not_matter(tmp_path):
    (tmp_path / 'A.TXT').write_text('one')
    (tmp_path / 'B.JSONL.GZ').write_bytes(gzip.compress(as_lines(['two'])))
    assert texts_of(batches_of(sorted(tmp_path.iterdir()))) == ['one', 'two']


MARK = '\ufeff'
PLAIN_TEXT = 'One.\nTwo.\n\nThree,\nfour.\n\n\nFive.\n\nSix.\n'


@pytest.mark.parametrize('size', [*range(1, 8), 2 ** 20])
@pytest.mark.parametrize('end', ['\n', '\r\n', '\r'])
@pytest.mark.parametrize('separator', ['', '\n', '\n\n', '.\n', '\nF'])
def test_line_ends_and_byte_order_marks_reach_no_document(tmp_path, monkeypatch, size, end,
                                                          separator):
    """In batches of any size, from any batch on; --separator is written with \\n."""
    monkeypatch.setattr(documents, 'BATCH_BYTES', size)
    options, path = Options(separator=separator), tmp_path / 'a.txt'
    path.write_bytes(PLAIN_TEXT.encode())
    wanted = texts_of(batches_of([path], options), options)
    path.write_bytes(MARK.encode() + PLAIN_TEXT.replace('\n', end).encode())
    batches = list(batches_of([path], options))
    assert texts_of(batches, options) == wanted and len(wanted) > 1 - (separator == '')
    for i, batch in enumerate(batches):
        rest = batches_of([path], options, batch.after)
        assert texts_of(rest, options) == texts_of(batches[i + 1:], options)


@pytest.mark.parametrize('end', ['\n', '\r\n', '\r'])
def test_lines_of_json_and_rows_with_line_ends_of_other_systems(tmp_path, end):
    """Files with byte order marks are often joined; a text may hold one itself."""
    texts, counts = [MARK + PLAIN_TEXT.replace('\n', end), f'a{end}{MARK}b', 'c'], {}
    lines = [MARK + json.dumps({'text': text}, ensure_ascii=False) for text in texts]
    (tmp_path / 'a.jsonl').write_bytes(end.join(lines).encode())
    parquet.write_table(pyarrow.table({'text': texts}), tmp_path / 'b.parquet')
    found = texts_of(batches_of(sorted(tmp_path.iterdir())), counts=counts)
    assert found == [PLAIN_TEXT, 'a\nb', 'c'] * 2
    assert counts == {documents.PLAIN: [4, f'{tmp_path}/a.jsonl:1']}


def test_a_mark_within_a_line_is_a_character(tmp_path):
    (tmp_path / 'a.txt').write_text(f'zero{MARK}width\n')
    assert texts_of(batches_of([tmp_path / 'a.txt'])) == [f'zero{MARK}width\n']


PARAGRAPHS = ['CHAPTER ONE', '"' + 'It was a windy night, and the sea was loud. ' * 9 + 'He said."',
              'He shut the door; ' * 40 + 'and he went.', 'Then nothing more was heard of it.']


@pytest.mark.parametrize('between', ['\n', '\n\n', '\r\n'])
def test_lines_broken_at_a_width_are_joined(between):
    """Broken by textwrap; without empty lines a short last line ends a paragraph."""
    wrapped = between.join(textwrap.fill(text, 70) for text in PARAGRAPHS)
    assert documents.unwrapped(wrapped).split('\n') == PARAGRAPHS


def test_long_lines_lose_their_empty_lines_only():
    assert documents.unwrapped('\n\n'.join(PARAGRAPHS * 3)).split('\n') == PARAGRAPHS * 3
    assert documents.unwrapped('') == documents.unwrapped('\n \n') == ''


def test_unwrapped_documents_are_what_is_read(tmp_path):
    (tmp_path / 'a.txt').write_text(textwrap.fill(PARAGRAPHS[2], 70) + '\n\nEnd.\n')
    assert texts_of(batches_of([tmp_path / 'a.txt']), Options(unwrap=True)) == [
        PARAGRAPHS[2] + '\nEnd.']
