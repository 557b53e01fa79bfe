"""What a run or a sweep would draw and what it would take, by one process or by many: nothing is written."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import t2iprobe
from t2iprobe.cluster import Cluster, connected
from t2iprobe.config import Study, dump_study
from t2iprobe.console import duration
from t2iprobe.hypernymy import adaptive
from t2iprobe.hypernymy.cluster import agree_on_networks, describe_worker
from t2iprobe.hypernymy.prediction import Place, measure_run, measure_sweep, report_on
from t2iprobe.hypernymy.study import load_hierarchy, make_manifest
from t2iprobe.hypernymy.sweep import Cell, count_missing, list_cells, make_manifests
from t2iprobe.launch import Launch
from t2iprobe.plans import build_plan
from t2iprobe.runs import WHOLE, Run, Share

__all__ = ["plan_study", "plan_sweep"]

Told = Mapping[str, Any]


@dataclass(frozen=True)
class RunPlan:
    """The plan positions that a run lacks."""

    study: Study
    found: dict[str, Any]
    manifest: dict[str, Any]
    missing: Sequence[int]

    @property
    def left(self) -> int:
        return len(self.missing)

    def take(self, share: Share) -> "RunPlan":
        """Return what a share of the run lacks."""
        return replace(self, missing=[p for p in self.missing if p % share[1] == share[0]])

    def thin(self, count: int) -> "RunPlan":
        """Return what one of `count` workers will draw, more or less."""
        return replace(self, missing=self.missing[::count])

    def measure(self, classes: int, before: float) -> Place:
        """Measure what this process takes for it, where the hierarchy has so many classes."""
        return measure_run(self.study, self.manifest, self.missing, classes, before)

    def time_report(self, logits: Mapping[str, np.ndarray]) -> float:
        """Return the seconds of the report of such logits."""
        with tempfile.TemporaryDirectory() as folder:
            return report_on(self.manifest, logits, Path(folder, "run"))[1]


@dataclass(frozen=True)
class SweepPlan:
    """The plan positions that the cells of a sweep lack."""

    study: Study
    found: dict[str, Any]
    axes: Mapping[str, Sequence[Any]]
    cells: Sequence[Cell]
    manifests: Sequence[dict[str, Any]]
    missing: Sequence[range]

    @property
    def left(self) -> int:
        return sum(map(len, self.missing))

    @property
    def manifest(self) -> dict[str, Any]:
        return self.manifests[0]

    def take(self, share: Share) -> "SweepPlan":
        """Return what a share of every cell lacks."""
        index, count = share
        return replace(self, missing=[each[(index - each.start) % count :: count] for each in self.missing])

    def thin(self, count: int) -> "SweepPlan":
        """Return what one of `count` workers will draw, more or less."""
        return replace(self, missing=[each[::count] for each in self.missing])

    def measure(self, classes: int, before: float) -> Place:
        """Measure what this process takes for it, where the hierarchy has so many classes."""
        return measure_sweep(self.study, self.cells, self.manifests, self.missing, classes, before)

    def time_report(self, logits: Mapping[str, np.ndarray]) -> float:
        """Return the seconds of the reports of all cells and of the sweep's pages, by those of two."""
        from t2iprobe.hypernymy.sweep_results import pair_neighbours, write_sweep

        pair = list(zip(self.cells, self.manifests, strict=True))[:2]
        with tempfile.TemporaryDirectory() as folder:
            written = [
                report_on(manifest, logits, Path(folder, str(seed)), seed)
                for seed, (_, manifest) in enumerate(pair)
            ]
            begin = time.perf_counter()
            runs = [(cell, run) for (cell, _), (run, _) in zip(pair, written, strict=True)]
            write_sweep(runs, self.axes, Path(folder))
            pages = time.perf_counter() - begin
        pairs = len(pair_neighbours([cell.place for cell in self.cells], list(self.axes)))
        reports = len(self.cells) * sum(seconds for _, seconds in written) / len(pair)
        return reports + max(1, pairs) * pages


