"""core/cli/files.py: a file is replaced as a whole, or not at all."""

import hashlib
import json
import os

import pytest

from core.cli import files


def test_a_file_is_replaced_when_the_block_ends(tmp_path):
    path = tmp_path / 'a.txt'
    path.write_text('old')
    with files.replacing(path) as file:
        file.write('n\u00e9w\n')
        file.flush()
        assert path.read_text() == 'old'
    assert path.read_bytes() == 'n\u00e9w\n'.encode() and os.listdir(tmp_path) == ['a.txt']
    with files.replacing(path, 'wb') as file:
        file.write(b'\xff')
    assert path.read_bytes() == b'\xff'


def test_a_failed_write_changes_nothing(tmp_path):
    path = tmp_path / 'a.json'
    files.write_json(path, {'old': 1})
    for failure in (OSError(28, 'No space left on device'), KeyboardInterrupt()):
        with pytest.raises(type(failure)), files.replacing(path) as file:
            file.write('half')
            raise failure
    with pytest.raises(TypeError):
        files.write_json(path, {'new': object()})
    assert json.loads(path.read_text()) == {'old': 1} and os.listdir(tmp_path) == ['a.json']
    with pytest.raises(OSError):
        files.write_json(tmp_path / 'missing' / 'a.json', {})


def test_sha256(tmp_path):
    data = bytes(range(256)) * 10000
    (tmp_path / 'a').write_bytes(data)
    assert files.sha256(tmp_path / 'a') == hashlib.sha256(data).hexdigest()
