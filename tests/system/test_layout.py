"""Imports go downward only, core's drawers form no circle, and no file outgrows what one reads at a sitting."""

import ast
import graphlib
from pathlib import Path

import pytest
from support import ROOT

# what each place may import of the project; a script may import all of these
MAY_IMPORT = {
    'ops': {'ops'},
    'model': {'ops'},
    'model_mla': {'ops', 'model'},
    'core': {'ops', 'model', 'model_mla', 'core'},
    'analysis': {'ops', 'model', 'model_mla', 'core', 'analysis'},
    'studies': {'ops', 'model', 'model_mla', 'core', 'analysis', 'studies'},
}
MODELS = {'model', 'model_mla'}  # what they import inside a function (from_pretrained) is up to them
PATTERNS = ('*.py', 'ops/*.py', 'core/**/*.py', 'analysis/*.py', 'studies/*.py', 'data/*/*.py', 'assets/*.py')
FILES = sorted(path.relative_to(ROOT) for pattern in PATTERNS for path in ROOT.glob(pattern))
PROJECT = set(MAY_IMPORT) | {
    path.stem for path in FILES if len(path.parts) == 1
}  # names of the root's folders and files
SCRIPTS = MAY_IMPORT.keys() - {'studies'}
MOST_LINES = {'model.py': 400, 'model_mla.py': 280, 'train.py': 370}
MOST_IN_ALL = 18_650


def place(file):
    """The key of MAY_IMPORT that a file belongs to, or its own name."""
    return file.parts[0] if len(file.parts) > 1 else file.stem


def imports(tree, inner=True):
    """What a module imports, as dotted names: 'core.cli.errors.UserError'. inner: inside of functions too."""
    found = set()
    for node in ast.walk(tree) if inner else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f'line {node.lineno}: a relative import'
            found |= {f'{node.module}.{alias.name}' for alias in node.names}
    return found


def upward(file, source):
    """What of the project a file imports that it may not."""
    allowed = MAY_IMPORT.get(place(file), SCRIPTS)
    found = imports(ast.parse(source), inner=place(file) not in MODELS)
    return {name for name in found if name.split('.')[0] in PROJECT - allowed}


def drawers(files):
    """{drawer of core: the other drawers that its files import} of {file: its source}."""
    arrows = {}
    for file, source in files.items():
        own = file.parts[1]
        for name in imports(ast.parse(source)):
            parts = name.split('.')
            if parts[0] == 'core' and parts[1] != own:
                arrows.setdefault(own, set()).add(parts[1])
    return arrows


def test_an_arrow_upward_is_found():
    assert upward(Path('ops/a.py'), 'import math, ops.b\ndef f():\n    from core import cli') == {'core.cli'}
    assert upward(Path('model.py'), 'from ops import a\ndef f():\n    from core.convert import gpt2') == set()
    assert upward(Path('model.py'), 'import model_mla') == {'model_mla'}
    assert upward(Path('core/cli/a.py'), 'import train\nfrom analysis.b import c') == {'train', 'analysis.b.c'}
    assert upward(Path('sample.py'), 'import analysis, torch\nfrom train import x') == {'train.x'}


@pytest.mark.parametrize('file', FILES, ids=str)
def test_imports_go_downward(file):
    assert upward(file, (ROOT / file).read_text(encoding='utf-8')) == set()


def test_a_circle_of_drawers_is_found():
    a, b = Path('core/a/x.py'), Path('core/b/y.py')
    arrows = drawers({a: 'from core import b, a', b: 'def f():\n    import core.a.x'})
    assert arrows == {'a': {'b'}, 'b': {'a'}}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(arrows).prepare()


def test_cores_drawers_form_no_circle():
    files = {file: (ROOT / file).read_text(encoding='utf-8') for file in FILES if place(file) == 'core'}
    arrows = drawers({file: source for file, source in files.items() if len(file.parts) > 2})
    assert len(arrows) >= 4
    graphlib.TopologicalSorter(arrows).prepare()


@pytest.mark.parametrize('file', FILES, ids=str)
def test_no_file_is_too_long(file):
    lines = len((ROOT / file).read_text(encoding='utf-8').splitlines())
    most = MOST_LINES.get(str(file), 500)
    assert lines <= most, f'{file} has {lines} lines, {most} at most'


def test_the_whole_grows_no_further():
    files = [*FILES, *(ROOT / 'config').glob('*.py')]
    lines = sum(len((ROOT / file).read_text(encoding='utf-8').splitlines()) for file in files)
    most = f'{lines:,} lines outside tests, {MOST_IN_ALL:,} at most: take out what has become superfluous'
    assert lines <= MOST_IN_ALL, most
