"""
Text files as streams: which files there are, their text in blocks, and the pieces of it that a tokenizer encodes.

Notable features:
- for the prepare scripts that read a user's own files: data/text and data/code; data/hub shares how they are named
- files of any size: text is read, surveyed and cut in blocks, in bounded memory
- text is UTF-8 whatever the locale; byte order marks are dropped and \\r\\n becomes \\n; tokenizers that read bytes get
  the bytes of the files unchanged
"""

import gzip
import hashlib
import io
import os
import stat
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from core.cli.arguments import check_folder
from core.cli.errors import UserError, notice
from core.cli.files import copy_of_pipe
from core.cli.ranges import listed
from core.text.tokenizer import TOKENIZERS, code_points, sample_evenly
from core.text.write_dataset import chunks, cut_point

BLOCK = 1 << 20  # characters, or bytes, per read
LEARN_FROM = 1 << 25  # characters of the training text from which a byte-pair encoding is learned
LEAST = 65  # tokens of the training split: one block of 64 and its targets


# ---- what the user asks for ------------------------------------------------------------------------------------------


def tokenizer_kind(tokenizer, vocab_size=0):
    """The class of the tokenizer of this name. UserError if there is none, or if it can't have this many ids."""
    kind = TOKENIZERS.get(tokenizer)
    if kind is None:
        raise UserError(f"tokenizer is '{tokenizer}'; it must be {listed([*TOKENIZERS])}")
    if vocab_size and not kind.vocab_sizes:
        sized = [each.name for each in TOKENIZERS.values() if each.vocab_sizes]
        raise UserError(f'--vocab_size requires --tokenizer={listed(sized)}: the other vocabularies have fixed sizes')
    if vocab_size and vocab_size not in kind.vocab_sizes:
        low, high = kind.vocab_sizes[0], kind.vocab_sizes[-1]
        raise UserError(f'vocab_size={vocab_size} must be from {low} (the 256 bytes are included) to {high}')
    return kind


def output_folder(data, name, out_dir):
    """The folder to write to, a Path: out_dir, or `name` in the folder `data`. UserError if it can't be written."""
    if not name or name != Path(name).name or name.startswith('.'):
        raise UserError(f"name is '{name}'; it must be a plain folder name")
    folder = Path(out_dir) if out_dir else data / name
    check_folder(str(folder))
    return folder


def check_not_overwritten(files, folder):
    """UserError if one of the input files is a file of the data set that is to be written to `folder`."""
    made = [folder / name for name in ('train.bin', 'val.bin', 'meta.json')]
    made = [target for target in made if target.exists()]
    for path in files:
        if any(target.samefile(path) for target in made):
            raise UserError(f'{path} would be overwritten by the data set; choose another --name or --out_dir')


# ---- which files -----------------------------------------------------------------------------------------------------


def input_files(given, suffixes):
    """
    The files that `--input` names: (files in order, Counter of what else was in the folders, copies of pipes).

    suffixes: of the files of a folder that count, separated by commas. Pipes, as of the shell's <(command), are copied
    to temporary files, which exist as long as their objects do. UserError if there are no files.
    """
    paths = [Path(part.strip()) for part in given.split(',') if part.strip()]
    if paths and os.path.exists(given):
        paths = [Path(given)]  # a name that contains a comma
    if not paths:
        raise UserError('say what to prepare: --input=FILE, or a folder, or several, separated by commas')
    files, ignored, copies = [], Counter(), []
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f'there is no file or folder {path}; check --input')
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            found, others = files_below(path, suffixes)
            if not found:
                there = f' (only {in_words(others)})' if others else ''
                raise UserError(f'there are no {suffixes} files in {path}{there}; set other suffixes with --suffixes')
            files, ignored = files + found, ignored + others
        elif stat.S_ISFIFO(mode):
            notice(f'reading the pipe {path}')
            copies.append(copy_of_pipe(path))
            files.append(Path(copies[-1].name))
        elif stat.S_ISREG(mode):
            files.append(path)
        else:
            raise UserError(f'{path} is neither a file nor a folder nor a pipe; check --input')
    return files, ignored, copies


def files_below(folder, suffixes):
    """The visible files in a folder with one of `suffixes`, in order of path, and a Counter of the others' suffixes."""
    wanted = suffix_list(suffixes)
    every = (file for file in folder.rglob('*') if file.is_file())
    visible = [file for file in every if not any(p.startswith('.') for p in file.relative_to(folder).parts)]
    found = sorted((file for file in visible if file.name.endswith(wanted)), key=lambda file: file.as_posix())
    ignored = Counter(file.suffix or 'without suffix' for file in visible if not file.name.endswith(wanted))
    return found, ignored


