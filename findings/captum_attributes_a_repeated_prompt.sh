#!/usr/bin/env bash
# With transformers 5.23.0, captum's LLMAttribution gives the model the prompt again behind the cached one, every step.
#
# Libraries: captum 0.9.0 with transformers 4.57.6 and 5.23.0, torch 2.13.0, numpy 2.4.6 (Python 3.11 or later).
# What was done: FeatureAblation attributes a target of three tokens to a prompt of four, on a small random GPT-2, once
#   with use_cached_outputs=True (the default) and once with False.
# What one would guess: a cache saves time; the attributions are equal to rounding.
# What happens: they are equal under 4.57.6. Under 5.23.0 they differ by 2.5, where the largest true attribution is
#   4.3; one even changes its sign, and the target's log-probability is off by one. prepare_inputs_for_generation no
#   longer cuts the tokens that the cache holds: it cuts when it is told next_sequence_length, which captum doesn't do.
#   So the whole sequence follows its own cached copy at later positions, without an error or a warning.
#
# Output seen:
#   transformers 4.57.6
#     one forward pass: log-probability of the target -7.3906
#     use_cached_outputs=False: log-probability -7.3906, attributions [4.2807, 2.3174, 0.6579, 0.7941]
#       (tokens given, tokens in the cache): [(4, 0), (5, 0), (6, 0)]
#     use_cached_outputs=True: log-probability -7.3906, attributions [4.2807, 2.3174, 0.6579, 0.7941]
#       (tokens given, tokens in the cache): [(4, 0), (1, 4), (1, 5)]
#     largest difference between the attributions: 0.00001
#   transformers 5.23.0
#     one forward pass: log-probability of the target -7.3906
#     use_cached_outputs=False: log-probability -7.3906, attributions [4.2807, 2.3174, 0.6579, 0.7941]
#       (tokens given, tokens in the cache): [(4, 0), (5, 0), (6, 0)]
#     use_cached_outputs=True: log-probability -8.4125, attributions [4.5498, 1.8261, 3.1881, -0.031]
#       (tokens given, tokens in the cache): [(4, 0), (5, 4), (6, 9)]
#     largest difference between the attributions: 2.53020
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check \
    'torch==2.13.0' 'captum==0.9.0' 'transformers==4.57.6' 'numpy==2.4.6'

cat > "$folder/probe.py" <<'PYTHON'
"""Attributes a target of three tokens to a prompt of four, with captum's cache (its default) and without."""

import math
import sys

import torch
import transformers
from captum.attr import FeatureAblation, LLMAttribution, TextTokenInput
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

print('transformers', transformers.__version__)
words = Tokenizer(models.WordLevel({f'w{i}': i for i in range(50)}, unk_token='w0'))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token='w0')
torch.manual_seed(0)
config = GPT2Config(
    vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.5, bos_token_id=0, eos_token_id=0
)
model = GPT2LMHeadModel(config).eval()
calls = []  # (tokens given, tokens in the cache), one pair per call
plain_forward = model.forward


def forward(*args, **kwargs):
    cache = kwargs.get('past_key_values')
    calls.append((kwargs['input_ids'].shape[1], 0 if cache is None else cache.get_seq_length()))
    return plain_forward(*args, **kwargs)


model.forward = forward
prompt, target = 'w3 w14 w15 w9', 'w7 w21 w4'
ids = tokenizer(f'{prompt} {target}', return_tensors='pt').input_ids
with torch.no_grad():
    log_probs = plain_forward(ids).logits[0].log_softmax(-1)
total = sum(log_probs[i - 1, ids[0, i]].item() for i in (4, 5, 6))
print(f'  one forward pass: log-probability of the target {total:.4f}')

results = {}
probabilities = []  # of the whole target; the first is that of the prompt as it stands
for use_cache in (False, True):
    calls.clear()
    probabilities.clear()
    attribution = LLMAttribution(FeatureAblation(model), tokenizer)
    result = attribution.attribute(
        TextTokenInput(prompt, tokenizer),
        target,
        use_cached_outputs=use_cache,
        _inspect_forward=lambda prompt, target, values: probabilities.append(values[0]),
    )
    results[use_cache] = result.seq_attr
    print(f'  use_cached_outputs={use_cache}: log-probability {math.log(probabilities[0]):.4f},', end=' ')
    print('attributions', [round(value, 4) for value in result.seq_attr.tolist()])
    print('    (tokens given, tokens in the cache):', calls[:3])
difference = (results[True] - results[False]).abs().max().item()
print(f'  largest difference between the attributions: {difference:.5f}')
if sys.argv[1] == 'equal':
    assert difference < 1e-3 and calls[:3] == [(4, 0), (1, 4), (1, 5)], 'the behavior has changed'
else:
    assert difference > 0.5 and calls[:3] == [(4, 0), (5, 4), (6, 9)], 'the behavior has changed'
PYTHON

"$python" "$folder/probe.py" 'equal'
"$python" -m pip install --quiet --disable-pip-version-check 'transformers==5.23.0'
"$python" "$folder/probe.py" 'different'
