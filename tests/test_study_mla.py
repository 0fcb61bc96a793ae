"""studies/mla.py: the tables show the runs' numbers, finished runs are kept, missing ones are run."""

import json
import re
import shutil

import forking
import pytest
import torch
from training import write_characters

ITERS, TUNING, SEEDS = 4, 2, (1337, 1338)
SIZES = (96, 64, 32, 16)
KINDS = ['mha-learned', 'mha-rope', 'mha-tuned', 'mla-learned-85', 'mla-rope-64', 'mla-rope-96']
KINDS += [f'{kind}-{size}' for kind in ('mla-learned', 'converted', 'tuned') for size in SIZES]


def config_of(kind, seed):
    """The keys that a run of this kind is made with."""
    size = int(kind.rpartition('-')[2]) if kind[-1].isdigit() else 0
    if kind.startswith('converted'):
        return dict(n_latent=size)
    tuned = 'tuned' in kind
    iters = TUNING if tuned else ITERS
    keys = dict(seed=seed + 1000 * tuned, max_iters=iters, lr_decay_iters=iters, n_latent=size, attention='mha')
    if tuned:
        return keys
    old = dict(latent_init='gpt2') if kind.startswith('mla') else {}
    return dict(keys, **old, pos='rope' if 'rope' in kind else 'learned')


def study(place, *more):
    keys = (f'--out_dir={place}/out', f'--data_dir={place}/data', f'--figure={place}/picture.png', '--jobs=1')
    return forking.run(
        'studies/mla.py',
        (*keys, f'--seeds={len(SEEDS)}', f'--max_iters={ITERS}', f'--tuning_iters={TUNING}', *more),
        200,
    )


@pytest.fixture
def finished(tmp_path):
    """A study whose runs are all finished: losses 2.0 and 2.2 for MHA's two seeds, 0.1 and 0.3 more for MLA's."""
    write_characters(tmp_path / 'data' / 'shakespeare_char', 4000, 4300)
    for kind in KINDS:
        for number, seed in enumerate(SEEDS):
            folder = tmp_path / 'out' / f'{kind}-s{seed}'
            folder.mkdir(parents=True)
            keys = dict(model={}, model_args={}, iter_num=ITERS, config=config_of(kind, seed))
            torch.save(keys, folder / 'ckpt.pt')
            loss = (2.0, 2.2)[number] + (0.0 if kind.startswith('mha') else (0.1, 0.3)[number])
            sizes = dict(parameters=1000, attention_parameters=100, cache_bytes_per_token=4096)
            (folder / 'result.json').write_text(json.dumps(dict(sizes, val_loss=loss)))
    return tmp_path


def test_the_tables_show_the_runs_numbers(finished):
    done = study(finished)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (finished / 'out' / 'tables.md').read_text()
    rows = [[cell.strip() for cell in line.split('|')] for line in done.stdout.splitlines() if line.startswith('|')]
    assert ['', 'MHA', 'rope', '', '1,000', '4,096', '2.1000 ± 0.1000', '', ''] in rows
    assert ['', 'MLA', 'rope', '64', '1,000', '4,096', '2.3000 ± 0.2000', '+0.2000 ± 0.1000', ''] in rows
    assert ['', '16', '4,096', '1.0', *['+0.2000 ± 0.1000'] * 3, ''] in rows
    numbers = json.loads((finished / 'picture.json').read_text())
    assert set(numbers['results']) == set(KINDS) and numbers['corpus'] == 'a test text'
    assert [run['val_loss'] for run in numbers['results']['mha-tuned']] == [2.0, 2.2]
    assert (finished / 'picture.png').read_bytes().startswith(b'\x89PNG')


def test_a_missing_run_is_trained_and_measured(finished):
    shutil.rmtree(finished / 'out' / 'mla-rope-64-s1338')
    done = study(finished)
    log = finished / 'out' / 'mla-rope-64-s1338' / 'log.txt'
    assert done.returncode == 0, done.stderr + log.read_text()[-500:]
    found = json.loads((finished / 'picture.json').read_text())['results']['mla-rope-64']
    assert found[0]['val_loss'] == 2.1 and 1.5 < found[1]['val_loss'] < 4
    assert found[1]['cache_bytes_per_token'] == 4 * 4 * (64 + 16)  # 4 layers of float32: latent and position key
    assert [path.parent.name for path in (finished / 'out').glob('*/log.txt')] == ['mla-rope-64-s1338']


def test_a_folder_with_another_run_is_refused(finished):
    file = finished / 'out' / 'tuned-32-s1337' / 'ckpt.pt'
    saved = torch.load(file)
    saved['config']['max_iters'] = 7
    torch.save(saved, file)
    done = study(finished)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert re.search(r'tuned-32-s1337 has max_iters=7, not 2; choose another --out_dir', done.stderr)
    assert not (finished / 'picture.png').exists()
