"""
What attention heads read and write, from the weights alone: OV and QK circuits, copying scores, composition.

Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits". Works for GPT, MLAGPT and HFModel, whose
weights are seen by what it does with a token that stands alone.

Shapes: L layers, H heads, C width, d size of a query and a key, d_v of a value (both C/H in MHA), V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from analysis.forward import Model, device_of, logits, run
from analysis.hf_model import HFModel, through_norm
from core.cli.machine import to_float64
from model import GPT, CausalSelfAttention
from model_mla import MultiHeadLatentAttention
from ops.kernels import repeat_heads


def head_weights(attn: CausalSelfAttention | MultiHeadLatentAttention) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    Each head's weights on the layer's normed input: W_Q, W_K (H, d, C), W_V (H, d_v, C) and W_O (H, C, d_v).

    Biases and positions are left out. MLA's projections are multiplied out, with the gains
    of the latents' norms folded in; what remains of such a norm is one positive factor per token. MLA's keys end in the
    rows that RoPE rotates, which all heads share.
    """
    H = attn.n_head
    w_o = attn.c_proj.weight.unflatten(1, (H, -1)).transpose(0, 1)
    if isinstance(attn, CausalSelfAttention):
        heads = attn.c_attn.weight.unflatten(0, (-1, attn.head_size)).split((H, attn.kv_heads, attn.kv_heads))
        w_q, w_k, w_v = (repeat_heads(w, H, dim=0) for w in heads)
        return w_q, w_k, w_v, w_o
    w_k, w_v, _ = attn.up_weights()
    down, shared = attn.c_kv_down.weight.split((attn.n_latent, attn.n_rope))
    down, w_q = with_gain(down, attn.kv_norm), attn.c_q.weight
    if hasattr(attn, 'c_q_down'):
        w_q = w_q @ with_gain(attn.c_q_down.weight, attn.q_norm)
    w_k = torch.cat((w_k @ down, shared.expand(H, -1, -1)), dim=1)
    return w_q.unflatten(0, (H, -1)), w_k, w_v @ down, w_o


def with_gain(weight: Tensor, norm: nn.Module) -> Tensor:
    """A projection (n, C) with the gain of the norm of its output folded in; an Identity has none."""
    gain = getattr(norm, 'weight', None)
    return weight if gain is None else gain[:, None] * weight


