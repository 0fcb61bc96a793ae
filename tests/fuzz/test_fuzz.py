"""
2,000 random command lines and 500 damaged files against all scripts: each succeeds, or ends within a minute in one line
and exit code 2 (bench.py's comparison: 1), and then has changed nothing. A case is a function of its number.

A twentieth of them runs by default, all with FUZZ=1 (pytest -n 2 tests/fuzz/test_fuzz.py: 150 s on two cores). To
repeat one: FUZZ_CASE='line 1234' or FUZZ_CASE='damage 56', which prints what the script said.
"""

import os
import shutil

import fuzzing
import pytest

ALL = bool(os.environ.get('FUZZ'))
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, 'fork'), reason='forking.py needs os.fork')]
ONE = os.environ.get('FUZZ_CASE')
CHUNK = 25
CASES = [('line', n) for n in range(2000 if ALL else 100)] + [('damage', n) for n in range(500 if ALL else 25)]
CHUNKS = [CASES[i : i + CHUNK] for i in range(0, len(CASES), CHUNK)]
if ONE:
    CHUNKS = [[(ONE.split()[0], int(ONE.split()[1]))]]


@pytest.fixture(scope='module')
def repository(tmp_path_factory):
    """A copy of the repository, where the scripts run."""
    return fuzzing.copy_of_repository(tmp_path_factory.mktemp('repository'))


@pytest.fixture(scope='module')
def pattern(tmp_path_factory, repository):
    """The folder with a file of every kind, and its contents; don't change it."""
    folder = tmp_path_factory.mktemp('fuzz') / 'place'
    folder.mkdir()
    fuzzing.furnish(folder, repository)
    return folder, fuzzing.contents(folder)


@pytest.fixture
def place(pattern, tmp_path):
    return shutil.copytree(pattern[0], tmp_path / 'place')


@pytest.mark.parametrize('chunk', CHUNKS, ids=lambda chunk: f'{chunk[0][0]}-{chunk[0][1]}')
def test_success_or_one_line(chunk, place, pattern, repository):
    failures = []
    own = fuzzing.contents(repository)
    for kind, number in chunk:
        before = pattern[1]
        if kind == 'damage':
            script, arguments = fuzzing.damage(number, place)
            before = fuzzing.contents(place)
        else:
            script, arguments = fuzzing.command_line(number)
        done = fuzzing.run(repository, place, script, arguments)
        after = fuzzing.contents(place)
        found = fuzzing.faults(done, before, after)
        if found or ONE:
            said = (done.stdout[-300:] if ONE else '') + done.stderr[-1500:]
            failures.append(f'FUZZ_CASE="{kind} {number}": {"; ".join(found)}\n{script} {arguments}\n{said}')
        if after != pattern[1]:
            shutil.rmtree(place)
            shutil.copytree(pattern[0], place)
    assert not failures, f'{len(failures)} of {len(chunk)}\n\n' + '\n\n'.join(failures)
    assert fuzzing.contents(repository) == own
