"""Spread and rank agreement against hand-made values."""

import numpy as np
import pytest

from t2iprobe.spread import correlate_ranks, describe_spread, rank_agreement, subset_spread


def test_spread_of_known_values() -> None:
    found = describe_spread([0.2, 0.4, 0.6, np.nan])
    assert found == pytest.approx(
        {"mean": 0.4, "sd": np.sqrt(0.08 / 3), "min": 0.2, "max": 0.6, "range": 0.4, "templates": 3}
    )
    with pytest.raises(ValueError, match="no score"):
        describe_spread([np.nan])


def test_ranks_by_hand() -> None:
    # 1 - 6 Σd² / (n (n² - 1)) = 1 - 6 · 2 / 60; of six pairs one is turned round
    assert correlate_ranks([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx((0.8, 4 / 6))
    assert np.isnan(correlate_ranks([1, 1, 1], [1, 2, 3])[0])


def test_agreement_counts_pairs_that_have_ranks() -> None:
    found = rank_agreement([[1, 2, 3], [3, 2, 1], [5, 5, 5]])
    assert found == {"spearman": -1.0, "kendall": -1.0, "pairs": 1}
    assert rank_agreement([[1, 2, 3]])["spearman"] is None


def test_all_subsets_where_they_are_few() -> None:
    found = subset_spread(lambda members: sum(members), 4, 2)
    assert (found["subsets"], found["min"], found["max"], found["mean"]) == (6, 1, 5, 3.0)
    many = subset_spread(lambda members: len(set(members)), 30, 5, draws=50)
    assert (many["subsets"], many["mean"], many["sd"]) == (50, 5.0, 0.0)
    with pytest.raises(ValueError, match="no 3 of 2"):
        subset_spread(len, 2, 3)
