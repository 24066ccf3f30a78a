"""
How well a GPT predicts text: the language-modelling columns of the GPT-2 paper's Table 3, and any
text file.

    python eval_lm.py --model=gpt2 --task=lambada               # or wikitext2, enwik8, ...
    python eval_lm.py --model=gpt2 --task=wikitext2 --protocol=harness
    python eval_lm.py --model=out/mine --file=book.txt --stride=128
    python eval_lm.py --model=gpt2 --table3                     # all results there are, as Table 3
    torchrun --standalone --nproc_per_node=8 eval_lm.py --model=gpt2-xl --task=enwik8

Protocols, whose numbers are not to be compared with each other; docs/evaluation.md has the reasons:
paper       nearest to what is known of OpenAI's: for LAMBADA the last word, stop words excluded;
            else detokenized where a detokenizer can be undone, a short stride, and the loss over
            the number of words, bytes or characters that the file had before
harness     lm-evaluation-harness (lambada_openai, wikitext)
hf          transformers' documentation: WikiText-2 by token, lines joined by two newlines
last-token  LAMBADA: is the last token the likeliest?
"""

import math
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from gpt import checkpoints
from gpt.world import World
from gpt import scoring as likelihood
from gpt import results
from gpt import tokenizer
from gpt.settings import run, settings
from gpt.data import benchmarks

# -----------------------------------------------------------------------------
model = ''              # also -m; gpt2 to gpt2-xl, another GPT-2 on the hub, a folder, a run (its
                        # best step), random:gpt2 (untrained); '': the newest run under out/
task = 'lambada'        # or wikitext2, wikitext103, ptb, enwik8, text8, 1bw
protocol = 'paper'      # or harness, hf, last-token, where the task has them
data = ''               # FILE of the task; '': the official one, downloaded once
file = ''               # any text FILE instead of a task
stride = 0              # tokens that a window scores; 0: as the protocol has it, 512 for a file
detok = 'auto'          # undo the tokenization of wikitext2, wikitext103 and ptb; auto: of all but
                        # wikitext103, whose published number was measured without
download = False        # only download the data
limit = 0               # only the first so many passages of lambada, or characters; 0: all
batch_tokens = 0        # tokens read at once, padding included; 0: 1024 on a CPU, else 65536
device = 'auto'         # also -d; 'cpu', 'cuda', 'cuda:1', 'mps'; auto: cuda, else mps, else cpu
dtype = 'float32'       # or 'bfloat16', 'float16'
out = ''                # where the result is written; '': out/results/MODEL/TASK-PROTOCOL.json
table3 = False          # print the results of --model under out/results as the paper's Table 3
compare = ()            # two results, --compare=a.json,b.json: is the second better?
# -----------------------------------------------------------------------------
Config = settings(globals())

SHORT = {'-m': 'model', '-d': 'device'}
TASKS = {                   # title; by protocol what is measured, or the headline unit and stride
    'lambada': ('LAMBADA', {'paper': 'of the last word, stop words excluded',
                            'harness': 'of the last word', 'last-token': 'of the last token'}),
    'wikitext2': ('WikiText-2', {'paper': ('word', 32), 'harness': ('word', 0),
                                 'hf': ('token', 0)}),
    'ptb': ('Penn Treebank', {'paper': ('word', 32)}),
    'enwik8': ('enwik8', {'paper': ('byte', 512)}),
    'text8': ('text8', {'paper': ('character', 512)}),
    'wikitext103': ('WikiText-103', {'paper': ('word', 32)}),
    '1bw': ('1 Billion Word', {'paper': ('word', 0)}),
    'file': ('', {'text': ('token', 512)})}                         # what --file stands for
PUBLISHED = {               # by result, measure and model: value, source
    ('lambada-harness', 'accuracy', 'gpt2'): (32.56, 'lm-evaluation-harness #2159'),
    ('lambada-harness', 'perplexity', 'gpt2'): (40.06, 'lm-evaluation-harness #2159'),
    ('lambada-last-token', 'accuracy', 'gpt2'): (46.67, 'cybertronai/bflm'),
    ('wikitext2-harness', 'word', 'gpt2'): (37.37, 'transformers #13761'),
    ('wikitext2-hf', 'token', 'gpt2'): (29.94, "transformers' documentation"),
    ('wikitext2-hf', 'token', 'gpt2-large'): (19.44, "transformers' documentation"),
    **{(*column, size): (value, 'GPT-2 paper')
       for size, row in results.TABLE3.items() for column, value in row.items()}}
