import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from t2iprobe.cli import _default_out
from t2iprobe.runs import Run


def call(*words: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the real command in a process of its own and expect its exit code."""
    command = [sys.executable, "-m", "t2iprobe", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"})
    assert done.returncode == code, done.stdout + done.stderr
    if code == 2:
        assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def run_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    done = call(
        *("hypernymy", "run", "--model", tiny_model, "--synsets", "dog.n.01,bird", "--samples", "2"),
        *("--steps", "2", "--guidance", "3", "--seed", "7", "--out", out),
    )
    assert "in-subtree probability" in done.stdout
    assert "report.html" in done.stdout
    assert done.stderr == ""
    return out


def _child_seconds() -> float:
    """CPU seconds of the processes that ended: a busy machine does not make them more."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['t2iprobe', '--help']\n"
        "from t2iprobe.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'timm', 'nltk', 'scipy', 'numpy', 'pydantic'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    seconds = []
    for _ in range(3):
        begin = _child_seconds()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(_child_seconds() - begin)

    assert "hypernymy" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
    assert min(seconds) < 0.5


@pytest.mark.parametrize(
    "command", ["run", "score", "pictures", "report", "compare", "unknown", "verify", "export"]
)
def test_every_command_explains_itself(command: str) -> None:
    assert "--json" in call("hypernymy", command, "--help").stdout


def test_a_second_call_answers_at_once(run_folder: Path, tiny_model: Path) -> None:
    begin = _child_seconds()
    done = call(
        *("hypernymy", "run", "--model", tiny_model, "--synsets", "dog.n.01,bird", "--samples", "2"),
        *("--steps", "2", "--guidance", "3", "--seed", "7", "--out", run_folder, "--json"),
    )

    assert json.loads(done.stdout)["results"]["isp"]["value"] > 0
    assert _child_seconds() - begin < 5


def test_a_dry_run_prints_the_plan_and_writes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    words = (
        "hypernymy",
        "run",
        "tiny",
        "--model",
        tiny_model,
        "--set",
        "steps=2",
        "--dry-run",
        "--out",
        tmp_path / "a",
    )

    text, plan = call(*words).stdout, json.loads(call(*words, "--json").stdout)

    assert "12 pictures of 6 synsets, 0 of them stored" in text
    assert (plan["pictures"], plan["configuration"]["steps"]) == (12, 2)
    assert not (tmp_path / "a").exists()


def test_score_writes_results(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    logits = {name: rng.standard_normal((4, 1000)).astype(np.float32) for name in ("dog.n.01", "bird.n.01")}
    np.savez(tmp_path / "logits.npz", **logits)

    call("hypernymy", "score", tmp_path / "logits.npz", "--out", tmp_path / "results.json")

    found = json.loads((tmp_path / "results.json").read_text())
    for metric in ("isp", "scs", "subtree_entropy", "marginal_entropy"):
        assert found["results"][metric].keys() >= {"value", "stderr", "interval"}
    row = found["synsets"][0]
    assert row.keys() >= {
        "synset",
        "classes",
        "samples",
        "isp",
        "scs",
        "scs_raw",
        "subtree_entropy",
        "marginal_entropy",
    }


def test_reports_lists_and_exports(run_folder: Path, tmp_path: Path) -> None:
    (run_folder / "report.html").unlink()
    assert json.loads(call("hypernymy", "report", run_folder, "--json").stdout)["report"].endswith(
        "report.html"
    )
    assert (run_folder / "report.html").exists()
    assert json.loads(call("hypernymy", "unknown", run_folder, "--json").stdout)["of"] == 2
    assert "of 2 synsets are not above chance" in call("hypernymy", "unknown", run_folder).stdout
    assert call("hypernymy", "verify", run_folder).stdout == "everything that is stored is whole\n"
    call("hypernymy", "export", run_folder, "--format", "npz", "--out", tmp_path / "logits.npz")
    assert np.load(tmp_path / "logits.npz")["dog.n.01"].shape == (2, 1000)
    call("hypernymy", "compare", run_folder, run_folder, "--out", tmp_path / "both.html")
    assert (tmp_path / "both.html").exists()


def test_verify_fails_where_something_is_damaged(run_folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    shard = Run.open(copy).shards[0]
    shard.write_bytes(shard.read_bytes()[:1000])

    damaged = call("hypernymy", "verify", copy, code=2)
    repaired = json.loads(call("hypernymy", "verify", copy, "--repair", "--json").stdout)

    assert "add --repair" in damaged.stderr
    assert (repaired["repaired"], repaired["missing"], repaired["of"]) == (True, 4, 4)


def test_pictures_made_elsewhere(run_folder: Path, tmp_path: Path) -> None:
    words = ("hypernymy", "pictures", run_folder / "thumbnails", "--out", tmp_path / "run")

    found = json.loads(call(*words, "--json").stdout)

    assert [row["synset"] for row in found["synsets"]] == ["bird.n.01", "dog.n.01"]
    assert call(*words).stdout.startswith("in-subtree probability")


def test_info_tells_what_is_here() -> None:
    found = json.loads(call("info", "--json").stdout)

    assert "cpu" in found["devices"]
    assert "tiny" in found["presets"]
    assert call("--version").stdout.strip() == found["versions"]["t2iprobe"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "nosuch"], "there is no preset or file 'nosuch'"),
        (["run", "--synsets", "dgo.n.01"], "dgo.n.01"),
        (["run", "--template", "a {lema}"], "unknown field {lema}"),
        (["run", "--set", "stesp=3"], "did you mean steps"),
        (["run", "--shard", "2/2"], "--shard takes i/n"),
        (["run", "--classifier", "nosuch"], "there is no classifier"),
        (["run", "--samples", "0"], "bad value for samples: 0"),
        (["run", "--hierarchy", "none.csv"], "none.csv"),
        (["run", "--prompts", "none.jsonl"], "none.jsonl"),
        (["run", "--device", "nosuch"], "there is no device 'nosuch' here"),
        (["score", "none.npz"], "there is no file none.npz"),
        (["pictures", "none"], "there is no folder none"),
        (["report", "none"], "none is not a run directory"),
        (["unknown", "none"], "none is not a run directory"),
        (["compare", "none", "none"], "none is not a run directory"),
    ],
)
def test_mistakes_are_told_in_one_line(
    words: list[str], message: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(tiny_model)] if words[0] == "run" else []

    done = call("hypernymy", *words, *model, code=2)

    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("t2iprobe: ")
    assert not (tmp_path / "runs").exists()


def test_a_run_is_called_as_its_model_or_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert _default_out(None, ".") == Path("runs/mine")
    assert _default_out(None, str(tmp_path / "mine")) == Path("runs/mine")
    assert _default_out(None, "org/model@main") == Path("runs/model")
    assert _default_out(Path("there"), ".") == Path("there")
