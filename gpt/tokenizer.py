"""
Text to token ids and back, always by a tiktoken.Encoding:

    gpt2    GPT-2's 50,257 tokens
    bpe:N   N tokens of byte-pair encoding trained on a corpus (GPT-2's algorithm, new merges)
    bytes   256 bytes and <|endoftext|>
    chars   the characters of the corpus, as in nanoGPT's character data sets; no <|endoftext|>
    a path  of a run, data set or model folder: its tokenizer

An encoding is stored as a Hugging Face tokenizer.json, which transformers reads too.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import tiktoken

EOT = '<|endoftext|>'
GPT2_PATTERN = (    # OpenAI's, with the possessive quantifiers of tiktoken, which match the same
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""")
CHARS_PATTERN = r'[\s\S]'                   # every character by itself
MAX_VOCAB_SIZE = 2 ** 16                    # ids are stored as uint16
PIECE = 2 ** 18                             # characters encoded at once: tiktoken's regular
                                            # expression fails in 700,000 characters of white space
SPACE = '\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000'
CUT = re.compile(f'[{SPACE}](?=[^{SPACE}])')    # before such a character the pattern always
                                            # separates, whatever the context
GPT2_FILES = ('6d1cbeee0f20b3d9449abfede4726ed8212e3aee',
              '6c7ea1a7e38e3a7f062df639a5b80947f075ffe6')
GPT2_TOKENS = (           # sha256 of all but <|endoftext|>
    'f5f299f91c3753a53068cda7a6ab8e10244a9996c48fefd3862917ecd7e25cc7')


def build(name: str, texts: Callable[[], Iterable[str]]) -> tiktoken.Encoding:
    """The Encoding called `name`; texts() returns the corpus, which only bpe:N and chars read."""
    kind, _, size = name.partition(':')
    if name == 'gpt2':
        return gpt2()
    if name == 'bytes':
        return byte_pairs('bytes', [])
    if name == 'chars':
        return characters(sorted(set().union(*map(set, texts()))))
    if kind == 'bpe' and size.isdigit():
        return train_byte_pairs(texts(), int(size))
    file = stored(name)
    if file:
        return load(file)
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
            from huggingface_hub import constants, hf_hub_download
            no_mirror = constants.ENDPOINT == 'https://huggingface.co'
            found = load(hf_hub_download('openai-community/gpt2', 'tokenizer.json',
                                         local_files_only=no_mirror))
            if found.name == 'gpt2':                    # from_json() has checked its sha256
                return found
        raise ValueError(
            f"tokenizer 'gpt2': its two files are not cached and could not be downloaded "
            f"({type(error).__name__}); put OpenAI's vocab.bpe as {GPT2_FILES[0]} and "
            f"encoder.json as {GPT2_FILES[1]} into a folder and set TIKTOKEN_CACHE_DIR to it, or "
            f"name a mirror of the hub in HF_ENDPOINT; --tokenizer=bpe:4096 needs no network"
        ) from None


def characters(alphabet: Iterable[str]) -> tiktoken.Encoding:
    """One token for each character of `alphabet`, in order."""
    check_vocab_size(len(alphabet))
    return tiktoken.Encoding('chars', pat_str=CHARS_PATTERN, special_tokens={},
                             mergeable_ranks={char.encode(): i for i, char in enumerate(alphabet)})


def byte_pairs(name: str, merged: Iterable[bytes]) -> tiktoken.Encoding:
    """The 256 bytes, then the tokens `merged` in the order they were learned, then <|endoftext|>.
    """
    ranks = {bytes([i]): i for i in range(256)}
    for token in merged:
        ranks.setdefault(token, len(ranks))
    return tiktoken.Encoding(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                             special_tokens={EOT: len(ranks)})


