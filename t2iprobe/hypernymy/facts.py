"""What the pages say of a run as a whole: its measures, its settings, how to repeat it. No HTML here."""

import json
import shlex
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from t2iprobe.hypernymy.views import correlate_ranks
from t2iprobe.pages import flatten, name_classifier, write_value

Results = Mapping[str, Any]

MEASURES = {
    "isp": "In-subtree probability (ISP)",
    "scs": "Subtree coverage score (SCS)",
    "scs_corrected": "SCS, corrected for few pictures (jackknife)",
    "scs_mean_of_ratios": "SCS, mean of ratios",
    "scs_isp_weighted": "SCS, weighted by ISP",
    "subtree_entropy": "Subtree entropy within a picture (nats)",
    "marginal_entropy": "Marginal subtree entropy (nats)",
}
NAMES = {"nonleaf": "synsets above the classes", "leaves": "classes"}
#: What a run does not use that judges pictures made elsewhere.
DRAWING = (
    "model", "variant", "synsets", "samples", "seed", "templates", "prompts", "steps", "guidance", "size",
    "scheduler", "dtype", "common_seeds", "mean_conditioning",
)  # fmt: skip
#: arXiv 2310.09247, ViT-B/16: (model, ISP, SCS at N = 32).
PUBLISHED = (
    ("unCLIP", 0.35, 0.19),
    ("Stable Diffusion 1.4", 0.33, 0.26),
    ("Stable Diffusion 2.0", 0.30, 0.23),
    ("GLIDE", 0.22, 0.20),
    ("LDM", 0.22, 0.18),
)


def complete(results: Results) -> dict[str, Any]:
    """Return results with every part that a page shows: results of a bare logits file lack the settings.

    Classifiers get the names that people know them by.
    """
    source = results.get("source", "classifier")
    classifiers = results.get("classifiers") or {source: results}
    missing: dict[str, Any] = {"configuration": {}, "identity": {}, "versions": {}, "created": None}
    return {
        **missing,
        **results,
        "classifiers": {name_classifier(name): value for name, value in classifiers.items()},
    }


def name_scheduler(scheduler: Any) -> str:
    """Return the class of a scheduler, given by name or by its configuration."""
    return write_value(scheduler.get("_class_name") if isinstance(scheduler, Mapping) else scheduler)


def name_model(results: Results) -> str:
    """Return the name that stands in the title."""
    configuration = results["configuration"]
    if folder := configuration.get("folder"):
        return f"Pictures in {PurePath(folder).name}/"
    model = configuration.get("model") or results.get("source") or "Unnamed model"
    return "Embedded model" if model == "embedded" else str(model)


def count_samples(results: Results) -> str:
    """Return N as text: ``4``, or ``3–4`` where synsets differ."""
    low, high = results["coverage"]["samples_min"], results["coverage"]["samples_max"]
    return str(low) if low == high else f"{low}–{high}"


def list_measures(results: Results) -> list[dict[str, Any]]:
    """Return every overall measure: {label, value, stderr, interval, interval_synsets, uniform}."""
    measures = [
        {"label": label, "uniform": results["uniform"][key], **results["results"][key]}
        for key, label in MEASURES.items()
    ]
    if leaves := results["results_leaves"]:
        measures.append({"label": "ISP of the class words (leaves)", "uniform": None, **leaves["isp"]})
    return measures


def list_warnings(results: Results) -> list[str]:
    """Return what a reader must know before trusting the numbers."""
    coverage = results["coverage"]
    warnings = [f"{text[0].upper()}{text[1:]}." for text in results["warnings"]]
    if coverage["synsets"] < coverage["of"]:
        warnings.insert(
            0,
            f"Only {coverage['synsets']} of the {coverage['of']} {NAMES[coverage['evaluated']]} were probed: "
            "the headline is the mean over these, and compares with no full probe.",
        )
    return warnings


