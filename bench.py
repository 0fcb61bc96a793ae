"""
Measure the speed and memory of the models: side by side, in alternating rounds, with medians and quartiles.

Training steps of MHA and MLA, next to nanoGPT's, and to ours without one of its optimizations:
$ python bench.py --mode=train --nanogpt=../nanoGPT --without=memory,fused,loss
$ python bench.py --mode=train --n_layer=6 --n_head=6 --n_embd=384 --vocab_size=65 --batch_size=64 --block_size=256
$ python bench.py --mode=train --attention_kernel=cudnn                      # on a GPU: attention by that library
$ python bench.py --mode=train --profile=trace     # also profile one step: trace-MHA.json for chrome://tracing

Decoding with MHA's cache, with MLA's latent cache and without a cache, over context lengths and batch sizes:
$ python bench.py --mode=sample
$ python bench.py --mode=sample --contexts=128,256,512,1024,2048,4096 --plot=assets/decode.png --json=sample.json

The same, compared with Hugging Face's steps, and whole texts with nanoGPT's generate and Hugging Face's:
$ python bench.py --mode=sample --nanogpt=../nanoGPT --huggingface=True

A long context with float and with int8 caches:
$ python bench.py --mode=sample --contexts=4096 --batch_sizes=8 --n_latents=384 --cache=int8 --new_tokens=0

The largest batch that a training step has memory for:
$ python bench.py --mode=memory

Weights are random: times don't depend on them. Other programs on the machine disturb the times: check the quartiles.
"""

from core.cli.keys import begin

begin(__file__)  # before the slow imports

import contextlib
import copy
import functools
import gc
import os
import tempfile

import torch

from analysis import report, speed
from core.cli import arguments, errors, machine
from core.cli.arguments import whole_numbers
from core.cli.errors import UserError
from core.cli.files import write_json
from core.convert.int8 import quantize, weight_bytes
from core.runs.models import label_of
from core.speed import gpus, rivals, timing
from core.speed.planner import variants
from core.speed.rivals import WITHOUT, Decoding, HuggingFaceDecoding, SeparateTraining, Setting, Training
from core.speed.timing import ms_text, spread

# ----------------------------------------------------------------------------------------------------------------------
mode = 'sample'  # what to measure: 'train', 'memory' or 'sample'
json = ''  # write all numbers to this file
rounds = 9  # timed rounds, after one round of warm-up
nanogpt = ''  # train, sample: folder of a nanoGPT checkout to compare with
# model: by default GPT-2's smallest, 124M
n_layer = 12
n_head = 12
n_embd = 768
vocab_size = 50304
n_kv_heads = ''  # key/value heads of further models, for example '4,1': GQA-4 and MQA beside MHA and MLA
pos = 'learned'  # 'rope': MLA rotates dimensions beside the content, as published
norm = 'layer'
mlp = 'gelu'
latent_norm = False  # of MLA
n_latents = ''  # sizes of the MLA models' latents, for example '384,192'; '': C/2, and for sample C/4 and C/8 as well
# sample
contexts = '256,1024'  # context lengths of the timed steps, in tokens
batch_sizes = '1,8'
uncached_tokens = 4096  # steps without a cache are slow: time them up to this many tokens per batch
new_tokens = 256  # length of the generated texts; 0: no texts
prompt_tokens = 16
huggingface = False  # compare with transformers' GPT-2
int8 = False  # on a CPU: also time the models with weights in int8
int4 = False  # the same with weights in int4
cache = 'float'  # 'int8', 'int4': also time the models with a cache in so many bits
eager = False  # on a GPU: also time steps that are not captured as a CUDA graph
plot = ''  # draw decoding time and cache size to this file
# train
batch_size = 12
block_size = 1024
dropout = 0.0
bias = False
compile = 'auto'  # torch.compile: True (also for decode steps on a CPU), False, or for training on GPUs
attention_kernel = 'auto'  # on a GPU: 'cudnn', 'flash', or 'fa3' (FlashAttention 3, where it is installed)
without = ''  # also measure MHA without each of these: 'memory,fused,loss'
profile = ''  # profile one step of each model; prefix of the files' names
# memory
most = 4096  # the largest batch to try
# machine
device = 'auto'
dtype = 'auto'
threads = 0  # CPU threads; 0: the cores that this process may use
seed = 1337
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())
# ----------------------------------------------------------------------------------------------------------------------

