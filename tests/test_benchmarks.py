"""The readers of the test sets: what they read, what they refuse, where the files come from."""

import hashlib
import io
import json
import os
import tarfile
import time
import zipfile

import pytest
from test_files import Server, server

from gpt import files
from gpt.data import benchmarks

ROW = {'ctx': 'A man sits. he', 'label': 2, 'endings': ['a b.', 'c d.', 'e.', 'f g.']}
CANDIDATES = 'fox|hen|dog|cat|cow|ant|bee|elk|owl|pig'


def question(k=0, **changed):
    """The 21 lines of a question, and the empty one after it."""
    parts = {'query': f'The XXXXX {k} ran .', 'answer': 'dog', 'candidates': CANDIDATES, **changed}
    story = [f'{i} Sentence {i} of {k} .' for i in range(1, 21)]
    return '\n'.join([*story, f"21 {parts['query']}\t{parts['answer']}\t\t{parts['candidates']}",
                      '', ''])


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_hellaswag_rows_are_read(tmp_path):
    text = json.dumps(ROW) + '\r\n\n' + json.dumps({**ROW, 'label': '3'}) + '\n'
    rows, facts = benchmarks.hellaswag(write(tmp_path / 'a', b'\xef\xbb\xbf' + text.encode()))
    assert [row['label'] for row in rows] == [2, 3] and not facts['official']
    assert facts['sha256'] == files.sha256(tmp_path / 'a')


@pytest.mark.parametrize('content, words', [
    ('', 'this file is empty'),
    ('<!DOCTYPE html><html>', 'is a web page, .* expected the text'),
    ('version https://git-lfs.github.com/spec/v1\noid sha256:00', 'a Git LFS pointer'),
    (json.dumps(ROW) + '\n' + json.dumps(ROW)[:30], 'a:2: not JSON, or truncated'),
    ('[1, 2]', 'a:1: .*expected an object'),
    (json.dumps({**ROW, 'ctx': ' '}), "a:1: ctx: given ' ', expected a text"),
    (json.dumps({**ROW, 'endings': ['a', 'b', 'c']}), 'a:1: endings: .*expected four texts'),
    (json.dumps({**ROW, 'endings': ['a', 'b', 'c', ' ']}), 'a:1: endings: .*expected four texts'),
    (json.dumps({k: v for k, v in ROW.items() if k != 'label'}), 'label: given None.*test set'),
    (json.dumps({**ROW, 'label': ''}), "label: given '', expected 0 to 3"),
    (json.dumps({**ROW, 'label': 4}), 'label: given 4, expected 0 to 3'),
    (json.dumps({**ROW, 'label': True}), 'label: given True, expected 0 to 3'),
    (json.dumps({**ROW, 'source_id': 3}), 'a:1: source_id: given 3, expected a text or null'),
    (json.dumps({**ROW, 'ctx_b': None}), 'a:1: ctx_b: given null, expected a text'),
    (json.dumps({**ROW, 'ctx': 'lone \ud800'}), 'a:1: ctx: given .*, expected a text'),
    ('{"n": NaN}', 'a:1: not JSON: given NaN'), ('{"n": ' + '1' * 5000, 'limit .4300 digits'),
    ('[' * 200_000 + ']' * 200_000, 'a:1: not JSON.*nested too deeply'),
    ('\n\n{"a": ' * 3, 'a:3: not JSON'), (b'PAR1' + bytes(99), 'a: is a .* or parquet'),
    (b'\x28\xb5\x2f\xfd', 'a: is .* compressed'),
    (b'{"ctx": "caf\xe9"}', 'a:1: not UTF-8.*iconv -f latin1'),
    (b'\r\n{"ctx": "\x93caf\xe9\x94"}', 'a:2: not UTF-8.*iconv -f cp1252')])
def test_hellaswag_errors_have_file_and_line(tmp_path, content, words):
    with pytest.raises(ValueError, match=words):
        benchmarks.hellaswag(write(tmp_path / 'a', content))


def test_rows_without_a_source_or_with_marks_and_line_ends_of_windows(tmp_path):
    lines = [json.dumps({**ROW, 'source_id': None, 'split_type': None})] * 2
    write(tmp_path / 'a', ''.join(f'\ufeff{line}\r\n' for line in lines))
    rows, _ = benchmarks.hellaswag(tmp_path / 'a')
    assert len(rows) == 2 and rows[0]['source_id'] is None


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / 'a')
    with pytest.raises(ValueError, match='a: is a device, pipe or socket'):
        benchmarks.hellaswag(tmp_path / 'a')


