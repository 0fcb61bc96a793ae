"""
MHA, GQA, MQA and MLA, each at its own best learning rate, on the same batches; and what conversion adds.

$ python data/shakespeare_char/prepare.py
$ python studies/contest.py                        # a short form: every arm, two rates, few iterations
$ python studies/contest.py --full=True            # the whole grid and all seeds; two cores take a day
$ python studies/contest.py --full=True --dataset=code --arms="MHA;MQA;MLA, r=C/2" --figure=assets/contest_code.png
$ python studies/contest.py --full=True --dataset=code --reuse=assets/contest_code.json --arms=GQA-2    # adds an arm
$ python studies/contest.py --reuse=assets/contest_code.json    # tables and pictures again, in seconds

On a GPU, at a larger size:
$ python studies/contest.py --full=True --dataset=code --n_layer=6 --n_embd=384 --block_size=256 \
    --device=cuda --dtype=bfloat16 --jobs=8 --rates=1e-3,2e-3,4e-3 --arms="MHA;MQA;MLA, r=C/2"

1. Tuning: each arm is trained at every learning rate of one grid, over `tuning_seeds` seeds.
2. Contest: at its best rate it is trained with `final_seeds` other seeds, and compared with MHA, and with MQA, by seed.
3. Conversion: the MHA models of the contest become the arms in CONVERTED, and are fine-tuned briefly.
4. Controls: MLA that starts from an MHA model of iteration 0, 100 or 500 instead of its own initial values.

Every run is one of train.py and convert_mla.py. Finished runs are kept: repeat the command to continue.
Writes DATASET.md into out_dir, and beside `figure` (loss over cache bytes per token) a -rates.png (loss over learning
rate) and a .json with every run. Run it from the repository root.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from core.cli import signals

signals.exit_at_once()  # for the time of the slow imports

import os
import textwrap

import torch
from matplotlib.figure import Figure

from analysis import comparison, report, stats, style
from core.cli import arguments, files, machine, subprocesses
from core.cli.errors import UserError
from core.runs import checkpoint as checkpoints
from core.runs import models
from core.runs.evaluation import mean_and_stderr, window_losses
from core.runs.resume import OLDER
from core.text.dataset import TokenData
from studies.arms import Arm, choose, mla
from studies.measure import read_json, reading

# ----------------------------------------------------------------------------------------------------------------------
out_dir = 'out-contest'  # the runs
figure = ''  # the picture, with the numbers in a .json beside it; '': DATASET.png in out_dir
full = False  # the whole grid and all seeds
dataset = 'shakespeare_char'
data_dir = 'data'
max_iters = 0  # iterations of each training; 0: 2000, in the short form 50
tuning_seeds = 0  # seeds per learning rate; 0: 3, in the short form 1
final_seeds = 0  # seeds at the best rate; 0: 5, in the short form 2
control_seeds = 0  # seeds of the controls (step 4); 0: as many as final_seeds
arms = ''  # labels of EVERY separated by semicolons; '': all, with `reuse` none
conversions = True  # steps 3 and 4 too, where MHA and MLA at r=C/2 are among the arms
reuse = ''  # the .json of an earlier study: its arms stand in the tables and pictures too, its runs are not repeated
rates = ''  # the grid of learning rates, separated by commas, also of reused arms; '': 2e-3, 4e-3, 8e-3, 1.6e-2
jobs = 0  # concurrent trainings with one thread each; 0: the cores that this process may use
# size of the models and of a batch
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 16
# machine
device = 'cpu'
dtype = 'float32'
exec(open(Path(__file__).resolve().parents[1] / 'configurator.py', encoding='utf-8').read())
# ----------------------------------------------------------------------------------------------------------------------

# With four heads and learned positions MLA at r=C/2 caches what MQA caches, and at r=C, where its keys and values have
# full rank, what GQA-2 caches. r=2C/3 gives MLA as many parameters as MHA, C/3 as GQA-2, C/6 as MQA.
SLOW = 'kv_lr=1/8'
EVERY = [
    *(Arm(attention) for attention in ('MHA', 'GQA-2', 'MQA')),
    *(mla(latent) for latent in ('1/2', '1/4', '1/8')),
    *(Arm(attention, changes=(SLOW,)) for attention in ('MHA', 'MQA')),
    *(mla(latent, SLOW) for latent in ('1', '2/3', '1/2', '1/3', '1/4', '1/6', '1/8')),
    mla('1/2', 'latent norm', SLOW),
    mla('1/2', 'as in 0.1.0'),
    *(Arm(attention, changes=('RoPE',)) for attention in ('MHA', 'MQA')),
    *(mla('1/2', 'RoPE', *more) for more in ((), (SLOW,), ('latent norm',))),
    *(Arm(attention, changes=('Muon',)) for attention in ('MHA', 'MQA')),
    *(mla('1/2', 'Muon', *more) for more in ((), (SLOW,))),
]
ARMS = {arm.label: arm for arm in EVERY}
MHA, HALF = Arm('MHA'), mla('1/2', SLOW)
CONVERTED = [Arm('GQA-2'), Arm('MQA'), HALF, mla('1/4', SLOW), mla('1/8', SLOW)]
CONTROLS = [MHA, HALF, mla('1', SLOW)]
STARTS = (0, 100, 500)  # iterations of MHA before a control
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
IDENTITY = ('arm', 'kind', 'rate', 'seed')  # what names a run within a study
WINDOWS = 4000 if full else 400  # of the validation split, evenly spaced; tinyshakespeare has 1,742
TUNING_SEED, FINAL_SEED = 1000, 2000  # where the seeds begin: the rate is chosen on others than those that are reported

device = machine.pick_device(device)
dtype = machine.pick_dtype(dtype, device, n_embd)
SETTING = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, batch_size=batch_size)
SETTING |= dict(gradient_accumulation_steps=1, bias=False, beta2=0.99, warmup_iters=100, min_lr=1e-4, eval_iters=1)
SETTING |= dict(always_save_checkpoint=True, checkpoint_interval=500, log_interval=50)
SETTING |= dict(device=device, dtype=dtype, threads=1)
iterations = max_iters or (2000 if full else 50)
tuning_iterations = max(1, iterations // 10)  # after a conversion
n_tuning, n_final = tuning_seeds or (3 if full else 1), final_seeds or (5 if full else 2)
runs_dir = os.path.join(out_dir, f'{os.path.basename(dataset)}-{iterations}')


# ---- runs ------------------------------------------------------------------------------------------------------------


def run(arm, rate, seed, steps, kind='scratch', source='', **more):
    """A training as subprocesses.run_all takes it; source: a checkpoint to start from."""
    name = f'{arm.slug}_{kind}_lr{rate:g}_s{seed}'
    keys = SETTING | arm.keys(n_embd) | dict(max_iters=steps, lr_decay_iters=steps, eval_interval=steps)
    keys |= dict(learning_rate=rate, seed=seed, dataset=dataset, data_dir=data_dir, resume='auto') | more
    keys |= dict(init_from=source) if source else {}
    folder = os.path.join(runs_dir, name)
    return dict(name=name, arm=arm.label, kind=kind, rate=rate, seed=seed, keys=keys, folder=folder)


def trained(arm, rate, seed):
    """A run of an arm from scratch. MHA's keep the checkpoints from which the controls start."""
    kept = dict(keep_checkpoints=','.join(map(str, STARTS))) if arm == MHA and seed >= FINAL_SEED else {}
    return run(arm, rate, seed, iterations, **kept)


