"""
Everything that needs a GPU, in one command: the tests, then speed, memory and short trainings, beside nanoGPT's.

$ python studies/gpu.py                        # 20 to 30 minutes on an H100; sizes follow the GPU's memory
$ python studies/gpu.py --rehearse             # every part on a CPU, in miniature: shows that the parts run
$ python studies/gpu.py --parts=decode,texts   # some of them
$ python studies/gpu.py --minutes=9 --parts=muon,attention,kernel,cells    # what is most wanted, in nine minutes

Needs what a CUDA image with PyTorch, transformers, tiktoken and matplotlib has; no network where --input names a text.
Without pytest the tests are left out, and without a nanoGPT checkout its rows are.

Every part is a few commands of this repository with a time limit of its own. After each one gpu.json and gpu.md in
out_dir hold what has been measured until then, and pictures lie beside them; where $OUT is a folder, these are copied
there too. A part that is done is kept, and so is each command that wrote its .json: repeat the command to continue, or
delete gpu.json to measure again. The last part trains for whatever time is left. Run it from the
repository root.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from core.cli.keys import begin

begin(__file__)  # before the slow imports

import contextlib
import glob
import importlib.util
import itertools
import math
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass

import torch

from analysis import report
from core.cli import arguments, errors
from core.cli.errors import UserError
from core.speed import gpus, timing
from studies.measure import read_json

# ----------------------------------------------------------------------------------------------------------------------
out_dir = 'out-gpu'
parts = ''  # the parts to run, separated by commas; '': all
rehearse = False  # on a CPU, in miniature
nanogpt = ''  # folder of a nanoGPT checkout; '': ../nanoGPT where that is one
input = ''  # text of the Shakespeare part, where its data are not prepared; '': the plays, by a download
minutes = 30.0  # for all parts together
iterations = 0  # of the last part's trainings, if the time suffices; 0: a million, in a rehearsal 20
exec(open(Path(__file__).resolve().parents[1] / 'configurator.py', encoding='utf-8').read())
# ----------------------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]
LATENTS = (32, 16) if rehearse else (384, 192)  # C/2 and C/4
LONGEST = (2, 32) if rehearse else (64, 16384)  # a batch and a context
AFTERWARDS = 20 if rehearse else 240  # seconds of the last part for what follows its trainings
LEAST = 5 if rehearse else 360  # seconds without which the last part isn't worth its start
# what a rehearsal sets instead: keys of bench.py, of trainings, and of what prepares their data and reads them
SMALL_BENCH = dict(n_layer=1, n_head=4, n_embd=64, vocab_size=300, device='cpu', dtype='float32', rounds=1, threads=1)
SMALL_BENCH |= dict(batch_size=2, block_size=32, n_kv_heads='2,1', n_latents='32,16', contexts='8,32', new_tokens=8)
SMALL_BENCH |= dict(prompt_tokens=4, most=4, compile=False)
SMALL_RUN = dict(n_layer=1, n_head=2, n_embd=32, block_size=32, batch_size=4, device='cpu', threads=1, compile=False)
SMALL_RUN |= dict(eval_interval=10, eval_iters=2, warmup_iters=2, lr_decay_iters=20, max_iters=iterations or 20)
SMALL_RUN['keep_checkpoints'] = 10
SMALL_MLA = dict(SMALL_RUN, n_latent=16)
SMALL_DATA = dict(vocab_size=512, megabytes=1)
SMALL_COMPARISON = dict(device='cpu', windows=8, batch_size=4, sample_tokens=8)
SMALL_ANALYSIS = dict(sequences=8, length=8, controls=2, resamples=100, ablate_sequences=2, text_windows=2)
SMALL_ANALYSIS |= dict(device='cpu', threads=1, html=False)
SMALL_KERNEL = dict(batch_sizes='1,2', contexts='40', n_latents='24', device='cpu', rounds=1)
PACKAGES = ('torch', 'numpy', 'transformers', 'datasets', 'matplotlib', 'tqdm')


@dataclass
class Part:
    """Commands that are run one after the other, each a list of arguments; `seconds` is the limit of all of them."""

    title: str
    seconds: float  # 0: whatever is left
    commands: list


# ---- the parts -------------------------------------------------------------------------------------------------------


def path(name):
    """A file of out_dir, absolute."""
    return os.path.abspath(os.path.join(out_dir, name))


def command(script, small, *configs, **keys):
    """A command; in a rehearsal with the keys `small`."""
    keys |= small if rehearse else {}
    return [sys.executable, script, *configs, *(f'--{key}={value}' for key, value in keys.items())]


def bench(name, **keys):
    """A command of bench.py that writes NAME.json."""
    return command('bench.py', SMALL_BENCH, **keys, json=path(f'{name}.json'))


def pair(name, *configs, **keys):
    """The commands that train MHA and MLA, each where it was stopped, and compare them."""
    mha, mla = path(f'{name}-mha'), path(f'{name}-mla')
    both = dict(runs=f'{mha},{mla}', out_dir=path(f'{name}-mha-and-mla'), data_dir=keys['data_dir'])
    return [
        command('train.py', SMALL_RUN, *configs[:1], out_dir=mha, **keys, resume='auto'),
        command('train_mla.py', SMALL_MLA, *configs[1:], out_dir=mla, **keys, resume='auto'),
        command('compare.py', SMALL_COMPARISON, **both),
    ]


def all_parts():
    """{name: Part}, in the order in which they run."""
    memory = 0 if rehearse else torch.cuda.get_device_properties(0).total_memory
    batch = next((size for size, least in ((32, 70e9), (16, 38e9), (8, 20e9)) if memory > least), 4)
    gpu = None if rehearse else gpus.gpu_of('cuda')
    where = gpu.name if gpu else 'a CPU' if rehearse else 'this device'
    small, large = ('a miniature', 'a miniature') if rehearse else ('124M', '350M')
    theirs = dict(nanogpt=nanogpt) if nanogpt else {}
    latents = dict(n_latents=','.join(map(str, LATENTS)))
    models = dict(n_kv_heads='4,1', **latents)
    step = dict(mode='train', batch_size=batch, block_size=1024)
    medium = dict(step, batch_size=max(1, batch // 2), n_layer=24, n_head=16, n_embd=1024)
    decode = dict(models, mode='sample', contexts='128,1024,4096,16384', new_tokens=0, rounds=5, uncached_tokens=0)
    decode |= dict(huggingface=True, eager=True)
    batches = (1, 2) if rehearse else (1, 64, 8, 256) if memory > 70e9 else (1, 64, 8)  # those of the goals first
    texts = dict(mode='sample', contexts=1024, batch_sizes=1, n_kv_heads='4,1', new_tokens=256, prompt_tokens=16)
    largest = dict(latents, mode='memory', block_size=1024, most=1024)
    # trainings
    data = path('data')
    is_prepared = (ROOT / 'data' / 'shakespeare_char' / 'meta.json').is_file()
    shakespeare = ['config/train_shakespeare_char.py', 'config/train_shakespeare_char_mla.py']
    play = pair('shakespeare', *shakespeare, data_dir=ROOT / 'data' if is_prepared else data)
    if not is_prepared:
        prepare = dict(out_dir=path('data/shakespeare_char'), input=input and os.path.abspath(input))
        play.insert(0, command('data/shakespeare_char/prepare.py', {}, **prepare))
    left = dict(dataset='code', data_dir=data, max_iters=iterations or 10**6, decay_lr=False, learning_rate=1e-3)
    left |= dict(warmup_iters=200, batch_size=batch, block_size=1024, gradient_accumulation_steps=1, eval_interval=500)
    left |= dict(eval_iters=2, log_interval=100, keep_checkpoints='500,1000,2000')
    runs = f'{path("code-mha")},{path("code-mla")}'
    heads = dict(models=runs, sweep=runs, out_dir=path('induction'), data_dir=data)
    code = [*pair('code', **left), command('find_induction_heads.py', SMALL_ANALYSIS, **heads)]
    pytest = [sys.executable, '-m', 'pytest', '-v', '-p', 'no:cacheprovider']
    tests, once = [[*pytest, 'tests/gpu']], [*pytest, 'tests/gpu/test_gpu_training.py', '-k', 'muon']
    muon = [[*once, f'--junitxml={path(f"muon-{time}.xml")}'] for time in (1, 2, 3)[: 1 if rehearse else 3]]
    installed = ['fa3'] if importlib.util.find_spec('flash_attn_interface') else []
    attention = [
        bench(f'attention-{kernel}', **step, **theirs, compile=True, rounds=5, attention_kernel=kernel)
        for kernel in (('auto', 'cudnn') if rehearse else ('auto', 'cudnn', 'flash', *installed))
    ]
    kernel = [command('studies/latent_kernel.py', SMALL_KERNEL, json=path('kernel.json'))]
    cell = dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64, gradient_accumulation_steps=1)
    cell |= dict(norm='rms', mlp='swiglu', pos='rope', bias=False, dataset='code', data_dir=data, resume='auto')
    cell |= dict(eval_interval=500, max_iters=2000, lr_decay_iters=2000, warmup_iters=100, log_interval=100)
    latent = dict(n_latent=96, latent_norm=True)  # with the rotated key MQA's cache
    cells = []
    for rate, factor in [(7e-4, 1.0)] if rehearse else itertools.product((7e-4, 1.4e-3), (1.0, 0.125)):
        own = dict(cell, learning_rate=rate, kv_lr=factor)
        cells.append(command('train.py', SMALL_RUN, **own, out_dir=path(f'cell-{rate}-{factor}')))
        cells.append(command('train_mla.py', SMALL_MLA, **own, **latent, out_dir=path(f'cell_mla-{rate}-{factor}')))
    if not os.path.exists(path('data/code/meta.json')):
        sources = ','.join(['stdlib', *filter(importlib.util.find_spec, PACKAGES)])
        prepare = dict(out_dir=path('data/code'), packages=sources, tokenizer='bpe', vocab_size=8192, megabytes=100)
        for commands in (cells, code):
            commands.insert(0, command('data/code/prepare.py', SMALL_DATA, **prepare))
    compiled = [bench('train', **step, **models, **theirs, compile=True, rounds=5)]
    eager = [bench('train_eager', **step, **models, **theirs, compile=False)]
    wide = [bench('train_350m', **medium, **theirs, compile=False)]
    decoding = [bench(f'decode-B{n}', **decode, batch_sizes=n, plot=path(f'decode-B{n}.png')) for n in batches]
    kernels = [bench('profile', **step, **models, compile=True, rounds=1, profile=path('trace'))]
    return {
        'muon': Part("Muon's resume test, three times", 120, muon),
        'attention': Part(f"Attention's back ends in training steps, {small}, compiled, {where}", 300, attention),
        'kernel': Part(f'One pass over the latents against two products, {where}', 60, kernel),
        'tests': Part('Tests', 600, tests),
        'train': Part(f'Training steps, {small}, compiled, {where}', 480, compiled),
        'decode': Part(f'Decoding steps, {small}, {where}', 420, decoding),
        'texts': Part(f'Texts, {small}, {where}', 120, [bench('texts', **texts, **theirs, huggingface=True, rounds=5)]),
        'train_eager': Part(f'Training steps, {small}, not compiled, {where}', 150, eager),
        'memory': Part(f'Largest batch, {small}, not compiled, {where}', 120, [bench('memory', **largest)]),
        'profile': Part(f'Kernels of a training step, {small}, {where}', 300, kernels),
        'shakespeare': Part('Shakespeare, the baby GPT at its full setting', 480, play),
        'train_350m': Part(f'Training steps, {large}, not compiled, {where}', 150, wide),
        'cells': Part('Cells of the contest, C = 384: learning rates, and multipliers for keys and values', 300, cells),
        'pair': Part('A pair on source code, for the time that is left', 0, code),
    }


# ---- running them ----------------------------------------------------------------------------------------------------


def run(name, part, until):
    """
    Run a part. until: time.monotonic() at which it must end. Returns its record, a dict.

    Training commands of the last part share the time: one that is told to stop saves, and counts as done.
    """
    began, output, status = time.monotonic(), dict(records.get(name, {}).get('output', {})), 'done'
    deadline = min(until, began + part.seconds) if part.seconds else until
    stoppable = [] if part.seconds else [c for c in part.commands if os.path.basename(c[1]).startswith('train')]
    for number, command in enumerate(part.commands):
        line = ' '.join(command[1:])
        written = next((key.removeprefix('--json=') for key in command if key.startswith('--json=')), '')
        if line in output and os.path.exists(written):  # by an earlier call that had no time for the rest
            continue
        errors.notice(f'$ {line}')
        seconds = deadline - time.monotonic()
        if command in stoppable:
            seconds = max(1.0, (seconds - AFTERWARDS) / sum(later in stoppable for later in part.commands[number:]))
        code, text, said = call(command, seconds)
        with open(path(f'{name}.log'), 'a', encoding='utf-8') as log:
            log.write(f'$ {line}\n{text}\n{said}\n')
        output[line] = as_markdown(command, text)
        if code is None and command not in stoppable:
            status = 'out of time'
        elif code:
            status = f'failed: {((said.strip() or text.strip()).splitlines() or ["nothing was printed"])[-1].strip()}'
        if status != 'done':
            break
    return dict(title=part.title, status=status, seconds=time.monotonic() - began, output=output)


def call(command, seconds):
    """(exit code, stdout, stderr) of a command; the code is None where it had to be stopped."""
    environment = dict(os.environ, REHEARSE_GPU='1', TRITON_INTERPRET='1') if rehearse else os.environ
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors='replace')
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
    try:
        out, err = process.communicate(timeout=max(1.0, seconds))
        return process.returncode, out, err
    except subprocess.TimeoutExpired:
        return None, *stop(process)
    except SystemExit:  # this script was told to stop
        stop(process)
        raise


def stop(process):
    """Tell a process to stop, and kill it with its children if it doesn't within a minute: its (stdout, stderr)."""
    process.send_signal(signal.SIGTERM)  # not to its children: a training that is compiling would fail
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.communicate(timeout=60)
    os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()


