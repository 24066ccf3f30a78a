"""
What only a CPU wants: weights packed for oneDNN, freed memory kept, and how fast it multiplies.
"""

import ctypes
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn

LIBC = ctypes.CDLL(None) if sys.platform == 'linux' else None


class PackedLinear(nn.Module):
    """An nn.Linear whose weight is stored in oneDNN's layout; for inference."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 64)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, 'none', [], '')


def pack(model) -> nn.Module:
    """Pack the weights of a GPT in place for fast inference, and return it: F.linear would
    rearrange them at every call. A packed model cannot be trained or saved: its weights are gone.

    Does nothing on other devices, without oneDNN, or in a dtype that oneDNN lacks on this CPU.
    """
    weight, onednn = model.wte.weight, torch.backends.mkldnn.is_available()
    if weight.device.type != 'cpu' or not onednn or not (
            weight.dtype == torch.float32 or weight.dtype == torch.bfloat16
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return model
    for module in [module for block in model.h for module in (block.attn, block.mlp)]:
        for name, linear in list(module.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(module, name, PackedLinear(linear.weight, linear.bias))
    model.lm_head = PackedLinear(model.wte.weight, None)
    return model


@contextmanager
def no_onednn_for_one_token(ids: torch.Tensor, weight: torch.Tensor) -> Iterator[None]:
    """For one token in bfloat16 on a CPU, switch oneDNN off: it rearranges a weight at every
    product, which takes twice as long as reading it."""
    if ids.numel() > 1 or weight.device.type != 'cpu' or weight.dtype != torch.bfloat16:
        yield
        return
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def keep_freed_memory() -> None:
    """Make glibc keep the memory of freed tensors. By default it returns large blocks to the
    kernel, which hands them out again page by page, zeroed: up to a quarter of the time of an
    update of GPT-2."""
    mallopt(M_TRIM_THRESHOLD=-1, M_MMAP_MAX=0)          # never; none


def release_freed_memory() -> None:
    """The opposite, for a sharded model: blocks that are gathered and freed in turn would leave
    holes in the heap."""
    mallopt(M_MMAP_MAX=65536, M_MMAP_THRESHOLD=2 ** 20, M_TRIM_THRESHOLD=2 ** 20)
    if hasattr(LIBC, 'malloc_trim'):
        LIBC.malloc_trim(0)


def mallopt(**options: int) -> None:
    """Set options of glibc's malloc; does nothing elsewhere."""
    numbers = {'M_TRIM_THRESHOLD': -1, 'M_MMAP_THRESHOLD': -3, 'M_MMAP_MAX': -4}    # malloc.h
    if hasattr(LIBC, 'mallopt'):
        for name, value in options.items():
            LIBC.mallopt(numbers[name], value)


def bfloat16_feature() -> str:
    """The name of this CPU's bfloat16 instructions, '' if it has none."""
    found = getattr(torch.cpu, 'get_capabilities', dict)()
    names = ('amx_bf16', 'avx512_bf16', 'sve_bf16', 'bf16')
    return next((name for name in names if found.get(name)), '')


def crowded() -> str:
    """A line, if other processes need the processors that threads of this one wait for."""
    load, cores = os.getloadavg()[0] if hasattr(os, 'getloadavg') else 0.0, os.cpu_count()
    if load < cores or torch.get_num_threads() == 1:
        return ''
    return (f'note: the load of this machine is {load:.1f}, it has {cores} processors; a small '
            f'model may train faster with OMP_NUM_THREADS=1, which rounds otherwise')


def matmul_rate(dtype: torch.dtype, n: int = 1024, seconds: float = 0.2) -> float:
    """Operations per second of a product of n x n matrices on this CPU, the best of several."""
    a, times, ends = torch.randn(n, n).to(dtype), [], time.perf_counter() + seconds
    while len(times) < 4 or time.perf_counter() < ends:
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * n ** 3 / min(times)
