"""
Tokenizers of Hugging Face folders, in both directions: from a folder to the meta of our tokenizer, and back.

What is written loads in transformers 4.57 and 5: its class is named PreTrainedTokenizerFast, which both know. (What
transformers 5 writes itself names TokenizersBackend, which 4.57 doesn't.)
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from core.cli.errors import UserError
from core.text.byte_pairs import are_pieces, byte_letters, merges_of
from core.text.published_tokenizer import PublishedTokenizer
from core.text.tokenizer import TOKENIZERS, BPETokenizer, ByteTokenizer, CharTokenizer, GPT2Tokenizer, tokenizer_of
from core.text.tokenizer import kind_to_prepare as named_kind
from core.text.tokenizer_base import END_OF_TEXT, NO_TEXT, Tokenizer

FILES = ('tokenizer.json', 'tokenizer_config.json')  # what `write` writes
# how text is cut before merges, by the names that GGUF files have for it: GPT-2's words, and digits one by one
WORDS = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
SPLITS: dict[str, dict[str, Any]] = {
    'gpt-2': WORDS,
    'smollm': {'type': 'Sequence', 'pretokenizers': [{'type': 'Digits', 'individual_digits': True}, WORDS]},
}
GPT2_MERGES = '04e3597d7996f292ca9b8b7285ca4d58a6ae171ac47d73fc7140ceb0c7a6bbc0'  # SHA-256: 'first second' a line


def write(folder: str, tokenizer: Tokenizer, block_size: int) -> None:
    """Write FILES for a tokenizer and a model of block_size tokens. OSError; UserError without the vocabulary."""
    fast = tokenizer.load().fast_tokenizer()
    Path(folder, FILES[0]).write_text(fast.to_str(pretty=True), encoding='utf-8')
    roles = ('eos_token', 'pad_token', 'unk_token', *(('bos_token',) if tokenizer.end_of_text is not None else ()))
    settings = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'model_max_length': block_size,
        'padding_side': 'left',  # of prompts, as generation requires
        'clean_up_tokenization_spaces': False,
        'model_input_names': ['input_ids', 'attention_mask'],
        **dict.fromkeys(roles, tokenizer.special_token),
    }
    Path(folder, FILES[1]).write_text(json.dumps(settings, indent=2), encoding='utf-8')


def kind_to_prepare(tokenizer: str, vocab_size: int = 0) -> type[Tokenizer] | Tokenizer:
    """What --tokenizer names: a class of core.text.tokenizer, or the tokenizer in a folder. UserError."""
    if tokenizer in TOKENIZERS or not os.path.isdir(tokenizer):
        return named_kind(tokenizer, vocab_size)
    if vocab_size:
        raise UserError(
            f'--vocab_size has no meaning for the tokenizer in {tokenizer}, which is complete; leave it out'
        )
    try:
        meta = read(tokenizer, 0)
    except ValueError as error:
        raise UserError(str(error)) from error
    found = tokenizer_of(meta) if meta else None
    if found is None:
        raise UserError(f'{tokenizer} has no tokenizer.json that can be read; choose another folder with --tokenizer')
    if found.load().encode('a b') != found.encode('a') + found.encode(' b'):
        raise UserError(
            f'the tokenizer in {tokenizer} puts a space in front of each text, so that long texts, which are encoded '
            'in parts, would get other tokens; choose another with --tokenizer'
        )
    return found


def read(folder: str, vocab_size: int) -> dict[str, Any]:
    """
    The meta of the tokenizer in a folder: one of ours where it encodes as that does. vocab_size: the model's.

    One that the library tokenizers doesn't know is {'tokenizer': 'none', ...}: its ids stand for no text here. Without
    any, it is GPT-2's for a model of its vocabulary size, else {}. ValueError where the files are damaged.
    """
    try:
        whole = read_file(folder)
        if whole is None:
            inferred = tokenizer_of({}, vocab_size)
            return inferred.meta() if inferred else {}
        settings = Path(folder, FILES[1])
        end = json.loads(settings.read_text(encoding='utf-8')).get('eos_token') if settings.is_file() else None
        return meta_of(whole, end['content'] if isinstance(end, dict) else end)
    except (AttributeError, IndexError, KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"the tokenizer in {folder} can't be read ({error}); copy it again") from error


def read_file(folder: str) -> dict[str, Any] | None:
    """A folder's tokenizer.json, or what stands for it where there is the older form of two files; None without."""
    whole, pieces, merges = (Path(folder, name) for name in ('tokenizer.json', 'vocab.json', 'merges.txt'))
    if os.path.isfile(whole):
        return json.loads(whole.read_text(encoding='utf-8'))
    if os.path.isfile(pieces) and os.path.isfile(merges):
        vocab, lines = json.loads(pieces.read_text(encoding='utf-8')), merges.read_text(encoding='utf-8').split('\n')
        lines = [line for line in lines if line.strip() and not line.startswith('#version')]
        return byte_level(vocab, lines, 'gpt-2', {END_OF_TEXT: True} if END_OF_TEXT in vocab else {})
    return None


