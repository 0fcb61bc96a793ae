"""
From MHA to MLA: the algebra that turns trained keys and values into one latent. Tensors in, a model out.

Notable features:
- one singular value decomposition of keys and values together, per layer
- weighted by what the layer's inputs are on real text, or, without any text, by what LayerNorm alone says of them
- the mean input costs no rank: what the latent drops of it goes into the bias
- exact, to rounding, for n_latent of n_embd and of n_embd - 1
- the statistics take (C + 1) C numbers per layer, however much text they are made from

Why. Keys and values are W x + b, W = [W_K; W_V] (2C, C), x the output of ln_1, with mean m and covariance M. Rank r
leaves the error E |(W - W_up W_down)(x - m)|^2 smallest when W_up W_down = U U^T W, where U (2C, r) holds the first
left singular vectors of W M^(1/2) (Eckart and Young 1936; with M as activation statistics: arXiv:2403.07378). So

    W_down = U^T W        W_up = U        b_up = b + (I - U U^T) W m        b_down = 0

LayerNorm's output is x = g * n + beta, and the entries of n sum to 0. All x - m therefore lie in a subspace of C - 1
dimensions, which is why one less than n_embd is still exact. With no text at hand, n is taken to be white there: the
"weights-only" conversion is the same formula with M = G (I - 1 1^T / C) G, G = diag(g), and m = beta.

Keys and values are of different size, and the error of the larger would win. `balance` scales the keys to the energy
of the values before the decomposition and scales them back behind it.

A model without biases has nowhere to put b_up: there m is 0 and M the uncentred E[x x^T].
"""

from dataclasses import asdict, dataclass

import torch

from model import GPT
from model_mla import MLAGPT, MLAConfig

# A share of the mean variance that every direction LayerNorm can reach is given, seen in the text or not: full rank
# is then exact on any input. Its square root stays far above float64's rounding, and far below what matters.
RIDGE = 1e-8


@dataclass
class Statistics:
    """Of one layer's ln_1 output x, over `count` tokens: the sums of x (C,) and of x x^T (C, C), float64."""

    count: int
    total: torch.Tensor
    products: torch.Tensor

    @classmethod
    def empty(cls, size, device='cpu'):
        zeros = torch.zeros(size + 1, size, dtype=torch.float64, device=device)
        return cls(0, zeros[0], zeros[1:])

    def add(self, x):
        """Take in x (..., C)."""
        x = x.detach().flatten(0, -2).to(self.total.device, torch.float64)
        self.count += len(x)
        self.total += x.sum(dim=0)
        self.products.addmm_(x.t(), x)

    def moments(self, centred=True):
        """Mean (C,) and covariance (C, C), uncentred: 0 and E[x x^T]; on the CPU. ValueError before the first `add`."""
        if not self.count:
            raise ValueError('there are no statistics yet; add some tokens first')
        mean, second = self.total.cpu() / self.count, self.products.cpu() / self.count
        return (mean, second - torch.outer(mean, mean)) if centred else (torch.zeros_like(mean), second)


