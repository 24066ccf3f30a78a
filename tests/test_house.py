"""The rules of the house, read off the sources: floors, purity, and what is never written."""

import ast
import builtins
import re
import subprocess
import sys

import pytest
from conftest import ROOT

GROUND = {'model': set(), 'muon': set(), 'configurator': set(), 'tokenizer': set(),
          'distributed': set(), 'data.fetch': set()}
MIDDLE = {'journal': set(), 'optimizers': {'muon'}, 'replicas': {'distributed'},
          'validation': {'distributed', 'replicas'},
          'checkpoints': {'model', 'tokenizer', 'distributed', 'replicas', 'data.fetch'},
          'data.shards': set(),
          'likelihood': {'distributed'}, 'results': set(), 'data.benchmarks': {'data.fetch'},
          'data.documents': set(), 'data.sources': {'data.documents', 'data.fetch'},
          'data.batches': {'tokenizer', 'data.shards'}, 'data.overlap': set(),
          'data.tokens': {'tokenizer', 'data.documents'}}
MIDDLE['planning'] = {'checkpoints', 'distributed', 'model', 'optimizers', 'validation',
                      'data.batches'}
MIDDLE['starting'] = {'checkpoints', 'configurator', 'distributed', 'model', 'planning',
                      'tokenizer'}
MIDDLE |= {'curves': set(), 'report': {'curves', 'results', 'data.shards'}}
SCRIPTS = {name: {*GROUND, *MIDDLE}
           for name in ('train', 'sample', 'plot', 'publish', 'hellaswag', 'eval_cbt', 'eval_lm',
                        'bench', 'data.prepare', 'data.explore')}
SCRIPTS['train'] = {*SCRIPTS['train'], 'hellaswag'}     # the one door: the live curve, see below
SCRIPTS['bench'] = {*SCRIPTS['bench'], 'train', 'data.prepare'}         # it times what they do
HOUSE = {**GROUND, **MIDDLE, **SCRIPTS}
SOURCES = {name: ROOT / f"{name.replace('.', '/')}.py" for name in HOUSE}
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def test_every_program_file_is_in_the_house():
    paths = [*ROOT.glob('*.py'), *(ROOT / 'data').glob('*.py')]
    found = {str(path.relative_to(ROOT))[:-3].replace('/', '.') for path in paths}
    assert found - {'data.__init__'} == set(HOUSE)


@pytest.mark.parametrize('name', HOUSE)
def test_a_file_imports_only_from_floors_below(name):
    ours = {module for module in imports(TREES[name]) if module in HOUSE}
    assert ours <= HOUSE[name], f'{name} imports {ours - HOUSE[name]}'


def test_the_live_curve_is_imported_by_the_run_that_asks_for_it():
    top = {module for node in TREES['train'].body if isinstance(node, ast.Import | ast.ImportFrom)
           for module in imports(node)}
    assert 'hellaswag' not in top and 'hellaswag' in set(imports(TREES['train']))


@pytest.mark.parametrize('name', HOUSE)
def test_what_is_never_written(name):
    """No pickle, no executed text, no shell, no unsafe load."""
    tree = TREES[name]
    assert not {'pickle', 'marshal', 'shelve', 'runpy', 'importlib'} & set(imports(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            forbidden = ('eval', 'exec', 'builtins.eval', 'os.system', '__import__')
            assert called not in forbidden, f'{name}:{node.lineno}'
            arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert (arguments.get('weights_only', 'True') == 'True'
                    and arguments.get('shell', 'False') == 'False')
            assert 'trust_remote_code' not in arguments
            assert called != 'torch.load' or arguments['weights_only'] == 'True'


@pytest.mark.parametrize('name', HOUSE)
def test_one_owner_for_each_duty(name):
    text = SOURCES[name].read_text()
    for words, owner in ((r'torch\.(load|save)\(|safe_open|save_file', 'checkpoints'),
                         (r'20240520', 'data.shards'), (r'sys\.argv', 'configurator'),
                         (r'os\.environ', ('distributed', 'configurator'))):
        assert name in owner or not re.search(words, text), f'{words} belongs to {owner}'


def test_model_is_pure():
    """No file, environment, setting, print, optimizer, tokenizer or process in model.py."""
    assert set(imports(TREES['model'])) <= {
        'math', 'contextlib', 'contextlib.contextmanager',
        'dataclasses', 'dataclasses.dataclass', 'dataclasses.replace',
        'torch', 'torch.nn', 'torch.nn.functional', 'torch.utils.checkpoint',
        'torch.utils.checkpoint.checkpoint'}
    names = {node.id for node in ast.walk(TREES['model']) if isinstance(node, ast.Name)}
    assert not names & {'print', 'open', 'input'}


@pytest.mark.parametrize('name', SCRIPTS)
def test_settings_are_read_from_cfg_alone(name):
    """A bare setting name inside a function would be Python's own `compile` or `input`,
    or a NameError."""
    module = __import__(name, fromlist=['Config'])
    settings = set(module.Config.__dataclass_fields__)
    imported = {alias.asname or alias.name for node in TREES[name].body
                if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
    for function in (node for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef)):
        arguments = function.args
        known = {argument.arg for argument in [*arguments.args, *arguments.kwonlyargs]}
        nodes = list(ast.walk(function))
        known |= {node.id for node in nodes
                  if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        known |= {argument.arg for node in nodes if isinstance(node, ast.Lambda | ast.FunctionDef)
                  for argument in node.args.args}
        used = {node.id for node in nodes
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        outer = {node.id for other in ast.walk(TREES[name])
                 if isinstance(other, ast.FunctionDef) and function in ast.walk(other)
                 for node in ast.walk(other)
                 if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        assert not (used & settings) - known - outer - imported, f'{name}.{function.name}'


@pytest.mark.parametrize('name', SCRIPTS)
def test_defaults_are_literals_with_a_reason(name):
    """Every setting of the header is a literal, so that --help asks no GPU anything."""
    for node in TREES[name].body:
        if isinstance(node, ast.Assign) and node.targets[0].id == 'Config':
            return
        if isinstance(node, ast.Assign):
            ast.literal_eval(node.value)
    raise AssertionError('no Config')


def test_no_file_bears_the_name_of_a_standard_module():
    """data/ and the root come first on the path of a script that runs there."""
    assert not {path.stem for path in SOURCES.values()} & set(sys.stdlib_module_names)
    assert not {path.stem for path in SOURCES.values()} & set(dir(builtins))


def test_importing_does_no_work():
    """No tokenizer, hub, CUDA or plotting library is loaded by importing the scripts;
    nothing is printed."""
    code = ('import sys, train, sample, plot, publish, hellaswag, eval_cbt, eval_lm, bench\n'
            'import data.prepare, data.explore, torch\n'
            "print([m for m in ('transformers', 'matplotlib.pyplot', 'wandb', 'datasets', "
            "'huggingface_hub', 'pyarrow') if m in sys.modules], torch.cuda.is_initialized())")
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    assert done.stdout == '[] False\n' and not done.stderr


@pytest.mark.parametrize('path', [*SOURCES.values(), *ROOT.glob('config/*.py'),
                                  *ROOT.glob('tests/*.py')], ids=lambda path: path.name)
def test_lines_fit(path):
    lines = path.read_text().splitlines()
    long = [f'{path.name}:{i}' for i, line in enumerate(lines, 1) if len(line) > 100]
    assert not long
