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
- documents packed into one row, which restarting position_ids tell apart, don't see each other
- transformers' attention interface: attn_implementation 'sdpa' or 'eager', which also gives output_attentions, or a
  function registered with AttentionInterface, which gets the keys and values that are computed from the latents
- whatever replaces or wraps a linear layer (LoRA, quantization, offloading, hooks) is obeyed: absorbed attention reads
  the up-projection's weight only where that is known to be what calling the layer would do

Formulas and names are those of DeepSeek-V2 (arXiv:2405.04434, section 2.1).
Shapes: B batch, T query length, S key length, C n_embd, H heads, r n_latent, V vocabulary; per head, queries and keys
have n_nope dimensions for content and R = n_rope for the position, values have n_value.
"""

import math
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

if not hasattr(ALL_ATTENTION_FUNCTIONS, 'get_interface'):
    raise ImportError('this model requires transformers >= 5.1: pip install --upgrade transformers')

# transformers 5.24 renamed the cache, in what generate() passes to a model and in what a model returns
CACHE = 'cache' if 'cache' in {field.name for field in fields(CausalLMOutputWithPast)} else 'past_key_values'


class MLAGPTConfig(PretrainedConfig):
    """
    The sizes of the model, with the names and defaults of the training project's MLAConfig.

    n_latent 0 is half of n_embd; n_rope 0 with pos='rope' is half of the head size n_embd / n_head. n_nope 0 is what
    n_rope leaves of the head size, as in exports that don't name it; n_value 0 is the head size.
    """

    model_type = 'mla_gpt'
    keys_to_ignore_at_inference = [CACHE]
    attribute_map = {
        'hidden_size': 'n_embd',
        'num_hidden_layers': 'n_layer',
        'num_attention_heads': 'n_head',
        'max_position_embeddings': 'block_size',
    }

    def __init__(
        self,
        block_size: int = 1024,
        vocab_size: int = 50304,
        n_layer: int = 12,
        n_head: int = 12,
        n_embd: int = 768,
        dropout: float = 0.0,
        bias: bool = True,
        gelu: str = 'exact',
        pos: str = 'learned',
        n_latent: int = 0,
        n_latent_q: int = 0,
        n_rope: int = 0,
        latent_norm: bool = False,
        n_nope: int = 0,
        n_value: int = 0,
        rope_theta: float = 10000.0,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ):
        head_size = n_embd // n_head
        self.block_size, self.vocab_size = block_size, vocab_size
        self.n_layer, self.n_head, self.n_embd = n_layer, n_head, n_embd
        self.dropout, self.bias, self.gelu, self.pos = dropout, bias, gelu, pos
        self.n_latent, self.n_latent_q, self.latent_norm = n_latent or max(1, n_embd // 2), n_latent_q, latent_norm
        self.n_rope = n_rope or (head_size // 2 if pos == 'rope' else 0)
        self.n_nope, self.n_value = n_nope or head_size - self.n_rope, n_value or head_size
        self.rope_theta, self.initializer_range, self.use_cache = rope_theta, initializer_range, use_cache
        kwargs |= dict(bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id)
        super().__init__(**kwargs | dict(tie_word_embeddings=tie_word_embeddings))


def upcast(x: Tensor) -> Tensor:
    """x in the dtype of its softmax: float32 for half precision, unchanged for float32 and float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rope_angles(positions: Tensor, size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE's angles (arXiv:2104.09864) at positions (B, T): float32, each (B, 1, T, size/2)."""
    device = positions.device
    positions = positions.cpu() if device.type == 'mps' else positions  # MPS has no float64
    frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float64, device=positions.device) / size)
    angle = positions.double()[:, None, :, None] * frequency
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rotate(x: Tensor, rope: Any) -> Tensor:
    """Rotate each pair (x[2i], x[2i+1]) of x (B, H, T, size) by its position's angle, in at least float32."""
    cos, sin = rope
    even, odd = upcast(x).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def visible_keys(mask: Any, past: int, T: int, S: int, device: torch.device) -> Tensor | None:
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


