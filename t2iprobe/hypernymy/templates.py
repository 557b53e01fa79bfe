"""How far do ISP and SCS move with the prompt template, and what do ensembles of templates make of them?

A run with `common_seeds` draws the same noise under every template, so that templates are compared pair by
pair. Ensembles are made on the picture side (the mean of the class probabilities of the pictures that several
templates gave, as "Mind Your Format" averages a language model's) and, where the run has `mean_conditioning`,
on the conditioning side (one picture from the mean of the templates' embeddings).

ISP is linear in class probabilities: a picture-side ensemble's ISP is the mean of its templates' ISPs. It
removes the choice, it cannot raise the mean. Whether the likeliest class lies in the subtree can (`hit`).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t2iprobe import __version__
from t2iprobe.errors import UserError
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.hypernymy.metrics import Floats, entropy, scs_normaliser, softmax
from t2iprobe.hypernymy.prompts import MEAN
from t2iprobe.hypernymy.report import find_hierarchy
from t2iprobe.intervals import describe_difference, describe_mean
from t2iprobe.runs import Run
from t2iprobe.spread import describe_spread, rank_agreement, subset_spread
from t2iprobe.storage import write_output

__all__ = ["analyse_templates", "measure_templates", "write_template_report"]

SCHEMA = "t2iprobe.picture_templates/1"
METRICS = ("isp", "scs", "hit")
SUBSETS = 40


def write_template_report(runs: Sequence[Run], out: Path) -> dict[str, Any]:
    """Write the page and, beside it, the same as JSON. Returns the results."""
    from t2iprobe.hypernymy.templates_page import render

    results = analyse_templates(runs)
    write_output(out, render(results).encode())
    write_output(out.with_suffix(".json"), json.dumps(results, indent=1, ensure_ascii=False).encode())
    return results


def analyse_templates(runs: Sequence[Run]) -> dict[str, Any]:
    """Return each run's templates with intervals, their spread, ensembles, and how ranks agree between runs.

    Raises UserError for a run of fewer than two templates, or runs of different ones.
    """
    tables = [_read(run) for run in runs]
    templates = list(tables[0])
    for run, table in zip(runs, tables, strict=True):
        if len(_singles(list(table))) < 2:
            raise UserError(f"{run.path} has a single template: run it with several, as the preset templates")
        if list(table) != templates:
            raise UserError(f"{run.path} has other templates than {runs[0].path}")
    found = [_analyse(run, table, find_hierarchy(run)) for run, table in zip(runs, tables, strict=True)]
    singles = _singles(templates)
    scores = np.array([[row["isp"]["value"] for row in one["templates"][: len(singles)]] for one in found])
    return {
        "schema": SCHEMA,
        "version": __version__,
        "templates": templates,
        "runs": found,
        "ranks": {
            "templates_between_runs": rank_agreement(scores),
            "runs_between_templates": rank_agreement(scores.T),
        },
    }


Table = Mapping[str, Mapping[str, np.ndarray]]  # template → synset → logits [N, C]


def _read(run: Run) -> Table:
    table = run.logits_by_template()
    # The mean of the embeddings is no template: it stands last.
    return dict(sorted(table.items(), key=lambda item: item[0] == MEAN))


def _singles(templates: Sequence[str]) -> list[str]:
    return [template for template in templates if template != MEAN]


def measure_templates(
    probabilities: np.ndarray, subtrees: np.ndarray, normaliser: float
) -> dict[str, Floats]:
    """Return isp, scs and hit [S] from class probabilities [S, N, C] and subtrees bool [S, C].

    `hit` is the share of pictures whose likeliest class lies in the subtree. SCS is NaN where the subtree
    holds a single class; it depends on N, and one picture has none.
    """
    inside = np.einsum("snc,sc->sn", probabilities, subtrees.astype(probabilities.dtype))
    best = probabilities.argmax(axis=2)
    hits = np.take_along_axis(subtrees, best, axis=1)
    scs = np.full(len(subtrees), np.nan)
    for row, subtree in enumerate(subtrees):
        if subtree.sum() > 1:
            q = probabilities[row][:, subtree].astype(np.float64)
            q /= q.sum(axis=1, keepdims=True)
            scs[row] = max(entropy(q.mean(axis=0)) - entropy(q).mean(), 0.0) / normaliser
    return {"isp": inside.mean(axis=1), "scs": scs, "hit": hits.mean(axis=1)}


def _analyse(run: Run, table: Table, hierarchy: Hierarchy) -> dict[str, Any]:
    synsets = sorted(set.intersection(*(set(by_synset) for by_synset in table.values())))
    counts = {len(by_synset[name]) for by_synset in table.values() for name in synsets}
    if not synsets:
        raise UserError(f"{run.path} is not complete: no synset has pictures of every template yet")
    least = min(counts)
    subtrees = hierarchy.subtrees_of(synsets)
    normaliser = scs_normaliser(hierarchy)
    stacked = {
        template: softmax(np.stack([by_synset[name][:least] for name in synsets])).astype(np.float32)
        for template, by_synset in table.items()
    }
    measured = {
        template: measure_templates(values, subtrees, normaliser) for template, values in stacked.items()
    }
    singles = _singles(list(table))
    base = measured[singles[0]]
    metrics = [metric for metric in METRICS if metric != "scs" or least > 1]
    rows = []
    for template, values in measured.items():
        row: dict[str, Any] = {"template": template, "prompt": _example(run, template)}
        for metric in metrics:
            known = np.isfinite(values[metric])
            row[metric] = describe_mean(values[metric][known])
            if template != singles[0]:
                row[f"{metric}_difference"] = describe_difference(base[metric][known], values[metric][known])
        rows.append(row)
    means = {
        metric: [float(np.nanmean(measured[template][metric])) for template in singles] for metric in metrics
    }
    pictures = np.stack([stacked[template] for template in singles])  # [templates, S, N, C]
    return {
        "run": run.path.name,
        "model": run.manifest["configuration"]["model"],
        "synsets": len(synsets),
        "samples": least,
        "templates": rows,
        "spread": {metric: describe_spread(values) for metric, values in means.items()},
        "ranking": _test_ranking(measured, stacked, singles, subtrees, normaliser),
        "ensembles": _grow_ensembles(pictures, subtrees, normaliser, metrics),
        "mixed": _mix(pictures, subtrees, normaliser),
        "conditioning": _compare_mean(measured, singles, metrics) if MEAN in measured else None,
    }


def _example(run: Run, template: str) -> str:
    entry = next(entry for entry in run.plan if entry.template == template)
    return "the mean of the embeddings" if template == MEAN else entry.prompt


def _test_ranking(
    measured: Mapping[str, Mapping[str, Floats]],
    stacked: Mapping[str, np.ndarray],
    singles: Sequence[str],
    subtrees: np.ndarray,
    normaliser: float,
) -> dict[str, Any]:
    """Return how well halves (of the synsets, of the pictures) agree on which templates are good."""
    isp = np.array([measured[template]["isp"] for template in singles])
    found = {"synsets": rank_agreement([isp[:, ::2].mean(axis=1), isp[:, 1::2].mean(axis=1)])}
    if stacked[singles[0]].shape[1] > 1:
        halves = [
            [
                measure_templates(stacked[template][:, half::2], subtrees, normaliser)["isp"].mean()
                for template in singles
            ]
            for half in (0, 1)
        ]
        found["pictures"] = rank_agreement(halves)
    return found


def _grow_ensembles(
    pictures: np.ndarray, subtrees: np.ndarray, normaliser: float, metrics: Sequence[str]
) -> list[dict[str, Any]]:
    """Describe picture-side ensembles of 1 … all templates over subsets, by metric."""
    count = len(pictures)
    table = []
    for size in range(1, count + 1):
        seen: dict[tuple[int, ...], dict[str, float]] = {}

        def measure(members: Sequence[int], seen: dict[Any, dict[str, float]] = seen) -> dict[str, float]:
            key = tuple(members)
            if key not in seen:
                values = measure_templates(pictures[list(key)].mean(axis=0), subtrees, normaliser)
                seen[key] = {metric: float(np.nanmean(values[metric])) for metric in metrics}
            return seen[key]

        row: dict[str, Any] = {"size": size}
        for metric in metrics:
            row[metric] = subset_spread(
                lambda members, metric=metric, measure=measure: measure(members)[metric],
                count,
                size,
                draws=SUBSETS,
            )
        table.append(row)
    return table


def _mix(pictures: np.ndarray, subtrees: np.ndarray, normaliser: float) -> dict[str, Any] | None:
    """Return the SCS of pictures that each have another template, at the same N; None for one picture.

    What a change of words adds to coverage, over what other noise gives.
    """
    count, _, samples, _ = pictures.shape
    if samples < 2:
        return None
    mixed = []
    for start in range(count):
        one = np.stack([pictures[(start + n) % count, :, n] for n in range(samples)], axis=1)
        mixed.append(measure_templates(one, subtrees, normaliser)["scs"])
    alone = [measure_templates(each, subtrees, normaliser)["scs"] for each in pictures]
    known = np.isfinite(mixed[0])
    single, several = (np.mean(values, axis=0)[known] for values in (alone, mixed))
    return {
        "single": describe_mean(single),
        "mixed": describe_mean(several),
        "difference": describe_difference(single, several),
    }


def _compare_mean(
    measured: Mapping[str, Mapping[str, Floats]], singles: Sequence[str], metrics: Sequence[str]
) -> dict[str, Any]:
    """Return the mean of the embeddings against the templates' mean, and the best of them, over synsets."""
    found: dict[str, Any] = {}
    for metric in metrics:
        each = np.array([measured[template][metric] for template in singles])
        own = measured[MEAN][metric]
        known = np.isfinite(own)
        best = int(np.nanmean(each, axis=1).argmax())
        found[metric] = {
            "value": float(own[known].mean()),
            "against_mean": describe_difference(each.mean(axis=0)[known], own[known]),
            "best": singles[best],
            "against_best": describe_difference(each[best][known], own[known]),
        }
    return found
