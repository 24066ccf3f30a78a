"""
The header of a script becomes a typed, frozen Config; config files and --key=value override it.

    batch_size = 16         # sequences per micro-batch
    Config = settings(globals())

    def main(cfg): ...

    if __name__ == '__main__':
        run(main, Config, short={'-p': 'prompt'})

Files and flags are applied from left to right, as in nanoGPT. A config file is a list of
assignments (literals, arithmetic, settings assigned before): it is evaluated, never executed.
"""

import ast
import difflib
import operator
import os
import sys
import traceback
from dataclasses import fields, make_dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TYPES = (bool, int, float, str, tuple)
OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
    ast.USub: operator.neg, ast.UAdd: operator.pos,
}


def settings(script):
    """Move the lower-case constants of `script`, its globals() so far, into a frozen Config class.

    They leave the script, so that code which forgets `cfg.` fails with a NameError instead of
    quietly reading a default; `train.Config().batch_size` is where a default is found.
    """
    names = [key for key, value in script.items()
             if key.islower() and not key.startswith('_') and type(value) in TYPES]
    taken = [(key, type(script[key]), script.pop(key)) for key in names]
    Config = make_dataclass('Config', taken, frozen=True)
    Config.__module__ = script['__name__']
    return Config


def configure(Config, argv, short=None, collect=''):
    """Build a Config from its defaults and the config files and flags of argv, left to right.

    short maps flags such as '-p' to settings; `collect` names the tuple setting that takes the
    positional arguments which are not config files (*.py). Raises ValueError in one line.
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
    return Config(**values)


def known(key, defaults, where):
    if key in defaults:
        return key
    close = difflib.get_close_matches(key, defaults, n=1)
    hint = f", did you mean '{close[0]}'?" if close else '; --help lists them'
    raise ValueError(f"{where}: there is no setting '{key}'{hint}")


def from_text(text, default):
    """The value that a flag's text stands for: itself for a text setting, else a literal."""
    if type(default) is tuple:
        return tuple(part for part in text.split(',') if part)
    if type(default) is str:
        return {'True': True, 'False': False}.get(text, text) if default == 'auto' else text
    try:
        return evaluate(ast.parse(text.strip(), mode='eval').body, {})
    except (ValueError, SyntaxError, TypeError, ArithmeticError):
        return text                                                 # typed() refuses it by name


def typed(value, default, where):
    """`value` as the type of `default`; int passes for float, a whole float such as 1e5 for int."""
    want = type(default)
    if type(value) is want or (default == 'auto' and type(value) is bool):
        return value
    if want is float and type(value) is int:
        return float(value)
    if want is int and type(value) is float and value.is_integer():
        return int(value)
    example = {bool: 'True or False', int: 'a whole number', float: 'a number',
               str: 'a text in quotes', tuple: 'a list of texts'}[want]
    raise ValueError(f'{where}: given {value!r}, expected {example} (the default is {default!r})')


def read_config_file(path, values, defaults):
    """The settings that the config file at `path` assigns; it may use those in `values`."""
    try:
        source = Path(path).read_text(encoding='utf-8')
        tree = ast.parse(source, filename=path)
    except OSError as error:
        raise ValueError(f'{path}: cannot read this config file ({error.strerror}); '
                         f'settings are given as --key=value') from None
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f'{path}: not a config file: {error}') from None
    values, assigned = dict(values), {}
    for statement in tree.body:
        where = f'{path}:{statement.lineno}'
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue                                                # a docstring
        if not (isinstance(statement, ast.Assign) and len(statement.targets) == 1
                and isinstance(statement.targets[0], ast.Name)):
            raise ValueError(f'{where}: given `{ast.unparse(statement).splitlines()[0]}`; '
                             f'a config file holds assignments such as batch_size = 8 '
                             f'and nothing else')
        name = statement.targets[0].id
        try:
            value = evaluate(statement.value, values)
        except (ValueError, TypeError, ArithmeticError) as error:
            raise ValueError(f'{where}: {name}: {error}') from None
        values[name] = value
        if not name.startswith('_'):                                # _names are the file's own
            default = defaults[known(name, defaults, where)]
            assigned[name] = typed(value, default, f'{where}: {name}')
    return assigned


def evaluate(node, names):
    """The value of a literal, of arithmetic, or of a name in `names`; anything else is refused."""
    match node:
        case ast.Constant(value=value) if type(value) in TYPES:
            return value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            return tuple(evaluate(part, names) for part in parts)
        case ast.UnaryOp(op=op, operand=value) if type(op) in OPERATORS:
            return OPERATORS[type(op)](evaluate(value, names))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            left, right = evaluate(left, names), evaluate(right, names)
            if isinstance(op, ast.Pow) and abs(right) > 64:
                raise ValueError(f'{right} is too large an exponent')
            return OPERATORS[type(op)](left, right)
    raise ValueError(f'given `{ast.unparse(node)}`, '
                     f'expected a literal, arithmetic, or an earlier setting')


def as_config_file(cfg, header):
    """The text of a config file that gives exactly `cfg`."""
    lines = (f'{field.name} = {getattr(cfg, field.name)!r}' for field in fields(cfg))
    return '\n'.join([f'# {header}', *lines, ''])


def run(main, Config, short=None, collect=''):
    """The end of every script: settings from the command line, main, one-line errors, exit status.

    0 done, 1 a failure of ours (with its traceback), 2 the user's input or data (an OSError, an
    ImportError, or a ValueError that our own code raised), otherwise what main returned. It leaves
    by os._exit once everything is flushed: a process that used gloo may abort in a normal shutdown.
    """
    for stream in sys.stdout, sys.stderr:       # what a terminal or file cannot show is no failure
        stream.reconfigure(errors='backslashreplace')
    try:
        if {'-h', '--help'} & set(sys.argv[1:]):
            status = print_help(sys.modules[Config.__module__]) or 0
        else:
            status = main(configure(Config, sys.argv[1:], short, collect)) or 0
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        os._exit(141)                           # whoever read our output has enough: `| head`
    except Exception as error:
        if isinstance(error, (OSError, ImportError)) or (
                isinstance(error, ValueError) and raised_here(error)):
            print(f'{Path(sys.argv[0]).name}: {error}', file=sys.stderr)
            status = 2
        else:
            traceback.print_exc()
            status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def raised_here(error):
    """Whether the innermost frame of `error` is a file of this repository, not of a library."""
    *_, frame = traceback.extract_tb(error.__traceback__)
    folder = Path(frame.filename).resolve().parent
    return folder in (ROOT, ROOT / 'data', ROOT / 'gpt', ROOT / 'gpt' / 'data') and not os.environ.get('TRACEBACK')


def print_help(script):
    """Print what the script is and its header: the block up top is the manual."""
    lines = Path(script.__file__).read_text(encoding='utf-8').splitlines()
    rules = [i for i, line in enumerate(lines) if line.startswith('# ----')]
    print((script.__doc__ or '').strip(), *lines[rules[0]:rules[1] + 1], sep='\n')
