"""
The format of prepared text, both ways, and what tells whether it is whole.

A data set is a folder data/NAME:

    manifest.json     what it was made from, its tokenizer, tokens and sha256 of every shard
    tokenizer.json    the vocabulary, as Hugging Face keeps one
    train_000000.bin  shards: 256 little-endian int32 (magic 20240520, version 1, number of tokens,
    val_000000.bin    zeros), then that many uint16 token ids; the format of llm.c and its family

nanoGPT's train.bin and val.bin, uint16 without a header, are read as well.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4
DATA_DIR = Path(__file__).resolve().parents[2] / 'data'


class ShardWriter:
    """Writes one split into shards of shard_tokens tokens; memory does not grow with either.

    `state` of an earlier writer goes on behind what that one had synced.
    """

    def __init__(self, folder, split, shard_tokens, eot=None, state=None):
        self.folder, self.split = Path(folder), split
        self.shard_tokens, self.eot = shard_tokens, eot
        self.shards, self.file, self.count = [], None, 0
        if state:
            self.shards, self.count = list(state['shards']), state['count']
            for path in self.folder.glob(f'{split}_*.bin'):         # written after that
                if int(path.stem.rpartition('_')[2]) >= len(self.shards) + bool(self.count):
                    path.unlink()
            if self.count:
                self.file = open(self.path(), 'r+b')
                self.file.truncate(HEADER_BYTES + 2 * self.count)
                self.file.seek(0, os.SEEK_END)

    def path(self):
        return self.folder / f'{self.split}_{len(self.shards):06d}.bin'

    def write(self, ids):
        """Append ids (uint16 array), going on in a new shard whenever one is full."""
        while len(ids):
            if self.file is None:
                self.file, self.count = open(self.path(), 'w+b'), 0
                self.file.write(bytes(HEADER_BYTES))
            part, ids = np.split(ids, [self.shard_tokens - self.count])
            self.file.write(part.astype('<u2', copy=False).tobytes())
            self.count += len(part)
            if self.count == self.shard_tokens:
                self.close()

    def sync(self):
        """What goes on from here if all that was written until now is on the disk, as it is then.
        """
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
        return {'shards': list(self.shards), 'count': self.count if self.file else 0}

    def close(self):
        """Finish the shard that is open, if one is; its header says how many tokens it has."""
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


def read_shard(path, eot, token_sizes=None):
    """({'tokens': …, 'documents': that begin in it, 'sha256': …}, largest id) of a shard; given
    the bytes of each token (an array), also the 'bytes' of its text."""
    count, offset = count_tokens(path)
    sha256, largest, documents, size = hashlib.sha256(), 0, 0, 0
    with open(path, 'rb') as file:
        sha256.update(file.read(offset))
        while chunk := file.read(2 ** 22):
            sha256.update(chunk)
            ids = np.frombuffer(chunk, '<u2')
            largest = max(largest, int(ids.max()))
            documents += int(np.count_nonzero(ids == eot))
            size += 0 if token_sizes is None else int(token_sizes[ids].sum())
    facts = {'tokens': count, 'sha256': sha256.hexdigest()}
    facts |= {} if eot is None else {'documents': documents}
    return facts | ({} if token_sizes is None else {'bytes': size}), largest


def count_tokens(path):
    """(tokens in the shard at `path`, bytes before the first), its header checked."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ValueError(f'{path} is missing; prepare the data set again') from None
    if path.name in ('train.bin', 'val.bin'):                       # nanoGPT's: no header
        if size % 2:
            raise ValueError(f'{path}: {size:,} bytes are no whole number of 16-bit tokens')
        return size // 2, 0
    header = np.fromfile(path, '<i4', count=256)
    if len(header) < 256 or header[0] != MAGIC:
        raise ValueError(f'{path}: this is not a token shard (its first number is not {MAGIC}); '
                         f'prepare the data set again')
    if header[1] != VERSION:
        raise ValueError(f'{path}: shard format {header[1]}, this program reads format {VERSION}')
    count = int(header[2])
    if size != HEADER_BYTES + 2 * count:
        raise ValueError(f'{path}: the header promises {count:,} tokens, the file holds '
                         f'{max(0, size - HEADER_BYTES) // 2:,}: truncated or still being copied; '
                         f'prepare it again')
    return count, HEADER_BYTES


