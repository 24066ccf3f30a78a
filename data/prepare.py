"""
Text becomes tokens in shards, ready for train.py.

    python data/prepare.py                                          # the offline corpus, pydocs
    python data/prepare.py --dataset=shakespeare --tokenizer=chars  # nanoGPT's shakespeare_char
    python data/prepare.py --name=mine notes/ book.txt web.jsonl    # your own text
    python data/prepare.py --verify=pydocs                          # re-read everything and compare
"""

import ast
import gzip
import hashlib
import inspect
import json
import lzma
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # this file runs from data/
from configurator import run, settings
from data import shards
from data.fetch import digest, fetch
from tokenizer import build, encode, eot_id, fingerprint, load, stored, to_json

# -----------------------------------------------------------------------------
dataset = 'pydocs'          # pydocs, shakespeare, or a file or folder of text
input = ()                  # files and folders instead; also given bare:
                            # prepare.py --name=mine a.txt b/
name = ''                   # data/NAME is written; '': the data set's name, or the first input's
tokenizer = 'auto'          # gpt2, bpe:N, bytes, chars, or that of a folder, such as a run's;
                            # auto: gpt2, but for pydocs bpe:4096
text_key = 'text'           # the field or column of .jsonl and .parquet that holds the text
val_fraction = 0.0          # share of validation documents; 0: 0.05, for shakespeare nanoGPT's 0.1
shard_tokens = 100_000_000  # tokens in a shard
seed = 1337                 # of the split into train and val
verify = ''                 # a data set to check against its manifest, instead of preparing one
data_dir = ''               # where prepared data lies; '': data/ beside this script
# -----------------------------------------------------------------------------
Config = settings(globals())

COLLECT = 'input'           # takes the arguments without a flag
SUFFIXES = ('.txt', '.md', '.jsonl', '.jsonl.gz', '.parquet')
SHAKESPEARE = (
    'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt',
    '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed')
OUR_FILES = (r'manifest\.json|tokenizer\.json|(train|val)_\d{6}\.bin|'
             r'lengths\.png|contamination\.json')            # the last two are explore.py's
XZ_BYTES = 2 ** 24          # validation text is compressed for comparison up to this size
BPE_BYTES = 2 ** 28         # so many characters at the head of the training text train a tokenizer


def main(cfg):
    if cfg.verify:
        return report(cfg.verify, cfg.data_dir)
    plan = make_plan(cfg)
    folder = Path(cfg.data_dir or shards.DATA_DIR) / plan['name']
    if folder.exists():
        check_replaceable(folder)
        made = shards.read_manifest(plan['name'], cfg.data_dir)
        if made['settings'] == plan['settings'] and made['source'] == plan['source']:
            print(f"{folder} is there already, made from this text with these settings; "
                  f"--verify={plan['name']} re-reads it")
            return
    partial = folder.with_name(f'.{folder.name}.partial')   # a whole data set appears by one rename
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        manifest = write_dataset(cfg, plan, partial)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise OSError(f'{error}; nothing was changed in {folder}') from None
        raise
    if folder.exists():
        shutil.rmtree(old := folder.with_name(f'.{folder.name}.old'), ignore_errors=True)
        folder.rename(old)
        shutil.rmtree(old)
    partial.rename(folder)
    train, val = manifest['splits']['train'], manifest['splits']['val']
    vocab = manifest['tokenizer']
    print(f"{folder}: {train['tokens']:,} tokens of {train['documents']:,} documents to train on, "
          f"{val['tokens']:,} of {val['documents']:,} to validate; "
          f"{vocab['name']}, {vocab['vocab_size']:,} tokens, "
          f"{train['bytes'] / train['tokens']:.2f} bytes a token")


def make_plan(cfg):
    """Where the text comes from and under which settings:
    equal plans give byte-identical data sets."""
    inputs, source = [Path(path) for path in cfg.input], cfg.dataset
    if not inputs and source not in ('pydocs', 'shakespeare'):
        if not Path(source).exists():
            raise ValueError(f"dataset: given {source!r}, expected 'pydocs', 'shakespeare', "
                             f"or a file or folder ({', '.join(SUFFIXES)})")
        inputs = [Path(source)]
    if source == 'shakespeare' and not inputs:
        path = Path(cfg.data_dir or shards.DATA_DIR) / '.downloads/shakespeare.txt'
        inputs = [fetch(SHAKESPEARE[0], path, SHAKESPEARE[1])]
    if source == 'pydocs' and not inputs:
        files, facts = python_files(), {'pydocs': f'Python {sys.version.split()[0]}'}
    else:
        files = [file for path in inputs for file in text_files(path)]
        facts = {'files': [[file.name, file.stat().st_size, digest(file)] for file in files]}
    named = ('shakespeare' if source == 'shakespeare' else
             inputs[0].resolve().stem if inputs else source)
    kind = cfg.tokenizer if cfg.tokenizer != 'auto' else 'bpe:4096' if named == 'pydocs' else 'gpt2'
    if file := stored(kind):
        facts['tokenizer'] = digest(file)
    fraction = cfg.val_fraction or (0.1 if named == 'shakespeare' else 0.05)
    if not 0 < fraction < 1:
        raise ValueError(f'val_fraction: given {fraction}, expected more than 0 and less than 1')
    if cfg.shard_tokens < 1:
        raise ValueError(f'shard_tokens: given {cfg.shard_tokens}, expected 1 or more')
    name = cfg.name or named + ('_char' if (named, kind) == ('shakespeare', 'chars') else '')
    if Path(name).name != name or name.startswith('.'):
        raise ValueError(f'name: given {name!r}, expected the name of a folder to be made in data/')
    return {'name': name, 'files': files, 'source': facts, 'settings': {
        'tokenizer': kind, 'val_fraction': fraction, 'seed': cfg.seed, 'text_key': cfg.text_key,
        'shard_tokens': cfg.shard_tokens}}


