"""Run(s) → files: report.html, results.json, results.csv, leaderboard.md; each is whole or absent."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t2iprobe.config import Study
from t2iprobe.errors import UserError
from t2iprobe.hypernymy import adaptive, adaptive_results, facts
from t2iprobe.hypernymy.agreement import agree_on_synsets
from t2iprobe.hypernymy.comparison_page import Side, render_comparison
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.hypernymy.report_page import render
from t2iprobe.hypernymy.statistics import analyse, compare
from t2iprobe.hypernymy.study import load_hierarchy
from t2iprobe.pages import format_interval, format_score
from t2iprobe.runs import PlanEntry, Run
from t2iprobe.storage import write_output

__all__ = ["gather_results", "render", "render_comparison", "write_comparison", "write_report"]

SCHEMA = "t2iprobe.results/1"
COMPARISON_SCHEMA = "t2iprobe.comparison/1"
SETTINGS = (
    "configuration",
    "identity",
    "versions",
    "created",
)  # parts of a manifest that go into the results
SETTING_COLUMNS = ("steps", "guidance", "size", "dtype", "templates", "seed")


def write_report(run: Run) -> Path:
    """Write report.html, results.csv, leaderboard.md and results.json into the run directory.

    Returns the path of the page. Raises UserError where the run holds no picture yet, or a kept one is
    damaged. results.json comes last: where it is, the others are.
    """
    results = gather_results(run)
    entries = group_entries(run, kept=True)
    page = render(results, run.pictures, entries=entries, hierarchy=find_hierarchy(run))
    texts = {
        "report.html": page,
        "results.csv": write_csv(results),
        "leaderboard.md": write_leaderboard(results),
        "results.json": write_json(results),
    }
    for name, text in texts.items():
        write_output(run.path / name, text.encode())
    return run.path / "report.html"


def gather_results(run: Run) -> dict[str, Any]:
    """Return what results.json holds: the first classifier's results, then every one's, and the settings."""
    hierarchy = find_hierarchy(run)
    more: dict[str, Any] = {}
    if adaptive.has_rule(run):
        analyses, more["until"] = adaptive_results.analyse_run(run, hierarchy)
    else:
        analyses = {name: analyse(run.logits(name), hierarchy) for name in run.classifiers}
    first = dict(analyses[run.classifiers[0]])
    if missing := len(adaptive.find_missing(run)):
        text = f"the run is not complete: {missing} of its {len(run.plan)} pictures are still to be drawn"
        if more:
            text = f"the run is not complete: its next look needs {missing} more pictures"
        first["warnings"] = [text, *first["warnings"]]
    settings = {key: run.manifest[key] for key in SETTINGS}
    more |= {"agreement": agree_on_synsets(analyses)} if len(analyses) > 1 else {}
    return {"schema": SCHEMA, **first, **settings, "classifiers": analyses, **more}


def find_hierarchy(run: Run) -> Hierarchy:
    """Return the hierarchy that the run's classifiers judge."""
    configuration = {k: v for k, v in run.manifest["configuration"].items() if k in Study.model_fields}
    return load_hierarchy(Study(**configuration))


def group_entries(run: Run, *, kept: bool) -> dict[str, list[PlanEntry]]:
    """Return synset → its plan entries in plan order; with `kept` only those that `run.pictures` has."""
    entries: dict[str, list[PlanEntry]] = {}
    for entry in run.plan:
        path = run.picture_path(entry)
        if not kept or path is None or path.exists():
            entries.setdefault(entry.synset, []).append(entry)
    return entries


def write_json(results: Mapping[str, Any]) -> str:
    """Return results as JSON text; a NaN is an error, since JSON has none."""
    return json.dumps(results, ensure_ascii=False, indent=1, allow_nan=False) + "\n"


PLAIN_COLUMNS = (
    "synset", "classes", "samples", "isp", "isp_stderr", "floor", "chance", "p", "q", "test", "known",
    "scs", "scs_stderr", "scs_raw", "scs_corrected", "subtree_entropy", "subtree_entropy_stderr",
    "marginal_entropy", "marginal_entropy_stderr",
)  # fmt: skip


def write_csv(results: Mapping[str, Any]) -> str:
    """Return one row a synset, empty where there is no value; `saw` lists classes with probabilities."""
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow([*PLAIN_COLUMNS, "isp_low", "isp_high", "saw"])
    for row in results["synsets"]:
        saw = "; ".join(f"{label} {probability:.4f}" for label, probability in row["saw"])
        writer.writerow([*(row[key] for key in PLAIN_COLUMNS), *row["isp_interval"], saw])
    return target.getvalue()


