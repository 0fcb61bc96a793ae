"""Every public function of ops, core, analysis and the models says what it takes and what it returns."""

import ast

import pytest
from support import ROOT

FILES = [f'{name}.py' for name in ('model', 'model_mla')]
FILES += sorted(
    str(path.relative_to(ROOT)) for folder in ('ops', 'core', 'analysis') for path in (ROOT / folder).rglob('*.py')
)
NOT_YET = [
    'model.py',
    'model_mla.py',
    'analysis/bigrams.py',
    'analysis/circuits.py',
    'analysis/comparison.py',
    'analysis/forward.py',
    'analysis/induction.py',
    'analysis/latent.py',
    'analysis/report.py',
    'analysis/speed.py',
    'analysis/stats.py',
    'core/cli/arguments.py',
    'core/cli/errors.py',
    'core/cli/files.py',
    'core/cli/machine.py',
    'core/cli/ranges.py',
    'core/cli/signals.py',
    'core/cli/subprocesses.py',
    'core/convert/factorize.py',
    'core/convert/gpt2.py',
    'core/convert/hf_modeling_mla.py',
    'core/convert/int8.py',
    'core/runs/checkpoint.py',
    'core/runs/evaluation.py',
    'core/runs/folder.py',
    'core/runs/log.py',
    'core/runs/processes.py',
    'core/runs/resume.py',
    'core/speed/gpus.py',
    'core/speed/peers.py',
    'core/speed/planner.py',
    'core/speed/rivals.py',
    'core/speed/timing.py',
    'core/text/dataset.py',
    'core/text/text_files.py',
    'core/text/tokenizer.py',
    'core/text/write_dataset.py',
    'ops/checks.py',
    'ops/decoding.py',
    'ops/kernels.py',
    'ops/optimizers.py',
]


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
    found = faults((ROOT / file).read_text(encoding='utf-8'))
    if file in NOT_YET:
        assert found, f'{file} is annotated now: take it off NOT_YET'
    else:
        assert not found


def test_what_is_not_annotated_yet_exists():
    assert set(NOT_YET) <= set(FILES)
