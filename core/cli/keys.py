"""
A script's keys, the block of `name = value  # comment` lines at its top: how config files and flags set them.

Keys are the globals of type int, float, bool or str whose names have no leading '_' and no capitals only. Config files
(any Python that nanoGPT's exec takes) and flags (--key=value or --key value) apply from left to right. A key keeps the
type of its default and the bounds in ranges.py. An unknown flag is an error; a file may have names of its own, which a
notice lists.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import glob
import math
import numbers
import os
import sys
import traceback
import types
import warnings
from collections.abc import Callable

from core.cli import errors, ranges, signals
from core.cli.errors import UserError

Value = bool | int | float | str
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
WORDS = {'true': True, 'yes': True, 'on': True, '1': True, 'false': False, 'no': False, 'off': False, '0': False}
EXPECTED = {bool: 'True or False (bool)', int: 'a whole number (int)', float: 'a number (float)', str: 'a string'}


def configure(script: dict[str, object]) -> tuple[dict[str, Value], set[str]]:
    """Set the keys of a script, given its globals, from sys.argv: ({key: value}, {keys that were given}). UserError."""
    errors.install()
    check_folder(str(script.get('__file__') or ''))
    keys = Keys(script, errors.notice)
    keys.read(sys.argv[1:])
    script.update(keys.values)
    return keys.values, keys.given


def begin(script: str, *others: str) -> None:
    """What a script does before its slow imports: from now on signals end it at once; then `check_early`."""
    signals.exit_at_once()
    check_early(script, *others)


def check_early(script: str, *others: str) -> None:
    """
    Before a script's slow imports: print its help or refuse its flags, as `configure` does after them. It leaves config
    files, which may use what the script imports, to `configure`. others: scripts whose keys it has too.
    """
    if any(argument.endswith('.py') for argument in sys.argv[1:]):
        return
    if {'-h', '--help'} & set(sys.argv):
        errors.install()
    try:
        check_folder(script)
        own = {key: value for path in (*others, script) for key, value in keys_of(path).items()}
        Keys({'__file__': script, **own}, lambda text: None).read(sys.argv[1:])
    except UserError:
        errors.install()
        raise


def check_folder(script: str) -> None:
    """UserError unless a script is run from the repository's folder, where its paths start. data/ runs anywhere."""
    path = os.path.abspath(script)
    inside = path.startswith(os.path.join(ROOT, '')) and not path.startswith(os.path.join(ROOT, 'data', ''))
    if inside and not os.path.samefile(ROOT, os.getcwd()):
        raise UserError(f"run it from the repository's folder, where its data and configs are: cd {ROOT}")


