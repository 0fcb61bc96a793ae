"""
SmolLM2-135M as MLA: what converting it costs on text, in two forms and at three sizes, and what fine-tuning gives back.

$ python data/smollm2/prepare.py
$ python data/code/prepare.py --tokenizer=data/smollm2 --packages=stdlib --megabytes=8 --name=smollm2-python
$ python data/text/prepare.py --tokenizer=data/smollm2 --documents=line --input=reviews.txt.gz --name=smollm2-reviews
$ python studies/smollm2.py                   # a short form: half of the cache alone, no fine-tuning
$ python studies/smollm2.py --full=True       # every size, and fine-tuning at half of the cache: hours on two cores

1. Both forms of core/convert are made at 1/2, 1/4 and 1/8 of the cache: keys that are decompressed and then rotated,
   and the published shape. Statistics are of the training splits of both texts, losses of their validation splits.
2. The original and the model in the published shape at 1/2 are fine-tuned on the first text, on the same batches, each
   with the rate of `rates` that has the lowest validation loss. So is the conversion of cacheshrink (the package
   index, 0.1.5), where it is installed: its two latents are one here, whose up-projection begins with zeros between
   keys and values. Losses are relative to the fine-tuned original, on the text that was trained on and on the other.

Finished parts are kept: repeat the command to continue, also in the middle of a training. Writes smollm2.json.
Run it from the repository root.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from core.cli.keys import begin

begin(__file__)  # before the slow imports

import importlib.util
import os

import torch

from core.cli import arguments, errors, files, machine, subprocesses
from core.cli.errors import UserError
from core.convert.factorize import collect_statistics, layers, like, to_mla, training_text
from core.convert.factorize_rope import collect_inputs, to_published_mla
from core.convert.llama import to_neighbors
from core.runs import checkpoint as checkpoints
from core.runs import evaluation, models
from core.text.dataset import TokenData
from core.text.tokenizer import load_tokenizer
from model_mla import MLAGPT, MLAConfig
from ops.kernels import repeat_heads
from studies.measure import read_json

# ----------------------------------------------------------------------------------------------------------------------
out_dir = 'out-smollm2'  # the models and smollm2.json
source = 'data/smollm2'  # a model with grouped-query attention and RoPE: a checkpoint or what else sample.py reads
texts = 'smollm2-python,smollm2-reviews'  # two data sets in its tokens
data_dir = 'data'
full = False  # every size, and fine-tuning
eval_tokens = 6144  # for each loss
max_iters = 0  # of fine-tuning; 0: 500, in the short form none
rates = '3e-5,1e-4'  # learning rates to choose from
context = 256  # tokens of a window
threads = 1
exec(open(Path(__file__).resolve().parents[1] / 'configurator.py', encoding='utf-8').read())
# ----------------------------------------------------------------------------------------------------------------------

STATISTICS = 8192  # tokens of each text
# parts of the cache, and the part of a head that stays rotated in the published shape
PARTS = {2: 2, 4: 2, 8: 4} if full else {2: 2}
PEER = 'cacheshrink'
windows, iterations = eval_tokens // context, max_iters or (500 if full else 0)
results = os.path.join(out_dir, 'smollm2.json')
arguments.check_folder(out_dir)
machine.set_threads(threads)
corpora = arguments.names(texts, 'texts')
if len(corpora) != 2:
    raise UserError(f'texts is {texts}; name two data sets, the first of which is trained on')
data = {name: TokenData(os.path.join(data_dir, name), context) for name in corpora}
about, rows = dict(source=source, texts=corpora, context=context, windows=windows), {}
if os.path.exists(results):
    earlier = read_json(results)
    if wrong := [key for key, value in about.items() if earlier.get(key, value) != value]:
        raise UserError(f'{results} was measured with another {", ".join(wrong)}; choose another --out_dir')
    rows = earlier['rows']
os.makedirs(out_dir, exist_ok=True)


def report(name, model, reference, **more):
    """Measure a model on both texts, and keep its row; `reference` names the row that its losses are relative to."""
    row = dict(cache_bytes_per_token=model.init_cache(1).bytes_per_token, **more)
    for corpus in corpora:
        losses = evaluation.window_losses(model, data[corpus], 'val', windows, batch_size=4)
        row[corpus] = dict(losses=losses.tolist(), loss=losses.mean().item())
        if reference:
            rise = losses - torch.tensor(rows[reference][corpus]['losses'], dtype=losses.dtype)
            row[corpus]['rise'], row[corpus]['rise_stderr'] = evaluation.mean_and_stderr(rise)
    rows[name] = row
    files.write_json(results, dict(about, settings=config, rows=rows))
    said = (f'{corpus} {row[corpus]["loss"]:.4f} ({row[corpus].get("rise", 0):+.4f})' for corpus in corpora)
    errors.output(f'{name:40} {row["cache_bytes_per_token"]:>8,} bytes/token   {"   ".join(said)}')


def folder_of(name):
    """The folder of a model of this study."""
    return os.path.join(out_dir, name.replace(', ', '-').replace(' ', '-').replace('/', '-'))


def keep(name, model):
    """Write a model's checkpoint, from which fine-tuning starts."""
    contents = models.contents(model, {}, tokenizer=saved['tokenizer'], corpus=saved['corpus'])
    os.makedirs(folder_of(name), exist_ok=True)
    checkpoints.save(os.path.join(folder_of(name), 'ckpt.pt'), contents)


