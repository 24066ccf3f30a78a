"""
Log-likelihoods: against transformers scored plainly, lm-evaluation-harness' own numbers, and models
of which the answer is known beforehand.
"""

import json
import math
import random
import subprocess
import sys

import lm_eval_reference
import numpy as np
import pytest
import torch
from conftest import ROOT

from gpt import scoring
from gpt import tokenizer
from model import GPT, GPTConfig

V, BLOCK = 61, 48


def random_items(n, draw=None, longest=20):
    draw = draw or random.Random(0)
    return [([draw.randrange(V) for _ in range(draw.randrange(1, longest))],
             [[draw.randrange(V) for _ in range(draw.randrange(1, 9))]
              for _ in range(draw.randrange(1, 6))]) for _ in range(n)]


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=V, block_size=BLOCK)).eval()
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return gpt


def sums(scores):
    return [[score.sum for score in item] for item in scores]


def close(a, b, rel=1e-5):
    assert [len(x) for x in a] == [len(x) for x in b]
    for x, y in zip(sum(a, []), sum(b, [])):
        assert x == pytest.approx(y, rel=rel)


def plainly(logits_of, items):
    """One ending at a time, all logits, log_softmax, gather: as one would write it down."""
    found = []
    for context, endings in items:
        found.append([])
        for ending in endings:
            logits = logits_of(torch.tensor([context + ending]))[0].double()
            logprobs = logits.log_softmax(dim=-1)[len(context) - 1:-1]
            found[-1].append(logprobs.gather(1, torch.tensor(ending)[:, None]).sum().item())
    return found


def test_shared_and_plain_rows_equal_transformers_scored_plainly(model, tmp_path):
    """And the callable of transformers is scored by the same code, in either way."""
    transformers = pytest.importorskip('transformers')
    from gpt import checkpoints
    checkpoints.save(tmp_path, 0, model, tokenizer.Characters(''.join(map(chr, range(65, 65 + V)))),
                     {})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoints.find(tmp_path)).eval()
    items = random_items(40)
    with torch.no_grad():
        expected = plainly(lambda ids: theirs(ids).logits, items)
    for share in (True, False):
        close(sums(scoring.ending_loglikelihoods(model, items, share=share)), expected)
    scores = scoring.ending_loglikelihoods(lambda ids: theirs(ids).logits, items, share=False)
    close(sums(scores), expected)

    def tree(ids, positions=None, mask=None):
        return theirs(ids, position_ids=positions, attention_mask=mask).logits

    close(sums(scoring.ending_loglikelihoods(tree, items)), expected)


def test_fifty_numbers_of_lm_evaluation_harness():
    """Written by tests/lm_eval_reference.py with lm_eval 0.4.13 and transformers' GPT-2."""
    encoding = tokenizer.byte_pairs('bytes', [])
    expected = json.loads((ROOT / 'tests/lm_eval_reference.json').read_text())
    found = lm_eval_reference.ours(lm_eval_reference.tiny(encoding), encoding)
    assert len(found) == len(expected) == 50
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_score_is_of_its_ending_alone(model):
    """Neither batches, nor the order of items and endings, nor other endings change it."""
    items = random_items(30)
    expected = sums(scoring.ending_loglikelihoods(model, items))
    for batch_tokens in (1, 100, 10 ** 6):
        close(sums(scoring.ending_loglikelihoods(model, items, batch_tokens=batch_tokens)),
              expected)
    backwards = [(context, endings[::-1]) for context, endings in items[::-1]]
    found = sums(scoring.ending_loglikelihoods(model, backwards))
    close([item[::-1] for item in found[::-1]], expected)
    for k, (context, endings) in enumerate(items[:5]):
        alone = [sums(scoring.ending_loglikelihoods(model, [(context, [one])]))[0][0]
                 for one in endings]
        assert alone == pytest.approx(expected[k], rel=1e-5)


def test_positions_begin_again_for_every_ending():
    """Logits that know the position alone: a mask without positions would be found out."""
    table = torch.randn(99, V, generator=torch.Generator().manual_seed(1))

    def position_detector(ids, positions=None, mask=None):
        places = torch.arange(ids.size(1)).expand_as(ids) if positions is None else positions
        return table[places]

    items = random_items(20)
    expected = [[sum(table[len(context) - 1 + j].log_softmax(-1)[i].item()
                     for j, i in enumerate(ending)) for ending in endings]
                for context, endings in items]
    for share in (True, False):
        found = scoring.ending_loglikelihoods(position_detector, items, share=share)
        close(sums(found), expected)


