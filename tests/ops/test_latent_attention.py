"""ops/latent_attention.py: the kernel gives the formula's numbers. Triton's interpreter runs it on a CPU."""

import pytest
import torch

triton = pytest.importorskip('triton', reason='PyTorch for a CPU has no Triton; requirements-test.txt has it')

from ops.latent_attention import attend_latents  # noqa: E402

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def formula(q, keys, values, scale, length):
    """softmax(q k^T scale) v in float64: q (B, H, size), keys and values (B, K, S, .), of which `length` are seen."""
    times = q.size(1) // keys.size(1)
    keys, values = (t[:, :, :length].double().repeat_interleave(times, dim=1) for t in (keys, values))
    return ((q.double()[:, :, None] * scale @ keys.mT).softmax(-1) @ values).squeeze(2)


def drawn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def filled(length):
    return torch.tensor([length], device=DEVICE)


@pytest.mark.parametrize(
    ('B', 'H', 'K', 'S', 'length', 'r', 'R', 'pieces'),
    [
        (1, 1, 1, 1, 1, 1, 0, 1),
        (2, 3, 1, 45, 38, 24, 8, 1),  # MLA with a position key
        (1, 12, 1, 131, 131, 33, 5, 3),  # pieces of unequal length
        (1, 2, 1, 200, 7, 16, 0, 7),  # most pieces hold no token yet
        (1, 17, 1, 40, 40, 20, 2, 2),  # one head more than a program has
        (2, 6, 3, 70, 69, 18, 6, 2),  # one latent per group of heads
        (1, 4, 1, 100, 99, 100, 0, 0),
    ],
)
def test_the_kernel_gives_the_formula_at_odd_sizes(B, H, K, S, length, r, R, pieces):
    q, latents = drawn(B, H, r + R), drawn(B, K, S, r + R, seed=2)
    latents[:, :, length:] = float('nan')  # what is not filled yet is never read
    y = attend_latents(q, latents, r, 0.3, filled(length), pieces=pieces)
    wanted = formula(q, latents, latents[..., :r], 0.3, length)
    assert y.shape == (B, H, r) and (y - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize('K', [1, 2, 6])
def test_grouped_queries_are_the_same_with_values_apart(K):
    q, keys, values = drawn(2, 6, 20), drawn(2, K, 75, 20, seed=2), drawn(2, K, 75, 20, seed=3)
    y = attend_latents(q, keys, 20, 0.2, filled(71), values=values, pieces=2)
    assert (y - formula(q, keys, values, 0.2, 71)).abs().max() < 1e-5


def test_latents_in_int8_are_scaled_per_token():
    exact = drawn(2, 1, 90, 40, seed=2)
    factors = exact.abs().amax(-1) / 127
    low = (exact / factors[..., None]).round().to(torch.int8)
    q = drawn(2, 5, 40)
    y = attend_latents(q, low, 32, 0.2, filled(83), factors=factors, pieces=2)
    stored = low * factors[..., None]
    assert (y - formula(q, stored, stored[..., :32], 0.2, 83)).abs().max() < 1e-5


# Triton's interpreter multiplies the bits of bfloat16 numbers as integers
@pytest.mark.parametrize('dtype', [torch.float16, *[torch.bfloat16] * (DEVICE == 'cuda')])
def test_half_precision_adds_in_float32(dtype):
    q, latents = drawn(1, 4, 48).to(dtype), drawn(1, 1, 300, 48, seed=2).to(dtype)
    y = attend_latents(q, latents, 32, 0.1, filled(300), pieces=2)
    wanted = formula(q, latents, latents[..., :32], 0.1, 300)
    assert y.dtype == dtype and (y - wanted).abs().max() < 2 * torch.finfo(dtype).eps * wanted.abs().max()


def test_large_scores_do_not_overflow():
    q, latents = 100 * drawn(1, 2, 16), 100 * drawn(1, 1, 64, 16, seed=2)
    y = attend_latents(q, latents, 16, 1.0, filled(64), pieces=2)
    assert torch.allclose(y.double(), formula(q, latents, latents, 1.0, 64), rtol=1e-5)


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        (dict(rank=41), 'belong together'),
        (dict(latents=drawn(1, 2, 9, 40)), 'belong together'),
        (dict(values=drawn(1, 1, 9, 32)), 'shape of the keys'),
        (dict(factors=drawn(1, 1, 9)), 'int8'),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, said):
    settings = dict(q=drawn(1, 3, 40), latents=drawn(1, 1, 9, 40), rank=32, scale=1.0, length=filled(9))
    with pytest.raises(ValueError, match=said):
        attend_latents(**{**settings, **change})
