"""Prompts and texts in other languages, row by row: the concept protected, every translation checked.

A concept is a row's `synset` (or an English word, `concept`). Where a word for it is known, the sentence is
translated with a stand-in noun of the same gender, and the word put in its place: so the sentence agrees with
it, and the concept cannot be lost. Sentences are split and identified by simplemma.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from t2iprobe.errors import UserError
from t2iprobe.languages import TEMPLATES, Word, decline, write_prompt
from t2iprobe.lexicon import find_words
from t2iprobe.llm.corpus.documents import Row, Source
from t2iprobe.llm.corpus.streaming import dump_lines, stream
from t2iprobe.llm.translators import Apertium, Tables, Translator, clean_stars
from t2iprobe.wordnet import choose_article, synset

CHUNK_ROWS = 64  # of a slow back end: what a kill can cost
SHORTEST, LONGEST = 0.4, 2.5  # length of a translation by that of its source

# Nouns that stand in for a concept's word: by gender and whether it begins with a vowel; English, translated.
_STAND_INS: Mapping[str, Mapping[tuple[str, bool], tuple[str, str]]] = {
    "fr": {
        ("m", False): ("dog", "chien"), ("m", True): ("tree", "arbre"),
        ("f", False): ("house", "maison"), ("f", True): ("school", "école"),
    },
    "es": {
        ("m", False): ("dog", "perro"), ("m", True): ("tree", "árbol"),
        ("f", False): ("house", "casa"), ("f", True): ("island", "isla"),
    },
    "de": {
        (gender, vowel): pair
        for gender, pair in {"m": ("dog", "Hund"), "f": ("cat", "Katze"), "n": ("house", "Haus")}.items()
        for vowel in (False, True)
    },
}  # fmt: skip


class Concept(NamedTuple):
    """A concept in a text: characters start to end, the name of its synset."""

    start: int
    end: int
    synset: str


class Translated(NamedTuple):
    """A translation: the text, where the concept's word is (None: there is none, or it is not known)."""

    text: str
    unknown_words: int
    span: tuple[int, int] | None
    word: str | None
    protected: bool


