"""
A Python that starts at once: its programs run in forks of a process that has imported PyTorch and the project already.

`run` runs a script so: a thousand starts of a real Python would take an hour. `interpreter()` is the path of a program
that takes Python's arguments (a file, -m NAME or -c CODE), for what is to be started and watched. It is sys.executable
in every fork, so that what a script starts itself starts at once too.
"""

import atexit
import concurrent.futures.thread
import contextlib
import functools
import gc
import json
import os
import resource
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / 'tests'))
from support.launcher import answer, ask  # noqa: E402

LIBRARIES = ('torch._dynamo', 'torch.distributed.run', 'matplotlib.pyplot', 'tqdm', 'tokenizers', 'tiktoken')
FILES = sorted(
    path.relative_to(ROOT) for name in ('ops', 'core', 'analysis') for path in (ROOT / name).rglob('[!_]*.py')
)
MODULES = (*LIBRARIES, *('.'.join(path.with_suffix('').parts) for path in FILES))


def run(script, arguments, seconds=120, memory=0, root=ROOT, modules=MODULES, cwd=None, processes=1):
    """
    The subprocess.CompletedProcess of `python script arguments`, run in the folder `root`; killed after `seconds`.

    script: a file, -m or -c. memory: bytes that it may allocate; 0: any number. modules: imported before the fork.
    cwd: another folder to run in. processes: how many run it together, as torchrun would start them; the first that
    fails ends them all.
    """
    command = [str(script), *map(str, arguments)]
    place = f'{server(root, modules)}/socket'
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(os.devnull) as nothing:
        streams = [file.fileno() for file in (nothing, out, err)]
        variables = environment() | {'MOST_MEMORY': str(memory)}
        running = [ask(place, command, str(cwd or root), variables | rank, streams) for rank in ranks(processes)]
        deadline, code = time.monotonic() + seconds, 0
        while running:
            ended = select.select(running, [], [], None if code else max(0, deadline - time.monotonic()))[0]
            running = [connection for connection in running if connection not in ended]
            codes = filter(None, map(answer, ended)) if ended else [-signal.SIGKILL]
            if not code and (code := next(iter(codes), 0)):
                for connection in running:
                    connection.send(bytes([signal.SIGKILL]))
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode('utf-8', errors='replace'))
    return subprocess.CompletedProcess(command, code, *texts)


def environment():
    """The variables of what `run` runs: one thread, no network, and nothing that was downloaded before."""
    variables = {name: value for name, value in os.environ.items() if name not in ('RANK', 'COLUMNS')}
    nowhere, dead_end = str(Path(tempfile.gettempdir(), 'no-such-cache')), 'http://127.0.0.1:9'
    variables.update(OMP_NUM_THREADS='1', MPLBACKEND='Agg', GLOO_SOCKET_IFNAME='lo')
    variables.update(HF_HUB_OFFLINE='1', HF_HUB_CACHE=nowhere, TIKTOKEN_CACHE_DIR=os.devnull)
    return variables | dict(https_proxy=dead_end, HTTPS_PROXY=dead_end)


def ranks(processes):
    """The variables that torchrun sets in each of several processes; for one process, none."""
    if processes == 1:
        return [{}]
    with socket.create_server(('127.0.0.1', 0)) as found:
        port = found.getsockname()[1]
    same = dict(WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    return [{k: str(v) for k, v in dict(same, RANK=n, LOCAL_RANK=n).items()} for n in range(processes)]


def interpreter():
    """The path of the program."""
    return f'{server(ROOT, MODULES)}/python'


@functools.cache
def server(root, modules):
    """The folder with the program and the socket of the process that forks, once that is ready."""
    own = Path(sys.executable).parent
    if root == ROOT and (own / 'socket').exists():  # in a fork itself, as in a rehearsal of tests/gpu
        return own
    folder = Path(tempfile.mkdtemp(prefix='forks-'))
    program, launcher = folder / 'python', Path(__file__).with_name('launcher.py')
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{launcher}" "{folder}/socket" "$@"\n')
    program.chmod(0o755)
    command = [sys.executable, __file__, str(folder), *modules]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=root, env=environment(), **pipes)
    atexit.register(shutil.rmtree, folder)
    atexit.register(process.wait)
    atexit.register(process.stdin.close)
    assert process.stdout.readline() == 'ready\n'
    return folder


# ---- the process that forks ------------------------------------------------------------------------------------------


