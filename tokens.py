"""
The data set on disk, the tokenizers, and which windows of it make batch number n.

Notable features:
- a data set is a folder: `train.bin` and `val.bin` (little-endian uint16, or uint32), and `meta.json`, which says the
  rest: tokenizer, vocabulary, tokens per split, source, checksums. nanoGPT's folders (`meta.pkl` or none) are read too
- batch n is a function of (seed, n, size, the data) alone: a counter-based generator is asked for it, nothing is drawn
  in sequence, so neither the model nor evaluation, world size or a resumed run can change it
- validation windows are fixed, evenly spaced and never overlap
- files of any size are memory-mapped; a batch costs the reading of its own rows
- every broken data set ends in one line that says what is wrong and which command mends it
- loading never runs code: JSON, and for nanoGPT's `meta.pkl` an unpickler that admits no class and no function
"""

import collections
import hashlib
import io
import itertools
import json
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from runtime import UserError, available_cores, notice

FORMAT = 1
SPLITS = ('train', 'val')
END_OF_TEXT = 50256  # GPT-2's <|endoftext|>, which follows every document
GPT2_VOCAB = 50257
GPT2_PADDED_VOCAB = 50304  # the next multiple of 64 above 50257: faster matrix products (nanoGPT)
CHUNK = 1 << 18  # characters that a worker encodes at a time
BYTE_PAIR_TOKENIZERS = ('gpt2', 'bpe')  # those that cut a text into words, and have a token that ends a document
# Where GPT-2's tokenizer cuts a text into words, between which it joins nothing (Radford et al. 2019; encoder.py)
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LONGEST_RUN = 1 << 22  # characters without any white space after which a text is cut all the same
CHECKED_WHOLE = 1 << 25  # tokens up to which every id is checked when a file is opened; of longer files a sample

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


# ---- encoding much text by all cores ---------------------------------------------------------------------------------


def chunks(blocks, size=CHUNK):
    """
    Join and cut a stream of str into pieces of about `size` characters that gpt2 and bpe encode as they do the whole.

    A cut goes in front of a space or newline that a visible character follows. There GPT-2's pattern always starts a
    new piece, and what is left of it splits as if the text ended there; merges never cross pieces. A run of over
    LONGEST_RUN characters without such a place is cut anywhere.
    """
    rest = ''
    for block in blocks:
        rest += block
        if len(rest) >= size:
            at = last_cut(rest) or (len(rest) if len(rest) > LONGEST_RUN else 0)
            if at:
                yield rest[:at]
                rest = rest[at:]
    if rest:
        yield rest


def last_cut(text):
    """The last index > 0 at which `text` can be cut (see `chunks`), or 0 if there is none."""
    for i in range(len(text) - 2, 0, -1):
        if text[i] in ' \n' and not text[i + 1].isspace():
            return i
    return 0


def encode_stream(tokenizer, pieces, workers=0, bar=None):
    """
    Encode a stream of pieces by all cores: yields uint arrays, in order, equal to those of a serial run.

    pieces: (text, ended) pairs; where `ended`, the tokenizer's end-of-text token follows, if it has one. workers:
    threads, 0 for all cores. bar: something with update(characters). Threads are enough: tiktoken and numpy release
    the GIL while they work. Few pieces are read ahead, so memory is bounded whatever the length of the stream.
    """
    workers = workers or available_cores()
    dtype = token_dtype(tokenizer.n_vocab)
    end = np.array([] if tokenizer.end_of_text is None else [tokenizer.end_of_text], dtype=dtype)

    def encode(batch):
        arrays = [(tokenizer.encode_array(text), end if ended else end[:0]) for text, ended in batch]
        return np.concatenate([array for pair in arrays for array in pair]).astype(dtype)

    with ThreadPoolExecutor(workers) as pool:
        waiting = collections.deque()
        try:
            for batch in itertools.chain(batches(pieces), itertools.repeat(None, 2 * workers)):
                if batch is not None:
                    waiting.append((pool.submit(encode, batch), sum(len(text) for text, _ in batch)))
                if waiting and (batch is None or len(waiting) >= 2 * workers):
                    future, characters = waiting.popleft()
                    yield future.result()
                    if bar is not None:
                        bar.update(characters)
        finally:
            pool.shutdown(cancel_futures=True)


def batches(pieces):
    """Groups of pieces, so that a worker gets about CHUNK characters at a time however small the pieces are."""
    batch, characters = [], 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece[0])
        if characters >= CHUNK:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# ---- writing a data set ----------------------------------------------------------------------------------------------


