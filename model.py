"""
GPT-2 in one file: a decoder-only transformer with standard multi-head attention (MHA).

Grouped-query and multi-query attention (GQA, MQA) are the same with fewer key/value heads: `n_kv_head`.

Read this first, then model_mla.py: it replaces the attention and nothing else.

Notable features:
- pre-norm blocks, learned positions, GELU, output head tied to the token embedding; or RoPE, RMSNorm, SwiGLU, untied
- a preallocated key/value cache: `cache = model.init_cache(B, max_tokens)`, then `model(idx, cache=cache)`
- initial values are a function of seed and name: tensors of the same name and shape start equal in all models

Shapes: B batch, T query length, S key length, L layers, H heads, K key/value heads (K = H in MHA), C = n_embd, d = C/H
head size, V vocabulary.

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2); Vaswani et al. 2017,
arXiv:1706.03762 (attention); Shazeer 2019, arXiv:1911.02150 (MQA); Ainslie et al. 2023, arXiv:2305.13245 (GQA); Su et
al. 2021, arXiv:2104.09864 (RoPE); Zhang and Sennrich 2019, arXiv:1910.07467 (RMSNorm); Shazeer 2020, arXiv:2002.05202
(SwiGLU); Chowdhery et al. 2022, arXiv:2204.02311 (MFU).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ops import kernels
from ops.cache import Cache
from ops.decoding import Decoder
from ops.kernels import Dropout, Linear, RMSNorm  # PyTorch's, faster


class CausalSelfAttention(nn.Module):
    """Causal multi-head attention (arXiv:1706.03762, section 3.2.2); H/K neighboring heads share keys and values."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head, self.kv_heads, self.head_size = config.n_head, config.kv_heads, config.head_size
        self.dropout, self.flash = config.dropout, config.flash
        self.scale = 1 / math.sqrt(self.head_size)
        self.heads = (self.n_head, self.kv_heads, self.kv_heads)  # of queries, keys and values
        self.c_attn = Linear(config.n_embd, sum(self.heads) * self.head_size, bias=config.bias)  # all three together
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)

    def qkv(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, d), keys and values (B, K, T, d), from the layer's normed input x (B, T, C)."""
        q, k, v = self.c_attn(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2).split(self.heads, dim=1)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        return q, k, v

    def forward(self, x: Tensor, rope: Tensor | None = None, cache: Any = None) -> Tensor:
        """x (B, T, C) -> (B, T, C). With a cache, x continues the sequence whose keys and values it holds."""
        q, k, v = self.qkv(x, rope)
        mask = None  # causal; a cache knows which of its keys each query sees
        if cache is not None:
            # (B, K, S, d) of the sequence so far, and what each query sees of it; whole: as ordinary tensors
            k, v, mask = cache.append(self.layer, k, v, whole=not self.flash)
        p_drop = self.dropout if self.training else 0.0
        if self.flash:
            y = kernels.fast_attention(q, k, v, self.scale, p_drop, mask)  # the default: the lines below, faster
        else:
            k, v = kernels.repeat_heads(k, self.n_head), kernels.repeat_heads(v, self.n_head)
            mask = kernels.causal_mask(q.size(2), k.size(2), q.device) if mask is None else mask
            scores = (q * self.scale) @ k.mT  # (B, H, T, S)
            pattern = scores.masked_fill(~mask, float('-inf')).softmax(dim=-1)
            y = kernels.dropout(pattern, p_drop) @ v  # softmax(q k^T / sqrt(d)) v
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))

    @staticmethod
    def cache_shapes(config: GPTConfig) -> tuple[tuple[int, ...], ...]:
        """Shapes of the cached tensors, here keys and values, for one sequence and without the time dimension -2."""
        return ((config.kv_heads, config.head_size), (config.kv_heads, config.head_size))

    @staticmethod
    def parts(config: GPTConfig) -> dict[str, dict[str, int]]:
        """The parts of fused matrices, in order, and how many rows each has."""
        size = config.kv_heads * config.head_size
        return {'c_attn': {'q': config.n_embd, 'k': size, 'v': size}}


