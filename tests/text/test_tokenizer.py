"""core/text/tokenizer.py: encoding and decoding, learned encodings, and the registry that everything else reads."""

import json
import sys

import numpy as np
import pytest
import torch
from support import ROOT

from core.cli.errors import UserError
from core.text.byte_pairs import learn_bpe
from core.text.dataset import TokenData
from core.text.tokenizer import (
    TOKENIZERS,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    IdTokenizer,
    TableTokenizer,
    kind_named,
    load_tokenizer,
    tokenizer_of,
)

TEXT = ['low lower lowest newest', 'the quick brown fox jumps over a lazy dog', 'wide wider widest caf\u00e9'] * 50


@pytest.fixture(scope='module')
def learned():
    return learn_bpe(TEXT, 300)


def assert_one_line(error):
    assert '\n' not in str(error.value) and len(str(error.value)) > 20


# ---- encoding and decoding -------------------------------------------------------------------------------------------


def test_characters():
    tokenizer = load_tokenizer({'tokenizer': 'char', 'chars': '\n abe\u00e9\U0001f600'})
    assert tokenizer.n_vocab == 7 and tokenizer.end_of_text is None
    assert tokenizer.encode('ab \u00e9\n\U0001f600') == [2, 3, 1, 5, 0, 6] and tokenizer.encode('') == []
    assert tokenizer.decode(torch.tensor([2, 3, 6])) == 'ab\U0001f600'
    assert tokenizer.decode_bytes([5, 6]) == '\u00e9\U0001f600'.encode()
    for text, culprit in (('ab5e', "'5'"), ('\U0001f601', "'\U0001f601'"), ('a\udcff', r"'\\udcff'")):
        with pytest.raises(UserError, match=f'the character {culprit} is not among the 7') as error:
            tokenizer.encode(text)
        assert_one_line(error)
    for ids in ([7], [-1]):
        with pytest.raises(ValueError, match='outside a vocabulary of 7'):
            tokenizer.decode(ids)


def test_characters_are_learned_in_the_order_of_their_code_points():
    tokenizer = CharTokenizer.learn('the cat\n\u00e9')
    assert tokenizer.chars == '\n aceht\u00e9' and tokenizer.encode('\n\u00e9') == [0, 7]


def test_bytes():
    tokenizer = load_tokenizer({'tokenizer': 'byte'})
    assert tokenizer.n_vocab == 256
    assert tokenizer.encode('a\u00e9') == [97, 195, 169]
    assert tokenizer.decode([97, 195, 169]) == 'a\u00e9' and tokenizer.decode([97, 195]) == 'a\ufffd'
    assert tokenizer.decode_bytes([195]) == b'\xc3'
    assert tokenizer.encode('\udcff') == [255]  # how Python represents an argument's byte that is not UTF-8
    assert tokenizer.encode_array(b'\xff\x00').tolist() == [255, 0]


def test_gpt2(gpt2_cache):
    tokenizer = load_tokenizer({'tokenizer': 'gpt2'})
    assert tokenizer.n_vocab == 50257 and tokenizer.end_of_text == 50256
    text = 'Hello <|endoftext|> w\u00f6rld \U0001f600'
    ids = tokenizer.encode(text)
    assert 50256 not in ids and ids[0] == 15496 and ids == tokenizer.encode_array(text).tolist()
    assert tokenizer.encode(text, special=True).count(50256) == 1
    assert tokenizer.decode(ids) == text and b''.join(tokenizer.decode_bytes([i]) for i in ids) == text.encode()
    with pytest.raises(ValueError, match='outside a vocabulary of 50257'):
        tokenizer.decode([50257])


