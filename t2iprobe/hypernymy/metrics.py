"""In-subtree probability, subtree coverage score and the entropies between them: pure numpy.

Definitions: arXiv 2310.09247, section 3. For one synset with subtree C_s and N pictures with logits l_n:

- p_n = sum over C_s of softmax(l_n); ISP = mean of p_n.
- q_n = softmax of l_n restricted to C_s, q̄ = mean of q_n; SCS = mean of KL(q_n ‖ q̄), in nats.
- Subtree entropy = mean of H(q_n), marginal entropy = H(q̄); SCS is their difference.

SCS is a plug-in estimate, at most ln N and biased low: never compare values of different N
(`statistics.py` has the corrected one).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from t2iprobe.errors import UserError
from t2iprobe.hypernymy.hierarchy import Hierarchy

Floats = NDArray[np.float64]

# The published SCS is divided by the mean of ln|C_s| over the 472 ImageNet synsets with more than one class.
SCS_NORMALISER = 1.6236960327744576


def softmax(logits: ArrayLike) -> Floats:
    """[..., C] logits to [..., C] probabilities, in float64."""
    weights = _weigh(logits)
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


def in_subtree_probabilities(logits: ArrayLike, subtree: ArrayLike) -> Floats:
    """[N] probability that each picture is of a class in the subtree (p_n), from logits [N, C].

    `subtree` is bool [C]. Raises UserError for shapes that do not fit, no pictures, or NaN.
    """
    return _within(*_check(logits, subtree))


def in_subtree_probability(logits: ArrayLike, subtree: ArrayLike) -> float:
    """ISP of one synset: the mean of `in_subtree_probabilities`. Chance (equal logits) is |C_s| / C."""
    return float(in_subtree_probabilities(logits, subtree).mean())


def subtree_distributions(logits: ArrayLike, subtree: ArrayLike) -> Floats:
    """[N, |C_s|] class probabilities within the subtree (q_n), each row summing to one."""
    logits, subtree = _check(logits, subtree)
    return softmax(logits[:, subtree])


def subtree_coverage_score(logits: ArrayLike, subtree: ArrayLike) -> float:
    """Raw SCS of one synset in nats, mean of KL(q_n ‖ q̄); NaN where the subtree holds one class."""
    q = subtree_distributions(logits, subtree)
    if q.shape[1] < 2:
        return float("nan")
    # Rounding may leave -1e-17 for equal pictures.
    return float(max(entropy(q.mean(axis=0)) - entropy(q).mean(), 0.0))


def subtree_entropy(logits: ArrayLike, subtree: ArrayLike) -> float:
    """Mean entropy of q_n in nats; NaN where the subtree holds one class."""
    q = subtree_distributions(logits, subtree)
    return float(entropy(q).mean()) if q.shape[1] > 1 else float("nan")


def marginal_entropy(logits: ArrayLike, subtree: ArrayLike) -> float:
    """Entropy of q̄ in nats; NaN where the subtree holds one class."""
    q = subtree_distributions(logits, subtree)
    return float(entropy(q.mean(axis=0))) if q.shape[1] > 1 else float("nan")


def entropy(distribution: Floats) -> Floats:
    """[...] entropies in nats of [..., K] distributions, with 0 ln 0 = 0."""
    logarithm = np.log(distribution, out=np.zeros_like(distribution), where=distribution > 0)
    return -(distribution * logarithm).sum(axis=-1)


def scs_normaliser(hierarchy: Hierarchy) -> float:
    """Mean of ln|C_s| over the non-leaf synsets with more than one class: `SCS_NORMALISER` for ImageNet.

    NaN where there is no such synset. It belongs to the hierarchy, not to the synsets that a run happens to
    hold, so that the same synset has the same SCS in every run.
    """
    sizes = hierarchy.subtrees.sum(axis=1)
    sizes = sizes[sizes > 1]
    return float(np.log(sizes).mean()) if len(sizes) else float("nan")


@dataclass(frozen=True)
class Measures:
    """Per-synset values, arrays [S] in the order of `synsets`; NaN where a subtree holds one class."""

    synsets: list[str]
    classes: NDArray[np.int64]
    samples: NDArray[np.int64]
    isp: Floats
    scs_raw: Floats
    subtree_entropy: Floats
    marginal_entropy: Floats


def measure(logits: Mapping[str, ArrayLike], hierarchy: Hierarchy) -> Measures:
    """Compute every metric of every synset in `logits` (synset name → [N, C]), sorted by name."""
    synsets = sorted(logits)
    subtrees = hierarchy.subtrees_of(synsets)
    rows = []
    for name, subtree in zip(synsets, subtrees, strict=True):
        values, subtree = _check(logits[name], subtree, name)
        within = np.full(2, np.nan)
        if subtree.sum() > 1:
            q = softmax(values[:, subtree])
            within[:] = entropy(q).mean(), entropy(q.mean(axis=0))
        rows.append((len(values), _within(values, subtree).mean(), *within))
    samples, isp, mean, marginal = np.array(rows, dtype=np.float64).reshape(-1, 4).T
    return Measures(
        synsets=synsets,
        classes=subtrees.sum(axis=1),
        samples=samples.astype(np.int64),
        isp=isp,
        scs_raw=np.maximum(marginal - mean, 0.0),
        subtree_entropy=mean,
        marginal_entropy=marginal,
    )


def measure_uniform(synsets: list[str], hierarchy: Hierarchy) -> Measures:
    """What equal logits give: ISP |C_s| / C, SCS 0, both entropies ln|C_s|."""
    zero = np.zeros((1, len(hierarchy.classes)), dtype=np.float32)
    return measure(dict.fromkeys(synsets, zero), hierarchy)


def check_logits(logits: Mapping[str, ArrayLike], hierarchy: Hierarchy) -> dict[str, NDArray[np.floating]]:
    """Return the logits as arrays, sorted by synset, or raise UserError for what cannot be measured."""
    if not logits:
        raise UserError("there are no logits to measure: the run holds no picture yet")
    return {
        name: _check(logits[name], subtree, name)[0]
        for name, subtree in zip(sorted(logits), hierarchy.subtrees_of(sorted(logits)), strict=True)
    }


def _weigh(logits: ArrayLike) -> Floats:
    """Return exp of the logits [..., C], scaled so that the largest is 1."""
    weights = np.array(logits, dtype=np.float64)
    weights -= weights.max(axis=-1, keepdims=True)
    return np.exp(weights, out=weights)


def _within(logits: ArrayLike, subtree: NDArray[np.bool_]) -> Floats:
    """Return p_n [N]; rounding may leave 1 + 1e-16 where every class counts."""
    weights = _weigh(logits)
    return np.minimum((weights @ subtree.astype(np.float64)) / weights.sum(axis=1), 1.0)


def _check(
    logits: ArrayLike, subtree: ArrayLike, name: str = ""
) -> tuple[NDArray[np.floating], NDArray[np.bool_]]:
    whose = f" of {name}" if name else ""
    values, mask = np.asarray(logits), np.asarray(subtree)
    if mask.dtype != np.bool_ or mask.ndim != 1:
        raise UserError(f"the subtree{whose} must be bool [C], not {mask.dtype} {list(mask.shape)}")
    if not mask.any():
        raise UserError(f"the subtree{whose} holds no class")
    if values.ndim != 2 or values.shape[1] != len(mask) or not len(values):
        raise UserError(
            f"the logits{whose} must be [N, {len(mask)}] with N at least 1, not {list(values.shape)}"
        )
    if not np.issubdtype(values.dtype, np.floating):
        raise UserError(f"the logits{whose} must be floating point numbers, not {values.dtype}")
    if not np.isfinite(values).all():
        raise UserError(f"the logits{whose} hold NaN or infinity: the pictures or the classifier are broken")
    return values, mask
