"""tokens.py: tokenizers, the data set on disk, and which windows make a batch."""

import json
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from core import tokenizer, write_dataset
from core.dataset import TokenData
from core.runtime import UserError
from core.tokenizer import load_tokenizer
from core.write_dataset import write_dataset


def numbers(folder, train=1000, val=200, vocab_size=1 << 16, **more):
    """A data set in which the token at position i is i, so that a window shows where it begins."""
    splits = {'train': np.arange(train), 'val': np.arange(val)}
    write_dataset(folder, 'none', splits, vocab_size=vocab_size, source='numbers', **more)
    return folder


def one_line(error):
    text = str(error.value)
    assert '\n' not in text and len(text) > 20
    return text


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_depends_on_seed_and_number_alone(tmp_path):
    numbers(tmp_path)
    one, other = TokenData(tmp_path, 16), TokenData(tmp_path, 16)
    other.batch(1, 5, 8)
    other.windows('val', other.eval_windows('val', 4))
    x, y = one.batch(1337, 3, 8)
    x_other, y_other = other.batch(1337, 3, 8)
    assert torch.equal(x, x_other) and torch.equal(y, y_other)
    assert not torch.equal(x, one.batch(1337, 4, 8)[0]) and not torch.equal(x, one.batch(1338, 3, 8)[0])


def test_the_windows_of_a_batch_are_these_forever(tmp_path):
    """Runs of different versions can be compared only while this holds."""
    data = TokenData(numbers(tmp_path), 16)
    assert data.batch(1337, 0, 6)[0][:, 0].tolist() == [953, 803, 526, 325, 782, 107]
    assert data.batch(1337, 1, 6)[0][:, 0].tolist() == [578, 189, 494, 504, 448, 266]
    assert data.batch(-1, 2**40, 2)[0].shape == (2, 16)


def test_rows_of_a_batch_are_those_of_the_whole(tmp_path):
    data = TokenData(numbers(tmp_path), 16)
    x, y = data.batch(7, 11, 12)
    parts = [data.batch(7, 11, 12, slice(first, first + 3)) for first in range(0, 12, 3)]
    assert torch.equal(x, torch.cat([part[0] for part in parts]))
    assert torch.equal(y, torch.cat([part[1] for part in parts]))
    assert torch.equal(x[[9, 2]], data.batch(7, 11, 12, [9, 2])[0])


def test_targets_are_the_next_tokens_and_every_window_can_be_drawn(tmp_path):
    data = TokenData(numbers(tmp_path, train=40), 16)
    x, y = data.batch(1, 0, 2000)
    assert x.dtype == y.dtype == torch.int64 and x.is_contiguous() and x.shape == (2000, 16)
    assert torch.equal(y, x + 1)
    assert set(x[:, 0].tolist()) == set(range(40 - 16))  # the last window's last target is the last token


def test_a_file_of_exactly_one_window(tmp_path):
    data = TokenData(numbers(tmp_path, train=17, val=17), 16)
    assert data.batch(3, 3, 5)[0][:, 0].tolist() == [0] * 5
    assert data.eval_windows('val', 9).tolist() == [0]


def test_evaluation_windows_are_even_and_never_overlap(tmp_path):
    data = TokenData(numbers(tmp_path, val=1001), 10)
    for count in (1, 2, 7, 99, 100, 5000):
        starts = data.eval_windows('val', count)
        assert len(starts) == min(count, 100) and starts[0] == 0
        gaps = np.diff(starts)
        assert (gaps >= 10).all() and (len(gaps) == 0 or gaps.max() - gaps.min() <= 10)
        x, y = data.windows('val', starts)
        assert x[:, 0].tolist() == starts.tolist() and torch.equal(y, x + 1)
    assert data.windows('val', starts[:0])[0].shape == (0, 10)
    with pytest.raises(UserError, match='at least one'):
        data.eval_windows('val', 0)
    with pytest.raises(ValueError, match='leave val.bin'):
        data.windows('val', np.array([991]))


