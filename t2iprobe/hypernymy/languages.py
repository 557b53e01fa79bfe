"""The same concepts, noise and judges, asked for in other languages: what is lost, synset by synset.

In a run prompts in other languages are templates of their own, ``base [fr]``, or ``base [fr 2]`` for the
second word of a synset. They come from tables (`t2iprobe.languages`) or, translated elsewhere, as data: JSON
lines with synset, language, prompt and the template's name. Every picture of a synset begins with the noise
that the English prompt's begins with, so that languages are compared pair by pair.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t2iprobe.errors import UserError
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.hypernymy.metrics import in_subtree_probabilities, scs_normaliser, subtree_coverage_score
from t2iprobe.hypernymy.report import find_hierarchy
from t2iprobe.intervals import describe_difference, describe_mean, holm
from t2iprobe.languages import check_language, write_prompt
from t2iprobe.lexicon import find_words
from t2iprobe.runs import Run
from t2iprobe.storage import read_lines, write_output

SCHEMA = "t2iprobe.languages/1"
ENGLISH = "en"
_KEY = re.compile(r"(?P<template>.*) \[(?P<language>[a-z]{2})(?: (?P<rank>\d+))?\]", re.DOTALL)

Prompts = dict[str, dict[str, str]]  # synset → template → prompt
Logits = Mapping[str, Mapping[str, np.ndarray]]  # template → synset → logits [N, C]


def name_template(template: str, language: str, rank: int = 1) -> str:
    """Return the name of a template in a language with a synset's first or further word."""
    return f"{template} [{language}]" if rank == 1 else f"{template} [{language} {rank}]"


def read_template(name: str) -> tuple[str, str, int]:
    """Return the template, the language and the word's rank that a name tells: English has none."""
    match = _KEY.fullmatch(name)
    if match is None:
        return name, ENGLISH, 1
    return match["template"], match["language"], int(match["rank"] or 1)


def add_languages(english: Mapping[str, Mapping[str, str]], languages: Sequence[str], lemmas: int) -> Prompts:
    """Add prompts by table, with up to `lemmas` words of each synset; a synset without a word has none.

    Raises UserError for a language or template that there is no table for, and where no synset has a word.
    """
    prompts = {name: dict(by_template) for name, by_template in english.items()}
    for language in languages:
        check_language(language)
        found = find_words(list(english), language)
        if not found:
            raise UserError(
                f"no synset of the run has a word in {language!r} here: pip install t2iprobe[languages], or "
                "give translated prompts by --prompts"
            )
        for name, words in found.items():
            for template in english[name]:
                for rank, word in enumerate(words[:lemmas], 1):
                    others = [each for each in words if each is not word]
                    prompt = write_prompt(template, [word, *others], language)
                    if prompt not in prompts[name].values():
                        prompts[name][name_template(template, language, rank)] = prompt
    return prompts


