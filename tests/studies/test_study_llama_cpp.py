"""studies/llama_cpp.py: a tiny model is continued by llama.cpp and by ours in every number of bits."""

import json

import pytest
from support import forking
from support.forking import only_traced
from support.native import our_llama

from core.convert import gguf_file
from core.text.tokenizer import CharTokenizer

pytestmark = pytest.mark.slow

LETTERS = CharTokenizer(sorted('\n abcdefghijklmnopqrstuvwxyz.,;:!?-'))
STUDY = 'studies/llama_cpp.py'


def test_every_way_is_timed_beside_llama_cpp(tmp_path):
    pytest.importorskip('xllamacpp')
    model = our_llama(n_embd=96, n_head=6, vocab_size=LETTERS.n_vocab)
    gguf_file.write(str(tmp_path / 'tiny.gguf'), model.config, model.state_dict(), LETTERS, 'tiny')
    keys = dict(gguf=tmp_path / 'tiny.gguf', prompt_tokens=4, new_tokens=6, rounds=1, json=tmp_path / 'found.json')
    keys['compile'] = True
    done = forking.run('-c', [only_traced(STUDY), *(f'--{key}={value}' for key, value in keys.items())])
    assert done.returncode == 0, done.stderr
    rows = {row['name']: row for row in json.loads((tmp_path / 'found.json').read_text())['rows']}
    able = [name for name in ('float32', 'int8', 'int4') if f'{name} is left out' not in done.stderr]
    every = [*able, *(f'{name}, compiled' for name in able), 'llama.cpp, tiny.gguf']
    assert list(rows) == every
    assert all(row['tokens_per_s'] > 0 for row in rows.values())
    assert rows['llama.cpp, tiny.gguf']['of_theirs'] == 1
    sizes = [row['weight_bytes'] for name, row in rows.items() if name in ('float32', 'int8', 'int4')]
    assert len(sizes) > 1 and sorted(sizes, reverse=True) == sizes


def test_a_missing_file_is_said_in_one_line(tmp_path):
    done = forking.run(STUDY, [f'--gguf={tmp_path}/none.gguf'])
    assert done.returncode == 2 and 'name a GGUF file' in done.stderr and 'Traceback' not in done.stderr