STOP_WORDS = frozenset('''
    a about above after again against all am an and any are as at be because been before being below
    between both but by can could did do does doing down during each few for from further had has
    have having he her here hers herself him himself his how i if in into is it its itself just me
    more most my myself no nor not now of off on once only or other our ours ourselves out over own
    same shall she should so some such than that the their theirs them themselves then there these
    they this those through to too under until up very was we were what when where which while who
    whom why will with would you your yours yourself yourselves'''.split())


def main(cfg):
    if cfg.compare:
        return print(results.compare(cfg.compare))
    if cfg.table3:
        return print(table(cfg.model))
    results.check(cfg)
    cfg = checked(cfg)
    world = World.join(cfg.device, timeout_minutes=120)      # rank 0 may have to download
    texts, found, first = world.on_main(read, cfg)
    if cfg.download:
        return print(found['path'])
    gpt, encoding, weights = checkpoints.open_for(world, cfg.model, cfg.dtype)
    started = time.perf_counter()
    how = {'batch_tokens': cfg.batch_tokens, 'world': world, 'progress': True}
    evaluate = lambada if cfg.task == 'lambada' else rolling
    measures, tokens, notes = evaluate(cfg, gpt, encoding, texts, how)
    if world.is_main:
        changes = '-'.join([f'stride{cfg.stride}'] * (cfg.stride > 0)
                           + [f'detok{cfg.detok}'] * (cfg.detok != 'auto'))
        name, protocol = f'{cfg.task}-{results.as_name(cfg.file) or cfg.protocol}', cfg.protocol
        if changes:                             # the bare name is the protocol's as it stands
            name, protocol = f'{name}-{changes}', f'{protocol}, {changes}'
        for key, measure in measures.items():
            figure = PUBLISHED.get((name, key, checkpoints.official_name(cfg.model)))
            if figure and found['official'] and not first:
                measure['published'].append(figure)
        results.finish(cfg, world, started, task=TASKS[cfg.task][0] or Path(cfg.file).name,
                       name=name, protocol=protocol, model=weights, data=found, first=first,
                       measures=measures, notes=notes, tokens=tokens)
    world.leave()


def checked(cfg):
    """The settings, those of a --file with the task and protocol that stand for it."""
    if cfg.detok not in ('auto', True, False):
        raise ValueError(f"detok: given {cfg.detok!r}, expected 'auto', True or False")
    if cfg.file:
        if cfg.protocol != 'paper':
            raise ValueError(f'protocol: given {cfg.protocol!r}, but a --file has none')
        return replace(cfg, task='file', protocol='text')
    if cfg.task not in TASKS or cfg.task == 'file':
        raise ValueError(f"task: given {cfg.task!r}, expected one of {', '.join([*TASKS][:-1])}, "
                         f'or --file=ANY.txt')
    if cfg.protocol not in TASKS[cfg.task][1]:
        raise ValueError(f'protocol: given {cfg.protocol!r}, but {cfg.task} has '
                         f"{', '.join(TASKS[cfg.task][1])}")
    return cfg


def read(cfg):
    """(the passages of LAMBADA or the Corpus of any other text, facts, how many, 0: all)."""
    if cfg.task == 'lambada':
        texts, found = benchmarks.lambada(cfg.data)
        texts, first = results.limited(texts, cfg.limit)
        return texts, found, first
    if cfg.task == 'file':
        raw = benchmarks.read_bytes(cfg.file)
        found = {**benchmarks.facts(cfg.file, raw), 'official': True}
    else:
        raws = cfg.task == 'wikitext2' and cfg.protocol != 'paper'
        raw, found = benchmarks.obtain('wikitext2-raw' if raws else cfg.task, cfg.data)
    if cfg.task in ('enwik8', 'text8'):
        raw = raw[-5_000_000:].lstrip(bytes(range(0x80, 0xC0)))     # not within a character
    text = benchmarks.decode(raw, found['path'])
    if not text.strip():
        raise ValueError(f"{found['path']}: there is no text in this file")
    text, first = results.limited(text, cfg.limit)
    return as_corpus(text, cfg), found, first


