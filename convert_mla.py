"""
Convert a trained GPT from multi-head to multi-head latent attention, and measure what that costs.

From a checkpoint of train.py, on its own data set; by default the latent's size is half of n_embd:
$ python convert_mla.py --source=out-shakespeare-cpu --out_dir=out-converted --n_latent=64
$ python sample.py --out_dir=out-converted

To grouped-query attention, or from it: a GQA model is an MLA model of the same cache size, exactly:
$ python convert_mla.py --source=out-shakespeare-cpu --out_dir=out-gqa --n_kv_head=2
$ python convert_mla.py --source=out-gqa --out_dir=out-gqa-mla

A model with RoPE keeps it: keys are decompressed and rotated whole. In DeepSeek's shape, one rotated key for all heads
beside content keys, it decodes absorbed, but it loses more and has to be fine-tuned:
$ python convert_mla.py --source=out-modern-cpu --out_dir=out-modern-converted --n_latent=128
$ python convert_mla.py --source=out-modern-cpu --out_dir=out-modern-published --n_latent=128 --n_rope=32

For a cache in few bits the latent may get another basis, in which the model is the same function; the source may then
be an MLA model, too:
$ python convert_mla.py --source=out-shakespeare-cpu-mla --out_dir=out-rotated --basis=balanced
$ python sample.py --out_dir=out-rotated --cache=int4

Loss against cache size for every method, as a table and a picture (out_dir/conversion.png); no checkpoint is written:
$ python convert_mla.py --source=out-shakespeare-cpu --sweep=96,64,48,32,16 --json=out-converted/conversion.json

OpenAI's GPT-2, by name or from a Hugging Face folder, measured on a data set in GPT-2's tokens:
$ python convert_mla.py --source=gpt2 --dataset=openwebtext --out_dir=out-gpt2-converted --n_latent=384

A published model, prepared by data/smollm2/prepare.py, on text in its own tokens and in windows of 256 of them:
$ python convert_mla.py --source=data/smollm2 --dataset=smollm2-python --context=256 --n_latent=160 --n_rope=32

The algebra is in core/convert/factorize.py and factorize_rope.py. Fine-tuning recovers most of the loss:
$ python train_mla.py config/finetune_shakespeare_cpu_mla.py --init_from=out-converted --n_latent=64
"""

from core.cli.keys import begin

begin(__file__)  # before the slow imports

import os

from core.cli import arguments, errors, files, machine
from core.cli.errors import UserError
from core.convert.bits import latent_statistics, rotate
from core.convert.factorize import collect_statistics, to_gqa, to_mla, training_text
from core.convert.factorize_rope import collect_inputs, to_published_mla
from core.runs import checkpoint as checkpoints
from core.runs import evaluation, models
from core.runs import resume as resuming
from core.text.dataset import TokenData
from ops.checks import not_finite

# ----------------------------------------------------------------------------------------------------------------------
source = 'out'  # a checkpoint or its folder, 'gpt2' (-medium, -large, -xl), a Hugging Face folder or a GGUF file
out_dir = 'out-converted'  # receives ckpt.pt, or the picture of a sweep
overwrite = False  # replace the checkpoint in out_dir
n_latent = 0  # size of the latent; 0: half of n_embd, for GQA its cache's size. n_embd is exact
n_rope = 0  # of a model with RoPE: rotated dimensions beside the content; 0: keys are decompressed and rotated whole
n_kv_head = 0  # convert to GQA instead, mean-pooled to this many key/value heads; 1: multi-query attention
method = 'data'  # 'data': weight directions by their variance on real text; 'weights': use the weights alone
basis = ''  # of the latent, for a cache in few bits: 'hadamard', 'components' or 'balanced'; '': as it comes
balance = True  # weight keys and values equally, whichever has the larger norm
sweep = ''  # latent sizes to compare, for example '384,192,96', with every method
json = ''  # a file for the numbers
dataset = ''  # a folder of data_dir, for statistics and losses; '': the one the checkpoint was trained on
data_dir = 'data'
statistics_tokens = 65536  # tokens of the training split used for the statistics
eval_tokens = 65536  # tokens of the validation split used for the losses
context = 0  # tokens of a window of text; 0: the model's block_size
batch_size = 16
device = 'auto'
dtype = 'float32'  # the differences are smaller than bfloat16's rounding
threads = 0
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())
# ----------------------------------------------------------------------------------------------------------------------

sizes = arguments.whole_numbers(sweep, 'sweep') or [n_latent]
if n_kv_head and (sweep or n_latent or n_rope):
    raise UserError(
        'n_kv_head converts to grouped-query attention, without a latent; leave out sweep, n_latent, n_rope'
    )
