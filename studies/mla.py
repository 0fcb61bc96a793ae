"""
The study of version 0.1.0, at one learning rate for all: MHA against MLA, with learned positions and with RoPE, and MHA
converted to MLA. studies/contest.py tunes each.

$ python data/shakespeare_char/prepare.py
$ python studies/mla.py

Trains, for each of three seeds, on the same batches:
- MHA and MLA, each with learned positions and with RoPE; MLA with a latent of half of n_embd, and with the latent that
  gives it as many parameters as MHA;
- MLA with several latent sizes from scratch.
It also converts the MHA model to the same sizes and fine-tunes the results briefly; MHA gets the same fine-tuning.

Every run is one of train.py, train_mla.py or convert_mla.py. Finished runs are kept: repeat the command to continue
after an interruption. Writes tables.md into out_dir, the picture to `figure` and its numbers into a .json beside it.
Run it from the repository root.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from core import signals

signals.exit_at_once()  # for the time of the slow imports

import json
import os

import torch
from matplotlib.figure import Figure

from analysis import comparison, report
from core import checkpoint as checkpoints
from core import files, messages, scripts
from core.dataset import TokenData
from core.evaluation import mean_and_stderr, window_losses
from core.messages import UserError

# ----------------------------------------------------------------------------------------------------------------------
out_dir = 'out-study-mla'  # the runs
figure = 'assets/study_mla.png'  # the picture; the numbers go beside it, into a .json
seeds = 3  # trainings of each kind
max_iters = 2000  # iterations of each training
tuning_iters = 200  # iterations of each fine-tuning
data_dir = 'data'
jobs = 0  # concurrent trainings with one thread each; 0: the cores that this process may use
exec(open(Path(__file__).resolve().parents[1] / 'configurator.py', encoding='utf-8').read())
# ----------------------------------------------------------------------------------------------------------------------

CONFIG, TUNING = 'config/train_shakespeare_cpu.py', 'config/finetune_shakespeare_cpu_mla.py'
WIDTH, BLOCK, DATASET = 128, 64, 'shakespeare_char'  # n_embd, block_size and dataset of CONFIG
SIZES = (3 * WIDTH // 4, WIDTH // 2, WIDTH // 4, WIDTH // 8)
# The latent with which MLA has as many parameters as MHA: 2C/3. With RoPE (4 heads, R = 16) the keys' up-projection has
# R fewer rows per head and the latent is (2C^2 - RC) / (3C - RH).
MATCHED = {'learned': round(2 * WIDTH / 3), 'rope': (2 * WIDTH**2 - 16 * WIDTH) // (3 * WIDTH - 16 * 4)}


# ---- runs ------------------------------------------------------------------------------------------------------------


def run(name, script, after=None, **keys):
    """One run: its name, folder, script and keys, and the run `after` whose model it starts from."""
    return dict(name=name, script=script, after=after, keys=keys, folder=os.path.join(out_dir, name))


def planned(seed):
    """All runs of one seed, each after the run that it requires."""
    scratch = {'seed': seed, 'max_iters': max_iters, 'lr_decay_iters': max_iters}
    old = {'latent_init': 'gpt2'}  # with which the figures of RESULTS.md were measured
    tuning = {'seed': seed + 1000, 'max_iters': tuning_iters, 'lr_decay_iters': tuning_iters}
    mha = run(f'mha-learned-s{seed}', 'train.py', pos='learned', **scratch)
    runs = [mha, run(f'mha-rope-s{seed}', 'train.py', pos='rope', **scratch)]
    runs += [
        run(f'mla-{pos}-{size}-s{seed}', 'train_mla.py', pos=pos, n_latent=size, **old, **scratch)
        for pos, sizes in (('learned', (*SIZES, MATCHED['learned'])), ('rope', (WIDTH // 2, MATCHED['rope'])))
        for size in sizes
    ]
    runs.append(run(f'mha-tuned-s{seed}', 'train.py', after=mha, attention='mha', n_latent=0, **tuning))
    for size in SIZES:
        converted = run(f'converted-{size}-s{seed}', 'convert_mla.py', after=mha, n_latent=size)
        tuned = run(f'tuned-{size}-s{seed}', 'train_mla.py', after=converted, n_latent=size, **tuning)
        runs += [converted, tuned]
    return runs


def checkpoint_of(item):
    """The file of a run's checkpoint."""
    return os.path.join(item['folder'], 'ckpt.pt')


