"""Prompts in other languages by table: templates, articles, genders, what German does to a dative.

A concept's word comes from `t2iprobe.lexicon`; here it is put into a sentence. Nothing is translated.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from t2iprobe.errors import UserError, suggest

Gender = Literal["m", "f", "n"]

# Languages that prompts can be written in, by their ISO 639-1 and 639-3 codes and English names.
LANGUAGES = {"de": ("deu", "German"), "es": ("spa", "Spanish"), "fr": ("fra", "French")}

# The published templates (hypernymy/prompts.py) but `definition`, whose glosses no table can translate.
TEMPLATES: Mapping[str, Mapping[str, str]] = {
    "fr": {
        "base": "Une image d'{article} {word}.",
        "all_lemmas": "Une image d'{article} {word} ({others}).",
        "photo": "une photo d'{article} {word}.",
        "painting": "une peinture d'{article} {word}.",
        "empty": "{article} {word}.",
    },
    "es": {
        "base": "Una imagen de {article} {word}.",
        "all_lemmas": "Una imagen de {article} {word} ({others}).",
        "photo": "una foto de {article} {word}.",
        "painting": "una pintura de {article} {word}.",
        "empty": "{article} {word}.",
    },
    "de": {
        "base": "Ein Bild von {dative_article} {dative}.",
        "all_lemmas": "Ein Bild von {dative_article} {dative} ({others}).",
        "photo": "ein Foto von {dative_article} {dative}.",
        "painting": "ein Gemälde von {dative_article} {dative}.",
        "empty": "{article} {word}.",
    },
}

_ARTICLES: Mapping[str, Mapping[str, str]] = {
    "fr": {"m": "un", "f": "une"},
    "es": {"m": "un", "f": "una"},
    "de": {"m": "ein", "f": "eine", "n": "ein"},
}
_DATIVES = {"m": "einem", "f": "einer", "n": "einem"}

# Which endings tell a gender where no dictionary does: the first that fits. $ alone is the rule for the rest.
_ENDINGS: Mapping[str, tuple[tuple[str, Gender], ...]] = {
    "fr": (
        (r"(?:musée|lycée|trophée|scarabée|camée|apogée)$", "m"),
        (r"(?:squelette|bagage|image|plage|cage|page|nage|rage)$", "f"),
        (r"(?:.tion|.sion|.xion|aison|ité|été|tié|ure|ade|ude|ance|ence|anse|ense|ée|ie|ue|oue)$", "f"),
        (r"(?:age|ège|isme|asme|iste|oire|aire|eur|eau|ou|oir|in|on|ard|scope|phone|mètre|graphe)$", "m"),
        (r"(?:ille|elle|alle|olle|ette|otte|atte|esse|asse|osse|ousse|onne|enne|anne|erre|arre)$", "f"),
        (r"(?:euse|trice|ine|aine|une|ère|ière|ise|ose|use|oise|ive|ante|ente|ace|ice|ouche|èche)$", "f"),
        (r"(?:able|ible|acle|ycle|uple|isque|arbre|ore|ire|ètre|ttre|stre|ympe|ype|ôme|ome|ème)$", "m"),
        (r"e$", "f"),
        (r"$", "m"),
    ),
    "es": (
        (r"(?:día|mapa|planeta|cometa|sofá|koala|panda|gorila|puma|guardia|.grama|.ema|.oma)$", "m"),
        (r"(?:avión|camión|bastión|gorrión|limón|escorpión|pez|ajedrez|pie|ataúd|laúd|césped)$", "m"),
        (
            r"(?:mano|foto|moto|radio|flor|nariz|luz|cruz|nuez|voz|raíz|perdiz|lombriz|codorniz|sal|piel)$",
            "f",
        ),
        (r"(?:nube|llave|carne|leche|noche|torre|nieve|fuente|serpiente|liebre|red|pared|miel)$", "f"),
        (r"(?:a|ión|dad|tad|tud|umbre|triz|sis|itis|ave|gente|mujer|madre|cárcel|catedral)$", "f"),
        (r"$", "m"),
    ),
    "de": (
        (r"(?:chen|lein|ment|tum|um|zeug|ett|ier|werk|tier|haus|boot|rad|schiff|gerät|instrument)$", "n"),
        (r"(?:ung|heit|keit|schaft|ion|tät|ik|ur|ei|enz|anz|ade|age|ie|in|itis|frau|pflanze)$", "f"),
        (r"(?:er|ling|ismus|or|ant|ent|ist|eur|ich|ig|en|el|hund|fisch|vogel|baum|mann)$", "m"),
        (r"e$", "f"),
        (r"$", "m"),
    ),
}
# Stressed a- at the beginning takes el and un in Spanish, though the noun is feminine.
_STRESSED_A = re.compile(r"h?[aá](?:gua|guila|cha|rma|lma|la|ula|ncla|ve|da|rpa|rca|sa|lga|rea)$")
# Masculine nouns that add -(e)n in every case but the nominative.
_WEAK = re.compile(r"(?:[^k]e|ant|ent|ist|at|aut|nom|mensch|bär|held|prinz|herr)$", re.IGNORECASE)
_NOT_WEAK = re.compile(r"(?:käse|kaffee|tee|see|schnee|monat|salat|apparat)$", re.IGNORECASE)


@dataclass(frozen=True)
class Word:
    """A concept in another language: word, gender (None: not told, guessed by the ending), source."""

    text: str
    gender: Gender | None
    source: str

    def gendered(self, language: str) -> "Word":
        """Return it with a gender."""
        return self if self.gender else replace(self, gender=guess_gender(self.text, language))


def check_language(language: str) -> str:
    """Return a language that there are tables for. Raises UserError for another."""
    if language not in LANGUAGES:
        names = suggest(language, LANGUAGES) or f"; there are {', '.join(LANGUAGES)}"
        raise UserError(f"no table for the language {language!r}{names}")
    return language


def guess_gender(word: str, language: str) -> Gender:
    """Guess a noun's gender by its ending; of several words French and Spanish look at the first."""
    head = word.split()[-1] if language == "de" else re.split(r"[ '’]", word)[0]
    return next(gender for ending, gender in _ENDINGS[language] if re.search(ending, head.lower()))


