"""
What does a bit of the cache buy? MHA, GQA, MQA and MLA with what they cache in 8, 6, 4, 3 and 2 bits per number.

$ python studies/bits.py --sources=out-shakespeare-cpu,out-shakespeare-cpu-mla
$ python studies/bits.py --sources=$(echo out-contest/code-*/*_s300? | tr ' ' ,)     # final runs of studies/contest.py
$ python studies/bits.py --sources=data/smollm2 --dataset=smollm2-python --context=256 --windows=24
$ python studies/bits.py --reuse=assets/bits.json --figure=assets/bits.png   # table and picture again, in seconds

Each model's full pass attends to rounded latents, in each basis of core/convert/bits.py, or to rounded keys and values,
as they are and mixed by a Hadamard matrix (arXiv:2404.00456), on the same windows of its own data. 'noise' is the
control: Gaussian noise as large in each vector as the rounding error of 'own'. 'by component' gives each principal
component bits of its own (reverse water-filling) by its size on training text. Checkpoints whose names differ in a
last _s1, _s2 are seeds of one model.

The heads are the best induction head and the best previous-token head in 32 bits, on random tokens that repeat.
Finished measurements are kept: repeat the command to continue. Writes tables, a picture and, beside it, a .json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from core.cli.keys import begin

begin(__file__)  # before the slow imports

import copy
import functools
import hashlib
import os
import re

import numpy as np
import torch
from matplotlib.figure import Figure

from analysis import induction, report, stats, style
from core.cli import arguments, files, subprocesses
from core.cli.errors import UserError
from core.convert.bits import BASES, latent_statistics, rotate, round_cached, rounded_mixed
from core.convert.factorize import training_text
from core.runs import checkpoint as checkpoints
from core.runs import evaluation
from core.runs.models import attention_of, build_model, label_of
from core.text.dataset import TokenData
from ops.packed import Form
from studies.measure import outputs, read_json, reading, repeated, save

# ----------------------------------------------------------------------------------------------------------------------
sources = ''  # checkpoints, separated by commas
out_dir = 'out-bits'
figure = ''  # the picture, with the numbers in a .json beside it; '': bits.png in out_dir
table = ''  # a file for the tables; '': bits.md in out_dir
reuse = ''  # the .json of an earlier study, in place of sources
data_dir = 'data'
dataset = ''  # a data set in the models' tokens; '': each model's own
context = 0  # tokens of a window; 0: what each model was trained for
windows = 400  # of the validation split, evenly spaced
jobs = 0  # checkpoints measured at a time, with one thread each; 0: the cores that this process may use
exec(open(Path(__file__).resolve().parents[1] / 'configurator.py', encoding='utf-8').read())
# ----------------------------------------------------------------------------------------------------------------------

BITS = (8, 6, 4, 3, 2)


# ---- one model -------------------------------------------------------------------------------------------------------


def item(source):
    """A checkpoint that is to be measured, and where its numbers go."""
    slug = os.path.basename(os.path.normpath(source))
    unique = hashlib.sha256(repr((os.path.abspath(source), dataset, context)).encode()).hexdigest()[:8]
    return dict(name=source, result=os.path.join(out_dir, f'{slug}-{unique}-{windows}.json'))


def measure(item):
    """Measure a checkpoint, unless its numbers are there already: a dict."""
    ckpt = checkpoints.find(item['name'])
    if not subprocesses.is_current(item['result'], ckpt):
        os.makedirs(out_dir, exist_ok=True)
        files.write_json(item['result'], report.plain(measured(ckpt)))
    found = read_json(item['result'])
    return dict(found, name=item['name'], label=found['attention'])


def told_apart(runs):
    """The runs, labelled by folder where two of one attention differ in more than the seed that ends a name."""
    for run in runs:
        alike = {folder_of(other['name']) for other in runs if other['attention'] == run['attention']}
        if len(alike) > 1:
            one_name = len({os.path.basename(folder) for folder in alike}) < len(alike)
            folder = folder_of(run['name'])
            run['label'] = f'{run["attention"]}: {folder if one_name else os.path.basename(folder)}'
    return runs


def folder_of(source):
    """A source's folder without the seed that ends its name: the runs that differ in the seed alone share it."""
    return re.sub(r'_s\d+$', '', os.path.normpath(source).removesuffix('ckpt.pt').rstrip('/'))


