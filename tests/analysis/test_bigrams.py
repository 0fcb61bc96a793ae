"""analysis/bigrams.py on planted text, where the answer is known, and against the definition in plain loops."""

import numpy as np
import pytest

from analysis import bigrams

V, T = 40, 64
# every pair of tokens equally often: any token follows any other with probability 1/V
ALL_PAIRS = [np.divmod(np.arange(V * V), V)]


def windows(tokens):
    """(x, y) of tokens (N, T + 1)."""
    return tokens[:, :-1], tokens[:, 1:]


def copies(count, rng, later):
    """Windows of a block of T/2 distinct tokens and later(block), and one more token, (count, T + 1)."""
    blocks = np.stack([rng.permutation(V)[: T // 2] for _ in range(count)])
    unseen = np.array([[np.setdiff1d(np.arange(V), block)[0]] for block in blocks])
    second = later(blocks)
    return np.concatenate([blocks, second, blocks[:, :1] if second is blocks else unseen], axis=1)


# ---- planted text ----------------------------------------------------------------------------------------------------


def test_on_random_tokens_induction_is_chance_and_gains_nothing():
    rng = np.random.default_rng(0)
    found, error = bigrams.induction_columns(*windows(rng.integers(0, V, (500, T + 1))), ALL_PAIRS, V)
    assert found.bigram == pytest.approx(1 / V, rel=1e-12)
    assert found.reliable == pytest.approx(1 / V, abs=4 * error.reliable) and error.reliable < 0.002
    assert found.net_gain == pytest.approx(0, abs=4 * error.net_gain) and error.net_gain < 0.001
    # a token was not there in i earlier positions with probability (1 - 1/V)^i
    assert found.seen == pytest.approx(1 - ((1 - 1 / V) ** np.arange(T)).mean(), abs=4 * error.seen)


def test_a_tiled_block_is_predicted_wherever_it_was_seen():
    tokens = copies(100, np.random.default_rng(1), lambda blocks: blocks)
    found, error = bigrams.induction_columns(*windows(tokens), ALL_PAIRS, V)
    np.testing.assert_allclose(found, (0.5, 1.0, 1 / V, 0.5 * (1 - 1 / V)), rtol=1e-12)
    np.testing.assert_allclose(error, 0, atol=1e-12)


def test_a_mixture_of_copies_and_reversed_copies():
    """After a token of a reversed block never comes what followed it before: a quarter of the windows is reliable."""
    rng = np.random.default_rng(2)
    tokens = np.concatenate([copies(50, rng, lambda blocks: blocks), copies(150, rng, lambda blocks: blocks[:, ::-1])])
    found, error = bigrams.induction_columns(*windows(tokens), ALL_PAIRS, V)
    np.testing.assert_allclose(found, (0.5, 0.25, 1 / V, 0.5 * (0.25 - 1 / V)), rtol=1e-12)
    assert error.reliable == pytest.approx(np.sqrt(0.25 * 0.75 / 199))  # of 200 windows that are all or nothing
    assert error.net_gain == pytest.approx(0.5 * error.reliable)


def test_text_of_bigrams_alone_gains_nothing_however_reliable_it_is():
    rng = np.random.default_rng(3)
    chances = rng.dirichlet(np.full(V, 0.05), V).cumsum(axis=1)  # a few likely successors of each token

    def text(rows):
        out = rng.integers(0, V, (rows, 1))
        for _ in range(T):
            drawn = (chances[out[:, -1]] < rng.random((rows, 1))).sum(axis=1, keepdims=True)
            out = np.concatenate([out, np.minimum(drawn, V - 1)], axis=1)
        return windows(out)

    found, error = bigrams.induction_columns(*text(1000), [text(4000)], V)
    assert found.reliable > 0.3 and found.bigram > 0.3
    assert found.net_gain == pytest.approx(0, abs=4 * error.net_gain) and error.net_gain < 0.005
    without = bigrams.induction_columns(*text(1000), ALL_PAIRS, V)[0]
    assert without.net_gain > 0.15  # it is the corpus's bigrams that explain it


# ---- against the definition ------------------------------------------------------------------------------------------


def by_definition(x, y, pairs):
    """The four columns, token by token."""
    seen, right, expected, positions = 0, 0, 0.0, 0
    for row, targets in zip(x.tolist(), y.tolist(), strict=True):
        for i, target in enumerate(targets):
            if target < 0:
                continue
            positions += 1
            earlier = [j for j in range(i) if row[j] == row[i]]
            if earlier:
                guess = row[earlier[-1] + 1]
                after = [second for first, second in pairs if first == row[i]]
                seen, right = seen + 1, right + (guess == target)
                expected += after.count(guess) / len(after) if after else 0
    return seen / positions, right / seen, expected / seen, (right - expected) / positions


def test_the_columns_are_those_of_the_definition():
    rng = np.random.default_rng(4)
    x, y = windows(rng.zipf(1.5, (20, 31)) % 12)
    y = np.where(rng.random(y.shape) < 0.2, -1, y)  # targets that are masked
    first, second = rng.zipf(1.5, 300) % 11, rng.zipf(1.5, 300) % 12  # token 11 is never first
    second = np.where(rng.random(300) < 0.1, -1, second)
    pairs = [(a, b) for a, b in zip(first.tolist(), second.tolist(), strict=True) if b >= 0]
    parts = [(first[:7], second[:7]), (first[7:107].reshape(10, 10), second[7:107].reshape(10, 10)),
             (first[107:], second[107:])]  # fmt: skip
    found, _ = bigrams.induction_columns(x, y, parts, 12)
    np.testing.assert_allclose(found, by_definition(x, y, pairs), rtol=1e-12)
    assert found.net_gain == pytest.approx(found.seen * (found.reliable - found.bigram))


def test_the_latest_occurrence_counts():
    x = np.array([[5, 7, 5, 9, 5, 5, 7]])
    assert bigrams.latest_earlier(x).tolist() == [[-1, -1, 0, -1, 2, 4, 1]]
    assert bigrams.copied(x).tolist() == [[-1, -1, 7, -1, 9, 5, 5]]


def test_large_vocabularies_need_no_table():
    """50,257 x 50,257 counts would take 20 GB."""
    x = np.array([[50256, 3, 50256, 3, 50256]])
    found, _ = bigrams.induction_columns(np.repeat(x[:, :-1], 2, 0), np.repeat(x[:, 1:], 2, 0), [(x[:, :-1], x[:, 1:])],
                                        50257)  # fmt: skip
    assert found == (0.5, 1.0, 1.0, 0.0)


def test_nothing_seen_is_not_a_number():
    x, y = windows(np.array([[1, 2, 3, 4], [5, 6, 7, 8]]))
    found, _ = bigrams.induction_columns(x, y, [(x, y)], 9)
    assert found.seen == 0 and found.net_gain == 0 and np.isnan(found.reliable) and np.isnan(found.bigram)


# ---- windows inside documents ----------------------------------------------------------------------------------------


def test_pairs_that_occurred_before_in_the_window():
    rng = np.random.default_rng(3)
    x, y = rng.integers(0, 5, (2, 6, 30))
    y[:, 20:24] = -1
    found = bigrams.repeated_pairs(x, y)
    for row in range(6):
        pairs = list(zip(x[row], y[row], strict=True))
        assert found[row].tolist() == [pair[1] >= 0 and pair in pairs[:i] for i, pair in enumerate(pairs)]
    assert found.any() and not found.all()
