"""
Find the induction heads of trained models, and say how sure that is.

$ python find_induction_heads.py --models=out-shakespeare,out-shakespeare-mla
$ python find_induction_heads.py --models=gpt2 --ablate=False
$ python find_induction_heads.py --sweep=out-repeats,out-repeats-mla

A model is a checkpoint file, a folder with ckpt.pt, 'gpt2' (-medium, -large, -xl) or a Hugging Face folder. It reads
random tokens twice; a head that attends to what followed a token's first occurrence is measured by it. Heads are ranked
on one half of the sequences and reported on the other, with 95 % intervals over sequences. A head is called an
induction head (*) if its interval clears two nulls, random initialisation (the best of all heads) and a shuffled second
copy, and if it copies. Writes a table on stdout and into out_dir: induction.json (every number), induction_heads.png,
and patterns.html, where each head's pattern can be looked at. With --sweep: formation.json and formation.png instead,
the same scores over all checkpoints (ckpt*.pt) of each folder.
"""

import base64
import glob
import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

from analysis import induction
from core import checkpoint as checkpoints
from core import runtime
from core.dataset import TokenData
from core.gpt2 import GPT2_SIZES
from core.runtime import UserError
from core.tokenizer import load_tokenizer
from model import GPT

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

# ----------------------------------------------------------------------------------------------------------------------
models = ''  # what to examine, separated by commas
sweep = ''  # folders with the checkpoints of one run each, separated by commas: when heads form
out_dir = 'out-induction'  # where the results go
sequences = 128  # random sequences; half of them rank the heads, the others are reported
length = 50  # distinct tokens that are repeated; shortened to what block_size allows
seed = 1  # of sequences, controls and resampling
controls = 3  # randomly initialised models of the same shape
resamples = 2000  # of the bootstrap
ablate = True  # what each head's loss costs: one run per head
ablate_sequences = 32  # sequences for the ablations and the latent's directions
text_windows = 32  # windows of the run's own validation text for the in-context score
html = True  # write patterns.html
show = 10  # heads in the table
data_dir = 'data'  # where the checkpoints' data sets are, for the in-context score
device = 'auto'
threads = 0  # CPU threads; 0: the cores that this process may use
exec(open('configurator.py', encoding='utf-8').read())
# ----------------------------------------------------------------------------------------------------------------------

CUSTOMARY = 0.4  # the threshold often used for an induction head: drawn, and no more
GPT2_BOS, GPT2_IDS = 50256, 50257


@dataclass
class Loaded:
    """A model that was read from somewhere, and where from."""

    name: str
    model: GPT
    facts: dict  # file, iteration, val_loss, parameters, sha256
    ids: np.ndarray  # token ids to draw from
    bos: int | None
    tokenizer: object  # or None
    dataset: str  # the folder of data_dir it was trained on, or ''


def load(spec):
    """The model that `spec` names. UserError where there is none, or where it was never trained."""
    is_folder = os.path.isfile(os.path.join(spec, 'config.json'))
    if spec in GPT2_SIZES or is_folder:
        try:
            model = GPT.from_pretrained(spec)
        except ValueError as error:
            raise UserError(str(error)) from error
        facts = dict(file=spec, iteration=None, val_loss=None, sha256=hash_of_tensors(model), corpus='')
        meta, dataset = {'tokenizer': 'gpt2'}, ''
    else:
        file = checkpoints.find(spec)
        saved = checkpoints.load(file, mapped=True)
        if not saved.get('iter_num'):
            raise UserError(f'{file} is of iteration 0: an untrained model has no heads to find; train it first')
        model = checkpoints.build_model(saved)
        loss = saved.get('val_loss')
        loss = saved.get('best_val_loss') if loss is None else loss
        facts = dict(file=file, iteration=saved['iter_num'], val_loss=None if loss is None else float(loss),
                     sha256=hash_of_file(file), corpus=saved.get('corpus', ''))  # fmt: skip
        meta, dataset = saved.get('tokenizer') or {}, str(saved.get('config', {}).get('dataset', ''))
    if induction.is_untrained(model):
        raise UserError(f'{spec} holds initial values: every gain is 1 and every bias 0; train it first')
    facts.update(parameters=model.get_num_params(), attention=checkpoints.attention_of(model),
                 model_args=checkpoints.model_args(model.config))  # fmt: skip
    ids, bos = drawable(meta, model.config.vocab_size)
    text = validation_text(dataset, model.config, 1024) if meta.get('tokenizer') in ('byte', 'char', 'bpe') else None
    if text is not None:
        seen = text[0].numpy()  # the other ids, most of the 256 bytes for one, were never learned
        ids, bos = np.intersect1d(ids, seen), bos if bos in seen else None
    name = os.path.basename(os.path.normpath(os.path.dirname(spec) if spec.endswith('ckpt.pt') else spec))
    return Loaded(name, model.eval().to(device), facts, ids, bos, tokenizer_of(meta), dataset)


