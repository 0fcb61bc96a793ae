"""
The study behind RESULTS.md: does MLA form induction heads? When, how strong, in which layers, and how with a latent?

$ python studies/induction.py                    # short form: minutes on two cores
$ python studies/induction.py --full=True        # all seeds and latent sizes: about an hour on two cores
$ python studies/induction.py --reuse=assets/induction_study.json    # RESULTS.md's tables from its numbers, in seconds
$ python studies/induction.py --reuse=assets/induction_study.json --convert    # with new conversions: 10 minutes

Trains every model with train.py on data/repeats, measures it at several iterations with find_induction_heads.py, and
writes tables.md, study.json and formation.png into out_dir. Finished runs are kept: repeat the command to continue
after an interruption. --results=RESULTS.md replaces the tables between that file's <!-- study --> marks. Run it from
the repository root.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from core.cli import signals

signals.exit_at_once()  # for the time of the slow imports

import os
from statistics import median

import numpy as np
from matplotlib.figure import Figure

from analysis import report, stats
from core.cli import arguments, errors, subprocesses
from core.cli.errors import UserError
from studies.measure import measure, measurement, read_json, sweep

# ----------------------------------------------------------------------------------------------------------------------
full = False  # every latent size, five seeds, 2000 iterations; otherwise the short form
out_dir = 'out-study'  # runs and tables
seeds = 0  # training seeds; 0: 5 in the full form, 2 in the short one
max_iters = 0  # 0: 2000 in the full form, 1200 in the short one
reuse = ''  # the study.json of an earlier study: its tables and pictures are made again, nothing is trained
convert = False  # with reuse: train the MHA models that are converted, and convert them, all the same
results = ''  # a file whose <!-- study --> ... <!-- /study --> part is replaced by the tables
data_dir = 'data'
jobs = 0  # concurrent trainings with one thread each; 0: the cores that this process may use
exec(open(Path(__file__).resolve().parents[1] / 'configurator.py', encoding='utf-8').read())
# ----------------------------------------------------------------------------------------------------------------------

FORMED = 0.5  # an induction head has formed when the best induction score exceeds this
STYLES = [dict(linestyle=line, marker=mark) for line, mark in (('-', 'o'), ('--', 's'), ('-.', '^'), (':', 'D'))]
STYLES.append(dict(linestyle=(0, (5, 1, 1, 1, 1, 1)), marker='v'))
COLORS = ('#c4622d', '#0d1b3d', '#2f5aa8', '#6fa3d8', '#a9a9a9')  # MHA, then MLA from wide to narrow, fading
TUNING = 200  # iterations of fine-tuning after a conversion
WIDTH, LAYERS, DEEP = 64, 2, 4  # n_embd of config/train_repeats.py, its layers, and those of the runs about depth


# ---- runs ------------------------------------------------------------------------------------------------------------


def planned():
    """All runs of this form of the study: dicts of name, folder, attention, n_latent (0: MHA), pos, n_layer, seed."""
    count = seeds or (5 if full else 2)
    latents = (0, 32, 16, 8, 4) if full else (0, 16)  # 0: MHA; the others are C/2 to C/16
    runs = [
        dict(n_latent=r, pos=pos, n_layer=LAYERS, seed=1337 + number)
        for pos in ('learned', 'rope')
        for r in latents
        for number in range(count)
    ]
    runs += [dict(n_latent=r, pos='learned', n_layer=DEEP, seed=1337 + n) for r in (0, 16) for n in range(count)]
    for run in runs:
        run['attention'] = 'mla' if run['n_latent'] else 'mha'
        run['name'] = f'{run["n_layer"]}l-{run["pos"]}-{label(run)}-s{run["seed"]}'.replace('=', '').replace(' ', '-')
        run['folder'] = os.path.join(out_dir, run['name'])
    return runs


def conversions(runs):
    """The conversions of the two-layer MHA models among `runs`: dicts of name, folder, source, n_latent, seed."""
    found = [dict(name=f'converted-r{r}-s{run["seed"]}', source=run['folder'], n_latent=r, seed=run['seed'])
             for r in ((32, 16, 8) if full else (16,)) for run in runs if is_source(run)]  # fmt: skip
    return [dict(run, folder=os.path.join(out_dir, run['name'])) for run in found]


def is_source(run):
    """True for a run whose model is converted."""
    return (run['n_latent'], run['pos'], run['n_layer']) == (0, 'learned', LAYERS)


def label(run):
    """A run's attention and latent size."""
    return f'MLA r={run["n_latent"]}' if run['n_latent'] else 'MHA'


