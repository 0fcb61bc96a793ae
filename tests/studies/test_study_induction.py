"""studies/induction.py: the tables show the runs' numbers, finished runs are kept, missing ones are run."""

import json
import shutil

import pytest
from support import forking
from support.planted import randomized, save

from model import GPT, GPTConfig
from model_mla import MLAGPT, MLAConfig

pytestmark = pytest.mark.slow

QUICKLY = 'tests/support/quick_study.py'
STEP, SEEDS = 10, (1337, 1338)
SCORES = {'MHA': (0.75, 0.85), 'MLA-r16': (0.5, 0.6)}  # of the best head, by seed: made up
NAMES = [
    f'{kind}-{name}-s{seed}'
    for kind in ('2l-learned', '2l-rope', '4l-learned')
    for name in ('MHA', 'MLA-r16')
    for seed in SEEDS
]


def study(out_dir, data_dir, *more):
    keys = (f'--out_dir={out_dir}', f'--data_dir={data_dir}', f'--max_iters={STEP}', '--jobs=1', *more)
    return forking.run(QUICKLY, ('studies/induction.py', *keys), seconds=600)


def trained_like(kind):
    """A small model of the study's shape with all parameters random."""
    sizes = dict(block_size=64, vocab_size=128, n_layer=2, n_head=4, n_embd=64, bias=False)
    model = GPT(GPTConfig(**sizes)) if kind == 'MHA' else MLAGPT(MLAConfig(**sizes, n_latent=16))
    return randomized(model, 0.1)


def measured(folder, kind):
    """The induction.json and formation.json of a model with a single checkpoint: two dicts."""
    save(folder, trained_like(kind), val_loss=1.0, best_val_loss=1.0, iter_num=STEP)
    keys = (f'--models={folder}', f'--sweep={folder}', f'--out_dir={folder}', '--html=False', '--sequences=8')
    done = forking.run('find_induction_heads.py', (*keys, '--resamples=100', '--controls=1', '--device=cpu'))
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / name).read_text()) for name in ('induction.json', 'formation.json')]


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """The folder of a study whose runs are all finished, with known scores."""
    folder = tmp_path_factory.mktemp('study')
    templates = {kind: measured(folder / f'template-{kind}', kind) for kind in SCORES}
    for name in NAMES:
        kind = next(kind for kind in SCORES if kind in name)
        found, steps = templates[kind]
        score = SCORES[kind][SEEDS.index(int(name[-4:]))]
        layer, head = found['models'][0]['ranking'][0]
        found['models'][0]['induction']['mean'][layer][head] = score
        steps['runs'][0]['checkpoints'][0]['induction']['mean'] = score
        run = folder / 'out' / str(STEP) / name
        shutil.copytree(folder / f'template-{kind}', run)
        (run / 'ckpt.pt').rename(run / f'ckpt_{STEP:06}.pt')
        shutil.copy(run / f'ckpt_{STEP:06}.pt', run / 'ckpt.pt')
        (run / 'induction').mkdir()
        for part, value in (('induction', found), ('formation', steps)):
            (run / 'induction' / f'{part}.json').write_text(json.dumps(value))
    for seed in SEEDS:
        for name in (f'converted-r16-s{seed}', f'converted-r16-s{seed}-tuned'):
            runs = folder / 'out' / str(STEP)
            shutil.copytree(runs / f'2l-learned-MLA-r16-s{seed}', runs / name)
            shutil.copy(runs / name / 'ckpt.pt', runs / name / 'ckpt_000200.pt')
    (folder / 'data' / 'repeats').mkdir(parents=True)
    (folder / 'data' / 'repeats' / 'train.bin').touch()  # never read, because nothing is trained
    return folder


def row_of(text, *cells):
    """The cells of the first table row that begins with `cells`."""
    wanted = '| ' + ' | '.join(cells) + ' |'
    return [cell.strip() for cell in next(line for line in text.splitlines() if line.startswith(wanted)).split('|')]


