"""The published grid and its draws, and the published tables from the published runs."""

import json
from pathlib import Path

import pytest

from t2iprobe.errors import UserError
from t2iprobe.llm.template_tables import (
    choose_runs,
    read_runs,
    tabulate_ensembles,
    tabulate_ranks,
    tabulate_spread,
    tabulate_transfer,
)
from t2iprobe.llm.templates import Template, list_templates, random_templates

FORMAT = Path(__file__).parents[3] / "shared" / "reference" / "format"
published = pytest.mark.skipif(not FORMAT.is_dir(), reason="the published runs are not there")
METHODS = ("direct_False", "channel_True", "calibrate_True")


def test_the_grids_have_the_published_sizes() -> None:
    assert len(set(list_templates("sst2"))) == 240
    for dataset in ("agnews", "dbpedia", "trec"):
        assert len(set(list_templates(dataset))) == 192
    assert len(set(list_templates("sst2", demonstrated=False))) == 80


def test_a_template_writes_demonstrations_and_the_other_way_round() -> None:
    template = Template("text: {}", "It was {}.", "\n", "\n\n")
    assert template.parts("{a} b", "bad") == ("text: {a} b", "It was bad.")
    assert template.parts("ab", "bad", channel=True) == ("It was bad.", "text: ab")
    assert template.context([("x", "good"), ("y", "bad")]) == (
        "text: x\nIt was good.\n\ntext: y\nIt was bad.\n\n"
    )
    assert template.context([("x", "good")], channel=True) == "It was good.\ntext: x\n\n"
    assert template.context([]) == ""


def test_what_is_no_template_is_refused() -> None:
    with pytest.raises(UserError, match="needs {} where"):
        Template("text", "{}", " ")
    with pytest.raises(UserError, match="did you mean agnews"):
        random_templates("agnew", 3, 0)
    with pytest.raises(UserError, match="1 template or more"):
        random_templates("sst2", 0, 0)


def test_without_demonstrations_nothing_is_drawn_to_part_them() -> None:
    assert {template.big_separator for template in random_templates("sst2", 50, 1, demonstrated=False)} == {
        ""
    }


@published
@pytest.mark.parametrize("dataset", ["sst2", "agnews", "dbpedia", "trec"])
@pytest.mark.parametrize("seed", [13, 21, 59])
def test_the_published_templates_are_drawn_again(dataset: str, seed: int) -> None:
    stored = json.loads((FORMAT / f"templates_{dataset}.json").read_text())[str(seed)]
    assert len(stored) == 10
    names = ("inp_verbalizer", "out_verbalizer", "sep", "big_sep")
    wanted = [Template(*(json.loads(each)[name] for name in names)) for each in stored]
    assert random_templates(dataset, 10, seed) == wanted


# corpora_and_evaluation.md, 4.2. The means of spread are over the three seeds of the templates of seed 59.
SPREAD = {
    "direct_False": {"sst2": (0.709, 0.122, 0.362), "agnews": (0.541, 0.147, 0.415),
                     "dbpedia": (0.336, 0.135, 0.392), "trec": (0.317, 0.073, 0.226)},
    "channel_True": {"sst2": (0.793, 0.067, 0.214), "agnews": (0.697, 0.068, 0.213),
                     "dbpedia": (0.699, 0.062, 0.202), "trec": (0.358, 0.065, 0.220)},
    "calibrate_True": {"sst2": (0.778, 0.124, 0.376), "agnews": (0.720, 0.100, 0.327),
                       "dbpedia": (0.714, 0.124, 0.378), "trec": (0.376, 0.079, 0.246)},
}  # fmt: skip


