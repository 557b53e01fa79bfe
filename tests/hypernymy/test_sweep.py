"""Sweeps: the grid, cells as ordinary runs, common noise, one loaded model, kills, and what is made of it."""

import csv
import importlib.util
import json
import signal
from pathlib import Path

import numpy as np
import pytest
from page_checks import check_page
from ray_cluster import ray_cluster, read_costs, start_python
from real_command import call, start

from t2iprobe.config import load_study, load_sweep
from t2iprobe.errors import UserError
from t2iprobe.hypernymy import planning, prediction
from t2iprobe.hypernymy import study as studies
from t2iprobe.hypernymy import sweep as module
from t2iprobe.hypernymy.encoding import PromptEncoder
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.hypernymy.planning import plan_sweep
from t2iprobe.hypernymy.statistics import compare
from t2iprobe.hypernymy.study import run_study
from t2iprobe.hypernymy.sweep import list_cells, run_sweep
from t2iprobe.hypernymy.sweep_results import pair_neighbours
from t2iprobe.runs import Run

SETTINGS = {
    "synsets": "dog.n.01,bird.n.01,domestic_cat.n.01",
    "samples": 3,
    "dtype": "float32",
    "classifier_dtype": "float32",
    "keep": "all",
}
AXES = {"guidance": [1.0, 3.0], "steps": [1, 2]}


def make_study(model, **settings):
    return load_study(None, {"model": str(model), **SETTINGS, **settings})


@pytest.fixture(scope="module")
def swept(tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "s"
    told = []
    runs = run_sweep(make_study(tiny_model), AXES, out, progress=lambda done, of: told.append((done, of)))
    return out, runs, told


def test_a_file_and_the_command_line_say_what_varies(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("preset: embedded\nsweep:\n  guidance: [1, 5]\n  schedulers: DDIMScheduler\n")
    study, axes = load_sweep(str(file), {"samples": 2})
    assert (study.samples, axes) == (2, {"guidance": [1, 5], "scheduler": ["DDIMScheduler"]})
    _, axes = load_sweep(
        str(file), None, ["guidance=2,2.5", "template=base,photo", 'template=["a {lemma}, big"]']
    )
    assert axes["guidance"] == [2, 2.5]
    assert axes["template"] == ["base", "photo", "a {lemma}, big"]
    with pytest.raises(UserError, match="describes a sweep: t2iprobe hypernymy sweep"):
        load_study(str(file))


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ([], "nothing varies"),
        (["guidanc=1,2"], "did you mean guidance"),
        (["model=a,b"], "a sweep does not vary 'model'"),
        (["guidance"], "--over takes key=value"),
        (["guidance=[]"], "no value for guidance"),
    ],
)
def test_a_bad_grid_is_told(over, message):
    with pytest.raises(UserError, match=message):
        load_sweep("embedded", None, over)


def test_cells_are_the_product_in_order():
    study = load_study("tiny")
    cells = list_cells(study, {"guidance": [5, 1, 5.0], "scheduler": [None, "DDIMScheduler"]})
    assert [cell.name for cell in cells] == [
        "guidance-1_scheduler-own",
        "guidance-1_scheduler-DDIMScheduler",
        "guidance-5_scheduler-own",
        "guidance-5_scheduler-DDIMScheduler",
    ]
    assert [cell.study.guidance for cell in cells] == [1, 1, 5, 5]
    for axes, message in (
        ({"steps": [0]}, "bad value for steps: 0"),
        ({"guidance": ["much"]}, "bad value for guidance"),
        ({"scheduler": ["DDIMSchedular"]}, "did you mean DDIMScheduler"),
    ):
        with pytest.raises(UserError, match=message):
            list_cells(study, axes)
    with pytest.raises(UserError, match="leave until out"):
        list_cells(load_study("tiny", {"until": "isp ± 0.1"}), {"steps": [1]})
    templates = list_cells(study, {"template": ["a {lemma}, big", "a {lemma}; big"]})
    assert len({cell.name for cell in templates}) == 2
    assert all(cell.study.common_seeds for cell in templates)