@dataclass
class Translation:
    """The stage that translates rows: one row out for each language of each row in.

    field: which holds the text. sources: of words for concepts (`lexicon.SOURCES`), by default all that are
    there. round_trip: translate back, too, and compare by chrF. least_chrf: below that a row is not `ok`.
    """

    translator: Translator
    languages: Sequence[str]
    field: str = "text"
    sources: Sequence[str] | None = None
    round_trip: bool = False
    least_chrf: float = 20.0

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the rows depend on beside themselves."""
        return {
            **self.translator.settings,
            "languages": list(self.languages),
            "sources": None if self.sources is None else list(self.sources),
            "round_trip": [self.round_trip, self.least_chrf],
        }

    def process(self, rows: Sequence[Row]) -> tuple[list[bytes], Counter[str]]:
        """Return the lines of the rows' translations: a row's languages behind each other."""
        concepts = [find_concept(row) for row in rows]
        names = sorted({concept.synset for concept in concepts if concept})
        counts: Counter[str] = Counter()
        columns = []
        for language in self.languages:
            words = find_words(names, language, self.sources) if names else {}
            made = self.translate_rows(rows, concepts, words, language)
            checks = self.check(rows, made, language)
            column = []
            for row, concept, each, check in zip(rows, concepts, made, checks, strict=True):
                column.append(self.dump(row, concept, each, check, language))
                counts[f"{language}: translated"] += bool(each.text)
                counts[f"{language}: ok"] += check["ok"]
                if concept is not None and concept.synset in words:
                    counts[f"{language}: with a word"] += bool(each.text)
                    counts[f"{language}: concept there"] += each.span is not None
            columns.append(column)
        return [dump_lines([column[place] for column in columns]) for place in range(len(rows))], counts

    def translate_rows(
        self,
        rows: Sequence[Row],
        concepts: Sequence[Concept | None],
        words: Mapping[str, list[Word]],
        language: str,
    ) -> list[Translated]:
        """Return a translation of each row; an empty text where the back end has none."""
        if isinstance(self.translator, Tables):
            return [
                _write_by_table(row, words.get(concept.synset) if concept else None, language)
                for row, concept in zip(rows, concepts, strict=True)
            ]
        known = [words.get(concept.synset) if concept else None for concept in concepts]
        given = []
        for row, concept, found in zip(rows, concepts, known, strict=True):
            protected = concept is not None and found is not None
            given.append(_stand_in(row.text, concept, found[0], language) if protected else row.text)  # type: ignore[arg-type,index]
        made = [
            _restore(text, found[0], language) if found else _find_word(text, [], language)
            for text, found in zip(self._translate(given, language), known, strict=True)
        ]
        # What has lost its stand-in is translated as it is.
        plain = [place for place, each in enumerate(made) if each is None]
        texts = self._translate([rows[place].text for place in plain], language)
        for place, text in zip(plain, texts, strict=True):
            made[place] = _find_word(text, known[place] or [], language)
        return [each for each in made if each is not None]

    def _translate(self, texts: Sequence[str], language: str) -> list[str]:
        return translate_texts(texts, lambda parts: self.translator.translate(parts, language))

    def check(self, rows: Sequence[Row], made: Sequence[Translated], language: str) -> list[dict[str, Any]]:
        """Return the checks of translations: length, language, the way back, and whether all is well."""
        back = self.translator.back([each.text for each in made], language) if self.round_trip else None
        found = []
        for place, (row, each) in enumerate(zip(rows, made, strict=True)):
            check: dict[str, Any] = {
                "length_ratio": round(len(each.text) / max(len(row.text), 1), 3),
                "language": identify(each.text, language) if each.text else None,
                "unknown_words": each.unknown_words,
                "chrf": None if back is None or not each.text else round(chrf(back[place], row.text), 1),
            }
            check["ok"] = bool(
                each.text
                and SHORTEST <= check["length_ratio"] <= LONGEST
                and check["language"] in (language, None)
                and not each.unknown_words
                and (check["chrf"] is None or check["chrf"] >= self.least_chrf)
            )
            found.append(check)
        return found

    def dump(
        self, row: Row, concept: Concept | None, made: Translated, check: dict[str, Any], language: str
    ) -> dict[str, Any]:
        """Return the row to write: its own fields, the translation in place of the text, what was checked."""
        line = {**row.fields, "id": row.id, "language": language, self.field: made.text, "source": row.text}
        if concept is not None:
            line |= {"synset": concept.synset, "word": made.word, "span": made.span}
            line["protected"] = made.protected
        return line | {"checks": check}


def find_concept(row: Row) -> Concept | None:
    """Find the concept that a row names by `synset` or `concept`: the longest of its lemmas in the text."""
    name = row.fields.get("synset") or row.fields.get("concept")
    if not isinstance(name, str):
        return None
    found = synset(name)
    lemmas = [lemma.replace("_", " ") for lemma in found.lemma_names()]
    if isinstance(row.fields.get("concept"), str):
        lemmas.append(row.fields["concept"])
    for lemma in sorted(lemmas, key=len, reverse=True):
        if match := re.search(rf"(?<!\w){re.escape(lemma)}(?!\w)", row.text, re.IGNORECASE):
            return Concept(match.start(), match.end(), found.name())
    return None


def _begins_with_vowel(word: str) -> bool:
    return bool(re.match(r"[aeiouhâàéèêëîïôûœ]", word.lower()))


def _pair(word: Word, language: str) -> tuple[str, str]:
    gender = word.gendered(language).gender or "m"
    return _STAND_INS[language][gender, _begins_with_vowel(word.text)]


def _stand_in(text: str, concept: Concept, word: Word, language: str) -> str:
    """Put the stand-in where the concept is, with the article that it takes."""
    english, _ = _pair(word, language)
    before, after = text[: concept.start], text[concept.end :]
    fitting = choose_article(english)
    before = re.sub(r"\b(a|an)(\s+)$", lambda match: fitting + match[2], before)
    before = re.sub(r"\b(A|An)(\s+)$", lambda match: fitting.capitalize() + match[2], before)
    return before + english + after


def _restore(text: str, word: Word, language: str) -> Translated | None:
    """Put the word where the stand-in's translation is; None where that is not there exactly once."""
    _, other = _pair(word, language)
    places = [match.span() for match in re.finditer(rf"(?<!\w){other}(?!\w)", text, re.IGNORECASE)]
    if len(places) != 1:
        return None
    (start, end), inflected = places[0], word.text
    if language == "de" and re.search(r"(?:em|er|en|es)\s+$", text[:start]):
        inflected = decline(word)
    cleaned, unknown = clean_stars(text[:start])
    rest, more = clean_stars(text[end:])
    span = (len(cleaned), len(cleaned) + len(inflected))
    return Translated(cleaned + inflected + rest, unknown + more, span, word.text, True)


