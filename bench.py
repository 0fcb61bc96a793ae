"""
Measure how fast the models are: side by side, rounds alternating, medians and spread.

Training steps of MHA and MLA, and beside them nanoGPT's, and ours without one of our optimisations:
$ python bench.py --mode=train --nanogpt=../nanoGPT --without=memory,fused,loss
$ python bench.py --mode=train --n_layer=6 --n_head=6 --n_embd=384 --vocab_size=65 --batch_size=64 --block_size=256
$ python bench.py --mode=train --profile=trace     # and what the time goes into: trace-MHA.json for chrome://tracing

Tokenizing, and gathering batches:
$ python bench.py --mode=data --text=FILE

Decoding, over context lengths and batch sizes, with MHA's cache, with MLA's latent cache and without any:
$ python bench.py --mode=sample
$ python bench.py --mode=sample --contexts=128,256,512,1024,2048,4096 --plot=assets/decode.png --json=sample.json

The same, and whole texts against nanoGPT's generate and Hugging Face's, on the same random weights:
$ python bench.py --mode=sample --nanogpt=../nanoGPT --huggingface=True

Whether something has become slower since another measurement (exit code 1):
$ python bench.py --mode=compare --files=before.json,after.json

Times are of random weights, on which they do not depend. Other programs on the machine disturb them: watch the spread.
"""

import contextlib
import functools
import gc
import importlib.util
import itertools
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from json import dump, load
from pathlib import Path

import numpy as np
import torch

from core import runtime, tokenizer
from core.dataset import TokenData, read_meta
from core.decoding import FixedStep
from core.runtime import UserError, whole_numbers
from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig

# ----------------------------------------------------------------------------------------------------------------------
mode = 'sample'  # what to measure: 'train', 'sample' or 'data'; 'compare' compares two measurements
json = ''  # a file for all numbers
rounds = 9  # of which medians and quartiles are given, after one round of warm-up
nanogpt = ''  # train, sample: folder of a nanoGPT checkout, to time it beside ours
# model: GPT-2's smallest, 124M
n_layer = 12
n_head = 12
n_embd = 768
vocab_size = 50304
n_latents = ''  # MLA models, by the size of their latents; '': C/2, and for sample C/4 and C/8 as well
# sample
contexts = '256,1024'  # tokens in the cache when a step is timed
batch_sizes = '1,8'
uncached_tokens = 4096  # without a cache, a step is timed up to this many tokens, sequences together: it is slow
new_tokens = 256  # length of the texts
prompt_tokens = 16
huggingface = False  # time transformers' GPT-2 beside ours
plot = ''  # a file for the picture of decoding time and cache size
# train
batch_size = 12
block_size = 1024
dropout = 0.0
bias = False
compile = 'auto'  # True, False, or on GPUs only
without = ''  # optimisations to leave out, each beside the rest: 'memory', 'fused', 'loss'
profile = ''  # train: a name for traces of one step of each model
serve = ''  # used by mode=train itself, for what needs a process of its own
# data
text = ''  # a text file to tokenize; without one, random words are made up
megabytes = 64  # of made-up words
# compare
files = ''  # two files that --json made
tolerance = 1.1  # how many times slower something may have become
# machine
device = 'auto'
dtype = 'auto'
threads = 0  # CPU threads; 0: the cores that this process may use
seed = 1337
exec(open('configurator.py').read())
# ----------------------------------------------------------------------------------------------------------------------

# ---- what all modes share --------------------------------------------------------------------------------------------


def synchronize():
    """Wait until the device has done all that it was asked to do."""
    if device.startswith('cuda'):
        torch.cuda.synchronize()


def timed(function, times=1):
    """Seconds of one of `times` calls. A function that returns a number is taken to do its work that many times."""
    synchronize()
    began = time.perf_counter()
    done = sum(function() or 1 for _ in range(times))
    synchronize()
    return (time.perf_counter() - began) / done


