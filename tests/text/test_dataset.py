"""core/text/dataset.py: which windows make a batch, broken data sets, and nanoGPT's folders."""

import hashlib
import json
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.preparing import nanogpt_folder

from core.cli.errors import UserError
from core.text.dataset import TokenData, check_data, check_tokenizer
from core.text.meta import flat
from core.text.tokenizer import BPETokenizer, CharTokenizer
from core.text.write_dataset import write_dataset


def numbers(folder, train=1000, val=200, vocab_size=1 << 16, **more):
    """A data set in which the token at position i is i, so a window shows its position."""
    splits = {'train': np.arange(train), 'val': np.arange(val)}
    write_dataset(folder, None, splits, vocab_size=vocab_size, source='numbers', **more)
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


def test_the_windows_of_a_batch_never_change(tmp_path):
    """Runs of different versions are comparable only if this holds."""
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
        assert count == 1 or 1001 - starts[-1] <= gaps.max() + 11, 'the last part of the split is read too'
        x, y = data.windows('val', starts)
        assert x[:, 0].tolist() == starts.tolist() and torch.equal(y, x + 1)
    assert data.windows('val', starts[:0])[0].shape == (0, 10)
    with pytest.raises(UserError, match='at least one'):
        data.eval_windows('val', 0)
    with pytest.raises(ValueError, match='exceed val.bin'):
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


def test_a_batch_of_a_huge_file_is_cheap(tmp_path):
    """A sparse file of 8 GB: opening it and gathering batches must not read all of it."""
    (tmp_path / 'val.bin').write_bytes(bytes(2000))
    with open(tmp_path / 'train.bin', 'wb') as file:
        file.truncate(1 << 33)
    start = time.perf_counter()
    data = TokenData(tmp_path, 64)
    for n in range(3):
        data.batch(1, n, 8)
    assert data.tokens['train'] == 1 << 32
    assert time.perf_counter() - start < 5


def in_several_files(folder, lengths, val=200):
    """The data set of `numbers` with a training split in files of these lengths."""
    folder.mkdir(exist_ok=True)
    ids, parts = np.arange(sum(lengths), dtype='<u2'), []
    for number, (first, length) in enumerate(zip(np.cumsum([0, *lengths]), lengths, strict=False)):
        parts.append(folder / f'{number}.part')
        ids[first : first + length].tofile(parts[-1])
    splits = {'train': tuple(parts), 'val': np.arange(val)}
    write_dataset(folder, None, splits, vocab_size=1 << 16, source='numbers')
    return folder


@pytest.mark.parametrize('lengths', [[400, 400, 200], [1, 998, 1], [17, 16, 3, 5, 959], [10] * 100])
def test_several_files_have_the_windows_of_one(lengths, tmp_path):
    """Every window, those that begin in one file and end in the next, or in a later one, and their order in a batch."""
    data, one = TokenData(in_several_files(tmp_path / 'some', lengths), 16), TokenData(numbers(tmp_path), 16)
    assert data.tokens == one.tokens and data.meta['shards'] == lengths
    starts = np.random.default_rng(1).permutation(1000 - 16)
    x, y = data.windows('train', starts)
    assert x[:, 0].tolist() == starts.tolist() and torch.equal(y, x + 1)
    assert torch.equal(x[:, -1], x[:, 0] + 15) and x.dtype == torch.int64
    for n in range(5):
        assert all(map(torch.equal, data.batch(1337, n, 64), one.batch(1337, n, 64)))
    assert np.array_equal(data.eval_windows('train', 7), one.eval_windows('train', 7))
    assert data.windows('train', starts[:0])[0].shape == (0, 16)
    with pytest.raises(ValueError, match='exceed train.bin'):
        data.windows('train', np.array([984]))