def _find_word(text: str, words: Sequence[Word], language: str) -> Translated:
    """Find a concept's word in a translation that was not protected, in whatever form it takes."""
    cleaned, unknown = clean_stars(text)
    for word in words:
        if place := find_form(word.text, cleaned, language):
            return Translated(cleaned, unknown, place, word.text, False)
    return Translated(cleaned, unknown, None, None, False)


def find_form(word: str, text: str, language: str) -> tuple[int, int] | None:
    """Return where a word is in a text, in whatever form: the lemmas of its parts, one after the other."""
    from simplemma import lemmatize

    def lemma(token: str) -> str:
        return lemmatize(token, lang=language).lower()

    tokens = [(match[0], match.span()) for match in re.finditer(r"[^\W_]+(?:-[^\W_]+)*", text)]
    wanted = [lemma(part) for part in re.findall(r"[^\W_]+(?:-[^\W_]+)*", word)]
    there = [lemma(token) for token, _ in tokens]
    for place in range(len(there) - len(wanted) + 1):
        if wanted and there[place : place + len(wanted)] == wanted:
            return tokens[place][1][0], tokens[place + len(wanted) - 1][1][1]
    return None


def _write_by_table(row: Row, words: list[Word] | None, language: str) -> Translated:
    template = row.fields.get("template")
    if not words or not isinstance(template, str) or template not in TEMPLATES[language]:
        return Translated("", 0, None, None, False)
    text = write_prompt(template, words, language)
    word = decline(words[0]) if language == "de" and template != "empty" else words[0].text
    start = text.index(word)
    return Translated(text, 0, (start, start + len(word)), words[0].text, True)


def translate_texts(texts: Sequence[str], translate: Callable[[list[str]], list[str]]) -> list[str]:
    """Translate texts sentence by sentence, all sentences at once; what is between them stays as it is."""
    parts: list[str] = []
    layouts: list[list[tuple[str, int]]] = []  # for each text (what is before, a sentence's number)
    ends: list[str] = []
    for text in texts:
        layout, place = [], 0
        for sentence in split_sentences(text):
            start = text.index(sentence, place)
            layout.append((text[place:start], len(parts)))
            parts.append(sentence)
            place = start + len(sentence)
        layouts.append(layout)
        ends.append(text[place:])
    made = translate(parts) if parts else []
    if len(made) != len(parts):
        raise UserError(f"the back end gave {len(made)} translations of {len(parts)} sentences")
    return [
        "".join(before + made[number] for before, number in layout) + end
        for layout, end in zip(layouts, ends, strict=True)
    ]


def split_sentences(text: str) -> list[str]:
    """Return the sentences of an English text, line by line, without the space around them."""
    from simplemma import split_sentences as split

    return [
        sentence.strip()
        for line in text.split("\n")
        for sentence in split(line, lang="en")
        if sentence.strip()
    ]


def identify(text: str, language: str) -> str | None:
    """Return the language that clearly more of the words are of, `language` or English; or None."""
    from simplemma import langdetect

    shares = dict(langdetect(text, lang=(language, "en")))
    ours, english = shares.get(language, 0.0), shares.get("en", 0.0)
    # Short texts share words: "image" and "ours" are both English, too.
    return None if abs(ours - english) < 0.25 else language if ours > english else "en"


def chrf(text: str, reference: str) -> float:
    """Return chrF, 0 to 100 (Popović 2015; sacreBLEU's)."""
    from sacrebleu import sentence_chrf

    return float(sentence_chrf(text, [reference]).score)


def detect_field(path: Path) -> str:
    """Return `prompt` for a file whose first row has one and no `text`; `text` otherwise."""
    source = Source.open(path)
    if source.form != "jsonl":
        return "text"
    for chunk in source.read():
        for line in chunk.lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                return "prompt" if "prompt" in row and "text" not in row else "text"
    return "text"


def translate_file(
    source: Source,
    out: Path,
    translation: Translation,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Translate the rows of a file; `out` is whole or absent, and a run that was stopped goes on.

    Returns counts: for each language translations, how many passed the checks, and of those with a concept
    how many have its word.
    """
    slow = not isinstance(translation.translator, Apertium | Tables)
    return stream(translation, replace(source, chunk_lines=CHUNK_ROWS) if slow else source, out, show=show)
