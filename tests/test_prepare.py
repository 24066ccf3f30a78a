"""Preparing text: every reader, the split, kills and full disks, and refusals."""

import gzip
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, command, script
from test_files import Server, server

from data import explore, prepare
from gpt import tokenizer
from gpt.data import documents, encode, sources
from gpt.data.shards import ShardWriter, Tokens, leaked, verify

TEXTS = [f'Document {i}: {"word " * (i % 7 + 1)}é 世界\n' for i in range(60)]


def run(tmp_path, *inputs, **options):
    options = {'tokenizer': 'bytes', 'data_dir': str(tmp_path), 'name': 'd', **options}
    prepare.main(prepare.Config(input=tuple(map(str, inputs)), **options))
    folder = tmp_path / (options['name'] or 'shakespeare_char')
    return json.loads((folder / 'manifest.json').read_text())


def decoded(tmp_path, name='d'):
    """All documents of a prepared data set, decoded, in both splits."""
    enc = tokenizer.load(tmp_path / name / 'tokenizer.json')
    found = {}
    for split in ('train', 'val'):
        tokens = Tokens(name, split, enc.n_vocab, tmp_path)
        text = enc.decode(tokens.read(0, len(tokens)).tolist())
        has_eot = enc.eot is not None
        found[split] = text.split('<|endoftext|>')[1:] if has_eot else [text]
    return found


def write_jsonl(path, texts=TEXTS, opener=open):
    with opener(path, 'wt', encoding='utf-8') as file:
        file.writelines(json.dumps({'text': text, 'id': 1}) + '\n' for text in texts)
    return path


def write_parquet(path, texts=TEXTS):
    pyarrow = pytest.importorskip('pyarrow')
    from pyarrow import parquet
    parquet.write_table(pyarrow.table({'text': texts}), path, row_group_size=7)
    return path


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    folder = tmp_path / 'texts'
    (folder / 'deep').mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        name = f'{i:03d}.{"md" if i % 3 else "txt"}'
        (folder / ('deep' if i % 2 else '.') / name).write_text(text)
    (folder / '.hidden.txt').write_text('not this')
    (folder / 'image.png').write_text('nor this')
    inputs = [folder, write_jsonl(tmp_path / 'a.jsonl'),
              write_jsonl(tmp_path / 'b.jsonl.gz', opener=gzip.open),
              write_parquet(tmp_path / 'c.parquet')]
    splits = []
    for path in inputs:
        manifest = run(tmp_path, path, replace=True)
        found = decoded(tmp_path)
        assert sorted(found['train'] + found['val']) == sorted(TEXTS)
        assert manifest['splits']['val']['documents'] == len(found['val']) >= 1
        size = sum(len(text.encode()) for text in found['val'])
        assert size == manifest['splits']['val']['bytes']
        splits.append({split: sorted(texts) for split, texts in found.items()})
    assert all(split == splits[0] for split in splits), 'the split depends on the texts alone'


def test_adding_documents_moves_none(tmp_path):
    run(tmp_path, write_jsonl(tmp_path / 'a.jsonl', TEXTS[:40]), val_fraction=0.3)
    before = decoded(tmp_path)
    run(tmp_path, write_jsonl(tmp_path / 'a.jsonl', TEXTS), val_fraction=0.3,
        replace=True)
    after = decoded(tmp_path)
    assert set(before['val']) <= set(after['val']) and set(before['train']) <= set(after['train'])
    assert 0.1 < len(after['val']) / 60 < 0.5


@pytest.mark.parametrize('n', [2, 3])
def test_neither_split_is_ever_empty(tmp_path, n):
    for fraction in (0.01, 0.99):
        run(tmp_path, write_jsonl(tmp_path / 'a.jsonl', TEXTS[:n]), val_fraction=fraction,
            replace=True)
        found = decoded(tmp_path)
        assert min(len(found['val']), len(found['train'])) == 1


def test_one_document_is_split_by_position_as_nanogpt_does(tmp_path):
    text = ''.join(TEXTS)
    (tmp_path / 'input.txt').write_text(text)
    manifest = run(tmp_path, tmp_path / 'input.txt', dataset='shakespeare', tokenizer='chars',
                   name='')
    assert manifest['name'] == 'shakespeare_char' and manifest['tokenizer']['eot_id'] is None
    cut = int(len(text) * 0.9)
    assert decoded(tmp_path, 'shakespeare_char') == {'train': [text[:cut]], 'val': [text[cut:]]}


def test_shakespeare_char_equals_that_of_nanogpt(tmp_path, real):
    """65 characters, 1,003,854 and 111,540 tokens (nanoGPT, data/shakespeare_char/readme.md)."""
    source = real('tinyshakespeare/input.txt')
    manifest = run(tmp_path, source, dataset='shakespeare', tokenizer='chars', name='')
    assert manifest['name'] == 'shakespeare_char' and manifest['tokenizer']['vocab_size'] == 65
    counts = [manifest['splits'][split]['tokens'] for split in ('train', 'val')]
    assert counts == [1_003_854, 111_540]
    text = source.read_text()
    stoi = {char: i for i, char in enumerate(sorted(set(text)))}
    tokens = Tokens('shakespeare_char', 'val', 65, tmp_path)
    assert tokens.read(0, 500).tolist() == [stoi[char] for char in text[1_003_854:][:500]]