def prepare_command(name, data_dir=''):
    """The command that makes data set `name`, for error messages."""
    name = Path(name).name
    flags = {'pydocs': '', 'shakespeare': ' --dataset=shakespeare',
             'shakespeare_char': ' --dataset=shakespeare --tokenizer=chars'}
    if name.startswith(('fineweb', 'openwebtext', 'tinystories', 'wikitext-103')):
        flags[name] = f' --dataset={name}'
    place = f' --data_dir={data_dir}' if data_dir else ''
    return 'python data/prepare.py' + flags.get(name, f' --name={name} FILES_OR_FOLDERS') + place


class Tokens:
    """The tokens of one split, all its shards read as one sequence."""

    def __init__(self, name, split, vocab_size, data_dir=''):
        folder = Path(data_dir or DATA_DIR) / name
        manifest = read_manifest(name, data_dir)
        shards = manifest['splits'][split]['shards'] if manifest else []
        paths = [folder / shard['file'] for shard in shards] or sorted(
            folder.glob(f'*{split}_*.bin')) or sorted(folder.glob(f'{split}.bin'))
        if not paths and any(folder.glob('*.bin')):
            raise ValueError(f'{folder}: there is no {split}.bin, nor *{split}_*.bin, beside '
                             f'the other split')
        if not paths:
            others = sorted(path.parent.name for path in folder.parent.glob('[!.]*/manifest.json'))
            raise ValueError(f'{folder}: the data set {name!r} is not prepared; run\n'
                             f'    {prepare_command(name, data_dir)}'
                             + f'\nThere is {", ".join(others)}' * bool(others))
        self.paths, self.vocab_size = paths, vocab_size
        counts, self.offsets = zip(*map(count_tokens, paths))
        for path, count, shard in zip(paths, counts, shards):
            if count != shard['tokens']:
                raise ValueError(f"{path}: {count:,} tokens, the manifest has "
                                 f"{shard['tokens']:,}: another file, prepare the data set again")
        if not sum(counts):
            raise ValueError(f'{folder}: there are no tokens in {split}')
        self.starts = np.cumsum([0, *counts])           # shard i holds starts[i] .. starts[i+1] - 1
        self.changed = [path.stat().st_mtime_ns for path in paths]

    def __len__(self):
        return int(self.starts[-1])

    def read(self, start, count):
        """`count` ids (int64 array) from place `start` on;
        after the last token comes the first again.

        Raises ValueError naming the shard when an id is outside of the vocabulary. The files are
        read, not mapped: mapped pages would count as memory of the process.
        """
        parts, start = [np.empty(0, '<u2')], start % len(self)
        while count:
            i = int(np.searchsorted(self.starts, start, side='right')) - 1
            n = min(count, int(self.starts[i + 1]) - start)
            offset = self.offsets[i] + 2 * (start - int(self.starts[i]))
            part = np.fromfile(self.paths[i], '<u2', count=n, offset=offset)
            if self.paths[i].stat().st_mtime_ns != self.changed[i]:
                raise ValueError(f'{self.paths[i]}: has been written anew since it was opened; '
                                 f'what was made of it until now is of the text before')
            if len(part) < n or part.max() >= self.vocab_size:
                raise ValueError(f'{self.paths[i]}: ' + (
                    'has become shorter' if len(part) < n else
                    f'holds token id {part.max()}, the vocabulary ends at {self.vocab_size - 1}: '
                    f'another tokenizer made it, or it is damaged'))
            parts.append(part)
            count, start = count - n, (start + n) % len(self)
        return np.concatenate(parts).astype(np.int64)

    def chunks(self, size=2 ** 22):
        """All ids in order: uint16 arrays of `size`, the last with what is left."""
        for start in range(0, len(self), size):
            yield self.read(start, min(size, len(self) - start)).astype(np.uint16)


