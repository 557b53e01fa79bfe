"""Every command that docs/prompts.md and docs/templates.md show has the options that it is shown with."""

import re

import pytest
from doc_pages import DOCS, list_commands, read_page, understand

from t2iprobe.config import list_presets
from t2iprobe.llm.classification import METHODS
from t2iprobe.llm.labelled_data import DATASETS

PAGES = ("prompts.md", "templates.md")


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page: str) -> None:
    commands = list_commands(page)
    assert len(commands) >= 2
    for line in commands:
        words = understand(line)
        if "hypernymy run" in line and not words[0].startswith("--"):
            assert words[0] in list_presets()


@pytest.mark.parametrize("page", PAGES)
def test_what_is_named_is_there(page: str) -> None:
    text = read_page(page)
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert links
    assert [link for link in links if not (DOCS / link).exists()] == []
    for script in re.findall(r"benchmarks/\w+\.py", text):
        assert (DOCS.parent / script).exists()


def test_tables_name_all_there_is() -> None:
    text = read_page("templates.md")
    for name in (*METHODS, *DATASETS):
        assert f"| `{name}` |" in text
