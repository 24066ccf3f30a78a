"""
The pictures of runs, how a log with torn and repeated lines is read, and which run is better.
"""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, command

from gpt import curves
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
    records = curves.read_log(run / 'log.jsonl')
    assert [record['step'] for record in records] == [0, 10, 20]
    assert curves.points(records, 'loss') == ([100, 200], [3.9, 3.0])
    assert (curves.points(records, 'val_loss') == ([0, 200], [5.0, 3.5])
            and curves.points(records, 'mfu') == ([], []))


def test_a_picture_of_several_runs(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / 'other')
    plot.main(plot.Config(runs=(str(run), str(other))))
    assert (run / 'loss.png').read_bytes()[:4] == b'\x89PNG'
    assert 'best val_loss 3.5000 at update 20, 1.500 bits per byte' in capsys.readouterr().out
    plot.main(plot.Config(runs=(str(run),), out=str(tmp_path / 'b.png')))
    assert (tmp_path / 'b.png').stat().st_size > 10_000


def test_a_folder_of_a_pattern_where_no_run_began_is_passed_over(run, tmp_path, capsys):
    (tmp_path / 'b').mkdir()
    plot.main(plot.Config(runs=(str(run), str(tmp_path / 'b'))))
    assert f"passing over {tmp_path / 'b'} (no log.jsonl)" in capsys.readouterr().out
    with pytest.raises(ValueError, match='expected the folder of a run, with a log.jsonl in it'):
        plot.main(plot.Config(runs=(str(tmp_path / 'b'),)))


def test_a_run_that_is_given_twice_is_drawn_and_compared_once(run, tmp_path, capsys):
    drawn = []
    for runs in ((run,), (run, run / '../a', f'{run}/')):
        plot.main(plot.Config(runs=tuple(map(str, runs)), out=str(tmp_path / 'a.png')))
        drawn.append(((tmp_path / 'a.png').read_bytes(), capsys.readouterr().out))
    assert drawn[0][0] == drawn[1][0] and drawn[1][1].count('best val_loss') == 1
    plot.main(plot.Config(runs=(str(run), str(run)), compare=True))
    assert 'against' not in capsys.readouterr().out


def drawn(folders, *records, **more):
    """{key of the log: its panel} of a figure of these runs."""
    logs = records or [curves.read_log(Path(folder) / 'log.jsonl') for folder in folders]
    figure = plot.draw(list(map(Path, folders)), logs, 0, more.pop('theme', 'light'), **more)
    figure.canvas.draw()
    return {panel.get_title(loc='left'): panel for panel in figure.axes}, figure


def test_a_panel_for_each_key_that_the_log_has(run):
    panels, figure = drawn([run])
    assert list(panels) == ['Loss, nats per token', 'Learning rate']
    full = [{'step': i, 'tokens': 1000 * i, 'loss': 9 / (i + 1), 'lr': 1e-3, 'grad_norm': 1.0,
             'tokens_per_second': 5e3, 'hellaswag': 0.25 + i / 1000} for i in range(40)]
    for wide in (False, True):
        panels, figure = drawn([run, run], full, full[:20], wide=wide)
        assert list(panels) == list(plot.PANELS.values()) and len(figure.legends) == 1
        assert all(len({line.get_color() for line in panel.lines if len(line.get_xdata()) > 2}) == 2
                   for panel in panels.values())
        assert len({panel.get_xlim() for panel in panels.values()}) == 1
        low, high = panels['HellaSwag, % right'].get_ylim()
        assert low < 25 and 28 < high < 32


def test_the_beginning_and_single_jumps_do_not_squash_the_curve(run):
    records = [{'step': i, 'tokens': 100 * i, 'loss': 3 + 8 * 0.9 ** i + 50 * (i == 500)}
               for i in range(1000)]
    panels, _ = drawn([run], records)
    low, high = panels['Loss, nats per token'].get_ylim()
    assert low < 1.4697 and 3 < high < 4                              # the reference is in
    assert curves.limits([([0], [7.0])]) == pytest.approx((6.58, 7.42))
    assert curves.limits([([], [])]) is None and curves.limits([([1, 2], [3, 5])], low=0)[0] == 0


