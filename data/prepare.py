"""
Text becomes tokens in shards, ready for train.py. If killed, the same command resumes.

    python data/prepare.py                                          # the offline corpus, pydocs
    python data/prepare.py --dataset=shakespeare --tokenizer=chars  # nanoGPT's shakespeare_char
    python data/prepare.py --name=mine notes/ book.txt web.jsonl    # your own text
    python data/prepare.py --dataset=fineweb-edu-10B --shards=10    # 1B tokens, ready to train on
    python data/prepare.py --dataset=openwebtext                    # text from the hub, tokenized
    python data/prepare.py --verify=pydocs                          # read everything again, compare
"""

import hashlib
import json
import lzma
import math
import os
import re
import shutil
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # this file runs from data/
from gpt.settings import check_bounds, run, settings

# -----------------------------------------------------------------------------
dataset = ''                # pydocs (as is '' without input), shakespeare; fineweb-10B,
                            # fineweb-edu-10B (tokens, ready);
                            # openwebtext, tinystories, wikitext-103, fineweb-sample-10BT, -100BT,
                            # fineweb-edu-sample-10BT, -100BT; hub:OWNER/NAME[:CONFIG]; or a path
input = ()                  # files, folders, '*.patterns' instead, or as plain arguments:
                            # prepare.py --name=mine a.txt b/
name = ''                   # data/NAME is written; '': the data set's name, or the first input's
replace = False             # True: a data set of that name from other text or with other settings
                            # is replaced; a run trained on it cannot be resumed then
tokenizer = 'auto'          # gpt2, bpe:N, bytes, chars, or that of a folder, such as a run's;
                            # auto: gpt2, for pydocs bpe:4096
split = 'train'             # of a hub data set: the split that is read
shards = 0                  # of fineweb-10B and fineweb-edu-10B: only the first N, 0: all
text_key = 'text'           # the field or column of .jsonl and .parquet that holds the text
separator = ''              # ends a document within .txt and .md, such as '<|endoftext|>' or '\n';
                            # '': a file is a document
unwrap = False              # True: lines broken at a width are joined, one paragraph per line
errors = 'strict'           # input that is not text: strict refuses it; skip leaves the document
                            # out; replace puts U+FFFD for bytes that are not UTF-8
max_document_mb = 64.0      # a longer document (line of .jsonl) is left out: it bounds the memory
val_fraction = 0.0          # fraction of validation documents; 0: 0.05, for shakespeare 0.1
shard_tokens = 100_000_000  # tokens in a shard
seed = 1337                 # of the split into train and val
workers = 0                 # processes that tokenize; 0: one, for larger corpora one per core
verify = ''                 # a data set to check against its manifest, instead of preparing one
data_dir = ''               # where prepared data is; '': data/ beside this script
# -----------------------------------------------------------------------------
Config = settings(globals())

import numpy as np
from tqdm import tqdm

from gpt.data import documents, sources
from gpt.data.encode import CUT, SplitRule, cores, divide, is_near, tokenized, val_range
from gpt.data.shards import (DATA_DIR, Plan, ShardWriter, Tokens, describe_source, leaked,
                             load_facts, read_manifest, read_shard)
from gpt.data.shards import verify as find_problems
from gpt.files import atomic_write, lock, plain_text, read_json, sha256
from gpt.shapes import is_text
from gpt.tokenizer import (HFTokenizer, build, fingerprint, gpt2, load, special_names,
                           stored, to_json, token_bytes)

COLLECT = 'input'           # takes the arguments without a flag
OUR_FILES = (r'manifest\.json|tokenizer(_config)?\.json|(\w+_)?(train|val)_\d{6}\.bin|'
             r'lengths\.png|contamination\.json|'               # of explore.py
             r'\..+\.partial|'                                  # of a write that was killed
             r'\.DS_Store|Thumbs\.db|desktop\.ini')             # of file managers