def as_markdown(command, text):
    """A command's output for gpu.md: the tables of bench.py, and the end of others' without the lines of iterations."""
    if os.path.basename(command[1]) == 'bench.py':
        return text
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith('iter ')]
    return '```\n' + '\n'.join(lines[-40:]) + '\n```\n'


# ---- what is reported ------------------------------------------------------------------------------------------------


def measured(name):
    """What a part's bench.py wrote to NAME.json, or to NAME-*.json, whose lists are joined; {} where nothing was."""
    found = {}
    for file_path in (path(f'{name}.json'), *sorted(glob.glob(path(f'{name}-*.json')))):
        if os.path.exists(file_path):
            for key, value in read_json(file_path).items():
                found[key] = found.get(key, []) + value if isinstance(value, list) else value
    return found


def row(name, part, key, **where):
    """The row called `name` of a measured part's list `key`, with these values; {} where there is none."""
    found = measured(part).get(key, [])
    return next((r for r in found if r['name'] == name and all(r.get(k) == v for k, v in where.items())), {})


def ratio(one, other, key):
    """one[key] / other[key], or None where one of them is missing."""
    return one[key] / other[key] if one.get(key) and other.get(key) else None


def goals():
    """[(goal, what was measured as text, True, False or None where it wasn't)]."""
    mha, mla, theirs = (row(name, 'train', 'steps') for name in ('MHA', f'MLA, r={LATENTS[0]}', 'nanoGPT'))
    text, their_text, hf_text = (row(name, 'texts', 'texts') for name in ('MHA', 'nanoGPT', 'Hugging Face, cached'))
    longest = dict(zip(('batch_size', 'context'), LONGEST, strict=True))
    small_cache, large_cache = (row(name, 'decode', 'steps', **longest) for name in (f'MLA, r={LATENTS[1]}', 'MHA'))
    gain = ratio(small_cache, large_cache, 'tokens_per_s')
    if small_cache.get('ms') and large_cache.get('out_of_memory'):
        gain = math.inf
    faster = "MLA's tokens/s over MHA's, C/4, 16k context, batch 64: at least 4 (inf: MHA doesn't fit)"
    found = [
        ('MFU of MHA at 124M, compiled: at least .5', mha.get('mfu'), 0.5, 1),
        ('MFU of MLA at C/2: at least .5', mla.get('mfu'), 0.5, 1),
        ("MLA's step over MHA's: at most 1", ratio(mla, mha, 'ms'), 0, 1),
        ("MHA's tokens/s over nanoGPT's: at least 1", ratio(mha, theirs, 'tokens_per_s'), 1, math.inf),
        ("MHA's peak memory over nanoGPT's: at most 1", ratio(mha, theirs, 'peak_bytes'), 0, 1),
        ("tokens/s of a text over nanoGPT's: at least 5", ratio(text, their_text, 'tokens_per_s'), 5, math.inf),
        ("tokens/s of a text over Hugging Face's: at least 2", ratio(text, hf_text, 'tokens_per_s'), 2, math.inf),
        (faster, gain, 4, math.inf),
    ]
    return [
        (goal, '', None) if value is None else (goal, f'{value:.3f}', low <= value <= high)
        for goal, value, low, high in found
    ]


