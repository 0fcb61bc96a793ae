"""The instrumented forward pass computes what the models compute."""

import numpy as np
import pytest
import torch
from support.planted import VARIANTS, T, planted, random_model

from analysis import forward, induction
from model import GPT


@pytest.mark.parametrize('variant', VARIANTS)
def test_patterns_times_values_are_the_layers_output(variant):
    model, tokens = random_model(variant), torch.randint(0, 40, (3, 20), generator=torch.Generator().manual_seed(1))

    def check(layer, a):
        attn = model.transformer.h[layer].attn
        out = attn.c_proj((a.pattern @ a.v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(out, attn(a.normed, forward.rope_of(model, 20)), atol=1e-12, rtol=0)
        torch.testing.assert_close(a.pattern.sum(-1), torch.ones(3, 4, 20, dtype=torch.float64))
        assert a.pattern.triu(1).abs().max() == 0

    with torch.no_grad():
        for visit in (check, None):
            hidden = forward.run(model, tokens, visit=visit)
            torch.testing.assert_close(hidden, model.hidden(tokens), atol=1e-12, rtol=0)


def test_a_run_that_starts_in_the_middle_gives_the_same_output():
    model, tokens = random_model('mla', n_layer=3), torch.arange(20)[None]
    with torch.no_grad():
        x, rope = forward.embed(model, tokens), forward.rope_of(model, 20)
        later = forward.run(model, tokens, model.transformer.h[0](x, rope), start=1)
        torch.testing.assert_close(later, model.hidden(tokens), atol=1e-12, rtol=0)


def test_losses_equal_the_models_own():
    model, tokens = random_model('mla'), torch.randint(0, 40, (5, 30), generator=torch.Generator().manual_seed(1))
    losses = forward.text_losses(model, tokens, batch_size=2)
    assert losses.mean() == pytest.approx(model(tokens[:, :-1], tokens[:, 1:])[1].item(), rel=1e-5)
    with torch.no_grad():  # token 25, counted from 1, is predicted from the 24 before it
        logits = model.lm_head(model.hidden(tokens[:, :24]))[:, -1]
    own = torch.nn.functional.cross_entropy(logits, tokens[:, 24], reduction='none')
    np.testing.assert_allclose(losses[:, 23], own, rtol=1e-5)


def test_token_losses_do_not_depend_on_how_many_logits_fit():
    model = random_model('mha')
    hidden, targets = torch.randn(50, 32, dtype=torch.float64), torch.arange(50) % 40
    whole = forward.token_losses(model, hidden, targets)
    torch.testing.assert_close(forward.token_losses(model, hidden, targets, max_logits=7 * 40), whole)


def test_training_mode_and_long_sequences_are_refused():
    with pytest.raises(ValueError, match='eval'):
        forward.patterns(planted('mha').train(), torch.zeros(1, T, dtype=torch.int64))
    with pytest.raises(ValueError, match='block_size'):
        forward.patterns(planted('mha'), torch.zeros(1, T + 1, dtype=torch.int64))


# ---- TransformerLens: the same patterns, the same scores -------------------------------------------------------------


def test_patterns_and_scores_equal_transformer_lens(tmp_path):
    """
    The same weights, loaded from one Hugging Face folder: the scores are those of TransformerLens' own patterns.

    Runs if the package (4.0 or later) is installed; the project doesn't depend on it.
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
    torch.testing.assert_close(forward.patterns(model, these.tokens), theirs, atol=1e-5, rtol=0)
    scores = induction.head_scores(model, these)
    pairs = {'induction': [(i, i - 9) for i in range(11, 21)], 'previous_token': [(i, i - 1) for i in range(1, 21)]}
    for name, ends in pairs.items():
        wanted = torch.stack([theirs[..., i, j] for i, j in ends]).mean(0).transpose(0, 1)
        np.testing.assert_allclose(scores[name], wanted, atol=1e-5)


@pytest.mark.parametrize('variant', VARIANTS)
def test_heads_are_replaced_by_their_mean_over_sequences(variant):
    model, tokens = random_model(variant), torch.randint(0, 40, (5, 12), generator=torch.Generator().manual_seed(1))
    means = forward.head_means(model, tokens, batch_size=2)
    assert means.shape[:3] == (2, 4, 12)
    edit = forward.replacing_heads([(1, 2), (1, 0)], means)

    def by_hand(layer, z):
        z = z.clone()
        if layer == 1:
            z[:, 0], z[:, 2] = z[:, 0].mean(0), z[:, 2].mean(0)
        return z

    got, wanted = (forward.run(model, tokens, edit=change) for change in (edit, by_hand))
    assert (got - wanted).abs().max() < 1e-12 and (got - forward.run(model, tokens)).abs().max() > 1e-3
    losses = forward.text_losses(model, tokens, batch_size=2, edit=edit)
    assert not np.allclose(losses, forward.text_losses(model, tokens))
