"""
Where to compute: the device, its dtype, its peak rate, its memory; and models without memory.
"""

import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode

from gpt import cpu

PEAK_FLOPS = {              # dense bfloat16 (V100, T4: float16), from vendor datasheets
    'B200': 2250e12, 'H200': 989e12, 'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100': 989e12,
    'H800': 989e12, 'A100': 312e12, 'A800': 312e12,
    'L40S': 362e12, 'RTX 6000 Ada': 364e12, 'A6000': 155e12, 'A10G': 70e12,
    'L4': 121e12, 'RTX 5090': 209e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12, 'V100': 125e12,
    'T4': 65e12}


def pick_device(name: str, local_rank: int = 0, size: int = 1) -> torch.device:
    """The torch.device called `name`; 'auto': CUDA, else MPS, else CPU. ValueError without it.
    A CUDA device becomes the current one, by which torch chooses kernels for attention."""
    if name == 'auto':
        name = ('cuda' if torch.cuda.is_available() else
                'mps' if torch.backends.mps.is_available() else 'cpu')
        if name == 'cpu' and local_rank == 0 and shutil.which('nvidia-smi'):
            print(f'this machine has an NVIDIA driver, but this torch ({torch.__version__}) sees '
                  f'no GPU; pytorch.org/get-started names the --index-url of one that does',
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
            raise ValueError(f'device: given {device}, but this machine has '
                             f'{torch.cuda.device_count()} GPUs; '
                             f'pass that number to torchrun as --nproc_per_node')
        check_architecture(torch.cuda.get_device_capability(device), torch.cuda.get_arch_list())
        torch.cuda.set_device(device)
    if device.type == 'mps' and not torch.backends.mps.is_available():
        raise ValueError("device: given 'mps', which this machine does not have; "
                         "--device=cpu runs anywhere")
    return device


def check_architecture(capability: tuple[int, int], built_for: list[str]) -> None:
    """ValueError where torch was built for newer CUDA GPUs only, such as ['sm_75', 'sm_90']."""
    oldest = min((int(name[3:]) for name in built_for if re.fullmatch(r'sm_\d+', name)), default=0)
    major, minor = capability
    if 10 * major + minor < oldest:
        raise ValueError(f'device: this GPU has compute capability {major}.{minor}, but this torch '
                         f'({torch.__version__}) is built for {oldest / 10} and newer; '
                         f'pytorch.org/get-started has builds for older CUDA versions, '
                         f'--device=cpu runs anywhere')


@contextmanager
def without_cudnn_attention(device: torch.device) -> Iterator[None]:
    """For attention of many shapes, as in generated text or scored rows: cuDNN, which torch prefers
    on large GPUs since Hopper, plans anew for each, which may take longer than all else."""
    if device.type != 'cuda':
        yield
        return
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def pick_dtype(name: str, device: torch.device,
               for_training: bool = False) -> tuple[torch.dtype, str]:
    """(dtype, reason): 'auto' is bfloat16 where the hardware has it, else float16 on CUDA, else
    float32.

    for_training: on a CPU, also measure whether bfloat16 multiplies faster than float32, which
    its instructions do not promise. Training is bound by operations, sampling by bytes.
    """
    if name != 'auto':
        if name not in ('float32', 'bfloat16', 'float16'):
            raise ValueError(f"dtype: given {name!r}, "
                             f"expected 'auto', 'float32', 'bfloat16' or 'float16'")
        return getattr(torch, name), 'as requested'
    if device.type == 'cuda':
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, 'this GPU supports it'
        return torch.float16, 'this GPU has no bfloat16'
    if device.type != 'cpu':
        return torch.float32, 'the safe choice on this device'
    if not (feature := cpu.bfloat16_feature()):
        return torch.float32, 'this CPU has no bfloat16'
    if not for_training:
        return torch.bfloat16, f'this CPU has {feature}'
    single, half = cpu.matmul_rate(torch.float32), cpu.matmul_rate(torch.bfloat16)
    reason = f'{feature} multiplies {half / 1e12:.2f} TFLOP/s here, float32 {single / 1e12:.2f}'
    return torch.bfloat16 if half > 1.25 * single else torch.float32, reason


def measure_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak operations per second of one process: from the datasheet of a GPU, measured on a CPU;
    None if unknown."""
    if device.type == 'cuda' and dtype != torch.float32:
        return datasheet_peak(torch.cuda.get_device_name(device))
    if device.type == 'cpu' and dtype != torch.float16:             # which CPUs compute very slowly
        return cpu.matmul_rate(dtype)
    return None


def datasheet_peak(gpu: str) -> float | None:
    """PEAK_FLOPS of a card by its full name. None for other cards, for variants of these (3090 Ti)
    and for parts of one (MIG): no MFU is better than a wrong one."""
    found = [peak for name, peak in PEAK_FLOPS.items() if re.search(rf'\b{name}\b', gpu)]
    variant = re.search(r'Laptop|Max-Q|MIG|\bTi\b|\bSUPER\b| D\b', gpu)
    return found[0] if found and not variant else None


def peak_memory(device: torch.device) -> int | None:
    """The most bytes this process has used: of the GPU, or of the machine; None if unknown."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:                                 # on Windows
        return None
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class NoInitialValues(TorchFunctionMode):
    """The functions of torch.nn.init do nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, '__module__', '') == 'torch.nn.init':
            return args[0] if args else kwargs['tensor']
        return func(*args, **(kwargs or {}))


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules made inside it have shapes alone: torch's meta device. No random number is drawn;
    for normal_() on that device torch would import its compiler, which takes seconds."""
    with torch.device('meta'), NoInitialValues():
        yield