class Keys:
    """A script's keys while arguments are read: `defaults` fix the types, `values` are current, `given` were set."""

    def __init__(self, script: dict[str, object], say: Callable[[str], None]):
        self.say = say
        self.defaults: dict[str, Value] = {
            name: value
            for name, value in script.items()
            if not name.startswith('_') and not name.isupper() and isinstance(value, (int, float, bool, str))
        }
        self.values, self.given = dict(self.defaults), set[str]()
        self.script_file = str(script.get('__file__') or '')
        # what a config file finds, as in nanoGPT: the script's imports, and the names of the files before it
        self.names = dict(script)

    def read(self, arguments: list[str]) -> None:
        """Apply the command line from left to right. UserError if it's wrong, or a value is out of bounds."""
        flags: list[str] = []
        while arguments:
            argument = arguments.pop(0)
            if argument in ('-h', '--help'):
                self.print_help()
                raise SystemExit(0)
            if argument.startswith('--'):
                flags.append(self.read_flag(argument, arguments))
            else:
                self.say_flags(flags)
                flags = []
                self.read_file(argument)
        self.say_flags(flags)
        for key, value in self.values.items():
            if found := ranges.problem(key, value):
                raise UserError(f'{key} {found}')

    def say_flags(self, flags: list[str]) -> None:
        """A notice about a group of flags, given as keys."""
        if flags:
            settings = (f'{key}={self.values[key]!r}' for key in dict.fromkeys(flags))
            self.say(f'command line sets {", ".join(settings)}')

    # ---- flags

    def read_flag(self, flag: str, rest: list[str]) -> str:
        """Apply '--key=value', or '--key' and what it takes from `rest` (True for a boolean key); returns the key."""
        key, equals, text = flag[2:].partition('=')
        if key in ('local-rank', 'local_rank'):
            raise UserError(f'{flag} comes from torch.distributed.launch; use torchrun in its place')
        if key not in self.values:
            raise UserError(f'unknown key --{key}: {self.suggestion(key)}')
        if not equals:
            alone = not rest or rest[0].startswith('--') or rest[0] == '-h'
            if alone and not isinstance(self.defaults[key], bool):
                raise UserError(f'--{key} needs a value, for example --{key}={self.defaults[key]!s}')
            text = 'true' if alone else rest.pop(0)
        self.set(key, parsed(self.defaults[key], text), f'--{key}')
        return key

    def set(self, key: str, value: object, label: str) -> None:
        """Give a key a value, converted to the type of its default; or UserError, starting with the label."""
        default = self.defaults[key]
        fitting = converted(default, value)
        if fitting is None:
            wanted = EXPECTED[type(default)] + (', True or False' if default == 'auto' else '')
            raise UserError(f'{label} must be {wanted}, got {ranges.short(repr(value), 60)}')
        self.values[key] = fitting
        self.given.add(key)

    def suggestion(self, name: str) -> str:
        """'did you mean --key?' with the key most similar to an unknown name."""
        near = self.similar(name, 0.6)
        return f'did you mean --{near}?' if near else '--help lists every key'

    def similar(self, name: str, cutoff: float) -> str | None:
        """The key most similar to an unknown name; None where none is at least as similar as `cutoff`."""
        near = difflib.get_close_matches(name.replace('-', '_').lower(), self.values, n=1, cutoff=cutoff)
        return near[0] if near else None

    # ---- config files

    def read_file(self, path: str) -> None:
        """Run a config file, and take from it the keys that it assigns; notices say which, and what else it assigns."""
        source, before = self.file_text(path), dict(self.values)
        places = self.run_file(source, path)
        for key in self.values:
            if key in places and key in self.names:
                self.set(key, self.names[key], f'{places[key]}: {key}')
        changed = [key for key, value in self.values.items() if value != before[key]]
        self.say(f'{path} sets {", ".join(changed)}' if changed else f'{path} changes nothing')
        others = []  # what the user may have meant for keys: no modules, functions and classes
        for name in places:
            value = self.names.get(name)
            if not (name in self.values or name[:1] == '_' or isinstance(value, types.ModuleType) or callable(value)):
                near = self.similar(name, 0.8)
                others.append(f'{name} (did you mean {near}?)' if near else name)
        if others:
            self.say(f'{path} also assigns what is no key and changes nothing here: {", ".join(others)}')

    def run_file(self, source: str, path: str) -> dict[str, str]:
        """Run a config file's source on `names`, which keep what it assigns: {assigned name: 'path:line'}."""
        names = {**self.names, **self.values, '__name__': '__main__', '__file__': path}
        namespace = Namespace(names, path)
        try:
            exec(compile(source, path, 'exec'), namespace)
        except Exception as error:
            raise UserError(failure(error, path)) from error
        # what a function assigned by `global`, or globals().update, is not recorded
        unseen = (name for name, value in namespace.items() if name not in names or names[name] is not value)
        self.names = dict(namespace)
        return dict.fromkeys(unseen, path) | namespace.places

    def file_text(self, path: str) -> str:
        """The text of a config file; UserError naming the most similar one in config/ where it doesn't exist."""
        if not path.endswith('.py'):
            raise UserError(self.misplaced(path))
        try:
            return source_of(path)
        except FileNotFoundError as error:
            raise UserError(f"config file '{path}' does not exist; {near_file(path)}") from error
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
            raise UserError(f"config file '{path}' can't be read ({error}); give the path of a Python file") from error

    def misplaced(self, argument: str) -> str:
        """The error message for an argument that is neither a flag nor a config file."""
        if argument.startswith('-'):
            return f"unknown option '{argument}': a key is set by --key=value; --help lists every key"
        text = f"unexpected argument '{argument}': a config file ends in .py, and a key is set by --key=value"
        key, equals, _ = argument.partition('=')
        if equals:
            return f'{text}; did you mean --{argument}?' if key in self.values else f'{text}; {self.suggestion(key)}'
        return f'{text}; {near_file(argument)}' if argument else text

    def print_help(self) -> None:
        """Print the script's docstring, and a table of the keys, on stdout."""
        source = source_of(self.script_file)
        comments = comments_of(source)
        if docstring := ast.get_docstring(ast.parse(source)):
            print(docstring + '\n')
        print('Keys with their current values. Set them with --key=value or in a config file; the last one wins.\n')
        widths = [max(map(len, column), default=0) for column in (self.values, map(repr, self.values.values()))]
        for key, value in self.values.items():
            print(f'  --{key:{widths[0]}}  {value!r:{widths[1]}}  {comments.get(key, "")}'.rstrip())


