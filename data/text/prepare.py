"""
Prepare any text: files or folders in, train.bin, val.bin and meta.json out, in data/NAME.

A novel in characters, and training on it:
$ python data/text/prepare.py --input=novel.txt --name=novel
$ python train.py config/train_shakespeare_char.py --dataset=novel --out_dir=out-novel

All .txt and .md files of a folder, and one more file, in GPT-2's tokens:
$ python data/text/prepare.py --input=notes,diary.txt --name=notes --tokenizer=gpt2

In a byte-pair encoding learned from the text, for small models, whose output head GPT-2's 50,257 ids would dominate:
$ python data/text/prepare.py --input=notes --name=notes --tokenizer=bpe --vocab_size=2048

A compressed file with one document per line:
$ python data/text/prepare.py --input=reviews.txt.gz --name=reviews --tokenizer=gpt2 --documents=line

Notable features:
- any size: the text streams through all cores in bounded memory; the ids equal those of encoding each file at once
- text is UTF-8 whatever the locale; byte order marks are dropped, \\r\\n becomes \\n (byte: the bytes are unchanged)
- files are read in the order of their paths; the end of the text is the validation split
- gpt2 and bpe insert <|endoftext|> after each document; char and byte have no such token and concatenate the files
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from core import signals

signals.exit_at_once()  # for the time of the slow imports

import gzip
import hashlib
import io
import os
import stat
import time
import zlib
from collections import Counter

import numpy as np
from tqdm import tqdm

from core.bounds import listed
from core.files import copy_of_pipe, sha256
from core.messages import UserError, check_folder, notice, output
from core.tokenizer import TOKENIZERS, code_points, sample_evenly
from core.write_dataset import chunks, cut_point, encode_stream, summary, write_dataset

# ----------------------------------------------------------------------------------------------------------------------
input = ''  # a file or a folder, or several, separated by commas
name = 'text'  # the data set is written to data/NAME; train with --dataset=NAME
out_dir = ''  # write to this folder instead of data/NAME
tokenizer = 'char'  # char, byte, bpe or gpt2
vocab_size = 0  # bpe: number of ids; 0: 4096
documents = 'file'  # gpt2, bpe: a document is a file or a line
suffixes = '.txt,.md,.txt.gz'  # which files of a folder to read
val_fraction = 0.1  # fraction of the text in the validation split
workers = 0  # threads; 0: all cores
# ----------------------------------------------------------------------------------------------------------------------
exec(open(Path(__file__).resolve().parents[2] / 'configurator.py', encoding='utf-8').read())

BLOCK = 1 << 20  # characters, or bytes, per read
LEAST = 65  # tokens of the training split: one block of 64 and its targets
LEARN_FROM = 1 << 25  # characters of the training text from which a byte-pair encoding is learned


def input_files(given):
    """
    The files that `--input` names, in order, and what else was in the folders as text. UserError if there are none.

    Pipes, as of the shell's <(command), are copied to temporary files, which exist as long as `copies` does.
    """
    paths = [Path(part.strip()) for part in given.split(',') if part.strip()]
    if paths and os.path.exists(given):
        paths = [Path(given)]  # a name that contains a comma
    if not paths:
        raise UserError('say what to prepare: --input=FILE, or a folder, or several, separated by commas')
    files, ignored = [], Counter()
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f'there is no file or folder {path}; check --input')
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            found, others = files_below(path)
            files, ignored = files + found, ignored + others
        elif stat.S_ISFIFO(mode):
            notice(f'reading the pipe {path}')
            copies.append(copy_of_pipe(path))
            files.append(Path(copies[-1].name))
        elif stat.S_ISREG(mode):
            files.append(path)
        else:
            raise UserError(f'{path} is neither a file nor a folder nor a pipe; check --input')
    return files, in_words(ignored)


def files_below(folder):
    """The files in a folder with one of `suffixes`, in order, and a Counter of the others' suffixes, or UserError."""
    wanted = tuple(suffix.strip() for suffix in suffixes.split(',') if suffix.strip())
    every = (file for file in folder.rglob('*') if file.is_file())
    visible = [file for file in every if not any(p.startswith('.') for p in file.relative_to(folder).parts)]
    found = sorted((file for file in visible if file.name.endswith(wanted)), key=lambda file: file.as_posix())
    ignored = Counter(file.suffix or 'without suffix' for file in visible if not file.name.endswith(wanted))
    if not found:
        there = f' (only {in_words(ignored)})' if ignored else ''
        raise UserError(f'there are no {suffixes} files in {folder}{there}; set other suffixes with --suffixes')
    return found, ignored


def in_words(ignored):
    """'300 .py, 2 .png and 4 others' for a Counter of suffixes."""
    most = ignored.most_common(5)
    others = ignored.total() - sum(count for _, count in most)
    return ', '.join(f'{count:,} {suffix}' for suffix, count in most) + (f' and {others:,} others' if others else '')


