"""Do judges agree? How classifiers rank the synsets alike, and how sure the ranks of runs are."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2iprobe.intervals import SIGN_FLIPS, holm, sign_flip_test
from t2iprobe.spread import describe_ranks

__all__ = ["agree_on_runs", "agree_on_synsets", "rank_runs"]

Floats = NDArray[np.float64]
ALPHA = 0.05


def agree_on_synsets(analyses: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return for each pair of classifiers how they rank the synsets that both judged, by ISP and by SCS.

    `analyses` are results by classifier, as in results.json; see `spread.describe_ranks` for the numbers.
    """
    tables = {
        name: {row["synset"]: row for row in analysis["synsets"]} for name, analysis in analyses.items()
    }
    found = []
    for a, b in combinations(tables, 2):
        both = [name for name in tables[a] if name in tables[b]]
        entry: dict[str, Any] = {"a": a, "b": b}
        for metric in ("isp", "scs"):
            columns = [[_number(tables[side][name][metric]) for name in both] for side in (a, b)]
            entry[metric] = describe_ranks(*columns)
        found.append(entry)
    return found


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def rank_runs(values: Floats, *, seed: int = 0, alpha: float = ALPHA) -> list[dict[str, Any]]:
    """Return each run's rank by its mean, the range of ranks that the data allow, and whom it beats.

    Args:
        values: [runs, synsets] what each synset adds; NaN where no run has a value.
        seed: of the sign flips.
        alpha: of all ranges together.

    Every pair of runs is tested on its synsets' differences (signs flipped at random), corrected for the
    number of pairs (Holm). A rank runs from 1 + the runs that are above to the number of runs − those that
    are below, beyond chance: with probability 1 − alpha every range holds its run's true rank (Mogstad,
    Romano, Shaikh & Wilhelm 2024, Review of Economic Studies 91: 476-518). Runs of equal means share a rank.
    """
    values = values[:, np.isfinite(values).all(axis=0)]
    count = len(values)
    means = values.mean(axis=1) if values.size else np.full(count, np.nan)
    pairs = list(combinations(range(count), 2))
    above = np.zeros((count, count), bool)
    if pairs and values.size:
        differences = np.stack([values[a] - values[b] for a, b in pairs], axis=1)
        # A p of 1 / (1 + flips) must survive the correction for all pairs.
        flips = max(SIGN_FLIPS, 100 * len(pairs))
        p = sign_flip_test(differences, flips, np.random.default_rng(seed))
        for (a, b), corrected in zip(pairs, holm([float(one) for one in p]), strict=True):
            if corrected is not None and corrected <= alpha and means[a] != means[b]:
                better, worse = (a, b) if means[a] > means[b] else (b, a)
                above[better, worse] = True
    return [
        {
            "rank": 1 + int((means > means[run]).sum()),
            "best": 1 + int(above[:, run].sum()),
            "worst": count - int(above[run].sum()),
            "synsets": values.shape[1],
        }
        for run in range(count)
    ]


def agree_on_runs(scores: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Return for each pair of classifiers how they rank the same runs; scores are in one order."""
    return [{"a": a, "b": b, **describe_ranks(scores[a], scores[b])} for a, b in combinations(scores, 2)]
