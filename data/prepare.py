"""
Text becomes tokens in shards, ready for train.py. Killed, it goes on where it was.

    python data/prepare.py                                          # the offline corpus, pydocs
    python data/prepare.py --dataset=shakespeare --tokenizer=chars  # nanoGPT's shakespeare_char
    python data/prepare.py --name=mine notes/ book.txt web.jsonl    # your own text
    python data/prepare.py --dataset=fineweb-edu-10B --shards=10    # 1B tokens, ready to train on
    python data/prepare.py --dataset=openwebtext                    # text from the hub, tokenized
    python data/prepare.py --verify=pydocs                          # re-read everything and compare
"""

import json
import lzma
import os
import re
import shutil
import sys
import time
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # this file runs from data/
from gpt.settings import run, settings
from gpt.data import documents
from gpt.data import sources
from gpt.data.order import load_facts
from gpt.files import digest, lock
from gpt.data.shards import DATA_DIR, ShardWriter, Tokens, leaked, read_manifest, read_shard
from gpt.data.shards import verify as find_damage
from gpt.data.encode import cores, divide, tokenized, val_threshold
from gpt.tokenizer import build, eot_id, fingerprint, gpt2, load, stored, to_json, token_bytes

# -----------------------------------------------------------------------------
dataset = 'pydocs'          # pydocs, shakespeare; fineweb-10B, fineweb-edu-10B (tokens, ready);
                            # openwebtext, tinystories, wikitext-103, fineweb-sample-10BT, -100BT,
                            # fineweb-edu-sample-10BT, -100BT; hub:OWNER/NAME[:CONFIG]; or a path
input = ()                  # files, folders, '*.patterns' instead; also given bare:
                            # prepare.py --name=mine a.txt b/
name = ''                   # data/NAME is written; '': the data set's name, or the first input's
tokenizer = 'auto'          # gpt2, bpe:N, bytes, chars, or that of a folder, such as a run's;
                            # auto: gpt2, but for pydocs bpe:4096
split = 'train'             # of a hub data set: the split that is read
shards = 0                  # of fineweb-10B and fineweb-edu-10B: the first so many, 0: all
text_key = 'text'           # the field or column of .jsonl and .parquet that holds the text
separator = ''              # ends a document within .txt and .md, such as '<|endoftext|>' or '\n';
                            # '': a file is a document
unwrap = False              # True: lines broken at a width are joined, one paragraph a line
errors = 'strict'           # what is no text: strict refuses it; skip leaves the document out;
                            # replace puts U+FFFD for bytes that are not UTF-8
max_document_mb = 64.0      # a longer document (line of .jsonl) is left out: it bounds the memory
val_fraction = 0.0          # share of validation documents; 0: 0.05, for shakespeare nanoGPT's 0.1
shard_tokens = 100_000_000  # tokens in a shard
seed = 1337                 # of the split into train and val
workers = 0                 # processes that tokenize; 0: one, for larger corpora one a core
verify = ''                 # a data set to check against its manifest, instead of preparing one
data_dir = ''               # where prepared data lies; '': data/ beside this script
# -----------------------------------------------------------------------------
Config = settings(globals())

COLLECT = 'input'           # takes the arguments without a flag
OUR_FILES = (r'manifest\.json|tokenizer\.json|(\w+_)?(train|val)_\d{6}\.bin|'
             r'lengths\.png|\.?contamination\.json(\.partial)?|'  # explore.py's
             r'\.DS_Store|Thumbs\.db|desktop\.ini')             # what file managers leave
XZ_BYTES = 2 ** 21          # validation text is compressed for comparison up to this size
BPE_BYTES = 2 ** 28         # so many characters at the head of the training text train a tokenizer
MANY_BYTES = 2 ** 25        # a larger corpus is tokenized by one process a core
SAVE_SECONDS = 2            # between notes of how far it has come


