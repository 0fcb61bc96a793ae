"""
MHA, partial RoPE, GQA, MQA and MLA as published, each at its own best setting, on the same batches.

$ python data/code/prepare.py
$ python studies/contest.py                # a short form: every model, few iterations; minutes
$ python studies/contest.py --full=True    # all runs: many hours on two cores
$ python studies/contest.py --full=True --arms="MHA;MQA;MLA, cache of MQA"     # some of the models
$ python studies/contest.py --full=True --tuned=assets/contest.json --dataset=shakespeare_char --figure=assets/play.png
$ python studies/contest.py --reuse=assets/contest.json --figure=contest.png    # tables and pictures again, in seconds

On a GPU, at a larger size:
$ python studies/contest.py --full=True --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --device=cuda \
    --dtype=bfloat16 --jobs=8 --rate=1.4e-3

1. Tuning, in the same order for every model, each step at what the steps before it chose, over `tuning_seeds` seeds:
   the learning rate, in steps of the square root of 2, until the best one has a worse one on either side; the factor on
   the learning rate of keys and values (1, 1/4, 1/8); their root mean square at the start (each attention's own, or
   KV_RMS for all); the learning rate again.
2. Contest: every model is trained at that setting with other seeds.
3. Comparison: every PAIR by Welch's t test, with Holm's correction over the table. Two models are called equal only
   where two one-sided tests reject a difference of MARGIN.

Every run is one of train.py, in blocks with RMSNorm and SwiGLU, or in GPT-2's. Finished runs are kept: repeat the
command to continue. Writes tables, `figure` (loss over cached numbers) and, beside it, a -tuning.png and a .json with
every run. Run it from the repository root.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from core.cli.keys import begin

begin(__file__)  # before the slow imports

import math
import os
from dataclasses import asdict, dataclass
from statistics import mean

import numpy as np
import torch
from matplotlib.figure import Figure

from analysis import comparison, report, stats, style
from core.cli import arguments, files, machine, subprocesses
from core.cli.errors import UserError
from core.runs import checkpoint as checkpoints
from core.runs import models
from core.runs.evaluation import window_losses
from core.runs.resume import OLDER
from core.speed import timing
from core.text.dataset import TokenData
from studies.measure import commit, outputs, read_json, reading, save

# ----------------------------------------------------------------------------------------------------------------------
out_dir = 'out-contest'  # the runs
figure = ''  # the picture, with the numbers in a .json beside it; '': contest.png in out_dir
table = ''  # a file for the tables; '': contest.md in out_dir
full = False  # all iterations and seeds
dataset = 'code'
data_dir = 'data'
arms = ''  # labels of models separated by semicolons; '': all
max_iters = 0  # iterations of each training; 0: 2000, in the short form 20
rate = 4e-3  # the learning rate at which the tuning begins
tuning_seeds = 0  # seeds of each setting; 0: 2, in the short form 1
final_seeds = 0  # seeds at the best setting; 0: 5, in the short form 2
most_seeds = 0  # of the three models of the headline; 0: 20, in the short form 2
tuned = ''  # the .json of an earlier contest: its settings are used, and nothing is tuned
reuse = ''  # the .json of an earlier contest: nothing is trained, its tables and pictures are made again
blocks = 'modern'  # RMSNorm and SwiGLU; gpt2: LayerNorm and GELU
optimizer = 'adamw'
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
compile = False
exec(open(Path(__file__).resolve().parents[1] / 'configurator.py', encoding='utf-8').read())
# ----------------------------------------------------------------------------------------------------------------------

KV_RMS = 0.5  # what content keys and values of MLA start with anyway
FACTORS, SCALES = (1.0, 1 / 4, 1 / 8), (0.0, KV_RMS)  # values of kv_lr and of kv_rms
MARGIN = 0.0075  # nats per token: models that differ by less are called equal
WINDOWS = 4000 if full else 400  # of the validation split, evenly spaced
TUNING_SEED, FINAL_SEED = 1000, 3000  # where the seeds begin; 2000 to 2009 were looked at in an earlier contest


@dataclass(frozen=True)
class Arm:
    """One model of the contest; latent: MLA's n_latent."""

    label: str
    n_kv_head: int = 0
    n_rope: int = 0
    latent: int = 0

    def keys(self):
        """Its keys of train.py."""
        if self.latent:
            return dict(attention='mla', n_latent=self.latent, latent_norm=True)
        return dict(n_kv_head=self.n_kv_head, n_rope=self.n_rope)


