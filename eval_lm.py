"""
How well a GPT predicts text: the language-modelling columns of the GPT-2 paper's Table 3, and any
text file.

    python eval_lm.py --model=gpt2 --task=lambada               # or wikitext2, enwik8, ...
    python eval_lm.py --model=gpt2 --task=wikitext2 --protocol=harness
    python eval_lm.py --model=out/first --file=book.txt --stride=128
    python eval_lm.py --model=gpt2 --table3                     # all results so far, as Table 3
    torchrun --standalone --nproc_per_node=8 eval_lm.py --model=gpt2-xl --task=enwik8

Protocols, whose numbers do not compare with each other; docs/evaluation.md gives the reasons:
paper       closest to what is known of OpenAI's: for LAMBADA the last word, stop words excluded;
            else detokenized where that can be undone, a short stride, and the loss divided by the
            number of words, bytes or characters of the original file
harness     lm-evaluation-harness (lambada_openai, wikitext)
hf          transformers' documentation: WikiText-2 by token, lines joined by two newlines
last-token  LAMBADA: is the last token the most likely?
"""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from gpt.settings import check_bounds, check_choices, run, settings

# -----------------------------------------------------------------------------
model = ''              # also -m; gpt2 to gpt2-xl, another GPT-2 on the hub, a folder, a run (its
                        # best step), random:gpt2 (untrained); '': the newest run under out/
task = 'lambada'        # or wikitext2, wikitext103, ptb, enwik8, text8, 1bw
protocol = 'paper'      # or harness, hf, last-token, where the task has them
data = ''               # FILE of the task; '': the official one, downloaded once
file = ''               # any text FILE instead of a task
stride = 0              # tokens that a window scores; 0: that of the protocol, 512 for a file
detok = 'auto'          # undo the tokenization of wikitext2, wikitext103 and ptb; auto: of all but
                        # wikitext103, whose published number was measured without
download = False        # only download the data
limit = 0               # only the first N passages of lambada; 0: all
characters = 0          # only the first N characters of another task or of a file; 0: all
batch_tokens = 0        # tokens in a batch with its padding; 0: 1024 on a CPU, 65536 on CUDA,
                        # else 8192
device = 'auto'         # also -d; 'cpu', 'cuda', 'cuda:1', 'mps'; auto: cuda, else mps, else cpu
dtype = 'float32'       # or 'bfloat16', 'float16'
out = ''                # file of the result; '': out/results/MODEL/TASK-PROTOCOL.json
table3 = False          # print the results of --model under out/results as the paper's Table 3
compare = ()            # two results, --compare=a.json,b.json: is the second better?
# -----------------------------------------------------------------------------
Config = settings(globals())

import numpy as np
import torch

from gpt import checkpoints, files, results, scoring, steps, tokenizer
from gpt.data import benchmarks


class Task(NamedTuple):
    title: str
    protocols: dict         # lambada: what is measured; others: the headline unit and the stride


SHORT = {'-m': 'model', '-d': 'device'}
TASKS = {
    'lambada': Task('LAMBADA', {'paper': 'of the last word, stop words excluded',
                                'harness': 'of the last word', 'last-token': 'of the last token'}),
    'wikitext2': Task('WikiText-2', {'paper': ('word', 32), 'harness': ('word', 0),
                                     'hf': ('token', 0)}),
    'ptb': Task('Penn Treebank', {'paper': ('word', 32)}),
    'enwik8': Task('enwik8', {'paper': ('byte', 512)}),
    'text8': Task('text8', {'paper': ('character', 512)}),
    'wikitext103': Task('WikiText-103', {'paper': ('word', 32)}),
    '1bw': Task('1 Billion Word', {'paper': ('word', 0)}),
    'file': Task('', {'text': ('token', 512)})}                     # stands for --file
