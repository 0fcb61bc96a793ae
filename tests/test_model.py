"""model.py and model_mla.py: shapes, starting values, counts, and that the two differ in the attention alone."""

import pytest
import torch

from core.decoding import draw
from core.kernels import EagerAttention, Linear, attend, attention_pattern, causal_mask, dropout
from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig

SIZES = dict(block_size=16, vocab_size=50, n_layer=2, n_head=4, n_embd=32)
VARIANTS = {
    'mha': (GPT, GPTConfig, {}),
    'mha-rope-nobias': (GPT, GPTConfig, dict(pos='rope', bias=False)),
    'mla': (MLAGPT, MLAConfig, {}),
    'mla-small-nobias': (MLAGPT, MLAConfig, dict(n_latent=5, bias=False)),
    'mla-published': (MLAGPT, MLAConfig, dict(pos='rope', n_latent_q=12, latent_norm=True)),
}


def make(variant, **changes):
    model_class, config_class, extra = VARIANTS[variant]
    return model_class(config_class(**{**SIZES, **extra, **changes})).eval()


@pytest.mark.parametrize('variant', VARIANTS)
def test_the_loss_is_the_cross_entropy_of_the_logits_and_the_future_is_not_seen(variant):
    model, idx = make(variant).double(), torch.randint(50, (3, 16), generator=torch.Generator().manual_seed(0))
    logits, loss = model(idx, idx)
    assert logits.shape == (3, 16, 50)
    picked = logits.log_softmax(-1).gather(-1, idx[..., None])
    assert loss.item() == pytest.approx(-picked.mean().item(), abs=1e-12)
    torch.testing.assert_close(model.window_losses(idx, idx).double(), -picked.mean((1, 2)), rtol=1e-6, atol=0)
    changed = idx.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 50
    torch.testing.assert_close(model(changed, idx)[0][:, :9], logits[:, :9], rtol=0, atol=1e-12)
    assert not torch.allclose(model(changed, idx)[0][:, 9:], logits[:, 9:])
    torch.testing.assert_close(model(idx)[0][:, 0], logits[:, -1], rtol=0, atol=1e-12)


@pytest.mark.parametrize('variant', VARIANTS)
def test_the_plain_formula_gives_what_the_fused_kernel_gives(variant):
    idx = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(1))
    fused, plain = make(variant).double(), make(variant, flash=False).double()
    for grad in (True, False):  # with gradients a CPU has a kernel of our own
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(plain(idx, idx)[0], fused(idx, idx)[0], rtol=0, atol=1e-12)


def test_masked_targets_are_not_scored():
    model, idx = make('mha'), torch.arange(32).view(2, 16)
    targets = idx.clone()
    targets[:, :6] = -1
    logits, loss = model(idx, targets)
    picked = logits.log_softmax(-1).gather(-1, idx[..., None])[:, 6:]
    assert loss.item() == pytest.approx(-picked.mean().item(), rel=1e-5)
    torch.testing.assert_close(model.window_losses(idx, targets), -picked.mean((1, 2)))


def test_tensors_that_both_models_have_start_equal_and_others_do_not():
    mha, mla = make('mha').state_dict(), make('mla').state_dict()
    shared = set(mha) & set(mla)
    assert {n.split('attn.')[1] for n in set(mla) - shared} == {
        f'{part}.{kind}' for part in ('c_q', 'c_kv_down', 'c_kv_up') for kind in ('weight', 'bias')
    }
    assert all(torch.equal(mha[name], mla[name]) for name in shared)
    other = GPT(GPTConfig(**SIZES), seed=1).state_dict()
    assert not torch.equal(other['transformer.wte.weight'], mha['transformer.wte.weight'])
    first, second = (mha[f'transformer.h.{i}.mlp.c_fc.weight'] for i in (0, 1))
    assert not torch.equal(first, second)


def test_starting_values_do_not_depend_on_what_was_drawn_before():
    torch.manual_seed(0)
    first = make('mla').state_dict()
    torch.rand(100)
    assert all(torch.equal(a, b) for a, b in zip(first.values(), make('mla').state_dict().values(), strict=True))


def test_starting_scale_is_gpt2s():
    state = GPT(GPTConfig(block_size=64, vocab_size=500, n_layer=2, n_head=2, n_embd=128)).state_dict()
    assert state['transformer.wte.weight'].std().item() == pytest.approx(0.02, rel=0.02)
    assert state['transformer.h.0.mlp.c_proj.weight'].std().item() == pytest.approx(0.01, rel=0.02)
    assert state['transformer.h.0.ln_1.weight'].unique().tolist() == [1]
    assert state['transformer.h.0.attn.c_attn.bias'].unique().tolist() == [0]


