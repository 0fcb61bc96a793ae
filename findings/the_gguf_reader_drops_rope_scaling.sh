#!/usr/bin/env bash
# transformers reads a GGUF file of Llama 3.1's kind without its RoPE scaling; llama.cpp computes with it.
#
# Libraries: transformers 5.24.0, gguf 0.19.0, accelerate 1.15.0, xllamacpp 2026.10.11549 (llama.cpp in a wheel),
#   torch 2.13.0, numpy 2.4.6 (Python 3.11 or later; Linux or macOS).
# What was done: small random Llamas are written as GGUF files in float32, once with plain RoPE, once with Llama 3.2's
#   scaling (the tensor rope_freqs.weight, which llama.cpp's converter writes for rope_type llama3), and once with
#   linear scaling (the keys rope.scaling.type and rope.scaling.factor). Each file is given to llama.cpp and to
#   transformers, and the log-probabilities of the token after a text of 1024 tokens, in transformers after 16 of them
#   too, are compared with those of the model that was written.
# What one would guess: a reader that knows the architecture llama reads what such files say, and refuses what it can't
#   express. It could express both: they are rope_type llama3 and linear in transformers' own config.
# What happens: the tensor and the keys are skipped without an error or a warning, and the config says rope_type
#   default. llama.cpp agrees with the written model to rounding in all three cases, transformers in the first alone.
#   Its result for the second file is what llama.cpp gives when the tensor is left out. That file's first tokens hardly
#   show it: the slow frequencies, which Llama 3's scaling changes, need a distance to matter.
#
# Output seen:
#   largest change of a log-probability   llama.cpp   transformers   transformers   rope_type that
#                                         at 1024     at 1024        at 16          transformers reads
#     written with rope_type default      0.0001      0.0000         0.0000         default
#     written with rope_type llama3       0.0001      2.7540         0.0288         default
#     written with rope_type linear       0.0000      4.2307         4.2460         default
#   rope_type llama3, llama.cpp without the tensor and transformers with it differ by 0.0001
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check \
    'torch==2.13.0' 'transformers==5.24.0' 'accelerate==1.15.0' 'gguf==0.19.0' 'xllamacpp==2026.10.11549' \
    'numpy==2.4.6'

cat > "$folder/probe.py" <<'PYTHON'
"""Writes small Llamas as GGUF files and compares what llama.cpp and transformers make of them with the originals."""

import sys

import gguf
import numpy as np
import torch
import transformers
import xllamacpp
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_warning()
transformers.logging.disable_progress_bar()
WIDTH, LAYERS, HEADS, THETA, LENGTH = 256, 2, 4, 500000.0, 1024
HEAD = WIDTH // HEADS
TOKENS = [*sorted(ByteLevel.alphabet()), 'th', '<|end|>']
NAMES = {'model.embed_tokens': 'token_embd', 'model.norm': 'output_norm', 'lm_head': 'output'}
NAMES_IN_BLOCKS = {
    'input_layernorm': 'attn_norm',
    'self_attn.q_proj': 'attn_q',
    'self_attn.k_proj': 'attn_k',
    'self_attn.v_proj': 'attn_v',
    'self_attn.o_proj': 'attn_output',
    'post_attention_layernorm': 'ffn_norm',
    'mlp.gate_proj': 'ffn_gate',
    'mlp.up_proj': 'ffn_up',
    'mlp.down_proj': 'ffn_down',
}
SCALINGS = {
    'default': {},
    'llama3': {
        'factor': 32.0,
        'low_freq_factor': 1.0,
        'high_freq_factor': 4.0,
        'original_max_position_embeddings': 8192,
    },
    'linear': {'factor': 4.0},
}


def make(rope_type):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=32768,
        rope_parameters={'rope_type': rope_type, 'rope_theta': THETA, **SCALINGS[rope_type]},
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # the likeliest token shall be an ASCII character: llama.cpp reports no part of another one
        model.lm_head.weight[94:] *= 0.1
    return model


