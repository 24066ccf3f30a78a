"""
What all tests share: no network, one thread per process, small data sets made when needed.

Tests marked `slow` (several processes, real runs) run with `make test-all`. Real text, where a
folder shared/data beside the repository (or TEST_DATA) has it, is used as an extra.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.update(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', WANDB_MODE='offline',
                  WANDB_SILENT='true', TOKENIZERS_PARALLELISM='false',
                  TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1')
REAL = Path(os.environ.get('TEST_DATA', ROOT.parent / 'shared' / 'data'))
if (REAL / 'tiktoken_cache').exists():
    os.environ.setdefault('TIKTOKEN_CACHE_DIR', str(REAL / 'tiktoken_cache'))

import pytest
import torch

torch.set_num_threads(1)
# a shell's background job ignores these, and so would all that is started here
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, lambda *_: None)

TINY = dict(dataset='tiny', n_layer=2, n_head=2, n_embd=32, block_size=16, batch_size=4,
            total_batch_size=16 * 16, max_iters=12, eval_interval=4, log_interval=1,
            save_minutes=0.0, warmup_iters=3, learning_rate=3e-3, dropout=0.1,
            device='cpu', dtype='float32', compile=False)


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='run the slow tests too')
    parser.addoption('--faults', action='store_true', help='run the slow tests and marathons too')


def pytest_configure(config):
    """How many random examples of each kind are tried: `make fuzz` sets more."""
    os.environ.setdefault('FUZZ', '600' if config.getoption('--slow') else '12')


def left_out(config):
    """{marker: the command that runs its tests} of the tests that are left out."""
    if config.getoption('--faults'):
        return {}
    if config.getoption('--slow'):
        return {'faults': 'make faults'}
    return {'slow': 'make test-all', 'faults': 'make faults'}


def pytest_terminal_summary(terminalreporter, config):
    for marker, command in left_out(config).items():
        terminalreporter.write_line(f'tests marked {marker} were left out: {command}')


def pytest_collection_modifyitems(config, items):
    out = [item for item in items if left_out(config).keys() & set(item.keywords)]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]


@pytest.fixture
def real():
    """A function from a path under shared/data to the real file there; without it the test is
    skipped."""
    def find(name):
        if not (REAL / name).exists():
            pytest.skip(f'no real text: {REAL / name} does not exist')
        return REAL / name
    return find


@pytest.fixture(scope='session')
def gpt2():
    """GPT-2's own Encoding; without its files, cached or downloadable, tests are skipped."""
    from gpt import tokenizer
    try:
        return tokenizer.gpt2()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope='session')
def stories(tmp_path_factory):
    """A data folder with the data set 'tiny': 40 short documents in bpe:300, made by prepare.py."""
    from data import prepare
    folder = tmp_path_factory.mktemp('data')
    names = ['the fox', 'a student', 'my neighbour', 'the old king', 'nobody']
    source = folder / 'tiny.jsonl'
    source.write_text('\n'.join(json.dumps({'text': ' '.join(
        f'{names[(i * j) % 5].capitalize()} counted {i * j % 17} apples and went home, '
        f'because it was late.'
        for j in range(1, 12))}) for i in range(40)))
    prepare.main(prepare.Config(input=(str(source),), tokenizer='bpe:300', val_fraction=0.2,
                                data_dir=str(folder)))
    return folder


@pytest.fixture
def config(stories, tmp_path):
    """A function from settings to the Config of a tiny run in tmp_path/run
    (12 updates of 256 tokens)."""
    from train import Config
    tiny = {**TINY, 'data_dir': str(stories), 'out_dir': str(tmp_path / 'run')}
    return lambda **changes: Config(**{**tiny, **changes})


@pytest.fixture
def two_sets(stories, tmp_path):
    """A data folder with 'tiny', 'other' (other documents in the same bpe:300) and 'bytes'."""
    from data import prepare
    shutil.copytree(stories / 'tiny', tmp_path / 'data/tiny')
    source = tmp_path / 'other.jsonl'
    texts = [f'{i} ducks swam over the lake; {i % 7} came back. ' * 9 for i in range(30)]
    source.write_text('\n'.join(json.dumps({'text': text}) for text in texts))
    make = dict(input=(str(source),), val_fraction=0.2, data_dir=str(tmp_path / 'data'))
    prepare.main(prepare.Config(tokenizer=str(stories / 'tiny'), **make))
    prepare.main(prepare.Config(tokenizer='bytes', name='bytes', **make))
    return tmp_path / 'data'


def command_line(folder, stories, **changes):
    """The command of a tiny run, whose 12 updates pass the end of the epoch."""
    values = {**TINY, 'data_dir': stories, 'out_dir': folder, 'total_batch_size': 64 * 16,
              **changes}
    return ['train.py', *(f'--{key}={value}' for key, value in values.items())]


@pytest.fixture
def flags(stories, tmp_path):
    """A function from the name of a folder and settings to the command line of a tiny run."""
    return lambda name, **changes: command_line(tmp_path / name, stories, **changes)


@pytest.fixture(scope='session')
def undisturbed(stories, tmp_path_factory):
    """A function from settings to the folder of a tiny run without any fault, made once."""
    folder, made, number = tmp_path_factory.mktemp('undisturbed'), {}, count()

    def run(world=0, **changes):
        key = world, *sorted(changes.items())
        if key not in made:
            place = folder / str(next(number))          # a new one after a failure too
            script(*command_line(place, stories, **changes), torchrun=world, timeout=1200)
            made[key] = place
        return made[key]

    return run


def script(*args, torchrun=0, check=True, **options):
    """Run a script of the repository as a user would; torchrun: on this many processes."""
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone',
                f'--nproc_per_node={torchrun}']
    done = subprocess.run([*(launcher if torchrun else [sys.executable]), *map(str, args)],
                          cwd=options.pop('cwd', ROOT), capture_output=True, text=True,
                          timeout=options.pop('timeout', 300), **options)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def command(module, *args):
    """main() of a script with these arguments, in this process: faster than script()."""
    from gpt.settings import configure
    return module.main(configure(module.Config, [*map(str, args)], getattr(module, 'SHORT', None),
                                 getattr(module, 'COLLECT', '')))


# What runs write.

def curve(folder):
    """{step: (loss, grad_norm, lr, val_loss)} of a log, floats to the last bit; of a step that is
    there twice the last record counts."""
    steps = {}
    for line in (folder / 'log.jsonl').read_text().splitlines():
        record = json.loads(line)
        steps.setdefault(record['step'], {}).update(record)
    return {step: tuple(float(record[key]).hex() if key in record else None
                        for key in ('loss', 'grad_norm', 'lr', 'val_loss'))
            for step, record in steps.items()}


def losses(folder, key='loss'):
    records = map(json.loads, (folder / 'log.jsonl').read_text().splitlines())
    return [record[key] for record in records if key in record]
