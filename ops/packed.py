"""
Numbers in few bits: what a cache in fewer bits holds, and attention for one query that reads it as it is stored.

A number becomes a whole number n of `bits` bits, and each group of a vector's numbers gets a scale s in bfloat16, such
that (n + 1/2) s is about the number: 2^bits levels, symmetric about zero. The last `wide` numbers of a vector, MLA's
rotated key, stay in bfloat16 (arXiv:2602.10718).

One large number would set the scale of all others. So keys and values may be mixed by a Hadamard matrix first, and
queries and outputs with them in each step (QuaRot, arXiv:2404.00456); a latent can be mixed in its weights
(core/convert/bits.py).

One scale for a whole vector can be taken out of a product: q . k_j = s_j (q . n_j + sum(q) / 2). A CPU with integer
units therefore multiplies int8 as it is stored, with q in two digits of base 127 and the softmax's weights in three;
bfloat16 would be less exact. Where there is little to read, elsewhere, and with several groups, the numbers become
floats, in pieces that stay in the processor's cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

BLOCK = 512  # tokens that become floats at once on a GPU
AT_ONCE = 2**19  # numbers that do on a CPU; so few take less time as floats than as integers
BASE = 127  # of `digits`
LONGEST = 2**17  # the sum of more products of two bytes may not fit into int32


@dataclass(frozen=True)
class Form:
    """How vectors of `size` numbers are stored; group: numbers per scale, 0: all."""

    size: int
    bits: int
    group: int = 0
    wide: int = 0

    @property
    def few(self) -> int:
        """How many numbers of a vector are stored in `bits` bits."""
        return self.size - self.wide

    @property
    def groups(self) -> int:
        return -(-self.few // (self.group or self.few))

    @property
    def bytes(self) -> int:
        """What a vector takes, scales included."""
        return -(-self.few * self.bits // 8) + 2 * (self.groups + self.wide)

    def levels(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (..., size) as whole numbers in floats (..., few), from -2^bits / 2 on, and scales (..., groups)."""
        each, half = self.group or self.few, 2 ** (self.bits - 1)
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # bfloat16 rounds a quotient near 100 to halves
        x = F.pad(x[..., : self.few], (0, self.groups * each - self.few)).unflatten(-1, (self.groups, each))
        scale = (x.abs().amax(-1) / half).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
        levels = (x / scale.to(x.dtype)[..., None]).floor().clamp(-half, half - 1)
        return levels.flatten(-2)[..., : self.few], scale

    def numbers(self, levels: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What `levels` returned, as numbers (..., few) again; it may overwrite them."""
        scale = scale.to(dtype)
        if self.groups > 1:
            scale = scale.repeat_interleave(self.group, dim=-1)[..., : self.few]
        return levels.to(dtype).add_(0.5).mul_(scale)

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., size) as a cache would give it back."""
        kept = x[..., self.few :].bfloat16().to(x.dtype)
        return torch.cat((self.numbers(*self.levels(x), x.dtype), kept), dim=-1)

    def pack(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (..., size) in bytes (..., few, or half as many for 4 bits), and bfloat16 scales and wide numbers."""
        levels, scale = self.levels(x)
        high = torch.cat((scale, x[..., self.few :].bfloat16()), dim=-1)
        if self.bits == 8:
            return levels.to(torch.int8), high
        first, second = F.pad(levels + 8, (0, self.few % 2)).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
        return first | second << 4, high

    def empty(self, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device, mixed: bool = False) -> Packed:
        """A Packed (*sizes, size) of zeros, to be unpacked into `dtype`. mixed: by `hadamard`, without wide numbers."""
        kind, each = (torch.int8, self.few) if self.bits == 8 else (torch.uint8, -(-self.few // 2))
        low = torch.zeros(*sizes, each, dtype=kind, device=device)
        high = torch.zeros(*sizes, self.groups + self.wide, dtype=torch.bfloat16, device=device)
        mix = hadamard(self.size).to(torch.promote_types(dtype, torch.float32)).to(device) if mixed else None
        return Packed(low, high, self, dtype, mix)


@functools.cache
@torch.inference_mode(False)  # it is kept, whatever the context of the first call
def hadamard(size: int) -> torch.Tensor:
    """An orthogonal matrix (size, size) of like magnitudes: Hadamard's and, for an odd factor, a cosine basis."""
    twos = size & -size
    keys: dict[str, Any] = dict(dtype=torch.float64, device='cpu')
    matrix = torch.ones(1, 1, **keys)
    while len(matrix) < twos:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], **keys) / 2**0.5, matrix)
    n = torch.arange(size // twos, **keys)
    cosines = torch.cos(torch.pi / len(n) * (n + 0.5) * n[:, None]) * (2 / len(n)) ** 0.5
    cosines[0] /= 2**0.5
    return torch.kron(matrix, cosines)


class Packed:
    """A tensor (..., S, size) in few bits, with those methods of torch.Tensor that a cache and a model call."""

    def __init__(
        self, low: torch.Tensor, high: torch.Tensor, form: Form, dtype: torch.dtype, mix: torch.Tensor | None = None
    ):
        """low, high: what Form.pack returned, of x or, with an orthogonal matrix `mix` (size, size), of x mix^T."""
        self.low, self.high, self.form, self.dtype, self.mix = low, high, form, dtype, mix
        self.device, self.nbytes = low.device, low.nbytes + high.nbytes

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.low.shape[:-1], self.form.size))

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Packed:
        """With a function of both of its tensors."""
        return Packed(function(self.low), function(self.high), self.form, self.dtype, self.mix)

    def unsqueeze(self, dim: int) -> Packed:
        return self.each(lambda t: t.unsqueeze(dim))

    def repeat_interleave(self, times: int, dim: int) -> Packed:
        return self.each(lambda t: t.repeat_interleave(times, dim))

    def to(self, dtype: torch.dtype) -> Packed:
        return Packed(self.low, self.high, self.form, dtype, self.mix)

    def __getitem__(self, index: Any) -> Packed:
        return self.each(lambda t: t[index])

    def __setitem__(self, index: Any, x: torch.Tensor) -> None:
        self.low[index], self.high[index] = self.form.pack(self.mixed(x))

    def index_copy_(self, dim: int, index: torch.Tensor, x: torch.Tensor) -> Packed:
        for own, new in zip((self.low, self.high), self.form.pack(self.mixed(x)), strict=True):
            own.index_copy_(dim, index, new)
        return self

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., size) in the basis in which it is stored."""
        return x if self.mix is None else x.to(self.mix.dtype) @ self.mix.mT

    def unmixed(self, x: torch.Tensor) -> torch.Tensor:
        """The other way."""
        return x if self.mix is None else (x.to(self.mix.dtype) @ self.mix).to(x.dtype)

    @property
    def scale(self) -> torch.Tensor:
        return self.high[..., : self.form.groups]

    def kept(self, dtype: torch.dtype) -> torch.Tensor:
        """The wide numbers of each vector (..., wide)."""
        return self.high[..., self.form.groups :].to(dtype)

    def few(self) -> torch.Tensor:
        """The other numbers (..., few) as floats, in the basis in which they are stored."""
        levels = self.low
        if self.form.bits == 4:
            levels = torch.stack((levels & 15, levels >> 4), dim=-1).flatten(-2).to(torch.int8) - 8
            levels = levels[..., : self.form.few]
        return self.form.numbers(levels, self.scale, self.dtype)

    def stored(self) -> torch.Tensor:
        """All of its numbers (..., size) as floats, in the basis in which they are stored."""
        return torch.cat((self.few(), self.kept(self.dtype)), dim=-1) if self.form.wide else self.few()

    def whole(self) -> torch.Tensor:
        """What it stands for: a tensor of floats (..., size)."""
        return self.unmixed(self.stored())

    def blocks(self, tokens: int) -> Iterator[Packed]:
        """So many tokens at a time."""
        for first in range(0, self.size(-2), tokens):
            yield self[..., first : first + tokens, :]

    def fits_integer_units(self) -> bool:
        """True where its numbers can be multiplied as they are stored."""
        # torch._int_mm's product of vectors of one number is wrong
        stored = self.form.bits == 8 and self.form.groups == 1 and self.form.few > 1 and self.device.type == 'cpu'
        if torch.compiler.is_compiling():  # what follows it can't trace, and it makes floats well
            return False
        return stored and self.dtype != torch.float64 and self.size(-2) <= LONGEST and has_integer_units()


# ---- attention -------------------------------------------------------------------------------------------------------


@functools.cache
def has_integer_units() -> bool:
    """True on a CPU with instructions for products of bytes, if PyTorch's product of int8 matrices is exact there."""
    if not torch.cpu._is_vnni_supported():  # without them it may overflow in between, and is slow
        return False
    a, b = torch.full((3, 65), -128, dtype=torch.int8), torch.full((65, 5), 127, dtype=torch.int8)
    return bool((torch._int_mm(a, b) == 65 * -128 * 127).all())