class Namespace(dict):
    """The globals of a config file, which remember where it assigned each name: `places`, {name: 'path:line'}."""

    def __init__(self, names: dict[str, object], path: str):
        super().__init__(names)
        self.path = path
        self.places: dict[str, str] = {}

    def __setitem__(self, name: str, value: object) -> None:
        frame = sys._getframe(1)
        while frame.f_code.co_filename != self.path and frame.f_back:  # out of a file that this one executes
            frame = frame.f_back
        self.places[name] = f'{self.path}:{frame.f_lineno}'
        super().__setitem__(name, value)


def failure(error: Exception, path: str) -> str:
    """'file:line: what is wrong' for an exception that a config file raised."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    text = f'{type(error).__name__}: {error}'
    if isinstance(error, SyntaxError) and error.filename == path:
        lines, text = [error.lineno], f'{type(error).__name__}: {error.msg}'
    return ':'.join([path, *map(str, lines[-1:])]) + f': {text}'


def near_file(path: str) -> str:
    """'did you mean config/name.py?' with the config file whose name is most similar."""
    files = {os.path.basename(file): file for file in sorted(glob.glob(os.path.join('config', '*.py')))}
    name = os.path.basename(path)
    near = difflib.get_close_matches(name if name.endswith('.py') else name + '.py', files, n=1)
    return f'did you mean {files[near[0]]}?' if near else 'give its path from here, or see the files in config/'


# ---- values ----------------------------------------------------------------------------------------------------------


def parsed(default: Value, text: str) -> Value:
    """The value that a flag's text has for a key with this default. Text that can't be parsed stays as it is."""
    if isinstance(default, bool):
        return WORDS.get(text.lower(), text)
    if default == 'auto' and text.lower() in ('true', 'false'):
        return text.lower() == 'true'
    if isinstance(default, str):
        return unquoted(text)
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    return text


def unquoted(text: str) -> str:
    """The text, or its value where it is a quoted Python string: '"a\\n"' is the letter and a newline."""
    if text.strip()[-1:] not in ('"', "'"):
        return text
    try:
        with warnings.catch_warnings(action='ignore'):
            literal = ast.literal_eval(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return text
    return literal if isinstance(literal, str) else text


def converted(default: Value, value: object) -> Value | None:
    """The value in the type of a key's default, or None where it can't be: 4e6 is a whole number, True is none."""
    if isinstance(default, bool) or isinstance(value, bool):
        return value if isinstance(value, bool) and (isinstance(default, bool) or default == 'auto') else None
    if isinstance(default, str):
        return str(value) if isinstance(value, str) else None
    if not isinstance(value, numbers.Real):  # Python's and numpy's
        return None
    if isinstance(default, int) and isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(default, int):
        return int(float(value)) if float(value).is_integer() else None
    try:
        return None if math.isnan(value) else float(value)
    except OverflowError:  # a whole number of more than 308 digits
        return None


# ---- a script's block of keys ----------------------------------------------------------------------------------------


def keys_of(path: str | os.PathLike) -> dict[str, Value]:
    """{key: default} of a script's block of keys, read from its source without running it."""
    keys: dict[str, Value] = {}
    for key, node in block_of(source_of(path)):
        try:
            keys[key] = eval(compile(ast.Expression(node.value), os.fspath(path), 'eval'), {})
        except NameError:
            continue  # computed from something else, so it is no key
    return keys


def comments_of(source: str) -> dict[str, str]:
    """{key: comment} of the block of keys in a script's source: what stands behind two spaces and '# '."""
    lines = source.split('\n')
    texts = {key: '\n'.join(lines[node.lineno - 1 : node.end_lineno]) for key, node in block_of(source)}
    return {key: text.partition('  # ')[2].split('\n')[0] for key, text in texts.items()}


def block_of(source: str) -> list[tuple[str, ast.Assign]]:
    """The assignments to a name at the top of a script's source, up to where it executes the configurator."""
    found: list[tuple[str, ast.Assign]] = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and 'configurator.py' in ast.unparse(node):
            return found
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.append((node.targets[0].id, node))
    raise ValueError('the script never executes the configurator')


def source_of(path: str | os.PathLike) -> str:
    """The text of a script."""
    with open(path, encoding='utf-8-sig') as file:
        return file.read()
