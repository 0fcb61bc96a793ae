#!/usr/bin/env bash
# torchao's int8 leaves the experts of a DeepSeek-V3 in float since transformers 5: most of the model, without a word.
#
# Libraries: torchao 0.18.0 with transformers 4.57.6 and 5.23.0, torch 2.13.0, numpy 2.4.6 (Python 3.11 or later).
# What was done: quantize_(model, Int8WeightOnlyConfig()), torchao's weight-only int8, on tiny random models with 16
#   experts in their second layer: DeepSeek-V3 and Qwen3-MoE. Then the numbers of parameters by what holds them.
# What one would guess: all matrices but the embedding and the router are in int8 afterward, under either release.
# What happens: under 4.57.6 they are. Under 5.23.0 the shared expert and attention are, and the routed experts are not:
#   transformers keeps them in two parameters of three dimensions per layer instead of linear layers, and quantize_
#   looks for linear layers. Of the numbers that were in int8, seven in ten or more stay in float32; in the published
#   models the routed experts are nearly everything. Nothing warns.
#
# Output seen:
#   transformers 4.57.6
#     deepseek_v3: routed experts: 100% of 196,608 numbers in int8
#     deepseek_v3: everything else:  94% of 87,520 numbers in int8
#     qwen3_moe: routed experts: 100% of 196,608 numbers in int8
#     qwen3_moe: everything else:  93% of 66,944 numbers in int8
#   transformers 5.23.0
#     deepseek_v3: routed experts:   0% of 196,608 numbers in int8
#     deepseek_v3: everything else:  94% of 87,520 numbers in int8
#     qwen3_moe: routed experts:   0% of 196,608 numbers in int8
#     qwen3_moe: everything else:  92% of 66,944 numbers in int8
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check \
    'torch==2.13.0' 'torchao==0.18.0' 'transformers==4.57.6' 'numpy==2.4.6'

cat > "$folder/probe.py" <<'PYTHON'
"""Counts what torchao's weight-only int8 leaves in float, in models with experts."""

import sys

import torch
import transformers
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoConfig, AutoModelForCausalLM

SHAPE = dict(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
SHAPE |= dict(intermediate_size=128, moe_intermediate_size=64, num_experts_per_tok=2)
LATENT = dict(kv_lora_rank=32, q_lora_rank=48, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16)
LATENT |= dict(n_routed_experts=16, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1)
MODELS = {
    'deepseek_v3': SHAPE | LATENT,
    'qwen3_moe': SHAPE | dict(num_experts=16, head_dim=16, mlp_only_layers=[0]),
}
print('transformers', transformers.__version__)
for kind, settings in MODELS.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    quantize_(model, Int8WeightOnlyConfig())
    named = [(name, p, type(p) is not torch.nn.Parameter) for name, p in model.named_parameters()]
    experts = [(p.numel(), few) for name, p, few in named if '.experts.' in name]
    others = [(p.numel(), few) for name, p, few in named if '.experts.' not in name]
    shares = []
    for what, found in (('routed experts', experts), ('everything else', others)):
        total = sum(count for count, _ in found)
        shares.append(sum(count for count, few in found if few) / total)
        print(f'  {kind}: {what}: {shares[-1]:4.0%} of {total:,} numbers in int8')
    assert shares[0] == float(sys.argv[1]), 'the behavior has changed'
    assert shares[1] > 0.8, 'the behavior has changed'
PYTHON

"$python" "$folder/probe.py" 1 2> "$folder/notices" || { cat "$folder/notices"; exit 1; }
"$python" -m pip install --quiet --disable-pip-version-check 'transformers==5.23.0'
"$python" "$folder/probe.py" 0 2> "$folder/notices" || { cat "$folder/notices"; exit 1; }
