"""Many runs side by side: scores with intervals, ranks with their uncertainty, and what does not compare.

Runs compare where they were judged on the same synsets by the same classifier; their SCS only where they
have as many pictures a synset, too. What most runs have in common is the standard; a run that differs is
shown with the difference, and has no rank.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t2iprobe import __version__
from t2iprobe.errors import UserError
from t2iprobe.hypernymy import facts
from t2iprobe.hypernymy.agreement import agree_on_runs, rank_runs
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.hypernymy.report import escape_cell, write_rows, write_table
from t2iprobe.hypernymy.results import read_results
from t2iprobe.pages import format_interval, format_score, name_classifier, write_value
from t2iprobe.runs import Run
from t2iprobe.storage import write_output

__all__ = ["SCHEMA", "analyse_leaderboard", "read_entries", "write_leaderboard"]

SCHEMA = "t2iprobe.leaderboard/1"
RESULTS_SCHEMA = "t2iprobe.results/1"
METRICS = ("isp", "scs")
SETTINGS = ("scheduler", "steps", "guidance", "size", "dtype", "templates", "seed")


def write_leaderboard(paths: Sequence[Path], out: Path) -> tuple[dict[str, Any], Path]:
    """Write the page `out` (``.html``) and, beside it, its table as CSV and Markdown and all of it as JSON.

    Returns the results and the page's path. Raises UserError where one of the paths is no finished run.
    """
    from t2iprobe.hypernymy.leaderboard_page import render

    results = analyse_leaderboard(read_entries(paths))
    out = out.with_name(f"{out.name.removesuffix('.html')}.html")
    if not out.parent.is_dir():
        raise UserError(f"cannot write {out}: there is no folder {out.parent}")
    texts = {
        ".html": render(results),
        ".csv": write_csv(results),
        ".md": write_markdown(results),
        ".json": json.dumps(results, ensure_ascii=False, indent=1, allow_nan=False) + "\n",
    }
    for ending, text in texts.items():
        write_output(out.with_suffix(ending), text.encode())
    return results, out


def read_entries(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Return name → results of runs, given as directories or results.json files; names are unique."""
    found = []
    for path in paths:
        results = _read_file(path) if path.is_file() else read_results(Run.open(path))
        found.append((path, facts.complete(results)))
    models = Counter(facts.name_model(results) for _, results in found)
    entries: dict[str, dict[str, Any]] = {}
    for path, results in found:
        name = facts.name_model(results)
        if models[name] > 1:
            name = f"{name} ({path.parent.name if path.is_file() else path.resolve().name})"
        if name in entries:
            raise UserError(f"two of the runs are called {name}: rename the folder of one")
        entries[name] = results
    return entries