@torch.no_grad()
def collect_statistics(model, batches):
    """
    Run `model` (GPT) over batches of token ids (B, T), any iterable, and measure what its attention layers read.

    Returns a list of one Statistics per layer. One batch at a time is in memory.
    """
    device = next(model.parameters()).device
    where = 'cpu' if device.type == 'mps' else device  # Apple's GPUs have no float64
    blocks = model.transformer.h
    statistics = [Statistics.empty(model.config.n_embd, where) for _ in blocks]
    hooks = [
        block.ln_1.register_forward_hook(lambda module, inputs, output, own=own: own.add(output))
        for block, own in zip(blocks, statistics, strict=True)
    ]
    training = model.training
    model.eval()
    try:
        for idx in batches:
            model.hidden(idx.to(device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return statistics


def norm_moments(ln, centred=True):
    """Mean and covariance (uncentred: zeros, E[x x^T]) that ln's output has when its normed input is white."""
    gain = ln.weight.detach().to('cpu', torch.float64)
    mean = torch.zeros_like(gain) if ln.bias is None else ln.bias.detach().to('cpu', torch.float64)
    covariance = torch.diag(gain**2) - torch.outer(gain, gain) / len(gain)
    return (mean, covariance) if centred else (torch.zeros_like(mean), covariance + torch.outer(mean, mean))


def root(matrix):
    """The symmetric square root of a covariance (n, n)."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.t()


def reachable_root(ln, covariance):
    """
    A matrix (C, C - 1) whose product with its transpose is `covariance`, and RIDGE of what `norm_moments` would say.

    Its columns span what LayerNorm `ln` can reach and nothing else, to the last bit: rounding in `covariance` would
    otherwise pass for a direction of its own, and take the place of one that matters.
    """
    gain = ln.weight.detach().to('cpu', torch.float64)
    basis, sizes, _ = torch.linalg.svd(torch.diag(gain) - gain[:, None] / len(gain))
    kept = sizes > 1e-12 * sizes[0]
    basis, sizes = basis[:, kept], sizes[kept]
    inner = basis.t() @ covariance @ basis
    return basis @ root(inner + torch.diag(RIDGE * inner.trace() / sizes.square().sum() * sizes.square()))


def factorize(w_k, w_v, mean, half, n_latent, balance=True):
    """
    One latent for keys w_k x and values w_v x (each (C, C)), by the module's formula.

    x has the mean `mean` (C,) and the covariance half half^T, half (C, n). Returns (down (r, C), up (2C, r), shift
    (2C,)) in float64: [w_k; w_v] x is about up down x + shift.
    """
    norm = torch.linalg.matrix_norm
    ratio = (norm(w_v @ half) / norm(w_k @ half)).item() if balance else 1.0
    if not 0 < ratio < float('inf'):
        ratio = 1.0  # keys or values are all zero: there is nothing to balance
    w = torch.cat((w_k * ratio, w_v))
    up = torch.linalg.svd(w @ half).U[:, :n_latent]
    down = up.t() @ w
    shift = w @ mean - up @ (down @ mean)
    unscale = torch.cat((w.new_full((len(w_k),), 1 / ratio), w.new_ones(len(w_v))))
    return down, up * unscale[:, None], shift * unscale


@torch.no_grad()
def to_mla(model, n_latent=0, statistics=None, balance=True):
    """
    An MLAGPT that computes what `model` (a GPT with learned positions) computes, as far as n_latent allows.

    n_latent: 1 to n_embd; 0 takes half of n_embd. statistics: from `collect_statistics` on the same model; None uses
    the weights alone. balance: give keys and values the same weight. The new model has the old one's dtype and device.
    Raises ValueError for an MLA model, for RoPE, and for an n_latent out of range.
    """
    if type(model) is not GPT:
        raise ValueError(f'only a GPT with multi-head attention can be converted, not {type(model).__name__}')
    if model.config.pos != 'learned':
        raise ValueError(
            'this model has RoPE, which turns every key by its position, and no latent without positions can stand for '
            "such keys; train the MHA model with pos='learned' to convert it"
        )
    if statistics is not None and len(statistics) != model.config.n_layer:
        raise ValueError(f'{len(statistics)} layers of statistics for a model of {model.config.n_layer}')
    weight = model.lm_head.weight
    new = MLAGPT(MLAConfig(**asdict(model.config), n_latent=n_latent)).to(device=weight.device, dtype=weight.dtype)
    for name, value in new.state_dict().items():
        if '.attn.' not in name or '.attn.c_proj.' in name:
            value.copy_(model.state_dict()[name])
    for layer, (old, block) in enumerate(zip(model.transformer.h, new.transformer.h, strict=True)):
        convert_layer(old, block.attn, statistics[layer] if statistics else None, balance)
    return new.train(model.training)


def convert_layer(old, attention, statistics, balance):
    """Fill the queries and the latent of `attention` from the block `old` (see `to_mla`)."""
    weight, bias = old.attn.c_attn.weight, old.attn.c_attn.bias
    w_q, w_k, w_v = weight.to('cpu', torch.float64).chunk(3)
    centred = bias is not None
    mean, covariance = statistics.moments(centred) if statistics else norm_moments(old.ln_1, centred)
    half = reachable_root(old.ln_1, covariance)
    down, up, shift = factorize(w_k, w_v, mean, half, attention.n_latent, balance)
    attention.c_q.weight.copy_(w_q)
    attention.c_kv_down.weight.copy_(down)
    attention.c_kv_up.weight.copy_(up)
    if centred:
        b_q, b_kv = bias.to('cpu', torch.float64).split((len(w_q), len(w_k) + len(w_v)))
        attention.c_q.bias.copy_(b_q)
        attention.c_kv_down.bias.zero_()
        attention.c_kv_up.bias.copy_(b_kv + shift)
