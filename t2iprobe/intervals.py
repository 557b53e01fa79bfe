"""How sure is a mean, and the difference of two? Bootstrap, sign flips, Holm's correction: pure numpy."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.floating]

LEVEL = 0.95
RESAMPLES = 2000
SIGN_FLIPS = 10_000


def describe_mean(values: ArrayLike, seed: int = 0) -> dict[str, Any]:
    """Return the mean of values [N], one a picture, with its bootstrap interval (None for one picture)."""
    values = np.asarray(values, np.float64)
    replicates = bootstrap_means(values[:, None], RESAMPLES, np.random.default_rng(seed))[:, 0]
    return {"value": float(values.mean()), "interval": _listed(interval(replicates))}


def describe_probability(values: ArrayLike, seed: int = 0) -> dict[str, Any]:
    """Return the mean of probabilities [N], one a picture, with `bootstrap_probability`'s interval."""
    values = np.asarray(values, np.float64)
    low_high = bootstrap_probability(values, RESAMPLES, np.random.default_rng(seed))
    return {"value": float(values.mean()), "interval": _listed(low_high)}


def describe_difference(before: ArrayLike, after: ArrayLike, seed: int = 0) -> dict[str, Any]:
    """Return the mean of after − before, values [N] of pictures that are pairs, with interval and p.

    The pairs are resampled for the interval; for p (two-sided) the signs of their differences are flipped,
    so that N pairs give no p below 2 ** (1 - N). One pair has neither: None.
    """
    differences = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    p = sign_flip_test(differences[:, None], SIGN_FLIPS, np.random.default_rng(seed))[0]
    return describe_mean(differences, seed) | {"p": float(p) if len(differences) > 1 else None}


def holm(p: list[float | None]) -> list[float | None]:
    """Return p-values corrected for being many: the chance of one false finding among all stays below each.

    None stays None and does not count as a test. Holm 1979, Scandinavian Journal of Statistics 6: 65-70.
    """
    corrected: list[float | None] = [None] * len(p)
    order = sorted((value, place) for place, value in enumerate(p) if value is not None)
    highest = 0.0
    for rank, (value, place) in enumerate(order):
        highest = max(highest, min(1.0, value * (len(order) - rank)))
        corrected[place] = highest
    return corrected


def jackknife_pairs(distances: Floats) -> Floats:
    """[N] pseudo-values of the mean over all pairs of distances [N, N] (symmetric): their mean is that mean.

    Their spread is its sampling error (Tukey 1958), which the pairs' own would understate. NaN for N < 3.
    """
    count = len(distances)
    if count < 3:
        return np.full(count, np.nan)
    each = (distances.sum(axis=1) - distances.diagonal()) / (count - 1)
    mean = each.mean()
    return count * mean - (count - 1) * (count * mean - 2 * each) / (count - 2)


def _listed(low_high: tuple[float, float]) -> list[float] | None:
    return None if np.isnan(low_high[0]) else [float(end) for end in low_high]


def bootstrap_means(values: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """[resamples, M] means of resampled rows of values [N, M]; NaN for N = 1.

    N − 1 of the N rows are drawn, with replacement: drawing N would make the spread of a mean too small by
    (N−1)/N, a lot for four pictures (Rao & Wu 1988, JASA 83: 231-241).
    """
    count = len(values)
    if count < 2:
        return np.full((resamples, values.shape[1]), np.nan)
    weights = rng.multinomial(count - 1, np.full(count, 1 / count), size=resamples)
    return weights @ values / (count - 1)


def bootstrap_probability(values: Floats, resamples: int, rng: np.random.Generator) -> tuple[float, float]:
    """Interval for the mean of values [N] in [0, 1] of one word.

    A handful of pictures, all near 0 or all near 1, has no spread to resample, and a plain percentile
    interval then covers the truth as rarely as one time in five. So one picture of 0 and one of 1 join the
    bootstrap, in the spirit of the interval that adds pseudo-observations to a proportion (Agresti & Coull
    1998, The American Statistician 52: 119-126).
    """
    replicates = bootstrap_means(np.r_[values, 0.0, 1.0][:, None], resamples, rng)[:, 0]
    low, high = interval(replicates)
    return min(low, float(values.mean())), max(high, float(values.mean()))


def interval(replicates: Floats) -> tuple[float, float]:
    """Percentile interval at `LEVEL`, of the finite ones among the replicates [resamples]."""
    finite = replicates[np.isfinite(replicates)]
    if len(finite) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def sign_flip_test(differences: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """[M] two-sided p of paired differences [S, M] having mean zero, by flipping rows' signs at random.

    NaN counts as no difference; a column without any number gives NaN.
    """
    # Equal sums, added up in another order, may differ by rounding.
    sums = np.nan_to_num(differences)
    least = np.abs(sums.sum(axis=0)) * (1 - 1e-12)
    reached = np.zeros(differences.shape[1])
    for start in range(0, resamples, 1000):  # a thousand at a time, for memory
        count = min(1000, resamples - start)
        signs = 2.0 * rng.integers(0, 2, size=(count, len(differences)), dtype=np.int8) - 1
        reached += (np.abs(signs @ sums) >= least).sum(axis=0)
    return np.where(np.isnan(differences).all(axis=0), np.nan, (1 + reached) / (1 + resamples))