Plan = RunPlan | SweepPlan


def plan_study(
    study: Study,
    out: str | Path | None,
    *,
    share: Share = WHOLE,
    launch: Launch | None = None,
    cluster: Cluster | None = None,
    measure: bool = True,
    process_seconds: float = 0.0,
) -> dict[str, Any]:
    """Describe what a run would do: pictures, synsets, settings, what is stored, seconds. Writes nothing.

    The time is measured, see `prediction.measure_run`, for a `share` of the run, for all processes of a
    launch, or for all workers that a cluster has room for now; a command adds the `process_seconds` since it
    was started.
    Returns, besides, {predicted_seconds, batch_size, lanes, seconds: {start, prompts, pictures, report},
    step_seconds: of a batch, places: how many draw}; the seconds are the slowest place's.
    """
    return _plan(
        lambda told: _describe_run(study, out, told),
        study,
        share=share,
        launch=launch,
        cluster=cluster,
        measure=measure,
        begin=time.perf_counter() - process_seconds,
    )


def plan_sweep(
    study: Study,
    axes: Mapping[str, Sequence[Any]],
    out: str | Path | None,
    *,
    share: Share = WHOLE,
    launch: Launch | None = None,
    cluster: Cluster | None = None,
    measure: bool = True,
    process_seconds: float = 0.0,
) -> dict[str, Any]:
    """Describe what a sweep would do: its cells, what of them is stored, and the seconds. Writes nothing.

    As `plan_study`; the time is measured for each kind of cell, see `prediction.measure_sweep`.
    """
    return _plan(
        lambda told: _describe_sweep(study, axes, out, told),
        study.model_copy(update={"scheduler": None}),
        share=share,
        launch=launch,
        cluster=cluster,
        measure=measure,
        begin=time.perf_counter() - process_seconds,
    )


def _plan(
    describe: Callable[[Told | None], Plan],
    asked: Study,
    *,
    share: Share,
    launch: Launch | None,
    cluster: Cluster | None,
    measure: bool,
    begin: float,
) -> dict[str, Any]:
    """Describe and measure; `asked` is the study whose networks a cluster's worker is asked about."""
    if cluster is not None:
        return _plan_on_cluster(describe, asked, cluster, begin)
    plan = describe(None)
    if not measure or not plan.left:
        return plan.found
    share = share if launch is None else (launch.index, launch.count)
    if not (mine := plan.take(share)).left and launch is None:
        return plan.found
    classes, places = len(load_hierarchy(plan.study).classes), []
    # Of a process of a launch that has nothing left to draw.
    made_up = np.random.default_rng(0).standard_normal((8, classes), np.float32)
    logits = dict.fromkeys(plan.study.classifiers, made_up)
    if mine.left:
        place = mine.measure(classes, time.perf_counter() - begin)
        places, logits = [replace(place, logits={})], place.logits
    if launch is not None:
        told = launch.gather([vars(place) for place in places])
        places = [Place(**each) for places_there in told for each in places_there]
    return _conclude(plan, places, logits) if launch is None or launch.first else plan.found