if n_kv_head and given & {'method', 'balance'}:
    raise UserError('method and balance are for a latent, and n_kv_head takes the mean of heads; leave them out')
if sweep and given & {'n_latent', 'method', 'balance'}:
    raise UserError('a sweep names the sizes, and compares all methods; leave out n_latent, method, balance')
if basis and n_kv_head:
    raise UserError('basis is for a latent, and n_kv_head converts to attention without one; leave out one of them')
if n_rope and method == 'weights':
    raise UserError('n_rope needs text, which says how far back the heads look; leave out method=weights')
target = os.path.join(out_dir, 'ckpt.pt')
arguments.check_folder(out_dir)
if json:
    arguments.check_file(json, 'json', made=out_dir)
if os.path.exists(target) and not sweep and not overwrite:
    raise UserError(f'{target} exists; choose another --out_dir, or replace it with --overwrite=True')

# ---- the model and its text ------------------------------------------------------------------------------------------
device = machine.pick_device(device)
machine.set_threads(threads)
dtype = machine.pick_dtype(dtype, device)
autocast = machine.autocast(device, dtype)
model, saved = models.pretrained(source)
is_mla = models.attention_of(model) == 'mla'
rotated = basis and is_mla  # it stays as it is but for the basis
if rotated and (sweep or n_latent or n_rope):
    raise UserError(f'{source} is MLA already: --basis alone can change; leave out sweep, n_latent, n_rope')
if is_mla and not basis:
    raise UserError(f'{source}: only a GPT with multi-head attention can be converted, not {type(model).__name__}')
model = model.to(device).eval()
dataset = dataset or str(saved.get('config', {}).get('dataset', ''))
if not dataset and (sweep or method == 'data' or basis not in ('', 'hadamard')):
    if sweep:
        raise UserError(
            'a sweep needs text: name a data set with --dataset, or convert to one size with '
            '--n_latent=SIZE --method=weights'
        )
    without = '--basis=hadamard' if basis else '--method=weights'
    raise UserError(f'statistics need text: name a data set with --dataset, or convert with {without}')
if not 0 <= context <= model.config.block_size:
    raise UserError(f'context={context} is more than the block_size of the model, {model.config.block_size}; lower it')
context = context or model.config.block_size
data = TokenData(os.path.join(data_dir, dataset), context) if dataset else None
if data and saved.get('tokenizer'):  # nanoGPT's checkpoints and a folder without a tokenizer don't say
    resuming.check_tokenizer(saved['tokenizer'], data, source)
if data and data.n_vocab > model.config.vocab_size:
    raise UserError(
        f'{dataset} has {data.n_vocab} different tokens, and the model only {model.config.vocab_size}; '
        'use the data set that the model was made for'
    )


