"""
Children's Book Test (Hill et al. 2015): which of ten words belongs in the blank of the sentence
that follows twenty others, zero-shot, by the likelihood of the word and the rest of its sentence.

    python eval_cbt.py --model=gpt2                 # CN and NE, 2,000 questions each, as the paper
    python eval_cbt.py --model=gpt2 --subset=CN,NE,V,P --split=test
    python eval_cbt.py --model=gpt2 --preset=mindspore
    torchrun --standalone --nproc_per_node=8 eval_cbt.py --model=gpt2-xl

A preset says how a question is made a text; any of its parts can be set apart from it:
paper       validation set, detokenized, sentences joined by a blank (GPT-2 paper, section 3.2)
mindspore   as it is, <|endoftext|> before and after, two blanks before the query
seed        test set, common nouns, as it is, nothing between the sentences and the query
"""

import os
import re
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

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
preset = 'paper'        # or 'mindspore', 'seed': what the settings that are '' stand for
split = ''              # 'valid', 2,000 questions of a subset, or 'test', 2,500
subset = ()             # of CN (common nouns), NE (named entities), V (verbs), P (prepositions)
text = ''               # 'detok': as people write it; 'raw': the tokens as they are, with blanks
data = ''               # FOLDER with cbtest_CN_valid_2000ex.txt and so on, or FILE of one subset;
                        # '': the official ones, downloaded once
download = False        # only download and unpack the questions (120 MB)
skip_bad = False        # pass over malformed questions, counting them, instead of stopping
limit = 0               # only the first so many of each subset, 0: all
share = True            # False: a row for each candidate, the plain way
batch_tokens = 0        # tokens read at once, padding included; 0: 1024 on a CPU, else 65536
device = 'auto'         # also -d; 'cpu', 'cuda', 'cuda:1', 'mps'; auto: cuda, else mps, else cpu
dtype = 'float32'       # or 'bfloat16', 'float16'
out = ''                # where the result is written; '': under out/results/MODEL
dump = ''               # FILE for a line of JSON on each question
compare = ()            # two results, --compare=a.json,b.json: is the second better?
# -----------------------------------------------------------------------------
Config = settings(globals())

SHORT = {'-m': 'model', '-d': 'device'}
KINDS = {'CN': 'common nouns', 'NE': 'named entities', 'V': 'verbs', 'P': 'prepositions'}
PRESETS = {                 # split, subset, text, between sentences and query, with <|endoftext|>
    'paper': ('valid', ('CN', 'NE'), 'detok', ' ', False),
    'mindspore': ('valid', ('CN', 'NE'), 'raw', '  ', True),
    'seed': ('test', ('CN',), 'raw', '', False)}
PUBLISHED = {               # per cent, by preset, model and subset
    **{('paper', size, name): (row['cbt-paper-valid-detok-CN-NE', name], 'GPT-2 paper')
       for size, row in results.TABLE3.items() for name in ('CN', 'NE')},
    **{('mindspore', size, name): (value, 'MindSpore model zoo') for size, name, value in (
        ('gpt2', 'CN', 87.85), ('gpt2-medium', 'CN', 92.10), ('gpt2-large', 'CN', 93.70),
        ('gpt2', 'NE', 85.10), ('gpt2-medium', 'NE', 87.55), ('gpt2-large', 'NE', 89.10))},
    ('seed', 'gpt2', 'CN'): (86.84, 'SeekDeeper')}


