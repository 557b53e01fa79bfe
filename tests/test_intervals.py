import itertools

import numpy as np
import pytest

from t2iprobe.intervals import (
    describe_difference,
    describe_mean,
    describe_probability,
    holm,
    jackknife_pairs,
)


def test_holm_matches_the_worked_example_and_leaves_out_what_was_not_tested() -> None:
    # Holm's steps by hand: .005 · 4, .01 · 3, .03 · 2, then no smaller than the one before.
    assert holm([0.01, 0.04, 0.03, None, 0.005]) == pytest.approx([0.03, 0.06, 0.06, None, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_keeps_the_chance_of_any_false_finding_below_alpha() -> None:
    rng = np.random.default_rng(0)

    false = [any(q <= 0.05 for q in holm(list(rng.random(14)))) for _ in range(2000)]

    assert 0.03 < np.mean(false) < 0.065


def test_p_of_pairs_is_the_share_of_sign_patterns_that_reach_the_difference() -> None:
    rng = np.random.default_rng(1)
    before, after = rng.random(7), rng.random(7) + 0.2
    differences = after - before
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product([-1, 1], repeat=7)]
    exact = np.mean(np.array(sums) >= abs(differences.sum()) - 1e-12)

    found = describe_difference(before, after)

    assert found["p"] == pytest.approx(exact, abs=0.015)
    assert found["value"] == pytest.approx(differences.mean())
    assert found["interval"][0] < found["value"] < found["interval"][1]


def test_pairing_takes_out_what_the_pictures_have_in_common() -> None:
    rng = np.random.default_rng(2)
    common = rng.normal(size=40)
    after = common + 0.1 + 0.01 * rng.normal(size=40)

    paired = describe_difference(common, after)
    shuffled = describe_difference(rng.permutation(common), after)

    assert paired["p"] < 0.001 < 0.2 < shuffled["p"]
    assert np.diff(paired["interval"]) < 0.02 < np.diff(shuffled["interval"])


def test_intervals_of_a_mean_cover_it_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    intervals = [describe_mean(rng.normal(size=20), seed)["interval"] for seed in range(300)]

    assert 0.89 < np.mean([low <= 0 <= high for low, high in intervals]) < 0.985


def test_one_picture_has_no_interval_and_no_p() -> None:
    assert describe_mean([0.5]) == {"value": 0.5, "interval": None}
    assert describe_difference([0.5], [0.75]) == {"value": 0.25, "interval": None, "p": None}


def test_equal_probabilities_do_not_look_certain() -> None:
    found = describe_probability(np.zeros(8))

    assert found["value"] == 0
    assert found["interval"][0] == 0
    assert found["interval"][1] > 0.2


def test_pseudo_values_of_pairs_have_the_mean_of_the_pairs_and_its_error() -> None:
    rng = np.random.default_rng(4)

    def pairs(points: np.ndarray) -> np.ndarray:
        return np.abs(points[:, None] - points[None])

    points = rng.normal(size=12)
    distances = pairs(points)
    values = jackknife_pairs(distances)
    off = distances[~np.eye(12, dtype=bool)]
    assert values.mean() == pytest.approx(off.mean())
    # leaving one out, by hand
    left = [pairs(np.delete(points, i))[~np.eye(11, dtype=bool)].mean() for i in range(12)]
    assert values == pytest.approx(12 * off.mean() - 11 * np.array(left))

    many = [jackknife_pairs(pairs(rng.normal(size=30))) for _ in range(400)]
    true_error = np.std([each.mean() for each in many])
    assert np.mean([each.std(ddof=1) / np.sqrt(30) for each in many]) == pytest.approx(true_error, rel=0.15)
    assert np.isnan(jackknife_pairs(np.zeros((2, 2)))).all()
