"""
What attention heads read and write, from the weights alone: OV and QK circuits, copying scores, composition.

Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits". Works for GPT and MLAGPT: both have
`attn.head_weights()`.

Shapes: L layers, H heads, C width, d head size, V vocabulary.
"""

import numpy as np
import torch
from torch.nn import functional as F

from analysis.forward import device_of, rope_of
from core.cli.machine import to_float64
from ops.kernels import repeat_heads


@torch.no_grad()
def circuits(attn):
    """W_QK and W_OV of every head, both (H, C, C), on the layer's normed input x: scores x^T W_QK x, output W_OV x."""
    w_q, w_k, w_v, w_o = attn.head_weights()
    return w_q.transpose(1, 2) @ w_k, w_o @ w_v


def stream_weights(block):
    """`head_weights` on the residual stream: ln_1's gain and mean subtraction are folded into W_Q, W_K and W_V."""
    w_q, w_k, w_v, w_o = block.attn.head_weights()
    folded = [w * block.ln_1.weight for w in (w_q, w_k, w_v)]
    return (*(w - w.mean(-1, keepdim=True) for w in folded), w_o)


# ---- copying ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def effective_embeddings(model, ids, batch_size=1024):
    """
    Token embeddings (n, C) as later layers see them: E + MLP_0(E), without block 0's attention and without positions.

    ids: token ids (n,). GPT-2's MLP 0 rewrites the embedding; with raw E, heads that copy appear not to.
    """
    block, parts = model.transformer.h[0], []
    for chunk in torch.as_tensor(ids, device=device_of(model)).split(batch_size):
        x = model.transformer.wte(chunk)
        parts.append(x + block.mlp(block.ln_2(x)))
    return torch.cat(parts)


@torch.no_grad()
def copying_eigenvalues(model, ids, effective=True):
    """
    Copying score of every head: Re(sum lambda) / sum |lambda| over the eigenvalues of W_U W_OV W_E, array (L, H).

    Between -1 and 1; 1 is pure copying (Elhage et al. 2021). ids: token ids (n,) that W_E and W_U are restricted to.
    effective: use `effective_embeddings` for W_E, otherwise the raw embedding. The V x V product has the nonzero
    eigenvalues of the d x d product W_V W_E W_U W_O. Embeddings are normed as by ln_1; the gains of ln_1 and ln_f are
    folded in.
    """
    ids, gain = torch.as_tensor(ids, device=device_of(model)), model.transformer.ln_f.weight
    C = model.config.n_embd
    middle = torch.zeros(C, C, device=gain.device, dtype=gain.dtype)
    for chunk in ids.split(1024):
        embedding = effective_embeddings(model, chunk) if effective else model.transformer.wte(chunk)
        unembedding = model.lm_head.weight[chunk] * gain
        middle += F.layer_norm(embedding, (C,)).T @ (unembedding - unembedding.mean(-1, keepdim=True))
    scores = []
    for block in model.transformer.h:
        _, _, w_v, w_o = stream_weights(block)
        values = torch.linalg.eigvals(to_float64(w_v @ middle @ w_o))
        scores.append(values.real.sum(-1) / values.abs().sum(-1).clamp_min(1e-30))
    return torch.stack(scores).cpu().numpy()


@torch.no_grad()
def copying_tokens(model, ids, top=5, max_logits=2**24):
    """
    The fraction of tokens `ids` (n,) that a head attending to them ranks among its `top` output logits: array (L, H).

    Wang et al. 2022 (arXiv:2211.00593), section 3.3: the effective embedding through ln_1, OV, ln_f and unembedding.
    max_logits: logits computed at a time.
    """
    ids = torch.as_tensor(ids, device=device_of(model))
    embedding, rope = effective_embeddings(model, ids), rope_of(model, 1)
    n_head, step = model.config.n_head, max(1, max_logits // model.config.vocab_size)
    own_id, fractions = ids.repeat_interleave(n_head), []
    for block in model.transformer.h:
        _, _, v = block.attn.qkv(block.ln_1(embedding)[:, None], rope)  # one-token sequences: (n, H, 1, d)
        v = repeat_heads(v, n_head)
        out = torch.einsum('nhd,hcd->nhc', v[:, :, 0], block.attn.head_weights()[3]).flatten(0, 1)
        hits = []
        for rows, own in zip(model.transformer.ln_f(out).split(step), own_id.split(step), strict=True):
            logits = model.lm_head(rows)
            hits.append((logits >= logits.gather(1, own[:, None])).sum(1) <= top)  # counts the token itself and ties
        fractions.append(torch.cat(hits).view(-1, n_head).float().mean(0))
    return torch.stack(fractions).cpu().numpy()


# ---- composition -----------------------------------------------------------------------------------------------------


def frobenius(middle, left, right):
    """Squared norms ||A^T M B||^2 from M (..., a, b) and the Gram matrices left = A A^T, right = B B^T."""
    return ((left @ middle @ right) * middle).sum((-2, -1))


@torch.no_grad()
def composition(model):
    """
    How strongly each head reads what each head of an earlier layer writes: {'q', 'k', 'v'} -> lift (L, H, L, H).

    Entry [l1, h1, l2, h2] is nan unless l1 < l2. Elhage et al. 2021 define the scores, in row-vector convention, as
      k: |W_OV1 W_QK2^T| / (|W_OV1| |W_QK2|)   q: |W_OV1 W_QK2| / (..)   v: |W_OV1 W_OV2| / (|W_OV1| |W_OV2|)
    in Frobenius norms. Lift is C score^2. With a random rotation between the two circuits its expectation is 1 at any
    rank, so MHA and MLA can be compared. All norms come from d x d Gram matrices.
    """
    L, H, C = model.config.n_layer, model.config.n_head, model.config.n_embd
    lift = {kind: np.full((L, H, L, H), np.nan, dtype=np.float32) for kind in 'qkv'}
    layers = []
    for block in model.transformer.h:
        q, k, v, o = stream_weights(block)
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
                squared = frobenius(middle, earlier_grams['v'][:, None], grams[other][None])
                lift[kind][first, :, second] = (C * squared / (ov1[:, None] * norm[None]).clamp_min(1e-30)).cpu()
    return lift
