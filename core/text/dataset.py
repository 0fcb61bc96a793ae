"""
Read a data set, and decide which windows of it make batch n.

Notable features:
- a data set is a folder: `train.bin` and `val.bin` contain token ids (little-endian uint16 or uint32), `meta.json` the
  tokenizer, vocabulary size, tokens per split, source and checksums. nanoGPT's folders (`meta.pkl` or no meta) work too
- a large training split may lie in several files, `train_00000.bin`, ...: batches and windows are those of one file,
  since a window that begins in one file goes on in the next
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

from core.cli import files
from core.cli.errors import UserError, printable
from core.text.tokenizer import NO_TEXT, TOKENIZERS, CharTokenizer, GPT2Tokenizer, tokenizer_of

FORMAT = 1
SPLITS = ('train', 'val')
CHECKED_WHOLE = 1 << 26  # bytes; opening a split up to this size checks its SHA-256 and every id, otherwise a sample


def token_dtype(vocab_size):
    """The numpy dtype of ids on disk: little-endian uint16, or uint32 if an id exceeds 65535."""
    return np.dtype('<u2' if vocab_size <= 1 << 16 else '<u4')


def token_files(split, count=1):
    """The names of the files that hold a split: ['train.bin'], or ['train_00000.bin', ...] if there are several."""
    return [f'{split}.bin'] if count == 1 else [f'{split}_{number:05d}.bin' for number in range(count)]


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
        shards = {'train': self.meta.get('shards', [])}
        self._files = {split: token_files(split, len(shards.get(split, [])) or 1) for split in SPLITS}
        # where the tokens of each file begin in its split, and where the last ones end
        self._bounds = {}
        for split, names in self._files.items():
            expected = shards.get(split) or [self.meta['tokens'].get(split)]
            lengths = [self._length(*each, self.dtype) for each in zip(names, expected, strict=True)]
            self._bounds[split] = np.cumsum([0, *lengths])
        self.tokens = {split: int(bounds[-1]) for split, bounds in self._bounds.items()}
        if self.meta.get('masked'):
            for split in SPLITS:
                self._length(f'{split}.mask.bin', self.tokens[split], np.dtype('u1'))
        self.meta = {**self.meta, 'tokens': self.tokens}
        self._check_block_size()
        self._maps, self._views = {}, {}
        for split in SPLITS:
            self._check_ids(split)
            self._check_sums(split)

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
        window = self._gather(split, starts)
        if window.size and int(window.max()) >= self.n_vocab:
            raise self._bad_ids(self._files[split][0].replace('_00000', '_*'), int(window.max()))
        x, y = window[:, :-1].astype(np.int64), window[:, 1:].astype(np.int64)
        if self.meta.get('masked'):
            y[self._view(f'{split}.mask.bin', np.dtype('u1'))[starts][:, 1:] != 0] = -1
        return torch.from_numpy(x), torch.from_numpy(y)

    def _number_of_windows(self, split):
        if self.row_tokens:
            return self.tokens[split] // self.row_tokens
        return self.tokens[split] - self.block_size

    def _gather(self, split, starts):
        """The tokens of the windows of a split that begin at `starts`, (rows, block_size + 1)."""
        names, bounds = self._files[split], self._bounds[split]
        if len(names) == 1:
            return self._view(names[0], self.dtype)[starts]
        window = np.empty((len(starts), self.block_size + 1), dtype=self.dtype)
        numbers = np.searchsorted(bounds, starts, side='right') - 1  # the file in which each window begins
        inside = starts + self.block_size < bounds[numbers + 1]
        for number in np.unique(numbers[inside]):
            rows = np.flatnonzero(inside & (numbers == number))
            window[rows] = self._view(names[number], self.dtype)[starts[rows] - bounds[number]]
        for row in np.flatnonzero(~inside):
            window[row] = self._across(split, int(starts[row]))
        return window

    def _across(self, split, start):
        """The window (block_size + 1,) of a split that begins at `start` in one file and ends in a later one."""
        stop, pieces = start + self.block_size + 1, []
        for name, first, last in zip(self._files[split], self._bounds[split], self._bounds[split][1:], strict=False):
            if first < stop and start < last:
                pieces.append(self._map(name, self.dtype)[max(0, start - first) : stop - first])
        return np.concatenate(pieces)

    def _map(self, name, dtype):
        """The read-only memory map of a file."""
        if name not in self._maps:
            self._maps[name] = np.memmap(self.folder / name, dtype=dtype, mode='r')
        return self._maps[name]

    def _view(self, name, dtype):
        """All overlapping windows of a file as a read-only view (windows, block_size + 1) of its memory map."""
        if name not in self._views:
            file = self._map(name, dtype)
            self._views[name] = np.lib.stride_tricks.sliding_window_view(file, self.block_size + 1)
        return self._views[name]

    def _length(self, name, expected, dtype):
        """
        The number of tokens in a file. UserError if it is missing, empty or truncated, or has not the `expected` number
        (None: any).
        """
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
        if expected is not None and size // dtype.itemsize != expected:
            raise UserError(
                f'{path} has {size // dtype.itemsize:,} {dtype.name} tokens, and meta.json says {expected:,}: they '
                f'belong to different data sets; {prepare_hint(self.folder)}'
            )
        return size // dtype.itemsize

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
        """UserError if an id exceeds the vocabulary: every id of a short split, an even sample of a long one."""
        whole = self.tokens[split] * self.dtype.itemsize <= CHECKED_WHOLE
        piece = 1 << 22 if whole else 1 << 12
        step = piece if whole else max(piece, self.tokens[split] // 1024)
        for name, length in zip(self._files[split], np.diff(self._bounds[split]), strict=True):
            for start in range(0, int(length), step):
                # not through the memory map, whose read-ahead would read much more around each piece
                offset = start * self.dtype.itemsize
                highest = int(np.fromfile(self.folder / name, dtype=self.dtype, count=piece, offset=offset).max())
                if highest >= self.n_vocab:
                    raise self._bad_ids(name, highest)

    def _check_sums(self, split):
        """UserError if a file of a split isn't the one whose SHA-256 meta.json recorded; large splits are not read."""
        if self.tokens[split] * self.dtype.itemsize > CHECKED_WHOLE:
            return
        for name in (*self._files[split], f'{split}.mask.bin'):
            path, recorded = self.folder / name, self.meta.get('sha256', {}).get(name)
            if recorded and (found := files.sha256(path)) != recorded:
                raise UserError(
                    f'{path} was changed or is damaged: its SHA-256 is {found[:16]}..., and meta.json recorded '
                    f'{recorded[:16]}...; {prepare_hint(self.folder)}'
                )

    def _bad_ids(self, name, highest):
        return UserError(
            f'{self.folder / name} has the id {highest}, beyond the vocabulary of {self.n_vocab:,}: it belongs to '
            f'another meta.json or has another dtype; {prepare_hint(self.folder)}'
        )