if vocab_size > 2**16:
    raise UserError(f'vocab_size is {vocab_size}; it must be at most {2**16:,}: tokens are read as uint16')
if (nanogpt or huggingface) and (pos, norm, mlp) != ('learned', 'layer', 'gelu'):
    raise UserError('nanoGPT and GPT-2 have learned positions, LayerNorm and GELU; leave out pos, norm and mlp')
if (int8 or int4) and device not in ('auto', 'cpu'):
    raise UserError('int8 and int4 are for a CPU; leave them out, or add --device=cpu')
for key in ('json', 'plot'):
    if config[key]:
        arguments.check_file(config[key], key)
device = machine.pick_device(device)
dtype = machine.pick_dtype(dtype, device, n_embd)
compile = device.startswith('cuda') if compile == 'auto' else compile
if compile and mode in ('train', 'sample'):
    machine.prepare_compiler(device)
machine.set_threads(threads)
machine.use_attention(attention_kernel, device)
torch.set_float32_matmul_precision('high')  # TF32 on GPUs for what stays float32
TURN = 0.1  # seconds for which each contender is called in a round, where one call takes less
alternate = functools.partial(timing.alternate, device=device)
peak_bytes = functools.partial(timing.peak_bytes, device=device)
host = timing.describe_machine(device, dtype)
host_text = ', '.join(f'{key}: {value}' for key, value in host.items())


