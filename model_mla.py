"""
GPT with multi-head latent attention (MLA) in one file: only what differs from model.py.

MHA caches every head's keys and values: 2C numbers per token and layer. MLA compresses the input into one small latent
of r numbers, shared by all heads, and computes keys and values from it. Only the latent is cached.

    symbol  here             what it is
    C       n_embd           width of the residual stream
    H, d    n_head, C/H      number of heads, size of a head
    r       n_latent         size of the latent c_kv, from which all heads' keys and values are computed
    d_nope  n_nope           dimensions of each query and key that compare content
    R       n_rope           dimensions beside them that carry the position (decoupled RoPE; 0: none)
    d_v     n_value          dimensions of each value
    r_q     n_latent_q       size of the queries' own latent c_q (0: queries are computed from x directly)
    W_D     c_kv_down        down-projection, C -> r; its last R rows, W_KR, make the shared position key
    W_K,W_V c_kv_up          up-projection, r -> keys and values of all heads; W_U where both are meant
    W_Q     c_q              query projection
    W_O     c_proj           output projection

Equation numbers are those of DeepSeek-V2 (arXiv:2405.04434, section 2.1); its h_t is our x. With n_rope = 0 (the
default) positions are learned embeddings, as in GPT-2, or there are none, and equations 14 to 17 drop out. By default
d_nope = d_v = d. With shared_rope=False there is no shared position key: every head's keys are decompressed and then
rotated whole, as converting a trained model with RoPE needs; that can't be absorbed.

Why the latent is enough to decode. For head h, with keys k_j = W_K c_j + b_K and values v_j = W_V c_j + b_V:

    q . k_j         = (W_K^T q) . c_j + q . b_K          the last term is the same for all j, so the softmax drops it
    sum_j p_j v_j   = W_V (sum_j p_j c_j) + b_V          because the p_j sum to 1

So the query is projected into latent space once (W_K^T q) and compared with the cached latents there, and the weighted
sum of latents is projected out once (W_V). This is "absorbed" attention; no key or value is ever computed. The scale
stays 1/sqrt(d_nope + R), since the scores are the same numbers. For a long prompt it is cheaper to compute all keys and
values ("decompressed"); `absorbing_pays` has the rule.

Multiply-adds per layer to decode one token behind a context of T, and cached numbers per token and layer:

                             multiply-adds              cached
    MHA                      4C^2 + 2TC                 2C
    MLA, decompressed        2C^2 + rC + 2rCT + 2TC     r (+ R)
    MLA, absorbed            2C^2 + 3rC + 2THr          r (+ R)

Parameters per layer: 4C^2 against 2C^2 + 3rC, equal at r = 2C/3. (Biases, norms, R and lower-order terms left out.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model import GPT, GPTConfig, apply_rope
from ops import kernels
from ops.kernels import Dropout, Linear, RMSNorm  # PyTorch's, faster


class MultiHeadLatentAttention(nn.Module):
    """Causal multi-head latent attention (arXiv:2405.04434). Takes CausalSelfAttention's place in a Block."""

    def __init__(self, config: MLAConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head, self.n_latent, self.n_latent_q = config.n_head, config.n_latent, config.n_latent_q
        self.n_nope, self.n_rope, self.n_value = config.n_nope, config.n_rope, config.n_value
        self.dropout, self.flash, self.shared_rope = config.dropout, config.flash, config.shared_rope
        self.scale = 1 / math.sqrt(self.n_nope + self.n_rope)  # of the whole query, its position part included
        C, H, bias = config.n_embd, config.n_head, config.bias
        if config.n_latent_q:
            self.c_q_down = Linear(C, config.n_latent_q, bias=bias)
            self.q_norm = RMSNorm(config.n_latent_q, eps=1e-6) if config.latent_norm else nn.Identity()
        self.c_q = Linear(config.n_latent_q or C, H * (self.n_nope + self.n_rope), bias=bias)
        self.c_kv_down = Linear(C, config.n_latent + config.n_rope, bias=bias)
        self.kv_norm = RMSNorm(config.n_latent, eps=1e-6) if config.latent_norm else nn.Identity()
        self.c_kv_up = Linear(config.n_latent, H * (self.n_nope + self.n_value), bias=bias)
        self.c_proj = Linear(H * self.n_value, C, bias=bias)
        self.resid_dropout = Dropout(config.dropout)
        self.angles: Any
        self.register_buffer('angles', None, persistent=False)  # of all positions, where keys are rotated whole

    def queries(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """Queries (B, H, T, d_nope + R) from x (B, T, C): content first, then the rotated dimensions."""
        c_q = self.q_norm(self.c_q_down(x)) if self.n_latent_q else x  # eq. 12
        q = self.c_q(c_q).unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # eq. 13
        return q if rope is None else apply_rope(q, rope)  # eq. 14, 16

    def latent(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """What is cached of x (B, T, C): the latent c_kv, followed by the rotated shared key: (B, T, r + R)."""
        c_kv = self.c_kv_down(x)  # eq. 9
        if not self.n_rope:
            return self.kv_norm(c_kv)
        c_kv, k_rope = c_kv.split((self.n_latent, self.n_rope), dim=-1)
        k_rope = k_rope if rope is None else apply_rope(k_rope, rope)  # eq. 15: one for all heads, not normed
        return torch.cat((self.kv_norm(c_kv), k_rope), dim=-1)

    def decompress(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Every head's keys (B, H, S, d_nope + R) and values (B, H, S, d_v), from the latents (B, S, r + R)."""
        if self.shared_rope and not self.n_rope and self.n_nope == self.n_value:
            # one view, as for MHA's c_attn: splitting would cost a copy each in training
            kv = self.c_kv_up(latent).unflatten(-1, (2, self.n_head, self.n_nope))  # eq. 10, 11 in one product
            k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
            return k, v
        c_kv, k_rope = latent.split((self.n_latent, self.n_rope), dim=-1)
        kv = self.c_kv_up(c_kv).split((self.n_head * self.n_nope, self.n_head * self.n_value), dim=-1)
        k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in kv)
        if not self.shared_rope:
            return apply_rope(k, self.angles[:, : k.size(2)]), v
        return torch.cat((k, k_rope.unsqueeze(1).expand(-1, self.n_head, -1, -1)), dim=-1), v  # eq. 17

    def qkv(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, H, T, .), from the layer's normed input x (B, T, C)."""
        return self.queries(x, rope), *self.decompress(self.latent(x, rope))

    def up_weights(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The up-projections per head: W_K (H, d_nope, r), W_V (H, d_v, r), and W_V's bias (H, d_v) or None."""
        weight, bias, keys = self.c_kv_up.weight, self.c_kv_up.bias, self.n_head * self.n_nope
        w_k, w_v = weight[:keys].unflatten(0, (self.n_head, -1)), weight[keys:].unflatten(0, (self.n_head, -1))
        return w_k, w_v, None if bias is None else bias[keys:].unflatten(0, (self.n_head, -1))

    def absorbing_pays(self, T: int) -> bool:
        """
        True where T queries over many latents cost less in latent space than with keys and values.

        Per latent and head: T (2r + R) against r (d_nope + d_v) + T (d_nope + R + d_v). False where keys are rotated
        whole: a rotation stands between W_Q and W_K then, and it differs from position to position.
        """
        both = self.n_nope + self.n_value
        return self.shared_rope and T * (2 * self.n_latent - both) < self.n_latent * both

    def forward(self, x: Tensor, rope: Tensor | None = None, cache: Any = None) -> Tensor:
        """x (B, T, C) -> (B, T, C). With a cache, x continues the sequence whose latents it holds."""
        q, latent = self.queries(x, rope), self.latent(x, rope)
        mask = None  # causal; a cache knows which of its latents each query sees
        absorbed = cache is not None and not self.training and self.absorbing_pays(q.size(2))
        if cache is not None:
            # (B, S, r + R): the latents of the sequence so far, and what each query sees; whole: as ordinary tensors
            latent, mask = cache.append(self.layer, latent, whole=not (absorbed and self.flash))
        if not absorbed:
            k, v = self.decompress(latent)
        else:
            # attention in latent space: every head's keys and values are the latents themselves
            w_k, w_v, b_v = self.up_weights()
            q_nope, q_rope = q.split((self.n_nope, self.n_rope), dim=-1)
            q = torch.cat((kernels.per_head(q_nope, w_k), q_rope), dim=-1)  # (B, H, T, r + R): W_K^T q
            k = v = latent.unsqueeze(1).to(q.dtype)  # v's last R numbers, of the position key, are cut off below
        p_drop = self.dropout if self.training else 0.0
        if self.flash:
            y = kernels.fast_attention(q, k, v, self.scale, p_drop, mask)  # the default: the lines below, faster
        else:
            mask = kernels.causal_mask(q.size(2), k.size(2), q.device) if mask is None else mask
            scores = (q * self.scale) @ k.mT  # (B, H, T, S)
            pattern = scores.masked_fill(~mask, float('-inf')).softmax(dim=-1)
            y = kernels.dropout(pattern, p_drop) @ v  # softmax(q k^T / sqrt(d_nope + R)) v, eq. 18
        if absorbed:
            y = kernels.per_head(y[..., : self.n_latent], w_v.mT)  # W_V times the weighted sum of latents
            y = y if b_v is None else y + b_v[:, None]
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))  # eq. 19

    @staticmethod
    def cache_shapes(config: MLAConfig) -> tuple[tuple[int, ...], ...]:
        """One cached tensor: the latent, followed by the shared position key where there is RoPE."""
        return ((config.n_latent + config.n_rope,),)

    @staticmethod
    def parts(config: MLAConfig) -> dict[str, dict[str, int]]:
        """The parts of fused matrices, in order, and how many rows each has."""
        up = {'k': config.n_head * config.n_nope, 'v': config.n_head * config.n_value}
        return {'c_kv_up': up, 'c_kv_down': {'kv': config.n_latent, 'k_rope': config.n_rope}}


@dataclass
class MLAConfig(GPTConfig):
    """GPTConfig and the sizes of the latents. Raises ValueError when they don't fit together."""

    n_latent: int = 0  # r; 0: half of n_embd
    n_latent_q: int = 0  # r_q; 0: queries are not compressed
    n_nope: int = 0  # d_nope; 0: the head size
    n_value: int = 0  # d_v; 0: the head size
    shared_rope: bool = True  # one rotated key for all heads; False: keys are decompressed and then rotated whole
    latent_norm: bool = False  # RMSNorm on the latents, as in DeepSeek-V2
    latent_init: str = 'fan_in'  # initial values of what the latents are computed from; 'gpt2': init_std

    def __post_init__(self) -> None:
        if self.n_kv_head:
            raise ValueError(f'n_kv_head={self.n_kv_head} belongs to MHA: in MLA all heads share one latent already')
        if self.n_head > 0 and self.n_embd % self.n_head == 0:
            self.n_nope, self.n_value = self.n_nope or self.head_size, self.n_value or self.head_size
        self.n_latent = self.n_latent or max(1, self.n_embd // 2)
        if not self.shared_rope and (self.pos != 'rope' or self.n_rope):
            raise ValueError("shared_rope=False rotates whole keys: it needs pos='rope', and n_rope left out")
        if self.pos == 'rope' and self.shared_rope:
            self.n_rope = self.n_rope or self.head_size // 2
        super().__post_init__()
        if self.latent_init not in ('fan_in', 'gpt2'):
            raise ValueError(f"latent_init is '{self.latent_init}'; it must be fan_in or gpt2")
        if not 1 <= self.n_latent <= self.n_embd:
            raise ValueError(f'n_latent={self.n_latent} is outside 1 to n_embd={self.n_embd}; more gains nothing')
        if not 0 <= self.n_latent_q <= self.n_embd:
            raise ValueError(f'n_latent_q={self.n_latent_q} is outside 0 to n_embd={self.n_embd}')
        if min(self.n_nope, self.n_value) < 1:
            raise ValueError(f'n_nope={self.n_nope} and n_value={self.n_value} must be at least 1')

    @property
    def rope_size(self) -> int:
        return self.n_rope if self.shared_rope else self.n_nope

    @property
    def widths(self) -> tuple[int, int]:
        return self.n_nope + self.n_rope, self.n_value


class MLAGPT(GPT):
    """GPT with multi-head latent attention. Everything but the attention is model.py's."""

    attention = MultiHeadLatentAttention

    def set_context(self, block_size: int) -> None:
        super().set_context(block_size)
        if not self.config.shared_rope:
            for block in self.transformer.h:
                block.attn.angles = self.rope  # the same table for all layers

    @classmethod
    def from_pretrained(cls, model_type: str, override_args: dict | None = None) -> GPT:
        """No GPT-2 with MLA was ever published: a ValueError that says how to make one."""
        raise ValueError(
            f"'{model_type}' has multi-head attention; convert it with convert_mla.py, or train it as MLA with "
            f'train_mla.py --init_from={model_type}'
        )

    def init_std(self, name: str, part: str = '') -> float:
        """
        As in GPT, except for the two factors of keys and values, W_U W_D, and those of compressed queries.

        With latent_init='fan_in' (std(W_D) = 1/sqrt(C)) the latent starts at rms 1 and keys and values at 1/2; one
        step of Adam then moves keys about as far as in MHA. With 'gpt2' (std(W_D) = init_std) they start as in MHA, and
        W_U hardly learns at first. docs/mla.md has the derivation. kv_rms sets what keys and values start with.
        """
        config, owner = self.config, name.split('.')[-2]
        rank = {'c_kv_up': config.n_latent, 'c_q': config.n_latent_q}.get(owner, 0)
        fan_in = 1 / math.sqrt(config.n_embd)
        if config.kv_rms and part == 'k_rope':
            return config.kv_rms * fan_in
        if config.kv_rms and part in ('k', 'v'):
            down = fan_in if config.latent_init == 'fan_in' else config.init_std
            return config.kv_rms / math.sqrt(rank) / (1 if config.latent_norm else down / fan_in)
        if config.latent_init == 'fan_in':
            if owner in ('c_kv_down', 'c_q_down'):
                return fan_in
            return 0.5 / math.sqrt(rank) if rank else super().init_std(name)
        if not rank:
            return super().init_std(name)
        # keys, values and queries start with MHA's variance; the latent's mean square is 1 if normed, else init_std^2 C
        return config.init_std * math.sqrt(config.n_embd / rank) if config.latent_norm else 1 / math.sqrt(rank)
