"""Intervals of adaptive runs cover under their stopping rule, and take fewer pictures than equal numbers."""

import numpy as np
import pytest

from t2iprobe.hypernymy import allocation
from t2iprobe.hypernymy.allocation import Against, Halves, estimate_mean, follow_mean, plan_units

SYNSETS = 300


def draw_skewed(rng, means, units):
    """Values near 0 or 1, as those of real probes are."""
    size = 1 / 0.3 - 1
    return rng.beta((means * size)[:, None], ((1 - means) * size)[:, None], (len(means), units))


@pytest.fixture(scope="module")
def means():
    """Most synsets are hardly known, some well."""
    return np.clip(np.random.default_rng(0).beta(0.1, 0.9, SYNSETS), 1e-3, 0.999)


@pytest.fixture(scope="module")
def courses(means):
    """Two hundred runs of a known truth, with their values."""
    found = []
    for number in range(200):
        values = draw_skewed(np.random.default_rng(number), means, 160)
        found.append((follow_mean(values, np.full(SYNSETS, 160), 160, 0.0025), values))
    return found


def test_the_interval_covers_under_the_rule(courses, means):
    covered = np.mean([abs(c.estimate.value - means.mean()) <= c.estimate.half_width for c, _ in courses])
    errors = np.array([course.estimate.value - means.mean() for course, _ in courses])

    assert all(course.reason == "reached" for course, _ in courses)
    assert all(course.estimate.half_width <= 0.0025 for course, _ in courses)
    assert 0.91 <= covered <= 0.99  # 95 % of 200, give or take 2.6 standard errors
    assert abs(errors.mean()) < 3 * errors.std(ddof=1) / np.sqrt(len(errors))


def test_the_plain_mean_of_such_a_run_leans_low(courses, means):
    """So the halves are needed: the mean of all its pictures would not do."""
    plain = [
        np.mean([row[:units].mean() for row, units in zip(values, course.wanted, strict=True)]) - means.mean()
        for course, values in courses
    ]

    assert np.mean(plain) < -5 * np.std(plain, ddof=1) / np.sqrt(len(plain))


def test_fewer_pictures_than_equal_numbers_are_enough(courses, means):
    variances = 0.3 * means * (1 - means)
    equal = 1.96**2 * variances.mean() / (SYNSETS * 0.0025**2)
    best = equal * np.sqrt(variances).mean() ** 2 / variances.mean()  # Neyman's, who knows the spreads
    used = np.mean([course.wanted.mean() for course, _ in courses])

    assert equal > 20
    assert best < used < 0.75 * equal


def test_a_half_is_not_decided_by_its_own_pictures(means):
    """Other first pictures of one half change how many the other gets, and not how many it gets itself."""
    values = draw_skewed(np.random.default_rng(1), means, 8)
    halves = Halves.split(values, 8)
    changed = values.copy()
    assert means[1] < 0.01
    changed[1, ::2] = [0.0, 1.0, 0.0, 1.0]  # the first half of one synset, which never hit
    weights = [plan_units(each).predicted for each in (halves, Halves.split(changed, 8))]

    ratio = weights[1] / weights[0]
    others = np.delete(ratio, 1, axis=1)
    assert ratio[1, 1] > 5
    # Itself it moves only as one of all the synsets that the mix is fitted to: no more than the others do.
    assert abs(np.log(ratio[0, 1])) <= np.abs(np.log(others)).max() + 1e-9
    assert np.abs(np.log(others)).max() < 0.7 < np.log(ratio[1, 1])


def test_moments_of_halves_are_those_of_their_units():
    rng = np.random.default_rng(2)
    values = rng.random((4, 12))
    values[:, 9:] = np.nan
    halves = Halves.split(values, 4).extend(np.array([[2, 4, 3, 2], [2, 2, 6, 2]]))

    assert halves.counts.tolist() == [[2, 4, 3, 2], [2, 2, 6, 2]]
    for s in range(4):
        first, used = halves.counts[0, s] - 2, int(halves.counts[:, s].sum())
        mine = [values[s, i] for i in [0, 2, *range(4, 4 + first)]]
        theirs = [values[s, i] for i in [1, 3, *range(4 + first, used)]]
        assert halves.means[:, s] == pytest.approx([np.mean(mine), np.mean(theirs)])
        assert halves.variances[:, s] == pytest.approx([np.var(mine, ddof=1), np.var(theirs, ddof=1)])
    found = estimate_mean(halves)
    assert found.value == pytest.approx(halves.means.mean())
    parts = halves.variances / halves.counts
    assert found.stderr == pytest.approx(np.sqrt(parts.sum()) / 2 / 4)


