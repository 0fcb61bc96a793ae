"""studies/heads.py: the scores are those of analysis/induction.py, and its tables can be made again."""

import json

import numpy as np
import pytest
import torch
from support import ROOT, forking

from analysis import induction
from core.runs import checkpoint as checkpoints
from core.runs import models
from core.runs.models import build_model
from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig

pytestmark = pytest.mark.slow

STUDY = 'studies/heads.py'
SMALL = dict(vocab_size=40, block_size=32, n_layer=2, n_head=2, n_embd=16, pos='rope', bias=False)


@pytest.fixture
def pair(tmp_path):
    """Two checkpoints of models with RoPE, and their folders."""
    torch.manual_seed(0)
    for name, model in (('a', GPT(GPTConfig(**SMALL))), ('b', MLAGPT(MLAConfig(**SMALL, n_latent=8, n_rope=4)))):
        (tmp_path / name).mkdir()
        checkpoints.save(str(tmp_path / name / 'ckpt.pt'), models.contents(model, {}, tokenizer={}, corpus=''))
    return [str(tmp_path / name) for name in 'ab']


def test_heads_of_the_first_model_are_followed_through_the_others(tmp_path, pair):
    arguments = [f'--models={",".join(pair)}', '--labels=one;other', '--texts=', f'--out_dir={tmp_path / "out"}']
    done = forking.run(STUDY, [*arguments, '--sequences=8', '--length=12', '--few=4', '--best=2'])
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / 'out' / 'heads.json').read_text())
    for label, folder in zip(('one', 'other'), pair, strict=True):
        model = build_model(checkpoints.load(checkpoints.find(folder))).eval()
        repeats = induction.repeated_sequences(8, 12, range(40), seed=1)
        wanted = induction.head_scores(model, repeats[4:])
        for name in ('induction', 'previous_token', 'sink'):
            assert np.allclose(found['models'][label]['scores'][name], wanted[name].mean(0), atol=1e-6)
        assert abs(found['models'][label]['repeat_loss']['mean'] - wanted['repeat_loss'].mean()) < 1e-5
        top = [tuple(found['chosen']['induction'][0][0])]  # ablated on sequences that didn't choose it
        without, whole = (induction.ablate_together(model, repeats[4:8], heads) for heads in (top, []))
        assert abs(found['models'][label]['ablated'][0]['rise'] - (without - whole).mean()) < 1e-6
    followed = found['models']['other']['replaced']['induction']
    assert [row['at'] for row in followed] == [at for at, _ in found['chosen']['induction'][:2]]
    assert 'content' in followed[0] and 'content' not in found['models']['one']['replaced']['induction'][0]
    again = forking.run(STUDY, [f'--reuse={tmp_path / "out" / "heads.json"}', f'--out_dir={tmp_path / "again"}'])
    assert again.returncode == 0, again.stderr
    assert (tmp_path / 'again' / 'heads.md').read_text() == (tmp_path / 'out' / 'heads.md').read_text()


def test_strong_heads_are_counted(tmp_path):
    named = ','.join(str(ROOT / 'models' / name) for name in ('repeats-mha', 'repeats-mla'))
    done = forking.run(STUDY, [f'--models={named}', '--texts=', f'--out_dir={tmp_path}', '--sequences=8'])
    assert done.returncode == 0, done.stderr
    assert 'induction: mean of 4 heads | above 0.2 |' in done.stdout
    assert [line.split('|')[4].strip() for line in done.stdout.splitlines() if 'repeats-m' in line][:2] == ['4', '4']


@pytest.mark.parametrize('labels', ['one', 'one;one'])
def test_every_model_needs_a_name_of_its_own(tmp_path, pair, labels):
    done = forking.run(STUDY, [f'--models={",".join(pair)}', f'--labels={labels}', f'--out_dir={tmp_path / "out"}'])
    assert done.returncode == 2 and 'each of the 2 models a name of its own' in done.stderr
    assert 'Traceback' not in done.stderr
