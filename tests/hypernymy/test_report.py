"""The pages: self-contained, well-formed, safe, and with the numbers of results.json."""

import csv
import io
import json
import re
import shlex
from dataclasses import replace
from importlib.resources import files
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
from page_checks import Page, check_page
from report_example import encode_pictures, make_results, make_run, render_example

from t2iprobe.config import dump_study, load_study, parse_settings
from t2iprobe.errors import UserError
from t2iprobe.hypernymy import facts, views
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.hypernymy.report import (
    gather_results,
    pair_rows,
    render,
    write_comparison,
    write_csv,
    write_leaderboard,
    write_report,
)
from t2iprobe.pages import (
    charts,
    colour_step,
    embed_json,
    format_interval,
    format_p,
    format_score,
    format_signed,
)
from t2iprobe.pages.thumbnails import make_strips
from t2iprobe.runs import Run

FEW = ["dog.n.01", "bird.n.01", "insect.n.01", "acarine.n.01", "entity.n.01", "spacecraft.n.01"]
SCHEMA = json.loads((files("t2iprobe.pages") / "results.schema.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def example():
    text, results = render_example(FEW, seeds=(0, 1))
    return SimpleNamespace(text=text, page=Page(text), results=results)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    a = make_run(folder / "a", FEW)
    b = make_run(folder / "b", FEW[:5], logits_seed=7, model="other", samples=3)
    return a, b


def test_page_is_one_wellformed_file_that_loads_nothing(example):
    check_page(example.text)


@pytest.mark.parametrize(
    "synsets",
    [["acarine.n.01"], ["dog.n.01", "feline.n.01", "wading_bird.n.01"], ["tabby.n.01", "beagle.n.01"]],
)
@pytest.mark.parametrize("pictures", [0, 1])
def test_small_runs_have_a_page(synsets, pictures):
    text, _ = render_example(synsets, pictures=pictures, samples=2)
    page = check_page(text)
    assert ("This run kept no pictures." in text) == (pictures == 0)
    assert set(synsets) <= set(page.ids)


def test_one_picture_a_synset_has_no_interval_but_a_page():
    text, results = render_example(FEW, pictures=1, samples=1)
    assert results["results"]["isp"]["interval"] is None
    check_page(text)


def test_numbers_in_the_page_are_those_of_the_results(example):
    results, texts = example.results, example.page.texts
    assert texts["headline-isp"] == f"{results['results']['isp']['value']:.4f}"
    assert texts["headline-scs"] == f"{results['results']['scs']['value']:.4f}"
    known = sum(row["known"] for row in results["synsets"])
    assert texts["headline-known"] == f"{100 * known / len(FEW):.1f} %"
    data = json.loads(example.page.scripts["data"])
    assert set(FEW) <= set(data["synsets"])
    for row in results["synsets"]:
        shown = data["synsets"][row["synset"]]["runs"][0]
        assert {key: shown[key] for key in row.keys() & shown.keys()} == {
            key: row[key] for key in row.keys() & shown.keys()
        }
        assert f"{row['isp']:.4f}" in texts[row["synset"]]
        assert format_interval(row["isp_interval"]) in texts[row["synset"]]
    others = {row["synset"]: row["isp"] for row in results["classifiers"]["timm:other"]["synsets"]}
    assert data["synsets"]["dog.n.01"]["runs"][0]["others"] == {"timm:other": others["dog.n.01"]}
    for measure in facts.list_measures(results):
        assert f"{measure['value']:.4f}" in texts["measures"]


def test_seeds_prompts_and_subtree_marks_are_exact(example):
    _, plan = make_results(FEW)
    run = json.loads(example.page.scripts["data"])["synsets"]["dog.n.01"]["runs"][0]
    expected = [{"prompt": "An image of a dog.", "seed": str(e.seed)} for e in plan if e.synset == "dog.n.01"]
    assert run["entries"] == expected
    hierarchy = Hierarchy.imagenet()
    inside = {hierarchy.class_names[c] for c in np.flatnonzero(hierarchy.subtree("dog.n.01"))}
    assert run["inside"] == [label in inside for label, _ in run["saw"]]


def test_each_strip_is_inlined_once(example):
    strips = json.loads(example.page.scripts["strips"])[0]
    inline = {a["data-strip-of"]: a["src"] for _, a in example.page.tags if "data-strip-of" in a}
    assert strips.keys().isdisjoint(inline)
    assert strips.keys() | inline.keys() == set(FEW)
    assert example.text.count("data:image/webp") == len(FEW)


def test_hostile_names_stay_text():
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028\"'&"
    results, _ = make_results(FEW, model=evil, templates=[evil])
    for analysis in (results, *results["classifiers"].values()):
        for row in analysis["synsets"]:
            row["saw"][0][0] = evil
    results["classifiers"][evil] = results["classifiers"]["embedded"]
    text = render(results, lambda name: [])
    page = check_page(text)
    assert not any(tag == "img" for tag, _ in page.tags)
    assert sum(tag == "script" for tag, _ in page.tags) == 4
    assert json.loads(page.scripts["data"])["synsets"]["dog.n.01"]["runs"][0]["saw"][0][0] == evil
    row = write_leaderboard(results).splitlines()[2]
    assert "<script" not in row
    assert len(re.findall(r"(?<!\\)\|", row)) == len(
        re.findall(r"\|", write_leaderboard(results).splitlines()[0])
    )


def test_embedded_json_round_trips_and_cannot_end_its_element():
    data = {"</script>": ["<!--", "&amp;", "\u2028", "ü", 2**53]}
    assert json.loads(embed_json(data)) == data
    assert not set("<>&") & set(embed_json(data))


def test_results_follow_the_stated_schema(example, runs):
    validator = jsonschema.Draft202012Validator(SCHEMA)
    validator.validate(example.results)
    validator.validate(gather_results(runs[0]))
    broken = {**example.results, "synsets": [{**example.results["synsets"][0], "isp": 1.5}]}
    assert not validator.is_valid(broken)
    assert not validator.is_valid({key: value for key, value in example.results.items() if key != "uniform"})


def test_report_files_agree(runs):
    run = runs[0]
    path = write_report(run)
    assert path == run.path / "report.html"
    results = json.loads((run.path / "results.json").read_text(encoding="utf-8"))
    assert results == gather_results(run)
    check_page(path.read_text(encoding="utf-8"))
    rows = list(csv.DictReader(io.StringIO((run.path / "results.csv").read_text(encoding="utf-8"))))
    assert [row["synset"] for row in rows] == sorted(FEW)
    for row, expected in zip(rows, results["synsets"], strict=True):
        assert float(row["isp"]) == expected["isp"]
        assert row["scs"] == ("" if expected["scs"] is None else repr(expected["scs"]))
    header, rule, line = (run.path / "leaderboard.md").read_text(encoding="utf-8").splitlines()
    assert header.count("|") == rule.count("|") == line.count("|")
    cells = dict(zip(header.split(" | "), line.split(" | "), strict=True))
    assert cells["ISP"] == f"{results['results']['isp']['value']:.4f}"
    assert cells["N"] == "4"
    assert not list(run.path.glob(".*.tmp"))


def test_incomplete_run_says_so(tmp_path):
    run = make_run(tmp_path / "run", FEW[:2])
    whole = gather_results(run)
    run.manifest["plan"].append({"samples": 6, "prompts": run.manifest["plan"][0]["prompts"]})
    del run.__dict__["plan"]
    assert whole["warnings"] == []
    assert gather_results(run)["warnings"] == [
        "the run is not complete: 4 of its 12 pictures are still to be drawn"
    ]


def test_damaged_picture_is_named(tmp_path):
    bad = tmp_path / "bad.webp"
    bad.write_bytes(b"RIFF....")
    with pytest.raises(UserError, match=r"bad\.webp.*no picture"):
        make_strips(["dog.n.01"], lambda name: [bad])


def test_pictures_fit_the_budget():
    pool = encode_pictures(16)
    names = [f"s{i}" for i in range(40)]
    whole = make_strips(names, lambda name: pool)
    assert {strip.count for strip in whole.values()} == {16}
    size = sum(len(strip.uri) for strip in whole.values())
    fewer = make_strips(names, lambda name: pool, budget=size // 3)
    assert 1 <= fewer["s0"].count < 16
    assert sum(len(strip.uri) for strip in fewer.values()) <= size // 3
    assert make_strips(names, lambda name: []) == {}


def test_tree_shows_every_synset_once_in_full_and_at_each_parent():
    rows = [{"synset": name, "classes": 1} for name in Hierarchy.imagenet().synsets]
    nodes = views.build_nodes(rows)
    assert sorted(nodes) == Hierarchy.imagenet().synsets
    full, places, parents = [], [], {name: set() for name in nodes}

    def walk(items, parent):
        for item in items:
            name = item["node"].name
            places.append(name)
            parents[name].add(parent)
            if not item["elsewhere"]:
                full.append(name)
            walk(item["children"], name)

    tree = views.build_tree(nodes, open_levels=4)
    walk(tree, None)
    assert [item["node"].name for item in tree] == ["entity.n.01"]
    assert sorted(full) == sorted(nodes)
    assert parents == {name: set(node.parents) or {None} for name, node in nodes.items()}
    assert sum(len(node.parents) > 1 for node in nodes.values()) > 30


def test_nodes_above_a_few_synsets_reach_the_root():
    nodes = views.build_nodes([{"synset": "dog.n.01", "classes": 118}])
    assert {"entity.n.01", "canine.n.02", "domestic_animal.n.01"} <= set(nodes)
    assert nodes["canine.n.02"].row is None
    assert nodes["dog.n.01"].kind == "dogs"
    assert nodes["canine.n.02"].kind == "other mammals"


def test_published_values_stand_only_beside_the_published_protocol():
    results, _ = make_results(FEW)
    assert facts.compare_published(results) == []
    assert any("860" in text for text in facts.list_differences(results))
    results["coverage"] |= {"synsets": 860, "of": 860, "samples_min": 32, "samples_max": 32}
    results["identity"] |= {"steps": 50, "guidance": 7.5}
    assert facts.list_differences(results) == []
    table = facts.compare_published(results)
    assert [row["isp"] for row in table] == sorted((row["isp"] for row in table), reverse=True)
    assert sum(row["ours"] for row in table) == 1
    assert {"model": "unCLIP", "isp": 0.35, "scs": 0.19, "ours": False} in table
    results["identity"]["guidance"] = 2.5
    assert facts.list_differences(results) == ["guidance 2.5 rather than 7.5"]


def test_results_of_a_logits_file_have_a_page():
    results, _ = make_results(FEW)
    bare = {"schema": "t2iprobe.results/1", "source": "vit_b_16_logits.npz"}
    bare |= {key: results[key] for key in SCHEMA["$defs"]["analysis"]["properties"]}
    jsonschema.Draft202012Validator(SCHEMA).validate(bare)
    text = render(bare, lambda name: [])
    check_page(text)
    assert "t2iprobe hypernymy score vit_b_16_logits.npz" in text


def test_bound_of_coverage_is_reached_by_a_perfect_generator():
    """Uniform, one-hot and all different: the plug-in SCS then is ln min(N, classes)."""
    rows = [{"classes": 4, "samples": 4}, {"classes": 16, "samples": 4}, {"classes": 1, "samples": 4}]
    normaliser = (np.log(4) + np.log(16)) / 2
    assert views.bound_coverage(rows, normaliser) == pytest.approx(np.log(4) / normaliser)
    assert views.bound_coverage(rows[2:], normaliser) is None


def test_group_means_are_means_with_their_error():
    rows = [
        {"synset": str(i), "isp": isp, "floor": 0.01, "known": isp > 0.2}
        for i, isp in enumerate([0.1, 0.2, 0.6])
    ]
    (group,) = views.average_groups(rows, {"0": "a", "1": "a", "2": "a"})
    assert group["mean"] == pytest.approx(0.3)
    half = 1.96 * np.std([0.1, 0.2, 0.6], ddof=1) / np.sqrt(3)
    assert group["interval"] == pytest.approx([max(0, 0.3 - half), 0.3 + half])
    assert (group["synsets"], group["known"]) == (3, 1)


def test_wilson_interval_matches_scipy():
    from scipy.stats import binomtest

    for hits, total in ((0, 5), (3, 7), (412, 860), (860, 860)):
        expected = binomtest(hits, total).proportion_ci(method="wilson")
        assert views.wilson_interval(hits, total) == pytest.approx([expected.low, expected.high], abs=1e-6)


def test_histogram_counts_every_value():
    values = [0.0, 1e-5, 1e-4, 0.00999, 0.01, 0.5, 1.0, 1.0 + 1e-9]
    bins = charts.count_bins(values)
    assert sum(item["count"] for item in bins) == len(values)
    assert bins[-1]["count"] == 2
    for item in bins[1:-1]:
        assert item["count"] == sum(item["low"] <= value * (1 + 1e-9) < item["high"] for value in values)


@pytest.mark.parametrize("highest", [0.004, 0.0134, 0.07, 0.2, 0.34, 0.99, 1.0])
def test_ticks_cover_the_data_in_round_steps(highest):
    ticks = charts.choose_ticks(highest)
    assert ticks[0] == 0
    assert ticks[-1] >= highest
    assert ticks[-1] <= 2 * highest
    assert 3 <= len(ticks) <= 6 or highest == 1.0


def test_numbers_are_written_alike_in_python():
    assert format_score(0.01343) == "0.0134"
    assert format_score(None) == "–"
    assert format_interval([0.1, None]) == "–"
    assert format_p(0.0004) == "< 0.001"
    assert format_signed(-0.5) == "−0.5000"
    assert [colour_step(value) for value in (0, 0.01, 0.05, 0.2, 0.4, 0.6, 1)] == [0, 1, 2, 3, 4, 5, 5]


def test_csv_leaves_empty_what_has_no_value():
    results, _ = make_results(["acarine.n.01"], samples=1)
    (row,) = csv.DictReader(io.StringIO(write_csv(results)))
    assert row["scs"] == row["isp_stderr"] == ""
    assert row["synset"] == "acarine.n.01"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"seed": 5, "guidance": 2.5, "steps": None},
        {"model": "org/name", "steps": 30, "guidance": 7.5},
        {
            "classifiers": ["timm:vit_base_patch16_224", "embedded"],
            "templates": ["base", 'it\'s a "{lemma}"'],
        },
    ],
)
def test_command_repeats_the_settings(settings):
    """What the command line would make of the printed command is the run's own configuration."""
    study = load_study(None, {"synsets": ",".join(FEW), **settings})
    words = shlex.split(facts.write_command({"configuration": dump_study(study)}))
    assert words[:3] == ["t2iprobe", "hypernymy", "run"]
    given, pairs = {}, []
    for option, value in zip(words[3::2], words[4::2], strict=True):
        if option == "--set":
            pairs.append(value)
        elif option == "--classifier":
            given.setdefault("classifiers", []).append(value)
        elif option != "--out":
            given[option.removeprefix("--")] = value
    assert load_study(None, given | parse_settings(pairs)) == study


