"""Runs that are resumed, discarded or diverge: nothing is lost, and what the command line says is what runs."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from support import forking
from support.training import COMMON, ROOT, assert_same_run, command, environment, log_of, run, started

from core.text.tokenizer import CharTokenizer
from core.text.write_dataset import write_dataset

pytestmark = pytest.mark.slow

SHORT = dict(max_iters=4, lr_decay_iters=20, eval_interval=2)


def files(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def resume(data_dir, out_dir, *flags, script='train.py'):
    """`python train.py --resume=yes --out_dir=...` with these flags and nothing else."""
    return forking.run(script, ['--resume=yes', f'--out_dir={out_dir}', *flags])


def refused(done, *words):
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('error: ') and 'Traceback' not in done.stderr
    assert all(word in last for word in words), last


def halves():
    """Other random ids than the data set's, as many."""
    ids = torch.randint(12, (4001,)).numpy()
    return {'train': ids[:3500], 'val': ids[3500:]}


@pytest.fixture
def trained(data_dir, tmp_path):
    """A run of 4 iterations, of 20 planned."""
    assert run('train.py', data_dir, tmp_path / 'out', **SHORT).returncode == 0
    return tmp_path / 'out'


# ---- only finite states are saved ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'wild',
    [
        dict(learning_rate=1e6, max_iters=20, eval_interval=1, decay_lr=False),
        dict(learning_rate=1e38, max_iters=1, warmup_iters=0),
        dict(learning_rate=1e38, max_iters=20, eval_interval=100, warmup_iters=0, checkpoint_interval=1),
        dict(learning_rate=1e38, max_iters=20, eval_interval=100, warmup_iters=0, log_interval=100, grad_clip=0.0),
    ],
)
@pytest.mark.parametrize('script', ['train.py', 'train_mla.py'])
def test_weights_that_diverged_are_never_saved(wild, script, data_dir, tmp_path):
    done = run(script, data_dir, tmp_path, **wild)
    found = [path for path in tmp_path.glob('*.pt')]
    if done.returncode:
        refused(done, 'not finite in iteration', 'nothing was saved' if not found else 'the last checkpoint is of')
    for path in found:
        saved = torch.load(path)
        assert all(tensor.isfinite().all() for tensor in saved['model'].values())
        assert all(t.isfinite().all() for state in saved['optimizer']['state'].values() for t in state.values())
        if match := re.search(r'the last checkpoint is of iteration (\d+)', done.stderr):
            assert path.name != 'ckpt.pt' or saved['iter_num'] == int(match[1])


def test_a_best_loss_that_is_nan_does_not_block_later_ones(trained, data_dir):
    """Version 0.1.0 could save one."""
    saved = torch.load(trained / 'ckpt.pt')
    torch.save(dict(saved, best_val_loss=float('nan')), trained / 'ckpt.pt')
    (trained / 'ckpt_best.pt').unlink()
    assert resume(data_dir, trained, '--max_iters=6').returncode == 0
    assert 0 < torch.load(trained / 'ckpt_best.pt')['best_val_loss'] < 10


# ---- a folder with any of a run's files holds a run ------------------------------------------------------------------


def test_without_ckpt_pt_the_newest_other_checkpoint_is_resumed(data_dir, tmp_path):
    run('train.py', data_dir, tmp_path / 'whole', **dict(SHORT, max_iters=8))
    out = tmp_path / 'out'
    assert run('train.py', data_dir, out, **dict(SHORT, keep_checkpoints='3')).returncode == 0
    (out / 'ckpt.pt').unlink()
    (out / 'ckpt_best.pt').unlink()
    refused(run('train.py', data_dir, out, **SHORT), 'holds another run', '--resume=yes', '--overwrite=True')
    done = run('train.py', data_dir, out, **dict(SHORT, max_iters=8), resume='auto')
    assert done.returncode == 0 and 'ckpt_000003.pt at iteration 3' in done.stderr
    assert_same_run(tmp_path / 'whole', out)


def test_a_run_that_left_only_a_log_is_started_again_and_its_log_kept(trained, data_dir):
    log = (trained / 'log.csv').read_text()
    for path in trained.glob('*.pt'):
        path.unlink()
    refused(run('train.py', data_dir, trained, **SHORT), 'holds another run')
    done = run('train.py', data_dir, trained, **SHORT, resume='auto')
    assert done.returncode == 0 and 'kept as' in done.stderr
    assert (trained / 'log.1.csv').read_text() == log and len(log_of(trained)) == 5
    refused(resume(data_dir, trained.parent / 'nowhere'), 'no checkpoint', 'to resume')