def byte_level(vocab: dict[str, int], merges: list[str], split: str, added: dict[str, bool]) -> dict[str, Any]:
    """The tokenizer.json of a byte-pair encoding. split: a key of SPLITS; added: {token: whether it is special}."""
    plain = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False}
    return {
        'version': '1.0',
        'added_tokens': [{'id': vocab[name], 'content': name, **plain, 'special': s} for name, s in added.items()],
        'normalizer': None,
        'pre_tokenizer': SPLITS[split],
        'post_processor': None,
        'decoder': WORDS,
        'model': {'type': 'BPE', 'vocab': vocab, 'merges': [pair.split(' ') for pair in merges]},
    }


def meta_of(whole: dict[str, Any], end: str | None = None) -> dict[str, Any]:
    """The meta of a tokenizer.json (see `read`). end: the end-of-text token where there is no END_OF_TEXT."""
    vocab = whole['model']['vocab']
    if isinstance(vocab, dict) and (ours := our_own(whole, vocab)):
        return ours.meta()
    try:
        import tokenizers

        fast = tokenizers.Tokenizer.from_str(json.dumps(whole))
    except Exception:  # the library raises nothing more specific
        return {'tokenizer': NO_TEXT, 'vocab_size': len(vocab)}
    ids = fast.get_vocab()
    found = ids.get(END_OF_TEXT, ids.get(end) if end else None)
    return PublishedTokenizer(fast.to_str(), max(ids.values()) + 1, found).meta()


def our_own(whole: dict[str, Any], vocab: dict[str, int]) -> Tokenizer | None:
    """The tokenizer of ours that encodes as a tokenizer.json with this vocabulary does, or None."""
    pieces, letters = sorted(vocab, key=lambda piece: vocab[piece]), byte_letters()
    kind, splits = whole['model'].get('type', 'BPE'), whole.get('pre_tokenizer') or {}
    # older versions of the library write a merge as one string
    merges = [tuple(m.split(' ')) if isinstance(m, str) else tuple(m) for m in whole['model'].get('merges', [])]
    in_bytes = splits.get('type') == 'ByteLevel' and not splits.get('add_prefix_space')
    added = {token['content'] for token in whole.get('added_tokens') or []} - set(vocab)
    if [vocab[piece] for piece in pieces] != list(range(len(pieces))) or whole.get('normalizer') or added:
        return None
    if kind == 'WordLevel' and splits.get('pattern') == {'Regex': r'[\s\S]'}:
        return CharTokenizer(''.join(pieces)) if all(len(piece) == 1 for piece in pieces) else None
    if kind != 'BPE' or not in_bytes:
        return None
    if not splits.get('use_regex', True):
        return ByteTokenizer() if pieces == ['\0', *letters[1:]] and not merges else None
    return byte_pairs(pieces[:-1], merges, letters) if pieces[-1] == END_OF_TEXT else None


def byte_pairs(pieces: list[str], merges: list, letters: list[str]) -> Tokenizer | None:
    """The tokenizer of a byte-pair encoding over words, or None if it isn't merged by the ranks of its pieces."""
    if hashlib.sha256('\n'.join(map(' '.join, merges)).encode()).hexdigest() == GPT2_MERGES:
        return GPT2Tokenizer()
    byte_of = {letter: chr(byte) for byte, letter in enumerate(letters)}
    latin = [''.join(byte_of.get(letter, '\u0100') for letter in piece) for piece in pieces]
    if not are_pieces(latin):
        return None
    ranked = merges_of({piece.encode('latin-1'): i for i, piece in enumerate(latin)})
    spelled = [tuple(''.join(letters[byte] for byte in part) for part in pair) for pair in ranked]
    return BPETokenizer(latin) if spelled == merges else None
