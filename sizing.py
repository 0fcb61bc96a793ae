"""
Size a model before training it: parameters, FLOPs, memory, the largest batches, tokens/s, hours and cost, for MHA, GQA,
MQA and MLA side by side. Nothing is trained or allocated.

How large a batch fits an L4 at a context of 8192, in training and in decoding?
$ python sizing.py --gpu=L4 --block_size=8192

A shape by name (gpt2, gpt2-medium, gpt2-large, gpt2-xl, 7b, deepseek-v3), or any sizes of train.py's:
$ python sizing.py --shape=7b --gpu=H200 --gpus=8 --fsdp=True
$ python sizing.py --n_layer=6 --n_head=6 --n_embd=384 --vocab_size=65 --block_size=256 --n_latents=192,96 --gpu=T4

A run of 10 billion tokens on 8 GPUs: hours, and the cost at a price per GPU and hour that you know:
$ python sizing.py --shape=gpt2 --gpu=A100-80GB --gpus=8 --tokens=10e9 --mfu=0.35 --price=2

Decoding speed and largest batch over the context, from 124M to DeepSeek-V3's shape; all numbers as JSON:
$ python sizing.py --gpu=H200 --plot=sizing.png --json=sizing.json
"""

from core.cli import signals

signals.exit_at_once()  # for the time of the slow imports

import os
import textwrap
from dataclasses import fields

from analysis import report
from core.cli import arguments, errors
from core.cli.arguments import whole_numbers
from core.cli.errors import UserError
from core.speed import planner
from core.speed.gpus import GPUS
from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig

# ----------------------------------------------------------------------------------------------------------------------
shape = ''  # sizes by name: gpt2, gpt2-medium, gpt2-large, gpt2-xl, 7b or deepseek-v3; keys that are given go first
# model
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024  # the context, in training and in decoding
vocab_size = 50304
bias = False
pos = 'learned'  # 'learned' or 'rope'
n_kv_heads = ''  # key/value heads of the GQA models, for example '4,1'; '': a quarter of n_head or fewer, and MQA
n_latents = ''  # sizes of the MLA models' latents, for example '384,192'; '': C/2 and C/8
n_latent_q = 0  # MLA: size of the queries' latent; 0: queries are not compressed
n_rope = 0  # MLA: dimensions per head that RoPE rotates; 0 with pos='rope': half of the head size
latent_norm = False  # MLA: RMSNorm on the latents
# machine
gpu = 'H100'  # a name in core/cli/machine.py's table
gpus = 1  # how many, each with batches of its own
fsdp = False  # share weights, gradients and optimizer out over the GPUs
usable = 0.9  # share of a GPU's memory for tensors; the rest is for CUDA, its libraries, and gaps between tensors
dtype = 'auto'  # of matrix multiplications, weights in decoding and the cache; 'auto': bfloat16, float16 on V100 and T4
# training
batch_size = 12  # sequences per micro-batch on one GPU
optimizer = 'adamw'  # 'adamw', or 'muon' for the matrices of the blocks
mfu = 0.4  # share of the peak FLOP/s that goes into the model's arithmetic; .42 was measured at 124M on an H200
tokens = 10_000_000_000  # of the run
price = 0.0  # of one GPU for an hour, in any currency; 0: unknown
# output
json = ''  # write all numbers to this file
plot = ''  # draw decoding speed and largest batch over context to this file
plot_shapes = ''  # the shapes in it; '': the sizes that are given, or gpt2, 7b and deepseek-v3
contexts = '1024,2048,4096,8192,16384,32768,65536,131072'  # and the contexts, in tokens
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())
# ----------------------------------------------------------------------------------------------------------------------

for key in ('json', 'plot'):
    if config[key]:
        arguments.check_file(config[key], key)
hardware = planner.gpu_called(gpu)
if hardware is None:
    raise UserError(f"gpu is '{gpu}'; it must be one of {', '.join(entry.name for entry in GPUS)}")
dtype = hardware.dtype if dtype == 'auto' else dtype
peak = 1e12 * (hardware.single if dtype == 'float32' else hardware.half)
room = usable * 1e9 * hardware.memory
share = gpus if fsdp else 1


# ---- the models ------------------------------------------------------------------------------------------------------


def sizes_of(name):
    """All keys, with the sizes of a named shape where they weren't given. UserError for an unknown name."""
    if name and name not in planner.SHAPES:
        raise UserError(f"'{name}' is no shape; choose {', '.join(planner.SHAPES)}")
    named = planner.SHAPES[name] if name else {}
    return config | {key: value for key, value in named.items() if key not in given}