def test_an_ending_sees_the_context_and_itself_only():
    """Logits that know how many tokens are seen, and their sum: a leak, or padding, shows."""
    def leak_detector(ids, positions=None, mask=None):
        B, T = ids.shape
        seen = (torch.ones(T, T).tril().expand(B, T, T) if mask is None else mask[:, 0]).float()
        total = torch.einsum('bqk,bk->bq', seen, (ids + 1).float())
        values = torch.stack((seen.sum(-1), total), -1)                     # (B, T, 2)
        return torch.sin(values @ torch.arange(1.0, 2 * V + 1).view(2, V) / 7)

    items = random_items(20)
    plain = plainly(leak_detector, items)
    for batch_tokens in (1, 200, 10 ** 6):
        close(sums(scoring.ending_loglikelihoods(leak_detector, items,
                                                    batch_tokens=batch_tokens)), plain)


def test_what_a_score_holds(model):
    """Every token's log-probability, the first included, and the most likely id in its place."""
    context, ending = [1, 2, 3], [4, 5, 6, 7]
    (score,), = scoring.ending_loglikelihoods(model, [(context, [ending])])
    with torch.no_grad():
        logprobs = model(torch.tensor([context + ending]))[0, 2:-1].log_softmax(-1)
    assert score.count == 4 and score.sum == pytest.approx(score.logprobs.sum().item(), rel=1e-6)
    expected = logprobs.gather(1, torch.tensor(ending)[:, None])[:, 0]
    assert score.logprobs == pytest.approx(expected.numpy(), rel=1e-5)
    assert score.predicted.tolist() == logprobs.argmax(-1).tolist()
    banned = torch.zeros(V, dtype=torch.bool)
    banned[logprobs[:2].argmax(-1)] = True
    (other,), = scoring.ending_loglikelihoods(model, [(context, [ending])], banned=banned)
    assert other.predicted[0] == logprobs[0].masked_fill(banned, -math.inf).argmax()
    assert other.predicted[1:].tolist() == score.predicted[1:].tolist()     # the first only
    assert other.sum == score.sum


def test_an_item_longer_than_the_block_is_cut_for_all_its_endings_alike(model):
    draw = random.Random(2)
    context = [draw.randrange(V) for _ in range(BLOCK + 10)]
    endings = [[1], [2, 3, 4, 5]]
    cut = scoring.excess((context, endings), BLOCK)
    assert cut == 10 + 4 - 1
    whole = scoring.ending_loglikelihoods(model, [(context, endings)])
    close(sums(whole), sums(scoring.ending_loglikelihoods(model, [(context[cut:], endings)])))
    plain = scoring.ending_loglikelihoods(model, [(context, endings)], share=False)
    close(sums(whole), sums(plain))


def test_items_that_are_too_long_are_counted():
    items = random_items(20, longest=60)
    cut = sum(scoring.excess(item, BLOCK) > 0 for item in items)
    note, = scoring.cut_note(items, BLOCK)
    assert 0 < cut < 20 and note.startswith(f'{cut} of 20 are longer than the block of 48')
    assert scoring.cut_note([([1], [[2]])], BLOCK) == []


def test_a_shared_row_may_be_longer_than_the_block(model):
    """Its positions are not: ten endings beside each other."""
    draw = random.Random(3)
    item = ([draw.randrange(V) for _ in range(BLOCK - 9)],
            [[draw.randrange(V) for _ in range(10)] for _ in range(10)])
    assert len(scoring.rows_of(*item)[0].ids) > BLOCK
    close(sums(scoring.ending_loglikelihoods(model, [item])),
          sums(scoring.ending_loglikelihoods(model, [item], share=False)))


@pytest.mark.parametrize('item, words', [
    (([], [[1]]), 'item 1: a context and its endings need at least one token'),
    (([1], []), 'item 1: a context and its endings need at least one token'),
    (([1], [[1], []]), 'item 1: a context and its endings need at least one token'),
    (([1] * 9, [[1] * (BLOCK + 1)]), 'item 1: an ending of 49 tokens leaves no room')])
def test_what_cannot_be_scored_is_refused(model, item, words):
    with pytest.raises(ValueError, match=words):
        scoring.ending_loglikelihoods(model, [([1], [[2]]), item])


def test_nan_is_refused():
    def broken(ids):
        logits = torch.zeros(*ids.shape, V)
        logits[ids == 7] = math.nan
        return logits

    items = [([1], [[2]]), ([3, 7], [[4]]), ([5], [[6]])]
    with pytest.raises(ValueError, match='NaN for row 1'):
        scoring.ending_loglikelihoods(broken, items, share=False)