def shown(run):
    """A run's attention in tables and figures."""
    return f'{label(run)} (C/{WIDTH // run["n_latent"]})' if run['n_latent'] else 'MHA'


def snapshots():
    """The iterations at which each run is measured: closer together where heads form."""
    end = max_iters or (2000 if full else 1200)
    wanted = (200, 300, 400, 500, 600, 800, 1000, 1200, 1500) if full else (300, 600, 900)
    return [iteration for iteration in wanted if iteration < end] + [end]


def train(run):
    """Train one run to its end, resuming it if it was interrupted, and keep a checkpoint at each of snapshots()."""
    steps = snapshots()
    if os.path.exists(os.path.join(run['folder'], f'ckpt_{steps[-1]:06}.pt')):
        return
    keys = dict(out_dir=run['folder'], data_dir=data_dir, init_from='auto', max_iters=steps[-1], threads=1,
                keep_checkpoints=','.join(map(str, steps)))  # fmt: skip
    keys |= {key: run[key] for key in ('attention', 'n_latent', 'pos', 'n_layer', 'seed')}
    keys |= dict(latent_init='gpt2', kv_lr=1.0)  # with which the figures of RESULTS.md were measured
    subprocesses.run_script('train.py', ['config/train_repeats.py', keys], run['folder'])


def train_and_measure(run):
    """Train and measure one run, as far as that isn't done yet; returns its outcome."""
    train(run)
    measure(run['folder'], sweep=run['folder'], data_dir=data_dir, html=False, threads=1)
    return outcome(run)


def convert_and_measure(run):
    """Convert an MHA model, measure the result, fine-tune it briefly and measure again; returns the run's numbers."""
    folder, tuned = run['folder'], run['folder'] + '-tuned'
    if not os.path.exists(os.path.join(folder, 'ckpt.pt')):
        keys = dict(source=run['source'], out_dir=folder, n_latent=run['n_latent'], dataset='repeats',
                    data_dir=data_dir, threads=1)  # fmt: skip
        subprocesses.run_script('convert_mla.py', [keys], folder)
    if not os.path.exists(os.path.join(tuned, f'ckpt_{TUNING:06}.pt')):
        keys = dict(out_dir=tuned, data_dir=data_dir, init_from=folder, resume='auto', max_iters=TUNING,
                    lr_decay_iters=TUNING, eval_interval=TUNING, warmup_iters=10, keep_checkpoints=TUNING, threads=1,
                    seed=run['seed'], n_latent=run['n_latent'], kv_lr=1.0)  # fmt: skip
        subprocesses.run_script('train_mla.py', ['config/train_repeats_mla.py', keys], tuned)
    head = measurement(run['source'])['ranking'][0]
    out = dict(n_latent=run['n_latent'], seed=run['seed'], mha=head_numbers(run['source'], head))
    for name, of in (('converted', folder), ('tuned', tuned)):
        measure(of, data_dir=data_dir, html=False, threads=1)
        out[name] = head_numbers(of, head)
    return out


def head_numbers(folder, head):
    """The score of one head of a measured model, that of its best head, and its loss on repeated tokens: a dict."""
    found = measurement(folder)
    scores, best = found['induction']['mean'], found['ranking'][0]
    return dict(same=scores[head[0]][head[1]], best=scores[best[0]][best[1]], heads=int(np.sum(found['called'])),
                repeat_loss=found['repeat_loss']['mean'])  # fmt: skip


