"""
Ranks, devices and reductions: thin over torch.distributed, and the same calls work without it.
"""

import ctypes
import math
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

PEAK_FLOPS = {              # dense bfloat16 (V100, T4: float16) of the makers' data sheets
    'B200': 2250e12, 'H200': 989e12, 'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100': 989e12,
    'H800': 989e12, 'A100': 312e12, 'A800': 312e12,
    'L40S': 362e12, 'RTX 6000 Ada': 364e12, 'A6000': 155e12, 'A10G': 70e12,
    'L4': 121e12, 'RTX 5090': 209e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12, 'V100': 125e12,
    'T4': 65e12}
COMPILE_PAYS = 60, 180      # on a CPU, for runs longer than so many seconds: of half precision, of
                            # float32 (it takes about 25 s, and saves less in float32)
LIBC = ctypes.CDLL(None) if sys.platform == 'linux' else None


@dataclass(frozen=True)
class World:
    rank: int               # this process among all of them
    size: int               # how many processes there are
    device: torch.device    # where it computes

    @property
    def is_main(self):
        return self.rank == 0


def join(device='auto', timeout_minutes=10.0):
    """The World of this process: what torchrun says, or one process alone.

    timeout_minutes: how long one process waits for another before it gives up.

    device is 'auto' (CUDA, else MPS, else CPU) or what torch.device takes. Raises ValueError when
    the device is not there.
    """
    rank, size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    local_rank = int(os.environ.get('LOCAL_RANK', 0))
    device = pick_device(device, local_rank, size)
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    if device.type == 'cpu':
        keep_freed_memory()
    if 'RANK' in os.environ and not dist.is_initialized():
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo',
                                timeout=timedelta(minutes=timeout_minutes))
    return World(rank, size, device)


def pick_device(name, local_rank=0, size=1):
    if name == 'auto':
        name = ('cuda' if torch.cuda.is_available() else
                'mps' if torch.backends.mps.is_available() else 'cpu')
        if name == 'cpu' and local_rank == 0 and shutil.which('nvidia-smi'):
            print(f'there is an NVIDIA driver here, but this torch ({torch.__version__}) sees no '
                  f'GPU; pytorch.org/get-started names the --index-url of one that does',
                  file=sys.stderr)
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: given {name!r}, "
                         f"expected 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'") from None
    if device.type == 'cuda':
        if not torch.cuda.is_available():
            raise ValueError(f"device: given {name!r}, but this torch ({torch.__version__}) "
                             f"sees no CUDA GPU; --device=cpu runs anywhere")
        device = torch.device('cuda', local_rank if size > 1 else device.index or 0)
        if device.index >= torch.cuda.device_count():
            raise ValueError(f'device: {device} is asked for, '
                             f'this machine has {torch.cuda.device_count()} GPUs; '
                             f'give torchrun that number as --nproc_per_node')
    if device.type == 'mps' and not torch.backends.mps.is_available():
        raise ValueError("device: given 'mps', which this machine does not have; "
                         "--device=cpu runs anywhere")
    return device


def keep_freed_memory():
    """Let the C library keep the memory of tensors that are gone, where it is glibc. It would give
    large pieces back to the kernel, which hands them out again page by page, zeroed: up to a
    quarter of the time that an update of GPT-2 takes."""
    mallopt(M_TRIM_THRESHOLD=-1, M_MMAP_MAX=0)          # never; none


def give_back_freed_memory():
    """The contrary, for a model that is shared out to save memory: what is gathered and freed
    block by block would leave holes."""
    mallopt(M_MMAP_MAX=65536, M_MMAP_THRESHOLD=2 ** 20, M_TRIM_THRESHOLD=2 ** 20)
    if hasattr(LIBC, 'malloc_trim'):
        LIBC.malloc_trim(0)


def mallopt(**options):
    """Set options of glibc's malloc; elsewhere nothing happens."""
    numbers = {'M_TRIM_THRESHOLD': -1, 'M_MMAP_THRESHOLD': -3, 'M_MMAP_MAX': -4}    # malloc.h
    if hasattr(LIBC, 'mallopt'):
        for name, value in options.items():
            LIBC.mallopt(numbers[name], value)


