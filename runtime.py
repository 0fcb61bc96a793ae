"""
What the machine offers and how a script talks to its user: device, number format, threads, process group, peak rates.

Notable features:
- everything that can be chosen by itself ('auto') is chosen here, and said in one line
- works the same in one process and under torchrun; rank 0 alone speaks
- a user's mistake ends in one line on stderr and exit code 2, never in a traceback
"""

import os
import sys


class UserError(Exception):
    """Something the user can mend. The text is one line: what is wrong, and what to do about it."""


def report_user_errors(kind, error, traceback):
    """An excepthook: a UserError becomes one line on stderr and exit code 2; anything else keeps its traceback."""
    if not issubclass(kind, UserError):
        sys.__excepthook__(kind, error, traceback)
        return
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr, flush=True)
    sys.exit(2)


def is_rank_zero():
    """True in a single process and in the process that speaks for all under torchrun."""
    return os.environ.get('RANK', '0') == '0'


def notice(text):
    """Print `text` on stderr, once for all processes. Results go to stdout; this is for everything else."""
    if is_rank_zero():
        print(text, file=sys.stderr, flush=True)