XZ_BYTES = 2 ** 21          # validation text is compressed for comparison up to this size
SAMPLE_CHARACTERS = 2 ** 28         # of the training text, from which a tokenizer is trained
LARGE_BYTES = 2 ** 25       # a larger corpus is tokenized by one process per core
SAVE_SECONDS = 2            # between writes of progress.json
READER = 2                  # in plan.json: how text is read; 1 kept carriage returns
SEARCHED_TOKENS = 2 ** 28   # of a split, for these
BOUNDS = (
    ("'strict', 'replace' or 'skip'", ('strict', 'replace', 'skip').__contains__, 'errors'),
    ('more than 0, at most 1e6', lambda value: 0 < value <= 1e6, 'max_document_mb'),
    ('0 (default) or more, and less than 1', lambda value: 0 <= value < 1, 'val_fraction'),
    ('1 to 2,147,483,647', lambda value: 0 < value < 2 ** 31, 'shard_tokens'),  # an int32 on disk
    ('a text in UTF-8', is_text, 'separator text_key split tokenizer'),
    ('0 or more', lambda value: value >= 0, 'shards'),
    ('0 (default) to 1,024', lambda value: 0 <= value <= 1024, 'workers'),
)


@dataclass
class Progress:
    """How far the shards have come; kept in progress.json."""
    threshold: float                            # of encode.SplitRule, as is `low`
    after: tuple = (0, 0, 0)                    # the position after the last batch written
    counts: dict = field(default_factory=dict)  # remarks, see documents.texts()
    writers: dict = field(default_factory=dict)     # what ShardWriter.sync() returned, by split
    splits: dict = field(default_factory=lambda: {
        split: {'tokens': 0, 'documents': 0, 'bytes': 0} for split in ('train', 'val')})
    low: float = 0.0

    def add(self, after, encoded, counts):
        """Count a batch as written."""
        for split, (_, amounts) in encoded.items():
            for key, amount in amounts.items():
                self.splits[split][key] += amount
        for remark, (count, first) in counts.items():
            self.counts.setdefault(remark, [0, first])[0] += count
        self.after = after


def main(cfg):
    root = Path(cfg.data_dir or DATA_DIR).expanduser()
    if cfg.verify:
        return report(cfg.verify, root)
    check_bounds(cfg, BOUNDS)
    if cfg.name and not (cfg.input or cfg.dataset):
        raise ValueError(f'name: given {cfg.name!r} alone, expected also files or folders of text, '
                         f'or --dataset=pydocs')
    source = sources.find(cfg.dataset, cfg.input, cfg.split, root / '.downloads')
    plan = make_plan(cfg, source)
    folder = root / plan['name']
    with locked(root / '.locks' / plan['name'], folder):
        if folder.exists() and is_current(folder, plan, source.ready, cfg.replace):
            return
        print(f'{folder}: preparing {describe_source(plan)}', flush=True)
        partial = open_partial(folder.with_name(f'.{folder.name}.partial'), plan)
        with keep_partial(partial):
            if not (partial / 'manifest.json').exists():
                make = take_shards if source.ready else write_dataset
                make(cfg, source, plan, partial)
        put_in_place(folder, partial)
    print_summary(folder, read_manifest(plan['name'], root))


def make_plan(cfg, source):
    """{'name', 'source', 'settings'}: equal plans give byte-identical data sets."""
    facts, kind = dict(source.facts), cfg.tokenizer
    if kind == 'auto':
        kind = 'bpe:4096' if source.name == 'pydocs' else 'gpt2'
    vocabulary = stored(kind)
    if vocabulary:
        encoding = load(vocabulary)
        is_foreign = isinstance(encoding, HFTokenizer)              # of several files, perhaps
        facts['tokenizer'] = fingerprint(encoding) if is_foreign else sha256(vocabulary)
    as_nanogpt = (source.name, kind) == ('shakespeare', 'chars')
    name = cfg.name or ('shakespeare_char' if as_nanogpt else source.name)
    if Path(name).name != name or name.startswith('.') or not name.isprintable():
        raise ValueError(f'name: given {name!r}, expected the name of a folder to make in data/')
    if cfg.shards and not source.ready:
        raise ValueError(f'shards: given {cfg.shards}, expected 0; only '
                         f"{' and '.join(sources.READY)} come in shards")
    if source.ready:
        if kind != 'gpt2':
            raise ValueError(f"tokenizer: given {kind!r}, expected 'gpt2', the tokens of "
                             f"{cfg.dataset}; as text there are {', '.join(sources.HUB)}")
        available = sum('_train_' in file.name for file in source.files)
        chosen = {'tokenizer': kind, 'shards': min(cfg.shards or available, available)}
        return {'name': name, 'source': facts, 'settings': chosen}
    fraction = cfg.val_fraction or (0.1 if source.name == 'shakespeare' else 0.05)
    chosen = {'tokenizer': kind, 'val_fraction': fraction}
    for key in ('seed', 'text_key', 'separator', 'errors', 'max_document_mb', 'shard_tokens'):
        chosen[key] = getattr(cfg, key)
    if cfg.unwrap:
        chosen['unwrap'] = True
    return {'name': name, 'source': facts, 'settings': chosen}


