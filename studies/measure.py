"""What studies share: measuring heads by find_induction_heads.py, reading earlier numbers, writing what was found."""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure

from analysis import report
from analysis.induction import Repeats, layouts, repeated_sequences
from core.cli import arguments, errors, subprocesses
from core.cli.errors import UserError
from core.text.tokenizer import tokenizer_of
from model import GPT


def measure(folder: str, **keys: object) -> dict:
    """
    What was found in the model in `folder`, which is measured unless `folder`/induction is newer than its ckpt.pt.

    keys: of find_induction_heads.py. UserError if it fails.
    """
    to = os.path.join(folder, 'induction')
    if not subprocesses.is_current(os.path.join(to, 'induction.json'), os.path.join(folder, 'ckpt.pt')):
        keys |= dict(models=folder, out_dir=to, html=False, threads=1)
        subprocesses.run_script('find_induction_heads.py', [keys], folder)
    return read_json(to, 'induction.json')['models'][0]


def sweep(folder: str) -> list[dict]:
    """What was found at each checkpoint of a run."""
    return read_json(folder, 'induction', 'formation.json')['runs'][0]['checkpoints']


def best_heads(found: dict) -> dict:
    """The best induction head and the best previous-token head of what `measure` found, with their scores."""
    layer, head = best = found['ranking'][0]
    previous = np.array(found['previous_token']['mean'])
    return dict(
        best=best,
        score=found['induction']['mean'][layer][head],
        random_null=found['random_null'],
        copying=found['copying_eigenvalues'][layer][head],
        best_previous=[int(i) for i in np.unravel_index(previous.argmax(), previous.shape)],
        previous=float(previous.max()),
    )


def formed(curve: list[tuple[int, float]], threshold: float) -> int | None:
    """When the best induction score of a run first exceeded a threshold; None if it never did."""
    return next((time for time, score in curve if score > threshold), None)


def repeated(model: GPT, tokenizer: dict, count: int, length: int, seed: int) -> Repeats:
    """`count` sequences with a block of `length` random tokens of text twice, behind the token that begins a text."""
    ids, bos = np.arange(model.config.vocab_size), None
    if found := tokenizer_of(tokenizer, model.config.vocab_size):
        ids, bos = found.text_ids(), found.end_of_text
    layout = layouts(length, model.config.block_size - (bos is not None), len(ids))['main']
    return repeated_sequences(count, ids=ids, bos=bos, seed=seed, **layout)


def places(group: list[dict], key: str) -> str:
    """The layer.head of every run of a group, as a table's cell."""
    return ', '.join('.'.join(map(str, run[key])) for run in group)


def read_json(*path: str) -> dict:
    """The content of a JSON file."""
    with open(os.path.join(*path), encoding='utf-8') as file:
        return json.load(file)


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """A context in which the .json of a study is read and used; UserError where it lacks something. '': no .json."""
    try:
        yield
    except (OSError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if not path:
            raise
        raise UserError(f"{path} can't be read as a study ({error}); name the .json of another") from error


def commit() -> str:
    """The commit of this repository; '' where it is none."""
    done = subprocess.run(['git', 'describe', '--always', '--dirty'], capture_output=True, text=True)
    return done.stdout.strip()


def outputs(config: dict, name: str) -> tuple[str, str]:
    """
    Where a study writes its tables and its picture: config's `table` and `figure`, or NAME.md and NAME.png in out_dir.

    To be called before the first run. UserError where one of them can't be written.
    """
    arguments.check_folder(config['out_dir'])
    for key in ('figure', 'table'):
        if config[key]:
            arguments.check_file(config[key], key)
    in_out_dir = os.path.join(config['out_dir'], name)
    return config['table'] or f'{in_out_dir}.md', config['figure'] or f'{in_out_dir}.png'


def save(paths: tuple[str, str], text: str, picture: Figure, numbers: object = None) -> None:
    """Print a study's tables, and write them, its picture and, beside that, a .json of its numbers if there are new."""
    table, figure = paths
    for path in paths:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    errors.output(text.rstrip('\n'))
    report.save_text(table, text)
    report.save_figure(figure, picture)
    if numbers is not None:
        report.save_json(os.path.splitext(figure)[0] + '.json', numbers)
