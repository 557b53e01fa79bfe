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
    """Return the tables as lines of Markdown: a row for each run of each model."""
    lines: list[str] = []
    for name, results in found.items():
        models = list(dict.fromkeys(run["model"] for run in results["runs"]))
        lines += [
            f"{name}: {results['texts']} texts, chance {results['chance']:.3f}, the most frequent label "
            f"{results['majority']:.3f}",
            "",
            "| model | method | shots | mean | sd | least to most | ensemble | its sd | gain | ρ |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        first = {key(run): run["scores"] for run in results["runs"] if run["model"] == models[0]}
        for run, grown in zip(results["runs"], results["ensembles"], strict=True):
            spread, most = describe_spread(run["scores"]), grown["sizes"][-1]
            low, high = most["gain"]["interval"] or (float("nan"),) * 2
            rho = "–" if run["model"] == models[0] else show_rank(run["scores"], first[key(run)])
            cells = (
                *(Path(run["model"]).name, run["method"], run["shots"]),
                *(f"{value:.3f}" for value in (spread["mean"], spread["sd"])),
                f"{spread['min']:.3f} to {spread['max']:.3f}",
                *(f"{value:.3f}" for value in (most["mean"], most["sd"])),
                *(f"{most['gain']['value']:+.3f} [{low:+.3f}, {high:+.3f}]", rho),
            )
            lines.append(f"| {' | '.join(map(str, cells))} |")
        ranks = [(row["method"], row["templates_between_models"]["spearman"]) for row in results["ranks"]]
        told = [f"{method} {rho:.2f}" for method, rho in ranks if rho is not None]
        moved = [
            f"{row['method']} → {row['other']} {value:.2f}"
            for row in results["transfer"]
            for value in [row.get(results["data"])]
            if value is not None
        ]
        lines += ["", f"ρ of templates between models: {', '.join(told) or '–'}"]
        lines += [f"ρ of templates between methods: {', '.join(moved) or '–'}", ""]
    return lines


def key(run: dict[str, Any]) -> tuple[str, int]:
    """Return what two models' runs have in common."""
    return run["method"], run["shots"]


def show_rank(scores: list[float], others: list[float]) -> str:
    """Return Spearman's ρ, – where one of them is constant."""
    rho = correlate_ranks(scores, others)[0]
    return f"{rho:.2f}" if rho == rho else "–"


def main(words: list[str] | None = None) -> int:
    """Print the tables. Returns the exit code."""
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