def test_the_same_settings_again_do_nothing_and_others_replace_if_asked(tmp_path, capsys):
    source = write_jsonl(tmp_path / 'a.jsonl')
    run(tmp_path, source)
    before = files_in(tmp_path / 'd')
    run(tmp_path, source, replace=True)
    assert 'is up to date' in capsys.readouterr().out and files_in(tmp_path / 'd') == before
    command = ['data/prepare.py', f'--data_dir={tmp_path}', '--name=d', '--tokenizer=bytes', source]
    done = script(*command, '--seed=4', check=False)
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert ('d: was made otherwise (seed 1337 -> 4); give another --name, or --replace'
            in done.stderr)
    source.write_text(source.read_text().replace('Document', 'documenT'))       # of the same size
    with pytest.raises(ValueError, match=r'otherwise .other text.; give another --name'):
        run(tmp_path, source)
    with pytest.raises(ValueError, match="text, tokenizer 'bytes' -> 'chars', seed 1337 -> 4"):
        run(tmp_path, source, tokenizer='chars', seed=4)
    assert files_in(tmp_path / 'd') == before
    assert 'it will be replaced' in script(*command, '--seed=4', '--replace').stdout
    assert files_in(tmp_path / 'd') != before


def test_a_folder_that_is_not_a_data_set_of_ours_is_never_replaced(tmp_path):
    """The user's texts may be in the very folder that would be written."""
    (tmp_path / 'd').mkdir()
    (tmp_path / 'd/text.txt').write_text(''.join(TEXTS))
    with pytest.raises(ValueError, match='d: not made by this program.*text.txt'):
        run(tmp_path, tmp_path / 'd')
    source = write_jsonl(tmp_path / 'a.jsonl')
    run(tmp_path, source, name='e')
    (tmp_path / 'e/notes.txt').write_text('mine')
    with pytest.raises(ValueError, match='holds notes.txt'):
        run(tmp_path, source, name='e', seed=4)
    assert (tmp_path / 'd/text.txt').exists() and (tmp_path / 'e/notes.txt').exists()


def test_a_tokenizer_is_not_trained_on_validation_text(tmp_path):
    """A word that only validation documents contain is in no token."""
    texts = TEXTS
    run(tmp_path, write_jsonl(tmp_path / 'a.jsonl', texts), val_fraction=0.3)
    val = set(decoded(tmp_path)['val'])
    _, high = encode.val_range((text.encode() for text in texts), 1337, 0.3)
    marked = []
    for i in range(4000):
        text = f'zqzqzq {i} zqzqzq'
        if encode.document_hash(text.encode(), 1337) < high:
            marked.append(text)
    run(tmp_path, write_jsonl(tmp_path / 'a.jsonl', texts + marked), val_fraction=0.3,
        tokenizer='bpe:400', replace=True)
    enc = tokenizer.load(tmp_path / 'd/tokenizer.json')
    assert val and marked and not any(b'zq' in token for token in tokenizer.token_bytes(enc))


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


LONG = [f'{i} ' + 'lorem ipsum dolor ' * 50 for i in range(3000)]


@pytest.mark.parametrize('delay', [0.15, *(pytest.param(delay, marks=pytest.mark.slow)
                                           for delay in (0.0, 0.8))])
def test_killed_and_resumed_it_ends_with_the_same_bytes(tmp_path, delay):
    """With two workers, one, and two again; workers of the killed process exit."""
    source = write_jsonl(tmp_path / 'a.jsonl', LONG)
    code = ('import sys; from data import prepare; prepare.SAVE_SECONDS = 0; '
            'from gpt.settings import configure; '
            'prepare.main(configure(prepare.Config, sys.argv[1:], None, "input"))')
    flags = [f'--data_dir={tmp_path}/x', '--name=d', '--tokenizer=bytes', '--shard_tokens=100000',
             source]
    for workers in (2, 1):
        running = subprocess.Popen([sys.executable, '-c', code, *map(str, flags),
                                    f'--workers={workers}'], cwd=ROOT)
        deadline = time.time() + 300
        while (not list((tmp_path / 'x').glob('.d.partial/*.bin'))
               and time.time() < deadline and running.poll() is None):
            time.sleep(0.01)
        time.sleep(delay / workers)
        processes = subprocess.run(['pgrep', '-P', str(running.pid)], capture_output=True,
                                   text=True).stdout.split()
        running.send_signal(signal.SIGKILL)
        running.wait()
        if not (tmp_path / 'x/d').exists():
            with pytest.raises(ValueError, match='not prepared'):   # half a data set is none
                Tokens('d', 'train', 257, tmp_path / 'x')
    done = script('-c', code, *flags, '--workers=2')
    assert 'resuming from' in done.stdout or 'is up to date' in done.stdout
    run(tmp_path / 'y', source, shard_tokens=100000)
    assert files_in(tmp_path / 'x/d') == files_in(tmp_path / 'y/d')
    assert len(files_in(tmp_path / 'x/d')) > 20 and not list((tmp_path / 'x').glob('.d*'))
    assert not any(is_running(pid) for pid in processes)