@dataclass(frozen=True)
class Setting:
    """What is tuned."""

    rate: float
    kv_lr: float = 1.0
    kv_rms: float = 0.0


def all_arms():
    """Every model. MLA rotates half a head's dimensions beside the content; one of them has as many weights as MHA."""
    size = n_embd // n_head
    rotated = size // 2
    # 2 C^2 + C R (H + 1) + 3 C r + r = 4 C^2
    same = round((2 * n_embd**2 - n_embd * rotated * (n_head + 1)) / (3 * n_embd + 1))
    return [
        Arm('MHA'),
        Arm('MQA', n_kv_head=1),
        Arm('MLA, cache of MQA', latent=2 * size - rotated),
        Arm('MHA, half rotated', n_rope=rotated),
        Arm('GQA-2', n_kv_head=2),
        Arm('MLA, cache of GQA-2', latent=4 * size - rotated),
        Arm('MLA, weights of MHA', latent=same),
    ]


HEADLINE = ('MHA', 'MQA', 'MLA, cache of MQA')
PAIRS = [
    ('MLA, cache of MQA', 'MHA'), ('MLA, cache of MQA', 'MQA'), ('MQA', 'MHA'),
    ('MLA, cache of GQA-2', 'MHA'), ('MLA, cache of GQA-2', 'GQA-2'), ('GQA-2', 'MHA'),
    ('MLA, weights of MHA', 'MHA'), ('MLA, weights of MHA', 'MHA, half rotated'), ('MHA, half rotated', 'MHA'),
]  # fmt: skip
BLOCKS = dict(modern=dict(norm='rms', mlp='swiglu'), gpt2=dict(norm='layer', mlp='gelu'))
SIZE = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, batch_size=batch_size)


# ---- runs ------------------------------------------------------------------------------------------------------------


def run(arm, setting, seed):
    """A training as subprocesses.run_all takes it."""
    name = f'{arm.label}_lr{setting.rate:g}_x{setting.kv_lr:g}_rms{setting.kv_rms:g}_s{seed}'.replace(', ', '-')
    folder = os.path.join(runs_dir, name.replace(' ', '-'))
    varied = dict(learning_rate=setting.rate, kv_lr=setting.kv_lr, kv_rms=setting.kv_rms, seed=seed)
    return dict(name=name, folder=folder, arm=arm, setting=setting, seed=seed, keys=common | arm.keys() | varied)


def train_and_measure(item):
    """The loss and sizes of a run; it is trained unless that is done. val_loss is inf where training diverged."""
    result = os.path.join(item['folder'], 'result.json')
    if not os.path.exists(result):
        files.write_json(result, trained(item))
    found = read_json(result)
    check(item, found['keys'])
    if found.get('windows', WINDOWS) != WINDOWS:
        raise UserError(f'{item["folder"]} has the losses of {found["windows"]} windows; choose another --out_dir')
    return item | found | dict(val_loss=math.inf if found['val_loss'] is None else found['val_loss'])


def trained(item):
    """Train a run, or what is left of it, and measure it: what its result.json keeps, and the losses of its windows."""
    folder, ckpt = item['folder'], os.path.join(item['folder'], 'ckpt.pt')
    if os.path.exists(ckpt):
        check(item, checkpoints.load(ckpt, mapped=True)['config'])
    if not subprocesses.converges('train.py', [dict(item['keys'], resume='auto', out_dir=folder)], folder):
        return dict(val_loss=None, keys=item['keys'])
    model = models.build_model(checkpoints.load(ckpt)).to(device)
    losses = window_losses(model, data, 'val', WINDOWS, batch_size=64).numpy()
    np.save(os.path.join(folder, 'losses.npy'), losses.astype(np.float32))
    return dict(val_loss=losses.mean(), keys=item['keys'], commit=commit(), windows=WINDOWS, **comparison.sizes(model))


def check(item, config):
    """UserError if a run's folder holds one with other keys."""
    for key, value in item['keys'].items():
        if key != 'data_dir' and config.get(key, OLDER.get(key, value)) != value:
            raise UserError(f'{item["folder"]} has {key}={config.get(key)}, not {value}; choose another --out_dir')


# ---- tuning: generators that yield settings, are sent the best of these, and return the one that they settle on ------


def settle(arm):
    """The four steps of a model's search."""
    setting = yield from climb(arm, Setting(rounded(rate)))
    setting = yield [Setting(setting.rate, factor) for factor in FACTORS]
    setting = yield [Setting(setting.rate, setting.kv_lr, scale) for scale in SCALES]
    return (yield from climb(arm, setting))


