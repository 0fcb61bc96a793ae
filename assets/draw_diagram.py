"""
Draw what MHA and MLA compute and cache for a token, box widths to scale: assets/mha_mla.png.

$ python assets/draw_diagram.py
"""

from itertools import pairwise
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

PLAIN, CACHED = '#ffffff', '#f2c078'
C, R, HEADS = 1.0, 0.5, 4  # widths: of n_embd, of a latent of C/2, and how many heads compare with it
TALL = 0.34  # of a box

figure = Figure(figsize=(9, 4.3), layout='constrained')
mha, mla, absorbed = figure.subplots(1, 3)


def box(panel, x, y, width, text, color=PLAIN):
    """A box of `width` numbers centered on (x, y)."""
    panel.add_patch(Rectangle((x - width / 2, y - TALL / 2), width, TALL, facecolor=color, edgecolor='black'))
    panel.text(x, y, text, ha='center', va='center', fontsize=9)


def arrows(panel, text, *places):
    """Arrows from box to box by their centers; text: the matrix, beside the first arrow."""
    for (x, y), (to_x, to_y) in pairwise(places):
        look = dict(arrowstyle='-|>', mutation_scale=10, color='black', linewidth=0.9, shrinkA=0, shrinkB=0)
        panel.add_patch(FancyArrowPatch((x, y + TALL / 2), (to_x, to_y - TALL / 2), **look))
    (x, y), (to_x, to_y) = places[:2]
    behind = dict(facecolor='white', edgecolor='none', pad=1)
    panel.text((x + to_x) / 2, (y + to_y) / 2, text, ha='center', va='center', fontsize=9, bbox=behind)


def attention(panel, text, title, cached, output='$W_O$'):
    """The input, the top boxes, and what is cached, the same in all panels."""
    box(panel, 1.7, 0, C, 'x: C')
    box(panel, 1.7, 3, 3.3, text)
    box(panel, 1.7, 4, C, 'output: C')
    arrows(panel, output, (1.7, 3), (1.7, 4))
    panel.set(xlim=(0, 3.4), ylim=(-0.75, 4.3))
    panel.set_title(title, fontsize=10, weight='bold')
    panel.text(1.7, -0.55, cached, ha='center', fontsize=9)
    panel.axis('off')


attention(mha, 'softmax(q · k) v, in each head', 'MHA', 'cached for each token: 2C numbers')
for x, name in ((0.55, 'q'), (1.7, 'k'), (2.85, 'v')):
    box(mha, x, 1.5, C, f'{name}: C', PLAIN if name == 'q' else CACHED)
    arrows(mha, f'$W_{name.upper()}$', (1.7, 0), (x, 1.5))
    arrows(mha, '', (x, 1.5), (x, 3))

attention(mla, 'softmax(q · k) v, in each head', 'MLA, training', 'cached for each token: r numbers (here C/2)')
box(mla, 0.55, 2, C, 'q: C')
box(mla, 2.275, 1, R, 'c: r', CACHED)
arrows(mla, '$W_Q$', (1.7, 0), (0.55, 2), (0.55, 3))
arrows(mla, '$W_D$', (1.7, 0), (2.275, 1))
for x, name in ((1.7, 'k'), (2.85, 'v')):
    box(mla, x, 2, C, f'{name}: C')
    arrows(mla, f'$W_{name.upper()}$', (2.275, 1), (x, 2), (x, 3))

title, cached = 'MLA, decoding (absorbed)', 'no key and no value is ever made'
attention(absorbed, 'softmax(q · c) c, in each head', title, cached, '$W_O\\,W_V$')
box(absorbed, 0.55, 1, C, 'q: C')
box(absorbed, 1.05, 2, HEADS * R, 'q: r for each of 4 heads')
box(absorbed, 2.85, 2, R, 'c: r', CACHED)
arrows(absorbed, '$W_Q$', (1.7, 0), (0.55, 1))
arrows(absorbed, '$W_K^T$', (0.55, 1), (1.05, 2), (1.05, 3))
arrows(absorbed, '$W_D$', (1.7, 0), (2.85, 2), (2.85, 3))
figure.suptitle('MLA caches one latent instead of keys and values (boxes to scale, orange: cached)', fontsize=11)
path = Path(__file__).with_name('mha_mla.png')
figure.savefig(path, dpi=150)
print(f'wrote {path}')
