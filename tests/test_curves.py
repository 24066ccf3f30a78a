"""
How logs with torn, repeated and rolled-back records are read, and which run is better.
"""

import json
import random
from pathlib import Path

import pytest
from conftest import command

import plot
from gpt import curves

LOG = [{'step': 0, 'tokens': 0, 'val_loss': 5.0},
       {'step': 10, 'tokens': 100, 'loss': 4.0, 'lr': 1e-3},
       {'step': 20, 'tokens': 200, 'loss': 3.0},
       {'step': 20, 'tokens': 200, 'val_loss': 3.5, 'val_bits_per_byte': 1.5},
       {'step': 10, 'tokens': 100, 'loss': 3.9},
       {'step': 30, 'event': 'skipped', 'words': 'loss nan'}]


@pytest.fixture
def run(tmp_path):
    (tmp_path / 'a').mkdir()
    lines = [json.dumps(record) for record in LOG]
    torn = '\n'.join([*lines[:3], '{"step": 9, "to', *lines[3:]]) + '\n{"st'
    (tmp_path / 'a/log.jsonl').write_text(torn)
    (tmp_path / 'a/config.py').write_text("dataset = 'shakespeare_char'\n")
    return tmp_path / 'a'


def test_the_last_record_of_a_step_counts(run):
    records = curves.read_log(run / 'log.jsonl')
    assert [record['step'] for record in records] == [0, 10, 20]
    assert curves.points(records, 'loss') == ([100, 200], [3.9, 3.0])
    assert (curves.points(records, 'val_loss') == ([0, 200], [5.0, 3.5])
            and curves.points(records, 'mfu') == ([], []))


@pytest.mark.parametrize('line, words', [
    ('{"step": "3", "tokens": 1}', "log.jsonl:2: step: given '3', expected a whole number"),
    ('{"step": 3}', 'step 3: tokens: given nothing'), ('[1]', 'log.jsonl:2: given a list of 1'),
    ('{"step": -3, "tokens": 1}', 'step: given -3'), ('{"tokens": 1}', 'step: given nothing'),
    ('{"step": 3, "tokens": 1, "loss": NaN}', 'log.jsonl:2: .*given NaN'),
    ('{"step": 3, "tokens": 1, "loss": 1e999}', 'loss: given inf, expected a number below'),
    ('{"step": 3, "tokens": 1e4}', 'tokens: given 10000.0'),
    ('{"step": 3, "tokens": 1, "step_ms": null}', 'step_ms: given null'),
    ('{"step": 3, "event": "rollback", "to_step": "x"}', "to_step: given 'x'"),
    ('[' * 200_000 + ']' * 200_000, 'nested too deeply')])
def test_a_record_of_another_shape_is_named(tmp_path, line, words):
    (tmp_path / 'log.jsonl').write_text(f'{json.dumps(LOG[0])}\n{line}\n')
    with pytest.raises(ValueError, match=words):
        curves.read_log(tmp_path / 'log.jsonl')


ROLLED_BACK = [
    *({'step': i, 'tokens': 100 * i, 'loss': 5.0, 'step_ms': 1000} for i in (10, 20, 30, 40)),
    {'step': 20, 'tokens': 2000, 'val_loss': 4.0}, {'step': 40, 'tokens': 4000, 'val_loss': 9.0},
    {'step': 45, 'event': 'rollback', 'words': 'x', 'to_step': 20, 'left_out': 2500},
    {'step': 20, 'tokens': 4500, 'hellaswag': 0.3},
    {'step': 30, 'tokens': 5500, 'loss': 3.0, 'step_ms': 500},
    {'step': 35, 'tokens': 6000, 'val_loss': 2.0}]


