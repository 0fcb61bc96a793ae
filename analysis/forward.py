"""
A forward pass that shows each layer's queries, keys, values and attention pattern, and can change them.

Works for GPT, MLAGPT and HFModel, any causal language model of transformers. One layer's patterns are in memory at a
time, so memory doesn't grow with depth. Models must be in eval mode.

Shapes: B batch, T tokens, L layers, H heads, C width, d size of a query and a key, d_v of a value, V vocabulary.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from analysis.hf_model import HFModel, Seen
from model import GPT
from ops.kernels import attention_pattern, fast_attention, repeat_heads

Model = GPT | HFModel
Edit = Callable[[int, Tensor], Tensor]  # (layer, the heads' outputs) -> what takes their place


def device_of(model: Model) -> torch.device:
    """Where a model's weights are."""
    return next(model.parameters()).device


def untrained(model: Model, seed: int) -> Model:
    """A model of the same shape, with initial values."""
    if isinstance(model, HFModel):
        return model.fresh(seed)
    return type(model)(model.config, seed).eval().to(device_of(model))


def embed(model: GPT, tokens: Tensor) -> Tensor:
    """The residual stream (B, T, C) at block 0, from ids (B, T). ValueError in training mode, or beyond block_size."""
    if model.training:
        raise ValueError('measure a model in eval mode: call model.eval() first')
    T = tokens.size(1)
    if model.config.block_size < T:
        raise ValueError(f"{T} tokens don't fit into block_size={model.config.block_size}; use shorter sequences")
    x = model.transformer.wte(tokens)
    return x + model.transformer.wpe.weight[:T] if model.config.pos == 'learned' else x


def rope_of(model: GPT, T: int) -> Tensor | None:
    """RoPE's table for T positions, or None."""
    return None if model.rope is None else model.rope[:, :T]


@dataclass
class Attention(Seen):
    """What one layer of ours computes; the heads of queries that share keys and values have copies of them."""

    q: Tensor  # (B, H, T, d)
    k: Tensor  # (B, H, T, d)
    v: Tensor  # (B, H, T, d_v)
    normed: Tensor  # (B, T, C), the layer's normed input


@torch.no_grad()
def run(
    model: Model,
    tokens: Tensor,
    x: Tensor | None = None,
    start: int = 0,
    stop: int | None = None,
    visit: Callable[[int, Any], object] | None = None,
    edit: Edit | None = None,
    qkv: Callable[[int, nn.Module, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]] | None = None,
) -> Tensor:
    """
    Run token ids (B, T) through a model; returns the output of its last norm (B, T, C).

    x: the residual stream (B, T, C) at the input of layer `start`, where the layers below needn't run again. stop: the
    layer before which to end; returns the residual stream at its input. visit(layer, Attention): called for each layer
    (of a HFModel with a Seen); without it no pattern is computed. edit(layer, z) -> z: replaces the heads' outputs z
    (B, H, T, d_v). qkv(layer, attn, normed, rope): replaces attn.qkv(normed, rope), in our own models.
    """
    if isinstance(model, HFModel):
        return model.run(tokens, x, start, stop, visit, edit)
    stop = model.config.n_layer if stop is None else stop
    x, rope = embed(model, tokens) if x is None else x, rope_of(model, tokens.size(1))
    for layer in range(start, stop):
        block = model.transformer.h[layer]
        attn, normed = block.attn, block.ln_1(x)
        q, *kv = attn.qkv(normed, rope) if qkv is None else qkv(layer, attn, normed, rope)
        k, v = (repeat_heads(t, q.size(1)) for t in kv)
        if visit is None:
            z = fast_attention(q, k, v, attn.scale)
        else:
            pattern = attention_pattern(q, k, attn.scale)
            visit(layer, Attention(pattern, q, k, v, normed))
            z = pattern @ v
        z = z if edit is None else edit(layer, z)
        x = x + attn.c_proj(z.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    return x if stop < model.config.n_layer else model.transformer.ln_f(x)


def logits(model: Model, hidden: Tensor) -> Tensor:
    """The logits (n, V) of outputs of the last norm (n, C)."""
    return model.logits(hidden) if isinstance(model, HFModel) else model.lm_head(hidden)


@torch.no_grad()
def patterns(model: Model, tokens: Tensor) -> Tensor:
    """The attention patterns of all layers for token ids (B, T): (L, B, H, T, T) on the CPU. For a few sequences."""
    seen: list[Tensor] = []
    run(model, tokens, visit=lambda layer, a: seen.append(a.pattern.cpu()))
    return torch.stack(seen)


@torch.no_grad()
def token_losses(model: Model, hidden: Tensor, targets: Tensor, max_logits: int = 2**24) -> Tensor:
    """Cross-entropy in nats of targets (...), given ln_f's output, hidden (..., C). max_logits: in memory at a time."""
    step = max(1, max_logits // model.config.vocab_size)
    rows = zip(hidden.flatten(0, -2).split(step), targets.flatten().split(step), strict=True)
    exact = torch.promote_types(hidden.dtype, torch.float32)  # also of a model in bfloat16
    losses = [F.cross_entropy(logits(model, x).to(exact), y, reduction='none') for x, y in rows]
    return torch.cat(losses).view(targets.shape)


@torch.no_grad()
def text_losses(model: Model, tokens: Tensor, batch_size: int = 8, edit: Edit | None = None) -> np.ndarray:
    """Loss in nats of each token but the first of token ids (N, T): float32 array (N, T-1). edit: see `run`."""
    parts = [part.to(device_of(model)) for part in tokens.split(batch_size)]
    losses = [token_losses(model, run(model, part, edit=edit)[:, :-1], part[:, 1:]) for part in parts]
    return torch.cat(losses).float().cpu().numpy()


@torch.no_grad()
def head_means(model: Model, tokens: Tensor, batch_size: int = 8) -> Tensor:
    """The mean output of every head at each position over token ids (N, T): (L, H, T, d_v)."""
    totals = [torch.zeros(()) for _ in range(model.config.n_layer)]

    def add(layer: int, z: Tensor) -> Tensor:
        totals[layer] = totals[layer].to(z) + z.sum(0)
        return z

    for part in tokens.split(batch_size):
        run(model, part.to(device_of(model)), edit=add)
    return torch.stack(totals) / len(tokens)


def replacing_heads(heads: Iterable[tuple[int, int]], means: Tensor | None = None) -> Edit:
    """
    An `edit` for `run` that replaces the outputs of `heads`, pairs (layer, head), by means (L, H, T, d_v).

    Without means: by those over the sequences of the pass itself, with the other heads already replaced.
    """
    chosen: dict[int, list[int]] = {}
    for layer, head in heads:
        chosen.setdefault(layer, []).append(head)

    def edit(layer, z):
        if layer in chosen:
            z = z.clone()
            own = z[:, chosen[layer]]
            z[:, chosen[layer]] = own.mean(0) if means is None else means[layer, chosen[layer]]
        return z

    return edit
