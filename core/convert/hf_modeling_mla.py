"""
GPT with multi-head latent attention (MLA) for the `transformers` library, in one self-contained file.

export_hf.py copies this file into each exported folder, from where transformers runs it:

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.generate(**tokenizer('Once', return_tensors='pt'), max_new_tokens=50)

Notable features:
- the cache holds the latent and nothing else: `keys` of transformers' cache are the latents, `values` the shared
  position keys
- decoding attends to the cached latents (absorbed); long prompts attend to keys and values computed from them
  (decompressed)
- padding on either side, in dynamic and static caches: a padded sequence gets the logits that it gets alone
- softmax and loss in float32 for half-precision models, in the model's dtype otherwise
- gradient checkpointing per block
- transformers' attention interface: attn_implementation 'sdpa' or 'eager', which also gives output_attentions, or a
  function registered with AttentionInterface, which gets the keys and values that are computed from the latents

Formulas and names are those of DeepSeek-V2 (arXiv:2405.04434, section 2.1).
Shapes: B batch, T query length, S key length, C n_embd, H heads, d = C/H, r n_latent, R n_rope, V vocabulary.
"""

import math

import torch
import torch.nn as nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class MLAGPTConfig(PretrainedConfig):
    """
    The sizes of the model, with the names and defaults of the training project's MLAConfig.

    n_latent 0 is half of n_embd; n_rope 0 with pos='rope' is half of the head size.
    """

    model_type = 'mla_gpt'
    keys_to_ignore_at_inference = ['past_key_values']
    attribute_map = {
        'hidden_size': 'n_embd',
        'num_hidden_layers': 'n_layer',
        'num_attention_heads': 'n_head',
        'max_position_embeddings': 'block_size',
    }

    def __init__(self, block_size=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=True,
                 gelu='exact', pos='learned', n_latent=0, n_latent_q=0, n_rope=0, latent_norm=False,
                 initializer_range=0.02, use_cache=True, tie_word_embeddings=True, bos_token_id=None,
                 eos_token_id=None, pad_token_id=None, **kwargs):  # fmt: skip
        self.block_size, self.vocab_size = block_size, vocab_size
        self.n_layer, self.n_head, self.n_embd = n_layer, n_head, n_embd
        self.dropout, self.bias, self.gelu, self.pos = dropout, bias, gelu, pos
        self.n_latent, self.n_latent_q, self.latent_norm = n_latent or max(1, n_embd // 2), n_latent_q, latent_norm
        self.n_rope = n_rope or (n_embd // n_head // 2 if pos == 'rope' else 0)
        self.initializer_range, self.use_cache = initializer_range, use_cache
        special = dict(bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **special, **kwargs)


def upcast(x):
    """x in the dtype of its softmax: float32 for half precision, unchanged for float32 and float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rope_angles(positions, size, theta=10000.0):
    """Cosines and sines of RoPE's angles (arXiv:2104.09864) at positions (B, T): float32, each (B, 1, T, size/2)."""
    device = positions.device
    positions = positions.cpu() if device.type == 'mps' else positions  # MPS has no float64
    frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float64, device=positions.device) / size)
    angle = positions.double()[:, None, :, None] * frequency
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rotate(x, rope):
    """Rotate each pair (x[2i], x[2i+1]) of x (B, H, T, size) by its position's angle, in at least float32."""
    cos, sin = rope
    even, odd = upcast(x).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def visible_keys(mask, past, T, S, device):
    """
    The S keys that T queries after `past` tokens attend to: bool, (B or 1, 1, T, S). None for plain causal attention.

    mask: None; or (B, S), 0 at padding; or (B, 1, T, S), causality included, either bool or 0 at visible keys and
    negative elsewhere. transformers passes the last form for caches of fixed length.
    """
    query, key = torch.arange(T, device=device)[:, None] + past, torch.arange(S, device=device)
    if mask is not None and mask.dim() == 4:
        visible = mask if mask.dtype == torch.bool else mask == 0
    else:
        padded = mask is not None and not mask.all()
        if not padded and T in (1, S):
            return None
        visible = (key <= query)[None, None]
        if padded:
            visible = visible & mask.bool()[:, None, None]
    # The softmax of a row without visible keys is NaN. Nothing reads the row, but its latent is cached, and a weight
    # of 0 times NaN is NaN. So such a row, which is a padding token's, sees itself.
    return visible | (key == query) & ~visible.any(dim=-1, keepdim=True)


