"""
Runs scripts in forks of a process that has imported PyTorch already: a hundred starts of Python would take minutes.

`run(script, arguments)` starts that process, which is this file as a program with the names of modules to import, when
it is first needed.
"""

import atexit
import contextlib
import functools
import gc
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

MODULES = (
    'torch._dynamo',
    'matplotlib.pyplot',
    'tqdm',
    'core.runs.checkpoint',
    'core.text.write_dataset',
    'analysis.induction',
)


def run(script, arguments, seconds=120, memory=0, root=ROOT, modules=MODULES, cwd=None, processes=1):
    """
    The subprocess.CompletedProcess of `python script arguments`, run in the folder `root`; killed after `seconds`.

    memory: bytes that it may allocate; 0: any number. modules: imported before the fork. cwd: another folder to run in.
    processes: how many run it together, as torchrun would start them; the first that fails ends them all.
    """
    request = [str(script), [str(argument) for argument in arguments], seconds, memory, str(cwd or root), processes]
    process = server(root, modules)
    process.stdin.write(json.dumps(request) + '\n')
    process.stdin.flush()
    return subprocess.CompletedProcess(request[:2], *json.loads(process.stdout.readline()))


@functools.cache
def server(root, modules):
    """The process that forks, once it is ready. One thread: PyTorch's others would not survive a fork."""
    environment = {name: value for name, value in os.environ.items() if name not in ('RANK', 'COLUMNS')}
    environment.update(OMP_NUM_THREADS='1', MPLBACKEND='Agg')
    # no network, at once and everywhere, and nothing that was downloaded before
    nowhere, dead_end = str(Path(tempfile.gettempdir(), 'no-such-cache')), 'http://127.0.0.1:9'
    environment.update(HF_HUB_OFFLINE='1', HF_HUB_CACHE=nowhere, TIKTOKEN_CACHE_DIR=os.devnull)
    environment.update(https_proxy=dead_end, HTTPS_PROXY=dead_end)
    process = subprocess.Popen(
        [sys.executable, __file__, *modules],
        cwd=root,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    atexit.register(process.wait)
    atexit.register(process.stdin.close)
    assert process.stdout.readline() == 'ready\n'
    return process


def run_script(script, arguments):
    """Run a script as Python would; returns the exit code."""
    sys.argv = [script, *arguments]
    sys.path[:2] = [os.path.dirname(os.path.abspath(script))]
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


def limit_memory(most):
    """From now on this process can allocate `most` bytes more (Linux)."""
    if most and os.path.exists('/proc/self/statm'):
        used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + most, used + most))


def fork(script, arguments, out, err, memory, cwd, variables):
    """The process id of a fork that runs a script and ends."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        os.environ.update(variables)
        limit_memory(memory)
        os.chdir(cwd)
        code = run_script(script, arguments)
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        atexit._run_exitfuncs()  # as Python does when a script ends
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def ranks(processes):
    """The variables that torchrun sets in each of several processes; for one process, none."""
    if processes == 1:
        return [{}]
    with socket.create_server(('127.0.0.1', 0)) as found:
        port = found.getsockname()[1]
    same = dict(WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    same |= dict(GLOO_SOCKET_IFNAME='lo')
    return [{k: str(v) for k, v in dict(same, RANK=n, LOCAL_RANK=n).items()} for n in range(processes)]


def run_forked(script, arguments, seconds, memory, cwd, processes):
    """[exit code, stdout, stderr] of a script in forks of this process, run in the folder cwd."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        running = {fork(script, arguments, out, err, memory, cwd, variables) for variables in ranks(processes)}
        deadline = time.monotonic() + seconds
        code = 0
        while running:
            for child in sorted(running):
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    running.remove(child)
                    code = code or os.waitstatus_to_exitcode(status)
            if code or time.monotonic() > deadline:
                for child in running:
                    os.killpg(child, signal.SIGKILL)  # with all that it has started itself
            time.sleep(0.002)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode('utf-8', errors='replace'))
    return [code, *texts]


if __name__ == '__main__':
    sys.path[:1] = [os.getcwd(), os.path.join(os.getcwd(), 'tests')]
    for name in sys.argv[1:]:
        with contextlib.suppress(ImportError):  # an optional one
            __import__(name)
    gc.freeze()  # what is shared with the forks stays shared
    print('ready', flush=True)
    for line in sys.stdin:
        print(json.dumps(run_forked(*json.loads(line))), flush=True)
