"""
Children's Book Test (Hill et al. 2015): which of ten words fills the blank of the sentence that
follows twenty others, zero-shot, by the likelihood of the word and the rest of its sentence.

    python eval_cbt.py --model=gpt2                 # CN and NE, 2,000 questions each, as the paper
    python eval_cbt.py --model=gpt2 --subset=CN,NE,V,P --split=test
    python eval_cbt.py --model=gpt2 --preset=mindspore
    torchrun --standalone --nproc_per_node=8 eval_cbt.py --model=gpt2-xl

A preset says how a question becomes text; each of its settings can be given instead:
paper       validation set, detokenized, sentences joined by a space (GPT-2 paper, section 3.2)
mindspore   tokens unchanged, <|endoftext|> before and after, two spaces before the query
seed        test set, common nouns, tokens unchanged, nothing between the sentences and the query
"""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from gpt.settings import check_choices, run, settings

# -----------------------------------------------------------------------------
model = ''              # also -m; gpt2 to gpt2-xl, another GPT-2 on the hub, a folder, a run (its
                        # best step), random:gpt2 (untrained); '': the newest run under out/
preset = 'paper'        # or 'mindspore', 'seed': the settings below that are '' follow it
split = ''              # 'valid', 2,000 questions of a subset, or 'test', 2,500
subset = ()             # of CN (common nouns), NE (named entities), V (verbs), P (prepositions)
text = ''               # 'detok': as people write it; 'raw': tokens between spaces
data = ''               # FOLDER with cbtest_CN_valid_2000ex.txt and so on, or FILE of one subset;
                        # '': the official ones, downloaded once
download = False        # only download and unpack the questions (120 MB)
skip_bad = False        # skip and count malformed questions instead of stopping
limit = 0               # only the first N of each subset, 0: all
share = True            # False: read the context again for each candidate
batch_tokens = 0        # tokens in a batch with its padding; 0: 1024 on a CPU, 65536 on CUDA,
                        # else 8192
device = 'auto'         # also -d; 'cpu', 'cuda', 'cuda:1', 'mps'; auto: cuda, else mps, else cpu
dtype = 'float32'       # or 'bfloat16', 'float16'
out = ''                # file of the result; '': one under out/results/MODEL
dump = ''               # FILE for a line of JSON on each question
compare = ()            # two results, --compare=a.json,b.json: is the second better?
# -----------------------------------------------------------------------------
Config = settings(globals())

from gpt import results, scoring, tokenizer
from gpt.data import benchmarks


class Preset(NamedTuple):
    split: str
    subset: tuple[str, ...]
    text: str
    gap: str                # between the sentences and the query
    eot: bool               # <|endoftext|> before and after


SHORT = {'-m': 'model', '-d': 'device'}
KINDS = {'CN': 'common nouns', 'NE': 'named entities', 'V': 'verbs', 'P': 'prepositions'}
PRESETS = {
    'paper': Preset('valid', ('CN', 'NE'), 'detok', ' ', False),
    'mindspore': Preset('valid', ('CN', 'NE'), 'raw', '  ', True),
    'seed': Preset('test', ('CN',), 'raw', '', False)}


def main(cfg):
    results.run_evaluation(resolved(cfg), read_data, measure)


def resolved(cfg):
    """The settings, with those of the preset for what is not given."""
    check_choices(cfg, preset=PRESETS)
    preset = PRESETS[cfg.preset]
    cfg = replace(cfg, split=cfg.split or preset.split, text=cfg.text or preset.text,
                  subset=tuple(dict.fromkeys(cfg.subset)) or preset.subset)
    check_choices(cfg, split=('valid', 'test'), text=('detok', 'raw'), subset=KINDS)
    if len(cfg.subset) > 1 and Path(cfg.data).expanduser().is_file():
        raise ValueError(f"data: given {cfg.data}, a file, which holds one subset; --subset says "
                         f"which, one of {', '.join(KINDS)}")
    return cfg


def read_data(cfg):
    """(({subset: Questions}, {sentence: book}, how many were skipped), what identifies them, the
    name of what is published)."""
    found = {name: benchmarks.cbt(name, cfg.split, cfg.data, cfg.skip_bad) for name in cfg.subset}
    _, first = results.limited(max((one for one, _ in found.values()), key=len), cfg.limit)
    subsets = {name: results.limited(one, first)[0] for name, (one, _) in found.items()}
    facts = benchmarks.facts_together([facts for _, facts in found.values()])
    name, published = ('-'.join(['cbt', cfg.preset, cfg.split, cfg.text, *names])
                       for names in (cfg.subset, PRESETS[cfg.preset].subset))
    books = benchmarks.cbt_books(cfg.split, cfg.data)
    about = {'task': "Children's Book Test", 'name': name,
             'protocol': f'{cfg.preset}, {cfg.split}, {cfg.text}', 'data': facts,
             'first': first, 'unit': 'questions of each subset'}
    skipped = facts['skipped']
    return (subsets, books, skipped), about, '' if skipped else published


