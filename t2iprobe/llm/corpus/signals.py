"""The rule signals of RedPajama-V2 (arXiv 2411.12372): names, spans and rounding as published.

A signal is ``[[start, end, score], …]``, offsets in characters of the text as it was read; one span for a
signal of the document, one a line for a signal of lines. The text itself is never changed.
"""

import gzip
import json
import math
import re
import string
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from t2iprobe.errors import UserError, suggest

Signal = list[list[Any]]  # [start, end, score], the score a number or None
Signals = dict[str, Signal]

PRECISION = 8  # decimals that scores are rounded to

_ASSETS = Path(__file__).parents[2] / "assets" / "corpus"
_RAW_WORD = re.compile(r"\w+|[^\w\s]+")  # what nltk's WordPunctTokenizer finds
_ASCII_WORD = re.compile(r"[a-zA-Z0-9_]+|[^a-zA-Z0-9_\s]+")  # the same in ASCII, faster
_SENTENCE = re.compile(r"\b[^.!?]+[.!?]*")
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_UPPERCASE, _DIGITS = string.ascii_uppercase.encode(), string.digits.encode()
_ASCII_PUNCTUATION = string.punctuation.encode()
_NO_LETTERS = bytes(set(range(256)) - set(string.ascii_letters.encode()) - {10})
_LOWER = bytes.maketrans(_UPPERCASE, string.ascii_lowercase.encode())
_ELLIPSES = ("...", "…")
_TERMINAL = (".", "!", "?", "”")
_BULLETS = tuple("\u2022\u2023\u25b6\u25c0\u25e6\u25a0\u25a1\u25aa\u25ab\u2013")


def normalize(text: str) -> list[str]:
    """Return the words of `text` without ASCII punctuation, in lower case, in Unicode's form NFD."""
    if text.isascii():  # as below, several times as fast
        return text.encode().translate(_LOWER, _ASCII_PUNCTUATION).decode().split()
    plain = " ".join(text.translate(_PUNCTUATION).lower().split())
    return unicodedata.normalize("NFD", plain).split(" ") if plain else []


def split_lines(text: str) -> list[str]:
    """Split at each line feed, which stays with the line before it."""
    *whole, last = text.split("\n")
    lines = [line + "\n" for line in whole]
    return [*lines, last] if last else lines


@cache
def stop_words(language: str) -> frozenset[str]:
    """Return the stop words of a language, empty where there is no list of them."""
    return frozenset(_read_asset("stop_words.json.gz").get(language, ()))


@cache
def blocked_words(language: str) -> frozenset[str]:
    """Return the entries of the LDNOOBW blocklist of a language, empty where there is none."""
    return frozenset(_read_asset("ldnoobw.json.gz").get(language, ()))


@cache
def _read_asset(name: str) -> dict[str, list[str]]:
    return json.loads(gzip.decompress((_ASSETS / name).read_bytes()))


class Document:
    """A text with what the signals share: lines, words as they stand, words normalized.

    text: as it was read. lines: (line, start, end, its normalized words). words: those of all lines, and
    how often each is there. raw_words: runs of letters and digits, runs of other signs.
    """

    __slots__ = ("counts", "lines", "raw_words", "text", "words")

    def __init__(self, text: str) -> None:
        self.text = text
        self.lines: list[tuple[str, int, int, list[str]]] = []
        self.words: list[str] = []
        start = 0
        for line in split_lines(text):
            words = normalize(line)
            self.lines.append((line, start, start + len(line), words))
            self.words += words
            start += len(line)
        self.raw_words = (_ASCII_WORD if text.isascii() else _RAW_WORD).findall(text)
        self.counts = Counter(self.words)


@dataclass(frozen=True)
class Rules:
    """What the rule signals depend on beside the text.

    language: of the stop words and the blocklist. domains: a source domain's number in the UT1 blacklist.
    """

    language: str = "en"
    domains: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not stop_words(self.language):
            known = sorted(_read_asset("stop_words.json.gz"))
            raise UserError(
                f"no stop words for the language {self.language!r}{suggest(self.language, known)}; "
                f"there are {', '.join(known)}"
            )


