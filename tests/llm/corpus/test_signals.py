"""Signals against their definitions, written out slowly, on random texts of many scripts."""

import math
import random
import re
import string
import unicodedata
from collections import Counter

import pytest

from t2iprobe.errors import UserError
from t2iprobe.llm.corpus.signals import (
    Document,
    Rules,
    blocked_words,
    compute_signals,
    copy_ccnet_signals,
    split_lines,
)

PIECES = (
    *(
        "a red fox",
        "THE OLD",
        "8k 8k",
        "Straße",
        "Ünïted",
        "İstanbul",
        "ΣΟΦΟΣ",
        "漢字",
        "lorem ipsum",
        "dolor",
    ),
    *("javascript", "{x}", "...", "…", "#tag", "½", "٣", "•", "\u2013 item", "\n", "\n\n", " \t ", "\u2003"),
    *("\x1c", "\r", "e\u0301", "!", "?", ".", "”", "it's", "snake_case", "a b c d e a b c d e a b c d e"),
)


def normalize(text: str) -> str:
    """The published way."""
    text = text.translate(str.maketrans("", "", string.punctuation)).lower().strip()
    return unicodedata.normalize("NFD", re.sub(r"\s+", " ", text))


def grams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[place : place + n]) for place in range(len(words) - n + 1)]


def slowly(text: str) -> dict[str, object]:
    words, raw = normalize(text).split(), re.findall(r"\w+|[^\w\s]+", text)
    total, found = sum(map(len, words)), {}
    for n in range(2, 5):
        top = Counter(grams(words, n)).most_common(1)
        share = sum(map(len, top[0][0])) * top[0][1] / total if top and top[0][1] > 1 else 0.0
        found[f"rps_doc_frac_chars_top_{n}gram"] = round(share, 8)
    for n in range(5, 11):
        counts, covered = Counter(grams(words, n)), set()
        for place, gram in enumerate(grams(words, n)):
            covered |= set(range(place, place + n)) if counts[gram] > 1 else set()
        share = sum(len(words[place]) for place in covered) / total if covered else 0.0
        found[f"rps_doc_frac_chars_dupe_{n}grams"] = round(share, 8)
    if words:
        shares = [count / len(words) for count in Counter(words).values()]
        found["rps_doc_unigram_entropy"] = round(-sum(p * math.log(p) for p in shares), 8)
        found["rps_doc_lorem_ipsum"] = round(normalize(text).count("lorem ipsum") / len(normalize(text)), 8)
    if raw:
        letters = sum(re.search("[a-zA-Z]", word) is not None for word in raw)
        found["rps_doc_frac_no_alph_words"] = round(1.0 - letters / len(raw), 8)
        found["rps_doc_frac_all_caps_words"] = round(sum(map(str.isupper, raw)) / len(raw), 8)
    found["rps_doc_num_sentences"] = float(len(re.findall(r"\b[^.!?]+[.!?]*", text)))
    return found


def lines_slowly(text: str) -> dict[str, list[float]]:
    raw = [match[0] for match in re.finditer(r"([^\n]*\n|[^\n]+$)", text)]
    normal = [normalize(line) for line in raw]
    return {
        "rps_lines_num_words": [len(line.split()) for line in normal],
        "rps_lines_javascript_counts": [float(line.split().count("javascript")) for line in normal],
        "rps_lines_numerical_chars_fraction": [
            round(sum(map(str.isnumeric, line)) / len(line), 8) if line else 0.0 for line in normal
        ],
        "rps_lines_uppercase_letter_fraction": [
            round(sum(map(str.isupper, line)) / len(line), 8) for line in raw
        ],
    }


@pytest.mark.parametrize("seed", range(60))
def test_definitions(seed: int) -> None:
    rng = random.Random(seed)
    joint = rng.choice([" ", "", " "])
    text = joint.join(rng.choices(PIECES, k=rng.randrange(1, 60)))
    found = compute_signals(Document(text), Rules())

    for name, score in slowly(text).items():
        assert found[name][0][2] == pytest.approx(score, abs=1e-8, rel=0), name
    for name, scores in lines_slowly(text).items():
        assert [score for _, _, score in found[name]] == scores, name
        assert "".join(text[start:end] for start, end, _ in found[name]) == text


def test_empty_text_has_no_scores_where_there_is_nothing_to_count() -> None:
    found = compute_signals(Document(""), Rules())

    assert found["rps_doc_mean_word_length"] == [[0, 0, None]]
    assert found["rps_doc_word_count"] == [[0, 0, 0]]
    assert found["rps_lines_num_words"] == []
    assert found["rps_lines_start_with_bulletpoint"] == [[0, 0, None]]


def test_lines_end_at_line_feeds_only() -> None:
    assert split_lines("a\r\nb\x0cc\n\nd") == ["a\r\n", "b\x0cc\n", "\n", "d"]
    assert split_lines("a\n") == ["a\n"]
    assert split_lines("") == []


def test_blocked_words_are_counted_as_words_and_as_phrases() -> None:
    single = next(entry for entry in sorted(blocked_words("en")) if entry.isalpha())
    phrase = next(entry for entry in sorted(blocked_words("en")) if entry.count(" ") == 1)
    text = f"{single.upper()}! {single} x{single}x, {phrase}; {phrase.replace(' ', ' and ')}"
    inside = sum(word in blocked_words("en") for word in phrase.split())

    [[_, _, count]] = compute_signals(Document(text), Rules())["rps_doc_ldnoobw_words"]

    assert count == 2 + 1 + 2 * inside
    assert compute_signals(Document(text), Rules("sv"))["rps_doc_ldnoobw_words"][0][2] == 0


def test_domains_have_the_numbers_they_are_given() -> None:
    rules = Rules(domains={"example.org": 7})
    found = [compute_signals(Document("x"), rules, domain) for domain in ("example.org", "example.com", None)]

    assert [signals["rps_doc_ut1_blacklist"][0][2] for signals in found] == [7, None, None]


def test_ccnet_signals_are_copied_where_they_are() -> None:
    row = {"length": 5, "perplexity": 31.5, "bucket": "middle", "nlines": "many"}

    assert copy_ccnet_signals(row, 9) == {
        "ccnet_length": [[0, 9, 5.0]], "ccnet_perplexity": [[0, 9, 31.5]], "ccnet_bucket": [[0, 9, 1]],
    }  # fmt: skip


def test_unknown_language_is_refused() -> None:
    with pytest.raises(UserError, match="no stop words for the language 'xx'"):
        Rules("xx")
