"""model.py and model_mla.py: shapes, starting values, counts, and that the two differ in the attention alone."""

import pytest
import torch

from core.runs.models import attention_params
from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig
from ops.optimizers import adamw, param_groups

SIZES = dict(block_size=16, vocab_size=50, n_layer=2, n_head=4, n_embd=32)
VARIANTS = {
    'mha': (GPT, GPTConfig, {}),
    'mha-rope-nobias': (GPT, GPTConfig, dict(pos='rope', bias=False)),
    'gqa': (GPT, GPTConfig, dict(n_kv_head=2)),
    'mqa-rope': (GPT, GPTConfig, dict(n_kv_head=1, pos='rope')),
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
    assert attention_params(make('gqa', bias=False)) == L * (2 * C * C + 2 * C * C // 2)
    assert GPTConfig(n_kv_head=12) == GPTConfig()
    assert attention_params(mha) == L * 4 * C * C
    assert attention_params(mla) == L * (2 * C * C + 3 * r * C)
    assert mha.get_num_params(non_embedding=False) - mha.get_num_params() == 16 * C


def test_flops_follow_the_formula():
    mha, mla = make('mha', bias=False), make('mla', bias=False)
    L, C, T, V = 2, 32, 16, 50
    assert mha.flops_per_token() == 6 * (V * C + L * 12 * C * C) + 12 * L * C * T
    assert mla.flops_per_token() == 6 * (V * C + L * (10 * C * C + 3 * 16 * C)) + 12 * L * C * T
    modern = MLAGPT(MLAConfig(**SIZES | dict(pos='rope', n_rope=4, n_nope=6, n_value=10, tied=False, bias=False)))
    matrices = V * C + L * (8 * C * C + C * 4 * 10 + C * (16 + 4) + 16 * 4 * 16 + 4 * 10 * C)
    assert modern.flops_per_token() == 6 * matrices + 6 * L * 4 * (10 + 10) * T


def test_parameter_order_and_names_are_nanogpts():
    names = [name for name, _ in make('mha').named_parameters()]
    assert names[:2] == ['transformer.wte.weight', 'transformer.wpe.weight']
    block = ['ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj']
    assert names[2:14] == [f'transformer.h.0.{part}.{kind}' for part in block for kind in ('weight', 'bias')]
    assert 'lm_head.weight' in make('mha').state_dict()


def test_matrices_decay_and_vectors_do_not():
    decayed, kept = adamw(param_groups(make('mla').named_parameters(), 0.1), 1e-3, (0.9, 0.95), 'cpu').param_groups
    assert decayed['weight_decay'] == 0.1 and {p.dim() for p in decayed['params']} == {2}
    assert kept['weight_decay'] == 0.0 and {p.dim() for p in kept['params']} == {1}


def test_cropping_keeps_what_short_inputs_give():
    for variant in ('mha', 'mha-rope-nobias'):
        model, idx = make(variant), torch.arange(8)[None]
        before = model(idx)[0]
        model.set_context(8)
        torch.testing.assert_close(model(idx)[0], before)
        with pytest.raises(ValueError, match='block_size=8'):
            model(torch.arange(9)[None])
    with pytest.raises(ValueError, match='more than the 16 learned positions'):
        make('mha').set_context(17)


@pytest.mark.parametrize('settings', [dict(pos='rope'), dict(pos='none'), dict(pos='rope', shared_rope=False)])
def test_without_learned_positions_a_model_reads_longer_texts(settings):
    """As a model that was made for them does with the same weights."""
    longer = MLAGPT(MLAConfig(**SIZES | settings | dict(block_size=40)))
    model = MLAGPT(MLAConfig(**SIZES | settings))
    model.load_state_dict(longer.state_dict())
    idx = torch.arange(40)[None]
    with pytest.raises(ValueError, match='40 tokens do not fit'):
        model(idx)
    model.set_context(40)
    assert torch.equal(model(idx, idx)[0], longer(idx, idx)[0])


@pytest.mark.parametrize(
    ('config', 'changes', 'complaint'),
    [
        (GPTConfig, dict(n_embd=30), 'n_embd=30 must be a multiple of n_head=4'),
        (GPTConfig, dict(n_layer=0), 'n_layer is 0'),
        (GPTConfig, dict(n_kv_head=3), 'n_head=4 must be a multiple of n_kv_head=3'),
        (GPTConfig, dict(n_kv_head=8), 'multiple of n_kv_head=8'),
        (GPTConfig, dict(n_kv_head=-1), 'multiple of n_kv_head=-1'),
        (MLAConfig, dict(n_kv_head=2), 'n_kv_head=2 belongs to MHA'),
        (GPTConfig, dict(dropout=1.0), 'dropout is 1.0'),
        (GPTConfig, dict(gelu='relu'), "gelu is 'relu'"),
        (GPTConfig, dict(pos='alibi'), "pos is 'alibi'"),
        (GPTConfig, dict(n_rope=4), "n_rope=4 needs pos='rope'"),
        (GPTConfig, dict(pos='rope', n_rope=10), 'RoPE rotates pairs of dimensions, 8 at most: 10 must be even'),
        (GPTConfig, dict(norm='batch'), "norm is 'batch'"),
        (MLAConfig, dict(n_value=-1), 'n_value=-1 must be at least 1'),
        (MLAConfig, dict(shared_rope=False), "shared_rope=False rotates whole keys: it needs pos='rope'"),
        (GPTConfig, dict(pos='rope', n_embd=12), 'RoPE rotates pairs'),
        (MLAConfig, dict(n_latent=33), 'n_latent=33 is outside'),
        (MLAConfig, dict(n_latent=-1), 'n_latent=-1 is outside'),
        (MLAConfig, dict(n_latent_q=40), 'n_latent_q=40 is outside'),
        (MLAConfig, dict(n_rope=4), "n_rope=4 needs pos='rope'"),
        (MLAConfig, dict(pos='rope', n_rope=3), 'RoPE rotates pairs'),
    ],
)
def test_sizes_that_do_not_fit_are_named(config, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        config(**{**SIZES, **changes})


LATENTS = [{}, dict(latent_norm=True), dict(n_latent_q=48), dict(n_latent_q=48, latent_norm=True)]


def first_qkv(kind, **sizes):
    """The attention of a new model of width 256 with one layer, its input, and the queries, keys and values of that."""
    model_class, config_class = kind
    x = torch.randn(8, 64, 256, generator=torch.Generator().manual_seed(0))
    sizes = dict(block_size=64, vocab_size=50, n_layer=1, n_head=4, n_embd=256, **sizes)
    attn = model_class(config_class(**sizes)).transformer.h[0].attn
    with torch.no_grad():
        return attn, x, attn.qkv(x)


@pytest.mark.parametrize('extra', LATENTS)
def test_with_gpt2s_initial_values_keys_values_and_queries_start_with_mhas_variance(extra):
    _, _, mha = first_qkv((GPT, GPTConfig))
    _, _, mla = first_qkv((MLAGPT, MLAConfig), n_latent=64, latent_init='gpt2', **extra)
    for one, other in zip(mha, mla, strict=True):
        assert other.std().item() == pytest.approx(one.std().item(), rel=0.1)


@pytest.mark.parametrize('extra', LATENTS)
def test_a_latent_starts_with_variance_1_and_keys_and_values_with_a_quarter(extra):
    attn, x, (q, k, v) = first_qkv((MLAGPT, MLAConfig), n_latent=64, **extra)
    assert attn.latent(x).std().item() == pytest.approx(1, rel=0.05)
    for tensor in (k, v) + (q,) * ('n_latent_q' in extra):
        assert tensor.std().item() == pytest.approx(0.5, rel=0.1)


def test_a_step_of_equal_signs_moves_keys_as_far_as_mhas_half_of_it_by_each_factor():
    """At r = C/2, for the derivation in init_std; a step of size 1 along the sign of the input, as Adam's first one."""
    moved = {}
    for name, kind in (('mha', (GPT, GPTConfig)), ('mla', (MLAGPT, MLAConfig))):
        attn, x, _ = first_qkv(kind)
        x, lr = x[:1, :1], 1e-3
        factors = {'mha': ['c_attn'], 'mla': ['c_kv_up', 'c_kv_down']}[name]
        for factor in factors:
            linear, before = getattr(attn, factor), attn.qkv(x)[1].clone()
            old = linear.weight.detach().clone()
            read = attn.latent(x) if factor == 'c_kv_up' else x
            with torch.no_grad():
                linear.weight += lr * read.sign().flatten()
                moved[factor] = (attn.qkv(x)[1] - before).square().mean().sqrt().item()
                linear.weight.copy_(old)
    for factor in ('c_kv_up', 'c_kv_down'):
        assert moved[factor] == pytest.approx(0.5 * moved['c_attn'], rel=0.25)


@pytest.mark.parametrize('kind', [(GPT, GPTConfig), (MLAGPT, MLAConfig)])
@pytest.mark.parametrize('pos', ['learned', 'rope'])
def test_recomputed_blocks_give_the_same_gradients(kind, pos):
    model_class, config_class = kind
    sizes = dict(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=16, pos=pos, dropout=0.2)
    model = model_class(config_class(**sizes))
    x = torch.randint(11, (2, 16))
    found = []
    for model.config.recompute in (False, True):
        torch.manual_seed(1)  # the same dropout masks, the second time in the backward pass too
        found.append(torch.autograd.grad(model(x, x)[1], list(model.parameters())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