def main(cfg):
    root = Path(cfg.data_dir or DATA_DIR).expanduser()
    if cfg.verify:
        return report(cfg.verify, root)
    source = sources.find(cfg.dataset, cfg.input, cfg.split, root / '.downloads')
    plan = make_plan(cfg, source)
    folder = root / plan['name']
    with locked(root / '.locks' / plan['name'], folder):
        if folder.exists() and is_made(folder, plan):
            return
        partial = begun(folder.with_name(f'.{folder.name}.partial'), plan)
        with kept(partial):
            if not (partial / 'manifest.json').exists():
                make = take_shards if source.ready else write_dataset
                make(cfg, source, plan, partial)
        replace(folder, partial)
    print_summary(folder, read_manifest(plan['name'], root))


def make_plan(cfg, source):
    """{'name', 'source', 'settings'}: equal plans give byte-identical data sets."""
    facts = dict(source.facts)
    kind = cfg.tokenizer
    if kind == 'auto':
        kind = 'bpe:4096' if source.name == 'pydocs' else 'gpt2'
    if file := stored(kind):
        facts['tokenizer'] = digest(file)
    fraction = cfg.val_fraction or (0.1 if source.name == 'shakespeare' else 0.05)
    if not 0 < fraction < 1:
        raise ValueError(f'val_fraction: given {fraction}, expected more than 0 and less than 1')
    if cfg.errors not in ('strict', 'replace', 'skip'):
        raise ValueError(f"errors: given {cfg.errors!r}, expected 'strict', 'replace' or 'skip'")
    if cfg.max_document_mb <= 0:
        raise ValueError(f'max_document_mb: given {cfg.max_document_mb}, expected more than 0')
    if not 0 < cfg.shard_tokens < 2 ** 31:                          # an int32 in the header
        raise ValueError(f'shard_tokens: given {cfg.shard_tokens}, expected 1 to {2 ** 31 - 1:,}')
    for key in ('workers', 'shards'):
        if getattr(cfg, key) < 0:
            raise ValueError(f'{key}: given {getattr(cfg, key)}, expected 0 or more')
    if cfg.shards and not source.ready:
        raise ValueError(f"shards: given {cfg.shards}, expected none but for "
                         f"{' and '.join(sources.READY)}, which are shards already")
    as_nanogpt = (source.name, kind) == ('shakespeare', 'chars')
    name = cfg.name or ('shakespeare_char' if as_nanogpt else source.name)
    if Path(name).name != name or name.startswith('.'):
        raise ValueError(f'name: given {name!r}, expected the name of a folder to be made in data/')
    if source.ready:
        if kind != 'gpt2':
            raise ValueError(f"{cfg.dataset} is tokens of gpt2 already, given --tokenizer={kind}; "
                             f"the text itself: {', '.join(sources.HUB)}")
        there = sum('_train_' in file.name for file in source.files)
        return {'name': name, 'source': facts, 'settings': {
            'tokenizer': kind, 'shards': min(cfg.shards or there, there)}}
    return {'name': name, 'source': facts, 'settings': {
        'tokenizer': kind, 'val_fraction': fraction, 'seed': cfg.seed, 'text_key': cfg.text_key,
        'separator': cfg.separator, 'errors': cfg.errors, 'max_document_mb': cfg.max_document_mb,
        'shard_tokens': cfg.shard_tokens, **({'unwrap': True} if cfg.unwrap else {})}}


# A data set appears by one rename; what was done of it lies in .NAME.partial until then.

@contextmanager
def locked(path, folder):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'a') as file:
        try:
            lock(file, wait=False)
        except BlockingIOError:
            raise ValueError(f'{folder} is being prepared by another process; '
                             f'wait for it or end it') from None
        yield


def is_made(folder, plan):
    """Whether the data set is there already; refuses a folder that was not made here."""
    names = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in names if not re.fullmatch(OUR_FILES, name)]
    if foreign or 'manifest.json' not in names:
        raise ValueError(f"{folder} is there and was not made by this program"
                         f"{f' (it holds {foreign[0]})' if foreign else ''}; give another --name")
    made = read_manifest(folder.name, folder.parent)
    shards = plan['settings'].get('shards', 0)
    if 0 < shards < made['settings'].get('shards', 0):
        made['settings']['shards'] = shards                         # it has even more of them
    if not same(made, plan):
        print(f'{folder} is there, made from other text or with other settings: it is replaced '
              f'once this is done')
        return False
    print(f"{folder} is there already, made from this text with these settings; "
          f"--verify={plan['name']} re-reads it")
    return True


