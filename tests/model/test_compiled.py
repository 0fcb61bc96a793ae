"""torch.compile: training steps and decode steps are one graph each, and give what is given without it."""

import functools

import pytest
import torch
from support.models import BLOCK, assert_close, make, tokens

from core.cli.errors import UserError
from core.convert.int8 import quantize

one_graph = functools.partial(torch.compile, backend='eager', fullgraph=True)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize('variant', ['mha', 'mha-modern', 'mla-query', 'mla-published'])
def test_a_training_step_is_one_graph(variant):
    """A graph that breaks in each layer's attention is slower on a GPU, and says nothing."""
    idx, gradients = tokens(3, BLOCK + 1), []
    for compiled in (False, True):
        model = make(variant).train()
        call = one_graph(model) if compiled else model
        call(idx[:, :-1], idx[:, 1:], logits=False)[1].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert_close(*gradients)


def compiled_texts(model, monkeypatch, **settings):
    """Greedy texts of a model by ordinary steps, and by compiled ones of one graph."""
    monkeypatch.setattr(torch, 'compile', lambda function, dynamic: one_graph(function, dynamic=dynamic))
    idx = tokens(2, 5)
    return [model.generate(idx, 20, temperature=0, compiled=compiled, **settings) for compiled in (False, True)]


@pytest.mark.parametrize('variant', ['mha', 'mqa-rope', 'mla', 'mla-published', 'mla-whole-keys'])
def test_a_decode_step_is_one_graph(variant, monkeypatch):
    ordinary, compiled = compiled_texts(make(variant), monkeypatch)
    assert torch.equal(ordinary, compiled)


@pytest.mark.parametrize('variant, weights, kind', [
    ('mha-modern', 'int8', 'int4'), ('mla-published', 'int4', 'int8'), ('mla', 'int8', 'float'),
])  # fmt: skip
def test_with_few_bits_too(variant, weights, kind, monkeypatch):
    try:
        model = quantize(make(variant, torch.float32), kind=weights)
    except UserError as error:
        pytest.skip(str(error))
    ordinary, compiled = compiled_texts(model, monkeypatch, cache=kind)
    assert torch.equal(ordinary, compiled)
