"""A run on many devices is the run of one process, whatever dies and whoever joins meanwhile."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from ray_cluster import ray_cluster, read_costs, start_python, wait_until

from t2iprobe.cluster import Cluster, describe_costs
from t2iprobe.config import Study, load_study
from t2iprobe.errors import UserError
from t2iprobe.hypernymy.cluster import SHARD_BATCHES, run_on_cluster, shard_size
from t2iprobe.hypernymy.study import run_study
from t2iprobe.runs import Run

needs_ray = pytest.mark.skipif(
    not importlib.util.find_spec("ray"), reason="Ray is an extra: t2iprobe[cluster]"
)
BATCH = 4
WORDS = ("dog.n.01", "bird.n.01", "domestic_cat.n.01")
SETTINGS: dict[str, Any] = {
    "synsets": ",".join(WORDS),
    "samples": 30,
    "steps": 60,  # a shard takes seconds: it can be killed in the middle, and machines have time to join
    "guidance": 3.0,
    "keep": "all",
    "batch_size": BATCH,
    "dtype": "float32",
    "classifier_dtype": "float32",
}
PICTURES = len(WORDS) * SETTINGS["samples"]
FEW = 12  # samples of a shorter run
RULE: dict[str, Any] = {"until": "isp ± 0.12", "samples": 60, "steps": 1, "batch_size": 1}  # several looks


def make_study(model: Path, **more: Any) -> Study:
    return load_study(None, {"model": str(model), **SETTINGS, **more})


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run of one process."""
    return run_study(make_study(tiny_model), tmp_path_factory.mktemp("whole") / "run")


def check_same(run: Run, whole: Run, samples: int = SETTINGS["samples"]) -> None:
    """The pictures, logits and results of the whole run, or of its first samples."""
    assert run.complete
    assert run.verify() == []  # among others: no picture is in two shards
    files = sorted(path.relative_to(run.path) for path in run.path.rglob("*.png"))
    assert len(files) == len(WORDS) * samples
    for file in files:
        assert (run.path / file).read_bytes() == (whole.path / file).read_bytes(), file
    for synset, logits in run.logits().items():
        # A judge's kernels sum otherwise in a batch of another size.
        assert np.abs(logits - whole.logits()[synset][:samples]).max() < 1e-4
    if samples == SETTINGS["samples"]:
        found = [json.loads((each.path / "results.json").read_text())["results"] for each in (run, whole)]
        for key in ("isp", "scs"):
            assert found[0][key]["value"] == pytest.approx(found[1][key]["value"], abs=1e-6)


