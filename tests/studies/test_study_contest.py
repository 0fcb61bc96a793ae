"""studies/contest.py: each arm at its best rate, differences by seed; finished runs are kept, missing ones are run."""

import json
import shutil

import pytest
import torch
from support import ROOT, forking
from support.training import write_characters

pytestmark = pytest.mark.slow

ITERS = 4
RATES = (4e-3, 1.6e-2)  # of the short form
MLA = 'MLA, r=C/2, kv_lr=1/8'
ARMS = {'MHA': (4096, 0.0), 'MQA': (1024, 0.3), MLA: (1024, 0.1)}  # cache, loss minus MHA's
SLUGS = {'MHA': 'mha', 'MQA': 'mqa', MLA: 'mla-r-c-2-kv-lr-1-8'}
KEYS = {'MHA': {}, 'MQA': dict(n_kv_head=1), MLA: dict(n_latent=64, kv_lr=1 / 8)}


def study(place, *more, arms=f'MHA;MQA;{MLA}'):
    keys = (f'--out_dir={place}/out', f'--data_dir={place}/data', '--jobs=1', f'--arms={arms}', f'--max_iters={ITERS}')
    return forking.run('studies/contest.py', (*keys, *more), 300)


def plant(place, arm, rate, seed, loss, **changes):
    """A finished run with this loss."""
    folder = place / 'out' / f'shakespeare_char-{ITERS}' / f'{SLUGS[arm]}_scratch_lr{rate:g}_s{seed}'
    folder.mkdir(parents=True)
    config = dict(KEYS[arm], learning_rate=rate, seed=seed, max_iters=ITERS, **changes)
    torch.save(dict(model={}, model_args={}, iter_num=ITERS, config=config), folder / 'ckpt.pt')
    sizes = dict(parameters=1000, flops_per_token=1, cache_bytes_per_token=ARMS[arm][0])
    (folder / 'result.json').write_text(json.dumps(dict(sizes, val_loss=loss)))
    return folder


@pytest.fixture
def place(tmp_path):
    """A data set, and a finished tuning: MLA's best rate is the lower one, the others' the higher one."""
    write_characters(tmp_path / 'data' / 'shakespeare_char', 4000, 4300)
    for arm in ARMS:
        for rate in RATES:
            best = rate == RATES[0] if arm.startswith('MLA') else rate == RATES[1]
            plant(tmp_path, arm, rate, 1000, 2.0 if best else 3.0)
    return tmp_path


def rows_of(text):
    """The cells of the tables' rows."""
    return [[cell.strip() for cell in line.split('|')[1:-1]] for line in text.splitlines() if line.startswith('|')]


def test_each_arm_is_reported_at_its_own_best_rate_and_differences_are_by_seed(place):
    for arm, (_, more) in ARMS.items():
        for seed, base in enumerate((1.0, 5.0, 2.0, 3.0)):
            rate = RATES[0] if arm.startswith('MLA') else RATES[1]
            plant(place, arm, rate, 2000 + seed, base + more + 0.01 * seed * bool(more))
    done = study(place, '--final_seeds=4', arms='MHA;MQA')
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout)
    assert ['MHA', '1,000', '4,096', '0.016 (end of the grid)', '4', '2.7500 ± 2.7171', '', '-0.3150 ± 0.0205'] in rows
    assert ['MQA', '1,000', '1,024', '0.016 (end of the grid)', '4', '3.0650 ± 2.7219', '+0.3150 ± 0.0205', ''] in rows
    assert ['MHA', '3.0000', '2.0000', '1'] in rows  # the grid
    numbers = json.loads((place / 'out' / 'shakespeare_char.json').read_text())
    assert numbers['best_rates'] == {'MHA': 0.016, 'MQA': 0.016} and len(numbers['runs']) == 4 + 8


def test_missing_runs_are_trained_and_mha_is_converted(place):
    arms = f'MHA;{MLA}'
    done = study(place, '--final_seeds=1', arms=arms)
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout)
    row = next(row for row in rows if row[0] == MLA)
    assert row[2:4] == ['1,024', '0.004 (end of the grid)'] and 1 < float(row[5]) < 4
    assert 'MLA, r=C, kv_lr=1/8' in {row[0] for row in rows}  # the control at full rank
    numbers = json.loads((place / 'out' / 'shakespeare_char.json').read_text())
    found = {(run['arm'], run['kind']): run for run in numbers['runs'] if run['seed'] >= 2000}
    mha = found['MHA', 'scratch']['val_loss']
    assert found[MLA, 'tuned']['before'] == pytest.approx(mha, abs=0.05)  # a conversion keeps what was learned
    assert found['MLA, r=C, kv_lr=1/8', 'from0']['val_loss'] == pytest.approx(mha, abs=0.5)
    assert found[MLA, 'tuned']['cache_bytes_per_token'] == 4 * 4 * 64
    for name in ('shakespeare_char.png', 'shakespeare_char-rates.png'):
        assert (place / 'out' / name).read_bytes().startswith(b'\x89PNG')


