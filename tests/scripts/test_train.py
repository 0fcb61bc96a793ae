"""train.py and train_mla.py as a user runs them: golden curves, exact resume, signals, torchrun, safe folders."""

import csv
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from support.training import ROOT, SCRIPTS, assert_same_run, killed, log_of, run, started


@pytest.mark.parametrize('curve', ['mha', 'mla', 'mla-0.1.0'])
def test_the_golden_curve_holds(curve, data_dir, tmp_path):
    kind = curve[:3]
    keys = {'mha': {}, 'mla': dict(kv_lr=1 / 8), 'mla-0.1.0': dict(latent_init='gpt2')}[curve]
    done = run(SCRIPTS[kind], data_dir, tmp_path, **keys)
    assert done.returncode == 0, done.stderr
    rows = log_of(tmp_path)
    with open(ROOT / 'tests' / 'golden' / f'{curve}.csv', newline='') as file:
        golden = list(csv.DictReader(file))
    assert [row['iter'] for row in rows] == [row['iter'] for row in golden] == [str(n) for n in range(21)]
    for row, expected in zip(rows, golden, strict=True):
        for name in ('tokens', 'lr', 'loss', 'train_loss', 'val_loss', 'val_stderr', 'grad_norm'):
            assert bool(row[name]) == bool(expected[name])
            if expected[name]:
                assert float(row[name]) == pytest.approx(float(expected[name]), rel=1e-3, abs=1e-5), (row['iter'], name)
    assert float(rows[-1]['val_loss']) < float(rows[0]['val_loss']) - 0.3
    assert {'ckpt.pt', 'ckpt_best.pt', 'log.csv'} == set(os.listdir(tmp_path))
    assert 'step 20: train loss' in done.stdout and 'Traceback' not in done.stderr
    checkpoint = torch.load(tmp_path / 'ckpt.pt')
    assert (checkpoint['attention'], checkpoint['iter_num'], checkpoint['corpus']) == (kind, 20, 'a test')
    assert checkpoint['tokenizer']['chars'] == 'abcdefghijkl'


def test_both_models_see_the_same_batches_whatever_else_differs(data_dir, tmp_path):
    """Without learning, the loss of iteration n is a fingerprint of batch n."""
    still = dict(learning_rate=1e-30, min_lr=0, weight_decay=0, max_iters=6)
    run('train.py', data_dir, tmp_path / 'a', **still)
    run('train.py', data_dir, tmp_path / 'b', **still, eval_interval=2, log_interval=1, always_save_checkpoint=False)
    losses = [[row['loss'] for row in log_of(tmp_path / x)[:6]] for x in 'ab']
    assert losses[0] == losses[1] and len(set(losses[0])) == 6


@pytest.mark.slow
def test_a_run_killed_and_resumed_is_the_run(data_dir, tmp_path):
    """MHA, and gradient accumulation; test_faults.py kills more, and MLA."""
    extra = dict(dropout=0.2, checkpoint_interval=3, max_iters=60, lr_decay_iters=60, gradient_accumulation_steps=2)
    assert run('train.py', data_dir, tmp_path / 'whole', **extra).returncode == 0
    broken = tmp_path / 'broken'
    for kills in range(2):
        process = started('train.py', data_dir, broken, init_from='auto', **extra)
        seen = 0
        for line in process.stdout:
            seen += line.startswith('iter ')
            if seen == 9 + 7 * kills:
                break
        assert killed(process, broken) == -signal.SIGKILL
    done = run('train.py', data_dir, broken, init_from='auto', **extra)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / 'whole', broken)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, 'SIGUSR1'), reason='this system has no SIGUSR1')
@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT', 'SIGUSR1'])
def test_a_signal_lets_the_step_finish_and_saves(name, data_dir, tmp_path):
    endless = dict(max_iters=100000, eval_interval=100000)
    process = started('train.py', data_dir, tmp_path, errors=subprocess.PIPE, **endless)
    for line in process.stdout:
        if line.startswith('iter 5:'):
            break
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 85
    assert f'stopped by {name} at iteration' in errors and 'Traceback' not in errors
    assert torch.load(tmp_path / 'ckpt.pt')['iter_num'] >= 6


