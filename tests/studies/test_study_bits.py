"""studies/bits.py: what it measures of checkpoints, in exact bytes; a study is drawn again from its numbers."""

import json
import shutil

import pytest
from support import forking
from support.training import write_characters

pytestmark = pytest.mark.slow


def study(place, *keys):
    return forking.run('studies/bits.py', (f'--data_dir={place}/data', '--jobs=1', '--windows=8', *keys), 300)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """The short form, at two iterations."""
    place = tmp_path_factory.mktemp('bits')
    write_characters(place / 'data' / 'shakespeare_char', 4000, 4300)
    done = study(place, f'--out_dir={place}/out', '--max_iters=2')
    assert done.returncode == 0, done.stderr
    (place / 'shown').write_text(done.stdout)
    return place


def test_every_basis_and_width_is_measured_in_exact_bytes(place):
    runs = json.loads((place / 'out' / 'bits.json').read_text())['runs']
    assert [run['attention'] for run in runs] == ['MHA', 'MLA, r=64', 'MLA, r=16']
    sizes = [{(row['basis'], row['bits']): row['bytes'] for row in run['rows']} for run in runs]
    assert {basis for basis, _ in sizes[0]} == {'own', 'noise'}
    # 4 layers; 4 heads of 32 keys and values each have a scale of two bytes; a latent of 64 has one
    assert sizes[0]['own', 4] == 4 * 4 * 2 * (16 + 2) and sizes[1]['own', 3] == 4 * (24 + 2)
    assert sizes[1]['own, groups of 32', 4] == 4 * (32 + 4) and sizes[1]['by component', 2] == 4 * (16 + 2)
    assert {'hadamard', 'components', 'balanced', 'noise'} < {basis for basis, _ in sizes[1]}
    assert ('own, groups of 32', 8) not in sizes[2]
    for run in runs:
        rises = {row['bits']: abs(row['rise']) for row in run['rows'] if row['basis'] == 'own'}
        assert 0 < rises[8] < rises[2] and set(run['heads']['induction']) == {'32', '8', '6', '4', '3', '2'}


def test_a_study_is_drawn_again_and_its_runs_are_kept(place, tmp_path):
    again = study(place, f'--out_dir={place}/out', '--max_iters=2')
    assert again.stdout == (place / 'shown').read_text()
    reused = study(place, f'--out_dir={tmp_path}', f'--reuse={place}/out/bits.json', f'--figure={tmp_path}/a.png')
    assert reused.returncode == 0 and reused.stdout == again.stdout, reused.stderr
    assert (tmp_path / 'a.png').stat().st_size > 10000
    wrong = study(place, f'--out_dir={tmp_path}', f'--reuse={place}/data/shakespeare_char/meta.json')
    assert wrong.returncode == 2 and "can't be read as a study" in wrong.stderr


def test_checkpoints_that_are_there_can_be_measured(place, tmp_path):
    folder = place / 'out' / 'shakespeare_char-2' / 'mla-r-c-8-kv-lr-1-8_s2000'
    done = study(place, f'--out_dir={tmp_path}', f'--sources={folder}')
    assert done.returncode == 0 and 'MLA, r=16' in done.stdout, done.stderr
    assert not list(tmp_path.rglob('ckpt.pt')) and len(list(tmp_path.rglob('bits-8.json'))) == 1


def test_seeds_of_one_model_share_its_label(place, tmp_path):
    runs = place / 'out' / 'shakespeare_char-2'
    for name, copy in (('mha', 'a_s1'), ('mha', 'a_s2'), ('mla-r-c-8', 'b_s1'), ('mla-r-c-8', 'c')):
        shutil.copytree(runs / f'{name}-kv-lr-1-8_s2000', tmp_path / copy)
    sources = ','.join(str(tmp_path / copy) for copy in ('a_s1', 'a_s2', 'b_s1', 'c'))
    done = study(place, f'--out_dir={tmp_path / "out"}', f'--sources={sources}', '--windows=2')
    assert done.returncode == 0, done.stderr
    labels = [run['label'] for run in json.loads((tmp_path / 'out' / 'bits.json').read_text())['runs']]
    assert labels == ['MHA', 'MHA', 'MLA, r=16: b_s1', 'MLA, r=16: c']
