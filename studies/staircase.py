"""
From MHA to MLA in five steps: which of them delays induction heads, and who carries what in the heads that form?

$ python studies/staircase.py                # a short form: two seeds, few iterations; minutes on two cores
$ python studies/staircase.py --full=True    # four seeds of tuning and twelve others; hours on two cores
$ python studies/staircase.py --latents=True --full=True    # instead: does W_D have to be learned?
$ python studies/staircase.py --reuse=assets/staircase.json    # tables and picture again, in seconds

Two-layer models on data/repeats. All of them start with keys and values of the same rms. Each is trained at its best
learning rate (a grid in steps of 2 that grows until the best rate is inside it), chosen on seeds that aren't reported.
Then, at every snapshot, the best induction score, and at the end:

- the time at which the best induction score first exceeds 0.5, compared with the first model's by the log-rank test
- the loss on repeats at the trained length, and at two and four times that
- in the best previous-token head and the best induction head the rotated part of the attention logit, or the other
  part, is replaced: by its mean at each distance, by its value without rotation, or by its mean over the keys in sight

Writes tables, a picture and, beside it, a .json. Finished runs are kept: repeat the command to continue. Run it from
the repository root.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from core.cli.keys import begin

begin(__file__)  # before the slow imports

import os
from dataclasses import dataclass, field
from statistics import mean

import numpy as np
import torch
from matplotlib.figure import Figure

from analysis import report, style
from analysis.induction import head_scores, repeated_sequences
from analysis.rotation import PARTS, REPLACEMENTS, replace_logits
from core.cli import files, subprocesses
from core.cli.errors import UserError
from core.runs import checkpoint as checkpoints
from core.runs import models
from core.speed import timing
from studies import measure, variants

# ----------------------------------------------------------------------------------------------------------------------
out_dir = 'out-staircase'
figure = ''  # the picture, with the numbers in a .json beside it; '': staircase.png (or latents.png) in out_dir
table = ''  # a file for the tables; '': staircase.md (or latents.md) in out_dir
full = False
latents = False  # the arms of the question about W_D instead of the staircase
data_dir = 'data'
max_iters = 0  # 0: 2000, in the short form 300
tuning_seeds = 0  # 0: 4, in the short form 1
seeds = 0  # reported seeds; 0: 12, in the short form 2
reuse = ''  # the .json of an earlier study: its tables and picture again, nothing is trained
jobs = 0  # concurrent trainings with one thread each; 0: the cores that this process may use
dtype = 'float32'
compile = False
exec(open(Path(__file__).resolve().parents[1] / 'configurator.py', encoding='utf-8').read())
# ----------------------------------------------------------------------------------------------------------------------

WIDTH, SIZE, ROTATED = 64, 16, 8  # n_embd of config/train_repeats.py, its head size, and half of that
FORMED = 0.5
RATES = (1e-3, 2e-3, 4e-3)  # the grid that grows
TUNING_SEED, SEED = 5000, 6000
SEQUENCES = 128


@dataclass(frozen=True)
class Arm:
    """A model of the staircase."""

    label: str
    look: tuple = ('MHA', 0.0, 0)  # of style.look
    keys: dict = field(default_factory=dict, hash=False)


def mla(attention='mla', latent=WIDTH, content=SIZE - ROTATED):
    """Keys of an MLA with a shared rotated key."""
    return dict(attention=attention, n_latent=latent, n_nope=content, n_rope=ROTATED)


STAIRCASE = [
    Arm('S0: MHA, RoPE on whole heads'),
    Arm('S1: half of each head rotated', ('MHA', 0.0, 1), dict(n_rope=ROTATED)),
    Arm('S2: the rotated key shared', ('GQA', 0.0, 0), mla('mla_slice')),
    Arm('S3: keys and values from a latent, r = C', ('MLA', 1.0, 0), mla()),
    Arm('S4: r = C/2', ('MLA', 0.5, 1), mla(latent=WIDTH // 2)),
    Arm('S5: rotated beside the content', ('MLA', 0.5, 0), mla(latent=WIDTH // 2, content=SIZE)),
]
DOWN = {'trained': 'mla', 'random': 'mla_frozen', 'a slice of x': 'mla_slice', 'of all layers': 'mla_shared'}
LATENTS = [
    Arm(f'W_D {how}, r = C/{divisor}', ('MLA', 1 / divisor, n), mla(attention, WIDTH // divisor, SIZE))
    for divisor in (2, 8)
    for n, (how, attention) in enumerate(DOWN.items())
]
iterations = max_iters or (2000 if full else 300)
n_tuning, n_seeds = tuning_seeds or (4 if full else 1), seeds or (12 if full else 2)
steps = sorted({*range(100, min(iterations, 1000), 50), *range(0, iterations, 250), iterations} - {0})


# ---- runs ------------------------------------------------------------------------------------------------------------


def train(item):
    """A run with its validation loss; it is trained unless that is done."""
    command = ['studies/with_variants.py', 'train.py', 'config/train_repeats.py']
    keys = dict(pos='rope', kv_rms=0.5, **item['arm'].keys, dtype=dtype, compile=compile)
    snapshots = steps if item['seed'] >= SEED else [iterations]
    return dict(item, loss=measure.trained(item, command, keys, snapshots, data_dir))


def planned(arm, rate, seed):
    """A training as subprocesses.run_all takes it."""
    return dict(measure.run_of(os.path.join(out_dir, f'{iterations}'), arm.label, rate, seed), arm=arm)


def losses(wanted):
    """{(label, rate): mean loss of the tuning seeds}."""
    items = [planned(by_label[label], rate, TUNING_SEED + n) for label, rate in wanted for n in range(n_tuning)]
    done = report.grouped(subprocesses.run_all(train, items, jobs), lambda r: (r['label'], r['rate']))
    return {key: mean(r['loss'] for r in runs) for key, runs in done.items()}


# ---- measurements ----------------------------------------------------------------------------------------------------


def train_and_measure(item):
    """Train a run and measure it: its numbers, as JSON keeps them."""
    path = os.path.join(item['folder'], 'measured.json')
    if train(item)['loss'] == float('inf'):
        raise UserError(f'{item["name"]} diverged; its rate is too near the edge, delete its folder and tune again')
    if not subprocesses.is_current(path, os.path.join(item['folder'], f'ckpt_{iterations:06}.pt')):
        files.write_json(path, report.plain(measured(item['folder'])))
    return dict(label=item['label'], rate=item['rate'], seed=item['seed'], **measure.read_json(path))


def measured(folder):
    """What is found in the checkpoints of a run."""
    curve = []
    for step in steps:
        model = models.build_model(checkpoints.load(os.path.join(folder, f'ckpt_{step:06}.pt'))).eval()
        repeats = sequences(model.config.block_size, model.config.vocab_size)
        scores = {name: values.mean(0) for name, values in head_scores(model, repeats).items()}
        curve.append((step, float(scores['induction'].max())))
    out = dict(curve=curve, score=curve[-1][1], formed=measure.formed(curve, FORMED), heads={})
    out |= dict(loss=float(scores['repeat_loss']), longer={})
    for name in ('induction', 'previous_token'):
        layer, head = np.unravel_index(scores[name].argmax(), scores[name].shape)
        found = replace_logits(model, repeats, (int(layer), int(head)), name)
        out['heads'][name] = dict(at=(int(layer), int(head)), score=float(scores[name][layer, head]), replaced=found)
    trained = model.config.block_size
    for factor in (2, 4):
        model.set_context(factor * trained)
        longer = sequences(factor * trained, model.config.vocab_size, copies=factor)
        out['longer'][factor] = float(head_scores(model, longer)['repeat_loss'].mean())
    return out


def sequences(room, n_ids, copies=1):
    """Repeated random sequences that fill `room` tokens; blocks as long as in training."""
    length = room // (2 * copies)
    return repeated_sequences(SEQUENCES // copies, length, range(n_ids), copies=2 * copies, seed=1)


# ---- results ---------------------------------------------------------------------------------------------------------


def formation_table(groups):
    """When heads form, how strong they are, and losses, of {label: its runs}."""
    heading = ['model', 'learning rate', f'iteration of best score > {FORMED}', 'formed']
    heading += ['log-rank p against the first (Holm)', 'best induction score', 'loss on repeats']
    heading += ['at twice the length', 'at four times']
    rows, ps = [], measure.log_rank(groups, numbers['setting']['iterations'])
    for label, group in groups.items():
        times = [r['formed'] for r in group]
        p = f'{ps[label]:.4f}' if label in ps else ''
        done = f'{sum(time is not None for time in times)} of {len(times)}'
        longer = [report.spread([r['longer'][key] for r in group]) for key in ('2', '4')]
        cells = (report.when(times), done, p, *report.cells(group, 'score', 'loss'), *longer)
        rows.append((label, f'{numbers["rates"][label]:g}', *cells))
    return report.markdown_table(heading, rows)


def carrier_table(groups, name):
    """What a head's score becomes when a part of its logit is replaced, in the runs that formed heads."""
    columns = [(part, how) for part in PARTS for how in REPLACEMENTS if (part, how) != ('content', 'not rotated')]
    rows = []
    for label, group in groups.items():
        heads = [r['heads'][name] for r in group if r['formed']]
        if heads:
            cells = [
                report.spread([h['replaced'][part][how]['score'] for h in heads if part in h['replaced']])
                for part, how in columns
            ]
            rows.append((label, len(heads), report.spread([h['score'] for h in heads]), *cells))
    return report.markdown_table(['model', 'runs', 'score', *(f'{part}: {how}' for part, how in columns)], rows)


