"""
MHA, GQA, MQA and MLA, each at its own best learning rate, on the same batches; and what conversion adds.

$ python data/shakespeare_char/prepare.py
$ python studies/contest.py                        # a short form: every arm, two rates, few iterations
$ python studies/contest.py --full=True            # the whole grid and all seeds; two cores take a day
$ python studies/contest.py --full=True --dataset=code --arms="MHA;MQA;MLA, r=C/2" --figure=assets/contest_code.png
$ python studies/contest.py --full=True --dataset=code --earlier=assets/contest_code.json --arms=GQA-2    # adds an arm

On a GPU, at a larger size:
$ python studies/contest.py --full=True --dataset=code --n_layer=6 --n_embd=384 --block_size=256 \
    --device=cuda --dtype=bfloat16 --jobs=8 --rates=1e-3,2e-3,4e-3 --arms="MHA;MQA;MLA, r=C/2"

1. Tuning: each arm is trained at every learning rate of one grid, over `tuning_seeds` seeds.
2. Contest: at its best rate it is trained with `final_seeds` other seeds, and compared with MHA, and with MQA, by seed.
3. Conversion: the MHA models of the contest become the arms in CONVERTED, and are fine-tuned briefly.
4. Controls: MLA that starts from an MHA model of iteration 0, 100 or 500 instead of its own initial values.

Every run is one of train.py, train_mla.py and convert_mla.py. Finished runs are kept: repeat the command to continue.
Writes DATASET.md into out_dir, and beside `figure` (loss over cache bytes per token) a -rates.png (loss over learning
rate) and a .json with every run. Run it from the repository root.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from core.cli import signals

signals.exit_at_once()  # for the time of the slow imports

import json
import os
import textwrap

import torch
from matplotlib.figure import Figure

from analysis import comparison, report, stats
from core.cli import arguments, files, machine, subprocesses
from core.cli.errors import UserError
from core.runs import checkpoint as checkpoints
from core.runs import models
from core.runs.evaluation import mean_and_stderr, window_losses
from core.text.dataset import TokenData

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
arms = ''  # names of ARMS separated by semicolons; '': all
conversions = True  # steps 3 and 4 too, where MHA and MLA at r=C/2 are among the arms
earlier = ''  # the .json of an earlier study: its runs are not repeated, its arms stand in the tables too
rates = ''  # the grid of learning rates, separated by commas, also of earlier arms; '': 2e-3, 4e-3, 8e-3, 1.6e-2
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

device = machine.pick_device(device)
dtype = machine.pick_dtype(dtype, device, n_embd)
C = n_embd
SETTING = dict(n_layer=n_layer, n_head=n_head, n_embd=C, block_size=block_size, batch_size=batch_size,
               gradient_accumulation_steps=1, bias=False, beta2=0.99, warmup_iters=100, min_lr=1e-4, eval_iters=1,
               always_save_checkpoint=True, checkpoint_interval=500, log_interval=50, device=device, dtype=dtype,
               threads=1)  # fmt: skip


def mla(n_latent, **more):
    """Keys of an arm with MLA. They name kv_lr although it is the default: what a name means must not change."""
    return dict(n_latent=n_latent, kv_lr=1 / 8) | more


# With four heads and learned positions MLA at r=C/2 caches what MQA caches, and at r=C, where its keys and values have
# full rank, what GQA-2 caches. r=2C/3 gives MLA as many parameters as MHA, C/3 as GQA-2, C/6 as MQA.
ARMS = {
    'MHA': {},
    'GQA-2': dict(n_kv_head=2),
    'MQA': dict(n_kv_head=1),
    'MLA, r=C': mla(C),
    'MLA, r=2C/3': mla(2 * C // 3),
    'MLA, r=C/2': mla(C // 2),
    'MLA, r=C/3': mla(C // 3),
    'MLA, r=C/4': mla(C // 4),
    'MLA, r=C/6': mla(C // 6),
    'MLA, r=C/8': mla(C // 8),
    'MLA, r=C/2, latent norm': mla(C // 2, latent_norm=True),
    'MHA, kv_lr=1/8': dict(kv_lr=1 / 8),
    'MQA, kv_lr=1/8': dict(n_kv_head=1, kv_lr=1 / 8),
    'MLA, r=C/2, kv_lr=1': mla(C // 2, kv_lr=1.0),
    'MLA, r=C/4, kv_lr=1': mla(C // 4, kv_lr=1.0),
    'MLA, r=C/8, kv_lr=1': mla(C // 8, kv_lr=1.0),
    'MLA, r=C/2, as in 0.1.0': mla(C // 2, kv_lr=1.0, latent_init='gpt2'),
    'MHA, RoPE': dict(pos='rope'),
    'MQA, RoPE': dict(n_kv_head=1, pos='rope'),
    'MLA, r=C/2, RoPE': mla(C // 2, pos='rope'),
    'MLA, r=C/2, RoPE, kv_lr=1': mla(C // 2, pos='rope', kv_lr=1.0),
    'MLA, r=C/2, RoPE, latent norm, kv_lr=1': mla(C // 2, pos='rope', latent_norm=True, kv_lr=1.0),
    'MHA, Muon': dict(optimizer='muon'),
    'MQA, Muon': dict(n_kv_head=1, optimizer='muon'),
    'MLA, r=C/2, Muon': mla(C // 2, optimizer='muon'),
    'MLA, r=C/2, Muon, kv_lr=1': mla(C // 2, optimizer='muon', kv_lr=1.0),
}
CONVERTED = {arm: ARMS[arm] for arm in ('GQA-2', 'MQA', 'MLA, r=C/2', 'MLA, r=C/4', 'MLA, r=C/8')}
CONTROLS = {arm: ARMS[arm] for arm in ('MHA', 'MLA, r=C/2', 'MLA, r=C')}
STARTS = (0, 100, 500)  # iterations of MHA before a control
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
WINDOWS = 4000 if full else 400  # of the validation split, evenly spaced; tinyshakespeare has 1,742
TUNING_SEED, FINAL_SEED = 1000, 2000  # where the seeds begin: the rate is chosen on others than those that are reported


# ---- runs ------------------------------------------------------------------------------------------------------------


def script_of(keys):
    """The script that trains a model with these keys."""
    return 'train_mla.py' if 'n_latent' in keys else 'train.py'


def run(arm, keys, rate, seed, iterations, kind='scratch', source=''):
    """A training as scripts.run_all takes it; source: a checkpoint to start from."""
    slug = ''.join(letter if letter.isalnum() else '-' for letter in arm.lower().replace(', ', '_'))
    name = f'{slug}_{kind}_lr{rate:g}_s{seed}'
    keys = {**SETTING, **keys, 'max_iters': iterations, 'lr_decay_iters': iterations, 'eval_interval': iterations,
            'learning_rate': rate, 'seed': seed, 'dataset': dataset, 'data_dir': data_dir}  # fmt: skip
    keys.update(dict(init_from=source) if source else {}, resume='auto')
    return dict(name=name, arm=arm, kind=kind, rate=rate, seed=seed, keys=keys, folder=os.path.join(runs_dir, name))


def trained(arm, rate, seed):
    """A run of an arm from scratch. MHA's keep the checkpoints from which the controls start."""
    kept = {'keep_checkpoints': ','.join(map(str, STARTS))} if arm == 'MHA' and seed >= FINAL_SEED else {}
    return run(arm, {**ARMS[arm], **kept}, rate, seed, iterations)


