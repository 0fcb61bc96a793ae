"""
MHA, GQA, MQA and MLA, each at its own best learning rate, on the same batches.

$ python data/shakespeare_char/prepare.py
$ python studies/contest.py                        # a short form: every arm, two rates, few iterations; minutes
$ python studies/contest.py --full=True            # every arm on the whole grid, then its best rate with more seeds

Each arm is tuned on the same grid of learning rates over `tuning_seeds` seeds. At its best rate it is trained with
`final_seeds` others, and compared with MHA, and with MQA, by seed. Every run is one of train.py and train_mla.py.
Finished runs are kept: repeat the command to continue. Writes contest.md into out_dir, and beside `figure` (losses over
learning rates, and over cache bytes per token) a .json with every run. Run it from the repository root.
"""

import json
import os
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from analysis import report, stats
from core import checkpoint as checkpoints
from core import files, scripts
from core.dataset import TokenData
from core.evaluation import mean_and_stderr, window_losses
from core.messages import UserError

# ----------------------------------------------------------------------------------------------------------------------
out_dir = 'out-contest'  # the runs
figure = ''  # the picture, and the numbers in a .json beside it; '': contest.png in out_dir
full = False  # the whole grid and all seeds
dataset = 'shakespeare_char'
data_dir = 'data'
max_iters = 0  # iterations of each training; 0: 2000, in the short form 200
tuning_seeds = 0  # seeds per learning rate; 0: 3, in the short form 1
final_seeds = 0  # seeds at the best rate; 0: 5, in the short form none beyond the tuning
arms = ''  # names of ARMS separated by semicolons; '': all
jobs = 0  # concurrent trainings with one thread each; 0: the cores that this process may use
exec(open(Path(__file__).resolve().parents[1] / 'configurator.py', encoding='utf-8').read())
# ----------------------------------------------------------------------------------------------------------------------

C, H, T = 128, 4, 64
# with learned positions MLA at r = C/2 caches what MQA caches: 64 numbers per token and layer
SETTING = dict(dataset=dataset, data_dir=data_dir, n_layer=4, n_head=H, n_embd=C, block_size=T, batch_size=16,
               gradient_accumulation_steps=1, bias=False, beta2=0.99, warmup_iters=100, min_lr=1e-4, eval_iters=1,
               always_save_checkpoint=True, checkpoint_interval=500, log_interval=50, device='cpu', dtype='float32',
               threads=1)  # fmt: skip
