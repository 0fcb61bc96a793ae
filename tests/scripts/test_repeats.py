"""data/repeats: the rows repeat, unpredictable targets are masked, and its two configs differ in the attention."""

import numpy as np
import torch
from support import forking

from core.text.dataset import TokenData


def prepare(folder):
    done = forking.run('data/repeats/prepare.py', (f'--folder={folder}', '--rows=200', '--val_rows=50'))
    assert done.returncode == 0, done.stderr
    return folder


def test_rows_repeat_and_unpredictable_targets_are_masked(tmp_path):
    folder = prepare(tmp_path / 'repeats')
    data = TokenData(folder, 64)
    x, y = data.windows('train', np.arange(200) * 65)
    rows = torch.cat((x, torch.zeros(200, 1, dtype=torch.int64)), 1)
    rows[:, 64] = torch.where(y[:, -1] < 0, rows[:, 64], y[:, -1])
    periods = []
    for row, targets in zip(rows, y, strict=True):
        period = int((targets < 0).sum())  # the first target after the block is masked as well
        periods.append(period)
        assert torch.equal(row[period:], row[:-period])
        assert (targets[:period] == -1).all() and torch.equal(targets[period:], row[period + 1 :])
    assert min(periods) == 8 and max(periods) == 32 and len(set(periods)) == 25


def test_rows_are_a_function_of_the_seed(tmp_path):
    one, again = prepare(tmp_path / 'one'), prepare(tmp_path / 'again')
    assert (again / 'train.bin').read_bytes() == (one / 'train.bin').read_bytes()
    assert (one / 'val.bin').read_bytes() != (one / 'train.bin').read_bytes()[: 50 * 65 * 2]
