"""What the target is asked to write: prompt-writing tasks about WordNet's nouns, and some of everything else.

A prompt is made of a wording and of words (noun synsets). One wording in six and one word in ten are held
out, chosen by their hashes: no training prompt uses either, and evaluation prompts use nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

from t2iprobe import wordnet

Messages = list[dict[str, str]]

CONCRETE = ("animal", "artifact", "food", "plant", "object", "person", "body", "phenomenon", "substance")
STYLES = (
    *(
        "oil painting",
        "watercolour",
        "pencil sketch",
        "35 mm photo",
        "studio photo",
        "pixel art",
        "film still",
    ),
    *(
        "children's book illustration",
        "3D render",
        "woodcut",
        "macro photo",
        "comic panel",
        "poster",
        "fresco",
    ),
    *(
        "ukiyo-e print",
        "black and white photo",
        "isometric drawing",
        "mosaic",
        "aerial photo",
        "stained glass",
    ),
)
MOODS = (
    *(
        "at dawn",
        "in heavy rain",
        "under neon light",
        "in soft window light",
        "in deep snow",
        "at night",
        "in fog",
    ),
    *(
        "on a white background",
        "in a crowded market",
        "on a wooden table",
        "in a desert",
        "in a quiet street",
    ),
    *(
        "by the sea",
        "in a museum",
        "in warm evening light",
        "in a forest",
        "seen from above",
        "seen from far away",
    ),
)
NUMBERS = ("two", "three", "four", "five", "six")
SYSTEMS = (
    "You write prompts for a text-to-image model.",
    "You are an assistant for an image generation tool. Answer with prompts only.",
    "You are a photographer who describes pictures precisely.",
)
# Every wording is a product of its parts, so that close ones stand on both sides of the hold-out.
WORDINGS: dict[str, tuple[tuple[str, ...], ...]] = {
    "caption": (
        ("Write", "Give me", "Please write", "I need", "Compose", "Suggest"),
        (" one short caption of", " a caption for", " one sentence that describes", " a short alt text for"),
        (" a photo of", " a picture of", " an image of", " a painting of"),
        (" a {word} ({gloss}).", " a {word}.", " the {word} ({gloss}) {mood}.", " a {word} {mood}."),
    ),
    "prompts": (
        ("Write", "Give me", "Please write", "I need", "Create", "Come up with"),
        (" {number} different", " {number}", " {number} short", " {number} detailed"),
        (" prompts for a text-to-image model", " image generation prompts", " prompts for Stable Diffusion"),
        (
            " about a {word} ({gloss}).",
            " that show a {word}.",
            " of a {word}, one a line.",
            " with a {word} {mood}.",
        ),
    ),
    "detailed": (
        ("Write", "Give me", "Please write", "Create", "Compose"),
        (" a detailed prompt", " one long prompt", " a vivid prompt", " the best possible prompt"),
        (" for a text-to-image model", " for an image generator", " for Stable Diffusion", ""),
        (
            " that shows a {word} ({gloss}).",
            " of a {word} as {style}.",
            " of a {word} {mood}.",
            " about a {word}.",
        ),
    ),
    "rewrite": (
        ("Rewrite", "Improve", "Vary", "Rephrase", "Make more specific"),
        (" this prompt", " the following image prompt", " this text-to-image prompt", " this caption"),
        (" and keep its subject", "", " with more detail", " in other words"),
        (
            ': "a {word} {mood}"',
            ': "{style} of a {word}"',
            ": a photo of a {word}",
            ": {word}, {style}, {mood}",
        ),
    ),
    "list": (
        (
            "Continue this list",
            "Here are some examples; write the next ones",
            "I need more like these",
            "Go on",
        ),
        (" for a text-to-image model:", " of image prompts:", " (one prompt a line):", " of captions:"),
        (
            "\n1. {style} of a {other}\n2. {style2} of a {other2}, {mood}\n3. A {word}",
            "\n- a {other} {mood}\n- a {other2} as {style}\n- a {word}",
            "\na photo of a {other} {mood}\na photo of a {other2}\na photo of a {word}",
        ),
    ),
    "scene": (
        ("Describe", "Please describe", "Imagine and describe", "Paint with words"),
        (" a scene", " a picture", " an image", " a photograph", " a film scene"),
        (" with a {word} and a {other}", " in which a {word} appears {mood}", " of a {word} ({gloss})"),
        (".", " in two sentences.", " in a few words.", " for an artist who will draw it."),
    ),
    "style": (
        ("Describe", "Write a prompt for", "Write the caption of", "Tell a text-to-image model to draw"),
        (" a {word}", " a {word} ({gloss})", " a {word} and a {other}"),
        (
            " in the style of a {style}.",
            " as a {style}.",
            " as a {style}, {mood}.",
            ", first as a {style}, then as a {style2}.",
        ),
    ),
    "details": (
        ("What", "Which"),
        (" details", " colours and materials", " backgrounds", " lighting and camera angles"),
        (
            " belong in a prompt for",
            " would make a good picture of",
            " should an image of",
            " should a prompt mention for",
        ),
        (" a {word} ({gloss})?", " a {word}?", " a {word} {mood}?"),
    ),
    "general": (
        ("What is", "Explain in simple words what", "Write a short story about", "List {number} facts about"),
        (" a {word}", " the {word} ({gloss})", " a {word} and a {other}"),
        (".", "?", " Be brief.", " Explain it to a child."),
    ),
    "task": (
        (
            "Write an email about",
            "Write a poem about",
            "Write a Python function for",
            "Summarise what you know of",
        ),
        (" a {word}", " a {word} and a {other}", " buying a {word}", " the history of the {word}"),
        (".", " in {number} sentences.", " and explain it."),
    ),
    "plain": (
        (
            "The {word} is {gloss}.",
            "{word}: {gloss}. It",
            "A {word} and a {other}",
            "Once there was a {word}",
        ),
        (" In the picture,", " The", " For example,", " {mood},"),
    ),
}
PROMPT_WRITING = tuple(WORDINGS)[:8]
SHARES = dict.fromkeys(PROMPT_WRITING, 11) | {"general": 6, "task": 3, "plain": 3}


@dataclass(frozen=True)
class Word:
    """A noun as it stands in prompts, and the first clause of its gloss."""

    lemma: str
    gloss: str


def is_held_out(text: str, one_in: int) -> bool:
    """Whether `text` belongs to the fixed share of about 1 / `one_in` that only evaluation sees."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % one_in == 0


