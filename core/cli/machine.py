"""The machine: device, dtype, threads. Every 'auto' is resolved here."""

import contextlib
import ctypes
import os
import sys
import sysconfig
import timeit

import torch

from core.cli.errors import UserError

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


def pick_device(device: str = 'auto') -> str:
    """
    'auto' -> the first of 'cuda', 'mps' and 'cpu' that exists. Any other is checked; UserError if it isn't available.

    A GPU with an index, such as 'cuda:1', becomes the current one. The check allocates nothing on a GPU: every process
    of torchrun would open a context on GPU 0, of hundreds of MB.
    """
    if device == 'auto':
        if torch.cuda.is_available():
            return 'cuda'
        return 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        place = torch.device(device)
        if place.type == 'cuda':
            if not torch.cuda.is_available() or (place.index or 0) >= torch.cuda.device_count():
                raise RuntimeError(f'{torch.cuda.device_count()} CUDA GPUs are visible')
            if place.index is not None:
                torch.cuda.set_device(place)
        elif place.type in ('cpu', 'mps'):
            torch.empty(1, device=place)
        else:
            raise RuntimeError('only CPUs, CUDA and MPS are supported')
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        hint = 'use --device=cpu, or --device=auto for the best one'
        raise UserError(f"device '{device}' is not available; {hint}") from error
    return device


def pick_dtype(dtype: str, device: str, n_embd: int = 0) -> str:
    """
    The dtype of matrix multiplications: 'float32', 'bfloat16' or 'float16'.

    'auto': on CUDA bfloat16 where the GPU has it (A100 and later), otherwise float16; on a CPU bfloat16 where the model
    is wide (n_embd) and the CPU multiplies it faster: always with AMX, by a trial with AVX512-BF16; otherwise float32.
    """
    if dtype == 'auto':
        if device.startswith('cuda'):
            with torch.cuda.device(device):  # V100 and T4 only emulate it, which is slower than float32
                return 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
        return 'bfloat16' if device == 'cpu' and n_embd >= 256 and cpu_has_fast_bfloat16() else 'float32'
    if dtype not in DTYPES:
        raise UserError(f"dtype is '{dtype}'; it must be auto, {', '.join(DTYPES)}")
    if dtype == 'float16' and not device.startswith('cuda'):
        raise UserError(f'dtype=float16 needs a CUDA GPU, and the device is {device}; use --dtype=bfloat16 or float32')
    return dtype


def cpu_has_fast_bfloat16() -> bool:
    """True where this CPU multiplies bfloat16 matrices clearly faster than float32 ones."""

    def has(feature: str) -> bool:
        return bool(getattr(torch.cpu, f'_is_{feature}_supported', bool)())

    return has('amx_tile') or (has('avx512_bf16') and bfloat16_gain() > 1.5)


def bfloat16_gain(trials: int = 5) -> float:
    """Speed of a bfloat16 product over a float32 one, at the size of a small model; takes about 50 ms."""

    def best(dtype: torch.dtype) -> float:
        a, b = torch.ones(2048, 384, dtype=dtype), torch.ones(384, 1536, dtype=dtype)
        return min(timeit.repeat(lambda: a @ b, number=1, repeat=trials))

    return best(torch.float32) / best(torch.bfloat16)


def use_attention(kernel: str, device: str) -> None:
    """The library of PyTorch's attention on a GPU: 'cudnn', 'flash' or 'fa3' (else a UserError); 'auto': its choice."""
    if kernel == 'auto' or not device.startswith('cuda'):
        return
    if kernel == 'fa3':
        try:
            from torch.nn.attention import activate_flash_attention_impl

            activate_flash_attention_impl('FA3')
        except (ImportError, RuntimeError, ValueError) as error:
            raise UserError('FlashAttention 3 is not installed; use --attention_kernel=flash or cudnn') from error
    torch.backends.cuda.enable_cudnn_sdp(kernel == 'cudnn')
    torch.backends.cuda.enable_flash_sdp(kernel != 'cudnn')
    torch.backends.cuda.enable_mem_efficient_sdp(False)


def to_device(x: torch.Tensor, y: torch.Tensor, device: str | torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch on the training device; for a GPU via pinned memory, without waiting for it."""
    device = torch.device(device)
    if device.type == 'cuda':
        return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
    return x.to(device), y.to(device)


def to_float64(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in float64, on its device, or on the CPU where that has no float64 (Apple's GPUs)."""
    return (tensor.cpu() if tensor.device.type == 'mps' else tensor).double()


def autocast(device: str, dtype: str) -> contextlib.AbstractContextManager:
    """A context in which matrix multiplications run in `dtype`; for float32 it does nothing."""
    if dtype == 'float32':
        return contextlib.nullcontext()
    return torch.autocast(device_type=device.split(':')[0], dtype=DTYPES[dtype])


def set_threads(threads: int = 0) -> int:
    """
    Set the number of CPU threads and return it. 0: OMP_NUM_THREADS, or the cores this process may use (more threads are
    much slower), divided among the node's processes.

    Denormal numbers, below 1.2e-38 in float32, become zeros: a CPU computes with them many times more slowly, and a
    high learning rate makes many. New threads inherit that, so call this before the first computation.
    """
    torch.set_flush_denormal(True)
    if not threads:
        threads = torch.get_num_threads()
        if 'OMP_NUM_THREADS' not in os.environ or 'LOCAL_WORLD_SIZE' in os.environ:
            threads = min(available_cores(), os.cpu_count() or 1) // int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    torch.set_num_threads(max(1, threads))
    return max(1, threads)


def keep_freed_memory() -> None:
    """
    Make malloc reuse freed blocks instead of returning them to the system (glibc on Linux; a no-op elsewhere), which
    would zero a training step's large activations again on each allocation: up to a third of a step on a CPU.
    """
    if sys.platform == 'linux' and hasattr(ctypes.CDLL(None), 'mallopt'):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, -1)


def prepare_compiler(device: str) -> None:
    """
    Before torch.compile: keep its cache in the user's cache folder instead of /tmp, so that it survives a reboot.
    UserError where a CPU is to be compiled for, and there is no C++ compiler or no Python.h.
    """
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
    os.environ.setdefault('TORCHINDUCTOR_CACHE_DIR', os.path.join(cache, 'torchinductor'))
    if device == 'cpu':
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        hint = 'install it, or leave compile=True out'
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise UserError(f'compile=True needs a C++ compiler on a CPU, g++ or what CXX names: {hint}') from None
        headers = sysconfig.get_path('include')
        if sys.platform == 'linux' and not os.path.exists(os.path.join(headers, 'Python.h')):
            raise UserError(f'compile=True needs Python.h (of python3-dev) on a CPU, not found in {headers}: {hint}')
    torch._dynamo.config.recompile_limit = 64  # decode steps of so many sizes; then it would go on uncompiled


def available_cores() -> int:
    """The number of cores this process may use, by its affinity and its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    try:
        with open('/sys/fs/cgroup/cpu.max', encoding='ascii') as file:
            quota, period = file.read().split()
        return cores if quota == 'max' else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores
