"""Every public function of ops, core, analysis and the models says what it takes and what it returns."""

import ast

import pytest
from support import ROOT

FILES = [f'{name}.py' for name in ('model', 'model_mla')]
FILES += sorted(
    str(path.relative_to(ROOT)) for folder in ('ops', 'core', 'analysis') for path in (ROOT / folder).rglob('*.py')
)


def public_functions(tree):
    """The functions of a module and the methods of its classes, without nested ones and those with an underscore."""
    for node in tree.body:
        inner = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith('_') else [node]
        for function in inner:
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and not function.name.startswith('_'):
                yield function


def unannotated(function):
    """What a function doesn't annotate: names of arguments, and 'return'."""
    given = function.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    arguments += [argument for argument in (given.vararg, given.kwarg) if argument]
    missing = [a.arg for a in arguments if a.annotation is None and a.arg not in ('self', 'cls') and a.arg[0] != '_']
    return missing + ['return'] * (function.returns is None)


def faults(source):
    """['name of a function: what it lacks', ...] of the text of a module."""
    lacking = [(function.name, unannotated(function)) for function in public_functions(ast.parse(source))]
    return [f'{name}: {", ".join(missing)}' for name, missing in lacking if missing]


def test_what_is_missing_is_found():
    source = """
def whole(x: int, *_, y: str = '') -> int: ...
def half(x, *rest, y: int, **more): ...
def _own(x): ...
class Thing:
    def __init__(self, x): ...
    def method(self, x) -> None:
        def nested(y): ...
    @classmethod
    def made(cls, x: int) -> 'Thing': ...
class _Own:
    def method(self, x): ...
"""
    assert faults(source) == ['half: x, rest, more, return', 'method: x']


@pytest.mark.parametrize('file', FILES)
def test_every_public_function_is_annotated(file):
    assert not faults((ROOT / file).read_text(encoding='utf-8'))
