"""
Prepare OpenWebText (8 million web pages, 9 billion GPT-2 tokens): train.bin, val.bin and meta.json in this folder.

Download it from the Hugging Face hub and tokenize it by all cores:
$ python data/openwebtext/prepare.py

The same command goes on where a stopped run left off. Use Parquet files with a column `text` that are here already:
$ python data/openwebtext/prepare.py --input=FOLDER

It takes about 25 GB of download, 40 GB more in Hugging Face's cache (HF_HOME says where), and 17 GB for train.bin.

Notable features:
- the Parquet files of https://huggingface.co/datasets/Skylion007/openwebtext, since loading scripts no longer run
- the validation documents are those that nanoGPT's script draws (0.05 %, seed 2357); training documents stay in order,
  since training draws windows at random anyway and reading in order is what disks are fast at
- every document is followed by <|endoftext|>
- train.bin grows shard by shard; progress.json says how much of it is complete, so that kill -9 costs a shard at most
"""

import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from core import tokenizer, write_dataset
from core.runtime import UserError, notice

# ----------------------------------------------------------------------------------------------------------------------
input = ''  # a Parquet file or a folder of them, with a column `text`; '' = OpenWebText from the Hugging Face hub
revision = 'main'  # of the data set on the hub: a branch or a commit
val_fraction = 0.0005  # the part of the documents that is for validation
split_seed = 2357  # which documents those are
shard_documents = 50000  # documents between two points from which a stopped run can go on
workers = 0  # threads, and processes of the download; 0 = all cores
out_dir = ''  # where the data set goes; '' = this folder
# ----------------------------------------------------------------------------------------------------------------------
exec(open(Path(__file__).resolve().parents[2] / 'configurator.py', encoding='utf-8').read())

HUB = 'Skylion007/openwebtext'
DOCUMENTS = 8_013_769  # of OpenWebText as nanoGPT had it
READ = 256  # documents read at a time


def parquet_files(path):
    """The Parquet files that `--input` names, as a list of str. UserError where there is none."""
    files = sorted(path.rglob('*.parquet')) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UserError(f'there is no Parquet file {path}; --input takes one, or a folder of them')
    return [str(file) for file in files]


def load():
    """The documents, memory-mapped by `datasets`. UserError where they can't be had."""
    try:
        import datasets
    except ImportError:
        raise UserError('OpenWebText is read by Hugging Face datasets: pip install datasets') from None
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        if input:
            found = datasets.load_dataset('parquet', data_files=parquet_files(Path(input)), split='train')
        else:
            processes = workers or tokens.available_cores()
            found = datasets.load_dataset(HUB, revision=revision, split='train', num_proc=processes)
    except UserError:
        raise
    except Exception as error:  # the network, the hub, the cache or a broken file
        cause = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        where = input or f'{HUB} (revision {revision}) from the Hugging Face hub'
        raise UserError(
            f"can't load {where}: {cause}; check the network, or give Parquet files by --input=FOLDER"
        ) from error
    if 'text' not in found.column_names:
        raise UserError(f"the documents have no column 'text', only {', '.join(found.column_names)}")
    return found


def identity():
    """What decides which bytes train.bin gets; a stopped run goes on only where all of it is the same."""
    ends = ''.join(found[i]['text'] or '' for i in (0, len(found) // 2, len(found) - 1))
    checksum = hashlib.sha256(ends.encode('utf-8', errors='surrogatepass')).hexdigest()
    return {'documents': len(found), 'sample': checksum, 'val_fraction': val_fraction, 'split_seed': split_seed}


def training_documents(first, last):
    """The texts of the documents from `first` to `last` that are not for validation."""
    for start in range(first, last, READ):
        stop = min(start + READ, last)
        for i, text in zip(range(start, stop), found[start:stop]['text'], strict=True):
            if not for_validation[i]:
                yield text or ''


def finished():
    """How many documents, and bytes of them, a stopped run has left in train.bin.part."""
    try:
        progress = json.loads(journal.read_text(encoding='utf-8'))
        if progress['of'] == identity() and part.stat().st_size >= progress['bytes']:
            return progress['documents'], progress['bytes']
        notice('note: the unfinished train.bin.part is of other documents or settings; starting anew')
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError):
        notice('note: progress.json is broken; starting anew')
    return 0, 0


def write_progress(documents, size):
    """Say in progress.json that so many documents are complete in the first `size` bytes of train.bin.part."""
    beside = write_dataset.temporary(journal)
    write_dataset.write_json(beside, {'of': identity(), 'documents': documents, 'bytes': size})
    os.replace(beside, journal)


for holds, complaint in (
    (0 < val_fraction < 1, f'val_fraction={val_fraction} must be above 0 and below 1'),
    (min(workers, split_seed) >= 0, f'workers={workers} and split_seed={split_seed} must not be negative'),
    (shard_documents >= 1, f'shard_documents={shard_documents} must be at least 1'),
):
    if not holds:
        raise UserError(complaint)
if input:
    parquet_files(Path(input))  # say what is wrong with it before anything takes long
tokenizer = tokenizer.GPT2Tokenizer()
found = load()
if len(found) < 2:
    raise UserError(f'{input or HUB} has {len(found)} documents, and it takes two: one to train, one to validate on')
if not input and len(found) != DOCUMENTS:
    notice(f'note: this revision has {len(found):,} documents, not the {DOCUMENTS:,} of OpenWebText: is it all of it?')

# the split of `datasets`' train_test_split(test_size=0.0005, seed=2357, shuffle=True), as a mask over the documents
permutation = np.random.default_rng(split_seed).permutation(len(found))
validation = permutation[: min(math.ceil(val_fraction * len(found)), len(found) - 1)]
for_validation = np.zeros(len(found), dtype=bool)
for_validation[validation] = True

folder = Path(out_dir) if out_dir else Path(__file__).resolve().parent
part, journal = folder / 'train.bin.part', folder / 'progress.json'
start = time.perf_counter()
try:
    folder.mkdir(parents=True, exist_ok=True)
    done, size = finished()
    if done:
        notice(f'going on after {done:,} of {len(found):,} documents')
    already = size // 2  # tokens
    with (
        open(part, 'r+b' if done else 'wb') as file,
        tqdm(total=len(found), initial=done, unit='doc', disable=None) as bar,
    ):
        file.truncate(size)
        file.seek(size)
        while done < len(found):
            last = min(done + shard_documents, len(found))
            texts = ((text, True) for text in training_documents(done, last))
            for array in write_dataset.encode_stream(tokenizer, texts, workers):
                size += file.write(array.tobytes())
            write_dataset.sync(file)
            write_progress(last, size)
            bar.update(last - done)
            done = last
except OSError as error:
    raise UserError(f"can't write into {folder}: {error.strerror or error}; mend that and run this again") from error

texts = ((found[int(i)]['text'] or '', True) for i in validation)
splits = {'train': part, 'val': write_dataset.encode_stream(tokenizer, texts, workers)}
source = (
    f'{len(found):,} documents of {Path(input).resolve().name}' if input else f'OpenWebText ({len(found):,} documents)'
)
meta = write_dataset.write_dataset(folder, 'gpt2', splits, source=source)
journal.unlink()
print(write_dataset.summary(folder, meta, time.perf_counter() - start, already))