# A data set appears by one rename; until then its files are in .NAME.partial.

@contextmanager
def locked(path, folder):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'a') as file:
        try:
            lock(file, wait=False)
        except BlockingIOError:
            raise ValueError(f'{folder}: another process is preparing it; wait for it or end it'
                             ) from None
        yield


def is_current(folder, plan, ready, replace):
    """Whether the data set exists as planned; if not, it will be replaced.

    ValueError for a folder not made here, and without `replace` for a data set of other text or
    settings, on which a run may depend. A damaged one is made again with the same bytes: `plan`
    becomes one of all its shards, if fewer are asked for.
    """
    names = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in names if not re.fullmatch(OUR_FILES, name)]
    if foreign or 'manifest.json' not in names:
        found = f' (it holds {foreign[0]})' if foreign else ''
        raise ValueError(f'{folder}: not made by this program{found}; give another --name')
    existing = read_manifest(folder.name, folder.parent)
    held, wanted = (part['settings'].get('shards', 0) for part in (existing, plan))
    if 0 < wanted < held and not replace:                           # it has more than enough
        plan['settings']['shards'] = held
    if changed := differences(existing, plan):
        made = f"{folder}: was made otherwise ({', '.join(changed)})"
        grows = held < wanted and len(changed) == 1
        if not (replace or grows):
            raise ValueError(f'{made}; give another --name, or --replace to replace it (a run '
                             f'trained on it cannot be resumed then)')
        print(f'{made}; ' + (f'shards are added (--shards={held} --replace goes back)'
                             if grows else 'it will be replaced'))
        return False
    try:
        _, encoding = load_facts(folder.name, folder.parent)
        splits = [Tokens(folder.name, split, encoding.n_vocab, folder.parent)
                  for split in ('train', 'val')]
        is_plain = ready or documents.PLAIN in existing.get('remarks', {})
        is_old = not is_plain and has_returns(encoding, splits)
    except ValueError as error:
        print(f'{error}: it will be replaced')
        return False
    if is_old:
        print(f'{folder} holds carriage returns, as earlier versions kept them; '
              + ('it will be replaced' if replace else '--replace prepares it again without them '
                 '(a run trained on it cannot be resumed then)'))
        return not replace
    print(f"{folder} is up to date: this text, these settings; --verify={plan['name']} checks it")
    return True


