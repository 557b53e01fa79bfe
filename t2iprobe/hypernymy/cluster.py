"""A run on many devices: the processes of one launch, or the workers of a Ray cluster."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import t2iprobe
from t2iprobe.cluster import Cluster, Costs, connected, write_costs
from t2iprobe.config import Study
from t2iprobe.devices import resolve_device
from t2iprobe.errors import UserError
from t2iprobe.hypernymy.adaptive import is_complete, refuse_shares
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

    Workers load the model where they are, and send back logits and the pictures that are kept. The costs so
    far are in ``cluster.json``, too. They are None where nothing was left to draw.
    """
    with connected(cluster, study.device) as crew:
        told = crew.ask(partial(_describe_worker, study))
        manifest = make_manifest(study, out, told=told)
        refuse_shares(Run(Path(out), manifest))
        run = Run.create(out, manifest, extend=extend)
        costs = None
        with run.writing():
            if missing := run.missing():
                classes = len(load_hierarchy(study).classes)

                def tell(costs: Costs) -> None:
                    write_costs(run.path, costs)
                    if show is not None:
                        show(costs)

                def store(shards: Sequence[Shard]) -> None:
                    for shard in shards:
                        run.store(shard)

                costs = crew.work(
                    partial(_load_drawer, study, run.manifest, classes, t2iprobe.__version__),
                    missing,
                    store,
                    size=partial(shard_size, study.pictures_at_once),
                    show=tell,
                )
    if run.complete:
        finish(run)
    return run, costs


def shard_size(batch: int, left: int, places: int, rate: float | None) -> int:
    """Return how many pictures to give a worker: whole batches of about ten seconds, fewer towards the end.

    Whole batches, because then they are those of a single process.
    """
    wanted = 1 if rate is None else int(rate * SHARD_SECONDS / batch)
    fair = math.ceil(left / places / batch)
    return batch * max(1, min(wanted, fair, SHARD_BATCHES))


def _describe_worker(study: Study) -> dict[str, Any]:
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
    identity = manifest["identity"]
    judges = {each["dtype"] for each in identity["classifiers"].values()}
    study = study.model_copy(update={"classifier_dtype": judges.pop()})
    device = resolve_device(study.device)
    scorers = load_scorers(study, device, classes)
    sampler = load_sampler(study, device, identity["dtype"])

    run = _Gathered(manifest)

    def work(positions: Sequence[int]) -> list[Shard]:
        run.gathered = []
        draw(run, positions, sampler, scorers, study)
        return run.gathered

    return work
