#!/usr/bin/env bash
# Triton's interpreter multiplies matrices of bfloat16 by their bits: sixteen ones times sixteen ones are 4228120576.
#
# Libraries: triton 3.7.1, torch 2.13.0, numpy 2.4.6 (Python 3.11 or later, Linux).
# What was done: a kernel of one tl.dot multiplies two 16 x 16 matrices of ones on a CPU (TRITON_INTERPRET=1), in three
#   types, into float32. Every element of the product is 16.
# What one would guess: the interpreter is there to test kernels without a GPU, so it gives what a GPU gives, to rounding;
#   a type that it can't compute in raises an error.
# What happens: float16 and float32 give 16. For bfloat16 the interpreter keeps numbers in numpy arrays, and numpy has no
#   such type, so their bits stand there as 16-bit integers. Elementwise operations convert them; the dot multiplies the
#   integers: 0x3F80 is 1.0, and 16 x 0x3F80 x 0x3F80 is 4228120576. No error and no warning. Converting the operands
#   with .to(tl.float32) before the dot gives 16. A test in bfloat16 therefore fails for a right kernel, and a kernel
#   that was made to pass in the interpreter is wrong on a GPU.
#
# Output seen:
#   element of ones(16, 16) @ ones(16, 16)
#     float32                        16
#     float16                        16
#     bfloat16                       4228120576
#     bfloat16, converted before     16
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check 'torch==2.13.0' 'triton==3.7.1' 'numpy==2.4.6'

cat > "$folder/probe.py" <<'PYTHON'
"""Multiplies matrices of ones in Triton's interpreter."""

import torch
import triton
import triton.language as tl


@triton.jit
def product(a, b, c, CONVERT: tl.constexpr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None]
    x, y = tl.load(a + at), tl.load(b + at)
    if CONVERT:
        x, y = x.to(tl.float32), y.to(tl.float32)
    tl.store(c + at, tl.dot(x, y, out_dtype=tl.float32))


def element(dtype, convert=False):
    ones, out = torch.ones(16, 16, dtype=dtype), torch.empty(16, 16)
    product[(1,)](ones, ones, out, convert)
    assert (out == out[0, 0]).all()
    return int(out[0, 0])


found = {
    'float32': element(torch.float32),
    'float16': element(torch.float16),
    'bfloat16': element(torch.bfloat16),
    'bfloat16, converted before': element(torch.bfloat16, convert=True),
}
print('element of ones(16, 16) @ ones(16, 16)')
for name, value in found.items():
    print(f'  {name:30} {value}')
assert list(found.values()) == [16, 16, 16 * 0x3F80**2, 16], 'the behavior has changed'
PYTHON

TRITON_INTERPRET=1 "$python" "$folder/probe.py"