# ---- meta ------------------------------------------------------------------------------------------------------------


def prepare_hint(folder):
    """The command that creates the data set in a folder, as the end of an error message."""
    if (folder / 'prepare.py').exists():
        return f'run python {folder / "prepare.py"}'
    if any(folder.glob('train_?????.bin')):  # only this script writes several files
        again = f'python data/hub/prepare.py --name={folder.name}'
        return f'create it again with {again}, or check --dataset and --data_dir'
    return (
        f'create it with python data/text/prepare.py --input=FILE --name={folder.name}, or check --dataset and '
        '--data_dir'
    )


def has_tokens(folder):
    """True if a folder has a training split, in one file or in several."""
    return (folder / 'train.bin').exists() or any(folder.glob('train_?????.bin'))


def read_meta(folder):
    """The meta of a data set: its meta.json, or the equivalent for a folder of nanoGPT's. UserError if invalid."""
    folder = Path(folder)
    if not folder.is_dir():
        prepared = sorted(path.name for path in folder.parent.glob('*') if has_tokens(path))
        have = f' (there are {", ".join(prepared[:8])})' if prepared else ''
        raise UserError(f'there is no data set {folder}{have}: {prepare_hint(folder)}')
    if not has_tokens(folder):
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
    shards = meta.get('shards', [])
    if not isinstance(shards, list) or not all(map(is_count, shards)) or sum(shards) not in (0, counts['train']):
        return 'has "shards" that are not the numbers of tokens in several files of the training split'
    if len(shards) == 1 or (shards and meta.get('masked')):
        return 'has "shards" of one file, or with masks: those have one file per split'
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
