"""
The tokenizers: text to token ids and back.
"""

import threading

import numpy as np

from core.runtime import UserError

END_OF_TEXT = 50256  # GPT-2's <|endoftext|>, which follows every document
GPT2_VOCAB = 50257
GPT2_PADDED_VOCAB = 50304  # the next multiple of 64 above 50257: faster matrix products (nanoGPT)
BYTE_PAIR_TOKENIZERS = ('gpt2', 'bpe')  # those that cut a text into words, and have a token that ends a document
# Where GPT-2's tokenizer cuts a text into words, between which it joins nothing (Radford et al. 2019; encoder.py)
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


# ---- tokenizers ------------------------------------------------------------------------------------------------------


class CharTokenizer:
    """One id per character. chars: a str of the characters in the order of their ids."""

    name, end_of_text = 'char', None

    def __init__(self, chars):
        self.chars = chars
        self.n_vocab = len(chars)
        self.ids = np.full(max(map(ord, chars)) + 2, -1, dtype=np.int32)
        self.ids[[ord(char) for char in chars]] = range(len(chars))

    def encode_array(self, text):
        """The ids of a str as an int32 array. UserError names the first character outside the vocabulary."""
        codes = code_points(text)
        ids = self.ids[np.minimum(codes, len(self.ids) - 1)]
        if len(ids) and ids.min() < 0:
            char = text[int(np.argmax(ids < 0))]
            known = repr(self.chars if self.n_vocab <= 100 else self.chars[:100] + '...')
            raise UserError(f'the character {char!r} is not among the {self.n_vocab} that the model knows: {known}')
        return ids

    def encode(self, text, special=False):
        """The ids of a str as a list of int. There are no special tokens: `special` changes nothing."""
        return self.encode_array(text).tolist()

    def decode(self, ids):
        """The str of some ids. ValueError for an id outside the vocabulary."""
        return ''.join(self.chars[i] for i in known_ids(ids, self.n_vocab))

    def decode_bytes(self, ids):
        """The same as UTF-8 bytes."""
        return self.decode(ids).encode('utf-8', errors='replace')


class ByteTokenizer:
    """One id per byte of the UTF-8 text: 256 ids, and no text that it can't encode."""

    name, end_of_text, n_vocab = 'byte', None, 256

    def encode_array(self, text):
        """The ids of a str, or of bytes as they are, as a uint8 array."""
        if isinstance(text, str):
            text = text.encode('utf-8', errors='surrogateescape')
        return np.frombuffer(text, dtype=np.uint8)

    def encode(self, text, special=False):
        """The ids of a str as a list of int. There are no special tokens: `special` changes nothing."""
        return self.encode_array(text).tolist()

    def decode(self, ids):
        """The str of some ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def decode_bytes(self, ids):
        """The bytes of some ids. ValueError for an id outside the vocabulary."""
        return bytes(known_ids(ids, self.n_vocab))


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, by tiktoken. UserError where tiktoken or its vocabulary can't be had."""

    name, end_of_text, n_vocab = 'gpt2', END_OF_TEXT, GPT2_VOCAB

    def __init__(self):
        self.encoding = gpt2_encoding()

    def encode_array(self, text):
        """The ids of a str as a uint32 array; '<|endoftext|>' in it is text like any other."""
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def encode(self, text, special=False):
        """The ids of a str as a list of int; with `special`, '<|endoftext|>' in it is the token of that name."""
        if special:
            return self.encoding.encode(text, allowed_special={'<|endoftext|>'})
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        """The str of some ids; a character that is cut off becomes U+FFFD."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def decode_bytes(self, ids):
        """The bytes of some ids. ValueError for an id outside the vocabulary."""
        return self.encoding.decode_bytes(known_ids(ids, self.n_vocab))


class BPETokenizer(GPT2Tokenizer):
    """
    A byte-pair encoding of one's own, as `learn_bpe` gives it; <|endoftext|> is its last id.

    pieces: a list of str in the order of their ids, a character for each byte (Latin-1). UserError without tiktoken.
    """

    name = 'bpe'

    def __init__(self, pieces):
        self.n_vocab, self.end_of_text = len(pieces) + 1, len(pieces)
        self.encoding = bpe_encoding(pieces)


def load_tokenizer(meta):
    """
    The tokenizer that a data set's or a checkpoint's meta describes.

    It has `encode(text) -> list of int`, `decode(ids) -> str`, `decode_bytes(ids) -> bytes` (for a stream, to be put
    through an incremental decoder), `n_vocab`, and `end_of_text` (an id, or None). UserError where there is none.
    """
    name = meta.get('tokenizer')
    if name == 'char' and meta.get('chars'):
        return CharTokenizer(meta['chars'])
    if name == 'byte':
        return ByteTokenizer()
    if name == 'gpt2':
        return GPT2Tokenizer()
    if name == 'bpe' and are_pieces(meta.get('pieces')):
        return BPETokenizer(meta['pieces'])
    if name in ('char', 'bpe'):
        part = {'char': 'chars', 'bpe': 'pieces'}[name]
        raise UserError(f"the tokenizer {name} lacks its {part}: prepare the data set's meta.json again, or use an "
                        'older copy of the checkpoint')  # fmt: skip
    if name == 'none':
        raise UserError('these tokens stand for no text (tokenizer: none), so none can be encoded or written')
    raise UserError(f'unknown tokenizer {name!r}; it must be char, byte, bpe or gpt2')


def gpt2_encoding(seconds=60):
    """tiktoken's GPT-2 encoding. tiktoken asks the network without a time-out, so that the wait is limited here."""
    try:
        import tiktoken
    except ImportError:
        raise UserError('the GPT-2 tokenizer needs tiktoken: pip install tiktoken') from None
    try:
        return within(seconds, lambda: tiktoken.get_encoding('gpt2'))
    except Exception as error:  # whatever the network, a proxy or a broken cache raises
        raise UserError(
            f"tiktoken can't get GPT-2's vocabulary ({type(error).__name__}): it downloads two files once; without a "
            'network, copy its cache from a machine that has one and set TIKTOKEN_CACHE_DIR to that folder'
        ) from error