def test_a_file_of_several_that_is_missing_or_damaged_is_named(tmp_path):
    names = ['train_00000.bin', 'train_00001.bin', 'train_00002.bin']
    for name in names:
        path = in_several_files(tmp_path, [400, 400, 200]) / name
        whole = path.read_bytes()
        for content, message in (
            (None, f"{name} can't be read"),
            (b'', f'{name} is empty'),
            (whole[:-1], f'{name} has .* not a whole number'),
            (whole[:-2], f'{name} has .* tokens, and meta.json says'),
            (whole[:-2] + b'\0\0', f'{name} was changed or is damaged.* with python data/hub/prepare.py'),
        ):
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            with pytest.raises(UserError, match=message) as error:
                TokenData(tmp_path, 16)
            one_line(error)
            path.write_bytes(whole)
        break_meta(vocab_size=300)(tmp_path)
        with pytest.raises(UserError, match='train_00000.bin has the id 399, beyond'):
            TokenData(tmp_path, 16)
    for name in names:
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match='there is no .*train.bin'):
        TokenData(tmp_path, 16)


@pytest.mark.parametrize(
    'shards', [[400, 400], [400, 400, 200, 0], [1000], 'abc', [400, 400, '200'], {'train': [1000]}]
)
def test_a_meta_with_other_files_is_refused(shards, tmp_path):
    break_meta(shards=shards)(in_several_files(tmp_path, [400, 400, 200]))
    with pytest.raises(UserError, match='has "shards" '):
        TokenData(tmp_path, 16)


def test_one_file_replaces_several_and_the_reverse(tmp_path, capsys):
    in_several_files(tmp_path, [400, 400, 200])
    assert {path.name for path in numbers(tmp_path).iterdir()} == {'train.bin', 'val.bin', 'meta.json'}
    (tmp_path / 'train_notes.bin').touch()
    TokenData(in_several_files(tmp_path, [500, 500]), 16)
    assert {path.name for path in tmp_path.iterdir()} == {
        'train_00000.bin', 'train_00001.bin', 'train_notes.bin', 'val.bin', 'meta.json'}  # fmt: skip
    write_dataset(tmp_path, None, {'train': np.arange(9), 'val': np.arange(9)}, vocab_size=9, source='other')
    assert 'replacing numbers (none) with other' in capsys.readouterr().err


# ---- a broken data set -----------------------------------------------------------------------------------------------


def break_meta(**changes):
    def apply(folder):
        meta = json.loads((folder / 'meta.json').read_text())
        (folder / 'meta.json').write_text(json.dumps({**meta, **changes}))

    return apply


