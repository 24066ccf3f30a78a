"""
A data set, a run and a result of the first edition (flat modules, before gpt/), in
tests/first_edition: the present program resumes, verifies and compares them.

They were made by prepare.py and train.py with these settings, the run in 8 updates; `expected`
holds the log of a run of 12.
"""

import json
import shutil

import pytest
from conftest import ROOT, script

FIXTURE = ROOT / 'tests/first_edition'
RUN = ['--dataset=tiny', '--data_dir=data', '--out_dir=run', '--n_layer=2', '--n_head=2',
       '--n_embd=16', '--block_size=16', '--batch_size=4', '--total_batch_size=256',
       '--eval_interval=4', '--log_interval=1', '--save_minutes=0', '--warmup_iters=3',
       '--learning_rate=3e-3', '--dropout=0.1', '--device=cpu', '--dtype=float32',
       '--compile=False', '--batch_warmup_iters=4', '--lr_decay_iters=12', '--keep=1',
       '--optimizer=muon', '--max_iters=12']


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(FIXTURE, tmp_path / 'work')
    return tmp_path / 'work'


def test_the_data_set_is_intact_and_not_prepared_again(folder):
    prepare = ROOT / 'data/prepare.py'
    before = {path: path.stat().st_mtime_ns for path in (folder / 'data/tiny').iterdir()}
    script(prepare, '--data_dir=data', '--verify=tiny', cwd=folder)
    script(prepare, '--data_dir=data', '--tokenizer=bpe:300', '--val_fraction=0.2', 'tiny.jsonl',
           cwd=folder)
    assert before == {path: path.stat().st_mtime_ns for path in (folder / 'data/tiny').iterdir()}


def test_the_run_resumes(folder):
    """Its losses are those of the first edition, up to the rounding of other processors."""
    done = script(ROOT / 'train.py', *RUN, cwd=folder)
    assert 'resuming from run/step_0000008' in done.stdout and 'changed: max_iters' in done.stdout
    steps = {}
    for line in (folder / 'run/log.jsonl').read_text().splitlines():
        record = json.loads(line)
        steps.setdefault(record['step'], {}).update(record)
    for line in (folder / 'expected.jsonl').read_text().splitlines():
        expected = json.loads(line)
        found = {key: steps[expected['step']][key] for key in expected}
        assert found == pytest.approx(expected, rel=1e-4)


def test_the_result_compares_with_a_new_one(folder):
    script(ROOT / 'eval_lm.py', '--model=run', '--file=tiny.jsonl', '--out=new.json',
           '--device=cpu', cwd=folder)
    before, after = (json.loads((folder / name).read_text()) for name in ('file.json', 'new.json'))
    assert set(before) <= set(after) and set(before['measures']) == set(after['measures'])
    for name, measure in before['measures'].items():
        assert measure['value'] == pytest.approx(after['measures'][name]['value'], rel=1e-4)
    done = script(ROOT / 'eval_lm.py', '--compare=file.json,new.json', cwd=folder)
    assert 'within noise' in done.stdout


def test_the_curves_are_drawn(folder):
    script(ROOT / 'plot.py', 'run', '--report', cwd=folder)
    assert 'muon' in (folder / 'run/report.html').read_text()
