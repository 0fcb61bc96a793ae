"""
For the tests of bad input: a place in which everything is as it should be, ways to break one file of it, and what has
to follow.

Each case of the test files' tables ends in one line on stderr that names the fault and the remedy, with exit code 2,
without a traceback, and with every file as it was.
"""

import json
import os
import pickle
import re
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from core.runs import checkpoint as checkpoints
from core.runs import models
from core.text.tokenizer import ByteTokenizer, CharTokenizer
from core.text.write_dataset import write_dataset
from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig
from ops.optimizers import adamw, param_groups
from support import ROOT, forking  # noqa: F401  (ROOT for the tests)

SIZES = dict(n_layer=1, n_head=2, n_embd=8, block_size=16)
SMALL = dict(SIZES, batch_size=2, gradient_accumulation_steps=1, max_iters=1, eval_iters=1)
CPU = dict(device='cpu', threads=1)
PROOF = Path(tempfile.gettempdir()) / f'a_pickle_ran_code_{os.getpid()}'


# ---- the place in which everything is as it should be ----------------------------------------------------------------
def save(path, model, tokenizer, **more):
    path.parent.mkdir()
    optimizer = adamw(param_groups(model.named_parameters(), 0.1), 1e-3, (0.9, 0.95), 'cpu')
    model(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64))[1].backward()
    optimizer.step()
    config = dict(SMALL, dataset='tiny')
    checkpoints.save(
        str(path), models.contents(model, config, optimizer=optimizer.state_dict(), tokenizer=tokenizer, **more)
    )


def make_place(folder):
    """A data set, an MHA and an MLA checkpoint in `folder`, a prompt and a config file: every case breaks one thing."""
    ids = np.arange(1000) * 7 % 12
    letters, splits = CharTokenizer('abcdefghijkl'), {'train': ids[:900], 'val': ids[900:]}
    meta = write_dataset(folder / 'data' / 'tiny', letters, splits, source='a test')
    write_dataset(folder / 'data' / 'wide', ByteTokenizer(), {'train': ids, 'val': ids}, source='bytes')
    write_dataset(folder / 'data' / 'rows', None, {'train': ids[:990], 'val': ids[:99]}, source='rows',
                  vocab_size=12, row_tokens=11, masks={'train': 0 * ids[:990], 'val': 0 * ids[:99]})  # fmt: skip
    save(folder / 'mha' / 'ckpt.pt', GPT(GPTConfig(vocab_size=12, **SIZES)), meta, iter_num=1, corpus='a test')
    save(folder / 'mla' / 'ckpt.pt', MLAGPT(MLAConfig(vocab_size=12, **SIZES)), meta, iter_num=1, corpus='a test')
    (folder / 'mha' / 'log.csv').write_text('iter,loss\n0,2.5\n')
    (folder / 'config.py').write_text('max_iters = 1\n')
    (folder / 'prompt.txt').write_text('abc')


def snapshot(folder):
    """Every file below a folder with its bytes and the time of its last change."""
    return {
        str(path.relative_to(folder)): (path.read_bytes() if path.is_file() else None, path.lstat().st_mtime_ns)
        for path in folder.rglob('*')
        if path.is_file() or not any(path.iterdir())
    }


# ---- ways to break a file --------------------------------------------------------------------------------------------
def write(path, content):
    """A damage: the file `path` of the place has this content, str or bytes."""

    def damage(place):
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def remove(path):
    """A damage: the file or folder is not there."""
    return lambda place: shutil.rmtree(place / path) if (place / path).is_dir() else (place / path).unlink()


def folder(path):
    """A damage: a folder takes the place of the file."""

    def damage(place):
        (place / path).unlink(missing_ok=True)
        (place / path).mkdir(parents=True)

    return damage


def cut(path, size):
    """A damage: the file ends after `size` bytes, from its end where negative, or after that part of it."""

    def damage(place):
        whole = (place / path).read_bytes()
        (place / path).write_bytes(whole[: int(len(whole) * size) if isinstance(size, float) else size])

    return damage


def meta(**changes):
    """A damage: meta.json has these values; None takes one away."""

    def damage(place):
        path = place / 'data' / 'tiny' / 'meta.json'
        changed = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in changed.items() if v is not None}))

    return damage


def ckpt(change):
    """A damage: what change(checkpoint) did, or made, is in the checkpoint."""

    def damage(place):
        path = place / 'mha' / 'ckpt.pt'
        content = torch.load(path)
        changed = change(content)
        torch.save(content if changed is None else changed, path)

    return damage


class Payload:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (str(PROOF),)


def nanogpt_meta(content):
    """A damage: nanoGPT's meta.pkl with this content is all that says what the tokens are."""

    def damage(place):
        remove('data/tiny/meta.json')(place)
        (place / 'data' / 'tiny' / 'meta.pkl').write_bytes(pickle.dumps(content))

    return damage


def both(*damages):
    """A damage: several."""
    return lambda place: [damage(place) for damage in damages]


# ---- cases -----------------------------------------------------------------------------------------------------------
class Case(NamedTuple):
    """What is typed, what the line must name as the fault and as the remedy (regular expressions), and what is broken.

    {place} in an argument stands for the folder that make_place made; scripts get working arguments before these. A str
    of arguments is split at spaces.
    """

    script: str
    arguments: str | list
    fault: str
    remedy: str
    damage: object = None


