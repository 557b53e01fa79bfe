"""How far does accuracy move with the template, what do ensembles gain, do model and student agree?

    python benchmarks/template_spread.py [--data vader,bbc,wordnet] [--limit 60] [--work DIR] [--json FILE]

The packaged model and its distilled student classify texts under templates drawn from the published grid: a
folder of `t2iprobe llm templates` for each data set, with its page. Killed, the same command continues.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from t2iprobe.errors import UserError
from t2iprobe.llm.labelled_data import load_labelled
from t2iprobe.llm.models import (
    DEFAULT_MODEL,
    build_folder_once,
    find_language_model,
    load_language_model,
)
from t2iprobe.llm.template_study import TemplateStudy, run_study
from t2iprobe.spread import correlate_ranks, describe_spread
from t2iprobe.storage import write_atomically


def write_student(work: Path) -> Path:
    """Write the packaged model's student, its embedding and head included, as a model of its own."""
    from t2iprobe.llm.engine.student import load_student

    files = find_language_model(DEFAULT_MODEL)

    def fill(folder: Path) -> None:
        for path in files.folder.iterdir():
            if path.suffix in (".json", ".txt", ".jinja") and not path.name.startswith("model."):
                shutil.copy(path, folder / path.name)
        load_student(load_language_model(files)).save_pretrained(folder)

    work.mkdir(parents=True, exist_ok=True)
    build_folder_once(work / "student", fill)
    return work / "student"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Study every data set. Returns data set → results."""
    models = options.model or [DEFAULT_MODEL, str(write_student(options.work))]
    found = {}
    for name in options.data.split(","):

        def show(done: int, total: int, name: str = name) -> None:
            print(f"{name}: {done} of {total}", file=sys.stderr, flush=True)

        study = TemplateStudy(
            models=tuple(models),
            methods=tuple(options.method.split(",")),
            shots=tuple(map(int, options.shots.split(","))),
            count=options.count,
            template_seed=options.seed,
            seed=options.seed,
            ensemble=options.ensemble,
            limit=options.limit,
            dtype=options.dtype,
        )
        found[name] = run_study(study, load_labelled(name), options.work / Path(name).stem, show=show)
    return found


def tabulate(found: dict[str, Any]) -> list[str]:
    """Return the table as lines of Markdown: a row a setting of the first model, the others behind."""
    first, *others = dict.fromkeys(run["model"] for results in found.values() for run in results["runs"])
    columns = ("data", "method", "shots", "mean", "sd", "least to most", "ensemble", "sd", "gain")
    columns += tuple(column for other in others for column in (f"{Path(other).name}'s mean", "sd", "ρ"))
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, results in found.items():
        scores = {(run["model"], run["method"], run["shots"]): run["scores"] for run in results["runs"]}
        for run, grown in zip(results["runs"], results["ensembles"], strict=True):
            if run["model"] == first:
                others_scores = [scores[other, run["method"], run["shots"]] for other in others]
                cells = [
                    Path(name).stem,
                    run["method"],
                    run["shots"],
                    *show_run(run["scores"], grown["sizes"][-1]),
                ]
                cells += [cell for each in others_scores for cell in show_other(run["scores"], each)]
                lines.append(f"| {' | '.join(map(str, cells))} |")
    for name, results in found.items():
        lines += ["", describe(Path(name).stem, results)]
    return lines


def show_run(scores: list[float], grown: dict[str, Any]) -> tuple[str, ...]:
    """Return accuracy over templates, and that of the largest ensembles with what they gain."""
    spread, gain = describe_spread(scores), grown["gain"]
    low, high = gain["interval"] or (float("nan"),) * 2
    return (
        *(f"{value:.3f}" for value in (spread["mean"], spread["sd"])),
        f"{spread['min']:.3f} to {spread['max']:.3f}",
        *(f"{value:.3f}" for value in (grown["mean"], grown["sd"])),
        f"{gain['value']:+.3f} [{low:+.3f}, {high:+.3f}]",
    )


def show_other(scores: list[float], others: list[float]) -> tuple[str, ...]:
    """Return another model's accuracy over the same templates, and the rank correlation, – without one."""
    spread, rho = describe_spread(others), correlate_ranks(scores, others)[0]
    return f"{spread['mean']:.3f}", f"{spread['sd']:.3f}", f"{rho:.2f}" if np.isfinite(rho) else "–"


def describe(name: str, results: dict[str, Any]) -> str:
    """Say what a data set holds, and how well templates' ranks agree."""
    between = {row["method"]: row["templates_between_models"]["spearman"] for row in results["ranks"]}
    moved = {f"{row['method']} → {row['other']}": row.get(results["data"]) for row in results["transfer"]}
    ranks = [f"{key} {rho:.2f}" for key, rho in {**between, **moved}.items() if rho is not None]
    return (
        f"{name}: {results['texts']} texts, chance {results['chance']:.3f}, the most frequent label "
        f"{results['majority']:.3f}; ρ of templates between models and between methods: "
        f"{', '.join(ranks) or '–'}"
    )


def main(words: list[str] | None = None) -> int:
    """Print the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", action="append", help="by default the packaged one and its student")
    parser.add_argument("--data", default="vader,bbc,wordnet")
    parser.add_argument("--method", default="direct,channel,calibrate")
    parser.add_argument("--shots", default="0,2")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=59)
    parser.add_argument("--ensemble", type=int, default=5)
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--work", type=Path, default=Path("runs/template_spread"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(words)
    try:
        found = run(options)
    except UserError as error:
        print(f"template_spread: {error}", file=sys.stderr)
        return 2
    print("\n".join(tabulate(found)).rstrip())
    if options.json:
        write_atomically(options.json, json.dumps(found, indent=1).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