def train_byte_pairs(texts: Iterable[str], vocab_size: int) -> tiktoken.Encoding:
    """Byte-pair encoding of vocab_size tokens trained on texts (Sennrich et al. 2016).

    A small corpus may have fewer pairs; then the vocabulary is smaller.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    check_vocab_size(vocab_size)
    if vocab_size < 257:
        raise ValueError(f'tokenizer: given bpe:{vocab_size}, expected at least bpe:257 '
                         f'(256 bytes and {EOT}); --tokenizer=bytes has only these')
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - 1, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    pairs = json.loads(trained.to_str())['model']['merges']
    to_byte = {char: byte for byte, char in byte_characters().items()}
    merged = [bytes(to_byte[char] for char in left + right) for left, right in pairs]
    return byte_pairs(f'bpe:{vocab_size}', merged)


def check_vocab_size(size: int) -> None:
    if size > MAX_VOCAB_SIZE:
        raise ValueError(f'tokenizer: {size:,} tokens do not fit the 16 bits of a token on disk; '
                         f'expected at most {MAX_VOCAB_SIZE:,}')


def encode(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """Ids of `text` (uint16); <|endoftext|> in it is ordinary text.

    Raises ValueError for a character that a 'chars' encoding does not have.
    """
    unknown = set(text) - alphabet(encoding) if is_chars(encoding) else ()
    if unknown:
        raise ValueError(f'the character {min(unknown)!r} is not one of the {encoding.n_vocab} of '
                         f'this tokenizer, which has only those of the text it was made for')
    pieces, start = [], 0
    while start < len(text) or not pieces:
        cut = CUT.search(text, start + PIECE) if len(text) - start > PIECE else None
        stop = cut.start() if cut else len(text)
        ids = encoding.encode_to_numpy(text[start:stop], disallowed_special=())
        pieces.append(ids.astype(np.uint16))
        start = stop
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


@lru_cache(1)
def alphabet(encoding: tiktoken.Encoding) -> set[str]:
    return {token.decode() for token in encoding.token_byte_values()}


def encode_documents(encoding: tiktoken.Encoding, texts: list[str]) -> np.ndarray:
    """Ids of all texts (uint16), each after <|endoftext|> if `encoding` has one.

    In one call, which is a tenth faster, unless a text contains <|endoftext|> or is very long.
    """
    eot = eot_id(encoding)
    if eot is not None and max(map(len, texts), default=0) <= PIECE:
        joined = ''.join(EOT + text for text in texts)
        if joined.count(EOT) == len(texts):
            return encoding.encode_to_numpy(joined, allowed_special={EOT},
                                       disallowed_special=()).astype(np.uint16)
    start = np.array([] if eot is None else [eot], np.uint16)
    parts = [np.empty(0, np.uint16)]
    for text in texts:
        parts += [start, encode(encoding, text)]
    return np.concatenate(parts)


def is_chars(encoding: tiktoken.Encoding) -> bool:
    return encoding._pat_str == CHARS_PATTERN


def eot_id(encoding: tiktoken.Encoding) -> int | None:
    """The id of <|endoftext|>, None without it."""
    return encoding.encode_single_token(EOT) if EOT in encoding.special_tokens_set else None


def token_bytes(encoding: tiktoken.Encoding) -> list[bytes]:
    """The bytes of every token in order of its id; b'' for special tokens."""
    tokens = {encoding.encode_single_token(token): token for token in encoding.token_byte_values()}
    return [tokens.get(i, b'') for i in range(encoding.n_vocab)]


def special_tokens(encoding: tiktoken.Encoding) -> list[tuple[int, str]]:
    """[(id, name)] of <|endoftext|> and other special tokens, in order."""
    names = encoding.special_tokens_set
    return sorted((encoding.encode_single_token(name), name) for name in names)


def fingerprint(encoding: tiktoken.Encoding) -> str:
    """sha256 of all tokens and the kind of splitting: equal ones encode alike."""
    facts = [is_chars(encoding), special_tokens(encoding),
             [token.hex() for token in token_bytes(encoding) if token]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def byte_characters() -> dict[int, str]:
    """GPT-2's printable character for every byte: itself if printable, else from 256 upwards."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable},
            **{byte: chr(256 + i) for i, byte in enumerate(others)}}


