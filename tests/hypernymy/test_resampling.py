"""The building blocks of every interval and test, against brute force and known answers."""

import numpy as np
import pytest

from t2iprobe.hypernymy import resampling
from t2iprobe.hypernymy.metrics import entropy


def test_jackknife_pseudo_values_by_hand():
    q = np.random.default_rng(0).dirichlet(np.ones(4), size=5)
    expected = [
        5 * entropy(q.mean(axis=0)) - 4 * entropy(np.delete(q, n, axis=0).mean(axis=0)) for n in range(5)
    ]
    assert resampling.jackknife_entropy(q) == pytest.approx(np.array(expected), abs=1e-12)
    assert np.isnan(resampling.jackknife_entropy(q[:1])).all()


@pytest.mark.parametrize(("count", "classes"), [(4, 2), (8, 5), (8, 20), (32, 50)])
def test_jackknife_is_closer_to_the_truth_than_the_plug_in(count, classes):
    """A perfect generator: one class a picture, all classes alike; the truth is ln K."""
    rng = np.random.default_rng(1)
    q = np.eye(classes)[rng.integers(0, classes, size=(400, count))]
    truth = np.log(classes)
    plug_in = np.mean([entropy(pictures.mean(axis=0)) for pictures in q])
    corrected = np.mean([resampling.jackknife_entropy(pictures).mean() for pictures in q])
    assert plug_in < truth
    assert abs(corrected - truth) < 0.6 * abs(plug_in - truth)


def test_plug_in_of_a_perfect_generator_is_as_biased_as_published():
    """Normalised SCS .70, .81, .88, .92, .96 at N = 8, 16, 32, 64, 128 over the paper's subtrees."""
    from t2iprobe.hypernymy import Hierarchy

    sizes = Hierarchy.imagenet().subtrees.sum(axis=1)
    sizes = sizes[sizes > 1]
    rng = np.random.default_rng(2)
    for count, published in [(8, 0.70), (16, 0.81), (32, 0.88), (64, 0.92), (128, 0.96)]:
        drawn = [np.bincount(rng.integers(0, size, count), minlength=size) / count for size in sizes]
        scs = np.mean([entropy(q) for q in drawn]) / np.log(sizes).mean()
        assert scs == pytest.approx(published, abs=0.01)


@pytest.mark.parametrize("count", [2, 4, 32])
def test_bootstrap_means_have_the_standard_error_of_the_mean(count):
    values = np.random.default_rng(3).normal(size=(count, 2))
    replicates = resampling.bootstrap_means(values, 20_000, np.random.default_rng(4))
    assert replicates.mean(axis=0) == pytest.approx(values.mean(axis=0), abs=0.03)
    assert replicates.std(axis=0) == pytest.approx(values.std(axis=0, ddof=1) / count**0.5, rel=0.03)


def test_one_picture_has_no_spread():
    assert np.isnan(resampling.bootstrap_means(np.ones((1, 3)), 5, np.random.default_rng(0))).all()


POPULATIONS = {
    "often": lambda rng, shape: np.where(
        rng.random(shape) < 0.3, rng.beta(8, 2, shape), rng.beta(0.3, 30, shape)
    ),
    "rarely": lambda rng, shape: np.where(
        rng.random(shape) < 0.05, rng.beta(8, 2, shape), rng.beta(0.3, 300, shape)
    ),
    "never": lambda rng, shape: rng.beta(0.2, 20, shape),
    "always": lambda rng, shape: rng.beta(5, 0.5, shape),
}


@pytest.mark.parametrize("count", [4, 8, 32])
@pytest.mark.parametrize("name", POPULATIONS)
def test_interval_of_one_synset_covers_its_mean(name, count):
    rng = np.random.default_rng(5)
    truth = POPULATIONS[name](rng, 1_000_000).mean()
    covered = 0
    for values in POPULATIONS[name](rng, (300, count)):
        low, high = resampling.bootstrap_probability(values, 300, rng)
        assert 0 <= low <= values.mean() <= high <= 1
        covered += low <= truth <= high
    assert covered / 300 >= 0.9


@pytest.mark.parametrize("count", [40, 400])
def test_interval_over_synsets_covers_the_mean_of_their_population(count):
    from t2iprobe.hypernymy.samples import estimate

    rng = np.random.default_rng(10)
    truth = POPULATIONS["often"](rng, 1_000_000).mean()
    covered = 0
    for values in POPULATIONS["often"](rng, (300, count)):
        rows = resampling.bootstrap_rows(count, 200, rng)
        low, high = estimate(values, np.repeat(values[None], 200, axis=0), rows)["interval_synsets"]
        covered += low <= truth <= high
    assert 0.89 <= covered / 300 <= 0.99


def test_benjamini_hochberg_known_answer():
    p = np.array([0.01, 0.04, np.nan, 0.03, 0.005, 0.9])
    assert resampling.benjamini_hochberg(p)[[0, 1, 3, 4, 5]] == pytest.approx([0.025, 0.05, 0.05, 0.025, 0.9])
    assert np.isnan(resampling.benjamini_hochberg(p)[2])


def test_benjamini_hochberg_equals_scipy():
    from scipy import stats

    p = np.random.default_rng(6).random(200) ** 2
    assert resampling.benjamini_hochberg(p) == pytest.approx(stats.false_discovery_control(p))
    assert len(resampling.benjamini_hochberg(np.array([]))) == 0


def test_benjamini_hochberg_controls_false_discoveries():
    rng = np.random.default_rng(7)
    shares = []
    for _ in range(300):
        p = rng.random(100)
        p[:30] = rng.beta(0.1, 5, 30)  # 30 true effects
        found = resampling.benjamini_hochberg(p) <= 0.1
        assert found[:30].sum() > 5
        shares.append(found[30:].sum() / max(found.sum(), 1))
    assert 0.04 < np.mean(shares) < 0.1  # at most .1, and not for want of findings


def test_sign_flips_enumerated_by_hand():
    differences = np.array([0.5, 1.0, 2.0, 0.25])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 4)).reshape(4, -1).T
    exact = (np.abs(signs @ differences) >= differences.sum()).mean()  # 2 of 16
    found = resampling.sign_flip_test(differences[:, None], 20_000, np.random.default_rng(8))
    assert found == pytest.approx([exact], abs=0.01)


def test_sign_flips_are_fair_without_a_difference_and_see_one():
    rng = np.random.default_rng(9)
    null = resampling.sign_flip_test(rng.normal(size=(50, 400)), 500, rng)
    assert 0.02 < (null <= 0.05).mean() < 0.08
    shifted = np.c_[rng.normal(1, 1, 50), np.full(50, np.nan), np.zeros(50)]
    p = resampling.sign_flip_test(shifted, 500, rng)
    assert p[0] < 0.01
    assert np.isnan(p[1])
    assert p[2] == 1


def test_interval_and_nanmean_of_nothing_are_nan():
    assert np.isnan(resampling.interval(np.full(5, np.nan))).all()
    assert np.isnan(resampling.nanmean(np.array([np.nan, np.nan])))
    assert resampling.nanmean(np.array([[1, np.nan], [2, 4]])).tolist() == [1, 3]