def read_earlier():
    """
    The study in `earlier`: {what names a run: its numbers}, and MHA's best rate. UserError if it had another setting.
    """
    if not earlier:
        return {}, None
    try:
        with open(earlier, encoding='utf-8') as file:
            numbers = json.load(file)
        found = {identity(r): r for r in numbers['runs']}
        of_mha = numbers['best_rates'].get('MHA')
        theirs = {'corpus': numbers['corpus'], 'iterations': numbers['iterations'], **numbers['setting']}
        unknown = {r['arm'] for r in numbers['runs']} - set(ARMS)
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{earlier} can't be read as a study ({error}); name the .json of another") from error
    for key, value in {'corpus': data.corpus, 'iterations': iterations, **SETTING}.items():
        if theirs.get(key) != value:
            raise UserError(f'{earlier} has {key}={theirs.get(key)}, not {value}; leave out --earlier')
    if unknown:
        raise UserError(
            f'{earlier} has arms that are not known here ({"; ".join(sorted(unknown))}); leave out --earlier'
        )
    return found, of_mha


def identity(item):
    """What names a run within a study."""
    return item['arm'], item['kind'], item['rate'], item['seed']


def joined(results, wanted):
    """Results of this study's runs, then the recorded ones that are not among them and for which wanted(run)."""
    known = {identity(r) for r in results}
    return results + [r for name, r in recorded.items() if name not in known and wanted(r)]


