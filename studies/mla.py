"""
The study behind the README's tables: MHA against MLA, with learned positions and with RoPE, and MHA turned into MLA.

$ python data/shakespeare_char/prepare.py
$ python study_mla.py

Trains, for each of three seeds, on the same batches:
- MHA and MLA, each with learned positions and with RoPE, MLA with half of n_embd as its latent, and with the latent
  that gives it as many parameters as MHA;
- MLA of several latent sizes from scratch;
and converts the MHA model to the same sizes, without fine-tuning and with a short one, which MHA gets as well.

Every run is one of train.py, train_mla.py or convert_mla.py. What is finished is kept: the same command goes on after
an interruption. Writes tables.md into out_dir, and the picture and its numbers where `figure` says.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from statistics import mean, stdev

import torch
from tqdm import tqdm

from core import checkpoint as checkpoints
from core import runtime
from core.dataset import TokenData
from core.runtime import UserError

# ----------------------------------------------------------------------------------------------------------------------
out_dir = 'out-study-mla'  # the runs
figure = 'assets/study_mla.png'  # the picture; the numbers go beside it, into a .json
seeds = 3  # trainings of each kind
max_iters = 2000  # iterations of each training
tuning_iters = 200  # iterations of each fine-tuning
data_dir = 'data'
jobs = 0  # trainings at a time, each with one thread; 0: the cores that this process may use
exec(open('configurator.py', encoding='utf-8').read())
# ----------------------------------------------------------------------------------------------------------------------

CONFIG, TUNING = 'config/train_shakespeare_cpu.py', 'config/finetune_shakespeare_cpu_mla.py'
WIDTH, DATASET = 128, 'shakespeare_char'  # n_embd and dataset of CONFIG
SIZES = (3 * WIDTH // 4, WIDTH // 2, WIDTH // 4, WIDTH // 8)
# The latent with which MLA has as many parameters as MHA: 2C/3, and with RoPE, whose R position dimensions take up-
# projections of keys away, (2C^2 - RC) / (3C - RH), here with 4 heads and R = 16.
MATCHED = {'learned': round(2 * WIDTH / 3), 'rope': (2 * WIDTH**2 - 16 * WIDTH) // (3 * WIDTH - 16 * 4)}
if min(seeds, max_iters, tuning_iters) < 1:
    raise UserError('seeds, max_iters and tuning_iters must be at least 1')
data = TokenData(os.path.join(data_dir, DATASET), 64)


# ---- the runs --------------------------------------------------------------------------------------------------------
def run(name, script, after=None, **keys):
    """One run: its folder, the script and keys that make it, and the run `after` which it comes."""
    return dict(name=name, script=script, after=after, keys=keys, folder=os.path.join(out_dir, name))


def planned(seed):
    """Every run of one seed, in an order in which each comes after what it needs."""
    scratch = {'seed': seed, 'max_iters': max_iters, 'lr_decay_iters': max_iters}
    tuning = {'seed': seed + 1000, 'max_iters': tuning_iters, 'lr_decay_iters': tuning_iters}
    mha = run(f'mha-learned-s{seed}', 'train.py', pos='learned', **scratch)
    runs = [mha, run(f'mha-rope-s{seed}', 'train.py', pos='rope', **scratch)]
    runs += [
        run(f'mla-{pos}-{size}-s{seed}', 'train_mla.py', pos=pos, n_latent=size, **scratch)
        for pos, sizes in (('learned', (*SIZES, MATCHED['learned'])), ('rope', (WIDTH // 2, MATCHED['rope'])))
        for size in sizes
    ]
    runs.append(run(f'mha-tuned-s{seed}', 'train.py', after=mha, attention='mha', n_latent=0, **tuning))
    for size in SIZES:
        converted = run(f'converted-{size}-s{seed}', 'convert_mla.py', after=mha, n_latent=size)
        tuned = run(f'tuned-{size}-s{seed}', 'train_mla.py', after=converted, n_latent=size, **tuning)
        runs += [converted, tuned]
    return runs


def arguments(item):
    """The command line of a run, as far as it is not done yet."""
    keys = dict(item['keys'], out_dir=item['folder'], data_dir=data_dir, device='cpu', threads=1)
    if item['script'] == 'convert_mla.py':
        keys.update(source=item['after']['folder'], eval_tokens=4096)  # measured below, with all other models
        return [item['script'], *(f'--{key}={value}' for key, value in keys.items())]
    # the runs are evaluated here, at their end
    keys.update(eval_interval=keys['max_iters'], eval_iters=1, always_save_checkpoint=True, checkpoint_interval=500)
    begun = os.path.exists(os.path.join(item['folder'], 'ckpt.pt'))
    keys['init_from'] = 'resume' if begun else item['after']['folder'] if item['after'] else 'scratch'
    config_file = TUNING if item['after'] else CONFIG
    return [item['script'], config_file, *(f'--{key}={value}' for key, value in keys.items())]


def finished(item):
    """Whether a run has reached its end. UserError where its folder holds another run than the one that is planned."""
    path = os.path.join(item['folder'], 'ckpt.pt')
    if not os.path.exists(path):
        return False
    saved = checkpoints.load(path)
    for key, value in item['keys'].items():
        if saved['config'].get(key) != value:
            raise UserError(
                f'{item["folder"]} has {key}={saved["config"].get(key)}, not {value}; choose another --out_dir'
            )
    return saved['iter_num'] >= item['keys'].get('max_iters', 0)


def make(item):
    """Do a run, unless it is done, and measure it; its output goes to log.txt in its folder."""
    if not finished(item):
        os.makedirs(item['folder'], exist_ok=True)
        log = os.path.join(item['folder'], 'log.txt')
        with open(log, 'a', encoding='utf-8') as file:
            environment = dict(os.environ, OMP_NUM_THREADS='1')
            command = [sys.executable, *arguments(item)]
            code = subprocess.run(command, stdout=file, stderr=file, env=environment, check=False).returncode
        if code:
            raise UserError(f'{item["name"]} failed with exit code {code}; the reason is at the end of {log}')
    result = os.path.join(item['folder'], 'result.json')
    if not os.path.exists(result) or os.path.getmtime(result) < os.path.getmtime(
        os.path.join(item['folder'], 'ckpt.pt')
    ):
        write_json(result, measured(item['folder']))
    with open(result, encoding='utf-8') as file:
        return json.load(file)


@torch.no_grad()
def measured(folder):
    """The loss of a run's last checkpoint on all windows of the validation split, and its sizes."""
    model = checkpoints.build_model(checkpoints.load(folder)).eval()
    starts, losses = data.eval_windows('val', 10**9), []
    for first in range(0, len(starts), 64):
        losses.append(model.window_losses(*data.windows('val', starts[first : first + 64])).double())
    return dict(
        val_loss=torch.cat(losses).mean().item(),
        parameters=model.get_num_params(),
        attention_parameters=model.num_attention_params(),
        cache_bytes_per_token=model.init_cache(1).bytes_per_token,
    )


