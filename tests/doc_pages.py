"""The pages of docs/, and the commands that they show."""

import re
import shlex
from pathlib import Path

import typer

from t2iprobe.cli import app

DOCS = Path(__file__).parents[1] / "docs"


def read_page(page: str) -> str:
    """A page's text."""
    return (DOCS / page).read_text(encoding="utf-8")


def list_commands(page: str) -> list[str]:
    """The commands of t2iprobe that a page shows, a line each."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", read_page(page), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if line.startswith("t2iprobe ")]


def understand(line: str) -> list[str]:
    """Parse a command without running it: its own words. Raises for an option that is not there."""
    group = typer.main.get_command(app)
    words = shlex.split(line)[1:]
    while hasattr(group, "commands"):
        group = group.commands[words.pop(0)]
    group.make_context(line, list(words))
    return words