def test_rows_and_masks(tmp_path):
    masks = {'train': np.arange(1000) % 10 < 4, 'val': np.zeros(200, dtype=bool)}
    numbers(tmp_path, row_tokens=10, masks=masks)
    data = TokenData(tmp_path, 9)
    x, y = data.batch(1, 0, 500)
    assert (x[:, 0] % 10 == 0).all() and len(set(x[:, 0].tolist())) > 90
    assert torch.equal(y[:, 3:], x[:, 3:] + 1) and (y[:, :3] == -1).all()
    assert data.eval_windows('val', 100).tolist() == list(range(0, 200, 10))
    with pytest.raises(UserError, match='--block_size=9'):
        TokenData(tmp_path, 8)
    numbers(tmp_path)
    assert not list(tmp_path.glob('*.mask.bin'))


def test_large_ids_take_uint32(tmp_path):
    splits = {'train': np.arange(70000), 'val': np.arange(100)}
    meta = write_dataset(tmp_path, 'none', splits, vocab_size=70000, source='numbers')
    assert meta['dtype'] == 'uint32' and (tmp_path / 'train.bin').stat().st_size == 280000
    x, _ = TokenData(tmp_path, 8).windows('train', [69990])
    assert x[0].tolist() == list(range(69990, 69998))


def test_a_batch_of_a_huge_file_is_cheap(tmp_path):
    """8 GB of zeros, which take no room on the disk: opening it and reading batches must not read it all."""
    (tmp_path / 'val.bin').write_bytes(bytes(2000))
    with open(tmp_path / 'train.bin', 'wb') as file:
        file.truncate(1 << 33)
    start = time.perf_counter()
    data = TokenData(tmp_path, 64)
    for n in range(3):
        data.batch(1, n, 8)
    assert data.tokens['train'] == 1 << 32
    assert time.perf_counter() - start < 5


# ---- a broken data set -----------------------------------------------------------------------------------------------


def break_meta(**changes):
    def apply(folder):
        meta = json.loads((folder / 'meta.json').read_text())
        (folder / 'meta.json').write_text(json.dumps({**meta, **changes}))

    return apply


BROKEN = {
    'no folder': (lambda f: [path.unlink() for path in f.iterdir()] + [f.rmdir()], 'there is no data set'),
    'no train.bin': (lambda f: (f / 'train.bin').unlink(), 'no .*train.bin yet'),
    'no val.bin': (lambda f: (f / 'val.bin').unlink(), "val.bin can't be read"),
    'empty': (lambda f: (f / 'val.bin').write_bytes(b''), 'val.bin is empty'),
    'odd': (lambda f: (f / 'train.bin').write_bytes(bytes(801)), 'not a whole number of uint16'),
    'other length': (
        lambda f: (f / 'train.bin').write_bytes(bytes(800)),
        'has 400 uint16 tokens, and meta.json says 3,600',
    ),
    'cut meta': (lambda f: (f / 'meta.json').write_text('{"format": 1'), "meta.json can't be read"),
    'list for meta': (lambda f: (f / 'meta.json').write_text('[]'), 'not a JSON object'),
    'other format': (break_meta(format=2), 'has format 2'),
    'killed while replacing': (break_meta(replacing=True), 'was being replaced'),
    'tokenizer': (break_meta(tokenizer='words'), "unknown tokenizer 'words'"),
    'dtype': (break_meta(dtype='int64'), "dtype 'int64'"),
    'right bytes, wrong dtype': (break_meta(dtype='uint32'), 'has 1,800 uint32 tokens'),
    'chars': (break_meta(chars='aab'), '"chars" that are not'),
    'vocab_size': (break_meta(vocab_size=True), 'vocab_size True'),
    'tokens': (break_meta(tokens={'train': 3600}), '"tokens"'),
    'no source': (break_meta(source=None), 'no "source"'),
    'rows': (break_meta(row_tokens=1), 'row_tokens 1'),
    'ids': (break_meta(vocab_size=5, chars='abcde'), 'has the id 1., beyond the vocabulary of 5'),
}


