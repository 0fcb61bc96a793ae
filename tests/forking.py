"""
Runs scripts in forks of a process that has imported PyTorch already: a hundred starts of Python would take minutes.

A program, not a test: for each line [script, [arguments]] of JSON on stdin it writes [exit code, stdout, stderr].
"""

import json
import os
import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path


def run_script(script, arguments):
    """Run a script as `python script arguments` would; returns the exit code."""
    sys.argv = [script, *arguments]
    try:
        try:
            runpy.run_path(script, run_name='__main__')
        except SystemExit:
            raise
        except BaseException:
            sys.excepthook(*sys.exc_info())
            return 1
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    return 0


def run_forked(script, arguments, seconds=60):
    """[exit code, stdout, stderr] of a script in a fork of this process; code -9 where it takes longer."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            code = 70
            try:
                os.setsid()
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                code = run_script(script, arguments)
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)
        deadline = time.monotonic() + seconds
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.killpg(child, signal.SIGKILL)  # with all that it has started itself
            time.sleep(0.002)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode('utf-8', errors='replace'))
    return [os.waitstatus_to_exitcode(ended[1]), *texts]


if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    # OMP_NUM_THREADS=1 is expected: PyTorch's threads would not survive a fork
    for name in ('torch', 'torch._dynamo', 'tqdm', 'matplotlib.pyplot', 'checkpoint', 'tokens', 'induction'):
        __import__(name)
    print('ready', flush=True)
    for line in sys.stdin:
        print(json.dumps(run_forked(*json.loads(line))), flush=True)
