"""
Llama's form, in both directions: GPTConfig and tensors of model.py, and those of transformers' LlamaForCausalLM.

The model is the same where it has RMSNorm, SwiGLU, RoPE over the whole head and no biases. Two things differ:

- Llama keeps q, k and v, and gate and up, as matrices of their own.
- RoPE rotates pairs of dimensions. Ours are neighbors, (x[2i], x[2i+1]), as in Su et al. 2021; transformers' Llama
  pairs x[i] with x[i + d/2]. The rows of W_Q and W_K are permuted within each head, which changes no score. Llama's
  GGUF files hold neighbors, as we do.

Our norms have eps = 1e-5. A model of another eps is expressed exactly in a residual stream that is s times as large:
g s x / sqrt(s^2 m + 1e-5) = g x / sqrt(m + 1e-5 / s^2), so s = sqrt(1e-5 / eps); see `with_our_eps`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model import GPTConfig

CLASS = 'LlamaForCausalLM'
EPS = 1e-5  # of the RMSNorm of model.py
# sizes by our names, and their names in transformers
SIZES = dict(vocab_size='vocab_size', n_embd='hidden_size', block_size='max_position_embeddings')
SIZES |= dict(n_layer='num_hidden_layers', n_head='num_attention_heads')
# tensors of our blocks, and the names of their parts there, one below the other
BLOCK = {
    'ln_1': 'input_layernorm',
    'attn.c_proj': 'self_attn.o_proj',
    'ln_2': 'post_attention_layernorm',
    'mlp.c_fc': 'mlp.gate_proj mlp.up_proj',
    'mlp.c_proj': 'mlp.down_proj',
}
ATTENTION = {'attn.c_attn': 'self_attn.q_proj self_attn.k_proj self_attn.v_proj'}


# ---- configs ---------------------------------------------------------------------------------------------------------


def misfit(config: GPTConfig) -> str:
    """The setting that keeps a model from being a LlamaForCausalLM, as 'key=value'; '' where it is one."""
    whole_head = config.n_rope in (0, config.head_size)
    return block_misfit(config) or ('' if whole_head else f'n_rope={config.n_rope}')


def block_misfit(config: GPTConfig, **more: Any) -> str:
    """The same for what all of today's models share, and `more` settings that are needed."""
    needed = {'norm': 'rms', 'mlp': 'swiglu', 'pos': 'rope', 'bias': False, **more}
    wrong = (f'{key}={getattr(config, key)}' for key, value in needed.items() if getattr(config, key) != value)
    return next(wrong, '')


def hf_settings(config: GPTConfig) -> dict[str, Any]:
    """The config.json of a LlamaForCausalLM that is the model of a GPTConfig; `misfit` must be ''."""
    heads = {'num_key_value_heads': config.kv_heads, 'head_dim': config.head_size, 'mlp_bias': False}
    return {'model_type': 'llama', 'architectures': [CLASS], **heads, **block_settings(config)}


def block_settings(config: GPTConfig) -> dict[str, Any]:
    """What all of today's models have in their config.json."""
    return {
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        'intermediate_size': config.hidden_size,
        'rms_norm_eps': EPS,
        'hidden_act': 'silu',
        'attention_bias': False,
        'rope_theta': float(config.rope_theta),  # read by transformers 4, vLLM and SGLang; 5 reads the next
        'rope_parameters': {'rope_type': 'default', 'rope_theta': float(config.rope_theta)},
        'tie_word_embeddings': config.tied,
    }


