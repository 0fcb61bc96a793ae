"""The tokenizers that published models bring along: a file tokenizer.json, run by Hugging Face's library tokenizers."""

import functools
import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from core.cli.errors import UserError
from core.text.byte_pairs import byte_letters
from core.text.tokenizer_base import Meta, Tokenizer, checked_ids

if TYPE_CHECKING:
    import tokenizers


class PublishedTokenizer(Tokenizer):
    """
    The tokenizer of a published model, by Hugging Face's library tokenizers; never learned. whole: the text of its
    tokenizer.json. end_of_text: the id of the token that ends a document, or None.
    """

    name, byte_pair, entries = 'published', True, ('json', 'vocab_size', 'end_of_text')

    def __init__(self, whole: str, n_vocab: int, end_of_text: int | None) -> None:
        self.json, self.n_vocab, self.vocab_size, self.end_of_text = whole, n_vocab, n_vocab, end_of_text

    @classmethod
    def problem(cls, meta: Meta) -> str | None:
        size, end = meta.get('vocab_size', 0), meta.get('end_of_text', -1)
        fit = isinstance(size, int) and size >= 1 and isinstance(meta.get('json'), str)
        fit = fit and (end is None or (isinstance(end, int) and 0 <= end < size))
        return None if fit else 'has no valid "json", "vocab_size" or "end_of_text"'

    @functools.cached_property
    def plain(self) -> 'tokenizers.Tokenizer':
        """The tokenizer that takes the names of special tokens for plain text."""
        fast = self.fast_tokenizer()
        fast.encode_special_tokens = True
        return fast

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of each id: spelled in GPT-2's letters, or SentencePiece's way."""
        byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
        in_letters = 'ByteLevel' in json.dumps(json.loads(self.json).get('decoder'))
        found = [b''] * self.n_vocab
        for piece, i in self.plain.get_vocab().items():
            if in_letters and all(letter in byte_of for letter in piece):
                found[i] = bytes(byte_of[letter] for letter in piece)
            elif re.fullmatch('<0x[0-9A-F]{2}>', piece) and not in_letters:
                found[i] = bytes.fromhex(piece[3:5])
            else:
                found[i] = (piece if in_letters else piece.replace('\u2581', ' ')).encode('utf-8', errors='replace')
        return found

    @property
    def special_token(self) -> str:  # type: ignore[override]
        """The token that ends a document, or the first id's."""
        return self.plain.id_to_token(self.end_of_text or 0) or ''

    def text_ids(self) -> np.ndarray:
        special = {token['id'] for token in json.loads(self.json)['added_tokens'] if token['special']}
        return np.setdiff1d(np.arange(self.n_vocab), [*special, *({self.end_of_text} - {None})])

    def encode_array(self, text: str) -> np.ndarray:
        return np.array(self.encode(text), dtype=np.int32)

    def encode(self, text: str, special: bool = False) -> list[int]:
        fast = self.fast_tokenizer() if special else self.plain
        # half a surrogate pair becomes '?'
        return fast.encode(text.encode('utf-8', errors='replace').decode(), add_special_tokens=False).ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b''.join(self.pieces[i] for i in checked_ids(ids, self.n_vocab))

    def fast_tokenizer(self) -> 'tokenizers.Tokenizer':
        try:
            import tokenizers

            fast = tokenizers.Tokenizer.from_str(self.json)
        except ImportError:
            raise UserError("a published model's tokenizer requires tokenizers: pip install tokenizers") from None
        except Exception as error:  # the library raises nothing more specific
            raise UserError(f"the tokenizer of this model can't be read ({error}); prepare or copy it again") from error
        fast.no_truncation()  # a file may say how a model's input is cut and filled up
        fast.no_padding()
        return fast
