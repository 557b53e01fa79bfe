"""Every command that docs/prompts.md and docs/templates.md show has the options that it is shown with."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from t2iprobe.cli import app
from t2iprobe.config import list_presets
from t2iprobe.llm.classification import METHODS
from t2iprobe.llm.labelled_data import DATASETS

ROOT = Path(__file__).parents[2]
PAGES = ("prompts.md", "templates.md")


def read(page: str) -> str:
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page: str) -> None:
    blocks = re.findall(r"```\n(.*?)```", read(page), re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("t2iprobe ")]
    assert len(commands) >= 2
    for line in commands:
        group = typer.main.get_command(app)
        words = shlex.split(line)[1:]
        while hasattr(group, "commands"):
            group = group.commands[words.pop(0)]
        group.make_context(line, list(words))  # raises for an option that is not there
        if "hypernymy run" in line and not words[0].startswith("--"):
            assert words[0] in list_presets()


@pytest.mark.parametrize("page", PAGES)
def test_what_is_named_is_there(page: str) -> None:
    text = read(page)
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert links
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
    for script in re.findall(r"benchmarks/\w+\.py", text):
        assert (ROOT / script).exists()


def test_tables_name_all_there_is() -> None:
    text = read("templates.md")
    for name in (*METHODS, *DATASETS):
        assert f"| `{name}` |" in text
