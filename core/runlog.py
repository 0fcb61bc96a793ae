"""
What a run reports while it trains: one row of log.csv per logged iteration, and the same to wandb where that is on.
"""

import csv
import os

from core import files, runtime
from core.runtime import UserError

# a cell is empty where nothing was measured
COLUMNS = ('iter', 'tokens', 'lr', 'loss', 'train_loss', 'val_loss', 'val_stderr', 'grad_norm', 'ms_per_iter',
           'tokens_per_s', 'mfu')  # fmt: skip


def start_wandb(project, name, config, run_id=None):
    """
    The wandb run with the id `run_id`, resumed where it exists; offline where there is no API key.

    Called before anything slow, so that a missing package or a wrong key shows at once. UserError without wandb.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            'wandb_log is on and wandb is not installed; pip install wandb, or --wandb_log=False'
        ) from error
    mode = os.environ.get('WANDB_MODE')
    if not (mode or os.environ.get('WANDB_API_KEY') or wandb.api.api_key):
        mode = 'offline'
        runtime.notice('wandb: no API key found, so this run is logged offline; `wandb sync` uploads it later')
    return wandb.init(project=project, name=name, config=config, mode=mode, id=run_id, resume='allow')


class RunLog:
    """log.csv of one run, open for appending, and its wandb run (or None)."""

    def __init__(self, path, iter_num, wandb_run=None):
        """
        path: log.csv. iter_num: the iteration the next row is about; rows from there on, left by a run that was killed
        after its last checkpoint, are cut. UserError where the file can't be read and written as a log.
        """
        self.wandb_run = wandb_run
        kept = []
        try:
            if iter_num and os.path.exists(path):
                kept = [row for row in read(path) if row['iter'].isdigit() and int(row['iter']) < iter_num]
            with files.replacing(path) as file:
                writer = csv.DictWriter(file, COLUMNS, extrasaction='ignore')
                writer.writeheader()
                writer.writerows(kept)
            self.file = open(path, 'a', encoding='utf-8', newline='', buffering=1)
        except (OSError, ValueError, KeyError, csv.Error) as error:
            raise UserError(f"{path} can't be read and written as a run's log ({error}); move it away") from error

    def write(self, row):
        """Append a row, a dict with some of COLUMNS."""
        csv.DictWriter(self.file, COLUMNS, restval='').writerow(row)
        if self.wandb_run is not None:
            self.wandb_run.log({name: float(value) for name, value in row.items() if value != ''})

    def finish(self):
        """Close the file and the wandb run."""
        self.file.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()


def read(path):
    """The rows of a log.csv, a list of {column: str}. Raises OSError, ValueError or csv.Error."""
    with open(path, encoding='utf-8', newline='') as file:
        return list(csv.DictReader(file))


def column(rows, name):
    """Iterations and values, two lists, of the rows in which `name` was measured."""
    pairs = [(int(row['iter']), float(row[name])) for row in rows if row[name]]
    return [iteration for iteration, _ in pairs], [value for _, value in pairs]
