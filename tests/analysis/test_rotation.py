"""The rotated and the other part of attention logits: they add up, and replacing them does what it says."""

import pytest
import torch

from analysis.forward import embed, run
from analysis.induction import head_scores, repeated_sequences
from analysis.rotation import logit_parts, mean_by_distance, replace_logits
from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig

SIZES = dict(block_size=16, vocab_size=20, n_layer=2, n_head=2, n_embd=16, bias=False, pos='rope', init_std=0.5)
MODELS = {
    'MHA': lambda: GPT(GPTConfig(**SIZES)),
    'half rotated': lambda: GPT(GPTConfig(**SIZES, n_rope=4)),
    'MQA': lambda: GPT(GPTConfig(**SIZES, n_rope=4, n_kv_head=1)),
    'MLA': lambda: MLAGPT(MLAConfig(**SIZES, n_latent=6, latent_norm=True)),
}
REPEATS = repeated_sequences(6, 8, range(20), seed=3)


def seen_in(model, layer=1):
    seen = {}
    run(model, REPEATS.tokens, visit=lambda n, a: seen.update({n: a}))
    return seen[layer], model.transformer.h[layer].attn.scale


@pytest.mark.parametrize('name', MODELS)
def test_parts_add_up_to_the_logits(name):
    model = MODELS[name]().eval()
    attention, scale = seen_in(model)
    parts, _ = logit_parts(attention, 1, scale, model.rope)
    assert list(parts) == (['rotated'] if name == 'MHA' else ['content', 'rotated'])
    hidden = torch.ones(16, 16, dtype=torch.bool).triu(1)
    pattern = sum(parts.values()).masked_fill(hidden, float('-inf')).softmax(-1)
    torch.testing.assert_close(pattern, attention.pattern[:, 1])


def test_without_rotation_means_queries_and_keys_as_at_position_0():
    model = MODELS['half rotated']().eval()
    attention, scale = seen_in(model, layer=0)
    _, flat = logit_parts(attention, 0, scale, model.rope)
    still = model.rope[:, :1].expand(-1, 16, -1)  # position 0 everywhere: no rotation
    q, k, _ = model.transformer.h[0].attn.qkv(model.transformer.h[0].ln_1(embed(model, REPEATS.tokens)), still)
    torch.testing.assert_close(flat, scale * q[:, 0, :, 4:] @ k[:, 0, :, 4:].mT)


def test_a_mean_by_distance_is_what_averaging_by_hand_gives():
    logits = torch.randn(3, 5, 5)
    found = mean_by_distance(logits)
    for distance in range(5):
        by_hand = torch.stack([logits[:, i, i - distance] for i in range(distance, 5)]).mean()
        torch.testing.assert_close(found.diagonal(-distance, 1, 2), by_hand.expand(3, 5 - distance))


def test_a_head_that_needs_one_part_loses_its_score_with_it_alone():
    """Layer 0, head 0 attends one token back by rotation alone: its other dimensions are zero."""
    model = GPT(GPTConfig(**SIZES, n_rope=4, rope_theta=9)).eval()
    attn = model.transformer.h[0].attn
    with torch.no_grad():
        weight = attn.c_attn.weight.view(3, 2, 8, 16)
        weight[:2, 0] = 0
        # constant queries and keys, the query one position ahead: their product is largest one token back
        direction = torch.ones(16) / 4
        model.transformer.wte.weight.mul_(0.05).add_(direction)
        model.transformer.h[0].ln_1 = torch.nn.Identity()
        angle = torch.tensor([1.0, 1 / 3])
        for pair, turn in enumerate(angle):
            weight[1, 0, 4 + 2 * pair] = 12 * direction
            weight[0, 0, 4 + 2 * pair] = 12 * direction * torch.cos(turn)
            weight[0, 0, 5 + 2 * pair] = -12 * direction * torch.sin(turn)
    scores = head_scores(model, REPEATS)['previous_token'].mean(0)
    assert scores[0, 0] > 0.9
    found = replace_logits(model, REPEATS, (0, 0), 'previous_token')
    assert found['content']['mean']['score'] == pytest.approx(scores[0, 0], abs=1e-4)
    assert found['rotated']['mean by distance']['score'] > 0.9
    assert found['rotated']['not rotated']['score'] < 0.3 and found['rotated']['mean']['score'] < 0.3
    assert found['content']['mean']['rise'] == pytest.approx(0, abs=1e-4)
