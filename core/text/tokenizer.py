"""
The tokenizers: text to token ids and back.

Notable features:
- each tokenizer is one subclass of Tokenizer, registered in TOKENIZERS: data sets, checkpoints, the prepare scripts,
  export and analysis read its name, sizes and special ids from there
- `load_tokenizer(meta)` returns the tokenizer that the meta of a data set or a checkpoint describes
- sizes and special ids are known without tiktoken and without a network; vocabularies are loaded on first use
"""

import abc
import functools
import re
import threading
import unicodedata

import numpy as np

from core.cli.errors import UserError
from core.cli.ranges import listed

END_OF_TEXT = '<|endoftext|>'  # the text of the token that ends a document, in GPT-2 and in learned encodings
NO_TEXT = 'none'  # meta['tokenizer'] of a data set whose ids stand for no text
# GPT-2's regular expression for splitting text into words; merges never cross words (Radford et al. 2019; encoder.py)
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


# ---- tokenizers ------------------------------------------------------------------------------------------------------


class Tokenizer(abc.ABC):
    """What all tokenizers share. A subclass sets the attributes below and implements the abstract methods."""

    name = ''  # meta['tokenizer'], and --tokenizer of data/text/prepare.py
    n_vocab = None  # number of ids; set per instance if it depends on the text
    end_of_text = None  # id of the token that ends a document, or None
    special_token = END_OF_TEXT  # text of the token that stands for padding and unknown text in `fast_tokenizer`
    byte_pair = False  # splits text into words, so text must be cut between words; documents end with end_of_text
    reads_bytes = False  # encodes bytes that are not UTF-8
    learned_from = None  # what `learn` takes: 'characters' (all that occur), 'text' (a sample), or None
    vocab_sizes = None  # the range of sizes that `learn` accepts; None if the size can't be chosen

    @property
    def padded_vocab_size(self):
        """The vocabulary size of a new model for this tokenizer."""
        return self.n_vocab

    @classmethod
    def learn(cls, material=None, vocab_size=0):
        """A tokenizer for a text. material: see learned_from; vocab_size: one of vocab_sizes, or 0 for the default."""
        return cls()

    @classmethod
    def from_meta(cls, meta):
        """The tokenizer that a valid meta describes; its vocabulary is not loaded yet."""
        return cls()

    @classmethod
    def problem(cls, meta):
        """The first invalid tokenizer entry of a meta, as a predicate ('has ...'), or None if all are valid."""
        size = meta.get('vocab_size', cls.n_vocab)
        return None if size == cls.n_vocab else f'has vocab_size {size}, but {cls.name} has {cls.n_vocab:,} ids'

    def meta(self):
        """The tokenizer's entries in meta.json, as a dict: all that from_meta needs."""
        return {'tokenizer': self.name, 'vocab_size': self.n_vocab}

    def load(self):
        """Load the vocabulary; returns self. UserError if it's not available."""
        return self

    def text_ids(self):
        """The ids that text can contain, special tokens excluded, as an ascending int array."""
        ids = np.arange(self.n_vocab)
        return ids[ids != self.end_of_text] if self.end_of_text is not None else ids

    @abc.abstractmethod
    def encode_array(self, text):
        """The ids of a str as an integer array. Special tokens are not recognized: their names are plain text."""

    def encode(self, text, special=False):
        """The ids of a str as a list of int. special: encode '<|endoftext|>' as that token, if the tokenizer has it."""
        return self.encode_array(text).tolist()

    def decode(self, ids):
        """The str of an iterable of ids; bytes that are not UTF-8 become U+FFFD. ValueError for an unknown id."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    @abc.abstractmethod
    def decode_bytes(self, ids):
        """The UTF-8 bytes of an iterable of ids; characters may be incomplete. ValueError for an unknown id."""

    @abc.abstractmethod
    def fast_tokenizer(self):
        """
        The same tokenizer as a `tokenizers.Tokenizer`, the class that Hugging Face's transformers builds on.

        Text is encoded to the same ids, except that special_token is recognized in it. It has an id of the vocabulary.
        """


class CharTokenizer(Tokenizer):
    """One id per character. chars: a str of the characters in the order of their ids."""

    name, learned_from = 'char', 'characters'

    def __init__(self, chars):
        self.chars = chars
        self.n_vocab = len(chars)
        self.ids = np.full(max(map(ord, chars)) + 2, -1, dtype=np.int32)
        self.ids[[ord(char) for char in chars]] = range(len(chars))

    @property
    def special_token(self):
        """The character that text can best do without: control characters, then symbols, then punctuation."""
        classes = 'CSPNLMZ'  # of Unicode; the last of a class in the order of code points is the least common
        return max(self.chars, key=lambda c: (not c.isspace(), -classes.index(unicodedata.category(c)[0]), ord(c)))

    @classmethod
    def learn(cls, material, vocab_size=0):
        """The tokenizer of the characters in a str, in the order of their code points."""
        return cls(''.join(sorted(set(material))))

    @classmethod
    def from_meta(cls, meta):
        return cls(meta['chars'])

    @classmethod
    def problem(cls, meta):
        chars, size = meta.get('chars'), meta.get('vocab_size')
        if isinstance(chars, str) and 0 < len(chars) == len(set(chars)) and size in (None, len(chars)):
            return None
        return 'has no valid "chars"' if size is None else f'has "chars" that are not {size} different characters'

    def meta(self):
        return {**super().meta(), 'chars': self.chars}

    def encode_array(self, text):
        """The ids of a str as an int32 array. UserError for the first character outside the vocabulary."""
        codes = code_points(text)
        ids = self.ids[np.minimum(codes, len(self.ids) - 1)]
        if len(ids) and ids.min() < 0:
            char = text[int(np.argmax(ids < 0))]
            known = repr(self.chars if self.n_vocab <= 100 else self.chars[:100] + '...')
            raise UserError(f'the character {char!r} is not among the {self.n_vocab} that the model knows: {known}')
        return ids

    def decode(self, ids):
        return ''.join(self.chars[i] for i in checked_ids(ids, self.n_vocab))

    def decode_bytes(self, ids):
        return self.decode(ids).encode('utf-8', errors='replace')

    def fast_tokenizer(self):
        import tokenizers

        ids = {char: i for i, char in enumerate(self.chars)}
        fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=self.special_token))
        fast.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r'[\s\S]'), 'isolated')
        fast.decoder = tokenizers.decoders.Fuse()
        fast.add_special_tokens([tokenizers.AddedToken(self.special_token, normalized=False)])
        return fast


class ByteTokenizer(Tokenizer):
    """One id per byte of the UTF-8 text: 256 ids, enough for any text."""

    name, n_vocab, reads_bytes, special_token = 'byte', 256, True, '\0'

    def encode_array(self, text):
        """The ids of a str or of bytes as a uint8 array."""
        if isinstance(text, str):
            text = text.encode('utf-8', errors='surrogateescape')
        return np.frombuffer(text, dtype=np.uint8)

    def decode_bytes(self, ids):
        return bytes(checked_ids(ids, self.n_vocab))

    def fast_tokenizer(self):
        return byte_level_bpe({bytes([byte]): byte for byte in range(1, 256)}, '\0', 0, split_words=False)


class BytePairTokenizer(Tokenizer):
    """
    A byte-pair encoding over words, computed by tiktoken; the last id is <|endoftext|>.

    Subclasses set end_of_text and `encoding`, a tiktoken.Encoding.
    """

    byte_pair = True

    def load(self):
        self.encoding  # noqa: B018  (a cached property)
        return self

    def encode_array(self, text):
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def encode(self, text, special=False):
        if special:
            return self.encoding.encode(text, allowed_special={END_OF_TEXT})
        return self.encoding.encode_ordinary(text)

    def decode_bytes(self, ids):
        return self.encoding.decode_bytes(checked_ids(ids, self.n_vocab))

    def fast_tokenizer(self):
        ranks = {token: self.encoding.encode_single_token(token) for token in self.encoding.token_byte_values()}
        return byte_level_bpe(ranks, END_OF_TEXT, self.end_of_text, split_words=True)


class BPETokenizer(BytePairTokenizer):
    """
    A byte-pair encoding learned from the training text.

    pieces: a list of str in the order of their ids, one Latin-1 character per byte; see `learn_bpe`.
    """

    name, learned_from, vocab_sizes = 'bpe', 'text', range(300, (1 << 16) + 1)

    def __init__(self, pieces):
        self.pieces = pieces
        self.n_vocab, self.end_of_text = len(pieces) + 1, len(pieces)

    @classmethod
    def learn(cls, material, vocab_size=0):
        """The encoding learned from an iterable of str. vocab_size: number of ids, 4096 by default."""
        return cls(learn_bpe(material, vocab_size or 4096))

    @classmethod
    def from_meta(cls, meta):
        return cls(meta['pieces'])

    @classmethod
    def problem(cls, meta):
        pieces, size = meta.get('pieces'), meta.get('vocab_size')
        if are_pieces(pieces) and size in (None, len(pieces) + 1):
            return None
        if not isinstance(size, int):
            return 'has no valid "pieces"'
        return f'has "pieces" that are not {size - 1} different strings that include every single byte'

    def meta(self):
        return {**super().meta(), 'pieces': self.pieces}

    @functools.cached_property
    def encoding(self):
        """The tiktoken.Encoding. UserError if tiktoken is missing."""
        ranks = {piece.encode('latin-1'): i for i, piece in enumerate(self.pieces)}
        special = {END_OF_TEXT: self.end_of_text}
        return import_tiktoken().Encoding('bpe', pat_str=WORDS, mergeable_ranks=ranks, special_tokens=special)


class GPT2Tokenizer(BytePairTokenizer):
    """GPT-2's byte-pair encoding."""

    name, n_vocab, end_of_text = 'gpt2', 50257, 50256
    padded_vocab_size = 50304  # the next multiple of 64, for faster matrix multiplications (nanoGPT)

    @functools.cached_property
    def encoding(self):
        """The tiktoken.Encoding. UserError if tiktoken is missing or can't get the vocabulary."""
        return gpt2_encoding()