def make(item):
    """A run with 'val_loss', 'parameters', ...: as recorded in `earlier`, or trained and measured now."""
    return dict(item, **recorded[identity(item)]) if identity(item) in recorded else train_and_measure(item)


def train_and_measure(item):
    """Train a run, unless that is done, and measure it: the run with 'val_loss', 'parameters', ...; diverged: None."""
    ckpt, result = (os.path.join(item['folder'], name) for name in ('ckpt.pt', 'result.json'))
    if not finished(item, ckpt):
        keys = dict(item['keys'], compile=False, out_dir=item['folder'])  # compiling takes longer than a small run
        if not subprocesses.converges(script_of(item['keys']), [keys], item['folder']):
            return dict(item, val_loss=None)  # this rate is too high for this arm
    if not subprocesses.is_current(result, ckpt):
        files.write_json(result, measured(ckpt))
    with open(result, encoding='utf-8') as file:
        return dict(item, **json.load(file))


def finished(item, ckpt):
    """True if a run is complete. UserError if its folder holds a run with other keys."""
    if not os.path.exists(ckpt):
        return False
    saved = checkpoints.load(ckpt, mapped=True)
    for key, value in item['keys'].items():
        found = saved['config'].get(key, checkpoints.OLDER.get(key, value))
        if key not in ('resume', 'init_from', 'data_dir') and found != value:
            raise UserError(f'{item["folder"]} has {key}={found}, not {value}; choose another --out_dir')
    return saved['iter_num'] >= item['keys']['max_iters']


def measured(ckpt):
    """Sizes of the model in a checkpoint and its loss on the validation windows, in nats per token: a dict."""
    model = models.build_model(checkpoints.load(ckpt)).eval().to(device)
    losses = window_losses(model, data, 'val', WINDOWS, batch_size=64)
    return dict(val_loss=mean_and_stderr(losses)[0], **comparison.sizes(model))


def convert(item):
    """Convert the MHA model that a run starts from, measure the result, then fine-tune it."""
    if identity(item) in recorded:
        return make(item)
    folder = item['folder'] + '_converted'
    if not os.path.exists(os.path.join(folder, 'ckpt.pt')):
        sizes = {key: value for key, value in item['keys'].items() if key in ('n_latent', 'n_kv_head')}
        keys = dict(sizes, source=item['keys']['init_from'], data_dir=data_dir, device=device, threads=1,
                    eval_tokens=4096, out_dir=folder)  # fmt: skip
        subprocesses.run_script('convert_mla.py', [keys], folder)
    item = dict(item, keys=dict(item['keys'], init_from=folder))
    return dict(make(item), before=measured(os.path.join(folder, 'ckpt.pt'))['val_loss'])


