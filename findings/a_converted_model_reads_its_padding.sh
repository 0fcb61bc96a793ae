#!/usr/bin/env bash
# A Llama that cacheshrink turned into latent attention, exactly, continues a prompt as before, but not a padded one.
#
# Libraries: cacheshrink 0.1.5, transformers 5.23.0, torch 2.13.0, numpy 2.4.6 (Python 3.11 or later).
# What was done: a random Llama is converted at a compression ratio of 1, where the latents are as wide as the keys and
#   values and nothing is lost. Original and conversion continue a prompt greedily: alone, and with five tokens of
#   padding before it and an attention mask, as it stands in a batch beside a longer prompt.
# What one would guess: both continue it alike in all cases, since the conversion is exact; or padding is refused.
# What happens: the padded prompt gets another continuation, without a warning, for two reasons. By default transformers
#   hands each layer a mask of booleans for the fused kernel, and the converted layer adds it to the scores, where true
#   is 1 and false 0: padding is attended. With attention written out ("eager") the mask is one of numbers, and the
#   prompt is read right. But then, in each step with a cache, the queries have the positions that the mask gives them
#   and the cached keys are rotated as if padding counted. Only both changes together, attention written out and no
#   cache, give the right text.
#
# Output seen (the continuation's tokens):
#                            the original                 converted
#   alone                    48 48 26 15 23 15 23 62      48 48 26 15 23 15 23 62
#   padded                   48 48 26 15 23 15 23 62      19 31 32 59 55 23 57 43
#   padded, no cache         48 48 26 15 23 15 23 62      19 23 28 21 51 23 23 23
#   padded, eager            48 48 26 15 23 15 23 62      48 26 15 23 51 56 23 57
#   padded, eager, no cache  48 48 26 15 23 15 23 62      48 48 26 15 23 15 23 62
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check \
    'torch==2.13.0' 'transformers==5.23.0' 'cacheshrink==0.1.5' 'numpy==2.4.6'

cat > "$folder/probe.py" <<'PYTHON'
"""Continues a prompt, alone and padded, with a random Llama and with its exact conversion."""

import sys
import warnings

import tokenizers
import torch
import transformers
from cacheshrink import convert_to_mla

warnings.simplefilter('ignore')
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
FOLDER, VOCABULARY, PROMPT, PADDING, NEW = sys.argv[1], 64, 12, 5, 8

torch.manual_seed(0)
settings = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
settings |= dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=None, eos_token_id=None)
original = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()
with torch.no_grad():
    for parameter in original.parameters():
        parameter += 0.15 * torch.randn(parameter.shape)
original.save_pretrained(FOLDER)
words = tokenizers.models.WordLevel({f'w{i}': i for i in range(VOCABULARY)}, unk_token='w1')
transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer(words), unk_token='w1', pad_token='w0'
).save_pretrained(FOLDER)
converted, _ = convert_to_mla(
    FOLDER, compression_ratio=1.0, device='cpu', dtype=torch.float32, use_calibration=False, verbose=False
)

prompt = torch.randint(2, VOCABULARY, (1, PROMPT))
padded = torch.cat((torch.zeros(1, PADDING, dtype=torch.int64), prompt), dim=1)
mask = (torch.arange(PADDING + PROMPT) >= PADDING).long()[None]


def continued(model, attention, ids, mask, use_cache):
    model.set_attn_implementation(attention)
    keys = dict(attention_mask=mask, use_cache=use_cache, max_new_tokens=NEW, do_sample=False)
    return model.eval().generate(ids, **keys)[0, ids.size(1) :].tolist()


cases = {
    'alone': ('sdpa', prompt, torch.ones_like(prompt), True),
    'padded': ('sdpa', padded, mask, True),
    'padded, no cache': ('sdpa', padded, mask, False),
    'padded, eager': ('eager', padded, mask, True),
    'padded, eager, no cache': ('eager', padded, mask, False),
}
found = {name: (continued(original, *case), continued(converted.eval(), *case)) for name, case in cases.items()}
print(f'{"":24} {"the original":28} converted')
for name, both in found.items():
    first, second = (' '.join(map(str, tokens)) for tokens in both)
    print(f'{name:24} {first:28} {second}')
assert len({tuple(first) for first, _ in found.values()}) == 1
same = [name for name, (first, second) in found.items() if first == second]
assert same == ['alone', 'padded, eager, no cache'], 'the behavior has changed'
PYTHON

"$python" "$folder/probe.py" "$folder/model" 2> "$folder/errors" || { cat "$folder/errors"; exit 1; }
