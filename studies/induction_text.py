"""
Induction heads on real text: MHA, MQA and MLA on the same batches of source code, and MHA on prose with copies in it.

$ python data/code/prepare.py --tokenizer=bpe --vocab_size=2048
$ python studies/induction_text.py                 # a short form: two arms, one seed, few iterations; minutes
$ python studies/induction_text.py --full=True     # every arm and seed: some two hours on two cores
$ python studies/induction_text.py --full=True --prose=imdb --figure=assets/induction_text.png
$ python studies/induction_text.py --reuse=assets/induction_text.json    # tables and pictures again, in seconds
$ python studies/induction_text.py --full=True --reuse=assets/induction_text.json --arms=MQA --seeds=5    # adds runs

1. Each arm is trained on `dataset` with config/train_code_cpu.py, on one seed at each of `rates`, and on the other
   seeds at the rate of its lowest validation loss. It is measured at many iterations: scores of heads on repeated
   random tokens, and losses on validation text where a bigram occurred before in the window, and elsewhere.
2. With --prose=DATASET, a text that rewards induction little: MHA on it as it is, and with a share of its tokens
   replaced by copies of what stood up to 200 tokens before. Does repetition make heads form?

Finished runs are kept: repeat the command to continue. Writes the tables, and beside the picture a .json with every
number. The published numbers were gathered by these commands, one after another, each with --full=True and
--reuse=FILE, the numbers so far:
$ python studies/induction_text.py --seeds=1 --rates=4e-3 --prose=imdb
$ python studies/induction_text.py --rates=2e-3,4e-3,8e-3 --arms="MHA;MLA, r=C/2"
$ python studies/induction_text.py --rates=4e-3,8e-3 --arms="MHA;MQA;MLA, r=C/2;MLA, r=C/4;MLA, r=C/2, R=3d/4"
$ python studies/induction_text.py --seeds=1 --rates=1.6e-2 --arms="MLA, r=C/2"
A run of 5000 iterations takes 8 to 13 minutes on one core, and measuring it two to three. Run it from the repository
root.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from core.cli.keys import begin

begin(__file__)  # before the slow imports

import os
import shutil

import numpy as np
from matplotlib.figure import Figure

from analysis import report, style
from analysis.bigrams import with_copies
from analysis.report import cells
from core.cli import arguments, files, subprocesses
from core.cli.errors import UserError
from core.text.dataset import TokenData
from studies.measure import best_heads, formed, measure, outputs, places, read_json, reading, save, sweep

# ----------------------------------------------------------------------------------------------------------------------
out_dir = 'out-induction-text'  # the runs
figure = ''  # the picture, with the numbers in a .json beside it; '': text.png in out_dir
table = ''  # a file for the tables; '': text.md in out_dir
full = False  # every arm and seed, 5000 iterations
dataset = 'code'
prose = ''  # a data set that rewards induction little, for part 2; '': no part 2
data_dir = 'data'
max_iters = 0  # 0: 5000, in the short form 300
rates = ''  # learning rates, separated by commas; '': 2e-3, 4e-3, 8e-3 and 1.6e-2, in the short form the config's, 4e-3
seeds = 0  # training seeds of each arm; 0: 3, in the short form 1
arms = ''  # labels of EVERY separated by semicolons; '': all, in the short form MHA and MLA, with `reuse` none
reuse = ''  # the .json of an earlier study: its runs stand in the tables and pictures too, and are not repeated
jobs = 0  # concurrent trainings with one thread each; 0: the cores that this process may use
exec(open(Path(__file__).resolve().parents[1] / 'configurator.py', encoding='utf-8').read())
# ----------------------------------------------------------------------------------------------------------------------

# Every model and its keys of train.py. MLA's rotated dimensions are cut out of the head (32), as in version 0.1.0.
HALF = dict(attention='mla', n_latent=64, n_nope=16, n_rope=16)
ARMS = {
    'MHA': {},
    'MQA': dict(n_kv_head=1),
    'MLA, r=C/2': HALF,
    'MLA, r=C/4': HALF | dict(n_latent=32),
    'MLA, r=C/2, latent norm': HALF | dict(latent_norm=True),
    'MLA, r=C/2, R=3d/4': HALF | dict(n_nope=8, n_rope=24),
}
C, SEED = 128, 1337  # n_embd of config/train_code_cpu.py, and the first seed
SHARES = (0.0, 0.1, 0.3)  # of tokens that are copies, in part 2
RATE, RATES = 4e-3, '2e-3,4e-3,8e-3,1.6e-2'  # the config's learning rate, and the grid of the full form
FORMED = report.CUSTOMARY  # an induction head has formed when the best induction score exceeds this
UNTIL = f'million tokens until a score > {FORMED}'
TOKENS = 4 * 256  # per iteration, in the config
STEPS = (100, 200, 300, 400, 600, 800, *range(1000, 3000, 250), 3000, 3500, 4000, 4500, 6000, 8000, 12000, 16000, 24000)
iterations = max_iters or (5000 if full else 300)


# ---- runs ------------------------------------------------------------------------------------------------------------


def mixed(share):
    """The name of `prose` with this share of copies, a data set in out_dir/data that is made if it is missing."""
    name = f'{os.path.basename(prose)}-{round(100 * share)}'
    folder = os.path.join(out_dir, 'data', name)
    if not os.path.exists(os.path.join(folder, 'meta.json')):
        os.makedirs(folder, exist_ok=True)
        source = os.path.join(data_dir, prose)
        meta = read_json(source, 'meta.json')
        train = np.fromfile(os.path.join(source, 'train.bin'), dtype=meta['dtype'])
        with_copies(train, share).tofile(os.path.join(folder, 'train.bin'))
        shutil.copy(os.path.join(source, 'val.bin'), folder)  # as it is, so that losses can be compared
        meta = {key: value for key, value in meta.items() if key not in ('sha256', 'documents')}
        meta['source'] += f', {share:.0%} of its training tokens copied' if share else ''
        files.write_json(os.path.join(folder, 'meta.json'), meta)
    return name


def planned(arm, seed=SEED, rate=RATE, share=None):
    """A run: a dict of name, arm, share of copies (None: of code), rate, seed."""
    corpus = 'code' if share is None else f'prose{round(100 * share)}'
    slug = ''.join(letter if letter.isalnum() else '-' for letter in arm.lower().replace(', ', '-'))
    name = f'{corpus}-{slug}-s{seed}' + f'-lr{rate:g}' * (rate != RATE)
    return dict(name=name, arm=arm, share=share, rate=rate, seed=seed)


def do(plans, recorded):
    """The outcomes of runs that are planned, without those that diverged, and of the recorded ones."""
    known = {o['name'] for o in recorded}
    made = subprocesses.run_all(train_and_measure, [run for run in plans if run['name'] not in known], jobs)
    return recorded + [o for o in made if o]


def train_and_measure(run):
    """Train and measure one run, as far as that isn't done yet; returns its outcome, None if it diverged."""
    # runs of other forms aren't continued: their schedule was another
    folder = os.path.join(out_dir, f'{iterations}', run['name'])
    steps = [step for step in STEPS if step < iterations] + [iterations]
    keys = dict(dataset=dataset, data_dir=data_dir)
    if run['share'] is not None:
        keys = dict(dataset=mixed(run['share']), data_dir=os.path.join(out_dir, 'data'))
    if not os.path.exists(os.path.join(folder, f'ckpt_{steps[-1]:06}.pt')):
        keys |= ARMS[run['arm']]
        keys |= dict(out_dir=folder, resume='auto', seed=run['seed'], checkpoint_interval=500)
        keys |= dict(learning_rate=run['rate'], min_lr=run['rate'] / 10, keep_checkpoints=','.join(map(str, steps)))
        keys |= dict(max_iters=iterations, lr_decay_iters=iterations, eval_interval=iterations)
        keys |= dict(threads=1, device='cpu', dtype='float32')
        if not subprocesses.converges('train.py', ['config/train_code_cpu.py', keys], folder):
            return None  # the rate is too high for this arm
    found = measure(folder, sweep=folder, text_windows=128, device='cpu', data_dir=keys['data_dir'])
    return dict(run, **outcome(found, sweep(folder)))


