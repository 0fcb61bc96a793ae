"""
Prepare your own text: files or folders in, train.bin, val.bin and meta.json out, in data/NAME.

A novel by characters, then train on it:
$ python data/text/prepare.py --input=novel.txt --name=novel
$ python train.py config/train_shakespeare_char.py --dataset=novel --out_dir=out-novel

All .txt and .md files below a folder, and one file more, in GPT-2's tokens:
$ python data/text/prepare.py --input=notes,diary.txt --name=notes --tokenizer=gpt2

In tokens learned from the text itself, for small models, whose arithmetic would mostly be GPT-2's 50257 ids:
$ python data/text/prepare.py --input=notes --name=notes --tokenizer=bpe --vocab_size=2048

A compressed file with one document per line:
$ python data/text/prepare.py --input=reviews.txt.gz --name=reviews --tokenizer=gpt2 --documents=line

Notable features:
- any size: the text streams through all cores in bounded memory; the result is that of encoding each file in one go
- text is UTF-8, whatever the system's default; a byte order mark goes, \\r\\n becomes \\n (byte: bytes as they are)
- files come in the order of their paths; the last part of the text, by position, is for validation
- gpt2 and bpe put <|endoftext|> after each document; char and byte have no such token: file follows file as it is
"""

import gzip
import hashlib
import io
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from core import tokenizer, write_dataset
from core.runtime import UserError

# ----------------------------------------------------------------------------------------------------------------------
input = ''  # a file or a folder, or several with commas between
name = 'text'  # the data set goes to data/NAME; train with --dataset=NAME
out_dir = ''  # a folder to take the place of data/NAME
tokenizer = 'char'  # char, byte, gpt2 or bpe
vocab_size = 0  # bpe: number of ids; 0: 4096
documents = 'file'  # gpt2, bpe: <|endoftext|> after every file, or after every line
suffixes = '.txt,.md,.txt.gz'  # which files of a folder to read
val_fraction = 0.1  # the part of the text that is for validation
workers = 0  # threads; 0 = all cores
# ----------------------------------------------------------------------------------------------------------------------
exec(open(Path(__file__).resolve().parents[2] / 'configurator.py', encoding='utf-8').read())

BLOCK = 1 << 20  # characters, or bytes, that are read at a time
LEARN_FROM = 1 << 25  # bpe: characters of the training text that pairs are learned from


def input_files(given):
    """The files that `--input` names, in order. UserError where there is none."""
    paths = [Path(part.strip()) for part in given.split(',') if part.strip()]
    if paths and Path(given).exists():
        paths = [Path(given)]  # a name with a comma in it
    if not paths:
        raise UserError('say what to prepare: --input=FILE, or a folder, or several with commas between')
    wanted = tuple(suffix.strip() for suffix in suffixes.split(',') if suffix.strip())
    files = []
    for path in paths:
        found = [path]
        if path.is_dir():
            below = (file for file in path.rglob('*') if file.name.endswith(wanted) and file.is_file())
            visible = (file for file in below if not any(p.startswith('.') for p in file.relative_to(path).parts))
            found = sorted(visible, key=lambda file: file.as_posix())
            if not found:
                raise UserError(f'there are no {suffixes} files in {path}; name other endings with --suffixes')
        elif not path.exists():
            raise UserError(f'there is no file or folder {path}; check --input')
        files += found
    return files


def blocks(path):
    """The text of a file in blocks: str, or bytes for the byte tokenizer. UserError where it can't be read."""
    try:
        with gzip.open(path, 'rb') if path.name.endswith('.gz') else open(path, 'rb') as file:
            reader = file if tokenizer == 'byte' else io.TextIOWrapper(file, encoding='utf-8-sig')
            while block := reader.read(BLOCK):
                yield block
    except UnicodeDecodeError as error:
        raise UserError(
            f'{path} is not UTF-8 text ({bad_line(path)}): save it as UTF-8, or use --tokenizer=byte'
        ) from error
    except (OSError, EOFError) as error:
        raise UserError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from error


def bad_line(path):
    """Where a file stops being UTF-8, for a human."""
    with gzip.open(path, 'rb') if path.name.endswith('.gz') else open(path, 'rb') as file:
        for number, line in enumerate(iter(lambda: file.readline(1 << 24), b''), 1):
            try:
                line.decode('utf-8')
            except UnicodeDecodeError as error:
                return f'line {number}, byte 0x{line[error.start]:02x}'
    return 'at its end'


def survey(files):
    """Reads everything once: the length of each file, and the characters that occur (None but for char)."""
    lengths, seen = [], np.zeros(0x110000, dtype=bool)
    for path in tqdm(files, desc='reading', unit='file', disable=None):
        lengths.append(0)
        for block in blocks(path):
            lengths[-1] += len(block)
            if tokenizer == 'char':
                seen[tokenizer.code_points(block)] = True
    return lengths, ''.join(map(chr, np.flatnonzero(seen))) if tokenizer == 'char' else None


