"""Tokenizers of Hugging Face folders: ours, written and read back; others, which are named as such."""

import json

import pytest
import tokenizers

from core.convert import hf_tokenizer
from core.text.byte_pairs import learn_bpe
from core.text.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, GPT2Tokenizer

PIECES = learn_bpe(['low lower lowest, newer newest; the lowest newest of them. '] * 20, 300)
OURS = {'char': CharTokenizer('\n abc$\u00e9'), 'byte': ByteTokenizer(), 'bpe': BPETokenizer(PIECES)}


@pytest.mark.parametrize('name', OURS)
def test_our_tokenizers_are_read_back(tmp_path, name):
    hf_tokenizer.write(str(tmp_path), OURS[name], 24)
    assert hf_tokenizer.read(str(tmp_path), 1) == OURS[name].meta()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(hf_tokenizer.FILES)


def test_gpt2s_is_known_by_its_merges_in_both_forms(tmp_path, shared_data, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(shared_data / 'tiktoken_cache'))
    hf_tokenizer.write(str(tmp_path), GPT2Tokenizer(), 24)
    assert hf_tokenizer.read(str(tmp_path), 50257) == GPT2Tokenizer().meta()
    model = json.loads((tmp_path / 'tokenizer.json').read_text(encoding='utf-8'))['model']
    (tmp_path / 'tokenizer.json').unlink()
    (tmp_path / 'vocab.json').write_text(json.dumps(model['vocab']))
    lines = ['#version: 0.2', *(' '.join(pair) for pair in model['merges'])]
    (tmp_path / 'merges.txt').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    assert hf_tokenizer.read(str(tmp_path), 50257) == GPT2Tokenizer().meta()


def test_without_files_a_vocabulary_of_gpt2s_size_is_gpt2s(tmp_path):
    assert hf_tokenizer.read(str(tmp_path), 50257) == hf_tokenizer.read('gpt2', 50304) == GPT2Tokenizer().meta()
    assert hf_tokenizer.read(str(tmp_path), 65) == {}


def lowered(fast):
    fast.normalizer = tokenizers.normalizers.Lowercase()


def split_at_spaces(fast):
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()


@pytest.mark.parametrize('change', [lowered, split_at_spaces])
@pytest.mark.parametrize('name', OURS)
def test_one_that_encodes_otherwise_is_none_of_ours(tmp_path, name, change):
    fast = OURS[name].fast_tokenizer()
    change(fast)
    fast.save(str(tmp_path / 'tokenizer.json'))
    assert hf_tokenizer.read(str(tmp_path), 1) == {'tokenizer': 'none', 'vocab_size': OURS[name].n_vocab}


def test_merges_in_another_order_are_none_of_ours(tmp_path):
    hf_tokenizer.write(str(tmp_path), OURS['bpe'], 24)
    whole = json.loads((tmp_path / 'tokenizer.json').read_text(encoding='utf-8'))
    whole['model']['merges'].reverse()
    (tmp_path / 'tokenizer.json').write_text(json.dumps(whole))
    assert hf_tokenizer.read(str(tmp_path), 1)['tokenizer'] == 'none'


@pytest.mark.parametrize('text', ['{', '[]', '{"model": {}}', '{"model": {"vocab": {"a": "x", "b": 1}}}'])
def test_a_damaged_file_is_an_error_that_names_the_folder(tmp_path, text):
    (tmp_path / 'tokenizer.json').write_text(text)
    with pytest.raises(ValueError, match=f"the tokenizer in {tmp_path} can't be read"):
        hf_tokenizer.read(str(tmp_path), 1)
