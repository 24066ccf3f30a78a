"""
What is in prepared data, how it reads, and whether test sets appear in it.

    python data/explore.py pydocs                           # a page of figures
    python data/explore.py pydocs --decode=train_000000:0   # the text at a position
    python data/explore.py pydocs --contamination=hellaswag,cbt,lambada,wikitext2

Contamination is measured as in the GPT-2 paper (section 4): texts become lower-case words of
letters and digits, and the measure is the fraction of a test set's 8-grams that appear in the
training text; beside it that of 13-grams, as in the GPT-3 paper.
"""

import json
import random
import re
import sys
from array import array
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # this file runs from data/
from gpt.settings import check_bounds, run, settings

# -----------------------------------------------------------------------------
name = ()               # the data set, as a plain argument: explore.py pydocs
decode = ''             # SHARD:OFFSET, as train_000000:0: show the text there, instead of the page
count = 256             # tokens that are shown of it
contamination = ()      # of hellaswag, cbt, lambada, wikitext2: look for these, instead of the
                        # page; SET=PATH reads your own file, cbt=PATH also a folder
seed = 1337             # of the documents whose beginning the page shows
width = 100             # columns of what is printed
out = ''                # of --contamination; '': contamination.json in the folder of the data set
data_dir = ''           # where prepared data is; '': data/ beside this script
# -----------------------------------------------------------------------------
Config = settings(globals())

import numpy as np
from tqdm import tqdm

from gpt import tokenizer
from gpt.data import benchmarks, overlap, shards
from gpt.files import atomic_write, check_output
from gpt.files import decode as decode_text

COLLECT = 'name'        # takes the argument without a flag
BOUNDS = (('1 or more', lambda value: value >= 1, 'count'),
          ('60 to 10,000', lambda value: 60 <= value <= 10_000, 'width'))
SHOWN = 5               # documents that are printed
QUANTILES = (('shortest', 0), ('10 % are up to', 0.1), ('half are up to', 0.5),
             ('90 % are up to', 0.9), ('longest', 1))
NGRAMS = (8, 13)


class Prepared(NamedTuple):
    """A prepared data set."""
    folder: Path
    manifest: dict          # {}: shards without one, taken for GPT-2's tokens
    encoding: tokenizer.Encoding
    eot: int | None
    splits: dict            # {'train': Tokens, 'val': Tokens}


def main(cfg):
    if len(cfg.name) != 1:
        raise ValueError(f"name: given {' '.join(cfg.name) or 'none'}, expected one data set, "
                         f"as in: python data/explore.py pydocs")
    check_bounds(cfg, BOUNDS)
    if cfg.out and not cfg.contamination:
        raise ValueError(f'out: given {cfg.out!r}, expected with --contamination')
    data = open_data(cfg.name[0], cfg.data_dir)
    if cfg.decode:
        print(text_at(data, cfg.decode, cfg.count, cfg.width))
    elif cfg.contamination:
        report_contamination(cfg, data)
    else:
        print_page(cfg, data)


def open_data(name, data_dir):
    folder = Path(data_dir or shards.DATA_DIR) / name
    manifest, encoding = shards.load_facts(name, data_dir)
    splits = ['train', 'val']
    if not manifest and not any(folder.glob('*val*.bin')):
        splits = ['train']
    tokens = {split: shards.Tokens(name, split, encoding.n_vocab, data_dir) for split in splits}
    return Prepared(folder, manifest, encoding, encoding.eot, tokens)


def progress_bar(tokens, split):
    return tqdm(total=len(tokens), unit=' tokens', unit_scale=True, desc=split, leave=False,
                disable=None)


# The page.

def print_page(cfg, data):
    found = {split: survey(data, split) for split in data.splits}
    print(f'{data.folder.name}: {shards.describe_source(data.manifest)}\n')
    print(' ' * 22 + ''.join(f'{split:>18}' for split in found))
    for label, texts in figures(data, found):
        print(f'{label:<22}' + ''.join(f'{text:>18}' for text in texts))
    if data.eot is None:
        print('\nThese tokens have no <|endoftext|>: document boundaries are not known.')
    print('\nsampled from train, by length in tokens')
    print(*samples(cfg, data, found['train'][0]), sep='\n')


def survey(data, split):
    """(tokens of each document, hash of each), in order; 16 bytes of memory per document."""
    tokens = data.splits[split]
    lengths, hashes = array('q'), bytearray()
    with progress_bar(tokens, split) as bar:
        for length, digest in shards.documents(tokens, data.eot):
            lengths.append(length)
            hashes += digest[:8]
            bar.update(length + 1)
    return np.asarray(lengths), np.frombuffer(hashes, '<u8')