def token_dtype(vocab_size):
    """The numpy type of ids on disk: little-endian uint16, or uint32 where an id exceeds 65535."""
    return np.dtype('<u2' if vocab_size <= 1 << 16 else '<u4')


def write_dataset(
    folder, tokenizer, splits, *, source, vocab_size=None, chars=None, pieces=None, input_sha256=None,
    row_tokens=None, masks=None
):  # fmt: skip
    """
    Write train.bin, val.bin and meta.json into a folder; returns the meta.

    tokenizer: 'char' (then `chars`: its characters in the order of their ids), 'byte', 'gpt2', 'bpe' (then `pieces`:
    see BPETokenizer), or 'none' for ids that stand for no text (then `vocab_size`). splits: {'train': ..., 'val': ...},
    each an integer array, an iterable of them (written as they come, so that nothing needs to fit into memory) or the
    Path of a finished token file, which is renamed. source: one line that says what text this is. row_tokens: R where
    every R tokens are a row of their own. masks: like splits, uint8, 1 where a token is never a target.

    All files are written beside the old ones and renamed when complete, so that a failed run changes nothing. A run
    killed between two renames leaves a meta.json that says so. UserError where a split is empty or the disk is full.
    """
    folder = Path(folder)
    sizes = {'char': len(chars or ''), 'byte': 256, 'gpt2': GPT2_VOCAB, 'bpe': len(pieces or ()) + 1}
    vocab_size = sizes.get(tokenizer, vocab_size)
    dtype = token_dtype(vocab_size)
    meta = {'format': FORMAT, 'tokenizer': tokenizer, 'vocab_size': vocab_size, 'dtype': dtype.name, 'tokens': {}}
    meta |= {'chars': chars} if tokenizer == 'char' else {}
    meta |= {'pieces': pieces} if tokenizer == 'bpe' else {}
    meta |= {'source': ' '.join(source.split())}
    meta |= {'row_tokens': row_tokens} if row_tokens else {}
    meta |= {'masked': True} if masks else {}
    meta['sha256'] = {'input': input_sha256} if input_sha256 else {}
    new = {}  # name: the file that is to take its place
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            name = f'{split}.bin'
            new[name] = splits[split] if isinstance(splits[split], Path) else temporary(folder / name)
            meta['tokens'][split], meta['sha256'][name] = write_tokens(new[name], splits[split], dtype, vocab_size)
            if not meta['tokens'][split]:
                raise UserError(f'there is no text for {name}: the input is empty or too short to be split')
            if masks:
                name = f'{split}.mask.bin'
                new[name] = temporary(folder / name)
                count, meta['sha256'][name] = write_tokens(new[name], masks[split], np.dtype('u1'), 2)
                if count != meta['tokens'][split]:
                    raise ValueError(f'{name} has {count} entries for {meta["tokens"][split]} tokens')
        new['meta.json'] = temporary(folder / 'meta.json')
        write_json(new['meta.json'], meta)
        say_what_is_replaced(folder, meta)
        publish(folder, new)
    except OSError as error:
        raise UserError(f"can't write the data set {folder}: {error.strerror or error}") from error
    finally:
        for path in set(new.values()) - {split for split in splits.values() if isinstance(split, Path)}:
            path.unlink(missing_ok=True)
    return meta


def temporary(path):
    """Where a file is written before it takes its place; two runs at once don't meet."""
    return path.with_name(f'{path.name}.{os.getpid()}.tmp')


def write_tokens(path, arrays, dtype, vocab_size):
    """Write an array, or an iterable of arrays, unless `path` is there already; returns (tokens, sha256)."""
    if isinstance(arrays, Path):
        return path.stat().st_size // dtype.itemsize, file_sha256(path)
    count, checksum = 0, hashlib.sha256()
    with open(path, 'wb') as file:
        for array in [arrays] if isinstance(arrays, np.ndarray) else arrays:
            if array.size and not 0 <= int(array.min()) <= int(array.max()) < vocab_size:
                raise ValueError(f'ids {array.min()} to {array.max()} go beyond a vocabulary of {vocab_size}')
            data = array.astype(dtype).tobytes()
            file.write(data)
            checksum.update(data)
            count += array.size
        sync(file)
    return count, checksum.hexdigest()


def write_json(path, value):
    """Write a value as JSON, on disk for sure when this returns."""
    with open(path, 'w', encoding='utf-8', newline='\n') as file:
        file.write(json.dumps(value, indent=1) + '\n')
        sync(file)


def sync(file):
    """Have the system write what it holds of a file: a rename must never be on disk before what it names."""
    file.flush()
    os.fsync(file.fileno())


