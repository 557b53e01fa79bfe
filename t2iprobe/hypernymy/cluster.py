"""A run or a sweep on many devices: the processes of one launch, or the workers of a Ray cluster."""

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import t2iprobe
from t2iprobe.cluster import Cluster, Costs, connected, write_costs
from t2iprobe.config import Study
from t2iprobe.devices import resolve_device
from t2iprobe.errors import UserError
from t2iprobe.hypernymy.adaptive import is_complete, list_rounds
from t2iprobe.hypernymy.drawing import SHARD_SECONDS, Progress, draw
from t2iprobe.hypernymy.study import (
    NETWORKS,
    describe_place,
    draw_share,
    finish,
    hash_networks,
    load_hierarchy,
    load_sampler,
    load_scorers,
    make_manifest,
)
from t2iprobe.hypernymy.sweep import Cell, Networks, create_cells, finish_sweep, list_cells, make_manifests
from t2iprobe.launch import Launch
from t2iprobe.runs import Run, Shard

SHARD_BATCHES = 16  # of a shard, at most: what a dead worker can cost


def run_launched(
    study: Study,
    out: str | Path,
    launch: Launch,
    *,
    extend: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Run a study by all processes of a launch, each its share; the first waits for all and reports.

    Raises UserError where `out` is not one folder for all of them, and where one of them died.
    """
    if launch.first:
        run = Run.create(out, make_manifest(study, out), extend=extend)
    launch.agree_on(Path(out))
    if not launch.first:
        run = Run.create(out, make_manifest(study, out), extend=extend)
    draw_share(run, study, (launch.index, launch.count), progress=progress, wait=launch.wait)
    launch.wait()
    if launch.first and is_complete(run):
        finish(run)
    return run


def run_on_cluster(
    study: Study,
    out: str | Path,
    cluster: Cluster,
    *,
    extend: bool = False,
    show: Callable[[Costs], None] | None = None,
) -> tuple[Run, Costs | None]:
    """Run a study on a cluster, into a run directory of this machine; the second is what it cost.

    Workers load the model where they are, and send back logits and the pictures that are kept. With a rule
    they draw one look's pictures after another, which this machine decides on. The costs so far are in
    ``cluster.json``, too. They are None where nothing was left to draw.
    """
    with connected(cluster, study.device) as crew:
        (told,) = crew.ask(partial(describe_worker, study))
        run = Run.create(out, make_manifest(study, out, told=told), extend=extend)
        costs = None
        with run.writing():
            rounds = list_rounds(run)
            if first := next(rounds, None):
                classes = len(load_hierarchy(study).classes)

                def store(shards: Sequence[Shard]) -> None:
                    for shard in shards:
                        run.store(shard)

                costs = crew.work(
                    partial(_load_drawer, study, run.manifest, classes, t2iprobe.__version__),
                    itertools.chain([first], rounds),
                    store,
                    size=partial(shard_size, study.pictures_at_once),
                    show=partial(_tell, run.path, show),
                )
    if is_complete(run):
        finish(run)
    return run, costs


def sweep_on_cluster(
    study: Study,
    axes: Mapping[str, Sequence[Any]],
    out: str | Path,
    cluster: Cluster,
    *,
    extend: bool = False,
    show: Callable[[Costs], None] | None = None,
) -> tuple[list[Run], Costs | None]:
    """Draw a sweep's cells on a cluster, as `sweep.run_sweep` does here; the second is what it cost.

    A worker loads the networks once, and turns them to the cell that its shard is of.
    """
    out = Path(out)
    cells = list_cells(study, axes)
    own = study.model_copy(update={"scheduler": None})
    with connected(cluster, study.device) as crew, contextlib.ExitStack() as locks:
        (told,) = crew.ask(partial(describe_worker, own))
        manifests = make_manifests(cells, out, told)
        runs = create_cells(cells, manifests, out, extend=extend)
        for run in runs:
            locks.enter_context(run.writing())
        costs = None
        if missing := [(number, p) for number, run in enumerate(runs) for p in run.missing()]:
            classes = len(load_hierarchy(study).classes)

            def store(found: Sequence[tuple[int, Shard]]) -> None:
                for number, shard in found:
                    runs[number].store(shard)

            told_all = (own, cells, [run.manifest for run in runs], classes, t2iprobe.__version__)
            costs = crew.work(
                partial(_load_sweeper, *told_all),
                [missing],
                store,
                size=partial(shard_size, study.pictures_at_once),
                show=partial(_tell, out, show),
            )
    finish_sweep(cells, runs, axes, out)
    return runs, costs


def _tell(folder: Path, show: Callable[[Costs], None] | None, costs: Costs) -> None:
    write_costs(folder, costs)
    if show is not None:
        show(costs)


def shard_size(batch: int, left: int, places: int, rate: float | None) -> int:
    """Return how many pictures to give a worker: whole batches of about ten seconds, fewer towards the end.

    Whole batches, because then they are those of a single process.
    """
    wanted = 1 if rate is None else int(rate * SHARD_SECONDS / batch)
    fair = math.ceil(left / places / batch)
    return batch * max(1, min(wanted, fair, SHARD_BATCHES))


def describe_worker(study: Study) -> dict[str, Any]:
    """Say on a worker what a manifest takes from there, see `study.make_manifest`."""
    return {**describe_place(study), **hash_networks(study)}


class _Gathered(Run):
    """A run that keeps in memory what is written to it, on a machine without its directory."""

    def __init__(self, manifest: dict[str, Any]) -> None:
        super().__init__(Path("."), manifest)
        self.gathered: list[Shard] = []

    def store(self, shard: Shard) -> None:
        self.gathered.append(shard)


def _load_drawer(
    study: Study, manifest: dict[str, Any], classes: int, version: str
) -> Callable[[Sequence[int]], list[Shard]]:
    """Load the study's networks on a worker; returns what draws and judges plan positions there.

    Raises UserError where they are not those that the run began with.
    """
    study = agree_on_networks(study, manifest, version)
    device = resolve_device(study.device)
    scorers = load_scorers(study, device, classes)
    sampler = load_sampler(study, device, manifest["identity"]["dtype"])

    run = _Gathered(manifest)

    def work(positions: Sequence[int]) -> list[Shard]:
        run.gathered = []
        draw(run, positions, sampler, scorers, study)
        return run.gathered

    return work


def _load_sweeper(
    study: Study, cells: Sequence[Cell], manifests: Sequence[dict[str, Any]], classes: int, version: str
) -> Callable[[Sequence[tuple[int, int]]], list[tuple[int, Shard]]]:
    """As `_load_drawer`, for (number of a cell, plan position)."""
    study = agree_on_networks(study, manifests[0], version)
    networks = Networks(study, manifests[0]["identity"]["dtype"], classes)
    for cell in cells:
        networks.turn_to(cell.study)  # whatever a family does not take is told before anything is drawn
    runs = [_Gathered(manifest) for manifest in manifests]

    def work(items: Sequence[tuple[int, int]]) -> list[tuple[int, Shard]]:
        found: list[tuple[int, Shard]] = []
        for number, group in itertools.groupby(items, key=lambda item: item[0]):
            study, run = cells[number].study, runs[number]
            networks.turn_to(study)
            run.gathered = []
            draw(run, [position for _, position in group], networks.sampler, networks.scorers, study)
            found += [(number, shard) for shard in run.gathered]
        return found

    return work


def agree_on_networks(study: Study, manifest: Mapping[str, Any], version: str) -> Study:
    """Return the study with the judges' dtype that the run began with.

    Raises UserError where the networks of this machine are not those that it began with.
    """
    if version != t2iprobe.__version__:
        raise UserError(
            f"t2iprobe {version} was called, a worker has {t2iprobe.__version__}: install one of them on all"
        )
    found = hash_networks(study)
    if differing := [name for name in NETWORKS if found[name] != manifest["inputs"][name]]:
        raise UserError(
            f"a worker has another {differing[0]} under the same name than the run began with: put the same "
            "files at the same path on every machine"
        )
    judges = {each["dtype"] for each in manifest["identity"]["classifiers"].values()}
    return study.model_copy(update={"classifier_dtype": judges.pop()})
