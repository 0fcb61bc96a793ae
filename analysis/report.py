"""
What the measurements look like: text tables, figures, JSON and the page patterns.html.

A `result` is what find_induction_heads.py measures on one model and writes to induction.json, with numpy arrays for
lists. Tables are returned as text, figures as matplotlib Figures.
"""

import base64
import json
from pathlib import Path

import numpy as np
from matplotlib.axis import Axis, Tick
from matplotlib.figure import Figure
from matplotlib.text import Text

from analysis.induction import ranked
from analysis.latent import READINGS
from core.cli import errors
from core.cli.errors import printable
from core.cli.files import replacing, write_json

CUSTOMARY = 0.4  # the induction score above which a head is often called an induction head; shown for reference only


def plain(value):
    """`value` with arrays as lists, for JSON: numbers rounded to 6 significant digits, nan and inf as null."""
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f'{value:.6g}') if np.isfinite(value) else None
    return value


# ---- files -----------------------------------------------------------------------------------------------------------


def save_text(path, text):
    """Write a text file and say so on stderr. Raises OSError."""
    with replacing(path) as file:
        file.write(text)
    errors.notice(f'wrote {path}')


def save_json(path, value):
    """Write a value as JSON and say so on stderr; `plain` makes JSON of arrays. Raises OSError."""
    write_json(path, value)
    errors.notice(f'wrote {path}')


def save_figure(path, figure, dpi=150):
    """
    Write a Figure as PNG and say so on stderr. Raises OSError.

    Titles and labels are shown as they are: '$' in the name of a model or data set doesn't begin a formula. Only
    matplotlib's own texts, the numbers at the ticks, are parsed.
    """
    ticks = {label for tick in figure.findobj(Tick) for label in (tick.label1, tick.label2)}
    own = {axis.get_offset_text() for axis in figure.findobj(Axis)} | ticks
    for text in figure.findobj(Text):
        if text not in own:
            text.set(text=printable(text.get_text()), parse_math=False)
    with replacing(path, 'wb') as file:
        figure.savefig(file, format='png', dpi=dpi)
    errors.notice(f'wrote {path}')


# ---- tables ----------------------------------------------------------------------------------------------------------


