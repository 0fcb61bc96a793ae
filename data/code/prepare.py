"""
Prepare source code: the Python of this installation, or any folder by suffix; split into train and val by whole files.

The standard library and every package that requirements.txt pins, as they are installed here, in bytes:
$ python data/code/prepare.py

Some of it, or a small part of it, in a byte-pair encoding:
$ python data/code/prepare.py --packages=stdlib,numpy --name=numpy --tokenizer=bpe --vocab_size=2048
$ python data/code/prepare.py --megabytes=20 --name=code20

The C files of a folder:
$ python data/code/prepare.py --input=linux --suffixes=.c,.h --name=linux

Nothing is downloaded; meta.json says what was read. Files that are empty, repeated or not UTF-8 are left out. A file is
in the split that its content and split_seed decide, whatever other files there are. Code has a thousand characters or
more, nearly all of them in a few tables: char makes an id of each, byte has 256.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from core.cli.keys import begin

begin(__file__)  # before the slow imports

import collections
import hashlib
import importlib.metadata
import platform
import re
import sysconfig
import time
from dataclasses import dataclass

from tqdm import tqdm

from core.cli.arguments import names
from core.cli.errors import UserError, notice, output
from core.cli.ranges import listed
from core.convert.hf_tokenizer import kind_to_prepare
from core.text import text_files
from core.text.write_dataset import encode_stream, summary, write_dataset

# ----------------------------------------------------------------------------------------------------------------------
input = ''  # folders (or files), separated by commas, instead of packages
packages = ''  # installed packages, separated by commas, and stdlib; '': stdlib and all that requirements.txt pins
suffixes = '.py'  # which of their files to read
megabytes = 0  # read at most so many megabytes (10^6 bytes) of files, the same ones each time; 0: all
name = 'code'  # the data set is written to data/NAME; train with --dataset=NAME
out_dir = ''  # write to this folder instead of data/NAME
tokenizer = 'byte'  # char, byte, bpe, gpt2 or a folder with a tokenizer.json
vocab_size = 0  # bpe: number of ids; 0: 4096
val_fraction = 0.1  # the chance of a file to be in the validation split
split_seed = 1337  # decides which files those are, and which ones --megabytes takes
workers = 0  # threads; 0: all cores
# ----------------------------------------------------------------------------------------------------------------------
exec(open(Path(__file__).resolve().parents[2] / 'configurator.py', encoding='utf-8').read())

STDLIB = 'stdlib'


@dataclass
class Source:
    """A file, and where it is from: a package, or '' for the files that --input names."""

    path: Path
    package: str
    size: int  # bytes
    sha256: str  # of its content


# ---- which files -----------------------------------------------------------------------------------------------------


def package_files(package):
    """The version of an installed package and its files in the order of their paths. UserError if it isn't there."""
    if package == STDLIB:
        root = Path(sysconfig.get_path('stdlib'))
        found, _ = text_files.files_below(root, suffixes)
        own = [path for path in found if not {'site-packages', 'dist-packages'} & {*path.relative_to(root).parts}]
        return platform.python_version(), own
    try:
        distribution = importlib.metadata.distribution(package)
    except (importlib.metadata.PackageNotFoundError, ValueError) as error:
        hint = 'run pip install -r requirements.txt, or choose with --packages'
        raise UserError(f'the package {package} is not installed: {hint}') from error
    wanted = text_files.suffix_list(suffixes)
    listed = sorted((path for path in distribution.files or [] if path.name.endswith(wanted)), key=str)
    return distribution.version, [path for path in map(Path, map(distribution.locate_file, listed)) if path.is_file()]


def distinct(found):
    """The Sources of (package, path) pairs, without those that are left out, and how many of each kind those are."""
    sources, seen, left_out = [], set(), {'duplicate': 0, 'empty': 0, 'not UTF-8': 0}
    for package, path in tqdm(found, desc='comparing', unit='file', disable=None):
        size, checksum, valid = 0, hashlib.sha256(), True
        for block in text_files.blocks(path, as_bytes=True):
            size += len(block)
            checksum.update(block)
        try:
            collections.deque(text_files.blocks(path, as_bytes=False), maxlen=0)
        except UserError:
            valid = False
        source = Source(path, package, size, checksum.hexdigest())
        reason = 'empty' if not size else 'duplicate' if source.sha256 in seen else '' if valid else 'not UTF-8'
        seen.add(source.sha256)
        if reason:
            left_out[reason] += 1
        else:
            sources.append(source)
    return sources, left_out


def drawn(source, purpose):
    """A number from 0 to 1 that depends on the content of a file, `split_seed` and a purpose, as a random one would."""
    return int(hashlib.sha256(f'{split_seed} {purpose} {source.sha256}'.encode()).hexdigest()[:13], 16) / 16**13


