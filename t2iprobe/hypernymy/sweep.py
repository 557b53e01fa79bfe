"""A sweep: the same words and noise at every point of a grid of settings, by one loaded model.

    DIR/<cell>/          an ordinary run for each point of the grid
    DIR/sweep.json       what the cells say and how neighbours differ, paired; .html, .csv, .md likewise

A picture's seed comes from its synset and index alone, so that cells are compared pair by pair; only an axis
of seeds changes the noise.
"""

import hashlib
import itertools
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2iprobe.config import SWEPT, Study, dump_study, make_study
from t2iprobe.devices import resolve_device
from t2iprobe.errors import UserError
from t2iprobe.hypernymy.sampling import DiffusersSampler
from t2iprobe.hypernymy.scoring import Scorer
from t2iprobe.hypernymy.study import (
    Progress,
    draw,
    finish,
    load_hierarchy,
    load_sampler,
    load_scorers,
    make_manifest,
)
from t2iprobe.pipelines import find_scheduler
from t2iprobe.plans import build_plan
from t2iprobe.runs import Run

__all__ = ["Cell", "list_cells", "plan_sweep", "run_sweep"]


@dataclass(frozen=True)
class Cell:
    """A point of the grid: its place on each axis, its run's folder, its study."""

    place: Mapping[str, Any]
    name: str
    study: Study


def list_cells(study: Study, axes: Mapping[str, Sequence[Any]]) -> list[Cell]:
    """Return the grid's product, the last axis changing fastest; numbers in ascending order.

    Raises UserError for a value that a study cannot have.
    """
    if study.until is not None:
        raise UserError("cells of a sweep hold as many pictures each: leave until out")
    given = dump_study(study)
    if "template" in axes:
        given |= {"common_seeds": True, "mean_conditioning": False}
    cells: dict[str, Cell] = {}
    for values in itertools.product(*axes.values()):
        place = dict(zip(axes, values, strict=True))
        varied = make_study(given | {SWEPT[axis]: value for axis, value in place.items()})
        if varied.scheduler is not None:
            find_scheduler(varied.scheduler)
        # As the study reads them: 5 and 5.0 are one guidance.
        place = {axis: _read_setting(varied, axis) for axis in axes}
        cells.setdefault(_name(place), Cell(place, _name(place), varied))
    return sorted(cells.values(), key=lambda cell: [_order(value) for value in cell.place.values()])


def _read_setting(study: Study, axis: str) -> Any:
    value = getattr(study, SWEPT[axis])
    return value[0] if axis == "template" else value


def _order(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0  # words keep the order that they came in


def _name(place: Mapping[str, Any]) -> str:
    return "_".join(f"{axis}-{_slug(value)}" for axis, value in place.items())


def _slug(value: Any) -> str:
    text = "own" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    if re.fullmatch(r"[\w.]{1,40}", text):
        return text
    words = re.sub(r"[^A-Za-z0-9]+", "-", text)[:24].strip("-")
    return f"{words}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def run_sweep(
    study: Study,
    axes: Mapping[str, Sequence[Any]],
    out: str | Path,
    *,
    extend: bool = False,
    progress: Progress | None = None,
) -> list[Run]:
    """Draw and judge every cell in ``out/<cell>``, or go on with what is there, then write the sweep's pages.

    The model and the classifiers are loaded once and a prompt is encoded once. Raises UserError for a cell
    that cannot be drawn, before anything is.

    Args:
        study: what the cells have in common.
        axes: axis (see `config.SWEPT`) → values.
        out: folder of the sweep.
        extend: allow more samples or synsets than the cells there have.
        progress: called with (pictures of all cells stored or pending, of how many).
    """
    from t2iprobe.hypernymy.sweep_results import write_sweep

    out = Path(out)
    cells = list_cells(study, axes)
    manifests = [make_manifest(cell.study, out / cell.name) for cell in cells]
    missing = sum(_count_missing(out / c.name, m) for c, m in zip(cells, manifests, strict=True))
    bench = _Bench(study, manifests[0]["identity"]["dtype"]) if missing else None
    if bench is not None:
        for cell in cells:
            bench.turn_to(cell.study)  # whatever a family does not take is told before anything is drawn
    # Those that exist first: one with another identity stops the sweep before new folders are made.
    order = sorted(range(len(cells)), key=lambda index: not (out / cells[index].name).exists())
    made = {index: Run.create(out / cells[index].name, manifests[index], extend=extend) for index in order}
    total, done = sum(len(run.plan) for run in made.values()), 0
    for index, cell in enumerate(cells):
        run = made[index]
        with run.writing():
            left = run.missing()
            done += len(run.plan) - len(left)
            if left:
                assert bench is not None
                bench.turn_to(cell.study)
                told = _shift(progress, done, total)
                draw(run, left, bench.sampler, bench.scorers, cell.study, told)
                done += len(left)
        finish(run)
    runs = [made[index] for index in range(len(cells))]
    write_sweep(list(zip(cells, runs, strict=True)), axes, out)
    return runs


