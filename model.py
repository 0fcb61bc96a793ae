"""
GPT-2 in one file: a decoder-only transformer with standard multi-head attention (MHA).

Grouped-query and multi-query attention (GQA, MQA) are the same with fewer key/value heads: `n_kv_head`.

Read this first, then model_mla.py: it replaces the attention and nothing else.

Notable features:
- pre-norm blocks, learned positions (or RoPE), GELU, output head tied to the token embedding, optional biases
- a preallocated key/value cache: `cache = model.init_cache(B, max_tokens)`, then `model(idx, cache=cache)`
- initial values are a function of seed and name: tensors of the same name and shape start equal in all models
- GPT-2's published weights load through `GPT.from_pretrained`

Shapes: B batch, T query length, S key length, L layers, H heads, K key/value heads (K = H in MHA), C = n_embd, d = C/H
head size, V vocabulary.
How an operation is made fast is in ops/kernels.py: Linear, dropout, attend and the loss come from there.

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2); Vaswani et al. 2017,
arXiv:1706.03762 (attention); Shazeer 2019, arXiv:1911.02150 (MQA); Ainslie et al. 2023, arXiv:2305.13245 (GQA); Su et
al. 2021, arXiv:2104.09864 (RoPE); Chowdhery et al. 2022, arXiv:2204.02311 (MFU).
"""

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from core.convert import gpt2
from ops.decoding import FixedStep, draw
from ops.kernels import Dropout, Linear, attend, linear_cross_entropy, repeat_heads
from ops.optimizers import OPTIMIZERS, slow_down


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
    pos: str = 'learned'  # 'learned' position embeddings, or 'rope' on queries and keys
    n_kv_head: int = 0  # heads of keys and values; 0: n_head (MHA), 1: MQA, between: GQA
    init_std: float = (
        0.02  # standard deviation of initial weights; GPT-2's for any width, 1/sqrt(n_embd) is customary too
    )
    flash: bool = True  # the fastest attention; False: the plain formula (same results, other dropout masks)
    recompute: bool = False  # keep only each block's input for the backward pass: less memory, slower

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}; it must be at least 1')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} must be a multiple of n_head={self.n_head}: heads have equal size')
        self.n_kv_head = 0 if self.n_kv_head == self.n_head else self.n_kv_head
        if self.n_kv_head < 0 or self.n_head % self.kv_heads:
            raise ValueError(f'n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}: equal groups')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout is {self.dropout}; it must be at least 0 and below 1')
        for name, choices in (('gelu', ('exact', 'tanh')), ('pos', ('learned', 'rope'))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is '{getattr(self, name)}'; it must be '{choices[0]}' or '{choices[1]}'")
        if self.pos == 'rope' and self.rope_size % 2:
            raise ValueError(f'RoPE rotates pairs of dimensions, but was given {self.rope_size}; make that even')

    @property
    def head_size(self):
        return self.n_embd // self.n_head

    @property
    def kv_heads(self):
        """K, the number of key/value heads."""
        return self.n_kv_head or self.n_head

    @property
    def rope_size(self):
        """Dimensions of each query and key that RoPE rotates."""
        return self.head_size


class CausalSelfAttention(nn.Module):
    """Causal multi-head attention (arXiv:1706.03762, section 3.2.2); H/K neighbouring heads share keys and values."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.n_head, self.kv_heads, self.head_size = config.n_head, config.kv_heads, config.head_size
        self.heads = (self.n_head, self.kv_heads, self.kv_heads)  # of queries, keys and values
        self.dropout, self.flash = config.dropout, config.flash
        self.scale = 1 / math.sqrt(self.head_size)
        self.c_attn = Linear(config.n_embd, sum(self.heads) * self.head_size, bias=config.bias)  # all three together
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)

    @staticmethod
    def cache_shapes(config):
        """Shapes of the cached tensors, here keys and values, for one sequence and without the time dimension -2."""
        return ((config.kv_heads, config.head_size), (config.kv_heads, config.head_size))

    def qkv(self, x, rope=None):
        """Queries (B, H, T, d), keys and values (B, K, T, d), from the layer's normed input x (B, T, C)."""
        q, k, v = self.c_attn(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2).split(self.heads, dim=1)
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
        Each head's weights on the layer's normed input: W_Q, W_K, W_V (H, d, C) and W_O (H, C, d).

        The QK circuit of head h is W_Q[h]^T W_K[h], its OV circuit W_O[h] W_V[h], both C x C (positions left out).
        """
        w_q, w_k, w_v = self.c_attn.weight.unflatten(0, (-1, self.head_size)).split(self.heads)
        w_o = self.c_proj.weight.unflatten(1, (self.n_head, self.head_size)).transpose(0, 1)
        return w_q, repeat_heads(w_k, self.n_head, dim=0), repeat_heads(w_v, self.n_head, dim=0), w_o


def rope_table(size, block_size, theta=10000.0):
    """Cosines and sines of RoPE's angles (arXiv:2104.09864, eq. 15): a float32 tensor (2, block_size, size/2)."""
    frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = torch.arange(block_size, dtype=torch.float64)[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin())).float()