def alternate(contenders, rounds, turn=0.0):
    """
    Time functions {name: function} in alternating rounds, so that what the machine does besides hits all alike.

    Every other round runs backwards, since one contender's last memory is the next one's start. turn: seconds that a
    function is called for in its turn; of several calls the first is not counted, as it finds the caches full of
    another's data, and another's threads not asleep yet. Returns {name: seconds of each round}.
    """
    seconds, times = {name: [] for name in contenders}, {}
    for n in range(rounds + 1):
        for name in list(contenders)[:: 1 if n % 2 else -1]:
            function = contenders[name]
            if n == 0:  # warms up
                function()
                times[name] = math.ceil(turn / timed(function)) if turn else 1
            else:
                if times[name] > 1:
                    function()
                seconds[name].append(timed(function, times[name]))
    return seconds


def spread(values):
    """Median and quartiles of some seconds, as milliseconds."""
    low, middle, high = statistics.quantiles(values, n=4, method='inclusive') if len(values) > 1 else values * 3
    return {'ms': 1e3 * middle, 'ms_quartiles': [1e3 * low, 1e3 * high]}


def peak_bytes(function):
    """The most memory that `function` holds at once, above what was there before (weights, for instance)."""
    if device.startswith('cuda'):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler talks about itself otherwise
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == '[memory]':
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def print_table(rows, columns):
    """Print dicts as a Markdown table on stdout. columns: {heading: function of a row -> str}."""
    print('| ' + ' | '.join(columns) + ' |\n|' + '---|' * len(columns))
    for row in rows:
        print('| ' + ' | '.join(column(row) for column in columns.values()) + ' |', flush=True)
    print()


def machine():
    """What the numbers were measured on: a dict."""
    name = torch.cuda.get_device_name(device) if device.startswith('cuda') else cpu_name()
    return {'device': name, 'threads': torch.get_num_threads(), 'dtype': dtype, 'torch': torch.__version__}


def peak_flops():
    """FLOP/s that the device can do in matrix products: by its data sheet, or on a CPU the best of a few large ones."""
    if device != 'cpu':
        return runtime.peak_flops(device, dtype)
    a, b = (torch.ones(2048, 2048, dtype=runtime.DTYPES[dtype]) for _ in range(2))

    def product():
        torch.mm(a, b)

    return 2 * 2048**3 / min(timed(product) for _ in range(8))


def cpu_name():
    """The processor's name, where the system tells it."""
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            return next(line.split(':')[1].strip() for line in file if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def build(model_class, config_class, **settings):
    """A model with random weights."""
    sizes = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=vocab_size)
    try:
        config = config_class(**sizes, **settings)
    except ValueError as error:
        raise UserError(str(error)) from error
    return model_class(config, seed=seed).to(device)


