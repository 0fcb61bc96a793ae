"""The picture of decoding times over context length."""

import re
from typing import Any

from matplotlib.figure import Figure

from analysis import style


def look_of(name: str, n_embd: int) -> dict[str, Any]:
    """How the line of a row is drawn."""
    latent = re.search(r'r=(\d+)', name)
    variant = 2 if name.endswith(' cache') else int(name.endswith(('int8', 'int4')))
    return style.look(name, int(latent[1]) / n_embd if latent else 0, variant)


def in_shares(name: str, n_embd: int) -> str:
    """A model's name with its latent size as a share of C, where that is a whole one: 'MLA, r = C/2'."""
    return re.sub(r'r=(\d+)', lambda r: f'r = C/{n_embd // int(r[1])}' if n_embd % int(r[1]) == 0 else r[0], name)


def decoding_figure(rows: list[dict[str, Any]], n_embd: int, setting: str) -> Figure:
    """
    Decoding time over context length, one panel per batch size, and cache size. Readable in grey.

    rows: dicts of bench.py's steps, with times in milliseconds and sizes in bytes; ms_quartiles may be missing.
    setting: the title.
    """
    rows = [row for row in rows if 'ms' in row and not row['name'].endswith((', no cache', ', eager', ', compiled'))]
    names = list(dict.fromkeys(row['name'] for row in rows))
    sizes = sorted({row['batch_size'] for row in rows})
    looks = {name: look_of(name, n_embd) for name in names}
    figure = Figure(figsize=(style.WIDTH, 3.4))
    axes = figure.subplots(1, len(sizes) + 1)
    for name in names:
        for axis, size in zip(axes, sizes, strict=False):
            own = [row for row in rows if row['name'] == name and row['batch_size'] == size]
            if not own:
                continue
            x = [row['context'] for row in own]
            low, high = zip(*(row.get('ms_quartiles', (row['ms'], row['ms'])) for row in own), strict=True)
            axis.plot(x, [row['ms'] for row in own], **looks[name])
            axis.fill_between(x, low, high, color=looks[name]['color'], alpha=0.15, linewidth=0)
            axis.set(title=f'batch size {size}', ylabel='time per step (ms)')
        caches = {row['context']: row['cache_bytes'] / row['batch_size'] / 2**20 for row in rows if row['name'] == name}
        axes[-1].plot(list(caches), list(caches.values()), label=in_shares(name, n_embd), **looks[name])
    axes[-1].set(title='cache of one sequence', ylabel='memory (MiB)')
    for axis in axes:
        axis.set(xlabel='context (tokens)', ylim=(0, None))
        if max(row['context'] for row in rows) > 64 * min(row['context'] for row in rows):
            axis.set_xscale('log', base=2)
        else:
            axis.set_xlim(0, None)
    style.label_ends(axes[-1])
    figure.suptitle(setting)
    return figure
