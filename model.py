"""
GPT-2 in one file: a decoder-only transformer with standard multi-head attention (MHA).

Read this first, then model_mla.py: it replaces the attention and nothing else.

Notable features:
- pre-norm blocks, learned positions (or RoPE), GELU, tied output head, optional biases
- fused attention kernels (PyTorch SDPA), on a CPU one with dropout of our own, the plain formula by `flash=False`
- a preallocated key/value cache: `cache = model.init_cache(B, max_tokens)`, then `model(idx, cache=cache)`
- initial values are a function of seed and parameter name, so that two models which share a tensor start it equal
- GPT-2's published weights load through `GPT.from_pretrained`

Shapes: B batch, T query length, S key length, L layers, H heads, C = n_embd, d = C/H head size, V vocabulary.

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2); Vaswani et al. 2017,
arXiv:1706.03762 (attention); Su et al. 2021, arXiv:2104.09864 (RoPE); Chowdhery et al. 2022, arXiv:2204.02311 (MFU).
"""

import functools
import hashlib
import math
import os
import platform
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

GPT2_SIZES = {
    'gpt2': dict(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    'gpt2-medium': dict(n_layer=24, n_head=16, n_embd=1024),  # 350M
    'gpt2-large': dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    'gpt2-xl': dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}


@dataclass
class GPTConfig:
    """What a GPT is made of. Raises ValueError when the numbers do not fit together."""

    block_size: int = 1024  # longest sequence, in tokens
    vocab_size: int = 50304  # GPT-2's 50257 ids, padded to a multiple of 64 for faster matrix products
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # biases in Linear and LayerNorm, as GPT-2 has; without: a little faster
    gelu: str = 'exact'  # 'exact' as nanoGPT trains, 'tanh' as OpenAI trained GPT-2
    pos: str = 'learned'  # 'learned' position embeddings, or 'rope' on queries and keys
    flash: bool = True  # fastest attention; False: the plain formula (the same but for which numbers dropout drops)

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}; it must be at least 1')
        if self.n_embd % self.n_head:
            raise ValueError(
                f'n_embd={self.n_embd} is not a multiple of n_head={self.n_head}; heads must be equal in size'
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout is {self.dropout}; it must be at least 0 and below 1')
        if self.gelu not in ('exact', 'tanh'):
            raise ValueError(f"gelu is '{self.gelu}'; it must be 'exact' or 'tanh'")
        if self.pos not in ('learned', 'rope'):
            raise ValueError(f"pos is '{self.pos}'; it must be 'learned' or 'rope'")
        if self.pos == 'rope' and self.rope_size % 2:
            raise ValueError(f'RoPE turns pairs of dimensions, but it was given {self.rope_size}; make that even')

    @property
    def head_size(self):
        return self.n_embd // self.n_head

    @property
    def rope_size(self):
        """Dimensions of each query and key that RoPE turns."""
        return self.head_size


@functools.cache
def cpu_is_intel():
    """Whether MKL, by which PyTorch multiplies, is at home on this CPU; on others it takes different code."""
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            return 'GenuineIntel' in file.read(4096)
    except OSError:
        return 'Intel' in platform.processor()


class Linear(nn.Linear):
    """
    nn.Linear, with another way to multiply the few rows of a decoding step on a CPU.

    Such a product is over when the weight has been read, and PyTorch's reads it with little more than one core: on AMD
    always, on Intel from 3 rows on. As a batch of smaller products it is read with all of them.
    """

    def forward(self, x):
        rows = x.numel() // self.in_features
        by_itself = rows > 16 or (rows <= 2 and cpu_is_intel()) or x.device.type != 'cpu'
        if by_itself or torch.is_grad_enabled() or torch.is_autocast_enabled('cpu'):
            return super().forward(x)
        # a multiple of the threads, each with about 768 outputs: much larger pieces outgrow a core's cache
        pieces = torch.get_num_threads() * max(1, self.out_features // (768 * torch.get_num_threads()))
        shared = self.out_features // pieces * pieces
        weight = self.weight[:shared].view(pieces, -1, self.in_features)
        x_each = x.reshape(1, rows, self.in_features).expand(pieces, -1, -1)
        # both are the same (pieces, rows, outputs)
        y = torch.bmm(weight, x_each.mT).mT if rows == 1 or cpu_is_intel() else torch.bmm(x_each, weight.mT)
        # attention's kernels want each row in one piece
        y = y.transpose(0, 1).reshape(*x.shape[:-1], shared).contiguous()
        if shared < self.out_features:
            y = torch.cat((y, F.linear(x, self.weight[shared:])), dim=-1)
        return y if self.bias is None else y + self.bias


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension, whose bias can be left out together with all others."""

    def __init__(self, size, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


def rope_table(size, block_size, theta=10000.0):
    """Cosines and sines of RoPE's angles (arXiv:2104.09864, eq. 15): a float32 tensor (2, block_size, size/2)."""
    frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = torch.arange(block_size, dtype=torch.float64)[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin())).float()


def apply_rope(x, rope):
    """Turn each pair (x[2i], x[2i+1]) of x (..., T, size) by its position's angle; rope (2, T, size/2)."""
    cos, sin = rope.to(x.dtype) if x.dtype == torch.float64 else rope
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def causal_mask(T, S, device):
    """Which of S keys each of the last T positions may see: bool (T, S). The last query sees every key."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def attention_pattern(q, k, scale):
    """softmax(q k^T scale) over the keys a query may see: q (..., T, size), k (..., S, size) -> (..., T, S)."""
    visible = causal_mask(q.size(-2), k.size(-2), q.device)
    return ((q * scale) @ k.mT).masked_fill_(~visible, float('-inf')).softmax(dim=-1)


def dropout(x, p):
    """
    Each number of x is 0 with probability p, the others grow by 1/(1-p) (arXiv:1207.0580).

    As F.dropout, which on a CPU draws number after number on one core. Here 64 random bits serve four of them, so that
    p is taken to the nearest 1/65536.
    """
    if x.device.type != 'cpu' or torch.compiler.is_compiling():
        return F.dropout(x, p)
    dropped = min(round(p * 65536), 65535)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 32768
    return x * kept.to(x.dtype).mul_(65536 / (65536 - dropped))


class Dropout(nn.Dropout):
    """nn.Dropout by the function above."""

    def forward(self, x):
        return dropout(x, self.p) if self.training and self.p else x


class EagerAttention(torch.autograd.Function):
    """
    Causal attention of T positions over themselves that keeps its patterns, with the backward pass written out.

    For training on a CPU. PyTorch's fused kernel has no dropout there and falls back to a slow formula, and for short
    sequences it is a little slower than plain products. The price is memory for the patterns. They are made for
    QUERY_BLOCK queries at a time, without the keys that none of these may see.

    With P the pattern, D = P under dropout, O = D V the output, and g(.) a gradient of the loss: g(D) = g(O) V^T, and
    g(scores) = D g(D) - P (O . g(O)), element by element (arXiv:2205.14135, appendix B).
    """

    QUERY_BLOCK = 128

    @staticmethod
    def forward(ctx, q, k, v, scale, p_drop):
        """q, k (B, H, T, size), v (B, H, T, d), of one dtype; scale and p_drop numbers -> (B, H, T, d)."""
        B, H, T, _ = q.shape
        q, k, v = (t.reshape(B * H, T, t.size(-1)) for t in (q * scale, k, v))
        out = torch.empty(B, T, H, v.size(-1), dtype=v.dtype).transpose(1, 2)  # laid out as what follows reads it
        patterns = []
        with torch.autocast('cpu', enabled=False):
            for first in range(0, T, EagerAttention.QUERY_BLOCK):
                end = min(first + EagerAttention.QUERY_BLOCK, T)
                scores = torch.bmm(q[:, first:end], k[:, :end].mT)
                scores[..., first:] += torch.full_like(scores[0, :, first:], float('-inf')).triu_(1)
                pattern = scores.softmax(dim=-1)
                dropped = dropout(pattern, p_drop) if p_drop else pattern
                out[:, :, first:end] = torch.bmm(dropped, v[:, :end]).unflatten(0, (B, H))
                patterns += [pattern, dropped]
        ctx.scale, ctx.p_drop = scale, p_drop
        ctx.save_for_backward(q, k, v, out, *patterns)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, out, *patterns = ctx.saved_tensors
        B, H, T, _ = out.shape
        inner = (out * grad).sum(-1).view(B * H, T, 1) if ctx.p_drop else None  # O . g(O)
        grad = grad.reshape(B * H, T, grad.size(-1))
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for pattern, dropped in zip(patterns[::2], patterns[1::2], strict=True):
            end = pattern.size(2)
            rows, seen = slice(end - pattern.size(1), end), slice(end)
            grad_scores = torch.bmm(grad[:, rows], v[:, seen].mT)
            if ctx.p_drop:
                grad_scores.mul_(dropped).addcmul_(pattern, inner[:, rows], value=-1)
            else:
                grad_scores = torch._softmax_backward_data(grad_scores, pattern, -1, pattern.dtype)
            grad_q[:, rows] = torch.bmm(grad_scores, k[:, seen]).mul_(ctx.scale)
            grad_k[:, seen].baddbmm_(grad_scores.mT, q[:, rows])
            grad_v[:, seen].baddbmm_(dropped.mT, grad[:, rows])
        return *(t.unflatten(0, (B, H)) for t in (grad_q, grad_k, grad_v)), None, None


def attend(q, k, v, scale, p_drop=0.0, flash=True, causal=True, visible=None):
    """
    Attention of T queries over S keys: q (B, H, T, size), k and v (B, H, S, size) -> (B, H, T, size).

    causal: the queries are the last T of the S positions; else every query sees every key. visible: a bool tensor
    (T or 1, S) that says instead which keys a query sees.
    """
    T, S = q.size(-2), k.size(-2)
    if visible is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    square = causal and T == S
    trains_on_cpu = torch.is_grad_enabled() and q.device.type == 'cpu' and not torch.compiler.is_compiling()
    # without dropout only where patterns are small: there it is a little faster than the fused kernel
    if square and flash and trains_on_cpu and (p_drop or T <= EagerAttention.QUERY_BLOCK):
        return EagerAttention.apply(q, k, v, scale, p_drop)
    if causal and not flash:
        pattern = attention_pattern(q, k, scale)
        return (dropout(pattern, p_drop) if p_drop else pattern) @ v
    # SDPA's is_causal aligns the mask at the top left: right only where T equals S. A single query sees every key.
    mask = causal_mask(T, S, q.device) if causal and 1 < T < S else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p_drop, is_causal=square, scale=scale)


class LinearCrossEntropy(torch.autograd.Function):
    """
    The output head and the loss in one, a few rows at a time: the (N, V) logits, often the largest tensor of all, never
    exist. Their gradient is taken while they are at hand, so nothing is computed twice.

    `backward` runs once: it scales the weight's gradient, V x C numbers, where it lies.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):
        """x (N, C), weight (V, C), targets (N,; -1 is not scored) -> mean cross-entropy of the scored rows, float32."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        # enough rows for fast products, and logits of no more than 2^22 numbers where V is small
        rows = max(1024 if kind == 'cuda' else 512, 2**22 // weight.size(0))
        low_x, low_weight, scored = x.to(dtype), weight.to(dtype), targets != -1
        grad_x, grad_weight = torch.empty_like(low_x), torch.zeros_like(weight)
        total = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=x.device)
        with torch.autocast(kind, enabled=False):
            for first in range(0, x.size(0), rows):
                part = slice(first, first + rows)
                ids = targets[part].clamp(min=0)[:, None]
                log_p = (low_x[part] @ low_weight.T).to(total.dtype).log_softmax(dim=-1)
                total -= (log_p.gather(1, ids)[:, 0] * scored[part]).sum()
                # the gradient of a row's loss by its logits: p, less 1 at the target
                error = log_p.exp_().scatter_add_(1, ids, -torch.ones_like(ids, dtype=total.dtype))
                error = error.mul_(scored[part, None]).to(dtype)
                grad_x[part] = error @ low_weight
                if dtype == grad_weight.dtype:
                    grad_weight.addmm_(error.T, low_x[part])
                else:
                    grad_weight += error.T @ low_x[part]
        count = scored.sum()
        # divided by count only in `backward`: in float16 they would vanish
        ctx.save_for_backward(grad_x, grad_weight, count)
        ctx.x_dtype = x.dtype
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_x, grad_weight, count = ctx.saved_tensors
        grad = grad / count
        return grad_x.to(ctx.x_dtype) * grad, grad_weight.mul_(grad.to(grad_weight.dtype)), None


class Cache:
    """
    What attention keeps of the tokens it has seen: one preallocated tensor per layer and kind, time on dimension -2.

    `length` tokens are filled, of `max_tokens`. MHA keeps keys and values, MLA its latent.
    """

    def __init__(self, layers, max_tokens):
        self.layers = layers  # per layer a tuple of tensors (B, ..., max_tokens, size)
        self.max_tokens = max_tokens
        self.length = 0
        self.position = None  # inside a FixedStep: where its token stands, a tensor (1,) instead of `length`

    @property
    def batch_size(self):
        return self.layers[0][0].size(0)

    @property
    def nbytes(self):
        """Bytes of memory held, filled or not."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)

    @property
    def bytes_per_token(self):
        """Bytes held for one token of one sequence, over all layers."""
        return self.nbytes // (self.batch_size * self.max_tokens)

    def append(self, layer, *new):
        """Write `new` (each (B, ..., T, size)) behind what `layer` holds; returns views of all filled, new included."""
        if self.position is not None:
            return [t.index_copy_(-2, self.position, part) for t, part in zip(self.layers[layer], new, strict=True)]
        end = self.length + new[0].size(-2)
        if end > self.max_tokens:
            raise ValueError(f'{end} tokens do not fit into a cache made for max_tokens={self.max_tokens}')
        for tensor, part in zip(self.layers[layer], new, strict=True):
            tensor[..., self.length : end, :] = part
        return [tensor[..., :end, :] for tensor in self.layers[layer]]

    def visible(self):
        """Which keys a query may see: None (all that `append` returned), or in a FixedStep a mask (1, max_tokens)."""
        if self.position is None:
            return None
        return torch.arange(self.max_tokens, device=self.position.device)[None] <= self.position

    def repeat(self, times):
        """A cache in which every sequence stands `times` times, for several samples of one prompt."""
        copy = Cache(
            [tuple(t.repeat_interleave(times, dim=0) for t in layer) for layer in self.layers], self.max_tokens
        )
        copy.length = self.length
        return copy


class CausalSelfAttention(nn.Module):
    """Standard multi-head attention (arXiv:1706.03762, section 3.2.2), causal."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.n_head, self.n_embd, self.head_size = config.n_head, config.n_embd, config.head_size
        self.dropout, self.flash = config.dropout, config.flash
        self.scale = 1 / math.sqrt(self.head_size)
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # queries, keys, values in one product
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)

    @staticmethod
    def cache_shapes(config):
        """Per kind of tensor that is cached: its shape for one sequence, without the time dimension -2."""
        return ((config.n_head, config.head_size), (config.n_head, config.head_size))

    def qkv(self, x, rope=None):
        """Queries, keys and values, each (B, H, T, d), of the layer's normed input x (B, T, C)."""
        B, T, _ = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, self.head_size).permute(2, 0, 3, 1, 4)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        return q, k, v

    def forward(self, x, rope=None, cache=None):
        """x (B, T, C) -> (B, T, C). With a cache, x continues the sequence whose keys and values it holds."""
        q, k, v = self.qkv(x, rope)
        visible = None
        if cache is not None:
            (k, v), visible = cache.append(self.layer, k, v), cache.visible()
        y = attend(q, k, v, self.scale, self.dropout if self.training else 0.0, self.flash, visible=visible)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))

    def head_weights(self):
        """
        Per head, what it computes from the layer's normed input: W_Q, W_K, W_V (H, d, C) and W_O (H, C, d).

        W_QK of head h is W_Q[h]^T W_K[h], W_OV is W_O[h] W_V[h], both C x C (without positions).
        """
        w_q, w_k, w_v = self.c_attn.weight.view(3, self.n_head, self.head_size, self.n_embd)
        w_o = self.c_proj.weight.view(self.n_embd, self.n_head, self.head_size).transpose(0, 1)
        return w_q, w_k, w_v, w_o


