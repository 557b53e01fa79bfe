"""What the commands call: settings from words, a folder trained, evaluated or planned."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from t2iprobe.config import parse_settings, preset_values, read_share
from t2iprobe.devices import resolve_device, resolve_dtype
from t2iprobe.errors import UserError, suggest
from t2iprobe.inversion.backbones import Backbone, make_backbone
from t2iprobe.inversion.concepts import Concept, load_concept
from t2iprobe.inversion.embeddings import check_token
from t2iprobe.inversion.methods import find_method
from t2iprobe.inversion.settings import Training
from t2iprobe.inversion.training import (
    Progress,
    evaluate_outcome,
    hash_pictures,
    read_outcome,
    refuse_broken,
    time_steps,
    train_concepts,
    train_jobs,
)
from t2iprobe.pipelines import load_pipeline, model_hash


def load_training(given: Mapping[str, Any], settings: Sequence[str] | None = None) -> Training:
    """Build the settings of a training; None leaves one to its default. Raises UserError for a bad one.

    Where the model is a preset's, its steps and guidance are the preset's.
    """
    values = {key: value for key, value in given.items() if value is not None}
    values |= parse_settings(settings or [])
    for key in values:
        if key not in Training.model_fields:
            near = suggest(key, Training.model_fields) or f": known are {', '.join(Training.model_fields)}"
            raise UserError(f"unknown setting {key!r}{near}")
    values = preset_values(values.get("model", "embedded"), ("steps", "guidance", "variant")) | values
    try:
        training = Training(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"bad value for {first['loc'][0]}: {first['input']!r} ({first['msg'].lower()})"
        ) from None
    find_method(training.method)
    return training


def load_backbone(settings: Training) -> Backbone:
    """Load the model of a training onto its device."""
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device)
    pipeline = load_pipeline(settings.model, device=device, dtype=dtype, variant=settings.variant)
    return make_backbone(pipeline, dtype=dtype, size=settings.size)


def read_concept(
    folder: Path, token: str, settings: Training, backbone: Backbone, *, skip_bad: bool = False
) -> Concept:
    """Read a folder as a concept for a backbone."""
    return load_concept(
        folder,
        token,
        size=backbone.size,
        templates=settings.templates,
        background=settings.background,
        skip_bad=skip_bad,
    )


def train_folder(
    folder: Path,
    token: str,
    settings: Training,
    out: Path,
    *,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train one folder's concept into `out`, or continue. Returns training.json."""
    check_token(token, [])
    if not folder.is_dir():  # said before a model is loaded
        raise UserError(f"there is no folder {folder}: give one with a few pictures of the concept")
    backbone = load_backbone(settings)
    concept = read_concept(folder, token, settings, backbone, skip_bad=skip_bad)
    return train_concepts(backbone, [(concept, out)], settings, progress=progress)[0]


def train_folders(
    folder: Path,
    settings: Training,
    out: Path,
    *,
    shard: str = "0/1",
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Train every subfolder's concept into ``out/<its name>``, several in one pass, or continue.

    The token of ``My Cat`` is ``<my-cat>``. `shard` i/n takes every n-th subfolder, from the i-th.
    Returns subfolder → training.json.
    """
    index, count = read_share(shard)
    chosen = dict(list(list_concepts(folder).items())[index::count])
    outcomes = train_chosen(chosen, settings, out, skip_bad=skip_bad, progress=progress)
    refuse_broken(list(outcomes.values()))  # at the end: one bad concept keeps no other from training
    return outcomes


def list_concepts(folder: Path) -> dict[Path, str]:
    """Return subfolder → token, sorted.

    Raises UserError where there is none, a name makes no token, or two make the same.
    """
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}: give one with a subfolder of pictures for each concept"
        )
    found = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    if not found:
        raise UserError(f"{folder} has no subfolders: each concept needs its own")
    named: dict[str, Path] = {}
    for path in found:
        token = name_token(path.name)
        if token == "<>":
            raise UserError(f"the folder {path} makes no token: give it a name with a letter a-z or a digit")
        if token in named:
            raise UserError(f"the folders {named[token]} and {path} make the same token {token}: rename one")
        named[token] = path
    return {path: token for token, path in named.items()}


def train_chosen(
    concepts: Mapping[Path, str],
    settings: Training,
    out: Path,
    *,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Train subfolders (→ token) as `train_folders` does, without a look at broken losses."""
    if not concepts:
        return {}
    backbone = load_backbone(settings)
    jobs = [
        (read_concept(path, token, settings, backbone, skip_bad=skip_bad), out / path.name)
        for path, token in concepts.items()
    ]
    trained = train_jobs(backbone, jobs, settings, progress=progress)
    return {path.name: outcome for path, outcome in zip(concepts, trained, strict=True)}


def name_token(name: str) -> str:
    """Return the token for a folder or word: ``My Cat`` and ``my_cat`` become ``<my-cat>``."""
    words = "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in name.lower())
    return f"<{'-'.join(part for part in words.split('-') if part)}>"


def plan_training(folder: Path, token: str, settings: Training, *, skip_bad: bool = False) -> dict[str, Any]:
    """Describe what a training would do and cost, by a few steps that are thrown away. Writes nothing."""
    backbone = load_backbone(settings)
    concept = read_concept(folder, token, settings, backbone, skip_bad=skip_bad)
    seconds = time_steps(backbone, concept, settings)
    most = settings.max_steps or find_method(settings.method).max_steps
    return {
        "pictures": len(concept.pictures),
        "method": settings.method,
        "model": settings.model,
        "max_steps": most,
        "seconds_per_step": seconds,
        "seconds": seconds * most,
    }


def evaluate_folder(out: Path, pictures: int, features: str | None = None) -> dict[str, Any]:
    """Evaluate what was trained into `out` with `pictures` a prompt. Returns training.json, rewritten.

    Raises UserError where the model or the concept's pictures are no longer those of the training.
    """
    if pictures < 1:
        raise UserError(f"--pictures is {pictures}: draw 1 or more for each prompt")
    outcome = read_outcome(out)
    try:
        settings = Training(**outcome["settings"])
        folder = Path(outcome["pictures"][0]).parent
        begun = ",".join(outcome["initial"]["words"]) or settings.init
        trained_with = outcome["model_hash"]
    except (ValidationError, KeyError, IndexError, TypeError):
        raise UserError(f"{out / 'training.json'} is damaged: its settings or pictures are none") from None
    changes = {"evaluate": pictures, "init": begun, "features": features or settings.features}
    settings = settings.model_copy(update=changes)
    if model_hash(settings.model, variant=settings.variant) != trained_with:
        raise UserError(f"{settings.model} is not the model that {out} was trained with: put that back")
    backbone = load_backbone(settings)
    concept = read_concept(folder, outcome["token"], settings, backbone, skip_bad=True)
    found = hash_pictures(concept)
    if outcome.get("pictures_hash", found) != found:
        raise UserError(f"the pictures in {folder} are not those that {out} was trained with: put those back")
    return evaluate_outcome(backbone, concept, settings, out, outcome)