def test_command_of_a_folder_judges_it_again():
    configuration = dump_study(load_study(None, {"model": "folder"})) | {"folder": "my pictures"}
    command = facts.write_command({"configuration": configuration})
    assert command == "t2iprobe hypernymy pictures 'my pictures' --out RUN"


def test_comparison_page_has_the_differences(runs, tmp_path):
    path = write_comparison(*runs, tmp_path / "compared" / "page.html")
    text = path.read_text(encoding="utf-8")
    page = check_page(text)
    numbers = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    isp = numbers["results"]["isp"]
    assert page.texts["headline-isp"] == format_signed(isp["difference"])
    assert isp["difference"] == pytest.approx(isp["b"] - isp["a"])
    assert len(numbers["synsets"]) == 5
    for row in numbers["synsets"]:
        assert format_signed(row["difference"]) in page.texts[row["synset"]]
    data = json.loads(page.scripts["data"])
    assert data["runs"] == ["Embedded model", "other"]
    assert data["synsets"]["spacecraft.n.01"]["runs"][1] is None
    assert "1 synset of the other run is not in other" in text
    assert numbers["same_pictures"] is True  # same seeds and prompts, whatever the number of pictures
    assert len(json.loads(page.scripts["strips"])) == 2


def test_comparison_pairs_the_pictures_that_both_runs_have(tmp_path):
    """Whatever lacks in an incomplete run: what is left of it shows the whole run's own pictures."""
    whole = make_run(tmp_path / "whole", FEW[:2], samples=6)
    rows, plan = whole.logit_rows(), whole.plan
    lacking = {("dog.n.01", 0), ("dog.n.01", 3), ("bird.n.01", 5)}
    stored = [p for p in rows if (plan[p].synset, plan[p].index) not in lacking]
    part = Run.create(tmp_path / "part", whole.manifest)
    pictures = np.zeros((len(stored), 8, 8, 3), np.uint8)
    part.write_shard(stored, {"embedded": np.stack([rows[p] for p in stored])}, pictures)
    for a, b in ((whole, part), (part, whole)):
        path = write_comparison(a, b, tmp_path / "page.html")
        found = json.loads(path.with_suffix(".json").read_text())
        assert found["same_pictures"] is True
        assert [row["samples"] for row in found["synsets"]] == [5, 4]  # bird, dog
        for row in found["synsets"]:
            assert row["difference"] == 0
        assert "part is not complete: 3 of its pictures lack" in found["warnings"]