TOKENIZERS = {kind.name: kind for kind in (CharTokenizer, ByteTokenizer, BPETokenizer, GPT2Tokenizer)}


def tokenizer_of(meta, vocab_size=None):
    """
    The tokenizer that the meta of a data set or a checkpoint describes, not loaded; None if its ids stand for no text.

    vocab_size: the model's. nanoGPT's checkpoints have no meta; with GPT-2's vocabulary size they have its tokenizer.
    Requires neither tiktoken nor a network. UserError for an unknown tokenizer or invalid entries.
    """
    if not meta and vocab_size is not None:
        sizes = (GPT2Tokenizer.n_vocab, GPT2Tokenizer.padded_vocab_size)
        return GPT2Tokenizer() if vocab_size in sizes else None
    name = meta.get('tokenizer')
    if name == NO_TEXT:
        return None
    if name not in list(TOKENIZERS):  # a list, because `name` may be unhashable
        raise UserError(f'unknown tokenizer {name!r}; it must be {listed([*TOKENIZERS])}')
    if problem := TOKENIZERS[name].problem(meta):
        raise UserError(f"the tokenizer {name} {problem}: prepare the data set's meta.json again, or use an older copy "
                        'of the checkpoint')  # fmt: skip
    return TOKENIZERS[name].from_meta(meta)


