#!/usr/bin/env bash
# torch.compile of torch 2.13.0 breaks the graph where a model reads a constant of a torch.autograd.Function's class.
#
# Libraries: torch 2.13.0, numpy 2.4.6 (Python 3.11 or later).
# What was done: a layer whose forward pass reads a number that is kept as an attribute of a class, to choose a
#   path by the length of the sequence. The class is a plain one, or a subclass of torch.autograd.Function that is not
#   even called. torch._dynamo.explain counts the graphs.
# What one would guess: an integer on a class is a constant to a tracer, whatever the class inherits from; and code that
#   never calls the Function is no concern of autograd's.
# What happens: of a plain class one graph is made, of the Function several: the layer's way is cut where the constant is
#   read, and what follows is compiled apart. Nothing is said at the default log level, and the numbers are right, so
#   only the time or fullgraph=True tells, which refuses it. A constant of the module, beside the class, is read as one
#   expects. Training a small GPT whose attention did so took 1.3 to 1.5 times as long as in one graph.
#
# Output seen:
#   a plain class                     graphs of one layer: 1   fullgraph=True: taken
#   an autograd.Function              graphs of one layer: 2   fullgraph=True: refused
#   the module, beside the Function   graphs of one layer: 1   fullgraph=True: taken
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check 'torch==2.13.0' 'numpy==2.4.6'

cat > "$folder/probe.py" <<'PYTHON'
"""Counts the graphs that Dynamo makes of layers that read a constant from three places."""

import torch
from torch import nn

LONGEST = 8


class Plain:
    LONGEST = 8


class Square(torch.autograd.Function):
    LONGEST = 8

    @staticmethod
    def forward(ctx, x):
        return x * x


class Layer(nn.Module):
    def __init__(self, place):
        super().__init__()
        self.place, self.linear = place, nn.Linear(4, 4)

    def forward(self, x):
        x = self.linear(x)
        if self.place == 'plain':
            longest = Plain.LONGEST
        elif self.place == 'function':
            longest = Square.LONGEST
        else:
            longest = LONGEST
        return x.relu() if x.size(0) > longest else x.tanh()


def graphs(model):
    torch._dynamo.reset()
    return torch._dynamo.explain(model)(torch.ones(2, 4)).graph_count


def in_one(model):
    torch._dynamo.reset()
    try:
        torch.compile(model, backend='eager', fullgraph=True)(torch.ones(2, 4))
    except torch._dynamo.exc.Unsupported:
        return 'refused'
    return 'taken'


NAMES = {'plain': 'a plain class', 'function': 'an autograd.Function', 'module': 'the module, beside the Function'}
for place, name in NAMES.items():
    model = Layer(place)
    found = graphs(model), in_one(model)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend='eager')(torch.ones(2, 4)), model(torch.ones(2, 4)))
    print(f'{name:32}  graphs of one layer: {found[0]}   fullgraph=True: {found[1]}')
    assert found == ((2, 'refused') if place == 'function' else (1, 'taken')), 'the behavior has changed'
PYTHON

"$python" "$folder/probe.py"
