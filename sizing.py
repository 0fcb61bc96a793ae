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

DeepSeek-V3's shape at a long context, with a cache in int8; all numbers as JSON:
$ python sizing.py --shape=deepseek-v3 --block_size=131072 --gpu=H200 --cache=int8 --json=sizing.json
"""

from core.cli.keys import begin

begin(__file__)  # before the slow imports

import os
import textwrap

from analysis import report
from core.cli import arguments
from core.cli.arguments import whole_numbers
from core.cli.errors import UserError
from core.speed.gpus import GPUS, gpu_called
from core.speed.planner import PARTS, SHAPES, Plan, variants

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
gpu = 'H100'  # a name in core/speed/gpus.py's table
gpus = 1  # how many, each with batches of its own
fsdp = False  # share weights, gradients and optimizer out over the GPUs
usable = 0.9  # share of a GPU's memory for tensors; the rest is for CUDA, its libraries, and gaps between tensors
dtype = 'auto'  # of matrix multiplications, weights in decoding and the cache; 'auto': bfloat16, float16 on V100 and T4
cache = 'float'  # 'int8', 'int4': the cache in so many bits, scales included
# training
batch_size = 12  # sequences per micro-batch on one GPU
optimizer = 'adamw'  # 'adamw', or 'muon' for the matrices of the blocks
mfu = 0.4  # share of the peak FLOP/s that goes into the model's arithmetic; .42 was measured at 124M on an H200
tokens = 10_000_000_000  # of the run
price = 0.0  # of one GPU for an hour, in any currency; 0: unknown
# output
json = ''  # write all numbers to this file
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())
# ----------------------------------------------------------------------------------------------------------------------

WIDTH = 100  # columns of a terminal


def plans_to_compare():
    """MHA, GQA, MQA and MLA of the given sizes."""
    heads, width = sizes['n_head'], sizes['n_embd']
    quarter = next(n for n in range(max(1, heads // 4), 0, -1) if heads % n == 0)
    kv_heads = whole_numbers(sizes['n_kv_heads'], 'n_kv_heads') or [quarter, 1]
    latents = whole_numbers(sizes['n_latents'], 'n_latents') or [max(1, width // 2), max(1, width // 8)]
    found = variants(sizes, dict.fromkeys([heads, *kv_heads]), dict.fromkeys(latents))
    return [Plan(model_class, model_config, dtype, cache) for model_class, model_config in found]


# ---- one model's numbers ---------------------------------------------------------------------------------------------


def training(plan):
    """Memory per GPU in bytes, largest batches, speed, hours and cost of training: a dict."""
    tokens_per_s = mfu * peak * gpus / plan.training_flops
    states, gathered = plan.state_bytes(optimizer, share), plan.gathered_bytes if share > 1 else 0.0
    always, hours = sum(states.values()) + gathered, tokens / tokens_per_s / 3600
    found = dict(states=states, gathered=gathered, flops_per_token=plan.training_flops, tokens_per_s=tokens_per_s)
    found |= dict(hours=hours, cost=hours * gpus * price if price else None)
    for name, recompute in (('plain', False), ('recomputed', True)):
        step = plan.step_bytes(batch_size * T, recompute)
        found[name] = step | {
            'on top': step['peak'] - step['kept'],
            'total': always + step['peak'],
            'largest_batch': plan.largest_training_batch(room - always, T, recompute),
        }
    return found


def decoding(plan):
    """Decoding on one GPU: memory in bytes, largest batch, speed by the roofline: a dict."""
    largest = plan.largest_decoding_batch(room, T)
    found = dict(context=T, flops_per_token=plan.decoding_flops(T), weight_bytes=plan.weight_bytes)
    found |= dict(cache_bytes_per_token=plan.cache_bytes, cache_bytes=plan.cache_bytes * T)
    found |= dict(step_bytes=plan.drawing_bytes, largest_batch=largest)
    for name, batch in (('one', min(1, largest)), ('largest', largest)):
        seconds = plan.decoding_seconds(batch, T, peak, 1e9 * hardware.bandwidth) if batch else {}
        found[name] = {'tokens_per_s': batch / sum(seconds.values()) if batch else 0, 'seconds': seconds}
    return found


# ---- the table -------------------------------------------------------------------------------------------------------


def brief(number):
    """A number in few characters: '1,234', '12.3', '0.0123'; '0' for none."""
    return f'{number:,.0f}' if number >= 100 or number == 0 else f'{number:.3g}'


def batch_text(number):
    """The size of a batch, or that not even one sequence fits."""
    return f'{number:,}' if number else 'none fits'


def bound_by(seconds):
    """What most of a decode step's time goes to, and its part; '' where no step is possible."""
    most = max(seconds, key=seconds.get, default='')
    return most and f'{most} {seconds[most] / sum(seconds.values()):.0%}'


