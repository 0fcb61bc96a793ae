"""
Checkpoints: what one holds, writing one so that a crash never leaves a broken file, and turning one into a model.

Notable features:
- nanoGPT's keys, so its sample.py reads our MHA checkpoints, and its checkpoints are read here
- only tensors and plain values, loaded with `weights_only=True`: opening a checkpoint never runs code
- written beside its place, flushed to disk, then renamed: the name always holds a whole checkpoint, old or new
- a checkpoint records its own attention, tokenizer and corpus
"""

import contextlib
import os
import threading
import zipfile
from dataclasses import fields, replace

import torch

from core.cli import files, ranges
from core.cli.errors import UserError
from core.convert import hf_tokenizer
from core.convert.gpt2 import GPT2_SIZES
from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig
from ops.checks import not_finite
from ops.optimizers import moments

NANOGPT_ARGS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')  # its resume needs each
NOT_THE_MODEL = ('flash', 'recompute')  # fields that say how to compute, not what
OLDER = {'optimizer': 'adamw', 'kv_lr': 1.0}  # what runs had whose checkpoints don't name a key
KINDS = {'mha': (GPT, GPTConfig), 'mla': (MLAGPT, MLAConfig)}
OTHER_COPY = 'use ckpt_best.pt beside it, or an older copy'
# The keys of a checkpoint and their types. nanoGPT's best_val_loss is a tensor. All but the first two may be missing or
# None.
TYPES = {
    'model': dict,
    'model_args': dict,
    'optimizer': dict,
    'iter_num': int,
    'tokens': int,
    'best_val_loss': (int, float, torch.Tensor),
    'config': dict,
    'attention': str,
    'tokenizer': dict,
    'corpus': str,
    'val_loss': (int, float, torch.Tensor),
    'scaler': dict,
    'wandb_run_id': str,
}


def attention_of(model):
    """'mha' or 'mla'."""
    return 'mla' if isinstance(model, MLAGPT) else 'mha'


def arm_of(config):
    """What tables call the attention of a config: 'MHA', 'MQA', 'GQA-2' (key/value heads) or 'MLA, r=64'."""
    if isinstance(config, MLAConfig):
        return f'MLA, r={config.n_latent}'
    heads = config.n_kv_head
    return 'MHA' if not heads else 'MQA' if heads == 1 else f'GQA-{heads}'


def model_args(config):
    """A plain dict of nanoGPT's seven keys, and of those others whose values nanoGPT can't express."""
    values = {field.name: (getattr(config, field.name), field.default) for field in fields(config)}
    return {
        name: value
        for name, (value, default) in values.items()
        # n_latent's own default depends on n_embd, so it is always written
        if name in NANOGPT_ARGS or (name not in NOT_THE_MODEL and (value != default or name == 'n_latent'))
    }


def contents(model, config, *, optimizer=None, iter_num=0, best_val_loss=1e9, val_loss=None, tokenizer=None, corpus='',
             tokens=0, scaler=None, wandb_run_id=None):  # fmt: skip
    """
    The dict that a checkpoint file holds.

    model: a GPT or MLAGPT, not wrapped; config: the run's keys and values; tokenizer: the data set's meta;
    corpus: one line that describes the training data; val_loss: the last one measured, in nats per token; tokens:
    trained on so far.
    """
    owner = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    first = {}  # a tensor with two names, the tied embedding, becomes one object and is saved once
    return {
        'model': {k: first.setdefault(owner.get(k, k), tensor) for k, tensor in model.state_dict().items()},
        'optimizer': optimizer.state_dict() if optimizer is not None else None,
        'model_args': model_args(model.config),
        'iter_num': iter_num,
        'tokens': tokens,
        'best_val_loss': best_val_loss,
        'config': config,
        'attention': attention_of(model),
        'tokenizer': tokenizer or {},
        'corpus': corpus,
        'val_loss': val_loss,
        'scaler': scaler.state_dict() if scaler is not None else None,
        'wandb_run_id': wandb_run_id,
    }


def save(path, checkpoint):
    """Write the dict `checkpoint` to `path`, whole or not at all: with a UserError the old file stays."""
    try:
        with files.replacing(path, 'wb') as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} can't be written ({error}); free some disk space or choose another --out_dir; "
                        'the previous checkpoint is as it was') from error  # fmt: skip


def link(path, other):
    """Give the file `path` a second name `other`, replacing that file; a copy where hard links are not supported."""
    beside = f'{other}.writing'
    with contextlib.suppress(OSError):
        os.remove(beside)
    try:
        os.link(path, beside)
    except OSError:
        save(other, torch.load(path, map_location='cpu', weights_only=True))
        return
    os.replace(beside, other)
    files.sync_folder(os.path.dirname(other))


