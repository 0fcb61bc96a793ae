"""
GPT with multi-head latent attention (MLA) in one file: only what differs from model.py.

MHA caches every head's keys and values: 2C numbers per token and layer. MLA compresses the input into one small latent
of r numbers, shared by all heads, and computes keys and values from it. Only the latent is cached.

    symbol  here             what it is
    C       n_embd           width of the residual stream
    H, d    n_head, C/H      number of heads, size of a head
    r       n_latent         size of the latent c_kv, from which all heads' keys and values are computed
    R       n_rope           dimensions of each query and key that carry the position (decoupled RoPE; 0: none)
    r_q     n_latent_q       size of the queries' own latent c_q (0: queries are computed from x directly)
    W_D     c_kv_down        down-projection, C -> r (+ R for the shared position key)
    W_K,W_V c_kv_up          up-projection, r -> keys and values of all heads
    W_Q     c_q              query projection
    W_O     c_proj           output projection

Equation numbers are those of DeepSeek-V2 (arXiv:2405.04434, section 2.1); its h_t is our x. With n_rope = 0 (the
default) positions are learned embeddings, as in GPT-2, and equations 14 to 17 drop out.

Why the latent is enough to decode. For head h, with keys k_j = W_K c_j + b_K and values v_j = W_V c_j + b_V:

    q . k_j         = (W_K^T q) . c_j + q . b_K          the last term is the same for all j, so the softmax drops it
    sum_j p_j v_j   = W_V (sum_j p_j c_j) + b_V          because the p_j sum to 1

So the query is projected into latent space once (W_K^T q) and compared with the cached latents there, and the weighted
sum of latents is projected out once (W_V). This is "absorbed" attention; no key or value is ever computed. The scale
stays 1/sqrt(d), since the scores are the same numbers. For a long prompt it is cheaper to compute all keys and values
("decompressed"); `absorbing_pays` has the rule.

Multiply-adds per token and layer at context T, and cached numbers per token and layer:

                             multiply-adds              cached
    MHA                      4C^2 + 2TC                 2C
    MLA, decompressed        2C^2 + rC + 2rCT + 2TC     r (+ R)
    MLA, absorbed            2C^2 + 3rC + 2THr          r (+ R)

Parameters per layer: 4C^2 against 2C^2 + 3rC, equal at r = 2C/3. (Biases, norms and lower-order terms left out.)
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn

from model import GPT, GPTConfig, apply_rope
from ops.kernels import Dropout, Linear, RMSNorm, attend, cast_once, per_head


@dataclass
class MLAConfig(GPTConfig):
    """GPTConfig and the sizes of the latents. Raises ValueError when they don't fit together."""

    n_latent: int = 0  # r; 0: half of n_embd
    n_latent_q: int = 0  # r_q; 0: queries are not compressed
    n_rope: int = 0  # R; with pos='rope' only, 0: half of the head size
    latent_norm: bool = False  # RMSNorm on the latents, as in DeepSeek-V2
    latent_init: str = 'fan_in'  # initial values of what the latents are computed from; 'gpt2': 0.02, see init_std

    def __post_init__(self):
        if self.n_kv_head:
            raise ValueError(f'n_kv_head={self.n_kv_head} belongs to MHA: in MLA all heads share one latent already')
        self.n_latent = self.n_latent or max(1, self.n_embd // 2)
        if self.pos == 'rope':
            self.n_rope = self.n_rope or self.head_size // 2
        elif self.n_rope:
            raise ValueError(f"n_rope={self.n_rope} needs pos='rope': decoupled RoPE replaces learned positions")
        super().__post_init__()
        if self.latent_init not in ('fan_in', 'gpt2'):
            raise ValueError(f"latent_init is '{self.latent_init}'; it must be 'fan_in' or 'gpt2'")
        if not 1 <= self.n_latent <= self.n_embd:
            raise ValueError(f'n_latent={self.n_latent} is outside 1 to n_embd={self.n_embd}; more gains nothing')
        if not 0 <= self.n_latent_q <= self.n_embd:
            raise ValueError(f'n_latent_q={self.n_latent_q} is outside 0 to n_embd={self.n_embd}')
        if not 0 <= self.n_rope < self.head_size:
            raise ValueError(f'n_rope={self.n_rope} is outside 0 to {self.head_size - 1}: a head needs content too')

    @property
    def rope_size(self):
        return self.n_rope


class MultiHeadLatentAttention(nn.Module):
    """Causal multi-head latent attention (arXiv:2405.04434). Takes CausalSelfAttention's place in a Block."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.n_head, self.n_embd, self.head_size = config.n_head, config.n_embd, config.head_size
        self.n_latent, self.n_rope = config.n_latent, config.n_rope
        self.n_nope = self.head_size - config.n_rope  # dimensions of a query that compare content, not position
        self.dropout, self.flash = config.dropout, config.flash
        self.scale = 1 / math.sqrt(self.head_size)  # of the whole query, its position part included
        C, bias = config.n_embd, config.bias
        if config.n_latent_q:
            self.c_q_down = Linear(C, config.n_latent_q, bias=bias)
            self.q_norm = RMSNorm(config.n_latent_q, eps=1e-6) if config.latent_norm else nn.Identity()
            self.c_q = Linear(config.n_latent_q, C, bias=bias)
        else:
            self.c_q = Linear(C, C, bias=bias)
        self.c_kv_down = Linear(C, config.n_latent + config.n_rope, bias=bias)
        self.kv_norm = RMSNorm(config.n_latent, eps=1e-6) if config.latent_norm else nn.Identity()
        self.c_kv_up = Linear(config.n_latent, self.n_head * (self.n_nope + self.head_size), bias=bias)
        self.c_proj = Linear(C, C, bias=bias)
        self.resid_dropout = Dropout(config.dropout)

    @staticmethod
    def cache_shapes(config):
        """One cached tensor: the latent, followed by the shared position key where there is RoPE."""
        return ((config.n_latent + config.n_rope,),)

    def queries(self, x, rope=None):
        """Queries (B, H, T, d) from x (B, T, C): content first, then the n_rope rotated dimensions."""
        B, T, _ = x.shape
        c_q = self.q_norm(self.c_q_down(x)) if hasattr(self, 'c_q_down') else x  # eq. 12
        q = self.c_q(c_q).view(B, T, self.n_head, self.head_size).transpose(1, 2)  # eq. 13
        if rope is None:
            return q
        q_nope, q_rope = q.split((self.n_nope, self.n_rope), dim=-1)
        return torch.cat((q_nope, apply_rope(q_rope, rope)), dim=-1)  # eq. 14, 16

    def latent(self, x, rope=None):
        """What is cached of x (B, T, C): the latent c_kv, followed by the rotated shared key: (B, T, r + R)."""
        c_kv = self.c_kv_down(x)  # eq. 9
        if rope is None:
            return self.kv_norm(c_kv)
        c_kv, k_rope = c_kv.split((self.n_latent, self.n_rope), dim=-1)
        k_rope = apply_rope(k_rope, rope)  # eq. 15: one for all heads, not normed
        return torch.cat((self.kv_norm(c_kv), k_rope), dim=-1)

    def decompress(self, latent):
        """Every head's keys and values, each (B, H, S, d), computed from the latents (B, S, r + R)."""
        if not self.n_rope:  # one view, as for MHA's c_attn: splitting would cost a copy each in training
            kv = self.c_kv_up(latent).unflatten(-1, (2, self.n_head, self.head_size))  # eq. 10, 11 in one product
            return kv.permute(2, 0, 3, 1, 4).unbind(0)
        c_kv, k_rope = latent.split((self.n_latent, self.n_rope), dim=-1)
        k, v = self.c_kv_up(c_kv).split((self.n_head * self.n_nope, self.n_embd), dim=-1)
        k = k.unflatten(-1, (self.n_head, self.n_nope)).transpose(1, 2)
        v = v.unflatten(-1, (self.n_head, self.head_size)).transpose(1, 2)
        k = torch.cat((k, k_rope.unsqueeze(1).expand(-1, self.n_head, -1, -1)), dim=-1)  # eq. 17
        return k, v

    def qkv(self, x, rope=None):
        """Queries, keys and values, each (B, H, T, d), from the layer's normed input x (B, T, C)."""
        return self.queries(x, rope), *self.decompress(self.latent(x, rope))

    def up_weights(self, weight=None):
        """The up-projections per head: W_K (H, d - R, r), W_V (H, d, r), and W_V's bias (H, d) or None."""
        weight, keys = self.c_kv_up.weight if weight is None else weight, self.n_head * self.n_nope
        w_k = weight[:keys].unflatten(0, (self.n_head, self.n_nope))
        w_v = weight[keys:].unflatten(0, (self.n_head, self.head_size))
        if self.c_kv_up.bias is None:
            return w_k, w_v, None
        return w_k, w_v, self.c_kv_up.bias[keys:].unflatten(0, (self.n_head, self.head_size))

    def head_weights(self):
        """
        Each head's weights on the layer's normed input: W_Q, W_K, W_V (H, d, C) and W_O (H, C, d).

        As CausalSelfAttention.head_weights, with the projections multiplied out and the latent norms' gains folded in;
        what remains of a norm is one positive factor per token. W_K's last n_rope rows are the key all heads share.
        """
        w_k, w_v, _ = self.up_weights()
        down, gain = self.c_kv_down.weight[: self.n_latent], getattr(self.kv_norm, 'weight', None)
        if gain is not None:
            down = gain[:, None] * down
        shared = self.c_kv_down.weight[self.n_latent :].expand(self.n_head, -1, -1)
        w_q = self.c_q.weight
        if hasattr(self, 'c_q_down'):
            gain = getattr(self.q_norm, 'weight', None)
            w_q = (w_q if gain is None else w_q * gain) @ self.c_q_down.weight
        w_o = self.c_proj.weight.unflatten(1, (self.n_head, self.head_size)).transpose(0, 1)
        return w_q.unflatten(0, (self.n_head, self.head_size)), torch.cat((w_k @ down, shared), dim=1), w_v @ down, w_o

    def absorbing_pays(self, T):
        """True where T queries over many latents cost less in latent space than with keys and values: Tr < rd + Td."""
        r, d = self.n_latent, self.head_size
        return r <= d or T * (r - d) < r * d

    def absorbed(self, q, latent, visible=None, copies=None):
        """
        Attention in latent space: q (B, H, T, d) over latents (B, S, r + R) -> (B, H, T, d). No keys, no values.

        visible: for T = 1, a bool mask (1, S) of the latents that are filled; None where all are. copies: the cache's.
        """
        w_k, w_v, b_v = self.up_weights(None if copies is None else cast_once(self.c_kv_up.weight, q.dtype, copies))
        q_nope, q_rope = q.split((self.n_nope, self.n_rope), dim=-1)
        q = per_head(q_nope, w_k)  # W_K^T q, (B, H, T, r)
        if self.n_rope:
            q = torch.cat((q, q_rope), dim=-1)
        kv = latent.unsqueeze(1).to(q.dtype)  # keys and values at once: (B, 1, S, r + R)
        if q.size(2) == 1:
            # one query per head over latents that all heads share: the heads become the rows of one matrix
            o = attend(q.transpose(1, 2), kv, kv, self.scale, causal=False, visible=visible).transpose(1, 2)
        else:
            kv = kv.expand(-1, self.n_head, -1, -1)
            o = attend(q, kv, kv, self.scale, flash=self.flash)
        y = per_head(o[..., : self.n_latent], w_v.mT)
        return y if b_v is None else y + b_v[:, None]

    def forward(self, x, rope=None, cache=None):
        """x (B, T, C) -> (B, T, C). With a cache, x continues the sequence whose latents it holds."""
        q, latent = self.queries(x, rope), self.latent(x, rope)
        visible = None
        if cache is not None:
            (latent,), visible = cache.append(self.layer, latent), cache.visible()
        if cache is not None and not self.training and self.absorbing_pays(q.size(2)):
            y = self.absorbed(q, latent, visible, cache.copies)
        else:
            k, v = self.decompress(latent)
            p_drop = self.dropout if self.training else 0.0
            y = attend(q, k, v, self.scale, p_drop, self.flash, visible=visible)  # eq. 18
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))  # eq. 19


