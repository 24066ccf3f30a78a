"""
Triton kernels for training on CUDA. They read once from the GPU's memory what the code of
torch.compile reads two or three times. Tested against model.py on a CPU, by Triton's interpreter.
"""

from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
import triton
import triton.language as tl

from model import GPT, MLP, CausalSelfAttention, GPTConfig, gelu_new

ROWS, STEP, COLUMNS = map(tl.constexpr, (128, 16, 128))     # a program sums ROWS x COLUMNS numbers,
                                                            # STEP rows at a time


def use(model: GPT, device: torch.device) -> None:
    """Make a GPT that will be on this device compute with these kernels; where there are no biases,
    or another activation, with those that apply. Parameters and their names stay."""
    model.slice_loss = partial(
        slice_loss, block=logits_at_a_time(device, model.config.padded_vocab_size))
    if model.config.bias:
        for block in model.h:
            block.attn.__class__, block.attn.c_attn.__class__ = FusedAttention, LinearBeforeFused
            if model.config.activation == 'gelu_new':
                block.mlp.__class__, block.mlp.c_fc.__class__ = FusedMLP, LinearBeforeFused


def check(device: torch.device, dtype: torch.dtype) -> None:
    """RuntimeError if they do not compute on this device what model.py does, in a small GPT."""
    with torch.random.fork_rng([device] if device.type == 'cuda' else []):
        torch.manual_seed(0)
        config = GPTConfig(48, vocab_size=20_000, n_layer=1, n_head=4, n_embd=160)
        model, ids = GPT(config).to(device), torch.randint(20_000, (3, 48), device=device)
    found = []
    for use_fused in (False, True):
        if use_fused:
            use(model, device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(ids, ids)
            loss.backward()
            with torch.no_grad():
                found.append({'loss': loss.detach(), 'loss without gradients': model(ids, ids)})
        found[-1] |= {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
    plain, fused = found
    for name, value in plain.items():
        limit = 0.05 if name in dict(model.named_parameters()) else 0.001
        if not (fused[name] - value).norm() <= limit * value.norm():    # of NaN too
            raise RuntimeError(f'{name} is wrong')
    if fused['wte.weight'][config.vocab_size:].any():
        raise RuntimeError('the padding of the vocabulary gets a gradient')


# The loss of a slice of tokens.

def logits_at_a_time(device: torch.device, columns: int) -> int:
    """How many of a row a program handles at a time, 8 per thread. A multiprocessor is to have room
    for two programs: an H100 for 2 x 1,024 threads, of at most 32 registers each."""
    most = 4096
    if device.type == 'cuda':
        properties = torch.cuda.get_device_properties(device)
        most = 8192 if properties.max_threads_per_multi_processor >= 2048 else 4096
    return max(256, min(most, triton.next_power_of_2(columns)))


def slice_loss(logits: torch.Tensor, targets: torch.Tensor, V: int, with_gradients: bool,
               block: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """model.slice_loss, of contiguous logits, a block at a time. The gradient is written over them.
    A target that is none of the V ids makes the loss NaN."""
    nats = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _slice_loss[(len(logits),)](logits, targets, nats, V, logits.size(1), with_gradients, block,
                                num_warps=block // 256)
    return nats.sum(), logits if with_gradients else None


@triton.jit
def _slice_loss(logits, targets, nats, V, columns, with_gradients: tl.constexpr,
                BLOCK: tl.constexpr):
    """A program for each row of logits (n, columns), of which the first V count. It reads the row
    twice, but the second time, last blocks first, out of the cache."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    target = tl.load(targets + row)
    exists = (target >= 0) & (target < V)
    correct = tl.load(logits + target, mask=exists, other=float('nan')).to(tl.float32)
    block, last = tl.arange(0, BLOCK), V // BLOCK * BLOCK     # the last block is not full
    highest, total = float('-inf'), 0.0
    for start in range(0, last, BLOCK):
        x = tl.load(logits + start + block).to(tl.float32)
        highest, total = _update(highest, total, x)
    x = tl.load(logits + last + block, mask=last + block < columns, other=0).to(tl.float32)
    x = tl.where(last + block < V, x, float('-inf'))
    highest, total = _update(highest, total, x)
    normalizer = highest + tl.log(total)
    tl.store(nats + row, normalizer - correct)
    if with_gradients:
        dtype = logits.dtype.element_ty
        tl.store(logits + last + block, tl.exp(x - normalizer).to(dtype),
                 mask=last + block < columns)
        for end in range(0, last, BLOCK):
            pointers = logits + (last - BLOCK - end) + block
            x = tl.load(pointers).to(tl.float32)
            tl.store(pointers, tl.exp(x - normalizer).to(dtype))
        tl.debug_barrier()                              # this last store comes after all others
        tl.store(logits + target, (tl.exp(correct - normalizer) - 1).to(dtype), mask=exists)


@triton.jit
def _update(highest, total, x):
    """The highest logit and the sum of exp(logit - highest), with those of another block x."""
    before, highest = highest, tl.maximum(highest, tl.max(x, 0))
    return highest, total * tl.exp(before - highest) + tl.sum(tl.exp(x - highest), 0)


# Gradients of activations, summed for the bias before them while they are written.

class LinearBeforeFused(nn.Linear):
    """The gradient of its bias is computed by what follows, GELU or Heads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias.detach())


class FusedMLP(MLP):
    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        return GELU.apply(self.c_fc(x), self.c_fc.bias)


class FusedAttention(CausalSelfAttention):
    def heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return Heads.apply(qkv, self.c_attn.bias, self.n_head)


class GELU(torch.autograd.Function):
    """gelu_new(x) of x (B, T, C) to which `bias` (C,) has been added."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, bias)
        y = gelu_new(x)         # float32 when compiled under autocast
        return y if y.dtype == x.dtype else y.to(x.dtype)   # without `if` torch 2.11 loses grad

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, bias = ctx.saved_tensors
        grad, C = grad.contiguous(), x.size(-1)
        dx, N = torch.empty_like(grad), grad.numel() // C
        sums = partial_sums(grad, N, C)
        _gelu_backward[grid(N, C)](x, grad, dx, sums, N, C)
        return dx, sums.sum(dim=0).to(bias.dtype)


class Heads(torch.autograd.Function):
    """q, k, v (B, nh, T, hs) of x (B, T, 3 C) to which `bias` (3 C,) has been added."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor,
                n_head: int) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(bias)
        B, T, _ = x.shape
        return tuple(part.view(B, T, n_head, -1).transpose(1, 2) for part in x.chunk(3, dim=2))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        bias, = ctx.saved_tensors
        parts = [grad.transpose(1, 2).flatten(2).contiguous() for grad in grads]    # (B, T, C)
        B, T, C = parts[0].shape
        dx, N = parts[0].new_empty(B, T, 3 * C), B * T
        sums = partial_sums(dx, N, 3 * C)
        for i, part in enumerate(parts):
            _join[grid(N, C)](part, dx, sums, i * C, N, C)
        return dx, sums.sum(dim=0).to(bias.dtype), None


def grid(N: int, C: int) -> tuple[int, int]:
    """Of programs for ROWS rows and COLUMNS columns each of a matrix (N, C)."""
    return -(-N // ROWS.value), -(-C // COLUMNS.value)


def partial_sums(grad: torch.Tensor, N: int, C: int) -> torch.Tensor:
    """For the sums over each ROWS rows of a matrix (N, C). Made from a gradient, or a compiler
    would allocate it in the forward pass already."""
    return grad.new_empty(-(-N // ROWS.value), C, dtype=torch.float32)


@triton.jit
def _gelu_backward(x, grad, dx, sums, N, C):
    """dx (N, C), the gradient through gelu_new(x), and for each ROWS rows the sums over them."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((STEP, COLUMNS), tl.float32)
    for step in range(0, ROWS, STEP):
        row = tl.program_id(0).to(tl.int64) * ROWS + step + tl.arange(0, STEP)
        place, mask = row[:, None] * C + column, (row[:, None] < N) & (column < C)
        value = tl.load(x + place, mask=mask, other=0).to(tl.float32)
        slope = 1.5957691216057308 * (1 + 0.134145 * value * value)     # of the sigmoid's argument
        sigmoid = tl.sigmoid(1.5957691216057308 * value * (1 + 0.044715 * value * value))
        value = tl.load(grad + place, mask=mask, other=0).to(tl.float32) * (
            sigmoid + value * sigmoid * (1 - sigmoid) * slope)
        tl.store(dx + place, value.to(dx.dtype.element_ty), mask=mask)
        total += value
    tl.store(sums + tl.program_id(0) * C + column, tl.sum(total, 0), mask=column < C)


@triton.jit
def _join(part, dx, sums, first, N, C):
    """Put a part (N, C) into dx (N, 3 C) from column `first` on, and the sums over each ROWS rows
    into sums."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((STEP, COLUMNS), tl.float32)
    for step in range(0, ROWS, STEP):
        row = tl.program_id(0).to(tl.int64) * ROWS + step + tl.arange(0, STEP)
        mask = (row[:, None] < N) & (column < C)
        value = tl.load(part + row[:, None] * C + column, mask=mask, other=0)
        tl.store(dx + row[:, None] * (3 * C) + first + column, value, mask=mask)
        total += value.to(tl.float32)
    tl.store(sums + tl.program_id(0) * (3 * C) + first + column, tl.sum(total, 0), mask=column < C)
