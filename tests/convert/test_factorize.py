"""The algebra from MHA to MLA: exact where it must be, best where it can't, and honest about the rest."""

import pytest
import torch

from core.convert.factorize import Statistics, collect_statistics, factorize, norm_moments, reachable_root, root, to_mla
from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig

C = 24
SIZES = dict(block_size=16, vocab_size=40, n_layer=2, n_head=4, n_embd=C)


def trained_like(bias=True, seed=0, **changes):
    """A GPT in float64 whose gains, biases and weights are far from their initial values."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SIZES, 'bias': bias, **changes})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def batches(count=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(40, (8, 16), generator=generator) for _ in range(count)]


@torch.no_grad()
def logits(model, idx):
    return model(idx, idx)[0]


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('text', [None, [torch.arange(8)[None]], batches()], ids=['weights', '8 tokens', '512 tokens'])
@pytest.mark.parametrize('balance', [True, False])
@pytest.mark.parametrize('n_latent', [C, C - 1])
def test_full_rank_and_one_less_are_exact(bias, text, balance, n_latent):
    """Even with statistics of 8 tokens, which span a third of the space, on text that they were not made from."""
    model = trained_like(bias)
    statistics = collect_statistics(model, text) if text else None
    mla = to_mla(model, n_latent, statistics, balance)
    assert type(mla) is MLAGPT and mla.config.n_latent == n_latent
    for idx in batches(2, seed=7):
        assert (logits(mla, idx) - logits(model, idx)).abs().max() < 1e-10


def test_two_less_are_not_exact():
    model, idx = trained_like(), batches(1, seed=7)[0]
    assert (logits(to_mla(model, C - 2), idx) - logits(model, idx)).abs().max() > 1e-4


def test_float32_is_exact_to_its_own_rounding():
    model = trained_like().float()
    statistics, idx = collect_statistics(model, batches()), batches()[0]
    for n_latent in (C, C - 1):
        assert (logits(to_mla(model, n_latent, statistics), idx) - logits(model, idx)).abs().max() < 2e-5


def test_a_gain_of_zero_and_one_head():
    model = trained_like(n_head=1)
    with torch.no_grad():
        model.transformer.h[0].ln_1.weight[[3, 5]] = 0
    for statistics in (None, collect_statistics(model, batches())):
        mla = to_mla(model, C - 1, statistics)
        assert (logits(mla, batches()[0]) - logits(model, batches()[0])).abs().max() < 1e-10


def test_keys_of_zero_do_not_upset_the_balance():
    model = trained_like()
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[C : 2 * C] = 0
    assert (logits(to_mla(model, C), batches()[0]) - logits(model, batches()[0])).abs().max() < 1e-10


def kv_error(model, mla, idx):
    """Mean squared error of the first layer's keys and values, which have the same input in both models."""
    old, new = model.transformer.h[0], mla.transformer.h[0]
    with torch.no_grad():
        x = old.ln_1(model.transformer.wte(idx) + model.transformer.wpe.weight[: idx.size(1)])
        pairs = zip(old.attn.qkv(x)[1:], new.attn.qkv(x)[1:], strict=True)
        return [(a - b).square().mean().item() for a, b in pairs]


@pytest.mark.parametrize('n_latent', [2, 8, 16])
def test_unbalanced_error_is_the_smallest_there_is(n_latent):
    """It equals the sum of the singular values that were dropped, which no rank-r map can fall below."""
    model, text = trained_like(), batches()
    statistics = collect_statistics(model, text)
    mla = to_mla(model, n_latent, statistics, balance=False)
    x = torch.cat(text)
    _, covariance = statistics[0].moments()
    w = model.transformer.h[0].attn.c_attn.weight[C:]
    dropped = torch.linalg.svdvals(w @ root(covariance))[n_latent:].square().sum().item()
    assert sum(kv_error(model, mla, x)) * C == pytest.approx(dropped, rel=1e-5)
    assert sum(kv_error(model, to_mla(model, n_latent), x)) * C > dropped * 1.001


def test_balance_moves_the_error_from_the_smaller_to_the_larger():
    model, text = trained_like(), batches()
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[C : 2 * C] *= 10
    statistics, x = collect_statistics(model, text), torch.cat(text)
    keys, values = kv_error(model, to_mla(model, 8, statistics, balance=False), x)
    balanced_keys, balanced_values = kv_error(model, to_mla(model, 8, statistics, balance=True), x)
    assert balanced_keys > keys and balanced_values < values


def test_mean_costs_no_rank():
    """Inputs that differ from their mean in two directions only need a latent of two, however large the mean is."""
    torch.manual_seed(0)
    w_k, w_v, mean = torch.randn(C, C).double(), torch.randn(C, C).double(), 50 * torch.randn(C).double()
    directions = torch.randn(C, 2).double()
    down, up, shift = factorize(w_k, w_v, mean, directions, 2)
    x = mean + directions @ torch.randn(2).double()
    assert torch.allclose(up @ (down @ x) + shift, torch.cat((w_k @ x, w_v @ x)), atol=1e-6)
    assert down.shape == (2, C) and up.shape == (2 * C, 2) and shift.shape == (2 * C,)


