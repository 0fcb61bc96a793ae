"""
From MHA or GQA with RoPE to MLA in DeepSeek's shape: one rotated key for all heads, beside keys that are not rotated.

RoPE turns each key by angles that grow with its position, so no latent without a position can hold turned keys.
factorize.py's `to_mla` leaves RoPE as it is: the latent holds keys before they are turned, and every step decompresses
and turns them. `to_published_mla` makes a model that decodes absorbed. That gives up most rotations, so it has to be
fine-tuned; only MQA with n_rope = d is converted exactly.

A pair of dimensions that RoPE turns with frequency f_l is one complex number, and turning it multiplies it by
exp(i f_l t). Let q_hl be the query of head h, and k_l in C^K the keys of all K key/value heads. At distance s, the
score of head h and a key of its group's head g is

    sum_l Re(q_hl conj(k_gl) exp(i f_l s))

A change of basis in C^K commutes with the turn (as in TransMLA, arXiv:2502.07864), so k_l splits into a component that
stays rotated and serves all heads, z_l = a_l^H k_l, and a rest k_l - b_l z_l. In the rest, exp(i f_l s) is replaced by
a constant: c_l, its mean over the distances at which the model attends to text. So MLA gets

    shared key z_l        query for it conj(b_gl) q_hl        content key conj(c_l) (k_l - b_l z_l)_g

and the query itself for the content keys. The squared error of a score is about E|q_hl|^2 E|rest_g|^2 (1 - |c_l|^2).
With w_gl^2 the sum of E|q_hl|^2 over the heads of a group, the first principal direction u_l of w_l k_l makes it
smallest: a_l = w_l u_l, b_l = u_l / w_l. (A c_l of each head's own fits scores better, and losses worse: +0.128 instead
of +0.088 on a model of 4 layers.)

The n_rope/2 frequencies that stay are the highest, or every second one, or every third, whichever costs least over all
layers. rope_theta is changed to have MLA's rotations turn with these. Content keys and values then share a latent.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from core.cli.machine import to_float64
from core.convert.factorize import Statistics, check_convertible, factorize, layers, like, reachable_root
from model import GPT
from model_mla import MLAGPT, MLAConfig
from ops import kernels
from ops.kernels import repeat_heads


@torch.no_grad()
def collect_turn(model: GPT, batches: Iterable[Tensor]) -> Tensor:
    """
    Run `model` over batches of token ids (B, T): the mean of exp(i f_l s) over the distances s at which heads attend.

    Complex128 (d/2,). ValueError where there is no batch.
    """
    means: list[Tensor] = []

    def add(attention: Any, inputs: tuple) -> None:
        x, rope, _ = inputs
        q, k, _ = attention.qkv(x, rope)
        k = repeat_heads(k, attention.n_head)
        pattern = kernels.attention_pattern(q, k, attention.scale)  # (B, H, T, T)
        turn = torch.complex(*to_float64(rope).cpu())  # (T, d/2): exp(i f_l t)
        seen = to_float64(pattern).cpu().to(turn.dtype) @ turn.conj()
        means.append((turn * seen).mean((0, 1, 2)))

    hooks = [block.attn.register_forward_pre_hook(add) for block in layers(model)]
    training = model.training
    model.eval()
    try:
        for idx in batches:
            model.hidden(idx.to(model.lm_head.weight.device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    if not means:
        raise ValueError('there is no text on which distances could be measured')
    return torch.stack(means).mean(0)


def as_complex(rows: Tensor) -> Tensor:
    """Rows (n, d, m) of pairs of dimensions as complex rows (n, d/2, m)."""
    return torch.complex(rows[:, 0::2], rows[:, 1::2])


def as_real(rows: Tensor) -> Tensor:
    """The inverse of `as_complex`."""
    return torch.stack((rows.real, rows.imag), dim=2).flatten(1, 2)


class RotatedLayer:
    """
    One MHA layer's projections with the bias as their last column, and the best shared key for each frequency.

    queries (H, d/2, C+1) and keys (K, d/2, C+1), complex; values (K, d, C+1). a and b (K, d/2) as in the module's
    docstring. saved (d/2,): how much smaller the scores' error is if a frequency stays rotated.
    """

    def __init__(self, block: Any, statistics: Statistics, turn: Tensor):
        attention, bias = block.attn, block.attn.c_attn.bias
        rows, centred = to_float64(attention.c_attn.weight).cpu(), bias is not None
        column = rows.new_zeros(len(rows)) if bias is None else to_float64(bias).cpu()
        rows = torch.cat((rows, column[:, None]), dim=1).unflatten(0, (-1, attention.head_size))
        q, k, self.values = rows.split(attention.heads)
        self.queries, self.keys, self.turn, self.n_head = as_complex(q), as_complex(k), turn, attention.n_head
        self.mean, covariance = statistics.moments(centred)
        self.half = reachable_root(block.ln_1, covariance)

        mean = torch.cat((self.mean, self.mean.new_ones(1)))
        second = torch.outer(mean, mean)  # E[x x^T] of the input and a last entry of 1
        second[:-1, :-1] += covariance
        second = second.to(turn.dtype)
        energy = ((self.queries @ second) * self.queries.conj()).sum(-1).real
        weight = energy.unflatten(0, (attention.kv_heads, -1)).sum(1).clamp(min=1e-100).sqrt()  # (K, d/2)
        keys = (weight[..., None] * self.keys).transpose(0, 1)
        sizes, directions = torch.linalg.eigh(keys @ second @ keys.mH)
        self.saved, best = (1 - turn.abs().square()) * sizes[:, -1], directions[..., -1].t()
        self.a, self.b = weight * best, best / weight

    def split(self, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        What stands for the keys if frequencies `kept` (R/2,) stay rotated, all with the bias as their last column.

        The shared key (R, C+1), each head's queries (H, d + R, C+1), and its content keys (H, d, C+1).
        """
        shared = (self.a[:, kept, None].conj() * self.keys[:, kept]).sum(0)
        rest = self.keys.clone()
        rest[:, kept] -= self.b[:, kept, None] * shared
        content = repeat_heads(self.turn[:, None].conj() * rest, self.n_head, dim=0)
        for_shared = repeat_heads(self.b[:, kept, None].conj(), self.n_head, dim=0) * self.queries[:, kept]
        return as_real(shared[None])[0], as_real(torch.cat((self.queries, for_shared), dim=1)), as_real(content)


