"""
Which models there are, and making one from a loaded checkpoint, a published model or a Hugging Face folder.

A checkpoint of nanoGPT, of any age, and of every earlier version of this project makes the model that it was.
"""

import os
from dataclasses import asdict, fields, replace
from typing import Any

import torch

from core.cli import ranges
from core.cli.errors import UserError
from core.cli.ranges import short
from core.convert import hf_tokenizer, published
from core.convert.gpt2 import GPT2_SIZES
from core.runs import checkpoint as checkpoints
from core.runs.checkpoint import OTHER_COPY
from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig
from ops.checks import not_finite

KINDS: dict[str, tuple[type[GPT], type[GPTConfig]]] = {'mha': (GPT, GPTConfig), 'mla': (MLAGPT, MLAConfig)}
# the keys of MLA alone, and their defaults
MLA_KEYS = {field.name: field.default for field in fields(MLAConfig) if not hasattr(GPTConfig, field.name)}
NANOGPT_ARGS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')  # its resume needs each
NOT_THE_MODEL = ('flash', 'recompute')  # fields that say how to compute, not what
ALWAYS_WRITTEN = (*NANOGPT_ARGS, 'n_latent', 'n_nope', 'n_rope', 'n_value')  # the last four have defaults that depend


def attention_of(model: GPT) -> str:
    """'mha' or 'mla'."""
    return next(kind for kind, (model_class, _) in reversed(KINDS.items()) if isinstance(model, model_class))


def attention_params(model: GPT) -> int:
    """Parameters of all attention layers: what differs between MHA and MLA."""
    return sum(p.numel() for name, p in model.named_parameters() if '.attn.' in name)


def label_of(config: GPTConfig) -> str:
    """What tables call the attention of a config: 'MHA', 'MQA', 'GQA-2' (key/value heads) or 'MLA, r=64'."""
    if isinstance(config, MLAConfig):
        return f'MLA, r={config.n_latent}'
    heads = config.n_kv_head
    return 'MHA' if not heads else 'MQA' if heads == 1 else f'GQA-{heads}'


def model_args(config: GPTConfig) -> dict[str, Any]:
    """
    What a checkpoint stores of a config: nanoGPT's seven keys, and of the others those that nanoGPT can't express.
    Whoever doesn't know such a key refuses the checkpoint instead of misreading it.
    """
    always = ALWAYS_WRITTEN if isinstance(config, MLAConfig) else NANOGPT_ARGS
    return {
        name: value
        for name, value in asdict(config).items()
        if name in always or (name not in NOT_THE_MODEL and value != getattr(type(config), name))
    }


def entries(model: GPT) -> dict[str, Any]:
    """What a checkpoint holds of a model, which is not wrapped: its tensors, its sizes and its kind of attention."""
    owner = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    first: dict = {}  # a tensor with two names, the tied embedding, becomes one object and is saved once
    tensors = {k: first.setdefault(owner.get(k, k), tensor) for k, tensor in model.state_dict().items()}
    return {'model': tensors, 'model_args': model_args(model.config), 'attention': attention_of(model)}


def contents(model: GPT, config: dict, **more: Any) -> dict[str, Any]:
    """The dict of a checkpoint that no training wrote, with what readers of nanoGPT's expect; more: further entries."""
    plain: dict[str, Any] = dict(optimizer=None, iter_num=0, tokens=0, best_val_loss=1e9, tokenizer={}, corpus='')
    return {**entries(model), **plain, 'config': config, **more}


def kind_of(checkpoint: dict) -> str:
    """'mha' or 'mla', for a loaded checkpoint. UserError where it names another attention."""
    guess = 'mla' if any('.c_kv_down.' in name for name in checkpoint['model']) else 'mha'  # nanoGPT's don't say
    kind = checkpoint.get('attention') or guess
    if kind not in KINDS:
        raise UserError(f"the checkpoint's attention is '{kind}'; only {' and '.join(KINDS)} are supported")
    return kind


def state_of(checkpoint: dict) -> dict[str, torch.Tensor]:
    """
    The tensors of a loaded checkpoint by the names that our models have: without the prefixes of DDP and torch.compile,
    and without nanoGPT's mask buffers. UserError where two tensors would get one name.
    """
    state: dict[str, torch.Tensor] = {}
    for name, tensor in checkpoint['model'].items():
        while name.startswith(('module.', '_orig_mod.')):
            name = name.removeprefix('module.').removeprefix('_orig_mod.')
        if name in state:
            raise UserError(f'the checkpoint holds {name} twice; {OTHER_COPY}')
        if not name.endswith(('.attn.bias', '.attn.masked_bias')):
            state[name] = tensor
    return state


