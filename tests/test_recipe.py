"""Changing the model: the recipe of docs/design.md, followed on a copy of the repository."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, script

EDITS = {       # file: [(before, after)]; a model setting is two places
    'model.py': [
        ("    bias: bool = True           # in Linear and LayerNorm, as GPT-2 has them\n",
         "    bias: bool = True           # in Linear and LayerNorm, as GPT-2 has them\n"
         "    activation: str = 'gelu'    # of the MLP; or 'relu'\n"),
        ("        self.dropout = nn.Dropout(config.dropout)\n\n    def forward(self, x):\n"
         "        return self.dropout(self.c_proj(gelu(self.c_fc(x))))",
         "        self.dropout = nn.Dropout(config.dropout)\n"
         "        self.activation = {'gelu': gelu, 'relu': F.relu}[config.activation]\n\n"
         "    def forward(self, x):\n"
         "        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))")],
    'train.py': [
        ("bias = True                 # in Linear and LayerNorm, as GPT-2 has them\n",
         "bias = True                 # in Linear and LayerNorm, as GPT-2 has them\n"
         "activation = 'gelu'         # of the MLP; or 'relu'\n")]}


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
    folder = tmp_path_factory.mktemp('relu') / 'run'
    for max_iters in (4, 8):
        done = script(*command(folder, stories, max_iters, 'relu'), cwd=changed)
    assert 'resuming from' in done.stdout
    return folder


def command(folder, stories, max_iters, activation):
    values = {**TINY, 'data_dir': stories, 'out_dir': folder, 'max_iters': max_iters,
              'activation': activation}
    return ['train.py', *(f'--{key}={value}' for key, value in values.items())]


def test_checkpoints_keep_the_setting_without_knowing_it(changed, run):
    config = json.loads((run / 'step_0000008/config.json').read_text())
    assert config['gpt_config'] == {'activation': 'relu'}
    code = ('import sys; from gpt.checkpoints import load_model\n'
            'model, tokenizer = load_model(sys.argv[1])\n'
            'print(model.config.activation, model.h[0].mlp.activation.__name__)')
    done = subprocess.run([sys.executable, '-c', code, run], cwd=changed, capture_output=True,
                          text=True, check=True)
    assert done.stdout == 'relu relu\n'
    assert script('sample.py', f'--model={run}', '-p', 'The', '-m', '5', cwd=changed).stdout


def test_a_run_with_another_value_is_refused(changed, run, stories):
    done = script(*command(run, stories, 12, 'gelu'), cwd=changed, check=False)
    assert done.returncode == 2 and 'has activation=relu, given activation=gelu' in done.stderr


def test_a_program_without_the_setting_refuses_the_model(run):
    done = script('sample.py', f'--model={run}', '-p', 'The', check=False)
    assert done.returncode == 2 and not done.stdout
    assert "activation='relu', a setting that model.py does not have" in done.stderr


def test_transformers_refuses_the_model(run):
    transformers = pytest.importorskip('transformers')
    with pytest.raises(ValueError, match='gpt2-variant'):
        transformers.AutoModelForCausalLM.from_pretrained(run / 'step_0000008')


def test_a_model_of_the_default_value_stays_a_gpt2(changed, stories, tmp_path):
    """Whatever settings were added, a plain GPT-2 opens in other programs."""
    transformers = pytest.importorskip('transformers')
    script(*command(tmp_path / 'run', stories, 1, 'gelu'), cwd=changed)
    folder = tmp_path / 'run/step_0000001'
    assert json.loads((folder / 'config.json').read_text())['model_type'] == 'gpt2'
    transformers.AutoModelForCausalLM.from_pretrained(folder)
