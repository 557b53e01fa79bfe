"""A language model as a classifier under a template: direct, channel and calibrated scores, demonstrations.

The published procedure (arXiv 2401.06766): a text is written with each label in turn, and the label whose
text is the least surprising wins. Three of its details differ here on purpose: a mean is over a text's own
tokens, not over those of the longest text in its batch; the two-argument softmax has its dimension; and a
calibrated distribution is made to sum to one, which no single prediction depends on.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2iprobe.errors import UserError, suggest
from t2iprobe.llm.labelled_data import Labelled, Pair
from t2iprobe.llm.scoring import Request
from t2iprobe.llm.templates import Template

__all__ = [
    "METHODS",
    "SELECTIONS",
    "Method",
    "average_probabilities",
    "calibrate",
    "check_labels",
    "choose_demonstrations",
    "find_method",
    "losses_to_probabilities",
    "make_encoder",
    "write_requests",
]

Floats = NDArray[np.float64]
#: Inputs without content, on which a model's liking for a label shows (Zhao et al. 2021).
CONTENT_FREE = ("N/A", "", "[MASK]")
#: Tokens of a whole text; demonstrations beyond lose their end, as published.
MOST_TOKENS = 1024


@dataclass(frozen=True)
class Method:
    """How a label is scored. `label_loss`: over the label's tokens alone, else over the whole text."""

    name: str
    label_loss: bool
    channel: bool = False
    calibrated: bool = False

    @property
    def published_name(self) -> str:
        """The name in the published tables."""
        return f"{self.name.removesuffix('-label')}_{self.label_loss}"


METHODS = {
    method.name: method
    for method in (
        Method("direct", False),
        Method("direct-label", True),
        Method("channel", True, channel=True),
        Method("calibrate", True, calibrated=True),
    )
}


def find_method(name: str) -> Method:
    """Return a method by name. Raises UserError for another."""
    if name not in METHODS:
        raise UserError(f"there is no method {name!r}{suggest(name, METHODS)}: choose {', '.join(METHODS)}")
    return METHODS[name]


# -- requests ------------------------------------------------------------------------------------------


def write_requests(
    tokenizer: Any,
    template: Template,
    method: Method,
    texts: Sequence[str],
    labels: Sequence[str],
    demonstrations: Sequence[Sequence[Pair]],
) -> list[Request]:
    """Return a request for each text with each label, labels innermost; `demonstrations` is one list a text.

    The parts of a template are tokenised apart, as published, with the model's first and last token (where
    its tokenizer has them) around the whole. Raises UserError where two labels become the same tokens.
    """
    encode = make_encoder(tokenizer)
    check_labels(encode, template, labels)
    first, last = _ends(tokenizer)
    separator = encode(template.separator)
    requests: list[Request] = []
    for text, shown in zip(texts, demonstrations, strict=True):
        context = [*first, *encode(template.context(shown, method.channel))]
        for label in labels:
            before, behind = (encode(part) for part in template.parts(text, label, method.channel))
            room = max(0, MOST_TOKENS - len(before) - len(separator) - len(behind) - len(last))
            head = [*context[:room], *before, *separator]
            if method.label_loss:
                requests.append((head, behind) if head else (behind[:1], behind[1:]))
            else:
                whole = [*head, *behind, *last]
                requests.append((whole[:1], whole[1:]))
    return requests


def make_encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """Return a function from a text to its tokens, without first and last ones, which remembers them."""
    known: dict[str, list[int]] = {}

    def encode(text: str) -> list[int]:
        if text not in known:
            known[text] = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return known[text]

    return encode


