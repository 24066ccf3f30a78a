"""The rules of the house, read from the sources: floors, owners, and what is never written."""

import ast
import builtins
import re
import subprocess
import sys

import pytest
from conftest import ROOT

FLOORS = [                  # each module imports only from those before it
    'model',
    # what imports no torch, and so serves the preparation of text
    'gpt.shapes', 'gpt.files', 'gpt.script', 'gpt.config_file', 'gpt.settings', 'gpt.hub',
    'gpt.hf_tokenizer', 'gpt.tokenizer', 'gpt.curves',
    'gpt.data.documents', 'gpt.data.overlap', 'gpt.data.sources', 'gpt.data.encode',
    'gpt.data.shards',
    'gpt.data.benchmarks', 'gpt.data.order', 'gpt.data.sets',
    # one device, several processes, a model on them
    'gpt.cpu', 'gpt.device', 'gpt.world', 'gpt.sharding', 'gpt.kernels', 'gpt.generate',
    'gpt.weights', 'gpt.steps',
    'gpt.model_config', 'gpt.checkpoints', 'gpt.scoring',
    # training
    'gpt.optim', 'gpt.trainer', 'gpt.validation', 'gpt.progress', 'gpt.log', 'gpt.budget',
    'gpt.stop_signal', 'gpt.start', 'gpt.run', 'gpt.preflight',
    # results
    'gpt.results', 'gpt.report']
SCRIPTS = ['train', 'sample', 'plot', 'publish', 'hellaswag', 'eval_cbt', 'eval_lm', 'bench',
           'data.prepare', 'data.explore']
FROM_SCRIPTS = {'train': {'hellaswag'}, 'bench': {'data.prepare'}}      # which it times
HOUSE = [*FLOORS, *SCRIPTS]
SOURCES = {name: ROOT / f"{name.replace('.', '/')}.py" for name in HOUSE}
TREES = {name: ast.parse(path.read_text(encoding='utf-8')) for name, path in SOURCES.items()}
WHOLE_CONFIG = {'gpt.start', 'gpt.run', 'gpt.budget', 'gpt.preflight'}    # of a whole run