@pytest.mark.parametrize('case', BROKEN)
def test_a_broken_data_set_is_explained(case, char_data):
    TokenData(char_data, 16)
    apply, message = BROKEN[case]
    apply(char_data)
    with pytest.raises(UserError, match=message) as error:
        TokenData(char_data, 16)
    assert 'data/text/prepare.py --input=FILE --name=tiny' in one_line(error)


def test_the_command_named_is_the_folders_own(char_data):
    (char_data / 'prepare.py').touch()
    (char_data / 'train.bin').unlink()
    with pytest.raises(UserError, match='run python .*tiny/prepare.py$'):
        TokenData(char_data, 16)
    (char_data / 'train.bin').touch()
    with pytest.raises(UserError, match=r'there is no data set .*other \(there are tiny\)'):
        TokenData(char_data.parent / 'other', 16)


def test_data_shorter_than_a_block(char_data):
    assert TokenData(char_data, 399).batch(1, 0, 2)[0].shape == (2, 399)
    with pytest.raises(UserError, match='val.bin has 400 tokens, and a window of block_size 400 takes 401'):
        TokenData(char_data, 400)


def test_a_bad_id_that_the_sample_misses_is_found_in_its_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, 'CHECKED_WHOLE', 0)
    ids = np.zeros(10_000_000, dtype='<u2')
    ids[5000] = 50257  # between two samples, which are 4096 of every 9765 tokens
    ids.tofile(tmp_path / 'train.bin')
    ids[:100].tofile(tmp_path / 'val.bin')
    data = TokenData(tmp_path, 16)
    data.windows('train', [0, 9000])
    with pytest.raises(UserError, match='has the id 50257, beyond the vocabulary of 50,257'):
        data.windows('train', [0, 4990])
    ids[-3] = 60000
    ids[9765] = 60000
    ids.tofile(tmp_path / 'train.bin')
    with pytest.raises(UserError, match='has the id 60000'):
        TokenData(tmp_path, 16)


# ---- nanoGPT's folders -----------------------------------------------------------------------------------------------


def nanogpt_folder(folder, meta):
    np.array([0, 1, 2, 1] * 50, dtype='<u2').tofile(folder / 'train.bin')
    np.array([2, 1, 0, 1] * 20, dtype='<u2').tofile(folder / 'val.bin')
    if meta is not None:
        (folder / 'meta.pkl').write_bytes(meta)


def test_nanogpt_folder_by_characters(tmp_path):
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
    one_line(error)
    assert not (tmp_path / 'ran').exists()


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def test_characters():
    tokenizer = load_tokenizer({'tokenizer': 'char', 'chars': '\n abe\u00e9\U0001f600'})
    assert tokenizer.n_vocab == 7 and tokenizer.end_of_text is None
    assert tokenizer.encode('ab \u00e9\n\U0001f600') == [2, 3, 1, 5, 0, 6] and tokenizer.encode('') == []
    assert tokenizer.decode(torch.tensor([2, 3, 6])) == 'ab\U0001f600'
    assert tokenizer.decode_bytes([5, 6]) == '\u00e9\U0001f600'.encode()
    for text, culprit in (('ab5e', "'5'"), ('\U0001f601', "'\U0001f601'"), ('a\udcff', r"'\\udcff'")):
        with pytest.raises(UserError, match=f'the character {culprit} is not among the 7') as error:
            tokenizer.encode(text)
        one_line(error)
    for ids in ([7], [-1]):
        with pytest.raises(ValueError, match='beyond a vocabulary of 7'):
            tokenizer.decode(ids)


