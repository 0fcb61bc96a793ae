"""
Prepare a text data set of the Hugging Face Hub, or Parquet and JSON Lines files of your own, of any size: in data/NAME.

Ten billion tokens of FineWeb-Edu (https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu), and training on them:
$ python data/hub/prepare.py --hub=HuggingFaceFW/fineweb-edu --subset=sample-10BT --tokens=10e9 --name=fineweb
$ python train.py config/train_gpt2.py --dataset=fineweb

Local files with a column `content`:
$ python data/hub/prepare.py --input=FOLDER --suffixes=.parquet --column=content --name=mine

The same command resumes a stopped run, and ends with the same bytes as a run that was never stopped: progress.json says
how far it is, after each finished file and at least every minute. Documents are streamed in bounded memory, and only
their tokens are kept, in their order. One is in the split that its text and split_seed decide (drawn_from: its number).
gpt2 and bpe insert <|endoftext|> after each; bpe is learned from the first 32 million characters for training.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from core.cli.keys import begin

begin(__file__)  # before the slow imports

import contextlib
import gc
import hashlib
import itertools
import json
import math
import time

import numpy as np
from tqdm import tqdm

from core.cli.errors import UserError, notice, output
from core.cli.files import write_json
from core.cli.locks import FolderLock
from core.convert.hf_tokenizer import kind_to_prepare
from core.text import text_files
from core.text.meta import SPLITS, token_dtype
from core.text.tokenizer import load_tokenizer
from core.text.write_dataset import CHUNK, GrowingSplit, batches, chunks, in_order, summary, write_dataset

# ----------------------------------------------------------------------------------------------------------------------
hub = ''  # a data set of the Hugging Face Hub, OWNER/NAME
subset = ''  # one of its subsets, as its page calls them (`datasets`: configurations); '': its default
split = 'train'  # which of its splits to read; data/NAME gets a training and a validation split of that
revision = 'main'  # of the data set on the Hub: a branch or a commit
input = ''  # instead of hub: Parquet or JSON Lines files or a folder of them, or several, separated by commas
suffixes = '.parquet,.jsonl,.jsonl.gz'  # which files of a folder to read
column = 'text'  # the column, or the JSON key, with the text of a document
name = ''  # the data set is written to data/NAME; train with --dataset=NAME; '': the hub's NAME
out_dir = ''  # write to this folder instead of data/NAME
tokenizer = 'gpt2'  # gpt2, bpe, byte or a folder with a tokenizer.json
vocab_size = 0  # bpe: number of ids; 0: 4096
tokens = 1_000_000_000_000  # stop after so many training tokens; these would be 2 TB
shard_tokens = 2_000_000_000  # more training tokens than this are written to several files of this size; 0: one file
val_fraction = 0.0005  # the chance of a document to be in the validation split
split_seed = 1337  # decides which documents those are
drawn_from = 0  # draw them by number from so many, or from all of local files, as nanoGPT does; 0: by their text
workers = 0  # threads; 0: all cores
# ----------------------------------------------------------------------------------------------------------------------
exec(open(Path(__file__).resolve().parents[2] / 'configurator.py', encoding='utf-8').read())

READ = 256  # documents per read
SAVE_SECONDS = 60  # progress is recorded at least so often, and whenever a file of shard_tokens is finished
MOST_FILES = 500  # more than anyone wants in a folder
origin = input or hub


# ---- where the documents are -----------------------------------------------------------------------------------------


def format_of(files):
    """The loader of `datasets` for some local files: 'parquet' or 'json'. UserError if they need several or others."""
    formats = {'parquet' if path.suffix == '.parquet' else 'json' if '.json' in path.name else None for path in files}
    if len(formats) > 1 or None in formats:
        raise UserError(f'{input} must be Parquet (.parquet) or JSON Lines (.jsonl), not both; choose by --suffixes')
    return formats.pop()


def failure(error):
    """The UserError for what `datasets` raised: the network, the Hub, a broken or an unknown file."""
    cause = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    hint = 'check --hub, --subset, --split and the network, and run the command again to go on'
    if input:
        hint = 'check the file, and run the command again; it begins anew where a file has changed'
    return UserError(f"can't read {origin}: {cause}; {hint}")


def commit_of(revision):
    """The commit of the data set on the Hub that a branch stands for now, a str. UserError if there is none."""
    try:
        import huggingface_hub

        return huggingface_hub.HfApi().dataset_info(hub, revision=revision).sha
    except Exception as error:
        raise failure(error) from error


def opened(files, commit):
    """The documents, a datasets.IterableDataset with one column. UserError if they are not available."""
    try:
        import datasets
    except ImportError:
        raise UserError('reading Parquet and the Hub requires Hugging Face datasets: pip install datasets') from None
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if pattern := [path for path in files if set(str(path)) & set('*?[')]:
        raise UserError(f"{pattern[0]} would be read as a pattern, for its '*', '?' or '['; rename it")
    try:
        if input:
            of, more = format_of(files), {'data_files': [str(path) for path in files], 'split': 'train'}
            stream = datasets.load_dataset(of, streaming=True, **more)
        else:
            stream = datasets.load_dataset(hub, subset or None, split=split, revision=commit, streaming=True)
        columns = stream.column_names
        if not columns:  # JSON does not say before the first document
            with reading(stream, 1) as rows:
                columns = [*next(rows, {})]
    except UserError:
        raise
    except Exception as error:
        raise failure(error) from error
    if not columns:
        raise UserError(f'there are no documents in {origin}; choose others')
    if column not in columns:
        known = ', '.join(columns)
        raise UserError(f"the documents of {origin} have no column '{column}', only {known}; choose one with --column")
    return stream.select_columns([column])


@contextlib.contextmanager
def reading(stream, count):
    """The stream as an iterator over `count` documents at a time, within this context."""
    try:
        with contextlib.closing(stream.iter(count)) as rows:
            yield rows
    finally:
        # What `datasets` still refers to in cycles keeps threads of PyArrow reading. Were these alive when Python ends,
        # they would abort it, or keep it from ending: apache/arrow#45214, huggingface/datasets#7566.
        gc.collect()


def documents_of(stream, rows=0):
    """
    Yields (documents, place): some documents as (text, number) pairs, and the place in the stream behind them.

    rows: how many documents precede those of the stream. place is None where there is none to go on from, otherwise
    (position of the stream, documents read). UserError if a document can't be read or isn't text.
    """
    with reading(stream, READ) as groups:
        while True:
            try:
                found = next(groups, None)
            except Exception as error:
                raise failure(error) from error
            if found is None:
                return
            documents = [(text, number) for number, text in enumerate(found[column], rows) if text]
            rows += len(found[column])
            if not all(isinstance(text, str) for text, _ in documents):
                hint = 'choose another --column'
                raise UserError(f"the column '{column}' of {origin} has other values than text; {hint}")
            parts, place = list(batches(documents, CHUNK)), (stream.state_dict(), rows)
            for number, part in enumerate(parts, 1):
                yield part, place if number == len(parts) else None


# ---- what becomes of them --------------------------------------------------------------------------------------------


def drawn_numbers():
    """
    True for each number of a document that is for validation, an array; None if their texts decide. These are the
    documents of nanoGPT's script: of `datasets`' train_test_split with shuffle=True and this seed.
    """
    if not drawn_from:
        return None
    count = drawn_from
    if input:
        if format_of(files) != 'parquet':
            raise UserError('--drawn_from requires Parquet files, which say how many documents they have')
        try:
            import pyarrow.parquet

            count = sum(pyarrow.parquet.read_metadata(path).num_rows for path in files)
        except Exception as error:
            raise failure(error) from error
    drawn = np.zeros(count, dtype=bool)
    drawn[np.random.default_rng(split_seed).permutation(count)[: math.ceil(val_fraction * count)]] = True
    return drawn


def split_of(text, number):
    """The split of a document, 'train' or 'val': a function of its text or of its number, and of the keys."""
    if drawn is not None:
        return 'val' if number < len(drawn) and drawn[number] else 'train'
    digest = hashlib.sha256(f'{split_seed} split {text}'.encode('utf-8', errors='surrogatepass')).digest()
    return 'val' if int.from_bytes(digest[:8], 'big') < val_fraction * 2**64 else 'train'


def encoded(task):
    """The documents of a task as a list of (split, array of ids)."""
    end = [] if encoder.end_of_text is None else [encoder.end_of_text]
    found = []
    for text, number in task[0]:
        blocks = (text[i : i + CHUNK] for i in range(0, len(text), CHUNK))
        ids = np.concatenate([*map(encoder.encode_array, chunks(blocks)), end]).astype(dtype)
        found.append((split_of(text, number), ids))
    return found


def learning_text(stream):
    """Yields the first training documents, text_files.LEARN_FROM characters of them."""
    room = text_files.LEARN_FROM
    with contextlib.closing(documents_of(stream)) as groups:
        for text, number in itertools.chain.from_iterable(documents for documents, _ in groups):
            if split_of(text, number) == 'train':
                yield text[:room]
                room -= len(text)
            if room <= 0:
                return


def identity():
    """All that determines the bytes that are written, as a dict; a stopped run is resumed only if it is unchanged."""
    import datasets  # the form of a position in the stream depends on its version

    chosen = ['hub', 'subset', 'split', 'revision', 'column', 'tokenizer', 'vocab_size', 'tokens', 'shard_tokens']
    chosen += ['val_fraction', 'split_seed', *(['drawn_from'] if drawn_from else [])]
    local = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return {key: config[key] for key in chosen} | {'files': local, 'datasets': datasets.__version__}


def earlier():
    """The progress.json of a stopped run with this identity, a dict; {} if there is none."""
    try:
        progress = json.loads(journal.read_text(encoding='utf-8'))
        if isinstance(progress, dict) and 'of' not in progress:
            raise UserError(f"{journal} is no stopped run's and would be overwritten; choose another folder")
        if progress['of'] == identity():
            parts = {'commit': str, 'encoder': dict, 'documents': int, 'tokens': dict}
            counts = [progress['tokens'][each] for each in SPLITS]
            if any(type(progress[key]) is not form for key, form in parts.items()) or min(counts) < 0:
                raise ValueError('an entry of another type')
            return progress
        notice(f'note: discarding what a stopped run left in {folder}: it has other documents or settings')
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        notice(f'note: discarding what a stopped run left in {folder}: progress.json is broken')
    return {}


def save(place):
    """Record that all documents up to a place in the stream are on disk; None: all that there are."""
    for each in growing.values():
        each.sync()
    counts = {each: growing[each].count for each in SPLITS}
    state, rows = place or (None, 0)
    position = {'documents': documents, 'tokens': counts, 'state': state, 'rows': rows}
    write_json(journal, {'of': identity(), 'commit': commit, 'encoder': encoder.meta(), **position})


# ----------------------------------------------------------------------------------------------------------------------

kind = kind_to_prepare(tokenizer, vocab_size)
if kind.learned_from == 'characters':
    raise UserError(f'--tokenizer={tokenizer} would have to read all text to learn its characters; choose byte or bpe')
if bool(hub) == bool(input):
    raise UserError('say what to prepare: either --hub=OWNER/NAME, of the Hugging Face Hub, or --input=FILES')
if input and {'subset', 'split', 'revision'} & given:
    raise UserError('--subset, --split and --revision choose from a data set of the Hub; choose local files by --input')
if 0 < shard_tokens < text_files.LEAST:
    raise UserError(f'shard_tokens is {shard_tokens}; it must be at least {text_files.LEAST}, or 0 for one file')
folder = text_files.output_folder(Path(__file__).resolve().parents[1], name or hub.split('/')[-1] or 'hub', out_dir)
files = []
if input:
    files, copies = text_files.input_files(input, suffixes)
    text_files.check_not_overwritten(files, folder)
drawn = drawn_numbers()

lock, journal = FolderLock(folder), folder / 'progress.json'
if folder.is_dir():
    lock.acquire()  # before looking: what is in it must not change any more
progress = earlier()
commit = progress['commit'] if progress else '' if input else commit_of(revision)
stream = opened(files, commit)
documents = progress['documents'] if progress else 0
try:
    if progress:
        encoder = load_tokenizer(progress['encoder'])
    else:
        training = ((text, True) for text in learning_text(stream))
        encoder = text_files.learn(kind, '', training, 0, vocab_size)
    dtype = token_dtype(encoder.n_vocab)
    lock.acquire()
    growing = {'train': GrowingSplit(folder, 'train', dtype, shard_tokens), 'val': GrowingSplit(folder, 'val', dtype)}
    for each in SPLITS:
        growing[each].cut(progress['tokens'][each] if progress else 0)
except ValueError as error:
    raise UserError(f'{journal} does not belong to the files beside it ({error}): delete it to start again') from error
except OSError as error:
    raise UserError(f"can't write to {folder}: {error.strerror or error}") from error
if progress:
    notice(f'resuming after {documents:,} documents, {growing["train"].count:,} training tokens')
    if progress['state'] is not None:
        stream.load_state_dict(progress['state'])

train = growing['train']
already = sum(each.count for each in growing.values())
is_complete = progress and progress['state'] is None  # only the files had to be put in place
rows = progress.get('rows', 0)
work = in_order(encoded, () if is_complete else documents_of(stream, rows), workers)
start, saved, recorded = time.perf_counter(), time.monotonic(), train.last
try:
    with contextlib.closing(work), tqdm(initial=already, unit='tokens', unit_scale=True, disable=None) as bar:
        for (_, place), found in work:
            for each, ids in found:
                if train.count < tokens:
                    growing[each].append(ids[: tokens - train.count] if each == 'train' else ids)
                    documents += 1
            bar.update(sum(len(ids) for _, ids in found))
            if train.count == tokens:
                break
            if train.last >= MOST_FILES:
                raise UserError(f'more than {MOST_FILES} files of {shard_tokens:,} tokens: choose more --shard_tokens')
            if place and (train.last > recorded or time.monotonic() - saved > SAVE_SECONDS):
                save(place)
                saved, recorded = time.monotonic(), train.last
    save(None)
    for each in growing.values():
        each.close()
except OSError as error:
    hint = 'fix this and run the command again'
    raise UserError(f"can't write to {folder}: {error.strerror or error}; {hint}") from error

if not growing['val'].count:
    hint = 'choose a larger --val_fraction, another --split_seed or more documents'
    raise UserError(f'none of {documents:,} documents is in the validation split: {hint}')
if drawn is not None and not input and documents != len(drawn) and train.count < tokens:
    notice(f'note: {hub} has {documents:,} documents, not {len(drawn):,}: is it complete?')
where = f'{hub}{f" ({subset})" if subset else ""}' if hub else text_files.named(input)
details = {'hub': hub, 'subset': subset, 'split': split, 'revision': commit} if hub else {}
details |= {'column': column, 'documents': documents, 'val_fraction': val_fraction, 'split_seed': split_seed}
details |= {'drawn_from': len(drawn)} if drawn is not None else {}
splits = {each: growing[each].files for each in SPLITS}
source = f'{documents:,} documents of {where}'
meta = write_dataset(folder, encoder, splits, source=source, details=details, least=text_files.LEAST)
journal.unlink()
lock.release()
output(summary(folder, meta, time.perf_counter() - start, already))
