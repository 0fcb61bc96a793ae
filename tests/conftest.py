"""What several test files share."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='session')
def shared_data():
    """Real data beside the repository, where a machine has it; tests that use it are skipped elsewhere."""
    folder = ROOT.parent / 'shared' / 'data'
    if not folder.is_dir():
        pytest.skip(f'no {folder}')
    return folder


@pytest.fixture
def gpt2_cache(shared_data, monkeypatch):
    """Points tiktoken, here and in scripts that the test starts, at GPT-2's vocabulary."""
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(shared_data / 'tiktoken_cache'))


@pytest.fixture
def char_data(tmp_path):
    """The folder of a tiny data set by characters (data_dir tmp_path/data, dataset tiny): 3600 and 400 tokens."""
    from core.tokenizer import CharTokenizer
    from core.write_dataset import write_dataset

    text = 'the cat sat on the mat; a rat sat on that. ' * 100
    chars = ''.join(sorted(set(text)))
    ids = CharTokenizer(chars).encode_array(text)[:4000]
    folder = tmp_path / 'data' / 'tiny'
    write_dataset(folder, 'char', {'train': ids[:3600], 'val': ids[3600:]}, chars=chars, source='a test text')
    return folder


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
    """A data_dir with `tiny`, a small data set: each character is one to three steps after the last."""
    import numpy as np

    from core.write_dataset import write_dataset

    folder = tmp_path_factory.mktemp('data')
    state, ids = 12345, [0]
    for _ in range(4000):
        state = (state * 1103515245 + 12345) % 2**31
        ids.append((ids[-1] + 1 + (state >> 16) % 3) % 12)
    ids = np.array(ids)
    write_dataset(
        folder / 'tiny', 'char', {'train': ids[:3500], 'val': ids[3500:]}, chars='abcdefghijkl', source='a test'
    )
    return folder
