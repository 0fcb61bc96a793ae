"""data/text/prepare.py: own text with every tokenizer, in documents or not, and bad input."""

import gzip
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.preparing import ROOT, files_of, ids_of, start

from core.cli.errors import UserError
from core.text.dataset import TokenData
from core.text.tokenizer import load_tokenizer

TEXT = 'data/text/prepare.py'


@pytest.fixture
def texts(tmp_path):
    """A folder of texts in several alphabets, and a list of the texts in the order of their paths."""
    parts = {
        'a.txt': 'Stra\u00dfe und Haus\n' * 40,
        'b/c.md': '\u6771\u4eac\u3068\u5927\u962a\u3002' * 30,
        'b/d.txt': '',
        'b/e.txt.gz': "It's   late;\n\n\n  isn't it?\n" * 30,
        'z.txt': 'the end',
    }
    folder = tmp_path / 'texts'
    (folder / 'b').mkdir(parents=True)
    for name, text in parts.items():
        data = text.encode('utf-8')
        (folder / name).write_bytes(gzip.compress(data) if name.endswith('.gz') else data)
    (folder / '.hidden.txt').write_text('secret')
    (folder / 'picture.png').write_bytes(b'\x89PNG')
    return folder, [text for text in parts.values() if text]


def test_own_text_in_characters(prepare, texts, tmp_path):
    folder, parts = texts
    text = ''.join(parts)
    out, _ = prepare(TEXT, input=folder, out_dir=tmp_path / 'out', val_fraction=0.25)
    meta = TokenData(tmp_path / 'out', 8).meta
    assert meta['chars'] == ''.join(sorted(set(text))) and meta['source'] == '5 files of texts'
    cut = int(len(text) * 0.75)
    tokenizer = load_tokenizer(meta)
    assert ids_of(tmp_path / 'out', 'train').tolist() == tokenizer.encode(text[:cut])
    assert ids_of(tmp_path / 'out', 'val').tolist() == tokenizer.encode(text[cut:])
    assert 'tokens/s' in out


def test_own_text_in_bytes_need_not_be_utf8(prepare, tmp_path):
    data = bytes(range(256)) * 10 + b'\r\n\xff'
    (tmp_path / 'in.bin').write_bytes(data)
    prepare(TEXT, input=tmp_path / 'in.bin', out_dir=tmp_path / 'out', tokenizer='byte')
    train, val = (ids_of(tmp_path / 'out', split).astype('u1').tobytes() for split in ('train', 'val'))
    assert train + val == data and len(train) == int(len(data) * 0.9)


def gpt2_documents(documents, cut):
    """Train and val ids of documents, split at a character, with <|endoftext|> after each; without streaming."""
    tokenizer = load_tokenizer({'tokenizer': 'gpt2'})
    splits, position = ([], []), 0
    for text in documents:
        for split, begin, stop in ((splits[0], 0, cut - position), (splits[1], cut - position, len(text))):
            inside = text[max(0, begin) : max(0, stop)]
            if inside:
                split += tokenizer.encode(inside) + [50256] * (stop >= len(text))
        position += len(text)
    return splits


@pytest.mark.parametrize('workers', [1, 3])
@pytest.mark.slow
def test_own_text_in_gpt2_tokens(workers, prepare, texts, tmp_path, gpt2_cache):
    folder, parts = texts
    parts.insert(3, "It's   late;\n\n\n  isn't it? Stra\u00dfe \n" * 40_000)  # several blocks, and many pieces
    (folder / 'c.txt').write_bytes(parts[3].encode())
    prepare(TEXT, input=folder, out_dir=tmp_path / 'out', tokenizer='gpt2', workers=workers)
    assert len(parts[3]) > 1.2e6
    train, val = gpt2_documents(parts, int(len(''.join(parts)) * 0.9))
    assert ids_of(tmp_path / 'out', 'train').tolist() == train
    assert ids_of(tmp_path / 'out', 'val').tolist() == val and val.count(50256) == 2


def test_own_text_with_a_document_per_line(prepare, tmp_path, gpt2_cache):
    documents = [f'Document {i} says <|endoftext|> {"ha " * (i % 7)}' for i in range(200)]
    (tmp_path / 'in.txt').write_text('\n\n'.join(documents), encoding='utf-8')
    prepare(
        TEXT, input=tmp_path / 'in.txt', out_dir=tmp_path / 'out', tokenizer='gpt2', documents='line', val_fraction=0.5
    )
    ids = np.concatenate([ids_of(tmp_path / 'out', split) for split in ('train', 'val')])
    tokenizer = load_tokenizer({'tokenizer': 'gpt2'})
    found = [tokenizer.decode(part[part != 50256]) for part in np.split(ids, np.flatnonzero(ids == 50256) + 1)[:-1]]
    assert ids[-1] == 50256 and found == documents


