"""
HellaSwag (Zellers et al. 2019): which of four endings continues a text best, zero-shot; 10,042.

    python hellaswag.py --model=gpt2                        # downloads the 12 MB of questions once
    python hellaswag.py --model=out/first --limit=1000
    torchrun --standalone --nproc_per_node=8 hellaswag.py --model=gpt2-xl
    python hellaswag.py --compare=a.json,b.json             # is b better than a?

Two protocols, whose numbers do not compare with each other:
completion  the context unchanged, a space, the ending (build-nanogpt, llm.c);
            acc_norm by the mean log-probability of a token, acc by the sum
lm-eval     the activity before the context, brackets removed (lm-evaluation-harness);
            acc_norm by the sum over the characters of the ending, acc by the sum
"""

import re

from gpt.settings import check_choices, run, settings

# -----------------------------------------------------------------------------
model = ''              # also -m; gpt2 to gpt2-xl, another GPT-2 on the hub, a folder, a run (its
                        # best step), random:gpt2 (untrained); '': the newest run under out/
protocol = 'completion'     # or 'lm-eval'
data = ''               # FILE with the questions; '': the official one, downloaded once
download = False        # only download the questions
limit = 0               # only the first N, 0: all
share = True            # False: read the context again for each ending
batch_tokens = 0        # tokens in a batch with its padding; 0: 1024 on a CPU, 65536 on CUDA,
                        # else 8192
device = 'auto'         # also -d; 'cpu', 'cuda', 'cuda:1', 'mps'; auto: cuda, else mps, else cpu
dtype = 'float32'       # 'bfloat16' and 'float16' change about ten of 10,042 answers
out = ''                # file of the result; '': out/results/MODEL/hellaswag-PROTOCOL.json
dump = ''               # FILE for a line of JSON on each question
compare = ()            # two results, --compare=a.json,b.json: is the second better?
# -----------------------------------------------------------------------------
Config = settings(globals())

from gpt import results, scoring, tokenizer
from gpt.data import benchmarks

SHORT = {'-m': 'model', '-d': 'device'}
PROTOCOLS = {               # what decides: acc_norm, the one that is quoted, and acc
    'completion': ('by the mean of its tokens', 'by the sum of its tokens'),
    'lm-eval': ('by the sum over its characters', 'by the sum of its tokens')}


def main(cfg):
    check_choices(cfg, protocol=PROTOCOLS)
    results.run_evaluation(cfg, read_data, measure)


def read_data(cfg):
    questions, facts = benchmarks.hellaswag(cfg.data)
    questions, first = results.limited(questions, cfg.limit)
    name = f'hellaswag-{cfg.protocol}'
    return questions, {'task': 'HellaSwag', 'name': name, 'protocol': cfg.protocol, 'data': facts,
                       'first': first, 'unit': 'questions'}, name


def measure(cfg, model, encoding, questions, options):
    """(measures, notes, rows) of the protocol."""
    answers = evaluate(model, encoding, questions, cfg.protocol, share=cfg.share, **options)
    measures = {key: results.accuracy(answers[key], about)
                for key, about in zip(('acc_norm', 'acc'), PROTOCOLS[cfg.protocol])}
    groups = [(group, is_right) for question, is_right in zip(questions, answers['acc_norm'])
              for group in ((question.get('source_id') or '').partition('~')[0],
                            question.get('split_type'))]
    notes = [f'acc_norm of {note}' for note in results.by_group(groups)]
    rows = [{'i': i, 'ind': question.get('ind'), 'label': question['label'],
             'right': answers['acc_norm'][i], 'right_by_sum': answers['acc'][i],
             'sums': [score.sum for score in four], 'counts': [score.count for score in four]}
            for i, (question, four) in enumerate(zip(questions, answers['scores']))]
    return measures, [*notes, *answers['notes'], 'chance: 25 %'], rows


def evaluate(model, encoding, questions, protocol='completion', share=True, **options):
    """For questions of benchmarks.hellaswag(): {'acc_norm': [bool], 'acc': [bool], 'scores':
    [[Score]], 'notes': [str]}; options: those of gpt.scoring.ScoringOptions. train.py calls this
    too."""
    items = [render(question, encoding, protocol) for question in questions]
    scores = scoring.ending_loglikelihoods(model, items, share=share, **options)
    return {**grade(questions, scores, protocol), 'scores': scores,
            'notes': scoring.cut_note(items, model.config.block_size)}


def render(question, encoding, protocol):
    """(context, four endings) of a question as ids."""
    context, endings = question['ctx'], question['endings']
    if protocol == 'lm-eval':
        for key in ('activity_label', 'ctx_a', 'ctx_b'):
            if key not in question:
                raise ValueError(f'this data has no {key!r}, which the protocol lm-eval needs: '
                                 f'it is not the original file')
        context = clean(f"{question['activity_label']}: {question['ctx_a']} "
                        f"{question['ctx_b'].capitalize()}")
        endings = [clean(ending) for ending in endings]
    # no token of GPT-2 reaches across the space that begins a word: both parts are encoded alone
    return (tokenizer.encode(encoding, context),
            [tokenizer.encode(encoding, f' {ending}') for ending in endings])


def clean(text):
    """A text from WikiHow, cleaned as lm-evaluation-harness does."""
    text = re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. '))
    return text.replace('  ', ' ')


def grade(questions, scores, protocol):
    """{'acc_norm': [bool], 'acc': [bool]}: whether each measure chose the right ending of each
    question. Ties: the first wins."""
    by_norm, by_sum = [], []
    for question, four in zip(questions, scores):
        if protocol == 'completion':
            lengths = [score.count for score in four]
        else:
            lengths = [max(1, len(clean(ending))) for ending in question['endings']]
        sums = [score.sum for score in four]
        means = [total / length for total, length in zip(sums, lengths)]
        by_sum.append(sums.index(max(sums)) == question['label'])
        by_norm.append(means.index(max(means)) == question['label'])
    return {'acc_norm': by_norm, 'acc': by_sum}


if __name__ == '__main__':
    run(main, Config, short=SHORT)
