"""What only a CPU needs: packed weights, and freed memory that is kept."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_model import TINY, pair, random_ids

from gpt import cpu
from gpt.cpu import PackedLinear, pack


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('B', [1, 3])
def test_packed_weights_give_the_same_logits_and_text(dtype, B):
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip('this CPU packs no bfloat16')
    net, _ = pair(TINY, std=0.1)
    ids, tolerance = random_ids(TINY, B, 9), 1e-4 if dtype == torch.float32 else 0.1
    expected = net(ids)
    net.to(dtype)
    plain = net.generate(ids, 30, seed=0, top_k=5)
    packed = pack(net)
    torch.testing.assert_close(packed(ids).float(), expected, rtol=tolerance, atol=tolerance)
    found = packed.generate(ids, 30, seed=0, top_k=5)
    assert found.shape == plain.shape
    if dtype == torch.float32:
        assert torch.equal(found, plain)
    if torch.backends.mkldnn.is_available():
        assert isinstance(packed.h[0].mlp.c_fc, PackedLinear)


@pytest.mark.skipif(sys.platform != 'linux', reason='of glibc')
def test_the_memory_of_freed_tensors_is_kept():
    """A later pass of a GPT with 64 MB of logits has few page faults. By default glibc returns
    blocks above 32 MB to the kernel."""
    code = ('import resource, torch\n'
             'from gpt.world import World\n'
             'from model import GPT, GPTConfig\n'
             'faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n'
             'if KEEP: World.join("cpu")\n'
             'net = GPT(GPTConfig(256, 4096, 2, 2, 64))\n'
             'ids = torch.zeros(16, 256, dtype=torch.long)\n'
             'counts = []\n'
             'for _ in range(10):\n'
             '    before = faults(); net(ids, ids).backward(); net.zero_grad()\n'
             '    counts.append(faults() - before)\n'
             'print(min(counts))')
    counts = []
    for keep in (True, False):
        result = subprocess.run([sys.executable, '-c', code.replace('KEEP', str(keep))], cwd=ROOT,
                                capture_output=True, text=True, check=True)
        counts.append(int(result.stdout))
    if counts[1] < 1000:
        pytest.skip('this C library keeps it by default')
    assert counts[0] < counts[1] / 20


def test_a_busy_machine_is_named(monkeypatch):
    monkeypatch.setattr(cpu.os, 'cpu_count', lambda: 2)
    for threads, load, expected in ((2, 3.5, True), (2, 1.5, False), (1, 3.5, False)):
        monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
        monkeypatch.setattr(cpu.os, 'getloadavg', lambda: (load, 0.0, 0.0))
        assert ('3.5, it has 2 processors; ' in cpu.crowded()) == expected
