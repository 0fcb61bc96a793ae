"""Decoding on CUDA: captured steps, under autocast and on a second GPU."""

import subprocess
import sys

import pytest
import torch
from support.models import BLOCK, VARIANTS, make, tokens
from support.training import ROOT, environment, run

from core.cli import machine
from ops.decoding import FixedStep
from ops.kernels import fast_attention

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two CUDA GPUs')


def text(model, idx, **settings):
    generator = torch.Generator(idx.device).manual_seed(3)
    return model.generate(idx, 70, generator=generator, **settings).cpu()


@pytest.mark.parametrize('samples', [1, 3])
@pytest.mark.parametrize('variant', VARIANTS)
def test_a_captured_step_gives_the_same_text(variant, samples, device):
    """70 tokens of a context of 32: the cache becomes full, and is filled again."""
    model, idx = make(variant).to(device), tokens(samples, 9).to(device)
    assert torch.equal(text(model, idx, fixed=True), text(model, idx, fixed=False))


@pytest.mark.parametrize('variant', VARIANTS)
@torch.no_grad()
def test_captured_steps_under_autocast(variant, device):
    """Until the cache is full."""
    model, idx = make(variant, torch.float32).to(device), tokens(3, BLOCK).to(device)
    expected = model(idx, idx)[0]
    with machine.autocast(device, 'bfloat16'):
        cache = model.init_cache(3)
        model(idx[:, :9], cache=cache)
        step = FixedStep(model, cache)
        for t in range(9, BLOCK):
            difference = (step(idx[:, t : t + 1]) - expected[:, t : t + 1]).abs().max()
            assert difference <= 0.1 * expected.abs().max()
    assert cache.length == BLOCK
    assert {t.dtype.itemsize for layer in cache.layers for t in layer} == {2}


@pytest.mark.cuda
@two_gpus
@pytest.mark.parametrize('variant', VARIANTS)
def test_a_step_is_captured_on_the_gpu_of_its_cache(variant):
    """While the other GPU is current, and after a capture there."""
    model, idx = make(variant), tokens(3, 9)
    texts = [text(model.to(f'cuda:{index}'), idx.to(f'cuda:{index}')) for index in (0, 1)]
    assert torch.cuda.current_device() == 0
    assert torch.equal(*texts)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-9), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize('masked', [True, False])
@pytest.mark.parametrize('kv_heads, size', [(1, 384), (1, 64), (4, 64)])
def test_the_queries_of_a_step_attend_as_on_a_cpu(kv_heads, size, masked, dtype, tolerance, device):
    """To shared keys, with the mask of a captured step and without, and to latents of more than 256 numbers."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, rows, size, generator=generator, dtype=torch.float64)
               for heads, rows in ((12, 1), (kv_heads, 500), (kv_heads, 500)))  # fmt: skip
    q *= 8  # large scores
    visible = torch.arange(500)[None] < 400 if masked else None
    expected = fast_attention(q, k, v, size**-0.5, mask=visible)
    sent = (tensor.to(device, dtype) for tensor in (q, k, v))
    y = fast_attention(*sent, size**-0.5, mask=visible if visible is None else visible.to(device)).cpu().double()
    assert (y - expected).norm() <= tolerance * expected.norm()


def test_sampling(device, data_dir, tmp_path):
    """sample.py prints the text that it prints without a CUDA graph."""
    assert run('train_mla.py', data_dir, tmp_path, max_iters=10).returncode == 0
    keys = dict(out_dir=tmp_path, start='abc', device=device, dtype='float32', temperature=0, num_samples=1)
    texts = []
    for compile in ('auto', False):
        arguments = [f'--{key}={value}' for key, value in dict(keys, compile=compile, max_new_tokens=40).items()]
        done = subprocess.run(
            [sys.executable, 'sample.py', *arguments], cwd=ROOT, capture_output=True, text=True, env=environment()
        )
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    assert texts[0] == texts[1]
