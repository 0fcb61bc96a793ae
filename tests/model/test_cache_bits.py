"""A cache in fewer bits: what is attended to is what is stored, whoever stored it and however a text is cut."""

from copy import deepcopy

import pytest
import torch
from support.models import BLOCK, MLA, VARIANTS, assert_close, make, tokens
from support.planted import randomized

from core.convert.bits import round_as, round_cached
from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig
from ops.cache import KINDS
from ops.decoding import FixedStep
from ops.packed import Form

PACKED = [kind for kind in KINDS if kind != 'float']


@pytest.mark.parametrize('kind', PACKED)
@pytest.mark.parametrize('variant', VARIANTS)
@torch.no_grad()
def test_cached_in_bits_is_the_full_pass_rounded_alike(variant, kind):
    model, idx = make(variant), tokens(3, BLOCK)
    exact = model(idx, idx)[0]
    expected = round_as(make(variant), kind)(idx, idx)[0]
    for chunks in ([1] * BLOCK, [5, 1, 7, 19], [31, 1], [BLOCK]):
        cache, parts = model.init_cache(3, kind=kind), idx.split(chunks, dim=1)
        assert_close(torch.cat([model.lm_head(model.hidden(part, cache)) for part in parts], dim=1), expected)
    change = (expected - exact).norm() / exact.norm()
    assert 1e-4 < change < (0.1 if kind == 'int8' else 0.8)


@pytest.mark.slow
@pytest.mark.parametrize('kind', PACKED)
@pytest.mark.parametrize('variant', ['mha', 'gqa', 'mqa-rope', 'mla', 'mla-rope', 'mla-norm', 'mla-whole-keys'])
def test_several_samples_refill_and_steps_of_fixed_shape(variant, kind):
    """A text that outgrows the cache: repeated prompts, and the step that a GPU captures, give the same tokens."""
    model, idx = make(variant), tokens(2, 9)

    def generated(prompt, **settings):
        rules = dict(temperature=0, cache=kind) | settings
        return model.generate(prompt, 40, **rules)

    out = generated(idx, num_samples=2)
    assert torch.equal(out, generated(idx.repeat_interleave(2, dim=0)))
    assert torch.equal(out, generated(idx, num_samples=2, fixed=True))
    if kind == 'int4':
        assert not torch.equal(out, model.generate(idx, 40, temperature=0, num_samples=2))


@pytest.mark.parametrize('kind', PACKED)
@pytest.mark.parametrize('variant', ['mha', 'mla', 'mla-rope'])
@torch.no_grad()
def test_steps_in_bfloat16(variant, kind):
    model, idx = make(variant, torch.float32), tokens(2, BLOCK)
    expected = round_as(make(variant, torch.float32), kind)(idx, idx)[0]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        ordinary, fixed = model.init_cache(2, kind=kind), model.init_cache(2, kind=kind)
        model(idx[:, :9], cache=ordinary), model(idx[:, :9], cache=fixed)
        step = FixedStep(model, fixed)
        for t in range(9, BLOCK):
            for logits in (step(idx[:, t : t + 1]), model(idx[:, t : t + 1], cache=ordinary)[0]):
                worst = (logits - expected[:, t : t + 1]).abs().max()
                assert worst <= {'int8': 0.08, 'int4': 0.3}[kind] * expected.abs().max()


@pytest.mark.parametrize('variant', ['mha', 'mqa-rope', *MLA])
@pytest.mark.parametrize('kind', PACKED)
def test_allocated_bytes_are_those_of_the_forms(variant, kind):
    model = make(variant)
    cache = model.init_cache(3, 7, kind=kind)
    layers = [[t.form.bytes * (t.low[0, ..., 0].numel() // 7) for t in layer] for layer in cache.layers]
    assert cache.bytes_per_token == sum(sum(layer) for layer in layers)
    assert cache.nbytes == 3 * 7 * cache.bytes_per_token < 0.4 * model.init_cache(3, 7).nbytes
    if model.config.n_rope and variant in MLA:
        assert cache.layers[0][0].form.wide == model.config.n_rope


def test_bytes_at_gpt2_size():
    """Per token: MHA's 36,864 in bfloat16 become 19,008 in int8; a latent of 384 takes 4,632 and in int4 2,592."""
    with torch.device('meta'):
        mha, mla = GPT(GPTConfig()), MLAGPT(MLAConfig(n_latent=384))
    sizes = [model.init_cache(1, 1, torch.float32, kind).bytes_per_token for model in (mha, mla) for kind in PACKED]
    assert sizes == [12 * 2 * 12 * 66, 12 * 2 * 12 * 36, 12 * 386, 12 * (192 + 24)]


def test_an_unknown_kind():
    with pytest.raises(ValueError, match="'int3'; choose float, int8, int4"):
        make('mla').init_cache(1, kind='int3')


@torch.no_grad()
def test_keys_and_values_with_one_large_number_are_kept():
    """As trained models have them: that number would set the scale of the others, if they weren't mixed."""
    config = GPTConfig(vocab_size=60, block_size=32, n_layer=2, n_head=2, n_embd=128)
    model, idx = randomized(GPT(config), 0.1).double().eval(), tokens(8, 32) % 60
    for block in model.transformer.h:
        rows, out = block.attn.c_attn, block.attn.c_proj.weight
        for large in (rows.weight, rows.bias):
            large[128::64] *= 30  # the first number of each head's key, and of its value
            large[:128:64] /= 30  # and of its query
        out[:, ::64] /= 30
    exact = model(idx, idx)[0]
    form = Form(64, **KINDS['int4'])
    plain = round_cached(deepcopy(model), lambda layer, x: form.rounded(x))(idx, idx)[0] - exact
    cache = model.init_cache(8, kind='int4')
    mixed = torch.cat([model(idx[:, t : t + 1], cache=cache)[0] for t in range(32)], dim=1) - exact
    assert mixed.square().mean() < 0.1 * plain.square().mean()
