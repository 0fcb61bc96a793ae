"""
Induction heads on real text: do MHA, MQA and MLA as published form them on source code, and when?

$ python data/code/prepare.py --tokenizer=bpe --vocab_size=2048
$ python studies/induction_text.py                 # a short form: one seed, few iterations; minutes
$ python studies/induction_text.py --full=True --dtype=bfloat16 --compile=True    # two hours on two cores
$ python studies/induction_text.py --reuse=assets/induction_text.json    # tables and picture again, in seconds

Each model is trained with config/train_code_cpu.py (RMSNorm, SwiGLU, RoPE) at its best learning rate (a grid in steps
of 2 that grows until the best rate is inside it), chosen on a seed that isn't reported. The others are measured at many
iterations: scores of heads on repeated random tokens, and losses on validation text where a bigram occurred before in
the window, and elsewhere. All models of one seed see the same batches.

Writes tables, a picture and, beside it, a .json. Finished runs are kept: repeat the command to continue. Run it from
the repository root.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from core.cli.keys import begin

begin(__file__)  # before the slow imports

import os

import numpy as np
from matplotlib.figure import Figure

from analysis import report, style
from analysis.report import cells
from core.cli import subprocesses
from core.cli.errors import UserError
from core.speed import timing
from core.text.dataset import TokenData
from studies import measure

# ----------------------------------------------------------------------------------------------------------------------
out_dir = 'out-induction-text'  # the runs
figure = ''  # the picture, with the numbers in a .json beside it; '': text.png in out_dir
table = ''  # a file for the tables; '': text.md in out_dir
full = False
dataset = 'code'
data_dir = 'data'
max_iters = 0  # 0: 5000, in the short form 300
seeds = 0  # reported seeds of each model; 0: 5, in the short form 1
reuse = ''  # the .json of an earlier study: its tables and picture again, nothing is trained
jobs = 0  # concurrent trainings with one thread each; 0: the cores that this process may use
dtype = 'float32'
compile = False
exec(open(Path(__file__).resolve().parents[1] / 'configurator.py', encoding='utf-8').read())
# ----------------------------------------------------------------------------------------------------------------------

# every model and its keys of train.py; MLA caches 48 latents and 16 rotated numbers, as many as MQA
ARMS = {
    'MHA': {},
    'MQA': dict(n_kv_head=1),
    'MLA, cache of MQA': dict(attention='mla', n_latent=48, latent_norm=True),
}
PAIRED = ('previous', 'repeated', 'others')  # what is compared run by run
RATES = (2e-3, 4e-3, 8e-3)  # the grid that grows
TUNING_SEED, SEED = 5000, 6000
FORMED = report.CUSTOMARY  # an induction head has formed when the best induction score exceeds this
TOKENS, WINDOW = 4 * 256, 256  # per iteration, and in a window, in the config
iterations, n_seeds = max_iters or (5000 if full else 300), seeds or (5 if full else 1)
steps = [100, 200, 300, 400, 600, 800, *range(1000, 3000, 250), *range(3000, 100_000, 500)]
steps = [step for step in steps if step < iterations] + [iterations]


# ---- runs ------------------------------------------------------------------------------------------------------------


def planned(label, rate, seed):
    """A training as subprocesses.run_all takes it."""
    return measure.run_of(os.path.join(out_dir, f'{iterations}'), label, rate, seed)


def train(run):
    """A run with its validation loss; it is trained unless that is done."""
    keys = dict(ARMS[run['label']], dataset=dataset, dtype=dtype, compile=compile)
    snapshots = steps if run['seed'] >= SEED else [iterations]
    return dict(run, loss=measure.trained(run, ['train.py', 'config/train_code_cpu.py'], keys, snapshots, data_dir))


def losses(wanted):
    """{(label, rate): loss of the tuning seed}."""
    runs = [planned(label, rate, TUNING_SEED) for label, rate in wanted]
    return {(r['label'], r['rate']): r['loss'] for r in subprocesses.run_all(train, runs, jobs)}


def train_and_measure(run):
    """Train and measure a run: the numbers that tables and the picture show."""
    if train(run)['loss'] == float('inf'):
        raise UserError(f'{run["name"]} diverged; its rate is too near the edge, delete its folder and tune again')
    folder = run['folder']
    found = measure.measure(folder, sweep=folder, text_windows=128, device='cpu', data_dir=data_dir)
    on_text = {step['heads']: step for step in found['ablation']['on_text']}
    curve = [
        dict(
            tokens=step['iteration'] * TOKENS,
            induction=step['induction']['mean'],
            previous=step['previous_token']['mean'],
            gain=step['bigram_gain'],
        )
        for step in measure.sweep(folder)
    ]
    return measure.best_heads(found) | dict(
        {key: run[key] for key in ('label', 'rate', 'seed')},
        curve=curve,
        formed=measure.formed([(step['tokens'], step['induction']) for step in curve], FORMED),
        previous_formed=measure.formed([(step['tokens'], step['previous']) for step in curve], FORMED),
        repeated_share=found['bigrams']['share'],
        repeated=found['bigrams']['repeated']['mean'],
        others=found['bigrams']['others']['mean'],
        heads=int(np.sum(found['called'])),
        ablation={str(k): on_text[k] for k in (1, 2, 4)},
        parameters=found['parameters'],
    )


# ---- tables ----------------------------------------------------------------------------------------------------------


def formation_table(groups):
    """When heads form, how strong they are in the end, and losses, of {label: its runs}."""
    heading = ['attention', 'learning rate', f'million tokens until a score > {FORMED}']
    heading += ['log-rank p against the first (Holm)', 'best induction score', 'layer.head', 'induction heads of 16']
    heading += ['copying', f'million tokens until a previous-token score > {FORMED}', 'best previous-token score']
    heading += ['layer.head', 'loss at repeated bigrams', 'elsewhere']
    ps, rows = measure.log_rank(groups, numbers['setting']['iterations'] * TOKENS), []
    for label, group in groups.items():
        row = [label, f'{numbers["rates"][label]:g}', when(group, 'formed'), f'{ps[label]:.4f}' if label in ps else '']
        row += [each(group, 'score'), measure.places(group, 'best'), ', '.join(str(o['heads']) for o in group)]
        row += [*cells(group, 'copying'), when(group, 'previous_formed'), *cells(group, 'previous')]
        rows.append([*row, measure.places(group, 'best_previous'), each(group, 'repeated'), *cells(group, 'others')])
    return report.markdown_table(heading, rows)


def each(group, key):
    """A number of every run: where some form heads and others don't, their mean would be no run's."""
    return ', '.join(f'{o[key]:.3f}' for o in group)


def when(group, key):
    """A time of a group's runs, in millions of tokens: median [range], and in how many runs."""
    return report.when([o[key] and o[key] / 1e6 for o in group], '.2f')


