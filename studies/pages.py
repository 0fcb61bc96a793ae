"""
Tables and pictures of results/ and BENCHMARKS.md that no other study makes, from the JSON files of assets/, in seconds.

$ python studies/pages.py    # make figures runs this and the other studies' commands

The earlier contest, assets/contest_*.json: MHA, GQA, MQA and MLA with learned positions, RoPE or Muon, each at the best
of four learning rates. studies/contest.py of commit 7a111e7 trained its models. Decoding times, assets/decode.json:
bench.py's medians. SmolLM2 as MLA, assets/smollm2.json: studies/smollm2.py's. Run it from the repository root.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from core.cli.keys import begin

begin(__file__)  # before the slow imports

import os
from statistics import mean

from matplotlib.figure import Figure

from analysis import report, speed, stats, style
from core.cli import arguments
from studies.measure import read_json

# ----------------------------------------------------------------------------------------------------------------------
pictures = 'assets'  # a folder
tables = 'results/tables'  # a folder
exec(open(Path(__file__).resolve().parents[1] / 'configurator.py', encoding='utf-8').read())
# ----------------------------------------------------------------------------------------------------------------------

FINAL_SEED = 2000  # seeds below it chose the learning rates
SLOW = ', kv_lr=1/8'
CORPORA = {  # settings of the JSON files
    'contest_shakespeare': 'tinyshakespeare, characters; 4 layers, C = 128',
    'contest_code': 'Python source, bytes; 4 layers, C = 128',
    'contest_code_c384': 'Python source, bytes; 6 layers, C = 384, bfloat16 on a GPU',
}


# ---- the earlier contest ---------------------------------------------------------------------------------------------


def arms_of(numbers):
    """The models; without those of Muon, which then orthogonalized MHA's queries, keys and values as one matrix."""
    return [arm for arm in numbers['best_rates'] if 'Muon' not in arm]


def losses(numbers, arm, kind='scratch', key='val_loss'):
    """{seed: loss} of a model's final runs: from scratch at its best rate, or 'tuned' after a conversion."""
    runs = [r for r in numbers['runs'] if (r['arm'], r['kind']) == (arm, kind) and r['seed'] >= FINAL_SEED]
    return {r['seed']: r[key] for r in runs if kind != 'scratch' or r['rate'] == numbers['best_rates'][arm]}


def tuning(numbers, arm):
    """{rate: mean loss over the tuning seeds}."""
    runs = [r for r in numbers['runs'] if r['arm'] == arm and r['kind'] == 'scratch' and r['seed'] < FINAL_SEED]
    by_rate = report.grouped(runs, lambda r: r['rate'])
    return {rate: mean(r['val_loss'] for r in group) for rate, group in sorted(by_rate.items())}


def size(numbers, arm, key='cache_bytes_per_token'):
    """A size of a model."""
    return next(r[key] for r in numbers['runs'] if r['arm'] == arm and key in r)


def minus(mine, theirs):
    """The differences of two {seed: loss} by seed, as a cell."""
    gaps = [mine[seed] - theirs[seed] for seed in mine if seed in theirs] if mine != theirs else []
    return report.spread(gaps, '+.4f') if gaps else ''


def contest_table(numbers):
    """Every model at its best rate, and minus MHA and MQA with the same positions and multiplier."""
    heading = ['model', 'parameters', 'cache bytes per token', 'learning rate', 'seeds', 'validation loss']
    heading += ['minus MHA, same multiplier', 'minus MQA, same multiplier', 'minus the same at the whole rate']
    rows = []
    for arm in arms_of(numbers):
        rate, mine, grid = numbers['best_rates'][arm], losses(numbers, arm), sorted(tuning(numbers, arm))
        peers = [attention + ', RoPE' * ('RoPE' in arm) + SLOW * (SLOW in arm) for attention in ('MHA', 'MQA')]
        gaps = [minus(mine, losses(numbers, other)) for other in (*peers, arm.replace(SLOW, ''))]
        edge = ' (end of the grid)' * (rate in (grid[0], grid[-1]))
        facts = [f'{size(numbers, arm, key):,}' for key in ('parameters', 'cache_bytes_per_token')]
        rows.append((arm, *facts, f'{rate:g}{edge}', len(mine), report.spread(mine.values(), '.4f'), *gaps))
    return report.markdown_table(heading, rows)


def tuning_table(numbers):
    """The mean loss of every model at every rate."""
    found = {arm: tuning(numbers, arm) for arm in arms_of(numbers)}
    rates = sorted({rate for means in found.values() for rate in means})
    rows = [(arm, *(f'{means[rate]:.4f}' if rate in means else '' for rate in rates)) for arm, means in found.items()]
    return report.markdown_table(('model', *(f'{rate:g}' for rate in rates)), rows)


def converted(numbers):
    """The models that MHA was converted to."""
    return list(dict.fromkeys(r['arm'] for r in numbers['runs'] if r['kind'] == 'tuned' and r['arm'] != 'MHA'))


