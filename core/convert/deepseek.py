"""
DeepSeek-V3's form, in both directions: MLAConfig and tensors of model_mla.py, and those of transformers'
DeepseekV3ForCausalLM with dense layers only (no experts).

The model is the same where it has RMSNorm, also on the latents, SwiGLU, decoupled RoPE and no biases. Its rows are in
the same order but for one matrix: kv_b_proj holds, head by head, the head's keys and then its values, and our c_kv_up
holds all keys and then all values. Latents' norms have eps = 1e-6 in both, whatever rms_norm_eps says of the others.
"""

from typing import Any

import torch
from torch import Tensor

from core.convert import llama
from core.convert.llama import require, to_neighbors
from model import GPTConfig
from model_mla import MLAConfig

CLASS = 'DeepseekV3ForCausalLM'
# sizes by our names, and their names in transformers
SIZES = dict(n_latent='kv_lora_rank', n_nope='qk_nope_head_dim', n_rope='qk_rope_head_dim', n_value='v_head_dim')


def misfit(config: GPTConfig) -> str:
    """The setting that keeps a model from being a DeepseekV3ForCausalLM, as 'key=value'; '' where it is one."""
    return llama.block_misfit(config, shared_rope=True, latent_norm=True)


def hf_settings(config: MLAConfig) -> dict[str, Any]:
    """The config.json of a DeepseekV3ForCausalLM that is the model of an MLAConfig; `misfit` must be ''."""
    return {
        'model_type': 'deepseek_v3',
        'architectures': [CLASS],
        'num_key_value_heads': config.n_head,
        'q_lora_rank': config.n_latent_q or None,
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        'rope_interleave': True,
        'first_k_dense_replace': config.n_layer,  # no layer has experts
        'routed_scaling_factor': 1.0,  # vLLM scales float16's residual stream by it, also where there are no experts
        'num_nextn_predict_layers': 0,
        **llama.block_settings(config),
    }


def settings_of(hf_config: Any) -> dict[str, Any]:
    """MLAConfig's keyword arguments for a transformers DeepseekV3Config. ValueError names what it can't express."""
    settings = llama.block_settings_of(hf_config)
    dense, layers = hf_config.first_k_dense_replace, hf_config.num_hidden_layers
    if dense < layers:
        raise ValueError(f'it has experts in {layers - dense} of {layers} layers; only dense layers are supported')
    require(hf_config, 'num_key_value_heads', hf_config.num_attention_heads)
    sizes = {ours: getattr(hf_config, theirs) for ours, theirs in SIZES.items()}
    for name, value in sizes.items():
        if not value:
            raise ValueError(f'it has {SIZES[name]}={value}; it must be at least 1')
    return {**settings, **sizes, 'n_latent_q': hf_config.q_lora_rank or 0, 'latent_norm': True}


def attention_names(config: MLAConfig) -> dict[str, str]:
    """The attention's tensors here and there, as llama.names takes them."""
    if config.n_latent_q:
        queries = {'c_q_down': 'q_a_proj', 'q_norm': 'q_a_layernorm', 'c_q': 'q_b_proj'}
    else:
        queries = {'c_q': 'q_proj'}
    own = {**queries, 'c_kv_down': 'kv_a_proj_with_mqa', 'kv_norm': 'kv_a_layernorm', 'c_kv_up': 'kv_b_proj'}
    return {f'attn.{ours}': f'self_attn.{theirs}' for ours, theirs in own.items()}


def from_hf(tensors: dict[str, Tensor], config: MLAConfig, halves: bool = False) -> dict[str, Tensor]:
    """The state of an MLAGPT from a DeepseekV3ForCausalLM's tensors. halves: RoPE pairs x[i] with x[i + R/2]."""
    state = llama.joined(tensors, config, attention_names(config))
    for layer in range(config.n_layer):
        q, down, up = (f'transformer.h.{layer}.attn.{name}.weight' for name in ('c_q', 'c_kv_down', 'c_kv_up'))
        if halves:
            heads = state[q].unflatten(0, (config.n_head, -1))
            state[q] = torch.stack([neighbors_at_the_end(head, config.n_rope) for head in heads]).flatten(0, 1)
            state[down] = neighbors_at_the_end(state[down], config.n_rope)
        keys, values = state[up].unflatten(0, (config.n_head, -1)).split((config.n_nope, config.n_value), dim=1)
        state[up] = torch.cat((keys.flatten(0, 1), values.flatten(0, 1)))
    return state


def to_hf(state: dict[str, Tensor], config: MLAConfig) -> dict[str, Tensor]:
    """The tensors of a DeepseekV3ForCausalLM from the state of an MLAGPT whose `misfit` is ''."""
    tensors = llama.divided(state, config, attention_names(config))
    for layer in range(config.n_layer):
        up = f'model.layers.{layer}.self_attn.kv_b_proj.weight'
        keys, values = tensors[up].tensor_split([config.n_head * config.n_nope])
        heads = [part.unflatten(0, (config.n_head, -1)) for part in (keys, values)]
        tensors[up] = torch.cat(heads, dim=1).flatten(0, 1)
    return tensors


def neighbors_at_the_end(rows: Tensor, size: int) -> Tensor:
    """rows (n, C) whose last `size` have RoPE's pairs (i, i + size/2), with pairs (2i, 2i + 1) instead."""
    return torch.cat((rows[:-size], to_neighbors(rows[-size:], 1)))