def to_json(encoding: tiktoken.Encoding) -> str:
    """The Hugging Face tokenizer.json that encodes exactly as `encoding`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    tokens = token_bytes(encoding)
    if is_chars(encoding):
        vocab = {token.decode(): i for i, token in enumerate(tokens)}
        made = Tokenizer(models.WordLevel(vocab, unk_token=''))
        made.pre_tokenizer = pre_tokenizers.Split(Regex(CHARS_PATTERN), behavior='isolated')
        made.decoder = decoders.Fuse()
        return made.to_str(pretty=True)
    to_character = byte_characters()
    ranks = {token: i for i, token in enumerate(tokens) if token}
    names = {token: ''.join(to_character[byte] for byte in token) for token in ranks}
    merges = [tuple(names[part] for part in last_pair(token, ranks))
              for token in ranks if len(token) > 1]
    vocab = {names[token]: i for token, i in ranks.items()}
    vocab.update((name, i) for i, name in special_tokens(encoding))
    made = Tokenizer(models.BPE(vocab, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, normalized=False)
                             for _, name in special_tokens(encoding)])
    return made.to_str(pretty=True)


def last_pair(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens merged last into `token`: its bytes merged by all lower ranks."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, MAX_VOCAB_SIZE)
                 for left, right in zip(parts, parts[1:])]
        i = pairs.index(min(pairs))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def from_json(text: str) -> tiktoken.Encoding:
    """The Encoding of a tokenizer.json: ours, or any with GPT-2's byte-level BPE."""
    data = json.loads(text)
    vocab, kind = data['model']['vocab'], data['model']['type']
    if kind == 'WordLevel' and all(len(token) == 1 for token in vocab):
        return characters(sorted(vocab, key=vocab.get))
    added = {token['content']: token['id'] for token in data['added_tokens']}
    to_byte = {char: byte for byte, char in byte_characters().items()}
    splits = data['pre_tokenizer'] or {}
    if (kind != 'BPE' or data.get('normalizer') or splits.get('type') != 'ByteLevel'
            or splits.get('add_prefix_space') or not splits.get('use_regex', True)):
        raise ValueError(f"this tokenizer ({kind}) is not GPT-2's byte-level BPE")
    ranks = {bytes(to_byte[char] for char in token): i
             for token, i in vocab.items() if token not in added}
    merged = [vocab[''.join(pair if isinstance(pair, list) else pair.split(' '))]
              for pair in data['model']['merges']]
    if merged != sorted(merged):
        raise ValueError('the ids of this tokenizer do not follow the order of its merges')
    check_vocab_size(1 + max([*ranks.values(), *added.values()]))
    known = hashlib.sha256(b' '.join(sorted(ranks, key=ranks.get))).hexdigest() == GPT2_TOKENS
    name = 'gpt2' if known and added == {EOT: len(ranks)} else f'bpe:{len(ranks) + len(added)}'
    return tiktoken.Encoding(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                             special_tokens=added)


def from_pair(vocab: str, merges: str) -> tiktoken.Encoding:
    """The Encoding of the contents of GPT-2's older pair of files, vocab.json and merges.txt."""
    ids = json.loads(vocab)
    return from_json(json.dumps({
        'model': {'type': 'BPE', 'vocab': ids, 'merges': [
            line for line in merges.splitlines() if line and not line.startswith('#version')]},
        'added_tokens': [{'content': EOT, 'id': ids[EOT]}] if EOT in ids else [],
        'pre_tokenizer': {'type': 'ByteLevel'}}))


def load(path: str | Path) -> tiktoken.Encoding:
    """The Encoding of a tokenizer.json, or of a vocab.json and the merges.txt beside it.

    Raises ValueError for one that cannot be used.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding='utf-8')
        if path.name != 'vocab.json':
            return from_json(text)
        return from_pair(text, path.with_name('merges.txt').read_text(encoding='utf-8'))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path}: cannot be used as a tokenizer ({error})') from None