def outcome(found, steps):
    """The numbers that tables and pictures show of a run: a dict."""
    on_text = {step['heads']: step for step in found['ablation']['on_text']}
    curve = [
        dict(
            tokens=step['iteration'] * TOKENS,
            induction=step['induction']['mean'],
            previous=step['previous_token']['mean'],
            repeated=step['bigrams']['repeated']['mean'],
            others=step['bigrams']['others']['mean'],
            gain=step['bigram_gain'],
        )
        for step in steps
    ]
    return best_heads(found) | dict(
        curve=curve,
        formed=formed([(step['tokens'], step['induction']) for step in curve], FORMED),
        repeated_share=found['bigrams']['share'],
        repeated=found['bigrams']['repeated']['mean'],
        others=found['bigrams']['others']['mean'],
        heads=int(np.sum(found['called'])),
        ablation={str(k): on_text[k] for k in (1, 2, 4)},
        parameters=found['parameters'],
    )


# ---- tables ----------------------------------------------------------------------------------------------------------


def when(group):
    """At how many millions of tokens heads formed: median [range], and in how many runs."""
    return report.when([o['formed'] and o['formed'] / 1e6 for o in group], '.2f')


def loss_of(o):
    """The validation loss of a run, over all positions."""
    return o['repeated_share'] * o['repeated'] + (1 - o['repeated_share']) * o['others']


