"""From logits to a run's results: every number with its interval, unknown words, comparison of two runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from t2iprobe.errors import UserError
from t2iprobe.hypernymy import resampling
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.hypernymy.metrics import Floats
from t2iprobe.hypernymy.resampling import benjamini_hochberg, nanmean
from t2iprobe.hypernymy.samples import Sample, estimate, reduce_logits, to_number

ALPHA = 0.05
# Fewer unrelated prompts than this give too coarse a rank.
UNRELATED_PROMPTS = 60
SAW = 5
SIGN_FLIPS = 10_000
# Probabilities nearer to 0 or 1 than this mean the same.
TINY = 1e-6


def analyse(
    logits: Mapping[str, ArrayLike], hierarchy: Hierarchy, *, seed: int = 0, resamples: int = 1000
) -> dict[str, Any]:
    """Compute the results of one run, ready for JSON (numbers that do not exist are None).

    Args:
        logits: synset name → [N, C]; N may differ.
        hierarchy: of the classifier's C classes.
        seed: of the resampling; the same logits and seed give the same intervals.
        resamples: bootstrap resamples.

    The headline is the mean over the run's non-leaf synsets (the paper's set); over its leaves where it holds
    nothing else. `interval` tells what other pictures of the same synsets would give, `interval_synsets` what
    other synsets would; both are 95 % bootstrap intervals. Those of `scs` cover the SCS at the same number of
    pictures; `scs_corrected` estimates the SCS of unlimited pictures (jackknife) and its interval covers that
    up to the bias that is left.
    """
    sample = reduce_logits(logits, hierarchy)
    rng = np.random.default_rng(seed)
    nonleaf = [name for name in sample.synsets if name in set(hierarchy.synsets)]
    leaves = [name for name in sample.synsets if name not in set(hierarchy.synsets)]
    evaluated = nonleaf or leaves
    results = summarise(sample.subset(evaluated), resamples, rng)
    unknown = find_unknown(sample)
    counts = sample.subset(evaluated).samples
    return {
        "results": results,
        "results_leaves": summarise(sample.subset(leaves), resamples, rng) if nonleaf and leaves else None,
        "uniform": _summarise_uniform(evaluated, hierarchy),
        "coverage": {
            "evaluated": "nonleaf" if nonleaf else "leaves",
            "synsets": len(evaluated),
            "of": len(hierarchy.synsets if nonleaf else hierarchy.leaves),
            "samples_min": int(counts.min()),
            "samples_max": int(counts.max()),
        },
        "unknown_test": unknown["test"],
        "resampling": {"seed": seed, "resamples": resamples, "level": resampling.LEVEL},
        "warnings": _warn(counts),
        "synsets": _tabulate(sample, hierarchy, unknown, resamples, rng),
    }


def find_unknown(sample: Sample, alpha: float = ALPHA) -> dict[str, Any]:
    """Test for each synset whether its pictures are above chance; the others are unknown words.

    The pictures of one prompt resemble each other, so that the prompt is what is tested: its mean in-subtree
    probability must rank high among the means that the prompts of unrelated synsets (no class in common) give
    to the same subtree; p = (1 + how many reach it) / (1 + how many there are). A run with fewer than
    `UNRELATED_PROMPTS` of them falls back, for that synset, to a one-sided t-test over its pictures of ln p_n
    against the ln of the uniform floor |C_s| / C. False discoveries are controlled at `alpha` over all
    synsets (Benjamini & Hochberg). A synset above every class is known by definition.

    Returns p, q [S] (NaN where not testable), known [S] bool, chance [S] (mean of the unrelated prompts, NaN
    without them) and `test`, in words and counts.
    """
    subtrees = sample.subtrees.astype(np.float64)
    probabilities = np.array([pictures.mean_probabilities for pictures in sample.pictures])
    given = probabilities @ subtrees.T  # [prompt, subtree]
    unrelated = subtrees @ subtrees.T == 0
    p, chance = np.full(len(sample.synsets), np.nan), np.full(len(sample.synsets), np.nan)
    ranked = unrelated.sum(axis=0) >= UNRELATED_PROMPTS
    everything = np.asarray(sample.subtrees.all(axis=1))
    for s in range(len(p)):
        others = given[unrelated[:, s], s]
        if len(others):
            chance[s] = others.mean()
        if ranked[s]:
            p[s] = (1 + (others >= given[s, s]).sum()) / (1 + len(others))
        elif not everything[s]:
            p[s] = _test_above_floor(sample.pictures[s].values[:, 0], sample.subtrees[s].mean())
    q = benjamini_hochberg(p)
    return {
        "p": p,
        "q": q,
        "known": everything | (q <= alpha),
        "chance": chance,
        "ranked": ranked,
        "test": {
            "alpha": alpha,
            "rank": int(ranked.sum()),
            "t": int((~ranked & ~everything).sum()),
            "not_testable": int(everything.sum()),
            "text": "rank of the prompt's mean in-subtree probability among those of prompts of unrelated "
            f"synsets where the run has at least {UNRELATED_PROMPTS} of them, else a one-sided t-test over "
            "pictures of its logarithm against the uniform floor; false-discovery rate controlled "
            f"(Benjamini-Hochberg) at {alpha}",
        },
    }


def compare(
    logits_a: Mapping[str, ArrayLike],
    logits_b: Mapping[str, ArrayLike],
    hierarchy: Hierarchy,
    *,
    same_pictures: bool = False,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, Any]:
    """Compare two runs on the synsets that both hold, ready for JSON; a difference is B minus A.

    Both runs are cut to the same number of pictures of each synset, since SCS depends on it. Synsets are
    always paired; pictures are if `same_pictures` says that picture n of both has the same prompt and seed.

    `results` has for each metric a, b, difference, its standard error and intervals as in `analyse`, `p` (the
    signs of the synsets' differences flipped at random: would it hold for other synsets?) and `p_pictures`
    (normal, from the standard error: would it hold for other pictures of these synsets?). `synsets` has one
    row a synset with a t-test over pictures (paired, or Welch's) and its q. It tests the logit of the
    in-subtree probability, whose own distribution is too skewed for a t-test of a few pictures.
    `only_a` and `only_b` list what one run knows and the other does not, largest difference first.
    """
    whole_a, whole_b = reduce_logits(logits_a, hierarchy), reduce_logits(logits_b, hierarchy)
    counts_a = dict(zip(whole_a.synsets, whole_a.samples.tolist(), strict=True))
    counts_b = dict(zip(whole_b.synsets, whole_b.samples.tolist(), strict=True))
    counts = {name: min(n, counts_b[name]) for name, n in counts_a.items() if name in counts_b}
    if not counts:
        raise UserError("the two runs have no synset in common: there is nothing to compare")
    a = reduce_logits({name: np.asarray(logits_a[name])[:n] for name, n in counts.items()}, hierarchy)
    b = reduce_logits({name: np.asarray(logits_b[name])[:n] for name, n in counts.items()}, hierarchy)
    evaluated = [name for name in a.synsets if name in set(hierarchy.synsets)] or a.synsets
    rows = _compare_synsets(a, b, _list_known(whole_a), _list_known(whole_b), same_pictures)
    only_a = [row for row in rows if row["known_a"] and not row["known_b"]]
    only_b = [row for row in rows if row["known_b"] and not row["known_a"]]
    warnings = _warn(a.samples)
    if any(counts_a[name] != n or counts_b[name] != n for name, n in counts.items()):
        warnings.append("the runs differ in pictures a synset: compared on as many as both have")
    return {
        "results": summarise_difference(
            a.subset(evaluated), b.subset(evaluated), same_pictures, resamples, seed
        ),
        "coverage": {
            "synsets": len(evaluated),
            "missing_a": sorted(counts_b.keys() - counts_a.keys()),
            "missing_b": sorted(counts_a.keys() - counts_b.keys()),
            "samples_min": int(a.samples.min()),
            "samples_max": int(a.samples.max()),
        },
        "same_pictures": same_pictures,
        "resampling": {"seed": seed, "resamples": resamples, "level": resampling.LEVEL},
        "warnings": warnings,
        "only_a": [row["synset"] for row in sorted(only_a, key=lambda row: row["difference"])],
        "only_b": [row["synset"] for row in sorted(only_b, key=lambda row: -row["difference"])],
        "synsets": rows,
    }


def _list_known(sample: Sample) -> set[str]:
    known = find_unknown(sample)["known"]
    return {name for name, is_known in zip(sample.synsets, known, strict=True) if is_known}


def summarise_difference(
    a: Sample, b: Sample, same_pictures: bool, resamples: int, seed: int
) -> dict[str, Any]:
    """{metric: a, b, difference, standard errors, intervals, p} over the same synsets."""
    from scipy import stats

    streams = np.random.SeedSequence(seed).spawn(3)
    # The same stream draws the same pictures in both runs.
    replicates_a = a.contributions(a.bootstrap(resamples, np.random.default_rng(streams[0])))
    stream_b = streams[0] if same_pictures else streams[1]
    replicates_b = b.contributions(b.bootstrap(resamples, np.random.default_rng(stream_b)))
    values_a, values_b = a.contributions(a.means), b.contributions(b.means)
    differences = {metric: values_b[metric] - values_a[metric] for metric in values_a}
    rng = np.random.default_rng(streams[2])
    p = resampling.sign_flip_test(np.stack(list(differences.values()), axis=1), SIGN_FLIPS, rng)
    rows = resampling.bootstrap_rows(len(a.synsets), resamples, rng)
    results = {}
    for metric, p_synsets in zip(differences, p, strict=True):
        error = estimate(differences[metric], replicates_b[metric] - replicates_a[metric], rows)
        difference = error.pop("value")
        stderr = error["stderr"]
        p_pictures = (
            2 * stats.norm.sf(abs(difference) / stderr) if difference is not None and stderr else None
        )
        results[metric] = {
            "a": to_number(nanmean(values_a[metric])),
            "b": to_number(nanmean(values_b[metric])),
            "difference": difference,
            **error,
            "p": to_number(p_synsets),
            "p_pictures": None if p_pictures is None else float(p_pictures),
        }
    return results


def _compare_synsets(
    a: Sample, b: Sample, known_a: set[str], known_b: set[str], same_pictures: bool
) -> list[dict[str, Any]]:
    """One row a synset, in the order of the samples."""
    ps = np.array(
        [
            _test_difference(one.values[:, 0], other.values[:, 0], same_pictures)
            for one, other in zip(a.pictures, b.pictures, strict=True)
        ]
    )
    scs = [sample.contributions(sample.means)["scs"] * sample.normaliser for sample in (a, b)]
    return [
        {
            "synset": name,
            "classes": int(a.subtrees[s].sum()),
            "samples": int(a.samples[s]),
            "isp_a": float(a.means[s, 0]),
            "isp_b": float(b.means[s, 0]),
            "difference": float(b.means[s, 0] - a.means[s, 0]),
            "p": to_number(ps[s]),
            "q": to_number(q),
            "scs_raw_a": to_number(scs[0][s]),
            "scs_raw_b": to_number(scs[1][s]),
            "known_a": name in known_a,
            "known_b": name in known_b,
        }
        for s, (name, q) in enumerate(zip(a.synsets, benjamini_hochberg(ps), strict=True))
    ]


def _logit(probabilities: Floats) -> Floats:
    clipped = np.clip(probabilities, TINY, 1 - TINY)
    return np.log(clipped / (1 - clipped))


def _test_difference(one: Floats, other: Floats, same_pictures: bool) -> float:
    """Two-sided p of equal mean logits of probabilities [N]; NaN for a single picture."""
    from scipy import stats

    if len(one) < 2:
        return float("nan")
    one, other = _logit(one), _logit(other)
    differences = other - one
    spread = differences if same_pictures else np.r_[one - one.mean(), other - other.mean()]
    if np.ptp(spread) < 1e-9:  # no spread: the t statistic would be rounding
        return 1.0 if abs(differences.mean()) < 1e-6 else 0.0
    if same_pictures:
        return float(stats.ttest_1samp(differences, 0.0).pvalue)
    return float(stats.ttest_ind(one, other, equal_var=False).pvalue)


def summarise(sample: Sample, resamples: int, rng: np.random.Generator) -> dict[str, Any]:
    """{metric: value, standard errors, intervals} over all synsets of the sample."""
    values = sample.contributions(sample.means)
    replicates = sample.contributions(sample.bootstrap(resamples, rng))
    rows = resampling.bootstrap_rows(len(sample.synsets), resamples, rng)
    results = {metric: estimate(values[metric], replicates[metric], rows) for metric in values}
    scs = results["scs"]
    scs["samples"] = int(sample.samples.min())
    scs["corrected"] = results["scs_corrected"]["value"]
    scs["raw"] = None if scs["value"] is None else scs["value"] * sample.normaliser
    return results


def _summarise_uniform(synsets: Sequence[str], hierarchy: Hierarchy) -> dict[str, float | None]:
    """{metric: value} of equal logits: chance."""
    zero = np.zeros((2, len(hierarchy.classes)), dtype=np.float32)
    sample = reduce_logits(dict.fromkeys(synsets, zero), hierarchy)
    contributions = sample.contributions(sample.means)
    return {metric: to_number(nanmean(values)) for metric, values in contributions.items()}


def _tabulate(
    sample: Sample, hierarchy: Hierarchy, unknown: dict[str, Any], resamples: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """One row a synset, in the order of the sample."""
    values = sample.contributions(sample.means)
    raw, corrected = values["scs"] * sample.normaliser, values["scs_corrected"]
    rows = []
    for s, (name, pictures) in enumerate(zip(sample.synsets, sample.pictures, strict=True)):
        probabilities = pictures.values[:, 0]
        count, everything = len(probabilities), bool(sample.subtrees[s].all())
        low, high = (
            (1.0, 1.0) if everything else resampling.bootstrap_probability(probabilities, resamples, rng)
        )
        top = np.argsort(-pictures.mean_probabilities, kind="stable")[:SAW]
        rows.append(
            {
                "synset": name,
                "classes": int(sample.subtrees[s].sum()),
                "samples": count,
                "isp": float(probabilities.mean()),
                "isp_stderr": to_number(sample.stderrs[s, 0]),
                "isp_interval": [low, high],
                "scs": to_number(values["scs"][s]),
                "scs_stderr": to_number(sample.stderrs[s, 3] / sample.normaliser),
                "scs_raw": to_number(raw[s]),
                "scs_corrected": to_number(corrected[s]),
                "subtree_entropy": to_number(values["subtree_entropy"][s]),
                "subtree_entropy_stderr": to_number(sample.stderrs[s, 1]),
                "marginal_entropy": to_number(values["marginal_entropy"][s]),
                "marginal_entropy_stderr": to_number(sample.stderrs[s, 2]),
                "floor": float(sample.subtrees[s].mean()),
                "chance": to_number(unknown["chance"][s]),
                "p": to_number(unknown["p"][s]),
                "q": to_number(unknown["q"][s]),
                "test": "none" if everything else "rank" if unknown["ranked"][s] else "t",
                "known": bool(unknown["known"][s]),
                "saw": [[hierarchy.class_names[c], float(pictures.mean_probabilities[c])] for c in top],
            }
        )
    return rows


def _test_above_floor(probabilities: Floats, floor: float) -> float:
    """One-sided p of ln p_n [N] lying above ln floor in the mean; 1 for a single picture."""
    from scipy import stats

    excess = np.log(np.maximum(probabilities, np.finfo(float).tiny)) - np.log(floor)
    if len(excess) < 2:
        return 1.0
    if np.ptp(excess) < 1e-12:  # no spread: the t statistic would be rounding
        return 0.0 if excess[0] > 1e-9 else 1.0
    return float(stats.ttest_1samp(excess, 0.0, alternative="greater").pvalue)


def _warn(counts: NDArray[np.int64]) -> list[str]:
    warnings = []
    if counts.min() != counts.max():
        warnings.append(
            f"the synsets have from {counts.min()} to {counts.max()} pictures: SCS depends on that number, "
            "compare scs_corrected only"
        )
    if counts.min() < 2:
        warnings.append("some synsets have one picture: there is no spread to tell their error from")
    elif counts.min() < 3:
        warnings.append("some synsets have two pictures: the error of SCS takes three of each synset")
    return warnings
