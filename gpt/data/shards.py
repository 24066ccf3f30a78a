"""
The format of prepared text: writing, reading, verifying.

A data set is a folder data/NAME:

    manifest.json     what it was made from, its tokenizer, tokens and sha256 of every shard
    tokenizer.json    the vocabulary, in Hugging Face's format
    train_000000.bin  shards: 256 little-endian int32 (magic 20240520, version 1, number of tokens,
    val_000000.bin    zeros), then that many uint16 token ids; the format of llm.c and its family

nanoGPT's train.bin and val.bin, uint16 without a header, are read as well.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np

from gpt import tokenizer
from gpt.files import ROOT, plain_file, read_json, sha256
from gpt.shapes import Count, FileName, Positive

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4
DATA_DIR = ROOT / 'data'
LOOK = 2 ** 16              # tokens of a file without header that tell whether they are uint16


class Source(TypedDict):
    files: NotRequired[list[tuple[str, Count, str]]]    # name, bytes, hash


class Settings(TypedDict, total=False):
    shards: Count
    separator: str
    errors: str


class Plan(TypedDict):
    """What a data set is made of; equal plans give byte-identical data sets."""
    name: str
    source: Source
    settings: Settings
    reader: NotRequired[int]        # how text is read, in the note of an unfinished data set


class Vocabulary(TypedDict):
    name: str
    vocab_size: Positive
    eot_id: Count | None
    fingerprint: str


class Shard(TypedDict):
    file: FileName
    tokens: Count
    sha256: str
    documents: NotRequired[Count]
    bytes: NotRequired[Count]


class Split(TypedDict):
    tokens: Count
    documents: Count
    bytes: Positive
    shards: list[Shard]
    xz_bytes: NotRequired[Count]


class Manifest(TypedDict):
    name: NotRequired[str]
    source: Source
    settings: Settings
    tokenizer: Vocabulary
    splits: dict[str, Split]        # train and val
    remarks: NotRequired[dict[str, tuple[Count, str]]]


class ShardWriter:
    """Writes one split into shards of shard_tokens tokens, in constant memory.

    state: what sync() of an earlier writer returned, to resume there.
    """

    def __init__(self, folder: str | Path, split: str, shard_tokens: int, eot: int | None = None,
                 state: dict | None = None):
        self.folder, self.split = Path(folder), split
        self.shard_tokens, self.eot = shard_tokens, eot
        self.shards, self.file, self.count = [], None, 0    # count: tokens in the open shard
        if state:
            self.resume(state)

    def resume(self, state: dict) -> None:
        self.shards, self.count = list(state['shards']), state['count']
        kept = len(self.shards) + bool(self.count)
        for path in self.folder.glob(f'{self.split}_*.bin'):
            if int(path.stem.rpartition('_')[2]) >= kept:           # written after sync()
                path.unlink()
        if self.count:
            self.file = open(self.path(), 'r+b')
            self.file.truncate(HEADER_BYTES + 2 * self.count)
            self.file.seek(0, os.SEEK_END)

    def path(self) -> Path:
        return self.folder / f'{self.split}_{len(self.shards):06d}.bin'

    def write(self, ids: np.ndarray) -> None:
        """Append ids (uint16), in a new shard whenever one is full."""
        while len(ids):
            if self.file is None:
                self.file, self.count = open(self.path(), 'w+b'), 0
                self.file.write(bytes(HEADER_BYTES))
            part, ids = np.split(ids, [self.shard_tokens - self.count])
            self.file.write(part.astype('<u2', copy=False).tobytes())
            self.count += len(part)
            if self.count == self.shard_tokens:
                self.close()

    def sync(self) -> dict:
        """Write everything to the disk; returns the state to resume from."""
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
        return {'shards': list(self.shards), 'count': self.count if self.file else 0}

    def close(self) -> None:
        """Finish the open shard, if there is one: write its header."""
        if self.file is None:
            return
        header = np.zeros(256, '<i4')
        header[:3] = MAGIC, VERSION, self.count
        with self.file as file:
            file.seek(0)
            file.write(header.tobytes())
            file.flush()
            os.fsync(file.fileno())
        facts, _ = read_shard(self.path(), self.eot)
        self.shards.append({'file': self.path().name, **facts})
        self.file, self.count = None, 0


def read_shard(path: Path, eot: int | None,
               token_sizes: np.ndarray | None = None) -> tuple[dict, int]:
    """({'tokens', 'sha256', 'documents'}, largest id) of a shard.

    documents: the <|endoftext|> in it, left out without `eot`. With token_sizes, the bytes of each
    token, also the 'bytes' of its text. Raises ValueError for a damaged one.
    """
    tokens, offset = count_tokens(path)
    digest, largest, documents, size = hashlib.sha256(), 0, 0, 0
    with open(path, 'rb') as file:
        digest.update(file.read(offset))
        while chunk := file.read(2 ** 22):
            digest.update(chunk)
            ids = np.frombuffer(chunk, '<u2')
            largest = max(largest, int(ids.max()))
            documents += int(np.count_nonzero(ids == eot))
            if token_sizes is not None:
                size += int(token_sizes[ids].sum())
    facts = {'tokens': tokens, 'sha256': digest.hexdigest()}
    if eot is not None:
        facts['documents'] = documents
    if token_sizes is not None:
        facts['bytes'] = size
    return facts, largest


def count_tokens(path: Path) -> tuple[int, int]:
    """(tokens in a shard, bytes before the first); ValueError for a wrong header or size."""
    if not path.exists():
        raise ValueError(f'{path}: is missing; prepare the data set again')
    size = plain_file(path).stat().st_size
    if path.name in ('train.bin', 'val.bin'):                       # nanoGPT's: no header
        check_uint16(path, size)
        return size // 2, 0
    header = np.fromfile(path, '<i4', count=256)
    if len(header) < 256 or header[0] != MAGIC or header[1] != VERSION:
        raise ValueError(f'{path}: not a token shard (it does not begin with {MAGIC}, {VERSION}); '
                         f'prepare the data set again')
    count = int(header[2])
    if size != HEADER_BYTES + 2 * count:
        raise ValueError(f'{path}: the header says {count:,} tokens, the file holds '
                         f'{max(0, size - HEADER_BYTES) // 2:,}; truncated or still being copied, '
                         f'prepare it again')
    return count, HEADER_BYTES


def check_uint16(path: Path, size: int) -> None:
    """Refuse a file of other numbers: of uint32 or int64 every second uint16 is 0."""
    if size % 2:
        raise ValueError(f'{path}: given {size:,} bytes, expected an even number of them')
    ids = np.fromfile(path, '<u2', count=LOOK)
    if len(ids) > 3 and not (ids[1::2].any() and ids[::2].any()):
        raise ValueError(f'{path}: every second token is 0: these are numbers of 4 or 8 bytes; '
                         f"write them as uint16, ids.astype('uint16').tofile(…)")


def prepare_command(name: str, data_dir: str | Path = '') -> str:
    """The command that makes data set `name`, for error messages."""
    name = Path(name).name
    flags = f'--name={name} FILES_OR_FOLDERS'
    if name == 'shakespeare_char':
        flags = '--dataset=shakespeare --tokenizer=chars'
    elif name.startswith('fineweb-') or name in ('pydocs', 'shakespeare', 'openwebtext',
                                                 'tinystories', 'wikitext-103'):
        flags = f'--dataset={name}'
    place = f' --data_dir={data_dir}' if data_dir else ''
    return f'python data/prepare.py {flags}{place}'


class Tokens:
    """The tokens of one split, all its shards read as one sequence."""

    def __init__(self, name: str, split: str, vocab_size: int, data_dir: str | Path = ''):
        folder = Path(data_dir or DATA_DIR) / name
        manifest = read_manifest(name, data_dir)
        shards = manifest['splits'][split]['shards'] if manifest else []
        self.paths = [folder / shard['file'] for shard in shards]
        if not shards:
            self.paths = sorted(folder.glob(f'*{split}_*.bin')) or [*folder.glob(f'{split}.bin')]
        if not self.paths:
            raise ValueError(missing(name, split, data_dir))
        self.vocab_size = vocab_size
        counts, self.offsets = zip(*map(count_tokens, self.paths))
        for path, count, shard in zip(self.paths, counts, shards):
            if count != shard['tokens']:
                raise ValueError(f"{path}: {count:,} tokens, the manifest has "
                                 f"{shard['tokens']:,}: another file, prepare the data set again")
        if not sum(counts):
            raise ValueError(f'{folder}: {split} has no tokens; prepare the data set again')
        self.starts = np.cumsum([0, *counts])           # shard i holds starts[i] .. starts[i+1] - 1
        self.modified = [path.stat().st_mtime_ns for path in self.paths]
        self.content = sha256 if shards else sampled    # what is compared if a file looks changed
        self.contents = [shard['sha256'] for shard in shards] or [*map(sampled, self.paths)]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` ids (int64) from `start` on; after the last token comes the first again.

        Raises ValueError for an id outside of the vocabulary, or a shard written again since it was
        opened. Files are read, not mapped: mapped pages count as memory of the process.
        """
        parts, start = [np.empty(0, '<u2')], start % len(self)
        while count:
            i = int(np.searchsorted(self.starts, start, side='right')) - 1
            n = min(count, int(self.starts[i + 1]) - start)
            parts.append(self.read_part(i, start - int(self.starts[i]), n))
            count, start = count - n, (start + n) % len(self)
        return np.concatenate(parts).astype(np.int64)

    def read_part(self, i: int, start: int, count: int) -> np.ndarray:
        """`count` ids (uint16) of shard `i`."""
        path = self.paths[i]
        ids = np.fromfile(path, '<u2', count=count, offset=self.offsets[i] + 2 * start)
        modified = path.stat().st_mtime_ns
        if modified != self.modified[i]:                # touched, or copied to its place again
            if self.content(path) != self.contents[i]:
                raise ValueError(f'{path}: was written again since it was opened; start again')
            self.modified[i] = modified
            return self.read_part(i, start, count)
        if len(ids) < count:
            raise ValueError(f'{path}: has become shorter; prepare the data set again')
        if ids.max() >= self.vocab_size:
            raise ValueError(f'{path}: holds token id {ids.max()}, the vocabulary ends at '
                             f'{self.vocab_size - 1}; another tokenizer made it, or it is damaged')
        return ids

    def chunks(self, size: int = 2 ** 22) -> Iterator[np.ndarray]:
        """All ids in order: uint16 arrays of `size`, the last one shorter."""
        for start in range(0, len(self), size):
            yield self.read(start, min(size, len(self) - start)).astype(np.uint16)