def rows_of(results):
    """The table's rows, [label, cell of each model, ...]; a row without cells begins a part of the table."""

    def row(label, text, path, unit=1):
        cells = []
        for result in results:
            for key in path.split('/'):
                result = result[key]
            cells.append(text(result if unit == 1 else result / unit))
        return [label, *cells]

    rows = [
        row('**parameters, millions**', brief, 'parameters', 1e6),
        *(row(part, brief, f'parts/{part}', 1e6) for part in PARTS.values() if part in results[0]['parts']),
        ['**training, GB per GPU**'],
        row('weights, float32', brief, 'training/states/weights', 1e9),
        row('gradients, float32', brief, 'training/states/gradients', 1e9),
        row('AdamW' if optimizer == 'adamw' else 'Muon and AdamW', brief, 'training/states/optimizer', 1e9),
        row('two gathered blocks', brief, 'training/gathered', 1e9) if share > 1 else None,
        row('kept for backward pass', brief, 'training/plain/kept', 1e9),
        row('logits, or backward pass', brief, 'training/plain/on top', 1e9),
        row(f'sum, batch {batch_size} x {T}', brief, 'training/plain/total', 1e9),
        row('kept, recomputing blocks', brief, 'training/recomputed/kept', 1e9),
        row('sum, recomputing blocks', brief, 'training/recomputed/total', 1e9),
        row('largest batch', batch_text, 'training/plain/largest_batch'),
        row('the same, recomputing', batch_text, 'training/recomputed/largest_batch'),
        ['**training, speed**'],
        row('GFLOP per token', brief, 'training/flops_per_token', 1e9),
        row(f'tokens/s at MFU {mfu:.0%}', brief, 'training/tokens_per_s'),
        row(f'hours, {brief(tokens / 1e9)}B tokens', brief, 'training/hours'),
        row('cost', brief, 'training/cost') if price else None,
        ['**decoding, one GPU**'],
        row('weights, GB', brief, 'decoding/weight_bytes', 1e9),
        row('cache, bytes per token', brief, 'decoding/cache_bytes_per_token'),
        row('cache, MB per sequence', brief, 'decoding/cache_bytes', 1e6),
        row('largest batch', batch_text, 'decoding/largest_batch'),
        row('MFLOP per token', brief, 'decoding/flops_per_token', 1e6),
        row('tokens/s, one sequence', brief, 'decoding/one/tokens_per_s'),
        row('tokens/s, largest batch', brief, 'decoding/largest/tokens_per_s'),
        row('most of its time', bound_by, 'decoding/largest/seconds'),
    ]
    return [row for row in rows if row]


