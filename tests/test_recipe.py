"""Changing the model: the recipe of docs/design.md, followed on a copy of the repository."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, losses, script

FIELD = "    bias: bool = True           # in Linear and LayerNorm, as GPT-2 has them\n"
SETTING = "bias = True                 # in Linear and LayerNorm, as GPT-2 has them\n"
EDITS = {       # file: [(before, after)]; a model setting is two places
    'model.py': [
        (FIELD, FIELD + "    embd_scale: float = 1.0     # factor of the embeddings\n"),
        ("self.drop(self.wte(ids) + self.wpe(positions))",
         "self.drop(self.config.embd_scale * (self.wte(ids) + self.wpe(positions)))")],
    'train.py': [
        (SETTING, SETTING + "embd_scale = 1.0            # factor of the embeddings\n")]}


@pytest.fixture(scope='module')
def changed(tmp_path_factory):
    """A copy of the program with one more setting of the model."""
    copy = tmp_path_factory.mktemp('changed')
    for path in (*ROOT.glob('*.py'), *ROOT.glob('gpt/**/*.py')):
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for name, edits in EDITS.items():
        text = (copy / name).read_text()
        for before, after in edits:
            assert text.count(before) == 1, f'{name}: {before}'
            text = text.replace(before, after)
        (copy / name).write_text(text)
    return copy


@pytest.fixture(scope='module')
def run(changed, stories, tmp_path_factory):
    """The folder of a run with the new setting, stopped once and resumed."""
    folder = tmp_path_factory.mktemp('scaled') / 'run'
    for max_iters in (4, 8):
        done = script(*command(folder, stories, max_iters, 4.0), cwd=changed)
    assert 'resuming from' in done.stdout
    return folder


def test_the_setting_changes_the_model(changed, run, stories, tmp_path):
    script(*command(tmp_path / 'run', stories, 4, 1.0), cwd=changed)
    assert losses(tmp_path / 'run')[0] != losses(run)[0]


def command(folder, stories, max_iters, embd_scale):
    values = {**TINY, 'data_dir': stories, 'out_dir': folder, 'max_iters': max_iters,
              'embd_scale': embd_scale}
    return ['train.py', *(f'--{key}={value}' for key, value in values.items())]


def test_checkpoints_keep_the_setting_without_knowing_it(changed, run):
    config = json.loads((run / 'step_0000008/config.json').read_text())
    assert config['gpt_config'] == {'embd_scale': 4.0}
    code = ('import sys; from gpt.checkpoints import load_model\n'
            'model, tokenizer = load_model(sys.argv[1])\n'
            'print(model.config.embd_scale)')
    done = subprocess.run([sys.executable, '-c', code, run], cwd=changed, capture_output=True,
                          text=True, check=True)
    assert done.stdout == '4.0\n'
    assert script('sample.py', f'--model={run}', '-p', 'The', '-m', '5', cwd=changed).stdout


def test_a_run_with_another_value_is_refused(changed, run, stories):
    done = script(*command(run, stories, 12, 1.0), cwd=changed, check=False)
    assert done.returncode == 2 and 'has embd_scale=4.0, given embd_scale=1.0' in done.stderr


def test_a_program_without_the_setting_refuses_the_model(run):
    done = script('sample.py', f'--model={run}', '-p', 'The', check=False)
    assert done.returncode == 2 and not done.stdout
    assert "embd_scale=4.0, a setting that model.py does not have" in done.stderr


def test_transformers_refuses_the_model(run):
    transformers = pytest.importorskip('transformers')
    with pytest.raises(ValueError, match='gpt2-variant'):
        transformers.AutoModelForCausalLM.from_pretrained(run / 'step_0000008')


def test_a_model_of_the_default_value_stays_a_gpt2(changed, stories, tmp_path):
    """Whatever settings were added, a plain GPT-2 opens in other programs."""
    transformers = pytest.importorskip('transformers')
    script(*command(tmp_path / 'run', stories, 1, 1.0), cwd=changed)
    folder = tmp_path / 'run/step_0000001'
    assert json.loads((folder / 'config.json').read_text())['model_type'] == 'gpt2'
    transformers.AutoModelForCausalLM.from_pretrained(folder)