def prepare_data():
    """Make data_dir/repeats if it is missing."""
    folder = os.path.join(data_dir, 'repeats')
    if not os.path.exists(os.path.join(folder, 'train.bin')):
        subprocesses.run_script('data/repeats/prepare.py', [dict(folder=folder)], out_dir)


def earlier_study(path):
    """Settings, outcomes and conversions from the study.json of an earlier study. UserError if it isn't one."""
    try:
        found = read_json(path)
        settings = {key: found['config'][key] for key in ('full', 'max_iters')}
        return settings, [dict(run) for run in found['runs']], found.get('conversions', [])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} can't be read as a study ({error}); name the study.json of another") from error


# ---- outcomes --------------------------------------------------------------------------------------------------------


def outcome(run):
    """A run and the numbers that the tables show of it: a dict."""
    found = measurement(run['folder'])
    steps = sweep(run['folder'])
    layer, head = best = tuple(found['ranking'][0])
    previous = np.array(found['previous_token']['mean'])
    formed = [step['iteration'] for step in steps if step['induction']['mean'] > FORMED]
    together = {step['heads']: step for step in found['ablation']['together']}
    lift = np.array(found['composition_lift']['k'], dtype=float)[:, :, layer, head]  # nan for heads that aren't earlier
    out = dict(
        run,
        best=best,
        formed=formed[0] if formed else None,
        curve=[(step['iteration'], step['induction']['mean']) for step in steps],
        score=found['induction']['mean'][layer][head],
        shuffled=found['shuffled']['mean'][layer][head],
        random_null=found['random_null'],
        called=int(np.sum(found['called'])),
        copying=found['copying_eigenvalues'][layer][head],
        copying_top5=found['copying_top5'][layer][head],
        lift=float(np.nanmax(lift)) if layer else None,
        repeat_loss=found['repeat_loss']['mean'],
        val_loss=found['val_loss'],
        ablate_best=found['ablation']['rise'][layer][head],
        ablate_two=together[2]['rise'],
        ablate_random=together[2]['control_rise'],
        ablate_four=together[4]['rise'],
        best_previous=[int(i) for i in np.unravel_index(previous.argmax(), previous.shape)],
        previous=float(previous.max()),
    )
    if 'latent' in found:
        out['latent'] = latent_of_layer(found['latent'], layer, head)
    return out


def latent_of_layer(latent, layer, head):
    """The measurements of the latent in the layer of the best head: a dict of numbers."""
    other = ~np.eye(len(latent['key_overlap'][layer]), dtype=bool)
    keys, values = (np.maximum(latent[f'{path}_ablation'][layer], 0) for path in ('keys', 'values'))
    shares = [part / max(part.sum(), 1e-9) for part in (keys, values)]
    out = dict(effective_rank=latent['effective_rank'][layer], shared=float(np.minimum(*shares).sum()),
               keys_carry=carry(keys), values_carry=carry(values), keys_rise=float(keys.sum()),
               values_rise=float(values.sum()))  # fmt: skip
    for name in ('key', 'value', 'key_value'):
        overlap = np.array(latent[f'{name}_overlap'][layer])
        out[f'{name}_overlap'] = float(overlap[other].mean() if name != 'key_value' else overlap.mean())
        out[f'{name}_overlap_chance'] = latent[f'{name}_overlap_chance']
    if 'logit_parts' in latent:
        out.update({part: latent['logit_parts'][part]['mean'][layer][head] for part in ('content', 'position')})
    return out


def carry(rises):
    """The smallest number of bands whose loss increases (n,) add up to 90 % of the total."""
    total = np.cumsum(np.sort(rises)[::-1])
    return int(np.searchsorted(total, 0.9 * total[-1])) + 1


# ---- tables ----------------------------------------------------------------------------------------------------------


