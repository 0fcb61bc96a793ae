"""
Runs side by side: what they are, their losses on the same windows, their curves and samples.

Notable features:
- a run is a folder of train.py's, finished or still training; only its files are read
- losses are compared window by window, wherever two runs share data set and block size
"""

import os
import textwrap
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from analysis import style
from core.cli import machine
from core.cli.errors import UserError
from core.runs import checkpoint as checkpoints
from core.runs import evaluation, models
from core.runs import log as runlog
from core.runs.resume import OLDER
from model import GPT
from model_mla import MLAConfig

# differ between any two runs, and say nothing about what they learned
OF_THE_RUN = {'out_dir', 'resume', 'overwrite', 'init_from', 'wandb_run_name', 'wandb_project', 'wandb_log'}
OF_THE_RUN |= {'threads', 'device', 'backend', 'data_dir', 'eval_only', 'always_save_checkpoint', 'log_interval'}
OF_THE_RUN |= {'eval_interval', 'eval_iters', 'checkpoint_interval', 'keep_checkpoints'}
IN_THE_NAME = {'attention', 'n_kv_head', 'n_latent'}  # of the attention: 'MQA', or 'MLA, r=64'
LOGGED = ['iter', 'loss', 'train_loss', 'val_loss', 'tokens_per_s']  # the columns of log.csv that are shown


@dataclass
class Run:
    """One run as its folder has it: its checkpoint's dict, None before the first save, and the LOGGED columns."""

    folder: str
    saved: dict | None
    log: dict[str, np.ndarray] | None
    label: str = ''
    numbers: dict[str, Any] = field(default_factory=dict)  # what compare.py measured
    losses: torch.Tensor | None = None  # of each validation window, nats per token
    windows: tuple = ()  # what two runs must share for their losses to be of the same windows

    @property
    def done(self) -> bool:
        """True for a run that has reached its last iteration."""
        return self.saved is not None and self.iterations >= self.saved['config'].get('max_iters', 0)

    @property
    def iterations(self) -> int:
        """The iteration of the checkpoint; 0 where there is none yet, or it says none (nanoGPT's, a conversion's)."""
        return (self.saved or {}).get('iter_num') or 0


def read(folder: str) -> Run:
    """The Run in a folder. UserError where there is neither a checkpoint nor a log."""
    paths = [os.path.join(folder, name) for name in ('ckpt.pt', 'log.csv')]
    if not any(map(os.path.exists, paths)):
        raise UserError(f'{folder} holds no run: neither ckpt.pt nor log.csv; name the out_dir of a training')
    saved = checkpoints.load(paths[0], mapped=True) if os.path.exists(paths[0]) else None
    return Run(folder, saved, runlog.read(paths[1], LOGGED) if os.path.exists(paths[1]) else None)


def label(runs: list[Run]) -> None:
    """Name each run by its attention and by every training key in which it differs from another."""
    settings = {}
    for number, run in enumerate(runs):
        run.label = f'{run.folder} (nothing saved yet)'
        if run.saved:
            model_config = models.model_config(run.saved)
            run.label = models.label_of(model_config)
            settings[number] = OLDER | run.saved['config'] | asdict(model_config)
            if not isinstance(model_config, MLAConfig):  # train.py saves MLA's keys for MHA too, where they do nothing
                settings[number] = {key: value for key, value in settings[number].items() if key not in models.MLA_KEYS}
    keys = dict.fromkeys(key for own in settings.values() for key in own if key not in OF_THE_RUN | IN_THE_NAME)
    for key in keys:
        values = {number: own[key] for number, own in settings.items() if key in own}
        if len(set(values.values())) > 1:
            for number, value in values.items():
                runs[number].label += f', {key}={value}'
    for name, count in Counter(run.label for run in runs).items():
        if count > 1:
            for number, run in enumerate([run for run in runs if run.label == name], 1):
                run.label += f' ({number})'


