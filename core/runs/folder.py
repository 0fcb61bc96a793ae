"""
The folder of a training run: which files are the run's, who owns it, and where it can be resumed from.

    ckpt.pt           the last checkpoint
    ckpt_best.pt      the one with the best validation loss
    ckpt_000500.pt    those of the iterations in keep_checkpoints
    log.csv           one row per logged iteration
    .lock             held while a trainer runs

Any of the first four means that the folder holds a run.
"""

import contextlib
import itertools
import os
import re

from core.cli.errors import UserError, notice
from core.cli.locks import FolderLock
from core.runs import checkpoint as checkpoints

RUN_FILES = re.compile(r'(ckpt(_best|_\d{6,})?\.pt|log(\.\d+)?\.csv)(\.writing)?')


class RunFolder:
    """The folder out_dir of a run. Making this object touches nothing; `acquire` creates the folder and locks it."""

    def __init__(self, path: str):
        self.lock = FolderLock(path)
        self.handle: int | None = None  # of the folder, which still points to it when it is renamed
        self.name_files(path)

    def name_files(self, path: str) -> None:
        """Set the names of the run's files, for the folder at `path`."""
        self.path, self.lock.path = path, os.path.join(path, '.lock')
        self.ckpt, self.best = os.path.join(path, 'ckpt.pt'), os.path.join(path, 'ckpt_best.pt')
        self.log = os.path.join(path, 'log.csv')

    def follow(self) -> None:
        """Go on where the folder is now, if it was renamed while this process trains; a notice says so (Linux only)."""
        place = f'/proc/self/fd/{self.handle}'
        if self.handle is None or not os.path.exists(place):
            return
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self.handle), os.stat(self.path)):
                return
        now = os.readlink(place)
        if os.path.isdir(now):
            notice(f'{self.path} was renamed; the run goes on in {now}')
            self.name_files(now)

    def kept(self, iteration: int) -> str:
        """Where the checkpoint of an iteration in keep_checkpoints is kept."""
        return os.path.join(self.path, f'ckpt_{iteration:06}.pt')

    def files(self) -> list[str]:
        """Paths of all files of a run, in order of their names; none where the folder doesn't exist."""
        names = os.listdir(self.path) if os.path.isdir(self.path) else []
        return [os.path.join(self.path, name) for name in sorted(names) if RUN_FILES.fullmatch(name)]

    def newest(self) -> tuple[str | None, dict | None]:
        """
        The newest whole checkpoint: (path, loaded), preferring ckpt.pt; (None, None) without any. A notice names those
        that are damaged. UserError where all are.
        """
        best: tuple[str | None, dict | None] = (None, None)
        damaged = []
        found = [path for path in self.files() if path.endswith('.pt')]
        for path in sorted(found, key=lambda path: path != self.ckpt):
            try:
                loaded = checkpoints.load(path)
            except UserError as error:
                damaged.append(error)
                continue
            if best[1] is None or (loaded.get('iter_num') or 0) > (best[1].get('iter_num') or 0):
                best = (path, loaded)
            if path == self.ckpt:
                break
        if damaged and best[1] is None:
            raise damaged[0]
        for reason in damaged:
            notice(f'{reason}: resuming from {best[0]} instead')
        return best

    def acquire(self) -> None:
        """Create the folder, and lock it until this process ends. UserError where another trainer holds it."""
        self.lock.acquire()
        if hasattr(os, 'O_DIRECTORY') and self.handle is None:
            self.handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)

    def taken(self) -> UserError:
        """The error for a new run where the folder holds another."""
        hint = 'resume it with --resume=yes, choose another --out_dir, or discard it with --overwrite=True'
        return UserError(f'{self.path} holds another run; {hint}')

    def begin(self, resumes: bool, overwrite: bool) -> None:
        """
        Own the folder; a new run that overwrites removes the files of another, and any sets a lone log aside. UserError
        where another run began since this one looked: before its model was ready it may not have had the folder.
        """
        self.acquire()
        if not resumes and not overwrite and any(path.endswith('.pt') for path in self.files()):
            raise self.taken()
        if overwrite and not resumes:
            for path in self.files():
                os.remove(path)
        elif os.path.exists(self.log) and not resumes:
            names = (os.path.join(self.path, f'log.{number}.csv') for number in itertools.count(1))
            aside = next(name for name in names if not os.path.exists(name))
            os.rename(self.log, aside)
            notice(f'{self.log} has no checkpoint beside it; it is kept as {aside}')
