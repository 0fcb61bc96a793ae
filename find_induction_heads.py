"""
Find the induction heads of trained models, with confidence intervals and controls.

$ python find_induction_heads.py --models=out-shakespeare,out-shakespeare-mla
$ python find_induction_heads.py --models=gpt2 --ablate=False
$ python find_induction_heads.py --sweep=out-repeats,out-repeats-mla

Which heads do it on a text of your own, and which heads attend to the previous token?
$ python find_induction_heads.py --models=out-shakespeare --text=notes.txt
$ python find_induction_heads.py --models=out-shakespeare --sort=previous

Any model that transformers loads, here in half the memory:
$ python find_induction_heads.py --models=FOLDER --dtype=bfloat16

A model is a checkpoint file, a folder with ckpt.pt, 'gpt2' (-medium, -large, -xl), a GGUF file or a Hugging Face folder
with any causal language model (docs/any_model.md). It reads a block of random tokens twice; an induction head attends
from a token's second occurrence to the token that followed its first. Heads are ranked on one half of the sequences and
reported on the other, with 95 % intervals over sequences. A head counts as an induction head (*) if its interval is
above two controls, random initialization (the highest score of any head) and a shuffled second copy, and if it copies.

Prints a table and writes into out_dir: induction.json (all numbers), induction_heads.png (heat maps) and patterns.html
(a page to browse every head's pattern). --sweep computes the same scores for all checkpoints (ckpt*.pt) of each folder
and writes formation.json and formation.png.
"""

from core.cli.keys import begin

begin(__file__)  # before the slow imports

import glob
import os
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from analysis import circuits, forward, hf_model, induction, latent, report, stats
from analysis.hf_model import FolderTokenizer, HFModel
from core.cli import arguments, errors, files, machine
from core.cli.errors import UserError
from core.convert.bits import for_few_bits, round_as
from core.convert.published import form_of
from core.runs import checkpoint as checkpoints
from core.runs.models import attention_of, build_model, is_published, model_args, pretrained
from core.text.dataset import TokenData
from core.text.tokenizer import Tokenizer, tokenizer_of

# ----------------------------------------------------------------------------------------------------------------------
models = ''  # the models to measure, separated by commas
sweep = ''  # folders with the checkpoints of one run each, separated by commas: when do heads form?
out_dir = 'out-induction'  # folder for the results
sequences = 128  # random sequences; half of them rank the heads, the others are reported
length = 50  # distinct tokens in the repeated block; shortened to fit block_size
seed = 1  # of sequences, controls and resampling
controls = 3  # randomly initialized models of the same shape
resamples = 2000  # of the bootstrap
ablate = True  # measure the loss without each head: one forward pass per head
ablate_sequences = 32  # sequences for the ablations and for the latent's directions
text_windows = 32  # windows of the run's own validation data for the in-context score, and of --text
html = True  # write patterns.html
show = 10  # heads in the table
sort = 'induction'  # the score that ranks them: 'induction', 'previous', 'duplicate', 'sink' or 'copying'
text = ''  # a text file: score the heads on it too, and show their patterns on its beginning
cache = 'float'  # 'int8', 'int4': round what is attended to as a cache in so many bits does
data_dir = 'data'  # folder of the checkpoints' data sets, for the in-context score
trust_remote_code = False  # run the Python code in a Hugging Face folder, if its model needs some
dtype = 'float32'  # of models that only transformers loads; 'auto': as in their files
device = 'auto'
threads = 0  # CPU threads; 0: the cores that this process may use
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py'), encoding='utf-8').read())
# ----------------------------------------------------------------------------------------------------------------------


# ---- models ----------------------------------------------------------------------------------------------------------


@dataclass
class Loaded:
    """A trained model and its origin."""

    model: forward.Model
    facts: dict  # name, file, iteration, val_loss, sha256, corpus, parameters, attention, model_args
    ids: np.ndarray  # token ids to draw from
    bos: int | None  # the id that sequences begin with
    tokenizer: Tokenizer | FolderTokenizer | None
    dataset: str  # the folder of data_dir that it was trained on, or ''