def build_all(shares, **settings):
    """MHA, and MLA of the latent sizes asked for, or of these shares of n_embd: {name: model}."""
    sizes = whole_numbers(n_latents, 'n_latents') or [n_embd // share for share in shares]
    models = {'MHA': build(GPT, GPTConfig, **settings)}
    return models | {f'MLA, r={r}': build(MLAGPT, MLAConfig, n_latent=r, **settings) for r in sizes}


def nanogpt_module():
    """nanoGPT's model.py, imported from the folder that --nanogpt names. UserError if it is not there."""
    file = os.path.join(nanogpt, 'model.py')
    if not os.path.isfile(file):
        raise UserError(f'there is no {file}; --nanogpt names the folder of a nanoGPT checkout')
    spec = importlib.util.spec_from_file_location('nanogpt_model', file)
    module = sys.modules['nanogpt_model'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- mode=train ------------------------------------------------------------------------------------------------------


class Training:
    """Training steps of one model on random tokens, as train.py takes them."""

    def __init__(self, model, folder, leave_out=''):
        """folder: the tokens' data set. leave_out: an optimisation of WITHOUT to do without."""
        self.model, self.data, self.iteration = model.train(), TokenData(folder, block_size), 0
        self.optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.split(':')[0])
        if leave_out == 'fused':
            groups = [{k: group[k] for k in ('params', 'weight_decay')} for group in self.optimizer.param_groups]
            self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
        self.call = torch.compile(model) if compile else model
        self.logits = leave_out == 'loss'

    def run(self):
        """One step."""
        x, y = self.data.batch(seed, self.iteration, batch_size, slice(0, batch_size))
        if device.startswith('cuda'):
            x, y = x.pin_memory(), y.pin_memory()
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        with runtime.autocast(device, dtype):
            loss = self.call(x, y, logits=self.logits)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.iteration += 1


def batch_by_row(tokens):
    """A random batch (x, y), gathered as nanoGPT does: row by row, each read, converted and stacked."""
    starts = torch.randint(len(tokens) - block_size, (batch_size,)).tolist()
    rows = [tokens[i : i + block_size + 1].astype(np.int64) for i in starts]
    return (torch.stack([torch.from_numpy(row[part]) for row in rows]) for part in (slice(-1), slice(1, None)))


class NanoGPTTraining:
    """The same steps by nanoGPT's model and optimizer, as its train.py takes them; on a CPU it never casts."""

    def __init__(self, folder):
        module = nanogpt_module()
        config = module.GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias)
        with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):  # it announces its size
            self.model = module.GPT(config).to(device)
            self.optimizer = self.model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.split(':')[0])
        self.tokens = np.memmap(os.path.join(folder, 'train.bin'), dtype=np.uint16, mode='r')
        self.call = torch.compile(self.model) if compile else self.model
        self.autocast = runtime.autocast(device, dtype if device.startswith('cuda') else 'float32')

    def run(self):
        x, y = batch_by_row(self.tokens)
        with self.autocast:
            loss = self.call(x.to(device), y.to(device))[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Elsewhere:
    """A contender's steps in a process of its own: what it does to memory and libraries would touch the others."""

    def __init__(self, name, folder):
        keys = dict(config, mode='train', serve=name, device=device, dtype=dtype, compile=compile, text=folder, json='')
        arguments = [f'--{key}={value}' for key, value in keys.items()]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        pipes['env'] = dict(os.environ, RANK='1')  # so that it leaves talking to this process
        self.name, self.process = name, subprocess.Popen([sys.executable, sys.argv[0], *arguments], **pipes)
        self.ask('peak')  # and so wait until it is ready

    def ask(self, what):
        """Its answer, a number, to 'step' (take one) or 'peak' (bytes of the most memory one holds)."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(what + '\n')
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise UserError(f'{self.name} could not be measured; its own message is above')
        return float(answer)

    def run(self):
        self.ask('step')


def serve_steps():
    """The other end of Elsewhere: answer on stdout what is asked on stdin, until that is closed."""
    if serve == 'nanoGPT':
        training = NanoGPTTraining(text)
    else:
        leave_out = serve.removeprefix('MHA without ')
        training = Training(build(GPT, GPTConfig, **train_settings()), text, leave_out)
        if device == 'cpu' and leave_out != 'memory':
            runtime.keep_freed_memory()
    training.run()
    for line in sys.stdin:
        answer = peak_bytes(training.run) if line.strip() == 'peak' else training.run() or 0
        synchronize()
        print(answer, flush=True)
    sys.exit(0)


def train_settings():
    return dict(block_size=block_size, dropout=dropout, bias=bias)


def trace(name, function):
    """Write a trace of `function` for chrome://tracing, and say what took longest."""
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')
    with torch.profiler.profile() as found:  # of all devices there are
        function()
        synchronize()
    path = f'{profile}-{name.replace(", ", "-").replace("=", "")}.json'
    found.export_chrome_trace(path)
    by = 'self_device_time_total' if device.startswith('cuda') else 'self_cpu_time_total'
    longest = sorted(found.key_averages(), key=lambda event: -getattr(event, by))
    total = sum(getattr(event, by) for event in longest)
    shares = ', '.join(f'{event.key.removeprefix("aten::")} {getattr(event, by) / total:.0%}' for event in longest[:8])
    runtime.notice(f'{name}: {shares}; all of it in {path}')


def bench_train():
    """Training steps of MHA and MLA, and of what was asked for beside them. Returns the numbers as a dict."""
    parts = [part for part in without.split(',') if part]
    if unknown := set(parts) - set(WITHOUT):
        raise UserError(f'without has {", ".join(unknown)}; it knows {", ".join(WITHOUT)}')
    if min(batch_size, block_size) < 1:
        raise UserError('batch_size and block_size must be at least 1')
    if device == 'cpu':
        runtime.keep_freed_memory()
    models = build_all((2,), **train_settings())
    flops = {name: model.flops_per_token() for name, model in models.items()}
    with tempfile.TemporaryDirectory() as folder:
        ids, size = min(vocab_size, tokenizer.GPT2_VOCAB), max(2**20, 2 * block_size)
        random = np.random.default_rng(seed).integers(ids, size=size, dtype=np.uint16)
        for split in ('train', 'val'):
            random.tofile(os.path.join(folder, f'{split}.bin'))
        contenders = {name: Training(model, folder) for name, model in models.items()}
        for name in ['nanoGPT'] * bool(nanogpt) + [f'MHA without {part}' for part in parts]:
            contenders[name] = Elsewhere(name, folder)
        on = ', '.join(f'{k}: {v}' for k, v in (machine() | {'compiled': compile}).items())
        peak = peak_flops()
        rate = f'{peak / 1e12:.3g} TFLOP/s' if peak else 'unknown'
        print(f'{on}; {n_layer} layers, C={n_embd}, batch {batch_size} x {block_size}, dropout {dropout}')
        print(f'peak rate of matrix products, to which MFU refers: {rate}\n')
        seconds = alternate({name: contender.run for name, contender in contenders.items()}, rounds, turn=0.5)
        rows = []
        for name, contender in contenders.items():
            row = {'name': name, **spread(seconds[name])}
            row['peak_bytes'] = contender.ask('peak') if isinstance(contender, Elsewhere) else peak_bytes(contender.run)
            row['tokens_per_s'] = 1e3 * batch_size * block_size / row['ms']
            row['flops_per_s'] = flops.get(name, flops['MHA']) * row['tokens_per_s']
            row['mfu'] = row['flops_per_s'] / peak if peak else None
            rows.append(row)
        for row in rows:
            row['of_mha'] = row['ms'] / rows[0]['ms']
            if nanogpt:
                row['speed_of_nanogpt'] = next(r['ms'] for r in rows if r['name'] == 'nanoGPT') / row['ms']
        columns = {
            'training step of': lambda row: row['name'],
            'ms (quartiles)': ms_text,
            'tokens/s': lambda row: f'{row["tokens_per_s"]:,.0f}',
            'time, of MHA': lambda row: f'{row["of_mha"]:.3f}',
            'speed, of nanoGPT': lambda row: f'{row["speed_of_nanogpt"]:.2f}' if nanogpt else 'n/a',
            'TFLOP/s': lambda row: f'{row["flops_per_s"] / 1e12:.3f}',
            'MFU': lambda row: f'{row["mfu"]:.1%}' if row['mfu'] else 'n/a',
            'peak MiB': lambda row: f'{row["peak_bytes"] / 2**20:,.0f}',
        }
        print_table(rows, columns)
        if profile:
            for name in models:
                trace(name, contenders[name].run)
        for contender in contenders.values():
            if isinstance(contender, Elsewhere):
                contender.process.stdin.close()
                contender.process.wait()
    return {'steps': rows, 'peak_flops': peak}


WITHOUT = {
    'memory': 'memory that is freed goes back to the system',
    'fused': 'AdamW as a loop over tensors',
    'loss': 'all logits at once',
}


# ---- mode=sample -----------------------------------------------------------------------------------------------------


class Decoding:
    """Decoding steps of one model at a fixed context: every step writes the same last place of its cache."""

    def __init__(self, model, batch_size, context):
        self.model, self.context = model, context
        self.cache = model.init_cache(batch_size, context)
        self.token = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        self.step = functools.partial(model, cache=self.cache)
        if device.startswith('cuda'):
            self.cache.length = context - 1
            self.step = FixedStep(model, self.cache)

    def run(self, times=4):
        """Take `times` steps, and return that number."""
        for _ in range(times):
            self.cache.length = self.context - 1
            self.step(self.token)
        return times

    def run_attention(self, times=4):
        """The attention layers of a step alone, projections included, one after another and never captured."""
        self.cache.length = self.context - 1
        x = torch.ones(self.token.size(0), 1, n_embd, device=device)
        for _ in range(times):
            for block in self.model.transformer.h:
                block.attn(x, cache=self.cache)
        return times


def measure_steps(models, batch_size, context):
    """One row for each model, and for MHA without a cache, at one batch size and context length."""
    decodings = {name: Decoding(model, batch_size, context) for name, model in models.items()}
    seconds = alternate({name: decoding.run for name, decoding in decodings.items()}, rounds)
    attention = alternate({name: decoding.run_attention for name, decoding in decodings.items()}, rounds)
    rows = []
    for name, decoding in decodings.items():
        sizes = {'bytes_per_token': decoding.cache.bytes_per_token, 'cache_bytes': decoding.cache.nbytes}
        rows.append({'name': name, **spread(seconds[name]), 'attention': spread(attention[name]), **sizes})
    del decodings, decoding  # their memory
    for row in rows:
        row['peak_bytes'] = peak_bytes(lambda name=row['name']: Decoding(models[name], batch_size, context).run(1))
    if batch_size * context <= uncached_tokens:
        idx = torch.zeros(batch_size, context, dtype=torch.int64, device=device)
        times = alternate({'uncached': lambda: models['MHA'](idx) and None}, min(3, rounds))['uncached']
        row = {'name': 'MHA, no cache', **spread(times), 'bytes_per_token': 0, 'cache_bytes': 0}
        rows.append(row | {'peak_bytes': peak_bytes(lambda: models['MHA'](idx))})
    for row in rows:
        if 'attention' in row:
            row['attention']['of_mha'] = row['attention']['ms'] / rows[0]['attention']['ms']
        row |= {'batch_size': batch_size, 'context': context, 'tokens_per_s': 1e3 * batch_size / row['ms']}
        row['of_mha'] = row['ms'] / rows[0]['ms']
    return rows


def measure_texts(models):
    """Rows for whole texts of `new_tokens` tokens: ours, and those of the other programs that were asked for."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(vocab_size, (1, prompt_tokens), generator=generator).to(device)
    rules = dict(temperature=1.0, top_k=200)  # the same for all
    contenders = {name: lambda m=m: m.generate(prompt, new_tokens, **rules) for name, m in models.items()}
    if nanogpt:
        theirs = nanogpt_model(models['MHA'], prompt)
        contenders['nanoGPT'] = lambda: theirs.generate(prompt, new_tokens, **rules)
    if huggingface:
        hf_model = huggingface_model(models['MHA'], prompt)
        mask = torch.ones_like(prompt)
        lengths = dict(max_new_tokens=new_tokens, pad_token_id=0, use_cache=True)
        contenders['Hugging Face, cached'] = lambda: hf_model.generate(
            prompt, attention_mask=mask, do_sample=True, top_p=1.0, **rules, **lengths
        )
    seconds = alternate({name: lambda f=f: f() is None for name, f in contenders.items()}, min(3, rounds))
    rows = [{'name': name, **spread(times)} for name, times in seconds.items()]
    for row in rows:
        row['tokens_per_s'] = 1e3 * new_tokens / row['ms']
        row['of_mha'] = row['ms'] / rows[0]['ms']
    return rows


def check_same(logits, expected, name):
    """Stop where another program's model does not compute what ours does: the comparison would mean nothing."""
    if (logits - expected).abs().max() > 1e-2 * expected.abs().max():
        raise RuntimeError(f'{name} gives other logits for the same weights')


def nanogpt_model(ours, prompt):
    """nanoGPT's model with the weights of ours, from its own model.py."""
    module = nanogpt_module()
    names = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'bias', 'dropout')
    with contextlib.redirect_stdout(sys.stderr):  # it announces its size
        theirs = module.GPT(module.GPTConfig(**{name: getattr(ours.config, name) for name in names})).eval().to(device)
    theirs.load_state_dict(ours.state_dict())
    check_same(theirs(prompt)[0], ours(prompt)[0], 'nanoGPT')
    return theirs