def drawable(meta, vocab_size):
    """Real token ids without specials and padding, and the id to begin with, if the tokenizer has one."""
    if meta.get('tokenizer') == 'gpt2' or (not meta and vocab_size in (GPT2_IDS, 50304)):
        if vocab_size > GPT2_BOS:
            return np.arange(GPT2_BOS), GPT2_BOS
        return np.arange(vocab_size), None
    ids = np.arange(min(meta.get('vocab_size', vocab_size), vocab_size))
    return (ids[:-1], int(ids[-1])) if meta.get('tokenizer') == 'bpe' else (ids, None)  # its last id ends a document


def tokenizer_of(meta):
    """The tokenizer, for showing tokens; None where there is none to be had: then ids are shown."""
    try:
        return load_tokenizer(meta)
    except (UserError, KeyError, OSError):
        return None


def hash_of_file(path):
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def hash_of_tensors(model):
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def describe(loaded):
    """One line that says what was loaded."""
    facts = loaded.facts
    step = 'published weights' if facts['iteration'] is None else f'iteration {facts["iteration"]}'
    loss = '' if facts['val_loss'] is None else f', val loss {facts["val_loss"]:.4f}'
    width = f', r={loaded.model.config.n_latent}' if facts['attention'] == 'mla' else ''
    return (f'{loaded.name}: {facts["file"]}, {facts["attention"]}{width}, {step}{loss}, '
            f'{facts["parameters"]:,} parameters, sha256 {facts["sha256"][:12]}')  # fmt: skip


# ---- what is measured ------------------------------------------------------------------------------------------------


