"""
Muon: the momentum of a matrix, made orthogonal, is its update.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon). The arithmetic is that of torch.optim.Muon;
what differs is how it is done. Matrices of one shape are multiplied together, in the dtype that
training is fast in: on a CPU without fast bfloat16 that saves a quarter of the time or more. And
like torch's fused AdamW it takes `grad_scale` and `found_inf` as tensors of the device, so that
nothing waits for them.
"""

import math

import torch

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the quintic; Jordan's
AT_ONCE = 2 ** 25                       # elements of the matrices that are multiplied together


class Muon(torch.optim.Optimizer):
    """For matrices only. grad_scale: gradients are divided by it; found_inf: 1.0 skips a step."""

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.1, dtype=torch.bfloat16):
        super().__init__(params, {'lr': lr, 'momentum': momentum, 'weight_decay': weight_decay})
        self.dtype, self.grad_scale, self.found_inf = dtype, None, None

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for batch in alike(group['params']):
                self.update(batch, **{key: group[key] for key in self.defaults})

    def update(self, batch, lr, momentum, weight_decay):
        for p in batch:
            if not self.state[p]:
                self.state[p]['momentum_buffer'] = torch.zeros_like(p)
        params = [local(p) for p in batch]      # of a sharded model: this process's share of them
        buffers = [local(self.state[p]['momentum_buffer']) for p in batch]
        grads = torch.stack([local(p.grad) for p in batch])                 # (n, out, in)
        if self.grad_scale is not None:
            grads /= self.grad_scale
        if self.found_inf is not None:          # as if the gradient were the momentum: it stays
            grads = torch.where(self.found_inf > 0, torch.stack(buffers), grads)
            lr = lr * (1 - self.found_inf)      # and so do the parameters
        torch._foreach_lerp_(buffers, grads.unbind(), 1 - momentum)
        updates = grads.lerp(torch.stack(buffers), momentum)
        updates = on_whole(lambda matrices: orthogonal(matrices, self.dtype), updates, batch[0])
        updates *= lr * math.sqrt(max(1, batch[0].size(0) / batch[0].size(1)))
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_sub_(params, updates.unbind())


def local(tensor):
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


def on_whole(function, matrices, p):
    """function of matrices (n, out, in), of which each process has some rows if p is sharded: they
    are gathered, and each keeps its rows of the result."""
    if not hasattr(p, 'to_local'):
        return function(matrices)
    from torch.distributed.tensor import DTensor, Replicate, Shard
    mesh, shape = p.device_mesh, torch.Size([len(matrices), *p.shape])
    stride = (p.numel(), p.size(1), 1)
    whole = DTensor.from_local(matrices, mesh, [Shard(1)], shape=shape, stride=stride).full_tensor()
    result = DTensor.from_local(function(whole), mesh, [Replicate()], run_check=False)
    return result.redistribute(placements=[Shard(1)]).to_local()


def alike(params):
    """Lists of parameters of one shape, of up to AT_ONCE elements."""
    shapes = {}
    for p in params:
        shapes.setdefault(p.shape, []).append(p)
    for shape, same in shapes.items():
        size = max(1, AT_ONCE // shape.numel())
        yield from (same[i:i + size] for i in range(0, len(same), size))


def orthogonal(matrices, dtype, steps=5):
    """Matrices (n, out, in) with their singular values moved to about 1 (0.7 to 1.2), in float32:
    a Newton-Schulz iteration of a quintic."""
    a, b, c = COEFFICIENTS
    tall = matrices.size(1) > matrices.size(2)
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()
