"""
AdamW and Muon as one optimizer, Muon against torch's own, and the schedule against nanoGPT's.
"""

from dataclasses import replace

import pytest
import torch
from conftest import ROOT, script
from torch.nn.utils import clip_grad_norm_, get_total_norm

from gpt import optim
from gpt.optim import Muon, Optimizer, OptimizerConfig, Schedule, orthogonalize
from model import GPT, GPTConfig


def after_one_step(optimizer, seed=0):
    """(parameters of a tiny GPT, their Optimizer) after one step, with gradients for another."""
    torch.manual_seed(seed)
    net = GPT(GPTConfig(16, 61, 2, 2, 32))
    ids = torch.randint(61, (4, 16))
    config = OptimizerConfig(optimizer=optimizer, learning_rate=0.01, grad_clip=0.5)
    ours = Optimizer(net, config)
    net(ids, ids).backward()
    for part in ours.parts:
        part.step()
    net.zero_grad()
    (100 * net(ids, ids)).backward()
    return list(net.parameters()), ours


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_an_update_clips_as_torch_does(optimizer):
    params, ours = after_one_step(optimizer)
    norm = get_total_norm([p.grad for p in params])
    assert norm > 1
    ours.step(torch.tensor(1.0), norm)
    references, theirs = after_one_step(optimizer)
    clip_grad_norm_(references, 0.5)
    for part in theirs.parts:
        part.step()
    for p, q in zip(params, references):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert p.grad is None


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
@pytest.mark.parametrize('loss, bad', [(float('inf'), None), (1.0, float('nan'))])
def test_an_update_that_is_not_finite_changes_neither_weights_nor_moments(optimizer, loss, bad):
    params, ours = after_one_step(optimizer)
    if bad:
        params[3].grad.view(-1)[0] = bad
    state = {name: {key: value.clone() for key, value in values.items()}
             for name, values in ours.state_dict().items()}
    before = [p.detach().clone() for p in params]
    ours.step(torch.tensor(loss), get_total_norm([p.grad for p in params]))
    assert all(map(torch.equal, params, before))
    after = ours.state_dict()
    assert len(after) == len(params)
    for name, values in state.items():
        assert all(torch.equal(values[key], after[name][key]) for key in values)


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_a_state_dict_restores_the_moments_and_not_the_learning_rates(optimizer):
    params, ours = after_one_step(optimizer)
    others, theirs = after_one_step(optimizer, seed=1)
    saved = ours.state_dict()
    copy = {name: {key: value.clone() for key, value in values.items()}
            for name, values in saved.items()}
    assert {key for values in saved.values() for key in values} <= {
        'step', 'exp_avg', 'exp_avg_sq', 'momentum_buffer'}
    theirs.set_learning_rate(0.004)
    theirs.load_state_dict(saved)
    assert theirs.parts[0].param_groups[0]['lr'] == 0.004
    for name, values in theirs.state_dict().items():
        assert all(torch.equal(values[key], saved[name][key]) for key in values)
    theirs.step(torch.tensor(1.0), torch.tensor(1.0))       # has its own copy of the tensors
    for name, values in copy.items():
        assert all(torch.equal(values[key], saved[name][key]) for key in values)


def test_the_state_of_another_optimizer_is_refused():
    saved = {name: after_one_step(name)[1] for name in ('adamw', 'muon')}
    for a, b in (('adamw', 'muon'), ('muon', 'adamw')):
        with pytest.raises(ValueError, match='no matching optimizer state for h.0.attn.c_attn'):
            saved[a].load_state_dict(saved[b].state_dict())


def test_which_parameters_decay_and_which_muon_updates():
    net = GPT(GPTConfig(16, 61, 2, 2, 32))
    names = {p: name for name, p in net.named_parameters()}
    ours = Optimizer(net, OptimizerConfig(optimizer='muon', weight_decay=0.3))
    adamw, muon = ours.parts
    decayed, plain = adamw.param_groups
    assert {names[p] for p in decayed['params']} == {'wte.weight', 'wpe.weight'}
    assert decayed['weight_decay'] == 0.3 and plain['weight_decay'] == 0.0
    assert all(p.dim() == 1 for p in plain['params'])
    assert {names[p] for p in muon.param_groups[0]['params']} == {
        f'h.{i}.{part}.weight' for i in range(2)
        for part in ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')}
    assert sum(len(group['params']) for group in ours.groups()) == len(names)
    for dtype, products in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):
        assert Optimizer(net, OptimizerConfig(optimizer='muon'), dtype).parts[1].dtype == products


def test_the_learning_rate_of_muon_changes_in_proportion():
    net = GPT(GPTConfig(16, 61, 2, 2, 32))
    ours = Optimizer(net, OptimizerConfig(optimizer='muon', learning_rate=0.01,
                                          muon_learning_rate=0.2))
    ours.set_learning_rate(0.005)
    ours.set_learning_rate(0.0025)
    assert [group['lr'] for group in ours.groups()] == pytest.approx([0.0025, 0.0025, 0.05])


