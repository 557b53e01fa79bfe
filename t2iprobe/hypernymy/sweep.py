"""A sweep: the same words and noise at every point of a grid of settings, by one loaded model.

    DIR/<cell>/          an ordinary run for each point of the grid
    DIR/sweep.json       what the cells say and how neighbours differ, paired; .html, .csv, .md likewise

A picture's seed comes from its synset and index alone, so that cells are compared pair by pair; only an axis
of seeds changes the noise.
"""

import hashlib
import itertools
import re
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
from t2iprobe.launch import Launch
from t2iprobe.pipelines import find_scheduler, replace_scheduler
from t2iprobe.plans import build_plan
from t2iprobe.runs import WHOLE, Run, Share

__all__ = ["Cell", "list_cells", "run_sweep"]


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
    share: Share = WHOLE,
    launch: Launch | None = None,
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
        share: (i, n) draws the plan positions p with p % n == i of every cell; the last one writes the pages.
        launch: all its processes draw, each its share; the first waits for all and writes the pages.
        extend: allow more samples or synsets than the cells there have.
        progress: called with (pictures of this share of all cells stored or pending, of how many).
    """
    out = Path(out)
    cells = list_cells(study, axes)
    if launch is None:
        networks, runs = _open_cells(study, cells, out, extend)
    else:
        share = (launch.index, launch.count)
        if launch.first:
            networks, runs = _open_cells(study, cells, out, extend)
        launch.agree_on(out)
        if not launch.first:
            networks, runs = _open_cells(study, cells, out, extend)
    shares, done = [len(range(share[0], len(run.plan), share[1])) for run in runs], 0
    for cell, run, size in zip(cells, runs, shares, strict=True):
        with run.writing(share):
            left = run.missing(share)
            done += size - len(left)
            if left:
                assert networks is not None
                networks.turn_to(cell.study)
                told = _shift(progress, done, sum(shares))
                draw(run, left, networks.sampler, networks.scorers, cell.study, told)
                done += len(left)
        if share == WHOLE:
            finish(run)  # as soon as it is there
    if launch is not None:
        launch.wait()
    if (launch is None or launch.first) and all(run.complete for run in runs):
        finish_sweep(cells, runs, axes, out)
    return runs


def finish_sweep(
    cells: Sequence[Cell], runs: Sequence[Run], axes: Mapping[str, Sequence[Any]], out: Path
) -> None:
    """Write the reports of complete cells and the pages of the sweep."""
    from t2iprobe.hypernymy.sweep_results import write_sweep

    for run in runs:
        finish(run)
    write_sweep(list(zip(cells, runs, strict=True)), axes, out)


def _open_cells(
    study: Study, cells: Sequence[Cell], out: Path, extend: bool
) -> "tuple[Networks | None, list[Run]]":
    """Load the networks where anything is missing, and open the runs of the cells."""
    manifests = make_manifests(cells, out)
    missing = sum(count_missing(out / c.name, m) for c, m in zip(cells, manifests, strict=True))
    networks = Networks(study, manifests[0]["identity"]["dtype"]) if missing else None
    if networks is not None:
        for cell in cells:
            networks.turn_to(cell.study)  # whatever a family does not take is told before anything is drawn
    return networks, create_cells(cells, manifests, out, extend=extend)


def make_manifests(
    cells: Sequence[Cell], out: Path | None, told: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Return the manifest of each cell, see `study.make_manifest`; `told` is of the model as it comes."""
    manifests = []
    for cell in cells:
        chosen = {"scheduler": cell.study.scheduler} if cell.study.scheduler else {}
        there = None if told is None else {**told, **chosen}
        manifests.append(make_manifest(cell.study, None if out is None else out / cell.name, told=there))
    return manifests


def create_cells(
    cells: Sequence[Cell], manifests: Sequence[dict[str, Any]], out: Path, *, extend: bool
) -> list[Run]:
    """Make the runs of the cells, or open those that are there."""
    # Those that exist first: one with another identity stops the sweep before new folders are made.
    order = sorted(range(len(cells)), key=lambda index: not (out / cells[index].name).exists())
    made = {index: Run.create(out / cells[index].name, manifests[index], extend=extend) for index in order}
    return [made[index] for index in range(len(cells))]


def count_missing(folder: Path, manifest: Mapping[str, Any]) -> int:
    """Return how many pictures of a cell are not stored."""
    wanted = len(build_plan(manifest["plan"], 0))
    return wanted - len(Run.open(folder).done()) if (folder / "manifest.json").exists() else wanted


def _shift(progress: Progress | None, before: int, total: int) -> Progress | None:
    return None if progress is None else lambda done, of: progress(before + done, total)


class Networks:
    """The loaded model and classifiers, turned from cell to cell."""

    def __init__(self, study: Study, dtype: str, classes: int | None = None) -> None:
        """Load them; `classes` is how many the hierarchy has, where its file is not on this machine."""
        device = resolve_device(study.device)
        own = study.model_copy(update={"scheduler": None})
        self.sampler: DiffusersSampler = load_sampler(own, device, dtype)
        classes = classes or len(load_hierarchy(study).classes)
        self.scorers: dict[str, Scorer] = load_scorers(study, device, classes)
        self._scheduler = getattr(self.sampler.pipeline, "scheduler", None)

    def turn_to(self, study: Study) -> None:
        """Draw by the settings of `study` from now on."""
        if self._scheduler is not None:
            kind = find_scheduler(study.scheduler) if study.scheduler else type(self._scheduler)
            replace_scheduler(self.sampler.pipeline, kind, self._scheduler.config)
        elif study.scheduler:
            family = type(self.sampler.pipeline).__name__
            raise UserError(f"{family} has no single scheduler to replace: leave the scheduler out")
        self.sampler.configure(steps=study.steps, guidance=study.guidance, size=study.size)