def compute_signals(document: Document, rules: Rules, domain: str | None = None) -> Signals:
    """Return the published rule signals of a document, whose source domain is `domain`."""
    scores: dict[str, float | None] = {}
    scores |= _content_scores(document, rules, domain)
    scores |= _repetition_scores(document)
    scores |= _language_scores(document)
    length = len(document.text)
    signals: Signals = {name: [[0, length, score]] for name, score in scores.items()}
    return signals | _line_signals(document)


def _content_scores(document: Document, rules: Rules, domain: str | None) -> dict[str, float | None]:
    text, words, raw = document.text, document.words, document.raw_words
    stops = stop_words(rules.language)
    normal = " ".join(words)
    lorem = normal.count("lorem ipsum")
    braces = text.count("{") + text.count("}")
    return {
        "rps_doc_ldnoobw_words": float(_count_blocked(document, rules.language)),
        "rps_doc_lorem_ipsum": round(lorem / len(normal), PRECISION) if lorem else 0.0,
        "rps_doc_curly_bracket": round(braces / len(text), PRECISION) if braces else 0.0,
        "rps_doc_ut1_blacklist": None if domain is None else rules.domains.get(domain),
        "rps_doc_stop_word_fraction": (
            round(sum(map(stops.__contains__, raw)) / len(raw), PRECISION) if words else 0.0
        ),
    }


def _count_blocked(document: Document, language: str) -> int:
    """Count the n-grams that are on the blocklist. Only words that begin an entry are looked at."""
    openings, counts = _blocked_by_first_word(language), document.counts
    words, count = document.words, 0
    for word in filter(openings.__contains__, counts):
        for entry in openings[word]:
            if len(entry) == 1:
                count += counts[word]
            elif all(map(counts.__contains__, entry)):
                count += sum(
                    words[place : place + len(entry)] == entry
                    for place, found in enumerate(words)
                    if found == word
                )
    return count


@cache
def _blocked_by_first_word(language: str) -> dict[str, list[list[str]]]:
    openings: dict[str, list[list[str]]] = {}
    for entry in blocked_words(language):
        words = entry.split(" ")
        openings.setdefault(words[0], []).append(words)
    return openings


def _language_scores(document: Document) -> dict[str, float | None]:
    text, words, raw = document.text, document.words, document.raw_words
    symbols = text.count("#") + text.count("...") + text.count("…")
    # Of the words only their ASCII letters are left; those that are left are counted.
    with_letter = len("\n".join(raw).encode("ascii", "ignore").translate(None, _NO_LETTERS).split())
    ends = sum(line.rstrip().endswith(_ELLIPSES) for line, *_ in document.lines)
    return {
        "rps_doc_frac_all_caps_words": _share(sum(map(str.isupper, raw)), len(raw)),
        "rps_doc_frac_lines_end_with_ellipsis": _share(ends, len(document.lines)),
        "rps_doc_frac_no_alph_words": round(1.0 - with_letter / len(raw), PRECISION) if raw else None,
        "rps_doc_frac_unique_words": _share(len(document.counts), len(words)),
        "rps_doc_mean_word_length": _share(sum(map(len, words)), len(words)),
        "rps_doc_num_sentences": float(len(_SENTENCE.findall(text))),
        "rps_doc_symbol_to_word_ratio": _share(symbols, len(raw)),
        "rps_doc_unigram_entropy": _entropy(document.counts.values(), len(words)),
        "rps_doc_word_count": len(words),
    }


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, PRECISION) if whole else None


def _entropy(counts: Iterable[int], total: int) -> float | None:
    """Σ −p ln p, added up in the words' order, as it was published; few counts are distinct."""
    if not total:
        return None
    terms = {count: -count / total * math.log(count / total) for count in set(counts)}
    return round(sum(map(terms.__getitem__, counts)), PRECISION)