@pytest.mark.parametrize('content', ['{"text": "one"}', '{"text": "one\\ntwo"}', '{"text": 3}',
                                     '{"ctx": "a b"}'])
def test_lambada_refuses_what_has_no_last_word(tmp_path, content):
    with pytest.raises(ValueError, match='a:1: text: .*expected (two words|a text)'):
        benchmarks.lambada(write(tmp_path / 'a', content))


@pytest.mark.parametrize('end', ['\n', '', '\n\n\n', '\r\n'])
def test_cbt_questions_are_read(tmp_path, end):
    text = (question(1) + question(2)).rstrip('\n') + end
    text = text.replace('\n', '\r\n') if '\r' in end else text
    questions, facts = benchmarks.cbt('CN', 'valid', write(tmp_path / 'a', text))
    assert len(questions) == 2 and len(questions[0].sentences) == 20
    assert questions[1].query == 'The XXXXX 2 ran .' and questions[1].answer == 'dog'
    assert questions[0].candidates == CANDIDATES.split('|')
    assert questions[0].where.endswith('a:21') and not facts['official']


@pytest.mark.parametrize('content, words', [
    (question().replace('2 Sentence 2', '3 Sentence 2'), 'a:2: .*expected line 2 of 21'),
    (question().replace('\n5 Sentence', '\nSentence'), 'a:5: .*expected line 5 of 21'),
    ('\n'.join(question().split('\n')[:15]), 'a:15: this question has 15 lines, expected 21'),
    (question().rstrip('\n') + '\n22 and one more\n', 'a:22: .*expected line 22 of 21'),
    (question(query='No gap .'), 'a:21: .*expected one XXXXX'),
    (question(query='XXXXX and XXXXX .'), 'a:21: .*expected one XXXXX'),
    (question(query='XXXXX , the XXXXX-man .'), 'a:21: .*expected one XXXXX'),
    (question(query='The XXXXX-man .'), 'a:21: .*expected one XXXXX'),
    (b'\x1f\x8b\x08packed', 'a: is .* compressed'),
    (question(candidates=CANDIDATES[4:]), 'given 9 candidates .*expected 10 different'),
    (question(candidates=CANDIDATES + '|yak'), 'given 11 candidates .*expected 10 different'),
    (question(candidates=CANDIDATES.replace('owl', 'fox')), 'expected 10 different ones'),
    (question(candidates=CANDIDATES.replace('owl', '')), 'expected 10 different ones'),
    (question(answer='yak'), "the answer 'yak' is not one of"),
    (question().replace('Sentence 3', 'Séntence').encode('latin-1'), 'a:3: not UTF-8'),
    ('\n\n', 'this file is empty')])
def test_cbt_errors_have_file_and_line(tmp_path, content, words):
    with pytest.raises(ValueError, match=words):
        benchmarks.cbt('CN', 'valid', write(tmp_path / 'a', content))


def test_real_cbt_questions(real):
    """13 of the original ones: punctuation, possessives and verbs among the candidates."""
    counts = {name: len(benchmarks.cbt(name, 'valid', real(f'cbt/real/cbtest_{name}_train.txt'))[0])
              for name in ('CN', 'NE', 'P', 'V')}
    assert counts == {'CN': 2, 'NE': 4, 'P': 3, 'V': 4}


def test_articles_begin_at_headings_of_the_first_level():
    text = ' \n = A = \n \n One . \n = = B = = \n Two . \n \n = C D = \n Three . \n'
    assert benchmarks.articles(text) == [' = A = \n \n One . \n = = B = = \n Two . \n ',
                                         ' = C D = \n Three . \n']


def test_the_file_of_wikitext2_is_official_outside_of_its_archive():
    facts = benchmarks.facts('wiki.test.tokens', b'', {benchmarks.KNOWN['wikitext2']})
    assert not facts['official'] and benchmarks.KNOWN['wikitext2'].startswith('d790b833ef8cf03a')


# Where the files come from.

@pytest.fixture
def place(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmarks, 'PLACE', tmp_path / 'benchmarks')