def list_differences(results: Results) -> list[str]:
    """Return how a run differs from the published protocol; empty where its numbers may stand beside them."""
    coverage, identity = results["coverage"], results["identity"]
    differences = []
    if (coverage["synsets"], coverage["of"]) != (860, 860):
        differences.append(f"{coverage['synsets']} synsets rather than 860")
    if (coverage["samples_min"], coverage["samples_max"]) != (32, 32):
        differences.append(f"{count_samples(results)} pictures a synset rather than 32")
    for key, wanted in (("guidance", 7.5), ("steps", 50)):
        if identity.get(key) != wanted:
            found = "unknown" if identity.get(key) is None else identity[key]
            differences.append(f"{key} {found} rather than {wanted}")
    if (templates := list(identity.get("templates") or [])) != ["base"]:
        differences.append(f"template {', '.join(templates) or 'unknown'} rather than base")
    return differences


def compare_published(results: Results) -> list[dict[str, Any]]:
    """Return the published models and this run, by falling ISP; empty where they do not compare."""
    if list_differences(results):
        return []
    rows = [{"model": model, "isp": isp, "scs": scs, "ours": False} for model, isp, scs in PUBLISHED]
    values = results["results"]
    ours = {"model": name_model(results), "isp": values["isp"]["value"], "scs": values["scs"]["value"]}
    return sorted([*rows, {**ours, "ours": True}], key=lambda row: -row["isp"])


def list_classifiers(results: Results) -> list[dict[str, Any]]:
    """Return one entry a classifier, with its rank correlation with the first."""
    analyses = list(results["classifiers"].items())
    first = analyses[0][1]["synsets"]
    return [
        {
            "name": name,
            "isp": analysis["results"]["isp"],
            "scs": analysis["results"]["scs"],
            "known": sum(row["known"] for row in analysis["synsets"]),
            "synsets": len(analysis["synsets"]),
            "correlation": correlate_ranks(first, analysis["synsets"]) if index else 1.0,
        }
        for index, (name, analysis) in enumerate(analyses)
    ]


def list_settings(results: Results) -> list[tuple[str, str]]:
    """Return the settings that the run used, as (name, text) pairs."""
    configuration = results["configuration"]
    unused = DRAWING if "folder" in configuration else ()
    return flatten({key: value for key, value in configuration.items() if key not in unused})


def write_command(results: Results) -> str:
    """Return the command that repeats the run: what differs from the default settings of its model."""
    from t2iprobe.config import dump_study, load_study

    configuration = dict(results["configuration"])
    if not configuration:
        return (
            f"t2iprobe hypernymy score {shlex.quote(results.get('source', 'LOGITS.npz'))} --out results.json"
        )
    folder = configuration.pop("folder", None)
    parts = ["t2iprobe", "hypernymy", *(["pictures", folder] if folder else ["run"])]
    defaults = dump_study(load_study(None, {"model": configuration["model"]}))
    for key, value in configuration.items():
        if folder and key in DRAWING:
            continue
        if key == "classifiers" and value != defaults[key]:
            parts += [part for name in value for part in ("--classifier", name)]
        elif key == "until" and value:
            parts += ["--until", value]
        elif key in ("model", "synsets", "samples", "seed") and not folder:
            parts += [f"--{key}", str(value)]
        elif value != defaults[key]:
            parts += ["--set", f"{key}={json.dumps(value, ensure_ascii=False)}"]
    return shlex.join([*parts, "--out", "RUN"])


def describe_seeding(results: Results) -> str:
    """Return how the pictures got their seeds."""
    seed = results["identity"].get("seed")
    if seed is None:
        return "The pictures were made elsewhere: this run only judged them."
    template = "" if results["identity"].get("common_seeds") else "the template "
    return (
        f"Each picture has its own seed: a hash of the run's seed ({seed}), the synset, {template}and the "
        "index of the picture. It is the same picture whatever the batch size, the order, the number of "
        "processes or an interruption."
    )


def describe_test(results: Results) -> str:
    """Return how a word was found to be known or unknown, with how often each test was used."""
    test = results["unknown_test"]
    text = test["text"]
    if "bets" in test:
        return (
            f"{text[0].upper()}{text[1:]}. Here: {test['bets']} by bets, {test['not_testable']} not testable "
            "(every class lies below it)."
        )
    return (
        f"{text[0].upper()}{text[1:]}. Here: {test['rank']} by rank, {test['t']} by t-test, "
        f"{test['not_testable']} not testable (every class lies below it)."
    )