STOP_WORDS = frozenset('''
    a about above after again against all am an and any are as at be because been before being below
    between both but by can could did do does doing down during each few for from further had has
    have having he her here hers herself him himself his how i if in into is it its itself just me
    more most my myself no nor not now of off on once only or other our ours ourselves out over own
    same shall she should so some such than that the their theirs them themselves then there these
    they this those through to too under until up very was we were what when where which while who
    whom why will with would you your yours yourself yourselves'''.split())


def main(cfg):
    if cfg.table3:
        return print(table(cfg.model))
    cfg = resolved(cfg)
    results.run_evaluation(cfg, read_data, lambada if cfg.task == 'lambada' else rolling)


def resolved(cfg):
    """The settings; those of a --file with the task and protocol that stand for it."""
    check_bounds(cfg, [('0 or more', lambda value: value >= 0, 'stride characters'),
                       ("'auto', True or False", lambda value: value in ('auto', True, False),
                        'detok')])
    is_text = cfg.file or cfg.task != 'lambada'
    wrong, right = ('limit', 'characters') if is_text else ('characters', 'limit')
    if getattr(cfg, wrong):
        raise ValueError(f'{wrong}: given {getattr(cfg, wrong)}, but '
                         f"{'a text is' if is_text else 'passages are'} counted by --{right}")
    if cfg.file:
        if cfg.protocol != 'paper':
            raise ValueError(f'protocol: given {cfg.protocol!r}, but a --file has none')
        return replace(cfg, task='file', protocol='text')
    if cfg.task not in (tasks := [task for task in TASKS if task != 'file']):
        raise ValueError(f"task: given {cfg.task!r}, expected one of {', '.join(tasks)}, "
                         f'or --file=ANY.txt')
    check_choices(cfg, protocol=TASKS[cfg.task].protocols)
    return cfg


def read_data(cfg):
    """(the passages of LAMBADA, or the Corpus of any other text; what identifies the measurement;
    the name of what is published)."""
    if cfg.task == 'lambada':
        passages, facts = benchmarks.lambada(cfg.data)
        items, first = results.limited(passages, cfg.limit)
    else:
        text, facts = read_text(cfg)
        text, first = results.limited(text, cfg.characters)
        items = as_corpus(text, cfg)
    changes = [f'stride{cfg.stride}'] if cfg.stride else []
    changes += [f'detok{cfg.detok}'] if cfg.detok != 'auto' else []
    own = results.file_id(facts) if cfg.task == 'file' else cfg.protocol
    name = '-'.join([cfg.task, own, *changes])      # the bare name: the protocol's own settings
    return items, {
        'task': TASKS[cfg.task].title or Path(cfg.file).name, 'name': name,
        'protocol': f'{cfg.protocol}, {"-".join(changes)}' if changes else cfg.protocol,
        'data': facts, 'first': first,
        'unit': 'passages' if cfg.task == 'lambada' else 'characters'}, name


def read_text(cfg):
    """(text, facts) of a task or a --file."""
    if cfg.task == 'file':
        raw = benchmarks.read_bytes(cfg.file)
        facts = {**benchmarks.facts(cfg.file, raw), 'official': True}
    else:
        is_raw = cfg.task == 'wikitext2' and cfg.protocol != 'paper'
        raw, facts = benchmarks.obtain('wikitext2-raw' if is_raw else cfg.task, cfg.data)
    if cfg.task in ('enwik8', 'text8'):
        raw = raw[-5_000_000:].lstrip(bytes(range(0x80, 0xC0)))     # from a whole character on
    text = files.decode(raw, facts['path'])
    if not text.strip():
        raise ValueError(f"{facts['path']}: there is no text in this file")
    return text, facts


# LAMBADA: the last word of a passage.

