"""Concepts trained on many devices are those of one process, to rounding."""

import importlib.util
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from concept_pictures import draw_concept
from ray_cluster import ray_cluster, read_costs, start_python, wait_until
from real_command import SCRIPTS
from safetensors.torch import load_file

from t2iprobe.cluster import Cluster
from t2iprobe.errors import UserError
from t2iprobe.inversion.cluster import group_size, train_on_cluster
from t2iprobe.inversion.commands import load_training, train_folders
from t2iprobe.inversion.settings import Training

needs_ray = pytest.mark.skipif(
    not importlib.util.find_spec("ray"), reason="Ray is an extra: t2iprobe[cluster]"
)
NAMES = ("ant", "bee", "cat", "cow", "dog")
SETTINGS: dict[str, Any] = {
    **{"grid": 2, "evaluate": 0, "dtype": "float32", "batch": 1, "items": 4, "steps": 2, "init": "thing"},
    **{"max_steps": 200, "every": 10, "together": 2, "stop": "budget"},
}


def settings_for(model: Path, **more: Any) -> Training:
    return load_training({"model": str(model), **SETTINGS, **more})


@pytest.fixture(scope="module")
def concepts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("concepts")
    for seed, name in enumerate(NAMES):
        draw_concept(folder / name, seed)
    (folder / "ant" / "0.txt").write_text("a photo of {}")
    (folder / "ant" / "1.txt").write_text("two of {}")
    (folder / "ant" / "2.txt").write_text("{} in the snow")
    return folder


@pytest.fixture(scope="module")
def whole(concepts: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    train_folders(concepts, settings_for(tiny_model), out)
    return out


def command(concepts: Path, model: Path, out: Path, *more: object) -> list[str]:
    given = {**SETTINGS, "model": model}
    words = [SCRIPTS / "train_concepts.py", concepts, "--out", out, "--json", *more]
    return [*map(str, words), *(f"--set={key}={value}" for key, value in given.items())]


def files_of(out: Path) -> Iterator[tuple[Path, Path]]:
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.parent != out:
            yield path.relative_to(out), path


def check_same(out: Path, whole: Path, concepts: Path) -> None:
    """The same files, the same rows and curves to rounding."""
    assert [name for name, _ in files_of(out)] == [name for name, _ in files_of(whole)]
    for name in NAMES:
        one, other = (json.loads((each / name / "training.json").read_text()) for each in (out, whole))
        assert one["pictures"] == other["pictures"]
        assert Path(one["pictures"][0]).parent == concepts / name
        assert torch.allclose(torch.tensor(one["curve"]), torch.tensor(other["curve"]), atol=1e-4)
        assert one["stop"]["rule"] == "budget"
        assert [grid["files"] for grid in one["grids"]] == [grid["files"] for grid in other["grids"]]
        rows = [load_file(each / name / "learned_embeds.safetensors") for each in (out, whole)]
        assert rows[0].keys() == rows[1].keys()
        assert all(torch.allclose(rows[0][key], rows[1][key], atol=1e-3) for key in rows[0])
        settings = [json.loads((each / name / "settings.json").read_text()) for each in (out, whole)]
        assert settings[0] == settings[1]
        assert (out / name / "report.html").exists()


@pytest.mark.slow
def test_a_launch_trains_what_one_process_trains(
    concepts: Path, whole: Path, tiny_model: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    words = ["-m", "accelerate.commands.launch", "--num_processes=2", "--num_machines=1"]
    process = start_python([*words, *command(concepts, tiny_model, out)], log)
    assert process.wait(300) == 0, Path(f"{log}.err").read_text()
    found = json.loads(Path(f"{log}.out").read_text())  # of all concepts, printed once
    assert tuple(found) == NAMES
    check_same(out, whole, concepts)


@needs_ray
@pytest.mark.slow
def test_a_cluster_trains_what_one_process_trains(
    concepts: Path, whole: Path, tiny_model: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    with ray_cluster() as cluster:
        cluster.start_head(cores=2)
        words = command(concepts, tiny_model, out, "--cluster", cluster.address, "--worker-cores", 1)
        process = start_python(words, log, **cluster.environment)

        def busy() -> Any:
            return [each["pid"] for each in read_costs(out)["workers"] if each["state"] == "busy"]

        killed = wait_until(busy, process, log)[0]
        os.kill(killed, signal.SIGKILL)
        assert process.wait(300) == 0, Path(f"{log}.err").read_text()
        costs = read_costs(out)
        assert [worker["pid"] for worker in costs["workers"] if worker["state"] == "dead"] == [killed]
        assert 1 <= costs["lost"] <= SETTINGS["together"]
        assert costs["given"] == len(NAMES) + costs["lost"]
        check_same(out, whole, concepts)

        # What is done is left alone, and what began elsewhere goes on from its state.
        (out / "cluster.json").unlink()
        written = (out / "bee" / "training.json").stat().st_mtime_ns
        assert start_python(words, log, **cluster.environment).wait(200) == 0, Path(f"{log}.err").read_text()
        assert (out / "bee" / "training.json").stat().st_mtime_ns == written
        assert not (out / "cluster.json").exists()


def test_groups_share_a_pass_and_leave_no_worker_idle() -> None:
    assert group_size(8, 100, 4, None) == 8
    assert group_size(8, 10, 4, None) == 3
    assert group_size(8, 1, 4, None) == 1


def test_what_is_lacking_is_told_before_anything_is_written(
    concepts: Path, tiny_model: Path, tmp_path: Path
) -> None:
    nowhere = Cluster("ray://127.0.0.1:9")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no subfolders"):
        train_on_cluster(tmp_path / "empty", settings_for(tiny_model), tmp_path / "out", nowhere)
    with pytest.raises(UserError, match=r"no Ray cluster at|pip install t2iprobe\[cluster\]"):
        train_on_cluster(concepts, settings_for(tiny_model), tmp_path / "out", nowhere)
    assert not (tmp_path / "out").exists()
