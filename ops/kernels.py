"""
The models' operations, fast: the same mathematics as the plain formula, chosen by device, dtype and shape.

model.py and model_mla.py call these by name and never say how they are computed. Nothing here knows a model.

    Linear                nn.Linear; few rows on a CPU, as in a decode step, are split over the cores
    dropout, Dropout      F.dropout and nn.Dropout; on a CPU the mask comes from 16 random bits per element
    fast_attention        causal attention: PyTorch SDPA, or on a CPU the written-out EagerAttention
    attend_rows           its formula for the few queries of a decode step, on a GPU
    attention_pattern     the softmax alone, as the formula says it
    per_head              one matrix per head times that head's rows; the matrices may be in int8
    keep_casts            while decoding, weights are converted to another dtype once and not in every step
    RMSNorm               nn.RMSNorm; under autocast it returns the dtype of its input on every device
    linear_cross_entropy  output head and loss in one, without the (N, V) logits

tests/ops/test_kernels.py compares each with its plain form, gradients included.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ops import packed
from ops.packed import Packed


def cpu_is_intel() -> bool:
    """True on Intel CPUs, where MKL takes its optimized paths (on other CPUs it takes slower, generic ones)."""
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            return 'GenuineIntel' in file.read(4096)
    except OSError:
        return platform.system() != 'Darwin' and 'Intel' in platform.processor()


INTEL = cpu_is_intel()  # a constant, since torch.compile traces no reading of files

# ---- linear layers ---------------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """
    nn.Linear with a faster matrix multiplication for the few rows of a CPU decode step.

    Such a product takes as long as reading the weight does, and PyTorch reads it with little more than one core: on AMD
    always, on Intel from 4 rows on. Split into a batch of smaller products, it is read by all cores. The limits were
    measured on AMD EPYCs (Zen 3, Zen 4) and an Intel Emerald Rapids; from 7 rows on, that prefers them as columns.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // self.in_features
        plain = rows > 16 or (rows <= 3 and INTEL) or x.device.type != 'cpu' or x.dtype == torch.bfloat16
        if plain or torch.is_grad_enabled() or torch.is_autocast_enabled('cpu') or torch.compiler.is_compiling():
            return super().forward(x)
        # a multiple of the threads, with about 768 outputs each: much larger pieces outgrow a core's cache
        pieces = torch.get_num_threads() * max(1, self.out_features // (768 * torch.get_num_threads()))
        split = self.out_features // pieces * pieces
        weight = self.weight[:split].view(pieces, -1, self.in_features)
        x_each = x.reshape(1, rows, self.in_features).expand(pieces, -1, -1)
        # both branches give (pieces, rows, outputs)
        as_columns = rows > 6 if INTEL else rows == 1
        y = torch.bmm(weight, x_each.mT).mT if as_columns else torch.bmm(x_each, weight.mT)
        # attention's kernels want each row contiguous
        y = y.transpose(0, 1).reshape(*x.shape[:-1], split).contiguous()
        if split < self.out_features:
            y = torch.cat((y, F.linear(x, self.weight[split:])), dim=-1)
        return y if self.bias is None else y + self.bias


class Int8Weight:
    """A weight as int8 levels times float scales of a shape that broadcasts, with what a model calls of a tensor."""

    def __init__(self, levels: torch.Tensor, scale: torch.Tensor):
        self.levels, self.scale, self.dtype = levels, scale, torch.int8

    def each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Int8Weight:
        """With a function of both of its tensors."""
        return Int8Weight(function(self.levels), function(self.scale))

    def __getitem__(self, index: Any) -> Int8Weight:
        return self.each(lambda t: t[index])

    def unflatten(self, dim: int, sizes: tuple[int, ...]) -> Int8Weight:
        return self.each(lambda t: t.unflatten(dim, sizes))

    @property
    def mT(self) -> Int8Weight:
        return self.each(lambda t: t.mT)

    def to(self, dtype: torch.dtype) -> torch.Tensor:
        return self.levels.to(dtype) * self.scale.to(dtype)


def compiled_row(x: torch.Tensor, weight: Any) -> torch.Tensor:
    """
    x (..., m) times an int8 weight (..., m, n), for torch.compile: (..., n), float32.

    As sums the conversion of the weight, the products and the additions become one loop, which reads int8 at three
    quarters of the speed of memory. PyTorch's products of int8 weights don't, and a product of floats would write them
    first. Four sums at a time, since each addition waits for the one before.
    """
    x = x.float().contiguous()
    x = x.as_strided(x.shape, x.stride())[..., None]  # computed once, and not again in each turn of the loop
    return torch.cat([(x * part).sum(-2) for part in weight.to(torch.float32).chunk(4, dim=-1)], dim=-1)


def per_head(x: torch.Tensor, weight: Any) -> torch.Tensor:
    """
    Each head's own matrix multiplication: x (B, H, T, m), weight (H, m, n) -> (B, H, T, n), in the dtype of x.

    weight: a tensor or an Int8Weight.
    """
    B, H, T, _ = x.shape
    if weight.dtype != x.dtype:
        if B * T == 1 and isinstance(weight, Int8Weight) and torch.compiler.is_compiling():
            return compiled_row(x[:, :, 0], weight)[:, :, None].to(x.dtype)
        weight = cast_once(weight, x.dtype)
    x = x.transpose(0, 1).reshape(H, B * T, -1)  # a broadcast matmul would copy the weights for every sequence
    # away from Intel, memory is read fastest along its contiguous rows, except bfloat16
    along_rows = weight.mT.is_contiguous() and x.dtype != torch.bfloat16 and not INTEL
    y = torch.bmm(weight.mT, x.mT).mT if along_rows else torch.bmm(x, weight)
    return y.reshape(H, B, T, -1).transpose(0, 1)


kept_casts: dict | None = None  # of the decoding in progress: see keep_casts


@contextlib.contextmanager
def keep_casts(casts: dict | None = None) -> Iterator[None]:
    """
    Inside, `per_head` converts each weight once and not in every step; the weights must not change meanwhile.

    Autocast keeps copies of whole parameters, but converts a slice of one again in every step. casts: a dict that keeps
    the copies for the next time; a new one by default.
    """
    global kept_casts
    before, kept_casts = kept_casts, {} if casts is None else casts
    try:
        yield
    finally:
        kept_casts = before


def cast_once(weight: Any, dtype: torch.dtype) -> torch.Tensor:
    """`weight` in `dtype`; inside `keep_casts`, and where no gradient is needed, the copy of an earlier call."""
    if torch.compiler.is_compiling() or kept_casts is None or torch.is_grad_enabled():
        return weight.to(dtype)
    held = weight.levels if isinstance(weight, Int8Weight) else weight
    key = (held.data_ptr(), held.shape, held.stride(), dtype)
    if key not in kept_casts:
        kept_casts[key] = weight.to(dtype)
    return kept_casts[key]


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm, computed in the weight's dtype and returned in that of x; on CUDA autocast would return float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


# ---- dropout ---------------------------------------------------------------------------------------------------------


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """
    Zero each element of x with probability p and scale the others by 1/(1-p) (arXiv:1207.0580).

    F.dropout draws its mask on a single core on a CPU. Here one 64-bit random integer serves four elements, so p is
    rounded to the nearest 1/65536.
    """
    if x.device.type != 'cpu' or torch.compiler.is_compiling():
        return F.dropout(x, p)
    dropped = min(round(p * 65536), 65535)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 32768
    return x * kept.to(x.dtype).mul_(65536 / (65536 - dropped))


class Dropout(nn.Dropout):
    """nn.Dropout, by `dropout`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dropout(x, self.p) if self.training and self.p else x


# ---- attention -------------------------------------------------------------------------------------------------------


def causal_mask(T: int, S: int, device: torch.device | str) -> torch.Tensor:
    """Bool (T, S): which of S keys each of the last T positions may attend to. The last query sees every key."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def repeat_heads(x: torch.Tensor, n_head: int, dim: int = 1) -> torch.Tensor:
    """Each head along `dim` repeated for its group, so that there are n_head; x itself where there are already."""
    if x.size(dim) == 1:  # a view: nothing is copied
        return x.expand(*(n_head if i == dim else -1 for i in range(x.dim())))
    return x if x.size(dim) == n_head else x.repeat_interleave(n_head // x.size(dim), dim=dim)


def attention_pattern(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal softmax(q k^T scale): q (..., T, size), k (..., S, size) -> (..., T, S); rows sum to 1."""
    visible = causal_mask(q.size(-2), k.size(-2), q.device)
    return ((q * scale) @ k.mT).masked_fill_(~visible, float('-inf')).softmax(dim=-1)


# EagerAttention is used without dropout only up to a length at which the patterns take a quarter of the memory of a
# block's other activations: they are H T^2 / 2 numbers beside some 16 T C. A rule and not a trial, which a resumed run
# might decide differently. The longest sequence, in head sizes of 16 or more:
EAGER_HEAD_SIZES = 8
# Smaller blocks skip more of the hidden half, larger ones make better products. Forward and backward in float32, one
# core of a Zen 3, 8 x 6 heads of 64 at T = 256: 35.5 ms by 64, 39.0 by 128, 46.9 by 256; the fused kernel 45.3.
QUERY_BLOCK = {torch.float32: 64}  # others: 128. Neither is an attribute of the class: torch.compile (2.13) reads none


class EagerAttention(torch.autograd.Function):
    """
    Causal self-attention for training on a CPU: it keeps the attention patterns, and its backward pass is written out.

    PyTorch's fused CPU kernel has no dropout and falls back to a slow formula; without dropout its backward pass is
    slower than plain matrix multiplications. The price is memory for the patterns. They are computed for a block of
    queries at a time, over only those keys that some query of the block may see.

    With P the pattern, D = P after dropout, O = D V the output, and g(.) the gradient of the loss: g(D) = g(O) V^T, and
    g(scores) = D g(D) - P rowsum(O g(O)), all products elementwise (arXiv:2205.14135, appendix B).
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, p_drop: float
    ) -> torch.Tensor:
        """q, k (B, H, T, size), v (B, H, T, d), all of one dtype; scale and p_drop floats -> (B, H, T, d)."""
        B, H, T, _ = q.shape
        q, k, v = (t.reshape(B * H, T, t.size(-1)) for t in (q * scale, k, v))
        out = torch.empty(B, T, H, v.size(-1), dtype=v.dtype).transpose(1, 2)  # the layout that c_proj reads
        patterns = []
        with torch.autocast('cpu', enabled=False):
            block = QUERY_BLOCK.get(q.dtype, 128)
            for first in range(0, T, block):
                end = min(first + block, T)
                scores = torch.bmm(q[:, first:end], k[:, :end].mT)
                scores[..., first:] += torch.full_like(scores[0, :, first:], float('-inf')).triu_(1)
                pattern = scores.softmax(dim=-1)
                dropped = dropout(pattern, p_drop) if p_drop else pattern
                out[:, :, first:end] = torch.bmm(dropped, v[:, :end]).unflatten(0, (B, H))
                patterns += [pattern, dropped]
        ctx.scale, ctx.p_drop = scale, p_drop
        ctx.save_for_backward(q, k, v, out, *patterns)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, *patterns = ctx.saved_tensors
        B, H, T, _ = out.shape
        inner = (out * grad).sum(-1).view(B * H, T, 1) if ctx.p_drop else None  # rowsum(O g(O))
        grad = grad.reshape(B * H, T, grad.size(-1))
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for pattern, dropped in zip(patterns[::2], patterns[1::2], strict=True):
            end = pattern.size(2)
            rows, seen = slice(end - pattern.size(1), end), slice(end)
            grad_scores = torch.bmm(grad[:, rows], v[:, seen].mT)
            if inner is not None:
                grad_scores.mul_(dropped).addcmul_(pattern, inner[:, rows], value=-1)
            else:
                grad_scores = torch._softmax_backward_data(grad_scores, pattern, -1, pattern.dtype)
            grad_q[:, rows] = torch.bmm(grad_scores, k[:, seen]).mul_(ctx.scale)
            grad_k[:, seen].baddbmm_(grad_scores.mT, q[:, rows])
            grad_v[:, seen].baddbmm_(dropped.mT, grad[:, rows])
        return *(t.unflatten(0, (B, H)) for t in (grad_q, grad_k, grad_v)), None, None


def attend_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """
    The formula, for few queries that share their keys and values: q (B, K, G, size), k and v (B, K, S, size).

    mask: bool (G or 1, S), which keys are seen. On a GPU this is how a step of GQA and MLA attends where there is a
    mask, as in a captured step, or a size above 256, as a latent has. Both rule out the one kernel of SDPA that divides
    the keys among the multiprocessors; the others give all S keys of a sequence to one. cuBLAS divides them
    (BENCHMARKS.md).
    """
    B, K, G, size = q.shape
    q, k = (q * scale).reshape(B * K, G, size), k.reshape(B * K, -1, size).mT
    wide = torch.promote_types(q.dtype, torch.float32)
    # a rounding in between would cost large scores too much; a product without one is for GPUs, and has no gradient
    unrounded = q.is_cuda and q.dtype != wide and not torch.is_grad_enabled()
    scores = torch.bmm(q, k, out_dtype=wide) if unrounded else torch.bmm(q, k).to(wide)
    if mask is not None:
        scores = scores.masked_fill(~mask, float('-inf'))
    return scores.softmax(dim=-1).to(v.dtype).view(B, K, G, -1) @ v


def attend_group(q: torch.Tensor, k: Any, v: Any, scale: float, mask: torch.Tensor | None = None) -> torch.Tensor:
    """One query per head, the heads that share keys as rows: q (B, K, H/K, size), k, v (B, K, S, .); mask (1, S)."""
    if isinstance(k, Packed):
        return packed.attend(q, k, v, scale, mask)
    if q.is_cuda and (mask is not None or q.size(-1) > 256):
        return attend_rows(q, k, v, scale, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def fast_attention(
    q: torch.Tensor,
    k: Any,
    v: Any,
    scale: float,
    p_drop: float = 0.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    softmax(q k^T scale) v: q (B, H, T, size), k (B, K, S, size), v (B, K, S, d) -> (B, H, T, d).

    Where K < H, each key/value head serves H/K neighboring query heads. mask: bool (T or 1, S), which keys each query
    sees; None: causal, the queries being the last T of the S positions. p_drop: of the pattern's entries. k and v may
    be Packed where T is 1 (see `packed.attend`).
    """
    T, S = q.size(-2), k.size(-2)
    if T == 1 and (k.size(1) < q.size(1) or isinstance(k, Packed)):
        # the queries of a group become the rows of one matrix: no key or value is copied
        rows = q.reshape(q.size(0), k.size(1), -1, q.size(-1))
        return attend_group(rows, k, v, scale, mask).flatten(1, 2).unsqueeze(2)
    if k.size(1) < q.size(1):
        k, v = repeat_heads(k, q.size(1)), repeat_heads(v, q.size(1))
    square = mask is None and T == S
    trains_on_cpu = torch.is_grad_enabled() and q.device.type == 'cpu'
    short = T <= EAGER_HEAD_SIZES * max(16, q.size(-1))
    if square and trains_on_cpu and (p_drop or short):
        return EagerAttention.apply(q, k, v, scale, p_drop)
    # SDPA aligns its is_causal mask top-left, which is right only where T equals S; a single query sees every key
    if mask is None and 1 < T < S:
        mask = causal_mask(T, S, q.device)
    size = v.size(-1)
    if T > 1 and q.size(-1) != size:  # its fast kernels want queries, keys and values of one size
        q, k, v = (F.pad(t, (0, max(q.size(-1), size) - t.size(-1))) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p_drop, is_causal=square, scale=scale)
    return y[..., :size]


# ---- loss ------------------------------------------------------------------------------------------------------------


def logits_gradient(log_p: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """
    The gradient of rows' losses with respect to their logits, from log_p (N, V): p, less 1 at each id (N, 1).

    May overwrite log_p. A compiler computes the 1 by a comparison, in the same pass as p; a scatter would be two passes
    more.
    """
    if torch.compiler.is_compiling():
        return log_p.exp() - (torch.arange(log_p.size(1), device=ids.device) == ids).to(log_p.dtype)
    return log_p.exp_().scatter_add_(1, ids, -torch.ones_like(ids, dtype=log_p.dtype))


def loss_rows(device: str, vocab_size: int) -> int:
    """How many rows LinearCrossEntropy takes at a time: enough for fast products, more of a small vocabulary."""
    return max({'cuda': 4096}.get(device, 512), 2**22 // vocab_size)


class LinearCrossEntropy(torch.autograd.Function):
    """
    Output head and cross-entropy in one, a few rows at a time, so that the (N, V) logits never exist as a whole.

    The gradient with respect to the logits is computed in the forward pass, while they are at hand, so nothing is
    computed twice. `backward` can run only once: it scales the stored weight gradient (V x C) in place.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        wide = torch.promote_types(dtype, torch.float32)
        rows = loss_rows(kind, weight.size(0))
        low_x, low_weight, scored = x.to(dtype), weight.to(dtype), (targets != -1)[:, None]
        grad_x, grad_weight = torch.empty_like(low_x), torch.zeros_like(weight)
        total = torch.zeros((), dtype=wide, device=x.device)
        with torch.autocast(kind, enabled=False):
            for first in range(0, x.size(0), rows):
                part = slice(first, first + rows)
                ids = targets[part].clamp(min=0)[:, None]
                log_p = (low_x[part] @ low_weight.T).log_softmax(dim=-1, dtype=wide)
                total -= (log_p.gather(1, ids) * scored[part]).sum()
                # a row that isn't scored counts in neither product, which costs less than to zero its logits
                error = logits_gradient(log_p, ids).to(dtype)
                grad_x[part] = (error @ low_weight) * scored[part]
                seen_x = low_x[part] * scored[part]
                if dtype == grad_weight.dtype:
                    grad_weight.addmm_(error.T, seen_x)
                else:
                    grad_weight += error.T @ seen_x
                del log_p, error  # before the next piece's are made
        count = scored.sum().clamp(min=1)  # a batch without a scored target has loss 0
        # divided by count only in `backward`: in float16 they would underflow
        ctx.save_for_backward(grad_x, grad_weight, count)
        ctx.x_dtype = x.dtype
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_x, grad_weight, count = ctx.saved_tensors
        grad = grad / count
        return grad_x.to(ctx.x_dtype) * grad, grad_weight.mul_(grad.to(grad_weight.dtype)), None


def linear_cross_entropy(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """
    Mean of F.cross_entropy(x @ weight.T, targets, ignore_index=-1), float32 or wider, without the logits in memory.

    x (N, C), weight (V, C), targets (N,) int64, -1 where a row isn't scored. Its backward pass runs once only.
    """
    return LinearCrossEntropy.apply(x, weight, targets)
