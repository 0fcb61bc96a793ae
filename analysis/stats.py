"""
Intervals of a mean: bootstrap over sequences, Student's t over training seeds; tests of two means; the error
of a ratio.

The mean and standard error over windows of a data set are core/runs/evaluation.py's `mean_and_stderr`.
"""

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

LEAST = 4  # values of which a t interval is of use


def bootstrap(
    values: ArrayLike, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Bootstrap interval of the mean of values (N, ...) over their first axis: (low, high), arrays of shape (...)."""
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    means = (counts @ values.reshape(n, -1) / n).reshape(resamples, *values.shape[1:])
    tail = (1 - level) / 2
    return np.quantile(means, tail, axis=0), np.quantile(means, 1 - tail, axis=0)


def t_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half width of its 95 % t interval; None for fewer than LEAST values, whose range says more."""
    n = len(values)
    return mean(values), half_width(n) * stdev(values) / n**0.5 if n >= LEAST else None


def half_width(n: int) -> float:
    """Half of the 95 % t interval of a mean of `n` values, in standard errors."""
    return float(scipy.stats.t.ppf(0.975, n - 1))


def welch(one: Sequence[float], other: Sequence[float], margin: float) -> dict[str, Any]:
    """
    Two independent samples compared by Welch's t test (no equal variances assumed).

    Returns 'difference' of the means, 'interval_95', 'interval_90', 'p' of no difference, and 'p_equal': of a
    difference of at least `margin`, by two one-sided tests (Schuirmann, 1987). p_equal < .05 is the same as a 90 %
    interval within -margin to margin.
    """
    test = scipy.stats.ttest_ind(one, other, equal_var=False)
    below = scipy.stats.ttest_ind(np.subtract(one, margin), other, equal_var=False, alternative='less')
    above = scipy.stats.ttest_ind(np.add(one, margin), other, equal_var=False, alternative='greater')
    intervals = {
        f'interval_{level}': [float(end) for end in test.confidence_interval(level / 100)] for level in (95, 90)
    }
    p_equal = float(max(below.pvalue, above.pvalue))
    return dict(difference=mean(one) - mean(other), **intervals, p=float(test.pvalue), p_equal=p_equal)


def holm(ps: Sequence[float]) -> list[float]:
    """
    p values adjusted for being read together, in their order (Holm, 1979): below .05 for a family error of 5 %. What is
    nan, of a test without enough values, stays nan and counts for nothing.
    """
    adjusted, highest = [float('nan')] * len(ps), 0.0
    known = [index for index, p in enumerate(ps) if not math.isnan(p)]
    for rank, index in enumerate(sorted(known, key=ps.__getitem__)):
        highest = max(highest, min(1.0, (len(known) - rank) * ps[index]))
        adjusted[index] = highest
    return adjusted


def ratio(parts: np.ndarray, wholes: np.ndarray) -> tuple[float, float]:
    """
    sum(parts) / sum(wholes) of arrays (N,), and its standard error over the N; nan where the wholes are all 0.

    The error is that of a ratio of two random sums, linearized (Cochran, Sampling Techniques, 1977, chapter 6). Where
    all wholes are equal, it is the ordinary standard error of a mean.
    """
    found, influence = ratio_influence(parts, wholes)
    return found, standard_error(influence)


def ratio_difference(
    parts: np.ndarray, wholes: np.ndarray, other_parts: np.ndarray, other_wholes: np.ndarray
) -> tuple[float, float]:
    """The difference of two ratios over the same N (see `ratio`), and its standard error."""
    (one, mine), (other, theirs) = ratio_influence(parts, wholes), ratio_influence(other_parts, other_wholes)
    return one - other, standard_error(mine - theirs)


def ratio_influence(parts: np.ndarray, wholes: np.ndarray) -> tuple[float, np.ndarray]:
    """sum(parts) / sum(wholes), and what each of the N contributes to its deviation, times N: (N,)."""
    whole = wholes.sum()
    if not whole:
        return float('nan'), np.full(len(wholes), np.nan)
    found = float(parts.sum() / whole)
    return found, (parts - found * wholes) / wholes.mean()


def standard_error(values: np.ndarray) -> float:
    """The standard error of the mean of values (N,)."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5)
