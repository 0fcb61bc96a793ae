"""
Weight-only int8 for decoding on a CPU: every weight matrix in one byte per number, with a scale per output.

A decode step with few rows takes as long as reading the weights does, and int8 is a quarter of float32. Weights are
rounded to 255 steps of their row's largest magnitude, activations to bf16 for the product, which adds in float32.
Embeddings, norms, biases and MLA's up-projection, which is multiplied head by head, stay as they are.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from model import GPT
from ops.kernels import Linear

BLOCK = 16  # PyTorch's product reads a row in blocks of as many inputs, past its end too, and checks nothing
ROWS = 16  # with more rows than these a product is bounded by arithmetic, and float32's is faster


class Int8Linear(nn.Module):
    """The product of a Linear with its weight in int8. Not to be trained."""

    weight: torch.Tensor
    scale: torch.Tensor
    low_scale: torch.Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        weight = linear.weight.detach()
        scale = weight.abs().amax(dim=1).clamp(min=torch.finfo(weight.dtype).tiny).float() / 127
        low = (weight / scale[:, None]).round().to(torch.int8)
        self.more = -self.in_features % BLOCK  # zeros after each row
        self.register_buffer('weight', F.pad(low, (0, self.more)))
        self.register_buffer('scale', scale)
        self.register_buffer('low_scale', scale.bfloat16())  # in the activations' dtype, as the product wants it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in_features) -> (..., out_features)."""
        low = F.pad(x.bfloat16(), (0, self.more)) if self.more else x.bfloat16()
        if x.numel() // self.in_features > ROWS:
            return F.linear(low.to(x.dtype), self.weight.to(x.dtype) * self.scale[:, None].to(x.dtype), self.bias)
        rows = low.reshape(-1, self.weight.shape[1]).contiguous()
        y = torch._weight_int8pack_mm(rows, self.weight, self.low_scale).to(x.dtype)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def quantize(model: Any) -> GPT:
    """Replace the weight matrices of a model on the CPU by int8 ones, in place, for decoding. Returns the model."""
    for block in model.transformer.h:
        for layer in (block.attn, block.mlp):
            for name, child in list(layer.named_children()):
                if isinstance(child, Linear) and name != 'c_kv_up':
                    setattr(layer, name, Int8Linear(child))
    model.lm_head = Int8Linear(model.lm_head)  # wte, which shares its weight, is read row by row and stays
    return model


def weight_bytes(model: Any, itemsize: int) -> int:
    """
    Bytes of the weights that a decode step reads: int8 ones as they are, others with `itemsize` bytes per number.

    Tables of embeddings and positions aren't read as a whole, the output head is.
    """
    low = sum(part.weight.nbytes for part in model.modules() if isinstance(part, Int8Linear))
    head = isinstance(model.lm_head, Int8Linear)
    tables = model.transformer.wte.weight.numel() if head and model.config.tied else 0
    return low + (model.get_num_params() - tables) * itemsize  # get_num_params leaves the positions out