@torch.no_grad()
def to_published_mla(
    model: GPT,
    statistics: list[Statistics],
    turn: Tensor,
    n_latent: int = 0,
    n_rope: int = 0,
    balance: bool = True,
) -> MLAGPT:
    """
    An MLAGPT with one rotated key for all heads beside content keys, as DeepSeek's; see the module's docstring.

    statistics and turn: from `collect_statistics` and `collect_turn` on the same model. n_latent: 1 to n_embd; 0: half
    of n_embd. n_rope: even and at most the head size; 0: half of it. The cache has n_latent + n_rope numbers per token
    and layer. ValueError for another kind of model, and for sizes out of range.
    """
    check_convertible(model, statistics)
    if model.config.pos != 'rope':
        raise ValueError(f"this model has pos='{model.config.pos}' and no rotations to keep; leave out n_rope")
    d = model.config.head_size
    n_rope = n_rope or d // 2
    if n_rope % 2 or not 2 <= n_rope <= d:
        raise ValueError(f'n_rope={n_rope} must be an even number from 2 to the head size, {d}')
    rotated = [RotatedLayer(block, own, turn) for block, own in zip(layers(model), statistics, strict=True)]
    choices = [torch.arange(n_rope // 2) * stride for stride in range(1, d // n_rope + 1)]
    saved = [sum(layer.saved[kept].sum().item() for layer in rotated) for kept in choices]
    best = saved.index(max(saved))
    settings = {**asdict(model.config), 'n_kv_head': 0, 'n_latent': n_latent, 'n_rope': n_rope}
    settings['rope_theta'] = model.config.rope_theta ** ((best + 1) * n_rope / d)
    new = like(model, MLAGPT, MLAConfig(**settings))
    for layer, block in zip(rotated, layers(new), strict=True):
        fill(block.attn, layer, choices[best], balance)
    return new


def fill(attention: Any, layer: RotatedLayer, kept: Tensor, balance: bool) -> None:
    """Set the projections of MLA's `attention` from those of an MHA layer, frequencies `kept` staying rotated."""
    shared, queries, content = layer.split(kept)
    queries, content = queries.flatten(0, 1), content.flatten(0, 1)
    values = repeat_heads(layer.values, attention.n_head, dim=0).flatten(0, 1)
    queries *= 1 / attention.scale / math.sqrt(attention.n_nope)
    down, up, shift = factorize(content[:, :-1], values[:, :-1], layer.mean, layer.half, attention.n_latent, balance)
    attention.c_q.weight.copy_(queries[:, :-1])
    attention.c_kv_down.weight.copy_(torch.cat((down, shared[:, :-1])))
    attention.c_kv_up.weight.copy_(up)
    if attention.c_q.bias is not None:
        attention.c_q.bias.copy_(queries[:, -1])
        attention.c_kv_down.bias.copy_(torch.cat((shift.new_zeros(len(down)), shared[:, -1])))
        attention.c_kv_up.bias.copy_(torch.cat((content, values))[:, -1] + shift)