def bpe_encoding(pieces):
    """tiktoken's encoding by these pieces (see BPETokenizer), after the same cuts into words as GPT-2's."""
    try:
        import tiktoken
    except ImportError:
        raise UserError('the bpe tokenizer needs tiktoken: pip install tiktoken') from None
    ranks = {piece.encode('latin-1'): i for i, piece in enumerate(pieces)}
    special = {'<|endoftext|>': len(pieces)}
    return tiktoken.Encoding('bpe', pat_str=WORDS, mergeable_ranks=ranks, special_tokens=special)


def learn_bpe(texts, vocab_size):
    """
    Learn a byte-pair encoding (arXiv:1508.07909) from an iterable of str: the pieces of a BPETokenizer.

    vocab_size: ids, <|endoftext|> among them; fewer come out where the text has no more pairs. At least 257 do: the 256
    bytes come first, so that there is no text that can't be encoded. UserError where the library is missing.
    """
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        raise UserError('learning a byte-pair encoding needs tokenizers: pip install tokenizers') from None
    letter_of = byte_letters()
    byte_of = {letter: chr(byte) for byte, letter in enumerate(letter_of)}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=letter_of, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    ids = tokenizer.get_vocab()
    return [''.join(byte_of[letter] for letter in piece) for piece in sorted(ids, key=ids.get)]


def evenly(texts, total, most):
    """Of an iterable of str, `total` characters long, as many as make up about `most`, in even steps; all if fewer."""
    taken = position = 0
    for text in texts:
        if taken * total <= position * most:
            taken += len(text)
            yield text
        position += len(text)


def byte_letters():
    """GPT-2's printable stand-in for each byte, by which its vocabulary is written: a list of 256 characters."""
    shown = [*range(ord('!'), ord('~') + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in shown}
    hidden = (byte for byte in range(256) if byte not in letters)
    return [*dict(sorted({**letters, **{byte: chr(256 + n) for n, byte in enumerate(hidden)}}.items())).values()]


def within(seconds, work):
    """What work() returns or raises; TimeoutError when that takes longer. Name look-ups too can hang, so a thread."""
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


def known_ids(ids, n_vocab):
    """Any iterable of ids as a list of int. ValueError if one is outside the vocabulary."""
    ids = [int(i) for i in ids]
    if ids and not 0 <= min(ids) <= max(ids) < n_vocab:
        raise ValueError(f'ids {min(ids)} to {max(ids)} go beyond a vocabulary of {n_vocab}')
    return ids


def code_points(text):
    """The code points of a str as a uint32 array."""
    return np.frombuffer(text.encode('utf-32-le', errors='surrogatepass'), dtype='<u4')


def are_pieces(pieces):
    """Whether `pieces` can be those of a BPETokenizer: different strings of bytes, every single byte among them."""
    if not isinstance(pieces, list) or not all(isinstance(piece, str) and piece for piece in pieces):
        return False
    single = {chr(byte) for byte in range(256)}
    return len(set(pieces)) == len(pieces) and set(pieces) >= single >= set(''.join(pieces))
