"""Tokenizers of Hugging Face folders: ours, written and read back; others, which encode as their files say."""

import json

import numpy as np
import pytest
import tokenizers
from support.native import byte_pairs_of_digits
from support.preparing import start

from core.cli.errors import UserError
from core.convert import hf_tokenizer
from core.text.byte_pairs import learn_bpe
from core.text.dataset import TokenData
from core.text.published_tokenizer import PublishedTokenizer
from core.text.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, GPT2Tokenizer, load_tokenizer
from core.text.write_dataset import chunks

PIECES = learn_bpe(['low lower lowest, newer newest; the lowest newest of them. '] * 20, 300)
OURS = {'char': CharTokenizer('\n abc$\u00e9'), 'byte': ByteTokenizer(), 'bpe': BPETokenizer(PIECES)}


@pytest.mark.parametrize('name', OURS)
def test_our_tokenizers_are_read_back(tmp_path, name):
    hf_tokenizer.write(str(tmp_path), OURS[name], 24)
    assert hf_tokenizer.read(str(tmp_path), 1) == OURS[name].meta()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(hf_tokenizer.FILES)


@pytest.mark.slow
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


def extended(fast):
    fast.add_special_tokens(['<|im_end|>'])


def read_back(folder, fast):
    """The loaded tokenizer that a folder with a tokenizer.json stands for."""
    fast.save(str(folder / 'tokenizer.json'))
    return load_tokenizer(hf_tokenizer.read(str(folder), 1))


@pytest.mark.parametrize('change', [lowered, split_at_spaces, extended])
@pytest.mark.parametrize('name', OURS)
def test_one_that_encodes_otherwise_is_none_of_ours_and_encodes_as_its_file_says(tmp_path, name, change):
    fast = OURS[name].fast_tokenizer()
    change(fast)
    found = read_back(tmp_path, fast)
    assert isinstance(found, PublishedTokenizer) and found.n_vocab == OURS[name].n_vocab + (change is extended)
    assert found.encode('AB  cab') == fast.encode('AB  cab').ids
    if change is extended:
        assert found.encode('<|im_end|>', special=True) == [OURS[name].n_vocab]


def test_truncation_and_padding_in_a_file_cut_no_text(tmp_path):
    fast = OURS['bpe'].fast_tokenizer()
    lowered(fast)
    fast.enable_truncation(5)
    fast.enable_padding(length=40)
    found = read_back(tmp_path, fast)
    text = 'a cab and a bad cab ' * 20
    assert isinstance(found, PublishedTokenizer) and found.decode(found.encode(text)) == text


def test_merges_in_another_order_are_none_of_ours(tmp_path):
    hf_tokenizer.write(str(tmp_path), OURS['bpe'], 24)
    whole = json.loads((tmp_path / 'tokenizer.json').read_text(encoding='utf-8'))
    whole['model']['merges'].reverse()
    (tmp_path / 'tokenizer.json').write_text(json.dumps(whole))
    assert hf_tokenizer.read(str(tmp_path), 1)['tokenizer'] == 'published'


def test_one_that_the_library_does_not_know_stands_for_no_text(tmp_path):
    (tmp_path / 'tokenizer.json').write_text('{"model": {"type": "Morse", "vocab": {"a": 0, "b": 1}}}')
    assert hf_tokenizer.read(str(tmp_path), 1) == {'tokenizer': 'none', 'vocab_size': 2}


# ---- those of other models -------------------------------------------------------------------------------------------

TEXT = 'The 17  cats,\n\n  caf\u00e9 -> 2024 and \u6f22\u5b57 <|endoftext|>\t'


