"""
The key/value cache: what attention remembers of the tokens so far. It knows shapes and positions, and no attention.

A cache of KINDS but 'float' holds Packed tensors instead of torch.Tensors. What attention sees is always what is held,
the newest tokens included, so that the logits don't depend on how a text is cut into calls.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ops.packed import Form, Packed

KINDS: dict[str, dict[str, int]] = {  # of numbers, as --cache names them
    'float': {},
    'int8': dict(bits=8),
    'int4': dict(bits=4, group=32),
}


class Cache:
    """
    What attention remembers of the tokens so far: preallocated tensors per layer, time on dimension -2.

    MHA caches keys and values, MLA its latent. `length` of `max_tokens` tokens are filled. GPT.init_cache makes one.
    """

    def __init__(self, layers: list[tuple[Any, ...]], max_tokens: int):
        self.layers = layers  # per layer a tuple of tensors (B, ..., max_tokens, size)
        self.max_tokens = max_tokens
        self.length = 0

    @classmethod
    def allocate(
        cls,
        n_layer: int,
        shapes: tuple[tuple[int, ...], ...],
        batch_size: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        kind: str = 'float',
        wide: int = 0,
    ) -> Cache:
        """
        An empty cache. shapes: of what each layer caches of one token of one sequence.

        kind: of KINDS, or a ValueError; wide: the last numbers of each vector that keep 16 bits in any case.
        """

        def empty(*heads: int) -> Any:
            sizes = (batch_size, *heads[:-1], max_tokens)
            if kind == 'float':
                return torch.zeros(*sizes, heads[-1], dtype=dtype, device=device)
            mixed = len(shapes) > 1  # keys and values; a latent is mixed in its weights
            return Form(heads[-1], wide=wide, **KINDS[kind]).empty(sizes, dtype, device, mixed)

        if kind not in KINDS:
            raise ValueError(f"a cache's numbers can't be '{kind}'; choose {', '.join(KINDS)}")
        return cls([tuple(empty(*shape) for shape in shapes) for _ in range(n_layer)], max_tokens)

    @property
    def batch_size(self) -> int:
        return self.layers[0][0].size(0)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, filled or not."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)

    @property
    def bytes_per_token(self) -> int:
        """Bytes for one token of one sequence, over all layers."""
        return self.nbytes // (self.batch_size * self.max_tokens)

    def positions(self, T: int) -> slice:
        """The positions of the next T tokens. ValueError where they don't fit."""
        if self.length + T > self.max_tokens:
            raise ValueError(f'{self.length + T} tokens do not fit into a cache of max_tokens={self.max_tokens}')
        return slice(self.length, self.length + T)

    def append(self, layer: int, *new: torch.Tensor, whole: bool = True) -> list[Any]:
        """
        Write `new` (each (B, ..., T, size)) after what `layer` holds. Returns views of all that is filled now, and the
        mask of what each query sees: None, since the queries are the last T of it.

        whole: of a cache in fewer bits, floats also for a single new token, which attends to Packed tensors otherwise.
        """
        T = new[0].size(-2)
        place = self.positions(T)
        for tensor, part in zip(self.layers[layer], new, strict=True):
            tensor[..., place, :] = part
        filled = (tensor[..., : place.stop, :] for tensor in self.layers[layer])
        return [*(floats(filled) if whole or T > 1 else filled), None]

    def advance(self, T: int) -> None:
        """Count T tokens as filled, once every layer has appended them."""
        self.length += T

    def repeat(self, times: int) -> Cache:
        """A cache with each sequence repeated `times` times, for several samples of one prompt."""
        layers = [tuple(tensor.repeat_interleave(times, dim=0) for tensor in layer) for layer in self.layers]
        copy = Cache(layers, self.max_tokens)
        copy.length = self.length
        return copy


def floats(tensors: Iterable[Any]) -> list[torch.Tensor]:
    """The tensors, Packed ones unpacked."""
    return [tensor.whole() if isinstance(tensor, Packed) else tensor for tensor in tensors]


class FixedCache:
    """
    A view of a Cache for steps of fixed shape: the next position is a tensor (1,), and attention sees the whole buffer.

    It has the methods of Cache that a model calls. The tensors are the cache's own.
    """

    def __init__(self, cache: Cache):
        self.layers, self.max_tokens = cache.layers, cache.max_tokens
        self.position = torch.full((1,), cache.length, device=cache.layers[0][0].device)

    def positions(self, T: int) -> torch.Tensor:
        """Where the next token stands. T is 1."""
        return self.position

    def append(self, layer: int, *new: torch.Tensor, whole: bool = True) -> list[Any]:
        """
        Write `new` (each (B, ..., 1, size)) at the position; returns the whole buffers, as Cache.append does, and which
        keys the one query sees: bool (1, max_tokens).
        """
        buffers = self.layers[layer]
        seen = torch.arange(self.max_tokens, device=self.position.device)[None] <= self.position
        filled = [t.index_copy_(-2, self.position, part.to(t.dtype)) for t, part in zip(buffers, new, strict=True)]
        return [*(floats(filled) if whole else filled), seen]

    def advance(self, T: int) -> None:
        """Nothing: FixedStep sets the position before each step."""
