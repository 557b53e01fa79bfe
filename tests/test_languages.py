"""Tables: what a speaker would write, and what is refused."""

import pytest

from t2iprobe.errors import UserError
from t2iprobe.hypernymy.prompts import TEMPLATES as ENGLISH
from t2iprobe.languages import LANGUAGES, TEMPLATES, Word, article, decline, guess_gender, write_prompt


@pytest.mark.parametrize(
    ("language", "word", "gender", "base", "empty"),
    [
        ("fr", "chien", "m", "Une image d'un chien.", "un chien."),
        ("fr", "étoile", "f", "Une image d'une étoile.", "une étoile."),
        ("es", "perro", "m", "Una imagen de un perro.", "un perro."),
        ("es", "águila", "f", "Una imagen de un águila.", "un águila."),
        ("es", "araña", "f", "Una imagen de una araña.", "una araña."),
        ("de", "Hund", "m", "Ein Bild von einem Hund.", "ein Hund."),
        ("de", "Löwe", "m", "Ein Bild von einem Löwen.", "ein Löwe."),
        ("de", "Elefant", "m", "Ein Bild von einem Elefanten.", "ein Elefant."),
        ("de", "Käse", "m", "Ein Bild von einem Käse.", "ein Käse."),
        ("de", "Katze", "f", "Ein Bild von einer Katze.", "eine Katze."),
        ("de", "wildes Tier", "n", "Ein Bild von einem wilden Tier.", "ein wildes Tier."),
        ("de", "roter Panda", "m", "Ein Bild von einem roten Panda.", "ein roter Panda."),
    ],
)
def test_prompts(language: str, word: str, gender: str, base: str, empty: str) -> None:
    words = [Word(word, gender, "test")]

    assert write_prompt("base", words, language) == base
    assert write_prompt("empty", words, language) == empty
    assert write_prompt("all_lemmas", words, language) == base


def test_other_words_stand_in_brackets() -> None:
    words = [Word("chien", "m", "test"), Word("toutou", "m", "test")]

    assert write_prompt("all_lemmas_prompt", words, "fr") == "Une image d'un chien (toutou)."


def test_every_published_template_but_the_gloss_is_there() -> None:
    for language in LANGUAGES:
        assert TEMPLATES[language].keys() == ENGLISH.keys() - {"definition"}


@pytest.mark.parametrize(
    ("language", "genders"),
    [
        (
            "fr",
            {"maison": "f", "télévision": "f", "voiture": "f", "fromage": "m", "cage": "f", "bateau": "m"},
        ),
        ("es", {"casa": "f", "camión": "m", "estación": "f", "mapa": "m", "mano": "f", "pez": "m"}),
        ("de", {"Mädchen": "n", "Zeitung": "f", "Lehrer": "m", "Blume": "f", "kleiner Haushund": "m"}),
    ],
)
def test_endings(language: str, genders: dict[str, str]) -> None:
    assert {word: guess_gender(word, language) for word in genders} == genders


def test_a_told_gender_goes_before_the_ending() -> None:
    assert article(Word("main", "f", "test"), "fr") == "une"
    assert article(Word("main", None, "test"), "fr") == "un"  # a rule is no dictionary
    assert decline(Word("Junge", "m", "test")) == "Jungen"


def test_refusals() -> None:
    with pytest.raises(UserError, match="no table for the language 'frr', did you mean fr"):
        write_prompt("base", [Word("x", "m", "test")], "frr")
    with pytest.raises(UserError, match="'definition' is not in the tables of 'fr'"):
        write_prompt("definition", [Word("x", "m", "test")], "fr")