def some(sources):
    """The Sources that fit into `megabytes`: the first that do in a random order of the contents. In their order."""
    room, taken = megabytes * 10**6, set()
    for source in sorted(sources, key=lambda source: drawn(source, 'subset')):
        if source.size <= room:
            room -= source.size
            taken.add(source.sha256)
    return [source for source in sources if source.sha256 in taken]


# ---- what is said about them -----------------------------------------------------------------------------------------


def counted(sources):
    """{'files': n, 'bytes': n} of some Sources."""
    return {'files': len(sources), 'bytes': sum(source.size for source in sources)}


def description(rows):
    """One line that says which text this is. rows: {package: {'version': v, 'files': n, 'bytes': n}}."""
    if input:
        return f'{len(sources):,} files of {text_files.named(input)}'
    each = [f'{package} {row["version"]}' for package, row in rows.items()]
    of = each if len(each) <= 3 else [*each[:2], f'{len(each) - 2} other packages']
    return f'{len(sources):,} {suffixes} files of {listed(of, "and")}'


# ---- read, split and encode ------------------------------------------------------------------------------------------

kind = kind_to_prepare(tokenizer, vocab_size)
folder = text_files.output_folder(Path(__file__).resolve().parents[1], name, out_dir)
if input and packages:
    raise UserError('--input and --packages were both given; choose one of them')
if input:
    files, copies = text_files.input_files(input, suffixes)
    versions, found = {}, [('', path) for path in files]
else:
    requirements = (Path(__file__).resolve().parents[2] / 'requirements.txt').read_text(encoding='utf-8')
    pinned = re.findall(r'^[\w.-]+', requirements, re.MULTILINE)
    installed = {each: package_files(each) for each in sorted({*names(packages, 'packages')} or {STDLIB, *pinned})}
    versions = {each: version for each, (version, _) in installed.items()}
    found = [(each, path) for each, (_, files) in installed.items() for path in files]
text_files.check_not_overwritten([path for _, path in found], folder)

sources, left_out = distinct(found)
if not sources:
    raise UserError(f'there is no text in the {suffixes} files of {input or ", ".join(versions)}; check --suffixes')
if any(left_out.values()):
    notice('note: leaving out ' + ', '.join(f'{count:,} {why} files' for why, count in left_out.items() if count))
if megabytes:
    sources = some(sources)
    if not sources:
        raise UserError(f'no file is as small as {megabytes} MB; choose more --megabytes')
parts = {'train': [], 'val': []}
for source in sources:
    parts['val' if drawn(source, 'split') < val_fraction else 'train'].append(source)
for split, part in parts.items():
    if not part:
        hint = 'choose another --split_seed or --val_fraction, or more files'
        raise UserError(f'none of {len(sources):,} files is in the {split} split: {hint}')

texts = {split: text_files.TextFiles([source.path for source in part], kind) for split, part in parts.items()}
characters = ''.join(text.characters for text in texts.values())
encoder = text_files.learn(kind, characters, texts['train'].pieces(), texts['train'].total, vocab_size)
if kind.learned_from == 'characters' and encoder.n_vocab > 256:
    notice(f'note: each of {encoder.n_vocab:,} different characters becomes an id; --tokenizer=byte has 256')
counts = {each: counted([source for source in sources if source.package == each]) for each in versions}
largest_first = sorted(versions, key=lambda each: -counts[each]['bytes'])
rows = {each: {'version': versions[each], **counts[each]} for each in largest_first}
details = {'packages': rows} if rows else {}
details |= {'splits': {split: counted(part) for split, part in parts.items()}, 'left_out': left_out}
details |= {'suffixes': suffixes, 'val_fraction': val_fraction, 'split_seed': split_seed}

start = time.perf_counter()
with text_files.encoding_bar(kind, sum(text.total for text in texts.values())) as bar:
    splits = {split: encode_stream(encoder, text.pieces(), workers, bar) for split, text in texts.items()}
    checksum = text_files.joint_checksum([source.sha256 for source in sources])
    about = dict(source=description(rows), input_sha256=checksum, details=details)
    meta = write_dataset(folder, encoder, splits, **about, least=text_files.LEAST)
share = meta['tokens']['val'] / sum(meta['tokens'].values())
if not val_fraction / 2 < share < 2 * val_fraction:
    why = f'files are kept whole, and there are {len(sources):,}; another --split_seed splits otherwise'
    notice(f'note: {share:.1%} of the tokens are for validation, not {val_fraction:.0%}: {why}')
output(summary(folder, meta, time.perf_counter() - start))
