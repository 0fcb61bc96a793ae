"""
What a training run starts from: its keys, its model and its optimizer's state, from a checkpoint or a trained model.

A resumed run takes from its checkpoint every key that it wasn't given. A given key that may change is applied, and said
in one line; one that would make it another run (the model's shape, the seed, the data) is an error, for a pretrained
model too.
"""

import math
import os
from collections.abc import Set
from dataclasses import fields
from typing import Any

import torch

from core.cli import errors, ranges
from core.cli.errors import UserError
from core.convert.factorize import collect_statistics, to_mla, training_text
from core.convert.factorize_rope import collect_inputs, to_published_mla
from core.runs import models
from core.runs.checkpoint import OTHER_COPY
from core.runs.folder import RunFolder
from core.text.dataset import TokenData, check_data, check_tokenizer
from core.text.meta import meta_of_dataset
from model import GPT, GPTConfig
from ops.optimizers import is_block_matrix, kv_rows, moments

# what to do in this call, and where: never taken from a checkpoint
OF_THIS_CALL = ('out_dir', 'init_from', 'resume', 'overwrite', 'eval_only')
# describe the machine: not taken from nanoGPT's checkpoints, whose defaults ask for a GPU and for wandb
OF_THE_MACHINE = ('device', 'dtype', 'compile', 'backend', 'threads', 'fsdp', 'wandb_log')
OLDER = {'optimizer': 'adamw', 'kv_lr': 1.0}  # what runs had whose checkpoints don't name a key
ADJUSTABLE = ('dropout', *models.NOT_THE_MODEL)  # what a trained model's config may still change


def shape_keys(config_class: type[GPTConfig], keys: dict) -> list[str]:
    """Names of the keys that decide a model's shape."""
    return [field.name for field in fields(config_class) if field.name in keys and field.name not in ADJUSTABLE]


def resolve(keys: dict, given: Set[str], folder: RunFolder) -> tuple[dict, str | None, dict | None]:
    """
    The keys that a run really has, and what it resumes: (keys, path of the checkpoint, loaded checkpoint), or None
    twice.

    keys: {key: value} as configured; given: the keys that a file or flag set; folder: of out_dir. `init_from` 'resume'
    and 'auto' mean `resume` 'yes' and 'auto'. UserError where there is nothing to resume, the folder holds a run that
    was not asked for, or MHA is given keys of MLA.
    """
    misplaced = [key for key, default in models.MLA_KEYS.items() if keys.get(key, default) != default]
    if keys['attention'] == 'mha' and misplaced:
        raise UserError(f'{", ".join(misplaced)} belong to MLA alone; use train_mla.py, or leave them out')
    if keys['init_from'] in ('resume', 'auto'):
        keys['resume'] = {'resume': 'yes', 'auto': 'auto'}[keys['init_from']]
        keys['init_from'] = 'scratch'
    if keys['overwrite'] and keys['resume'] != 'no':
        raise UserError(f'overwrite=True starts a new run, resume={keys["resume"]} continues an old one; choose one')
    path, saved = folder.newest() if keys['resume'] != 'no' else (None, None)
    if saved is None:
        if keys['resume'] == 'yes':
            raise UserError(f'there is no checkpoint in {folder.path} to resume; start the run without resume=yes')
        if folder.files() and keys['resume'] == 'no' and not keys['overwrite'] and not keys['eval_only']:
            raise folder.taken()
        return keys, None, None
    return resumed_keys(keys, given, saved, path), path, saved