def load(spec):
    """The Loaded model that `spec` names. UserError if it doesn't exist or was never trained."""
    name = os.path.basename(os.path.normpath(os.path.dirname(spec) if spec.endswith('ckpt.pt') else spec))
    if is_published(spec):
        model, saved = published(spec)
        facts = dict(name=name, file=spec, iteration=None, val_loss=None, sha256=None, corpus='')
    else:
        file = checkpoints.find(spec)
        saved = checkpoints.load(file, mapped=True)
        model = build_model(saved)
        loss = saved.get('val_loss', saved.get('best_val_loss'))
        facts = dict(name=name, file=file, iteration=saved.get('iter_num'), sha256=files.sha256(file))
        facts |= dict(val_loss=None if loss is None else float(loss), corpus=saved.get('corpus', ''))
    meta, dataset = saved.get('tokenizer') or {}, str(saved.get('config', {}).get('dataset', ''))
    if induction.is_untrained(model):
        raise UserError(f'{spec} has initial values: every gain is 1 and every bias 0; train it first')
    if isinstance(model, HFModel):
        facts |= dict(attention=f'{model.model.config.model_type} of transformers', model_args=vars(model.config))
    else:
        facts |= dict(attention=attention_of(model), model_args=model_args(model.config))
    facts |= dict(parameters=model.get_num_params())
    try:
        tokenizer = tokenizer_of(meta, model.config.vocab_size)
    except UserError:
        tokenizer = None
    if tokenizer is None and is_published(spec) and os.path.isdir(spec):
        tokenizer = hf_model.tokenizer_in(spec, trust_remote_code)
    ids, bos = drawable_ids(tokenizer, meta, model.config, dataset)
    if cache != 'float' and isinstance(model, HFModel):
        raise UserError(f'{spec} is run by transformers, whose cache has no {cache}; leave out --cache')
    model = for_few_bits(model.eval(), cache).to(device)
    return Loaded(round_as(model, cache), facts, ids, bos, tokenizer, dataset)


def published(spec):
    """A published model and what its checkpoint would hold: by our own classes, and where they can't, transformers'."""
    try:
        return pretrained(spec)
    except UserError as ours:
        if not os.path.isdir(spec):
            raise
        try:
            return hf_model.load(spec, machine.DTYPES.get(dtype, 'auto'), trust_remote_code), {}
        except UserError as theirs:
            raise (ours if form_of(spec) else theirs) from None


def drawable_ids(tokenizer, meta, config, dataset):
    """Token ids for random sequences, without special and padding ids, and the id to begin with or None."""
    if tokenizer is None:
        return np.arange(min(meta.get('vocab_size', config.vocab_size), config.vocab_size)), None
    ids, bos = tokenizer.text_ids(), tokenizer.end_of_text
    ids, bos = ids[ids < config.vocab_size], bos if bos is not None and bos < config.vocab_size else None
    # an encoding learned from other text, GPT-2's, has most ids from there
    learned_elsewhere = tokenizer.byte_pair and not tokenizer.learned_from
    windows = None if learned_elsewhere else validation_text(dataset, config, 1024)
    if windows is not None:
        seen = windows[0].numpy()  # other ids, for example most of the 256 bytes, were never trained
        ids, bos = np.intersect1d(ids, seen), bos if bos in seen else None
    return ids, bos


def validation_text(dataset, config, count):
    """`count` windows of the run's own validation data, (tokens, targets) (count, T) each; None if it is missing."""
    folder = os.path.join(data_dir, dataset)
    if not dataset or not os.path.isfile(os.path.join(folder, 'val.bin')):
        return None
    try:
        data = TokenData(folder, config.block_size)
        tokens, targets = data.windows('val', data.eval_windows('val', count))
    except UserError as error:
        errors.notice(f'not using the validation data: {error}')
        return None
    return None if int(tokens.max()) >= config.vocab_size else (tokens, targets)


# ---- measurements ----------------------------------------------------------------------------------------------------


def layouts_for(loaded):
    """The layouts that the model's sequences come in. UserError if it's too small for a repeated block."""
    room = loaded.model.config.block_size - (loaded.bos is not None)
    try:
        return induction.layouts(length, room, len(loaded.ids))
    except ValueError as error:
        raise UserError(f'{loaded.facts["name"]} is too small to measure: {error}') from error


def repeats_for(loaded, layout, count=None, **changes):
    """Sequences in a layout of layouts_for; `count` of them, by default `sequences`."""
    count = count or sequences
    return induction.repeated_sequences(count, ids=loaded.ids, bos=loaded.bos, seed=seed, **layout, **changes)


def summary(values):
    """Mean over sequences and its interval, of values (N, ...)."""
    low, high = stats.bootstrap(values, resamples, seed)
    return {'mean': values.mean(0), 'low': low, 'high': high}


