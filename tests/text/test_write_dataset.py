"""core/text/write_dataset.py: encoding in pieces on several cores, and the files of a data set."""

import json
import os
import signal
import subprocess
import time

import numpy as np
import pytest
from support import ROOT, forking
from support.preparing import files_of

from core.cli.errors import UserError
from core.cli.files import sha256
from core.text.dataset import TokenData
from core.text.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, GPT2Tokenizer, load_tokenizer
from core.text.write_dataset import chunks, encode_stream, write_dataset

# ---- encoding in pieces ----------------------------------------------------------------------------------------------

AWKWARD = (
    "It's 3 o'clock\n\n\n  we'll  \t go \r\n\r\nx  \n y\u00a0\u00a0z  'tis' \u3000 a\x1c\x1c b \u2028c"
    " \U0001f600\U0001f600  d\u0301e 12 345 \n'll 've  're -- ?? ... end   \n"
)


@pytest.mark.parametrize('size', [1, 2, 3, 7, 50])
def test_pieces_encode_to_the_same_tokens(size, gpt2_cache):
    tokenizer = GPT2Tokenizer()
    text = AWKWARD * 3
    blocks = [text[i : i + 5] for i in range(0, len(text), 5)]
    pieces = list(chunks(blocks, size))
    assert ''.join(pieces) == text and (len(pieces) > 20 or size == 50)
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


@pytest.mark.parametrize('size', [1, 2, 3, 7])
def test_pieces_encode_to_the_same_tokens_with_a_learned_encoding(size):
    tokenizer = BPETokenizer.learn([AWKWARD], 400)
    pieces = list(chunks([AWKWARD[i : i + 5] for i in range(0, len(AWKWARD), 5)], size))
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(AWKWARD)


def test_pieces_of_shakespeare(shared_data, gpt2_cache):
    text = (shared_data / 'tinyshakespeare' / 'input.txt').read_text(encoding='utf-8')
    tokenizer = GPT2Tokenizer()
    pieces = list(chunks([text], 1)) + list(chunks((text[i : i + 100] for i in range(0, len(text), 100)), 1))
    assert ''.join(pieces) == text * 2 and len(pieces) > 5000
    arrays = encode_stream(tokenizer, ((piece, False) for piece in pieces), workers=2)
    assert np.array_equal(np.concatenate(list(arrays)), tokenizer.encode(text) * 2)


def test_a_text_without_white_space_is_cut_eventually():
    pieces = list(chunks(['x' * 30] * 10, 20, longest=100))
    assert ''.join(pieces) == 'x' * 300 and max(map(len, pieces)) == 120


def test_streams_keep_their_order_and_read_little_ahead():
    read = []

    def pieces():
        for i in range(1000):
            read.append(i)
            yield f'{i:05d}', False

    class Slow(ByteTokenizer):
        def encode_array(self, text):
            time.sleep(0.002 if text.endswith('4') else 0)
            return super().encode_array(text)

    text = b''
    for array in encode_stream(Slow(), pieces(), workers=4, chunk=10):
        text += array.astype('u1').tobytes()
        assert len(read) - len(text) // 5 <= 2 * 2 * 4
    assert text.decode() == ''.join(f'{i:05d}' for i in range(1000))


def test_an_error_in_a_worker_reaches_the_caller():
    with pytest.raises(UserError, match="'c'"):
        list(encode_stream(CharTokenizer('ab'), [('ab', False), ('c', False)], workers=2))


# ---- files -----------------------------------------------------------------------------------------------------------


def test_files_on_disk(char_data):
    meta = json.loads((char_data / 'meta.json').read_text())
    assert set(files_of(char_data)) == {'train.bin', 'val.bin', 'meta.json'}
    assert meta['format'] == 1 and meta['tokens'] == {'train': 3600, 'val': 400} and meta['source'] == 'a test text'
    assert meta['sha256'] == {name: sha256(char_data / name) for name in ('train.bin', 'val.bin')}
    raw = np.frombuffer((char_data / 'train.bin').read_bytes(), dtype='<u2')
    assert ''.join(meta['chars'][i] for i in raw[:11]) == 'the cat sat'


def test_a_learned_encoding_on_disk(tmp_path):
    text = 'low lower lowest newest' * 9
    tokenizer = BPETokenizer.learn([text] * 50, 300)
    ids = np.array(tokenizer.encode(text))
    write_dataset(tmp_path, tokenizer, {'train': ids, 'val': ids}, source='words')
    data = TokenData(tmp_path, 4)
    assert data.n_vocab == data.padded_vocab_size == tokenizer.n_vocab
    assert load_tokenizer(data.meta).decode(ids) == text


def test_large_ids_require_uint32(tmp_path):
    splits = {'train': np.arange(70000), 'val': np.arange(100)}
    meta = write_dataset(tmp_path, None, splits, vocab_size=70000, source='numbers')
    assert meta['dtype'] == 'uint32' and (tmp_path / 'train.bin').stat().st_size == 280000
    x, _ = TokenData(tmp_path, 8).windows('train', [69990])
    assert x[0].tolist() == list(range(69990, 69998))


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
            write_dataset(char_data, ByteTokenizer(), splits, source='bad')
        assert files_of(char_data) == before