def resumed_keys(keys: dict, given: Set[str], saved: dict, path: str | None) -> dict:
    """The keys of a run resumed from the checkpoint `saved` at `path`; a notice lists given ones that change it."""
    then, from_nanogpt = saved.get('config') or {}, 'attention' not in saved
    ours = set(keys) - set(OF_THIS_CALL) - (set(OF_THE_MACHINE) if from_nanogpt else set())
    keys = {**keys, **{key: then[key] for key in ours - given if same_type(then.get(key), keys[key])}}
    for key in ours - given:
        if found := ranges.problem(key, keys[key]):
            raise UserError(f'{path} is damaged: its {key} {found}; give another by --{key}=...')
    keys['init_from'] = then.get('init_from', 'scratch')  # where the run once came from
    kind = models.kind_of(saved)
    if keys['attention'] != kind:
        raise UserError(f'{path} holds a model with the other attention; resume it with {command(kind, keys)}')
    shape = models.model_config(saved)
    for key in shape_keys(type(shape), keys):
        if key == 'block_size' and key in given and keys['eval_only'] and shape.pos != 'learned':
            continue  # without learned positions a model can be evaluated on longer windows
        if key in given and models.changed(shape, key, keys[key]):
            raise unchangeable(key, keys[key], getattr(shape, key), path, keys)
        keys[key] = getattr(shape, key)
    for key, default in {'seed': keys['seed'], **OLDER}.items():
        found = then[key] if same_type(then.get(key), keys[key]) else default
        if key in given and keys[key] != found:
            raise unchangeable(key, keys[key], found, path, keys)
        keys[key] = found
    differ = [key for key in keys if key in given & ours and key in then and then[key] != keys[key]]
    changes = ', '.join(f'{key} {then[key]} -> {keys[key]}' for key in differ)
    said = f'; changed from now on: {changes}' if changes else ''
    errors.notice(f'resuming {path} at iteration {saved.get("iter_num", 0)}{said}')
    return keys


def same_type(value: Any, default: Any) -> bool:
    """True where the value of a key in a checkpoint has the type that the key has here."""
    if default == 'auto':
        return type(value) in (str, bool)
    return type(value) is type(default) or (type(value), type(default)) == (int, float)


def unchangeable(key: str, value: Any, found: Any, path: str | None, keys: dict) -> UserError:
    """The error for a given key that would make the resumed run another run."""
    hint = f'leave out what sets it: {command(keys["attention"], keys)}'
    return UserError(f'{key}={value} cannot be applied to the run in {path}, which has {key}={found}; {hint}')


def command(kind: str, keys: dict) -> str:
    """The command that resumes a run as it is."""
    return f'python {"train_mla.py" if kind == "mla" else "train.py"} --resume=yes --out_dir={keys["out_dir"]}'


def keys_to_record(keys: dict, saved: dict | None) -> dict:
    """The keys that checkpoints record: the run's, or those that a finished run, `saved`, was made with."""
    if keys['min_lr'] > keys['learning_rate'] and keys['decay_lr']:
        rates = f'min_lr={keys["min_lr"]:g} is above learning_rate={keys["learning_rate"]:g}'
        errors.notice(f'note: {rates}, so the learning rate will rise as it decays; lower --min_lr too')
    if saved is None or progress(saved)[0] < keys['max_iters']:
        return keys
    errors.notice(f'the run has reached max_iters={keys["max_iters"]}; to train on, give a higher --max_iters')
    return keys | {key: value for key, value in (saved.get('config') or {}).items() if key in keys}


def progress(saved: dict) -> tuple[int, int, float | None, float]:
    """What a run has done so far, from its checkpoint: (iterations, tokens, last val loss or None, best val loss)."""
    iterations, keys = saved.get('iter_num') or 0, saved.get('config') or {}
    tokens = saved.get('tokens')
    if tokens is None:  # version 0.1.0 and nanoGPT: the batch never changed
        rows = int(keys.get('batch_size', 0)) * int(keys.get('gradient_accumulation_steps', 1))
        tokens = iterations * rows * int(keys.get('block_size', 0))
    losses = [None if saved.get(name) is None else float(saved[name]) for name in ('val_loss', 'best_val_loss')]
    best = losses[1] if losses[1] is not None and math.isfinite(losses[1]) else math.inf
    return iterations, tokens, losses[0], best


# ---- the model -------------------------------------------------------------------------------------------------------


