"""
Files that are whole at every moment, and their checksums.

A file is written beside its place, flushed to disk and renamed, so a crash or a full disk leaves the previous one.
"""

import contextlib
import hashlib
import json
import os


@contextlib.contextmanager
def replacing(path, mode='w'):
    """
    A context with an open file that takes the place of `path` when the block ends, and is removed if it fails.

    Text is UTF-8 with '\\n' line ends. Raises OSError; `path` is then as it was.
    """
    beside = f'{path}.writing'
    text = {} if 'b' in mode else dict(encoding='utf-8', newline='\n')
    try:
        with open(beside, mode, **text) as file:
            yield file
            sync(file)
        os.replace(beside, path)
        sync_folder(os.path.dirname(path))
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(beside)
        raise


def write_json(path, value):
    """Write a value as indented JSON, whole or not at all. Raises OSError."""
    with replacing(path) as file:
        json.dump(value, file, indent=1)
        file.write('\n')


def sync(file):
    """Flush an open file to disk: a rename must never get there before what it names."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder):
    """Make renames in `folder` survive a power cut, where the system can."""
    with contextlib.suppress(OSError, AttributeError):
        handle = os.open(folder or '.', os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sha256(path):
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