def lambada(cfg, model, encoding, passages, options):
    """(measures, notes, no rows) of passages of text."""
    pairs = [last_word(text, encoding, cfg.protocol) for text in passages]
    banned = never_last(encoding) if cfg.protocol == 'paper' else None
    # a placeholder after the word: what the model predicts there tells whether the word has ended
    items = [(context, [[*word, 0]]) for context, word in pairs]
    scores = [score for score, in
              scoring.ending_loglikelihoods(model, items, banned=banned, **options)]
    right = []
    for (_, word), score in zip(pairs, scores):
        *predicted, after = score.predicted.tolist()
        right.append(predicted == word
                     and (cfg.protocol != 'paper' or ends_word(encoding, after)))
    nats = [-score.logprobs[:-1].sum(dtype=float) for score in scores]
    about = TASKS['lambada'].protocols[cfg.protocol]
    measures = {'accuracy': results.accuracy(right, about)}
    if cfg.protocol != 'last-token':            # the last token may be half a word
        measures['perplexity'] = results.per_unit(nats, [1] * len(nats), 'word',
                                                  about='of the last word')
    return measures, scoring.cut_note(items, model.config.block_size), []


def last_word(text, encoding, protocol):
    """(context, what to predict) of a passage, as lists of ids."""
    if protocol == 'paper':                     # OpenAI's preparation (openai/gpt-2 #131)
        text = '\n' + text.replace('“', '"').replace('”', '"').strip()
        cut = re.search(r'\s\S+$', text).start()
    else:
        cut = text.rindex(' ')
    ids = tokenizer.encode(encoding, text).tolist()
    if protocol == 'last-token':
        return ids[:-1], ids[-1:]
    start = len(tokenizer.encode(encoding, text[:cut].rstrip(' ')))
    return ids[:start], ids[start:]


def never_last(encoding):
    """bool (V,): tokens that are a stop word or punctuation, which the last word never is."""
    words = [encoding.decode_single_token_bytes(i).decode('utf-8', 'ignore').strip().lower()
             for i in range(encoding.n_vocab)]
    return torch.tensor([word in STOP_WORDS or word != '' and not any(map(str.isalnum, word))
                         for word in words])


def ends_word(encoding, i):
    """Whether a word has ended when the token i follows it."""
    after = encoding.decode_single_token_bytes(i).decode('utf-8', 'replace')
    return not re.match(r"['’]?\w", after)


# Texts: the loss of every token, per word, byte or character of the original file.

class Corpus(NamedTuple):
    documents: list         # texts, scored independently
    units: dict             # words, bytes and characters before detokenizing: {unit: count}
    bits: float = 0.0       # cost of saying which lines were detokenized
    note: str = ''


def as_corpus(text, cfg):
    """The Corpus of a text, prepared as task and protocol say."""
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
    units['word'] += len(lines)                                     # each ends in <eos>
    if cfg.task == '1bw':
        return Corpus([line + '\n' for line in lines], units)
    if cfg.detok is False or cfg.detok == 'auto' and cfg.task == 'wikitext103':
        return Corpus([text], units)
    rules = PTB_RULES if cfg.task == 'ptb' else RULES
    lines = [line.strip() for line in lines]
    plain = [detokenize(line, rules) for line in lines]
    undone = [tokenize(line, rules) == before for line, before in zip(plain, lines)]
    chosen = [a if can_undo else b for a, b, can_undo in zip(plain, lines, undone)]
    n_not_empty = sum(line != '' for line in lines)
    return Corpus(['\n'.join(chosen)], units, bits=n_not_empty,
                  note=f'{undone.count(False)} of {len(lines)} lines cannot be detokenized and '
                       f'undone: they stay as they are, and every line costs a bit to say so')


# Detokenizing that can be undone: (pattern, replacement) and the pair that reverses it. The full
# stop of an initial or of one of these abbreviations is never a token of its own.
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
    """WikiText as lm-evaluation-harness (and Megatron) detokenizes it; it cannot be undone."""
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


