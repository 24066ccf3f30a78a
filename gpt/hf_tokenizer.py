"""
A tokenizer of another program, read by the `tokenizers` library as transformers reads it.

tokenizer.json is the truth: normalizer, added tokens, prefix space, ids of any order. Two
differences are ours: the end-of-text token is text where a text contains its characters, and an
added token is decoded as it is written, where the library takes its é or Ġ for GPT-2's bytes.
"""

import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from gpt.files import read_json
from gpt.shapes import AnyText, parse_json

EOT = '<|endoftext|>'
SPECIAL = ('bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token',
           'mask_token')
CLASSES = ('GPT2Tokenizer', 'GPT2TokenizerFast')    # those of vocab.json with merges.txt
MAX_VOCAB_SIZE = 2 ** 16                            # ids are stored as uint16
NOT_IN_UTF8 = (0xc0, 0xc1, *range(0xf5, 0x100))     # bytes that no text contains
TOKENIZER_FILES = ('*token*', 'vocab*', 'merges*', '*.model', '*.vocab', '*.tiktoken', '*spiece*',
                   '*bpe*', 'encoder.json', 'dict.txt', 'tekken.json')


TokenizerFile = TypedDict('TokenizerFile', {        # what is read here; the library judges the rest
    'model': TypedDict('Model', {'vocab': dict[str, Any] | list[tuple[Any, Any]]}),
    'added_tokens': list[TypedDict('Added', {'id': Any, 'content': AnyText})],
    **{part: NotRequired[dict[str, Any] | None]
       for part in ('normalizer', 'pre_tokenizer', 'post_processor', 'decoder')}})


