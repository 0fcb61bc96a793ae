#!/usr/bin/env bash
# LoRA on "all-linear" layers of a DeepSeek-V3 leaves out every dense MLP and the shared experts.
#
# Libraries: peft 0.21.2, transformers 5.23.0, torch 2.13.0, numpy 2.4.6 (Python 3.11 or later).
# What was done: peft adds LoRA to tiny models of random weights: a Llama, a DeepSeek-V3 whose layers are all dense, and
#   one with experts in its second layer; to all linear layers, and to the shared expert's three projections by name.
# What one would guess: "all-linear" means every linear layer but the head, as peft's documentation says and as it does
#   for the Llama; and a target with shared_experts in its name reaches the shared expert.
# What happens: since transformers 5 keeps routed experts as stacked parameters, peft renames targets called gate_proj,
#   up_proj, down_proj and gate in models of this family, whoever owns the name. The dense MLP's and the shared expert's
#   projections, which are linear layers still, are renamed with them and match nothing. A dense DeepSeek-V3 trains
#   adapters in its attention alone, and the shared expert's targets give an adapter to the routed experts instead.
#   peft warns of target parameters without a match where there are no experts, and of nothing where there are.
#   target_parameters with the full ending, such as mlp.gate_proj.weight, reaches what was left out.
#
# Output seen:
#   Llama, all-linear: attention 8 of 8, dense MLP 6 of 6
#   dense DeepSeek-V3, all-linear: attention 8 of 8, dense MLP 0 of 6
#   DeepSeek-V3 with experts, all-linear: attention 8 of 8, dense MLP 0 of 3, routed experts 1 of 1, router 1 of 1, shared expert 0 of 3
#   DeepSeek-V3 with experts, the shared expert: attention 0 of 8, dense MLP 0 of 3, routed experts 1 of 1, router 0 of 1, shared expert 0 of 3
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check \
    'torch==2.13.0' 'transformers==5.23.0' 'peft==0.21.2' 'numpy==2.4.6'

cat > "$folder/probe.py" <<'PYTHON'
"""Asks peft for LoRA on every linear layer, or on the shared expert, of tiny models, and counts what got it."""

import collections
import warnings

import peft
import torch
import transformers

warnings.simplefilter('ignore')
settings = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
settings |= dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
latents = dict(kv_lora_rank=32, q_lora_rank=None, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16)
experts = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, n_group=1, topk_group=1)
SHARED = [f'shared_experts.{name}_proj' for name in ('gate', 'up', 'down')]


def part_of(name):
    """Which part of the model a module belongs to."""
    words = {'self_attn': 'attention', 'shared_experts': 'shared expert', 'experts': 'routed experts'}
    words |= {'mlp.gate.': 'router', 'mlp': 'dense MLP'}
    return next((part for word, part in words.items() if word in f'{name}.'), None)


def adapted(model_class, config, targets):
    """{part: how many of its modules have an adapter, of how many}."""
    torch.manual_seed(0)
    model = model_class(config)
    own = [name for name, module in model.named_modules() if list(module.parameters(recurse=False))]
    every = collections.Counter(part_of(name) for name in own if part_of(name) and 'norm' not in name)
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, task_type='CAUSAL_LM'))
    with_lora = {name.split('.lora_')[0] for name, _ in tuned.named_parameters() if '.lora_' in name}
    found = collections.Counter(part_of(name) for name in {name.removesuffix('.base_layer') for name in with_lora})
    return {part: (found[part], every[part]) for part in every}


def deepseek(dense):
    config = transformers.DeepseekV3Config(**settings, **latents, **experts, first_k_dense_replace=dense)
    return transformers.DeepseekV3ForCausalLM, config


llama = transformers.LlamaForCausalLM, transformers.LlamaConfig(**settings)
results = []
for label, model, targets in (
    ('Llama, all-linear', llama, 'all-linear'),
    ('dense DeepSeek-V3, all-linear', deepseek(2), 'all-linear'),
    ('DeepSeek-V3 with experts, all-linear', deepseek(1), 'all-linear'),
    ('DeepSeek-V3 with experts, the shared expert', deepseek(1), SHARED),
):
    results.append(adapted(*model, targets))
    print(f'{label}:', ', '.join(f'{part} {n} of {of}' for part, (n, of) in results[-1].items()))
llama, dense, sparse, shared = results
assert llama['dense MLP'] == (6, 6)
changed = 'the behavior has changed'
assert dense['dense MLP'][0] == sparse['dense MLP'][0] == sparse['shared expert'][0] == 0, changed
assert shared['shared expert'][0] == 0 and shared['routed experts'] == (1, 1), changed
PYTHON

"$python" "$folder/probe.py"