def build_all(shares, **settings):
    """{name: model}: MHA, GQA with each of `n_kv_heads`, MLA with each of `n_latents` (default: n_embd / `shares`)."""
    sizes = whole_numbers(n_latents, 'n_latents') or [n_embd // share for share in shares]
    heads = [0, *whole_numbers(n_kv_heads, 'n_kv_heads')]
    models = [made(shape, seed=seed).to(device) for made, shape in variants(config | settings, heads, sizes)]
    return {label_of(model.config): model for model in models}


def print_rows(rows, columns):
    """Print dicts as a table. columns: {heading: function of a row}; a cell is empty where the row lacks its key."""

    def cell(column, row):
        try:
            return column(row)
        except KeyError:
            return ''

    print(report.markdown_table(columns, [[cell(column, row) for column in columns.values()] for row in rows], True))


def free_memory():
    """After a lack of memory: free what the exception's frames held."""
    gc.collect()
    torch.cuda.empty_cache()


def compare_with(first, rows):
    """Give each timed row its time as a multiple of that of `first`, unless that wasn't timed. Returns the rows."""
    for row in rows:
        if 'ms' in row and 'ms' in first:
            row['of_mha'] = row['ms'] / first['ms']
    return rows


# ---- mode=train ------------------------------------------------------------------------------------------------------


def bench_train():
    """Time training steps and print a table. Returns the numbers as a dict."""
    parts = [part for part in without.split(',') if part]
    if set(parts) - set(WITHOUT):
        raise UserError(f"without is '{without}'; it must be a list of {', '.join(WITHOUT)}")
    if device == 'cpu':
        machine.keep_freed_memory()
    models = build_all((2,))
    separate = {'nanoGPT': dict(nanogpt=nanogpt)} if nanogpt else {}
    separate |= {f'MHA without {part}': dict(leave_out=part) for part in parts}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        rivals.random_data(folder, vocab_size, block_size, seed)
        setting = Setting(folder, batch_size, block_size, seed, device, dtype, compile)
        contenders = {name: Training(model, setting) for name, model in models.items()}
        for name, options in separate.items():
            contenders[name] = stack.enter_context(SeparateTraining(name, setting, models['MHA'].config, **options))
        peak = timing.cpu_flops(dtype) if device == 'cpu' else gpus.peak_flops(device, dtype)
        rate = f'{peak / 1e12:.3g} TFLOP/s' if peak else 'unknown'
        print(f'{host_text}, compiled: {compile}; {n_layer} layers, C={n_embd}', end='; ')
        print(f'batch {batch_size} x {block_size}, dropout {dropout}')
        print(f'peak rate of matrix multiplications (MFU 100 %): {rate}\n')
        seconds = alternate({name: contender.run for name, contender in contenders.items()}, rounds, turn=0.5)
        rows = [{'name': name, **spread(seconds[name])} for name in contenders]
        for row in compare_with(rows[0], rows):
            row['peak_bytes'] = contenders[row['name']].peak_bytes()
            row['tokens_per_s'] = 1e3 * batch_size * block_size / row['ms']
            row['flops_per_s'] = models.get(row['name'], models['MHA']).flops_per_token() * row['tokens_per_s']
            row['mfu'] = row['flops_per_s'] / peak if peak else None
            if nanogpt:
                row['speed_of_nanogpt'] = next(r['ms'] for r in rows if r['name'] == 'nanoGPT') / row['ms']
        columns = {
            'training step': lambda row: row['name'],
            'ms (quartiles)': ms_text,
            'tokens/s': lambda row: f'{row["tokens_per_s"]:,.0f}',
            'time / MHA': lambda row: f'{row["of_mha"]:.3f}',
            'speed / nanoGPT': lambda row: f'{row["speed_of_nanogpt"]:.2f}',
            'TFLOP/s': lambda row: f'{row["flops_per_s"] / 1e12:.3f}',
            'MFU': lambda row: f'{row["mfu"]:.1%}' if row['mfu'] else 'n/a',
            'peak MiB': lambda row: f'{row["peak_bytes"] / 2**20:,.0f}',
        }
        print_rows(rows, columns)
        for name in models if profile else ():
            path = f'{profile}-{name.replace(", ", "-").replace("=", "")}.json'
            parts = timing.profile(contenders[name].run, path, device)[:8]
            longest = ', '.join(f'{operation[:60]} {part:.0%}' for operation, part in parts)
            print(f'{name}, one step: {longest}; trace written to {path}')
    return {'steps': rows, 'peak_flops': peak}


# ---- mode=memory ----------------------------------------------------------------------------------------------------


def step_peak(model, batch, folder):
    """Peak memory of a training step with `batch` sequences, in bytes; None where it doesn't fit."""
    with contextlib.suppress(torch.OutOfMemoryError):
        training = Training(model, Setting(folder, batch, block_size, seed, device, dtype, compile=False))
        training.run()  # makes the optimizer's state, which is held from then on
        return training.peak_bytes()
    training = None  # with the optimizer's state
    model.zero_grad(set_to_none=True)
    free_memory()
    return None


def bench_memory():
    """Find the largest batches that can be trained, and print a table. Returns the numbers as a dict."""
    rows = []
    print(f'{host_text}; {n_layer} layers, C={n_embd}, T={block_size}\n')
    with tempfile.TemporaryDirectory() as folder:
        rivals.random_data(folder, vocab_size, block_size, seed)
        for name, model in build_all((2,)).items():
            fits, bytes_ = timing.largest(functools.partial(step_peak, model, folder=folder), most)
            rows.append({'name': name, 'largest_batch': fits, 'peak_bytes': bytes_})
            model.to('meta')  # frees it
    columns = {
        'model': lambda row: row['name'],
        'largest batch': lambda row: f'{row["largest_batch"]:,}' + ' or more' * (row['largest_batch'] == most),
        'peak MiB of a step': lambda row: f'{row["peak_bytes"] / 2**20:,.0f}' if row['peak_bytes'] else '',
    }
    print_rows(rows, columns)
    return {'largest': rows}


# ---- mode=sample -----------------------------------------------------------------------------------------------------


def time_together(makers):
    """A row for each of {name: function that makes its Decoding}, timed in turns: times, sizes and peak memory."""
    decodings = {name: make() for name, make in makers.items()}
    seconds = alternate({name: decoding.run for name, decoding in decodings.items()}, rounds, turn=TURN)
    able = [name for name in makers if name != 'Hugging Face' and not name.endswith(', compiled')]
    attention = alternate({name: decodings[name].run_attention for name in able}, rounds, turn=TURN)
    rows = [{'name': name, **spread(seconds[name]), **decoding.sizes} for name, decoding in decodings.items()]
    decodings.clear()  # frees the caches
    for row in rows:
        if row['name'] in attention:
            row['attention'] = spread(attention[row['name']])
        row['peak_bytes'] = peak_bytes(lambda name=row['name']: makers[name]().run())
    return rows


def time_steps(makers):
    """The rows of `time_together`; of each model alone where memory ends, and without times if it ends even then."""
    with contextlib.suppress(torch.OutOfMemoryError):
        return time_together(makers)
    free_memory()
    if len(makers) == 1:
        return [{'name': name, 'out_of_memory': True} for name in makers]
    return [row for name, make in makers.items() for row in time_steps({name: make})]


def measure_steps(models, hf_model, batch_size, context):
    """One row per model, and one for MHA without a cache, at one batch size and context length."""
    makers = {name: functools.partial(Decoding, model, batch_size, context) for name, model in models.items()}
    if cache != 'float':
        makers |= {f'{name}, {cache} cache': functools.partial(make, kind=cache) for name, make in makers.items()}
    if eager and device.startswith('cuda'):
        makers |= {f'{name}, eager': functools.partial(make, how='eager') for name, make in makers.items()}
    if compile and device == 'cpu':
        makers |= {f'{name}, compiled': functools.partial(make, how='compiled') for name, make in makers.items()}
    if hf_model:
        makers['Hugging Face'] = functools.partial(HuggingFaceDecoding, hf_model, batch_size, context, dtype)
    rows = time_steps(makers)
    if batch_size * context <= uncached_tokens:
        idx = torch.zeros(batch_size, context, dtype=torch.int64, device=device)
        times = alternate({'uncached': lambda: models['MHA'](idx)}, min(3, rounds))['uncached']
        row = {'name': 'MHA, no cache', **spread(times), 'bytes_per_token': 0, 'cache_bytes': 0}
        rows.append(row | {'peak_bytes': peak_bytes(lambda: models['MHA'](idx))})
    compare_with(rows[0].get('attention', {}), [row['attention'] for row in rows if 'attention' in row])
    for row in compare_with(rows[0], rows):
        row |= {'batch_size': batch_size, 'context': context}
        if 'ms' in row:
            row['tokens_per_s'] = 1e3 * batch_size / row['ms']
        if row.get('cache_bytes'):
            name = row['name'].removesuffix(', eager').removesuffix(', compiled').removesuffix(f', {cache} cache')
            model = models.get(name, models['MHA'])
            weights = weight_bytes(model, machine.DTYPES[dtype].itemsize)
            row['bytes_per_s'] = 1e3 * (weights + row['cache_bytes']) / row['ms']
    return rows


def measure_texts(models, hf_model, prompt):
    """One row per model and per rival: generating a text of `new_tokens` tokens after prompt (1, prompt_tokens)."""
    rules = dict(temperature=1.0, top_k=200)  # the same for all
    generators = {name: model.generate for name, model in models.items()}
    if compile and device == 'cpu':
        generators |= {f'{name}, compiled': functools.partial(of, compiled=True) for name, of in generators.items()}
    if nanogpt:
        generators['nanoGPT'] = rivals.nanogpt_model(nanogpt, models['MHA'], prompt).generate
    contenders = {name: functools.partial(of, prompt, new_tokens, **rules) for name, of in generators.items()}
    if hf_model:
        theirs = dict(rules, max_new_tokens=new_tokens, attention_mask=torch.ones_like(prompt), pad_token_id=0)
        theirs |= dict(use_cache=True, do_sample=True, top_p=1.0)
        contenders['Hugging Face, cached'] = functools.partial(hf_model.generate, prompt, **theirs)
    seconds = alternate(contenders, min(3, rounds))
    rows = [{'name': name, **spread(times)} for name, times in seconds.items()]
    for row in compare_with(rows[0], rows):
        row['tokens_per_s'] = 1e3 * new_tokens / row['ms']
    return rows


def bench_sample():
    """Time decoding steps, then whole texts, and print a table of each. Returns the numbers as a dict."""
    lengths, sizes = whole_numbers(contexts, 'contexts'), whole_numbers(batch_sizes, 'batch_sizes')
    longest = max([*lengths, prompt_tokens + new_tokens])
    all_models = build_all((2, 4, 8), block_size=longest, bias=True)  # with biases, as GPT-2
    models = {name: model.eval() for name, model in all_models.items()}
    for kind in ('int8', 'int4'):
        if config[kind]:
            for name, model in all_models.items():
                models[f'{name}, {kind}'] = quantize(copy.deepcopy(model), kind)
    print(f'{host_text}\n')
    steps, texts = [], []
    prompt = torch.randint(vocab_size, (1, prompt_tokens), generator=torch.Generator().manual_seed(seed)).to(device)
    with torch.no_grad(), machine.autocast(device, dtype):
        hf_model = huggingface and rivals.huggingface_model(models['MHA'], prompt)
        for batch_size in sizes:
            for context in lengths:
                errors.notice(f'timing steps at batch size {batch_size}, context {context}')
                steps += measure_steps(models, hf_model, batch_size, context)
        gpu = gpus.gpu_of(device)
        bandwidth = gpu.bandwidth if gpu else timing.cpu_bandwidth() if device == 'cpu' else None
        columns = {
            'B': lambda row: row['batch_size'],
            'T': lambda row: row['context'],
            'model': lambda row: row['name'],
            'ms per step (quartiles)': lambda row: ms_text(row) if 'ms' in row else 'out of memory',
            'time / MHA': lambda row: f'{row["of_mha"]:.2f}',
            'attention only (ms)': lambda row: ms_text(row['attention']),
            'attention / MHA': lambda row: f'{row["attention"]["of_mha"]:.2f}',
            'tokens/s': lambda row: f'{row["tokens_per_s"]:,.1f}',
            'GB/s': lambda row: f'{row["bytes_per_s"] / 1e9:,.1f}',
            'of bandwidth': lambda row: f'{row["bytes_per_s"] / 1e9 / bandwidth:.0%}' if bandwidth else '',
            'cache bytes per token': lambda row: f'{row["bytes_per_token"]:,}',
            'cache MiB': lambda row: f'{row["cache_bytes"] / 2**20:.1f}',
            'peak MiB': lambda row: f'{row["peak_bytes"] / 2**20:,.1f}',
        }
        print_rows(steps, columns)
        if new_tokens > 0:
            errors.notice(f'timing texts of {new_tokens} tokens')
            texts = measure_texts(models, hf_model, prompt)
            columns = {
                f'generate {new_tokens} tokens': lambda row: row['name'],
                'tokens/s': lambda row: f'{row["tokens_per_s"]:.1f}',
                'ms per text (quartiles)': ms_text,
                'time / MHA': lambda row: f'{row["of_mha"]:.2f}',
            }
            print_rows(texts, columns)
    if plot:
        setting = f'{host["device"]}, {host["threads"]} threads, {dtype}, {n_layer} layers, C = {n_embd}'
        report.save_figure(plot, speed.decoding_figure(steps, n_embd, setting), dpi=120)
    return {'steps': steps, 'texts': texts}


# ---- the measurement -------------------------------------------------------------------------------------------------
modes = {'train': bench_train, 'memory': bench_memory, 'sample': bench_sample}
if mode not in modes:
    raise UserError(f"mode is '{mode}'; it must be {', '.join(list(modes)[:-1])} or {list(modes)[-1]}")
results = {'mode': mode, 'machine': host, 'config': config, **modes[mode]()}
if json:
    write_json(json, results)