def huggingface_model(ours, prompt):
    """transformers' GPT-2 with the weights of ours."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise UserError('--huggingface needs transformers: pip install transformers') from None
    sizes = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=vocab_size)
    # without an end-of-text token, which would cost it a step of processing of its own for every token
    settings = dict(
        n_positions=ours.config.block_size, activation_function='gelu', bos_token_id=None, eos_token_id=None
    )
    hf_config = GPT2Config(**sizes, **settings)
    theirs = GPT2LMHeadModel(hf_config).eval().to(device)
    transposed = ('c_attn.weight', 'c_fc.weight', 'c_proj.weight')  # OpenAI's layers hold (in, out)
    theirs.load_state_dict({k: v.t() if k.endswith(transposed) else v for k, v in ours.state_dict().items()})
    check_same(theirs(prompt).logits[:, -1:], ours(prompt)[0], 'transformers')
    return theirs


def draw_plot(rows, file):
    """Decoding time for each batch size, and cache size, over context length. Readable in grey."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    names = [name for name in dict.fromkeys(row['name'] for row in rows) if name != 'MHA, no cache']
    sizes = sorted({row['batch_size'] for row in rows})
    lines = zip(names, 'os^Dv*' * len(names), ['-', '--', '-.', ':'] * len(names), strict=False)
    looks = {
        name: dict(color=str(0.6 * i / len(names)), marker=marker, linestyle=line)
        for i, (name, marker, line) in enumerate(lines)
    }
    figure, axes = plt.subplots(1, len(sizes) + 1, figsize=(4.2 * (len(sizes) + 1), 3.8), layout='constrained')
    for name in names:
        for axis, size in zip(axes, sizes, strict=False):
            own = [row for row in rows if row['name'] == name and row['batch_size'] == size]
            x, low, high = [r['context'] for r in own], *zip(*(r['ms_quartiles'] for r in own), strict=True)
            axis.plot(x, [row['ms'] for row in own], label=name, **looks[name])
            axis.fill_between(x, low, high, color=looks[name]['color'], alpha=0.15, linewidth=0)
            axis.set(title=f'{size} sequence{"s" * (size > 1)} at once', ylabel='time for one step (ms)')
        own = [row for row in rows if row['name'] == name and row['batch_size'] == sizes[0]]
        axes[-1].plot([r['context'] for r in own], [r['cache_bytes'] / sizes[0] / 2**20 for r in own], **looks[name])
    axes[-1].set(title='the cache of one sequence', ylabel='memory (MiB)')
    for axis in axes:
        axis.set(xlabel='context (tokens)', ylim=(0, None), xlim=(0, None))
        axis.grid(color='0.9')
        axis.spines[['top', 'right']].set_visible(False)
    axes[0].legend(frameon=False)
    on = machine()
    setting = f'{on["device"]}, {on["threads"]} threads, {dtype}, {n_layer} layers of {n_embd}'
    figure.suptitle(setting, fontsize='medium')
    os.makedirs(os.path.dirname(file) or '.', exist_ok=True)
    figure.savefig(file, dpi=120)


