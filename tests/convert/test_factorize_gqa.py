"""Grouped-query attention and its neighbours: GQA is MLA at the same cache size, and MHA with repeated heads."""

import pytest
import torch
from test_factorize import C, batches, logits, trained_like

from analysis import induction
from core.convert.factorize import collect_statistics, per_query_head, to_gqa, to_mha, to_mla
from model import GPT, GPTConfig


@pytest.mark.parametrize('n_kv_head', [1, 2])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('text', [True, False])
def test_gqa_becomes_mla_of_the_same_cache_exactly(n_kv_head, bias, text):
    model = trained_like(bias, n_kv_head=n_kv_head)
    statistics = collect_statistics(model, batches()) if text else None
    mla = to_mla(model, 0, statistics)
    assert mla.config.n_latent == 2 * n_kv_head * C // 4 and mla.config.n_kv_head == 0
    assert mla.init_cache(1).bytes_per_token == model.init_cache(1).bytes_per_token
    for idx in batches(2, seed=7):
        expected = logits(model, idx)
        assert (logits(mla, idx) - expected).abs().max() < 1e-12 * expected.abs().max()
    smaller = to_mla(model, mla.config.n_latent - 2, statistics)
    assert (logits(smaller, idx) - expected).abs().max() > 1e-5


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('pos', ['learned', 'rope'])
def test_repeated_heads_compute_the_same(bias, pos):
    model = trained_like(bias, n_kv_head=2, n_embd=32, pos=pos)
    mha, idx = to_mha(model), batches(1)[0]
    assert mha.config.kv_heads == 4
    torch.testing.assert_close(logits(mha, idx), logits(model, idx), rtol=0, atol=1e-12)
    back = to_gqa(mha, 2)
    for a, b in zip(back.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-15)


def test_pooling_takes_the_mean_of_each_group():
    model = trained_like()
    pooled = to_gqa(model, 2)
    attention, pooled_attention = model.transformer.h[1].attn, pooled.transformer.h[1].attn
    w_q, w_k, w_v = per_query_head(attention, attention.c_attn.weight)
    p_q, p_k, p_v = per_query_head(pooled_attention, pooled_attention.c_attn.weight)
    assert torch.equal(p_q, w_q)
    for before, after in ((w_k, p_k), (w_v, p_v)):
        for head in range(4):
            group = slice(head // 2 * 2, head // 2 * 2 + 2)
            torch.testing.assert_close(after[head], before[group].mean(0))
    assert torch.equal(to_gqa(to_gqa(model, 2), 1).lm_head.weight, model.lm_head.weight)
    for number in (0, 3, 8):
        with pytest.raises(ValueError, match=f'n_kv_head={number} must divide the 4'):
            to_gqa(model, number)
    with pytest.raises(ValueError, match='only a GPT with multi-head attention'):
        to_gqa(to_mla(model), 2)


@torch.no_grad()
def test_heads_of_gqa_are_measured_as_those_of_its_mha():
    """Scores, circuits and ablations of a GQA model are those of the MHA model that computes the same."""
    from analysis import circuits

    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=40, n_layer=2, n_head=4, n_embd=32, n_kv_head=2)).eval()
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    repeats = induction.repeated_sequences(8, 8, range(40))
    found = []
    for one in (model, to_mha(model)):
        scores = induction.head_scores(one, repeats)
        base, alone = induction.ablate_each_head(one, repeats)
        weights = [circuits.copying_tokens(one, range(40)), circuits.copying_eigenvalues(one, range(40))]
        weights.append(circuits.composition(one)['k'][0, :, 1])
        found.append([*(scores[name] for name in induction.SCORES), base, alone, *weights])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-3, atol=1e-4)
