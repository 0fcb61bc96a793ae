"""
What the measurements look like: text tables, figures, JSON and the page patterns.html.

A `result` is what find_induction_heads.py measures on one model and writes to induction.json, with numpy arrays for
lists. Tables are returned as text, figures as matplotlib Figures.
"""

import base64
import json
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from matplotlib.axis import Axis, Tick
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from analysis import stats, style
from analysis.induction import ranked
from analysis.latent import READINGS
from core.cli import errors
from core.cli.errors import printable
from core.cli.files import replacing

Head = tuple[int, int]  # (layer, head)
CUSTOMARY = 0.4  # the induction score above which a head is often called an induction head; shown for reference only


def plain(value: Any) -> Any:
    """`value` with arrays as lists, for JSON: numbers rounded to 6 significant digits, nan and inf as null."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return float(f'{value:.6g}') if np.isfinite(value) else None
    return value


# ---- files -----------------------------------------------------------------------------------------------------------


def save_text(path: str | Path, text: str) -> None:
    """Write a text file and say so on stderr. Raises OSError."""
    with replacing(path) as file:
        file.write(text)
    errors.notice(f'wrote {path}')


def save_json(path: str | Path, value: Any) -> None:
    """Write a value as JSON and say so on stderr; `plain` makes JSON of arrays. Raises OSError."""
    save_text(path, json.dumps(value, indent=1) + '\n')


def save_figure(path: str | Path, figure: Figure, dpi: int = 150) -> None:
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


def markdown_table(heading: Sequence[str], rows: Iterable[Sequence], padded: bool = False) -> str:
    """A Markdown table from column headings and rows of cells; it ends in a newline. padded: for a terminal."""
    table = [[str(cell) for cell in row] for row in (heading, *rows)]
    if padded:
        first, *others = [max(map(len, column)) for column in zip(*table, strict=True)]
        table = [[row[0].ljust(first), *map(str.rjust, row[1:], others)] for row in table]
    lines = ['| ' + ' | '.join(row) + ' |' for row in table]
    return '\n'.join([lines[0], '|' + '---|' * len(heading), *lines[1:]]) + '\n'


def spread(values: Iterable[float | None], form: str = '.3f') -> str:
    """A cell: the mean of what isn't None ± half of its 95 % t interval, or of few values mean [lowest, highest]."""
    found = [value for value in values if value is not None]
    if not found:
        return 'n/a'
    center, half = stats.t_interval(found)
    if half is not None:
        return f'{center:{form}} ± {half:{form.lstrip("+")}}'
    low, high = min(found), max(found)
    return f'{center:{form}}' + (f' [{low:{form}}, {high:{form}}]' if high > low else '')


def cells(rows: Sequence[dict], *keys: str, form: str = '.3f') -> list[str]:
    """Cells with the `spread` over dicts of each of their numbers `keys`."""
    return [spread((row[key] for row in rows), form) for key in keys]


def grouped(rows: Iterable[dict], name: Callable[[dict], Any]) -> dict[Any, list[dict]]:
    """The rows by name(row), in their order."""
    found: dict[Any, list[dict]] = {}
    for row in rows:
        found.setdefault(name(row), []).append(row)
    return found


def when(times: Sequence[float | None], form: str = '.0f') -> str:
    """A table's cell: median and range of the times at which runs formed heads; None where one never did."""
    formed = sorted(time for time in times if time is not None)
    if not formed:
        return f'never (0 of {len(times)})'
    ends = f' [{formed[0]:{form}}, {formed[-1]:{form}}]' if formed[0] != formed[-1] else ''
    missing = f' ({len(formed)} of {len(times)})' if len(formed) < len(times) else ''
    return f'{median(formed):{form}}{ends}{missing}'


def with_interval(found: dict, form: str = '.3f') -> str:
    """A mean and its interval, of numbers: 0.123 [0.100, 0.150]."""
    return f'{found["mean"]:{form}} [{found["low"]:{form}}, {found["high"]:{form}}]'


def at_head(found: dict, at: Head) -> dict[str, float]:
    """One head's part of a score's arrays (L, H): mean, low, high."""
    return {name: found[name][at] for name in ('mean', 'low', 'high')}


def describe(facts: dict) -> str:
    """One line about a model: file, attention, iteration, loss, size and checksum."""
    width = f', r={facts["model_args"]["n_latent"]}' if facts['attention'] == 'mla' else ''
    step = 'published weights' if facts['iteration'] is None else f'iteration {facts["iteration"]}'
    loss = '' if facts['val_loss'] is None else f', val loss {facts["val_loss"]:.4f}'
    checksum = '' if facts['sha256'] is None else f', sha256 {facts["sha256"][:12]}'
    what = f'{facts["attention"]}{width}, {step}{loss}, {facts["parameters"]:,} parameters{checksum}'
    return f'{facts["name"]}: {facts["file"]}, {what}'


