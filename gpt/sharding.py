"""
FSDP2: each process keeps a part of every parameter, gradient and moment, as DTensors.
"""

import warnings

import torch
import torch.distributed as dist

from gpt import cpu
from gpt.device import without_memory


def shard(model, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    """Shard the parameters of a GPT over all processes, in place.

    Those of attention and MLP are gathered in `dtype` when they are needed, one module at a time;
    the others for a whole forward pass and in float32. Parts and sums of gradients are float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    # the warning is about changing the outputs of these modules in place, which we never do
    warnings.filterwarnings('ignore', 'FSDP2-wrapped module .* returned a view tensor')
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for module in (module for block in model.h for module in (block.attn, block.mlp)):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    if device.type == 'cpu':
        cpu.release_freed_memory()


def is_sharded(thing: object) -> bool:
    """Whether a model was given to shard(), or a tensor is a part of one."""
    return hasattr(thing, 'reshard') or hasattr(thing, 'full_tensor')


def full_copy(tensor: torch.Tensor, keep: bool = True) -> torch.Tensor | None:
    """A copy on the CPU of all of a tensor. Of a sharded one a collective: every process must call
    it. Those that do not `keep` it get None."""
    if is_sharded(tensor):
        tensor = tensor.full_tensor()                   # newly made, wherever it is
        return tensor.cpu() if keep else None
    return tensor.detach().to('cpu', copy=True) if keep else None


def shard_like(value: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """A copy of `value`, which every process has, on the device of p, and sharded as p is."""
    value = value.to(p.device, copy=True)
    if not is_sharded(p) or value.dim() == 0:
        return value
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)


def full_model_copy(model, keep: bool = True) -> torch.nn.Module | None:
    """full_copy() of a model."""
    if is_sharded(model):
        model.reshard()                         # a forward pass leaves some parameters gathered
    with without_memory():
        gpt = type(model)(model.config)
    weights = {name: full_copy(p.detach(), keep) for name, p in model.named_parameters()}
    if keep:
        gpt.load_state_dict(weights, assign=True)
    return gpt if keep else None