@pytest.mark.slow
@pytest.mark.parametrize('victim', ['a worker', 'all, by Ctrl-C'])
def test_when_stopped_it_says_so_and_leaves_no_process(tmp_path, victim):
    source = write_jsonl(tmp_path / 'a.jsonl', LONG * 8)
    flags = [f'--data_dir={tmp_path}', '--name=d', '--tokenizer=bpe:300', source, '--workers=2']
    running = subprocess.Popen([sys.executable, 'data/prepare.py', *map(str, flags)], cwd=ROOT,
                               start_new_session=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 300
    while not list(tmp_path.glob('.d.partial/train*.bin')) and time.time() < deadline:
        time.sleep(0.01)
    processes = subprocess.run(['pgrep', '-P', str(running.pid)], capture_output=True,
                               text=True).stdout.split()
    if victim == 'all, by Ctrl-C':
        os.killpg(running.pid, signal.SIGINT)
    else:
        os.kill(int(processes[-1]), signal.SIGKILL)
    out, err = running.communicate(timeout=300)
    assert 'the same command resumes' in out + err and 'Traceback' not in out + err
    assert running.returncode == (130 if victim == 'all, by Ctrl-C' else 2)
    deadline = time.time() + 10
    while any(map(is_running, processes)) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, processes))


def is_running(pid):
    try:
        return open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


