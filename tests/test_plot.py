"""
The picture of a run, how a log with torn and repeated lines is read, and which run is better.
"""

import json
from pathlib import Path

import pytest
from conftest import command

import plot

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
    records = plot.read_log(run / 'log.jsonl')
    assert [record['step'] for record in records] == [0, 10, 20]
    assert plot.points(records, 'loss') == ([100, 200], [3.9, 3.0])
    assert (plot.points(records, 'val_loss') == ([0, 200], [5.0, 3.5])
            and plot.points(records, 'mfu') == ([], []))


def test_a_picture_of_several_runs(run, tmp_path, capsys):
    plot.main(plot.Config(runs=(str(run), str(run))))
    assert (run / 'loss.png').read_bytes()[:4] == b'\x89PNG'
    assert 'best val_loss 3.5000 at update 20, 1.500 bits per byte' in capsys.readouterr().out
    plot.main(plot.Config(runs=(str(run),), out=str(tmp_path / 'b.png')))
    assert (tmp_path / 'b.png').stat().st_size > 10_000


def test_data_sets_with_a_reference_have_one(run):
    name = plot.settings_of(run)['dataset']
    assert plot.REFERENCES[name][1] == ("nanoGPT's GPU run", 1.4697)


def test_a_mixture_has_no_reference(run):
    (run / 'config.py').write_text("dataset = 'shakespeare_char:0.7,openwebtext:0.3'\n")
    assert plot.settings_of(run) == {'dataset': 'shakespeare_char:0.7,openwebtext:0.3'}
    plot.main(plot.Config(runs=(str(run),)))


def test_smoothing_is_the_mean_around_each_point():
    curve = ([1, 2, 3, 4], [4.0, 2.0, 3.0, 1.0])
    assert plot.smoothed(curve, 3) == ([1, 2, 3, 4], [3.0, 3.0, 2.0, 2.0])
    assert plot.smoothed(curve, 0) == curve


@pytest.mark.parametrize('runs, words', [
    ((), 'expected the folder of a run'), (('nowhere',), 'there is no log here')])
def test_refusals(runs, words):
    with pytest.raises(ValueError, match=words):
        plot.main(plot.Config(runs=runs))


# Comparisons.

@pytest.fixture
def made(tmp_path):
    """A function that makes a run: validations at 0, 1,000 and 2,000 tokens, an update a second of
    `ms`, 100 tokens each. Its settings are Config's of train.py."""
    from configurator import as_config_file
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
    curve = plot.Curve(run)
    assert curve.tokens_to(2.5, 'val_loss') == 1500 and curve.tokens_to(6, 'val_loss') == 0
    assert curve.tokens_to(1.9, 'val_loss') is None
    assert curve.seconds_to(1500) == 15 and curve.seconds_to(50) == 0.5


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
    assert ' - ' in said and 'beware, they ended at 1,000, 2,000 tokens' in said


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
        assert plot.t95(freedom) == pytest.approx(expected, abs=0.01)
