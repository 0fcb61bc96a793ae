"""
Forms of MLA that no user trains, for studies: where does the latent come from, if not from a trained W_D of each layer?

    mla_slice    the first r numbers of the layer's normed input; with r = C keys and values are MHA's, and what is left
                 of MLA is the rotated key that all heads share
    mla_frozen   a random projection that is never trained
    mla_shared   one trained projection for all layers

They are trained and resumed by the ordinary scripts through with_variants.py, and measured by studies/staircase.py.
Checkpoints name them, so that the scripts alone refuse them.
"""

import math

import torch
from torch import Tensor

from core.cli import ranges
from core.runs import models
from model import apply_rope
from model_mla import MLAGPT, MLAConfig, MultiHeadLatentAttention
from ops.kernels import Linear


class SliceAttention(MultiHeadLatentAttention):
    """MLA whose latent is a slice of its input. c_kv_down makes the shared position key alone."""

    def __init__(self, config: MLAConfig, layer: int):
        super().__init__(config, layer)
        if not config.n_rope:
            raise ValueError("this form of MLA needs pos='rope' and a shared position key")
        self.c_kv_down = Linear(config.n_embd, config.n_rope, bias=config.bias)

    def content(self, x: Tensor) -> Tensor:
        """The latent (B, T, r) before its norm, from the layer's normed input x (B, T, C)."""
        return x[..., : self.n_latent]

    def latent(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        k_rope = self.c_kv_down(x) if rope is None else apply_rope(self.c_kv_down(x), rope)
        return torch.cat((self.kv_norm(self.content(x)), k_rope), dim=-1)

    @staticmethod
    def parts(config: MLAConfig) -> dict[str, dict[str, int]]:
        return {'c_kv_up': MultiHeadLatentAttention.parts(config)['c_kv_up'], 'c_kv_down': {'k_rope': config.n_rope}}


class FrozenAttention(SliceAttention):
    """MLA with a random W_D that isn't trained."""

    def __init__(self, config: MLAConfig, layer: int):
        super().__init__(config, layer)
        self.c_latent = Linear(config.n_embd, config.n_latent, bias=False).requires_grad_(False)

    def content(self, x: Tensor) -> Tensor:
        return self.c_latent(x)


class SliceGPT(MLAGPT):
    attention = SliceAttention

    def init_std(self, name: str, part: str = '') -> float:
        """The latent starts at rms 1, as in MLAGPT with latent_init='fan_in'."""
        return 1 / math.sqrt(self.config.n_embd) if '.c_latent.' in name else super().init_std(name, part)


class FrozenGPT(SliceGPT):
    attention = FrozenAttention


class SharedGPT(FrozenGPT):
    def __init__(self, config: MLAConfig, seed: int = 1337):
        super().__init__(config, seed)
        shared = self.transformer.h[0].attn.c_latent.requires_grad_()
        for block in self.transformer.h:
            block.attn.c_latent = shared


VARIANTS: dict[str, type[MLAGPT]] = {'mla_slice': SliceGPT, 'mla_frozen': FrozenGPT, 'mla_shared': SharedGPT}


def register() -> None:
    """Make the variants values of --attention in this process."""
    models.KINDS.update({name: (model_class, MLAConfig) for name, model_class in VARIANTS.items()})
    ranges.CHOICES['attention'] = tuple(models.KINDS)
