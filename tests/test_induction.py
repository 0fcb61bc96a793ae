"""The measurements are right where the right answer is known: planted heads, uniform attention, brute force."""

import base64
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis import induction
from core import checkpoint, tokenizer
from core.dataset import TokenData
from core.kernels import attention_pattern
from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig

ROOT = Path(__file__).resolve().parents[1]

V, T, D = 24, 20, 34  # tokens, positions and head size of the planted models
L = 9  # length of the repeated block; with BOS 2L + 1 = 19 tokens
TOKEN, POSITION, BEFORE = slice(0, V), slice(V, V + T), slice(V + T, 2 * V + T)  # what the residual stream holds where
BOS, IDS = V - 1, np.arange(V - 1)

VARIANTS = {
    'mha': (GPT, GPTConfig, {}),
    'mha-rope': (GPT, GPTConfig, dict(pos='rope')),
    'mla': (MLAGPT, MLAConfig, dict(n_latent=12)),
    'mla-narrow': (MLAGPT, MLAConfig, dict(n_latent=5)),
    'mla-published': (MLAGPT, MLAConfig, dict(pos='rope', n_latent=12, n_latent_q=10, latent_norm=True)),
}


def random_model(variant, n_layer=2, **changes):
    """A small model whose every parameter is random, in float64 and eval mode."""
    model_class, config_class, special = VARIANTS[variant]
    sizes = dict(block_size=32, vocab_size=40, n_layer=n_layer, n_head=4, n_embd=32)
    model = model_class(config_class(**{**sizes, **special, **changes})).double().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def read(part, size=D):
    """A weight (size, C) that puts a part of the residual stream on a head's first dimensions."""
    weight = torch.zeros(size, 2 * V + T)
    weight[: part.stop - part.start, part] = torch.eye(part.stop - part.start)
    return weight


def set_head(model, layer, head, q, k, v, o):
    """Give one head its four maps: q, k, v (D, C) and o (C, D). MLA's latent holds what k reads, then what v reads."""
    attn, rows = model.transformer.h[layer].attn, slice(head * D, head * D + D)
    attn.c_proj.weight[:, rows] = o
    if isinstance(model, GPT) and not isinstance(model, MLAGPT):
        for part, weight in zip(attn.c_attn.weight.split(2 * D), (q, k, v), strict=True):
            part[rows] = weight
        return
    attn.c_q.weight[rows] = q
    w_k, w_v = attn.c_kv_up.weight.split(2 * D)
    used = [weight[weight.abs().sum(1) > 0] for weight in (k, v)]  # the directions that keys and values read
    n = len(used[0])
    attn.c_kv_down.weight[: n + len(used[1])] = torch.cat(used)
    w_k[rows, :n] = torch.eye(D)[:, :n]
    w_v[rows, n : n + len(used[1])] = torch.eye(D)[:, : len(used[1])]


@torch.no_grad()
def planted(kind, sharpness=100.0, by_position=False):
    """
    A model with a previous-token head 0.0 and an induction head 1.1 that copies; the other two attend uniformly.

    by_position: head 1.1 looks L - 1 tokens back, whatever stands there. On a repeat that looks like induction.
    """
    sizes = dict(block_size=T, vocab_size=V, n_layer=2, n_head=2, n_embd=2 * V + T)
    model = MLAGPT(MLAConfig(n_latent=48, **sizes)) if kind == 'mla' else GPT(GPTConfig(**sizes))
    for name, parameter in model.named_parameters():
        if 'ln_' not in name:
            parameter.zero_()
    model.transformer.wte.weight[:, TOKEN] = torch.eye(V)
    model.transformer.wpe.weight[:, POSITION] = torch.eye(T)
    model.transformer.ln_f.weight.fill_(5.0)
    back = read(POSITION)
    write_before, write_token = torch.zeros(2 * V + T, D), torch.zeros(2 * V + T, D)
    write_before[BEFORE, :V] = torch.eye(V) / 6  # a normed 1 is about 6
    write_token[TOKEN, :V] = torch.eye(V)
    set_head(model, 0, 0, sharpness * back.roll(-1, 0), back, read(TOKEN), write_before)
    if by_position:
        set_head(model, 1, 1, sharpness * back.roll(-(L - 1), 0), back, read(TOKEN), write_token)
    else:
        set_head(model, 1, 1, sharpness * read(TOKEN), read(BEFORE), read(TOKEN), write_token)
    return model.eval()


