"""WordNet's nouns for millions of captions: which words name what, read once from the packaged database."""

import re
import zipfile
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from t2iprobe.wordnet import ARCHIVE

LONGEST = 4  # words of a noun that is looked for

# Offsets in WordNet 3.0. What is physical can be touched or happens to be an agent; what is depictable has a
# shape or is a stuff, and is no mere place.
PHYSICAL, OBJECT, MATTER, LOCATION = 1930, 2684, 20827, 27167

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_ENDINGS = (
    *(("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man")),
    *(("ies", "y"), ("s", "")),
)


class Mention(NamedTuple):
    """A noun in a text: characters start to end, the offset of its first sense, what that is."""

    start: int
    end: int
    offset: int
    physical: bool
    depictable: bool


class _Noun(NamedTuple):
    offset: int
    physical: bool
    depictable: bool


class Nouns:
    """Finds WordNet's nouns in texts, each by its first sense, the longest first.

    A single word that is used more often as a verb, adjective or adverb, by WordNet's counts, is none; nor
    is a stop word, nor one of fewer than three letters.
    """

    def __init__(self, stops: frozenset[str]) -> None:
        self._nouns = {word: noun for word, noun in _read_nouns().items() if word not in stops}
        self._exceptions = _read_exceptions()
        self._openings = frozenset(word.split(" ", 1)[0] for word in self._nouns if " " in word)
        self._cache: dict[str, _Noun | None] = {}

    def find(self, text: str) -> list[Mention]:
        """Return the nouns of a text, in order; none overlaps another."""
        words = [(match[0].lower(), match.start(), match.end()) for match in _WORD.finditer(text)]
        mentions, place = [], 0
        while place < len(words):
            noun, length = self._longest(words, place)
            if noun is not None:
                mentions.append(Mention(words[place][1], words[place + length - 1][2], *noun))
            place += length
        return mentions

    def _longest(self, words: list[tuple[str, int, int]], place: int) -> tuple[_Noun | None, int]:
        first = words[place][0]
        if first in self._openings:
            for length in range(min(LONGEST, len(words) - place), 1, -1):
                run = " ".join(word for word, _, _ in words[place : place + length])
                if noun := self._look_up(run):
                    return noun, length
        return self._look_up(first) if len(first) > 2 else None, 1

    def _look_up(self, word: str) -> _Noun | None:
        if noun := self._nouns.get(word):
            return noun
        if word not in self._cache:
            if len(self._cache) > 1 << 16:
                self._cache.clear()
            self._cache[word] = next(filter(None, map(self._nouns.get, self._singulars(word))), None)
        return self._cache[word]

    def _singulars(self, word: str) -> Iterator[str]:
        """WordNet's own rules of detachment, behind its exceptions."""
        yield from self._exceptions.get(word, ())
        for ending, singular in _ENDINGS:
            if word.endswith(ending) and not word.endswith("ss"):
                yield word.removesuffix(ending) + singular


def _read(name: str) -> Iterator[str]:
    with zipfile.ZipFile(ARCHIVE) as archive:
        yield from archive.read(f"wordnet/{name}").decode().splitlines()


@cache
def _read_nouns() -> dict[str, _Noun]:
    """Return noun, in lower case and with spaces → its first sense."""
    physical = _below({PHYSICAL})
    depictable = _below({OBJECT, MATTER}) - _below({LOCATION})
    used = _count_uses()
    nouns = {}
    for line in _read("index.noun"):
        if line.startswith(" "):
            continue
        fields = line.split(" ")
        lemma, offset = fields[0], int(fields[6 + int(fields[3])])
        uses = used.get(lemma, {})
        if uses.get("1", 0) >= max((count for part, count in uses.items() if part != "1"), default=0):
            nouns[lemma.replace("_", " ")] = _Noun(offset, offset in physical, offset in depictable)
    return nouns


def _count_uses() -> dict[str, dict[str, int]]:
    """Return lemma → part of speech (1 noun, 2 verb, 3 and 5 adjective, 4 adverb) → uses in tagged texts."""
    uses: dict[str, dict[str, int]] = {}
    for line in _read("cntlist.rev"):
        key, _, count = line.split(" ")
        lemma, _, rest = key.partition("%")
        part = "3" if rest[0] == "5" else rest[0]
        parts = uses.setdefault(lemma, {})
        parts[part] = parts.get(part, 0) + int(count)
    return uses


@cache
def _hyponyms() -> dict[int, list[int]]:
    """Return synset → the synsets right below it, instances too."""
    below: dict[int, list[int]] = {}
    pointer = re.compile(r" @i? (\d{8}) n ")
    for line in _read("data.noun"):
        if not line.startswith(" "):
            # the gloss, behind |, may look like anything
            for above in pointer.findall(line.partition(" | ")[0] + " "):
                below.setdefault(int(above), []).append(int(line[:8]))
    return below


def _below(roots: set[int]) -> frozenset[int]:
    """Return the synsets at and below `roots`."""
    found, waiting = set(roots), list(roots)
    while waiting:
        for synset in _hyponyms().get(waiting.pop(), ()):
            if synset not in found:
                found.add(synset)
                waiting.append(synset)
    return frozenset(found)


def _read_exceptions() -> dict[str, tuple[str, ...]]:
    return {
        fields[0].replace("_", " "): tuple(word.replace("_", " ") for word in fields[1:])
        for fields in map(str.split, _read("noun.exc"))
    }