def apply_rope(x, rope):
    """Rotate each pair (x[2i], x[2i+1]) of x (..., T, size) by its position's angle; rope (2, T, size/2)."""
    cos, sin = rope.to(x.dtype) if x.dtype == torch.float64 else rope
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


class MLP(nn.Module):
    """Linear to 4C, GELU, linear back to C."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate='tanh' if config.gelu == 'tanh' else 'none')
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """Attention, then MLP; each reads the normed residual stream and adds to it."""

    def __init__(self, config, layer, attention):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, rope=None, cache=None):
        x = x + self.attn(self.ln_1(x), rope, cache)
        return x + self.mlp(self.ln_2(x))


class Cache:
    """
    What attention remembers of the tokens so far: preallocated tensors per layer, time on dimension -2.

    MHA caches keys and values, MLA its latent. `length` of `max_tokens` tokens are filled. GPT.init_cache makes one.
    """

    def __init__(self, layers, max_tokens):
        self.layers = layers  # per layer a tuple of tensors (B, ..., max_tokens, size)
        self.max_tokens = max_tokens
        self.length = 0
        self.copies = {}  # of weights, in the dtype in which a step multiplies them: see kernels.cast_once

    @property
    def batch_size(self):
        return self.layers[0][0].size(0)

    @property
    def nbytes(self):
        """Bytes allocated, filled or not."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)

    @property
    def bytes_per_token(self):
        """Bytes for one token of one sequence, over all layers."""
        return self.nbytes // (self.batch_size * self.max_tokens)

    def positions(self, T):
        """The positions of the next T tokens, a slice. ValueError where they don't fit."""
        if self.length + T > self.max_tokens:
            raise ValueError(f'{self.length + T} tokens do not fit into a cache of max_tokens={self.max_tokens}')
        return slice(self.length, self.length + T)

    def append(self, layer, *new):
        """Write `new` (each (B, ..., T, size)) after what `layer` holds; returns views of all that is filled now."""
        place = self.positions(new[0].size(-2))
        for tensor, part in zip(self.layers[layer], new, strict=True):
            tensor[..., place, :] = part
        return [tensor[..., : place.stop, :] for tensor in self.layers[layer]]

    def visible(self):
        """A mask of the keys that a query may see, beyond causality: None, since `append` returned filled ones only."""
        return None

    def advance(self, T):
        """Count T tokens as filled, once every layer has appended them."""
        self.length += T

    def repeat(self, times):
        """A cache with each sequence repeated `times` times, for several samples of one prompt."""
        layers = [tuple(tensor.repeat_interleave(times, dim=0) for tensor in layer) for layer in self.layers]
        copy = Cache(layers, self.max_tokens)
        copy.length, copy.copies = self.length, self.copies
        return copy


