"""
The test sets of the evaluations: one table of their origins, one reader for each.

A missing file is downloaded once into data/benchmarks/ and checked; your own file is read from
`path`. Every reader returns (its content, facts): path, sha256, and whether it is the official
file, with which published numbers were measured. All raise ValueError with file and line.
"""

import hashlib
import io
import re
import tarfile
import zipfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

from gpt import files
from gpt.files import ROOT, atomic_write, decode, download
from gpt.shapes import parse_json

PLACE = ROOT / 'data' / 'benchmarks'
BLANK = r'[^\S\n]*'
HEADING = re.compile(       # before a line = A =, but not before = = A = =
    rf'(?:^|\n)(?={BLANK}= (?!=).*(?<!=) ={BLANK}(?:\n|$))')
WIKITEXT = 'https://wikitext.smerity.com/'
SOURCES = {     # name: (url, its sha256, the file in an archive)
    'hellaswag': ('https://raw.githubusercontent.com/rowanz/hellaswag/master/data/'
                  'hellaswag_val.jsonl',
                  '0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588', ''),
    'lambada': ('https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl',
                '4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226', ''),
    'cbt': ('http://www.thespermwhale.com/jaseweston/babi/CBTest.tgz',
            '932df0cadc1337b2a12b4c696b1041c1d1c6d4b6bd319874c6288f02e4a61e92', 'CBTest/data/'),
    'wikitext2': (WIKITEXT + 'wikitext-2-v1.zip',
                  '92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c',
                  'wikitext-2/wiki.test.tokens'),
    'wikitext2-raw': (WIKITEXT + 'wikitext-2-raw-v1.zip',
                      'ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11',
                      'wikitext-2-raw/wiki.test.raw'),
    'wikitext103': (WIKITEXT + 'wikitext-103-v1.zip',
                    '242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590',
                    'wikitext-103/wiki.test.tokens'),
    'enwik8': ('https://mattmahoney.net/dc/enwik8.zip',
               '547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc', 'enwik8'),
    'text8': ('https://mattmahoney.net/dc/text8.zip',
              'a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232', 'text8'),
    '1bw': ('http://www.statmt.org/lm-benchmark/'
            '1-billion-word-language-modeling-benchmark-r13output.tar.gz',
            '01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e',
            '1-billion-word-language-modeling-benchmark-r13output/'
            'heldout-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050'),
    'ptb': ('ptb.test.txt',         # licensed: cannot be downloaded
            'dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0', ''),
}
KNOWN = {       # sha256 of the files in these archives
    'wikitext2': 'd790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0',
    'wikitext2-raw': '173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08',
    'enwik8': '2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8'}
CBT_BLOBS = {   # the beginnings of git's hashes (sha1) of the unmodified files
    'cbtest_CN_valid_2000ex.txt': 'dbe54c05', 'cbtest_CN_test_2500ex.txt': 'dd2475af',
    'cbtest_NE_valid_2000ex.txt': '7f702d10', 'cbtest_NE_test_2500ex.txt': '212bb2d0',
    'cbtest_V_valid_2000ex.txt': '19ceb44a', 'cbtest_V_test_2500ex.txt': '2959302b',
    'cbtest_P_valid_2000ex.txt': 'a74aab34', 'cbtest_P_test_2500ex.txt': 'b24728c1'}

NOT_THE_DATA = (        # how such files begin, in lower case
    b'<!doctype', b'<html', b'version https://git-lfs', b'\x1f\x8b', b'\x28\xb5\x2f\xfd',
    b'\xfd7zxz', b'bzh', b'par1', b'arrow1')


class HellaSwagRow(TypedDict):
    ctx: str
    endings: list[str]
    label: NotRequired[Any]         # the test set has none
    activity_label: NotRequired[str]
    ctx_a: NotRequired[str]
    ctx_b: NotRequired[str]
    source_id: NotRequired[str | None]
    split_type: NotRequired[str | None]


class LambadaRow(TypedDict):
    text: str


class Question(NamedTuple):
    """A question of the Children's Book Test (Hill et al. 2015), tokens separated by spaces."""
    sentences: list[str]    # 20
    query: str              # the 21st, with XXXXX for a word
    answer: str
    candidates: list[str]   # 10, the answer among them
    where: str              # file:line


