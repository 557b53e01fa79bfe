"""The report page of a teaching: words × methods, probed before and after, from its results.json."""

import shlex
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from t2iprobe import __version__
from t2iprobe.intervals import describe_difference, describe_mean
from t2iprobe.inversion.training_page import list_changes, load_pictures, name_method, name_model
from t2iprobe.pages import SCALE, charts, flatten, name_classifier, render_page

Results = Mapping[str, Any]  # what results.json holds (see pages/teaching.schema.json)
Row = Mapping[str, Any]  # one word taught by one method

SECTIONS = (
    ("overview", "In short"),
    ("words", "Word by word"),
    ("numbers", "All numbers"),
    ("others", "Other words"),
    ("settings", "How to repeat it"),
    ("definitions", "What it means"),
)
#: The method that trains a vocabulary row and nothing else.
ROW_ALONE = "textual-inversion"
MOST_PICTURES = 4
#: Settings of the training that the run, the method or the teaching itself gives.
GIVEN = ("model", "variant", "method", "steps", "guidance", "size", "device", "dtype", "grid", "evaluate")


def render(results: Results, folder: Path) -> str:
    """Return the report of a teaching in `folder` as one HTML text."""
    words = group_words(results)
    others = [{"name": name_method(m), **row} for m, row in (results["others"] or {}).items() if row]
    highest = max(max([row["after"]["value"], *(row["after"]["interval"] or [])]) for row in results["words"])
    return render_page(
        "teaching_report.html",
        version=__version__,
        title=f"Words taught to {name_model(results['model'])}",
        sections=[pair for pair in SECTIONS if pair[0] != "others" or others],
        results=results,
        model=name_model(results["model"]),
        classifier=name_classifier(results["classifier"]),
        words=[{**word, **load_word_pictures(word, folder)} for word in words],
        methods=[summarise_method(results, method) for method in results["methods"]],
        findings=write_findings(results),
        ticks=charts.choose_ticks(highest),
        others=others,
        names={method: name_method(method) for method in results["methods"]},
        command=write_command(results),
        settings=flatten({key: value for key, value in results["settings"].items() if key != "method"}),
        versions=flatten(results.get("versions", {})),
        created=results.get("created"),
        data={"scale": SCALE, "runs": [], "synsets": {}},
        strips=[],
    )


def group_words(results: Results) -> list[dict[str, Any]]:
    """Return the words in order: {word, synset, before, rows}, rows by method."""
    grouped: dict[str, list[Row]] = {}
    for row in results["words"]:
        grouped.setdefault(row["synset"], []).append(row)
    return [
        {"word": rows[0]["word"], "synset": synset, "before": rows[0]["before"], "rows": rows}
        for synset, rows in grouped.items()
    ]


def summarise_method(results: Results, method: str) -> dict[str, Any]:
    """Return what a method did over all its words: how many rose, mean ISP with errors over words, cost."""
    rows = [row for row in results["words"] if row["method"] == method]
    before, after = ([row[side]["value"] for row in rows] for side in ("before", "after"))
    return {
        "method": method,
        "name": name_method(method),
        "risen": sum(row["significant"] for row in rows),
        "of": len(rows),
        "before": describe_mean(before),
        "after": describe_mean(after),
        "difference": describe_difference(before, after),
        "seconds": sum(row["seconds"] for row in rows) / len(rows),
        "steps": sum(row["steps"] for row in rows) / len(rows),
        "changes": [
            {
                "name": row["word"],
                "before": row["before"]["value"],
                "after": row["after"]["value"],
                "interval": row["after"]["interval"],
                "significant": row["significant"],
            }
            for row in sorted(rows, key=lambda row: -row["after"]["value"])
        ],
    }


def write_findings(results: Results) -> list[str]:
    """Return in plain sentences what the methods could and could not teach."""
    risen: dict[str, set[str]] = {method: set() for method in results["methods"]}
    for row in results["words"]:
        if row["significant"]:
            risen[row["method"]].add(row["word"])
    words = list(dict.fromkeys(row["word"] for row in results["words"]))
    findings = []
    failed = [word for word in words if word not in risen.get(ROW_ALONE, words)]
    adapters = {method: [word for word in failed if word in risen[method]] for method in results["methods"]}
    told = [
        f"{name_method(method)} taught {'all' if taught == failed else join_words(taught)}"
        for method, taught in adapters.items()
        if taught
    ]
    if told:
        findings.append(
            "A row alone can only combine what the model already draws: it could not teach "
            f"{join_words(failed)}. Of these, by training weights of the denoiser too, {join_words(told)}."
        )
    elif ROW_ALONE in risen and not failed:
        findings.append("A row alone was enough for every word: what they show was in the model already.")
    never = [word for word in words if not any(word in taught for taught in risen.values())]
    if never:
        findings.append(f"No method taught {join_words(never)} so that the classifier could tell.")
    return findings


def join_words(words: Sequence[str], most: int = 6) -> str:
    """Return words as a list within a sentence, a long one cut short."""
    if len(words) > most:
        return f"{', '.join(words[: most - 1])} and {len(words) - most + 1} others"
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def load_word_pictures(word: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a word's pictures as data URIs: {concept, drawn: [{row, pictures}]}, before first (row None)."""
    first = word["rows"][0]
    sides = [(None, first["pictures_before"]), *((row, row["pictures_after"]) for row in word["rows"])]
    return {
        "concept": load_pictures(first["concept_pictures"][:MOST_PICTURES], folder),
        "drawn": [
            {"row": row, "pictures": load_pictures(files[:MOST_PICTURES], folder)} for row, files in sides
        ],
    }


def write_command(results: Results) -> str:
    """Return the command that repeats the teaching."""
    synsets = list(dict.fromkeys(row["synset"] for row in results["words"]))
    parts = ["t2iprobe", "inversion", "teach", results["run"], *synsets]
    folder = Path(results["words"][0]["concept_pictures"][0]).parent
    if not folder.resolve().is_relative_to(Path(str(files("t2iprobe"))).resolve()):
        parts += ["--pictures", str(folder.parent if len(synsets) > 1 else folder)]
    parts += [part for method in results["methods"] for part in ("--method", method)]
    own = {key: value for key, value in results["settings"].items() if key not in GIVEN}
    changes = list_changes(own, results["model"])
    return shlex.join([*parts, "--samples", str(results["samples"]), *changes, "--out", "OUT"])
