"""Tiny models of the two forms that others serve, ours and those of transformers, and what both must agree in."""

import json

import gguf
import tokenizers
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

from core.convert import gguf_file, published
from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig
from support.models import randomized

VOCAB, BLOCK = 37, 40
OURS = dict(block_size=BLOCK, vocab_size=VOCAB, n_layer=3, n_head=3, n_embd=42, bias=False, norm='rms', mlp='swiglu',
            pos='rope')  # fmt: skip
THEIRS = dict(vocab_size=VOCAB, hidden_size=60, intermediate_size=52, num_hidden_layers=3, num_attention_heads=6,
              max_position_embeddings=BLOCK)  # fmt: skip
IDX = torch.randint(VOCAB, (3, BLOCK), generator=torch.Generator().manual_seed(1))


def shaken(model):
    """The model with every parameter, norms too, far enough from its initial value to matter."""
    return randomized(model, 0.1, seed=5)


def our_llama(**changes):
    return shaken(GPT(GPTConfig(**{**OURS, 'n_hidden': 50, **changes})))


def our_deepseek(**changes):
    sizes = dict(n_latent=11, n_nope=7, n_rope=6, n_value=9, latent_norm=True)
    return shaken(MLAGPT(MLAConfig(**{**OURS, **sizes, **changes})))


def their_llama(**changes):
    torch.manual_seed(0)
    return shaken(LlamaForCausalLM(LlamaConfig(**{**THEIRS, 'num_key_value_heads': 2, **changes})))


def their_deepseek(**changes):
    latents = dict(kv_lora_rank=14, q_lora_rank=None, num_key_value_heads=6, first_k_dense_replace=3)
    sizes = dict(latents, qk_nope_head_dim=7, qk_rope_head_dim=6, v_head_dim=9)
    torch.manual_seed(0)
    return shaken(DeepseekV3ForCausalLM(DeepseekV3Config(**{**THEIRS, **sizes, **changes})))


def exported(ours, theirs_class, config_class, dtype=torch.float32):
    """Our model in transformers' class, through the config and tensors that an export writes."""
    form = published.native_form(ours.config)
    assert form.misfit(ours.config) == ''
    config = config_class(**form.hf_settings(ours.config), pad_token_id=0, eos_token_id=None, bos_token_id=None)
    theirs, tensors = theirs_class(config), form.to_hf(ours.state_dict(), ours.config)
    report = theirs.load_state_dict(tensors, strict=False)
    assert report.unexpected_keys == [] and report.missing_keys == ['lm_head.weight'] * ours.config.tied
    theirs.tie_weights()
    return theirs.to(dtype).eval()


@torch.no_grad()
def logit_difference(ours, theirs, idx=IDX):
    """The largest difference of two models' logits, which are far from 0."""
    logits = ours(idx, idx)[0]
    assert logits.abs().max() > 1
    return (theirs(idx).logits - logits).abs().max().item()


@torch.no_grad()
def check_generation(ours, theirs):
    """Greedy text is ours: of whole prompts with both caches, and of left-padded ones with a dynamic cache."""
    prompts, new = IDX[:, :9], 25
    expected = ours.generate(prompts, new, temperature=0)
    for cache in ({}, dict(past_key_values=StaticCache(theirs.config, max_cache_len=BLOCK)), dict(use_cache=False)):
        whole = torch.ones_like(prompts)
        text = theirs.generate(prompts, attention_mask=whole, max_new_tokens=new, do_sample=False, **cache)
        assert torch.equal(text, expected)
    starts = (0, 4, 8)  # what precedes them is padding
    mask = torch.stack([torch.arange(9) >= start for start in starts]).long()
    padded = theirs.generate(prompts * mask, attention_mask=mask, max_new_tokens=new, do_sample=False)
    for row, start in enumerate(starts):
        alone = ours.generate(prompts[row : row + 1, start:], new, temperature=0)
        assert torch.equal(padded[row : row + 1, start:], alone)


# ---- files of other makers ----------------------------------------------------------------------------------------


def byte_pairs_of_digits():
    """Bytes, merges that never join digits, and two special tokens in front: as SmolLM2 has it."""
    special = ['<|endoftext|>', '<|im_start|>']
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=letters, special_tokens=special, show_progress=False
    )
    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    fast.decoder = tokenizers.decoders.ByteLevel()
    fast.train_from_iterator(
        ['The 17  cats,\n\n  caf\u00e9 -> 2024', 'the cats and the caf\u00e9s,   2024  '] * 9, trainer
    )
    return fast


def foreign(file, keys=(), tensors=(), arch='llama', quantized=None, without=(), tokenizer=None):
    """A GGUF file of a Llama of transformers, as a converter writes it, with further keys and tensors."""
    vocab = tokenizer.get_vocab() if tokenizer else {}
    shape = dict(intermediate_size=64, hidden_size=64, num_attention_heads=4, vocab_size=len(vocab) or VOCAB)
    theirs = their_llama(**shape, rms_norm_eps=1e-6, tie_word_embeddings=bool(vocab))
    config, state = theirs.config, dict(theirs.state_dict())
    if vocab:
        del state['lm_head.weight']
    writer = gguf.GGUFWriter(str(file), arch)
    sizes = {'block_count': 3, 'context_length': BLOCK, 'embedding_length': 64, 'feed_forward_length': 64,
             'attention.head_count': 4, 'attention.head_count_kv': 2, 'rope.dimension_count': 16}  # fmt: skip
    for key, value in sizes.items():
        if key not in without:
            writer.add_uint32(f'{arch}.{key}', value)
    writer.add_float32(f'{arch}.attention.layer_norm_rms_epsilon', config.rms_norm_eps)
    for key, value in keys:
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    if vocab:
        whole = json.loads(tokenizer.to_str())
        special = {token['content'] for token in whole['added_tokens']}
        writer.add_tokenizer_model('gpt2')
        writer.add_tokenizer_pre('smollm')
        writer.add_token_list(sorted(vocab, key=vocab.get))
        writer.add_token_types([3 if piece in special else 1 for piece in sorted(vocab, key=vocab.get)])
        writer.add_token_merges([' '.join(pair) for pair in whole['model']['merges']])
        writer.add_eos_token_id(vocab['<|im_start|>'])
    own_names = gguf_file.own_names(3)
    for name, tensor in state.items():
        for part, heads in (('q_proj', 4), ('k_proj', 2)):
            if part in name:
                tensor = tensor.reshape(heads, 2, -1, 64).swapaxes(1, 2).reshape(tensor.shape)
        values = tensor.numpy()
        if quantized and tensor.dim() == 2:
            packed = gguf.quants.quantize(values, quantized)
            writer.add_tensor(own_names[name], packed, raw_dtype=quantized)
            state[name] = torch.tensor(gguf.quants.dequantize(packed, quantized))
        else:
            writer.add_tensor(own_names[name], values)
    for name, values in tensors:
        writer.add_tensor(name, values)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    quantities = {name: value for name, value in state.items() if quantized and value.dim() == 2}
    for name in quantities:  # back from what the numbers stand for
        for part, heads in (('q_proj', 4), ('k_proj', 2)):
            if part in name:
                state[name] = state[name].reshape(heads, -1, 2, 64).swapaxes(1, 2).reshape(state[name].shape)
    theirs.load_state_dict(state, strict=not vocab)
    return theirs
