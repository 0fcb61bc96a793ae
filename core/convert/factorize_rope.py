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
a constant. So MLA gets

    shared key z_l    query for it d_hl conj(b_gl) q_hl    content key (k_l - b_l z_l)_g    query for it c_hl q_hl

The squared error of a score is about E|q_hl|^2 E|rest_g|^2 (1 - |c_l|^2), where c_l is the mean of exp(i f_l s) over
the distances at which the layer attends to text. With w_gl^2 the sum of E|q_hl|^2 over the heads of a group, the first
principal direction u_l of w_l k_l makes it smallest: a_l = w_l u_l, b_l = u_l / w_l. (As in MHA2MLA, arXiv:2502.14837,
what stays rotated is thereby chosen by what it contributes.)

Then the factors c_hl and d_hl of each head are fitted to its scores on text by least squares (`fitted`). An error that
is the same for all keys of a query costs nothing, since softmax drops it. Others count by the attention that their key
gets, and a part of the weight is spread evenly over all keys that the query sees, so that none of them rises unnoticed.
On SmolLM2-135M with n_rope=32 and no loss of rank, losses then rise by 0.035 on Python and by 0.078 on reviews. With
c_l for all heads of a layer and d = 1 they rise by 0.102 and 0.149, and with one c_l for all layers by 0.124 and 0.204.

The n_rope/2 frequencies that stay are the highest, or every second one, or every third, whichever costs least over all
layers. rope_theta is changed to have MLA's rotations turn with these. Content keys and values then share a latent, by
the data-weighted decomposition of factorize.py.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from core.cli.machine import to_float64
from core.convert.factorize import Statistics, check_convertible, factorize, layers, like, metric, reachable_root, watch
from model import GPT
from model_mla import MLAGPT, MLAConfig
from ops.kernels import repeat_heads

FIT_TOKENS = 4096  # of text that the factors are fitted to
QUERIES = 32  # of each window
SPREAD = 0.25  # part of the weight of errors that all keys share evenly
RIDGE = 1e-3  # of the least squares, relative to each factor's own energy