def repeats(count=32, **changes):
    return induction.repeated_sequences(count, L, IDS, **{**dict(bos=BOS, seed=5), **changes})


def test_self_test_passes_and_notices_a_diagonal_too_long(monkeypatch):
    induction.self_test()
    right = induction.pattern_scores

    def customary(pattern, these):
        """The slip found in the field: the mean of diagonal(-L + 1) of the whole pattern."""
        offset = int(these.query[0, 0] - these.match[0, 0])
        wrong = pattern.diagonal(1 - offset, 2, 3).mean(-1)
        return dict(right(pattern, these), induction=wrong)

    monkeypatch.setattr(induction, 'pattern_scores', customary)
    with pytest.raises(RuntimeError, match='self-test'):
        induction.self_test()


@pytest.mark.parametrize('max_gap', [0, 6])
def test_sequences_repeat_where_they_say(max_gap):
    these = induction.repeated_sequences(20, 8, IDS, bos=BOS, max_gap=max_gap, seed=1)
    rows = torch.arange(20)[:, None]
    assert torch.equal(these.tokens[rows, these.query], these.tokens[rows, these.match])
    assert these.tokens.shape == (20, 17 + max_gap) and (these.tokens[:, 0] == BOS).all()
    assert these.query[:, -1].eq(16 + max_gap).all()  # the second copy ends the sequence
    distance = these.query - these.match
    assert (distance == distance[:, :1]).all()
    assert len(distance[:, 0].unique()) > 1 if max_gap else (distance == 8).all()
    for row, match in zip(these.tokens, these.match, strict=True):
        once = row[: 1 + 8 + max_gap] if not max_gap else torch.cat((row[: match[0]], row[match]))
        assert len(set(once.tolist())) == len(once)
    again = induction.repeated_sequences(20, 8, IDS, bos=BOS, max_gap=max_gap, seed=1, shuffled=True)
    assert torch.equal(again.query, these.query) and not torch.equal(again.tokens, these.tokens)
    assert torch.equal(again.tokens.sort(1).values, these.tokens.sort(1).values)
    with pytest.raises(ValueError, match='distinct tokens'):
        induction.repeated_sequences(2, 30, IDS)


