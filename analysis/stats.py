"""
Confidence intervals of a mean: bootstrap over sequences, Student's t over training seeds; and the error of a ratio.

The mean and standard error over windows of a data set are core/runs/evaluation.py's `mean_and_stderr`.
"""

from collections.abc import Sequence
from statistics import mean, stdev

import numpy as np
from numpy.typing import ArrayLike

# 97.5 % quantiles of Student's t for n values, n - 1 degrees of freedom
T_QUANTILE = {4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def bootstrap(
    values: ArrayLike, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """
    Bootstrap interval of the mean of values (N, ...) over their first axis: arrays (low, high), each (...).

    resamples: number of resamples of N values with replacement. seed: of the resampling. level: coverage, 0 to 1.
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    means = (counts @ values.reshape(n, -1) / n).reshape(resamples, *values.shape[1:])
    tail = (1 - level) / 2
    return np.quantile(means, tail, axis=0), np.quantile(means, 1 - tail, axis=0)


def t_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """
    Mean of some numbers and the half width of its 95 % t interval.

    The half width is None unless there are 4 to 10 values: fewer give no useful interval, report their range instead.
    """
    n = len(values)
    return mean(values), T_QUANTILE[n] * stdev(values) / n**0.5 if n in T_QUANTILE else None


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
