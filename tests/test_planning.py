"""What --plan and --minutes say, and that they leave everything as it was."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import TINY, curve

from gpt import checkpoints
from gpt import distributed
from gpt import budget as planning
import train


def test_a_plan_says_what_the_run_takes_and_writes_nothing(config, tmp_path, capsys):
    assert train.main(config(plan=True, max_iters=5000)) is None
    words = capsys.readouterr().out
    for part in ('device', 'dtype', 'compiler', 'data', 'vocabulary', 'batch', 'disk'):
        assert re.search(rf'^{part} +(?!FAILS)\S', words, re.M), words
    assert re.search(r'a whole update takes [\d.e-]+ s: [\d,]+ tokens/s, mfu \d+%; memory', words)
    assert re.search(r'5,000 updates, 1.3M tokens: [\d.]+ minutes', words)
    assert not (tmp_path / 'run').exists()


def test_a_plan_names_all_that_is_wrong(config, tmp_path, capsys):
    assert train.main(config(plan=True, dataset='nowhere', device='cuda:7', total_batch_size=100,
                             dtype='float8')) == 2
    words = capsys.readouterr().out
    for part, mend in (('device', '--device=cpu'), ('dtype', "'bfloat16'"), ('batch', '=128'),
                       ('data', 'python data/prepare.py --name=nowhere')):
        assert re.search(rf'^{part} +FAILS: .*\n?.*{mend}', words, re.M), words
    assert 'disk        not known' in words and not (tmp_path / 'run').exists()


def test_a_plan_of_a_run_that_is_there_goes_on_from_it_and_leaves_it(config, tmp_path, capsys):
    train.main(config())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'run').rglob('*')}
    train.main(config(plan=True, max_iters=24))
    assert 'going on from' in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / 'run').rglob('*')}


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_measuring_changes_nothing(config, tmp_path, optimizer):
    """The run after the measurement is the run without it."""
    options = dict(optimizer=optimizer, max_iters=8, cooldown_iters=3, schedule='wsd')
    cfg = config(minutes=0.05, **options)
    train.main(cfg)
    saved = checkpoints.newest_step(tmp_path / 'run')[0]
    fitted = checkpoints.load_training(saved)['settings']
    assert fitted['minutes'] == 0.05 and fitted['max_iters'] > 1
    train.main(config(out_dir=str(tmp_path / 'plain'), **{**options, **{
        key: fitted[key] for key in planning.FITTED}}))
    assert curve(tmp_path / 'plain') == curve(tmp_path / 'run')


def test_minutes_stretch_the_schedule_and_a_resume_keeps_it(config, tmp_path, capsys):
    options = dict(max_iters=40, warmup_iters=4, cooldown_iters=20, schedule='wsd')
    train.main(config(minutes=0.05, **options))
    text = (tmp_path / 'run/config.py').read_text()
    found = {key: int(re.search(rf'^{key} = (\d+)', text, re.M).group(1))
             for key in ('max_iters', 'warmup_iters', 'cooldown_iters')}
    assert found['max_iters'] > 1 and 'minutes = 0.0' in text      # what repeats the run
    assert found['cooldown_iters'] == pytest.approx(found['max_iters'] / 2, abs=1)
    assert found['warmup_iters'] == pytest.approx(found['max_iters'] / 10, abs=1)
    assert f"finished {found['max_iters']} updates" in capsys.readouterr().out
    train.main(config(minutes=0.05, **options))
    assert f"finished {found['max_iters']} updates" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r'given 0.1, but the run in .* begun with 0.05'):
        train.main(config(minutes=0.1, **options))


def test_minutes_too_few_for_one_update(config):
    words = r'given 0.0001; starting and measuring \(\d+ s\), two validations'
    with pytest.raises(ValueError, match=words):
        train.main(config(minutes=0.0001))


def test_the_arithmetic_of_a_fit():
    """100 s of updates of 1 s, a visit of 2 s every 10 of them and 2 of them besides, 6 s spent:
    (120 - 6 - 4) / 1.2 = 91 updates."""
    cfg = train.Config(minutes=2.0, max_iters=1000, eval_interval=10, warmup_iters=100,
                       cooldown_iters=500)
    fitted = planning.fit(cfg, (0.9, 0.1, 2.0), 6.0)
    assert (fitted.max_iters, fitted.warmup_iters, fitted.cooldown_iters) == (91, 9, 46)
    growing = replace(cfg, batch_warmup_iters=1000)         # passes of 3/8 on average, whole steps
    assert planning.fit(growing, (0.8, 0.0625, 0.0), 0.0).max_iters == 331
    words = planning.describe_length(growing, 200, (0.8, 0.0625, 0.0), 1000)
    assert words == '800 updates, 0.3M tokens: 5.2 minutes'     # 325 passes of 0.8, 800 steps


@pytest.mark.parametrize('warm', [0, 3, 10, 17, 30])
def test_what_is_left_is_counted_in_whole_updates(warm):
    cfg = train.Config(batch_size=1, block_size=8, total_batch_size=64, max_iters=20,
                       batch_warmup_iters=warm)
    for step in range(21):
        sequences = sum(planning.batch_at(i, cfg, 1)[0] for i in range(step, 20))
        assert planning.whole_updates(cfg, step) * 8 == sequences


@pytest.mark.parametrize('changes, advice', [
    ({}, '--batch_size=2 --total_batch_size=256, or --checkpoint_activations=True'),
    ({'total_batch_size': 0, 'gradient_accumulation_steps': 4, 'eval_iters': 3},
     '--batch_size=2 --total_batch_size=256 --gradient_accumulation_steps=0 --eval_iters=6, or'),
    ({'batch_size': 12, 'total_batch_size': 36 * 16, 'batch_warmup_iters': 4}, '--batch_size=3 '),
    ({'batch_size': 1, 'total_batch_size': 32}, ': --checkpoint_activations=True'),
    ({'batch_size': 1, 'total_batch_size': 32, 'checkpoint_activations': True}, '--parallel=fsdp')])
def test_out_of_memory_says_what_to_try(changes, advice):
    cfg = train.Config(**{**TINY, **changes})
    error = torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB\nand more')
    oom = distributed.is_out_of_memory
    assert oom(error) and not oom(RuntimeError('no'))
    words = planning.less_memory(cfg, error)
    assert advice in words and 'Tried to allocate 2 GiB' in words and '\n' not in words
