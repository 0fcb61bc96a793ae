"""
Everything that needs a GPU, in one command: the tests, then speed, memory and short trainings, beside nanoGPT's.

$ python studies/gpu.py                        # 20 to 30 minutes on an H100; sizes follow the GPU's memory
$ python studies/gpu.py --rehearse             # every part on a CPU, in miniature: shows that the parts run
$ python studies/gpu.py --parts=decode,texts   # some of them

Needs what a CUDA image with PyTorch, transformers, tiktoken and matplotlib has; no network. Without pytest
the tests are left out, and without a nanoGPT checkout its rows are.

Every part is a few commands of this repository with a time limit of its own. After each one gpu.json and gpu.md in
out_dir hold what has been measured until then, and pictures lie beside them; where $OUT is a folder, these are copied
there too. A part that is done is kept, and so is each command that wrote its .json: repeat the command to continue, or
delete gpu.json to measure again. The last part trains for whatever time is left. Run it from the
repository root.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from core.cli import signals

signals.exit_at_once()  # for the time of the slow imports

import contextlib
import glob
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure

from analysis import report
from core.cli import arguments, errors
from core.cli.errors import UserError
from core.speed import gpus, timing

# ----------------------------------------------------------------------------------------------------------------------
out_dir = 'out-gpu'
parts = ''  # the parts to run, separated by commas; '': all
rehearse = False  # on a CPU, in miniature
nanogpt = ''  # folder of a nanoGPT checkout; '': ../nanoGPT where that is one
minutes = 30.0  # for all parts together
iterations = 0  # of the last part's trainings, if the time suffices; 0: a million, in a rehearsal 20
exec(open(Path(__file__).resolve().parents[1] / 'configurator.py', encoding='utf-8').read())
# ----------------------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable


@dataclass
class Part:
    """Commands that are run one after the other, each a list of arguments; `seconds` is the limit of all of them."""

    title: str
    seconds: float
    commands: list
    needs: str = ''  # a package without which it is left out


# ---- the parts -------------------------------------------------------------------------------------------------------


def keys(**values):
    """Arguments --key=value."""
    return [f'--{key}={value}' for key, value in values.items()]


def bench(name, **settings):
    """A command of bench.py that writes NAME.json."""
    return [PYTHON, 'bench.py', *keys(**settings | (SMALL_BENCH if rehearse else {}), json=path(f'{name}.json'))]


def train(script, *arguments, **settings):
    """A training that goes on where it was stopped."""
    small = dict(SMALL_RUN, max_iters=iterations or 20) if rehearse else {}
    return [PYTHON, script, *arguments, *keys(**settings | small, resume='auto')]


def path(name):
    """A file of out_dir, absolute."""
    return os.path.abspath(os.path.join(out_dir, name))


LATENTS = (32, 16) if rehearse else (384, 192)  # C/2 and C/4
LONGEST = (2, 32) if rehearse else (64, 16384)  # a batch and a context
SMALL_BENCH = dict(n_layer=1, n_head=4, n_embd=64, vocab_size=300, device='cpu', dtype='float32', rounds=2, threads=1)
SMALL_RUN = dict(n_layer=1, n_head=2, n_embd=32, block_size=32, batch_size=4, device='cpu', threads=1,
                 eval_interval=10, eval_iters=2, warmup_iters=2, lr_decay_iters=20, compile=False)  # fmt: skip


def all_parts():
    """{name: Part}, in the order in which they run."""
    gpu = gpus.gpu_of('cuda') if not rehearse else None
    memory = torch.cuda.get_device_properties(0).total_memory if not rehearse else 0
    batch = next((size for size, least in ((32, 70e9), (16, 38e9), (8, 20e9)) if memory > least), 4)
    theirs = dict(nanogpt=nanogpt) if nanogpt else {}
    arms = dict(n_kv_heads='2,1') if rehearse else dict(n_kv_heads='4,1')
    latents = dict(n_latents=','.join(map(str, LATENTS)))
    medium = dict(n_layer=24, n_head=16, n_embd=1024)
    small_step = dict(batch_size=2, block_size=32) if rehearse else dict(batch_size=batch, block_size=1024)
    half_step = small_step if rehearse else dict(small_step, batch_size=max(1, batch // 2))
    contexts = '8,32' if rehearse else '128,1024,4096,16384'
    sizes = (1, 2) if rehearse else (1, 64, 8, 256) if memory > 70e9 else (1, 64, 8)  # those of the goals first
    texts = dict(new_tokens=8, prompt_tokens=4) if rehearse else dict(new_tokens=256, prompt_tokens=16)
    shakespeare = [path(f'shakespeare-{arm}') for arm in ('mha', 'mla')]
    code = [path(f'code-{arm}') for arm in ('mha', 'mla')]
    data = path('data')
    is_prepared = (ROOT / 'data' / 'shakespeare_char' / 'meta.json').is_file()
    plays = str(ROOT / 'data') if is_prepared else data
    characters = [PYTHON, 'data/shakespeare_char/prepare.py', *keys(out_dir=os.path.join(data, 'shakespeare_char'))]
    thin = dict(n_latent=16) if rehearse else {}
    left = dict(dataset='code', data_dir=data, max_iters=iterations or 10**6, decay_lr=False, learning_rate=1e-3,
                warmup_iters=200, batch_size=batch, block_size=1024, gradient_accumulation_steps=1, eval_interval=500,
                eval_iters=2, log_interval=100, keep_checkpoints='10' if rehearse else '500,1000,2000')  # fmt: skip
    where, small = ('a CPU', 'a miniature') if rehearse else (gpu.name if gpu else 'this device', '124M')
    text = '' if is_prepared else ', on the text that could be had (see below)'
    return {
        'tests': Part('Tests', 600, [[PYTHON, '-m', 'pytest', '-v', '-p', 'no:cacheprovider', 'tests/gpu']], 'pytest'),
        'train': Part(f'Training steps, {small}, compiled, {where}', 480, [
            bench('train', mode='train', **small_step, **arms, **latents, **theirs, compile=not rehearse, rounds=5)]),
        'decode': Part(f'Decoding steps, {small}, {where}', 420, [
            bench(f'decode-B{size}', mode='sample', contexts=contexts, batch_sizes=size, **arms, **latents,
                  new_tokens=0, uncached_tokens=0, huggingface=True, eager=True, rounds=5,
                  plot=path(f'decode-B{size}.png'))
            for size in sizes]),
        'texts': Part(f'Texts, {small}, {where}', 120, [
            bench('texts', mode='sample', contexts=8 if rehearse else 1024, batch_sizes=1, **arms, **theirs, **texts,
                  huggingface=True, rounds=5)]),
        'train_eager': Part(f'Training steps, {small}, not compiled, {where}', 150, [
            bench('train_eager', mode='train', **small_step, **arms, **latents, **theirs, compile=False)]),
        'memory': Part(f'Largest batch, {small}, not compiled, {where}', 120, [
            bench('memory', mode='memory', **latents, block_size=32 if rehearse else 1024, most=4 if rehearse else 1024,
                  compile=False)]),
        'profile': Part(f'Kernels of a training step, {small}, {where}', 300, [
            bench('profile', mode='train', **small_step, **arms, **latents, compile=not rehearse, rounds=1,
                  profile=path('trace'))]),
        'shakespeare': Part(f'Shakespeare, the baby GPT at its full setting{text}', 480, [
            *([] if is_prepared else [characters]),
            train('train.py', 'config/train_shakespeare_char.py', out_dir=shakespeare[0], data_dir=plays),
            train('train_mla.py', 'config/train_shakespeare_char_mla.py', out_dir=shakespeare[1], data_dir=plays,
                  **thin),
            compare(shakespeare, data_dir=plays)]),
        'train_350m': Part(f'Training steps, {"a miniature" if rehearse else "350M"}, not compiled, {where}', 150, [
            bench('train_350m', mode='train', **half_step, **medium, **theirs, compile=False)]),
        'data': Part('The data path', 120, [
            bench('data', mode='data', megabytes=1 if rehearse else 64, batch_size=4 if rehearse else 32)]),
        'pair': Part('A pair on source code, for the time that is left', 0, [
            *([] if os.path.exists(os.path.join(data, 'code', 'meta.json')) else [[
                PYTHON, 'data/code/prepare.py', *keys(
                    out_dir=os.path.join(data, 'code'), packages=','.join(['stdlib', *filter(is_here, PACKAGES)]),
                    tokenizer='bpe', vocab_size=512 if rehearse else 8192, megabytes=1 if rehearse else 100)]]),
            train('train.py', out_dir=code[0], **left),
            train('train_mla.py', out_dir=code[1], **left, **thin),
            compare(code, data_dir=data),
            [PYTHON, 'find_induction_heads.py', *keys(
                models=','.join(code), sweep=','.join(code), out_dir=path('induction'), data_dir=data,
                **miniature_analysis())]]),
    }  # fmt: skip


PACKAGES = ('torch', 'numpy', 'transformers', 'datasets', 'matplotlib', 'tqdm')


def is_here(package):
    """True if a package is installed."""
    return importlib.util.find_spec(package) is not None


def compare(folders, **settings):
    """A command of compare.py."""
    if rehearse:
        settings |= dict(device='cpu', windows=8, batch_size=4, sample_tokens=8)
    return [PYTHON, 'compare.py', *keys(runs=','.join(folders), out_dir=folders[0] + '-and-mla', **settings)]


def miniature_analysis():
    """Keys of find_induction_heads.py for the rehearsal."""
    small = dict(sequences=8, length=8, controls=2, resamples=100, ablate_sequences=2, text_windows=2)
    return dict(small, device='cpu', threads=1, html=False) if rehearse else {}


# ---- running them ----------------------------------------------------------------------------------------------------


def run(name, part, until):
    """
    Run a part. until: time.monotonic() at which it must end. Returns its record, a dict.

    Training commands of the last part share the time: one that is told to stop saves, and counts as done.
    """
    began, output, status = time.monotonic(), dict(records.get(name, {}).get('output', {})), 'done'
    deadline = min(until, began + part.seconds) if part.seconds else until
    trainings = 0 if part.seconds else sum(is_training(command) for command in part.commands)
    for command in part.commands:
        line = ' '.join(command[1:])
        written = next((key.removeprefix('--json=') for key in command if key.startswith('--json=')), '')
        if line in output and os.path.exists(written):  # by an earlier call that had no time for the rest
            continue
        errors.notice(f'$ {line}')
        ends, may_be_stopped = deadline, trainings > 0 and is_training(command)
        if may_be_stopped:
            now = time.monotonic()
            ends = now + max(1.0, (deadline - AFTERWARDS - now) / trainings)
            trainings -= 1
        code, text, said = call(command, ends - time.monotonic())
        with open(path(f'{name}.log'), 'a', encoding='utf-8') as log:
            log.write(f'$ {line}\n{text}\n{said}\n')
        output[line] = as_markdown(command, text)
        if code is None and not may_be_stopped:
            status = 'out of time'
            break
        if code:
            status = f'failed: {last_line(said.strip() or text)}'
            break
    return dict(title=part.title, status=status, seconds=time.monotonic() - began, output=output)


def is_training(command):
    """True if a command is one of train.py or train_mla.py."""
    return os.path.basename(command[1]) in TRAININGS


TRAININGS = ('train.py', 'train_mla.py')
AFTERWARDS = 20 if rehearse else 240  # seconds of the last part for what follows its trainings
LEAST = 0 if rehearse else 360  # seconds without which the last part isn't worth its start


def call(command, seconds):
    """(exit code, stdout, stderr) of a command; the code is None where it had to be stopped, by SIGTERM."""
    environment = dict(os.environ, REHEARSE_GPU='1') if rehearse else os.environ
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               errors='replace', env=environment, start_new_session=True)  # fmt: skip
    stopped = False
    try:
        try:
            out, err = process.communicate(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            stopped = True
            process.send_signal(signal.SIGTERM)  # not to its children: a training that is compiling would fail
            try:
                out, err = process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                out, err = process.communicate()
    except SystemExit:  # this script was told to stop: so are its children
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise
    return None if stopped else process.returncode, out, err


def as_markdown(command, text):
    """A command's output for gpu.md: the tables of bench.py, and the end of others' without the lines of iterations."""
    if os.path.basename(command[1]) == 'bench.py':
        return text
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith('iter ')]
    return '```\n' + '\n'.join(lines[-40:]) + '\n```\n'


def last_line(text):
    """The last line of a text that isn't empty, or what to say where there is none."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else 'nothing was printed'


