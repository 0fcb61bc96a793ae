"""Measure the models of a study with find_induction_heads.py, and read what it wrote."""

import json
import os

from core.cli import subprocesses


def measure(folder, **keys):
    """
    Measure the model in `folder` into `folder`/induction, unless that is newer than its ckpt.pt.

    keys: of find_induction_heads.py. UserError if it fails.
    """
    to = os.path.join(folder, 'induction')
    if not subprocesses.is_current(os.path.join(to, 'induction.json'), os.path.join(folder, 'ckpt.pt')):
        subprocesses.run_script('find_induction_heads.py', [dict(models=folder, out_dir=to, **keys)], folder)


def measurement(folder):
    """What was found in the model of a run: a dict."""
    return read_json(folder, 'induction', 'induction.json')['models'][0]


def sweep(folder):
    """What was found at each checkpoint of a run: a list of dicts."""
    return read_json(folder, 'induction', 'formation.json')['runs'][0]['checkpoints']


def read_json(*path):
    """The content of a JSON file."""
    with open(os.path.join(*path), encoding='utf-8') as file:
        return json.load(file)