class HFTokenizer:
    """The tokenizer of the tokenizer.json `text`, with the attributes of gpt.tokenizer.Fast.

    names: special tokens by role, {'eos_token': '</s>', …}; the end of text is its eos_token, if
    that is an added token, else <|endoftext|>. Raises ValueError for a text that the library does
    not read as it is written.
    """

    def __init__(self, text: str, names: dict[str, str]):
        data = json.loads(text)
        self.added = {token['id']: token['content'] for token in data['added_tokens']}
        self.text, self.names, self.data = text, names, data
        if data['model'].get('dropout'):
            raise ValueError('its dropout gives other ids at every call; set it to null')
        self.whole = from_text(text)
        if 'merges' in data['model']:
            data['model']['merges'] = pairs(data['model']['merges'])
        for i, content in self.added.items():
            check_same_id(content, i, self.whole.token_to_id(content))
        self.n_vocab = 1 + max(self.whole.get_vocab().values())
        self.name = data['model'].get('type', 'BPE')
        known = {content: i for i, content in self.added.items()}
        self.eot_text = next((name for name in (names.get('eos_token'), EOT) if name in known), '')
        self.eot = known.get(self.eot_text)
        self.reader = from_text(without(data, self.eot_text)) if self.eot_text else self.whole

    def encode(self, text: str, template: bool = False) -> list[int]:
        """Ids of `text`, with the tokens that a template puts around it if wanted; ValueError for
        text of which the tokenizer has no tokens."""
        text.encode()                           # UnicodeEncodeError, as tiktoken has it
        with library_errors('the tokenizer cannot encode this text'):
            return self.reader.encode_batch_fast([text], add_special_tokens=template)[0].ids

    def ids(self, text: str) -> np.ndarray:
        """encode() as uint16."""
        return np.array(self.encode(text), np.uint16)

    def encode_prompt(self, text: str) -> list[int]:
        """encode() with what the tokenizer's template puts before a text, such as <s>."""
        ids = self.encode(text, template=True)
        while ids and ids[-1] == self.eot:
            ids.pop()                           # of the template: the prompt is to be continued
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, as transformers decodes them with all special tokens."""
        return self.decode_bytes(ids).decode('utf-8', 'replace')

    def decode_bytes(self, ids: list[int]) -> bytes:
        """decode() as bytes, which may be a part of a character."""
        if self.is_byte_level:
            return b''.join(self.tokens[i] for i in ids)
        with library_errors('the tokenizer cannot decode these ids'):
            return self.whole.decode(ids, skip_special_tokens=False).encode()

    def decode_single_token_bytes(self, i: int) -> bytes:
        """What the token i adds to a text; b'' for an id that no token has."""
        return self.tokens[i]

    @property
    def is_byte_level(self) -> bool:
        return (self.data.get('decoder') or {}).get('type') == 'ByteLevel'

    @property
    def can_be_cut(self) -> bool:
        """Whether a text may be encoded in pieces that begin before a space."""
        splits = self.data.get('pre_tokenizer') or {}
        return (splits.get('type') == 'ByteLevel' and not splits.get('add_prefix_space')
                and splits.get('use_regex', True) and not self.data.get('normalizer')
                and not any(token.get('lstrip') or token.get('rstrip')
                            or re.search(r'\s', token['content'])
                            for token in self.data['added_tokens']))

    @property
    def remark(self) -> str:
        """What a user should know of it, '' for nothing."""
        model, splits = self.data['model'], json.dumps(self.data.get('pre_tokenizer'))
        missing = [byte for byte, char in byte_characters().items()
                   if char not in model['vocab'] and byte not in NOT_IN_UTF8]
        if (self.name != 'BPE' or '"ByteLevel"' not in splits or not missing
                or model.get('unk_token') is not None or model.get('byte_fallback')):
            return ''
        return (f'this tokenizer has no token for {len(missing)} of the 256 bytes; they are left '
                f'out of a text, as transformers does')

    @cached_property
    def tokens(self) -> list[bytes]:
        """What each token adds to a text, in order of its id."""
        found = [b''] * self.n_vocab
        to_byte = {char: byte for byte, char in byte_characters().items()}
        has_bytes = '"ByteFallback"' in json.dumps(self.data.get('decoder'))
        normalized = {token['id'] for token in self.data['added_tokens'] if token.get('normalized')}
        with library_errors('the tokenizer cannot decode its tokens'):
            for name, i in self.whole.get_vocab().items():
                if self.is_byte_level:
                    if i in normalized and self.whole.normalizer:       # as the library writes it
                        name = self.whole.normalizer.normalize_str(name)
                    in_bytes = i not in self.added and all(char in to_byte for char in name)
                    found[i] = bytes(map(to_byte.get, name)) if in_bytes else name.encode()
                elif has_bytes and re.fullmatch('<0x[0-9A-F]{2}>', name):
                    found[i] = bytes([int(name[3:5], 16)])
                else:
                    found[i] = self._after_another(i).encode()
        return found

    def _after_another(self, i):
        """The text of a token that is not the first one: some decoders then put a space before."""
        one, two = (self.whole.decode([i] * n, skip_special_tokens=False) for n in (1, 2))
        return two.removeprefix(one) if two.startswith(one) else one


def byte_characters() -> dict[int, str]:
    """GPT-2's printable character for every byte: itself if printable, else from 256 upwards."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable},
            **{byte: chr(256 + i) for i, byte in enumerate(others)}}


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Errors of the `tokenizers` library as ValueError: it has a bare Exception for most, and for a
    panic a BaseException, after lines on standard error, which are suppressed."""
    nowhere, stderr = os.open(os.devnull, os.O_WRONLY), os.dup(2)
    os.dup2(nowhere, 2)
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != 'PanicException':
            raise
        raise ValueError(f'{what}: {error}') from None
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def from_text(text: str) -> Tokenizer:
    """The library's Tokenizer of a tokenizer.json, which neither truncates nor pads."""
    with library_errors('the tokenizers library refuses it'):
        made = Tokenizer.from_str(text)
    made.no_truncation()
    made.no_padding()
    return made


def pairs(merges: list) -> list[tuple[str, str]]:
    """Merges as pairs; before 2024 the library wrote them as one text."""
    return [tuple(pair.split(' ') if isinstance(pair, str) else pair) for pair in merges]


