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


def misfit(config: GPTConfig) -> str:
    """The setting that keeps a model from being a DeepseekV3ForCausalLM, as 'key=value'; '' where it is one."""
    assert isinstance(config, MLAConfig)
    needed = {'shared_rope': True, 'latent_norm': True}
    wrong = (f'{key}={getattr(config, key)}' for key, value in needed.items() if getattr(config, key) != value)
    return llama.block_misfit(config) or next(wrong, '')


def hf_settings(config: MLAConfig) -> dict[str, Any]:
    """The config.json of a DeepseekV3ForCausalLM that is the model of an MLAConfig; `misfit` must be ''."""
    return {
        'model_type': 'deepseek_v3',
        'architectures': [CLASS],
        'num_key_value_heads': config.n_head,
        'kv_lora_rank': config.n_latent,
        'q_lora_rank': config.n_latent_q or None,
        'qk_nope_head_dim': config.n_nope,
        'qk_rope_head_dim': config.n_rope,
        'v_head_dim': config.n_value,
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
    for key in ('kv_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim'):
        if not getattr(hf_config, key):
            raise ValueError(f'it has {key}={getattr(hf_config, key)}; it must be at least 1')
    return {
        **settings,
        'n_latent': hf_config.kv_lora_rank,
        'n_latent_q': hf_config.q_lora_rank or 0,
        'n_nope': hf_config.qk_nope_head_dim,
        'n_rope': hf_config.qk_rope_head_dim,
        'n_value': hf_config.v_head_dim,
        'latent_norm': True,
    }


def same(config: MLAConfig) -> dict[str, str]:
    """The attention's tensors that are the same in both, by their names there and here."""
    if config.n_latent_q:
        queries = {'q_a_proj': 'c_q_down', 'q_a_layernorm': 'q_norm', 'q_b_proj': 'c_q'}
    else:
        queries = {'q_proj': 'c_q'}
    return {**queries, 'kv_a_proj_with_mqa': 'c_kv_down', 'kv_a_layernorm': 'kv_norm'}


def shapes(config: MLAConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of the DeepseekV3ForCausalLM that is the model of an MLAConfig."""
    C, H, r, r_q = config.n_embd, config.n_head, config.n_latent, config.n_latent_q
    queries = H * (config.n_nope + config.n_rope)
    attention: dict[str, tuple[int, ...]] = {'q_proj': (queries, C)}
    if r_q:
        attention = {'q_a_proj': (r_q, C), 'q_a_layernorm': (r_q,), 'q_b_proj': (queries, r_q)}
    attention |= {
        'kv_a_proj_with_mqa': (r + config.n_rope, C),
        'kv_a_layernorm': (r,),
        'kv_b_proj': (H * (config.n_nope + config.n_value), r),
        'o_proj': (C, H * config.n_value),
    }
    return llama.model_shapes(config, attention)


def from_hf(tensors: dict[str, Tensor], config: MLAConfig, halves: bool = False) -> dict[str, Tensor]:
    """
    The state of an MLAGPT from the tensors of a DeepseekV3ForCausalLM, which must be those of `shapes`.

    halves: RoPE pairs x[i] with x[i + R/2], as where rope_interleave is False.
    """
    state = llama.blocks_from(tensors, config)
    for layer in range(config.n_layer):
        theirs, ours = f'model.layers.{layer}.self_attn', f'transformer.h.{layer}.attn'
        for there, here in same(config).items():
            state[f'{ours}.{here}.weight'] = tensors[f'{theirs}.{there}.weight']
        if halves:
            q, down = f'{ours}.c_q.weight', f'{ours}.c_kv_down.weight'
            heads = state[q].unflatten(0, (config.n_head, -1))
            state[q] = torch.stack([neighbors_at_the_end(head, config.n_rope) for head in heads]).flatten(0, 1)
            state[down] = neighbors_at_the_end(state[down], config.n_rope)
        up = tensors[f'{theirs}.kv_b_proj.weight'].unflatten(0, (config.n_head, -1))
        keys, values = up.split((config.n_nope, config.n_value), dim=1)
        state[f'{ours}.c_kv_up.weight'] = torch.cat((keys.flatten(0, 1), values.flatten(0, 1)))
    return state


def to_hf(state: dict[str, Tensor], config: MLAConfig) -> dict[str, Tensor]:
    """The tensors of a DeepseekV3ForCausalLM from the state of an MLAGPT whose `misfit` is ''."""
    tensors = llama.blocks_to(state, config)
    for layer in range(config.n_layer):
        theirs, ours = f'model.layers.{layer}.self_attn', f'transformer.h.{layer}.attn'
        for there, here in same(config).items():
            tensors[f'{theirs}.{there}.weight'] = state[f'{ours}.{here}.weight']
        keys, values = state[f'{ours}.c_kv_up.weight'].tensor_split([config.n_head * config.n_nope])
        heads = [part.unflatten(0, (config.n_head, -1)) for part in (keys, values)]
        tensors[f'{theirs}.kv_b_proj.weight'] = torch.cat(heads, dim=1).flatten(0, 1)
    return tensors


def neighbors_at_the_end(rows: Tensor, size: int) -> Tensor:
    """rows (n, C) whose last `size` have RoPE's pairs (i, i + size/2), with pairs (2i, 2i + 1) instead."""
    return torch.cat((rows[:-size], to_neighbors(rows[-size:], 1)))
