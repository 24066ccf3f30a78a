"""
Text to token ids and back, as the `tokenizers` library and so transformers does:

    gpt2    GPT-2's 50,257 tokens
    bpe:N   N tokens of byte-pair encoding trained on a corpus (GPT-2's algorithm, new merges)
    bytes   256 bytes and <|endoftext|>
    chars   the characters of the corpus, as in nanoGPT's character data sets; no <|endoftext|>
    a path  of a run, data set or model folder: its tokenizer

Each is stored as a Hugging Face tokenizer.json. Those of the first four kinds are read by
tiktoken, which gives the same ids several times as fast; any other by the `tokenizers` library.
"""

import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers)

from gpt.hf_tokenizer import (EOT, MAX_VOCAB_SIZE, HFTokenizer, TokenizerFile, byte_characters,
                              check_ids, check_vocab_size, read_folder, read_object, template_ids,
                              tokenizer_files)
from gpt.hub import cached_or_mirrored
from gpt.shapes import parse_json

Encoding = tiktoken.Encoding | HFTokenizer
GPT2_PATTERN = (    # OpenAI's, with the possessive quantifiers of tiktoken, which match the same
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""")
CHARS_PATTERN = r'[\s\S]'                   # every character by itself
LONGEST_TOKEN = 128                         # bytes of a trained token, as of GPT-2's longest
LONGEST_WORD = 4096                         # bytes that training merges at once
PIECE = 2 ** 18                             # characters encoded at once: tiktoken's regular
                                            # expression fails in 700,000 characters of white space
SPACE = '\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000'
CUT = re.compile(f'[{SPACE}](?=[^{SPACE}])')    # before such a character the pattern always
                                            # separates, whatever the context
GPT2_FILES = ('6d1cbeee0f20b3d9449abfede4726ed8212e3aee',
              '6c7ea1a7e38e3a7f062df639a5b80947f075ffe6')
GPT2_TOKENS = (           # sha256 of all but <|endoftext|>
    'f5f299f91c3753a53068cda7a6ab8e10244a9996c48fefd3862917ecd7e25cc7')


def build(name: str, texts: Callable[[], Iterable[str]]) -> Encoding:
    """The tokenizer called `name`; texts() returns the corpus, which only bpe:N and chars read."""
    kind, _, size = name.partition(':')
    if name == 'gpt2':
        return gpt2()
    if name == 'bytes':
        return byte_pairs('bytes', [])
    if name == 'chars':
        return characters(sorted(set().union(*map(set, texts()))))
    if kind == 'bpe' and size.isascii() and size.isdigit():
        return train_byte_pairs(texts(), int(size))
    file = stored(name)
    if file:
        encoding = load(file)
        rows = read_object(file.with_name('config.json')).get('vocab_size')
        try:
            return limited(encoding, rows if type(rows) is int else MAX_VOCAB_SIZE)[0]
        except ValueError as error:
            raise ValueError(f'{file}: {error}') from None
    raise ValueError(f"tokenizer: given {name!r}, expected 'gpt2', 'bpe:N' such as bpe:4096, "
                     f"'bytes', 'chars', or a folder with a tokenizer.json")


def stored(name: str | Path) -> Path | None:
    """The tokenizer file of the folder `name`, or of the newest step in it, for load()."""
    files = [Path(name, 'tokenizer.json'), Path(name, 'vocab.json'),
             *sorted(Path(name).glob('step_*/tokenizer.json'))[::-1]]
    return next((file for file in files if file.is_file()), None)


def gpt2() -> tiktoken.Encoding:
    """GPT-2's Encoding, from OpenAI's files or else the hub's, in its cache or on a mirror."""
    try:
        return tiktoken.get_encoding('gpt2')
    except Exception as error:      # requests has many errors for a missing network
        with suppress(Exception):   # and so has the hub
            found = load(cached_or_mirrored('openai-community/gpt2', 'tokenizer.json'))
            if found.name == 'gpt2':                    # from_json() has checked its sha256
                return found
        raise ValueError(
            f"tokenizer 'gpt2': its two files are not cached and could not be downloaded "
            f"({type(error).__name__}); put OpenAI's vocab.bpe as {GPT2_FILES[0]} and "
            f"encoder.json as {GPT2_FILES[1]} into a folder and set TIKTOKEN_CACHE_DIR to it, or "
            f"name a mirror of the hub in HF_ENDPOINT; --tokenizer=bpe:4096 needs no network"
        ) from None


class BytePairs(tiktoken.Encoding):
    """Byte-level BPE with its merges, [(left, right)] in GPT-2's characters for bytes."""

    def __init__(self, name: str, vocab: dict[str, int], merges: list[tuple[str, str]],
                 eot: int | None):
        to_byte = {char: byte for byte, char in byte_characters().items()}
        ranks = {bytes(map(to_byte.get, token)): i for token, i in vocab.items()}
        super().__init__(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                         special_tokens={} if eot is None else {EOT: eot})
        self.merges = merges


def characters(alphabet: Iterable[str]) -> tiktoken.Encoding:
    """One token for each character of `alphabet`, in order."""
    check_vocab_size(len(alphabet))
    return tiktoken.Encoding('chars', pat_str=CHARS_PATTERN, special_tokens={},
                             mergeable_ranks={char.encode(): i for i, char in enumerate(alphabet)})


def byte_pairs(name: str, merges: Iterable[tuple[str, str]]) -> BytePairs:
    """The 256 bytes, then a token for each merge in the order they were learned, then
    <|endoftext|>."""
    names = byte_characters()
    vocab = {names[byte]: byte for byte in range(256)}
    merges = [tuple(pair) for pair in merges]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    return BytePairs(name, vocab, merges, len(vocab))


def train_byte_pairs(texts: Iterable[str], vocab_size: int) -> BytePairs:
    """Byte-pair encoding of vocab_size tokens trained on texts (Sennrich et al. 2016).

    A small corpus may have fewer pairs; then the vocabulary is smaller.
    """
    check_vocab_size(vocab_size)
    if vocab_size < 257:
        raise ValueError(f'tokenizer: given bpe:{vocab_size}, expected at least bpe:257 '
                         f'(256 bytes and {EOT}); --tokenizer=bytes has only these')
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.FixedLength(LONGEST_WORD)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, show_progress=sys.stderr.isatty(),
        max_token_length=LONGEST_TOKEN, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    interruptible(lambda: trained.train_from_iterator(texts, trainer))
    return byte_pairs(f'bpe:{vocab_size}', json.loads(trained.to_str())['model']['merges'])


def interruptible(work: Callable[[], None]) -> None:
    """Call work(), which may run for minutes without Python, so that Ctrl-C is answered.

    It runs in a thread that ends with the program.
    """
    failed = []

    def catch():
        try:
            work()
        except BaseException as error:
            failed.append(error)
    thread = threading.Thread(target=catch, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if failed:
        raise failed[0]


def encode(encoding: Encoding, text: str) -> np.ndarray:
    """Ids of `text` (uint16); the end-of-text token in it is ordinary text.

    Lone surrogates, which UTF-8 does not have, become U+FFFD. Raises ValueError for a character
    that the tokenizer does not have.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    if isinstance(encoding, HFTokenizer):
        pieces = pieces_of(text) if encoding.can_be_cut else [text]
        parts = [np.array(encoding.encode(piece), np.uint16) for piece in pieces]
    else:
        check_characters(encoding, text)
        parts = [encoding.encode_to_numpy(piece, disallowed_special=()).astype(np.uint16)
                 for piece in pieces_of(text)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def pieces_of(text: str) -> Iterator[str]:
    """The text in pieces of about PIECE characters, which encode alone as in the whole."""
    start = 0
    while len(text) - start > PIECE:
        cut = CUT.search(text, start + PIECE)
        if not cut:
            break
        yield text[start:cut.start()]
        start = cut.start()
    if start < len(text) or not text:
        yield text[start:]


def check_characters(encoding: tiktoken.Encoding, text: str) -> None:
    unknown = set(text) - alphabet(encoding) if is_chars(encoding) else ()
    if unknown:
        raise ValueError(f'the character {min(unknown)!r} is not one of the {encoding.n_vocab} of '
                         f'this tokenizer, which has only those of the text it was made for')


@lru_cache(1)
def alphabet(encoding: tiktoken.Encoding) -> set[str]:
    return {token.decode() for token in encoding.token_byte_values()}


def encode_documents(encoding: Encoding, texts: list[str]) -> np.ndarray:
    """Ids of all texts (uint16), each after the end-of-text token if `encoding` has one.

    tiktoken takes them in one call, which is a tenth faster, unless a text contains
    <|endoftext|> or is very long.
    """
    eot = eot_id(encoding)
    is_fast = eot is not None and isinstance(encoding, tiktoken.Encoding)
    if is_fast and max(map(len, texts), default=0) <= PIECE:
        joined = ''.join(EOT + text for text in texts)
        if joined.count(EOT) == len(texts):
            return encoding.encode_to_numpy(joined, allowed_special={EOT},
                                       disallowed_special=()).astype(np.uint16)
    start = np.array([] if eot is None else [eot], np.uint16)
    parts = [np.empty(0, np.uint16)]
    for text in texts:
        parts += [start, encode(encoding, text)]
    return np.concatenate(parts)


def prompt_ids(encoding: Encoding, text: str) -> list[int]:
    """The ids of a prompt. The end-of-text token at its beginning is the token that begins a
    document, and stands for an empty prompt; elsewhere it is text."""
    eot, name = eot_id(encoding), eot_text(encoding)
    if eot is not None and text.startswith(name):
        return [eot, *encode(encoding, text.removeprefix(name)).tolist()]
    if isinstance(encoding, HFTokenizer):
        return encoding.encode_prompt(text) or [eot or 0]
    return encode(encoding, text).tolist() or [eot or 0]


def is_chars(encoding: tiktoken.Encoding) -> bool:
    return encoding._pat_str == CHARS_PATTERN


def eot_id(encoding: Encoding) -> int | None:
    """The id of the token that ends a text, <|endoftext|> or the tokenizer's eos_token; None
    without it."""
    if isinstance(encoding, HFTokenizer):
        return encoding.eot
    return encoding.encode_single_token(EOT) if EOT in encoding.special_tokens_set else None


def eot_text(encoding: Encoding) -> str:
    """How the token that ends a text is written, '' without it."""
    if isinstance(encoding, HFTokenizer):
        return encoding.eot_text
    return EOT if EOT in encoding.special_tokens_set else ''


def token_bytes(encoding: Encoding) -> list[bytes]:
    """The bytes of every token in order of its id; b'' for the one that ends a text."""
    if isinstance(encoding, HFTokenizer):
        return [b'' if i == encoding.eot else token for i, token in enumerate(encoding.tokens)]
    tokens = {encoding.encode_single_token(token): token for token in encoding.token_byte_values()}
    return [tokens.get(i, b'') for i in range(encoding.n_vocab)]


def special_names(encoding: Encoding) -> dict[str, str]:
    """{'eos_token': …} and other roles of special tokens, as tokenizer_config.json has them."""
    own = encoding.names if isinstance(encoding, HFTokenizer) else {}
    name = eot_text(encoding)
    roles = {role: name for role in ('bos_token', 'eos_token', 'unk_token') if name}
    return {**roles, **own}


def fingerprint(encoding: Encoding) -> str:
    """sha256 of all that decides how a text is encoded: equal ones encode alike."""
    if isinstance(encoding, HFTokenizer):
        data = {key: value for key, value in encoding.data.items()
                if key not in ('version', 'truncation', 'padding')}
        facts = [encoding.eot, with_pairs(data)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    eot = eot_id(encoding)
    facts = [is_chars(encoding), [] if eot is None else [(eot, EOT)],
             [token.hex() for token in token_bytes(encoding) if token]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def with_pairs(data: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json whose merges are pairs, as the library writes them since 2024."""
    if 'merges' not in data['model']:
        return data
    return {**data, 'model': {**data['model'], 'merges': pairs(data['model']['merges'])}}


def pairs(merges: list) -> list[tuple[str, str]]:
    return [tuple(pair.split(' ') if isinstance(pair, str) else pair) for pair in merges]


@lru_cache(4)
def to_json(encoding: Encoding) -> str:
    """The Hugging Face tokenizer.json of `encoding`: of an HFTokenizer the file it came from."""
    if isinstance(encoding, HFTokenizer):
        return encoding.text
    tokens = token_bytes(encoding)
    if is_chars(encoding):
        vocab = {token.decode(): i for i, token in enumerate(tokens)}
        made = Tokenizer(models.WordLevel(vocab, unk_token=''))
        made.pre_tokenizer = pre_tokenizers.Split(Regex(CHARS_PATTERN), behavior='isolated')
        made.decoder = decoders.Fuse()
        return made.to_str(pretty=True)
    names, eot = byte_characters(), eot_id(encoding)
    vocab = {''.join(map(names.get, token)): i for i, token in enumerate(tokens) if token}
    merges = encoding.merges if isinstance(encoding, BytePairs) else recovered_merges(tokens)
    special = [] if eot is None else [AddedToken(EOT, normalized=False)]
    made = Tokenizer(models.BPE({**vocab, **({EOT: eot} if special else {})}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    return made.to_str(pretty=True)


def recovered_merges(tokens: list[bytes]) -> list[tuple[str, str]]:
    """The merges of tiktoken's own 'gpt2', which keeps only their ranks: for each token the two
    that its bytes come to when merged by all lower ranks."""
    names, found = byte_characters(), []
    ranks = {token: i for i, token in enumerate(tokens) if token}
    for token in (token for token in ranks if len(token) > 1):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            possible = [ranks.get(left + right, MAX_VOCAB_SIZE)
                        for left, right in zip(parts, parts[1:])]
            i = possible.index(min(possible))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        found.append(tuple(''.join(map(names.get, part)) for part in parts))
    return found


def from_json(text: str, names: dict[str, str] | None = None) -> Encoding:
    """The tokenizer of a tokenizer.json; names: its special tokens by role.

    Raises ValueError for one that cannot be used.
    """
    data = parse_json(text, 'tokenizer.json', TokenizerFile)
    check_ids(data)
    return characters_of(data) or byte_pairs_of(data) or HFTokenizer(text, names or {})


def characters_of(data: dict[str, Any]) -> tiktoken.Encoding | None:
    """The Encoding of one of our 'chars', None for another tokenizer."""
    vocab, splits = data['model']['vocab'], data.get('pre_tokenizer') or {}
    is_ours = (data['model'].get('type') == 'WordLevel' and not data['added_tokens']
               and data['model'].get('unk_token') == ''
               and not data.get('normalizer') and not data.get('post_processor')
               and splits.get('pattern') == {'Regex': CHARS_PATTERN}
               and splits.get('behavior') == 'Isolated'
               and all(len(token) == 1 for token in vocab)
               and sorted(vocab.values()) == list(range(len(vocab))))
    return characters(sorted(vocab, key=vocab.get)) if is_ours else None


def byte_pairs_of(data: dict[str, Any]) -> BytePairs | None:
    """The Encoding of GPT-2's byte-level BPE, None for a tokenizer of which tiktoken would not give
    the same ids.

    tiktoken merges the pair whose result has the lowest id, and takes a word that is a token whole;
    `tokenizers` merges the pair that comes first in the list. They are equal if every longer token
    has one merge, in the order of the ids, and merging its bytes leads to it: then two neighbours
    that make a token are always the two of its merge.
    """
    if not has_gpt2_parts(data):
        return None
    model, added = data['model'], {token['content']: token['id'] for token in data['added_tokens']}
    vocab = {token: i for token, i in model['vocab'].items() if token not in added}
    alphabet = set(byte_characters().values())
    ids = sorted([*vocab.values(), *added.values()])
    if (added not in ({}, {EOT: len(vocab)}) or ids != list(range(len(ids)))
            or not alphabet <= set(vocab) or not all(alphabet.issuperset(name) for name in vocab)):
        return None
    merges = pairs(model['merges'])
    longer = [name for name in sorted(vocab, key=vocab.get) if len(name) > 1]
    if [''.join(pair) for pair in merges] != longer:
        return None
    merge = models.BPE({**vocab, **added}, merges).tokenize
    if any(len(merge(name)) > 1 for name in longer):
        return None
    to_byte = {char: byte for byte, char in byte_characters().items()}
    tokens = b' '.join(bytes(map(to_byte.get, name)) for name in sorted(vocab, key=vocab.get))
    known = added and hashlib.sha256(tokens).hexdigest() == GPT2_TOKENS
    name = 'gpt2' if known else f'bpe:{len(vocab) + len(added)}' if longer else 'bytes'
    return BytePairs(name, vocab, merges, added.get(EOT))


def has_gpt2_parts(data: dict[str, Any]) -> bool:
    """Whether all parts but the vocabulary are GPT-2's."""
    model = data['model']
    splits, decoder, after = (data.get(key) or {}
                              for key in ('pre_tokenizer', 'decoder', 'post_processor'))
    return ('merges' in model and model.get('type', 'BPE') == 'BPE'
            and not any(model.get(key) for key in (
                'dropout', 'continuing_subword_prefix', 'end_of_word_suffix'))
            and not data.get('normalizer') and splits.get('type') == 'ByteLevel'
            and not splits.get('add_prefix_space') and splits.get('use_regex', True)
            and decoder.get('type') == 'ByteLevel'
            and after.get('type', 'ByteLevel') == 'ByteLevel')


def limited(encoding: Encoding, rows: int) -> tuple[Encoding, list[str]]:
    """(the tokenizer without added tokens whose id is `rows` or more, their names).

    Raises ValueError if other tokens have such an id.
    """
    if encoding.n_vocab <= rows:
        return encoding, []
    data = json.loads(to_json(encoding))
    names = [token['content'] for token in data['added_tokens'] if token['id'] >= rows]
    data['added_tokens'] = [token for token in data['added_tokens'] if token['id'] < rows]
    if names:
        vocab = data['model']['vocab']
        if isinstance(vocab, dict):
            data['model']['vocab'] = {name: i for name, i in vocab.items() if name not in names}
        if any(i >= rows for i in template_ids(data)):
            data['post_processor'] = None               # what it puts around a text has no row
        roles = {role: name for role, name in special_names(encoding).items() if name not in names}
        encoding = from_json(json.dumps(data, ensure_ascii=False, indent=2), roles)
    if encoding.n_vocab > rows:
        raise ValueError(f'its tokenizer has {encoding.n_vocab:,} tokens, the model {rows:,}')
    return encoding, names


def load(path: str | Path) -> Encoding:
    """The tokenizer of a tokenizer.json, or of a vocab.json and the merges.txt beside it.

    Raises ValueError for one that cannot be used.
    """
    path = Path(path)
    try:
        return from_json(*read_folder(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f'it lacks {error}' if isinstance(error, KeyError) else error
        raise ValueError(f'{path}: cannot be used as a tokenizer ({reason})') from None