def test_own_text_in_a_learned_encoding(prepare, tmp_path):
    """With a document per line; the encoding is learned from the training split only."""
    documents = [f'the {"fox" if i % 2 else "dog"} and the {i}' for i in range(300)] + ['zzzzzzzz'] * 100
    (tmp_path / 'in.txt').write_text('\n'.join(documents), encoding='utf-8')
    keys = dict(input=tmp_path / 'in.txt', tokenizer='bpe', documents='line', vocab_size=320, val_fraction=0.3)
    out, _ = prepare(TEXT, out_dir=tmp_path / 'out', **keys)
    meta = TokenData(tmp_path / 'out', 4).meta
    tokenizer, end = load_tokenizer(meta), meta['vocab_size'] - 1
    ids = np.concatenate([ids_of(tmp_path / 'out', split) for split in ('train', 'val')])
    found = [tokenizer.decode(part[part != end]) for part in np.split(ids, np.flatnonzero(ids == end) + 1)[:-1]]
    whole = [document for document in found if document in documents]
    assert ids[-1] == end and ''.join(found) == ''.join(documents) and len(whole) >= len(documents) - 2
    assert ' the' in meta['pieces'] and 'zz' not in meta['pieces'] and f'(bpe, {end + 1} ids)' in out
    first = (tmp_path / 'out' / 'train.bin').read_bytes()
    prepare(TEXT, out_dir=tmp_path / 'again', workers=2, **keys)
    assert (tmp_path / 'again' / 'train.bin').read_bytes() == first


def test_a_line_longer_than_a_block_stays_one_document(prepare, tmp_path, gpt2_cache):
    text = 'one two ' * 300_000 + '\nthe next\n' + 'x y ' * 100_000
    (tmp_path / 'in.txt').write_text(text, encoding='utf-8')
    prepare(TEXT, input=tmp_path / 'in.txt', out_dir=tmp_path / 'out', tokenizer='gpt2', documents='line')
    cut = int(len(text) * 0.9)
    first, second, third = text[:cut].split('\n')
    encode = load_tokenizer({'tokenizer': 'gpt2'}).encode
    assert ids_of(tmp_path / 'out', 'train').tolist() == encode(first) + [50256] + encode(second) + [50256] + encode(
        third
    )
    assert ids_of(tmp_path / 'out', 'val').tolist() == encode(text[cut:]) + [50256]


def test_a_byte_order_mark_and_windows_line_ends_are_dropped(prepare, tmp_path):
    (tmp_path / 'in.txt').write_bytes(b'\xef\xbb\xbf' + b'one\r\ntwo\r\n' * 20)
    prepare(TEXT, input=tmp_path / 'in.txt', out_dir=tmp_path / 'out')
    assert TokenData(tmp_path / 'out', 1).meta['chars'] == '\nenotw'


BAD = {
    'no input': (dict(input=''), 'say what to prepare'),
    'missing': (dict(input='nowhere'), 'there is no file or folder nowhere'),
    'no such files': (dict(suffixes='.tex'), 'there are no .tex files'),
    'not UTF-8': (dict(input='latin.txt'), r'not UTF-8 text \(line 3, byte 0xe9\).*--tokenizer=byte'),
    'broken gz': (dict(input='broken.txt.gz'), "broken.txt.gz can't be read"),
    'empty': (dict(input='empty.txt'), 'there is no text in'),
    'tokenizer': (dict(tokenizer='words'), 'must be char, byte, bpe or gpt2'),
    'documents': (dict(documents='page'), 'must be file or line'),
    'vocab_size': (dict(tokenizer='bpe', vocab_size=256), 'vocab_size=256 must be from 300'),
    'vocab_size of byte': (dict(tokenizer='byte', vocab_size=300), 'requires --tokenizer=bpe'),
    'documents of char': (dict(documents='line'), 'requires --tokenizer=bpe or gpt2'),
    'val_fraction': (dict(val_fraction=1.0), 'above 0 and below 1'),
    'name': (dict(name='../other'), 'plain folder name'),
    'workers': (dict(workers=-1), 'workers is -1; it must be at least 0'),
    'own output': (dict(input='data/tiny/meta.json'), 'would be overwritten'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_arguments_change_nothing(case, prepare, texts, char_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('latin.txt').write_bytes(b'a\nb\ncaf\xe9\n' * 3)
    Path('broken.txt.gz').write_bytes(gzip.compress(b'text' * 1000)[:-20])
    Path('empty.txt').touch()
    keys, message = BAD[case]
    before = files_of(char_data)
    with pytest.raises(UserError, match=message) as error:
        prepare(TEXT, **{'input': texts[0], 'out_dir': char_data, **keys})
    assert '\n' not in str(error.value) and files_of(char_data) == before


@pytest.mark.slow
def test_the_name_decides_the_folder(tmp_path):
    """In a copy of the repository, because the script writes into its own."""
    shutil.copytree(ROOT / 'core', tmp_path / 'core')
    for name in ('configurator.py', TEXT):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / 'in.txt').write_text('some text of mine' * 5)
    done = start(TEXT, '--input=in.txt', '--name=mine', cwd=tmp_path, PYTHONPATH='')
    assert done.returncode == 0, done.stderr
    assert set(files_of(tmp_path / 'data' / 'mine')) == {'train.bin', 'val.bin', 'meta.json'}
    assert done.stdout.startswith(f'data{os.sep}mine: 76 training and 9 validation tokens')