def suffix_list(suffixes):
    """The suffixes in a str such as '.c,.h', as a tuple."""
    return tuple(suffix.strip() for suffix in suffixes.split(',') if suffix.strip())


def in_words(ignored):
    """'300 .py, 2 .png and 4 others' for a Counter of suffixes."""
    most = ignored.most_common(5)
    others = ignored.total() - sum(count for _, count in most)
    return ', '.join(f'{count:,} {suffix}' for suffix, count in most) + (f' and {others:,} others' if others else '')


def notice_ignored(ignored, suffixes):
    """Print what the folders held beside the files that were chosen, a Counter of suffixes, if there was anything."""
    if ignored:
        notice(f'note: ignoring {in_words(ignored)}; --suffixes={suffixes} selects the files of a folder')


def named(given):
    """The names of the files and folders that `--input` names, for a line that says which text this is."""
    return ', '.join(Path(part.strip()).resolve().name for part in given.split(',') if part.strip())


def joint_checksum(sums):
    """One SHA-256 for several files, from the list of theirs; that of a single file is its own."""
    return sums[0] if len(sums) == 1 else hashlib.sha256('\n'.join(sums).encode('ascii')).hexdigest()


# ---- their text ------------------------------------------------------------------------------------------------------


def opened(path):
    """A file, open for reading its bytes; .gz files are decompressed."""
    return gzip.open(path, 'rb') if path.name.endswith('.gz') else open(path, 'rb')


def blocks(path, as_bytes):
    """Yields the content of a file in blocks: bytes if as_bytes, otherwise str. UserError if it can't be read."""
    try:
        with opened(path) as file:
            reader = file if as_bytes else io.TextIOWrapper(file, encoding='utf-8-sig')
            while block := reader.read(BLOCK):
                yield block
    except UnicodeDecodeError as error:
        raise UserError(
            f'{path} is not UTF-8 text ({bad_line(path)}): save it as UTF-8, or use --tokenizer=byte'
        ) from error
    except (OSError, EOFError, zlib.error) as error:  # the last two from a damaged .gz
        raise UserError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from error


def bad_line(path):
    """The first place in a file that is not UTF-8, for an error message."""
    with opened(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(1 << 24), b''), 1):
            try:
                line.decode('utf-8')
            except UnicodeDecodeError as error:
                return f'line {number}, byte 0x{line[error.start]:02x}'
    return 'at its end'


class TextFiles:
    """
    The text of some files, one after the other, for a kind of tokenizer.

    files: a list of Path. kind: a subclass of Tokenizer. documents: 'file', or 'line' if each line is a document.
    Attributes: `lengths`, the characters in each file (bytes if the tokenizer reads bytes), `total`, their sum, and
    `characters`, a str of all that occur if the tokenizer learns from those. UserError if a file can't be read.
    """

    def __init__(self, files, kind, documents='file'):
        self.files, self.kind, self.documents = files, kind, documents
        self.lengths, seen = [], np.zeros(0x110000, dtype=bool)
        for path in tqdm(files, desc='reading', unit='file', disable=None):
            self.lengths.append(0)
            for block in blocks(path, kind.reads_bytes):
                self.lengths[-1] += len(block)
                if kind.learned_from == 'characters':
                    seen[code_points(block)] = True
        self.total = sum(self.lengths)
        self.characters = ''.join(map(chr, np.flatnonzero(seen)))

    def pieces(self, start=0, stop=None):
        """Yields the text from position `start` to `stop` as the (text, ended) pairs that encode_stream takes."""
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

    def _part(self, path, start, stop):
        """Yields the blocks of a file from character (or byte) `start` to `stop`."""
        position = 0
        for block in blocks(path, self.kind.reads_bytes):
            inside = block[max(0, start - position) : max(0, stop - position)]
            position += len(block)
            if inside:
                yield inside
            if position >= stop:
                return


def lines(stream, whole):
    """Yields the lines of a stream of str as (text, ended), without empty ones. whole: the last line ends there."""
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


def learn(kind, characters, training, size, vocab_size=0):
    """
    A tokenizer of this kind, loaded; learned, if required, from what the data set holds.

    characters: a str of all that occur in both splits. training: the (text, ended) pairs of the training split, which
    has `size` characters; a byte-pair encoding is learned from LEARN_FROM of them. vocab_size: 0 for the default.
    """
    material = characters
    if kind.learned_from == 'text':
        sample = sample_evenly((text for text, _ in training), size, LEARN_FROM)
        material = tqdm(sample, desc='learning', unit=' texts', unit_scale=True, disable=None)
    return kind.learn(material, vocab_size).load()


def encoding_bar(kind, total):
    """A progress bar over `total` characters, or bytes, that are encoded."""
    return tqdm(desc='encoding', total=total, unit='B' if kind.reads_bytes else 'char', unit_scale=True, disable=None)