def sentence_pieces(prefix):
    """SentencePiece's way: spaces are a letter of their own, and unknown characters are spelled in bytes."""
    pieces = ['<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256)), *'\u2581Thecatsn17,', '\u2581T', 'at']
    merges = [('\u2581', 'T'), ('a', 't')]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True))
    space = tokenizers.normalizers.Replace(' ', '\u2581')
    first = [tokenizers.normalizers.Prepend('\u2581')] * prefix
    fast.normalizer = tokenizers.normalizers.Sequence([*first, space])
    decoders = tokenizers.decoders
    fast.decoder = decoders.Sequence([decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens(['<s>', '</s>'])
    return fast


@pytest.mark.parametrize('fast', [byte_pairs_of_digits(), sentence_pieces(False)], ids=['bytes', 'pieces'])
def test_text_goes_in_and_out_of_a_published_tokenizer(tmp_path, fast):
    (tmp_path / 'tokenizer_config.json').write_text('{"eos_token": {"content": "</s>"}}')
    found = read_back(tmp_path, fast)
    special = fast.token_to_id('<|endoftext|>')
    special = fast.token_to_id('</s>') if special is None else special
    assert found.end_of_text == special and special not in found.text_ids() and len(found.text_ids()) > 256
    ids = found.encode(TEXT)
    assert found.decode(ids) == TEXT and special not in ids
    assert b''.join(found.decode_bytes([i]) for i in ids) == TEXT.encode()
    assert found.encode(found.special_token, special=True) == [special]
    assert found.encode(TEXT, special=True) == fast.encode(TEXT).ids
    assert found.encode('half a pair: \ud83d') == found.encode('half a pair: ?')
    assert hf_tokenizer.meta_of(json.loads(found.fast_tokenizer().to_str()), '</s>') == found.meta()


def test_a_published_tokenizer_is_written_again_as_it_was(tmp_path):
    found = read_back(tmp_path, byte_pairs_of_digits())
    (tmp_path / 'again').mkdir()
    hf_tokenizer.write(str(tmp_path / 'again'), found, 24)
    assert hf_tokenizer.read(str(tmp_path / 'again'), 1) == found.meta()


def test_text_is_cut_only_where_a_published_tokenizer_encodes_the_parts_alike(tmp_path):
    found = read_back(tmp_path, byte_pairs_of_digits())
    text = TEXT * 30
    for size in (1, 2, 7, 50):
        pieces = list(chunks([text[i : i + 5] for i in range(0, len(text), 5)], size))
        assert ''.join(pieces) == text and len(pieces) > 30
        assert [i for piece in pieces for i in found.encode(piece)] == found.encode(text)


@pytest.mark.slow
def test_text_can_be_prepared_with_the_tokenizer_in_a_folder(tmp_path):
    own, ours = tmp_path / 'own', tmp_path / 'ours'
    for folder in (own, ours):
        folder.mkdir()
    found = read_back(own, byte_pairs_of_digits())
    assert hf_tokenizer.kind_to_prepare(str(own)).meta() == found.meta()
    hf_tokenizer.write(str(ours), OURS['bpe'], 24)
    assert hf_tokenizer.kind_to_prepare(str(ours)).meta() == OURS['bpe'].meta()
    assert hf_tokenizer.kind_to_prepare('bpe', 300) is BPETokenizer
    (tmp_path / 'texts').mkdir()
    for name in ('a.txt', 'b.txt'):
        (tmp_path / 'texts' / name).write_text(TEXT * 60, encoding='utf-8')
    arguments = [f'--input={tmp_path / "texts"}', f'--out_dir={tmp_path / "out"}', f'--tokenizer={own}']
    done = start('data/text/prepare.py', *arguments)
    assert done.returncode == 0, done.stderr
    data = TokenData(tmp_path / 'out', 8)
    ids = np.concatenate([data.ids('train'), data.ids('val')]).tolist()
    whole = found.encode(TEXT * 60)
    assert data.meta['json'] == found.json and ids == [*whole, found.end_of_text] * 2


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(vocab_size=300), 'vocab_size has no meaning'),
        (dict(fast=None), 'no tokenizer.json that can be read'),
        (dict(fast=sentence_pieces(True)), 'puts a space in front of each text'),
    ],
    ids=str,
)
def test_a_folder_that_text_cannot_be_prepared_with_is_refused_in_one_line(tmp_path, change, message):
    fast = change.get('fast', sentence_pieces(False))
    if fast:
        fast.save(str(tmp_path / 'tokenizer.json'))
    with pytest.raises(UserError, match=message) as error:
        hf_tokenizer.kind_to_prepare(str(tmp_path), change.get('vocab_size', 0))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('change', [dict(json=3), dict(vocab_size=0), dict(end_of_text=400), dict(end_of_text='x')])
def test_the_meta_of_a_published_tokenizer_is_checked(tmp_path, change):
    meta = {**read_back(tmp_path, byte_pairs_of_digits()).meta(), **change}
    with pytest.raises(UserError, match='the tokenizer published has'):
        load_tokenizer(meta)


def test_a_damaged_published_tokenizer_is_one_line():
    with pytest.raises(UserError, match="tokenizer of this model can't be read") as error:
        load_tokenizer({'tokenizer': 'published', 'vocab_size': 2, 'end_of_text': None, 'json': '{'})
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('text', ['{', '[]', '{"model": {}}', '{"model": {"vocab": {"a": "x", "b": 1}}}'])
def test_a_damaged_file_is_an_error_that_names_the_folder(tmp_path, text):
    (tmp_path / 'tokenizer.json').write_text(text)
    with pytest.raises(ValueError, match=f"the tokenizer in {tmp_path} can't be read"):
        hf_tokenizer.read(str(tmp_path), 1)
