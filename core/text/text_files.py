"""
Text files as streams: which files there are, their text in blocks, and the pieces of it that a tokenizer encodes.

Files may have any size, in bounded memory. One rule is for all text, prompts too: see `as_text`. Tokenizers that read
bytes get the bytes of the files unchanged.
"""

import gzip
import hashlib
import io
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from core.cli.arguments import check_folder
from core.cli.errors import UserError, notice
from core.cli.files import copy_of_pipe, read_bytes
from core.text.meta import check_meta
from core.text.tokenizer import Tokenizer
from core.text.write_dataset import Piece, chunks, cut_point

BLOCK = 1 << 20  # characters, or bytes, per read
LEARN_FROM = 1 << 25  # characters of the training text from which a byte-pair encoding is learned
LEAST = 65  # tokens of the training split: one block of 64 and its targets


def output_folder(data: Path, name: str, out_dir: str) -> Path:
    """The folder to write to: out_dir, or `name` in the folder `data`. UserError if it can't be written."""
    if not name or name != Path(name).name or name.startswith('.'):
        raise UserError(f"name is '{name}'; it must be a plain folder name")
    folder = Path(out_dir) if out_dir else data / name
    check_folder(str(folder))
    check_meta(folder)
    return folder


def check_not_overwritten(files: list[Path], folder: Path) -> None:
    """UserError if one of the input files is a file of the data set that is to be written to `folder`."""
    made = [folder / name for name in ('train.bin', 'val.bin', 'meta.json') if (folder / name).exists()]
    for path in files:
        if any(target.samefile(path) for target in made):
            raise UserError(f'{path} would be overwritten by the data set; choose another --name or --out_dir')


# ---- which files -----------------------------------------------------------------------------------------------------


def input_files(given: str, suffixes: str) -> tuple[list[Path], list[IO[bytes]]]:
    """
    The files that `--input` names, in order, and copies of pipes: temporary files that exist as long as their objects.

    suffixes: of the files of a folder that count, separated by commas; a notice says what else is there. UserError if
    there are no files.
    """
    paths = [Path(part.strip()) for part in given.split(',') if part.strip()]
    if paths and os.path.exists(given):
        paths = [Path(given)]  # a name that contains a comma
    if not paths:
        raise UserError('say what to prepare: --input=FILE, or a folder, or several, separated by commas')
    files: list[Path] = []
    ignored: Counter[str] = Counter()
    copies: list[IO[bytes]] = []
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f'there is no file or folder {path}; check --input')
        if path.is_dir():
            found, others = files_below(path, suffixes)
            if not found:
                there = f' (only {in_words(others)})' if others else ''
                raise UserError(f'there are no {suffixes} files in {path}{there}; set other suffixes with --suffixes')
            files, ignored = files + found, ignored + others
        elif path.is_fifo():
            notice(f'reading the pipe {path}')
            copies.append(copy_of_pipe(path))
            files.append(Path(copies[-1].name))
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f'{path} is neither a file nor a folder nor a pipe; check --input')
    once: dict[str, Path] = {}
    for file in files:
        once.setdefault(os.path.realpath(file), file)
    if twice := len(files) - len(once):
        notice(f'note: --input names some files again ({twice}); each is read once')
    if ignored:
        notice(f'note: ignoring {in_words(ignored)}; --suffixes={suffixes} selects the files of a folder')
    return [*once.values()], copies


def files_below(folder: Path, suffixes: str) -> tuple[list[Path], Counter[str]]:
    """The visible files in a folder with one of `suffixes`, in order of path, and a Counter of the others' suffixes."""
    wanted = suffix_list(suffixes)
    every = (file for file in folder.rglob('*') if file.is_file())
    visible = [file for file in every if not any(p.startswith('.') for p in file.relative_to(folder).parts)]
    found = sorted((file for file in visible if file.name.endswith(wanted)), key=lambda file: file.as_posix())
    ignored = Counter(file.suffix or 'without suffix' for file in visible if not file.name.endswith(wanted))
    return found, ignored


def suffix_list(suffixes: str) -> tuple[str, ...]:
    """The suffixes in a list such as '.c,.h'."""
    return tuple(suffix.strip() for suffix in suffixes.split(',') if suffix.strip())


def in_words(ignored: Counter[str]) -> str:
    """'300 .py, 2 .png and 4 others' for a Counter of suffixes."""
    most = ignored.most_common(5)
    others = ignored.total() - sum(count for _, count in most)
    return ', '.join(f'{count:,} {suffix}' for suffix, count in most) + (f' and {others:,} others' if others else '')


def named(given: str) -> str:
    """The names of the files and folders that `--input` names, for a line that says which text this is."""
    return ', '.join(Path(part.strip()).resolve().name for part in given.split(',') if part.strip())


def joint_checksum(sums: list[str]) -> str:
    """One SHA-256 for several files, from theirs; that of a single file is its own."""
    return sums[0] if len(sums) == 1 else hashlib.sha256('\n'.join(sums).encode('ascii')).hexdigest()


# ---- their text ------------------------------------------------------------------------------------------------------


def opened(path: Path) -> Any:
    """A file, open for reading its bytes; .gz files are decompressed."""
    return gzip.open(path, 'rb') if path.name.endswith('.gz') else open(path, 'rb')


def as_text(file: IO[bytes]) -> io.TextIOWrapper:
    """The rule for all text: UTF-8 whatever the locale, without a byte order mark, each line with '\\n' at its end."""
    return io.TextIOWrapper(file, encoding='utf-8-sig')


def plain_text(data: bytes) -> str:
    """The text in the bytes of a file. UnicodeDecodeError if they aren't UTF-8."""
    return as_text(io.BytesIO(data)).read()