def write(model, path, rope_type, frequencies=True):
    writer = gguf.GGUFWriter(path, 'llama')
    writer.add_name('small')
    writer.add_context_length(32768)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(THETA)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre('gpt-2')
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(TOKENS) - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(['t h'])
    writer.add_eos_token_id(len(TOKENS) - 1)
    writer.add_add_bos_token(False)
    if rope_type == 'linear':
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(SCALINGS['linear']['factor'])
    if rope_type == 'llama3' and frequencies:  # by what each plain frequency is divided
        plain = THETA ** -(torch.arange(0, HEAD, 2).double() / HEAD)
        divisors = plain / model.model.rotary_emb.inv_freq.double()
        writer.add_tensor('rope_freqs.weight', divisors.float().numpy())
    for name, tensor in model.state_dict().items():
        name, array = name.removesuffix('.weight'), tensor.numpy()
        if name.startswith('model.layers.'):
            layer, name = name.removeprefix('model.layers.').split('.', 1)
            if name in ('self_attn.q_proj', 'self_attn.k_proj'):  # llama.cpp rotates neighbors, transformers halves
                array = array.reshape(HEADS, 2, HEAD // 2, WIDTH).swapaxes(1, 2).reshape(array.shape)
            name = f'blk.{layer}.{NAMES_IN_BLOCKS[name]}'
        else:
            name = NAMES[name]
        writer.add_tensor(f'{name}.weight', np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_llama_cpp(path, tokens):
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.verbosity, params.warmup = 2 * LENGTH, 1, -1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    request = {'prompt': tokens[0].tolist(), 'max_tokens': 1, 'temperature': 0}
    request['logprobs'] = request['n_probs'] = len(TOKENS)
    found = server.handle_completions(request)['choices'][0]['logprobs']['content'][0]['top_logprobs']
    result = torch.full((len(TOKENS),), float('nan'))
    for entry in found:
        result[entry['id']] = entry['logprob']
    return result


@torch.no_grad()
def in_transformers(model, tokens):
    return model(tokens).logits[0].log_softmax(-1)


def largest(a, b):
    return (a - b).abs().max().item()


folder = sys.argv[1]
tokens = torch.randint(len(TOKENS) - 1, (1, LENGTH), generator=torch.Generator().manual_seed(1))
print('largest change of a log-probability   llama.cpp   transformers   transformers   rope_type that')
print('                                      at 1024     at 1024        at 16          transformers reads')
for rope_type in SCALINGS:
    model = make(rope_type)
    written = in_transformers(model, tokens)
    write(model, f'{folder}/{rope_type}.gguf', rope_type)
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=f'{rope_type}.gguf', dtype=torch.float32).eval()
    theirs = in_transformers(read, tokens)
    peer = largest(in_llama_cpp(f'{folder}/{rope_type}.gguf', tokens), written[-1])
    change, early = largest(theirs[-1], written[-1]), largest(theirs[15], written[15])
    kind = read.config.rope_parameters['rope_type']
    print(f'  written with rope_type {rope_type:12} {peer:.4f}      {change:.4f}         {early:.4f}         {kind}')
    assert peer < 0.01, 'llama.cpp used to agree with the written model'
    assert kind == 'default', 'the behavior has changed'
    assert change < 0.01 if rope_type == 'default' else change > 0.1, 'the behavior has changed'
    if rope_type == 'llama3':
        write(model, f'{folder}/without.gguf', rope_type, frequencies=False)
        without = largest(in_llama_cpp(f'{folder}/without.gguf', tokens), theirs[-1])
print(f'rope_type llama3, llama.cpp without the tensor and transformers with it differ by {without:.4f}')
assert without < 0.01, 'the behavior has changed'
PYTHON

TQDM_DISABLE=1 "$python" "$folder/probe.py" "$folder"
