"""Prompts for synsets: where the concept stands, what is swapped, what is unsupported, the loop, the file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from language_toys import make_toy, save_toy
from typer.testing import CliRunner

from t2iprobe import wordnet
from t2iprobe.cli import app
from t2iprobe.errors import UserError
from t2iprobe.hypernymy.prompts import read_prompts
from t2iprobe.llm import throughput
from t2iprobe.llm.commands import load_engine
from t2iprobe.llm.faithfulness import (
    Limits,
    Signals,
    check_captions,
    choose_sibling,
    compare_signals,
    find_span,
    list_unsupported,
    swap_concept,
)
from t2iprobe.llm.prompts import ThroughputWriter, Writing, clean_caption, find_synsets, write_prompts


def synset(name: str) -> Any:
    return wordnet.synset(name)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(tmp_path_factory.mktemp("target") / "toy", make_toy(context=4096))


@pytest.mark.parametrize(
    ("caption", "name", "named"),
    [
        ("A dog in the snow.", "dog.n.01", "dog"),
        ("Two Dogs in the snow.", "dog.n.01", "Dogs"),
        ("A hotdog stand.", "dog.n.01", None),
        ("A big-dog park", "dog.n.01", None),
        ("Fresh berries on a plate", "berry.n.01", "berries"),
        ("Wolves at night", "wolf.n.01", "Wolves"),
        ("A red fire engine, new", "fire_engine.n.01", "fire engine"),
        ("A domestic dog and a dog", "dog.n.01", "domestic dog"),  # the longest of its names
    ],
)
def test_spans(caption: str, name: str, named: str | None) -> None:
    span = find_span(caption, synset(name))
    assert (span and caption[slice(*span)]) == named


def test_a_swap_keeps_grammar() -> None:
    caption = "A dog beside a dog."
    assert swap_concept(caption, (2, 5), synset("elephant.n.01")) == "An elephant beside a dog."
    assert swap_concept(caption, (15, 18), synset("owl.n.01")) == "A dog beside an owl."
    assert swap_concept("An owl.", (3, 6), synset("dog.n.01")) == "A dog."
    assert swap_concept("Dogs run.", (0, 4), synset("owl.n.01")) == "Owl run."


@pytest.mark.parametrize("name", ["dog.n.01", "teapot.n.01", "heron.n.02", "physical_entity.n.01"])
def test_siblings_share_a_hypernym_and_no_name(name: str) -> None:
    one = synset(name)
    sibling = choose_sibling(one, seed=3)
    assert sibling is not None
    assert sibling != one
    assert choose_sibling(one, seed=3) == sibling
    assert not set(one.lemma_names()) & set(sibling.lemma_names())
    assert one not in sibling.closure(lambda each: each.hypernyms())
    ups = [set(each.closure(lambda up: up.hypernyms(), depth=2)) for each in (one, sibling)]
    assert ups[0] & ups[1]


def test_the_topmost_synset_has_no_sibling() -> None:
    assert choose_sibling(synset("entity.n.01")) is None


def test_unsupported_objects() -> None:
    dog = synset("dog.n.01")
    caption = "A dog with its paw on a piano near a tree, chased by two elephants."
    found = list_unsupported(caption, dog, find_span(caption, dog))
    assert found == ["piano", "elephant"]
    # What it is, what it is made of, and what a picture may hold are supported.
    assert list_unsupported("A canine animal, a puppy, its flag, in a photo of grass.", dog) == []
    assert list_unsupported("It runs happily and quickly.", dog) == []


def test_faults_are_told_by_limits() -> None:
    good = Signals(gloss_pmi=2.0, sibling=1.0, isa=-1.0, unsupported=["piano"], words=8, tokens=10)
    assert good.faults(Limits()) == []
    assert good.faults(Limits(isa=0.0)) == ["isa -1.00"]
    assert good.faults(Limits(unsupported=0)) == ["unsupported: piano"]
    assert good.faults(Limits(words=(9, 40), tokens=5)) == ["8 words", "10 tokens"]
    assert good.faults(Limits(gloss_pmi=2.0, sibling=3.0)) == ["gloss_pmi 2.00", "sibling 1.00"]
    assert Signals(1.0, None, None, [], 8, 9).faults(Limits(isa=0.0)) == []  # what cannot be had is no fault


def test_signals_are_differences_of_plain_log_probabilities(target: Path) -> None:
    from t2iprobe.llm.faithfulness import _WITH_GLOSS, _WITHOUT
    from t2iprobe.llm.scoring import score_continuations

    dog = synset("dog.n.01")
    with load_engine(str(target), "none", dtype="float64") as engine:

        def log_p(context: str, text: str) -> float:
            ids = [engine.tokenizer(part, add_special_tokens=False).input_ids for part in (context, text)]
            return score_continuations(engine.target, [(ids[0], ids[1])])[0].total

        caption = "A dog in the snow."
        (found,) = check_captions(engine, [(dog, caption)], seed=1)

        def pmi(text: str) -> float:
            given = log_p(f"{_WITH_GLOSS}Meaning: {dog.definition()}\nCaption:", f" {text}\n")
            return given - log_p(f"{_WITHOUT}Caption:", f" {text}\n")

        assert found.gloss_pmi == pytest.approx(pmi(caption), abs=1e-6)
        other = choose_sibling(dog, 1)
        assert other is not None
        swapped = swap_concept(caption, (2, 5), other)
        assert found.sibling == pytest.approx(pmi(caption) - pmi(swapped), abs=1e-6)
        assert (found.words, found.unsupported) == (5, [])
        assert found.isa is not None
        (without,) = check_captions(engine, [(dog, "Nothing of the kind.")])
        assert without.sibling is None

        compared = compare_signals(engine, [(dog, caption), (synset("owl.n.01"), "An owl."), (dog, "No.")])
        assert (compared["pairs"], compared["left_out"]) == (2, 1)
        assert 0 <= compared["gloss_pmi"]["value"] <= 1
        strange = compare_signals(engine, [(dog, caption), (synset("owl.n.01"), "An owl.")], swap="stranger")
        assert strange["swap"] == "stranger"


def test_captions_are_cleaned() -> None:
    assert clean_caption(' "A dog in the snow." \nWord: cat') == "A dog in the snow."
    assert clean_caption("A dog. It runs and the") == "A dog."
    assert clean_caption("A dog that runs") == "A dog that runs"
    assert clean_caption("\n\n") == ""


class ScriptedWriter:
    """Writes what a script says, in turns, and checks by a word."""

    def __init__(self, turns: Sequence[Sequence[str]]) -> None:
        self.turns = [list(turn) for turn in turns]
        self.asked: list[int] = []
        self.seeds: list[int] = []

    def write(self, prompts: Sequence[str], writing: Writing, seed: int) -> list[str]:
        self.asked.append(len(prompts))
        self.seeds.append(seed)
        turn = self.turns.pop(0)
        assert len(turn) == len(prompts)
        return turn

    def check(self, captions: Sequence[tuple[Any, str]], seed: int) -> list[Signals]:
        return [
            Signals(1.0 if "good" in text else -1.0, 1.0, 0.0, [], len(text.split()), 9)
            for _, text in captions
        ]


@pytest.fixture
def model(target: Path) -> str:
    return str(target)


def test_rejected_prompts_are_written_again(tmp_path: Path, model: str) -> None:
    turns = [
        [" a good dog on grass", " a bad dog on grass", " no animal is here", ""],
        [" a good dog on grass", " another good dog runs", " still nothing to see"],
        [" a bad dog is here", " never mind the rest"],
    ]
    writer, out = ScriptedWriter(turns), tmp_path / "prompts.jsonl"
    writing = Writing(per_synset=4, rounds=2)
    told: list[tuple[int, int]] = []
    made = write_prompts(
        [synset("dog.n.01")], out, writer, writing, model=model, show=lambda *two: told.append(two)
    )
    assert writer.asked == [4, 3, 2]
    assert len(set(writer.seeds)) == 3
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [
        "a good dog on grass",
        "a good dog on grass",  # said before, but better than what came first and last
        "another good dog runs",
        "A photo of a dog.",  # none of three attempts named it
    ]
    assert [row["accepted"] for row in rows] == [True, False, True, False]
    assert rows[1]["faults"] == ["said before"]
    assert [row["attempts"] for row in rows] == [1, 3, 2, 3]
    assert [row["written"] for row in rows] == [True, True, True, False]
    for row in rows:
        assert row["prompt"][slice(*row["span"])] == "dog"
        assert set(row["scores"]) == {"gloss_pmi", "sibling", "isa", "unsupported", "words", "tokens"}
    assert (made["prompts"], made["attempts"], made["plain_templates"]) == (4, 9, 1)
    assert (made["accepted_first"]["value"], made["accepted"]["value"]) == (0.25, 0.5)
    assert told[-1] == (4, 4)
    # The probe reads the file as it is.
    assert read_prompts(out) == {"dog.n.01": [row["prompt"] for row in rows]}


def test_what_a_model_writes_may_hold_any_separator(tmp_path: Path, monkeypatch: Any) -> None:
    texts = [" a dog\u2028sits", " a cat\x85runs"]

    def write(asked: Path, out: Path, **_: Any) -> None:
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
        out.write_text("".join(lines), encoding="utf-8")

    monkeypatch.setattr(throughput, "write_file", write)
    writer = ThroughputWriter(tmp_path / "prompts.jsonl", "toy")
    assert writer.write(["a", "b"], Writing(1, 0), 7) == texts
    assert not list(tmp_path.iterdir())


def test_a_file_is_continued_block_by_block(tmp_path: Path, model: str) -> None:
    names = [synset(name) for name in ("dog.n.01", "owl.n.01", "cat.n.01")]
    turns = [[f" a good {word} sits here"] for word in ("dog", "owl", "cat")]
    writing = Writing(per_synset=1, rounds=0)
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    write_prompts(names, whole, ScriptedWriter(turns), writing, model=model, block=1)

    writer = ScriptedWriter(turns[:2])
    with pytest.raises(IndexError):  # killed in the third block
        write_prompts(names, parts, writer, writing, model=model, block=1)
    made = write_prompts(names, parts, ScriptedWriter(turns[2:]), writing, model=model, block=1)
    assert made["done_before"] == 2
    assert parts.read_bytes() == whole.read_bytes()
    again = write_prompts(names, parts, ScriptedWriter([]), writing, model=model, block=1)
    assert again["done_before"] == 3

    with pytest.raises(UserError, match="begun with another rounds"):
        write_prompts(names, parts, ScriptedWriter([]), Writing(1, 1), model=model, block=1)
    parts.write_text(parts.read_text()[:-20])
    with pytest.raises(UserError, match="damaged"):
        write_prompts(names, parts, ScriptedWriter([]), writing, model=model, block=1)


def test_the_command_writes_rows_that_the_probe_takes(target: Path, tmp_path: Path) -> None:
    out = tmp_path / "prompts.jsonl"
    words = ["llm", "prompts", "--synsets", "dog.n.01,owl.n.01", "--per-synset", "2", "--rounds", "1"]
    words += ["--model", str(target), "--draft", "none", "--max-new-tokens", "8", "--out", str(out)]
    words += ["--device", "cpu"]
    result = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    made = json.loads(result.stdout)
    assert (made["synsets"], made["prompts"]) == (2, 4)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["synset"] for row in rows] == ["dog.n.01"] * 2 + ["owl.n.01"] * 2
    assert all(np.isfinite(row["scores"]["gloss_pmi"]) for row in rows)
    plan = ["hypernymy", "run", "--prompts", str(out), "--samples", "1", "--out", str(tmp_path / "run")]
    found = CliRunner().invoke(app, [*plan, "--dry-run", "--json"], catch_exceptions=False)
    assert json.loads(found.stdout)["synsets"] == 2
    blocks = [*words[:-4], "--out", str(tmp_path / "blocks.jsonl"), "--throughput", "--device", "cpu"]
    result = CliRunner().invoke(app, [*blocks, "--json"], catch_exceptions=False)
    assert json.loads(result.stdout)["prompts"] == 4
    assert sorted(path.name for path in tmp_path.glob(".blocks*")) == []


def test_what_is_no_synset_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("dog.n.01\n\nn02084071\nowl\n")
    assert [found.name() for found in find_synsets(str(file))] == ["dog.n.01", "owl.n.01"]
    for text, match in (
        ("dgo.n.01", "WordNet has no synset"),
        ("run.v.01", "not a noun's"),
        (" , ", "name synsets by commas"),
    ):
        with pytest.raises(UserError, match=match):
            find_synsets(text)
    for arguments, match in (
        ({"per_synset": 0}, "1 or more"),
        ({"rounds": -1}, "0 or more"),
        ({"temperature": 0.0}, "a temperature above 0"),
    ):
        with pytest.raises(UserError, match=match):
            Writing(**arguments)  # type: ignore[arg-type]