def test_parameter_counts():
    assert GPT(GPTConfig(vocab_size=50257)).get_num_params(non_embedding=False) == 124_439_808  # as published
    mha, mla = make('mha', bias=False), make('mla', bias=False)
    C, r, L = 32, 16, 2
    assert mha.num_attention_params() == L * 4 * C * C
    assert mla.num_attention_params() == L * (2 * C * C + 3 * r * C)
    assert mha.get_num_params(non_embedding=False) - mha.get_num_params() == 16 * C


def test_flops_follow_the_formula():
    mha, mla = make('mha', bias=False), make('mla', bias=False)
    L, C, T, V = 2, 32, 16, 50
    assert mha.flops_per_token() == 6 * (V * C + L * 12 * C * C) + 12 * L * C * T
    assert mla.flops_per_token() == 6 * (V * C + L * (10 * C * C + 3 * 16 * C)) + 12 * L * C * T
    assert mha.estimate_mfu(8, 2.0, None) is None
    assert mha.estimate_mfu(8, 2.0, 1e9) == pytest.approx(mha.flops_per_token() * T * 8 / 2.0 / 1e9)


def test_parameter_order_and_names_are_nanogpts():
    names = [name for name, _ in make('mha').named_parameters()]
    assert names[:2] == ['transformer.wte.weight', 'transformer.wpe.weight']
    block = ['ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj']
    assert names[2:14] == [f'transformer.h.0.{part}.{kind}' for part in block for kind in ('weight', 'bias')]
    assert 'lm_head.weight' in make('mha').state_dict()


def test_matrices_decay_and_vectors_do_not():
    optimizer = make('mla').configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    decayed, kept = optimizer.param_groups
    assert decayed['weight_decay'] == 0.1 and {p.dim() for p in decayed['params']} == {2}
    assert kept['weight_decay'] == 0.0 and {p.dim() for p in kept['params']} == {1}


def test_cropping_keeps_what_short_inputs_give():
    for variant in ('mha', 'mha-rope-nobias'):
        model, idx = make(variant), torch.arange(8)[None]
        before = model(idx)[0]
        model.crop_block_size(8)
        torch.testing.assert_close(model(idx)[0], before)
        with pytest.raises(ValueError, match='block_size=8'):
            model(torch.arange(9)[None])
        with pytest.raises(ValueError, match='more than the 8'):
            model.crop_block_size(9)


@pytest.mark.parametrize(
    ('config', 'changes', 'complaint'),
    [
        (GPTConfig, dict(n_embd=30), 'n_embd=30 is not a multiple of n_head=4'),
        (GPTConfig, dict(n_layer=0), 'n_layer is 0'),
        (GPTConfig, dict(dropout=1.0), 'dropout is 1.0'),
        (GPTConfig, dict(gelu='relu'), "gelu is 'relu'"),
        (GPTConfig, dict(pos='none'), "pos is 'none'"),
        (GPTConfig, dict(pos='rope', n_embd=12), 'RoPE turns pairs'),
        (MLAConfig, dict(n_latent=33), 'n_latent=33 is outside'),
        (MLAConfig, dict(n_latent=-1), 'n_latent=-1 is outside'),
        (MLAConfig, dict(n_latent_q=40), 'n_latent_q=40 is outside'),
        (MLAConfig, dict(n_rope=4), "n_rope=4 needs pos='rope'"),
        (MLAConfig, dict(pos='rope', n_rope=8), 'leaves nothing for content'),
        (MLAConfig, dict(pos='rope', n_rope=3), 'RoPE turns pairs'),
    ],
)
def test_sizes_that_do_not_fit_are_named(config, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        config(**{**SIZES, **changes})


def test_causal_mask_is_aligned_at_the_lower_right():
    assert causal_mask(2, 4, 'cpu').int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_draw_follows_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.2, 1e-9]).log().expand(20000, 4)
    shares = torch.bincount(draw(logits, generator=torch.Generator().manual_seed(0)), minlength=4) / 20000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2, 0.0]), rtol=0, atol=0.015)