def test_the_tables_show_the_runs_numbers(finished):
    done = study(finished / 'out', finished / 'data', f'--table={finished}/a.md', f'--figure={finished}/study.png')
    assert done.returncode == 0, done.stderr
    text = (finished / 'a.md').read_text()
    row = row_of(text, 'learned', 'MHA')
    assert row[3] == str(STEP) and row[4] == '0.800 [0.750, 0.850]' and row[5] == '0.75, 0.85'
    row = row_of(text, 'rope', 'MLA r=16 (C/4)')
    assert row[3] == f'{STEP} (1 of 2)' and row[4] == '0.550 [0.500, 0.600]'  # 0.5 is not above 0.5
    heads = text[text.index('The best head of runs') :]
    assert row_of(heads, 'learned', 'MHA')[3] == '2 of 2' and row_of(heads, 'rope', 'MLA r=16 (C/4)')[3] == '1 of 2'
    converted = row_of(text[text.index(', converted, and 200') :], 'MLA r=16 (C/4)')
    assert converted[2].startswith('0.800') and converted[5] == '0.550 [0.500, 0.600]'
    found = json.loads((finished / 'study.json').read_text())['runs']
    assert [run['name'] for run in found] == NAMES and found[2]['latent']['effective_rank'] > 1
    assert (finished / 'study.png').read_bytes().startswith(b'\x89PNG')


def test_the_tables_can_be_made_again_from_the_numbers(finished, tmp_path):
    done = study(finished / 'out', finished / 'data')
    assert done.returncode == 0, done.stderr
    keys = ('studies/induction.py', (f'--reuse={finished}/out/formation.json', f'--out_dir={tmp_path}/again'))
    again = forking.run(*keys, seconds=200)
    assert again.returncode == 0 and again.stdout == done.stdout
    assert (tmp_path / 'again' / 'formation.png').stat().st_size > 10000
    (tmp_path / 'broken.json').write_text('{"runs": []}')
    broken = forking.run(
        'studies/induction.py', (f'--reuse={tmp_path}/broken.json', f'--out_dir={tmp_path}/no'), seconds=99
    )
    assert broken.returncode == 2 and "can't be read as a study" in broken.stderr and not (tmp_path / 'no').exists()


def test_missing_runs_are_trained_and_measured_and_the_others_kept(finished, tmp_path):
    out, data = tmp_path / 'out' / str(STEP), tmp_path / 'data'
    shutil.copytree(finished / 'out', tmp_path / 'out')
    for name in ('2l-rope-MLA-r16-s1338', 'converted-r16-s1338', 'converted-r16-s1338-tuned'):
        shutil.rmtree(out / name)
    before = {name: (out / name / 'induction' / 'induction.json').stat().st_mtime_ns for name in NAMES if 'MHA' in name}
    done = study(tmp_path / 'out', data)  # which prepares the data set first
    assert done.returncode == 0, done.stderr + ''.join(path.read_text()[-500:] for path in out.glob('*/log.txt'))
    new = json.loads((out / '2l-rope-MLA-r16-s1338' / 'induction' / 'induction.json').read_text())['models'][0]
    assert new['iteration'] == STEP and new['model_args']['pos'] == 'rope' and new['model_args']['n_latent'] == 16
    assert 9 < new['in_context']['early'] <= 34  # tokens up to the period, of 8 to 32, and one more are masked
    assert before == {name: (out / name / 'induction' / 'induction.json').stat().st_mtime_ns for name in before}
    best = new['ranking'][0]
    numbers = json.loads((tmp_path / 'out' / 'formation.json').read_text())
    run = next(run for run in numbers['runs'] if run['pos'] == 'rope' and run['name'].endswith('r16-s1338'))
    changed = numbers['conversions'][1]
    assert changed['seed'] == 1338 and changed['mha']['best'] == 0.85  # the template's MHA, random weights
    assert changed['converted']['repeat_loss'] != changed['tuned']['repeat_loss']
    assert run['best'] == best and run['score'] == new['induction']['mean'][best[0]][best[1]] and run['formed'] is None


def test_bad_keys_are_errors_before_anything_is_trained(tmp_path):
    for key, complaint in (('--seeds=1', 'seeds'), (f'--table={tmp_path}', 'table')):
        done = study(tmp_path / 'out', tmp_path / 'data', key)
        assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
        assert complaint in done.stderr and not (tmp_path / 'out').exists()