def read_text(path: str, most: int, kind: type[Tokenizer] | Tokenizer | None = None) -> str:
    """
    The text of a file with at most so many bytes, as the prepare scripts read it for a kind of tokenizer: of one that
    reads bytes, those that aren't UTF-8 become surrogates, which it encodes to themselves. UserError if it can't be.
    """
    try:
        data = read_bytes(path, most)
        if kind and kind.reads_bytes:
            return data.decode('utf-8', errors='surrogateescape')
        return plain_text(data)
    except UnicodeDecodeError as error:
        raise UserError(f'{path} is not UTF-8 text ({bad_place(io.BytesIO(data))}): save it as UTF-8') from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, 'strerror', None) or error
        raise UserError(f"{path} can't be read ({reason}); name a text file") from error


def blocks(path: Path, as_bytes: bool) -> Iterator[Any]:
    """Yields the content of a file in blocks: bytes if as_bytes, otherwise str. UserError if it can't be read."""
    try:
        with opened(path) as file:
            reader: Any = file if as_bytes else as_text(file)
            while block := reader.read(BLOCK):
                yield block
    except UnicodeDecodeError as error:
        with opened(path) as file:
            where = bad_place(file)
        raise UserError(f'{path} is not UTF-8 text ({where}): save it as UTF-8, or use --tokenizer=byte') from error
    except (OSError, EOFError, zlib.error) as error:  # the last two from a damaged .gz
        raise UserError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from error


def bad_place(file: IO[bytes]) -> str:
    """The first place in an open file that is not UTF-8, for an error message."""
    for number, line in enumerate(iter(lambda: file.readline(1 << 24), b''), 1):
        try:
            line.decode('utf-8')
        except UnicodeDecodeError as error:
            return f'line {number}, byte 0x{line[error.start]:02x}'
    return 'at its end'


class TextFiles:
    """
    The text of some files, one after the other, for a kind of tokenizer. documents: 'file' or 'line'.

    Attributes: `lengths`, the characters in each file (bytes if the tokenizer reads bytes), `total`, their sum, and
    `characters`, all that occur if the tokenizer learns from those. UserError if a file can't be read.
    """

    def __init__(self, files: list[Path], kind: type[Tokenizer] | Tokenizer, documents: str = 'file') -> None:
        self.files, self.kind, self.documents = files, kind, documents
        self.lengths: list[int] = []
        seen: set[str] = set()
        for path in tqdm(files, desc='reading', unit='file', disable=None):
            self.lengths.append(0)
            for block in blocks(path, kind.reads_bytes):
                self.lengths[-1] += len(block)
                if kind.learned_from == 'characters':
                    seen.update(block)
        self.total = sum(self.lengths)
        self.characters = ''.join(sorted(seen))

    def pieces(self, start: int = 0, stop: int | None = None) -> Iterator[Piece]:
        """Yields the text from position `start` to `stop` as encode_stream takes it."""
        position, stop = 0, self.total if stop is None else stop
        for path, length in zip(self.files, self.lengths, strict=True):
            first, last = max(0, start - position), min(length, stop - position)
            position += length
            if first >= last:
                continue
            stream, whole = self._part(path, first, last), last == length
            if self.documents == 'line':
                yield from lines(stream, whole)
            elif self.kind.byte_pair:
                yield from ((piece, False) for piece in chunks(stream))
                yield '', whole
            else:
                yield from ((block, False) for block in stream)

    def _part(self, path: Path, start: int, stop: int) -> Iterator[Any]:
        """Yields the blocks of a file from character (or byte) `start` to `stop`."""
        position = 0
        for block in blocks(path, self.kind.reads_bytes):
            inside = block[max(0, start - position) : max(0, stop - position)]
            position += len(block)
            if inside:
                yield inside
            if position >= stop:
                return


def lines(stream: Iterable[str], whole: bool) -> Iterator[Piece]:
    """Yields the lines of a stream as (text, ended), without empty ones. whole: the last line ends there."""
    rest, begun = '', False  # begun: the start of this line, longer than a block, has been yielded
    for block in stream:
        *full, rest = (rest + block).split('\n')
        for line in full:
            if begun or line.strip():
                yield line, True
            begun = False
        if len(rest) > BLOCK and (at := cut_point(rest)):
            yield rest[:at], False
            rest, begun = rest[at:], True
    if begun or rest.strip():
        yield rest, whole


def learn(
    kind: type[Tokenizer] | Tokenizer, characters: str, training: Iterable[Piece], size: int, vocab_size: int = 0
) -> Tokenizer:
    """
    A tokenizer of this kind, loaded, and learned, if required: from the characters that occur in both splits, or from
    LEARN_FROM characters of the training pieces, which have `size` (0: from all). vocab_size: 0 for the default.
    """
    material: Any = characters
    if kind.learned_from == 'text':
        sample = sample_evenly((text for text, _ in training), size, LEARN_FROM)
        material = tqdm(sample, desc='learning', unit=' texts', unit_scale=True, disable=None)
    return (kind if isinstance(kind, Tokenizer) else kind.learn(material, vocab_size)).load()


def sample_evenly(texts: Iterable[str], total: int, most: int) -> Iterator[str]:
    """Yields evenly spaced texts of about `most` characters, or all if they have fewer. total: how many they have."""
    taken = position = 0
    for text in texts:
        if taken * total <= position * most:
            taken += len(text)
            yield text
        position += len(text)


def encoding_bar(kind: type[Tokenizer] | Tokenizer, total: int) -> tqdm:
    """A progress bar over `total` characters, or bytes, that are encoded."""
    return tqdm(desc='encoding', total=total, unit='B' if kind.reads_bytes else 'char', unit_scale=True, disable=None)