# LAMBADA: the last word of a passage.

def lambada(cfg, gpt, encoding, texts, how):
    """(measures, tokens read, notes) of passages of text."""
    pairs = [last_word(text, encoding, cfg.protocol) for text in texts]
    banned = never_last(encoding) if cfg.protocol == 'paper' else None
    # one token more than the word: what the model would say after it tells whether the word ends
    items = [(context, [[*word, 0]]) for context, word in pairs]
    scores = [one for one, in likelihood.ending_loglikelihoods(gpt, items, banned=banned, **how)]
    right = [score.likeliest[:-1].tolist() == word and (
        cfg.protocol != 'paper' or ends_word(encoding, score.likeliest[-1].item()))
        for (_, word), score in zip(pairs, scores)]
    nats = [-score.logprobs[:-1].sum(dtype=float) for score in scores]
    measures = {'accuracy': results.accuracy(right, TASKS[cfg.task][1][cfg.protocol])}
    if cfg.protocol != 'last-token':            # one of half a word is not LAMBADA's
        measures['perplexity'] = results.per_unit(nats, [1] * len(nats), 'word',
                                                  about='of the last word')
    return measures, *likelihood.reading(items, gpt.config.block_size)


def last_word(text, encoding, protocol):
    """(context, what is to be predicted) of a passage as lists of ids."""
    if protocol == 'paper':                     # OpenAI's preparation (openai/gpt-2 #131)
        text = '\n' + text.replace('“', '"').replace('”', '"').strip()
        cut = re.search(r'\s\S+$', text).start()
    else:
        cut = text.rindex(' ')
    ids = tokenizer.encode(encoding, text).tolist()
    start = len(tokenizer.encode(encoding, text[:cut].rstrip(' ')))
    start = len(ids) - 1 if protocol == 'last-token' else start
    return ids[:start], ids[start:]


def never_last(encoding):
    """bool (V,): tokens that are a stop word or punctuation, and so no guess at a last word."""
    words = [encoding.decode_single_token_bytes(i).decode('utf-8', 'ignore').strip().lower()
             for i in range(encoding.n_vocab)]
    return torch.tensor([word in STOP_WORDS or bool(word) and not any(map(str.isalnum, word))
                         for word in words])


def ends_word(encoding, i):
    """Whether the token i after a word means that the word has ended."""
    after = encoding.decode_single_token_bytes(i).decode('utf-8', 'replace')
    return not re.match(r"['’]?\w", after)


# Texts: the loss of every token, over as many words, bytes or characters as the file had.

class Corpus(NamedTuple):
    documents: list         # texts, each scored by itself
    units: dict             # how many words, bytes and characters they were before detokenizing
    bits: float = 0.0       # what it takes to say which lines were detokenized
    note: str = ''


def as_corpus(text, cfg):
    lines = text.removesuffix('\n').split('\n')
    units = {'word': len(text.split()), 'byte': len(text.encode()), 'character': len(text)}
    if cfg.task in ('file', 'enwik8', 'text8'):
        return Corpus([text], units)
    if cfg.protocol == 'hf':
        rows = [line + '\n' if line.strip() else '' for line in lines]
        return Corpus(['\n\n'.join(rows)], units)
    if cfg.protocol == 'harness':
        pages = benchmarks.articles(text)
        return Corpus([harness_detokenize(page) for page in pages], {
            'word': sum(len(re.split(r'\s+', page)) for page in pages),
            'byte': sum(len(page.encode()) for page in pages),
            'character': sum(map(len, pages))})
    units['word'] += len(lines)                                     # a line ends in <eos>
    if cfg.task == '1bw':
        return Corpus([line + '\n' for line in lines], units)
    if cfg.detok is False or cfg.detok == 'auto' and cfg.task == 'wikitext103':
        return Corpus([text], units)
    rules = PTB_RULES if cfg.task == 'ptb' else RULES
    lines = [line.strip() for line in lines]
    plain = [detokenize(line, rules) for line in lines]
    undone = [tokenize(line, rules) == before for line, before in zip(plain, lines)]
    return Corpus(['\n'.join(a if same else b for a, b, same in zip(plain, lines, undone))],
                  units, bits=sum(map(bool, lines)),
                  note=f'{undone.count(False)} of {len(lines)} lines cannot be detokenized and '
                       f'undone: they stay as they are, and every line costs a bit to say so')


