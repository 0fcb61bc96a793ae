"""
Read a data set, and decide which windows of it make batch number n.
"""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import torch

from core.runtime import UserError
from core.tokenizer import GPT2_PADDED_VOCAB, GPT2_VOCAB, are_pieces

FORMAT = 1
SPLITS = ('train', 'val')
CHECKED_WHOLE = 1 << 25  # tokens up to which every id is checked when a file is opened; of longer files a sample


# ---- reading a data set ----------------------------------------------------------------------------------------------


def token_dtype(vocab_size):
    """The numpy type of ids on disk: little-endian uint16, or uint32 where an id exceeds 65535."""
    return np.dtype('<u2' if vocab_size <= 1 << 16 else '<u4')


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
