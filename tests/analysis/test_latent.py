"""What is measured on MLA's latent is right on known subspaces, planted heads and random models."""

import numpy as np
import pytest
import torch
from support.planted import V, planted, random_model, repeats

from analysis import forward, induction, latent


def test_effective_rank_and_overlap_of_known_subspaces():
    assert latent.effective_rank(torch.eye(7, dtype=torch.float64)) == pytest.approx(7)
    assert latent.effective_rank(torch.diag(torch.tensor([1.0, 0, 0]).double())) == pytest.approx(1)
    eye = torch.eye(12)
    others = torch.stack((eye[4:8], 3 * eye[:4].flip(0), eye[2:6]))
    assert latent.overlap(eye[None, :4], others)[0].tolist() == pytest.approx([0, 1, 0.5])


def test_overlap_of_unrelated_heads_is_chance():
    random = torch.randn(30, 4, 12, generator=torch.Generator().manual_seed(0))
    assert latent.overlap(random[:15], random[15:]).mean().item() == pytest.approx(4 / 12, abs=0.02)
    overlaps, chance = latent.reading_overlaps(random_model('mla', n_embd=32, n_latent=32).transformer.h[0].attn)['key']
    other = ~np.eye(4, dtype=bool)
    assert overlaps[other].mean() == pytest.approx(chance, abs=0.06) and overlaps.diagonal() == pytest.approx(1)
    # a latent of five dimensions: every head of size 8 reads all of it
    overlaps, chance = latent.reading_overlaps(random_model('mla-narrow').transformer.h[0].attn)['key_value']
    assert chance == 1 and overlaps == pytest.approx(1)


def test_moments_are_those_of_the_latent():
    model, these = random_model('mla-published'), induction.repeated_sequences(9, 8, np.arange(40), seed=1)
    seen, rope = [], forward.rope_of(model, 16)

    def collect(layer, a):
        seen.append(model.transformer.h[layer].attn.latent(a.normed, rope)[..., :12].flatten(0, 1))

    forward.run(model, these.tokens, visit=collect)
    mean, covariance = latent.latent_moments(model, these, batch_size=4)[1]
    torch.testing.assert_close(mean, seen[1].mean(0), atol=1e-10, rtol=0)
    torch.testing.assert_close(covariance, torch.cov(seen[1].T, correction=0), atol=1e-10, rtol=0)


def test_latent_directions_of_the_planted_model_serve_keys_or_values():
    model, these = planted('mla'), repeats()
    base = induction.head_scores(model, these)['repeat_loss'].mean()
    zero, directions = torch.zeros(48), torch.eye(48)
    losses = {}
    for path in ('keys', 'values'):
        for name, part in (('matching', slice(0, V)), ('copying', slice(V, 2 * V))):
            changed = latent.without_directions(1, directions[:, part], zero, path)
            hidden = forward.run(model, these.tokens, qkv=changed)
            losses[path, name] = induction.repeat_losses(model, hidden, these).mean().item()
    assert losses['keys', 'copying'] == pytest.approx(base, abs=1e-5)
    assert losses['values', 'matching'] == pytest.approx(base, abs=1e-5)
    assert losses['keys', 'matching'] > base + 1 and losses['values', 'copying'] > base + 1


def test_bands_cover_the_latent_once():
    for r, bands in ((12, 5), (4, 16), (64, 16)):
        ranges = latent.latent_bands(r, bands)
        assert len(ranges) == min(r, bands)
        assert [i for first, last in ranges for i in range(first, last)] == list(range(r))
        sizes = [last - first for first, last in ranges]
        assert max(sizes) - min(sizes) <= 1


def test_ablating_bands_of_the_latent():
    model, these = random_model('mla'), induction.repeated_sequences(6, 8, np.arange(40), seed=1)
    out = latent.ablate_latent(model, these, latent.latent_moments(model, these), bands=5)
    assert out['keys'].shape == out['values'].shape == (2, 5, 6) and len(out['bands']) == 5
    np.testing.assert_allclose(out['base'], induction.head_scores(model, these)['repeat_loss'], rtol=1e-5)
    assert (np.abs(out['values'] - out['base']).mean(-1) > 0).all()
    assert (np.abs(out['keys'] - out['base']).mean(-1) > 0).all()


def test_content_and_position_add_up_to_the_logit():
    model, these = random_model('mla-published'), induction.repeated_sequences(4, 8, np.arange(40), seed=1)
    parts = latent.logit_parts(model, these, batch_size=3)
    whole = []

    def add(layer, a):
        logits = a.pattern.log()  # up to a constant per query, which the mean over keys removes
        rows = []
        for n in range(4):
            for i, j in zip(these.query[n], these.match[n] + 1, strict=True):
                rows.append(logits[n, :, i, j] - logits[n, :, i, : i + 1].mean(-1))
        whole.append(torch.stack(rows).view(4, 8, -1).mean(1))

    forward.run(model, these.tokens, visit=add)
    np.testing.assert_allclose(parts['content'] + parts['position'], torch.stack(whole, 1), atol=1e-5)
