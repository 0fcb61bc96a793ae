"""Runs of scripts: in order, several at a time, a failure is one line and starts nothing more."""

import signal
import subprocess
import threading
import time

import pytest
from support import ROOT, forking

from core.cli import subprocesses
from core.cli.errors import UserError


def test_output_and_failure_of_a_script_are_in_its_log(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(
        'import os, sys\nprint(sys.argv[1:], os.environ["OMP_NUM_THREADS"])\nsys.exit("--fail=True" in sys.argv)'
    )
    subprocesses.run_script(str(script), ['config.py', dict(a=1, b='x')], str(tmp_path / 'run'))
    log = tmp_path / 'run' / 'log.txt'
    assert log.read_text() == "['config.py', '--a=1', '--b=x'] 1\n"
    with pytest.raises(UserError, match='failed with exit code 1.*log.txt'):
        subprocesses.run_script(str(script), [dict(fail=True)], str(tmp_path / 'run'))
    assert len(log.read_text().splitlines()) == 2  # the earlier output is kept


@pytest.mark.parametrize('jobs', [1, 3])
def test_results_come_in_the_order_of_the_runs_with_so_many_at_a_time(jobs):
    together, most, lock = 0, 0, threading.Lock()

    def work(run):
        nonlocal together, most
        with lock:
            together += 1
            most = max(most, together)
        time.sleep(0.05)
        with lock:
            together -= 1
        return run['name'].upper()

    runs = [dict(name=letter) for letter in 'abcdefg']
    assert subprocesses.run_all(work, runs, jobs) == list('ABCDEFG') and most == jobs


def test_a_failure_stops_what_has_not_started():
    started = []

    def work(run):
        started.append(run['name'])
        if run['name'] == '1':
            raise UserError('run 1 failed')
        time.sleep(0.05)

    runs = [dict(name=str(n)) for n in range(50)]
    with pytest.raises(UserError, match='run 1 failed'):
        subprocesses.run_all(work, runs, jobs=1)
    assert len(started) < 20


CHILD = """
import signal, sys, time
def save(*_):
    print('saved', flush=True)
    sys.exit(85)
signal.signal(signal.SIGTERM, save)
print('running', flush=True)
time.sleep(60)
"""
PARENT = """
import sys
from core.cli import errors, subprocesses as scripts
errors.install()
if sys.argv[1] == 'one':
    scripts.call([sys.executable, 'child.py'])
else:
    runs = [dict(name=f'run{n}') for n in range(3)]
    scripts.run_all(lambda run: scripts.run_script('child.py', [], run['name']), runs, jobs=2)
"""


@pytest.mark.parametrize('how', ['one', 'several'])
def test_a_signal_stops_the_subprocesses_in_order(how, tmp_path):
    """A training that a study has started saves, and the study waits for that; nothing keeps running."""
    (tmp_path / 'child.py').write_text(CHILD)

    command = [forking.interpreter(), '-c', f'import sys; sys.path.insert(0, {str(ROOT)!r}){PARENT}', how]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    logs = [tmp_path / f'run{n}' / 'log.txt' for n in range(2)]
    if how == 'one':
        assert process.stdout.readline() == 'running\n'
    else:
        while not all(log.exists() and log.read_text() == 'running\n' for log in logs):
            assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 143 and 'Traceback' not in err
    assert out == ('saved\n' if how == 'one' else '')
    assert how == 'one' or [log.read_text() for log in logs] == ['running\nsaved\n'] * 2
    assert not (tmp_path / 'run2').exists()
