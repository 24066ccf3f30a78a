"""JSON of declared shapes: what passes, and the line that says what does not."""

import json
from typing import Any, NotRequired, TypedDict

import pytest
from conftest import script

from gpt.files import decode, plain_text, read_json, read_text
from gpt.shapes import (AnyText, Count, FileName, Measured, NotJson, Positive, bounded, checked,
                        parse_json)


class Shard(TypedDict):
    file: FileName
    tokens: Count
    bytes: NotRequired[Positive]


class Manifest(TypedDict):
    shards: dict[str, list[Shard]]
    files: list[tuple[str, int]]
    seed: int | None
    loss: float
    nats: NotRequired[Measured]
    words: NotRequired[AnyText]
    other: NotRequired[Any]


GOOD = {'shards': {'train': [{'file': 'a.bin', 'tokens': 3}]}, 'files': [['a', 1]], 'seed': None,
        'loss': 1}


@pytest.mark.parametrize('changed', [
    {}, {'seed': 5}, {'loss': 2.5}, {'loss': 1e304}, {'unknown': [[[None]]]}, {'files': []},
    {'words': '\ud800'}, {'other': {'a': 'b'}}, {'nats': -1e149}])
def test_what_has_the_shape_is_returned(changed):
    value = {**GOOD, **changed}
    assert parse_json(json.dumps(value), 'f', Manifest) == value


@pytest.mark.parametrize('changed, words', [
    ({'seed': 'x'}, "f: seed: given 'x', expected a whole number below 2..63 or null"),
    ({'seed': 2 ** 63}, 'f: seed: given 9223372036854775808, expected'),
    ({'seed': True}, 'f: seed: given True, expected'), ({'seed': 1.0}, 'f: seed: given 1.0'),
    ({'loss': None}, 'f: loss: given null, expected a finite number'),
    ({'loss': '1'}, "f: loss: given '1', expected a finite number"),
    ({'nats': 1e150}, 'f: nats: given 1e.150, expected a number below 1e150'),
    ({'files': {}}, 'f: files: given an object of 0, expected a list'),
    ({'files': [['a', 1], ['a']]}, r'f: files\[1\]: given a list of 1, expected a list of 2'),
    ({'files': [['a', 'b']]}, r"f: files\[0\]\[1\]: given 'b'"),
    ({'files': [['\ud800', 1]]}, r"f: files\[0\]\[0\]: given '.ud800', expected a text"),
    ({'shards': {'a\nb': 3}}, r'f: shards.a.nb: given 3, expected a list'),
    ({'shards': {'t': [{'tokens': 1}]}}, r'f: shards.t\[0\].file: given nothing, expected the'),
    ({'shards': {'t': [{'file': 'a', 'tokens': -1}]}}, r'tokens: given -1, expected .* 0 or more'),
    ({'shards': {'t': [{'file': 'a', 'tokens': 1, 'bytes': 0}]}}, 'bytes: given 0, expected .* 1'),
    *(({'shards': {'t': [{'file': name, 'tokens': 1}]}}, 'file: given .* without a folder')
      for name in ('../a', '/dev/zero', '', '.', '..', 'a/b', 'a\\b', 'a\0', 5)),
    ({'words': 'x' * 10 ** 6, 'seed': 'y' * 10 ** 6}, "f: seed: given 'yyy")])
def test_the_place_is_named_in_one_short_line(changed, words):
    with pytest.raises(ValueError, match=words) as error:
        parse_json(json.dumps({**GOOD, **changed}), 'f', Manifest)
    assert len(str(error.value)) < 200 and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize('text, words', [
    ('', 'f: not JSON, or truncated'), ('{"a": ', 'f: not JSON, or truncated'),
    ('[' * 200_000, 'nested too deeply'), ('[' * 200_000 + ']' * 200_000, 'nested too deeply'),
    ('{"a":' * 200_000 + '1' + '}' * 200_000, 'nested too deeply'),
    ('{"unknown": NaN}', 'f: not JSON: given NaN, expected a finite number'),
    ('{"unknown": -Infinity}', 'given -Infinity'),
    ('{"a": 1' + '0' * 5000 + '}', 'limit .4300 digits'),
    ('[]', 'f: given a list of 0, expected an object'), ('null', 'given null, expected an object')])
def test_what_is_no_json_of_that_shape(text, words):
    with pytest.raises(ValueError, match=words):
        parse_json(text, 'f', Manifest)
    if 'truncated' in words:
        with pytest.raises(NotJson):
            parse_json(text, 'f', Manifest)


def test_a_number_beyond_floats_is_too_large():
    with pytest.raises(ValueError, match='f: loss: given inf, expected a finite number'):
        parse_json(json.dumps(GOOD).replace('"loss": 1', '"loss": 1e999'), 'f', Manifest)


def test_plain_types_are_shapes():
    assert checked({'a': [1]}, 'f', dict) and checked([], 'f', list) == []
    with pytest.raises(ValueError, match='given an object of 0, expected a list'):
        checked({}, 'f', list)


def test_files_are_read_as_text_mode_does(tmp_path):
    """Line ends of any system, and byte order marks where a file begins, also within another."""
    path, text = tmp_path / 'a', 'a\nb\n\nc\n'
    for end in ('\n', '\r\n', '\r'):
        path.write_bytes(text.replace('\n', end).encode('utf-8-sig') * 2)
        assert read_text(path) == path.read_text(encoding='utf-8').replace('\ufeff', '') == text * 2
    assert plain_text('a\ufeffb') == 'a\ufeffb' and plain_text('\ufeff\ufeff') == ''
    path.write_bytes(json.dumps(GOOD, indent=1).replace('\n', '\r\n').encode('utf-8-sig'))
    assert read_json(path, Manifest) == GOOD


@pytest.mark.parametrize('raw, words', [
    (b'a\r\nb\rc\n\xe9', 'f:4: not UTF-8 .* at byte 7.; convert it .iconv -f latin1'),
    (b'\x93a\x94 caf\xe9', 'f:1: .*iconv -f cp1252'), (b'\xff\xfea\0', 'f:1: .*iconv -f utf-16')])
def test_bytes_that_are_not_utf8_are_named_with_their_encoding(raw, words):
    with pytest.raises(ValueError, match=words):
        decode(raw, 'f')


def test_it_imports_no_torch_and_nothing_large():
    code = 'import sys, gpt.shapes; print({"torch", "numpy", "pydantic"} & set(sys.modules))'
    assert script('-c', code).stdout == 'set()\n'


def test_a_message_of_any_length_keeps_its_beginning_and_its_end():
    message = f"a/b.json: pad_token: given '{'x' * 2_000_000}', expected a name"
    assert bounded('as it is\nand two') == 'as it is\nand two'
    short = bounded(message)
    assert len(short) < 1010 and short.startswith("a/b.json: pad_token: given 'xxx")
    assert short.endswith("xxx', expected a name") and '…' in short
    assert bounded('line\n' * 60_000).endswith('line\n… and 59,901 lines more')
