"""Numbers in few bits: what is stored, in how many bytes, and products with it."""

import pytest
import torch

from ops import packed
from ops.packed import Form

FORMS = [Form(size, bits, group, wide) for size in (1, 5, 32, 45, 64) for bits in (8, 4) for group in (0, 32)
         for wide in (0, 4) if size > wide]  # fmt: skip


def vectors(form, *sizes, seed=0, dtype=torch.float64):
    return torch.randn(*sizes, form.size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def filled(form, x):
    found = form.empty(x.shape[:-1], x.dtype, x.device)
    found[...] = x
    return found


@pytest.mark.parametrize('form', FORMS, ids=str)
def test_what_was_packed_comes_back_rounded(form):
    x = vectors(form, 2, 3, 7)
    stored = filled(form, x)
    assert stored.shape == x.shape and torch.equal(stored.whole(), form.rounded(x))
    # a number is off by half a step, and the scale's own rounding moves the largest of a group a little further
    for first in range(0, form.few, form.group or form.few):
        part = slice(first, min(first + (form.group or form.few), form.few))
        largest = x[..., part].abs().amax(-1, keepdim=True)
        step = largest / 2 ** (form.bits - 1)
        assert ((form.rounded(x) - x)[..., part].abs() <= step * 0.502 + largest * 2**-8).all()
    assert torch.equal(form.rounded(x)[..., form.few :], x[..., form.few :].bfloat16().double())


@pytest.mark.parametrize('form', FORMS, ids=str)
def test_bytes_are_counted_with_the_scales(form):
    stored = filled(form, vectors(form, 3, 7))
    low = form.few if form.bits == 8 else (form.few + 1) // 2
    assert stored.nbytes == 3 * 7 * form.bytes == 3 * 7 * (low + 2 * (form.groups + form.wide))


@pytest.mark.parametrize('bits', [2, 3, 4, 6, 8])
def test_every_level_is_used_and_each_bit_halves_the_error(bits):
    x = torch.linspace(-1, 1, 4096, dtype=torch.float64)[None]
    found = Form(4096, bits).rounded(x)
    assert found.unique().numel() == 2**bits and torch.equal(found, -found.flip(-1))
    assert (found - x).square().mean().sqrt() == pytest.approx(2 / 2**bits / 12**0.5, rel=0.01)


def test_zeros_and_the_extremes_of_the_dtype():
    form = Form(40, 4, 32)
    assert form.rounded(torch.zeros(2, 40)).abs().max() < 1e-30
    large = torch.full((1, 40), 1e38)
    assert torch.isfinite(form.rounded(large)).all()
    assert torch.isnan(form.rounded(torch.full((1, 40), float('nan')))).all()


@pytest.mark.parametrize('form', [form for form in FORMS if form.size != 1], ids=str)
@pytest.mark.parametrize('S, at_once', [(1, 0), (1, packed.AT_ONCE), (6, 0), (6, packed.AT_ONCE), (515, 10_000)])
def test_attention_reads_what_is_stored(form, S, at_once, monkeypatch):
    """As floats exactly, in pieces or at once; by the integer units, where this CPU has them, as float32 asks for."""
    monkeypatch.setattr(packed, 'AT_ONCE', at_once)
    k, v = (filled(form, vectors(form, 2, 3, S, seed=seed)) for seed in (1, 2))
    q, seen = vectors(form, 2, 3, 4, seed=3), torch.arange(S)[None] < max(1, S - 2)
    for mask in (None, seen):
        scores = q @ k.whole().mT * 0.3
        scores = scores if mask is None else scores.masked_fill(~mask, float('-inf'))
        expected = scores.softmax(-1) @ v.whole()[..., : form.few]
        exact = packed.attend(q, k, v, 0.3, mask)
        assert (exact - expected).abs().max() <= 1e-12 * expected.abs().max()
        single = packed.attend(q.float(), k.to(torch.float32), v.to(torch.float32), 0.3, mask)
        assert (single - expected).abs().max() <= 2e-4 * expected.abs().max()


def test_the_softmaxs_long_tail_beside_a_peak_is_not_lost(monkeypatch):
    """Two digits would lose its small weights, of which there are many."""
    monkeypatch.setattr(packed, 'AT_ONCE', 0)
    form, S = Form(64, 8), 4096
    v = filled(form, vectors(form, 1, 1, S, dtype=torch.float32) + 1)
    k = form.empty((1, 1, S), torch.float32, torch.device('cpu'))
    k[:, :, 7:8] = torch.ones(1, 1, 1, 64)
    q = torch.full((1, 1, 1, 64), 0.165)
    p = (q @ k.whole().mT).softmax(-1)
    assert p.max() < 0.95 and p.min() < p.max() / 127**2 / 2
    expected = p.double() @ v.whole().double()
    assert (packed.attend(q, k, v, 1.0) - expected).abs().max() < 1e-4


@pytest.mark.skipif(not packed.has_integer_units(), reason='this CPU has no products of bytes')
def test_int8_is_multiplied_as_it_is_stored(monkeypatch):
    form = Form(48, 8)
    k = filled(form, vectors(form, 2, 3, 9, dtype=torch.float32))
    monkeypatch.setattr(packed, 'AT_ONCE', 0)
    monkeypatch.setattr(packed.Packed, 'few', lambda self: pytest.fail('a copy in floats was made'))
    packed.attend(vectors(form, 2, 3, 4, dtype=torch.float32), k, k, 0.1)
    with pytest.raises(pytest.fail.Exception):
        packed.attend(vectors(form, 2, 3, 4), k.to(torch.float64), k.to(torch.float64), 0.1)


def test_bfloat16_is_rounded_to_both_sides():
    x = torch.randn(10_000, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    form = Form(64, 8)
    step = form.levels(x)[1].float()
    assert abs(((form.rounded(x.float()) - x.float()) / step).mean()) < 0.03
    low, scale = form.levels(x)
    assert abs(((form.numbers(low, scale, torch.float32) - x.float()) / step).mean()) < 0.03


def test_zeros_stay_finite_in_every_type():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert Form(8, 8).rounded(torch.zeros(1, 8, dtype=dtype)).isfinite().all()
