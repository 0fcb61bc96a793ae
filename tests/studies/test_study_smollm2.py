"""studies/smollm2.py on a tiny model: both forms at every size, fine-tuning, and a second call that does nothing."""

import json

import pytest
from support import forking
from support.native import byte_pairs_of_digits, their_llama

pytestmark = pytest.mark.slow

STUDY = 'studies/smollm2.py'


def test_conversions_are_measured_and_fine_tuned_once(tmp_path):
    fast = byte_pairs_of_digits()
    theirs = their_llama(
        vocab_size=fast.get_vocab_size(), hidden_size=96, num_attention_heads=6, tie_word_embeddings=True
    )
    theirs.save_pretrained(tmp_path / 'model')
    fast.save(str(tmp_path / 'model' / 'tokenizer.json'))
    for name, line in (('a', 'the 17 cats and the caf\u00e9s, \n'), ('b', 'and 2024 of the cats -> 17\n')):
        (tmp_path / f'{name}.txt').write_text(line * 400, encoding='utf-8')
        arguments = (
            f'--input={tmp_path / name}.txt',
            f'--tokenizer={tmp_path / "model"}',
            f'--out_dir={tmp_path / name}',
        )
        assert forking.run('data/text/prepare.py', arguments).returncode == 0
    keys = dict(source=tmp_path / 'model', texts='a,b', data_dir=tmp_path, out_dir=tmp_path / 'out', context=16)
    keys |= dict(full=True, max_iters=2, rates='1e-4,1e-3', eval_tokens=64)
    arguments = [f'--{key}={value}' for key, value in keys.items()]
    done = forking.run(STUDY, arguments)
    assert done.returncode == 0, done.stderr
    written = (tmp_path / 'out' / 'smollm2.json').read_text()
    rows = json.loads(written)['rows']
    forms = [f'{form}, 1/{part}' for part in (2, 4, 8) for form in ('decompressed', 'published')]
    assert [*rows] == ['original', *forms, 'original, fine-tuned', 'published, 1/2, fine-tuned']
    whole = rows['original']['cache_bytes_per_token']
    for name, row in rows.items():
        part = int(name.split('1/')[1][0]) if '1/' in name else 1
        assert row['cache_bytes_per_token'] * part == whole
    for text in ('a', 'b'):
        assert abs(rows['published, 1/8'][text]['rise']) > 1e-6 and len(rows['original'][text]['losses']) == 4
        gain = rows['published, 1/2, fine-tuned'][text]
        assert abs(gain['rise'] - (gain['loss'] - rows['original, fine-tuned'][text]['loss'])) < 1e-9
    again = forking.run(STUDY, arguments)
    assert again.returncode == 0 and 'bytes/token' not in again.stdout
    assert (tmp_path / 'out' / 'smollm2.json').read_text() == written
