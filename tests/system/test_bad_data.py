"""Data sets that are missing, damaged or of another kind: see bad_input.py."""

import os

import pytest
from support.bad_input import (
    PREPARE,
    RESUME,
    C,
    Case,
    Payload,
    Q,
    T,
    assert_refused,
    cases,
    cut,
    folder,
    meta,
    nanogpt_meta,
    remove,
    write,
)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, 'fork'), reason='this system has no fork')]

TRAIN_BIN, META_JSON = 'data/tiny/train.bin', 'data/tiny/meta.json'
DATA = [
    Case(T, '--dataset=tinny', r'no data set .*tinny \(there are rows, tiny, wide\)', PREPARE),
    Case(T, '--data_dir={place}/nowhere', 'no data set', PREPARE),
    Case(T, '--dataset=', r'no .*train\.bin', PREPARE),
    Case(T, '', r'no .*train\.bin', PREPARE, remove(TRAIN_BIN)),
    Case(T, '', r"val\.bin can't be read \(No such file", PREPARE, remove('data/tiny/val.bin')),
    Case(T, '', r"train\.bin can't be read|train\.bin has", PREPARE, folder(TRAIN_BIN)),
    Case(T, '', r'train\.bin is empty', PREPARE, write(TRAIN_BIN, b'')),
    Case(T, '', r'val\.bin is empty', PREPARE, write('data/tiny/val.bin', b'')),
    Case(T, '', r'train\.bin has 1,799 bytes, not a whole number of uint16', PREPARE, cut(TRAIN_BIN, -1)),
    Case(T, '', r'train\.bin has 450 uint16 tokens, and meta\.json says 900', PREPARE, cut(TRAIN_BIN, 0.5)),
    Case(T, '--block_size=200', r'val\.bin has 100 tokens', 'smaller --block_size'),
    Case(T, '--block_size=5000', r'train\.bin has 900 tokens', 'smaller --block_size'),
    Case(T, '', 'has the id 12, beyond the vocabulary of 12', PREPARE,
         write(TRAIN_BIN, 899 * b'\1\0' + b'\x0c\0')),
    Case(T, '', 'has the id 65535', PREPARE, write('data/tiny/val.bin', b'\xff\xff' + 99 * b'\1\0')),
    Case(T, '', '1,800 uint16 tokens', PREPARE, write(TRAIN_BIN, 900 * b'\1\0\0\0')),
    Case(T, '', '450 uint32 tokens', PREPARE, meta(dtype='uint32')),
    Case(T, '', "dtype 'float32'", 'must be uint16 or uint32.*' + PREPARE, meta(dtype='float32')),
    Case(T, '', 'has the id', PREPARE, meta(vocab_size=3, chars='abc')),
    Case(T, '', r"meta\.json can't be read", PREPARE, cut(META_JSON, 0.5)),
    Case(T, '', r"meta\.json can't be read", PREPARE, write(META_JSON, b'\xff\xfe\0')),
    Case(T, '', r"meta\.json can't be read", PREPARE, folder(META_JSON)),
    Case(T, '', 'is not a JSON object', PREPARE, write(META_JSON, '[1, 2]')),
    Case(T, '', 'format 99', 'reads 1', meta(format=99)),
    Case(T, '', 'vocab_size None', PREPARE, meta(vocab_size=None)),
    Case(T, '', "vocab_size '12'", PREPARE, meta(vocab_size='12')),
    Case(T, '', "unknown tokenizer 'words'", PREPARE, meta(tokenizer='words')),
    Case(T, '', '"chars" that are not 12', PREPARE, meta(chars='abc')),
    Case(T, '', '"chars" that are not 12', PREPARE, meta(chars=None)),
    Case(T, '', '"tokens" 5', PREPARE, meta(tokens=5)),
    Case(T, '', 'was being replaced', PREPARE, meta(replacing=True)),
    Case(T, '', 'no "source"', PREPARE, meta(source=None)),
    Case(T, '', r"meta\.pkl can't be read .*mkdir", PREPARE, nanogpt_meta({'vocab_size': 12, 'itos': Payload()})),
    Case(T, '', r"meta\.pkl can't be read", PREPARE, nanogpt_meta({'stoi': {}})),
    Case(T, '', r"meta\.pkl can't be read", PREPARE, nanogpt_meta([1, 2])),
    Case(T, '--dataset=rows', 'rows of 11 tokens', '--block_size=10'),
    Case(T, '--dataset=rows --block_size=10', r"train\.mask\.bin can't be read", PREPARE,
         remove('data/rows/train.mask.bin')),
    Case(T, '--dataset=rows --block_size=10', r'val\.mask\.bin has 50', PREPARE, cut('data/rows/val.mask.bin', 50)),
    Case(T, RESUME + ' --dataset=wide', 'wide is not the data set that the run .* began with', 'restore it'),
    Case(C, '', 'beyond the vocabulary', PREPARE, write(TRAIN_BIN, 900 * b'\x0c\0')),
    Case(Q, '', r'train\.bin is empty', PREPARE, write(TRAIN_BIN, b'')),
]  # fmt: skip


@pytest.mark.parametrize('case', cases(data=DATA))
def test_bad_data_sets_get_one_line_and_change_nothing(case, place):
    assert_refused(case, place)