def arguments(item):
    """The arguments of a run's script, which resumes an interrupted run."""
    keys = dict(item['keys'], out_dir=item['folder'], data_dir=data_dir, device='cpu', threads=1)
    if item['script'] == 'convert_mla.py':
        return [dict(keys, source=item['after']['folder'], eval_tokens=4096)]  # `measured` evaluates on all windows
    # evaluated once, at the end of the run
    keys.update(eval_interval=keys['max_iters'], eval_iters=1, always_save_checkpoint=True, checkpoint_interval=500)
    begun = os.path.exists(checkpoint_of(item))
    keys['init_from'] = 'resume' if begun else item['after']['folder'] if item['after'] else 'scratch'
    return [TUNING if item['after'] else CONFIG, keys]


def finished(item):
    """True if a run is complete. UserError if its folder holds a run with other keys."""
    if not os.path.exists(checkpoint_of(item)):
        return False
    saved = checkpoints.load(item['folder'], mapped=True)
    for key, value in item['keys'].items():
        if saved['config'].get(key) != value:
            raise UserError(
                f'{item["folder"]} has {key}={saved["config"].get(key)}, not {value}; choose another --out_dir'
            )
    return saved['iter_num'] >= item['keys'].get('max_iters', 0)


def make(item):
    """Run a script, unless that is done, and measure its model; returns the dict of `measured`."""
    if not finished(item):
        scripts.run_script(item['script'], arguments(item), item['folder'])
    result = os.path.join(item['folder'], 'result.json')
    if not scripts.is_current(result, checkpoint_of(item)):
        files.write_json(result, measured(item['folder']))
    with open(result, encoding='utf-8') as file:
        return json.load(file)


def measured(folder):
    """Sizes of the model in `folder` and its loss on all validation windows, in nats per token: a dict."""
    model = checkpoints.build_model(checkpoints.load(folder)).eval()
    losses = window_losses(model, data, 'val', 10**9, batch_size=64)
    return dict(val_loss=mean_and_stderr(losses)[0], **comparison.sizes(model))


# ---- tables ----------------------------------------------------------------------------------------------------------


def losses(name, against=None):
    """Mean and standard error over seeds of a kind's validation loss; against: of its difference to another kind's."""
    values = [result['val_loss'] for result in results[name]]
    if against:
        values = [a - b['val_loss'] for a, b in zip(values, results[against], strict=True)]
    return mean_and_stderr(torch.tensor(values, dtype=torch.float64))


def cell(pair, form='.4f'):
    """A mean and its standard error, a pair, as a table cell; without the error for a single seed."""
    return f'{pair[0]:{form}}' + (f' ± {pair[1]:.4f}' if seeds > 1 else '')


