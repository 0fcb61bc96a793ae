"""Training on CUDA: the losses of the CPU in float32, to the rounding of each dtype, compiled and sharded too."""

import subprocess
import sys

import pytest
import torch
from training import ROOT, SCRIPTS, assert_same_curve, environment, log_of, run, torchrun

KEYS = {'mha': dict(bias=True), 'mla': dict(bias=True, pos='rope', n_latent_q=12, latent_norm=True)}
TOLERANCE = {'float32': 2e-3, 'bfloat16': 0.03}  # float32 multiplies in TF32
DTYPES = [*TOLERANCE, 'float16']


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


@pytest.mark.parametrize('compile', [False, True])
@pytest.mark.parametrize('dtype', DTYPES)
def test_a_gpu_learns_as_a_cpu_does(dtype, compile, on_cpu, data_dir, tmp_path):
    attention, folder = on_cpu
    keys = dict(KEYS[attention], device='cuda', dtype=dtype, compile=compile, fresh=True)
    done = run(SCRIPTS[attention], data_dir, tmp_path, **keys)
    assert done.returncode == 0, done.stderr
    assert_learned_the_same(folder, tmp_path, dtype)


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


def test_picking_a_gpu_opens_no_context():
    program = "from core import runtime; import torch; print(runtime.pick_device('cuda'), torch.cuda.is_initialized())"
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, env=environment())
    assert done.stdout == 'cuda False\n', done.stderr
