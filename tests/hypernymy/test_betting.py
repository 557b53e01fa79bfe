"""Bets are fair where there is nothing to win, find what is there, and may be settled at any time."""

import itertools

import numpy as np
import pytest

from t2iprobe.hypernymy.betting import ALPHA, find_limits, follow_unknown, wealth_above, wealth_below


@pytest.mark.parametrize("mean", [0.01, 0.2])
def test_a_fair_bet_wins_nothing_on_average(mean):
    """Exactly, over all results of six pictures of which each hits with probability `mean`."""
    expected = np.zeros(2)
    for hits in itertools.product([0.0, 1.0], repeat=6):
        chance = np.prod([mean if hit else 1 - mean for hit in hits])
        values = np.array(hits)
        expected += chance * np.array([wealth_above(values, mean), wealth_below(values, mean)])

    assert expected == pytest.approx([1, 1])


def test_wealth_is_hardly_ever_large_at_any_time_by_luck():
    """At a mean of exactly the chance, wealth of 20 is ever reached by at most one gambler in 20 (Ville)."""
    rng = np.random.default_rng(0)
    reached = np.zeros(2)
    for _ in range(400):
        values = (rng.random(60) < 0.2).astype(float)
        ends = range(1, 61, 3)
        reached += [
            max(wealth_above(values[:n], 0.2) for n in ends) >= 20,
            max(wealth_below(values[:n], 0.2) for n in ends) >= 20,
        ]

    assert (reached / 400 <= 0.05 + 2.6 * np.sqrt(0.05 * 0.95 / 400)).all()


def test_words_are_decided_early_and_rightly():
    """A third exactly at chance, a third exactly at the limit, a third known: the hardest truths."""
    rng = np.random.default_rng(1)
    count, limit = 150, 64
    chances = np.full(count, 0.01)
    limits = find_limits(chances, 0.2)
    means = np.repeat([0.01, limits[0], 0.6], 50)
    false_known, false_unknown, units = [], [], []
    for _ in range(20):
        values = (rng.random((count, limit)) < means[:, None]).astype(float)
        course, bets = follow_unknown(values, np.full(count, limit), limit, chances, 0.2)
        known = bets.verdicts == "known"
        unknown = bets.q_unknown <= ALPHA
        false_known.append((known & (means <= chances)).sum() / max(known.sum(), 1))
        false_unknown.append((unknown & (means >= limits)).sum() / max(unknown.sum(), 1))
        units.append(course.wanted[100:].mean())
        assert known[100:].mean() > 0.95
        assert course.reason in ("reached", "limit")

    assert np.mean(false_known) <= ALPHA
    assert np.mean(false_unknown) <= ALPHA
    assert np.mean(units) < 10


def test_a_verdict_stays_and_costs_no_more_pictures():
    rng = np.random.default_rng(2)
    means = np.r_[np.full(30, 0.8), np.full(30, 0.005)]
    values = np.clip(rng.normal(means[:, None], 0.004, (60, 40)), 0, 1)
    chances = np.full(60, 0.02)
    stored, verdicts = np.full(60, 4), np.full(60, "undecided", dtype="<U9")
    while True:
        course, bets = follow_unknown(values, stored, 40, chances, 0.2)
        settled = verdicts != "undecided"
        assert (bets.verdicts[settled] == verdicts[settled]).all()
        verdicts = bets.verdicts
        if course.reason:
            break
        assert (course.wanted[verdicts != "undecided"] <= stored[verdicts != "undecided"]).all()
        stored = course.wanted

    assert course.reason == "reached"
    assert (verdicts == np.repeat(["known", "unknown"], 30)).all()
    assert (stored[:30] == 4).all()
    assert stored[30:].max() < 24


def test_a_synset_above_every_class_is_known():
    values = np.ones((2, 8))
    values[1] = 0.5
    course, bets = follow_unknown(values, np.full(2, 8), 8, np.array([1.0, 0.02]), 0.2)

    assert bets.verdicts.tolist() == ["known", "known"]
    assert course.reason == "reached"