@pytest.mark.parametrize('kind', ['jsonl', 'jsonl.gz', 'parquet', 'folder'])
def test_stopped_at_any_write_it_resumes_to_the_same_bytes(tmp_path, monkeypatch, kind):
    """It fails at every third write, with progress.json written after every batch."""
    monkeypatch.setattr(documents, 'BATCH_BYTES', 600)
    monkeypatch.setattr(prepare, 'SAVE_SECONDS', -1)
    source = tmp_path / f'a.{kind}'
    if kind == 'folder':
        source.mkdir()
        for i, text in enumerate(TEXTS):
            (source / f'{i:03d}.txt').write_text(text)
    elif kind == 'parquet':
        write_parquet(source)
    else:
        write_jsonl(source, opener=gzip.open if kind.endswith('gz') else open)
    options = {'shard_tokens': 333, 'val_fraction': 0.3}
    run(tmp_path, source, name='complete', **options)
    write, calls, stops = prepare.ShardWriter.write, [], []

    def fails(writer, ids):
        calls.append(0)
        if len(calls) > 2:              # the third write is half done
            write(writer, ids[:len(ids) // 2])
            raise RuntimeError
        write(writer, ids)

    monkeypatch.setattr(prepare.ShardWriter, 'write', fails)
    while not (tmp_path / 'd').exists():
        calls.clear()
        try:
            run(tmp_path, source, **options)
        except RuntimeError:
            stops.append(1)
    complete, again = files_in(tmp_path / 'complete'), files_in(tmp_path / 'd')
    again['manifest.json'] = again['manifest.json'].replace(b'"name": "d"', b'"name": "complete"')
    assert again == complete and len(stops) > 3 and len(complete) >= 10


@pytest.mark.parametrize('moment', range(3))
def test_killed_while_it_is_renamed_nothing_is_tokenized_again(tmp_path, monkeypatch, moment):
    source = write_jsonl(tmp_path / 'a.jsonl')
    run(tmp_path, source, seed=2)                                   # to be replaced
    run(tmp_path, source, name='complete')
    left, unlink, rename = [moment], prepare.Path.unlink, prepare.Path.rename

    def counted(method):
        def fails(*arguments, **options):
            if not left[0]:
                raise RuntimeError
            left[0] -= 1
            return method(*arguments, **options)
        return fails

    monkeypatch.setattr(prepare.Path, 'unlink', counted(unlink))
    monkeypatch.setattr(prepare.Path, 'rename', counted(rename))
    with pytest.raises(RuntimeError):
        run(tmp_path, source, replace=True)
    monkeypatch.setattr(prepare.Path, 'unlink', unlink)
    monkeypatch.setattr(prepare.Path, 'rename', rename)
    monkeypatch.setattr(prepare, 'write_dataset', None)             # no longer called
    run(tmp_path, source, replace=True)
    for name in ('train_000000.bin', 'val_000000.bin', 'tokenizer.json'):
        assert (tmp_path / 'd' / name).read_bytes() == (tmp_path / 'complete' / name).read_bytes()
    assert sorted(path.name for path in tmp_path.glob('.*')) == ['.locks']


def test_the_number_of_workers_changes_nothing(tmp_path):
    source = write_jsonl(tmp_path / 'a.jsonl', LONG + ['', 'nul \0'])
    run(tmp_path / '1', source, tokenizer='bpe:300', workers=1)
    script('data/prepare.py', f'--data_dir={tmp_path}/3', '--name=d', source,
           '--tokenizer=bpe:300', '--workers=3')
    assert files_in(tmp_path / '1/d') == files_in(tmp_path / '3/d')
    source.write_text(source.read_text() + '{"text": 3}')
    done = script('data/prepare.py', f'--data_dir={tmp_path}', source, '--tokenizer=bytes',
                  '--workers=2', check=False)
    assert done.returncode == 2 and 'a.jsonl:3003: text is int' in done.stderr
    assert 'Traceback' not in done.stderr


def test_strict_stops_and_errors_skip_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encode, 'FEW', 9)           # read before the first batch is written
    monkeypatch.setattr(documents, 'BATCH_BYTES', 600)
    monkeypatch.setattr(prepare, 'SAVE_SECONDS', -1)
    source = write_jsonl(tmp_path / 'a.jsonl')
    lines = source.read_bytes().splitlines(keepends=True)
    source.write_bytes(b''.join([*lines[:40], b'{"text": "caf\xe9"}\n', *lines[40:]]))
    with pytest.raises(ValueError, match='a.jsonl:41: byte 0xe9 .*--errors=skip'):
        run(tmp_path, source)
    manifest = run(tmp_path, source, errors='skip')
    words = capsys.readouterr().out
    assert 'resuming from' in words and '1 not UTF-8 (the first: ' in words
    assert manifest['remarks'] == {'not UTF-8': [1, f'{source}:41']}
    found = decoded(tmp_path)
    assert sorted(found['train'] + found['val']) == sorted(TEXTS)
    assert run(tmp_path, source, errors='skip', name='e')['splits'] == manifest['splits']


def test_a_partial_of_another_kind_of_source_is_started_over(tmp_path):
    """Ready shards have fewer settings."""
    plan = {'name': 'd', 'source': {}, 'settings': {'tokenizer': 'gpt2', 'errors': 'strict'}}
    for settings in (plan['settings'], {'tokenizer': 'gpt2', 'shards': 1}):
        prepare.open_partial(tmp_path / '.d.partial', {**plan, 'settings': settings})
        (tmp_path / '.d.partial/x').write_text('')
    prepare.open_partial(tmp_path / '.d.partial', plan)
    assert not (tmp_path / '.d.partial/x').exists()


@pytest.mark.parametrize('name, text, words', [
    ('plan', '{"name": "d"}', 'plan.json: source: given nothing'),
    ('plan', '[' * 200_000, 'plan.json: .*nested too deeply'),
    ('progress', '[]', 'progress.json: given a list of 0'),
    ('progress', '{"sha256": 3}', 'progress.json: is damaged; delete'),
    ('progress', '{"threshold": 0.1, "sha256": "0"}', 'progress.json: is damaged; delete')])
def test_notes_of_another_shape_are_refused(tmp_path, monkeypatch, name, text, words):
    source = write_jsonl(tmp_path / 'a.jsonl')
    monkeypatch.setattr(prepare, 'SAVE_SECONDS', -1)
    monkeypatch.setattr(prepare, 'write_manifest', None)            # stopped before the end
    with pytest.raises(TypeError):
        run(tmp_path, source)
    monkeypatch.undo()
    (tmp_path / f'.d.partial/{name}.json').write_text(text)
    with pytest.raises(ValueError, match=words):
        run(tmp_path, source)


WINDOWS = {'a.txt': ''.join(TEXTS).replace('\n', '\r\n').encode('utf-8-sig'),
           'b.jsonl': ''.join(f'\ufeff{json.dumps({"text": text})}\r\n'
                              for text in TEXTS).encode()}


@pytest.mark.parametrize('separator', ['', r'\n', r'\r\n'])
def test_texts_of_windows_have_no_carriage_return_in_any_token(tmp_path, separator):
    for name, raw in WINDOWS.items():
        (tmp_path / name).write_bytes(raw)
    manifest = run(tmp_path, *(tmp_path / name for name in WINDOWS), separator=separator,
                   tokenizer='bpe:400')
    texts = sum(decoded(tmp_path).values(), [])
    assert not any(char in text for text in texts for char in '\r\ufeff')
    assert set(TEXTS) < set(texts) and manifest['remarks'].get(documents.PLAIN) == (
        None if separator else [1, f'{tmp_path}/a.txt'])


def as_before(tmp_path, monkeypatch, source):
    """Prepare as versions did that kept carriage returns, without their remark."""
    monkeypatch.setattr(documents, 'plain_text', lambda text: text)
    monkeypatch.setattr(prepare, 'READER', 1)
    try:
        return run(tmp_path, source)
    finally:
        monkeypatch.undo()


def test_a_data_set_with_carriage_returns_is_kept_and_said(tmp_path, monkeypatch, capsys):
    """A run may be trained on it."""
    source = tmp_path / 'a.txt'
    source.write_bytes(WINDOWS['a.txt'])
    as_before(tmp_path, monkeypatch, source)
    before = files_in(tmp_path / 'd')
    run(tmp_path, source)
    assert 'holds carriage returns' in capsys.readouterr().out
    assert files_in(tmp_path / 'd') == before
    assert any('\r' in text for text in sum(decoded(tmp_path).values(), []))
    for words in ('it will be replaced', 'is up to date'):
        run(tmp_path, source, replace=True)
        assert words in capsys.readouterr().out
        assert not any('\r' in text for text in sum(decoded(tmp_path).values(), []))


def test_a_data_set_of_an_earlier_version_without_any_is_up_to_date(tmp_path, monkeypatch, capsys):
    source = write_jsonl(tmp_path / 'a.jsonl')
    as_before(tmp_path, monkeypatch, source)
    before = files_in(tmp_path / 'd')
    run(tmp_path, source)
    assert 'is up to date' in capsys.readouterr().out and files_in(tmp_path / 'd') == before


def test_a_manifest_with_base_names_is_up_to_date(tmp_path, capsys):
    """As earlier versions wrote it; what is compared are their hashes, in order."""
    for name in ('pos/0_2.txt', 'neg/0_2.txt'):
        (tmp_path / 'texts' / name).parent.mkdir(parents=True)
        (tmp_path / 'texts' / name).write_text(f'{name} ' * 50)
    manifest = run(tmp_path, tmp_path / 'texts')
    assert [name for name, *_ in manifest['source']['files']] == ['neg/0_2.txt', 'pos/0_2.txt']
    for file in manifest['source']['files']:
        file[0] = '0_2.txt'
    (tmp_path / 'd/manifest.json').write_text(json.dumps(manifest))
    run(tmp_path, tmp_path / 'texts')
    assert 'is up to date' in capsys.readouterr().out
    manifest['source']['files'] = manifest['source']['files'][::-1]
    (tmp_path / 'd/manifest.json').write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match='otherwise .other text'):
        run(tmp_path, tmp_path / 'texts')