def write_json(path, value):
    with open(path, 'w', encoding='utf-8') as file:
        json.dump(value, file, indent=1)


def make_all():
    """Do all runs, `jobs` at a time; returns {name without seed: results, one per seed}."""
    plans = [planned(1337 + number) for number in range(seeds)]
    order = [item for column in zip(*plans, strict=True) for item in column]
    futures, results = {}, {}

    def when_ready(item):
        if item['after']:
            futures[item['after']['name']].result()
        outcome = make(item)
        bar.update()
        return outcome

    # what a run comes after stands in front of it, so that waiting for it never waits for a free worker
    with ThreadPoolExecutor(jobs or runtime.available_cores()) as pool, tqdm(total=len(order), unit='run') as bar:
        for item in order:
            futures[item['name']] = pool.submit(when_ready, item)
        for item in order:
            try:
                results.setdefault(item['name'].rpartition('-s')[0], []).append(futures[item['name']].result())
            except Exception:
                pool.shutdown(cancel_futures=True)
                raise
    return results


torch.set_num_threads(1)
results = make_all()


# ---- the tables ------------------------------------------------------------------------------------------------------
def spread(values):
    """Mean over the seeds and its standard error (0 for a single seed)."""
    return mean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def losses(name, against=None):
    """Mean and standard error of the validation loss, or of its difference, seed by seed, from another kind's."""
    values = [result['val_loss'] for result in results[name]]
    if against:
        values = [a - b['val_loss'] for a, b in zip(values, results[against], strict=True)]
    return spread(values)


def cell(pair, form='.4f'):
    return f'{pair[0]:{form}}' + (f' \u00b1 {pair[1]:.4f}' if seeds > 1 else '')