def test_what_a_rollback_undid_is_no_part_of_a_curve(tmp_path):
    """Steps 30 and 40 are gone, and tokens run forwards; step 20 keeps its own number of them."""
    (tmp_path / 'log.jsonl').write_text('\n'.join(map(json.dumps, ROLLED_BACK)))
    curve = curves.Curve(tmp_path)
    assert [(record['step'], record['tokens']) for record in curve.records] == [
        (10, 1000), (20, 2000), (30, 5500), (35, 6000)]
    assert curves.points(curve.records, 'loss') == ([1000, 2000, 5500], [5.0, 5.0, 3.0])
    assert curves.points(curve.records, 'hellaswag') == ([2000], [0.3])
    assert curve.tokens_to(3.0, 'val_loss') == 4000                 # between 2,000 and 6,000
    assert curves.seconds_to(curve.records, 2000) == 20
    assert curves.seconds_to(curve.records, 5500) == 20 + 10 * 0.5
    assert 'best val_loss 2.0000 at update 35' in curves.summary(curve.records)


@pytest.mark.parametrize('seed', range(20))
def test_tokens_and_seconds_never_run_backwards(tmp_path, seed):
    """Whatever rollbacks and resumes a run went through."""
    draw, step, tokens, saved = random.Random(seed), 0, 0, (0, 0)
    with open(tmp_path / 'log.jsonl', 'w') as file:
        for _ in range(200):
            step, tokens = step + 1, tokens + 100
            file.write(json.dumps({'step': step, 'tokens': tokens, 'loss': 1.0,
                                   'step_ms': 1000}) + '\n')
            event = draw.random()
            if event < 0.1:
                saved = step, tokens
            elif event < 0.15:                          # the position in the data stays
                file.write(json.dumps({'step': step, 'event': 'rollback',
                                       'to_step': saved[0]}) + '\n')
                step = saved[0]
            elif event < 0.2:                           # killed: resumes from the checkpoint
                step, tokens = saved
    records = curves.read_log(tmp_path / 'log.jsonl')
    for key in ('step', 'tokens'):
        values = [record[key] for record in records]
        assert values == sorted(set(values))
    seconds = [curves.seconds_to(records, record['tokens']) for record in records]
    assert seconds == sorted(seconds) and seconds[-1] == records[-1]['step']


def test_the_settings_of_a_run_are_its_config_file(tmp_path):
    assert curves.settings_of(tmp_path) == {}
    (tmp_path / 'config.py').write_text("# a comment\nseed = 1  # another\nmax_iters = 2 * 500\n")
    assert curves.settings_of(tmp_path) == {'seed': 1, 'max_iters': 1000}


def test_many_points_are_thinned_to_what_can_be_seen():
    for n in (0, 1, 399, 400, 401, 10_000):
        tokens, values = curves.thinned((list(range(n)), list(range(n))))
        assert len(tokens) == len(values) <= 400 and tokens[-1:] == [n - 1][:n]
    assert len(tokens) > 200


def test_limits_of_few_values():
    assert curves.limits([([0], [7.0])]) == pytest.approx((6.58, 7.42))
    assert curves.limits([([], [])]) is None and curves.limits([([1, 2], [3, 5])], low=0)[0] == 0


def test_smoothing_is_the_mean_around_each_point():
    curve = ([1, 2, 3, 4], [4.0, 2.0, 3.0, 1.0])
    assert curves.smoothed(curve, 3) == ([1, 2, 3, 4], [3.0, 3.0, 2.0, 2.0])
    assert curves.smoothed(curve, 0) == curves.smoothed(curve, -9) == curve


# Comparisons.

@pytest.fixture
def made(tmp_path):
    """A function that makes a run: validations at 0, 1,000 and 2,000 tokens, an update a second of
    `ms`, 100 tokens each. Its settings are Config's of train.py."""
    from gpt.config_file import as_config_file
    from train import Config

    def make(name, *losses, ms=1000, tokens=100, **settings):
        folder = tmp_path / name
        folder.mkdir()
        (folder / 'config.py').write_text(as_config_file(Config(**settings), 'a run'))
        records = [{'step': 10 * i, 'tokens': 10 * i * tokens, 'val_loss': loss,
                    'xz_bits_per_byte': 2.5, 'val_bits_per_byte': loss / 2}
                   for i, loss in enumerate(losses)]
        records += [{'step': step, 'tokens': step * tokens, 'loss': 1.0, 'step_ms': ms,
                     'tokens_per_second': 1000 * tokens / ms}
                    for step in range(5, 10 * len(losses) - 9, 5)]
        (folder / 'log.jsonl').write_text('\n'.join(map(json.dumps, records)))
        return str(folder)

    return make


