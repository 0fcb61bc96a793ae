#!/usr/bin/env bash
# torch.compile can't lower PyTorch's int8 product where its scales are converted in the same graph.
#
# Libraries: torch 2.13.0 (CPU build), numpy 2.4.6 (Python 3.11 or later), and a C++ compiler.
# What was done: a row of bfloat16 is multiplied by an int8 weight with torch._weight_int8pack_mm, as weight-only int8
#   decoding does, under torch.compile: with scales that were converted to bfloat16 before, and with float32 scales that
#   are converted in the function, as code does that follows the activations' dtype.
# What one would guess: both compile, and give what they give without compiling.
# What happens: the first does. The second raises an error from the lowering of the product, an AssertionError without
#   a message of its own: it takes buffers alone, and the converted scales are not one yet. Where the conversion changes
#   nothing, since the scales are in bfloat16 already, it compiles, so the same code runs in one setting and not in another.
#
# Output seen:
#   scales converted before               right
#   converted inside, bfloat16 already    right
#   converted inside, from float32        InductorError: LoweringException: AssertionError
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check 'torch==2.13.0' 'numpy==2.4.6'

cat > "$folder/probe.py" <<'PYTHON'
"""Compiles the int8 product with scales that are ready, and with scales that are converted in the graph."""

import torch

torch.manual_seed(0)
weight = torch.randint(-127, 128, (64, 32), dtype=torch.int8)
scales = torch.rand(64)
ready = scales.bfloat16()
row = torch.randn(1, 32).bfloat16()


def with_ready(x):
    return torch._weight_int8pack_mm(x, weight, ready)


def converting(given):
    def multiply(x):
        return torch._weight_int8pack_mm(x, weight, given.to(x.dtype))

    return multiply


ways = {
    'scales converted before': with_ready,
    'converted inside, bfloat16 already': converting(ready),
    'converted inside, from float32': converting(scales),
}
outcomes = []
for name, way in ways.items():
    torch._dynamo.reset()
    wanted = way(row)
    try:
        outcome = 'right' if torch.equal(torch.compile(way)(row), wanted) else 'other numbers'
    except Exception as error:
        outcome = f'{type(error).__name__}: {": ".join(str(error).split(": ")[:2])}'
    outcomes.append(outcome)
    print(f'{name:36}  {outcome}')
assert outcomes[:2] == ['right', 'right'] and 'AssertionError' in outcomes[2], 'behavior has changed'
PYTHON

"$python" "$folder/probe.py"
