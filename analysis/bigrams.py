"""
What induction could gain on a text, from its tokens alone: a prediction before any model is trained.

An induction head finds the latest earlier occurrence of the present token in its window and predicts the token that
followed there. How much that helps is a property of the text: how often there is an earlier occurrence, how often it
is right, and how often it would be right anyway, because the same pair of tokens is common in the whole corpus. A model
that knows the corpus's bigrams, as every model soon does, gains only the difference.

Notable features:
- arrays in, arrays out: windows are tokens x and targets y (N, T) as TokenData.windows returns them, y[:, i] the token
  after x[:, i], -1 where there is none to predict
- a window's time grows as T log T, the corpus is counted in one pass of bounded memory, for vocabularies of any size
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from analysis.stats import ratio

Pairs = Iterable[tuple[np.ndarray, np.ndarray]]  # tokens and the next ones


class Columns(NamedTuple):
    """The predictor of a text: numbers for the whole text, or their standard errors."""

    seen: float  # share of positions whose token was there earlier in the window
    reliable: float  # share of the seen positions where the token after its latest occurrence is the next one
    bigram: float  # mean over the seen positions of the corpus's p(that token | present token)
    net_gain: float  # mean over all positions of seen * (reliable - bigram)


def latest_earlier(x: np.ndarray) -> np.ndarray:
    """The index of the latest earlier position with the same token, int (N, T) in 0..T-1; -1 where there is none."""
    order = np.argsort(x, axis=1, kind='stable')  # equal tokens stay in the order of their positions
    ordered = np.take_along_axis(x, order, axis=1)
    before = np.full(x.shape, -1, dtype=np.int64)
    before[:, 1:] = np.where(ordered[:, 1:] == ordered[:, :-1], order[:, :-1], -1)
    found = np.empty_like(before)
    np.put_along_axis(found, order, before, axis=1)
    return found


def copied(x: np.ndarray) -> np.ndarray:
    """What induction predicts at each position: the token after the latest earlier occurrence, int (N, T), or -1."""
    found = latest_earlier(x)
    # an earlier position is followed by another one of the window, so its successor is there
    return np.where(found < 0, -1, np.take_along_axis(x, np.minimum(found + 1, x.shape[1] - 1), axis=1))


def repeated_pairs(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where the pair of a token and the next one, x and y (N, T), occurred earlier in the window; not where y is -1."""
    pairs = x.astype(np.int64) << 32 | (y.astype(np.int64) & 0xFFFFFFFF)
    return (latest_earlier(pairs) >= 0) & (y >= 0)


def pair_probabilities(first: np.ndarray, second: np.ndarray, corpus: Pairs, vocab_size: int) -> np.ndarray:
    """
    The probability of `second` after `first` in a corpus, for arrays of ids of one shape: float64 of this shape.

    corpus: arrays x, y of any shape, each pair of tokens once; pairs with y = -1 don't count. It is
    count(first, second) / count(first), without smoothing, and 0 where `first` is never followed by anything.
    """
    queries, place = np.unique(first.astype(np.int64) * vocab_size + second, return_inverse=True)
    pairs, firsts = np.zeros(len(queries), dtype=np.int64), np.zeros(vocab_size, dtype=np.int64)
    for x, y in corpus:
        x, y = x[y >= 0], y[y >= 0]
        firsts += np.bincount(x, minlength=vocab_size)
        keys = np.sort(x.astype(np.int64) * vocab_size + y)
        pairs += np.searchsorted(keys, queries, side='right') - np.searchsorted(keys, queries, side='left')
    return (pairs / np.maximum(1, firsts[queries // vocab_size]))[place].reshape(first.shape)


def induction_columns(x: np.ndarray, y: np.ndarray, corpus: Pairs, vocab_size: int) -> tuple[Columns, Columns]:
    """The predictor of windows x, y (N, T), N >= 2, and its standard error. corpus: see pair_probabilities."""
    valid = y >= 0
    guess = copied(x)
    seen = valid & (guess >= 0)
    expected = np.zeros(x.shape)
    expected[seen] = pair_probabilities(x[seen], guess[seen], corpus, vocab_size)
    right = seen & (guess == y)
    n_valid, n_seen, n_right, n_expected = (part.sum(axis=1) for part in (valid, seen, right, expected))
    of_columns = (n_seen, n_valid), (n_right, n_seen), (n_expected, n_seen), (n_right - n_expected, n_valid)
    means, errors = zip(*(ratio(*parts) for parts in of_columns), strict=True)
    return Columns(*means), Columns(*errors)