SORTS = {name.split('_')[0]: name for name in ('induction', 'previous_token', 'duplicate_token', 'sink', 'copying')}
ON_TEXT = ('induction', 'duplicate_token', 'previous_token', 'sink')
LEGEND = """columns:
  head       layer.head; * is called what the table is sorted by: above the highest score of any head of untrained
             models, and for induction also above a shuffled copy, with copying > 0
  induction  attention from a token's second occurrence to what followed its first, on held-out sequences
  gap        the same with other tokens between the copies; prefix: with four copies, to all earlier successors
  dupl.      attention to the token's earlier occurrence; prev.: to the previous token
  sink       attention to the first token, whatever it is; a head that attends to nothing else is idle
  copying    -1 to 1: does the head raise the logits of what it attends to? top-5: how often it is among the top 5
  K-lift     how strongly the keys read the output of an earlier head, over chance, and which head that is (from)
  ablation   rise of the loss on repeated tokens without the head, in nats per token
"""


def head_table(result: dict, show: int = 10, sort: str = 'induction') -> str:
    """The `show` first heads of one model by `sort`, a name in SORTS, with their scores, and the model's totals."""
    ablation = result.get('ablation')
    heading = 'head    induction [95 %]        gap    prefix dupl.  prev.  sink   copying  top-5  K-lift  from'
    lines = [heading + ('     ablation' if ablation else '')]
    # chosen on other sequences than those that are reported
    order = ranked(result['copying_eigenvalues'] if sort == 'copying' else result[SORTS[sort]]['ranking'])
    for at in order[:show]:
        lines.append(head_line(result, at, result['calls'][SORTS[sort]][at]))
        lines[-1] += f' {ablation["rise"][at]:+9.3f}' if ablation else ''
    lines += text_lines(result['text'], show, sort) if 'text' in result else []
    lines += summary_lines(result)
    if 'latent' in result:
        lines += latent_lines(result['latent'], result['model_args']['n_latent'])
    return '\n'.join([*lines, verdict_line(result, sort)])


def head_line(result: dict, at: Head, called: bool) -> str:
    """The scores of one head of a model."""
    layer, head = at
    reads, lift = '', float('nan')
    if layer and result['composition_lift']:
        lifts = result['composition_lift']['k'][:, :, layer, head]
        source = np.unravel_index(np.nanargmax(lifts), lifts.shape)
        reads, lift = f'{source[0]}.{source[1]}', lifts[source]
    others = [
        result.get('random gap', result['short'])['induction'],
        result['four copies']['prefix_matching'],
        *(result[name] for name in ('duplicate_token', 'previous_token', 'sink')),
    ]
    scores = '  '.join(f'{score["mean"][at]:.3f}' for score in others)
    copying = f'{result["copying_eigenvalues"][at]:+7.2f} {result["copying_top5"][at]:6.2f}'
    induction = with_interval(at_head(result['induction'], at))
    return f'{layer}.{head:<3}{"*" if called else " "}  {induction}  {scores}  {copying} {lift:7.2f}  {reads:<6}'


def verdict_line(result: dict, sort: str) -> str:
    """How many heads of a model are called what the table is sorted by, and how strong the strongest is."""
    name = SORTS[sort]
    called, null = result['calls'][name], result['nulls'][name]
    line = f'{result["name"]}: {called.sum()} of {called.size} heads are {name.replace("_", "-")} heads'
    scores = result['copying_eigenvalues'] if sort == 'copying' else result[name]['mean']
    if sort == 'induction':
        line += f', {(called & (scores > CUSTOMARY)).sum()} of them above the customary threshold {CUSTOMARY}'
    elif sort != 'copying':
        line += f', {(called & (scores > 2 * null)).sum()} of them with twice the score of any untrained head'
    if not called.any():
        return line
    best = scores[called].max()
    line += f'; the strongest scores {best:.3f}'
    if sort != 'copying':
        line += f' of all attention (untrained heads: up to {null:.3f})' + ': a weak effect' * bool(best < 2 * null)
    return line


