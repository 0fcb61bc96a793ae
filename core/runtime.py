"""
The machine: device, dtype, threads, process group, data sheets of GPUs.

Notable features:
- every 'auto' is resolved here
- one process and torchrun take the same path
"""

import contextlib
import ctypes
import datetime
import hashlib
import math
import os
import sys
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch

from core.messages import UserError, check_folder, is_rank_zero, notice, whole_numbers  # noqa: F401  (for scripts)

# ---- device, dtype, threads ------------------------------------------------------------------------------------------

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


def pick_device(device='auto'):
    """
    'auto' -> the first of 'cuda', 'mps' and 'cpu' that exists. Any other is checked; UserError if it isn't available.

    A GPU with an index, such as 'cuda:1', becomes the current one. The check allocates nothing on a GPU: under torchrun
    every process would otherwise open a context on GPU 0, which takes hundreds of MB there.
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
        raise UserError(
            f"device '{device}' is not available; use --device=cpu, or --device=auto for the best one"
        ) from error
    return device


def pick_dtype(dtype, device, n_embd=0):
    """
    The dtype of matrix multiplications: 'float32', 'bfloat16' or 'float16'.

    'auto': on CUDA bfloat16 where the GPU has it (A100 and later), otherwise float16; on a CPU bfloat16 where the model
    is wide enough (n_embd) and the CPU multiplies it faster: always with AMX, by a trial with AVX512-BF16. Otherwise
    float32.
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


def cpu_has_fast_bfloat16():
    """True where this CPU multiplies bfloat16 matrices clearly faster than float32 ones."""

    def has(feature):
        return bool(getattr(torch.cpu, f'_is_{feature}_supported', bool)())

    return has('amx_tile') or (has('avx512_bf16') and bfloat16_gain() > 1.5)


def bfloat16_gain(trials=5):
    """Speed of a bfloat16 product over a float32 one, at the size of a small model; takes about 50 ms."""
    best = {}
    for trial in range(trials + 1):
        for dtype in (torch.float32, torch.bfloat16):
            a, b = torch.ones(2048, 384, dtype=dtype), torch.ones(384, 1536, dtype=dtype)
            began = time.perf_counter()
            a @ b
            if trial:  # the first one includes the library's initialization
                best[dtype] = min(best.get(dtype, math.inf), time.perf_counter() - began)
    return best[torch.float32] / best[torch.bfloat16]


def to_device(x, y, device):
    """A batch on the training device, a str or torch.device; for a GPU via pinned memory, without waiting for it."""
    device = torch.device(device)
    if device.type == 'cuda':
        return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
    return x.to(device), y.to(device)


def to_float64(tensor):
    """`tensor` in float64, on its device, or on the CPU where that has no float64 (Apple's GPUs)."""
    return (tensor.cpu() if tensor.device.type == 'mps' else tensor).double()


def autocast(device, dtype):
    """A context in which matrix multiplications run in `dtype`; for float32 it does nothing."""
    if dtype == 'float32':
        return contextlib.nullcontext()
    return torch.autocast(device_type=device.split(':')[0], dtype=DTYPES[dtype])


def set_threads(threads=0):
    """
    Set the number of CPU threads and return it. 0: the cores this process may use, divided among the node's processes.

    OMP_NUM_THREADS is obeyed. More threads than free cores are much slower than fewer, so container quotas count.

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


def keep_freed_memory():
    """
    Make malloc reuse freed blocks instead of returning them to the system (glibc on Linux; a no-op elsewhere).

    The activations of a training step on a CPU are large blocks. Returned to the system, they would be zeroed again on
    each allocation, which takes up to a third of a step.
    """
    if sys.platform == 'linux' and hasattr(ctypes.CDLL(None), 'mallopt'):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, -1)


def keep_compiled():
    """Keep torch.compile's cache in the user's cache folder instead of /tmp, so that it survives a reboot."""
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
    os.environ.setdefault('TORCHINDUCTOR_CACHE_DIR', os.path.join(cache, 'torchinductor'))


def available_cores():
    """The number of cores this process may use, by its affinity and its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    try:
        with open('/sys/fs/cgroup/cpu.max', encoding='ascii') as file:
            quota, period = file.read().split()
        return cores if quota == 'max' else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


class GPU(NamedTuple):
    """What a vendor's data sheet says of a GPU; products are dense, sums in float32."""

    name: str
    half: float  # TFLOP/s of matrix multiplications in bfloat16 or float16
    single: float  # TFLOP/s in TF32, or else float32
    memory: float  # GB of 10^9 bytes
    bandwidth: float  # of that memory, GB/s
    dtype: str = 'bfloat16'  # of the two 16-bit formats, the one it multiplies at `half`; where both, bfloat16


# the first entry whose words are all in the device's name counts
GPUS = (
    GPU('B200', 2250, 1125, 180, 7700),
    GPU('H200', 989, 495, 141, 4800),
    GPU('H100 PCIe', 756, 378, 80, 2000),
    GPU('H100 NVL', 835, 418, 94, 3900),
    GPU('H100', 989, 495, 80, 3350),
    GPU('A100 80GB', 312, 156, 80, 1935),  # PCIe; SXM: 2039 GB/s
    GPU('A100', 312, 156, 40, 1555),
    GPU('L40S', 362, 183, 48, 864),
    GPU('L4', 121, 60, 24, 300),
    GPU('A6000', 155, 77, 48, 768),
    GPU('4090', 165, 83, 24, 1008),
    GPU('3090', 71, 36, 24, 936),
    GPU('V100 32GB', 125, 15.7, 32, 900, 'float16'),
    GPU('V100', 125, 15.7, 16, 900, 'float16'),
    GPU('T4', 65, 8.1, 16, 320, 'float16'),
    GPU('MI300X', 1307, 654, 192, 5300),
)


