"""The leaderboard: ranks among runs that compare, marks on those that do not, files and page."""

import csv
import json

import numpy as np
import pytest
from page_checks import check_page
from report_example import make_run
from typer.testing import CliRunner

from t2iprobe.cli import app
from t2iprobe.errors import UserError
from t2iprobe.hypernymy.leaderboard import analyse_leaderboard, read_entries, write_leaderboard, write_rank
from t2iprobe.hypernymy.report import write_report

SYNSETS = [
    "dog.n.01", "bird.n.01", "vehicle.n.01", "fruit.n.01", "insect.n.01", "cat.n.01", "furniture.n.01",
    "boat.n.01", "hat.n.01", "snake.n.01", "tool.n.01", "bear.n.01", "shark.n.01", "monkey.n.01",
    "fish.n.01", "fungus.n.01",
]  # fmt: skip


def make(path, synsets=SYNSETS, **settings):
    run = make_run(path, synsets, pictures=False, **settings)
    write_report(run)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    both = ("embedded", "timm:other")
    return {
        "good": make(folder / "good", logits_seed=1, skill=1.0, model="good", classifiers=both),
        "bad": make(folder / "bad", logits_seed=2, skill=0.0, model="bad", classifiers=both),
        "fair": make(folder / "fair", logits_seed=3, skill=1.0, model="fair", classifiers=both),
        "small": make(folder / "small", synsets=SYNSETS[:4], logits_seed=4, skill=1.0, model="small"),
        "few": make(folder / "few", samples=2, logits_seed=5, skill=1.0, model="few"),
    }


def test_ranks_and_their_ranges(runs):
    results = analyse_leaderboard(read_entries([runs[name] for name in ("bad", "good", "fair")]))
    table = results["classifiers"]["EfficientNet-Lite0"]
    by_run = {row["run"]: row for row in table}
    assert [row["run"] for row in table] == sorted(by_run, key=lambda name: -by_run[name]["isp"]["value"])
    bad = by_run["bad"]["ranks"]["isp"]
    assert (bad["rank"], bad["best"], bad["worst"], bad["synsets"]) == (3, 3, 3, 16)
    assert {by_run[name]["ranks"]["isp"]["worst"] for name in ("good", "fair")} == {2}
    stated = json.loads((runs["good"] / "results.json").read_text())["results"]
    for metric in ("isp", "scs"):
        assert by_run["good"][metric] == stated[metric]
    assert not any(row["differs"] or row["scs_differs"] for row in table)
    assert list(results["classifiers"]) == ["EfficientNet-Lite0", "timm:other"]
    (agreement,) = results["agreement"]["isp"]
    other = {row["run"]: row["isp"]["value"] for row in results["classifiers"]["timm:other"]}
    columns = [
        [by_run[run]["isp"]["value"] for run in agreement["runs"]],
        [other[run] for run in agreement["runs"]],
    ]
    ranks = [np.argsort(np.argsort(column)) for column in columns]
    assert agreement["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert agreement["spearman_interval"] is None


def test_what_does_not_compare_is_marked_and_has_no_rank(runs):
    results = analyse_leaderboard(read_entries(list(runs.values())))
    table = {row["run"]: row for row in results["classifiers"]["EfficientNet-Lite0"]}
    assert table["small"]["differs"] == ["4 synsets, not the 16 (12 missing, 0 more)"]
    assert table["small"]["ranks"] == {"isp": None, "scs": None}
    assert table["few"]["differs"] == []
    assert table["few"]["scs_differs"] == ["N = 2, not 4"]
    assert table["few"]["ranks"]["isp"]["rank"] > 0
    assert table["few"]["ranks"]["scs"] is None
    assert results["unjudged"]["timm:other"] == ["small", "few"]
    assert list(table)[-1] == "small"  # after those that compare


def test_other_weights_or_classes_do_not_compare(runs):
    entries = read_entries([runs["good"], runs["fair"], runs["bad"]])
    entries["fair"]["identity"]["classifiers"]["embedded"]["hash"] = "sha256:other"
    entries["bad"]["identity"]["hierarchy"] = "sha256:other"
    tables = analyse_leaderboard(entries)["classifiers"]
    rows = {row["run"]: row for row in tables["EfficientNet-Lite0"]}
    assert rows["fair"]["differs"] == ["other weights of the classifier"]
    assert rows["bad"]["differs"] == ["other classes"]
    assert rows["good"]["ranks"]["isp"]["rank"] == 1
    assert {row["run"]: row["differs"] for row in tables["timm:other"]}["fair"] == []


def test_runs_of_one_model_are_told_apart_by_their_folders(runs, tmp_path):
    twins = [
        make(tmp_path / name, SYNSETS[:2], logits_seed=k, model="m") for k, name in enumerate(("x", "y"))
    ]
    assert list(read_entries(twins)) == ["m (x)", "m (y)"]
    assert list(read_entries([twins[0], twins[1] / "results.json"])) == ["m (x)", "m (y)"]
    with pytest.raises(UserError, match="two of the runs are called"):
        read_entries([twins[0], twins[0]])
    with pytest.raises(UserError, match="is not a run directory"):
        read_entries([tmp_path / "nothing"])
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match="nor the results.json"):
        read_entries([tmp_path / "other.json"])
    (twins[0] / "results.json").unlink()
    with pytest.raises(UserError, match="no results yet"):
        read_entries(twins)


def test_the_command_writes_page_csv_markdown_and_json(runs, tmp_path):
    out = tmp_path / "board.html"
    words = ["hypernymy", "leaderboard", *map(str, runs.values()), "--out", str(out)]
    result = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads(out.with_suffix(".json").read_text())
    page = check_page(out.read_text())
    assert {"runs-0", "runs-1", "agreement-table", "settings-table"} <= set(page.ids)
    assert "small does not compare: 4 synsets, not the 16" in page.texts["judge-0"]
    rows = list(csv.DictReader(out.with_suffix(".csv").open()))
    assert [(row["run"], row["classifier"]) for row in rows].count(("good", "timm:other")) == 1
    assert len(rows) == 5 + 3
    few = next(row for row in rows if row["run"] == "few")
    assert (few["scs_rank"], few["differs"]) == ("", "N = 2, not 4")
    assert out.with_suffix(".md").read_text().count("| good |") == 2
    with pytest.raises(UserError, match="there is no folder"):
        write_leaderboard([runs["good"]], tmp_path / "no" / "board.html")


def test_a_name_with_dots_is_kept(runs, tmp_path):
    for name in ("board.v1.5", "board.v1.6.html"):
        words = ["hypernymy", "leaderboard", str(runs["good"]), "--out", str(tmp_path / name)]
        page = tmp_path / f"{name.removesuffix('.html')}.html"
        assert CliRunner().invoke(app, words).stdout.endswith(f"wrote {page}\n")
        assert all(page.with_suffix(ending).exists() for ending in (".html", ".csv", ".md", ".json"))
    assert len(list(tmp_path.iterdir())) == 8


def test_ranks_as_text():
    assert write_rank({"rank": 2, "best": 1, "worst": 3}) == "2 (1–3)"
    assert write_rank({"rank": 1, "best": 1, "worst": 1}) == "1"
    assert write_rank(None) == "–"
