"""
A look into prepared data: what is in it, how it reads, and whether test sets stand in it.

    python data/explore.py pydocs                           # a page of figures, and lengths.png
    python data/explore.py pydocs --decode=train_000000:0   # the text that lies at a place
    python data/explore.py pydocs --contamination=hellaswag,cbt,lambada,wikitext2

Contamination is measured as the GPT-2 paper does (section 4): texts become lower-case words of
letters and digits, and what counts is the share of a test set's 8-grams that stand in the training
text; beside it that of 13-grams, which GPT-3's authors chose.
"""

import json
import os
import random
import re
import sys
from array import array
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # this file runs from data/
from gpt import tokenizer
from gpt.settings import run, settings
from gpt.data import benchmarks
from gpt.data import overlap
from gpt.data import shards
from gpt.data.shards import load_facts

# -----------------------------------------------------------------------------
name = ()               # the data set, given bare: explore.py pydocs
decode = ''             # SHARD:OFFSET, as train_000000:0: show the text there, instead of the page
count = 256             # tokens that are shown of it
contamination = ()      # of hellaswag, cbt, lambada, wikitext2: look for these, instead of the
                        # page; SET=PATH reads a file of one's own, cbt=PATH also a folder
seed = 1337             # of the documents whose beginning the page shows
width = 100             # columns of what is printed
out = ''                # '': lengths.png or contamination.json in the folder of the data set
data_dir = ''           # where prepared data lies; '': data/ beside this script
# -----------------------------------------------------------------------------
Config = settings(globals())

COLLECT = 'name'        # takes the argument without a flag
TOP, SHOWN, WORST = 20, 5, 3        # tokens, documents, and overlaps of a test set that are printed
NGRAMS = (8, 13)
# the GPT-2 paper on WebText: table 6, and for LAMBADA an average over its passages
PAPER = {'lambada': 'of LAMBADA 1.2 % (mean over its passages)',
         'wikitext2': 'of WikiText-2 1.63 %'}


class Data(NamedTuple):
    folder: Path
    manifest: dict          # {}: shards that came without one, taken for GPT-2's tokens
    enc: object
    eot: int | None
    splits: dict            # {'train': Tokens, 'val': Tokens}


def main(cfg):
    if len(cfg.name) != 1:
        raise ValueError(f"name: given {' '.join(cfg.name) or 'none'}, expected one data set, "
                         f"as in: python data/explore.py pydocs")
    for key, least in (('count', 1), ('width', 60)):
        if getattr(cfg, key) < least:
            raise ValueError(f'{key}: given {getattr(cfg, key)}, expected {least} or more')
    data = open_data(cfg.name[0], cfg.data_dir)
    if cfg.decode:
        print(text_at(data, cfg.decode, cfg.count, cfg.width))
    elif cfg.contamination:
        report(cfg, data)
    else:
        page(cfg, data)


def open_data(name, data_dir):
    folder = Path(data_dir or shards.DATA_DIR) / name
    manifest, enc = load_facts(name, data_dir)
    splits = manifest['splits'] if manifest else [
        'train', *(['val'] if any(folder.glob('*val*.bin')) else [])]
    tokens = {split: shards.Tokens(name, split, enc.n_vocab, data_dir) for split in splits}
    return Data(folder, manifest, enc, tokenizer.eot_id(enc), tokens)


def token_table(data, mark):
    """The bytes of every token in order of its id, `mark` for <|endoftext|>."""
    return [mark if i == data.eot else data.enc.decode_single_token_bytes(i)
            for i in range(data.enc.n_vocab)]


def progress(tokens, what):
    return tqdm(total=len(tokens), unit=' tokens', unit_scale=True, desc=what, leave=False,
                disable=not sys.stderr.isatty())


# The page. Memory for each document is 16 bytes, once more to sort them.

class Survey(NamedTuple):
    lengths: np.ndarray     # tokens of each document, in order
    hashes: np.ndarray      # of each document's ids
    counts: np.ndarray      # how often each token occurs, <|endoftext|> left out


