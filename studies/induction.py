"""
Does MLA form induction heads on repeated tokens? When, how strong, in which layers, and how with a latent?

$ python studies/induction.py                    # short form: minutes on two cores
$ python studies/induction.py --full=True        # all seeds and latent sizes: about an hour on two cores
$ python studies/induction.py --reuse=assets/induction_repeats.json    # its tables and picture again, in seconds

Trains every model with train.py on data/repeats, measures it at several iterations with find_induction_heads.py, and
writes the tables and, beside the picture, a .json with every number. Finished runs are kept: repeat the command to
continue after an interruption. With RoPE, MLA has the published shape: rotated dimensions beside the content and a norm
on the latent. Run it from the repository root.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from core.cli.keys import begin

begin(__file__)  # before the slow imports

import os

import numpy as np
from matplotlib.figure import Figure

from analysis import report, stats, style
from analysis.report import cells
from core.cli import subprocesses
from core.cli.errors import UserError
from studies.measure import best_heads, formed, measure, outputs, places, read_json, reading, save, sweep

# ----------------------------------------------------------------------------------------------------------------------
full = False  # every latent size, five seeds, 2000 iterations; otherwise the short form
out_dir = 'out-study'  # the runs
figure = ''  # the picture, with the numbers in a .json beside it; '': formation.png in out_dir
table = ''  # a file for the tables; '': formation.md in out_dir
seeds = 0  # training seeds; 0: 5 in the full form, 2 in the short one
max_iters = 0  # 0: 2000 in the full form, 1200 in the short one
reuse = ''  # the .json of an earlier study: its tables and picture are made again, nothing is trained
data_dir = 'data'
jobs = 0  # concurrent trainings with one thread each; 0: the cores that this process may use
exec(open(Path(__file__).resolve().parents[1] / 'configurator.py', encoding='utf-8').read())
# ----------------------------------------------------------------------------------------------------------------------

FORMED = 0.5  # an induction head has formed when the best induction score exceeds this
TUNING = 200  # iterations of fine-tuning after a conversion
WIDTH, LAYERS, DEEP = 64, 2, 4  # n_embd of config/train_repeats.py, its layers, and those of the runs about depth
iterations = max_iters or (2000 if full else 1200)
runs_dir = os.path.join(out_dir, f'{iterations}')  # runs of other forms aren't continued: their schedule was another


# ---- runs ------------------------------------------------------------------------------------------------------------


def planned():
    """All runs of this form of the study: dicts of name, folder, attention, n_latent (0: MHA), pos, n_layer, seed."""
    latents = (0, 32, 16, 8, 4) if full else (0, 16)  # 0: MHA; the others are C/2 to C/16
    shapes = [(r, pos, LAYERS) for pos in ('learned', 'rope') for r in latents]
    shapes += [(r, 'learned', DEEP) for r in (0, 16)]
    runs = []
    for r, pos, n_layer in shapes:
        for seed in range(1337, 1337 + (seeds or (5 if full else 2))):
            name = f'{n_layer}l-{pos}-{f"MLA-r{r}" if r else "MHA"}-s{seed}'
            run = dict(n_latent=r, pos=pos, n_layer=n_layer, seed=seed, attention='mla' if r else 'mha')
            runs.append(dict(run, name=name, folder=os.path.join(runs_dir, name)))
    return runs


def conversions():
    """The conversions of the two-layer MHA models: dicts of name, source, n_latent, seed."""
    latents = (32, 16, 8) if full else (16,)
    sources = [run for run in planned() if (run['n_latent'], run['pos'], run['n_layer']) == (0, 'learned', LAYERS)]
    pairs = [(r, run['folder'], run['seed']) for r in latents for run in sources]
    return [dict(name=f'converted-r{r}-s{seed}', source=folder, n_latent=r, seed=seed) for r, folder, seed in pairs]


def attention_of(run):
    """A run's attention and latent size, in tables and figures."""
    return f'MLA r={run["n_latent"]} (C/{WIDTH // run["n_latent"]})' if run['n_latent'] else 'MHA'


def snapshots():
    """The iterations at which each run is measured: closer together where heads form."""
    wanted = (200, 300, 400, 500, 600, 800, 1000, 1200, 1500) if full else (300, 600, 900)
    return [iteration for iteration in wanted if iteration < iterations] + [iterations]


