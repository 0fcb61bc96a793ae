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


def nanogpt_folder(folder, meta):
    """Write a small data set as nanoGPT has it. meta: the bytes of meta.pkl, or None for a folder without one."""
    np.array([0, 1, 2, 1] * 50, dtype='<u2').tofile(folder / 'train.bin')
    np.array([2, 1, 0, 1] * 20, dtype='<u2').tofile(folder / 'val.bin')
    if meta is not None:
        (folder / 'meta.pkl').write_bytes(meta)


def unspaced(characters, seed=1):
    """Random text like Chinese: words of one to three of 2,000 characters by Zipf's law, no spaces, no punctuation."""
    rng = np.random.default_rng(seed)
    words = [''.join(chr(0x4E00 + (n - 1) % 2000) for n in rng.zipf(1.3, size)) for size in rng.integers(1, 4, 5000)]
    return ''.join(words[(n - 1) % 5000] for n in rng.zipf(1.3, characters))[:characters]
