"""
The study behind RESULTS.md: does MLA form induction heads, when, how strong, where, and out of what?

$ python study_induction.py                    # short form: minutes on two cores
$ python study_induction.py --full=True        # all seeds and latent sizes: about an hour on two cores
$ python study_induction.py --reuse=assets/induction_study.json    # RESULTS.md's tables from its numbers, in seconds
$ python study_induction.py --text_models=out-imdb,out-imdb-mla    # with models of real text, trained before

Trains every model through train.py on data/repeats, measures it at several iterations through
find_induction_heads.py, and writes tables.md, study.json and formation.png into out_dir. What is finished is kept: run
the same command again after an interruption. --results=RESULTS.md puts the tables between that file's <!-- study -->
marks.
"""

import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from statistics import mean, median, stdev

import matplotlib
import numpy as np
from tqdm import tqdm

from core import checkpoint as checkpoints
from core import runtime
from core.runtime import UserError

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

# ----------------------------------------------------------------------------------------------------------------------
full = False  # every latent size, five seeds, 2000 iterations; else the short form
out_dir = 'out-study'  # runs and tables
seeds = 0  # training seeds; 0: 5 in the full form, 2 in the short one
max_iters = 0  # 0: 2000 in the full form, 1200 in the short one
text_models = ''  # folders of models trained on real text, separated by commas
reuse = ''  # the study.json of an earlier study, to make its tables and pictures again; nothing is trained
results = ''  # a file whose <!-- study --> ... <!-- /study --> part is replaced by the tables
data_dir = 'data'
jobs = 0  # trainings at a time, each with one thread; 0: the cores that this process may use
exec(open('configurator.py', encoding='utf-8').read())
# ----------------------------------------------------------------------------------------------------------------------

