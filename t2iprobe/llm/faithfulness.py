"""Is a caption about its synset? Signals from the language model and from WordNet, and how good they are.

- gloss PMI: log p(caption | gloss) − log p(caption), in nats: how much the gloss explains the caption.
- sibling: the gloss PMI of the caption minus that of the same with the concept's name swapped for a WordNet
  sibling's; positive where the gloss wants this word (the analogue of an entity-substituted question).
- is-a: log p(hypernym | caption) − log p(hypernym), minus the same for a sibling of the hypernym.
- unsupported objects: nouns for physical things that neither gloss nor WordNet's relations give.

All log-probabilities are asked for after a few demonstrations, in forests (see `scoring.py`).
"""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from t2iprobe import wordnet
from t2iprobe.intervals import describe_probability
from t2iprobe.llm.commands import Engine
from t2iprobe.llm.scoring import Request, score_continuations

if TYPE_CHECKING:
    from nltk.corpus.reader.wordnet import Synset

__all__ = [
    "DEMONSTRATIONS",
    "Limits",
    "Signals",
    "check_captions",
    "choose_sibling",
    "compare_signals",
    "find_span",
    "list_unsupported",
    "name_synset",
    "swap_concept",
]

#: Rows of a scoring pass: the demonstrations, which each pass computes, are a small part of them.
ROWS = 1024
#: (word, gloss, caption), none of them a synset that a probe of ImageNet's synsets asks for.
DEMONSTRATIONS = (
    (
        "lighthouse",
        "a tower with a light that gives warning of shoals to passing ships",
        "A white lighthouse on a rocky cliff under a stormy evening sky.",
    ),
    (
        "pomegranate",
        "large globular fruit having many seeds with juicy red pulp in a tough brownish-red rind",
        "Half a pomegranate on a wooden table, its red seeds shining in the morning light.",
    ),
    (
        "blacksmith",
        "a smith who forges and shapes iron with a hammer and anvil",
        "A blacksmith in a leather apron hammers glowing iron on an anvil.",
    ),
)
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
#: What stands in any picture: its medium, its light, its ground, who looks.
_SCENE_WORDS = """
photo photograph picture image painting drawing illustration sketch portrait scene view close-up closeup
background foreground front side back top bottom middle corner edge center centre light sunlight sun moon
shadow sky cloud horizon morning evening night day sunset sunrise water sea lake river ground earth grass
field snow rain sand beach rock stone mountain hill forest wood tree leaf branch flower garden park road
street path city town house building room wall floor table window door man woman person people child boy
girl hand face eye head body color colour pattern surface shape one two three group pair piece line red
orange yellow green blue purple brown black white gray grey gold silver
"""
_SCENE = frozenset(_SCENE_WORDS.split())


# -- WordNet -------------------------------------------------------------------------------------------


def name_synset(synset: "Synset") -> str:
    """Return the first lemma, in words."""
    return _lemmas(synset)[0]


def _lemmas(synset: "Synset") -> list[str]:
    return [lemma.replace("_", " ").lower() for lemma in synset.lemma_names()]


def find_span(caption: str, synset: "Synset") -> tuple[int, int] | None:
    """Return where a caption names the synset, [start, end): the longest of its lemmas, plural or not."""
    for lemma in sorted(_lemmas(synset), key=len, reverse=True):
        plurals = [f"{re.escape(lemma)}(?:s|es)?"]
        if lemma.endswith("y"):
            plurals.append(f"{re.escape(lemma[:-1])}ies")
        if lemma.endswith(("fe", "f")):
            plurals.append(f"{re.escape(lemma.rstrip('fe'))}ves")
        if match := re.search(rf"(?<![\w-])(?:{'|'.join(plurals)})(?![\w-])", caption, re.IGNORECASE):
            return match.span()
    return None


def choose_sibling(synset: "Synset", seed: int = 0) -> "Synset | None":
    """Return a synset with a hypernym in common, by a hash of name and seed; a cousin where there is none.

    None for a synset that has neither, such as entity. A sibling shares no lemma.
    """
    own = set(_lemmas(synset))
    for parents in (synset.hypernyms(), [up for parent in synset.hypernyms() for up in parent.hypernyms()]):
        found = sorted(
            {
                child
                for parent in parents
                for child in _children(parent, 1 if parents == synset.hypernyms() else 2)
                if child != synset and not own & set(_lemmas(child))
            },
            key=lambda child: hashlib.sha256(f"{seed}/{synset.name()}/{child.name()}".encode()).digest(),
        )
        found = [child for child in found if synset not in child.closure(lambda one: one.hypernyms())]
        if found:
            return found[0]
    return None


def _children(synset: "Synset", depth: int) -> Iterable["Synset"]:
    children = synset.hyponyms()
    return children if depth == 1 else [each for child in children for each in child.hyponyms()]


