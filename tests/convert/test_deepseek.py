"""DeepSeek-V3's form: transformers' dense models open here, and ours in transformers' class, with the same logits."""

import pytest
import torch
from support.native import IDX, check_generation, exported, logit_difference, our_deepseek, their_deepseek
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from core.cli.errors import UserError
from core.convert import deepseek
from core.runs import models
from model_mla import MLAConfig

OURS = {
    'published': dict(),
    'compressed queries, untied': dict(n_latent_q=13, tied=False),
    'default sizes, another theta': dict(n_nope=0, n_value=0, n_rope=0, n_head=2, n_embd=40, rope_theta=300.0),
    'large latent': dict(n_latent=42, n_value=16),
}
THEIRS = {
    'queries from the stream': dict(),
    'compressed queries, tied': dict(q_lora_rank=11, tie_word_embeddings=True),
    'halves rotated': dict(rope_interleave=False),
    'halves rotated, compressed queries, our eps': dict(rope_interleave=False, q_lora_rank=11, rms_norm_eps=1e-5),
    'another theta': dict(rope_parameters={'rope_type': 'default', 'rope_theta': 300.0}),
}


@pytest.mark.parametrize('name', OURS)
def test_our_model_opens_in_transformers_class(name):
    ours = our_deepseek(**OURS[name])
    theirs = exported(ours, DeepseekV3ForCausalLM, DeepseekV3Config)
    assert logit_difference(ours, theirs) < 1e-5
    check_generation(ours, theirs)


@pytest.mark.parametrize('name', THEIRS)
def test_transformers_model_opens_here(name, tmp_path):
    theirs = their_deepseek(**THEIRS[name])
    theirs.save_pretrained(tmp_path)
    ours, _ = models.pretrained(str(tmp_path))
    assert logit_difference(ours.eval(), theirs) < 1e-5


def test_what_opens_here_goes_back_bit_for_bit(tmp_path):
    theirs = their_deepseek(rms_norm_eps=1e-5, q_lora_rank=11)
    theirs.save_pretrained(tmp_path)
    ours, _ = models.pretrained(str(tmp_path))
    back = deepseek.to_hf(ours.state_dict(), ours.config)
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in theirs.state_dict().items())


def test_bfloat16_is_as_near_as_our_own():
    ours = our_deepseek()
    exact = ours(IDX, IDX)[0]
    theirs = exported(ours, DeepseekV3ForCausalLM, DeepseekV3Config, torch.bfloat16)
    own_error = (ours.bfloat16()(IDX, IDX)[0] - exact).abs().mean()
    assert (theirs(IDX).logits - exact).abs().mean() < 1.5 * own_error


@pytest.mark.parametrize('changes, named', [
    (dict(norm='layer'), 'norm=layer'),
    (dict(mlp='gelu'), 'mlp=gelu'),
    (dict(pos='none', n_rope=0), 'pos=none'),
    (dict(bias=True), 'bias=True'),
    (dict(latent_norm=False), 'latent_norm=False'),
    (dict(shared_rope=False, n_rope=0, n_nope=8), 'shared_rope=False'),
], ids=str)  # fmt: skip
def test_a_setting_that_deepseek_lacks_is_named(changes, named):
    assert deepseek.misfit(our_deepseek(**changes).config) == named


def test_the_defaults_of_mla_are_no_deepseek():
    assert deepseek.misfit(MLAConfig()) == 'norm=layer'
    assert deepseek.misfit(our_deepseek().config) == ''


NEEDS = {
    'experts': (dict(first_k_dense_replace=1, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2,
                     moe_intermediate_size=8), 'experts in 2 of 3 layers'),
    'biases': (dict(attention_bias=True), 'it has attention_bias=True; only False'),
    'another activation': (dict(hidden_act='gelu'), 'it has hidden_act=gelu; only silu'),
    'yarn': (dict(rope_parameters=dict(rope_type='yarn', factor=2.0, rope_theta=1e4)), 'scaled .* RoPE'),
    'a latent wider than the stream': (dict(kv_lora_rank=61), 'n_latent=61 is outside 1 to n_embd=60'),
}  # fmt: skip


@pytest.mark.parametrize('name', NEEDS)
def test_what_a_config_needs_and_we_lack_is_refused_by_name(name, tmp_path):
    changes, message = NEEDS[name]
    their_deepseek(**changes).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        models.pretrained(str(tmp_path))


def test_a_further_layer_for_prediction_is_refused_by_name(tmp_path):
    """transformers drops model.layers.61 of any file in silence; here a tensor that isn't used is an error."""
    from safetensors.torch import load_file, save_file

    their_deepseek().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / 'model.safetensors')
    tensors['model.layers.61.eh_proj.weight'] = torch.ones(60, 120)
    save_file(tensors, tmp_path / 'model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(UserError, match='needs what our model lacks: model.layers.61.eh_proj.weight'):
        models.pretrained(str(tmp_path))
