"""What the user gave: lists of numbers and names in one key, and paths that must be writable."""

import os

from core.cli import ranges
from core.cli.errors import UNPRINTABLE, UserError

NUMBERS = 'numbers separated by commas, such as 1e-3,2e-3'


def whole_numbers(text: str, key: str) -> list[int]:
    """The value of a key such as '1,8' as a list of whole numbers; UserError where one is out of the key's bounds."""
    return [int(number) for number in numbers(text, key, int, 'whole numbers separated by commas, such as 1,8')]


def numbers(text: str, key: str, kind: type[int] | type[float] = float, wanted: str = NUMBERS) -> list[float]:
    """The same for numbers of any `kind`; wanted: what the message says they must be."""
    try:
        values = [kind(part) for part in text.split(',')] if text else []
    except ValueError:
        raise UserError(f"{key} is '{text}'; it must be {wanted}") from None
    for value in values:
        if found := ranges.problem(key, value):
            raise UserError(f"in {key}='{text}' a number {found}")
    return values


def names(text: str, key: str) -> list[str]:
    """The value of a key such as 'out,out-mla' as a list. UserError if it's set but names nothing."""
    found = [part.strip() for part in text.split(',') if part.strip()]
    if text and not found:
        raise UserError(f"{key} is '{text}', which names nothing; separate names by commas")
    return found


def check_folder(path: str, key: str = 'out_dir') -> None:
    """UserError unless the folder `path`, the value of a key, is writable or can be created. Creates nothing."""
    above = nearest_existing(path, key)
    if not os.path.isdir(above) or not os.access(above, os.W_OK):
        raise unusable(path, key, f'{above} is not a writable folder')


def check_file(path: str, key: str, made: str | None = None) -> None:
    """
    UserError unless the file `path`, the value of a key, can be created or replaced. Creates nothing. made: a folder
    that the script makes before it writes, for which `check_folder` is asked.
    """
    folder = os.path.dirname(os.path.realpath(path))
    nearest_existing(f'{path}.writing' if path else '', key)  # as core/cli/files.py names it while writing
    if not os.path.isdir(folder):
        if made is not None and folder == os.path.realpath(made):
            return
        raise unusable(path, key, f'the folder {folder} does not exist')
    if os.path.isdir(path) or not os.access(folder, os.W_OK):
        raise unusable(path, key, 'it is a folder' if os.path.isdir(path) else f'{folder} is not a writable folder')
    if os.path.exists(path) and not os.path.isfile(path):
        raise unusable(path, key, 'it is a pipe or a device, and a file would take its place')


def nearest_existing(path: str, key: str) -> str:
    """`path`, or the nearest folder above it that exists. UserError if no such path can exist, for example ''."""
    if not path:
        raise unusable(path, key, 'it is empty')
    if UNPRINTABLE.search(path):
        raise unusable(path, key, 'it has characters that are not UTF-8 or that a terminal would execute')
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # too long a name, or a folder that may not be read
        raise unusable(path, key, error.strerror) from error
    above = os.path.abspath(path)
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    return above


def unusable(path: str, key: str, reason: str | None) -> UserError:
    """The UserError for the path in a key."""
    return UserError(f"{key}='{path}' can't be used: {reason}; choose another --{key}")
