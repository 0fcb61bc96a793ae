"""
Train a GPT with multi-head attention (MHA) and one with multi-head latent attention (MLA) on the same batches, and
compare them: a table, a sample of each, a picture (comparison.png) and all of its numbers (comparison.json).

$ python data/shakespeare_char/prepare.py
$ python test_shakespeare_quick.py

With a GPU the setting is nanoGPT's baby GPT, on a CPU a smaller one. An interrupted comparison resumes when the same
command is run again. The keys below apply to both models:
$ python test_shakespeare_quick.py --max_iters=500 --out_dir=out-quick-500
"""

from core import signals

signals.exit_at_once()  # for the time of the slow imports

import os
import statistics
import sys

import torch

from core import checkpoint as checkpoints
from core import evaluation, messages, runlog, runtime, scripts
from core.dataset import TokenData
from core.messages import UserError
from core.tokenizer import load_tokenizer

# ----------------------------------------------------------------------------------------------------------------------
out_dir = 'out-quick'  # receives a folder per model, comparison.png and comparison.json
overwrite = False  # discard a comparison with other settings that out_dir holds
dataset = 'shakespeare_char'
data_dir = 'data'
size = 'auto'  # 'gpu' (nanoGPT's baby GPT, 2000 iterations), 'cpu' (two minutes per model on two cores), or 'auto'
max_iters = 0  # 0: the setting's own
n_latent = 0  # size of MLA's latent; 0: half of n_embd
start = '\n'  # the prompt of the samples
sample_tokens = 400
device = 'auto'
dtype = 'auto'
compile = 'auto'
threads = 0
seed = 1337
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())
# ----------------------------------------------------------------------------------------------------------------------

SIZES = {
    'gpu': dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64, dropout=0.2, learning_rate=1e-3,
                min_lr=1e-4, beta2=0.99, warmup_iters=100, max_iters=2000, eval_interval=250, eval_iters=20),
    'cpu': dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=16, dropout=0.0, learning_rate=2e-3,
                min_lr=1e-4, beta2=0.99, warmup_iters=100, max_iters=2000, eval_interval=250, eval_iters=20),
}  # fmt: skip
device = runtime.pick_device(device)
size = ('cpu' if device == 'cpu' else 'gpu') if size == 'auto' else size
if size not in SIZES:
    raise UserError(f"size is '{size}'; it must be auto, {' or '.join(SIZES)}")
messages.check_folder(out_dir)
dtype = runtime.pick_dtype(dtype, device, SIZES[size]['n_embd'])
setting = dict(SIZES[size], dataset=dataset, data_dir=data_dir, gradient_accumulation_steps=1, bias=False,
               log_interval=10, device=device, dtype=dtype, compile=compile, threads=threads, seed=seed)  # fmt: skip
setting['max_iters'] = max_iters or setting['max_iters']
setting['lr_decay_iters'] = setting['max_iters']
data = TokenData(os.path.join(data_dir, dataset), setting['block_size'])
tokenizer = load_tokenizer(data.meta)
start_ids = tokenizer.encode(start)
if not start_ids:
    raise UserError('start is empty; the prompt must contain at least one token (the default is a newline)')

# ---- train both, with the same arguments -----------------------------------------------------------------------------
models = {'mha': 'train.py', 'mla': 'train_mla.py'}
own_arguments = {'mha': {}, 'mla': {'n_latent': n_latent}}
for name in models:
    folder = os.path.join(out_dir, name)
    ckpt = os.path.join(folder, 'ckpt.pt')
    if os.path.exists(ckpt) and not overwrite:
        earlier = checkpoints.load(ckpt).get('config', {})
        changed = [key for key, value in {**setting, **own_arguments[name]}.items() if earlier.get(key) != value]
        if changed:
            raise UserError(
                f'{folder} holds a run with another {changed[0]}; choose another --out_dir, or discard it with '
                '--overwrite=True'
            )
for name, script in models.items():
    arguments = {**setting, **own_arguments[name], 'out_dir': os.path.join(out_dir, name)}
    arguments.update(overwrite=True) if overwrite else arguments.update(resume='auto')
    messages.notice(f'---- {script}: {name.upper()} ----')
    command = [sys.executable, script, *(f'--{key}={value}' for key, value in arguments.items())]
    if code := scripts.call(command):
        sys.exit(code)


# ---- read back what was saved ----------------------------------------------------------------------------------------
def mean_loss(model, split):
    """Mean loss over the split's fixed windows, in nats per token, and its standard error."""
    count, batch_size = setting['eval_iters'] * setting['batch_size'], setting['batch_size']
    autocast = runtime.autocast(device, dtype)
    return evaluation.mean_and_stderr(evaluation.window_losses(model, data, split, count, batch_size, autocast))


