"""
The tokenizers: text to token ids and back, each a subclass of Tokenizer. Their names, sizes and special ids need
neither tiktoken nor a network; vocabularies are loaded on first use.
"""

import abc
import functools
import re
import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from core.cli.errors import UserError
from core.cli.ranges import listed
from core.text import byte_pairs
from core.text.published_tokenizer import PublishedTokenizer
from core.text.tokenizer_base import END_OF_TEXT, NO_TEXT, Meta, Tokenizer, checked_ids

if TYPE_CHECKING:
    import tiktoken
    import tokenizers


class CharTokenizer(Tokenizer):
    """One id per character. chars: the characters in the order of their ids."""

    name, learned_from, entries = 'char', 'characters', ('chars',)

    def __init__(self, chars: str) -> None:
        self.chars, self.n_vocab = chars, len(chars)
        self.ids = np.full(max(map(ord, chars)) + 2, -1, dtype=np.int32)
        self.ids[[ord(char) for char in chars]] = range(len(chars))

    @property
    def special_token(self) -> str:  # type: ignore[override]
        """The character that text can best do without: control characters, then symbols, then punctuation."""
        classes = 'CSPNLMZ'  # of Unicode; the last of a class in the order of code points is the least common
        return max(self.chars, key=lambda c: (not c.isspace(), -classes.index(unicodedata.category(c)[0]), ord(c)))

    @classmethod
    def learn(cls, material: Any = '', vocab_size: int = 0) -> 'CharTokenizer':
        """The tokenizer of the characters in a str, in the order of their code points."""
        return cls(''.join(sorted(set(material))))

    @classmethod
    def problem(cls, meta: Meta) -> str | None:
        chars: Any = meta.get('chars')
        fit = isinstance(chars, str) and 0 < len(chars) == len(set(chars)) == meta.get('vocab_size', len(chars))
        return None if fit else f'has "chars" that are not {meta.get("vocab_size", "all")} different characters'

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of a text as int32. UserError for the first character outside the vocabulary."""
        codes = np.frombuffer(text.encode('utf-32-le', errors='surrogatepass'), dtype='<u4')
        ids = self.ids[np.minimum(codes, len(self.ids) - 1)]
        if len(ids) and ids.min() < 0:
            char = text[int(np.argmax(ids < 0))]
            known = repr(self.chars if self.n_vocab <= 100 else self.chars[:100] + '...')
            raise UserError(f'the character {char!r} is not among the {self.n_vocab} that the model knows: {known}')
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return ''.join(self.chars[i] for i in checked_ids(ids, self.n_vocab))

    def fast_tokenizer(self) -> 'tokenizers.Tokenizer':
        return byte_pairs.word_level({char: i for i, char in enumerate(self.chars)}, r'[\s\S]', self.special_token)


class TableTokenizer(Tokenizer):
    """
    One id per string of a list, as nanoGPT's meta.pkl may have them: words, or characters and special tokens.

    strings: in the order of their ids, None where an id has no text. vocab_size: the model's, which may be larger. Text
    is cut into the longest strings that fit, from its start on. Data sets with it are read and never prepared.
    """

    name, entries = 'table', ('strings', 'vocab_size')

    def __init__(self, strings: list[str | None], vocab_size: int) -> None:
        self.strings, self.vocab_size, self.n_vocab = strings, vocab_size, len(strings)
        self.ids = {string: i for i, string in reversed([*enumerate(strings)]) if string}
        self.longest = max(map(len, self.ids))

    @property
    def padded_vocab_size(self) -> int:
        return self.vocab_size

    @property
    def special_token(self) -> str:  # type: ignore[override]
        """The longest string: among characters it is a special token, and among words a rare one."""
        return max(self.ids, key=len)

    @classmethod
    def problem(cls, meta: Meta) -> str | None:
        strings, size = meta.get('strings') or [], meta.get('vocab_size')
        fit = isinstance(strings, list) and all(each is None or isinstance(each, str) for each in strings)
        fit = fit and any(strings) and isinstance(size, int) and size >= len(strings)
        return None if fit else 'has "strings" that are no strings, or more than "vocab_size"'

    def text_ids(self) -> np.ndarray:
        return np.array(sorted(self.ids.values()))

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of a text as integers. UserError where no string of the table fits."""
        ids, at = [], 0
        while at < len(text):
            ends = range(min(at + self.longest, len(text)), at, -1)
            end = next((end for end in ends if text[at:end] in self.ids), None)
            if end is None:
                known = ', '.join(map(repr, [*self.ids][:8]))
                start = repr(text[at : at + 20])
                raise UserError(f'none of the {len(self.ids)} tokens that the model knows ({known}...) begins {start}')
            ids.append(self.ids[text[at:end]])
            at = end
        return np.array(ids, dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return ''.join(self.strings[i] or '' for i in checked_ids(ids, self.n_vocab))

    def fast_tokenizer(self) -> 'tokenizers.Tokenizer':
        longest_first = sorted(self.ids, key=len, reverse=True)
        return byte_pairs.word_level(self.ids, '|'.join(map(re.escape, longest_first)), self.special_token)


class IdTokenizer(Tokenizer):
    """The ids themselves, as numbers with spaces between them: for a model whose tokens stand for no text here."""

    name = 'ids'

    def __init__(self, n_vocab: int) -> None:
        self.n_vocab = n_vocab

    def encode_array(self, text: str) -> np.ndarray:
        """The numbers in a text. UserError for other words, and for an id outside the vocabulary."""
        for word in text.split():
            if not (word.isascii() and word.isdigit() and int(word[:20]) < self.n_vocab):
                raise UserError(f'{word!r} is no id: this model reads and writes numbers from 0 to {self.n_vocab - 1}')
        return np.array([int(word) for word in text.split()], dtype=np.int64)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return ''.join(f'{i} ' for i in checked_ids(ids, self.n_vocab)).encode()

    def fast_tokenizer(self) -> 'tokenizers.Tokenizer':
        raise UserError('tokens that stand for no text have no tokenizer that could be exported')


class ByteTokenizer(Tokenizer):
    """One id per byte of the UTF-8 text: 256 ids, enough for any text."""

    name, n_vocab, reads_bytes, special_token = 'byte', 256, True, '\0'

    def encode_array(self, text: str | bytes) -> np.ndarray:
        """The ids of a text or of bytes as uint8."""
        if isinstance(text, str):
            text = text.encode('utf-8', errors='surrogateescape')
        return np.frombuffer(text, dtype=np.uint8)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(checked_ids(ids, self.n_vocab))

    def fast_tokenizer(self) -> 'tokenizers.Tokenizer':
        return byte_pairs.byte_level_bpe({bytes([byte]): byte for byte in range(1, 256)}, '\0', 0, split_words=False)


class BytePairTokenizer(Tokenizer):
    """A byte-pair encoding over words, by tiktoken; subclasses set `encoding` and end_of_text, which is the last id."""

    byte_pair = True
    end_of_text: int

    @property
    @abc.abstractmethod
    def encoding(self) -> 'tiktoken.Encoding':
        """The encoding itself. UserError if tiktoken is missing or can't get the vocabulary."""

    def encode_array(self, text: str) -> np.ndarray:
        return self._encoded(self.encoding.encode_to_numpy, text)

    def encode(self, text: str, special: bool = False) -> list[int]:
        return self._encoded(self.encoding.encode, text, allowed_special={END_OF_TEXT} if special else set())

    def _encoded(self, encode: Any, text: str, **how: Any) -> Any:
        """What tiktoken's method returns for a text. UserError where its regular expression gives up."""
        try:
            return encode(text, disallowed_special=(), **how)
        except ValueError as error:
            hint = 'a million blanks in a row, for example, are too many: take them out'
            raise UserError(f"{self.name} can't encode this text ({error}); {hint}") from error

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.encoding.decode_bytes(checked_ids(ids, self.n_vocab))

    def fast_tokenizer(self) -> 'tokenizers.Tokenizer':
        ranks = {token: self.encoding.encode_single_token(token) for token in self.encoding.token_byte_values()}
        return byte_pairs.byte_level_bpe(ranks, END_OF_TEXT, self.end_of_text, split_words=True)


class BPETokenizer(BytePairTokenizer):
    """A byte-pair encoding learned from text. pieces: in the order of their ids, one Latin-1 character per byte."""

    name, learned_from, entries, vocab_sizes = 'bpe', 'text', ('pieces',), range(300, (1 << 16) + 1)

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces
        self.n_vocab, self.end_of_text = len(pieces) + 1, len(pieces)

    @classmethod
    def learn(cls, material: Any = (), vocab_size: int = 0) -> 'BPETokenizer':
        """The encoding learned from an iterable of str. vocab_size: number of ids, 4096 by default."""
        return cls(byte_pairs.learn_bpe(material, vocab_size or 4096))

    @classmethod
    def problem(cls, meta: Meta) -> str | None:
        pieces: Any = meta.get('pieces')
        fit = byte_pairs.are_pieces(pieces) and len(pieces) + 1 == meta.get('vocab_size', len(pieces) + 1)
        return None if fit else 'has "pieces" that are not "vocab_size" - 1 different strings with every single byte'

    @functools.cached_property
    def encoding(self) -> 'tiktoken.Encoding':
        ranks = {piece.encode('latin-1'): i for i, piece in enumerate(self.pieces)}
        how: dict = dict(pat_str=byte_pairs.WORDS, special_tokens={END_OF_TEXT: self.end_of_text})
        return byte_pairs.import_tiktoken().Encoding('bpe', mergeable_ranks=ranks, **how)


class GPT2Tokenizer(BytePairTokenizer):
    """GPT-2's byte-pair encoding."""

    name, n_vocab, end_of_text = 'gpt2', 50257, 50256
    padded_vocab_size = 50304  # the next multiple of 64, for faster matrix multiplications (nanoGPT)

    @functools.cached_property
    def encoding(self) -> 'tiktoken.Encoding':
        return byte_pairs.gpt2_encoding()


# those that text can be prepared with
TOKENIZERS: dict[str, type[Tokenizer]] = {
    kind.name: kind for kind in (CharTokenizer, ByteTokenizer, BPETokenizer, GPT2Tokenizer)
}


def kind_named(name: object) -> type[Tokenizer] | None:
    """The class whose name the meta of a data set or a checkpoint has, or None."""
    kinds: list[type[Tokenizer]] = [*TOKENIZERS.values(), TableTokenizer, PublishedTokenizer]
    return next((kind for kind in kinds if kind.name == name), None)


def kind_to_prepare(tokenizer: str, vocab_size: int = 0) -> type[Tokenizer]:
    """The class that --tokenizer names. UserError if there is none, or if it can't have this many ids."""
    kind = TOKENIZERS.get(tokenizer)
    if kind is None:
        raise UserError(f"tokenizer is '{tokenizer}'; it must be {listed([*TOKENIZERS])}")
    if vocab_size and not kind.vocab_sizes:
        sized = [each.name for each in TOKENIZERS.values() if each.vocab_sizes]
        raise UserError(f'--vocab_size requires --tokenizer={listed(sized)}: the other vocabularies have fixed sizes')
    if vocab_size and (sizes := kind.vocab_sizes) and vocab_size not in sizes:
        raise UserError(f'vocab_size={vocab_size} must be from {sizes[0]} (the 256 bytes are included) to {sizes[-1]}')
    return kind


def tokenizer_of(meta: Meta, vocab_size: int | None = None) -> Tokenizer | None:
    """
    The tokenizer that the meta of a data set or a checkpoint describes, not loaded; None if its ids stand for no text.

    vocab_size: of a model without a meta, such as nanoGPT's: GPT-2's size means GPT-2's tokenizer. UserError for an
    unknown tokenizer or invalid entries.
    """
    if not meta and vocab_size is not None:
        sizes = (GPT2Tokenizer.n_vocab, GPT2Tokenizer.padded_vocab_size)
        return GPT2Tokenizer() if vocab_size in sizes else None
    name = meta.get('tokenizer')
    if name == NO_TEXT:
        return None
    kind = kind_named(name)
    if kind is None:
        raise UserError(f'unknown tokenizer {name!r}; it must be {listed([*TOKENIZERS])}')
    if problem := kind.problem(meta):
        hint = "prepare the data set's meta.json again, or use an older copy of the checkpoint"
        raise UserError(f'the tokenizer {name} {problem}: {hint}')
    return kind.from_meta(meta)


def load_tokenizer(meta: Meta) -> Tokenizer:
    """The tokenizer that a meta describes, ready to encode and decode. UserError without one, or its vocabulary."""
    tokenizer = tokenizer_of(meta)
    if tokenizer is None:
        raise UserError(f'these tokens stand for no text (tokenizer: {NO_TEXT}), so none can be encoded or decoded')
    return tokenizer.load()