def measure(cfg, model, encoding, data, options):
    """(measures, notes, rows): an accuracy for each subset."""
    preset, (subsets, books, skipped) = PRESETS[cfg.preset], data
    measures, notes, cuts, rows = {}, [], [], []
    for name, questions in subsets.items():
        items = [render(question, encoding, cfg.text, preset.gap, preset.eot)
                 for question in questions]
        scores = scoring.ending_loglikelihoods(model, items, share=cfg.share, **options)
        right, by_frequency = zip(*map(grade, questions, scores))
        measures[name] = results.accuracy(right, KINDS[name])
        baseline = results.format_measure(results.accuracy(by_frequency))
        notes.append(f'{name}: the candidate that the text has most often: {baseline}')
        notes += [f'{name} of {note}' for note in results.by_group(
            (books.get(question.sentences[0]), is_right)
            for question, is_right in zip(questions, right))]
        cuts += [f'{name}: {note}' for note in scoring.cut_note(items, model.config.block_size)]
        rows += [dump_row(name, *one) for one in zip(questions, right, scores)]
    if skipped:
        cuts.append(f'{skipped} malformed questions were skipped')
    return measures, [*notes, *cuts, 'chance: 10 %'], rows


def dump_row(subset, question, right, scores):
    return {'subset': subset, 'where': question.where, 'answer': question.answer, 'right': right,
            'candidates': question.candidates, 'sums': [score.sum for score in scores],
            'counts': [score.count for score in scores]}


def grade(question, scores):
    """(whether the most likely candidate is the answer, whether the most frequent in the text is).
    Ties: the first wins."""
    sums = [score.sum for score in scores]
    tokens = ' '.join([*question.sentences, question.query]).split(' ')
    counts = [tokens.count(candidate) for candidate in question.candidates]
    return (question.candidates[sums.index(max(sums))] == question.answer,
            question.candidates[counts.index(max(counts))] == question.answer)


def render(question, encoding, text='detok', gap=' ', eot=False):
    """(context, ten endings) of a question as ids: what the ten texts begin with in common, and
    the rest of each."""
    before, after = question.query.split('XXXXX')
    before = f"{' '.join(question.sentences)}{gap}{before}"
    if text == 'detok':
        start = join_tokens(before.split(), rest=after.split())     # the same for all ten
        texts = [''.join(join_tokens(f'{candidate}{after}'.split(), start).pieces)
                 for candidate in question.candidates]
    else:
        texts = [f'{before}{candidate}{after}' for candidate in question.candidates]
    # No token reaches across the space that begins a word: what comes before a space that all texts
    # share is encoded once.
    shared = re.match(r'(.*(?= \S))?', os.path.commonprefix(texts), re.DOTALL).group()
    context = tokenizer.encode(encoding, shared).tolist()
    tails = [tokenizer.encode(encoding, one[len(shared):]).tolist() for one in texts]
    n_common = min(len(os.path.commonprefix(tails)), *(len(tail) - 1 for tail in tails))
    eot_id = encoding.eot
    mark = [eot_id] if eot and eot_id is not None else []
    return mark + context + tails[0][:n_common], [tail[n_common:] + mark for tail in tails]


# Detokenizing.

BRACKETS = {'-LRB-': '(', '-RRB-': ')', '-LSB-': '[', '-RSB-': ']', '-LCB-': '{', '-RCB-': '}'}
DOUBLE = ('``', "''")
CONTRACTED = ("n't", "'s", "'ll", "'re", "'ve", "'d", "'m")


class Joined(NamedTuple):
    """A text, as far as its tokens are joined."""
    pieces: Sequence[str] = ()      # each with the space before it, if there is one
    glued: bool = True              # the next word follows without a space
    quoted: bool = False            # a single quote is open
    spoken: bool = False            # a double quote is open


def join_tokens(tokens, start=Joined(), rest=()):
    """The Joined of Stanford CoreNLP's tokens as people write them, after those of `start`.

    rest: tokens that follow. A single ' closes or is a possessive; it opens where no quote is open,
    punctuation stands before it, and no ` follows. A '' closes, also where the text begins within
    a quotation; it opens where none is open and the next mark is another '', which closes it.
    """
    pieces, glued, quoted, spoken = list(start.pieces), *start[1:]
    marks = [word for word in [*tokens, *rest] if word in DOUBLE][::-1]     # the last is next
    for word, following in zip(tokens, [*tokens[1:], '']):
        if word in DOUBLE:
            marks.pop()
            if word == "''" != following and not spoken and marks[-1:] == ["''"]:
                word = '``'
            spoken = word == '``'
        word = BRACKETS.get(word, word)
        last = pieces[-1] if pieces else ''
        if word == '`' or word == "'" and (
                not quoted and last[-1:] in '.,:;!?"-\'' and following != '`'):
            word, quoted, left, right = "'", True, False, True
        elif word == "'":
            quoted, left, right = quoted and last[-1:] == 's', True, False
        else:
            word, left, right = touches(word, last)
        pieces.append(word if left or glued else f' {word}')
        glued = right
    return Joined(pieces, glued, quoted, spoken)


def touches(word, last):
    """(the word as written, whether it touches the word before, whether it touches the next);
    last: the piece before."""
    if word in DOUBLE:
        return '"', word == "''", word == '``'
    if word == '--':
        return word, True, True
    if word in '([{' or word.lower() == "'t":                       # 'tis
        return word, False, True
    is_closing = not word.strip(')]},.;:!?%') or word.lower() in CONTRACTED
    is_cannot = word == 'not' and last.strip().lower() == 'can'
    return word, is_closing or is_cannot, False


if __name__ == '__main__':
    run(main, Config, short=SHORT)
