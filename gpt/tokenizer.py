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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from tiktoken.load import read_file_cached
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers)

from gpt.hf_tokenizer import (EOT, MAX_VOCAB_SIZE, HFTokenizer, TokenizerFile, byte_characters,
                              check_ids, check_vocab_size, pairs, read_folder, read_object,
                              template_ids, tokenizer_files)
from gpt.hub import cached_or_mirrored
from gpt.shapes import parse_json

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
GPT2_MERGES = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe'
GPT2_SHA256 = '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5'    # of this file
GPT2_TOKENS = (           # sha256 of all but <|endoftext|>
    'f5f299f91c3753a53068cda7a6ab8e10244a9996c48fefd3862917ecd7e25cc7')


class Fast(tiktoken.Encoding):
    """A tokenizer that tiktoken reads, with the attributes of an HFTokenizer. The id of a token is
    its place in `tokens`; <|endoftext|>, if there is one, comes after them."""
    can_be_cut = True

    def __init__(self, name: str, pattern: str, tokens: Iterable[bytes], has_eot: bool):
        ranks = {token: i for i, token in enumerate(tokens)}
        self.eot, self.eot_text = (len(ranks), EOT) if has_eot else (None, '')
        self.tokens, self.names = [*ranks, *([EOT.encode()] if has_eot else [])], {}
        super().__init__(name, pat_str=pattern, mergeable_ranks=ranks,
                         special_tokens={EOT: self.eot} if has_eot else {})

    def ids(self, text: str) -> np.ndarray:
        """Ids of `text` (uint16)."""
        return self.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)


class BytePairs(Fast):
    """Byte-level BPE: `vocab` in GPT-2's characters for bytes, merges [(left, right)]."""

    def __init__(self, name: str, vocab: dict[str, int], merges: list[tuple[str, str]],
                 has_eot: bool):
        to_byte = {char: byte for byte, char in byte_characters().items()}
        tokens = (bytes(map(to_byte.get, token)) for token in sorted(vocab, key=vocab.get))
        super().__init__(name, GPT2_PATTERN, tokens, has_eot)
        self.vocab, self.merges = vocab, merges

    @cached_property
    def text(self) -> str:
        """The tokenizer.json."""
        special = [AddedToken(EOT, normalized=False)] if self.eot_text else []
        made = Tokenizer(models.BPE({**self.vocab, **({EOT: self.eot} if special else {})},
                                    self.merges))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        made.add_special_tokens(special)
        return made.to_str(pretty=True)


class Characters(Fast):
    """One token for each character of `alphabet`, in order."""

    def __init__(self, alphabet: Sequence[str]):
        check_vocab_size(len(alphabet))
        super().__init__('chars', CHARS_PATTERN, map(str.encode, alphabet), False)
        self.alphabet = {char: i for i, char in enumerate(alphabet)}

    def ids(self, text: str) -> np.ndarray:
        """Ids of `text` (uint16); ValueError for a character that is not in the alphabet."""
        unknown = set(text) - self.alphabet.keys()
        if unknown:
            raise ValueError(f'the character {min(unknown)!r} is not one of the {self.n_vocab} of '
                             f'this tokenizer, which has only those of the text it was made for')
        return super().ids(text)

    @cached_property
    def text(self) -> str:
        """The tokenizer.json."""
        made = Tokenizer(models.WordLevel(self.alphabet, unk_token=''))
        made.pre_tokenizer = pre_tokenizers.Split(Regex(CHARS_PATTERN), behavior='isolated')
        made.decoder = decoders.Fuse()
        return made.to_str(pretty=True)


Encoding = Fast | HFTokenizer


def build(name: str, texts: Callable[[], Iterable[str]]) -> Encoding:
    """The tokenizer called `name`; texts() returns the corpus, which only bpe:N and chars read."""
    kind, _, size = name.partition(':')
    if name == 'gpt2':
        return gpt2()
    if name == 'bytes':
        return byte_pairs('bytes', [])
    if name == 'chars':
        return Characters(sorted(set().union(*map(set, texts()))))
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


