"""
The processes of a training run: joining those that torchrun started, what they agree on, sharding, and their seeds.
"""

import datetime
import hashlib
import os
import sys
from dataclasses import dataclass
from typing import NoReturn

import torch

from core.cli import errors, machine
from core.cli.errors import UserError
from core.cli.machine import DTYPES

# how many tasks srun, Open MPI or an MPI of MPICH's family started together with this one
TASKS = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE', 'PMI_SIZE')


@dataclass
class Processes:
    """This process's place among those that torchrun started; a single process is rank 0 of 1."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a CPU tensor over all processes (all-reduce, in place)."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def count(self) -> str:
        """'1 process', '2 processes', ..."""
        return f'{self.world_size} process{"es" if self.world_size > 1 else ""}'

    def share_of(self, number: int, key: str) -> int:
        """What each process has of a number that a key gives for all. UserError where it can't be divided equally."""
        if number % self.world_size:
            raise UserError(f'{key}={number} cannot be divided equally among {self.count()}; choose a multiple')
        return number // self.world_size

    def any(self, flag: object) -> bool:
        """True, in every process, where `flag` is true in at least one."""
        return bool(self.sum(torch.tensor(int(bool(flag)))).item())

    def min(self, number: int) -> int:
        """The minimum over all processes."""
        tensor = torch.tensor(number)
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MIN)
        return int(tensor)

    def agree(self, number: int) -> bool:
        """True, in every process, where all have the same number."""
        return self.min(number) == -self.min(-number)

    def agreed_dtype(self, dtype: str) -> str:
        """`dtype` where all processes picked it, otherwise 'float32': GPUs and CPUs may differ between nodes."""
        return dtype if self.agree(list(DTYPES).index(dtype)) else 'float32'

    def exit(self, code: int = 0) -> NoReturn:
        """
        End this process. Under torchrun by os._exit: tearing down torch.distributed's threads occasionally aborts a
        process that has finished (torch 2.13, gloo), and the job with it.
        """
        if self.world_size > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        sys.exit(code)


def place_in_environment() -> Processes:
    """
    This process's place by RANK, LOCAL_RANK and WORLD_SIZE, which torchrun sets; UserError where they are incomplete.

    Launchers that set no LOCAL_RANK (Kubeflow's, srun with RANK exported) start a process per pod, or tell its number
    in SLURM_LOCALID; otherwise ranks take a node's GPUs in turn.
    """
    if 'RANK' not in os.environ:
        tasks = max(int(os.environ.get(name) or 1) for name in TASKS)
        if tasks > 1:
            hint = 'to train together, start one task per node that runs torchrun (see slurm_scripts/)'
            errors.notice(f'{tasks} tasks were started without torchrun, and each trains by itself; {hint}')
        return Processes()
    turn = int(os.environ['RANK']) % max(1, torch.cuda.device_count()) if os.environ['RANK'].isdigit() else 0
    local_rank = os.environ.get('LOCAL_RANK') or os.environ.get('SLURM_LOCALID') or str(turn)
    numbers = (os.environ['RANK'], local_rank, os.environ.get('WORLD_SIZE', ''))
    missing = [name for name in ('MASTER_ADDR', 'MASTER_PORT') if name not in os.environ]
    if not all(number.isdigit() for number in numbers) or (missing and numbers[2] != '1'):
        hint = 'use torchrun, which sets them all, or unset RANK for a single process'
        raise UserError(f'RANK={numbers[0]} is set, and WORLD_SIZE, MASTER_ADDR or MASTER_PORT is not; {hint}')
    return Processes(*map(int, numbers))


def join_processes(device: str, backend: str = 'nccl') -> tuple[Processes, str]:
    """
    Join the process group that torchrun describes, if any: (Processes, device), a GPU for each process. `backend` is
    for GPU tensors; CPU tensors always use gloo. UserError where a process can't have a GPU of its own.
    """
    ranks = place_in_environment()
    if 'RANK' not in os.environ:
        return ranks, device
    if device.startswith('cuda:') and int(os.environ.get('LOCAL_WORLD_SIZE', 1)) > 1:
        hint = 'use --device=cuda, with which each has its own, or CUDA_VISIBLE_DEVICES to choose among them'
        raise UserError(f'{device} cannot be shared by the processes of this node; {hint}')
    if device == 'cuda':
        if ranks.local_rank >= torch.cuda.device_count():
            there = f'process {ranks.local_rank} of this node has no GPU, as there are only {torch.cuda.device_count()}'
            raise UserError(f'{there}; lower --nproc_per_node, or use --device=cpu')
        device = f'cuda:{ranks.local_rank}'
        torch.cuda.set_device(device)
    if ranks.world_size > 1:
        backends = f'cpu:gloo,cuda:{backend}' if device.startswith('cuda') else 'gloo'
        hook = sys.excepthook
        limit = datetime.timedelta(minutes=10)
        store, rank, world_size = next(torch.distributed.rendezvous('env://', timeout=limit))
        if os.environ.get('GROUP_WORLD_SIZE') == '1':
            # On one node the store survives a restart by torchrun, and holds addresses of processes that died.
            # (On several nodes, each counts its own restarts: see docs/cluster.md.)
            attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
            store = torch.distributed.PrefixStore(f'attempt {attempt}', store)
        torch.distributed.init_process_group(backends, timeout=limit, store=store, rank=rank, world_size=world_size)
        sys.excepthook = hook  # PyTorch's own would hide the one line of a UserError
    return ranks, device


def start(device: str, backend: str, threads: int, compile: bool | str) -> tuple[Processes, str, int, bool]:
    """Join the process group, if any; set up the machine: (processes, device, CPU threads, compile), none 'auto'."""
    processes, device = join_processes(machine.pick_device(device), backend)
    threads = machine.set_threads(threads)
    compiles = device.startswith('cuda') if compile == 'auto' else bool(compile)
    if compiles:
        machine.prepare_compiler(device)
    if device == 'cpu':
        machine.keep_freed_memory()
    torch.set_float32_matmul_precision('high')  # TF32 for what stays float32 on a GPU
    return processes, device, threads, compiles


def shard(model: torch.nn.Module, device: str, compile: bool = False) -> None:
    """
    Shard a model's parameters over all processes, and with them gradients and optimizer state (FSDP2, ZeRO-3).

    Each block is gathered on `device` while it is needed, and moves there from the CPU by itself: the model may exceed
    one device's memory. Parameters stay float32; autocast's copies are whole on each device. Source: arXiv:1910.02054.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for parameter in model.parameters():  # a conversion may round differently on each process, which would keep its own
        torch.distributed.broadcast(parameter.detach(), src=0)
    mesh = torch.distributed.init_device_mesh(device.split(':')[0], (torch.distributed.get_world_size(),))
    for block in model.get_submodule('transformer.h').children():
        if compile:
            block.compile()  # one by one: between blocks there is only communication
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, 'window_losses')


def seed_dropout(seed: int, iteration: int, micro_step: int, rank: int) -> None:
    """Seed the dropout masks of one forward pass by these numbers alone, so that a resumed run draws the same masks."""
    digest = hashlib.sha256(f'{seed}:{iteration}:{micro_step}:{rank}'.encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], 'little') >> 1)
