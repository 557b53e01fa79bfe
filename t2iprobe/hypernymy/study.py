"""The study: plan → sample → score → store → analyse → report. It can be killed and continued anywhere."""

import datetime
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from t2iprobe.attention import choose_attention
from t2iprobe.config import Study, dump_study
from t2iprobe.devices import resolve_device, resolve_dtype
from t2iprobe.errors import UserError
from t2iprobe.hypernymy import adaptive
from t2iprobe.hypernymy.drawing import Progress, draw
from t2iprobe.hypernymy.folders import FolderSampler, list_pictures
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.hypernymy.prompts import MEAN
from t2iprobe.hypernymy.sampling import DiffusersSampler, Sampler
from t2iprobe.hypernymy.scoring import Scorer, load_scorer, scorer_hash
from t2iprobe.machine import list_versions
from t2iprobe.pipelines import load_pipeline, model_hash, read_scheduler
from t2iprobe.runs import SCHEMA, WHOLE, Run, Share
from t2iprobe.storage import hash_files
from t2iprobe.wordnet import WORDNET_HASH


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
    if adaptive.is_complete(run):
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
    wait: Callable[[], None] | None = None,
) -> None:
    """Draw, judge and store what a share of an open run lacks; arguments as in `run_study`.

    `wait` returns when all processes that share the run have come there, which a run with a rule needs.
    """
    if share != WHOLE and wait is None:
        adaptive.refuse_shares(run)
    with run.writing(share):
        loaded: tuple[Sampler, dict[str, Scorer]] | None = None
        for missing in adaptive.list_rounds(run, share, wait):
            loaded = loaded or _load_networks(run, study, folder, skip_bad)
            draw(run, missing, *loaded, study, progress)


def _load_networks(
    run: Run, study: Study, folder: Path | None, skip_bad: bool
) -> tuple[Sampler, dict[str, Scorer]]:
    device = resolve_device(study.device)
    scorers = load_scorers(study, device, len(load_hierarchy(study).classes))
    sampler: Sampler
    if folder is not None:
        sampler = FolderSampler(folder, skip_bad=skip_bad, batch_size=study.fixed_batch_size)
    else:
        sampler = load_sampler(study, device, run.manifest["identity"]["dtype"])
    return sampler, scorers


def finish(run: Run) -> None:
    """Write the report of a complete run, unless it is there and newer than every shard and the manifest."""
    written = [run.path / name for name in ("report.html", "results.json")]
    # The manifest, too: --extend may have changed the rule.
    newest = max(path.stat().st_mtime_ns for path in (*run.shards, run.path / "manifest.json"))
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
    if study.attention is not None:
        choose_attention(pipeline, study.attention)
    return DiffusersSampler(
        pipeline,
        steps=study.steps,
        guidance=study.guidance,
        size=study.size,
        dtype=dtype,
        average_lines=study.mean_conditioning,
        batch_size=study.fixed_batch_size,
        compiled=study.compile,
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
    until = adaptive.check_study(study, folder)
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
    if until is not None:
        hashed = {"against": inputs["against"]["hash"]} if "against" in inputs else {}
        identity["until"] = until.identify() | hashed
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
        listed = list_pictures(folder, load_hierarchy(study))
        files = {path: folder / path for paths in listed.values() for path in paths}
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
        **({"against": against} if (against := adaptive.hash_against(study)) else {}),
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