def train_sources(starts):
    """Train the MHA models that runs of `starts` begin from, where those are not recorded and the models are gone."""
    seeds = {item['seed'] for item in starts if identity(item) not in recorded}
    in_order(train_and_measure, [r for r in final if r['arm'] == 'MHA' and r['seed'] in seeds])


def in_order(work, items):
    """Results of runs, started seed by seed so that an interrupted study has whole columns."""
    return subprocesses.run_all(work, sorted(items, key=lambda item: (item['seed'], item['rate'])), jobs)


def losses(results, arm, kind='scratch', rate=None):
    """{seed: validation loss} of an arm, at one rate or at that of its runs; those that diverged are left out."""
    return {r['seed']: r['val_loss'] for r in results
            if (r['arm'], r['kind'], r['rate']) == (arm, kind, rate or r['rate']) and r['val_loss']}  # fmt: skip


def mean(values):
    """The mean of the values of a dict."""
    return sum(values.values()) / len(values)


def seeds_of(arm):
    """How many seeds an arm was tuned with."""
    return len({r['seed'] for r in tuning if r['arm'] == arm})


def best_rate(arm):
    """The rate of the lowest mean loss in the tuning, among those at which no seed diverged."""
    found = {rate: losses(tuning, arm, rate=rate) for rate in rates_tried}
    whole = {rate: mean(values) for rate, values in found.items() if len(values) == seeds_of(arm)}
    if not whole:
        raise UserError(f'{arm} diverged at every learning rate; add lower ones to --rates')
    return min(whole, key=whole.get)


# ---- tables ----------------------------------------------------------------------------------------------------------


def interval(values, form='.4f'):
    """Mean ± half width of the 95 % t interval; mean [range] for fewer than four values."""
    values = list(values)
    middle, half = stats.t_interval(values)
    if half is not None:
        return f'{middle:{form}} ± {half:.4f}'
    return f'{middle:{form}}' + (f' [{min(values):{form}}, {max(values):{form}}]' if len(values) > 1 else '')


def minus(mine, theirs):
    """Differences of two {seed: loss}, by seed, as a cell; '' where no seed is in both, or both are the same."""
    shared = sorted(mine.keys() & theirs.keys()) if mine != theirs else []
    return interval([mine[seed] - theirs[seed] for seed in shared], '+.4f') if shared else ''


def reference(arm, name):
    """MHA or MQA (`name`) with the same positions and the same optimizer as an arm."""
    return name + ', RoPE' * (', RoPE' in arm) + ', Muon' * (', Muon' in arm)


def size_of(results, arm):
    """A run of an arm that was measured, for its sizes."""
    return next(r for r in results if r['arm'] == arm and r['val_loss'])


def contest_table():
    """Every arm at its best rate."""
    heading = ('arm', 'parameters', 'cache bytes per token', 'best learning rate', 'seeds', 'validation loss',
               'minus MHA', 'minus MQA')  # fmt: skip
    rows = []
    for arm in chosen:
        one, mine = size_of(final, arm), losses(final, arm)
        edge = ' (end of the grid)' * (best[arm] in (rates_tried[0], rates_tried[-1]))
        gaps = [minus(mine, losses(final, reference(arm, name))) for name in ('MHA', 'MQA')]
        rows.append((arm, f'{one["parameters"]:,}', f'{one["cache_bytes_per_token"]:,}', f'{best[arm]:g}{edge}',
                     len(mine), interval(mine.values()), *gaps))  # fmt: skip
    return report.markdown_table(heading, rows)


def grid_table():
    """The mean loss of every arm at every rate of the grid."""
    rows = []
    for arm in chosen:
        found = [losses(tuning, arm, rate=rate) for rate in rates_tried]
        seeds = seeds_of(arm)
        cells = (f'{mean(values):.4f}' if len(values) == seeds else 'diverged' for values in found)
        rows.append((arm, *cells, seeds))
    return report.markdown_table(('arm', *(f'{rate:g}' for rate in rates_tried), 'seeds'), rows)


