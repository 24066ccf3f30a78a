"""bench.py on a small model: every line is a rate beside its limit. No figure is checked."""

import re

import pytest

import bench
from model import GPTConfig

TINY = GPTConfig(block_size=256, vocab_size=400, n_layer=1, n_head=2, n_embd=32)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bench, 'SMALL', TINY)
    monkeypatch.setitem(bench.SIZES, 'gpt2', TINY)
    files = bench.sources.python_files()[:20]
    monkeypatch.setattr(bench.sources, 'python_files', lambda: [*files, *files])

    def not_cached():
        raise ValueError
    monkeypatch.setattr(bench.tokenizer, 'gpt2', not_cached)


def test_every_part_has_its_lines(capsys):
    bench.main(bench.Config(seconds=0.05, device='cpu', compile=False, block_size=32))
    lines = [line for line in capsys.readouterr().out.splitlines()
             if not line.startswith('compile: ')]
    assert re.match(r'.+ threads; torch \S+, Python \S+$', lines[0])
    rates = [re.fullmatch(r'(\w+) .+? +([\d,.]+) (tok/s|item/s) +([\d,.]+) \3 +(\d+)%', line)
             for line in lines[2:]]
    assert all(rates), lines
    assert [rate[1] for rate in rates] == ['train'] * 2 + ['generate'] * 2 + ['evaluate', 'prepare']
    for _, measured, _, limit, percent in (rate.groups() for rate in rates):
        measured, limit = (float(x.replace(',', '')) for x in (measured, limit))
        assert measured > 0 and abs(100 * measured / limit - float(percent)) < 1 + 60 / limit


def test_one_part_and_what_is_refused(capsys):
    bench.main(bench.Config(parts=('prepare',), device='cpu'))
    assert len(capsys.readouterr().out.splitlines()) == 3
    with pytest.raises(ValueError, match='sampling: expected one of train'):
        bench.main(bench.Config(parts=('sampling',)))
    with pytest.raises(ValueError, match='expected one of gpt2, gpt2-medium'):
        bench.main(bench.Config(model='gpt3'))
