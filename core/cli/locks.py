"""A folder that one process at a time may write in."""

import atexit
import contextlib
import datetime
import errno
import os
import socket
from types import TracebackType
from typing import IO

from core.cli.errors import UserError, notice

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
HELD: set[tuple[int, str]] = set()  # process and path of every lock that this process has


class FolderLock:
    """
    The lock of a folder, its file `.lock`; also a context manager.

    The lock is the kernel's (POSIX record lock, which NFS has too), so it ends with its owner, kill -9 included. A
    notice says where the file system has none. Windows has none.
    """

    def __init__(self, folder: str | os.PathLike):
        self.path = os.path.join(folder, '.lock')
        self.file: IO[str] | None = None

    def acquire(self) -> None:
        """
        Create the folder, and lock it until `release` or the end. UserError where another process holds it. Where this
        process holds it already, by another object, nothing happens here and in `release`.
        """
        folder = os.path.dirname(self.path)
        os.makedirs(folder, exist_ok=True)
        self.own = (os.getpid(), os.path.realpath(self.path))
        if self.file is not None or fcntl is None or self.own in HELD:
            return
        while True:
            try:
                file = open(self.path, 'a+', encoding='utf-8')
            except PermissionError as error:
                hint = "another user's process has it or left it: delete it if none is running"
                raise UserError(f"{self.path} can't be opened; {hint}") from error
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in UNSUPPORTED:
                    notice(f'{folder} is on a file system without locks: let only one process at a time write in it')
                    file.close()
                    return
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise UserError(f"{self.path} can't be locked: {error.strerror}; use another folder") from error
                file.seek(0)
                owner = ' '.join(file.read(200).split()) or 'another process'
                hint = 'wait for it, stop it, or choose another folder'
                raise UserError(f'{folder} is in use by {owner}; {hint}') from error
            if self.is_current(file):
                break  # otherwise its owner removed the file in the meantime: take the new one
            file.close()
        file.truncate(0)
        now = datetime.datetime.now().isoformat(' ', 'seconds')
        file.write(f'process {os.getpid()} on {socket.gethostname()} since {now}\n')
        file.flush()
        self.file = file
        HELD.add(self.own)
        atexit.register(self.release)

    def is_current(self, file: IO[str]) -> bool:
        """True if `file` is still what lies at the lock's path, and not in a folder that was renamed or removed."""
        with contextlib.suppress(OSError):
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        return False

    def release(self) -> None:
        """Give the lock back and remove its file, unless that is another process's by now."""
        if self.file is not None:
            if self.is_current(self.file):
                with contextlib.suppress(OSError):
                    os.remove(self.path)
            self.file.close()
            self.file = None
            HELD.discard(self.own)

    def __enter__(self) -> 'FolderLock':
        self.acquire()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()
