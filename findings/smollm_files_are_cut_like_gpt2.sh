#!/usr/bin/env bash
# transformers cuts the text of SmolLM's GGUF files as GPT-2 does, not as their tokenizer did; llama.cpp gets it right.
#
# Libraries: transformers 5.24.0, gguf 0.19.0, xllamacpp 2026.10.11549 (llama.cpp in a wheel), torch 2.13.0,
#   numpy 2.4.6 (Python 3.11 or later; Linux or macOS).
# What was done: a byte-level BPE that cuts out each digit first, as SmolLM's and StarCoder's do, is trained on a recipe
#   and written into the GGUF files of a tiny Llama, which differ in the name of the pre-tokenizer alone
#   (tokenizer.ggml.pre). llama.cpp and transformers encode the recipe, a numbered list, with each.
# What one would guess: vocabulary and merges make the tokenizer, and both are in the file; or else, as transformers
#   5.24.0 reads the pre-tokenizer's name, it follows it or refuses one that it doesn't know.
# What happens: it knows some twenty names, and takes GPT-2's rule for every other one, without a warning. The two rules
#   part where white space stands before a digit: GPT-2's leaves the last blank or line break to the digit, so the empty
#   line before "1." is two tokens where the model was trained with one. Lists, tables and indented numbers are encoded
#   as the model never saw them; a plain sentence is encoded right, numbers and all, so a short test finds nothing.
#
# Output seen (of each encoding the length and the fourth to the ninth token; byte-level BPE writes a line break as
#   Ċ and a blank as Ġ):
#   the tokenizer          31 tokens: : ĊĊ 1 . ĠMix Ġ
#     gpt-2     llama.cpp    35 tokens
#               transformers 35 tokens: : Ċ Ċ 1 . ĠMix
#     qwen2     llama.cpp    34 tokens
#               transformers 34 tokens: : ĊĊ 1 . ĠMix Ġ
#     smollm    llama.cpp    31 tokens
#               transformers 35 tokens: : Ċ Ċ 1 . ĠMix
#     starcoder llama.cpp    31 tokens
#               transformers 35 tokens: : Ċ Ċ 1 . ĠMix
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check \
    'torch==2.13.0' 'transformers==5.24.0' 'gguf==0.19.0' 'xllamacpp==2026.10.11549' 'numpy==2.4.6'

cat > "$folder/probe.py" <<'PYTHON'
"""Encodes a numbered list with a tokenizer and with what llama.cpp and transformers read from its GGUF file."""

import json
import sys

import gguf
import numpy as np
import xllamacpp
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

KINDS = ('gpt-2', 'qwen2', 'smollm', 'starcoder')
SENTENCE = 'Mix 500 g of flour. Wait 3 hours, or 12.'
TEXT = 'To bake bread:\n\n1. Mix 500 g of flour.\n\n2. Wait.\n\n    3 hours, or 12.\n'
WIDTH = 32


def train():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=['<|endoftext|>'],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 10, trainer)
    return tokenizer


def write(tokenizer, path, pre):
    bpe = json.loads(tokenizer.to_str())['model']
    tokens = sorted(bpe['vocab'], key=bpe['vocab'].get)
    writer = gguf.GGUFWriter(path, 'llama')
    writer.add_name('small')
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1))
    writer.add_token_merges([' '.join(pair) for pair in bpe['merges']])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    square = np.eye(WIDTH, dtype=np.float32)
    for name in ('attn_q', 'attn_k', 'attn_v', 'attn_output', 'ffn_gate', 'ffn_up', 'ffn_down'):
        writer.add_tensor(f'blk.0.{name}.weight', square)
    for name in ('blk.0.attn_norm', 'blk.0.ffn_norm', 'output_norm'):
        writer.add_tensor(f'{name}.weight', np.ones(WIDTH, np.float32))
    writer.add_tensor('token_embd.weight', np.ones((len(tokens), WIDTH), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_llama_cpp(path, text):
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.verbosity, params.warmup = 256, 1, -1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    return server.handle_completions({'prompt': text, 'max_tokens': 1})['usage']['prompt_tokens']


folder = sys.argv[1]
original = train()
wanted = original.encode(TEXT)
print(f"{'the tokenizer':22} {len(wanted.ids)} tokens: {' '.join(wanted.tokens[3:9])}")
differ = []
for pre in KINDS:
    write(original, f'{folder}/{pre}.gguf', pre)
    reader = AutoTokenizer.from_pretrained(folder, gguf_file=f'{pre}.gguf')
    ids = reader(TEXT)['input_ids']
    peer = in_llama_cpp(f'{folder}/{pre}.gguf', TEXT)
    print(f'  {pre:9} llama.cpp    {peer} tokens')
    print(f"  {'':9} transformers {len(ids)} tokens: {' '.join(reader.convert_ids_to_tokens(ids)[3:9])}")
    if peer != len(ids):
        differ.append(pre)
    if pre == 'smollm':
        assert peer == len(wanted.ids) and ids != wanted.ids, 'the behavior has changed'
        assert reader(SENTENCE)['input_ids'] == original.encode(SENTENCE).ids, 'a plain sentence used to be right'
assert differ == ['smollm', 'starcoder'], 'the behavior has changed'
PYTHON

"$python" "$folder/probe.py" "$folder"