def scores_of(model, repeats):
    """Scores (mean, interval) and losses on one half of the sequences; 'ranking': the mean on the other half."""
    half = len(repeats) // 2
    chosen_on = induction.head_scores(model, repeats[:half], losses=False)
    reported = induction.head_scores(model, repeats[half:])
    out = {name: dict(summary(reported[name]), ranking=chosen_on[name].mean(0)) for name in induction.SCORES}
    return dict(out, repeat_loss=summary(reported['repeat_loss']), token_losses=reported['losses'].mean(0))


def random_controls(loaded, layout):
    """Scores of randomly initialized models of the same shape: {name: (controls, L, H)}."""
    repeats, found = repeats_for(loaded, layout, count=min(sequences, 8)), []  # they hardly differ between sequences
    for number in range(controls):
        fresh = round_as(for_few_bits(forward.untrained(loaded.model, 10_000 * (seed + 1) + number), cache), cache)
        scores = induction.head_scores(fresh, repeats, losses=False)
        found.append({name: scores[name].mean(0) for name in induction.SCORES})
        found[-1]['copying'] = circuits.copying_eigenvalues(fresh, loaded.ids)
    return {name: np.stack([model[name] for model in found]) for name in found[0]}


def measure(loaded):
    """All measurements of one model: a dict of arrays and numbers."""
    model, layouts = loaded.model, layouts_for(loaded)
    as_reported = sequences - sequences // 2  # no heads are ranked here, so the ranking half isn't needed
    repeats = repeats_for(loaded, layouts['main'])
    out = dict(scores_of(model, repeats), layouts=layouts)
    out['chance'] = induction.chance(repeats)
    out['sink']['chance'] = induction.uniform_pattern(repeats.tokens.size(1))[1:, 0].mean().item()
    shuffled = repeats_for(loaded, layouts['main'], count=as_reported, shuffled=True)
    out['shuffled'] = summary(induction.head_scores(model, shuffled, losses=False)['induction'])
    random = random_controls(loaded, layouts['main'])
    out['random_init'], out['random_null'] = random['induction'], float(random['induction'].max())
    out['nulls'] = {name: float(values.max()) for name, values in random.items()}
    for name, layout in layouts.items():
        if name != 'main':
            other = repeats_for(loaded, layout, count=as_reported)
            found = induction.head_scores(model, other, losses=False)
            out[name] = {score: summary(found[score]) for score in ('induction', 'prefix_matching')}
            out[name]['chance'] = induction.chance(other)
    sample = np.random.default_rng(seed).choice(loaded.ids, min(len(loaded.ids), 32), replace=False)
    out['copying_eigenvalues'] = circuits.copying_eigenvalues(model, loaded.ids)
    out['copying_top5'] = circuits.copying_tokens(model, sample)
    try:
        out['composition_lift'] = circuits.composition(model)
    except ValueError as error:
        out['composition_lift'], out['composition_missing'] = None, str(error)
    out |= on_validation_text(loaded)
    if loaded.facts['attention'] == 'mla':
        out['latent'] = measure_latent(loaded, repeats)
    out['called'] = induction.verdict(
        out['induction']['low'], out['random_null'], out['shuffled']['high'], out['copying_eigenvalues']
    )
    out['calls'] = induction.calls(out)
    out['ranking'] = induction.ranked(out['induction']['ranking'])
    if text:
        out['text'] = measure_text(loaded)
    if ablate:
        out['ablation'] = measure_ablation(loaded, repeats[-ablate_sequences:], out['ranking'])
        if out['bigrams']:
            windows, _ = validation_text(loaded.dataset, loaded.model.config, text_windows)
            counts = [k for k in out['ablation']['counts'] if k in (1, 2, 4)]  # of text there is much more
            out['ablation']['on_text'] = induction.ablate_on_text(model, windows, out['ranking'], counts, seed=seed)
    return out


def on_validation_text(loaded):
    """The in-context score and losses at repeated bigrams in the run's own validation data; None where it has none."""
    windows = validation_text(loaded.dataset, loaded.model.config, text_windows)
    found = dict(in_context=None, bigrams=None)
    if windows is None:
        return found
    tokens, targets = windows
    losses = forward.text_losses(loaded.model, tokens)
    if ends := induction.in_context_positions(targets):
        early, late = ends
        score = losses[:, late - 2] - losses[:, early - 2]  # the first loss is that of token 2
        found['in_context'] = dict(summary(score), early=early, late=late, windows=len(score))
    if not (targets == -1).any():  # masked targets: tokens that were never trained on
        found['bigrams'] = induction.bigram_losses(losses, tokens)
    return found


