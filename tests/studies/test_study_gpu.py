"""studies/gpu.py, rehearsed on a CPU: every part runs, is reported, and is not run again."""

import importlib.util
import json
import re

import pytest
from support import ROOT, forking

from core.speed import timing

pytestmark = pytest.mark.slow

HAS_TRITON = importlib.util.find_spec('triton') is not None
PARTS = ['muon', 'attention', *['kernel'] * HAS_TRITON, 'tests', 'train', 'decode', 'texts', 'train_eager', 'memory']
PARTS += ['profile', 'shakespeare', 'train_350m', 'cells', 'pair']
TWIN = (ROOT / 'tests/support/nanogpt_twin.py').read_text(encoding='utf-8')


@pytest.fixture(autouse=True)
def timed_once(monkeypatch):
    """Nothing is said about speed, so that the CPU's peak rate can be made up too."""
    monkeypatch.setenv('FORKS_BEGIN_WITH', forking.TIMED_ONCE + 'timing.cpu_flops = lambda dtype: 1e11\n')


def rehearse(out_dir, *arguments, code=0, seconds=400):
    out_dir.mkdir(exist_ok=True)
    play = out_dir / 'play.txt'
    play.write_text('To be, or not to be: that is the question.\n' * 2000)  # nothing is downloaded
    options = ['--rehearse', f'--out_dir={out_dir}', f'--input={play}', *arguments]
    done = forking.run('studies/gpu.py', options, seconds=seconds)
    assert done.returncode == code, done.stderr
    return done


def test_every_part_runs_once(tmp_path):
    (tmp_path / 'model.py').write_text(TWIN)
    out = tmp_path / 'out'
    done = rehearse(out, f'--nanogpt={tmp_path}')
    written = json.loads((out / 'gpu.json').read_text())
    assert {name: part['status'] for name, part in written['parts'].items()} == dict.fromkeys(PARTS, 'done')
    assert written['rehearsed'] and len(written['goals']) == 8
    assert all(value and met is not None for _, value, met in written['goals']), 'every goal finds its figures'
    assert done.stdout.count('\n') == 8 and 'not measured' not in done.stdout
    report = (out / 'gpu.md').read_text()
    assert 'iter 10:' not in report and '![decode-B2](decode-B2.png)' in report
    assert all(f'\n`{name}`: done' in report for name in PARTS) and 'rehearsal' in report.splitlines()[0]
    steps = {row['name'] for row in written['results']['decode']['steps']}
    assert steps == {'MHA', 'GQA-2', 'MQA', 'MLA, r=32', 'MLA, r=16', 'Hugging Face'}
    for picture in ('decode-B1.png', 'decode-B2.png'):
        assert (out / picture).read_bytes().startswith(b'\x89PNG')
    for file in ('shakespeare-mla/ckpt.pt', 'code-mla/ckpt.pt', 'trace-MHA.json', 'induction/formation.json'):
        assert (out / file).exists(), file
    again = rehearse(out)
    assert again.stdout == done.stdout and '$ ' not in again.stderr
    # as if the time had ended between two commands of a part: the first one's figures stay
    written['parts']['decode']['status'] = 'out of time'
    (out / 'gpu.json').write_text(json.dumps(written))
    (out / 'decode-B2.json').unlink()
    again = rehearse(out)
    assert again.stderr.count('$ ') == 1 and '--batch_sizes=2' in again.stderr
    text = (out / 'gpu.md').read_text().split('## Decoding steps')[1].split('\n## ')[0]
    assert all(re.search(rf'\| {size} \| 32 \| +MHA \|', text) for size in (1, 2))


def test_a_part_without_time_is_run_again_by_the_next_call(tmp_path):
    done = rehearse(tmp_path, '--parts=shakespeare,train_350m', '--iterations=1000000', '--minutes=0.15', code=2)
    assert done.stderr.splitlines()[-1].startswith('error: shakespeare')
    assert 'shakespeare: out of time' in done.stderr and 'train_350m: no time left' in done.stderr
    rehearse(tmp_path, '--parts=shakespeare,train_350m', '--iterations=1')
    parts = json.loads((tmp_path / 'gpu.json').read_text())['parts']
    assert {name: part['status'] for name, part in parts.items()} == {'shakespeare': 'done', 'train_350m': 'done'}


def test_trainings_of_the_last_part_share_its_time(tmp_path):
    """Both are stopped before their last iteration, save, and are compared."""
    rehearse(tmp_path, '--parts=pair', '--iterations=100000', '--minutes=0.7')
    logs = [(tmp_path / f'code-{arm}' / 'log.csv').read_text().splitlines() for arm in ('mha', 'mla')]
    assert all(2 < len(log) < 100_000 for log in logs)
    assert all((tmp_path / f'code-{arm}' / 'ckpt.pt').exists() for arm in ('mha', 'mla'))


@pytest.mark.parametrize(
    'arguments, expected',
    [
        (['--rehearse', '--parts=x,memory'], 'unknown parts: x; choose from muon, attention, kernel'),
        (['--rehearse', '--nanogpt=nowhere'], 'has no model.py; --nanogpt must be the folder of a nanoGPT checkout'),
        (['--device=cpu'], 'unknown key --device'),
    ],
)
def test_bad_input_gets_one_line(arguments, expected, tmp_path):
    done = forking.run('studies/gpu.py', [f'--out_dir={tmp_path}', *arguments])
    assert done.returncode == 2 and not done.stdout
    errors = [line for line in done.stderr.splitlines() if not line.startswith('command line sets')]
    assert len(errors) == 1 and errors[0].startswith('error: ') and expected in errors[0]


def test_measurements_of_another_machine_are_kept(tmp_path):
    earlier = dict(machine='another', rehearsed=False, parts={})
    (tmp_path / 'gpu.json').write_text(json.dumps(earlier))
    done = rehearse(tmp_path, code=2)
    assert 'holds measurements of another; choose another --out_dir' in done.stderr
    assert json.loads((tmp_path / 'gpu.json').read_text()) == earlier


def test_the_largest_size_is_found_by_doubling_and_bisection():
    for limit in (0, 1, 5, 64, 99, 100, 1000):
        tried = []

        def peak(size, limit=limit, tried=tried):
            tried.append(size)
            return 10 * size if size <= limit else None

        fits = min(limit, 100)
        assert timing.largest(peak, 100) == (fits, 10 * fits or None)
        assert sum(size > limit for size in tried) <= 7 and max(tried) <= 100 and len(set(tried)) == len(tried)