def swap_concept(caption: str, span: tuple[int, int], other: "Synset") -> str:
    """Return the caption with what stands at `span` swapped for another synset's name, and its article."""
    start, end = span
    name = name_synset(other)
    before = caption[:start]
    if match := re.search(r"\b([Aa])n? $", before):
        article = wordnet.choose_article(name)
        before = before[: match.start()] + (article.capitalize() if match[1] == "A" else article) + " "
    if not before.strip():
        name = name[:1].upper() + name[1:]
    return before + name + caption[end:]


def list_unsupported(caption: str, synset: "Synset", span: tuple[int, int] | None = None) -> list[str]:
    """Return the words for physical things in a caption that nothing in WordNet ties to the synset.

    Supported are its own name (at `span`), words of its gloss and of its hypernyms' and kinds' names, its
    parts and wholes, and what any picture may hold.
    """
    supported = _supported_words(synset)
    found = []
    for match in _WORD.finditer(caption):
        inside = span is not None and match.start() < span[1] and match.end() > span[0]
        word = match[0].lower()
        if not inside and (noun := _physical_noun(word)) and not {word, noun} & supported:
            found.append(noun)
    return list(dict.fromkeys(found))


@cache
def _supported_words(synset: "Synset") -> frozenset[str]:
    related = [synset, *synset.closure(lambda one: one.hypernyms()), *synset.hyponyms()]
    for kind in ("part", "member", "substance"):
        related += getattr(synset, f"{kind}_meronyms")() + getattr(synset, f"{kind}_holonyms")()
    texts = [synset.definition(), *(lemma for one in related for lemma in _lemmas(one))]
    words = {word.lower() for text in texts for word in _WORD.findall(text)}
    singular = {noun for word in words if (noun := wordnet.reader().morphy(word, "n"))}
    return frozenset(words | singular) | _SCENE


@cache
def _physical_noun(word: str) -> str | None:
    """Return the singular of a word that mostly is a noun for an object or a living thing, else None."""
    noun = wordnet.reader().morphy(word, "n")
    if noun is None or len(noun) < 3 or noun in _SCENE:
        return None
    senses = wordnet.reader().synsets(noun, "n")
    if not senses:
        return None
    counts, read = _counts(), wordnet.reader().morphy
    others = [counts[base, pos] for pos in "var" if (base := read(word, pos))]
    if counts[noun, "n"] < max(others, default=0):
        return None
    physical = wordnet.synset("object.n.01")
    return noun if physical in senses[0].closure(lambda one: one.hypernyms()) else None


@cache
def _counts() -> Counter[tuple[str, str]]:
    """Return how often a word was met as a part of speech."""
    found: Counter[tuple[str, str]] = Counter()
    for tagged in wordnet.tagged_senses():
        found[tagged.lemma, tagged.pos] += tagged.count
    return found


# -- signals -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signals:
    """What was found of one caption; None where a signal cannot be had, such as without a sibling."""

    gloss_pmi: float
    sibling: float | None
    isa: float | None
    unsupported: list[str] = field(default_factory=list)
    words: int = 0
    tokens: int = 0

    def faults(self, limits: "Limits") -> list[str]:
        """Return why the caption is rejected, in words; none where it passes."""
        found = []
        if not limits.words[0] <= self.words <= limits.words[1]:
            found.append(f"{self.words} words")
        if self.tokens > limits.tokens:
            found.append(f"{self.tokens} tokens")
        if len(self.unsupported) > limits.unsupported:
            found.append(f"unsupported: {', '.join(self.unsupported)}")
        for name in ("gloss_pmi", "sibling", "isa"):
            value, least = getattr(self, name), getattr(limits, name)
            if least is not None and value is not None and value <= least:
                found.append(f"{name} {value:.2f}")
        return found


@dataclass(frozen=True)
class Limits:
    """Below or beyond which a caption is written again; None: whatever it is.

    words: least and most; tokens: most, of the writer's tokenizer (CLIP reads 75, in tokens about as long);
    unsupported: objects at most; the others in nats, to be exceeded.
    """

    words: tuple[int, int] = (4, 40)
    tokens: int = 70
    unsupported: int = 3
    gloss_pmi: float | None = 0.0
    sibling: float | None = 0.0
    isa: float | None = None


Captioned = tuple["Synset", str]  # a synset and a caption that is to show it


