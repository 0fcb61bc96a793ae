"""
Runs side by side: what they are, their losses on the same windows, their curves and samples.

Notable features:
- a run is a folder of train.py's, finished or still training; only its files are read
- losses are compared window by window, wherever two runs share data set and block size
"""

import os
import statistics
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
import torch
from matplotlib.figure import Figure

from core.cli import machine
from core.cli.errors import UserError
from core.runs import checkpoint as checkpoints
from core.runs import evaluation, models
from core.runs import log as runlog
from core.text.dataset import TokenData
from core.text.tokenizer import load_tokenizer

# of different brightness, to be distinguishable in grey
COLORS = ('#1f3b73', '#e07b39', '#4f9a94', '#9b2226', '#8f7fb8', '#c9a227')
MARKERS = 'os^Dv*'
# differ between any two runs, and say nothing about them
OF_THE_RUN = ('out_dir', 'resume', 'overwrite', 'init_from', 'wandb_run_name', 'wandb_project', 'wandb_log', 'threads',
              'device', 'log_interval', 'eval_interval', 'eval_iters', 'checkpoint_interval', 'keep_checkpoints',
              'data_dir', 'backend', 'eval_only', 'always_save_checkpoint', 'attention', 'n_latent',
              'n_kv_head')  # fmt: skip


@dataclass
class Run:
    """One run as its folder has it. saved: its checkpoint's dict, None before the first save; log: rows of log.csv."""

    folder: str
    saved: dict | None
    log: list
    label: str = ''
    numbers: dict = field(default_factory=dict)  # what `measure` found
    losses: torch.Tensor | None = None  # of each validation window, nats per token
    windows: tuple = ()  # what two runs must share for their losses to be of the same windows

    @property
    def done(self):
        """True for a run that has reached its last iteration."""
        return bool(self.saved) and self.iterations >= self.saved['config'].get('max_iters', 0)

    @property
    def iterations(self):
        """The iteration of the checkpoint; 0 where there is none yet, or it says none (nanoGPT's, a conversion's)."""
        return (self.saved or {}).get('iter_num') or 0


def read(folder):
    """The Run in a folder. UserError where there is neither a checkpoint nor a log."""
    paths = [os.path.join(folder, name) for name in ('ckpt.pt', 'log.csv')]
    if not any(map(os.path.exists, paths)):
        raise UserError(f'{folder} holds no run: neither ckpt.pt nor log.csv; name the out_dir of a training')
    saved = checkpoints.load(paths[0], mapped=True) if os.path.exists(paths[0]) else None
    return Run(folder, saved, runlog.read(paths[1]) if os.path.exists(paths[1]) else [])


def label(runs):
    """Name each run by its attention, and where others have the same, by the keys in which they differ."""
    for run in runs:
        config = models.model_config(run.saved) if run.saved else None
        run.label = models.label_of(config) if config else f'{run.folder} (nothing saved yet)'
    for name in {run.label for run in runs}:
        same = [run for run in runs if run.label == name and run.saved]
        configs = [run.saved['config'] for run in same]
        keys = [key for key in configs[0] if key not in OF_THE_RUN and len({str(c.get(key)) for c in configs}) > 1
                ] if len(same) > 1 else []  # fmt: skip
        for run in same:
            run.label += ''.join(f', {key}={run.saved["config"].get(key)}' for key in keys)
    for name, count in Counter(run.label for run in runs).items():
        if count > 1:
            for number, run in enumerate([run for run in runs if run.label == name], 1):
                run.label += f' ({number})'


def measure(run, data_dir, windows, batch_size, device, dtype, start, tokens, seed):
    """
    Fill in a run's numbers, its losses on at most `windows` validation windows, and a sample; nothing without a save.

    data_dir: where its data set is; '': where the run found it. start: the sample's prompt; tokens: its length, 0: no
    sample. UserError where the data set is missing.
    """
    if run.saved is None:
        return
    keys = run.saved['config']
    if not keys.get('dataset'):
        raise UserError(f'{run.folder} does not say which data set it was trained on; leave it out of --runs')
    model = models.build_model(run.saved).to(device).eval()
    folder = os.path.join(data_dir or keys.get('data_dir', 'data'), keys['dataset'])
    data = TokenData(folder, model.config.block_size)
    dtype = machine.pick_dtype(dtype, device, model.config.n_embd)
    autocast = machine.autocast(device, dtype)
    run.losses = evaluation.window_losses(model, data, 'val', windows, batch_size, autocast)
    run.windows = (str(data.meta.get('sha256')), data.tokens['val'], data.block_size, len(run.losses))
    speeds = runlog.column(run.log, 'tokens_per_s')[1]
    loss, error = evaluation.mean_and_stderr(run.losses)
    run.numbers = dict(
        folder=run.folder,
        corpus=data.corpus,
        iterations=run.iterations,
        **sizes(model, dtype),
        dtype=dtype,
        tokens_per_s=statistics.median(speeds[1:] or speeds) if speeds else None,  # the first holds the warm-up
        val_loss=loss,
        val_stderr=error,
    )
    if tokens:
        tokenizer = load_tokenizer(data.meta)
        ids = prompt_ids(tokenizer, start)
        torch.manual_seed(seed)
        with autocast:
            ids = model.generate(torch.tensor([ids], device=device), tokens, temperature=0.8, top_k=200,
                                 valid_ids=tokenizer.n_vocab)[0]  # fmt: skip
        run.numbers['sample'] = tokenizer.decode(ids.tolist())


