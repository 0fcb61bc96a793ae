"""core/text/byte_pairs.py: what encodings are learned from, and GPT-2's without a network."""

import time

import pytest
from support.preparing import unspaced

from core.cli.errors import UserError
from core.text.byte_pairs import LONGEST_WORD, gpt2_encoding, learn_bpe, with_distinct_words, within
from core.text.tokenizer import load_tokenizer


def test_a_text_without_more_pairs_gives_fewer_ids():
    assert len(learn_bpe(['ab'], 300)) == 257


def test_words_to_learn_from_are_bounded():
    texts = [unspaced(100_000, seed) for seed in range(6)]
    some = with_distinct_words(texts, most=300_000)
    size = sum(len(text.encode()) for text in some)
    assert 100_000 < size <= 300_000
    assert all(any(text in whole for whole in texts) for text in some)
    assert {i for i, whole in enumerate(texts) for text in some if text in whole} >= {0, 4}  # from everywhere
    english = ['the cat sat on the mat ' * 50_000] * 3
    assert with_distinct_words(english, most=100) is english  # few different words: everything is used


def test_words_are_learned_from_in_pieces():
    """Merges never cross the places at which a long word is cut, and words that aren't long are whole."""
    pieces = learn_bpe(['x' * 1000 + ' ' + 'y' * 200] * 50, 2000)
    assert max(len(piece) for piece in pieces if 'x' in piece) == LONGEST_WORD
    assert 'y' * 200 in {piece.strip('\u0120 ') for piece in pieces}


def test_without_a_network_tiktoken_is_explained(monkeypatch):
    tiktoken = pytest.importorskip('tiktoken')

    def hang(name):
        time.sleep(5)

    def fail(name):
        raise ConnectionError('no route')

    for replacement, seconds in ((hang, 0.05), (fail, 5)):
        monkeypatch.setattr(tiktoken, 'get_encoding', replacement)
        with pytest.raises(UserError, match='TIKTOKEN_CACHE_DIR') as error:
            gpt2_encoding(seconds)
        assert '\n' not in str(error.value)
    with pytest.raises(UserError, match='TIKTOKEN_CACHE_DIR'):
        load_tokenizer({'tokenizer': 'gpt2'})


def test_work_that_fails_raises_its_own_error():
    assert within(5, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 / 0)


def test_blanks_are_learned_from_in_pieces():
    """One run of white space is a word too, and the trainer's time would grow with its square."""
    pieces = learn_bpe(['some words' + ' ' * 200_000 + 'more'] * 2, 400)
    assert ' ' * 64 in pieces and max(map(len, pieces)) <= LONGEST_WORD
