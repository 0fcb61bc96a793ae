"""core/text/meta.py: nanoGPT's folders, what a pickle may hold, and the meta that a checkpoint's config leads to."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from support.preparing import nanogpt_folder

from core.cli.errors import UserError
from core.text.dataset import TokenData
from core.text.meta import meta_of_dataset
from core.text.tokenizer import load_tokenizer


def test_nanogpt_folder_in_characters(tmp_path):
    chars = 'abc'
    meta = dict(vocab_size=3, itos=dict(enumerate(chars)), stoi={c: i for i, c in enumerate(chars)})
    nanogpt_folder(tmp_path, pickle.dumps(meta))
    data = TokenData(tmp_path, 8)
    assert (data.n_vocab, data.padded_vocab_size, data.tokens) == (3, 3, {'train': 200, 'val': 80})
    assert load_tokenizer(data.meta).decode(data.windows('train', [0])[0][0]) == 'abcbabcb'


def test_nanogpt_folder_with_a_vocabulary_size_only(tmp_path):
    nanogpt_folder(tmp_path, pickle.dumps({'vocab_size': 7}))
    data = TokenData(tmp_path, 8)
    assert data.n_vocab == 7
    with pytest.raises(UserError, match='stand for no text'):
        load_tokenizer(data.meta)


def test_nanogpt_folder_in_gpt2_tokens(tmp_path):
    nanogpt_folder(tmp_path, None)
    data = TokenData(tmp_path, 8)
    assert (data.n_vocab, data.padded_vocab_size, data.meta['tokenizer']) == (50257, 50304, 'gpt2')


LETTERS = dict(enumerate('ab\u00e9'))
METAS = {  # what is in meta.pkl: (its content, the tokenizer, n_vocab, padded_vocab_size, what ids 0 1 2 1 stand for)
    'no strings': (dict(vocab_size=7, itos=None, stoi=None), 'none', 7, 7, None),
    'a list': (dict(vocab_size=3, itos=[*LETTERS.values()]), 'char', 3, 3, 'ab\u00e9b'),
    'a tuple': (dict(vocab_size=3, itos=tuple('abc')), 'char', 3, 3, 'abcb'),
    "numpy's integers": (dict(vocab_size=np.int64(3), itos={np.int32(i): c for i, c in LETTERS.items()}), 'char', 3, 3,
                         'ab\u00e9b'),
    "numpy's strings": (dict(vocab_size=np.uint8(3), itos={i: np.str_(c) for i, c in LETTERS.items()}), 'char', 3, 3,
                        'ab\u00e9b'),
    'the other byte order': (dict(vocab_size=np.array(3, '>i8')[()], itos=LETTERS), 'char', 3, 3, 'ab\u00e9b'),
    'words': (dict(vocab_size=3, itos={0: 'to ', 1: 'be ', 2: 'or '}), 'table', 3, 3, 'to be or be '),
    'a special entry': (dict(vocab_size=4, itos={**LETTERS, 3: '<pad>'}), 'table', 4, 4, 'ab\u00e9b'),
    'a padded size': (dict(vocab_size=64, itos=LETTERS), 'table', 64, 64, 'ab\u00e9b'),
    'a hole': (dict(vocab_size=3, itos={0: 'a', 2: 'c'}), 'table', 3, 3, 'ac'),
    'nothing of use': (dict(vocab_size=3, itos={'a': 0, 1: 2.5}, stoi=[1], notes={'x': None}), 'none', 3, 3, None),
    'large ids': (dict(vocab_size=100_277), 'none', 100_277, 100_277, None),
}  # fmt: skip


@pytest.mark.parametrize('case', METAS)
def test_a_meta_pickle_needs_a_vocabulary_size_only(case, tmp_path):
    content, tokenizer, n_vocab, padded, text = METAS[case]
    nanogpt_folder(tmp_path, pickle.dumps(content))
    if case == 'large ids':
        for name in ('train.bin', 'val.bin'):
            np.array([0, 100_276, 2, 1] * 50, dtype='<u4').tofile(tmp_path / name)
    data = TokenData(tmp_path, 8)
    assert (data.meta['tokenizer'], data.n_vocab, data.padded_vocab_size) == (tokenizer, n_vocab, padded)
    assert json.loads(json.dumps(data.meta)) == data.meta  # plain values only
    ids = data.windows('train', [0])[0][0]
    if case == 'large ids':
        assert ids[:4].tolist() == [0, 100_276, 2, 1]
    elif text is None:
        with pytest.raises(UserError, match='stand for no text'):
            load_tokenizer(data.meta)
    else:
        assert load_tokenizer(data.meta).decode(ids[:4]) == text


@pytest.mark.parametrize('value', [np.complex64(3), np.array([3]), np.dtype('V4'), np.datetime64('2020'),
                                   np.bytes_(b'a'), Path('x'), {3}, print, np.random.default_rng])  # fmt: skip
def test_of_numpy_a_meta_pickle_may_have_numbers_and_strings_only(value, tmp_path):
    nanogpt_folder(tmp_path, pickle.dumps({'vocab_size': 3, 'more': value}, protocol=4))
    if isinstance(value, set):
        TokenData(tmp_path, 8)  # a plain Python value
        return
    with pytest.raises(UserError, match="meta.pkl can't be read") as error:
        TokenData(tmp_path, 8)
    assert '\n' not in str(error.value)


class Evil:
    def __reduce__(self):
        return Path.touch, (Path('ran'),)


@pytest.mark.parametrize(
    'meta',
    [
        pickle.dumps({'vocab_size': 3, 'itos': Evil()}),
        pickle.dumps([3]),
        b'\x80\x04',
        b'',
        pickle.dumps({'vocab_size': 0}),
    ],
)
def test_a_pickle_that_could_run_code_or_is_broken_is_refused(meta, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nanogpt_folder(tmp_path, meta)
    with pytest.raises(UserError, match="meta.pkl can't be read") as error:
        TokenData(tmp_path, 8)
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'ran').exists()


def test_the_meta_of_the_data_set_that_a_checkpoint_names(char_data, tmp_path):
    data_dir = char_data.parent
    assert meta_of_dataset(data_dir, 'tiny')['chars'] == TokenData(char_data, 8).meta['chars']
    assert meta_of_dataset(data_dir, 'data/tiny')['tokenizer'] == 'char'
    for missing in ('nowhere', '', None, 7):
        assert meta_of_dataset(data_dir, missing) is None
    (data_dir / 'nano').mkdir()
    assert meta_of_dataset(data_dir, 'nano') is None  # nothing there that says so
    (data_dir / 'nano' / 'meta.pkl').write_bytes(pickle.dumps(dict(vocab_size=3, itos=[*'abc'])))
    assert meta_of_dataset(data_dir, 'nano')['chars'] == 'abc'  # without tokens
    (data_dir / 'nano' / 'meta.pkl').unlink()
    nanogpt_folder(data_dir / 'nano', None)
    assert meta_of_dataset(data_dir, 'nano')['tokenizer'] == 'gpt2'
    (data_dir / 'nano' / 'meta.pkl').write_bytes(b'broken')
    with pytest.raises(UserError, match="meta.pkl can't be read"):
        meta_of_dataset(data_dir, 'nano')