class Writer:
    """
    Saves in a background thread: training waits only for the tensors to be copied. An error is raised by the next call.

    writes: False on ranks that only take part in gathering a sharded model's tensors.
    """

    def __init__(self, writes=True):
        self.thread, self.error, self.writes = None, None, writes

    def save(self, path, checkpoint, others=()):
        """Copy `checkpoint` now; write it to `path`, with `others` as further names, while the caller continues."""
        self.wait()
        snapshot = copy_tensors(checkpoint, keep=self.writes)
        if self.writes:
            self.thread = threading.Thread(target=self._write, args=(path, snapshot, others))
            self.thread.start()

    def _write(self, path, snapshot, others):
        try:
            save(path, snapshot)
            for other in others:
                link(path, other)
        except Exception as error:
            self.error = error

    def wait(self):
        """Return when the last save is on disk; raises its error."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error


def copy_tensors(value, copies=None, keep=True):
    """
    A copy of nested dicts and lists whose tensors are full CPU copies; a tensor that occurs twice is copied once.

    Sharded tensors are gathered, so every process must call this; keep=False discards the result. (Local shards may be
    empty and share an address, so sharded tensors are identified by object.)
    """
    copies = {} if copies is None else copies
    if isinstance(value, torch.Tensor):
        sharded = hasattr(value, 'full_tensor')
        key = id(value) if sharded or not value.numel() else (value.data_ptr(), value.shape, value.dtype)
        if key not in copies:
            whole = value.detach().full_tensor() if sharded else value.detach()
            copies[key] = whole.to('cpu', copy=not sharded) if keep else None
        return copies[key]
    if isinstance(value, dict):
        return {k: copy_tensors(v, copies, keep) for k, v in value.items()}
    if isinstance(value, list):
        return [copy_tensors(v, copies, keep) for v in value]
    return value


def find(path):
    """The checkpoint file that `path` names: itself, or ckpt.pt in a folder. UserError if it doesn't exist."""
    file = os.path.join(path, 'ckpt.pt') if os.path.isdir(path) else path
    if not os.path.isfile(file):
        raise UserError(f'there is no checkpoint {file}; train a model first, or name another folder')
    return file


def check_sums(file):
    """UserError where a part of the file differs from its CRC. torch.save writes zip files, torch.load ignores CRCs."""
    if not zipfile.is_zipfile(file):
        return  # PyTorch's format before 1.6 has no checksums; torch.load says what is wrong with other files
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except Exception as error:  # a damaged zip file raises almost anything
        raise UserError(f'{file} is damaged ({error}); {OTHER_COPY}') from error
    if damaged:
        raise UserError(f'{file} is damaged: the checksum of {damaged} is wrong; {OTHER_COPY}')


def load(path, device='cpu', mapped=False):
    """
    The checkpoint at `path` (a file, or a folder with ckpt.pt) as a dict, tensors on `device`. 'config' and 'tokenizer'
    are {} where it has none; other keys may be missing or None.

    mapped: tensors are memory-mapped, so the optimizer's take no memory where only the model is used.

    Raises UserError where the file is missing, truncated, damaged (by its CRCs) or not a checkpoint, where it holds
    anything but tensors and plain values, and where an entry's type is not that in TYPES.
    """
    file = find(path)
    check_sums(file)
    try:
        checkpoint = torch.load(file, map_location=device, weights_only=True, mmap=mapped)
    except Exception as error:
        # a truncated file fails in many ways, all with the same meaning for the user
        if 'weights_only' in str(error) or 'Unsupported' in str(error):
            raise UserError(f'{file} holds more than tensors and plain values, and opening it could run code; '
                            'only load checkpoints saved by this project or nanoGPT') from error  # fmt: skip
        raise UserError(f'{file} is truncated or not a checkpoint; {OTHER_COPY}') from error
    if not isinstance(checkpoint, dict) or not {'model', 'model_args'} <= set(checkpoint):
        raise UserError(
            f"{file} is not a GPT checkpoint: it lacks 'model' or 'model_args'; name a file that train.py wrote"
        )
    for name, kinds in TYPES.items():
        value = checkpoint.get(name)
        if not isinstance(value, kinds) and (value is not None or name in ('model', 'model_args')):
            raise UserError(f"{file} is damaged: its '{name}' is a {type(value).__name__}; {OTHER_COPY}")
        if isinstance(value, torch.Tensor) and (value.numel() != 1 or value.is_complex()):
            raise UserError(f"{file} is damaged: its '{name}' is not one number; {OTHER_COPY}")
    for name in ('iter_num', 'tokens'):
        if not 0 <= (checkpoint.get(name) or 0) < 1 << 63:
            raise UserError(f'{file} is damaged: its {name} is {checkpoint[name]}; {OTHER_COPY}')
    for name in ('config', 'tokenizer'):
        checkpoint[name] = checkpoint.get(name) or {}
    tensors = checkpoint['model'].items()
    if not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in tensors):
        raise UserError(f"{file} is damaged: its 'model' holds more than named tensors; {OTHER_COPY}")
    return checkpoint


