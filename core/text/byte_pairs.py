"""Byte-pair encodings: learned from text, converted to what Hugging Face reads, and GPT-2's own from tiktoken."""

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from core.cli.errors import UserError

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

Result = TypeVar('Result')

# GPT-2's regular expression for splitting text into words; merges never cross words (Radford et al. 2019; encoder.py)
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LONGEST_WORD = 256  # characters; longer words are learned from in pieces: the trainer's time grows with their square
LONG = rf'\S{{{LONGEST_WORD}}}|\s{{{LONGEST_WORD}}}'  # of letters, or of white space
DISTINCT = 1 << 23  # bytes of different words to learn from; the trainer takes about 100 times as much memory


def learn_bpe(texts: Iterable[str], vocab_size: int) -> list[str]:
    """
    Learn a byte-pair encoding (arXiv:1508.07909) from some text; returns the pieces of a BPETokenizer.

    vocab_size: number of ids, <|endoftext|> included; the result has fewer if the text has no more pairs, and at least
    257: the 256 bytes come first, so any text can be encoded. UserError if the library is missing. Time and memory grow
    with the words that differ: of text without spaces an even part is used (see with_distinct_words).
    """
    try:
        import tokenizers
    except ImportError:
        raise UserError('learning a byte-pair encoding requires tokenizers: pip install tokenizers') from None
    letters = byte_letters()
    byte_of = {letter: chr(byte) for byte, letter in enumerate(letters)}
    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    long_words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(LONG), 'isolated')
    words = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([long_words, words])
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=letters, show_progress=False)
    fast.train_from_iterator(with_distinct_words(list(texts)), trainer)
    ids = fast.get_vocab()
    return [''.join(byte_of[letter] for letter in piece) for piece in sorted(ids, key=ids.__getitem__)]


def with_distinct_words(texts: list[str], most: int = DISTINCT) -> list[str]:
    """
    The texts, or so many evenly spaced parts of it that their different words have at most `most` bytes. A word is what
    white space surrounds, or LONGEST_WORD characters of it.
    """
    if more_distinct_words(texts, most):
        texts = [text[i : i + (1 << 14)] for text in texts for i in range(0, len(text), 1 << 14)]
        while len(texts) > 1 and more_distinct_words(texts, most):
            texts = texts[::2]
    return texts


def more_distinct_words(texts: list[str], most: int) -> bool:
    """True if the different words of some texts have more than `most` bytes together."""
    seen: set[str] = set()
    size = 0
    for text in texts:
        new = set(re.findall(rf'\S{{1,{LONGEST_WORD}}}', text)) - seen
        seen |= new
        size += sum(len(word.encode('utf-8', errors='surrogatepass')) for word in new)
        if size > most:
            return True
    return False


def are_pieces(pieces: Any) -> bool:
    """True if `pieces` are valid for a BPETokenizer: different strings of bytes that include every single byte."""
    if not isinstance(pieces, list) or not all(isinstance(piece, str) and piece for piece in pieces):
        return False
    single = {chr(byte) for byte in range(256)}
    return len(set(pieces)) == len(pieces) and set(pieces) >= single >= set(''.join(pieces))


def byte_letters() -> list[str]:
    """The printable character that GPT-2's vocabulary file has for each of the 256 bytes."""
    shown = {*range(ord('!'), ord('~') + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]


def byte_level_bpe(
    ranks: dict[bytes, int], special_token: str, special_id: int, split_words: bool
) -> 'tokenizers.Tokenizer':
    """The byte-pair encoding with these ranks, {token: id}. special_token: recognized in text, with special_id."""
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


def word_level(ids: dict[str, int], pattern: str, special_token: str) -> 'tokenizers.Tokenizer':
    """A tokenizer that cuts text into the matches of a pattern, each with an id. special_token: one of the strings."""
    import tokenizers

    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=special_token))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated')
    fast.decoder = tokenizers.decoders.Fuse()
    fast.add_special_tokens([tokenizers.AddedToken(special_token, normalized=False)])
    return fast


def merges_of(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The merges of a byte-pair encoding in the order of their ranks: for each token, the two tokens that form it."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def import_tiktoken() -> ModuleType:
    """The module tiktoken. UserError if it is missing."""
    try:
        import tiktoken
    except ImportError:
        raise UserError('byte-pair encodings require tiktoken: pip install tiktoken') from None
    return tiktoken


def gpt2_encoding(seconds: float = 60) -> 'tiktoken.Encoding':
    """tiktoken's GPT-2 encoding. UserError after `seconds`: tiktoken downloads the vocabulary without a time limit."""
    get_encoding = import_tiktoken().get_encoding
    try:
        return within(seconds, lambda: get_encoding('gpt2'))
    except Exception as error:  # whatever the network, a proxy or a broken cache raises
        hint = 'without a network, copy its cache from another machine and set TIKTOKEN_CACHE_DIR to that folder'
        raise UserError(f"tiktoken can't get GPT-2's vocabulary ({type(error).__name__}): {hint}") from error


def within(seconds: float, work: Callable[[], Result]) -> Result:
    """Returns or raises what work() does, or raises TimeoutError after `seconds`. In a thread: DNS lookups hang too."""
    outcome: Future[Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome.result(seconds)
