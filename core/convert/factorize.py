"""
From MHA to MLA: the algebra that compresses trained keys and values into one latent. Tensors in, a model out.

Grouped-query attention is a special case of MLA: its K keys and values per token are a latent of r = 2 K d numbers,
from which the up-projection copies (TransMLA, arXiv:2502.07864). `to_mla` therefore converts a GQA model exactly at its
own cache size. `to_gqa` goes from MHA to fewer key/value heads; `to_mha` goes back, which is exact.

Notable features:
- one singular value decomposition of keys and values together, per layer
- weighted by the covariance of the layer's inputs on real text, or, without text, by what the norm implies about it
- the mean input takes no rank: what the latent loses of it is added to the bias
- exact to rounding for n_latent = n_embd and, where the norm is LayerNorm, n_embd - 1
- the statistics take (C + 1) C numbers per layer, independent of the amount of text

Why. Keys and values are W x + b, W = [W_K; W_V] (2C, C), x the output of ln_1, with mean m and covariance M. At rank r
the error E |(W - W_up W_down)(x - m)|^2 is smallest when W_up W_down = U U^T W, where U (2C, r) holds the first
left singular vectors of W M^(1/2) (Eckart and Young 1936; with M as activation statistics: arXiv:2403.07378). So

    W_down = U^T W        W_up = U        b_up = b + (I - U U^T) W m        b_down = 0

LayerNorm's output is x = g * n + beta, and the entries of n sum to 0. All x - m therefore lie in a subspace of C - 1
dimensions, which is why n_embd - 1 is still exact. Without text, n is assumed to be white in that subspace: the
"weights-only" conversion is the same formula with M = G (I - 1 1^T / C) G, G = diag(g), and m = beta. RMSNorm takes no
mean away: there M = G G, and all of the C dimensions count.

Keys and values differ in norm, and the error of the larger would dominate. `balance` scales the keys to the energy of
the values before the decomposition, and scales them back after it.

With RoPE it first measures an error by what it does (`metric`): a key's in each pair of dimensions by the energy of the
queries there, since RoPE turns the two against each other, and a value's by W_O. Keys then get KEYS times the energy of
the values. On SmolLM2-135M at half of the cache (six windows each of Python and of reviews) the loss rises by 0.090 and
0.075, and by 0.189 and 0.111 with equal energies alone.

A model without biases has no place for b_up: there m = 0, and M is the uncentred E[x x^T].
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from core.cli.machine import to_float64
from core.text.dataset import TokenData
from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig
from ops.kernels import repeat_heads

# Every direction that LayerNorm can reach gets this share of the mean variance, whether the text has it or not, so that
# full rank is exact on any input. Its square root is far above float64's rounding, and far too small to matter.
RIDGE = 1e-8
KEYS = 4.0  # with RoPE: the keys' part of the energy, tried from 0.5 to 4
LEAST = 1e-6  # no direction of an error counts less than this, relative to the worst one: full rank stays exact

Model = TypeVar('Model', bound=GPT)


@dataclass
class Statistics:
    """Sums over `count` tokens of one layer's ln_1 output x (C,) and of x x^T (C, C), float64."""

    count: int
    total: Tensor
    products: Tensor

    @classmethod
    def empty(cls, size: int, device: str | torch.device = 'cpu') -> 'Statistics':
        zeros = to_float64(torch.zeros(size + 1, size, device=device))
        return cls(0, zeros[0], zeros[1:])

    def add(self, x: Tensor) -> None:
        """Add x (..., C)."""
        x = to_float64(x.detach().flatten(0, -2)).to(self.total.device)
        self.count += len(x)
        self.total += x.sum(dim=0)
        self.products.addmm_(x.t(), x)

    def moments(self, centred: bool = True) -> tuple[Tensor, Tensor]:
        """Mean (C,) and covariance (C, C), on the CPU; uncentred: zeros and E[x x^T]. ValueError before any `add`."""
        if not self.count:
            raise ValueError('the statistics are empty; add some tokens first')
        mean, second = self.total.cpu() / self.count, self.products.cpu() / self.count
        return (mean, second - torch.outer(mean, mean)) if centred else (torch.zeros_like(mean), second)