def digits(x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    x (..., G, n) in digits of base 127, from -127 to 127: int8 (..., count G, n), the first digits of all G rows first.

    And what a first digit counts in each row, (..., G, 1).
    """
    unit = x.abs().amax(-1, keepdim=True).clamp_(min=torch.finfo(x.dtype).tiny) / BASE
    rest, found = x / unit, torch.empty(*x.shape[:-2], count, *x.shape[-2:], dtype=torch.int8)
    for place in range(count - 1):
        found[..., place, :, :] = rest  # without its fraction
        rest.frac_().mul_(BASE)
    found[..., -1, :, :] = rest.round_()
    return found.flatten(-3, -2), unit


def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The products of int8 matrices a (B, K, m, n) and b (B, K, n, o), as floats (B, K, m, o)."""
    found = torch.empty(*a.shape[:-1], b.size(-1), dtype=torch.int32)
    for out, left, right in zip(found.flatten(0, 1), a.flatten(0, 1), b.flatten(0, 1), strict=True):
        torch._int_mm(left, right, out=out)
    return found.float()


def attend_integers(q: torch.Tensor, k: Packed, v: Packed, mask: torch.Tensor | None) -> torch.Tensor:
    """`attend` with q (B, K, G, size) scaled already."""
    few, wide = q.split((k.form.few, k.form.wide), dim=-1)
    queries, unit = digits(few, 2)
    worth = torch.cat((torch.diag_embed(unit[..., 0]), torch.diag_embed(unit[..., 0] / BASE)), dim=-1)
    scores = worth @ multiply(k.low, queries.mT).mT + few.sum(-1, keepdim=True) / 2
    scores *= k.scale.mT
    if k.form.wide:
        scores += wide @ k.kept(q.dtype).mT
    if mask is not None:
        scores.masked_fill_(~mask, float('-inf'))
    p = scores.softmax(dim=-1).mul_(v.scale.mT)
    low, unit = digits(p, 3)
    places = q.new_tensor((1, 1 / BASE, BASE**-2))
    total = torch.einsum('i,bkign->bkgn', places, multiply(low, v.low).unflatten(2, (3, -1)))
    return torch.addcmul(p.sum(-1, keepdim=True) / 2, total, unit)


def attend_floats(q: torch.Tensor, k: Packed, v: Packed, mask: torch.Tensor | None, tokens: int) -> torch.Tensor:
    """`attend` with q (B, K, G, size) scaled already, so many tokens at a time."""
    scores = torch.cat([q @ block.stored().mT for block in k.blocks(tokens)], dim=-1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float('-inf'))
    y = torch.zeros_like(q[..., : v.form.few])
    for p, block in zip(scores.softmax(dim=-1).split(tokens, dim=-1), v.blocks(tokens), strict=True):
        y += p @ block.few()
    return y


def attend(q: torch.Tensor, k: Packed, v: Packed, scale: float, mask: torch.Tensor | None = None) -> torch.Tensor:
    """
    softmax(q k^T scale) v for one query per head: q (B, K, G, size), k and v (B, K, S, .) -> (B, K, G, .).

    mask: bool (1, S), which keys are seen. The result lacks v's wide numbers.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        rows, k, v = k.mixed(q.to(dtype) * scale), k.to(dtype), v.to(dtype)
        B, K, S, size = k.shape
        integers = B * K * S * size > AT_ONCE and k.fits_integer_units() and v.fits_integer_units()
        each, tokens = B, BLOCK  # sequences at a time, and tokens of them
        if torch.compiler.is_compiling():
            tokens = S  # each piece would become code of its own, which takes minutes to compile
        elif integers:
            each = max(1, 2**22 // (K * rows.size(2) * S))  # so many scores at once
        elif q.device.type == 'cpu':
            each, tokens = max(1, AT_ONCE // (K * S * size)), max(1, AT_ONCE // (K * size))
        few = attend_integers if integers else functools.partial(attend_floats, tokens=tokens)
        parts = [few(rows[b : b + each], k[b : b + each], v[b : b + each], mask) for b in range(0, B, each)]
        return v.unmixed(torch.cat(parts)).to(q.dtype)
