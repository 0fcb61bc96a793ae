"""
Read a data set, and decide which windows of it make batch n.

Notable features:
- a data set is a folder: `train.bin` and `val.bin` contain token ids (little-endian uint16 or uint32), `meta.json` the
  tokenizer, vocabulary size, tokens per split, source and checksums. nanoGPT's folders (`meta.pkl` or no meta) work too
- batch n is a function of (seed, n, size, data) only: a counter-based generator computes its windows directly, so the
  model, evaluation, world size and resuming can't change it
- validation windows are fixed, evenly spaced and don't overlap
- files of any size are memory-mapped; a batch reads its own rows only
- a broken data set raises a UserError of one line: what is wrong, and the command that fixes it
- loading never runs code: JSON, and for nanoGPT's `meta.pkl` an unpickler that refuses classes and functions
"""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import torch

from core import files
from core.messages import UserError, printable
from core.tokenizer import NO_TEXT, TOKENIZERS, CharTokenizer, GPT2Tokenizer, tokenizer_of

FORMAT = 1
SPLITS = ('train', 'val')
CHECKED_WHOLE = 1 << 26  # bytes; opening a file up to this size checks its SHA-256 and every id, otherwise a sample


def token_dtype(vocab_size):
    """The numpy dtype of ids on disk: little-endian uint16, or uint32 if an id exceeds 65535."""
    return np.dtype('<u2' if vocab_size <= 1 << 16 else '<u4')


