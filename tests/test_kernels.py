"""
The Triton kernels, without a GPU: by Triton's interpreter, in a process of its own because it
decides on import; compiled for cards that are not here; and with others in their places.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip('triton', reason='Triton exists for Linux only')

import model as model_module
from gpt import kernels
from gpt.trainer import use_kernels
from gpt.world import World
from model import GPT, GPTConfig

CPU = torch.device('cpu')
SHAPE = GPTConfig(block_size=70, vocab_size=5000, n_layer=1, n_head=4, n_embd=160)


def gradients(net, ids, dtype=torch.float32, compiled=False):
    """Its loss and gradients, in float32, with weights as large as GPT-2's."""
    net.zero_grad()
    with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
        loss = (torch.compile(net) if compiled else net)(ids, ids)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in net.parameters())]


def difference(found, expected):
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))


def gpt(config):
    """Its biases are not 0, its logits as wide as those of a trained one."""
    torch.manual_seed(0)
    net = GPT(config)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    net.wte.weight.data[config.vocab_size:] = 0
    return net


def interpreted():
    """What the first test is about, printed as JSON. 2 x 70 rows and 160 channels fill no block."""
    found, ids = {}, torch.randint(5000, (2, 70), generator=torch.Generator().manual_seed(0))
    for name, changes in {'gelu_new': {}, 'gelu': {'activation': 'gelu'},
                          'no bias': {'bias': False}, 'characters': {'vocab_size': 65}}.items():
        net = gpt(replace(SHAPE, **changes))
        ids %= net.config.vocab_size
        plain = gradients(net, ids)
        kernels.use(net, CPU)
        found[name] = difference(gradients(net, ids), plain)
        net.logits_per_slice = 100 * net.config.vocab_size
        found[f'{name}, slices'] = difference(gradients(net, ids), plain)
        found[f'{name}, bfloat16'] = difference(gradients(net, ids, torch.bfloat16), plain)
        with torch.no_grad():
            found[f'{name}, no gradients'] = abs(net(ids, ids) / plain[0] - 1).item()
    logits, ids = torch.randn(4, 50304) * 30 - 80, torch.tensor([[0], [50256], [16383], [16384]])
    wrong, before = torch.tensor([[-1], [50257], [3], [10 ** 6]]), logits.clone()
    nats, gradient = kernels.slice_loss(before, wrong, 50257, True, 8192)
    assert nats.isnan() and not gradient[:, 50257:].any()
    expected = model_module.slice_loss(logits.clone(), ids, 50257, True)
    for block in (4096, 8192):
        found[f'GPT-2, {block}'] = difference(
            kernels.slice_loss(logits.clone(), ids, 50257, True, block), expected)
    nats, gradient = kernels.slice_loss(logits, ids, 50257, True, 8192)
    assert gradient is logits and not gradient[:, 50257:].any()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        kernels.check(CPU, dtype)
    kernels.slice_loss = lambda *args, block: [value if value is None else 2 * value
                                               for value in model_module.slice_loss(*args)]
    try:
        kernels.check(CPU, torch.float32)
    except RuntimeError as error:
        found['refused'] = str(error)
    print(json.dumps(found))


def test_they_compute_what_the_model_does():
    """The loss and all gradients; and check() refuses kernels that compute something else."""
    pytest.importorskip('triton', '3.7', reason='the interpreter of 3.6 fails with numpy 2.4')
    code = 'import test_kernels; test_kernels.interpreted()'
    env = os.environ | {'TRITON_INTERPRET': '1', 'PYTHONPATH': os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, '-c', code], cwd=os.path.dirname(__file__), env=env,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop('refused') == 'loss is wrong'
    wrong = {name: value for name, value in found.items()
             if not value < (0.02 if 'bfloat16' in name else 2e-6)}
    assert len(found) == 18 and not wrong, wrong