def _repetition_scores(document: Document) -> dict[str, float | None]:
    """The shares of characters in the most frequent n-gram (2 to 4) and in n-grams found again (5 to 10).

    Where an n-gram is found twice, so is the shorter one that it begins with. So each length looks only at
    the places that the length before left, which are few in most texts.
    """
    words = document.words
    lengths = list(map(len, words))
    total = sum(lengths)
    scores: dict[str, float | None] = {}
    repeated = {word for word, count in document.counts.items() if count > 1}
    kind: dict[int, Any] = {place: word for place, word in enumerate(words) if word in repeated}
    for n in range(2, 11):
        if not kind:
            scores[_repetition_name(n)] = 0.0
            continue
        groups: defaultdict[tuple[Any, str], list[int]] = defaultdict(list)
        for place, shorter in kind.items():
            if place + n <= len(words) and (last := words[place + n - 1]) in repeated:
                groups[shorter, last].append(place)
        again = ((place, places[0]) for places in groups.values() if len(places) > 1 for place in places)
        kind = dict(sorted(again))  # in the text's order: the first among equals is found first
        if n <= 4:
            scores[_repetition_name(n)] = _top_share(groups, n, lengths, total)
        else:
            covered = {word for place in kind for word in range(place, place + n)}
            share = round(sum(lengths[word] for word in covered) / total, PRECISION) if covered else 0.0
            scores[_repetition_name(n)] = share
    return scores


def _repetition_name(n: int) -> str:
    return f"rps_doc_frac_chars_top_{n}gram" if n <= 4 else f"rps_doc_frac_chars_dupe_{n}grams"


def _top_share(groups: Mapping[Any, list[int]], n: int, lengths: list[int], total: int) -> float:
    # The first found among the most frequent, as Counter.most_common has it.
    places = max(groups.values(), key=len, default=[])
    if len(places) < 2:
        return 0.0
    first = places[0]
    return round(sum(lengths[first : first + n]) * len(places) / total, PRECISION)


def _line_signals(document: Document) -> Signals:
    ends, scripts, counts, digits, bullets, capitals = [], [], [], [], [], []
    for line, start, end, words in document.lines:
        normal = " ".join(words)
        ends.append([start, end, float(line.rstrip().endswith(_TERMINAL))])
        scripts.append([start, end, float(words.count("javascript"))])
        counts.append([start, end, len(words)])
        digits.append([start, end, _char_share(normal, _DIGITS, str.isnumeric)])
        bullets.append([start, end, float(line.lstrip().startswith(_BULLETS))])
        capitals.append([start, end, _char_share(line, _UPPERCASE, str.isupper)])
    return {
        "rps_lines_ending_with_terminal_punctution_mark": ends,
        "rps_lines_javascript_counts": scripts,
        "rps_lines_num_words": counts,
        "rps_lines_numerical_chars_fraction": digits,
        "rps_lines_start_with_bulletpoint": bullets or [[0, len(document.text), None]],
        "rps_lines_uppercase_letter_fraction": capitals,
    }


def _char_share(text: str, ascii_kind: bytes, is_kind: Callable[[str], bool]) -> float:
    """Return the share of characters of a kind. The ASCII ones are counted all at once: they are most."""
    if not text:
        return 0.0
    plain = text.encode("ascii", "ignore")
    count = len(plain) - len(plain.translate(None, ascii_kind))
    if len(plain) < len(text):
        count += sum(map(is_kind, _NOT_ASCII.findall(text)))
    return round(count / len(text), PRECISION)


_CCNET = ("length", "original_length", "nlines", "original_nlines", "language_score", "perplexity")
_BUCKETS = {"head": 0, "middle": 1, "tail": 2}


def copy_ccnet_signals(row: Mapping[str, Any], length: int) -> Signals:
    """Return the seven signals that CCNet made, of those of its fields that a row has."""
    signals: Signals = {}
    for name in _CCNET:
        value = row.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            signals[f"ccnet_{name}"] = [[0, length, float(value)]]
    if row.get("bucket") in _BUCKETS:
        signals["ccnet_bucket"] = [[0, length, _BUCKETS[row["bucket"]]]]
    return signals