def write(records, machine):
    """gpu.json and gpu.md in out_dir: all that has been measured."""
    results = {name: found for name in records if (found := measured(name))}
    numbers = dict(machine=machine, rehearsed=rehearse, parts=records, results=results, goals=goals())
    report.save_json(path('gpu.json'), numbers)
    title = 'A rehearsal on a CPU: it shows that the parts run, and says nothing about speed' if rehearse else machine
    rows = [(goal, value or 'not measured', {None: '', True: 'yes', False: 'no'}[met]) for goal, value, met in goals()]
    text = f'# {title}\n\n' + report.markdown_table(('goal', 'measured', 'met'), rows)
    for name, record in records.items():
        text += f'\n## {record["title"]}\n\n`{name}`: {record["status"]}, {record["seconds"]:.0f} s\n\n'
        text += ''.join(f'```sh\npython {line}\n```\n\n{out.strip()}\n\n' for line, out in record['output'].items())
    pictures = [os.path.basename(picture) for picture in sorted(glob.glob(path('*.png')))]
    report.save_text(path('gpu.md'), text + ''.join(f'\n![{name.removesuffix(".png")}]({name})\n' for name in pictures))
    if os.path.isdir(os.environ.get('OUT', '')):
        for file in ('gpu.md', 'gpu.json', *pictures):
            shutil.copy(path(file), os.environ['OUT'])