def test_a_finished_file_is_moved_and_survives_a_failure(tmp_path):
    part = tmp_path / 'train.bin.part'
    np.arange(100, dtype='<u2').tofile(part)
    with pytest.raises(UserError):
        write_dataset(tmp_path, ByteTokenizer(), {'train': part, 'val': np.array([], dtype=int)}, source='a test')
    assert part.exists()
    meta = write_dataset(tmp_path, ByteTokenizer(), {'train': part, 'val': np.arange(5)}, source='a test')
    assert not part.exists() and meta['tokens']['train'] == 100
    assert meta['sha256']['train.bin'] == sha256(tmp_path / 'train.bin')


def test_a_run_killed_between_two_renames_leaves_a_data_set_that_says_so(char_data, monkeypatch):
    replace, splits = os.replace, {'train': np.arange(100), 'val': np.arange(100)}

    def killed(source, target):
        if os.path.basename(target) == 'val.bin':
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', killed)
        with pytest.raises(KeyboardInterrupt):
            write_dataset(char_data, ByteTokenizer(), splits, source='new')
    with pytest.raises(UserError, match='was being replaced'):
        TokenData(char_data, 16)
    write_dataset(char_data, ByteTokenizer(), splits, source='new')
    assert TokenData(char_data, 16).corpus == 'new'


def test_a_notice_says_which_corpus_is_replaced(char_data, capsys):
    splits = {'train': np.arange(100), 'val': np.arange(100)}
    write_dataset(char_data, ByteTokenizer(), splits, source='file a.txt')
    assert 'replacing a test text (char) with file a.txt (byte)' in capsys.readouterr().err
    write_dataset(char_data, ByteTokenizer(), splits, source='file a.txt')
    assert capsys.readouterr().err == ''


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    (tmp_path / 'unfinished-tokens-abc').mkdir()
    (tmp_path / 'unfinished-tokens-abc' / 'train.bin').write_bytes(b'half')
    (tmp_path / 'notes').write_text('mine')
    write_dataset(tmp_path, CharTokenizer('abc'), {'train': np.array([0, 1, 2]), 'val': np.array([0])}, source='a test')
    assert {path.name for path in tmp_path.iterdir()} == {'train.bin', 'val.bin', 'meta.json', 'notes'}


def test_a_signal_right_after_the_folder_was_made_leaves_none(monkeypatch, tmp_path):
    def mkdir(path, *mode):
        made(path, *mode)
        if 'unfinished' in str(path):
            raise SystemExit(130)

    made = os.mkdir
    monkeypatch.setattr(os, 'mkdir', mkdir)
    (tmp_path / 'train.bin').write_bytes(b'old')
    with pytest.raises(SystemExit):
        write_dataset(tmp_path, ByteTokenizer(), {'train': np.zeros(9), 'val': np.zeros(9)}, source='a test')
    assert files_of(tmp_path) == {'train.bin': b'old'}


HOLDER = """
import os, sys, time
from core.cli.locks import FolderLock
with FolderLock(sys.argv[1]):
    print(os.getpid(), flush=True)
    time.sleep(60)
"""


def test_what_another_process_is_writing_stays(tmp_path):
    process = subprocess.Popen(
        [forking.interpreter(), '-c', HOLDER, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    number = int(process.stdout.readline())
    try:
        (tmp_path / 'unfinished-tokens-1').mkdir()
        (tmp_path / 'unfinished-tokens-1' / 'train.bin').write_bytes(b'half')
        splits = {'train': np.zeros(9, int), 'val': np.zeros(9, int)}
        with pytest.raises(UserError, match='is in use by process .*; wait for it'):
            write_dataset(tmp_path, ByteTokenizer(), splits, source='a test')
        assert (tmp_path / 'unfinished-tokens-1' / 'train.bin').read_bytes() == b'half'
    finally:
        os.kill(number, signal.SIGKILL)
        process.wait()
    write_dataset(tmp_path, ByteTokenizer(), splits, source='a test')
    assert sorted(files_of(tmp_path)) == ['meta.json', 'train.bin', 'val.bin']


def test_a_meta_json_of_the_users_is_not_overwritten(tmp_path):
    (tmp_path / 'meta.json').write_text('{"title": "my notes"}')
    splits = {'train': np.zeros(9, int), 'val': np.zeros(9, int)}
    with pytest.raises(UserError, match="meta.json is no data set's and would be overwritten; choose another folder"):
        write_dataset(tmp_path, ByteTokenizer(), splits, source='a test')
    assert files_of(tmp_path) == {'meta.json': b'{"title": "my notes"}'}
    (tmp_path / 'meta.json').write_text('{"format": 1, "replacing": true}')  # of a run that was killed
    write_dataset(tmp_path, ByteTokenizer(), splits, source='a test')
