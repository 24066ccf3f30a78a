"""
AdamW and Muon as one optimizer, and the schedule of the learning rate.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from gpt.sharding import full_copy, shard_like

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of Muon's quintic (Jordan)
MAX_ELEMENTS = 2 ** 25                  # of the matrices that are orthogonalized together
MIN_ELEMENTS_TO_SHARE = 2 ** 18         # of them; with fewer the exchange takes longer


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of train.py, by the same names."""
    optimizer: str = 'adamw'
    learning_rate: float = 1e-3
    muon_learning_rate: float = 0.02
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0


@dataclass(frozen=True)
class Schedule:
    schedule: str               # 'cosine' or 'wsd'
    learning_rate: float        # at its maximum
    min_lr: float
    decay_lr: bool
    max_iters: int
    warmup_iters: int
    lr_decay_iters: int         # 0: max_iters
    cooldown_iters: int

    def learning_rate_at(self, step: int) -> float:
        """AdamW's learning rate for the update after `step` updates."""
        if not self.decay_lr:
            return self.learning_rate
        end = self.lr_decay_iters or self.max_iters
        if step < self.warmup_iters:
            return self.learning_rate * (step + 1) / (self.warmup_iters + 1)
        if step >= end:
            return self.min_lr
        if self.schedule == 'cosine':
            progress = (step - self.warmup_iters) / (end - self.warmup_iters)
            factor = 0.5 * (1 + math.cos(math.pi * progress))
        else:                                                               # 'wsd'
            cooldown = min(self.cooldown_iters, end - self.warmup_iters)    # not before the warmup
            factor = min(1, (end - step) / max(1, cooldown))
        return self.min_lr + factor * (self.learning_rate - self.min_lr)


