"""
The header of a script becomes a typed, frozen Config; config files and --key=value override it.

    batch_size = 16         # sequences per micro-batch
    Config = settings(globals())

    import torch            # what takes long comes after it: --help and Ctrl-C do not wait

    def main(cfg): ...

    if __name__ == '__main__':
        run(main, Config, short={'-p': 'prompt'})

Files and flags are applied from left to right, as in nanoGPT. A config file is a list of
assignments (literals, arithmetic, settings assigned before): it is evaluated, never executed.
"""

import ast
import difflib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, make_dataclass
from pathlib import Path
from typing import Any

from gpt.config_file import LARGEST, TYPES, assignments, evaluate, parsed
from gpt.script import finish
from gpt.shapes import in_words, is_text

SWITCHES = ('compile', 'detok', 'half_residual',   # 'auto', True or False; other 'auto's: a text
            'kernels')
PATHS = frozenset('compare contamination data data_dir dataset dump file hellaswag_data init_from '
                  'input model out out_dir peers runs to tokenizer'.split())  # ~ is the home folder


def settings(script: dict[str, Any]) -> type:
    """Move the lower-case constants of `script`, its globals() so far, into a frozen Config class.

    They are removed from the script, so that code which forgets `cfg.` raises a NameError instead
    of reading a default; `train.Config().batch_size` gives a default. In the script that was
    started, --help ends here, and Ctrl-C during the imports that follow is quiet.
    """
    if script['__name__'] == '__main__':
        # OpenMP's threads wait in a loop for each other: long, on a processor that others need too
        os.environ.setdefault('GOMP_SPINCOUNT', '20000')
        if {'-h', '--help'} & set(sys.argv[1:]):
            finish(lambda: print_help(script))
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
            signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    names = [key for key, value in script.items()
             if key.islower() and not key.startswith('_') and type(value) in TYPES]
    taken = [(key, type(script[key]), script.pop(key)) for key in names]
    Config = make_dataclass('Config', taken, frozen=True)
    Config.__module__ = script['__name__']
    return Config


def configure(Config: type, argv: Sequence[str], short: dict[str, str] | None = None,
              collect: str = '') -> Any:
    """Build a Config from its defaults and the config files and flags of argv, left to right.

    short: settings by flag, such as {'-p': 'prompt'}. collect: the tuple setting that takes the
    positional arguments other than config files (*.py). Raises ValueError.
    """
    values = {field.name: field.default for field in fields(Config)}
    defaults, args, short = dict(values), list(argv), short or {}
    while args:
        arg = args.pop(0)
        if not arg.startswith('-') or arg == '-':
            if arg.endswith('.py'):
                values.update(read_config_file(arg, values, defaults))
            elif collect:
                values[collect] += (arg,)
            else:
                raise ValueError(f'given {arg!r}, expected a config file (*.py) or --key=value')
            continue
        flag, equals, text = arg.partition('=')
        key = known(short.get(flag, flag.lstrip('-').replace('-', '_')), defaults, flag)
        if not equals:
            if type(defaults[key]) is bool and args[:1] not in (['True'], ['False']):
                text = 'True'                                       # --eval_only
            elif not args or args[0].startswith('--') or args[0] in short:
                raise ValueError(f'{flag}: expected a value, such as {flag}={defaults[key]!r}')
            else:
                text = args.pop(0)                                  # -p "Hello", --model gpt2
        values[key] = typed(from_text(text, defaults[key]), defaults[key], flag)
    return Config(**{key: expanded(key, value, defaults[key]) for key, value in values.items()})


def expanded(key: str, value: Any, default: Any) -> Any:
    """A setting with ~ expanded, if it names files; a shell expands only what begins with it."""
    if type(value) is bool and type(default) is str and key not in SWITCHES:
        raise ValueError(f'{key}: given {value!r}, expected a text (the default is {default!r})')
    if key not in PATHS or type(value) is bool:
        return value
    if type(value) is tuple:
        return tuple(expanded(key, part, '') for part in value)
    if '\0' in value or not is_text(value):
        raise ValueError(f'{key}: given {in_words(value)}, expected a path in UTF-8')
    return os.path.expanduser(value)