def tuning(outcomes):
    """{arm: its runs on the seed that has every rate}."""
    return report.grouped((o for o in outcomes if o['share'] is None and o['seed'] == SEED), lambda o: o['arm'])


def by_arm(outcomes):
    """{arm: its runs of part 1 at its best rate}."""
    best = {arm: min(group, key=loss_of)['rate'] for arm, group in tuning(outcomes).items()}
    return {arm: [o for o in outcomes if (o['arm'], o['share'], o['rate']) == (arm, None, best[arm])] for arm in best}


def formation_table(outcomes):
    """Formation, final scores and losses of every arm."""
    heading = ['attention', 'learning rate', UNTIL, 'best induction score', 'layer.head', 'induction heads of 16']
    heading += ['copying', 'best previous-token score', 'layer.head', 'loss at repeated bigrams', 'elsewhere']
    rows = []
    for arm, group in by_arm(outcomes).items():
        row = [arm, f'{group[0]["rate"]:g}', when(group), *cells(group, 'score'), places(group, 'best')]
        row += [', '.join(str(o['heads']) for o in group), *cells(group, 'copying', 'previous')]
        rows.append([*row, places(group, 'best_previous'), *cells(group, 'repeated', 'others')])
    return report.markdown_table(heading, rows)


def paired_table(outcomes):
    """Every arm minus MHA of the same seed, which saw the same batches, both at their best rate."""
    groups, keys, rows = by_arm(outcomes), ('score', 'repeated', 'others'), []
    mha = {o['seed']: o for o in groups.get('MHA', [])}
    for arm, group in groups.items():
        pairs = [(o, mha[o['seed']]) for o in group if arm != 'MHA' and o['seed'] in mha]
        if pairs:
            rows.append((arm, *(report.spread((o[key] - other[key] for o, other in pairs), '+.3f') for key in keys)))
    return report.markdown_table(('minus MHA', 'best induction score', 'loss at repeated bigrams', 'elsewhere'), rows)


def ablation_table(outcomes):
    """What the best induction heads are worth on text."""
    heading = [f'top {k}: at repeated bigrams, elsewhere' for k in (1, 2, 4)] + ['2 random others of these layers']
    rows = []
    for arm, group in by_arm(outcomes).items():
        parts = [[[o['ablation'][k][name]['mean'] for o in group] for name in ('repeated', 'others')] for k in '124']
        parts.append([[o['ablation']['2'][f'control_{name}'] for o in group] for name in ('repeated', 'others')])
        rows.append((arm, *(', '.join(report.spread(values, '+.3f') for values in pair) for pair in parts)))
    return report.markdown_table(('attention', *heading), rows)


def prose_table(outcomes):
    """Runs of MHA on prose by the share of copies."""
    heading = ['copied tokens', UNTIL, 'best induction score', 'layer.head', 'best previous-token score', 'layer.head']
    rows = []
    for o in outcomes:
        scores = [*cells([o], 'score'), places([o], 'best'), *cells([o], 'previous'), places([o], 'best_previous')]
        rows.append((f'{o["share"]:.0%}', when([o]), *scores, *cells([o], 'repeated', 'others')))
    return report.markdown_table([*heading, 'loss at repeated bigrams of plain prose', 'elsewhere'], rows)


def rate_table(outcomes):
    """Every arm at every learning rate, on one seed."""
    heading = ['attention', 'learning rate', UNTIL, 'best induction score', 'best previous-token score']
    rows = []
    for arm, group in tuning(outcomes).items():
        for o in sorted(group, key=lambda o: o['rate']):
            row = [arm, f'{o["rate"]:g}', when([o]), *cells([o], 'score', 'previous')]
            rows.append([*row, f'{loss_of(o):.3f}', *cells([o], 'repeated')])
    return report.markdown_table([*heading, 'validation loss', 'at repeated bigrams'], rows)