def documents(tokens, eot_id, size=2 ** 22):
    """Every document of the split in order, as (ids without <|endoftext|>, whether it ends here).

    One that is longer than `size` comes in several pieces, of which the last may be empty. What
    stands before the first <|endoftext|> is a document too; then one at the very end begins none,
    as in nanoGPT's files, where it stands behind each document. Without eot_id the split is one.
    """
    rest, eots, leading, cut = np.empty(0, np.uint16), 0, False, False
    for chunk in tokens.chunks(size):
        ids, start = np.concatenate([rest, chunk]), 0
        for end in [] if eot_id is None else np.flatnonzero(ids == eot_id).tolist():
            if eots or end or cut:
                yield ids[start:end], True
                leading |= not eots
            start, eots, cut = end + 1, eots + 1, False
        rest = ids[start:]
        if len(rest) >= size:
            yield rest, False
            rest, cut = rest[:0], True
    if len(rest) or cut or eots and not leading:
        yield rest, True


def read_manifest(name, data_dir=''):
    """The manifest of data set `name`, or {} for shards that came without one."""
    folder = Path(data_dir or DATA_DIR) / name
    try:
        manifest = json.loads((folder / 'manifest.json').read_text(encoding='utf-8'))
        if missing := {'source', 'settings', 'tokenizer', 'splits'} - set(manifest):
            raise ValueError(f"it says nothing of {', '.join(sorted(missing))}")
        return manifest
    except (FileNotFoundError, NotADirectoryError):
        if (folder / 'meta.pkl').exists():
            raise ValueError(f'{folder}: nanoGPT prepared this with a vocabulary of its own, '
                             f'kept as a pickle, which is not read here; run\n'
                             f'    {prepare_command(name, data_dir)}') from None
        return {}
    except (ValueError, TypeError) as error:
        raise ValueError(f'{folder}/manifest.json is damaged ({error}); delete the folder and '
                         f'prepare the data set again') from None


def verify(name, data_dir=''):
    """Re-read all of data set `name`; returns what is wrong with it, one line each."""
    folder = Path(data_dir or DATA_DIR) / name
    manifest = read_manifest(name, data_dir)
    if not manifest:
        return [f'{folder}: there is no data set here, or no manifest.json to verify it against']
    wrong, vocab = [], manifest['tokenizer']
    for shard in (shard for facts in manifest['splits'].values() for shard in facts['shards']):
        path = folder / shard['file']
        try:
            found, largest = read_shard(path, vocab['eot_id'])
        except (OSError, ValueError) as error:
            wrong.append(str(error))
            continue
        if differ := [key for key, value in found.items() if shard.get(key, value) != value]:
            wrong.append(f"{path}: altered (not those in the manifest: {', '.join(differ)})")
        if largest >= vocab['vocab_size']:
            wrong.append(f'{path}: token id {largest} is outside of the vocabulary')
    return wrong


def leaked(name, data_dir=''):
    """How many documents of train stand in val as well, token for token."""
    vocab, seen, both = read_manifest(name, data_dir)['tokenizer'], set(), 0
    if vocab['eot_id'] is None:
        return 0
    for split in ('val', 'train'):
        tokens, digest = Tokens(name, split, vocab['vocab_size'], data_dir), None
        for ids, ends in documents(tokens, vocab['eot_id']):
            digest = digest or hashlib.blake2b(digest_size=16)
            digest.update(ids)
            if ends and split == 'val':
                seen.add(digest.digest())
            elif ends:
                both += digest.digest() in seen
            digest = None if ends else digest
    return both