def paired_table(groups):
    """Every model minus the first of the same seed, which saw the same batches."""
    (first, base), *others = groups.items()
    heading, rows = [f'minus {first}', 'best previous-token score', 'loss at repeated bigrams', 'elsewhere'], []
    for label, group in others:
        differences = [{key: o[key] - of[key] for key in PAIRED} for o, of in zip(group, base, strict=True)]
        rows.append([label, *cells(differences, *PAIRED, form='+.3f')])
    return report.markdown_table(heading, rows)


def ablation_table(groups):
    """What the best induction heads are worth on text."""
    heading = [f'top {k}: at repeated bigrams, elsewhere' for k in (1, 2, 4)] + ['2 random others of these layers']
    rows = []
    for label, group in groups.items():
        group = [o for o in group if o['formed']]
        parts = [[[o['ablation'][k][name]['mean'] for o in group] for name in ('repeated', 'others')] for k in '124']
        parts.append([[o['ablation']['2'][f'control_{name}'] for o in group] for name in ('repeated', 'others')])
        rises = [', '.join(report.spread(values, '+.3f') for values in pair) for pair in parts]
        rows.append((label, len(group), *(rises if group else [''] * len(rises))))
    return report.markdown_table(('attention', 'runs', *heading), rows)


def tuning_table():
    """The validation loss of every model at every learning rate, on the seed of tuning."""
    rates = sorted({float(rate) for grid in numbers['tuning'].values() for rate in grid})
    rows = []
    for label, grid in numbers['tuning'].items():
        rows.append([label, *(f'{grid[key]:.4f}' if (key := f'{rate:g}') in grid else '' for rate in rates)])
    return report.markdown_table(['learning rate', *(f'{rate:g}' for rate in rates)], rows)