FORMED = 0.5  # a head is said to have formed when the best induction score passes this
T_QUANTILE = {4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # 97.5 %, n values
STYLES = [dict(linestyle=line, marker=mark) for line, mark in (('-', 'o'), ('--', 's'), ('-.', '^'), (':', 'D'))]
STYLES.append(dict(linestyle=(0, (5, 1, 1, 1, 1, 1)), marker='v'))
WIDTH, LAYERS, DEEP = 64, 2, 4  # n_embd of config/train_repeats.py, its layers, and those of the runs about depth


# ---- the runs --------------------------------------------------------------------------------------------------------


def planned():
    """Every run of this form of the study: dicts of name, attention, n_latent (0 for MHA), pos, n_layer, seed."""
    count = seeds or (5 if full else 2)
    latents = (0, 32, 16, 8, 4) if full else (0, 16)  # 0 stands for MHA; the others are C/2 to C/16
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


def label(run):
    return f'MLA r={run["n_latent"]}' if run['n_latent'] else 'MHA'


def shown(run):
    """What tables and pictures call a run's attention."""
    return f'{label(run)} (C/{WIDTH // run["n_latent"]})' if run['n_latent'] else 'MHA'


def snapshots():
    """The iterations at which each run is measured: close together where heads form."""
    end = max_iters or (2000 if full else 1200)
    wanted = (200, 300, 400, 500, 600, 800, 1000, 1200, 1500) if full else (300, 600, 900)
    return [iteration for iteration in wanted if iteration < end] + [end]


def call(arguments, folder):
    """Run one of the project's scripts; its output goes to a log in `folder`. UserError where it fails."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, 'log.txt')
    with open(path, 'a', encoding='utf-8') as file:
        environment = dict(os.environ, OMP_NUM_THREADS='1')
        code = subprocess.run(
            [sys.executable, *arguments], stdout=file, stderr=file, env=environment, check=False
        ).returncode
    if code:
        raise UserError(f'{arguments[0]} failed with exit code {code}; the reason is at the end of {path}')


def train(run):
    """Train one run as far as it is not trained yet, and keep a checkpoint of each of snapshots()."""
    steps = snapshots()
    if os.path.exists(os.path.join(run['folder'], f'ckpt_{steps[-1]:06}.pt')):
        return
    arguments = ['train.py', 'config/train_repeats.py', f'--out_dir={run["folder"]}', f'--data_dir={data_dir}',
                 '--init_from=auto', f'--max_iters={steps[-1]}', f'--keep_checkpoints={",".join(map(str, steps))}',
                 f'--attention={run["attention"]}', f'--n_latent={run["n_latent"]}', f'--pos={run["pos"]}',
                 f'--n_layer={run["n_layer"]}', f'--seed={run["seed"]}', '--threads=1']  # fmt: skip
    call(arguments, run['folder'])


def measure(folder, sweep):
    """Measure a trained model, unless that is done: into `folder`/induction."""
    to = os.path.join(folder, 'induction')
    done = os.path.join(to, 'induction.json')
    if os.path.exists(done) and os.path.getmtime(done) >= os.path.getmtime(os.path.join(folder, 'ckpt.pt')):
        return
    arguments = ['find_induction_heads.py', f'--models={folder}', f'--out_dir={to}', f'--data_dir={data_dir}']
    more = [f'--sweep={folder}', '--html=False', '--threads=1'] if sweep else ['--text_windows=1024']
    call(arguments + more, folder)


def train_and_measure(run):
    train(run)
    measure(run['folder'], sweep=True)


def train_and_measure_all(runs):
    """The outcomes of all runs, several at a time; what is finished is not repeated."""
    if not os.path.exists(os.path.join(data_dir, 'repeats', 'train.bin')):
        call(['data/repeats/prepare.py', f'--folder={os.path.join(data_dir, "repeats")}'], out_dir)
    with (
        ThreadPoolExecutor(jobs or runtime.available_cores()) as pool,
        tqdm(total=len(runs), unit='run', disable=None) as bar,
    ):
        waiting = [pool.submit(train_and_measure, run) for run in runs]
        try:
            for run, future in zip(runs, waiting, strict=True):
                future.result()
                bar.update()
                runtime.notice(f'{run["name"]} is trained and measured')
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return [outcome(run) for run in runs]


def earlier_study(path):
    """The settings and outcomes that an earlier study wrote into its study.json. UserError where it holds none."""
    try:
        found = read_json(path)
        return {key: found['config'][key] for key in ('full', 'max_iters')}, [dict(run) for run in found['runs']]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} can't be read as a study ({error}); name the study.json of another") from error


def read_json(*path):
    with open(os.path.join(*path), encoding='utf-8') as file:
        return json.load(file)


def outcome(run):
    """What the tables need of one run: a dict of numbers."""
    found = read_json(run['folder'], 'induction', 'induction.json')['models'][0]
    steps = read_json(run['folder'], 'induction', 'formation.json')['runs'][0]['checkpoints']
    layer, head = best = tuple(found['ranking'][0])
    previous = np.array(found['previous_token']['mean'])
    formed = [step['iteration'] for step in steps if step['induction']['mean'] > FORMED]
    together = {step['heads']: step for step in found['ablation']['together']}
    lift = np.array(found['composition_lift']['k'], dtype=float)[:, :, layer, head]  # null, so nan, where none can be
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
    """What the latent of the best head's layer is made of."""
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
    """How many of the bands it takes to make up nine tenths of what ablating each alone costs."""
    total = np.cumsum(np.sort(rises)[::-1])
    return int(np.searchsorted(total, 0.9 * total[-1])) + 1


# ---- tables ----------------------------------------------------------------------------------------------------------


def interval(values):
    """'mean ± half width' of the 95 % t interval over seeds; the range instead where there are fewer than four."""
    values = [value for value in values if value is not None]
    if not values:
        return 'n/a'
    if len(values) not in T_QUANTILE:
        low, high = min(values), max(values)
        return f'{mean(values):.3f}' + (f' [{low:.3f}, {high:.3f}]' if high > low else '')
    return f'{mean(values):.3f} ± {T_QUANTILE[len(values)] * stdev(values) / len(values) ** 0.5:.3f}'


def when(outcomes):
    """Median iteration of forming and its range, with those that never did."""
    formed = sorted(o['formed'] for o in outcomes if o['formed'])
    if not formed:
        return f'never (0 of {len(outcomes)})'
    spread = f' [{formed[0]}, {formed[-1]}]' if formed[0] != formed[-1] else ''
    missing = '' if len(formed) == len(outcomes) else f' ({len(formed)} of {len(outcomes)})'
    return f'{median(formed):.0f}{spread}{missing}'


def table(heading, rows):
    lines = ['| ' + ' | '.join(heading) + ' |', '|' + '---|' * len(heading)]
    return '\n'.join(lines + ['| ' + ' | '.join(str(cell) for cell in row) + ' |' for row in rows]) + '\n'


def groups(outcomes, n_layer):
    """Outcomes by (pos, attention and latent), in the order they were planned."""
    found = {}
    for o in outcomes:
        if o['n_layer'] == n_layer:
            found.setdefault((o['pos'], shown(o)), []).append(o)
    return found


def column(rows, key, sign=''):
    """A cell of a table: the interval of `key` over rows, dicts."""
    return sign + interval([row[key] for row in rows])


def formation_table(outcomes):
    heading = ('positions', 'attention', f'best head passes {FORMED} at', 'best induction score', 'by seed',
               'best previous-token score', 'induction heads of 8', 'loss on repeats', 'val loss')  # fmt: skip
    rows = []
    for (pos, name), group in groups(outcomes, LAYERS).items():
        by_seed = ', '.join(f'{o["score"]:.2f}' for o in group)
        values = [column(group, key) for key in ('previous', 'called', 'repeat_loss', 'val_loss')]
        rows.append((pos, name, when(group), column(group, 'score'), by_seed, *values))
    return table(heading, rows)


def head_table(outcomes):
    """What the best head does, of the runs in which one formed: an average with the others would describe neither."""
    cells = {
        'same head, shuffled copy': 'shuffled',
        'its copying': 'copying',
        'K-composition lift': 'lift',
        'without best head': 'ablate_best',
        'without best 2': 'ablate_two',
        'without 2 others of their layers': 'ablate_random',
        'without best 4': 'ablate_four',
    }
    rows = []
    for (pos, name), group in groups(outcomes, LAYERS).items():
        formed = [o for o in group if o['score'] > FORMED]
        if formed:
            values = [column(formed, key, '+' if key.startswith('ablate') else '') for key in cells.values()]
            rows.append((pos, name, f'{len(formed)} of {len(group)}', *values))
    return table(('positions', 'attention', 'runs', *cells), rows)


def paired_table(outcomes):
    """MLA minus MHA on the same seed, hence the same batches and the same shared initial values."""
    mha = {(o['pos'], o['seed']): o for o in outcomes if o['n_layer'] == LAYERS and not o['n_latent']}
    keys, rows = ('score', 'repeat_loss', 'val_loss'), []
    for (pos, name), group in groups(outcomes, LAYERS).items():
        if group[0]['n_latent']:
            minus = [{key: o[key] - mha[pos, o['seed']][key] for key in keys} for o in group]
            rows.append((pos, name, *(column(minus, key) for key in keys)))
    return table(('positions', 'attention', 'best induction score', 'loss on repeats', 'val loss'), rows)


def depth_table(outcomes):
    heading = ('attention', f'best head passes {FORMED} at', 'best induction score by seed', 'where (layer.head)',
               'best previous-token score', 'where', 'loss on repeats', 'val loss')  # fmt: skip
    rows = []
    for (_, name), group in groups(outcomes, DEEP).items():
        best, previous = (', '.join(f'{o[key][0]}.{o[key][1]}' for o in group) for key in ('best', 'best_previous'))
        losses = (column(group, 'repeat_loss'), column(group, 'val_loss'))
        by_seed = ', '.join(f'{o["score"]:.2f}' for o in group)
        rows.append((name, when(group), by_seed, best, column(group, 'previous'), previous, *losses))
    return table(heading, rows)


def latent_table(outcomes):
    heading = ('positions', 'attention', 'effective rank', 'overlap of keys (chance)', 'of values',
               'of keys with values', 'bands for 90 % of the cost: keys', 'values', 'cost in common', 'content logit',
               'position logit', 'runs')  # fmt: skip
    rows = []
    for (pos, name), group in groups(outcomes, LAYERS).items():
        found = [o['latent'] for o in group if 'latent' in o and o['score'] > FORMED]
        if found:
            overlaps = [f'{column(found, f"{kind}_overlap")} ({found[0][f"{kind}_overlap_chance"]:.2f})'
                        for kind in ('key', 'value', 'key_value')]  # fmt: skip
            parts = [column(found, part) if part in found[0] else '' for part in ('content', 'position')]
            shares = [column(found, key) for key in ('keys_carry', 'values_carry', 'shared')]
            rows.append((pos, name, column(found, 'effective_rank'), *overlaps, *shares, *parts,
                         f'{len(found)} of {len(group)}'))  # fmt: skip
    return table(heading, rows)


def text_table(folders):
    heading = ('model', 'attention', 'iteration', 'val loss', 'best head', 'induction score [95 %]', 'random init',
               'shuffled copy', 'induction heads', 'copying', 'loss on repeats', 'in-context score')  # fmt: skip
    rows = []
    for folder in folders:
        found = read_json(folder, 'induction', 'induction.json')['models'][0]
        layer, head = found['ranking'][0]
        score, low, high = (found['induction'][key][layer][head] for key in ('mean', 'low', 'high'))
        context = found['in_context']
        rows.append((
            found['name'],
            found['attention'],
            f'{found["iteration"]:,}',
            f'{found["val_loss"]:.4f}',
            f'{layer}.{head}',
            f'{score:.3f} [{low:.3f}, {high:.3f}]',
            f'{found["random_null"]:.3f}',
            f'{found["shuffled"]["mean"][layer][head]:.3f}',
            int(np.sum(found['called'])),
            f'{found["copying_eigenvalues"][layer][head]:+.2f}',
            f'{found["repeat_loss"]["mean"]:.3f}',
            f'{context["mean"]:+.3f}' if context else 'n/a',
        ))  # fmt: skip
    return table(heading, rows)


def draw_formation(outcomes):
    """Best induction score over iterations: a thin line per seed, a panel per kind of positions."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.2), sharey=True, layout='constrained')
    for axis, pos in zip(axes, ('learned', 'rope'), strict=True):
        chosen = [(name, group) for (of, name), group in groups(outcomes, LAYERS).items() if of == pos]
        for number, (name, group) in enumerate(chosen):
            formed = sum(o['score'] > FORMED for o in group)
            for o in group:
                title = f'{name}: {formed} of {len(group)} end above' if o is group[0] else None
                x, y = zip(*o['curve'], strict=True)
                axis.plot(x, y, **STYLES[number], color=f'C{number}', linewidth=1, markersize=3, label=title)
        axis.axhline(FORMED, color='grey', linewidth=0.6)
        axis.annotate(
            f'{FORMED}', (1.0, FORMED), xycoords=('axes fraction', 'data'), fontsize=8, va='bottom', ha='right'
        )
        positions = 'RoPE' if pos == 'rope' else 'learned positions'
        axis.set(xlabel='iteration', title=f'{positions}, {LAYERS} layers, C = {WIDTH}', ylim=(0, 1))
        axis.legend(loc='upper center', bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize=8)
    axes[0].set_ylabel('best induction score (a line per seed)')
    save_figure(figure, 'formation.png')


def draw_losses(folders):
    """Train and val loss of the text models over their runs, from their log.csv, with the val loss's standard error."""
    figure, axis = plt.subplots(figsize=(7, 4.2), layout='constrained')
    seen = []
    for number, folder in enumerate(folders):
        with open(os.path.join(folder, 'log.csv'), encoding='utf-8', newline='') as file:
            rows = [row for row in csv.DictReader(file) if row['val_loss']]
        iterations = [int(row['iter']) for row in rows]
        train, val, error = ([float(row[key]) for row in rows] for key in ('train_loss', 'val_loss', 'val_stderr'))
        attention = checkpoints.load(folder, mapped=True).get('attention', 'mha').upper()
        name = f'{attention} ({os.path.basename(os.path.normpath(folder))})'
        color, mark = f'C{number}', 'os^D'[number % 4]
        axis.errorbar(iterations, val, error, color=color, marker=mark, markersize=4, label=f'{name}, val loss')
        axis.plot(iterations, train, '--', color=color, marker=mark, markersize=4, markerfacecolor='white',
                  label=f'{name}, train loss')  # fmt: skip
        seen += train[1:] + val[1:]  # the untrained model's would leave the rest no room
    if seen:
        room = 0.05 * (max(seen) - min(seen))
        axis.set_ylim(min(seen) - room, max(seen) + room)
    axis.set(xlabel='iteration', ylabel='loss (nats per token)')
    axis.legend(fontsize=8)
    save_figure(figure, 'full_run.png')


def save_figure(figure, name):
    path = os.path.join(out_dir, name)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    runtime.notice(f'wrote {path}')


def write(path, text):
    with open(path + '.writing', 'w', encoding='utf-8') as file:
        file.write(text)
    os.replace(path + '.writing', path)
    runtime.notice(f'wrote {path}')


def around_marks(path):
    """What stands before <!-- study --> and after <!-- /study --> in a file. UserError where it has no such marks."""
    try:
        with open(path, encoding='utf-8') as file:
            before, rest = file.read().split('<!-- study -->')
        return before, rest.split('<!-- /study -->')[1]
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f'{path} has no <!-- study --> ... <!-- /study --> part to put the tables in') from error