@dataclass
class GPTConfig:
    """The sizes of a GPT. Raises ValueError when they don't fit together."""

    block_size: int = 1024  # longest sequence, in tokens
    vocab_size: int = 50304  # GPT-2's 50257 ids, padded to a multiple of 64 for faster matrix multiplications
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # biases in Linear and LayerNorm, as in GPT-2; without them: slightly faster
    gelu: str = 'exact'  # 'exact' as in nanoGPT, 'tanh' as in OpenAI's GPT-2
    norm: str = 'layer'  # 'layer' (LayerNorm) or 'rms' (RMSNorm)
    mlp: str = 'gelu'  # 'gelu' or 'swiglu'
    n_hidden: int = 0  # width of the MLP; 0: 4 n_embd, of SwiGLU 8/3 n_embd, rounded up to a multiple of 8
    tied: bool = True  # the output head is the token embedding
    pos: str = 'learned'  # 'learned' position embeddings, 'rope' on queries and keys, or 'none'
    n_rope: int = 0  # dimensions of each query and key that RoPE rotates, its last ones; 0: all of them
    rope_theta: float = 10000.0  # RoPE's longest wave length is about 2 pi times as many tokens
    n_kv_head: int = 0  # heads of keys and values; 0: n_head (MHA), 1: MQA, between: GQA
    init_std: float = 0.02  # of initial weights; GPT-2's for any width, 1/sqrt(n_embd) is customary too
    kv_rms: float = 0.0  # root mean square of keys and values at the start; 0: what init_std gives
    flash: bool = True  # the fastest attention; False: the plain formula (same results, other dropout masks)
    recompute: bool = False  # keep only each block's input for the backward pass: less memory, slower

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f'{name} is {getattr(self, name)}; it must be at least {least}')
        for name, (*others, last) in CHOICES.items():
            if getattr(self, name) not in (*others, last):
                raise ValueError(f"{name} is '{getattr(self, name)}'; it must be {', '.join(others)} or {last}")
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} must be a multiple of n_head={self.n_head}: heads have equal size')
        self.n_kv_head = 0 if self.n_kv_head == self.n_head else self.n_kv_head
        if self.n_kv_head < 0 or self.n_head % self.kv_heads:
            raise ValueError(f'n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}: equal groups')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout is {self.dropout}; it must be at least 0 and below 1')
        if self.n_rope and self.pos != 'rope':
            raise ValueError(f"n_rope={self.n_rope} needs pos='rope'")
        size, most = self.rope_size, self.widths[0]
        if self.pos == 'rope' and (size % 2 or not 0 < size <= most):
            raise ValueError(f'RoPE rotates pairs of dimensions, {most} at most: {size} must be even and no more')

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def rope_size(self) -> int:
        """Dimensions of each query and key that RoPE rotates."""
        return self.n_rope or self.head_size

    @property
    def widths(self) -> tuple[int, int]:
        """Dimensions of a head's queries and keys, and of its values."""
        return self.head_size, self.head_size

    @property
    def hidden_size(self) -> int:
        """Width of the MLP's hidden layer."""
        return self.n_hidden or (4 * self.n_embd if self.mlp == 'gelu' else -(-self.n_embd // 3) * 8)


LEAST = dict(block_size=1, vocab_size=1, n_layer=1, n_head=1, n_embd=1, n_hidden=0, rope_theta=1, kv_rms=0)
CHOICES = {
    'gelu': ('exact', 'tanh'),
    'norm': ('layer', 'rms'),
    'mlp': ('gelu', 'swiglu'),
    'pos': ('learned', 'rope', 'none'),
}


def rope_table(size: int, block_size: int, theta: float = 10000.0) -> Tensor:
    """Cosines and sines of RoPE's angles (arXiv:2104.09864, eq. 15): a float32 tensor (2, block_size, size/2)."""
    frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = torch.arange(block_size, dtype=torch.float64)[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin())).float()


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate pairs (x[2i], x[2i+1]) of the last n dimensions of x (..., T, size) by the angles of rope (2, T, n/2)."""
    size = 2 * rope.size(-1)
    if size < x.size(-1):
        still, turned = x.split((x.size(-1) - size, size), dim=-1)
        return torch.cat((still, apply_rope(turned, rope)), dim=-1)
    cos, sin = rope.to(x.dtype) if x.dtype == torch.float64 else rope
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


class MLP(nn.Module):
    """Linear to a wider hidden layer, GELU (or SiLU and a gate), linear back to C."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gated = config.mlp == 'swiglu'
        self.c_fc = Linear(config.n_embd, config.hidden_size * (1 + self.gated), bias=config.bias)
        self.gelu = nn.GELU(approximate='tanh' if config.gelu == 'tanh' else 'none')
        self.c_proj = Linear(config.hidden_size, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            gate, up = self.c_fc(x).chunk(2, dim=-1)
            return self.dropout(self.c_proj(F.silu(gate) * up))
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


def make_norm(config: GPTConfig) -> nn.Module:
    """LayerNorm or RMSNorm over C."""
    return RMSNorm(config.n_embd, eps=1e-5) if config.norm == 'rms' else nn.LayerNorm(config.n_embd, bias=config.bias)


class Block(nn.Module):
    """Attention, then MLP; each reads the normed residual stream and adds to it."""

    def __init__(self, config: GPTConfig, layer: int, attention: Any):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = attention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: Tensor | None = None, cache: Any = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), rope, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The whole model. A subclass that names another `attention` class changes that and its initial values."""

    attention: Any = CausalSelfAttention

    def __init__(self, config: GPTConfig, seed: int = 1337):
        """seed: initial values are a function of it and each parameter's name, on every device and rank."""
        super().__init__()
        self.config: Any = config
        modules: dict[str, nn.Module] = dict(wte=nn.Embedding(config.vocab_size, config.n_embd))
        if config.pos == 'learned':
            modules['wpe'] = nn.Embedding(config.block_size, config.n_embd)
        modules['h'] = nn.ModuleList(Block(config, layer, self.attention) for layer in range(config.n_layer))
        modules['drop'], modules['ln_f'] = Dropout(config.dropout), make_norm(config)
        self.transformer: Any = nn.ModuleDict(modules)
        self.lm_head: Any = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.transformer['wte'].weight = self.lm_head.weight  # arXiv:1608.05859
        self.register_buffer('rope', None, persistent=False)
        self.set_context(config.block_size)
        self.init_weights(seed)

    def parts(self, name: str) -> dict[str, slice]:
        """The parts of the rows of a fused matrix, by the parameter's name: {'q': slice(0, C), ...}; {} for others."""
        sizes, found, end = self.attention.parts(self.config), {}, 0
        if self.config.mlp == 'swiglu':
            sizes['c_fc'] = {'gate': self.config.hidden_size, 'up': self.config.hidden_size}
        for part, size in sizes.get(name.removesuffix('.weight').split('.')[-1], {}).items():
            found[part] = slice(end, end + size)
            end += size
        return found

    def init_std(self, name: str, part: str = '') -> float:
        """Standard deviation of weight `name`, or a part of it, at the start; what writes to the stream is smaller."""
        if self.config.kv_rms and part in ('k', 'v'):
            return self.config.kv_rms / math.sqrt(self.config.n_embd)
        std = self.config.init_std
        return std / math.sqrt(2 * self.config.n_layer) if name.endswith('c_proj.weight') else std

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal weights, each tensor from a generator of its own; biases 0 and norm gains 1."""
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                digest = hashlib.sha256(f'{seed}:{name}'.encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], 'little') >> 1)
                values = parameter if parameter.device.type == 'cpu' else torch.empty(parameter.shape)
                std = self.init_std(name)
                values.normal_(0.0, std, generator=generator)
                for part, rows in self.parts(name).items():
                    if self.init_std(name, part) != std:
                        values[rows] *= self.init_std(name, part) / std
                parameter.copy_(values)
            else:
                parameter.fill_(0.0 if name.endswith('bias') else 1.0)

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters, by default without those of `embedding_params`."""
        return sum(p.numel() for p in self.parameters()) - non_embedding * self.embedding_params()

    def embedding_params(self) -> int:
        """Parameters of tables that are looked up and take part in no matrix multiplication."""
        tables = ['wpe'] * (self.config.pos == 'learned') + ['wte'] * (not self.config.tied)
        return sum(self.transformer[table].weight.numel() for table in tables)

    def flops_per_token(self) -> int:
        """
        Floating-point operations of one token's forward and backward pass (arXiv:2204.02311, appendix B).

        6 per parameter of a matrix multiplication, plus 12 L C T for attention scores and weighted sums, counted over
        the full T x T square as is customary.
        """
        config = self.config
        matrices = sum(p.numel() for p in self.parameters() if p.dim() >= 2) - self.embedding_params()
        return 6 * matrices + 6 * config.n_layer * config.n_head * sum(config.widths) * config.block_size

    def hidden(self, idx: Tensor, cache: Any = None) -> Tensor:
        """The residual stream after the last norm (B, T, C), for token ids idx (B, T)."""
        T, config = idx.size(1), self.config
        if T > config.block_size:
            raise ValueError(f'{T} tokens do not fit: the model was made for block_size={config.block_size}')
        positions = cache.positions(T) if cache is not None else slice(0, T)
        x = self.transformer.wte(idx)
        if config.pos == 'learned':
            x = x + self.transformer.wpe.weight[positions]
        rope = None if self.rope is None else self.rope[:, positions]
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            if config.recompute and self.training and cache is None:  # only the block's input is kept: arXiv:1604.06174
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope, cache)
        if cache is not None:
            cache.advance(T)
        return self.transformer.ln_f(x)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: Any = None, logits: bool = True
    ) -> tuple[Any, Any]:
        """
        Token ids idx (B, T), int64 -> (logits, loss).

        With targets (B, T; -1 isn't scored): logits (B, T, V) and the mean cross-entropy in nats per scored token.
        logits=False returns None for them, and computes the loss in far less memory.
        Without targets: logits (B, 1, V) of the last position only, and None.
        With a cache (see `init_cache`), idx continues the sequences in it. ValueError where the tokens don't fit.
        """
        x = self.hidden(idx, cache)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        if not logits:  # the same loss as below, without the logits in memory
            return None, kernels.linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten())
        scores = self.lm_head(x)
        return scores, F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def window_losses(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of each row in nats per scored token, float32 (B,); idx and targets (B, T), -1 isn't scored."""
        losses = [
            F.cross_entropy(self.lm_head(x).float(), row, ignore_index=-1, reduction='sum')
            for x, row in zip(self.hidden(idx), targets, strict=True)  # row by row: all logits at once may not fit
        ]
        return torch.stack(losses) / (targets != -1).sum(1).clamp(min=1)

    def init_cache(
        self, batch_size: int, max_tokens: int | None = None, dtype: torch.dtype | None = None, kind: str = 'float'
    ) -> Cache:
        """An empty Cache, of a kind in ops/cache.py, for sequences of up to `max_tokens` (by default block_size)."""
        weight = self.transformer.wte.weight
        max_tokens = min(max_tokens or self.config.block_size, self.config.block_size)
        if dtype is None:
            device = weight.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        shapes = self.attention.cache_shapes(self.config)
        wide = getattr(self.transformer.h[0].attn, 'n_rope', 0)  # MLA's rotated key is kept apart
        return Cache.allocate(self.config.n_layer, shapes, batch_size, max_tokens, dtype, weight.device, kind, wide)

    def set_context(self, block_size: int) -> None:
        """Let the model read up to `block_size` tokens: fewer, or, without learned positions, more than in training."""
        if self.config.pos == 'learned':
            wpe = self.transformer.wpe
            if block_size > wpe.num_embeddings:
                raise ValueError(f'block_size={block_size} is more than the {wpe.num_embeddings} learned positions')
            if block_size < wpe.num_embeddings:
                wpe.weight, wpe.num_embeddings = nn.Parameter(wpe.weight[:block_size]), block_size
        self.config.block_size = block_size
        if self.config.pos == 'rope':
            table = rope_table(self.config.rope_size, block_size, self.config.rope_theta)
            self.rope = table.to(self.transformer.wte.weight.device)

    @classmethod
    def from_pretrained(cls, model_type: str, override_args: dict | None = None) -> GPT:
        """GPT-2 by name, 'gpt2' to 'gpt2-xl', or from a Hugging Face folder; ValueError where that holds none."""
        from core.convert import gpt2

        settings, state = gpt2.read(model_type, override_args or {})
        model = cls(GPTConfig(**settings))
        model.load_state_dict(state)
        return model

    @torch.no_grad()
    def generate(
        self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None, **options: Any
    ) -> Tensor:
        """
        Continue idx (B, t) by max_new_tokens drawn tokens; returns (B * num_samples, t + new), prompt included.

        temperature 0 takes the most likely id; top_k: draw from the k most likely. options: those of ops/decoding.py's
        `Decoder`, such as use_cache, num_samples, top_p and stop_token.
        """
        decoder = Decoder(self, idx, max_new_tokens, **options)
        for _ in range(max_new_tokens):
            token = decoder.draw(temperature, top_k)
            if not decoder.append(token):
                break
        return decoder.tokens[:, : decoder.length]
