"""
GPT with multi-head latent attention, for the `transformers` library, in one self-contained file.

export_hf.py copies this file into the folders that it writes, where transformers runs it:

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.generate(**tokenizer('Once', return_tensors='pt'), max_new_tokens=50)

Notable features:
- generation caches the latent alone: `keys` of transformers' cache hold it, `values` the shared position key
- decoding runs on the cached latents (absorbed), long prompts on rebuilt keys and values (decompressed)
- left-padded batches, positions from the attention mask, and a loss from `labels`

The algebra and the names are those of multi-head latent attention in DeepSeek-V2 (arXiv:2405.04434, section 2.1).
Shapes: B batch, T query length, S key length, C n_embd, H heads, d = C/H, r n_latent, R n_rope.
"""

import math

import torch
import torch.nn as nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class MLAGPTConfig(PretrainedConfig):
    """Sizes of the model; the names are those of the training project's MLAConfig."""

    model_type = 'mla_gpt'
    keys_to_ignore_at_inference = ['past_key_values']
    attribute_map = {
        'hidden_size': 'n_embd',
        'num_hidden_layers': 'n_layer',
        'num_attention_heads': 'n_head',
        'max_position_embeddings': 'block_size',
    }

    def __init__(self, block_size=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=True,
                 gelu='exact', pos='learned', n_latent=384, n_latent_q=0, n_rope=0, latent_norm=False,
                 initializer_range=0.02, use_cache=True, **kwargs):  # fmt: skip
        self.block_size, self.vocab_size = block_size, vocab_size
        self.n_layer, self.n_head, self.n_embd = n_layer, n_head, n_embd
        self.dropout, self.bias, self.gelu, self.pos = dropout, bias, gelu, pos
        self.n_latent, self.n_latent_q, self.n_rope, self.latent_norm = n_latent, n_latent_q, n_rope, latent_norm
        self.initializer_range, self.use_cache = initializer_range, use_cache
        super().__init__(**kwargs)


def rope_angles(positions, size, theta=10000.0):
    """Cosines and sines, each (B, 1, T, size/2) in float32, of RoPE's angles at positions (B, T)."""
    frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = positions.cpu().double()[:, None, :, None] * frequency
    return angle.cos().float().to(positions.device), angle.sin().float().to(positions.device)