def trained_model(
    keys: dict, given: Set[str], device: str, saved: dict | None = None, path: str = ''
) -> tuple[GPT, TokenData, dict]:
    """
    The model that a run resumes or `init_from` names, the data, and the keys that the model decides: its shape.

    keys: the run's; given: those that a file or flag set; device: where a conversion measures the text; saved: the
    checkpoint to resume, loaded from `path`, or None. The model is on the CPU or `device`. UserError, or ValueError
    from a conversion, where keys, source and data don't fit together.
    """
    shape: dict[str, Any] = {}
    if saved:
        data = data_for(keys, saved, path, resumes=True)
        model = models.build_model(saved, **{name: keys[name] for name in ADJUSTABLE})
    else:
        model, data, shape = pretrained_model(keys, given, device)
    if (keys | shape)['block_size'] != model.config.block_size:
        model.set_context((keys | shape)['block_size'])
    if data.n_vocab > model.config.vocab_size:
        sizes = f'{data.folder} has {data.n_vocab} different tokens, and the model only {model.config.vocab_size}'
        raise UserError(f'{sizes}; use the data set that the model was made for')
    return model, data, shape


def data_for(keys: dict, saved: dict, source: str, resumes: bool = False) -> TokenData:
    """The data set of a run's keys. UserError where the model in `source` (its checkpoint: `saved`) reads others."""
    data = TokenData(os.path.join(keys['data_dir'], keys['dataset']), keys['block_size'])
    if resumes:
        check_data(saved.get('tokenizer'), data, source)
    # nanoGPT's checkpoints record no tokenizer: it is that of the data set that their config names
    named = (saved.get('config') or {}).get('dataset')
    if meta := saved.get('tokenizer') or meta_of_dataset(keys['data_dir'], named):
        check_tokenizer(meta, data, source)
    return data