def train_and_measure(run):
    """Train and measure one run at each of `snapshots`, as far as that isn't done yet; returns its outcome."""
    steps, folder = snapshots(), run['folder']
    if not os.path.exists(os.path.join(folder, f'ckpt_{steps[-1]:06}.pt')):
        keys = {key: run[key] for key in ('attention', 'n_latent', 'pos', 'n_layer', 'seed')}
        keys |= dict(latent_norm=run['pos'] == 'rope') if run['n_latent'] else {}
        keys |= dict(max_iters=steps[-1], keep_checkpoints=','.join(map(str, steps)))
        keys |= dict(out_dir=folder, data_dir=data_dir, resume='auto', device='cpu', threads=1)
        subprocesses.run_script('train.py', ['config/train_repeats.py', keys], folder)
    found = measure(folder, sweep=folder, data_dir=data_dir)
    return dict(run, **outcome(found, sweep(folder)))


def convert_and_measure(run):
    """Convert an MHA model, measure the result, fine-tune it briefly and measure again; returns the run's numbers."""
    folder = os.path.join(runs_dir, run['name'])
    tuned, keys = folder + '-tuned', dict(n_latent=run['n_latent'], data_dir=data_dir, device='cpu', threads=1)
    if not os.path.exists(os.path.join(folder, 'ckpt.pt')):
        to = dict(keys, source=run['source'], out_dir=folder, dataset='repeats')
        subprocesses.run_script('convert_mla.py', [to], folder)
    if not os.path.exists(os.path.join(tuned, f'ckpt_{TUNING:06}.pt')):
        keys |= dict(init_from=folder, out_dir=tuned, resume='auto', seed=run['seed'], kv_lr=1.0, warmup_iters=10)
        keys |= dict(max_iters=TUNING, lr_decay_iters=TUNING, eval_interval=TUNING, keep_checkpoints=TUNING)
        subprocesses.run_script('train_mla.py', ['config/train_repeats_mla.py', keys], tuned)
    layer, head = measure(run['source'], data_dir=data_dir)['ranking'][0]
    out = dict(n_latent=run['n_latent'], seed=run['seed'])
    for name, of in (('mha', run['source']), ('converted', folder), ('tuned', tuned)):
        found = measure(of, data_dir=data_dir)
        same, best = found['induction']['mean'][layer][head], best_heads(found)['score']
        out[name] = dict(same=same, best=best, heads=int(np.sum(found['called'])))
        out[name]['repeat_loss'] = found['repeat_loss']['mean']
    return out


# ---- outcomes --------------------------------------------------------------------------------------------------------


def outcome(found, steps):
    """The numbers that the tables show of a run: a dict."""
    out, together = best_heads(found), {step['heads']: step for step in found['ablation']['together']}
    layer, head = out['best']
    lift = np.array(found['composition_lift']['k'], dtype=float)[:, :, layer, head]  # nan for heads that aren't earlier
    curve = [(step['iteration'], step['induction']['mean']) for step in steps]
    out |= dict(
        formed=formed(curve, FORMED),
        curve=curve,
        shuffled=found['shuffled']['mean'][layer][head],
        called=int(np.sum(found['called'])),
        copying_top5=found['copying_top5'][layer][head],
        lift=float(np.nanmax(lift)) if layer else None,
        repeat_loss=found['repeat_loss']['mean'],
        val_loss=found['val_loss'],
        ablate_best=found['ablation']['rise'][layer][head],
        ablate_two=together[2]['rise'],
        ablate_random=together[2]['control_rise'],
        ablate_four=together[4]['rise'],
    )
    return out | (dict(latent=latent_of_layer(found['latent'], layer, head)) if 'latent' in found else {})


def latent_of_layer(latent, layer, head):
    """The measurements of the latent in the layer of the best head: a dict of numbers."""
    other = ~np.eye(len(latent['key_overlap'][layer]), dtype=bool)
    keys, values = (np.maximum(latent[f'{path}_ablation'][layer], 0) for path in ('keys', 'values'))
    shares = [part / max(part.sum(), 1e-9) for part in (keys, values)]
    out = dict(effective_rank=latent['effective_rank'][layer], shared=float(np.minimum(*shares).sum()))
    out |= dict(keys_carry=carry(keys), values_carry=carry(values))
    out |= dict(keys_rise=float(keys.sum()), values_rise=float(values.sum()))
    for name in ('key', 'value', 'key_value'):
        overlap = np.array(latent[f'{name}_overlap'][layer])
        out[f'{name}_overlap'] = float(overlap[other].mean() if name != 'key_value' else overlap.mean())
        out[f'{name}_overlap_chance'] = latent[f'{name}_overlap_chance']
    if 'logit_parts' in latent:
        out |= {part: latent['logit_parts'][part]['mean'][layer][head] for part in ('content', 'position')}
    return out


