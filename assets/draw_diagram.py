"""
Draw what differs between MHA and MLA, in training and in absorbed decoding: assets/mha_mla.png.

$ python assets/draw_diagram.py
"""

import os
from itertools import pairwise

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

figure, panels = plt.subplots(1, 3, figsize=(19.5, 5.6), layout='constrained')
PLAIN, CACHED, WEIGHT = '#ffffff', '#f2c078', '#d9e2ef'


def box(panel, x, y, text, color=PLAIN, width=1.9):
    """A labeled box centered on (x, y)."""
    edge = dict(boxstyle='round,pad=0.04', facecolor=color, edgecolor='black', linewidth=2.2 if color == CACHED else 1)
    panel.add_patch(FancyBboxPatch((x - width / 2, y - 0.26), width, 0.52, **edge))
    panel.text(x, y, text, ha='center', va='center', fontsize=11)


def arrows(panel, *places):
    """Arrows from the top of each box to the bottom of the next, by the boxes' centers."""
    for (x, y), (to_x, to_y) in pairwise(places):
        look = dict(arrowstyle='-|>', mutation_scale=13, color='black', linewidth=1)
        panel.add_patch(FancyArrowPatch((x, y + 0.3), (to_x, to_y - 0.3), **look))


def shared_top(panel, y, title):
    """Attention and output projection, the same in both."""
    box(panel, 3.4, y, 'softmax(q k$^T$ / $\\sqrt{d}$) v, per head', width=4.6)
    box(panel, 3.4, y + 1, '$W_O$: C to C', WEIGHT, width=4.6)
    arrows(panel, (3.4, y), (3.4, y + 1))
    panel.set(xlim=(0, 6.8), ylim=(-0.5, 6.6), title=title)
    panel.axis('off')


mha, mla, absorbed = panels
shared_top(mha, 5, 'Multi-head attention (MHA): caches 2C numbers per token and layer')
box(mha, 3.4, 0, 'x: C', width=4.6)
for x, name, stored in ((1.2, 'q', False), (3.4, 'k', True), (5.6, 'v', True)):
    box(mha, x, 1.6, f'$W_{name.upper()}$: C to C', WEIGHT)
    box(mha, x, 3.4, f'{name}: H x d' + (' (cached)' if stored else ''), CACHED if stored else PLAIN)
    arrows(mha, (x, 0), (x, 1.6), (x, 3.4), (x, 5))

shared_top(mla, 5, 'Multi-head latent attention (MLA): caches r numbers per token and layer')
box(mla, 3.4, 0, 'x: C', width=4.6)
box(mla, 1.2, 1, '$W_Q$: C to C', WEIGHT)
box(mla, 4.5, 1, '$W_D$: C to r', WEIGHT)
box(mla, 4.5, 2, 'latent c: r (cached)', CACHED, width=2.5)
for x, name in ((3.4, 'k'), (5.6, 'v')):
    box(mla, x, 3, f'$W_{name.upper()}$: r to C', WEIGHT)
    box(mla, x, 4, f'{name}: H x d')
    arrows(mla, (4.5, 2), (x, 3), (x, 4), (x, 5))
box(mla, 1.2, 4, 'q: H x d')
arrows(mla, (1.2, 0), (1.2, 1), (1.2, 4), (1.2, 5))
arrows(mla, (4.5, 0), (4.5, 1), (4.5, 2))

absorbed.set(xlim=(0, 6.8), ylim=(-0.5, 6.6), title='MLA decoding, absorbed: the same outputs, no keys or values')
absorbed.axis('off')
box(absorbed, 3.4, 0, 'x: C, of the new token', width=6)
box(absorbed, 1.9, 1, '$W_Q$: C to C', WEIGHT)
box(absorbed, 1.9, 2, '$W_K^T$: d to r, per head', WEIGHT, width=3.4)
box(absorbed, 5.2, 1, '$W_D$: C to r', WEIGHT, width=2.6)
box(absorbed, 5.2, 2, 'latents c: T x r (cached)', CACHED, width=2.6)
box(absorbed, 3.4, 3.4, 'softmax(q c$^T$ / $\\sqrt{d}$) c, per head: H x r', width=5.2)
box(absorbed, 3.4, 4.6, '$W_V$: r to d, per head', WEIGHT, width=4.6)
box(absorbed, 3.4, 6, '$W_O$: C to C', WEIGHT, width=4.6)
for x in (1.9, 5.2):
    arrows(absorbed, (x, 0), (x, 1), (x, 2), (x, 3.4))
arrows(absorbed, (3.4, 3.4), (3.4, 4.6), (3.4, 6))
path = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'mha_mla.png')
figure.savefig(path, dpi=110)
print(f'wrote {path}')
