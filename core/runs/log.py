"""
What a run reports while it trains: one row of log.csv per logged iteration, and the same to wandb where that is on.
"""

import contextlib
import csv
import io
import netrc
import os
import sys
import urllib.parse

from core.cli import errors, files
from core.cli.errors import UserError

# how the columns are written; a cell is empty where nothing was measured
COLUMNS = {
    'iter': 'd',
    'tokens': 'd',
    'lr': '.6g',
    'loss': '.6f',
    'train_loss': '.6f',
    'val_loss': '.6f',
    'val_stderr': '.6f',
    'grad_norm': '.6f',
    'ms_per_iter': '.2f',
    'tokens_per_s': '.0f',
    'mfu': '.4f',
}


def start_wandb(project, name, config, run_id=None):
    """
    The wandb run with the id `run_id`, resumed where it exists; offline where there is no API key.

    UserError without wandb.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            'wandb_log is on and wandb is not installed; pip install wandb, or --wandb_log=False'
        ) from error
    mode = os.environ.get('WANDB_MODE')
    if not (mode or os.environ.get('WANDB_API_KEY') or key_in_netrc()):
        mode = 'offline'
        errors.notice('wandb: no API key found, so this run is logged offline; `wandb sync` uploads it later')
    hook = sys.excepthook
    run = wandb.init(project=project, name=name, config=config, mode=mode, id=run_id, resume='allow')
    sys.excepthook = hook  # wandb's own prints a traceback before the one line of a UserError
    return run


def key_in_netrc():
    """True if `wandb login` has stored a key for the server in use."""
    host = urllib.parse.urlsplit(os.environ.get('WANDB_BASE_URL') or 'https://api.wandb.ai').hostname
    try:
        return bool(netrc.netrc(os.environ.get('NETRC')).authenticators(host))
    except (OSError, netrc.NetrcParseError):
        return False


class RunLog:
    """log.csv of one run, open for appending, and its wandb run (or None)."""

    def __init__(self, path, iter_num, wandb_run=None):
        """
        path: log.csv. iter_num: the iteration of the next row; rows from there on, left by a run that was killed after
        its last checkpoint, are cut. UserError where the file can't be read and written as a log.
        """
        self.path, self.wandb_run, self.error = path, wandb_run, None
        kept = []
        try:
            if iter_num and os.path.exists(path):
                kept = [row for row in read(path) if int(row['iter']) < iter_num]
            with files.replacing(path) as file:
                writer = csv.DictWriter(file, COLUMNS, extrasaction='ignore')
                writer.writeheader()
                writer.writerows(kept)
            self.file = open(path, 'a', encoding='utf-8', newline='', buffering=1)
        except OSError as error:
            raise UserError(f"{path} can't be written ({error}); move it away, or choose another --out_dir") from error

    def write(self, row):
        """Append a row, {column: number}. Where the disk is full, `error` holds the reason afterwards."""
        row = {name: value for name, value in row.items() if value is not None}
        try:
            cells = {name: format(value, COLUMNS[name]) for name, value in row.items()}
            csv.DictWriter(self.file, COLUMNS, restval='').writerow(cells)
        except OSError as error:
            self.error = error
        if self.wandb_run is not None:
            self.wandb_run.log(row)

    def finish(self):
        """Close the file and the wandb run. UserError where a row could not be written."""
        with contextlib.suppress(OSError):
            self.file.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()
        if self.error is not None:
            raise UserError(f"{self.path} can't be written ({self.error}); free some disk space and resume the run")


def read(path):
    """
    The rows of a log.csv, a list of {column: str}; a last row that a kill cut short is left out.

    UserError where the file is no log: it can't be read, has no column 'iter', or a cell is not a number.
    """
    try:
        with open(path, encoding='utf-8', newline='') as file:
            text = file.read()
        rows = csv.DictReader(io.StringIO(text[: text.rfind('\n') + 1], newline=''))
        whole = [row for row in rows if row['iter'].isdigit() and None not in row]
        for row in whole:
            for cell in row.values():
                float(cell or 0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        reason = "it has no column 'iter'" if isinstance(error, KeyError) else error
        raise UserError(f"{path} can't be read as a run's log ({reason}); move it away") from error
    return whole


def column(rows, name):
    """Iterations and values, two lists, of the rows in which `name` was measured."""
    pairs = [(int(row['iter']), float(row[name])) for row in rows if row.get(name)]
    return [iteration for iteration, _ in pairs], [value for _, value in pairs]