def text_lines(found: dict, show: int, sort: str) -> list[str]:
    """The first heads on a text of the user's own, by `sort` (copying is no matter of text: by induction)."""
    by = SORTS[sort] if SORTS[sort] in ON_TEXT else 'induction'
    windows = f'{found["windows"]} window{"s" * (found["windows"] > 1)} of {found["tokens"]} tokens'
    headings = '  '.join(f'{heading + " [95 %]":<22}' for heading in ('induction', 'duplicate', 'previous', 'sink'))
    lines = [f'on {found["file"]}, {windows}, by {by.replace("_", " ")}:', f'head   {headings}']
    for at in ranked(found[by]['mean'])[:show]:
        scores = [at_head(found[name], at) for name in ON_TEXT]
        cells = [with_interval(score) if found['windows'] > 1 else f'{score["mean"]:.3f}' for score in scores]
        lines.append(f'{at[0]}.{at[1]:<4} ' + '  '.join(f'{cell:<22}' for cell in cells))
    lines.append('chance ' + '  '.join(f'{found[name]["chance"]:<22.3f}' for name in ON_TEXT))
    return [line.rstrip() for line in lines]


def summary_lines(result: dict) -> list[str]:
    """The controls, losses and joint ablations of one model."""
    context, bigrams, ablation = result['in_context'], result.get('bigrams'), result.get('ablation', {})
    lines = [
        f'controls: chance {result["chance"]:.3f}, random init {result["random_null"]:.3f} (highest of all heads of '
        f'{len(result["random_init"])} models), shuffled copy {result["shuffled"]["mean"].max():.3f} (highest of all '
        'heads)',
        f'attention to the first token, mean of all heads: {result["sink"]["mean"].mean():.3f}; chance '
        f'{result["sink"]["chance"]:.3f}, random init up to {result["nulls"]["sink"]:.3f}',
        f'loss on repeated tokens {with_interval(result["repeat_loss"])}',
    ]
    if not result['composition_lift']:
        lines.append(f'K-lift is missing: {result["composition_missing"]}')
    if context:
        lines.append(
            f'in-context score {with_interval(context, "+.3f")}: loss at token {context["late"]} minus token '
            f'{context["early"]}, {context["windows"]} windows'
        )
    if bigrams:
        lines.append(
            'validation loss where the bigram occurred before in the window '
            f'({bigrams["share"]:.0%} of positions) {with_interval(bigrams["repeated"])}, elsewhere '
            f'{with_interval(bigrams["others"])}'
        )
    for step in ablation.get('together', []):
        control = f'{step["control_heads"]} random other heads of the same layers: {step["control_rise"]:+.3f}'
        control = control if step['control_heads'] else 'the same layers have no other heads'
        lines.append(f'top {step["heads"]} ablated: {step["rise"]:+.3f}; {control}')
    for step in ablation.get('on_text', []):
        rises = [f'{step[name]["mean"]:+.3f}' for name in ('repeated', 'others')]
        line = f'top {step["heads"]} ablated, on text: {rises[0]} at repeated bigrams, {rises[1]} elsewhere'
        if step['control_heads']:
            controls = [f'{step[f"control_{name}"]:+.3f}' for name in ('repeated', 'others')]
            line += f'; {step["control_heads"]} random others: {", ".join(controls)}'
        lines.append(line)
    return lines


def latent_lines(latent: dict, r: int) -> list[str]:
    """The measurements of MLA's latent, r = n_latent."""
    ranks = ', '.join(f'{rank:.1f}' for rank in latent['effective_rank'])
    lines = [f'latent: effective rank per layer {ranks} of {r}']
    for name in READINGS:
        overlap = latent[f'{name}_overlap']
        if name != 'key_value':  # a head's overlap with itself is 1
            overlap = overlap[:, ~np.eye(overlap.shape[1], dtype=bool)]
        by_layer = ', '.join(f'{layer.mean():.2f}' for layer in overlap)
        compared, chance = name.replace('_', '-'), latent[f'{name}_overlap_chance']
        lines.append(
            f'latent: overlap of the subspaces that heads read, {compared}, per layer {by_layer}; chance {chance:.2f}'
        )
    return lines


def formation_table(run: dict) -> str:
    """The best scores at each checkpoint of one run (see find_induction_heads.py's `formation`)."""
    lines = [run['name'], '  iteration  induction  head  previous  head  repeat loss  in-context']
    for row in run['checkpoints']:
        best = [row[name] for name in ('induction', 'previous_token')]
        scores = ''.join(f'{score["mean"]:9.3f}  {score["head"][0]}.{score["head"][1]:<3}' for score in best)
        context = f'{row["in_context"]["mean"]:+.3f}' if row['in_context'] else 'n/a'
        lines.append(f'  {row["iteration"]:9}  {scores}{row["repeat_loss"]["mean"]:12.3f}  {context:>10}')
    return '\n'.join(lines)