def measured(ckpt):
    """The loss of the model in a checkpoint, its rise under each rounding, and what becomes of its heads: a dict."""
    saved = checkpoints.load(ckpt)
    model = build_model(saved).eval()
    if not (name := dataset or saved['config'].get('dataset', '')):
        raise UserError(f'{ckpt} names no data set; choose one with --dataset=NAME')
    data = TokenData(Path(data_dir, name), context or model.config.block_size)
    text = list(training_text(data, 64, 32))
    exact = evaluation.window_losses(model, data, 'val', windows, batch_size=32)
    numbers = sum(t.numel() for layer in model.init_cache(1, 1).layers for t in layer)
    rows = []
    for basis, bits, rounded, size in roundings(model, text):
        losses = evaluation.window_losses(rounded, data, 'val', windows, batch_size=32)
        rise, error = evaluation.mean_and_stderr(losses - exact)
        rows.append(dict(basis=basis, bits=bits, bytes=size, rise=rise, rise_stderr=error))
    found = dict(attention=label_of(model.config), rope=model.config.pos == 'rope', val_loss=float(exact.mean()))
    share = getattr(model.config, 'n_latent', 0) / model.config.n_embd
    return dict(found, share=share, numbers=numbers, corpus=data.corpus, rows=rows, heads=heads(model, saved))


