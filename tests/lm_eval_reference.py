"""
lm-evaluation-harness beside our scoring, on the same model. Not a test: it needs
`pip install lm_eval accelerate peft`, and writes what test_scoring.py compares with.

    python tests/lm_eval_reference.py                   # tests/lm_eval_reference.json, 50 values
    python tests/lm_eval_reference.py FOLDER            # real HellaSwag, CBT, LAMBADA, WikiText
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import eval_cbt  # noqa: E402
import eval_lm  # noqa: E402
import hellaswag  # noqa: E402
from gpt import checkpoints, scoring, tokenizer  # noqa: E402
from gpt.data import benchmarks  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402


def tiny(encoding, block_size=64):
    """A model whose weights are a formula: the same with every version of torch."""
    model = GPT(GPTConfig(block_size=block_size, vocab_size=encoding.n_vocab, n_layer=2, n_head=2,
                          n_embd=32)).eval()
    with torch.no_grad():
        for k, (_, p) in enumerate(sorted(model.named_parameters())):
            steps = torch.arange(p.numel(), dtype=torch.float64)
            p.copy_(torch.sin(steps * (1.7 + 0.31 * k) + k).float().view_as(p) * 0.3)
        model.wte.weight[encoding.n_vocab:] = 0
    return model


def pairs():
    """40 contexts and continuations, and ten longer texts."""
    names = ('The fox', 'A student', 'My neighbour', 'Nobody', 'The old king')
    deeds = (' went home.', ' counted apples', ' — “so late?”', ' and\nslept', ' 1,234 times')
    both = [(f'{names[i % 5]}{" again" * (i % 7)}', deeds[i // 8]) for i in range(40)]
    texts = [f'{names[i % 5]}{deeds[(i + 1) % 5]} ' * (i * 2 + 1) for i in range(10)]
    return both, [text.strip() for text in texts]


def ours(model, encoding):
    """What our code says of pairs(): 50 log-likelihoods."""
    both, texts = pairs()
    items = [(tokenizer.encode(encoding, context), [tokenizer.encode(encoding, continuation)])
             for context, continuation in both]
    scores = scoring.ending_loglikelihoods(model, items)
    rolled = scoring.rolling_loglikelihoods(
        model, [tokenizer.encode(encoding, text) for text in texts],
        prefix=encoding.eot)
    return [score.sum for score, in scores] + [score.sum for score in rolled]


class Harness:
    """lm-evaluation-harness' own scoring of a model of ours, opened by transformers."""

    def __init__(self, model, encoding, **how):
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoModelForCausalLM, AutoTokenizer
        with tempfile.TemporaryDirectory() as folder:
            checkpoints.save(folder, 0, model, encoding, {})
            folder = checkpoints.find(folder)
            self.lm = HFLM(pretrained=AutoModelForCausalLM.from_pretrained(folder),
                           tokenizer=AutoTokenizer.from_pretrained(folder), device='cpu',
                           # its cache mixes up requests of one text with different contexts
                           logits_cache=False, **how)

    def loglikelihood(self, both):
        return self.lm.loglikelihood(self.requests('loglikelihood', both))

    def rolling(self, texts):
        return self.lm.loglikelihood_rolling(
            self.requests('loglikelihood_rolling', [(text,) for text in texts]))

    def requests(self, kind, arguments):
        from lm_eval.api.instance import Instance
        return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def write_reference():
    encoding = tokenizer.byte_pairs('bytes', [])
    model = tiny(encoding)
    both, texts = pairs()
    harness = Harness(model, encoding, batch_size=1)
    values = [value for value, _ in harness.loglikelihood(both)] + harness.rolling(texts)
    worst = max(abs(a / b - 1) for a, b in zip(ours(model, encoding), values))
    Path(__file__).with_suffix('.json').write_text(json.dumps(values, indent=0) + '\n')
    print(f'{len(values)} values; ours differ by at most {worst:.1e}')


