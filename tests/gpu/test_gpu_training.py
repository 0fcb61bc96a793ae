"""Training on CUDA: the losses of the CPU in float32, to the rounding of each dtype; compiled, resumed and sharded."""

import subprocess
import sys

import pytest
import torch
from conftest import REHEARSAL
from support.training import ROOT, SCRIPTS, assert_same_curve, environment, log_of, torchrun
from support.training import run as run_training

KEYS = {'mha': dict(bias=True), 'mla': dict(bias=True, pos='rope', n_latent_q=12, latent_norm=True)}
TOLERANCE = {'float32': 1e-2, 'bfloat16': 0.03}  # float32 multiplies in TF32, which alone moves these losses by .002
DTYPES = [*TOLERANCE, pytest.param('float16', marks=pytest.mark.cuda)]


def run(*arguments, **keys):
    """A training, in a process of its own on a GPU: CUDA doesn't survive a fork."""
    return run_training(*arguments, **keys, fresh=not REHEARSAL)


@pytest.fixture(scope='module', params=SCRIPTS)
def on_cpu(request, data_dir, tmp_path_factory):
    """(attention, the folder of its run on the CPU)."""
    folder = tmp_path_factory.mktemp('cpu') / request.param
    assert run(SCRIPTS[request.param], data_dir, folder, **KEYS[request.param]).returncode == 0
    return request.param, folder


def assert_learned_the_same(one, other, dtype):
    """float16 skips its first steps, until the scale of the loss has become small enough."""
    if dtype in TOLERANCE:
        assert_same_curve(one, other, TOLERANCE[dtype])
    else:
        last, first = (float(log_of(other)[row]['val_loss']) for row in (-1, 0))
        assert last < first - 0.5 and abs(last - float(log_of(one)[-1]['val_loss'])) < 0.3


@pytest.mark.parametrize('compile', [False, pytest.param(True, marks=pytest.mark.cuda)])
@pytest.mark.parametrize('dtype', DTYPES)
def test_a_gpu_learns_as_a_cpu_does(dtype, compile, on_cpu, data_dir, tmp_path, device):
    attention, folder = on_cpu
    keys = dict(KEYS[attention], device=device, dtype=dtype, compile=compile)
    done = run(SCRIPTS[attention], data_dir, tmp_path, **keys)
    assert done.returncode == 0, done.stderr
    assert_learned_the_same(folder, tmp_path, dtype)


@pytest.mark.parametrize('changes', [dict(recompute=True), dict(optimizer='muon'), dict(dropout=0.2)], ids=str)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(changes, data_dir, tmp_path, device):
    """The same batches and dropout masks: the losses of a run that wasn't stopped, to the rounding of TF32."""
    keys = dict(changes, device=device, dtype='float32')
    whole, stopped = tmp_path / 'whole', tmp_path / 'stopped'
    for folder, more in ((whole, {}), (stopped, dict(max_iters=10)), (stopped, dict(resume='yes'))):
        done = run('train_mla.py', data_dir, folder, **keys, **more)
        assert done.returncode == 0, done.stderr
    assert_same_curve_after(whole, stopped, 10)


def assert_same_curve_after(whole, stopped, iteration):
    """Each iteration's loss from `iteration` on; the stopped run's own end was evaluated there a second time."""
    rows = [{int(row['iter']): row for row in log_of(folder)} for folder in (whole, stopped)]
    assert rows[0].keys() == rows[1].keys()
    for number in range(iteration, max(rows[0]) + 1):
        for name in ('loss', 'val_loss'):
            one, other = (found[number][name] for found in rows)
            assert bool(one) == bool(other) and (not one or abs(float(one) - float(other)) <= 1e-2), (number, name)


def test_one_process_of_torchrun_learns_as_a_cpu_does(on_cpu, data_dir, tmp_path):
    attention, folder = on_cpu
    keys = dict(KEYS[attention], device='auto' if torch.cuda.is_available() else 'cpu', dtype='bfloat16', fsdp=True)
    done = run(SCRIPTS[attention], data_dir, tmp_path, torchrun(1), **keys)
    assert done.returncode == 0, done.stderr
    assert_learned_the_same(folder, tmp_path, 'bfloat16')


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two CUDA GPUs')
@pytest.mark.parametrize('fsdp', [False, True])
@pytest.mark.parametrize('dtype', DTYPES)
def test_two_gpus_learn_as_a_cpu_does(dtype, fsdp, on_cpu, data_dir, tmp_path):
    attention, folder = on_cpu
    keys = dict(KEYS[attention], device='cuda', dtype=dtype, fsdp=fsdp)
    keys.update(batch_size=4, gradient_accumulation_steps=2, eval_iters=8)  # the same batches and windows
    done = run(SCRIPTS[attention], data_dir, tmp_path, torchrun(2), **keys)
    assert done.returncode == 0, done.stderr
    assert_learned_the_same(folder, tmp_path, dtype)


PARALLEL = """
import sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from core.runs import processes
from model_mla import MLAGPT, MLAConfig
device = sys.argv[1]
on_gpu = device.startswith('cuda')
if on_gpu:
    torch.cuda.set_device(device)
dist.init_process_group('nccl' if on_gpu else 'gloo', store=dist.HashStore(), rank=0, world_size=1)
idx = torch.arange(32, device=device).view(2, 16)
for way in ('plain', 'ddp', 'fsdp'):
    model = MLAGPT(MLAConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32), seed=3)
    if way == 'fsdp':
        processes.shard(model, device, False)
    model.to(device)
    call = DistributedDataParallel(model, [torch.device(device)] if on_gpu else None) if way == 'ddp' else model
    loss = call(idx, idx)[1]
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    print(loss.item(), norm.full_tensor().item() if way == 'fsdp' else norm.item())
dist.destroy_process_group()
"""


def test_ddp_and_fsdp_of_one_process_change_nothing(device):
    """Over NCCL on a GPU. train.py uses neither for a single process."""
    command = [sys.executable, '-c', PARALLEL, device]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    plain, *others = ([float(number) for number in line.split()] for line in done.stdout.splitlines())
    assert len(others) == 2
    for other in others:
        assert other == pytest.approx(plain, rel=1e-3)


@pytest.mark.cuda
def test_a_lack_of_memory_ends_in_one_line(data_dir, tmp_path, device):
    huge = dict(batch_size=100_000, n_embd=2048, n_layer=24, device=device)
    done = run('train.py', data_dir, tmp_path, **huge)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert done.stderr.splitlines()[-1].startswith('error: out of memory')


@pytest.mark.cuda
def test_picking_a_gpu_opens_no_context():
    program = (
        "from core.cli import machine; import torch; print(machine.pick_device('cuda'), torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, env=environment())
    assert done.stdout == 'cuda False\n', done.stderr
