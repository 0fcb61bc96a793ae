"""
Encode text on all cores, and write a data set to disk.

Notable features:
- text streams through the cores in bounded memory; the ids equal those of encoding the whole text at once
- the files of a data set are written under temporary names and renamed when complete; a failed run changes nothing
"""

import collections
import hashlib
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from core import files
from core.dataset import FORMAT, SPLITS, read_meta, token_dtype
from core.messages import UserError, notice
from core.runtime import available_cores
from core.tokenizer import NO_TEXT

CHUNK = 1 << 18  # characters that a worker encodes at a time
LONGEST_RUN = 1 << 18  # characters; a longer run without white space is cut anywhere


# ---- encoding on all cores -------------------------------------------------------------------------------------------


def chunks(blocks, size=CHUNK, longest=LONGEST_RUN):
    """
    Join and cut a stream of str into pieces of about `size` characters that byte-pair encodings encode as the whole.

    See cut_point for where it cuts.
    """
    rest = ''
    for block in blocks:
        rest += block
        if len(rest) >= size and (at := cut_point(rest, longest)):
            yield rest[:at]
            rest = rest[at:]
    if rest:
        yield rest


def cut_point(text, longest=LONGEST_RUN):
    """
    The last index > 0 at which `text` can be cut without a change of its byte-pair encoding, or 0 if there is none.

    That is in front of a space or newline that a visible character follows: there GPT-2's pattern always starts a new
    word, the text in front of it splits as if it ended there, and merges never cross words. A text of more than
    `longest` characters without such a place is cut at its end, which can change the encoding of one word.
    """
    for i in range(len(text) - 2, 0, -1):
        if text[i] in ' \n' and not text[i + 1].isspace():
            return i
    return len(text) if len(text) > longest else 0


