"""
What a training run starts from: its keys and its model, from a checkpoint, from a pretrained model or from scratch.

A resumed run takes from its checkpoint every key that it wasn't given. A given key that may change is applied, and said
in one line. One that would make it another run (the model's shape, the seed, the data) is an error. The same holds for
the shape of a pretrained model.
"""

import math
import os
from dataclasses import fields

from core.cli import errors
from core.cli.errors import UserError
from core.convert.factorize import collect_statistics, to_mla, training_text
from core.runs import checkpoint as checkpoints
from core.text.dataset import TokenData
from core.text.tokenizer import tokenizer_of

# what to do in this call, and where: never taken from a checkpoint
OF_THIS_CALL = ('out_dir', 'init_from', 'resume', 'overwrite', 'eval_only')
# describe the machine: not taken from nanoGPT's checkpoints, whose defaults ask for a GPU and for wandb
OF_THE_MACHINE = ('device', 'dtype', 'compile', 'backend', 'threads', 'fsdp', 'wandb_log')
# what makes two data sets the same: their files, or, where a checkpoint of version 0.1.0 has no checksums, their sizes
IDENTITY = ('sha256', 'tokens', 'vocab_size')


def shape_keys(config_class, keys):
    """Names of the keys that decide a model's shape: config fields without dropout and without how to compute it."""
    other = ('dropout', *checkpoints.NOT_THE_MODEL)
    return [field.name for field in fields(config_class) if field.name in keys and field.name not in other]


def resolve(keys, given, folder):
    """
    The keys that a run really has, and what it resumes: (keys, path of the checkpoint, loaded checkpoint).

    keys: {key: value} as configured; given: the keys that a file or flag set; folder: the RunFolder of out_dir. Path
    and checkpoint are None for a run that isn't resumed. `init_from` 'resume' and 'auto' mean `resume` 'yes' and
    'auto'. UserError where there is nothing to resume, the folder holds a run that was not asked for, or MHA is given
    keys of MLA.
    """
    if keys['attention'] == 'mha' and any(keys[key] for key in ('n_latent', 'n_latent_q', 'n_rope', 'latent_norm')):
        raise UserError(
            'n_latent, n_latent_q, n_rope and latent_norm belong to MLA; use train_mla.py, or leave them out'
        )
    given = given if keys['kv_lr'] else given - {'kv_lr'}  # 0 is the default
    keys = dict(keys, kv_lr=keys['kv_lr'] or checkpoints.KINDS[keys['attention']][0].kv_lr)
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
            raise UserError(f'{folder.path} holds another run; resume it with --resume=yes, choose another --out_dir, '
                            'or discard it with --overwrite=True')  # fmt: skip
        return keys, None, None
    return resumed_keys(keys, given, saved, path), path, saved


def resumed_keys(keys, given, saved, path):
    """The keys of a run resumed from the checkpoint `saved` at `path`; a notice lists given ones that change it."""
    then, from_nanogpt = saved.get('config') or {}, 'attention' not in saved
    ours = set(keys) - set(OF_THIS_CALL) - (set(OF_THE_MACHINE) if from_nanogpt else set())
    keys = {**keys, **{key: then[key] for key in ours - given if same_type(then.get(key), keys[key])}}
    keys['init_from'] = then.get('init_from', 'scratch')  # where the run once came from
    kind = checkpoints.kind_of(saved)
    if keys['attention'] != kind:
        script = 'train_mla.py' if kind == 'mla' else 'train.py'
        raise UserError(f'{path} holds a model with the other attention; resume it with python {script} --resume=yes '
                        f'--out_dir={keys["out_dir"]}')  # fmt: skip
    config_class = checkpoints.KINDS[kind][1]
    shape = checkpoints.model_config(saved)
    for key in shape_keys(config_class, keys):
        if key in given and checkpoints.changed(shape, key, keys[key]):
            raise unchangeable(key, keys[key], getattr(shape, key), path, keys)
        keys[key] = getattr(shape, key)
    for key, default in {'seed': keys['seed'], **checkpoints.OLDER}.items():
        found = then[key] if same_type(then.get(key), keys[key]) else default
        if key in given and keys[key] != found:
            raise unchangeable(key, keys[key], found, path, keys)
        keys[key] = found
    changes = [f'{key} {then[key]} -> {keys[key]}' for key in keys
               if key in given & ours and key in then and then[key] != keys[key]]  # fmt: skip
    errors.notice(f'resuming {path} at iteration {saved.get("iter_num", 0)}'
                   + (f'; changed from now on: {", ".join(changes)}' if changes else ''))  # fmt: skip
    return keys


