"""
Prepare random blocks of tokens, repeated: two-layer models form induction heads on them within a minute.

$ python data/repeats/prepare.py

Each row repeats a block of random tokens whose length, the period, is random too. The tokens of the first period are
unpredictable, so these targets are masked. Every later token can be predicted only from what followed the current token
earlier in the row. Both are required: with one fixed period a model learns to attend a fixed distance back, and without
masks the noise of the first period dominates the loss; in either case no induction head forms. The rows are a function
of the seed; nothing is downloaded.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from core.cli.keys import begin

begin(__file__)  # before the slow imports

import time

import numpy as np

from core.cli.arguments import check_folder
from core.cli.errors import UserError, output
from core.text.write_dataset import summary, write_dataset

# ----------------------------------------------------------------------------------------------------------------------
folder = ''  # where train.bin, val.bin and meta.json are written; '': data/repeats
rows = 65536  # of training; 2000 iterations of 32 rows read about as many
val_rows = 2048  # of validation, with other blocks
block_size = 64  # tokens in a sequence; a row has one more, the last target
vocab_size = 128  # different tokens
min_period = 8  # length of the shortest block; the longest is half a sequence
seed = 1337
exec(open(Path(__file__).resolve().parents[2] / 'configurator.py', encoding='utf-8').read())
# ----------------------------------------------------------------------------------------------------------------------


def repeated_rows(count, rng):
    """`count` rows and their masks, both (count, block_size + 1); a mask is 1 where a token is unpredictable."""
    period = rng.integers(min_period, block_size // 2 + 1, (count, 1))
    position = np.arange(block_size + 1)
    block = rng.integers(0, vocab_size, (count, block_size // 2))
    # the first token of the second period is masked too: nothing shows yet that the block has ended
    return np.take_along_axis(block, position % period, axis=1), (position <= period).astype(np.uint8)


if not (2 <= min_period <= block_size // 2 and vocab_size >= 2):
    raise UserError('min_period must be 2 to half of block_size, and vocab_size at least 2')
folder = folder or str(Path(__file__).resolve().parent)
check_folder(folder, 'folder')
started = time.perf_counter()
train, val = (repeated_rows(n, np.random.default_rng([seed, stream])) for stream, n in enumerate((rows, val_rows)))
splits, masks = ({'train': a.ravel(), 'val': b.ravel()} for a, b in zip(train, val, strict=True))
source = f'random blocks of period {min_period} to {block_size // 2}, repeated (data/repeats, seed {seed})'
sizes = dict(vocab_size=vocab_size, row_tokens=block_size + 1)
meta = write_dataset(folder, None, splits, source=source, masks=masks, **sizes)
output(summary(folder, meta, time.perf_counter() - started))
