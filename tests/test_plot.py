"""
The pictures of runs.
"""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT

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


def test_a_picture_of_several_runs(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / 'other')
    plot.main(plot.Config(runs=(str(run), str(other))))
    assert (run / 'loss.png').read_bytes()[:4] == b'\x89PNG'
    assert 'best val_loss 3.5000 at update 20, 1.500 bits per byte' in capsys.readouterr().out
    plot.main(plot.Config(runs=(str(run),), out=str(tmp_path / 'b.png')))
    assert (tmp_path / 'b.png').stat().st_size > 10_000


def test_a_folder_without_a_log_is_skipped(run, tmp_path, capsys):
    (tmp_path / 'b').mkdir()
    plot.main(plot.Config(runs=(str(run), str(tmp_path / 'b'))))
    assert f"skipping {tmp_path / 'b'} (no log.jsonl)" in capsys.readouterr().out
    with pytest.raises(ValueError, match='expected the folder of a run of train.py, with a log'):
        plot.main(plot.Config(runs=(str(tmp_path / 'b'),)))


def test_a_run_that_is_given_twice_is_drawn_and_compared_once(run, tmp_path, capsys):
    drawn = []
    for runs in ((run,), (run, run / '../a', f'{run}/')):
        plot.main(plot.Config(runs=tuple(map(str, runs)), out=str(tmp_path / 'a.png')))
        drawn.append(((tmp_path / 'a.png').read_bytes(), capsys.readouterr().out))
    assert drawn[0][0] == drawn[1][0] and drawn[1][1].count('best val_loss') == 1
    plot.main(plot.Config(runs=(str(run), str(run)), compare=True))
    assert 'against' not in capsys.readouterr().out


def test_a_picture_is_never_written_over_something_else(run, tmp_path):
    before = (run / 'log.jsonl').read_bytes()
    for flags, words in (({'out': str(run)}, 'is a folder'),
                         ({'out': f'{run}/log.jsonl'}, 'one of .png, .svg'),
                         ({'out': f'{run}/log.jsonl', 'report': True}, 'such as a.html'),
                         ({'out': str(run), 'report': True}, 'such as a.html')):
        with pytest.raises(ValueError, match=words):
            plot.main(plot.Config(runs=(str(run),), **flags))
    assert (run / 'log.jsonl').read_bytes() == before
    plot.main(plot.Config(runs=(str(run),), out=f'{tmp_path}/new/picture'))
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['picture.png']
    assert not run.with_suffix('.png').exists()


@pytest.mark.parametrize('name', ['a$x^2$', r'$\frac$', '$', '$a$b$', '_a', 'a\nb', '世界'])
def test_the_name_of_a_run_is_drawn_as_it_is(run, tmp_path, name):
    shutil.copytree(run, tmp_path / name)
    _, figure = drawn([tmp_path / name])
    label = figure.legends[0].get_texts()[0]
    assert label.get_text() == name and not label.get_parse_math()


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
        assert all({line.get_color() for line in panel.lines if len(line.get_xdata()) > 2}
                   == set(plot.THEMES['light']['runs'][:2]) for panel in panels.values())
        assert len({panel.get_xlim() for panel in panels.values()}) == 1
        low, high = panels['HellaSwag, % right'].get_ylim()
        assert low < 25 and 28 < high < 32


def test_the_beginning_and_single_jumps_do_not_squash_the_curve(run):
    records = [{'step': i, 'tokens': 100 * i, 'loss': 3 + 8 * 0.9 ** i + 50 * (i == 500)}
               for i in range(1000)]
    panels, _ = drawn([run], records)
    low, high = panels['Loss, nats per token'].get_ylim()
    assert low < 1.4697 and 3 < high < 4                              # the reference is in


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


@pytest.mark.parametrize('runs, words', [
    ((), 'expected the folder of a run'),
    (('nowhere/at/all',), '^given nowhere/at/all, expected the folder of a run of train.py'),
    (('config',), 'given config, expected the folder of a run')])
def test_refusals(runs, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=words):
        plot.main(plot.Config(runs=runs))
    with pytest.raises(ValueError, match="theme: given 'blue', expected one of light, dark"):
        plot.main(plot.Config(runs=('anything',), theme='blue'))
