"""test_shakespeare_quick.py: both models are trained and compared; the same command resumes, another is refused."""

import json
import shutil

import pytest
import torch
from support import forking
from support.training import write_characters

pytestmark = pytest.mark.slow

SCRIPT = 'test_shakespeare_quick.py'


def compare(place, *flags):
    arguments = [f'--data_dir={place}/data', f'--out_dir={place}/out', '--size=cpu', '--max_iters=6', '--threads=1',
                 '--sample_tokens=8', '--start=a', '--compile=False', '--n_layer=1', '--block_size=16', '--pos=rope',
                 '--learning_rate=1e-3', '--n_latent=9', '--n_rope=4', *flags]  # fmt: skip
    return forking.run(SCRIPT, arguments, 240)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A finished comparison, with nothing said about dtype."""
    place = tmp_path_factory.mktemp('quick')
    write_characters(place / 'data' / 'shakespeare_char', 7000)
    done = compare(place)
    assert done.returncode == 0, done.stderr
    return place, done


def test_both_models_are_trained_and_compared(finished):
    place, done = finished
    numbers = json.loads((place / 'out' / 'comparison.json').read_text())
    mha, mla = numbers['results']['MHA'], numbers['results']['MLA, r=9']
    assert (mha['cache_bytes_per_token'], mla['cache_bytes_per_token']) == (4 * 2 * 128, 4 * (9 + 4))
    assert mha['iterations'] == mla['iterations'] == 6 and mha['val_loss'] != mla['val_loss']
    assert (place / 'out' / 'comparison.png').read_bytes().startswith(b'\x89PNG')
    assert f'{mla["val_loss"]:.4f}' in done.stdout and len(mla['sample']) == 9


def test_the_same_command_again_trains_nothing_anew(finished):
    place = finished[0]
    rows = (place / 'out' / 'mla' / 'log.csv').read_text()
    shutil.rmtree(place / 'out' / 'mha')  # as if interrupted: one model is missing
    again = compare(place)
    assert again.returncode == 0, again.stderr
    assert (place / 'out' / 'mla' / 'log.csv').read_text() == rows
    assert again.stdout.count('val loss: mean') == 1


def test_another_setting_in_the_same_folder_is_refused(finished):
    done = compare(finished[0], '--seed=1')
    assert done.returncode == 2 and 'out/mha holds a run with another seed; choose another --out_dir' in done.stderr


def test_any_training_key_reaches_both_models(finished):
    for name, expected in (('mha', dict(n_latent=0)), ('mla', dict(n_latent=9, n_rope=4))):
        config = torch.load(finished[0] / 'out' / name / 'ckpt.pt')['config']
        expected = dict(expected, n_layer=1, block_size=16, learning_rate=1e-3, pos='rope', lr_decay_iters=6)
        assert {key: config[key] for key in expected} == expected


def test_a_key_that_the_comparison_decides_is_refused(finished):
    done = compare(finished[0], '--init_from=gpt2')
    assert done.returncode == 2 and 'init_from cannot be given' in done.stderr