def conversion_table(numbers):
    """MHA converted, before and after fine-tuning, against MHA after the same iterations."""
    heading = ['MHA converted to', 'cache bytes per token', 'before fine-tuning, minus MHA']
    heading += ['fine-tuned, minus MHA fine-tuned', 'fine-tuned, minus the same from scratch']
    mha, tuned = losses(numbers, 'MHA'), losses(numbers, 'MHA', 'tuned')
    rows = []
    for arm in converted(numbers):
        before, after = losses(numbers, arm, 'tuned', 'before'), losses(numbers, arm, 'tuned')
        gaps = (minus(before, mha), minus(after, tuned), minus(after, losses(numbers, arm)))
        rows.append((arm, f'{size(numbers, arm):,}', *gaps))
    return report.markdown_table(heading, rows)


def draw_caches(numbers, groups, title):
    """Mean losses with their intervals over cached bytes, a panel for each of {title: {model: its losses}}."""
    figure = Figure(figsize=(style.WIDTH, 3.9))
    panels = figure.subplots(1, len(groups), sharey=True)
    for axis, (name, found) in zip(panels, groups.items(), strict=True):
        caches = [size(numbers, arm) for arm in found]
        for arm, (cache, left) in zip(found, style.side_by_side(caches, 1.09), strict=True):
            middle, half = stats.t_interval(list(found[arm].values()))
            look = style.look(arm) | dict(linestyle='none', capsize=3, markersize=6)
            axis.errorbar(cache, middle, half or 0, **look)
            label = arm.replace(SLOW, '').replace('MLA, r=', 'MLA ')
            place = dict(xytext=(-5, 13), ha='right') if left else dict(xytext=(7, 4))
            axis.annotate(label, (cache, middle), textcoords='offset points', color=look['color'], fontsize=9, **place)
        axis.set_xscale('log', base=2)
        ticks = sorted(set(caches))
        axis.set_xticks(ticks, [f'{tick:,}' for tick in ticks])
        axis.minorticks_off()
        axis.margins(x=0.3, y=0.12)
        axis.set(title=name, xlabel='cache bytes per token (bars: 95 % intervals)')
    panels[0].set_ylabel('validation loss (nats per token)')
    figure.suptitle(title)
    return figure


def make_contest():
    """The tables and the pictures of the earlier contest; of conversions, where a corpus has them."""
    parts = [
        'Made by `python studies/pages.py` from `assets/contest_*.json`; studies/contest.py of commit 7a111e7 trained '
        'the models. Means ± half widths of the 95 % t interval over seeds; differences are by seed. A model without '
        '`kv_lr=1/8` trains keys and values at the whole learning rate.'
    ]
    for name, about in CORPORA.items():
        numbers = read_json('assets', f'{name}.json')
        parts += [f'## {about}', contest_table(numbers), 'Mean loss of the tuning by learning rate:']
        parts.append(tuning_table(numbers))
        found = {arm: losses(numbers, arm) for arm in arms_of(numbers) if 'RoPE' not in arm}
        if len(found) > 4:
            groups = {
                'keys and values learn at the whole learning rate': {a: of for a, of in found.items() if SLOW not in a},
                'keys and values learn at 1/8 of the learning rate': {a: of for a, of in found.items() if SLOW in a},
            }
            title = f'MHA and MLA both gain where keys and values learn slowly\n{about}'
            report.save_figure(os.path.join(pictures, f'{name}.png'), draw_caches(numbers, groups, title))
            parts.append(f'![Loss over cached bytes](../../assets/{name}.png)')
        if arms := converted(numbers):
            arms.insert(0, 'MHA')
            groups = {
                'trained from scratch, 2,000 iterations': {a: losses(numbers, a) for a in arms},
                'MHA converted and fine-tuned, 200 iterations': {a: losses(numbers, a, 'tuned') for a in arms},
            }
            title = 'Converted from MHA and fine-tuned, by seed: MLA at C/2 and C/4 ends within 0.003 nats of MHA,\n'
            title += 'at C/8 0.055 behind, and MQA 0.063'
            title += '\n(keys and values learn at 1/8 of the learning rate in MLA, and at the whole in the others)'
            report.save_figure(os.path.join(pictures, 'conversion.png'), draw_caches(numbers, groups, title))
            save('conversion', [parts[0], conversion_table(numbers)])
    save('earlier-contest', parts)


def save(name, parts):
    """Write a file of generated tables."""
    report.save_text(os.path.join(tables, f'{name}.md'), '\n\n'.join(part.strip('\n') for part in parts) + '\n')


# ---- decoding --------------------------------------------------------------------------------------------------------