BROKEN = {
    'no folder': (lambda f: [path.unlink() for path in f.iterdir()] + [f.rmdir()], 'there is no data set'),
    'no train.bin': (lambda f: (f / 'train.bin').unlink(), 'there is no .*train.bin'),
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
    'sums': (break_meta(sha256=['a']), '"sha256"'),
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


@pytest.mark.parametrize('name', ['train.bin', 'val.mask.bin'])
def test_one_flipped_bit_is_found(name, tmp_path):
    """The ids are still valid: only the checksum in meta.json can tell."""
    splits = {'train': np.arange(1000), 'val': np.arange(200)}
    masks = {split: np.arange(len(ids)) % 10 < 4 for split, ids in splits.items()}
    write_dataset(tmp_path, None, splits, source='numbers', vocab_size=2000, row_tokens=10, masks=masks)
    TokenData(tmp_path, 9)
    content = bytearray((tmp_path / name).read_bytes())
    content[100] ^= 1
    (tmp_path / name).write_bytes(content)
    recorded = json.loads((tmp_path / 'meta.json').read_text())['sha256'][name]
    found = hashlib.sha256(content).hexdigest()
    with pytest.raises(UserError, match=f'{name} was changed.* is {found[:16]}.* recorded {recorded[:16]}'):
        TokenData(tmp_path, 9)


def test_a_source_that_a_terminal_would_execute(char_data):
    break_meta(source='a \x1b]0;title\x07 text')(char_data)
    assert TokenData(char_data, 8).corpus == 'a \\x1b]0;title\\x07 text'


def test_the_message_names_the_prepare_script_of_the_folder(char_data):
    (char_data / 'prepare.py').touch()
    (char_data / 'train.bin').unlink()
    with pytest.raises(UserError, match='run python .*tiny/prepare.py$'):
        TokenData(char_data, 16)
    (char_data / 'train.bin').touch()
    with pytest.raises(UserError, match=r'there is no data set .*other \(there are tiny\)'):
        TokenData(char_data.parent / 'other', 16)


def test_data_shorter_than_a_block(char_data):
    assert TokenData(char_data, 399).batch(1, 0, 2)[0].shape == (2, 399)
    with pytest.raises(UserError, match='val.bin has 400 tokens, but a window of block_size 400 requires 401'):
        TokenData(char_data, 400)


def test_invalid_pieces(tmp_path):
    text = 'low lower lowest newest' * 9
    tokenizer = BPETokenizer.learn([text] * 50, 270)
    pieces, ids = tokenizer.pieces, np.array(tokenizer.encode(text))
    write_dataset(tmp_path, tokenizer, {'train': ids, 'val': ids}, source='words')
    meta = TokenData(tmp_path, 4).meta
    for broken in (pieces[:-1], pieces[1:], pieces[:-1] + pieces[:1], [*pieces[:-1], 'a\u0100'], 7, None):
        (tmp_path / 'meta.json').write_text(json.dumps({**meta, 'pieces': broken}))
        with pytest.raises(UserError, match='"pieces" that are not "vocab_size" - 1 different strings') as error:
            TokenData(tmp_path, 4)
        one_line(error)


def test_a_bad_id_that_the_sample_misses_is_found_in_its_batch(tmp_path):
    """Opening a file of 2^26 tokens checks the first 4096 of every 65536; a batch checks what it reads."""
    np.zeros(100, dtype='<u2').tofile(tmp_path / 'val.bin')
    with open(tmp_path / 'train.bin', 'wb') as file:
        file.truncate(2 << 26)

        def put(position, token):
            file.seek(2 * position)
            file.write(np.array([token], dtype='<u2').tobytes())
            file.flush()

        put(5000, 50257)
        data = TokenData(tmp_path, 16)
        data.windows('train', [0, 9000])
        with pytest.raises(UserError, match='has the id 50257, beyond the vocabulary of 50,257'):
            data.windows('train', [0, 4990])
        put(65536 * 700, 60000)
        with pytest.raises(UserError, match='has the id 60000'):
            TokenData(tmp_path, 16)


# ---- files of other programs -----------------------------------------------------------------------------------------


def words(dtype, count=400):
    return (np.arange(count) * 7919 % 60 + 1).astype(dtype)


@pytest.mark.parametrize('meta', [None, pickle.dumps({'vocab_size': 65})])
@pytest.mark.parametrize('dtype', ['int64', 'uint32', 'int32'])
def test_files_of_another_dtype_are_named(dtype, meta, tmp_path):
    nanogpt_folder(tmp_path, meta)
    for name in ('train.bin', 'val.bin'):
        words(dtype).tofile(tmp_path / name)
    name = 'int64' if dtype == 'int64' else 'uint32'
    with pytest.raises(UserError, match=f'train.bin looks like {name}: .* are 0, .*astype.np.uint16') as error:
        TokenData(tmp_path, 8)
    one_line(error)
    for name in ('train.bin', 'val.bin'):
        words('uint16').tofile(tmp_path / name)
    assert TokenData(tmp_path, 8).windows('val', [3])[0][0].tolist() == words(int)[3:11].tolist()
    # what meta.json says is believed: every second token may be 0
    ids = np.zeros(400, int)
    ids[::2] = words(int, 200)
    write_dataset(tmp_path, None, {'train': ids, 'val': ids}, vocab_size=65, source='zeros')
    TokenData(tmp_path, 8)


def llm_c(path, ids, magic=20240520, version=1, count=None, dtype='<u2'):
    header = np.zeros(256, '<i4')
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(ids, dtype).tobytes())