def windows(tokens):
    """The number of windows that hold `tokens` tokens; at least one."""
    return max(1, tokens // context)


if data and len(data.eval_windows('val', windows(eval_tokens))) < 2:
    raise UserError(
        f'a standard error requires at least two windows of {context} tokens; raise '
        f'--eval_tokens={eval_tokens}, or use a data set with a longer val.bin'
    )


# ---- convert and measure ---------------------------------------------------------------------------------------------
losses = {}  # of each validation window, by the name of the row


def measured(name, model):
    """A row of the table. The standard error of the rise is that of the differences per window."""
    row = dict(method=name, n_latent=getattr(model.config, 'n_latent', None))
    row['cache_bytes_per_token'] = model.init_cache(1, dtype=machine.DTYPES[dtype]).bytes_per_token
    row['cache_saved'] = 1 - row['cache_bytes_per_token'] / bytes_before
    if data:
        losses[name] = evaluation.window_losses(model, data, 'val', windows(eval_tokens), batch_size, autocast)
        row['val_loss'], row['val_stderr'] = evaluation.mean_and_stderr(losses[name])
        if name != before:
            row['rise'], row['rise_stderr'] = evaluation.mean_and_stderr(losses[name] - losses[before])
    return row


def shown(row):
    """The row as a line of the printed table."""
    size = '' if row['n_latent'] is None else str(row['n_latent'])
    line = f'{row["method"]:18}{size:>8}{row["cache_bytes_per_token"]:>15,}{row["cache_saved"]:>9.1%}'
    if 'val_loss' in row:
        line += f'{row["val_loss"]:>12.4f} +- {row["val_stderr"]:.4f}'
    return line + (f'{row["rise"]:>+12.5f} +- {row["rise_stderr"]:.5f}' if 'rise' in row else '')


before = models.label_of(model.config)
bytes_before = model.init_cache(1, dtype=machine.DTYPES[dtype]).bytes_per_token
methods = {'data' if method == 'data' else 'weights': (method == 'data', balance)}
if sweep:
    methods = {'weights': (False, True), 'data, not balanced': (True, False), 'data': (True, True)}
if n_rope:
    methods.pop('weights', None)
if n_kv_head:
    methods = {'mean-pooled': (False, False)}
if rotated:
    methods = {basis: (False, False)}
statistics = inputs = None
if any(weighted for weighted, _ in methods.values()):
    statistics = collect_statistics(model, training_text(data, windows(statistics_tokens), batch_size))
if n_rope and model.config.pos == 'rope':
    inputs = collect_inputs(model, training_text(data, windows(statistics_tokens), batch_size))

about = f'; losses on {data.corpus}' if data else ''
errors.output(f'{source}: {model.get_num_params() / 1e6:.2f}M parameters{about}')
heading = f'{"method":18}{"n_latent":>8}{"bytes/token":>15}{"saved":>9}'
print(heading + (f'{"val loss":>22}{"rise":>23}' if data else ''))
rows = [measured(before, model)]
print(shown(rows[0]))
for size in sizes:
    for name, (weighted, balanced) in methods.items():
        try:
            if rotated:
                converted = model
            elif n_kv_head:
                converted = to_gqa(model, n_kv_head)
            elif n_rope:
                converted = to_published_mla(model, statistics, inputs, size, n_rope, balanced)
            else:
                converted = to_mla(model, size, statistics if weighted else None, balanced)
            if basis:
                some = training_text(data, windows(statistics_tokens), batch_size) if data else ()
                converted = rotate(converted, basis, latent_statistics(converted, some))
        except ValueError as error:
            raise UserError(str(error)) from error
        rows.append(measured(name, converted))
        print(shown(rows[-1]), flush=True)
os.makedirs(out_dir, exist_ok=True)
if json:
    settings = dict(source=source, corpus=data and data.corpus, dtype=dtype, settings=config)
    files.write_json(json, dict(settings, rows=rows))

# ---- one size: a checkpoint ------------------------------------------------------------------------------------------
if not sweep:
    if bad := not_finite(converted.state_dict()):
        raise UserError(f'the conversion gave weights that are not finite: {bad}; check the model, nothing was written')
    tokenizer = saved.get('tokenizer') or (data.meta if data else {})
    corpus = saved.get('corpus') or source
    keys = saved.get('config', {}) | dict(dataset=dataset, data_dir=data_dir)
    facts = dict(converted_from=source, val_loss=rows[-1].get('val_loss'), tokenizer=tokenizer, corpus=corpus)
    checkpoints.save(target, models.contents(converted, keys, **facts))
    errors.output(f'checkpoint: {target}')
    raise SystemExit

# ---- several: a picture ----------------------------------------------------------------------------------------------
from matplotlib.figure import Figure  # noqa: E402  (slow to import)

from analysis import report, style  # noqa: E402

LOOK = {
    'weights': dict(color=style.GREY, marker='^', linestyle=':'),
    'data, not balanced': style.look('MLA', 0.1),
    'data': style.look('MLA', 0.5),
}
figure = Figure(figsize=(7, 4.5))
axes = figure.subplots()
for name in methods:
    points = [row for row in rows if row['method'] == name]
    x, y, spread = ([p[key] for p in points] for key in ('cache_bytes_per_token', 'rise', 'rise_stderr'))
    axes.errorbar(x, y, spread, capsize=3, label=name, **LOOK[name])
axes.axvline(bytes_before, color='black', linewidth=0.8)
axes.annotate(f'{before} ', (bytes_before, 0.96), xycoords=('data', 'axes fraction'), va='top', ha='right')
axes.set_xscale('log', base=2)
sizes = sorted({row['cache_bytes_per_token'] for row in rows} | {bytes_before})
axes.set_xticks(sizes, [f'{size:,}' for size in sizes], rotation=30)
axes.minorticks_off()
axes.set_yscale('symlog', linthresh=1e-3)
axes.margins(y=0.08)
axes.set_xlabel(f'cache bytes per token ({dtype})')
axes.set_ylabel('rise in validation loss (nats per token)')
axes.set_title(f'{before} converted to MLA, before any fine-tuning: {data.corpus}')
axes.legend()
report.save_figure(os.path.join(out_dir, 'conversion.png'), figure, dpi=130)