class GPT(nn.Module):
    """The whole model. A subclass that names another `attention` class changes nothing else."""

    attention = CausalSelfAttention
    kv_lr = 1.0  # share of the learning rate for what `slow_rows` names

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
        parts['ln_f'] = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = head
        self.transformer.wte.weight = head.weight  # tied: arXiv:1608.05859
        table = rope_table(config.rope_size, config.block_size) if config.pos == 'rope' else None
        self.register_buffer('rope', table, persistent=False)
        self.init_weights(seed)

    def init_std(self, name):
        """Standard deviation of weight `name` at the start; GPT-2 shrinks what writes to the residual stream."""
        std = self.config.init_std
        return std / math.sqrt(2 * self.config.n_layer) if name.endswith('c_proj.weight') else std

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
        """Number of parameters, by default without position embeddings (the token embedding is the output head too)."""
        count = sum(p.numel() for p in self.parameters())
        if non_embedding and self.config.pos == 'learned':
            count -= self.transformer.wpe.weight.numel()
        return count

    def num_attention_params(self):
        """Parameters of all attention layers: what differs between MHA and MLA."""
        return sum(p.numel() for block in self.transformer.h for p in block.attn.parameters())

    def flops_per_token(self):
        """
        Floating-point operations of one token's forward and backward pass (arXiv:2204.02311, appendix B).

        6 per parameter of a matrix multiplication, plus 12 L C T for attention scores and weighted sums, counted over
        the full T x T square as the customary MFU does.
        """
        matrices = sum(p.numel() for p in self.parameters() if p.dim() >= 2)
        if self.config.pos == 'learned':
            matrices -= self.transformer.wpe.weight.numel()
        return 6 * matrices + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops):
        """
        Model FLOPs utilization: the share of `peak_flops` (FLOP/s) that went into the model's own arithmetic.

        fwdbwd_per_iter: sequences of block_size tokens per iteration; dt: its seconds. None for an unknown peak.
        """
        if not peak_flops:
            return None
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak_flops

    def hidden(self, idx, cache=None):
        """The residual stream after the last norm (B, T, C), for token ids idx (B, T)."""
        T, config = idx.size(1), self.config
        if T > config.block_size:
            raise ValueError(f'{T} tokens do not fit: the model was made for block_size={config.block_size}')
        positions = slice(0, T) if cache is None else cache.positions(T)
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

    def forward(self, idx, targets=None, cache=None, logits=True):
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
        if not logits:
            return None, linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten())
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def window_losses(self, idx, targets):
        """Mean loss of each row in nats per scored token, float32 (B,); idx and targets (B, T), -1 isn't scored."""
        losses = [
            F.cross_entropy(self.lm_head(x).float(), row, ignore_index=-1, reduction='sum')
            for x, row in zip(self.hidden(idx), targets, strict=True)  # row by row: all logits at once may not fit
        ]
        return torch.stack(losses) / (targets != -1).sum(1).clamp(min=1)

    def init_cache(self, batch_size, max_tokens=None, dtype=None):
        """An empty Cache for `batch_size` sequences of up to `max_tokens` (at most, and by default, block_size)."""
        weight = self.transformer.wte.weight
        max_tokens = min(max_tokens or self.config.block_size, self.config.block_size)
        if dtype is None:
            device = weight.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        shapes = self.attention.cache_shapes(self.config)
        layers = [
            tuple(weight.new_zeros(batch_size, *shape[:-1], max_tokens, shape[-1], dtype=dtype) for shape in shapes)
            for _ in range(self.config.n_layer)
        ]
        return Cache(layers, max_tokens)

    def crop_block_size(self, block_size):
        """Shorten the model to `block_size` tokens: a small run needs fewer positions than GPT-2's 1024."""
        if block_size > self.config.block_size:
            raise ValueError(f'block_size={block_size} exceeds the {self.config.block_size} this model was made for')
        self.config.block_size = block_size
        if self.config.pos == 'learned':
            self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size])
            self.transformer.wpe.num_embeddings = block_size
        else:
            self.rope = self.rope[:, :block_size]

    @classmethod
    def from_pretrained(cls, model_type, override_args=None):
        """
        GPT-2 by name ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl') or from a local Hugging Face folder.

        override_args: dropout, flash and recompute only; all else comes with the weights. ValueError for anything
        else, and where `model_type` holds no GPT-2.
        """
        override_args = override_args or {}
        if fixed := set(override_args) - {'dropout', 'flash', 'recompute'}:
            raise ValueError(f'{sorted(fixed)} cannot be overridden: the pretrained weights decide that')
        settings, state = gpt2.read(model_type)
        model = cls(GPTConfig(**settings, **override_args))
        model.load_state_dict(state)
        return model

    def slow_rows(self, name):
        """The rows of parameter `name` that learn at `kv_lr` of the rate, a slice or None: those of keys and values."""
        return slice(self.config.n_embd, None) if name.endswith('c_attn.weight') else None

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, optimizer='adamw', kv_lr=0.0):
        """
        The optimizer of all parameters: 'adamw', or 'muon' for the matrices of the blocks and AdamW for the rest.

        kv_lr: share of the learning rate for what `slow_rows` names; 0: the class's own.
        """
        made = OPTIMIZERS[optimizer](self.named_parameters(), weight_decay, learning_rate, betas, device_type)
        slow = [(parameter, rows) for name, parameter in self.named_parameters() if (rows := self.slow_rows(name))]
        if (kv_lr or self.kv_lr) != 1:
            slow_down(made, slow, kv_lr or self.kv_lr)
        return made

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, use_cache=True, num_samples=1,
                 stop_token=None, on_token=None, valid_ids=None, generator=None, fixed=None):  # fmt: skip
        """
        Continue idx (B, t) by max_new_tokens drawn tokens; returns (B * num_samples, t + new), prompt included.

        temperature, top_k, top_p, valid_ids, generator: see ops/decoding.py's `draw`. num_samples: samples per prompt,
        which share its prefill. stop_token: stop when every sample has drawn it; one that has is filled up with it.
        on_token: called with each new column (B * num_samples,). fixed: decode by a FixedStep (None: on CUDA only).
        use_cache=False recomputes every token, with a window that slides over the last block_size tokens. Learned
        positions in a cache can't slide: when it is full, the most recent half of its tokens is read again.
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
            # reading `stopped` waits for the device, so it is read only where there is a stop token
            if end + 1 == out.size(1) or (stop_token is not None and bool(stopped.all())):
                return out[:, : end + 1]
            if not use_cache:
                logits, _ = self(out[:, max(0, end + 1 - config.block_size) : end + 1])
            elif cache.length == cache.max_tokens:
                cache.length = 0
                logits, _ = self(out[:, end + 1 - max(1, cache.max_tokens // 2) : end + 1], cache=cache)
            elif fixed:
                step = step or FixedStep(self, cache)
                logits = step(token[:, None])
            else:
                logits, _ = self(token[:, None], cache=cache)
        return out
