"""
Signals that ask a script to stop. This imports nothing slow, so that a script can listen before its other imports.

A script that trains records the signal (StopRequest), saves, and exits with STOPPED. Any other begins by keys.py's
`begin`, with `exit_at_once()`; configurator.py, which it executes after its imports, continues with `exit_in_order()`.
"""

import os
import signal
import sys
import threading
from types import FrameType

STOPPED = 85  # exit code of a run that a signal stopped: it has saved, and can be resumed
INTERRUPTED = 130  # of any other script; like CLOSED_PIPE 128 plus the signal's number, as shells report it
CLOSED_PIPE = 141


class StopRequest:
    """
    Whether a training must stop, for its loop to finish the step and save: by SIGTERM, SIGINT or SIGUSR1, or because
    its parent has changed: a torchrun that died of kill -9, or of SIGUSR1, can't stop its trainers. A second SIGINT
    exits immediately.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.parent = os.getppid()
        for name in ('SIGTERM', 'SIGINT', 'SIGUSR1'):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._record)

    @property
    def signal(self) -> str | None:
        """What asks the run to stop, by name: 'SIGTERM', or 'the end of torchrun'; None as long as it may go on."""
        if self.received is None and 'TORCHELASTIC_RUN_ID' in os.environ and os.getppid() != self.parent:
            return 'the end of torchrun'
        return self.received

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            os._exit(INTERRUPTED)
        self.received = signal.Signals(number).name
        if 'torch' not in sys.modules:  # still importing, which can take long: say that the signal has arrived
            print(f'{self.received} received; stopping after the first step', file=sys.stderr, flush=True)


def exit_at_once() -> None:
    """
    From now on SIGINT and SIGTERM end this process immediately, with exit code 130 or 143: for the time of the imports,
    when nothing has been written yet, and an exception could come up anywhere in a library.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)


def exit_in_order() -> None:
    """
    From now on SIGINT and SIGTERM raise SystemExit with 130 or 143, so that temporary files are removed; a second one
    ends the process immediately. Handlers of the script's own, such as StopRequest's, stay.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) in (_leave, signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, _raise_exit)


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def _raise_exit(number: int, frame: FrameType | None) -> None:
    exit_at_once()
    raise SystemExit(128 + number)
