#!/usr/bin/env bash
# In llama.cpp on a CPU, a cache in float32 is no more exact than one in float16, unless flash attention is turned off.
#
# Libraries: xllamacpp 2026.10.11549 (llama.cpp in a wheel), gguf 0.19.0, transformers 5.24.0, torch 2.13.0,
#   numpy 2.4.6 (Python 3.11 or later; Linux or macOS).
# What was done: a random Llama is written in float32 and asked for the next token's probabilities, with the cache in
#   float16 (the default) and in float32, and flash attention left to llama.cpp ("auto", the default) and disabled.
#   Errors are the largest difference of a log-probability from transformers in float64.
# What one would guess: float32 weights and a float32 cache give float32's rounding, some 1e-6; flash attention is
#   another order of the same sums, so it changes nothing that matters, and a cache in float16 costs some 1e-3.
# What happens: "auto" takes flash attention on a CPU too, and it rounds to 16 bits inside whatever the cache holds. The
#   cache in float32 takes twice the memory and has the error of the default to the digit. With flash attention disabled
#   it is as exact as transformers in float32, and a cache in float16 has a quarter of the default's error. Whoever
#   compares an exported model with llama.cpp takes the difference for a fault of the export.
#
# Output seen (the largest error):
#   transformers, float32                    3.0e-06
#   cache in F16, flash attention disabled   1.9e-03
#   cache in F16, flash attention auto       8.1e-03
#   cache in F32, flash attention auto       8.1e-03
#   cache in F32, flash attention disabled   1.3e-06
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check \
    'torch==2.13.0' 'transformers==5.24.0' 'gguf==0.19.0' 'xllamacpp==2026.10.11549' 'numpy==2.4.6'

cat > "$folder/probe.py" <<'PYTHON'
"""Asks llama.cpp for the probabilities of a tiny float32 Llama, and compares them with those of transformers."""

import json
import sys
import urllib.request

import gguf
import numpy as np
import torch
import xllamacpp
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER, WIDTH, HEADS, VOCABULARY, PROMPT = sys.argv[1], 64, 4, 64, 24


def random_llama():
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=2)
    config = LlamaConfig(**sizes, num_attention_heads=HEADS, rms_norm_eps=1e-5, tie_word_embeddings=False)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn(parameter.shape)
    return model


def write(model, path):
    """The model in float32 as a GGUF file; the rows of queries and keys in llama.cpp's order."""
    config, writer = model.config, gguf.GGUFWriter(path, 'llama')
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model('llama')
    writer.add_token_list([f'w{i}' for i in range(VOCABULARY)])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([gguf.TokenType.UNKNOWN] + [gguf.TokenType.NORMAL] * (VOCABULARY - 1))
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if 'q_proj' in name or 'k_proj' in name:
            tensor = tensor.view(HEADS, 2, -1, WIDTH).transpose(1, 2).reshape(WIDTH, WIDTH)
        writer.add_tensor(names.get_name(name, ('.weight',)), np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def largest_error(path, wanted, cache, attention):
    """Between the log-probabilities of the next token, over all tokens."""
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.verbosity, params.warmup = 128, 1, -1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, f'GGML_TYPE_{cache}')
    params.flash_attn_type = getattr(xllamacpp.llama_flash_attn_type, f'LLAMA_FLASH_ATTN_TYPE_{attention}')
    server = xllamacpp.Server(params)
    asked = dict(prompt=prompt.tolist()[0], n_predict=1, temperature=0, n_probs=VOCABULARY)
    request = urllib.request.Request(server.listening_address + '/completion', json.dumps(asked).encode())
    with urllib.request.urlopen(request) as answer:
        found = json.load(answer)['completion_probabilities'][0]['top_logprobs']
    assert len(found) == VOCABULARY
    return max(abs(wanted[each['id']].item() - each['logprob']) for each in found)


model = random_llama()
prompt = torch.randint(1, VOCABULARY, (1, PROMPT))
write(model, f'{FOLDER}/tiny.gguf')
with torch.no_grad():
    exact = model.double()(prompt).logits[0, -1].log_softmax(-1)
    in_float32 = model.float()(prompt).logits[0, -1].log_softmax(-1)
print(f'transformers, float32                    {(exact - in_float32).abs().max():.1e}')
errors = {}
for cache, attention in (('F16', 'DISABLED'), ('F16', 'AUTO'), ('F32', 'AUTO'), ('F32', 'DISABLED')):
    errors[cache, attention] = largest_error(f'{FOLDER}/tiny.gguf', exact, cache, attention)
    print(f'cache in {cache}, flash attention {attention.lower():9}  {errors[cache, attention]:.1e}')
default = errors['F16', 'AUTO']
assert 0.5 * default < errors['F32', 'AUTO'] and errors['F32', 'AUTO'] > 1e-3, 'the behavior has changed'
assert errors['F32', 'DISABLED'] < 2e-5 and errors['F16', 'DISABLED'] < default / 2, 'the behavior has changed'
PYTHON

"$python" "$folder/probe.py" "$folder"
