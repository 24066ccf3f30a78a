"""The picture of a run, and how a log with torn and repeated lines is read."""

import json

import pytest

import plot

LOG = [{'step': 0, 'tokens': 0, 'val_loss': 5.0},
       {'step': 10, 'tokens': 100, 'loss': 4.0, 'lr': 1e-3},
       {'step': 20, 'tokens': 200, 'loss': 3.0},
       {'step': 20, 'tokens': 200, 'val_loss': 3.5, 'val_bits_per_byte': 1.5},
       {'step': 10, 'tokens': 100, 'loss': 3.9}]


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
    assert plot.REFERENCES[plot.dataset_of(run)][1] == ("nanoGPT's GPU run", 1.4697)


def test_a_mixture_has_no_reference(run):
    (run / 'config.py').write_text("dataset = 'shakespeare_char:0.7,openwebtext:0.3'\n")
    assert plot.dataset_of(run) == 'shakespeare_char:0.7,openwebtext:0.3'
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
