"""Every published value to 1e-5, loops written by hand, and what bad logits are told."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest

from t2iprobe.errors import UserError
from t2iprobe.hypernymy import Hierarchy, metrics

PARITY = Path(__file__).parent.parent / "parity" / "hypernymy_parity.json.gz"
COLUMNS = {
    "subtree_in_prob": ("isp", metrics.in_subtree_probability),
    "subtree_is": ("scs_raw", metrics.subtree_coverage_score),
    "subtree_entropy": ("subtree_entropy", metrics.subtree_entropy),
    "subtree_marginal_entropy": ("marginal_entropy", metrics.marginal_entropy),
}


@pytest.fixture(scope="module")
def imagenet():
    return Hierarchy.imagenet()


@pytest.fixture(scope="module")
def published():
    return json.loads(gzip.decompress(PARITY.read_bytes()))


@pytest.fixture(scope="module")
def logits(imagenet, published):
    rng = np.random.default_rng(published["seed"])
    shape = (published["samples"], 1000)
    return {
        name: (published["scale"] * rng.standard_normal(shape)).astype(np.float32)
        for name in imagenet.synsets
    }


@pytest.fixture(scope="module")
def measured(logits, imagenet):
    return metrics.measure(logits, imagenet)


@pytest.mark.parametrize("name", COLUMNS)
def test_every_published_value(published, measured, name):
    theirs = published["metrics"][name]
    ours = dict(zip(measured.synsets, getattr(measured, COLUMNS[name][0]), strict=True))
    ours = {synset: value for synset, value in ours.items() if not math.isnan(value)}
    assert len(ours) == (860 if name == "subtree_in_prob" else 472)
    ours["average"] = np.mean(list(ours.values()))
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[key] - theirs[key]) for key in theirs) < 1e-5


@pytest.mark.parametrize("name", COLUMNS)
def test_single_functions_give_the_published_values(published, logits, imagenet, name):
    for synset in list(published["metrics"][name])[:40]:
        value = COLUMNS[name][1](logits[synset], imagenet.subtree(synset))
        assert value == pytest.approx(published["metrics"][name][synset], abs=1e-5)


def test_scs_normaliser_is_the_published_one(imagenet):
    assert metrics.scs_normaliser(imagenet) == pytest.approx(1.6236960327744576, abs=1e-12)
    assert metrics.SCS_NORMALISER == 1.6236960327744576


def test_chance_is_the_published_floor(imagenet):
    uniform = metrics.measure_uniform(imagenet.synsets, imagenet)
    assert uniform.isp.mean() == pytest.approx(0.01343, abs=5e-6)
    several = uniform.classes > 1
    assert uniform.scs_raw[several] == pytest.approx(0, abs=1e-12)
    assert uniform.marginal_entropy[several].mean() == pytest.approx(metrics.SCS_NORMALISER, abs=1e-12)


def measure_by_hand(logits, subtree):
    """The definitions, one number at a time."""
    inside = [c for c, belongs in enumerate(subtree) if belongs]
    probabilities, entropies, average = [], [], [0.0] * len(inside)
    for row in logits:
        total = sum(math.exp(value) for value in row)
        probabilities.append(sum(math.exp(row[c]) / total for c in inside))
        below = sum(math.exp(row[c]) for c in inside)
        q = [math.exp(row[c]) / below for c in inside]
        entropies.append(-sum(x * math.log(x) for x in q))
        average = [a + x / len(logits) for a, x in zip(average, q, strict=True)]
    divergence = 0.0
    for row in logits:
        below = sum(math.exp(row[c]) for c in inside)
        for c, mean in zip(inside, average, strict=True):
            q = math.exp(row[c]) / below
            divergence += q * math.log(q / mean) / len(logits)
    marginal = -sum(x * math.log(x) for x in average)
    return np.mean(probabilities), divergence, np.mean(entropies), marginal


@pytest.mark.parametrize("seed", range(6))
def test_random_hierarchies_agree_with_loops(seed, imagenet):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(3, 12))
    hierarchy = Hierarchy.from_wnids(list(rng.choice(imagenet.wnids, count, replace=False)))
    logits = {
        name: rng.normal(0, 2, (int(rng.integers(1, 7)), count)).astype(np.float32)
        for name in hierarchy.all_synsets
    }
    measured = metrics.measure(logits, hierarchy)
    for i, name in enumerate(measured.synsets):
        subtree = hierarchy.subtree(name)
        isp, scs, mean, marginal = measure_by_hand(logits[name].astype(float).tolist(), subtree)
        assert measured.isp[i] == pytest.approx(isp, abs=1e-12)
        assert measured.classes[i] == subtree.sum()
        assert measured.samples[i] == len(logits[name])
        if subtree.sum() == 1:
            assert np.isnan([measured.scs_raw[i], measured.subtree_entropy[i]]).all()
        else:
            assert measured.scs_raw[i] == pytest.approx(scs, abs=1e-12)
            assert measured.subtree_entropy[i] == pytest.approx(mean, abs=1e-12)
            assert measured.marginal_entropy[i] == pytest.approx(marginal, abs=1e-12)


def test_every_class_is_certain(imagenet):
    logits = np.random.default_rng(0).normal(0, 5, (200, 1000)).astype(np.float32)
    probabilities = metrics.in_subtree_probabilities(logits, imagenet.subtree("entity.n.01"))
    assert probabilities.max() <= 1
    assert probabilities == pytest.approx(1)


def test_huge_logits_do_not_overflow():
    logits = np.array([[1e4, -1e4, 0], [-1e4, 1e4, 0]], dtype=np.float32)
    subtree = np.array([True, True, False])
    assert metrics.in_subtree_probability(logits, subtree) == 1
    assert metrics.subtree_coverage_score(logits, subtree) == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("logits", "subtree", "message"),
    [
        (np.zeros((2, 3)), [True, False], r"must be \[N, 2\]"),
        (np.zeros((0, 2)), [True, False], "N at least 1"),
        (np.zeros(2), [True, False], r"not \[2\]"),
        (np.full((2, 2), np.nan), [True, False], "NaN or infinity"),
        (np.zeros((2, 2), dtype=int), [True, False], "floating point"),
        (np.zeros((2, 2)), [False, False], "holds no class"),
        (np.zeros((2, 2)), [1, 0], "must be bool"),
    ],
)
def test_bad_logits_are_told_in_one_line(logits, subtree, message):
    with pytest.raises(UserError, match=message):
        metrics.in_subtree_probability(logits, np.array(subtree))


def test_measure_names_the_synset_that_is_wrong(imagenet):
    with pytest.raises(UserError, match="logits of dog.n.01 must be"):
        metrics.measure({"dog.n.01": np.zeros((2, 10))}, imagenet)
    with pytest.raises(UserError, match="did you mean dog.n.01"):
        metrics.measure({"dogg.n.01": np.zeros((2, 1000))}, imagenet)