def test_a_cell_is_the_run_that_its_settings_give(swept, tiny_model, tmp_path):
    out, runs, told = swept
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == [
        "guidance-1_steps-1", "guidance-1_steps-2", "guidance-3_steps-1", "guidance-3_steps-2"
    ]  # fmt: skip
    alone = run_study(make_study(tiny_model, guidance=3.0, steps=2), tmp_path / "alone")
    cell = Run.open(out / "guidance-3_steps-2")
    assert cell.manifest["identity"] == alone.manifest["identity"]
    for name, logits in alone.logits().items():
        np.testing.assert_array_equal(cell.logits()[name], logits)
    assert cell.verify() == []
    assert {(run.path / "report.html").exists() for run in runs} == {True}
    assert told[-1] == (36, 36)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    seeds = {tuple(entry.seed for entry in run.plan) for run in runs}
    assert len(seeds) == 1


def test_a_whole_sweep_loads_nothing_again(swept, tiny_model, monkeypatch):
    out, *_ = swept
    for name in ("load_sampler", "load_scorers"):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("loaded"))
    assert all(run.complete for run in run_sweep(make_study(tiny_model), AXES, out))
    monkeypatch.undo()
    loads = []
    load = studies.load_pipeline
    monkeypatch.setattr(studies, "load_pipeline", lambda *a, **k: loads.append(a) or load(*a, **k))
    grown = {"guidance": [1.0, 3.0], "steps": [1, 2, 3]}
    encoded = count_encoded(monkeypatch)
    runs = run_sweep(make_study(tiny_model), grown, out)
    assert len(runs) == 6
    assert len(loads) == 1
    assert len(encoded) == 3  # two new cells, three prompts


def count_encoded(monkeypatch):
    calls = []
    encode = PromptEncoder._encode

    def count(self, prompts):
        calls.extend(prompts)
        return encode(self, prompts)

    monkeypatch.setattr(PromptEncoder, "_encode", count)
    return calls


def test_the_results_are_the_runs_own_and_their_paired_differences(swept):
    out, *_ = swept
    results = json.loads((out / "sweep.json").read_text())
    by_name = {cell["name"]: cell for cell in results["cells"]}
    one = json.loads((out / "guidance-1_steps-2" / "results.json").read_text())
    assert by_name["guidance-1_steps-2"]["isp"] == one["results"]["isp"]
    assert by_name["guidance-1_steps-2"]["scs"]["interval"] is not None
    pair = next(
        row for row in results["neighbours"] if row["b"] == "guidance-3_steps-2" and row["axis"] == "guidance"
    )
    assert pair["a"] == "guidance-1_steps-2"
    assert pair["same_noise"]
    a, b = (Run.open(out / pair[side]).logits() for side in "ab")
    whole = compare(a, b, Hierarchy.imagenet(), same_pictures=True)["results"]
    for metric in ("isp", "scs"):
        assert pair[metric]["difference"] == whole[metric]["difference"]
        assert pair[metric]["interval"] == whole[metric]["interval"]
        assert pair[metric]["p_holm"] >= pair[metric]["p"]
    page = check_page((out / "sweep.html").read_text())
    assert {"isp-guidance-title", "scs-steps-title", "trade-title", "pair-table", "cell-table"} <= set(
        page.ids
    )
    rows = list(csv.DictReader((out / "sweep.csv").open()))
    assert len(rows) == len(results["cells"])
    assert float(rows[0]["isp"]) == results["cells"][0]["isp"]["value"]
    assert (out / "sweep.md").read_text().startswith("| guidance | steps | ISP |")


def test_neighbours_differ_on_one_axis_alone():
    axes = ["guidance", "scheduler", "seed"]
    places = [
        {"guidance": g, "scheduler": s, "seed": k}
        for g in (1, 2.5, 5)
        for s in (None, "A", "B")
        for k in (0, 7)
    ]
    pairs = pair_neighbours(places, axes)
    assert len(pairs) == 2 * 6 + 2 * 6 + 9
    for axis, a, b in pairs:
        assert [key for key in axes if places[a][key] != places[b][key]] == [axis]
    assert {(places[a]["guidance"], places[b]["guidance"]) for x, a, b in pairs if x == "guidance"} == {
        (1, 2.5), (2.5, 5)
    }  # fmt: skip
    assert {places[a]["scheduler"] for axis, a, _ in pairs if axis == "scheduler"} == {None}


