"""How much is a text like those of a target set? Importance weights (DSIR, arXiv 2302.03169), a classifier.

Both look at words and pairs of words by a stable hash, so that a model means the same on every machine.
The published signals of these kinds are for three fixed targets; here the target is the user's own.
"""

import functools
import heapq
import io
import itertools
import json
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2iprobe.errors import UserError
from t2iprobe.intervals import describe_mean
from t2iprobe.llm.corpus.documents import Source, number_of
from t2iprobe.llm.corpus.signals import PRECISION, Document, Signals
from t2iprobe.storage import read_arrays, write_output

BUCKETS = 10_000  # of the importance weights, as published
CLASSIFIER_BUCKETS = 1 << 17
LIMIT = 75_000  # texts of each side, as published for the classifiers
_LEAST = 1e-8  # probability of what was never seen, as published
_PENALTY = 1e-6  # on squared weights, so that rare words do not get any
_HELD_OUT = 10  # one text in so many judges the classifier

Features = NDArray[np.uint32]


def hash_features(raw_words: Sequence[str]) -> Features:
    """Return the CRC-32 of each word and each pair of neighbours."""
    encoded = [word.encode() for word in raw_words]
    pairs = map(b" ".join, itertools.pairwise(encoded))
    return np.fromiter(map(zlib.crc32, [*encoded, *pairs]), np.uint32)


@dataclass(frozen=True)
class Target:
    """A trained target.

    log_ratio: ln p − ln q of each bucket [10,000]. lengths: mean raw words of a text of the target and of the
    source. weights, bias: of the classifier [131,072].
    """

    name: str
    log_ratio: NDArray[np.float64]
    lengths: tuple[float, float]
    weights: NDArray[np.float64]
    bias: float


def score_target(target: Target, document: Document) -> Signals:
    """Return the importance weight, the same corrected for length, and the probability of being a target.

    The length is counted in raw words, as the means are; the published code means to, and takes characters.
    """
    length, raw = len(document.text), document.raw_words
    names = (
        f"rps_doc_{target.name}_importance",
        f"rps_doc_{target.name}_importance_length_correction",
        f"rps_doc_ml_{target.name}_score",
    )
    if not raw:
        return {name: [[0, length, None]] for name in names}
    features = hash_features(raw)
    importance = float(target.log_ratio[features % BUCKETS].sum())
    likely = [math.log(_poisson(len(raw), mean) + _LEAST) for mean in target.lengths]
    margin = float(target.weights[features % CLASSIFIER_BUCKETS].mean()) + target.bias
    scores = (importance, importance + likely[0] - likely[1], _sigmoid(margin))
    return {name: [[0, length, round(score, PRECISION)]] for name, score in zip(names, scores, strict=True)}


def _poisson(count: int, mean: float) -> float:
    return math.exp(count * math.log(mean) - mean - math.lgamma(count + 1))


def _sigmoid(margin: float) -> float:
    return 1 / (1 + math.exp(-margin)) if margin > -700 else 0.0


def find_target_name(signal: str) -> str | None:
    """Return the name of the target that a signal is of, None for a signal that needs none."""
    match = re.fullmatch(r"rps_doc_(?:ml_(\w+)_score|(\w+?)_importance(?:_length_correction)?)", signal)
    return (match[1] or match[2]) if match else None


def train_target(name: str, target: Source, source: Source, out: Path, limit: int = LIMIT) -> dict[str, Any]:
    """Train on the texts of `target` against those of `source`, and write the model (npz) to `out`.

    Of more than `limit` texts those whose ids' hashes are lowest are taken: the same ones each time.
    Returns texts used and the classifier's accuracy on a tenth that it has not seen, with its interval.
    Raises UserError where either has fewer than 20 texts, or the name is no part of a signal's name.
    """
    if not name.isidentifier() or not name.islower():
        raise UserError(f"a target's name is one word in lower case, such as wikiref, not {name!r}")
    sides = [_sample(each, limit) for each in (target, source)]
    for side, given in zip(sides, (target, source), strict=True):
        if len(side) < 20:
            raise UserError(f"{given.path} has {len(side)} texts: 20 are the least to learn from")
    ratios, lengths = _measure(sides)
    held = [[each for each in side if each[0] % _HELD_OUT == 0] for side in sides]
    learnt = [[each for each in side if each[0] % _HELD_OUT] for side in sides]
    weights, bias = _fit([[features for _, features in side] for side in learnt])
    model = Target(name, ratios, lengths, weights, bias)
    right = [
        (float(weights[features % CLASSIFIER_BUCKETS].mean()) + bias > 0) == (side == 0)
        for side, texts in enumerate(held)
        for _, features in texts
    ]
    write_target(model, out)
    return {
        "out": str(out),
        "name": name,
        "target_texts": len(sides[0]),
        "source_texts": len(sides[1]),
        "held_out": len(right),
        "accuracy": describe_mean(np.array(right, np.float64)) if right else None,
    }