def conversion_table():
    """MHA models converted, before and after fine-tuning, against the same fine-tuning of MHA itself."""
    heading = ('MHA converted to', 'cache bytes per token', 'before fine-tuning, minus MHA',
               'fine-tuned, minus MHA fine-tuned', 'fine-tuned, minus the same from scratch')  # fmt: skip
    rows = []
    for arm in (arm for arm in CONVERTED if losses(converted, arm, 'tuned')):
        before = {r['seed']: r['before'] for r in converted if r['arm'] == arm and 'before' in r}
        mine = losses(converted, arm, 'tuned')
        rows.append((arm, f'{size_of(converted, arm)["cache_bytes_per_token"]:,}', minus(before, losses(final, 'MHA')),
                     minus(mine, losses(converted, 'MHA', 'tuned')), minus(mine, losses(final, arm))))  # fmt: skip
    return report.markdown_table(heading, rows)


def control_table():
    """Models that start from MHA of an early iteration, against MHA itself."""
    rows = [(arm, *(minus(losses(controls, arm, f'from{start}'), losses(final, 'MHA')) for start in STARTS))
            for arm in CONTROLS]  # fmt: skip
    return report.markdown_table(('then', *(f'{start} iterations of MHA' for start in STARTS)), rows)


# ---- pictures --------------------------------------------------------------------------------------------------------

# of different brightness, to be distinguishable in grey
MARKERS = 'osD^vP*X<>hp8dH'
DARK, LIGHT, WARM, PALE, GREY = '#1f3b73', '#6d9eeb', '#c4622d', '#eda67c', '#7a7a7a'
GROUPS = {'learned positions, AdamW': '', 'RoPE, AdamW': ', RoPE', 'learned positions, Muon': ', Muon'}


def color_of(arm):
    """The color of an arm's curve."""
    if 'MLA' in arm:
        return LIGHT if 'kv_lr' in arm else DARK
    return PALE if 'kv_lr' in arm else WARM if 'MHA' in arm else GREY


def members(group):
    """The chosen arms of a group of GROUPS."""
    mark = GROUPS[group]
    return [arm for arm in chosen if (mark in arm if mark else ', RoPE' not in arm and ', Muon' not in arm)]


def draw_rates():
    """Loss over learning rate by arm, one panel for each group."""
    groups = [group for group in GROUPS if members(group)]
    picture = Figure(figsize=(5.2 * len(groups), 5), layout='constrained')
    lowest = min(r['val_loss'] for r in tuning if r['val_loss'])
    for axes, group in zip(picture.subplots(1, len(groups), sharey=True, squeeze=False)[0], groups, strict=True):
        for number, arm in enumerate(members(group)):
            found = [(rate, losses(tuning, arm, rate=rate)) for rate in rates_tried]
            points = [(rate, mean(values)) for rate, values in found if len(values) == seeds_of(arm)]
            color = color_of(arm)
            axes.plot(*zip(*points, strict=True), color=color, marker=MARKERS[number % len(MARKERS)],
                      linestyle=('-', '--', ':', '-.')[number % 4], label=arm)  # fmt: skip
        axes.set_xscale('log', base=2)
        axes.set_xticks(rates_tried, [f'{rate:g}' for rate in rates_tried])
        axes.set(xlabel='learning rate', title=group, ylim=(lowest - 0.02, lowest + 0.3))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    picture.axes[0].set_ylabel('validation loss (nats per token)')
    title = f'Every arm on the same grid of learning rates: {setting_line}'
    title = title.replace('C = ', 'C\xa0=\xa0')  # not to be broken there
    picture.suptitle(textwrap.fill(title, 55 * len(groups)), fontsize='medium')
    return picture


