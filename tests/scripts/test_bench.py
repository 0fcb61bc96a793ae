"""bench.py in all its modes, on tiny models: the rows that it writes, their units, and its error messages."""

import json
import re

import pytest
from support import ROOT, forking
from support.forking import only_traced

from model import GPT, GPTConfig

pytestmark = pytest.mark.slow

TINY = ['--n_layer=1', '--n_head=2', '--n_embd=32', '--vocab_size=300', '--rounds=1', '--device=cpu', '--threads=1']
TWIN = (ROOT / 'tests/support/nanogpt_twin.py').read_text(encoding='utf-8')


@pytest.fixture(autouse=True)
def timed_once(monkeypatch):
    monkeypatch.setenv('FORKS_BEGIN_WITH', forking.TIMED_ONCE)


def bench(*arguments):
    done = forking.run('bench.py', [*TINY, *arguments])
    assert done.returncode == 0, done.stderr
    return done


def timed(path, key='steps'):
    """{name: row} of a file written by --json; every row has a time."""
    rows = json.loads(path.read_text())[key]
    assert all(row['ms'] > 0 for row in rows)
    return {row['name']: row for row in rows}


def test_training_steps_are_timed_with_nanogpt_and_without_each_optimization(tmp_path):
    (tmp_path / 'model.py').write_text(TWIN)
    sizes = ['--batch_size=4', '--block_size=32', '--vocab_size=50304']
    keys = [*sizes, f'--nanogpt={tmp_path}', '--without=memory,fused,loss']
    done = bench('--mode=train', *keys, f'--json={tmp_path}/a.json', f'--profile={tmp_path}/trace')
    rows, written = timed(tmp_path / 'a.json'), json.loads((tmp_path / 'a.json').read_text())
    names = ['MHA', 'MLA, r=16', 'nanoGPT', 'MHA without memory', 'MHA without fused', 'MHA without loss']
    assert list(rows) == names and all(f'| {name} ' in done.stdout for name in names)
    assert written['machine']['device'] and written['machine']['dtype'] == 'float32'
    assert rows['nanoGPT']['speed_of_nanogpt'] == 1
    assert rows['MHA']['speed_of_nanogpt'] == pytest.approx(rows['nanoGPT']['ms'] / rows['MHA']['ms'])
    model = GPT(GPTConfig(block_size=32, vocab_size=50304, n_layer=1, n_head=2, n_embd=32, bias=False))
    for row in rows.values():
        assert 0 < row['mfu'] < 1
        assert row['tokens_per_s'] * row['ms'] / 1000 == pytest.approx(4 * 32), 'a step trains one batch'
        if row['name'] != 'MLA, r=16':
            per_token = row['mfu'] * written['peak_flops'] / row['tokens_per_s']
            assert per_token == pytest.approx(model.flops_per_token())
    logits = 4 * 32 * 50304 * 4  # bytes of all logits
    assert 4 * 32 * 32 * 4 < rows['MHA']['peak_bytes'] < rows['MHA without loss']['peak_bytes'] - logits / 2
    assert rows['nanoGPT']['peak_bytes'] > logits
    assert 'number of parameters' not in done.stdout + done.stderr, 'only bench.py prints'
    assert done.stderr.count('command line sets') == 1
    for name in ('MHA', 'MLA-r16'):
        assert json.loads((tmp_path / f'trace-{name}.json').read_text())['traceEvents']


def test_decoding_is_timed(tmp_path):
    keys = ['--contexts=8,16', '--batch_sizes=1,2', '--new_tokens=4', '--prompt_tokens=2', f'--plot={tmp_path}/a.png']
    keys.append('--n_kv_heads=1')
    bench('--mode=sample', *keys, f'--json={tmp_path}/a.json')
    steps = json.loads((tmp_path / 'a.json').read_text())['steps']
    per_token = {row['name']: row['bytes_per_token'] for row in steps}
    assert per_token == {'MHA': 256, 'MQA': 128, 'MLA, r=16': 64, 'MLA, r=8': 32, 'MLA, r=4': 16, 'MHA, no cache': 0}
    assert list(timed(tmp_path / 'a.json', 'texts')) == ['MHA', 'MQA', 'MLA, r=16', 'MLA, r=8', 'MLA, r=4']
    assert (tmp_path / 'a.png').stat().st_size > 10000


def test_int8_is_timed_beside_float(tmp_path):
    keys = ['--contexts=8', '--batch_sizes=1', '--new_tokens=4', '--n_latents=16', '--uncached_tokens=0', '--int8=True']
    done = bench('--mode=sample', *keys, f'--json={tmp_path}/a.json')
    rows = {row['name']: row for row in json.loads((tmp_path / 'a.json').read_text())['steps']}
    assert list(rows) == ['MHA', 'MLA, r=16', 'MHA, int8', 'MLA, r=16, int8']
    # a step of the tiny model reads fewer bytes with int8, and no more than a step does in the same time
    assert rows['MHA, int8']['bytes_per_s'] * rows['MHA, int8']['ms'] < rows['MHA']['bytes_per_s'] * rows['MHA']['ms']
    share = re.search(r' MHA \|.* (\d+)% \|', done.stdout)
    assert share and int(share[1]) <= 100  # of the bandwidth


