"""What docs/corpus.md and docs/languages.md show can be done as they show it."""

import json
import re
import shlex
from pathlib import Path

import pytest
from doc_pages import DOCS, list_commands, read_page, understand
from typer.testing import CliRunner

from t2iprobe.cli import app
from t2iprobe.llm.corpus.filters import list_recipes
from t2iprobe.llm.translators import BACKENDS

SMALL = "--tokens 2048 --hidden 32 --layers 1 --seeds 1"


def test_the_commands_of_a_corpus_follow_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    captions = [
        f"A photo of {number} red foxes in the snow beside an old lighthouse." for number in range(90)
    ]
    captions.append(captions[0].replace(".", " today."))
    for name, texts in (
        ("captions", captions),
        ("good", captions[:30]),
        ("texts", captions),
    ):
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    commands = list_commands("corpus.md")
    for line in commands:
        words = shlex.split(line.replace("none,gopher,c4", "none,caption"))[1:]
        more = SMALL.split() if "ablate" in words else []
        CliRunner().invoke(app, [*words, *more], catch_exceptions=False)

    assert len(commands) == 6
    assert len(Path("kept.jsonl").read_text().splitlines()) == 91
    assert len(Path("unique.jsonl").read_text().splitlines()) == 90
    assert "rps_doc_target_importance" in Path("signals.jsonl").read_text()
    assert len(list(Path("ablation").glob("done-*.json"))) == 2


def test_the_commands_of_languages_are_understood() -> None:
    commands = list_commands("languages.md")
    assert len(commands) == 3
    for line in commands:
        understand(line)


def test_tables_name_all_there_is() -> None:
    for page, names in (("corpus.md", list_recipes()), ("languages.md", BACKENDS)):
        assert [name for name in names if f"| `{name}` |" not in read_page(page)] == []
    for page in ("corpus.md", "languages.md"):
        for link, anchor in re.findall(r"\]\((?!http)([^)#]+)(?:#([^)]+))?\)", read_page(page)):
            headings = [
                heading.lower().replace(" ", "-")
                for heading in re.findall(r"^#+ (.*)$", read_page(link), re.MULTILINE)
            ]
            assert not anchor or anchor in headings
        for script in re.findall(r"benchmarks/\w+\.py", read_page(page)):
            assert (DOCS.parent / script).exists()