ARMS = {
    'MHA': ('train.py', {}),
    'GQA-2': ('train.py', dict(n_kv_head=2)),
    'MQA': ('train.py', dict(n_kv_head=1)),
    'MLA, r=C': ('train_mla.py', dict(n_latent=C)),
    'MLA, r=C/2': ('train_mla.py', dict(n_latent=C // 2)),
    'MLA, r=C/4': ('train_mla.py', dict(n_latent=C // 4)),
    'MLA, r=C/8': ('train_mla.py', dict(n_latent=C // 8)),
    'MLA, r=C/2, latent norm': ('train_mla.py', dict(n_latent=C // 2, latent_norm=True)),
    'MHA, RoPE': ('train.py', dict(pos='rope')),
    'MQA, RoPE': ('train.py', dict(n_kv_head=1, pos='rope')),
    'MLA, r=C/2, RoPE': ('train_mla.py', dict(n_latent=C // 2, pos='rope')),
    'MLA, r=C/2, RoPE, latent norm': ('train_mla.py', dict(n_latent=C // 2, pos='rope', latent_norm=True)),
}
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2) if full else (2e-3, 8e-3)
TUNING_SEED, FINAL_SEED = 1000, 2000  # where the seeds begin; the rate is chosen on others than those that are reported


# ---- runs ------------------------------------------------------------------------------------------------------------


def planned(arm, rate, seed):
    """A run as scripts.run_all takes it."""
    slug = ''.join(letter if letter.isalnum() else '-' for letter in arm.lower().replace(', ', '_'))
    name = f'{slug}-lr{rate:g}-s{seed}'
    return dict(name=name, arm=arm, rate=rate, seed=seed, folder=os.path.join(out_dir, name))


def make(run):
    """Train a run, unless that is done, and measure it: {'val_loss', 'parameters', 'cache_bytes_per_token', ...}."""
    script, keys = ARMS[run['arm']]
    keys = {**SETTING, **keys, 'max_iters': iterations, 'lr_decay_iters': iterations, 'eval_interval': iterations,
            'learning_rate': run['rate'], 'seed': run['seed'], 'out_dir': run['folder'], 'resume': 'auto'}  # fmt: skip
    ckpt, result = (os.path.join(run['folder'], name) for name in ('ckpt.pt', 'result.json'))
    if not os.path.exists(ckpt) or checkpoints.load(ckpt, mapped=True)['iter_num'] < iterations:
        try:
            scripts.run_script(script, [keys], run['folder'])
        except UserError as error:
            with open(os.path.join(run['folder'], 'log.txt'), encoding='utf-8') as log:
                if 'not finite in iteration' not in log.read():
                    raise error
            return dict(run, val_loss=None)  # this rate is too high for this arm
    if not scripts.is_current(result, ckpt):
        model = checkpoints.build_model(checkpoints.load(ckpt)).eval()
        losses = window_losses(model, data, 'val', 10**9, batch_size=64)
        files.write_json(result, dict(
            val_loss=mean_and_stderr(losses)[0],
            parameters=model.get_num_params(),
            flops_per_token=model.flops_per_token(),
            cache_bytes_per_token=model.init_cache(1).bytes_per_token,
        ))  # fmt: skip
    with open(result, encoding='utf-8') as file:
        return dict(run, **json.load(file))


def run_all(plans):
    """Results of planned runs, started seed by seed so that an interrupted study has whole columns."""
    ordered = sorted(plans, key=lambda run: (run['seed'], run['rate']))
    return scripts.run_all(make, ordered, jobs)


def losses_at(results, arm, rate):
    """{seed: validation loss} of an arm at a rate; those that diverged are left out."""
    return {r['seed']: r['val_loss'] for r in results if (r['arm'], r['rate']) == (arm, rate) and r['val_loss']}


def best_rate(results, arm):
    """The rate of the lowest mean loss, among those at which no seed diverged."""
    means = {}
    for rate in RATES:
        found = losses_at(results, arm, rate)
        if len(found) == n_tuning:
            means[rate] = sum(found.values()) / n_tuning
    if not means:
        raise UserError(f'{arm} diverged at every learning rate; add lower ones to RATES')
    return min(means, key=means.get)


# ---- tables and pictures ---------------------------------------------------------------------------------------------


def interval(values, form='.4f'):
    """Mean ± half width of the 95 % t interval; mean [range] for fewer than four values."""
    mean, half = stats.t_interval(values)
    if half is not None:
        return f'{mean:{form}} ± {half:.4f}'
    return f'{mean:{form}}' + (f' [{min(values):{form}}, {max(values):{form}}]' if len(values) > 1 else '')


def against(arm, reference):
    """Differences of the final losses of two arms, by seed."""
    mine, theirs = finals[arm], finals[reference]
    return interval([mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())], '+.4f')


def table():
    """Every arm at its best rate."""
    heading = ('arm', 'parameters', 'cache bytes per token', 'best learning rate', 'validation loss', 'minus MHA',
               'minus MQA')  # fmt: skip
    rows = []
    for arm in chosen:
        one = next(r for r in results if r['arm'] == arm and r['val_loss'])
        edge = ' (end of the grid)' if rates[arm] in (RATES[0], RATES[-1]) else ''
        gaps = [against(arm, other) if other in chosen and other != arm else '' for other in ('MHA', 'MQA')]
        rows.append((arm, f'{one["parameters"]:,}', f'{one["cache_bytes_per_token"]:,}', f'{rates[arm]:g}{edge}',
                     interval(list(finals[arm].values())), *gaps))  # fmt: skip
    return report.markdown_table(heading, rows)


def grid_table():
    """The mean loss of every arm at every rate of the grid."""
    rows = []
    for arm in chosen:
        cells = []
        for rate in RATES:
            found = list(losses_at(tuning, arm, rate).values())
            cells.append(f'{sum(found) / len(found):.4f}' if len(found) == n_tuning else 'diverged')
        rows.append((arm, *cells))
    return report.markdown_table(('arm', *(f'{rate:g}' for rate in RATES)), rows)


def draw():
    """Loss over learning rate by arm, and loss over cache bytes at the best rate."""
    picture = Figure(figsize=(13, 5), layout='constrained')
    left, right = picture.subplots(1, 2)
    for number, arm in enumerate(chosen):
        color = str(0.7 * number / len(chosen)) if 'MLA' not in arm else ('#c4622d', '#1f3b73')['RoPE' in arm]
        look = dict(color=color, marker='osD^vP*X<>hp'[number % 12], linestyle=('-', '--', ':', '-.')[number % 4])
        points = [(rate, losses_at(tuning, arm, rate).values()) for rate in RATES]
        points = [(rate, sum(found) / n_tuning) for rate, found in points if len(found) == n_tuning]
        left.plot(*zip(*points, strict=True), label=arm, **look)
        one = next(r for r in results if r['arm'] == arm and r['val_loss'])
        mean, half = (
            stats.t_interval(list(finals[arm].values())) if len(finals[arm]) > 1 else (*finals[arm].values(), None)
        )
        right.errorbar(one['cache_bytes_per_token'], mean, half, capsize=3, label=arm, **dict(look, linestyle=''))
    left.set_xscale('log', base=2)
    left.set_xticks(RATES, [f'{rate:g}' for rate in RATES])
    lowest = min(min(found.values()) for found in finals.values())
    left.set_ylim(lowest - 0.02, lowest + 0.35)
    left.set(xlabel='learning rate', ylabel='validation loss (nats per token)', title='each arm on the same grid')
    right.set_xscale('log', base=2)
    sizes = sorted({r['cache_bytes_per_token'] for r in results if r['val_loss']})
    right.set_xticks(sizes, [f'{size:,}' for size in sizes])
    right.minorticks_off()
    right.set(xlabel='cache bytes per token (float32)', title='each at its best learning rate: mean, 95 % interval')
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)
    picture.suptitle(f'{iterations} iterations on {data.corpus}, 4 layers, C = {C}', fontsize='medium')
    return picture


# ---- train, measure, report ------------------------------------------------------------------------------------------

chosen = [arm.strip() for arm in arms.split(';') if arm.strip()] or list(ARMS)
if unknown := set(chosen) - set(ARMS):
    raise UserError(f'unknown arms: {"; ".join(sorted(unknown))}; choose from {"; ".join(ARMS)}')
iterations = max_iters or (2000 if full else 200)
n_tuning, n_final = tuning_seeds or (3 if full else 1), final_seeds or (5 if full else 0)
data = TokenData(os.path.join(data_dir, dataset), T)
torch.set_num_threads(1)
tuning = run_all([planned(arm, rate, TUNING_SEED + n) for arm in chosen for rate in RATES for n in range(n_tuning)])
rates = {arm: best_rate(tuning, arm) for arm in chosen}
final = run_all([planned(arm, rates[arm], FINAL_SEED + n) for arm in chosen for n in range(n_final)])
results = tuning + final
finals = {arm: losses_at(final or tuning, arm, rates[arm]) for arm in chosen}
if lost := [arm for arm in chosen if len(finals[arm]) < (n_final or n_tuning)]:
    raise UserError(f'{"; ".join(lost)} diverged with a final seed; its best rate is not safe, leave it out of RATES')

intro = (
    f'{iterations} iterations on {data.corpus} (4 layers, {H} heads, C = {C}, {SETTING["batch_size"]} x {T} tokens per '
    f'iteration, AdamW). Learning rates: {n_tuning} seed{"s" * (n_tuning > 1)} each on {len(RATES)} rates. '
    + (f'Losses: {n_final} other seeds at the best rate, mean ± half width of the 95 % t interval, differences by seed.'
       if n_final else 'Short form: losses of the tuning itself, so they say nothing about which arm is better.')
)  # fmt: skip
text = f'{intro}\n\n{table()}\nMean loss of the tuning by learning rate:\n\n{grid_table()}'
print(text, end='')
report.save_text(os.path.join(out_dir, 'contest.md'), text)
path = figure or os.path.join(out_dir, 'contest.png')
report.save_figure(path, draw())
keep = ('arm', 'rate', 'seed', 'val_loss', 'parameters', 'flops_per_token', 'cache_bytes_per_token')
runs = [{key: run[key] for key in keep if key in run} for run in results]
setting = {key: value for key, value in SETTING.items() if key != 'data_dir'}
numbers = dict(corpus=data.corpus, iterations=iterations, setting=setting, best_rates=rates, runs=runs)
report.save_json(os.path.splitext(path)[0] + '.json', numbers)
