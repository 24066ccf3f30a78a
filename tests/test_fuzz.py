"""
Input from outside, changed at random (hypothesis, with a fixed seed): every reader takes it, with
the right result, or refuses it in a line of its own (status 2), quickly and in little memory.

A few examples of each by default; with --slow about a minute of them.
"""

import copy
import json
import os
import re
import resource
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import command, script

hypothesis = pytest.importorskip('hypothesis')
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import eval_cbt
import eval_lm
import hellaswag
import plot
import sample
import train
from data import explore, prepare
from gpt import curves, report, results, tokenizer
from gpt import settings as gpt_settings
from gpt.config_file import as_config_file
from gpt.data import benchmarks, documents, sets, shards
from gpt.script import raised_here

EXAMPLES = int(os.environ['FUZZ'])
MAX_SECONDS, MAX_GROWTH = 20, 2 ** 30
COUNTS = Counter()          # of each target: how many were taken, how many refused

ODD_BYTES = [b'', b'\0', b'\xff', b'\xed\xa0\x80', b'\xef\xbb\xbf', b'\r', b'\r\n', b'\n', b'"',
             b'\\', b'[', b']', b'{', b'}', b':', b',', b'-', b'0', b'null', b'true', b'NaN',
             b'-Infinity', b'1e999', b'\\ud800', b'\\u0000', b'1' * 4301, b'[' * 3000,
             b'{"a":' * 3000, b'9' * 19, b'\xff\xfe', b'\x1f\x8b', b'PAR1', b'\x28\xb5\x2f\xfd',
             b'XXXXX', b'|', b'\t', b'~/', b'../', b'/dev/zero', '\u2028\x85\x1c'.encode(), b'=',
             b'#', b'(', b')', b'**', b'%']
ODD_VALUES = [None, True, False, 0, -1, 1, 2 ** 31, 2 ** 63, 10 ** 400, 0.5, -0.0, 1e300, '', 'x',
              '\ud800', '\0', '../x', '/dev/zero', 'x' * 70_000, 'a\nb', [], [[]], {}, {'a': 1},
              [None], ['x']]


def one_from(items):
    """A strategy as st.sampled_from(items), which would print all of them for an error."""
    return st.integers(0, len(items) - 1).map(lambda i: items[i])


def odd_bytes(raw):
    """A strategy: these bytes with a few places changed."""
    change = st.tuples(st.integers(0, len(raw)), st.integers(0, 40), one_from(ODD_BYTES))
    return st.lists(change, min_size=1, max_size=4).map(lambda changes: changed(raw, changes))


def changed(raw, changes):
    for place, n, piece in changes:
        raw = raw[:place] + piece + raw[place + n:]
    return raw


def odd_json(value):
    """A strategy: the JSON of `value` with a part replaced, left out or added, as bytes."""
    paths = list(places(value))
    change = st.tuples(one_from(paths), one_from(['set', 'delete', 'add']), one_from(ODD_VALUES))
    return st.lists(change, min_size=1, max_size=2).map(
        lambda changes: json.dumps(edited(value, changes)).encode())


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else (
        list(enumerate(value))[:3] if isinstance(value, list) else ())
    for key, part in items:
        yield from places(part, (*path, key))


def edited(value, changes):
    value = json.loads(json.dumps(value))
    for path, action, odd in changes:
        odd, box = copy.deepcopy(odd), {'': value}
        parent = box
        for key in ('', *path)[:-1]:
            try:
                parent = parent[key]
            except (KeyError, IndexError, TypeError):
                break
        key = path[-1] if path else ''
        try:
            if action == 'delete' and path:
                del parent[key]
            elif action == 'add' and isinstance(parent[key], dict):
                parent[key]['odd'] = odd
            elif action == 'add' and isinstance(parent[key], list):
                parent[key].append(odd)
            else:
                parent[key] = odd
        except (KeyError, IndexError, TypeError):
            pass
        value = box['']
    return value


def odd(value):
    """A strategy: JSON changed as a value or as bytes."""
    return st.one_of(odd_json(value), odd_bytes(json.dumps(value).encode()))


