"""Models for the tests of analysis/: random ones of every variant, and ones with known heads."""

import numpy as np
import torch

from analysis import induction
from core.runs import checkpoint, models
from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig
from support.models import randomized

V, T, D = 24, 20, 34  # tokens, positions and head size of the planted models
L = 9  # length of the repeated block; with BOS a sequence has 2L + 1 = 19 tokens
TOKEN, POSITION, BEFORE = slice(0, V), slice(V, V + T), slice(V + T, 2 * V + T)  # subspaces of the residual stream
BOS, IDS = V - 1, np.arange(V - 1)

VARIANTS = {
    'mha': (GPT, GPTConfig, {}),
    'mha-rope': (GPT, GPTConfig, dict(pos='rope')),
    'mla': (MLAGPT, MLAConfig, dict(n_latent=12)),
    'mla-narrow': (MLAGPT, MLAConfig, dict(n_latent=5)),
    'mla-published': (MLAGPT, MLAConfig, dict(pos='rope', n_latent=12, n_latent_q=10, latent_norm=True)),
}


def random_model(variant, n_layer=2, **changes):
    """A small model with all parameters random, in float64 and eval mode."""
    model_class, config_class, special = VARIANTS[variant]
    sizes = dict(block_size=32, vocab_size=40, n_layer=n_layer, n_head=4, n_embd=32)
    return randomized(model_class(config_class(**{**sizes, **special, **changes})).double(), 0.2)


def read(part, size=D):
    """A weight (size, C) that copies a subspace of the residual stream to a head's first dimensions."""
    weight = torch.zeros(size, 2 * V + T)
    weight[: part.stop - part.start, part] = torch.eye(part.stop - part.start)
    return weight


def set_head(model, layer, head, q, k, v, o):
    """Set one head's weights: q, k, v (D, C) and o (C, D). MLA's latent holds the keys' subspace, then the values'."""
    attn, rows = model.transformer.h[layer].attn, slice(head * D, head * D + D)
    attn.c_proj.weight[:, rows] = o
    if isinstance(model, GPT) and not isinstance(model, MLAGPT):
        for part, weight in zip(attn.c_attn.weight.split(2 * D), (q, k, v), strict=True):
            part[rows] = weight
        return
    attn.c_q.weight[rows] = q
    w_k, w_v = attn.c_kv_up.weight.split(2 * D)
    used = [weight[weight.abs().sum(1) > 0] for weight in (k, v)]  # the directions that keys and values read
    n = len(used[0])
    attn.c_kv_down.weight[: n + len(used[1])] = torch.cat(used)
    w_k[rows, :n] = torch.eye(D)[:, :n]
    w_v[rows, n : n + len(used[1])] = torch.eye(D)[:, : len(used[1])]


@torch.no_grad()
def planted(kind, sharpness=100.0, by_position=False):
    """
    A model with a previous-token head 0.0 and an induction head 1.1 that copies; the other two attend uniformly.

    kind: 'mha' or 'mla'. sharpness: scale of the queries; 0 makes all heads uniform. by_position: head 1.1 attends
    L - 1 tokens back instead, which looks like induction on a repeat.
    """
    sizes = dict(block_size=T, vocab_size=V, n_layer=2, n_head=2, n_embd=2 * V + T)
    model = MLAGPT(MLAConfig(n_latent=48, **sizes)) if kind == 'mla' else GPT(GPTConfig(**sizes))
    for name, parameter in model.named_parameters():
        if 'ln_' not in name:
            parameter.zero_()
    model.transformer.wte.weight[:, TOKEN] = torch.eye(V)
    model.transformer.wpe.weight[:, POSITION] = torch.eye(T)
    model.transformer.ln_f.weight.fill_(5.0)
    back = read(POSITION)
    write_before, write_token = torch.zeros(2 * V + T, D), torch.zeros(2 * V + T, D)
    write_before[BEFORE, :V] = torch.eye(V) / 6  # the norm scales a 1 to about 6
    write_token[TOKEN, :V] = torch.eye(V)
    set_head(model, 0, 0, sharpness * back.roll(-1, 0), back, read(TOKEN), write_before)
    if by_position:
        set_head(model, 1, 1, sharpness * back.roll(-(L - 1), 0), back, read(TOKEN), write_token)
    else:
        set_head(model, 1, 1, sharpness * read(TOKEN), read(BEFORE), read(TOKEN), write_token)
    return model.eval()


def repeats(count=32, **changes):
    """Sequences for the planted models: [BOS] x x."""
    return induction.repeated_sequences(count, L, **{**dict(ids=IDS, bos=BOS, seed=5), **changes})


def save(folder, model, **changes):
    """A checkpoint of `model` in `folder` as of a trained run; `changes` replace its keys. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    state = models.contents(model, {'dataset': 'none'}, val_loss=1.25, best_val_loss=1.25, iter_num=40)
    checkpoint.save(str(folder / 'ckpt.pt'), {**state, **changes})
    return folder