def collect_inputs(model: GPT, batches: Iterable[Tensor]) -> list[Tensor]:
    """What each layer's attention gets on FIT_TOKENS of text, evenly spaced: (N, T, C) on the CPU. ValueError: none."""
    texts = list(batches)
    if not texts:
        raise ValueError('there is no text on which scores could be measured')
    windows = torch.cat(texts)
    windows = windows[:: max(1, windows.numel() // FIT_TOKENS)]
    found: list[Tensor] = []
    watch(model, [windows], lambda block: block.ln_1, lambda layer, x: found.append(x.cpu()))
    return found


class Scores:
    """
    One layer's queries and keys on text before they are turned, and how much it attends to which.

    queries (N, H, t, d/2) of t positions in each window, and keys (N, K, T, d/2), complex. turn (T, d/2): exp(i f_l t).
    attention (N, H, t, T), and targets of the same shape: the scores, of which those of later keys mean nothing.
    """

    def __init__(self, attention: Any, x: Tensor, rope: Tensor):
        c_attn = attention.c_attn
        weight, bias = c_attn.weight.cpu(), None if c_attn.bias is None else c_attn.bias.cpu()
        rows = torch.nn.functional.linear(x, weight, bias).unflatten(-1, (-1, attention.head_size // 2, 2))
        q, self.keys, _ = torch.view_as_complex(rows).transpose(1, 2).split(attention.heads, dim=1)
        T = x.size(1)
        at = torch.linspace(0, T - 1, min(T, QUERIES)).round().long()
        self.turn = torch.complex(*rope[:, :T].cpu().to(x.dtype))
        self.queries, self.query_turn, self.scale = q[:, :, at], self.turn[at], attention.scale
        self.seen = torch.arange(T) <= at[:, None]
        turned = repeat_heads(self.keys * self.turn, attention.n_head)
        self.targets = self.scale * ((self.queries * self.query_turn) @ turned.mH).real
        self.attention = self.targets.masked_fill(~self.seen, -math.inf).softmax(-1)

    def mean_turn(self) -> Tensor:
        """The mean of exp(i f_l s) over the distances s at which the heads attend: (d/2,), complex128."""
        seen = self.attention.to(self.turn.dtype) @ self.turn.conj()
        return (self.query_turn * seen).to(torch.complex128).mean((0, 1, 2))


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
    docstring. energy (H, d/2): of the queries. saved (d/2,): how much smaller the scores' error is if a frequency stays
    rotated.
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
        self.energy = ((self.queries @ second) * self.queries.conj()).sum(-1).real
        weight = self.energy.unflatten(0, (attention.kv_heads, -1)).sum(1)  # (K, d/2)
        weight = torch.maximum(weight, 1e-12 * weight.max()).clamp(min=1e-30).sqrt()
        keys = (weight[..., None] * self.keys).transpose(0, 1)
        sizes, directions = torch.linalg.eigh(keys @ second @ keys.mH)
        self.saved, best = (1 - turn.abs().square()) * sizes[:, -1], directions[..., -1].t()
        self.a, self.b = weight * best, best / weight

    def split(self, kept: Tensor, content: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        What stands for the keys if frequencies `kept` (R/2,) stay rotated, all with the bias as their last column.

        content (H, d/2) and rotated (H, R/2): the factors of each head's queries. The shared key (R, C+1), each head's
        queries (H, d + R, C+1), and its content keys (H, d, C+1).
        """
        shared = (self.a[:, kept, None].conj() * self.keys[:, kept]).sum(0)
        rest = self.keys.clone()
        rest[:, kept] -= self.b[:, kept, None] * shared
        for_shared = rotated * repeat_heads(self.b[:, kept].conj(), self.n_head, dim=0)
        queries = content[..., None] * self.queries, for_shared[..., None] * self.queries[:, kept]
        rest = repeat_heads(rest, self.n_head, dim=0)
        return as_real(shared[None])[0], as_real(torch.cat(queries, dim=1)), as_real(rest)

    def fitted(self, kept: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        """The factors of `split` that fit each head's scores best, by a ridge of RIDGE around those of `plain`."""
        q, k, a, b = scores.queries, scores.keys, self.a[:, kept], self.b[:, kept]
        a, b = a.to(k.dtype), b.to(k.dtype)
        z = (a[:, None].conj() * k[..., kept]).sum(1)  # (N, T, R/2)
        rest = k.clone()
        rest[..., kept] -= b[:, None] * z[:, None]
        even = scores.seen / scores.seen.sum(-1, keepdim=True)
        found = []
        for head, start in enumerate(torch.cat(self.plain(kept), dim=1)):
            group, prior = head * len(a) // self.n_head, torch.cat((start.real, start.imag))
            normal = torch.zeros(len(prior), len(prior) + 1, dtype=prior.dtype)
            for window in range(len(q)):
                own, weight = q[window, head], (1 - SPREAD) * scores.attention[window, head] + SPREAD * even
                content = own[:, None] * rest[window, group].conj()  # (t, T, d/2)
                asked, offered = (own * scores.query_turn)[:, kept], b[group] * z[window] * scores.turn[:, kept]
                products = torch.cat((content, asked[:, None] * offered.conj()), dim=-1) * scores.scale
                target = scores.targets[window, head][..., None]
                rows = torch.cat((products.real, -products.imag, target), dim=-1)
                rows = rows - (weight[..., None] * rows).sum(1, keepdim=True)
                rows = (weight.sqrt()[..., None] * rows).flatten(0, 1)
                normal += to_float64(rows[:, :-1].t() @ rows)
            of_fit, of_target = normal[:, :-1], normal[:, -1]
            ridge = torch.diag(RIDGE * of_fit.diagonal() + 1e-12 * of_fit.trace() + 1e-100)
            found.append(prior + torch.linalg.solve(of_fit + ridge, of_target - of_fit @ prior))
        solution = torch.complex(*torch.stack(found).chunk(2, dim=1))
        content, rotated = solution.split((solution.size(1) - len(kept), len(kept)), dim=1)
        return content, rotated

    def plain(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """The same factors for all heads: content is turned by the mean turn, and what is rotated is as it was."""
        return self.turn.expand(self.n_head, -1), torch.ones(self.n_head, len(kept), dtype=self.turn.dtype)


@torch.no_grad()
def to_published_mla(
    model: GPT,
    statistics: list[Statistics],
    inputs: list[Tensor],
    n_latent: int = 0,
    n_rope: int = 0,
    balance: bool = True,
) -> MLAGPT:
    """
    An MLAGPT with one rotated key for all heads beside content keys, as DeepSeek's; see the module's docstring.

    statistics and inputs: from `collect_statistics` and `collect_inputs` on the same model. n_latent: 1 to n_embd; 0:
    half of n_embd. n_rope: even and at most the head size; 0: half of it. The cache has n_latent + n_rope numbers per
    token and layer. ValueError for another kind of model, and for sizes out of range.
    """
    check_convertible(model, statistics)
    if model.config.pos != 'rope':
        raise ValueError(f"this model has pos='{model.config.pos}' and no rotations to keep; leave out n_rope")
    d = model.config.head_size
    n_rope = n_rope or d // 2
    if n_rope % 2 or not 2 <= n_rope <= d:
        raise ValueError(f'n_rope={n_rope} must be an even number from 2 to the head size, {d}')
    scores = [Scores(block.attn, x, model.rope) for block, x in zip(layers(model), inputs, strict=True)]
    parts = zip(layers(model), statistics, scores, strict=True)
    rotated = [RotatedLayer(block, own, score.mean_turn()) for block, own, score in parts]
    choices = [torch.arange(n_rope // 2) * stride for stride in range(1, d // n_rope + 1)]
    saved = [sum(layer.saved[kept].sum().item() for layer in rotated) for kept in choices]
    best = saved.index(max(saved))
    kept = choices[best]
    settings = {**asdict(model.config), 'n_kv_head': 0, 'n_latent': n_latent, 'n_rope': n_rope}
    settings['rope_theta'] = model.config.rope_theta ** ((best + 1) * n_rope / d)
    new = like(model, MLAGPT, MLAConfig(**settings))
    for block, layer, score in zip(layers(new), rotated, scores, strict=True):
        fill(block.attn, layer, kept, layer.fitted(kept, score), balance)
    return new


def fill(attention: Any, layer: RotatedLayer, kept: Tensor, factors: tuple[Tensor, Tensor], balance: bool) -> None:
    """Set MLA's projections from those of an MHA layer; frequencies `kept` stay rotated, factors: those of `split`."""
    shared, queries, content = layer.split(kept, *factors)
    measure = metric(factors[0].abs().square() * layer.energy, to_float64(attention.c_proj.weight).cpu())
    queries, content = queries.flatten(0, 1), content.flatten(0, 1)
    values = repeat_heads(layer.values, attention.n_head, dim=0).flatten(0, 1)
    queries *= 1 / attention.scale / math.sqrt(attention.n_nope)
    of_input = content[:, :-1], values[:, :-1], layer.mean, layer.half
    down, up, shift = factorize(*of_input, attention.n_latent, balance, measure)
    attention.c_q.weight.copy_(queries[:, :-1])
    attention.c_kv_down.weight.copy_(torch.cat((down, shared[:, :-1])))
    attention.c_kv_up.weight.copy_(up)
    if attention.c_q.bias is not None:
        attention.c_q.bias.copy_(queries[:, -1])
        attention.c_kv_down.bias.copy_(torch.cat((shift.new_zeros(len(down)), shared[:, -1])))
        attention.c_kv_up.bias.copy_(torch.cat((content, values))[:, -1] + shift)
