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
from dataclasses import fields

import torch

from core import files
from core.conversion import collect_statistics, to_mla, training_text
from core.gpt2 import GPT2_SIZES
from core.runtime import UserError
from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig

NANOGPT_ARGS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')  # its resume needs each
NOT_THE_MODEL = ('flash', 'recompute')  # fields that say how to compute, not what
KINDS = {'mha': (GPT, GPTConfig), 'mla': (MLAGPT, MLAConfig)}
OTHER_COPY = 'use ckpt_best.pt beside it, or an older copy'
# The keys of a checkpoint and their types. nanoGPT's best_val_loss is a tensor. All but the first two may be missing or
# None.
TYPES = {
    'model': dict,
    'model_args': dict,
    'optimizer': dict,
    'iter_num': int,
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
             scaler=None, wandb_run_id=None):  # fmt: skip
    """
    The dict that a checkpoint file holds.

    model: a GPT or MLAGPT, not wrapped; config: the run's keys and values; tokenizer: the data set's meta;
    corpus: one line that describes the training data; val_loss: the last one measured, in nats per token.
    """
    owner = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    first = {}  # a tensor with two names, the tied embedding, becomes one object and is saved once
    return {
        'model': {k: first.setdefault(owner.get(k, k), tensor) for k, tensor in model.state_dict().items()},
        'optimizer': optimizer.state_dict() if optimizer is not None else None,
        'model_args': model_args(model.config),
        'iter_num': iter_num,
        'best_val_loss': best_val_loss,
        'config': config,
        'attention': attention_of(model),
        'tokenizer': {k: v for k, v in (tokenizer or {}).items() if k != 'sha256'},
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


def load(path, device='cpu', mapped=False):
    """
    The checkpoint at `path` (a file, or a folder with ckpt.pt) as a dict, tensors on `device`.

    mapped: tensors are memory-mapped, so the optimizer's are never read where only the model is used.

    Raises UserError where the file is missing, truncated or not a checkpoint, where it holds anything but tensors and
    plain values, and where an entry's type is not that in TYPES.
    """
    file = find(path)
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
    tensors = checkpoint['model'].items()
    if not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in tensors):
        raise UserError(f"{file} is damaged: its 'model' holds more than named tensors; {OTHER_COPY}")
    return checkpoint


def build_model(checkpoint, **overrides):
    """
    The GPT or MLAGPT that a loaded checkpoint holds, with its weights, on the CPU.

    overrides: model_args to replace, such as dropout. UserError names the tensors or arguments that don't fit.
    """
    state = {name.removeprefix('_orig_mod.'): tensor for name, tensor in checkpoint['model'].items()}
    state = {name: tensor for name, tensor in state.items() if not name.endswith('.attn.bias')}  # nanoGPT's mask buffer
    guess = 'mla' if any('.c_kv_down.' in name for name in state) else 'mha'
    kind = checkpoint.get('attention', guess)
    if kind not in KINDS:
        raise UserError(f"the checkpoint's attention is '{kind}'; only {' and '.join(KINDS)} are known")
    model_class, config_class = KINDS[kind]
    try:
        model = model_class(config_class(**{**checkpoint['model_args'], **overrides}))
    except (TypeError, ValueError) as error:
        raise UserError(f"the checkpoint's model_args don't make a model: {error}; {OTHER_COPY}") from error
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        first = ' '.join(' '.join(str(error).split('\n')[1:3]).split())
        first = first if len(first) <= 200 else f'{first[:200]}...'
        raise UserError(f"the checkpoint's tensors don't fit its model_args: {first}; {OTHER_COPY}") from error
    return model


def part_like(parameter, tensor):
    """`tensor`, or this process's shard of it where `parameter` is sharded and has the same shape."""
    if not hasattr(parameter, 'full_tensor') or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None)


