"""
Induction heads on real text: MHA, MQA and MLA on the same batches of source code, and MHA on prose with copies in it.

$ python data/code/prepare.py --tokenizer=bpe --vocab_size=2048
$ python studies/induction_text.py                 # a short form: two arms, one seed, few iterations; minutes
$ python studies/induction_text.py --full=True     # every arm and seed: some two hours on two cores
$ python studies/induction_text.py --full=True --prose=imdb --figure=assets/induction_text.png
$ python studies/induction_text.py --full=True --earlier=assets/induction_text.json    # runs recorded are not repeated
$ python studies/induction_text.py --reuse=assets/induction_text.json    # tables and pictures again, in seconds

1. Each arm is trained on `dataset` with config/train_code_cpu.py, on one seed at each of `rates`, and on the other
   seeds at the rate of its lowest validation loss. It is measured at many iterations: scores of heads on repeated
   random tokens, and losses on validation text where a bigram occurred before in the window, and elsewhere.
2. With --prose=DATASET, a text that rewards induction little: MHA on it as it is, and with a share of its tokens
   replaced by copies of what stood up to 200 tokens before. Does repetition make heads form?

Finished runs are kept: repeat the command to continue. Writes text.md, and beside `figure` a .json with every number.
Run it from the repository root.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from core.cli import signals

signals.exit_at_once()  # for the time of the slow imports

import os
import shutil
from statistics import median

import numpy as np
from matplotlib.figure import Figure

from analysis import report, stats
from analysis.bigrams import with_copies
from core.cli import arguments, errors, files, subprocesses
from core.cli.errors import UserError
from core.text.dataset import TokenData
from studies.measure import measure, measurement, read_json, sweep

# ----------------------------------------------------------------------------------------------------------------------
out_dir = 'out-induction-text'  # the runs
figure = ''  # the picture, with the numbers in a .json beside it; '': text.png in out_dir
full = False  # every arm and seed, 5000 iterations
dataset = 'code'
prose = ''  # a data set that rewards induction little, for part 2; '': no part 2
data_dir = 'data'
max_iters = 0  # 0: 5000, in the short form 300
rates = ''  # learning rates, separated by commas; '': 2e-3, 4e-3, 8e-3 and 1.6e-2, in the short form the config's, 4e-3
seeds = 0  # training seeds of each arm; 0: 3, in the short form 1
arms = ''  # names of ARMS separated by semicolons; '': all, in the short form the first and the third
earlier = ''  # the .json of an earlier study with as many iterations, whose runs are not repeated but added to
reuse = ''  # the .json of an earlier study: its tables and pictures are made again, nothing is trained
jobs = 0  # concurrent trainings with one thread each; 0: the cores that this process may use
exec(open(Path(__file__).resolve().parents[1] / 'configurator.py', encoding='utf-8').read())
# ----------------------------------------------------------------------------------------------------------------------

ARMS = {
    'MHA': {},
    'MQA': dict(n_kv_head=1),
    'MLA, r=C/2': dict(n_latent=64),
    'MLA, r=C/4': dict(n_latent=32),
    'MLA, r=C/2, latent norm': dict(n_latent=64, latent_norm=True),
    'MLA, r=C/2, R=3d/4': dict(n_latent=64, n_rope=24),  # RoPE on 24 of a head's 32 dimensions, where others have 16
}
LOOKS = {'MHA': ('#c4622d', '-', 'o'), 'MQA': ('#8a8a8a', '--', 's'), 'MLA, r=C/2': ('#0d1b3d', '-', '^'),
         'MLA, r=C/4': ('#4f83c4', '-.', 'D'), 'MLA, r=C/2, latent norm': ('#7b4fa3', ':', 'v'),
         'MLA, r=C/2, R=3d/4': ('#2f9e8f', '--', 'P')}  # fmt: skip
SEED = 1337  # the first
SHARES = (0.0, 0.1, 0.3)  # of tokens that are copies, in part 2
RATE, RATES = 4e-3, '2e-3,4e-3,8e-3,1.6e-2'  # the config's learning rate, and the grid of the full form
FORMED = report.CUSTOMARY  # an induction head has formed when the best induction score exceeds this
TOKENS = 4 * 256  # per iteration, in the config
STEPS = (100, 200, 300, 400, 600, 800, 1000, 1250, 1500, 1750, 2000, 2250, 2500, 2750, 3000, 3500, 4000, 4500, 6000,
         8000, 12000, 16000, 24000)  # fmt: skip


# ---- prose with copies -----------------------------------------------------------------------------------------------


def mixed(share):
    """The name of `prose` with this share of copies, a data set in out_dir/data that is made if it is missing."""
    name = f'{os.path.basename(prose)}-{round(100 * share)}'
    folder = os.path.join(out_dir, 'data', name)
    if not os.path.exists(os.path.join(folder, 'meta.json')):
        os.makedirs(folder, exist_ok=True)
        source = os.path.join(data_dir, prose)
        meta = dict(read_json(source, 'meta.json'))
        train = np.fromfile(os.path.join(source, 'train.bin'), dtype=meta['dtype'])
        with_copies(train, share).tofile(os.path.join(folder, 'train.bin'))
        shutil.copy(os.path.join(source, 'val.bin'), folder)  # as it is, so that losses can be compared
        meta = {key: value for key, value in meta.items() if key not in ('sha256', 'documents')}
        meta['source'] += f', {share:.0%} of its training tokens copied' if share else ''
        files.write_json(os.path.join(folder, 'meta.json'), meta)
    return name


# ---- runs ------------------------------------------------------------------------------------------------------------


def named(arm, seed=SEED, rate=RATE, share=None):
    """A run: a dict of name, folder, arm, share of copies (None: of code), rate, seed."""
    slug = ''.join(letter if letter.isalnum() else '-' for letter in arm.lower().replace(', ', '_'))
    corpus = 'code' if share is None else f'prose{round(100 * share)}'
    name = f'{corpus}-{slug}-s{seed}' + f'-lr{rate:g}' * (rate != RATE)
    return dict(arm=arm, share=share, rate=rate, seed=seed, name=name, folder=os.path.join(out_dir, name))


def snapshots():
    """The iterations at which a run is measured."""
    return [step for step in STEPS if step < iterations] + [iterations]


def read_earlier():
    """
    {name: outcome} of the runs in `earlier`, and its `prose`. UserError if they are of other data or iterations.
    """
    if not earlier:
        return {}, ''
    numbers = read_study(earlier)
    for o in numbers['runs']:
        corpus, steps = (dataset if o['share'] is None else prose), o['curve'][-1]['tokens'] // TOKENS
        theirs = numbers['config']['dataset' if o['share'] is None else 'prose']
        if steps != iterations or (corpus and theirs != corpus):
            raise UserError(f'{earlier} has {steps} iterations on {theirs}, not {iterations} on {corpus}')
    return {o['name']: o for o in numbers['runs']}, numbers['config']['prose']


def read_study(path):
    """The numbers of an earlier study. UserError if the file isn't one."""
    try:
        numbers = read_json(path)
        tables(numbers['runs'])  # has all that they show
        return numbers
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} can't be read as a study ({error}); name the .json of another") from error