# Detokenizing that can be undone: (pattern, replacement) and the pair that reverses it. A full stop
# after an initial or one of these abbreviations was never apart from it.
FULL_STOP = (r'(?<![ .][A-Za-z])(?<!^[A-Za-z])(?<!\.\.)(?<!\b(?:Mr|Dr|St|Jr|Sr|vs|No|Lt|Co|Ft|Mt))'
             r'(?<!\b(?:Mrs|Col|Gen|Rev|Sgt|Inc))\.')
CONTRACTED = r"'(?=(?:s|re|ve|ll|d|m)\b)"
RULES = (
    ((r' @-@ ', '-'), (r'(?<=[\w>])-(?=[\w<])', ' @-@ ')),
    ((r' @,@ ', ','), (r'(?<=[\d>]),(?=[\d<])', ' @,@ ')),
    ((r' @\.@ ', '.'), (r'(?<=[\d>])\.(?=[\d<])', ' @.@ ')),
    ((r'" ([^"]*) "', r'"\1"'), (r'"([^"]*)"', r'" \1 "')),
    ((r'([(\[]) ', r'\1'), (r'([(\[])', r'\1 ')),
    ((r' ([)\]])', r'\1'), (r'([)\]])', r' \1')),
    ((f' {CONTRACTED}', "'"), (rf'(?<=[\w>")]){CONTRACTED}', " '")),
    ((r" 't\b", "'t"), (r"(?<=\w)'t\b", " 't")),
    ((r' ([,;:!?.])(?= |$|")', r'\1'), (rf'(?<=[^ ])([,;:!?]|{FULL_STOP})(?= |$|")', r' \1')))
PTB_RULES = (
    ((r" n't\b", "n't"), (r"(?<=\w)n't\b", " n't")),
    ((f' {CONTRACTED}', "'"), (rf'(?<=[\w>]){CONTRACTED}', " '")),
    ((r'([$#]) N', r'\1N'), (r'([$#])N', r'\1 N')),
    ((r'N %', 'N%'), (r'N%', 'N %')))


def detokenize(line, rules):
    for (pattern, replacement), _ in rules:
        line = re.sub(pattern, replacement, line)
    return line


def tokenize(line, rules):
    for _, (pattern, replacement) in reversed(rules):
        line = re.sub(pattern, replacement, line)
    return line


def harness_detokenize(text):
    """What lm-evaluation-harness (and Megatron) makes of WikiText; it cannot be undone."""
    text = text.replace("s '", "s'")
    for mark in '-,.':
        text = text.replace(f' @{mark}@ ', mark)
    for mark in ':;.!?,':
        text = text.replace(f' {mark} ', f'{mark} ')
    for left, right in ('()', '[]', '{}', '""', "''"):
        inside = rf'[^{re.escape(right)}]*?'
        text = re.sub(rf'{re.escape(left)}\s*({inside})\s*{re.escape(right)}',
                      lambda match, both=(left, right): match.group(1).join(both), text)
    for marks, short in (('= = = =', '===='), ('= = =', '==='), ('= =', '=='), (' ° ', '°'),
                         (' \n', '\n'), ('\n ', '\n'), (' N ', ' 1 '), (" 's", "'s")):
        text = text.replace(marks, short)
    return text