def comparison_table():
    """MHA and MLA, with learned positions and with RoPE."""
    heading = ('attention', 'positions', 'n_latent', 'parameters', 'cache bytes per token', 'validation loss',
               'minus MHA')  # fmt: skip
    rows = []
    for pos in ('learned', 'rope'):
        for size in (None, WIDTH // 2, MATCHED[pos]):
            name = f'mha-{pos}' if size is None else f'mla-{pos}-{size}'
            row = results[name][0]
            gap = '' if size is None else cell(losses(name, f'mha-{pos}'), '+.4f')
            rows.append(('MHA' if size is None else 'MLA', pos, size or '', f'{row["parameters"]:,}',
                         f'{row["cache_bytes_per_token"]:,}', cell(losses(name)), gap))  # fmt: skip
    return report.markdown_table(heading, rows)


def conversion_table():
    """The loss for each latent size: converted, converted and fine-tuned, from scratch."""
    heading = ('n_latent', 'cache bytes per token', 'MHA / MLA', 'converted, minus MHA',
               'converted and fine-tuned, minus MHA fine-tuned', 'MLA from scratch, minus MHA')  # fmt: skip
    whole, rows = results['mha-learned'][0]['cache_bytes_per_token'], []
    for size in SIZES:
        held = results[f'converted-{size}'][0]['cache_bytes_per_token']
        pairs = (('converted', 'mha-learned'), ('tuned', 'mha-tuned'), ('mla-learned', 'mha-learned'))
        gaps = [cell(losses(f'{name}-{size}', against), '+.4f') for name, against in pairs]
        rows.append((size, f'{held:,}', f'{whole / held:.1f}', *gaps))
    return report.markdown_table(heading, rows)


# ---- the picture -----------------------------------------------------------------------------------------------------

DARK, MIDDLE, LIGHT = '#1f3b73', '#c4622d', '#8a8a8a'  # of different brightness, to be distinguishable in grey


def draw_comparison(axes):
    """Validation loss of MHA and MLA by positions: mean and standard error, and each seed."""
    kinds = ('MHA', f'MLA r={WIDTH // 2}', 'MLA, as many\nparameters as MHA')
    for pos, shift, color, marker in (('learned', -0.1, DARK, 'o'), ('rope', 0.1, MIDDLE, 's')):
        for x, name in enumerate((f'mha-{pos}', f'mla-{pos}-{WIDTH // 2}', f'mla-{pos}-{MATCHED[pos]}')):
            axes.errorbar(
                x + shift,
                *losses(name),
                color=color,
                marker=marker,
                capsize=4,
                label=None if x else {'rope': 'RoPE'}.get(pos, pos),
            )
            each = [result['val_loss'] for result in results[name]]
            axes.plot([x + shift + 0.06] * seeds, each, '.', color=color, alpha=0.5)
    axes.set_xticks(range(len(kinds)), kinds)
    title = f'{max_iters} iterations at 1e-3, initial values of 0.1.0: mean ± standard error; dots: seeds'
    axes.set(ylabel='validation loss (nats per token)', xlim=(-0.5, 2.5))
    axes.set_title(title, fontsize='medium')
    axes.legend(title='positions')


def draw_conversion(axes):
    """Validation loss against cache size: converted, fine-tuned, and from scratch."""
    lines = (
        ('converted from MHA', 'converted-{}', dict(color=LIGHT, marker='^', linestyle=':')),
        (f'converted, {tuning_iters} iterations', 'tuned-{}', dict(color=MIDDLE, marker='s', linestyle='--')),
        ('MLA from scratch', 'mla-learned-{}', dict(color=DARK, marker='o', linestyle='-')),
    )
    for label, pattern, look in lines:
        names = [pattern.format(size) for size in SIZES]
        x = [results[name][0]['cache_bytes_per_token'] for name in names]
        points = [losses(name) for name in names]
        axes.errorbar(x, [p[0] for p in points], [p[1] for p in points], capsize=3, label=label, **look)
    whole = results['mha-learned'][0]['cache_bytes_per_token']
    look = dict(color='black', marker='D', capsize=3)
    axes.errorbar(whole, *losses('mha-learned'), label='MHA', **look)
    axes.errorbar(whole, *losses('mha-tuned'), fillstyle='none', label=f'MHA, {tuning_iters} more', **look)
    axes.set_xscale('log', base=2)
    ticks = [*x, whole]
    axes.set_xticks(ticks, [f'{tick:,}' for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel='cache bytes per token (float32)', ylabel='validation loss (nats per token)')
    axes.set_title(f'{data.corpus}, learned positions, the same setting', fontsize='medium')
    axes.legend()


# ---- train, measure, report ------------------------------------------------------------------------------------------

if min(seeds, max_iters, tuning_iters) < 1:
    raise UserError('seeds, max_iters and tuning_iters must be at least 1')
messages.check_folder(out_dir)
messages.check_file(figure, 'figure')
data = TokenData(os.path.join(data_dir, DATASET), BLOCK)
torch.set_num_threads(1)
plans = [planned(1337 + number) for number in range(seeds)]
order = [item for column in zip(*plans, strict=True) for item in column]
results = {}  # {name without seed: dicts of `measured`, one per seed}
for item, outcome in zip(order, scripts.run_all(make, order, jobs), strict=True):
    results.setdefault(item['name'].rpartition('-s')[0], []).append(outcome)

windows = len(data.eval_windows('val', 10**9))
intro = (
    f'{seeds} seed{"s" if seeds > 1 else ""}, {max_iters} iterations on {data.corpus}: validation loss in nats per '
    f'token over all {windows:,} windows, mean ± standard error over seeds, differences paired by seed. '
    'Cache in float32.\n'
)
mha, tuned = cell(losses('mha-learned')), cell(losses('mha-tuned'))
between = f'MHA reaches {mha}, and {tuned} after {tuning_iters} more iterations.\n'
tables = '\n'.join((intro, comparison_table(), between, conversion_table()))
messages.output(tables.rstrip('\n'))
report.save_text(os.path.join(out_dir, 'tables.md'), tables)
numbers = dict(corpus=data.corpus, seeds=seeds, max_iters=max_iters, tuning_iters=tuning_iters, results=results)
report.save_json(os.path.splitext(figure)[0] + '.json', numbers)
picture = Figure(figsize=(12, 4.6), layout='constrained')
left, right = picture.subplots(1, 2)
draw_comparison(left)
draw_conversion(right)
for axes in (left, right):
    axes.grid(alpha=0.3)
report.save_figure(figure, picture, dpi=130)