def with_recorded(outcomes):
    """Outcomes, without those that diverged, and those of `earlier` that are not among them."""
    outcomes = [o for o in outcomes if o]
    known = {o['name'] for o in outcomes}
    return outcomes + [o for name, o in recorded.items() if name not in known]


def train_and_measure(run):
    """Train and measure one run, as far as that isn't done yet; returns its outcome, None if it diverged."""
    if run['name'] in recorded:
        return recorded[run['name']]
    steps, mla = snapshots(), 'MLA' in run['arm']
    of_prose = run['share'] is not None
    where = dict(data_dir=os.path.join(out_dir, 'data') if of_prose else data_dir)
    if not os.path.exists(os.path.join(run['folder'], f'ckpt_{steps[-1]:06}.pt')):
        keys = dict(where, out_dir=run['folder'], dataset=mixed(run['share']) if of_prose else dataset, resume='auto',
                    seed=run['seed'], learning_rate=run['rate'], min_lr=run['rate'] / 10,
                    max_iters=iterations, lr_decay_iters=iterations, eval_interval=iterations,
                    checkpoint_interval=500, threads=1, device='cpu', dtype='float32',
                    keep_checkpoints=','.join(map(str, steps)), **ARMS[run['arm']])  # fmt: skip
        keys |= dict(kv_lr=1.0) if mla else {}  # with which the figures of RESULTS.md were measured
        config_file = 'config/train_code_cpu_mla.py' if mla else 'config/train_code_cpu.py'
        if not subprocesses.converges('train_mla.py' if mla else 'train.py', [config_file, keys], run['folder']):
            return None  # the rate is too high for this arm
    measure(run['folder'], sweep=run['folder'], text_windows=128, html=False, threads=1, device='cpu', **where)
    return outcome(run)


