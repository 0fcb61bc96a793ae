"""core/text/text_files.py: the text of files as a stream, cut anywhere, is their text; the rule for reading text."""

import gzip
import hashlib
from collections import Counter

import numpy as np
import pytest

from core.cli.errors import UserError
from core.text import text_files
from core.text.tokenizer import TOKENIZERS
from core.text.write_dataset import CHUNK, chunks, encode_stream


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 8 characters, so that short texts have several."""
    monkeypatch.setattr(text_files, 'BLOCK', 8)


@pytest.fixture
def files(tmp_path):
    """Files in the order of their paths, one of them compressed and one empty, and their texts."""
    texts = {'a.txt': 'one two three\nfour\n', 'b.txt': '', 'c.txt.gz': 'Stra\u00dfe, \u6771\u4eac\u3002\n' * 4,
             'd/e.txt': '\n\nlast'}  # fmt: skip
    (tmp_path / 'd').mkdir()
    for name, text in texts.items():
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith('.gz') else text.encode())
    return [tmp_path / name for name in texts], list(texts.values())


@pytest.mark.parametrize('kind', ['char', 'byte', 'bpe'])
def test_text_cut_anywhere_is_the_whole_text(kind, files, small_blocks):
    paths, parts = files
    kind = TOKENIZERS[kind]
    texts = text_files.TextFiles(paths, kind)
    whole = ''.join(parts).encode() if kind.reads_bytes else ''.join(parts)
    assert texts.lengths == [len(part.encode()) if kind.reads_bytes else len(part) for part in parts]
    assert texts.total == len(whole)
    assert texts.characters == (''.join(sorted(set(whole))) if kind.learned_from == 'characters' else '')
    empty = whole[:0]
    for cut in range(texts.total + 1):
        pieces = [text or empty for ends in ((0, cut), (cut, None)) for text, _ in texts.pieces(*ends)]
        assert empty.join(pieces) == whole
    assert sum(ended for _, ended in texts.pieces()) == (3 if kind.byte_pair else 0)  # an empty file is no document


def test_lines_are_documents(files, small_blocks):
    texts = text_files.TextFiles(files[0][:1], TOKENIZERS['bpe'], documents='line')
    documents = ['']
    for text, ended in texts.pieces():
        documents[-1] += text
        documents += [''] * ended
    assert documents == ['one two three', 'four', '']


def test_a_learned_encoding_is_that_of_the_training_text(files):
    kind = TOKENIZERS['bpe']
    training, rest = (text_files.TextFiles(part, kind) for part in (files[0][:1], files[0][1:]))
    encoder = text_files.learn(kind, '', training.pieces(), training.total, vocab_size=300)
    assert encoder.pieces == kind.learn([files[1][0]], 300).pieces
    ids = np.concatenate(list(encode_stream(encoder, rest.pieces(), 1)))
    assert encoder.decode(ids[ids != encoder.end_of_text]) == ''.join(files[1][1:])


def test_files_below_a_folder(tmp_path):
    for name in ('b.c', 'a.h', 'a/z.c', 'a/.hidden.c', '.git/x.c', 'Makefile', 'c.o', 'd.o'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found, ignored = text_files.files_below(tmp_path, '.c, .h')
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ['a.h', 'a/z.c', 'b.c']
    assert ignored == {'.o': 2, 'without suffix': 1}
    assert text_files.in_words(ignored) == '2 .o, 1 without suffix'
    assert text_files.in_words(Counter('aaabbcdefgg')) == '3 a, 2 b, 2 g, 1 c, 1 d and 2 others'


def test_one_file_is_known_by_its_own_checksum():
    sums = [hashlib.sha256(text).hexdigest() for text in (b'a', b'b')]
    assert text_files.joint_checksum(sums[:1]) == sums[0]
    assert len({text_files.joint_checksum(list(given)) for given in (sums, reversed(sums))}) == 2


@pytest.mark.parametrize('name', ['train.bin', 'val.bin', 'meta.json'])
def test_a_data_set_does_not_replace_its_input(name, tmp_path):
    text_files.check_not_overwritten([tmp_path / name], tmp_path)
    (tmp_path / name).touch()
    (tmp_path / 'link.txt').symlink_to(tmp_path / name)
    with pytest.raises(UserError, match='link.txt would be overwritten'):
        text_files.check_not_overwritten([tmp_path / 'link.txt'], tmp_path)


@pytest.mark.parametrize(('content', 'text', 'unchanged'), [
    (b'\xef\xbb\xbfone\r\ntwo\n', 'one\ntwo\n', '\ufeffone\r\ntwo\n'),
    ('Stra\u00dfe'.encode(), 'Stra\u00dfe', 'Stra\u00dfe'),
])  # fmt: skip
def test_a_prompt_file_is_read_as_the_data_was(content, text, unchanged, tmp_path):
    path = tmp_path / 'prompt.txt'
    path.write_bytes(content)
    blocks = ''.join(text_files.blocks(path, as_bytes=False))
    assert text_files.read_text(str(path), 100) == text_files.plain_text(content) == blocks == text
    assert text_files.read_text(str(path), 100, TOKENIZERS['bpe']) == text
    assert text_files.read_text(str(path), 100, TOKENIZERS['byte']) == unchanged


def test_a_prompt_file_for_bytes_need_not_be_utf8(tmp_path):
    (tmp_path / 'prompt').write_bytes(b'caf\xe9\r\n')
    byte = TOKENIZERS['byte']
    assert byte().encode(text_files.read_text(str(tmp_path / 'prompt'), 100, byte)) == list(b'caf\xe9\r\n')
    for path, most, message in (
        (tmp_path / 'prompt', 100, 'not UTF-8 text .line 1, byte 0xe9.'),
        (tmp_path / 'prompt', 3, 'more than 3 bytes'),
        (tmp_path / 'nowhere', 9, 'No such file'),
        ('a\0b', 9, "can't be read"),
        (tmp_path, 9, "can't be read"),
    ):
        with pytest.raises(UserError, match=message) as error:
            text_files.read_text(str(path), most)
        assert '\n' not in str(error.value)


def test_a_long_text_is_sampled_evenly():
    texts = [f'{i:05}' for i in range(1000)]
    assert (
        list(text_files.sample_evenly(texts, 5000, 5000)) == list(text_files.sample_evenly(texts, 5000, 10**6)) == texts
    )
    assert list(text_files.sample_evenly(texts, 5000, 500)) == texts[::10]


def test_what_is_named_twice_is_read_once(files, tmp_path, capsys):
    paths, _ = files
    found, _ = text_files.input_files(f'{tmp_path / "d"},{paths[0]},{tmp_path / "d" / "e.txt"}', '.txt')
    assert found == [paths[3], paths[0]]  # in the order of their first names
    assert capsys.readouterr().err == 'note: --input names some files again (1); each is read once\n'


def test_a_long_run_of_blanks_is_cut(tmp_path):
    (tmp_path / 'a.txt').write_text('x' + ' ' * 3_000_000 + 'y')
    pieces = list(chunks(text_files.blocks(tmp_path / 'a.txt', as_bytes=False)))
    assert ''.join(pieces) == 'x' + ' ' * 3_000_000 + 'y' and max(map(len, pieces)) <= 3 * CHUNK
