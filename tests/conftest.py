"""Fixtures that several test files share."""

import os
import runpy
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from support import ROOT
from support.bad_input import make_place
from support.training import write_characters

from core.text.tokenizer import CharTokenizer
from core.text.write_dataset import write_dataset

if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'  # read when Triton is first imported, by whatever test


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that no process is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker('slow')}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def restored_hooks():
    """A script that a test runs in this process leaves no signal handler and no excepthook."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    hook = sys.excepthook
    yield
    sys.excepthook = hook
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope='session')
def shared_data():
    """The folder of real data next to the repository. Tests that use it are skipped if it is missing."""
    folder = ROOT.parent / 'shared' / 'data'
    if not folder.is_dir():
        pytest.skip(f'no {folder}')
    return folder


@pytest.fixture
def gpt2_cache(shared_data, monkeypatch):
    """Gives tiktoken GPT-2's vocabulary, in this process and in the scripts that the test starts."""
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(shared_data / 'tiktoken_cache'))


@pytest.fixture
def char_data(tmp_path):
    """The folder of a small data set of characters (data_dir tmp_path/data, dataset tiny): 3600 and 400 tokens."""
    folder = tmp_path / 'data' / 'tiny'
    write_characters(folder, 3600, 4000)
    return folder


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
    """A data_dir with `tiny`, a small data set: each character is one to three steps after the last."""
    folder = tmp_path_factory.mktemp('data')
    state, ids = 12345, [0]
    for _ in range(4000):
        state = (state * 1103515245 + 12345) % 2**31
        ids.append((ids[-1] + 1 + (state >> 16) % 3) % 12)
    ids = np.array(ids)
    splits = {'train': ids[:3500], 'val': ids[3500:]}
    write_dataset(folder / 'tiny', CharTokenizer('abcdefghijkl'), splits, source='a test')
    return folder


@pytest.fixture
def prepare(monkeypatch, capsys):
    """Runs a script in this process: prepare(script, key=value, ...) -> (stdout, stderr). UserErrors pass through."""

    def run(script, **keys):
        monkeypatch.setattr(sys, 'argv', [script, *(f'--{key}={value}' for key, value in keys.items())])
        monkeypatch.setattr(sys, 'path', list(sys.path))
        capsys.readouterr()
        runpy.run_path(str(ROOT / script), run_name='__main__')
        return capsys.readouterr()

    return run


@pytest.fixture(scope='module')
def pattern_place(tmp_path_factory):
    """The folder that bad_input.make_place makes; don't change it."""
    folder = tmp_path_factory.mktemp('place')
    make_place(folder)
    return folder


@pytest.fixture
def place(pattern_place, tmp_path):
    """A copy of pattern_place for one test."""
    return shutil.copytree(pattern_place, tmp_path / 'place')