# ---- from top to bottom ----------------------------------------------------------------------------------------------

if seeds == 1 or seeds < 0 or max_iters < 0 or jobs < 0:
    raise UserError(
        'seeds must be at least 2 (one gives no interval), or 0 for the default; max_iters and jobs not negative'
    )
if results:
    around_marks(results)  # before hours of training, not after
folders = [folder.strip() for folder in text_models.split(',') if folder.strip()]
for folder in folders:
    checkpoints.find(folder)
if reuse:
    earlier, outcomes = earlier_study(reuse)
    full, max_iters = earlier['full'], earlier['max_iters']
else:
    outcomes = train_and_measure_all(planned())
for folder in folders:
    measure(folder, sweep=False)

steps, count = snapshots(), len({o['seed'] for o in outcomes})
command = 'python study_induction.py' + (' --full=True' if full else '')
intro = (f'Made by `{command}`: {len(outcomes)} runs of {steps[-1]} iterations, {count} training seeds each, measured '
         f'at iterations {", ".join(map(str, steps))}. Values are means over seeds, with '
         + ('± the half width of their 95 % t interval' if count in T_QUANTILE else 'the range in brackets')
         + '; where some runs form heads and others do not, such an interval says little: see the column by seed. '
         'Iterations of forming are medians [range] over the runs that formed. Losses are in nats.\n')  # fmt: skip
parts = [
    ('When heads form, and how strong they end (2 layers, 4 heads, C = 64)', formation_table(outcomes)),
    (f'What the best head is, where it passed {FORMED}: losses without it', head_table(outcomes)),
    ('MLA minus MHA, paired by seed', paired_table(outcomes)),
    ('Where in depth (4 layers, learned positions)', depth_table(outcomes)),
    (f'How the latent divides, in the layer of the best head, where it passed {FORMED}', latent_table(outcomes)),
]
if folders:
    parts.append(('Models trained on real text', text_table(folders)))
text = '\n'.join([intro, *(f'**{title}**\n\n{lines}' for title, lines in parts)])
os.makedirs(out_dir, exist_ok=True)
write(os.path.join(out_dir, 'tables.md'), text)
settings = dict(config, full=full, max_iters=max_iters)
write(os.path.join(out_dir, 'study.json'), json.dumps(dict(config=settings, runs=outcomes), indent=1))
draw_formation(outcomes)
if folders:
    draw_losses(folders)
if results:
    before, after = around_marks(results)
    write(results, f'{before}<!-- study -->\n{text}<!-- /study -->{after}')
print(text)