def lacking(items, runs):
    """Those of the items that are not among some runs."""
    known = {tuple(r[key] for key in IDENTITY) for r in runs}
    return [item for item in items if tuple(item[key] for key in IDENTITY) not in known]


def do(work, items, recorded):
    """The recorded runs and, of the items that are not among them, work(item); seed by seed, for whole columns."""
    missing = sorted(lacking(items, recorded), key=lambda item: (item['seed'], item['rate']))
    return recorded + subprocesses.run_all(work, missing, jobs)


def train_and_measure(item):
    """Train a run, unless that is done, and measure it: the run with 'val_loss', 'parameters', ...; diverged: None."""
    ckpt, result = (os.path.join(item['folder'], name) for name in ('ckpt.pt', 'result.json'))
    if not finished(item, ckpt):
        keys = dict(item['keys'], compile=False, out_dir=item['folder'])  # compiling takes longer than a small run
        if not subprocesses.converges('train.py', [keys], item['folder']):
            return dict(item, val_loss=None)  # this rate is too high for this arm
    if not subprocesses.is_current(result, ckpt):
        files.write_json(result, measured(ckpt))
    return item | read_json(result)


def finished(item, ckpt):
    """True if a run is complete. UserError if its folder holds a run with other keys."""
    if not os.path.exists(ckpt):
        return False
    saved = checkpoints.load(ckpt, mapped=True)
    for key, value in item['keys'].items():
        found = saved['config'].get(key, OLDER.get(key, value))
        if key not in ('resume', 'init_from', 'data_dir') and found != value:
            raise UserError(f'{item["folder"]} has {key}={found}, not {value}; choose another --out_dir')
    return saved['iter_num'] >= item['keys']['max_iters']