def obtain(name: str, path: str | Path = '') -> tuple[bytes, dict]:
    """(content, facts) of the test set `name`, or of the file `path`, which may be its .zip."""
    url, expected, member = SOURCES[name]
    place = PLACE / Path(url).name
    if name == '1bw' and not path:
        path = unpack(name, [member])
        raw = read_bytes(path)
        return raw, {**facts(path, raw), 'official': place.exists()}    # of a verified archive
    if name == 'ptb' and not path and not place.exists():
        raise ValueError(f'the Penn Treebank is licensed by the LDC and cannot be downloaded; '
                         f'put its test set, {url} (449,945 bytes, sha256 {expected}), at {place}')
    if name != 'ptb' and not path:
        download(url, place, expected)
    path = path or place
    raw = read_bytes(path)
    about = facts(path, raw, {expected, KNOWN.get(name)})
    if member and raw[:2] == b'PK':
        try:
            raw = zipfile.ZipFile(io.BytesIO(raw)).read(member)
        except (zipfile.BadZipFile, KeyError) as error:
            raise ValueError(f'{path}: cannot be unpacked ({error})') from None
    return raw, about


def facts(path: str | Path, raw: bytes, known: set | tuple = ()) -> dict:
    """{'path', 'sha256', 'official': whether the sha256 is in `known`} of a file."""
    sha256 = hashlib.sha256(raw).hexdigest()
    return {'path': str(path), 'sha256': sha256, 'official': sha256 in known}


def facts_together(facts: list[dict]) -> dict:
    """The facts of several files as those of one."""
    return {'path': ', '.join(one['path'] for one in facts),
            'sha256': '-'.join(one['sha256'] for one in facts),
            'official': all(one['official'] for one in facts),
            'skipped': sum(one['skipped'] for one in facts)}


def read_bytes(path: str | Path) -> bytes:
    """The content of a file; ValueError for what is often given instead of it."""
    raw = files.read_bytes(path)
    if raw[:200].lstrip(b'\xef\xbb\xbf \r\n').lower().startswith(NOT_THE_DATA):
        raise ValueError(f'{path}: is a web page, a Git LFS pointer, or compressed or parquet; '
                         f'expected the text of the original file')
    return raw


def unpack(name: str, members: list[str]) -> Path:
    """The first of these files of the .tar.gz of `name`, in PLACE; if missing, all are unpacked."""
    wanted = {member: PLACE / Path(member).name for member in members}
    first = wanted[members[0]]
    if first.exists():
        return first
    url, expected, _ = SOURCES[name]
    with tarfile.open(download(url, PLACE / Path(url).name, expected)) as archive:
        for entry in archive:
            path = wanted.pop(entry.name.removeprefix('./'), None)
            if path:
                atomic_write(path, archive.extractfile(entry).read())
            if not wanted:
                break
    return first


def lines_of(raw: bytes, path: str | Path) -> Iterator[tuple[str, str]]:
    """('file:line', text) of every line, whatever ends it."""
    for number, line in enumerate(decode(raw, path).split('\n'), start=1):
        yield f'{path}:{number}', line


def json_lines(raw: bytes, path: str | Path, shape: Any) -> Iterator[tuple[str, dict]]:
    """('file:line', object of this shape) of every line of JSON."""
    for where, line in lines_of(raw, path):
        if line.strip():
            yield where, parse_json(line, where, shape)


def not_empty(rows: list, about: dict) -> tuple[list, dict]:
    if not rows:
        raise ValueError(f"{about['path']}: this file is empty; get it again")
    return rows, about


def hellaswag(path: str | Path = '') -> tuple[list[dict], dict]:
    """(rows, facts) of HellaSwag's validation set (Zellers et al. 2019).

    rows: dicts with at least ctx, four endings and the label, 0 to 3.
    """
    raw, about = obtain('hellaswag', path)
    rows = []
    for where, row in json_lines(raw, about['path'], HellaSwagRow):
        endings, label = row['endings'], row.get('label')
        if not row['ctx'].strip():
            raise ValueError(f"{where}: ctx: given {row['ctx']!r}, expected a text")
        if len(endings) != 4 or not all(ending.strip() for ending in endings):
            raise ValueError(f'{where}: endings: given {endings!r}, expected four texts')
        if str(label) not in ('0', '1', '2', '3'):
            raise ValueError(f'{where}: label: given {label!r}, expected 0 to 3 '
                             f'(the test set has no labels)')
        rows.append({**row, 'label': int(label)})
    return not_empty(rows, about)


