"""A run with `--until` draws what its looks ask for, stops, continues to the same decisions, and says so."""

import json
import re
import shlex
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from real_command import call, start
from report_example import make_logits, make_manifest
from typer.testing import CliRunner

from t2iprobe.cli import app
from t2iprobe.config import Study, load_study
from t2iprobe.errors import UserError
from t2iprobe.hypernymy import adaptive
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.hypernymy.metrics import in_subtree_probabilities
from t2iprobe.hypernymy.planning import plan_study
from t2iprobe.hypernymy.report import gather_results, write_comparison, write_report
from t2iprobe.hypernymy.results import read_results
from t2iprobe.hypernymy.statistics import analyse
from t2iprobe.hypernymy.study import run_study
from t2iprobe.hypernymy.until import read_until
from t2iprobe.runs import Run

HIERARCHY = Hierarchy.imagenet()
SYNSETS = HIERARCHY.synsets[::10]  # 86
SCHEMA = json.loads((files("t2iprobe.pages") / "results.schema.json").read_text(encoding="utf-8"))
DOCS = Path(__file__).parents[2] / "docs"


def make_study(model: Path, **settings: Any) -> Study:
    base = {"synsets": "dog.n.01,bird,n02121808", "samples": 6, "steps": 1, "dtype": "float32"}
    return load_study(None, {"model": str(model), "keep": "none", **base, **settings})


def create_run(path: Path, until: str | None, *, samples: int = 24, against: Run | None = None) -> Run:
    """An empty run with a rule, as `make_manifest` of the study makes it, of a model that is not there."""
    manifest = make_manifest(SYNSETS, samples=samples, until=until)
    manifest["identity"] |= {"keep": "none"}
    manifest["inputs"] = {}
    if until is not None:
        manifest["identity"]["until"] = read_until(until).identify()
    if against is not None:
        manifest["inputs"]["against"] = {"path": str(against.path), "hash": "as it was"}
    return Run.create(path, manifest)


