"""Updates of a Trainer: in pieces, undone, compiled, in one process and in two."""

import json
import math
import os
from dataclasses import fields, replace

import pytest
import torch
from conftest import ROOT, script

import bench
import train
from gpt import trainer as trainer_module
from gpt.optim import OptimizerConfig
from gpt.settings import configure
from gpt.trainer import Trainer, TrainerConfig, should_compile
from gpt.validation import ValidationConfig, evaluate
from gpt.world import World
from model import GPT, GPTConfig

TINY = GPTConfig(block_size=16, vocab_size=61, n_layer=2, n_head=2, n_embd=32)
IDS = torch.randint(61, (8, 17), generator=torch.Generator().manual_seed(0))


def make(dtype=torch.float32, optimizer='adamw', seed=0):
    torch.manual_seed(seed)
    return Trainer(GPT(TINY), World(dtype=dtype), TrainerConfig(compile=False),
                   OptimizerConfig(optimizer=optimizer))


def update(trainer, pieces=1):
    """One update on IDS in so many micro-batches: (loss, norm)."""
    loss = torch.zeros(())
    for i, part in enumerate(IDS.chunk(pieces), 1):
        loss += trainer.backward(part[:, :-1], part[:, 1:], pieces, last=i == pieces)
    norm = trainer.grad_norm()
    trainer.step(loss, norm)
    return loss, norm


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def test_micro_batches_change_nothing_but_rounding():
    whole, pieces = make(), make()
    for _ in range(3):
        for a, b in zip(update(whole), update(pieces, 4)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not torch.equal(weights(whole)[0], weights(make())[0])


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_a_state_dict_and_the_weights_restore_a_trainer(dtype, optimizer):
    """The next update is the same to the last bit, the loss scale included."""
    first = make(dtype, optimizer)
    for _ in range(2):
        update(first)
    second = make(dtype, optimizer, seed=1)
    second.load_weights(first.model)
    second.load_state_dict(first.state_dict())
    assert second.scaler.state_dict() == first.scaler.state_dict()
    for a, b in zip(update(first), update(second)):
        assert torch.equal(a, b)
    assert all(map(torch.equal, weights(first), weights(second)))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_a_dry_run_leaves_no_trace(dtype):
    trainer = make(dtype)
    before, scaler = weights(trainer), trainer.scaler.state_dict()
    with trainer.dry_run():
        update(trainer)
    assert all(map(torch.equal, before, weights(trainer)))
    assert trainer.scaler.state_dict() == scaler and not trainer.state_dict()['optimizer']


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_frozen_parameters_stay_and_the_others_train(optimizer):
    frozen = {'wpe.weight', 'h.0.attn.c_attn.weight', 'h.1.ln_1.bias'}
    torch.manual_seed(0)
    model = GPT(TINY)
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    trainer = Trainer(model, World(), TrainerConfig(compile=False),
                      OptimizerConfig(optimizer=optimizer))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        update(trainer)
    same = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert same == frozen
    saved = trainer.state_dict()
    assert not frozen & set(saved['optimizer'])
    trainer.load_state_dict(saved)


def test_evaluating_is_in_eval_mode_and_training_after_it():
    trainer = make()
    with trainer.evaluating() as model:
        assert model is trainer.model and not model.training
    assert trainer.model.training and trainer.full_model() is trainer.model


def test_how_many_logits_fit_a_card():
    """Of 24, 40, 80 and 141 GB, at most 2^31; a micro-batch of 32 x 1,024 tokens has 1.65e9. Of
    bfloat16 ones, and without kernels."""
    for each, expected in ((2, [125, 750, 1250, 2147, 2147]), (12, [67, 125, 208, 417, 734])):
        found = [trainer_module.logits_that_fit(n * 10 ** 9, each) for n in (4, 24, 40, 80, 141)]
        assert [round(n / 1e6) for n in found] == expected


@pytest.mark.parametrize('recomputed', [False, True])
def test_what_a_layer_keeps_for_the_backward_pass(recomputed):
    """In bfloat16, bytes a token: of C channels and h heads 32 C + 4 h and the normalizers of
    LayerNorms, or 2 C. And its weights, in bfloat16. docs/benchmarks.md computes with this."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    found, C, h, tokens = [], 768, 12, 2 * 1024
    for n_layer in (1, 2):
        with FakeTensorMode():
            model, ids = GPT(GPTConfig(1024, 61, n_layer, h, C)), torch.zeros(2, 1024).long()
            model.half_residual, model.checkpoint_activations = True, recomputed
            sizes, params = {}, {p.untyped_storage()._cdata for p in model.parameters()}

            def keep(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in params:
                    sizes[storage._cdata] = storage.nbytes()
                return tensor
            with (torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
                  World(dtype=torch.bfloat16).autocast()):
                loss = model(ids, ids)                  # holds what is kept
        found.append(sum(sizes.values()))
        del loss
    per_layer = found[1] - found[0]
    if recomputed:
        assert per_layer == 2 * C * tokens
    else:
        assert (32 * C + 4 * h) * tokens < per_layer - 24 * C * C <= (32 * C + 4 * h + 16) * tokens


@pytest.mark.parametrize('name', [f.name for f in fields(TrainerConfig) if f.type == bool | str])
def test_switches_take_true_and_false_as_flags(name):
    """In the scripts that have them: train.py and bench.py."""
    for module in train, bench:
        if hasattr(module.Config, name):
            for value in (True, False):
                assert getattr(configure(module.Config, [f'--{name}={value}']), name) is value


def test_how_it_computes_is_in_its_state():
    config = TrainerConfig(compile=False, half_residual=True, logits_per_slice=2 ** 20)
    trainer = Trainer(GPT(TINY), World(), config, OptimizerConfig())
    assert trainer.model.half_residual and trainer.model.logits_per_slice == 2 ** 20
    config = replace(config, logits_per_slice=2 ** 30)      # of a larger card, or with kernels
    assert Trainer(GPT(TINY), World(), config,
                   OptimizerConfig()).model.logits_per_slice == 2 ** 26
    assert trainer.state_dict()['computes'] == {
        'device': 'cpu', 'dtype': 'float32', 'compile': False, 'half_residual': True,
        'kernels': False,
        'logits_per_slice': 2 ** 20}
    trainer = Trainer(GPT(TINY), World(), TrainerConfig(compile=False), OptimizerConfig())
    assert not trainer.model.half_residual and trainer.model.logits_per_slice == 2 ** 26


def test_no_mfu_above_1(monkeypatch, capsys):
    """A peak that was measured while the machine was busy is measured again; None if training is
    still faster."""
    trainer, peaks = make(), iter([200.0, 50.0])
    per_token = trainer.model.flops_per_token()
    monkeypatch.setattr(trainer_module, 'measure_peak', lambda *_: per_token * next(peaks))
    trainer.peak = 100.0 * per_token
    assert trainer.mfu(50.0) == 0.5 and trainer.mfu(150.0) == 0.75
    assert trainer.mfu(250.0) is None and trainer.mfu(1.0) is None
    assert 'mfu: left out, training does ' in capsys.readouterr().out


def test_the_passes_of_a_micro_batch_are_timed_where_that_decides():
    batch = IDS[:, :-1], IDS[:, 1:]
    trainer = make()
    assert trainer.eager_seconds(batch) == math.inf
    trainer.config = TrainerConfig(compile='auto')
    assert 0 < trainer.eager_seconds(batch) < 10
    assert all(p.grad is None for p in trainer.model.parameters())
    plain = make()
    assert all(map(torch.equal, update(trainer), update(plain)))


def test_a_plan_does_not_compile_on_a_cpu(monkeypatch, capsys):
    trainer = make()
    trainer.config = TrainerConfig(compile=True, plan=True)
    trainer.prepare((IDS[:, :-1], IDS[:, 1:]), math.inf)
    assert not trainer.is_compiled
    assert 'compile: off (in the plan, to save time; the run compiles: as set' in (
        capsys.readouterr().out)


def test_a_choice_to_compile_is_said_to_be_a_setting_or_that_of_the_resumed_run(capsys):
    trainer = make()
    for before, reason in ((False, 'as set'), (True, 'as before')):
        trainer.config = TrainerConfig(compile=False, compile_as_before=before)
        trainer.prepare((IDS[:, :-1], IDS[:, 1:]), math.inf)
        assert f'compile: off ({reason})\n' in capsys.readouterr().out
    saved = {'computes': {'device': 'cpu', 'dtype': 'float32', 'compile': False},
             'settings': {'max_iters': 1000}}
    for wanted, expected in (('auto', True), (False, False)):
        cfg = train.Config(compile=wanted, device='cpu', dtype='float32')
        assert train.computes(cfg, World(), saved)[1].compile_as_before is expected


def test_compiling_is_decided_by_the_length_of_the_run(monkeypatch):
    monkeypatch.setattr(trainer_module.shutil, 'which', lambda name: '/usr/bin/g++')
    for dtype, name in ((torch.bfloat16, 'half'), (torch.float32, 'float32')):
        world, least = World(dtype=dtype), trainer_module.MIN_SECONDS_TO_COMPILE[name]
        assert should_compile('auto', world, least + 1)[0]
        assert not should_compile('auto', world, least - 1)[0]
    assert not should_compile(False, World(), 1e9)[0] and should_compile(True, World(), 1)[0]
    assert should_compile('auto', World(device=torch.device('cuda')), 1)[0]
    assert not should_compile('auto', World(device=torch.device('mps')), 1e9)[0]
    monkeypatch.setattr(trainer_module.shutil, 'which', lambda name: None)
    wanted, reason = should_compile('auto', World(), 1e9)
    assert not wanted and 'no C++ compiler' in reason


def test_a_compiler_that_fails_leaves_an_eager_run_and_one_line(
        config, tmp_path, monkeypatch, capsys):
    def broken(model, dynamic):
        def call(*_):
            raise RuntimeError('no compiler\nand a long story')
        return call
    monkeypatch.setattr(torch, 'compile', broken)
    train.main(config(compile=True, max_iters=2))
    text = 'compiling failed, continuing without (RuntimeError: no compiler)'
    assert text in capsys.readouterr().out
    assert (tmp_path / 'run/step_0000002').exists()


class Text:
    def __len__(self):
        return 100

    def read(self, start, count):
        return (torch.arange(start, start + count) % 61).numpy()


@pytest.mark.slow
def test_validations_are_compiled_beside_training(monkeypatch, capsys):
    """Once, for full batches; neither the others nor training are compiled again."""
    from torch._dynamo.utils import counters            # takes seconds
    trainer, batch, losses, graphs = make(), (IDS[:, :-1], IDS[:, 1:]), [], []
    trainer.config = TrainerConfig(compile=True)
    trainer.prepare(batch, math.inf)
    update(trainer)
    trainer.compile_validation((3, 16), 1e6)
    assert trainer.validator is trainer.model           # on a CPU it does not pay
    monkeypatch.setitem(trainer_module.MIN_VALIDATION_FLOPS, 'cpu', 0.0)
    before = counters['stats']['unique_graphs']
    trainer.compile_validation((3, 16), 1e6)
    assert counters['stats']['unique_graphs'] == before + 1     # of another shape, in one graph
    assert 'compiled for validation in ' in capsys.readouterr().out
    assert trainer.model.training and trainer.validator is not trainer.model
    for _ in range(3):
        with trainer.evaluating():
            losses.append([evaluate(model, Text(), ValidationConfig(3, 16, 100), World())[0]
                           for model in (trainer.validator, trainer.model)])
        graphs.append(counters['stats']['unique_graphs'])
        update(trainer)
        graphs.append(counters['stats']['unique_graphs'])
    assert len(set(graphs)) == 1, 'compiled again'
    for a, b in losses:
        assert a == pytest.approx(b, rel=1e-5)


def test_a_validation_that_cannot_be_compiled_is_eager(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError('no compiler')
    trainer = make()
    trainer.is_compiled, trainer.replica = True, broken
    monkeypatch.setitem(trainer_module.MIN_VALIDATION_FLOPS, 'cpu', 0.0)
    trainer.compile_validation((3, 16), 1e6)
    assert trainer.validator is trainer.model and trainer.model.training
    text = 'compiling for validation failed, continuing without (RuntimeError: no compiler)'
    assert text in capsys.readouterr().out


def test_a_run_validates_by_what_was_compiled_for_it(config, monkeypatch):
    """It says in which batches, and on how many tokens in all: 12 updates, 3 validations."""
    asked, used = [], []

    def compile_validation(trainer, shape, tokens):
        asked.append((shape, tokens))
        trainer.validator = lambda x, y: used.append(x.shape) or trainer.model(x, y)
    monkeypatch.setattr(Trainer, 'compile_validation', compile_validation)
    cfg = config(eval_tokens=100)
    train.main(cfg)
    assert asked == [((4, 16), 300)] and used == 4 * [(4, 16), (2, 16), (1, 4)]     # and at step 0


COMPILED = """
import json
import math
import os
import sys

import torch
from torch._dynamo.utils import counters

import train
from gpt import tokenizer
from gpt.data.sets import DataSet
from gpt.optim import OptimizerConfig
from gpt.progress import Progress
from gpt.trainer import MIN_VALIDATION_FLOPS, Trainer, TrainerConfig
from gpt.validation import ValidationConfig, validate
from gpt.world import World
from model import GPT, GPTConfig


class Text:
    def __len__(self):
        return 100

    def read(self, start, count):
        return (torch.arange(start, start + count) % 61).numpy()


class Data:
    sets, val_sets = [DataSet('text', 1.0, {}, Text(), Text())], []

    def micro_batches(self, position, batch, rank):
        for i in range(batch.micro_steps):
            yield i, ids[0, i, :, :-1], ids[0, i, :, 1:]


compiled, parallel = sys.argv[1] == 'compiled', sys.argv[2]
world = World.join('cpu')
torch.manual_seed(0)
trainer = Trainer(GPT(GPTConfig(16, 257, int(sys.argv[3]), 2, 32)), world,
                  TrainerConfig(compiled, parallel), OptimizerConfig())
ids = torch.randint(257, (2, 2, 4, 17), generator=torch.Generator().manual_seed(world.rank))
trainer.prepare((ids[0, 0, :, :-1], ids[0, 0, :, 1:]), math.inf)
MIN_VALIDATION_FLOPS['cpu'] = 0.0
trainer.compile_validation((3, 16), 1e6)
blocks = [block._compiled_call_impl is not None for block in trainer.model.h]
losses, graphs = [], []
for step in range(6):
    loss = torch.zeros(())
    for i in range(2):
        part = ids[step % 2, i]
        loss += trainer.backward(part[:, :-1], part[:, 1:], 2, last=i == 1)
    norm = trainer.grad_norm()
    world.reduce(loss)
    trainer.step(loss, norm)
    losses.append([loss.item() / world.size, norm.item()])
    graphs.append(counters['stats']['unique_graphs'])
    with trainer.evaluating():              # shapes that differ from those of training
        val = validate(trainer.validator, Data.sets, ValidationConfig(3, 16, 100), world).loss
    train.draw_sample(trainer, tokenizer.byte_pairs('bytes', []), seed=1)
    graphs.append(counters['stats']['unique_graphs'])
cfg = train.Config(batch_size=4, block_size=16, total_batch_size=4 * 4 * 16)
train.measure_cost(Data(), trainer, Progress(), train.Forecast(cfg, train.batch_plan(cfg, world)))
graphs.append(counters['stats']['unique_graphs'])
if world.is_main:
    print(json.dumps([losses, graphs, blocks, 'loss' in vars(trainer.model),
                      trainer.validator is trainer.model, val]))
world.leave()
sys.stdout.flush()
os._exit(0)                 # as scripts do: gloo may abort while the interpreter shuts down
"""


@pytest.mark.slow
@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_two_processes_compile_blocks_and_loss_and_evaluate_without(tmp_path, parallel):
    """The updates are those of an eager run, to rounding. Validations (compiled before, of
    replicas) and samples between them compile nothing, nor does measuring what a run takes."""
    (tmp_path / 'run.py').write_text(COMPILED)
    found = {}
    for how, layers in (('eager', '2'), ('compiled', '2'), ('compiled', '3')):
        done = script(tmp_path / 'run.py', how, parallel, layers, torchrun=2, timeout=600,
                      env={**os.environ, 'PYTHONPATH': str(ROOT)})
        found[how, layers] = json.loads(done.stdout.splitlines()[-1])
    losses, graphs, blocks, loss_is_compiled, validates_eager, val = found['compiled', '2']
    assert validates_eager == (parallel == 'fsdp')
    assert blocks == [True, True] and loss_is_compiled
    assert graphs[0] > 0 and len(set(graphs)) == 1, 'compiled again'
    assert found['compiled', '3'][1][0] == graphs[0], 'blocks are compiled one by one'
    expected, none, *_, expected_val = found['eager', '2']
    assert set(none) == {0}
    for a, b in zip([*losses, [val]], [*expected, [expected_val]], strict=True):
        assert a == pytest.approx(b, rel=1e-4)


OVERLAP = """
import json
import math
import os
import sys

import torch

from gpt.optim import OptimizerConfig
from gpt.trainer import Trainer, TrainerConfig
from gpt.world import World
from model import GPT, GPTConfig

world = World.join('cpu')
trainer = Trainer(GPT(GPTConfig(16, 257, 3, 2, 32)), world, TrainerConfig(True, 'ddp'),
                  OptimizerConfig())
ids = torch.randint(257, (2, 17))
trainer.prepare((ids[:, :-1], ids[:, 1:]), math.inf)
done, pending = [], [trainer.replica(ids[:, :-1], ids[:, 1:]).grad_fn]
while pending:
    node = pending.pop()
    if node is not None and node not in done:
        done.append(node)
        pending += [next_node for next_node, _ in node.next_functions]
world.print(json.dumps(['CompiledFunction' in node.name() for node in done].count(True)))
world.leave()
sys.stdout.flush()
os._exit(0)                 # as scripts do: gloo may abort while the interpreter shuts down
"""


@pytest.mark.slow
def test_ddp_reduces_the_gradients_of_a_block_while_others_are_computed(tmp_path):
    """A model compiled whole has one backward pass, after which all gradients come at once; here
    each of three blocks has its own, and so has the loss."""
    (tmp_path / 'run.py').write_text(OVERLAP)
    done = script(tmp_path / 'run.py', torchrun=2, timeout=600,
                  env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert int(done.stdout.splitlines()[-1]) >= 4