def survey(data, split):
    tokens, counts = data.splits[split], np.zeros(data.enc.n_vocab, np.int64)
    for ids in tokens.chunks():
        counts += np.bincount(ids, minlength=len(counts))
    if data.eot is not None:
        counts[data.eot] = 0
    lengths, hashes, length, digest = array('q'), bytearray(), 0, blake2b(digest_size=8)
    with progress(tokens, split) as bar:
        for ids, ends in shards.documents(tokens, data.eot):
            digest.update(ids)
            length += len(ids)
            bar.update(len(ids) + ends)
            if ends:
                lengths.append(length)
                hashes += digest.digest()
                length, digest = 0, blake2b(digest_size=8)
    return Survey(np.asarray(lengths), np.frombuffer(hashes, '<u8'), counts)


def page(cfg, data):
    found = {split: survey(data, split) for split in data.splits}
    print(f'{data.folder.name}: {source(data.manifest)}\n\n{"":22}' + ''.join(
        f'{split:>18}' for split in found))
    for label, texts in figures(data, found):
        print(f'{label:<22}' + ''.join(f'{text:>18}' for text in texts))
    if data.eot is None:
        print('\nThere is no <|endoftext|> among these tokens: document boundaries are not known.')
    else:
        print(f'\n{histogram(found, cfg.width)}')
    print(f'\nmost frequent in train\n{most_frequent(data.enc, found["train"].counts)}')
    print('\nread at random in train, by', 'place' if data.eot is None else 'length in tokens')
    print(*beginnings(cfg, data, found['train'].lengths), sep='\n')
    if data.eot is not None:
        path = Path(cfg.out) if cfg.out else data.folder / 'lengths.png'
        draw(path, data.folder.name, found)
        print(f'\n{path}')


def source(manifest):
    """What the manifest says that the data set was made from."""
    if not manifest:
        return 'shards without a manifest, taken for tokens of gpt2'
    files = manifest['source'].get('files')
    if not files:
        return ', '.join(map(str, manifest['source'].values()))
    names = ', '.join(file for file, *_ in files[:2]) + (', …' if len(files) > 2 else '')
    return (f'{names} ({len(files):,} file{"s" * (len(files) > 1)}, '
            f'{sum(size for _, size, *_ in files):,} bytes)')


def figures(data, found):
    """(label, a text for each split) of every line of the page's table."""
    splits, parts = [data.splits[split] for split in found], found.values()
    sizes = np.array([len(piece) for piece in token_table(data, b'')])
    texts = [int(part.counts @ sizes) for part in parts]
    kind = data.manifest['tokenizer']['name'] if data.manifest else 'gpt2'
    yield 'tokens', [f'{len(tokens):,}' for tokens in splits]
    yield 'bytes of text', [f'{size:,}' for size in texts]
    yield 'bytes a token', [f'{size / len(tokens):.3f}' for size, tokens in zip(texts, splits)]
    yield 'shards', [f'{len(tokens.paths):,}' for tokens in splits]
    yield f'{kind}, {data.enc.n_vocab:,} tokens', [
        f'{np.count_nonzero(part.counts) / data.enc.n_vocab:.1%} used' for part in parts]
    if data.eot is None:
        return
    yield 'documents', [f'{len(part.lengths):,}' for part in parts]
    again = [len(part.hashes) - len(overlap.distinct(part.hashes)) for part in parts]
    yield '  exact duplicates', [f'{n:,} ({n / len(part.hashes):.2%})'
                                 for n, part in zip(again, parts)]
    if 'val' in found:
        both = np.isin(found['val'].hashes, found['train'].hashes).sum()
        yield '  also in train', ['', f'{both:,} ({both / len(found["val"].hashes):.2%})']
    for label, share in (('shortest', 0), ('10 % are up to', 0.1), ('half are up to', 0.5),
                         ('90 % are up to', 0.9), ('longest', 1)):
        yield f'  {label}', [f"{np.quantile(part.lengths, share, method='inverted_cdf'):,} tokens"
                             for part in parts]
    yield '  mean', [f'{part.lengths.mean():,.1f} tokens' for part in parts]