def check_replaceable(folder):
    """Refuse to replace a folder that holds anything but a data set made here."""
    names = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in names if not re.fullmatch(OUR_FILES, name)]
    if foreign or 'manifest.json' not in names:
        raise ValueError(f"{folder} is there and was not made by this program"
                         f"{f' (it holds {foreign[0]})' if foreign else ''}; give another --name")


def write_dataset(cfg, plan, folder):
    """Write shards, tokenizer.json and, last, manifest.json into `folder`; returns the manifest."""
    options = plan['settings']

    def documents():
        for file in plan['files']:
            yield from (text for text in read_documents(file, cfg.text_key) if text)

    threshold = val_threshold(documents, options['seed'], options['val_fraction'])

    def texts(wanted=('train', 'val')):
        for document in documents():
            yield from (text for split, text in divide(document, threshold, options)
                        if split in wanted)

    def train_texts():                                              # the head of the training text
        room = BPE_BYTES
        for text in texts(['train']):
            yield text[:room]
            room -= len(text)
            if room <= 0:
                return

    enc = build(options['tokenizer'], texts if options['tokenizer'] == 'chars' else train_texts)
    size = sum(file.stat().st_size for file in plan['files'])
    with tqdm(total=size, unit='B', unit_scale=True, desc=plan['name'],
              disable=not sys.stderr.isatty()) as bar:
        divided = (part for document in documents()
                   for part in divide(document, threshold, options))
        facts = write_splits(divided, enc, folder, options['shard_tokens'], bar)
    manifest = {
        'format': 1, 'name': plan['name'], 'source': plan['source'], 'settings': options,
        'tokenizer': {'name': enc.name, 'vocab_size': enc.n_vocab, 'eot_id': eot_id(enc),
                      'fingerprint': fingerprint(enc)},
        'splits': facts}
    (folder / 'tokenizer.json').write_text(to_json(enc), encoding='utf-8')
    with open(folder / 'manifest.json', 'w', encoding='utf-8') as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    return manifest


def write_splits(divided, enc, folder, shard_tokens, bar):
    """Tokenize (split, text) pairs into shards; returns {split: what the manifest says of it}."""
    eot = np.array([] if eot_id(enc) is None else [eot_id(enc)], np.uint16)
    writers = {split: shards.ShardWriter(folder, split, shard_tokens) for split in ('train', 'val')}
    facts = {split: {'tokens': 0, 'documents': 0, 'bytes': 0} for split in writers}
    xz, xz_bytes = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME), 0
    for split, text in divided:
        ids, raw = np.concatenate([eot, encode(enc, text)]), text.encode()
        if split == 'val' and facts[split]['bytes'] + len(raw) <= XZ_BYTES:
            xz_bytes += len(xz.compress(raw))
        writers[split].write(ids)
        for key, amount in (('tokens', len(ids)), ('documents', 1), ('bytes', len(raw))):
            facts[split][key] += amount
        bar.update(len(raw))
    for split, writer in writers.items():
        writer.close()
        facts[split]['shards'] = writer.shards
    if facts['val']['bytes'] <= XZ_BYTES:
        facts['val']['xz_bytes'] = xz_bytes + len(xz.flush())       # what `xz -9e` makes of it
    return facts


# Which documents are validation: those whose hash is small, so that adding documents moves none.

def document_hash(text, seed):
    """A number from 0 to 1 that depends on (seed, text) alone."""
    drawn = hashlib.blake2b(f'{seed}:{text}'.encode(), digest_size=8).digest()
    return int.from_bytes(drawn) / 2 ** 64


def val_threshold(documents, seed, val_fraction):
    """Documents with a hash below it are validation: val_fraction,
    unless one side would be empty then.

    0 for a corpus of one (distinct) document, which is split by position. Reads until a document
    of each side was seen. Raises ValueError for a corpus without text.
    """
    hashes = set()
    for text in documents():
        hashes.add(document_hash(text, seed))
        if min(hashes) < val_fraction <= max(hashes):
            return val_fraction
    if not hashes:
        raise ValueError('there is no text to prepare: every document is empty')
    lowest = sorted(hashes)[:2]
    return 0.0 if len(hashes) == 1 else max(hashes) if max(hashes) < val_fraction else lowest[1]


