"""pyproject.toml's ranges, requirements.txt's pins and the Makefile's oldest versions fit together."""

import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from support.training import ROOT

WHOLE = tomllib.loads((ROOT / 'pyproject.toml').read_text())
PROJECT = WHOLE['project']
RANGES = {
    'requirements.txt': PROJECT['dependencies'],
    'requirements-test.txt': PROJECT['optional-dependencies']['test'],
}


def by_name(lines):
    """{name: its Requirement} of the lines of a requirements file."""
    return {found.name: found for found in (Requirement(line) for line in lines if line and line[0] not in '#-')}


def version(requirement):
    """The version of a Requirement such as torch>=2.7 or torch==2.13.0; there must be exactly one."""
    (only,) = requirement.specifier
    return Version(only.version)


@pytest.mark.parametrize('file', RANGES)
def test_the_ranges_contain_the_pins(file):
    pins, ranges = by_name((ROOT / file).read_text().splitlines()), by_name(RANGES[file])
    assert pins.keys() == ranges.keys()
    for name, pin in pins.items():
        assert ranges[name].specifier.contains(version(pin)), f'{pin} is outside {ranges[name]}'


def test_versions_that_must_stay_inside():
    assert by_name(PROJECT['dependencies'])['torch'].specifier.contains('2.11')
    assert PROJECT['requires-python'] == '>=3.11'


def test_the_oldest_versions_are_those_of_the_ranges():
    """What `make test-oldest` installs, read from what make would run."""
    done = subprocess.run(['make', '-n', 'test-oldest', 'OLDEST=.no-such'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    program = re.search(r"-c '(import tomllib.*?)'", done.stdout, re.DOTALL)[1]
    printed = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True)
    oldest = by_name(printed.stdout.splitlines())
    ranges = by_name(PROJECT['dependencies'] + PROJECT['optional-dependencies']['test'])
    assert {name: version(one) for name, one in oldest.items()} == {n: version(one) for n, one in ranges.items()}
    assert all(one.specifier.contains(version(one)) and '==' in str(one) for one in oldest.values())


def test_what_is_installed_is_enough_for_the_models(tmp_path):
    installed = WHOLE['tool']['setuptools']
    for module in installed['py-modules']:
        shutil.copy(ROOT / f'{module}.py', tmp_path)
    for package in installed['packages']:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns('__pycache__'))
    program = ('from model import GPT, GPTConfig; from model_mla import MLAGPT, MLAConfig; import core.runs.checkpoint, '
               'core.convert.factorize; print(MLAGPT(MLAConfig(8, 10, 1, 2, 32)).get_num_params())')  # fmt: skip
    done = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, capture_output=True, text=True,
                          env=dict(os.environ, PYTHONPATH=str(tmp_path)))  # fmt: skip
    assert done.returncode == 0 and int(done.stdout) > 0, done.stderr