def same(a, b):
    """Whether two plans give the same data set. The hub's revision may differ: what counts are the
    files of it that are read."""
    a, b = ((plan['settings'], {**plan['source'], 'revision': ''}) for plan in (a, b))
    return a == b


def begun(partial, plan):
    """The folder in which this very plan was begun before, or a new one.

    What was done with errors='strict' had no errors, and so fits the other ways to treat them.
    """
    file, before = partial / 'plan.json', {}
    if noted := next((path for path in (file, partial / 'manifest.json') if path.exists()), None):
        before = json.loads(noted.read_text(encoding='utf-8'))      # the manifest: it was complete
        if before['settings'].get('errors') == 'strict':
            before['settings']['errors'] = plan['settings'].get('errors')
    if before and same(before, plan):
        print(f'going on with what was begun in {partial}')
    else:
        if before:
            print(f'what was begun in {partial} was of other text or other settings: begun anew')
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    write_text(file, json.dumps(plan, indent=1))
    return partial


@contextmanager
def kept(partial):
    """Whatever happens, what was done is left for the next time."""
    words = f'what is done is kept in {partial}, the same command goes on from there'
    try:
        yield
    except ValueError:
        if not any(partial.glob('*.bin')):                          # there is nothing to leave
            shutil.rmtree(partial, ignore_errors=True)
        raise
    except OSError as error:
        raise OSError(f'{error}; {words}') from None
    except KeyboardInterrupt:
        print(f'stopped; {words}')
        raise


def replace(folder, partial):
    """Put the data set that is complete in `partial` in its place."""
    shutil.rmtree(partial / 'downloads', ignore_errors=True)
    for name in ('progress.json', 'plan.json'):
        (partial / name).unlink(missing_ok=True)
    old = folder.with_name(f'.{folder.name}.old')
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path, text):
    """The whole text or nothing, and on the disk."""
    aside = path.with_name(f'{path.name}.aside')
    with open(aside, 'w', encoding='utf-8') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


# Text to shards.

def write_dataset(cfg, source, plan, folder):
    """Write shards, tokenizer.json and, last, manifest.json into `folder`."""
    separator = cfg.separator.replace('\\n', '\n').replace('\\t', '\t')
    options = documents.Options(cfg.text_key, separator, int(cfg.max_document_mb * 2 ** 20),
                                cfg.errors, source.begins, cfg.unwrap)
    files = source.files
    path_of = sources.Downloads(files, folder / 'downloads')

    def batches(start=(0, 0, 0)):
        return documents.batches(files, start, options, path_of)

    def texts(counts):
        return (text for batch in batches() for text in documents.texts(batch, options, counts))

    progress, vocabulary = folder / 'progress.json', folder / 'tokenizer.json'
    if progress.exists():
        done = json.loads(progress.read_text(encoding='utf-8'))
    else:
        for path in folder.glob('*.bin'):       # of a beginning that came to no note
            path.unlink()
        counts = {}
        threshold = val_threshold(texts(counts), plan['settings'])
        if threshold is None:
            raise ValueError(f'there is no text to prepare{describe(counts)}' + (
                '; --max_document_mb allows longer ones, --separator parts a file'
                if documents.TOO_LONG in counts else ''))
        done = {'after': (0, 0, 0), 'threshold': threshold, 'counts': {}, 'writers': {}, 'splits': {
            part: {'tokens': 0, 'documents': 0, 'bytes': 0} for part in ('train', 'val')}}
    rule = {**plan['settings'], 'threshold': done['threshold']}
    if not vocabulary.exists():
        if rule['tokenizer'].startswith('bpe:'):
            print(f"training the tokenizer {rule['tokenizer']}", flush=True)
        enc = build(rule['tokenizer'], lambda: sample(texts({}), rule))
        write_text(vocabulary, to_json(enc))
    enc = gpt2() if rule['tokenizer'] == 'gpt2' else load(vocabulary)
    size = sum(file.size for file in files)
    processes = cfg.workers or (cores() if size > MANY_BYTES else 1)
    results = tokenized(batches(done['after']), processes, vocabulary, options, rule)
    write_splits(results, rule['shard_tokens'], eot_id(enc), done, folder, len(files))
    for file in files:
        if file.mtime and file.path.stat().st_mtime_ns != file.mtime:
            raise ValueError(f'{file.name} was changed while it was read; run the same command '
                             f'again')
    facts = done['splits']
    if facts['val']['bytes'] <= XZ_BYTES:
        facts['val']['xz_bytes'] = xz_size(folder, enc)
    write_manifest(folder, plan, enc, facts, done['counts'])