ARGUMENTS = {
    'train.py': {'out_dir': '{place}/out', 'data_dir': '{place}/data', 'dataset': 'tiny', **SMALL, **CPU},
    'sample.py': {'out_dir': '{place}/mha', 'data_dir': '{place}/data', 'start': 'a', 'max_new_tokens': 2, **CPU},
    'compare.py': {'runs': '{place}/mha,{place}/mla', 'out_dir': '{place}/out', 'data_dir': '{place}/data', **CPU},
    'convert_mla.py': {'source': '{place}/mha', 'out_dir': '{place}/out', 'data_dir': '{place}/data', **CPU},
    'export_hf.py': {'source': '{place}/mha', 'out_dir': '{place}/out'},
    'find_induction_heads.py': {'models': '{place}/mha', 'out_dir': '{place}/out', 'data_dir': '{place}/data', **CPU},
    'corpus_statistics.py': {'datasets': 'tiny', 'data_dir': '{place}/data', 'block_size': 16},
    'test_shakespeare_quick.py': {'out_dir': '{place}/out', 'data_dir': '{place}/data', 'dataset': 'tiny',
                                  'max_iters': 1, **CPU},
    'bench.py': {**SIZES, **CPU, 'batch_size': 1, 'vocab_size': 64, 'rounds': 1},
    'studies/induction.py': {'out_dir': '{place}/out', 'data_dir': '{place}/data'},
    'studies/contest.py': {'out_dir': '{place}/out', 'dataset': 'tiny', 'data_dir': '{place}/data'},
    'studies/induction_text.py': {'out_dir': '{place}/out', 'dataset': 'tiny', 'data_dir': '{place}/data'},
    'studies/smollm2.py': {'out_dir': '{place}/out', 'texts': 'tiny,tiny', 'data_dir': '{place}/data'},
    'data/text/prepare.py': {'out_dir': '{place}/out', 'input': '{place}/prompt.txt'},
    'data/code/prepare.py': {'out_dir': '{place}/out', 'input': '{place}/prompt.txt'},
    'data/shakespeare_char/prepare.py': {'out_dir': '{place}/out', 'input': '{place}/prompt.txt'},
    'data/shakespeare/prepare.py': {'out_dir': '{place}/out', 'input': '{place}/prompt.txt'},
    'data/openwebtext/prepare.py': {'out_dir': '{place}/out'},
    'data/hub/prepare.py': {'out_dir': '{place}/out', 'input': '{place}/prompt.txt', 'tokenizer': 'byte'},
    'data/smollm2/prepare.py': {'out_dir': '{place}/out', 'input': '{place}/prompt.txt'},
    'data/repeats/prepare.py': {'folder': '{place}/out', 'rows': 8, 'val_rows': 8},
}  # fmt: skip
ARGUMENTS['train_mla.py'] = ARGUMENTS['train.py']
ARGUMENTS['sample_mla.py'] = {**ARGUMENTS['sample.py'], 'out_dir': '{place}/mla'}

T, TM, S, C, E, F = 'train.py', 'train_mla.py', 'sample.py', 'convert_mla.py', 'export_hf.py', 'find_induction_heads.py'
BENCH, Q = 'bench.py', 'test_shakespeare_quick.py'
STUDY, CONTEST, STUDY_TEXT = (f'studies/{name}.py' for name in ('induction', 'contest', 'induction_text'))
TEXT, CHAR, GPT2, WEB, REPEATS = (
    f'data/{name}/prepare.py' for name in ('text', 'shakespeare_char', 'shakespeare', 'openwebtext', 'repeats')
)
RESUME = '--init_from=resume --out_dir={place}/mha'
RESUME_MLA = '--init_from=resume --out_dir={place}/mla'
PREPARE = r'data/text/prepare\.py'  # the remedy for most of what is wrong with data
OTHER = 'older copy|only load checkpoints saved by'


def command_line(case, place):
    """The arguments of a case: those with which the script would work, then the case's own."""
    usual = [f'--{key}={value}' for key, value in ARGUMENTS[case.script].items()]
    own = case.arguments.split() if isinstance(case.arguments, str) else case.arguments
    return [argument.replace('{place}', str(place)) for argument in [*usual, *own]]


def check(case, place, code, errors):
    """What every wrong input ends in."""
    assert 'Traceback' not in errors, errors
    lines = errors.splitlines()
    assert code == 2, (code, errors)
    assert lines[-1].startswith('error: ') and sum(line.startswith('error: ') for line in lines) == 1, errors
    assert re.search(case.fault, lines[-1]), lines[-1]
    assert re.search(case.remedy, lines[-1]), lines[-1]
    assert len(lines[-1].replace(str(place), '')) < 400, lines[-1]


def cases(**groups):
    """The cases of named groups, lists of Case, for pytest's parametrize: a list."""
    found = []
    for name, group in groups.items():
        for number, case in enumerate(group):
            typed = case.arguments if isinstance(case.arguments, str) else ascii(' '.join(case.arguments))
            label = f'{name}-{number:03}-{Path(case.script).stem}-{typed.replace("{place}", "")[:40]}'
            found.append(pytest.param(case, id=label.replace(' ', '')))
    return found


def assert_refused(case, place):
    """Break what the case breaks, run its script, and check what follows; nothing but the damage may change."""
    if case.damage:
        case.damage(place)
    before = snapshot(place)
    done = forking.run(case.script, command_line(case, place))
    check(case, place, done.returncode, done.stderr)
    assert snapshot(place) == before
    assert not PROOF.exists()
