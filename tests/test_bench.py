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


PEER = '''
from dataclasses import dataclass
import torch
import torch.nn as nn

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate)

    def forward(self, x, y):
        logits = self.wte(x) @ self.wte.weight.t()
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
'''


def test_peers_race_in_turn(tmp_path, capsys):
    """Against real transformers, and a model with the interface of nanoGPT's."""
    (tmp_path / 'model.py').write_text(PEER)
    bench.main(bench.Config(parts=('train', 'generate'), seconds=0.05, device='cpu', compile=False,
                            block_size=32, peers=str(tmp_path)))
    text = capsys.readouterr().out
    for name, others in (('train gpt2', ('nanoGPT', 'transformers')),
                         ('generate gpt2, 1 row', ('transformers',))):
        assert re.search(rf'{name} by ours +[\d,.]+ tok/s', text), text
        for other in others:
            assert re.search(rf'{name} by {other}: ours [\d.]+ times as fast +[\d,.]+ tok/s', text)


def test_one_part_and_what_is_refused(capsys):
    bench.main(bench.Config(parts=('prepare',), device='cpu'))
    assert len(capsys.readouterr().out.splitlines()) == 3
    with pytest.raises(ValueError, match='sampling: expected one of train'):
        bench.main(bench.Config(parts=('sampling',)))
    with pytest.raises(ValueError, match='expected one of gpt2, gpt2-medium'):
        bench.main(bench.Config(model='gpt3'))