@published
def test_the_published_spread_is_found_again() -> None:
    rows = read_runs(FORMAT / "runs.csv")
    chosen = choose_runs(rows, n_shots=2, selection_method="random", template_seed=59)
    table = {(row["method"], row["dataset"]): row for row in tabulate_spread(chosen)}
    for method, datasets in SPREAD.items():
        for dataset, wanted in datasets.items():
            row = table[method, dataset]
            assert row["runs"] == 60  # 20 models, 3 seeds
            assert [row["mean"], row["sd"], row["range"]] == pytest.approx(wanted, abs=6e-4)
    four = choose_runs(rows, n_shots=4, selection_method="random", template_seed=59)
    table = {(row["method"], row["dataset"]): row for row in tabulate_spread(four)}
    assert table["direct_False", "sst2"]["range"] == pytest.approx(0.356, abs=6e-4)
    assert table["direct_False", "dbpedia"]["range"] == pytest.approx(0.414, abs=6e-4)


@published
def test_the_published_extremes_are_found_again() -> None:
    rows = choose_runs(read_runs(FORMAT / "runs.csv"), model="llama-2-70b-hf", n_shots=2)
    direct = choose_runs(rows, prediction_method="direct_False", selection_method="random")
    table = {row["dataset"]: row for row in tabulate_spread(direct)}
    wanted = {
        "sst2": (0.491, 0.961),
        "dbpedia": (0.104, 0.632),
        "agnews": (0.266, 0.891),
        "trec": (0.240, 0.556),
    }
    for dataset, ends in wanted.items():
        assert [table[dataset]["min"], table[dataset]["max"]] == pytest.approx(ends, abs=6e-4)
    assert table["sst2"]["mean"] == pytest.approx(0.851, abs=6e-4)


@published
def test_the_published_rank_correlations_are_found_again() -> None:
    rows = read_runs(FORMAT / "runs.csv")
    chosen = choose_runs(rows, n_shots=2, selection_method="random", seed=59, template_seed=59)
    direct = choose_runs(chosen, prediction_method="direct_False")
    found = {row["dataset"]: row["templates_between_models"] for row in tabulate_ranks(direct)}
    wanted = {"sst2": 0.43, "dbpedia": 0.72, "agnews": 0.33, "trec": 0.08}
    assert {dataset: round(row["spearman"], 2) for dataset, row in found.items()} == wanted
    assert found["sst2"]["pairs"] == 190
    for other, wanted in (
        ("channel_True", {"sst2": 0.34, "dbpedia": 0.56, "agnews": 0.22, "trec": 0.07}),
        ("calibrate_True", {"sst2": 0.64, "dbpedia": 0.72, "agnews": 0.56, "trec": 0.33}),
    ):
        transfer = tabulate_transfer(chosen, "direct_False", other)
        assert transfer == pytest.approx(wanted, abs=0.0055)


# corpora_and_evaluation.md, 4.2: size 1 → 5, mean accuracy and mean std over seeds.
ENSEMBLES = {
    ("sst2", "direct_False"): {1: (0.831, 0.096), 5: (0.867, 0.031)},
    ("sst2", "channel_True"): {1: (0.838, 0.050), 5: (0.905, 0.010)},
    ("sst2", "calibrate_True"): {1: (0.881, 0.047), 5: (0.929, 0.015)},
    ("trec", "direct_False"): {1: (0.275, None), 4: (0.436, None), 5: (0.388, None)},
    ("trec", "channel_True"): {1: (0.374, None), 5: (0.489, None)},
    ("trec", "calibrate_True"): {1: (0.347, 0.055), 5: (0.499, 0.041)},
}


@published
def test_the_published_ensembles_are_found_again() -> None:
    table = {
        (row["dataset"], row["method"], row["size"]): row
        for row in tabulate_ensembles(FORMAT / "ensembles.csv")
    }
    for (dataset, method), sizes in ENSEMBLES.items():
        for size, (mean, std) in sizes.items():
            row = table[dataset, method, size]
            assert row["mean"] == pytest.approx(mean, abs=6e-4)
            if std is not None:
                assert row["std"] == pytest.approx(std, abs=6e-4)


def test_a_table_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "runs.csv"
    with pytest.raises(UserError, match="cannot read"):
        read_runs(file)
    file.write_text("seed,model\n1,a\n")
    with pytest.raises(UserError, match="lacks the column"):
        read_runs(file)
    with pytest.raises(UserError, match="as a table of ensembles"):
        tabulate_ensembles(file)