def make_decoding():
    """The table and the picture of decoding times on a CPU."""
    found = read_json('assets', 'decode.json')
    mha = {(row['batch_size'], row['context']): row['ms'] for row in found['steps'] if row['name'] == 'MHA'}
    heading = ['sequences', 'context', 'model', 'ms per step', "of MHA's", "attention alone, of MHA's"]
    heading.append('bytes per token')
    rows = []
    for row in found['steps']:
        sequences, context = place = row['batch_size'], row['context']
        shares = (f'{share:.2f}' for share in (row['ms'] / mha[place], row['attention_of_mha']))
        name, size = speed.in_shares(row['name'], found['n_embd']), row['cache_bytes'] // sequences // context
        rows.append((sequences, f'{context:,}', name, f'{row["ms"]:.1f}', *shares, f'{size:,}'))
    about = f'Made by `python studies/pages.py` from `assets/decode.json`: {found["setting"]}.'
    save('decoding', [about, report.markdown_table(heading, rows)])
    title = 'With eight sequences at 4,096 tokens MLA decodes faster than MHA; with one, at C/2 and C/4, slower'
    title += f'\n{found["setting"]}'
    picture = speed.decoding_figure(found['steps'], found['n_embd'], title)
    report.save_figure(os.path.join(pictures, 'decode.png'), picture)


# ---- SmolLM2 ---------------------------------------------------------------------------------------------------------

TEXTS = {'smollm2-python': 'Python source', 'smollm2-reviews': 'film reviews'}


def make_smollm2():
    """The tables and the picture of what SmolLM2 loses as MLA, and with the same fine-tuning."""
    found = read_json('assets', 'smollm2.json')
    whole = found['rows']['original']['cache_bytes_per_token']
    half = stats.half_width(found['windows'])
    named = {
        'original': 'SmolLM2 itself',
        'decompressed': 'keys decompressed, then rotated',
        'published': 'published shape',
        'cacheshrink': 'cacheshrink 0.1.5',
    }
    rows, tuned, points = [], [], []
    for name, row in found['rows'].items():
        form, part = (name.removesuffix(', fine-tuned') + ', 1').split(', ')[:2]
        cells = [f'{row[text]["loss"]:.4f}' for text in TEXTS]
        cells += [
            f'{row[text]["rise"]:+.4f} ± {half * row[text]["rise_stderr"]:.4f}' if 'rise' in row[text] else '0'
            for text in TEXTS
        ]
        if 'rate' in row:
            tuned.append((named[form], part, row['rate'], f'{row["tokens"]:,}', *cells))
            continue
        if 'n_latent' in row:
            points.append((form, row['cache_bytes_per_token'] / whole, [row[text] for text in TEXTS]))
        rows.append((named[form], part, row.get('n_latent', ''), row.get('n_rope', ''), *cells))
    losses = [*TEXTS.values(), *(f'rise, {text}' for text in TEXTS.values())]
    heading = ['form', 'part of the cache', 'r', 'R', *losses]
    about = (
        'Made by `python studies/pages.py` from `assets/smollm2.json`: losses in nats per token of '
        f'{found["windows"]} windows of {found["context"]} tokens; rises with half of a 95 % interval over windows.'
    )
    after = 'The same windows, each model fine-tuned on Python source; rises are relative to SmolLM2, fine-tuned alike.'
    fine = ['form', 'part of the cache', 'the better learning rate', 'tokens', *losses]
    parts = [about, report.markdown_table(heading, rows), after, report.markdown_table(fine, tuned)]
    pair = [found['rows'].get(f'{form}, 1/2, fine-tuned') for form in ('cacheshrink', 'published')]
    if all(pair):
        behind = []
        for text, said in TEXTS.items():
            losses, reference = (row[text]['losses'] for row in pair)
            middle, to_ends = stats.t_interval([a - b for a, b in zip(losses, reference, strict=True)])
            behind.append(f'{middle:.4f} ± {to_ends:.4f} ({said})')
        parts.append(f'cacheshrink, fine-tuned, is behind the published shape by {" and ".join(behind)}.')
    save('smollm2', parts)
    figure = Figure(figsize=(style.WIDTH, 3.6))
    panels = figure.subplots(1, 2, sharey=True)
    looks = {'decompressed': style.look('MLA', 0.2), 'published': style.look('MLA', 0.5)}
    for n, (axes, text) in enumerate(zip(panels, TEXTS.values(), strict=True)):
        for form, part, losses in points:
            look = dict(looks[form], linestyle='none', markersize=8, capsize=4)
            axes.errorbar(part, losses[n]['rise'], half * losses[n]['rise_stderr'], **look)
            if part == 1 / 4:
                place = dict(xytext=(8, 2), ha='left') if form == 'published' else dict(xytext=(-8, -4), ha='right')
                at, label = (part, losses[n]['rise']), named[form].replace(', ', ',\n')
                axes.annotate(label, at, textcoords='offset points', color=look['color'], fontsize=8.5, **place)
        axes.set_xscale('log', base=2)
        axes.set_xticks([1 / 8, 1 / 4, 1 / 2], ['1/8', '1/4', '1/2'])
        axes.minorticks_off()
        axes.margins(x=0.45)
        axes.set(title=text, xlabel='part of the cache that is kept', ylim=(0, None))
    panels[0].set_ylabel('rise of the loss (nats per token)')
    figure.suptitle('SmolLM2-135M-Instruct as MLA, before any fine-tuning: what a smaller cache costs')
    report.save_figure(os.path.join(pictures, 'smollm2.png'), figure)


for folder in (pictures, tables):
    arguments.check_folder(folder)
    os.makedirs(folder, exist_ok=True)
make_contest()
make_decoding()
make_smollm2()
