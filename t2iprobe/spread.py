"""How far does a number move with the template, and does the best template stay the best? Pure numbers."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["correlate_ranks", "describe_ranks", "describe_spread", "rank_agreement", "subset_spread"]

Floats = NDArray[np.floating]


def describe_spread(values: ArrayLike) -> dict[str, Any]:
    """Return mean, standard deviation (of the population, as published), least, greatest and range.

    `values` is [templates], the score under each; NaN is left out. Raises ValueError without any number.
    """
    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    if not len(known):
        raise ValueError("there is no score to describe")
    return {
        "mean": float(known.mean()),
        "sd": float(known.std()),
        "min": float(known.min()),
        "max": float(known.max()),
        "range": float(np.ptp(known)),
        "templates": len(known),
    }


def correlate_ranks(a: ArrayLike, b: ArrayLike) -> tuple[float, float]:
    """Return Spearman's ρ and Kendall's τ-b of paired scores [N]; NaN where one of them is constant."""
    from scipy.stats import kendalltau, spearmanr

    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both], y[both]
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan"), float("nan")
    return float(spearmanr(x, y).statistic), float(kendalltau(x, y).statistic)


def describe_ranks(a: ArrayLike, b: ArrayLike) -> dict[str, Any]:
    """Return Spearman's ρ and Kendall's τ-b of paired scores [N] with 95 % intervals, and N; None for none.

    The intervals are Fisher's with the variances of Bonett & Wright 2000 (Psychometrika 65: 23-28), for pairs
    that are independent. NaN on either side is left out.
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    count = int((np.isfinite(x) & np.isfinite(y)).sum())
    rho, tau = correlate_ranks(x, y)
    if not np.isfinite(rho):
        return dict.fromkeys(_RANKS, None) | {"n": count}
    spearman = _fisher_interval(rho, (1 + rho**2 / 2) / (count - 3)) if count > 4 else None
    kendall = _fisher_interval(tau, 0.437 / (count - 4)) if count > 4 else None
    return dict(zip(_RANKS, (rho, spearman, tau, kendall), strict=True)) | {"n": count}


_RANKS = ("spearman", "spearman_interval", "kendall", "kendall_interval")


def _fisher_interval(correlation: float, variance: float) -> list[float] | None:
    if abs(correlation) > 1 - 1e-12:
        return None  # Fisher's transform has no finite value there
    middle, half = np.arctanh(correlation), 1.959964 * np.sqrt(variance)
    return [float(np.tanh(middle - half)), float(np.tanh(middle + half))]


def rank_agreement(scores: ArrayLike) -> dict[str, Any]:
    """Return the mean rank correlation over all pairs of rows of scores [rows, columns].

    Rows are models and columns templates, to ask whether the best template transfers; transposed, whether
    the best model stays the best. Pairs with a constant row have no correlation and are not counted.
    """
    pairs = [correlate_ranks(a, b) for a, b in combinations(np.asarray(scores, np.float64), 2)]
    found = [pair for pair in pairs if np.isfinite(pair[0])]
    if not found:
        return {"spearman": None, "kendall": None, "pairs": 0}
    rho, tau = np.mean(found, axis=0)
    return {"spearman": float(rho), "kendall": float(tau), "pairs": len(found)}


def subset_spread(score: Any, count: int, size: int, draws: int = 200, seed: int = 0) -> dict[str, Any]:
    """Describe the scores of ensembles of `size` of `count` members: all subsets, or `draws` at random.

    `score` is a function from a sorted tuple of members to a number.
    """
    subsets: Sequence[tuple[int, ...]] = []
    if size <= count:
        rng = np.random.default_rng(seed)
        from math import comb

        if comb(count, size) <= draws:
            subsets = list(combinations(range(count), size))
        else:
            drawn = (rng.choice(count, size, replace=False).tolist() for _ in range(draws))
            subsets = [tuple(sorted(members)) for members in drawn]
    if not subsets:
        raise ValueError(f"there are no {size} of {count} templates")
    found = describe_spread([score(subset) for subset in subsets])
    found["subsets"] = found.pop("templates")
    return found | {"size": size}
