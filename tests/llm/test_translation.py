"""Translations: aligned, protected, checked, continued; real back ends where they are, toys where not."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from language_toys import make_toy, save_toy
from typer.testing import CliRunner

from t2iprobe import lexicon
from t2iprobe.cli import app
from t2iprobe.errors import UserError
from t2iprobe.languages import Word
from t2iprobe.llm import translation
from t2iprobe.llm.corpus.documents import Source
from t2iprobe.llm.translation import (
    Concept,
    Translation,
    _restore,
    _stand_in,
    chrf,
    detect_field,
    find_form,
    identify,
    translate_file,
    translate_texts,
)
from t2iprobe.llm.translators import (
    EngineTranslator,
    Seq2Seq,
    Tables,
    Translator,
    clean_stars,
    few_shot_prompt,
    make_translator,
)

SPANISH = {
    "An image of a dog.": "Una imagen de un perro.",
    "An image of a house.": "Una imagen de una casa.",
    "A photo of a dog in the snow.": "Una foto de un perro en la nieve.",
    "A photo of the island, with snow.": "Una foto de la isla, con nieve.",
    "Hello.": "Hola.",
    "An image of an anthozoan.": "Una imagen de un *anthozoan.",
    "Two dogs.": "Dos perros.",
}


class Phrasebook:
    """A back end of known sentences: what a translator does to these, without one."""

    settings = {"backend": "phrasebook"}  # noqa: RUF012

    def __init__(self) -> None:
        self.asked: list[str] = []

    def translate(self, texts: Sequence[str], to: str) -> list[str]:
        self.asked += texts
        return [SPANISH[text] for text in texts]

    def back(self, texts: Sequence[str], language: str) -> list[str] | None:
        known = {other.replace("*", ""): english for english, other in SPANISH.items()}
        return [known.get(text, "nothing of the kind") for text in texts]


@pytest.fixture(autouse=True)
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words by hand, so that tests do not depend on what is installed."""
    known = {
        "spider.n.01": [Word("araña", "f", "hand")],
        "heron.n.02": [Word("garza", "f", "hand"), Word("airón", "m", "hand")],
        "dog.n.01": [Word("perro", "m", "hand")],
    }
    monkeypatch.setattr(
        translation,
        "find_words",
        lambda names, language, sources: {name: known[name] for name in names if name in known},
    )


def translate(tmp_path: Path, rows: list[dict[str, Any]], backend: Translator, **more: Any) -> list[dict]:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = Translation(backend, more.pop("languages", ["es"]), "prompt", **more)
    (tmp_path / "out.jsonl").unlink(missing_ok=True)
    translate_file(Source.open(path, "prompt"), tmp_path / "out.jsonl", stage)
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_a_concept_is_protected_by_a_noun_of_its_gender(tmp_path: Path) -> None:
    book = Phrasebook()
    [row] = translate(tmp_path, [{"synset": "heron.n.02", "prompt": "An image of a heron.", "n": 1}], book)

    assert book.asked == ["An image of a house."]  # casa, feminine as garza is
    assert row["prompt"] == "Una imagen de una garza."
    assert row["prompt"][slice(*row["span"])] == row["word"] == "garza"
    assert row["protected"]
    assert (row["language"], row["source"], row["n"]) == ("es", "An image of a heron.", 1)
    assert row["checks"]["ok"]


def test_a_lost_stand_in_leaves_the_plain_translation(tmp_path: Path) -> None:
    book = Phrasebook()
    SPANISH["A photo of the house, with snow."] = "Una foto del hogar, con nieve."  # no casa
    SPANISH["A photo of the heron, with snow."] = "Una foto de garzas, con nieve."
    [row] = translate(
        tmp_path, [{"synset": "heron.n.02", "prompt": "A photo of the heron, with snow."}], book
    )

    assert row["prompt"] == "Una foto de garzas, con nieve."
    assert not row["protected"]
    assert row["prompt"][slice(*row["span"])] == "garzas"


def test_unknown_words_are_counted_and_not_ok(tmp_path: Path) -> None:
    [row] = translate(
        tmp_path, [{"synset": "anthozoan.n.01", "prompt": "An image of an anthozoan."}], Phrasebook()
    )

    assert row["prompt"] == "Una imagen de un anthozoan."
    assert row["checks"]["unknown_words"] == 1
    assert not row["checks"]["ok"]
    assert (row["word"], row["span"]) == (None, None)