def publish(folder, new):
    """Rename the files {name: path} into their places, meta.json last, while meta.json says that this goes on."""
    if any((folder / name).exists() for name in new):
        marker = temporary(folder / 'replacing')
        write_json(marker, {'format': FORMAT, 'replacing': True})
        os.replace(marker, folder / 'meta.json')
    for name in (f'{split}.mask.bin' for split in SPLITS):
        if name not in new:
            (folder / name).unlink(missing_ok=True)
    for name in sorted(new, key=lambda name: name == 'meta.json'):
        os.replace(new[name], folder / name)


def say_what_is_replaced(folder, meta):
    """A notice on stderr where another data set lies in the folder already."""
    if not (folder / 'train.bin').exists():
        return
    try:
        old = read_meta(folder)
    except UserError:
        old = {}
    if (old.get('source'), old.get('tokenizer')) != (meta['source'], meta['tokenizer']):
        held = f'{old["source"]} ({old["tokenizer"]})' if old else 'a broken data set'
        notice(f'note: {shown(folder)} held {held}; it is being replaced by {meta["source"]} ({meta["tokenizer"]})')


def file_sha256(path):
    """The SHA-256 of a file, as hexadecimal digits."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def shown(path):
    """A path as the user would type it: relative where it lies below the working folder."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def summary(folder, meta, seconds, already=0):
    """The line that a prepare script prints at its end. seconds: what all tokens but `already` took to encode."""
    train, val = (meta['tokens'][split] for split in SPLITS)
    return (
        f'{shown(folder)}: {train:,} training and {val:,} validation tokens ({meta["tokenizer"]}, '
        f'{meta["vocab_size"]:,} ids) of {meta["source"]}; {(train + val - already) / max(seconds, 1e-9):,.0f} tokens/s'
    )


# ---- reading a data set ----------------------------------------------------------------------------------------------