def measured(ckpt):
    """Sizes of the model in a checkpoint and its loss on the validation windows, in nats per token: a dict."""
    model = models.build_model(checkpoints.load(ckpt)).eval().to(device)
    losses = window_losses(model, data, 'val', WINDOWS, batch_size=64)
    return dict(val_loss=mean_and_stderr(losses)[0], **comparison.sizes(model))


def convert_and_tune(item):
    """Convert the MHA model that a run starts from (MHA itself stays), measure it, then fine-tune it."""
    if item['arm'] == MHA.label:
        return train_and_measure(item)
    folder = item['folder'] + '_converted'
    if not os.path.exists(os.path.join(folder, 'ckpt.pt')):
        keys = {key: value for key, value in item['keys'].items() if key in ('n_latent', 'n_kv_head')}
        keys |= dict(source=item['keys']['init_from'], data_dir=data_dir, device=device, eval_tokens=4096)
        subprocesses.run_script('convert_mla.py', [dict(keys, threads=1, out_dir=folder)], folder)
    item = dict(item, keys=dict(item['keys'], init_from=folder))
    return dict(train_and_measure(item), before=measured(os.path.join(folder, 'ckpt.pt'))['val_loss'])


def read_study(path):
    """The numbers of an earlier study. UserError if it isn't one."""
    with reading(path):
        numbers = read_json(path)
        numbers['mha_rate'] = numbers['best_rates'].get(MHA.label)
        numbers['setting'] |= dict(corpus=numbers['corpus'], iterations=numbers['iterations'])
        unknown = {r['arm'] for r in numbers['runs']} - set(ARMS)
    if unknown:
        raise UserError(f'{path} has arms that are not known here ({"; ".join(sorted(unknown))}); leave out --reuse')
    return numbers


# ---- results ---------------------------------------------------------------------------------------------------------


class Study:
    """Runs of a study, however they came about, and each arm's best learning rate."""

    def __init__(self, runs, rates):
        self.runs, self.rates = runs, rates
        self.grid = {name: self.mean_losses(name) for name in ARMS if self.tuning_seeds(name)}
        if lost := [name for name, means in self.grid.items() if not means]:
            raise UserError(f'{"; ".join(lost)} diverged at every learning rate; add lower ones to --rates')
        self.best = {name: min(means, key=means.get) for name, means in self.grid.items()}

    def tuning(self, name):
        """The runs that were to find an arm's best rate."""
        return [r for r in self.runs if r['arm'] == name and r['seed'] < FINAL_SEED and r['rate'] in self.rates]

    def tuning_seeds(self, name):
        """How many seeds they have."""
        return len({r['seed'] for r in self.tuning(name)})

    def mean_losses(self, name):
        """{rate: mean loss} of an arm's tuning; a rate at which a seed diverged is left out."""
        runs = [r for r in self.tuning(name) if r['val_loss']]
        found = {rate: [r['val_loss'] for r in runs if r['rate'] == rate] for rate in self.rates}
        seeds = self.tuning_seeds(name)
        return {rate: sum(values) / seeds for rate, values in found.items() if len(values) == seeds}

    def final(self, kind='scratch'):
        """The runs that are reported: from scratch at the best rate, 'tuned' after a conversion, 'from100'."""
        of_kind = (r for r in self.runs if r['kind'] == kind and r['seed'] >= FINAL_SEED)
        return [r for r in of_kind if kind != 'scratch' or r['rate'] == self.best.get(r['arm'])]

    def losses(self, arm, kind='scratch', key='val_loss'):
        """{seed: validation loss} of an arm's reported runs that didn't diverge."""
        return {r['seed']: r[key] for r in self.final(kind) if r['arm'] == arm.label and r.get(key)}

    def arms(self, kind='scratch'):
        """The arms of which there are such runs."""
        return [arm for arm in EVERY if self.losses(arm, kind)]

    def size(self, arm, kind='scratch', key='cache_bytes_per_token'):
        """A size of an arm's models."""
        return next(r[key] for r in self.final(kind) if r['arm'] == arm.label and r['val_loss'])


