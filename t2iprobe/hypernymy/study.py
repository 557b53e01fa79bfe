"""The study: plan → sample → score → store → analyse → report. It can be killed and continued anywhere."""

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t2iprobe.config import Study, dump_study
from t2iprobe.devices import resolve_device, resolve_dtype
from t2iprobe.errors import UserError
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.hypernymy.prompts import MEAN
from t2iprobe.hypernymy.sampling import (
    DiffusersSampler,
    FolderSampler,
    Sampler,
    list_pictures,
    resize_picture,
)
from t2iprobe.hypernymy.scoring import Scorer, load_scorer, scorer_hash
from t2iprobe.machine import list_versions
from t2iprobe.pipelines import load_pipeline, model_hash, read_scheduler
from t2iprobe.runs import SCHEMA, WHOLE, PlanEntry, Run, Share
from t2iprobe.storage import hash_files
from t2iprobe.wordnet import WORDNET_HASH

SHARD_PICTURES, SHARD_SECONDS = 32, 10.0  # a shard is written after either: what a kill can cost

Progress = Callable[[int, int], None]  # pictures of this share stored or pending, of how many


def run_study(
    study: Study,
    out: str | Path,
    *,
    share: Share = WHOLE,
    extend: bool = False,
    folder: Path | None = None,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Run a study in the directory `out`, or continue the one there. The last share to finish reports.

    Args:
        study: the settings.
        out: run directory.
        share: (i, n) draws the plan positions p with p % n == i, so that n processes share a run.
        extend: allow more samples or synsets than the run there has.
        folder: judge the pictures ``folder/<synset>/*`` instead of drawing.
        skip_bad: go on without pictures of `folder` that cannot be read.
        progress: called with (done, of) after each batch.
    """
    run = Run.create(out, make_manifest(study, out, folder), extend=extend)
    draw_share(run, study, share, folder=folder, skip_bad=skip_bad, progress=progress)
    if run.complete:
        finish(run)
    return run


def draw_share(
    run: Run,
    study: Study,
    share: Share = WHOLE,
    *,
    folder: Path | None = None,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> None:
    """Draw, judge and store what a share of an open run lacks; arguments as in `run_study`."""
    with run.writing(share):
        missing = run.missing(share)
        if missing:
            device = resolve_device(study.device)
            scorers = load_scorers(study, device, len(load_hierarchy(study).classes))
            sampler: Sampler
            if folder is not None:
                sampler = FolderSampler(folder, skip_bad=skip_bad)
            else:
                sampler = load_sampler(study, device, run.manifest["identity"]["dtype"])
            draw(run, missing, sampler, scorers, study, progress)


def draw(
    run: Run,
    missing: Sequence[int],
    sampler: Sampler,
    scorers: Mapping[str, Scorer],
    study: Study,
    progress: Progress | None = None,
) -> None:
    """Draw, judge and store the pictures at the plan positions `missing`.

    Whatever stops it, what is judged by then is stored.
    """
    pending = _Pending(run)
    try:
        for start in range(0, len(missing), study.batch_size):
            positions = missing[start : start + study.batch_size]
            pictures = sampler.sample([run.plan[position] for position in positions])
            if study.resize is not None:
                pictures = [p if p is None else resize_picture(p, study.resize) for p in pictures]
            pending.add(positions, pictures, score_pictures(pictures, scorers))
            if progress is not None:
                progress(start + len(positions), len(missing))
    finally:
        pending.flush()


def score_pictures(
    pictures: Sequence[np.ndarray | None], scorers: Mapping[str, Scorer]
) -> dict[str, np.ndarray]:
    """Return classifier → logits float32 [n, C], zero where a picture is None."""
    rows = [row for row, picture in enumerate(pictures) if picture is not None]
    readable = [picture for picture in pictures if picture is not None]
    logits = {}
    for name, scorer in scorers.items():
        logits[name] = np.zeros((len(pictures), scorer.classes), np.float32)
        if rows:
            logits[name][rows] = scorer.score(readable)
    return logits


class _Pending:
    """Judged pictures that wait to be stored together: a shard a picture would be many small files."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._clear()

    def _clear(self) -> None:
        self.since = time.monotonic()
        self.positions: list[int] = []
        self.pictures: list[np.ndarray | None] = []
        self.logits: dict[str, list[np.ndarray]] = {}

    def add(
        self, positions: Sequence[int], pictures: Sequence[np.ndarray | None], logits: dict[str, np.ndarray]
    ) -> None:
        self.positions += positions
        self.pictures += pictures
        for name, values in logits.items():
            self.logits.setdefault(name, []).append(values)
        if len(self.positions) >= SHARD_PICTURES or time.monotonic() - self.since > SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self.positions:
            logits = {name: np.concatenate(values) for name, values in self.logits.items()}
            self.run.write_shard(self.positions, logits, self.pictures)
        self._clear()


def finish(run: Run) -> None:
    """Write the report of a complete run, unless it is there and newer than every shard."""
    written = [run.path / name for name in ("report.html", "results.json")]
    newest = max(shard.stat().st_mtime_ns for shard in run.shards)
    if any(not path.exists() or path.stat().st_mtime_ns < newest for path in written):
        from t2iprobe.hypernymy.report import write_report

        write_report(run)
    if run.manifest["identity"].get("languages"):
        from t2iprobe.hypernymy.languages import write_language_results

        write_language_results(run)
    templates = next(iter(run.manifest["plan"][0]["prompts"].values()))
    if run.manifest["identity"].get("common_seeds") and len(templates) > 1:
        from t2iprobe.hypernymy.templates import write_template_report

        page = run.path / "templates.html"
        if not page.exists() or page.stat().st_mtime_ns < newest:
            write_template_report([run], page)


def load_hierarchy(study: Study) -> Hierarchy:
    """Return the synsets above the classifiers' classes: ImageNet-1k's, or those of the study's CSV."""
    return Hierarchy.from_csv(study.hierarchy) if study.hierarchy else Hierarchy.imagenet()


def load_sampler(study: Study, device: str, dtype: str) -> DiffusersSampler:
    """Load the study's model as a sampler."""
    pipeline = load_pipeline(
        study.model, device=device, dtype=dtype, variant=study.variant, scheduler=study.scheduler
    )
    return DiffusersSampler(
        pipeline,
        steps=study.steps,
        guidance=study.guidance,
        size=study.size,
        dtype=dtype,
        average_lines=study.mean_conditioning,
    )


def load_scorers(study: Study, device: str, classes: int) -> dict[str, Scorer]:
    """Load the study's classifiers, by name."""
    return {
        name: load_scorer(name, device=device, dtype=study.classifier_dtype, classes=classes)
        for name in study.classifiers
    }


def make_manifest(
    study: Study,
    out: str | Path | None = None,
    folder: Path | None = None,
    told: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the manifest of a study: what every number of it will depend on.

    `told` is what `describe_place` and `hash_networks` said where the pictures will be drawn, if not here.
    Where `out` holds a run of the same settings and inputs, its manifest is returned as it is: no network is
    loaded to see that, and an ``auto`` keeps the meaning it had when the run began, on whatever machine.
    """
    configuration = dump_study(study) | ({"folder": str(folder)} if folder else {})
    inputs = hash_inputs(study, folder, told)
    if out is not None and (Path(out) / "manifest.json").exists():
        stored = Run.open(out).manifest
        if stored["configuration"] == configuration and stored["inputs"] == inputs:
            return stored
    hierarchy = load_hierarchy(study)
    prompts = _list_folder(folder, hierarchy) if folder else write_prompts(study, hierarchy)
    samples = 1 if folder else study.samples
    place = describe_place(study, judges_only=folder is not None) if told is None else told
    identity = {
        "model": inputs["model"],
        "classifiers": {
            name: {"hash": inputs["classifiers"][name], "dtype": place["classifier_dtype"]}
            for name in study.classifiers
        },
        "hierarchy": hierarchy.content_hash(),
        "wordnet": WORDNET_HASH,
        "resize": study.resize,
        "keep": study.keep,
        "samples": samples if folder is None else max(map(len, prompts.values())),
        "synsets": sorted(prompts),
    }
    if folder is None:
        identity |= {
            "scheduler": place["scheduler"],
            "steps": study.steps,
            "guidance": study.guidance,
            "size": study.size,
            "dtype": place["dtype"],
            "seed": study.seed,
            "templates": ["prompts"] if study.prompts else study.templates,
        }
        # Only where they are on, so that other runs are what they were.
        identity |= {key: True for key in ("common_seeds", "mean_conditioning") if getattr(study, key)}
    segment: dict[str, Any] = {"samples": samples, "prompts": prompts}
    if folder is None and study.languages:
        identity |= {"languages": study.languages, "words": study.words}
    if folder is None and (study.common_seeds or study.languages):
        segment["common_seeds"] = True
    return {
        "schema": SCHEMA,
        "configuration": configuration,
        "inputs": inputs,
        "identity": identity,
        "versions": list_versions(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "plan": [segment],
    }


def describe_place(study: Study, *, judges_only: bool = False) -> dict[str, Any]:
    """Return what a manifest takes from the machine that draws: the scheduler, and what each ``auto`` is."""
    device = resolve_device(study.device)
    place = {"classifier_dtype": resolve_dtype(study.classifier_dtype, device)}
    if judges_only:
        return place
    return place | {
        "scheduler": study.scheduler or read_scheduler(study.model, variant=study.variant),
        "dtype": resolve_dtype(study.dtype, device),
    }


def hash_networks(study: Study) -> dict[str, Any]:
    """Hash the files of the model and the classifiers on this machine."""
    return {
        "model": model_hash(study.model, variant=study.variant),
        "classifiers": {name: scorer_hash(name) for name in study.classifiers},
    }


NETWORKS = ("model", "classifiers")  # what hash_networks hashes


def hash_inputs(
    study: Study, folder: Path | None = None, told: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Hash every file that the settings name, without loading any network.

    With `told` (see `make_manifest`) the networks lie elsewhere, and were hashed there.
    """
    if folder is not None:
        if not folder.is_dir():
            raise UserError(
                f"there is no folder {folder}: give one with a subfolder of pictures for each synset"
            )
        files = {p.relative_to(folder).as_posix(): p for p in folder.glob("*/*") if p.is_file()}
        networks = {
            "model": hash_files(files),
            "classifiers": {name: scorer_hash(name) for name in study.classifiers},
        }
    else:
        networks = hash_networks(study) if told is None else {key: told[key] for key in NETWORKS}
    named = [item.strip() for item in study.synsets.split(",")] + [str(study.hierarchy), str(study.prompts)]
    return {
        **networks,
        "files": {name: hash_files({"": Path(name)}) for name in named if Path(name).is_file()},
    }


def write_prompts(study: Study, hierarchy: Hierarchy) -> dict[str, dict[str, str]]:
    """Return synset → template → prompt, synsets sorted; prompts from a JSONL are their own template.

    With `prompts` the study covers the synsets of that file, unless its `synsets` chooses among them.
    """
    from t2iprobe import wordnet
    from t2iprobe.hypernymy.prompts import find_template, read_prompts, render

    if study.languages and study.prompts is not None:
        return _choose_translated(study, hierarchy)
    if study.prompts is not None:
        given: dict[str, list[str]] = {}
        for name, texts in read_prompts(study.prompts).items():
            given.setdefault(hierarchy.resolve(name), []).extend(texts)
        chosen = set(given) if study.synsets == "nonleaf" else set(hierarchy.select(study.synsets))
        if not chosen & set(given):
            raise UserError(f"{study.prompts} has no prompt for any of the synsets {study.synsets!r}")
        return {name: {text: text for text in given[name]} for name in sorted(chosen & set(given))}
    for template in study.templates:
        find_template(template)
    written = {
        name: {template: render(template, wordnet.synset(name)) for template in study.templates}
        for name in sorted(hierarchy.select(study.synsets))
    }
    if study.mean_conditioning:
        for by_template in written.values():
            by_template[MEAN] = "\n".join(by_template.values())
    if study.languages:
        from t2iprobe.hypernymy.languages import add_languages

        return add_languages(written, study.languages, study.words)
    return written


def _choose_translated(study: Study, hierarchy: Hierarchy) -> dict[str, dict[str, str]]:
    from t2iprobe.hypernymy.languages import read_languages

    assert study.prompts is not None
    given: dict[str, dict[str, str]] = {}
    for name, by_template in read_languages(study.prompts, study.languages).items():
        given.setdefault(hierarchy.resolve(name), {}).update(by_template)
    chosen = set(given) if study.synsets == "nonleaf" else set(hierarchy.select(study.synsets))
    if not chosen & set(given):
        raise UserError(f"{study.prompts} has no prompt for any of the synsets {study.synsets!r}")
    return {name: given[name] for name in sorted(chosen & set(given))}


def _list_folder(folder: Path, hierarchy: Hierarchy) -> dict[str, dict[str, str]]:
    return {name: {path: path for path in paths} for name, paths in list_pictures(folder, hierarchy).items()}


def plan_study(study: Study, out: str | Path | None, *, measure: bool = True) -> dict[str, Any]:
    """Describe what a run would do: pictures, synsets, settings, what is stored, seconds. Writes nothing.

    The time is measured by drawing and judging one batch, which is thrown away.
    """
    manifest = make_manifest(study, out)
    plan = Run(Path(out or "."), manifest).plan
    done = 0
    if out is not None and (Path(out) / "manifest.json").exists():
        done = len(Run.open(out).done())
    seconds = _measure_seconds(study, manifest, plan) if measure and len(plan) > done else None
    return {
        "pictures": len(plan),
        "stored": done,
        "synsets": len(manifest["identity"]["synsets"]),
        "prompts": sum(
            len(prompts) for segment in manifest["plan"] for prompts in segment["prompts"].values()
        ),
        "first_prompt": plan[0].prompt,
        "seconds_per_picture": seconds,
        "seconds": None if seconds is None else seconds * (len(plan) - done),
        "configuration": manifest["configuration"],
        "dtype": manifest["identity"]["dtype"],
    }


def _measure_seconds(study: Study, manifest: dict[str, Any], plan: Sequence[PlanEntry]) -> float:
    device = resolve_device(study.device)
    sampler = load_sampler(study, device, manifest["identity"]["dtype"])
    scorers = load_scorers(study, device, len(load_hierarchy(study).classes))
    batch = plan[: study.batch_size]
    score_pictures(sampler.sample(batch[:1]), scorers)  # the first call of a network sets it up
    begin = time.perf_counter()
    score_pictures(sampler.sample(batch), scorers)
    return (time.perf_counter() - begin) / len(batch)
