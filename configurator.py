# Reads config files and flags into a script's block of `name = value  # comment` lines. A script executes this file
# right after the block, in its own globals, as nanoGPT does:
#
#     exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())
#
#     $ python train.py config/train_shakespeare_char.py --batch_size=32 --compile false
#
# Notable features:
# - a script's keys are its globals of type int, float, bool or str whose names have no leading '_'
# - config files (Python) and flags (--key=value or --key value) apply strictly from left to right
# - a key keeps the type of its default, and the bounds in core/cli/ranges.py: an unknown key, another type or a value out
#   of bounds is an error of one line, in files as on the command line
# - --help prints the script's docstring, and every key with its current value and its comment
# - it leaves two names in the script: `config`, a dict of all keys, to be stored with the script's output, and `given`,
#   the set of the keys that a file or a flag set
#
# This header is a comment because a docstring executed here would replace the script's own.


class _Configurator:
    """Holds the keys while arguments are read: `defaults` fix the types, `values` are current, `given` were set."""

    WORDS = {'true': True, 'yes': True, 'on': True, '1': True, 'false': False, 'no': False, 'off': False, '0': False}

    @classmethod
    def configure(cls, script):
        """Override the keys in the namespace `script` from sys.argv: ({key: value}, {given keys}), or UserError."""
        import sys

        from core.cli import errors

        errors.install()
        keys = [k for k, v in script.items() if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
        self = cls()
        self.script_file = script.get('__file__')
        # The keys leave the namespace while the code here runs, because this code shares it: a key called `compile` or
        # `input` would hide the built-in.
        self.defaults = {key: script.pop(key) for key in keys}
        self.values, self.given = dict(self.defaults), set()
        try:
            self.check_folder()
            self.read(sys.argv[1:])
            self.check_values()
        finally:
            script.update(self.values)
        return self.values, self.given

    def check_folder(self):
        """UserError unless a script is run from the repository's folder, where its paths start. data/ runs anywhere."""
        import os

        import core

        root = os.path.dirname(os.path.dirname(os.path.abspath(core.__file__)))
        script = os.path.abspath(self.script_file or '')
        inside = script.startswith(os.path.join(root, ''))
        if inside and not script.startswith(os.path.join(root, 'data', '')) and not os.path.samefile(root, os.getcwd()):
            raise self.error(f"run it from the repository's folder, where its data and configs are: cd {root}")

    def check_values(self):
        """UserError where a key is out of the bounds that core/cli/ranges.py has for it."""
        from core.cli import ranges

        for key, value in self.values.items():
            if found := ranges.problem(key, value):
                raise self.error(f'{key} {found}')

    def read(self, arguments):
        """Apply the command line, a list of str, from left to right."""
        from core.cli import errors

        flags = []
        while arguments:
            argument = arguments.pop(0)
            if argument in ('-h', '--help'):
                self.print_help()
                raise SystemExit(0)
            if argument.startswith('--'):
                flags.append(self.read_flag(argument, arguments))
            else:
                flags = self.say_flags(flags)
                changed = self.read_file(argument)
                errors.notice(f'{argument} sets {", ".join(changed)}' if changed else f'{argument} changes nothing')
        self.say_flags(flags)

    def say_flags(self, flags):
        """Print a group of flags, a list of keys, with their values; returns an empty group."""
        from core.cli import errors

        if flags:
            settings = (f'{key}={self.values[key]!r}' for key in dict.fromkeys(flags))
            errors.notice(f'command line sets {", ".join(settings)}')
        return []

    def error(self, text):
        """The exception to raise for a user's mistake."""
        from core.cli import errors

        return errors.UserError(text)

    # ---- flags

    def read_flag(self, flag, rest):
        """
        Apply '--key=value', or '--key' and the first of `rest`, which is removed from it; returns the key.

        A boolean key without a value is True.
        """
        key, equals, text = flag[2:].partition('=')
        if key not in self.values:
            raise self.error(f'unknown key --{key}: {self.suggestion(key)}')
        if not equals:
            alone = not rest or rest[0].startswith('--') or rest[0] == '-h'
            if alone and not isinstance(self.defaults[key], bool):
                raise self.error(f'--{key} needs a value, for example --{key}={self.defaults[key]!s}')
            text = 'true' if alone else rest.pop(0)
        self.values[key] = self.checked(key, self.parsed(key, text), f'--{key}')
        self.given.add(key)
        return key

    def parsed(self, key, text):
        """The value of `text` for this key: a bool, int, float or str. Text that can't be parsed stays as it is."""
        default = self.defaults[key]
        if isinstance(default, bool):
            return self.WORDS.get(text.lower(), text)
        if isinstance(default, str):
            return text.lower() == 'true' if self.is_auto_switch(default, text) else self.unquoted(text)
        for number in (int, float):
            try:
                return number(text)
            except ValueError:
                pass
        return text

    def is_auto_switch(self, default, text):
        """True where the text is true or false, and the key's default is 'auto'."""
        return default == 'auto' and text.lower() in ('true', 'false')

    def unquoted(self, text):
        """The text, or its value where it is a quoted Python string: '"a\\n"' is the letter and a newline."""
        import ast
        import warnings

        if text.strip()[-1:] in ('"', "'"):
            try:
                with warnings.catch_warnings(action='ignore'):
                    literal = ast.literal_eval(text)
            except (SyntaxError, ValueError, MemoryError, RecursionError):
                return text
            return literal if isinstance(literal, str) else text
        return text

    # ---- config files

    def read_file(self, path):
        """Run a config file in a copy of the keys, and apply what it assigns; returns the keys that changed."""
        import types

        namespace, lines = self.run_file(path)
        changed = []
        for name, value in namespace.items():
            if name.startswith('_'):
                continue
            place = f'{path}:{lines[name]}' if name in lines else path
            if name in self.values:
                value = self.checked(name, value, f'{place}: {name}')
                if name in lines:
                    self.given.add(name)
                if (type(value), value) != (type(self.values[name]), self.values[name]):
                    changed.append(name)
                    self.values[name] = value
            elif not isinstance(value, types.ModuleType) and not callable(value):
                hint = f'{self.suggestion(name)} (a helper of the file needs a leading underscore: _{name})'
                raise self.error(f'{place}: unknown key {name}: {hint}')
        return changed

    def run_file(self, path):
        """The namespace that a config file leaves, and {name: the last line that assigns to it}."""
        import ast

        source = self.file_text(path)
        namespace = dict(self.values, __name__='__main__', __file__=path)
        try:
            tree = ast.parse(source, path)
            exec(compile(tree, path, 'exec'), namespace)
        except Exception as error:
            raise self.error(self.described(error, path)) from error
        return namespace, self.assigned(tree)

    def described(self, error, path):
        """'file:line: what is wrong' for an exception that a config file raised."""
        import traceback

        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        text = f'{type(error).__name__}: {error}'
        if isinstance(error, SyntaxError) and error.filename == path:
            lines, text = [error.lineno], f'{type(error).__name__}: {error.msg}'
        return ':'.join([path, *map(str, lines[-1:])]) + f': {text}'

    def file_text(self, path):
        """The text of a config file; UserError naming the most similar one in config/ where it doesn't exist."""
        if not path.endswith('.py'):
            raise self.error(self.misplaced(path))
        try:
            with open(path, encoding='utf-8-sig') as file:
                return file.read()
        except FileNotFoundError as error:
            raise self.error(f"config file '{path}' does not exist; {self.near_file(path)}") from error
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
            raise self.error(f"config file '{path}' can't be read ({error}); give the path of a Python file") from error

    def misplaced(self, argument):
        """The error message for an argument that is neither a flag nor a config file."""
        if argument.startswith('-'):
            return f"unknown option '{argument}': a key is set by --key=value; --help lists every key"
        text = f"unexpected argument '{argument}': a config file ends in .py, and a key is set by --key=value"
        key, equals, _ = argument.partition('=')
        if equals:
            return f'{text}; did you mean --{argument}?' if key in self.values else f'{text}; {self.suggestion(key)}'
        return f'{text}; {self.near_file(argument)}' if argument else text

    # ---- flags and files

    def checked(self, key, value, label):
        """The value, converted to the type of the key's default; or UserError, starting with the label."""
        fitting = self.fitting(self.defaults[key], value)
        if fitting is None:
            default = self.defaults[key]
            expected = {bool: 'True or False (bool)', int: 'a whole number (int)', float: 'a number (float)'}
            wanted = expected.get(type(default), 'a string' + (', True or False' if default == 'auto' else ''))
            got = repr(value)
            got = got if len(got) <= 60 else got[:57] + '...'
            raise self.error(f'{label} must be {wanted}, got {got}')
        return fitting

    def fitting(self, default, value):
        """The value as the default's type (int, float, bool or str), or None where it can't be converted."""
        if isinstance(default, bool):
            return value if isinstance(value, bool) else None
        if isinstance(default, str):
            if default == 'auto' and isinstance(value, bool):
                return value
            return str(value) if isinstance(value, str) else None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        if isinstance(default, int):
            return int(value) if isinstance(value, int) or value.is_integer() else None
        is_float = value == value if isinstance(value, float) else value.bit_length() <= 1023
        return float(value) if is_float else None

    def assigned(self, tree):
        """{name: the last line that assigns to it} of a syntax tree."""
        import ast

        stores = (n for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
        return {node.id: node.lineno for node in sorted(stores, key=lambda node: node.lineno)}

    def suggestion(self, name):
        """'did you mean --key?' with the key most similar to an unknown name."""
        import difflib

        near = difflib.get_close_matches(name.replace('-', '_').lower(), self.values, n=1)
        return f'did you mean --{near[0]}?' if near else '--help lists every key'

    def near_file(self, path):
        """'did you mean config/name.py?' with the config file whose name is most similar."""
        import difflib
        import glob
        import os

        files = {os.path.basename(file): file for file in sorted(glob.glob(os.path.join('config', '*.py')))}
        name = os.path.basename(path)
        near = difflib.get_close_matches(name if name.endswith('.py') else name + '.py', files, n=1)
        return f'did you mean {files[near[0]]}?' if near else 'give its path from here, or see the files in config/'

    # ---- --help

    def print_help(self):
        """Print the script's docstring, and a table of the keys, on stdout."""
        docstring, comments = self.read_script()
        if docstring:
            print(docstring + '\n')
        print('Keys with their current values. Set them with --key=value or in a config file; the last one wins.\n')
        widths = [max(map(len, column), default=0) for column in (self.values, map(repr, self.values.values()))]
        for key, value in self.values.items():
            print(f'  --{key:{widths[0]}}  {value!r:{widths[1]}}  {comments.get(key, "")}'.rstrip())

    def read_script(self):
        """The script's docstring, and {name: comment} of its block, which ends where this file is executed."""
        import ast
        import io
        import tokenize

        if self.script_file is None:
            return None, {}
        with open(self.script_file, encoding='utf-8-sig') as file:
            source = file.read()
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        notes = {token.start[0]: token.string.lstrip('# ') for token in tokens if token.type == tokenize.COMMENT}
        comments = {}
        tree = ast.parse(source)
        for node in tree.body:
            if isinstance(getattr(node, 'value', None), ast.Call) and 'configurator.py' in ast.unparse(node):
                break
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                note = next((notes[n] for n in range(node.lineno, node.end_lineno + 1) if n in notes), '')
                comments.update(dict.fromkeys(self.assigned(node), note))
        return ast.get_docstring(tree), comments


config, given = _Configurator.configure(globals())
del _Configurator