def histogram(found, width):
    """Documents by length, a line for each power of two, the splits side by side."""
    powers = {split: np.log2(np.maximum(part.lengths, 1)).astype(int)
              for split, part in found.items()}
    low, high = min(map(np.min, powers.values())), max(map(np.max, powers.values()))
    bins = {split: np.bincount(part, minlength=high + 1) for split, part in powers.items()}
    room = (width - 25) // len(bins) - 10                           # columns of the longest bar
    largest = max((part / part.sum()).max() for part in bins.values())
    lines = ['tokens of a document'.ljust(25) + ''.join(
        f'{split:>7}{"":{room + 3}}' for split in bins)]
    for i in range(int(low), int(high) + 1):
        line = f'{2 ** i if i else 0:>10,} to {2 ** (i + 1) - 1:>9,}  '
        for part in bins.values():
            bar = '█' * round(room * part[i] / part.sum() / largest) or '▏'
            line += f'{part[i]:>7,} {bar:<{room + 2}}' if part[i] else ' ' * (room + 10)
        lines.append(line)
    return '\n'.join(line.rstrip() for line in lines)


def most_frequent(enc, counts):
    cells = [f'{readable(enc.decode_single_token_bytes(i)):>12} {counts[i] / counts.sum():6.2%}    '
             for i in np.argsort(-counts, kind='stable')[:TOP].tolist() if counts[i]]
    rows = -(-len(cells) // 4)
    return '\n'.join(''.join(cells[row::rows]).rstrip() for row in range(rows))


def readable(raw):
    try:
        return repr(raw.decode('utf-8'))
    except UnicodeDecodeError:                                      # a part of a character
        return repr(raw)


def beginnings(cfg, data, lengths):
    """How some documents of train begin, a line each; without documents, what some places say."""
    tokens, rng = data.splits['train'], random.Random(cfg.seed)
    if data.eot is None:
        places = [(start, start, len(tokens) - start)
                  for start in sorted(rng.sample(range(len(tokens)), min(SHOWN, len(tokens))))]
    else:
        first = int(tokens.read(0, 1)[0] == data.eot)   # 0: nothing stands before the first one
        places = [(int(lengths[i]), first + i + int(lengths[:i].sum()), int(lengths[i]))
                  for i in sorted(rng.sample(range(len(lengths)), min(SHOWN, len(lengths))))]
    for label, start, length in places:
        raw = data.enc.decode_bytes(tokens.read(start, min(length, cfg.width)).tolist())
        line = re.sub(r'\s*\n\s*', ' ↵ ', raw.decode('utf-8', 'replace').strip())
        line = ''.join(char if char.isprintable() else ' ' for char in line)
        yield f'{label:>12,}  {line}'[:cfg.width]


def draw(path, name, found):
    """Write a picture of the lengths, two bars for each power of two."""
    from matplotlib.figure import Figure
    figure = Figure((8, 4.5), layout='constrained')
    axes = figure.subplots()
    powers = {split: np.log2(np.maximum(part.lengths, 1)) for split, part in found.items()}
    low, high = min(map(np.min, powers.values())), max(map(np.max, powers.values()))
    edges = 2 ** np.arange(np.floor(low), np.floor(high) + 1.5, 0.5)
    looks = ({'color': 'C0', 'alpha': 0.5}, {'color': 'C1', 'histtype': 'step', 'linewidth': 2})
    for (split, part), look in zip(found.items(), looks):
        middle, many = np.median(part.lengths), len(part.lengths)
        axes.hist(np.maximum(part.lengths, 1), edges, weights=np.full(many, 100 / many),
                  label=f'{split}: {many:,}, median {middle:,.0f} tokens', **look)
        axes.axvline(max(middle, 1), color=look['color'], linestyle='--', linewidth=1)
    axes.set_xscale('log', base=2)
    axes.xaxis.set_major_formatter('{x:,.0f}')
    axes.set(xlabel='tokens of a document', ylabel='% of the documents', title=name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:                                     # a format it does not know
        raise ValueError(f'out: given {path}: {error}') from None


# Text at a place.

def text_at(data, place, count, width):
    """The text of `count` tokens from SHARD:OFFSET on, below a line that says where it is."""
    shard, _, offset = place.rpartition(':')
    if not shard or not offset.isdecimal():
        raise ValueError(f'decode: given {place!r}, expected SHARD:OFFSET, such as train_000000:0')
    known = {path.stem: (tokens, i) for tokens in data.splits.values()
             for i, path in enumerate(tokens.paths)}
    if (stem := shard.removesuffix('.bin')) not in known:
        raise ValueError(f"decode: there is no shard {shard!r}, expected one of "
                         f"{', '.join(list(known)[:4])}{', …' if len(known) > 4 else ''}")
    tokens, i = known[stem]
    start, end, offset = int(tokens.starts[i]), int(tokens.starts[i + 1]), int(offset)
    if start + offset >= end:
        raise ValueError(f'decode: given the offset {offset:,}, expected less than '
                         f'{end - start:,}, the tokens of {stem}')
    ids = tokens.read(start + offset, min(count, end - start - offset))
    until = start + offset + 1
    begun = sum(int((tokens.read(at, min(2 ** 20, until - at)) == data.eot).sum())
                for at in range(start, until, 2 ** 20))
    where = ('' if data.eot is None else f'in document {begun:,} of those that begin in this shard'
             if begun else 'before the first <|endoftext|> of this shard')
    mark = f'\n──── <|endoftext|> {"─" * (width - 19)}\n'.encode()
    table = token_table(data, mark)
    return (f'{stem}: tokens {offset:,} to {offset + len(ids) - 1:,} of {end - start:,}'
            f'{where and ", " + where}\n'
            + b''.join(table[id] for id in ids.tolist()).decode('utf-8', 'replace'))


# Contamination: the n-grams of the test sets are kept, the shards go by.

def report(cfg, data):
    """Look for the n-grams of the test sets in train; print and write what was found."""
    sets = {name: (items, facts) for name, items, facts in map(read_set, cfg.contamination)}
    if len(sets) < len(cfg.contamination):
        raise ValueError(f"contamination: given {','.join(cfg.contamination)}, expected each set "
                         f"once; look for them one after another, each with its own --out")
    grams = {name: {n: overlap.ngrams_of(items, n) for n in NGRAMS}
             for name, (items, _) in sets.items()}
    known = {n: overlap.distinct(np.concatenate([of[n][0] for of in grams.values()]))
             for n in NGRAMS}
    with progress(data.splits['train'], 'train') as bar:
        found = overlap.look_up(pieces(data, bar), known)
    result = {name: judge(items, facts, grams[name], known, found)
              for name, (items, facts) in sets.items()}
    print(shown(data, result, cfg.width))
    path = Path(cfg.out) if cfg.out else data.folder / 'contamination.json'
    aside = path.with_name(f'.{path.name}.partial')
    aside.write_text(json.dumps({'dataset': data.folder.name, 'settings': vars(cfg),
                                 'tokens': len(data.splits['train']), 'sets': result}, indent=1))
    os.replace(aside, path)
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
        lines = [line for _, line in benchmarks.lines_of(raw, facts['path'])]
        return name, benchmarks.articles('\n'.join(lines)), facts
    raise ValueError(f'contamination: given {name!r}, expected some of hellaswag, cbt, lambada, '
                     f'wikitext2, each also as NAME=PATH')


def read_cbt(path):
    """(texts, facts) of the questions with their answers, common nouns and named entities."""
    file = Path(path).expanduser()
    subsets = ['NE' if '_NE_' in file.name else 'CN'] if file.is_file() else ['CN', 'NE']
    sets = [benchmarks.cbt(subset, 'valid', path) for subset in subsets]
    texts = [' '.join([*asked.sentences, asked.query.replace('XXXXX', asked.answer)])
             for questions, _ in sets for asked in questions]
    facts = [found for _, found in sets]
    return [re.sub(r'-[LR][RSC]B-', ' ', text).replace(" n't", "n't") for text in texts], {
        'path': ', '.join(found['path'] for found in facts),
        'sha256': '-'.join(found['sha256'] for found in facts),
        'official': all(found['official'] for found in facts)}


def pieces(data, bar):
    """The bytes of train in pieces that end between words, documents parted by overlap.MARK."""
    table, rest = token_table(data, overlap.MARK), b''
    every, sizes = np.frombuffer(b''.join(table), np.uint8), np.array([len(raw) for raw in table])
    starts = np.cumsum(sizes) - sizes
    for ids in data.splits['train'].chunks(2 ** 15):
        size = sizes[ids]                           # in numpy, twice as fast as joining the table's
        ends = np.cumsum(size)
        places = np.repeat(starts[ids] - (ends - size), size) + np.arange(ends[-1])
        raw = rest + every[places].tobytes()
        cut = max(raw.rfind(blank) for blank in (b' ', b'\n', overlap.MARK)) + 1
        if not cut and len(raw) > 2 ** 22:
            cut = len(raw)                                          # no word is that long
        rest = raw[cut:]
        yield raw[:cut]
        bar.update(len(ids))
    yield rest


def judge(items, facts, grams, known, found):
    """What was found of a test set: {n: figures} and the longest overlaps."""
    result = {**facts, 'items': len(items), 'ngrams': {}, 'longest': []}
    for n, (hashes, of) in grams.items():
        hits = found[n][np.searchsorted(known[n], hashes)]
        total, hit = np.bincount(of), np.bincount(of, hits)
        long = total > 0
        result['ngrams'][n] = {
            'items': int(long.sum()), 'distinct': len(overlap.distinct(hashes)),
            'found': len(overlap.distinct(hashes[hits])), 'touched': int((hit > 0).sum()),
            'half': int((2 * hit >= total)[long].sum())}
        if n == NGRAMS[0]:
            for item, first, count in overlap.longest(hits, hashes, of, WORST):
                words = overlap.normalize(items[item].encode()).split()[first:first + count + n - 1]
                result['longest'].append({'item': item, 'words': len(words),
                                          'text': b' '.join(words).decode()})
    return result


def shown(data, result, width):
    """The report as it is printed."""
    lines = [f"{data.folder.name}: {len(data.splits['train']):,} tokens of train, searched for the "
             f"n-grams of test sets", '',
             f'{"":10}{"items":>8}{"n":>5}{"long enough":>13}{"n-grams":>12}{"found":>10}'
             f'{"items touched":>16}{"by half or more":>18}']
    for name, facts in result.items():
        for n, got in facts['ngrams'].items():
            items = got['items'] or 1
            head = f"{name:10}{facts['items']:>8,}" if n == min(NGRAMS) else ' ' * 18
            lines.append(f"{head}{n:>5}{got['items']:>13,}{got['distinct']:>12,}"
                         f"{got['found'] / (got['distinct'] or 1):>10.3%}"
                         f"{got['touched'] / items:>16.2%}{got['half'] / items:>18.2%}")
    if paper := [PAPER[name] for name, facts in result.items()
                 if name in PAPER and facts['official']]:
        lines.append(f"\nThe GPT-2 paper found in WebText, of the 8-grams {', '.join(paper)}")
    lines.append('\nlongest overlaps')
    for name, facts in result.items():
        for worst in facts['longest']:
            line = f"{name}, item {worst['item'] + 1:,}, {worst['words']:,} words: {worst['text']}"
            lines.append(f'  {line}' if len(line) < width - 1 else f'  {line[:width - 4]} …')
    return '\n'.join(lines if any(facts['longest'] for facts in result.values()) else lines[:-1])


if __name__ == '__main__':
    run(main, Config, collect=COLLECT)