def encode_stream(tokenizer, pieces, workers=0, bar=None, chunk=CHUNK):
    """
    Encode a stream of pieces on all cores: yields arrays of ids, in order, the same for any number of workers.

    pieces: (text, ended) pairs; if `ended`, the tokenizer's end-of-text token follows, if it has one. workers: threads,
    0 for all cores; they suffice because tiktoken and numpy release the GIL. bar: a progress bar with
    update(characters). chunk: characters per task. At most 2 * workers tasks are read ahead, so memory is bounded.
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
            for batch in itertools.chain(batches(pieces, chunk), itertools.repeat(None, 2 * workers)):
                if batch is not None:
                    waiting.append((pool.submit(encode, batch), sum(len(text) for text, _ in batch)))
                if waiting and (batch is None or len(waiting) >= 2 * workers):
                    future, characters = waiting.popleft()
                    yield future.result()
                    if bar is not None:
                        bar.update(characters)
        finally:
            pool.shutdown(cancel_futures=True)


def batches(pieces, chunk):
    """Groups of consecutive pieces with at least `chunk` characters together (the last group may have fewer)."""
    batch, characters = [], 0
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
    folder, tokenizer, splits, *, source, vocab_size=None, input_sha256=None, details=None, row_tokens=None, masks=None,
    least=1,
):  # fmt: skip
    """
    Write train.bin, val.bin and meta.json into a folder; returns the meta.

    tokenizer: a Tokenizer, or None for ids that stand for no text (then `vocab_size` is required). splits: {'train':
    ..., 'val': ...}, each an integer array, an iterable of arrays (written one by one, in bounded memory) or the Path
    of a finished token file, which is moved. source: one line that says which text this is. input_sha256: checksum of
    the input. details: what else meta.json says about the source, a dict of plain values. row_tokens: R if every R
    tokens are one row. masks: like splits, 1 where a token is never a target. least: tokens that the training split
    must have.

    A failed run changes nothing. A run killed between two renames leaves a meta.json that says so. UserError if a split
    is empty or too short or the disk is full, ValueError if an id exceeds the vocabulary.
    """
    folder = Path(folder)
    described = tokenizer.meta() if tokenizer else {'tokenizer': NO_TEXT, 'vocab_size': vocab_size}
    vocab_size = described['vocab_size']
    dtype = token_dtype(vocab_size)
    meta = {'format': FORMAT, 'tokenizer': described['tokenizer'], 'vocab_size': vocab_size, 'dtype': dtype.name}
    meta |= {'tokens': {}, **described, 'source': ' '.join(source.split())}
    meta |= details or {}
    meta |= {'row_tokens': row_tokens} if row_tokens else {}
    meta |= {'masked': True} if masks else {}
    meta['sha256'] = {'input': input_sha256} if input_sha256 else {}
    new = {}  # {name: the temporary file that becomes it}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            name = f'{split}.bin'
            new[name] = splits[split] if isinstance(splits[split], Path) else temporary(folder / name)
            meta['tokens'][split], meta['sha256'][name] = write_tokens(new[name], splits[split], dtype, vocab_size)
            if not meta['tokens'][split]:
                raise UserError(f'{name} would be empty: the input has no text or is too short to be split')
            if split == 'train' and meta['tokens'][split] < least:
                raise UserError(
                    f'{name} would have {meta["tokens"][split]} tokens, too few for a block of {least - 1}: prepare '
                    'more text'
                )
            if masks:
                name = f'{split}.mask.bin'
                new[name] = temporary(folder / name)
                count, meta['sha256'][name] = write_tokens(new[name], masks[split], np.dtype('u1'), 2)
                if count != meta['tokens'][split]:
                    raise ValueError(f'{name} has {count} entries for {meta["tokens"][split]} tokens')
        new['meta.json'] = temporary(folder / 'meta.json')
        files.write_json(new['meta.json'], meta)
        notice_replaced(folder, meta)
        publish(folder, new)
    except OSError as error:
        raise UserError(f"can't write the data set {folder}: {error.strerror or error}") from error
    finally:
        for path in set(new.values()) - {split for split in splits.values() if isinstance(split, Path)}:
            path.unlink(missing_ok=True)
    return meta


def temporary(path):
    """The temporary name of a file, different for each process: two runs at once don't overwrite each other's."""
    return path.with_name(f'{path.name}.{os.getpid()}.tmp')


def write_tokens(path, arrays, dtype, vocab_size):
    """
    Write an array or an iterable of arrays to `path`; returns (tokens, sha256).

    If `arrays` is a Path, the file is finished and only read. ValueError if an id exceeds the vocabulary.
    """
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


def publish(folder, new):
    """Rename the files {name: path} to their names, meta.json last. Until then it says that they are being replaced."""
    if any((folder / name).exists() for name in new):
        marker = temporary(folder / 'replacing')
        files.write_json(marker, {'format': FORMAT, 'replacing': True})
        os.replace(marker, folder / 'meta.json')
    for name in (f'{split}.mask.bin' for split in SPLITS):
        if name not in new:
            (folder / name).unlink(missing_ok=True)
    for name in sorted(new, key=lambda name: name == 'meta.json'):
        os.replace(new[name], folder / name)


def notice_replaced(folder, meta):
    """Print a notice if the folder contains another data set."""
    if not (folder / 'train.bin').exists():
        return
    try:
        old = read_meta(folder)
    except UserError:
        old = {}
    if (old.get('source'), old.get('tokenizer')) != (meta['source'], meta['tokenizer']):
        before = f'{old["source"]} ({old["tokenizer"]})' if old else 'a broken data set'
        notice(f'note: {shown(folder)}: replacing {before} with {meta["source"]} ({meta["tokenizer"]})')


def shown(path):
    """A path for a message: relative if it is below the working directory."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def summary(folder, meta, seconds, already=0):
    """The final line of a prepare script. seconds: time to encode all tokens except `already` of them."""
    train, val = (meta['tokens'][split] for split in SPLITS)
    return (
        f'{shown(folder)}: {train:,} training and {val:,} validation tokens ({meta["tokenizer"]}, '
        f'{meta["vocab_size"]:,} ids) of {meta["source"]}; {(train + val - already) / max(seconds, 1e-9):,.0f} tokens/s'
    )