def markdown_table(heading, rows, padded=False):
    """A Markdown table from column headings and rows of cells: a str that ends in a newline. padded: for a terminal."""
    if padded:
        table = [[str(cell) for cell in row] for row in (heading, *rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        heading, *rows = [
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
            for row in table
        ]
    lines = ['| ' + ' | '.join(heading) + ' |', '|' + '---|' * len(heading)]
    return '\n'.join(lines + ['| ' + ' | '.join(str(cell) for cell in row) + ' |' for row in rows]) + '\n'


def describe(facts):
    """One line about a model: file, attention, iteration, loss, size and checksum."""
    step = 'published weights' if facts['iteration'] is None else f'iteration {facts["iteration"]}'
    loss = '' if facts['val_loss'] is None else f', val loss {facts["val_loss"]:.4f}'
    width = f', r={facts["model_args"]["n_latent"]}' if facts['attention'] == 'mla' else ''
    return (f'{facts["name"]}: {facts["file"]}, {facts["attention"]}{width}, {step}{loss}, '
            f'{facts["parameters"]:,} parameters, sha256 {facts["sha256"][:12]}')  # fmt: skip


SORTS = {'induction': 'induction', 'previous': 'previous_token', 'duplicate': 'duplicate_token', 'copying': 'copying'}
CALLED = {'induction': 'induction heads', 'previous': 'previous-token heads', 'duplicate': 'duplicate-token heads',
          'copying': 'copying heads'}  # fmt: skip
LEGEND = """columns:
  head       layer.head; * is called what the table is sorted by: above the highest score of any head of untrained
             models, and for induction also above a shuffled copy, with copying > 0
  induction  attention from a token's second occurrence to what followed its first, on held-out sequences
  gap        the same with other tokens between the copies; prefix: with four copies, to all earlier successors
  dupl.      attention to the token's earlier occurrence; prev.: to the previous token
  copying    -1 to 1: does the head raise the logits of what it attends to? top-5: how often it is among the top 5
  K-lift     how strongly the keys read the output of an earlier head, over chance, and which head that is (from)
  ablation   rise of the loss on repeated tokens without the head, in nats per token
"""


def sorted_heads(result, sort):
    """Heads as (layer, head) by a name in SORTS, chosen on other sequences than those that are reported."""
    scores = result['copying_eigenvalues'] if sort == 'copying' else result[SORTS[sort]]['ranking']
    return ranked(scores)


def head_table(result, show=10, sort='induction'):
    """The `show` first heads of one model by `sort` with their scores, and its totals: a str without final newline."""
    score, lift = result['induction'], result['composition_lift']['k']
    gap = result.get('random gap', result['short'])['induction']['mean']
    ablation, called = result.get('ablation'), result['calls'][SORTS[sort]]
    heading = 'head    induction [95 %]        gap    prefix dupl.  prev.  copying  top-5  K-lift  from'
    lines = [heading + ('     ablation' if ablation else '')]
    for layer, head in sorted_heads(result, sort)[:show]:
        at = (layer, head)
        source, best = '', float('nan')
        if layer:
            source_at = np.unravel_index(np.nanargmax(lift[:, :, layer, head]), lift.shape[:2])
            source, best = f'{source_at[0]}.{source_at[1]}', lift[(*source_at, *at)]
        values = [result['four copies']['prefix_matching'], result['duplicate_token'], result['previous_token']]
        line = (f'{layer}.{head:<3}{"*" if called[at] else " "}  {score["mean"][at]:.3f} '
                f'[{score["low"][at]:.3f}, {score["high"][at]:.3f}]  {gap[at]:.3f}  '
                + '  '.join(f'{value["mean"][at]:.3f}' for value in values)
                + f'  {result["copying_eigenvalues"][at]:+7.2f} {result["copying_top5"][at]:6.2f}'
                f' {best:7.2f}  {source:<6}')  # fmt: skip
        lines.append(line + (f' {ablation["rise"][at]:+9.3f}' if ablation else ''))
    lines += text_lines(result['text'], show, sort) if 'text' in result else []
    lines += summary_lines(result)
    if 'latent' in result:
        lines += latent_lines(result['latent'], result['model_args']['n_latent'])
    lines.append(verdict_line(result, sort))
    return '\n'.join(lines)


def verdict_line(result, sort):
    """How many heads of a model are called what the table is sorted by, and how strong the strongest is."""
    name = SORTS[sort]
    called, null = result['calls'][name], result['nulls'][name]
    line = f'{result["name"]}: {called.sum()} of {called.size} heads are {CALLED[sort]}'
    if sort == 'copying':
        best = f'; the strongest scores {result["copying_eigenvalues"][called].max():.3f}' if called.any() else ''
        return line + best
    scores = result[name]['mean']
    if sort == 'induction':
        line += f', {(called & (scores > CUSTOMARY)).sum()} of them above the customary threshold {CUSTOMARY}'
    else:
        line += f', {(called & (scores > 2 * null)).sum()} of them with twice the score of any untrained head'
    if called.any():
        best = scores[called].max()
        line += f'; the strongest scores {best:.3f} of all attention (untrained heads: up to {null:.3f})'
        line += ': a weak effect' if best < 2 * null else ''
    return line


def text_lines(found, show, sort):
    """The first heads on a text of the user's own, by `sort` (copying is no matter of text: by induction)."""
    names = ('induction', 'duplicate_token', 'previous_token')
    name = SORTS[sort] if SORTS[sort] in names else 'induction'
    windows = f'{found["windows"]} window{"s" * (found["windows"] > 1)} of {found["tokens"]} tokens'
    headings = '  '.join(f'{heading + " [95 %]":<22}' for heading in ('induction', 'duplicate', 'previous'))
    lines = [f'on {found["file"]}, {windows}, by {name.replace("_", " ")}:', f'head   {headings}']
    for at in ranked(found[name]['mean'])[:show]:
        cells = (f'{found[n]["mean"][at]:.3f}'
                 + (f' [{found[n]["low"][at]:.3f}, {found[n]["high"][at]:.3f}]' if found['windows'] > 1 else '')
                 for n in names)  # fmt: skip
        lines.append(f'{at[0]}.{at[1]:<4} ' + '  '.join(f'{cell:<22}' for cell in cells))
    lines.append('chance ' + '  '.join(f'{found[n]["chance"]:<22.3f}' for n in names))
    return [line.rstrip() for line in lines]


def summary_lines(result):
    """The controls, losses and joint ablations of one model, as lines of text."""
    shuffled = float(result['shuffled']['mean'].max())
    loss, context = result['repeat_loss'], result['in_context']
    lines = [
        f'controls: chance {result["chance"]:.3f}, random init {result["random_null"]:.3f} (highest of all heads of '
        f'{len(result["random_init"])} models), shuffled copy {shuffled:.3f} (highest of all heads)',
        f'loss on repeated tokens {loss["mean"]:.3f} [{loss["low"]:.3f}, {loss["high"]:.3f}]',
    ]
    if context:
        lines.append(
            f'in-context score {context["mean"]:+.3f} [{context["low"]:+.3f}, {context["high"]:+.3f}]: '
            f'loss at token {context["late"]} minus token {context["early"]}, {context["windows"]} windows'
        )
    if result.get('bigrams'):
        lines.append(bigram_line(result['bigrams']))
    for step in result.get('ablation', {}).get('together', []):
        control = f'{step["control_heads"]} random other heads of the same layers: {step["control_rise"]:+.3f}'
        control = control if step['control_heads'] else 'the same layers have no other heads'
        lines.append(f'top {step["heads"]} ablated: {step["rise"]:+.3f}; {control}')
    for step in result.get('ablation', {}).get('on_text', []):
        line = (f'top {step["heads"]} ablated, on text: {step["repeated"]["mean"]:+.3f} at repeated bigrams, '
                f'{step["others"]["mean"]:+.3f} elsewhere')  # fmt: skip
        if step['control_heads']:
            line += (f'; {step["control_heads"]} random others: {step["control_repeated"]:+.3f}, '
                     f'{step["control_others"]:+.3f}')  # fmt: skip
        lines.append(line)
    return lines


def bigram_line(found):
    """The losses of a model on its validation data where the bigram occurred before in the window, and elsewhere."""
    cells = {name: f'{found[name]["mean"]:.3f} [{found[name]["low"]:.3f}, {found[name]["high"]:.3f}]'
             for name in ('repeated', 'others')}  # fmt: skip
    return (f'validation loss where the bigram occurred before in the window ({found["share"]:.0%} of positions) '
            f'{cells["repeated"]}, elsewhere {cells["others"]}')  # fmt: skip


def latent_lines(latent, r):
    """The measurements of MLA's latent, r = n_latent, as lines of text."""
    ranks = ', '.join(f'{rank:.1f}' for rank in latent['effective_rank'])
    lines = [f'latent: effective rank per layer {ranks} of {r}']
    for name in READINGS:
        overlap = latent[f'{name}_overlap']
        if name != 'key_value':  # a head's overlap with itself is 1
            overlap = overlap[:, ~np.eye(overlap.shape[1], dtype=bool)]
        by_layer = ', '.join(f'{layer.mean():.2f}' for layer in overlap)
        chance = latent[f'{name}_overlap_chance']
        lines.append(f'latent: overlap of the subspaces that heads read, {name.replace("_", "-")}, per layer '
                     f'{by_layer}; chance {chance:.2f}')  # fmt: skip
    return lines


def formation_table(run):
    """The best scores at each checkpoint of one run (see find_induction_heads.py's `formation`): a str."""
    lines = [run['name'], '  iteration  induction  head  previous  head  repeat loss  in-context']
    for row in run['checkpoints']:
        first, second = row['induction'], row['previous_token']
        context = f'{row["in_context"]["mean"]:+.3f}' if row['in_context'] else 'n/a'
        lines.append(f'  {row["iteration"]:9}  {first["mean"]:9.3f}  {first["head"][0]}.{first["head"][1]:<3}'
                     f'{second["mean"]:9.3f}  {second["head"][0]}.{second["head"][1]:<3}'
                     f'{row["repeat_loss"]["mean"]:12.3f}  {context:>10}')  # fmt: skip
    return '\n'.join(lines)


# ---- figures ---------------------------------------------------------------------------------------------------------


def heat_maps(results):
    """
    Induction scores by layer and head, a column per model: the model with its numbers, random init and shuffled copy
    small below. One color scale, up to the largest score.
    """
    rows = ('second copy', 'control: random init', 'control: second copy shuffled')
    figure = Figure(figsize=(1.6 + 3.4 * len(results), 8.6), layout='constrained')
    axes = figure.subplots(3, len(results), squeeze=False, height_ratios=(3, 1, 1))
    columns = [(result['induction']['mean'], result['random_init'].max(0), result['shuffled']['mean'])
               for result in results]  # fmt: skip
    top = max(0.1, *(panel.max() for panels in columns for panel in panels))
    for column, (result, panels) in enumerate(zip(results, columns, strict=True)):
        for axis, panel, name in zip(axes[:, column], panels, rows, strict=True):
            image = axis.imshow(panel, vmin=0, vmax=top, cmap='viridis', aspect='auto')
            axis.set(xlabel='head', ylabel='layer', title=f'{result["name"]}\n{name}', xticks=range(panel.shape[1]),
                     yticks=range(panel.shape[0]))  # fmt: skip
            axis.tick_params(labelsize=7)
            axis.title.set_fontsize(9)
        for (layer, head), score in np.ndenumerate(panels[0]):
            color = 'black' if score > 0.6 * top else 'white'
            label = f'{score:.2f}'.lstrip('0') + '*' * bool(result['called'][layer, head])
            size = min(9, 60 / panels[0].shape[1])  # points: a panel is about 3 inches wide
            axes[0, column].text(head, layer, label, ha='center', va='center', color=color, size=size)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, label='induction score (*: above both controls, and copies)')
    if top > CUSTOMARY:
        bar.ax.axhline(CUSTOMARY, color='white', linewidth=1.5)
    return figure


PANELS = (
    ('induction', 'best induction score'),
    ('previous_token', 'best previous-token score'),
    ('repeat_loss', 'loss on repeated tokens (nats)'),
    ('in_context', 'in-context score (nats)'),
    ('bigram_gain', 'what a repeated bigram saves (nats)'),
)


def formation_curves(runs):
    """Best scores and losses over training, one line per run, shaded by their intervals."""
    shown = [panel for panel in PANELS if any(row[panel[0]] for run in runs for row in run['checkpoints'])]
    figure = Figure(figsize=(3.75 * len(shown), 3.6), layout='constrained')
    axes = figure.subplots(1, len(shown))
    styles = ('-o', '--s', '-.^', ':D')
    for number, run in enumerate(runs):
        for axis, (name, title) in zip(axes, shown, strict=True):
            rows = [row for row in run['checkpoints'] if row[name]]
            x, mean = [row['iteration'] for row in rows], [row[name]['mean'] for row in rows]
            axis.plot(x, mean, styles[number % 4], label=run['name'], markersize=3)
            axis.fill_between(x, [row[name]['low'] for row in rows], [row[name]['high'] for row in rows], alpha=0.2)
            axis.set(xlabel='iteration', title=title)
    axes[0].axhline(max(run['random_null'] for run in runs), color='grey', linewidth=0.8)
    axes[0].axhline(CUSTOMARY, color='grey', linewidth=0.8, linestyle=':')
    for axis in axes[:2]:
        axis.set_ylim(0, 1)
    axes[0].legend(fontsize=8)
    return figure


# ---- patterns.html ---------------------------------------------------------------------------------------------------


def packed_patterns(pattern):
    """The lower triangles of patterns (L, H, T, T), a tensor, at one byte per weight: a base64 str for the page."""
    rows, columns = np.tril_indices(pattern.size(-1))
    weights = (pattern[..., rows, columns] * 255).round().numpy().astype(np.uint8)
    return base64.b64encode(weights.tobytes()).decode('ascii')


def page(models):
    """
    patterns.html with the data of some models, one dict each: a str.

    name: a line of text; layers, heads: ints; scores, called: (L, H); sequences: a list of dicts with title, tokens (a
    list of str) and data (packed_patterns).
    """
    template = Path(__file__).with_name('patterns.html').read_text(encoding='utf-8')
    # '<' is escaped, or a token could end the script element
    return template.replace('__DATA__', json.dumps(plain(models)).replace('<', '\\u003c'))
