"""core/convert/int8.py, int4.py: weights in few bits decode nearly the same probabilities, in few bytes."""

import copy

import gguf
import pytest
import torch
from support.forking import run
from support.planted import save
from torch.nn import functional as F

from core.cli.errors import UserError
from core.convert import int4
from core.convert.int4 import Int4Linear
from core.convert.int8 import Int8Linear, quantize, weight_bytes
from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig
from ops.kernels import Linear

SIZES = dict(block_size=32, vocab_size=61, n_layer=2, n_head=4, n_embd=64)
MODELS = {
    'mha': (GPT, GPTConfig, dict(bias=True)),
    'gqa': (GPT, GPTConfig, dict(bias=False, n_kv_head=2)),
    'mla': (MLAGPT, MLAConfig, dict(bias=True)),
    'mla-published': (MLAGPT, MLAConfig, dict(bias=False, pos='rope', n_latent_q=24, latent_norm=True)),
}


def pair(name, kind):
    """A model with random weights, and the same in few bits."""
    model_class, config_class, special = MODELS[name]
    model = model_class(config_class(**SIZES, **special), seed=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return model, quantize(copy.deepcopy(model), kind)


def available(kind):
    """A kind of weights, wherever the CPU has products of them."""
    try:
        if kind == 'int4':
            int4.check_cpu()
    except UserError:
        pytest.skip('this CPU does not multiply int4')
    return kind


@pytest.fixture(params=['int8', 'int4'])
def kind(request):
    return available(request.param)


def in_groups(low, scales):
    """The weight that levels 0 to 15 and scales stand for."""
    scale, zero = scales.float().transpose(0, 1).unbind(-1)
    return ((low.unflatten(1, (-1, int4.GROUP)) - 8) * scale[..., None] + zero[..., None]).flatten(1)


@torch.no_grad()
@pytest.mark.parametrize('inputs', [48, 20, 8])
@pytest.mark.parametrize('rows', [1, 5, 40])
@pytest.mark.parametrize('bias', [True, False])
def test_a_product_is_that_of_the_rounded_weight(inputs, rows, bias):
    """Also for inputs that are no multiple of 16, where PyTorch's bf16 product reads beyond a row."""
    linear = Linear(inputs, 30, bias=bias)
    linear.weight[7] = 0  # a row of zeros has no scale
    low, x = Int8Linear(linear), torch.randn(2, rows, inputs)
    weight = low.weight.to(torch.float32)
    assert (weight - linear.weight).abs().max() <= linear.weight.abs().max() / 127 / 2 * 1.0001
    wanted = x @ weight.T + (linear.bias if bias else 0)
    assert low(x).shape == wanted.shape and (low(x) - wanted).abs().max() < 0.02 * wanted.abs().max()
    assert not low(x)[..., 7].sub(linear.bias[7] if bias else 0).any()


@torch.no_grad()
def test_a_token_is_rounded_by_its_own_size():
    """A small token keeps its precision beside a large one, and a token of zeros gives zeros."""
    low, x = Int8Linear(Linear(64, 30, bias=False)), torch.randn(3, 64)
    x[1] *= 1e4
    x[2] = 0
    wanted = x @ low.weight.to(torch.float32).T
    assert ((low(x) - wanted).norm(dim=1) <= 0.02 * wanted.norm(dim=1)).all()
    assert torch.allclose(low(x)[:1], low(x[:1]), atol=0.02 * wanted[0].abs().max())


@torch.no_grad()
@pytest.mark.parametrize('inputs', [64, 40])
@pytest.mark.parametrize('rows', [1, 5, 40])
@pytest.mark.parametrize('bias', [True, False])
def test_a_product_in_int4_is_that_of_the_weight_rounded_in_groups(inputs, rows, bias):
    """Also for inputs and outputs that have to be padded, and for more rows than PyTorch's product takes well."""
    available('int4')
    linear, x = Linear(inputs, 30, bias=bias), torch.randn(2, rows, inputs)
    linear.weight[7] = 0
    padded = F.pad(linear.weight, (0, -inputs % int4.GROUP))
    weight = in_groups(*int4.rounded(padded))
    steps = padded.unflatten(1, (-1, int4.GROUP)).aminmax(dim=-1)
    step = ((steps.max - steps.min) / 15).repeat_interleave(int4.GROUP, dim=1)
    assert ((weight - padded).abs() <= 0.6 * step + 0.01 * padded.abs().max()).all()
    wanted = x @ weight[:, :inputs].T + (linear.bias if bias else 0)
    got = Int4Linear(linear)(x)
    assert got.shape == wanted.shape and (got - wanted).abs().max() < 0.02 * wanted.abs().max()
    assert not got[..., 7].sub(linear.bias[7] if bias else 0).any()


def test_weights_of_a_q4_1_file_come_back():
    weight = torch.tensor(gguf.quants.dequantize(
        gguf.quants.quantize(torch.randn(48, 96).numpy(), gguf.GGMLQuantizationType.Q4_1),
        gguf.GGMLQuantizationType.Q4_1))  # fmt: skip
    levels, scales = int4.rounded(weight)
    step = scales[..., 0].float().T.repeat_interleave(int4.GROUP, dim=1)
    error = (in_groups(levels, scales) - weight).abs()
    assert (error < 0.2 * step).all() and error.max() > 0  # half a step in the worst case of any other weight


def test_int4_takes_five_bits_a_weight_and_needs_a_cpu_that_has_it(monkeypatch):
    available('int4')
    model, low = pair('gqa', 'int4')
    matrices, head = 2 * (64 * (64 + 2 * 32) + 64 * 64 + 8 * 64 * 64), 61 * 64  # the head is in int8
    assert weight_bytes(low, 4) == matrices * 5 / 8 + head + 4 * 5 * 64
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'DEFAULT')
    with pytest.raises(UserError, match='weights=int8'):
        Int4Linear(Linear(32, 16))