def test_the_way_back_is_compared(tmp_path: Path) -> None:
    rows = [{"prompt": "Hello."}, {"prompt": "An image of a dog."}]
    SPANISH["Hello."] = "Hola a"
    found = translate(tmp_path, rows, Phrasebook(), round_trip=True)
    SPANISH["Hello."] = "Hola."
    [first, second] = [row["checks"] for row in found]

    assert second["chrf"] == 100
    assert second["ok"]
    assert first["chrf"] == 100  # the book knows it


def test_rows_and_languages_stay_aligned_and_a_stop_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(translation, "CHUNK_ROWS", 2)
    path = tmp_path / "in.jsonl"
    rows = [{"prompt": "Hello." if number % 2 else "An image of a dog."} for number in range(7)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")

    class Stopping(Phrasebook):
        def translate(self, texts: Sequence[str], to: str) -> list[str]:
            if len(self.asked) > 5:
                raise KeyboardInterrupt
            return super().translate(texts, to)

    def run(backend: Translator) -> dict[str, Any]:
        stage = Translation(backend, ["es", "fr"], "prompt")
        return translate_file(Source.open(path, "prompt"), tmp_path / "out.jsonl", stage)

    with pytest.raises(KeyboardInterrupt):
        run(Stopping())
    book = Phrasebook()
    found = run(book)

    out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["id"], row["language"]) for row in out] == [
        (f"in.jsonl/{number}", language) for number in range(7) for language in ("es", "fr")
    ]
    assert [row["source"] for row in out[::2]] == [row["prompt"] for row in rows]
    assert 0 < len(book.asked) < 14
    assert (found["rows"], found["rejected"]) == (7, 1)


def test_tables_write_templates_and_nothing_else(tmp_path: Path) -> None:
    rows = [
        {"synset": "heron.n.02", "template": "base", "prompt": "An image of a heron."},
        {"synset": "heron.n.02", "prompt": "A heron at dusk."},
        {"synset": "entity.n.01", "template": "base", "prompt": "An image of an entity."},
    ]
    found = translate(tmp_path, rows, Tables())

    assert [row["prompt"] for row in found] == ["Una imagen de una garza.", "", ""]
    assert [row["checks"]["ok"] for row in found] == [True, False, False]


@pytest.mark.parametrize(
    ("text", "article", "english"),
    [("An image of a heron.", "a", "house"), ("A heron", "A", "house"), ("the heron", "the", "house")],
)
def test_stand_ins(text: str, article: str, english: str) -> None:
    start = text.index("heron")
    made = _stand_in(text, Concept(start, start + 5, "heron.n.02"), Word("garza", "f", "x"), "es")

    assert made == text.replace("heron", english)
    made = _stand_in("An image of an owl.", Concept(15, 18, "owl.n.01"), Word("hibou", "m", "x"), "fr")
    assert made == "An image of a tree." or made == "An image of a dog."


def test_german_words_are_declined_where_they_stand() -> None:
    lion = Word("Löwe", "m", "x")

    assert _restore("Ein Bild von einem Hund.", lion, "de").text == "Ein Bild von einem Löwen."  # type: ignore[union-attr]
    assert _restore("Ein Hund im Schnee.", lion, "de").text == "Ein Löwe im Schnee."  # type: ignore[union-attr]
    assert _restore("Ein Hund und ein Hund", lion, "de") is None


def test_forms_are_found_by_their_lemmas() -> None:
    assert find_form("perro", "Dos perros negros", "es") == (4, 10)
    assert find_form("gato montés", "un gato montés duerme", "es") == (3, 14)
    assert find_form("perro", "Dos gatos", "es") is None


def test_sentences_keep_what_is_between_them() -> None:
    text = "  Mr. Fox sleeps.  He dreams!\n\nThe end "

    made = translate_texts([text, "", "One."], lambda parts: [part.upper() for part in parts])

    assert made == ["  MR. FOX SLEEPS.  HE DREAMS!\n\nTHE END ", "", "ONE."]
    with pytest.raises(UserError, match="gave 0 translations of 1"):
        translate_texts(["One."], lambda parts: [])


