"""
Models that others published: reading a Hugging Face folder with a Llama or a dense DeepSeek-V3, or a Llama's GGUF file.

Weights are read from safetensors and GGUF files alone, which hold no code. Every tensor of a file is used, or the file
is refused; so is a config that asks for what model.py and model_mla.py lack.
"""

import json
import os
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from core.cli import ranges
from core.convert import deepseek, gguf_file, hf_tokenizer, llama
from core.text.tokenizer import NO_TEXT
from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig
from ops.checks import not_finite

# by a config's model_type: the model, its config, and the module that knows the form
FORMS: dict[str, tuple[type[GPT], type[GPTConfig], Any]] = {
    'llama': (GPT, GPTConfig, llama),
    'deepseek_v3': (MLAGPT, MLAConfig, deepseek),
}
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
COPY = 'copy it again'
# the keys of a model's shape that the forms here, GPT-2's and the exported code take into account
KNOWN = {
    *('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias', 'gelu', 'norm', 'mlp', 'n_hidden'),
    *('tied', 'pos', 'n_rope', 'rope_theta', 'n_kv_head', 'n_latent', 'n_latent_q', 'n_nope', 'n_value', 'shared_rope'),
    'latent_norm',
}
OF_TRAINING = {'init_std', 'latent_init', 'kv_rms', 'flash', 'recompute'}  # of no use to a trained model


def unknown_setting(config: GPTConfig) -> str:
    """A setting that no form takes into account, as 'key=value'; '' where there is none."""
    others = [field for field in fields(config) if field.name not in KNOWN | OF_TRAINING]
    changed = (f'{f.name}={getattr(config, f.name)}' for f in others if getattr(config, f.name) != f.default)
    return next(changed, '')


def native_form(config: GPTConfig) -> Any:
    """The module of the form that models with this attention can be published in: core.convert.llama or deepseek."""
    return next(form for _, kind, form in FORMS.values() if type(config) is kind)


def form_of(source: str) -> str:
    """'gguf', or a key of FORMS, where `source` is a file or folder that `read` is for; '' for all others."""
    try:
        if os.path.isfile(source):
            with open(source, 'rb') as file:
                return 'gguf' if file.read(4) == b'GGUF' else ''
        with open(os.path.join(source, 'config.json'), encoding='utf-8') as file:
            found = json.load(file)['model_type']
        return found if found in list(FORMS) else ''
    except (OSError, ValueError, KeyError, TypeError):
        return ''


def read(source: str, **overrides: Any) -> tuple[GPT, dict[str, Any]]:
    """The float32 GPT or MLAGPT of a file or folder with a `form_of`, and its tokenizer's meta. ValueError: why not."""
    try:
        if form_of(source) != 'gguf':
            return read_folder(source, overrides)
        settings, eps, tensors, tokenizer = gguf_file.read(source)
        config = config_of(GPTConfig, settings, overrides)
        check_tensors(tensors, GPT, config, llama)
        return build(GPT, config, llama.from_hf(tensors, config, halves=False), eps), tokenizer
    except (TypeError, ValueError) as error:
        raise ValueError(f"'{source}' can't be loaded: {error}") from error


def read_folder(folder: str, overrides: dict[str, Any]) -> tuple[GPT, dict[str, Any]]:
    """The model of a Hugging Face folder, and its tokenizer's meta."""
    from transformers import AutoConfig

    try:
        hf_config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a damaged file raises almost anything
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise ValueError(f'its config.json is none ({reason[:200]}); {COPY}') from error
    kind, config_class, form = FORMS[hf_config.model_type]
    config = config_of(config_class, form.settings_of(hf_config), overrides)
    tensors = without_copies(read_tensors(folder), config)
    check_tensors(tensors, kind, config, form)
    state = form.from_hf(tensors, config, halves=not getattr(hf_config, 'rope_interleave', False))
    meta = hf_tokenizer.read(folder, config.vocab_size) or {'tokenizer': NO_TEXT, 'vocab_size': config.vocab_size}
    return build(kind, config, state, hf_config.rms_norm_eps), meta


