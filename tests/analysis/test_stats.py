"""Intervals contain the true mean as often as they claim, and errors are those of repeated experiments."""

import numpy as np
import pytest

from analysis import stats


def test_bootstrap_gives_the_interval_of_a_mean():
    values = np.random.default_rng(0).normal(3.0, 2.0, (400, 2, 3))
    low, high = stats.bootstrap(values)
    assert low.shape == (2, 3)
    standard = values.std(0) / 20
    np.testing.assert_allclose(high - low, 2 * 1.96 * standard, rtol=0.1)
    assert (low < values.mean(0)).all() and (values.mean(0) < high).all()
    again = stats.bootstrap(values)
    assert (again[0] == low).all() and (again[1] == high).all()


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    values = np.random.default_rng(1).exponential(1.0, (60, 500))  # 500 experiments with 60 sequences each
    low, high = stats.bootstrap(values, resamples=500, level=0.9)
    assert ((low < 1) & (high > 1)).mean() == pytest.approx(0.9, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize('n', [4, 5, 10])
def test_t_interval_covers_the_mean_in_95_of_100_experiments(n):
    draws = np.random.default_rng(n).normal(5.0, 3.0, (4000, n))
    intervals = [stats.t_interval(values.tolist()) for values in draws]
    covered = np.mean([abs(center - 5.0) < half for center, half in intervals])
    assert covered == pytest.approx(0.95, abs=0.012)


def test_too_few_values_have_no_interval():
    assert stats.t_interval([1.0, 2.0, 6.0]) == (3.0, None)
    assert stats.t_interval([1.0]) == (1.0, None)


def test_the_error_of_a_ratio_is_that_of_repeated_experiments():
    rng = np.random.default_rng(2)
    wholes = rng.integers(50, 400, (2000, 100))
    parts = rng.binomial(wholes, rng.beta(2, 5, wholes.shape))
    found = np.array([stats.ratio(*pair) for pair in zip(parts, wholes, strict=True)])
    assert found[:, 0].mean() == pytest.approx(2 / 7, abs=0.002)
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(), rel=0.05)


def test_a_ratio_to_equal_wholes_is_a_mean():
    parts = np.array([1.0, 2.0, 6.0])
    assert stats.ratio(parts, np.full(3, 4)) == pytest.approx((0.75, parts.std(ddof=1) / 4 / 3**0.5))
    assert np.isnan(stats.ratio(np.zeros(3), np.zeros(3))).all()


def test_the_error_of_a_difference_of_ratios_is_that_of_repeated_experiments():
    rng = np.random.default_rng(4)
    level = rng.normal(0, 1, (2000, 80))  # what both parts of an item have in common cancels in the difference
    wholes, others = rng.integers(5, 40, (2, 2000, 80))
    parts, other_parts = ((n * (base + level) + rng.normal(0, n**0.5)) for n, base in ((wholes, 3), (others, 1)))
    every = zip(parts, wholes, other_parts, others, strict=True)
    found = np.array([stats.ratio_difference(*one) for one in every])
    assert found[:, 0].mean() == pytest.approx(2, abs=0.02)
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(), rel=0.07)


@pytest.mark.slow
def test_two_equal_models_are_called_different_in_5_and_equal_ones_shown_so_where_seeds_suffice():
    rng = np.random.default_rng(3)
    found = [stats.welch(rng.normal(0, 1, 8).tolist(), rng.normal(0, 2, 12).tolist(), 2.5) for _ in range(2000)]
    assert np.mean([test['p'] < 0.05 for test in found]) == pytest.approx(0.05, abs=0.012)
    for test in found[:50]:
        low, high = test['interval_90']
        assert (test['p_equal'] < 0.05) == (-2.5 < low and high < 2.5)
        assert (test['p'] < 0.05) == (test['interval_95'][0] > 0 or test['interval_95'][1] < 0)
    # at the margin itself, equality is claimed in no more than 5 % of experiments
    edge = [stats.welch(rng.normal(2.5, 1, 12).tolist(), rng.normal(0, 1, 12).tolist(), 2.5) for _ in range(2000)]
    assert np.mean([test['p_equal'] < 0.05 for test in edge]) == pytest.approx(0.05, abs=0.012)


def test_holm_multiplies_the_smallest_by_their_number_and_never_decreases():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.6, 0.9]) == [1.0, 1.0] and stats.holm([]) == []


def test_a_p_that_is_not_known_counts_for_nothing():
    found = stats.holm([float('nan'), 0.01, 0.03])
    assert np.isnan(found[0]) and found[1:] == [0.02, 0.03]