def main(cfg):
    if cfg.compare:
        return print(results.compare(cfg.compare))
    results.check(cfg)
    cfg = resolved(cfg)
    world = World.join(cfg.device, timeout_minutes=120)      # rank 0 may have to download
    sets, books, first = world.on_main(read, cfg)
    if cfg.download:
        return print('\n'.join(found['path'] for _, found in sets.values()))
    gpt, encoding, weights = checkpoints.open_for(world, cfg.model, cfg.dtype)
    started, scores, tokens, notes = time.perf_counter(), {}, 0, []
    for name, (questions, _) in sets.items():
        items = [render(question, encoding, cfg.text, *PRESETS[cfg.preset][3:])
                 for question in questions]
        scores[name] = likelihood.ending_loglikelihoods(
            gpt, items, share=cfg.share, batch_tokens=cfg.batch_tokens, world=world, progress=True)
        read_now, longer = likelihood.reading(items, gpt.config.block_size, cfg.share)
        tokens, notes = tokens + read_now, [*notes, *(f'{name}: {note}' for note in longer)]
    if world.is_main:
        finish(cfg, world, weights, sets, books, first, scores, started, tokens, notes)
    world.leave()


def resolved(cfg):
    """The settings, with the preset's in the place of what is not set."""
    if cfg.preset not in PRESETS:
        raise ValueError(f"preset: given {cfg.preset!r}, expected one of {', '.join(PRESETS)}")
    split, subset, text, *_ = PRESETS[cfg.preset]
    cfg = replace(cfg, split=cfg.split or split, text=cfg.text or text,
                  subset=tuple(dict.fromkeys(cfg.subset)) or subset)
    for key, given, choices in (('split', [cfg.split], ('valid', 'test')),
                                ('text', [cfg.text], ('detok', 'raw')),
                                ('subset', cfg.subset, KINDS)):
        if wrong := [value for value in given if value not in choices]:
            raise ValueError(f"{key}: given {wrong[0]!r}, expected one of {', '.join(choices)}")
    if len(cfg.subset) > 1 and Path(cfg.data).expanduser().is_file():
        raise ValueError(f"data: given {cfg.data}, a file, which holds one subset; --subset says "
                         f"which, one of {', '.join(KINDS)}")
    return cfg


def read(cfg):
    """({subset: (Questions, facts)}, {sentence: book}, how many of each subset, 0: all)."""
    sets = {name: benchmarks.cbt(name, cfg.split, cfg.data, cfg.skip_bad) for name in cfg.subset}
    longest = max((questions for questions, _ in sets.values()), key=len)
    _, first = results.limited(longest, cfg.limit)
    sets = {name: (questions[:first or None], found) for name, (questions, found) in sets.items()}
    return sets, benchmarks.cbt_books(cfg.split, cfg.data), first


def render(question, encoding, text='detok', gap=' ', eot=False):
    """(context, ten endings) of a question as ids: what the ten texts begin with in common, and
    what follows it in each."""
    before, after = question.query.split('XXXXX')
    before = f"{' '.join(question.sentences)}{gap}{before}"
    if text == 'detok':
        begun = attach(before.split())
        texts = [''.join(attach(f'{candidate}{after}'.split(), *begun)[0])
                 for candidate in question.candidates]
    else:
        texts = [f'{before}{candidate}{after}' for candidate in question.candidates]
    # a token never reaches over a blank that begins a word: what comes before one that all texts
    # share can be encoded once
    shared = re.match(r'(.*(?= \S))?', os.path.commonprefix(texts), re.DOTALL).group()
    start = tokenizer.encode(encoding, shared).tolist()
    tails = [tokenizer.encode(encoding, text[len(shared):]).tolist() for text in texts]
    mark = [tokenizer.eot_id(encoding)] if eot and tokenizer.eot_id(encoding) is not None else []
    same = min(len(os.path.commonprefix(tails)), *(len(tail) - 1 for tail in tails))
    return mark + start + tails[0][:same], [tail[same:] + mark for tail in tails]


BRACKETS = {'-LRB-': '(', '-RRB-': ')', '-LSB-': '[', '-RSB-': ']', '-LCB-': '{', '-RCB-': '}'}
CONTRACTED = ("n't", "'s", "'ll", "'re", "'ve", "'d", "'m")