def load_tokenizer(meta):
    """
    The tokenizer that the meta of a data set or a checkpoint describes, ready to encode and decode.

    UserError if there is none, or if its vocabulary is not available.
    """
    tokenizer = tokenizer_of(meta)
    if tokenizer is None:
        raise UserError(f'these tokens stand for no text (tokenizer: {NO_TEXT}), so none can be encoded or decoded')
    return tokenizer.load()


# ---- characters and ids ----------------------------------------------------------------------------------------------


def checked_ids(ids, n_vocab):
    """An iterable of ids as a list of int. ValueError if one is outside the vocabulary."""
    ids = [int(i) for i in ids]
    if ids and not 0 <= min(ids) <= max(ids) < n_vocab:
        raise ValueError(f'ids {min(ids)} to {max(ids)} are outside a vocabulary of {n_vocab}')
    return ids


def code_points(text):
    """The code points of a str as a uint32 array."""
    return np.frombuffer(text.encode('utf-32-le', errors='surrogatepass'), dtype='<u4')


# ---- byte-pair encodings ---------------------------------------------------------------------------------------------


LONGEST_WORD = 256  # characters; longer words are learned from in pieces: the trainer's time grows with their square
DISTINCT = 1 << 23  # bytes of different words to learn from; the trainer takes about 100 times as much memory


def learn_bpe(texts, vocab_size):
    """
    Learn a byte-pair encoding (arXiv:1508.07909) from an iterable of str; returns the pieces of a BPETokenizer.

    vocab_size: number of ids, <|endoftext|> included; the result has fewer if the text has no more pairs, and at least
    257. The 256 bytes come first, so any text can be encoded. UserError if the library is missing.

    Time and memory grow with the words that differ. In text without spaces nearly all do, so an even part of it is used
    (see with_distinct_words).
    """
    try:
        import tokenizers
    except ImportError:
        raise UserError('learning a byte-pair encoding requires tokenizers: pip install tokenizers') from None
    letters = byte_letters()
    byte_of = {letter: chr(byte) for byte, letter in enumerate(letters)}
    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    size = vocab_size - 1
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=letters, show_progress=False)
    fast.train_from_iterator(shorter_words(with_distinct_words(list(texts))), trainer)
    ids = fast.get_vocab()
    return [''.join(byte_of[letter] for letter in piece) for piece in sorted(ids, key=ids.get)]