runtime.set_threads(threads)
results, logs = {}, {}
for name in models:
    folder = os.path.join(out_dir, name)
    saved = checkpoints.load(folder)
    model = checkpoints.build_model(saved).to(device).eval()
    logs[name] = runlog.read(os.path.join(folder, 'log.csv'))
    step_times = runlog.column(logs[name], 'ms_per_iter')[1]
    if not step_times:
        raise UserError(f'{folder} holds a finished run whose log.csv is lost; repeat it with --overwrite=True')
    step_time = statistics.median(step_times[1:] or step_times)  # the first holds the warm-up
    train_loss, train_error = mean_loss(model, 'train')
    val_loss, val_error = mean_loss(model, 'val')
    prompt = torch.tensor([start_ids], device=device)
    torch.manual_seed(seed)
    ids = model.generate(prompt, sample_tokens, temperature=0.8, top_k=200, valid_ids=tokenizer.n_vocab)[0]
    results[name] = dict(
        iterations=saved['iter_num'],
        parameters=model.get_num_params(),
        attention_parameters=model.num_attention_params(),
        flops_per_token=model.flops_per_token(),
        cache_bytes_per_token=model.init_cache(1, dtype=runtime.DTYPES[dtype]).bytes_per_token,
        ms_per_iter=step_time,
        tokens_per_s=1000 * setting['batch_size'] * setting['block_size'] / step_time,
        train_loss=train_loss,
        train_stderr=train_error,
        val_loss=val_loss,
        val_stderr=val_error,
        sample=tokenizer.decode(ids.tolist()),
    )
mha, mla = results['mha'], results['mla']

# ---- the table -------------------------------------------------------------------------------------------------------
ROWS = (
    ('parameters', 'parameters', '{:,.0f}'),
    ('in attention', 'attention_parameters', '{:,.0f}'),
    ('training FLOPs per token', 'flops_per_token', '{:,.0f}'),
    (f'cache bytes per token ({dtype})', 'cache_bytes_per_token', '{:,.0f}'),
    ('ms per iteration (median)', 'ms_per_iter', '{:,.1f}'),
    ('training tokens/s', 'tokens_per_s', '{:,.0f}'),
)
messages.output(f'\nMHA against MLA after {mha["iterations"]} iterations on {data.corpus}\n')
print(f'{"":36}{"MHA":>18}{"MLA":>18}{"MLA / MHA":>12}')
for label, key, form in ROWS:
    print(f'{label:36}{form.format(mha[key]):>18}{form.format(mla[key]):>18}{mla[key] / mha[key]:>12.2f}')
for split in ('train', 'val'):
    cells = [f'{r[f"{split}_loss"]:.4f} +- {r[f"{split}_stderr"]:.4f}' for r in (mha, mla)]
    ratio = mla[f'{split}_loss'] / mha[f'{split}_loss']
    print(f'{split + " loss, nats per token":36}{cells[0]:>18}{cells[1]:>18}{ratio:>12.3f}')
for name in models:
    messages.output(f'\n---- a sample of {name.upper()} ----\n{results[name]["sample"].strip()}')

# ---- the picture -----------------------------------------------------------------------------------------------------
from matplotlib.figure import Figure  # noqa: E402  (slow to import, and of no use before)

from analysis import report  # noqa: E402

LOOK = {'mha': dict(color='#1f3b73', marker='o'), 'mla': dict(color='#e07b39', marker='s')}  # differ in grey as well
figure = Figure(figsize=(11, 4.5), layout='constrained')
left, right = figure.subplots(1, 2, width_ratios=(3, 1))
for name, rows in logs.items():
    for split, line in (('train', '--'), ('val', '-')):
        iterations, losses = runlog.column(rows, f'{split}_loss')
        left.plot(iterations, losses, line, markersize=4, label=f'{name.upper()} {split}', **LOOK[name])
left.set(xlabel='iteration', ylabel='loss (nats per token)', title=f'Same batches, same start: {data.corpus}')
left.grid(alpha=0.3)
left.legend()
bars = right.bar(
    ['MHA', 'MLA'], [r['cache_bytes_per_token'] for r in (mha, mla)], color=[LOOK[n]['color'] for n in models]
)
right.bar_label(bars, fmt='{:,.0f}')
right.set(ylabel='bytes', title=f'Cache per token ({dtype})')
report.save_figure(os.path.join(out_dir, 'comparison.png'), figure, dpi=130)
numbers = dict(corpus=data.corpus, setting=setting, device=device, dtype=dtype, torch=torch.__version__)
report.save_json(os.path.join(out_dir, 'comparison.json'), dict(numbers, results=results))
