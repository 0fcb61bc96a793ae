"""What a run reports while it trains: a row of log.csv per logged iteration, and the same to wandb where that is on."""

import contextlib
import csv
import netrc
import os
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from core.cli import errors, files
from core.cli.errors import UserError

# how the columns are written; a cell is empty where nothing was measured
COLUMNS = dict(iter='d', tokens='d', lr='.6g', loss='.6f', train_loss='.6f', val_loss='.6f', val_stderr='.6f')
COLUMNS |= dict(grad_norm='.6f', ms_per_iter='.2f', tokens_per_s='.0f', mfu='.4f')
Result = TypeVar('Result')


def start_wandb(project: str, name: str, config: dict[str, Any], run_id: str | None = None) -> Any:
    """The wandb run `run_id`, resumed where it exists; offline where there is no API key. UserError without wandb."""
    try:
        import wandb
    except ImportError as error:
        raise UserError('wandb_log is on, but wandb is missing; pip install wandb, or --wandb_log=False') from error
    mode: Any = os.environ.get('WANDB_MODE')
    if not (mode or os.environ.get('WANDB_API_KEY') or key_in_netrc()):
        mode = 'offline'
        errors.notice('wandb: no API key found, so this run is logged offline; `wandb sync` uploads it later')
    hook = sys.excepthook
    try:
        run = wandb.init(project=project, name=name, config=config, mode=mode, id=run_id, resume='allow')
    except Exception as error:  # it raises errors of its own, of requests and of the operating system
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"wandb can't start ({reason}); set WANDB_MODE=offline, or --wandb_log=False") from error
    sys.excepthook = hook  # wandb's own prints a traceback before the one line of a UserError
    return run


def key_in_netrc() -> bool:
    """True if `wandb login` has stored a key for the server in use."""
    host = urllib.parse.urlsplit(os.environ.get('WANDB_BASE_URL') or 'https://api.wandb.ai').hostname
    try:
        return bool(netrc.netrc(os.environ.get('NETRC')).authenticators(host or ''))
    except (OSError, netrc.NetrcParseError):
        return False


class RunLog:
    """log.csv of one run, open for appending, and its wandb run (or None)."""

    def __init__(self, path: str, iter_num: int, wandb_run: Any = None):
        """
        path: log.csv. iter_num: the iteration of the next row; rows from there on, left by a run that was killed after
        its last checkpoint, are cut. UserError where the file can't be read and written as a log.
        """
        self.path, self.wandb_run = path, wandb_run
        self.error: OSError | None = None
        try:
            with files.replacing(path) as file:
                writer = csv.DictWriter(file, COLUMNS, extrasaction='ignore')
                writer.writeheader()
                earlier = rows(path, lambda row: (int(row['iter']), row)) if iter_num and os.path.exists(path) else ()
                writer.writerows(row for number, row in earlier if number < iter_num)
            self.file = open(path, 'a', encoding='utf-8', newline='', buffering=1)
        except OSError as error:
            raise UserError(f"{path} can't be written ({error}); move it away, or choose another --out_dir") from error

    def write(self, row: dict[str, Any]) -> None:
        """Append a row, {column: number}. Where the disk is full, `error` holds the reason afterwards."""
        row = {name: value for name, value in row.items() if value is not None}
        try:
            cells = {name: format(value, COLUMNS[name]) for name, value in row.items()}
            csv.DictWriter(self.file, COLUMNS, restval='').writerow(cells)
        except OSError as error:
            self.error = error
        if self.wandb_run is not None:
            self.wandb_run.log(row)

    def finish(self) -> None:
        """Close the file and the wandb run. UserError where a row could not be written."""
        with contextlib.suppress(OSError):
            self.file.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()
        if self.error is not None:
            raise UserError(f"{self.path} can't be written ({self.error}); free some disk space and resume the run")


def rows(path: str, convert: Callable[[dict[str, str]], Result]) -> Iterator[Result]:
    """
    What `convert` makes of each row of a log.csv, {column: cell}; a kill may have cut the last one short. UserError
    where the file can't be read, or where a ValueError says that it is no log.
    """
    try:
        with open(path, encoding='utf-8', newline='') as file:
            reader = csv.DictReader(line for line in file if line.endswith('\n'))
            if 'iter' not in (reader.fieldnames or ()):
                raise ValueError("it has no column 'iter'")
            yield from map(convert, reader)
    except (OSError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path} can't be read as a run's log ({error}); move it away") from error


def read(path: str, columns: list[str]) -> dict[str, np.ndarray]:
    """Some columns of a log.csv by name, each a float64 array over its rows, NaN where nothing was measured."""
    cells = [*rows(path, lambda row: [float(row.get(name) or 'nan') for name in columns])]
    return dict(zip(columns, np.array(cells).reshape(-1, len(columns)).T, strict=True))
