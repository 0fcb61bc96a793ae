"""Decoding on CUDA: captured steps, under autocast and on a second GPU."""

import subprocess
import sys

import pytest
import torch
from test_cache import BLOCK, VARIANTS, make, tokens
from training import ROOT, environment, run

from core import runtime
from core.decoding import FixedStep

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
    with runtime.autocast(device, 'bfloat16'):
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


def test_sampling(device, data_dir, tmp_path):
    """sample.py prints the text that it prints without a CUDA graph."""
    assert run('train_mla.py', data_dir, tmp_path, max_iters=10).returncode == 0
    keys = dict(out_dir=tmp_path, start='abc', device=device, dtype='float32', temperature=0, num_samples=1)
    texts = []
    for compile in (True, False):
        arguments = [f'--{key}={value}' for key, value in dict(keys, compile=compile, max_new_tokens=40).items()]
        done = subprocess.run(
            [sys.executable, 'sample.py', *arguments], cwd=ROOT, capture_output=True, text=True, env=environment()
        )
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    assert texts[0] == texts[1]