def article(word: Word, language: str) -> str:
    """Return the indefinite article of a word."""
    gender = word.gendered(language).gender or "m"
    if language == "es" and gender == "f" and _STRESSED_A.match(word.text.lower()):
        return "un"
    return _ARTICLES[language][gender]


def decline(word: Word) -> str:
    """Return a German word as it stands behind einem or einer: weak nouns and adjectives end in -n."""
    *adjectives, noun = word.text.split(" ")
    adjectives = [re.sub(r"e[rs]?$", "en", each) if each[:1].islower() else each for each in adjectives]
    weak = word.gendered("de").gender == "m" and _WEAK.search(noun) and not _NOT_WEAK.search(noun)
    if weak:
        noun += "n" if noun.endswith("e") else "en"
    return " ".join([*adjectives, noun])


def write_prompt(template: str, words: list[Word], language: str) -> str:
    """Write a published template in another language with the first of a concept's words, article and all.

    Raises UserError for a template that there is no table for.
    """
    tables = TEMPLATES[check_language(language)]
    name = template.removesuffix("_prompt")
    if name not in tables:
        raise UserError(
            f"the template {template!r} is not in the tables of {language!r}: there are {', '.join(tables)}; "
            "others can be translated (llm translate) and given by --prompts"
        )
    word, *others = words
    if name == "all_lemmas" and not others:
        name = "base"
    gender = word.gendered(language).gender or "m"
    return tables[name].format(
        word=word.text,
        article=article(word, language),
        dative=decline(word),
        dative_article=_DATIVES[gender],
        others=", ".join(each.text for each in others),
    )
