"""bench.py in all its modes, on models that take no time: what it measures is there, and makes sense."""

import json

import forking
import pytest

TINY = ['--n_layer=1', '--n_head=2', '--n_embd=32', '--vocab_size=300', '--rounds=2', '--device=cpu', '--threads=1']
NANOGPT = """
import torch
from torch.nn import functional as F

class GPTConfig:
    def __init__(self, block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias):
        self.vocab_size, self.n_embd = vocab_size, n_embd

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print('number of parameters: 0.01M')
        self.table = torch.nn.Embedding(config.vocab_size, 8)
        self.head = torch.nn.Linear(8, config.vocab_size)

    def forward(self, x, y):
        return None, F.cross_entropy(self.head(self.table(x)).flatten(0, 1), y.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate)
"""


def bench(*arguments):
    done = forking.run('bench.py', [*TINY, *arguments])
    assert done.returncode == 0, done.stderr
    return done


def timed(path, key='steps'):
    rows = json.loads(path.read_text())[key]
    assert all(row['ms'] > 0 for row in rows)
    return {row['name']: row for row in rows}


def test_training_steps_are_timed_beside_nanogpt_and_without_each_optimisation(tmp_path):
    (tmp_path / 'model.py').write_text(NANOGPT)
    sizes = ['--batch_size=4', '--block_size=32', '--vocab_size=50304']
    keys = [*sizes, f'--nanogpt={tmp_path}', '--without=memory,fused,loss']
    done = bench('--mode=train', *keys, f'--json={tmp_path}/a.json', f'--profile={tmp_path}/trace')
    rows = timed(tmp_path / 'a.json')
    names = ['MHA', 'MLA, r=16', 'nanoGPT', 'MHA without memory', 'MHA without fused', 'MHA without loss']
    assert list(rows) == names
    assert rows['nanoGPT']['speed_of_nanogpt'] == 1
    peak = json.loads((tmp_path / 'a.json').read_text())['peak_flops']
    assert all(row['mfu'] == pytest.approx(row['flops_per_s'] / peak) and row['mfu'] < 1 for row in rows.values())
    assert all(row['tokens_per_s'] == pytest.approx(1000 * 4 * 32 / row['ms']) for row in rows.values())
    assert all(row['peak_bytes'] > 4 * 32 * 32 * 4 for name, row in rows.items() if name != 'nanoGPT')
    assert all(f'| {name} |' in done.stdout for name in names)
    assert 'number of parameters' not in done.stdout
    for name in ('MHA', 'MLA-r16'):
        assert json.loads((tmp_path / f'trace-{name}.json').read_text())['traceEvents']


def test_decoding_is_timed(tmp_path):
    keys = ['--contexts=8,16', '--batch_sizes=1,2', '--new_tokens=4', '--prompt_tokens=2', f'--plot={tmp_path}/a.png']
    bench('--mode=sample', *keys, f'--json={tmp_path}/a.json')
    steps = json.loads((tmp_path / 'a.json').read_text())['steps']
    per_token = {row['name']: row['bytes_per_token'] for row in steps}
    assert per_token == {'MHA': 256, 'MLA, r=16': 64, 'MLA, r=8': 32, 'MLA, r=4': 16, 'MHA, no cache': 0}
    assert list(timed(tmp_path / 'a.json', 'texts')) == ['MHA', 'MLA, r=16', 'MLA, r=8', 'MLA, r=4']
    assert (tmp_path / 'a.png').stat().st_size > 10000


def test_tokenizing_and_batches_are_timed(tmp_path):
    text = tmp_path / 'text.txt'
    text.write_text('to be or not to be\n' * 20000)
    bench('--mode=data', f'--text={text}', '--batch_size=4', '--block_size=32', f'--json={tmp_path}/a.json')
    rows = timed(tmp_path / 'a.json', 'tokenizing')
    assert rows['tokenize, byte']['tokens'] == rows['tokenize, char']['tokens'] == text.stat().st_size
    assert rows['tokenize, bpe']['tokens'] == 7 * 20000 + 1  # six words and a line end; the end of the text
    assert list(timed(tmp_path / 'a.json', 'batches')) == ['batch, ours', 'batch, row by row']


def test_two_measurements_are_compared_as_ratios(tmp_path):
    def write(name, *times):
        steps = [{'name': name, 'ms': ms} for name, ms in zip('abc', times, strict=False)]
        (tmp_path / name).write_text(json.dumps({'mode': 'train', 'config': {'a': 1}, 'steps': steps}))
        return str(tmp_path / name)

    before, after = write('before', 10, 20, 30), write('after', 10.5, 40)
    done = forking.run('bench.py', ['--mode=compare', f'--files={before},{after}'])
    assert done.returncode == 1
    assert '| a | 10.00 | 10.50 | 1.050 |' in done.stdout and '| b | 20.00 | 40.00 | 2.000 |' in done.stdout
    assert done.stderr.strip().endswith('slower by more than 1.1 times: b')
    done = forking.run('bench.py', ['--mode=compare', f'--files={before},{after}', '--tolerance=2.5'])
    assert done.returncode == 0 and 'slower' not in done.stderr


@pytest.mark.parametrize(
    'arguments, expected',
    [
        (['--mode=speed'], "mode is 'speed'"),
        (['--mode=train', '--without=magic'], 'it knows memory, fused, loss'),
        (['--mode=train', '--nanogpt=nowhere'], 'nanoGPT could not be measured'),
        (['--mode=data', '--text=nowhere.txt'], 'there is no file nowhere.txt'),
        (['--mode=compare', '--files=one.json'], 'two files'),
        (['--mode=compare', '--files=one.json,two.json'], "one.json can't be read"),
    ],
)
def test_what_it_cannot_do_it_says_in_one_line(arguments, expected):
    done = forking.run('bench.py', [*TINY, *arguments])
    assert done.returncode == 2
    assert expected in done.stderr and 'Traceback' not in done.stderr