def main(folder, *modules):
    """Import the modules, then fork for each launcher, until stdin is closed."""
    sys.path[:1] = [os.getcwd(), os.path.join(os.getcwd(), 'tests')]
    for name in modules:
        with contextlib.suppress(ImportError):  # an optional one
            __import__(name)
    sys.executable = os.path.join(folder, 'python')
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.path.join(folder, 'socket'))
    listener.listen(100)
    gc.freeze()  # what is shared with the forks stays shared
    print('ready', flush=True)
    forks = {}  # {process id: the launcher's socket}
    while True:
        ready = select.select([sys.stdin, listener, *forks.values()], [], [], 0.002 if forks else None)[0]
        if sys.stdin in ready:
            return
        for child, connection in [*forks.items()]:
            if connection in ready:
                signaled(child, connection)
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                with contextlib.suppress(OSError):
                    connection.send(struct.pack('i', os.waitstatus_to_exitcode(status)))
                forks.pop(child).close()
        if listener in ready:
            connection = listener.accept()[0]
            forks[begun(connection)] = connection


def begun(connection):
    """The process id of a fork for a launcher."""
    head, streams, *_ = socket.recv_fds(connection, 4, 3)
    with connection.makefile('rb') as file:
        request = json.loads(file.read(*struct.unpack('i', head)))
    child = os.fork()
    if not child:
        become(*request, streams)
    with contextlib.suppress(OSError):  # it has ended
        os.setpgid(child, child)  # here too: what comes first counts
    for stream in streams:
        os.close(stream)
    return child


def signaled(child, connection):
    """Pass on what a launcher got; a fork whose launcher was killed is killed with all that it has started itself."""
    try:
        number = connection.recv(1)[0]
    except (IndexError, ConnectionError):
        number = signal.SIGKILL
    (os.killpg if number == signal.SIGKILL else os.kill)(child, number)


def become(arguments, folder, variables, streams):
    """Run in this process what Python would run with these arguments, and end it."""
    code = 70
    try:
        os.setpgid(0, 0)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.closerange(3, 64)
        limit_memory(int(variables.pop('MOST_MEMORY', 0)))
        os.environ.clear()
        os.environ.update(variables)
        os.chdir(folder)
        code = run_program(arguments)
        concurrent.futures.thread._python_exit()  # wakes the threads of pools, as Python does first
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        atexit._run_exitfuncs()  # as Python does when a program ends
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def limit_memory(most):
    """From now on this process can allocate `most` bytes more (Linux)."""
    if most and os.path.exists('/proc/self/statm'):
        used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + most, used + most))


# for FORKS_BEGIN_WITH: what is timed is called once a round, not for half a second
TIMED_ONCE = """
from core.speed import timing
alternate = timing.alternate
timing.alternate = lambda *given, **keys: alternate(*given, **keys | {'turn': 0.0})
"""


def only_traced(script):
    """Python code for `run` that runs a script whose torch.compile traces its functions and compiles nothing."""
    traced = "torch.compile = lambda function, **keys: compiler(function, **(keys | {'backend': 'eager'}))"
    return f"import runpy, torch; compiler = torch.compile; {traced}; runpy.run_path({script!r}, run_name='__main__')"


def run_program(arguments):
    """Run a file, a module or code as Python would, after the code in FORKS_BEGIN_WITH; returns the exit code."""
    exec(os.environ.get('FORKS_BEGIN_WITH', ''), {})
    if arguments[0] == '-u':
        sys.stdout.reconfigure(write_through=True)
        del arguments[0]
    kind = arguments.pop(0) if arguments[0] in ('-m', '-c') else ''
    name, sys.argv = arguments[0], ['-c', *arguments[1:]] if kind == '-c' else arguments
    sys.path[:2] = [os.getcwd() if kind else os.path.dirname(os.path.abspath(name))]
    sys.path[1:1] = filter(None, os.environ.get('PYTHONPATH', '').split(os.pathsep))
    try:
        try:
            if kind == '-c':
                exec(compile(name, '<string>', 'exec'), {'__name__': '__main__'})
            elif kind == '-m':
                sys.modules.pop(name, None)
                runpy.run_module(name, run_name='__main__', alter_sys=True)
            else:
                runpy.run_path(name, run_name='__main__')
        except SystemExit:
            raise
        except BaseException:
            sys.excepthook(*sys.exc_info())
            return 1
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    return 0


if __name__ == '__main__':
    main(*sys.argv[1:])
