"""
The model against transformers' GPT-2, and the properties that make it a causal language model.
"""

import math
from dataclasses import replace

import pytest
import torch

import model as model_module
from gpt import checkpoints, weights
from model import GPT, SIZES, GPTConfig

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
    tensors = {name.removeprefix('transformer.'): p for name, p in theirs.state_dict().items()}
    weights.fill(ours, weights.Weights('', weights.in_memory(tensors)))
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize('name, activation', [('gpt2', 'gelu_new'), ('gpt2', 'gelu'), (
    'gpt2-medium', 'gelu_new'), *(pytest.param(name, 'gelu_new', marks=pytest.mark.slow)
                                  for name in ('gpt2-large', 'gpt2-xl'))])
def test_logits_loss_and_gradients_are_those_of_transformers(name, activation):
    config = replace(SIZES[name], n_layer=2, block_size=32, vocab_size=4200,       # padded to 4224
                     activation=activation)
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
        expected = expected.t() if key.endswith(weights.TRANSPOSED) else expected
        found = p.grad[:config.vocab_size] if key == 'wte.weight' else p.grad
        assert (found - expected).norm() <= 1e-4 * expected.norm(), key
    padding = ours.wte.weight.grad[config.vocab_size:]
    assert not padding.any(), 'the padding takes part in the softmax'


def test_without_biases_it_is_transformers_with_zero_biases():
    transformers = pytest.importorskip('transformers')
    ours = GPT(replace(TINY, bias=False)).eval()
    their_config = transformers.GPT2Config(**checkpoints.config_json(TINY, 0))
    theirs = transformers.GPT2LMHeadModel(their_config).eval()
    theirs.load_state_dict(weights.to_hugging_face(ours), strict=False)
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
    """Changing token t changes no output before t, and some after it: so the test can fail."""
    net = GPT(TINY).eval()
    ids = random_ids(TINY, 1, 16)
    changed = ids.clone()
    changed[0, 9] = (ids[0, 9] + 1) % TINY.vocab_size
    a, b = net(ids), net(changed)
    assert torch.equal(a[:, :9], b[:, :9]) and not torch.allclose(a[:, 9:], b[:, 9:])


def test_positions_and_mask_score_two_branches_in_one_row():
    """A prefix and two endings in one row give what each gives alone; evaluations rely on it."""
    net = GPT(TINY).eval()
    ids = random_ids(TINY, 1, 9)                                # prefix 0-4, branches 5-6 and 7-8
    mask = torch.ones(9, 9).tril().bool()
    mask[7:, 5:7] = False
    both = net(ids, positions=torch.tensor([0, 1, 2, 3, 4, 5, 6, 5, 6]), mask=mask)
    alone = net(torch.cat([ids[:, :5], ids[:, 7:]], dim=1))
    torch.testing.assert_close(both[:, 7:], alone[:, 5:])
    torch.testing.assert_close(both[:, :7], net(ids[:, :7]))


@pytest.mark.parametrize('slice_tokens, compiled', [
    (64, False), (7, False), pytest.param(7, True, marks=pytest.mark.slow)])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_the_loss_is_torch_s_cross_entropy(slice_tokens, compiled, dtype, tolerance):
    """Its gradients too, with a padded vocabulary and in any number of slices. In half precision
    the loss itself is float32."""
    shape = replace(TINY, vocab_size=5000)
    net, ids = GPT(shape), random_ids(shape, 4, 16)
    torch.nn.functional.cross_entropy(net(ids).flatten(0, 1), ids.flatten()).backward()
    expected = [p.grad.clone() for p in net.parameters()]
    reference = torch.nn.functional.cross_entropy(net(ids).flatten(0, 1), ids.flatten())
    net.zero_grad()
    net.logits_per_slice = slice_tokens * 5000
    with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
        loss = (torch.compile(net) if compiled else net)(ids, ids)
    assert loss.dtype == torch.float32
    (loss / 2).backward()
    assert abs(loss - reference) < tolerance * 0.1 * reference
    for p, gradient in zip(net.parameters(), expected):
        assert (2 * p.grad - gradient).norm() <= tolerance * gradient.norm()
    with torch.no_grad():
        torch.testing.assert_close(net(ids, ids), reference)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_the_loss_of_a_slice_is_torch_s_cross_entropy(dtype, tolerance):
    """With logits as large as GPT-2's and columns of padding."""
    torch.manual_seed(0)
    logits, ids = (torch.randn(9, 40) * 30 - 80).to(dtype), torch.randint(0, 33, (9, 1))
    wide = logits.float().requires_grad_()
    expected = torch.nn.functional.cross_entropy(wide[:, :33], ids[:, 0], reduction='sum')
    expected.backward()
    nats, gradient = model_module.slice_loss(logits.clone(), ids, 33, True)
    torch.testing.assert_close(nats, expected.detach(), rtol=1e-6, atol=1e-4)
    assert gradient.dtype == dtype and not gradient[:, 33:].any()
    torch.testing.assert_close(gradient.float(), wide.grad, rtol=0, atol=tolerance)
    assert torch.equal(model_module.slice_loss(logits.clone(), ids, 33, False)[0], nats)


def test_the_residual_stream_in_half_precision():
    """Under autocast alone; what the blocks add to is then bfloat16."""
    net, ids, seen = GPT(replace(TINY, dropout=0.0)), random_ids(TINY, 2, 8), []
    net.h[1].register_forward_pre_hook(lambda block, args: seen.append(args[0].dtype))
    losses = []
    for net.half_residual in (False, True):
        for dtype in (torch.bfloat16, torch.float32):
            with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
                losses.append(net(ids, ids).item())
    assert seen == [torch.float32, torch.float32, torch.bfloat16, torch.float32]
    assert losses[1] == losses[3] and 0 < abs(losses[0] - losses[2]) < 0.01 * losses[0]


@pytest.mark.parametrize('compiled', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_recomputed_activations_change_nothing_but_memory(compiled):
    """The same loss and gradients, dropout included, from a sixth of the saved tensors or less."""
    config, found = replace(TINY, dropout=0.1 * (not compiled), n_layer=6), []
    ids = random_ids(config, 4, 16)
    for recompute in (False, True):
        torch.manual_seed(0)
        gpt = GPT(config)
        gpt.checkpoint_activations = recompute
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
    assert torch.equal(model_module.gelu_new(x), expected)
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
    torch.testing.assert_close(model_module.gelu_new(x), expected, rtol=1e-5, atol=1e-6)


def test_one_batch_can_be_memorized():
    torch.manual_seed(0)
    net, ids = GPT(TINY), random_ids(TINY, 4, 17)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = net(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2


def test_the_padding_of_the_vocabulary_has_no_logits():
    config = replace(TINY, vocab_size=4097, n_layer=1)
    net = GPT(config)
    assert net.wte.weight.shape[0] == 4224 and net(random_ids(config, 1, 4)).shape[-1] == 4097


def test_refusals():
    with pytest.raises(ValueError, match='multiple of n_head'):
        GPT(replace(TINY, n_head=5))
    with pytest.raises(ValueError, match='17 tokens are more than the block of 16'):
        GPT(TINY)(random_ids(TINY, 1, 17))
    with pytest.raises(ValueError, match='block_size: given 32, expected at most 16'):
        GPT(TINY).crop_block(32)


def test_a_shorter_block_gives_the_same_logits():
    net, ids = GPT(TINY).eval(), random_ids(TINY, 1, 8)
    before = net(ids)
    net.crop_block(8)
    assert net.config.block_size == 8 and torch.equal(net(ids), before)
