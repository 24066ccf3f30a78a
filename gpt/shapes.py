"""
JSON of declared shapes: what is read from a file has them, or one line says where it does not.

    class Shard(TypedDict):
        file: FileName
        tokens: Count
        documents: NotRequired[Count]

A shape is Any, None, bool, int, float (an int passes), str, one of the names below, list[T],
dict[str, T], tuple[T, U] (a list of two), a TypedDict (further keys pass), or a union of these.
"""

import json
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import PurePath
from types import NoneType
from typing import Any, NewType, get_args, get_origin, get_type_hints, is_typeddict

Count = NewType('Count', int)           # 0 or more
Positive = NewType('Positive', int)     # 1 or more
FileName = NewType('FileName', str)     # of a file in the same folder
AnyText = NewType('AnyText', str)       # perhaps with halves of characters, as a model may write
Measured = NewType('Measured', float)   # squares and sums of these are finite
Problem = tuple[str, str, str]          # place, what is there, what is expected

LARGEST, LARGEST_MEASURED = 2 ** 63 - 1, 1e150
LINES, LINE = 100, 1000                 # of a message
SURROGATE = re.compile('[\ud800-\udfff]')       # half a character: UTF-8 cannot encode it


class NotJson(ValueError):
    """A text without the syntax of JSON."""


def is_int(value: Any) -> bool:
    return type(value) is int and abs(value) <= LARGEST


def is_text(value: Any) -> bool:
    return type(value) is str and (value.isascii() or not SURROGATE.search(value))


LEAVES = {      # shape: (whether a value has it, the shape in words)
    Any: (lambda value: True, ''),
    NoneType: (lambda value: value is None, 'null'),
    bool: (lambda value: type(value) is bool, 'true or false'),
    int: (is_int, 'a whole number below 2**63'),
    Count: (lambda value: is_int(value) and value >= 0, 'a whole number, 0 or more, below 2**63'),
    Positive: (lambda value: is_int(value) and value > 0, 'a whole number, 1 or more, below 2**63'),
    float: (lambda value: is_int(value) or type(value) is float and math.isfinite(value),
            'a finite number'),
    Measured: (lambda value: is_int(value) or type(value) is float
               and abs(value) < LARGEST_MEASURED, 'a number below 1e150'),
    str: (is_text, 'a text'),
    AnyText: (lambda value: type(value) is str, 'a text'),
    FileName: (lambda value: is_text(value) and value.isprintable()
               and PurePath(value).name == value not in ('', '..') and '\\' not in value,
               'the name of a file, without a folder'),
    dict: (lambda value: type(value) is dict, 'an object'),
    list: (lambda value: type(value) is list, 'a list'),
}


def parse_json(text: str | bytes, where: object, shape: Any) -> Any:
    """The value of a JSON text; ValueError with `where`, place, given and expected."""
    try:
        value = json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError(f'{where}: not JSON that can be read: nested too deeply') from None
    except json.JSONDecodeError as error:
        raise NotJson(f'{where}: not JSON, or truncated: {error}') from None
    except ValueError as error:
        message = 'a number of too many digits' if 'integer string' in str(error) else error
        raise ValueError(f'{where}: not JSON: {message}') from None
    return checked(value, where, shape)


def refuse(constant: str) -> None:
    raise ValueError(f'given {constant}, expected a finite number')


def checked(value: Any, where: object, shape: Any) -> Any:
    """`value`, if it has this shape; else ValueError with `where`, place, given and expected."""
    problem = checker(shape)(value)
    if problem:
        place, given, expected = problem
        place = f'{where}: {place.lstrip(".")}' if place else where
        raise ValueError(f'{place}: given {given}, expected {expected}')
    return value


@cache
def checker(shape: Any) -> Callable[[Any], Problem | None]:
    """The function that finds the first place where a value does not have this shape."""
    if shape in LEAVES:
        fits, expected = LEAVES[shape]
        return lambda value: None if fits(value) else ('', in_words(value), expected)
    kind, parts = get_origin(shape), get_args(shape)
    if is_typeddict(shape):
        return object_checker(shape)
    if kind is list:
        return each_checker(list, checker(parts[0]), lambda value: enumerate(value), '[{}]')
    if kind is dict:
        return each_checker(dict, checker(parts[1]), lambda value: value.items(), '.{}')
    if kind is tuple:
        return tuple_checker([checker(part) for part in parts])
    return union_checker([checker(part) for part in parts])


def object_checker(shape: Any) -> Callable[[Any], Problem | None]:
    fields = [(key, checker(part), key in shape.__required_keys__)
              for key, part in get_type_hints(shape).items()]

    def problem_of(value):
        if type(value) is not dict:
            return '', in_words(value), 'an object'
        for key, check, is_required in fields:
            if key not in value:
                if is_required:
                    return f'.{key}', 'nothing', check(...)[2]
            elif problem := check(value[key]):
                return f'.{key}{problem[0]}', *problem[1:]
        return None
    return problem_of


def each_checker(kind: type, check: Callable, items: Callable,
                 place: str) -> Callable[[Any], Problem | None]:
    _, expected = LEAVES[kind]

    def problem_of(value):
        if type(value) is not kind:
            return '', in_words(value), expected
        for key, part in items(value):
            if problem := check(part):
                return in_words(key, place) + problem[0], *problem[1:]
        return None
    return problem_of


def tuple_checker(checks: list[Callable]) -> Callable[[Any], Problem | None]:
    def problem_of(value):
        if type(value) is not list or len(value) != len(checks):
            return '', in_words(value), f'a list of {len(checks)}'
        for i, check in enumerate(checks):
            if problem := check(value[i]):
                return f'[{i}]{problem[0]}', *problem[1:]
        return None
    return problem_of


def union_checker(checks: list[Callable]) -> Callable[[Any], Problem | None]:
    def problem_of(value):
        problems = [check(value) for check in checks]
        if None in problems:
            return None
        deepest = max(problems, key=lambda problem: len(problem[0]))
        if deepest[0]:
            return deepest
        return *deepest[:2], ' or '.join(expected for _, _, expected in problems)
    return problem_of


def in_words(value: Any, place: str = '{}') -> str:
    """A value in a message: short, and on one line."""
    if isinstance(value, dict | list):
        return f'{"an object" if isinstance(value, dict) else "a list"} of {len(value):,}'
    if value is None:
        return 'null'
    if place != '{}':
        return place.format(str(value)[:40].encode('unicode_escape').decode('ascii'))
    text = repr(value[:60]) if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f'{text[:60]}…'


def bounded(message: str) -> str:
    """A message of at most LINES lines of about LINE characters; a longer line loses its middle:
    where and what are at its beginning, what is expected at its end."""
    lines = message.split('\n')
    kept = [line if len(line) <= LINE else f'{line[:LINE // 2]}…{line[-LINE // 2:]}'
            for line in lines[:LINES]]
    more = [f'… and {len(lines) - LINES:,} lines more'] if len(lines) > LINES else []
    return '\n'.join(kept + more)