def test_schedulers_templates_and_seeds_vary(tiny_model, tmp_path):
    study = make_study(
        tiny_model, synsets="dog.n.01,bird.n.01", samples=1, steps=2, guidance=3.0, keep="none"
    )
    axes = {"scheduler": [None, "EulerDiscreteScheduler"], "template": ["base", "empty"], "seed": [0, 1]}
    runs = run_sweep(study, axes, tmp_path)
    assert len(runs) == 8
    logits = {run.path.name: run.logits()["dog.n.01"].tobytes() for run in runs}
    assert len(set(logits.values())) == 8
    names = {run.path.name: run for run in runs}
    alone = run_study(
        study.model_copy(
            update={
                "scheduler": "EulerDiscreteScheduler",
                "templates": ["empty"],
                "common_seeds": True,
                "seed": 1,
            }
        ),
        tmp_path / "alone",
    )
    cell = names["scheduler-EulerDiscreteScheduler_template-empty_seed-1"]
    assert alone.logits()["dog.n.01"].tobytes() == cell.logits()["dog.n.01"].tobytes()
    seeds = {name: run.plan[0].seed for name, run in names.items()}
    assert len(set(seeds.values())) == 2
    results = json.loads((tmp_path / "sweep.json").read_text())
    assert {row["same_noise"] for row in results["neighbours"] if row["axis"] == "seed"} == {False}
    assert {row["same_noise"] for row in results["neighbours"] if row["axis"] != "seed"} == {True}
    check_page((tmp_path / "sweep.html").read_text())


