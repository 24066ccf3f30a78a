"""
Trainer: a model and all that turns a batch into an update of it. Compiled if that pays, and on
several processes replicated (DDP) or sharded (FSDP2).
"""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from gpt.device import measure_peak
from gpt.optim import Optimizer, OptimizerConfig
from gpt.script import is_out_of_memory
from gpt.sharding import full_model_copy, is_sharded, shard, shard_like
from gpt.world import World

MIN_SECONDS_TO_COMPILE = {'half': 200, 'float32': 600}  # of training on a CPU: compiling takes
                            # about 25 s and saves an eighth of the time, in float32 3 %
MIN_VALIDATION_FLOPS = {'cuda': 5e16}   # of a run and process: saves 20 of 110 s (computed)


@dataclass(frozen=True)
class TrainerConfig:
    """Settings of train.py, by the same names."""
    compile: bool | str = 'auto'
    parallel: str = 'ddp'
    checkpoint_activations: bool = False
    half_residual: bool | str = 'auto'
    plan: bool = False
    kernels: bool | str = 'auto'
    logits_per_slice: int = 0           # no setting; 0: see max_logits_per_slice()
    compile_as_before: bool = False     # no setting: `compile` is what the resumed run did


class Trainer:
    """One update is backward() for each micro-batch, grad_norm(), step()."""

    def __init__(self, model, world: World, config: TrainerConfig, optimizer: OptimizerConfig):
        self.model, self.world, self.config = model, world, config
        wanted = world.device.type == 'cuda' if config.kernels == 'auto' else config.kernels
        self.has_kernels = wanted and use_kernels(model, world)
        if config.parallel == 'fsdp' and world.size > 1:
            shard(model, world.device, world.dtype)
        model.to(world.device).train()
        model.checkpoint_activations = config.checkpoint_activations
        model.half_residual = (world.device.type == 'cuda' if config.half_residual == 'auto'
                               else config.half_residual)
        most = max_logits_per_slice(world, self.has_kernels)
        model.logits_per_slice = min(config.logits_per_slice or most, most)
        self.optimizer = Optimizer(model, optimizer, world.dtype)
        self.scaler = torch.amp.GradScaler(world.device.type,
                                           enabled=world.dtype == torch.float16)
        self.replica, self.is_compiled = model, False
        self.validator = model          # computes the loss of a validation
        peak = measure_peak(world.device, world.dtype)
        self.peak = peak and peak * world.size      # operations per second, None if unknown

    def mfu(self, tokens_per_second: float) -> float | None:
        """The part of the peak rate that training reaches; None if that is unknown. A peak below it
        was measured while the machine was busy, and is measured again."""
        rate, world = self.model.flops_per_token() * tokens_per_second, self.world
        if self.peak and rate > self.peak:
            self.peak = world.size * (measure_peak(world.device, world.dtype) or 0)
        if self.peak and rate > self.peak:
            world.print(f'mfu: left out, training does {rate / 1e12:.2f} TFLOP/s, and a matrix '
                        f'product alone {self.peak / 1e12:.2f}')
            self.peak = None
        return rate / self.peak if self.peak else None

    def eager_seconds(self, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
        """Seconds of the passes of a micro-batch without compiling, where that decides whether to
        compile; else infinite."""
        if self.config.compile != 'auto' or self.world.device.type != 'cpu':
            return math.inf
        for _ in range(2):                                          # the first one warms up
            start = time.perf_counter()
            with self.world.autocast():
                self.replica(*batch).backward()
            seconds = time.perf_counter() - start
        self.optimizer.zero_grad()
        return seconds

    def prepare(self, batch: tuple[torch.Tensor, torch.Tensor], seconds: float) -> None:
        """Compile, if the run takes long enough (`seconds` without), and replicate.

        A backward pass of `batch`, whose gradients are dropped, compiles. It also makes DDP reorder
        its buckets, which happens after the first one: so a resumed run adds in the same order as
        one that never stopped.
        """
        world = self.world
        wanted, reason = world.on_main(should_compile, self.config.compile, world, seconds)
        reason = 'as before' if self.config.compile_as_before else reason
        if wanted and self.config.plan and world.device.type == 'cpu':
            wanted, reason = False, f'in the plan, to save time; the run compiles: {reason}'
        world.print(f'compile: {"on" if wanted else "off"} ({reason})')
        if wanted:
            self.compile(batch)
        if world.size > 1 and not is_sharded(self.model):
            on_gpu = world.device.type == 'cuda'
            self.replica = DistributedDataParallel(
                self.replica, device_ids=[world.device] if on_gpu else None,
                gradient_as_bucket_view=True)
        if world.size > 1:
            with world.autocast():
                self.replica(*batch).backward()
        self.optimizer.zero_grad()

    def compile(self, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Compile the whole model in one process. With several, compile each block and the loss:
        then gradients are reduced, or parameters gathered, while other blocks compute."""
        from torch._functorch import config
        model, world = self.model, self.world
        if world.device.type == 'cpu':      # recompute elementwise work in the backward pass:
            config.activation_memory_budget = 0.85              # 40 % less memory, 1 % slower
        # else recomputed dropout of attention has a generator of its own, which is not seeded for
        # each micro-batch: a resumed run would drop other values
        config.graphsafe_rng_functionalization = False
        if world.size > 1:                  # dynamic: a shape that changes would split the graph
            for block in model.h:
                block.compile(dynamic=False)
            model.loss = torch.compile(model.loss, dynamic=False)
        else:
            self.replica = torch.compile(model, dynamic=False)

        def passes():
            self.replica(*batch).backward()
            if any(p.requires_grad and p.grad is None for p in model.parameters()):
                raise RuntimeError('a parameter got no gradient')
        with world.autocast():
            self.is_compiled = self.compiles('', passes)
        if self.is_compiled:
            return
        self.replica = model
        for block in model.h:
            block._compiled_call_impl = None
        model.__dict__.pop('loss', None)

    def compile_validation(self, shape: tuple[int, int], tokens: float) -> None:
        """Compile the loss without gradients, for batches of this shape (B, T), if that saves time
        in a run whose validations have `tokens` tokens in all. Not of a sharded model."""
        world, flops = self.world, self.model.flops_per_token() / 3 * tokens / self.world.size
        pays = flops > MIN_VALIDATION_FLOPS.get(world.device.type, math.inf)
        if not (pays and self.is_compiled) or is_sharded(self.model):
            return
        compiled = self.replica if world.size == 1 else self.model

        def validator(x, y):
            stance = 'default' if x.shape == shape else 'force_eager'
            with torch.compiler.set_stance(stance):
                return compiled(x, y)
        x, y = torch.zeros((2, *shape), dtype=torch.long, device=world.device)
        with self.evaluating(), torch.no_grad(), world.autocast():
            if self.compiles(' for validation', lambda: validator(x, y)):
                self.validator = validator

    def compiles(self, purpose: str, passes: Callable) -> bool:
        """Whether passes() compile, on all ranks. Those of a sharded model contain collectives: if
        one rank cannot compile even a trivial function, none starts them and waits for it."""
        start, world, failure = time.perf_counter(), self.world, ''

        def trivial():
            torch.compile(lambda x: x + 1, dynamic=False)(torch.ones(1, device=world.device))
        if is_sharded(self.model):
            failure = why_not(trivial, world)
        if failure := failure or why_not(passes, world):
            self.world.print(f'compiling{purpose} failed, continuing without ({failure})')
            return False
        self.world.print(f'compiled{purpose} in {time.perf_counter() - start:.0f} s')
        return True

    def backward(self, x: torch.Tensor, y: torch.Tensor, micro_steps: int,
                 last: bool) -> torch.Tensor:
        """Forward and backward pass of one of micro_steps micro-batches (B, T) of an update: its
        part of the mean loss. DDP reduces the gradients in the `last` one only."""
        accumulate = not last and isinstance(self.replica, DistributedDataParallel)
        with self.replica.no_sync() if accumulate else nullcontext():
            with self.world.autocast():
                loss = self.replica(x, y) / micro_steps
            self.scaler.scale(loss).backward()
        return loss.detach()

    def grad_norm(self) -> torch.Tensor:
        """The norm of the gradients, equal on all ranks."""
        for part in self.optimizer.parts:
            self.scaler.unscale_(part)
        norm = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        return norm.full_tensor() if is_sharded(norm) else norm

    def set_learning_rate(self, learning_rate: float) -> None:
        self.optimizer.set_learning_rate(learning_rate)

    def step(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Update the parameters, unless loss or norm is not finite, and drop the gradients."""
        self.optimizer.step(loss, norm)
        self.scaler.update()

    @contextmanager
    def evaluating(self) -> Iterator[torch.nn.Module]:
        """The model in eval mode. What is compiled runs eager: it would be compiled again for
        every new shape."""
        with torch.compiler.set_stance('force_eager') if self.is_compiled else nullcontext():
            self.model.eval()
            yield self.model
            self.model.train()

    def full_model(self, keep: bool = True) -> torch.nn.Module | None:
        """The model, or of a sharded one a copy, see sharding.full_copy()."""
        return full_model_copy(self.model, keep) if is_sharded(self.model) else self.model

    def copied(self) -> tuple[torch.nn.Module | None, dict]:
        """(model, state_dict()), copied to the memory of the CPU, on rank 0; None and no tensors
        elsewhere. A collective if the model is sharded."""
        return full_model_copy(self.model, self.world.is_main), self.state_dict()

    def state_dict(self) -> dict:
        """Optimizer, scaler and how it computes; the weights are saved apart, as a model that
        others read too."""
        computes = {'device': self.world.device.type, 'dtype': str(self.world.dtype)[6:],
                    'compile': self.is_compiled, 'half_residual': self.model.half_residual,
                    'kernels': self.has_kernels, 'logits_per_slice': self.model.logits_per_slice}
        return {'optimizer': self.optimizer.state_dict(self.world.is_main),
                'scaler': self.scaler.state_dict(), 'computes': computes}

    def load_state_dict(self, saved: dict) -> None:
        self.optimizer.load_state_dict(saved['optimizer'])
        self.scaler.load_state_dict(saved['scaler'])

    @torch.no_grad()
    def load_weights(self, model) -> None:
        """Copy the parameters of a full model, which every rank has."""
        for p, q in zip(self.model.parameters(), model.parameters(), strict=True):
            p.copy_(shard_like(q, p))

    @contextmanager
    def dry_run(self) -> Iterator[None]:
        """Updates inside it measure without a trace: the learning rate is 0, and what they leave in
        optimizer and scaler is undone at the end."""
        scaler = self.scaler.state_dict()
        self.optimizer.set_learning_rate(0.0)
        yield
        self.optimizer.reset()
        self.scaler.load_state_dict(scaler)


def use_kernels(model, world: World) -> bool:
    """Use those of gpt/kernels.py if they pass their check(). Returns whether they are used."""
    def check():
        from gpt import kernels         # needs Triton
        kernels.check(world.device, world.dtype)
    if failure := why_not(check, world):
        world.print(f'kernels: off ({failure})')
        return False
    from gpt import kernels
    kernels.use(model, world.device)
    return True


def why_not(function: Callable, world: World) -> str:
    """Why function() fails, in a line; '' if it works, on all ranks."""
    failure = ''
    try:
        function()
    except Exception as error:          # compilers fail in many ways
        by_compiler = any(kind.__name__ == 'BackendCompilerFailed' for kind in type(error).mro())
        if is_out_of_memory(error) and not by_compiler:
            raise
        failure = f'{type(error).__name__}: {str(error).strip()}'.splitlines()[0][:120]
    return (failure or 'on another rank') if world.any(bool(failure)) else ''


def max_logits_per_slice(world: World, has_kernels: bool) -> int:
    """The most logits that the loss computes at a time: on GPUs what fits the smallest. Without
    kernels, what is computed of a logit takes up to 12 bytes."""
    if world.device.type != 'cuda':
        return 2 ** 26
    memory = torch.cuda.get_device_properties(world.device).total_memory
    memory = int(world.reduce(torch.tensor(memory, device=world.device), 'min'))
    return logits_that_fit(memory, world.dtype.itemsize if has_kernels else 12)


def logits_that_fit(memory: int, each: int) -> int:
    """As many logits of `each` bytes as take a sixteenth of a GPU's memory (bytes), but fewer than
    2^31, for libraries that count in 32 bits. Fewer slices are faster: each reads the whole
    embedding and its gradient."""
    return min(2 ** 31 - 1, max(2 ** 26, memory // (16 * each)))


def should_compile(wanted: bool | str, world: World, seconds: float) -> tuple[bool, str]:
    """(whether to compile, reason) for a run that takes `seconds` without."""
    if isinstance(wanted, bool):
        return wanted, 'as set'
    if world.device.type == 'cuda':
        return True, 'on a GPU'
    if world.device.type != 'cpu':
        return False, 'not on this device'
    if not (compiler := shutil.which('g++') or shutil.which('clang++')):
        return False, 'no C++ compiler found'
    if math.isinf(seconds):
        return True, f'found {compiler}'
    least = MIN_SECONDS_TO_COMPILE['float32' if world.dtype == torch.float32 else 'half']
    return seconds > least, (f'about {seconds:.0f} s left, compiling pays off above {least} s; '
                             f'found {compiler}')
