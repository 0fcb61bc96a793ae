"""
What studies share: tuning and training by train.py, measuring heads by find_induction_heads.py, reading earlier numbers
and writing what was found.
"""

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import scipy.stats
from matplotlib.figure import Figure

from analysis import report, stats
from analysis.induction import Repeats, layouts, repeated_sequences
from core.cli import arguments, errors, subprocesses
from core.cli.errors import UserError
from core.runs import checkpoint as checkpoints
from core.text.tokenizer import tokenizer_of
from model import GPT


def run_of(out_dir: str, label: str, rate: float, seed: int) -> dict[str, Any]:
    """A training of the model with this label, as subprocesses.run_all takes it."""
    slug = ''.join(letter if letter.isalnum() else '-' for letter in label.lower())
    name = f'{slug}_lr{rate:g}_s{seed}'
    return dict(name=name, folder=os.path.join(out_dir, name), label=label, rate=rate, seed=seed)


def trained(run: dict[str, Any], command: list[str], keys: dict, snapshots: Sequence[int], data_dir: str) -> float:
    """
    The validation loss at the end of a run (see `run_of`), which is trained unless that is done; inf if it diverged.

    command: a script and its config file. keys: what makes the run; UserError where the folder holds one with others.
    snapshots: the iterations whose checkpoints are kept, the last of them the end.
    """
    last = os.path.join(run['folder'], f'ckpt_{snapshots[-1]:06}.pt')
    keys = keys | dict(learning_rate=run['rate'], min_lr=run['rate'] / 10, seed=run['seed'])
    keys |= dict(max_iters=snapshots[-1], lr_decay_iters=snapshots[-1])
    done = [path for path in (last, os.path.join(run['folder'], 'ckpt.pt')) if os.path.exists(path)]
    if done:
        found = checkpoints.load(done[0], mapped=True)['config']
        if wrong := [key for key, value in keys.items() if value not in ('auto', found.get(key))]:
            raise UserError(f'{run["folder"]} holds a run with another {", ".join(wrong)}; choose another --out_dir')
    if last not in done:
        keys |= dict(eval_interval=snapshots[-1], eval_iters=64, keep_checkpoints=','.join(map(str, snapshots)))
        keys |= dict(out_dir=run['folder'], data_dir=data_dir, resume='auto', checkpoint_interval=500)
        if not subprocesses.converges(command[0], [*command[1:], keys | dict(device='cpu', threads=1)], run['folder']):
            return float('inf')
    return float(checkpoints.load(last, mapped=True)['val_loss'])


def tune(
    labels: Sequence[str], rates: Sequence[float], losses: Callable[[list[tuple[str, float]]], dict]
) -> dict[str, dict[float, float]]:
    """
    {label: {learning rate: loss}}, grids in which every model's best rate has a worse one on either side.

    rates: the grid that all begin with, and that grows by factors of 2. losses: of [(label, rate)], as a dict by these.
    """
    grids: dict[str, dict] = {label: {} for label in labels}
    wanted = [(label, rate) for label in labels for rate in rates]
    while wanted:
        for (label, rate), loss in losses(wanted).items():
            grids[label][rate] = loss
        wanted = []
        for label, grid in grids.items():
            best = best_rate(grid)
            if best in (min(grid), max(grid)):
                wanted.append((label, best / 2 if best == min(grid) else best * 2))
    return {label: dict(sorted(grid.items())) for label, grid in grids.items()}


def best_rate(grid: dict[float, float]) -> float:
    """The learning rate of the lowest loss; the lowest of those that are equal, as where all diverged."""
    return min(sorted(grid), key=lambda rate: grid[rate])


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


def log_rank(groups: dict[str, list[dict]], end: int) -> dict[str, float]:
    """
    Do other models form heads at other times than the first? p by the log-rank test, after Holm's correction.

    groups: {label: its runs, each with its time 'formed', None if it had formed none at `end`}. Pairs without any time
    are left out.
    """

    known = {label: [r['formed'] for r in group if r['formed']] for label, group in groups.items()}
    ends = {label: [end] * (len(group) - len(known[label])) for label, group in groups.items()}
    times = {label: scipy.stats.CensoredData(uncensored=known[label], right=ends[label]) for label in groups}
    first, *others = groups
    able = [label for label in others if known[label] or known[first]]
    ps = [scipy.stats.logrank(times[label], times[first]).pvalue for label in able]
    return dict(zip(able, stats.holm(ps), strict=True))


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
