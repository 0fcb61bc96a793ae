"""studies/staircase.py and the variants of MLA: each step is what it says, grids grow, and finished runs are kept."""

import json
import re

import pytest
import torch
from support import forking

from analysis.rotation import PARTS, REPLACEMENTS
from core.runs import checkpoint as checkpoints
from core.runs import models
from model import GPT, GPTConfig
from model_mla import MLAConfig
from studies import variants

SIZES = dict(block_size=16, vocab_size=20, n_layer=2, n_head=4, n_embd=32, bias=False, pos='rope', n_rope=4)


def make(name, **more):
    return variants.VARIANTS[name](MLAConfig(**{**SIZES, 'n_latent': 12, 'latent_norm': True, **more})).eval()


@pytest.mark.parametrize('name', variants.VARIANTS)
def test_variants_decode_absorbed_as_they_train(name):
    model, idx = make(name).double(), torch.randint(20, (2, 12))
    together, cache = model(idx, targets=idx)[0], model.init_cache(2, 12, torch.float64)
    parts = [model(idx[:, t : t + 1], cache=cache)[0] for t in range(12)]
    torch.testing.assert_close(torch.cat(parts, 1), together, atol=1e-12, rtol=0)


def test_what_is_trained():
    for name, trained in (('mla_frozen', 0), ('mla_shared', 1), ('mla_slice', 0)):
        model = make(name)
        downs = {p for n, p in model.named_parameters() if 'c_latent' in n and p.requires_grad}
        assert len(downs) == trained, name
    shared = make('mla_shared')
    assert shared.transformer.h[0].attn.c_latent is shared.transformer.h[1].attn.c_latent


def test_a_slice_of_full_rank_is_mha_whose_heads_share_the_rotated_key():
    """MHA with half of each head rotated, where all heads' rotated keys are the same, gives the same logits."""
    step = make('mla_slice', n_latent=32, n_nope=4, latent_norm=False)
    mha = GPT(GPTConfig(**SIZES)).eval()
    state = {name: t for name, t in step.state_dict().items() if '.attn.c_' not in name or 'c_proj' in name}
    for n in range(2):
        attn = step.transformer.h[n].attn
        keys, values = attn.c_kv_up.weight.split((16, 32))
        shared = attn.c_kv_down.weight.expand(4, -1, -1)
        k = torch.cat((keys.unflatten(0, (4, 4)), shared), dim=1).flatten(0, 1)
        state[f'transformer.h.{n}.attn.c_attn.weight'] = torch.cat((attn.c_q.weight, k, values))
    mha.load_state_dict(state)
    idx = torch.randint(20, (2, 16))
    torch.testing.assert_close(mha(idx, targets=idx)[0], step(idx, targets=idx)[0], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_variant_trains_resumes_and_is_refused_by_the_scripts(tmp_path, data_dir):
    keys = ['train.py', '--attention=mla_shared', '--pos=rope', f'--data_dir={data_dir}', f'--out_dir={tmp_path}/out',
            '--dataset=tiny', '--device=cpu', '--n_layer=2', '--n_head=2', '--n_embd=16', '--block_size=8',
            '--batch_size=2', '--gradient_accumulation_steps=1', '--eval_iters=1']  # fmt: skip
    for iterations in (2, 4):
        done = forking.run('studies/with_variants.py', [*keys, f'--max_iters={iterations}', '--resume=auto'])
        assert done.returncode == 0, done.stderr
    assert checkpoints.load(tmp_path / 'out/ckpt.pt')['attention'] == 'mla_shared'
    done = forking.run('sample.py', [f'--out_dir={tmp_path}/out'])
    assert done.returncode and "attention is 'mla_shared'; only mha and mla are supported" in done.stderr


LATENT = dict(attention='mla', n_nope=8, n_rope=8)
STEPS = {
    's0--mha--rope-on-whole-heads': {},
    's1--half-of-each-head-rotated': dict(n_rope=8),
    's2--the-rotated-key-shared': LATENT | dict(attention='mla_slice', n_latent=64),
    's3--keys-and-values-from-a-latent--r---c': LATENT | dict(n_latent=64),
    's4--r---c-2': LATENT | dict(n_latent=32),
    's5--rotated-beside-the-content': LATENT | dict(n_latent=32, n_nope=16),
}


def plant(out, slug, rate, seed, loss):
    """A run that was trained with a step's keys, of two tiny layers, with this validation loss: its folder."""
    folder = out / '4' / f'{slug}_lr{rate:g}_s{seed}'
    folder.mkdir(parents=True)
    keys = dict(pos='rope', kv_rms=0.5, learning_rate=rate, min_lr=rate / 10, seed=seed, max_iters=4, lr_decay_iters=4)
    keys |= dict(dtype='float32', compile=False)
    model = GPT(GPTConfig(**{**SIZES, 'n_rope': 0}), seed)
    torch.save(models.contents(model, keys | STEPS[slug], val_loss=loss), folder / 'ckpt_000004.pt')
    return folder


def with_a_head(folder):
    """Measurements of a run whose best induction head scores 0.9, and 0.3 without the content part."""
    replaced = {
        part: {how: dict(score=0.3 if part == 'content' else 0.8, rise=0.1) for how in REPLACEMENTS} for part in PARTS
    }
    heads = {name: dict(at=[1, 0], score=0.9, replaced=replaced) for name in ('induction', 'previous_token')}
    found = dict(curve=[[4, 0.9]], score=0.9, formed=4, loss=0.1, longer={'2': 0.2, '4': 0.3}, heads=heads)
    (folder / 'measured.json').write_text(json.dumps(found))


@pytest.mark.slow
def test_the_grid_grows_and_the_best_rate_is_reported(tmp_path):
    for slug in STEPS:
        best = 8e-3 if slug.startswith('s0') else 2e-3
        for rate in (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2):
            plant(tmp_path, slug, rate, 5000, 1 + abs(rate - best))
        for seed in (6000, 6001):
            folder = plant(tmp_path, slug, best, seed, 1.0)
            if slug.startswith('s0'):
                with_a_head(folder)
    (tmp_path / 'data/repeats').mkdir(parents=True)
    (tmp_path / 'data/repeats/train.bin').touch()
    keys = [f'--out_dir={tmp_path}', f'--data_dir={tmp_path}/data', '--max_iters=4', '--jobs=1']
    done = forking.run('studies/staircase.py', keys, 200)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / 'staircase.json').read_text())
    assert list(numbers['rates'].values()) == [8e-3, *[2e-3] * 5]
    assert list(numbers['tuning']['S0: MHA, RoPE on whole heads']) == ['0.001', '0.002', '0.004', '0.008', '0.016']
    assert len(numbers['runs']) == 12 and sum(run['formed'] == 4 for run in numbers['runs']) == 2
    # two runs that form heads at once against two that never do, five times: p = 0.0833 each, 0.4163 by Holm
    assert len(re.findall(r'\| 0 of 2 \| 0\.4163 \|', done.stdout)) == 5
    assert done.stdout.count('| S0: MHA, RoPE on whole heads | 2 | 0.900 | 0.300 | 0.300 | 0.800 |') == 2
    assert all(set(run['longer']) == {'2', '4'} for run in numbers['runs'])
    again = forking.run('studies/staircase.py', [f'--reuse={tmp_path}/staircase.json', f'--out_dir={tmp_path}/again'])
    assert again.stdout == done.stdout and '| S0: MHA, RoPE on whole heads | 0.008 |' in done.stdout
    assert (tmp_path / 'again/staircase.png').read_bytes().startswith(b'\x89PNG')
