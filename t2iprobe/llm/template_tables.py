"""What a CSV of template runs says: spread over templates, agreement of ranks, gain of ensembles.

The CSV has the published columns (seed, model, dataset, n_shots, precision, batch_size, template_seed,
prediction_method, selection_method, scores: a JSON list, one accuracy a template), which `llm templates`
writes too, so that the published runs and one's own are read by the same functions.
"""

import csv
import json
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t2iprobe.errors import UserError
from t2iprobe.spread import correlate_ranks, describe_spread, rank_agreement

__all__ = [
    "COLUMNS",
    "choose_runs",
    "read_runs",
    "tabulate_ensembles",
    "tabulate_ranks",
    "tabulate_spread",
    "tabulate_transfer",
]

COLUMNS = (
    *("seed", "model", "dataset", "n_shots", "precision", "batch_size", "template_seed"),
    *("prediction_method", "selection_method", "scores"),
)
Row = Mapping[str, Any]


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Read a CSV of runs; `scores` becomes a list, seeds and shots numbers. Raises UserError for another."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            lacking = sorted(set(COLUMNS) - set(reader.fieldnames or []))
            if lacking:
                raise UserError(f"{path} is no table of template runs: it lacks the column {lacking[0]}")
            rows: list[dict[str, Any]] = [dict(row) for row in reader]
        for row in rows:
            row["scores"] = json.loads(row["scores"])
            row |= {key: int(row[key]) for key in ("seed", "template_seed", "n_shots")}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return rows


def choose_runs(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Return the rows whose columns are as wanted."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def tabulate_spread(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return, for each data set, method and number of shots, the means over runs of their own spread.

    A run is a model with a seed: mean accuracy, sd and range over its templates are averaged over the runs.
    """
    table = []
    for (dataset, method, shots), group in _group(rows, "dataset", "prediction_method", "n_shots"):
        spreads = [describe_spread(row["scores"]) for row in group]
        means = {key: float(np.mean([each[key] for each in spreads])) for key in ("mean", "sd", "range")}
        table.append(
            {"dataset": dataset, "method": method, "shots": shots, "runs": len(group), **means}
            | {"min": min(each["min"] for each in spreads), "max": max(each["max"] for each in spreads)}
        )
    return table


def tabulate_ranks(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return, for each data set and method, how well models agree on which templates are good, and how well
    templates agree on which models are: mean rank correlations over pairs.

    Only runs of the same seeds and shots are compared, since they share templates and demonstrations.
    """
    table = []
    for (dataset, method), group in _group(rows, "dataset", "prediction_method"):
        by_templates, by_models = [], []
        for _, alike in _group(group, "seed", "template_seed", "n_shots", "selection_method"):
            scores = np.array([row["scores"] for row in alike], np.float64)
            by_templates.append(rank_agreement(scores))
            by_models.append(rank_agreement(scores.T))
        table.append(
            {
                "dataset": dataset,
                "method": method,
                "templates_between_models": _pool(by_templates),
                "models_between_templates": _pool(by_models),
            }
        )
    return table


def tabulate_transfer(rows: Sequence[Row], method: str, other: str) -> dict[str, float]:
    """Return data set → mean Spearman, over runs, of a run's templates under two methods."""

    def key(row: Row) -> Hashable:
        return tuple(
            row[column] for column in ("model", "seed", "template_seed", "n_shots", "selection_method")
        )

    found = {}
    for (dataset,), group in _group(rows, "dataset"):
        first = {key(row): row["scores"] for row in group if row["prediction_method"] == method}
        second = {key(row): row["scores"] for row in group if row["prediction_method"] == other}
        both = [correlate_ranks(first[run], second[run])[0] for run in first.keys() & second.keys()]
        known = [value for value in both if np.isfinite(value)]
        if known:
            found[dataset] = float(np.mean(known))
    return found


def tabulate_ensembles(path: Path) -> list[dict[str, Any]]:
    """Read the published table of ensembles (dataset, model, pred_method, size, mean, std over seeds).

    Returns the means over models, for each data set, method and size; a cell that is empty is left out.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows: list[dict[str, Any]] = [dict(row) for row in csv.DictReader(file)]
        for row in rows:
            row["size"] = int(row["size"])
            row |= {key: float(row[key]) if row[key] else np.nan for key in ("mean", "std")}
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"cannot read {path} as a table of ensembles: {error}") from None
    table = []
    for (dataset, method, size), group in _group(rows, "dataset", "pred_method", "size"):
        means = {key: float(np.nanmean([row[key] for row in group])) for key in ("mean", "std")}
        table.append({"dataset": dataset, "method": method, "size": size, "models": len(group), **means})
    return table


def _group(rows: Iterable[Row], *columns: str) -> list[tuple[tuple[Any, ...], list[Row]]]:
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[column] for column in columns)].append(row)
    return list(groups.items())


def _pool(agreements: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean of agreements over settings, None where there are no pairs."""
    known = [each for each in agreements if each["pairs"]]
    means = {key: float(np.mean([each[key] for each in known])) for key in ("spearman", "kendall") if known}
    return {"spearman": None, "kendall": None, **means, "pairs": sum(each["pairs"] for each in known)}