def test_what_cannot_be_drawn_is_told_before_anything_is(tmp_path):
    from t2iprobe.testing import tiny_pipeline

    tiny_pipeline("ldm").save_pretrained(tmp_path / "ldm")
    study = make_study(tmp_path / "ldm", synsets="dog.n.01", samples=1)
    monkey = {"guidance": [1.0], "steps": [1], "scheduler": ["DDIMScheduler"], "template": ["{lema}"]}
    with pytest.raises(UserError, match="lema"):
        run_sweep(study, monkey, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_dry_run_predicts_and_writes_nothing(swept, tiny_model, tmp_path):
    plan = plan_sweep(make_study(tiny_model), {"steps": [1, 2, 4]}, tmp_path / "none")
    assert (plan["pictures"], plan["stored"], len(plan["cells"])) == (27, 0, 3)
    assert plan["predicted_seconds"] > 0
    assert list(tmp_path.iterdir()) == []
    known = plan_sweep(make_study(tiny_model), AXES, swept[0])
    assert (known["stored"], known["predicted_seconds"]) == (36, None)


def test_time_is_that_of_each_cells_steps(monkeypatch, tiny_model):
    """Measured at 2 and 6 steps, with and without guidance; of what is missing alone."""
    study = make_study(tiny_model)
    axes = {"guidance": [1.0, 3.0, 5.0], "steps": [10, 2, 7]}

    def cost(guidance, steps):
        return steps * (2 if guidance > 1 else 1) + 3

    drawn = []

    def pass_time(bench, count, steps):
        drawn.append(steps)
        return cost(bench.study.guidance, steps) * count

    monkeypatch.setattr(prediction.Bench, "draw", pass_time)
    monkeypatch.setattr(prediction.Bench, "read_logits", lambda _: {})
    monkeypatch.setattr(planning.SweepPlan, "time_report", lambda *_: 7.0)
    plan = plan_sweep(study, axes, None)
    parts = plan["seconds"]
    cells = list_cells(study, axes)
    assert parts["pictures"] == pytest.approx(9 * sum(cost(c.study.guidance, c.study.steps) for c in cells))
    assert parts["report"] == 7.0
    assert plan["predicted_seconds"] == pytest.approx(sum(parts.values()))
    assert set(drawn) == {2, 6}
    assert len(drawn) < 20


def test_the_last_share_writes_the_pages(swept, tiny_model, tmp_path):
    study, out = make_study(tiny_model), tmp_path / "s"
    told = []
    run_sweep(study, AXES, out, share=(1, 2), progress=lambda done, of: told.append((done, of)))
    assert told[-1] == (16, 16)
    assert not (out / "sweep.json").exists()
    assert not list(out.glob("*/results.json"))
    run_sweep(study, AXES, out, share=(0, 2))
    check_same_sweep(out, swept[0])


def check_same_sweep(out, whole):
    cells = json.loads((out / "sweep.json").read_text())["cells"]
    assert len(cells) == 4
    for cell in cells:
        found, wanted = (Run.open(folder / cell["name"]) for folder in (out, whole))
        assert found.verify() == []
        for file in wanted.path.rglob("*.png"):
            assert (found.path / file.relative_to(wanted.path)).read_bytes() == file.read_bytes()
        for name, logits in wanted.logits().items():
            assert np.abs(logits - found.logits()[name]).max() < 1e-4  # a judge's kernels sum by batch size
        results = json.loads((wanted.path / "results.json").read_text())["results"]
        assert cell["isp"]["value"] == pytest.approx(results["isp"]["value"], abs=1e-6)


def words_of_sweep(model, out):
    settings = [f"--set={key}={value}" for key, value in SETTINGS.items()]
    over = [f"--over={axis}={','.join(map(str, values))}" for axis, values in AXES.items()]
    words = ["hypernymy", "sweep", "--model", model, *settings, *over, "--out", out, "--json"]
    return ["-m", "t2iprobe", *map(str, words)]


@pytest.mark.slow
def test_a_launch_draws_a_sweep(swept, tiny_model, tmp_path):
    log = tmp_path / "log"
    launch = ["-m", "accelerate.commands.launch", "--num_processes=2", "--num_machines=1"]
    process = start_python([*launch, *words_of_sweep(tiny_model, tmp_path / "s")], log)
    assert process.wait(200) == 0, Path(f"{log}.err").read_text()
    assert len(json.loads(Path(f"{log}.out").read_text())["cells"]) == 4  # once
    check_same_sweep(tmp_path / "s", swept[0])
    locks = {path.name for path in (tmp_path / "s" / "guidance-3_steps-2" / "locks").glob("*-of-*")}
    assert locks == {"0-of-2", "1-of-2"}


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray is an extra: t2iprobe[cluster]")
def test_a_cluster_draws_a_sweep(swept, tiny_model, tmp_path):
    log = tmp_path / "log"
    with ray_cluster() as cluster:
        cluster.start_head(cores=2)
        where = ["--cluster", cluster.address, "--worker-cores", "1", "--set=batch_size=2"]
        words = [*words_of_sweep(tiny_model, tmp_path / "s"), *where]
        process = start_python(words, log, **cluster.environment)
        assert process.wait(200) == 0, Path(f"{log}.err").read_text()
    costs = json.loads(Path(f"{log}.out").read_text())["cluster"]
    assert costs == read_costs(tmp_path / "s")
    assert costs["done"] == costs["given"] == 36
    check_same_sweep(tmp_path / "s", swept[0])


@pytest.mark.slow
def test_a_killed_sweep_goes_on(tiny_model: Path, tmp_path: Path):
    words = [
        *("hypernymy", "sweep", "--model", tiny_model, "--synsets", "dog.n.01,bird.n.01", "--samples", 20),
        *("--over", "guidance=1,3", "--over", "steps=2", "--set", "dtype=float32", "--set", "batch_size=8"),
        *("--keep", "none", "--out", tmp_path / "s"),
    ]
    second = tmp_path / "s" / "guidance-3_steps-2" / "shards"
    killed = start(*words).kill_when(lambda: any(second.glob("*.npz")))
    assert killed.code == -signal.SIGKILL
    assert not (tmp_path / "s" / "sweep.json").exists()
    before = {path: path.read_bytes() for path in (tmp_path / "s").glob("*/shards/*.npz")}
    assert before
    done = call(*words, "--json")
    assert json.loads(done.out)["cells"][1]["name"] == "guidance-3_steps-2"
    assert {path: path.read_bytes() for path in before} == before
    clean = call(*words[:-1], tmp_path / "clean")
    assert clean.out.startswith("| guidance | steps |")
    for cell in ("guidance-1_steps-2", "guidance-3_steps-2"):
        one, other = (Run.open(tmp_path / name / cell).logits() for name in ("s", "clean"))
        assert {name: one[name].tobytes() for name in one} == {name: other[name].tobytes() for name in other}
    call(*words, "--samples", 30, code=2)
    call("hypernymy", "sweep", "tiny", "--over", "stepz=2", "--out", tmp_path / "bad", code=2)
    assert not (tmp_path / "bad").exists()