def _sample(source: Source, limit: int) -> list[tuple[int, Features]]:
    """Return (hash of the id, features) of the texts with the lowest hashes, in order of these."""
    return heapq.nsmallest(limit, _hash_texts(source), key=lambda each: each[0])


def _hash_texts(source: Source) -> Iterator[tuple[int, Features]]:
    for chunk in source.read():
        for row in source.parse(chunk)[0]:
            if raw := Document(row.text).raw_words:
                yield number_of(row.id), hash_features(raw)


def _measure(sides: Sequence[Sequence[tuple[int, Features]]]) -> tuple[NDArray[np.float64], Any]:
    logs, lengths = [], []
    for side in sides:
        counts = np.zeros(BUCKETS)
        for _, features in side:
            np.add.at(counts, features % BUCKETS, 1)
        logs.append(np.log(counts / counts.sum() + _LEAST))
        # n words and n − 1 pairs
        lengths.append(float(np.mean([(len(features) + 1) / 2 for _, features in side])))
    return logs[0] - logs[1], tuple(lengths)


def _fit(sides: Sequence[Sequence[Features]]) -> tuple[NDArray[np.float64], float]:
    """Fit a logistic regression on mean features, as fastText's classifiers of two labels are.

    Both sides weigh the same, however many texts they have.
    """
    from scipy.optimize import minimize
    from scipy.sparse import csr_matrix
    from scipy.special import expit

    texts = [features % CLASSIFIER_BUCKETS for side in sides for features in side]
    lengths = np.array([len(each) for each in texts])
    values = np.repeat(1 / lengths, lengths)
    rows = csr_matrix(
        (values, np.concatenate(texts), np.r_[0, lengths.cumsum()]), (len(texts), CLASSIFIER_BUCKETS)
    )
    signs = np.repeat([1.0, -1.0], [len(side) for side in sides])
    each = np.repeat([0.5 / len(side) for side in sides], [len(side) for side in sides])

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weights, bias = parameters[:-1], parameters[-1]
        margins = signs * (rows @ weights + bias)
        pull = -each * signs * expit(-margins)
        value = each @ np.logaddexp(0, -margins) + 0.5 * _PENALTY * weights @ weights
        return value, np.r_[rows.T @ pull + _PENALTY * weights, pull.sum()]

    start = np.zeros(CLASSIFIER_BUCKETS + 1)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
    return found[:-1], float(found[-1])


def write_target(target: Target, out: Path) -> None:
    """Write a target as npz."""
    buffer = io.BytesIO()
    facts = json.dumps({"name": target.name, "lengths": target.lengths, "bias": target.bias})
    np.savez_compressed(
        buffer,
        log_ratio=target.log_ratio,
        weights=target.weights,
        facts=np.frombuffer(facts.encode(), np.uint8),
    )
    write_output(out, buffer.getvalue())


@functools.cache
def load_target(path: Path) -> Target:
    """Read a target. Raises UserError where the file is none."""
    try:
        arrays = read_arrays(path)
        facts = json.loads(arrays["facts"].tobytes())
        log_ratio, weights = arrays["log_ratio"], arrays["weights"]
        if (log_ratio.shape, weights.shape) != ((BUCKETS,), (CLASSIFIER_BUCKETS,)):
            raise ValueError("its arrays have other sizes")
        lengths = (float(facts["lengths"][0]), float(facts["lengths"][1]))
        return Target(str(facts["name"]), log_ratio, lengths, weights, float(facts["bias"]))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"cannot read the target {path}: {error}") from None
