"""studies/induction_text.py: tables show the numbers of the runs."""

import json
import string

import pytest
from support import ROOT, forking
from support.training import write_characters

pytestmark = pytest.mark.slow

PUBLISHED = 'assets/induction_text.json'


def study(*keys):
    return forking.run('tests/support/quick_study.py', ('studies/induction_text.py', *keys), seconds=400)


def row_of(text, title, name):
    """The cells of the row of an arm in the table with this title."""
    part = text[text.index(f'**{title}') :]
    line = next(line for line in part.splitlines() if line.startswith(f'| {name} |'))
    return [cell.strip() for cell in line.split('|')[2:-1]]


def test_tables_pair_runs_by_seed_and_say_which_formed_heads(tmp_path):
    runs = json.loads((ROOT / PUBLISHED).read_text())['runs']
    one = next(run for run in runs if run['arm'] == 'MHA' and run['share'] is None)
    made_up = []
    for arm, seed, score, formed, repeated in (
        ('MHA', 1337, 0.6, 2_000_000, 1.0),
        ('MHA', 1338, 0.8, 4_000_000, 1.2),
        ('MLA, r=C/2', 1338, 0.1, None, 2.0),
        ('MLA, r=C/2', 1337, 0.5, 3_000_000, 1.5),
    ):
        made_up.append(
            dict(one, arm=arm, seed=seed, score=score, formed=formed, repeated=repeated, best=[3, seed - 1336])
        )
    (tmp_path / 'a.json').write_text(json.dumps(dict(runs=made_up)))
    done = study(f'--reuse={tmp_path}/a.json', f'--out_dir={tmp_path}/out')
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert row_of(text, 'Formation', 'MHA')[1:4] == ['3.00 [2.00, 4.00]', '0.700 [0.600, 0.800]', '3.1, 3.2']
    assert row_of(text, 'Formation', 'MLA, r=C/2')[1] == '3.00 (1 of 2)'
    assert row_of(text, 'Paired', 'MLA, r=C/2')[:2] == ['-0.400 [-0.700, -0.100]', '+0.650 [+0.500, +0.800]']
    assert 'MHA on prose' not in text


def test_a_study_in_miniature_trains_and_measures(tmp_path):
    text = f'the cat sat on the mat. {string.printable[:90]} ' * 500
    write_characters(tmp_path / 'data' / 'code', 40_000, 49_000, text)
    keys = (f'--data_dir={tmp_path}/data', f'--out_dir={tmp_path}/out', '--arms=MHA', '--jobs=1')
    done = study('--max_iters=3', *keys)
    assert done.returncode == 0, done.stderr
    (run,) = json.loads((tmp_path / 'out' / 'text.json').read_text())['runs']
    assert [step['tokens'] for step in run['curve']] == [3 * 1024] and run['rate'] == 4e-3 and run['formed'] is None
    assert abs(run['curve'][0]['repeated'] - run['repeated']) < 0.2  # the sweep's and the final measurement
    assert row_of(done.stdout, 'Formation', 'MHA')[1:3] == ['never (0 of 1)', f'{run["score"]:.3f}']


def test_runs_of_an_earlier_study_are_not_repeated(tmp_path):
    """With every run recorded nothing is trained; an earlier study of other iterations or data is refused."""
    write_characters(tmp_path / 'data' / 'code', 4000, 4300)
    keys = ('--arms=MHA', '--seeds=1', f'--data_dir={tmp_path}/data', f'--out_dir={tmp_path}/out')
    runs = json.loads((ROOT / PUBLISHED).read_text())['runs']
    one = next(run for run in runs if run['name'] == 'code-mha-s1337')
    at = [dict(step, tokens=1024 * 300) for step in one['curve'][:1]]
    made_up = [dict(one, score=0.3, curve=at), dict(one, name='x', seed=2, score=0.7, curve=at)]
    (tmp_path / 'a.json').write_text(json.dumps(dict(runs=made_up, config=dict(dataset='code', prose=''))))
    done = study(f'--reuse={tmp_path}/a.json', *keys)
    assert done.returncode == 0, done.stderr
    assert row_of(done.stdout, 'Formation', 'MHA')[2] == '0.500 [0.300, 0.700]'
    assert len(json.loads((tmp_path / 'out' / 'text.json').read_text())['runs']) == 2
    assert not list((tmp_path / 'out').glob('*/code-*'))
    other = study(f'--reuse={tmp_path}/a.json', '--max_iters=301', *keys)
    assert other.returncode == 2 and 'has 300 iterations on code, not 301 on code' in other.stderr


def test_each_arm_is_shown_at_its_best_learning_rate(tmp_path):
    runs = json.loads((ROOT / PUBLISHED).read_text())['runs']
    one = dict(next(run for run in runs if run['name'] == 'code-mha-s1337'), others=3.0)
    runs = [
        dict(one, rate=4e-3, score=0.5, repeated=1.0),
        dict(one, rate=8e-3, score=0.3, repeated=1.1),
        dict(one, arm='MQA', rate=4e-3, score=0.1, repeated=2.0),
        dict(one, arm='MQA', rate=8e-3, score=0.2, repeated=1.5),
        dict(one, seed=1338, arm='MQA', rate=4e-3, score=0.9, repeated=0.5),
        dict(one, seed=1338, arm='MQA', rate=8e-3, score=0.4, repeated=1.7),
    ]
    (tmp_path / 'a.json').write_text(json.dumps(dict(runs=runs)))
    text = study(f'--reuse={tmp_path}/a.json', f'--out_dir={tmp_path}/out').stdout
    assert row_of(text, 'Formation', 'MHA')[0:3:2] == ['0.004', '0.500']
    assert row_of(text, 'Formation', 'MQA')[0:3:2] == ['0.008', '0.300 [0.200, 0.400]']
    rows = [line for line in text[text.index('**Every learning') :].splitlines() if line.startswith('| MQA')][:2]
    assert [[cell.strip() for cell in row.split('|')[2:5:2]] for row in rows] == [
        ['0.004', '0.100'],
        ['0.008', '0.200'],
    ]


def test_wrong_names_are_errors_before_anything_is_trained(tmp_path):
    (tmp_path / 'broken.json').write_text('{"runs": [{}]}')
    cases = (
        ('--arms=MHA;GQA-9', 'GQA-9'),
        ('--dataset=nowhere', 'nowhere'),
        (f'--reuse={tmp_path}/broken.json', 'study'),
    )
    for key, complaint in cases:
        done = study(key, f'--out_dir={tmp_path}/out')
        assert done.returncode == 2 and complaint in done.stderr and 'Traceback' not in done.stderr, done.stderr
        assert not (tmp_path / 'out').exists()
