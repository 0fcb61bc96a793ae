"""
For a cache in fewer bits: a basis of a trained latent in which few bits suffice, and a full pass that rounds alike.

The basis of a latent c is free: any invertible A between the down- and the up-projection, W_U A^-1 and A W_D, leaves
keys and values as they were, and absorbed decoding costs what it did. (A cache of keys and values mixes them itself,
in ops/packed.py.) BASES are

    hadamard     an orthogonal A that mixes all of the latent's numbers equally, so that they share the token's scale
    components   A c are the principal components of what the latent gives to keys and values on real text: the numbers
                 have very different sizes, and an error in any of them costs the same (for bits by component)
    balanced     the components, each divided by the root of its size, then mixed: of all A the least mean square error
                 of keys and values, if every number has the same error and that follows the latent's mean square

An RMSNorm on the latent commutes with orthogonal maps only, once its gain has moved into W_U.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy

import torch
from torch import Tensor
from torch.nn import functional as F

from core.cli.machine import to_float64
from core.convert.factorize import Statistics, collect_statistics, factorize, layers, root
from model import GPT
from model_mla import MLAGPT
from ops.cache import KINDS
from ops.packed import Form, hadamard

BASES = ('hadamard', 'components', 'balanced')
RIDGE = 1e-6  # of the mean variance: no direction is left out because the text doesn't have it


def latent_statistics(model: MLAGPT, batches: Iterable[Tensor]) -> list[Statistics]:
    """Statistics of each layer's latent c_kv on token ids (B, T)."""
    return collect_statistics(model, batches, lambda block: block.attn.kv_norm, model.config.n_latent)


def for_few_bits(model: GPT, kind: str) -> GPT:
    """
    The model as it goes with a cache of a kind of ops/cache.py: an MLA model in few bits has its latents mixed evenly.

    Without it one large number, as converted models have it, sets the scale of a whole latent: in 4 bits the others are
    lost. It is the same function to rounding. Signs are flipped first, or Hadamard's matrix would undo itself where
    the latents are in its basis already (as in QuIP#, arXiv:2402.04396).
    """
    if kind == 'float' or not isinstance(model, MLAGPT):
        return model
    signs = torch.randint(2, (model.config.n_latent,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    return rotate(model, 'hadamard', signs=signs.double())


@torch.no_grad()
def rotate(
    model: MLAGPT, basis: str, statistics: list[Statistics] | None = None, signs: Tensor | None = None
) -> MLAGPT:
    """
    A copy of `model` with its latents in another of BASES; the same function to rounding.

    statistics: from `latent_statistics`, for all but 'hadamard'. signs: 1 or -1 for each of a latent's numbers (r,),
    which are multiplied by them before they are mixed. ValueError for an unknown basis or a model without a
    latent, without statistics, and under a latent norm where the basis isn't orthogonal.
    """
    if basis not in BASES:
        raise ValueError(f"basis is '{basis}'; it must be {', '.join(BASES)}")
    if not isinstance(model, MLAGPT):
        raise ValueError('only MLA has a latent, whose basis can be chosen')
    if basis != 'hadamard' and model.config.latent_norm:
        raise ValueError(f"under a latent norm only basis='hadamard' leaves the model as it is, not '{basis}'")
    if basis != 'hadamard' and statistics is None:
        raise ValueError(f"basis='{basis}' needs statistics of the latents on some text")
    new = deepcopy(model)
    for layer, block in enumerate(layers(new)):
        attn, r = block.attn, model.config.n_latent
        up, down, keys = to_float64(attn.c_kv_up.weight).cpu(), torch.eye(r).double(), attn.n_head * attn.n_nope
        if model.config.latent_norm:
            up = up * to_float64(attn.kv_norm.weight).cpu()
            attn.kv_norm.weight.fill_(1.0)
        if statistics and basis != 'hadamard':
            _, second = statistics[layer].moments(centred=False)
            half = root(second + RIDGE * second.trace() / r * down)
            down, up, _ = factorize(up[:keys], up[keys:], torch.zeros_like(second[0]), half, r)
            unused = r - len(down)  # more numbers than keys and values together
            down, up = F.pad(down, (0, 0, 0, unused)), F.pad(up, (0, unused))
            if basis == 'balanced':
                size = (down @ half).norm(dim=1).sqrt()
                size[size <= 1e-12 * size.max()] = 1.0
                down, up = down / size[:, None], up * size
        if basis != 'components':
            mix = hadamard(r) if signs is None else hadamard(r) * signs
            down, up = mix @ down, up @ mix.mT
        attn.c_kv_up.weight.copy_(up)
        for rows in attn.c_kv_down.parameters():
            rows[:r] = (down @ to_float64(rows[:r]).cpu()).to(rows)
    return new


def round_cached(model: GPT, rounding: Callable[[int, Tensor], Tensor]) -> GPT:
    """
    Let the full pass of a model, in place, attend to what rounding(layer, x) makes of what is cached.

    x: keys (B, K, T, d) and values alike, or latents (B, T, r + R). Returns the model, not to be used with a cache.
    """
    for layer, block in enumerate(layers(model)):
        attn = block.attn
        if isinstance(model, MLAGPT):
            attn.latent = lambda *x, layer=layer, plain=attn.latent: rounding(layer, plain(*x))
        else:

            def qkv(*x, layer=layer, plain=attn.qkv):
                q, *kv = plain(*x)
                return q, *(rounding(layer, t) for t in kv)

            attn.qkv = qkv
    return model


def round_as(model: GPT, kind: str) -> GPT:
    """`round_cached` by a kind of ops/cache.py; 'float' changes nothing."""
    if kind == 'float':
        return model
    if isinstance(model, MLAGPT):
        wide = layers(model)[0].attn.n_rope
        return round_cached(model, lambda layer, x: Form(x.size(-1), wide=wide, **KINDS[kind]).rounded(x))
    return round_cached(model, lambda layer, x: rounded_mixed(Form(x.size(-1), **KINDS[kind]), x))


def rounded_mixed(form: Form, x: Tensor) -> Tensor:
    """Keys or values x (..., size) as a cache that mixes them would give them back."""
    mix = hadamard(form.size).to(torch.promote_types(x.dtype, torch.float32)).to(x.device)
    return (form.rounded(x.to(mix.dtype) @ mix.mT) @ mix).to(x.dtype)