def bench_sample():
    """Decoding steps over context and batch size, then whole texts. Returns the numbers as a dict."""
    lengths, sizes = whole_numbers(contexts, 'contexts'), whole_numbers(batch_sizes, 'batch_sizes')
    longest = max(*lengths, prompt_tokens + new_tokens)
    models = {name: model.eval() for name, model in build_all((2, 4, 8), block_size=longest).items()}
    print(f'{", ".join(f"{k}: {v}" for k, v in machine().items())}\n')
    steps, texts = [], []
    with torch.no_grad(), runtime.autocast(device, dtype):
        for batch_size in sizes:
            for context in lengths:
                runtime.notice(f'steps of {batch_size} sequences at {context} tokens')
                steps += measure_steps(models, batch_size, context)
        step_columns = {
            'B': lambda row: str(row['batch_size']),
            'T': lambda row: str(row['context']),
            'model': lambda row: row['name'],
            'ms per step (quartiles)': ms_text,
            'of MHA': lambda row: f'{row["of_mha"]:.2f}',
            'attention alone': lambda row: ms_text(row['attention']) if 'attention' in row else '',
            "of MHA's": lambda row: f'{row["attention"]["of_mha"]:.2f}' if 'attention' in row else '',
            'tokens/s': lambda row: f'{row["tokens_per_s"]:.1f}',
            'cache bytes per token': lambda row: f'{row["bytes_per_token"]:,}',
            'cache MiB': lambda row: f'{row["cache_bytes"] / 2**20:.1f}',
            'peak MiB': lambda row: f'{row["peak_bytes"] / 2**20:.1f}',
        }
        print_table(steps, step_columns)
        if new_tokens > 0:
            runtime.notice(f'texts of {new_tokens} tokens')
            texts = measure_texts(models)
            text_columns = {
                f'{new_tokens} tokens by': lambda row: row['name'],
                'tokens/s': lambda row: f'{row["tokens_per_s"]:.1f}',
                'ms in all (quartiles)': ms_text,
                'of MHA': lambda row: f'{row["of_mha"]:.2f}',
            }
            print_table(texts, text_columns)
    if plot:
        draw_plot(steps, plot)
    return {'steps': steps, 'texts': texts}


