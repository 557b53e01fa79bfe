"""Agreement of classifiers and ranges of ranks, against brute force and simulations."""

import json

import numpy as np
import pytest
from page_checks import check_page
from report_example import make_run
from scipy.stats import kendalltau, spearmanr

from t2iprobe.hypernymy.agreement import agree_on_runs, agree_on_synsets, rank_runs
from t2iprobe.hypernymy.report import gather_results, write_report
from t2iprobe.spread import describe_ranks


def test_pairs_of_classifiers_are_compared_on_what_both_judged():
    rng = np.random.default_rng(0)
    tables = {
        name: {
            "synsets": [
                {"synset": f"s{k}", "isp": float(rng.random()), "scs": float(rng.random()) if k % 2 else None}
                for k in range(30)
                if k != skipped
            ]
        }
        for name, skipped in (("one", 3), ("two", 4), ("three", 99))
    }
    found = agree_on_synsets(tables)
    assert [(pair["a"], pair["b"]) for pair in found] == [("one", "two"), ("one", "three"), ("two", "three")]
    columns = [{row["synset"]: row for row in tables[name]["synsets"]} for name in ("one", "two")]
    both = sorted(columns[0].keys() & columns[1].keys())
    x, y = ([column[name]["isp"] for name in both] for column in columns)
    assert found[0]["isp"]["n"] == 28
    assert found[0]["isp"]["spearman"] == pytest.approx(spearmanr(x, y).statistic)
    assert found[0]["isp"]["kendall"] == pytest.approx(kendalltau(x, y).statistic)
    assert found[0]["scs"]["n"] == 14
    assert agree_on_runs({"one": [1, 2, 3], "two": [3, 2, 1]})[0]["kendall"] == -1.0


def test_intervals_of_rank_correlations_cover_as_often_as_promised():
    rng, count, repeats, r = np.random.default_rng(1), 60, 400, 0.6
    truth = {"spearman": 6 / np.pi * np.arcsin(r / 2), "kendall": 2 / np.pi * np.arcsin(r)}
    hits = dict.fromkeys(truth, 0)
    for _ in range(repeats):
        x = rng.standard_normal(count)
        y = r * x + np.sqrt(1 - r * r) * rng.standard_normal(count)
        found = describe_ranks(x, y)
        for name, value in truth.items():
            low, high = found[f"{name}_interval"]
            hits[name] += low <= value <= high
    # 400 intervals of 95 %: fewer than 92 % or more than 98 % would be 2.8 standard errors off
    assert all(0.92 <= hit / repeats <= 0.98 for hit in hits.values()), hits


def test_what_has_no_ranks_has_no_number():
    assert describe_ranks([1, 1, 1], [1, 2, 3]) == {
        "spearman": None, "spearman_interval": None, "kendall": None, "kendall_interval": None, "n": 3
    }  # fmt: skip
    assert describe_ranks([1, 2, 3, 4, 5], [1, 2, 3, 4, 5])["spearman_interval"] is None
    assert describe_ranks([1, 2, 3], [1, 3, 2])["kendall_interval"] is None


def test_ranges_of_ranks():
    rng = np.random.default_rng(2)
    common = rng.normal(0, 1, 200)
    shifts = np.array([0.0, 0.01, 1.0])
    values = common + shifts[:, None] + rng.normal(0, 0.2, (3, 200))
    values[:, 5] = np.nan
    found = rank_runs(values)
    assert [(row["best"], row["worst"]) for row in found] == [(2, 3), (2, 3), (1, 1)]
    assert found[2]["rank"] == 1
    assert {row["synsets"] for row in found} == {199}
    same = rank_runs(np.stack([common, common]))
    assert [(row["rank"], row["best"], row["worst"]) for row in same] == [(1, 1, 2)] * 2
    assert rank_runs(common[None])[0] | {"synsets": 0} == {"rank": 1, "best": 1, "worst": 1, "synsets": 0}


def test_ranges_hold_the_true_ranks_as_often_as_promised():
    rng, repeats, missed = np.random.default_rng(3), 150, 0
    truth = [4, 3, 2, 1]
    for repeat in range(repeats):
        values = np.array([0.0, 0.05, 0.1, 0.6])[:, None] + rng.normal(0, 0.5, (4, 60))
        found = rank_runs(values, seed=repeat)
        missed += any(not row["best"] <= rank <= row["worst"] for row, rank in zip(found, truth, strict=True))
        assert found[3]["worst"] == 1 or repeat  # the fourth is far above the others
    assert missed / repeats <= 0.08


def test_a_report_of_several_classifiers_shows_their_agreement(tmp_path):
    from jsonschema import Draft202012Validator

    from t2iprobe.pages import read_asset

    synsets = ["dog.n.01", "bird.n.01", "vehicle.n.01", "fruit.n.01", "insect.n.01", "acarine.n.01"]
    run = make_run(tmp_path / "run", synsets, classifiers=("embedded", "timm:a", "timm:b"), pictures=False)
    results = gather_results(run)
    assert results["agreement"] == agree_on_synsets(results["classifiers"])
    assert len(results["agreement"]) == 3
    Draft202012Validator(json.loads(read_asset("results.schema.json"))).validate(results)
    page = check_page(write_report(run).read_text())
    assert "How two classifiers rank the synsets" in page.texts["classifiers"]
    assert "agreement" not in gather_results(make_run(tmp_path / "one", synsets, pictures=False))