def divide(text, threshold, options):
    """[(split, text)] of one document."""
    if threshold == 0.0:
        cut = int(len(text) * (1 - options['val_fraction']))
        return [('train', text[:cut]), ('val', text[cut:])]
    return [('val' if document_hash(text, options['seed']) < threshold else 'train', text)]


# Where documents come from: each reader gives texts in an order that depends on the files alone.

def text_files(path):
    """`path`, or the text files in the folder `path`, in order of their names."""
    if not path.exists():
        raise ValueError(f'{path}: there is no such file or folder')
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise ValueError(f"{path}: expected {', '.join(SUFFIXES)} or a folder of these")
        return [path]
    files = sorted(file for file in path.rglob('*')
                   if file.is_file() and file.name.endswith(SUFFIXES)
                   and not any(part.startswith('.') for part in file.relative_to(path).parts))
    if not files:
        raise ValueError(f"{path}: no {', '.join(SUFFIXES)} in this folder")
    return files


def read_documents(file, text_key):
    """The texts in `file`: one of a .txt or .md, one a line of .jsonl, one a row of .parquet."""
    if file.suffix == '.py':
        yield from python_documents(file)
    elif file.suffix == '.parquet':
        yield from parquet_documents(file, text_key)
    elif file.name.endswith(('.jsonl', '.jsonl.gz')):
        yield from jsonl_documents(file, text_key)
    else:
        yield decoded(file.read_bytes(), file)


def decoded(raw, where):
    try:
        return raw.decode('utf-8')
    except UnicodeDecodeError as error:
        raise ValueError(f'{where}: byte {raw[error.start]:#04x} at {error.start:,} is not UTF-8; '
                         f'convert it, as in: iconv -f latin1 -t utf-8') from None


def jsonl_documents(file, text_key):
    with gzip.open(file) if file.suffix == '.gz' else open(file, 'rb') as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(decoded(line, f'{file}:{number}'))[text_key]
            except json.JSONDecodeError as error:
                raise ValueError(f'{file}:{number}: not JSON: {error}') from None
            except (KeyError, TypeError):
                raise ValueError(f'{file}:{number}: no field {text_key!r} here; '
                                 f'--text_key names another') from None
            yield checked(text, f'{file}:{number}', text_key)


def parquet_documents(file, text_key):
    from pyarrow import ArrowInvalid, parquet
    try:
        table = parquet.ParquetFile(file)
    except ArrowInvalid as error:
        raise ValueError(f'{file}: not a parquet file ({error})') from None
    if text_key not in table.schema_arrow.names:
        raise ValueError(f"{file}: no column {text_key!r} among "
                         f"{', '.join(table.schema_arrow.names)}; --text_key names another")
    for batch in table.iter_batches(batch_size=256, columns=[text_key]):
        for text in batch.column(0).to_pylist():
            yield checked(text, file, text_key)


def checked(text, where, text_key):
    """`text`, a str, with lone surrogates (which UTF-8 has no form for) replaced; None is ''."""
    if not isinstance(text, str | None):
        raise ValueError(f'{where}: {text_key} is {type(text).__name__}, expected a text')
    return (text or '').encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


def python_files():
    """The modules of the standard library, without its tests and what others installed."""
    library = Path(sysconfig.get_paths()['stdlib'])
    left_out = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}
    return sorted(file for file in library.rglob('*.py')
                  if not left_out & set(file.relative_to(library).parts)
                  and not file.relative_to(library).parts[0].startswith('config-'))


def python_documents(file):
    """The docstrings of the module `file`, joined, or each topic of pydoc_data.topics;
    nothing is imported."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return                                                      # a deliberately broken example
    if file.parts[-2:] == ('pydoc_data', 'topics.py'):
        for node in tree.body:
            if isinstance(node, ast.Assign):
                yield from ast.literal_eval(node.value).values()
        return
    with_docstring = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node, clean=False) for node in ast.walk(tree)
             if isinstance(node, with_docstring))
    yield '\n\n'.join(inspect.cleandoc(text) for text in texts if text)


def report(name, data_dir):
    """Print that data set `name` is whole, or raise ValueError naming what is wrong with it."""
    folder = Path(data_dir or shards.DATA_DIR) / name
    if not folder.is_dir():
        raise ValueError(f'verify: there is no data set in {folder}')
    wrong = shards.verify(name, data_dir)
    made_with = shards.read_manifest(name, data_dir).get('tokenizer', {}).get('fingerprint')
    if made_with and fingerprint(load(folder / 'tokenizer.json')) != made_with:
        wrong.append(f'{folder}/tokenizer.json is not the one that made the tokens')
    if wrong:
        raise ValueError('\n'.join([f'{name} is damaged:', *wrong]))
    splits = shards.read_manifest(name, data_dir)['splits']
    print(f'{name} is whole:',
          ', '.join(f"{split} {facts['tokens']:,} tokens in {len(facts['shards'])} shards"
                    for split, facts in splits.items()))


if __name__ == '__main__':
    run(main, Config, collect=COLLECT)
