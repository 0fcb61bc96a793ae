#!/usr/bin/env bash
# Decoupled RoPE in x-transformers belongs to whole heads: the other heads of its latent attention see no order at all.
#
# Libraries: x-transformers 2.31.10, transformers 5.23.0, torch 2.13.0 (Python 3.11 or later).
# What was done: one layer of latent attention with four heads, random weights, in x-transformers with one, two and three
#   of its `attn_latent_rope_subheads` and in transformers as DeepSeek-V3. A sequence of 12 tokens is read twice, the
#   second time with its first 11 in another order. A head that sees no order gives each token the weight that it had.
# What one would guess: as in the paper that both cite (arXiv:2405.04434), every head's logit is a sum of a content part,
#   whose key comes from the latent, and a rotated part, and the rotated key is shared by all heads.
# What happens: so it is in transformers. In x-transformers a rotated head is an ordinary head with RoPE, whose key comes
#   from the input and not from the latent, and the others have no positions: with one of four, three heads give the
#   same weights in any order, to rounding. The cache grows by a whole head's keys for each rotated head.
#
# Output seen:
#   x-transformers, 1 rotated of 4: cached numbers per token 24 + 16; heads that see no order: [0, 1, 2]
#   x-transformers, 2 rotated of 4: cached numbers per token 24 + 32; heads that see no order: [0, 1]
#   x-transformers, 3 rotated of 4: cached numbers per token 24 + 48; heads that see no order: [0]
#   transformers, DeepSeek-V3, 16 rotated dimensions: heads that see no order: []
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check \
    'torch==2.13.0' 'x-transformers==2.31.10' 'transformers==5.23.0' 'numpy==2.4.6'

cat > "$folder/probe.py" <<'PYTHON'
"""Names the heads whose attention doesn't depend on the order of the tokens."""

import torch
import transformers
from x_transformers import Decoder, TransformerWrapper

torch.manual_seed(0)
tokens = torch.randint(64, (1, 12))
order = torch.cat((torch.randperm(11), torch.tensor([11])))


def blind(attention):
    """The heads whose last row stays with its tokens. attention: of token ids, the pattern (1, heads, 12, 12)."""
    before, after = (attention(ids)[0, :, -1] for ids in (tokens, tokens[:, order]))
    return [head for head, error in enumerate((before[:, order] - after).abs().amax(-1)) if error < 1e-6]


@torch.no_grad()
def x_transformers(rotated):
    """A layer with so many rotated heads: its heads that see no order."""
    sizes = dict(attn_use_latent_q=True, attn_dim_latent_q=32, attn_use_latent_kv=True, attn_dim_latent_kv=24)
    layers = Decoder(dim=64, depth=1, heads=4, attn_dim_head=16, rotary_pos_emb=True,
                     attn_latent_rope_subheads=rotated, **sizes)
    model = TransformerWrapper(num_tokens=64, max_seq_len=64, use_abs_pos_emb=False, attn_layers=layers)
    model = model.double().eval()

    def layer(ids):
        return model(ids, return_intermediates=True)[1].attn_intermediates[0]

    found = blind(lambda ids: layer(ids).post_softmax_attn)
    latent, keys = layer(tokens).cached_kv
    cached = f'{latent.shape[-1]} + {keys.shape[1] * keys.shape[-1]}'
    print(f'x-transformers, {rotated} rotated of 4: cached numbers per token {cached}; heads that see no order: {found}')
    return found


@torch.no_grad()
def deepseek():
    """The same of transformers' DeepSeek-V3."""
    config = transformers.DeepseekV3Config(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, first_k_dense_replace=1,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=24, qk_nope_head_dim=16,
        qk_rope_head_dim=16, v_head_dim=16, initializer_range=0.2, attn_implementation='eager',
    )
    model = transformers.DeepseekV3ForCausalLM(config).double().eval()
    found = blind(lambda ids: model(ids, output_attentions=True).attentions[0])
    print(f'transformers, DeepSeek-V3, 16 rotated dimensions: heads that see no order: {found}')
    return found


for rotated in (1, 2, 3):
    assert x_transformers(rotated) == list(range(4 - rotated)), 'the behavior has changed'
assert deepseek() == [], 'the behavior has changed'
PYTHON

"$python" "$folder/probe.py" 2> "$folder/notices" || { cat "$folder/notices"; exit 1; }