def test_many_points_are_thinned_to_what_can_be_seen():
    for n in (0, 1, 399, 400, 401, 10_000):
        tokens, values = curves.thinned((list(range(n)), list(range(n))))
        assert len(tokens) == len(values) <= 400 and tokens[-1:] == [n - 1][:n]
    assert len(tokens) > 200


def test_numbers_on_axes_are_short():
    for value, words in ((0, '0'), (2.5e9, '2.5B'), (5e8, '500M'), (1500, '1.5k'), (3.25, '3.25'),
                         (0.02, '0.02'), (2.5e-4, '2.5e-4'), (6e-4, '6e-4')):
        assert plot.short(value) == words


def contrast(a, b):
    """The ratio of WCAG 2 between two colours, as '#1a2b3c'."""
    lights = []
    for colour in (a, b):
        parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
                            for part in parts)
        lights.append(0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05)
    return max(lights) / min(lights)


@pytest.mark.parametrize('theme', plot.THEMES)
def test_colours_stand_out(theme):
    colours = plot.THEMES[theme]
    assert contrast(colours['ink'], colours['page']) > 7
    assert all(contrast(colour, colours['page']) > 4.5
               for colour in (colours['quiet'], *colours['runs']))


@pytest.mark.parametrize('theme', plot.THEMES)
def test_text_in_a_picture_can_be_read_on_a_phone(run, theme):
    """Shown 390 px wide, its font is 11 px or more, and no text leaves the picture."""
    long = run.with_name('a_run_with_a_name_that_says_all_about_it')
    run.rename(long)
    panels, figure = drawn([long, long], theme=theme)
    texts = [*figure.legends[0].get_texts(), *(text for panel in panels.values() for text in (
        *panel.texts, panel.xaxis.label, *panel.get_yticklabels(), *panel.get_xticklabels()))]
    sizes = [390 * text.get_fontsize() / 72 / figure.get_size_inches()[0] for text in texts]
    assert len(texts) > 10 and min(sizes) >= 11
    box = figure.get_tightbbox()                                        # in inches
    assert box.x0 >= 0 and box.x1 <= figure.get_size_inches()[0]


def test_data_sets_with_a_reference_have_one(run):
    name = curves.settings_of(run)['dataset']
    assert plot.REFERENCES[name][1] == ("nanoGPT's GPU run", 1.4697)


def test_a_mixture_has_no_reference(run):
    (run / 'config.py').write_text("dataset = 'shakespeare_char:0.7,openwebtext:0.3'\n")
    assert curves.settings_of(run) == {'dataset': 'shakespeare_char:0.7,openwebtext:0.3'}
    plot.main(plot.Config(runs=(str(run),)))


def test_smoothing_is_the_mean_around_each_point():
    curve = ([1, 2, 3, 4], [4.0, 2.0, 3.0, 1.0])
    assert curves.smoothed(curve, 3) == ([1, 2, 3, 4], [3.0, 3.0, 2.0, 2.0])
    assert curves.smoothed(curve, 0) == curves.smoothed(curve, -9) == curve


@pytest.mark.parametrize('runs, words', [
    ((), 'expected the folder of a run'),
    (('nowhere/at/all',), '^given nowhere/at/all, expected the folder of a run, with a log.jsonl '
     'in it; train.py makes one under out/$'), (('config',), 'given config, .*; there are .*')])
def test_refusals(runs, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=words):
        plot.main(plot.Config(runs=runs))
    with pytest.raises(ValueError, match="theme: given 'blue', expected 'light' or 'dark'"):
        plot.main(plot.Config(runs=('anything',), theme='blue'))


# Comparisons.

@pytest.fixture
def made(tmp_path):
    """A function that makes a run: validations at 0, 1,000 and 2,000 tokens, an update a second of
    `ms`, 100 tokens each. Its settings are Config's of train.py."""
    from gpt.settings import as_config_file
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
        assert curves.t95(freedom) == pytest.approx(expected, abs=0.01)