def test_memory_that_runs_out_halves_the_batch(model):
    """The scores are the same; a row that does not fit alone is an error that says what helps."""
    items, sizes = random_items(30), []

    class Narrow:
        config, head = model.config, staticmethod(model.head)

        def __init__(self, most):
            self.most = most

        def hidden(self, ids, **places):
            sizes.append(len(ids))
            if len(ids) > self.most:
                raise torch.OutOfMemoryError('CUDA out of memory.')
            if self.most == 5:
                raise RuntimeError('another error')
            return model.hidden(ids, **places)

    found = scoring.ending_loglikelihoods(Narrow(4), items, batch_tokens=10 ** 6)
    close(sums(found), sums(scoring.ending_loglikelihoods(model, items)))
    assert max(sizes) == 30
    with pytest.raises(ValueError, match='does not fit in the memory of cpu; --dtype=bfloat16'):
        scoring.ending_loglikelihoods(Narrow(0), items)
    with pytest.raises(RuntimeError, match='another error'):
        scoring.ending_loglikelihoods(Narrow(5), items)


# Long texts.

def rolling(model, ids, stride=0, **options):
    return scoring.rolling_loglikelihoods(model, [ids], stride, **options)[0]


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    ids = [i % V for i in range(500)]
    score = rolling(lambda ids: torch.zeros(*ids.shape, V), ids, 7,
                    block_size=BLOCK)
    assert score.count == 499 and math.exp(-score.sum / score.count) == pytest.approx(V, rel=1e-6)


@pytest.mark.parametrize('n', [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 200])
@pytest.mark.parametrize('stride', [1, 5, BLOCK])
@pytest.mark.parametrize('prefix', [None, 999])
def test_every_token_is_scored_once_with_as_much_before_it_as_promised(n, stride, prefix):
    ids = np.arange(n)
    rows = scoring.windows(ids, BLOCK, stride, prefix)
    whole = ids.tolist() if prefix is None else [prefix, *ids.tolist()]
    assert [i for row in rows for i in row.targets.tolist()] == whole[1:]
    for k, row in enumerate(rows):
        assert len(row.ids) <= BLOCK and len(row.columns) <= (BLOCK if k == 0 else stride)
        for column, target in zip(row.columns.tolist(), row.targets.tolist()):
            place = whole.index(target)
            assert row.ids[column] == whole[place - 1]
            assert column + 1 >= min(place, BLOCK - stride + 1)


def test_disjoint_windows_are_those_of_the_harness():
    """Its rule, written down again: windows of a block, each beginning with the last token of the
    one before; the last is filled up with what was already scored."""
    ids = list(range(150))
    rows = scoring.windows(ids, BLOCK, BLOCK, 60)
    whole = [60, *ids]
    assert [row.ids.tolist() for row in rows] == [
        whole[:48], whole[48:96], whole[96:144], whole[150 - 48:150]]
    assert [len(row.targets) for row in rows] == [48, 48, 48, 6]


def test_strides_agree_where_the_context_does_not_matter():
    table = torch.randn(V, generator=torch.Generator().manual_seed(2))
    ids = [random.Random(4).randrange(V) for _ in range(300)]

    def unigram(ids):
        return table.expand(*ids.shape, V)

    found = [rolling(unigram, ids, stride, block_size=BLOCK).sum
             for stride in (1, 13, 0)]
    expected = sum(table.log_softmax(-1)[i].item() for i in ids[1:])
    assert found == pytest.approx([expected] * 3, rel=1e-5)


def test_a_short_stride_gives_more_context(model):
    """A stride of one is one forward pass for each token, over the block before it."""
    ids = torch.tensor([random.Random(5).randrange(V) for _ in range(BLOCK + 9)])
    score = rolling(model, ids, 1)
    with torch.no_grad():
        expected = [model(ids[None, max(0, t - BLOCK):t])[0, -1].log_softmax(-1)[ids[t]].item()
                    for t in range(1, len(ids))]
    assert score.logprobs.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    with pytest.raises(ValueError, match='stride: given 49, expected 1 to 48'):
        rolling(model, ids, BLOCK + 1)


MEMORY = '''
import resource, sys
import torch
from gpt import cpu, scoring
from model import GPT, GPTConfig
cpu.keep_freed_memory()
model = GPT(GPTConfig(256, 4096, 1, 2, 64)).eval()
ids = torch.randint(4096, (200_000,)).tolist()
peaks = []
for count in (20_000, 200_000):
    scoring.rolling_loglikelihoods(model, [ids[:count]], 128, batch_tokens=1024)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(peaks[1] - peaks[0])
'''


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='of the C library of Linux')
def test_memory_does_not_grow_with_the_text():
    """Ten times the text: what it adds is the text and its scores, and not more large blocks."""
    done = subprocess.run([sys.executable, '-c', MEMORY], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    assert int(done.stdout) < 100_000, done.stdout                      # KB