def comparison_table():
    """MHA and MLA, with learned positions and with RoPE."""
    yield '| attention | positions | n_latent | parameters | cache bytes per token | validation loss | against MHA |'
    yield '|---|---|---|---|---|---|---|'
    for pos in ('learned', 'rope'):
        for size in (None, WIDTH // 2, MATCHED[pos]):
            name = f'mha-{pos}' if size is None else f'mla-{pos}-{size}'
            row = results[name][0]
            gap = '' if size is None else cell(losses(name, f'mha-{pos}'), '+.4f')
            yield (
                f'| {"MHA" if size is None else "MLA"} | {pos} | {size or ""} | {row["parameters"]:,} | '
                f'{row["cache_bytes_per_token"]:,} | {cell(losses(name))} | {gap} |'
            )


def conversion_table():
    """What each latent size costs: converted, converted and fine-tuned, from scratch."""
    yield (
        '| n_latent | cache bytes per token | MHA / MLA | rise by conversion | after fine-tuning, against MHA '
        'fine-tuned likewise | MLA from scratch, against MHA |'
    )
    yield '|---|---|---|---|---|---|'
    whole = results['mha-learned'][0]['cache_bytes_per_token']
    for size in SIZES:
        held = results[f'converted-{size}'][0]['cache_bytes_per_token']
        rise = losses(f'converted-{size}', 'mha-learned')
        tuned = losses(f'tuned-{size}', 'mha-tuned')
        scratch = losses(f'mla-learned-{size}', 'mha-learned')
        yield (
            f'| {size} | {held:,} | {whole / held:.1f} | {cell(rise, "+.4f")} | {cell(tuned, "+.4f")} | '
            f'{cell(scratch, "+.4f")} |'
        )


heading = (
    f'{seeds} seed{"s" * (seeds > 1)}, {max_iters} iterations, on {data.corpus}: validation loss in nats per token '
    f'over all {len(data.eval_windows("val", 10**9)):,} windows, mean \u00b1 standard error over the seeds, '
    'differences seed by seed. Cache in float32.'
)
tables = '\n'.join(
    (
        heading,
        '',
        *comparison_table(),
        '',
        f'MHA reaches {cell(losses("mha-learned"))}, and {cell(losses("mha-tuned"))} after {tuning_iters} more '
        'iterations.',
        '',
        *conversion_table(),
    )
)
print(tables)
with open(os.path.join(out_dir, 'tables.md'), 'w', encoding='utf-8') as file:
    file.write(tables + '\n')
write_json(
    os.path.splitext(figure)[0] + '.json',
    dict(corpus=data.corpus, seeds=seeds, max_iters=max_iters, tuning_iters=tuning_iters, results=results),
)

# ---- the picture -----------------------------------------------------------------------------------------------------
import matplotlib  # noqa: E402  (slow to import, and of no use before)

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

DARK, MIDDLE, LIGHT = '#1f3b73', '#c4622d', '#8a8a8a'  # of different brightness, so that they differ in grey too
picture, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout='constrained')
kinds = ('MHA', f'MLA r={WIDTH // 2}', 'MLA, as many\nparameters as MHA')
for pos, shift, color, marker in (('learned', -0.1, DARK, 'o'), ('rope', 0.1, MIDDLE, 's')):
    for x, name in enumerate((f'mha-{pos}', f'mla-{pos}-{WIDTH // 2}', f'mla-{pos}-{MATCHED[pos]}')):
        left.errorbar(x + shift, *losses(name), color=color, marker=marker, capsize=4, label=None if x else pos)
        each = [result['val_loss'] for result in results[name]]
        left.plot([x + shift + 0.06] * seeds, each, '.', color=color, alpha=0.5)
left.set_xticks(range(len(kinds)), kinds)
left.set(ylabel='validation loss (nats per token)', title=f'{max_iters} iterations: mean and error, each seed beside')
left.legend(title='positions')
LINES = (
    ('converted from MHA', 'converted-{}', dict(color=LIGHT, marker='^', linestyle=':')),
    (f'converted, {tuning_iters} iterations', 'tuned-{}', dict(color=MIDDLE, marker='s', linestyle='--')),
    ('MLA from scratch', 'mla-learned-{}', dict(color=DARK, marker='o', linestyle='-')),
)
for label, pattern, look in LINES:
    names = [pattern.format(size) for size in SIZES]
    x = [results[name][0]['cache_bytes_per_token'] for name in names]
    points = [losses(name) for name in names]
    right.errorbar(x, [p[0] for p in points], [p[1] for p in points], capsize=3, label=label, **look)
whole = results['mha-learned'][0]['cache_bytes_per_token']
right.errorbar(whole, *losses('mha-learned'), color='black', marker='D', capsize=3, label='MHA')
right.errorbar(
    whole,
    *losses('mha-tuned'),
    color='black',
    marker='D',
    fillstyle='none',
    capsize=3,
    label=f'MHA, {tuning_iters} more',
)
right.set_xscale('log', base=2)
right.set(xlabel='cache bytes per token (float32)', ylabel='validation loss (nats per token)', title=data.corpus)
right.legend()
for axes in (left, right):
    axes.grid(alpha=0.3)
picture.savefig(figure, dpi=130)
print(f'\npicture: {figure}   tables: {os.path.join(out_dir, "tables.md")}')
