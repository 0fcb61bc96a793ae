"""core/runs/log.py: what resuming keeps of log.csv, to the byte, and what is read of it."""

import warnings

import numpy as np
import pytest

from core.cli.errors import UserError
from core.runs import log as runlog
from core.runs.log import COLUMNS, RunLog


def written(path, iterations):
    """A log whose loss in iteration n is n + 0.5, with an evaluation at every second: the bytes of its lines."""
    log = RunLog(str(path), 0)
    for n in iterations:
        row = dict(iter=n, tokens=64 * n, lr=0.001, loss=n + 0.5, tokens_per_s=100)
        log.write(row | (dict(val_loss=n) if n % 2 == 0 else {}))
    log.finish()
    return path.read_bytes().splitlines(keepends=True)


def test_a_resumed_log_keeps_each_byte_before_its_checkpoint_and_nothing_after(tmp_path):
    path = tmp_path / 'log.csv'
    lines = written(path, range(0, 50, 5))
    path.write_bytes(b''.join(lines) + b'2')  # a kill cut a row short that begins as an earlier one would
    log = RunLog(str(path), 20)
    assert path.read_bytes() == b''.join(lines[:5]), 'the heading, and iterations 0, 5, 10 and 15'
    log.write(dict(iter=20, loss=1.5))
    log.finish()
    assert path.read_bytes() == b''.join(lines[:5]) + b'20,,,1.500000,,,,,,,\r\n'


def test_a_log_with_other_columns_goes_on_with_ours(tmp_path):
    path = tmp_path / 'log.csv'
    path.write_bytes(b'loss,iter,other\n2.5,0,x\n2.0,1,x\n')
    RunLog(str(path), 1).finish()
    assert path.read_bytes() == ','.join(COLUMNS).encode() + b'\r\n0,,,2.5,,,,,,,\r\n'


def test_cells_without_a_measurement_are_nan(tmp_path):
    path = tmp_path / 'log.csv'
    written(path, range(4))
    path.write_bytes(path.read_bytes() + b'4,256')
    found = runlog.read(str(path), ['iter', 'loss', 'val_loss', 'mfu', 'of another version'])
    assert found['iter'].tolist() == [0, 1, 2, 3] and found['loss'].tolist() == [0.5, 1.5, 2.5, 3.5]
    np.testing.assert_equal(found['val_loss'], [0, np.nan, 2, np.nan])
    assert np.isnan(found['mfu']).all() and np.isnan(found['of another version']).all()


def test_a_log_without_rows_has_no_values(tmp_path):
    written(tmp_path / 'log.csv', [])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = runlog.read(str(tmp_path / 'log.csv'), ['iter', 'loss'])
    assert {name: len(values) for name, values in found.items()} == {'iter': 0, 'loss': 0}


@pytest.mark.parametrize('content', [b'name,color\na,b\n', b'', b'iter,loss\n\xff,2\n', b'iter,loss\nx,2\n'])
def test_what_is_no_log_is_named_and_left_alone(tmp_path, content):
    path = tmp_path / 'log.csv'
    path.write_bytes(content)
    for use in (lambda: RunLog(str(path), 5), lambda: runlog.read(str(path), ['iter', 'loss'])):
        with pytest.raises(UserError, match="log.csv can't be read as a run's log .*; move it away"):
            use()
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]
