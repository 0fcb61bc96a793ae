"""Encode text on all cores, as a stream in bounded memory, and write a data set to disk: all of it, or nothing."""

import collections
import contextlib
import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from core.cli import files
from core.cli.errors import UserError, notice
from core.cli.locks import FolderLock
from core.cli.machine import available_cores
from core.text.meta import FORMAT, SPLITS, check_meta, has_tokens, read_meta, token_dtype, token_files
from core.text.tokenizer import NO_TEXT, Meta, Tokenizer

Task = TypeVar('Task')
Result = TypeVar('Result')

CHUNK = 1 << 18  # characters that a worker encodes at a time
LONGEST_RUN = 1 << 18  # characters; a longer run without white space is cut anywhere
Piece = tuple[Any, bool]  # text (bytes for tokenizers that read them), and whether a document ends with it
OF_A_SPLIT = re.compile(r'(train|val)(_\d{5}|\.mask)?\.bin')  # the names of a data set's files


# ---- encoding on all cores -------------------------------------------------------------------------------------------


def chunks(blocks: Iterable[str], size: int = CHUNK, longest: int = LONGEST_RUN) -> Iterator[str]:
    """Cut a stream into pieces of about `size` characters at a `cut_point`: byte pairs encode as in the whole."""
    rest = ''
    for part in (block[i : i + size] for block in blocks for i in range(0, len(block), size)):
        rest += part
        if len(rest) >= size and (at := cut_point(rest, longest)):
            yield rest[:at]
            rest = rest[at:]
    if rest:
        yield rest


def cut_point(text: str, longest: int = LONGEST_RUN) -> int:
    """
    The last index > 0 at which `text` can be cut without a change of its byte-pair encoding, or 0 if there is none.

    That is in front of a space between two visible characters, or else of such a newline: there the patterns of GPT-2
    and of later models start a new word, and merges never cross words. (Some put newlines behind punctuation into one
    word with it.) A text of more than `longest` characters without such a place is cut at its end.
    """
    for space in ' \n':
        at = text.rfind(space, 1, len(text) - 1)
        while at > 0:
            if not text[at + 1].isspace() and not text[at - 1].isspace():
                return at
            at = text.rfind(space, 1, at)
    return len(text) if len(text) > longest else 0


def encode_stream(
    tokenizer: Tokenizer, pieces: Iterable[Piece], workers: int = 0, bar: Any = None, chunk: int = CHUNK
) -> Iterator[np.ndarray]:
    """
    Encode a stream of pieces on all cores: yields arrays of ids, in order, with the end-of-text token, if there is one,
    where a document ends.

    workers: see `in_order`; threads suffice because tiktoken and numpy release the GIL. bar: has update(characters).
    """
    dtype = token_dtype(tokenizer.n_vocab)
    end = np.array([] if tokenizer.end_of_text is None else [tokenizer.end_of_text], dtype=dtype)

    def encode(batch: list[Piece]) -> np.ndarray:
        arrays = [(tokenizer.encode_array(text), end if ended else end[:0]) for text, ended in batch]
        return np.concatenate([array for pair in arrays for array in pair]).astype(dtype)

    for batch, array in in_order(encode, batches(pieces, chunk), workers):
        yield array
        if bar is not None:
            bar.update(sum(len(text) for text, _ in batch))


def in_order(work: Callable[[Task], Result], tasks: Iterable[Task], workers: int = 0) -> Iterator[tuple[Task, Result]]:
    """Yields (task, work(task)) in order, by threads (0: all cores); reads 2 * workers tasks ahead. No task is None."""
    workers = workers or available_cores()
    with ThreadPoolExecutor(workers) as pool:
        waiting: collections.deque = collections.deque()
        try:
            for task in itertools.chain(tasks, itertools.repeat(None, 2 * workers)):
                if task is not None:
                    waiting.append((task, pool.submit(work, task)))
                if waiting and (task is None or len(waiting) >= 2 * workers):
                    oldest, future = waiting.popleft()
                    yield oldest, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def batches(pieces: Iterable[Piece], chunk: int) -> Iterator[list[Piece]]:
    """Groups of consecutive pieces with at least `chunk` characters together (the last group may have fewer)."""
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece[0])
        if characters >= chunk:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# ---- writing a data set ----------------------------------------------------------------------------------------------