def test_a_byte_pair_encoding_is_learned(learned):
    tokenizer = load_tokenizer({'tokenizer': 'bpe', 'pieces': learned})
    assert tokenizer.n_vocab == 300 and tokenizer.end_of_text == 299
    assert sorted(learned[:256]) == [chr(byte) for byte in range(256)] and learned == learn_bpe(TEXT, 300)
    ids = tokenizer.encode(' newest lowest')
    assert [tokenizer.decode([i]) for i in ids] == [' new', 'est', ' lowest']  # frequent pairs are merged
    assert len(tokenizer.encode('lo wer')) > 2
    text = 'caf\u00e9 <|endoftext|> \U0001f600 \n\tnew\0'
    assert tokenizer.decode(tokenizer.encode(text)) == text and 299 not in tokenizer.encode(text)
    assert tokenizer.encode(text, special=True).count(299) == 1
    assert tokenizer.decode_bytes([tokenizer.encode('\u00ff')[0]]) == b'\xc3'
    with pytest.raises(ValueError, match='outside a vocabulary of 300'):
        tokenizer.decode([300])


def test_a_table_of_strings_takes_the_longest_that_fits():
    tokenizer = load_tokenizer({'tokenizer': 'table', 'strings': ['a', 'b', 'ab', None, '<pad>', 'a'], 'vocab_size': 8})
    assert (tokenizer.n_vocab, tokenizer.padded_vocab_size) == (6, 8) and tokenizer.text_ids().tolist() == [0, 1, 2, 4]
    assert tokenizer.encode('aab<pad>b') == [0, 2, 4, 1] and tokenizer.encode('') == []
    assert tokenizer.decode([0, 2, 3, 4, 5]) == 'aab<pad>a' and tokenizer.decode_bytes([2]) == b'ab'
    with pytest.raises(UserError, match="none of the 4 tokens .* begins 'c d'") as error:
        tokenizer.encode('abc d')
    assert_one_line(error)
    with pytest.raises(ValueError, match='outside a vocabulary of 6'):
        tokenizer.decode([6])
    fast = pytest.importorskip('tokenizers') and tokenizer.fast_tokenizer()
    assert fast.encode('aab<pad>b').ids == [0, 2, 4, 1] and tokenizer.special_token == '<pad>'


def test_what_earlier_versions_recorded_gives_the_same_ids():
    """Metas and ids as version 0.1.0 wrote them."""
    recorded = json.loads((ROOT / 'tests' / 'support' / 'forks' / 'metas_0.1.0.json').read_text())
    assert {each['meta']['tokenizer'] for each in recorded} == {'char', 'bpe', 'byte'}
    for each in recorded:
        tokenizer = load_tokenizer(each['meta'])
        assert tokenizer.encode(each['text']) == each['ids'] and tokenizer.decode(each['ids']) == each['text']
        assert tokenizer.meta() == each['meta']


# ---- from meta to tokenizer ------------------------------------------------------------------------------------------


def test_invalid_meta():
    for meta in ({}, {'tokenizer': 'words'}, {'tokenizer': ['char']}, {'tokenizer': None, 'chars': 'ab'}):
        with pytest.raises(UserError, match='must be char, byte, bpe or gpt2'):
            load_tokenizer(meta)
    for meta in (
        {'tokenizer': 'char'},
        {'tokenizer': 'char', 'chars': ''},
        {'tokenizer': 'char', 'chars': 'aba'},
        {'tokenizer': 'char', 'chars': 'ab', 'vocab_size': 3},
        {'tokenizer': 'bpe'},
        {'tokenizer': 'bpe', 'pieces': ['a']},
        {'tokenizer': 'byte', 'vocab_size': 100},
        {'tokenizer': 'table', 'strings': ['a', 1], 'vocab_size': 2},
        {'tokenizer': 'table', 'strings': [None], 'vocab_size': 2},
        {'tokenizer': 'table', 'strings': ['a', 'b'], 'vocab_size': 1},
    ):
        with pytest.raises(UserError, match=f'the tokenizer {meta["tokenizer"]} has .*: prepare') as error:
            load_tokenizer(meta)
        assert_one_line(error)


def test_tokens_that_stand_for_no_text():
    assert tokenizer_of({'tokenizer': 'none', 'vocab_size': 8}) is None
    with pytest.raises(UserError, match='stand for no text'):
        load_tokenizer({'tokenizer': 'none', 'vocab_size': 8})