@pytest.mark.parametrize('variant', VARIANTS)
def test_patterns_times_values_are_the_layers_output(variant):
    model, tokens = random_model(variant), torch.randint(0, 40, (3, 20), generator=torch.Generator().manual_seed(1))

    def check(layer, a):
        attn = model.transformer.h[layer].attn
        rope = induction.rope_of(model, 20)
        out = attn.c_proj((a.pattern @ a.v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(out, attn(a.normed, rope), atol=1e-12, rtol=0)
        torch.testing.assert_close(a.pattern.sum(-1), torch.ones(3, 4, 20, dtype=torch.float64))
        assert a.pattern.triu(1).abs().max() == 0

    with torch.no_grad():
        for visit in (check, None):
            hidden = induction.run(model, induction.embed(model, tokens), visit=visit)
            torch.testing.assert_close(hidden, model.hidden(tokens), atol=1e-12, rtol=0)


@pytest.mark.parametrize('variant', VARIANTS)
def test_head_weights_are_what_the_heads_compute(variant):
    """Differences of two inputs leave no biases. Where a latent norm stands between, one factor per token is left."""
    model = random_model(variant, bias=False)
    attn, x = model.transformer.h[1].attn, torch.randn(1, 6, 32, dtype=torch.float64)
    still = None  # RoPE by angle 0
    if model.rope is not None:
        still = torch.stack((torch.ones_like(model.rope[0, :6]), torch.zeros_like(model.rope[0, :6])))
    with torch.no_grad():
        w_q, w_k, w_v, w_o = attn.head_weights()
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
        w_qk, w_ov = induction.circuits(attn)
        rank = min(attn.head_size, getattr(attn, 'n_latent', 32))
        assert torch.linalg.matrix_rank(w_ov).tolist() == [rank] * 4
        torch.testing.assert_close(torch.einsum('hcd,hde->hce', w_o, w_v), w_ov)
        torch.testing.assert_close(w_qk[2], w_q[2].T @ w_k[2])


@pytest.mark.parametrize('kind', ['mha', 'mla'])
@pytest.mark.parametrize('max_gap', [0, 1])
def test_planted_heads_are_found(kind, max_gap):
    model, these = planted(kind), repeats(max_gap=max_gap)
    scores = induction.head_scores(model, these, batch_size=7)
    means = {name: scores[name].mean(0) for name in induction.SCORES}
    assert means['induction'][1, 1] == pytest.approx(1.0, abs=5e-4)
    assert means['prefix_matching'][1, 1] == pytest.approx(1.0, abs=5e-4)
    assert means['previous_token'][0, 0] == pytest.approx(1.0, abs=5e-4)
    for layer, head in ((0, 1), (1, 0)):  # no queries: uniform
        assert means['induction'][layer, head] == pytest.approx(induction.chance(these), abs=1e-6)
    assert means['duplicate_token'][1, 1] < 1e-3
    assert scores['repeat_loss'].mean() < 0.5 < scores['losses'][:, :L].mean()
    copying = induction.copying_eigenvalues(model, IDS)
    assert copying[1, 1] == pytest.approx(1.0, abs=0.05)
    assert induction.copying_tokens(model, IDS)[1, 1] == 1.0
    lift = induction.composition(model)
    assert np.nanargmax(lift['k'][:, :, 1, 1]) == 0 and lift['k'][0, 0, 1, 1] > 1.5
    assert np.isnan(lift['k'][1]).all() and np.isnan(lift['k'][:, :, 0]).all()

    shuffled = induction.head_scores(model, repeats(max_gap=max_gap, shuffled=True), losses=False)['induction']
    random_init = induction.head_scores(random_init_of(model), these, losses=False)['induction'].mean(0).max()
    low, _ = induction.bootstrap(scores['induction'])
    called = induction.verdict(low, random_init, induction.bootstrap(shuffled)[1], copying)
    assert called.tolist() == [[False, False], [False, True]]


def random_init_of(model):
    return type(model)(model.config, seed=11).eval()


@pytest.mark.parametrize('kind', ['mha', 'mla'])
def test_nothing_is_found_in_random_weights(kind):
    model = random_init_of(planted(kind))
    scores = induction.head_scores(model, repeats())['induction']
    assert scores.mean(0) == pytest.approx(induction.chance(repeats()), abs=0.01)
    others = [induction.head_scores(type(model)(model.config, seed=seed).eval(), repeats(seed=9)) for seed in (1, 2, 3)]
    null = max(other['induction'].mean(0).max() for other in others)
    shuffled = induction.bootstrap(induction.head_scores(model, repeats(shuffled=True))['induction'])[1]
    called = induction.verdict(induction.bootstrap(scores)[0], null, shuffled, np.ones((2, 2)))
    assert not called.any()
    assert induction.is_untrained(model) and not induction.is_untrained(planted(kind))


def test_a_head_that_goes_by_position_is_not_called_an_induction_head():
    model = planted('mha', by_position=True)
    real, control = (induction.head_scores(model, repeats(shuffled=s))['induction'] for s in (False, True))
    assert real.mean(0)[1, 1] == pytest.approx(1.0, abs=5e-4)
    called = induction.verdict(induction.bootstrap(real)[0], 0.1, induction.bootstrap(control)[1], np.ones((2, 2)))
    assert not called.any()


@pytest.mark.parametrize('kind', ['mha', 'mla'])
def test_ablating_the_planted_heads_costs_and_the_others_nothing(kind):
    model, these = planted(kind), repeats()
    base, ablated = induction.ablate_each_head(model, these)
    rise = (ablated - base).mean(-1)
    assert base == pytest.approx(induction.head_scores(model, these)['repeat_loss'], abs=1e-5)
    assert rise[0, 0] > 1 and rise[1, 1] > 1
    assert rise[[0, 1], [1, 0]] == pytest.approx(0, abs=1e-5)
    for head in ((0, 0), (1, 1)):
        assert induction.ablate_together(model, these, [head]) == pytest.approx(ablated[head], abs=1e-5)
    steps = induction.ablate_cumulatively(model, these, [(1, 1), (0, 0)], counts=(1, 2), draws=2)
    assert [step['control_heads'] for step in steps] == [1, 2]
    assert (steps[0]['loss'] - base).mean() > 1 and (steps[0]['control'] - base).mean() == pytest.approx(0, abs=1e-5)


def test_random_control_heads_come_from_the_same_layers():
    rng = np.random.default_rng(0)
    heads = [(0, 1), (2, 0), (2, 3), (3, 0), (3, 1), (3, 2)]
    for _ in range(20):
        drawn = induction.matched_heads(heads, 4, rng)
        assert [layer for layer, _ in drawn] == [0, 2, 2, 3]  # layer 3 has a single head left
        assert not set(drawn) & set(heads) and len(set(drawn)) == 4


def test_pattern_scores_against_their_formulas_on_tokens_that_recur():
    rng = torch.Generator().manual_seed(0)
    base = induction.repeated_sequences(3, 6, np.arange(8), copies=3, seed=2)
    tokens = torch.randint(0, 4, base.tokens.shape, generator=rng)
    pattern = torch.rand(3, 2, 18, 18, generator=rng).tril()
    got = induction.pattern_scores(pattern, induction.Repeats(tokens, base.query, base.match))
    for n in range(3):
        for h in range(2):
            A, t = pattern[n, h], tokens[n]
            later = range(6, 18)
            wanted = {
                'induction': [A[i, i - 5] for i in later],
                'prefix_matching': [sum(A[i, j + 1] for j in range(i) if t[j] == t[i]) for i in later],
                'duplicate_token': [A[i, i - 6] for i in later],
                'previous_token': [A[i, i - 1] for i in range(1, 18)],
            }
            for name, values in wanted.items():
                assert got[name][n, h].item() == pytest.approx(float(np.mean(values)), rel=1e-5), name


@pytest.mark.parametrize('variant', ['mha', 'mla', 'mla-narrow'])
def test_composition_and_copying_equal_brute_force(variant):
    model = random_model(variant, n_layer=3)
    lift, C = induction.composition(model), 32
    whole = []
    for block in model.transformer.h:
        q, k, v, o = induction.stream_weights(block)
        whole.append((q.mT @ k, (o @ v).mT))  # row-vector convention: W_OV acts from the right
    for first, second in ((0, 1), (0, 2), (1, 2)):
        ov1, (qk2, ov2) = whole[first][1][3], (part[2] for part in whole[second])
        for kind, product, norm in (('k', ov1 @ qk2.T, qk2), ('q', ov1 @ qk2, qk2), ('v', ov1 @ ov2, ov2)):
            score = product.norm() / (ov1.norm() * norm.norm())
            assert lift[kind][first, 3, second, 2] == pytest.approx(C * score.item() ** 2, rel=1e-4)
    got = induction.copying_eigenvalues(model, np.arange(40))
    embedding = induction.effective_embeddings(model, np.arange(40))
    normed = torch.nn.functional.layer_norm(embedding, (C,)) * model.transformer.h[2].ln_1.weight
    unembedding = model.lm_head.weight.detach() * model.transformer.ln_f.weight.detach()
    unembedding = unembedding - unembedding.mean(1, keepdim=True)
    full = unembedding @ induction.circuits(model.transformer.h[2].attn)[1][1] @ normed.T
    values = torch.linalg.eigvals(full)
    assert got[2, 1] == pytest.approx((values.real.sum() / values.abs().sum()).item(), abs=1e-6)


@pytest.mark.parametrize('variant', ['mha', 'mla-narrow'])
def test_lift_of_unrelated_heads_is_one_whatever_the_rank(variant):
    model, lifts = random_model(variant, n_layer=6, n_embd=64), []
    for seed in range(8):
        model.init_weights(seed)
        lifts.append([np.nanmean(lift) for lift in induction.composition(model).values()])
    assert np.mean(lifts, axis=0) == pytest.approx([1, 1, 1], abs=0.03)


def test_bootstrap_gives_the_interval_of_a_mean():
    values = np.random.default_rng(0).normal(3.0, 2.0, (400, 2, 3))
    low, high = induction.bootstrap(values)
    assert low.shape == (2, 3)
    standard = values.std(0) / 20
    np.testing.assert_allclose(high - low, 2 * 1.96 * standard, rtol=0.1)
    assert (low < values.mean(0)).all() and (values.mean(0) < high).all()
    again = induction.bootstrap(values)
    assert (again[0] == low).all() and (again[1] == high).all()


def test_losses_equal_the_models_own():
    model, tokens = random_model('mla'), torch.randint(0, 40, (5, 30), generator=torch.Generator().manual_seed(1))
    losses = induction.text_losses(model, tokens, batch_size=2)
    assert losses.mean() == pytest.approx(model(tokens[:, :-1], tokens[:, 1:])[1].item(), rel=1e-5)
    few = induction.text_losses(model, tokens, positions=(5, 25))
    assert np.isfinite(few).sum() == 10
    np.testing.assert_allclose(induction.in_context_score(few, 5, 25), losses[:, 23] - losses[:, 3], rtol=1e-5)
    with torch.no_grad():  # token 25, counted from 1, is predicted from the 24 before it
        logits = model.lm_head(model.hidden(tokens[:, :24]))[:, -1]
    own = torch.nn.functional.cross_entropy(logits, tokens[:, 24], reduction='none')
    np.testing.assert_allclose(few[:, 23], own, rtol=1e-5)


def test_scores_refuse_training_mode_and_long_sequences():
    with pytest.raises(ValueError, match='eval'):
        induction.head_scores(planted('mha').train(), repeats())
    with pytest.raises(ValueError, match='block_size'):
        induction.patterns(planted('mha'), torch.zeros(1, T + 1, dtype=torch.int64))


# ---- the latent ------------------------------------------------------------------------------------------------------


def test_effective_rank_and_overlap_of_known_subspaces():
    assert induction.effective_rank(torch.eye(7, dtype=torch.float64)) == pytest.approx(7)
    assert induction.effective_rank(torch.diag(torch.tensor([1.0, 0, 0]).double())) == pytest.approx(1)
    eye = torch.eye(12)
    others = torch.stack((eye[4:8], 3 * eye[:4].flip(0), eye[2:6]))
    assert induction.overlap(eye[None, :4], others)[0].tolist() == pytest.approx([0, 1, 0.5])
    random = torch.randn(30, 4, 12, generator=torch.Generator().manual_seed(0))
    assert induction.overlap(random[:15], random[15:]).mean().item() == pytest.approx(4 / 12, abs=0.02)
    _, chance = induction.reading_overlaps(random_model('mla').transformer.h[0].attn)['key']
    assert chance == pytest.approx(8 / 12)
    overlaps, chance = induction.reading_overlaps(random_model('mla-narrow').transformer.h[0].attn)['key_value']
    assert chance == 1 and overlaps == pytest.approx(1)  # five dimensions: every head of size 8 reads them all


def test_moments_are_those_of_the_latent():
    model, these = random_model('mla-published'), induction.repeated_sequences(9, 8, np.arange(40), seed=1)
    seen = []
    rope = induction.rope_of(model, 16)
    induction.run(
        model,
        induction.embed(model, these.tokens),
        visit=lambda layer, a: seen.append(induction.content_latent(model.transformer.h[layer].attn, a.normed, rope)),
    )
    mean, covariance = induction.latent_moments(model, these, batch_size=4)[1]
    torch.testing.assert_close(mean, seen[1].flatten(0, 1).mean(0), atol=1e-10, rtol=0)
    torch.testing.assert_close(covariance, torch.cov(seen[1].flatten(0, 1).T, correction=0), atol=1e-10, rtol=0)


def test_latent_directions_of_the_planted_model_serve_keys_or_values():
    model, these = planted('mla'), repeats()
    base = induction.head_scores(model, these)['repeat_loss'].mean()
    x, zero = induction.embed(model, these.tokens), torch.zeros(48)
    directions = torch.eye(48)
    losses = {}
    for path in ('keys', 'values'):
        for name, part in (('matching', slice(0, V)), ('copying', slice(V, 2 * V))):
            changed = induction.without_directions(1, directions[:, part], zero, path)
            hidden = induction.run(model, x, qkv=changed)
            losses[path, name] = induction.repeat_losses(model, hidden, these).mean().item()
    assert losses['keys', 'copying'] == pytest.approx(base, abs=1e-5)
    assert losses['values', 'matching'] == pytest.approx(base, abs=1e-5)
    assert losses['keys', 'matching'] > base + 1 and losses['values', 'copying'] > base + 1


def test_ablating_bands_of_the_latent():
    model, these = random_model('mla'), induction.repeated_sequences(6, 8, np.arange(40), seed=1)
    out = induction.ablate_latent(model, these, bands=5)
    assert out['keys'].shape == out['values'].shape == (2, 5, 6)
    assert out['bands'][0][0] == 0 and out['bands'][-1][1] == 12
    assert all(a[1] == b[0] for a, b in zip(out['bands'], out['bands'][1:], strict=False))
    assert (np.abs(out['values'] - out['base']).mean(-1) > 0).all()
    assert len(induction.latent_bands(4, 16)) == 4


def test_content_and_position_add_up_to_the_logit():
    model, these = random_model('mla-published'), induction.repeated_sequences(4, 8, np.arange(40), seed=1)
    parts = induction.logit_parts(model, these, batch_size=3)
    whole = []

    def add(layer, a):
        logits = a.q @ a.k.mT * model.transformer.h[layer].attn.scale
        rows = []
        for n in range(4):
            for i, j in zip(these.query[n], these.match[n] + 1, strict=True):
                rows.append(logits[n, :, i, j] - logits[n, :, i, : i + 1].mean(-1))
        whole.append(torch.stack(rows).view(4, 8, -1).mean(1))
        torch.testing.assert_close(attention_pattern(a.q, a.k, model.transformer.h[layer].attn.scale), a.pattern)

    induction.run(model, induction.embed(model, these.tokens), visit=add)
    np.testing.assert_allclose(parts['content'] + parts['position'], torch.stack(whole, 1), atol=1e-5)


# ---- the scripts -----------------------------------------------------------------------------------------------------


def call(*arguments):
    """Run one of the project's scripts; returns the finished process."""
    environment = dict(os.environ, OMP_NUM_THREADS='1')
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def save(folder, model, **changes):
    """A checkpoint of `model` in `folder`, as one that was trained."""
    folder.mkdir(parents=True, exist_ok=True)
    state = checkpoint.contents(model, {'dataset': 'none'}, val_loss=1.25, best_val_loss=1.25, iter_num=40)
    checkpoint.save(str(folder / 'ckpt.pt'), {**state, **changes})
    return folder


QUICK = ('--sequences=16', '--resamples=200', '--ablate_sequences=8', '--controls=1', '--device=cpu')


def test_sequences_begin_with_the_end_token_of_a_learned_encoding(tmp_path):
    pieces = tokenizer.learn_bpe(['some words, more words'], 260)
    model = GPT(GPTConfig(block_size=32, vocab_size=260, n_layer=1, n_head=2, n_embd=16))
    model.transformer.ln_f.weight.data.fill_(2.0)  # as training would have moved it
    meta = dict(tokenizer='bpe', vocab_size=260, pieces=pieces)
    folder, out = save(tmp_path / 'out-pairs', model, tokenizer=meta), tmp_path / 'found'
    done = call('find_induction_heads.py', f'--models={folder}', f'--out_dir={out}', '--ablate=False', *QUICK)
    assert done.returncode == 0, done.stderr
    data = (out / 'patterns.html').read_text().split('const MODELS = ')[1].split(';\n')[0]
    shown = json.loads(data)[0]['sequences'][0]['tokens']
    assert shown[0] == '<bos>' and '<bos>' not in shown[1:] and len(shown) > 20


def test_the_script_finds_planted_heads_in_both_models_and_writes_its_files(tmp_path):
    folders = [save(tmp_path / f'out-{kind}', planted(kind)) for kind in ('mha', 'mla')]
    out = tmp_path / 'found'
    done = call('find_induction_heads.py', f'--models={folders[0]},{folders[1]}', f'--out_dir={out}', *QUICK)
    assert done.returncode == 0, done.stderr
    assert 'self-test passed' in done.stderr
    for kind, folder in zip(('mha', 'mla'), folders, strict=True):
        digest = hashlib.sha256((folder / 'ckpt.pt').read_bytes()).hexdigest()
        assert f'out-{kind}: 1 of 4 heads are induction heads' in done.stdout
        line = next(line for line in done.stdout.splitlines() if str(folder / 'ckpt.pt') in line)
        assert 'iteration 40' in line and 'val loss 1.2500' in line and digest[:12] in line
    found = json.loads((out / 'induction.json').read_text())['models']
    for model in found:
        assert np.array(model['called']).tolist() == [[False, False], [False, True]]
        assert model['ranking'][0] == [1, 1]
        assert model['random_null'] < 0.2 and len(model['token_losses']) == T - 1
    assert 'latent' in found[1] and 'latent' not in found[0]
    assert (out / 'induction_heads.png').read_bytes().startswith(b'\x89PNG')
    page = (out / 'patterns.html').read_text()
    assert 'http' not in page and 'src=' not in page  # nothing from elsewhere
    # what the page embeds is the pattern: head 1.1's last query looks at its match
    data = page.split('const MODELS = ')[1].split(';\n')[0]
    entry = json.loads(data)[1]
    packed = np.frombuffer(base64.b64decode(entry['sequences'][0]['data']), np.uint8).reshape(2, 2, -1)
    n = len(entry['sequences'][0]['tokens'])
    assert packed.shape[-1] == n * (n + 1) // 2
    i = n - 1
    assert packed[1, 1, i * (i + 1) // 2 + n // 2] == 255


def test_the_script_refuses_what_was_not_trained(tmp_path):
    fresh = random_init_of(planted('mla'))
    cases = {
        'zero': (save(tmp_path / 'zero', planted('mla'), iter_num=0), 'iteration 0'),
        'fresh': (save(tmp_path / 'fresh', fresh), 'initial values'),
        'none': (tmp_path / 'nothing', 'no checkpoint'),
    }
    for folder, complaint in cases.values():
        done = call('find_induction_heads.py', f'--models={folder}', f'--out_dir={tmp_path / "found"}', *QUICK)
        assert done.returncode == 2 and complaint in done.stderr, done.stderr
        assert 'Traceback' not in done.stderr and done.stdout == ''
    assert call('find_induction_heads.py', f'--out_dir={tmp_path / "found"}').returncode == 2


def test_a_sweep_shows_when_heads_form(tmp_path):
    folder = save(tmp_path / 'run', planted('mla'))
    (folder / 'ckpt.pt').rename(folder / 'ckpt_000040.pt')
    save(folder, planted('mla', sharpness=0.0), iter_num=10)
    out = tmp_path / 'found'
    done = call('find_induction_heads.py', f'--sweep={folder}', f'--out_dir={out}', *QUICK)
    assert done.returncode == 0, done.stderr
    steps = json.loads((out / 'formation.json').read_text())['runs'][0]['checkpoints']
    assert [step['iteration'] for step in steps] == [10, 40]
    assert steps[0]['induction']['mean'] < 0.2 < 0.8 < steps[1]['induction']['mean']
    assert steps[1]['induction']['head'] == [1, 1] and steps[1]['previous_token']['head'] == [0, 0]
    assert (out / 'formation.png').exists()


def test_repeated_rows_repeat_and_hide_what_can_not_be_known(tmp_path):
    folder = tmp_path / 'repeats'
    done = call('data/repeats/prepare.py', f'--folder={folder}', '--rows=200', '--val_rows=50')
    assert done.returncode == 0, done.stderr
    data = TokenData(folder, 64)
    x, y = data.windows('train', np.arange(200) * 65)
    rows = torch.cat((x, torch.zeros(200, 1, dtype=torch.int64)), 1)
    rows[:, 64] = torch.where(y[:, -1] < 0, rows[:, 64], y[:, -1])
    periods = []
    for row, targets in zip(rows, y, strict=True):
        period = int((targets < 0).sum())  # the first target after the block is masked as well
        periods.append(period)
        assert torch.equal(row[period:], row[:-period])
        assert (targets[:period] == -1).all() and torch.equal(targets[period:], row[period + 1 :])
    assert min(periods) == 8 and max(periods) == 32 and len(set(periods)) == 25
    again = tmp_path / 'again'
    call('data/repeats/prepare.py', f'--folder={again}', '--rows=200', '--val_rows=50')
    assert (again / 'train.bin').read_bytes() == (folder / 'train.bin').read_bytes()
    assert (folder / 'val.bin').read_bytes() != (folder / 'train.bin').read_bytes()[: 50 * 65 * 2]


def test_the_two_configs_differ_in_the_attention_alone():
    settings = []
    for name in ('train_repeats', 'train_repeats_mla'):
        values = {}
        exec((ROOT / 'config' / f'{name}.py').read_text(), values)
        settings.append({key: value for key, value in values.items() if not key.startswith('_')})
    differing = {key for key in set(settings[0]) | set(settings[1]) if settings[0].get(key) != settings[1].get(key)}
    assert differing == {'out_dir', 'wandb_run_name', 'attention', 'n_latent'}


# ---- TransformerLens: the same patterns, the same scores -------------------------------------------------------------


def test_patterns_and_scores_equal_transformer_lens(tmp_path):
    """
    The same weights, from one Hugging Face folder, in both: our scores are those of TransformerLens' own patterns.

    Runs where the package (4.0 or later) is installed; it is no dependency of the project.
    """
    bridge = pytest.importorskip('transformer_lens.model_bridge').TransformerBridge
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_positions=32, n_embd=32, n_layer=3, n_head=4, attn_implementation='eager')
    published = GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in published.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    published.save_pretrained(tmp_path)
    model = GPT.from_pretrained(str(tmp_path)).eval()
    these = induction.repeated_sequences(6, 10, np.arange(39), bos=39, seed=4)
    with torch.no_grad():
        hooked = bridge.boot_transformers(str(tmp_path), hf_model=published, device='cpu')
        _, cache = hooked.run_with_cache(these.tokens)
    theirs = torch.stack([cache['pattern', layer] for layer in range(3)])
    torch.testing.assert_close(induction.patterns(model, these.tokens), theirs, atol=1e-5, rtol=0)
    scores = induction.head_scores(model, these)
    pairs = {'induction': [(i, i - 9) for i in range(11, 21)], 'previous_token': [(i, i - 1) for i in range(1, 21)]}
    for name, ends in pairs.items():
        wanted = torch.stack([theirs[..., i, j] for i, j in ends]).mean(0).transpose(0, 1)
        np.testing.assert_allclose(scores[name], wanted, atol=1e-5)