def _ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that a text begins and ends with."""
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    first, last = ([] if token is None else [token] for token in ends)
    return first, last


def check_labels(encode: Callable[[str], list[int]], template: Template, labels: Sequence[str]) -> None:
    """Raise UserError where two labels become the same tokens under a template, or one becomes none."""
    seen: dict[tuple[int, ...], str] = {}
    for label in labels:
        tokens = tuple(encode(template.parts("", label)[1]))
        if tokens in seen:
            raise UserError(
                f"the labels {seen[tokens]!r} and {label!r} become the same tokens: give one another name"
            )
        if not tokens:
            raise UserError(f"the label {label!r} becomes no token")
        seen[tokens] = label


# -- probabilities -------------------------------------------------------------------------------------


def losses_to_probabilities(losses: Any) -> Floats:
    """Return the softmax of −losses [..., labels], mean negative log-likelihoods in nats."""
    losses = np.asarray(losses, np.float64)
    shifted = np.exp(-(losses - losses.min(axis=-1, keepdims=True)))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def calibrate(probabilities: Floats, content_free: Floats) -> Floats:
    """Divide probabilities [N, labels] by their means over content-free inputs [M, labels].

    Each row is made to sum to one (Zhao et al. 2021, arXiv 2102.09690).
    """
    scaled = probabilities / content_free.mean(axis=0)
    return scaled / scaled.sum(axis=1, keepdims=True)


def average_probabilities(probabilities: Any, twice: bool = False) -> Floats:
    """Return the ensemble [N, labels] of templates' class probabilities [templates, N, labels]: their mean.

    `twice` sends each through softmax again before, as the published notebook does to what already sums to
    one; it flattens every template's vote.
    """
    probabilities = np.asarray(probabilities, np.float64)
    if twice:
        probabilities = losses_to_probabilities(-probabilities)
    return probabilities.mean(axis=0)


# -- demonstrations ------------------------------------------------------------------------------------


def choose_demonstrations(
    data: Labelled, texts: Sequence[str], selection: str, count: int, seed: int
) -> list[list[Pair]]:
    """Return `count` demonstrations for each text.

    `random` draws once for all, as published. `nearest` shows each text its nearest neighbours, with their
    labels drawn at random (pseudo-demonstrations in the manner of z-ICL, Lyu et al. 2023). `topic` shows the
    texts most typical of their label, a label after the other: it stands in for the trained topic tokens of
    Wang et al. 2023. Nearness is the cosine of tf-idf vectors. Raises UserError for another selection, or
    where there are too few texts.
    """
    if selection not in SELECTIONS:
        raise UserError(
            f"there is no selection of demonstrations {selection!r}{suggest(selection, SELECTIONS)}: "
            f"choose {', '.join(SELECTIONS)}"
        )
    if count > len(data.train):
        raise UserError(f"{data.name} has {len(data.train)} texts to demonstrate with, fewer than {count}")
    if count == 0:
        return [[] for _ in texts]
    return SELECTIONS[selection](data, texts, count, seed)


def _choose_random(data: Labelled, texts: Sequence[str], count: int, seed: int) -> list[list[Pair]]:
    places = random.Random(seed).sample(range(len(data.train)), count)
    return [[data.train[place] for place in places]] * len(texts)


def _choose_nearest(data: Labelled, texts: Sequence[str], count: int, seed: int) -> list[list[Pair]]:
    likeness = _likeness([text for text, _ in data.train], texts)
    chosen = []
    for number, row in enumerate(likeness):
        places = np.argsort(-row, kind="stable")[:count]
        draw = random.Random(f"{seed}/{number}")
        # The most alike stands last, nearest to the text itself.
        chosen.append([(data.train[place][0], draw.choice(data.labels)) for place in places[::-1]])
    return chosen


def _choose_typical(data: Labelled, texts: Sequence[str], count: int, seed: int) -> list[list[Pair]]:
    train = [text for text, _ in data.train]
    likeness = _likeness(train, train)
    ranked: dict[str, list[int]] = {}
    for label in data.labels:
        own = [place for place, (_, given) in enumerate(data.train) if given == label]
        if own:
            ranked[label] = sorted(own, key=lambda place: -float(likeness[place, own].sum()))
    turn = list(ranked)
    random.Random(seed).shuffle(turn)
    places = [
        ranked[label][rank]
        for rank in range(max(map(len, ranked.values())))
        for label in turn
        if rank < len(ranked[label])
    ]
    return [[data.train[place] for place in places[:count]]] * len(texts)


SELECTIONS: dict[str, Callable[[Labelled, Sequence[str], int, int], list[list[Pair]]]] = {
    "random": _choose_random,
    "nearest": _choose_nearest,
    "topic": _choose_typical,
}


def _likeness(train: Sequence[str], texts: Sequence[str]) -> Floats:
    """Return the cosines [texts, train] of tf-idf vectors over words of three letters or more."""
    counts = [Counter(word for word in text.lower().split() if len(word) > 2) for text in (*train, *texts)]
    found = Counter(word for each in counts[: len(train)] for word in each)
    column = {word: place for place, word in enumerate(found)}
    vectors = np.zeros((len(counts), len(column)), np.float32)
    for row, each in enumerate(counts):
        for word, times in each.items():
            if word in column:
                vectors[row, column[word]] = times * np.log(len(train) / found[word] + 1)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return (vectors[len(train) :] @ vectors[: len(train)].T).astype(np.float64)
