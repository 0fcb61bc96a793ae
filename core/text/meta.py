"""
What a data set's folder says about it: meta.json, nanoGPT's meta.pkl, or the header of a token file.

Loading never runs code: JSON, and for nanoGPT's `meta.pkl` an unpickler that refuses classes and functions.
"""

import io
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from core.cli.errors import UserError
from core.text.tokenizer import NO_TEXT, CharTokenizer, GPT2Tokenizer, Meta, TableTokenizer, kind_named

FORMAT = 1
SPLITS = ('train', 'val')
# (magic number, version) of llm.c's and modded-nanogpt's token files: the dtype and the vocabulary; 256 int32 precede
# the tokens, of which the third is their number
HEADERS: dict[tuple[int, int], Meta] = {
    (20240520, 1): {'dtype': 'uint16', **GPT2Tokenizer().meta()},
    (20240801, 7): {'dtype': 'uint32', 'tokenizer': NO_TEXT, 'vocab_size': 128_256},  # Llama 3's tokens
}
HEADER_BYTES = 256 * 4
# what makes two data sets the same: their files, or, where a checkpoint of version 0.1.0 has no checksums, their sizes
IDENTITY = ('sha256', 'tokens', 'vocab_size')


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype of ids on disk: little-endian uint16, or uint32 if an id exceeds 65535."""
    return np.dtype('<u2' if vocab_size <= 1 << 16 else '<u4')


def token_files(split: str, count: int = 1) -> list[str]:
    """The names of the files that hold a split: ['train.bin'], or ['train_00000.bin', ...] if there are several."""
    return [f'{split}.bin'] if count == 1 else [f'{split}_{number:05d}.bin' for number in range(count)]


def existing(folder: Path) -> Path:
    """The folder of a data set: data/NAME also where --dataset=data/NAME and --data_dir=data made it data/data/NAME."""
    shorter = folder.parent.parent / folder.name
    doubled = folder.parent.name == folder.parent.parent.name
    return shorter if doubled and not folder.exists() and has_tokens(shorter) else folder


def prepare_hint(folder: Path) -> str:
    """The command that creates the data set in a folder, as the end of an error message."""
    if (folder / 'prepare.py').exists():
        return f'run python {folder / "prepare.py"}'
    # only data/hub/prepare.py writes several files
    script = 'hub/prepare.py' if any(folder.glob('train_?????.bin')) else 'text/prepare.py --input=FILE'
    return f'create it with python data/{script} --name={folder.name}, or check --dataset and --data_dir'


def has_tokens(folder: Path) -> bool:
    """True if a folder has a training split, in one file or in several."""
    return (folder / 'train.bin').exists() or any(folder.glob('train_?????.bin'))


def check_meta(folder: Path) -> None:
    """UserError where a folder without tokens has a meta.json that no data set has left there."""
    path = folder / 'meta.json'
    try:
        foreign = path.exists() and not has_tokens(folder) and b'"format"' not in path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); choose another folder") from error
    if foreign:
        raise UserError(f"{path} is no data set's and would be overwritten; choose another folder")


def read_meta(folder: str | os.PathLike) -> Meta:
    """The meta of a data set: its meta.json, or the equivalent for a folder of nanoGPT's. UserError, or OSError."""
    folder = Path(folder)
    if not folder.is_dir():
        prepared = sorted(path.name for path in folder.parent.glob('*') if has_tokens(path))
        have = f' (there are {", ".join(prepared[:8])})' if prepared else ''
        raise UserError(f'there is no data set {folder}{have}: {prepare_hint(folder)}')
    if not has_tokens(folder):
        raise UserError(f'there is no {folder / "train.bin"}: {prepare_hint(folder)}')
    if meta := written_meta(folder):
        return meta
    described = read_header(folder / 'train.bin') or {'dtype': 'uint16', **GPT2Tokenizer().meta()}
    of = 'GPT-2 BPE tokens' if described['tokenizer'] == GPT2Tokenizer.name else "Llama 3's tokens"
    source = f'{of} of unknown source ({folder.name}, no meta.json)'
    return {'format': FORMAT, **described, 'tokens': {}, 'source': source}


def meta_of_dataset(data_dir: str | os.PathLike, dataset: Any) -> Meta | None:
    """
    The meta of the data set that a checkpoint's config names, or None if its folder tells nothing: for nanoGPT's, which
    record no tokenizer. Of a folder with a meta file no tokens are needed. UserError if a meta file is invalid.
    """
    folder = existing(Path(data_dir, str(dataset)))
    if not dataset or not folder.is_dir():
        return None
    return written_meta(folder) or (read_meta(folder) if has_tokens(folder) else None)


def written_meta(folder: Path) -> Meta | None:
    """The content of a folder's meta.json or meta.pkl, or None if there is neither. UserError if it is invalid."""
    path = folder / 'meta.json'
    if not path.exists():
        return read_meta_pickle(folder) if (folder / 'meta.pkl').exists() else None
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read ({error}): {prepare_hint(folder)}") from error
    if problem := meta_problem(meta):
        raise UserError(f'{path} {problem}: {prepare_hint(folder)}')
    return meta


