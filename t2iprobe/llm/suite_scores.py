"""How answers of the hallucination suite are scored: pure functions, each with a truth table in its test."""

import re
import string
from collections.abc import Sequence

__all__ = [
    "is_exact",
    "measure_rouge",
    "measure_self_consistency",
    "normalise_answer",
    "score_judgement",
    "score_support",
]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SENTENCE = re.compile(r"[^.!?\n]+")
_LETTERS = re.compile(r"[a-z]+")
#: An answer of fewer content words says nothing that could be checked.
LEAST_CONTENT = 3
_EMPTY = """
the and for are was were with that this from has have had its his her their they them which who whom
will would can could been being into over under about also but not you your our out off than then
there here when where what while very more most such only some any all
"""
_EMPTY_WORDS = frozenset(_EMPTY.split())


def normalise_answer(text: str) -> str:
    """Return a short answer in lower case without punctuation, articles and needless space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def is_exact(answer: str, aliases: Sequence[str]) -> bool:
    """Return whether an answer is one of the aliases, both normalised; an empty one never is."""
    given = normalise_answer(answer)
    return bool(given) and given in {normalise_answer(alias) for alias in aliases}


def score_judgement(answer: str, hallucinated: bool) -> dict[str, float]:
    """Score a Yes (it is hallucinated) or No, as the leaderboard does.

    An answer with both words or neither cannot be read: its `correctness` and `acc` are 0, and it has no
    `em`, which is the accuracy among answers that can be read.
    """
    words = set(_LETTERS.findall(answer.lower()))
    if ("yes" in words) == ("no" in words):
        return {"acc": 0.0, "correctness": 0.0}
    right = float(("yes" in words) == hallucinated)
    return {"acc": right, "correctness": 1.0, "em": right}


def measure_rouge(summary: str, reference: str) -> float:
    """Return ROUGE-L F, 0 to 1, stemmed as usual."""
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"], use_stemmer=True).score(reference, summary)["rougeL"].fmeasure)


def score_support(caption: str, synset: str) -> dict[str, float]:
    """Score a caption for a synset: 1 where it names it and holds no object that nothing ties to it.

    `empty` tells of captions without content, which hold no unsupported object either and count 0.
    """
    from t2iprobe.llm.faithfulness import find_span, list_unsupported
    from t2iprobe.llm.prompts import clean_caption
    from t2iprobe.wordnet import synset as find_synset

    text, concept = clean_caption(caption), find_synset(synset)
    empty = len(_content(text)) < LEAST_CONTENT
    span = find_span(text, concept)
    supported = not empty and span is not None and not list_unsupported(text, concept, span)
    return {"supported": float(supported), "named": float(span is not None), "empty": float(empty)}


def measure_self_consistency(answer: str, samples: Sequence[str]) -> dict[str, float]:
    """Return how far the least consistent sentence of an answer is borne out by other samples, 0 to 1.

    A content word is borne out by the share of samples that hold it; a sentence by the mean over its words;
    the answer by its worst sentence, as the leaderboard takes the maximum of the inconsistency. An answer
    without content has consistency 0, and `empty` says so: without this guard whoever says nothing wins.
    """
    if len(_content(answer)) < LEAST_CONTENT or not samples:
        return {"consistency": 0.0, "empty": 1.0}
    held = [set(_content(sample)) for sample in samples]
    sentences = [words for part in _SENTENCE.findall(answer) if (words := _content(part))]
    borne = [
        sum(sum(word in each for each in held) / len(held) for word in words) / len(words)
        for words in sentences
    ]
    return {"consistency": min(borne), "empty": 0.0}


def _content(text: str) -> list[str]:
    return [word for word in _LETTERS.findall(text.lower()) if len(word) > 2 and word not in _EMPTY_WORDS]