# ---- tables ----------------------------------------------------------------------------------------------------------


def minus(mine, theirs):
    """Differences of two {seed: loss}, by seed, as a cell; '' where no seed is in both, or both are the same."""
    shared = sorted(mine.keys() & theirs.keys()) if mine != theirs else []
    return report.spread([mine[seed] - theirs[seed] for seed in shared], '+.4f') if shared else ''


def setup(arm):
    """What an arm changes beside its attention: its positions and its optimizer."""
    return tuple(change for change in arm.changes if change in ('RoPE', 'Muon'))


def contest_table(study):
    """Every arm at its best rate, and against MHA and MQA with the same positions and optimizer."""
    sizes, losses = ('parameters', 'cache bytes per token'), ('validation loss', 'minus MHA', 'minus MQA')
    rows = []
    for arm in study.arms():
        mine, rate = study.losses(arm), study.best[arm.label]
        edge = ' (end of the grid)' * (rate in (study.rates[0], study.rates[-1]))
        gaps = [minus(mine, study.losses(Arm(name, changes=setup(arm)))) for name in ('MHA', 'MQA')]
        found = [f'{study.size(arm, key=key.replace(" ", "_")):,}' for key in sizes]
        rows.append((arm.label, *found, f'{rate:g}{edge}', len(mine), report.spread(mine.values(), '.4f'), *gaps))
    return report.markdown_table(('arm', *sizes, 'best learning rate', 'seeds', *losses), rows)


def grid_table(study):
    """The mean loss of every arm at every rate of the grid."""
    rows = []
    for name in (arm.label for arm in study.arms()):
        means = study.grid[name]
        cells = (f'{means[rate]:.4f}' if rate in means else 'diverged' for rate in study.rates)
        rows.append((name, *cells, study.tuning_seeds(name)))
    return report.markdown_table(('arm', *(f'{rate:g}' for rate in study.rates), 'seeds'), rows)


def conversion_table(study):
    """MHA models converted, before and after fine-tuning, against the same fine-tuning of MHA itself."""
    heading = ['MHA converted to', 'cache bytes per token', 'before fine-tuning, minus MHA']
    heading += ['fine-tuned, minus MHA fine-tuned', 'fine-tuned, minus the same from scratch']
    rows = []
    for arm in study.arms('tuned'):
        if arm != MHA:
            mine, mha = study.losses(arm, 'tuned'), study.losses(MHA, 'tuned')
            before = minus(study.losses(arm, 'tuned', 'before'), study.losses(MHA))
            gaps = (before, minus(mine, mha), minus(mine, study.losses(arm)))
            rows.append((arm.label, f'{study.size(arm, "tuned"):,}', *gaps))
    return report.markdown_table(heading, rows)


def control_table(study):
    """Models that start from MHA of an early iteration, against MHA itself."""
    mha = study.losses(MHA)
    rows = [(arm.label, *(minus(study.losses(arm, f'from{start}'), mha) for start in STARTS)) for arm in CONTROLS]
    return report.markdown_table(('then', *(f'{start} iterations of MHA' for start in STARTS)), rows)


# ---- pictures --------------------------------------------------------------------------------------------------------

PANELS = {(): 'learned positions, AdamW', ('RoPE',): 'RoPE, AdamW', ('Muon',): 'learned positions, Muon'}


