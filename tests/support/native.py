"""Tiny models of the two forms that others serve, ours and those of transformers, and what both must agree in."""

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

from core.convert import published
from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig

VOCAB, BLOCK = 37, 40
OURS = dict(block_size=BLOCK, vocab_size=VOCAB, n_layer=3, n_head=3, n_embd=42, bias=False, norm='rms', mlp='swiglu',
            pos='rope')  # fmt: skip
THEIRS = dict(vocab_size=VOCAB, hidden_size=60, intermediate_size=52, num_hidden_layers=3, num_attention_heads=6,
              max_position_embeddings=BLOCK)  # fmt: skip
IDX = torch.randint(VOCAB, (3, BLOCK), generator=torch.Generator().manual_seed(1))


def shaken(model):
    """The model with every parameter, norms too, far enough from its initial value to matter."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def our_llama(**changes):
    return shaken(GPT(GPTConfig(**{**OURS, 'n_hidden': 50, **changes})))


def our_deepseek(**changes):
    sizes = dict(n_latent=11, n_nope=7, n_rope=6, n_value=9, latent_norm=True)
    return shaken(MLAGPT(MLAConfig(**{**OURS, **sizes, **changes})))


def their_llama(**changes):
    torch.manual_seed(0)
    return shaken(LlamaForCausalLM(LlamaConfig(**{**THEIRS, 'num_key_value_heads': 2, **changes})))


def their_deepseek(**changes):
    latents = dict(kv_lora_rank=14, q_lora_rank=None, num_key_value_heads=6, first_k_dense_replace=3)
    sizes = dict(latents, qk_nope_head_dim=7, qk_rope_head_dim=6, v_head_dim=9)
    torch.manual_seed(0)
    return shaken(DeepseekV3ForCausalLM(DeepseekV3Config(**{**THEIRS, **sizes, **changes})))


def exported(ours, theirs_class, config_class, dtype=torch.float32):
    """Our model in transformers' class, through the config and tensors that an export writes."""
    form = published.native_form(ours.config)
    assert form.misfit(ours.config) == ''
    config = config_class(**form.hf_settings(ours.config), pad_token_id=0, eos_token_id=None, bos_token_id=None)
    theirs, tensors = theirs_class(config), form.to_hf(ours.state_dict(), ours.config)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == form.shapes(ours.config)
    report = theirs.load_state_dict(tensors, strict=False)
    assert report.unexpected_keys == [] and report.missing_keys == ['lm_head.weight'] * ours.config.tied
    theirs.tie_weights()
    return theirs.to(dtype).eval()


@torch.no_grad()
def logit_difference(ours, theirs, idx=IDX):
    """The largest difference of two models' logits, which are far from 0."""
    logits = ours(idx, idx)[0]
    assert logits.abs().max() > 1
    return (theirs(idx).logits - logits).abs().max().item()


@torch.no_grad()
def check_generation(ours, theirs):
    """Greedy text is ours: of whole prompts with both caches, and of left-padded ones with a dynamic cache."""
    prompts, new = IDX[:, :9], 25
    expected = ours.generate(prompts, new, temperature=0)
    for cache in ({}, dict(past_key_values=StaticCache(theirs.config, max_cache_len=BLOCK)), dict(use_cache=False)):
        whole = torch.ones_like(prompts)
        text = theirs.generate(prompts, attention_mask=whole, max_new_tokens=new, do_sample=False, **cache)
        assert torch.equal(text, expected)
    starts = (0, 4, 8)  # what precedes them is padding
    mask = torch.stack([torch.arange(9) >= start for start in starts]).long()
    padded = theirs.generate(prompts * mask, attention_mask=mask, max_new_tokens=new, do_sample=False)
    for row, start in enumerate(starts):
        alone = ours.generate(prompts[row : row + 1, start:], new, temperature=0)
        assert torch.equal(padded[row : row + 1, start:], alone)
