"""
The model against transformers' GPT-2, and the properties that make it a causal language model.
"""

import math
from dataclasses import replace

import pytest
import torch

from gpt import checkpoints
import model as model_module
from model import (GPT, SIZES, Cache, GPTConfig, PackedLinear, crop_block, left_pad, pack,
                   sample)

TINY = GPTConfig(block_size=16, vocab_size=61, n_layer=2, n_head=2, n_embd=32)


def random_ids(config, *shape, seed=0):
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def pair(config, std):
    """Our model and transformers', with the same random weights of standard deviation `std`."""
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    their_config = transformers.GPT2Config(**checkpoints.config_json(config, 0))
    theirs = transformers.GPT2LMHeadModel(their_config)
    for name, p in theirs.named_parameters():
        torch.nn.init.normal_(p, std=std)
        if 'ln_' in name and name.endswith('weight'):
            p.data += 1
    ours = GPT(config)
    checkpoints.from_hugging_face(ours, theirs.state_dict().items())
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize('name', [name if name in ('gpt2', 'gpt2-medium') else pytest.param(
    name, marks=pytest.mark.slow) for name in SIZES])
def test_logits_loss_and_gradients_are_those_of_transformers(name):
    config = replace(SIZES[name], n_layer=2, block_size=32, vocab_size=4200)       # padded to 4224
    ours, theirs = pair(config, std=0.08)
    ids = random_ids(config, 2, 32)
    logits, their_logits = ours(ids), theirs(ids).logits
    assert logits.shape == (2, 32, 4200) and their_logits.std() > 1
    torch.testing.assert_close(logits, their_logits, rtol=1e-4, atol=1e-3)
    targets = torch.roll(ids, -1, dims=1)
    loss = ours(ids, targets)
    their_loss = torch.nn.functional.cross_entropy(their_logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=0)
    loss.backward()
    their_loss.backward()
    their_gradients = dict(theirs.named_parameters())
    for key, p in ours.named_parameters():
        expected = their_gradients[f'transformer.{key}'].grad
        expected = expected.t() if key.endswith(checkpoints.TRANSPOSED) else expected
        found = p.grad[:config.vocab_size] if key == 'wte.weight' else p.grad
        assert (found - expected).norm() <= 1e-4 * expected.norm(), key
    padding = ours.wte.weight.grad[config.vocab_size:]
    assert not padding.any(), 'the padding takes part in the softmax'


def test_without_biases_it_is_transformers_with_zero_biases():
    transformers = pytest.importorskip('transformers')
    ours = GPT(replace(TINY, bias=False)).eval()
    their_config = transformers.GPT2Config(**checkpoints.config_json(TINY, 0))
    theirs = transformers.GPT2LMHeadModel(their_config).eval()
    theirs.load_state_dict(checkpoints.to_hugging_face(ours), strict=False)
    ids = random_ids(TINY, 2, 16)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name, parameters', [('gpt2', 124_439_808), ('gpt2-xl', 1_557_611_200)])
def test_the_sizes_have_as_many_parameters_as_openai_s_files(name, parameters):
    with torch.device('meta'):
        assert GPT(SIZES[name]).num_parameters() == parameters


def test_the_loss_starts_at_ln_v_and_residual_projections_are_scaled():
    torch.manual_seed(0)
    config = replace(TINY, n_layer=8, n_embd=64, vocab_size=4200)
    net = GPT(config)
    ids = random_ids(config, 4, 17)
    assert abs(net(ids[:, :-1], ids[:, 1:]).item() - math.log(4200)) < 0.1
    assert net.h[3].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert net.h[3].attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_no_token_sees_the_future():
    """Changing token t leaves every output before t as it was;
    changes after it prove the test can fail."""
    net = GPT(TINY).eval()
    ids = random_ids(TINY, 1, 16)
    changed = ids.clone()
    changed[0, 9] = (ids[0, 9] + 1) % TINY.vocab_size
    a, b = net(ids), net(changed)
    assert torch.equal(a[:, :9], b[:, :9]) and not torch.allclose(a[:, 9:], b[:, 9:])


