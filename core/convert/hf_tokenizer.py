"""
Tokenizers of Hugging Face folders, in both directions: from a folder to the meta of our tokenizer, and back.

What is written loads in transformers 4.57 and 5: its class is named PreTrainedTokenizerFast, which both know. (What
transformers 5 writes itself names TokenizersBackend, which 4.57 doesn't.)
"""

import hashlib
import json
import os
from typing import Any

from core.text.byte_pairs import are_pieces, byte_letters, merges_of
from core.text.tokenizer import (
    END_OF_TEXT,
    NO_TEXT,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    tokenizer_of,
)

FILES = ('tokenizer.json', 'tokenizer_config.json')  # what `write` writes
GPT2_MERGES = '04e3597d7996f292ca9b8b7285ca4d58a6ae171ac47d73fc7140ceb0c7a6bbc0'  # SHA-256: 'first second' a line


def write(folder: str, tokenizer: Tokenizer, block_size: int) -> None:
    """Write FILES for a tokenizer and a model of block_size tokens. OSError; UserError without the vocabulary."""
    fast = tokenizer.load().fast_tokenizer()
    with open(os.path.join(folder, FILES[0]), 'w', encoding='utf-8') as file:
        file.write(fast.to_str(pretty=True))
    roles = ('eos_token', 'pad_token', 'unk_token', *(('bos_token',) if tokenizer.end_of_text is not None else ()))
    settings = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'model_max_length': block_size,
        'padding_side': 'left',  # of prompts, as generation requires
        'clean_up_tokenization_spaces': False,
        'model_input_names': ['input_ids', 'attention_mask'],
        **dict.fromkeys(roles, tokenizer.special_token),
    }
    with open(os.path.join(folder, FILES[1]), 'w', encoding='utf-8') as file:
        json.dump(settings, file, indent=2)


def read(folder: str, vocab_size: int) -> dict[str, Any]:
    """
    The meta of our tokenizer that encodes as the one in a folder does. vocab_size: the model's.

    A tokenizer that is none of ours is {'tokenizer': 'none', ...}: its ids stand for no text here. Without any, it is
    GPT-2's for a model of its vocabulary size, else {}. ValueError where the files are damaged.
    """
    try:
        found = read_files(folder)
        if found is None:
            inferred = tokenizer_of({}, vocab_size)
            return inferred.meta() if inferred else {}
        return meta_of(*found)
    except (AttributeError, IndexError, KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"the tokenizer in {folder} can't be read ({error}); copy it again") from error


def read_files(folder: str) -> tuple[Any, list, dict] | None:
    """A folder's vocabulary {piece: id}, merges and tokenizer.json ({} in the older form of two files), or None."""

    def path(name):
        return os.path.join(folder, name)

    if os.path.isfile(path('tokenizer.json')):
        with open(path('tokenizer.json'), encoding='utf-8') as file:
            whole = json.load(file)
        vocab, merges = whole['model']['vocab'], whole['model'].get('merges', [])
        # older versions of the library write a merge as one string
        return vocab, [tuple(pair.split(' ')) if isinstance(pair, str) else tuple(pair) for pair in merges], whole
    if os.path.isfile(path('vocab.json')) and os.path.isfile(path('merges.txt')):
        with open(path('vocab.json'), encoding='utf-8') as file:
            vocab = json.load(file)
        with open(path('merges.txt'), encoding='utf-8') as file:
            lines = [line.rstrip('\n') for line in file if line.strip() and not line.startswith('#version')]
        return vocab, [tuple(line.split(' ')) for line in lines], {}
    return None


def meta_of(vocab: Any, merges: list, whole: dict) -> Any:
    """The meta of a tokenizer (see `read`)."""
    if not isinstance(vocab, dict):  # SentencePiece's pieces with their scores
        return {'tokenizer': NO_TEXT, 'vocab_size': len(vocab)}
    pieces, letters = sorted(vocab, key=lambda piece: vocab[piece]), byte_letters()
    kind, splits = whole.get('model', {}).get('type', 'BPE'), whole.get('pre_tokenizer') or {}
    in_bytes = not whole or (splits.get('type') == 'ByteLevel' and not splits.get('add_prefix_space'))
    ours: Tokenizer | None = None
    if [vocab[piece] for piece in pieces] != list(range(len(pieces))) or whole.get('normalizer'):
        pass
    elif kind == 'WordLevel' and splits.get('pattern') == {'Regex': r'[\s\S]'}:
        ours = CharTokenizer(''.join(pieces)) if all(len(piece) == 1 for piece in pieces) else None
    elif kind == 'BPE' and in_bytes and not splits.get('use_regex', True):
        ours = ByteTokenizer() if pieces == ['\0', *letters[1:]] and not merges else None
    elif kind == 'BPE' and in_bytes and pieces[-1] == END_OF_TEXT:
        ours = byte_pairs(pieces[:-1], merges, letters)
    return ours.meta() if ours else {'tokenizer': NO_TEXT, 'vocab_size': len(pieces)}


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