def pick_dtype(name, device, for_training=False):
    """(torch dtype, why): bfloat16 where the hardware computes in it, else float16 on CUDA,
    else float32.

    for_training: on a CPU, also measure whether products of bfloat16 are faster: some that have
    them are slower than in float32, which matters where operations, not bytes, are the limit.
    """
    if name != 'auto':
        if name not in ('float32', 'bfloat16', 'float16'):
            raise ValueError(f"dtype: given {name!r}, "
                             f"expected 'auto', 'float32', 'bfloat16' or 'float16'")
        return getattr(torch, name), 'as set'
    if device.type == 'cuda':
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, 'this GPU has it'
        return torch.float16, 'this GPU has no bfloat16'
    if device.type == 'cpu':
        found = getattr(torch.cpu, 'get_capabilities', dict)()
        features = [name for name in ('amx_bf16', 'avx512_bf16', 'sve_bf16', 'bf16')
                    if found.get(name)]
        if not features:
            return torch.float32, 'this CPU has no bfloat16'
        if not for_training:
            return torch.bfloat16, f'this CPU has {features[0]}'
        single, half = matmul_rate(torch.float32), matmul_rate(torch.bfloat16)
        why = (f'{features[0]} multiplies {half / 1e12:.2f} TFLOP/s here, '
               f'float32 {single / 1e12:.2f}')
        return torch.bfloat16 if half > 1.25 * single else torch.float32, why
    return torch.float32, 'the safe choice on this device'


def pick_compile(wanted, device, dtype, seconds):
    """(whether to compile, why), for a run that takes so many seconds at the matmul rate."""
    if isinstance(wanted, bool):
        return wanted, 'as set'
    if device.type == 'cuda':
        return True, 'on a GPU'
    if device.type != 'cpu':
        return False, 'not on this device'
    if not (compiler := shutil.which('g++') or shutil.which('clang++')):
        return False, 'no C++ compiler here'
    if math.isinf(seconds):
        return True, f'there is a compiler ({compiler})'
    least = COMPILE_PAYS[dtype == torch.float32]
    return seconds > least, (f'what is left takes {seconds:.0f} s at the least, compiling pays '
                             f'above {least} s ({compiler})')


def matmul_rate(dtype, n=1024, seconds=0.2):
    """Operations per second of a product of n x n matrices on this CPU, the best of several."""
    a, times, ends = torch.randn(n, n).to(dtype), [], time.perf_counter() + seconds
    while len(times) < 4 or time.perf_counter() < ends:
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    return 2 * n ** 3 / min(times)


def measure_peak(device, dtype):
    """Operations per second one process could do at best: of the data sheet,
    or measured on a CPU; None if unknown."""
    if device.type == 'cuda' and dtype != torch.float32:
        return data_sheet_peak(torch.cuda.get_device_name(device))
    if device.type == 'cpu' and dtype != torch.float16:             # which CPUs compute very slowly
        return matmul_rate(dtype)
    return None


def data_sheet_peak(gpu):
    """PEAK_FLOPS of a card by its full name; None for others, for another kind of one that is there
    (3090 Ti) or a part of it (MIG): no MFU is better than a wrong one."""
    found = [peak for name, peak in PEAK_FLOPS.items() if re.search(rf'\b{name}\b', gpu)]
    other = re.search(r'Laptop|Max-Q|MIG|\bTi\b|\bSUPER\b| D\b', gpu)
    return found[0] if found and not other else None


def peak_memory(device):
    """Bytes that this process had at most: of the GPU, or of the machine; None if unknown."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:                                 # on Windows
        return None
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_out_of_memory(error):
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "can't allocate memory" in str(error) or 'not enough memory' in str(error))


def joined():
    """Whether this process is one of a group that torchrun started, be it of one alone."""
    return dist.is_initialized()


def size():
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(tensor, op='sum'):
    """Sum (or max, min) `tensor` over all processes, in place; returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor, getattr(dist.ReduceOp, op.upper()))
    return tensor


def any_rank(wish, device):
    """Whether `wish` is true on any process."""
    return bool(all_reduce(torch.tensor(float(wish), device=device), 'max'))


def broadcast(value):
    """Rank 0's `value` (plain types), on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather(value):
    """The `value` of every rank (plain types and tensors on the CPU), on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(world, function, *args):
    """function(*args) run on rank 0 alone: its result, or the error it raised, on every rank."""
    result = error = None
    if world.is_main:
        try:
            result = function(*args)
        except (ValueError, OSError) as caught:
            error = caught
    result, error = broadcast((result, error))
    if error is not None:
        raise error
    return result


def leave():
    """End the process group, if there is one."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