def _count_missing(folder: Path, manifest: Mapping[str, Any]) -> int:
    wanted = len(build_plan(manifest["plan"], 0))
    return wanted - len(Run.open(folder).done()) if (folder / "manifest.json").exists() else wanted


def _shift(progress: Progress | None, before: int, total: int) -> Progress | None:
    return None if progress is None else lambda done, of: progress(before + done, total)


class _Bench:
    """The loaded model and classifiers, turned from cell to cell."""

    def __init__(self, study: Study, dtype: str) -> None:
        device = resolve_device(study.device)
        own = study.model_copy(update={"scheduler": None})
        self.sampler: DiffusersSampler = load_sampler(own, device, dtype)
        self.scorers: dict[str, Scorer] = load_scorers(study, device, len(load_hierarchy(study).classes))
        self._scheduler = getattr(self.sampler.pipeline, "scheduler", None)

    def turn_to(self, study: Study) -> None:
        """Draw by the settings of `study` from now on."""
        if self._scheduler is not None:
            kind = find_scheduler(study.scheduler) if study.scheduler else type(self._scheduler)
            self.sampler.pipeline.scheduler = kind.from_config(self._scheduler.config)
        elif study.scheduler:
            family = type(self.sampler.pipeline).__name__
            raise UserError(f"{family} has no single scheduler to replace: leave the scheduler out")
        self.sampler.configure(steps=study.steps, guidance=study.guidance, size=study.size)


def plan_sweep(
    study: Study, axes: Mapping[str, Sequence[Any]], out: str | Path | None, *, measure: bool = True
) -> dict[str, Any]:
    """Describe what a sweep would do: its cells, what of them is stored, and the seconds. Writes nothing.

    The time is measured by a few batches at the fewest and at the most steps of each kind of cell (scheduler,
    size, with or without guidance), which are thrown away; between them a step costs the same.
    """
    cells = list_cells(study, axes)
    manifests = [make_manifest(cell.study, None if out is None else Path(out) / cell.name) for cell in cells]
    pictures = [len(build_plan(manifest["plan"], 0)) for manifest in manifests]
    left = [
        count if out is None else _count_missing(Path(out) / cell.name, manifest)
        for cell, manifest, count in zip(cells, manifests, pictures, strict=True)
    ]
    seconds = None
    if measure and any(left):
        each = _measure_cells(study, cells, manifests[0])
        seconds = sum(time * count for time, count in zip(each, left, strict=True))
    return {
        "cells": [
            {"name": cell.name, **cell.place, "pictures": count, "stored": count - rest}
            for cell, count, rest in zip(cells, pictures, left, strict=True)
        ],
        "pictures": sum(pictures),
        "stored": sum(pictures) - sum(left),
        "synsets": len(manifests[0]["identity"]["synsets"]),
        "predicted_seconds": seconds,
        "configuration": dump_study(study),
        "dtype": manifests[0]["identity"]["dtype"],
    }


def _measure_cells(study: Study, cells: Sequence[Cell], manifest: Mapping[str, Any]) -> list[float]:
    """Seconds a picture of each cell."""
    bench = _Bench(study, manifest["identity"]["dtype"])
    pictures = len(build_plan(manifest["plan"], study.seed))
    count = min(pictures, 2 * bench.sampler.lanes * study.pictures_at_once)

    def measure(cell: Cell) -> float:
        bench.turn_to(cell.study)
        with tempfile.TemporaryDirectory() as folder:
            run = Run.create(folder, dict(manifest))
            begin = time.perf_counter()
            draw(run, range(count), bench.sampler, bench.scorers, cell.study)
            return (time.perf_counter() - begin) / count

    measure(cells[0])  # the first call of a network sets it up, and encodes the prompts
    kinds: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        kinds.setdefault(_kind(cell), []).append(cell)
    found = {}
    for kind, members in kinds.items():
        members = sorted(members, key=_steps)
        few, many = members[0], members[-1]
        ends = [(_steps(few), measure(few))]
        if _steps(many) > _steps(few):
            ends.append((_steps(many), measure(many)))
        found[kind] = ends
    return [_interpolate(found[_kind(cell)], _steps(cell)) for cell in cells]


def _kind(cell: Cell) -> tuple[Any, ...]:
    study = cell.study
    return study.scheduler, study.size, study.guidance is None or study.guidance > 1


def _steps(cell: Cell) -> int:
    return cell.study.steps or 0


def _interpolate(ends: Sequence[tuple[int, float]], steps: int) -> float:
    (few, least), (many, most) = ends[0], ends[-1]
    return least if many == few else least + (most - least) * (steps - few) / (many - few)
