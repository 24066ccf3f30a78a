"""How a batch is divided, and what --minutes and an out-of-memory error make of the settings."""

import json
import re
import shutil
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, curve

import train
from gpt import budget, checkpoints, steps
from gpt.budget import BatchConfig, BatchPlan, Cost, Forecast
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
    assert plan_of(train.Config(**TINY, batch_warmup_iters=4), 2).at(2) == (8, 2, 2)
    with pytest.raises(ValueError, match='1/4 of an update of 352 tokens .*=256'):
        plan_of(train.Config(**{**TINY, 'batch_warmup_iters': 4, 'total_batch_size': 22 * 16}))


@pytest.mark.parametrize('one_shape, expected', [(True, {4}), (False, {4, 8, 16})])
def test_a_batch_grows_by_micro_batches_of_one_shape(one_shape, expected):
    """Another shape would be compiled again. Runs that began with several keep them."""
    cfg = train.Config(**{**TINY, 'batch_warmup_iters': 4, 'batch_size': 16})
    plan = BatchPlan(section(cfg, BatchConfig), 1, one_shape)
    assert {plan.at(step).micro_batch for step in range(6)} == expected
    assert [plan.at(step).sequences for step in range(6)] == [4, 4, 8, 8, 16, 16]


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


def test_the_reduction_of_gradients_is_counted_once(monkeypatch):
    """Of two processes: 5 s an update, and 8 s for each of its 4 micro-batches."""
    now, world = [0.0], World()
    for name in ('reduce', 'broadcast'):
        monkeypatch.setattr(World, name, lambda self, value: value)
    monkeypatch.setattr(budget, 'time', SimpleNamespace(perf_counter=lambda: now[0]))
    trainer = Trainer(GPT(GPTConfig(16, 61, 2, 2, 32)), world, TrainerConfig(compile=False),
                      OptimizerConfig())
    trainer.world = replace(world, size=2)

    def passes(batch):
        now[0] += 5 + 8 * batch.micro_steps
        ids = torch.zeros(4, 16, dtype=torch.long)
        return trainer.backward(ids, ids, 1, last=True)
    assert budget.measure(trainer, passes, plan_of(train.Config(**TINY)), 0.0) == (5 + 4 * 8, 0)


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_measuring_changes_nothing(config, tmp_path, monkeypatch, optimizer):
    """The run after the measurement is the run without it."""
    options = dict(optimizer=optimizer, max_iters=8, cooldown_iters=3, schedule='wsd')
    cfg = config(minutes=0.05, **options)
    monkeypatch.setattr(Forecast, 'refit', lambda *_: {})
    train.main(cfg)
    saved = steps.newest(tmp_path / 'run')[0]
    fitted = checkpoints.load_training(saved)['settings']
    assert fitted['minutes'] == 0.05 and fitted['max_iters'] > 1
    train.main(config(out_dir=str(tmp_path / 'plain'), **{**options, **{
        key: fitted[key] for key in budget.FITTED}}))
    assert curve(tmp_path / 'plain') == curve(tmp_path / 'run')


def test_minutes_stretch_the_schedule_and_a_resume_keeps_it(config, tmp_path, monkeypatch,
                                                            capsys):
    options = dict(max_iters=40, warmup_iters=4, cooldown_iters=20, schedule='wsd')
    monkeypatch.setattr(Forecast, 'refit', lambda *_: {})
    train.main(config(minutes=0.05, **options))
    text = (tmp_path / 'run/config.py').read_text()
    found = {key: int(re.search(rf'^{key} = (\d+)', text, re.M).group(1))
             for key in ('max_iters', 'warmup_iters', 'cooldown_iters')}
    assert found['max_iters'] > 1 and 'minutes = 0.0' in text      # it repeats the run
    assert found['cooldown_iters'] == pytest.approx(found['max_iters'] / 2, abs=1)
    assert found['warmup_iters'] == pytest.approx(found['max_iters'] / 10, abs=1)
    assert f"finished {found['max_iters']} updates" in capsys.readouterr().out
    train.main(config(minutes=0.05, **options))
    assert f"finished {found['max_iters']} updates before" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r'given 0.1, but the run in .* began with 0.05'):
        train.main(config(minutes=0.1, **options))


def test_minutes_too_few_for_one_update(config):
    expected = r'given 0.0001, expected more than .* measuring \(\d+ s\), two validations'
    with pytest.raises(ValueError, match=expected):
        train.main(config(minutes=0.0001))


@pytest.fixture
def forecast(monkeypatch):
    """A function to the Forecast of a run of 1,000 updates in 2 minutes, 6 s of them gone, whose
    updates take 1 s and validations 2."""
    monkeypatch.setattr(budget.time, 'monotonic', lambda: 6.0)

    def make(cost=Cost(0.9, 0.1), visit=2.0, **changes):
        cfg = train.Config(**{**dict(minutes=2.0, max_iters=1000, eval_interval=100,
                                     warmup_iters=100, cooldown_iters=500), **changes})
        made = Forecast(cfg, plan_of(cfg))
        made.cost, made.took, made.ends = cost, {'eval_interval': visit}, 120.0
        return made
    return make