def test_ids_are_their_own_text():
    tokenizer = IdTokenizer(12)
    assert tokenizer.encode(' 3 11\n0') == [3, 11, 0] and tokenizer.encode('') == []
    assert tokenizer.decode([3, 11]) == '3 11 ' and tokenizer.encode(tokenizer.decode(range(12))) == [*range(12)]
    for text in ('12', '-1', '1.0', 'a', '\u0661', '9' * 5000):
        with pytest.raises(UserError, match='numbers from 0 to 11'):
            tokenizer.encode(text)
    with pytest.raises(ValueError, match='outside a vocabulary of 12'):
        tokenizer.decode([12])


def test_a_checkpoint_without_meta_is_known_by_gpt2s_vocabulary_size():
    """nanoGPT's checkpoints name no tokenizer."""
    assert {tokenizer_of({}, size).name for size in (50257, 50304)} == {'gpt2'}
    assert tokenizer_of({}, 65) is None and tokenizer_of({}, 256) is None
    assert tokenizer_of({'tokenizer': 'char', 'chars': 'ab'}, 50304).name == 'char'


@pytest.fixture
def every_tokenizer(learned):
    """One tokenizer of each kind, none of them loaded."""
    return [CharTokenizer('abc'), ByteTokenizer(), BPETokenizer(learned), GPT2Tokenizer(), TableTokenizer(['a'], 1)]


def test_meta_describes_the_tokenizer_completely(every_tokenizer):
    assert {tokenizer.name for tokenizer in every_tokenizer} == {*TOKENIZERS, 'table'}
    assert [kind_named(tokenizer.name) for tokenizer in every_tokenizer] == [*map(type, every_tokenizer)]
    for tokenizer in every_tokenizer:
        again = tokenizer_of(tokenizer.meta())
        assert type(again) is type(tokenizer) and again.meta() == tokenizer.meta()
        assert again.n_vocab == again.meta()['vocab_size'] <= again.padded_vocab_size


def test_sizes_and_special_ids_are_known_without_the_vocabulary(every_tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tiktoken', None)  # not installed
    sizes = {tokenizer.name: (tokenizer.n_vocab, tokenizer.padded_vocab_size) for tokenizer in every_tokenizer}
    assert sizes == {'char': (3, 3), 'byte': (256, 256), 'bpe': (300, 300), 'gpt2': (50257, 50304), 'table': (1, 1)}
    for tokenizer in every_tokenizer:
        ids = set(tokenizer.text_ids().tolist())
        assert set(range(tokenizer.n_vocab)) - ids == ({tokenizer.end_of_text} - {None})
        if tokenizer.byte_pair:
            with pytest.raises(UserError, match='pip install tiktoken'):
                tokenizer.load()


class Reversed(ByteTokenizer):
    """A tokenizer that nothing else knows of: bytes, the highest first, and an end-of-text token."""

    name, n_vocab, end_of_text = 'reversed', 257, 256

    def encode_array(self, text):
        return 255 - super().encode_array(text)

    def decode_bytes(self, ids):
        return bytes(255 - int(i) for i in ids if i != 256)


def test_a_new_tokenizer_is_one_class(prepare, monkeypatch, tmp_path):
    """Once registered, text can be prepared, read and decoded with it, without a change elsewhere."""
    monkeypatch.setitem(TOKENIZERS, 'reversed', Reversed)
    (tmp_path / 'in.txt').write_text('some text ' * 20)
    prepare('data/text/prepare.py', input=tmp_path / 'in.txt', out_dir=tmp_path / 'out', tokenizer='reversed')
    data = TokenData(tmp_path / 'out', 4)
    assert data.n_vocab == 257 and data.meta['tokenizer'] == 'reversed'
    ids = np.fromfile(tmp_path / 'out' / 'train.bin', dtype='<u2')
    assert load_tokenizer(data.meta).decode(ids) == 'some text ' * 18
    assert 256 not in tokenizer_of(data.meta).text_ids()