def read_languages(path: Path, languages: Sequence[str]) -> Prompts:
    """Read prompts that were translated elsewhere: the English ones (without a language) and `languages`'.

    A row has synset, prompt and language, and the template's name where there are several. Rows without a
    text, and rows whose checks say that they are not ok, are left out. Raises UserError for a bad line, and
    where a language has no prompt.
    """
    prompts: Prompts = {}
    try:
        lines = read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompts from {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            synset, prompt = row["synset"], row["prompt"]
            language, template = row.get("language", ENGLISH), row.get("template", "prompt")
            ok = row.get("checks", {}).get("ok", True)
            texts = all(isinstance(each, str) for each in (synset, prompt, language, template))
        except (ValueError, LookupError, TypeError, AttributeError):
            texts = False
        if not texts:
            raise UserError(
                f'line {number} of {path} must look like {{"synset": "dog.n.01", "language": "fr", '
                '"template": "base", "prompt": "un chien"}'
            )
        if language not in (ENGLISH, *languages) or not (ok and prompt):
            continue
        by_template = prompts.setdefault(synset, {})
        name = template if language == ENGLISH else name_template(template, language)
        by_template.setdefault(name, prompt)
        if isinstance(row.get("source"), str) and language != ENGLISH:
            by_template.setdefault(template, row["source"])
    for language in languages:
        if not any(read_template(name)[1] == language for each in prompts.values() for name in each):
            raise UserError(f"{path} has no prompt in {language!r} that is ok")
    # The English prompt first: whatever is compared is compared with it.
    return {
        name: dict(sorted(each.items(), key=lambda item: read_template(item[0])[1] != ENGLISH))
        for name, each in prompts.items()
    }


def compare_languages(logits: Logits, hierarchy: Hierarchy) -> dict[str, Any]:
    """Return ISP and SCS by language, the gap from English on the same synsets, and by synset.

    Gaps are paired: over synsets for the whole, over pictures of the same noise for one synset, where p is
    corrected for the number of synsets (Holm). Only the first template in each language counts; `words` has
    what a synset's further words change.
    """
    template = next(iter(logits))
    named = {read_template(name): by_synset for name, by_synset in logits.items()}
    columns = {(code, rank): each for (kind, code, rank), each in named.items() if kind == template}
    if (ENGLISH, 1) not in columns:
        raise UserError("the run has no English prompts to compare with")
    english = columns[ENGLISH, 1]
    languages = [language for language, rank in columns if rank == 1 and language != ENGLISH]
    normaliser = scs_normaliser(hierarchy)
    subtrees = dict(zip(sorted(english), hierarchy.subtrees_of(sorted(english)), strict=True))

    def score(by_synset: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
        isp = [in_subtree_probabilities(by_synset[name], subtrees[name]).mean() for name in names]
        scs = [subtree_coverage_score(by_synset[name], subtrees[name]) / normaliser for name in names]
        return {"isp": np.array(isp), "scs": np.array(scs)}

    found = []
    for language in languages:
        own = columns[language, 1]
        names = [name for name in sorted(own) if len(own[name]) == len(english[name])]
        ours, base = score(own, names), score(english, names)
        row: dict[str, Any] = {"language": language, "synsets": len(names), "of": len(english)}
        for metric in ("isp", "scs"):
            known = np.isfinite(ours[metric]) & np.isfinite(base[metric])
            if not known.any() or (metric == "scs" and len(own[names[0]]) < 2):
                continue
            row[metric] = describe_mean(ours[metric][known])
            row[f"{metric}_english"] = describe_mean(base[metric][known])
            row[f"{metric}_gap"] = describe_difference(base[metric][known], ours[metric][known])
        row["by_synset"] = _compare_synsets(own, english, names, subtrees)
        row["words"] = _compare_words(columns, language, subtrees)
        found.append(row)
    return {"schema": SCHEMA, "template": template, "languages": found}


def write_language_results(run: Run) -> dict[str, Any]:
    """Write ``languages.json`` into a run of several languages. Returns what is in it."""
    found = compare_languages(run.logits_by_template(), find_hierarchy(run))
    content = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False).encode()
    write_output(run.path / "languages.json", content)
    return found


def describe_languages(run: Run) -> list[str]:
    """Return lines for people: ISP and its gap from English by language."""
    lines = ["of which, by language:"]
    for row in json.loads((run.path / "languages.json").read_bytes())["languages"]:
        gap = row["isp_gap"]
        interval = "" if gap["interval"] is None else "  [{:+.4f}, {:+.4f}]".format(*gap["interval"])
        lines.append(
            f"{row['language']:24} {row['isp']['value']:.4f}  from English {gap['value']:+.4f}{interval}  "
            f"({row['synsets']} of {row['of']} synsets)"
        )
    return lines


def _compare_synsets(
    own: Mapping[str, np.ndarray],
    english: Mapping[str, np.ndarray],
    names: Sequence[str],
    subtrees: Mapping[str, np.ndarray],
) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        before, after = (in_subtree_probabilities(each[name], subtrees[name]) for each in (english, own))
        gap = describe_difference(before, after)
        row: dict[str, Any] = {"isp": float(after.mean()), "isp_english": float(before.mean())}
        rows.append({"synset": name, **row, "gap": gap})
    corrected = holm([row["gap"]["p"] for row in rows])
    for row, p in zip(rows, corrected, strict=True):
        row["gap"]["p_corrected"] = p
    return rows


def _compare_words(
    columns: Mapping[tuple[str, int], Mapping[str, np.ndarray]],
    language: str,
    subtrees: Mapping[str, np.ndarray],
) -> dict[str, Any] | None:
    """Return how ISP varies over the words of a synset, for the synsets that have more than one here.

    variance: of the words' mean ISPs, averaged over synsets. Pictures of one word vary, too, and that makes
    some of it: variance_of_pictures; what is left is that of words (which chance may make negative).
    """
    ranks = sorted(rank for code, rank in columns if code == language)
    spread, noise, count = [], [], 0
    for name, subtree in subtrees.items():
        values = [
            in_subtree_probabilities(columns[language, rank][name], subtree)
            for rank in ranks
            if name in columns[language, rank]
        ]
        if len(values) < 2:
            continue
        count += 1
        spread.append(np.var([each.mean() for each in values], ddof=1))
        if len(values[0]) > 1:
            noise.append(np.mean([each.var(ddof=1) / len(each) for each in values]))
    if not count:
        return None
    pictures = float(np.mean(noise)) if noise else None
    return {
        "synsets": count,
        "variance": float(np.mean(spread)),
        "variance_of_pictures": pictures,
        "variance_of_words": None if pictures is None else float(np.mean(spread)) - pictures,
    }