def own_text(loaded):
    """Windows of --text for a model, (N, T) with T up to block_size. UserError where it can't be encoded."""
    if loaded.tokenizer is None:
        raise UserError(f'{loaded.facts["name"]} has no tokenizer, so --text can not be encoded; leave it out')
    try:
        with open(text, encoding='utf-8') as file:
            ids = loaded.tokenizer.encode(file.read(32 * text_windows * loaded.model.config.block_size))
    except UnicodeDecodeError:
        raise UserError(f'{text} is not UTF-8; --text must be a text file') from None
    T = min(loaded.model.config.block_size, len(ids))
    if T < 8:
        raise UserError(f'{text} has {len(ids)} tokens; 8 are needed at least')
    windows = min(text_windows, len(ids) // T)
    return torch.tensor(ids[: windows * T]).view(windows, T)


def measure_text(loaded):
    """Scores on --text with intervals over its windows, and what uniform attention scores."""
    windows = own_text(loaded)
    scores, chances = induction.text_scores(loaded.model, windows)
    whole = ~np.isnan(chances['induction'])
    if not whole.any():
        raise UserError(f'no token of {text} occurs twice within {windows.size(1)} tokens; choose a longer one')
    found = {name: dict(summary(values[whole]), chance=chances[name][whole].mean()) for name, values in scores.items()}
    return dict(found, file=text, windows=int(whole.sum()), tokens=windows.size(1))


def measure_latent(loaded, repeats):
    """The measurements of MLA's latent, per layer."""
    model = loaded.model
    few = repeats[-ablate_sequences:]
    moments = latent.latent_moments(model, few)
    out = {'effective_rank': [latent.effective_rank(covariance) for _, covariance in moments]}
    overlaps = [latent.reading_overlaps(block.attn) for block in model.transformer.h]
    for name in latent.READINGS:
        out[f'{name}_overlap'] = np.stack([layer[name][0] for layer in overlaps])
        out[f'{name}_overlap_chance'] = overlaps[0][name][1]
    if model.config.n_rope:
        parts = latent.logit_parts(model, repeats[len(repeats) // 2 :])
        out['logit_parts'] = {name: summary(values) for name, values in parts.items()}
    if ablate:
        found = latent.ablate_latent(model, few, moments, name=f'{loaded.facts["name"]}: latent directions')
        out['bands'] = found['bands']
        for path in ('keys', 'values'):
            out[f'{path}_ablation'] = (found[path] - found['base']).mean(-1)
    return out


def measure_ablation(loaded, repeats, ranking):
    """Increase of the loss on repeated tokens: each head alone, and the top heads together against random heads."""
    model = loaded.model
    base, alone = induction.ablate_each_head(model, repeats, name=f'{loaded.facts["name"]}: heads')
    low, high = stats.bootstrap(np.moveaxis(alone - base, -1, 0), resamples, seed)
    counts = [k for k in (1, 2, 3, 4, 6, 8, 12, 16) if k <= max(2, len(ranking) // 2)]
    together = induction.ablate_cumulatively(model, repeats, ranking, counts, seed=seed)
    return dict(base=base.mean(), rise=(alone - base).mean(-1), low=low, high=high, together=together, counts=counts)


# ---- the page and the sweep ------------------------------------------------------------------------------------------


def page_entry(loaded, result):
    """One model's data for patterns.html: a repeated sequence and, if the data is there, the start of its text."""
    shown = [('random tokens, twice', repeats_for(loaded, layouts_for(loaded)['main']).tokens[-1:])]
    if result['in_context']:
        tokens, _ = validation_text(loaded.dataset, loaded.model.config, 1)
        shown.append(('validation data', tokens[:, :96]))
    if text:
        shown.append((os.path.basename(text), own_text(loaded)[:1, :96]))
    entries = []
    for title, tokens in shown:
        pattern = forward.patterns(loaded.model, tokens.to(device))[:, 0]  # (L, H, T, T)
        words = [word(loaded, token) for token in tokens[0].tolist()]
        entries.append(dict(title=title, tokens=words, data=report.packed_patterns(pattern)))
    scores = {name: result[name]['mean'] for name in induction.SCORES} | {'copying': result['copying_eigenvalues']}
    if ablate:
        scores['ablation'] = result['ablation']['rise']
    name, (layers, heads) = report.describe(loaded.facts), scores['induction'].shape
    return dict(name=name, layers=layers, heads=heads, sequences=entries, scores=scores, called=result['calls'])


def word(loaded, token):
    """The text of a token on the page; #id if there is no tokenizer or it can't be loaded."""
    if token == loaded.bos:
        return '<bos>'
    try:
        return f'#{token}' if loaded.tokenizer is None else loaded.tokenizer.decode([token]).replace('\n', '\\n')
    except UserError:
        loaded.tokenizer = None
        return f'#{token}'


def sweep_files(folder):
    """The checkpoints of one run by iteration, one per iteration: [(iteration, file)]."""
    found = sorted(glob.glob(os.path.join(folder, 'ckpt*.pt')))
    if not found:
        raise UserError(f'{folder} has no ckpt*.pt; name the folder of a run that was trained with --keep_checkpoints')
    by_iteration = {checkpoints.load(file, mapped=True).get('iter_num', 0): file for file in found}
    trained = sorted((iteration, file) for iteration, file in by_iteration.items() if iteration)
    if not trained:
        raise UserError(f'no ckpt*.pt in {folder} is of a training that has begun; measure a conversion by --models')
    return trained


def formation(folder):
    """The best scores at each checkpoint of one run: a dict."""
    rows = []
    for iteration, file in tqdm(sweep_files(folder), desc=folder, disable=None, leave=False):
        loaded = load(file)
        layout = layouts_for(loaded)['main']
        scores = scores_of(loaded.model, repeats_for(loaded, layout))
        row = dict(iteration=iteration, file=file, val_loss=loaded.facts['val_loss'], **on_validation_text(loaded))
        row['repeat_loss'] = scores['repeat_loss']
        row['bigram_gain'] = row['bigrams'] and row['bigrams']['gain']
        for name in ('induction', 'previous_token'):
            at = induction.ranked(scores[name]['ranking'])[0]
            row[name] = dict(head=at, **report.at_head(scores[name], at))
        rows.append(row)
    run = dict(folder=folder, name=os.path.basename(os.path.normpath(folder)), attention=loaded.facts['attention'])
    null, chance = random_controls(loaded, layout)['induction'].max(), induction.chance(repeats_for(loaded, layout))
    return dict(run, random_null=float(null), chance=chance, checkpoints=rows)


# ---- measure and report ----------------------------------------------------------------------------------------------

if not models and not sweep:
    raise UserError('nothing to measure: name trained models with --models=out,out-mla, or one run with --sweep=FOLDER')
if sort not in report.SORTS:
    raise UserError(f"sort is '{sort}'; it must be {', '.join(list(report.SORTS)[:-1])} or {list(report.SORTS)[-1]}")
if text and not os.path.isfile(text):
    raise UserError(f'{text} is missing; --text must be a text file')
specs, folders = arguments.names(models, 'models'), arguments.names(sweep, 'sweep')
arguments.check_folder(out_dir)
device = machine.pick_device(device)
threads = machine.set_threads(threads)
about = dict(command=sys.argv, config=config, torch=torch.__version__)

if folders:
    runs = [formation(folder) for folder in folders]
    os.makedirs(out_dir, exist_ok=True)
    errors.output('\n'.join(report.formation_table(run) for run in runs))
    report.save_json(os.path.join(out_dir, 'formation.json'), report.plain(dict(about, runs=runs)))
    report.save_figure(os.path.join(out_dir, 'formation.png'), report.formation_curves(runs))

for spec in specs:
    loaded = load(spec)  # before the first measurement, so that a wrong name or text doesn't show after it
    if text:
        own_text(loaded)
    del loaded
results, entries = [], []
for spec in specs:
    started, loaded = time.perf_counter(), load(spec)
    errors.output(report.describe(loaded.facts))
    result = dict(loaded.facts, **measure(loaded))
    results.append(dict(result, seconds=time.perf_counter() - started))
    errors.output(report.head_table(result, show, sort) + '\n')
    if html:
        entries.append(page_entry(loaded, result))
    del loaded  # before the next model is loaded
if results:
    errors.output(report.LEGEND)
    os.makedirs(out_dir, exist_ok=True)
    report.save_json(os.path.join(out_dir, 'induction.json'), report.plain(dict(about, models=results)))
    report.save_figure(os.path.join(out_dir, 'induction_heads.png'), report.heat_maps(results))
    if html:
        report.save_text(os.path.join(out_dir, 'patterns.html'), report.page(entries))