def settings_of(hf_config: Any) -> dict[str, Any]:
    """GPTConfig's keyword arguments for a transformers LlamaConfig. ValueError names what GPTConfig can't express."""
    settings = block_settings_of(hf_config)
    require(hf_config, 'mlp_bias', False, None)
    require(hf_config, 'head_dim', settings['n_embd'] // settings['n_head'], None)
    return {**settings, 'n_kv_head': hf_config.num_key_value_heads}


def block_settings_of(hf_config: Any) -> dict[str, Any]:
    """The keyword arguments that do not depend on the attention."""
    require(hf_config, 'hidden_act', 'silu', 'swish')
    for key in ('attention_bias', 'sliding_window', 'quantization_config'):
        require(hf_config, key, False, None)
    rope = hf_config.rope_parameters
    if rope['rope_type'] != 'default' or rope.get('partial_rotary_factor') not in (None, 1):
        told = ', '.join(f'{key}={value}' for key, value in rope.items())
        raise ValueError(f'it has scaled or partial RoPE ({told}); only plain RoPE over the whole head is supported')
    if not hf_config.rms_norm_eps > 0:
        raise ValueError(f'its rms_norm_eps is {hf_config.rms_norm_eps}; it must be above 0')
    return {
        **{ours: getattr(hf_config, theirs) for ours, theirs in SIZES.items()},
        'n_hidden': hf_config.intermediate_size,
        'rope_theta': float(rope['rope_theta']),
        'tied': bool(hf_config.tie_word_embeddings),
        **dict(pos='rope', norm='rms', mlp='swiglu', bias=False),
    }


def require(hf_config: Any, key: str, *values: Any) -> None:
    """ValueError unless a config's `key` has one of `values`, or is absent."""
    value = getattr(hf_config, key, values[0])
    if value not in values:
        raise ValueError(f'it has {key}={str(value)[:60]}; only {values[0]} is supported')


# ---- tensors ---------------------------------------------------------------------------------------------------------


def from_hf(tensors: dict[str, Tensor], config: GPTConfig, halves: bool = True) -> dict[str, Tensor]:
    """The state of a GPT from a LlamaForCausalLM's tensors. halves: RoPE pairs x[i] with x[i + d/2], not neighbors."""
    return joined(turned(tensors, config, to_neighbors) if halves else tensors, config, ATTENTION)


def to_hf(state: dict[str, Tensor], config: GPTConfig, halves: bool = True) -> dict[str, Tensor]:
    """The tensors of a LlamaForCausalLM from the state of a GPT whose `misfit` is ''; halves: see `from_hf`."""
    tensors = divided(state, config, ATTENTION)
    return turned(tensors, config, to_halves) if halves else tensors


def names(n_layer: int, tied: bool, attention: dict[str, str]) -> dict[str, list[str]]:
    """The names of our tensors, and those of their parts there. attention: as BLOCK, for the rest of a block."""
    found = {
        'transformer.wte.weight': ['model.embed_tokens.weight'],
        'transformer.ln_f.weight': ['model.norm.weight'],
        'lm_head.weight': ['model.embed_tokens.weight' if tied else 'lm_head.weight'],
    }
    for layer in range(n_layer):
        for ours, theirs in (BLOCK | attention).items():
            parts = [f'model.layers.{layer}.{part}.weight' for part in theirs.split()]
            found[f'transformer.h.{layer}.{ours}.weight'] = parts
    return found


def joined(tensors: dict[str, Tensor], config: GPTConfig, attention: dict[str, str]) -> dict[str, Tensor]:
    """Our tensors from their parts, by `names`."""
    state = {}
    for ours, theirs in names(config.n_layer, config.tied, attention).items():
        state[ours] = torch.cat([tensors[name] for name in theirs]) if len(theirs) > 1 else tensors[theirs[0]]
    return state


def divided(state: dict[str, Tensor], config: GPTConfig, attention: dict[str, str]) -> dict[str, Tensor]:
    """The opposite of `joined`."""
    kv, tensors = config.kv_heads * config.head_size, dict[str, Tensor]()
    for ours, theirs in names(config.n_layer, config.tied, attention).items():
        # gate and up; queries, keys and values
        rows = {1: len(state[ours]), 2: config.hidden_size, 3: (config.n_embd, kv, kv)}[len(theirs)]
        tensors |= zip(theirs, state[ours].split(rows), strict=True)
    return tensors


def turned(tensors: dict[str, Tensor], config: GPTConfig, order: Callable[[Tensor, int], Tensor]) -> dict[str, Tensor]:
    """A LlamaForCausalLM's tensors with W_Q and W_K in another order of rows."""
    heads = {'q_proj': config.n_head, 'k_proj': config.kv_heads}
    parts = {name: name.split('.')[-2] for name in tensors}
    return {n: order(tensor, heads[parts[n]]) if parts[n] in heads else tensor for n, tensor in tensors.items()}


def to_neighbors(rows: Tensor, heads: int) -> Tensor:
    """The rows (heads * d, ...) of a projection whose pairs are (i, i + d/2), with pairs (2i, 2i + 1) instead."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def to_halves(rows: Tensor, heads: int) -> Tensor:
    """The opposite of `to_neighbors`."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def with_our_eps(state: dict[str, Tensor], config: GPTConfig, eps: float) -> dict[str, Tensor]:
    """
    The state of a GPT whose eps is 1e-5 and whose logits are those of `state` with `eps`.

    What writes to the residual stream is scaled by s (see the top of this file); a tied head, which is the embedding
    too, has the factor taken out by the last norm's gain.
    """
    if eps == EPS:
        return state
    scale = math.sqrt(EPS / eps)
    writes = ('wte.weight', 'c_proj.weight')
    scaled = {name: value * scale if name.endswith(writes) else value for name, value in state.items()}
    if config.tied:
        scaled['lm_head.weight'] = scaled['transformer.wte.weight']
        scaled['transformer.ln_f.weight'] = scaled['transformer.ln_f.weight'] / scale
    return scaled
