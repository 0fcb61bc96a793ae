#!/usr/bin/env bash
# The norms of MLA's latents don't read rms_norm_eps: in every MLA class tried their epsilon is 1e-6, whatever it says.
#
# Libraries: transformers 5.23.0, torch 2.13.0, numpy 2.4.6 (Python 3.11 or later).
# What was done: tiny random models of five classes with multi-head latent attention are made with rms_norm_eps=1e-3, and
#   the epsilon of each kind of norm is printed. In the DeepSeek-V3, the latent norms are then given the epsilon of the
#   config, and the logits compared; once with a latent of rms 1 and once with the down-projection divided by 100, as
#   where weights are small.
# What one would guess: rms_norm_eps is the epsilon of all RMS norms of a model, since it is the only one in the config,
#   and since the norms before attention, before the MLP and at the end take it.
# What happens: kv_a_layernorm and q_a_layernorm are made without it and keep their class's default. DeepSeek's own
#   checkpoints say 1e-6, so nothing shows. A model that was trained with another epsilon, in code that uses one for all
#   norms, loads without a warning and gives other logits; it matters where the latent's mean square is not large beside
#   the epsilon.
#
# Output seen:
#   epsilons with rms_norm_eps=0.001       blocks   latents
#     DeepseekV2ForCausalLM                0.001    1e-06
#     DeepseekV3ForCausalLM                0.001    1e-06
#     MiniCPM3ForCausalLM                  0.001    1e-06
#     Glm4MoeLiteForCausalLM               0.001    1e-06
#     YoutuForCausalLM                     0.001    1e-06
#   largest change in DeepSeek-V3's logits, if the latent norms took the config's
#     latent of rms 1.00                   0.009
#     latent of rms 0.01                   5.231
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check 'torch==2.13.0' 'transformers==5.23.0' 'numpy==2.4.6'

cat > "$folder/probe.py" <<'PYTHON'
"""Prints the epsilons of RMS norms in MLA models, and what the latents' own would change."""

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

transformers.logging.set_verbosity_error()
EPSILON = 1e-3
SIZES = dict(
    vocab_size=50, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, first_k_dense_replace=2, max_position_embeddings=64, rms_norm_eps=EPSILON,
    bos_token_id=0, eos_token_id=0, pad_token_id=0, initializer_range=0.2,
)  # fmt: skip


def make(kind):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES)).eval()


def epsilon(norm):
    return getattr(norm, 'variance_epsilon', None) or norm.eps


found = {}
print(f'epsilons with rms_norm_eps={EPSILON:g}       blocks   latents')
for kind in ('deepseek_v2', 'deepseek_v3', 'minicpm3', 'glm4_moe_lite', 'youtu'):
    model = make(kind)
    layer = model.model.layers[0]
    blocks = {epsilon(layer.input_layernorm), epsilon(layer.post_attention_layernorm), epsilon(model.model.norm)}
    latents = {epsilon(layer.self_attn.kv_a_layernorm), epsilon(layer.self_attn.q_a_layernorm)}
    assert len(blocks) == len(latents) == 1
    found[kind] = (blocks.pop(), latents.pop())
    print(f'  {type(model).__name__:36} {found[kind][0]:<8g} {found[kind][1]:g}')

print("largest change in DeepSeek-V3's logits, if the latent norms took the config's")
tokens, changes = torch.randint(50, (2, 16)), []
for wanted in (1.0, 0.01):
    model = make('deepseek_v3')
    with torch.no_grad():
        for layer in model.model.layers:  # x has rms 1 after its norm, so the latent's rms is that of a row of W_D
            weight = layer.self_attn.kv_a_proj_with_mqa.weight[:16]
            weight *= wanted / weight.norm(dim=1, keepdim=True)
        before = model(tokens).logits
        for layer in model.model.layers:
            layer.self_attn.kv_a_layernorm.variance_epsilon = EPSILON
        changes.append((model(tokens).logits - before).abs().max().item())
    print(f'  latent of rms {wanted:.2f}                   {changes[-1]:.3f}')

assert all(pair == (EPSILON, 1e-6) for pair in found.values()), 'the behavior has changed'
assert changes[0] < 0.05 and changes[1] > 0.2, 'the behavior has changed'
PYTHON

"$python" "$folder/probe.py"