def test_bytes():
    tokenizer = load_tokenizer({'tokenizer': 'byte'})
    assert tokenizer.n_vocab == 256
    assert tokenizer.encode('a\u00e9') == [97, 195, 169]
    assert tokenizer.decode([97, 195, 169]) == 'a\u00e9' and tokenizer.decode([97, 195]) == 'a\ufffd'
    assert tokenizer.decode_bytes([195]) == b'\xc3'
    assert tokenizer.encode('\udcff') == [255]  # how Python hands over a byte on the command line that is not UTF-8


def test_gpt2(gpt2_cache):
    tokenizer = load_tokenizer({'tokenizer': 'gpt2'})
    assert tokenizer.n_vocab == 50257 and tokenizer.end_of_text == 50256
    text = 'Hello <|endoftext|> w\u00f6rld \U0001f600'
    ids = tokenizer.encode(text)
    assert 50256 not in ids and ids[0] == 15496 and ids == tokenizer.encode_array(text).tolist()
    assert tokenizer.encode(text, special=True).count(50256) == 1
    assert tokenizer.decode(ids) == text and b''.join(tokenizer.decode_bytes([i]) for i in ids) == text.encode()
    with pytest.raises(ValueError, match='beyond a vocabulary of 50257'):
        tokenizer.decode([50257])


WORDS = ['low lower lowest newest', 'the quick brown fox jumps over a lazy dog', 'wide wider widest caf\u00e9'] * 50


@pytest.fixture(scope='module')
def learned():
    return tokenizer.learn_bpe(WORDS, 300)


def test_a_byte_pair_encoding_is_learned(learned):
    tokenizer = load_tokenizer({'tokenizer': 'bpe', 'pieces': learned})
    assert tokenizer.n_vocab == 300 and tokenizer.end_of_text == 299
    assert sorted(learned[:256]) == [chr(byte) for byte in range(256)] and learned == tokenizer.learn_bpe(WORDS, 300)
    ids = tokenizer.encode(' newest lowest')
    assert [tokenizer.decode([i]) for i in ids] == [' new', 'est', ' lowest']  # what occurs most is joined
    assert len(tokenizer.encode('lo wer')) > 2
    text = 'caf\u00e9 <|endoftext|> \U0001f600 \n\tnew\0'
    assert tokenizer.decode(tokenizer.encode(text)) == text and 299 not in tokenizer.encode(text)
    assert tokenizer.encode(text, special=True).count(299) == 1
    assert tokenizer.decode_bytes([tokenizer.encode('\u00ff')[0]]) == b'\xc3'
    with pytest.raises(ValueError, match='beyond a vocabulary of 300'):
        tokenizer.decode([300])
    assert len(tokenizer.learn_bpe(['ab'], 300)) == 257  # there are no more pairs in it


def test_a_long_text_is_sampled_evenly():
    texts = [f'{i:05}' for i in range(1000)]
    assert list(tokenizer.evenly(texts, 5000, 5000)) == list(tokenizer.evenly(texts, 5000, 10**6)) == texts
    assert list(tokenizer.evenly(texts, 5000, 500)) == texts[::10]


def test_a_byte_pair_encoding_on_disk(tmp_path, learned):
    ids = np.array(load_tokenizer({'tokenizer': 'bpe', 'pieces': learned}).encode(WORDS[0] * 9))
    write_dataset(tmp_path, 'bpe', {'train': ids, 'val': ids}, pieces=learned, source='words')
    data = TokenData(tmp_path, 4)
    assert data.n_vocab == data.padded_vocab_size == 300
    assert load_tokenizer(data.meta).decode(ids) == WORDS[0] * 9
    for pieces in (learned[:-1], learned[1:], learned[:-1] + learned[:1], [*learned[:-1], 'a\u0100'], 7, None):
        (tmp_path / 'meta.json').write_text(json.dumps({**data.meta, 'pieces': pieces}))
        with pytest.raises(UserError, match='"pieces" that are not 299 different strings') as error:
            TokenData(tmp_path, 4)
        one_line(error)