def climb(arm, center):
    """The search for the best learning rate, with worse ones on either side."""
    middle = round(2 * math.log2(center.rate / rate))  # steps from the first rate: all climbs share one grid
    low, high = middle - 1, middle + 1
    while True:
        rates = [rounded(rate * 2 ** (n / 2)) for n in range(low, high + 1)]
        steps = [Setting(r, center.kv_lr, center.kv_rms) for r in rates]
        best = yield steps
        if best not in (steps[0], steps[-1]):
            return best
        if high - low > 16:
            raise UserError(f'{arm.label} learns at no rate from {rates[0]:g} to {rates[-1]:g}')
        low, high = low - (best == steps[0]), high + (best == steps[-1])


def rounded(value):
    """To three digits, which name the run's folder."""
    return float(f'{value:.3g}')


def tune(arms):
    """({arm: its setting}, {(arm, setting, seed): loss}) of searches that advance together: all are reached alike."""
    settings, known, searches = {}, {}, {arm: settle(arm) for arm in arms}
    wanted = {arm: next(search) for arm, search in searches.items()}
    seeds = range(TUNING_SEED, TUNING_SEED + n_tuning)
    while wanted:
        runs = [(arm, setting, seed) for seed in seeds for arm, choices in wanted.items() for setting in choices]
        missing = [run(*r) for r in runs if r not in known]
        for done in subprocesses.run_all(train_and_measure, missing, jobs):
            known[done['arm'], done['setting'], done['seed']] = done['val_loss']
        for arm, choices in list(wanted.items()):
            losses = [mean(known[arm, setting, seed] for seed in seeds) for setting in choices]
            try:
                wanted[arm] = searches[arm].send(choices[losses.index(min(losses))])
            except StopIteration as end:
                settings[arm] = end.value
                del wanted[arm]
    return settings, known


# ---- results ---------------------------------------------------------------------------------------------------------


def as_numbers(settings, known, finals):
    """Everything that is reported, as JSON keeps it."""
    models, by_window = {}, {}  # by_window: the loss of every validation window, averaged over final seeds
    for arm, setting in settings.items():
        done = [r for r in finals if r['arm'] == arm]
        tuning = [dict(asdict(s), seed=seed, loss=loss) for (a, s, seed), loss in known.items() if a == arm]
        facts = ('parameters', 'attention_parameters', 'flops_per_token', 'cache_bytes_per_token')
        models[arm.label] = dict(
            asdict(arm),
            setting=asdict(setting),
            **{key: done[0][key] for key in facts},
            cached_numbers=done[0]['cache_bytes_per_token'] // (4 * n_layer),
            tuning=sorted(tuning, key=lambda r: tuple(r.values())),
            finals=[dict(seed=r['seed'], loss=r['val_loss'], commit=r['commit']) for r in done],
        )
        windows = [np.load(os.path.join(r['folder'], 'losses.npy')) for r in done]
        by_window[arm.label] = np.mean(windows, axis=0, dtype=np.float64)
    pairs = []
    for one, other in PAIRS:
        if {one, other} <= set(models):
            losses = [[r['loss'] for r in models[label]['finals']] for label in (one, other)]
            text = float(stats.standard_error(by_window[one] - by_window[other]))
            pairs.append(dict(one=one, other=other, **stats.welch(*losses, MARGIN), text_error=text))
    for pair, p in zip(pairs, stats.holm([pair['p'] for pair in pairs]), strict=True):
        pair['p_holm'] = p
    kept = dict(common, corpus=data.corpus, windows=WINDOWS, blocks=blocks, jobs=jobs, cpu=timing.cpu_name())
    return dict(setting=kept, margin=MARGIN, tuned=tuned, models=models, pairs=pairs)


def model_table(numbers):
    """Every model at its best setting."""
    heading = ['model', 'weights', 'cached numbers per token and layer', 'learning rate', 'of keys and values']
    heading += ['their rms at the start', 'seeds', 'validation loss']
    rows = []
    for label, found in numbers['models'].items():
        tuned, losses = found['setting'], [r['loss'] for r in found['finals']]
        rms = f'{tuned["kv_rms"]:g}' if tuned['kv_rms'] else 'its own'
        sizes = (f'{found["parameters"]:,}', found['cached_numbers'])
        chosen = (f'{tuned["rate"]:g}', f'x {tuned["kv_lr"]:g}', rms)
        rows.append((label, *sizes, *chosen, len(losses), report.spread(losses, '.4f')))
    return report.markdown_table(heading, rows)