def rolling(cfg, gpt, encoding, corpus, how):
    """(measures, tokens read, notes) of a Corpus: one total, over every unit there is."""
    block = gpt.config.block_size
    unit, stride = TASKS[cfg.task][1][cfg.protocol]
    stride = cfg.stride or min(block, stride) or block
    eot = tokenizer.eot_id(encoding)
    documents = [tokenizer.encode(encoding, text) for text in corpus.documents]
    scores = likelihood.rolling_loglikelihoods(gpt, documents, stride, prefix=eot, **how)
    count = sum(score.count for score in scores)
    if not count:
        raise ValueError('one token is no text: there is nothing to predict')
    nats, shares = in_pieces(encoding, documents, scores)
    nats += corpus.bits * math.log(2) * shares
    measures = {}
    for name, many in {'token': count, **corpus.units}.items():
        bits = name in ('byte', 'character')
        about = f"{'bits' if bits else 'perplexity'} per {name}, {many:,} of them"
        measures[name] = results.per_unit(nats, shares * many, name, bits=bits, about=about)
        measures[name]['items'] *= name == unit     # once: one test decides for all of them
    measures = {unit: measures.pop(unit), **measures}                       # the headline first
    tokens = sum(len(row.ids) for ids in documents
                 for row in likelihood.windows(ids, block, stride, eot))
    notes = [f'{len(documents)} text{"s" if len(documents) > 1 else ""}, {sum(nats):,.1f} nats; '
             f'windows of {block} tokens, stride {stride}']
    notes += [corpus.note] if corpus.note else []
    if eot is None:
        notes.append('the first token is not scored: this tokenizer has none to read before it')
    return measures, tokens, notes


def in_pieces(encoding, documents, scores):
    """(nats, share of all bytes) of pieces of 4,096 bytes of text, or a twentieth of a short one:
    the same pieces whatever the tokenizer, so that its models can be compared."""
    widths = np.array([len(token) for token in tokenizer.token_bytes(encoding)])
    widths = np.concatenate([widths[ids[len(ids) - score.count:]]
                             for ids, score in zip(documents, scores)])
    size = max(1, min(4096, widths.sum() // 20))
    piece = (np.cumsum(widths) - 1).clip(0) // size                         # (tokens,)
    logprobs = np.concatenate([score.logprobs for score in scores])
    bytes_in = np.bincount(piece, widths)
    some = bytes_in > 0
    return -np.bincount(piece, logprobs)[some], bytes_in[some] / widths.sum()


# Table 3.

LINES = {
    **results.COLUMNS,
    ('lambada-harness', 'perplexity'): 'by harness: LAMBADA (perplexity)',
    ('lambada-harness', 'accuracy'): 'by harness: LAMBADA (accuracy)',
    ('wikitext2-harness', 'word'): 'by harness: WikiText-2 (perplexity)'}


def table(model):
    """The paper's Table 3 of one model, from the results under out/results."""
    model = model or str(checkpoints.find(checkpoints.newest_of_all() or ''))
    size, folder = checkpoints.official_name(model), results.folder(model)
    if not size and not folder.exists():
        raise ValueError(f'{model}: there are no results of this model under {results.OUT}; '
                         f"gpt2 to gpt2-xl stand for OpenAI's")
    lines = [f'Table 3 of the GPT-2 paper, for {model}', f"{'':35}  published  measured"]
    found, missing = {}, {}
    for (name, key), title in LINES.items():
        file, measured = folder / f'{name}.json', '-'
        if file.exists():
            found[name] = results.read(file)
            measure = found[name]['measures'][key]
            measured = f"{results.shown(measure):38} {measure['about']}"
        else:
            task, _, protocol = name.partition('-')
            missing[name] = f'python eval_cbt.py --model={model}' if task == 'cbt' else (
                f'python eval_lm.py --model={model} --task={task} --protocol={protocol}')
        value, _ = PUBLISHED.get((name, key, size), ('-', ''))
        lines.append(f'{title:35}  {value:>9}  {measured}')
    folders = sorted({f"weights {one['model']['sha256'][:8]}: {one['model']['folder']}"
                      for one in found.values()})
    lines += folders
    if len(folders) > 1:
        lines.append('not all of the same weights: measure again what is older')
    if missing:
        lines += ['not measured yet:', *(f'  {how}' for how in missing.values())]
    return '\n'.join(lines)


if __name__ == '__main__':
    run(main, Config, short=SHORT)