def test_the_root_is_one_and_stays_within_reach():
    ln = trained_like().transformer.h[0].ln_1
    model, text = trained_like(), batches()
    _, covariance = collect_statistics(model, text)[0].moments()
    half = reachable_root(ln, covariance)
    assert half.shape == (C, C - 1)
    assert torch.allclose(half @ half.t(), covariance, atol=1e-6 * covariance.trace().item())
    assert (half / ln.weight.detach()[:, None]).sum(dim=0).abs().max() < 1e-12


def test_statistics_do_not_depend_on_the_batches():
    x = torch.randn(50, C, generator=torch.Generator().manual_seed(0)).double() + 3
    whole, parts = Statistics.empty(C), Statistics.empty(C)
    whole.add(x.view(5, 10, C))
    for part in x.split(7):
        parts.add(part)
    assert parts.count == whole.count == 50
    for centred in (True, False):
        for a, b in zip(whole.moments(centred), parts.moments(centred), strict=True):
            assert torch.allclose(a, b)
    mean, covariance = whole.moments()
    assert torch.allclose(mean, x.mean(dim=0)) and torch.allclose(covariance, x.t().cov(correction=0))
    assert torch.allclose(whole.moments(centred=False)[1], x.t() @ x / 50)
    with pytest.raises(ValueError, match='the statistics are empty'):
        Statistics.empty(C).moments()


def test_statistics_are_those_of_every_layers_input_and_leave_the_model_alone():
    model, text = trained_like(dropout=0.5), batches()
    model.train()
    seen = []
    ln = model.transformer.h[1].ln_1
    handle = ln.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    statistics = collect_statistics(model, iter(text))
    handle.remove()
    assert model.training and all(not block.ln_1._forward_hooks for block in model.transformer.h)
    mean, _ = statistics[1].moments()
    assert torch.allclose(mean, torch.cat(seen).flatten(0, 1).mean(dim=0))
    again = collect_statistics(model.eval(), text)
    assert torch.equal(again[1].products, statistics[1].products)  # measured without dropout either way


def test_norm_moments_are_those_of_white_inputs():
    ln = trained_like().transformer.h[0].ln_1
    x = torch.randn(200_000, C, generator=torch.Generator().manual_seed(0)).double()
    white = (x - x.mean(dim=1, keepdim=True)) * ln.weight + ln.bias
    mean, covariance = norm_moments(ln)
    assert torch.allclose(mean, white.mean(dim=0).detach(), atol=0.02)
    assert torch.allclose(covariance, white.detach().t().cov(), atol=0.05)
    assert torch.linalg.matrix_rank(covariance) == C - 1
    assert torch.allclose(norm_moments(ln, centred=False)[1], covariance + torch.outer(mean, mean))


def test_what_is_not_converted_is_the_same():
    model = trained_like(gelu='tanh', dropout=0.1).float().train()
    mla = to_mla(model, 6)
    assert mla.training and mla.lm_head.weight.dtype == torch.float32
    assert mla.config == MLAConfig(**{**SIZES, 'gelu': 'tanh', 'dropout': 0.1, 'n_latent': 6})
    assert mla.lm_head.weight is mla.transformer.wte.weight
    old, new = model.state_dict(), mla.state_dict()
    for name in set(old) & set(new):
        assert torch.equal(old[name], new[name])
    assert torch.equal(new['transformer.h.1.attn.c_q.weight'], old['transformer.h.1.attn.c_attn.weight'][:C])
    assert not new['transformer.h.1.attn.c_kv_down.bias'].any()
    assert to_mla(model).config.n_latent == C // 2
    for parameter in mla.parameters():  # a model of its own
        parameter.data.zero_()
    assert all(torch.equal(value, old[name]) for name, value in model.state_dict().items())


def test_the_cache_of_a_converted_model():
    mla, idx = to_mla(trained_like(), C - 1), batches(1)[0]
    cache = mla.init_cache(8)
    assert cache.bytes_per_token == 2 * (C - 1) * 8
    whole = logits(mla, idx)
    for t in range(16):
        with torch.no_grad():
            step = mla(idx[:, t : t + 1], cache=cache)[0][:, 0]
        assert (step - whole[:, t]).abs().max() < 1e-10


def test_what_cannot_be_converted_says_so():
    with pytest.raises(ValueError, match='not MLAGPT'):
        to_mla(MLAGPT(MLAConfig(**SIZES)), 8)
    with pytest.raises(ValueError, match='outside 1 to n_embd=24'):
        to_mla(trained_like(), C + 1)
    model = trained_like()
    with pytest.raises(ValueError, match='1 layers of statistics'):
        to_mla(model, 8, collect_statistics(model, batches())[:1])
