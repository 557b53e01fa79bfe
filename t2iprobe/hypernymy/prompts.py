"""A synset as a prompt: the six published templates, templates of one's own, or prompts written elsewhere."""

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from t2iprobe.errors import UserError, suggest
from t2iprobe.storage import is_utf8, read_lines
from t2iprobe.wordnet import choose_article

if TYPE_CHECKING:
    from nltk.corpus.reader.wordnet import Synset

# The published six (arXiv 2310.09247, appendix). photo, painting and empty say "a" before a vowel too: kept,
# for comparison with the published numbers. The published article went by the first letter ("an uniform",
# "an utensil"); ours goes by the sound.
TEMPLATES = {
    "base": "An image of {article} {lemma}.",
    "all_lemmas": "An image of {article} {lemma} ({other_lemmas}).",
    "definition": "An image of {article} {lemma} ({gloss}).",
    "photo": "a photo of a {lemma}.",
    "painting": "a painting of a {lemma}.",
    "empty": "a {lemma}.",
}

# Not a template: the mean of the embeddings of a synset's prompts, which stand in it a line each.
MEAN = "mean"

FIELDS: dict[str, Callable[["Synset"], str]] = {
    "lemma": lambda synset: _lemmas(synset)[0],
    "lemmas": lambda synset: ", ".join(_lemmas(synset)),
    "other_lemmas": lambda synset: ", ".join(_lemmas(synset)[1:]),
    "gloss": lambda synset: synset.definition(),
    "article": lambda synset: choose_article(_lemmas(synset)[0]),
}


def find_template(template: str) -> str:
    """Return the text of a published template by name, or `template` itself if it is one with fields.

    Raises UserError for an unknown name or field, and for unbalanced braces.
    """
    name = template.removesuffix("_prompt")
    if name in TEMPLATES:
        return TEMPLATES[name]
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
        if set(fields) <= FIELDS.keys():
            template.format(**dict.fromkeys(FIELDS, "word"))
    except (ValueError, KeyError) as error:
        raise UserError(f"the template {template!r} is not well formed: {error}") from error
    if not fields:
        raise UserError(
            f"no template {template!r}{suggest(name, TEMPLATES)}; "
            f"give {', '.join(TEMPLATES)} or a text with {{lemma}}"
        )
    for field in fields:
        if field not in FIELDS:
            known = ", ".join(f"{{{field}}}" for field in FIELDS)
            raise UserError(f"the template {template!r} has an unknown field {{{field}}}; there are {known}")
    return template


def render(template: str, synset: "Synset") -> str:
    """Write the prompt of a synset by a published template's name or by a template with fields.

    Fields: {lemma} the first lemma, {lemmas} all of them, {other_lemmas} all but the first (without any, the
    published all_lemmas is the base prompt), {gloss} the definition, {article} a or an before {lemma}.
    """
    text = find_template(template)
    if text == TEMPLATES["all_lemmas"] and len(_lemmas(synset)) == 1:
        text = TEMPLATES["base"]
    values = {name: field(synset) for name, field in FIELDS.items() if f"{{{name}" in text}
    return text.format(**values)


def read_prompts(path: str | Path) -> dict[str, list[str]]:
    """Read prompts written elsewhere: JSON lines with `synset` and `prompt` (or `prompts`, a list).

    Returns synset name → its prompts, in the order of the file. Raises UserError naming a bad line.
    """
    try:
        lines = read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompts from {path}: {error}") from error
    prompts: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            synset, texts = _read_line(line, f"line {number} of {path}")
            prompts.setdefault(synset, []).extend(texts)
    if not prompts:
        raise UserError(f"there is no prompt in {path}")
    return prompts


def _read_line(line: str, where: str) -> tuple[str, list[str]]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    if isinstance(row, dict):
        synset, texts = row.get("synset"), row.get("prompts", [row.get("prompt")])
        if isinstance(synset, str) and isinstance(texts, list) and texts:
            if all(isinstance(text, str) and text for text in texts):
                if not is_utf8(texts):
                    raise UserError(f"{where}: half of a surrogate pair is no character, leave it out")
                return synset, texts
    raise UserError(f'{where} must look like {{"synset": "dog.n.01", "prompt": "a dog in the snow"}}')


def _lemmas(synset: "Synset") -> list[str]:
    return [lemma.lower().replace("_", " ") for lemma in synset.lemma_names()]
