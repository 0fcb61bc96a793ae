"""Training in bfloat16 and compiled: the losses of float32 and of eager mode, to the rounding of each."""

import shutil

import pytest
from support.training import SCRIPTS, assert_same_curve, log_of, run

# with MLA, every kind of layer that it can have
KEYS = {'mha': dict(bias=True), 'mla': dict(bias=True, pos='rope', n_latent_q=12, latent_norm=True)}


@pytest.mark.parametrize('attention', SCRIPTS)
@pytest.mark.slow
def test_bfloat16_learns_as_float32_does(attention, data_dir, tmp_path):
    for dtype in ('float32', 'bfloat16'):
        done = run(SCRIPTS[attention], data_dir, tmp_path / dtype, dtype=dtype, **KEYS[attention])
        assert done.returncode == 0, done.stderr
        assert 'Warning' not in done.stderr
    assert_same_curve(tmp_path / 'float32', tmp_path / 'bfloat16', tolerance=0.03)
    exact, rounded = ([row['loss'] for row in log_of(tmp_path / dtype)][:-1] for dtype in ('float32', 'bfloat16'))
    assert exact != rounded and float(rounded[-1]) < float(rounded[0]) - 0.5


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which('c++') or shutil.which('g++')), reason='needs a C++ compiler')
def test_a_compiled_model_learns_as_an_eager_one_does(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.setenv('TORCHINDUCTOR_COMPILE_THREADS', '1')  # no process of its own, which would import everything
    keys = dict(KEYS['mla'], n_layer=1, max_iters=4, eval_interval=2)
    assert run('train_mla.py', data_dir, tmp_path / 'eager', **keys).returncode == 0
    done = run('train_mla.py', data_dir, tmp_path / 'compiled', compile=True, fresh=True, **keys)
    assert done.returncode == 0, done.stderr
    assert any((tmp_path / 'cache').iterdir())
    assert_same_curve(tmp_path / 'eager', tmp_path / 'compiled', tolerance=1e-4)
