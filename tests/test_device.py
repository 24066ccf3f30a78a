"""Which device and dtype are chosen, and what is refused."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from gpt import cpu, device
from gpt.device import datasheet_peak, pick_device, pick_dtype
from gpt.script import is_out_of_memory


@pytest.mark.parametrize('name, message', [
    ('tpu', "device: given 'tpu', expected 'auto', 'cpu'"), ('cuda:99', 'device: given .*cuda:99'),
    ('mps', "device: given 'mps'")])
def test_a_device_that_does_not_exist_is_refused(name, message):
    if name == 'mps' and torch.backends.mps.is_available():
        pytest.skip('this machine has it')
    with pytest.raises(ValueError, match=message):
        pick_device(name)


@pytest.mark.parametrize('has, half, chosen', [
    (True, 4e12, torch.bfloat16), (True, 0.5e12, torch.float32), (False, 4e12, torch.float32)])
def test_a_cpu_trains_in_the_dtype_that_is_faster(monkeypatch, has, half, chosen):
    """On some CPUs the bfloat16 instructions are slower than those of float32."""
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {'avx512_bf16': has})
    monkeypatch.setattr(cpu, 'matmul_rate',
                        lambda dtype: half if dtype == torch.bfloat16 else 1e12)
    assert pick_dtype('auto', torch.device('cpu'), for_training=True)[0] == chosen
    native = torch.bfloat16 if has else torch.float32
    assert pick_dtype('auto', torch.device('cpu'))[0] == native


def test_other_dtypes_than_the_three_are_refused():
    with pytest.raises(ValueError, match="given 'int8', expected 'auto', 'float32', 'bfloat16'"):
        pick_dtype('int8', torch.device('cpu'))
    assert pick_dtype('float16', torch.device('cpu')) == (torch.float16, 'as requested')


def test_a_gpu_has_the_peak_of_its_datasheet_or_none():
    names = {'NVIDIA A100-SXM4-80GB': 312e12, 'NVIDIA H100 PCIe': 756e12, 'NVIDIA L4': 121e12,
             'NVIDIA H100 80GB HBM3': 989e12, 'NVIDIA GeForce RTX 4090': 165e12,
             'NVIDIA GeForce RTX 4090 Laptop GPU': None, 'NVIDIA RTX A1000': None,
             'NVIDIA L40': None, 'NVIDIA GeForce RTX 4090 D': None, 'NVIDIA A800-SXM4-80GB': 312e12,
             'NVIDIA GeForce RTX 3090 Ti': None, 'NVIDIA H100 80GB HBM3 MIG 1g.10gb': None}
    assert {name: datasheet_peak(name) for name in names} == names


def test_a_driver_without_a_torch_that_uses_it_is_named(monkeypatch, capsys):
    if pick_device('auto').type != 'cpu':
        pytest.skip('this machine has a GPU')
    monkeypatch.setattr(device.shutil, 'which', lambda name: f'/usr/bin/{name}')
    assert pick_device('auto').type == 'cpu'
    assert 'this machine has an NVIDIA driver, but this torch' in capsys.readouterr().err


def test_what_is_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError('CUDA out of memory.'))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: 5 GB"))
    assert is_out_of_memory(RuntimeError('MPS backend out of memory (MPS allocated: 18 GB)'))
    assert is_out_of_memory(RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling'))
    assert not is_out_of_memory(RuntimeError('no'))
    assert not is_out_of_memory(ValueError('the text says: out of memory'))


def test_a_script_that_runs_out_of_memory_ends_with_a_line():
    code = """if True:
        from gpt.script import finish
        def task():
            raise RuntimeError('CUDA out of memory.')
        finish(task)"""
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, '-c: CUDA out of memory.\n')


def test_a_gpu_older_than_torch_is_built_for_is_named():
    for capability, built_for in (((7, 5), ['sm_75', 'sm_90', 'compute_90']), ((9, 0), ['sm_80']),
                                  ((9, 4), ['gfx90a'])):
        device.check_architecture(capability, built_for)
    with pytest.raises(ValueError, match='capability 7.0, but this torch .* is built for 7.5 and'):
        device.check_architecture((7, 0), ['sm_120', 'sm_75', 'sm_90'])


def test_shapes_that_change_are_not_for_cudnn_s_attention():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    for name, inside in (('cuda', False), ('cpu', before)):
        with device.without_cudnn_attention(torch.device(name)):
            assert torch.backends.cuda.cudnn_sdp_enabled() == inside
            assert torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
