"""
What all tests share: no network, one thread per process, small data sets made on the spot.

Tests marked `slow` (several processes, real runs) run with `make test-all`. Real text, where a
folder shared/data beside the repository (or TEST_DATA) has it, is used as an extra.
"""

import os
import subprocess
import sys
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


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='run the slow tests too')
    parser.addoption('--faults', action='store_true', help='run the slow tests and marathons too')


def pytest_collection_modifyitems(config, items):
    faults = config.getoption('--faults')
    for item in items:
        if 'slow' in item.keywords and not (faults or config.getoption('--slow')):
            item.add_marker(pytest.mark.skip(reason='slow: make test-all runs it'))
        if 'faults' in item.keywords and not faults:
            item.add_marker(pytest.mark.skip(reason='a marathon: make faults runs it'))


@pytest.fixture
def real():
    """A function from a path under shared/data to the real file there;
    the test is skipped without it."""
    def find(name):
        if not (REAL / name).exists():
            pytest.skip(f'no real text: {REAL / name} is not there')
        return REAL / name
    return find


@pytest.fixture(scope='session')
def gpt2():
    """GPT-2's own Encoding; tests are skipped where its files are neither cached nor to be had."""
    import tokenizer
    try:
        return tokenizer.gpt2()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope='session')
def stories(tmp_path_factory):
    """A data folder holding the data set 'tiny': 40 short documents in bpe:300,
    prepared by prepare.py."""
    from data import prepare
    folder = tmp_path_factory.mktemp('data')
    source = folder / 'source.txt'
    names = ['the fox', 'a student', 'my neighbour', 'the old king', 'nobody']
    source = folder / 'tiny.jsonl'
    import json
    source.write_text('\n'.join(json.dumps({'text': ' '.join(
        f'{names[(i * j) % 5].capitalize()} counted {i * j % 17} apples and went home, '
        f'because it was late.'
        for j in range(1, 12))}) for i in range(40)))
    prepare.main(prepare.Config(input=(str(source),), tokenizer='bpe:300', val_fraction=0.2,
                                data_dir=str(folder)))
    return folder


def script(*args, torchrun=0, check=True, **options):
    """Run a script of the repository as a user would; torchrun: on so many processes."""
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone',
                f'--nproc_per_node={torchrun}']
    done = subprocess.run([*(launcher if torchrun else [sys.executable]), *map(str, args)],
                          cwd=options.pop('cwd', ROOT), capture_output=True, text=True,
                          timeout=options.pop('timeout', 300), **options)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def command(module, *args):
    """main() of a script with these arguments, in this process: faster than script()."""
    from configurator import configure
    return module.main(configure(module.Config, [*map(str, args)], getattr(module, 'SHORT', None),
                                 getattr(module, 'COLLECT', '')))
