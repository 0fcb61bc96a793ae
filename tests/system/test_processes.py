"""Several processes, under torchrun on CPUs: the same curve, sharded or not, and what becomes of a process's death."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import ROOT, forking
from support.fake_cuda import FakeCuda
from support.training import (
    assert_same_curve,
    assert_same_run,
    command,
    environment,
    log_of,
    run,
    started,
    tensors_of,
    torchrun,
)

from core.cli.errors import UserError
from core.runs.checkpoint import load
from core.runs.models import build_model
from core.runs.processes import Processes, place_in_environment

pytestmark = pytest.mark.slow

EXTRA = dict(gradient_accumulation_steps=4, batch_size=4, eval_iters=5)  # 20 windows: 4 processes' parts are unequal


@pytest.fixture(scope='module')
def one(data_dir, tmp_path_factory):
    """The folder of a run of 20 iterations in one process."""
    folder = tmp_path_factory.mktemp('processes') / 'one'
    assert run('train_mla.py', data_dir, folder, **EXTRA).returncode == 0
    return folder


@pytest.mark.parametrize('count, how', [(2, dict(launcher=torchrun(2))), (4, dict(processes=4))])
def test_the_number_of_processes_does_not_change_the_curve(count, how, one, data_dir, tmp_path):
    done = run('train_mla.py', data_dir, tmp_path, **how, **EXTRA)
    assert done.returncode == 0, done.stderr
    assert len(log_of(one)) == 21
    assert_same_curve(one, tmp_path)
    assert done.stdout.count('iter 7:') == 1 and f'{count} processes' in done.stderr  # rank 0 speaks alone


def test_micro_batches_that_cannot_be_shared_are_refused(data_dir, tmp_path):
    done = run('train.py', data_dir, tmp_path / 'odd', torchrun(2), gradient_accumulation_steps=3)
    assert done.returncode and 'gradient_accumulation_steps=3 cannot be divided' in done.stderr
    assert not (tmp_path / 'odd').exists()


def test_a_sharded_model_learns_the_same_and_saves_the_same_checkpoint(one, data_dir, tmp_path):
    """fsdp=True in two processes; stopped after 10 iterations, and resumed sharded as well as in one process."""
    done = run('train_mla.py', data_dir, tmp_path / 'sharded', processes=2, **EXTRA, fsdp=True, max_iters=10)
    assert done.returncode == 0, done.stderr
    shutil.copytree(tmp_path / 'sharded', tmp_path / 'alone')
    going_on = dict(EXTRA, init_from='resume')
    done = run('train_mla.py', data_dir, tmp_path / 'sharded', processes=2, **going_on, fsdp=True)
    assert done.returncode == 0, done.stderr
    assert run('train_mla.py', data_dir, tmp_path / 'alone', **going_on).returncode == 0
    expected = torch.load(one / 'ckpt.pt')
    for folder in (tmp_path / 'sharded', tmp_path / 'alone'):
        assert_same_curve(one, folder)
        found = torch.load(folder / 'ckpt.pt')
        assert found['optimizer']['param_groups'] == expected['optimizer']['param_groups']
        tensors, wanted = tensors_of(found), tensors_of(expected)
        assert list(tensors) == list(wanted)
        for name, tensor in tensors.items():
            assert type(tensor) is torch.Tensor and torch.allclose(tensor, wanted[name], atol=1e-5), name
        assert build_model(load(str(folder))).get_num_params() == build_model(expected).get_num_params()
    size = [(folder / 'ckpt.pt').stat().st_size for folder in (one, tmp_path / 'sharded')]
    assert abs(size[0] - size[1]) < 1000  # the tied embedding is not written twice


def worker(out_dir, rank):
    """The process id of a rank that torchrun has started to train in this folder."""
    for process in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):
            trains = f'--out_dir={out_dir}\0'.encode() in (process / 'cmdline').read_bytes()
            if trains and f'\0RANK={rank}\0'.encode() in (process / 'environ').read_bytes():
                return int(process.name)
    raise AssertionError(f'there is no rank {rank}')


def kill_rank(job, out_dir, rank):
    """SIGKILL a rank of a job after its first iterations."""
    next(line for line in job.stdout if line.startswith('iter 12:'))
    os.kill(worker(out_dir, rank), signal.SIGKILL)


linux = pytest.mark.skipif(not Path('/proc/self/environ').exists(), reason='there is no /proc')


@linux
def test_a_process_that_dies_ends_the_job(data_dir, tmp_path):
    job = started('train.py', data_dir, tmp_path, torchrun(2), gradient_accumulation_steps=2, max_iters=10**6)
    kill_rank(job, tmp_path, 1)
    began = time.monotonic()
    job.stdout.close()
    assert job.wait(timeout=60) not in (0, -signal.SIGKILL)
    assert time.monotonic() - began < 60


@linux
@pytest.mark.parametrize('number', [signal.SIGUSR1, signal.SIGKILL])
def test_trainers_save_and_leave_when_their_torchrun_is_gone(number, data_dir, tmp_path, monkeypatch):
    """torchrun dies of both and passes neither on."""
    monkeypatch.setenv('PYTHON_EXEC', sys.executable)  # it starts no forks: a trainer sees that its parent has changed
    job = started('train.py', data_dir, tmp_path, torchrun(2), gradient_accumulation_steps=2, max_iters=10**6)
    last = next(line for line in job.stdout if line.startswith('iter 12:'))
    trainers = [worker(tmp_path, rank) for rank in (0, 1)]
    parent = Path(f'/proc/{trainers[0]}/stat').read_text().rpartition(')')[2].split()[1]
    os.kill(int(parent), number)
    assert job.wait(timeout=60) == -number
    for line in job.stdout:  # ends when the trainers have left, at once or some iterations later
        last = line if line.startswith('iter ') else last
    deadline = time.monotonic() + 60
    while any(Path(f'/proc/{trainer}').exists() for trainer in trainers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f'/proc/{trainer}').exists() for trainer in trainers)
    assert load(str(tmp_path))['iter_num'] == int(last.split()[1].rstrip(':')) + 1


# ---- started by another launcher than torchrun -----------------------------------------------------------------------
LAUNCHED = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', 'SLURM_LOCALID', 'SLURM_STEP_NUM_TASKS')
MEETING = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT='29500')


def placed(monkeypatch, **variables):
    """This process's place with these variables in the environment and none of a launcher's others."""
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    return place_in_environment()


def test_a_local_rank_that_is_not_given_is_found(monkeypatch):
    two = dict(MEETING, RANK=5, WORLD_SIZE=8)
    FakeCuda(8, 8).install(monkeypatch)
    assert placed(monkeypatch, **two, LOCAL_RANK=3) == Processes(5, 3, 8)
    assert placed(monkeypatch, **two, SLURM_LOCALID=2) == Processes(5, 2, 8)
    assert placed(monkeypatch, **two) == Processes(5, 1, 8)
    assert placed(monkeypatch, RANK=0, WORLD_SIZE=1) == Processes(0, 0, 1)
    FakeCuda().install(monkeypatch)
    assert placed(monkeypatch, **two) == Processes(5, 0, 8)


@pytest.mark.parametrize(
    'variables',
    [dict(RANK=0), dict(RANK=0, WORLD_SIZE=2), dict(MEETING, RANK='zero', WORLD_SIZE=2), dict(MEETING, RANK=1)],
)
def test_half_of_a_launcher_s_variables_gets_one_line(variables, monkeypatch):
    with pytest.raises(UserError, match='WORLD_SIZE, MASTER_ADDR or MASTER_PORT is not; use torchrun'):
        placed(monkeypatch, **variables)


def test_tasks_that_know_nothing_of_each_other_are_told_of_torchrun(monkeypatch, capsys):
    assert placed(monkeypatch, SLURM_STEP_NUM_TASKS=2) == Processes()
    assert capsys.readouterr().err.startswith('2 tasks were started without torchrun, and each trains by itself')
    assert placed(monkeypatch, SLURM_STEP_NUM_TASKS=1) == Processes()
    assert capsys.readouterr().err == ''


def test_a_launcher_that_sets_no_local_rank_trains_the_same_run(one, data_dir, tmp_path):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    variables = dict(environment(), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    arguments = [forking.interpreter(), *command('train_mla.py', data_dir, tmp_path, **EXTRA)[1:]]
    both = [subprocess.Popen(arguments, cwd=ROOT, env=dict(variables, RANK=str(rank))) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert_same_curve(one, tmp_path)


def test_the_former_launcher_is_told_of_torchrun(data_dir, tmp_path):
    done = run('train.py', data_dir, tmp_path / 'none', ('-m', 'torch.distributed.launch', '--nproc_per_node=1'))
    assert 'error: --local-rank=0 comes from torch.distributed.launch; use torchrun in its place' in done.stderr
    assert done.returncode and not (tmp_path / 'none').exists()


@linux
def test_torchrun_picks_a_job_up_from_its_checkpoint(data_dir, tmp_path):
    """Two ranks add up the same way each time, so that even here the restarted run is the run."""
    keys = dict(gradient_accumulation_steps=2, max_iters=60, lr_decay_iters=60, checkpoint_interval=5, dropout=0.1)
    assert run('train.py', data_dir, tmp_path / 'whole', torchrun(2), **keys).returncode == 0
    job = started('train.py', data_dir, tmp_path / 'broken', torchrun(2, '--max-restarts=1'), init_from='auto', **keys)
    kill_rank(job, tmp_path / 'broken', 0)
    again = next(line for line in job.stdout if line.startswith('iter ') and 'iter 12:' not in line)
    rest = [again, *job.stdout]
    assert job.wait(timeout=120) == 0
    first = [int(line.split()[1].rstrip(':')) for line in rest if line.startswith('iter ')]
    assert min(first) >= 5 and first[-1] == 59
    assert_same_run(tmp_path / 'whole', tmp_path / 'broken')


EACH_ITS_OWN = """
import os, runpy, sys
place = sys.argv.pop()
sys.argv = ['train.py', *sys.argv[1:], f'--out_dir={place}{os.environ["RANK"]}']
runpy.run_path('train.py', run_name='__main__')
"""


def test_processes_that_find_different_checkpoints_are_refused(one, data_dir, tmp_path):
    """As on nodes without a common folder, of which one has the checkpoint of an earlier attempt."""
    shutil.copytree(one, tmp_path / 'out0')
    (tmp_path / 'out1').mkdir()
    more = dict(EXTRA, resume='auto', max_iters=30, attention='mla')
    keys = command('train_mla.py', data_dir, tmp_path / 'out', **more)[2:]
    keys.remove(f'--out_dir={tmp_path}/out')
    before = tensors_of(tmp_path / 'out0')
    done = forking.run('-c', [EACH_ITS_OWN, *keys, tmp_path / 'out'], 120, processes=2)
    assert done.returncode == 2, done.stderr
    assert 'error: the processes find different checkpoints in' in done.stderr and 'Traceback' not in done.stderr
    assert all(torch.equal(before[name], after) for name, after in tensors_of(tmp_path / 'out0').items())
