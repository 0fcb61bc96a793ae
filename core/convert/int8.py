"""
Weight-only int8 for decoding on a CPU: every weight matrix in one byte per number, with a scale per output.

A decode step with few rows takes as long as reading the weights does, and int8 is a quarter of float32. Weights are
rounded to 255 steps of their row's largest magnitude. Activations are rounded to bf16 and products added in float32. A
step of one row that torch.compile has compiled rounds no activations, and is the fastest (ops/kernels.py).

Embeddings, norms and biases stay as they are.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from core.convert.int4 import Int4Linear
from model import GPT
from ops.kernels import Int8Weight, Linear, compiled_row

BLOCK = 16  # PyTorch's bf16 product reads a row in blocks of as many inputs, past its end too, and checks nothing
ROWS = 16  # with more rows than these the bf16 product is bounded by arithmetic, and float32's is faster


class Int8Linear(nn.Module):
    """The product of a Linear with its weight in int8. Not to be trained."""

    levels: torch.Tensor
    scale: torch.Tensor
    low_scale: torch.Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        weight = linear.weight.detach()
        scale = weight.abs().amax(dim=1).clamp(min=torch.finfo(weight.dtype).tiny).float() / 127
        low = (weight / scale[:, None]).round().to(torch.int8)
        self.low_bytes = low.nbytes
        self.more = -self.in_features % BLOCK  # zeros after each row
        self.register_buffer('levels', F.pad(low, (0, self.more)))
        self.register_buffer('scale', scale)
        self.register_buffer('low_scale', scale.bfloat16())  # in the activations' dtype, as the product wants it

    @property
    def weight(self) -> Int8Weight:
        """(outputs, inputs)."""
        return Int8Weight(self.levels[:, : self.in_features], self.scale[:, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in_features) -> (..., out_features)."""
        count = x.numel() // self.in_features
        if count > ROWS:
            return F.linear(x.bfloat16().to(x.dtype), self.weight.to(x.dtype), self.bias)
        if count == 1 and torch.compiler.is_compiling():
            y = compiled_row(x, self.weight.mT).to(x.dtype)
        else:
            rows = F.pad(x.bfloat16().reshape(-1, self.in_features), (0, self.more)).contiguous()
            y = torch._weight_int8pack_mm(rows, self.levels, self.low_scale).to(x.dtype)
            y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def quantize(model: Any, kind: str = 'int8') -> GPT:
    """
    Replace the weight matrices of a model on the CPU by those of a kind, 'int8' or 'int4', in place, for decoding.

    The output head and MLA's up-projection, which is multiplied head by head, become int8 in both. Returns the model.
    UserError where the CPU can't.
    """
    for block in model.transformer.h:
        for layer in (block.attn, block.mlp):
            for name, child in list(layer.named_children()):
                if isinstance(child, Linear):
                    low = Int4Linear(child) if kind == 'int4' and name != 'c_kv_up' else Int8Linear(child)
                    setattr(layer, name, low)
    model.lm_head = Int8Linear(model.lm_head)  # wte, which shares its weight, is read row by row and stays
    return model


def weight_bytes(model: Any, itemsize: int) -> int:
    """Bytes of the weights that a decode step reads, `itemsize` for each that isn't in few bits; tables it looks up."""
    low = sum(part.low_bytes for part in model.modules() if isinstance(part, (Int8Linear, Int4Linear)))
    head = not isinstance(model.lm_head, Linear)
    tables = model.transformer.wte.weight.numel() if head and model.config.tied else 0
    return low + (model.get_num_params() - tables) * itemsize  # get_num_params leaves the positions out