def has_returns(encoding, splits):
    """Whether carriage returns are among the first tokens of any of the splits."""
    held = np.array([b'\r' in token for token in token_bytes(encoding)])
    return bool(held.any()) and any(
        held[ids].any() for tokens in splits
        for ids in islice(tokens.chunks(), SEARCHED_TOKENS // 2 ** 22))


def differences(made, plan):
    """How two plans differ, in words; none if they give the same data set."""
    before, wanted = made['settings'], plan['settings']
    found = [f'{key} {before.get(key)!r} -> {wanted.get(key)!r}'
             for key in before | wanted if before.get(key) != wanted.get(key)]
    if content(made['source']) != content(plan['source']):
        found.insert(0, 'other text')
    elif made['source'].get('tokenizer') != plan['source'].get('tokenizer'):
        found.insert(0, 'other vocabulary')
    return found


def content(source):
    """What decides the text: not the hub's revision, but its files that are read.

    Earlier versions kept only the last part of a local file's name.
    """
    files = [[name.rpartition('/')[2], *facts] for name, *facts in source.get('files', [])]
    return {**source, 'files': files, 'revision': '', 'tokenizer': ''}


def open_partial(partial, plan):
    """The folder in which this plan was started before, or a new one.

    With errors='strict' there were no errors so far, which fits the other settings as well.
    """
    notes = [partial / name for name in ('manifest.json', 'plan.json')]     # it may be complete
    before = next((read_json(note, Plan) for note in notes if note.exists()), None)
    if before and before['settings'].get('errors') == 'strict':
        before['settings']['errors'] = plan['settings'].get('errors')
    is_readable = before and (notes[0].exists() or before.get('reader') == READER)
    if is_readable and not differences(before, plan):
        print(f'resuming from {partial}')
    else:
        if before:
            print(f'{partial} is of other text or other settings; starting over')
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    atomic_write(partial / 'plan.json', json.dumps({**plan, 'reader': READER}))
    return partial


@contextmanager
def keep_partial(partial):
    """Say where the work so far is kept, if preparing stops early."""
    kept = f'the work so far is in {partial}, the same command resumes'
    try:
        yield
    except ValueError:
        if not any(partial.glob('*.bin')):                          # nothing worth keeping
            shutil.rmtree(partial, ignore_errors=True)
        raise
    except OSError as error:
        raise OSError(f'{error}; {kept}') from None
    except KeyboardInterrupt:
        print(f'stopped; {kept}')
        raise


def put_in_place(folder, partial):
    """Put the complete data set in `partial` in its place."""
    shutil.rmtree(partial / 'downloads', ignore_errors=True)
    for pattern in ('plan.json', 'progress.json', '.*.partial'):  # of killed writes
        for path in partial.glob(pattern):
            path.unlink()
    old = folder.with_name(f'.{folder.name}.old')
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


# Text to shards.

def write_dataset(cfg, source, plan, folder):
    """Write shards, tokenizer.json and, last, manifest.json into `folder`."""
    separator = plain_text(cfg.separator.replace('\\r', '\r').replace('\\n', '\n')
                           .replace('\\t', '\t'))
    options = documents.Options(cfg.text_key, separator, int(cfg.max_document_mb * 2 ** 20),
                                cfg.errors, source.begins, cfg.unwrap)
    path_of = sources.Downloads(source.files, folder / 'downloads')

    def batches(start=(0, 0, 0)):
        return documents.batches(source.files, start, options, path_of)

    def texts(counts):
        return (text for batch in batches() for text in documents.texts(batch, options, counts))

    chosen, vocabulary = plan['settings'], folder / 'tokenizer.json'
    progress = read_progress(folder) or start_progress(folder, texts, chosen)
    rule = SplitRule(chosen['seed'], chosen['val_fraction'], progress.threshold, progress.low)
    if not vocabulary.exists():
        make_tokenizer(vocabulary, chosen['tokenizer'], texts, rule)
    encoding = gpt2() if chosen['tokenizer'] == 'gpt2' else load(vocabulary)
    is_large = sum(file.size for file in source.files) > LARGE_BYTES
    workers = cfg.workers or (cores() if is_large else 1)
    results = tokenized(batches(progress.after), workers, vocabulary, options, rule)
    writers = {split: ShardWriter(folder, split, chosen['shard_tokens'], encoding.eot,
                                  progress.writers.get(split)) for split in ('train', 'val')}
    write_splits(results, writers, progress, len(source.files))
    check_written(source.files, progress.splits)
    if progress.splits['val']['bytes'] <= XZ_BYTES:
        progress.splits['val']['xz_bytes'] = xz_size(folder, encoding)
    write_manifest(folder, plan, encoding, progress.splits, progress.counts)


def read_progress(folder):
    """The Progress of an earlier call, None without it."""
    file = folder / 'progress.json'
    if not file.exists():
        return None
    note = read_json(file, dict)
    if note.pop('sha256', '') != digest(note):
        raise ValueError(f'{file}: is damaged; delete {folder} to start over')
    return Progress(**note)


def digest(note):
    return hashlib.sha256(json.dumps(note).encode()).hexdigest()


def start_progress(folder, texts, chosen):
    """A new Progress; shards that no progress.json counts are deleted."""
    for path in folder.glob('*.bin'):
        path.unlink()
    counts = {}
    raws = (raw for _, raw in texts(counts))
    found = val_range(raws, chosen['seed'], chosen['val_fraction'])
    if found is None:
        message = f'there is no text to prepare{describe(counts)}'
        if documents.TOO_LONG in counts:
            message += '; --max_document_mb allows longer ones, --separator divides a file'
        raise ValueError(message)
    low, high = found
    if found == CUT:
        print(f"too few documents to choose from: the last {chosen['val_fraction']:.1%} of each "
              f"long one is to validate on")
    elif low:
        print('few documents: those to validate on are chosen by size too, not by hash alone')
    return Progress(high, low=low)


def make_tokenizer(file, kind, texts, rule):
    """Write the tokenizer of this kind to `file`, trained on the corpus if need be."""
    if kind.startswith('bpe:'):
        print(f'training the tokenizer {kind}', flush=True)
    encoding = build(kind, lambda: sample(texts({}), kind, rule))
    if isinstance(encoding, HFTokenizer):                           # which token ends a text
        names = json.dumps(special_names(encoding), indent=1)
        atomic_write(file.with_name('tokenizer_config.json'), names)
        if encoding.remark:
            print(f'{kind}: {encoding.remark}')
    atomic_write(file, to_json(encoding))


def sample(texts, kind, rule):
    """What a tokenizer is made from: the first training text; for chars all text."""
    pieces = (piece for text, raw in texts for split, piece, _ in divide(text, raw, rule)
              if split == 'train' or kind == 'chars')
    room = math.inf if kind == 'chars' else SAMPLE_CHARACTERS
    for piece in pieces:
        yield piece if len(piece) <= room else piece[:room]
        room -= len(piece)
        if room <= 0:
            return


def write_splits(results, writers, progress, n_files):
    """Write what tokenized() yields to shards, and progress.json every SAVE_SECONDS."""
    train, saved = progress.splits['train'], time.monotonic()
    with tqdm(unit='B', unit_scale=True, initial=train['bytes'], disable=None) as bar:
        for after, encoded, counts in results:
            shards_before = len(writers['train'].shards)
            for split, (ids, amounts) in encoded.items():
                writers[split].write(np.frombuffer(ids, np.uint16))
                bar.update(amounts['bytes'])
            progress.add(after, encoded, counts)
            if len(writers['train'].shards) > shards_before:
                bar.write(f"{train['tokens']:,} tokens, file {min(after[0] + 1, n_files):,} of "
                          f'{n_files:,}', file=sys.stdout)
            if time.monotonic() - saved > SAVE_SECONDS:
                save_progress(progress, writers)
                saved = time.monotonic()
    for split, writer in writers.items():
        writer.close()
        progress.splits[split]['shards'] = writer.shards


def check_written(files, splits):
    """Raise ValueError if a file has changed since it was listed, or a split is too small."""
    for file in files:
        touched = file.mtime and file.path.stat().st_mtime_ns != file.mtime
        if touched and sha256(file.path) != file.hash:
            raise ValueError(f'{file.name}: changed while it was read; run the same command again')
    for split, facts in splits.items():
        if facts['tokens'] < 2:
            tokens = number_of(facts['tokens'], 'token')
            raise ValueError(f'{split}: given {tokens}, expected at least 2 (an input and a '
                             f'target); give more text or another --val_fraction')
        if not facts['bytes']:
            raise ValueError(f'{split}: there is no text to prepare in its documents; give more '
                             f'text or another --val_fraction')


def save_progress(progress, writers):
    progress.writers = {split: writer.sync() for split, writer in writers.items()}
    note = asdict(progress)
    atomic_write(writers['train'].folder / 'progress.json',
                 json.dumps({**note, 'sha256': digest(note)}))


def write_manifest(folder, plan, encoding, splits, counts):
    manifest = {
        'format': 1, 'name': plan['name'], 'source': plan['source'], 'settings': plan['settings'],
        'tokenizer': {'name': encoding.name, 'vocab_size': encoding.n_vocab,
                      'eot_id': encoding.eot, 'fingerprint': fingerprint(encoding)},
        'splits': splits, 'remarks': counts,
        'versions': {name: version(name) for name in ('tiktoken', 'tokenizers', 'numpy')}}
    atomic_write(folder / 'manifest.json', json.dumps(manifest, indent=1))


def xz_size(folder, encoding):
    """The bytes of the validation text after `xz -9e`."""
    tokens, eot = Tokens(folder.name, 'val', encoding.n_vocab, folder.parent), encoding.eot
    text = b''.join(encoding.decode_bytes(ids[ids != eot].tolist())
                    for ids in tokens.chunks(2 ** 16))
    return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


# Shards that others made of GPT-2's tokens.

def take_shards(cfg, source, plan, folder):
    """Download the shards of a data set that is tokenized already, and write its manifest.

    Those that an earlier call with fewer shards downloaded are linked.
    """
    encoding, existing = gpt2(), folder.with_name(plan['name'])
    files = [file for file in source.files if '_val_' in file.name]
    files += [file for file in source.files
              if '_train_' in file.name][:plan['settings']['shards']]
    check_disk(files, folder, existing)
    sizes = np.zeros(2 ** 16, np.int64)             # of tokens in bytes, 0 for <|endoftext|>
    sizes[:encoding.n_vocab] = [len(token) for token in token_bytes(encoding)]
    shards = {'train': [], 'val': []}
    for file in tqdm(files, unit='shard', disable=None):
        path = folder / file.name
        if not path.exists():
            with suppress(OSError):                 # not there, or a disk without such links
                os.link(existing / file.name, path)
        if not path.exists() or sha256(path) != file.hash:
            os.replace(sources.download_from_hub(file, folder / 'downloads'), path)
        facts, _ = read_shard(path, encoding.eot, sizes)
        shards['val' if '_val_' in file.name else 'train'].append({'file': file.name, **facts})
    splits = {split: {**{key: sum(shard[key] for shard in found)
                         for key in ('tokens', 'documents', 'bytes')}, 'shards': found}
              for split, found in shards.items()}
    atomic_write(folder / 'tokenizer.json', to_json(encoding))
    write_manifest(folder, plan, encoding, splits, {})


def check_disk(files, *folders):
    """Raise OSError if the files that are in none of `folders` do not fit on the disk."""
    sizes = [file.size for file in files
             if not any((folder / file.name).exists() for folder in folders)]
    free = shutil.disk_usage(folders[0]).free
    if sum(sizes) > free:
        raise OSError(f'{len(sizes)} shards need {sum(sizes) / 1e9:.1f} GB, {free / 1e9:.1f} GB '
                      f'are free; --shards=N takes the first N')


# What is printed.

def describe(counts):
    """': 2 empty (the first: a.txt), …', '' without remarks."""
    remarks = [f'{count:,} {remark} (the first: {name})'
               for remark, (count, name) in counts.items()]
    return ': ' + ', '.join(remarks) if remarks else ''


def number_of(count, noun):
    return f'{count:,} {noun}' if count == 1 else f'{count:,} {noun}s'


def print_summary(folder, manifest):
    train, val = manifest['splits']['train'], manifest['splits']['val']
    kind = manifest['tokenizer']
    print(f"{folder}: {train['tokens']:,} tokens of {number_of(train['documents'], 'document')} to "
          f"train on, {val['tokens']:,} of {val['documents']:,} to validate; "
          f"{kind['name']}, {kind['vocab_size']:,} tokens, "
          f"{train['bytes'] / train['tokens']:.2f} bytes a token")
    if manifest['remarks']:
        print('of the documents' + describe(manifest['remarks']))
    if documents.HAS_EOT in manifest['remarks'] and not manifest['settings'].get('separator'):
        print("if <|endoftext|> separates documents there, give --separator='<|endoftext|>'")
    asked = manifest['settings'].get('val_fraction')                # not of ready shards
    found = val['bytes'] / (train['bytes'] + val['bytes'])
    if asked and not is_near(found, asked):
        print(f'validation has {found:.1%} of the text, val_fraction is {asked:.1%}: of many '
              f'documents hashes alone decide, and very short ones are not cut; divide long files '
              f'(--separator does too), or give another --val_fraction or --seed, with --replace')


def report(name, root):
    """Print that data set `name` is intact, or raise ValueError with its problems."""
    problems = find_problems(name, root)
    if problems:
        raise ValueError('\n'.join([f'{name}: damaged', *problems]))
    manifest, _ = load_facts(name, root)            # ValueError if the tokenizer is not its own
    both, published = leaked(name, root), 'shards' in manifest['settings']
    duplicates = f"{number_of(both, 'document')} of train also appear in val"
    if both and not published:
        raise ValueError(f'{root / name}: {duplicates}; prepare the data set again')
    splits = [f"{split} {facts['tokens']:,} tokens in {number_of(len(facts['shards']), 'shard')}"
              for split, facts in manifest['splits'].items()]
    note = f'; as published, {duplicates}' if both else ''
    print(f"{name}: verified; {', '.join(splits)}{note}")


if __name__ == '__main__':
    run(main, Config, collect=COLLECT)
