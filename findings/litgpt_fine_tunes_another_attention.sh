#!/usr/bin/env bash
# LoRA and adapters of LitGPT put ordinary attention into a model with latent attention, with random weights.
#
# Libraries: litgpt 0.5.13, torch 2.13.0 (Python 3.11 or later).
# What was done: two tiny models of litgpt.GPT with random weights, one with ordinary and one with latent attention
#   (`latent_attention` of its Config). Their weights are loaded into the GPT classes of litgpt.lora, litgpt.adapter and
#   litgpt.adapter_v2 with strict=False, as LitGPT's fine-tuning commands load a checkpoint. Fresh LoRA weights and
#   adapters change nothing, so all logits must be those of the model itself. Then its cache is made.
# What one would guess: the same logits, or an error that latent attention isn't supported.
# What happens: for ordinary attention the logits are the same. For latent attention the blocks of all three classes have
#   an ordinary attention layer, whose weights no checkpoint holds: it keeps its random ones, the trained factors are left
#   aside, and strict=False hides both. Fine-tuning begins at the logits of another model.
#   The cache of litgpt.GPT itself, too, is not what one guesses: keys and values of every head, and not the latent.
#
# Output seen:
#   ordinary: cached numbers per token 128
#     lora: CausalSelfAttention, 0 attention weights left aside; logits differ by 0.000
#     adapter: CausalSelfAttention, 0 attention weights left aside; logits differ by 0.000
#     adapter_v2: CausalSelfAttention, 0 attention weights left aside; logits differ by 0.000
#   latent: cached numbers per token 160
#     lora: CausalSelfAttention, 12 attention weights left aside; logits differ by 7.240
#     adapter: CausalSelfAttention, 12 attention weights left aside; logits differ by 7.382
#     adapter_v2: CausalSelfAttention, 12 attention weights left aside; logits differ by 8.547
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check 'torch==2.13.0' 'litgpt==0.5.13' 'numpy==2.4.6'

cat > "$folder/probe.py" <<'PYTHON'
"""Compares litgpt.GPT with its classes for fine-tuning, before any training."""

import litgpt
import litgpt.adapter
import litgpt.adapter_v2
import litgpt.lora
import torch

SIZES = dict(name='tiny', block_size=32, n_layer=2, n_embd=64, n_head=4, n_query_groups=4, padded_vocab_size=64)
SIZES |= dict(norm_class_name='RMSNorm', mlp_class_name='LLaMAMLP', intermediate_size=128, bias=False)
SIZES |= dict(parallel_residual=False, rotary_percentage=1.0)
FACTORS = dict(q_lora_rank=32, kv_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16)
LORA = dict(lora_r=4, lora_query=True, lora_value=True)
idx = torch.arange(12)[None]


@torch.no_grad()
def probe(name, **more):
    """Print what becomes of a model's logits and attention in each class; returns whether all stay the same."""
    torch.manual_seed(0)
    model = litgpt.GPT(litgpt.Config(**SIZES, **more))
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.2)
    logits, same, lines = model(idx), [], []
    for place, keys in ((litgpt.lora, LORA), (litgpt.adapter, {}), (litgpt.adapter_v2, {})):
        tuned = place.GPT(place.Config(**SIZES, **more, **keys))
        found = tuned.load_state_dict(model.state_dict(), strict=False)
        kind, aside = type(tuned.transformer.h[0].attn).__name__, [key for key in found.unexpected_keys if 'attn' in key]
        error = (tuned(idx) - logits).abs().max().item()
        where = place.__name__.split('.')[1]
        lines.append(f'  {where}: {kind}, {len(aside)} attention weights left aside; logits differ by {error:.3f}')
        same.append(error < 1e-4 and not aside)
    model.set_kv_cache(1)
    cache = model.transformer.h[0].attn.kv_cache
    cached = sum(part[0, :, 0].numel() for part in (cache.k, cache.v))
    print(f'{name}: cached numbers per token {cached}', *lines, sep='\n')
    return same, cached


assert probe('ordinary') == ([True] * 3, 4 * (16 + 16)), 'the behavior has changed'
assert probe('latent', latent_attention=FACTORS) == ([False] * 3, 4 * (24 + 16)), 'the behavior has changed'
PYTHON

"$python" "$folder/probe.py" 2> "$folder/notices" || { cat "$folder/notices"; exit 1; }
