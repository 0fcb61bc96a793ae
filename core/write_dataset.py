"""
Encode text with all cores, and write a data set to disk.
"""

import collections
import hashlib
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from core.dataset import FORMAT, SPLITS, read_meta, token_dtype
from core.runtime import UserError, available_cores, notice
from core.tokenizer import GPT2_VOCAB

CHUNK = 1 << 18  # characters that a worker encodes at a time
LONGEST_RUN = 1 << 22  # characters without any white space after which a text is cut all the same


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
