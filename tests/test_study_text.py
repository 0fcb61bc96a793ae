"""studies/induction_text.py: tables show the numbers of the runs, and RESULTS.md has those of the published ones."""

import json
from pathlib import Path

import forking

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = 'assets/induction_text.json'


def study(*keys):
    return forking.run('studies/induction_text.py', keys, seconds=200)


def row_of(text, title, name):
    """The cells of the row of an arm in the table with this title."""
    part = text[text.index(f'**{title}') :]
    line = next(line for line in part.splitlines() if line.startswith(f'| {name} |'))
    return [cell.strip() for cell in line.split('|')[2:-1]]


def test_results_md_has_the_tables_of_the_published_numbers(tmp_path):
    done = study(f'--reuse={PUBLISHED}', f'--out_dir={tmp_path}')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'text.md').read_text().strip() in (ROOT / 'RESULTS.md').read_text()
    assert (tmp_path / 'text.png').stat().st_size > 30_000


def test_tables_pair_runs_by_seed_and_say_which_formed_heads(tmp_path):
    runs = json.loads((ROOT / PUBLISHED).read_text())['runs']
    one = next(run for run in runs if run['arm'] == 'MHA' and run['share'] is None)
    made_up = []
    for arm, seed, score, formed, repeated in (
        ('MHA', 1, 0.6, 2_000_000, 1.0),
        ('MHA', 2, 0.8, 4_000_000, 1.2),
        ('MLA, r=C/2', 2, 0.1, None, 2.0),
        ('MLA, r=C/2', 1, 0.5, 3_000_000, 1.5),
    ):
        made_up.append(dict(one, arm=arm, seed=seed, score=score, formed=formed, repeated=repeated, best=[3, seed]))
    (tmp_path / 'a.json').write_text(json.dumps(dict(runs=made_up)))
    done = study(f'--reuse={tmp_path}/a.json', f'--out_dir={tmp_path}/out')
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert row_of(text, 'Formation', 'MHA')[:3] == ['3.00 [2.00, 4.00]', '0.700 [0.600, 0.800]', '3.1, 3.2']
    assert row_of(text, 'Formation', 'MLA, r=C/2')[0] == '3.00 (1 of 2)'
    assert row_of(text, 'Paired', 'MLA, r=C/2')[:2] == ['-0.400 [-0.700, -0.100]', '+0.650 [+0.500, +0.800]']
    assert 'MHA on prose' not in text


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
