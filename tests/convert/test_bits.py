"""The basis of a latent: the same model, in which fewer bits suffice; and what convert_mla.py makes of it."""

from copy import deepcopy

import pytest
import torch
from support.models import MLA, assert_close, make, tokens
from support.planted import randomized

from core.convert.bits import BASES, for_few_bits, hadamard, latent_statistics, rotate, round_as, round_cached
from model_mla import MLAGPT, MLAConfig
from ops.packed import Form


@pytest.mark.parametrize('size', [1, 2, 3, 12, 20, 64])
def test_hadamards_matrix_is_orthogonal_and_mixes_evenly(size):
    matrix = hadamard(size)
    assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    assert matrix.abs().max() <= (2 / size) ** 0.5 + 1e-12


@pytest.mark.parametrize('basis', BASES)
@pytest.mark.parametrize('variant', MLA)
@torch.no_grad()
def test_no_logit_changes(variant, basis):
    model, idx = make(variant), tokens(3, 32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    statistics = latent_statistics(model, [idx[:2]])
    if model.config.latent_norm and basis != 'hadamard':
        with pytest.raises(ValueError, match='latent norm'):
            rotate(model, basis, statistics)
        return
    new = rotate(model, basis, statistics)
    assert_close(new(idx, idx)[0], model(idx, idx)[0])
    name = 'transformer.h.1.attn.c_kv_up.weight'
    assert not torch.allclose(new.state_dict()[name], before[name])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize('basis', BASES)
@pytest.mark.parametrize('unused', ['c_kv_down', 'c_kv_up', 'more numbers than keys and values'])
@torch.no_grad()
def test_no_logit_changes_where_latents_have_unused_directions(basis, unused):
    sizes = dict(vocab_size=20, block_size=16, n_layer=1, n_head=4, n_embd=32, n_latent=32, n_nope=2, n_value=3)
    model, idx = randomized(MLAGPT(MLAConfig(**sizes)), 0.1).double().eval(), tokens(3, 16) % 20
    if unused.startswith('c_kv'):
        getattr(model.transformer.h[0].attn, unused).weight.zero_()
    new = rotate(model, basis, latent_statistics(model, [idx]))
    assert_close(new(idx, idx)[0], model(idx, idx)[0])


@pytest.mark.parametrize('already, most', [('', 0.1), ('hadamard', 0.3), ('balanced', 0.02)])
@torch.no_grad()
def test_a_cache_in_few_bits_keeps_latents_with_one_large_number(already, most):
    """As converted models have it. Without the change of basis, 4 bits keep that number and lose the others."""
    sizes = dict(vocab_size=60, block_size=32, n_layer=2, n_head=4, n_embd=64, n_latent=64)
    model, idx = randomized(MLAGPT(MLAConfig(**sizes)), 0.1).double().eval(), tokens(8, 32) % 60
    for block in model.transformer.h:
        for rows in block.attn.c_kv_down.parameters():
            rows[0] *= 30
        block.attn.c_kv_up.weight[:, 0] /= 30
    exact = model(idx, idx)[0]
    plain = (round_as(deepcopy(model), 'int4')(idx, idx)[0] - exact).square().mean()
    if already:
        model = rotate(model, already, latent_statistics(model, [idx]))
    mixed = for_few_bits(model, 'int4')
    assert for_few_bits(model, 'float') is model and mixed is not model
    assert_close(mixed(idx, idx)[0], exact)
    assert (round_as(mixed, 'int4')(idx, idx)[0] - exact).square().mean() < most * plain


def test_what_can_not_be_rotated():
    with pytest.raises(ValueError, match='only MLA'):
        rotate(make('mha'), 'hadamard')
    with pytest.raises(ValueError, match='needs statistics'):
        rotate(make('mla'), 'balanced')
    with pytest.raises(ValueError, match='hadamard, components, balanced'):
        rotate(make('mla'), 'fourier')


@torch.no_grad()
def test_components_have_their_sizes_and_balanced_is_the_best_basis_for_one_scale():
    """A latent of which few directions matter: the error of keys and values falls, least in the balanced basis."""
    model, idx = make('mla'), tokens(64, 32)
    for block in model.transformer.h:  # a few large directions in a skew basis
        sizes = torch.logspace(1, -2, 16, dtype=torch.float64)
        block.attn.c_kv_down.weight.mul_(sizes[:, None])
    statistics = latent_statistics(model, [idx])
    errors = {}
    for basis in BASES:
        new = rotate(model, basis, statistics)
        second = [s.moments(centred=False)[1] for s in latent_statistics(new, [idx])]
        if basis == 'components':
            ups = [block.attn.c_kv_up.weight for block in new.transformer.h]
            assert all((m - m.diag().diag()).abs().max() < 1e-4 * m.diag().max() for m in second)
            assert all((m.diag().diff() <= 0).all() for m in second)
            assert all(abs((up.mT @ up)[0, 1]) < 1 for up in ups)
        kept = []
        round_cached(new, lambda layer, x, kept=kept: (kept.append(x), x)[1])(idx)
        up = [block.attn.c_kv_up.weight for block in new.transformer.h]
        difference = [(Form(16, 4).rounded(x) - x) @ w.mT for x, w in zip(kept, up, strict=True)]
        errors[basis] = sum(d.square().mean().item() for d in difference)
    assert errors['balanced'] < 0.8 * min(errors['components'], errors['hadamard'])