def sampled(path: Path) -> str:
    """The size and a hash of 1 MB of a file, from places all over it."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with open(path, 'rb') as file:
        for place in range(0, size, max(2 ** 16, size // 16)):
            file.seek(place)
            digest.update(file.read(2 ** 16))
    return f'{size} {digest.hexdigest()}'


def missing(name: str, split: str, data_dir: str | Path) -> str:
    """The error message for a split without shards."""
    folder = Path(data_dir or DATA_DIR) / name
    if any(folder.glob('*.bin')):
        return f'{folder}: has no {split}.bin and no *{split}_*.bin beside the other split'
    message = (f'{folder}: the data set {name!r} is not prepared; run\n'
               f'    {prepare_command(name, data_dir)}')
    others = sorted({path.parent.name for pattern in ('*train_*.bin', 'train.bin')
                     for path in folder.parent.glob(f'[!.]*/{pattern}')})   # models are not
    return f'{message}\nAvailable: {", ".join(others)}' if others else message


def documents(tokens: Tokens, eot_id: int | None,
              size: int = 2 ** 20) -> Iterator[tuple[int, bytes]]:
    """(number of tokens, 16 bytes of hash) of every document of the split in order.

    Tokens before the first <|endoftext|> are a document too; then one at the very end starts none,
    as in nanoGPT's files, where it follows each document. Without eot_id the split is one document.
    size: tokens in memory.
    """
    length, digest = 0, hashlib.blake2b(digest_size=16)             # of the open document
    is_begun, has_leading = False, False
    for chunk in tokens.chunks(size):
        view, start = memoryview(chunk), 0
        for end in np.flatnonzero(chunk == eot_id).tolist():
            length += end - start
            if is_begun or length:      # else nothing precedes the first one
                digest.update(view[start:end])
                yield length, digest.digest()
                has_leading |= not is_begun
            start, length, is_begun = end + 1, 0, True
            digest = hashlib.blake2b(digest_size=16)
        length += len(view) - start
        digest.update(view[start:])
    if length or is_begun and not has_leading:
        yield length, digest.digest()


def describe_source(manifest: dict) -> str:
    """What a data set was made from, according to its manifest or its plan."""
    if not manifest:
        return 'shards without a manifest, taken for tokens of gpt2'
    files = manifest['source'].get('files')
    if not files:
        return ', '.join(map(str, manifest['source'].values()))
    names = [file for file, *_ in files[:2]]
    if len(files) > 2:
        names.append('…')
    number = '1 file' if len(files) == 1 else f'{len(files):,} files'
    return f"{', '.join(names)} ({number}, {sum(size for _, size, *_ in files):,} bytes)"


def read_manifest(name: str, data_dir: str | Path = '') -> dict:
    """The manifest of data set `name`, or {} for shards without one."""
    folder = Path(data_dir or DATA_DIR) / name
    path = folder / 'manifest.json'
    if path.exists():
        try:
            manifest = read_json(path, Manifest)
            if manifest['splits'].keys() != {'train', 'val'}:
                raise ValueError(f"splits: given {', '.join(manifest['splits'])!r}, expected "
                                 f"'train, val'")
            return manifest
        except ValueError as error:
            problem = str(error).removeprefix(f'{path}: ')
            raise ValueError(f'{path} is damaged ({problem}); delete the folder and '
                             f'prepare the data set again') from None
    if (folder / 'meta.pkl').exists():
        raise ValueError(f'{folder}: made by nanoGPT with a vocabulary in meta.pkl; pickles '
                         f'are not read, run\n    {prepare_command(name, data_dir)}')
    return {}


def load_facts(name: str, data_dir: str | Path = '') -> tuple[dict, tokenizer.Encoding]:
    """(manifest, encoding) of a data set; shards without a manifest are taken for GPT-2's."""
    manifest, folder = read_manifest(name, data_dir), Path(data_dir or DATA_DIR) / name
    if not manifest and not (folder / 'tokenizer.json').exists():
        Tokens(name, 'train', 2 ** 16, data_dir)        # raises ValueError if there are no shards
        return {}, tokenizer.gpt2()
    for file in ('manifest.json', 'tokenizer.json'):
        if not (folder / file).exists():
            raise ValueError(f'{folder}: its {file} is missing; prepare the data set again')
    encoding = tokenizer.load(folder / 'tokenizer.json')
    if tokenizer.fingerprint(encoding) != manifest['tokenizer']['fingerprint']:
        raise ValueError(f'{folder}: its tokenizer.json is not the one that made it; '
                         f'prepare the data set again')
    return manifest, encoding