def all_args(checkpoint: dict, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """
    The model_args of a loaded checkpoint, and what older ones leave to its tensors, `state`.

    The head is tied where it is stored once or twice the same; one that is said to be tied and isn't is an error. MLA
    of a checkpoint without n_nope has its rotated dimensions inside the head, and not beside its content.
    """
    args = dict(checkpoint['model_args'])
    head, embedding = state.get('lm_head.weight'), state.get('transformer.wte.weight')
    if embedding is not None and embedding.dim() == 2:
        args.setdefault('vocab_size', embedding.size(0))
    if head is not None and embedding is not None:
        same = head is embedding or torch.equal(head, embedding)
        if not same and args.get('tied'):
            raise UserError(f'the output head differs from the embedding that it is tied to; {OTHER_COPY}')
        args.setdefault('tied', same)
    sizes = [args.get(key) for key in ('n_embd', 'n_head', 'n_rope')]
    if kind_of(checkpoint) == 'mla' and 'n_nope' not in args and all(type(n) is int for n in sizes[:2]) and sizes[1]:
        args['n_nope'] = sizes[0] // sizes[1] - (sizes[2] or 0)
    return args


def model_config(checkpoint: dict, state: dict[str, torch.Tensor] | None = None, **overrides: Any) -> GPTConfig:
    """The config of a loaded checkpoint. state: its `state_of`; overrides: other model_args. UserError if invalid."""
    state = state_of(checkpoint) if state is None else state
    config_class, args = KINDS[kind_of(checkpoint)][1], {**all_args(checkpoint, state), **overrides}
    try:
        for field in fields(config_class):
            value = args.get(field.name, field.default)
            if type(value) is not type(field.default) and (type(value), type(field.default)) != (int, float):
                raise TypeError(f'{field.name} is a {type(value).__name__}')
            if found := ranges.problem(field.name, value):
                raise ValueError(f'{field.name} {found}')
        return config_class(**args)
    except (TypeError, ValueError) as error:
        raise UserError(f"the checkpoint's model_args don't make a model: {error}; {OTHER_COPY}") from error


def changed(config: GPTConfig, key: str, value: Any) -> bool:
    """True where a model's config would differ if its field `key` were set to `value` (0 may stand for a default)."""
    try:
        return getattr(replace(config, **{key: value}), key) != getattr(config, key)
    except ValueError:
        return True


def build_model(checkpoint: dict, **overrides: Any) -> GPT:
    """The model of a loaded checkpoint, on the CPU. overrides: other model_args. UserError names what doesn't fit."""
    state = state_of(checkpoint)
    config = model_config(checkpoint, state, **overrides)
    # before a model is made, which could take all memory where model_args are damaged
    layers = len({name.split('.')[2] for name in state if name.startswith('transformer.h.')})
    embedding = tuple(state.get('transformer.wte.weight', torch.empty(0)).shape)
    expected = (config.vocab_size, config.n_embd)
    if layers != config.n_layer or embedding != expected:
        found = f'{layers} layers and an embedding of {embedding}, not {config.n_layer} and {expected}'
        raise UserError(f"the checkpoint's tensors don't fit its model_args: {found}; {OTHER_COPY}")
    if config.tied:
        state['lm_head.weight'] = state['transformer.wte.weight']  # some files hold it once
    model = KINDS[kind_of(checkpoint)][0](config)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        first = short(' '.join(' '.join(str(error).split('\n')[1:3]).split()), 200)
        raise UserError(f"the checkpoint's tensors don't fit its model_args: {first}; {OTHER_COPY}") from error
    if name := not_finite(model.state_dict()):
        raise UserError(f'the checkpoint holds weights that are not finite: {name}; {OTHER_COPY}')
    return model


def is_published(source: str) -> bool:
    """True where `pretrained` would read `source` and it is no checkpoint."""
    if os.path.isfile(source):
        return published.form_of(source) == 'gguf'
    if os.path.isfile(os.path.join(source, 'ckpt.pt')):
        return False
    return source in GPT2_SIZES or os.path.isfile(os.path.join(source, 'config.json'))


def pretrained(source: str, dropout: float = 0.0, **overrides: Any) -> tuple[GPT, dict]:
    """
    The trained model that `source` names, and what else its checkpoint holds (of a published model `tokenizer` and
    `corpus`).

    source: a checkpoint file, a folder with one, one of GPT-2's names, a Hugging Face folder with a GPT-2, a Llama or a
    dense DeepSeek-V3, or a GGUF file with a Llama. overrides: as for `build_model`. UserError where nothing can be
    loaded.
    """
    if not is_published(source):
        if not os.path.exists(source):
            known = f'no checkpoint, no GGUF file, no folder and none of {", ".join(GPT2_SIZES)}'
            raise UserError(f"'{source}' is {known}; name one of them")
        checkpoint = checkpoints.load(source)
        return build_model(checkpoint, dropout=dropout, **overrides), checkpoint
    try:
        if published.form_of(source):
            model, meta = published.read(source, dropout=dropout, **overrides)
        else:
            model = GPT.from_pretrained(source, dict(dropout=dropout, **overrides))
            meta = hf_tokenizer.read(source, model.config.vocab_size)
    except ValueError as error:
        raise UserError(str(error)) from error
    return model, {'tokenizer': meta, 'corpus': f'{source}, as published'}