def test_another_run_is_not_overwritten_unasked(data_dir, tmp_path):
    assert run('train.py', data_dir, tmp_path, max_iters=3).returncode == 0
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    done = run('train.py', data_dir, tmp_path, max_iters=3)
    assert done.returncode == 2 and 'holds another run' in done.stderr and 'Traceback' not in done.stderr
    done = run('train_mla.py', data_dir, tmp_path, init_from='resume')
    assert done.returncode == 2 and 'resume it with python train.py' in done.stderr
    done = run('train.py', data_dir, tmp_path, init_from='resume', eval_only=True)
    assert done.returncode == 0 and 'step 3: val loss' in done.stdout
    assert before == {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    assert run('train.py', data_dir, tmp_path, max_iters=2, overwrite=True, seed=3).returncode == 0
    assert torch.load(tmp_path / 'ckpt.pt')['iter_num'] == 2 and len(log_of(tmp_path)) == 3


def test_a_loss_that_is_not_finite_never_reaches_a_checkpoint(data_dir, tmp_path):
    assert run('train.py', data_dir, tmp_path, max_iters=4, lr_decay_iters=4).returncode == 0
    before = (tmp_path / 'ckpt.pt').read_bytes()
    wild = dict(
        init_from='resume', learning_rate=1e30, decay_lr=False, grad_clip=0.0, log_interval=100, eval_interval=7
    )
    done = run('train.py', data_dir, tmp_path, **wild)
    assert done.returncode == 2 and 'loss or gradient were not finite in iteration' in done.stderr
    assert (tmp_path / 'ckpt.pt').read_bytes() == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == 'win32', reason='signals')
def test_a_second_interrupt_stops_at_once(data_dir, tmp_path):
    process = started('train.py', data_dir, tmp_path, max_iters=100000, eval_interval=100000)
    next(line for line in process.stdout if line.startswith('iter 5:'))
    for _ in range(50):
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)
        if process.poll() is not None:
            break
    assert process.wait(timeout=30) in (85, 130)


@pytest.mark.slow
def test_wandb_without_a_key_logs_offline_and_a_resumed_run_keeps_its_id(data_dir, tmp_path, monkeypatch):
    pytest.importorskip('wandb')
    for name in ('WANDB_API_KEY', 'WANDB_MODE'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('WANDB_DIR', str(tmp_path))
    done = run('train.py', data_dir, tmp_path / 'out', max_iters=4, wandb_log=True)
    assert done.returncode == 0, done.stderr
    assert 'logged offline' in done.stderr
    run_id = torch.load(tmp_path / 'out' / 'ckpt.pt')['wandb_run_id']
    assert len(list((tmp_path / 'wandb').glob(f'offline-run-*-{run_id}'))) == 1
    again = dict(max_iters=6, wandb_log=True, init_from='resume')
    assert run('train.py', data_dir, tmp_path / 'out', **again).returncode == 0
    assert torch.load(tmp_path / 'out' / 'ckpt.pt')['wandb_run_id'] == run_id


def test_kept_checkpoints_stay_and_are_those_of_their_iterations(data_dir, tmp_path):
    done = run('train.py', data_dir, tmp_path / 'a', max_iters=6, eval_interval=5, keep_checkpoints='2,5,6')
    assert done.returncode == 0, done.stderr
    kept = {path.name: torch.load(path)['iter_num'] for path in (tmp_path / 'a').glob('ckpt_0*.pt')}
    assert kept == {'ckpt_000002.pt': 2, 'ckpt_000005.pt': 5, 'ckpt_000006.pt': 6}
    run('train.py', data_dir, tmp_path / 'b', max_iters=2)
    model, other = (torch.load(tmp_path / name)['model'] for name in ('a/ckpt_000002.pt', 'b/ckpt.pt'))
    assert all(torch.equal(model[name], other[name]) for name in other)
