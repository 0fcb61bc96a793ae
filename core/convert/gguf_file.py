"""
GGUF files of Llama's shape, in both directions: llama.cpp's keys and names of tensors, and those of LlamaForCausalLM.

Quantized tensors are read as the float32 numbers that they stand for. In a Llama's file RoPE's pairs are neighbors, as
in model.py: llama.cpp's converter permutes the rows that Hugging Face's files have.
"""

import json
from typing import Any

import torch
from torch import Tensor

from core.cli.errors import UserError
from core.convert import hf_tokenizer, llama
from core.text.published_tokenizer import PublishedTokenizer
from core.text.tokenizer import NO_TEXT, ByteTokenizer, CharTokenizer, Tokenizer
from model import GPTConfig

ARCHITECTURE = 'llama'
# keys of the model's sizes, without the prefix 'llama.', and those of GPTConfig
SIZES = {
    'block_count': 'n_layer',
    'context_length': 'block_size',
    'embedding_length': 'n_embd',
    'feed_forward_length': 'n_hidden',
    'attention.head_count': 'n_head',
    'attention.head_count_kv': 'n_kv_head',
}
EPS, THETA = 'attention.layer_norm_rms_epsilon', 'rope.freq_base'
NEUTRAL = {  # further keys that a Llama's file may have, and the value that asks for nothing which GPTConfig lacks
    'expert_count': 0,
    'expert_used_count': 0,
    'attention.causal': True,
    'rope.scaling.type': 'none',
    'rope.scaling.factor': 1,
}
WIDTHS = ('rope.dimension_count', 'attention.key_length', 'attention.value_length')  # all the head size
NORMAL, CONTROL, ADDED, UNUSED, BYTE = 1, 3, 4, 5, 6  # types of tokens
SPACE = '\u2581'  # SentencePiece's
TOKENS = 'tokenizer.ggml'
SAYS_NOTHING = ('vocab_size', 'tensor_data_layout')  # the embedding has the first; the second described the converter


# ---- reading ---------------------------------------------------------------------------------------------------------


def read(file: str) -> tuple[dict[str, Any], float, dict[str, Tensor], dict[str, Any]]:
    """GPTConfig's arguments, the eps, float32 tensors by LlamaForCausalLM's names, the tokenizer's meta. ValueError."""
    gguf = import_gguf()
    try:
        reader = gguf.GGUFReader(file)
        keys = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # a damaged file raises almost anything
        raise ValueError(f'it is damaged ({error}); copy it again') from error
    settings, eps = settings_of(keys)
    names = {ours: theirs for theirs, ours in own_names(min(settings['n_layer'], len(reader.tensors))).items()}
    tensors: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        name = names.get(tensor.name, tensor.name)
        if name == 'rope_freqs.weight':
            raise ValueError('it has scaled RoPE (rope_freqs.weight); only plain RoPE is supported')
        if name in tensors:
            raise ValueError(f'it holds {name} twice; copy it again')
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(f"its {tensor.name} is {tensor.tensor_type.name}, which gguf can't dequantize") from error
        tensors[name] = torch.tensor(values, dtype=torch.float32)
    embedding = tensors.get('model.embed_tokens.weight')
    settings['vocab_size'] = 0 if embedding is None else len(embedding)
    settings['tied'] = 'lm_head.weight' not in tensors
    return settings, eps, tensors, tokenizer_meta(keys, settings['vocab_size'])


def about(file: str) -> dict[str, str]:
    """The 'organization' and 'license' that a file which `read` can read states, as far as it does."""
    fields = import_gguf().GGUFReader(file).fields
    stated = {key: fields[f'general.{key}'] for key in ('organization', 'license') if f'general.{key}' in fields}
    return {key: ' '.join(str(field.contents()).split()) for key, field in stated.items()}