def layouts_for(loaded):
    """The sequences each model reads, by name. 'main' decides; the others show that it does not hang on the layout."""
    room = loaded.model.config.block_size - (loaded.bos is not None)
    L = min(length, room // 2, len(loaded.ids))
    if L < 4:
        raise UserError(f'{loaded.name} reads {room} tokens of {len(loaded.ids)}: too few for a repeated block')
    half = max(2, L // 2)
    gap = min(half, room - 2 * half, len(loaded.ids) - half)
    layouts = {'main': dict(length=L), 'short': dict(length=half)}
    if gap > 0:
        layouts['random gap'] = dict(length=half, max_gap=gap)
    layouts['four copies'] = dict(length=max(2, L // 4), copies=4)
    return layouts


def repeats_for(loaded, layout, count=None, **changes):
    """Sequences in a layout of layouts_for; `count` of them instead of `sequences`."""
    count = count or sequences
    return induction.repeated_sequences(count, ids=loaded.ids, bos=loaded.bos, seed=seed, **layout, **changes)


def summary(values):
    """Mean over sequences, and its interval."""
    low, high = induction.bootstrap(values, resamples, seed)
    return {'mean': values.mean(0), 'low': low, 'high': high}


def scores_of(model, repeats):
    """Scores (mean, interval) and losses on one half of the sequences; `ranking`: the mean on the other half."""
    half = len(repeats) // 2
    chosen_on = induction.head_scores(model, repeats[:half], losses=False)
    reported = induction.head_scores(model, repeats[half:])
    out = {name: dict(summary(reported[name]), ranking=chosen_on[name].mean(0)) for name in induction.SCORES}
    return dict(out, repeat_loss=summary(reported['repeat_loss']), token_losses=reported['losses'].mean(0))


def random_controls(loaded, layout):
    """Induction scores (controls, L, H) of fresh, never trained models of this shape: the labelled control."""
    repeats, found = repeats_for(loaded, layout, count=min(sequences, 8)), []  # they hardly differ between sequences
    fresh = type(loaded.model)(loaded.model.config).eval().to(device)
    for number in range(controls):
        fresh.init_weights(10_000 * (seed + 1) + number)
        found.append(induction.head_scores(fresh, repeats, losses=False)['induction'].mean(0))
    return np.stack(found)


def measure(loaded):
    """Every measurement on one model: a dict of arrays and numbers."""
    model, layouts = loaded.model, layouts_for(loaded)
    as_reported = sequences - sequences // 2  # where no head is chosen, no half is needed to choose on
    repeats = repeats_for(loaded, layouts['main'])
    out = dict(scores_of(model, repeats), layouts=layouts)
    out['chance'] = induction.chance(repeats)
    shuffled = repeats_for(loaded, layouts['main'], count=as_reported, shuffled=True)
    out['shuffled'] = summary(induction.head_scores(model, shuffled, losses=False)['induction'])
    out['random_init'] = random_controls(loaded, layouts['main'])
    out['random_null'] = float(out['random_init'].max())
    for name, layout in layouts.items():
        if name != 'main':
            other = repeats_for(loaded, layout, count=as_reported)
            found = induction.head_scores(model, other, losses=False)
            out[name] = {score: summary(found[score]) for score in ('induction', 'prefix_matching')}
            out[name]['chance'] = induction.chance(other)
    sample = np.random.default_rng(seed).choice(loaded.ids, min(len(loaded.ids), 32), replace=False)
    out['copying_eigenvalues'] = induction.copying_eigenvalues(model, loaded.ids)
    out['copying_eigenvalues_raw'] = induction.copying_eigenvalues(model, loaded.ids, effective=False)
    out['copying_top5'] = induction.copying_tokens(model, sample)
    out['composition_lift'] = induction.composition(model)
    out['in_context'] = in_context(loaded)
    if checkpoints.attention_of(model) == 'mla':
        out['latent'] = measure_latent(loaded, repeats)
    induction_scores = out['induction']
    out['called'] = induction.verdict(induction_scores['low'], out['random_null'], out['shuffled']['high'],
                                      out['copying_eigenvalues'])  # fmt: skip
    out['ranking'] = ranking = ranked(induction_scores['ranking'])
    if ablate:
        out['ablation'] = measure_ablation(loaded, ranking)
    return out


def ranked(scores):
    """Heads as (layer, head), the highest score first."""
    return [tuple(int(i) for i in np.unravel_index(n, scores.shape)) for n in np.argsort(-scores, axis=None)]


def validation_text(dataset, config, count):
    """`count` windows of the run's own validation data: tokens and targets (count, T); None where that is not there."""
    folder = os.path.join(data_dir, dataset)
    if not dataset or not os.path.isfile(os.path.join(folder, 'val.bin')):
        return None
    try:
        data = TokenData(folder, config.block_size)
        tokens, targets = data.windows('val', data.eval_windows('val', count))
    except UserError as error:
        runtime.notice(f'the validation text is not used: {error}')
        return None
    return None if int(tokens.max()) >= config.vocab_size else (tokens, targets)


def in_context(loaded):
    """The in-context score on the run's own validation data; None where that is not at hand."""
    T = loaded.model.config.block_size
    text = validation_text(loaded.dataset, loaded.model.config, text_windows)
    if text is None:
        return None
    windows, targets = text
    early, late = (50, 500) if T >= 500 else (max(2, T // 10), T)
    masked = (targets == -1).any(0).nonzero().flatten()  # never trained, so their loss means nothing
    if len(masked):
        early = max(early, int(masked[-1]) + 3)  # the target of column i is token i + 2, counted from 1
    if early >= late:
        return None
    losses = induction.text_losses(loaded.model, windows, (early, late))
    score = induction.in_context_score(losses, early, late)
    low, high = induction.bootstrap(score, resamples, seed)
    return dict(mean=score.mean(), low=low, high=high, early=early, late=late, windows=len(windows))


def measure_latent(loaded, repeats):
    """What only MLA has, per layer."""
    model = loaded.model
    few = repeats[-ablate_sequences:]
    moments = induction.latent_moments(model, few)
    out = {'effective_rank': [induction.effective_rank(covariance) for _, covariance in moments]}
    overlaps = [induction.reading_overlaps(block.attn) for block in model.transformer.h]
    for name in ('key', 'value', 'key_value'):
        out[f'{name}_overlap'] = np.stack([layer[name][0] for layer in overlaps])
        out[f'{name}_overlap_chance'] = overlaps[0][name][1]
    if model.config.n_rope:
        parts = induction.logit_parts(model, repeats[len(repeats) // 2 :])
        out['logit_parts'] = {name: summary(values) for name, values in parts.items()}
    if ablate:
        bands = min(16, model.config.n_latent)
        with progress(f'{loaded.name}: latent directions', 2 * bands * model.config.n_layer) as bar:
            found = induction.ablate_latent(model, few, moments, bands, bar.update)
        out['bands'] = found['bands']
        for path in ('keys', 'values'):
            out[f'{path}_ablation'] = (found[path] - found['base']).mean(-1)
    return out


def measure_ablation(loaded, ranking):
    """Rise of the loss on repeated tokens: each head alone, and the best heads together against random ones."""
    model = loaded.model
    repeats = repeats_for(loaded, layouts_for(loaded)['main'])[-ablate_sequences:]
    with progress(f'{loaded.name}: heads', len(ranking)) as bar:
        base, alone = induction.ablate_each_head(model, repeats, bar.update)
    low, high = induction.bootstrap(np.moveaxis(alone - base, -1, 0), resamples, seed)
    counts = [k for k in (1, 2, 3, 4, 6, 8, 12, 16) if k <= max(2, len(ranking) // 2)]
    steps = induction.ablate_cumulatively(model, repeats, ranking, counts, seed=seed)
    together = [
        dict(heads=step['k'], rise=(step['loss'] - base).mean(), control_rise=(step['control'] - base).mean(),
             control_heads=step['control_heads'])
        for step in steps
    ]  # fmt: skip
    return dict(base=base.mean(), rise=(alone - base).mean(-1), low=low, high=high, together=together, counts=counts)


def progress(text, total):
    return tqdm(total=total, desc=text, leave=False, disable=None)


# ---- what is said ----------------------------------------------------------------------------------------------------


def table(loaded, found):
    """The best heads of one model, as lines of text."""
    score, lift = found['induction'], found['composition_lift']['k']
    gap = found.get('random gap', found['short'])['induction']['mean']
    heading = 'head    induction [95 %]        gap    prefix dupl.  prev.  copying  top-5  K-lift  from'
    lines = [heading + ('     ablation' if ablate else '')]
    for layer, head in found['ranking'][:show]:
        at = (layer, head)
        source, best = '', float('nan')
        if layer:
            source_at = np.unravel_index(np.nanargmax(lift[:, :, layer, head]), lift.shape[:2])
            source, best = f'{source_at[0]}.{source_at[1]}', lift[(*source_at, *at)]
        values = [found['four copies']['prefix_matching'], found['duplicate_token'], found['previous_token']]
        line = (f'{layer}.{head:<3}{"*" if found["called"][at] else " "}  {score["mean"][at]:.3f} '
                f'[{score["low"][at]:.3f}, {score["high"][at]:.3f}]  {gap[at]:.3f}  '
                + '  '.join(f'{value["mean"][at]:.3f}' for value in values)
                + f'  {found["copying_eigenvalues"][at]:+7.2f} {found["copying_top5"][at]:6.2f}'
                f' {best:7.2f}  {source:<6}')  # fmt: skip
        lines.append(line + (f' {found["ablation"]["rise"][at]:+9.3f}' if ablate else ''))
    null = float(found['shuffled']['mean'].max())
    lines.append(f'nulls: chance {found["chance"]:.3f}, random init {found["random_null"]:.3f} (best of all heads in '
                 f'{controls} models), shuffled copy {null:.3f} (best head)')  # fmt: skip
    loss = found['repeat_loss']
    lines.append(f'loss on repeated tokens {loss["mean"]:.3f} [{loss["low"]:.3f}, {loss["high"]:.3f}]')
    if found['in_context']:
        c = found['in_context']
        lines.append(f'in-context score {c["mean"]:+.3f} [{c["low"]:+.3f}, {c["high"]:+.3f}]: '
                     f'loss at token {c["late"]} minus token {c["early"]}, {c["windows"]} windows')  # fmt: skip
    for step in found.get('ablation', {}).get('together', []):
        others = f'without {step["control_heads"]} random others of the same layers: {step["control_rise"]:+.3f}'
        others = others if step['control_heads'] else 'their layers have no others'
        lines.append(f'without the best {step["heads"]}: {step["rise"]:+.3f}; {others}')
    if 'latent' in found:
        lines += latent_lines(found['latent'], loaded.model.config.n_latent)
    count, strong = int(found['called'].sum()), int((found['called'] & (score['mean'] > CUSTOMARY)).sum())
    lines.append(f'{loaded.name}: {count} of {score["mean"].size} heads are induction heads, '
                 f'{strong} of them above the customary {CUSTOMARY}')  # fmt: skip
    return lines


def latent_lines(latent, r):
    """What only MLA has, as lines of text."""
    ranks = ', '.join(f'{rank:.1f}' for rank in latent['effective_rank'])
    lines = [f'latent: effective rank by layer {ranks} of {r}']
    for name in ('key', 'value', 'key_value'):
        overlap = latent[f'{name}_overlap']
        if name != 'key_value':  # a head overlaps itself entirely
            overlap = overlap[:, ~np.eye(overlap.shape[1], dtype=bool)]
        by_layer = ', '.join(f'{layer.mean():.2f}' for layer in overlap)
        lines.append(f'overlap of what heads read ({name}): {by_layer}; chance {latent[f"{name}_overlap_chance"]:.2f}')
    return lines


def plain(value):
    """`value` as what JSON can hold; numbers to 6 digits, nan as null."""
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f'{value:.6g}') if np.isfinite(value) else None
    return value


def write(name, text):
    """Write a text file of out_dir, whole or not at all."""
    path = os.path.join(out_dir, name)
    with open(path + '.writing', 'w', encoding='utf-8') as file:
        file.write(text)
    os.replace(path + '.writing', path)
    runtime.notice(f'wrote {path}')


def save_figure(figure, name):
    path = os.path.join(out_dir, name)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    runtime.notice(f'wrote {path}')


def heatmaps(all_loaded, all_found):
    """One column per model, three rows: the model, random initialisation, shuffled copy; one scale for all."""
    rows = ('second copy', 'control: random init', 'control: second copy shuffled')
    figure, axes = plt.subplots(3, len(all_loaded), figsize=(1.6 + 3.4 * len(all_loaded), 8.6), squeeze=False,
                                layout='constrained')  # fmt: skip
    for column, (loaded, found) in enumerate(zip(all_loaded, all_found, strict=True)):
        panels = (found['induction']['mean'], found['random_init'].max(0), found['shuffled']['mean'])
        for axis, panel, name in zip(axes[:, column], panels, rows, strict=True):
            image = axis.imshow(panel, vmin=0, vmax=1, cmap='viridis', aspect='auto')
            axis.set(xlabel='head', ylabel='layer', title=f'{loaded.name}\n{name}', xticks=range(panel.shape[1]),
                     yticks=range(panel.shape[0]))  # fmt: skip
            axis.tick_params(labelsize=7)
            axis.title.set_fontsize(9)
        for layer, head in np.argwhere(found['called']):
            color = 'black' if found['induction']['mean'][layer, head] > 0.6 else 'white'
            axes[0, column].text(head, layer, '*', ha='center', va='center', color=color, size=13)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, label='induction score (* clears the nulls, and copies)')
    bar.ax.axhline(CUSTOMARY, color='white', linewidth=1.5)
    save_figure(figure, 'induction_heads.png')


# ---- patterns.html ---------------------------------------------------------------------------------------------------


def browser_entry(loaded, found):
    """What the page shows of one model: a repeated sequence and, where the data is at hand, some of its text."""
    model, shown = loaded.model, []
    repeats = repeats_for(loaded, layouts_for(loaded)['main'])
    shown.append(('random tokens, twice', repeats.tokens[-1:]))
    folder, T = os.path.join(data_dir, loaded.dataset), model.config.block_size
    if found['in_context']:
        data = TokenData(folder, T)
        shown.append(('validation data', data.windows('val', data.eval_windows('val', 1))[0][:, : min(T, 96)]))
    entries = []
    for title, tokens in shown:
        pattern = induction.patterns(model, tokens.to(device))[:, 0]  # (L, H, T, T)
        visible = torch.ones(tokens.size(1), tokens.size(1), dtype=torch.bool).tril()
        packed = (pattern[..., visible] * 255).round().to(torch.uint8).numpy()
        words = [word(loaded, token) for token in tokens[0].tolist()]
        entries.append(dict(title=title, tokens=words, data=base64.b64encode(packed.tobytes()).decode('ascii')))
    mean = found['induction']['mean']
    return dict(name=describe(loaded), layers=mean.shape[0], heads=mean.shape[1], sequences=entries,
                scores=plain(mean), called=plain(found['called']))  # fmt: skip


def word(loaded, token):
    """A token as the page shows it."""
    if token == loaded.bos:
        return '<bos>'
    text = None if loaded.tokenizer is None else loaded.tokenizer.decode([token])
    return f'#{token}' if text is None else text.replace('\n', '\\n')


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Attention patterns</title>
<style>
body { font: 14px/1.4 system-ui, sans-serif; margin: 1.5em; color: #222; background: #fff }
#grid { display: grid; gap: 4px; margin: 1em 0 }
#grid figure { margin: 0; cursor: pointer; text-align: center; font-size: 10px; border: 2px solid transparent }
#grid figure.on { border-color: #c40 }
#grid canvas { width: 100%; max-width: 110px; image-rendering: pixelated }
#main { display: flex; flex-wrap: wrap; gap: 1.5em }
#big { width: min(560px, 95vw); height: min(560px, 95vw); image-rendering: pixelated; border: 1px solid #ccc }
#words { flex: 1; min-width: 260px; font-family: ui-monospace, monospace }
#words span { display: inline-block; padding: 0 3px; margin: 1px; border: 1px solid #ddd; white-space: pre }
#words span.q { outline: 2px solid #c40 }
</style>
<h1>Attention patterns</h1>
<p><label>Model <select id="model"></select></label> <label>Sequence <select id="seq"></select></label></p>
<p>Rows are queries, columns keys; dark is 1. Under each head its induction score; * is an induction head. Click a
head, then point into the pattern or at a token: tokens are shaded by how much the query marked in red attends to them.
</p>
<div id="main"><div><b id="title"></b><br><canvas id="big"></canvas><p id="say">&nbsp;</p></div>
<div id="words"></div></div>
<div id="grid"></div>
<script>
const MODELS = __DATA__;
const $ = id => document.getElementById(id);
let m, s, bytes, layer = 0, head = 0, query = null;
const size = () => s.tokens.length;
const weight = (l, h, i, j) => {
  const T = size(), per = T * (T + 1) / 2;
  return j > i ? 0 : bytes[(l * m.heads + h) * per + i * (i + 1) / 2 + j] / 255;
};
function draw(canvas, l, h) {
  const T = size(), c = canvas.getContext('2d');
  canvas.width = canvas.height = T;
  const image = c.createImageData(T, T);
  for (let i = 0; i < T; i++) for (let j = 0; j < T; j++) {
    const w = Math.sqrt(weight(l, h, i, j)), at = 4 * (i * T + j);
    image.data[at] = j > i ? 240 : 255 - 230 * w;
    image.data[at + 1] = j > i ? 240 : 255 - 190 * w;
    image.data[at + 2] = j > i ? 240 : 255 - 110 * w;
    image.data[at + 3] = 255;
  }
  c.putImageData(image, 0, 0);
}
function words(key) {
  [...$('words').children].forEach((span, j) => {
    const w = query === null ? 0 : weight(layer, head, query, j);
    span.style.background = `rgba(25, 65, 145, ${Math.sqrt(w)})`;
    span.style.color = w > 0.25 ? '#fff' : '#222';
    span.className = j === query ? 'q' : '';
  });
  let text = '\\u00a0';
  if (query !== null) text = `query ${query} "${s.tokens[query]}"`;
  if (key !== undefined) text += ` -> key ${key} "${s.tokens[key]}": ${weight(layer, head, query, key).toFixed(3)}`;
  $('say').textContent = text;
}
function pick(l, h) {
  layer = l; head = h;
  document.querySelectorAll('#grid figure').forEach(f => f.classList.toggle('on', f.dataset.at === `${l}.${h}`));
  $('title').textContent = `head ${l}.${h}, induction score ${m.scores[l][h].toFixed(3)}${m.called[l][h] ? ' *' : ''}`;
  draw($('big'), l, h); words();
}
function show() {
  s = m.sequences[+$('seq').value];
  bytes = Uint8Array.from(atob(s.data), c => c.charCodeAt(0));
  query = null;
  $('words').replaceChildren(...s.tokens.map((t, i) => {
    const span = document.createElement('span');
    span.textContent = t; span.title = `position ${i}`;
    span.onmouseenter = () => { query = i; words(); };
    return span;
  }));
  $('grid').style.gridTemplateColumns = `repeat(${m.heads}, minmax(24px, 110px))`;
  $('grid').replaceChildren();
  for (let l = 0; l < m.layers; l++) for (let h = 0; h < m.heads; h++) {
    const f = document.createElement('figure'), c = document.createElement('canvas');
    f.dataset.at = `${l}.${h}`;
    f.append(c, `${l}.${h} ${m.scores[l][h].toFixed(2)}${m.called[l][h] ? '*' : ''}`);
    f.onclick = () => pick(l, h);
    draw(c, l, h); $('grid').append(f);
  }
  pick(Math.min(layer, m.layers - 1), Math.min(head, m.heads - 1));
}
function choose() {
  m = MODELS[+$('model').value];
  $('seq').replaceChildren(...m.sequences.map((q, i) => new Option(q.title, i)));
  let best = -1;
  m.scores.forEach((row, l) => row.forEach((v, h) => { if (v > best) { best = v; layer = l; head = h; } }));
  show();
}
$('big').onmousemove = e => {
  const box = e.target.getBoundingClientRect(), T = size();
  query = Math.min(T - 1, Math.floor((e.clientY - box.top) / box.height * T));
  words(Math.min(T - 1, Math.floor((e.clientX - box.left) / box.width * T)));
};
$('model').replaceChildren(...MODELS.map((q, i) => new Option(q.name, i)));
$('model').onchange = choose; $('seq').onchange = show;
choose();
</script></html>
"""


def write_page(entries):
    # '<' is escaped so that no token can end the script element
    write('patterns.html', PAGE.replace('__DATA__', json.dumps(entries).replace('<', '\\u003c')))


# ---- the sweep -------------------------------------------------------------------------------------------------------


def sweep_files(folder):
    """The checkpoints of one run in the order of their iterations, each iteration once: [(iteration, file)]."""
    files = sorted(glob.glob(os.path.join(folder, 'ckpt*.pt')))
    if not files:
        raise UserError(f'there is no ckpt*.pt in {folder}; name the folder of a run that kept its checkpoints')
    found = {checkpoints.load(file, mapped=True).get('iter_num', 0): file for file in files}
    return sorted((iteration, file) for iteration, file in found.items() if iteration)


def formation(folder):
    """The best scores at each checkpoint of one run: a dict of lists."""
    rows = []
    for iteration, file in tqdm(sweep_files(folder), desc=folder, disable=None, leave=False):
        loaded = load(file)
        layout = layouts_for(loaded)['main']
        scores = scores_of(loaded.model, repeats_for(loaded, layout))
        row = dict(iteration=iteration, file=file, val_loss=loaded.facts['val_loss'], in_context=in_context(loaded))
        for name in ('induction', 'previous_token'):
            at = ranked(scores[name]['ranking'])[0]
            row[name] = dict(head=at, **{key: scores[name][key][at] for key in ('mean', 'low', 'high')})
        row['repeat_loss'] = {key: float(value) for key, value in scores['repeat_loss'].items()}
        rows.append(row)
    null = float(random_controls(loaded, layout).max())
    chance = induction.chance(repeats_for(loaded, layout))
    return dict(folder=folder, name=os.path.basename(os.path.normpath(folder)), attention=loaded.facts['attention'],
                random_null=null, chance=chance, checkpoints=rows)  # fmt: skip


PANELS = (
    ('induction', 'best induction score'),
    ('previous_token', 'best previous-token score'),
    ('repeat_loss', 'loss on repeated tokens (nats)'),
    ('in_context', 'in-context score (nats)'),
)


def draw_formation(runs):
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout='constrained')
    styles = ('-o', '--s', '-.^', ':D')
    for number, run in enumerate(runs):
        for axis, (name, title) in zip(axes, PANELS, strict=True):
            rows = [row for row in run['checkpoints'] if row[name]]
            x, mean = [row['iteration'] for row in rows], [row[name]['mean'] for row in rows]
            axis.plot(x, mean, styles[number % 4], label=run['name'], markersize=3)
            axis.fill_between(x, [row[name]['low'] for row in rows], [row[name]['high'] for row in rows], alpha=0.2)
            axis.set(xlabel='iteration', title=title)
    axes[0].axhline(max(run['random_null'] for run in runs), color='grey', linewidth=0.8)
    axes[0].axhline(CUSTOMARY, color='grey', linewidth=0.8, linestyle=':')
    for axis in axes[:2]:
        axis.set_ylim(0, 1)
    axes[0].legend(fontsize=8)
    save_figure(figure, 'formation.png')


# ---- from top to bottom ----------------------------------------------------------------------------------------------

if not models and not sweep:
    raise UserError(
        'name what to examine: --models=out,out-mla for trained models, --sweep=FOLDER for one run over time'
    )
if sequences < 8 or length < 4 or controls < 1 or resamples < 100:
    raise UserError('sequences must be at least 8, length 4, controls 1 and resamples 100; less can say nothing')
runtime.check_folder(out_dir)
induction.self_test()
runtime.notice('self-test passed: planted heads score 1.000, uniform attention scores chance')
device = runtime.pick_device(device)
threads = runtime.set_threads(threads)
about = dict(command=sys.argv, config=config, torch=torch.__version__)

if sweep:
    runs = [formation(folder.strip()) for folder in sweep.split(',') if folder.strip()]
    os.makedirs(out_dir, exist_ok=True)
    for run in runs:
        print(run['name'])
        print('  iteration  induction  head  previous  head  repeat loss  in-context')
        for row in run['checkpoints']:
            first, second = row['induction'], row['previous_token']
            context = f'{row["in_context"]["mean"]:+.3f}' if row['in_context'] else 'n/a'
            print(f'  {row["iteration"]:9}  {first["mean"]:9.3f}  {first["head"][0]}.{first["head"][1]:<3}'
                  f'{second["mean"]:9.3f}  {second["head"][0]}.{second["head"][1]:<3}'
                  f'{row["repeat_loss"]["mean"]:12.3f}  {context:>10}')  # fmt: skip
    write('formation.json', json.dumps(plain(dict(about, runs=runs)), indent=1))
    draw_formation(runs)

all_loaded, all_found, entries = [], [], []
for spec in [spec.strip() for spec in models.split(',') if spec.strip()]:
    loaded, started = load(spec), time.perf_counter()
    print(describe(loaded), flush=True)
    found = measure(loaded)
    found['seconds'] = time.perf_counter() - started
    print('\n'.join(table(loaded, found)) + '\n', flush=True)
    if html:
        entries.append(browser_entry(loaded, found))
    all_loaded.append(loaded)
    all_found.append(found)
    loaded.model = loaded.model.to('cpu')
if all_found:
    os.makedirs(out_dir, exist_ok=True)
    pairs = zip(all_loaded, all_found, strict=True)
    results = [dict(name=loaded.name, **loaded.facts, **found) for loaded, found in pairs]
    write('induction.json', json.dumps(plain(dict(about, models=results)), indent=1))
    heatmaps(all_loaded, all_found)
    if html:
        write_page(entries)