def test_rows_without_a_partner_come_last_or_not_at_all():
    a = {"dog.n.01": {("base", n): n for n in (1, 2, 3)}, "cat.n.01": {("base", 0): 0}}
    b = {"dog.n.01": {("base", n): 10 * n for n in (0, 2, 3, 4)}, "cat.n.01": {("base", 1): 10}}

    one, other = pair_rows(a, b)

    assert list(one["dog.n.01"].values()) == [2, 3]
    assert list(other["dog.n.01"].values()) == [20, 30, 0, 40]
    assert "cat.n.01" not in one  # nothing to compare
    assert "cat.n.01" not in other


def test_comparison_needs_one_judge_and_the_same_classes(runs, tmp_path):
    a = runs[0]
    b = make_run(tmp_path / "b", FEW[:2], classifiers=("timm:other",))
    with pytest.raises(UserError, match="share no classifier"):
        write_comparison(a, b, tmp_path / "page.html")
    b.manifest["identity"]["hierarchy"] = "sha256:other"
    with pytest.raises(UserError, match="different classes"):
        write_comparison(a, b, tmp_path / "page.html")


@pytest.mark.slow
def test_whole_probe_fits_in_a_small_page():
    text, results = render_example(seeds=(0, 1))
    page = check_page(text)
    assert len(results["synsets"]) == 860
    assert sum(tag == "tr" and "data-kind" in attributes for tag, attributes in page.tags) == 860
    assert len(text.encode()) < 12_000_000


def test_pictures_made_elsewhere_show_their_files_not_settings_they_did_not_use():
    results, plan = make_results(["dog.n.01"], steps=77)
    results["configuration"] |= {"folder": "somewhere/mine"}
    results["identity"] = {"keep": "all"}
    entries = {"dog.n.01": [replace(plan[0], prompt="dog.n.01/one.png")]}
    page = check_page(render(results, lambda name: encode_pictures(1), entries=entries))
    run = json.loads(page.scripts["data"])["synsets"]["dog.n.01"]["runs"][0]
    assert run["entries"] == [{"file": "dog.n.01/one.png"}]
    assert "steps" not in page.texts["settings"]
    assert "77" not in write_leaderboard(results).splitlines()[2].split(" | ")[11:]
    assert facts.list_settings(results)[-1] == ("folder", "somewhere/mine")
    assert "steps" not in dict(facts.list_settings(results))
    assert facts.name_model(results) == "Pictures in mine/"