def training_text(data: TokenData, count: int, batch_size: int) -> Iterator[Tensor]:
    """At most `count` evenly spaced windows of a TokenData's training split, in batches of ids (batch_size, T)."""
    starts = data.eval_windows('train', count)
    for first in range(0, len(starts), batch_size):
        yield data.windows('train', starts[first : first + batch_size])[0]


@torch.no_grad()
def watch(
    model: GPT,
    batches: Iterable[Tensor],
    module_of: Callable[[Any], torch.nn.Module],
    see: Callable[[int, Tensor], None],
) -> None:
    """Run `model` in eval mode over batches of token ids (B, T): see(layer, output of module_of(block)) is called."""
    hooks = [
        module_of(block).register_forward_hook(lambda module, inputs, output, layer=layer: see(layer, output))
        for layer, block in enumerate(layers(model))
    ]
    training = model.training
    model.eval()
    try:
        for idx in batches:
            model.hidden(idx.to(model.lm_head.weight.device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()


def collect_statistics(
    model: GPT,
    batches: Iterable[Tensor],
    module_of: Callable[[Any], torch.nn.Module] = lambda block: block.ln_1,
    size: int = 0,
) -> list[Statistics]:
    """Run `model` over ids (B, T): a Statistics per layer, of module_of(block)'s output, `size` numbers (0: n_embd)."""
    device = model.lm_head.weight.device
    statistics = [Statistics.empty(size or model.config.n_embd, device) for _ in layers(model)]
    watch(model, batches, module_of, lambda layer, x: statistics[layer].add(x))
    return statistics


def spread(ln: Any) -> Tensor:
    """The matrix (C, C) by which a norm's output spreads white input: its gains, and for LayerNorm less the mean."""
    gain = torch.diag(to_float64(ln.weight.detach()).cpu())
    return gain - gain.mean(1, keepdim=True) if isinstance(ln, torch.nn.LayerNorm) else gain


def norm_moments(ln: Any, centred: bool = True) -> tuple[Tensor, Tensor]:
    """Mean and covariance (uncentred: zeros, E[x x^T]) of ln's output if its normed input is white."""
    bias, covariance = getattr(ln, 'bias', None), spread(ln) @ spread(ln).t()  # RMSNorm has no bias
    mean = torch.zeros_like(covariance[0]) if bias is None else to_float64(bias.detach()).cpu()
    return (mean, covariance) if centred else (torch.zeros_like(mean), covariance + torch.outer(mean, mean))


def root(matrix: Tensor, least: float = 0.0) -> Tensor:
    """The symmetric square roots of covariances (..., n, n), with at least `least` times the largest eigenvalue's."""
    values, vectors = torch.linalg.eigh(matrix)
    values = torch.maximum(values, least**2 * values[..., -1:].clamp(min=1e-60))  # its inverse is a float32, too
    return (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mT


def reachable_root(ln: Any, covariance: Tensor) -> Tensor:
    """
    A matrix (C, C - 1) whose product with its transpose is `covariance` plus RIDGE of what `norm_moments` gives.

    Its columns span exactly the subspace that LayerNorm `ln` can reach. Otherwise rounding in `covariance` would act as
    a direction of its own, and displace one that matters. RMSNorm can reach all C dimensions.
    """
    basis, sizes, _ = torch.linalg.svd(spread(ln))
    kept = sizes > 1e-12 * sizes[0]
    basis, sizes = basis[:, kept], sizes[kept]
    inner = basis.t() @ covariance @ basis
    return basis @ root(inner + torch.diag(RIDGE * inner.trace() / sizes.square().sum() * sizes.square()))


def metric(energy: Tensor, w_o: Tensor) -> tuple[Tensor, Tensor]:
    """
    Two matrices (H d, H d) by which errors of RoPE's keys and of values are multiplied before they are measured.

    energy (H, d/2): that of each head's queries in each pair of dimensions. w_o (C, H d): the output projection.
    """
    energy = torch.maximum(energy, LEAST**2 * energy.max())
    energy = energy if energy.max() > 1e-60 else torch.ones_like(energy)  # without queries all errors count alike
    heads = w_o.unflatten(1, (len(energy), -1)).transpose(0, 1)  # (H, C, d)
    return torch.diag(energy.sqrt().flatten().repeat_interleave(2)), torch.block_diag(*root(heads.mT @ heads, LEAST))


def factorize(
    w_k: Tensor,
    w_v: Tensor,
    mean: Tensor,
    half: Tensor,
    n_latent: int,
    balance: bool = True,
    measure: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """
    One latent for keys w_k x and values w_v x, by the formula in the module's docstring.

    w_k (K, C) and w_v (V, C) may have different numbers of rows. x has mean `mean` (C,) and covariance half half^T,
    half (C, n). measure: what `metric` returns, for balanced keys with RoPE. Returns (down (r, C), up (K + V, r), shift
    (K + V,)) in float64, such that [w_k; w_v] x is approximately up down x + shift.
    """
    norm = torch.linalg.matrix_norm
    roots = measure if measure and balance else (torch.eye(len(w_k)).to(w_k), torch.eye(len(w_v)).to(w_v))
    w_k, w_v = roots[0] @ w_k, roots[1] @ w_v
    ratio = (norm(w_v @ half) / norm(w_k @ half)).item() if balance else 1.0
    if not 1e-8 < ratio < 1e8:
        ratio = 1.0  # keys or values are zero, but for rounding: nothing to balance
    ratio *= KEYS if measure and balance else 1
    w = torch.cat((w_k * ratio, w_v))
    up = torch.linalg.svd(w @ half, full_matrices=n_latent > half.size(1)).U[:, :n_latent]
    down = up.t() @ w
    both = torch.cat((up, (w @ mean - up @ (down @ mean))[:, None]), dim=1).split((len(w_k), len(w_v)))
    both = torch.cat((torch.linalg.solve(roots[0] * ratio, both[0]), torch.linalg.solve(roots[1], both[1])))
    return down, both[:, :-1], both[:, -1]


@torch.no_grad()
def to_mla(model: GPT, n_latent: int = 0, statistics: list[Statistics] | None = None, balance: bool = True) -> MLAGPT:
    """
    An MLAGPT that approximates `model` as closely as n_latent allows.

    n_latent: 1 to n_embd; 0: half of n_embd, for a GQA model the size of its cache. statistics: from
    `collect_statistics` on the same model; None: use the weights alone. balance: weight keys and values equally. The
    result has the model's dtype and device. With RoPE the latent holds keys that aren't rotated yet: they are
    decompressed and rotated whole (shared_rope=False), which can't be absorbed; factorize_rope.py makes a model that
    can. ValueError for an MLA model, for RoPE on a part of each head, and for an n_latent out of range.
    """
    check_convertible(model, statistics)
    config = model.config
    if config.n_kv_head and not n_latent:
        n_latent = min(2 * config.kv_heads * config.head_size, config.n_embd)
    of_mla = dict(n_kv_head=0, n_latent=n_latent, n_rope=0, shared_rope=config.pos != 'rope')
    new = like(model, MLAGPT, MLAConfig(**{**asdict(config), **of_mla}))
    for layer, (old, block) in enumerate(zip(layers(model), layers(new), strict=True)):
        convert_layer(old, block.attn, statistics[layer] if statistics else None, balance)
    return new


def convert_layer(old: Any, attention: Any, statistics: Statistics | None, balance: bool) -> None:
    """Set the query, down- and up-projections of `attention` from the MHA block `old` (see `to_mla`)."""
    bias = old.attn.c_attn.bias
    w_q, w_k, w_v = (to_float64(t).cpu().flatten(0, 1) for t in per_query_head(old.attn, old.attn.c_attn.weight))
    centred = bias is not None
    mean, covariance = statistics.moments(centred) if statistics else norm_moments(old.ln_1, centred)
    half, measure = reachable_root(old.ln_1, covariance), None
    if not attention.shared_rope:
        still = w_q @ mean + (to_float64(bias).cpu()[: len(w_q)] if centred else 0)
        energy = ((w_q @ covariance) * w_q).sum(1) + still.square()
        pairs = energy.view(attention.n_head, -1, 2).sum(-1)
        measure = metric(pairs, to_float64(old.attn.c_proj.weight).cpu())
    down, up, shift = factorize(w_k, w_v, mean, half, attention.n_latent, balance, measure)
    attention.c_q.weight.copy_(w_q)
    attention.c_kv_down.weight.copy_(down)
    attention.c_kv_up.weight.copy_(up)
    if centred:
        b_q, b_k, b_v = (to_float64(t).cpu().flatten() for t in per_query_head(old.attn, bias))
        attention.c_q.bias.copy_(b_q)
        attention.c_kv_down.bias.zero_()
        attention.c_kv_up.bias.copy_(torch.cat((b_k, b_v)) + shift)


# ---- grouped-query attention -----------------------------------------------------------------------------------------


def check_mha(model: Any) -> None:
    """ValueError unless `model` is a GPT with multi-head or grouped-query attention."""
    if type(model) is not GPT:
        raise ValueError(f'only a GPT with multi-head attention can be converted, not {type(model).__name__}')


def check_convertible(model: GPT, statistics: list[Statistics] | None) -> None:
    """ValueError unless `model` can become MLA, by these statistics."""
    check_mha(model)
    config = model.config
    if statistics is not None and len(statistics) != config.n_layer:
        raise ValueError(f'{len(statistics)} layers of statistics for a model of {config.n_layer}')
    if config.pos == 'rope' and config.rope_size != config.head_size:
        raise ValueError(
            f'this model rotates {config.rope_size} of the {config.head_size} dimensions of each head; only a model '
            'that rotates all of them can be converted to MLA'
        )


def like(model: GPT, model_class: type[Model], config: GPTConfig) -> Model:
    """A model_class of `config` on the device and in the dtype of `model`, with all of its tensors that fit by name."""
    weight = model.lm_head.weight
    new = model_class(config).to(device=weight.device, dtype=weight.dtype)
    for name, value in new.state_dict().items():
        if '.attn.' not in name or '.attn.c_proj.' in name:
            value.copy_(model.state_dict()[name])
    return new.train(model.training)


def layers(model: Any) -> Any:
    """The blocks of a GPT."""
    return model.transformer.h


def per_query_head(attention: Any, rows: Tensor) -> tuple[Tensor, ...]:
    """c_attn's rows (n, ...) as queries, keys and values of every query head, each (H, d, ...)."""
    q, *kv = rows.unflatten(0, (-1, attention.head_size)).split(attention.heads)
    return q, *(repeat_heads(t, attention.n_head, dim=0) for t in kv)


@torch.no_grad()
def regrouped(model: GPT, n_kv_head: int, change: Callable[[Tensor], Tensor]) -> GPT:
    """A GPT with `n_kv_head` (0: n_head) key/value heads, which are change(those of `model` (K, d, ...))."""
    new = like(model, GPT, replace(model.config, n_kv_head=n_kv_head))
    for old, block in zip(layers(model), layers(new), strict=True):
        for name, rows in block.attn.c_attn.named_parameters():
            q, *kv = old.attn.c_attn.get_parameter(name).unflatten(0, (-1, old.attn.head_size)).split(old.attn.heads)
            rows.copy_(torch.cat((q, *map(change, kv))).flatten(0, 1))
    return new


def to_gqa(model: GPT, n_kv_head: int) -> GPT:
    """
    A GPT with `n_kv_head` key/value heads, each the mean of its group's in `model` (arXiv:2305.13245, section 2.1).

    model: a GPT with MHA, or with a multiple of `n_kv_head` key/value heads. ValueError for another model or number.
    """
    check_mha(model)
    before = model.config.kv_heads
    if not 1 <= n_kv_head <= before or before % n_kv_head:
        raise ValueError(f'n_kv_head={n_kv_head} must divide the {before} key/value heads of the model')
    return regrouped(model, n_kv_head, lambda heads: heads.unflatten(0, (n_kv_head, -1)).mean(1))


def to_mha(model: GPT) -> GPT:
    """The same function with as many key/value heads as heads: each is repeated for its group. ValueError for MLA."""
    check_mha(model)
    return regrouped(model, 0, lambda heads: repeat_heads(heads, model.config.n_head, dim=0))
