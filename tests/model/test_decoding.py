"""Drawing tokens and decoding texts: `draw`, `GPT.generate` and the step of fixed shape."""

import pytest
import torch
from support.fake_cuda import FakeCuda
from support.models import BLOCK, VARIANTS, assert_close, make, tokens

from ops.decoding import FixedStep, draw


def test_draw_follows_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.2, 1e-9]).log().expand(20000, 4)
    shares = torch.bincount(draw(logits, generator=torch.Generator().manual_seed(0)), minlength=4) / 20000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2, 0.0]), rtol=0, atol=0.015)


# ---- generate --------------------------------------------------------------------------------------------------------


def reference(model, idx, new, window, **rules):
    """A plain loop without a cache. window(end): where what the model sees of the first `end` tokens begins."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _ in range(new):
            logits, _ = model(idx[:, window(idx.size(1)) :])
            idx = torch.cat((idx, draw(logits[:, -1], generator=generator, **rules)[:, None]), dim=1)
    return idx


def generated(model, idx, new, **settings):
    return model.generate(idx, new, generator=torch.Generator().manual_seed(3), **settings)


@pytest.mark.parametrize('variant', VARIANTS)
def test_generate_within_block_size(variant):
    model, idx = make(variant), tokens(2, 4)
    expected = reference(model, idx, 28, lambda end: 0, top_k=20)
    assert torch.equal(generated(model, idx, 28, top_k=20), expected)
    assert torch.equal(generated(model, idx, 28, top_k=20, use_cache=False), expected)


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('prompt', [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (BLOCK, BLOCK + 9))])
def test_generate_past_block_size(variant, prompt):
    """A full cache is refilled with the most recent half; without a cache the window slides, as nanoGPT's does."""
    model, idx = make(variant), tokens(2, prompt)
    full = max(prompt, BLOCK)  # the length at which the cache is first full
    refills, slides = full - prompt + 40, full - prompt + 10  # how many tokens are drawn: two refills, a few slides

    def refilled(end):
        if end <= full:
            return max(0, end - BLOCK)
        return full + 1 - BLOCK // 2 + (end - full - 1) // (BLOCK // 2 + 1) * (BLOCK // 2 + 1)

    assert torch.equal(generated(model, idx, refills), reference(model, idx, refills, refilled))
    sliding = reference(model, idx, slides, lambda end: max(0, end - BLOCK))
    assert torch.equal(generated(model, idx, slides, use_cache=False), sliding)


@pytest.mark.parametrize('variant', VARIANTS)
def test_fixed_step(variant):
    """The step that a GPU captures, run here as it is written: the same logits, and the same text past block_size."""
    model, idx = make(variant), tokens(3, 9)
    ordinary, fixed = model.init_cache(3), model.init_cache(3)
    with torch.no_grad():
        model(idx, cache=ordinary), model(idx, cache=fixed)
        step = FixedStep(model, fixed)
        for t in range(BLOCK - 9):
            token = tokens(3, 1, seed=t)
            assert_close(step(token), model(token, cache=ordinary)[0])
            assert fixed.length == ordinary.length
    settings = dict(num_samples=2, top_p=0.9)
    assert torch.equal(generated(model, idx, 70, fixed=True, **settings), generated(model, idx, 70, **settings))


@pytest.mark.slow
@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('as_on_cuda', [False, True])
@torch.no_grad()
def test_steps_under_autocast(variant, as_on_cuda, monkeypatch):
    """The cache is in bfloat16, and both kinds of step give float32's logits to bfloat16's rounding."""
    if as_on_cuda:  # there autocast computes norms in float32, and returns them so
        for name in ('rms_norm', 'layer_norm'):
            own = getattr(torch.nn.functional, name)
            monkeypatch.setattr(torch.nn.functional, name, lambda x, *rest, own=own: own(x.float(), *rest))
    model, idx = make(variant, torch.float32), tokens(3, BLOCK)
    expected = model(idx, idx)[0]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        ordinary, fixed = model.init_cache(3), model.init_cache(3)
        model(idx[:, :9], cache=ordinary), model(idx[:, :9], cache=fixed)
        step = FixedStep(model, fixed)
        for t in range(9, BLOCK):
            for logits in (step(idx[:, t : t + 1]), model(idx[:, t : t + 1], cache=ordinary)[0]):
                assert (logits - expected[:, t : t + 1]).abs().max() <= 0.1 * expected.abs().max()
    assert {t.dtype for cache in (ordinary, fixed) for layer in cache.layers for t in layer} == {torch.bfloat16}


@torch.no_grad()
def test_a_step_is_captured_on_the_gpu_of_its_cache(monkeypatch):
    """On cuda:1 while cuda:0 is current, after a capture on cuda:0: all of the step is in the graph."""
    cuda = FakeCuda(9, 9).install(monkeypatch)
    for index in (0, 1):
        model, idx = make('mla'), tokens(3, 9)
        ordinary, fixed = model.init_cache(3), model.init_cache(3)
        model(idx, cache=ordinary), model(idx, cache=fixed)

        def on_gpu(token, cache, model=model, index=index):
            return cuda.launch(f'cuda:{index}', lambda: model(token, cache=cache)[0]), None

        cuda.contexts.clear()
        step = FixedStep(on_gpu, fixed)
        step.device = torch.device('cuda', index)
        step.capture()
        for t in range(BLOCK - 9):
            token = tokens(3, 1, seed=t)
            assert_close(step(token), model(token, cache=ordinary)[0])
        assert len(step.graph.kernels) == 1 and cuda.contexts == {index} and cuda.current == 0


def test_samples_share_the_prefill(monkeypatch):
    """Three samples of two prompts: one pass over the two prompts, then steps of six rows."""
    model, idx = make('mla'), tokens(2, 8)
    shapes = []
    hidden = model.hidden
    monkeypatch.setattr(model, 'hidden', lambda idx, cache=None: shapes.append(tuple(idx.shape)) or hidden(idx, cache))
    out = generated(model, idx, 5, num_samples=3)
    assert shapes == [(2, 8)] + [(6, 1)] * 4
    assert torch.equal(out[:, :8], idx.repeat_interleave(3, dim=0))
    repeated = generated(model, idx.repeat_interleave(3, dim=0), 5)
    assert torch.equal(out, repeated)


def test_a_temperature_near_zero_draws_the_most_likely_id():
    logits = torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(logits, 1e-39), draw(logits, 0))
