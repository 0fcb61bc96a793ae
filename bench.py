"""
Measure how fast the models are: side by side in one process, rounds alternating, medians and spread.

Decoding, over context lengths and batch sizes, with MHA's cache, with MLA's latent cache and without any:
$ python bench.py --mode=sample
$ python bench.py --mode=sample --contexts=128,256,512,1024,2048,4096 --plot=assets/decode.png --json=sample.json

The same, and whole texts against nanoGPT's generate and Hugging Face's, on the same random weights:
$ python bench.py --mode=sample --nanogpt=../nanoGPT --huggingface=True

Times are of random weights, on which they do not depend. Other programs on the machine disturb them: watch the spread.
"""

import contextlib
import functools
import gc
import importlib.util
import os
import platform
import statistics
import sys
import time
from json import dump

import torch

import runtime
from model import GPT, FixedStep, GPTConfig
from model_mla import MLAGPT, MLAConfig
from runtime import UserError

# ----------------------------------------------------------------------------------------------------------------------
mode = 'sample'  # what to measure: 'sample'
json = ''  # a file for all numbers
rounds = 9  # of which medians and quartiles are given, after one round of warm-up
# model: GPT-2's smallest, 124M
n_layer = 12
n_head = 12
n_embd = 768
vocab_size = 50304
n_latents = '384,192,96'  # MLA models, by the size of their latents
# sample
contexts = '256,1024'  # tokens in the cache when a step is timed
batch_sizes = '1,8'
uncached_tokens = 4096  # without a cache, a step is timed up to this many tokens, sequences together: it is slow
new_tokens = 256  # length of the texts
prompt_tokens = 16
nanogpt = ''  # folder of a nanoGPT checkout, to time its generate beside ours
huggingface = False  # time transformers' GPT-2 beside ours
plot = ''  # a file for the picture of decoding time and cache size
# machine
device = 'auto'
dtype = 'auto'
threads = 0  # CPU threads; 0: the cores that this process may use
seed = 1337
exec(open('configurator.py').read())
# ----------------------------------------------------------------------------------------------------------------------

# ---- what all modes share --------------------------------------------------------------------------------------------


def numbers(text, key):
    """The whole numbers in '1,8'. UserError where there are none."""
    try:
        values = [int(part) for part in text.split(',')]
    except ValueError:
        values = [0]
    if min(values) < 1:
        raise UserError(f"{key} is '{text}'; it must be whole numbers above 0 with commas between, such as 1,8")
    return values


def synchronize():
    """Wait until the device has done all that it was asked to do."""
    if device.startswith('cuda'):
        torch.cuda.synchronize()


def alternate(contenders, rounds):
    """
    Time functions {name: function} in alternating rounds, so that what the machine does besides hits all alike.

    Every other round runs backwards, since one contender's last memory is the next one's start. Returns {name: seconds
    of each round}; a function that returns a number is taken to have done its work that many times.
    """
    seconds = {name: [] for name in contenders}
    for n in range(rounds + 1):
        for name in list(contenders)[:: 1 if n % 2 else -1]:
            synchronize()
            began = time.perf_counter()
            times = contenders[name]() or 1
            synchronize()
            if n > 0:  # the first round warms up
                seconds[name].append((time.perf_counter() - began) / times)
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


def cpu_name():
    """The processor's name, where the system tells it."""
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            return next(line.split(':')[1].strip() for line in file if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def build(model_class, config_class, **settings):
    """A model with random weights, ready to decode."""
    sizes = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=vocab_size)
    try:
        config = config_class(**sizes, **settings)
    except ValueError as error:
        raise UserError(str(error)) from error
    return model_class(config, seed=seed).eval().to(device)


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
    """nanoGPT's model with the weights of ours, from its own model.py. UserError if that is not there."""
    file = os.path.join(nanogpt, 'model.py')
    if not os.path.isfile(file):
        raise UserError(f'there is no {file}; --nanogpt names the folder of a nanoGPT checkout')
    spec = importlib.util.spec_from_file_location('nanogpt_model', file)
    module = sys.modules['nanogpt_model'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
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
    lengths, sizes = numbers(contexts, 'contexts'), numbers(batch_sizes, 'batch_sizes')
    block_size = max(*lengths, prompt_tokens + new_tokens)
    models = {'MHA': build(GPT, GPTConfig, block_size=block_size)}
    for r in numbers(n_latents, 'n_latents'):
        models[f'MLA, r={r}'] = build(MLAGPT, MLAConfig, block_size=block_size, n_latent=r)
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


# ---- the work --------------------------------------------------------------------------------------------------------
modes = {'sample': bench_sample}
if mode not in modes:
    raise UserError(f"mode is '{mode}'; it must be {' or '.join(modes)}")
if rounds < 1:
    raise UserError(f'rounds is {rounds}; it must be at least 1')
device = runtime.pick_device(device)
dtype = runtime.pick_dtype(dtype, device, n_embd)
runtime.set_threads(threads)
torch.set_float32_matmul_precision('high')  # TF32 for what stays float32 on a GPU
results = {'mode': mode, 'machine': machine(), 'config': config, **modes[mode]()}
if json:
    with open(json, 'w', encoding='utf-8') as file:
        dump(results, file, indent=1)
