"""
play.ipynb: what is committed was run, is small and reveals nothing about the machine it ran on. It
runs in a copy of the repository without a network, and leaves no files.
"""

import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / 'play.ipynb'
TEXT = NOTEBOOK.read_text(encoding='utf-8')
CELLS = json.loads(TEXT)['cells']
CODE = [cell for cell in CELLS if cell['cell_type'] == 'code']


def test_it_was_run_from_top_to_bottom_without_an_error():
    assert [cell['execution_count'] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell['outputs']]
    assert not [output for output in outputs if output['output_type'] == 'error']
    assert not [output['text'] for output in outputs if output.get('name') == 'stderr']


def test_it_is_small_and_reveals_no_machine():
    assert len(TEXT.encode()) < 300_000
    assert not re.search(r'/(work|home|root|Users)/|site-packages|/tmp/(?!play\b)', TEXT)
    assert not [cell for cell in CELLS if 'execution' in cell['metadata']]     # when it was run
    assert json.loads(TEXT)['metadata']['kernelspec']['name'] == 'python3'


def test_the_first_code_cell_is_for_colab():
    first = ''.join(CODE[0]['source'])
    assert re.match(r"REPOSITORY = '", first) and 'git' in first and 'pip' in first
    wanted = dict(re.findall(r"'(\w+)[>=]+([\d.]+)'", first))
    ours = dict(re.findall(r'^(\w+)[>=]+([\d.]+)$', (ROOT / 'requirements.txt').read_text(), re.M))
    assert wanted.pop('torch') and wanted.items() <= ours.items()


def test_each_code_cell_is_explained():
    for before, cell in zip([{}, *CELLS], CELLS):
        if cell['cell_type'] == 'code':
            assert before['cell_type'] == 'markdown' and len(''.join(before['source'])) > 100


def test_links_lead_somewhere():
    for cell in CELLS:
        if cell['cell_type'] == 'markdown':
            for target in re.findall(r'\]\(([^)\s#:]+)\)', ''.join(cell['source'])):
                assert (ROOT / target).exists(), target


@pytest.mark.slow
def test_it_runs_without_a_network_and_leaves_no_files(tmp_path):
    pytest.importorskip('nbclient')
    pytest.importorskip('ipykernel')
    known = subprocess.run(['git', 'ls-files', '--cached', '--others', '--exclude-standard'],
                           cwd=ROOT, capture_output=True, text=True, check=True).stdout.split('\n')
    for name in known:
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    book = tmp_path / 'play.ipynb'                      # the same cells, computing less
    book.write_text(TEXT.replace('max_iters=100, warmup_iters=10', 'max_iters=20, warmup_iters=2')
                    .replace('model.generate(ids, 50', 'model.generate(ids, 5')
                    .replace('stride=128', 'stride=256').replace('limit=20', 'limit=2'))
    before = files(tmp_path)
    program = ('import sys; sys.path.insert(0, "docs"); import refresh; '
               'refresh.notebook(refresh.ROOT / "play.ipynb")')     # raises where a cell fails
    done = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, capture_output=True,
                          text=True, timeout=900)                   # conftest: HF_HUB_OFFLINE
    assert done.returncode == 0, done.stderr
    assert files(tmp_path) == before
    cells = json.loads(book.read_text(encoding='utf-8'))['cells']
    assert all(cell.get('outputs') for cell in cells if cell['cell_type'] == 'code')


def files(folder):
    return {path for path in folder.rglob('*')
            if path.is_file() and '__pycache__' not in path.parts}
