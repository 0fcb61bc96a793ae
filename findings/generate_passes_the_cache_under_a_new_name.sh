#!/usr/bin/env bash
# generate() of transformers 5.24.0 hands the cache to a model class of your own under a new name, and nothing fails.
#
# Libraries: transformers 5.23.0 and 5.24.0, torch 2.13.0, numpy 2.4.6 (Python 3.11 or later).
# What was done: a small PreTrainedModel with GenerationMixin, written as model code outside the library usually is, has
#   forward(input_ids, past_key_values=None, use_cache=None, **kwargs), and makes a DynamicCache when it gets none. Both
#   versions generate 12 tokens greedily from the same weights and the same prompt.
# What one would guess: a minor release that renames an argument still serves the old name, all the more as the output
#   class accepts `past_key_values` (5.24.0 renames it and logs one deprecation warning); at worst there is an error.
# What happens: 5.24.0 passes the cache as `cache`. Outputs have a fallback for the old name, inputs have none, so the
#   cache ends in **kwargs, the model starts an empty one at every step, and each token is continued from itself alone.
#   The text is wrong from the second token on. It is right with use_cache=False, and where forward's argument is named
#   `cache`.
#
# Output seen:
#   transformers 5.23.0
#     whole sequence every time: [39, 43, 10, 3, 10, 27, 48, 6, 27, 27, 33, 40]
#     generate, use_cache=False: [39, 43, 10, 3, 10, 27, 48, 6, 27, 27, 33, 40]
#     generate, with the cache:  [39, 43, 10, 3, 10, 27, 48, 6, 27, 27, 33, 40]
#     (tokens given, tokens in the cache) of the first calls: [(6, 0), (1, 6), (1, 7), (1, 8)]
#   transformers 5.24.0
#   [transformers] `past_key_values`/`cache_params` are deprecated. Use `cache` instead.
#     whole sequence every time: [39, 43, 10, 3, 10, 27, 48, 6, 27, 27, 33, 40]
#     generate, use_cache=False: [39, 43, 10, 3, 10, 27, 48, 6, 27, 27, 33, 40]
#     generate, with the cache:  [39, 27, 16, 20, 33, 10, 10, 10, 10, 10, 10, 10]
#     (tokens given, tokens in the cache) of the first calls: [(6, 0), (1, 0), (1, 0), (1, 0)]
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check 'torch==2.13.0' 'transformers==5.23.0' 'numpy==2.4.6'

cat > "$folder/probe.py" <<'PYTHON'
"""Generates 12 tokens with a small model of its own class and compares them with a decoding that needs no cache."""

import sys

import torch
import transformers
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class TinyConfig(PreTrainedConfig):
    model_type = 'tiny-attention'
    num_hidden_layers = 1
    vocab_size = 50
    hidden_size = 32
    num_heads = 4


class TinyLM(PreTrainedModel, GenerationMixin):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        C = config.hidden_size
        self.token = nn.Embedding(config.vocab_size, C)
        self.position = nn.Embedding(64, C)
        self.qkv = nn.Linear(C, 3 * C)
        self.head = nn.Linear(C, config.vocab_size)
        self.calls = []  # (tokens given, tokens found in the cache), one pair per call
        self.post_init()

    def forward(self, input_ids, past_key_values=None, use_cache=None, **kwargs):
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        B, T = input_ids.shape
        self.calls.append((T, past))
        x = self.token(input_ids) + self.position(past + torch.arange(T))
        q, k, v = self.qkv(x).view(B, T, 3, self.config.num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, d) each
        if use_cache:
            past_key_values = DynamicCache() if past_key_values is None else past_key_values
            k, v = past_key_values.update(k, v, 0)
        visible = torch.ones(T, past + T, dtype=torch.bool).tril(past)
        y = scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2).flatten(2)
        return CausalLMOutputWithPast(logits=self.head(y), past_key_values=past_key_values)


print('transformers', transformers.__version__)
torch.manual_seed(0)
model = TinyLM(TinyConfig()).eval()
for weight in (model.token.weight, model.position.weight, model.qkv.weight, model.head.weight):
    nn.init.normal_(weight, std=0.5)
prompt = torch.tensor([[3, 14, 15, 9, 26, 5]])

whole = prompt
with torch.no_grad():
    for _ in range(12):
        whole = torch.cat([whole, model(whole).logits[:, -1:].argmax(-1)], dim=1)
model.calls.clear()
generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
calls = model.calls[:4]
uncached = model.generate(
    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, use_cache=False
)

print('  whole sequence every time:', whole[0, 6:].tolist())
print('  generate, use_cache=False:', uncached[0, 6:].tolist())
print('  generate, with the cache: ', generated[0, 6:].tolist())
print('  (tokens given, tokens in the cache) of the first calls:', calls)
assert torch.equal(uncached, whole), 'generate without a cache used to agree with the whole sequence'
if sys.argv[1] == 'cache arrives':
    assert torch.equal(generated, whole) and calls == [(6, 0), (1, 6), (1, 7), (1, 8)], 'the behavior has changed'
else:
    assert not torch.equal(generated, whole) and calls == [(6, 0), (1, 0), (1, 0), (1, 0)], 'the behavior has changed'
PYTHON

"$python" "$folder/probe.py" 'cache arrives'
"$python" -m pip install --quiet --disable-pip-version-check 'transformers==5.24.0'
"$python" "$folder/probe.py" 'cache is lost'