def attempt(name, call):
    """What call() returns, None if it refuses; anything but that fails the test."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    found = None
    try:
        found = call()
        COUNTS[name, 'taken'] += 1
    except (ValueError, OSError) as error:
        if not isinstance(error, OSError) and not raised_here(error):
            raise
        assert str(error)
        COUNTS[name, 'refused'] += 1
    assert time.perf_counter() - started < MAX_SECONDS
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < MAX_GROWTH
    return found


def fuzz(strategy, test, examples=EXAMPLES):
    """Run test(example) for examples of the strategy."""
    @settings(max_examples=examples, derandomize=True, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(example):
        test(example)
    run()


@pytest.fixture(scope='module', autouse=True)
def counts():
    yield
    for name in sorted({name for name, _ in COUNTS}):
        print(f"{name}: {COUNTS[name, 'taken']} taken, {COUNTS[name, 'refused']} refused")


# Data sets.

def test_manifests(stories, tmp_path):
    shutil.copytree(stories / 'tiny', tmp_path / 'tiny')
    path = tmp_path / 'tiny/manifest.json'
    good = json.loads(path.read_text())

    def use(raw):
        path.write_bytes(raw)
        attempt('manifest: verify', lambda: prepare.report('tiny', tmp_path))
        loaded = attempt('manifest: load', lambda: sets.load_sets('tiny', tmp_path))
        if loaded:
            (data,), encoding = loaded
            ids = attempt('manifest: read', lambda: data.train.read(0, 50))
            assert ids is None or len(ids) == 50
            attempt('manifest: bits', lambda: train_bits(data.manifest))
        attempt('manifest: page', lambda: (report.from_manifest(shards.read_manifest(
            'tiny', tmp_path)), shards.describe_source(shards.read_manifest('tiny', tmp_path))))

    fuzz(odd(good), use)


def train_bits(manifest):
    from gpt.validation import bits_per_byte
    return bits_per_byte(2.0, 100, manifest)


def test_notes_of_preparing(tmp_path, monkeypatch):
    """Whatever they hold, the data set is the right one or none."""
    source = tmp_path / 'a.jsonl'
    source.write_text(''.join(json.dumps({'text': f'{i} text ' * 40}) + '\n' for i in range(60)))
    monkeypatch.setattr(prepare, 'SAVE_SECONDS', -1)
    monkeypatch.setattr(documents, 'BATCH_BYTES', 4000)
    cfg = prepare.Config(input=(str(source),), tokenizer='bytes', name='d', seed=3,
                         data_dir=str(tmp_path))
    prepare.main(cfg)
    right = {path.name: path.read_bytes() for path in (tmp_path / 'd').iterdir()}
    shutil.rmtree(tmp_path / 'd')
    with monkeypatch.context() as patch:
        patch.setattr(prepare, 'write_manifest', None)
        with pytest.raises(TypeError):
            prepare.main(cfg)
    partial, kept = tmp_path / '.d.partial', tmp_path / 'kept'
    partial.rename(kept)
    notes = {name: json.loads((kept / name).read_text()) for name in ('plan.json', 'progress.json')}

    def use(example):
        name, raw = example
        for folder in (partial, tmp_path / 'd'):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(kept, partial)
        (partial / name).write_bytes(raw)
        attempt(name, lambda: prepare.main(cfg))
        if (tmp_path / 'd').exists():
            assert right == {path.name: path.read_bytes() for path in (tmp_path / 'd').iterdir()}

    fuzz(st.one_of(*(st.tuples(st.just(name), odd(note)) for name, note in notes.items())), use,
         EXAMPLES // 4)


def reference(raw):
    """The texts of lines of JSON, as --errors=skip should read them, by plain Python."""
    found = []
    for line in re.split(rb'\r\n|\r|\n', raw):
        try:
            text = json.loads(line.decode().removeprefix('\ufeff'))['text']
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(text, str):
            text = re.sub('(?m)^\ufeff+', '', text.replace('\r\n', '\n').replace('\r', '\n'))
            text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
            found += [text] if text else []
    return found


def read_documents(path, options=documents.Options()):
    files = [SimpleNamespace(name=str(path))]
    return [text for batch in documents.batches(files, (0, 0, 0), options, lambda i: path)
            for text, raw in documents.texts(batch, options, {}) if text.encode() == raw]


def test_lines_of_json(tmp_path):
    path = tmp_path / 'a.jsonl'
    rows = [{'text': f'wörd {i}\r\n\ufeff{i}', 'n': [i]} for i in range(12)]
    good = b''.join(json.dumps(row, ensure_ascii=i % 2 == 0).encode() + b'\r\n' * (i % 2) + b'\n'
                    for i, row in enumerate(rows))

    def use(raw):
        path.write_bytes(raw)
        attempt('lines: strict', lambda: read_documents(path))
        skip = documents.Options(errors='skip')
        assert attempt('lines: skip', lambda: read_documents(path, skip)) == reference(raw)

    fuzz(odd_bytes(good), use)


def test_texts(tmp_path):
    path = tmp_path / 'a.txt'
    good = 'One.\r\n\r\nTwo\rand three.\n\nFour. '.encode() * 4

    def use(example):
        raw, separator = example
        path.write_bytes(raw)
        found = attempt('texts', lambda: read_documents(path, documents.Options(
            separator=separator, errors='replace')))
        assert not any('\r' in text or text.startswith('\ufeff') for text in found)

    fuzz(st.tuples(odd_bytes(good), st.sampled_from(['', '\n', '\n\n', '. ', '.\n'])), use)


def test_parquet(tmp_path):
    """In another process, with a limit on its memory: its reader is a library in C++."""
    pyarrow = pytest.importorskip('pyarrow')
    from pyarrow import parquet
    table = pyarrow.table({'text': [f'wörd {i % 5}' * (i % 7) for i in range(200)] + [None],
                           'n': range(201)})
    for i, compression in enumerate(('none', 'zstd')):
        parquet.write_table(table, tmp_path / f'{i}.parquet', row_group_size=50,
                            compression=compression)
    good = [(tmp_path / f'{i}.parquet').read_bytes() for i in range(2)]
    examples = []
    fuzz(st.one_of(*(odd_bytes(raw) for raw in good),
                   *(st.tuples(st.just(raw), st.integers(0, len(raw) - 1), st.integers(1, 255)).map(
                       lambda one: flipped(*one)) for raw in good)), examples.append, EXAMPLES * 2)
    for i, raw in enumerate(examples):
        (tmp_path / f'{i:05d}.parquet').write_bytes(raw)
    done = script(Path(__file__), tmp_path, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    COUNTS.update({('parquet', key): n for key, n in json.loads(
        done.stdout.splitlines()[-1]).items()})


def flipped(raw, place, bits):
    return raw[:place] + bytes([raw[place] ^ bits]) + raw[place + 1:]


def read_all_parquet(folder):
    """What the other process does: read each file, strictly, and print counts."""
    resource.setrlimit(resource.RLIMIT_AS, (6 * 2 ** 30, 6 * 2 ** 30))
    for path in sorted(Path(folder).glob('?????.parquet')):
        print(path.name, flush=True)
        attempt('parquet', lambda: read_documents(path))
    print(json.dumps({key: n for (_, key), n in COUNTS.items()}))


# Runs and results.

def test_logs_and_settings_of_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(results, 'OUT', tmp_path / 'results')
    for name in 'ab':
        (tmp_path / name).mkdir()
        (tmp_path / name / 'log.jsonl').write_bytes(lines_of(LOG))
        (tmp_path / name / 'config.py').write_text(CONFIG)
    files = {'log.jsonl': odd_lines(LOG),
             'samples.jsonl': odd_lines([{'step': 1, 'text': 'a'}] * 3),
             'starts.jsonl': odd_lines([{'step': 0, 'time': 'x', 'processes': 1}] * 2),
             'config.py': odd_bytes(CONFIG.encode())}

    def use(example):
        name, raw = example
        path = tmp_path / 'b' / name
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(raw)
        pair = [tmp_path / 'a', tmp_path / 'b']
        attempt(f'{name}: compare', lambda: curves.compared(pair))
        records = attempt(f'{name}: log', lambda: curves.read_log(tmp_path / 'b/log.jsonl'))
        if records:
            attempt(f'{name}: summary', lambda: curves.summary(records))
            attempt(f'{name}: page', lambda: report.page(tmp_path / 'b', records, PICTURES))
        path.unlink() if before is None else path.write_bytes(before)

    fuzz(st.one_of(*(st.tuples(st.just(name), raw) for name, raw in files.items())), use)


def test_pictures(tmp_path):
    (tmp_path / 'log.jsonl').write_text('')

    def use(raw):
        (tmp_path / 'log.jsonl').write_bytes(raw)
        attempt('pictures', lambda: plot.main(plot.Config(runs=(str(tmp_path),))))

    fuzz(odd_lines(LOG), use, EXAMPLES // 10 + 1)


CONFIG = '"""Doc."""\nn_layer = 2 * 3\nlearning_rate = 1e-3 / 2\ndataset = "tiny"\nseed = 7\n'
LOG = [{'step': 0, 'tokens': 0, 'val_loss': 5.0, 'xz_bits_per_byte': 2.0, 'val_bits_per_byte': 3.0},
       {'step': 10, 'tokens': 100, 'loss': 4.0, 'lr': 1e-3, 'grad_norm': 1.0, 'step_ms': 5.0,
        'tokens_per_second': 50.0},
       {'step': 15, 'event': 'spike', 'words': 'high'},
       {'step': 20, 'tokens': 200, 'loss': None, 'hellaswag': 0.25},
       {'step': 20, 'event': 'rollback', 'words': 'back', 'to_step': 10},
       {'step': 20, 'tokens': 300, 'val_loss': 3.5, 'xz_bits_per_byte': 2.0,
        'val_bits_per_byte': 2.0}]
PICTURES = {(theme, wide): '<svg/>' for theme in ('light', 'dark') for wide in (False, True)}


def lines_of(records):
    return ''.join(json.dumps(record) + '\n' for record in records).encode()


def odd_lines(records):
    """A strategy: lines of JSON, one of them or the bytes changed."""
    lines = [json.dumps(record).encode() for record in records]
    one = st.one_of(*(odd_json(record).map(
        lambda line, i=i: b'\n'.join([*lines[:i], line, *lines[i + 1:], b'']))
        for i, record in enumerate(records)))
    return st.one_of(one, odd_bytes(lines_of(records)))


def test_results(tmp_path, monkeypatch):
    monkeypatch.setattr(results, 'OUT', tmp_path / 'results')
    facts = {'task': 'T', 'protocol': 'p', 'first': 0, 'name': 'lambada-paper',
             'data': {'sha256': '0', 'path': 'x', 'official': True},
             'model': {'name': 'gpt2', 'folder': 'x', 'sha256': 'abc', 'dtype': 'float32'}}
    good = {**facts, 'measures': {
        'accuracy': {**results.accuracy([True, False] * 8, 'x'), 'published': [(31.0, 'y')]},
        'perplexity': results.per_unit([2.0, 3.0, 4.5], [1, 2, 1], 'word')}}
    results.write(tmp_path / 'a.json', good)
    path = tmp_path / 'results/gpt2/lambada-paper.json'
    path.parent.mkdir(parents=True)
    (tmp_path / 'run').mkdir()

    def use(raw):
        path.write_bytes(raw)
        for pair in ((tmp_path / 'a.json', path), (path, tmp_path / 'a.json')):
            attempt('results: compare', lambda: results.compare(pair))
        attempt('results: table', lambda: eval_lm.table('gpt2'))
        attempt('results: page', lambda: report.evaluations(Path('x')))

    fuzz(odd(good), use)


# Model folders.

def test_model_folders(tmp_path):
    """A folder is refused, or its model computes what is finite, and its tokenizer encodes."""
    import torch
    from gpt import checkpoints
    from gpt.weights import to_hugging_face
    from model import GPT, GPTConfig
    from safetensors.torch import save_file
    torch.manual_seed(0)
    encoding = tokenizer.train_byte_pairs(['the fox and the hen ran to the old house'] * 9, 270)
    model = GPT(GPTConfig(16, encoding.n_vocab, 2, 2, 16))
    good = checkpoints.save(tmp_path, 1, model, encoding, {})
    tensors = to_hugging_face(model)
    sharded = shutil.copytree(good, tmp_path / 'sharded')
    for name in ('model.safetensors', 'manifest.json'):
        (sharded / name).unlink()
    halves = {'a.safetensors': list(tensors)[::2], 'b.safetensors': list(tensors)[1::2]}
    for name, keys in halves.items():
        save_file({key: tensors[key] for key in keys}, sharded / name)
    index = {'metadata': {}, 'weight_map': {key: name for name, keys in halves.items()
                                            for key in keys}}
    (sharded / 'model.safetensors.index.json').write_text(json.dumps(index))
    plain = shutil.copytree(good, tmp_path / 'plain')
    (plain / 'manifest.json').unlink()
    header = (good / 'model.safetensors').read_bytes()
    examples = [st.tuples(st.just(sharded), st.just('model.safetensors.index.json'), odd(index)),
                st.tuples(st.just(plain), st.just('model.safetensors'), odd_bytes(header))]
    for name in ('config.json', 'tokenizer.json', 'tokenizer_config.json', 'manifest.json'):
        folder = good if name == 'manifest.json' else plain
        value = json.loads((good / name).read_text())
        examples.append(st.tuples(st.just(folder), st.just(name), odd(value)))

    def use(example):
        folder, name, raw = example
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(raw)
        found = attempt(f'model: {name}', lambda: checkpoints.load_model(folder))
        (folder / name).write_bytes(before)
        if found:
            ids = tokenizer.encode(found.encoding, 'the fox') % found.model.config.vocab_size
            ids = torch.from_numpy(ids.astype('int64'))[None, :found.model.config.block_size]
            assert not ids.numel() or found.model(ids).isfinite().all()

    fuzz(st.one_of(*examples), use)


# Benchmarks.

ROW = {'ctx': 'A man sits. he', 'ctx_a': 'A man sits.', 'ctx_b': 'he', 'label': 2, 'ind': 3,
       'activity_label': 'Sitting', 'source_id': 'wikihow~1', 'split_type': 'zeroshot',
       'endings': ['a b.', 'c d.', 'e.', 'f g.']}
CBT = '\n'.join([*(f'{i} Sentence {i} .' for i in range(1, 21)),
                 '21 The XXXXX ran .\tdog\t\tfox|hen|dog|cat|cow|ant|bee|elk|owl|pig', '', '']) * 2
BYTES = tokenizer.byte_pairs('bytes', [])


def test_benchmarks(tmp_path):
    path = tmp_path / 'a'

    def use(example):
        name, raw = example
        path.write_bytes(raw)
        if name == 'hellaswag':
            read = attempt(name, lambda: benchmarks.hellaswag(path))
            for row in read[0] if read else ():
                for protocol in hellaswag.PROTOCOLS:
                    attempt(f'{name}: render', lambda: hellaswag.render(row, BYTES, protocol))
        elif name == 'cbt':
            read = attempt(name, lambda: benchmarks.cbt('CN', 'valid', path))
            for question in read[0] if read else ():
                for text in ('detok', 'raw'):
                    eval_cbt.render(question, BYTES, text)
        else:
            read = attempt(name, lambda: benchmarks.lambada(path))
            for text in read[0] if read else ():
                for protocol in ('paper', 'harness', 'last-token'):
                    eval_lm.last_word(text, BYTES, protocol)
        if name != 'lambada':
            attempt(f'{name}: explore', lambda: explore.read_set(f'{name}={path}'))
        cfg = eval_lm.Config(file=str(path), task='file', protocol='text')
        attempt('file', lambda: eval_lm.read_data(cfg))

    fuzz(st.one_of(st.tuples(st.just('hellaswag'), odd_lines([ROW] * 2)),
                   st.tuples(st.just('lambada'), odd_lines([{'text': 'one two'}] * 2)),
                   st.tuples(st.just('cbt'), odd_bytes(CBT.encode()))), use)


# Settings.

SCRIPTS = {module.__name__: module for module in (train, sample, plot, hellaswag, eval_cbt,
                                                   eval_lm, prepare, explore)}
VALUES = ['', 'True', 'None', '-1', '0', '1', '2', '1e5', '1e300', '1e999', '-1e999', '2**63',
          '2**62', 'nan', '9**9**9**9', '"%*d" % (10**10, 5)', '-' * 5000 + '1', '(' * 300, '[1]',
          '1,2', 'x', '~/x', 'a\nb', '\udcff', '0.5', '1e-320', '-0.0', '\\n', '/', '.', '..',
          '/dev/zero', 'x' * 5000,
          '99**64*99**64', '1_0', '0x' + 'f' * 5000, '1j', '1/0', 'hub:', 'a:b', '$']


def test_config_files_and_flags(tmp_path):
    path = tmp_path / 'c.py'

    def use(example):
        name, raw, flags = example
        path.write_bytes(raw)
        module = SCRIPTS[name]
        cfg = attempt('config', lambda: gpt_settings.configure(
            module.Config, [str(path), *flags], getattr(module, 'SHORT', None),
            getattr(module, 'COLLECT', '')))
        if cfg:
            path.write_text(as_config_file(cfg, f'{flags}\nseed = 3'))
            assert vars(gpt_settings.configure(module.Config, [str(path)])) == vars(cfg)

    def of(module):
        names = one_from([field for field in module.Config.__dataclass_fields__])
        flag = st.tuples(names, one_from(VALUES)).map('='.join).map('--{}'.format)
        text = ''.join(f'{name} = {value!r}\n' for name, value in list(
            vars(module.Config()).items())[:6])
        return st.tuples(st.just(module.__name__), odd_bytes(text.encode()),
                         st.lists(flag, max_size=3))

    fuzz(st.one_of(*map(of, SCRIPTS.values())), use)


def test_flags_of_preparing_and_exploring(stories, tmp_path):
    """What the settings allow, the scripts do or refuse."""
    source = tmp_path / 'a.txt'
    source.write_text('A few words of text. ' * 20)
    shutil.copytree(stories / 'tiny', tmp_path / 'data/tiny')
    fixed = {prepare: [source, '--tokenizer=bytes', '--workers=1'], explore: ['tiny'],
             plot: [tmp_path / 'run']}
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/log.jsonl').write_bytes(lines_of(LOG))

    def use(example):
        name, flags = example
        module = SCRIPTS[name]
        out = {prepare: '--name=d'}.get(module, f'--out={tmp_path}/out/a.png')
        place = [] if module is plot else [f'--data_dir={tmp_path}/data']
        attempt(f'flags of {name}', lambda: command(module, *fixed[module], out, *flags, *place))

    def of(module, left_out):
        names = one_from([field for field in module.Config.__dataclass_fields__
                                 if field not in left_out])
        flag = st.tuples(names, one_from(VALUES)).map('='.join).map('--{}'.format)
        return st.tuples(st.just(module.__name__), st.lists(flag, min_size=1, max_size=2))

    fuzz(st.one_of(of(prepare, {'data_dir', 'dataset', 'workers', 'input'}),
                   of(explore, {'data_dir', 'contamination', 'out'}), of(plot, {'runs', 'out'})),
         use, EXAMPLES // 2)


def test_the_changes_are_many():
    """That the strategies reach what they are for."""
    found = []
    fuzz(odd({'a': [1, {'b': 'text'}], 'c': 2.0}), found.append, 200)
    assert len(set(found)) > 100
    assert any(b'\\ud800' in raw for raw in found) and any(b'null' in raw for raw in found)


if __name__ == '__main__':
    read_all_parquet(sys.argv[1])
