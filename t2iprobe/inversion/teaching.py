"""The closed loop: words that a probe found unknown are taught, and probed again with the same seeds.

    OUT/probe/<word>/before.npz, <method>.npz   in-subtree probabilities [N] of the pictures drawn
    OUT/probe/<word>/before/*.png, <method>/*.png
    OUT/<method>/<word>/                        what `train_concepts` wrote
    OUT/settings.json                           the run's identity: another run is refused
    OUT/results.json, OUT/report.html

This is the one module of this part that calls the probe.
"""

import datetime
import io
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from t2iprobe import wordnet
from t2iprobe.config import Study
from t2iprobe.errors import UserError
from t2iprobe.hypernymy import study as probe
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.hypernymy.metrics import in_subtree_probabilities
from t2iprobe.hypernymy.prompts import render
from t2iprobe.hypernymy.results import read_results
from t2iprobe.hypernymy.sampling import DiffusersSampler
from t2iprobe.hypernymy.scoring import Scorer
from t2iprobe.intervals import describe_difference, describe_probability, holm
from t2iprobe.inversion.backbones import Backbone
from t2iprobe.inversion.commands import load_backbone, name_token, read_concept
from t2iprobe.inversion.concepts import OBJECT_TEMPLATES, Concept
from t2iprobe.inversion.drawing import write_pictures
from t2iprobe.inversion.folders import check_folder, claim_folder
from t2iprobe.inversion.methods import METHODS, Method, find_method
from t2iprobe.inversion.settings import Training
from t2iprobe.inversion.training import check_prior, train_concepts
from t2iprobe.machine import list_versions
from t2iprobe.pictures import picture_files, resize_picture
from t2iprobe.pipelines import find_scheduler
from t2iprobe.plans import GROWING, PlanEntry, picture_seed
from t2iprobe.runs import Run
from t2iprobe.storage import explain_full_disk, read_arrays, remove_leftovers, write_atomically

SCHEMA = "t2iprobe.teaching/1"
ALPHA = 0.05
GROUP = 8  # words in one pass
OTHERS, OTHER_SAMPLES = 8, 2  # known words, and pictures of each, to see what an adapter does to the rest

Progress = Callable[[int, int], None]  # words trained or probed, of how many


@dataclass(frozen=True)
class Lesson:
    """A word to be taught: its pictures, and what is drawn to probe it."""

    word: str
    synset: str
    token: str
    pictures: Path
    entries: tuple[PlanEntry, ...]

    def taught(self) -> list[PlanEntry]:
        """Return the entries with the token in the word's place; the seeds are the same."""
        return [
            PlanEntry(e.synset, e.template, e.index, put_token(e.prompt, self.word, self.token), e.seed)
            for e in self.entries
        ]