def meta_problem(meta: Any) -> str | None:
    """The first invalid entry of a meta.json, as a predicate ('has ...'), or None if all are valid."""

    def is_count(value: Any, least: int = 1) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    if not isinstance(meta, dict):
        return 'is not a JSON object'
    if meta.get('format') != FORMAT:
        return f'has format {meta.get("format")!r}, but this version reads {FORMAT}'
    if meta.get('replacing'):
        return 'is incomplete: the data set was being replaced when the run was killed'
    kind = kind_named(meta.get('tokenizer'))
    if kind is None and meta.get('tokenizer') != NO_TEXT:
        return f'has the unknown tokenizer {meta.get("tokenizer")!r}'
    if meta.get('dtype') not in ('uint16', 'uint32'):
        return f'has dtype {meta.get("dtype")!r}, which must be uint16 or uint32'
    if not is_count(meta.get('vocab_size')):
        return f'has vocab_size {meta.get("vocab_size")!r}, which must be a positive integer'
    if kind and (problem := kind.problem(meta)):
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


def read_header(path: Path) -> Meta | None:
    """What a token file's header says, as in HEADERS, and its `count` of tokens; None without one. Raises OSError."""
    with open(path, 'rb') as file:
        head = np.frombuffer(file.read(12), dtype='<i4') if path.stat().st_size >= HEADER_BYTES else np.zeros(3)
    magic, version, count = map(int, head)
    if magic not in {known for known, _ in HEADERS}:
        return None
    if (magic, version) not in HEADERS:
        raise UserError(f'{path} is a token file of llm.c of the unknown version {version}: prepare it again')
    return {**HEADERS[magic, version], 'count': count}


class PlainDtype:
    """Stands for numpy.dtype while a pickle is read: the type, such as 'i8', and byte order of one number or string."""

    def __init__(self, code: str, *_: object) -> None:
        if not re.fullmatch(r'b1|[iu][1248]|f[248]|U\d{1,9}', code):
            raise ValueError(f"it contains numpy's {code!r}; only numbers and strings are read")
        self.code, self.order = code, '<'

    def __setstate__(self, state: Any) -> None:
        self.order = '>' if state[1] == '>' else '<'


def plain_scalar(dtype: PlainDtype, data: bytes) -> bool | int | float | str:
    """Stands for the function that makes numpy's scalars: a Python value. ValueError for anything else."""
    if type(dtype) is not PlainDtype or type(data) is not bytes:
        raise ValueError("it contains one of numpy's objects; only numbers and strings are read")
    return np.frombuffer(data, dtype.order + dtype.code)[0].item()


# nanoGPT's files may hold numpy's numbers, under the names of numpy 1 and 2; no function of these names runs
NUMPY: dict[str, Any] = {
    'numpy.dtype': PlainDtype,
    'numpy.core.multiarray.scalar': plain_scalar,
    'numpy._core.multiarray.scalar': plain_scalar,
}


class PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings and numbers, also numpy's, as plain values; refuses others, which could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if f'{module}.{name}' not in NUMPY:
            raise pickle.UnpicklingError(f'it contains {module}.{name}; only plain dicts, strings and numbers are read')
        return NUMPY[f'{module}.{name}']


def read_meta_pickle(folder: Path) -> Meta:
    """The meta of a nanoGPT folder: its vocab_size, and strings of its ids if there are any. UserError if invalid."""
    path = folder / 'meta.pkl'
    try:
        if path.stat().st_size > 1 << 26:
            raise ValueError('it is larger than 64 MiB')
        old = PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        size, itos = old['vocab_size'], old.get('itos')
        if type(size) is not int or not 1 <= size <= 1 << 24:
            raise ValueError('vocab_size must be an integer from 1 to 16777216')
    except Exception as error:  # a broken pickle can raise anything
        raise UserError(f"{path} can't be read ({type(error).__name__}: {error}): {prepare_hint(folder)}") from error
    pairs = itos.items() if isinstance(itos, dict) else enumerate(itos) if isinstance(itos, (list, tuple)) else ()
    known = {i: text for i, text in pairs if type(i) is int and 0 <= i < size and type(text) is str}
    strings = [known.get(i) for i in range(max(known, default=-1) + 1)]
    described = {'tokenizer': NO_TEXT, 'vocab_size': size}
    if len(strings) == size == len(set(strings)) and all(text and len(text) == 1 for text in strings):
        described = CharTokenizer(''.join(map(str, strings))).meta()
    elif any(strings):
        described = TableTokenizer(strings, size).meta()
    source = f"{folder.name} (nanoGPT's format)"
    return {'format': FORMAT, **described, 'dtype': token_dtype(size).name, 'tokens': {}, 'source': source}


def flat(meta: Meta) -> Meta:
    """What identifies the data set of a meta: {'sha256 of train.bin': ..., 'tokens of train': ..., ...}."""
    entries = {key: meta[key] for key in IDENTITY if key in meta}
    nested = {key: entries.pop(key) for key in list(entries) if isinstance(entries[key], dict)}
    files = {f'{key} of {part}': value for key, parts in nested.items() for part, value in parts.items()}
    return {name: value for name, value in files.items() if name != 'sha256 of input'} | entries
