"""
Signals that ask a script to stop. This imports nothing slow, so that a script can listen before its other imports.

A script that trains records the signal (StopRequest), saves, and exits with STOPPED. Any other begins with
`exit_at_once()`; configurator.py, which it executes after its imports, continues with `exit_in_order()`.
"""

import os
import signal
import sys
import threading

STOPPED = 85  # exit code of a run that a signal stopped: it has saved, and can be resumed
INTERRUPTED = 130  # of any other script; like CLOSED_PIPE 128 plus the signal's number, as shells report it
CLOSED_PIPE = 141


class StopRequest:
    """Records SIGTERM, SIGINT or SIGUSR1, so that the loop can finish its step. A second SIGINT exits immediately."""

    def __init__(self):
        self.signal = None
        for name in ('SIGTERM', 'SIGINT', 'SIGUSR1'):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._record)

    def _record(self, number, frame):
        if self.signal is not None and number == signal.SIGINT:
            os._exit(130)
        self.signal = signal.Signals(number).name
        if 'torch' not in sys.modules:  # still importing, which can take long: say that the signal has arrived
            print(f'{self.signal} received; stopping after the first step', file=sys.stderr, flush=True)


def exit_at_once():
    """
    From now on SIGINT and SIGTERM end this process immediately, with exit code 130 or 143 and without a traceback.

    For the time of the imports: nothing has been written yet, and an exception could come up anywhere in a library.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)


def exit_in_order():
    """
    From now on SIGINT and SIGTERM raise SystemExit with 130 or 143, so that temporary files are removed.

    A second signal ends the process immediately. Handlers of the script's own, such as StopRequest's, stay.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) in (_leave, signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, _raise_exit)


def _leave(number, frame):
    os._exit(128 + number)


def _raise_exit(number, frame):
    exit_at_once()
    raise SystemExit(128 + number)