def part(path, start, stop):
    """The blocks of a file from character (or byte) `start` to `stop`."""
    position = 0
    for block in blocks(path):
        inside = block[max(0, start - position) : max(0, stop - position)]
        position += len(block)
        if inside:
            yield inside
        if position >= stop:
            return


def lines(stream, whole):
    """The lines of a stream of str as (text, ended); empty ones are left out. whole: does the last one end there?"""
    rest, begun = '', False  # begun: a line so long that its head went out already
    for block in stream:
        *full, rest = (rest + block).split('\n')
        for line in full:
            if begun or line.strip():
                yield line, True
            begun = False
        if len(rest) > BLOCK and (
            at := write_dataset.last_cut(rest) or len(rest) > write_dataset.LONGEST_RUN and len(rest)
        ):
            yield rest[:at], False
            rest, begun = rest[at:], True
    if begun or rest.strip():
        yield rest, whole


def pieces(files, lengths, start, stop):
    """The text from `start` to `stop`, counted over all files, as the (text, ended) pairs that are encoded."""
    position = 0
    for path, length in zip(files, lengths, strict=True):
        first, last = max(0, start - position), min(length, stop - position)
        position += length
        if first >= last:
            continue
        stream, whole = part(path, first, last), last == length
        if documents == 'line':
            yield from lines(stream, whole)
        elif tokenizer in tokenizer.BYTE_PAIR_TOKENIZERS:
            yield from ((piece, False) for piece in write_dataset.chunks(stream))
            yield '', whole
        else:
            yield from ((block, False) for block in stream)


def digest(files):
    """The SHA-256 of a file, or of the list of those of several files."""
    sums = [write_dataset.file_sha256(path) for path in files]
    return sums[0] if len(sums) == 1 else hashlib.sha256('\n'.join(sums).encode('ascii')).hexdigest()


for holds, complaint in (
    (
        tokenizer in ('char', 'byte', *tokenizer.BYTE_PAIR_TOKENIZERS),
        f"tokenizer is '{tokenizer}'; it must be char, byte, bpe or gpt2",
    ),
    (not vocab_size or tokenizer == 'bpe', '--vocab_size needs --tokenizer=bpe: the others have a size of their own'),
    (
        not vocab_size or 300 <= vocab_size <= 65536,
        f'vocab_size={vocab_size} must be from 300 (the 256 bytes are in it) to 65536',
    ),
    (documents in ('file', 'line'), f"documents is '{documents}'; it must be file or line"),
    (
        documents == 'file' or tokenizer in tokenizer.BYTE_PAIR_TOKENIZERS,
        '--documents=line needs --tokenizer=gpt2 or bpe: the others have no end token',
    ),
    (0 < val_fraction < 1, f'val_fraction={val_fraction} must be above 0 and below 1'),
    (workers >= 0, f'workers={workers} must not be negative'),
    (
        name and name == Path(name).name and not name.startswith('.'),
        f"name is '{name}'; it must be a plain folder name",
    ),
):
    if not holds:
        raise UserError(complaint)
folder = Path(out_dir) if out_dir else Path(__file__).resolve().parents[1] / name
files = input_files(input)
made = [folder / name for name in ('train.bin', 'val.bin', 'meta.json')]
for path in files:
    if any(target.exists() and target.samefile(path) for target in made):
        raise UserError(f'{path} would be overwritten by the data set; choose another --name or --out_dir')

lengths, chars = survey(files)
total = sum(lengths)
if total < 2:
    raise UserError(f'there is no text in {input}; name another file or folder with --input')
cut = min(max(1, int(total * (1 - val_fraction))), total - 1)
vocabulary = None
if tokenizer == 'bpe':
    stream = (text for text, _ in pieces(files, lengths, 0, cut))
    sample = tqdm(
        tokenizer.evenly(stream, cut, LEARN_FROM), desc='learning', unit=' texts', unit_scale=True, disable=None
    )
    vocabulary = tokenizer.learn_bpe(sample, vocab_size or 4096)
encoder = tokenizer.load_tokenizer({'tokenizer': tokenizer, 'chars': chars, 'pieces': vocabulary})
named = ', '.join(Path(part.strip()).resolve().name for part in input.split(','))
source = f'file {files[0].name}' if len(files) == 1 else f'{len(files):,} files of {named}'

start = time.perf_counter()
unit = 'B' if tokenizer == 'byte' else 'char'
with tqdm(desc='encoding', total=total, unit=unit, unit_scale=True, disable=None) as bar:
    ranges = {'train': (0, cut), 'val': (cut, total)}
    splits = {
        split: write_dataset.encode_stream(encoder, pieces(files, lengths, *ends), workers, bar)
        for split, ends in ranges.items()
    }
    meta = write_dataset.write_dataset(
        folder, tokenizer, splits, chars=chars, pieces=vocabulary, source=source, input_sha256=digest(files)
    )
print(write_dataset.summary(folder, meta, time.perf_counter() - start))