def test_what_an_earlier_version_began_is_started_over(tmp_path, monkeypatch, capsys):
    source = write_jsonl(tmp_path / 'a.jsonl')
    monkeypatch.setattr(prepare, 'write_manifest', None)
    with pytest.raises(TypeError):
        as_before(tmp_path, monkeypatch, source)
    monkeypatch.undo()
    plan = tmp_path / '.d.partial/plan.json'
    plan.write_text(plan.read_text().replace('"reader": 1', '"other": 1'))
    run(tmp_path, source)
    assert 'starting over' in capsys.readouterr().out


def test_a_damaged_data_set_is_prepared_again(tmp_path, capsys):
    source = write_jsonl(tmp_path / 'a.jsonl')
    run(tmp_path, source)
    (tmp_path / 'd/tokenizer.json').unlink()
    run(tmp_path, source)
    assert 'tokenizer.json is missing' in capsys.readouterr().out
    prepare.report('d', tmp_path)


@pytest.mark.parametrize('kind, end', [('chars', '\n'), ('chars', '\r\n'), ('bpe:300', '\r\n'),
                                       ('gpt2', '\n')])
def test_a_shard_that_is_missing_or_damaged_is_made_again(tmp_path, capsys, gpt2, kind, end):
    source = tmp_path / 'a.txt'
    source.write_bytes(f'some text to read{end}'.encode() * 60)
    run(tmp_path, source, tokenizer=kind)
    before = files_in(tmp_path / 'd')
    for damage in (lambda path: path.unlink(), lambda path: os.truncate(path, 1500),
                   lambda path: path.write_bytes(b'none' + path.read_bytes()[4:])):
        for name in ('train_000000.bin', 'val_000000.bin'):
            damage(tmp_path / 'd' / name)
            capsys.readouterr()
            run(tmp_path, source, tokenizer=kind)
            assert f'{name}: ' in (said := capsys.readouterr().out) and 'be replaced' in said
            assert files_in(tmp_path / 'd') == before


def test_a_split_without_any_text_is_refused(tmp_path):
    (tmp_path / 'a.txt').write_text('---\n' * 1000)
    with pytest.raises(ValueError, match='train: there is no text to prepare'):
        run(tmp_path, tmp_path / 'a.txt', separator='--')
    assert not (tmp_path / 'd').exists()


def test_one_name_is_prepared_by_one_process(tmp_path):
    source = write_jsonl(tmp_path / 'a.jsonl')
    with prepare.locked(tmp_path / '.locks/d', 'd'):
        with pytest.raises(ValueError, match='another process is preparing it'):
            run(tmp_path, source)
    run(tmp_path, source)


def test_a_full_disk_keeps_the_old_data_set_and_the_work_so_far(tmp_path):
    """A limit on file sizes simulates it: writing fails in the middle of a shard."""
    source = write_jsonl(tmp_path / 'a.jsonl', ['x' * 1000] * 20 + ['y' * 1000])
    run(tmp_path, source, val_fraction=0.5)
    before = (tmp_path / 'd/train_000000.bin').read_bytes()
    write_jsonl(source, [f'{i} {"x" * 9000}' for i in range(200)])
    limits = (1_000_000, 1_000_000)
    flags = [f'--data_dir={tmp_path}', '--name=d', '--tokenizer=bytes', '--replace', source]
    done = script('data/prepare.py', *flags, check=False,
                  preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    assert (done.returncode == 2 and 'the same command resumes' in done.stderr
            and 'Traceback' not in done.stderr)
    assert (tmp_path / 'd/train_000000.bin').read_bytes() == before
    assert 'resuming from' in script('data/prepare.py', *flags).stdout
    run(tmp_path / 'y', source)
    assert files_in(tmp_path / 'd') == files_in(tmp_path / 'y/d')


def test_equal_texts_are_in_one_split_and_verify_finds_those_that_are_not(tmp_path):
    source = write_jsonl(tmp_path / 'a.jsonl', TEXTS * 3)
    manifest = run(tmp_path, source, val_fraction=0.3)
    found = decoded(tmp_path)
    assert not set(found['train']) & set(found['val']) and leaked('d', tmp_path) == 0
    enc = tokenizer.load(tmp_path / 'd/tokenizer.json')
    writer = ShardWriter(tmp_path / 'd', 'train', 10 ** 9, eot=256)
    writer.write(np.concatenate([np.append(256, tokenizer.encode(enc, text)).astype(np.uint16)
                                 for text in [*found['train'], found['val'][0]]]))
    writer.close()
    facts = manifest['splits']['train']
    facts |= {'documents': facts['documents'] + 1, 'shards': writer.shards}
    (tmp_path / 'd/manifest.json').write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match='1 document of train also appear in val'):
        prepare.report('d', tmp_path)


def test_a_separator_divides_a_file(tmp_path):
    (tmp_path / 'a.txt').write_text('<|endoftext|>\n'.join(TEXTS))
    run(tmp_path, tmp_path / 'a.txt', separator='<|endoftext|>')
    found = decoded(tmp_path)
    assert sorted(found['train'] + found['val']) == sorted(text.strip('\n') for text in TEXTS)


def test_a_document_over_the_limit_is_named(tmp_path, capsys):
    (tmp_path / 'a.txt').write_text('x' * 2000)
    with pytest.raises(ValueError, match='no text to prepare: 1 over max_document_mb .the first: '
                                         '.*a.txt.*--max_document_mb allows longer ones'):
        run(tmp_path, tmp_path / 'a.txt', max_document_mb=0.001)