def test_runs_of_an_earlier_study_are_not_repeated(place):
    """The recorded ones count, also in the tuning; only what is missing is run, and MHA again for a new conversion."""
    first = study(place, '--final_seeds=1', arms=f'MHA;{MLA}')
    assert first.returncode == 0, first.stderr
    earlier = place / 'earlier.json'
    earlier.write_text((place / 'out' / 'shakespeare_char.json').read_text())
    mark(earlier, MLA, 'tuned', 1.25)
    more = json.loads(earlier.read_text())
    more['runs'] += [dict(more['runs'][0], rate=rate, seed=1001, val_loss=2.5) for rate in RATES]
    earlier.write_text(json.dumps(more))
    shutil.rmtree(place / 'out')
    done = study(place, '--final_seeds=1', f'--reuse={earlier}', arms=f'MHA;{MLA};GQA-2')
    assert done.returncode == 0, done.stderr
    numbers = json.loads((place / 'out' / 'shakespeare_char.json').read_text())
    assert next(r for r in numbers['runs'] if (r['arm'], r['kind']) == (MLA, 'tuned'))['val_loss'] == 1.25
    assert ['MHA', '2.7500', '2.2500', '2'] in rows_of(done.stdout)  # of the recorded seeds 1000 and 1001
    trained = sorted(folder.name for folder in (place / 'out' / f'shakespeare_char-{ITERS}').iterdir())
    assert [name.split('_')[0] for name in trained] == ['gqa-2'] * 5 + ['mha']
    added = study(place, '--final_seeds=1', f'--reuse={earlier}', arms='GQA-2')
    both = [row for row in rows_of(done.stdout) if row[:2] != ['GQA-2', '2,048']]  # its conversion, from MHA models
    assert rows_of(added.stdout) == both  # recorded arms need not be named
    other = study(place, '--max_iters=5', f'--reuse={earlier}', arms='MHA')
    assert other.returncode == 2 and f'has iterations={ITERS}, not 5; leave out --reuse' in other.stderr


def mark(path, arm, kind, loss):
    """Change the loss of a run in a study's numbers, so that it can be recognized."""
    numbers = json.loads(path.read_text())
    next(r for r in numbers['runs'] if (r['arm'], r['kind']) == (arm, kind))['val_loss'] = loss
    path.write_text(json.dumps(numbers))


def test_a_folder_with_another_run_is_refused(place):
    plant(place, 'MHA', 1.6e-2, 2000, 1.0, n_layer=7)
    done = study(place, '--final_seeds=1', arms='MHA')
    assert done.returncode == 2 and 'has n_layer=7, not 4; choose another --out_dir' in done.stderr


def test_an_unknown_arm_is_named(place):
    done = study(place, arms='MHA;MLP')
    assert done.returncode == 2 and 'unknown arms: MLP; choose from MHA; GQA-2; MQA' in done.stderr


def test_every_arm_can_be_drawn_and_an_unknown_one_is_not_lost(place):
    every = study(place, arms='x').stderr.split('choose from ')[1].strip().split('; ')
    plant(place, 'MHA', RATES[1], 2000, 2.0)
    assert study(place, '--final_seeds=1', arms='MHA').returncode == 0
    earlier = place / 'earlier.json'
    numbers = json.loads((place / 'out' / 'shakespeare_char.json').read_text())
    numbers['runs'] = [dict(run, arm=arm) for run in numbers['runs'] for arm in every]
    earlier.write_text(json.dumps(numbers))
    done = study(place, '--final_seeds=1', f'--reuse={earlier}', arms='MHA')
    assert done.returncode == 0, done.stderr
    assert {row[0] for row in rows_of(done.stdout)} >= set(every) and len(every) > 20
    earlier.write_text(earlier.read_text().replace('MQA, Muon', 'MQA, Muoff'))
    done = study(place, f'--reuse={earlier}', arms='MHA')
    assert done.returncode == 2 and 'has arms that are not known here (MQA, Muoff); leave out --reuse' in done.stderr


@pytest.mark.parametrize('name', ['shakespeare', 'code', 'code_c384'])
def test_published_studies_are_shown_again(name, tmp_path):
    published = json.loads((ROOT / f'assets/contest_{name}.json').read_text())
    done = forking.run('studies/contest.py', (f'--reuse=assets/contest_{name}.json', f'--out_dir={tmp_path}'), 100)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / f'contest_{name}.json').read_text()) == published
    assert (tmp_path / f'contest_{name}.png').read_bytes().startswith(b'\x89PNG')