def serve(monkeypatch, url, name, path, content, member=''):
    Server.files[path] = content
    sha256 = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(benchmarks.SOURCES, name, (url + path, sha256, member))


def test_test_sets_are_downloaded_once_checked_and_unpacked(server, place, monkeypatch, tmp_path):
    serve(monkeypatch, server, 'hellaswag', '/hellaswag_val.jsonl', json.dumps(ROW).encode())
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, 'w') as archive:
        archive.writestr('wikitext-2/wiki.test.tokens', ' = A = \n')
    serve(monkeypatch, server, 'wikitext2', '/wt2.zip', zipped.getvalue(),
          'wikitext-2/wiki.test.tokens')
    tarred = io.BytesIO()
    with tarfile.open(fileobj=tarred, mode='w:gz') as archive:
        for name in ('CBTest/data/cbtest_CN_valid_2000ex.txt',
                     'CBTest/data/cbtest_NE_valid_2000ex.txt', 'words/news.en'):
            entry = tarfile.TarInfo(f'./{name}')
            entry.size = len(question().encode())
            archive.addfile(entry, io.BytesIO(question().encode()))
    serve(monkeypatch, server, 'cbt', '/CBTest.tgz', tarred.getvalue(), 'CBTest/data/')
    serve(monkeypatch, server, '1bw', '/1bw.tar.gz', tarred.getvalue(), 'words/news.en')
    for _ in range(2):
        rows, facts = benchmarks.hellaswag()
        assert rows == [ROW] and facts['official']
        assert benchmarks.obtain('wikitext2')[0] == b' = A = \n'
        raw, facts = benchmarks.obtain('1bw')
        assert raw == question().encode() and facts['official']
        for subset in ('CN', 'NE'):
            assert len(benchmarks.cbt(subset, 'valid')[0]) == 1
    assert len(Server.ranges) == 4
    found = {path.name for path in benchmarks.PLACE.iterdir()}
    assert found == {'hellaswag_val.jsonl', 'wt2.zip', 'CBTest.tgz', 'cbtest_CN_valid_2000ex.txt',
                     'cbtest_NE_valid_2000ex.txt', '1bw.tar.gz', 'news.en'}
    # the same archive, given by path
    raw, facts = benchmarks.obtain('wikitext2', benchmarks.PLACE / 'wt2.zip')
    assert raw == b' = A = \n' and facts['official']
    with pytest.raises(ValueError, match='cannot be unpacked'):
        benchmarks.obtain('wikitext2', write(tmp_path / 'a.zip', zipped.getvalue()[:50]))


def test_without_a_network_the_error_says_what_to_put_where(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmarks, 'PLACE', tmp_path)
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    sha256 = benchmarks.SOURCES['lambada'][1]
    monkeypatch.setitem(benchmarks.SOURCES, 'lambada',
                        ('http://127.0.0.1:9/lambada_test.jsonl', sha256, ''))
    with pytest.raises(ValueError, match=f'could not download http://127.0.0.1:9/lambada_test.jsonl'
                                         f'.*sha256 {sha256}.*put it at '
                                         f'{tmp_path}/lambada_test.jsonl'):
        benchmarks.lambada()
    assert not any(path.stat().st_size for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=f'LDC.*dd65dff3.*{tmp_path}/ptb.test.txt'):
        benchmarks.obtain('ptb')
    with pytest.raises(ValueError, match='cannot read this file'):
        benchmarks.lambada(tmp_path / 'nothing')


def test_cbt_skips_malformed_questions_if_asked_and_counts_them(tmp_path):
    text = question(1) + question(2, answer='yak') + question(3)
    questions, facts = benchmarks.cbt('CN', 'valid', write(tmp_path / 'a', text), skip_bad=True)
    assert [q.query[10] for q in questions] == ['1', '3'] and facts['skipped'] == 1


def test_every_rebuilt_cbt_question_belongs_to_a_book(real):
    books = benchmarks.cbt_books('valid', real('cbt/raw'))
    assert len(set(books.values())) == 5
    questions, _ = benchmarks.cbt('NE', 'valid',
                                  real('cbt/rebuilt/cbtest_NE_valid_2000ex.rebuilt.txt'))
    assert len(questions) == 2000
    assert all(sentence in books for q in questions for sentence in q.sentences)