def rolling(cfg, model, encoding, corpus, options):
    """(measures, notes, no rows) of a Corpus: one total loss, per unit of each kind."""
    block_size = model.config.block_size
    unit, stride = TASKS[cfg.task].protocols[cfg.protocol]
    stride = cfg.stride or min(block_size, stride) or block_size
    eot = encoding.eot
    documents = [tokenizer.encode(encoding, text) for text in corpus.documents]
    scores = scoring.rolling_loglikelihoods(model, documents, stride, prefix=eot, **options)
    n_tokens = sum(score.count for score in scores)
    if not n_tokens:
        raise ValueError('a text of one token has nothing to predict; expected a longer one')
    nats, fractions = in_pieces(encoding, documents, scores)
    nats += corpus.bits * math.log(2) * fractions
    measures = {}
    for name, count in {'token': n_tokens, **corpus.units}.items():
        bits = name in ('byte', 'character')
        about = f"{'bits' if bits else 'perplexity'} per {name}, {count:,} of them"
        measures[name] = results.per_unit(nats, fractions * count, name, bits=bits, about=about)
        if name != unit:                        # the test of one unit would decide for all
            measures[name]['items'] = []
    measures = {unit: measures.pop(unit), **measures}                       # the headline first
    plural = 's' if len(documents) > 1 else ''
    notes = [f'{len(documents)} text{plural}, {sum(nats):,.1f} nats; '
             f'windows of {block_size} tokens, stride {stride}']
    if corpus.note:
        notes.append(corpus.note)
    if eot is None:
        notes.append('the first token is not scored: this tokenizer has none to read before it')
    return measures, notes, []


def in_pieces(encoding, documents, scores):
    """(nats, fraction of all bytes) of pieces of 4,096 bytes of text, or a twentieth of a short
    one: the same pieces for every tokenizer, so that their models can be compared."""
    widths = np.array([len(token) for token in tokenizer.token_bytes(encoding)])
    widths = np.concatenate([widths[ids[len(ids) - score.count:]]
                             for ids, score in zip(documents, scores)])
    size = max(1, min(4096, widths.sum() // 20))
    piece = (np.cumsum(widths) - 1).clip(0) // size                         # (tokens,)
    logprobs = np.concatenate([score.logprobs for score in scores])
    n_bytes = np.bincount(piece, widths)
    some = n_bytes > 0
    return -np.bincount(piece, logprobs)[some], n_bytes[some] / widths.sum()


# Table 3.

LINES = {
    **{column: title for column, (title, *_) in results.TABLE3.items()},
    ('lambada-harness', 'perplexity'): 'by harness: LAMBADA (perplexity)',
    ('lambada-harness', 'accuracy'): 'by harness: LAMBADA (accuracy)',
    ('wikitext2-harness', 'word'): 'by harness: WikiText-2 (perplexity)'}


def table(model):
    """The paper's Table 3 of one model, from the results under out/results."""
    model = model or str(checkpoints.find(steps.newest_run() or ''))
    size, folder = checkpoints.official_name(model), results.folder_of(model)
    if not size and not any(folder.glob('*.json')):
        raise ValueError(f'{model}: there are no results of this model under {results.OUT}; '
                         f"gpt2 to gpt2-xl stand for OpenAI's")
    names = dict.fromkeys(name for name, _ in LINES)
    measured = {name: results.read(folder / f'{name}.json') for name in names
                if (folder / f'{name}.json').exists()}
    lines = [f'Table 3 of the GPT-2 paper, for {model}', f"{'':35}  published  measured"]
    for (name, key), title in LINES.items():
        text = '-'
        if name in measured:
            measure = measured[name]['measures'].get(key)
            if measure is None:
                raise ValueError(f'{folder / name}.json: measures: has no {key!r}')
            text = f"{results.format_measure(measure):38} {measure['about']}"
        published, _ = results.PUBLISHED.get((name, key, size), ('-', ''))
        lines.append(f'{title:35}  {published:>9}  {text}')
    weights = sorted({f"weights {one['model'].get('sha256', '')[:8]}: "
                      f"{one['model'].get('folder', '')}" for one in measured.values()})
    lines += weights
    if len(weights) > 1:
        lines.append('not all of the same weights: measure the older ones again')
    missing = [name for name in names if name not in measured]
    if missing:
        lines.append(f"not measured yet: {', '.join(missing)}; `make table3 MODEL={model}` "
                     f'measures them')
    return '\n'.join(lines)


if __name__ == '__main__':
    run(main, Config, short=SHORT)
