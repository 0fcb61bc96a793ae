"""
GPT-2's weights, in both directions: from a Hugging Face model to the tensors of model.py, and back.

The names of the tensors are the same on both sides. OpenAI's code stores the weight of a linear layer as (in, out),
PyTorch as (out, in), so those are transposed. GPT-2 has biases everywhere. Nothing here knows a model class.
"""

import os
from typing import Any

import torch

from core.cli import ranges
from ops.checks import not_finite

GPT2_SIZES = {
    'gpt2': dict(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    'gpt2-medium': dict(n_layer=24, n_head=16, n_embd=1024),  # 350M
    'gpt2-large': dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    'gpt2-xl': dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}
TRANSPOSED = ('c_attn.weight', 'c_fc.weight', 'c_proj.weight')
# our name of the activation, and the names it has in transformers
GELUS = {'tanh': ('gelu_new', 'gelu_pytorch_tanh'), 'exact': ('gelu',)}
# the sizes of GPTConfig, and their names in transformers
RENAMED = dict(block_size='n_positions', vocab_size='vocab_size', n_layer='n_layer', n_head='n_head', n_embd='n_embd')


def read(
    model_type: str, override_args: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """
    A published GPT-2, one of GPT2_SIZES, or a local Hugging Face folder: keyword arguments of GPTConfig, and its state.

    override_args: dropout, flash and recompute alone, since all else comes with the weights. Raises ValueError for an
    unknown name, for a model that GPTConfig can't express, and for tensors that are not GPT-2's or not finite.
    """
    if model_type not in GPT2_SIZES and not os.path.isdir(model_type):
        raise ValueError(f"'{model_type}' is neither one of {', '.join(GPT2_SIZES)} nor a folder with a GPT-2 model")
    override_args = override_args or {}
    if fixed := set(override_args) - {'dropout', 'flash', 'recompute'}:
        raise ValueError(f'{sorted(fixed)} cannot be overridden: the pretrained weights decide that')
    from transformers import AutoConfig, AutoModelForCausalLM

    def unreadable(error):
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return ValueError(f"'{model_type}' can't be loaded ({reason}); check the name, the folder and the network")

    try:
        hf_config = AutoConfig.from_pretrained(model_type, trust_remote_code=False)
    except ValueError as error:  # it would need code of its own
        raise ValueError(f"'{model_type}' holds no GPT-2; of an exported MLA model, name its checkpoint") from error
    except Exception as error:  # a damaged file raises almost anything
        raise unreadable(error) from error
    if hf_config.model_type != 'gpt2':
        known = 'only GPT-2, Llama and dense DeepSeek-V3 can be loaded'
        raise ValueError(f"'{model_type}' holds a {hf_config.model_type} model; {known}")
    settings = settings_of(hf_config)
    for name, value in settings.items():
        if found := ranges.problem(name, value):
            raise ValueError(f"'{model_type}' can't be loaded: its {name} {found}")
    try:
        # transformers keeps the dtype on disk unless told otherwise, and initializes what the file lacks at random
        loaded: Any = AutoModelForCausalLM.from_pretrained(model_type, dtype=torch.float32, output_loading_info=True)
        hf_model, report = loaded
    except Exception as error:
        raise unreadable(error) from error
    wrong = sorted(set(report['missing_keys']) | set(report['unexpected_keys']))
    if wrong:
        raise ValueError(f"the tensors in '{model_type}' are not GPT-2's; missing or unknown: {', '.join(wrong[:6])}")
    state = {n: value.t() if n.endswith(TRANSPOSED) else value for n, value in hf_model.state_dict().items()}
    if wrong_name := not_finite(state):
        raise ValueError(f"'{model_type}' holds weights that are not finite: {wrong_name}")
    return {**settings, **override_args}, state


def settings_of(hf_config: Any) -> dict[str, Any]:
    """GPTConfig's keyword arguments for a transformers GPT2Config. ValueError where GPTConfig can't express it."""
    expected = dict(layer_norm_epsilon=1e-5, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    for name, value in expected.items():
        if getattr(hf_config, name) != value:
            raise ValueError(f'this GPT-2 has {name}={getattr(hf_config, name)}; only {value} is supported')
    gelu = next((ours for ours, theirs in GELUS.items() if hf_config.activation_function in theirs), None)
    if gelu is None:
        raise ValueError(f"this GPT-2 uses '{hf_config.activation_function}'; only GELU is supported")
    n_hidden = 0 if hf_config.n_inner in (None, 4 * hf_config.n_embd) else hf_config.n_inner
    further = {'bias': True, 'gelu': gelu, 'n_hidden': n_hidden, 'tied': bool(hf_config.tie_word_embeddings)}
    return {ours: getattr(hf_config, theirs) for ours, theirs in RENAMED.items()} | further


def misfit(config: Any) -> str:
    """The setting that keeps a model from being a GPT2LMHeadModel, as 'key=value'; '' where it is one."""
    needed = {'norm': 'layer', 'mlp': 'gelu', 'pos': 'learned'}
    wrong = (f'{key}={getattr(config, key)}' for key, value in needed.items() if getattr(config, key) != value)
    return next(wrong, '')


def hf_settings(config: Any) -> dict[str, Any]:
    """The config.json of a GPT2LMHeadModel that is the model of a GPTConfig; `misfit` must be ''."""
    sizes = {theirs: getattr(config, ours) for ours, theirs in RENAMED.items()}
    dropout = dict.fromkeys(('resid_pdrop', 'embd_pdrop', 'attn_pdrop'), config.dropout)
    further = {'activation_function': GELUS[config.gelu][0], 'layer_norm_epsilon': 1e-5, 'n_inner': config.hidden_size}
    return {'model_type': 'gpt2', 'architectures': ['GPT2LMHeadModel'], **sizes, **dropout, **further}


def to_gpt2(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """model.py's tensors as a Hugging Face GPT-2 has them; a bias that the model lacks becomes zeros."""
    out = {}
    for name, value in state.items():
        out[name] = value.t().contiguous() if name.endswith(TRANSPOSED) else value
        bias = name.removesuffix('weight') + 'bias'
        if name.endswith(TRANSPOSED) or ('.ln_' in name and name.endswith('weight')):
            out.setdefault(bias, state.get(bias, torch.zeros(value.size(0), dtype=value.dtype)))
    return out
