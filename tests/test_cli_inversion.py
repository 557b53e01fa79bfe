"""The commands of ``t2iprobe inversion``, each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from concept_pictures import draw_concept
from real_command import call
from safetensors.torch import load_file

SETTINGS = ("items=2", "batch=1", "grid=2", "evaluate=0", "steps=1", "init=thing", "dtype=float32")


def train(folder: Path, model: Path, out: Path, *more: object) -> list:
    return [
        *("inversion", "train", folder, "--token", "<my-cat>", "--model", model, "--stop", "budget"),
        *("--max-steps", 4, "--vectors", 2, *(f"--set={pair}" for pair in SETTINGS), "--out", out, *more),
    ]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_concept(tmp_path_factory.mktemp("concept") / "cat")


@pytest.fixture(scope="module")
def trained(tiny_model: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "out"
    done = call(*train(pictures, tiny_model, out))
    assert done.err == ""
    assert done.out.startswith("<my-cat> ")
    assert "4 steps in" in done.out
    assert "stopped by budget        the budget of 4 steps is spent" in done.out
    assert str(out / "report.html") in done.out
    return out


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['t2iprobe', *sys.argv[1:], '--help']\n"
        "from t2iprobe.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'timm', 'scipy', 'numpy'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    for words in ([], ["inversion"], ["inversion", "train"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
        )
        assert "inversion" in done.stdout
        assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", ["train", "evaluate", "convert", "inspect", "teach"])
def test_every_command_explains_itself(command: str) -> None:
    assert "--json" in call("inversion", command, "--help").out


def test_a_training_told_as_json_is_its_file(trained: Path, tiny_model: Path, pictures: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}

    again = call(*train(pictures, tiny_model, trained))
    found = json.loads(call(*train(pictures, tiny_model, trained, "--json")).out)

    assert again.out.startswith("done before: <my-cat>")
    assert found == json.loads((trained / "training.json").read_text())
    assert found.keys() >= {"token", "vectors", "steps", "stop", "curve", "bands", "statistic", "seconds"}
    assert found["stop"].keys() == {"rule", "step", "value", "reason"}
    assert (found["steps"], found["stop"]["rule"], found["vectors"]) == (4, "budget", 2)
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_a_dry_run_tells_the_cost_and_writes_nothing(
    tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    words = train(pictures, tiny_model, tmp_path / "out", "--dry-run")

    text, plan = call(*words, folder=tmp_path).out, json.loads(call(*words, "--json", folder=tmp_path).out)

    assert "3 pictures, textual-inversion on" in text
    assert "at most 4 steps" in text
    assert (plan["pictures"], plan["max_steps"]) == (3, 4)
    assert plan["seconds"] == pytest.approx(4 * plan["seconds_per_step"])
    assert os.listdir(tmp_path) == []
    missing = call(*train(tmp_path / "none", tiny_model, tmp_path / "out", "--dry-run"), code=2)
    assert "there is no folder" in missing.err


def test_inspect_tells_what_a_file_holds(trained: Path) -> None:
    found = json.loads(call("inversion", "inspect", trained / "learned_embeds.safetensors", "--json").out)

    assert (found["kind"], found["form"], found["token"]) == ("embedding", "diffusers", "<my-cat>")
    assert (found["vectors"], found["width"]) == (2, {"clip_l": 32})
    assert found["metadata"].keys() >= {"base_model", "base_model_hash", "steps", "stop_reason", "recipe"}
    assert "<my-cat>" in call("inversion", "inspect", trained).out
    missing = call("inversion", "inspect", trained / "none.safetensors", code=2)
    assert "none.safetensors" in missing.err


def test_an_adapter_carries_its_recipe(tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    call(*train(pictures, tiny_model, out, "--method", "dreambooth-lora"))
    file = out / "pytorch_lora_weights.safetensors"
    found = json.loads(call("inversion", "inspect", file, "--json").out)
    assert (found["kind"], found["rank"]) == ("lora", 4)
    assert found["metadata"].keys() >= {"base_model", "base_model_hash", "steps", "stop_reason", "recipe"}
    call("inversion", "convert", file, tmp_path / "kohya.safetensors", "--to", "kohya")


def test_convert_writes_every_form(trained: Path, tmp_path: Path) -> None:
    source = trained / "learned_embeds.safetensors"
    (rows,) = load_file(source).values()
    for form in ("diffusers", "a1111", "a1111-pt", "sdxl", "kohya"):
        target = tmp_path / f"{form}.{'pt' if form == 'a1111-pt' else 'safetensors'}"
        done = call("inversion", "convert", source, target, "--to", form, "--json")
        assert json.loads(done.out) == {"files": [str(target)]}
        back = tmp_path / f"{form}_back.safetensors"
        call("inversion", "convert", target, back, "--to", "diffusers", "--token", "<my-cat>")
        assert load_file(back)["<my-cat>"].equal(rows)
    wrong = call("inversion", "convert", source, tmp_path / "x.pt", "--to", "a1111_pt", code=2)
    assert "did you mean a1111-pt" in wrong.err
    assert not (tmp_path / "x.pt").exists()


def test_evaluate_measures_and_writes_the_report_again(trained: Path) -> None:
    before = (trained / "report.html").read_text()

    found = json.loads(call("inversion", "evaluate", trained, "--pictures", 1, "--json").out)

    assert found["samples"] == 1
    for measure in ("likeness", "obedience", "diversity"):
        assert found[measure].keys() >= {"value", "interval", "before", "difference"}
        assert found[measure]["difference"].keys() >= {"value", "interval", "p"}
    assert json.loads((trained / "training.json").read_text())["evaluation"] == found
    assert (trained / "report.html").read_text() != before
    assert "holds no finished training" in call("inversion", "evaluate", trained / "grids", code=2).err


def test_mistakes_in_teach_are_told_in_one_line(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    call(
        *("hypernymy", "run", "--model", tiny_model, "--synsets", "dog", "--samples", 1, "--set=steps=1"),
        *("--set=guidance=2", "--out", run),
    )
    assert "is not a run directory" in call("inversion", "teach", tmp_path / "none", code=2).err
    for words, message in (
        (["dgo"], "dgo"),
        (["dog"], "there are no pictures of dog.n.01 in the package"),
        (["dog", "--pictures", tmp_path / "none"], "there is no folder"),
        (["dog", "--method", "lora"], "there is no method 'lora'"),
        (["dog", "--set", "max_step=1"], "did you mean max_steps"),
        (["dog", "--samples", 0], "--samples is 0: draw 1 or more"),
        (["dog", "--samples", -1], "--samples is -1: draw 1 or more"),
    ):
        assert message in call("inversion", "teach", run, *words, "--out", tmp_path / "out", code=2).err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [0, -1])
def test_an_evaluation_without_pictures_is_refused(trained: Path, count: int) -> None:
    before = (trained / "training.json").read_bytes()
    done = call("inversion", "evaluate", trained, "--pictures", count, code=2)
    assert f"--pictures is {count}: draw 1 or more" in done.err
    assert (trained / "training.json").read_bytes() == before