def outcome(run):
    """A run and the numbers that tables and pictures show of it: a dict."""
    found, steps = measurement(run['folder']), sweep(run['folder'])
    layer, head = best = found['ranking'][0]
    previous = np.array(found['previous_token']['mean'])
    on_text = {step['heads']: step for step in found['ablation']['on_text']}
    curve = [dict(tokens=step['iteration'] * TOKENS, induction=step['induction']['mean'],
                  previous=step['previous_token']['mean'], previous_layer=step['previous_token']['head'][0],
                  repeated=step['bigrams']['repeated']['mean'], others=step['bigrams']['others']['mean'],
                  gain=step['bigram_gain']) for step in steps]  # fmt: skip
    formed = [step['tokens'] for step in curve if step['induction'] > FORMED]
    kept = ('name', 'arm', 'share', 'rate', 'seed')
    return {key: run[key] for key in kept} | dict(
        curve=curve,
        formed=formed[0] if formed else None,
        repeated_share=found['bigrams']['share'],
        repeated=found['bigrams']['repeated']['mean'],
        others=found['bigrams']['others']['mean'],
        best=best,
        score=found['induction']['mean'][layer][head],
        random_null=found['random_null'],
        heads=int(np.sum(found['called'])),
        copying=found['copying_eigenvalues'][layer][head],
        best_previous=[int(i) for i in np.unravel_index(previous.argmax(), previous.shape)],
        previous=float(previous.max()),
        ablation={str(k): on_text[k] for k in (1, 2, 4)},
        parameters=found['parameters'],
    )


# ---- tables ----------------------------------------------------------------------------------------------------------


def spread(values, form='.3f'):
    """'mean [lowest, highest]' of numbers, or mean ± half width of the 95 % interval where there are four or more."""
    values = list(values)
    middle, half = stats.t_interval(values)
    if half is not None:
        return f'{middle:{form}} ± {half:.3f}'
    return f'{middle:{form}}' + (f' [{min(values):{form}}, {max(values):{form}}]' if len(values) > 1 else '')


def when(group):
    """At how many millions of tokens heads formed: median [range], and in how many runs."""
    formed = sorted(o['formed'] / 1e6 for o in group if o['formed'])
    if not formed:
        return f'never (0 of {len(group)})'
    ends = f' [{formed[0]:.2f}, {formed[-1]:.2f}]' if formed[0] != formed[-1] else ''
    return f'{median(formed):.2f}{ends}' + (f' ({len(formed)} of {len(group)})' if len(formed) < len(group) else '')


def places(group, key):
    """layer.head of every run of a group."""
    return ', '.join('.'.join(map(str, o[key])) for o in group)


def rate_of(o):
    """The learning rate of a run; studies of before there was a grid had one."""
    return o.get('rate', RATE)


def loss_of(o):
    """The validation loss of a run, over all positions."""
    return o['repeated_share'] * o['repeated'] + (1 - o['repeated_share']) * o['others']


def tuning(outcomes):
    """{arm: its runs on the seed that has every rate}."""
    found = {}
    for o in outcomes:
        if o['share'] is None and o['seed'] == SEED:
            found.setdefault(o['arm'], []).append(o)
    return found


def by_arm(outcomes):
    """{arm: its runs of part 1 at its best rate}."""
    best = {arm: rate_of(min(group, key=loss_of)) for arm, group in tuning(outcomes).items()}
    return {arm: [o for o in outcomes if (o['arm'], o['share'], rate_of(o)) == (arm, None, rate)]
            for arm, rate in best.items()}  # fmt: skip


def formation_table(outcomes):
    """Formation, final scores and losses of every arm."""
    heading = ('attention', 'learning rate', f'million tokens until a score > {FORMED}', 'best induction score',
               'layer.head', 'induction heads of 16', 'copying', 'best previous-token score', 'layer.head',
               'loss at repeated bigrams', 'elsewhere')  # fmt: skip
    rows = []
    for arm, group in by_arm(outcomes).items():
        numbers = {key: spread(o[key] for o in group)
                   for key in ('score', 'copying', 'previous', 'repeated', 'others')}  # fmt: skip
        heads = ', '.join(str(o['heads']) for o in group)
        rows.append((arm, f'{rate_of(group[0]):g}', when(group), numbers['score'], places(group, 'best'), heads,
                     numbers['copying'], numbers['previous'], places(group, 'best_previous'), numbers['repeated'],
                     numbers['others']))  # fmt: skip
    return report.markdown_table(heading, rows)