def turn(x, rope):
    """Turn each pair of neighbours in x (B, H, T, size) by its position's angle."""
    cos, sin = rope
    even, odd = x.to(torch.promote_types(x.dtype, cos.dtype)).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Multi-head latent attention."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
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
        """Queries (B, H, T, d), latent (B, 1, T, r) and shared position key (B, 1, T, R) of x (B, T, C)."""
        c_q = self.q_norm(self.c_q_down(x)) if hasattr(self, 'c_q_down') else x
        q = self.c_q(c_q).unflatten(-1, (self.n_head, self.head_size)).transpose(1, 2)
        latent, k_rope = self.c_kv_down(x).unsqueeze(1).split((self.n_latent, self.n_rope), dim=-1)
        if rope is not None:
            q_nope, q_rope = q.split((self.n_nope, self.n_rope), dim=-1)
            q, k_rope = torch.cat((q_nope, turn(q_rope, rope)), dim=-1), turn(k_rope, rope)
        return q, self.kv_norm(latent), k_rope

    def decompressed(self, q, latent, k_rope, visible):
        """Attention over keys and values rebuilt from latents (B, 1, S, r): (B, H, T, d)."""
        k, v = self.c_kv_up(latent.squeeze(1)).split((self.n_head * self.n_nope, self.n_head * self.head_size), dim=-1)
        k = k.unflatten(-1, (self.n_head, self.n_nope)).transpose(1, 2)
        v = v.unflatten(-1, (self.n_head, self.head_size)).transpose(1, 2)
        k = torch.cat((k, k_rope.expand(-1, self.n_head, -1, -1)), dim=-1)
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, visible, dropout, is_causal=visible is None and q.size(2) > 1)

    def absorbed(self, q, latent, k_rope, visible):
        """The same for few queries, without keys and values: the queries go into latent space, the sums come out."""
        split = self.n_head * self.n_nope
        w_k = self.c_kv_up.weight[:split].unflatten(0, (self.n_head, self.n_nope))
        w_v = self.c_kv_up.weight[split:].unflatten(0, (self.n_head, self.head_size))
        q_nope, q_rope = q.split((self.n_nope, self.n_rope), dim=-1)
        scores = (q_nope @ w_k) @ latent.transpose(-2, -1) + q_rope @ k_rope.transpose(-2, -1)
        scores = scores / math.sqrt(self.head_size)
        if visible is not None:
            scores = scores.masked_fill(~visible, float('-inf'))
        y = (scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ latent) @ w_v.transpose(-2, -1)
        if self.c_kv_up.bias is not None:  # the keys' bias adds the same to every score of a query: softmax drops it
            y = y + self.c_kv_up.bias[split:].unflatten(0, (self.n_head, self.head_size))[:, None]
        return y

    def forward(self, x, rope, visible, cache):
        q, latent, k_rope = self.project(x, rope)
        if cache is not None:
            latent, k_rope = cache.update(latent, k_rope, self.layer)
        T, r, d = q.size(2), self.n_latent, self.head_size
        absorbing_pays = T * (r - d) < r * d  # otherwise rebuilding all keys and values is less work
        # `visible` is None where T queries see T keys, and where one query sees them all
        absorbs = cache is not None and not self.training and absorbing_pays and (visible is not None or T == 1)
        y = (self.absorbed if absorbs else self.decompressed)(q, latent, k_rope, visible)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate='tanh' if config.gelu == 'tanh' else 'none')
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, rope, visible, cache):
        x = x + self.attn(self.ln_1(x), rope, visible, cache)
        return x + self.mlp(self.ln_2(x))


class MLAGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """The whole model, with its language modelling head."""

    config_class = MLAGPTConfig
    _no_split_modules = ['Block']
    _supports_sdpa = True
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
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.wte

    def set_input_embeddings(self, value):
        self.transformer.wte = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    @staticmethod
    def visible_keys(attention_mask, past, T, device):
        """Which keys each query sees: bool, (B or 1, 1, T, S); None where causality alone decides and is plain."""
        if attention_mask is not None and attention_mask.dim() == 4:  # a cache of fixed length brings its own
            return attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
        padded = attention_mask is not None and not attention_mask.bool().all()
        if not padded and (past == 0 or T == 1):
            return None
        query, key = torch.arange(past, past + T, device=device)[:, None], torch.arange(past + T, device=device)
        visible = (key <= query)[None, None]
        if padded:  # a padded query sees itself, since softmax needs something to choose from
            visible = visible & attention_mask.bool()[:, None, None] | (key == query)
        return visible

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                labels=None, use_cache=None, logits_to_keep=0, return_dict=True, **kwargs):  # fmt: skip
        """Token ids (B, T) -> logits (B, T, V), with `labels` the loss, with a cache past_key_values."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError('give either input_ids or inputs_embeds')
        x = self.transformer.wte(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        cache = past_key_values if use_cache else None
        past, T = 0 if cache is None else int(cache.get_seq_length()), x.size(1)
        if past + T > self.config.block_size:
            raise ValueError(f'{past + T} tokens do not fit: the model was made for {self.config.block_size}')
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -T:]
        elif position_ids is None:
            position_ids = torch.arange(past, past + T, device=x.device)[None]
        rope = rope_angles(position_ids, self.config.n_rope) if self.config.pos == 'rope' else None
        if self.config.pos == 'learned':
            x = x + self.transformer.wpe(position_ids)
        x = self.transformer.drop(x)
        visible = self.visible_keys(attention_mask, past, T, x.device)
        for block in self.transformer.h:
            x = block(x, rope, visible, cache)
        x = self.transformer.ln_f(x)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        if not return_dict:
            return tuple(part for part in (loss, logits, cache) if part is not None)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