def sizes(model, dtype='float32'):
    """A dict of a model's parameters, FLOPs per token of training, and bytes per token of a cache in `dtype`."""
    return dict(
        parameters=model.get_num_params(),
        attention_parameters=models.attention_params(model),
        flops_per_token=model.flops_per_token(),
        cache_bytes_per_token=model.init_cache(1, dtype=machine.DTYPES[dtype]).bytes_per_token,
    )


def prompt_ids(tokenizer, start):
    """The ids of a prompt, a list. UserError where there are none, or the tokenizer doesn't have its characters."""
    ids = tokenizer.encode(start)
    if not ids:
        raise UserError('start is empty; the prompt must contain at least one token (the default is a newline)')
    return ids


def difference(run, first):
    """Mean of a run's losses minus those of `first` and the half width of its 95 % interval; None on other windows."""
    if run is first or run.losses is None or first.losses is None or run.windows != first.windows:
        return None
    mean, error = evaluation.mean_and_stderr(run.losses - first.losses)
    return mean, 1.96 * error


def table(runs):
    """The heading and the rows of the table, lists of str: one row for each run."""
    heading = ['run', 'iteration', 'parameters', 'FLOPs per token', 'cache bytes per token', 'tokens/s', 'val loss',
               'minus the first']  # fmt: skip
    rows = []
    for run in runs:
        n, gap = run.numbers, difference(run, runs[0])
        if not n:
            rows.append([run.label, *[''] * 7])
            continue
        of = '' if run.done else f' of {run.saved["config"]["max_iters"]:,}'
        rows.append([
            run.label, f'{n["iterations"]:,}{of}', f'{n["parameters"]:,}', f'{n["flops_per_token"]:,}',
            f'{n["cache_bytes_per_token"]:,}', f'{n["tokens_per_s"]:,.0f}' if n['tokens_per_s'] else '',
            f'{n["val_loss"]:.4f} ± {n["val_stderr"]:.4f}', f'{gap[0]:+.4f} ± {gap[1]:.4f}' if gap else '',
        ])  # fmt: skip
    return heading, rows


def aligned(heading, rows):
    """The same table for a terminal: columns padded to their widest cell, numbers to the right."""
    table = [heading, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(heading))]
    return '\n'.join('  '.join(cell.rjust(width) if column else cell.ljust(width)
                               for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
                     for row in table) + '\n'  # fmt: skip


def side_by_side(runs, width):
    """The runs' samples as columns of a text, `width` characters wide in all; one below the other where too narrow."""
    with_sample = [run for run in runs if 'sample' in run.numbers]
    column = width // max(1, len(with_sample)) - 2
    if column < 24:
        return '\n'.join(f'---- {run.label} ----\n{run.numbers["sample"].strip()}\n' for run in with_sample)
    columns = []
    for run in with_sample:
        sample = run.numbers['sample'].strip().splitlines()
        lines = [part for line in sample for part in textwrap.wrap(line, column) or ['']]
        columns.append([run.label[:column], '-' * min(column, len(run.label)), *lines])
    rows = zip_longest(*columns, fillvalue='')
    return '\n'.join('  '.join(cell.ljust(column) for cell in row).rstrip() for row in rows) + '\n'


def curves(runs):
    """Losses over iterations, and the cache of each run, a Figure."""
    figure = Figure(figsize=(13, 4.8), layout='constrained')
    left, right = figure.subplots(1, 2, width_ratios=(3, 1.2))
    shown = []
    for number, run in enumerate(runs):
        look = dict(color=COLORS[number % 6], marker=MARKERS[number % 6], markersize=4)
        left.plot(*runlog.column(run.log, 'loss'), color=look['color'], linewidth=0.6, alpha=0.35)  # of single batches
        for split, line in (('val', '-'), ('train', '--')):
            x, y = runlog.column(run.log, f'{split}_loss')
            points = [(n, loss) for n, loss in zip(x, y, strict=True) if n]
            if points:
                left.plot(*zip(*points, strict=True), line, label=f'{run.label}: {split}', **look)
                shown.append(points)
    left.set_xscale('log')
    if shown:
        # the first iterations fall from ln(vocabulary) and would squeeze the end, where runs differ
        late = [loss for points in shown for n, loss in points if n >= points[-1][0] / 10]
        low, high = min(late), max(late)
        left.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.3 * (high - low) + 1e-3)
        last = max(points[-1][0] for points in shown)
        left.set_xlim(last / 30, last * 1.1)
        left.legend(fontsize=8)
    corpora = {run.numbers['corpus'] for run in runs if run.numbers}
    left.set(xlabel='iteration', ylabel='loss (nats per token)', title=' and '.join(sorted(corpora)))
    left.grid(alpha=0.3, which='both')
    measured = [(number, run) for number, run in enumerate(runs) if run.numbers]
    places = np.arange(len(measured))
    bars = right.barh(places, [run.numbers['cache_bytes_per_token'] for _, run in measured],
                      color=[COLORS[number % 6] for number, _ in measured])  # fmt: skip
    right.bar_label(bars, fmt='{:,.0f}', padding=3)
    right.set_yticks(places, [textwrap.fill(run.label, 18) for _, run in measured], fontsize=8)
    right.invert_yaxis()
    right.margins(x=0.25)
    dtypes = sorted({run.numbers['dtype'] for _, run in measured})
    right.set(xlabel='bytes', title=f'Cache per token ({" and ".join(dtypes)})')
    return figure