@cache
def gpt2() -> BytePairs:
    """GPT-2's tokenizer, from OpenAI's merges or else the hub's tokenizer.json, in its cache or on
    a mirror."""
    try:
        lines = read_file_cached(GPT2_MERGES, GPT2_SHA256).decode().split('\n')[1:-1]
        return byte_pairs('gpt2', map(str.split, lines), byte_characters().values())
    except Exception as error:      # requests has many errors for a missing network
        with suppress(Exception):   # and so has the hub
            found = load(cached_or_mirrored('openai-community/gpt2', 'tokenizer.json'))
            if found.name == 'gpt2':                    # from_json() has checked its sha256
                return found
        raise ValueError(
            f"tokenizer 'gpt2': its merges are not cached and could not be downloaded "
            f"({type(error).__name__}); put OpenAI's vocab.bpe as "
            f"{hashlib.sha1(GPT2_MERGES.encode()).hexdigest()} into a folder and set "
            f"TIKTOKEN_CACHE_DIR to it, or name a mirror of the hub in HF_ENDPOINT; "
            f"--tokenizer=bpe:4096 needs no network") from None


def byte_pairs(name: str, merges: Iterable[Sequence[str]],
               alphabet: Iterable[str] = ()) -> BytePairs:
    """256 bytes, then a token for each merge in the order they were learned, then <|endoftext|>.

    alphabet: GPT-2's characters for the bytes, in order of their ids; (): that of the bytes.
    """
    names, merges = byte_characters(), [tuple(pair) for pair in merges]
    tokens = [*(alphabet or (names[byte] for byte in range(256))), *map(''.join, merges)]
    return BytePairs(name, {token: i for i, token in enumerate(dict.fromkeys(tokens))},
                     merges, True)


def train_byte_pairs(texts: Iterable[str], vocab_size: int) -> BytePairs:
    """Byte-pair encoding of vocab_size tokens, fewer of a small corpus (Sennrich et al. 2016)."""
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
    """Call work(), which may run for minutes without Python, in a thread that ends with the
    program, so that Ctrl-C is answered."""
    future = ThreadPoolExecutor(1).submit(work)
    while not future.done():
        wait([future], timeout=0.1)
    future.result()                                     # raises what work() raised