class MLP(nn.Module):
    """Two linear layers, four times as wide between them, with a GELU."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate='tanh' if config.gelu == 'tanh' else 'none')
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """Attention, then MLP, each on the normed residual stream and added back to it."""

    def __init__(self, config, layer, attention):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = attention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, rope=None, cache=None):
        x = x + self.attn(self.ln_1(x), rope, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The whole model. A subclass names another `attention` class to change that alone."""

    attention = CausalSelfAttention

    def __init__(self, config, seed=1337):
        """seed: initial values are a function of it and each parameter's name, on every device and rank."""
        super().__init__()
        self.config = config
        head = Linear(config.n_embd, config.vocab_size, bias=False)
        parts = dict(wte=nn.Embedding.from_pretrained(head.weight, freeze=False))
        if config.pos == 'learned':
            parts['wpe'] = nn.Embedding(config.block_size, config.n_embd)
        parts['drop'] = Dropout(config.dropout)
        parts['h'] = nn.ModuleList(Block(config, layer, self.attention) for layer in range(config.n_layer))
        parts['ln_f'] = LayerNorm(config.n_embd, bias=config.bias)
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = head
        self.transformer.wte.weight = head.weight  # tied: arXiv:1608.05859
        table = rope_table(config.rope_size, config.block_size) if config.pos == 'rope' else None
        self.register_buffer('rope', table, persistent=False)
        self.recompute = False  # train.py sets it
        self.init_weights(seed)

    def init_std(self, name):
        """Standard deviation that the weight called `name` starts with (GPT-2 scales what writes to the residual)."""
        return 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith('c_proj.weight') else 0.02

    @torch.no_grad()
    def init_weights(self, seed):
        """Normal weights, each tensor from a generator of its own; biases 0 and norm gains 1."""
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                digest = hashlib.sha256(f'{seed}:{name}'.encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], 'little') >> 1)
                values = parameter if parameter.device.type == 'cpu' else torch.empty(parameter.shape)
                values.normal_(0.0, self.init_std(name), generator=generator)
                parameter.copy_(values)
            else:
                parameter.fill_(0.0 if name.endswith('bias') else 1.0)

    def get_num_params(self, non_embedding=True):
        """Number of parameters; by default without position embeddings. (Token embeddings are also the output head.)"""
        count = sum(p.numel() for p in self.parameters())
        if non_embedding and self.config.pos == 'learned':
            count -= self.transformer.wpe.weight.numel()
        return count

    def num_attention_params(self):
        """Parameters of all attention layers together: all that differs between this model and its sibling."""
        return sum(p.numel() for block in self.transformer.h for p in block.attn.parameters())

    def flops_per_token(self):
        """
        Floating-point operations for one token's forward and backward pass (arXiv:2204.02311, appendix B).

        6 per parameter that takes part in a matrix product, and 12 L C T for scores and weighted sums,
        counted for the full T x T square, as the customary MFU does.
        """
        matrices = sum(p.numel() for p in self.parameters() if p.dim() >= 2)
        if self.config.pos == 'learned':
            matrices -= self.transformer.wpe.weight.numel()
        return 6 * matrices + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops):
        """
        Model FLOPs utilization: the share of `peak_flops` (per second) that did the model's own arithmetic.

        fwdbwd_per_iter: sequences of block_size tokens in an iteration; dt: its seconds. None for an unknown peak.
        """
        if not peak_flops:
            return None
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak_flops

    def hidden(self, idx, cache=None):
        """The residual stream after the last norm, (B, T, C), of token ids idx (B, T)."""
        start, T = (cache.length if cache else 0), idx.size(1)
        if start + T > self.config.block_size:
            raise ValueError(
                f'{start + T} tokens do not fit: the model was made for block_size={self.config.block_size}'
            )
        positions = slice(start, start + T) if cache is None or cache.position is None else cache.position
        x = self.transformer.wte(idx)
        if self.config.pos == 'learned':
            x = x + self.transformer.wpe.weight[positions]
        rope = None if self.rope is None else self.rope[:, positions]
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            # recomputed: only the block's input is kept for the backward pass (arXiv:1604.06174)
            again = self.recompute and self.training
            x = checkpoint(block, x, rope, use_reentrant=False) if again else block(x, rope, cache)
        if cache is not None:
            cache.length += T
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None, cache=None, logits=True):
        """
        Token ids idx (B, T), int64 -> (logits, loss).

        With targets (B, T; -1 is not scored): logits (B, T, V) and the mean cross-entropy in nats per scored token.
        logits=False gives None for them, and computes the loss in far less memory.
        Without: logits (B, 1, V) of the last position alone, and None.
        With a cache (see `init_cache`), idx continues the sequences in it, and it grows by T.
        Raises ValueError where the tokens exceed block_size.
        """
        x = self.hidden(idx, cache)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        if not logits:
            return None, LinearCrossEntropy.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten())
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def window_losses(self, idx, targets):
        """Mean loss of each row, in nats per scored token: idx and targets (B, T; -1 is not scored) -> float32 (B,)."""
        losses = [
            F.cross_entropy(self.lm_head(x).float(), row, ignore_index=-1, reduction='sum')
            for x, row in zip(self.hidden(idx), targets, strict=True)  # row by row: all logits at once may not fit
        ]
        return torch.stack(losses) / (targets != -1).sum(1).clamp(min=1)

    def init_cache(self, batch_size, max_tokens=None, dtype=None):
        """An empty Cache for `batch_size` sequences of up to `max_tokens` (block_size at most, and by default)."""
        weight = self.lm_head.weight
        max_tokens = min(max_tokens or self.config.block_size, self.config.block_size)
        if dtype is None:
            device = weight.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        layers = [
            tuple(
                torch.zeros(batch_size, *shape[:-1], max_tokens, shape[-1], dtype=dtype, device=weight.device)
                for shape in self.attention.cache_shapes(self.config)
            )
            for _ in range(self.config.n_layer)
        ]
        return Cache(layers, max_tokens)

    def crop_block_size(self, block_size):
        """Shorten the model to `block_size` tokens: GPT-2's 1024 positions are more than a small run needs."""
        if block_size > self.config.block_size:
            raise ValueError(
                f'block_size={block_size} is more than the {self.config.block_size} this model was made for'
            )
        self.config.block_size = block_size
        if self.config.pos == 'learned':
            self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size])
            self.transformer.wpe.num_embeddings = block_size
        else:
            self.rope = self.rope[:, :block_size]

    @classmethod
    def from_pretrained(cls, model_type, override_args=None):
        """
        GPT-2's weights by name ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl') or from a local Hugging Face folder.

        override_args: {'dropout': p} alone. Raises ValueError for an unknown name, or for a checkpoint whose tensors
        are not GPT-2's, naming them.
        """
        override_args = override_args or {}
        if set(override_args) - {'dropout'}:
            raise ValueError(f'only dropout can be overridden in a pretrained model, not {sorted(override_args)}')
        if model_type not in GPT2_SIZES and not os.path.isdir(model_type):
            raise ValueError(
                f"'{model_type}' is neither one of {', '.join(GPT2_SIZES)} nor a folder with a GPT-2 model"
            )
        from safetensors import SafetensorError
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            hf_config = AutoConfig.from_pretrained(model_type)
            if hf_config.model_type != 'gpt2':
                raise ValueError(
                    f"'{model_type}' holds a {hf_config.model_type} model; only GPT-2 models can be loaded"
                )
            # transformers keeps the dtype on disk unless told otherwise, and makes up what the disk does not hold
            hf_model, report = AutoModelForCausalLM.from_pretrained(
                model_type, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"'{model_type}' can't be loaded ({str(error).splitlines()[0]}); check the name, the folder "
                'and the network'
            ) from error
        wrong = sorted(set(report['missing_keys']) | set(report['unexpected_keys']))
        if wrong:
            raise ValueError(
                f"the tensors in '{model_type}' are not GPT-2's; missing or unknown: {', '.join(wrong[:6])}"
            )
        model = cls(gpt2_config(hf_config, override_args.get('dropout', 0.0)))
        model.load_gpt2_state(hf_model.state_dict())
        return model

    @torch.no_grad()
    def load_gpt2_state(self, state):
        """Copy GPT-2's tensors, in Hugging Face's layout, into this model. Raises ValueError naming what differs."""
        # buffers of the causal mask, kept by old files
        state = {k: v for k, v in state.items() if not k.endswith(('.attn.bias', '.attn.masked_bias'))}
        own = self.state_dict()
        wrong = sorted(set(own) ^ set(state))
        for name in set(own) & set(state):
            # OpenAI's code stores a linear layer's weight as (in, out)
            transposed = name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))
            value = state[name].t() if transposed else state[name]
            if value.shape != own[name].shape:
                wrong.append(f'{name} {tuple(value.shape)} instead of {tuple(own[name].shape)}')
            else:
                own[name].copy_(value)
        if wrong:
            shown = ', '.join(wrong[:6]) + (f' and {len(wrong) - 6} more' if len(wrong) > 6 else '')
            raise ValueError(f'these tensors are not as GPT-2 has them: {shown}')

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW in two groups: matrices and embeddings decay, biases and norm gains do not. Fused where it exists."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {'params': [p for p in parameters if p.dim() >= 2], 'weight_decay': weight_decay},
            {'params': [p for p in parameters if p.dim() < 2], 'weight_decay': 0.0},
        ]
        fused = device_type in ('cuda', 'cpu')
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, use_cache=True, num_samples=1,
                 stop_token=None, on_token=None, valid_ids=None, generator=None, fixed=None):  # fmt: skip
        """
        Continue idx (B, t) by max_new_tokens drawn tokens; returns (B * num_samples, t + new), prompt included.

        temperature: 0 takes the likeliest token. top_k: draw from the k likeliest. top_p: draw from the smallest set
        whose probability reaches p. use_cache=False recomputes everything for each token, with a window that slides
        over the last block_size tokens; with the cache, learned positions can't slide, so that when it is full the
        most recent half is read anew. num_samples: samples per prompt, which share its prefill. stop_token: end when
        every sample has drawn it (a sample that has goes on repeating it). on_token: called with each new column
        (B * num_samples,). valid_ids: ids at or above are never drawn (padded vocabularies). generator: a
        torch.Generator on the model's device, for draws of your own. fixed: decode by a FixedStep (None: on CUDA).
        """
        config, cache, step = self.config, None, None
        fixed = idx.is_cuda if fixed is None else fixed
        prompt = idx[:, -config.block_size :]
        if use_cache:
            cache = self.init_cache(idx.size(0), prompt.size(1) + max_new_tokens)
        logits, _ = self(prompt, cache=cache)
        if num_samples > 1:
            idx, logits = idx.repeat_interleave(num_samples, dim=0), logits.repeat_interleave(num_samples, dim=0)
            cache = cache.repeat(num_samples) if use_cache else None
        out = torch.empty(idx.size(0), idx.size(1) + max_new_tokens, dtype=idx.dtype, device=idx.device)
        out[:, : idx.size(1)] = idx
        stopped = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
        for end in range(idx.size(1), out.size(1)):
            token = draw(logits[:, -1], temperature, top_k, top_p, valid_ids, generator)
            if stop_token is not None:
                token = torch.where(stopped, stop_token, token)
                stopped |= token == stop_token
            out[:, end] = token
            if on_token is not None:
                on_token(token)
            # asking the device whether all have stopped waits for it, so it is asked only where there is a stop token
            if end + 1 == out.size(1) or (stop_token is not None and bool(stopped.all())):
                return out[:, : end + 1]
            if not use_cache:
                logits, _ = self(out[:, max(0, end + 1 - config.block_size) : end + 1])
            elif cache.length < cache.max_tokens and fixed:
                step = step or FixedStep(self, cache)
                logits = step(token[:, None])
            elif cache.length < cache.max_tokens:
                logits, _ = self(token[:, None], cache=cache)
            else:
                cache.length = 0
                logits, _ = self(out[:, end + 1 - max(1, cache.max_tokens // 2) : end + 1], cache=cache)
        return out


class FixedStep:
    """
    A decode step whose shapes never change: the position is a tensor, attention sees the whole buffer through a mask.

    On a GPU it is captured as a CUDA graph and then replayed: one launch in place of hundreds. Elsewhere it runs as it
    is written, which is slower than the ordinary step, since all of `max_tokens` is read; the numbers are the same.
    """

    def __init__(self, model, cache):
        """cache: a Cache that is not full yet."""
        self.model, self.cache, self.graph = model, cache, None
        device = cache.layers[0][0].device
        self.token = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=device)
        self.position = torch.full((1,), cache.length, device=device)  # what trial runs write, the next step overwrites
        if device.type == 'cuda':
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # libraries set themselves up on first use, which can't be captured
                    self.run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.logits = self.run()
            self.graph = graph

    def run(self):
        """The logits (B, 1, V) for `token` at `position`; leaves the cache's length as it was."""
        cache, length = self.cache, self.cache.length
        cache.position = self.position
        logits, _ = self.model(self.token, cache=cache)
        cache.position, cache.length = None, length
        return logits

    def __call__(self, token):
        """The logits (B, 1, V) that `model(token, cache=cache)` gives for token (B, 1); valid until the next call."""
        self.token.copy_(token)
        self.position.fill_(self.cache.length)
        if self.graph is None:
            self.logits = self.run()
        else:
            self.graph.replay()
        self.cache.length += 1
        return self.logits


def draw(logits, temperature=1.0, top_k=None, top_p=None, valid_ids=None, generator=None):
    """One token id per row of logits (B, V), by the rules of `GPT.generate`. No wait for the device: (B,) int64."""
    if valid_ids is not None:
        logits = logits[:, :valid_ids]
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits, ids = logits.float() / temperature, None
    if top_k is not None and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)
    if top_p is not None and top_p < 1:
        ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= top_p  # what lies before a token already reaches p
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), float('-inf'))
    # the noise lies row by row, however the logits lie: the same seed, the same text
    # the exponential race: argmax of p_i / e_i draws i with probability p_i, and unlike multinomial never waits
    noise = torch.empty(logits.shape, device=logits.device).exponential_(generator=generator)
    winner = (logits.softmax(dim=-1) / noise).argmax(dim=-1, keepdim=True)
    return (winner if ids is None else ids.gather(-1, winner)).squeeze(-1)


def gpt2_config(hf_config, dropout=0.0):
    """The GPTConfig of a transformers GPT2Config. GPT-2 was trained with the tanh form of GELU, not the exact one."""
    gelus = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'exact'}
    if hf_config.activation_function not in gelus:
        raise ValueError(f"this GPT-2 uses '{hf_config.activation_function}'; only GELU is known here")
    expected = dict(
        n_inner=(None, 4 * hf_config.n_embd),
        layer_norm_epsilon=(1e-5,),
        scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,),
        tie_word_embeddings=(True,),
    )
    for name, values in expected.items():
        if getattr(hf_config, name) not in values:
            raise ValueError(f'this GPT-2 has {name}={getattr(hf_config, name)}; only {values[-1]} is known here')
    return GPTConfig(
        block_size=hf_config.n_positions,
        vocab_size=hf_config.vocab_size,
        n_layer=hf_config.n_layer,
        n_head=hf_config.n_head,
        n_embd=hf_config.n_embd,
        dropout=dropout,
        bias=True,
        gelu=gelus[hf_config.activation_function],
    )
