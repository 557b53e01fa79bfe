"""How sure is a number of a probe? Jackknife pseudo-values and false-discovery control, in pure numpy.

Every metric of a synset becomes the mean of one value a picture, so that one bootstrap serves all of them:

- ISP and subtree entropy are such means already.
- The entropy of the mean distribution is not: its plug-in estimate is biased low, and resampled pictures
  (some twice, some never) make it lower still, so that a plain percentile interval misses its own estimate.
  We take its jackknife pseudo-values N·H(q̄) − (N−1)·H(q̄ without picture n) instead: their mean is the
  bias-corrected estimate (Zahl 1977, Ecology 58: 907-913), their spread its sampling error (Tukey 1958).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from t2iprobe.hypernymy.metrics import Floats, entropy, softmax
from t2iprobe.intervals import LEVEL, bootstrap_means, bootstrap_probability, interval, sign_flip_test

__all__ = [
    "LEVEL",
    "PictureValues",
    "benjamini_hochberg",
    "bootstrap_means",
    "bootstrap_probability",
    "bootstrap_rows",
    "describe_pictures",
    "interval",
    "jackknife_entropy",
    "nanmean",
    "sign_flip_test",
]


@dataclass(frozen=True)
class PictureValues:
    """What the N pictures of one synset say.

    Attributes:
        mean_probabilities: [C] mean of softmax over the pictures.
        values: [N, 3] value of each picture: in-subtree probability, entropy within the subtree, pseudo-value
            of the marginal entropy. The last two are NaN where the subtree holds one class, the last also
            where there is one picture only.
        marginal_entropy: plug-in H(q̄); NaN where the subtree holds one class.
    """

    mean_probabilities: Floats
    values: Floats
    marginal_entropy: float


def describe_pictures(logits: NDArray[np.floating], subtree: NDArray[np.bool_]) -> PictureValues:
    """Reduce the logits [N, C] of one synset to one row of values a picture."""
    probabilities = softmax(logits)
    values = np.full((len(logits), 3), np.nan)
    values[:, 0] = np.minimum(probabilities[:, subtree].sum(axis=1), 1.0)
    marginal = np.nan
    if subtree.sum() > 1:
        q = softmax(logits[:, subtree])
        values[:, 1] = entropy(q)
        values[:, 2] = jackknife_entropy(q)
        marginal = float(entropy(q.mean(axis=0)))
    return PictureValues(probabilities.mean(axis=0), values, marginal)


def jackknife_entropy(q: Floats) -> Floats:
    """[N] pseudo-values of the entropy of the mean of distributions q [N, K]; NaN for one picture.

    Their mean removes the bias of order 1/N; what is left is large only where N is far below K.
    """
    count = len(q)
    if count < 2:
        return np.full(count, np.nan)
    total = q.sum(axis=0)
    without = np.maximum(total - q, 0.0) / (count - 1)
    return count * entropy(total / count) - (count - 1) * entropy(without)


def bootstrap_rows(count: int, resamples: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """[resamples, count − 1] indices of resampled synsets, one fewer as in `bootstrap_means`."""
    return rng.integers(0, count, size=(resamples, max(count - 1, 1)))


def nanmean(values: Floats) -> Floats:
    """Mean over the last axis of what is not NaN, NaN where nothing is; numpy's own warns there."""
    there = ~np.isnan(values)
    count = there.sum(axis=-1)
    total = np.where(there, values, 0.0).sum(axis=-1)
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)


def benjamini_hochberg(p: Floats) -> Floats:
    """q-values [T] of p-values [T]: the false-discovery rate at which each test is a finding.

    NaN stays NaN and does not count as a test. Benjamini & Hochberg 1995, JRSS B 57: 289-300.
    """
    q = np.full(len(p), np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested])]
    scaled = p[order] * len(order) / np.arange(1, len(order) + 1)
    q[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return q