def without(data: dict[str, Any], name: str) -> str:
    """The tokenizer.json `data` whose token `name` has a random name, which no text contains."""
    unseen = f'<{secrets.token_hex(16)}>'
    rename = {name: unseen}
    model = dict(data['model'])
    if isinstance(model['vocab'], dict):
        model['vocab'] = {rename.get(token, token): i for token, i in model['vocab'].items()}
    else:
        model['vocab'] = [[rename.get(token, token), score] for token, score in model['vocab']]
    if model.get('unk_token') == name:
        model['unk_token'] = unseen
    if 'merges' in model:                               # none leads to it, or on from it
        model['merges'] = [pair for pair in model['merges']
                           if name not in (*pair, ''.join(pair))]
    added = [{**token, 'content': rename.get(token['content'], token['content'])}
             for token in data['added_tokens']]
    return json.dumps({**data, 'model': model, 'added_tokens': added})


def check_ids(data: dict[str, Any]) -> None:
    """Raise ValueError unless every token has its own id of 0 to 65,535."""
    vocab = data['model']['vocab']
    names = vocab if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}
    ids = {**names, **{token['content']: token['id'] for token in data['added_tokens']}}
    if not ids:
        raise ValueError('it has no tokens')
    for name, i in ids.items():
        if type(i) is not int or i < 0:
            raise ValueError(f'the token {name!r} has the id {i!r}, expected 0 or more')
    check_vocab_size(1 + max(ids.values()))
    if len(set(ids.values())) < len(ids):
        raise ValueError('two of its tokens have the same id')
    unknown = set(template_ids(data.get('post_processor'))) - set(ids.values())
    if unknown:
        raise ValueError(f'its template has the id {min(unknown)}, which no token has')


def template_ids(part: Any) -> list[int]:
    """The ids in the post_processor of a tokenizer.json, which it puts around a text."""
    parts = list(part.values()) if isinstance(part, dict) else part
    if not isinstance(parts, list):
        return []
    own = [i for i in part if type(i) is int]               # in an object it is a type_id
    return own + [i for one in parts for i in template_ids(one)]


def check_same_id(name: str, written: int, found: int | None) -> None:
    if written != found:
        raise ValueError(f'the added token {name!r} has the id {written}, but transformers takes '
                         f'it for {found}; save the tokenizer again with transformers')


def check_vocab_size(size: int) -> None:
    if size > MAX_VOCAB_SIZE:
        raise ValueError(f'tokenizer: {size:,} tokens do not fit the 16 bits of a token on disk; '
                         f'expected at most {MAX_VOCAB_SIZE:,}')


# The files of a folder, as transformers reads them.