def test_headers_of_llm_c_are_read(tmp_path):
    ids = np.arange(1000) * 50
    llm_c(tmp_path / 'train.bin', ids)
    llm_c(tmp_path / 'val.bin', ids[:100])
    data = TokenData(tmp_path, 16)
    assert data.tokens == {'train': 1000, 'val': 100}
    assert (data.meta['tokenizer'], data.n_vocab, data.padded_vocab_size) == ('gpt2', 50257, 50304)
    assert data.ids('train', 0, 3).tolist() == [0, 50, 100] and data.ids('val').tolist() == ids[:100].tolist()
    x, y = data.windows('train', [0, 983])
    assert x[:, 0].tolist() == [0, 983 * 50] and torch.equal(y, x + 50)
    llm_c(tmp_path / 'val.bin', ids[:100].astype('u2'))
    write_dataset(tmp_path / 'plain', None, {'train': ids, 'val': ids[:100]}, vocab_size=50257, source='x')
    plain = TokenData(tmp_path / 'plain', 16)
    assert all(map(torch.equal, data.batch(1, 2, 30), plain.batch(1, 2, 30)))
    for changes, message in (
        (dict(count=999), 'its header says 999'),
        (dict(version=5), 'llm.c of the unknown version 5'),
    ):
        llm_c(tmp_path / 'train.bin', ids, **changes)
        with pytest.raises(UserError, match=message) as error:
            TokenData(tmp_path, 16)
        one_line(error)
    for name in ('train.bin', 'val.bin'):  # Llama 3's tokens
        llm_c(tmp_path / name, ids + 70_000, magic=20240801, version=7, dtype='<u4')
    data = TokenData(tmp_path, 16)
    assert data.ids('train', 0, 2).tolist() == [70_000, 70_050] and data.n_vocab == 128_256


# ---- files that change, and where a folder is ------------------------------------------------------------------------


@pytest.mark.parametrize('how', ['cut', 'shorter copy', 'longer'])
def test_a_file_that_changes_its_size_while_it_is_read_is_one_line(how, tmp_path):
    """A memory map would end the process with SIGBUS."""
    data = TokenData(numbers(tmp_path, train=50_000), 16)
    data.batch(1, 0, 8)
    content = (tmp_path / 'train.bin').read_bytes()
    with open(tmp_path / 'train.bin', 'r+b' if how == 'cut' else 'wb') as file:
        if how == 'cut':
            file.truncate(10)
        else:
            file.write(content[:5000] if how == 'shorter copy' else content * 2)
    with pytest.raises(UserError, match='train.bin was replaced .* while it was read: it had 100,000 bytes'):
        data.batch(1, 1, 8)
    (tmp_path / 'train.bin').write_bytes(content)
    assert torch.equal(data.batch(1, 1, 8)[0], TokenData(tmp_path, 16).batch(1, 1, 8)[0])


def test_a_file_that_is_replaced_by_a_rename_is_read_on(tmp_path):
    data = TokenData(numbers(tmp_path), 16)
    before = data.batch(1, 1, 8)[0]
    numbers(tmp_path, train=500)
    assert torch.equal(data.batch(1, 1, 8)[0], before)


def test_more_files_than_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr('core.text.dataset.MOST_OPEN', 3)
    data = TokenData(in_several_files(tmp_path, [100] * 10), 16)
    assert torch.equal(data.windows('train', range(984))[0][:, 0], torch.arange(984)) and len(data._open) == 3


def test_dataset_may_be_given_with_its_folder(char_data, monkeypatch):
    """--dataset=data/NAME with --data_dir=data, as one types with the help of a shell."""
    monkeypatch.chdir(char_data.parents[1])
    assert TokenData('data/data/tiny', 8).folder == Path('data/tiny')
    assert TokenData(char_data.parents[1] / 'data' / 'data' / 'tiny', 8).folder == char_data
    with pytest.raises(UserError, match='there is no data set data/data/other'):
        TokenData('data/data/other', 8)


# ---- which data set it is --------------------------------------------------------------------------------------------


def test_another_data_set_and_another_tokenizer_are_refused(char_data, tmp_path):
    data = TokenData(char_data, 8)
    check_data(data.meta, data, 'ckpt.pt')
    check_data(None, data, 'ckpt.pt')
    check_data({**data.meta, 'source': 'moved'}, data, 'ckpt.pt')
    assert {'sha256 of train.bin', 'tokens of val', 'vocab_size'} <= set(flat(data.meta))
    with pytest.raises(UserError, match='the run in ckpt.pt began with .tokens of train: 3600, recorded 1'):
        check_data({**data.meta, 'sha256': {}, 'tokens': {'train': 1, 'val': 400}}, data, 'ckpt.pt')
    check_tokenizer(data.meta, data, 'out')
    with pytest.raises(UserError, match='out was trained on char tokens .2 ids., .* has char .*same tokenizer'):
        check_tokenizer(CharTokenizer('ab').meta(), data, 'out')
    with pytest.raises(UserError, match='trained on ids that stand for no text'):
        check_tokenizer({'tokenizer': 'none', 'vocab_size': 3}, data, 'out')