def attach(words, pieces=(), glued=True, quoted=False):
    """(pieces, glued, quoted): the pieces of text that words, Stanford CoreNLP's tokens, make as
    people write them, each with the blank before it if there is one: quotes, brackets, contractions
    and punctuation next to their words, `` and '' as ", a single ` as '. glued: the next word
    follows without a blank. quoted: a single quote is open.

    A single ' closes, or is a possessive; it opens where none is open, punctuation stands before,
    and no ` follows.
    """
    pieces = list(pieces)
    for word, following in zip(words, [*words[1:], '']):
        word, last = BRACKETS.get(word, word), pieces[-1][-1] if pieces else ''
        left = right = False                    # no blank on this side
        if word in ('``', "''"):
            left, right, word = word == "''", word == '``', '"'
        elif word == '`' or word == "'" and (
                not quoted and last in '.,:;!?"-\'' and following != '`'):
            right, quoted, word = True, True, "'"
        elif word == "'":
            left, quoted = True, quoted and last == 's'
        elif word == '--':
            left = right = True
        elif word in '([{' or word.lower() == "'t":
            right = True                        # 'tis
        elif not word.strip(')]},.;:!?%') or word.lower() in CONTRACTED:
            left = True
        elif word == 'not' and pieces and pieces[-1].strip().lower() == 'can':
            left = True                         # cannot
        pieces.append(word if left or glued else f' {word}')
        glued = right
    return pieces, glued, quoted


def judge(question, ten):
    """(whether the likeliest candidate is the answer, whether the one is that the text has most
    often); of equals the first is chosen."""
    sums = [score.sum for score in ten]
    words = ' '.join([*question.sentences, question.query]).split(' ')
    counts = [words.count(candidate) for candidate in question.candidates]
    return (question.candidates[sums.index(max(sums))] == question.answer,
            question.candidates[counts.index(max(counts))] == question.answer)


def finish(cfg, world, weights, sets, books, first, scores, started, tokens, notes):
    """Print the result and write it."""
    facts = [found for _, found in sets.values()]
    data = {'path': ', '.join(found['path'] for found in facts),
            'sha256': '-'.join(found['sha256'] for found in facts),
            'official': all(found['official'] for found in facts),
            'skipped': sum(found['skipped'] for found in facts)}
    as_preset = ((cfg.split, cfg.text) == PRESETS[cfg.preset][:3:2] and data['official']
                 and not first and not data['skipped'])
    size, measures, by_subset, rows = checkpoints.official_name(cfg.model), {}, [], []
    for name, (questions, _) in sets.items():
        right, frequent = zip(*map(judge, questions, scores[name]))
        published = PUBLISHED.get((cfg.preset, size, name)) if as_preset else None
        measures[name] = results.accuracy(right, KINDS[name], [published] if published else [])
        by_subset.append(f'{name}: the candidate that the text has most often: '
                         f'{results.shown(results.accuracy(frequent))}')
        by_book = defaultdict(list)
        for question, hit in zip(questions, right):
            by_book[books.get(question.sentences[0], '')].append(hit)
        by_subset += [f'{name}: {sum(part) / len(part):7.2%} of {len(part):4} of {book}'
                      for book, part in sorted(by_book.items()) if book]
        rows += [{'subset': name, 'where': question.where, 'answer': question.answer,
                  'right': hit, 'candidates': question.candidates,
                  'sums': [score.sum for score in ten], 'counts': [score.count for score in ten]}
                 for question, hit, ten in zip(questions, right, scores[name])]
    if data['skipped']:
        notes = [*notes, f"{data['skipped']} malformed questions were skipped"]
    results.finish(cfg, world, started, task="Children's Book Test",
                   name='-'.join(['cbt', cfg.preset, cfg.split, cfg.text, *cfg.subset]),
                   protocol=f'{cfg.preset}, {cfg.split}, {cfg.text}', model=weights, data=data,
                   first=first, measures=measures, notes=[*by_subset, *notes, 'chance: 10 %'],
                   tokens=tokens)
    if cfg.dump:
        results.write_rows(cfg.dump, rows)


if __name__ == '__main__':
    run(main, Config, short=SHORT)
