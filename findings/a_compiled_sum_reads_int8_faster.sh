#!/usr/bin/env bash
# One row times int8 weights on a CPU: a compiled sum, in four pieces, takes half the time of PyTorch's own product.
#
# Libraries: torch 2.13.0 (CPU build), numpy 2.4.6 (Python 3.11 or later), and a C++ compiler.
# What was done: a row of 768 numbers is multiplied by each of 48 int8 matrices of 3072 x 768 with a scale per output, as
#   in a decode step of weight-only int8: by torch._weight_int8pack_mm with the bfloat16 activations that it is made for,
#   and under torch.compile by (x * w.float()).sum(-1), of the whole matrix or of four pieces of its rows, each product
#   after the one before. Then the same with a GELU of the row before each product, which is 1/3000 of the arithmetic.
# What one would guess: the product made for int8 is the fastest; how a sum is cut makes no difference; and the GELU costs
#   next to nothing.
# What happens: the sum in four pieces takes half of the time of the product. The compiler merges the four loops into one
#   with four sums in it; a single sum waits for each addition, and is slower. But it also writes the GELU into that loop,
#   and computes it again for each of 3,072 outputs: several times slower than anything else. Where as_strided stands in
#   between, which changes nothing, the GELU is computed once.
#
# Output seen (milliseconds, two threads of an Intel Xeon with AVX-512):
#   PyTorch's product                        13.1
#   compiled: one sum                        11.2
#   compiled: four sums                       6.9
#   compiled: four sums, GELU                48.6
#   compiled: four sums, GELU, as_strided     7.5
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check 'torch==2.13.0' 'numpy==2.4.6'

cat > "$folder/probe.py" <<'PYTHON'
"""Times products of one row with int8 weights."""

import statistics
import time

import torch
from torch.nn import functional as F

OUTPUTS, INPUTS, LAYERS = 3072, 768, 48
torch.manual_seed(0)
weights = [torch.randint(-127, 128, (OUTPUTS, INPUTS), dtype=torch.int8) for _ in range(LAYERS)]
scales = torch.full((OUTPUTS,), 1 / 127 / 28)
half = scales.bfloat16()


def by_product(x, weight):
    return torch._weight_int8pack_mm(x[None].bfloat16(), weight, half)[0].float()


def by_sums(pieces):
    def multiply(x, weight):
        return torch.cat([(x * piece.float()).sum(-1) for piece in weight.chunk(pieces)]) * scales

    return multiply


def plain(x):
    return x


def computed_first(x):
    x = F.gelu(x)
    return x.as_strided(x.shape, x.stride())


def chain(multiply, before):
    def layers(x):
        for weight in weights:
            x = x + multiply(before(x), weight)[:INPUTS]
        return x

    return layers


ways = {
    "PyTorch's product": chain(by_product, plain),
    'compiled: one sum': torch.compile(chain(by_sums(1), plain)),
    'compiled: four sums': torch.compile(chain(by_sums(4), plain)),
    'compiled: four sums, GELU': torch.compile(chain(by_sums(4), F.gelu)),
    'compiled: four sums, GELU, as_strided': torch.compile(chain(by_sums(4), computed_first)),
}
x, found = torch.randn(INPUTS), {name: [] for name in ways}
with torch.no_grad():
    results = {name: way(x) for name, way in ways.items()}  # compiles
    for _ in range(15):
        for name, way in ways.items():
            start = time.perf_counter()
            way(x)
            found[name].append(1e3 * (time.perf_counter() - start))
product, one, four, gelu, once = (statistics.median(times) for times in found.values())
for name, times in found.items():
    print(f'{name:38} {statistics.median(times):6.1f}')
same = [result for name, result in results.items() if 'GELU' not in name]
assert all((result - same[0]).abs().max() < 0.05 * same[0].abs().max() for result in same), 'other numbers'
assert four < 0.75 * product, 'the sums are no faster than the product'
assert one > 1.15 * four, 'one sum is as fast as four'
assert gelu > 2 * once, 'the GELU is computed once'
PYTHON

"$python" "$folder/probe.py"
