"""train.py's arithmetic: clipping, loss scaling, accumulation and dropout masks, seen from what a run leaves behind."""

import runpy
import sys

import numpy as np
import pytest
import torch
from support.training import ROOT, assert_same_curve, command, log_of, run

from core.cli import machine
from core.text.tokenizer import CharTokenizer
from core.text.write_dataset import write_dataset

ONE_STEP = dict(max_iters=1, warmup_iters=0, eval_interval=100)


def run_here(monkeypatch, data_dir, out_dir, **changes):
    """train.py in this process, which a test may have changed; its exit code."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'argv', command('train.py', data_dir, out_dir, **changes)[1:])
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    try:
        runpy.run_path('train.py', run_name='__main__')
    except SystemExit as leave:
        return leave.code
    return 0


def first_gradient(folder):
    """The gradient that AdamW saw in its only step, as one vector: its first moment is (1 - beta1) times that."""
    state = torch.load(folder / 'ckpt.pt')['optimizer']['state']
    return torch.cat([entry['exp_avg'].flatten() for entry in state.values()]) / (1 - 0.9)


def test_the_gradient_is_clipped_to_the_norm_asked_for(data_dir, tmp_path):
    for name, clip in (('free', 0), ('loose', 100), ('tight', 0.01)):
        assert run('train.py', data_dir, tmp_path / name, **ONE_STEP, grad_clip=clip).returncode == 0
    free, loose, tight = (first_gradient(tmp_path / name) for name in ('free', 'loose', 'tight'))
    norm = float(log_of(tmp_path / 'free')[0]['grad_norm'])
    assert norm > 0.1 and free.norm().item() == pytest.approx(norm, rel=1e-4)
    torch.testing.assert_close(loose, free)
    assert tight.norm().item() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(tight / 0.01, free / norm, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('clip', [0.01, 100])
def test_loss_scaling_changes_neither_the_gradient_nor_its_clipping(clip, data_dir, tmp_path, monkeypatch):
    """float16 with a GradScaler is for GPUs; here it runs on the CPU."""
    assert run('train.py', data_dir, tmp_path / 'plain', **ONE_STEP, grad_clip=clip).returncode == 0
    monkeypatch.setattr(machine, 'pick_dtype', lambda *_: 'float16')
    assert run_here(monkeypatch, data_dir, tmp_path / 'scaled', **ONE_STEP, grad_clip=clip) == 0
    plain, scaled = (first_gradient(tmp_path / name) for name in ('plain', 'scaled'))
    assert torch.load(tmp_path / 'scaled' / 'ckpt.pt')['scaler']['scale'] == 65536
    assert (scaled - plain).norm() < 0.02 * plain.norm()
    norms = [float(log_of(tmp_path / name)[0]['grad_norm']) for name in ('plain', 'scaled')]
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


def test_an_overflow_of_float16_skips_the_step_and_is_no_divergence(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, 'pick_dtype', lambda *_: 'float16')
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, 'GradScaler', lambda *a, **k: scaler(*a, **k, init_scale=2.0**40))
    assert run_here(monkeypatch, data_dir, tmp_path, max_iters=40, checkpoint_interval=1) == 0
    rows = log_of(tmp_path)
    assert not np.isfinite(float(rows[0]['grad_norm'])) and np.isfinite(float(rows[-2]['grad_norm']))
    saved = torch.load(tmp_path / 'ckpt.pt')
    assert saved['scaler']['scale'] < 2.0**40 and float(rows[-1]['val_loss']) < float(rows[0]['val_loss']) - 0.3
    assert all(tensor.isfinite().all() for tensor in saved['model'].values())


def test_micro_batches_of_one_iteration_average(data_dir, tmp_path):
    run('train.py', data_dir, tmp_path / 'one', batch_size=8)
    run('train.py', data_dir, tmp_path / 'four', batch_size=2, gradient_accumulation_steps=4, eval_iters=16)
    assert_same_curve(tmp_path / 'one', tmp_path / 'four')
    norms = [[float(row['grad_norm'] or 0) for row in log_of(tmp_path / name)] for name in ('one', 'four')]
    np.testing.assert_allclose(*norms, rtol=1e-3)


def test_every_rank_and_every_micro_step_draws_its_own_dropout_masks(tmp_path):
    """On a text of one character all rows are the same, so only masks can make losses differ."""
    same = np.zeros(4000, dtype=np.int64)
    write_dataset(
        tmp_path / 'data' / 'tiny', CharTokenizer('ab'), {'train': same[:3500], 'val': same[3500:]}, source='a'
    )
    keys = dict(dropout=0.5, max_iters=2)
    run('train.py', tmp_path / 'data', tmp_path / 'one', **keys)
    run('train.py', tmp_path / 'data', tmp_path / 'micro', **keys, gradient_accumulation_steps=2)
    done = run('train.py', tmp_path / 'data', tmp_path / 'ranks', processes=2, **keys, gradient_accumulation_steps=2)
    assert done.returncode == 0, done.stderr
    first = {name: float(log_of(tmp_path / name)[0]['loss']) for name in ('one', 'micro', 'ranks')}
    assert len(set(first.values())) == 3 and max(first.values()) - min(first.values()) < 0.5
    assert len({row['loss'] for row in log_of(tmp_path / 'one')[:2]}) == 2
