"""Recipes: rules by hand, a pure function of the signals, reports that add up."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from t2iprobe.errors import UserError
from t2iprobe.llm.corpus import documents
from t2iprobe.llm.corpus.annotation import Annotation
from t2iprobe.llm.corpus.documents import Chunk, Source
from t2iprobe.llm.corpus.filters import (
    Recipe,
    Rule,
    filter_file,
    list_recipes,
    load_recipe,
    measure,
    passes,
)
from t2iprobe.llm.corpus.streaming import Made, Stage, in_processes, stream, work

SIGNALS = {"words": [[0, 9, 12]], "lines": [[0, 4, 1.0], [4, 9, 0.0]], "spans": [], "none": [[0, 9, None]]}


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        ({"signal": "words", "min": 1}, 12),
        ({"signal": "lines", "min": 1}, 0.5),
        ({"signal": "lines", "reduce": "sum", "min": 1}, 1),
        ({"signal": "lines", "reduce": "min", "min": 1}, 0),
        ({"signal": "lines", "reduce": "max", "min": 1}, 1),
        ({"signal": "spans", "reduce": "count", "max": 0}, 0),
        ({"signal": "spans", "max": 0}, None),
        ({"signal": "none", "max": 0}, None),
        ({"signal": "words", "times": "lines", "min": 2}, 6),
        ({"signal": "words", "times": "none", "min": 2}, None),
    ],
)
def test_measures(rule: dict[str, Any], value: float | None) -> None:
    assert measure(Rule(**rule), SIGNALS) == value


def test_bounds_are_allowed() -> None:
    rule = Rule(signal="words", min=1, max=2)

    assert [passes(rule, value) for value in (0.9, 1, 2, 2.1, None)] == [False, True, True, False, False]
    assert passes(Rule(signal="words", min=1, missing="keep"), None)


def write(tmp_path: Path, texts: list[str], values: list[dict[str, Any]]) -> tuple[Source, Path]:
    rows = [{"id": f"r{number}", "text": text, "more": number} for number, text in enumerate(texts)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    signals = [{"id": row["id"], "quality_signals": found} for row, found in zip(rows, values, strict=True)]
    (tmp_path / "signals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in signals))
    return Source.open(tmp_path / "in.jsonl"), tmp_path / "signals.jsonl"


def document(**scores: float | None) -> dict[str, Any]:
    return {name: [[0, 1, score]] for name, score in scores.items()}


def test_rows_stay_as_they_stand_and_the_report_adds_up(tmp_path: Path) -> None:
    source, signals = write(
        tmp_path, ["a", "b", "c", "d"],
        [document(x=1, y=1), document(x=5, y=1), document(x=5, y=9), document(x=1, y=None)],
    )  # fmt: skip
    recipe = Recipe(rules=(Rule(signal="x", max=3), Rule(signal="y", max=3)))
    found = filter_file(source, signals, recipe, tmp_path / "out", report=True)

    assert (tmp_path / "out").read_bytes() == source.path.read_bytes().splitlines(True)[0]
    assert (found["rows"], found["kept"]) == (4, 1)
    first, second = found["rules"]
    assert (first["removed"], first["removed_alone"]) == (2, 1)
    assert (second["removed"], second["removed_alone"]) == (2, 1)
    assert second["examples"] == [
        {"id": "r2", "value": 9, "text": "c"}, {"id": "r3", "value": None, "text": "d"},
    ]  # fmt: skip
    assert not list(tmp_path.glob("*.partial"))


def test_a_share_of_the_highest(tmp_path: Path) -> None:
    source, signals = write(tmp_path, list("abcdefgh"), [document(x=number * 7 % 8) for number in range(8)])
    filter_file(source, signals, Recipe(rules=(Rule(signal="x", keep_top=0.25),)), tmp_path / "out")

    assert [json.loads(line)["text"] for line in (tmp_path / "out").read_text().splitlines()] == ["b", "c"]


def test_rows_are_drawn_by_their_weights(tmp_path: Path) -> None:
    count = 4000
    source, signals = write(
        tmp_path, ["x"] * count, [document(x=math.log(3) * (number % 2)) for number in range(count)]
    )
    rule = Rule(signal="x", keep_top=0.1, gumbel=True)
    filter_file(source, signals, Recipe(rules=(rule,)), tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    heavy = sum(row["more"] % 2 for row in rows) / len(rows)

    assert len(rows) == 400
    assert abs(heavy - 0.74) < 0.09  # 3 to 1, a little less as the heavy ones run out
    filter_file(source, signals, Recipe(rules=(rule,)), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "out").read_bytes()


def test_lines_that_break_a_rule_are_cut_out_of_the_copy(tmp_path: Path) -> None:
    source, signals = write(
        tmp_path, ["good.\nbad\ngood!\n", "bad", "good."],
        [{"l": [[0, 6, 1.0], [6, 10, 0.0], [10, 16, 1.0]]}, {"l": [[0, 3, 0.0]]}, {"l": [[0, 5, 1.0]]}],
    )  # fmt: skip
    before = source.path.read_bytes()
    found = filter_file(source, signals, Recipe(lines=(Rule(signal="l", min=1),)), tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]

    assert [row["text"] for row in rows] == ["good.\ngood!\n", "good."]
    assert rows[0]["more"] == 0
    assert (found["lines_cut"], found["without_lines"], found["kept"]) == (2, 1, 2)
    assert source.path.read_bytes() == before


def test_processes_and_a_stopped_run_write_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "CHUNK_LINES", 7)
    lines = [
        json.dumps({"text": "A fox runs.\nbuy\n" + " in the snow" * (number % 9)}) for number in range(90)
    ]
    lines[3], lines[20], lines[21] = "{", '["text"]', "   "
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    source, signals = Source.open(tmp_path / "in.jsonl"), tmp_path / "signals.jsonl.gz"
    stream(Annotation(captions=False), source, signals)
    recipe = Recipe(
        rules=(
            Rule(signal="rps_doc_word_count", min=6, max=20),
            Rule(signal="rps_doc_unigram_entropy", keep_top=0.6, gumbel=True),
        ),
        lines=(Rule(signal="rps_lines_num_words", min=2),),
    )
    whole = filter_file(source, signals, recipe, tmp_path / "whole.jsonl", report=True)
    four = filter_file(source, signals, recipe, tmp_path / "four.jsonl", report=True, execute=in_processes(4))
    begun: list[int] = []

    def stop(stage: Stage, source: Source, chunks: Iterator[Chunk]) -> Iterator[Made]:
        for place, chunk in enumerate(chunks):
            if place == 4:
                raise KeyboardInterrupt
            begun.append(chunk.first)
            yield work(stage, source, chunk)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            filter_file(source, signals, recipe, tmp_path / "stopped.jsonl", execute=stop)
    with pytest.raises(UserError, match="begun with another recipe"):
        filter_file(source, signals, load_recipe("c4"), tmp_path / "stopped.jsonl")
    gone_on = filter_file(source, signals, recipe, tmp_path / "stopped.jsonl", report=True)

    assert begun == list(range(0, 56, 7))
    assert 10 < whole["kept"] < 60
    assert whole["lines_cut"] == whole["kept"]
    assert all(len(rule["examples"]) == 3 for rule in whole["rules"])
    for found in (four, gone_on):
        assert Path(found["out"]).read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        rejected = [Path(each["rejected_file"]).read_bytes() for each in (found, whole)]
        assert rejected[0] == rejected[1]
        names = ("out", "rejected_file")
        assert {**found, **dict.fromkeys(names)} == {**whole, **dict.fromkeys(names)}
    assert not list(tmp_path.glob("*.partial*"))


def test_signals_of_another_file_are_refused(tmp_path: Path) -> None:
    source, signals = write(tmp_path, ["a", "b"], [document(x=1), document(x=1)])
    recipe = Recipe(rules=(Rule(signal="x", max=3),))
    lines = signals.read_text().splitlines(True)
    for content, message in (
        (lines[1] + lines[0], "has r1 where line 1"),
        (lines[0], "has nothing where line 2"),
        ("".join(lines) + lines[0], "goes on with r0"),
        (lines[0] + "{}\n", "a line that is no row of corpus signals: {}"),
        ("".join(lines) + "{\n", "a line that is no row of corpus signals: {"),
    ):
        signals.write_text(content)
        with pytest.raises(UserError, match=message):
            filter_file(source, signals, recipe, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "signals.jsonl"]


def test_a_rule_whose_signal_is_not_there(tmp_path: Path) -> None:
    source, signals = write(tmp_path, ["a"], [document(rps_doc_words=1)])
    with pytest.raises(UserError, match="no signal rps_doc_word, did you mean rps_doc_words"):
        filter_file(source, signals, Recipe(rules=(Rule(signal="rps_doc_word", max=3),)), tmp_path / "out")
    for name in ("rps_doc_ml_wiki_ref_score", "rps_doc_wiki_ref_importance"):
        with pytest.raises(UserError, match=rf"no signal {name} \(llm corpus train --name wiki_ref makes it"):
            filter_file(source, signals, Recipe(rules=(Rule(signal=name, min=0),)), tmp_path / "out")


def test_packaged_recipes_are_recipes() -> None:
    assert set(list_recipes()) == {"gopher", "c4", "refinedweb", "wikipedia-reference", "dsir", "caption"}
    for name in list_recipes():
        assert load_recipe(name).about
    natural = {rule.signal: (rule.min, rule.max) for rule in load_recipe("gopher").rules}
    assert natural["rps_doc_word_count"] == (50, 100_000)
    assert [natural[f"rps_doc_frac_chars_dupe_{n}grams"][1] for n in range(5, 11)] == [
        0.15, 0.14, 0.13, 0.12, 0.11, 0.10,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("rules: [{signal: x}]", "a rule has min or max, or keep_top"),
        ("rules: [{signal: x, min: 1, keep_top: 0.5}]", "a rule has min or max, or keep_top"),
        ("rules: [{signal: x, least: 1}]", "rules.0.least"),
        ("about: nothing", "a recipe has rules, lines or both"),
        ("lines: [{signal: x, keep_top: 0.5}]", "rules of lines have min and max only"),
        ("rules: [", "cannot read the recipe"),
        ("[]", "cannot read the recipe"),
    ],
)
def test_recipes_that_are_none(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        load_recipe(str(tmp_path / "recipe.yaml"))
    with pytest.raises(UserError, match="did you mean gopher"):
        load_recipe("gophr")