def test_a_cache_in_few_bits_is_timed_beside_float(tmp_path):
    keys = ['--contexts=8', '--batch_sizes=1', '--new_tokens=0', '--n_latents=16', '--uncached_tokens=0']
    bench('--mode=sample', *keys, '--cache=int4', f'--json={tmp_path}/a.json', f'--plot={tmp_path}/a.png')
    sizes = {name: row['bytes_per_token'] for name, row in timed(tmp_path / 'a.json').items()}
    # two heads of 16 numbers, keys and values: 8 bytes and a scale each; a latent of 16 the same
    assert sizes == {'MHA': 256, 'MLA, r=16': 64, 'MHA, int4 cache': 4 * 10, 'MLA, r=16, int4 cache': 10}


def test_compiled_steps_are_timed_beside_ordinary_ones(tmp_path):
    keys = ['--contexts=8', '--batch_sizes=1', '--new_tokens=4', '--n_latents=16', '--uncached_tokens=0']
    keys += ['--prompt_tokens=2', '--compile=True', f'--json={tmp_path}/a.json']
    done = forking.run('-c', [only_traced('bench.py'), *TINY, '--mode=sample', *keys])
    assert done.returncode == 0, done.stderr
    for what in ('steps', 'texts'):
        assert list(timed(tmp_path / 'a.json', what)) == ['MHA', 'MLA, r=16', 'MHA, compiled', 'MLA, r=16, compiled']


def with_little_memory(*arguments):
    """The finished process of bench.py on the GPU that support/limited_memory.py pretends."""
    program = "import runpy, support.limited_memory; runpy.run_path('bench.py', run_name='__main__')"
    return forking.run('-c', [program, *TINY, *arguments])


def test_a_model_whose_cache_does_not_fit_is_named_and_the_others_are_timed(tmp_path):
    keys = ['--contexts=8,16', '--batch_sizes=1,2', '--n_latents=16', '--new_tokens=0', '--uncached_tokens=0']
    done = with_little_memory('--mode=sample', *keys, f'--json={tmp_path}/a.json', f'--plot={tmp_path}/a.png')
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / 'a.json').read_text())['steps']
    lacking = {(row['name'], row['batch_size'], row['context']) for row in rows if 'out_of_memory' in row}
    assert lacking == {('MHA', 2, 16)}
    assert len(rows) == 8 and sum(row.get('ms', 0) > 0 for row in rows) == 7
    assert done.stdout.count(' out of memory |') == 1


def test_the_largest_batch_is_found(tmp_path):
    keys = ['--mode=memory', '--block_size=16', '--n_kv_heads=1', '--most=100', f'--json={tmp_path}/a.json']
    done = with_little_memory(*keys)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / 'a.json').read_text())['largest']
    assert [(row['name'], row['largest_batch']) for row in rows] == [('MHA', 3), ('MQA', 3), ('MLA, r=16', 3)]
    assert all(row['peak_bytes'] > 0 for row in rows) and 'or more' not in done.stdout
    some = bench('--mode=memory', '--block_size=16', '--most=2')
    assert some.stdout.count(' 2 or more |') == 2


def test_texts_are_timed_with_nanogpt_and_hugging_face(tmp_path):
    (tmp_path / 'model.py').write_text(TWIN)
    keys = ['--contexts=8', '--batch_sizes=1', '--uncached_tokens=1', '--n_latents=8', '--new_tokens=4']
    done = bench('--mode=sample', *keys, f'--nanogpt={tmp_path}', '--huggingface=True', f'--json={tmp_path}/a.json')
    rows = timed(tmp_path / 'a.json', 'texts')
    assert list(rows) == ['MHA', 'MLA, r=8', 'nanoGPT', 'Hugging Face, cached']
    assert all(row['tokens_per_s'] * row['ms'] / 1000 == pytest.approx(4) for row in rows.values())
    assert 'number of parameters' not in done.stdout + done.stderr


@pytest.mark.parametrize(
    'arguments, expected',
    [
        (['--mode=speed'], "mode is 'speed'"),
        (['--rounds=0'], 'rounds is 0'),
        (['--vocab_size=70000'], 'at most 65,536'),
        (['--n_head=5'], 'n_embd=32'),
        (['--mode=train', '--without=magic'], "without is 'magic'; it must be a list of memory, fused, loss"),
        (['--mode=train', '--nanogpt=nowhere'], "nanoGPT can't be measured"),
    ],
)
def test_bad_input_gets_one_line(arguments, expected):
    done = forking.run('bench.py', [*TINY, *arguments])
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if not line.startswith('command line sets')]
    assert len(errors) == 1 and errors[0].startswith('error: ') and expected in errors[0]