@pytest.mark.parametrize('capability', [75, 80, 90, 120])
def test_they_compile_for_cards(capability, tmp_path):
    """By Triton and the assembler that comes with it: the interpreter takes what they refuse. No
    register is spilled to memory, and an H100 works on two rows of logits at a time."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    types = {'targets': '*i64', 'nats': '*fp32', 'sums': '*fp32', 'with_gradients': 'constexpr',
             'BLOCK': 'constexpr', **dict.fromkeys(('V', 'columns', 'first', 'N', 'C'), 'i32')}
    half = '*bf16' if capability >= 80 else '*fp16'
    block = 8192 if capability in (80, 90) else 4096
    for kernel, warps in ((kernels._slice_loss, block // 256), (kernels._gelu_backward, 4),
                          (kernels._join, 4)):
        signature = {name: types.get(name, half) for name in kernel.arg_names}
        constants = {name: value for name, value in (('with_gradients', True), ('BLOCK', block))
                     if name in signature}
        of_16 = {(i,): [['tt.divisibility', 16]] for i, name in enumerate(signature)
                 if name not in constants and name != 'V'}          # as GPT-2's are
        done = triton.compile(
            ASTSource(kernel, signature, constants, of_16),
            target=GPUTarget('cuda', capability, 32), options={'num_warps': warps})
        (tmp_path / 'cubin').write_bytes(done.asm['cubin'])
        tool = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
        usage = subprocess.run([tool, '-res-usage', tmp_path / 'cubin'], capture_output=True,
                               text=True, check=True).stdout
        registers, stack = map(int, re.search(r'REG:(\d+) STACK:(\d+)', usage).groups())
        assert stack == 0
        if kernel is kernels._slice_loss:               # of 65,536
            assert 2 * 32 * warps * registers <= 65536


class Launch:
    """In the place of a kernel: a function of its arguments."""

    def __init__(self, function):
        self.function = function

    def __getitem__(self, grid):
        return self.function


def gelu_backward(x, grad, dx, sums, *sizes):
    tanh = torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x * x * x).float())
    inner = (2 / torch.pi) ** 0.5 * (1 + 0.134145 * x * x).float()
    value = grad.float() * (0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * inner)
    dx.copy_(value)
    sums.zero_()
    sums[0] = value.flatten(0, 1).sum(dim=0)


def join(part, dx, sums, first, N, C):
    dx[..., first:first + C] = part
    sums[:, first:first + C] = 0
    sums[0, first:first + C] = part.float().flatten(0, 1).sum(dim=0)


@pytest.mark.slow
@pytest.mark.parametrize('dtype, tolerance, recompute', [
    (torch.float32, 2e-6, False), (torch.bfloat16, 0.02, True)])
def test_gradients_are_complete_when_compiled(dtype, tolerance, recompute, monkeypatch):
    """torch.compile has lost gradients of autograd functions that return what they were given."""
    monkeypatch.setattr(kernels, '_gelu_backward', Launch(gelu_backward))
    monkeypatch.setattr(kernels, '_join', Launch(join))
    monkeypatch.setattr(kernels, 'slice_loss',
                        lambda *args, block: model_module.slice_loss(*args))
    net, ids = gpt(SHAPE), torch.randint(5000, (2, 70))
    plain = gradients(net, ids)
    kernels.use(net, CPU)
    net.checkpoint_activations = recompute
    assert difference(gradients(net, ids, dtype, compiled=True), plain) < tolerance


@pytest.mark.parametrize('installed', [True, False])
def test_a_run_does_without_them_where_they_do_not_work(installed, monkeypatch, capsys):
    """On a CPU, and where Triton is missing: with one line."""
    if not installed:
        monkeypatch.setitem(sys.modules, 'triton', None)
        monkeypatch.delitem(sys.modules, 'gpt.kernels')
        monkeypatch.delattr('gpt.kernels')
    net = GPT(SHAPE)
    use_kernels(net, World(device=torch.device('cpu'), dtype=torch.float32))
    assert net.slice_loss is model_module.slice_loss
    assert type(net.h[0].mlp) is model_module.MLP
    said = capsys.readouterr().out
    assert said.startswith('kernels: off (') and said.count('\n') == 1
    assert installed or 'triton' in said
