"""
slurm_scripts/ run for real, on a cluster of two nodes on loopback (tests/slurm/cluster.sh). Skipped without SLURM.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support import ROOT

from core.runs import checkpoint, models
from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig

pytestmark = pytest.mark.slow

SCRIPTS = ROOT / 'slurm_scripts'
JOBS = sorted(path.name for path in SCRIPTS.glob('*.sh') if path.name != 'launch.sh')
SEARCHED = os.pathsep.join((os.environ.get('PATH', ''), '/usr/sbin', '/sbin'))
MISSING = [name for name in ('munged', 'slurmctld', 'slurmd', 'sbatch') if not shutil.which(name, path=SEARCHED)]
needs_slurm = pytest.mark.skipif(
    bool(MISSING), reason=f'not installed: {", ".join(MISSING)}; run tests/install.sh slurm'
)
needs_torchrun = pytest.mark.skipif(
    not Path(sys.executable).with_name('torchrun').exists(), reason='there is no torchrun beside this Python'
)

# A model that a CPU trains in milliseconds per step, in place of the scripts' GPT-2; whatever the learning rate's
# schedule would take from max_iters is switched off, because a test below changes it.
TINY = [
    f'--{key}={value}'
    for key, value in dict(
        device='cpu', backend='gloo', compile=False, dtype='float32', threads=1, wandb_log=False, data_dir='data',
        dataset='tiny', n_layer=2, n_head=2, n_embd=64, block_size=32, batch_size=4, gradient_accumulation_steps=2,
        dropout=0.1, decay_lr=False, eval_interval=1000000, eval_iters=2, log_interval=1,
    ).items()
]  # fmt: skip


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
    """The environment of a user of a running cluster."""
    folder = tmp_path_factory.mktemp('slurm')
    script = ROOT / 'tests' / 'slurm' / 'cluster.sh'
    try:
        subprocess.run([script, 'start', folder], check=True, timeout=60)
        # Two nodes on one host: SLURM's names for them are not in its name service, and both talk over loopback.
        yield clean_environment(SLURM_CONF=f'{folder}/slurm.conf', MASTER_ADDR='127.0.0.1')
    finally:
        subprocess.run([script, 'stop', folder], check=True, timeout=60)


def clean_environment(**more):
    """This environment without what an outer SLURM job or torchrun may have put there."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(('SLURM_', 'SBATCH_', 'SRUN_', 'TORCHELASTIC_'))}
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'):
        kept.pop(name, None)
    return kept | {'OMP_NUM_THREADS': '1', 'GLOO_SOCKET_IFNAME': 'lo', 'PYTHONUNBUFFERED': '1'} | more


@pytest.fixture
def checkout(tmp_path):
    """A folder with this repository's files, a tiny data set, and a virtual environment that is this Python's."""
    for path in ROOT.iterdir():
        if path.suffix in ('.py', '.sh') or path.name in ('config', 'slurm_scripts'):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / 'slurm_logs').mkdir()
    (tmp_path / '.venv' / 'bin').mkdir(parents=True)
    (tmp_path / '.venv' / 'bin' / 'activate').write_text(f'export PATH="{Path(sys.executable).parent}:$PATH"\n')
    folder = tmp_path / 'data' / 'tiny'
    folder.mkdir(parents=True)
    tokens = {'train': 20000, 'val': 2000}
    for split, count in tokens.items():
        ids = np.random.default_rng(count).integers(0, 256, count)
        ids.astype('<u2').tofile(folder / f'{split}.bin')
    meta = dict(format=1, tokenizer='byte', vocab_size=256, dtype='uint16', tokens=tokens, source='random bytes')
    (folder / 'meta.json').write_text(json.dumps(meta))
    return tmp_path