def causal_lm_loss(logits, labels, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs):
    """
    Mean cross-entropy in nats of the next tokens, a scalar; transformers' own loss rounds float64 to float32.

    logits: (B, T, V). labels: (B, T), the input ids; ignore_index isn't scored. shift_labels: labels, already shifted.
    num_items_in_batch: divide the sum by this instead of the number of scored tokens, for gradient accumulation.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=ignore_index) if shift_labels is None else shift_labels
    logits, targets = upcast(logits).flatten(0, 1), targets.flatten().to(logits.device)
    if num_items_in_batch is None:
        return F.cross_entropy(logits, targets, ignore_index=ignore_index)
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction='sum') / num_items_in_batch


def softmax_of_visible(scores, visible, dtype):
    """Attention weights (B, H, T, S) in `dtype`: the softmax of scores over the visible keys (bool, or None: all)."""
    if visible is not None:
        scores = scores.masked_fill(~visible, float('-inf'))
    return upcast(scores).softmax(dim=-1).to(dtype)


def eager_attention(module, q, k, v, visible, scaling, dropout=0.0, **kwargs):
    """Attention by its formula, as transformers calls it: the output (B, T, H, d) and the weights (B, H, T, S)."""
    if visible is None and q.size(2) > 1:
        visible = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
    weights = softmax_of_visible(q @ k.transpose(-2, -1) * scaling, visible, q.dtype)
    return (F.dropout(weights, dropout, module.training) @ v).transpose(1, 2), weights


class Attention(nn.Module):
    """Multi-head latent attention."""

    is_causal, num_key_value_groups = True, 1  # transformers' attention functions read these

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer, self.dropout = config, layer, config.dropout
        self.n_head, self.head_size = config.n_head, config.n_embd // config.n_head
        self.n_latent, self.n_rope = config.n_latent, config.n_rope
        self.n_nope = self.head_size - config.n_rope
        C, r, bias = config.n_embd, config.n_latent, config.bias
        norm = (lambda size: nn.RMSNorm(size, eps=1e-6)) if config.latent_norm else nn.Identity
        if config.n_latent_q:
            self.c_q_down = nn.Linear(C, config.n_latent_q, bias=bias)
            self.q_norm = norm(config.n_latent_q)
        self.c_q = nn.Linear(config.n_latent_q or C, C, bias=bias)
        self.c_kv_down = nn.Linear(C, r + config.n_rope, bias=bias)
        self.kv_norm = norm(r)
        self.c_kv_up = nn.Linear(r, self.n_head * (self.n_nope + self.head_size), bias=bias)
        self.c_proj = nn.Linear(C, C, bias=bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def project(self, x, rope):
        """Queries (B, H, T, d), latents (B, 1, T, r) and shared position keys (B, 1, T, R) of x (B, T, C)."""
        c_q = self.q_norm(self.c_q_down(x)) if hasattr(self, 'c_q_down') else x
        q = self.c_q(c_q).unflatten(-1, (self.n_head, self.head_size)).transpose(1, 2)
        latent, k_rope = self.c_kv_down(x).unsqueeze(1).split((self.n_latent, self.n_rope), dim=-1)
        if rope is not None:
            q_nope, q_rope = q.split((self.n_nope, self.n_rope), dim=-1)
            q, k_rope = torch.cat((q_nope, rotate(q_rope, rope)), dim=-1), rotate(k_rope, rope)
        return q, self.kv_norm(latent), k_rope

    def decompressed(self, q, latent, k_rope, visible):
        """Attention over keys and values computed from the latents (B, 1, S, r): (B, T, H, d), and weights or None."""
        k, v = self.c_kv_up(latent.squeeze(1)).split((self.n_head * self.n_nope, self.n_head * self.head_size), dim=-1)
        k = k.unflatten(-1, (self.n_head, self.n_nope)).transpose(1, 2)
        v = v.unflatten(-1, (self.n_head, self.head_size)).transpose(1, 2)
        k = torch.cat((k, k_rope.expand(-1, self.n_head, -1, -1)), dim=-1)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout, scaling = self.dropout if self.training else 0.0, 1 / math.sqrt(self.head_size)
        return attend(self, q, k, v, visible, dropout=dropout, scaling=scaling)

    def absorbed(self, q, latent, k_rope, visible):
        """The same in latent space, without keys and values: cheaper for few queries (see `forward`)."""
        split = self.n_head * self.n_nope
        w_k = self.c_kv_up.weight[:split].unflatten(0, (self.n_head, self.n_nope))
        w_v = self.c_kv_up.weight[split:].unflatten(0, (self.n_head, self.head_size))
        q_nope, q_rope = q.split((self.n_nope, self.n_rope), dim=-1)
        scores = (q_nope @ w_k) @ latent.transpose(-2, -1) + q_rope @ k_rope.transpose(-2, -1)
        weights = softmax_of_visible(scores / math.sqrt(self.head_size), visible, q.dtype)
        y = (weights @ latent) @ w_v.transpose(-2, -1)
        if self.c_kv_up.bias is not None:  # the keys' bias adds the same to all scores of a query: softmax drops it
            y = y + self.c_kv_up.bias[split:].unflatten(0, (self.n_head, self.head_size))[:, None]
        return y.transpose(1, 2), weights

    def forward(self, x, rope, visible, S, cache):
        """
        x (B, T, C) -> (B, T, C), and the weights (B, H, T, S) where they are computed, else None.

        With a cache, x are the last T of S tokens, and the cache holds the others.
        """
        q, latent, k_rope = self.project(x, rope)
        if cache is not None:
            latent, k_rope = (part[:, :, :S] for part in cache.update(latent, k_rope, self.layer))
        T, r, d = q.size(2), self.n_latent, self.head_size
        absorbing_pays = T * (r - d) < r * d  # otherwise computing all keys and values takes fewer operations
        # absorbed attention has no causal mask of its own, so several queries require `visible`
        absorbs = cache is not None and not self.training and absorbing_pays and (visible is not None or T == 1)
        absorbs = absorbs and self.config._attn_implementation in ('eager', 'sdpa')  # another function is to be called
        y, weights = (self.absorbed if absorbs else self.decompressed)(q, latent, k_rope, visible)
        return self.resid_dropout(self.c_proj(y.flatten(2))), weights


class MLP(nn.Module):
    """Linear to 4C, GELU, linear back to C."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate='tanh' if config.gelu == 'tanh' else 'none')
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(GradientCheckpointingLayer):
    """Attention, then MLP; each reads the normed residual stream and adds to it."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, rope, visible, S, past_key_values=None):
        y, weights = self.attn(self.ln_1(x), rope, visible, S, past_key_values)
        x = x + y
        return x + self.mlp(self.ln_2(x)), weights


class MLAGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """The whole model, with the output head tied to the token embedding."""

    config_class = MLAGPTConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ['Block']
    _supports_sdpa = True
    _supports_attention_backend = True
    _tied_weights_keys = {'lm_head.weight': 'transformer.wte.weight'}
    _skip_keys_device_placement = ['past_key_values']

    def __init__(self, config):
        super().__init__(config)
        parts = dict(wte=nn.Embedding(config.vocab_size, config.n_embd))
        if config.pos == 'learned':
            parts['wpe'] = nn.Embedding(config.block_size, config.n_embd)
        parts['drop'] = nn.Dropout(config.dropout)
        parts['h'] = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        parts['ln_f'] = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.loss_function = causal_lm_loss
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.wte

    def set_input_embeddings(self, value):
        self.transformer.wte = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                labels=None, use_cache=None, logits_to_keep=0, output_attentions=None, output_hidden_states=None,
                return_dict=True, **kwargs):  # fmt: skip
        """
        Token ids (B, T) -> CausalLMOutputWithPast: logits (B, T, V), the loss if there are labels, and the cache.

        attention_mask: see `visible_keys`; it covers the cached tokens too. By default, positions count the tokens of
        a (B, S) mask, so padding takes no position, and are consecutive otherwise. On demand also hidden_states, the
        embeddings and each layer's output (the last one normed), and attentions (attn_implementation='eager').
        ValueError for more than block_size tokens.
        """
        config, eager = self.config, self.config._attn_implementation == 'eager'
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        if output_attentions and not eager:
            raise ValueError("output_attentions requires attn_implementation='eager'")
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError('pass either input_ids or inputs_embeds')
        x = self.transformer.wte(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        mask, T = attention_mask, x.size(1)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()  # a tensor in caches of fixed length
        if not torch.compiler.is_compiling() and past + T > self.config.block_size:
            raise ValueError(f"{int(past) + T} tokens don't fit; the model's block_size is {self.config.block_size}")
        if mask is not None and mask.dim() == 4:
            S = mask.size(-1)
        else:
            S = int(past) + T
            if mask is not None and mask.size(1) < S:
                raise ValueError(f'attention_mask has {mask.size(1)} columns; it requires {S}, one per token so far')
            mask = None if mask is None else mask[:, :S]
        if position_ids is None and mask is not None and mask.dim() == 2:
            position_ids = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -T:]
        elif position_ids is None:
            position_ids = torch.arange(T, device=x.device)[None] + past
        rope = rope_angles(position_ids, self.config.n_rope) if self.config.pos == 'rope' else None
        if self.config.pos == 'learned':
            x = x + self.transformer.wpe(position_ids)
        x = self.transformer.drop(x)
        visible = visible_keys(mask, past, T, S, x.device)
        hidden, attentions = (), ()
        for block in self.transformer.h:
            hidden = (*hidden, x) if output_hidden_states else ()
            x, weights = block(x, rope, visible, S, past_key_values=past_key_values)
            attentions = (*attentions, weights) if output_attentions else ()
        x = self.transformer.ln_f(x)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        out = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*hidden, x) if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
        )
        return out if return_dict else out.to_tuple()