class MLAGPT(GPT):
    """GPT with multi-head latent attention. Everything but the attention is model.py's."""

    attention = MultiHeadLatentAttention
    kv_lr = 0.125

    @classmethod
    def from_pretrained(cls, model_type, override_args=None):
        """No GPT-2 with MLA was ever published: a ValueError that says how to make one."""
        raise ValueError(
            f"'{model_type}' has multi-head attention; convert it with convert_mla.py, or train it as MLA with "
            f'train_mla.py --init_from={model_type}'
        )

    def slow_rows(self, name):
        """
        All rows of the projections to and from the latents, those of queries included.

        Keys are a product of two matrices that learn at once. After n steps of Adam whose signs agree, keys of MHA have
        moved by n lr C (see init_std). What either factor's change does to MLA's keys is together as much at r = C/2,
        but the product of the two changes does n^2 lr^2 r C more, which exceeds it after 1/(lr r) steps: four at
        lr = 4e-3 and r = 64. At a share s of the rate that takes 1/s times as many steps. RESULTS.md has the figures.
        """
        kind, part = name.split('.')[-1], name.split('.')[-2]
        of_queries = ('c_q_down', 'c_q') if self.config.n_latent_q else ()
        return slice(None) if kind == 'weight' and part in ('c_kv_down', 'c_kv_up', *of_queries) else None

    def init_std(self, name):
        """
        As in GPT, except for the two factors of keys and values, W_U W_D, and those of compressed queries.

        What a step of Adam does to keys decides these values. It changes each weight by about the learning rate, lr.
        Where the signs fit the input x (normed, so of rms 1), keys move by lr C in MHA. In MLA they move through W_U by
        lr r rms(c), and through W_D by lr C times W_U's gain, which is std(W_U) sqrt(r). With std(W_D) = 1/sqrt(C) the
        latent c starts at rms 1, and with a gain of 1/2 the two shares are r/C and 1/2 of MHA's: together MHA's own at
        r = C/2. With latent_init='gpt2' (std(W_D) = 0.02, gain 1) they are 0.11 and 1 at C = 128: W_U hardly learns.
        """
        config, part = self.config, name.split('.')[-2]
        rank = {'c_kv_up': config.n_latent, 'c_q': config.n_latent_q}.get(part, 0)
        if config.latent_init == 'fan_in':
            if part in ('c_kv_down', 'c_q_down'):
                return 1 / math.sqrt(config.n_embd)
            return 0.5 / math.sqrt(rank) if rank else super().init_std(name)
        if not rank:
            return super().init_std(name)
        # keys, values and queries start with MHA's variance; a normed latent has mean square 1, a plain one 0.02^2 C
        return 0.02 * math.sqrt(config.n_embd / rank) if config.latent_norm else 1 / math.sqrt(rank)
