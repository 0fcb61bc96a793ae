"""
How figures look: every color, one look for each attention wherever it is drawn, and sizes for the README's column.

MHA is orange, GQA and MQA are green, MLA is blue: the smaller its latent, the lighter and the more broken the line.
Every look differs from the others in brightness or line, so that figures can be read in grey. Importing this module
sets matplotlib's defaults.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

WIDTH = 9  # inches: 900 pixels of the README's column, at which 10 points are 14 pixels
GREY = '#8c8c8c'  # lines that only help to read, and what a line is compared with

matplotlib.rcParams.update(
    {
        'font.size': 10,
        'axes.titlesize': 10,
        'axes.spines.top': False,
        'axes.spines.right': False,
        'axes.axisbelow': True,  # the grid is behind bars, too
        'axes.grid': True,
        'axes.unicode_minus': True,
        'grid.color': '#e6e6e6',
        'figure.titlesize': 11,
        'legend.fontsize': 8.5,
        'legend.frameon': False,
        'lines.linewidth': 1.7,
        'lines.markersize': 4.5,
        'figure.constrained_layout.use': True,
    }
)

OTHERS = {
    'MHA': dict(color='#d9722e', linestyle='-', marker='o'),
    'GQA': dict(color='#79a86b', linestyle='--', marker='P'),
    'MQA': dict(color='#3b7a4b', linestyle='-.', marker='s'),
    'Hug': dict(color=GREY, linestyle=':', marker='s'),  # Hugging Face's, where speed is compared
}
# the least share of n_embd that the latent has, and how such an MLA is drawn
LATENTS = (
    (0.6, dict(color='#0d1b3d', linestyle=(0, (5, 1, 1, 1, 1, 1)), marker='D')),
    (0.4, dict(color='#1f4e9e', linestyle='-', marker='^')),
    (0.2, dict(color='#4f8fd0', linestyle='--', marker='v')),
    (0.1, dict(color='#84b6e4', linestyle='-.', marker='X')),
    (0.0, dict(color='#b3cfea', linestyle=':', marker='d')),
)
VARIANTS: tuple[dict, ...] = (
    {},
    dict(linestyle=(0, (1, 1)), markerfacecolor='white'),
    dict(linestyle=(0, (6, 1.5)), markerfacecolor='white', marker='*'),
    dict(linestyle=(0, (3, 1, 1, 1)), markerfacecolor='white', marker='p'),
)


def look(label: str, latent: float = 0.0, variant: int = 0) -> dict:
    """
    The keys with which matplotlib draws a model's line.

    label: begins with MHA, GQA, MQA or MLA. latent: of MLA, n_latent / n_embd, where the label doesn't name it as in
    'MLA, r=C/2' or 'MLA, r=2C/3'. variant: 1 to 3 for further models of the same attention, which get hollow markers
    and a line of their own.
    """
    found = re.search(r'r ?= ?(\d*)C(?:/(\d+))?', label)
    if found and not latent:
        latent = int(found[1] or 1) / int(found[2] or 1)
    of_mla = next(look for least, look in LATENTS if latent >= least)
    return OTHERS.get(label[:3], of_mla) | VARIANTS[variant % len(VARIANTS)]


def side_by_side(sizes: Sequence[float], gap: float) -> list[tuple[float, bool]]:
    """Places on a log axis, those of one size moved right by the factor `gap`, and whose label goes to the left."""
    seen: Counter = Counter()
    places = []
    for size in sizes:
        places.append((size * gap ** seen[size], not seen[size] and sizes.count(size) > 1))
        seen[size] += 1
    return places


def label_ends(axes: Axes, gap: float = 0.07) -> None:
    """Write the label of each line beside its right end, `gap` of the height apart, in place of a legend."""
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith('_')]
    axes.get_ylim()  # settles the limits, on which the places depend
    to_fraction, last = axes.transData + axes.transAxes.inverted(), float('-inf')
    ends = [(float(np.asarray(to_fraction.transform(line.get_xydata()))[-1, 1]), line) for line in lines]
    for height, line in sorted(ends, key=lambda end: end[0]):
        last = max(height, last + gap)
        place: dict[str, Any] = dict(xycoords='axes fraction', va='center', fontsize=8.5, color=line.get_color())
        axes.annotate(str(line.get_label()), (1.02, last), **place)