def _plan_on_cluster(
    describe: Callable[[Told | None], Plan], asked: Study, cluster: Cluster, begin: float
) -> dict[str, Any]:
    with connected(cluster, asked.device) as crew:
        free = crew.count_free()
        (told,) = crew.ask(partial(describe_worker, asked))
        plan = describe(told)
        if not plan.left:
            return plan.found
        count = min(free, -(-plan.left // plan.study.pictures_at_once))
        classes = len(load_hierarchy(plan.study).classes)
        measure = partial(_measure_worker, plan.thin(count), classes, t2iprobe.__version__)
        measured = crew.ask(measure, count)
        # All that is not measuring: connecting, the workers' starts, sending the plan.
        rest = time.perf_counter() - begin - max(seconds for _, seconds in measured)
    places = [
        replace(place, seconds=place.seconds | {"start": rest + place.seconds["start"]})
        for place, _ in measured
    ]
    return _conclude(plan, places, measured[0][0].logits)


def _measure_worker(plan: Plan, classes: int, version: str) -> tuple[Place, float]:
    """Measure on a worker; and how long that took."""
    begin = time.perf_counter()
    agree_on_networks(plan.study, plan.manifest, version)
    return plan.measure(classes, time.perf_counter() - begin), time.perf_counter() - begin


def _conclude(plan: Plan, places: Sequence[Place], logits: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Add to what is known of a plan what it takes: the slowest of the places, and the report."""
    slowest = max(places, key=lambda place: place.total)
    parts = slowest.seconds | {"report": plan.time_report(logits)}
    found = plan.found | {
        "predicted_seconds": sum(parts.values()),
        "seconds": parts,
        "batch_size": slowest.batch_size,
        "lanes": slowest.lanes,
        "places": len(places),
    }
    if slowest.step_seconds is not None:
        found["step_seconds"] = slowest.step_seconds
    if "until" in found and not found["stored"]:
        later = parts["pictures"] * (1 - found["until"]["pictures_first"] / plan.left)
        found["until"] |= {"seconds_first": found["predicted_seconds"] - later}
    return found


def describe_cost(plan: Mapping[str, Any]) -> str:
    """Return in a line what a plan says of its time."""
    seconds, places = plan["predicted_seconds"], plan.get("places", 1)
    if seconds is None:
        return "time left: none"
    by = f"by {places} together" if places > 1 else "here"
    return f"time left {by}: {duration(seconds)} ({plan['batch_size']} pictures at once)"


def _describe_run(study: Study, out: str | Path | None, told: Told | None) -> RunPlan:
    manifest = make_manifest(study, out, told=told)
    plan = Run(Path(out or "."), manifest).plan
    missing = list(range(len(plan)))
    if out is not None and (Path(out) / "manifest.json").exists():
        missing = Run.open(out).missing()  # of a run with a rule: at most
    found = {
        "pictures": len(plan),
        "stored": len(plan) - len(missing),
        "synsets": len(manifest["identity"]["synsets"]),
        "prompts": sum(
            len(prompts) for segment in manifest["plan"] for prompts in segment["prompts"].values()
        ),
        "first_prompt": plan[0].prompt,
        "predicted_seconds": None,
        "configuration": manifest["configuration"],
        "dtype": manifest["identity"]["dtype"],
    }
    if study.until is not None:
        found["until"] = adaptive.describe_plan(manifest, plan)
    return RunPlan(study, found, manifest, missing)


def _describe_sweep(
    study: Study, axes: Mapping[str, Sequence[Any]], out: str | Path | None, told: Told | None
) -> SweepPlan:
    cells = list_cells(study, axes)
    manifests = make_manifests(cells, None if out is None else Path(out), told)
    pictures = [len(build_plan(manifest["plan"], 0)) for manifest in manifests]
    left = [
        count if out is None else count_missing(Path(out) / cell.name, manifest)
        for cell, manifest, count in zip(cells, manifests, pictures, strict=True)
    ]
    found = {
        "cells": [
            {"name": cell.name, **cell.place, "pictures": count, "stored": count - rest}
            for cell, count, rest in zip(cells, pictures, left, strict=True)
        ],
        "pictures": sum(pictures),
        "stored": sum(pictures) - sum(left),
        "synsets": len(manifests[0]["identity"]["synsets"]),
        "predicted_seconds": None,
        "configuration": dump_study(study),
        "dtype": manifests[0]["identity"]["dtype"],
    }
    # An extended cell lacks its last samples.
    missing = [range(count - rest, count) for count, rest in zip(pictures, left, strict=True)]
    return SweepPlan(study, found, axes, cells, manifests, missing)