def test_overwriting_removes_all_of_the_old_run(data_dir, tmp_path):
    run('train.py', data_dir, tmp_path, **SHORT, keep_checkpoints='1,3')
    (tmp_path / 'notes.txt').write_text('mine')
    assert run('train.py', data_dir, tmp_path, **dict(SHORT, max_iters=2), overwrite=True).returncode == 0
    assert set(os.listdir(tmp_path)) == {'ckpt.pt', 'ckpt_best.pt', 'log.csv', 'notes.txt'}
    before = files(tmp_path)
    refused(run('train.py', data_dir, tmp_path, **SHORT, overwrite=True, n_head=3), 'multiple of n_head=3')
    assert files(tmp_path) == before


def test_a_second_trainer_is_refused_and_the_first_goes_on(data_dir, tmp_path):
    first = started('train.py', data_dir, tmp_path, max_iters=100000, eval_interval=100000)
    next(line for line in first.stdout if line.startswith('iter 3:'))
    owner = ' '.join((tmp_path / '.lock').read_text().split()[:2])
    for flags in (dict(resume='auto'), dict(overwrite=True), {}):
        refused(run('train.py', data_dir, tmp_path, **SHORT, **flags), f'in use by {owner}')
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert first.returncode == 85 and len(log_of(tmp_path)) >= 3
    assert set(os.listdir(tmp_path)) == {'ckpt.pt', 'log.csv'}


# ---- a resumed run takes what it wasn't given from its checkpoint ----------------------------------------------------


def test_resuming_takes_nothing_but_the_folder(data_dir, tmp_path):
    settings = dict(
        dropout=0.1, weight_decay=0.3, batch_size=4, gradient_accumulation_steps=2, seed=5, lr_decay_iters=9
    )
    run('train_mla.py', data_dir, tmp_path / 'whole', **settings, max_iters=9, eval_interval=3, n_latent=9)
    run('train_mla.py', data_dir, tmp_path / 'out', **settings, max_iters=6, eval_interval=3, n_latent=9)
    done = resume(data_dir, tmp_path / 'out', '--max_iters=9')  # train.py: MLA too comes from the checkpoint
    assert done.returncode == 0, done.stderr
    assert 'at iteration 6; changed from now on: max_iters 6 -> 9' in done.stderr
    assert_same_run(tmp_path / 'whole', tmp_path / 'out')
    config = torch.load(tmp_path / 'out' / 'ckpt.pt')['config']
    assert {key: config[key] for key in settings} == settings and config['attention'] == 'mla'


@pytest.mark.parametrize(
    ('flag', 'words'),
    [
        ('--n_layer=4', ['n_layer=4', 'n_layer=2']),
        ('--n_embd=64', ['n_embd=64', 'n_embd=32']),
        ('--n_head=3', ['n_head=3', 'n_head=2']),
        ('--pos=rope', ['pos=rope', 'pos=learned']),
        ('--bias=True', ['bias=True', 'bias=False']),
        ('--block_size=8', ['block_size=8', 'block_size=16']),
        ('--seed=7', ['seed=7', 'seed=1337']),
        ('--attention=mla', ['the other attention', 'python train.py --resume=yes']),
    ],
)
def test_a_given_key_that_would_make_another_run_is_an_error(flag, words, trained, data_dir):
    before = files(trained)
    refused(resume(data_dir, trained, flag), *words, f'python train.py --resume=yes --out_dir={trained}')
    assert files(trained) == before


def test_a_given_key_that_may_change_is_applied_and_said(trained, data_dir):
    flags = ['--weight_decay=0', '--beta1=0.5', '--batch_size=2', '--learning_rate=1e-3', '--max_iters=6']
    done = resume(data_dir, trained, *flags)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stderr.splitlines() if 'changed from now on' in line)
    for change in ('weight_decay 0.1 -> 0.0', 'beta1 0.9 -> 0.5', 'batch_size 8 -> 2', 'learning_rate 0.01 -> 0.001'):
        assert change in line
    saved = torch.load(trained / 'ckpt.pt')
    assert [group['weight_decay'] for group in saved['optimizer']['param_groups']] == [0, 0]
    assert all(group['betas'][0] == 0.5 for group in saved['optimizer']['param_groups'])
    assert saved['config']['batch_size'] == 2
    # 4 iterations of 8 sequences, then 2 of 2
    assert [int(row['tokens']) for row in log_of(trained)[-3:]] == [4 * 8 * 16, 4 * 8 * 16 + 32, 4 * 8 * 16 + 64]
    assert saved['tokens'] == 4 * 8 * 16 + 2 * 32


