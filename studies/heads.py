"""
What becomes of a model's heads when its attention is converted: scores, ablations and losses, before and after.

$ python studies/smollm2.py --full=True      # leaves SmolLM2's conversions
$ python studies/heads.py --models=data/smollm2,out-smollm2/published-1-2 --labels="SmolLM2;published, 1/2"
$ python studies/heads.py --reuse=assets/smollm2_heads.json --figure=assets/smollm2_heads.png    # again, in seconds

The first model is the one that was converted into the others. On random tokens that repeat, every head of every model
gets a score for induction, for attention to the previous token and for attention to the first position (sink). The
first model's heads with a score above STRONG are followed through the others; they are chosen on one half of the
sequences and scored on the other. Then its best induction heads are mean-ablated together, and in its best heads a
part of the attention logit is replaced: the rotated dimensions, or the others. The loss at bigrams that repeat and
elsewhere is measured on `texts`.

Writes tables, a picture and, beside it, a .json with every number. Run it from the repository root.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from core.cli.keys import begin

begin(__file__)  # before the slow imports

import os

import numpy as np
from matplotlib.figure import Figure

from analysis import forward, induction, report, stats, style
from analysis.rotation import PARTS, REPLACEMENTS, replace_logits
from core.cli import arguments, errors, machine
from core.cli.errors import UserError
from core.runs import checkpoint as checkpoints
from core.runs.models import build_model
from core.text.dataset import TokenData
from studies.measure import outputs, read_json, reading, repeated, save

# ----------------------------------------------------------------------------------------------------------------------
models = ''  # checkpoints, separated by commas, the original first
labels = ''  # their names, separated by semicolons; '': their folders
out_dir = 'out-heads'
figure = ''  # the picture, with the numbers in a .json beside it; '': heads.png in out_dir
table = ''  # a file for the tables; '': heads.md in out_dir
reuse = ''  # the .json of an earlier study, in place of models
texts = 'smollm2-python,smollm2-reviews'  # data sets in the models' tokens; '': none
data_dir = 'data'
context = 256  # tokens of a window of text
windows = 24  # of each text
sequences = 64  # random sequences; half of them choose heads, the others are reported
length = 50  # distinct tokens in the repeated block
few = 16  # sequences for ablations and replaced logits
best = 5  # heads whose logits are replaced
drawn = 4  # models in the picture: the first so many
seed = 1
threads = 0
exec(open(Path(__file__).resolve().parents[1] / 'configurator.py', encoding='utf-8').read())
# ----------------------------------------------------------------------------------------------------------------------

STRONG = 0.2
SCORES = {'induction': 'induction', 'previous_token': 'previous token', 'sink': 'sink'}
COUNTS = (1, 4, 16)  # induction heads ablated together


def measured(saved, chosen):
    """All measurements of a checkpoint's model: a dict. chosen: {score: heads by rank} of the first, which fills it."""
    model = build_model(saved).eval()
    repeats = repeated(model, saved['tokenizer'], sequences, length, seed)
    half = len(repeats) // 2
    selecting = induction.head_scores(model, repeats[:half], losses=False)
    reported = induction.head_scores(model, repeats[half:])
    for name in SCORES:
        means = selecting[name].mean(0)
        chosen.setdefault(name, [(at, float(means[at])) for at in induction.ranked(means)])
    loss = reported['repeat_loss']
    out = dict(scores={name: reported[name].mean(0) for name in SCORES})
    out['repeat_loss'] = dict(mean=loss.mean(), stderr=stats.standard_error(loss))
    ranking = [at for at, _ in chosen['induction']]
    counts = [k for k in COUNTS if k <= max(1, len(ranking) // 2)]
    fewer = repeats[half : half + few]  # of those that didn't choose the heads
    out['ablated'] = induction.ablate_cumulatively(model, fewer, ranking, counts, seed=seed)
    out['replaced'] = {
        name: [dict(at=at, **replace_logits(model, fewer, at, name)) for at, _ in chosen[name][:best]]
        for name in ('induction', 'previous_token')
        if model.config.pos == 'rope'
    }
    out['text'] = {}
    for name in arguments.names(texts, 'texts'):
        data = TokenData(os.path.join(data_dir, name), context)
        tokens, _ = data.windows('val', data.eval_windows('val', windows))
        out['text'][name] = induction.bigram_losses(forward.text_losses(model, tokens), tokens)
    return out


# ---- results ---------------------------------------------------------------------------------------------------------


def strong(numbers, name):
    """The first model's heads with a score above STRONG."""
    return [tuple(at) for at, score in numbers['chosen'][name] if score > STRONG]


def followed(numbers, found, name):
    """Two cells: what the first model's strong heads score in a model on average, how many are above STRONG there."""
    scores = [found['scores'][name][layer][head] for layer, head in strong(numbers, name)]
    return (f'{np.mean(scores):.3f}', sum(score > STRONG for score in scores)) if scores else ('', '')


def head_table(numbers):
    """Losses, and what is left of the first model's heads."""
    heading = ['model', 'loss on repeats']
    for name, said in SCORES.items():
        heading += [f'{said}: mean of {len(strong(numbers, name))} heads', f'above {STRONG:g}']
    heading += ['sink: mean of all']
    rows = []
    for label, found in numbers['models'].items():
        loss = found['repeat_loss']
        half = stats.half_width(numbers['setting']['sequences'] // 2) * loss['stderr']
        cells = [f'{loss["mean"]:.3f} ± {half:.3f}']
        for name in SCORES:
            cells += followed(numbers, found, name)
        rows.append((label, *cells, f'{np.mean(found["scores"]["sink"]):.3f}'))
    return report.markdown_table(heading, rows)


def ablation_table(numbers):
    """The rise of the loss on repeats without the first model's best induction heads, and without others."""
    first = next(iter(numbers['models'].values()))
    heading = ['model', *(f'{row["heads"]} best, as many others' for row in first['ablated'])]
    rows = []
    for label, found in numbers['models'].items():
        rows.append((label, *(f'{row["rise"]:+.3f}, {row["control_rise"]:+.3f}' for row in found['ablated'])))
    return report.markdown_table(heading, rows)


def text_table(numbers):
    """The loss at bigrams that occurred before in the window, and elsewhere, for each text."""
    heading = ['model', 'text', 'repeated bigrams', 'elsewhere', 'gain']
    rows = []
    for label, found in numbers['models'].items():
        for name, losses in found['text'].items():
            rows.append((label, name, *(report.with_interval(losses[key]) for key in ('repeated', 'others', 'gain'))))
    return report.markdown_table(heading, rows)


def part_table(numbers):
    """Scores of the first model's best heads, with a part of their logits replaced."""
    columns = [(part, how) for part in PARTS for how in REPLACEMENTS if (part, how) != ('content', 'not rotated')]
    rows = []
    for label, found in numbers['models'].items():
        for name, heads in found['replaced'].items():
            scores = [found['scores'][name][layer][head] for layer, head in (row['at'] for row in heads)]
            cells = [
                f'{np.mean([row[part][how]["score"] for row in heads]):.3f}' if part in heads[0] else ''
                for part, how in columns
            ]
            rows.append((label, SCORES[name], f'{np.mean(scores):.3f}', *cells))
    return report.markdown_table(['model', 'score', 'as it is', *(f'{part}: {how}' for part, how in columns)], rows)


def draw(numbers):
    """Scores by layer and head, a column per model."""
    found = list(numbers['models'].items())[:drawn]
    scores = [name for name in SCORES if name != 'sink']
    figure = Figure(figsize=(style.WIDTH, 6.5))
    panels = figure.subplots(len(scores), len(found), sharex=True, sharey=True, squeeze=False)
    for row, name in zip(panels, scores, strict=True):
        for axes, (label, model) in zip(row, found, strict=True):
            image = axes.imshow(np.array(model['scores'][name]), vmin=0, vmax=1, cmap='viridis', aspect='auto')
            axes.grid(False)
            axes.set_xticks(range(0, len(model['scores'][name][0]), 2))
            axes.set_title(f'{label}\n{SCORES[name]}', fontsize=9)
    figure.supxlabel('head')
    figure.supylabel('layer')
    figure.colorbar(image, ax=panels, shrink=0.6, label='score: mean attention to the place that it asks for')
    figure.suptitle('Every head of every layer, before and after the conversion')
    return figure


# ---- measure, report -------------------------------------------------------------------------------------------------

paths = outputs(config, 'heads')
if reuse:
    with reading(reuse):
        numbers = read_json(reuse)
        head_table(numbers)
else:
    sources = arguments.names(models, 'models')
    if not sources:
        raise UserError('nothing to measure: name checkpoints with --models=data/smollm2,out-smollm2/published-1-2')
    named = [name.strip() for name in labels.split(';')] if labels else [Path(source).name for source in sources]
    if not len(sources) == len(named) == len(set(named)):
        raise UserError(f'labels must give each of the {len(sources)} models a name of its own, separated by ;')
    machine.set_threads(threads)
    chosen, found = {}, {}
    for label, source in zip(named, sources, strict=True):
        found[label] = measured(checkpoints.load(source), chosen)
        errors.notice(f'{label} is done')
    setting = dict(models=sources, sequences=sequences, length=length, windows=windows, context=context, few=few)
    numbers = report.plain(dict(setting=setting, chosen=chosen, models=found))
setting = numbers['setting']
parts = [
    f'Scores and losses on {setting["sequences"] // 2} sequences, two copies of {setting["length"]} random tokens; '
    f'heads chosen on as many others. ± and brackets: 95 % intervals over sequences, or over {setting["windows"]} '
    f'windows of {setting["context"]} tokens.',
    head_table(numbers),
    'Rise of the loss on repeats without the best induction heads of the first model, in nats, and without as many '
    'random heads of the same layers:',
    ablation_table(numbers),
]
if any(found['text'] for found in numbers['models'].values()):
    parts += ['Loss on text, in nats, at bigrams that occurred before in the window:', text_table(numbers)]
if any(found['replaced'] for found in numbers['models'].values()):
    parts += ["Mean score of the first model's best heads with a part of the logit replaced:", part_table(numbers)]
text = '\n\n'.join(part.strip('\n') for part in parts) + '\n'
save(paths, text, draw(numbers), None if reuse else numbers)
