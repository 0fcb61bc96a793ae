"""
Weight-only int4 for decoding on a CPU: weight matrices in 5 bits per number, scales included.

Of each 32 neighboring inputs of an output, weights are rounded to 16 steps from the least to the greatest, which is the
form of llama.cpp's Q4_1: the weights of a file of that kind come back to within the rounding of scales to bf16.
Activations are rounded to bf16 and products added in float32. The output head is better kept in int8: in int4 it
costs SmolLM2, whose other weights come from such a file, 0.05 nats.
"""

import torch
from torch import nn
from torch.nn import functional as F

from core.cli.errors import UserError

GROUP = 32  # weights that share a scale and a zero: the fewest that PyTorch's product knows
TILE = 16  # it wants the number of outputs to be a multiple of this
ROWS = 16  # and takes many times as long per row with more rows than these


def check_cpu() -> None:
    """UserError on a CPU for which PyTorch has no fast product of int4 weights."""
    if torch.backends.cpu.get_cpu_capability() not in ('AVX2', 'AVX512'):
        raise UserError('int4 weights require a CPU with AVX2 or AVX-512; use --weights=int8')


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (outputs, inputs), about (level - 8) s + z: its levels, 0 to 15, and s and z (groups, outputs, 2)."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    least, greatest = groups.aminmax(dim=-1)
    scale = ((greatest - least) / 15).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
    zero = (least + 8 * scale.float()).bfloat16()
    levels = ((groups - zero.float()[..., None]) / scale.float()[..., None] + 8).round().clamp(0, 15)
    return levels.flatten(1).int(), torch.stack((scale, zero), dim=-1).transpose(0, 1).contiguous()


class Int4Linear(nn.Module):
    """The product of a Linear with its weight in int4. Not to be trained."""

    weight: torch.Tensor
    scales: torch.Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        check_cpu()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.more = -self.in_features % GROUP, -self.out_features % TILE  # zeros after each row, and rows of zeros
        levels, scales = rounded(F.pad(linear.weight.detach(), (0, self.more[0], 0, self.more[1])))
        self.register_buffer('weight', torch._convert_weight_to_int4pack_for_cpu(levels, 2))
        self.register_buffer('scales', scales)
        self.low_bytes = self.weight.nbytes + scales.nbytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in_features) -> (..., out_features)."""
        rows = x.bfloat16().flatten(0, -2)
        if self.more[0]:
            rows = F.pad(rows, (0, self.more[0]))
        y = self.product(rows) if len(rows) <= ROWS else torch.cat([self.product(part) for part in rows.split(ROWS)])
        y = y[:, : self.out_features].to(x.dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """bfloat16 rows (n, inputs) -> (n, outputs), both padded."""
        return torch._weight_int4pack_mm_for_cpu(rows, self.weight, GROUP, self.scales)