def interval(values):
    """'mean ± half width' of the 95 % t interval; 'mean [low, high]', the range, for fewer than four values."""
    values = [value for value in values if value is not None]
    if not values:
        return 'n/a'
    center, half = stats.t_interval(values)
    if half is not None:
        return f'{center:.3f} ± {half:.3f}'
    low, high = min(values), max(values)
    return f'{center:.3f}' + (f' [{low:.3f}, {high:.3f}]' if high > low else '')


def when(outcomes):
    """Median and range of the iterations at which heads formed, and how many runs formed them."""
    formed = sorted(o['formed'] for o in outcomes if o['formed'])
    if not formed:
        return f'never (0 of {len(outcomes)})'
    spread = f' [{formed[0]}, {formed[-1]}]' if formed[0] != formed[-1] else ''
    missing = '' if len(formed) == len(outcomes) else f' ({len(formed)} of {len(outcomes)})'
    return f'{median(formed):.0f}{spread}{missing}'


def groups(outcomes, n_layer):
    """Outcomes with n_layer layers by (pos, attention and latent), in the order of `planned`."""
    found = {}
    for o in outcomes:
        if o['n_layer'] == n_layer:
            found.setdefault((o['pos'], shown(o)), []).append(o)
    return found


def cell(rows, key, sign=''):
    """A table cell: the interval of `key` over rows, dicts."""
    return sign + interval([row[key] for row in rows])


def formation_table(outcomes):
    """Formation and final scores of the runs with two layers."""
    heading = ('positions', 'attention', f'iteration of best score > {FORMED}', 'best induction score', 'by seed',
               'best previous-token score', 'induction heads of 8', 'loss on repeats', 'val loss')  # fmt: skip
    rows = []
    for (pos, name), group in groups(outcomes, LAYERS).items():
        by_seed = ', '.join(f'{o["score"]:.2f}' for o in group)
        values = [cell(group, key) for key in ('previous', 'called', 'repeat_loss', 'val_loss')]
        rows.append((pos, name, when(group), cell(group, 'score'), by_seed, *values))
    return report.markdown_table(heading, rows)


def head_table(outcomes):
    """The best head of the runs in which one formed; an average with the other runs would describe neither."""
    cells = {
        'score on shuffled copy': 'shuffled',
        'copying score': 'copying',
        'K-composition lift': 'lift',
        'top 1 ablated': 'ablate_best',
        'top 2 ablated': 'ablate_two',
        '2 random others ablated': 'ablate_random',
        'top 4 ablated': 'ablate_four',
    }
    rows = []
    for (pos, name), group in groups(outcomes, LAYERS).items():
        formed = [o for o in group if o['score'] > FORMED]
        if formed:
            values = [cell(formed, key, '+' if key.startswith('ablate') else '') for key in cells.values()]
            rows.append((pos, name, f'{len(formed)} of {len(group)}', *values))
    return report.markdown_table(('positions', 'attention', 'runs', *cells), rows)


def paired_table(outcomes):
    """MLA minus MHA for the same seed, and hence the same batches and the same initial values of shared tensors."""
    mha = {(o['pos'], o['seed']): o for o in outcomes if o['n_layer'] == LAYERS and not o['n_latent']}
    keys, rows = ('score', 'repeat_loss', 'val_loss'), []
    for (pos, name), group in groups(outcomes, LAYERS).items():
        if group[0]['n_latent']:
            minus = [{key: o[key] - mha[pos, o['seed']][key] for key in keys} for o in group]
            rows.append((pos, name, *(cell(minus, key) for key in keys)))
    heading = ('positions', 'attention', 'best induction score', 'loss on repeats', 'val loss')
    return report.markdown_table(heading, rows)