def draw_cache():
    """Loss over cache bytes per token: from scratch at the best rate, and converted from MHA."""
    picture = Figure(figsize=(8, 5.5), layout='constrained')
    axes, sizes = picture.subplots(), set()
    plain = members('learned positions, AdamW')
    scratch = [arm for arm in plain if arm.count(',') < 2 and 'kv_lr' not in arm]
    others = {share: [arm for arm in plain if arm.endswith(f', kv_lr={share}')] for share in ('1/8', '1')}
    curves = [
        ('MHA, GQA, MQA from scratch', final, 'scratch', [a for a in scratch if 'MLA' not in a], WARM, 'o', '-'),
        ('MLA from scratch', final, 'scratch', [a for a in scratch if 'MLA' in a], DARK, 's', '-'),
        ('MHA, MQA from scratch, kv_lr=1/8', final, 'scratch', others['1/8'], PALE, 'o', '-'),
        ('MLA from scratch, kv_lr=1', final, 'scratch', others['1'], LIGHT, 's', '-'),
        ('GQA, MQA converted from MHA', converted, 'tuned', ['GQA-2', 'MQA'], WARM, 'o', ':'),
        ('MLA converted from MHA', converted, 'tuned', [a for a in CONVERTED if 'MLA' in a], DARK, 's', ':'),
    ]
    for label, results, kind, names, color, marker, line in curves:
        found = [(size_of(results, arm)['cache_bytes_per_token'], *stats.t_interval(list(values.values())), arm)
                 for arm in names if (values := losses(results, arm, kind))]  # fmt: skip
        if not found:
            continue
        x, y, half, texts = zip(*sorted(found), strict=True)
        sizes.update(x)
        fill = {} if line == '-' else {'markerfacecolor': 'white'}
        axes.errorbar(x, y, [width or 0 for width in half], color=color, marker=marker, linestyle=line, capsize=3,
                      label=label, **fill)  # fmt: skip
        if kind == 'scratch':
            for text, *place in zip(texts, x, y, strict=True):
                if 'kv_lr' not in text:  # those stand at the same caches
                    axes.annotate(text, place, (6, 7), textcoords='offset points', fontsize=8, color=color)
    axes.set_xscale('log', base=2)
    axes.set_xticks(sorted(sizes), [f'{size:,}' for size in sorted(sizes)], rotation=45)
    axes.minorticks_off()
    axes.margins(x=0.1)
    axes.set(xlabel='cache bytes per token (float32)', ylabel='validation loss (nats per token)')
    title = 'Loss against cache, each arm at its best learning rate: mean and 95 % interval\n'
    axes.set_title(title + textwrap.fill(setting_line.replace('C = ', 'C\xa0=\xa0'), 80), fontsize='medium')
    axes.grid(alpha=0.3)
    axes.legend()
    return picture


# ---- train, measure, report ------------------------------------------------------------------------------------------

named = [arm.strip() for arm in arms.split(';')] if arms else list(ARMS)
if unknown := set(named) - set(ARMS):
    raise UserError(f'unknown arms: {"; ".join(sorted(unknown))}; choose from {"; ".join(ARMS)}')