# ---- 1. conversions --------------------------------------------------------------------------------------------------

model, saved = models.pretrained(source)
cached = 2 * model.config.kv_heads * model.config.head_size
if 'original' not in rows:
    report('original', model, None)
sample = [batch for corpus in corpora for batch in training_text(data[corpus], STATISTICS // context, 4)]
wanted = {f'{form}, 1/{part}': (form, part) for part in PARTS for form in ('decompressed', 'published')}
wanted = {name: what for name, what in wanted.items() if name not in rows}
if wanted:
    statistics, inputs = collect_statistics(model, sample), collect_inputs(model, sample)
for name, (form, part) in wanted.items():
    if form == 'published':
        n_rope = model.config.head_size // PARTS[part]
        converted = to_published_mla(model, statistics, inputs, cached // part - n_rope, n_rope)
    else:
        converted = to_mla(model, cached // part, statistics)
    keep(name, converted)
    report(name, converted, 'original', n_latent=converted.config.n_latent, n_rope=converted.config.n_rope)

# ---- 2. fine-tuning --------------------------------------------------------------------------------------------------


def peer_model():
    """The model as cacheshrink converts it at half of the cache, keys and values apart, in our class."""
    from cacheshrink import convert_to_mla

    exported = os.path.join(out_dir, 'hf')
    subprocesses.run_script('export_hf.py', [dict(source=source, out_dir=exported, overwrite=True)], out_dir)
    tokenizer = load_tokenizer(saved['tokenizer'])
    how = dict(calibration_texts=[tokenizer.decode(row) for batch in sample for row in batch.tolist()], verbose=False)
    theirs, _ = convert_to_mla(exported, 2.0, 'separate', device='cpu', dtype=torch.float32, **how)
    shape = {**models.model_args(model.config), 'n_kv_head': 0, 'n_latent': cached // 2, 'shared_rope': False}
    new, K, H = like(model, MLAGPT, MLAConfig(**shape)), model.config.kv_heads, model.config.n_head
    for old, block, other in zip(layers(model), layers(new), theirs.model.layers, strict=True):
        attention, found = block.attn, other.self_attn.mla.mla_compression
        attention.c_q.weight.copy_(old.attn.c_attn.weight[: model.config.n_embd])
        attention.c_kv_down.weight.copy_(torch.cat((found.W_down_k.weight, found.W_down_v.weight)))
        parts = to_neighbors(found.W_uk, K), found.W_uv
        ups = [repeat_heads(part.unflatten(0, (K, -1)), H, dim=0).flatten(0, 1) for part in parts]
        attention.c_kv_up.weight.copy_(torch.block_diag(*ups))
    return new


def tuned(name, start):
    """Fine-tune `start` with each of `rates`; report the one with the lowest validation loss on the first text."""
    attention, found = 'mha' if name == 'original' else 'mla', {}
    for rate in arguments.names(rates, 'rates'):
        folder = folder_of(f'{name}-{rate}')
        keys = dict(init_from=start, out_dir=folder, dataset=corpora[0], data_dir=data_dir, block_size=context)
        keys |= dict(attention=attention, max_iters=iterations, lr_decay_iters=iterations, learning_rate=rate)
        keys |= dict(min_lr=float(rate) / 10, warmup_iters=max(1, iterations // 20), weight_decay=0.0, resume='auto')
        keys |= dict(batch_size=4, gradient_accumulation_steps=1, device='cpu', dtype='auto', threads=threads)
        keys |= dict(eval_iters=6, eval_interval=max(1, iterations // 4), checkpoint_interval=20, log_interval=5)
        subprocesses.run_script('train_mla.py' if attention == 'mla' else 'train.py', [keys], folder)
        found[rate] = checkpoints.load(folder, mapped=True)['val_loss']
    best = min(found, key=found.get)
    finished = models.build_model(checkpoints.load(folder_of(f'{name}-{best}')))
    reference = None if name == 'original' else 'original, fine-tuned'
    report(f'{name}, fine-tuned', finished, reference, rate=best, rates=found, tokens=iterations * 4 * context)


if iterations:
    starts = {'original': source, 'published, 1/2': folder_of('published, 1/2')}
    if importlib.util.find_spec(PEER):
        name = f'{PEER}, 1/2'
        if name not in rows:
            with torch.no_grad():
                converted = peer_model()
            keep(name, converted)
            report(name, converted, 'original')
        starts[name] = folder_of(name)
    for name, start in starts.items():
        if f'{name}, fine-tuned' not in rows:
            tuned(name, start)
errors.output(results)