def draw(groups):
    """The best induction score of every run over iterations, a panel per model."""
    looks = {arm.label: style.look(*arm.look) for arm in STAIRCASE + LATENTS}
    columns = 3 if len(groups) <= 6 else 4
    figure = Figure(figsize=(style.WIDTH, 2.6 * -(-len(groups) // columns) + 0.6))
    panels = figure.subplots(-(-len(groups) // columns), columns, sharex=True, sharey=True, squeeze=False).flat
    for (label, group), axes in zip(groups.items(), panels, strict=False):  # panels last: none is lost
        for r in group:
            axes.plot(*zip(*r['curve'], strict=True), color=looks[label]['color'], linewidth=0.9, alpha=0.7)
        axes.axhline(FORMED, color=style.GREY, linewidth=0.6)
        count = sum(r['formed'] is not None for r in group)
        axes.set_title(f'{label}\n{count} of {len(group)} runs form heads', fontsize=8.5)
        axes.set(ylim=(0, 1))
    for axes in list(panels):
        axes.set_visible(False)
    figure.supxlabel('iteration')
    figure.supylabel('best induction score')
    return figure


# ---- train, measure, report ------------------------------------------------------------------------------------------

paths = measure.outputs(config, 'latents' if latents else 'staircase')
with measure.reading(reuse):
    if reuse:
        numbers = measure.read_json(reuse)
    else:
        variants.register()
        torch.set_num_threads(1)
        if not os.path.exists(os.path.join(data_dir, 'repeats', 'train.bin')):
            to = dict(folder=os.path.join(data_dir, 'repeats'))
            subprocesses.run_script('data/repeats/prepare.py', [to], out_dir)
        arms = LATENTS if latents else STAIRCASE
        by_label = {arm.label: arm for arm in arms}
        grids = measure.tune(list(by_label), RATES, losses)
        best = {label: measure.best_rate(grid) for label, grid in grids.items()}
        plans = [planned(arm, best[arm.label], SEED + n) for n in range(n_seeds) for arm in arms]
        runs = subprocesses.run_all(train_and_measure, plans, jobs)
        setting = dict(iterations=iterations, seeds=n_seeds, tuning_seeds=n_tuning, snapshots=steps, dtype=dtype)
        numbers = dict(
            setting=dict(setting, compile=compile, cpu=timing.cpu_name(), commit=measure.commit()),
            rates=best,
            tuning={label: {f'{rate:g}': loss for rate, loss in grid.items()} for label, grid in grids.items()},
            runs=runs,
        )
    groups = report.grouped(numbers['runs'], lambda r: r['label'])
    setting = numbers['setting']
    text = (
        f'{setting["seeds"]} seeds of {setting["iterations"]} iterations each, at the best of a grid of learning rates '
        f'({setting["tuning_seeds"]} other seeds). Times are medians [range] of the runs that formed heads; other '
        'cells are means ± half width of the 95 % t interval, with fewer than four runs mean [range].\n\n'
        f'{formation_table(groups)}\nScore of the best previous-token head with a part of its logit replaced:\n\n'
        f'{carrier_table(groups, "previous_token")}\nThe same for the best induction head:\n\n'
        f'{carrier_table(groups, "induction")}'
    )
    picture = draw(groups)
measure.save(paths, text, picture, None if reuse else numbers)