def compare(name, mine, theirs):
    """mine: Scores of endings by item; theirs: the harness' pairs in the same order."""
    flat = iter(theirs)
    pairs = [(score, next(flat)) for item in mine for score in item]
    worst = max(abs(a.sum / b - 1) for a, (b, _) in pairs)
    groups, start, same = [len(item) for item in mine], 0, 0
    for item in mine:
        sums, others = [s.sum for s in item], [b for _, (b, _) in pairs[start:start + len(item)]]
        same, start = same + (sums.index(max(sums)) == others.index(max(others))), start + len(item)
    print(f'{name}: {len(groups)} items, {same} the same choice, '
          f'log-likelihoods differ by at most {worst:.1e}', flush=True)


def real(folder, count=200):
    """Real benchmarks, GPT-2's tokens, a random model of 2 layers and std 0.25."""
    import importlib.util as finder
    encoding, folder = tokenizer.gpt2(), Path(folder)
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=128)).eval()
    for name, p in model.named_parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.25)
    with torch.no_grad():
        model.wte.weight[50257:] = 0
    harness = Harness(model, encoding, batch_size=4, max_length=1024)

    rows, _ = benchmarks.hellaswag(folder / 'hellaswag/hellaswag_val_original_500.jsonl')
    rows, home = rows[:count], Path(finder.find_spec('lm_eval').origin).parent / 'tasks'
    theirs = module(home / 'hellaswag/utils.py').process_docs(Rows(rows))
    assert [hellaswag.clean(ending) for row in rows for ending in row['endings']] == [
        ending for doc in theirs for ending in doc['choices']]
    scores = scoring.ending_loglikelihoods(
        model, [hellaswag.render(row, encoding, 'lm-eval') for row in rows])
    asked = [(doc['query'], f' {ending}') for doc in theirs for ending in doc['choices']]
    compare('HellaSwag', scores, harness.loglikelihood(asked))

    questions = [question for name in ('CN', 'NE', 'P', 'V') for question in
                 benchmarks.cbt(name, 'valid', folder / f'cbt/real/cbtest_{name}_train.txt')[0]]
    for name in ('CN', 'NE'):
        file = folder / f'cbt/rebuilt/cbtest_{name}_valid_2000ex.rebuilt.txt'
        questions += benchmarks.cbt(name, 'valid', file)[0][:count // 2]
    items = [eval_cbt.render(question, encoding) for question in questions]
    asked = [(encoding.decode(list(context)), encoding.decode(list(ending)))
             for context, endings in items for ending in endings]
    compare('CBT', scoring.ending_loglikelihoods(model, items), harness.loglikelihood(asked))

    texts, _ = benchmarks.lambada(folder / 'lambada/lambada_test.jsonl')
    texts = texts[:5 * count]
    scores = scoring.ending_loglikelihoods(
        model, [(context, [word]) for context, word in
                (eval_lm.last_word(text, encoding, 'harness') for text in texts)])
    theirs = harness.loglikelihood([(text[:text.rindex(' ')], text[text.rindex(' '):])
                                    for text in texts])
    compare('LAMBADA', scores, theirs)

    raw = benchmarks.read_bytes(folder / 'wikitext/wiki.valid.raw').decode()[:200000]
    pages, clean = benchmarks.articles(raw), module(home / 'wikitext/preprocess_wikitext.py')
    documents = [eval_lm.harness_detokenize(page) for page in pages]
    assert documents == [clean.wikitext_detokenizer({'page': page}) for page in pages]
    mine = scoring.rolling_loglikelihoods(
        model, [tokenizer.encode(encoding, text) for text in documents],
        prefix=encoding.eot)
    worst = max(abs(a.sum / b - 1) for a, b in zip(mine, harness.rolling(documents)))
    print(f'WikiText: {len(pages)} articles differ by at most {worst:.1e}')


class Rows(list):
    def map(self, function):
        return [function(row) for row in self]


def module(path):
    import importlib.util as finder
    spec = finder.spec_from_file_location(path.stem, path)
    found = finder.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


if __name__ == '__main__':
    real(sys.argv[1]) if len(sys.argv) > 1 else write_reference()