# ---- what is reported ------------------------------------------------------------------------------------------------


def measured(name):
    """What a part's bench.py wrote to NAME.json, or to NAME-*.json, whose lists are joined; None where nothing was."""
    paths = [p for p in (path(f'{name}.json'), *sorted(glob.glob(path(f'{name}-*.json')))) if os.path.exists(p)]
    found = []
    for file_path in paths:
        with open(file_path, encoding='utf-8') as file:
            found.append(json.load(file))
    if not found:
        return None
    lists = {key: [item for part in found for item in part[key]] for key in found[0] if isinstance(found[0][key], list)}
    return found[0] | lists


def row(name, part, key, **where):
    """The row called `name` of a measured part's list `key`, with these values; {} where there is none."""
    found = (measured(part) or {}).get(key, [])
    return next((r for r in found if r['name'] == name and all(r.get(k) == v for k, v in where.items())), {})


def ratio(one, other, key):
    """one[key] / other[key], or None where one of them is missing."""
    return one[key] / other[key] if one.get(key) and other.get(key) else None


def goals():
    """[(goal, what was measured as text, True, False or None where it wasn't)]."""
    mha, mla, theirs = (row(name, 'train', 'steps') for name in ('MHA', f'MLA, r={LATENTS[0]}', 'nanoGPT'))
    texts = {name: row(name, 'texts', 'texts') for name in ('MHA', 'nanoGPT', 'Hugging Face, cached')}
    long = dict(zip(('batch_size', 'context'), LONGEST, strict=True))
    mla_long, mha_long = row(f'MLA, r={LATENTS[1]}', 'decode', 'steps', **long), row('MHA', 'decode', 'steps', **long)
    checks = [
        ('MFU of MHA at 124M, compiled: at least .5', mha.get('mfu'), lambda x: x >= 0.5),
        ('MFU of MLA at C/2: at least .5', mla.get('mfu'), lambda x: x >= 0.5),
        ("MLA's step over MHA's: at most 1", ratio(mla, mha, 'ms'), lambda x: x <= 1),
        ("MHA's tokens/s over nanoGPT's: at least 1", ratio(mha, theirs, 'tokens_per_s'), lambda x: x >= 1),
        ("MHA's peak memory over nanoGPT's: below 1", ratio(mha, theirs, 'peak_bytes'), lambda x: x < 1),
        ("tokens/s of a text over nanoGPT's: at least 5", ratio(texts['MHA'], texts['nanoGPT'], 'tokens_per_s'),
         lambda x: x >= 5),
        ("tokens/s of a text over Hugging Face's: at least 2",
         ratio(texts['MHA'], texts['Hugging Face, cached'], 'tokens_per_s'), lambda x: x >= 2),
    ]  # fmt: skip
    found = [(goal, '' if value is None else f'{value:.3f}', None if value is None else meets(value))
             for goal, value, meets in checks]  # fmt: skip
    gain = ratio(mla_long, mha_long, 'tokens_per_s')
    only_mla = bool(mla_long.get('ms') and mha_long.get('out_of_memory'))
    text = f'{gain:.2f}' if gain else 'MHA out of memory' if only_mla else ''
    goal = "MLA's tokens/s over MHA's, C/4, 16k context, batch 64: at least 4, or MHA out of memory"
    return [*found, (goal, text, (only_mla or gain >= 4) if gain or only_mla else None)]