def tables(groups):
    """The text of all tables."""
    parts = {
        'Formation': formation_table(groups),
        'Paired by seed': paired_table(groups),
        'The best induction heads, mean-ablated: rise of the loss on validation text, of the runs that form heads': (
            ablation_table(groups)
        ),
        f'Tuning, seed {TUNING_SEED}': tuning_table(),
    }
    share, setting = next(iter(groups.values()))[0]['repeated_share'], numbers['setting']
    intro = (
        f'{setting["seeds"]} seeds of {setting["iterations"]} iterations. Times are medians [range] of the '
        'runs that formed heads; other cells are means ± half width of the 95 % t interval, with fewer than four runs '
        f'mean [range]. Losses are in nats per token, over 128 validation windows of {WINDOW} tokens; {share:.0%} of '
        'positions repeat a bigram of their window.'
    )
    return intro + '\n\n' + '\n'.join(f'**{title}**\n\n{text}' for title, text in parts.items())


# ---- picture ---------------------------------------------------------------------------------------------------------

PANELS = {
    'induction': 'best induction\nscore',
    'previous': 'best previous-\ntoken score',
    'gain': 'a repeated bigram\nsaves (nats)',
}


def draw(groups):
    """Scores and the gain of repeated bigrams over tokens: a column per model, a line per run."""
    figure = Figure(figsize=(style.WIDTH, 5.2))
    axes = figure.subplots(len(PANELS), len(groups), sharex=True, sharey='row', squeeze=False)
    for column, (label, group) in zip(axes.T, groups.items(), strict=True):
        look = style.look(label, latent=0.5) | dict(marker='', linestyle='-', linewidth=1.2, alpha=0.8)
        for run in group:
            tokens = [step['tokens'] / 1e6 for step in run['curve']]
            for axis, key in zip(column, PANELS, strict=True):
                values = [step['gain']['mean'] if key == 'gain' else step[key] for step in run['curve']]
                axis.plot(tokens, values, **look)
        column[0].axhline(FORMED, color=style.GREY, linewidth=0.6)
        formed = sum(o['formed'] is not None for o in group)
        column[0].set(title=f'{label}\n{formed} of {len(group)} runs form induction heads', ylim=(0, 1))
        column[1].set(ylim=(0, 1))
        column[2].set(xscale='log')
        column[2].set_xticks([0.1, 1], ['0.1', '1'])
        column[2].minorticks_off()
    for axis, title in zip(axes[:, 0], PANELS.values(), strict=True):
        axis.set_ylabel(title)
    figure.supxlabel('million tokens of Python source (a line is a run)', fontsize=9)
    return figure


# ---- train, measure, report ------------------------------------------------------------------------------------------

paths = measure.outputs(config, 'text')
with measure.reading(reuse):
    if reuse:
        numbers = measure.read_json(reuse)
    else:
        TokenData(os.path.join(data_dir, dataset), WINDOW)  # a missing one is an error now, not later
        grids = measure.tune(list(ARMS), RATES, losses)
        rates = {label: measure.best_rate(grid) for label, grid in grids.items()}
        plans = [planned(label, rate, SEED + n) for n in range(n_seeds) for label, rate in rates.items()]
        runs = subprocesses.run_all(train_and_measure, plans, jobs)
        setting = dict(iterations=iterations, seeds=n_seeds, dtype=dtype, compile=compile, dataset=dataset)
        numbers = dict(
            setting=dict(setting, cpu=timing.cpu_name(), commit=measure.commit()),
            rates=rates,
            tuning={label: {f'{rate:g}': loss for rate, loss in grid.items()} for label, grid in grids.items()},
            runs=report.plain(runs),
        )
    groups = report.grouped(numbers['runs'], lambda o: o['label'])
    text = tables(groups)
    picture = draw(groups)
measure.save(paths, text, picture, None if reuse else numbers)
