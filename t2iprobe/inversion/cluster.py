"""Many concepts on many devices: by the processes of one launch, or a group a worker on a Ray cluster."""

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import t2iprobe
from t2iprobe.cluster import Cluster, Costs, connected, write_costs
from t2iprobe.errors import UserError
from t2iprobe.inversion.commands import list_concepts, load_backbone, read_concept, train_chosen
from t2iprobe.inversion.concepts import Concept, load_concept
from t2iprobe.inversion.folders import NAME, claim_folder
from t2iprobe.inversion.methods import find_method
from t2iprobe.inversion.settings import Training
from t2iprobe.inversion.training import (
    Progress,
    find_finished,
    identify,
    read_outcome,
    refuse_broken,
    train_jobs,
    write_outcome,
)
from t2iprobe.launch import Launch
from t2iprobe.pipelines import model_hash
from t2iprobe.storage import explain_full_disk, write_atomically

_READ_SIDE = 8  # pixels: the driver reads pictures to see that they can be read
_STATE = "state.safetensors"
Outcomes = dict[str, dict[str, Any]]


def train_launched(
    folder: Path,
    settings: Training,
    out: Path,
    launch: Launch,
    *,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> Outcomes:
    """Train every subfolder's concept by all processes of a launch, each its share of them.

    Returns subfolder → training.json in the first process, nothing in the others. Raises UserError where
    `out` is not one folder for all of them, where one died, and in the first where a loss was not a number.
    """
    concepts = list_concepts(folder)
    if launch.first:
        _make_folder(out)
    launch.agree_on(out)
    chosen = dict(list(concepts.items())[launch.index :: launch.count])
    train_chosen(chosen, settings, out, skip_bad=skip_bad, progress=progress)
    launch.wait()
    if not launch.first:
        return {}
    outcomes = {path.name: read_outcome(out / path.name) for path in concepts}
    refuse_broken(list(outcomes.values()))
    return outcomes


def train_on_cluster(
    folder: Path,
    settings: Training,
    out: Path,
    cluster: Cluster,
    *,
    skip_bad: bool = False,
    show: Callable[[Costs], None] | None = None,
) -> tuple[Outcomes, Costs | None]:
    """Train every subfolder's concept on a cluster, a group of `together` a worker, into `out` here.

    Workers are sent the pictures and send back what a training writes. The costs so far are in
    ``cluster.json``, too. Returns subfolder → training.json, and the costs, None where nothing was left.
    """
    loaded = {
        path.name: load_concept(
            path,
            token,
            size=_READ_SIDE,
            templates=settings.templates,
            background=settings.background,
            skip_bad=skip_bad,
        )
        for path, token in list_concepts(folder).items()
    }
    costs = None
    with connected(cluster, settings.device) as crew:
        (model,) = crew.ask(partial(model_hash, settings.model, variant=settings.variant))
        identities = {name: identify(settings, concept, model) for name, concept in loaded.items()}
        missing = [name for name, identity in identities.items() if not find_finished(out / name, identity)]
        _make_folder(out)

        def tell(costs: Costs) -> None:
            write_costs(out, costs)
            if show is not None:
                show(costs)

        def store(found: dict[str, dict[str, bytes]]) -> None:
            for name, files in found.items():
                _store(out / name, files, loaded[name])

        if missing:
            together = settings.together if find_method(settings.method).shares_pass else 1
            costs = crew.work(
                partial(_load_trainer, settings, model, t2iprobe.__version__),
                [missing],
                store,
                size=partial(group_size, together),
                pack=lambda names: [_pack(name, loaded[name], out / name) for name in names],
                show=tell,
            )
    outcomes = {name: read_outcome(out / name) for name in loaded}
    refuse_broken(list(outcomes.values()))
    return outcomes, costs


def group_size(together: int, left: int, places: int, rate: float | None) -> int:
    """Return how many concepts to give a worker: as many as share a pass, fewer where workers would idle."""
    return max(1, min(together, math.ceil(left / places)))


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {out} ({error.strerror}): give another --out") from None


class _Sent(NamedTuple):
    """A concept on its way to a worker: its pictures and captions, and the files of a training that began."""

    name: str
    token: str
    pictures: dict[str, bytes]
    begun: dict[str, bytes]


def _pack(name: str, concept: Concept, out: Path) -> _Sent:
    captions = [file.with_suffix(".txt") for file in concept.files]
    files = [*concept.files, *(path for path in captions if path.is_file())]
    begun = [out / each for each in (NAME, _STATE)] if (out / _STATE).exists() else []
    pictures, state = ({path.name: path.read_bytes() for path in paths} for paths in (files, begun))
    return _Sent(name, concept.token, pictures, state)


def _store(out: Path, files: dict[str, bytes], concept: Concept) -> None:
    """Write what a worker's training left; its outcome last, for it is what counts as done."""
    claim_folder(out, json.loads(files.pop(NAME)))
    outcome = json.loads(files.pop("training.json"))
    outcome["pictures"] = [str(path) for path in concept.files]  # the worker's lay elsewhere
    with explain_full_disk(out):
        for name, content in files.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(out / name, content)
    write_outcome(out, outcome)


def _load_trainer(
    settings: Training, model: str, version: str
) -> Callable[[Sequence[_Sent]], dict[str, dict[str, bytes]]]:
    """Load the model on a worker; returns what trains a group there: name → file → its content."""
    if version != t2iprobe.__version__:
        raise UserError(
            f"t2iprobe {version} was called, a worker has {t2iprobe.__version__}: install one of them on all"
        )
    if model_hash(settings.model, variant=settings.variant) != model:
        raise UserError(
            f"a worker has another model under the name {settings.model} than the first one asked: put the "
            "same files at the same path on every machine"
        )
    backbone = load_backbone(settings)

    def work(group: Sequence[_Sent]) -> dict[str, dict[str, bytes]]:
        with tempfile.TemporaryDirectory(prefix="t2iprobe-") as temporary:
            jobs = []
            for sent in group:
                pictures, out = (Path(temporary, kind, sent.name) for kind in ("pictures", "out"))
                for folder, files in ((pictures, sent.pictures), (out, sent.begun)):
                    folder.mkdir(parents=True)
                    for name, content in files.items():
                        (folder / name).write_bytes(content)
                jobs.append((read_concept(pictures, sent.token, settings, backbone), out))
            train_jobs(backbone, jobs, settings)
            return {out.name: _gather(out) for _, out in jobs}

    return work


def _gather(out: Path) -> dict[str, bytes]:
    files = (path for path in sorted(out.rglob("*")) if path.is_file() and path.name != "report.html")
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}