def tables(outcomes):
    """The text of all tables."""
    prose, parts = [o for o in outcomes if o['share'] is not None], {}
    if any(o['rate'] != RATE for o in outcomes):
        parts[f'Every learning rate, seed {SEED}'] = rate_table(outcomes)
    parts |= {
        'Formation': formation_table(outcomes),
        'Paired by seed': paired_table(outcomes),
        'The best induction heads, mean-ablated: rise of the loss on validation text': ablation_table(outcomes),
    }
    if prose:
        parts['MHA on prose with copied spans'] = prose_table(prose)
    intro = (
        'Brackets are ranges over seeds. Losses are in nats per token, over 128 validation windows of 256 tokens; in '
        f'code {outcomes[0]["repeated_share"]:.0%} of positions repeat a bigram of their window.'
    )
    return intro + '\n\n' + '\n'.join(f'**{title}**\n\n{table}' for title, table in parts.items())


# ---- picture ---------------------------------------------------------------------------------------------------------

PANELS = {
    'induction': 'best induction\nscore',
    'previous': 'best previous-\ntoken score',
    'gain': 'a repeated bigram\nsaves (nats)',
}


def draw_arms(outcomes):
    """Scores and the gain of repeated bigrams over tokens: a column per model, a line per run at its best rate."""
    groups = by_arm(outcomes)
    figure = Figure(figsize=(style.WIDTH, 5.2))
    axes = figure.subplots(len(PANELS), len(groups), sharex=True, sharey='row', squeeze=False)
    for column, (arm, group) in zip(axes.T, groups.items(), strict=True):
        look = style.look(arm) | dict(marker='', linestyle='-', linewidth=1.2)
        for run in group:
            tokens = [step['tokens'] / 1e6 for step in run['curve']]
            for axis, key in zip(column, PANELS, strict=True):
                values = [step['gain']['mean'] if key == 'gain' else step[key] for step in run['curve']]
                axis.plot(tokens, values, **look)
        column[0].axhline(FORMED, color=style.GREY, linewidth=0.6)
        column[0].set(title=arm.replace(', r', ' r').replace(', ', '\n'), ylim=(0, 1))
        column[1].set(ylim=(0, 1))
        column[2].set(xscale='log')
        column[2].set_xticks([0.1, 1], ['0.1', '1'])
        column[2].minorticks_off()
    for axis, title in zip(axes[:, 0], PANELS.values(), strict=True):
        axis.set_ylabel(title)
    figure.supxlabel('million tokens (a line is a run at the best learning rate that was tried)', fontsize=9)
    formed = sum(o['formed'] is not None for group in groups.values() for o in group)
    figure.suptitle(f'Induction heads form in {formed} of {sum(map(len, groups.values()))} runs')
    return figure


# ---- train, measure, report ------------------------------------------------------------------------------------------

chosen = list(ARMS) if full else ['MHA', 'MLA, r=C/2']
if arms or reuse:
    chosen = [name.strip() for name in arms.split(';')] if arms else []
if unknown := set(chosen) - set(ARMS):
    raise UserError(f'unknown arms: {"; ".join(sorted(unknown))}; choose from {"; ".join(ARMS)}')
grid = arguments.numbers(rates or (RATES if full else f'{RATE}'), 'rates')
paths = outputs(config, 'text')
about, outcomes = dict(dataset=dataset, prose=prose, iterations=iterations), []
if reuse:
    with reading(reuse):
        numbers = read_json(reuse)
        outcomes = [dict(r, rate=r.get('rate', RATE)) for r in numbers['runs']]  # there once was no grid
        tables(outcomes)  # has all that they show
        then = numbers.get('config', about)
    about = about | dict(prose=prose or then['prose']) if chosen else then
    for o in outcomes if chosen else []:
        of = 'dataset' if o['share'] is None else 'prose'
        wanted, found = (iterations, about[of]), (o['curve'][-1]['tokens'] // TOKENS, then[of])
        if wanted != found:
            raise UserError(f'{reuse} has {found[0]} iterations on {found[1]}, not {wanted[0]} on {wanted[1]}')
if chosen:
    for name in filter(None, (dataset, prose)):
        TokenData(os.path.join(data_dir, name), 256)  # a missing one is an error now, not later
    plans = [planned(arm, rate=rate) for rate in grid for arm in chosen]
    plans += [planned('MHA', share=share) for share in SHARES] if prose else []
    outcomes = do(plans, outcomes)
    best = {arm: group[0]['rate'] for arm, group in by_arm(outcomes).items()}
    more = range(SEED + 1, SEED + (seeds or (3 if full else 1)))
    outcomes = do([planned(arm, seed, best[arm]) for seed in more for arm in chosen], outcomes)
outcomes.sort(key=lambda o: (o['seed'], list(ARMS).index(o['arm']), o['rate'], o['share'] or 0))
text = tables(outcomes)
save(paths, text, draw_arms(outcomes), dict(config=about, runs=report.plain(outcomes)) if chosen else None)