def carry(rises):
    """The smallest number of bands whose loss increases (n,) add up to 90 % of the total."""
    total = np.cumsum(np.sort(rises)[::-1])
    return int(np.searchsorted(total, 0.9 * total[-1])) + 1


# ---- tables ----------------------------------------------------------------------------------------------------------


def groups(outcomes, n_layer):
    """Outcomes with n_layer layers by (pos, attention and latent), in the order of `planned`."""
    return report.grouped((o for o in outcomes if o['n_layer'] == n_layer), lambda o: (o['pos'], attention_of(o)))


def formation(group):
    """When heads formed in the runs of a group, a cell; and their best scores."""
    return report.when([o['formed'] for o in group]), ', '.join(f'{o["score"]:.2f}' for o in group)


def formation_table(outcomes):
    """Formation and final scores of the runs with two layers."""
    heading = ['positions', 'attention', f'iteration of best score > {FORMED}', 'best induction score', 'by seed']
    heading += ['best previous-token score', 'induction heads of 8', 'loss on repeats', 'val loss']
    rows = []
    for names, group in groups(outcomes, LAYERS).items():
        time, by_seed = formation(group)
        values = cells(group, 'previous', 'called', 'repeat_loss', 'val_loss')
        rows.append((*names, time, *cells(group, 'score'), by_seed, *values))
    return report.markdown_table(heading, rows)


def head_table(outcomes):
    """The best head of the runs in which one formed; an average with the other runs would describe neither."""
    heading = ['positions', 'attention', 'runs', 'score on shuffled copy', 'copying score', 'K-composition lift']
    heading += ['top 1 ablated', 'top 2 ablated', '2 random others ablated', 'top 4 ablated']
    rises, rows = ('ablate_best', 'ablate_two', 'ablate_random', 'ablate_four'), []
    for names, group in groups(outcomes, LAYERS).items():
        if found := [o for o in group if o['score'] > FORMED]:
            scores = cells(found, 'shuffled', 'copying', 'lift')
            rows.append((*names, f'{len(found)} of {len(group)}', *scores, *cells(found, *rises, form='+.3f')))
    return report.markdown_table(heading, rows)


def depth_table(outcomes):
    """The layers of the best heads in the runs with four layers."""
    heading = ['attention', f'iteration of best score > {FORMED}', 'best induction score by seed', 'layer.head']
    heading += ['best previous-token score', 'layer.head', 'loss on repeats', 'val loss']
    rows = []
    for (_, name), group in groups(outcomes, DEEP).items():
        heads = (places(group, 'best'), *cells(group, 'previous'), places(group, 'best_previous'))
        rows.append((name, *formation(group), *heads, *cells(group, 'repeat_loss', 'val_loss')))
    return report.markdown_table(heading, rows)


def latent_table(outcomes):
    """The latent in the layer of the best head, in the runs in which one formed."""
    heading = ['positions', 'attention', 'effective rank', 'overlap: keys (chance)', 'overlap: values (chance)']
    heading += ['overlap: keys and values (chance)', 'bands with 90 % of the cost: keys']
    heading += ['bands with 90 % of the cost: values', 'shared cost', 'content logit', 'position logit', 'runs']
    rows = []
    for names, group in groups(outcomes, LAYERS).items():
        if found := [o['latent'] for o in group if 'latent' in o and o['score'] > FORMED]:
            overlaps = [f'{kind}_overlap' for kind in ('key', 'value', 'key_value')]
            overlaps = [f'{cells(found, key)[0]} ({found[0][f"{key}_chance"]:.2f})' for key in overlaps]
            logits = cells(found, 'content', 'position') if 'content' in found[0] else ('', '')
            shares = cells(found, 'keys_carry', 'values_carry', 'shared')
            rank, runs = cells(found, 'effective_rank'), f'{len(found)} of {len(group)}'
            rows.append((*names, *rank, *overlaps, *shares, *logits, runs))
    return report.markdown_table(heading, rows)