def start():
    """The records of earlier calls, and what this machine is. UserError where there is no GPU, or another was used."""
    if not rehearse and not torch.cuda.is_available():
        raise UserError('no CUDA GPU was found; try every part in miniature on a CPU: --rehearse')
    machine = timing.cpu_name() if rehearse else torch.cuda.get_device_name()
    machine += f', torch {torch.__version__}'
    if not os.path.exists(path('gpu.json')):
        return {}, machine
    earlier = read_json(path('gpu.json'))
    if (earlier['machine'], earlier['rehearsed']) != (machine, rehearse):
        was = 'a rehearsal on ' * earlier['rehearsed'] + earlier['machine']
        raise UserError(f'{out_dir} holds measurements of {was}; choose another --out_dir')
    return earlier['parts'], machine


arguments.check_folder(out_dir)
os.makedirs(out_dir, exist_ok=True)
beside = ROOT.parent / 'nanoGPT'
nanogpt = os.path.abspath(nanogpt) if nanogpt else str(beside) if (beside / 'model.py').is_file() else ''
if nanogpt and not os.path.isfile(os.path.join(nanogpt, 'model.py')):
    raise UserError(f'{nanogpt} has no model.py; --nanogpt must be the folder of a nanoGPT checkout')
records, machine = start()
available = all_parts()
chosen = arguments.names(parts, 'parts') if parts else list(available)
if unknown := set(chosen) - set(available):
    raise UserError(f'unknown parts: {", ".join(sorted(unknown))}; choose from {", ".join(available)}')
until = time.monotonic() + 60 * minutes
for name in available:
    part = all_parts()[name]  # the part before it may have prepared its data
    if name not in chosen or records.get(name, {}).get('status') == 'done':
        continue
    needed = {'tests': 'pytest', 'muon': 'pytest', 'kernel': 'triton'}.get(name)
    if needed and not importlib.util.find_spec(needed):
        errors.notice(f'{name}: left out, {needed} is not installed')
        continue
    if time.monotonic() > until - (5 if part.seconds else LEAST):
        errors.notice(f'{name}: no time left; repeat the command to continue')
        continue
    records[name] = run(name, part, until)
    write(records, machine)
    errors.notice(f'{name}: {records[name]["status"]} ({records[name]["seconds"]:.0f} s)')

if rehearse:
    errors.notice('a rehearsal in miniature: these figures show that the parts run, and nothing about speed')
for goal, value, met in goals():
    print(f'{"yes" if met else "no " if met is False else "-  "} {goal}: {value or "not measured"}')
if failed := [name for name, record in records.items() if record['status'] != 'done']:
    raise UserError(f'{", ".join(failed)} did not end well; see {path("gpu.md")}, then repeat the command to try again')