@cache
def _nouns() -> dict[str, tuple[Word, bool]]:
    found = {}
    for synset in wordnet.reader().all_synsets("n"):
        first = synset.lemmas()[0]
        lemma = first.name().replace("_", " ")
        if lemma.islower() and synset.lexname().removeprefix("noun.") in CONCRETE:
            found.setdefault(
                lemma, (Word(lemma, synset.definition().split(";")[0].strip()), first.count() > 0)
            )
    return found


@cache
def words(held_out: bool, common: bool) -> tuple[Word, ...]:
    """First lemmas of WordNet's concrete nouns (no names) on one side of the hold-out, in alphabetical order.

    common: only those that WordNet's own count of tagged texts has met.
    """
    return tuple(
        word
        for lemma, (word, counted) in sorted(_nouns().items())
        if is_held_out(lemma, 10) == held_out and (counted or not common)
    )


@cache
def wordings(task: str, held_out: bool) -> tuple[str, ...]:
    """The wordings of `task` on one side of the hold-out."""
    joined = ("".join(parts) for parts in product(*WORDINGS[task]))
    return tuple(wording for wording in joined if is_held_out(wording, 6) == held_out)


def make_prompt(task: str, rng: random.Random, held_out: bool, plain_system: bool = False) -> str | Messages:
    """A prompt of `task`: chat messages, or for the task ``plain`` the text to be continued."""
    word, other, other2 = rng.sample(words(held_out, common=rng.random() < 0.5), 3)
    styles = rng.sample(STYLES, 2)
    text = rng.choice(wordings(task, held_out)).format(
        word=word.lemma,
        gloss=word.gloss,
        other=other.lemma,
        other2=other2.lemma,
        style=styles[0],
        style2=styles[1],
        mood=rng.choice(MOODS),
        number=rng.choice(NUMBERS),
    )
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    if task == "plain":
        return text
    messages = [{"role": "user", "content": text}]
    if not plain_system and rng.random() < 0.15:
        messages.insert(0, {"role": "system", "content": rng.choice(SYSTEMS)})
    return messages


def training_prompts(count: int, seed: int = 0) -> list[tuple[str, str | Messages]]:
    """`count` training prompts with their tasks, by SHARES; prompt i depends on i and the seed alone."""
    made = []
    for index in range(count):
        rng = random.Random(f"{seed}:{index}")
        task = rng.choices(tuple(SHARES), tuple(SHARES.values()))[0]
        made.append((task, make_prompt(task, rng, held_out=False)))
    return made


def held_out_prompts(per_task: int, seed: int = 0) -> list[tuple[str, str | Messages]]:
    """Evaluation prompts of held-out words in held-out wordings, `per_task` of each task."""
    return [
        (task, make_prompt(task, random.Random(f"held out {seed}:{task}:{index}"), True, plain_system=True))
        for task in WORDINGS
        for index in range(per_task)
    ]


def encoder(tokenizer) -> Callable[[str | Messages], list[int]]:
    """The function from a prompt to token ids: chat messages go through the chat template."""

    def encode(prompt: str | Messages) -> list[int]:
        if isinstance(prompt, str):
            return tokenizer(prompt)["input_ids"]
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return encode


def main() -> None:
    """Write the evaluation prompts as rows of ``task`` and ``messages`` or ``prompt``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--per-task", type=int, default=7)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[2] / "benchmarks" / "prompts.jsonl"
    )
    given = parser.parse_args()
    rows = [
        {"task": task, "prompt" if isinstance(prompt, str) else "messages": prompt}
        for task, prompt in held_out_prompts(given.per_task)
    ]
    given.out.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
