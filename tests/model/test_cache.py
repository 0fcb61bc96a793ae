"""The caches: the same logits as without, of exactly the promised size, and no work space that grows with context."""

import pytest
import torch
from support.models import BLOCK, MLA, VARIANTS, assert_close, make, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig
from ops.kernels import keep_casts

ABSORBED = [name for name in MLA if name != 'mla-whole-keys']  # whose rotation rules out absorbing


# ---- cached = uncached, absorbed = decompressed ----------------------------------------------------------------------


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('variant', VARIANTS)
@torch.no_grad()
def test_cached_is_uncached(variant, dtype):
    model = make(variant, dtype)
    for B in (1, 3):
        idx = tokens(B, BLOCK)
        expected, _ = model(idx, idx)
        for chunks in ([1] * BLOCK, [5, 1, 7, 19], [31, 1], [2] * 16, [20, 12], [BLOCK]):
            cache, logits, end = model.init_cache(B), [], 0
            for n in chunks:
                logits.append(model.lm_head(model.hidden(idx[:, end : end + n], cache)))
                end += n
                assert cache.length == end
            assert_close(torch.cat(logits, dim=1), expected)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('variant', ABSORBED)
@torch.no_grad()
def test_absorbed_is_decompressed(variant, dtype, monkeypatch):
    """One layer, at any number of queries over a full cache of latents."""
    model = make(variant, dtype)
    attention, rope = model.transformer.h[0].attn, model.rope
    for B in (1, 3):
        x = torch.randn(B, BLOCK, 32, generator=torch.Generator().manual_seed(1), dtype=dtype)
        for T in (1, 2, 9, BLOCK):
            found = []
            for pays in (True, False):
                monkeypatch.setattr(attention, 'absorbing_pays', lambda T, pays=pays: pays)
                cache = model.init_cache(B)
                cache.append(0, attention.latent(x, rope)[:, : BLOCK - T])
                cache.length = BLOCK - T
                new = None if rope is None else rope[:, BLOCK - T :]
                found.append(attention(x[:, BLOCK - T :], new, cache))
            assert_close(*found)


@pytest.mark.parametrize('variant', ABSORBED)
@torch.no_grad()
def test_both_paths_through_the_model(variant, monkeypatch):
    model, idx = make(variant), tokens(2, BLOCK)
    expected, _ = model(idx, idx)
    attention = type(model.transformer.h[0].attn)
    for pays in (True, False):
        calls = []
        monkeypatch.setattr(
            attention, 'absorbing_pays', lambda self, T, pays=pays, calls=calls: calls.append(T) or pays
        )
        cache = model.init_cache(2)
        logits = [model.lm_head(model.hidden(part, cache)) for part in idx.split([9, 1, 22], dim=1)]
        assert_close(torch.cat(logits, dim=1), expected)
        assert calls == [9, 9, 1, 1, 22, 22]


def test_cost_rule():
    """Absorbing pays for T < r d / (r - d): T of 76, not 77, at GPT-2's size with r = 384; always where r <= d."""
    attention = MLAGPT(MLAConfig(block_size=8, vocab_size=8, n_layer=1, n_latent=384)).transformer.h[0].attn
    assert [attention.absorbing_pays(T) for T in (1, 76, 77, 1024)] == [True, True, False, False]
    attention.n_latent = 64
    assert attention.absorbing_pays(10**6)


def test_one_latent_for_all_heads_is_kept():
    """The parts of a cache's views: T tokens of one latent, no heads."""
    model = make('mla-rope')
    cache = model.init_cache(2)
    model(tokens(2, 5), cache=cache)
    assert [[t.shape for t in layer] for layer in cache.layers] == [[(2, BLOCK, 16 + 4)]] * 2


# ---- size ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('variant, numbers', [
    ('gqa', 2 * 16), ('mqa-rope', 2 * 8), ('mha', 2 * 32), ('mha-rope', 2 * 32),
    ('mla', 16), ('mla-thin', 6), ('mla-full', 32), ('mla-norm', 20),
    ('mla-rope', 16 + 4), ('mla-rope-all', 12 + 6),
])  # fmt: skip
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_bytes(variant, numbers, dtype):
    """2C numbers per token and layer for MHA, r (+ R) for MLA: that and not a byte more is allocated."""
    model = make(variant).to(dtype)
    for B, T in ((1, BLOCK), (3, 7)):
        with Allocations(model) as seen:
            cache = model.init_cache(B, T)
        expected = B * T * numbers * 2 * dtype.itemsize  # two layers
        assert cache.nbytes == expected == sum(seen.sizes)
        assert cache.bytes_per_token == numbers * 2 * dtype.itemsize


def test_bytes_at_gpt2_size():
    """The published figures: 36,864 bytes per token in bfloat16, and 4, 8, 16 times less."""
    with torch.device('meta'):
        models = [GPT(GPTConfig())] + [MLAGPT(MLAConfig(n_latent=r)) for r in (384, 192, 96)]
    sizes = [model.init_cache(1, dtype=torch.bfloat16).bytes_per_token for model in models]
    assert sizes == [36864, 9216, 4608, 2304]


