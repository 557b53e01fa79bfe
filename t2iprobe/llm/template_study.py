"""Classify texts under many templates with one or more models: accuracies, spread, ensembles, a page."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from t2iprobe import __version__
from t2iprobe.errors import UserError
from t2iprobe.intervals import describe_difference, describe_mean
from t2iprobe.llm.classification import (
    CONTENT_FREE,
    Method,
    average_probabilities,
    calibrate,
    check_labels,
    choose_demonstrations,
    find_method,
    losses_to_probabilities,
    make_encoder,
    write_requests,
)
from t2iprobe.llm.commands import Engine, load_engine
from t2iprobe.llm.labelled_data import Labelled
from t2iprobe.llm.scoring import count_rows, score_continuations
from t2iprobe.llm.template_tables import COLUMNS, tabulate_ranks, tabulate_spread, tabulate_transfer
from t2iprobe.llm.templates import Template, find_grid, random_templates
from t2iprobe.spread import subset_spread
from t2iprobe.storage import explain_full_disk, read_arrays, remove_leftovers, write_atomically

__all__ = ["TemplateStudy", "classify", "plan_study", "run_study"]

SCHEMA = "t2iprobe.templates/1"
Show = Callable[[int, int], None]


@dataclass(frozen=True)
class TemplateStudy:
    """What is compared: `count` templates drawn by `template_seed`, demonstrations by `seed`."""

    models: tuple[str, ...] = ("smollm2",)
    methods: tuple[str, ...] = ("direct",)
    shots: tuple[int, ...] = (0,)
    count: int = 10
    template_seed: int = 59
    seed: int = 59
    selection: str = "random"
    grid: str | None = None
    ensemble: int = 5
    limit: int | None = None
    dtype: str = "auto"
    device: str = "cpu"

    def __post_init__(self) -> None:
        for method in self.methods:
            find_method(method)
        if min(self.shots) < 0:
            raise UserError(f"there are 0 demonstrations or more, not {min(self.shots)}")
        if not 1 <= self.ensemble <= self.count:
            raise UserError(f"an ensemble has 1 to {self.count} templates (--count), not {self.ensemble}")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"classify 1 text or more, not {self.limit}")

    def cells(self) -> list[tuple[str, int, int]]:
        """Return (method, shots, number of the template) of every classification of one model."""
        return [
            (method, shots, number)
            for shots in self.shots
            for method in self.methods
            for number in range(self.count)
        ]

    def templates(self, data: Labelled, shots: int) -> list[Template]:
        """Return the templates that are compared with so many demonstrations."""
        return random_templates(self.grid or data.grid, self.count, self.template_seed, shots > 0)


def run_study(
    study: TemplateStudy, data: Labelled, out: Path, *, show: Show = lambda done, total: None
) -> dict[str, Any]:
    """Classify every test text, write results.json, runs.csv and report.html into `out`, return the results.

    A classification that is stored in `out` is not made again. Raises UserError where `out` holds another
    study, and for what the data or a model do not allow.
    """
    find_grid(study.grid or data.grid)
    data = data.limit(study.limit)
    _check(study, data)
    settings = _settings(study, data)
    parts = out / "parts"
    with explain_full_disk(out):
        _prepare(out, settings)
        done, total = 0, len(study.models) * len(study.cells())
        for place, model in enumerate(study.models):
            missing = [cell for cell in study.cells() if not _part(parts, place, cell).exists()]
            done += len(study.cells()) - len(missing)
            show(done, total)
            if not missing:
                continue
            with load_engine(model, "none", dtype=study.dtype, device=study.device) as engine:
                for cell in missing:
                    method, shots, number = cell
                    template = study.templates(data, shots)[number]
                    probabilities = classify(
                        engine, data, template, find_method(method), study.selection, shots, study.seed
                    )
                    content = BytesIO()
                    np.savez(content, probabilities=probabilities)
                    write_atomically(_part(parts, place, cell), content.getvalue())
                    done += 1
                    show(done, total)
        results = analyse(study, data, _read_parts(study, data, parts)) | {"settings": settings}
        from t2iprobe.llm.template_page import render

        write_atomically(out / "results.json", json.dumps(results, indent=1, ensure_ascii=False).encode())
        write_atomically(out / "runs.csv", _to_csv(results["runs"]).encode())
        write_atomically(out / "report.html", render(results).encode())
    return results


def plan_study(study: TemplateStudy, data: Labelled) -> dict[str, Any]:
    """Return the templates and what classifying costs: tokens that a model computes, over all of its cells.

    Tokens are counted with the first model's tokenizer on the first 20 texts, and scaled up.
    """
    from t2iprobe.llm.models import find_language_model, load_tokenizer

    data = data.limit(study.limit)
    tokenizer = load_tokenizer(find_language_model(study.models[0]))
    few = data.limit(20)
    texts = [text for text, _ in few.test]
    rows = 0
    for method, shots, number in study.cells():
        shown = choose_demonstrations(data, texts, study.selection, shots, study.seed)
        template = study.templates(data, shots)[number]
        rows += count_rows(
            write_requests(tokenizer, template, find_method(method), texts, data.labels, shown)
        )
    return {
        "templates": sorted({str(each) for shots in study.shots for each in study.templates(data, shots)}),
        "texts": len(data.test),
        "classifications": len(study.models) * len(study.cells()),
        "rows": round(len(study.models) * rows * len(data.test) / len(texts)),
    }


def classify(
    engine: Engine,
    data: Labelled,
    template: Template,
    method: Method,
    selection: str,
    shots: int,
    seed: int,
) -> np.ndarray:
    """Return the class probabilities [N, labels] of the test texts under one template."""
    texts = [text for text, _ in data.test]
    shown = choose_demonstrations(data, texts, selection, shots, seed)

    def score(texts: Sequence[str], shown: Sequence[Sequence[tuple[str, str]]]) -> np.ndarray:
        requests = write_requests(engine.tokenizer, template, method, texts, data.labels, shown)
        losses = [-score.mean for score in score_continuations(engine.target, requests)]
        return losses_to_probabilities(np.reshape(losses, (len(texts), len(data.labels))))

    found = score(texts, shown)
    if method.calibrated:
        # With demonstrations of each text's own, those of the first stand in for all.
        found = calibrate(found, score(CONTENT_FREE, [shown[0]] * len(CONTENT_FREE)))
    return found


def _check(study: TemplateStudy, data: Labelled) -> None:
    """Raise UserError for demonstrations and labels that a later cell would refuse: nothing is half-made."""
    from t2iprobe.llm.models import find_language_model, load_tokenizer

    few = [text for text, _ in data.test[:1]]
    for shots in study.shots:
        choose_demonstrations(data, few, study.selection, shots, study.seed)
    for model in study.models:
        encode = make_encoder(load_tokenizer(find_language_model(model)))
        for template in {each for shots in study.shots for each in study.templates(data, shots)}:
            check_labels(encode, template, data.labels)


# -- the folder ----------------------------------------------------------------------------------------


def _settings(study: TemplateStudy, data: Labelled) -> dict[str, Any]:
    import hashlib

    from t2iprobe.llm.models import find_language_model

    content = json.dumps([data.labels, data.train, data.test], ensure_ascii=False).encode()
    return json.loads(json.dumps(asdict(study))) | {
        "schema": SCHEMA,
        "data": data.name,
        "data_hash": f"sha256:{hashlib.sha256(content).hexdigest()}",
        "model_hashes": [find_language_model(model).hash for model in study.models],
        "texts": len(data.test),
        "labels": list(data.labels),
    }


#: What may differ in a folder that is continued: it changes no classification.
_FREE = ("ensemble",)


def _prepare(out: Path, settings: dict[str, Any]) -> None:
    file = out / "manifest.json"
    try:
        (out / "parts").mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    if file.exists():
        try:
            stored = json.loads(file.read_text())
        except ValueError:
            raise UserError(f"{file} is damaged: delete the folder, or write elsewhere") from None
        changed = sorted(
            key
            for key in settings.keys() | stored.keys()
            if key not in _FREE and settings.get(key) != stored.get(key)
        )
        if changed:
            raise UserError(
                f"{out} holds another study ({changed[0].replace('_', ' ')} differs): write elsewhere"
            )
    for folder in (out, out / "parts"):
        remove_leftovers(folder)
    write_atomically(file, json.dumps(settings, indent=1, ensure_ascii=False).encode())


def _part(parts: Path, place: int, cell: tuple[str, int, int]) -> Path:
    method, shots, number = cell
    return parts / f"{place}-{method}-{shots}-{number}.npz"


Found = dict[tuple[int, str, int], np.ndarray]  # (model, method, shots) → [templates, N, labels]


def _read_parts(study: TemplateStudy, data: Labelled, parts: Path) -> Found:
    shape = (len(data.test), len(data.labels))
    found: dict[tuple[int, str, int], list[np.ndarray]] = {}
    for place in range(len(study.models)):
        for method, shots, number in study.cells():
            path = _part(parts, place, (method, shots, number))
            try:
                values = read_arrays(path)["probabilities"]
                if values.shape != shape:
                    raise ValueError(f"its shape is {values.shape}, not {shape}")
            except (OSError, ValueError, KeyError) as error:
                raise UserError(
                    f"{path} is corrupt ({error}): delete it, and run the same command again"
                ) from None
            found.setdefault((place, method, shots), []).append(values)
    return {key: np.stack(values) for key, values in found.items()}


# -- results -------------------------------------------------------------------------------------------


def analyse(study: TemplateStudy, data: Labelled, found: Found) -> dict[str, Any]:
    """Return accuracies by template, their spread, the agreement of ranks and the gain of ensembles."""
    truth = np.array([data.labels.index(label) for _, label in data.test])
    runs, ensembles = [], []
    for (place, method, shots), probabilities in found.items():
        right = probabilities.argmax(-1) == truth
        name = {"model": study.models[place], "method": method, "shots": shots}
        templates = study.templates(data, shots)
        runs.append(
            {
                **dict(zip(COLUMNS, _columns(study, data, place, method, shots), strict=False)),
                "scores": right.mean(axis=1).tolist(),
                **name,
                "templates": [asdict(template) for template in templates],
                "intervals": [describe_mean(row)["interval"] for row in right],
            }
        )
        ensembles.append(name | {"sizes": _grow_ensembles(probabilities, truth, study.ensemble)})
    majority = float(np.bincount(truth).max() / len(truth))
    names = [find_method(method).published_name for method in study.methods]
    return {
        "schema": SCHEMA,
        "version": __version__,
        "data": data.name,
        "texts": len(truth),
        "chance": 1 / len(data.labels),
        "majority": majority,
        "runs": runs,
        "spread": tabulate_spread(runs),
        "ranks": tabulate_ranks(runs),
        "transfer": [
            {"method": names[0], "other": other, **tabulate_transfer(runs, names[0], other)}
            for other in names[1:]
        ],
        "ensembles": ensembles,
    }


def _columns(study: TemplateStudy, data: Labelled, place: int, method: str, shots: int) -> tuple[Any, ...]:
    published = find_method(method).published_name
    selection = study.selection if shots else "0-shot"
    return (
        *(study.seed, study.models[place], data.name, shots, study.dtype, 1),
        *(study.template_seed, published, selection),
    )


def _grow_ensembles(probabilities: np.ndarray, truth: np.ndarray, most: int) -> list[dict[str, Any]]:
    """Describe the accuracy over ensembles of 1 … `most` templates: all subsets, or 200 drawn at random.

    The accuracy of the first so many (as drawn, and as published) stands beside the spread over subsets, and
    the gain over single templates, paired by texts, with its interval over them.
    """
    single = (probabilities.argmax(-1) == truth).mean(axis=0)  # of each text, over templates

    def describe(size: int) -> dict[str, Any]:
        rights: list[np.ndarray] = []

        def accuracy(members: Sequence[int]) -> float:
            rights.append(average_probabilities(probabilities[list(members)]).argmax(-1) == truth)
            return float(rights[-1].mean())

        found = subset_spread(accuracy, len(probabilities), size)
        gain = describe_difference(single, np.mean(rights, axis=0))
        return found | {"gain": gain, "first": accuracy(range(size))}

    return [describe(size) for size in range(1, most + 1)]


def _to_csv(runs: Sequence[dict[str, Any]]) -> str:
    import csv
    from io import StringIO

    text = StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for run in runs:
        writer.writerow(run | {"scores": json.dumps(run["scores"])})
    return text.getvalue()