iterations = max_iters or (2000 if full else 50)
tuning_iterations = max(1, iterations // 10)
n_tuning, n_final = tuning_seeds or (3 if full else 1), final_seeds or (5 if full else 2)
rates_tried = tuple(sorted(set(arguments.numbers(rates, 'rates')))) or (RATES if full else RATES[1::2])
data = TokenData(os.path.join(data_dir, dataset), block_size)
runs_dir = os.path.join(out_dir, f'{os.path.basename(dataset)}-{iterations}')
arguments.check_folder(runs_dir)
if figure:
    arguments.check_file(figure, 'figure')
torch.set_num_threads(1)

recorded, recorded_mha = read_earlier()
plans = [trained(arm, rate, TUNING_SEED + n) for arm in named for rate in rates_tried for n in range(n_tuning)]
tuning = joined(in_order(make, plans), lambda r: r['rate'] in rates_tried and r['seed'] < FINAL_SEED)
best = {arm: best_rate(arm) for arm in ARMS if seeds_of(arm)}
final = in_order(make, [trained(arm, best[arm], FINAL_SEED + n) for arm in named for n in range(n_final)])
if lost := [arm for arm in named if len(losses(final, arm)) < n_final]:
    raise UserError(f'{"; ".join(lost)} diverged with a final seed; its best rate is not safe, leave it out of --rates')
sources = {r['seed']: r['folder'] for r in final if r['arm'] == 'MHA'}
final = joined(final, lambda r: (r['kind'], r['rate']) == ('scratch', best.get(r['arm'])) and r['seed'] >= FINAL_SEED)
chosen = [arm for arm in ARMS if losses(final, arm)]
if recorded_mha != best.get('MHA'):  # then its conversions and controls begin from other models
    recorded = {name: r for name, r in recorded.items() if r['kind'] == 'scratch'}
starts, early = [], []
if conversions and {'MHA', 'MLA, r=C/2'} <= set(named):
    targets = {arm: sizes for arm, sizes in CONVERTED.items() if arm in named}
    starts = [run(arm, {**keys, 'warmup_iters': 10}, 1e-3, seed, tuning_iterations, 'tuned', source)
              for seed, source in sources.items() for arm, keys in {'MHA': {}, **targets}.items()]  # fmt: skip
    early = [run(arm, keys, best['MLA, r=C/2' if keys else 'MHA'], seed, iterations - min(start, iterations - 1),
                 f'from{start}', os.path.join(source, f'ckpt_{start:06}.pt'))
             for seed, source in list(sources.items())[: control_seeds or n_final]
             for arm, keys in CONTROLS.items() for start in STARTS
             if start < iterations]  # fmt: skip
    train_sources(starts + early)
converted = in_order(lambda item: make(item) if item['arm'] == 'MHA' else convert(item), starts)
converted = joined(converted, lambda r: r['kind'] == 'tuned')
controls = joined(in_order(make, early), lambda r: r['kind'].startswith('from'))

setting_line = f'{iterations} iterations on {data.corpus}, {n_layer} layers, C = {C}'
intro = (
    f'{setting_line}, {n_head} heads, {batch_size} x {block_size} tokens per iteration. Learning rates: the best of '
    f'{len(rates_tried)} on the seeds that the second table counts. Losses: other seeds at that rate, mean ± half '
    'width of the 95 % t interval, with fewer than four seeds mean [range]; differences are by seed.'
    + ('' if full else ' A short form, whose losses say nothing about which arm is better.')
)  # fmt: skip
text = f'{intro}\n\n{contest_table()}\nMean loss of the tuning by learning rate:\n\n{grid_table()}'
if converted:
    text += (f'\nMHA converted and fine-tuned for {tuning_iterations} iterations at 1e-3:\n\n{conversion_table()}'
             f'\nControls: loss minus MHA, after as many iterations in all:\n\n{control_table()}')  # fmt: skip
print(text, end='')
os.makedirs(out_dir, exist_ok=True)  # where every run is an earlier one, nothing has made it
report.save_text(os.path.join(out_dir, f'{os.path.basename(dataset)}.md'), text)
path = figure or os.path.join(out_dir, f'{os.path.basename(dataset)}.png')
keep = ('arm', 'kind', 'rate', 'seed', 'val_loss', 'before', 'parameters', 'flops_per_token', 'cache_bytes_per_token')
every = [{key: item[key] for key in keep if key in item} for item in (*tuning, *final, *converted, *controls)]
numbers = dict(corpus=data.corpus, iterations=iterations, setting=SETTING, best_rates=best, runs=every)
report.save_json(os.path.splitext(path)[0] + '.json', numbers)
report.save_figure(path, draw_cache())
report.save_figure(os.path.splitext(path)[0] + '-rates.png', draw_rates())
