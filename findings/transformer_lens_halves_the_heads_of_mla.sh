#!/usr/bin/env bash
# In TransformerLens 4.3, hook_z of a DeepSeek model has twice as many heads as its patterns: each is half of one.
#
# Libraries: transformer-lens 4.3.0, transformers 5.23.0, torch 2.13.0, numpy 2.4.6 (Python 3.11 or later).
# What was done: tiny random models, a Llama, a DeepSeek-V2 and a DeepSeek-V3 with the published proportions (values
#   twice as wide as the rotated part), run in a TransformerBridge. Then index 2 of hook_z, head by head, is set to zero,
#   as one ablates head 2, and the change of the logits is compared with that of a model whose output projection lacks
#   the columns of head 2, or of a half of head 1.
# What one would guess: hook_z is (batch, position, heads, value width), and index 2 is head 2 of the patterns.
# What happens: it is for Llama. For both DeepSeek classes hook_pattern has 4 heads and hook_z has 8, each as wide as the
#   rotated part, to which these classes set head_dim. Index 2 is the first half of head 1. A loop over cfg.n_heads
#   ablates halves of the first half of the heads, and never touches the others; nothing warns.
#
# Output seen:
#   llama: heads 4; hook_pattern (1, 4, 20, 20), hook_z (1, 20, 4, 32)
#     hook_z[:, :, 2] set to zero, and head 2 removed: logits differ by 0.00000
#     hook_z[:, :, 2] set to zero, and the first half of head 1 removed: logits differ by 1.85430
#   deepseek_v2: heads 4; hook_pattern (1, 4, 20, 20), hook_z (1, 20, 8, 16)
#     hook_z[:, :, 2] set to zero, and head 2 removed: logits differ by 1.59748
#     hook_z[:, :, 2] set to zero, and the first half of head 1 removed: logits differ by 0.00001
#   deepseek_v3: heads 4; hook_pattern (1, 4, 20, 20), hook_z (1, 20, 8, 16)
#     hook_z[:, :, 2] set to zero, and head 2 removed: logits differ by 1.76744
#     hook_z[:, :, 2] set to zero, and the first half of head 1 removed: logits differ by 0.00000
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check \
    'torch==2.13.0' 'transformer-lens==4.3.0' 'transformers==5.23.0' 'numpy==2.4.6'

cat > "$folder/probe.py" <<'PYTHON'
"""Ablates index 2 of hook_z in three models, and says which part of the output projection that was."""

import copy
import os
import sys

os.environ['HF_HUB_OFFLINE'] = '1'

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge

SHAPE = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
SHAPE |= dict(num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.2)
LATENT = dict(kv_lora_rank=32, q_lora_rank=48, qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=32)
LATENT |= dict(first_k_dense_replace=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1)
LATENT |= dict(moe_intermediate_size=64, n_shared_experts=1)
words = Tokenizer(models.WordLevel({f'w{i}': i for i in range(64)}, unk_token='w0'))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token='w0', bos_token='w1', eos_token='w2')
torch.manual_seed(0)
tokens = torch.randint(64, (1, 20))


def without(model, first, last):
    """The logits of the model without columns `first` to `last` of layer 1's output projection."""
    model = copy.deepcopy(model)
    model.model.layers[1].self_attn.o_proj.weight[:, first:last] = 0
    return model(tokens).logits


@torch.no_grad()
def probe(kind, settings, width):
    """Print what hook_z shows of a model whose heads have values of `width` numbers; the part that index 2 is."""
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **settings)).eval()
    place = os.path.join(sys.argv[1], kind)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    bridge = TransformerBridge.boot_transformers(place, device='cpu')
    logits, cache = bridge.run_with_cache(tokens)
    pattern, z = cache['blocks.1.attn.hook_pattern'], cache['blocks.1.attn.hook_z']
    print(f'{kind}: heads {bridge.cfg.n_heads}; hook_pattern {tuple(pattern.shape)}, hook_z {tuple(z.shape)}')

    def zero(z, hook):
        z = z.clone()
        z[:, :, 2] = 0
        return z

    ablated = bridge.run_with_hooks(tokens, fwd_hooks=[('blocks.1.attn.hook_z', zero)])
    parts = {'head 2': (2 * width, 3 * width), 'the first half of head 1': (width, width + width // 2)}
    errors = {said: (ablated - without(model, *at)).abs().max().item() for said, at in parts.items()}
    for said, error in errors.items():
        print(f'  hook_z[:, :, 2] set to zero, and {said} removed: logits differ by {error:.5f}')
    assert (logits - model(tokens).logits).abs().max() < 1e-4, 'the bridge computes another model'
    return min(errors, key=errors.get), z.size(2)


assert probe('llama', SHAPE | dict(head_dim=32), 32) == ('head 2', 4), 'the behavior has changed'
for kind in ('deepseek_v2', 'deepseek_v3'):
    assert probe(kind, SHAPE | LATENT, 32) == ('the first half of head 1', 8), 'the behavior has changed'
PYTHON

"$python" "$folder/probe.py" "$folder" 2> "$folder/notices" || { cat "$folder/notices"; exit 1; }
