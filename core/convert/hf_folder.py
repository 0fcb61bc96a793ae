"""Writing the files of a Hugging Face folder all at once, so that a full disk leaves the folder that was there."""

import contextlib
import os
import shutil
from collections.abc import Iterator

from core.cli import files


@contextlib.contextmanager
def replacing(folder: str, names: tuple[str, ...]) -> Iterator[str]:
    """
    A context manager that yields a new folder beside the files of `folder`; when the block ends, the files in it
    replace those of the same name, and of the other `names` none is left in `folder`. Whatever else lies there stays.

    The last of `names`, by which a reader finds the others, is replaced last. If the block fails, `folder` is as it
    was. Raises OSError.
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
        files.sync_folder(folder)
    except BaseException:
        shutil.rmtree(beside if existed else folder, ignore_errors=True)
        raise
    os.rmdir(beside)
