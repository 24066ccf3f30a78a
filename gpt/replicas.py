"""
A model that trains: compiled, and on several processes whole on each (DDP) or shared out (FSDP2).

Parameters, gradients and moments of a shared model are DTensors: a process holds its part of each.
"""

import time
import warnings
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gpt import distributed


def make_replica(model, cfg, world, autocast, batch, dtype, seconds, say):
    """`model`, compiled when that is wanted and works, in DDP when there are several processes.

    Runs one backward pass, whose gradients are dropped. It compiles; and DDP, which reorders its
    buckets after the first one, then adds in the same order in a resumed run as in one that never
    stopped.
    """
    replica, sharded = model, is_sharded(model)
    wanted, why = distributed.on_main(world, distributed.pick_compile, cfg.compile, world.device,
                                      dtype, seconds)
    say(f'compile {wanted}: {why}')
    if world.device.type == 'cpu':      # elementwise work again in the backward pass: 40 % less
        torch._functorch.config.activation_memory_budget = 0.85     # memory, for about 1 % of time
    if wanted:
        began, failure = time.perf_counter(), ''
        if sharded:
            for block in model.h:
                block.compile()
        compiled = model if sharded else torch.compile(model)
        try:
            with autocast():
                compiled(*batch).backward()
        except Exception as error:      # whatever a compiler can fail with
            if distributed.is_out_of_memory(error):
                raise
            failure = f'{type(error).__name__}: {str(error).strip()}'.splitlines()[0][:120]
        if distributed.any_rank(bool(failure), world.device):
            say(f'compiling failed, going on without ({failure or "on another rank"})')
            for block in model.h:
                block._compiled_call_impl = None
        else:
            replica = compiled
            say(f'compiled in {time.perf_counter() - began:.0f} s')
    if world.size > 1 and not sharded:
        on_gpu = world.device.type == 'cuda'
        replica = DistributedDataParallel(replica, device_ids=[world.device] if on_gpu else None,
                                          gradient_as_bucket_view=True)
    if world.size > 1:
        with autocast():
            replica(*batch).backward()
    model.zero_grad(set_to_none=True)
    return replica


def reduce_gradients(replica, last):
    """DDP sums gradients over ranks in the backward pass of the last micro-batch only."""
    if last or not isinstance(replica, DistributedDataParallel):
        return nullcontext()
    return replica.no_sync()


def shard(model, device, dtype=torch.float32):
    """Leave each process, on `device`, its share of every parameter of a GPT, in place. Those of
    attention and MLP, which multiply in `dtype`, are gathered in it when they are needed, one part
    at a time; the others for a whole forward pass and as they are. Shares and sums of gradients
    are float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    # of a view that is changed in place, which nobody does with the outputs of these
    warnings.filterwarnings('ignore', 'FSDP2-wrapped module .* returned a view tensor')
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    gathered = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for part in (part for block in model.h for part in (block.attn, block.mlp)):
        fully_shard(part, mesh=mesh, mp_policy=gathered)
    fully_shard(model, mesh=mesh)
    if device.type == 'cpu':
        distributed.give_back_freed_memory()


def is_sharded(thing):
    """Whether a model was given to shard(), or a tensor is a share of one."""
    return hasattr(thing, 'reshard') or hasattr(thing, 'full_tensor')


def whole(tensor, keep=True):
    """All of a sharded tensor, on the CPU; every process must ask, those without `keep` get None.
    Others are whole already."""
    if not is_sharded(tensor):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if keep else None


def like(value, p):
    """`value`, which all processes have, on the device of p, and shared among them if p is."""
    value = value.to(p.device, copy=True)
    if not is_sharded(p) or value.dim() == 0:
        return value
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)


def unsharded(model, keep=True):
    """`model`; if it is sharded a whole copy on the CPU, for those who `keep` it. All must ask."""
    if not is_sharded(model):
        return model
    model.reshard()                                     # a forward pass leaves some of it gathered
    with torch.device('meta'):
        gpt = type(model)(model.config)
    weights = {name: whole(p.detach(), keep) for name, p in model.named_parameters()}
    if keep:
        gpt.load_state_dict(weights, assign=True)
    return gpt if keep else None
