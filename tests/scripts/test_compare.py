"""compare.py and analysis/comparison.py: losses on the same windows, runs that still train, labels, samples."""

import json
import shutil

import pytest
import torch
from support import forking
from support.training import run

from analysis import comparison
from core.runs.checkpoint import load
from core.runs.evaluation import window_losses
from core.runs.models import build_model
from core.text.dataset import TokenData


@pytest.fixture(scope='module')
def runs(data_dir, tmp_path_factory):
    """Finished runs: MHA, MHA at another learning rate, MLA; and MHA on another block size."""
    place = tmp_path_factory.mktemp('runs')
    for name, script, keys in (('mha', 'train.py', {}), ('slow', 'train.py', dict(learning_rate=2e-3)),
                               ('mla', 'train_mla.py', {}), ('short', 'train.py', dict(block_size=8))):  # fmt: skip
        assert run(script, data_dir, place / name, max_iters=6, kv_lr=1, **keys).returncode == 0
    return place


def compare(place, names, *flags):
    folders = ','.join(str(place / name) for name in names)
    arguments = [f'--runs={folders}', f'--out_dir={place}/out', '--device=cpu', '--threads=1', '--dtype=float32']
    return forking.run('compare.py', [*arguments, '--start=a', '--sample_tokens=12', *flags], 120)


def test_the_differences_are_of_the_same_windows(runs, data_dir):
    done = compare(runs, ['mha', 'mla', 'slow'])
    assert done.returncode == 0, done.stderr
    data = TokenData(data_dir / 'tiny', 16)
    models = [build_model(load(str(runs / name))) for name in ('mha', 'mla')]
    one, other = (window_losses(model, data, 'val', 320, 32) for model in models)
    gap = other - one
    results = json.loads((runs / 'out' / 'comparison.json').read_text())['results']
    found = results['MLA, r=16, learning_rate=0.01']
    assert found['val_loss'] == pytest.approx(other.mean().item(), abs=1e-6)
    half = 1.96 * gap.std().item() / len(gap) ** 0.5
    assert found['minus_first'] == pytest.approx([gap.mean().item(), half], abs=1e-6)
    assert found['cache_bytes_per_token'] == 2 * 4 * 16 and len(found['sample']) == 13
    assert f'{gap.mean().item():+.4f} ± {half:.4f}' in done.stdout
    assert 'different numbers of iterations' not in done.stdout
    names = ['MHA, learning_rate=0.01', 'MLA, r=16, learning_rate=0.01', 'MHA, learning_rate=0.002']
    assert list(results) == names and all(f'| {name} ' in done.stdout for name in names)
    lines = [line for line in done.stdout.splitlines() if line.startswith('|')]
    assert len(lines) == 5 and len({len(line) for line in lines if '---' not in line}) == 1, 'columns are aligned'
    assert (runs / 'out' / 'comparison.png').read_bytes().startswith(b'\x89PNG')
    assert 'MLA, r=16' in (runs / 'out' / 'comparison.md').read_text()


def test_other_windows_are_not_subtracted(runs):
    done = compare(runs, ['mha', 'short'])
    assert done.returncode == 0, done.stderr
    results = json.loads((runs / 'out' / 'comparison.json').read_text())['results']
    assert [result['minus_first'] for result in results.values()] == [None, None]


@pytest.mark.slow
def test_a_run_that_still_trains_is_shown_as_it_is(runs, data_dir):
    folder = runs / 'training'
    assert run('train.py', data_dir, folder, max_iters=4).returncode == 0
    saved = torch.load(folder / 'ckpt.pt')
    saved['config']['max_iters'] = 100
    torch.save(saved, folder / 'ckpt.pt')
    (runs / 'begun').mkdir()
    shutil.copyfile(folder / 'log.csv', runs / 'begun' / 'log.csv')
    done = compare(runs, ['mha', 'training', 'begun'])
    assert done.returncode == 0, done.stderr
    assert 'different numbers of iterations' in done.stdout
    assert '4 of 100' in done.stdout and 'begun (nothing saved yet)' in done.stdout


def test_a_checkpoint_that_names_no_data_set_is_named(runs):
    """nanoGPT's config may lack what ours has."""
    (runs / 'bare').mkdir()
    saved = torch.load(runs / 'mha' / 'ckpt.pt')
    torch.save({key: saved[key] for key in ('model', 'model_args')}, runs / 'bare' / 'ckpt.pt')
    done = compare(runs, ['mha', 'bare'])
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert 'bare does not say which data set it was trained on; leave it out of --runs' in done.stderr


def test_every_run_has_a_label_of_its_own(runs):
    found = [comparison.read(str(runs / name)) for name in ('mha', 'slow', 'mha', 'mla')]
    comparison.label(found)
    labels = ['MHA, learning_rate=0.01 (1)', 'MHA, learning_rate=0.002', 'MHA, learning_rate=0.01 (2)']
    assert [run.label for run in found] == [*labels, 'MLA, r=16, learning_rate=0.01']


def test_every_training_key_that_differs_is_named_whatever_the_attention(runs):
    found = [comparison.read(str(runs / name)) for name in ('mha', 'mla', 'mla')]
    keys = dict(kv_lr=1.0), dict(kv_lr=0.5), dict(kv_lr=0.5, out_dir='x', threads=7)
    for number in range(3):
        found[number].saved['config'] |= keys[number]
    # MLA's own keys: those in MHA's config do nothing, and two MLAs differ in them
    found[0].saved['config'] |= dict(latent_norm=True, n_latent=5)
    found[2].saved['model_args'] = found[2].saved['model_args'] | dict(latent_init='gpt2')
    comparison.label(found)
    assert [run.label for run in found] == ['MHA, kv_lr=1.0', 'MLA, r=16, kv_lr=0.5, latent_init=fan_in',
                                            'MLA, r=16, kv_lr=0.5, latent_init=gpt2']  # fmt: skip
    older = [comparison.read(str(runs / name)) for name in ('mha', 'mha')]
    del older[0].saved['config']['optimizer'], older[0].saved['config']['dtype']  # one that it didn't have, one unknown
    older[1].saved['config']['optimizer'] = 'muon'
    comparison.label(older)
    assert [run.label for run in older] == ['MHA, optimizer=adamw', 'MHA, optimizer=muon']


@pytest.mark.slow
def test_following_ends_when_all_are_finished(runs):
    done = compare(runs, ['mha', 'mla'], '--follow=1')
    assert done.returncode == 0 and done.stdout.count('val loss: mean') == 1


def test_a_folder_without_a_run_is_named(runs):
    done = compare(runs, ['mha', 'nowhere'])
    assert done.returncode == 2 and 'nowhere holds no run: neither ckpt.pt nor log.csv' in done.stderr


def test_samples_stand_side_by_side():
    texts = ('one two three four five six seven', 'first\nsecond')
    runs = [comparison.Run('x', None, [], f'arm {i}', {'sample': text}) for i, text in enumerate(texts)]
    lines = comparison.side_by_side(runs, 60).splitlines()
    assert lines[0] == f'{"arm 0":30}arm 1' and lines[2] == f'{"one two three four five six":30}first'
    assert lines[3] == f'{"seven":30}second'
    assert comparison.side_by_side(runs, 40).startswith('---- arm 0 ----\none two')
