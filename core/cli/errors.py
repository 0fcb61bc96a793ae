"""What a script says to its user: errors of one line, notices and results, and how it ends. It doesn't need torch."""

import atexit
import errno
import os
import re
import select
import sys
from types import TracebackType
from typing import TextIO

from core.cli import signals


class UserError(Exception):
    """A mistake that the user can correct. The text is one line: what is wrong, and what to do about it."""


# C0 and C1 control characters without \t and \n, marks that reverse the direction of writing, and lone surrogates,
# which stand for the bytes of a path that are not UTF-8 and can't be printed
UNPRINTABLE = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]')
LONGEST = 300  # characters of a word in an error message; longer ones, such as paths, lose their middle


def printable(text: str) -> str:
    """`text` with escapes such as \\x1b for characters that a terminal would execute or can't show."""
    return UNPRINTABLE.sub(lambda found: found[0].encode('unicode_escape').decode('ascii'), text)


def is_rank_zero() -> bool:
    """True in a single process, and in rank 0 under torchrun."""
    return os.environ.get('RANK', '0') == '0'


def notice(text: str) -> None:
    """Print `text` on stderr, on rank 0 only. Results go to stdout; this is for everything else."""
    if is_rank_zero():
        print(printable(text), file=sys.stderr, flush=True)


def output(text: str) -> None:
    """Print a result that contains names, paths or other text from outside on stdout."""
    print(printable(text), flush=True)


def install() -> None:
    """What every script does first: errors in one line, signals and closed pipes without a traceback."""
    sys.excepthook = report_user_errors
    signals.exit_in_order()
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='backslashreplace')  # a terminal that isn't UTF-8 is no reason to fail
    atexit.unregister(flush_output)
    atexit.register(flush_output)


def report_user_errors(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """An excepthook: prints the line of `in_one_line` and exits with code 2; other errors get their traceback."""
    if isinstance(error, KeyboardInterrupt):
        sys.exit(signals.INTERRUPTED)
    if isinstance(error, BrokenPipeError) and discard_unread_output():
        sys.exit(signals.CLOSED_PIPE)
    line = in_one_line(error)
    if line is None:
        sys.__excepthook__(kind, error, traceback)
        return
    words = (word if len(word) <= LONGEST else f'{word[:140]}...{word[-140:]}' for word in line.split())
    print(f'error: {printable(" ".join(words))}', file=sys.stderr, flush=True)
    sys.exit(2)


def in_one_line(error: BaseException) -> str | None:
    """What to tell the user about a UserError, a lack of memory or an error of a file; None for other exceptions."""
    if isinstance(error, UserError):
        return str(error)
    of_torch = getattr(sys.modules.get('torch'), 'OutOfMemoryError', MemoryError)  # without torch, none was allocated
    if isinstance(error, (MemoryError, of_torch)) or "can't allocate memory" in str(error):
        first = (str(error) or type(error).__name__).splitlines()[0]
        return f'out of memory ({first}); reduce the batch size, the sequence length or the model'
    if isinstance(error, OSError) and (error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT)):
        where = f'{os.fsdecode(error.filename)}: ' if isinstance(error.filename, (str, bytes)) else ''
        return f'{where}{error.strerror or error}; check the path, its permissions and the space on the disk'
    return None


def discard_unread_output() -> bool:
    """Discard later output where the reader of stdout or stderr has closed the pipe, as `head` does; True if so."""
    closed = [stream for stream in (sys.stdout, sys.stderr) if stream is not None and has_no_reader(stream)]
    for stream in closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return bool(closed)


def has_no_reader(stream: TextIO) -> bool:
    """True if a stream is a pipe whose other end is closed. Python's own buffers forget what they failed to write."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # Windows has no poll, a test's stdout no number
        return False


def flush_output() -> None:
    """At exit: print what is left. Exits with code 2 if it can't be written, quietly if the reader closed the pipe."""
    try:
        discard_unread_output()
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()
    except OSError as error:
        print(f"error: stdout can't be written ({error.strerror})", file=sys.stderr, flush=True)
        os._exit(2)
