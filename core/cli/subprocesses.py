"""Run the project's scripts as subprocesses, several at a time: for scripts that run others."""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tqdm import tqdm

from core.cli import errors, machine
from core.cli.errors import UserError

Argument = str | dict[str, object]
Result = TypeVar('Result')

running: set[subprocess.Popen] = set()  # the subprocesses that `call` waits for


def call(command: list[str], **how: Any) -> int:
    """The exit code of a command, run by Popen(**how); it gets SIGTERM when this script does, and is waited for."""
    process = subprocess.Popen(command, **how)
    running.add(process)
    try:
        return process.wait()
    except SystemExit:
        process.terminate()
        process.wait()
        raise
    finally:
        running.discard(process)


def run_script(script: str, arguments: list[Argument], folder: str) -> None:
    """
    Run `python script --key=value ...` with one CPU thread; its output is appended to log.txt in `folder`, which is
    created. arguments: config files, and dicts of keys. UserError if the script fails.
    """
    os.makedirs(folder, exist_ok=True)
    command = [sys.executable, script]
    for argument in arguments:
        if isinstance(argument, dict):
            command += [f'--{key}={value}' for key, value in argument.items()]
        else:
            command.append(argument)
    path = os.path.join(folder, 'log.txt')
    with open(path, 'a', encoding='utf-8') as log:
        environment = dict(os.environ, OMP_NUM_THREADS='1')
        code = call(command, stdout=log, stderr=log, env=environment)
    if code:
        raise UserError(f'{script} failed with exit code {code} in {folder}; see the end of {path} for the reason')


def converges(script: str, arguments: list[Argument], folder: str) -> bool:
    """Run a training by `run_script`: False if it diverged. UserError if it fails otherwise."""
    try:
        run_script(script, arguments, folder)
    except UserError:
        with open(os.path.join(folder, 'log.txt'), encoding='utf-8') as log:
            if 'not finite in iteration' not in log.read():
                raise
        return False
    return True


def run_all(work: Callable[[dict], Result], runs: list[dict], jobs: int = 0) -> list[Result]:
    """
    [work(run) for run in runs], with up to `jobs` calls at a time in threads (0: the cores this process may use).

    runs: dicts with a 'name'. Shows progress on stderr. If a call raises, no more are started and the exception is
    raised. A signal stops the subprocesses that are running.
    """

    def work_and_say(run: dict) -> Result:
        result = work(run)
        errors.notice(f'{run["name"]} is done')
        bar.update()
        return result

    bar, jobs = tqdm(total=len(runs), unit='run', disable=None), jobs or machine.available_cores()
    with ThreadPoolExecutor(jobs) as pool, bar:
        try:
            futures = [pool.submit(work_and_say, run) for run in runs]
            return [future.result() for future in futures]
        except SystemExit:  # from the handler of the signal; the threads are not interrupted
            for process in list(running):
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def is_current(path: str | os.PathLike, source: str | os.PathLike) -> bool:
    """True if the file `path` exists and is at least as new as `source`, which it was made from."""
    return os.path.exists(path) and os.path.getmtime(path) >= os.path.getmtime(source)