def encode(encoding: Encoding, text: str) -> np.ndarray:
    """Ids of `text` (uint16); the end-of-text token in it is ordinary text.

    Lone surrogates, which UTF-8 does not have, become U+FFFD. Raises ValueError for a character
    that the tokenizer does not have.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    parts = [encoding.ids(piece)
             for piece in (pieces_of(text) if encoding.can_be_cut else [text])]
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


def encode_documents(encoding: Encoding, texts: list[str]) -> np.ndarray:
    """Ids of all texts (uint16), each after the end-of-text token if `encoding` has one.

    tiktoken takes them in one call, which is a tenth faster, unless a text contains
    <|endoftext|> or is very long.
    """
    eot = encoding.eot
    is_fast = eot is not None and isinstance(encoding, Fast)
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
    eot, name = encoding.eot, encoding.eot_text
    if eot is not None and text.startswith(name):
        return [eot, *encode(encoding, text.removeprefix(name)).tolist()]
    if isinstance(encoding, HFTokenizer):
        return encoding.encode_prompt(text) or [eot or 0]
    return encode(encoding, text).tolist() or [eot or 0]


def token_bytes(encoding: Encoding) -> list[bytes]:
    """The bytes of every token in order of its id; b'' for the one that ends a text."""
    return [b'' if i == encoding.eot else token for i, token in enumerate(encoding.tokens)]


def special_names(encoding: Encoding) -> dict[str, str]:
    """{'eos_token': …} and other roles of special tokens, as tokenizer_config.json has them."""
    roles = ('bos_token', 'eos_token', 'unk_token') if encoding.eot_text else ()
    return {**{role: encoding.eot_text for role in roles}, **encoding.names}


def fingerprint(encoding: Encoding) -> str:
    """sha256 of all that decides how a text is encoded: equal ones encode alike."""
    if isinstance(encoding, HFTokenizer):
        facts = [encoding.eot, {key: value for key, value in encoding.data.items()
                                if key not in ('version', 'truncation', 'padding')}]
    else:
        facts = [isinstance(encoding, Characters), [(encoding.eot, EOT)] if encoding.eot_text else
                 [], [token.hex() for token in token_bytes(encoding) if token]]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def to_json(encoding: Encoding) -> str:
    """The Hugging Face tokenizer.json of `encoding`: of an HFTokenizer the file it came from."""
    return encoding.text


def from_json(text: str, names: dict[str, str] | None = None) -> Encoding:
    """The tokenizer of a tokenizer.json, ValueError if it cannot be used; names: its special tokens
    by role."""
    data = parse_json(text, 'tokenizer.json', TokenizerFile)
    check_ids(data)
    return characters_of(data) or byte_pairs_of(data) or HFTokenizer(text, names or {})


def characters_of(data: dict[str, Any]) -> Characters | None:
    """One of our 'chars', None for another tokenizer."""
    vocab, splits = data['model']['vocab'], data.get('pre_tokenizer') or {}
    is_ours = (data['model'].get('type') == 'WordLevel' and not data['added_tokens']
               and data['model'].get('unk_token') == ''
               and not data.get('normalizer') and not data.get('post_processor')
               and splits.get('pattern') == {'Regex': CHARS_PATTERN}
               and splits.get('behavior') == 'Isolated'
               and all(len(token) == 1 for token in vocab)
               and sorted(vocab.values()) == list(range(len(vocab))))
    return Characters(sorted(vocab, key=vocab.get)) if is_ours else None


def byte_pairs_of(data: dict[str, Any]) -> BytePairs | None:
    """GPT-2's byte-level BPE, None for a tokenizer of which tiktoken would not give the same ids.

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
    made = BytePairs(f'bpe:{len(ids)}' if longer else 'bytes', vocab, merges, bool(added))
    if added and hashlib.sha256(b' '.join(made.tokens[:-1])).hexdigest() == GPT2_TOKENS:
        made.name = 'gpt2'
    return made


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
    """(the tokenizer without added tokens whose id is `rows` or more, their names); ValueError if
    other tokens have such an id."""
    if encoding.n_vocab <= rows:
        return encoding, []
    data = json.loads(to_json(encoding))
    names = [token['content'] for token in data['added_tokens'] if token['id'] >= rows]
    data['added_tokens'] = [token for token in data['added_tokens'] if token['id'] < rows]
    if names:
        vocab = data['model']['vocab']
        if isinstance(vocab, dict):
            data['model']['vocab'] = {name: i for name, i in vocab.items() if name not in names}
        if any(i >= rows for i in template_ids(data.get('post_processor'))):
            data['post_processor'] = None               # what it puts around a text has no row
        roles = {role: name for role, name in special_names(encoding).items() if name not in names}
        encoding = from_json(json.dumps(data, ensure_ascii=False, indent=2), roles)
    if encoding.n_vocab > rows:
        raise ValueError(f'its tokenizer has {encoding.n_vocab:,} tokens, the model {rows:,}')
    return encoding, names


def load(path: str | Path) -> Encoding:
    """The tokenizer of a tokenizer.json, or of a vocab.json and the merges.txt beside it;
    ValueError for one that cannot be used."""
    path = Path(path)
    try:
        return from_json(*read_folder(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f'it lacks {error}' if isinstance(error, KeyError) else error
        raise ValueError(f'{path}: cannot be used as a tokenizer ({reason})') from None
