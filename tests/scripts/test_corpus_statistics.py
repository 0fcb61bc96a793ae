"""corpus_statistics.py: one row per data set, as JSON too, in windows across or inside documents, and bad input."""

import json
import os
import re

import numpy as np
import pytest
from support import forking

from analysis import bigrams
from core.text.tokenizer import BPETokenizer, ByteTokenizer
from core.text.write_dataset import write_dataset

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='this system has no fork')
SCRIPT, V, T = 'corpus_statistics.py', 256, 16


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A data_dir: `random` bytes, `tiled` blocks of 8 bytes, `documents` of 21 tokens, `rows` with masks."""
    folder, rng = tmp_path_factory.mktemp('data'), np.random.default_rng(0)
    random = rng.integers(0, V, 20_000)
    tiled = np.concatenate([np.tile(rng.permutation(V)[:8], 4 * T) for _ in range(20)])
    for name, ids in (('random', rng.integers(0, V, 20_000)), ('tiled', tiled)):
        splits = {'train': random, 'val': ids}
        write_dataset(folder / name, ByteTokenizer(), splits, source=f'{name} bytes')
    encoder = BPETokenizer([chr(byte) for byte in range(V)])
    blocks = [[*np.tile(rng.permutation(V)[:10], 2), encoder.end_of_text] for _ in range(100)]
    write_dataset(folder / 'documents', encoder, {'train': random, 'val': np.concatenate(blocks)}, source='documents')
    ids = np.tile(np.arange(10), (40, 2)).ravel()
    mask = np.tile(np.arange(20) < 11, 40)  # all but what the first copy predicts
    write_dataset(folder / 'rows', None, dict(train=ids, val=ids), source='rows', vocab_size=10, row_tokens=20,
                  masks=dict(train=mask, val=mask))  # fmt: skip
    return folder


def measure(data, names, *arguments, block_size=T):
    """The process of the script for some data sets, finished."""
    flags = [f'--datasets={names}', f'--data_dir={data}', f'--block_size={block_size}', *arguments]
    return forking.run(SCRIPT, flags)


def test_a_row_for_each_data_set_and_the_same_numbers_as_json(data, tmp_path):
    done = measure(data, 'random,tiled', f'--json={tmp_path / "out.json"}')
    assert done.returncode == 0, done.stderr
    heading, _, *rows = done.stdout.splitlines()
    assert heading == '| data set | tokenizer | windows | seen | reliable | bigram | net gain |' and len(rows) == 2
    random, tiled = json.loads((tmp_path / 'out.json').read_text())['datasets']
    for row, found in zip(rows, (random, tiled), strict=True):
        cells = [f'{found[name]:.3f} ± {found["stderr"][name]:.3f}' for name in bigrams.Columns._fields]
        assert row == f'| {found["name"]} | byte, 256 ids | {found["windows"]:,} | ' + ' | '.join(cells) + ' |'
    assert (tiled['corpus'], tiled['tokens']['val']) == ('tiled bytes', 20 * 4 * T * 8)
    # half of each window of 16 is a second copy; 1 of 32 windows crosses into the next block
    assert 0.48 < tiled['seen'] < 0.52 and tiled['reliable'] > 0.95 and tiled['bigram'] < 0.01
    assert random['reliable'] < 0.03 and abs(random['net_gain']) < 4 * random['stderr']['net_gain']


def test_at_most_so_many_windows(data, tmp_path):
    done = measure(data, 'random', '--text_windows=7', f'--json={tmp_path / "out.json"}')
    assert '| random | byte, 256 ids | 7 |' in done.stdout


def test_masked_targets_do_not_count(data):
    done = measure(data, 'rows', block_size=19)
    assert '| rows | none, 10 ids | 40 | 1.000 ± 0.000 | 1.000 ± 0.000 | 1.000 ± 0.000 | 0.000 ± 0.000 |' in done.stdout


@pytest.mark.parametrize(
    ('names', 'arguments', 'message'),
    [
        ('', [], 'say which data sets to measure'),
        ('random,nowhere', [], 'there is no data set .*nowhere'),
        ('rows', [], 'use --block_size=19'),
        ('random', ['--block_size=15000'], 'requires two windows of 15000 tokens, and .* has 1'),
        ('random', ['--json=/nowhere/out.json'], "can't be used"),
    ],
)
def test_bad_input_is_one_line(names, arguments, message, data):
    done = measure(data, names, *arguments)
    assert done.returncode == 2 and not done.stdout
    error = done.stderr.splitlines()[-1]
    assert error.startswith('error: ') and re.search(message, error), error
