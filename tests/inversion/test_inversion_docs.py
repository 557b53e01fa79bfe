"""Every command and every line of Python that docs/inversion.md shows is run, on a tiny model."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from concept_pictures import draw_concept
from typer.testing import CliRunner

from t2iprobe.cli import app
from t2iprobe.inversion.methods import METHODS
from t2iprobe.inversion.settings import Training
from t2iprobe.inversion.stopping import RULES

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "inversion.md").read_text(encoding="utf-8")
# What a command is given besides, so that it takes a second; a later option counts.
_TRAIN = [f"--set={pair}" for pair in ("items=2", "batch=1", "grid=1", "evaluate=0", "steps=1", "init=thing")]
QUICK = {
    ("inversion", "train"): ["--max-steps", "2", "--dtype", "float32", *_TRAIN],
    ("inversion", "evaluate"): ["--pictures", "1"],
    ("inversion", "teach"): ["--samples", "2", "--set=max_steps=1", "--set=stop=budget", *_TRAIN],
    ("hypernymy", "run"): ["--samples", "1", "--set=steps=1", "--set=guidance=2", "--set=dtype=float32"],
    ("train_concepts",): ["--set=max_steps=2", "--set=dtype=float32", *_TRAIN],
}
ON_A_MODEL = (("inversion", "train"), ("hypernymy", "run"), ("train_concepts",))


def blocks(kind: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language == kind]


def shorten(key: tuple[str, ...], model: Path) -> list[str]:
    return [*QUICK.get(key, []), *(["--model", str(model)] if key in ON_A_MODEL else [])]


def test_commands_and_python_of_the_page_work(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("pictures/my-cat", "pictures/My Dog", "pictures-of-words/dog", "pictures-of-words/bird"):
        draw_concept(tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    commands = [line for block in blocks("") for line in block.splitlines()]
    assert len(commands) == 11
    for command in commands:
        program, *words = shlex.split(command)
        if program == "python":
            path, *words = words
            words += shorten(("train_concepts",), tiny_model)
            monkeypatch.setattr(sys, "argv", [path, *words])
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(ROOT / path), run_name="__main__")
            assert ended.value.code == 0, command
        else:
            assert program == "t2iprobe"
            words += shorten((words[0], words[1]), tiny_model)
            result = CliRunner().invoke(app, words, catch_exceptions=False)
            assert result.exit_code == 0, (command, result.output)

    files = ("report.html", "training.json", "learned_embeds.safetensors", "my-cat.safetensors", "grids")
    assert all((tmp_path / "runs" / "my-cat" / name).exists() for name in files)
    assert (tmp_path / "runs" / "concepts" / "My Dog" / "my-dog.safetensors").exists()
    assert (tmp_path / "runs" / "taught" / "results.json").exists()
    assert (tmp_path / "my-cat.pt").exists()

    with_diffusers, with_python = blocks("python")
    exec(with_diffusers.replace("MODEL", str(tiny_model)), {})
    assert (tmp_path / "picture.png").exists()
    quick = '{"max_steps": 2, "grid": 0, "evaluate": 0, "init": "thing", "dtype": "float32", '
    exec(
        with_python.replace("{", f'{quick}"model": {str(tiny_model)!r}, ').replace('my-cat"))', 'new"))'), {}
    )
    assert (tmp_path / "runs" / "new" / "training.json").exists()


def test_what_the_page_names_is_there() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", TEXT)
    assert links
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
    for table, known in (("--method", METHODS), ("--stop", RULES)):
        rows = TEXT.split(f"| `{table}` |")[1].split("\n\n")[0].splitlines()[2:]
        assert {row.split("`")[1] for row in rows} == set(known)
    assert set(re.findall(r"--set (\w+)=", TEXT)) <= set(Training.model_fields)
    help_texts = " ".join(
        CliRunner().invoke(app, ["inversion", command, "--help"], env={"COLUMNS": "200"}).output
        for command in ("train", "evaluate", "teach", "convert")
    )
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT)) - {"--together", "--shard", "--model"}
    benchmark = (ROOT / "benchmarks" / "inversion.py").read_text(encoding="utf-8")
    missing = {option for option in options if option not in help_texts and f'"{option}"' not in benchmark}
    assert missing <= {"--synsets"}