def ms_text(row):
    """'12.3 (12.1 to 12.9)'."""
    low, high = row['ms_quartiles']
    return f'{row["ms"]:.1f} ({low:.1f} to {high:.1f})'


# ---- mode=data -------------------------------------------------------------------------------------------------------


def made_up_words(path):
    """Write `megabytes` of random words, whose frequencies fall as a language's do (Zipf), to `path`."""
    rng = np.random.default_rng(seed)
    letters = np.array(list('etaoinshrdlucmfwypvbgkjqxz'))
    words = [''.join(rng.choice(letters, size)) for size in rng.integers(1, 12, size=20000)]
    with open(path, 'w', encoding='utf-8') as file:
        while file.tell() < megabytes * 1e6:
            line = rng.zipf(1.2, size=200000) % len(words)
            file.write(' '.join(words[i] for i in line) + '\n')


def most_memory(process):
    """
    Wait for a process, and return the most memory that it and its children held together, in bytes.

    Shared pages count once. None where the system does not tell (it is Linux that does).
    """
    most = None
    while process.poll() is None:
        total, waiting = 0, [process.pid]
        while waiting:
            pid = waiting.pop()
            with contextlib.suppress(OSError, ValueError):
                with open(f'/proc/{pid}/smaps_rollup', encoding='ascii') as file:
                    total += next(int(line.split()[1]) << 10 for line in file if line.startswith('Pss:'))
                with open(f'/proc/{pid}/task/{pid}/children', encoding='ascii') as file:
                    waiting += file.read().split()
        most = max(most or 0, total) or None
        time.sleep(0.05)
    return most


