"""Drawing tokens and decoding texts: `draw`, `GPT.generate` and the step of fixed shape."""

import pytest
import torch
from test_cache import BLOCK, VARIANTS, assert_close, make, tokens

from core.decoding import FixedStep, draw


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
@pytest.mark.parametrize('prompt', [3, BLOCK, BLOCK + 9])
def test_generate_past_block_size(variant, prompt):
    """A full cache is refilled with the most recent half; without a cache the window slides, as nanoGPT's does."""
    model, idx = make(variant), tokens(2, prompt)
    full = max(prompt, BLOCK)  # the length at which the cache is first full

    def refilled(end):
        if end <= full:
            return max(0, end - BLOCK)
        return full + 1 - BLOCK // 2 + (end - full - 1) // (BLOCK // 2 + 1) * (BLOCK // 2 + 1)

    assert torch.equal(generated(model, idx, 70), reference(model, idx, 70, refilled))
    sliding = reference(model, idx, 40, lambda end: max(0, end - BLOCK))
    assert torch.equal(generated(model, idx, 40, use_cache=False), sliding)


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
@pytest.mark.parametrize('variant', VARIANTS)
def test_captured_step(variant):
    """The CUDA graph: the same text as the ordinary step's."""
    model, idx = make(variant).cuda(), tokens(3, 9).cuda()
    texts = [
        model.generate(idx, 70, generator=torch.Generator('cuda').manual_seed(3), fixed=fixed)
        for fixed in (True, False)
    ]
    assert torch.equal(*texts)


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