@pytest.mark.parametrize(
    'extra', [{}, dict(latent_norm=True), dict(n_latent_q=48), dict(n_latent_q=48, latent_norm=True)]
)
def test_mlas_keys_values_and_queries_start_with_mhas_variance(extra):
    sizes = dict(block_size=64, vocab_size=50, n_layer=1, n_head=4, n_embd=256)
    x = torch.randn(8, 64, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mha = GPT(GPTConfig(**sizes)).transformer.h[0].attn.qkv(x)
        mla = MLAGPT(MLAConfig(**sizes, n_latent=64, **extra)).transformer.h[0].attn.qkv(x)
    for one, other in zip(mha, mla, strict=True):
        assert other.std().item() == pytest.approx(one.std().item(), rel=0.1)


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
    q, k, v = torch.randn(3, 4, 2, 8, 8, dtype=torch.float64)
    mean = torch.stack([attend(q, k, v, 0.3, 0.2, flash) for _ in range(4000)]).mean(0)
    assert (mean - attend(q, k, v, 0.3)).abs().max() < 0.1


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize('vocab_size', [11, 40000])
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


def test_the_loss_without_logits_needs_a_fraction_of_the_memory():
    def peak(logits):
        model = GPT(GPTConfig(block_size=256, vocab_size=20000, n_layer=1, n_head=1, n_embd=8))
        x = torch.zeros(8, 256, dtype=torch.int64)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            model(x, x, logits=logits)[1].backward()
        held = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == '[memory]']
        return max(torch.tensor(held).cumsum(0).tolist())

    assert peak(False) < 0.4 * peak(True)


@pytest.mark.parametrize('kind', [(GPT, GPTConfig), (MLAGPT, MLAConfig)])
@pytest.mark.parametrize('pos', ['learned', 'rope'])
def test_recomputed_blocks_give_the_same_gradients(kind, pos):
    model_class, config_class = kind
    sizes = dict(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=16, pos=pos, dropout=0.2)
    model = model_class(config_class(**sizes))
    x = torch.randint(11, (2, 16))
    found = []
    for model.recompute in (False, True):
        torch.manual_seed(1)  # the same dropout masks, the second time in the backward pass too
        found.append(torch.autograd.grad(model(x, x)[1], list(model.parameters())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('intel', [True, False])
@pytest.mark.parametrize('rows', [1, 2, 3, 8, 16, 17])
@pytest.mark.parametrize('sizes', [(8, 6), (16, 1600), (5, 1)])
def test_few_rows_are_multiplied_to_the_same_numbers_and_lie_in_order(rows, sizes, intel, monkeypatch):
    monkeypatch.setattr('model.cpu_is_intel', lambda: intel)
    layer = Linear(*sizes).double()
    x = torch.randn(rows, 1, sizes[0], dtype=torch.float64)
    with torch.no_grad():
        y = layer(x)
        torch.testing.assert_close(y, torch.nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-12, atol=1e-14)
    assert y.is_contiguous()


@pytest.mark.parametrize('B, T', [(2, 1), (2, 5), (1, 64), (2, 200)])
@pytest.mark.parametrize('p', [0.0, 0.3])
def test_eager_attention_and_its_gradients_are_those_of_the_formula(B, T, p, monkeypatch):
    """Over several blocks of queries, and under dropout with the same masks."""
    monkeypatch.setattr(EagerAttention, 'QUERY_BLOCK', 64)
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
def test_eager_attention_in_bfloat16_is_that_in_float32_to_its_precision(p):
    parts = [torch.randn(2, 3, 80, 8, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(4)]
    parts, weights, found = parts[:3], parts[3].float(), []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [t.to(dtype).requires_grad_() for t in parts]
        torch.manual_seed(5)
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = attend(*inputs, 0.35, p)
        grads = torch.autograd.grad((y.float() * weights).sum(), inputs)
        assert type(y.grad_fn).__name__ == 'EagerAttentionBackward' and all(t.dtype == dtype for t in (y, *grads))
        found.append([t.float() for t in (y, *grads)])
    for low, full in zip(*found, strict=True):
        assert (low - full).norm() < 0.01 * full.norm()


@pytest.mark.parametrize('T, p, eager', [(128, 0.0, True), (129, 0.0, False), (129, 0.1, True)])
def test_which_attention_a_cpu_trains_by(T, p, eager):
    q = torch.randn(1, 1, T, 4, requires_grad=True)
    assert (type(attend(q, q, q, 0.5, p).grad_fn).__name__ == 'EagerAttentionBackward') == eager
    with torch.no_grad():
        torch.testing.assert_close(attend(q, q, q, 0.5), attend(q, q, q, 0.5, flash=False))