def tables(results):
    """Markdown tables with a column per model, padded for a terminal and as many as its width demands: a str."""
    rows, names = rows_of(results), ['', *(result['name'] for result in results)]
    cells = max(len(cell) for row in (names, *rows) for cell in row[1:])
    columns = max(1, (WIDTH - max(len(row[0]) for row in rows) - 4) // (cells + 3))
    texts = []
    for first in range(1, len(names), columns):
        heading = names[first : first + columns]
        parts = [[row[0], *(row[first : first + columns] or [''] * len(heading))] for row in rows]
        texts.append(report.markdown_table(['', *heading], parts, padded=True))
    return '\n'.join(texts)


STATES = f'shared out over {gpus} GPUs' if fsdp and gpus > 1 else 'whole on each GPU'
ASSUMPTIONS = [
    'GPU: {gpu.name}, by its data sheet {tflops:g} TFLOP/s ({dtype}, dense), {gpu.memory:g} GB, {gpu.bandwidth:g} '
    'GB/s; tensors may take {usable:.0%} of its memory. GB are 10^9 bytes.',
    "Parameters, cache and what the blocks of a training step keep and take are counted with the models' code on "
    'tensors without data; the loss, decoding and FLOPs by formulas. The embedding is the output head too. FLOPs of '
    'training are those of the customary MFU.',
    'Training: weights, gradients and optimizer in float32, {states}; products in {dtype}, and the copies of the '
    'weights they need are in what is kept. Gradients exist in the forward pass, as with several micro-batches. The '
    'loss takes logits in pieces. No dropout, not compiled. Not counted: buffers of communication, workspace inside '
    'kernels, patterns of short sequences on a CPU. Steps measured on a CPU agree within 1% from 1,024 tokens on; on a '
    'GPU none was measured.',
    'tokens/s of training is {mfu:.0%} of the peak of {gpus} GPU(s), divided by the FLOPs of a token: the MFU is your '
    'assumption, and communication and recomputing are in it.',
    'Decoding: weights in {dtype} (sample.py keeps float32 weights beside: 4 bytes more each), cache in {kind}, MLA '
    'absorbed; every sequence is {T} tokens long. tokens/s is the roofline: per step, weights are read once and every '
    'cache once, or the arithmetic takes longer. No kernel reaches it; reading prompts, launching kernels and drawing '
    'are left out.',
]
COST = 'Cost: {price:g} per GPU and hour, as --price says, times {gpus} GPU(s) times the hours.'
DEEPSEEK = (
    'deepseek-v3: the published layers, width and cache; but 56 heads of 128 for 128 of 192, and a dense MLP for the '
    'experts, so parameters, FLOPs and speed are not the published ones.'
)

# ---- what was asked for ----------------------------------------------------------------------------------------------
if json:
    arguments.check_file(json, 'json')
if shape and shape not in SHAPES:
    raise UserError(f"'{shape}' is no shape; choose {', '.join(SHAPES)}")
sizes = config | {key: value for key, value in SHAPES.get(shape, {}).items() if key not in given}
hardware = gpu_called(gpu)
if hardware is None:
    raise UserError(f"gpu is '{gpu}'; it must be one of {', '.join(entry.name for entry in GPUS)}")
dtype = hardware.dtype if dtype == 'auto' else dtype
peak, room, share = hardware.flops(dtype), usable * 1e9 * hardware.memory, gpus if fsdp else 1
T = sizes['block_size']
plans = plans_to_compare()

# ---- the numbers -----------------------------------------------------------------------------------------------------
sizes_text = f'{sizes["n_layer"]} layers, {sizes["n_head"]} heads, C = {sizes["n_embd"]}'
sizes_text += f', vocabulary {sizes["vocab_size"]:,}, context {T:,}; {gpus} x {hardware.name}'
print(f'{shape + ": " if shape else ""}{sizes_text}\n')
results = []
for plan in plans:
    found = dict(name=plan.name, parameters=plan.total, parts=plan.parameters)
    results.append(found | dict(training=training(plan), decoding=decoding(plan)))
print(tables(results))
facts = dict(gpu=hardware, tflops=peak / 1e12, dtype=dtype, usable=usable, states=STATES, mfu=mfu, gpus=gpus, T=T)
facts['kind'] = dtype if cache == 'float' else cache
assumptions = [text.format(**facts, price=price) for text in [*ASSUMPTIONS, *([COST] if price else [])]]
assumptions += [DEEPSEEK] if shape == 'deepseek-v3' else []
for line in assumptions:
    print(textwrap.fill(f'- {line}', WIDTH, subsequent_indent='  '))
if json:
    found = {'config': config | sizes, 'gpu': hardware._asdict(), 'models': results, 'assumptions': assumptions}
    report.save_json(json, found)
