"""Every command that docs/probe.md shows is run on a tiny model; every preset that it names is there."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from t2iprobe.cli import app
from t2iprobe.config import list_presets

PAGE = Path(__file__).parents[2] / "docs" / "probe.md"


def list_commands() -> list[str]:
    blocks = re.findall(r"```\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("t2iprobe ")]


@pytest.mark.parametrize("command", list_commands())
def test_commands_of_the_page_work(
    command: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command, comments=True)[1:]
    words += ["--model", str(tiny_model), "--set", "steps=2", "--set", "synsets=dog,bird"]

    result = CliRunner().invoke(app, words, catch_exceptions=False)

    assert result.exit_code == 0, result.output
    if "--json" in words:
        plan = json.loads(result.stdout)
        assert plan["pictures"] == 16
        text = PAGE.read_text(encoding="utf-8")
        assert all(f"`{key}`" in text for key in ("pictures", "predicted_seconds", *plan["seconds"]))
        assert plan["predicted_seconds"] > 0
    elif "--dry-run" not in words:
        assert (tmp_path / words[words.index("--out") + 1] / "report.html").exists()


def test_what_the_page_names_is_there() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(list_commands()) == 5
    (presets,) = re.findall(r"Presets: (.*?)Any scheduler", text, re.DOTALL)
    named = re.findall(r"`(\w+)` \(", presets)
    assert len(named) == 3
    assert set(named) <= set(list_presets())
