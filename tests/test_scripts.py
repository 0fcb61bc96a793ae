"""Runs of scripts: in order, several at a time, a failure is one line and starts nothing more."""

import threading

import pytest

from core import scripts
from core.runtime import UserError


def test_output_and_failure_of_a_script_are_in_its_log(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(
        'import os, sys\nprint(sys.argv[1:], os.environ["OMP_NUM_THREADS"])\nsys.exit("--fail=True" in sys.argv)'
    )
    scripts.run_script(str(script), ['config.py', dict(a=1, b='x')], str(tmp_path / 'run'))
    log = tmp_path / 'run' / 'log.txt'
    assert log.read_text() == "['config.py', '--a=1', '--b=x'] 1\n"
    with pytest.raises(UserError, match='failed with exit code 1.*log.txt'):
        scripts.run_script(str(script), [dict(fail=True)], str(tmp_path / 'run'))
    assert len(log.read_text().splitlines()) == 2  # the earlier output is kept


@pytest.mark.parametrize('jobs', [1, 3])
def test_runs_start_after_those_they_require(jobs):
    first = dict(name='first')
    runs = [first, *(dict(name=f'{n}', after=first if n % 2 else None) for n in range(6))]
    runs.append(dict(name='last', after=runs[-1]))
    done, lock = [], threading.Lock()

    def work(run):
        with lock:
            assert run.get('after') is None or run['after']['name'] in done
            done.append(run['name'])
        return run['name'].upper()

    assert scripts.run_all(work, runs, jobs) == ['FIRST', '0', '1', '2', '3', '4', '5', 'LAST']


def test_a_failure_stops_what_has_not_started():
    started = []

    def work(run):
        started.append(run['name'])
        if run['name'] == '1':
            raise UserError('run 1 failed')

    runs = [dict(name=str(n)) for n in range(50)]
    runs[2]['after'] = runs[1]
    with pytest.raises(UserError, match='run 1 failed'):
        scripts.run_all(work, runs, jobs=1)
    assert '2' not in started
