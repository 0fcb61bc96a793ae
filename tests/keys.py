"""Which scripts there are and which keys they have, read from their source."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [p for pattern in ('*.py', 'studies/*.py', 'data/*/prepare.py') for p in sorted(ROOT.glob(pattern))
           if 'configurator.py' in p.read_text() and p.name != 'configurator.py']  # fmt: skip


def keys_of(script):
    """{key: default} of a script's block, without running it."""
    keys = {}
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.Expr) and 'configurator.py' in ast.unparse(node):
            return keys
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                keys[node.targets[0].id] = eval(compile(ast.Expression(node.value), script.name, 'eval'), {})
            except NameError:
                continue
    raise AssertionError(f'{script} never executes the configurator')
