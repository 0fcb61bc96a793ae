"""
Read a data set, a folder as data/README.md describes it, and decide which windows of it make batch n.

A counter-based generator computes the windows of batch n directly, so the model, evaluation, world size and resuming
can't change it. Of a training split in several files they are those of one file: a window goes on in the next. A batch
reads its own rows only, and no memory map, which would end the process where a file is cut.
"""

import bisect
import itertools
import os
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.cli import files
from core.cli.errors import UserError, printable
from core.cli.ranges import short
from core.text.meta import HEADER_BYTES, SPLITS, existing, flat, prepare_hint, read_header, read_meta, token_files
from core.text.tokenizer import Meta, Tokenizer, tokenizer_of

CHECKED_WHOLE = 1 << 26  # bytes; opening a split up to this size checks its SHA-256 and every id, otherwise a sample
MOST_OPEN = 100  # files at a time


class TokenData:
    """
    A data set, read in windows of `block_size` tokens. UserError if it is missing, damaged, or shorter than a window.

    Attributes: `meta` (see data/README.md), `tokens` {'train': n, 'val': n}, `n_vocab` (number of ids),
    `padded_vocab_size` (the vocabulary size of a new model), `corpus` (one line: which text this is).
    """

    def __init__(self, folder: str | os.PathLike, block_size: int) -> None:
        self._open: dict[str, BufferedReader] = {}
        self.folder = existing(Path(folder))
        self.block_size = block_size
        self.meta = read_meta(self.folder)
        self.n_vocab = self.meta['vocab_size']
        self.padded_vocab_size = getattr(tokenizer_of(self.meta), 'padded_vocab_size', self.n_vocab)
        self.corpus = printable(self.meta['source'])
        self.dtype = np.dtype(self.meta['dtype']).newbyteorder('<')
        self.row_tokens = self.meta.get('row_tokens')
        shards = {'train': self.meta.get('shards', [])}
        self._files = {split: token_files(split, len(shards.get(split, [])) or 1) for split in SPLITS}
        self._sizes: dict[str, int] = {}  # bytes of each file
        self._headers: dict[str, int] = {}  # bytes in front of the tokens of a file, if it has a header
        # where the tokens of each file begin in its split, and where the last ones end
        self._bounds = {}
        for split, names in self._files.items():
            expected = shards.get(split) or [self.meta['tokens'].get(split)]
            lengths = [self._length(*each, self.dtype) for each in zip(names, expected, strict=True)]
            self._bounds[split] = [0, *itertools.accumulate(lengths)]
        self.tokens = {split: bounds[-1] for split, bounds in self._bounds.items()}
        if self.meta.get('masked'):
            for split in SPLITS:
                self._length(f'{split}.mask.bin', self.tokens[split], np.dtype('u1'))
        is_recorded = bool(self.meta['tokens'])
        self.meta = {**self.meta, 'tokens': self.tokens}
        self._check_block_size()
        for split in SPLITS:
            self._check_ids(split, is_recorded)
            self._check_sums(split)

    def __del__(self) -> None:
        for file in self._open.values():
            file.close()

    def batch(self, seed: int, n: int, size: int, rows: Any = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The rows `rows` (a slice or indices) of training batch n, which has `size` rows over all processes.

        Returns (x, y), two int64 CPU tensors (rows, block_size); y is x shifted by one token, -1 where masked. The
        windows are a function of (seed, n, size, data): Philox (Salmon et al. 2011) with the key [seed, n].
        """
        key = np.array([seed % 2**64, n % 2**64], dtype=np.uint64)
        draws = np.random.Philox(key=key).random_raw(size)
        tokens = self.tokens['train']
        count = tokens // self.row_tokens if self.row_tokens else tokens - self.block_size
        starts = draws % np.uint64(count)
        return self.windows('train', starts[rows].astype(np.int64) * (self.row_tokens or 1))

    def eval_windows(self, split: str, count: int) -> np.ndarray:
        """Starts of at most `count` evenly spaced, non-overlapping windows of a split, the same for every model."""
        if count < 1:
            raise UserError(f'evaluation requires at least one window, got {count}')
        step = self.row_tokens or self.block_size
        slots = self.tokens[split] // step if self.row_tokens else (self.tokens[split] - 1) // step
        count = min(count, slots)
        return np.arange(count, dtype=np.int64) * slots // count * step

    def windows(self, split: str, starts: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The windows of a split that begin at `starts` (integers): (x, y) as `batch` returns them."""
        starts = np.asarray(starts, dtype=np.int64)
        if len(starts) and not 0 <= starts.min() <= starts.max() < self.tokens[split] - self.block_size:
            raise ValueError(f'windows from {starts.min()} to {starts.max()} exceed {split}.bin')
        window = np.empty((len(starts), self.block_size + 1), dtype=self.dtype)
        for row, start in zip(window, starts.tolist(), strict=True):
            self._read(split, start, row)
        if window.size and int(window.max()) >= self.n_vocab:
            raise self._bad_ids(self._files[split][0].replace('_00000', '_*'), int(window.max()))
        x, y = window[:, :-1].astype(np.int64), window[:, 1:].astype(np.int64)
        if self.meta.get('masked'):
            mask: np.ndarray = np.empty(window.shape, dtype=np.uint8)
            for row, start in zip(mask, starts.tolist(), strict=True):
                self._read_file(f'{split}.mask.bin', start, row)
            y[mask[:, 1:] != 0] = -1
        return torch.from_numpy(x), torch.from_numpy(y)

    def ids(self, split: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The tokens of a split from position `start` to `stop` (None: its end), (n,) of `dtype`."""
        found = np.empty((self.tokens[split] if stop is None else stop) - start, dtype=self.dtype)
        self._read(split, start, found)
        return found

    def _read(self, split: str, start: int, out: np.ndarray) -> None:
        """Fill an array (n,) with the tokens of a split from `start` on, which may lie in several files."""
        bounds = self._bounds[split]
        number = bisect.bisect_right(bounds, start) - 1
        while len(out):
            count = min(len(out), bounds[number + 1] - start)
            self._read_file(self._files[split][number], start - bounds[number], out[:count])
            out, start, number = out[count:], start + count, number + 1

    def _read_file(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill an array (n,) with the items of a file from `start` on. UserError if its size has changed."""
        try:
            file = self._opened(name)
            file.seek(self._headers.get(name, 0) + start * out.itemsize)
            is_whole = os.fstat(file.fileno()).st_size == self._sizes[name] and file.readinto(out.data) == out.nbytes
        except OSError as error:
            raise UserError(f"{self.folder / name} can't be read any more ({error.strerror or error})") from error
        if not is_whole:
            hint = f'it had {self._sizes[name]:,} bytes; put it back, and go on from the last checkpoint: --resume=yes'
            raise UserError(f'{self.folder / name} was replaced by another file while it was read: {hint}')

    def _opened(self, name: str) -> BufferedReader:
        """A file of the data set, open for reading; the one opened first is closed where there are too many."""
        if name not in self._open:
            if len(self._open) == MOST_OPEN:
                self._open.pop(next(iter(self._open))).close()
            self._open[name] = open(self.folder / name, 'rb')
        return self._open[name]

    def _length(self, name: str, expected: int | None, dtype: np.dtype) -> int:
        """The tokens in a file: `expected` (None: any, or as its header says). UserError if it has others, or none."""
        path = self.folder / name
        try:
            size = self._sizes[name] = path.stat().st_size
            header = read_header(path) if expected is None else None
            path.open('rb').close()
        except OSError as error:
            raise UserError(f"{path} can't be read ({error.strerror}): {prepare_hint(self.folder)}") from error
        if header:
            expected, self._headers[name] = header['count'], HEADER_BYTES
            size -= HEADER_BYTES
        if not size:
            raise UserError(f'{path} is empty: {prepare_hint(self.folder)}')
        count, rest = divmod(size, dtype.itemsize)
        if rest:
            found = f'{path} has {size:,} bytes, not a whole number of {dtype.name} tokens'
            raise UserError(f'{found}: it is truncated or not a token file; {prepare_hint(self.folder)}')
        if expected not in (None, count):
            found = f'{path} has {count:,} {dtype.name} tokens, and {"its header" if header else "meta.json"} says'
            raise UserError(f'{found} {expected:,}: they belong to different data sets; {prepare_hint(self.folder)}')
        return count

    def _check_block_size(self) -> None:
        rows, size = self.row_tokens, self.block_size
        if rows and size != rows - 1:
            raise UserError(f'{self.folder} consists of rows of {rows} tokens: use --block_size={rows - 1}')
        for split in SPLITS:
            if self.tokens[split] <= size:
                why = f'a window of block_size {size:,} requires {size + 1:,}: use a smaller --block_size or more text'
                raise UserError(f'{self.folder / split}.bin has {self.tokens[split]:,} tokens, but {why}')

    def _check_ids(self, split: str, is_recorded: bool) -> None:
        """
        UserError if an id exceeds the vocabulary, or all look like those of another dtype, which no meta.json denies:
        of every id in a short split, of an even sample in a long one.
        """
        whole = self.tokens[split] * self.dtype.itemsize <= CHECKED_WHOLE
        piece = 1 << 22 if whole else 1 << 12
        step = piece if whole else max(piece, self.tokens[split] // 4096 * 4)
        for name, first, last in zip(self._files[split], self._bounds[split], self._bounds[split][1:], strict=False):
            dtypes = set()
            for start in range(first, last, step):
                ids = self.ids(split, start, min(start + piece, last))
                if (highest := int(ids.max())) >= self.n_vocab:
                    raise self._bad_ids(name, highest)
                dtypes.add(None if is_recorded else other_dtype(ids))
            if len(dtypes) == 1 and (found := dtypes.pop()):
                path, zeros = self.folder / name, 'three of four' if found == 'int64' else 'every second one'
                again = f"write it again with np.fromfile('{path}', np.{found}).astype(np.uint16).tofile('{path}')"
                raise UserError(
                    f'{path} looks like {found}: {zeros} of its 16-bit numbers are 0, and tokens are uint16; {again}, '
                    'or add a meta.json (data/README.md) that says that it is uint16'
                )

    def _check_sums(self, split: str) -> None:
        """UserError if a file of a split isn't the one whose SHA-256 meta.json recorded; large splits are not read."""
        if self.tokens[split] * self.dtype.itemsize > CHECKED_WHOLE:
            return
        for name in (*self._files[split], f'{split}.mask.bin'):
            path, recorded = self.folder / name, self.meta.get('sha256', {}).get(name)
            if recorded and (found := files.sha256(path)) != recorded:
                sums = f'its SHA-256 is {found[:16]}..., and meta.json recorded {recorded[:16]}...'
                raise UserError(f'{path} was changed or is damaged: {sums}; {prepare_hint(self.folder)}')

    def _bad_ids(self, name: str, highest: int) -> UserError:
        found = f'{self.folder / name} has the id {highest}, beyond the vocabulary of {self.n_vocab:,}'
        return UserError(f'{found}: it belongs to another meta.json or has another dtype; {prepare_hint(self.folder)}')


def other_dtype(ids: np.ndarray) -> str | None:
    """What uint16 ids (n,) look like, if not like uint16: 'int64' where three of four are 0, 'uint32' every second."""
    for width, name in ((4, 'int64'), (2, 'uint32')):
        rows = ids[: len(ids) // width * width].reshape(-1, width)
        if ids.itemsize == 2 and len(rows) and not rows[:, 1:].any() and np.mean(rows[:, 0] != 0) > 0.1:
            return name
    return None


# ---- which data set it is --------------------------------------------------------------------------------------------


def check_data(then: Meta | None, data: TokenData, path: str) -> None:
    """UserError where the data set is not the one that the run in the checkpoint at `path` began with, by its meta."""
    before, now = flat(then or {}), flat(data.meta)
    for name in before.keys() & now.keys():
        if before[name] != now[name]:
            differs = f'{name}: {short(now[name])}, recorded {short(before[name])}'
            hint = 'restore it, or start a new run in another --out_dir'
            raise UserError(f'{data.folder} is not the data set that the run in {path} began with ({differs}); {hint}')


def check_tokenizer(meta: Meta, data: TokenData, source: str) -> None:
    """UserError where the model of `source`, whose tokenizer `meta` describes, would read other tokens."""
    then, now = tokenizer_of(meta), tokenizer_of(data.meta)
    if (then and then.meta()) != (now and now.meta()):
        which = f'{source} was trained on {describe(then)}, and {data.folder} has {describe(now)}'
        raise UserError(f'{which}; use a data set with the same tokenizer')


def describe(tokenizer: Tokenizer | None) -> str:
    """A tokenizer and the size of its vocabulary, in a few words."""
    return f'{tokenizer.name} tokens ({tokenizer.n_vocab:,} ids)' if tokenizer else 'ids that stand for no text'
