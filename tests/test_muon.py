"""Muon against torch's own, and what it adds: batches of matrices, steps that are skipped."""

import pytest
import torch

from gpt import muon
from gpt.muon import Muon, orthogonal

SHAPES = [(24, 8), (8, 24), (24, 8), (8, 8), (16, 32)]     # tall, wide, square; two alike


def matrices(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def give_gradients(params, seed):
    for p, g in zip(params, matrices(seed)):
        p.grad = g.detach().clone()


@pytest.mark.parametrize('at_once', [2 ** 25, 1])           # elements: all alike, one by one
def test_steps_are_those_of_torch(at_once, monkeypatch):
    """In bfloat16, as torch computes; the two round differently, hence the tolerance."""
    monkeypatch.setattr(muon, 'AT_ONCE', at_once)
    ours, theirs = matrices(), matrices()
    a = Muon(ours, lr=0.02, weight_decay=0.1, dtype=torch.bfloat16)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)
    for step in range(5):
        give_gradients(ours, step + 1)
        give_gradients(theirs, step + 1)
        a.step()
        b.step()
    for p, q, start in zip(ours, theirs, matrices()):
        assert (p - q).norm() < 0.02 * (q - start).norm()
        torch.testing.assert_close(a.state[p]['momentum_buffer'], b.state[q]['momentum_buffer'])


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('shape', [(3, 12, 40), (2, 40, 12), (1, 16, 16)])
def test_singular_values_come_near_1(shape, dtype):
    """Between 0.65 and 1.25, as the iteration's author says of these coefficients, and the
    singular vectors stay: U V^T of the input's decomposition is the direction."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = orthogonal(x, dtype)
    assert found.dtype == torch.float32 and found.shape == x.shape
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    around = (u.mT @ found @ v.mT).diagonal(dim1=1, dim2=2)
    big = s > 0.1 * s.max()
    assert 0.65 < around[big].min() and around[big].max() < 1.25


def test_a_skipped_step_changes_nothing():
    params = matrices()
    optimizer = Muon(params)
    give_gradients(params, 1)
    optimizer.step()
    before = [(p.detach().clone(), optimizer.state[p]['momentum_buffer'].clone()) for p in params]
    give_gradients(params, 2)
    params[1].grad[0, 0] = float('nan')
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    for p, (weight, momentum) in zip(params, before):
        assert torch.equal(p, weight) and torch.equal(optimizer.state[p]['momentum_buffer'],
                                                      momentum)
    give_gradients(params, 2)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert all(not torch.equal(p, weight) for p, (weight, _) in zip(params, before))


def test_gradients_are_divided_by_grad_scale():
    """Seen in the momentum, since the update itself has lost the length."""
    ours, theirs = matrices(), matrices()
    a, b = Muon(ours), Muon(theirs)
    give_gradients(ours, 1)
    give_gradients(theirs, 1)
    a.grad_scale = torch.tensor(4.0)
    for p in theirs:
        p.grad /= 4
    a.step()
    b.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(a.state[p]['momentum_buffer'], b.state[q]['momentum_buffer'])
        torch.testing.assert_close(p, q)