def conversion_table(converted):
    """MHA models converted, before and after fine-tuning: does the best induction head stay one?"""
    heading = ['converted to', 'its score in MHA', 'converted', 'fine-tuned', 'best score, fine-tuned']
    heading += ['loss on repeats, MHA', 'converted', 'fine-tuned']
    rows = []
    for r in dict.fromkeys(run['n_latent'] for run in converted):
        runs = [run for run in converted if run['n_latent'] == r]
        stages = [[run[stage] for run in runs] for stage in ('mha', 'converted', 'tuned')]
        same, loss = ([cells(group, key)[0] for group in stages] for key in ('same', 'repeat_loss'))
        rows.append((attention_of(runs[0]), *same, *cells(stages[-1], 'best'), *loss))
    return report.markdown_table(heading, rows)


# ---- figures ---------------------------------------------------------------------------------------------------------


def formation_figure(outcomes):
    """Best induction score over iterations: a panel per model, a line per run."""
    shapes = groups(outcomes, LAYERS)
    columns = list(dict.fromkeys(name for _, name in shapes))
    figure = Figure(figsize=(style.WIDTH, 4.4))
    axes = figure.subplots(2, len(columns), sharex=True, sharey=True, squeeze=False)
    for (pos, name), group in shapes.items():
        axis = axes[int(pos == 'rope')][columns.index(name)]
        look = style.look(name, group[0]['n_latent'] / WIDTH) | dict(marker='', linestyle='-', linewidth=1.2)
        for run in group:
            axis.plot(*zip(*run['curve'], strict=True), **look)
        axis.axhline(FORMED, color=style.GREY, linewidth=0.6)
        ended = sum(run['score'] > FORMED for run in group)
        axis.text(0.97, 0.55, f'{ended} of {len(group)}', transform=axis.transAxes, ha='right', weight='bold')
        axis.set(ylim=(0, 1), title=name if pos == 'learned' else '')
    for row, name in zip(axes, ('learned positions', 'RoPE'), strict=True):
        row[0].set_ylabel(f'{name}\nbest induction score')
    figure.supxlabel('iteration (a line is a run; bold: how many end above 0.5)', fontsize=9)
    said = []
    for kind in ('mha', 'mla'):
        ended = [run['score'] > FORMED for group in shapes.values() for run in group if run['attention'] == kind]
        said.append(f'{sum(ended)} of {len(ended)} runs of {kind.upper()}')
    figure.suptitle(f'Induction heads form in {" and in ".join(said)}')
    return figure


# ---- train, measure, report ------------------------------------------------------------------------------------------

if seeds == 1:
    raise UserError('seeds is 1; it must be at least 2, as one gives no interval, or 0 for the default')
paths = outputs(config, 'formation')
conversion_title = f'The best head of MHA (learned positions), converted, and {TUNING} iterations later'
with reading(reuse):
    if reuse:
        earlier = read_json(reuse)
        full, max_iters = (earlier['config'][key] for key in ('full', 'max_iters'))
        iterations = max_iters or (2000 if full else 1200)
        outcomes, converted = earlier['runs'], earlier['conversions']
    else:
        repeats = os.path.join(data_dir, 'repeats')
        if not os.path.exists(os.path.join(repeats, 'train.bin')):
            subprocesses.run_script('data/repeats/prepare.py', [dict(folder=repeats)], out_dir)
        outcomes = subprocesses.run_all(train_and_measure, planned(), jobs)
        converted = subprocesses.run_all(convert_and_measure, conversions(), jobs)
    parts = {
        f'Formation and final scores ({LAYERS} layers, 4 heads, C = {WIDTH})': formation_table(outcomes),
        f'The best head of runs with a score > {FORMED}; ablations: increase of loss on repeats': head_table(outcomes),
        f'Depth ({DEEP} layers, learned positions)': depth_table(outcomes),
        f'The latent in the layer of the best head, of runs with a score > {FORMED}': latent_table(outcomes),
        conversion_title: conversion_table(converted),
    }
    picture = formation_figure(outcomes)
    steps, count = snapshots(), len({o['seed'] for o in outcomes})
spread = '± the half width of the 95 % t interval' if count >= stats.LEAST else 'with their range in brackets'
intro = (
    f'Made by `python studies/induction.py{" --full=True" * full}`: {len(outcomes)} runs of {steps[-1]} iterations, '
    f'{count} training seeds each, measured at iterations {", ".join(map(str, steps))}. Values are means over seeds '
    f'{spread}. If only some runs form heads, the mean and its interval describe neither kind: see the column by seed. '
    'Iterations are medians [range] over the runs that formed heads. Losses are in nats.\n'
)
text = '\n'.join([intro, *(f'**{title}**\n\n{lines}' for title, lines in parts.items())])
save(paths, text, picture, None if reuse else dict(config=config, runs=outcomes, conversions=converted))