def read_folder(path: Path) -> tuple[str, dict[str, str]]:
    """(tokenizer.json, special tokens by role) of the file `path`: a tokenizer.json, or GPT-2's
    older vocab.json with merges.txt. Special tokens that files beside it name are added."""
    config = read_object(path.with_name('tokenizer_config.json'))
    if 'added_tokens_decoder' not in config:
        config |= read_object(path.with_name('special_tokens_map.json'))
    is_pair = path.name == 'vocab.json'
    for key in ('split_special_tokens', *(('add_bos_token', 'add_eos_token') if is_pair else ())):
        if config.get(key):
            raise ValueError(f'tokenizer_config.json has {key}, which is not supported; save the '
                             f'tokenizer without it, with transformers as a tokenizer.json')
    if is_pair:
        text = from_pair(path, config)
        config = {'bos_token': EOT, 'eos_token': EOT, 'unk_token': EOT} | config
    else:
        text = path.read_text(encoding='utf-8-sig')
        data, wanted = parse_json(text, path.name, TokenizerFile), config.get('add_prefix_space')
        splits = data.get('pre_tokenizer') or {}
        if (config.get('tokenizer_class') in CLASSES and type(wanted) is bool   # it prefers this
                and splits.get('type') == 'ByteLevel' and splits.get('add_prefix_space') != wanted):
            splits['add_prefix_space'] = wanted
            text = json.dumps(data, ensure_ascii=False, indent=2)
    text = with_added_tokens(text, config, read_object(path.with_name('added_tokens.json')))
    added = {token['id']: token['content'] for token in json.loads(text)['added_tokens']}
    names = {role: added_token(config[role]).content for role in SPECIAL if config.get(role)}
    for file in ('config.json', 'generation_config.json'):          # the later one decides
        given = read_object(path.with_name(file)).get('eos_token_id')
        ids = given if isinstance(given, list) else [given]
        named = [added[i] for i in ids if type(i) is int and i in added]
        if named:
            names['eos_token'] = named[0]
    return text, {role: name for role, name in names.items() if name in added.values()}


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`, {} without the file."""
    return read_json(path, dict[str, Any]) if path.is_file() else {}


def from_pair(path: Path, config: dict[str, Any]) -> str:
    """The tokenizer.json of vocab.json and the merges.txt beside it, as transformers makes it."""
    kind = config.get('tokenizer_class') or read_object(
        path.with_name('config.json')).get('tokenizer_class') or CLASSES[0]
    if kind not in CLASSES:
        raise ValueError(f"it is transformers' {kind}, expected {CLASSES[0]}; save it with "
                         f'transformers as a tokenizer.json')
    check_ids({'model': {'vocab': read_object(path)}, 'added_tokens': []})
    merges = path.with_name('merges.txt')
    if not merges.is_file():
        raise ValueError('there is no merges.txt beside it')
    with library_errors('the tokenizers library refuses it'):
        made = Tokenizer(models.BPE(*models.BPE.read_file(str(path), str(merges)),
                                    continuing_subword_prefix='', end_of_word_suffix=''))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=config.get('add_prefix_space') is True)
    made.decoder = decoders.ByteLevel()
    return made.to_str(pretty=True)


def with_added_tokens(text: str, config: dict[str, Any], older: dict[str, int]) -> str:
    """The tokenizer.json `text` with the tokens that transformers adds to it: those of
    added_tokens_decoder (`older`: of added_tokens.json), then special tokens by role.

    Refuses one that tokenizer_config.json matches otherwise than tokenizer.json does: transformers
    follows the one, this program the other.
    """
    extra = config.get('extra_special_tokens') or config.get('additional_special_tokens') or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    other = [key for key, value in config.items()
             if key.endswith('_token') and key not in SPECIAL and isinstance(value, str | dict)]
    roles = [config[key] for key in [*SPECIAL, *other] if config.get(key)]
    special = [added_token(token) for token in [*roles, *extra]]
    names = {token.content for token in special}
    listed = {int(i): added_token(token)
              for i, token in config.get('added_tokens_decoder', {}).items()}
    listed = listed or {i: AddedToken(name, normalized=name not in names)
                        for name, i in older.items()}
    known, wanted = {token['content']: token for token in json.loads(text)['added_tokens']}, {}
    for token in [*(listed[i] for i in sorted(listed)), *special]:
        if token.content not in known:
            token.special = token.special or token.content in names
            wanted.setdefault(token.content, token)
    for token in listed.values():
        own = known.get(token.content)
        if own and any(getattr(token, key) != bool(own.get(key))
                       for key in ('lstrip', 'rstrip', 'single_word')):
            raise ValueError(f'the added token {token.content!r} has another lstrip, rstrip or '
                             f'single_word in tokenizer_config.json than in tokenizer.json; save '
                             f'the tokenizer again with transformers')
    if not wanted:
        return text
    made = from_text(text)
    made.add_tokens(list(wanted.values()))
    for i, token in listed.items():
        check_same_id(token.content, i, made.token_to_id(token.content))
    return made.to_str(pretty=True)


def added_token(token: str | dict[str, Any]) -> AddedToken:
    """The library's AddedToken of a name, or of its form in JSON."""
    if isinstance(token, str):
        return AddedToken(token, special=True)
    flags = ('single_word', 'lstrip', 'rstrip', 'normalized', 'special')
    return AddedToken(token['content'], **{key: token[key] for key in flags if key in token})


def tokenizer_files(folder: str | Path) -> list[str]:
    """The names of all files in `folder` that belong to a tokenizer, of whatever kind."""
    found = {path.name for pattern in TOKENIZER_FILES for path in Path(folder).glob(pattern)}
    return sorted(found)
