"""The picture of decoding times over context length."""

import itertools
import re
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

WARM, COLD = ('#d9722e', '#e8a56f', '#8a8a8a'), ('#0d1b3d', '#2f5aa8', '#7fb0e0')  # of different brightness each
LINES = ('-', '--', '-.', ':')


def in_shares(name: str, n_embd: int) -> str:
    """A model's name with its latent size as a share of C, where that is a whole one: 'MLA, r = C/2'."""
    return re.sub(r'r=(\d+)', lambda r: f'r = C/{n_embd // int(r[1])}' if n_embd % int(r[1]) == 0 else r[0], name)


def decoding_figure(rows: list[dict[str, Any]], n_embd: int, setting: str) -> Figure:
    """
    Decoding time over context length, one panel per batch size, and cache size. Readable in grey.

    rows: dicts of bench.py's steps, with times in milliseconds and sizes in bytes. setting: the title.
    """
    rows = [row for row in rows if 'ms' in row and not row['name'].endswith((', no cache', ', eager'))]
    names = list(dict.fromkeys(row['name'] for row in rows))
    sizes = sorted({row['batch_size'] for row in rows})
    warm, cold = itertools.cycle(WARM), itertools.cycle(COLD)
    looks = {
        name: dict(color=next(cold if 'MLA' in name else warm), marker='os^Dv*'[n % 6], linestyle=LINES[n % 4])
        for n, name in enumerate(names)
    }
    figure = Figure(figsize=(4.2 * (len(sizes) + 1), 3.8), layout='constrained')
    axes = figure.subplots(1, len(sizes) + 1)
    for name in names:
        for axis, size in zip(axes, sizes, strict=False):
            own = [row for row in rows if row['name'] == name and row['batch_size'] == size]
            if not own:
                continue
            x, low, high = [r['context'] for r in own], *zip(*(r['ms_quartiles'] for r in own), strict=True)
            axis.plot(x, [row['ms'] for row in own], label=in_shares(name, n_embd), **looks[name])
            axis.fill_between(x, low, high, color=looks[name]['color'], alpha=0.15, linewidth=0)
            axis.set(title=f'batch size {size}', ylabel='time per step (ms)')
        caches = {row['context']: row['cache_bytes'] / row['batch_size'] / 2**20 for row in rows if row['name'] == name}
        axes[-1].plot(list(caches), list(caches.values()), **looks[name])
    axes[-1].set(title='cache of one sequence', ylabel='memory (MiB)')
    for axis in axes:
        axis.set(xlabel='context (tokens)', ylim=(0, None))
        if max(row['context'] for row in rows) > 64 * min(row['context'] for row in rows):
            axis.set_xscale('log', base=2)
        else:
            axis.set_xlim(0, None)
        axis.grid(color='0.9')
        axis.spines[['top', 'right']].set_visible(False)
    axes[0].legend(frameon=False)
    figure.suptitle(setting, fontsize='medium')
    return figure


def limits_figure(found: dict[str, dict[str, list[dict[str, Any]]]], lengths: Sequence[int], title: str) -> Figure:
    """
    What sizing.py expects of decoding, a column per shape: tokens/s of the largest batch above, that batch below.

    found: {shape: {model: its numbers at each length}}. Readable in grey.
    """
    figure = Figure(figsize=(4.3 * len(found), 7), layout='constrained')
    axes = figure.subplots(2, len(found), squeeze=False)
    for (name, models), (above, below) in zip(found.items(), axes.T, strict=True):
        for n, (label, rows) in enumerate(models.items()):
            rows = [row for row in rows if row['largest_batch']]
            look: dict[str, Any] = dict(
                color=str(0.65 * n / len(models)), marker='os^Dv*PX'[n % 8], linestyle=LINES[n % 4], label=label
            )
            look |= dict(markersize=6, markerfacecolor='white' if n % 2 else None)
            x = [row['context'] for row in rows]
            above.plot(x, [row['largest']['tokens_per_s'] for row in rows], **look)
            below.plot(x, [row['largest_batch'] for row in rows], **look)
        above.set_title(f'{name}: tokens/s of the largest batch')
        below.set_title(f'{name}: largest batch')
        for axis in (above, below):
            axis.spines[['top', 'right']].set_visible(False)
            if not any(row['largest_batch'] for rows in models.values() for row in rows):  # a log axis needs a number
                axis.text(0.5, 0.5, 'not one sequence fits', ha='center', transform=axis.transAxes)
                axis.set(xticks=[], yticks=[])
                continue
            axis.set(xscale='log', yscale='log', xlabel='context (tokens)')
            axis.set_xticks(lengths, [f'{n // 1024}k' if n % 1024 == 0 else str(n) for n in lengths])
            axis.set_xticks([], minor=True)
            axis.grid(color='0.9')
            axis.legend(frameon=False, fontsize='small')
    axes[0, 0].set_ylabel('tokens/s of all sequences')
    axes[1, 0].set_ylabel('sequences')
    figure.suptitle(title)
    return figure
