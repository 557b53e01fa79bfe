"""Every command that docs/cluster.md shows is run, with smaller settings."""

import importlib.util
import json
import re
import shlex
import socket
import sys
from pathlib import Path

import pytest
from concept_pictures import draw_concept
from ray_cluster import ray_cluster, start_python
from real_command import SCRIPTS

from t2iprobe.runs import Run

DOCS = Path(__file__).parents[1] / "docs"
SMALL = ["--set=synsets=dog.n.01", "--set=samples=3", "--set=steps=2", "--set=dtype=float32"]
QUICK = [
    *("--set=max_steps=2", "--set=stop=budget", "--set=grid=0", "--set=evaluate=0", "--set=steps=2"),
    *("--set=dtype=float32", "--set=init=thing"),
]


def commands() -> list[list[str]]:
    text = (DOCS / "cluster.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def shorten(words: list[str], model: Path) -> list[str]:
    """The words after `python` for a command of the page."""
    trains = any(word.endswith("train_concepts.py") for word in words)
    words = [str(SCRIPTS / "train_concepts.py") if "train_concepts" in word else word for word in words]
    if words[0] == "accelerate":
        words = ["-m", "accelerate.commands.launch", *words[2:]]
    elif words[0] == "t2iprobe":
        words = ["-m", *words]
    elif words[0] == "python":
        words = words[1:]
    if "--cluster" in words:
        words += ["--worker-cores", "1"]
    return [*words, "--model", str(model), *(QUICK if trains else SMALL)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    draw_concept(tmp_path / "pictures" / "cat", 0)
    draw_concept(tmp_path / "pictures" / "dog", 1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(words: list[str], folder: Path) -> None:
    if any("train_concepts" in word for word in words):
        for name in ("cat", "dog"):
            assert (
                json.loads((folder / "runs" / "concepts" / name / "training.json").read_text())["steps"] == 2
            )
    else:
        assert Run.open(folder / "runs" / "embedded").complete
        assert (folder / "runs" / "embedded" / "report.html").exists()


def chosen(*needed: str) -> list[list[str]]:
    return [words for words in commands() if all(each in words for each in needed)]


@pytest.mark.slow
@pytest.mark.parametrize("words", [each for each in chosen("accelerate") if "--num_machines" not in each])
def test_launches_of_one_machine(words: list[str], tiny_model: Path, folder: Path) -> None:
    log = folder / "log"
    assert start_python(shorten(words, tiny_model), log).wait(200) == 0, Path(f"{log}.err").read_text()
    check(words, folder)


@pytest.mark.slow
def test_launches_of_two_machines(tiny_model: Path, folder: Path) -> None:
    (words,) = chosen("accelerate", "--num_machines")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    logs = [folder / "first", folder / "second"]
    machines = []
    for rank, log in enumerate(logs):
        own = list(words)
        for name, value in (
            ("--machine_rank", str(rank)),
            ("--main_process_ip", "127.0.0.1"),
            ("--main_process_port", port),
        ):
            own[own.index(name) + 1] = value
        machines.append(start_python(shorten(own, tiny_model), log))
    for machine, log in zip(machines, logs, strict=True):
        assert machine.wait(200) == 0, Path(f"{log}.err").read_text()
    printed = [Path(f"{log}.out").read_text() for log in logs]
    assert "in-subtree probability" in printed[0]
    assert printed[1] == ""
    check(words, folder)
    assert {path.name for path in (folder / "runs" / "embedded" / "locks").glob("*-of-*")} == {
        "0-of-2",
        "1-of-2",
    }


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray is an extra: t2iprobe[cluster]")
def test_commands_for_a_ray_cluster(tiny_model: Path, folder: Path) -> None:
    clustered = [words for words in commands() if "--cluster" in words]
    assert [words[words.index("--cluster") + 1].partition("10.0")[0] for words in clustered] == [
        "ray://",
        "ray://",
        "local",
    ]
    with ray_cluster() as cluster:
        cluster.start_head(cores=1)
        for number, words in enumerate(clustered):
            own = shorten(words, tiny_model)
            if words[-1] != "local":
                own[own.index("--cluster") + 1] = cluster.address
            else:
                (folder / "runs" / "embedded").rename(folder / "runs" / "first")
            log = folder / f"log{number}"
            environment = cluster.environment
            assert start_python(own, log, **environment).wait(200) == 0, Path(f"{log}.err").read_text()
            check(words, folder)
            assert "0 in the shards" not in Path(f"{log}.out").read_text()
    thumbnails = [
        {path.name: path.read_bytes() for path in (folder / "runs" / run).rglob("*.webp")}
        for run in ("first", "embedded")
    ]
    assert len(thumbnails[0]) == 3
    assert thumbnails[0] == thumbnails[1]


def test_other_commands_of_the_page_are_known() -> None:
    rest = [words for words in commands() if words[0] != "accelerate" and "--cluster" not in words]
    assert [words[:2] for words in rest] == [["pip", "install"], ["ray", "start"], ["ray", "start"]]
    project = (DOCS.parent / "pyproject.toml").read_text()
    assert re.search(r"^cluster = \[", project, re.MULTILINE)
    assert Path(sys.executable).with_name("ray").exists() or not importlib.util.find_spec("ray")


def test_links_of_the_page_lead_somewhere() -> None:
    text = (DOCS / "cluster.md").read_text(encoding="utf-8")
    assert [link for link in re.findall(r"\]\(([^)#:]+)\)", text) if not (DOCS / link).exists()] == []