def test_no_tokenizer():
    for meta in ({}, {'tokenizer': 'words'}):
        with pytest.raises(UserError, match='must be char, byte, bpe or gpt2'):
            load_tokenizer(meta)
    for meta in ({'tokenizer': 'char'}, {'tokenizer': 'bpe'}, {'tokenizer': 'bpe', 'pieces': ['a']}):
        with pytest.raises(UserError, match='lacks its (chars|pieces): prepare') as error:
            load_tokenizer(meta)
        one_line(error)


def test_without_a_network_tiktoken_is_explained(monkeypatch):
    tiktoken = pytest.importorskip('tiktoken')

    def hang(name):
        time.sleep(5)

    def fail(name):
        raise ConnectionError('no route')

    for replacement, seconds in ((hang, 0.05), (fail, 5)):
        monkeypatch.setattr(tiktoken, 'get_encoding', replacement)
        with pytest.raises(UserError, match='TIKTOKEN_CACHE_DIR') as error:
            tokenizer.gpt2_encoding(seconds)
        one_line(error)


# ---- encoding in pieces ----------------------------------------------------------------------------------------------

AWKWARD = (
    "It's 3 o'clock\n\n\n  we'll  \t go \r\n\r\nx  \n y\u00a0\u00a0z  'tis' \u3000 a\x1c\x1c b \u2028c"
    " \U0001f600\U0001f600  d\u0301e 12 345 \n'll 've  're -- ?? ... end   \n"
)


@pytest.mark.parametrize('size', [1, 2, 3, 7, 50])
def test_pieces_encode_to_the_same_tokens(size, gpt2_cache):
    tokenizer = load_tokenizer({'tokenizer': 'gpt2'})
    text = AWKWARD * 3
    blocks = [text[i : i + 5] for i in range(0, len(text), 5)]
    pieces = list(write_dataset.chunks(blocks, size))
    assert ''.join(pieces) == text and (len(pieces) > 30 or size == 50)
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


@pytest.mark.parametrize('size', [1, 2, 3, 7])
def test_pieces_encode_to_the_same_tokens_by_a_learned_encoding(size):
    tokenizer = load_tokenizer({'tokenizer': 'bpe', 'pieces': tokenizer.learn_bpe([AWKWARD], 400)})
    pieces = list(write_dataset.chunks([AWKWARD[i : i + 5] for i in range(0, len(AWKWARD), 5)], size))
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(AWKWARD)


def test_pieces_of_shakespeare(shared_data, gpt2_cache):
    text = (shared_data / 'tinyshakespeare' / 'input.txt').read_text(encoding='utf-8')
    tokenizer = load_tokenizer({'tokenizer': 'gpt2'})
    pieces = list(write_dataset.chunks([text], 1)) + list(
        write_dataset.chunks((text[i : i + 100] for i in range(0, len(text), 100)), 1)
    )
    assert ''.join(pieces) == text * 2 and len(pieces) > 5000
    arrays = write_dataset.encode_stream(tokenizer, ((piece, False) for piece in pieces), workers=2)
    assert np.array_equal(np.concatenate(list(arrays)), tokenizer.encode(text) * 2)


def test_a_text_without_spaces_is_cut_in_the_end(monkeypatch):
    monkeypatch.setattr(tokens, 'LONGEST_RUN', 100)
    pieces = list(write_dataset.chunks(['x' * 30] * 10, 20))
    assert ''.join(pieces) == 'x' * 300 and max(map(len, pieces)) == 120


