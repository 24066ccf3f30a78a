"""
Every command in the README and the walkthrough: parsed against the script's settings,
and run where no hub or GPU is needed.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from gpt.settings import configure

BLOCKS = [block for name in ('README.md', 'docs/walkthrough.md')
          for block in re.findall(r'```bash\n(.*?)```', (ROOT / name).read_text(), re.DOTALL)]
COMMANDS = [line.partition('  #')[0].strip()
            for block in BLOCKS for line in block.splitlines() if line.strip()]
HEADERS = [line[2:].partition('   #')[0] for path in sorted(ROOT.glob('config/*.py'))
           for line in path.read_text().splitlines() if re.match(r'# (python|torchrun) ', line)]
NEEDS_A_HUB = ('--dataset=shakespeare', 'gpt2', 'shakespeare_char', 'out/finetune', 'fineweb',
               'openwebtext', 'hub:', '--contamination', '--compare', '--minutes',
               'plot.py out/notes')                             # or GPUs, results, half an hour


def script_and_arguments(command):
    words = shlex.split(command)
    at = next((i for i, word in enumerate(words) if word.endswith('.py')), None)
    return (None, []) if at is None else (words[at], words[at + 1:])


@pytest.mark.parametrize('command', [*COMMANDS, *HEADERS])
def test_a_command_parses(command, monkeypatch):
    name, arguments = script_and_arguments(command)
    if name is None:
        assert re.match(r'git clone|make (quickstart|test|bench|table3)|python3 -m venv|'
                        r'pip install -r requirements.txt', command), command
        return
    module = __import__(name[:-3].replace('/', '.'), fromlist=['Config'])
    monkeypatch.chdir(ROOT)
    configure(module.Config, arguments, getattr(module, 'SHORT', None),
              getattr(module, 'COLLECT', ''))


def test_the_make_targets_exist():
    text = (ROOT / 'Makefile').read_text()
    for target in ('quickstart', 'test', 'test-all', 'faults', 'bench', 'table3'):
        assert re.search(rf'^{target}:', text, re.MULTILINE)


def test_the_faults_in_the_documents_have_tests():
    text = (ROOT / 'docs/reliability.md').read_text().partition('## Faults')[2]
    named = [name for line in text.splitlines() if line.startswith('|')
             for name in re.findall('`([a-z0-9_]{12,})`', line.split('|')[3])]
    tests = ''.join(path.read_text() for path in ROOT.glob('tests/test_*.py'))
    assert len(named) > 50 and not [name for name in named if f'def test_{name}(' not in tests]


@pytest.mark.parametrize('name, title', [('README.md', '## The tree'),
                                         ('README_zh.md', '## 目录结构')])
def test_the_tree_names_every_file(name, title):
    tree = (ROOT / name).read_text().partition(title)[2].split('```')[1]
    named = set(re.findall(r'^([\w/.]+)', tree, re.MULTILINE))
    files = {str(path.relative_to(ROOT)) for pattern in ('*.py', 'data/*.py', 'gpt/**/*.py')
             for path in ROOT.glob(pattern) if path.name != '__init__.py'}
    assert not files - named
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_reading_order_names_files():
    section = (ROOT / 'README.md').read_text().partition('## Read the code')[2]
    names = re.findall(r'^\d\. `([\w/.]+)`', section, re.MULTILINE)
    assert len(names) == 9 and all((ROOT / name).exists() for name in names)


def test_the_constraints_fit_the_requirements():
    """Every package that is required has a tested version."""
    names = {re.match(r'[\w.-]+', line)[0].lower() for file in ROOT.glob('requirements*.txt')
             for line in file.read_text().splitlines() if line and not line.startswith('-')}
    tested = dict(re.findall(r'^([\w.-]+)==(\S+)$', (ROOT / 'constraints.txt').read_text().lower(),
                             re.MULTILINE))
    assert len(names) > 15 and not names - set(tested)
    assert f"torch=={tested['torch']}" in (ROOT / 'requirements.txt').read_text()


@pytest.mark.slow
def test_the_commands_run_one_after_another(tmp_path):
    """In a fresh copy, as a newcomer types them; training is cut to three short updates,
    else nothing is changed."""
    files = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True,
                           check=True).stdout.split()
    for name in files:
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'notes/a.md').write_text(
        'A note about nothing much, and then a little more of it.\n' * 40)
    (tmp_path / 'book.txt').write_text(
        'Once there was a book, which was short and had no end.\n' * 200)
    (tmp_path / 'chats.jsonl').write_text('{"text": "Hello there, how are you today?"}\n' * 30)
    pyarrow = pytest.importorskip('pyarrow')
    (tmp_path / 'dumps').mkdir()
    with pyarrow.CompressedOutputStream(str(tmp_path / 'dumps/a.jsonl.zst'), 'zstd') as file:
        file.write(''.join(f'{{"text": "Page {i}."}}\n' for i in range(40)).encode())
    run = 0
    for command in COMMANDS:
        name, arguments = script_and_arguments(command)
        if name is None or any(word in command for word in NEEDS_A_HUB):
            continue
        extra = (['--max_iters=3', '--eval_interval=3', '--eval_tokens=4096', '--compile=False']
                 if name == 'train.py' else [])
        # the default tokenizer is downloaded
        extra += ['--tokenizer=bpe:300'] if re.search('--name=(mine|notes|web)', command) else []
        launcher = (['-m', 'torch.distributed.run', *shlex.split(command)[1:3]]
                    if command.startswith('torchrun') else [])
        done = subprocess.run([sys.executable, *launcher, name, *arguments, *extra], cwd=tmp_path,
                              text=True, capture_output=True, timeout=300,
                              env={**os.environ, 'HF_HUB_OFFLINE': '1'})
        assert done.returncode == 0, f'{command}\n{done.stdout}{done.stderr}'
        run += 1
    assert run >= 8