def config_of(config_class: type[GPTConfig], settings: dict[str, Any], overrides: dict[str, Any]) -> GPTConfig:
    """The config of a published model. ValueError where its sizes are out of range or don't fit together."""
    if fixed := overrides.keys() - {'dropout', 'flash', 'recompute'}:
        raise ValueError(f'{sorted(fixed)} cannot be overridden: the pretrained weights decide that')
    for name, value in settings.items():
        if found := ranges.problem(name, value):
            raise ValueError(f'its {name} {found}')
    return config_class(**settings, **overrides)


def read_tensors(folder: str) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files. ValueError where there are none, or a file is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index, names = os.path.join(folder, 'model.safetensors.index.json'), ['model.safetensors']
    try:
        if os.path.isfile(index):
            if os.path.isfile(os.path.join(folder, names[0])):
                raise ValueError(f'it has both {names[0]} and {os.path.basename(index)}; remove one of them')
            with open(index, encoding='utf-8') as file:
                names = sorted({os.path.basename(name) for name in json.load(file)['weight_map'].values()})
        elif not os.path.isfile(os.path.join(folder, names[0])):
            raise ValueError('it has no model.safetensors; save it with safetensors, since other files may hold code')
        tensors: dict[str, Tensor] = {}
        for name in names:
            part = load_file(os.path.join(folder, name))
            if both := tensors.keys() & part.keys():
                raise ValueError(f'its files hold {min(both)} twice; {COPY}')
            tensors |= part
    except (OSError, SafetensorError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f'its safetensors files are missing or damaged ({error}); {COPY}') from error
    return tensors


def without_copies(tensors: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Without tensors that say again what the config or another tensor says, each compared with it."""
    kept = dict(tensors)
    size = torch.arange(0, config.rope_size, 2) / config.rope_size
    for name, value in tensors.items():
        if name == 'lm_head.weight' and config.tied:
            if not torch.equal(value, tensors.get('model.embed_tokens.weight', value)):
                raise ValueError('its output head differs from the embedding that it is tied to, by its config')
            del kept[name]
        elif name.endswith('rotary_emb.inv_freq'):  # files of before transformers 4.32 hold the frequencies
            if value.shape != size.shape or not torch.allclose(value.float(), config.rope_theta**-size, rtol=0.01):
                raise ValueError(f'its {name} is not that of rope_theta={config.rope_theta:g}: it has another RoPE')
            del kept[name]
    return kept


def check_tensors(tensors: dict[str, Tensor], kind: type[GPT], config: GPTConfig, form: Any) -> None:
    """ValueError unless the tensors are those of a model of this kind in a form, by name and shape, and floats."""
    with torch.device('meta'):
        expected = {name: tuple(t.shape) for name, t in form.to_hf(kind(config).state_dict(), config).items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if unknown := sorted(found.keys() - expected.keys()):
        raise ValueError(f'it needs what our model lacks: {listed(unknown)}')
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(f'it lacks {listed(missing)}; {COPY}')
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f'its {name} is {found[name]}, and its config says {shape}; {COPY}')
        if tensors[name].dtype not in FLOATS:
            dtype = str(tensors[name].dtype).removeprefix('torch.')
            raise ValueError(f'its {name} is quantized ({dtype}); only floating-point weights are supported')


def listed(names: list[str]) -> str:
    """The first of some tensors, and how many more there are."""
    return names[0] + (f' and {len(names) - 1} more tensors' if len(names) > 1 else '')


def build(kind: type[GPT], config: GPTConfig, state: dict[str, Tensor], eps: float) -> GPT:
    """A model of `config` with the weights of `state`, whose norms have `eps`. ValueError where they aren't finite."""
    state = llama.with_our_eps({name: value.float() for name, value in state.items()}, config, eps)
    if name := not_finite(state):
        raise ValueError(f'it holds weights that are not finite, or its eps={eps:g} makes them so: {name}; {COPY}')
    model = kind(config)
    model.load_state_dict(state)
    return model