def logged(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and values of a run's log, where the column `name` was measured."""
    if run.log is None:
        return np.empty(0), np.empty(0)
    measured = ~np.isnan(run.log[name])
    return run.log['iter'][measured], run.log[name][measured]


def sizes(model: GPT, dtype: str = 'float32') -> dict[str, int]:
    """A dict of a model's parameters, FLOPs per token of training, and bytes per token of a cache in `dtype`."""
    return dict(
        parameters=model.get_num_params(),
        attention_parameters=models.attention_params(model),
        flops_per_token=model.flops_per_token(),
        cache_bytes_per_token=model.init_cache(1, dtype=machine.DTYPES[dtype]).bytes_per_token,
    )


def difference(run: Run, first: Run) -> tuple[float, float] | None:
    """Mean of a run's losses minus those of `first` and the half width of its 95 % interval; None on other windows."""
    if run is first or run.losses is None or first.losses is None or run.windows != first.windows:
        return None
    mean, error = evaluation.mean_and_stderr(run.losses - first.losses)
    return mean, 1.96 * error


def table(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """The heading and the rows of the table, one row for each run."""
    heading = ['run', 'iteration', 'parameters', 'FLOPs per token', 'cache bytes per token', 'tokens/s', 'val loss']
    heading += ['minus the first']
    rows = []
    for run in runs:
        n, gap = run.numbers, difference(run, runs[0])
        if not n or run.saved is None:
            rows.append([run.label, *[''] * 7])
            continue
        of = '' if run.done else f' of {run.saved["config"]["max_iters"]:,}'
        cells = [run.label, f'{n["iterations"]:,}{of}']
        cells += [f'{n[name]:,}' for name in ('parameters', 'flops_per_token', 'cache_bytes_per_token')]
        cells += [f'{n["tokens_per_s"]:,.0f}' if n['tokens_per_s'] else '']
        cells += [f'{n["val_loss"]:.4f} ± {n["val_stderr"]:.4f}', f'{gap[0]:+.4f} ± {gap[1]:.4f}' if gap else '']
        rows.append(cells)
    return heading, rows


def side_by_side(runs: list[Run], width: int) -> str:
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


def looks(runs: list[Run]) -> list[dict]:
    """How each run's line is drawn: by its attention and the size of its latent, with variants of the same."""
    sizes = [(run.saved or {}).get('model_args', {}) for run in runs]
    found = [(r.label[:3], s.get('n_latent', 0) / s.get('n_embd', 1)) for r, s in zip(runs, sizes, strict=True)]
    return [style.look(*kind, variant=found[:number].count(kind)) for number, kind in enumerate(found)]


def curves(runs: list[Run]) -> Figure:
    """Losses over iterations, and the cache of each run."""
    figure = Figure(figsize=(13, 4.8), layout='constrained')
    left, right = figure.subplots(1, 2, width_ratios=(3, 1.2))
    drawn = []
    for run, look in zip(runs, looks(runs), strict=True):
        left.plot(*logged(run, 'loss'), color=look['color'], linewidth=0.6, alpha=0.35)  # of single batches
        for split, more in (('val', {}), ('train', dict(marker='', linewidth=0.9))):
            x, y = logged(run, f'{split}_loss')
            x, y = x[x > 0], y[x > 0]
            if len(x):
                left.plot(x, y, label=f'{run.label}: {split}', **look | more)
                drawn.append((x, y))
    left.set_xscale('log')
    if drawn:
        # the first iterations fall from ln(vocabulary) and would squeeze the end, where runs differ
        late = np.concatenate([y[x >= x[-1] / 10] for x, y in drawn])
        low, high = late.min(), late.max()
        left.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.3 * (high - low) + 1e-3)
        last = max(x[-1] for x, _ in drawn)
        left.set_xlim(last / 30, last * 1.1)
        left.legend(loc='upper right', fontsize=8)
    corpora = {run.numbers['corpus'] for run in runs if run.numbers}
    left.set(xlabel='iteration', ylabel='loss (nats per token)', title=' and '.join(sorted(corpora)))
    measured = [(look['color'], run) for look, run in zip(looks(runs), runs, strict=True) if run.numbers]
    places = np.arange(len(measured))
    sizes = [run.numbers['cache_bytes_per_token'] for _, run in measured]
    bars = right.barh(places, sizes, color=[color for color, _ in measured])
    right.bar_label(bars, fmt='{:,.0f}', padding=3)
    right.set_yticks(places, [textwrap.fill(run.label, 18) for _, run in measured], fontsize=8)
    right.invert_yaxis()
    right.margins(x=0.25)
    dtypes = sorted({run.numbers['dtype'] for _, run in measured})
    right.set(xlabel='bytes', title=f'Cache per token ({" and ".join(dtypes)})')
    return figure