def test_equal_numbers_give_the_usual_estimate():
    values = np.random.default_rng(3).random((50, 5))
    found = estimate_mean(Halves.split(values, 5))

    assert found.value == pytest.approx(values.mean())
    assert found.stderr == pytest.approx(np.sqrt((values.var(axis=1, ddof=1) / 5).sum()) / 50)
    assert found.means == pytest.approx(values.mean(axis=1))


def test_what_is_stored_beyond_the_rule_does_not_matter(means):
    """A course is read off the same way however much of it is stored: a kill changes nothing."""
    values = draw_skewed(np.random.default_rng(4), means, 64)
    whole = follow_mean(values, np.full(SYNSETS, 64), 64, 0.004)
    stored, steps = np.zeros(SYNSETS, np.int64), 0
    while True:
        known = np.where(np.arange(64) < stored[:, None], values, np.nan)
        course = follow_mean(known, stored, 64, 0.004)
        if course.reason:
            break
        assert (course.wanted >= stored).all()
        # One picture at a time of those that lack some: what a kill may leave.
        stored = np.where(stored < course.wanted, stored + 1, stored)
        steps += 1

    assert steps > 4
    assert (stored == whole.wanted).all()
    assert course.looks == whole.looks
    assert [look.units for look in whole.looks] == sorted(look.units for look in whole.looks)


def test_the_limit_ends_a_run_that_cannot_reach_its_width(means):
    values = draw_skewed(np.random.default_rng(5), means, 7)
    course = follow_mean(values, np.full(SYNSETS, 7), 7, 0.0001)

    assert course.reason == "limit"
    assert (course.wanted == 7).all()


def test_pictures_that_all_miss_do_not_end_a_run_of_few_words():
    """Four synsets of pictures that show nothing: what 3 in N of them may still show is wider than asked."""
    values = np.full((4, 400), 1e-4)
    course = follow_mean(values, np.full(4, 400), 400, 0.01)

    assert course.reason == "reached"
    assert (course.wanted >= 3 / (4 * 0.01)).all()
    assert course.estimate.half_width >= 3 / course.wanted.sum()


def test_a_difference_covers_and_counts_pairs():
    """Two models of the same noise: values that move together make a difference surer, as it should be."""
    widths, covered = {0.0: [], 0.8: []}, {0.0: [], 0.8: []}
    levels = np.linspace(0.2, 0.7, 60)
    for together in widths:
        for number in range(100):
            rng = np.random.default_rng([number, 5])
            shared, own, other = (rng.uniform(-0.2, 0.2, (60, 40)) for _ in range(3))
            theirs = levels[:, None] - 0.05 + together * shared + (1 - together) * other
            ours = levels[:, None] + together * shared + (1 - together) * own
            against = Against(
                theirs[:, :20].mean(axis=1),
                theirs[:, :20].var(axis=1, ddof=1) / 20,
                np.full(60, 20),
                theirs[:, :20],
            )
            course = follow_mean(ours, np.full(60, 40), 40, 0.006, against)
            covered[together].append(abs(course.estimate.value - 0.05) <= course.estimate.half_width)
            fixed = allocation.estimate_mean(Halves.split(ours, 20), against)
            widths[together].append(fixed.half_width / np.sqrt(1 + together))
    for together in covered:
        assert 0.87 <= np.mean(covered[together]) <= 1
    assert np.mean(widths[0.8]) < 0.6 * np.mean(widths[0.0])


def test_pictures_that_share_noise_come_first(means, monkeypatch):
    """Beyond the pairs more of ours say little of a difference: other synsets get them."""
    values = draw_skewed(np.random.default_rng(6), means, 200)
    rest = draw_skewed(np.random.default_rng(7), means, 16)
    theirs = np.where(np.random.default_rng(8).random(rest.shape) < 0.8, values[:, :16], rest)
    moments = theirs.mean(axis=1), theirs.var(axis=1, ddof=1) / 16, np.full(SYNSETS, 16)

    def follow(known):
        return follow_mean(values, np.full(SYNSETS, 200), 200, 0.003, Against(*moments, known))

    paired, alone = follow(theirs), follow(np.full_like(theirs, np.nan))
    monkeypatch.setattr(allocation, "LEAST_BEYOND", 1.0)
    by_spread = follow(theirs)
    assert (paired.reason, paired.wanted.max()) == ("reached", 16)
    assert alone.wanted.max() == 200  # theirs alone leave more than that, where nothing is known of pairs
    assert by_spread.wanted.sum() > paired.wanted.sum()
