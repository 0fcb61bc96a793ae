"""studies/bits.py: what it measures of checkpoints, in exact bytes; a study is drawn again from its numbers."""

import json

import pytest
import torch
from support import forking
from support.planted import randomized, save
from support.training import write_characters

from core.text.meta import read_meta
from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig

pytestmark = pytest.mark.slow

SIZES = dict(block_size=32, n_layer=4, n_head=4, n_embd=128, bias=False)
MODELS = {'a_s1': {}, 'a_s2': {}, 'b_s1': dict(n_latent=64), 'c': dict(n_latent=16), 'd': dict(n_latent=16, pos='rope')}


def study(place, *keys):
    return forking.run('studies/bits.py', (f'--data_dir={place}/data', '--jobs=1', '--windows=8', *keys), 300)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A study of five models with random parameters, and what it printed."""
    place = tmp_path_factory.mktemp('bits')
    write_characters(place / 'data' / 'shakespeare_char', 4000, 4300)
    sizes = dict(SIZES, vocab_size=read_meta(str(place / 'data' / 'shakespeare_char'))['vocab_size'])
    for name, keys in MODELS.items():
        model = MLAGPT(MLAConfig(**sizes, **keys)) if keys else GPT(GPTConfig(**sizes))
        torch.manual_seed(0)
        save(place / name, randomized(model, 0.1), config={'dataset': 'shakespeare_char'})
    done = study(place, f'--out_dir={place}/out', f'--sources={",".join(str(place / name) for name in MODELS)}')
    assert done.returncode == 0, done.stderr
    (place / 'shown').write_text(done.stdout)
    return place


def test_every_basis_and_width_is_measured_in_exact_bytes(place):
    runs = json.loads((place / 'out' / 'bits.json').read_text())['runs']
    assert [run['label'] for run in runs] == ['MHA', 'MHA', 'MLA, r=64', 'MLA, r=16: c', 'MLA, r=16: d']
    sizes = [{(row['basis'], row['bits']): row['bytes'] for row in run['rows']} for run in runs[1:]]
    assert {basis for basis, _ in sizes[0]} == {'own', 'hadamard', 'noise'}
    # 4 layers; 4 heads of 32 keys and values each have a scale of two bytes; a latent of 64 has one
    assert sizes[0]['own', 4] == 4 * 4 * 2 * (16 + 2) and sizes[1]['own', 3] == 4 * (24 + 2)
    assert sizes[1]['own, groups of 32', 4] == 4 * (32 + 4) and sizes[1]['by component', 2] == 4 * (16 + 2)
    assert {'hadamard', 'components', 'balanced', 'noise'} < {basis for basis, _ in sizes[1]}
    assert ('own, groups of 32', 8) not in sizes[2]
    assert sizes[3]['own', 8] == sizes[2]['own', 8] + 4 * 2 * 16, 'a rotated key of 16 numbers in two bytes each'
    for run in runs:
        rises = {row['bits']: abs(row['rise']) for row in run['rows'] if row['basis'] == 'own'}
        assert 0 < rises[8] < rises[2] and set(run['heads']['induction']) == {'32', '8', '6', '4', '3', '2'}


def test_a_study_is_drawn_again_and_its_measurements_are_kept(place, tmp_path):
    again = study(place, f'--out_dir={place}/out', f'--sources={",".join(str(place / name) for name in MODELS)}')
    assert again.stdout == (place / 'shown').read_text()
    reused = study(place, f'--out_dir={tmp_path}', f'--reuse={place}/out/bits.json', f'--figure={tmp_path}/a.png')
    assert reused.returncode == 0 and reused.stdout == again.stdout, reused.stderr
    assert (tmp_path / 'a.png').stat().st_size > 10000
    wrong = study(place, f'--out_dir={tmp_path}', f'--reuse={place}/data/shakespeare_char/meta.json')
    assert wrong.returncode == 2 and "can't be read as a study" in wrong.stderr
    nothing = study(place, f'--out_dir={tmp_path}')
    assert nothing.returncode == 2 and 'name checkpoints with --sources' in nothing.stderr
