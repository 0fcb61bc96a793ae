"""
Weight-only int8 for decoding on a CPU: every weight matrix in one byte per number, with a scale per output.

A decode step with few rows takes as long as reading the weights does, and int8 is a quarter of float32. Weights are
rounded to 255 steps of their row's largest magnitude. Activations are rounded to bf16 and products added in float32.
With products='int8', on a CPU that multiplies int8 numbers (VNNI), activations are rounded to 255 steps between the
least and the largest of a token. That is faster, and costs models with outliers more loss (BENCHMARKS.md).

Embeddings, norms, biases and MLA's up-projection, which is multiplied head by head, stay as they are.
"""

import warnings
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from core.cli.errors import UserError
from core.convert.int4 import Int4Linear
from model import GPT
from ops.kernels import Linear

BLOCK = 16  # PyTorch's bf16 product reads a row in blocks of as many inputs, past its end too, and checks nothing
ROWS = 16  # with more rows than these the bf16 product is bounded by arithmetic, and float32's is faster


def arithmetic(products: str) -> str:
    """`products`, 'int8' or 'bfloat16', where this CPU has it; UserError otherwise."""
    vnni = bool(getattr(torch.cpu, '_is_vnni_supported', bool)())  # without it FBGEMM's sums can overflow
    if products == 'int8' and not (vnni and 'fbgemm' in torch.backends.quantized.supported_engines):
        raise UserError('this CPU multiplies no int8 numbers (VNNI); use --int8_products=bfloat16')
    return products


def packed(weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """An int8 weight (outputs, inputs), its scales (outputs,) and the bias, as FBGEMM's product reads them."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = 'fbgemm'
    try:
        with warnings.catch_warnings(action='ignore'):  # tensors of quantized dtypes are deprecated
            zeros = torch.zeros(len(scale), dtype=torch.int64)
            tensor = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
            return torch.ops.quantized.linear_prepack(tensor, None if bias is None else bias.detach().float())
    finally:
        torch.backends.quantized.engine = before


class Int8Linear(nn.Module):
    """The product of a Linear with its weight in int8. Not to be trained."""

    weight: torch.Tensor
    scale: torch.Tensor
    low_scale: torch.Tensor

    def __init__(self, linear: nn.Linear, products: str = 'bfloat16'):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        weight = linear.weight.detach()
        scale = weight.abs().amax(dim=1).clamp(min=torch.finfo(weight.dtype).tiny).float() / 127
        low = (weight / scale[:, None]).round().to(torch.int8)
        self.low_bytes = low.nbytes
        self.packed = packed(low, scale, self.bias) if arithmetic(products) == 'int8' else None
        if self.packed is None:
            self.more = -self.in_features % BLOCK  # zeros after each row
            self.register_buffer('weight', F.pad(low, (0, self.more)))
            self.register_buffer('scale', scale)
            self.register_buffer('low_scale', scale.bfloat16())  # in the activations' dtype, as the product wants it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in_features) -> (..., out_features)."""
        return self.by_bfloat16(x) if self.packed is None else self.by_int8(x.float()).to(x.dtype)

    def by_int8(self, x: torch.Tensor) -> torch.Tensor:
        """The product in int8, in which x (..., in_features) is rounded as a whole: so tokens get one size before."""
        if x.numel() == self.in_features:
            return torch.ops.quantized.linear_dynamic(x, self.packed)
        size = x.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        y = torch.ops.quantized.linear_dynamic(x / size, self.packed)
        return y * size if self.bias is None else torch.addcmul(self.bias.float(), y - self.bias, size)

    def by_bfloat16(self, x: torch.Tensor) -> torch.Tensor:
        """The product in bfloat16, or with many rows in the dtype of x (..., in_features)."""
        low = F.pad(x.bfloat16(), (0, self.more)) if self.more else x.bfloat16()
        if x.numel() // self.in_features > ROWS:
            return F.linear(low.to(x.dtype), self.weight.to(x.dtype) * self.scale[:, None].to(x.dtype), self.bias)
        rows = low.reshape(-1, self.weight.shape[1]).contiguous()
        y = torch._weight_int8pack_mm(rows, self.weight, self.low_scale).to(x.dtype)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def quantize(model: Any, products: str = 'bfloat16', kind: str = 'int8') -> GPT:
    """
    Replace the weight matrices of a model on the CPU by those of a kind, 'int8' or 'int4', in place, for decoding.

    The output head becomes int8 in both. products: of int8 weights, 'bfloat16', or 'int8', with which activations are
    rounded too. Returns the model. UserError where the CPU can't.
    """

    def low(linear: nn.Linear) -> nn.Module:
        return Int4Linear(linear) if kind == 'int4' else Int8Linear(linear, products)

    for block in model.transformer.h:
        for layer in (block.attn, block.mlp):
            for name, child in list(layer.named_children()):
                if isinstance(child, Linear) and name != 'c_kv_up':
                    setattr(layer, name, low(child))
    model.lm_head = Int8Linear(model.lm_head, products)  # wte, which shares its weight, is read row by row and stays
    return model


def weight_bytes(model: Any, itemsize: int) -> int:
    """Bytes of the weights that a decode step reads, `itemsize` for each that isn't in few bits; tables it looks up."""
    low = sum(part.low_bytes for part in model.modules() if isinstance(part, (Int8Linear, Int4Linear)))
    head = not isinstance(model.lm_head, Linear)
    tables = model.transformer.wte.weight.numel() if head and model.config.tied else 0
    return low + (model.get_num_params() - tables) * itemsize  # get_num_params leaves the positions out
