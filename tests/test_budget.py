"""How a batch is divided, and what --minutes and an out-of-memory error make of the settings."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import TINY, curve

import train
from gpt import budget, checkpoints, steps
from gpt.budget import BatchConfig, BatchPlan, Cost
from gpt.optim import OptimizerConfig
from gpt.settings import section
from gpt.trainer import Trainer, TrainerConfig
from gpt.world import World
from model import GPT, GPTConfig


def plan_of(cfg, world_size=1):
    return BatchPlan(section(cfg, BatchConfig), world_size)


# The batch.

@pytest.mark.parametrize('changes, world, expected', [
    ({}, 1, (16, 4, 4)), ({}, 2, (16, 4, 2)), ({}, 4, (16, 4, 1)), ({}, 8, (16, 2, 1)),
    ({'total_batch_size': 0, 'gradient_accumulation_steps': 40, 'batch_size': 12},
     8, (480, 12, 5)),                                              # nanoGPT's
    ({'total_batch_size': 0}, 2, (4, 2, 1))])
def test_the_batch_is_the_same_on_any_number_of_processes(changes, world, expected):
    assert plan_of(train.Config(**{**TINY, **changes}), world).full == expected


def test_the_batch_grows():
    """A quarter of 16 sequences, half of them, all of them."""
    plan = plan_of(train.Config(**TINY, batch_warmup_iters=4))
    assert [plan.at(step).sequences for step in range(6)] == [4, 4, 8, 8, 16, 16]
    assert plan_of(train.Config(**TINY, batch_warmup_iters=4), 2).at(2) == (8, 4, 1)
    with pytest.raises(ValueError, match='1/2 of an update of 384 tokens .*=512'):
        plan_of(train.Config(**{**TINY, 'batch_warmup_iters': 4, 'batch_size': 8,
                                'total_batch_size': 24 * 16}))


def test_a_batch_that_cannot_be_divided_names_the_nearest_that_can():
    with pytest.raises(ValueError, match='1,000 tokens .* over 1 process .*: --total_batch_size='):
        plan_of(train.Config(**{**TINY, 'total_batch_size': 1000}))
    for tokens in (1, 100, 1000, 5000):
        try:
            plan_of(train.Config(**{**TINY, 'total_batch_size': tokens}), 3)
        except ValueError as error:
            nearest = int(re.search(r'--total_batch_size=(\d+)', str(error)).group(1))
            plan_of(train.Config(**{**TINY, 'total_batch_size': nearest}), 3)
            assert abs(nearest - tokens) <= 3 * 4 * 16


@pytest.mark.parametrize('warm', [0, 3, 10, 17, 30])
def test_what_is_left_is_counted_in_full_updates(warm):
    cfg = train.Config(batch_size=1, block_size=8, total_batch_size=64, max_iters=20,
                       batch_warmup_iters=warm)
    plan = plan_of(cfg)
    for step in range(21):
        sequences = sum(plan.at(i).sequences for i in range(step, 20))
        assert plan.full_updates(20, step) * 8 == sequences


def test_a_batch_is_described():
    assert plan_of(train.Config(**TINY), 2).describe() == (
        '256 tokens = 2 processes x 2 micro-batches x 4 x 16')


# The time.

def test_measuring_leaves_no_trace(capsys):
    """Weights, moments and the gradient scaler are as before, after as many updates as asked."""
    torch.manual_seed(0)
    config = TrainerConfig(compile=False)
    trainer = Trainer(GPT(GPTConfig(16, 61, 2, 2, 32)), World(), config, OptimizerConfig())
    before = [p.detach().clone() for p in trainer.model.parameters()]
    batches = []

    def passes(batch):
        batches.append(batch)
        ids = torch.randint(61, (4, 16))
        return trainer.backward(ids, ids, 1, last=True)

    in_passes, in_step = budget.measure(trainer, passes, plan_of(train.Config(**TINY)), 0.0)
    assert in_passes > 0 and in_step > 0
    assert batches == [(8, 4, 2)] * budget.MEASURED_UPDATES     # of 16 sequences, scaled up
    assert all(map(torch.equal, before, trainer.model.parameters()))
    assert not trainer.optimizer.state_dict()


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_measuring_changes_nothing(config, tmp_path, optimizer):
    """The run after the measurement is the run without it."""
    options = dict(optimizer=optimizer, max_iters=8, cooldown_iters=3, schedule='wsd')
    cfg = config(minutes=0.05, **options)
    train.main(cfg)
    saved = steps.newest(tmp_path / 'run')[0]
    fitted = checkpoints.load_training(saved)['settings']
    assert fitted['minutes'] == 0.05 and fitted['max_iters'] > 1
    train.main(config(out_dir=str(tmp_path / 'plain'), **{**options, **{
        key: fitted[key] for key in budget.FITTED}}))
    assert curve(tmp_path / 'plain') == curve(tmp_path / 'run')


def test_minutes_stretch_the_schedule_and_a_resume_keeps_it(config, tmp_path, capsys):
    options = dict(max_iters=40, warmup_iters=4, cooldown_iters=20, schedule='wsd')
    train.main(config(minutes=0.05, **options))
    text = (tmp_path / 'run/config.py').read_text()
    found = {key: int(re.search(rf'^{key} = (\d+)', text, re.M).group(1))
             for key in ('max_iters', 'warmup_iters', 'cooldown_iters')}
    assert found['max_iters'] > 1 and 'minutes = 0.0' in text      # it repeats the run
    assert found['cooldown_iters'] == pytest.approx(found['max_iters'] / 2, abs=1)
    assert found['warmup_iters'] == pytest.approx(found['max_iters'] / 10, abs=1)
    assert f"finished {found['max_iters']} updates" in capsys.readouterr().out
    train.main(config(minutes=0.05, **options))
    assert f"finished {found['max_iters']} updates" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r'given 0.1, but the run in .* began with 0.05'):
        train.main(config(minutes=0.1, **options))


def test_minutes_too_few_for_one_update(config):
    expected = r'given 0.0001; starting and measuring \(\d+ s\), two validations'
    with pytest.raises(ValueError, match=expected):
        train.main(config(minutes=0.0001))


def test_the_arithmetic_of_a_fit():
    """Updates of 1 s, a visit of 2 s after every 10 of them, two more visits, 6 s spent before:
    (120 - 6 - 4) / 1.2 = 91 updates."""
    cfg = train.Config(minutes=2.0, max_iters=1000, eval_interval=10, warmup_iters=100,
                       cooldown_iters=500)
    fitted = budget.fit(cfg, plan_of(cfg), Cost(0.9, 0.1, 2.0), 6.0)
    assert set(fitted) == set(budget.FITTED)
    assert [fitted[key] for key in ('max_iters', 'warmup_iters', 'cooldown_iters')] == [91, 9, 46]
    growing = replace(cfg, batch_warmup_iters=1000, batch_size=1, block_size=10,
                      total_batch_size=1000)            # passes of 3/8 on average, full steps
    plan, cost = plan_of(growing), Cost(0.8, 0.0625, 0.0)
    assert budget.fit(growing, plan, cost, 0.0)['max_iters'] == 331
    text = budget.describe_length(growing, plan, cost, 200)
    assert text == '800 updates, 0.3M tokens: 5.2 minutes'     # 325 passes of 0.8, 800 steps


# Memory and disk.

@pytest.mark.parametrize('changes, advice', [
    ({}, '--batch_size=2 --total_batch_size=256, or --checkpoint_activations=True'),
    ({'total_batch_size': 0, 'gradient_accumulation_steps': 4, 'eval_iters': 3},
     '--batch_size=2 --total_batch_size=256 --gradient_accumulation_steps=0 --eval_iters=6, or'),
    ({'batch_size': 5, 'total_batch_size': 20 * 16, 'batch_warmup_iters': 4}, '--batch_size=1 '),
    ({'batch_size': 5, 'total_batch_size': 20 * 16}, '--batch_size=2 '),
    ({'batch_size': 1, 'total_batch_size': 32}, ': --checkpoint_activations=True'),
    ({'batch_size': 1, 'total_batch_size': 32, 'checkpoint_activations': True}, '--parallel=fsdp')])
def test_out_of_memory_says_what_to_try(changes, advice):
    cfg = train.Config(**{**TINY, **changes})
    error = torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB\nand more')
    text = budget.less_memory(cfg, 1, error)
    assert advice in text and 'Tried to allocate 2 GiB' in text and '\n' not in text