def check_captions(
    engine: Engine,
    captions: Sequence[Captioned],
    *,
    seed: int = 0,
    swaps: bool = True,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> list[Signals]:
    """Return every signal of each caption. The sibling that it is compared with is drawn by `seed`.

    Without `swaps` the signal `sibling` is left out, and half of the cost saved.
    """
    requests = _Requests(engine.tokenizer)
    asked = [_ask(requests, synset, caption, seed, swaps) for synset, caption in captions]
    scores = score_continuations(engine.target, requests.all, rows=ROWS, show=show)
    totals = [score.total for score in scores]

    def pmi(pair: tuple[int, int]) -> float:
        return totals[pair[0]] - totals[pair[1]]

    found = []
    for (synset, caption), one in zip(captions, asked, strict=True):
        own = pmi(one["own"])
        found.append(
            Signals(
                gloss_pmi=own,
                sibling=own - pmi(one["swapped"]) if "swapped" in one else None,
                isa=pmi(one["hypernym"]) - pmi(one["other"]) if "other" in one else None,
                unsupported=list_unsupported(caption, synset, find_span(caption, synset)),
                words=len(caption.split()),
                tokens=len(engine.tokenizer(caption, add_special_tokens=False).input_ids),
            )
        )
    return found


class _Requests:
    """Requests of texts, each distinct one asked once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.all: list[Request] = []
        self._known: dict[tuple[str, str], int] = {}

    def add(self, context: str, continuation: str) -> int:
        """Return the number of a request."""
        key = (context, continuation)
        if key not in self._known:
            self._known[key] = len(self.all)
            encoded = (self.tokenizer(text, add_special_tokens=False).input_ids for text in key)
            before, behind = encoded
            self.all.append((before, behind))
        return self._known[key]


def _ask(
    requests: _Requests, synset: "Synset", caption: str, seed: int, swaps: bool
) -> dict[str, tuple[int, int]]:
    def ask_caption(text: str) -> tuple[int, int]:
        with_gloss = requests.add(f"{_WITH_GLOSS}Meaning: {synset.definition()}\nCaption:", f" {text}\n")
        return with_gloss, requests.add(f"{_WITHOUT}Caption:", f" {text}\n")

    def ask_hypernym(name: str) -> tuple[int, int]:
        after = requests.add(f"Caption: {caption}\nThe picture shows a kind of", f" {name}.")
        return after, requests.add("The picture shows a kind of", f" {name}.")

    found = {"own": ask_caption(caption)}
    sibling, span = choose_sibling(synset, seed), find_span(caption, synset)
    if swaps and sibling is not None and span is not None:
        found["swapped"] = ask_caption(swap_concept(caption, span, sibling))
    hypernyms = synset.hypernyms()
    other = choose_sibling(hypernyms[0], seed) if hypernyms else None
    if other is not None:
        found["hypernym"] = ask_hypernym(name_synset(hypernyms[0]))
        found["other"] = ask_hypernym(name_synset(other))
    return found


_WITH_GLOSS = "".join(f"Meaning: {gloss}\nCaption: {caption}\n\n" for _, gloss, caption in DEMONSTRATIONS)
_WITHOUT = "".join(f"Caption: {caption}\n\n" for _, _, caption in DEMONSTRATIONS)


# -- how good are they ---------------------------------------------------------------------------------


def compare_signals(
    engine: Engine,
    captions: Sequence[Captioned],
    *,
    swap: str = "sibling",
    seed: int = 0,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Return how often each signal prefers a true caption to one about something else, with intervals.

    `swap` names what the concept's name is swapped for: a sibling of the synset, or a stranger, any other
    caption's synset. Ties count half. The signal `sibling` is left out: it is this comparison itself.
    Captions that do not name their synset, or whose synset has no sibling, are left out and counted.
    """
    pairs = []
    strangers = [synset for synset, _ in captions]
    random.Random(seed).shuffle(strangers)
    for (synset, caption), stranger in zip(captions, strangers, strict=True):
        other = choose_sibling(synset, seed) if swap == "sibling" else stranger
        span = find_span(caption, synset)
        if other is not None and other != synset and span is not None:
            pairs.append((synset, caption, swap_concept(caption, span, other)))
    both = [(synset, text) for synset, true, swapped in pairs for text in (true, swapped)]
    signals = check_captions(engine, both, seed=seed, swaps=False, show=show)
    readings: dict[str, Callable[[Signals], float | None]] = {
        "gloss_pmi": lambda found: found.gloss_pmi,
        "isa": lambda found: found.isa,
        "unsupported": lambda found: -len(found.unsupported),
    }
    found: dict[str, Any] = {"swap": swap, "pairs": len(pairs), "left_out": len(captions) - len(pairs)}
    for name, read in readings.items():
        wins = []
        for true, swapped in zip(signals[::2], signals[1::2], strict=True):
            a, b = read(true), read(swapped)
            if a is not None and b is not None:
                wins.append(0.5 if a == b else float(a > b))
        if wins:
            found[name] = describe_probability(np.array(wins)) | {"pairs": len(wins)}
    return found