def test_positions_and_mask_score_two_branches_in_one_row():
    """A prefix and two endings in one row give what each gives alone: what evaluations build on."""
    net = GPT(TINY).eval()
    ids = random_ids(TINY, 1, 9)                                # prefix 0-4, branches 5-6 and 7-8
    mask = torch.ones(9, 9).tril().bool()
    mask[7:, 5:7] = False
    both = net(ids, positions=torch.tensor([0, 1, 2, 3, 4, 5, 6, 5, 6]), mask=mask)
    alone = net(torch.cat([ids[:, :5], ids[:, 7:]], dim=1))
    torch.testing.assert_close(both[:, 7:], alone[:, 5:])
    torch.testing.assert_close(both[:, :7], net(ids[:, :7]))


def test_the_sliced_loss_is_the_loss(monkeypatch):
    """Slices of tokens give the loss and the gradients of all logits at once."""
    net, ids = GPT(TINY), random_ids(TINY, 4, 16)
    whole = net(ids, ids)
    whole.backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    monkeypatch.setattr(model_module, 'LOGITS_AT_ONCE', 7 * TINY.vocab_size)    # 7 tokens a slice
    sliced = net(ids, ids)
    sliced.backward()
    torch.testing.assert_close(sliced, whole)
    for p, gradient in zip(net.parameters(), expected):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('slice_tokens, compiled', [
    (64, False), (7, False), pytest.param(7, True, marks=pytest.mark.slow)])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_the_loss_is_torch_s_cross_entropy(monkeypatch, slice_tokens, compiled, dtype, tolerance):
    """And so are its gradients, with a padded vocabulary, also in half precision, where it is
    float32 itself."""
    shape = replace(TINY, vocab_size=5000)
    net, ids = GPT(shape), random_ids(shape, 4, 16)
    torch.nn.functional.cross_entropy(net(ids).flatten(0, 1), ids.flatten()).backward()
    expected = [p.grad.clone() for p in net.parameters()]
    reference = torch.nn.functional.cross_entropy(net(ids).flatten(0, 1), ids.flatten())
    net.zero_grad()
    monkeypatch.setattr(model_module, 'LOGITS_AT_ONCE', slice_tokens * 5000)
    with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
        loss = (torch.compile(net) if compiled else net)(ids, ids)
    assert loss.dtype == torch.float32
    (loss / 2).backward()
    assert abs(loss - reference) < tolerance * 0.1 * reference
    for p, gradient in zip(net.parameters(), expected):
        assert (2 * p.grad - gradient).norm() <= tolerance * gradient.norm()
    with torch.no_grad():
        torch.testing.assert_close(net(ids, ids), reference)


@pytest.mark.parametrize('compiled', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_activations_that_are_made_again_change_nothing_but_memory(compiled):
    """The same loss and gradients, dropout included, from a sixth of what is kept, or less."""
    config, found = replace(TINY, dropout=0.1 * (not compiled), n_layer=6), []
    ids = random_ids(config, 4, 16)
    for again in (False, True):
        torch.manual_seed(0)
        gpt = GPT(config)
        gpt.checkpoint_activations = again
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: kept.append(t.numel()) or t, lambda t: t):
            torch.manual_seed(1)
            loss = (torch.compile(gpt) if compiled else gpt)(ids, ids)
        loss.backward()
        found.append((loss, [p.grad for p in gpt.parameters()], sum(kept)))
    (loss, grads, kept), (loss_again, grads_again, kept_again) = found
    assert torch.allclose(loss, loss_again, atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads, grads_again))
    assert compiled or (loss == loss_again and kept_again < kept / 6)


def test_the_compiled_gelu_is_torch_s(monkeypatch):
    x = torch.linspace(-8, 8, 4001)
    expected = torch.nn.functional.gelu(x, approximate='tanh')
    assert torch.equal(model_module.gelu(x), expected)
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
    torch.testing.assert_close(model_module.gelu(x), expected, rtol=1e-5, atol=1e-6)