def imports(*nodes):
    """What these nodes import, as module names and as names in modules."""
    for node in (node for tree in nodes for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def at_module_level(tree):
    """The imports that run when a module is imported."""
    return imports(*(node for node in tree.body
                     if not isinstance(node, ast.FunctionDef | ast.ClassDef)))


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def parameters(function):
    """Its parameters, without self and cls."""
    a = function.args
    both = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return both[both[0].arg in ('self', 'cls'):] if both else []


# Floors.

@pytest.mark.parametrize('name', SCRIPTS)
def test_scripts_import_what_takes_long_after_their_settings(name):
    """So that --help and Ctrl-C do not wait for it."""
    body = TREES[name].body
    end = next(i for i, node in enumerate(body) if ast.unparse(node).startswith('Config ='))
    modules = {node.module for node in body[:end] if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in body[:end] if isinstance(node, ast.Import)
                for alias in node.names}
    assert {module for module in modules if module.partition('.')[0] not in
            sys.stdlib_module_names} == {'gpt.settings'}


def test_every_program_file_is_in_the_house():
    paths = (path for folder in ('', 'gpt', 'gpt/data', 'data')
             for path in (ROOT / folder).glob('*.py'))
    found = {str(path.relative_to(ROOT))[:-3].replace('/', '.') for path in paths}
    assert {name for name in found if not name.endswith('__init__')} == set(HOUSE)


@pytest.mark.parametrize('path', ['gpt/__init__.py', 'gpt/data/__init__.py'])
def test_packages_are_empty(path):
    assert not (ROOT / path).read_text()


@pytest.mark.parametrize('name', HOUSE)
def test_a_file_imports_only_from_floors_below(name):
    below = set(FLOORS[:FLOORS.index(name)] if name in FLOORS else FLOORS)
    below |= FROM_SCRIPTS.get(name, set()) | ({'gpt.generate'} if name == 'model' else set())
    ours = {module for module in imports(TREES[name]) if module in HOUSE}
    assert ours <= below, f'{name} imports {ours - below}'


def test_hellaswag_is_imported_only_by_a_run_that_asks_for_it():
    assert 'hellaswag' not in set(at_module_level(TREES['train']))
    assert 'hellaswag' in set(imports(TREES['train']))


def test_model_is_pure():
    """No file, environment, setting, print, optimizer, tokenizer or process in model.py; of ours
    only gpt.generate, inside generate()."""
    generate = next(f for f in functions(TREES['model']) if f.name == 'generate')
    inside = {'gpt.generate', 'gpt.generate.stream'}
    assert set(imports(generate)) == inside
    assert set(imports(TREES['model'])) - inside <= {
        'math', 'dataclasses', 'dataclasses.dataclass', 'dataclasses.replace',
        'torch', 'torch.nn', 'torch.nn.functional', 'torch.utils.checkpoint',
        'torch.utils.checkpoint.checkpoint'}
    assert not inside & set(at_module_level(TREES['model']))
    names = {node.id for node in ast.walk(TREES['model']) if isinstance(node, ast.Name)}
    assert not names & {'print', 'open', 'input'}


def reached(name, found=None):
    """The modules of ours that are imported with `name`, itself included."""
    found = found if found is not None else set()
    if name not in found:
        found.add(name)
        for other in at_module_level(TREES[name]):
            if other in HOUSE:
                reached(other, found)
    return found


def test_preparing_text_imports_no_torch():
    """Nor does what it imports, at any depth."""
    modules = reached('data.prepare')
    assert {'gpt.files', 'gpt.settings', 'gpt.data.shards'} < modules
    for module in modules:
        for imported in at_module_level(TREES[module]):
            top = imported.partition('.')[0]
            assert top not in ('torch', 'safetensors', 'transformers', 'model'), (
                f'{module} imports {imported}')
    assert 'torch' in set(at_module_level(TREES['gpt.world'])), 'this test could not fail'


@pytest.mark.parametrize('name', [name for name in FLOORS if name != 'gpt.settings'])
def test_settings_of_a_run_are_read_by_train_alone(name):
    """The rooms of train.py take values or small dataclasses, except those that need all of a
    Config. (gpt.results is the room of the evaluations, which have a Config of their own.)"""
    names = {node.id for node in ast.walk(TREES[name]) if isinstance(node, ast.Name)}
    names |= {p.arg for function in functions(TREES[name]) for p in parameters(function)}
    assert ('cfg' in names) == (name in WHOLE_CONFIG | {'gpt.results'})


# What is never written, and who writes what.

@pytest.mark.parametrize('name', HOUSE)
def test_what_is_never_written(name):
    """No pickle, no executed text, no shell, no unsafe load. bench.py runs the model.py of a peer,
    if a user names its folder."""
    tree, loads = TREES[name], 'importlib.util' if name != 'bench' else ''
    assert not {'pickle', 'marshal', 'shelve', 'runpy', 'importlib', loads} & set(imports(tree))
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


@pytest.mark.parametrize('pattern, owners', [
    (r'torch\.load\(|safe_open', {'gpt.weights'}),
    (r'torch\.save\(|save_file', {'gpt.checkpoints'}),
    (r'20240520', {'gpt.data.shards'}), (r'sys\.argv\[1', {'gpt.settings'}),
    (r'os\.environ', {'gpt.world', 'gpt.settings', 'gpt.script'})])
def test_one_owner_for_each_duty(pattern, owners):
    found = {name for name, path in SOURCES.items()
             if re.search(pattern, path.read_text(encoding='utf-8'))}
    assert found == owners


# Shape of the code.

@pytest.mark.parametrize('name', HOUSE)
def test_functions_are_short_and_take_at_most_six_parameters(name):
    """Except HeadLoss.forward(), to which torch passes its context too, and Triton kernels, which
    take pointers and sizes."""
    for function in functions(TREES[name]):
        lines = function.end_lineno - function.lineno + 1
        assert lines <= 60, f'{name}.{function.name} has {lines} lines'
        given = [p.arg for p in parameters(function)]
        exempt = (function.name == 'forward' and given[0] == 'ctx'
                  or any(ast.unparse(line) == 'triton.jit' for line in function.decorator_list))
        assert exempt or len(given) <= 6, f'{name}.{function.name}{given}'


@pytest.mark.parametrize('name', [name for name in FLOORS if name != 'model'])
def test_public_functions_have_type_hints(name):
    """`model` is a GPT everywhere, and needs none; functions inside functions are private."""
    classes = [node for node in TREES[name].body if isinstance(node, ast.ClassDef)]
    for function in (node for part in (TREES[name], *classes) for node in part.body
                     if isinstance(node, ast.FunctionDef) and not node.name.startswith('_')):
        bare = {p.arg for p in parameters(function) if p.annotation is None} - {'model'}
        keywords = function.args.kwarg.arg if function.args.kwarg else ''
        assert not bare - {keywords}, f'{name}.{function.name}: {bare}'
        assert function.returns is not None, f'{name}.{function.name} has no return type'


@pytest.mark.parametrize('name', SCRIPTS)
def test_settings_are_read_from_cfg_alone(name):
    """A bare setting name inside a function would be Python's own `compile` or `input`, or a
    NameError."""
    module = __import__(name, fromlist=['Config'])
    settings = set(module.Config.__dataclass_fields__)
    imported = {alias.asname or alias.name for node in TREES[name].body
                if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
    defined = {f.name for f in functions(TREES[name])}
    for function in functions(TREES[name]):
        nodes = list(ast.walk(function))
        known = {p.arg for node in nodes if isinstance(node, ast.Lambda | ast.FunctionDef)
                 for p in parameters(node)}
        known |= {node.id for node in nodes
                  if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        used = {node.id for node in nodes
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        outer = {node.id for other in functions(TREES[name]) if function in ast.walk(other)
                 for node in ast.walk(other)
                 if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        unknown = (used & settings) - known - outer - imported - defined
        assert not unknown, f'{name}.{function.name}: {unknown}'


@pytest.mark.parametrize('name', SCRIPTS)
def test_defaults_are_literals(name):
    """So that --help asks no GPU anything."""
    for node in TREES[name].body:
        if isinstance(node, ast.Assign) and node.targets[0].id == 'Config':
            return
        if isinstance(node, ast.Assign):
            ast.literal_eval(node.value)
    raise AssertionError('no Config')


def test_no_file_has_the_name_of_a_standard_module():
    """data/ and the root come first on the path of a script that runs there."""
    assert not {path.stem for path in SOURCES.values()} & set(sys.stdlib_module_names)
    assert not {path.stem for path in SOURCES.values()} & set(dir(builtins))


def test_importing_does_no_work():
    """Importing the scripts loads no hub client, CUDA or plotting library, and prints nothing."""
    code = (f'import {", ".join(HOUSE)}, sys, torch\n'
            "print([m for m in ('transformers', 'matplotlib.pyplot', 'wandb', 'datasets', "
            "'huggingface_hub', 'pyarrow') if m in sys.modules], torch.cuda.is_initialized())")
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    assert done.stdout == '[] False\n' and not done.stderr


@pytest.mark.parametrize('path', [*SOURCES.values(), *ROOT.glob('config/*.py'),
                                  *ROOT.glob('tests/*.py')], ids=lambda path: path.name)
def test_lines_fit(path):
    lines = path.read_text(encoding='utf-8').splitlines()
    long = [f'{path.name}:{i}' for i, line in enumerate(lines, 1) if len(line) > 100]
    assert not long
