"""What a sweep says: every cell with its intervals, and the paired differences of neighbouring cells."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t2iprobe import __version__
from t2iprobe.hypernymy import facts
from t2iprobe.hypernymy.report import find_hierarchy, group_entries, write_rows, write_table
from t2iprobe.hypernymy.results import read_results
from t2iprobe.hypernymy.samples import Sample, reduce_logits
from t2iprobe.hypernymy.statistics import summarise_difference
from t2iprobe.hypernymy.sweep import Cell
from t2iprobe.intervals import holm
from t2iprobe.pages import (
    format_interval,
    format_p,
    format_score,
    format_signed,
    format_signed_interval,
    write_value,
)
from t2iprobe.runs import Run
from t2iprobe.storage import write_output

__all__ = ["SCHEMA", "analyse_sweep", "pair_neighbours", "write_sweep"]

SCHEMA = "t2iprobe.sweep/1"
METRICS = ("isp", "scs", "scs_corrected")
PAIRED = ("isp", "scs")
RESAMPLES = 1000


def write_sweep(
    cells: Sequence[tuple[Cell, Run]], axes: Mapping[str, Sequence[Any]], out: Path
) -> dict[str, Any]:
    """Write sweep.html, sweep.csv, sweep.md and, last, sweep.json into `out`. Returns the results."""
    from t2iprobe.hypernymy.sweep_page import render

    results = analyse_sweep(cells, list(axes))
    texts = {
        "sweep.html": render(results),
        "sweep.csv": write_csv(results),
        "sweep.md": write_markdown(results),
        "sweep.json": json.dumps(results, ensure_ascii=False, indent=1, allow_nan=False) + "\n",
    }
    for name, text in texts.items():
        write_output(out / name, text.encode())
    return results


def analyse_sweep(cells: Sequence[tuple[Cell, Run]], axes: Sequence[str]) -> dict[str, Any]:
    """Return the cells as their reports state them, and each pair of neighbours with its differences.

    Differences are those of the first classifier, paired by synset and picture; p is corrected for the number
    of pairs (Holm).
    """
    rows = [_describe_cell(cell, run) for cell, run in cells]
    first = cells[0][1]
    return {
        "schema": SCHEMA,
        "version": __version__,
        "axes": {axis: list(dict.fromkeys(cell.place[axis] for cell, _ in cells)) for axis in axes},
        "cells": rows,
        "neighbours": _compare_neighbours(cells, axes),
        "classifier": first.classifiers[0],
        "configuration": {
            key: value
            for key, value in first.manifest["configuration"].items()
            if key not in {"templates" if axis == "template" else axis for axis in axes}
        },
        "versions": first.manifest["versions"],
    }


def _describe_cell(cell: Cell, run: Run) -> dict[str, Any]:
    results = read_results(run)
    return {
        "name": cell.name,
        "place": dict(cell.place),
        "model": facts.name_model(results),
        **{metric: results["results"][metric] for metric in METRICS},
        "known": sum(row["known"] for row in results["synsets"]),
        "coverage": results["coverage"],
        "classifiers": {
            name: {metric: analysis["results"][metric]["value"] for metric in PAIRED}
            for name, analysis in results["classifiers"].items()
        },
    }


def pair_neighbours(places: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return (axis, position, position) of cells that differ on one axis alone, and lie next to each other.

    Numbers are compared with the next smaller one; words and seeds have no order, and are compared with the
    first of theirs.
    """
    pairs = []
    for axis in axes:
        lines: dict[tuple[Any, ...], list[int]] = {}
        for index, place in enumerate(places):
            lines.setdefault(tuple(place[other] for other in axes if other != axis), []).append(index)
        for line in lines.values():
            numbers = axis != "seed" and all(isinstance(places[index][axis], int | float) for index in line)
            befores = line[:-1] if numbers else [line[0]] * (len(line) - 1)
            pairs += [(axis, before, after) for before, after in zip(befores, line[1:], strict=True)]
    return pairs