def depth_table(outcomes):
    """The layers of the best heads in the runs with four layers."""
    heading = ('attention', f'iteration of best score > {FORMED}', 'best induction score by seed', 'layer.head',
               'best previous-token score', 'layer.head', 'loss on repeats', 'val loss')  # fmt: skip
    rows = []
    for (_, name), group in groups(outcomes, DEEP).items():
        best, previous = (', '.join(f'{o[key][0]}.{o[key][1]}' for o in group) for key in ('best', 'best_previous'))
        losses = (cell(group, 'repeat_loss'), cell(group, 'val_loss'))
        by_seed = ', '.join(f'{o["score"]:.2f}' for o in group)
        rows.append((name, when(group), by_seed, best, cell(group, 'previous'), previous, *losses))
    return report.markdown_table(heading, rows)


def latent_table(outcomes):
    """The latent in the layer of the best head, in the runs in which one formed."""
    heading = ('positions', 'attention', 'effective rank', 'overlap: keys (chance)', 'overlap: values (chance)',
               'overlap: keys and values (chance)', 'bands with 90 % of the cost: keys',
               'bands with 90 % of the cost: values', 'shared cost', 'content logit', 'position logit',
               'runs')  # fmt: skip
    rows = []
    for (pos, name), group in groups(outcomes, LAYERS).items():
        found = [o['latent'] for o in group if 'latent' in o and o['score'] > FORMED]
        if found:
            overlaps = [f'{cell(found, f"{kind}_overlap")} ({found[0][f"{kind}_overlap_chance"]:.2f})'
                        for kind in ('key', 'value', 'key_value')]  # fmt: skip
            parts = [cell(found, part) if part in found[0] else '' for part in ('content', 'position')]
            shares = [cell(found, key) for key in ('keys_carry', 'values_carry', 'shared')]
            rows.append((pos, name, cell(found, 'effective_rank'), *overlaps, *shares, *parts,
                         f'{len(found)} of {len(group)}'))  # fmt: skip
    return report.markdown_table(heading, rows)


def conversion_table(converted):
    """MHA models converted, before and after fine-tuning: does the best induction head stay one?"""
    heading = ('converted to', 'its score in MHA', 'converted', 'fine-tuned', 'best score, fine-tuned',
               'loss on repeats, MHA', 'converted', 'fine-tuned')  # fmt: skip
    rows, stages = [], ('mha', 'converted', 'tuned')
    for r in dict.fromkeys(run['n_latent'] for run in converted):
        group = [run for run in converted if run['n_latent'] == r]
        cells = {key: [cell([run[stage] for run in group], key) for stage in stages]
                 for key in ('same', 'best', 'repeat_loss')}  # fmt: skip
        rows.append((f'MLA r={r} (C/{WIDTH // r})', *cells['same'], cells['best'][-1], *cells['repeat_loss']))
    return report.markdown_table(heading, rows)


def around_marks(path):
    """The text before <!-- study --> and after <!-- /study --> in a file. UserError if it doesn't have these marks."""
    try:
        with open(path, encoding='utf-8') as file:
            before, rest = file.read().split('<!-- study -->')
        return before, rest.split('<!-- /study -->')[1]
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f'{path} has no <!-- study --> ... <!-- /study --> part for the tables; add them') from error


def tables(outcomes, converted):
    """(title, table) of each part of RESULTS.md."""
    found = [
        (f'Formation and final scores ({LAYERS} layers, 4 heads, C = {WIDTH})', formation_table(outcomes)),
        (
            f'The best head of runs with a score > {FORMED}; ablations: increase of loss on repeats',
            head_table(outcomes),
        ),
        ('MLA minus MHA, paired by seed', paired_table(outcomes)),
        (f'Depth ({DEEP} layers, learned positions)', depth_table(outcomes)),
        (f'The latent in the layer of the best head, of runs with a score > {FORMED}', latent_table(outcomes)),
    ]
    title = f'The best head of MHA (learned positions), converted, and {TUNING} iterations later'
    return found + ([(title, conversion_table(converted))] if converted else [])


# ---- figures ---------------------------------------------------------------------------------------------------------