class TokenData:
    """
    A data set, read in windows of `block_size` tokens.

    Attributes: `meta` (see data/README.md), `tokens` {'train': n, 'val': n}, `n_vocab` (number of ids),
    `padded_vocab_size` (the vocabulary size of a new model), `corpus` (one line: which text this is). UserError if the
    folder is missing, empty, truncated, of another dtype, shorter than a window, if an id is beyond the vocabulary, or
    if a file's SHA-256 isn't that in meta.json.
    """

    def __init__(self, folder, block_size):
        self.folder = Path(folder)
        self.block_size = block_size
        self.meta = read_meta(self.folder)
        self.n_vocab = self.meta['vocab_size']
        tokenizer = tokenizer_of(self.meta)
        self.padded_vocab_size = tokenizer.padded_vocab_size if tokenizer else self.n_vocab
        self.corpus = printable(self.meta['source'])
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
            self._check_sum(f'{split}.bin')
            self._check_sum(f'{split}.mask.bin')

    def batch(self, seed, n, size, rows=slice(None)):
        """
        The rows `rows` (a slice or indices) of training batch n, which has `size` rows over all processes.

        Returns (x, y), two int64 CPU tensors (rows, block_size); y is x shifted by one token, -1 where masked. The
        windows are a function of (seed, n, size, data): Philox (Salmon et al. 2011) with the key [seed, n].
        """
        key = np.array([seed % 2**64, n % 2**64], dtype=np.uint64)
        draws = np.random.Philox(key=key).random_raw(size)
        starts = draws % np.uint64(self._number_of_windows('train'))
        return self.windows('train', starts[rows].astype(np.int64) * (self.row_tokens or 1))

    def eval_windows(self, split, count):
        """Starts of at most `count` evenly spaced, non-overlapping windows of a split, the same for every model."""
        if count < 1:
            raise UserError(f'evaluation requires at least one window, got {count}')
        step = self.row_tokens or self.block_size
        slots = self.tokens[split] // step if self.row_tokens else (self.tokens[split] - 1) // step
        count = min(count, slots)
        return np.arange(count, dtype=np.int64) * slots // count * step

    def windows(self, split, starts):
        """The windows of a split that begin at `starts` (an int array): (x, y) as `batch` returns them."""
        starts = np.asarray(starts, dtype=np.int64)
        if len(starts) and not 0 <= starts.min() <= starts.max() < self.tokens[split] - self.block_size:
            raise ValueError(f'windows from {starts.min()} to {starts.max()} exceed {split}.bin')
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
        """All overlapping windows of a file as a read-only view (windows, block_size + 1) of its memory map."""
        if name not in self._views:
            file = np.memmap(self.folder / name, dtype=dtype, mode='r')
            self._views[name] = np.lib.stride_tricks.sliding_window_view(file, self.block_size + 1)
        return self._views[name]

    def _length(self, name, split, dtype):
        """The number of tokens in a file. UserError if it is missing, empty, truncated or disagrees with the meta."""
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
                f'{path} has {size:,} bytes, not a whole number of {dtype.name} tokens: it is truncated or not a token '
                f'file; {prepare_hint(self.folder)}'
            )
        expected = self.meta['tokens'].get(split, size // dtype.itemsize)
        if size // dtype.itemsize != expected:
            raise UserError(
                f'{path} has {size // dtype.itemsize:,} {dtype.name} tokens, and meta.json says {expected:,}: they '
                f'belong to different data sets; {prepare_hint(self.folder)}'
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
                    f'{self.folder / split}.bin has {self.tokens[split]:,} tokens, but a window of block_size '
                    f'{self.block_size:,} requires {self.block_size + 1:,}: use a smaller --block_size or more text'
                )

    def _check_ids(self, split):
        """UserError if an id exceeds the vocabulary: every id of a short file, an even sample of a long one."""
        length, path = self.tokens[split], self.folder / f'{split}.bin'
        whole = length * self.dtype.itemsize <= CHECKED_WHOLE
        piece = 1 << 22 if whole else 1 << 12
        step = piece if whole else max(piece, length // 1024)
        for start in range(0, length, step):
            # not through the memory map, whose read-ahead would read much more around each piece
            ids = np.fromfile(path, dtype=self.dtype, count=piece, offset=start * self.dtype.itemsize)
            highest = int(ids.max())
            if highest >= self.n_vocab:
                raise self._bad_ids(split, highest)

    def _check_sum(self, name):
        """UserError if a file of at most CHECKED_WHOLE bytes isn't the one whose SHA-256 meta.json recorded, if any."""
        path, recorded = self.folder / name, self.meta.get('sha256', {}).get(name)
        if recorded and path.stat().st_size <= CHECKED_WHOLE and (found := files.sha256(path)) != recorded:
            raise UserError(
                f'{path} was changed or is damaged: its SHA-256 is {found[:16]}..., and meta.json recorded '
                f'{recorded[:16]}...; {prepare_hint(self.folder)}'
            )

    def _bad_ids(self, split, highest):
        return UserError(
            f'{self.folder / split}.bin has the id {highest}, beyond the vocabulary of {self.n_vocab:,}: it belongs to '
            f'another meta.json or has another dtype; {prepare_hint(self.folder)}'
        )


# ---- meta ------------------------------------------------------------------------------------------------------------


def prepare_hint(folder):
    """The command that creates the data set in a folder, as the end of an error message."""
    if (folder / 'prepare.py').exists():
        return f'run python {folder / "prepare.py"}'
    return (
        f'create it with python data/text/prepare.py --input=FILE --name={folder.name}, or check --dataset and '
        '--data_dir'
    )


def read_meta(folder):
    """The meta of a data set: its meta.json, or the equivalent for a folder of nanoGPT's. UserError if invalid."""
    folder = Path(folder)
    if not folder.is_dir():
        prepared = sorted(path.parent.name for path in folder.parent.glob('*/train.bin'))
        have = f' (there are {", ".join(prepared[:8])})' if prepared else ''
        raise UserError(f'there is no data set {folder}{have}: {prepare_hint(folder)}')
    if not (folder / 'train.bin').exists():
        raise UserError(f'there is no {folder / "train.bin"}: {prepare_hint(folder)}')
    if (folder / 'meta.json').exists():
        try:
            meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{folder / 'meta.json'} can't be read ({error}): {prepare_hint(folder)}") from error
        if problem := meta_problem(meta):
            raise UserError(f'{folder / "meta.json"} {problem}: {prepare_hint(folder)}')
        return meta
    if (folder / 'meta.pkl').exists():
        return read_meta_pickle(folder)
    described = GPT2Tokenizer().meta()
    source = f'GPT-2 BPE tokens of unknown source ({folder.name}, no meta.json)'
    dtype = token_dtype(described['vocab_size']).name
    return {'format': FORMAT, **described, 'dtype': dtype, 'tokens': {}, 'source': source}


def meta_problem(meta):
    """The first invalid entry of a meta.json, as a predicate ('has ...'), or None if all are valid."""

    def is_count(value, least=1):
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    if not isinstance(meta, dict):
        return 'is not a JSON object'
    if meta.get('format') != FORMAT:
        return f'has format {meta.get("format")!r}, but this version reads {FORMAT}'
    if meta.get('replacing'):
        return 'is incomplete: the data set was being replaced when the run was killed'
    if meta.get('tokenizer') not in [*TOKENIZERS, NO_TEXT]:  # a list, because the entry may be unhashable
        return f'has the unknown tokenizer {meta.get("tokenizer")!r}'
    if meta.get('dtype') not in ('uint16', 'uint32'):
        return f'has dtype {meta.get("dtype")!r}, which must be uint16 or uint32'
    if not is_count(meta.get('vocab_size')):
        return f'has vocab_size {meta.get("vocab_size")!r}, which must be a positive integer'
    if meta['tokenizer'] != NO_TEXT and (problem := TOKENIZERS[meta['tokenizer']].problem(meta)):
        return problem
    counts = meta.get('tokens')
    if not isinstance(counts, dict) or not all(is_count(counts.get(split)) for split in SPLITS):
        return f'has "tokens" {counts!r}, which must be the counts of train and val'
    if not isinstance(meta.get('source'), str):
        return 'has no "source"'
    sums = meta.get('sha256', {})
    if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
        return f'has "sha256" {sums!r}, which must be an object of strings'
    if not is_count(meta.get('row_tokens', 2), 2):
        return f'has row_tokens {meta["row_tokens"]!r}, which must be an integer of at least 2'
    return None


class PlainUnpickler(pickle.Unpickler):
    """Reads dicts, strings and numbers. Refuses classes and functions, which could run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it contains {module}.{name}; only plain dicts, strings and numbers are read')


def read_meta_pickle(folder):
    """The meta of a nanoGPT folder with a meta.pkl (vocab_size, stoi, itos), as a dict. UserError if invalid."""
    path = folder / 'meta.pkl'
    try:
        if path.stat().st_size > 1 << 26:
            raise ValueError('it is larger than 64 MiB')
        old = PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        vocab_size, itos = old['vocab_size'], old.get('itos', {})
        if type(vocab_size) is not int or not 1 <= vocab_size <= 1 << 16 or type(itos) is not dict:
            raise ValueError('vocab_size must be an integer from 1 to 65536, and itos a dict')
    except Exception as error:  # a broken pickle can raise anything
        raise UserError(f"{path} can't be read ({type(error).__name__}: {error}): {prepare_hint(folder)}") from error
    meta = {'format': FORMAT, 'tokenizer': NO_TEXT, 'vocab_size': vocab_size, 'dtype': 'uint16', 'tokens': {}}
    meta['source'] = f"{folder.name} (nanoGPT's format)"
    chars = [itos.get(i) for i in range(vocab_size)]
    if all(type(char) is str and len(char) == 1 for char in chars) and len(set(chars)) == vocab_size:
        meta |= CharTokenizer(''.join(chars)).meta()
    return meta