def verify(name: str, data_dir: str | Path = '') -> list[str]:
    """Read all shards of data set `name` again; returns the problems found, one line each."""
    folder = Path(data_dir or DATA_DIR) / name
    manifest = read_manifest(name, data_dir)
    if not manifest:
        return [f'{folder}: there is no data set, or no manifest.json to verify it against']
    problems, vocabulary = [], manifest['tokenizer']
    for shard in (shard for facts in manifest['splits'].values() for shard in facts['shards']):
        path = folder / shard['file']
        try:
            facts, largest = read_shard(path, vocabulary['eot_id'])
        except (OSError, ValueError) as error:
            problems.append(str(error))
            continue
        changed = [key for key, value in facts.items() if shard.get(key, value) != value]
        if changed:
            problems.append(f"{path}: altered ({', '.join(changed)} not as in the manifest)")
        if largest >= vocabulary['vocab_size']:
            problems.append(f'{path}: token id {largest} is outside of the vocabulary')
    return problems


def leaked(name: str, data_dir: str | Path = '') -> int:
    """How many documents of train also appear in val, token for token."""
    vocabulary = read_manifest(name, data_dir)['tokenizer']
    if vocabulary['eot_id'] is None:
        return 0
    val, train = (documents(Tokens(name, split, vocabulary['vocab_size'], data_dir),
                            vocabulary['eot_id']) for split in ('val', 'train'))
    seen = {digest for _, digest in val}
    return sum(digest in seen for _, digest in train)