def figures(data, found):
    """(label, a text for each split) of every line of the page's table."""
    splits = [data.splits[split] for split in found]
    lengths, hashes = zip(*found.values())
    yield f'tokens of {data.encoding.name}', [f'{len(tokens):,}' for tokens in splits]
    yield 'shards', [f'{len(tokens.paths):,}' for tokens in splits]
    if data.manifest:
        sizes = [data.manifest['splits'][split]['bytes'] for split in found]
        yield 'bytes of text', [f'{size:,}' for size in sizes]
        yield 'bytes a token', [f'{size / len(tokens):.3f}' for size, tokens in zip(sizes, splits)]
    if data.eot is None:
        return
    yield 'documents', [f'{len(part):,}' for part in hashes]
    repeated = [(len(part) - len(np.unique(part)), len(part)) for part in hashes]
    yield '  exact duplicates', [f'{n:,} ({n / total:.2%})' for n, total in repeated]
    if 'val' in found:
        both = np.isin(hashes[1], hashes[0]).sum()
        yield '  also in train', ['', f'{both:,} ({both / len(hashes[1]):.2%})']
    for label, q in QUANTILES:
        yield f'  {label}', [f"{np.quantile(part, q, method='inverted_cdf'):,} tokens"
                             for part in lengths]
    yield '  mean', [f'{part.mean():,.1f} tokens' for part in lengths]


def samples(cfg, data, lengths):
    """The beginnings of some documents of train, a line each."""
    tokens, rng = data.splits['train'], random.Random(cfg.seed)
    first = int(tokens.read(0, 1)[0] == data.eot)       # 0: nothing before the first document
    places = [(int(lengths[i]), first + i + int(lengths[:i].sum()))
              for i in sorted(rng.sample(range(len(lengths)), min(SHOWN, len(lengths))))]
    for length, start in places:
        raw = data.encoding.decode_bytes(tokens.read(start, min(length, cfg.width)).tolist())
        line = re.sub(r'\s*\n\s*', ' ↵ ', raw.decode('utf-8', 'replace').strip())
        line = ''.join(char if char.isprintable() else ' ' for char in line)
        yield f'{length:>12,}  {line}'[:cfg.width]


# Text at a position.

def text_at(data, place, count, width):
    """The text of `count` tokens from SHARD:OFFSET on, below a line that describes the position."""
    shard, _, offset = place.rpartition(':')
    known = {path.stem: (tokens, int(start), int(end - start)) for tokens in data.splits.values()
             for path, start, end in zip(tokens.paths, tokens.starts, tokens.starts[1:])}
    stem = shard.removesuffix('.bin')
    tokens, first, size = known.get(stem, (None, 0, 0))
    if not (offset.isdecimal() and len(offset) < 20 and int(offset) < size):
        holds = f'an offset below {size:,}' if tokens else f"a shard of {', '.join(known)}"
        raise ValueError(f'decode: given {place!r}, expected SHARD:OFFSET, {holds}')
    offset = int(offset)
    ids = tokens.read(first + offset, min(count, size - offset))
    head = f'{stem}: tokens {offset:,} to {offset + len(ids) - 1:,} of {size:,}'
    table = tokenizer.token_bytes(data.encoding)
    if data.eot is not None:
        table[data.eot] = f'\n──── <|endoftext|> {"─" * (width - 19)}\n'.encode()
    return f'{head}\n' + b''.join(table[i] for i in ids.tolist()).decode('utf-8', 'replace')


# Contamination: the n-grams of the test sets are in memory, the shards are streamed.

def report_contamination(cfg, data):
    """Look for the n-grams of the test sets in train; print and write what was found."""
    sets = {name: (items, facts) for name, items, facts in map(read_set, cfg.contamination)}
    if len(sets) < len(cfg.contamination):
        raise ValueError(f"contamination: given {','.join(cfg.contamination)}, expected each set "
                         f"once; look for them one after another, each with its own --out")
    own = data.folder / 'contamination.json'
    path = check_output(cfg.out or own, *{*data.folder.iterdir()} - {own},
                        *(facts['path'] for _, facts in sets.values()))
    items = [text for texts, _ in sets.values() for text in texts]
    first = np.cumsum([0, *(len(texts) for texts, _ in sets.values())])     # item of each set
    grams = {n: overlap.ngrams_of(items, n) for n in NGRAMS}
    known = {n: np.unique(hashes) for n, (hashes, _) in grams.items()}
    train = data.splits['train']
    with progress_bar(train, 'train') as bar:
        found = overlap.look_up(pieces(data, bar), known)
    result = {name: {**facts, 'items': len(texts), 'ngrams': {}}
              for name, (texts, facts) in sets.items()}
    for n, (hashes, of) in grams.items():
        hits = found[n][np.searchsorted(known[n], hashes)]
        bounds = np.searchsorted(of, first)                         # of each set's n-grams
        for name, start, end in zip(result, bounds, bounds[1:]):
            result[name]['ngrams'][n] = measure(hashes[start:end], of[start:end], hits[start:end])
    print(format_report(data, result))
    atomic_write(path, json.dumps({'dataset': data.folder.name, 'settings': vars(cfg),
                                   'tokens': len(train), 'sets': result}, indent=1))
    print(f'\n{path}')


