"""ops/kernels.py: each fast operation against its plain form, gradients included."""

import pytest
import torch

from model import GPT, GPTConfig
from ops.kernels import (
    EagerAttention,
    Linear,
    attend_rows,
    attention_pattern,
    causal_mask,
    dropout,
    fast_attention,
    linear_cross_entropy,
    logits_gradient,
    per_head,
)


@pytest.mark.parametrize('kv_heads', [1, 2, 6])
@pytest.mark.parametrize('T, S', [(9, 9), (1, 9), (4, 9)])
@pytest.mark.parametrize('grad', [True, False])
def test_grouped_heads_attend_as_pytorch_says(kv_heads, T, S, grad):
    """Against SDPA's own enable_gqa, with a mask, gradients included."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, T, 8, generator=generator, dtype=torch.float64, requires_grad=grad)
    k, v = (torch.randn(2, kv_heads, S, 8, generator=generator, dtype=torch.float64, requires_grad=grad) for _ in 'kv')
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=causal_mask(T, S, 'cpu'), scale=0.3, enable_gqa=True
    )
    found = [fast_attention(q, k, v, 0.3), fast_attention(q, k, v, 0.3, mask=causal_mask(T, S, 'cpu'))]
    for y in found:
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        if grad:
            weights = torch.arange(8.0)
            grads = (torch.autograd.grad((t * weights).sum(), (q, k, v), retain_graph=True) for t in (y, expected))
            for mine, theirs in zip(*grads, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize('masked', [True, False])
def test_rows_attend_as_pytorch_says(masked, dtype, tolerance):
    """What a GPU decodes GQA and MLA by, against SDPA in float64; the masked keys are huge."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 16, generator=generator, dtype=torch.float64) for n in (4, 40, 40))
    visible = torch.arange(40)[None] < 30 if masked else None
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=0.3)
    if masked:
        k[..., 30:, :] = 1e4
    found = attend_rows(*(t.to(dtype) for t in (q, k, v)), 0.3, visible)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


def test_the_gradient_of_logits_is_the_same_for_a_compiler(monkeypatch):
    log_p, ids = torch.randn(5, 9, dtype=torch.float64).log_softmax(-1), torch.tensor([[0], [8], [3], [3], [1]])
    plain = logits_gradient(log_p.clone(), ids)
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
    torch.testing.assert_close(logits_gradient(log_p, ids), plain, rtol=0, atol=1e-15)
    assert plain.sum(-1).abs().max() < 1e-14 and plain[1, 8] < 0


def test_causal_mask_is_aligned_at_the_lower_right():
    assert causal_mask(2, 4, 'cpu').int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize('p', [0.1, 0.2, 0.5, 0.99999])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    torch.manual_seed(1)
    x = torch.ones(1000, 1001, requires_grad=True)
    y = dropout(x, p)
    share = (y == 0).double().mean().item()
    assert abs(share - p) < 5 * (p * (1 - p) / x.numel()) ** 0.5 + 2 / 65536
    assert set(y.detach().unique().tolist()) == {0.0, y.max().item()}
    if p < 0.9:
        assert abs(y.mean().item() - 1) < 0.01
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y)
    torch.manual_seed(1)
    assert torch.equal(dropout(x, p), y)  # the same seed, the same mask
    neighbours = (y[:, :1000].detach() == 0).view(-1, 4).double().T.corrcoef()  # four numbers share one draw
    assert p > 0.9 or (neighbours - torch.eye(4)).abs().max() < 0.01


@pytest.mark.parametrize('flash', [True, False])
def test_dropout_acts_in_training_alone_and_where_the_model_says(flash):
    model = GPT(GPTConfig(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=16, dropout=0.5, flash=flash))
    x = torch.randint(11, (2, 16))
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])


@pytest.mark.parametrize('grad', [True, False])
@pytest.mark.slow
def test_dropped_attention_has_the_mean_of_the_whole(grad):
    q, k, v = torch.randn(3, 4, 2, 8, 8, dtype=torch.float64, requires_grad=grad)
    mean = torch.stack([fast_attention(q, k, v, 0.3, 0.2).detach() for _ in range(4000)]).mean(0)
    assert (mean - fast_attention(q, k, v, 0.3)).abs().max() < 0.1


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize('vocab_size', [11, pytest.param(40000, marks=pytest.mark.slow)])
def test_the_loss_without_logits_is_the_loss(dtype, vocab_size):
    """40,000 tokens make two pieces."""
    config = GPTConfig(block_size=60, vocab_size=vocab_size, n_layer=1, n_head=2, n_embd=8)
    autocast = dtype == torch.bfloat16
    model = GPT(config).to(torch.float32 if autocast else dtype)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5, generator=torch.Generator().manual_seed(0))  # not uniform
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randint(vocab_size, (2, 10, 60), generator=generator)
    y[0, :7] = -1
    found = []
    for logits in (True, False):
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            out, loss = model(x, y, logits=logits)
        assert (out is None) != logits
        found.append((loss, *torch.autograd.grad(3 * loss, list(model.parameters()))))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= tolerance * a.norm()


@pytest.mark.slow
def test_the_loss_without_logits_needs_a_fraction_of_the_memory():
    def peak(logits):
        model = GPT(GPTConfig(block_size=256, vocab_size=20000, n_layer=1, n_head=1, n_embd=8))
        x = torch.zeros(8, 256, dtype=torch.int64)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            model(x, x, logits=logits)[1].backward()
        held = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == '[memory]']
        return max(torch.tensor(held).cumsum(0).tolist())

    assert peak(False) < 0.4 * peak(True)


