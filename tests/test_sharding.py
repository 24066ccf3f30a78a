"""FSDP2 in two processes: what is gathered equals what was sharded, and scores are those of the
full model."""

import json

import pytest
from conftest import ROOT, script

SCORE = '''
import os
import sys
sys.path.insert(0, {root!r})
import json
import torch
from gpt import scoring, sharding
from gpt.world import World
from model import GPT, GPTConfig

world = World.join('cpu')
torch.manual_seed(0)
model = GPT(GPTConfig(64, 300, 2, 2, 32))
full = {{name: p.detach().clone() for name, p in model.named_parameters()}}
rows = torch.randint(300, (7, 40)).tolist()
items = [(row[:20], [row[20:20 + n], row[30:]]) for n, row in enumerate(rows, 1)]

def sums(model):
    scores = scoring.ending_loglikelihoods(model, items, world=world, batch_tokens=64)
    return [score.sum for pair in scores for score in pair]

before = sums(model.eval())
sharding.shard(model, world.device)
after = sums(model)
gathered = sharding.full_model_copy(model, keep=True)
equal = all(torch.equal(full[name], p) for name, p in gathered.named_parameters())
parts = [tuple(p.to_local().shape) != tuple(full[name].shape)
         for name, p in model.named_parameters() if p.dim() == 2]
model.train()
loss = model(torch.zeros(2, 8, dtype=torch.long), torch.zeros(2, 8, dtype=torch.long))
loss.backward()                             # scoring left nothing behind that forbids training
world.print(json.dumps([before, after, equal, all(parts)]))
world.leave()
sys.stdout.flush()
os._exit(0)                 # as scripts do: gloo may abort while the interpreter shuts down
'''


@pytest.mark.slow
def test_a_sharded_model_scores_as_the_full_one(tmp_path):
    """With an odd number of batches, of which one rank has one more."""
    path = tmp_path / 'score.py'
    path.write_text(SCORE.format(root=str(ROOT)))
    before, after, equal, parts = json.loads(script(path, torchrun=2).stdout)
    assert after == pytest.approx(before, abs=1e-4) and len(before) == 14
    assert equal and parts