def restore_optimizer(optimizer, state):
    """Load the optimizer state from a checkpoint. UserError where it doesn't fit the optimizer's parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
    try:
        moments = state['state'] and [(state['state'][i]['exp_avg'], state['state'][i]['exp_avg_sq'])
                                      for i in range(len(parameters))]  # fmt: skip
        if moments and any(m.shape != p.shape for p, pair in zip(parameters, moments, strict=True) for m in pair):
            raise ValueError('its tensors have other shapes')
        parts = {i: {k: part_like(parameters[i], v) for k, v in entry.items()} for i, entry in state['state'].items()}
        optimizer.load_state_dict({**state, 'state': parts})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f'it lacks {error}' if isinstance(error, KeyError) else error
        raise UserError(f"the checkpoint's 'optimizer' does not fit its model: {reason}; {OTHER_COPY}") from error


def pretrained(source, dropout=0.0, **overrides):
    """
    The trained model that `source` names, and what else its checkpoint holds: (GPT or MLAGPT, dict).

    source: a checkpoint file, a folder with one, one of GPT-2's names, or a Hugging Face folder with a GPT-2 (for the
    last two the dict is empty). overrides: as for `build_model`. UserError where nothing can be loaded.
    """
    if os.path.isfile(source) or os.path.isfile(os.path.join(source, 'ckpt.pt')):
        checkpoint = load(source)
        return build_model(checkpoint, dropout=dropout, **overrides), checkpoint
    if source not in GPT2_SIZES and not os.path.isdir(source):
        raise UserError(f"'{source}' is no checkpoint, no folder and none of {', '.join(GPT2_SIZES)}; name one of them")
    try:
        return GPT.from_pretrained(source, dict(dropout=dropout, **overrides)), {}
    except ValueError as error:
        raise UserError(str(error)) from error


# ---- the model that a training run starts from -----------------------------------------------------------------------


def new_model(keys, vocab_size):
    """A model with initial values, of the sizes that a script's keys ask for. ValueError where they don't fit."""
    model_class, config_class = KINDS[keys['attention']]
    sizes = {field.name: keys[field.name] for field in fields(config_class) if field.name in keys}
    return model_class(config_class(**{**sizes, 'vocab_size': vocab_size}), seed=keys['seed'])


def resumed_model(saved, path, keys):
    """The model of a run to be resumed from its loaded checkpoint. UserError where the keys describe another model."""
    model = build_model(saved, **{name: keys[name] for name in ('dropout', *NOT_THE_MODEL)})
    if attention_of(model) != keys['attention']:
        script = 'train_mla.py' if keys['attention'] == 'mha' else 'train.py'
        raise UserError(f'{path} holds a model with the other attention; resume it with {script}')
    if keys['block_size'] != model.config.block_size:
        raise UserError(f'block_size={keys["block_size"]}, and the run in {path} has {model.config.block_size}; '
                        f'resume it with --block_size={model.config.block_size}')  # fmt: skip
    return model


def pretrained_model(keys, data, device):
    """
    The model that training starts from where `init_from` names one; with attention='mla' an MHA model is converted.

    data: the TokenData to train on: the conversion is weighted by what attention reads in it. UserError or ValueError.
    """
    source, n_latent = keys['init_from'], keys['n_latent']
    model = pretrained(source, **{name: keys[name] for name in ('dropout', *NOT_THE_MODEL)})[0]
    if keys['attention'] == 'mla' and attention_of(model) == 'mha':
        count = max(keys['batch_size'], 65536 // keys['block_size'])
        text = training_text(data, count, keys['batch_size'])
        model = to_mla(model, n_latent, collect_statistics(model.to(device), text))
    elif attention_of(model) != keys['attention']:
        raise UserError(f'{source} holds a model with MLA, which has no way back to MHA; use train_mla.py')
    if n_latent not in (0, getattr(model.config, 'n_latent', 0)):
        raise UserError(f'{source} has n_latent={model.config.n_latent}, not {n_latent}; leave --n_latent out')
    return model


def starting_model(keys, data, device, saved=None, path=''):
    """
    The model that a training run starts from, on the CPU or `device`: resumed, pretrained or new.

    keys: the training script's keys; data: its TokenData; saved: the checkpoint to resume, loaded from `path`, or None.
    UserError, in one line, where keys, source and data don't fit together.
    """
    try:
        if saved:
            model = resumed_model(saved, path, keys)
        elif keys['init_from'] == 'scratch':
            model = new_model(keys, data.padded_vocab_size)
        else:
            model = pretrained_model(keys, data, device)
        if keys['block_size'] < model.config.block_size:
            model.crop_block_size(keys['block_size'])
    except ValueError as error:
        raise UserError(str(error)) from error
    if data.n_vocab > model.config.vocab_size:
        raise UserError(f'{keys["dataset"]} has {data.n_vocab} different tokens, and the model only '
                        f'{model.config.vocab_size}; use the data set that the model was made for')  # fmt: skip
    if keys['block_size'] > model.config.block_size:
        raise UserError(f'block_size={keys["block_size"]} is more than the {model.config.block_size} of the model in '
                        f'{keys["init_from"]}; lower it')  # fmt: skip
    return model