def lambada(path: str | Path = '') -> tuple[list[str], dict]:
    """(texts, facts) of the 5,153 passages of LAMBADA (Paperno et al. 2016), OpenAI's version."""
    raw, about = obtain('lambada', path)
    texts = []
    for where, row in json_lines(raw, about['path'], LambadaRow):
        if ' ' not in row['text'].strip():
            raise ValueError(f"{where}: text: given {row['text']!r}, expected two words or "
                             f"more, separated by spaces")
        texts.append(row['text'])
    return not_empty(texts, about)


def cbt(subset: str, split: str, path: str | Path = '',
        skip_bad: bool = False) -> tuple[list[Question], dict]:
    """(Questions, facts) of the Children's Book Test; facts['skipped'] counts malformed ones.

    path: the file, or a folder that holds it under its own name.
    """
    name = f"cbtest_{subset}_{split}_{2000 if split == 'valid' else 2500}ex.txt"
    if path:
        path = Path(path).expanduser()
        path = path / name if path.is_dir() else path
    else:
        files = [name, *CBT_BLOBS, 'cbt_valid.txt', 'cbt_test.txt']
        path = unpack('cbt', [SOURCES['cbt'][2] + file for file in files])
    raw = read_bytes(path)
    blob = hashlib.sha1(b'blob %d\0' % len(raw) + raw).hexdigest()
    questions, skipped = [], 0
    for has_text, block in groupby(lines_of(raw, path), lambda pair: bool(pair[1].strip())):
        try:
            questions += [question(list(block))] if has_text else []
        except ValueError:
            if not skip_bad:
                raise
            skipped += 1
    return not_empty(questions, {**facts(path, raw), 'skipped': skipped,
                                 'official': blob.startswith(CBT_BLOBS[name])})


def question(block: list[tuple[str, str]]) -> Question:
    """The Question of 21 ('file:line', text)."""
    texts = []
    for number, (where, line) in enumerate(block, start=1):
        found, _, text = line.partition(' ')
        if found != str(number) or number > 21:
            raise ValueError(f'{where}: given {line[:60]!r}, expected line {number} of 21 of a '
                             f'question')
        texts.append(text)
    where = block[-1][0]
    if len(block) < 21:
        raise ValueError(f'{where}: this question has {len(block)} lines, expected 21')
    query, answer, _, candidates, *_ = (*texts[20].split('\t'), '', '', '')
    candidates = candidates.split('|')
    if query.count('XXXXX') != 1 or 'XXXXX' not in query.split(' '):
        raise ValueError(f'{where}: given {query!r}, expected one XXXXX')
    if len(candidates) != 10 or len(set(candidates)) != 10 or not all(candidates):
        raise ValueError(f"{where}: given {len(candidates)} candidates ({'|'.join(candidates)}), "
                         f"expected 10 different ones")
    if answer not in candidates:
        raise ValueError(f'{where}: the answer {answer!r} is not one of {candidates}')
    return Question(texts[:20], query, answer, candidates, where)


def cbt_books(split: str, path: str | Path = '') -> dict[str, str]:
    """{sentence: book} of the books from which the questions of a split were made.

    Read from cbt_valid.txt or cbt_test.txt beside them; {} without it.
    """
    path = Path(path or PLACE).expanduser()
    file = (path if path.is_dir() else path.parent) / f'cbt_{split}.txt'
    books, book = {}, ''
    for _, line in lines_of(read_bytes(file), file) if file.exists() else ():
        if line.startswith('_BOOK_TITLE_'):
            book = line.partition(':')[2].strip().removesuffix('.out').removesuffix('.txt')
        else:
            books[line] = book
    return books


def articles(text: str) -> list[str]:
    """The 62 articles of WikiText's test set as lm-eval-harness divides it, with all headings.

    An article begins at a heading of the first level.
    """
    *parts, last = HEADING.split(text)
    return [part for part in parts if part.strip()] + [last]