class Optimizer:
    """AdamW for all parameters of a GPT, or Muon for the matrices of its blocks and AdamW for the
    rest. Matrices decay, biases and LayerNorms do not."""

    def __init__(self, model, config: OptimizerConfig, dtype: torch.dtype = torch.float32):
        """dtype: that of the forward pass, in which Muon multiplies (float32 for float16, whose
        range is too small; GPUs that need it have no fast bfloat16)."""
        self.config, self.names = config, {p: name for name, p in model.named_parameters()}
        use_muon = config.optimizer == 'muon'
        params = [p for p in model.parameters() if p.requires_grad]     # others are frozen
        of_blocks = set(map(id, model.h.parameters())) if use_muon else set()
        for_muon = [p for p in params if p.dim() >= 2 and id(p) in of_blocks]
        matrices = [p for p in params if p.dim() >= 2 and id(p) not in of_blocks]
        vectors = [p for p in params if p.dim() < 2]
        groups = [{'params': matrices, 'weight_decay': config.weight_decay},
                  {'params': vectors, 'weight_decay': 0.0}]
        self.parts = [torch.optim.AdamW(groups, lr=config.learning_rate, fused=True,
                                        betas=(config.beta1, config.beta2))]
        if use_muon:
            dtype = torch.float32 if dtype == torch.float16 else dtype
            self.parts.append(Muon(for_muon, lr=config.muon_learning_rate,
                                   weight_decay=config.weight_decay, dtype=dtype))
        for group in self.groups():
            group['initial_lr'] = group['lr']

    def groups(self) -> Iterator[dict]:
        return (group for part in self.parts for group in part.param_groups)

    def set_learning_rate(self, learning_rate: float) -> None:
        """AdamW's; Muon's changes in proportion."""
        for group in self.groups():
            group['lr'] = group['initial_lr'] * learning_rate / self.config.learning_rate

    def step(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """One update, by gradients clipped to grad_clip, which are then dropped; none if loss or
        norm (scalars on the device) is not finite. The device decides: nothing waits for it."""
        grad_clip, finite = self.config.grad_clip, torch.isfinite(loss) & torch.isfinite(norm)
        scale = (norm / grad_clip).clamp(min=1) if grad_clip else None
        fused = norm.device.type in ('cpu', 'cuda')     # kernels that take grad_scale, found_inf
        if not fused and scale is not None:
            for p in (p for group in self.groups() for p in group['params']):
                p.grad.mul_(1 / scale)
        for part in self.parts if fused or finite else ():
            if fused:
                part.grad_scale, part.found_inf = scale, (~finite).float()
            part.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def reset(self) -> None:
        """Forget all moments and step counts."""
        for part in self.parts:
            part.state.clear()

    def state_dict(self, keep: bool = True) -> dict[str, dict[str, torch.Tensor]]:
        """{parameter name: {key: tensor}}: step counts and moments, no learning rates. Copies
        on the CPU; of a sharded model a collective, see full_copy()."""
        return {self.names[p]: {key: full_copy(value, keep) for key, value in state.items()}
                for part in self.parts for p, state in part.state.items()}

    def load_state_dict(self, saved: dict[str, dict[str, torch.Tensor]]) -> None:
        """Restore a state_dict(); learning rates and weight decay stay as they are.

        Raises ValueError if it is not of these parameters and optimizers.
        """
        for part in self.parts:
            is_adamw = isinstance(part, torch.optim.AdamW)
            expected = {'step', 'exp_avg', 'exp_avg_sq'} if is_adamw else {'momentum_buffer'}
            for p in (p for group in part.param_groups for p in group['params']):
                if self.names[p] not in saved:
                    continue                            # it never had a gradient
                state = saved[self.names[p]]
                if set(state) != expected:
                    raise ValueError(f'the checkpoint has no matching optimizer state for '
                                     f'{self.names[p]}; was it trained with another --optimizer?')
                part.state[p] = {key: shard_like(value, p) for key, value in state.items()}


class Muon(torch.optim.Optimizer):
    """The update of a matrix is its momentum, made orthogonal (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon); for matrices only.

    The arithmetic is that of torch.optim.Muon. But matrices of one shape are multiplied together,
    in the fast dtype of the machine: on a CPU without fast bfloat16 that saves a quarter of the
    time or more. And as in torch's fused AdamW, `grad_scale` divides the gradients and a
    `found_inf` of 1.0 skips the step, both tensors on the device.
    """

    def __init__(self, params: Iterable[torch.Tensor], lr: float = 0.02, momentum: float = 0.95,
                 weight_decay: float = 0.1, dtype: torch.dtype = torch.bfloat16):
        super().__init__(params, {'lr': lr, 'momentum': momentum, 'weight_decay': weight_decay})
        self.dtype, self.grad_scale, self.found_inf = dtype, None, None

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for batch in batches_of_one_shape(group['params']):
                self.update(batch, **{key: group[key] for key in self.defaults})

    def update(self, batch: list[torch.Tensor], lr: float, momentum: float,
               weight_decay: float) -> None:
        for p in batch:
            if not self.state[p]:
                self.state[p]['momentum_buffer'] = torch.zeros_like(p)
        params = [local(p) for p in batch]              # of a sharded model: this process's rows
        buffers = [local(self.state[p]['momentum_buffer']) for p in batch]
        grads = torch.stack([local(p.grad) for p in batch])                 # (n, out, in)
        if self.grad_scale is not None:
            grads /= self.grad_scale
        if self.found_inf is not None:          # skipped: with the momentum in place of the
            grads = torch.where(self.found_inf > 0, torch.stack(buffers), grads)    # gradient and
            lr = lr * (1 - self.found_inf)      # a learning rate of 0 nothing changes
        torch._foreach_lerp_(buffers, grads.unbind(), 1 - momentum)
        updates = grads.lerp(torch.stack(buffers), momentum)
        updates = on_shares(orthogonalize, updates.to(self.dtype), batch[0]).float()
        updates *= lr * math.sqrt(max(1, batch[0].size(0) / batch[0].size(1)))
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_sub_(params, updates.unbind())


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


def on_shares(function: Callable, matrices: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """function of matrices (n, out, in), of which each process computes its share; a collective. If
    p is sharded, a process gives and gets its rows of all matrices, else all rows."""
    is_replicated = not hasattr(p, 'to_local')
    if processes() == 1 or is_replicated and matrices.numel() < MIN_ELEMENTS_TO_SHARE:
        return function(matrices)
    if is_replicated:
        each = -(-len(matrices) // processes())
        mine = torch.zeros_like(matrices[:1]).repeat(each, 1, 1)        # the last may have fewer
        share = matrices[each * dist.get_rank():][:each]
        mine[:len(share)] = function(share)
        result = torch.empty_like(mine).repeat(processes(), 1, 1)
        dist.all_gather(list(result.split(each)), mine)
        return result[:len(matrices)]
    from torch.distributed.tensor import DTensor, Shard
    shape, stride = torch.Size([len(matrices), *p.shape]), (p.numel(), p.size(1), 1)

    def exchange(tensor, before, after):
        part = DTensor.from_local(tensor, p.device_mesh, [Shard(before)], shape=shape,
                                  stride=stride)
        return part.redistribute(placements=[Shard(after)]).to_local()
    return exchange(function(exchange(matrices, 1, 0)).contiguous(), 0, 1)


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def batches_of_one_shape(params: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Lists of parameters of one shape; a process orthogonalizes up to MAX_ELEMENTS of one."""
    shapes = {}
    for p in params:
        shapes.setdefault(p.shape, []).append(p)
    for shape, same in shapes.items():
        size = max(1, processes() * MAX_ELEMENTS // shape.numel())
        yield from (same[i:i + size] for i in range(0, len(same), size))


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Matrices (n, out, in) with their singular values moved to about 1 (0.7 to 1.2): a
    Newton-Schulz iteration of a quintic."""
    a, b, c = COEFFICIENTS
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