def with_distinct_words(texts, most=DISTINCT):
    """
    A list of str, or so many evenly spaced parts of it that their different words have at most `most` bytes.

    A word is what white space surrounds, or LONGEST_WORD characters of it.
    """
    if more_distinct_words(texts, most):
        texts = [text[i : i + (1 << 14)] for text in texts for i in range(0, len(text), 1 << 14)]
        while len(texts) > 1 and more_distinct_words(texts, most):
            texts = texts[::2]
    return texts


def shorter_words(texts):
    """Yields the texts, cut where a word is longer than LONGEST_WORD."""
    for text in texts:
        end = 0
        for found in re.finditer(rf'\S{{{LONGEST_WORD}}}(?=\S)', text):
            yield text[end : found.end()]
            end = found.end()
        yield text[end:]


def more_distinct_words(texts, most):
    """True if the different words of some texts have more than `most` bytes together."""
    seen, size = set(), 0
    for text in texts:
        new = set(re.findall(rf'\S{{1,{LONGEST_WORD}}}', text)) - seen
        seen |= new
        size += sum(len(word.encode('utf-8', errors='surrogatepass')) for word in new)
        if size > most:
            return True
    return False


def are_pieces(pieces):
    """True if `pieces` are valid for a BPETokenizer: different strings of bytes that include every single byte."""
    if not isinstance(pieces, list) or not all(isinstance(piece, str) and piece for piece in pieces):
        return False
    single = {chr(byte) for byte in range(256)}
    return len(set(pieces)) == len(pieces) and set(pieces) >= single >= set(''.join(pieces))


def sample_evenly(texts, total, most):
    """
    Yields evenly spaced elements of an iterable of str: about `most` characters, or all if there are fewer.

    total: the number of characters in all elements.
    """
    taken = position = 0
    for text in texts:
        if taken * total <= position * most:
            taken += len(text)
            yield text
        position += len(text)


def byte_letters():
    """The printable character that GPT-2's vocabulary file has for each byte: a list of 256 characters."""
    shown = [*range(ord('!'), ord('~') + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in shown}
    hidden = (byte for byte in range(256) if byte not in letters)
    return [*dict(sorted({**letters, **{byte: chr(256 + n) for n, byte in enumerate(hidden)}}.items())).values()]


def byte_level_bpe(ranks, special_token, special_id, split_words):
    """
    A `tokenizers.Tokenizer` of the byte-pair encoding with these ranks, a dict {token as bytes: id}.

    special_token: a str that is recognized in text and encoded as special_id.
    """
    import tokenizers

    letters = byte_letters()
    spelled = {token: ''.join(letters[byte] for byte in token) for token in ranks}
    vocab = {spelled[token]: rank for token, rank in ranks.items()} | {special_token: special_id}
    merges = [(spelled[a], spelled[b]) for a, b in merges_of(ranks)]
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    fast.decoder = tokenizers.decoders.ByteLevel()
    fast.add_special_tokens([tokenizers.AddedToken(special_token, normalized=False)])
    return fast


def merges_of(ranks):
    """The merges of a byte-pair encoding in the order of their ranks: for each token, the two tokens that form it."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            yield tuple(parts)


def import_tiktoken():
    """The module tiktoken. UserError if it is missing."""
    try:
        import tiktoken
    except ImportError:
        raise UserError('byte-pair encodings require tiktoken: pip install tiktoken') from None
    return tiktoken


def gpt2_encoding(seconds=60):
    """tiktoken's GPT-2 encoding. UserError after `seconds`: tiktoken downloads the vocabulary without a time limit."""
    get_encoding = import_tiktoken().get_encoding
    try:
        return within(seconds, lambda: get_encoding('gpt2'))
    except Exception as error:  # whatever the network, a proxy or a broken cache raises
        raise UserError(
            f"tiktoken can't get GPT-2's vocabulary ({type(error).__name__}): it downloads two files once; without a "
            'network, copy its cache from another machine and set TIKTOKEN_CACHE_DIR to that folder'
        ) from error


def within(seconds, work):
    """Returns or raises what work() does, or raises TimeoutError after `seconds`. In a thread: DNS lookups hang too."""
    outcome = []

    def run():
        try:
            outcome.append((work(), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f'no answer within {seconds} seconds')
    result, error = outcome[0]
    if error is not None:
        raise error
    return result