def pretrained_model(keys: dict, given: Set[str], device: str) -> tuple[GPT, TokenData, dict]:
    """
    The model that `init_from` names, the data, and the keys that the model decides.

    With attention='mla' an MHA model is converted, weighted by what its attention reads in the data: one with RoPE to
    keys that are rotated whole, or, given n_rope, to a shared rotated key. UserError, or ValueError from a conversion.
    """
    source = keys['init_from']
    model, saved = models.pretrained(source, **{name: keys[name] for name in ADJUSTABLE})
    keys = dict(keys)
    if 'block_size' not in given:
        keys['block_size'] = model.config.block_size
    elif keys['block_size'] > model.config.block_size:
        most = f'the {model.config.block_size} of the model in {source}'
        raise UserError(f'block_size={keys["block_size"]} is more than {most}; lower it')
    data = data_for(keys, saved, source)
    kind = models.attention_of(model)
    if (kind, keys['attention']) == ('mla', 'mha'):
        raise UserError(f'{source} holds a model with MLA, which cannot be converted back to MHA; use train_mla.py')
    if (kind, keys['attention']) == ('mha', 'mla'):
        count = max(keys['batch_size'], 65536 // keys['block_size'])
        text = list(training_text(data, count, keys['batch_size']))
        statistics = collect_statistics(model.to(device), text)
        if keys['n_rope'] and model.config.pos == 'rope':
            inputs = collect_inputs(model, text)
            model = to_published_mla(model, statistics, inputs, keys['n_latent'], keys['n_rope'])
        else:
            model = to_mla(model, keys['n_latent'], statistics)
    shape = {'block_size': keys['block_size']}  # a pretrained model can be shortened
    for key in set(shape_keys(type(model.config), keys)) - {'block_size'}:
        shape[key] = getattr(model.config, key)
        if key in given and models.changed(model.config, key, keys[key]):
            hint = 'remove it from the command line or the config file'
            raise UserError(f'{key}={keys[key]} cannot be applied to {source}, which has {key}={shape[key]}; {hint}')
    return model, data, shape


# ---- the optimizer ---------------------------------------------------------------------------------------------------


def learning_rules(model: GPT, keys: dict, saved: dict | None) -> dict:
    """
    Which rows learn at kv_lr times the rate, and whether Muon divides fused matrices: an entry of each checkpoint.

    {'slow_rows': {name: [first, end]}, 'divides': bool}: those of the checkpoint `saved`, so that a run keeps what it
    began with. One without them is older: it slowed other rows of MLA and divided nothing, and a notice says so.
    """
    rows = kv_rows(model.named_parameters(), model.parts)
    rules = {'slow_rows': {name: [part.start, part.stop] for name, part in rows.items()}, 'divides': True}
    if saved is None:
        return rules
    if found := saved.get('learning'):
        if not isinstance(found.get('slow_rows'), dict) or not isinstance(found.get('divides'), bool):
            raise UserError(f"the checkpoint's 'learning' is incomplete; {OTHER_COPY}")
        return found
    older = {**rules, 'divides': False}
    if keys['kv_lr'] != 1 and models.attention_of(model) == 'mla':
        owners = ('c_kv_down', 'c_kv_up', *(('c_q_down', 'c_q') if getattr(model.config, 'n_latent_q', 0) else ()))
        weights = {name: p for name, p in model.named_parameters() if name.endswith('.weight')}
        older['slow_rows'] = {name: [0, p.size(0)] for name, p in weights.items() if name.split('.')[-2] in owners}
        if older['slow_rows'] != rules['slow_rows']:
            errors.notice('this run goes on as it began: kv_lr slows all rows of the projections of its latents')
    if keys['optimizer'] == 'muon' and any(map(model.parts, dict(model.named_parameters()))):
        errors.notice('this run goes on as it began: its Muon takes fused matrices, such as c_attn, as one')
    return older


def restore(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, model: GPT, saved: dict | None, path: str | None
) -> tuple[int, int, float | None, float]:
    """Load the states of a resumed run; returns its `progress`, and that of a new run where nothing is resumed."""
    if saved is None:
        return 0, 0, None, math.inf
    if saved.get('optimizer'):
        restore_optimizer(optimizer, model, saved, path)
    if saved.get('scaler'):
        scaler.load_state_dict(saved['scaler'])
    return progress(saved)


def restore_optimizer(optimizer: torch.optim.Optimizer, model: GPT, saved: dict, path: str | None) -> None:
    """
    Load the optimizer state of the checkpoint `saved`, by the parameters' names; rates, decay and betas stay as made.
    Older checkpoints and nanoGPT's hold no names but have an order. UserError where the state doesn't fit the
    parameters.
    """
    groups = optimizer.param_groups
    try:
        state, then = saved['optimizer']['state'], saved['optimizer']['param_groups']
        if all('param_names' in group for group in then):
            names = [name for group in then for name in group['param_names']]
        else:
            # the order of nanoGPT's two groups, behind Muon's one where that is used
            named, muon = list(model.named_parameters()), 'momentum' in groups[0]
            names = [n for n, p in sorted(named, key=lambda n: (not (muon and is_block_matrix(*n)), n[1].dim() < 2))]
        if len(names) != sum(len(group['params']) for group in then):
            raise ValueError('it is of another number of parameters')
        place, entries = {name: number for number, name in enumerate(names)}, []
        for group in groups if state else ():
            for name, parameter in zip(group['param_names'], group['params'], strict=True):
                entry = state[place[name]]
                if 'betas' in group and 'step' not in entry:
                    raise KeyError('step')
                if any(entry[moment].shape != parameter.shape for moment in moments(group)):
                    raise ValueError('its tensors have other shapes')
                entries.append({key: part_like(parameter, value) for key, value in entry.items()})
        made = optimizer.state_dict()['param_groups']
        optimizer.load_state_dict({'state': dict(enumerate(entries)), 'param_groups': made})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f'it lacks {error}' if isinstance(error, KeyError) else error
        hint = f'nanoGPT before May 2023 had another order; start a new run from its weights with --init_from={path}'
        raise UserError(f"{path} can't be resumed: its 'optimizer' doesn't fit its model ({reason}); {hint}") from error


def part_like(parameter: Any, tensor: Any) -> Any:
    """`tensor`, or this process's shard of it where `parameter` is sharded and has the same shape."""
    if not hasattr(parameter, 'full_tensor') or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None)