def stream_weights(model: Model, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`head_weights` on the residual stream: ln_1's gain and mean subtraction are folded into W_Q, W_K and W_V."""
    if isinstance(model, HFModel):
        return model.stream_weights(layer)
    block = model.transformer.h[layer]
    *reading, w_o = head_weights(block.attn)
    norm: Any = block.ln_1
    w_q, w_k, w_v = (through_norm(w, norm.weight, isinstance(norm, nn.LayerNorm)) for w in reading)
    return w_q, w_k, w_v, w_o


# ---- copying ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def effective_embeddings(model: Model, ids: np.ndarray | Tensor, batch_size: int = 1024) -> Tensor:
    """
    Token embeddings (n, C) as later layers see them: E + MLP_0(E), without block 0's attention and without positions.

    ids: token ids (n,). GPT-2's MLP 0 rewrites the embedding; with raw E, heads that copy appear not to. In a HFModel
    the bias of block 0's attention stays.
    """
    parts = []
    for chunk in torch.as_tensor(ids, device=device_of(model)).split(batch_size):
        if isinstance(model, HFModel):
            x = model.embeddings(chunk[:, None])
            if model.config.n_layer > 1:
                x = model.run(chunk[:, None], x, stop=1, edit=lambda layer, z: torch.zeros_like(z))
            parts.append(x[:, 0])
        else:
            block, x = model.transformer.h[0], model.transformer.wte(chunk)
            parts.append(x + block.mlp(block.ln_2(x)))
    return torch.cat(parts)


@torch.no_grad()
def values_alone(model: Model, layer: int, x: Tensor) -> Tensor:
    """The heads' values (n, H, d_v) in a layer for tokens with residual streams x (n, C) that see only themselves."""
    found: list[Tensor] = []

    def keep(layer: int, z: Tensor) -> Tensor:
        found.append(z[:, :, 0])
        return z

    alone = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
    run(model, alone, x[:, None], layer, layer + 1, edit=keep)
    return found[0]


@torch.no_grad()
def copying_eigenvalues(model: Model, ids: np.ndarray | Tensor) -> np.ndarray:
    """
    Copying score of every head: Re(sum lambda) / sum |lambda| over the eigenvalues of W_U W_OV W_E, array (L, H).

    Between -1 and 1; 1 is pure copying (Elhage et al. 2021). ids: token ids (n,) that W_E and W_U are restricted to.
    W_E are the `effective_embeddings`. The V x V product has the nonzero eigenvalues of the d_v x d_v product
    W_V W_E W_U W_O. Embeddings are normed as by ln_1; the gains of ln_1 and ln_f are folded in. Of a HFModel, W_V W_E
    are the values of tokens alone without their constant part, and at most 2048 of the ids are taken.
    """
    ids = torch.as_tensor(ids, device=device_of(model))
    products = products_of_values(model, ids) if isinstance(model, HFModel) else products_of_weights(model, ids)
    scores = []
    for product in products:
        values = torch.linalg.eigvals(to_float64(product))
        scores.append(values.real.sum(-1) / values.abs().sum(-1).clamp_min(1e-30))
    return torch.stack(scores).cpu().numpy()


def products_of_weights(model: GPT, ids: Tensor) -> Iterator[Tensor]:
    """W_V W_E W_U W_O (H, d_v, d_v) of each layer, from the weights."""
    C, gain = model.config.n_embd, model.transformer.ln_f.weight
    middle = torch.zeros(C, C, device=gain.device, dtype=gain.dtype)
    subtracts_mean = isinstance(model.transformer.ln_f, nn.LayerNorm)
    norm = F.layer_norm if subtracts_mean else F.rms_norm
    for chunk in ids.split(1024):
        unembedding = through_norm(model.lm_head.weight[chunk], gain, subtracts_mean)
        middle += norm(effective_embeddings(model, chunk), (C,)).T @ unembedding
    for layer in range(model.config.n_layer):
        _, _, w_v, w_o = stream_weights(model, layer)
        yield w_v @ middle @ w_o


def products_of_values(model: HFModel, ids: Tensor) -> Iterator[Tensor]:
    """The same from the values of tokens alone."""
    ids = ids[torch.linspace(0, len(ids) - 1, min(len(ids), 2048)).long()]
    embedding, unembedding = effective_embeddings(model, ids), model.unembedding(ids)
    for layer in range(model.config.n_layer):
        values = values_alone(model, layer, embedding) - values_alone(model, layer, torch.zeros_like(embedding[:1]))
        yield torch.einsum('nhv,nc,hcw->hvw', values, unembedding, model.output_weights(layer))


@torch.no_grad()
def copying_tokens(model: Model, ids: np.ndarray | Tensor) -> np.ndarray:
    """
    The fraction of tokens `ids` (n,) that a head attending to them ranks among its five top logits: array (L, H).

    Wang et al. 2022 (arXiv:2211.00593), section 3.3: the effective embedding through ln_1, OV, ln_f and unembedding.
    """
    ids = torch.as_tensor(ids, device=device_of(model))
    embedding, n_head = effective_embeddings(model, ids), model.config.n_head
    step = max(1, 2**24 // model.config.vocab_size)  # as many logits are in memory at a time
    own_id, fractions = ids.repeat_interleave(n_head), []
    for layer in range(model.config.n_layer):
        if isinstance(model, HFModel):
            w_o = model.output_weights(layer)
        else:
            w_o = head_weights(model.transformer.h[layer].attn)[3]
        out = torch.einsum('nhd,hcd->nhc', values_alone(model, layer, embedding), w_o).flatten(0, 1)
        hits = []
        for rows, own in zip(out.split(step), own_id.split(step), strict=True):
            normed = run(model, own[:, None], rows[:, None], start=model.config.n_layer)[:, 0]
            scores = logits(model, normed)
            hits.append((scores >= scores.gather(1, own[:, None])).sum(1) <= 5)  # counts the token itself and ties
        fractions.append(torch.cat(hits).view(-1, n_head).float().mean(0))
    return torch.stack(fractions).cpu().numpy()


# ---- composition -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def composition(model: Model) -> dict[str, np.ndarray]:
    """
    How strongly each head reads what each head of an earlier layer writes: {'q', 'k', 'v'} -> lift (L, H, L, H).

    Entry [l1, h1, l2, h2] is nan unless l1 < l2. Elhage et al. 2021 define the scores, in row-vector convention, as
      k: |W_OV1 W_QK2^T| / (|W_OV1| |W_QK2|)   q: |W_OV1 W_QK2| / (..)   v: |W_OV1 W_OV2| / (|W_OV1| |W_OV2|)
    in Frobenius norms. Lift is C score^2. With a random rotation between the two circuits its expectation is 1 at any
    rank, so MHA and MLA can be compared. All norms come from a head's small Gram matrices. Raises ValueError for a
    HFModel whose weights have other shapes.
    """
    L, H, C = model.config.n_layer, model.config.n_head, model.config.n_embd
    lift = {kind: np.full((L, H, L, H), np.nan, dtype=np.float32) for kind in 'qkv'}
    layers = []
    for layer in range(L):
        q, k, v, o = stream_weights(model, layer)
        grams = dict(q=q @ q.mT, k=k @ k.mT, v=v @ v.mT, o=o.mT @ o)
        layers.append((dict(q=q, k=k, v=v, o=o), grams))
    for second in range(1, L):
        weights, grams = layers[second]
        qk, ov = (grams['q'] * grams['k']).sum((-2, -1)), (grams['v'] * grams['o']).sum((-2, -1))
        for first in range(second):
            earlier, earlier_grams = layers[first]
            ov1 = (earlier_grams['v'] * earlier_grams['o']).sum((-2, -1))
            for kind, other, norm in (('q', 'k', qk), ('k', 'q', qk), ('v', 'o', ov)):
                # (W_2 W_O1)^T of all pairs in one product: (H2 d2, C) (C, H1 d1) -> (H1, H2, d1, d2)
                product = weights[kind].flatten(0, 1) @ earlier['o'].transpose(0, 1).flatten(1)
                middle = product.view(H, -1, H, product.size(1) // H).permute(2, 0, 3, 1)
                # |A^T M B|^2 from M and the Gram matrices A A^T and B B^T
                squared = (earlier_grams['v'][:, None] @ middle @ grams[other][None] * middle).sum((-2, -1))
                lift[kind][first, :, second] = (
                    (C * squared / (ov1[:, None] * norm[None]).clamp_min(1e-30)).float().cpu()
                )
    return lift
