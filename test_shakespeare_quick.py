"""
Train a GPT with multi-head attention (MHA) and one with multi-head latent attention (MLA) on the same batches, and
compare them with compare.py: a table, a sample of each, a picture (comparison.png) and all numbers (comparison.json).

$ python data/shakespeare_char/prepare.py
$ python test_shakespeare_quick.py

With a GPU the setting is nanoGPT's baby GPT, on a CPU a smaller one. An interrupted comparison resumes when the same
command is run again. Every key of train.py is accepted too, and applies to both models:
$ python test_shakespeare_quick.py --max_iters=500 --block_size=128 --out_dir=out-quick-500
"""

import os

from core.cli.keys import begin, keys_of

begin(__file__, os.path.join(os.path.dirname(__file__), 'train.py'))  # before the slow imports

import sys

from core.cli import arguments, errors, machine, subprocesses
from core.cli.errors import UserError
from core.runs import checkpoint as checkpoints
from core.runs.models import MLA_KEYS
from core.runs.resume import OLDER
from core.text.dataset import TokenData
from core.text.prompt import prompt_ids
from core.text.tokenizer import load_tokenizer

globals().update(keys_of(os.path.join(os.path.dirname(__file__), 'train.py')))  # the other keys
# ----------------------------------------------------------------------------------------------------------------------
out_dir = 'out-quick'  # receives a folder per model, comparison.png and comparison.json
overwrite = False  # discard a comparison with other settings that out_dir holds
dataset = 'shakespeare_char'
data_dir = 'data'
size = 'auto'  # 'gpu' (nanoGPT's baby GPT, 2000 iterations), 'cpu' (two minutes per model on two cores), or 'auto'
start = '\n'  # the prompt of the samples
sample_tokens = 400
device = 'auto'
dtype = 'auto'
threads = 0
seed = 1337
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())
# ----------------------------------------------------------------------------------------------------------------------

SIZES = {
    'gpu': dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64, dropout=0.2, learning_rate=1e-3),
    'cpu': dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=16, dropout=0.0, learning_rate=4e-3),
}
SCHEDULE = dict(min_lr=1e-4, beta2=0.99, warmup_iters=100, max_iters=2000, eval_interval=250, eval_iters=20, kv_lr=1.0)
OURS = ('out_dir', 'overwrite', 'size', 'start', 'sample_tokens')
DECIDED = ('attention', 'resume', 'init_from', 'eval_only')  # by this script
device = machine.pick_device(device)
size = ('cpu' if device == 'cpu' else 'gpu') if size == 'auto' else size
if size not in SIZES:
    raise UserError(f"size is '{size}'; it must be auto, {' or '.join(SIZES)}")
if decided := given & set(DECIDED):
    raise UserError(f'{min(decided)} cannot be given: both models are trained from scratch, and resumed where they are')
arguments.check_folder(out_dir)
setting = dict(SIZES[size], **SCHEDULE, gradient_accumulation_steps=1, log_interval=10)
setting.update((key, config[key]) for key in given - set(OURS))
setting.update(dataset=dataset, data_dir=data_dir, threads=threads, seed=seed, device=device)
setting['dtype'] = dtype = machine.pick_dtype(dtype, device, setting['n_embd'])
if 'lr_decay_iters' not in given:
    setting['lr_decay_iters'] = setting['max_iters']
data = TokenData(os.path.join(data_dir, dataset), setting['block_size'])
# a prompt that can't be encoded is found out before training
prompt_ids(load_tokenizer(data.meta), start, is_default='start' not in given)

# ---- train both, with the same arguments -----------------------------------------------------------------------------
models = {'mha': 'train.py', 'mla': 'train_mla.py'}
foreign = {'mha': MLA_KEYS, 'mla': {'n_kv_head'}}  # keys of the other attention
keys = {name: {key: value for key, value in setting.items() if key not in foreign[name]} for name in models}
for name in models:
    folder = os.path.join(out_dir, name)
    if os.path.exists(os.path.join(folder, 'ckpt.pt')) and not overwrite:
        earlier = OLDER | checkpoints.load(folder, mapped=True)['config']
        changed = [key for key, value in keys[name].items() if key != 'threads' and earlier.get(key) != value]
        if changed:
            hint = 'choose another --out_dir, or discard it with --overwrite=True'
            raise UserError(f'{folder} holds a run with another {changed[0]}; {hint}')
for name, script in models.items():
    arguments = dict(keys[name], out_dir=os.path.join(out_dir, name))
    arguments.update(overwrite=True) if overwrite else arguments.update(resume='auto')
    errors.notice(f'---- {script}: {name.upper()} ----')
    command = [sys.executable, script, *(f'--{key}={value}' for key, value in arguments.items())]
    if code := subprocesses.call(command):
        sys.exit(code)

# ---- compare ---------------------------------------------------------------------------------------------------------
folders = ','.join(os.path.join(out_dir, name) for name in models)
arguments = dict(runs=folders, start=start, sample_tokens=sample_tokens, out_dir=out_dir)
arguments.update((key, setting[key]) for key in ('data_dir', 'device', 'dtype', 'threads', 'seed'))
print(flush=True)
sys.exit(subprocesses.call([sys.executable, 'compare.py', *(f'--{key}={value}' for key, value in arguments.items())]))