def blocks(path):
    """Yields the text of a file in blocks: str, or bytes if the tokenizer reads bytes. UserError if unreadable."""
    try:
        with gzip.open(path, 'rb') if path.name.endswith('.gz') else open(path, 'rb') as file:
            reader = file if kind.reads_bytes else io.TextIOWrapper(file, encoding='utf-8-sig')
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
    with gzip.open(path, 'rb') if path.name.endswith('.gz') else open(path, 'rb') as file:
        for number, line in enumerate(iter(lambda: file.readline(1 << 24), b''), 1):
            try:
                line.decode('utf-8')
            except UnicodeDecodeError as error:
                return f'line {number}, byte 0x{line[error.start]:02x}'
    return 'at its end'


def survey(files):
    """Reads all files once: returns the length of each, and a str of the characters that occur if those are learned."""
    lengths, seen = [], np.zeros(0x110000, dtype=bool)
    for path in tqdm(files, desc='reading', unit='file', disable=None):
        lengths.append(0)
        for block in blocks(path):
            lengths[-1] += len(block)
            if kind.learned_from == 'characters':
                seen[code_points(block)] = True
    return lengths, ''.join(map(chr, np.flatnonzero(seen)))


def part(path, start, stop):
    """Yields the blocks of a file from character (or byte) `start` to `stop`."""
    position = 0
    for block in blocks(path):
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


def pieces(files, lengths, start, stop):
    """Yields the text from position `start` to `stop` of all files as the (text, ended) pairs that are encoded."""
    position = 0
    for path, length in zip(files, lengths, strict=True):
        first, last = max(0, start - position), min(length, stop - position)
        position += length
        if first >= last:
            continue
        stream, whole = part(path, first, last), last == length
        if documents == 'line':
            yield from lines(stream, whole)
        elif kind.byte_pair:
            yield from ((piece, False) for piece in chunks(stream))
            yield '', whole
        else:
            yield from ((block, False) for block in stream)


def learn(files, lengths, characters, cut):
    """The tokenizer, loaded; learned from the characters or from the text in front of position `cut` if required."""
    material = characters
    if kind.learned_from == 'text':
        stream = (text for text, _ in pieces(files, lengths, 0, cut))
        sample = sample_evenly(stream, cut, LEARN_FROM)
        material = tqdm(sample, desc='learning', unit=' texts', unit_scale=True, disable=None)
    return kind.learn(material, vocab_size).load()


def checksum(files):
    """The SHA-256 of a file, or of the list of checksums of several files."""
    sums = [sha256(path) for path in files]
    return sums[0] if len(sums) == 1 else hashlib.sha256('\n'.join(sums).encode('ascii')).hexdigest()


kind = TOKENIZERS.get(tokenizer)
if kind is None:
    raise UserError(f"tokenizer is '{tokenizer}'; it must be {listed([*TOKENIZERS])}")
sized = [each.name for each in TOKENIZERS.values() if each.vocab_sizes]
divided = [each.name for each in TOKENIZERS.values() if each.byte_pair]
sizes = kind.vocab_sizes or range(1)
for holds, complaint in (
    (
        not vocab_size or kind.vocab_sizes,
        f'--vocab_size requires --tokenizer={listed(sized)}: the other vocabularies have fixed sizes',
    ),
    (
        not vocab_size or vocab_size in sizes,
        f'vocab_size={vocab_size} must be from {sizes[0]} (the 256 bytes are included) to {sizes[-1]}',
    ),
    (
        documents == 'file' or kind.byte_pair,
        f'--documents=line requires --tokenizer={listed(divided)}: the others have no end-of-text token',
    ),
    (
        name and name == Path(name).name and not name.startswith('.'),
        f"name is '{name}'; it must be a plain folder name",
    ),
):
    if not holds:
        raise UserError(complaint)
folder = Path(out_dir) if out_dir else Path(__file__).resolve().parents[1] / name
check_folder(str(folder))
copies = []
files, ignored = input_files(input)
if ignored:
    notice(f'note: ignoring {ignored}; --suffixes={suffixes} selects the files of a folder')
made = [folder / name for name in ('train.bin', 'val.bin', 'meta.json')]
for path in files:
    if any(target.exists() and target.samefile(path) for target in made):
        raise UserError(f'{path} would be overwritten by the data set; choose another --name or --out_dir')

lengths, characters = survey(files)
total = sum(lengths)
if total < 2:
    raise UserError(f'there is no text in {input}; set another file or folder with --input')
cut = min(max(1, int(total * (1 - val_fraction))), total - 1)
encoder = learn(files, lengths, characters, cut)
named = ', '.join(Path(part.strip()).resolve().name for part in input.split(','))
source = f'file {files[0].name}' if len(files) == 1 else f'{len(files):,} files of {named}'
if len(files) == len(copies):
    source = 'text from a pipe'

start = time.perf_counter()
unit = 'B' if kind.reads_bytes else 'char'
with tqdm(desc='encoding', total=total, unit=unit, unit_scale=True, disable=None) as bar:
    ranges = {'train': (0, cut), 'val': (cut, total)}
    splits = {
        split: encode_stream(encoder, pieces(files, lengths, *ends), workers, bar) for split, ends in ranges.items()
    }
    try:
        meta = write_dataset(folder, encoder, splits, source=source, input_sha256=checksum(files), least=LEAST)
    except UserError as error:
        hint = f'; {ignored} were ignored, and --suffixes selects others' if ignored else ''
        raise UserError(f'{error}{hint}') from error
output(summary(folder, meta, time.perf_counter() - start))