def test_one_batch_can_be_learned_by_heart():
    torch.manual_seed(0)
    net, ids = GPT(TINY), random_ids(TINY, 4, 17)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = net(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2


def uncached(net, prompt, n, temperature=0.0, seed=0, **cuts):
    """n new ids after one prompt (a list), every one from a forward pass over its whole window."""
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
    """Left-padded; the padding's own hidden states must reach nobody, so ids there do not count."""
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
    """Of different lengths, sampled, each row sliding beyond the block at its own time."""
    net, _ = pair(TINY, std=0.3)
    prompts = [random_ids(TINY, n, seed=n).tolist() for n in (3, 12, 1, 20)]
    ids, lengths = left_pad(prompts)
    found = net.generate(ids, 40, lengths=lengths, seed=5)[:, 20:].tolist()
    alone = [net.generate(torch.tensor([prompt]), 40, seed=5 + k)[0, len(prompt):].tolist()
             for k, prompt in enumerate(prompts)]
    assert found == alone


def test_a_cache_is_read_on_with_many_tokens_at_once():
    net, ids = GPT(TINY).eval(), random_ids(TINY, 2, 16)
    cache = Cache(net, 2, 16)
    parts = [net(part, cache=cache) for part in ids.split([5, 1, 7, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), net(ids))
    with pytest.raises(ValueError, match='17 tokens are more than the block of 16'):
        net(ids[:, :1], cache=cache)


def test_stop_ids_end_a_row_and_all_of_them_the_generation():
    net, ids = pair(TINY, std=0.3)[0], random_ids(TINY, 2, 4)
    free = net.generate(ids, 12, temperature=0)
    stop = free[0, 6].item()                                # the first row ends with its third id
    found = net.generate(ids, 12, temperature=0, stop=[stop])
    n = free[0, 4:].tolist().index(stop) + 1
    assert found[0, 4:4 + n].tolist() == free[0, 4:4 + n].tolist()
    assert (found[0, 4 + n:] == stop).all()
    assert net.generate(ids[:1], 12, temperature=0, stop=[stop]).shape == (1, 4 + n)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('B', [1, 3])
def test_packed_weights_give_the_same_logits_and_text(dtype, B):
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip('this CPU packs no bfloat16')
    net, _ = pair(TINY, std=0.1)
    ids, tolerance = random_ids(TINY, B, 9), 1e-4 if dtype == torch.float32 else 0.1
    expected = net(ids)
    net.to(dtype)
    plain = net.generate(ids, 30, seed=0, top_k=5)
    packed = pack(net)
    torch.testing.assert_close(packed(ids).float(), expected, rtol=tolerance, atol=tolerance)
    found = packed.generate(ids, 30, seed=0, top_k=5)
    assert found.shape == plain.shape
    if dtype == torch.float32:
        assert torch.equal(found, plain)
    if torch.backends.mkldnn.is_available():
        assert isinstance(packed.h[0].mlp.c_fc, PackedLinear)


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
    found = net.next_logits(x)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-4)


def test_generation_goes_on_past_the_block_and_repeats_with_its_seed():
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

    With a seed every row has a generator of its own, seeded by consecutive numbers.
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


def test_padding_is_never_sampled():
    config = replace(TINY, vocab_size=4097, n_layer=1)
    net = GPT(config)
    assert net.wte.weight.shape[0] == 4224 and net(random_ids(config, 1, 4)).shape[-1] == 4097


def test_refusals():
    with pytest.raises(ValueError, match='multiple of n_head'):
        GPT(replace(TINY, n_head=5))
    with pytest.raises(ValueError, match='17 tokens are more than the block of 16'):
        GPT(TINY)(random_ids(TINY, 1, 17))
    for lengths in (None, [5, 1], [1, 0], [1]):
        with pytest.raises(ValueError, match='the lengths of 2 prompts: given'):
            GPT(TINY).generate(random_ids(TINY, 2, 3 if lengths else 0), 3, lengths=lengths)
    with pytest.raises(ValueError, match='block_size=32 is more than'):
        crop_block(GPT(TINY), 32)


def test_a_shorter_block_gives_the_same_logits():
    net, ids = GPT(TINY).eval(), random_ids(TINY, 1, 8)
    before = net(ids)
    crop_block(net, 8)
    assert net.config.block_size == 8 and torch.equal(net(ids), before)