def sample(texts, rule):
    """What a tokenizer is made from: the head of the training text; for chars all there is."""
    room = BPE_BYTES
    for text, raw in texts:
        for split, part, _ in divide(text, raw, rule):
            if rule['tokenizer'] == 'chars':
                yield part
            elif split == 'train':
                yield part[:room]
                room -= len(part)
                if room <= 0:
                    return


def write_splits(results, shard_tokens, eot, done, folder, n_files):
    """Write what tokenized() gives into shards; `done` says how far it has come, on the disk too.
    """
    writers = {split: ShardWriter(folder, split, shard_tokens, eot, done['writers'].get(split))
               for split in ('train', 'val')}
    saved = began = time.monotonic()
    before = done['splits']['train']['tokens']
    with tqdm(unit='B', unit_scale=True, initial=done['splits']['train']['bytes'],
              disable=not sys.stderr.isatty()) as bar:
        for after, made, counts in results:
            for split, (ids, *amounts) in made.items():
                full = len(writers[split].shards)
                writers[split].write(np.frombuffer(ids, np.uint16))
                facts = done['splits'][split]
                for key, amount in zip(('tokens', 'documents', 'bytes'), amounts):
                    facts[key] += amount
                bar.update(amounts[-1])
                if split == 'train' and len(writers[split].shards) > full:
                    rate = (facts['tokens'] - before) / (time.monotonic() - began)
                    bar.write(f"{facts['tokens']:,} tokens, {len(writers[split].shards)} shards, "
                              f"file {min(after[0] + 1, n_files)} of {n_files}, "
                              f"{rate:,.0f} tokens/s", file=sys.stdout)
            for what, (count, where) in counts.items():
                done['counts'].setdefault(what, [0, where])[0] += count
            done['after'] = after
            if time.monotonic() - saved > SAVE_SECONDS:
                done['writers'] = {split: writer.sync() for split, writer in writers.items()}
                write_text(folder / 'progress.json', json.dumps(done))
                saved = time.monotonic()
    for split, writer in writers.items():
        writer.close()
        done['splits'][split]['shards'] = writer.shards


def write_manifest(folder, plan, enc, splits, counts):
    manifest = {
        'format': 1, 'name': plan['name'], 'source': plan['source'], 'settings': plan['settings'],
        'tokenizer': {'name': plan['settings']['tokenizer'], 'vocab_size': enc.n_vocab,
                      'eot_id': eot_id(enc), 'fingerprint': fingerprint(enc)},
        'splits': splits, 'remarks': counts,
        'versions': {name: version(name) for name in ('tiktoken', 'tokenizers', 'numpy')}}
    write_text(folder / 'manifest.json', json.dumps(manifest, indent=1))


def xz_size(folder, enc):
    """The bytes that `xz -9e` makes of the validation text."""
    tokens, eot = Tokens(folder.name, 'val', enc.n_vocab, folder.parent), eot_id(enc)
    text = b''.join(enc.decode_bytes(ids[ids != eot].tolist()) for ids in tokens.chunks(2 ** 16))
    return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


