#!/usr/bin/env bash
# GPT-2 keeps packed documents apart only where nothing makes a cache, and making one is the default.
#
# Libraries: transformers 5.23.0, torch 2.13.0, numpy 2.4.6 (Python 3.11 or later).
# What was done: a small random GPT-2 without dropout gets two documents of 8 tokens in one row, with position_ids that
#   start again at 0 for the second. Its logits are compared with those of the second document alone.
# What one would guess: restarting position_ids decide by themselves whether the documents are apart (5.23.0 does detect
#   them), or else the training mode does; a mask of ones, with no token masked, is the same as no mask.
# What happens: the library looks for restarts only where it has neither an attention_mask nor a cache. GPT-2 makes an
#   empty cache in every forward pass unless told use_cache=False, in training mode too, so the second document sees the
#   first and its logits change by 11.8, without a warning. A mask of ones does the same. Activation checkpointing,
#   which should change memory and time alone, mends it, because it switches the cache off. In a training loop of one's
#   own, two runs that differ in this setting alone therefore train with different attention.
#
# Output seen (activation checkpointing also logs that it sets use_cache=False):
#   largest change in the logits of the second document
#     eval   position_ids alone                             11.81282
#     eval   use_cache=False                                0.00000
#     eval   use_cache=False, mask of ones                  11.81282
#     train  position_ids alone                             11.81282
#     train  use_cache=False                                0.00000
#     train  use_cache=False, mask of ones                  11.81282
#     train  position_ids alone, activation checkpointing   0.00000
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check 'torch==2.13.0' 'transformers==5.23.0' 'numpy==2.4.6'

cat > "$folder/probe.py" <<'PYTHON'
"""Gives GPT-2 two documents in one row and compares the second one's logits with those that it has alone."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

torch.manual_seed(0)
sizes = {'vocab_size': 50, 'n_positions': 32, 'n_embd': 32, 'n_layer': 2, 'n_head': 4}
no_dropout = {'resid_pdrop': 0.0, 'embd_pdrop': 0.0, 'attn_pdrop': 0.0}
config = GPT2Config(**sizes, **no_dropout, initializer_range=0.5, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config)
documents = torch.randint(50, (2, 8))
row = documents.reshape(1, 16)
restarting = torch.arange(8).repeat(2)[None]  # 0 to 7, then 0 to 7 again
ones = torch.ones_like(row)

changes = {}
with torch.no_grad():
    alone = model(documents[1:]).logits
    for mode in ('eval', 'train'):
        model.train(mode == 'train')
        for name, arguments in {
            'position_ids alone': {},
            'use_cache=False': {'use_cache': False},
            'use_cache=False, mask of ones': {'use_cache': False, 'attention_mask': ones},
        }.items():
            logits = model(row, position_ids=restarting, **arguments).logits[:, 8:]
            changes[mode, name] = (logits - alone).abs().max().item()
    model.activation_checkpointing_enable()
    logits = model(row, position_ids=restarting).logits[:, 8:]
    changes['train', 'position_ids alone, activation checkpointing'] = (logits - alone).abs().max().item()

print('largest change in the logits of the second document')
for (mode, name), change in changes.items():
    print(f'  {mode:5}  {name:45}  {change:.5f}')
separated = [key for key, change in changes.items() if change < 1e-3]
assert separated == [
    ('eval', 'use_cache=False'),
    ('train', 'use_cache=False'),
    ('train', 'position_ids alone, activation checkpointing'),
], 'the behavior has changed'
assert all(change > 1 for key, change in changes.items() if key not in separated), 'the behavior has changed'
PYTHON

"$python" "$folder/probe.py"