def teach(
    run: Path,
    words: Sequence[str],
    pictures: Path | None,
    out: Path,
    *,
    methods: Sequence[str] = (),
    samples: int = 16,
    settings: Training | None = None,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Teach words to the model of a probe's run and probe them again. Returns results.json.

    Args:
        run: a run directory; its model, judge, templates and settings are used.
        words: synsets, wnids or lemmas; none: the unknown ones of the run of which there are pictures, or
            where the run asked for none of them, all of which there are pictures.
        pictures: ``DIR/<word>/*``, for one word also ``DIR/*``; None: the packaged concepts.
        out: folder to write; the same call continues it.
        methods: names, or "all"; none: textual inversion.
        samples: pictures a word and template, before and after.
        settings: of the training; its model and drawing are the run's.
        skip_bad: go on without pictures that cannot be read.
        progress: called with (done, of).
    """
    began = time.perf_counter()
    opened, study, results = _read_run(run)
    chosen = list(METHODS) if "all" in methods else list(dict.fromkeys(methods or ["textual-inversion"]))
    for name in chosen:
        find_method(name)
    hierarchy = probe.load_hierarchy(study)
    lessons = plan_lessons(study, results, hierarchy, words, pictures, samples)
    training = _fit_settings(study, settings or Training.model_validate({}))
    trainings = {name: _choose_method(training, name, chosen) for name in chosen}
    for each in trainings.values():
        check_prior(each)
    known = _choose_known(study, results, hierarchy)
    identity = {key: value for key, value in opened.manifest["identity"].items() if key not in GROWING}
    identity["known"] = list(dict.fromkeys(entry.synset for entry in known))
    check_folder(out, identity, "teaching", ("probe", "results.json"))
    backbone = load_backbone(training)
    if study.scheduler is not None:
        scheduler = find_scheduler(study.scheduler)
        backbone.pipeline.scheduler = scheduler.from_config(backbone.pipeline.scheduler.config)
    for name in chosen:
        METHODS[name].check(backbone)
    concepts = {each.synset: _read(each, training, backbone, skip_bad) for each in lessons}
    scorer = next(iter(probe.load_scorers(study, str(backbone.device), len(hierarchy.classes)).values()))
    claim_folder(out, identity)
    prober = _Prober(study, backbone, scorer, hierarchy, out)
    total, done = len(lessons) * (1 + 2 * len(chosen)), 0

    def advance(count: int = 1) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    for lesson in lessons:
        prober.probe(lesson.synset, "before", lesson.entries)
        advance()
    rows: list[dict[str, Any]] = []
    others: dict[str, Any] = {}
    for name in chosen:
        outcomes = _train(lessons, concepts, trainings[name], backbone, out, advance)
        found = []
        for lesson in lessons:
            with _installed(backbone, name, training, lesson, out / name / lesson.synset) as method:
                prober.probe(lesson.synset, name, lesson.taught(), method)
                if not method.shares_pass:
                    prober.probe_others(lesson.synset, name, known, method)
            found.append(_describe(lesson, name, prober, outcomes[lesson.synset], out))
            advance()
        rows += _correct(found)
        others[name] = None if METHODS[name].shares_pass else prober.describe_others(name, lessons, known)
    outcome = {
        "schema": SCHEMA,
        "run": str(run),
        "model": study.model,
        "classifier": study.classifiers[0],
        "samples": samples,
        "seed": study.seed,
        "alpha": ALPHA,
        "methods": chosen,
        "settings": json.loads(training.model_dump_json()),
        "words": rows,
        "others": others,
        "seconds": time.perf_counter() - began,
        "versions": list_versions(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    from t2iprobe.inversion.report import write_teaching_report

    with explain_full_disk(out):
        write_atomically(
            out / "results.json", json.dumps(outcome, indent=1, ensure_ascii=False, allow_nan=False).encode()
        )
        write_teaching_report(out)
    return outcome


def _read_run(run: Path) -> tuple[Run, Study, dict[str, Any]]:
    opened = Run.open(run)
    configuration = dict(opened.manifest["configuration"])
    if configuration.pop("folder", None) is not None:
        raise UserError(f"{run} judged pictures made elsewhere: it names no model that could be taught")
    study = Study(**configuration)
    if study.prompts is not None:
        raise UserError(f"{run} was drawn from a file of prompts: teach needs a run with --template")
    return opened, study, read_results(opened) if (run / "results.json").exists() else {"synsets": []}


def plan_lessons(
    study: Study,
    results: Mapping[str, Any],
    hierarchy: Hierarchy,
    words: Sequence[str],
    pictures: Path | None,
    samples: int,
) -> list[Lesson]:
    """Return the words to teach, each with its pictures. Raises UserError where there are none."""
    if samples < 1:
        raise UserError(f"--samples is {samples}: draw 1 or more of each word")
    folders = find_pictures(pictures, hierarchy)
    if words:
        synsets = list(dict.fromkeys(hierarchy.resolve(word) for word in words))
        if pictures is not None and len(synsets) == 1 and picture_files(pictures):
            folders = {synsets[0]: pictures}
    else:
        known = {row["synset"] for row in results["synsets"] if row["known"]}
        synsets = [synset for synset in folders if synset not in known]
    missing = [synset for synset in synsets if synset not in folders]
    where = pictures if pictures is not None else "the package"
    if missing:
        raise UserError(
            f"there are no pictures of {', '.join(missing)} in {where}: it has {_listed(folders)}; "
            "give --pictures DIR with DIR/<word>/*"
        )
    if not synsets:
        raise UserError(
            f"the run knows every word of which there are pictures in {where}: name WORDs to teach"
        )
    lessons = [_plan_lesson(study, synset, folders[synset], samples) for synset in synsets]
    shared = {token for token, count in Counter(each.token for each in lessons).items() if count > 1}
    return [
        replace(each, token=name_token(each.synset)) if each.token in shared else each for each in lessons
    ]


def _listed(names: Mapping[str, Any]) -> str:
    shown = list(names)[:20]
    return ", ".join(shown) + (" …" if len(names) > len(shown) else "") if shown else "none"


def find_pictures(folder: Path | None, hierarchy: Hierarchy) -> dict[str, Path]:
    """Return synset → its folder of pictures, of `folder` or of the packaged concepts."""
    root = folder if folder is not None else Path(str(files("t2iprobe"))) / "assets" / "concepts"
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: give --pictures DIR with DIR/<word>/*")
    inside = sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
    return {hierarchy.resolve(path.name): path for path in inside if picture_files(path)}


def _plan_lesson(study: Study, synset: str, pictures: Path, samples: int) -> Lesson:
    found = wordnet.synset(synset)
    word = found.lemma_names()[0].lower().replace("_", " ")
    entries = []
    for template in study.templates:
        prompt = render(template, found)
        put_token(prompt, word, "<x>")
        entries += [
            PlanEntry(synset, template, index, prompt, picture_seed(study.seed, synset, template, index))
            for index in range(samples)
        ]
    return Lesson(word, synset, name_token(word), pictures, tuple(entries))


def put_token(prompt: str, word: str, token: str) -> str:
    """Write a token into a prompt in the place of a word. Raises UserError where the word is not in it."""
    taught, count = re.subn(rf"(?<!\w){re.escape(word)}(?!\w)", lambda _: token, prompt)
    if not count:
        raise UserError(f"the prompt {prompt!r} does not name {word!r}: the run's template needs {{lemma}}")
    return taught


def _fit_settings(study: Study, settings: Training) -> Training:
    """Return the training's settings with the run's model and way of drawing."""
    changes: dict[str, Any] = {
        name: getattr(study, name)
        for name in ("model", "variant", "steps", "guidance", "size", "device", "dtype")
    }
    unset = {"grid": 0, "evaluate": 0}  # the probe is the evaluation
    changes |= {name: value for name, value in unset.items() if name not in settings.model_fields_set}
    return settings.model_copy(update=changes)


def _choose_method(settings: Training, name: str, names: Sequence[str]) -> Training:
    """Return the settings for one of several methods: those without a use for a prior go without it."""
    left_out = {"prior": None} if len(names) > 1 and not METHODS[name].uses_prior else {}
    return settings.model_copy(update={"method": name, **left_out})


def _captions(lesson: Lesson, settings: Training) -> list[str] | str:
    """Return what captions are drawn from: the probe's own wordings as often as all the others together."""
    if "templates" in settings.model_fields_set:
        return settings.templates
    own = list(dict.fromkeys(put_token(entry.prompt, lesson.word, "{}") for entry in lesson.entries))
    return own * max(1, len(OBJECT_TEMPLATES) // len(own)) + list(OBJECT_TEMPLATES)


def _read(lesson: Lesson, settings: Training, backbone: Backbone, skip_bad: bool) -> Concept:
    chosen = settings.model_copy(update={"templates": _captions(lesson, settings)})
    return read_concept(lesson.pictures, lesson.token, chosen, backbone, skip_bad=skip_bad)


def _train(
    lessons: Sequence[Lesson],
    concepts: Mapping[str, Concept],
    settings: Training,
    backbone: Backbone,
    out: Path,
    advance: Callable[[int], None],
) -> dict[str, dict[str, Any]]:
    """Train every lesson into ``out/<method>/<synset>``. Returns synset → training.json."""
    outcomes: dict[str, dict[str, Any]] = {}
    group = GROUP if METHODS[settings.method].shares_pass else 1
    for start in range(0, len(lessons), group):
        part = lessons[start : start + group]
        jobs = [(concepts[lesson.synset], out / settings.method / lesson.synset) for lesson in part]
        trained = train_concepts(backbone, jobs, settings)
        outcomes |= {lesson.synset: found for lesson, found in zip(part, trained, strict=True)}
        advance(len(part))
    return outcomes


@contextmanager
def _installed(
    backbone: Backbone, name: str, settings: Training, lesson: Lesson, folder: Path
) -> Iterator[Method]:
    """Put what was trained into the backbone, for a while."""
    method = METHODS[name](backbone, {lesson.token: settings.vectors}, settings.rank)
    try:
        method.load(lesson.token, folder)
        yield method
    finally:
        method.remove()


class _Prober:
    """Draw, judge and keep the pictures of a word, before and after."""

    def __init__(
        self, study: Study, backbone: Backbone, scorer: Scorer, hierarchy: Hierarchy, out: Path
    ) -> None:
        self.study, self.backbone, self.scorer, self.hierarchy = study, backbone, scorer, hierarchy
        self.folder = out / "probe"

    def probe(
        self, synset: str, label: str, entries: Sequence[PlanEntry], method: Method | None = None
    ) -> None:
        """Judge the pictures of `entries` as `label`, unless that is done."""
        path = self.file(synset, label)
        if path.exists() and len(self.read(path)) == len(entries):
            return
        pictures, probabilities = self._judge(entries, method)
        with explain_full_disk(self.folder):
            write_pictures(path.with_suffix(""), pictures)
        _write_array(path, probabilities)

    def probe_others(
        self, synset: str, label: str, entries: Sequence[PlanEntry], method: Method | None
    ) -> None:
        """Judge other words' pictures while `synset` is taught."""
        path = self.file(synset, f"{label}-others")
        if entries and not path.exists():
            _write_array(path, self._judge(entries, method)[1])

    def _judge(
        self, entries: Sequence[PlanEntry], method: Method | None
    ) -> tuple[list[np.ndarray], np.ndarray]:
        study = self.study
        sampler = DiffusersSampler(
            self.backbone.pipeline,
            steps=study.steps,
            guidance=study.guidance,
            size=study.size,
            dtype=self.backbone.dtype,
        )
        drawn: list[np.ndarray] = []
        for start in range(0, len(entries), study.pictures_at_once):
            part = entries[start : start + study.pictures_at_once]
            if method is not None:
                part = [
                    PlanEntry(e.synset, e.template, e.index, method.rows.expand(e.prompt), e.seed)
                    for e in part
                ]
            drawn += [picture for picture in sampler.sample(part) if picture is not None]
        if study.resize is not None:
            drawn = [resize_picture(picture, study.resize) for picture in drawn]
        logits = np.concatenate(
            [
                self.scorer.score(drawn[start : start + study.pictures_at_once])
                for start in range(0, len(drawn), study.pictures_at_once)
            ]
        )
        probabilities = [
            in_subtree_probabilities(logits[row : row + 1], self.hierarchy.subtree(entry.synset))[0]
            for row, entry in enumerate(entries)
        ]
        return drawn, np.asarray(probabilities)

    def file(self, synset: str, label: str) -> Path:
        """Return where the in-subtree probabilities of a word's pictures lie."""
        return self.folder / synset / f"{label}.npz"

    def read(self, path: Path) -> np.ndarray:
        """Return the in-subtree probabilities [N] of what was judged. Raises UserError for a damaged file."""
        try:
            return read_arrays(path)["isp"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{path} is damaged ({error}): remove it, and the same command draws it again"
            ) from None

    def describe_others(
        self, name: str, lessons: Sequence[Lesson], known: Sequence[PlanEntry]
    ) -> dict[str, Any] | None:
        """Return what the method did to words that were known: {words, before, after, difference}."""
        if not known:
            return None
        path = self.folder / "others.npz"
        if not path.exists():
            _write_array(path, self._judge(known, None)[1])
        before = self.read(path)
        after = np.mean([self.read(self.file(each.synset, f"{name}-others")) for each in lessons], axis=0)
        return {
            "words": list(dict.fromkeys(entry.synset for entry in known)),
            "before": describe_probability(before),
            "after": describe_probability(after),
            "difference": describe_difference(before, after),
        }


def _write_array(path: Path, isp: np.ndarray) -> None:
    content = io.BytesIO()
    np.savez(content, isp=isp)
    with explain_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        write_atomically(path, content.getvalue())


def _choose_known(study: Study, results: Mapping[str, Any], hierarchy: Hierarchy) -> list[PlanEntry]:
    """Return the entries of the run's best known words."""
    known = sorted((row for row in results["synsets"] if row["known"]), key=lambda row: -row["isp"])
    template = study.templates[0]
    return [
        PlanEntry(
            row["synset"], template, index, render(template, wordnet.synset(row["synset"])),
            picture_seed(study.seed, row["synset"], template, index),
        )
        for row in known[:OTHERS]
        for index in range(OTHER_SAMPLES)
    ]  # fmt: skip


def _describe(
    lesson: Lesson, name: str, prober: _Prober, outcome: Mapping[str, Any], out: Path
) -> dict[str, Any]:
    before, after = (prober.read(prober.file(lesson.synset, label)) for label in ("before", name))
    shown = min(8, len(before))
    folder = Path("probe") / lesson.synset
    return {
        "word": lesson.word,
        "synset": lesson.synset,
        "method": name,
        "token": lesson.token,
        "prompt_before": lesson.entries[0].prompt,
        "prompt_after": lesson.taught()[0].prompt,
        "before": describe_probability(before),
        "after": describe_probability(after),
        "difference": describe_difference(before, after),
        "steps": outcome["steps"],
        "seconds": outcome["seconds"],
        "stop": outcome["stop"],
        "pictures_before": [str(folder / "before" / f"{number}.png") for number in range(shown)],
        "pictures_after": [str(folder / name / f"{number}.png") for number in range(shown)],
        "concept_pictures": outcome["pictures"],
    }


def _correct(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a method's rows with q, corrected over its words, and whether the word rose significantly."""
    corrected = holm([row["difference"]["p"] for row in rows])
    return [
        {
            **row,
            "difference": {**row["difference"], "q": q},
            "significant": q is not None and q < ALPHA and row["difference"]["value"] > 0,
        }
        for row, q in zip(rows, corrected, strict=True)
    ]
