"""Runs of train.py and train_mla.py for the tests: a tiny data set, a tiny model, and what to compare."""

import csv
import os
import signal
import subprocess
import sys

import torch

from core.text.tokenizer import CharTokenizer
from core.text.write_dataset import write_dataset
from support import ROOT, forking

COMMON = dict(
    dataset='tiny',
    n_layer=2,
    n_head=2,
    n_embd=32,
    block_size=16,
    batch_size=8,
    gradient_accumulation_steps=1,
    bias=False,
    learning_rate=1e-2,
    warmup_iters=4,
    lr_decay_iters=20,
    min_lr=1e-3,
    max_iters=20,
    eval_interval=10,
    eval_iters=4,
    device='cpu',
    dtype='float32',
    compile=False,
    threads=1,
)
SCRIPTS = {'mha': 'train.py', 'mla': 'train_mla.py'}


def write_characters(folder, train, end=None, text='the cat sat on the mat; a rat sat on that. ' * 200):
    """Write a small data set of characters: the first `train` of a text, and for validation those up to `end`."""
    chars = CharTokenizer.learn(text)
    ids = chars.encode_array(text)
    write_dataset(folder, chars, {'train': ids[:train], 'val': ids[train:end]}, source='a test text')


def environment():
    """This process's, with one thread, and loopback for what processes say to each other."""
    return dict(os.environ, OMP_NUM_THREADS='1', GLOO_SOCKET_IFNAME='lo')


def torchrun(processes, *arguments):
    """The launcher's part of a command line."""
    return ('-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}', *arguments)


def command(script, data_dir, out_dir, launcher=(), **changes):
    """The command line of a training run with COMMON and these keys."""
    keys = {**COMMON, 'data_dir': data_dir, 'out_dir': out_dir, **changes}
    return [sys.executable, *launcher, script, *(f'--{key}={value}' for key, value in keys.items())]


def run(script, data_dir, out_dir, launcher=(), fresh=False, processes=1, **changes):
    """
    The finished process of a training run with COMMON and these keys; fresh: one that imports everything itself.

    processes: how many train together. They are forks where there are forks, and torchrun's otherwise.
    """
    fresh = fresh or not hasattr(os, 'fork')
    if processes > 1 and fresh:
        launcher = torchrun(processes)
    arguments = command(script, data_dir, out_dir, launcher, **changes)
    if not fresh:
        return forking.run(arguments[1], arguments[2:], 240, processes=processes)
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=240, env=environment())


def started(script, data_dir, out_dir, launcher=(), errors=subprocess.DEVNULL, fresh=False, **changes):
    """The process of a training run that has just begun; its stdout is a pipe. fresh: as for `run`."""
    arguments = command(script, data_dir, out_dir, launcher, **changes)
    if not fresh:
        arguments[0] = forking.interpreter()
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment())


def killed(process, out_dir):
    """The exit code of a `started` run that is killed; out_dir: its folder, for a run that holds it and isn't fresh."""
    os.kill(int((out_dir / '.lock').read_text().split()[1]) if out_dir else process.pid, signal.SIGKILL)
    process.stdout.close()
    return process.wait()


def log_of(out_dir):
    """log.csv without what depends on the clock."""
    with open(out_dir / 'log.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ('ms_per_iter', 'tokens_per_s', 'mfu')} for row in rows]


def assert_same_run(one, other):
    """The same log, the same weights and the same optimizer, bit for bit."""
    assert log_of(one) == log_of(other)
    a, b = (tensors_of(torch.load(folder / 'ckpt.pt')) for folder in (one, other))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def tensors_of(value, name=''):
    """{path: tensor} of nested dicts."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in tensors_of(inner, f'{name}/{key}').items()}
    return {}


def assert_same_curve(one, other, tolerance=1e-5):
    """The same losses to rounding, measured in the same iterations."""
    for a, b in zip(log_of(one), log_of(other), strict=True):
        for name in ('loss', 'train_loss', 'val_loss', 'val_stderr'):
            assert bool(a[name]) == bool(b[name])
            assert not a[name] or abs(float(a[name]) - float(b[name])) <= tolerance, (a['iter'], name)
