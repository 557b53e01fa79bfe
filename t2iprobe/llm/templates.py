"""The grid of prompt templates for classification of "Mind Your Format" (arXiv 2401.06766), and one of ours.

A template is an input verbaliser, a separator, an output verbaliser and a separator between demonstrations.
This module holds words only; `classification.py` scores them.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from t2iprobe.errors import UserError, suggest

__all__ = ["GRIDS", "Template", "find_grid", "list_templates", "random_templates"]

INPUTS = ("input: {}", "text: {}", "sentence: {}", "{}")
OUTPUTS = ("output: {}", "target: {}", "label: {}", "{}")
SENTIMENTS = ("emotion: {}", "sentiment: {}", "A {} one.", "It was {}.", "All in all {}.", "A {} piece.")
TOPICS = ("Topic: {}.", "Subject: {}.", "This is about {}.", "It is about {}.")
SEPARATORS = (" ", "\n")
BIG_SEPARATORS = (" ", "\n", "\n\n")
# name → (input verbalisers, output verbalisers). The published order: random draws depend on it.
GRIDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "sentiment": (INPUTS, (*OUTPUTS, *SENTIMENTS)),
    "topic": (INPUTS, (*OUTPUTS, *TOPICS)),
    # Ours, for a gloss and its class, in a dictionary's words.
    "gloss": (
        ("definition: {}", "gloss: {}", "meaning: {}", "{}"),
        ("{}", "class: {}", "category: {}", "Kind: {}.", "It is {}.", "This defines {}."),
    ),
}
_GRID_OF = {
    **{"sst2": "sentiment", "vader": "sentiment"},
    **dict.fromkeys(("agnews", "dbpedia", "trec", "bbc", "wordnet"), "topic"),
}


@dataclass(frozen=True)
class Template:
    """How an input and a label are written; `big_separator` stands between demonstrations, if there are any.

    `parts` returns what is scored: with `channel` the label stands first and the input is predicted.
    """

    input: str
    output: str
    separator: str
    big_separator: str = ""

    def __post_init__(self) -> None:
        for name, text in (("input", self.input), ("output", self.output)):
            if "{}" not in text:
                raise UserError(f"the {name} of a template needs {{}} where its text goes: {text!r}")

    def parts(self, text: str, label: str, channel: bool = False) -> tuple[str, str]:
        """Return what stands before the separator and what behind it."""
        # Not str.format: a text may hold braces.
        both = self.input.replace("{}", text), self.output.replace("{}", label)
        return (both[1], both[0]) if channel else both

    def context(self, demonstrations: Sequence[tuple[str, str]], channel: bool = False) -> str:
        """Return the demonstrations (text, label), each with the big separator behind it."""
        written = (self.separator.join(self.parts(*each, channel)) for each in demonstrations)
        return "".join(f"{each}{self.big_separator}" for each in written)

    def __str__(self) -> str:
        return "".join([self.input, self.separator, self.output, self.big_separator])


def find_grid(dataset: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the input and output verbalisers for a data set's name, or a grid's own name.

    Raises UserError for a name that is neither.
    """
    name = _GRID_OF.get(dataset, dataset)
    if name not in GRIDS:
        known = (*_GRID_OF, *GRIDS)
        raise UserError(
            f"there is no grid of templates for {dataset!r}{suggest(dataset, known)}: give {', '.join(known)}"
        )
    return GRIDS[name]


def list_templates(dataset: str, demonstrated: bool = True) -> list[Template]:
    """Return the whole grid: 240 templates for sentiments, 192 for topics; a third without demonstrations."""
    inputs, outputs = find_grid(dataset)
    big = BIG_SEPARATORS if demonstrated else ("",)
    return [Template(*parts) for parts in product(inputs, outputs, SEPARATORS, big)]


def random_templates(dataset: str, count: int, seed: int, demonstrated: bool = True) -> list[Template]:
    """Draw templates with replacement, as published: the same for the same name, count and seed.

    Args:
        dataset: sst2, agnews, dbpedia, trec, vader, bbc, wordnet, or a grid's name.
        count: how many.
        seed: of the draws; the published ones are 13, 21 and 59.
        demonstrated: without demonstrations there is no big separator to draw.
    """
    if count < 1:
        raise UserError(f"draw 1 template or more, not {count}")
    inputs, outputs = find_grid(dataset)
    draw = random.Random(seed)
    return [
        Template(
            draw.choice(inputs),
            draw.choice(outputs),
            draw.choice(SEPARATORS),
            draw.choice(BIG_SEPARATORS) if demonstrated else "",
        )
        for _ in range(count)
    ]