def read_set(entry):
    """(name, the texts of its items, facts) of a test set given as NAME or NAME=PATH."""
    name, _, path = entry.partition('=')
    if name == 'hellaswag':
        rows, facts = benchmarks.hellaswag(path)
        return name, [f"{row['ctx']} {row['endings'][row['label']]}" for row in rows], facts
    if name == 'cbt':
        return name, *read_cbt(path)
    if name == 'lambada':
        return name, *benchmarks.lambada(path)
    if name == 'wikitext2':
        raw, facts = benchmarks.obtain(name, path)
        return name, benchmarks.articles(decode_text(raw, facts['path'])), facts
    raise ValueError(f'contamination: given {name!r}, expected some of hellaswag, cbt, lambada, '
                     f'wikitext2, each also as NAME=PATH')


def read_cbt(path):
    """(texts, facts) of the questions with their answers, common nouns and named entities."""
    file = Path(path).expanduser()
    subsets = ['CN', 'NE']
    if file.is_file():
        subsets = ['NE'] if '_NE_' in file.name else ['CN']
    sets = [benchmarks.cbt(subset, 'valid', path) for subset in subsets]
    texts = []
    for questions, _ in sets:
        for asked in questions:
            text = ' '.join([*asked.sentences, asked.query.replace('XXXXX', asked.answer)])
            texts.append(re.sub(r'-[LR][RSC]B-', ' ', text).replace(" n't", "n't"))
    return texts, benchmarks.facts_together([facts for _, facts in sets])


def pieces(data, bar):
    """The bytes of train in pieces that end between words, overlap.MARK between documents."""
    table, rest = tokenizer.token_bytes(data.encoding), b''
    if data.eot is not None:
        table[data.eot] = overlap.MARK
    joined, sizes = np.frombuffer(b''.join(table), np.uint8), np.array([len(raw) for raw in table])
    starts = np.cumsum(sizes) - sizes
    for ids in data.splits['train'].chunks(2 ** 15):
        size = sizes[ids]                           # in numpy, twice as fast as joining the table's
        ends = np.cumsum(size)
        places = np.repeat(starts[ids] - (ends - size), size) + np.arange(ends[-1])
        raw = rest + joined[places].tobytes()
        cut = max(raw.rfind(between) for between in (b' ', b'\n', overlap.MARK)) + 1
        if not cut and len(raw) > 2 ** 22:
            cut = len(raw)                                          # no word is that long
        rest = raw[cut:]
        yield raw[:cut]
        bar.update(len(ids))
    yield rest


def measure(hashes, of, hits):
    """Figures of the n-grams of a test set: their hashes, items, and whether they are in train."""
    total, hit = np.bincount(of), np.bincount(of, hits)
    return {'items': int((total > 0).sum()), 'distinct': len(np.unique(hashes)),
            'found': len(np.unique(hashes[hits])), 'touched': int((hit > 0).sum()),
            'half': int((2 * hit >= total)[total > 0].sum())}


def format_report(data, result):
    lines = [f"{data.folder.name}: {len(data.splits['train']):,} tokens of train, searched for the "
             f"n-grams of test sets", '',
             f'{"":10}{"items":>8}{"n":>5}{"long enough":>13}{"n-grams":>12}{"found":>10}'
             f'{"items touched":>16}{"by half or more":>18}']
    for name, facts in result.items():
        head = f"{name:10}{facts['items']:>8,}"
        for n, row in facts['ngrams'].items():
            items = row['items'] or 1
            lines.append(f"{head}{n:>5}{row['items']:>13,}{row['distinct']:>12,}"
                         f"{row['found'] / (row['distinct'] or 1):>10.3%}"
                         f"{row['touched'] / items:>16.2%}{row['half'] / items:>18.2%}")
            head = ' ' * 18
    return '\n'.join(lines)


if __name__ == '__main__':
    run(main, Config, collect=COLLECT)
