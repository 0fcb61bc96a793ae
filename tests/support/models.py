"""Small models of every kind, and comparing their logits."""

import torch

from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig

BLOCK, VOCAB = 32, 50
VARIANTS = {
    'mha': (GPT, dict()),
    'mha-nobias': (GPT, dict(bias=False)),
    'mha-rope': (GPT, dict(pos='rope')),
    'mha-open': (GPT, dict(flash=False)),
    'gqa': (GPT, dict(n_kv_head=2)),
    'mqa-rope': (GPT, dict(n_kv_head=1, pos='rope', bias=False)),
    'mla': (MLAGPT, dict()),
    'mla-nobias': (MLAGPT, dict(bias=False, n_latent=20)),
    'mla-thin': (MLAGPT, dict(n_latent=6)),  # r < d: absorbing always pays
    'mla-full': (MLAGPT, dict(n_latent=32)),
    'mla-query': (MLAGPT, dict(n_latent=20, n_latent_q=12)),
    'mla-norm': (MLAGPT, dict(n_latent=20, n_latent_q=12, latent_norm=True)),
    'mla-open': (MLAGPT, dict(flash=False)),
    'mla-rope': (MLAGPT, dict(pos='rope')),
    'mha-none': (GPT, dict(pos='none')),
    'mha-modern': (GPT, dict(pos='rope', n_rope=4, norm='rms', mlp='swiglu', bias=False, tied=False, rope_theta=500.0)),
    'mla-none': (MLAGPT, dict(pos='none', n_value=5)),
    'mla-published': (
        MLAGPT,
        dict(pos='rope', n_rope=4, n_nope=6, n_value=10, n_latent=12, latent_norm=True, bias=False),
    ),
    'mla-wide-values-open': (MLAGPT, dict(pos='rope', n_rope=2, n_nope=4, n_value=12, n_latent=20, flash=False)),
    'mla-carved': (MLAGPT, dict(pos='rope', n_rope=4, n_nope=4)),  # the only shape of before there was n_nope
    'mla-whole-keys': (MLAGPT, dict(pos='rope', shared_rope=False, n_latent=20)),
    'mla-rope-all': (MLAGPT, dict(pos='rope', n_rope=6, n_latent=12, n_latent_q=12, latent_norm=True, bias=False)),
}
MLA = [name for name in VARIANTS if name.startswith('mla')]


def make(variant, dtype=torch.float64, **changes):
    """A small model whose every parameter, biases and norms too, is far enough from its initial value to matter."""
    model_class, settings = VARIANTS[variant]
    config_class = MLAConfig if model_class is MLAGPT else GPTConfig
    sizes = dict(block_size=BLOCK, vocab_size=VOCAB, n_layer=2, n_head=4, n_embd=32)
    return randomized(model_class(config_class(**(sizes | settings | changes))).to(dtype), 0.3, seed=5)


@torch.no_grad()
def randomized(model, std, seed=3):
    """`model` with noise of this standard deviation added to every parameter, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += std * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model.eval()


def tokens(B, T, seed=0):
    return torch.randint(VOCAB, (B, T), generator=torch.Generator().manual_seed(seed))


def assert_close(a, b):
    """Equal to rounding, relative to the largest value: 1e-12 in float64, 1e-4 in float32."""
    assert a.shape == b.shape and a.dtype == b.dtype
    tolerance = 1e-12 if a.dtype == torch.float64 else 1e-4
    assert (a - b).abs().max() <= tolerance * b.abs().max()