def test_a_config_file_gives_keys_too(trained, data_dir, tmp_path):
    file = tmp_path / 'other.py'
    file.write_text('n_layer = 2\nmax_iters = 5\n')
    assert resume(data_dir, trained, str(file)).returncode == 0  # what it says about the model is what the model has
    file.write_text('n_layer = 3\n')
    refused(resume(data_dir, trained, str(file)), 'n_layer=3')


def test_a_data_set_that_was_rewritten_is_refused_and_one_that_moved_is_not(data_dir, tmp_path):
    moved, out = tmp_path / 'moved', tmp_path / 'out'
    shutil.copytree(data_dir, moved)
    run('train.py', moved, out, **SHORT)
    shutil.copytree(moved / 'tiny', moved / 'renamed')
    assert resume(data_dir, out, '--dataset=renamed', '--max_iters=5').returncode == 0
    shutil.rmtree(moved / 'renamed')
    write_dataset(moved / 'renamed', CharTokenizer('abcdefghijkl'), halves(), source='x')
    before = files(out)
    refused(resume(data_dir, out, '--max_iters=6'), 'renamed is not the data set', 'began with')
    assert files(out) == before


def test_val_loss_survives_a_resume_without_an_evaluation(trained, data_dir):
    expected = torch.load(trained / 'ckpt.pt')['val_loss']
    process = subprocess.Popen(
        [forking.interpreter(), 'train.py', '--resume=yes', f'--out_dir={trained}', '--max_iters=100000',
         '--eval_interval=100000'], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(),
    )  # fmt: skip
    next(line for line in process.stdout if line.startswith('iter 6:'))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 85
    saved = torch.load(trained / 'ckpt.pt')
    assert saved['iter_num'] > 6 and saved['val_loss'] == expected
    assert f'Resume with: python train.py --resume=yes --out_dir={trained}' in errors


def test_a_row_that_a_kill_cut_short_does_not_survive(trained, data_dir, tmp_path):
    shutil.copytree(trained, tmp_path / 'other')
    with open(trained / 'log.csv', 'a', newline='') as file:
        file.write('1')  # of iteration 12, say
    for folder in (trained, tmp_path / 'other'):
        assert resume(data_dir, folder, '--max_iters=6').returncode == 0
    assert log_of(trained) == log_of(tmp_path / 'other')


def test_resume_and_init_from_are_two_questions(trained, data_dir, tmp_path):
    """What a cluster script appends must not make a config's init_from void."""
    out = tmp_path / 'tuned'
    source = dict(init_from=trained, max_iters=2)
    shape = {key: COMMON[key] for key in ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias')}
    expected = run('train.py', data_dir, tmp_path / 'expected', **source)
    done = run('train.py', data_dir, out, **source, resume='auto')
    assert done.returncode == expected.returncode == 0, done.stderr
    assert_same_run(out, tmp_path / 'expected')
    again = run('train.py', data_dir, out, init_from=trained, max_iters=3, resume='auto')
    assert again.returncode == 0 and 'at iteration 2' in again.stderr
    saved = torch.load(out / 'ckpt.pt')
    assert saved['config']['init_from'] == str(trained) and saved['iter_num'] == 3
    refused(
        run('train.py', data_dir, tmp_path / 'no', **dict(source, n_layer=3)), 'n_layer=3', 'n_layer=2', 'remove it'
    )
    # the shape need not be given at all
    flags = [f'--{k}={v}' for k, v in COMMON.items() if k not in shape]
    bare = forking.run('train.py', [*flags, f'--data_dir={data_dir}', f'--out_dir={tmp_path / "bare"}',
                                    f'--init_from={trained}', '--max_iters=2'])  # fmt: skip
    assert bare.returncode == 0, bare.stderr
    config = torch.load(tmp_path / 'bare' / 'ckpt.pt')['config']
    assert {key: config[key] for key in shape} == shape


def test_a_model_with_another_tokenizer_is_refused_even_where_ids_fit(trained, data_dir, tmp_path):
    write_dataset(tmp_path / 'greek', CharTokenizer('αβγδεζηθικλμ'), halves(), source='x')
    flags = dict(init_from=trained, dataset='greek', max_iters=2)
    refused(run('train.py', tmp_path, tmp_path / 'no', **flags), 'char tokens (12 ids)', 'same tokenizer', 'greek')


# ---- signals and a full disk -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(signal, 'SIGUSR1'), reason='this system has no SIGUSR1')
def test_a_signal_during_the_imports_counts(data_dir, tmp_path):
    process = subprocess.Popen(command('train.py', data_dir, tmp_path, max_iters=100000, eval_interval=100000),
                               cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=environment())  # fmt: skip
    while 'core/signals' not in (maps := maybe_signals(process.pid)) and process.poll() is None:
        time.sleep(0.005)
    del maps
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 85 and 'Traceback' not in errors
    assert torch.load(tmp_path / 'ckpt.pt')['iter_num'] == 0
    assert run('train.py', data_dir, tmp_path, resume='auto').returncode == 0
    assert run('train.py', data_dir, tmp_path / 'whole').returncode == 0
    assert_same_run(tmp_path, tmp_path / 'whole')


def maybe_signals(pid):
    """'core/signals' once a process listens for SIGUSR1, by the mask of caught signals that Linux shows."""
    try:
        with open(f'/proc/{pid}/status', encoding='ascii') as file:
            caught = next(int(line.split()[1], 16) for line in file if line.startswith('SigCgt'))
    except (OSError, StopIteration):
        return ''
    return 'core/signals' if caught >> (signal.SIGUSR1 - 1) & 1 else ''


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='this system has no /dev/full')
def test_a_full_disk_at_a_log_row_saves_what_was_learned(data_dir, tmp_path, monkeypatch):
    """log.csv is full from the start here; checkpoints can still be written."""
    import runpy

    from core.runs import log as runlog

    def full(path, *args, **kwargs):
        return open('/dev/full' if str(path).endswith('log.csv') else path, *args, **kwargs)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(runlog, 'open', full, raising=False)
    monkeypatch.setattr(sys, 'argv', command('train.py', data_dir, tmp_path, max_iters=6)[1:])
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    with pytest.raises(Exception, match="log.csv can't be written .*No space left.*resume the run"):
        runpy.run_path('train.py', run_name='__main__')
    saved = torch.load(tmp_path / 'ckpt.pt')
    assert saved['iter_num'] == 1 and all(t.isfinite().all() for t in saved['model'].values())


