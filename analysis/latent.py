"""
Measurements of MLA's latent: its dimension, which directions heads read, what removing them costs, RoPE's share.

Shapes: N sequences, B in a batch, T tokens, Q scored queries per sequence, L layers, H heads, C width, r = n_latent.
Losses are in nats. The model is an MLAGPT in eval mode.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import scipy.stats
import torch
from torch import Tensor
from tqdm import tqdm

from analysis.forward import Attention, device_of, rope_of, run
from analysis.induction import Repeats, joined, repeat_losses, score_layers
from core.cli.machine import to_float64
from core.convert.factorize import Statistics
from model_mla import MLAGPT, MultiHeadLatentAttention

READINGS = ('key', 'value', 'key_value')  # what `reading_overlaps` compares


@torch.no_grad()
def latent_moments(model: MLAGPT, repeats: Repeats, batch_size: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Mean (r,) and covariance (r, r) of each layer's latent over all tokens, float64: L pairs."""
    statistics = [Statistics.empty(model.config.n_latent, device_of(model)) for _ in range(model.config.n_layer)]
    rope = rope_of(model, repeats.tokens.size(1))

    def add(layer, attention):  # no hook as core.convert.bits has it: with --cache, what is attended to is rounded
        latent = model.transformer.h[layer].attn.latent(attention.normed, rope)
        statistics[layer].add(latent[..., : model.config.n_latent])  # without the shared position key

    for part in repeats.batches(batch_size, device_of(model)):
        run(model, part.tokens, visit=add)
    return [of_layer.moments() for of_layer in statistics]


def effective_rank(covariance: Tensor) -> float:
    """exp of the entropy of the normalized eigenvalues of a covariance (r, r), 1 to r (Roy & Vetterli 2007)."""
    return float(np.exp(scipy.stats.entropy(torch.linalg.eigvalsh(covariance).clamp_min(0).numpy())))


# ---- subspaces that heads read ---------------------------------------------------------------------------------------


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """
    |Q1^T Q2|^2 / min(rank) between each row space of first (G, a, r) and each of second (H, b, r): (G, H), 0 to 1.

    1 means that one contains the other. For two random subspaces of the latent the expectation is max(a, b) / r.
    """
    bases = [torch.linalg.qr(to_float64(weights).mT)[0].mT for weights in (first, second)]  # orthonormal rows
    product = bases[0].flatten(0, 1) @ bases[1].flatten(0, 1).T
    (G, a, _), (H, b, _) = (basis.shape for basis in bases)
    return product.view(G, a, H, b).square().sum((1, 3)) / min(a, b)


@torch.no_grad()
def reading_overlaps(attn: MultiHeadLatentAttention) -> dict[str, tuple[np.ndarray, float]]:
    """
    Overlap of the latent directions that pairs of heads read, by their up-projections: {name: (array (H, H), chance)}.

    name: of READINGS; 'key_value'[g, h] compares head g's keys with head h's values.
    """
    w_k, w_v, _ = attn.up_weights()
    pairs = dict(zip(READINGS, ((w_k, w_k), (w_v, w_v), (w_k, w_v)), strict=True))
    return {
        name: (overlap(a, b).cpu().numpy(), min(1.0, max(a.size(1), b.size(1)) / attn.n_latent))
        for name, (a, b) in pairs.items()
    }


# ---- ablations -------------------------------------------------------------------------------------------------------


def latent_bands(r: int, bands: int) -> list[tuple[int, int]]:
    """Ranges (first, last) of the r principal components, largest first: min(bands, r) of nearly equal size."""
    edges = np.linspace(0, r, min(r, bands) + 1).round().astype(int)
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


def without_directions(layer: int, basis: Tensor, mean: Tensor, path: str) -> Callable:
    """
    A `qkv` for forward.run: in `layer`, the latent's coordinates along basis (r, n) are set to their mean.

    mean (r,): of the latent. path: 'keys' or 'values', the only one that is computed from the changed latent.
    """

    def qkv(this_layer, attn, normed, rope):
        if this_layer != layer:
            return attn.qkv(normed, rope)
        latent = attn.latent(normed, rope)
        changed = latent.clone()
        content = changed[..., : attn.n_latent]
        content -= (content - mean) @ basis @ basis.T
        k, _ = attn.decompress(changed if path == 'keys' else latent)
        _, v = attn.decompress(changed if path == 'values' else latent)
        return attn.queries(normed, rope), k, v

    return qkv


@torch.no_grad()
def ablate_latent(
    model: MLAGPT, repeats: Repeats, moments: list[tuple[Tensor, Tensor]], bands: int = 16, name: str = ''
) -> dict:
    """
    The loss on repeated tokens with bands of a layer's latent directions set to their mean, for keys or values only.

    The directions are the latent's principal components, in bands from the largest variance down. moments: of
    `latent_moments`. name: of the progress bar. Returns bands, ranges of components; base (N,), the loss
    without ablation; keys and values (L, bands, N).
    """
    repeats = repeats.to(device_of(model))
    ranges, like = latent_bands(model.config.n_latent, bands), model.lm_head.weight
    shape = (model.config.n_layer, len(ranges), len(repeats))
    out = {'keys': np.zeros(shape, np.float32), 'values': np.zeros(shape, np.float32)}
    for layer, (mean, covariance) in enumerate(tqdm(moments, desc=name, leave=False, disable=None)):
        components = torch.linalg.eigh(covariance)[1].flip(-1).to(like)
        for path, band in [(path, band) for path in out for band in range(len(ranges))]:
            first, last = ranges[band]
            changed = without_directions(layer, components[:, first:last], mean.to(like), path)
            hidden = run(model, repeats.tokens, qkv=changed)
            out[path][layer, band] = repeat_losses(model, hidden, repeats).mean(1).cpu()
    return dict(out, bands=ranges, base=repeat_losses(model, run(model, repeats.tokens), repeats).mean(1).cpu().numpy())


# ---- decoupled RoPE --------------------------------------------------------------------------------------------------


@torch.no_grad()
def logit_parts(model: MLAGPT, repeats: Repeats, batch_size: int = 16) -> dict[str, np.ndarray]:
    """
    Content and position parts of the attention logit under decoupled RoPE: {'content', 'position'} -> array (N, L, H).

    Each is that part of the scaled logit at the induction target minus its mean over the keys the query sees, averaged
    over queries.
    """

    def split_logits(part: Repeats, layer: int, a: Attention) -> dict[str, Tensor]:
        attn, parts = model.transformer.h[layer].attn, {}
        sequence = torch.arange(len(part), device=part.tokens.device)[:, None]
        visible = (torch.arange(part.tokens.size(1), device=part.tokens.device) <= part.query[..., None])[:, :, None]
        target = (part.match + 1)[:, :, None, None].expand(-1, -1, a.q.size(1), 1)
        for name, cut in (('content', slice(None, attn.n_nope)), ('position', slice(attn.n_nope, None))):
            logits = (a.q[..., cut] @ a.k[..., cut].mT * attn.scale)[sequence, :, part.query]
            mean = (logits * visible).sum(-1) / visible.sum(-1)  # (B, Q, H)
            parts[name] = (logits.gather(-1, target).squeeze(-1) - mean).mean(1)
        return parts

    batches = repeats.batches(batch_size, device_of(model))
    return joined([score_layers(model, part.tokens, partial(split_logits, part))[1] for part in batches])