def _read_file(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        known = results["schema"] == RESULTS_SCHEMA
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise UserError(f"{path} is not a run directory, nor the results.json of one")
    return results


def analyse_leaderboard(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return for each classifier the runs that it judged, best ISP first, and how the classifiers agree.

    A run's `differs` tells what keeps it from having a rank by ISP; `scs_differs` likewise by SCS.
    """
    names = list(dict.fromkeys(name for results in entries.values() for name in results["classifiers"]))
    tables = {name: _rank(entries, name) for name in names}
    return {
        "schema": SCHEMA,
        "version": __version__,
        "classifiers": tables,
        "settings": {name: _list_settings(results) for name, results in entries.items()},
        "unjudged": {
            judge: [name for name, results in entries.items() if judge not in results["classifiers"]]
            for judge in names
        },
        "agreement": {metric: _agree(tables, metric) for metric in METRICS},
    }


def _list_settings(results: Mapping[str, Any]) -> dict[str, Any]:
    identity = results["identity"]
    settings = {key: identity.get(key) for key in SETTINGS if key != "scheduler"}
    scheduler = facts.name_scheduler(identity["scheduler"]) if identity.get("scheduler") else None
    return {"scheduler": scheduler, **settings}


def _evaluated(analysis: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return synset → row of what the headline averages over."""
    rows = {row["synset"]: row for row in analysis["synsets"]}
    if len(rows) > analysis["coverage"]["synsets"]:  # leaves beside them: only ImageNet's are known here
        nonleaf = set(Hierarchy.imagenet().synsets)
        rows = {name: row for name, row in rows.items() if name in nonleaf}
    return rows


def _rank(entries: Mapping[str, Mapping[str, Any]], judge: str) -> list[dict[str, Any]]:
    judged = {name: results for name, results in entries.items() if judge in results["classifiers"]}
    tables = {name: _evaluated(results["classifiers"][judge]) for name, results in judged.items()}
    bases = {name: _basis(results, judge, tables[name]) for name, results in judged.items()}
    standard = _most_common([_freeze(basis) for basis in bases.values()])
    alike = [name for name in judged if _freeze(bases[name]) == standard]
    model = bases[alike[0]]
    counts = {name: _samples(judged[name], judge) for name in judged}
    usual = _most_common([counts[name] for name in alike])
    ranked = {"isp": alike, "scs": [name for name in alike if counts[name] == usual]}
    rows: dict[str, dict[str, Any]] = {}
    for name, results in judged.items():
        analysis = results["classifiers"][judge]
        differs = _describe_differences(bases[name], model)
        pictures = (
            [] if counts[name] == usual else [f"N = {_write_count(counts[name])}, not {_write_count(usual)}"]
        )
        rows[name] = {
            "run": name,
            **{metric: analysis["results"][metric] for metric in (*METRICS, "scs_corrected")},
            "samples": list(counts[name]),
            "synsets": len(tables[name]),
            "known": sum(row["known"] for row in tables[name].values()),
            "ranks": dict.fromkeys(METRICS),
            "differs": differs,
            "scs_differs": [*differs, *pictures],
        }
    order = sorted(tables[alike[0]])
    for metric in METRICS:
        members = ranked[metric]
        values = np.array([[_number(tables[name][synset][metric]) for synset in order] for name in members])
        for name, found in zip(members, rank_runs(values), strict=True):
            if rows[name][metric]["value"] is not None:
                rows[name]["ranks"][metric] = found
    return sorted(rows.values(), key=lambda row: (bool(row["differs"]), -row["isp"]["value"]))


def _basis(results: Mapping[str, Any], judge: str, rows: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must be equal for two runs' ISP to compare."""
    judges = {
        name_classifier(name): value for name, value in (results["identity"].get("classifiers") or {}).items()
    }
    return {
        "classes": results["identity"].get("hierarchy"),
        "weights": judges.get(judge, {}).get("hash"),
        "synsets": sorted(rows),
    }


def _freeze(basis: Mapping[str, Any]) -> str:
    return json.dumps(basis)


def _most_common(values: Sequence[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]  # the first of equally common ones


def _samples(results: Mapping[str, Any], judge: str) -> tuple[int, int]:
    coverage = results["classifiers"][judge]["coverage"]
    return coverage["samples_min"], coverage["samples_max"]


def _write_count(count: tuple[int, int]) -> str:
    return str(count[0]) if count[0] == count[1] else f"{count[0]}–{count[1]}"


def _describe_differences(basis: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
    texts = []
    if basis["classes"] != model["classes"]:
        texts.append("other classes")
    if basis["weights"] != model["weights"]:
        texts.append("other weights of the classifier")
    one, other = set(basis["synsets"]), set(model["synsets"])
    if one != other:
        texts.append(
            f"{len(one)} synsets, not the {len(other)} ({len(other - one)} missing, {len(one - other)} more)"
        )
    return texts


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _agree(tables: Mapping[str, Sequence[Mapping[str, Any]]], metric: str) -> list[dict[str, Any]]:
    """Return how each two classifiers rank the runs that have a rank by both."""
    scores = {
        judge: {row["run"]: row[metric]["value"] for row in rows if row["ranks"][metric]}
        for judge, rows in tables.items()
    }
    found = []
    judges = list(scores)
    for place, a in enumerate(judges):
        for b in judges[place + 1 :]:
            both = [run for run in scores[a] if run in scores[b]]
            if len(both) > 2:
                pair = {judge: [scores[judge][run] for run in both] for judge in (a, b)}
                found.append({**agree_on_runs(pair)[0], "runs": both})
    return found


def list_columns(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one flat row for each run and classifier."""
    rows = []
    for judge, table in results["classifiers"].items():
        for row in table:
            flat: dict[str, Any] = {"run": row["run"], "classifier": judge}
            for metric in METRICS:
                rank = row["ranks"][metric] or {}
                low, high = row[metric]["interval"] or (None, None)
                flat |= {
                    metric: row[metric]["value"],
                    f"{metric}_low": low,
                    f"{metric}_high": high,
                    f"{metric}_rank": rank.get("rank"),
                    f"{metric}_rank_best": rank.get("best"),
                    f"{metric}_rank_worst": rank.get("worst"),
                }
            flat |= {
                "scs_corrected": row["scs_corrected"]["value"],
                "samples_min": row["samples"][0],
                "samples_max": row["samples"][1],
                "synsets": row["synsets"],
                "known": row["known"],
                "differs": "; ".join(row["scs_differs"]),
                **{key: _flat(value) for key, value in results["settings"][row["run"]].items()},
            }
            rows.append(flat)
    return rows


def _flat(value: Any) -> Any:
    return " | ".join(map(str, value)) if isinstance(value, list) else value


def write_csv(results: Mapping[str, Any]) -> str:
    """Return one row for each run and classifier, empty where there is no value."""
    return write_rows(list_columns(results))


def write_markdown(results: Mapping[str, Any]) -> str:
    """Return one table for each classifier."""
    parts = []
    for judge, table in results["classifiers"].items():
        head = ["Rank", "Run", "ISP", "95 %", "SCS", "95 %", "SCS rank", "N", "Synsets", *SETTINGS, "Differs"]
        rows = []
        for row in table:
            settings = results["settings"][row["run"]]
            cells = [
                write_rank(row["ranks"]["isp"]),
                row["run"],
                format_score(row["isp"]["value"]),
                format_interval(row["isp"]["interval"]),
                format_score(row["scs"]["value"]),
                format_interval(row["scs"]["interval"]),
                write_rank(row["ranks"]["scs"]),
                _write_count(tuple(row["samples"])),
                str(row["synsets"]),
                *(write_value(settings[key]) for key in SETTINGS),
                "; ".join(row["scs_differs"]),
            ]
            rows.append(cells)
        parts.append(f"{escape_cell(judge)}\n\n{write_table(head, rows)}")
    return "\n".join(parts)


def write_rank(rank: Mapping[str, int] | None) -> str:
    """Return ``2 (1–3)``, a dash where a run has no rank."""
    if rank is None:
        return "–"
    return (
        f"{rank['rank']} ({rank['best']}–{rank['worst']})"
        if rank["worst"] > rank["best"]
        else str(rank["rank"])
    )