def test_a_separator_that_was_not_given_is_suggested(tmp_path, capsys):
    (tmp_path / 'a.txt').write_text('One story.<|endoftext|>\nAnother one.' * 9)
    run(tmp_path, tmp_path / 'a.txt')
    words = capsys.readouterr().out
    assert '1 with <|endoftext|> as text (the first:' in words
    assert "if <|endoftext|> separates documents there, give --separator='<|endoftext|>'" in words
    run(tmp_path, tmp_path / 'a.txt', separator='<|endoftext|>', name='divided')
    assert 'as text' not in capsys.readouterr().out


@pytest.mark.parametrize('name, content, words', [
    ('a.txt', b'', 'no text to prepare'),
    ('a.txt', b'caf\xe9', 'a.txt: byte 0xe9 at 3 is not UTF-8.*latin1'),
    ('a.txt', 'café'.encode('utf-16'), 'a.txt: byte 0xff at 0 is not UTF-8.*iconv -f utf-16'),
    ('a.json', b'[{"text": "a"}]', 'a.json:1: expected one object per line .jq'),
    ('a.json', b'[\n {"text": "a"}\n]', 'a.json:1: not JSON.*expected one object per line'),
    ('a.jsonl', b'{"text": "a"}\n{"text"', 'a.jsonl:2: not JSON'),
    ('a.jsonl', b'{"body": "a", "id": 1}', "no field 'text' among 'body, id'; --text_key names"),
    ('a.txt', b'\x93caf\xe9\x94', 'a.txt: byte 0x93 at 0 is not UTF-8.*iconv -f cp1252'),
    ('a.jsonl', b'{"text": ' + b'[' * 200_000 + b']' * 200_000 + b'}', 'a.jsonl:1: not JSON'),
    ('a.jsonl', b'{"n": 1' + b'0' * 5000 + b'}', 'a.jsonl:1: not JSON: Exceeds the limit'),
    ('a.jsonl', b'{"text": 3}', 'text is int, expected a string'),
    ('a.parquet', b'PAR', 'not a parquet file'), ('a.png', b'', 'expected .txt')])
def test_bad_files_are_refused_with_name_and_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        run(tmp_path, tmp_path / name)
    assert not (tmp_path / 'd').exists() and not (tmp_path / '.d.partial').exists()


@pytest.mark.parametrize('options, words', [
    ({'shard_tokens': 0}, 'shard_tokens: given 0'),
    ({'shard_tokens': 2 ** 31}, 'expected 1 to 2,147,483,647'),
    ({'shards': 3}, 'expected 0; only fineweb'),
    ({'workers': -1}, 'workers: given -1'), ({'workers': 2 ** 62}, 'expected 0 .default. to 1,024'),
    ({'max_document_mb': 0.0}, 'expected more than 0'), ({'max_document_mb': 1e300}, 'most 1e6'),
    ({'name': 'a\nb'}, 'name of a folder'),
    ({'errors': 'ignore'}, "'strict', 'replace' or 'skip'"),
    ({'tokenizer': 'bpe:70000'}, '65,536'), ({'tokenizer': 'gpt5'}, "'bpe:N'"),
    ({'val_fraction': 1.5}, 'less than 1'), ({'name': '../x'}, 'name of a folder')])
def test_bad_settings_are_refused(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        run(tmp_path, write_jsonl(tmp_path / 'a.jsonl'), **options)


def test_settings_that_are_not_utf_8_are_named(tmp_path):
    for key in ('separator', 'text_key'):
        done = script('data/prepare.py', f'--data_dir={tmp_path}', f'--{key}=\udcff', check=False)
        assert done.returncode == 2
        assert done.stderr == f"prepare.py: {key}: given '\\udcff', expected a text in UTF-8\n"


def test_a_name_alone_makes_nothing(tmp_path, capsys, monkeypatch):
    """The files may have been forgotten; without a name it is pydocs."""
    flags = f'--data_dir={tmp_path}', '--tokenizer=bytes'
    for more in ((), ('--replace',)):
        with pytest.raises(ValueError, match="'mine' alone, expected also files .* --dataset=pyd"):
            command(prepare, '--name=mine', *more, *flags)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sources, 'python_files', lambda: [Path(json.__file__), Path(re.__file__)])
    command(prepare, *flags)
    command(prepare, '--dataset=pydocs', '--name=mine', *flags)
    assert {'pydocs', 'mine'} <= {path.name for path in tmp_path.iterdir()}
    words = capsys.readouterr().out
    assert 'mine: preparing Python 3.' in words
    with pytest.raises(ValueError, match="given 'pydocs' and 'a.txt', expected one of them"):
        command(prepare, '--dataset=pydocs', 'a.txt', *flags)


def test_missing_inputs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="given 'shakespear', did you mean 'shakespeare'"):
        run(tmp_path, dataset='shakespear')
    with pytest.raises(ValueError, match='no such file'):
        run(tmp_path, tmp_path / 'nowhere.txt')


def test_shakespeare_is_downloaded(tmp_path, server, monkeypatch):
    body = b'To be, or not to be.\n' * 500
    Server.files['/input.txt'] = body
    monkeypatch.setattr(sources, 'SHAKESPEARE',
                        (f'{server}/input.txt', hashlib.sha256(body).hexdigest()))
    manifest = run(tmp_path, dataset='shakespeare', tokenizer='chars', name='')
    assert (manifest['name'] == 'shakespeare_char'
            and manifest['splits']['train']['tokens'] == int(len(body) * 0.9))


