"""Data sets of the hub, read by the real client from a hub on loopback; your own files."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, script
from loopback_hub import serving

from gpt import tokenizer
from gpt.data import documents, sources
from gpt.data.shards import ShardWriter, Tokens, verify

pyarrow = pytest.importorskip('pyarrow')
pytest.importorskip('datasets')
from pyarrow import parquet

TEXTS = [f'Document {i} of the hub. ' + 'Some more words are in it. ' * (i % 40)
         for i in range(400)]
README = '''---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test-*
- config_name: one
  data_files: data/train-00001*
---
'''


def write_table(path, texts, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({'text': texts, **columns}), path, row_group_size=50)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp('hub') / 'datasets'
    for i in range(3):
        write_table(root / f'someone/parquet/data/train-{i:05d}.parquet', TEXTS[i * 100:][:100])
    write_table(root / 'someone/parquet/data/test-00000.parquet', TEXTS[300:])
    (root / 'someone/parquet/README.md').write_text(README)
    lines = [json.dumps({'content': text}) + '\n' for text in TEXTS[:300]]
    (root / 'someone/lines').mkdir()
    for i in range(3):
        (root / f'someone/lines/c4-train.{i}.json.gz').write_bytes(
            gzip.compress(''.join(lines[i * 100:][:100]).encode()))
    (root / 'Skylion007/openwebtext').mkdir(parents=True)       # a script, and its parquet files
    (root / 'Skylion007/openwebtext/openwebtext.py').write_text('raise SystemExit')
    write_table(root / 'Skylion007/openwebtext@parquet/plain_text/partial-train/0000.parquet',
                TEXTS[:300])
    ready = root / 'kjj0/fineweb10B-gpt2'
    ready.mkdir(parents=True)
    for i, name in enumerate(('val_000000', 'train_000001', 'train_000002', 'train_000003')):
        ids = np.random.default_rng(i).integers(0, 50256, 5000).astype(np.uint16)
        ids[::500] = 50256
        writer = ShardWriter(ready, 'x', 10 ** 6)
        writer.write(ids)
        writer.close()
        (ready / 'x_000000.bin').rename(ready / f'fineweb_{name}.bin')
    return root.parent


@pytest.fixture
def hub(root, tmp_path):
    with serving(root, tmp_path / 'home') as server:
        yield server


def prepare(hub, tmp_path, *flags, check=True, **env):
    tokens = () if 'fineweb-10B' in flags[0] else ('--tokenizer=bytes',)
    return script('data/prepare.py', *flags, *tokens, f'--data_dir={tmp_path}/data', check=check,
                  env={**hub.env, **env})


def prepare_all(hub, tmp_path, *lines):
    """The error of each of these command lines, '' for none, all in one process."""
    code = ('import sys; from gpt.settings import configure; from data import prepare\n'
            'for line in sys.argv[1:]:\n'
            '    cfg = configure(prepare.Config, line.split())\n'
            '    try:\n'
            '        prepare.main(cfg)\n'
            '        print("ended:")\n'
            '    except (OSError, ValueError) as error:\n'
            '        print(f"ended:{error}")\n')
    flags = f'--tokenizer=bytes --data_dir={tmp_path}/data'
    done = script('-c', code, *(f'{line} {flags}' for line in lines), env=hub.env)
    is_partial = any('openwebtext' in line for line in lines)
    assert ('reading only its first gigabytes' in done.stdout) == is_partial
    return [line.removeprefix('ended:') for line in done.stdout.splitlines()
            if line.startswith('ended:')]


def texts_in(tmp_path, name):
    """All documents of a data set of bytes, sorted."""
    found, enc = [], tokenizer.load(tmp_path / 'data' / name / 'tokenizer.json')
    for split in ('train', 'val'):
        tokens = Tokens(name, split, 257, tmp_path / 'data')
        text = enc.decode(tokens.read(0, len(tokens)).tolist())
        found += text.split('<|endoftext|>')[1:]
    return sorted(found)


def test_parquet_of_the_hub_leaves_no_second_copy(hub, tmp_path):
    """Two splits of it; after a download that breaks off and a 429 it tries again."""
    hub.break_off, hub.too_many = 1, 1
    prepare_all(hub, tmp_path, '--dataset=hub:someone/parquet',
                '--dataset=hub:someone/parquet --split=test --name=test')
    assert texts_in(tmp_path, 'parquet') == sorted(TEXTS[:300])
    manifest = json.loads((tmp_path / 'data/parquet/manifest.json').read_text())
    assert [name for name, *_ in manifest['source']['files']] == [
        f'data/train-{i:05d}.parquet' for i in range(3)]
    assert all(len(sha256) == 64 and size for _, size, sha256 in manifest['source']['files'])
    assert not list(tmp_path.rglob('*.parquet')), 'files are deleted once they are tokenized'
    assert texts_in(tmp_path, 'test') == sorted(TEXTS[300:])


@pytest.mark.slow
def test_configurations_lines_and_converted_data_sets(hub, tmp_path):
    found = prepare_all(
        hub, tmp_path, '--dataset=hub:someone/parquet:one',
        '--dataset=hub:someone/lines --text_key=content --name=lines', '--dataset=openwebtext',
        '--dataset=hub:someone/parquet:two', '--dataset=hub:someone/nothing',
        '--dataset=hub:someone/parquet --split=dev', '--dataset=hub:someone/lines --name=x')
    assert found[:3] == ['', '', '']
    for words, line in zip(("'two' not found.*one", 'not found at', "no split 'dev'",
                            "no field 'text'"), found[3:], strict=True):
        assert re.search(words, line), line
    assert texts_in(tmp_path, 'parquet-one') == sorted(TEXTS[100:200])
    assert texts_in(tmp_path, 'lines') == texts_in(tmp_path, 'openwebtext') == sorted(TEXTS[:300])


def test_without_a_hub_it_says_what_to_do(hub, tmp_path):
    for dataset in ('fineweb-10B', 'hub:someone/parquet'):
        done = prepare(hub, tmp_path, f'--dataset={dataset}', check=False,
                       HF_ENDPOINT='http://127.0.0.1:9')
        assert done.returncode == 2 and done.stderr.count('\n') == 1, done.stderr
        assert 'cannot be reached' in done.stderr and '(ready shards: into' in done.stderr


@pytest.mark.slow
def test_killed_in_a_download_it_resumes(hub, tmp_path):
    hub.stall = True
    command = [sys.executable, 'data/prepare.py', '--dataset=hub:someone/parquet', '--name=killed',
               '--tokenizer=bytes', f'--data_dir={tmp_path}/data']
    running = subprocess.Popen(command, cwd=ROOT, env=hub.env)
    while not any('parquet' in path and method == 'GET' and 'resolve' in path
                  for method, path, _ in hub.requests):
        time.sleep(0.05)
    time.sleep(0.3)
    running.send_signal(signal.SIGKILL)
    running.wait()
    hub.stall, hub.break_off = False, 0
    prepare(hub, tmp_path, '--dataset=hub:someone/parquet', '--name=killed')
    assert texts_in(tmp_path, 'killed') == sorted(TEXTS[:300])


@pytest.mark.slow
def test_ready_shards_are_downloaded_verified_and_added_to(hub, tmp_path, root, real):
    """A damaged one is downloaded again; more shards later download only the missing ones."""
    real('tiktoken_cache')
    hub.altered, hub.too_many = 1, 1
    done = prepare(hub, tmp_path, '--dataset=fineweb-10B', '--shards=2')
    folder = tmp_path / 'data/fineweb-10B'
    assert '10,000 tokens of 20 documents' in done.stdout
    names = [f'fineweb_{name}.bin' for name in ('train_000001', 'train_000002', 'val_000000')]
    assert sorted(path.name for path in folder.glob('*.bin')) == names
    for name in names:
        theirs = root / 'datasets/kjj0/fineweb10B-gpt2' / name
        assert (folder / name).read_bytes() == theirs.read_bytes()
    assert verify('fineweb-10B', tmp_path / 'data') == []
    assert 'is up to date' in prepare(hub, tmp_path, '--dataset=fineweb-10B',
                                         '--shards=1').stdout
    (folder / names[1]).unlink()
    os.truncate(folder / names[2], 1500)
    said = prepare(hub, tmp_path, '--dataset=fineweb-10B', '--shards=1').stdout
    assert 'it will be replaced' in said and verify('fineweb-10B', tmp_path / 'data') == []
    hub.requests.clear()
    before = (folder / 'manifest.json').read_bytes()
    said = prepare(hub, tmp_path, '--dataset=fineweb-10B').stdout
    assert 'shards are added (--shards=2 --replace goes back)' in said
    assert {path.rpartition('/')[2] for method, path, _ in hub.requests
            if method == 'GET' and path.endswith('.bin')} == {'fineweb_train_000003.bin'}
    manifest = json.loads((folder / 'manifest.json').read_text())
    ids = Tokens('fineweb-10B', 'val', 50257, tmp_path / 'data').read(0, 5000)
    text = tokenizer.gpt2().decode_bytes(ids[ids != 50256].tolist())
    assert manifest['splits']['val']['bytes'] == len(text)
    assert manifest['splits']['train']['tokens'] == 15_000
    hub.requests.clear()
    prepare(hub, tmp_path, '--dataset=fineweb-10B', '--shards=2', '--replace')
    assert (folder / 'manifest.json').read_bytes() == before, 'a run on two shards resumes'
    assert not any('.bin' in path for method, path, _ in hub.requests if method == 'GET')


@pytest.mark.slow
def test_a_shard_that_stays_damaged_is_refused(hub, tmp_path, real):
    real('tiktoken_cache')
    hub.altered = 10 ** 6
    done = prepare(hub, tmp_path, '--dataset=fineweb-10B', '--shards=1', check=False)
    assert done.returncode == 2 and 'expected' in done.stderr
    assert not (tmp_path / 'data/fineweb-10B').exists() and not list(tmp_path.rglob('*.bin'))
    done = prepare(hub, tmp_path, '--dataset=fineweb-10B', '--tokenizer=bytes', check=False)
    assert done.returncode == 2 and "expected 'gpt2'" in done.stderr


def test_files_folders_and_patterns(tmp_path, monkeypatch):
    for name in ('b.txt', 'a.jsonl.zst', 'deep/c.md', 'settings.json', 'deep/.hidden/d.txt'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('x')

    def names(text):
        return [Path(path).name for path in sources.text_files(text)]

    assert names(str(tmp_path)) == ['a.jsonl.zst', 'b.txt', 'c.md']
    assert names(f'{tmp_path}/*.txt') == ['b.txt'] and names(f'{tmp_path}/**/*.md') == ['c.md']
    assert names(f'{tmp_path}/settings.json') == ['settings.json']
    assert sources.from_files([f'{tmp_path}/a.jsonl.zst']).name == 'a'
    assert sources.from_files([f'{tmp_path}/*.txt']).name == tmp_path.name
    monkeypatch.setenv('HOME', str(tmp_path))               # a shell does not expand --input=~/…
    assert sources.from_files(['~/deep']).name == 'deep'
    assert sources.find('~/b.txt', (), '', tmp_path).name == 'b'
    shutil.rmtree(tmp_path / 'deep')
    with pytest.raises(ValueError, match='no such file'):
        names(f'{tmp_path}/*.md')


def test_names_are_relative_to_the_folder_given(tmp_path, monkeypatch):
    for name in ('pos/0_2.txt', 'neg/0_2.txt', 'c.txt'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)

    def names(*inputs):
        return [name for name, *_ in sources.listing(sources.from_files(inputs).files)]

    monkeypatch.chdir(tmp_path)
    assert names('.') == names(str(tmp_path)) == ['c.txt', 'neg/0_2.txt', 'pos/0_2.txt']
    assert names('pos', f'{tmp_path}/neg/') == ['pos/0_2.txt', 'neg/0_2.txt']
    assert names('pos') == names('pos/*.txt') == names('pos/0_2.txt') == ['0_2.txt']
    assert names('*/*.txt') == names('**/0_2.txt') == ['neg/0_2.txt', 'pos/0_2.txt']
    assert names('pos/0_2.txt', 'c.txt') == ['pos/0_2.txt', 'c.txt']
    (tmp_path / 'link.txt').symlink_to('c.txt')
    os.link('c.txt', 'second.txt')
    assert names('c.txt', 'link.txt', './c.txt') == ['c.txt']
    assert names('c.txt', 'second.txt') == ['c.txt', 'second.txt']


def test_only_plain_files_are_read(tmp_path):
    os.mkfifo(tmp_path / 'pipe.txt')
    (tmp_path / 'zero.txt').symlink_to('/dev/zero')
    for name in ('pipe.txt', 'zero.txt'):
        with pytest.raises(ValueError, match=f'{name}: is a device, pipe or socket'):
            sources.from_files([str(tmp_path / name)])
    (tmp_path / 'a.txt').write_text('x')
    assert [file.label for file in sources.from_files([str(tmp_path)]).files] == ['a.txt']


def test_a_folder_of_arrow_files_is_recognized(tmp_path):
    import datasets
    datasets.Dataset.from_dict({'text': ['a']}).save_to_disk(tmp_path / 'd')
    with pytest.raises(ValueError, match='given 1 .arrow, 2 .json, expected .txt.*to_parquet'):
        sources.from_files([str(tmp_path / 'd')])


def test_pydocs_is_read_without_importing(tmp_path):
    (tmp_path / 'm.py').write_text(
        '"""Top."""\nraise SystemExit\nclass A:\n    """Of A."""\n'
        '    def f(self):\n        """Of f.\n\n        More.\n        """\n')
    found = list(documents.python_documents(tmp_path / 'm.py'))
    assert found == ['Top.\n\nOf A.\n\nOf f.\n\nMore.']
    files = sources.python_files()
    assert not any('site-packages' in str(file) for file in files)
    topics = [file for file in files
              if file.parent.name == 'pydoc_data' and file.name == 'topics.py']
    assert topics and len(list(documents.python_documents(topics[0]))) > 50


def test_a_name_that_is_not_utf8_is_refused_before_the_work(tmp_path):
    (tmp_path / os.fsdecode(b'\xff.txt')).write_text('The fox ran.')
    with pytest.raises(ValueError, match=r'udcff.txt.: its name is not UTF-8; rename it'):
        sources.files_in(str(tmp_path))
