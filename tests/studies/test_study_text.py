"""studies/induction_text.py: tables show the numbers of the runs, and finished runs are kept."""

import json
import string
from pathlib import Path

import pytest
import torch
from support import forking
from support.training import write_characters

from core.cli.errors import UserError
from core.runs import models
from model import GPT, GPTConfig
from studies import measure

pytestmark = pytest.mark.slow

LABELS = ('MHA', 'MQA', 'MLA, cache of MQA')


def study(*keys):
    return forking.run('tests/support/quick_study.py', ('studies/induction_text.py', *keys), seconds=400)


def row_of(text, title, name):
    """The cells of the row of a model in the table with this title."""
    part = text[text.index(f'**{title}') :]
    line = next(line for line in part.splitlines() if line.startswith(f'| {name} |'))
    return [cell.strip() for cell in line.split('|')[2:-1]]


def run(label, seed, score, formed, repeated, previous=0.7):
    """Made-up numbers of a run."""
    rises = dict(repeated=dict(mean=score), others=dict(mean=0.1), control_repeated=0.01, control_others=0.02)
    curve = [dict(tokens=n * 10**6, induction=score, previous=previous, gain=dict(mean=1.0)) for n in (1, 5)]
    return dict(
        label=label, rate=4e-3, seed=seed, score=score, formed=formed, repeated=repeated, previous=previous,
        curve=curve, best=[3, seed % 4], best_previous=[1, 2], copying=0.5, previous_formed=10**6,
        repeated_share=0.36, others=3.0, heads=2, ablation=dict.fromkeys('124', rises),
        parameters=1000, random_null=0.01,
    )  # fmt: skip


def test_tables_pair_runs_by_seed_and_say_which_formed_heads(tmp_path):
    runs = [run('MHA', 6000, 0.6, 2_000_000, 1.0), run('MHA', 6001, 0.8, 4_000_000, 1.2)]
    runs += [run('MLA, cache of MQA', 6000, 0.1, None, 2.0, 0.9), run('MLA, cache of MQA', 6001, 0.5, 3_000_000, 1.5)]
    rates = dict.fromkeys(LABELS, 4e-3)
    setting = dict(iterations=5000, seeds=2)
    numbers = dict(setting=setting, rates=rates, tuning={'MHA': {'0.004': 1.5, '0.008': 1.25}}, runs=runs)
    (tmp_path / 'a.json').write_text(json.dumps(numbers))
    done = study(f'--reuse={tmp_path}/a.json', f'--out_dir={tmp_path}/out')
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert row_of(text, 'Formation', 'MHA')[1:5] == ['3.00 [2.00, 4.00]', '', '0.600, 0.800', '3.0, 3.1']
    found = row_of(text, 'Formation', 'MLA, cache of MQA')
    # times 2 and 4 against 3 and never: two events where 1/2 + 1/3 + 1/2 are expected, variance 1/4 + 2/9 + 1/4
    assert found[1:4] == ['3.00 (1 of 2)', '0.4328', '0.100, 0.500']
    assert row_of(text, 'Paired', 'MLA, cache of MQA')[:2] == ['+0.100 [+0.000, +0.200]', '+0.650 [+0.300, +1.000]']
    # what the heads are worth is told of runs that have them
    assert row_of(text, 'The best', 'MLA, cache of MQA')[:2] == ['1', '+0.500, +0.100']
    assert row_of(text, 'Tuning', 'MHA') == ['1.5000', '1.2500']


def test_a_study_in_miniature_trains_and_measures(tmp_path):
    text = f'the cat sat on the mat. {string.printable[:90]} ' * 500
    write_characters(tmp_path / 'data' / 'code', 40_000, 49_000, text)
    model = GPT(GPTConfig(block_size=16, vocab_size=20, n_layer=1, n_head=1, n_embd=8))
    for slug, more in (
        ('mha', {}),
        ('mqa', dict(n_kv_head=1)),
        ('mla--cache-of-mqa', dict(attention='mla', n_latent=48, latent_norm=True)),
    ):
        best = 4e-3 if slug == 'mha' else 2e-3
        for rate in (1e-3, 2e-3, 4e-3, 8e-3):
            folder = tmp_path / 'out' / '3' / f'{slug}_lr{rate:g}_s5000'
            folder.mkdir(parents=True)
            keys = dict(learning_rate=rate, min_lr=rate / 10, seed=5000, max_iters=3, lr_decay_iters=3, device='cpu')
            keys |= dict(dtype='float32', compile=False, dataset='code', **more)
            torch.save(models.contents(model, keys, val_loss=1 + abs(rate - best)), folder / 'ckpt_000003.pt')
    keys = (f'--data_dir={tmp_path}/data', f'--out_dir={tmp_path}/out', '--max_iters=3', '--jobs=1')
    done = study(*keys)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / 'out' / 'text.json').read_text())
    assert numbers['rates'] == {'MHA': 4e-3, 'MQA': 2e-3, 'MLA, cache of MQA': 2e-3}
    assert list(numbers['tuning']['MHA']) == ['0.002', '0.004', '0.008']
    assert list(numbers['tuning']['MQA']) == ['0.001', '0.002', '0.004', '0.008']
    assert [(r['label'], r['seed'], r['formed']) for r in numbers['runs']] == [(label, 6000, None) for label in LABELS]
    assert len({r['parameters'] for r in numbers['runs']}) == 3
    for r in numbers['runs']:
        assert [step['tokens'] for step in r['curve']] == [3 * 1024]
    first = numbers['runs'][0]
    assert row_of(done.stdout, 'Formation', 'MHA')[1:4:2] == ['never (0 of 1)', f'{first["score"]:.3f}']
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / 'out').rglob('ckpt*.pt')}
    assert study(*keys).stdout == done.stdout
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / 'out').rglob('ckpt*.pt')}
    other = study(*keys, '--dtype=bfloat16')
    assert other.returncode == 2 and 'holds a run with another dtype; choose another --out_dir' in other.stderr


@pytest.mark.parametrize('name', ['ckpt.pt', 'ckpt_000003.pt'])  # stopped on the way, and finished
def test_a_run_with_other_keys_is_not_continued(name, tmp_path):
    run = measure.run_of(tmp_path, 'MHA', 4e-3, 6000)
    Path(run['folder']).mkdir()
    keys = dict(learning_rate=4e-3, min_lr=4e-4, seed=6000, max_iters=3, lr_decay_iters=3, dtype='float32')
    model = GPT(GPTConfig(block_size=16, vocab_size=20, n_layer=1, n_head=1, n_embd=8))
    torch.save(models.contents(model, keys, val_loss=1.5), Path(run['folder'], name))
    with pytest.raises(UserError, match='holds a run with another dtype; choose another --out_dir'):
        measure.trained(run, ['train.py'], dict(dtype='bfloat16'), [3], 'data')
    if name == 'ckpt_000003.pt':
        assert measure.trained(run, ['train.py'], dict(dtype='auto'), [3], 'data') == 1.5


def test_wrong_names_are_errors_before_anything_is_trained(tmp_path):
    (tmp_path / 'broken.json').write_text('{"runs": [{}]}')
    for key, complaint in (('--dataset=nowhere', 'nowhere'), (f'--reuse={tmp_path}/broken.json', 'study')):
        done = study(key, f'--out_dir={tmp_path}/out')
        assert done.returncode == 2 and complaint in done.stderr and 'Traceback' not in done.stderr, done.stderr
        assert not (tmp_path / 'out').exists()
