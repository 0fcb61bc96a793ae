"""core/cli/files.py: a file is replaced as a whole, or not at all."""

import hashlib
import json
import os

import pytest

from core.cli import arguments, files
from core.cli.errors import UserError


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


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / 'real.json').write_text('old')
    (tmp_path / 'link.json').symlink_to('real.json')
    files.write_json(tmp_path / 'link.json', 1)
    assert (tmp_path / 'link.json').is_symlink() and (tmp_path / 'real.json').read_text() == '1\n'


def test_a_pipe_is_no_place_for_a_file(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(UserError, match='it is a pipe or a device, and a file would take its place'):
        arguments.check_file(str(tmp_path / 'pipe'), 'json')