STEPS = ('train', 'train_eager')


def draw_steps():
    """Tokens/s and peak memory of the training steps at 124M, as bars."""
    found = [result for part in STEPS if (result := measured(part))]
    rows = [(r['name'] + ', compiled' * bool(result['config']['compile']), r)
            for result in found for r in result['steps']]  # fmt: skip
    rows = [(f'{name} ({number})' if rehearse else name, r) for number, (name, r) in enumerate(rows)]
    names = [name for name, _ in rows][::-1]
    figure = Figure(figsize=(11, 1.2 + 0.32 * len(rows)), layout='constrained')
    for axes, (key, factor, label) in zip(figure.subplots(1, 2, sharey=True), (
        ('tokens_per_s', 1e-3, 'thousand tokens/s'), ('peak_bytes', 2**-30, 'peak memory of a step (GiB)')), strict=True
    ):  # fmt: skip
        values = [r[key] * factor for _, r in rows][::-1]
        colors = ['#c4622d' if 'MLA' not in name else '#1f3b73' for name in names]
        axes.barh(names, values, color=['#9a9a9a' if 'nanoGPT' in n else c for n, c in zip(names, colors, strict=True)])
        axes.bar_label(axes.containers[0], [f'{value:.3g}' for value in values], padding=3)
        axes.set(xlabel=label, xlim=(0, 1.15 * max(values)))
        axes.spines[['top', 'right']].set_visible(False)
    figure.suptitle(f'Training steps: {machine}' + ', a rehearsal in miniature' * rehearse, fontsize='medium')
    return figure