def roundings(model, text):
    """(basis, bits, the model whose full pass rounds so, its exact cache bytes per token) of all that is measured."""
    latents, bases = attention_of(model) == 'mla', {'own': model, 'hadamard': model}
    if latents:
        for name in BASES[:1] if model.config.latent_norm else BASES:  # a norm admits orthogonal ones alone
            bases[name] = rotate(model, name, latent_statistics(model, text))
    vectors = [t for layer in model.init_cache(1, 1).layers for t in layer]
    wide = getattr(model.transformer.h[0].attn, 'n_rope', 0)
    for name, changed in bases.items():
        for bits in BITS:
            for group in (0, 32) if vectors[0].size(-1) - wide > 32 else (0,):
                forms = [Form(t.size(-1), bits, group, wide) for t in vectors]
                size = sum(form.bytes * t.numel() // form.size for form, t in zip(forms, vectors, strict=True))
                mixed = not latents and name == 'hadamard'
                rounded = functools.partial(rounded_mixed, forms[0]) if mixed else forms[0].rounded
                yield name + ', groups of 32' * bool(group), bits, rounding(changed, rounded), size
                if not group:
                    plain = size
            if name == 'own':
                yield 'noise', bits, rounding(changed, noisy(Form(vectors[0].size(-1), bits, 0, wide))), plain
            if name == 'components':
                found = latent_statistics(changed, text)
                sizes = [s.moments(centred=False)[1].diag().sqrt().float() for s in found]
                each = [shared_bits(s, bits * len(s)) for s in sizes]
                size = sum(-(-int(b.sum()) // 8) + 2 + 2 * wide for b in each)
                by = [by_component(s, b) for s, b in zip(sizes, each, strict=True)]
                rounded = round_cached(copy.deepcopy(changed), lambda layer, x, by=by: by[layer](x))
                yield 'by component', bits, rounded, size


def rounding(model, function):
    """A copy of the model whose full pass attends to function(x) of what is cached."""
    return round_cached(copy.deepcopy(model), lambda layer, x: function(x))


def noisy(form):
    """A function that adds Gaussian noise to each vector, as large as a form's rounding error in it."""
    generator = torch.Generator().manual_seed(0)

    def add(x):
        rounded, few = form.rounded(x), form.few  # a rotated key stays as it is stored
        size = (rounded - x)[..., :few].square().mean(-1, keepdim=True).sqrt()
        noisy = x[..., :few] + size * torch.randn(x[..., :few].shape, generator=generator)
        return torch.cat((noisy, rounded[..., few:]), dim=-1)

    return add


def shared_bits(sizes, total):
    """`total` bits, at most 8 each, to components of these sizes (r,): always one to the largest remaining error."""
    bits = torch.zeros(len(sizes), dtype=torch.int64)
    for _ in range(total):
        bits[torch.where(bits < 8, sizes * 0.5**bits, -1.0).argmax()] += 1
    return bits


def by_component(sizes, bits):
    """A function that rounds each component by bits of its own, with one scale per token in units of their sizes."""
    half, kept = 2.0 ** (bits - 1), bits > 0

    def rounded(x):
        few, wide = x[..., : len(sizes)] / sizes, x[..., len(sizes) :].bfloat16().to(x.dtype)
        scale = (few * kept).abs().amax(-1, keepdim=True).bfloat16().to(x.dtype)
        levels = (few / scale * half).floor().clamp(-half, half - 1) + 0.5
        return torch.cat((levels / half * scale * sizes * kept, wide), dim=-1)

    return rounded


@torch.no_grad()
def heads(model, saved):
    """Scores of the best induction and previous-token heads, and the loss on repeated tokens, by bits; 32: exact."""
    repeats = repeated(model, saved['tokenizer'], 32, 50, seed=1)
    vector, wide = model.init_cache(1, 1).layers[0][0].size(-1), getattr(model.transformer.h[0].attn, 'n_rope', 0)
    found, best = {}, {}
    for bits in (32, *BITS):
        form = Form(vector, bits, 0, wide)
        scores = induction.head_scores(model if bits == 32 else rounding(model, form.rounded), repeats)
        for name in ('induction', 'previous_token'):
            values = scores[name].mean(0)
            best.setdefault(name, np.unravel_index(values.argmax(), values.shape))
            found.setdefault(name, {})[str(bits)] = float(values[best[name]])
        found.setdefault('repeat_loss', {})[str(bits)] = float(scores['repeat_loss'].mean())
    return found


# ---- results ---------------------------------------------------------------------------------------------------------


def groups():
    """{label: the runs of all seeds}."""
    return report.grouped(runs, lambda run: run['label'])


def values(group, basis, bits, key='rise'):
    """A number of each run's row; [] where the runs have no such row."""
    return [row[key] for run in group for row in run['rows'] if (row['basis'], row['bits']) == (basis, bits)]


def shown_rise(group, basis, bits):
    """The rise by seed, or of a single run with its 95 % interval over windows."""
    rises = values(group, basis, bits)
    if len(rises) > 1:
        return report.spread(rises, '+.4f')
    return f'{rises[0]:+.4f} ± {stats.half_width(then) * values(group, basis, bits, "rise_stderr")[0]:.4f}'


def rise_table(bases):
    """The rise of the loss by model, basis and bits; `bases`: those that are shown."""
    rows = []
    for label, group in groups().items():
        for basis in bases:
            if values(group, basis, 8):
                cells = [shown_rise(group, basis, bits) for bits in BITS]
                rows.append((label, 2 * group[0]['numbers'], basis, values(group, basis, 4, 'bytes')[0], *cells))
    heading = ('model', 'bytes per token in 16 bits', 'basis', 'in 4 bits', *(f'{bits} bits' for bits in BITS))
    return report.markdown_table(heading, rows)


def best_table():
    """For each number of bytes, doubled from row to row, the choice of model, basis and bits with the lowest loss."""
    choices = []
    for label, group in groups().items():
        exact = np.array([run['val_loss'] for run in group])
        choices.append((2 * group[0]['numbers'], exact.mean(), label, 'as it is', 16))
        for basis in dict.fromkeys(row['basis'] for row in group[0]['rows']):
            for bits in BITS if basis != 'noise' else ():
                size = values(group, basis, bits, 'bytes')[0]
                choices.append((size, (exact + values(group, basis, bits)).mean(), label, basis, bits))
    rows, budget = [], 64
    while budget < 2 * max(size for size, *_ in choices):
        within = [choice for choice in choices if choice[0] <= budget]
        if within:
            size, loss, *what = min(within, key=lambda choice: choice[1])
            rows.append((budget, *what, size, f'{loss:.4f}'))
        budget *= 2
    return report.markdown_table(('bytes per token', 'model', 'basis', 'bits', 'exact bytes', 'val loss'), rows)


def head_table():
    """What becomes of heads."""
    rows = []
    for label, group in groups().items():
        for name in ('induction', 'previous_token', 'repeat_loss'):
            cells = [report.spread([run['heads'][name][str(b)] for run in group], '.3f') for b in (32, *BITS)]
            rows.append((label, name.replace('_', ' '), *cells))
    return report.markdown_table(('model', 'mean over sequences', '32 bits', *(f'{b} bits' for b in BITS)), rows)


def best_basis(group):
    """The basis, and scales for all or for 32 numbers, with which 4 bits cost least."""
    bases = dict.fromkeys(row['basis'] for row in group[0]['rows'] if row['basis'] not in ('noise', 'by component'))
    return min(bases, key=lambda basis: np.mean(values(group, basis, 4)))


def draw():
    """Loss over exact cache bytes per token, and the rise over bits per number; a line per model, in its best basis."""
    picture = Figure(figsize=(style.WIDTH, 5))
    left, right = picture.subplots(1, 2)
    shown, looks = [], []
    for label, group in groups().items():
        variants = [style.look(group[0]['attention'], group[0]['share'], n) for n in range(4)]
        look = next((look for look in variants if look not in looks), variants[0])  # as long as there are others
        looks.append(look)
        exact, basis = [run['val_loss'] for run in group], best_basis(group)
        sizes = [values(group, basis, bits, 'bytes')[0] for bits in BITS]
        rises = [float(np.mean(values(group, basis, bits))) for bits in BITS]
        shown += [np.mean(exact), np.mean(exact) + rises[BITS.index(4)]]
        name = ', '.join([label, *(part for part in basis.split(', ') if part != 'own')])
        left.plot(sizes, [np.mean(exact) + rise for rise in rises], label=name, **look)
        left.plot(2 * group[0]['numbers'], np.mean(exact), **(look | dict(markersize=9, markerfacecolor='white')))
        right.plot(BITS, np.maximum(rises, 1e-5), **look)
        own = [max(float(np.mean(values(group, 'own', bits))), 1e-5) for bits in BITS]
        right.plot(BITS, own, color=look['color'], linestyle=':', linewidth=0.9)
    left.set_xscale('log', base=2)
    left.xaxis.set_major_formatter(lambda x, _: f'{x:,.0f}')
    lowest, highest = min(shown), max(shown)  # 3 and 2 bits may lie above the picture
    room = (highest - lowest) / 10
    left.set(xlabel='cache bytes per token', ylabel='validation loss (nats per token)')
    left.set_ylim(lowest - room, highest + 5 * room)
    left.set_title('large hollow marks: 16 bits, not rounded')
    left.legend(fontsize=7.5)
    right.set(xlabel='bits per number', ylabel='rise of the loss (nats)', yscale='log')
    right.set_title('dotted: as it is, one scale per vector')
    picture.suptitle('Loss where what is cached is rounded to 8, 6, 4, 3 and 2 bits per number')
    return picture


# ---- train, measure, report ------------------------------------------------------------------------------------------
paths = outputs(config, 'bits')
torch.set_num_threads(1)
named = [item(source) for source in arguments.names(sources, 'sources')]
if not named and not reuse:
    raise UserError('nothing to measure: name checkpoints with --sources=out,out-mla')
with reading(reuse):
    earlier = read_json(reuse) if reuse else dict(config=config)
    then = earlier['config']['windows']
    runs = earlier['runs'] if reuse else told_apart(subprocesses.run_all(measure, named, jobs))
    shown = dict.fromkeys(row['basis'] for run in runs for row in run['rows'])
    text = f'Rise of the validation loss on {then} windows, by seed; of a single run ± is over windows:\n\n'
    text += f'{rise_table(shown)}\nThe best choice within a number of bytes:\n\n'
    text += f'{best_table()}\nHeads, on random tokens that repeat:\n\n{head_table()}'
    picture = draw()
save(paths, text, picture, None if reuse else dict(config=config, runs=runs))
