"""
Config files: lists of assignments of literals, arithmetic and earlier names. They are evaluated,
never executed; so are the values of flags.
"""

import ast
import math
import operator
from dataclasses import fields
from pathlib import Path
from typing import Any

from gpt.files import read_text
from gpt.shapes import in_words, is_text

TYPES = (bool, int, float, str, tuple)
OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
    ast.USub: operator.neg, ast.UAdd: operator.pos,
}
LARGEST = 2 ** 63 - 1       # a whole number beyond it fits no counter
LONGEST_POWER = 64


def assignments(path: str | Path, values: dict[str, Any] | None = None) -> list[tuple]:
    """[(name, value, 'path:line')] of a config file, in order; it may use the names in `values`.
    ValueError for anything but assignments of literals, arithmetic and earlier names."""
    text = read_text(path)
    try:
        tree = parsed(text, 'exec')
    except ValueError as error:
        raise ValueError(f'{path}: not a config file: {error}') from None
    values, found = dict(values or {}), []
    for statement in tree.body:
        where = f'{path}:{statement.lineno}'
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue                                                # a docstring
        if not (isinstance(statement, ast.Assign) and len(statement.targets) == 1
                and isinstance(statement.targets[0], ast.Name)):
            line = text.split('\n')[statement.lineno - 1]
            raise ValueError(f'{where}: given {in_words(line)}, expected assignments such as '
                             f'batch_size = 8 and nothing else')
        name = statement.targets[0].id
        try:
            values[name] = evaluate(statement.value, values)
        except ValueError as error:
            raise ValueError(f'{where}: {name}: {error}') from None
        found.append((name, values[name], where))
    return found


def parsed(text: str, mode: str) -> ast.AST:
    """The syntax tree of a config file or a value; ValueError if it has none."""
    try:
        return ast.parse(text, mode=mode)
    except (RecursionError, MemoryError):
        raise ValueError('nested too deeply') from None
    except SyntaxError as error:
        raise ValueError(f'line {error.lineno}: {error.msg}') from None


def source_of(node: ast.AST) -> str:
    """The source of a node, for a message."""
    source = ast.unparse(node).partition('\n')[0]
    return source if len(source) <= 100 else f'{source[:100]}…'


def evaluate(node: ast.AST, names: dict[str, Any]) -> Any:
    """The value of a literal, of arithmetic, or of a name in `names`; else ValueError."""
    try:
        return evaluated(node, names)
    except RecursionError:
        raise ValueError('nested too deeply') from None
    except ArithmeticError as error:                # a division by zero, or beyond float
        raise ValueError(str(error)) from None


def evaluated(node: ast.AST, names: dict[str, Any]) -> Any:
    match node:
        case ast.Constant(value=value) if type(value) in TYPES:
            if type(value) is str and not is_text(value):
                raise ValueError(f'given {in_words(value)}, expected a text')
            return checked_number(value, node)
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            return tuple(evaluated(part, names) for part in parts)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            operands = [evaluated(operand, names)]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            operands = [evaluated(left, names), evaluated(right, names)]
        case _:
            raise ValueError(f'given `{source_of(node)}`, '
                             f'expected a literal, arithmetic, or an earlier setting')
    if not all(type(value) in (int, float) for value in operands):
        raise ValueError(f'given `{source_of(node)}`, expected arithmetic of numbers')
    if type(op) is ast.Pow and abs(operands[1]) > LONGEST_POWER:
        raise ValueError(f'{in_words(operands[1])} is too large an exponent')
    return checked_number(OPERATORS[type(op)](*operands), node)


def checked_number(value: Any, node: ast.AST) -> Any:
    """`value`; ValueError for a number that is too large, not finite, or complex."""
    is_fine = (math.isfinite(value) if type(value) is float else
               abs(value) <= LARGEST if type(value) is int else type(value) in TYPES)
    if not is_fine:
        raise ValueError(f'given `{source_of(node)}`, expected a number below 2**63')
    return value


def as_config_file(config: Any, header: str) -> str:
    """The text of a config file that gives exactly `config`, below a comment."""
    lines = (f'{field.name} = {getattr(config, field.name)!r}' for field in fields(config))
    header = ''.join(char if char.isprintable() else repr(char)[1:-1] for char in header)
    return '\n'.join([f'# {header}', *lines, ''])