def test_languages_and_chrf() -> None:
    assert identify("Une image d'un renard roux dans la neige.", "fr") == "fr"
    assert identify("An image of a red fox in the snow.", "fr") == "en"
    assert chrf("the same", "the same") == 100
    assert chrf("the same", "quite another") < 30


def test_stars() -> None:
    assert clean_stars("un *anthozoan, 2 * 3, @x") == ("un anthozoan, 2 * 3, x", 2)


def marian(folder: Path) -> Path:
    """A tiny random seq2seq model whose tokens are bytes."""
    from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=384, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder


def test_a_model_translates_in_batches_as_one_by_one(tmp_path: Path) -> None:
    model = Seq2Seq(str(marian(tmp_path / "opus-es")).replace("-es", "-{to}"), batch=3, max_new_tokens=12)
    texts = ["a dog", "a much longer text about a dog", "x", "the sea", "an old house on a hill"]

    together = model.translate(texts, "es")

    assert together == [model.translate([text], "es")[0] for text in texts]
    assert model.back(["x"], "es") is None
    with pytest.raises(UserError, match="cannot load the translation model .*opus-fr"):
        model.translate(["x"], "fr")


def test_the_engine_continues_its_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from t2iprobe.llm import commands

    shown = few_shot_prompt("A dog.", "en", "fr")
    assert shown.endswith("English: A dog.\nFrench:")
    assert shown.count("French:") == 4
    translator = EngineTranslator(str(save_toy(tmp_path / "toy", make_toy(context=2048))), max_new_tokens=5)
    made = translator.translate(["A dog.", "A cat."], "fr")
    assert len(made) == 2
    assert translator.translate(["A cat."], "fr") == made[1:]
    assert commands.load_engine  # the engine's own tests say what it writes


def test_back_ends_by_name() -> None:
    with pytest.raises(UserError, match="no back end 'apertum', did you mean apertium"):
        make_translator("apertum", None, "cpu", None)
    with pytest.raises(UserError, match="seq2seq needs --model"):
        make_translator("seq2seq", None, "cpu", None)


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translation, "find_words", lexicon.find_words)
    rows = [{"synset": "spider.n.01", "template": "base", "prompt": "An image of a spider."}]
    (tmp_path / "in.jsonl").write_text(json.dumps(rows[0]) + "\n")
    out = tmp_path / "out.jsonl"
    words = ["llm", "translate", tmp_path / "in.jsonl", "--to", "fr,de,es", "--words", "emoji", "-o", out]
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    prompts = [json.loads(line)["prompt"] for line in out.read_text().splitlines()]

    assert prompts == ["Une image d'une araignée.", "Ein Bild von einer Spinne.", "Una imagen de una araña."]
    assert "fr: 1 translated, 1 pass the checks" in done.stdout
    for words, message in (
        (("--to", "xx"), "no table for the language 'xx'"),
        (("--to", "fr", "--backend", "bing"), "no back end 'bing'"),
    ):
        given = ["llm", "translate", tmp_path / "in.jsonl", *words, "-o", tmp_path / "x"]
        with pytest.raises(UserError, match=message):
            CliRunner().invoke(app, [str(word) for word in given], catch_exceptions=False)


@pytest.mark.skipif(not lexicon.is_there("apertium", "es"), reason="apertium-eng-spa is not installed")
def test_apertium_keeps_texts_apart(tmp_path: Path) -> None:
    backend = make_translator("apertium", None, "cpu", None)
    rows = [
        {"prompt": "The dog is old. It is big."},
        {"prompt": "An image of a spider.", "synset": "spider.n.01"},
    ]
    found = translate(tmp_path, rows, backend, round_trip=True)

    assert found[1]["prompt"] == "Una imagen de una araña."
    assert found[0]["prompt"].startswith("El perro es viejo. ")
    assert found[1]["checks"]["chrf"] > 50


def test_the_field_is_that_of_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("[" * 100_000 + '\n{\n{"prompt": "a heron"}\n{"text": "a heron"}\n')
    assert detect_field(path) == "prompt"
