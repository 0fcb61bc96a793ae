"""torch.compile: training steps and decode steps are one graph each, and give what is given without it."""

import copy

import pytest
import torch
from support.models import BLOCK, assert_close, make, tokens

from core.cli.errors import UserError
from core.convert.int8 import Int8Linear, quantize
from ops import packed
from ops.decoding import FixedStep
from ops.kernels import Linear

pytestmark = pytest.mark.slow

compiler = torch.compile


def one_graph(function, dynamic=None, fullgraph=True):
    return compiler(function, backend='eager', dynamic=dynamic, fullgraph=fullgraph)


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


def compiled_texts(model, monkeypatch, rows=2, **settings):
    """Greedy texts of a model by ordinary steps, and by compiled ones of one graph, past a full cache."""
    monkeypatch.setattr(torch, 'compile', one_graph)
    idx = tokens(rows, 5)
    return [model.generate(idx, BLOCK + 3, temperature=0, compiled=compiled, **settings) for compiled in (False, True)]


@pytest.mark.parametrize('variant', ['mha', 'mqa-rope', 'mla', 'mla-published', 'mla-whole-keys'])
@pytest.mark.parametrize('intel, rows', [(True, 2), (False, 5)])
def test_a_decode_step_is_one_graph(variant, intel, rows, monkeypatch):
    monkeypatch.setattr('ops.kernels.INTEL', intel)
    ordinary, compiled = compiled_texts(make(variant), monkeypatch, rows)
    assert torch.equal(ordinary, compiled)


def test_a_compiled_step_without_a_cache_is_refused():
    with pytest.raises(ValueError, match='use_cache'):
        make('mla').generate(tokens(1, 3), 4, use_cache=False, compiled=True)


FEW_BITS = [('mha-modern', 'int8', 'int4'), ('mla-published', 'int4', 'int8'), ('mla', 'int8', 'float')]


def in_few_bits(variant, weights, monkeypatch):
    """A model with weights in few bits, whose ordinary step multiplies integers where its cache has few bits."""
    monkeypatch.setattr(packed, 'AT_ONCE', 100)
    try:
        return quantize(make(variant, torch.float32), kind=weights)
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize('variant, weights, kind', FEW_BITS[::2])
def test_with_few_bits_too(variant, weights, kind, monkeypatch):
    ordinary, compiled = compiled_texts(in_few_bits(variant, weights, monkeypatch), monkeypatch, cache=kind)
    assert torch.equal(ordinary, compiled)


@torch.no_grad()
@pytest.mark.parametrize('variant, weights, kind', FEW_BITS)
def test_logits_with_few_bits(variant, weights, kind, monkeypatch):
    """Of two activations that differ in their last bit one may be rounded to another bfloat16; most are equal."""
    monkeypatch.setattr(torch, 'compile', one_graph)
    model, idx, logits = in_few_bits(variant, weights, monkeypatch), tokens(2, BLOCK), []
    for compiled in (False, True):
        cache = model.init_cache(2, kind=kind)
        model(idx[:, :5], cache=cache)
        step = FixedStep(model, cache, True) if compiled else lambda token, cache=cache: model(token, cache=cache)[0]
        logits.append(torch.cat([step(token).clone() for token in idx[:, 5:].split(1, dim=1)], dim=1))
    differences, largest = (logits[0] - logits[1]).abs(), logits[0].abs().max()
    assert differences.max() < 0.02 * largest and differences.median() < 1e-6 * largest


@torch.no_grad()
@pytest.mark.parametrize('variant', ['mha-modern', 'mla', 'mla-published'])
def test_one_row_is_multiplied_by_int8_weights_without_rounding(variant, monkeypatch):
    """Its logits are those of the rounded weights in float32; an ordinary step rounds activations to bfloat16."""
    monkeypatch.setattr(torch, 'compile', one_graph)
    low = quantize(make(variant, torch.float32))
    exact = copy.deepcopy(low)
    for part in [*exact.modules()]:
        for name, child in list(part.named_children()):
            if isinstance(child, Int8Linear):
                whole = Linear(child.in_features, child.out_features, bias=child.bias is not None)
                whole.weight.copy_(child.weight.to(torch.float32))
                whole.bias = child.bias
                setattr(part, name, whole)
    idx, cache, logits = tokens(1, 6), exact.init_cache(1, 8), []
    exact(idx[:, :5], cache=cache)
    for model, compiled in ((exact, False), (low, False), (low, True)):
        step = FixedStep(model, copy.deepcopy(cache), compiled)
        logits.append(step(idx[:, 5:]))
    wanted, ordinary, compiled = logits
    assert_close(compiled, wanted)
    assert 1e-3 < (ordinary - wanted).abs().max() / wanted.abs().max() < 0.1


@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_a_long_cache_in_few_bits_is_no_longer_program(kind, monkeypatch):
    """Pieces of a cache would become code of their own: behind 4,096 tokens that took over nine minutes to compile."""
    sizes = []

    def counting(graph, _):
        sizes.append(len(graph.graph.nodes))
        return graph

    for at_once in (packed.AT_ONCE, 100):
        torch._dynamo.reset()
        monkeypatch.setattr(packed, 'AT_ONCE', at_once)
        with monkeypatch.context() as patch:
            patch.setattr(torch, 'compile', lambda f, **keys: compiler(f, **(keys | dict(backend=counting))))
            make('mla').generate(tokens(2, 5), 3, temperature=0, compiled=True, cache=kind)
    assert len(sizes) == 2 and sizes[0] == sizes[1]