def measure_tokenizing(path, folder):
    """One row for each tokenizer: data/text/prepare.py on all of a file."""
    rows = []
    for tokenizer in ('char', 'byte', 'bpe', 'gpt2'):
        to = os.path.join(folder, tokenizer)
        script = os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), 'data', 'text', 'prepare.py')
        command = [sys.executable, script, f'--input={path}', f'--out_dir={to}', f'--tokenizer={tokenizer}']
        runtime.notice(f'tokenizing by {tokenizer}')
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        memory = most_memory(process)
        seconds = time.perf_counter() - began
        if process.returncode:
            runtime.notice(process.stderr.read().strip())
            continue
        count = sum(read_meta(Path(to))['tokens'].values())
        row = {'name': f'tokenize, {tokenizer}', 'ms': 1e3 * seconds, 'tokens': count, 'peak_bytes': memory}
        rows.append(row | {'tokens_per_s': count / seconds, 'bytes_per_s': os.path.getsize(path) / seconds})
    return rows


def measure_batches(folder):
    """Gathering a batch: ours, in one vectorised read, and row by row as nanoGPT does."""
    data, tokens = TokenData(folder, block_size), np.memmap(os.path.join(folder, 'train.bin'), np.uint16, 'r')
    iteration = itertools.count()

    def ours():
        for _ in range(20):
            data.batch(seed, next(iteration), batch_size, slice(0, batch_size))
        return 20

    def by_row():
        for _ in range(20):
            x, y = batch_by_row(tokens)
        return 20

    seconds = alternate({'batch, ours': ours, 'batch, row by row': by_row}, rounds)
    return [{'name': name, **spread(times)} for name, times in seconds.items()]