def arm(model_class, config_class, sizes, **own):
    """One sizing.Arm. UserError where the sizes don't fit together."""
    keys = {field.name: sizes[field.name] for field in fields(config_class) if field.name in sizes}
    try:
        return planner.Arm(model_class, config_class(**keys | own), dtype)
    except ValueError as error:
        raise UserError(str(error)) from error


def arms_of(sizes):
    """The models to compare at these sizes: MHA, GQA, MQA and MLA."""
    heads, width = sizes['n_head'], sizes['n_embd']
    quarter = next(n for n in range(max(1, heads // 4), 0, -1) if heads % n == 0)
    kv_heads = whole_numbers(sizes['n_kv_heads'], 'n_kv_heads') or [quarter, 1]
    latents = whole_numbers(sizes['n_latents'], 'n_latents') or [max(1, width // 2), max(1, width // 8)]
    found = [arm(GPT, GPTConfig, sizes, n_kv_head=number) for number in dict.fromkeys([heads, *kv_heads])]
    return found + [arm(MLAGPT, MLAConfig, sizes, n_latent=size) for size in dict.fromkeys(latents)]


# ---- one model's numbers ---------------------------------------------------------------------------------------------


def training(model):
    """Memory per GPU in bytes, largest batches, speed, hours and cost of training a sizing.Arm: a dict."""
    states = model.state_bytes(optimizer, share)
    found = {'states': states, 'gathered': model.gathered_bytes if share > 1 else 0.0}
    always = sum(states.values()) + found['gathered']
    for name, recompute in (('plain', False), ('recomputed', True)):
        step = model.step_bytes(batch_size * T, recompute)
        step |= {'logits': step['loss'] - step['kept'], 'on top': step['peak'] - step['kept']}
        step['total'] = always + step['peak']
        found[name] = step | {'largest_batch': model.largest_training_batch(room - always, T, recompute)}
    found['flops_per_token'] = model.facts['training']
    found['tokens_per_s'] = mfu * peak * gpus / found['flops_per_token']
    found['hours'] = tokens / found['tokens_per_s'] / 3600
    found['cost'] = found['hours'] * gpus * price if price else None
    return found


def decoding(model, context):
    """Decoding a sizing.Arm at a context on one GPU: memory in bytes, largest batch, speed by the roofline: a dict."""
    largest = model.largest_decoding_batch(room, context)
    found = {
        'context': context,
        'flops_per_token': model.flops_line.at(context),
        'weight_bytes': model.weight_bytes,
        'cache_bytes_per_token': model.cache_bytes,
        'cache_bytes': model.cache_bytes * context,
        'step_bytes': model.decoding_line.each,
        'largest_batch': largest,
    }
    for name, batch in (('one', min(1, largest)), ('largest', largest)):
        parts = model.decoding_seconds(batch, context, peak, 1e9 * hardware.bandwidth) if batch else {}
        found[name] = {'tokens_per_s': batch / sum(parts.values()) if batch else 0, 'seconds': parts}
    return found


def numbers(model):
    """All numbers of a sizing.Arm: a dict."""
    parts = model.parameters
    found = {'name': model.name, 'parameters': sum(parts.values()), 'parts': parts}
    return found | {'training': training(model), 'decoding': decoding(model, model.config.block_size)}


# ---- the table -------------------------------------------------------------------------------------------------------

WIDTH = 100  # columns of a terminal


def short(number):
    """A number in few characters: '1,234', '12.3', '0.0123'; '0' for none."""
    return f'{number:,.0f}' if number >= 100 or number == 0 else f'{number:.3g}'


def batch_text(number):
    """The size of a batch, or that not even one sequence fits."""
    return f'{number:,}' if number else 'none fits'


def rows_of(results):
    """The table's rows, [label, cell of each model, ...]; a row without cells begins a part of the table."""

    def row(label, text, *path, unit=1):
        cells = []
        for result in results:
            for key in path:
                result = result[key]
            cells.append(text(result if unit == 1 else result / unit))
        return [label, *cells]

    def bound_by(seconds):
        most = max(seconds, key=seconds.get, default='')
        return most and f'{most} {seconds[most] / sum(seconds.values()):.0%}'

    states, plain, again = ('training', 'states'), ('training', 'plain'), ('training', 'recomputed')
    parts = [part for part in planner.PARTS.values() if part in results[0]['parts']]
    gb = dict(unit=1e9)
    rows = [
        row('**parameters, millions**', short, 'parameters', unit=1e6),
        *(row(part, short, 'parts', part, unit=1e6) for part in parts),
        ['**training, GB per GPU**'],
        row('weights, float32', short, *states, 'weights', **gb),
        row('gradients, float32', short, *states, 'gradients', **gb),
        row({'adamw': 'AdamW', 'muon': 'Muon and AdamW'}[optimizer], short, *states, 'optimizer', **gb),
        row('two gathered blocks', short, 'training', 'gathered', **gb) if share > 1 else None,
        row('kept for backward pass', short, *plain, 'kept', **gb),
        row('logits, or backward pass', short, *plain, 'on top', **gb),
        row(f'sum, batch {batch_size} x {T}', short, *plain, 'total', **gb),
        row('kept, recomputing blocks', short, *again, 'kept', **gb),
        row('sum, recomputing blocks', short, *again, 'total', **gb),
        row('largest batch', batch_text, *plain, 'largest_batch'),
        row('the same, recomputing', batch_text, *again, 'largest_batch'),
        ['**training, speed**'],
        row('GFLOP per token', short, 'training', 'flops_per_token', unit=1e9),
        row(f'tokens/s at MFU {mfu:.0%}', short, 'training', 'tokens_per_s'),
        row(f'hours, {short(tokens / 1e9)}B tokens', short, 'training', 'hours'),
        row('cost', short, 'training', 'cost') if price else None,
        ['**decoding, one GPU**'],
        row('weights, GB', short, 'decoding', 'weight_bytes', **gb),
        row('cache, bytes per token', short, 'decoding', 'cache_bytes_per_token'),
        row('cache, MB per sequence', short, 'decoding', 'cache_bytes', unit=1e6),
        row('largest batch', batch_text, 'decoding', 'largest_batch'),
        row('MFLOP per token', short, 'decoding', 'flops_per_token', unit=1e6),
        row('tokens/s, one sequence', short, 'decoding', 'one', 'tokens_per_s'),
        row('tokens/s, largest batch', short, 'decoding', 'largest', 'tokens_per_s'),
        row('most of its time', bound_by, 'decoding', 'largest', 'seconds'),
    ]
    return [row for row in rows if row]


def tables(results):
    """Markdown tables with a column per model, padded for a terminal and as many as its width demands: a str."""
    rows = rows_of(results)
    labels = max(len(row[0]) for row in rows)
    cells = max(len(cell) for row in [[result['name'] for result in results], *rows] for cell in row[1:])
    columns = max(1, (WIDTH - labels - 4) // (cells + 3))
    texts = []
    for first in range(0, len(results), columns):
        names = [result['name'] for result in results[first : first + columns]]
        padded = [
            [label.ljust(labels), *(cell.rjust(cells) for cell in own[first : first + columns] or [''] * len(names))]
            for label, *own in rows
        ]
        texts.append(report.markdown_table([' ' * labels, *(name.rjust(cells) for name in names)], padded))
    return '\n'.join(texts)


def assumptions():
    """What is counted and what isn't: a list of str."""
    states = f'shared out over {gpus} GPUs' if share > 1 else 'whole on each GPU'
    found = [
        f'GPU: {hardware.name}, by its data sheet {peak / 1e12:g} TFLOP/s ({dtype}, dense), {hardware.memory:g} GB, '
        f'{hardware.bandwidth:g} GB/s; tensors may take {usable:.0%} of its memory. GB are 10^9 bytes.',
        "Counted with the models' code on tensors without data: parameters, FLOPs, cache, and what a step keeps and "
        'takes. The embedding is the output head too. FLOPs of training are those of the customary MFU.',
        f'Training: weights, gradients and optimizer in float32, {states}; products in {dtype}, and the copies of the '
        'weights they need are in what is kept. Gradients exist in the forward pass, as with several micro-batches. '
        'The loss takes logits in pieces. No dropout, not compiled. Not counted: buffers of communication, '
        'workspace inside kernels, patterns of short sequences on a CPU. Steps measured on a CPU agree within 1% from '
        '1,024 tokens on; on a GPU none was measured.',
        f'tokens/s of training is {mfu:.0%} of the peak of {gpus} GPU(s), divided by the FLOPs of a token: the MFU is '
        'your assumption, and communication and recomputing are in it.',
        f'Decoding: weights and cache in {dtype} (sample.py keeps float32 weights beside: 4 bytes more each), MLA '
        f'absorbed; every sequence is {T} tokens long. tokens/s is the roofline: per step, '
        'weights are read once and every cache once, or the arithmetic takes longer. No kernel reaches it; reading '
        'prompts, launching kernels and drawing are left out.',
    ]
    if price:
        found.append(f'Cost: {price:g} per GPU and hour, as --price says, times {gpus} GPU(s) times the hours.')
    if 'deepseek-v3' in (shape, *shapes):
        found.append(
            'deepseek-v3: the published layers, width and cache; but 56 heads of 128 for 128 of 192, and a dense MLP '
            'for the experts, so parameters, FLOPs and speed are not the published ones.'
        )
    return found


# ---- the figure ------------------------------------------------------------------------------------------------------


def curves(name, lengths):
    """Decoding of a named shape's models over context lengths: {name of a model: [dict of `decoding`, ...]}."""
    models = arms_of(sizes_of(name) | {'block_size': max(lengths)})
    errors.notice(f'sizing {name}')
    return {model.name: [decoding(model, length) for length in lengths] for model in models}


def draw(found):
    """The Figure of {shape: curves}: tokens/s of the largest batch above, that batch below. Readable in grey."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(4.3 * len(found), 7), layout='constrained')
    axes = figure.subplots(2, len(found), squeeze=False)
    for (name, models), (above, below) in zip(found.items(), axes.T, strict=True):
        for number, (label, rows) in enumerate(models.items()):
            rows = [row for row in rows if row['largest_batch']]
            look = dict(color=str(0.65 * number / len(models)), marker='os^Dv*PX'[number % 8], markersize=6,
                        markerfacecolor='white' if number % 2 else None, linestyle=('-', '--', '-.', ':')[number % 4],
                        label=label)  # fmt: skip
            x = [row['context'] for row in rows]
            above.plot(x, [row['largest']['tokens_per_s'] for row in rows], **look)
            below.plot(x, [row['largest_batch'] for row in rows], **look)
        above.set_title(f'{name}: tokens/s of the largest batch')
        below.set_title(f'{name}: largest batch')
        for axis in (above, below):
            axis.spines[['top', 'right']].set_visible(False)
            if not any(row['largest_batch'] for rows in models.values() for row in rows):  # a log axis needs a number
                axis.text(0.5, 0.5, 'not one sequence fits', ha='center', transform=axis.transAxes)
                axis.set(xticks=[], yticks=[])
                continue
            axis.set(xscale='log', yscale='log', xlabel='context (tokens)')
            axis.set_xticks(lengths, [f'{n // 1024}k' if n % 1024 == 0 else str(n) for n in lengths])
            axis.set_xticks([], minor=True)
            axis.grid(color='0.9')
            axis.legend(frameon=False, fontsize='small')
    axes[0, 0].set_ylabel('tokens/s of all sequences')
    axes[1, 0].set_ylabel('sequences')
    machine = f'{hardware.name} ({hardware.memory:g} GB, {hardware.bandwidth:g} GB/s), {dtype}'
    figure.suptitle(f'Decoding on one {machine}, MLA absorbed: upper limits by the data sheet')
    return figure


# ---- the numbers -----------------------------------------------------------------------------------------------------
sizes = sizes_of(shape)
T = sizes['block_size']
own = shape or given & {field.name for field in fields(MLAConfig)}
shapes = arguments.names(plot_shapes, 'plot_shapes') or ([shape] if own else ['gpt2', '7b', 'deepseek-v3'])
shapes, lengths = shapes if plot else [], whole_numbers(contexts, 'contexts')
if not lengths:
    raise UserError("contexts is ''; it must be whole numbers separated by commas, such as 1024,8192")
for name in shapes:
    arms_of(sizes_of(name))  # a mistake is said before the work
models = arms_of(sizes)
print(f'{shape + ": " if shape else ""}{sizes["n_layer"]} layers, {sizes["n_head"]} heads, C = {sizes["n_embd"]}, '
      f'vocabulary {sizes["vocab_size"]:,}, context {T:,}; {gpus} x {hardware.name}\n')  # fmt: skip
results = [numbers(model) for model in models]
print(tables(results))
for line in assumptions():
    print(textwrap.fill(f'- {line}', WIDTH, subsequent_indent='  '))
found = {'config': config | sizes, 'gpu': hardware._asdict(), 'models': results, 'assumptions': assumptions()}
if plot:
    found['curves'] = {name or 'these sizes': curves(name, lengths) for name in shapes}
    report.save_figure(plot, draw(found['curves']), dpi=120)
if json:
    report.save_json(json, found)