def kind_of(checkpoint):
    """'mha' or 'mla', for a loaded checkpoint. UserError where it names another attention."""
    guess = 'mla' if any('.c_kv_down.' in name for name in checkpoint['model']) else 'mha'  # nanoGPT's don't say
    kind = checkpoint.get('attention') or guess
    if kind not in KINDS:
        raise UserError(f"the checkpoint's attention is '{kind}'; only {' and '.join(KINDS)} are supported")
    return kind


def model_config(checkpoint, **overrides):
    """The GPTConfig or MLAConfig of a loaded checkpoint. overrides: model_args to replace. UserError if invalid."""
    config_class, args = KINDS[kind_of(checkpoint)][1], {**checkpoint['model_args'], **overrides}
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


def check_sizes(state, config):
    """
    UserError unless tensors, {name: tensor}, have the layers and the embedding of a config.

    Before a model of these sizes is made, which could take all memory where model_args are damaged.
    """
    layers = len({name.split('.')[2] for name in state if name.startswith('transformer.h.')})
    embedding = state.get('transformer.wte.weight', torch.empty(0)).shape
    expected = torch.Size((config.vocab_size, config.n_embd))
    if layers != config.n_layer or embedding != expected:
        raise UserError(
            f"the checkpoint's tensors don't fit its model_args: {layers} layers and an embedding of "
            f'{tuple(embedding)}, expected {config.n_layer} and {tuple(expected)}; {OTHER_COPY}'
        )


def changed(config, key, value):
    """True where a model's config would differ if its field `key` were set to `value` (0 may stand for a default)."""
    try:
        return getattr(replace(config, **{key: value}), key) != getattr(config, key)
    except ValueError:
        return True


def build_model(checkpoint, **overrides):
    """
    The GPT or MLAGPT of a loaded checkpoint, with its weights, on the CPU.

    overrides: model_args to replace, such as dropout. UserError names the tensors or arguments that don't fit, and
    weights that are not finite.
    """
    state = {name.removeprefix('_orig_mod.'): tensor for name, tensor in checkpoint['model'].items()}
    state = {name: tensor for name, tensor in state.items() if not name.endswith('.attn.bias')}  # nanoGPT's mask buffer
    config = model_config(checkpoint, **overrides)
    check_sizes(state, config)
    model = KINDS[kind_of(checkpoint)][0](config)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        first = ' '.join(' '.join(str(error).split('\n')[1:3]).split())
        first = first if len(first) <= 200 else f'{first[:200]}...'
        raise UserError(f"the checkpoint's tensors don't fit its model_args: {first}; {OTHER_COPY}") from error
    if name := not_finite(model.state_dict()):
        raise UserError(f'the checkpoint holds weights that are not finite: {name}; {OTHER_COPY}')
    return model


def part_like(parameter, tensor):
    """`tensor`, or this process's shard of it where `parameter` is sharded and has the same shape."""
    if not hasattr(parameter, 'full_tensor') or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None)


def restore_optimizer(optimizer, state):
    """
    Load the optimizer state of a checkpoint; weight decay and betas stay those that the optimizer was made with.

    UserError where the state doesn't fit the optimizer's parameters.
    """
    made_with = [
        {key: group[key] for key in ('weight_decay', 'betas') if key in group} for group in optimizer.param_groups
    ]
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
    names = [moments(group) for group in optimizer.param_groups for _ in group['params']]
    try:
        for i, (parameter, wanted) in enumerate(zip(parameters, names, strict=True)):
            if state['state'] and any(state['state'][i][name].shape != parameter.shape for name in wanted):
                raise ValueError('its tensors have other shapes')
        parts = {i: {k: part_like(parameters[i], v) for k, v in entry.items()} for i, entry in state['state'].items()}
        optimizer.load_state_dict({**state, 'state': parts})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f'it lacks {error}' if isinstance(error, KeyError) else error
        raise UserError(f"the checkpoint's 'optimizer' does not fit its model: {reason}; {OTHER_COPY}") from error
    for group, settings in zip(optimizer.param_groups, made_with, strict=True):
        group.update(settings)


def pretrained(source, dropout=0.0, **overrides):
    """
    The trained model that `source` names, and what else its checkpoint holds: (GPT or MLAGPT, dict).

    source: a checkpoint file, a folder with one, one of GPT-2's names, or a Hugging Face folder with a GPT-2 (for the
    last two the dict holds only `tokenizer` and `corpus`). overrides: as for `build_model`. UserError where nothing can
    be loaded.
    """
    if os.path.isfile(source) or os.path.isfile(os.path.join(source, 'ckpt.pt')):
        checkpoint = load(source)
        return build_model(checkpoint, dropout=dropout, **overrides), checkpoint
    if source not in GPT2_SIZES and not os.path.isdir(source):
        raise UserError(f"'{source}' is no checkpoint, no folder and none of {', '.join(GPT2_SIZES)}; name one of them")
    try:
        model = GPT.from_pretrained(source, dict(dropout=dropout, **overrides))
        meta = hf_tokenizer.read(source, model.config.vocab_size)
    except ValueError as error:
        raise UserError(str(error)) from error
    return model, {'tokenizer': meta, 'corpus': f'{source}, as published'}