def peak_of(*flags):
    """Highest memory in MB of the process that prepares (VmHWM: ru_maxrss is inherited)."""
    code = ('import sys; from data import prepare; from gpt.settings import configure; '
            'prepare.main(configure(prepare.Config, sys.argv[1:], None, "input")); '
            'print(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])')
    return int(script('-c', code, *flags).stdout.splitlines()[-1]) // 1024


@pytest.mark.slow
@pytest.mark.parametrize('workers', [1, 2])
def test_memory_does_not_grow_with_the_corpus(tmp_path, workers):
    """Peak memory of preparing 5 and 30 MB of documents of the same size; few of them validate,
    because xz needs ten times the text that it compresses (at most 16 MB)."""
    peaks = []
    for n in (500, 3000):
        texts = (f'{i} ' + 'lorem ipsum dolor ' * 600 for i in range(n))
        source = write_jsonl(tmp_path / f'{n}.jsonl', texts)
        peaks.append(peak_of(f'--data_dir={tmp_path}', '--tokenizer=bytes', source,
                             f'--workers={workers}', '--val_fraction=0.004'))
    assert peaks[1] - peaks[0] < 15, peaks


@pytest.mark.slow
def test_a_line_of_any_length_costs_no_memory(tmp_path):
    """300 MB in one line of JSON, among others, with a limit of a megabyte."""
    path = tmp_path / 'a.jsonl'
    with open(path, 'wb') as file:
        file.write(b'{"text": "first"}\n{"text": "')
        for _ in range(300):
            file.write(b'x' * 1_000_000)
        file.write(b'"}\n' + b'{"text": "last"}\n' * 2)
    assert peak_of(f'--data_dir={tmp_path}', '--tokenizer=bytes', '--max_document_mb=1',
                   path) < 160
    left_out = json.loads((tmp_path / 'a/manifest.json').read_text())['remarks']
    assert left_out == {documents.TOO_LONG: [1, f'{path}:2']}


@pytest.mark.slow
@pytest.mark.parametrize('encoding', ['dictionary', 'prefix', 'plain'])
def test_parquet_that_is_small_on_disk_is_read_in_little_memory(tmp_path, encoding):
    """Gigabytes of text in a few kilobytes: three texts in 3,000 rows, or one that rows share."""
    import pyarrow
    from pyarrow import parquet
    text, path = 'lorem ipsum ' * 80_000, tmp_path / 'a.parquet'
    if encoding == 'dictionary':
        indices = pyarrow.array([i % 3 for i in range(3000)], pyarrow.int32())
        column = pyarrow.DictionaryArray.from_arrays(indices, [text + str(i) for i in range(3)])
        options = {'dictionary_pagesize_limit': 10 ** 8}
    else:
        column = [text + str(i) for i in range(300)]
        options = {'use_dictionary': False, 'data_page_size': 1, 'write_batch_size': 1}
        if encoding == 'prefix':
            options['column_encoding'] = {'text': 'DELTA_BYTE_ARRAY'}
    parquet.write_table(pyarrow.table({'text': column}), path, compression='zstd',
                        store_schema=False, **options)
    assert path.stat().st_size < 400_000
    code = ('import sys; from types import SimpleNamespace; from gpt.data import documents\n'
            'found = documents.batches([SimpleNamespace(name="a.parquet")], (0, 0, 0),\n'
            '                          documents.Options(), lambda i: sys.argv[1])\n'
            'print(sum(batch.size() for batch in found))\n'
            'print(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])')
    size, peak = map(int, script('-c', code, path).stdout.split())
    assert size > len(text) * len(column) and peak < 300_000


def test_verify_from_the_command_line(stories):
    done = script('data/prepare.py', '--verify=tiny', f'--data_dir={stories}')
    assert 'tiny: verified' in done.stdout
    done = script('data/prepare.py', '--verify=nothing', f'--data_dir={stories}', check=False)
    assert done.returncode == 2 and 'there is no data set' in done.stderr
    assert verify('tiny', stories) == []


def test_the_tokenizer_of_another_folder_can_be_used(tmp_path):
    """Of a data set, or of a run's newest step, so that a model can be fine-tuned on the result."""
    made = run(tmp_path, write_jsonl(tmp_path / 'a.jsonl'), tokenizer='bpe:300')
    (tmp_path / 'run/step_0000010').mkdir(parents=True)
    text = (tmp_path / 'd/tokenizer.json').read_text()
    (tmp_path / 'run/step_0000010/tokenizer.json').write_text(text)
    other = write_jsonl(tmp_path / 'b.jsonl', [f'Quite another text, {i}' for i in range(30)])
    for folder in ('d', 'run'):
        found = run(tmp_path, other, name=f'by_{folder}', tokenizer=str(tmp_path / folder))
        assert found['tokenizer'] == made['tokenizer'], 'under the same name, too'
    assert sorted(sum(decoded(tmp_path, 'by_run').values(), [])) == sorted(
        f'Quite another text, {i}' for i in range(30))