def same_type(value, default):
    """True where the value of a key in a checkpoint has the type that the key has here."""
    types = (bool,) if isinstance(default, bool) else (int, float) if isinstance(default, float) else (type(default),)
    if default == 'auto':
        types = (str, bool)
    return type(value) in types


def unchangeable(key, value, found, path, keys):
    """The error for a given key that would make the resumed run another run."""
    script = 'train_mla.py' if keys['attention'] == 'mla' else 'train.py'
    return UserError(f'{key}={value} cannot be applied to the run in {path}, which has {key}={found}; leave out what '
                     f'sets it: python {script} --resume=yes --out_dir={keys["out_dir"]}')  # fmt: skip


def progress(saved):
    """What a run has done so far, from its checkpoint: (iterations, tokens, last val loss or None, best val loss)."""
    iterations, keys = saved.get('iter_num') or 0, saved.get('config') or {}
    tokens = saved.get('tokens')
    if tokens is None:  # version 0.1.0 and nanoGPT: the batch never changed
        rows = int(keys.get('batch_size', 0)) * int(keys.get('gradient_accumulation_steps', 1))
        tokens = iterations * rows * int(keys.get('block_size', 0))
    losses = [None if saved.get(name) is None else float(saved[name]) for name in ('val_loss', 'best_val_loss')]
    best = losses[1] if losses[1] is not None and math.isfinite(losses[1]) else math.inf
    return iterations, tokens, losses[0], best


# ---- the data must be that of the model ------------------------------------------------------------------------------


def check_data(saved, data, path):
    """UserError where the data set is not the one that the run in the checkpoint `saved` began with."""
    then, now = (flat(meta) for meta in (saved.get('tokenizer') or {}, data.meta))
    for name in then.keys() & now.keys():
        if then[name] != now[name]:
            raise UserError(f'{data.folder} is not the data set that the run in {path} began with ({name}: '
                            f'{short(now[name])}, recorded {short(then[name])}); restore it, or start a new run in '
                            'another --out_dir')  # fmt: skip


def flat(meta):
    """What identifies the data set of a meta: {'sha256 of train.bin': ..., 'tokens of train': ..., ...}."""
    entries = {key: meta[key] for key in IDENTITY if key in meta}
    nested = {key: entries.pop(key) for key in list(entries) if isinstance(entries[key], dict)}
    files = {f'{key} of {part}': value for key, parts in nested.items() for part, value in parts.items()}
    return {name: value for name, value in files.items() if name != 'sha256 of input'} | entries


def check_tokenizer(meta, data, source):
    """UserError where the model of `source`, whose tokenizer `meta` describes, would read other tokens."""
    then, now = tokenizer_of(meta), tokenizer_of(data.meta)
    if (then and then.meta()) != (now and now.meta()):
        raise UserError(f'{source} was trained on {describe(then)}, and {data.folder} has {describe(now)}; use a data '
                        'set with the same tokenizer')  # fmt: skip


def describe(tokenizer):
    """A tokenizer and the size of its vocabulary, in a few words."""
    return f'{tokenizer.name} tokens ({tokenizer.n_vocab:,} ids)' if tokenizer else 'ids that stand for no text'