def tokenizer_meta(keys: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """The meta of a file's tokenizer: byte pairs, or one of ours; any other stands for no text here."""
    kind, pre = keys.get(f'{TOKENS}.model'), keys.get(f'{TOKENS}.pre')
    types = keys.get(f'{TOKENS}.token_type', [])
    pieces = keys.get(f'{TOKENS}.tokens', [])
    used = {piece: i for i, (piece, type) in enumerate(zip(pieces, types, strict=False)) if type != UNUSED}
    ours: Tokenizer | None = None
    if kind == 'gpt2' and pre in hf_tokenizer.SPLITS:
        added = {piece: types[i] == CONTROL for piece, i in used.items() if types[i] in (CONTROL, ADDED)}
        end = keys.get(f'{TOKENS}.eos_token_id')
        whole = hf_tokenizer.byte_level(used, keys.get(f'{TOKENS}.merges', []), pre, added)
        return hf_tokenizer.meta_of(whole, next((piece for piece, i in used.items() if i == end), None))
    if kind == 'llama' and keys.get(f'{TOKENS}.add_space_prefix') is False:
        chars = [piece.replace(SPACE, ' ') for piece in used]
        if chars == byte_pieces():
            ours = ByteTokenizer()
        elif len(set(chars)) == len(chars) and all(len(char) == 1 for char in chars):
            ours = CharTokenizer(''.join(chars))
    return ours.meta() if ours else {'tokenizer': NO_TEXT, 'vocab_size': vocab_size}


def byte_pieces() -> list[str]:
    """SentencePiece's names of the 256 bytes; a space is written as itself."""
    return [f'<0x{i:02X}>' if i != ord(' ') else ' ' for i in range(256)]


def import_gguf() -> Any:
    """The package gguf. ValueError where it is missing."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError('GGUF files require gguf: pip install gguf') from error
    return gguf


def settings_of(keys: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """GPTConfig's keyword arguments, but for the vocabulary, and the norms' eps, from a file's keys. ValueError."""
    if keys.get('general.architecture') != ARCHITECTURE:
        raise ValueError(f"it holds a {keys.get('general.architecture')} model; only Llama's shape is supported")
    if keys.get('split.count', 1) > 1:
        raise ValueError("it is one of several parts; join them with llama.cpp's llama-gguf-split --merge")
    own = {name.removeprefix('llama.'): value for name, value in keys.items() if name.startswith('llama.')}
    own = {'attention.head_count_kv': own.get('attention.head_count'), **own}
    if missing := [name for name in (*SIZES, EPS) if own.get(name) is None]:
        raise ValueError(f'it lacks the key llama.{missing[0]}; copy it again')
    sizes = {ours: own[name] for name, ours in SIZES.items()}
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f'its {name} is {str(value)[:60]}; it must be one number for all layers, at least 1')
    head_size = sizes['n_embd'] // sizes['n_head']
    allowed = NEUTRAL | dict.fromkeys(WIDTHS, head_size)
    for name in own.keys() - SIZES.keys() - {EPS, THETA, *SAYS_NOTHING}:
        if name not in allowed or own[name] != allowed[name]:
            only = f'; only {allowed[name]} is supported' if name in allowed else ', which is not supported'
            raise ValueError(f'it has llama.{name}={str(own[name])[:60]}{only}')
    if not own[EPS] > 0:
        raise ValueError(f'its {EPS} is {own[EPS]}; it must be above 0')
    eps = float(f'{own[EPS]:.6g}')  # float32's neighbor of 1e-5 stands for 1e-5
    form = dict(pos='rope', norm='rms', mlp='swiglu', bias=False, rope_theta=float(own.get(THETA, 10000.0)))
    return {**sizes, **form}, eps


def own_names(n_layer: int) -> dict[str, str]:
    """llama.cpp's names of the tensors of an untied LlamaForCausalLM, by those."""
    gguf = import_gguf()
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, n_layer)
    names = llama.names(n_layer, False, llama.ATTENTION).values()
    return {name: known.get_name(name, ['.weight']) for parts in names for name in parts}


# ---- writing ---------------------------------------------------------------------------------------------------------


def write(file: str, config: GPTConfig, state: dict[str, Tensor], tokenizer: Tokenizer | None, name: str) -> None:
    """
    Write a model whose core.convert.llama.misfit is '' as a float32 GGUF file that llama.cpp runs.

    tokenizer: a loaded one; None: the ids stand for no text. name: the model's, for people. ValueError without the
    package gguf; OSError.
    """
    gguf = import_gguf()
    writer = gguf.GGUFWriter(file, ARCHITECTURE)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for key, ours in SIZES.items():
        value = {'n_hidden': config.hidden_size, 'n_kv_head': config.kv_heads}.get(ours, getattr(config, ours))
        writer.add_uint32(f'llama.{key}', value)
    for key in WIDTHS:
        writer.add_uint32(f'llama.{key}', config.head_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_float32(f'llama.{EPS}', llama.EPS)
    writer.add_float32(f'llama.{THETA}', config.rope_theta)
    add_tokenizer(writer, tokenizer, config.vocab_size)
    names = own_names(config.n_layer)
    for theirs, tensor in llama.to_hf(state, config, halves=False).items():
        writer.add_tensor(names[theirs], tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: Any, tokenizer: Tokenizer | None, vocab_size: int) -> None:
    """Add a tokenizer: byte pairs over words as GPT-2's, or SentencePiece's pieces, of which no two can be merged."""
    if tokenizer is None:
        writer.add_tokenizer_model('no_vocab')
        return
    types: dict[str, int] = {}
    if tokenizer.byte_pair:
        fast = tokenizer.fast_tokenizer()
        whole = json.loads(fast.to_str())
        pre = next((name for name, split in hf_tokenizer.SPLITS.items() if split == whole['pre_tokenizer']), None)
        if whole['model']['type'] != 'BPE' or pre is None:
            raise UserError('a GGUF file has no name for how the tokenizer of this model cuts text; use --format=hf')
        special, pieces = tokenizer.end_of_text, {i: piece for piece, i in fast.get_vocab().items()}
        if isinstance(tokenizer, PublishedTokenizer):
            types = {t['content']: CONTROL if t['special'] else ADDED for t in whole['added_tokens']}
        writer.add_tokenizer_model('gpt2')
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges([' '.join(pair) for pair in whole['model']['merges']])
    else:
        in_bytes = isinstance(tokenizer, ByteTokenizer)
        chars = byte_pieces() if in_bytes else [tokenizer.decode([i]) for i in range(tokenizer.n_vocab)]
        pieces = {i: char.replace(' ', SPACE) for i, char in enumerate(chars)}
        special = tokenizer.encode(tokenizer.special_token)[0]
        types = {piece: BYTE for piece in pieces.values() if piece.startswith('<0x')}
        writer.add_tokenizer_model('llama')
        writer.add_token_scores([0.0] * vocab_size)
        writer.add_add_space_prefix(False)
    ids = range(max(vocab_size, max(pieces) + 1))  # some are rows of the embedding that no text uses
    writer.add_token_list([pieces.get(i, f'[unused {i}]') for i in ids])
    writer.add_token_types([types.get(pieces[i], NORMAL) if i in pieces else UNUSED for i in ids])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        if special is not None:
            add(special)
    writer.add_add_bos_token(False)