def write_dataset(
    folder: str | os.PathLike,
    tokenizer: Tokenizer | None,
    splits: dict[str, Any],
    *,
    source: str,
    vocab_size: int | None = None,
    input_sha256: str | None = None,
    details: Meta | None = None,
    row_tokens: int | None = None,
    masks: dict[str, Any] | None = None,
    least: int = 1,
) -> Meta:
    """
    Write train.bin, val.bin and meta.json into a folder; returns the meta.

    tokenizer: None for ids that stand for no text (then `vocab_size` is required). splits: {'train': ..., 'val': ...},
    each an integer array, an iterable of arrays (written one by one) or the Path of a finished token file, which is
    moved; for `train` also a tuple of Paths, which become train_00000.bin, ... source: one line that says which text
    this is. details: what else meta.json says about it. row_tokens: R if every R tokens are one row. masks: like
    splits, 1 where a token is never a target. least: tokens that the training split must have.

    A failed run changes nothing. One killed between two renames leaves a meta.json that says so. UserError if a split
    is empty or too short, the disk is full, another process writes there, or meta.json is a file of the user's;
    ValueError if an id exceeds the vocabulary.
    """
    folder = Path(folder)
    described: Meta = tokenizer.meta() if tokenizer else {'tokenizer': NO_TEXT, 'vocab_size': vocab_size}
    n_vocab = described['vocab_size']
    dtype = token_dtype(n_vocab)
    meta: Meta = {'format': FORMAT, 'tokenizer': described['tokenizer'], 'vocab_size': n_vocab, 'dtype': dtype.name}
    meta |= {'tokens': {}, **described, 'source': ' '.join(source.split()), **(details or {})}
    meta |= {'row_tokens': row_tokens} if row_tokens else {}
    meta |= {'masked': True} if masks else {}
    meta['sha256'] = {'input': input_sha256} if input_sha256 else {}
    try:
        check_meta(folder)
        with FolderLock(folder), contextlib.ExitStack() as stack:
            for left in folder.glob('unfinished-tokens-*'):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            beside = folder / f'unfinished-tokens-{os.getpid()}'
            stack.callback(shutil.rmtree, beside, ignore_errors=True)  # first: a signal may come right after mkdir
            beside.mkdir()
            new: dict[str, Path] = {}  # {name: the file that becomes it}
            for split in SPLITS:
                parts = splits[split] if isinstance(splits[split], tuple) else (splits[split],)
                counts = []
                for name, part in zip(token_files(split, len(parts)), parts, strict=True):
                    new[name] = part if isinstance(part, Path) else beside / name
                    count, meta['sha256'][name] = write_tokens(new[name], part, dtype, n_vocab)
                    counts.append(count)
                total = meta['tokens'][split] = sum(counts)
                meta |= {'shards': counts} if len(parts) > 1 else {}
                if not total:
                    raise UserError(f'{split}.bin would be empty: the input has no text or is too short to be split')
                if split == 'train' and total < least:
                    why = f'too few for a block of {least - 1}: prepare more text'
                    raise UserError(f'train.bin would have {total} tokens, {why}')
                if masks:
                    name = f'{split}.mask.bin'
                    new[name] = beside / name
                    count, meta['sha256'][name] = write_tokens(new[name], masks[split], np.dtype('u1'), 2)
                    if count != total:
                        raise ValueError(f'{name} has {count} entries for {total} tokens')
            new['meta.json'] = beside / 'meta.json'
            files.write_json(new['meta.json'], meta)
            notice_replaced(folder, meta)
            publish(folder, new)
    except OSError as error:
        raise UserError(f"can't write the data set {folder}: {error.strerror or error}") from error
    return meta


