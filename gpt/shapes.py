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
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import count, repeat
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
NOTHING = object()                      # in place of a part that is missing
fields_of = cache(get_type_hints)       # of a TypedDict


class NotJson(ValueError):
    """A text without the syntax of JSON."""


def is_int(value: Any) -> bool:
    return type(value) is int and abs(value) <= LARGEST


def is_text(value: Any) -> bool:
    return type(value) is str and (value.isascii() or not SURROGATE.search(value))


LEAVES = {      # shape: (whether a value has it, the shape in words)
    Any: (lambda value: value is not NOTHING, 'a value'),
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
    except json.JSONDecodeError as error:
        raise NotJson(f'{where}: not JSON, or truncated: {error}') from None
    except (ValueError, RecursionError) as error:       # thousands of digits or of brackets
        reason = 'nested too deeply' if isinstance(error, RecursionError) else error
        raise ValueError(f'{where}: not JSON: {reason}') from None
    return checked(value, where, shape)


def refuse(constant: str) -> None:
    raise ValueError(f'given {constant}, expected a finite number')


def checked(value: Any, where: object, shape: Any) -> Any:
    """`value`, if it has this shape; else ValueError with `where`, place, given and expected."""
    if problem := problem_in(value, shape):
        place, given, expected = problem
        place = f'{where}: {place.lstrip(".")}' if place else where
        raise ValueError(f'{place}: given {given}, expected {expected}')
    return value


def problem_in(value: Any, shape: Any) -> Problem | None:
    """The first place where a value does not have this shape."""
    if shape in LEAVES:
        fits, expected = LEAVES[shape]
        return None if fits(value) else ('', in_words(value), expected)
    kind = dict if is_typeddict(shape) else get_origin(shape)
    if kind not in (dict, list, tuple):
        return problem_in_union(value, get_args(shape))
    if problem := problem_in(value, list if kind is tuple else kind):
        return problem
    if kind is tuple and len(value) != len(get_args(shape)):
        return '', in_words(value), f'a list of {len(get_args(shape))}'
    for key, part, part_shape in parts_of(value, shape):
        if problem := problem_in(part, part_shape):
            place = f'[{key}]'
            if kind is dict:
                place = '.' + key[:40].encode('unicode_escape').decode()
            return place + problem[0], *problem[1:]
    return None


def problem_in_union(value: Any, shapes: Sequence[Any]) -> Problem | None:
    problems = [problem_in(value, shape) for shape in shapes]
    if None in problems:
        return None
    deepest = max(problems, key=lambda problem: len(problem[0]))
    if deepest[0]:
        return deepest
    return *deepest[:2], ' or '.join(expected for _, _, expected in problems)


def parts_of(value: Any, shape: Any) -> Iterable[tuple[Any, Any, Any]]:
    """(key, part, its shape) of what is in an object or a list; a missing part is NOTHING."""
    if is_typeddict(shape):
        return [(key, value.get(key, NOTHING), part) for key, part in fields_of(shape).items()
                if key in value or key in shape.__required_keys__]
    kind, shapes = get_origin(shape), get_args(shape)
    if kind is dict:
        return zip(value, value.values(), repeat(shapes[1]))
    return zip(count(), value, shapes if kind is tuple else repeat(shapes[0]))


def in_words(value: Any) -> str:
    """A value in a message: short, and on one line."""
    if isinstance(value, dict | list):
        return f'{"an object" if isinstance(value, dict) else "a list"} of {len(value):,}'
    if value is None or value is NOTHING:
        return 'null' if value is None else 'nothing'
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