def test_verify_knows_the_tokenizer(tmp_path):
    run(tmp_path, write_jsonl(tmp_path / 'a.jsonl'))
    other = tokenizer.build('bpe:300', lambda: TEXTS)
    (tmp_path / 'd/tokenizer.json').write_text(tokenizer.to_json(other))
    with pytest.raises(ValueError, match='tokenizer.json is not the one that made it'):
        prepare.report('d', tmp_path)


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    source, tokenize = write_jsonl(tmp_path / 'a.jsonl'), prepare.tokenized

    def changed(*arguments):
        yield from tokenize(*arguments)
        source.write_text(source.read_text() + '{"text": "more"}')

    def touched(*arguments):
        yield from tokenize(*arguments)
        os.utime(source, ns=(1, 1))

    monkeypatch.setattr(prepare, 'tokenized', changed)
    with pytest.raises(ValueError, match='a.jsonl: changed while it was read'):
        run(tmp_path, source)
    monkeypatch.setattr(prepare, 'tokenized', touched)
    run(tmp_path, source)


def test_it_says_what_is_skipped_or_lopsided(tmp_path, capsys):
    (tmp_path / 'texts').mkdir()
    (tmp_path / 'texts/a.TXT').write_text('A short note.')
    (tmp_path / 'texts/b.txt').write_text('A long book. ' * 1000)
    (tmp_path / 'texts/c.csv').write_text('1,2')
    run(tmp_path, tmp_path / 'texts', tmp_path / 'texts/b.txt')
    words = capsys.readouterr().out
    assert 'skipped 1 .csv' in words
    assert 'too few documents to choose from: the last 5.0% of each long one' in words
    assert sum(map(len, decoded(tmp_path).values())) == 3, 'a file given twice is read once'


@pytest.mark.parametrize('sizes, words', [
    ([9000] * 3, 'the last 5.0% of each long one'), ([500] * 9 + [50_000], 'chosen by size')])
def test_few_documents_are_split_as_asked_also_when_resumed(tmp_path, monkeypatch, capsys, sizes,
                                                            words):
    texts = [f'Chapter {i}. ' * (size // 12) for i, size in enumerate(sizes)]
    source = write_jsonl(tmp_path / 'a.jsonl', texts)
    splits = run(tmp_path, source, name='whole', workers=2)['splits']
    assert 0.025 < splits['val']['bytes'] / sum(map(len, texts)) < 0.1
    monkeypatch.setattr(documents, 'BATCH_BYTES', 600)
    monkeypatch.setattr(prepare, 'SAVE_SECONDS', -1)
    save, calls = prepare.save_progress, []

    def stops(*arguments):
        save(*arguments)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
    monkeypatch.setattr(prepare, 'save_progress', stops)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, source)
    assert run(tmp_path, source)['splits'] == splits
    printed = capsys.readouterr().out
    assert words in printed and 'resuming' in printed and 'val_fraction' not in printed


def test_a_split_far_from_what_was_asked_is_announced(tmp_path, capsys):
    """Hashes alone decide for many documents."""
    long = 'A long book. ' * 9000
    seed = next(seed for seed in range(99) if encode.document_hash(long.encode(), seed) < 0.05)
    notes = [f'{i}, a note.' for i in range(2000)]
    run(tmp_path, write_jsonl(tmp_path / 'a.jsonl', [*notes, long]), seed=seed)
    words = capsys.readouterr().out
    assert re.search(r'validation has \d\d.\d% of the text, val_fraction is 5.0%: ', words)
    assert 'divide long files' in words and 'with --replace' in words
    (tmp_path / 'novel.txt').write_text('Chapter 1. ' * 500)
    run(tmp_path, tmp_path / 'novel.txt', name='one')
    run(tmp_path, write_jsonl(tmp_path / 'many.jsonl', LONG), name='many')
    assert 'val_fraction' not in capsys.readouterr().out


@pytest.mark.parametrize('text, kind, words', [
    ('hello there', 'chars', 'val: given 1 token, expected at least 2'),
    ('a', 'bytes', 'train: given 1 token, expected'), ('a', 'chars', 'train: given 0 tokens')])
def test_a_split_of_one_token_is_refused(tmp_path, text, kind, words):
    (tmp_path / 'a.txt').write_text(text)
    with pytest.raises(ValueError, match=words):
        run(tmp_path, tmp_path / 'a.txt', tokenizer=kind)
    assert not (tmp_path / 'd').exists()
    (tmp_path / 'a.txt').write_text(text + ', and more')
    assert run(tmp_path, tmp_path / 'a.txt', tokenizer=kind, val_fraction=0.3)


@pytest.mark.parametrize('kind, ids', [('bytes', [256]), ('bytes', [65]), ('chars', [0])])
def test_a_data_set_with_one_validation_token_can_be_verified_and_explored(tmp_path, capsys,
                                                                            kind, ids):
    """As earlier versions prepared them."""
    (tmp_path / 'a.txt').write_text('hello there')
    manifest = run(tmp_path, tmp_path / 'a.txt', tokenizer=kind, val_fraction=0.3)
    writer = ShardWriter(tmp_path / 'd', 'val', 100, manifest['tokenizer']['eot_id'])
    writer.write(np.array(ids, np.uint16))
    writer.close()
    manifest['splits']['val'] |= {'tokens': 1, 'shards': writer.shards}
    (tmp_path / 'd/manifest.json').write_text(json.dumps(manifest))
    prepare.report('d', tmp_path)
    assert 'd: verified; ' in capsys.readouterr().out and leaked('d', tmp_path) == 0
    explore.main(explore.Config(name=('d',), data_dir=str(tmp_path)))
    assert re.search(r'\ntokens of \w+ +\d+ +1\n', capsys.readouterr().out)