def draw_rates(study, setting_line):
    """Loss over learning rate by arm, one panel for each kind of positions and optimizer."""
    groups = {key: [arm for arm in study.arms() if setup(arm) == key] for key in PANELS}
    groups = {key: group for key, group in groups.items() if group}
    figure = Figure(figsize=(style.WIDTH, 1 + 3.2 * len(groups)))
    for axis, (key, group) in zip(figure.subplots(len(groups), 1, squeeze=False)[:, 0], groups.items(), strict=True):
        for arm in group:
            axis.plot(*zip(*study.grid[arm.label].items(), strict=True), label=arm.label, **arm.look())
        axis.set_xscale('log', base=2)
        axis.set_xticks(study.rates, [f'{rate:g}' for rate in study.rates])
        lowest = min(min(study.grid[arm.label].values()) for arm in group)
        axis.set(title=PANELS[key], ylabel='validation loss (nats per token)', ylim=(lowest - 0.02, lowest + 0.25))
        axis.legend(loc='center left', bbox_to_anchor=(1, 0.5))
    axis.set_xlabel('learning rate')
    figure.suptitle(f'Every model on the same grid of learning rates\n{textwrap.fill(setting_line, 90)}')
    return figure


def curves(study):
    """The curves of `draw_cache`: a label, the kind of the runs, arms and a look each."""
    ways = (('scratch', (), '', '-'), ('scratch', (SLOW,), ', kv_lr=1/8', '--'), ('tuned', None, '', ':'))
    for name, attentions in (('MHA, GQA, MQA', ('MHA', 'GQA-2', 'MQA')), ('MLA', ('MLA',))):
        for variant, (kind, changes, more, line) in enumerate(ways):
            found = [arm for arm in study.arms(kind) if arm.attention in attentions]
            members = [arm for arm in found if (arm != MHA if kind == 'tuned' else arm.changes == changes)]
            label = f'{name} ' + ('converted from MHA' if kind == 'tuned' else 'from scratch') + more
            yield label, kind, members, dict(style.look(attentions[0], 0.5, variant), linestyle=line)


def draw_cache(study, setting_line):
    """Loss over cache bytes per token: from scratch at the best rate, and converted from MHA."""
    figure = Figure(figsize=(style.WIDTH, 5.6))
    axes, sizes = figure.subplots(), set()
    for label, kind, members, look in curves(study):
        points = [(study.size(arm, kind), *stats.t_interval([*study.losses(arm, kind).values()])) for arm in members]
        if points:
            x, y, half = zip(*sorted(points), strict=True)
            sizes.update(x)
            axes.errorbar(x, y, [width or 0 for width in half], capsize=3, label=label, **look)
        if label.endswith('scratch'):  # the others stand at the same caches
            for arm, (*place, _) in zip(members, points, strict=True):
                offset = dict(textcoords='offset points', fontsize=8.5, color=look['color'])
                axes.annotate(arm.label, place, (6, 7), **offset)
    axes.set_xscale('log', base=2)
    axes.set_xticks(sorted(sizes), [f'{size:,}' for size in sorted(sizes)], rotation=45)
    axes.minorticks_off()
    axes.margins(x=0.1)
    axes.set(xlabel='cache bytes per token (float32)', ylabel='validation loss (nats per token)')
    title = 'Loss against cache, each at its best learning rate: mean and 95 % interval'
    axes.set_title(f'{title}\n{textwrap.fill(setting_line, 90)}')
    axes.legend()
    return figure


# ---- train, measure, report ------------------------------------------------------------------------------------------


def contest(named, rates, recorded, mha_rate):
    """The Study of these arms at these learning rates, and of recorded runs; mha_rate: MHA's best one among those."""
    plans = [trained(arm, rate, TUNING_SEED + n) for arm in named for rate in rates for n in range(n_tuning)]
    runs = do(train_and_measure, plans, [r for r in recorded if r['kind'] == 'scratch'])
    best, seeds = Study(runs, rates).best, [FINAL_SEED + n for n in range(n_final)]
    plans = [trained(arm, best[arm.label], seed) for arm in named for seed in seeds]
    study = Study(do(train_and_measure, plans, runs), rates)
    if lost := [arm.label for arm in named if not set(seeds) <= set(study.losses(arm))]:
        raise UserError(f'{"; ".join(lost)} diverged with a final seed; leave its best rate out of --rates')
    # recorded conversions and controls begin from MHA models at its best rate of then
    begun = [r for r in recorded if r['kind'] != 'scratch'] if mha_rate == best.get('MHA') else []
    if conversions and {MHA, HALF} <= set(named):
        begun = converted_and_controls(named, seeds, best, begun)
    return Study(study.runs + begun, rates)