def pair_table(numbers):
    """Differences, their intervals, and what the two tests say."""
    heading = ['model', 'minus', 'difference', '95 % interval', 'p (Holm)', 'standard error by text', '90 % interval']
    rows = []
    for pair in numbers['pairs']:
        wide, narrow = (f'{pair[key][0]:+.4f} to {pair[key][1]:+.4f}' for key in ('interval_95', 'interval_90'))
        p = '< .0001' if pair['p_holm'] < 1e-4 else f'{pair["p_holm"]:.4f}'
        # at 5 %; both are possible, too
        said = ['different'] * (pair['p_holm'] < 0.05) + [f'equal within {MARGIN:g}'] * (pair['p_equal'] < 0.05)
        cells = (f'{pair["difference"]:+.4f}', wide, p, f'{pair["text_error"]:.4f}', narrow)
        rows.append((pair['one'], pair['other'], *cells, ', yet '.join(said) or 'neither'))
    return report.markdown_table((*heading, 'so they are'), rows)


def draw_cache(numbers, title):
    """Loss over cached numbers, with a name at every point."""
    figure = Figure(figsize=(style.WIDTH, 4.6))
    axes = figure.subplots()
    sizes = [found['cached_numbers'] for found in numbers['models'].values()]
    for (label, found), (x, left) in zip(numbers['models'].items(), style.side_by_side(sizes, 1.04), strict=True):
        middle, half = stats.t_interval([r['loss'] for r in found['finals']])
        variant = int(label in ('MHA, half rotated', 'MLA, weights of MHA'))
        drawn = style.look(label, found['latent'] / n_embd, variant) | dict(linestyle='none', capsize=4, markersize=7)
        axes.errorbar(x, middle, half or 0, **drawn)
        place = dict(xytext=(-9, 4), ha='right') if left else dict(xytext=(9, 4))
        axes.annotate(label, (x, middle), textcoords='offset points', color=drawn['color'], **place)
    axes.set_xscale('log', base=2)
    ticks = sorted(set(sizes))
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.margins(x=0.2)
    axes.set(xlabel='cached numbers per token and layer', ylabel='validation loss (nats per token)')
    axes.set_title(f'{title}\nmean of the seeds and its 95 % interval')
    return figure


def draw_tuning(numbers):
    """Loss over learning rate, a panel per model; points of their own are the other settings that were tried."""
    found = numbers['models']
    rows = math.ceil(len(found) / 3)
    figure = Figure(figsize=(style.WIDTH, 0.8 + 2.4 * rows))
    panels = figure.subplots(rows, 3, sharex=True, sharey=True, squeeze=False).flat
    lowest = min(r['loss'] for model in found.values() for r in model['tuning'])
    for (label, model), axes in zip(found.items(), panels, strict=False):  # panels last: none is lost
        by_setting = report.grouped(model['tuning'], lambda r: (r['kv_lr'], r['kv_rms'], r['rate']))
        means = {key: mean(r['loss'] for r in group) for key, group in by_setting.items()}
        for n, (kv_lr, kv_rms) in enumerate(dict.fromkeys(key[:2] for key in sorted(means, reverse=True))):
            curve = sorted((key[2], loss) for key, loss in means.items() if key[:2] == (kv_lr, kv_rms))
            drawn = style.look(label, model['latent'] / n_embd) | style.VARIANTS[n % 4]
            axes.plot(*zip(*curve, strict=True), **drawn, label=f'x {kv_lr:g}' + f', rms {kv_rms:g}' * bool(kv_rms))
        chosen = model['setting']
        best = means[chosen['kv_lr'], chosen['kv_rms'], chosen['rate']]
        axes.plot(chosen['rate'], best, 'o', markersize=13, color=style.GREY, fillstyle='none')
        axes.set(title=label, xscale='log', ylim=(lowest - 0.004, lowest + 0.065))
        axes.legend(loc='upper center', ncols=2, fontsize=7)
        rates = sorted({r['rate'] for r in model['tuning']})
        axes.set_xticks(rates[::2], [f'{r:g}' for r in rates[::2]], minor=False)
        axes.minorticks_off()
    for axes in list(panels):
        axes.set_visible(False)
    figure.supxlabel('learning rate')
    figure.supylabel('validation loss (nats per token)')
    figure.suptitle('The tuning: multiplier for keys and values, and their rms at the start (ring: what was chosen)')
    return figure