class TokenData:
    """
    A data set, ready to be read in windows of `block_size` tokens.

    Attributes: `meta` (see meta.json), `tokens` {'train': n, 'val': n}, `n_vocab` (ids that occur), `padded_vocab_size`
    (what a new model should have), `corpus` (one line: what text this is). UserError, in one line, for whatever is
    wrong with the folder: missing, empty, cut off, of another dtype, ids beyond the vocabulary, too short for a block.
    """

    def __init__(self, folder, block_size):
        self.folder = Path(folder)
        self.block_size = block_size
        self.meta = read_meta(self.folder)
        self.n_vocab = self.meta['vocab_size']
        self.padded_vocab_size = GPT2_PADDED_VOCAB if self.meta['tokenizer'] == 'gpt2' else self.n_vocab
        self.corpus = self.meta['source']
        self.dtype = np.dtype(self.meta['dtype']).newbyteorder('<')
        self.row_tokens = self.meta.get('row_tokens')
        self.tokens = {split: self._length(f'{split}.bin', split, self.dtype) for split in SPLITS}
        if self.meta.get('masked'):
            for split in SPLITS:
                self._length(f'{split}.mask.bin', split, np.dtype('u1'))
        self.meta = {**self.meta, 'tokens': self.tokens}
        self._check_block_size()
        self._views = {}
        for split in SPLITS:
            self._check_ids(split)

    def batch(self, seed, n, size, rows=slice(None)):
        """
        The rows `rows` (a slice or indices) of global training batch number n, which has `size` rows.

        Returns (x, y), two int64 CPU tensors (rows, block_size); y is x one token later, -1 where it is no target. The
        windows are a function of (seed, n, size, the data): Philox (Salmon et al. 2011) counts from the key [seed, n].
        """
        key = np.array([seed % 2**64, n % 2**64], dtype=np.uint64)
        draws = np.random.Philox(key=key).random_raw(size)
        starts = draws % np.uint64(self._number_of_windows('train'))
        return self.windows('train', starts[rows].astype(np.int64) * (self.row_tokens or 1))

    def eval_windows(self, split, count):
        """Starts of at most `count` windows of a split, evenly spaced, never overlapping, the same for every model."""
        if count < 1:
            raise UserError(f'{count} windows were asked for to evaluate on; it takes at least one')
        step = self.row_tokens or self.block_size
        slots = self.tokens[split] // step if self.row_tokens else (self.tokens[split] - 1) // step
        count = min(count, slots)
        return np.arange(count, dtype=np.int64) * slots // count * step

    def windows(self, split, starts):
        """The windows of a split that begin at `starts` (an int array): (x, y) as `batch` returns them."""
        starts = np.asarray(starts, dtype=np.int64)
        if len(starts) and not 0 <= starts.min() <= starts.max() < self.tokens[split] - self.block_size:
            raise ValueError(f'windows from {starts.min()} to {starts.max()} leave {split}.bin')
        window = self._view(f'{split}.bin', self.dtype)[starts]  # (rows, block_size + 1)
        if window.size and int(window.max()) >= self.n_vocab:
            raise self._bad_ids(split, int(window.max()))
        x, y = window[:, :-1].astype(np.int64), window[:, 1:].astype(np.int64)
        if self.meta.get('masked'):
            y[self._view(f'{split}.mask.bin', np.dtype('u1'))[starts][:, 1:] != 0] = -1
        return torch.from_numpy(x), torch.from_numpy(y)

    def _number_of_windows(self, split):
        if self.row_tokens:
            return self.tokens[split] // self.row_tokens
        return self.tokens[split] - self.block_size

    def _view(self, name, dtype):
        """All windows of a file, overlapping, as a read-only array (windows, block_size + 1) on the memory map."""
        if name not in self._views:
            file = np.memmap(self.folder / name, dtype=dtype, mode='r')
            self._views[name] = np.lib.stride_tricks.sliding_window_view(file, self.block_size + 1)
        return self._views[name]

    def _length(self, name, split, dtype):
        """The number of tokens in a file. UserError if it is missing, empty, cut off or not as long as meta says."""
        path = self.folder / name
        try:
            size = path.stat().st_size
            path.open('rb').close()
        except OSError as error:
            raise UserError(f"{path} can't be read ({error.strerror}): {prepare_hint(self.folder)}") from error
        if not size:
            raise UserError(f'{path} is empty: {prepare_hint(self.folder)}')
        if size % dtype.itemsize:
            raise UserError(
                f'{path} has {size:,} bytes, not a whole number of {dtype.name} tokens: it is cut off or '
                f'something else; {prepare_hint(self.folder)}'
            )
        expected = self.meta['tokens'].get(split, size // dtype.itemsize)
        if size // dtype.itemsize != expected:
            raise UserError(
                f'{path} has {size // dtype.itemsize:,} {dtype.name} tokens, and meta.json says {expected:,}: they '
                f'are not of one data set; {prepare_hint(self.folder)}'
            )
        return expected

    def _check_block_size(self):
        if self.row_tokens and self.block_size != self.row_tokens - 1:
            raise UserError(
                f'{self.folder} consists of rows of {self.row_tokens} tokens: use --block_size={self.row_tokens - 1}'
            )
        for split in SPLITS:
            if self.tokens[split] <= self.block_size:
                raise UserError(
                    f'{self.folder / split}.bin has {self.tokens[split]:,} tokens, and a window of block_size '
                    f'{self.block_size:,} takes {self.block_size + 1:,}: use a smaller --block_size or more text'
                )

    def _check_ids(self, split):
        """UserError if an id goes beyond the vocabulary: every id of a short file, an even sample of a long one."""
        length, path = self.tokens[split], self.folder / f'{split}.bin'
        piece = 1 << 22 if length <= CHECKED_WHOLE else 1 << 12
        step = piece if length <= CHECKED_WHOLE else max(piece, length // 1024)
        for start in range(0, length, step):
            # not through the memory map, which would read much more around each piece
            ids = np.fromfile(path, dtype=self.dtype, count=piece, offset=start * self.dtype.itemsize)
            highest = int(ids.max())
            if highest >= self.n_vocab:
                raise self._bad_ids(split, highest)

    def _bad_ids(self, split, highest):
        return UserError(
            f'{self.folder / split}.bin has the id {highest}, beyond the vocabulary of {self.n_vocab:,}: it belongs to '
            f'another meta.json or another dtype; {prepare_hint(self.folder)}'
        )


def prepare_hint(folder):
    """Which command makes the data set of a folder."""
    if (folder / 'prepare.py').exists():
        return f'run python {folder / "prepare.py"}'
    return (
        f'make it by python data/text/prepare.py --input=FILE --name={folder.name}, or check --dataset and --data_dir'
    )


def read_meta(folder):
    """The meta of a data set: its meta.json, or what a folder of nanoGPT's amounts to. UserError if it is broken."""
    folder = Path(folder)
    if not folder.is_dir():
        prepared = sorted(path.parent.name for path in folder.parent.glob('*/train.bin'))
        have = f' (there are {", ".join(prepared[:8])})' if prepared else ''
        raise UserError(f'there is no data set {folder}{have}: {prepare_hint(folder)}')
    if not (folder / 'train.bin').exists():
        raise UserError(f'there is no {folder / "train.bin"} yet: {prepare_hint(folder)}')
    if (folder / 'meta.json').exists():
        try:
            meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{folder / 'meta.json'} can't be read ({error}): {prepare_hint(folder)}") from error
        return checked_meta(meta, folder)
    if (folder / 'meta.pkl').exists():
        return read_meta_pickle(folder)
    source = f'GPT-2 BPE tokens of unknown source ({folder.name}, no meta.json)'
    return {
        'format': FORMAT,
        'tokenizer': 'gpt2',
        'vocab_size': GPT2_VOCAB,
        'dtype': 'uint16',
        'tokens': {},
        'source': source,
    }


def checked_meta(meta, folder):
    """`meta` itself, if a data set can be described so. UserError names the first thing wrong with it."""

    def is_count(value, least=1):
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    def problem():
        if not isinstance(meta, dict):
            return 'is not a JSON object'
        if meta.get('format') != FORMAT:
            return f'has format {meta.get("format")!r}, and this version reads {FORMAT}'
        if meta.get('replacing'):
            return 'says that the data set was being replaced when the run that did so was killed'
        if meta.get('tokenizer') not in ('char', 'byte', 'gpt2', 'bpe', 'none'):
            return f'has the unknown tokenizer {meta.get("tokenizer")!r}'
        if meta.get('dtype') not in ('uint16', 'uint32'):
            return f'has dtype {meta.get("dtype")!r}, which must be uint16 or uint32'
        if not is_count(meta.get('vocab_size')):
            return f'has vocab_size {meta.get("vocab_size")!r}'
        chars = meta.get('chars')
        if meta['tokenizer'] == 'char':
            if not isinstance(chars, str) or len(set(chars)) != len(chars) or len(chars) != meta['vocab_size']:
                return f'has "chars" that are not {meta["vocab_size"]} different characters'
        elif meta['tokenizer'] == 'bpe':
            if not are_pieces(meta.get('pieces')) or len(meta['pieces']) != meta['vocab_size'] - 1:
                return f'has "pieces" that are not {meta["vocab_size"] - 1} different strings, one per byte among them'
        elif meta['vocab_size'] != {'byte': 256, 'gpt2': GPT2_VOCAB}.get(meta['tokenizer'], meta['vocab_size']):
            return f'has vocab_size {meta["vocab_size"]}, which is not that of the tokenizer {meta["tokenizer"]}'
        counts = meta.get('tokens')
        if not isinstance(counts, dict) or not all(is_count(counts.get(split)) for split in SPLITS):
            return f'has "tokens" {counts!r}'
        if not isinstance(meta.get('source'), str):
            return 'has no "source"'
        if not is_count(meta.get('row_tokens', 2), 2):
            return f'has row_tokens {meta["row_tokens"]!r}'
        return None

    if problem():
        raise UserError(f'{folder / "meta.json"} {problem()}: {prepare_hint(folder)}')
    return meta


def are_pieces(pieces):
    """Whether `pieces` can be those of a BPETokenizer: different strings of bytes, every single byte among them."""
    if not isinstance(pieces, list) or not all(isinstance(piece, str) and piece for piece in pieces):
        return False
    single = {chr(byte) for byte in range(256)}
    return len(set(pieces)) == len(pieces) and set(pieces) >= single >= set(''.join(pieces))


class PlainUnpickler(pickle.Unpickler):
    """Reads dicts, strings and numbers. What needs a class or a function, and so could run code, is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it holds {module}.{name}, and only plain dicts, strings and numbers are read')


def read_meta_pickle(folder):
    """The meta of a nanoGPT folder with a meta.pkl (vocab_size, stoi, itos), in our form."""
    path = folder / 'meta.pkl'
    try:
        if path.stat().st_size > 1 << 26:
            raise ValueError('it is larger than 64 MiB')
        old = PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        vocab_size, itos = old['vocab_size'], old.get('itos', {})
        if type(vocab_size) is not int or not 1 <= vocab_size <= 1 << 16 or type(itos) is not dict:
            raise ValueError('vocab_size is not a number of uint16 ids, or itos is no dict')
    except Exception as error:  # a pickle can be broken in any way
        raise UserError(f"{path} can't be read ({type(error).__name__}: {error}): {prepare_hint(folder)}") from error
    meta = {'format': FORMAT, 'tokenizer': 'none', 'vocab_size': vocab_size, 'dtype': 'uint16', 'tokens': {}}
    meta['source'] = f"{folder.name} (nanoGPT's format)"
    chars = [itos.get(i) for i in range(vocab_size)]
    if all(type(char) is str and len(char) == 1 for char in chars) and len(set(chars)) == vocab_size:
        meta |= {'tokenizer': 'char', 'chars': ''.join(chars)}
    return meta
