"""Circuits, copying scores and composition equal their definitions, computed by brute force or on planted heads."""

import numpy as np
import pytest
import torch
from support.planted import IDS, VARIANTS, planted, random_model

from analysis import circuits
from model_mla import MLAGPT, MLAConfig, MultiHeadLatentAttention


@pytest.mark.parametrize('variant', VARIANTS)
def test_head_weights_are_what_the_heads_compute(variant):
    """Up to one positive factor per token where the latent is normed."""
    model = random_model(variant, bias=False)
    attn, x = model.transformer.h[1].attn, torch.randn(1, 6, 32, dtype=torch.float64)
    still = None  # RoPE with angle 0
    if model.rope is not None:
        still = torch.stack((torch.ones_like(model.rope[0, :6]), torch.zeros_like(model.rope[0, :6])))
    with torch.no_grad():
        w_q, w_k, w_v, w_o = circuits.head_weights(attn)
        for number, (got, weight) in enumerate(zip(attn.qkv(x, still), (w_q, w_k, w_v), strict=True)):
            wanted = torch.einsum('hdc,btc->bhtd', weight, x)
            rows = slice(None, attn.n_nope) if number == 1 and isinstance(model, MLAGPT) else slice(None)
            factor = (got[..., rows] * wanted[..., rows]).sum(-1) / wanted[..., rows].square().sum(-1)
            assert (factor > 0).all()
            if variant != 'mla-published':
                torch.testing.assert_close(factor, torch.ones_like(factor))
            torch.testing.assert_close(got[..., rows], factor[..., None] * wanted[..., rows])
        if variant == 'mla-published':  # the shared position key has no norm
            k_rope = attn.qkv(x, still)[1][..., attn.n_nope :]
            torch.testing.assert_close(k_rope, torch.einsum('hdc,btc->bhtd', w_k, x)[..., attn.n_nope :])
        rank = min(model.config.widths[1], getattr(attn, 'n_latent', 32))
        assert torch.linalg.matrix_rank(w_o @ w_v).tolist() == [rank] * 4


def test_head_weights_of_mla_may_have_parts_of_any_size():
    """Four dimensions of content and two of position per query and key, seven per value, of two heads."""
    H, C, r, n_nope, n_rope, n_value = 2, 10, 5, 4, 2, 7
    sizes = dict(n_latent=r, n_nope=n_nope, n_rope=n_rope, n_value=n_value, pos='rope', bias=False)
    attn = MultiHeadLatentAttention(MLAConfig(n_head=H, n_embd=C, **sizes), 0).double()
    x = torch.randn(C, dtype=torch.float64)
    with torch.no_grad():
        w_q, w_k, w_v, w_o = circuits.head_weights(attn)
        latent, shared = attn.c_kv_down(x).split((r, n_rope))
        keys, values = attn.c_kv_up(latent).split((H * n_nope, H * n_value))
        torch.testing.assert_close((w_q @ x).flatten(), attn.c_q(x))
        torch.testing.assert_close(w_k @ x, torch.cat((keys.view(H, -1), shared.expand(H, -1)), dim=1))
        torch.testing.assert_close((w_v @ x).flatten(), values)
        torch.testing.assert_close(torch.einsum('hcd,hd->c', w_o, values.view(H, -1)), attn.c_proj(values))


@pytest.mark.parametrize('kind', ['mha', 'mla'])
def test_the_planted_induction_head_copies_and_reads_the_previous_token_head(kind):
    model = planted(kind)
    assert circuits.copying_eigenvalues(model, IDS)[1, 1] == pytest.approx(1.0, abs=0.05)
    assert circuits.copying_tokens(model, IDS)[1, 1] == 1.0
    lift = circuits.composition(model)
    assert np.nanargmax(lift['k'][:, :, 1, 1]) == 0 and lift['k'][0, 0, 1, 1] > 1.5
    assert np.isnan(lift['k'][1]).all() and np.isnan(lift['k'][:, :, 0]).all()


@pytest.mark.parametrize('variant', ['mha', 'mla', 'mla-narrow'])
def test_composition_and_copying_equal_brute_force(variant):
    model = random_model(variant, n_layer=3)
    lift, C = circuits.composition(model), 32
    whole = []
    for layer in range(3):
        q, k, v, o = circuits.stream_weights(model, layer)
        whole.append((q.mT @ k, (o @ v).mT))  # row-vector convention: W_OV acts from the right
    for first, second in ((0, 1), (0, 2), (1, 2)):
        ov1, (qk2, ov2) = whole[first][1][3], (part[2] for part in whole[second])
        for kind, product, norm in (('k', ov1 @ qk2.T, qk2), ('q', ov1 @ qk2, qk2), ('v', ov1 @ ov2, ov2)):
            score = product.norm() / (ov1.norm() * norm.norm())
            assert lift[kind][first, 3, second, 2] == pytest.approx(C * score.item() ** 2, rel=1e-4)
    got = circuits.copying_eigenvalues(model, np.arange(40))
    embedding = circuits.effective_embeddings(model, np.arange(40))
    normed = torch.nn.functional.layer_norm(embedding, (C,)) * model.transformer.h[2].ln_1.weight
    unembedding = model.lm_head.weight.detach() * model.transformer.ln_f.weight.detach()
    unembedding = unembedding - unembedding.mean(1, keepdim=True)
    _, _, w_v, w_o = circuits.head_weights(model.transformer.h[2].attn)
    full = unembedding @ w_o[1] @ w_v[1] @ normed.T
    values = torch.linalg.eigvals(full)
    assert got[2, 1] == pytest.approx((values.real.sum() / values.abs().sum()).item(), abs=1e-6)


@pytest.mark.parametrize('variant', ['mha', 'mla-narrow'])
def test_lift_of_unrelated_heads_is_one_whatever_the_rank(variant):
    model, lifts = random_model(variant, n_layer=6, n_embd=64), []
    for seed in range(8):
        model.init_weights(seed)
        lifts.append([np.nanmean(lift) for lift in circuits.composition(model).values()])
    assert np.mean(lifts, axis=0) == pytest.approx([1, 1, 1], abs=0.03)
