"""Generation against transformers', and against a forward pass for every token."""

import signal
from dataclasses import replace

import pytest
import torch

from gpt import generate
from gpt.generate import Cache, next_logits, sample
from model import GPT
from test_model import TINY, pair, random_ids


def left_pad(prompts):
    """(ids (B, T), lengths (B,)) of B lists of ids: zeros before the shorter ones."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    rows = [[0] * (max(lengths) - len(prompt)) + list(prompt) for prompt in prompts]
    return torch.tensor(rows), lengths


def uncached(net, prompt, n, temperature=0.0, seed=0, **cuts):
    """n new ids after one prompt (a list), each from a forward pass over its whole window."""
    ids, generator = list(prompt), torch.Generator().manual_seed(seed)
    block, start = net.config.block_size, 0
    for _ in range(n):
        while len(ids) - start > block:
            start += block // 4
        logits = net(torch.tensor([ids[start:]]))[:, -1]
        ids.append(sample(logits, temperature, generators=[generator], **cuts).item())
    return ids[len(prompt):]


def test_greedy_generation_is_that_of_transformers():
    ours, theirs = pair(TINY, std=0.3)
    ids = random_ids(TINY, 3, 5)
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=11,
                               do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(ours.generate(ids, 11, temperature=0), expected)
    assert expected[:, 5:].tolist() == [uncached(ours, row, 11) for row in ids.tolist()]


def test_prompts_of_different_lengths_are_continued_as_transformers_does():
    """Left-padded. Nothing attends to the padding, so the ids there make no difference."""
    ours, theirs = pair(TINY, std=0.3)
    prompts = [random_ids(TINY, n, seed=n).tolist() for n in (7, 1, 4)]
    ids, lengths = left_pad(prompts)
    mask = (torch.arange(7) >= 7 - lengths[:, None]).long()
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False,
                               eos_token_id=None, pad_token_id=0)
    assert torch.equal(ours.generate(ids, 9, lengths=lengths, temperature=0), expected)
    others = torch.where(mask.bool(), ids, 60)
    assert torch.equal(ours.generate(others, 9, lengths=lengths, temperature=0)[:, 7:],
                       expected[:, 7:])


@pytest.mark.parametrize('prompt_length', [1, 16, 37])
@pytest.mark.parametrize('cuts', [{'temperature': 0.0}, {'temperature': 1.5, 'top_k': 9},
                                  {'temperature': 1.0, 'top_p': 0.9}])
def test_the_cache_changes_nothing_within_and_beyond_the_block(prompt_length, cuts):
    net, _ = pair(TINY, std=0.3)
    prompt = random_ids(TINY, prompt_length).tolist()
    found = net.generate(torch.tensor([prompt]), 40, seed=3, **cuts)[0, prompt_length:]
    assert found.tolist() == uncached(net, prompt, 40, seed=3, **cuts)


def test_a_row_is_the_same_alone_and_in_a_batch():
    """Rows of different lengths, sampled, whose windows slide at different times."""
    net, _ = pair(TINY, std=0.3)
    prompts = [random_ids(TINY, n, seed=n).tolist() for n in (3, 12, 1, 20)]
    ids, lengths = left_pad(prompts)
    found = net.generate(ids, 40, lengths=lengths, seed=5)[:, 20:].tolist()
    alone = [net.generate(torch.tensor([prompt]), 40, seed=5 + k)[0, len(prompt):].tolist()
             for k, prompt in enumerate(prompts)]
    assert found == alone


@pytest.mark.parametrize('lengths', [None, (6, 1, 3)])
@pytest.mark.parametrize('cuts', [{'temperature': 0.0}, {'temperature': 1.5, 'top_k': 9, 'seed': 3},
                                  {'temperature': 1.0, 'top_p': 0.9, 'seed': 3, 'stop': (7, 20)}])
def test_a_fixed_step_writes_the_same(monkeypatch, lengths, cuts):
    """The step that CUDA captures in a graph, here without one, over several windows."""
    net, _ = pair(TINY, std=0.3)
    ids = random_ids(TINY, 3, 6)
    expected = net.generate(ids, 40, lengths=lengths, **cuts)
    steps = []
    monkeypatch.setattr(generate, 'captures', lambda model, tokens: steps.append(tokens) or True)
    assert torch.equal(net.generate(ids, 40, lengths=lengths, **cuts), expected)
    assert steps == [40]                                # one cache and one graph for all windows


def test_a_fixed_step_is_kept_for_the_next_text_that_it_fits(monkeypatch):
    """On CUDA its graph reads the weights where they were when it was captured."""
    net, made = pair(TINY, std=0.3)[0], []

    def write(prompt, in_half=False, **options):
        """A text, which is what it is without fixed steps, and how many of them there were."""
        found = []
        for fixed in (False, True):
            monkeypatch.setattr(generate, 'captures', lambda model, tokens: fixed)
            with torch.autocast('cpu', torch.bfloat16, enabled=in_half):
                found.append(net.generate(random_ids(TINY, 2, prompt, seed=prompt), 40, **options))
        assert in_half or torch.equal(*found)
        return len(made)

    class Counted(generate.FixedStep):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)
    monkeypatch.setattr(generate, 'FixedStep', Counted)
    assert [write(n, temperature=0) for n in (3, 9, 30)] == [1, 1, 1]
    net.h[0].mlp.c_fc.weight.data.mul_(2)
    assert write(5, temperature=0) == 1
    net.h[0].mlp.c_fc.weight.data = net.h[0].mlp.c_fc.weight.data / 2
    assert write(5, temperature=0) == 2
    assert [write(5, temperature=1, top_k=k, seed=0) for k in (7, 7, 8)] == [3, 3, 4]
    assert [write(5, temperature=0, in_half=True) for _ in range(2)] == [5, 6]


def test_a_fixed_step_is_kept_when_its_text_is_not_read_to_the_end(monkeypatch):
    net, ids = pair(TINY, std=0.3)[0], random_ids(TINY, 2, 3)
    expected = net.generate(ids, 20, temperature=0)
    monkeypatch.setattr(generate, 'captures', lambda model, tokens: True)
    next(text := generate.stream(net, ids, 20, temperature=0))
    text.close()
    step = generate.kept_steps[net]
    assert torch.equal(net.generate(ids, 20, temperature=0), expected)
    assert generate.kept_steps[net] is step


def test_a_text_after_one_that_was_interrupted(monkeypatch):
    """By Ctrl-C or an error in the middle of a step."""
    net, ids = pair(TINY, std=0.3)[0], random_ids(TINY, 2, 3)
    expected = net.generate(ids, 20, temperature=0)
    monkeypatch.setattr(generate, 'captures', lambda model, tokens: True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        text = generate.stream(net, ids, 20, temperature=0)
        next(text)
        patch.setattr(net.h[1], 'forward', lambda *_: signal.raise_signal(signal.SIGINT))
        next(text)
    assert torch.equal(net.generate(ids, 20, temperature=0), expected)


def test_a_fixed_step_of_inference_mode_serves_outside_of_it(monkeypatch):
    net, ids = pair(TINY, std=0.3)[0], random_ids(TINY, 2, 3)
    expected = net.generate(ids, 20, temperature=0)
    monkeypatch.setattr(generate, 'captures', lambda model, tokens: True)
    for mode in (True, False):
        with torch.inference_mode(mode):
            assert torch.equal(net.generate(ids, 20, temperature=0), expected)


def test_two_texts_at_a_time_do_not_share_a_fixed_step(monkeypatch):
    net = pair(TINY, std=0.3)[0]
    prompts = random_ids(TINY, 2, 1, 6)
    expected = [net.generate(ids, 30, temperature=0)[:, 6:] for ids in prompts]
    monkeypatch.setattr(generate, 'captures', lambda model, tokens: True)
    net.generate(prompts[0], 30, temperature=0)
    both = zip(*(generate.stream(net, ids, 30, temperature=0) for ids in prompts))
    found = [torch.stack(ids, dim=1) for ids in zip(*both)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.slow
def test_a_compiled_step_is_compiled_once_and_writes_the_same(monkeypatch):
    """Over several windows, by rows of different lengths, when the text to come is long enough."""
    from torch._dynamo.utils import counters            # takes seconds
    net, _ = pair(replace(TINY, n_layer=1), std=0.3)
    ids, graphs = random_ids(TINY, 3, 6), []
    monkeypatch.setattr(generate, 'captures', lambda model, tokens: True)
    options = {'temperature': 1.5, 'top_k': 9, 'seed': 3, 'lengths': (6, 1, 3)}
    for tokens in (40, 41):
        monkeypatch.setattr(generate, 'MIN_TOKENS_TO_COMPILE', 99)
        expected = net.generate(ids, tokens, **options)
        monkeypatch.setattr(generate, 'MIN_TOKENS_TO_COMPILE', 41)
        before = counters['stats']['unique_graphs']
        assert torch.equal(net.generate(ids, tokens, **options), expected)
        graphs.append(counters['stats']['unique_graphs'] - before)
    assert graphs == [0, 1]


@pytest.mark.slow
def test_logits_of_a_compiled_step_are_those_of_the_eager_one(monkeypatch):
    net, _ = pair(TINY, std=0.3)
    options, found = generate.SamplingOptions(temperature=0), []
    monkeypatch.setattr(generate, 'pick', lambda logits, *_: logits)
    for compiled in (False, True):
        cache = Cache(net, 2, 12)
        step = generate.FixedStep(cache, options, compiled)
        step.begin(torch.tensor([0, 2]), 5)
        with torch.inference_mode():
            net.hidden(random_ids(TINY, 2, 5), cache=cache, **generate.padding(step.pad, 0, 5))
            found.append(torch.stack([step(net, ids, None) for ids in random_ids(TINY, 7, 2)]))
        assert bool(step.compiled) == compiled and cache.length == 12
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_a_step_that_cannot_be_compiled_stays_eager(monkeypatch):
    net, ids = GPT(TINY).eval(), random_ids(TINY, 2, 5)
    expected = net.generate(ids, 20, temperature=0)

    def broken(*_, **__):
        def call(*_):
            raise RuntimeError('no compiler')
        return call
    monkeypatch.setattr(generate, 'captures', lambda model, tokens: True)
    monkeypatch.setattr(generate, 'MIN_TOKENS_TO_COMPILE', 1)
    monkeypatch.setattr(torch, 'compile', broken)
    assert torch.equal(net.generate(ids, 20, temperature=0), expected)


def test_logits_of_a_fixed_step_are_those_of_the_growing_cache():
    net, _ = pair(TINY, std=0.3)
    ids, pad = random_ids(TINY, 2, 5), torch.tensor([0, 2])
    caches = [Cache(net, 2, 12) for _ in range(2)]
    step = generate.FixedStep(caches[1], generate.SamplingOptions(temperature=0))
    step.begin(pad, 5)
    found = []
    with torch.no_grad():
        for cache in caches:
            net.hidden(ids, cache=cache, **generate.padding(pad, 0, 5))
        for _ in range(7):
            found.append(net.hidden(ids[:, -1:], cache=caches[0],
                                    **generate.padding(pad, caches[0].length, 1)))
            chosen = step(net, ids[:, -1], None)
            assert torch.equal(chosen, net.head(found[-1][:, -1]).argmax(-1))
            n = caches[0].length
            for a, b in zip(caches[0].layers, caches[1].layers):
                torch.testing.assert_close(a[..., :n, :], b[..., :n, :], rtol=0, atol=1e-5)
            ids = torch.cat((ids, chosen[:, None]), dim=1)


def test_a_cache_takes_many_tokens_at_once():
    net, ids = GPT(TINY).eval(), random_ids(TINY, 2, 16)
    cache = Cache(net, 2, 16)
    parts = [net(part, cache=cache) for part in ids.split([5, 1, 7, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), net(ids))
    with pytest.raises(ValueError, match='17 tokens are more than the block of 16'):
        net(ids[:, :1], cache=cache)


def test_stop_ids_end_a_row_and_all_of_them_the_generation():
    net, ids = pair(TINY, std=0.3)[0], random_ids(TINY, 2, 4)
    free = net.generate(ids, 12, seed=3)[:, 4:]
    stop = free[0, 2].item()                                # the first row ends with its third id
    assert stop not in free[1] and set(free[0, 3:].tolist()) != {stop}
    found = net.generate(ids, 12, seed=3, stop=[stop])[:, 4:]
    assert found[0].tolist() == free[0, :2].tolist() + 10 * [stop]
    assert torch.equal(found[1], free[1])
    assert net.generate(ids[:1], 12, seed=3, stop=[stop]).shape == (1, 4 + 3)


def test_logits_of_half_precision_do_not_tie():
    """An offset of -100 on all logits, as GPT-2 has it, leaves bfloat16 steps of 0.5."""
    torch.manual_seed(0)
    net = GPT(replace(TINY, n_embd=64)).eval()
    net.wte.weight.data.normal_(std=0.05)[:, 0] = -1
    x = torch.cat([torch.full((1, 1), 100.0), torch.randn(1, 63)], dim=1)
    exact = net.head(x)
    net.to(torch.bfloat16)
    x, exact = x.bfloat16(), (x.bfloat16().double() @ net.wte.weight.double().T).float()
    assert len(net.head(x).unique()) < 10
    torch.testing.assert_close(next_logits(net, x), exact, rtol=1e-5, atol=1e-4)
    net.float()
    with torch.autocast('cpu', torch.bfloat16):
        assert net.head(x).dtype == torch.bfloat16
        torch.testing.assert_close(next_logits(net, x), exact, rtol=1e-5, atol=1e-4)


def test_generation_continues_past_the_block_and_repeats_with_its_seed():
    net, ids = GPT(TINY).eval(), random_ids(TINY, 2, 3)
    draw = [net.generate(ids, 30, seed=seed) for seed in (1, 1, 2)]
    assert draw[0].shape == (2, 33) and torch.equal(draw[0][:, :3], ids)
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    assert net.generate(ids, 0).shape == (2, 3)
    torch.manual_seed(0)
    assert not torch.equal(net.generate(ids, 30), net.generate(ids, 30))


@pytest.mark.parametrize('seed', [None, 11])
@pytest.mark.parametrize('temperature, top_k, top_p', [
    (1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 7, 1.0), (1.5, 0, 0.8), (1.3, 20, 0.6), (1.0, 1, 1.0)])
def test_samples_follow_the_distribution_that_is_left(temperature, top_k, top_p, seed):
    """20,000 rows generate one token each: chi-square against probabilities computed by hand.

    With a seed each row has its own generator, seeded with consecutive numbers.
    """
    torch.manual_seed(0)
    net, ids, n = pair(TINY, std=0.3)[0], random_ids(TINY, 1, 5), 20_000
    found = net.generate(ids.expand(n, 5), 1, temperature=temperature, top_k=top_k, top_p=top_p,
                         seed=seed)[:, 5]
    weights = (net(ids)[0, -1].double() / temperature).exp()
    order = weights.argsort(descending=True).tolist()[:top_k or None]
    kept, total = [], sum(weights[i] for i in order)
    while sum(weights[i] for i in kept) < top_p * total and len(kept) < len(order):
        kept.append(order[len(kept)])
    expected = n * weights[kept] / weights[kept].sum()
    counts = torch.bincount(found, minlength=TINY.vocab_size)
    assert counts[kept].sum() == n, 'a token that was cut off was drawn'
    statistic = ((counts[kept] - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(kept) - 1) / 2).double()
    assert len(kept) == 1 or torch.special.gammaincc(freedom, statistic / 2) > 1e-4


def test_top_p_keeps_the_fewest_that_suffice():
    probs, n = torch.tensor([0.5, 0.3, 0.15, 0.05]), 1000
    for top_k, top_p, kept in ((2, 1.0, {0, 1}), (0, 0.75, {0, 1}), (0, 0.85, {0, 1, 2}),
                               (3, 0.5, {0}), (0, 0.01, {0})):
        assert set(sample(probs.log().expand(n, 4), 1.0, top_k, top_p).tolist()) == kept


def test_temperature():
    logits = torch.tensor([[0.0, 1.0, 3.0]])
    assert sample(logits, temperature=0).tolist() == [2]
    n = 20_000
    torch.manual_seed(0)
    cold = sample(logits.expand(n, 3), 0.5)
    expected = (logits / 0.5).softmax(-1)[0, 2].item()
    assert (cold == 2).float().mean().item() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize('lengths', [None, [5, 1], [1, 0], [1]])
def test_lengths_that_do_not_fit_the_prompts_are_refused(lengths):
    ids = random_ids(TINY, 2, 3 if lengths else 0)
    with pytest.raises(ValueError, match='lengths: given .* for 2 prompts, expected 2 numbers'):
        GPT(TINY).generate(ids, 3, lengths=lengths)