def _compare_neighbours(cells: Sequence[tuple[Cell, Run]], axes: Sequence[str]) -> list[dict[str, Any]]:
    pairs = pair_neighbours([cell.place for cell, _ in cells], axes)
    samples: dict[int, Sample] = {}

    def sample(index: int) -> Sample:
        if index not in samples:
            run = cells[index][1]
            hierarchy = find_hierarchy(run)
            whole = reduce_logits(run.logits(), hierarchy)
            nonleaf = set(hierarchy.synsets)
            samples[index] = whole.subset(
                [name for name in whole.synsets if name in nonleaf] or whole.synsets
            )
        return samples[index]

    rows = []
    for axis, before, after in pairs:
        same = _draw_same_noise(cells[before][1], cells[after][1])
        found = summarise_difference(sample(before), sample(after), same, RESAMPLES, 0)
        rows.append(
            {
                "axis": axis,
                "a": cells[before][0].name,
                "b": cells[after][0].name,
                "same_noise": same,
                **{metric: found[metric] for metric in PAIRED},
            }
        )
    for metric in PAIRED:
        for row, p in zip(rows, holm([row[metric]["p"] for row in rows]), strict=True):
            row[metric]["p_holm"] = p
    return rows


def _draw_same_noise(run_a: Run, run_b: Run) -> bool:
    """Tell whether the n-th pictures of both runs begin with the same noise."""
    plans = [group_entries(run, kept=False) for run in (run_a, run_b)]
    return all(
        [entry.seed for entry in plans[0][name]] == [entry.seed for entry in plans[1][name]]
        for name in plans[0].keys() & plans[1].keys()
    )


def list_columns(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one flat row a cell: its place, then scores with their intervals, N, synsets, known."""
    return [
        {
            **cell["place"],
            **{
                f"{metric}{part}": value
                for metric in METRICS
                for part, value in zip(
                    ("", "_low", "_high"),
                    (cell[metric]["value"], *(cell[metric]["interval"] or (None, None))),
                    strict=True,
                )
            },
            "samples": cell["coverage"]["samples_min"],
            "synsets": cell["coverage"]["synsets"],
            "known": cell["known"],
            "run": cell["name"],
        }
        for cell in results["cells"]
    ]


def write_csv(results: Mapping[str, Any]) -> str:
    """Return one row a cell, empty where there is no value."""
    return write_rows(list_columns(results))


def write_markdown(results: Mapping[str, Any]) -> str:
    """Return the table of the cells and that of the neighbours."""
    axes = list(results["axes"])
    cells = [
        [
            *(_write_place(cell["place"][axis]) for axis in axes),
            *(
                text
                for metric in PAIRED
                for text in (format_score(cell[metric]["value"]), format_interval(cell[metric]["interval"]))
            ),
            format_score(cell["scs_corrected"]["value"]),
            str(cell["coverage"]["samples_min"]),
            str(cell["coverage"]["synsets"]),
        ]
        for cell in results["cells"]
    ]
    head = [*axes, "ISP", "ISP 95 %", "SCS", "SCS 95 %", "SCS corrected", "N", "Synsets"]
    differences = [
        [
            row["a"],
            row["b"],
            *(
                text
                for metric in PAIRED
                for text in (
                    f"{format_signed(row[metric]['difference'])} "
                    f"({format_signed_interval(row[metric]['interval'])})",
                    format_p(row[metric]["p_holm"]),
                )
            ),
        ]
        for row in results["neighbours"]
    ]
    titles = ["From", "To", "ISP (95 %)", "p", "SCS (95 %)", "p"]
    return write_table(head, cells) + ("\n" + write_table(titles, differences) if differences else "")


def _write_place(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else write_value(value)


def best_cell(results: Mapping[str, Any], metric: str) -> Mapping[str, Any]:
    """Return the cell with the highest value of a metric."""
    return max(
        results["cells"],
        key=lambda cell: -np.inf if cell[metric]["value"] is None else cell[metric]["value"],
    )
