"""Atomic file writes (a crash or a full disk leaves the old version), pipes as input, and checksums."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO


@contextlib.contextmanager
def replacing(path: str | os.PathLike, mode: str = 'w') -> Iterator[IO]:
    """
    A context manager that yields an open file, which replaces `path` when the block ends, unless the block or a write
    fails (OSError). Text is UTF-8 with '\\n' line ends.
    """
    path = os.path.realpath(path)  # where a link points to, and not in its place
    temporary = f'{path}.writing'
    try:
        encoding, newline = (None, None) if 'b' in mode else ('utf-8', '\n')
        with open(temporary, mode, encoding=encoding, newline=newline) as file:
            yield file
            sync(file)
        os.replace(temporary, path)
        sync_folder(os.path.dirname(path))
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


@contextlib.contextmanager
def replacing_in(folder: str, names: tuple[str, ...]) -> Iterator[str]:
    """
    A context manager that yields a new folder in `folder`; when the block ends, the files in it replace those of the
    same name, and of the other `names` none is left in `folder`. Whatever else lies there stays.

    The last of `names`, by which a reader finds the others, is replaced last. If the block fails (OSError, as on a full
    disk), `folder` is as it was.
    """
    existed = os.path.isdir(folder)
    beside = os.path.join(folder, '.writing')
    try:
        os.makedirs(folder, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed
        os.mkdir(beside)
        yield beside
        for name in os.listdir(beside):
            with open(os.path.join(beside, name), 'rb') as file:
                os.fsync(file.fileno())
        if taken := [name for name in names if os.path.isdir(os.path.join(folder, name))]:
            raise IsADirectoryError(f'{taken[0]} is a folder')
        for name in names:
            if os.path.exists(os.path.join(beside, name)):
                os.replace(os.path.join(beside, name), os.path.join(folder, name))
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(folder, name))
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(beside if existed else folder, ignore_errors=True)
        raise
    os.rmdir(beside)


def write_json(path: str | os.PathLike, value: object) -> None:
    """Write a value as indented JSON, atomically. Raises OSError."""
    with replacing(path) as file:
        json.dump(value, file, indent=1)
        file.write('\n')


def sync(file: IO) -> None:
    """Flush an open file to disk. Required before a rename, which could otherwise reach the disk before the data."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: str) -> None:
    """Flush the renames in `folder` to disk, where the operating system supports it."""
    with contextlib.suppress(OSError, AttributeError):
        handle = os.open(folder or '.', os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_bytes(path: str | os.PathLike, most: int) -> bytes:
    """The bytes of a file, or of a pipe. OSError if there are more than `most`, as in /dev/zero."""
    with open(path, 'rb') as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f'it has more than {most:,} bytes', str(path))
    return content


def copy_of_pipe(path: str | os.PathLike) -> IO[bytes]:
    """A temporary file with all that comes out of a pipe, which can be read only once; it's deleted with the object."""
    copy = tempfile.NamedTemporaryFile(prefix='pipe-')
    with open(path, 'rb') as file:
        shutil.copyfileobj(file, copy)
    copy.flush()
    return copy


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file as 64 hexadecimal digits."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