@torch.no_grad()
@pytest.mark.parametrize('name', MODELS)
def test_decoding_draws_from_nearly_the_same_probabilities(name, kind):
    model, low = pair(name, kind)
    tokens = torch.randint(0, 61, (3, 20), generator=torch.Generator().manual_seed(1))
    caches = [m.init_cache(3) for m in (model, low)]
    assert caches[1].layers[0][0].dtype == torch.float32
    for part in (tokens[:, :12], *tokens[:, 12:].split(1, dim=1)):
        ours, theirs = (m(part, cache=cache)[0].softmax(-1) for m, cache in zip((model, low), caches, strict=True))
        # of 2, where nothing is the same
        assert 0 < (ours - theirs).abs().sum(-1).max() < (0.5 if kind == 'int4' else 0.1)
    assert not any(isinstance(part, Linear) for part in low.modules())


def test_the_bytes_of_a_step_are_those_of_its_weights():
    model, low = pair('gqa', 'int8')
    matrices = 2 * (64 * (64 + 2 * 32) + 64 * 64 + 8 * 64 * 64) + 61 * 64
    norms = 5 * 64
    assert weight_bytes(model, 4) == 4 * (matrices + norms)
    assert weight_bytes(low, 4) == matrices + 4 * norms


def test_sample_says_what_few_bits_change(tmp_path, char_data, kind):
    from core.text.dataset import TokenData

    data = TokenData(char_data, 8)
    model = GPT(GPTConfig(**{**SIZES, 'vocab_size': data.n_vocab}), seed=1)
    folder = save(tmp_path / 'out', model, config={'dataset': char_data.name}, tokenizer=data.meta)
    keys = (f'--out_dir={folder}', f'--data_dir={char_data.parent}', '--device=cpu', '--max_new_tokens=8',
            '--num_samples=2', '--start=the', f'--weights={kind}')  # fmt: skip
    done = run('sample.py', (*keys, '--int8_windows=2'))
    assert done.returncode == 0, done.stderr
    assert f'{kind} changes the validation loss of' in done.stderr and '+-' in done.stderr
    refused = run('sample.py', (*keys[:-1], '--int8_windows=2'))
    assert refused.returncode == 2 and '--weights=int8' in refused.stderr
    plain = run('sample.py', keys)
    assert plain.stdout == done.stdout and 'changes the' not in plain.stderr


def test_bytes_of_an_untied_head_are_counted_once():
    sizes = dict(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=1024, bias=False)
    tied, untied = (weight_bytes(quantize(GPT(GPTConfig(**sizes, tied=tied))), 4) for tied in (True, False))
    assert tied == untied > 0