def converted_and_controls(named, seeds, best, recorded):
    """Steps 3 and 4: runs that begin from MHA models, at a fixed rate, or at the best one of the arm they become."""
    sources, starts, early = {seed: trained(MHA, best['MHA'], seed) for seed in seeds}, [], []
    for seed, source in sources.items():
        for arm in [MHA, *(arm for arm in CONVERTED if arm in named)]:
            starts.append(run(arm, 1e-3, seed, tuning_iterations, 'tuned', source['folder'], warmup_iters=10))
    for seed in seeds[: control_seeds or n_final]:
        for arm, start in [(arm, start) for arm in CONTROLS for start in STARTS if start < iterations]:
            rate = best[MHA.label if arm == MHA else HALF.label]
            source = os.path.join(sources[seed]['folder'], f'ckpt_{start:06}.pt')
            early.append(run(arm, rate, seed, iterations - start, f'from{start}', source))
    needed = {item['seed'] for item in lacking(starts + early, recorded)}
    do(train_and_measure, [sources[seed] for seed in sorted(needed)], [])  # recorded ones may be gone
    return do(train_and_measure, early, do(convert_and_tune, starts, recorded))


named = choose(arms, EVERY) if arms else [] if reuse else EVERY
grid = tuple(sorted(set(arguments.numbers(rates, 'rates'))))
if figure:
    arguments.check_file(figure, 'figure')
arguments.check_folder(runs_dir)
earlier = read_study(reuse) if reuse else dict(setting=SETTING, runs=[], mha_rate=None)
setting = earlier['setting']
if named:
    data = TokenData(os.path.join(data_dir, dataset), block_size)
    setting = dict(SETTING, corpus=data.corpus, iterations=iterations)
    grid = grid or (RATES if full else RATES[1::2])
    for key, value in setting.items():
        if reuse and earlier['setting'].get(key) != value:
            raise UserError(f'{reuse} has {key}={earlier["setting"].get(key)}, not {value}; leave out --reuse')
torch.set_num_threads(1)
with reading('' if named else reuse):
    grid = grid or tuple(sorted({r['rate'] for r in earlier['runs'] if r['seed'] < FINAL_SEED}))
    study = contest(named, grid, earlier['runs'], earlier['mha_rate'])

corpus, iterations = setting.pop('corpus'), setting.pop('iterations')
setting_line = f'{iterations} iterations on {corpus}, {setting["n_layer"]} layers, C\xa0=\xa0{setting["n_embd"]}'
intro = (
    f'{setting_line}, {setting["n_head"]} heads, {setting["batch_size"]} x {setting["block_size"]} tokens per '
    f'iteration. Learning rates: the best of {len(grid)} on the seeds that the second table counts. Losses: other '
    'seeds at that rate, mean ± half width of the 95 % t interval, with fewer than four seeds mean [range]; '
    'differences are by seed.'
)
if named and not full:
    intro += ' A short form, whose losses say nothing about which arm is better.'
text = f'{intro}\n\n{contest_table(study)}\nMean loss of the tuning by learning rate:\n\n{grid_table(study)}'
if study.arms('tuned'):
    steps = max(1, iterations // 10)
    text += f'\nMHA converted and fine-tuned for {steps} iterations at 1e-3:\n\n{conversion_table(study)}'
    text += f'\nControls: loss minus MHA, after as many iterations in all:\n\n{control_table(study)}'
print(text, end='')
os.makedirs(out_dir, exist_ok=True)  # where every run is an earlier one, nothing has made it
name = os.path.basename(dataset) if named else Path(reuse).stem
report.save_text(os.path.join(out_dir, f'{name}.md'), text)
path = figure or os.path.join(out_dir, f'{name}.png')
keep = ('arm', 'kind', 'rate', 'seed', 'val_loss', 'before', 'parameters', 'flops_per_token', 'cache_bytes_per_token')
shown = [r for r in study.runs if r['seed'] >= FINAL_SEED or r['rate'] in grid]
every = [{key: r[key] for key in keep if key in r} for r in shown]
numbers = dict(corpus=corpus, iterations=iterations, setting=setting, best_rates=study.best, runs=every)
report.save_json(os.path.splitext(path)[0] + '.json', numbers)
report.save_figure(path, draw_cache(study, setting_line))
report.save_figure(os.path.splitext(path)[0] + '-rates.png', draw_rates(study, setting_line))