# ---- figures ---------------------------------------------------------------------------------------------------------


def heat_maps(results: list[dict]) -> Figure:
    """
    Induction scores by layer and head, a column per model: the model with its numbers, random init and shuffled copy
    small below. One color scale, up to the largest score.
    """
    rows = ('second copy', 'control: random init', 'control: second copy shuffled')
    columns = [(r['induction']['mean'], r['random_init'].max(0), r['shuffled']['mean']) for r in results]
    top = max(0.1, *(panel.max() for panels in columns for panel in panels))
    figure = Figure(figsize=(1.6 + 3.4 * len(results), 8.6))
    axes = figure.subplots(3, len(results), squeeze=False, height_ratios=(3, 1, 1))
    for column, (result, panels) in enumerate(zip(results, columns, strict=True)):
        for axis, panel, name in zip(axes[:, column], panels, rows, strict=True):
            image = axis.imshow(panel, vmin=0, vmax=top, cmap='viridis', aspect='auto')
            axis.set(xlabel='head', ylabel='layer', title=f'{result["name"]}\n{name}')
            axis.set(xticks=range(panel.shape[1]), yticks=range(panel.shape[0]))
            axis.tick_params(labelsize=7)
            axis.grid(False)
        for (layer, head), score in np.ndenumerate(panels[0]):
            color = 'black' if score > 0.6 * top else 'white'
            label = f'{score:.2f}'.lstrip('0') + '*' * bool(result['called'][layer, head])
            size = min(9, 60 / panels[0].shape[1])  # points: a panel is about 3 inches wide
            axes[0, column].text(head, layer, label, ha='center', va='center', color=color, size=size)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, label='induction score (*: above both controls, and copies)')
    if top > CUSTOMARY:
        bar.ax.axhline(CUSTOMARY, color='white', linewidth=1.5)
    return figure


PANELS = {
    'induction': 'best induction score',
    'previous_token': 'best previous-token score',
    'repeat_loss': 'loss on repeated tokens (nats)',
    'in_context': 'in-context score (nats)',
    'bigram_gain': 'what a repeated bigram saves (nats)',
}


def formation_curves(runs: list[dict]) -> Figure:
    """Best scores and losses over training, one line per run, shaded by their intervals."""
    shown = [name for name in PANELS if any(row[name] for run in runs for row in run['checkpoints'])]
    figure = Figure(figsize=(style.WIDTH, 3 * math.ceil(len(shown) / 2)))
    axes = figure.subplots(math.ceil(len(shown) / 2), 2).flatten()
    for axis in axes[len(shown) :]:
        axis.axis('off')
    for number, run in enumerate(runs):
        line = style.look(run['attention'].upper(), 0.5, sum(r['attention'] == run['attention'] for r in runs[:number]))
        for axis, name in zip(axes, shown, strict=False):
            rows = [row for row in run['checkpoints'] if row[name]]
            x = [row['iteration'] for row in rows]
            mean, low, high = ([row[name][key] for row in rows] for key in ('mean', 'low', 'high'))
            axis.plot(x, mean, label=run['name'], **line)
            axis.fill_between(x, low, high, color=line['color'], alpha=0.15, linewidth=0)
            axis.set(xlabel='iteration', title=PANELS[name])
    axes[0].axhline(max(run['random_null'] for run in runs), color=style.GREY, linewidth=0.8)
    axes[0].axhline(CUSTOMARY, color=style.GREY, linewidth=0.8, linestyle=':')
    for axis in axes[:2]:
        axis.set_ylim(0, 1)
    axes[0].legend()
    return figure


# ---- patterns.html ---------------------------------------------------------------------------------------------------


def packed_patterns(pattern: Tensor) -> str:
    """The lower triangles of patterns (L, H, T, T) at one byte per weight, deflated and in base64 for the page."""
    rows, columns = np.tril_indices(pattern.size(-1))
    weights = (pattern[..., rows, columns] * 255).round().numpy().astype(np.uint8)
    return base64.b64encode(zlib.compress(weights.tobytes())).decode('ascii')


def page(models: list[dict]) -> str:
    """
    patterns.html with the data of some models, one dict each.

    name: a line of text; layers, heads: ints; scores, called: dicts of (L, H); sequences: a list of dicts with title,
    tokens (a list of str) and data (packed_patterns).
    """
    template = Path(__file__).with_name('patterns.html').read_text(encoding='utf-8')
    # '<' is escaped, or a token could end the script element
    return template.replace('__DATA__', json.dumps(plain(models)).replace('<', '\\u003c'))