class GrowingSplit:
    """
    A split while it is written: `train_00000.bin.part`, `train_00001.bin.part`, ..., each with `size` tokens.

    size: tokens per file, 0 for a single file; the last file may have fewer. `count` is the number of tokens so far,
    `last` the number of the last file. `cut` starts it, or continues one begun before.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype, size: int = 0) -> None:
        self.folder, self.split, self.dtype, self.size = folder, split, dtype, size or 1 << 62
        self.count, self.number = 0, -1
        self.file: IO[bytes] | None = None

    @property
    def last(self) -> int:
        return max(self.count - 1, 0) // self.size

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(self._path(number) for number in range(self.last + 1))

    def _path(self, number: int) -> Path:
        return self.folder / f'{self.split}_{number:05d}.bin.part'

    def cut(self, count: int) -> None:
        """Keep the first `count` tokens of what is there. ValueError if there are fewer."""
        self.count = count
        for number, path in enumerate(self.files):
            wanted = min(count - number * self.size, self.size) * self.dtype.itemsize
            if wanted and (not path.exists() or path.stat().st_size < wanted):
                raise ValueError(f'{path.name} is missing or too short')
            with open(path, 'ab') as file:
                file.truncate(wanted)
        for path in {*self.folder.glob(f'{self.split}*.bin.part')} - {*self.files}:
            path.unlink()

    def append(self, ids: np.ndarray) -> None:
        """Write ids behind what is there. Raises OSError."""
        while len(ids):
            number, used = divmod(self.count, self.size)
            if self.file is None or number != self.number:
                self.close()
                self.file, self.number = open(self._path(number), 'ab'), number
            piece = ids[: self.size - used]
            self.file.write(piece.astype(self.dtype).tobytes())
            self.count += len(piece)
            ids = ids[len(piece) :]

    def sync(self) -> None:
        """Flush what was written to disk. Raises OSError."""
        if self.file and not self.file.closed:
            files.sync(self.file)

    def close(self) -> None:
        """The same, and close the file."""
        self.sync()
        if self.file:
            self.file.close()


def write_tokens(path: Path, arrays: Any, dtype: np.dtype, vocab_size: int) -> tuple[int, str]:
    """Write arrays to `path`, or read a finished file (a Path): (tokens, sha256). ValueError for an id too large."""
    if isinstance(arrays, Path):
        return path.stat().st_size // dtype.itemsize, files.sha256(path)
    count, checksum = 0, hashlib.sha256()
    with open(path, 'wb') as file:
        for array in [arrays] if isinstance(arrays, np.ndarray) else arrays:
            if array.size and not 0 <= int(array.min()) <= int(array.max()) < vocab_size:
                raise ValueError(f'ids {array.min()} to {array.max()} are outside a vocabulary of {vocab_size}')
            data = array.astype(dtype).tobytes()
            file.write(data)
            checksum.update(data)
            count += array.size
        files.sync(file)
    return count, checksum.hexdigest()


def publish(folder: Path, new: dict[str, Path]) -> None:
    """Rename the files {name: path} to their names, meta.json last. Until then it says that they are being replaced."""
    if any((folder / name).exists() for name in new):
        files.write_json(folder / 'meta.json', {'format': FORMAT, 'replacing': True})
    for path in (path for split in SPLITS for path in folder.glob(f'{split}*.bin')):
        if path.name not in new and OF_A_SPLIT.fullmatch(path.name):
            path.unlink()
    for name in sorted(new, key=lambda name: name == 'meta.json'):
        os.replace(new[name], folder / name)


def notice_replaced(folder: Path, meta: Meta) -> None:
    """Print a notice if the folder contains another data set."""
    if not has_tokens(folder):
        return
    try:
        old = read_meta(folder)
        before = f'{old["source"]} ({old["tokenizer"]})'
    except UserError:
        before = 'a broken data set'
    if before != f'{meta["source"]} ({meta["tokenizer"]})':
        notice(f'note: {shown(folder)}: replacing {before} with {meta["source"]} ({meta["tokenizer"]})')


def shown(path: Path) -> str:
    """A path for a message: relative if it is below the working directory."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def summary(folder: Path, meta: Meta, seconds: float, already: int = 0) -> str:
    """The final line of a prepare script. seconds: time to encode all tokens except `already` of them."""
    train, val = (meta['tokens'][split] for split in SPLITS)
    return (
        f'{shown(folder)}: {train:,} training and {val:,} validation tokens ({meta["tokenizer"]}, '
        f'{meta["vocab_size"]:,} ids) of {meta["source"]}; {(train + val - already) / max(seconds, 1e-9):,.0f} tokens/s'
    )