def test_a_finished_run_that_is_resumed_in_vain_stays_as_it_is(data_dir, trained):
    done = resume(data_dir, trained, '--learning_rate=5e-4')
    assert done.returncode == 0 and 'has reached max_iters=4' in done.stderr
    kept = torch.load(trained / 'ckpt.pt', weights_only=True)['config']
    assert kept['learning_rate'] == COMMON['learning_rate'] if 'learning_rate' in COMMON else 6e-4
    again = resume(data_dir, trained, '--learning_rate=5e-4', '--max_iters=6')
    assert '-> 0.0005' in again.stderr  # said again, since it was not applied before


def test_a_resumed_run_says_at_which_rate_it_goes_on(data_dir, trained):
    keys = ('--max_iters=6', '--lr_decay_iters=6', '--warmup_iters=0', '--learning_rate=1e-3', '--min_lr=1e-4')
    done = resume(data_dir, trained, *keys)
    rates = re.search(r'learning rate: (\S+) now, (\S+) at the end', done.stderr)
    logged = [float(row['lr']) for row in log_of(trained) if row['lr'] and int(row['iter']) in (4, 5)]
    assert [float(rate) for rate in rates.groups()] == pytest.approx(logged, rel=0.01) and logged[0] < 4e-4
    low = resume(data_dir, trained, '--max_iters=8', '--learning_rate=5e-5')
    assert 'min_lr=0.0001 is above learning_rate=5e-05' in low.stderr


@pytest.mark.parametrize('change, complaint', [
    (lambda saved: saved['config'].update(eval_interval=0), 'is damaged: its eval_interval is 0'),
    (lambda saved: saved['learning'].pop('divides'), "'learning' is incomplete"),
    (lambda saved: saved['optimizer']['state'][0].pop('step'), "it lacks 'step'"),
])  # fmt: skip
def test_a_checkpoint_with_an_entry_missing_or_out_of_bounds_gets_one_line(change, complaint, data_dir, tmp_path):
    assert run('train.py', data_dir, tmp_path, max_iters=1).returncode == 0
    saved = torch.load(tmp_path / 'ckpt.pt')
    change(saved)
    torch.save(saved, tmp_path / 'ckpt.pt')
    command = [f'--data_dir={data_dir}', f'--out_dir={tmp_path}', '--resume=yes', '--max_iters=2']
    done = forking.run('train.py', command)
    assert done.returncode == 2 and complaint in done.stderr and 'Traceback' not in done.stderr