def bench_data():
    """Tokenizing by each tokenizer, and gathering batches. Returns the numbers as a dict."""
    if text and not os.path.isfile(text):
        raise UserError(f'there is no file {text}; --text names a text file, or is left out')
    if min(batch_size, block_size, megabytes) < 1:
        raise UserError('batch_size, block_size and megabytes must be at least 1')
    with tempfile.TemporaryDirectory() as folder:
        path = text or os.path.join(folder, 'words.txt')
        if not text:
            made_up_words(path)
        print(f'{os.path.getsize(path) / 1e6:.1f} MB of text, {runtime.available_cores()} cores\n')
        tokenizing = measure_tokenizing(path, folder)
        columns = {
            'tokenizer': lambda row: row['name'].split()[-1],
            'tokens': lambda row: f'{row["tokens"]:,}',
            'seconds, start to end': lambda row: f'{row["ms"] / 1e3:.1f}',
            'tokens/s': lambda row: f'{row["tokens_per_s"]:,.0f}',
            'MB/s': lambda row: f'{row["bytes_per_s"] / 1e6:.1f}',
            'peak MiB, all processes': lambda row: f'{row["peak_bytes"] / 2**20:,.0f}' if row['peak_bytes'] else 'n/a',
        }
        print_table(tokenizing, columns)
        batches = measure_batches(os.path.join(folder, 'byte'))
        heading = f'a batch of {batch_size} x {block_size}'
        print_table(batches, {heading: lambda row: row['name'].split(', ')[1], 'ms (quartiles)': ms_text})
    return {'tokenizing': tokenizing, 'batches': batches}


# ---- mode=compare ----------------------------------------------------------------------------------------------------


def rows_of(path):
    """The timed rows of a file that --json made: {what was timed: milliseconds}."""
    try:
        with open(path, encoding='utf-8') as file:
            found = load(file)
        rows = [row for part in found.values() if isinstance(part, list) for row in part]
        return {' '.join(str(row[k]) for k in ('name', 'batch_size', 'context') if k in row): row['ms'] for row in rows}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} can't be read as a measurement ({error}); name a file that --json made") from error


def compare():
    """Print how two measurements differ; exit code 1 where something has become slower than `tolerance` allows."""
    paths = files.split(',')
    if len(paths) != 2:
        raise UserError(f"files is '{files}'; it must be two files that --json made, such as before.json,after.json")
    before, after = (rows_of(path) for path in paths)
    rows = [{'name': name, 'before': before[name], 'after': after[name]} for name in before if name in after]
    if not rows:
        raise UserError(f'{paths[0]} and {paths[1]} have timed nothing in common')
    columns = {
        'name': lambda row: row['name'],
        'ms before': lambda row: f'{row["before"]:.2f}',
        'ms after': lambda row: f'{row["after"]:.2f}',
        'after / before': lambda row: f'{row["after"] / row["before"]:.3f}',
    }
    print_table(rows, columns)
    slower = [row['name'] for row in rows if row['after'] > tolerance * row['before']]
    if slower:
        print(f'slower by more than {tolerance:g} times: {"; ".join(slower)}', file=sys.stderr)
    sys.exit(1 if slower else 0)


# ---- the work --------------------------------------------------------------------------------------------------------
modes = {'train': bench_train, 'sample': bench_sample, 'data': bench_data, 'compare': compare}
if mode not in modes:
    raise UserError(f"mode is '{mode}'; it must be {', '.join(modes)}")
if rounds < 1 or vocab_size > 2**16:
    raise UserError(f'rounds is {rounds} and vocab_size {vocab_size}; they must be at least 1, and at most 65536')
if compile not in ('auto', True, False):
    raise UserError(f"compile is '{compile}'; it must be True, False or auto")
device = runtime.pick_device(device)
dtype = runtime.pick_dtype(dtype, device, n_embd)
compile = device.startswith('cuda') if compile == 'auto' else compile
runtime.set_threads(threads)
torch.set_float32_matmul_precision('high')  # TF32 for what stays float32 on a GPU
if serve:
    serve_steps()
results = {'mode': mode, 'machine': machine(), 'config': config, **modes[mode]()}
if json:
    with open(json, 'w', encoding='utf-8') as file:
        dump(results, file, indent=1)