def write(records, machine):
    """gpu.json and gpu.md in out_dir: all that has been measured."""
    results = {name: measured(name) for name in records if measured(name)}
    report.save_json(path('gpu.json'), dict(machine=machine, rehearsed=rehearse, parts=records, results=results,
                                            goals=goals()))  # fmt: skip
    rows = [(goal, value or 'not measured', '' if met is None else 'yes' if met else 'no')
            for goal, value, met in goals()]  # fmt: skip
    title = 'A rehearsal on a CPU: it shows that the parts run, and says nothing about speed' if rehearse else machine
    if any(measured(part) for part in STEPS):
        report.save_figure(path('train.png'), draw_steps())
    text = f'# {title}\n\n' + report.markdown_table(('goal', 'measured', 'met'), rows)
    for name, record in records.items():
        text += f'\n## {record["title"]}\n\n`{name}`: {record["status"]}, {record["seconds"]:.0f} s\n\n'
        for command, output in record['output'].items():
            text += f'```sh\npython {command}\n```\n\n{output.strip()}\n\n'
    for picture in sorted(glob.glob(path('*.png'))):
        text += f'\n![{Path(picture).stem}]({os.path.basename(picture)})\n'
    report.save_text(path('gpu.md'), text)
    if os.path.isdir(os.environ.get('OUT', '')):
        for file in ('gpu.md', 'gpu.json', *map(os.path.basename, glob.glob(path('*.png')))):
            shutil.copy(path(file), os.environ['OUT'])


def start():
    """The records of earlier calls, and what this machine is. UserError where there is no GPU, or another was used."""
    if not rehearse and not torch.cuda.is_available():
        raise UserError('no CUDA GPU was found; try every part in miniature on a CPU: --rehearse')
    machine = timing.cpu_name() if rehearse else torch.cuda.get_device_name()
    machine += f', torch {torch.__version__}'
    if not os.path.exists(path('gpu.json')):
        return {}, machine
    with open(path('gpu.json'), encoding='utf-8') as file:
        earlier = json.load(file)
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
    part = available[name]
    if name not in chosen or records.get(name, {}).get('status') == 'done':
        continue
    if part.needs and not importlib.util.find_spec(part.needs):
        errors.notice(f'{name}: left out, {part.needs} is not installed')
        continue
    if time.monotonic() > until - (5 if part.seconds else max(5, LEAST)):
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