def read_contest(path):
    """The numbers of an earlier contest. UserError if it isn't one."""
    with reading(path):
        numbers = read_json(path)
        for model in numbers['models'].values():
            Setting(**model['setting'])
        model_table(numbers), pair_table(numbers)  # it has all that these show
        return numbers


# ---- train, measure, report ------------------------------------------------------------------------------------------

iterations = max_iters or (2000 if full else 20)
n_tuning, n_final = tuning_seeds or (2 if full else 1), final_seeds or (5 if full else 2)
n_most = most_seeds or (20 if full else 2)
runs_dir = os.path.join(out_dir, f'{os.path.basename(dataset)}-{blocks}-{optimizer}-{iterations}')
paths = outputs(config, 'contest')
arguments.check_folder(runs_dir)
if reuse:
    numbers = read_contest(reuse)
else:
    device = machine.pick_device(device)
    dtype = machine.pick_dtype(dtype, device, n_embd)
    known_arms = {arm.label: arm for arm in all_arms()}
    named = [name.strip() for name in arms.split(';')] if arms else list(known_arms)
    if unknown := [name for name in named if name not in known_arms]:
        raise UserError(f'unknown arms: {"; ".join(unknown)}; choose from {"; ".join(known_arms)}')
    named = [known_arms[name] for name in named]
    common = SIZE | BLOCKS[blocks] | dict(dataset=dataset, data_dir=data_dir, pos='rope', bias=False, dropout=0.0)
    common |= dict(gradient_accumulation_steps=1, optimizer=optimizer, beta2=0.99, min_lr=1e-4)
    common |= dict(warmup_iters=min(100, iterations // 2), max_iters=iterations, lr_decay_iters=iterations)
    common |= dict(eval_interval=iterations, eval_iters=1, checkpoint_interval=500, always_save_checkpoint=True)
    common |= dict(log_interval=100, device=device, dtype=dtype, compile=compile, threads=1)
    if tuned:
        found = read_contest(tuned)['models']
        if lacking := [arm.label for arm in named if arm.label not in found]:
            raise UserError(f'{tuned} has no setting of {"; ".join(lacking)}; name others with --arms')
        settings, known = {arm: Setting(**found[arm.label]['setting']) for arm in named}, {}
    data = TokenData(os.path.join(data_dir, dataset), block_size)
    torch.set_num_threads(1)
    if not tuned:
        settings, known = tune(named)
    seeds = {arm: n_most if arm.label in HEADLINE else n_final for arm in named}
    turns = [(arm, FINAL_SEED + n) for n in range(max(n_most, n_final)) for arm in seeds if n < seeds[arm]]
    plans = [run(arm, settings[arm], seed) for arm, seed in turns]
    finals = subprocesses.run_all(train_and_measure, plans, jobs)
    if diverged := [done['name'] for done in finals if math.isinf(done['val_loss'])]:
        raise UserError(f'{diverged[0]} diverged; its setting is too near the edge, start from a lower --rate')
    numbers = as_numbers(settings, known, finals)

setting = numbers['setting']
where = (', compiled' * setting['compile'] + f', on {setting["cpu"]}') if setting['device'] == 'cpu' else ', on a GPU'
title = f'{setting["max_iters"]:,} iterations on {setting["corpus"]}'
text = (
    f'{title}: {setting["n_layer"]} layers, C\xa0=\xa0{setting["n_embd"]}, {setting["n_head"]} heads, '
    f'{setting["batch_size"]} x {setting["block_size"]} tokens per iteration, {setting["blocks"]} blocks, '
    f'{setting["optimizer"]}, {setting["dtype"]}{where}. '
    'Every model was tuned by the same steps on seeds that are not reported, unless the settings of an earlier contest '
    'were taken. Losses: mean ± half width of the 95 % t interval over seeds, with fewer than four seeds mean [range].'
    '\n\n'
    f'{model_table(numbers)}\n{pair_table(numbers)}'
)
if setting['max_iters'] < 1000:
    text += '\nA short form, whose losses say nothing about which model is better.\n'
save(paths, text, draw_cache(numbers, title), None if reuse else numbers)
if any(model['tuning'] for model in numbers['models'].values()):
    report.save_figure(os.path.splitext(paths[1])[0] + '-tuning.png', draw_tuning(numbers))
