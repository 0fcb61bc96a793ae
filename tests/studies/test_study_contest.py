"""studies/contest.py: every model gets the same search, its best setting is found inside the grid, pairs are tested."""

import json
import shutil
from itertools import product

import numpy as np
import pytest
from support import forking
from support.training import write_characters

pytestmark = pytest.mark.slow

ITERS = 4
RATES = (1.41e-3, 2e-3, 2.83e-3, 4e-3, 5.66e-3, 8e-3, 1.13e-2, 1.6e-2, 2.26e-2)
HALF, MLA = 'MHA, half rotated', 'MLA, cache of MQA'
# the best rate, factor and initial rms of each model, and the loss that it reaches there
BEST = {'MHA': (8e-3, 1.0, 0.5, 2.0), 'MQA': (2.83e-3, 0.25, 0.0, 2.1), MLA: (4e-3, 1.0, 0.0, 2.001)}
SIZE = ('--n_layer=1', '--n_head=4', '--n_embd=16', '--block_size=8', '--batch_size=2')


def study(place, *more, arms=f'MHA;MQA;{MLA}'):
    keys = [f'--out_dir={place}/out', f'--data_dir={place}/data', '--dataset=tiny', '--jobs=1', f'--arms={arms}']
    return forking.run('studies/contest.py', [*keys, *SIZE, f'--max_iters={ITERS}', *more], 300)


def runs_of(place):
    return place / 'out' / f'tiny-modern-adamw-{ITERS}'


def plant(place, arm, rate, factor, rms, seed, loss):
    """A finished run with this loss."""
    name = f'{arm}_lr{rate:g}_x{factor:g}_rms{rms:g}_s{seed}'.replace(', ', '-').replace(' ', '-')
    folder = runs_of(place) / name
    folder.mkdir(parents=True)
    sizes = dict(parameters=1000, attention_parameters=500, flops_per_token=1, cache_bytes_per_token=128)
    keys = dict(learning_rate=rate, kv_lr=factor, kv_rms=rms, seed=seed, max_iters=ITERS)
    (folder / 'result.json').write_text(json.dumps(dict(val_loss=loss, keys=keys, commit='c', **sizes)))
    if loss:
        np.save(folder / 'losses.npy', np.float32(loss + np.linspace(-1, 1, 50)))
    return folder


def landscape(arm, rate, factor, rms):
    """The loss of a setting. At another factor the best rate is another one, which only the second search finds."""
    best, its_factor, its_rms, loss = BEST[arm]
    shift = 0.5 * (factor != its_factor)
    steps = 2 * np.log2(rate / best)
    return loss + 0.01 * (steps - shift) ** 2 + 0.02 * (factor != its_factor) + 0.004 * (rms != its_rms)


@pytest.fixture
def place(tmp_path):
    """A data set; every setting that a search could ask for, trained; final seeds at the best setting of each."""
    write_characters(tmp_path / 'data' / 'tiny', 400, 430)
    for arm, (*best, loss) in BEST.items():
        for rate, factor, rms, seed in product(RATES, (1.0, 0.25, 0.125), (0.0, 0.5), (1000,)):
            plant(tmp_path, arm, rate, factor, rms, seed, landscape(arm, rate, factor, rms))
        for n, noise in enumerate((-0.001, 0.0, 0.001, 0.0, -0.001)):
            plant(tmp_path, arm, *best, 3000 + n, loss + noise)
    return tmp_path


def trained(place):
    """The runs that were trained rather than planted."""
    return sorted(path.parent.name for path in runs_of(place).glob('*/ckpt.pt'))


def test_the_search_finds_each_models_best_setting_and_pairs_are_tested(place):
    done = study(place, '--most_seeds=5')
    assert done.returncode == 0, done.stderr
    assert not trained(place)
    numbers = json.loads((place / 'out' / 'contest.json').read_text())
    for arm, (rate, factor, rms, _) in BEST.items():
        assert numbers['models'][arm]['setting'] == dict(rate=rate, kv_lr=factor, kv_rms=rms), arm
        asked = {run['rate'] for run in numbers['models'][arm]['tuning']}
        assert min(asked) < rate < max(asked), 'the best rate has a worse one on either side'
    pairs = {(pair['one'], pair['other']): pair for pair in numbers['pairs']}
    assert set(pairs) == {(MLA, 'MHA'), (MLA, 'MQA'), ('MQA', 'MHA')}
    near, far = pairs[MLA, 'MHA'], pairs['MQA', 'MHA']
    assert near['p_equal'] < 0.05 < near['p_holm'] and near['difference'] == pytest.approx(0.001)
    assert far['p_holm'] < 1e-6 and far['p_equal'] > 0.99 and far['difference'] == pytest.approx(0.1)
    assert near['text_error'] == pytest.approx(0, abs=1e-6), 'the same difference in every window'
    assert 'equal within 0.0075' in done.stdout and '| MQA | MHA | +0.1000 |' in done.stdout
    for picture in ('contest.png', 'contest-tuning.png'):
        assert (place / 'out' / picture).read_bytes().startswith(b'\x89PNG')
    again = forking.run('studies/contest.py', [f'--reuse={place}/out/contest.json', f'--out_dir={place}/again'])
    assert again.stdout == done.stdout and (place / 'again/contest.md').read_text() == done.stdout


def test_a_missing_run_is_trained_kept_and_counted(place):
    """Taken settings are not searched again; a model without one is an error."""
    assert study(place, '--most_seeds=5').returncode == 0
    (place / 'out/contest.json').rename(place / 'tuned.json')
    shutil.rmtree(runs_of(place))
    more = (f'--tuned={place}/tuned.json', '--most_seeds=2')
    done = study(place, *more, arms=f'MHA;{MLA}')
    assert done.returncode == 0, done.stderr
    names = ['MHA_lr0.008_x1_rms0.5_s3000', 'MHA_lr0.008_x1_rms0.5_s3001']
    assert [name for name in trained(place) if name.startswith('MHA')] == names and len(trained(place)) == 4
    numbers = json.loads((place / 'out/contest.json').read_text())
    assert numbers['models'][MLA]['cached_numbers'] == 2 * 4  # as MQA: keys and values of one head of 4
    assert [run['seed'] for run in numbers['models']['MHA']['finals']] == [3000, 3001]
    before = (runs_of(place) / names[0] / 'ckpt.pt').read_bytes()
    again = study(place, *more, arms=f'MHA;{MLA}')
    assert again.stdout == done.stdout and (runs_of(place) / names[0] / 'ckpt.pt').read_bytes() == before
    other = study(place, *more, '--batch_size=3', arms='MHA')
    assert other.returncode and 'has batch_size=2, not 3; choose another --out_dir' in other.stderr
    other = study(place, *more, arms=HALF)
    assert other.returncode and f'has no setting of {HALF}; name others with --arms' in other.stderr


def test_rates_at_which_training_diverged_are_worse_than_any(place):
    for path in runs_of(place).glob('MHA_lr0.0113*'):
        shutil.rmtree(path)
    for factor, rms in product((1.0, 0.25, 0.125), (0.0, 0.5)):
        plant(place, 'MHA', 1.13e-2, factor, rms, 1000, None)
    done = study(place, '--most_seeds=5', arms='MHA')
    assert done.returncode == 0, done.stderr
    assert json.loads((place / 'out/contest.json').read_text())['models']['MHA']['setting']['rate'] == 8e-3


def test_unknown_models_get_one_line(place):
    done = study(place, arms='MHA;MHB')
    assert done.returncode and 'unknown arms: MHB; choose from MHA; MQA; MLA, cache of MQA' in done.stderr