@pytest.mark.parametrize('intel', [True, False])
@pytest.mark.parametrize('rows', [1, 2, 3, 5, 8, 16, 17])
@pytest.mark.parametrize('sizes', [(8, 6), (16, 1600), (5, 1)])
def test_few_rows_are_multiplied_to_the_same_numbers_and_lie_in_order(rows, sizes, intel, monkeypatch):
    monkeypatch.setattr('ops.kernels.INTEL', intel)
    layer = Linear(*sizes).double()
    x = torch.randn(rows, 1, sizes[0], dtype=torch.float64)
    with torch.no_grad():
        y = layer(x)
        torch.testing.assert_close(y, torch.nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-12, atol=1e-14)
    assert y.is_contiguous()


@pytest.mark.parametrize('intel', [True, False])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_each_head_multiplies_its_own_rows(dtype, intel, monkeypatch):
    """With a weight that is contiguous, and with one whose transpose is, as W_K and W_V are."""
    monkeypatch.setattr('ops.kernels.INTEL', intel)
    generator = torch.Generator().manual_seed(0)
    for B, T in ((1, 1), (3, 1), (2, 5)):
        x, weight = torch.randn(B, 4, T, 6, generator=generator), torch.randn(4, 6, 9, generator=generator)
        x, weight = x.to(dtype), weight.to(dtype)
        expected = torch.einsum('bhtm,hmn->bhtn', x.double(), weight.double())
        for w in (weight, weight.mT.contiguous().mT):
            y = per_head(x, w)
            assert y.dtype == dtype
            torch.testing.assert_close(y.double(), expected, rtol=0, atol=20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize('outputs', [1, 5, 64, 1600])
@pytest.mark.parametrize('bias', [True, False])
def test_linear(outputs, bias):
    """The product in pieces, for few rows without gradients: nn.Linear's numbers, whatever divides by what."""
    layer, threads = Linear(8, outputs, bias=bias).double(), torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            for shape in ((1, 1, 8), (3, 1, 8), (2, 7, 8), (8,), (0, 1, 8), (40, 8)):
                x = torch.randn(shape, generator=generator, dtype=torch.float64)
                with torch.no_grad():
                    y = layer(x)
                expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
                assert y.shape == expected.shape
                torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize('B, T', [(2, 1), (2, 5), (1, 64), (2, 200)])
@pytest.mark.parametrize('p', [0.0, 0.3])
def test_eager_attention_and_its_gradients_are_those_of_the_formula(B, T, p, monkeypatch):
    """Over several blocks of queries, and under dropout with the same masks."""
    monkeypatch.setattr('ops.kernels.QUERY_BLOCK', {torch.float64: 64})
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(B, T, 3 * 14, generator=generator, dtype=torch.float64, requires_grad=True)

    def parts():
        """Queries, keys and values as a model has them: views of one product, with a value size of their own."""
        sizes = (3 * 4, 3 * 4, 3 * 6)
        return (t.unflatten(-1, (3, -1)).transpose(1, 2) for t in packed.split(sizes, dim=-1))

    def formula(q, k, v, scale, p_drop):
        blocks = []
        for first in range(0, T, 64):
            seen = slice(min(first + 64, T))
            pattern = attention_pattern(q[:, :, first : first + 64], k[:, :, seen], scale)
            dropped = dropout(pattern.flatten(0, 1), p_drop).view(pattern.shape) if p_drop else pattern
            blocks.append(dropped @ v[:, :, seen])
        return torch.cat(blocks, dim=2)

    found = []
    for function in (EagerAttention.apply, formula):
        torch.manual_seed(7)
        y = function(*parts(), 0.4, p)
        found.append([y, *torch.autograd.grad((y * torch.arange(6)).sum(), packed)])
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('p', [0.0, 0.2])
def test_eager_attention_in_bfloat16_is_that_in_float32_to_its_precision(p, monkeypatch):
    monkeypatch.setattr('ops.kernels.QUERY_BLOCK', {})  # of one size, for the same dropout masks
    parts = [torch.randn(2, 3, 80, 8, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(4)]
    parts, weights, found = parts[:3], parts[3].float(), []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [t.to(dtype).requires_grad_() for t in parts]
        torch.manual_seed(5)
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = fast_attention(*inputs, 0.35, p)
        grads = torch.autograd.grad((y.float() * weights).sum(), inputs)
        assert type(y.grad_fn).__name__ == 'EagerAttentionBackward' and all(t.dtype == dtype for t in (y, *grads))
        found.append([t.float() for t in (y, *grads)])
    for low, full in zip(*found, strict=True):
        assert (low - full).norm() < 0.01 * full.norm()


@pytest.mark.parametrize('T, p, eager', [(256, 0.0, True), (257, 0.0, False), (257, 0.1, True)])
def test_which_attention_a_cpu_trains_by(T, p, eager):
    q = torch.randn(1, 1, T, 32, requires_grad=True)
    assert (type(fast_attention(q, q, q, 0.5, p).grad_fn).__name__ == 'EagerAttentionBackward') == eager
    with torch.no_grad():
        torch.testing.assert_close(fast_attention(q, q, q, 0.5), attention_pattern(q, q, 0.5) @ q)


def test_a_batch_without_a_scored_target_has_loss_and_gradient_0():
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(10, 8, requires_grad=True)
    loss = linear_cross_entropy(x, weight, torch.full((4,), -1))
    loss.backward()
    assert loss == 0 and not x.grad.any() and not weight.grad.any()
