#!/usr/bin/env bash
# PyTorch's product with int8 weights on a CPU is many times slower with float32 activations than making floats first.
#
# Libraries: torch 2.13.0, numpy 2.4.6 (Python 3.11 or later).
# What was done: torch._weight_int8pack_mm, the product that weight-only int8 decoding (gpt-fast, torchao) calls on a
#   CPU, multiplies 12 rows of activations by a weight of 4096 outputs and 384 inputs, on one thread. Activations and
#   scales are bfloat16 or float32, both of which it takes. Beside it, in alternating turns: the weight is turned into
#   float32, scaled, and multiplied by an ordinary matrix product.
# What one would guess: float32 costs up to a few times what bfloat16 does, and less than the detour, which writes and
#   reads four bytes for each weight; that is what the operation is for.
# What happens: both give the right numbers. bfloat16 is faster than the detour; float32 takes ten or more times as long
#   as the detour, and nothing is said. Cast activations to bfloat16 before the product.
#
# Output seen (an Intel Xeon with AVX512 and AMX; medians of 9 turns):
#   product in bfloat16       1.0 ms   error 4e-03
#   product in float32       42.0 ms   error 9e-07
#   floats first              3.6 ms   error 1e-07
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check 'torch==2.13.0' 'numpy==2.4.6'

cat > "$folder/probe.py" <<'PYTHON'
"""Times the int8 product with activations in two dtypes beside a product of floats made from the same weight."""

import statistics
import time

import torch

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
weight = torch.randint(-127, 128, (4096, 384), generator=generator, dtype=torch.int8)
scale = torch.rand(4096, generator=generator) / 127
x = torch.randn(12, 384, generator=generator)
exact = x.double() @ (weight.double() * scale.double()[:, None]).T

ways = {
    'product in bfloat16': lambda: torch._weight_int8pack_mm(x.bfloat16(), weight, scale.bfloat16()),
    'product in float32': lambda: torch._weight_int8pack_mm(x, weight, scale),
    'floats first': lambda: x @ (weight.float() * scale[:, None]).T,
}
seconds = {name: [] for name in ways}
for _ in range(10):
    for name, way in ways.items():
        began = time.perf_counter()
        way()
        seconds[name].append(time.perf_counter() - began)
times = {name: 1e3 * statistics.median(found[1:]) for name, found in seconds.items()}
for name, way in ways.items():
    error = (way().double() - exact).abs().max().item() / exact.abs().max().item()
    print(f'{name:21}  {times[name]:6.1f} ms   error {error:.0e}')
    assert error < (1e-5 if 'bfloat16' not in name else 2e-2)
assert times['product in float32'] > 4 * times['floats first'] > 4 * times['product in bfloat16'], 'behavior has changed'
PYTHON

"$python" "$folder/probe.py"
