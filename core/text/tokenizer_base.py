"""What all tokenizers share: their base class, and the names of special tokens."""

import abc
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import tokenizers

Meta = dict[str, Any]  # of a data set, or what a checkpoint records of it

END_OF_TEXT = '<|endoftext|>'  # the text of the token that ends a document, in GPT-2 and in learned encodings
NO_TEXT = 'none'  # meta['tokenizer'] of a data set whose ids stand for no text


class Tokenizer(abc.ABC):
    """What all tokenizers share. A subclass sets the attributes below, and has one of decode and decode_bytes."""

    name = ''  # meta['tokenizer'], and --tokenizer of data/text/prepare.py
    n_vocab: int  # number of ids; set per instance if it depends on the text
    end_of_text: int | None = None  # id of the token that ends a document
    special_token = END_OF_TEXT  # text of the token that stands for padding and unknown text in `fast_tokenizer`
    byte_pair = False  # splits text into words, so text must be cut between words; documents end with end_of_text
    reads_bytes = False  # encodes bytes that are not UTF-8
    learned_from: str | None = None  # what `learn` takes: 'characters' (all that occur), 'text' (a sample), or None
    vocab_sizes: range | None = None  # the sizes that `learn` accepts; None if the size can't be chosen
    entries: tuple[str, ...] = ()  # of its meta: what the class is called with, and its attributes of the same names

    @property
    def padded_vocab_size(self) -> int:
        """The vocabulary size of a new model for this tokenizer."""
        return self.n_vocab

    @classmethod
    def learn(cls, material: Any = None, vocab_size: int = 0) -> 'Tokenizer':
        """A tokenizer for a text. material: see learned_from; vocab_size: one of vocab_sizes, or 0 for the default."""
        return cls()

    @classmethod
    def from_meta(cls, meta: Meta) -> 'Tokenizer':
        """The tokenizer that a valid meta describes; its vocabulary is not loaded yet."""
        make: Any = cls
        return make(*(meta[entry] for entry in cls.entries))

    @classmethod
    def problem(cls, meta: Meta) -> str | None:
        """The first invalid tokenizer entry of a meta, as a predicate ('has ...'), or None if all are valid."""
        size = meta.get('vocab_size', cls.n_vocab)
        return None if size == cls.n_vocab else f'has vocab_size {size}, but {cls.name} has {cls.n_vocab:,} ids'

    def meta(self) -> Meta:
        """The tokenizer's entries in meta.json: all that from_meta needs."""
        own = {entry: getattr(self, entry) for entry in self.entries}
        return {'tokenizer': self.name, 'vocab_size': self.n_vocab, **own}

    def load(self) -> 'Tokenizer':
        """Load the vocabulary; returns self. UserError if it's not available."""
        self.encode_array('')
        return self

    def text_ids(self) -> np.ndarray:
        """The ids that text can contain, special tokens excluded, in ascending order."""
        ids = np.arange(self.n_vocab)
        return ids[ids != self.end_of_text] if self.end_of_text is not None else ids

    @abc.abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """The ids of a text as integers. Special tokens are not recognized: their names are plain text."""

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The ids of a text. special: encode '<|endoftext|>' as that token, if the tokenizer has it."""
        return self.encode_array(text).tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; bytes that are not UTF-8 become U+FFFD. ValueError for an unknown id."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 text of some ids; characters may be incomplete. ValueError for an unknown id."""
        return self.decode(ids).encode('utf-8', errors='replace')

    @abc.abstractmethod
    def fast_tokenizer(self) -> 'tokenizers.Tokenizer':
        """
        The same tokenizer in the class that Hugging Face's transformers builds on: text is encoded to the same ids,
        except that special_token is recognized in it. It has an id of the vocabulary.
        """


def checked_ids(ids: Iterable[int], n_vocab: int) -> list[int]:
    """Some ids as a list of int. ValueError if one is outside the vocabulary."""
    ids = [int(i) for i in ids]
    if ids and not 0 <= min(ids) <= max(ids) < n_vocab:
        raise ValueError(f'ids {min(ids)} to {max(ids)} are outside a vocabulary of {n_vocab}')
    return ids
