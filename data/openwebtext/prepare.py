"""
Prepare OpenWebText (8 million web pages, 9 billion GPT-2 tokens): train.bin, val.bin and meta.json in this folder.

Download it from the Hugging Face Hub and tokenize it on all cores:
$ python data/openwebtext/prepare.py

The same command resumes a stopped run. Use local Parquet files with a column `text`:
$ python data/openwebtext/prepare.py --input=FOLDER

Requires about 25 GB of download, 40 GB in Hugging Face's cache (see HF_HOME), and 17 GB for train.bin.

Notable features:
- reads the Parquet files of https://huggingface.co/datasets/Skylion007/openwebtext; `datasets` no longer runs loading
  scripts
- the validation documents are those of nanoGPT's script (0.05%, seed 2357); training documents keep their order, since
  training draws windows at random anyway and sequential reads are fast
- every document ends with <|endoftext|>
- train.bin grows shard by shard; progress.json records how much of it is complete, so kill -9 loses one shard at most
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from core.cli import signals

signals.exit_at_once()  # for the time of the slow imports

import hashlib
import json
import math
import time

import numpy as np
from tqdm import tqdm

from core.cli.arguments import check_folder
from core.cli.errors import UserError, notice, output
from core.cli.files import sync, write_json
from core.cli.machine import available_cores
from core.text.dataset import token_dtype
from core.text.tokenizer import GPT2Tokenizer
from core.text.write_dataset import encode_stream, summary, write_dataset

# ----------------------------------------------------------------------------------------------------------------------
input = ''  # a Parquet file or a folder of them, with a column `text`; '': OpenWebText from the Hugging Face Hub
revision = 'main'  # of the data set on the Hub: a branch or a commit
val_fraction = 0.0005  # fraction of the documents in the validation split
split_seed = 2357  # selects these documents
shard_documents = 50000  # documents per shard; a stopped run resumes after the last complete shard
workers = 0  # threads, and processes of the download; 0: all cores
out_dir = ''  # where the data set is written; '': this folder
# ----------------------------------------------------------------------------------------------------------------------
exec(open(Path(__file__).resolve().parents[2] / 'configurator.py', encoding='utf-8').read())

HUB = 'Skylion007/openwebtext'
DOCUMENTS = 8_013_769  # in OpenWebText as nanoGPT used it
READ = 256  # documents per read


def parquet_files(path):
    """The Parquet files that `--input` names, as a list of str. UserError if there are none."""
    files = sorted(path.rglob('*.parquet')) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UserError(f'there is no Parquet file {path}; --input requires one, or a folder of them')
    return [str(file) for file in files]


def load():
    """The documents, memory-mapped by `datasets`. UserError if they are not available."""
    try:
        import datasets
    except ImportError:
        raise UserError('OpenWebText requires Hugging Face datasets: pip install datasets') from None
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        if input:
            found = datasets.load_dataset('parquet', data_files=parquet_files(Path(input)), split='train')
        else:
            processes = workers or available_cores()
            found = datasets.load_dataset(HUB, revision=revision, split='train', num_proc=processes)
    except UserError:
        raise
    except Exception as error:  # the network, the Hub, the cache or a broken file
        cause = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        where = input or f'{HUB} (revision {revision}) from the Hugging Face Hub'
        raise UserError(f"can't load {where}: {cause}; check the network, or use --input=FOLDER") from error
    if 'text' not in found.column_names:
        raise UserError(f"the documents have no column 'text', only {', '.join(found.column_names)}")
    return found


def identity():
    """All that determines the bytes of train.bin, as a dict; a stopped run is resumed only if it is unchanged."""
    ends = ''.join(found[i]['text'] or '' for i in (0, len(found) // 2, len(found) - 1))
    checksum = hashlib.sha256(ends.encode('utf-8', errors='surrogatepass')).hexdigest()
    return {'documents': len(found), 'sample': checksum, 'val_fraction': val_fraction, 'split_seed': split_seed}


def training_documents(first, last):
    """Yields the texts of the training documents with an index from `first` to `last` (exclusive)."""
    for start in range(first, last, READ):
        stop = min(start + READ, last)
        for i, text in zip(range(start, stop), found[start:stop]['text'], strict=True):
            if not for_validation[i]:
                yield text or ''


def finished():
    """What a stopped run completed in train.bin.part: (documents, bytes), or (0, 0) to start a new run."""
    try:
        progress = json.loads(journal.read_text(encoding='utf-8'))
        if progress['of'] == identity() and part.stat().st_size >= progress['bytes']:
            return progress['documents'], progress['bytes']
        notice('note: discarding train.bin.part: it has other documents or settings')
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError):
        notice('note: discarding train.bin.part: progress.json is broken')
    return 0, 0


folder = Path(out_dir) if out_dir else Path(__file__).resolve().parent
check_folder(str(folder))  # fail before the slow steps
if input:
    parquet_files(Path(input))
tokenizer = GPT2Tokenizer().load()
found = load()
if len(found) < 2:
    raise UserError(f'{input or HUB} has {len(found)} documents; two are required, for training and validation')
if not input and len(found) != DOCUMENTS:
    notice(f'note: this revision has {len(found):,} documents, but OpenWebText has {DOCUMENTS:,}: is it complete?')

# the split of `datasets`' train_test_split(test_size=0.0005, seed=2357, shuffle=True), as a mask over the documents
permutation = np.random.default_rng(split_seed).permutation(len(found))
validation = permutation[: min(math.ceil(val_fraction * len(found)), len(found) - 1)]
for_validation = np.zeros(len(found), dtype=bool)
for_validation[validation] = True

part, journal = folder / 'train.bin.part', folder / 'progress.json'
start = time.perf_counter()
try:
    folder.mkdir(parents=True, exist_ok=True)
    done, size = finished()
    if done:
        notice(f'resuming after {done:,} of {len(found):,} documents')
    already = size // token_dtype(tokenizer.n_vocab).itemsize  # tokens
    with (
        open(part, 'r+b' if done else 'wb') as file,
        tqdm(total=len(found), initial=done, unit='doc', disable=None) as bar,
    ):
        file.truncate(size)
        file.seek(size)
        while done < len(found):
            last = min(done + shard_documents, len(found))
            texts = ((text, True) for text in training_documents(done, last))
            for array in encode_stream(tokenizer, texts, workers):
                size += file.write(array.tobytes())
            sync(file)
            write_json(journal, {'of': identity(), 'documents': last, 'bytes': size})
            bar.update(last - done)
            done = last
except OSError as error:
    raise UserError(
        f"can't write to {folder}: {error.strerror or error}; fix this and run the command again"
    ) from error

texts = ((found[int(i)]['text'] or '', True) for i in validation)
splits = {'train': part, 'val': encode_stream(tokenizer, texts, workers)}
source = (
    f'{len(found):,} documents of {Path(input).resolve().name}' if input else f'OpenWebText ({len(found):,} documents)'
)
meta = write_dataset(folder, tokenizer, splits, source=source)
journal.unlink()
output(summary(folder, meta, time.perf_counter() - start, already))