# Muon.

SHAPES = [(24, 8), (8, 24), (24, 8), (8, 8), (16, 32)]     # tall, wide, square; two alike


def matrices(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def give_gradients(params, seed):
    for p, g in zip(params, matrices(seed)):
        p.grad = g.detach().clone()


@pytest.mark.parametrize('max_elements', [2 ** 25, 1])      # of one shape together; one by one
def test_steps_are_those_of_torch(max_elements, monkeypatch):
    """In bfloat16, as torch computes; the two round differently, hence the tolerance."""
    monkeypatch.setattr(optim, 'MAX_ELEMENTS', max_elements)
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
    """Between 0.65 and 1.25, as the author of the iteration states for these coefficients; the
    singular vectors stay those of the input."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = orthogonalize(x.to(dtype)).float()
    assert found.shape == x.shape
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
    """Seen in the momentum: the update itself does not depend on the length of a gradient."""
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


SHARES = '''
import os
import sys
sys.path[:0] = [{root!r}, {root!r} + '/tests']
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor
from gpt import optim
from gpt.world import World
from test_optim import give_gradients, matrices

world, optim.MIN_ELEMENTS_TO_SHARE = World.join('cpu'), 0
mesh = dist.init_device_mesh('cpu', (world.size,))

def steps(dtype, sharded=False):
    params = matrices()
    if sharded:
        params = [torch.nn.Parameter(distribute_tensor(p, mesh, [Shard(0)])) for p in params]
    muon = optim.Muon(params, dtype=dtype)
    for step in range(3):
        give_gradients(params, step)
        if sharded:
            for p in params:
                p.grad = distribute_tensor(p.grad, mesh, [Shard(0)])
        muon.step()
    return [p.full_tensor() if sharded else p for p in params]

for dtype in (torch.float32, torch.bfloat16):
    real, optim.processes = optim.processes, lambda: 1
    alone = steps(dtype)
    optim.processes = real
    seen, real = [], optim.orthogonalize
    optim.orthogonalize = lambda matrices: seen.append(len(matrices)) or real(matrices)
    for sharded in (False, True):
        found = steps(dtype, sharded)
        same = all(map(torch.equal, alone, found))
        sys.stdout.write(str(sum(seen) if same else -1) + '\\n')      # a line in one piece
        seen.clear()
    optim.orthogonalize = real
world.leave()
sys.stdout.flush()
os._exit(0)                 # as scripts do: gloo may abort while the interpreter shuts down
'''


@pytest.mark.slow
def test_processes_share_the_matrices_and_change_no_bit(tmp_path):
    """Of replicated and of sharded parameters, in three processes: of five matrices in three steps
    each is computed by one of them."""
    (tmp_path / 'run.py').write_text(SHARES.format(root=str(ROOT)))
    found = script(tmp_path / 'run.py', torchrun=3).stdout.split()
    assert sorted(map(int, found)) == sorted(4 * [0, 3, 12])


# The schedule.

PLAIN = dict(schedule='cosine', decay_lr=True, lr_decay_iters=0, cooldown_iters=300)


def test_the_cosine_schedule_is_nanogpt_s():
    """Values of nanoGPT's get_lr (train.py) for the same settings."""
    schedule = Schedule(**{**PLAIN, 'lr_decay_iters': 600_000}, learning_rate=6e-4, min_lr=6e-5,
                        warmup_iters=2000, max_iters=600_000)
    expected = {0: 2.998500749625187e-07, 1000: 3.0014992503748125e-04, 2000: 6e-4,
                301_000: 3.3e-4, 600_001: 6e-5}
    for step, lr in expected.items():
        assert schedule.learning_rate_at(step) == pytest.approx(lr, rel=1e-9)
    assert replace(schedule, decay_lr=False).learning_rate_at(5) == 6e-4


def test_a_cooldown_longer_than_the_run_begins_after_the_warmup():
    schedule = Schedule(**{**PLAIN, 'schedule': 'wsd'}, learning_rate=1.0, min_lr=0.0,
                        warmup_iters=2, max_iters=20)
    rates = [schedule.learning_rate_at(step) for step in range(21)]
    assert rates[2] == 1.0 and rates[11] == pytest.approx(0.5) and rates[20] == 0.0


def test_warmup_stable_decay():
    schedule = Schedule(**{**PLAIN, 'schedule': 'wsd', 'cooldown_iters': 20}, learning_rate=1.0,
                        min_lr=0.1, warmup_iters=9, max_iters=100)
    rates = [schedule.learning_rate_at(step) for step in range(101)]
    assert (rates[0] == 0.1 and rates[9:81] == [1.0] * 72
            and rates[90] == pytest.approx(0.55) and rates[100] == 0.1)