def test_a_target_lies_between_validations(made):
    run = Path(made('a', 5.0, 3.0, 2.0))
    with open(run / 'log.jsonl', 'a') as file:                  # a validation that was not finite
        file.write('\n{"step": 30, "tokens": 3000, "val_loss": null}')
    curve = curves.Curve(run)
    assert curve.tokens_to(2.5, 'val_loss') == 1500 and curve.tokens_to(6, 'val_loss') == 0
    assert curve.tokens_to(1.9, 'val_loss') is None
    assert curves.seconds_to(curve.records, 1500) == 15
    assert curves.seconds_to(curve.records, 50) == 0.5


def test_seeds_tell_noise_from_progress(made, capsys):
    """Two times three seeds, 0.1 apart with a spread of 0.01; then with one of 0.1. The bound is
    Student's: 2.78 * s * sqrt(2 / 3)."""
    for name, spread, words in (('near', 0.01, 'better: val_loss 0.1000 lower'),
                                ('far', 0.1, 'within noise: val_loss 0.1000 lower')):
        runs = [made(f'{name}{rate}{seed}', 5.0, 3.0, 2.0 - by + (seed - 1) * spread, seed=seed,
                     learning_rate=rate) for rate, by in ((1e-3, 0), (2e-3, 0.1))
                for seed in range(3)]
        command(plot, *runs, '--compare')
        said = capsys.readouterr().out
        assert words in said and 'learning_rate 0.001 -> 0.002' in said
        assert f'differences up to {2.78 * spread * (2 / 3) ** 0.5:.4f}' in said
        assert f'2.0000 ± {spread:.4f}' in said and 'from 6 runs' in said
    a, b = runs[:3], runs[3:]
    command(plot, *b, *a, '--compare')                          # the other way round
    assert 'within noise: val_loss 0.1000 higher' in capsys.readouterr().out


def test_noise_of_one_setting_serves_for_the_other(made, capsys):
    runs = [made(f'a{seed}', 5.0, 2.0 + seed / 100, seed=seed) for seed in (1, 2, 3)]
    command(plot, *runs, made('b', 5.0, 2.5, n_layer=2), '--compare')
    assert 'worse: val_loss 0.4800 higher' in capsys.readouterr().out


def test_one_seed_each_has_no_verdict_but_speeds(made, capsys):
    command(plot, made('a', 5.0, 3.0, 2.0), made('b', 5.0, 2.0, 1.5, ms=250), '--compare')
    said = capsys.readouterr().out
    assert 'val_loss 0.5000 lower; how much of it is noise is not known' in said
    assert 'tokens to 2.0000: 0.50 times' in said and 'seconds to it: 0.12 times' in said
    assert 'tokens/s: 4.00 times' in said and 'the settings are the same' in said
    command(plot, made('c', 5.0, 3.0), made('d', 5.0, 2.0, 1.5), '--compare', '--target=2.5')
    said = capsys.readouterr().out
    assert ' - ' in said and 'note: different lengths, 1,000, 2,000 tokens' in said


def test_other_tokens_of_the_same_text_are_compared_by_bits(made, capsys):
    command(plot, made('a', 5.0, 3.0), made('b', 5.0, 2.0, dataset='other'), '--compare')
    assert 'val_bits_per_byte 0.5000 lower' in capsys.readouterr().out


def test_what_cannot_be_compared(made, run):
    with pytest.raises(ValueError, match='validated on different texts'):
        command(plot, made('other', 5.0, 3.0), str(run), '--compare')
    (run / 'log.jsonl').write_text('{"step": 1, "tokens": 5, "loss": 2.0}')
    with pytest.raises(ValueError, match='no validation'):
        command(plot, str(run), '--compare')


def test_quantiles_of_student():
    """Of the tables in print."""
    for freedom, expected in ((1, 12.706), (4, 2.776), (10, 2.228), (11, 2.201), (12, 2.179),
                              (20, 2.086), (30, 2.042), (1000, 1.962)):
        assert curves.t95(freedom) == pytest.approx(expected, abs=0.01)