@pytest.fixture(scope="module")
def ruled(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run of one process that ends by a rule."""
    return run_study(make_study(tiny_model, **RULE), tmp_path_factory.mktemp("ruled") / "run")


def check_same_decisions(out: Path, ruled: Run) -> None:
    """The same bytes at every look, so the same end. Batches are of one picture: no kernel sums otherwise."""
    run = Run.open(out)
    found, wanted = run.logit_rows(), ruled.logit_rows()
    assert {p: row.tobytes() for p, row in found.items()} == {p: row.tobytes() for p, row in wanted.items()}
    for file in ruled.path.rglob("*.png"):
        assert (run.path / file.relative_to(ruled.path)).read_bytes() == file.read_bytes()
    results = [json.loads((each.path / "results.json").read_text()) for each in (run, ruled)]
    for key in ("until", "results", "synsets"):
        assert results[0][key] == results[1][key], key
    assert results[0]["until"]["stopped"] == "reached"
    assert len(results[0]["until"]["looks"]) > 3
    assert results[0]["until"]["pictures"] == len(found) < len(run.plan)
    assert run.verify() == []


def command(model: Path, out: Path, *more: object, **settings: object) -> list[str]:
    given = [f"--set={key}={value}" for key, value in {**SETTINGS, **settings}.items()]
    words = ["hypernymy", "run", "--model", model, *given, "--out", out, "--json", *more]
    return ["-m", "t2iprobe", *map(str, words)]


# -- processes of one launch -------------------------------------------------------------------------------


def launch(processes: int, words: list[str], log: Path) -> subprocess.Popen[str]:
    return start_python(
        ["-m", "accelerate.commands.launch", f"--num_processes={processes}", "--num_machines=1", *words], log
    )


def told(log: Path) -> list[str]:
    return [line for line in Path(f"{log}.err").read_text().splitlines() if line.startswith("t2iprobe:")]


def find_rank(launcher: subprocess.Popen[str], rank: int) -> psutil.Process | None:
    for process in psutil.Process(launcher.pid).children(recursive=True):
        try:
            if process.environ().get("RANK") == str(rank):
                return process
        except psutil.Error:
            continue
    return None


@pytest.mark.slow
def test_a_launch_goes_on_after_a_death_with_more_processes(
    whole: Run, tiny_model: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "run", tmp_path / "first"
    launcher = launch(2, command(tiny_model, out), log)

    def has_stored() -> bool:
        return (out / "manifest.json").exists() and any(p % 2 for p in Run.open(out).done())

    wait_until(has_stored, launcher, log)
    dying = find_rank(launcher, 1)
    assert dying is not None
    dying.send_signal(signal.SIGKILL)
    assert launcher.wait(120) != 0
    (line,) = told(log)
    assert "the same command continues, with any number of processes" in line
    assert Path(f"{log}.out").read_text() == ""
    before = {path: path.stat().st_mtime_ns for path in Run.open(out).shards}
    stored = Run.open(out).done()
    assert 0 < len(stored) < PICTURES
    assert {position % 2 for position in stored} == {0, 1}  # the survivor stored what it had

    log = tmp_path / "second"
    assert launch(3, command(tiny_model, out), log).wait(300) == 0, Path(f"{log}.err").read_text()
    printed = json.loads(Path(f"{log}.out").read_text())  # once: by the first process alone
    check_same(Run.open(out), whole)
    assert printed["results"]["isp"]["value"] > 0
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())
    assert {f"{number}-of-3" for number in range(3)} <= {path.name for path in (out / "locks").iterdir()}
    assert not (out / ".launch").exists()


@pytest.mark.slow
def test_a_launch_decides_what_one_process_does(ruled: Run, tiny_model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert launch(2, command(tiny_model, tmp_path / "run", **RULE), log).wait(200) == 0, told(log)
    check_same_decisions(tmp_path / "run", ruled)
    assert json.loads(Path(f"{log}.out").read_text())["until"]["stopped"] == "reached"


@pytest.mark.slow
def test_a_dry_run_of_a_launch_measures_every_process(tiny_model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert launch(2, command(tiny_model, tmp_path / "run", "--dry-run"), log).wait(200) == 0, told(log)
    check_plan(json.loads(Path(f"{log}.out").read_text()), tmp_path / "run")  # once


def check_plan(plan: dict[str, Any], out: Path) -> None:
    """The plan of two places, of which nothing is written."""
    assert (plan["pictures"], plan["stored"], plan["places"]) == (PICTURES, 0, 2)
    assert plan["predicted_seconds"] == pytest.approx(sum(plan["seconds"].values()))
    # Half of the pictures, in 60 steps each: a place's, not everybody's.
    batches = PICTURES / 2 / plan["batch_size"]
    alone = batches * SETTINGS["steps"] * plan["step_seconds"] / plan["lanes"]
    assert plan["seconds"]["pictures"] == pytest.approx(alone, rel=0.6)
    assert not out.exists()


@pytest.mark.slow
def test_a_mistake_is_told_once_by_a_launch(tiny_model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = command(tiny_model, tmp_path / "run", "--synsets", "dgo.n.01", "--set=synsets=dgo.n.01")
    assert launch(2, words, log).wait(200) != 0
    (line,) = told(log)
    assert "dgo.n.01" in line
    assert not (tmp_path / "run").exists()


# -- a Ray cluster -----------------------------------------------------------------------------------------


def list_busy(out: Path) -> list[int]:
    return [worker["pid"] for worker in read_costs(out)["workers"] if worker["state"] == "busy"]


@needs_ray
@pytest.mark.slow
def test_workers_die_and_join_and_the_run_is_the_same(whole: Run, tiny_model: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    with ray_cluster() as cluster:
        cluster.start_head(cores=1)
        words = command(tiny_model, out, "--cluster", cluster.address, "--worker-cores", 1)
        driver = start_python(words, log, **cluster.environment)
        (killed,) = wait_until(lambda: list_busy(out), driver, log)
        cluster.join(cores=2)  # while the first draws
        wait_until(lambda: len(now := list_busy(out)) == 3 and killed in now, driver, log)
        os.kill(killed, signal.SIGKILL)
        assert driver.wait(300) == 0, Path(f"{log}.err").read_text()
    costs = json.loads(Path(f"{log}.out").read_text())["cluster"]
    check_same(Run.open(out), whole)
    dead = [worker for worker in costs["workers"] if worker["state"] == "dead"]
    assert [worker["pid"] for worker in dead] == [killed]
    late = [worker for worker in costs["workers"] if worker["pid"] != killed]
    assert len(late) >= 2
    assert all(worker["done"] > 0 for worker in late[:2])
    assert 0 < costs["lost"] == dead[0]["lost"] <= BATCH * SHARD_BATCHES
    assert costs["given"] == PICTURES + costs["lost"]  # nothing twice beyond the lost shard
    assert sum(worker["done"] for worker in costs["workers"]) == costs["done"] == PICTURES
    assert read_costs(out) == costs
    text = "\n".join(describe_costs(costs, "pictures"))
    assert f"{costs['lost']} in the shards of dead workers were given out again" in text


@needs_ray
@pytest.mark.slow
def test_a_cluster_decides_what_one_process_does(ruled: Run, tiny_model: Path, tmp_path: Path) -> None:
    """Though a worker dies in the middle of a look."""
    out, log = tmp_path / "run", tmp_path / "log"
    with ray_cluster() as cluster:
        cluster.start_head(cores=2)
        words = command(tiny_model, out, "--cluster", cluster.address, "--worker-cores", 1, **RULE)
        driver = start_python(words, log, **cluster.environment)
        os.kill(wait_until(lambda: list_busy(out), driver, log)[0], signal.SIGKILL)
        assert driver.wait(200) == 0, told(log)
    check_same_decisions(out, ruled)
    costs = read_costs(out)
    assert costs["done"] == costs["of"] == len(ruled.done())
    assert costs["given"] == costs["done"] + costs["lost"]
    assert [worker["state"] for worker in costs["workers"]].count("dead") == 1


@needs_ray
@pytest.mark.slow
def test_a_dry_run_measures_a_worker(tiny_model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with ray_cluster() as cluster:
        cluster.start_head(cores=2)
        where = ("--cluster", cluster.address, "--worker-cores", 1)
        words = command(tiny_model, tmp_path / "run", *where, "--dry-run")
        assert start_python(words, log, **cluster.environment).wait(200) == 0, told(log)
        check_plan(json.loads(Path(f"{log}.out").read_text()), tmp_path / "run")
        over = ["--over=guidance=1,3", "--over=steps=30,60"]
        words = [*("-m", "t2iprobe", "hypernymy", "sweep"), *words[4:], *over]
        assert start_python(words, log, **cluster.environment).wait(200) == 0, told(log)
    plan = json.loads(Path(f"{log}.out").read_text())
    assert (plan["pictures"], plan["places"], len(plan["cells"])) == (4 * PICTURES, 2, 4)
    assert plan["predicted_seconds"] == pytest.approx(sum(plan["seconds"].values()))
    assert not (tmp_path / "run").exists()


@needs_ray
@pytest.mark.slow
def test_a_killed_driver_goes_on(whole: Run, tiny_model: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    with ray_cluster() as cluster:
        cluster.start_head(cores=2)
        words = command(
            tiny_model, out, "--set", f"samples={FEW}", "--cluster", cluster.address, "--worker-cores", 1
        )
        driver = start_python(words, log, **cluster.environment)
        wait_until(lambda: read_costs(out)["done"] > 0, driver, log)
        driver.kill()
        driver.wait()
        stored = len(Run.open(out).done())
        assert 0 < stored < FEW * len(WORDS)
        again = start_python(words, log, **cluster.environment)
        assert again.wait(300) == 0, Path(f"{log}.err").read_text()
    costs = json.loads(Path(f"{log}.out").read_text())["cluster"]
    assert costs["of"] == costs["given"] == FEW * len(WORDS) - stored
    check_same(Run.open(out), whole, FEW)


@needs_ray
@pytest.mark.slow
def test_without_its_head_a_cluster_is_given_up_and_one_process_goes_on(
    whole: Run, tiny_model: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    with ray_cluster() as cluster:
        cluster.start_head(cores=2)
        words = command(
            tiny_model, out, "--set", f"samples={FEW}", "--cluster", cluster.address, "--worker-cores", 1
        )
        driver = start_python(words, log, **cluster.environment)
        wait_until(lambda: read_costs(out)["done"] > 0, driver, log)
        cluster.stop()
        assert driver.wait(120) == 2
    (line,) = told(log)
    assert "lost the Ray cluster" in line
    stored = len(Run.open(out).done())
    assert 0 < stored < FEW * len(WORDS)
    counts: list[tuple[int, int]] = []
    run = run_study(
        make_study(tiny_model, samples=FEW), out, progress=lambda done, of: counts.append((done, of))
    )
    assert counts[-1] == (FEW * len(WORDS) - stored, FEW * len(WORDS) - stored)
    check_same(run, whole, FEW)


@needs_ray
@pytest.mark.slow
def test_what_a_worker_lacks_is_told(tmp_path: Path) -> None:
    with ray_cluster() as cluster:
        cluster.start_head(cores=1)
        log = tmp_path / "log"
        where = ("--cluster", cluster.address, "--worker-cores", 1)
        words = command(tmp_path / "none", tmp_path / "run", *where)
        assert start_python(words, log, **cluster.environment).wait(200) == 2
        (line,) = told(log)
        assert str(tmp_path / "none") in line
        assert "(on " in line  # which machine
        assert not (tmp_path / "run").exists()


def test_no_cluster_is_told_at_once(tiny_model: Path, tmp_path: Path) -> None:
    study = make_study(tiny_model)
    if importlib.util.find_spec("ray"):
        began = time.monotonic()
        with pytest.raises(UserError, match="no Ray cluster at ray://127.0.0.1:9 .*ray start --head"):
            run_on_cluster(study, tmp_path / "run", Cluster("ray://127.0.0.1:9"))
        assert time.monotonic() - began < 15
        for address in ("nowhere", "ray://here:\u00b2"):
            with pytest.raises(UserError, match=f"--cluster takes local or ray://HOST:PORT, not '{address}'"):
                run_on_cluster(study, tmp_path / "run", Cluster(address))
    assert not (tmp_path / "run").exists()


def test_without_ray_the_extra_is_named(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install t2iprobe\[cluster\]"):
        run_on_cluster(make_study(tiny_model), tmp_path / "run", Cluster("local"))


def test_shards_are_whole_batches_of_some_seconds() -> None:
    assert shard_size(16, 1000, 2, None) == 16  # nothing is known of the worker yet
    assert shard_size(16, 1000, 2, 0.1) == 16
    assert shard_size(16, 1000, 2, 8.0) == 80  # ten seconds
    assert shard_size(16, 100_000, 2, 1000.0) == 16 * SHARD_BATCHES
    assert shard_size(16, 40, 4, 1000.0) == 16  # the end: each its part