def gpu_of(device):
    """The entry of GPUS for a device, or None where there is none, as for CPUs."""
    if not device.startswith('cuda'):
        return None
    words = torch.cuda.get_device_name(device).replace('-', ' ').split()
    return next((gpu for gpu in GPUS if all(part in words for part in gpu.name.split())), None)


def peak_flops(device, dtype):
    """Peak FLOP/s of a GPU for matrix multiplications in `dtype`, or None where it is unknown, as for CPUs."""
    gpu = gpu_of(device)
    return 1e12 * (gpu.single if dtype == 'float32' else gpu.half) if gpu else None


# ---- several processes -----------------------------------------------------------------------------------------------


@dataclass
class Processes:
    """This process's place among those that torchrun started; a single process is rank 0 of 1."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    def sum(self, tensor):
        """The sum of a CPU tensor over all processes (all-reduce, in place)."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def any(self, flag):
        """True, in every process, where `flag` is true in at least one."""
        return bool(self.sum(torch.tensor(int(bool(flag)))).item())

    def min(self, number):
        """The minimum of an int over all processes."""
        tensor = torch.tensor(number)
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MIN)
        return int(tensor)

    def agreed_dtype(self, dtype):
        """`dtype` where all processes picked it, otherwise 'float32': GPUs and CPUs may differ between nodes."""
        number = list(DTYPES).index(dtype)
        return dtype if self.min(number) == -self.min(-number) else 'float32'

    def broadcast_model(self, model):
        """
        Copy rank 0's parameters to the model of every process, in place.

        A conversion from MHA rounds differently on different GPUs, and `shard` takes each process's own values: call
        this between the two. (DistributedDataParallel broadcasts by itself.)
        """
        if self.world_size > 1:
            for parameter in model.parameters():
                torch.distributed.broadcast(parameter.detach(), src=0)

    def exit(self, code=0):
        """
        End this process. Under torchrun by os._exit: tearing down torch.distributed's threads occasionally aborts a
        process that has finished (torch 2.13, gloo), and the job with it.
        """
        if self.world_size > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        sys.exit(code)


def join_processes(device, backend='nccl'):
    """
    Join the process group that torchrun describes in the environment, if any. Returns (Processes, device).

    Each process gets its own GPU. `backend` is for GPU tensors; CPU tensors always use gloo. UserError where there are
    fewer GPUs than processes, or `device` names one GPU for all of them.
    """
    if 'RANK' not in os.environ:
        return Processes(), device
    ranks = Processes(*(int(os.environ[name]) for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')))
    if device.startswith('cuda:') and int(os.environ.get('LOCAL_WORLD_SIZE', 1)) > 1:
        raise UserError(f'{device} cannot be shared by the processes of this node; use --device=cuda, with which each '
                        'has a GPU of its own, or CUDA_VISIBLE_DEVICES to choose among them')  # fmt: skip
    if device == 'cuda':
        if ranks.local_rank >= torch.cuda.device_count():
            raise UserError(
                f'process {ranks.local_rank} of this node has no GPU, as there are only {torch.cuda.device_count()}; '
                'lower --nproc_per_node, or use --device=cpu'
            )
        device = f'cuda:{ranks.local_rank}'
        torch.cuda.set_device(device)
    if ranks.world_size > 1:
        backends = f'cpu:gloo,cuda:{backend}' if device.startswith('cuda') else 'gloo'
        hook = sys.excepthook
        limit = datetime.timedelta(minutes=10)
        store, rank, world_size = next(torch.distributed.rendezvous('env://', timeout=limit))
        if os.environ.get('GROUP_WORLD_SIZE') == '1':
            # On one node the store survives a restart by torchrun, and holds addresses of processes that died.
            # (On several nodes, each counts its own restarts: see --max-restarts in the README.)
            attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
            store = torch.distributed.PrefixStore(f'attempt {attempt}', store)
        torch.distributed.init_process_group(backends, timeout=limit, store=store, rank=rank, world_size=world_size)
        sys.excepthook = hook  # PyTorch's own would hide the one line of a UserError
    return ranks, device


def shard(model, device, compile=False):
    """
    Shard a model's parameters over all processes, and with them gradients and optimizer state (FSDP2, ZeRO-3).

    Each block of model.transformer.h is gathered on `device` while it is needed. The model may exceed one device's
    memory: it moves there from the CPU block by block. Parameters stay float32; autocast's copies, 2 bytes per
    parameter, are whole on each device. Source: arXiv:1910.02054 (ZeRO).
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = torch.distributed.init_device_mesh(device.split(':')[0], (torch.distributed.get_world_size(),))
    for block in model.transformer.h:
        if compile:
            block.compile()  # one by one: between blocks there is only communication
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, 'window_losses')


# ---- randomness ------------------------------------------------------------------------------------------------------


def seed_dropout(seed, iteration, micro_step, rank):
    """Seed the dropout masks of one forward pass by these numbers alone, so that a resumed run draws the same masks."""
    digest = hashlib.sha256(f'{seed}:{iteration}:{micro_step}:{rank}'.encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], 'little') >> 1)