def formation_figure(outcomes):
    """Best induction score over iterations: the mean over seeds with the seeds thin, a panel per kind of positions."""
    figure = Figure(figsize=(11, 5.4), layout='constrained')
    axes = figure.subplots(1, 2, sharey=True)
    for axis, pos in zip(axes, ('learned', 'rope'), strict=True):
        chosen = [(name, group) for (of, name), group in groups(outcomes, LAYERS).items() if of == pos]
        for number, (name, group) in enumerate(chosen):
            formed = sum(o['score'] > FORMED for o in group)
            look = dict(color=COLORS[number], linestyle=STYLES[number]['linestyle'])
            curves = np.array([[score for _, score in o['curve']] for o in group])
            iterations = [iteration for iteration, _ in group[0]['curve']]
            axis.plot(iterations, curves.T, **look, linewidth=0.6, alpha=0.45)
            axis.plot(iterations, curves.mean(0), **look, marker=STYLES[number]['marker'], markersize=4, linewidth=2,
                      label=f'{name}: {formed} of {len(group)} end above {FORMED}')  # fmt: skip
        axis.axhline(FORMED, color='grey', linewidth=0.6)
        positions = 'RoPE' if pos == 'rope' else 'learned positions'
        axis.set(xlabel='iteration', title=positions, ylim=(0, 1))
        axis.legend(loc='upper center', bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize=8)
    axes[0].set_ylabel('best induction score (mean, and thin: each seed)')
    figure.suptitle(f'When induction heads form on repeated random tokens: {LAYERS} layers, C = {WIDTH}; MLA from the '
                    'initial values of version 0.1.0', fontsize='medium')  # fmt: skip
    return figure


# ---- train, measure, report ------------------------------------------------------------------------------------------

if seeds == 1:
    raise UserError('seeds is 1; it must be at least 2, as one gives no interval, or 0 for the default')
arguments.check_folder(out_dir)
if results:
    around_marks(results)  # fail before the training, not after it
if reuse:
    earlier, outcomes, converted = earlier_study(reuse)
    full, max_iters = earlier['full'], earlier['max_iters']
else:
    prepare_data()
    outcomes = subprocesses.run_all(train_and_measure, planned(), jobs)
if convert or not reuse:
    prepare_data()
    subprocesses.run_all(train_and_measure, [run for run in planned() if is_source(run)], jobs)
    converted = subprocesses.run_all(convert_and_measure, conversions(planned()), jobs)

steps, count = snapshots(), len({o['seed'] for o in outcomes})
command = 'python studies/induction.py' + (' --full=True' if full else '')
intro = (f'Made by `{command}`: {len(outcomes)} runs of {steps[-1]} iterations, {count} training seeds each, measured '
         f'at iterations {", ".join(map(str, steps))}. Values are means over seeds '
         + ('± the half width of the 95 % t interval' if count in stats.T_QUANTILE else 'with their range in brackets')
         + '. If only some runs form heads, the mean and its interval describe neither kind: see the column by seed. '
         'Iterations are medians [range] over the runs that formed heads. Losses are in nats.\n')  # fmt: skip
try:
    parts, picture = tables(outcomes, converted), formation_figure(outcomes)
except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
    if not reuse:
        raise
    raise UserError(f"{reuse} can't be read as a study ({error}); name the study.json of another") from error
text = '\n'.join([intro, *(f'**{title}**\n\n{lines}' for title, lines in parts)])
os.makedirs(out_dir, exist_ok=True)
report.save_text(os.path.join(out_dir, 'tables.md'), text)
settings = dict(config, full=full, max_iters=max_iters)
report.save_json(os.path.join(out_dir, 'study.json'), dict(config=settings, runs=outcomes, conversions=converted))
report.save_figure(os.path.join(out_dir, 'formation.png'), picture)
if results:
    before, after = around_marks(results)
    report.save_text(results, f'{before}<!-- study -->\n{text}<!-- /study -->{after}')
errors.output(text)
