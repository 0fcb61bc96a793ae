"""
kill -9 at random moments, saves included: the run that is resumed each time ends as the one that was never stopped.

Five kills; FAULT_KILLS=50 in the environment makes it fifty (five minutes).
"""

import os
import random
import signal
import time

import pytest
import torch
from support.training import SCRIPTS, assert_same_run, killed, run, started

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get('FAULT_KILLS', '5'))


def wait_for(process, iterations):
    """Wait until a run has begun and done so many iterations."""
    seen = 0
    while seen < iterations and (line := process.stdout.readline()):
        seen += line.startswith('iter ')


@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='this system has no SIGKILL')
def test_a_run_that_is_killed_again_and_again_is_the_run(data_dir, tmp_path):
    kind = 'mla'
    # A save after every iteration: training waits for the disk most of the time, and that is when most kills come.
    keys = dict(dropout=0.2, n_embd=64, checkpoint_interval=1, max_iters=20 * KILLS, lr_decay_iters=20 * KILLS)
    assert run(SCRIPTS[kind], data_dir, tmp_path / 'whole', **keys).returncode == 0
    broken, moments, in_saves, best = tmp_path / 'broken', random.Random(1), 0, []
    for number in range(KILLS):
        starting = number % 10 == 4
        process = started(SCRIPTS[kind], data_dir, broken, fresh=starting, init_from='auto', **keys)
        if not starting:
            wait_for(process, moments.randint(1, 14))
        time.sleep(moments.random() * (4 if starting else 0.03))
        code = killed(process, None if starting else broken)
        assert code == -signal.SIGKILL, 'the run came to its end before it was killed'
        in_saves += (broken / 'ckpt.pt.writing').exists()
        if (broken / 'ckpt.pt').exists():
            best.append(torch.load(broken / 'ckpt.pt')['iter_num'])
    assert best == sorted(best) and len(set(best)) > KILLS // 2  # it gets on, and never back
    done = run(SCRIPTS[kind], data_dir, broken, init_from='auto', **keys)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / 'whole', broken)
    assert set(os.listdir(broken)) == set(os.listdir(tmp_path / 'whole')) == {'ckpt.pt', 'ckpt_best.pt', 'log.csv'}
    best = [torch.load(tmp_path / name / 'ckpt_best.pt') for name in ('whole', 'broken')]
    assert best[0]['iter_num'] == best[1]['iter_num']
    print(f'{KILLS} kills, {in_saves} of them in the middle of a save')
    assert in_saves or KILLS < 50