def paired_table(outcomes):
    """Every arm minus MHA of the same seed, which saw the same batches, both at their best rate."""
    groups, keys, rows = by_arm(outcomes), ('score', 'repeated', 'others'), []
    mha = {o['seed']: o for o in groups.get('MHA', [])}
    for arm, group in groups.items():
        pairs = [(o, mha[o['seed']]) for o in group if arm != 'MHA' and o['seed'] in mha]
        if pairs:
            gaps = [spread((o[key] - other[key] for o, other in pairs), '+.3f') for key in keys]
            rows.append((arm, *gaps))
    return report.markdown_table(('minus MHA', 'best induction score', 'loss at repeated bigrams', 'elsewhere'), rows)


def ablation_table(outcomes):
    """What the best induction heads are worth on text."""
    heading = ('attention', *(f'top {k}: at repeated bigrams, elsewhere' for k in ('1', '2', '4')),
               '2 random others of these layers')  # fmt: skip
    rows = []
    for arm, group in by_arm(outcomes).items():
        cells = [', '.join(spread((o['ablation'][k][part]['mean'] for o in group), '+.3f')
                           for part in ('repeated', 'others')) for k in ('1', '2', '4')]  # fmt: skip
        control = ', '.join(spread((o['ablation']['2'][f'control_{part}'] for o in group), '+.3f')
                            for part in ('repeated', 'others'))  # fmt: skip
        rows.append((arm, *cells, control))
    return report.markdown_table(heading, rows)


def prose_table(outcomes):
    """MHA on prose by the share of copies."""
    heading = ('copied tokens', f'million tokens until a score > {FORMED}', 'best induction score', 'layer.head',
               'best previous-token score', 'layer.head', 'loss at repeated bigrams of plain prose',
               'elsewhere')  # fmt: skip
    rows = [(f'{o["share"]:.0%}', when([o]), f'{o["score"]:.3f}', places([o], 'best'), f'{o["previous"]:.3f}',
             places([o], 'best_previous'), f'{o["repeated"]:.3f}', f'{o["others"]:.3f}')
            for o in outcomes if o['share'] is not None]  # fmt: skip
    return report.markdown_table(heading, rows)


def rate_table(outcomes):
    """Every arm at every learning rate, on one seed."""
    heading = ('attention', 'learning rate', f'million tokens until a score > {FORMED}', 'best induction score',
               'best previous-token score', 'validation loss', 'at repeated bigrams')  # fmt: skip
    rows = [(arm, f'{rate_of(o):g}', when([o]), f'{o["score"]:.3f}', f'{o["previous"]:.3f}', f'{loss_of(o):.3f}',
             f'{o["repeated"]:.3f}')
            for arm, group in tuning(outcomes).items() for o in sorted(group, key=rate_of)]  # fmt: skip
    return report.markdown_table(heading, rows)


def tables(outcomes):
    """The text of RESULTS.md's tables."""
    share = outcomes[0]['repeated_share']
    parts = [
        ('Formation', formation_table(outcomes)),
        ('Paired by seed', paired_table(outcomes)),
        ('The best induction heads, mean-ablated: rise of the loss on validation text', ablation_table(outcomes)),
    ]
    if any(o['share'] is not None for o in outcomes):
        parts.append(('MHA on prose with copied spans', prose_table(outcomes)))
    if any(rate_of(o) != RATE for o in outcomes):
        parts.insert(0, (f'Every learning rate, seed {SEED}', rate_table(outcomes)))
    intro = ('Brackets are ranges over seeds. Losses are in nats per token, over 128 validation windows of 256 tokens; '
             f'in code {share:.0%} of positions repeat a bigram of their window.')  # fmt: skip
    return intro + '\n\n' + '\n'.join(f'**{title}**\n\n{table}' for title, table in parts)


# ---- pictures --------------------------------------------------------------------------------------------------------

PANELS = {
    'induction': 'best induction score',
    'previous': 'best previous-token score',
    'gain': 'what a repeated bigram saves (nats)',
}


def value(step, key):
    """A number of a curve."""
    return step['gain']['mean'] if key == 'gain' else step[key]