def submit(script, arguments, checkout, cluster, *options):
    """sbatch a script of slurm_scripts/ with one process per node; returns the job's id."""
    command = ['sbatch', '--parsable', '--gpus-per-node=1', '--cpus-per-task=1', *options, f'slurm_scripts/{script}']
    done = subprocess.run([*command, *arguments], cwd=checkout, env=cluster, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def job(number, cluster):
    """What `scontrol show job` says of a job, as a dict of str."""
    command = ['scontrol', '--oneliner', 'show', 'job', number]
    words = subprocess.run(command, env=cluster, text=True, capture_output=True, check=True).stdout.split()
    return dict(word.split('=', 1) for word in words if '=' in word)


def limit(minutes, number, cluster):
    """Give a job another time limit."""
    subprocess.run(['scontrol', 'update', f'JobId={number}', f'TimeLimit={minutes}'], env=cluster, check=True)


def wait_for(condition, seconds, number, checkout, cluster):
    """Wait until `condition` holds of a job; the test fails with the job's log if it ends before, or takes too long."""
    deadline = time.monotonic() + seconds
    while not condition(state := job(number, cluster)):
        if ended(state) or time.monotonic() > deadline:
            pytest.fail(f'job {number} is {state["JobState"]} ({state["Reason"]}), not as expected:\n{log(checkout)}')
        time.sleep(0.3)
    return state


def ended(state):
    return state['JobState'] in ('COMPLETED', 'FAILED', 'TIMEOUT', 'CANCELLED', 'NODE_FAIL', 'OUT_OF_MEMORY')


def log(checkout):
    """Everything that the jobs have written so far."""
    return '\n'.join(path.read_text() for path in sorted((checkout / 'slurm_logs').iterdir()))


@needs_slurm
@needs_torchrun
def test_a_job_preempted_by_its_time_limit_is_requeued_and_ends_with_an_unbroken_run_s_bits(checkout, cluster):
    # Once it trains, its time limit becomes one of which the two minutes of the script's --signal are the whole: SLURM,
    # which looks every 30 s, sends the signal at once. How many steps that is, nobody knows, so the job's first start
    # has no end, and a few more steps are ordered once it is back in the queue. A save after every step keeps them few.
    end = checkout / 'end.py'
    end.write_text('max_iters = 1000000\n')
    arguments = ['end.py', *TINY, '--n_latent=32', '--out_dir=out-job']
    number = submit('train_mla_multinode.sh', [*arguments, '--checkpoint_interval=1'], checkout, cluster)
    wait_for(lambda _: (checkout / 'out-job' / 'ckpt.pt').exists(), 60, number, checkout, cluster)
    limit(2, number, cluster)
    wait_for(lambda state: state['Restarts'] == '1', 60, number, checkout, cluster)
    limit(60, number, cluster)
    first = torch.load(checkout / 'out-job' / 'ckpt.pt', weights_only=True)['iter_num']
    assert first > 0
    last = first + 20
    end.write_text(f'max_iters = {last}\n')
    torchrun = [Path(sys.executable).with_name('torchrun'), '--standalone', '--nproc_per_node=2']
    command = [*torchrun, 'train_mla.py', 'config/train_gpt2_mla.py', *arguments[:-1], '--out_dir=out-unbroken']
    unbroken = subprocess.Popen(command, cwd=checkout, env=clean_environment())  # while the job waits in the queue
    state = wait_for(ended, 90, number, checkout, cluster)
    written = log(checkout)
    assert (state['JobState'], state['Restarts'], state['ExitCode']) == ('COMPLETED', '1', '0:0'), written
    assert 'start 1, on n[1-2]' in written and 'start 2, on n[1-2]' in written
    # the signal reached the trainers, and torchrun outlived it
    assert len(re.findall(r'\(exitcode: 85\)', written)) == 2 and 'User defined signal' not in written, written
    with open(checkout / 'out-job' / 'log.csv', newline='') as file:
        assert [int(row['iter']) for row in csv.DictReader(file)] == list(range(last + 1))

    assert unbroken.wait(timeout=120) == 0
    ours, theirs = (
        torch.load(checkout / out / 'ckpt.pt', weights_only=True, map_location='cpu')
        for out in ('out-job', 'out-unbroken')
    )
    assert ours['iter_num'] == theirs['iter_num'] == last
    assert ours['model'].keys() == theirs['model'].keys()
    different = [name for name, tensor in ours['model'].items() if not torch.equal(tensor, theirs['model'][name])]
    assert not different


@needs_slurm
@needs_torchrun
def test_a_job_that_fails_is_not_requeued(checkout, cluster):
    arguments = [*TINY, '--n_heat=3', '--out_dir=out-failed']
    number = submit('train_mha_1node.sh', arguments, checkout, cluster)
    state = wait_for(ended, 60, number, checkout, cluster)
    assert (state['JobState'], state['Restarts']) == ('FAILED', '0')
    assert 'n_heat' in log(checkout)
    assert not (checkout / 'out-failed').exists()


@needs_slurm
@needs_torchrun
def test_sampling_and_the_induction_analysis_run_as_jobs(checkout, cluster):
    sizes = dict(block_size=32, vocab_size=256, n_layer=2, n_head=2, n_embd=32, bias=False)
    for out, model in (('out-gpt2', GPT(GPTConfig(**sizes))), ('out-gpt2-mla', MLAGPT(MLAConfig(**sizes)))):
        with torch.no_grad():
            model.transformer.ln_f.weight.mul_(2)  # a model with all its initial values is refused
        (checkout / out).mkdir()
        tokenizer = dict(format=1, tokenizer='byte', vocab_size=256)
        saved = models.contents(model, {'dataset': 'tiny'}, iter_num=1, tokenizer=tokenizer, corpus='none')
        checkpoint.save(str(checkout / out / 'ckpt.pt'), saved)
    sample = ['--device=cpu', '--threads=1', '--start=first words', '--num_samples=1', '--max_new_tokens=20']
    induction = ['--device=cpu', '--threads=1', '--sequences=8', '--length=8', '--controls=1', '--resamples=200']
    jobs = {
        'run_mha_sample.sh': (sample, 'first words'),
        'run_mla_sample.sh': (sample, 'first words'),
        'run_induction.sh': ([*induction, '--ablate=False', '--text_windows=2'], 'out-gpt2-mla'),
    }
    numbers = {script: submit(script, arguments, checkout, cluster) for script, (arguments, _) in jobs.items()}
    for script, number in numbers.items():
        state = wait_for(ended, 60, number, checkout, cluster)
        written = (checkout / 'slurm_logs' / f'{script.removesuffix(".sh")}-{number}.log').read_text()
        assert state['JobState'] == 'COMPLETED', written
        assert jobs[script][1] in written
    assert (checkout / 'out-induction' / 'induction.json').exists()


@needs_slurm
@pytest.mark.parametrize('script', JOBS)
def test_sbatch_accepts_the_script_as_it_is(script, checkout, cluster):
    command = ['sbatch', '--test-only', f'slurm_scripts/{script}']
    done = subprocess.run(command, cwd=checkout, env=cluster, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert f'on nodes n{"[1-2]" if "multinode" in script else "1"} in partition gpu' in done.stderr


@pytest.mark.parametrize('script', JOBS)
def test_a_script_starts_files_that_exist(script):
    words = (SCRIPTS / script).read_text().splitlines()[-1].split()
    files = [word for word in words if word.endswith('.py')]
    assert files
    assert not [name for name in files if not (ROOT / name).exists()]


@pytest.mark.skipif(not shutil.which('shellcheck'), reason='shellcheck is not installed; run tests/install.sh slurm')
def test_shellcheck_finds_nothing():
    scripts = [*sorted(SCRIPTS.glob('*.sh')), *sorted((ROOT / 'tests' / 'slurm').glob('*.sh'))]
    done = subprocess.run(['shellcheck', '-x', *scripts], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout
