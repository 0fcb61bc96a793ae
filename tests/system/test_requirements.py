"""pyproject.toml's ranges, requirements.txt's pins and the Makefile's oldest versions fit together."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from support.training import ROOT

PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
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


@pytest.mark.slow
def test_pip_installs_no_module(tmp_path):
    """Of the repository a wheel holds nothing that could be imported: no `core`, no `model` in site-packages."""
    pytest.importorskip('setuptools', minversion='77')
    for name in ('pyproject.toml', 'README.md', 'LICENSE', 'model.py', 'train.py'):
        shutil.copy(ROOT / name, tmp_path)
    for name in ('core', 'ops', 'analysis', 'studies'):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns('__pycache__'))
    program = 'import setuptools.build_meta as build; print(build.build_wheel("."))'
    done = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / done.stdout.splitlines()[-1]) as wheel:
        assert {name.split('/')[0] for name in wheel.namelist()} == {f'nanogpt_mla-{PROJECT["version"]}.dist-info'}


@pytest.mark.slow
def test_the_models_work_elsewhere_with_the_folder_on_the_path(tmp_path):
    program = (
        'from model import GPT, GPTConfig; from model_mla import MLAGPT, MLAConfig; '
        'print(MLAGPT(MLAConfig(8, 10, 1, 2, 32)).get_num_params())'
    )
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, '-c', program], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0 and int(done.stdout) > 0, done.stderr