def test_streams_keep_their_order_and_read_little_ahead(monkeypatch):
    monkeypatch.setattr(tokens, 'CHUNK', 10)
    read = []

    def pieces():
        for i in range(1000):
            read.append(i)
            yield f'{i:05d}', False

    class Slow(tokenizer.ByteTokenizer):
        def encode_array(self, text):
            time.sleep(0.002 if text.endswith('4') else 0)
            return super().encode_array(text)

    text = b''
    for array in write_dataset.encode_stream(Slow(), pieces(), workers=4):
        text += array.astype('u1').tobytes()
        assert len(read) - len(text) // 5 <= 2 * 2 * 4
    assert text.decode() == ''.join(f'{i:05d}' for i in range(1000))


def test_an_error_in_a_worker_reaches_the_caller():
    tokenizer = tokenizer.CharTokenizer('ab')
    with pytest.raises(UserError, match="'c'"):
        list(write_dataset.encode_stream(tokenizer, [('ab', False), ('c', False)], workers=2))


# ---- writing ---------------------------------------------------------------------------------------------------------


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_on_disk(char_data):
    meta = json.loads((char_data / 'meta.json').read_text())
    assert set(files_of(char_data)) == {'train.bin', 'val.bin', 'meta.json'}
    assert meta['format'] == 1 and meta['tokens'] == {'train': 3600, 'val': 400} and meta['source'] == 'a test text'
    assert meta['sha256'] == {name: write_dataset.file_sha256(char_data / name) for name in ('train.bin', 'val.bin')}
    raw = np.frombuffer((char_data / 'train.bin').read_bytes(), dtype='<u2')
    assert ''.join(meta['chars'][i] for i in raw[:11]) == 'the cat sat'


def test_a_failed_run_changes_nothing(char_data):
    before = files_of(char_data)

    def broken():
        yield np.arange(3)
        raise OSError(28, 'No space left on device')

    fine = np.arange(3)
    for splits, exception in (
        ({'train': fine, 'val': broken()}, UserError),
        ({'train': broken(), 'val': fine}, UserError),
        ({'train': fine, 'val': fine[:0]}, UserError),
        ({'train': fine, 'val': np.array([300])}, ValueError),
        ({'train': fine, 'val': np.array([-1])}, ValueError),
    ):
        with pytest.raises(exception):
            write_dataset(char_data, 'byte', splits, source='bad')
        assert files_of(char_data) == before


def test_a_finished_file_is_taken_over_and_survives_a_failure(tmp_path):
    part = tmp_path / 'train.bin.part'
    np.arange(100, dtype='<u2').tofile(part)
    with pytest.raises(UserError):
        write_dataset(tmp_path, 'byte', {'train': part, 'val': np.array([], dtype=int)}, source='a test')
    assert part.exists()
    meta = write_dataset(tmp_path, 'byte', {'train': part, 'val': np.arange(5)}, source='a test')
    assert not part.exists() and meta['tokens']['train'] == 100
    assert meta['sha256']['train.bin'] == write_dataset.file_sha256(tmp_path / 'train.bin')


def test_a_run_killed_between_two_renames_leaves_a_data_set_that_says_so(char_data, monkeypatch):
    replace, calls = tokens.os.replace, []

    def killed(source, target):
        calls.append(target)
        if len(calls) == 3:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(tokens.os, 'replace', killed)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(char_data, 'byte', {'train': np.arange(100), 'val': np.arange(100)}, source='new')
    monkeypatch.undo()
    with pytest.raises(UserError, match='was being replaced'):
        TokenData(char_data, 16)
    write_dataset(char_data, 'byte', {'train': np.arange(100), 'val': np.arange(100)}, source='new')
    assert TokenData(char_data, 16).corpus == 'new'


def test_replacing_another_corpus_is_said(char_data, capsys):
    splits = {'train': np.arange(100), 'val': np.arange(100)}
    write_dataset(char_data, 'byte', splits, source='file a.txt')
    assert 'held a test text (char); it is being replaced by file a.txt (byte)' in capsys.readouterr().err
    write_dataset(char_data, 'byte', splits, source='file a.txt')
    assert capsys.readouterr().err == ''