def short(value):
    """A value as an error message shows it."""
    text = str(value)
    return text if len(text) <= 40 else text[:37] + '...'


# ---- the model -------------------------------------------------------------------------------------------------------


def model_and_data(keys, given, device, saved=None, path=''):
    """
    What a training run starts from: (model on the CPU or `device`, its TokenData). The model is resumed, pretrained or
    new.

    keys: the run's keys, which are updated with the shape of a pretrained model; given: those that a file or flag set;
    saved: the checkpoint to resume, loaded from `path`, or None. UserError where keys, source and data don't fit
    together.
    """
    try:
        if saved:
            data = open_data(keys)
            check_data(saved, data, path)
            if saved.get('tokenizer'):
                check_tokenizer(saved['tokenizer'], data, path)
            model = checkpoints.build_model(saved, **how(keys))
        elif keys['init_from'] == 'scratch':
            data = open_data(keys)
            model = new_model(keys, data.padded_vocab_size)
        else:
            model, data = pretrained_model(keys, given, device)
        if keys['block_size'] < model.config.block_size:
            model.crop_block_size(keys['block_size'])
    except ValueError as error:
        raise UserError(str(error)) from error
    if data.n_vocab > model.config.vocab_size:
        raise UserError(f'{data.folder} has {data.n_vocab} different tokens, and the model only '
                        f'{model.config.vocab_size}; use the data set that the model was made for')  # fmt: skip
    return model, data


def open_data(keys):
    """The TokenData of a run's keys."""
    return TokenData(os.path.join(keys['data_dir'], keys['dataset']), keys['block_size'])


def how(keys):
    """The keys that a trained model's config may still change."""
    return {name: keys[name] for name in ('dropout', *checkpoints.NOT_THE_MODEL)}


def new_model(keys, vocab_size):
    """A model with initial values and the sizes in `keys`. ValueError where they don't fit together."""
    model_class, config_class = checkpoints.KINDS[keys['attention']]
    sizes = {field.name: keys[field.name] for field in fields(config_class) if field.name in keys}
    return model_class(config_class(**{**sizes, 'vocab_size': vocab_size}), seed=keys['seed'])


def pretrained_model(keys, given, device):
    """
    The model that `init_from` names, and the data: (model, TokenData). Updates `keys` with the model's shape.

    With attention='mla' an MHA model is converted, weighted by what its attention reads in the data. UserError, or
    ValueError from a conversion.
    """
    source = keys['init_from']
    model, saved = checkpoints.pretrained(source, **how(keys))
    if 'block_size' not in given:
        keys['block_size'] = model.config.block_size
    elif keys['block_size'] > model.config.block_size:
        raise UserError(f'block_size={keys["block_size"]} is more than the {model.config.block_size} of the model in '
                        f'{source}; lower it')  # fmt: skip
    data = open_data(keys)
    if saved.get('tokenizer'):  # nanoGPT's checkpoints don't say
        check_tokenizer(saved['tokenizer'], data, source)
    if checkpoints.attention_of(model) == 'mla' and keys['attention'] == 'mha':
        raise UserError(f'{source} holds a model with MLA, which cannot be converted back to MHA; use train_mla.py')
    if checkpoints.attention_of(model) == 'mha' and keys['attention'] == 'mla':
        count = max(keys['batch_size'], 65536 // keys['block_size'])
        text = training_text(data, count, keys['batch_size'])
        model = to_mla(model, keys['n_latent'], collect_statistics(model.to(device), text))
    for key in shape_keys(type(model.config), keys):
        if key == 'block_size':
            continue  # a pretrained model can be shortened
        if key in given and checkpoints.changed(model.config, key, keys[key]):
            found = getattr(model.config, key)
            raise UserError(f'{key}={keys[key]} cannot be applied to {source}, which has {key}={found}; remove it from '
                            'the command line or the config file')  # fmt: skip
        keys[key] = getattr(model.config, key)
    return model, data
