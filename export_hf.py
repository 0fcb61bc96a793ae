"""
Write a checkpoint as a folder that the `transformers` library loads.

$ python export_hf.py --source=out-shakespeare-cpu --out_dir=hf-shakespeare

A model with multi-head attention becomes a GPT-2 like any other. One with multi-head latent attention takes its code
along, one file, which transformers runs when told that it may:

    AutoModelForCausalLM.from_pretrained('hf-shakespeare')
    AutoModelForCausalLM.from_pretrained('hf-shakespeare-mla', trust_remote_code=True)

The tokenizer goes with the model, so that AutoTokenizer, generation and evaluation harnesses find it. Characters and
bytes have no token for the start of a text; EleutherAI's lm_eval wants one named: --model_args ...,prefix_token_id=0.
"""

import os
import shutil
from dataclasses import fields
from json import dump

import torch

from core import checkpoint as checkpoints
from core import runtime
from core.runtime import UserError
from core.tokenizer import BYTE_PAIR_TOKENIZERS, byte_letters, load_tokenizer

# ----------------------------------------------------------------------------------------------------------------------
source = 'out'  # a checkpoint, or a folder with one
out_dir = 'hf-model'  # the folder to write
overwrite = False  # write into a folder that holds something
exec(open('configurator.py').read())
# ----------------------------------------------------------------------------------------------------------------------

MODEL_CODE = 'hf_modeling_mla.py'
runtime.check_folder(out_dir)
if os.path.isdir(out_dir) and os.listdir(out_dir) and not overwrite:
    raise UserError(f'{out_dir} is not empty; choose another --out_dir, or write into it with --overwrite=True')
saved = checkpoints.load(source)
model = checkpoints.build_model(saved)
meta = saved.get('tokenizer') or {}
kind = meta.get('tokenizer')


def write_json(name, value):
    """A JSON file in out_dir."""
    with open(os.path.join(out_dir, name), 'w', encoding='utf-8') as file:
        dump(value, file, indent=2)


# ---- weights and config ----------------------------------------------------------------------------------------------
def gpt2_tensors():
    """The tensors as GPT-2's own code names and lays them out: linear weights as (in, out), biases everywhere."""
    state = {}
    for name, value in model.state_dict().items():
        linear = name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))
        state[name] = value.t().contiguous() if linear else value
        bias = name.removesuffix('weight') + 'bias'
        if (linear or '.ln_' in name) and name.endswith('weight') and bias not in model.state_dict():
            state[bias] = torch.zeros(value.size(0))
    return state


def gpt2_config():
    """A GPT-2 config of the model's sizes."""
    sizes = {name: getattr(model.config, name) for name in ('n_layer', 'n_head', 'n_embd', 'vocab_size')}
    dropout = {name: model.config.dropout for name in ('resid_pdrop', 'embd_pdrop', 'attn_pdrop')}
    gelu = 'gelu_new' if model.config.gelu == 'tanh' else 'gelu'
    names = dict(model_type='gpt2', architectures=['GPT2LMHeadModel'], activation_function=gelu)
    return {**names, **sizes, 'n_positions': model.config.block_size, **dropout, 'layer_norm_epsilon': 1e-5}


def mla_config():
    """A config for MODEL_CODE, which the auto classes are sent to."""
    sizes = {field.name: getattr(model.config, field.name) for field in fields(model.config) if field.name != 'flash'}
    module = MODEL_CODE.removesuffix('.py')
    auto_map = {'AutoConfig': f'{module}.MLAGPTConfig', 'AutoModelForCausalLM': f'{module}.MLAGPTForCausalLM'}
    return {'model_type': 'mla_gpt', 'architectures': ['MLAGPTForCausalLM'], 'auto_map': auto_map, **sizes}


is_mla = checkpoints.attention_of(model) == 'mla'
if not is_mla and model.config.pos != 'learned':
    raise UserError("this MHA model has RoPE, which GPT-2 can't express; only pos='learned' or MLA can be exported")
try:
    from safetensors.torch import save_file
    from transformers import PreTrainedTokenizerFast
except ImportError as error:
    raise UserError(f'exporting needs {error.name}: pip install {error.name}') from error
encoder = load_tokenizer(meta) if kind in BYTE_PAIR_TOKENIZERS else None
os.makedirs(out_dir, exist_ok=True)
tensors = model.state_dict() if is_mla else gpt2_tensors()
tensors = {name: value.contiguous() for name, value in tensors.items() if name != 'lm_head.weight'}  # tied to wte
dtype = str(model.lm_head.weight.dtype).removeprefix('torch.')
end_of_text = encoder.end_of_text if encoder else 50256 if model.config.vocab_size in (50257, 50304) else None
special = {'bos_token_id': end_of_text, 'eos_token_id': end_of_text}
write_json('config.json', {**(mla_config() if is_mla else gpt2_config()), **special, 'dtype': dtype, 'use_cache': True,
                           'tie_word_embeddings': True})  # fmt: skip
write_json('generation_config.json', special)
save_file(tensors, os.path.join(out_dir, 'model.safetensors'), metadata={'format': 'pt'})
if is_mla:
    shutil.copyfile(MODEL_CODE, os.path.join(out_dir, MODEL_CODE))


# ---- tokenizer -------------------------------------------------------------------------------------------------------
def merges_of(ranks):
    """Byte pairs' merges in order: the two parts that each token is made from, by the merges in front of it."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            yield tuple(parts)


def fast_tokenizer():
    """The checkpoint's tokenizer as one of transformers' own, or None where it has none that stands for text."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    if kind == 'char':
        tokenizer = Tokenizer(models.WordLevel({char: i for i, char in enumerate(meta['chars'])}))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
        tokenizer.decoder = decoders.Fuse()
        return tokenizer
    letters = byte_letters()
    if kind == 'byte':
        vocab, merges = {letter: byte for byte, letter in enumerate(letters)}, []
    elif encoder:
        ranks = encoder.encoding._mergeable_ranks
        spelled = {token: ''.join(letters[byte] for byte in token) for token in ranks}
        vocab = {spelled[token]: rank for token, rank in ranks.items()}
        merges = [(spelled[a], spelled[b]) for a, b in merges_of(ranks)]
    else:
        return None
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=encoder is not None)
    tokenizer.decoder = decoders.ByteLevel()
    if encoder:
        tokenizer.add_special_tokens([AddedToken('<|endoftext|>', normalized=False)])
    return tokenizer


tokenizer = fast_tokenizer()
if tokenizer is not None:
    names = {name: '<|endoftext|>' for name in ('bos_token', 'eos_token', 'unk_token')} if encoder else {}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=model.config.block_size,
        clean_up_tokenization_spaces=False,
        model_input_names=['input_ids', 'attention_mask'],
        **names,
    ).save_pretrained(out_dir)
else:
    runtime.notice(f'{source} has no tokenizer for text, so {out_dir} has none either')
print(f'{out_dir}: {", ".join(sorted(os.listdir(out_dir)))}')
