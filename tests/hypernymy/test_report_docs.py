"""Every command that docs/report.md shows is run; every preset and link that it names is there."""

import re
import shlex
from pathlib import Path

from report_example import make_run
from typer.testing import CliRunner

from t2iprobe.cli import app
from t2iprobe.config import list_presets

DOCS = Path(__file__).parents[2] / "docs"


def test_commands_of_the_report_page_work(tmp_path, monkeypatch):
    synsets = ["dog.n.01", "bird.n.01", "acarine.n.01"]
    make_run(tmp_path / "runs" / "embedded", synsets)
    make_run(tmp_path / "runs" / "other", synsets, logits_seed=3, model="other")
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "report.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("t2iprobe ")]
    assert len(commands) == 3
    for command in commands:
        result = CliRunner().invoke(app, shlex.split(command)[1:], catch_exceptions=False)
        assert result.exit_code == 0, (command, result.output)
    assert (tmp_path / "runs" / "embedded" / "report.html").exists()
    assert (tmp_path / "comparison.html").exists()
    assert (tmp_path / "comparison.json").exists()


def test_what_the_report_page_names_is_there():
    text = (DOCS / "report.md").read_text(encoding="utf-8")
    for preset in re.findall(r"`t2iprobe hypernymy run (\w+)`", text):
        assert preset in list_presets()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert links
    assert [link for link in links if not (DOCS / link).exists()] == []
    titles = {re.sub(r"\W+", "-", title.lower()) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= titles
