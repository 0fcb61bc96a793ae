"""
Would induction help on a text? Measured on its tokens, before any model is trained.

$ python corpus_statistics.py --datasets=shakespeare_char
$ python corpus_statistics.py --datasets=reviews,code --block_size=512 --json=corpora.json

Prints a Markdown table with a row per data set, each number with its standard error over windows:
- seen: how often the present token was there earlier in its window of block_size tokens
- reliable: how often, where it was, the token that followed its latest occurrence comes next again
- bigram: how often that token comes next according to the pairs of the whole training split
- net gain: what induction adds for a model that knows these pairs: the mean of seen * (reliable - bigram)

Where the net gain is small, expect induction heads late or never. The windows are evenly spaced over the validation
split, as a model reads them, so one may hold the end of a document and the start of the next. Compare only data sets
that have the same tokenizer, vocabulary size and block_size.
"""

from core.cli.keys import begin

begin(__file__)  # before the slow imports

import os
import sys
import time

from tqdm import tqdm

from analysis import bigrams, report
from core.cli import arguments, errors
from core.cli.errors import UserError
from core.text.dataset import TokenData

# ----------------------------------------------------------------------------------------------------------------------
datasets = ''  # folders in data_dir, separated by commas
block_size = 512  # tokens in a window
text_windows = 2000  # windows of the validation split, at most
json = ''  # write the numbers to this file too
data_dir = 'data'
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py'), encoding='utf-8').read())
# ----------------------------------------------------------------------------------------------------------------------

AT_ONCE = 1 << 22  # training tokens that are counted at a time


def training_pairs(data):
    """Yields the training split of a TokenData as all windows (x, y) that don't overlap, arrays (rows, block_size)."""
    starts, rows = data.eval_windows('train', data.tokens['train']), max(1, AT_ONCE // block_size)
    for first in tqdm(range(0, len(starts), rows), desc=data.folder.name, leave=False, disable=None):
        yield tuple(tensor.numpy() for tensor in data.windows('train', starts[first : first + rows]))


def opened(name):
    """The TokenData of a data set and the starts of its windows. UserError if there are fewer than two windows."""
    data = TokenData(os.path.join(data_dir, name), block_size)
    starts = data.eval_windows('val', text_windows)
    if len(starts) < 2:
        raise UserError(
            f'the standard error requires two windows of {block_size} tokens, and the validation split of '
            f'{data.folder} has {len(starts)}: use a smaller --block_size or more text'
        )
    return data, starts


def measure(name):
    """The predictor of one data set, and what identifies it: a dict."""
    started = time.perf_counter()
    data, starts = opened(name)
    x, y = (tensor.numpy() for tensor in data.windows('val', starts))
    found, errors = bigrams.induction_columns(x, y, training_pairs(data), data.n_vocab)
    which = dict(name=name, corpus=data.corpus, tokenizer=data.meta['tokenizer'], vocab_size=data.n_vocab)
    numbers = dict(tokens=data.tokens, windows=len(starts), **found._asdict(), stderr=errors._asdict())
    return {**which, **numbers, 'seconds': time.perf_counter() - started}


chosen = arguments.names(datasets, 'datasets')
if not chosen:
    raise UserError('say which data sets to measure: --datasets=NAME, or several, separated by commas')
if json:
    arguments.check_file(json, 'json')
for name in chosen:
    opened(name)  # before the first measurement, so that a wrong name doesn't show after it
results = [measure(name) for name in chosen]
heading, rows = ['data set', 'tokenizer', 'windows', *(name.replace('_', ' ') for name in bigrams.Columns._fields)], []
for row in results:
    about = [row['name'], f'{row["tokenizer"]}, {row["vocab_size"]:,} ids', f'{row["windows"]:,}']
    rows.append(about + [f'{row[name]:.3f} ± {row["stderr"][name]:.3f}' for name in bigrams.Columns._fields])
errors.output(report.markdown_table(heading, rows).rstrip('\n'))
if json:
    report.save_json(json, report.plain(dict(command=sys.argv, config=config, datasets=results)))