def test_the_arithmetic_of_a_fit(forecast):
    """114 s are left, a tenth of them for 5 validations besides that of step 0: 102 updates."""
    fitted = forecast().fit()
    assert {**fitted, 'lr_decay_iters': 0, 'batch_warmup_iters': 0}.keys() == {*budget.FITTED}
    assert [fitted[key] for key in ('max_iters', 'warmup_iters', 'cooldown_iters',
                                    'eval_interval')] == [102, 10, 51, 21]
    few = forecast(visit=0.001).fit()                               # 10 validations, as given
    assert (few['max_iters'], few['eval_interval']) == (113, 12)
    growing = forecast(Cost(0.8, 0.0625), 1e-9, batch_warmup_iters=1000, batch_size=1,
                       block_size=10, total_batch_size=1000)        # passes of 3/8 on average
    assert growing.fit()['max_iters'] == int(114 / 0.3625)
    growing.cfg = replace(growing.cfg, eval_interval=500)
    assert growing.describe_length(200) == (                        # 325 passes of 0.8, 800 steps
        '800 updates, 0.3M tokens: 5.2 minutes, a validation every 500')


def test_what_is_left_counts_the_validations_to_come(forecast):
    """At the pace of the last updates: half as fast as measured."""
    made = forecast(max_iters=250, hellaswag_interval=200, sample_interval=100)
    made.took |= {'hellaswag_interval': 60.0, 'sample_interval': 5.0}
    made.save = 7.0
    for _ in range(200):
        made.updated(made.plan.full, 2.0)
    assert made.updates_left(100) == pytest.approx(300)
    assert made.pauses_left(100) == 3 * 2 + 2 * 60 + 2 * 5 + 7      # at 100, 200, 250
    assert made.pauses_left(250) == 2 + 60 + 7
    assert made.describe(250) == 'left 1:09'


def test_a_batch_that_grows_is_in_the_log(forecast):
    made = forecast(batch_warmup_iters=8, batch_size=1, block_size=10, total_batch_size=1000)
    assert [made.describe(step).split('  ')[0] for step in (0, 4, 5, 9)] == [
        'batch 250', 'batch 250', 'batch 500', 'batch 1,000']


def test_a_run_that_would_not_end_in_time_is_fitted_again(forecast):
    """What lies ahead is stretched, what lies behind stays."""
    made = forecast(visit=0.0, schedule='wsd', max_iters=100, warmup_iters=10, cooldown_iters=60,
                    batch_warmup_iters=80)
    assert [step for step in range(25) if made.is_due(step)] == [10, 20]
    made.seconds, made.expected = 2.0, 1.0
    left = made.updates_left(20)                        # at half the speed that was measured
    made.ends = 6.0 + left / 2
    fit = made.refit(20)
    assert fit == {'max_iters': 60, 'batch_warmup_iters': 50, 'cooldown_iters': 30}
    assert made.use(fit).warmup_iters == 10 and made.updates_left(20) < 0.6 * left
    made.ends = 6.0 + made.updates_left(20) + 3.0
    assert made.refit(20) == {}, '3 s of 2 minutes are near enough'
    made.ends += 1000.0                                 # where it has grown, it stays so
    assert made.refit(40)['batch_warmup_iters'] == 80
    made.ends = 0.0
    assert made.refit(40) == {'max_iters': 41, 'batch_warmup_iters': 41, 'cooldown_iters': 2}


def test_a_run_whose_speed_changes_ends_in_time_and_resumes(config, tmp_path, monkeypatch, capsys):
    """Each update takes 20 ms more than those that were measured."""
    forward_backward = train.forward_backward

    def slower(seed, data, trainer, p, batch):
        if p.step:
            time.sleep(0.02)
        return forward_backward(seed, data, trainer, p, batch)

    monkeypatch.setattr(train, 'forward_backward', slower)
    start = time.monotonic()
    cfg = config(minutes=0.2, max_iters=1000, log_interval=1000)
    train.main(cfg)
    assert 0.5 * 12 < time.monotonic() - start < 2 * 12   # about five times without a new fit
    records = [json.loads(line) for line in (tmp_path / 'run/log.jsonl').open()]
    last = [record['max_iters'] for record in records if record.get('event') == 'fit'][-1]
    newest, _ = steps.newest(tmp_path / 'run')
    saved = checkpoints.load_training(newest)['settings']
    assert saved['max_iters'] == last == records[-1]['step'] and saved['eval_interval'] > 4
    assert f'max_iters = {last}\n' in (tmp_path / 'run/config.py').read_text()
    shutil.rmtree(newest)
    train.main(cfg)
    assert f'finished {last} updates' in capsys.readouterr().out


def test_a_small_fit_is_logged_and_not_printed(config, tmp_path, monkeypatch, capsys):
    fits = {10: {'max_iters': 105}, 20: {'max_iters': 60}}
    monkeypatch.setattr(Forecast, 'is_due', lambda self, step: step in fits)
    monkeypatch.setattr(Forecast, 'refit', lambda self, step: fits[step])
    train.main(config(max_iters=100, eval_interval=100, optimizer='muon', muon_learning_rate=0.03,
                      learning_rate=0.006))
    records = [json.loads(line) for line in (tmp_path / 'run/log.jsonl').open()]
    assert [record['max_iters'] for record in records if record.get('event') == 'fit'] == [105, 60]
    text = capsys.readouterr().out
    assert '100 -> 105' not in text and 'step 20: max_iters 105 -> 60, to end in time' in text
    assert "lr is AdamW's; Muon's is 5 times as high\n" in text


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