# Shards that others made of GPT-2's tokens.

def take_shards(cfg, source, plan, folder):
    """Fetch the shards of a data set that is tokenized already, and write its manifest.

    Those that an earlier, smaller call brought are taken from its folder.
    """
    enc, wanted = gpt2(), plan['settings']['shards']
    files = [file for file in source.files if '_val_' in file.name]
    files += [file for file in source.files if '_train_' in file.name][:wanted]
    earlier = folder.with_name(plan['name'])
    missing = [file.size for file in files
               if not (folder / file.name).exists() and not (earlier / file.name).exists()]
    if sum(missing) > (free := shutil.disk_usage(folder).free):
        raise OSError(f'{len(missing)} shards are {sum(missing) / 1e9:.1f} GB, there are '
                      f'{free / 1e9:.1f} GB free; --shards=N takes the first N')
    sizes = np.zeros(2 ** 16, np.int64)             # of tokens in bytes, 0 for <|endoftext|>
    sizes[:enc.n_vocab] = [len(token) for token in token_bytes(enc)]
    splits = {split: {'tokens': 0, 'documents': 0, 'bytes': 0, 'shards': []}
              for split in ('train', 'val')}
    for file in tqdm(files, unit='shard', disable=not sys.stderr.isatty()):
        path = folder / file.name
        if not path.exists():
            with suppress(OSError):                 # not there, or a disk without such links
                os.link(earlier / file.name, path)
        if not path.exists() or digest(path) != file.hash:
            os.replace(sources.download(file, folder / 'downloads'), path)
        facts, _ = read_shard(path, eot_id(enc), sizes)
        part = splits['val' if '_val_' in file.name else 'train']
        part['shards'].append({'file': file.name, **facts})
        for key in ('tokens', 'documents', 'bytes'):
            part[key] += facts[key]
    write_text(folder / 'tokenizer.json', to_json(enc))
    write_manifest(folder, plan, enc, splits, {})


def describe(counts):
    """': 2 empty (the first: a.txt), …'"""
    words = (f'{count:,} {what} (the first: {where})' for what, (count, where) in counts.items())
    return ': ' + ', '.join(words) if counts else ''


def print_summary(folder, manifest):
    train, val = manifest['splits']['train'], manifest['splits']['val']
    vocab = manifest['tokenizer']
    print(f"{folder}: {train['tokens']:,} tokens of {train['documents']:,} documents to train on, "
          f"{val['tokens']:,} of {val['documents']:,} to validate; "
          f"{vocab['name']}, {vocab['vocab_size']:,} tokens, "
          f"{train['bytes'] / train['tokens']:.2f} bytes a token")
    if manifest['remarks']:
        print('of the documents' + describe(manifest['remarks']))
    if documents.MARKED in manifest['remarks'] and not manifest['settings'].get('separator'):
        print("if <|endoftext|> parts documents there: --separator='<|endoftext|>'")
    if val['bytes'] > train['bytes']:
        print('more to validate than to train on: these are few documents, and hashes decide; '
              'another --seed decides otherwise, --separator parts files, one file alone is cut')


def report(name, root):
    """Print that data set `name` is whole, or raise ValueError naming what is wrong with it."""
    wrong, both = find_damage(name, root), 0
    if not wrong:
        manifest, _ = load_facts(name, root)                        # or the tokenizer is refused
        both = leaked(name, root)
        words = f'{both:,} documents of train stand in val too'
        if both and 'shards' not in manifest['settings']:
            wrong.append(f'{root / name}: {words}')
    if wrong:
        raise ValueError('\n'.join([f'{name} is not whole:', *wrong]))
    print(f'{name} is whole: ' + ', '.join(
        f"{split} {facts['tokens']:,} tokens in {len(facts['shards'])} shard"
        f"{'s' * (len(facts['shards']) > 1)}" for split, facts in manifest['splits'].items())
          + (f'; as it was published, {words}' if both else ''))


if __name__ == '__main__':
    run(main, Config, collect=COLLECT)