def packed_documents(position_ids: Any) -> Tensor | None:
    """What tokens of documents in one row, whose positions restart, attend to: bool (B, 1, T, T). None: it is one."""
    document = (position_ids.diff(prepend=position_ids[:, :1] - 1) != 1).cumsum(dim=-1)
    if not torch.compiler.is_compiling() and not document.any():
        return None
    return (document[:, :, None] == document[:, None]).tril()[:, None]


def check_cached_latents(cache: Any, config: Any) -> None:
    """ValueError where a cache doesn't hold latents, which prefix tuning, for one, fills with keys and values."""
    keys = cache.layers[0].keys
    if keys is not None and keys.dim() == 4 and (keys.size(1), keys.size(3)) != (1, config.n_latent):
        raise ValueError(
            f'the cache holds keys of {keys.size(1)} heads with {keys.size(3)} dimensions, and this model caches one '
            f'latent of {config.n_latent}; prefix tuning is not possible, LoRA and prompt tuning are'
        )


def causal_lm_loss(
    logits: Tensor,
    labels: Any,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
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


def softmax_of_visible(scores: Tensor, visible: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Attention weights (B, H, T, S) in `dtype`: the softmax of scores over the visible keys (bool, or None: all)."""
    if visible is not None:
        scores = scores.masked_fill(~visible, float('-inf'))
    return upcast(scores).softmax(dim=-1).to(dtype)


def eager_attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention by its formula, as transformers calls it: the output (B, T, H, n_value), the weights (B, H, T, S)."""
    if visible is None and q.size(2) > 1:
        visible = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
    weights = softmax_of_visible(q @ k.transpose(-2, -1) * scaling, visible, q.dtype)
    return (F.dropout(weights, dropout, module.training) @ v).transpose(1, 2), weights


def is_plain(linear: nn.Module) -> bool:
    """
    True where calling `linear` is known to be F.linear of its weight and bias, so that these may be used instead.

    Adapters and quantization change a layer's or a weight's type; offloading leaves its weight on the device 'meta' and
    replaces `forward`; hooks may change what goes in and comes out.
    """
    hooks = (linear._forward_pre_hooks, linear._forward_hooks, linear._backward_pre_hooks, linear._backward_hooks)
    return (
        type(linear) is nn.Linear
        and type(linear.weight) is nn.Parameter
        and not linear.weight.is_meta
        and 'forward' not in vars(linear)
        and not any(hooks)
    )


class Attention(nn.Module):
    """Multi-head latent attention."""

    is_causal, num_key_value_groups = True, 1  # transformers' attention functions read these

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer, self.dropout = config, layer, config.dropout
        self.n_head, self.n_latent = config.n_head, config.n_latent
        self.n_nope, self.n_rope, self.n_value = config.n_nope, config.n_rope, config.n_value
        self.scale = 1 / math.sqrt(self.n_nope + self.n_rope)
        # of c_kv_up: all heads' keys, then all heads' values
        self.key_rows, self.value_rows = self.n_head * self.n_nope, self.n_head * self.n_value
        C, r, bias = config.n_embd, config.n_latent, config.bias
        norm = (lambda size: nn.RMSNorm(size, eps=1e-6)) if config.latent_norm else nn.Identity
        if config.n_latent_q:
            self.c_q_down = nn.Linear(C, config.n_latent_q, bias=bias)
            self.q_norm = norm(config.n_latent_q)
        self.c_q = nn.Linear(config.n_latent_q or C, self.n_head * (self.n_nope + self.n_rope), bias=bias)
        self.c_kv_down = nn.Linear(C, r + self.n_rope, bias=bias)
        self.kv_norm = norm(r)
        self.c_kv_up = nn.Linear(r, self.key_rows + self.value_rows, bias=bias)
        self.c_proj = nn.Linear(self.value_rows, C, bias=bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def project(self, x: Tensor, rope: Any) -> tuple[Tensor, ...]:
        """Queries (B, H, T, n_nope + R), latents (B, 1, T, r), shared position keys (B, 1, T, R) of x (B, T, C)."""
        c_q = self.q_norm(self.c_q_down(x)) if hasattr(self, 'c_q_down') else x
        q = self.c_q(c_q).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        latent, k_rope = self.c_kv_down(x).unsqueeze(1).split((self.n_latent, self.n_rope), dim=-1)
        if rope is not None:
            q_nope, q_rope = q.split((self.n_nope, self.n_rope), dim=-1)
            q, k_rope = torch.cat((q_nope, rotate(q_rope, rope)), dim=-1), rotate(k_rope, rope)
        return q, self.kv_norm(latent), k_rope

    def decompressed(self, q: Tensor, latent: Tensor, k_rope: Tensor, visible: Tensor | None) -> Any:
        """Attention over keys and values made from the latents (B, 1, S, r): (B, T, H, n_value), weights or None."""
        k, v = self.c_kv_up(latent.squeeze(1)).split((self.key_rows, self.value_rows), dim=-1)
        k = k.unflatten(-1, (self.n_head, self.n_nope)).transpose(1, 2)
        v = v.unflatten(-1, (self.n_head, self.n_value)).transpose(1, 2)
        k = torch.cat((k, k_rope.expand(-1, self.n_head, -1, -1)), dim=-1)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        return attend(self, q, k, v, visible, dropout=self.dropout if self.training else 0.0, scaling=self.scale)

    def absorbed(self, q: Tensor, latent: Tensor, k_rope: Tensor, visible: Tensor | None) -> Any:
        """The same in latent space, without keys and values: cheaper for few queries (see `absorbs`)."""
        w_k, w_v = self.c_kv_up.weight.split((self.key_rows, self.value_rows))
        w_k, w_v = w_k.unflatten(0, (self.n_head, self.n_nope)), w_v.unflatten(0, (self.n_head, self.n_value))
        q_nope, q_rope = q.split((self.n_nope, self.n_rope), dim=-1)
        scores = (q_nope @ w_k) @ latent.transpose(-2, -1) + q_rope @ k_rope.transpose(-2, -1)
        weights = softmax_of_visible(scores * self.scale, visible, q.dtype)
        y = (weights @ latent) @ w_v.transpose(-2, -1)
        if self.c_kv_up.bias is not None:  # the keys' bias adds the same to all scores of a query: softmax drops it
            y = y + self.c_kv_up.bias[self.key_rows :].unflatten(0, (self.n_head, self.n_value))[:, None]
        return y.transpose(1, 2), weights

    def absorbs(self, T: int, visible: Tensor | None) -> bool:
        """True where T queries over cached latents cost less in latent space, and give the same there."""
        r, kv = self.n_latent, self.n_nope + self.n_value
        pays = T * (2 * r - kv) < r * kv  # otherwise computing all keys and values takes fewer operations
        causal = visible is not None or T == 1  # absorbed attention has no causal mask of its own
        own = self.config._attn_implementation in ('eager', 'sdpa')  # another function is to be called
        return pays and causal and own and not self.training and is_plain(self.c_kv_up)

    def forward(self, x: Tensor, rope: Any, visible: Tensor | None, S: int, cache: Any) -> Any:
        """x (B, T, C), the last T of S tokens -> (B, T, C), and the weights (B, H, T, S) where they are computed."""
        q, latent, k_rope = self.project(x, rope)
        if cache is not None:
            latent, k_rope = (part[:, :, :S] for part in cache.update(latent, k_rope, self.layer))
        attend = self.absorbed if cache is not None and self.absorbs(q.size(2), visible) else self.decompressed
        y, weights = attend(q, latent, k_rope, visible)
        return self.resid_dropout(self.c_proj(y.flatten(2))), weights


class MLP(nn.Module):
    """Linear to 4C, GELU, linear back to C."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate='tanh' if config.gelu == 'tanh' else 'none')
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(GradientCheckpointingLayer):
    """Attention, then MLP; each reads the normed residual stream and adds to it."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: Any, visible: Tensor | None, S: int, cache: Any) -> Any:
        y, weights = self.attn(self.ln_1(x), rope, visible, S, cache)
        x = x + y
        return x + self.mlp(self.ln_2(x)), weights


class MLAGPTPreTrainedModel(PreTrainedModel):
    """What the classes below have in common."""

    config_class = MLAGPTConfig
    base_model_prefix = 'transformer'
    supports_gradient_checkpointing = True
    _input_embed_layer = 'wte'
    _no_split_modules = ['Block']
    _supports_sdpa = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ['past_key_values', 'cache']


class MLAGPTModel(MLAGPTPreTrainedModel):
    """The model without a head: token ids to hidden states."""

    def __init__(self, config: MLAGPTConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.pos == 'learned':
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        Token ids (B, T) -> last_hidden_state (B, T, C), normed, and the cache.

        attention_mask: see `visible_keys`; it covers the cached tokens too. By default, positions count the tokens of
        a (B, S) mask, so padding takes no position, and are consecutive otherwise. Without a mask and a cache,
        position_ids that restart separate documents (see `packed_documents`). On demand also hidden_states, the
        embeddings and each layer's output (the last one normed), and attentions (attn_implementation='eager'). cache is
        another name of past_key_values. ValueError for more than block_size tokens.
        """
        config, eager = self.config, self.config._attn_implementation == 'eager'
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        if output_attentions and not eager:
            raise ValueError("output_attentions requires attn_implementation='eager'")
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError('pass either input_ids or inputs_embeds')
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        mask, T = attention_mask, x.size(1)
        cache = past_key_values if cache is None else cache
        packed = None
        if mask is None and cache is None and position_ids is not None:
            mask = packed = packed_documents(position_ids)
        use_cache = config.use_cache and not self.training if use_cache is None else use_cache
        if self.training and self.is_gradient_checkpointing:
            use_cache, cache = False, None  # a block that is computed again would append to the cache again
        if use_cache and cache is None:
            cache = DynamicCache()
        past = 0 if cache is None else cache.get_seq_length()  # a tensor in caches of fixed length
        if not torch.compiler.is_compiling():
            length = int(past) + T
            if packed is not None and position_ids is not None:
                length = int(position_ids.max()) + 1  # of the longest document
            if length > config.block_size:
                raise ValueError(f"{length} tokens don't fit; the model's block_size is {config.block_size}")
            if past:
                check_cached_latents(cache, config)
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
        rope = rope_angles(position_ids, config.n_rope, config.rope_theta) if config.pos == 'rope' else None
        if config.pos == 'learned':
            x = x + self.wpe(position_ids)
        x = self.drop(x)
        visible = visible_keys(mask, past, T, S, x.device)
        hidden, attentions = [], []
        for block in self.h:
            if output_hidden_states:
                hidden.append(x)
            x, weights = block(x, rope, visible, S, cache)
            if output_attentions:
                attentions.append(weights)
        x = self.ln_f(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            **{CACHE: cache if use_cache else None},
            hidden_states=(*hidden, x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


class MLAGPTForCausalLM(MLAGPTPreTrainedModel, GenerationMixin):
    """The model with an output head that is tied to the token embedding."""

    _tied_weights_keys = {'lm_head.weight': 'transformer.wte.weight'}

    def __init__(self, config: MLAGPTConfig):
        super().__init__(config)
        self.transformer = MLAGPTModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.loss_function = causal_lm_loss
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Token ids (B, T) -> logits (B, T, V), the loss if there are labels, and what else MLAGPTModel gives."""
        cache = past_key_values if cache is None else cache
        inputs = input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache
        out = self.transformer(*inputs, return_dict=True, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.lm_head(out.last_hidden_state[:, kept]), None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(out, CACHE)},
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    @property
    def init_continuous_batching(self) -> None:  # type: ignore[override]
        """Not there: `transformers serve` asks by hasattr, and then generates one request at a time."""
        raise AttributeError

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """NotImplementedError: the pages of continuous batching hold every head's keys and values, not latents."""
        raise NotImplementedError('a cache of latents has no continuous batching: use generate() with left padding')


class MLAGPTForSequenceClassification(GenericForSequenceClassification, MLAGPTPreTrainedModel):
    """The model with a linear classifier of each sequence's last token."""

    base_model_prefix = 'transformer'

    def __init__(self, config: MLAGPTConfig):
        MLAGPTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.transformer = MLAGPTModel(config)
        self.score = nn.Linear(config.n_embd, self.num_labels, bias=False)
        self.post_init()