def draw_rounds(run: Run, seed: int = 0, skill: float = 0.3, rounds: int = 99) -> list[int]:
    """Store made-up logits for what the run asks for, look by look; how many pictures each took."""
    logits = make_logits(run.plan, seed, skill)
    drawn = []
    for missing in adaptive.list_rounds(run):
        run.write_shard(missing, {"embedded": logits[missing]})
        drawn.append(len(missing))
        if len(drawn) == rounds:
            break
    return drawn


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that reached its rule after several looks."""
    run = create_run(tmp_path_factory.mktemp("runs") / "drawn", "isp ± 0.016")
    draw_rounds(run)
    return run


def test_a_run_draws_where_the_spread_is_and_stops(drawn: Run) -> None:
    followed = adaptive.follow(drawn)
    found = gather_results(drawn)["until"]
    values = {
        name: in_subtree_probabilities(rows, HIERARCHY.subtree(name)) for name, rows in drawn.logits().items()
    }
    counts = np.array([len(values[name]) for name in sorted(values)])
    spreads = np.array([values[name].std() for name in sorted(values)])

    assert found["stopped"] == "reached"
    assert found["reached_half_width"] <= 0.016 < found["looks"][-2]["half_width"]
    assert found["pictures"] == counts.sum() == len(drawn.done())
    assert counts.tolist() == followed.course.wanted.tolist()
    assert (found["pictures_min"], found["pictures_max"]) == (counts.min(), counts.max())
    assert counts.max() > 2 * counts.min()
    assert np.corrcoef(counts, spreads)[0, 1] > 0.5
    assert found["pictures"] < found["equal_design"]
    assert adaptive.is_complete(drawn)
    assert not drawn.complete
    assert draw_rounds(drawn) == []


def test_results_hold_the_rules_mean_and_equal_numbers_beside_it(drawn: Run) -> None:
    results = gather_results(drawn)
    jsonschema.validate(results, SCHEMA)
    found, course = results["until"], adaptive.follow(drawn).course
    assert course.halves is not None
    halves = np.mean(
        [
            [course.halves.values[s, course.halves.owner[s] == half].mean() for half in (0, 1)]
            for s in range(len(SYNSETS))
        ],
        axis=1,
    )
    first = analyse({name: rows[: course.equal] for name, rows in drawn.logits().items()}, HIERARCHY)

    assert found["value"] == results["results"]["isp"]["value"] == pytest.approx(halves.mean())
    assert found["interval"] == results["results"]["isp"]["interval"]
    assert np.ptp(found["interval"]) == pytest.approx(2 * found["reached_half_width"])
    rows = {row["synset"]: row for row in results["synsets"]}
    assert [rows[name]["isp"] for name in SYNSETS] == pytest.approx(halves.tolist())
    for row in results["synsets"]:
        assert row["isp_interval"][0] <= row["isp"] <= row["isp_interval"][1]
    for metric in ("scs", "scs_corrected", "subtree_entropy"):
        assert results["results"][metric]["value"] == first["results"][metric]["value"]
    assert results["results"]["scs"]["samples"] == course.equal
    assert "everything else is of the first" in results["warnings"][0]
    page = write_report(drawn).read_text()
    assert "isp ± 0.016" in page
    assert f"{found['pictures']:,} pictures" in page


def test_a_run_in_pieces_decides_what_a_run_in_one_does(drawn: Run, tmp_path: Path) -> None:
    """Whatever part of a look was stored when it was killed, in whatever order."""
    run, rng = create_run(tmp_path / "run", "isp ± 0.016"), np.random.default_rng(0)
    logits = make_logits(run.plan, 0, 0.3)
    while missing := adaptive.find_missing(Run.open(run.path)):
        some = sorted(rng.permutation(missing)[: max(1, len(missing) // 2)].tolist())
        run.write_shard(some, {"embedded": logits[some]})

    assert run.done() == drawn.done()
    assert gather_results(run)["until"] == gather_results(drawn)["until"]


def test_processes_that_wait_for_each_other_share_a_run(drawn: Run, tmp_path: Path) -> None:
    """As those of a launch do: all see the same pictures before anybody draws more."""
    path = create_run(tmp_path / "run", "isp ± 0.016").path
    logits = make_logits(drawn.plan, 0, 0.3)
    together = threading.Barrier(2)

    def work(index: int) -> int:
        run, rounds = Run.open(path), 0
        for mine in adaptive.list_rounds(run, (index, 2), lambda: together.wait(60) and None):
            assert {position % 2 for position in mine} == {index}
            run.write_shard(mine, {"embedded": logits[mine]})
            rounds += 1
        return rounds

    with ThreadPoolExecutor(2) as pool:
        rounds = list(pool.map(work, (0, 1)))

    assert rounds == [len(gather_results(drawn)["until"]["looks"])] * 2
    assert Run.open(path).done() == drawn.done()


def test_a_part_of_a_run_is_reported_as_such(tmp_path: Path) -> None:
    run = create_run(tmp_path / "run", "isp ± 0.016")
    draw_rounds(run, rounds=2)
    results = gather_results(run)

    jsonschema.validate(results, SCHEMA)
    assert results["until"]["stopped"] is None
    assert len(results["until"]["looks"]) == 2
    assert re.search(r"not complete: its next look needs \d+ more", results["warnings"][0])


def test_the_limit_is_told(tmp_path: Path) -> None:
    run = create_run(tmp_path / "run", "isp ± 0.001", samples=5)
    draw_rounds(run)

    assert run.complete
    assert gather_results(run)["until"]["stopped"] == "limit"


def test_a_difference_is_that_of_the_two_runs(tmp_path: Path) -> None:
    other = create_run(tmp_path / "other", None, samples=12)
    draw_rounds(other, seed=5, skill=0.3)
    run = create_run(tmp_path / "run", f"isp - {other.path} ± 0.03", samples=40, against=other)
    draw_rounds(run)
    found = gather_results(run)["until"]
    theirs = np.mean(
        [in_subtree_probabilities(r, HIERARCHY.subtree(n)).mean() for n, r in other.logits().items()]
    )

    jsonschema.validate(gather_results(run), SCHEMA)
    assert found["stopped"] == "reached"
    assert found["value"] == pytest.approx(gather_results(run)["results"]["isp"]["value"] - theirs)
    assert found["reached_half_width"] <= 0.03


def test_the_other_run_must_do(tiny_model: Path, tmp_path: Path) -> None:
    other = run_study(make_study(tiny_model, samples=3, seed=1), tmp_path / "other")
    fewer = run_study(make_study(tiny_model, samples=3, synsets="dog"), tmp_path / "fewer")
    rule = f"isp - {other.path} ± 0.4"
    run = run_study(make_study(tiny_model, until=rule), tmp_path / "run")
    assert read_results(run)["until"]["question"] == "difference"

    with pytest.raises(UserError, match="has no pictures of 2 of the synsets"):
        run_study(make_study(tiny_model, until=f"isp - {fewer.path} ± 0.4"), tmp_path / "a")
    with pytest.raises(UserError, match="is not a run directory"):
        run_study(make_study(tiny_model, until=f"isp - {tmp_path / 'none'} ± 0.4"), tmp_path / "b")
    with pytest.raises(UserError, match=r"alone leave ± .*: no number of ours reaches ± 1e-06"):
        run_study(make_study(tiny_model, until=f"isp - {other.path} ± 0.000001"), tmp_path / "c")
    run_study(make_study(tiny_model, samples=4, seed=1), other.path, extend=True)
    with pytest.raises(UserError, match=r"another end: until\.against: sha256"):
        run_study(make_study(tiny_model, until=rule), run.path)


def test_words_are_decided(tmp_path: Path) -> None:
    run = create_run(tmp_path / "run", "unknown", samples=40)
    draw_rounds(run)
    results = gather_results(run)
    found, rows = results["until"], {row["synset"]: row for row in results["synsets"]}

    jsonschema.validate(results, SCHEMA)
    assert found["verdicts"].keys() == set(SYNSETS)
    words = list(found["verdicts"].values())
    assert words.count("known") > 10
    assert words.count("unknown") > 30
    for name, verdict in found["verdicts"].items():
        assert rows[name]["known"] == (verdict == "known")
    isp = {name: float(rows[name]["isp"]) for name in SYNSETS}
    known = [isp[name] for name in SYNSETS if found["verdicts"][name] == "known"]
    unknown = [isp[name] for name in SYNSETS if found["verdicts"][name] == "unknown"]
    assert np.median(known) > 10 * np.median(unknown)
    known_pictures = [found["synsets"][name] for name in SYNSETS if found["verdicts"][name] == "known"]
    assert np.median(known_pictures) == 4
    assert "bets" in write_report(run).read_text()


def test_a_comparison_is_of_equal_numbers(drawn: Run, tmp_path: Path) -> None:
    other = create_run(tmp_path / "other", None, samples=8)
    draw_rounds(other, seed=9)
    path = write_comparison(drawn, other, tmp_path / "comparison.html")
    found = json.loads(path.with_suffix(".json").read_text())

    equal = adaptive.follow(drawn).course.equal
    assert found["coverage"]["samples_min"] == found["coverage"]["samples_max"] == equal
    assert "only the first" in found["warnings"][0]


def test_a_real_run_ends_continues_and_takes_another_rule(tiny_model: Path, tmp_path: Path) -> None:
    study = make_study(tiny_model, until="isp ± 0.3")
    counts: list[tuple[int, int]] = []
    run = run_study(study, tmp_path / "run", progress=lambda done, of: counts.append((done, of)))
    found = read_results(run)["until"]

    assert found["stopped"] == "reached"
    assert counts[0] == (6, 6)
    assert len(run.done()) == found["pictures"] < len(run.plan)
    assert adaptive.is_complete(run_study(study, run.path))
    with pytest.raises(UserError, match=r"another end: until\.half_width: 0\.3 → 0\.2. Add --extend"):
        run_study(make_study(tiny_model, until="isp ± 0.2"), run.path)
    more = run_study(make_study(tiny_model, until=None), run.path, extend=True)
    assert more.complete
    assert "until" not in read_results(more)
    back = run_study(study, run.path, extend=True)
    assert read_results(back)["until"] == found


def test_a_rule_takes_no_shares_and_no_other_comparison(tiny_model: Path, tmp_path: Path) -> None:
    study = make_study(tiny_model, until="isp ± 0.3")
    with pytest.raises(UserError, match="leave --shard out"):
        run_study(study, tmp_path / "run", share=(0, 2))
    for settings, message in (
        ({"common_seeds": True}, "common_seeds for a comparison within the run"),
        ({"samples": 1}, "must be at least 2"),
        ({"until": "scs ± 0.1"}, "SCS depends"),
    ):
        with pytest.raises(UserError, match=message):
            run_study(make_study(tiny_model, **{"until": "isp ± 0.3", **settings}), tmp_path / "other")
    assert not (tmp_path / "other").exists()
    (tmp_path / "made" / "dog").mkdir(parents=True)
    with pytest.raises(UserError, match="made elsewhere"):
        run_study(load_study(None, {"until": "unknown"}), tmp_path / "x", folder=tmp_path / "made")


def test_a_plan_says_that_it_may_end_before(tiny_model: Path, tmp_path: Path) -> None:
    plan = plan_study(make_study(tiny_model, until="isp ± 0.3"), tmp_path / "run", measure=False)

    assert plan["pictures"] == 18
    assert plan["until"] == {"rule": "isp ± 0.3", "pictures_first": 6, "pictures_most": 18}
    told = plan_study(make_study(tiny_model, until="isp ± 0.3"), tmp_path / "run")
    assert told["until"]["seconds_first"] == pytest.approx(
        told["predicted_seconds"] - told["seconds"]["pictures"] * 12 / 18
    )


@pytest.mark.slow
def test_the_command_is_killed_and_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    words = ["hypernymy", "run", "--model", tiny_model, "--synsets", "dog.n.01,bird,n02121808",
             "--samples", 40, "--steps", 1, "--dtype", "float32", "--keep", "none"]  # fmt: skip
    rule = ["--until", "isp ± 0.06"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    call(*words, *rule, "--out", whole)
    stopped = start(*words, *rule, "--out", killed).kill_when(lambda: any(killed.glob("shards/*.npz")))
    assert stopped.code == -signal.SIGKILL
    assert not (killed / "results.json").exists()

    done = call(*words, *rule, "--out", killed, "--json")

    assert Run.open(killed).done() == Run.open(whole).done()
    found = json.loads(done.out)["until"]
    assert found["stopped"] == "reached"
    assert found["pictures"] < 120
    verified = json.loads(call("hypernymy", "verify", killed, "--json").out)
    assert verified["missing"] == 0
    call(*words, "--until", "nonsense", "--out", tmp_path / "none", code=2)
    assert not (tmp_path / "none").exists()


def test_commands_of_the_page_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is run as it stands, but for what makes it small."""
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "adaptive.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("t2iprobe ")]
    assert len(commands) == 4
    small = ["--synsets", "dog,bird,cat.n.01", "--steps", "1", "--samples", "3"]
    for command in commands:
        words = shlex.split(re.sub(r"± [\d.]+", "± 0.5", command))[1:]
        result = CliRunner().invoke(app, words + small, catch_exceptions=False)
        assert result.exit_code == 0, (command, result.output)
    assert (tmp_path / "runs" / "until" / "report.html").exists()