def draw_arms(outcomes):
    """Scores and the gain of repeated bigrams over tokens, on a log axis, and the score over the loss."""
    picture = Figure(figsize=(15, 4.6), layout='constrained')
    axes = picture.subplots(1, 4)
    for arm, group in by_arm(outcomes).items():
        color, line, mark = LOOKS[arm]
        tokens = [step['tokens'] / 1e6 for step in group[0]['curve']]
        for axis, key in zip(axes, PANELS, strict=False):
            curves = np.array([[value(step, key) for step in o['curve']] for o in group])
            axis.plot(tokens, curves.T, color=color, linestyle=line, linewidth=0.6, alpha=0.4)
            axis.plot(tokens, curves.mean(0), color=color, linestyle=line, marker=mark, markersize=3, label=arm)
        for number, o in enumerate(group):
            losses = [loss_of(dict(step, repeated_share=o['repeated_share'])) for step in o['curve']]
            axes[3].plot(losses, [step['induction'] for step in o['curve']], color=color, linestyle=line, marker=mark,
                         markersize=3, linewidth=1, label=None if number else arm)  # fmt: skip
    for axis, title in zip(axes, PANELS.values(), strict=False):
        axis.set(xscale='log', xlabel='million tokens', title=title)
        axis.set_xticks([0.1, 0.3, 1, 3], ['0.1', '0.3', '1', '3'])
        axis.minorticks_off()
    axes[3].set(xlabel='loss on validation text (nats per token)', title='best induction score at equal loss')
    axes[3].invert_xaxis()
    for axis in (axes[0], axes[1], axes[3]):
        axis.set_ylim(0, 1)
    axes[0].legend(fontsize=8)
    count = max(len(group) for group in by_arm(outcomes).values())
    of_seeds = f'; means of up to {count} seeds, each seed thin' if count > 1 else '; one seed'
    picture.suptitle(
        f'Induction heads form on source code: 4 layers, C = 128, RoPE, each at its best learning rate{of_seeds}',
        fontsize='medium',
    )
    return picture


def draw_prose(outcomes):
    """Best induction score over tokens by the share of copies in prose."""
    picture = Figure(figsize=(6.5, 4.4), layout='constrained')
    axis = picture.subplots()
    colors = ('#b8b8b8', '#8fb1da', '#4f83c4', '#0d1b3d')
    for o, color, mark in zip([o for o in outcomes if o['share'] is not None], colors, 'os^D', strict=False):
        axis.plot([step['tokens'] / 1e6 for step in o['curve']], [step['induction'] for step in o['curve']],
                  color=color, marker=mark, markersize=4, label=f'{o["share"]:.0%} copied')  # fmt: skip
    axis.set(xscale='log', ylim=(0, 1), xlabel='million tokens', ylabel='best induction score',
             title='MHA on prose, by the share of copied tokens\n4 layers, C = 128')  # fmt: skip
    axis.legend()
    return picture


# ---- train, measure, report ------------------------------------------------------------------------------------------

chosen = [arm.strip() for arm in arms.split(';')] if arms else list(ARMS) if full else list(ARMS)[:3:2]
if unknown := set(chosen) - set(ARMS):
    raise UserError(f'unknown arms: {"; ".join(sorted(unknown))}; choose from {"; ".join(ARMS)}')
iterations = max_iters or (5000 if full else 300)
grid = arguments.numbers(rates or (RATES if full else f'{RATE}'), 'rates')
arguments.check_folder(out_dir)
if figure:
    arguments.check_file(figure, 'figure')
recorded, recorded_prose = read_earlier()
if reuse:
    outcomes = read_study(reuse)['runs']
else:
    for name in filter(None, (dataset, prose)):
        TokenData(os.path.join(data_dir, name), 256)  # a missing one is an error now, not later
    plans = [named(arm, rate=rate) for rate in grid for arm in chosen]
    plans += [named('MHA', share=share) for share in SHARES] if prose else []
    outcomes = with_recorded(subprocesses.run_all(train_and_measure, plans, jobs))
    best = {arm: rate_of(group[0]) for arm, group in by_arm(outcomes).items()}
    plans = [named(arm, SEED + n, best[arm]) for n in range(1, seeds or (3 if full else 1)) for arm in chosen]
    outcomes = with_recorded(outcomes + subprocesses.run_all(train_and_measure, plans, jobs))
outcomes.sort(key=lambda o: (o['seed'], list(ARMS).index(o['arm']), rate_of(o), o['share'] or 0))
text = tables(outcomes)
errors.output(text)
os.makedirs(out_dir, exist_ok=True)
report.save_text(os.path.join(out_dir, 'text.md'), text)
path = figure or os.path.join(out_dir, 'text.png')
report.save_figure(path, draw_arms(outcomes))
if any(o['share'] is not None for o in outcomes):
    report.save_figure(os.path.splitext(path)[0] + '_prose.png', draw_prose(outcomes))
about = dict(dataset=dataset, prose=prose or recorded_prose, iterations=iterations)
report.save_json(os.path.splitext(path)[0] + '.json', dict(config=about, runs=report.plain(outcomes)))
