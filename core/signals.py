"""
Signals that ask a run to stop. This imports nothing slow, so that a script can listen before its other imports.
"""

import os
import signal
import sys

STOPPED = 85  # exit code of a run that a signal stopped: it has saved, and can be resumed


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
