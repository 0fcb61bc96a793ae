"""What the tests of the prepare scripts share: running one, and reading the files that it wrote."""

import os
import subprocess
import sys

import numpy as np

from support import ROOT


def start(script, *arguments, cwd=ROOT, **env):
    """Runs a script from the command line; returns the finished process."""
    return subprocess.run(
        [sys.executable, script, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        encoding='utf-8',
        timeout=120,
        env={**os.environ, 'OMP_NUM_THREADS': '1', **env},
    )


def ids_of(folder, split):
    """All ids of a split, read without core.text.dataset."""
    return np.fromfile(folder / f'{split}.bin', dtype='<u2')


def files_of(folder):
    """The contents of the files in a folder: {name: bytes}."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
