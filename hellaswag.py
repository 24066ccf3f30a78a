"""
HellaSwag (Zellers et al. 2019): which of four endings goes on best, zero-shot, of 10,042.

    python hellaswag.py --model=gpt2                        # downloads the 12 MB of questions once
    python hellaswag.py --model=out/mine --limit=1000
    torchrun --standalone --nproc_per_node=8 hellaswag.py --model=gpt2-xl
    python hellaswag.py --compare=a.json,b.json             # is b better than a?

Two protocols, whose numbers are not to be compared with each other:
completion  the context as it is, a blank, the ending (build-nanogpt, llm.c);
            acc_norm by the mean log-probability of a token, acc by the sum
lm-eval     the activity before the context, brackets taken out (lm-evaluation-harness);
            acc_norm by the sum over the characters of the ending, acc by the sum
"""

import re
import time
from collections import defaultdict

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
protocol = 'completion'     # or 'lm-eval'
data = ''               # FILE with the questions; '': the official one, downloaded once
download = False        # only download the questions
limit = 0               # only the first so many, 0: all
share = True            # False: a row for each ending, the plain way
batch_tokens = 0        # tokens read at once, padding included; 0: 1024 on a CPU, else 65536
device = 'auto'         # also -d; 'cpu', 'cuda', 'cuda:1', 'mps'; auto: cuda, else mps, else cpu
dtype = 'float32'       # 'bfloat16' and 'float16' move some ten of 10,042 answers
out = ''                # where the result is written; '': out/results/MODEL/hellaswag-PROTOCOL.json
dump = ''               # FILE for a line of JSON on each question
compare = ()            # two results, --compare=a.json,b.json: is the second better?
# -----------------------------------------------------------------------------
Config = settings(globals())

SHORT = {'-m': 'model', '-d': 'device'}
PROTOCOLS = {               # what decides: acc_norm, which is quoted, and acc
    'completion': ('by the mean of its tokens', 'by the sum of its tokens'),
    'lm-eval': ('by the sum over its characters', 'by the sum of its tokens')}
BY_LLM_C = 'llm.c and build-nanogpt'
PUBLISHED = {               # per cent of 10,042: acc_norm, acc, source
    ('completion', 'gpt2'): (29.55, 28.59, BY_LLM_C),
    ('completion', 'gpt2-medium'): (37.52, None, 'llm.c, bfloat16'),
    ('completion', 'gpt2-large'): (43.20, None, 'llm.c, bfloat16'),
    ('completion', 'gpt2-xl'): (48.93, 38.42, BY_LLM_C),
    ('lm-eval', 'gpt2'): (31.14, 28.92, 'lm-evaluation-harness'),
    ('lm-eval', 'gpt2-xl'): (50.89, 40.04, 'lm-evaluation-harness')}


def main(cfg):
    if cfg.compare:
        return print(results.compare(cfg.compare))
    if cfg.protocol not in PROTOCOLS:
        raise ValueError(f"protocol: given {cfg.protocol!r}, expected 'completion' or 'lm-eval'")
    results.check(cfg)
    world = World.join(cfg.device, timeout_minutes=120)      # rank 0 may have to download
    rows, found = world.on_main(benchmarks.hellaswag, cfg.data)
    if cfg.download:
        return print(f"{found['path']}: {len(rows):,} questions")
    rows, first = results.limited(rows, cfg.limit)
    gpt, encoding, weights = checkpoints.open_for(world, cfg.model, cfg.dtype)
    started = time.perf_counter()
    answers = evaluate(gpt, encoding, rows, cfg.protocol, world=world, share=cfg.share,
                       batch_tokens=cfg.batch_tokens, progress=True)
    if world.is_main:
        finish(cfg, weights, world, rows, found, first, answers, started)
    world.leave()


def evaluate(gpt, encoding, rows, protocol='completion', share=True, **how):
    """For rows of benchmarks.hellaswag(): {'acc_norm': [bool], 'acc': [bool], 'scores': [[Score]],
    'tokens': read, 'notes': [str]}. how: see likelihood.ending_loglikelihoods."""
    items = [render(row, encoding, protocol) for row in rows]
    scores = likelihood.ending_loglikelihoods(gpt, items, share=share, **how)
    tokens, notes = likelihood.reading(items, gpt.config.block_size, share)
    return {**judge(rows, scores, protocol), 'scores': scores, 'tokens': tokens, 'notes': notes}


def render(row, encoding, protocol):
    """(context, four endings) of a row as ids."""
    context, endings = row['ctx'], row['endings']
    if protocol == 'lm-eval':
        if missing := [key for key in ('activity_label', 'ctx_a', 'ctx_b') if key not in row]:
            raise ValueError(f'this data has no {missing[0]!r}, which the protocol lm-eval needs: '
                             f'it is not the original file')
        context = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
        endings = [clean(ending) for ending in endings]
    # GPT-2's tokens never reach over a blank that begins a word: both parts can be encoded alone
    return (tokenizer.encode(encoding, context),
            [tokenizer.encode(encoding, f' {ending}') for ending in endings])


def clean(text):
    """What lm-evaluation-harness makes of a text from WikiHow."""
    text = re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. '))
    return text.replace('  ', ' ')


def judge(rows, scores, protocol):
    """Whether the right ending was chosen, by each of the two measures; of equals the first is."""
    by_norm, by_sum = [], []
    for row, four in zip(rows, scores):
        lengths = ([score.count for score in four] if protocol == 'completion' else
                   [max(1, len(clean(ending))) for ending in row['endings']])
        sums = [score.sum for score in four]
        by_sum.append(sums.index(max(sums)) == row['label'])
        means = [total / length for total, length in zip(sums, lengths)]
        by_norm.append(means.index(max(means)) == row['label'])
    return {'acc_norm': by_norm, 'acc': by_sum}


def finish(cfg, weights, world, rows, found, first, answers, started):
    """Print the result and write it."""
    published = PUBLISHED.get((cfg.protocol, checkpoints.official_name(cfg.model)))
    measures = {}
    for key, about, value in zip(('acc_norm', 'acc'), PROTOCOLS[cfg.protocol],
                                 published or (None, None)):
        beside = [(value, published[2])] if value and not first and found['official'] else []
        measures[key] = results.accuracy(answers[key], about, beside)
    groups = defaultdict(list)
    for row, right in zip(rows, answers['acc_norm']):
        for group in (row.get('source_id', '').partition('~')[0], row.get('split_type', '')):
            if group:
                groups[group].append(right)
    notes = ['acc_norm of ' + ', '.join(f'{group}: {sum(part) / len(part):.2%} of {len(part)}'
                                        for group, part in groups.items())] if groups else []
    results.finish(cfg, world, started, task='HellaSwag', name=f'hellaswag-{cfg.protocol}',
                   protocol=cfg.protocol, model=weights, data=found, first=first,
                   measures=measures, notes=[*notes, *answers['notes'], 'chance: 25 %'],
                   tokens=answers['tokens'])
    if cfg.dump:
        results.write_rows(cfg.dump, ({
            'i': i, 'ind': row.get('ind'), 'label': row['label'],
            'right': answers['acc_norm'][i], 'right_by_sum': answers['acc'][i],
            'sums': [score.sum for score in four], 'counts': [score.count for score in four]}
            for i, (row, four) in enumerate(zip(rows, answers['scores']))))


if __name__ == '__main__':
    run(main, Config, short=SHORT)
