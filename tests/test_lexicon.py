"""Words for concepts, from what is installed and from small copies of what may not be."""

import gzip
import shutil
from pathlib import Path

import pytest

from t2iprobe import lexicon
from t2iprobe.errors import UserError
from t2iprobe.languages import Word
from t2iprobe.lexicon import find_words, is_there, run_apertium

DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def write_freedict(folder: Path, language: str, entries: dict[str, str]) -> None:
    """A dictionary of dictd: an index with numbers in base 64, and a gzipped text."""

    def number(value: int) -> str:
        digits = DIGITS[value % 64]
        return (number(value // 64) if value >= 64 else "") + digits

    content, index = b"", []
    for head, body in entries.items():
        entry = f"{head.rstrip('*')} /x/\n{body}\n".encode()
        index.append(f"{head.rstrip('*')}\t{number(len(content))}\t{number(len(entry))}\n")
        content += entry
    (folder / f"freedict-eng-{language}.index").write_text("".join(index))
    (folder / f"freedict-eng-{language}.dict.dz").write_bytes(gzip.compress(content))


@pytest.fixture
def dictd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(lexicon, "DICTD", tmp_path)
    return tmp_path


def test_emoji_names_are_those_of_the_first_sense() -> None:
    found = find_words(["dog.n.01", "spider.n.01", "bat.n.01", "bat.n.05", "entity.n.01"], "de", ["emoji"])

    assert found["spider.n.01"] == [Word("Spinne", None, "emoji")]
    assert found["dog.n.01"][0].text == "Hund"
    assert found["bat.n.01"][0].text == "Fledermaus"
    assert "bat.n.05" not in found  # what hits a ball is another sense of the same word
    assert "entity.n.01" not in found


def test_freedict_takes_what_fits_the_concept(dictd: Path) -> None:
    write_freedict(
        dictd,
        "deu",
        {
            "dog": "Klammhaken <masc>, Balkhaken <masc>\n         Note: Zimmerei",
            "dog*": 'Hund <masc> [zool.]\n      "train a dog"  - einen Hund <masc> abrichten',
            "domestic dog": "Haushund <masc>, Hund <masc> [zool.]",
            "fish": "angeln <v, intr>",
        },
    )
    found = find_words(["dog.n.01", "fish.n.01"], "de", ["freedict"])

    assert list(found) == ["dog.n.01"]
    assert found["dog.n.01"][0] == Word("Hund", "m", "freedict")
    assert Word("Haushund", "m", "freedict") in found["dog.n.01"]
    assert not is_there("freedict", "fr")


def test_freedict_leaves_out_what_a_word_does_as_a_verb(dictd: Path) -> None:
    write_freedict(dictd, "fra", {"pump": "1. pomper\n2. pompe (à eau), [rare]", "sea": "mer"})
    found = find_words(["pump.n.01", "sea.n.01"], "fr", ["freedict"])

    assert [word.text for word in found["pump.n.01"]] == ["pompe"]
    assert [word.text for word in found["sea.n.01"]] == ["mer"]  # no verb, so no infinitive


def test_omw_by_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    folder = tmp_path / "corpora" / "omw-1.4" / "fra"
    folder.mkdir(parents=True)
    (folder / "wn-data-fra.tab").write_text(
        "# Wolf\n02084071-n\tfra:lemma\tchien\n02084071-n\tfra:def\t0\tx\n00001740-n\tlemma\tentité\n"
    )
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    lexicon._omw_folder.cache_clear()
    try:
        assert is_there("omw", "fr")
        assert find_words(["dog.n.01", "entity.n.01", "cat.n.01"], "fr", ["omw"]) == {
            "dog.n.01": [Word("chien", None, "omw")],
            "entity.n.01": [Word("entité", None, "omw")],
        }
    finally:
        lexicon._omw_folder.cache_clear()


def test_genders_come_from_whoever_tells_them(dictd: Path) -> None:
    write_freedict(dictd, "deu", {"spider": "Spinne <fem> [zool.], Kreuz <neut>"})
    found = find_words(["spider.n.01"], "de", ["emoji", "freedict"])

    assert found["spider.n.01"] == [Word("Spinne", "f", "emoji"), Word("Kreuz", "n", "freedict")]


def test_refusals() -> None:
    with pytest.raises(UserError, match="no source of words 'emojis', did you mean emoji"):
        find_words(["dog.n.01"], "fr", ["emojis"])
    with pytest.raises(UserError, match="no table for the language"):
        find_words(["dog.n.01"], "xx")


def fake_apertium(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "apertium"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    lexicon.list_modes.cache_clear()
    lexicon.find_chain.cache_clear()


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch):
    yield
    lexicon.list_modes.cache_clear()
    lexicon.find_chain.cache_clear()


def test_chains_of_directions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget: None) -> None:
    modes = "eng-cat\\n  eng-spa\\n  cat-fra\\n  es-fr\\n  fr-es\\n  spa-eng\\n  cat-eng_US\\n  rus-kir"
    fake_apertium(tmp_path, monkeypatch, f"printf '  {modes}\\n'")

    assert lexicon.find_chain("es") == ("eng-spa",)
    assert lexicon.find_chain("fr") in (("eng-cat", "cat-fra"), ("eng-spa", "es-fr"))
    assert lexicon.find_chain("en", "fr") == ("fr-es", "spa-eng")
    assert lexicon.find_chain("de") == ()


def test_a_failing_direction_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget: None) -> None:
    fake_apertium(tmp_path, monkeypatch, "echo 'Mode eng-xyz does not exist' >&2; exit 1")
    with pytest.raises(UserError, match="apertium eng-xyz failed: Mode eng-xyz does not exist"):
        run_apertium(["a dog"], ["eng-xyz"])
    fake_apertium(tmp_path, monkeypatch, "printf 'one\\n\\n'")
    with pytest.raises(UserError, match="gave 1 texts for 2"):
        run_apertium(["a", "b"], ["eng-xyz"])


@pytest.mark.skipif(not shutil.which("apertium"), reason="Apertium is not installed")
@pytest.mark.skipif(not is_there("apertium", "es"), reason="apertium-eng-spa is not installed")
def test_apertium_itself() -> None:
    found = find_words(["dog.n.01", "spider.n.01", "anthozoan.n.01"], "es", ["apertium"])

    assert list(found) == ["dog.n.01", "spider.n.01"]
    assert found["dog.n.01"][0] == Word("perro", "m", "apertium")
    assert found["spider.n.01"][0] == Word("araña", "f", "apertium")
    assert run_apertium(["A dog.\nA cat.", "", "A house."], ["eng-spa"])[::2] == [
        "Un perro. Un gato.", "Una casa.",
    ]  # fmt: skip