def known(key: str, defaults: dict[str, Any], where: str) -> str:
    """`key`, if there is such a setting; else ValueError with the closest name."""
    if key in defaults:
        return key
    close = difflib.get_close_matches(key, defaults, n=1)
    hint = f", did you mean '{close[0]}'?" if close else '; --help lists them'
    raise ValueError(f"{where}: unknown setting '{key}'{hint}")


def from_text(text: str, default: Any) -> Any:
    """The value of a flag's text: the text itself for a text setting, else a literal."""
    if type(default) is tuple:
        return tuple(part for part in text.split(',') if part)
    if type(default) is str:
        return {'True': True, 'False': False}.get(text, text) if default == 'auto' else text
    try:
        return evaluate(parsed(text.strip(), 'eval').body, {})
    except ValueError:
        return text                                                 # typed() refuses it by name


def typed(value: Any, default: Any, where: str) -> Any:
    """`value` as the type of `default`; int passes for float, a whole float such as 1e5 for int."""
    want = type(default)
    if want is tuple and type(value) is tuple and not all(type(part) is str for part in value):
        want = None
    if type(value) is want or (default == 'auto' and type(value) is bool):
        return value
    if want is float and type(value) is int:
        return float(value)
    if want is int and type(value) is float and value.is_integer() and abs(value) <= LARGEST:
        return int(value)
    example = {bool: 'True or False', int: 'a whole number below 2**63', float: 'a number',
               str: 'a text in quotes', tuple: 'a list of texts'}[type(default)]
    raise ValueError(f'{where}: given {in_words(value)}, expected {example} '
                     f'(the default is {default!r})')


def read_config_file(path: str, values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The settings that the config file at `path` assigns; it may use those in `values`."""
    assigned = {}
    for name, value, where in assignments(path, values):
        if not name.startswith('_'):                                # _names are the file's own
            default = defaults[known(name, defaults, where)]
            assigned[name] = typed(value, default, f'{where}: {name}')
    return assigned


def header_defaults(script: str | Path) -> dict[str, Any]:
    """{setting: default} of the script at this path, read without importing it."""
    tree, found = ast.parse(Path(script).read_text(encoding='utf-8')), {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and node.targets[0].id == 'Config':
            break
        if isinstance(node, ast.Assign):
            found[node.targets[0].id] = evaluate(node.value, found)
    return found


def section(cfg: Any, dataclass: type, **others: Any) -> Any:
    """The settings of `cfg` that are fields of `dataclass`, as an instance; others: more fields."""
    names = {field.name for field in fields(dataclass)} - set(others)
    return dataclass(**{name: getattr(cfg, name) for name in names if hasattr(cfg, name)},
                     **others)


def check_bounds(cfg: Any, bounds: Sequence[tuple[str, Callable[[Any], bool], str]]) -> None:
    """Raise ValueError for the first setting out of bounds.

    bounds: (what is expected, in words; whether a value fits; names of settings, in one string).
    """
    for expected, fits, names in bounds:
        for name in names.split():
            if not fits(getattr(cfg, name)):
                raise ValueError(f'{name}: given {getattr(cfg, name)!r}, expected {expected}')


def check_choices(cfg: Any, **choices: Iterable[str]) -> None:
    """Raise ValueError for the first setting, or part of one, that is not among its choices."""
    for name, allowed in choices.items():
        value = getattr(cfg, name)
        for part in value if type(value) is tuple else (value,):
            if part not in allowed:
                raise ValueError(f"{name}: given {part!r}, expected one of {', '.join(allowed)}")


def run(main: Callable, Config: type, short: dict[str, str] | None = None,
        collect: str = '') -> None:
    """The end of every script: settings from the command line, main, exit; see script.finish()."""
    if callable(signal.getsignal(signal.SIGINT)):       # not ignored, as it is under nohup
        signal.signal(signal.SIGINT, signal.default_int_handler)
    finish(lambda: main(configure(Config, sys.argv[1:], short, collect)))


def print_help(script: dict[str, Any]) -> None:
    """Print the docstring of a script and its header, which is the manual."""
    lines = Path(script['__file__']).read_text(encoding='utf-8').splitlines()
    rules = [i for i, line in enumerate(lines) if line.startswith('# ----')]
    print((script['__doc__'] or '').strip(), *lines[rules[0]:rules[1] + 1], sep='\n')