def write_leaderboard(results: Mapping[str, Any]) -> str:
    """Return a Markdown table of one row: the model, its scores, and the settings that they depend on."""
    results = facts.complete(results)
    isp, scs = results["results"]["isp"], results["results"]["scs"]
    known = sum(row["known"] for row in results["synsets"])
    identity = results["identity"]  # what was used, where the configuration may say `auto`
    cells = {
        "Model": facts.name_model(results),
        "ISP": format_score(isp["value"]),
        "ISP 95 %": format_interval(isp["interval"]),
        "SCS": format_score(scs["value"]),
        "SCS 95 %": format_interval(scs["interval"]),
        "SCS corrected": format_score(scs["corrected"]),
        "N": facts.count_samples(results),
        "Synsets": f"{results['coverage']['synsets']} of {results['coverage']['of']}",
        "Known": f"{known} of {len(results['synsets'])}",
        "Classifier": next(iter(results["classifiers"])),
        "Scheduler": facts.name_scheduler(identity.get("scheduler")),
        **{key.capitalize(): facts.write_value(identity.get(key)) for key in SETTING_COLUMNS},
    }
    return write_table(list(cells), [list(cells.values())])


def write_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; each row has a cell for each word of the head."""
    lines = [list(head), ["---"] * len(head), *([escape_cell(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of the same columns as CSV, empty where there is no value."""
    target = io.StringIO()
    writer = csv.DictWriter(target, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return target.getvalue()


def escape_cell(text: str) -> str:
    """Return text that cannot end a Markdown table's cell, nor be taken for HTML."""
    text = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def write_comparison(run_a: Run, run_b: Run, out: str | Path) -> Path:
    """Write the page that compares two runs to `out`, and its numbers beside it as JSON.

    Differences are B minus A, by the first classifier of A that B has too. `out` is an HTML file or a folder
    for comparison.html. Raises UserError where the runs share no classifier, no synset, or not the classes.
    """
    out = Path(out)
    if out.suffix != ".html":
        out = out / "comparison.html"
    if run_a.manifest["identity"]["hierarchy"] != run_b.manifest["identity"]["hierarchy"]:
        raise UserError("the two runs were judged on different classes: they do not compare")
    classifier = next((name for name in run_a.classifiers if name in run_b.classifiers), None)
    if classifier is None:
        raise UserError(
            f"the two runs share no classifier ({', '.join(run_a.classifiers)} and "
            f"{', '.join(run_b.classifiers)}): judge both with one"
        )
    hierarchy = find_hierarchy(run_a)
    found = [adaptive_results.comparable_rows(run, classifier) for run in (run_a, run_b)]
    same = draw_same_pictures(run_a, run_b)
    rows = [rows for rows, _ in found]
    logits = [
        {name: np.stack(list(by_key.values())) for name, by_key in each.items()}
        for each in (pair_rows(*rows) if same else rows)
    ]
    results = compare(logits[0], logits[1], hierarchy, same_pictures=same)
    results["warnings"] = [warning for _, warnings in found for warning in warnings] + results["warnings"]
    sides = [
        describe_side(run, values, classifier, hierarchy)
        for run, values in zip((run_a, run_b), logits, strict=True)
    ]
    page = render_comparison(results, sides, classifier=classifier, hierarchy=hierarchy)
    runs = {name: {key: run.manifest[key] for key in SETTINGS} for name, run in (("a", run_a), ("b", run_b))}
    document = {"schema": COMPARISON_SCHEMA, "classifier": classifier, **results, "runs": runs}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    write_output(out.with_suffix(".json"), write_json(document).encode())
    write_output(out, page.encode())
    return out


def pair_rows(
    a: adaptive_results.Rows, b: adaptive_results.Rows
) -> tuple[adaptive_results.Rows, adaptive_results.Rows]:
    """Order two runs' rows so that the n-th of both are of the same picture, as far as the shorter goes.

    Of an incomplete run any pictures may lack. Those that both have come first; the shorter one's others,
    which have no partner, are left out.
    """
    paired_a, paired_b = dict(a), dict(b)
    for name in a.keys() & b.keys():
        common = [key for key in a[name] if key in b[name]]
        for rows, other, paired in ((a, b, paired_a), (b, a, paired_b)):
            alone = (
                [] if len(rows[name]) <= len(other[name]) else [k for k in rows[name] if k not in other[name]]
            )
            paired[name] = {key: rows[name][key] for key in [*common, *alone]}
    return (
        {name: rows for name, rows in paired_a.items() if rows},
        {name: rows for name, rows in paired_b.items() if rows},
    )


def draw_same_pictures(run_a: Run, run_b: Run) -> bool:
    """Tell whether the n-th pictures of both runs have the same prompt and seed, so that they are pairs."""
    if any("folder" in run.manifest["configuration"] for run in (run_a, run_b)):
        return False  # a folder's pictures have no seed that we know
    plans_a, plans_b = group_entries(run_a, kept=False), group_entries(run_b, kept=False)
    return all(
        (one.prompt, one.seed) == (other.prompt, other.seed)
        for name in plans_a.keys() & plans_b.keys()
        for one, other in zip(plans_a[name], plans_b[name], strict=False)
    )


def describe_side(run: Run, logits: Mapping[str, Any], classifier: str, hierarchy: Hierarchy) -> Side:
    """Return one run as the comparison page needs it."""
    analysis = analyse(logits, hierarchy)
    settings = {key: run.manifest[key] for key in SETTINGS}
    results = facts.complete({**analysis, **settings, "classifiers": {classifier: analysis}})
    return Side(results, run.pictures, group_entries(run, kept=True))