def test_cache_has_the_dtype_of_autocast():
    model = make('mla', torch.float32)
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        cache = model.init_cache(2)
        idx = tokens(2, 12)
        expected, _ = model(idx)
        for t in range(12):
            logits, _ = model(idx[:, t : t + 1], cache=cache)
    assert cache.layers[0][0].dtype == torch.bfloat16
    assert (logits - expected).abs().max() <= 0.05 * expected.abs().max()


def test_more_than_the_cache_holds():
    model = make('mha')
    with pytest.raises(ValueError, match='max_tokens=32'):
        model(tokens(1, 1), cache=filled(model, BLOCK))
    with pytest.raises(ValueError, match='7'):
        model(tokens(1, 8), cache=model.init_cache(1, 7))


def filled(model, length, B=1):
    """A cache with room for one more step, whose tokens are never looked at here."""
    cache = model.init_cache(B)
    cache.length = length
    return cache


# ---- work space ------------------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Records the bytes of every new storage that an operation returns; views, and writing in place, make none."""

    def __init__(self, model):
        super().__init__()
        self.known = {parameter.untyped_storage().data_ptr() for parameter in [*model.parameters(), *model.buffers()]}
        self.sizes, self.kept = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self.known.add(leaf.untyped_storage().data_ptr())
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                self.kept.append(leaf)  # so that no address is used twice
                self.known.add(leaf.untyped_storage().data_ptr())
                self.sizes.append(leaf.untyped_storage().nbytes())
        return out


@torch.no_grad()
def step_allocations(model, length, B=2):
    """The bytes that each operation of one decoding step behind `length` tokens allocates."""
    cache = filled(model, length, B)
    with Allocations(model) as seen:
        model(tokens(B, 1), cache=cache)
    return seen.sizes


@pytest.mark.parametrize('variant', [name for name in VARIANTS if not name.endswith(('open', 'whole-keys'))])
def test_a_step_allocates_nothing_that_grows(variant):
    """Every tensor that a step makes, in order, has the same size at context 10 and at context 600."""
    model = make(variant, torch.float32, block_size=640)
    assert step_allocations(model, 10) == step_allocations(model, 600)


def test_allocations_are_seen(monkeypatch):
    """The test above can fail: rebuilding keys and values makes tensors that grow, as attention in the open does."""
    attention = type(make('mla').transformer.h[0].attn)
    model = make('mha-open', torch.float32, block_size=640)
    assert step_allocations(model, 10) != step_allocations(model, 600)
    monkeypatch.setattr(attention, 'absorbing_pays', lambda self, T: False)
    model = make('mla', torch.float32, block_size=640)
    assert step_allocations(model, 10) != step_allocations(model, 600)


def allocator_bytes(model, length):
    """Bytes that PyTorch's allocator hands out during one step, kernels' own work space included."""
    cache, idx = filled(model, length, B=2), tokens(2, 1)
    with torch.no_grad():
        model(idx, cache=filled(model, length, B=2))
        with torch.profiler.profile(profile_memory=True) as profile:
            model(idx, cache=cache)
    return sum(
        e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == '[memory]' and e.nbytes() > 0
    )


@pytest.mark.parametrize('variant', ['mha', 'mla', 'mla-rope'])
def test_kernels_allocate_nothing_that_grows(variant):
    """Inside the kernels, too: SDPA takes keys in pieces of at most 512, so that its work space ends growing there."""
    model = make(variant, torch.float32, block_size=4096)
    short, long = allocator_bytes(model, 1000), allocator_bytes(model, 4000)
    assert 0 < short and long == short


# ---- weights under autocast ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_step_of_decoding_under_autocast_casts_no_weight():
    """After the first step all that a step allocates is smaller than the smallest of the weight matrices."""
    model = make('mla', torch.float32, n_embd=256, n_latent=128)
    smallest = min(p.numel() for name, p in model.named_parameters() if name.endswith('attn.c_kv_down.weight'))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        cache = filled(model, 10)
        with keep_casts():
            model(tokens(1, 1), cache=cache)
            with Allocations(model) as seen:
                model(tokens(1, 1), cache=cache)
    assert sum(seen.sizes) < smallest * torch.bfloat16.itemsize


@pytest.mark.parametrize('change', ['in place', 'load_state_dict', 'data'])
@torch.no_grad()
def test_a_cache_that_is_used_again_sees_changed_weights(change):
    model, idx = make('mla', torch.float32), tokens(2, 12)

    def decoded(cache):
        with torch.autocast('cpu', dtype=torch.bfloat16):
            cache = cache or model.init_cache(2)
            cache.length = 0
            return cache, torch.cat([model(part, cache=cache)[0] for part in idx.split(1, dim=1)], dim=1)

    cache, before = decoded(None)
    weight = model.transformer.h[0].attn.c_kv_up.weight
    if change == 'in place':
        weight.mul_(2)
    elif change == 'load_state_dict':
        model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})
    else:
        weight.data = 2 * weight.data
    after = decoded(cache)[1]
    assert torch.equal(after, decoded(None)[1]) and not torch.equal(after, before)


@torch.inference_mode()
def test_steps_of_a_model_made_in_inference_mode():
    model, idx = make('mla', torch.float32), tokens(2, 12)
    expected = model(idx, idx)[0]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        cache = model.init_cache(2)
        logits = torch.cat([model(part, cache=cache)[0] for part in idx.split(1, dim=1)], dim=1)
    assert (logits - expected).abs().max() <= 0.1 * expected.abs().max()
