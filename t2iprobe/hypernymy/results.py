"""Results without drawing: of logits made elsewhere, of a run's report, and their exports."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from t2iprobe.errors import UserError, suggest
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.runs import Run
from t2iprobe.storage import read_arrays, write_output


def score_file(path: str | Path, hierarchy: Hierarchy | None = None) -> dict[str, Any]:
    """Compute the results of logits made elsewhere: an npz of synset → float32 [N, C], classes in order.

    Names may be wnids or lemmas, too. Raises UserError where the file is not such an archive, or names a
    synset twice.
    """
    from t2iprobe.hypernymy.statistics import analyse

    hierarchy = hierarchy or Hierarchy.imagenet()
    try:
        arrays = read_arrays(path)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not an npz of synset → logits [N, {len(hierarchy.classes)}] ({error})"
        ) from None
    logits: dict[str, np.ndarray] = {}
    for key in sorted(arrays):
        name = hierarchy.resolve(key)
        if name in logits:
            raise UserError(f"{path} holds {name} twice, once under the name {key!r}: leave one out")
        logits[name] = arrays[key]
    return {"schema": "t2iprobe.results/1", "source": Path(path).name} | analyse(logits, hierarchy)


def read_results(run: Run) -> dict[str, Any]:
    """Return the results that a run's report states. Raises UserError where there is no report yet."""
    path = run.path / "results.json"
    if not path.exists():
        raise UserError(
            f"{run.path} has no results yet: finish the run, or `t2iprobe hypernymy report {run.path}`"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(
            f"{path} is damaged: `t2iprobe hypernymy report {run.path}` writes it again"
        ) from None


EXPORTS = {"csv": "results.csv", "markdown": "leaderboard.md", "npz": "{classifier}_logits.npz"}


def export_run(run: Run, form: str, out: Path | None = None, classifier: str | None = None) -> Path:
    """Write a run's results as ``csv`` or ``markdown``, or its logits as ``npz`` in the published layout.

    Returns the file, by default in the current folder and named as the published system names its own.
    """
    if form not in EXPORTS:
        raise UserError(f"there is no format {form!r}{suggest(form, EXPORTS)}: use {', '.join(EXPORTS)}")
    if form == "npz":
        name = classifier or run.classifiers[0]
        path = out or Path(EXPORTS[form].format(classifier=name.replace(":", "_").replace("/", "_")))
        content = io.BytesIO()
        np.savez(content, **run.logits(name))  # type: ignore[arg-type]
        data = content.getvalue()
    else:
        path = out or Path(EXPORTS[form])
        source = run.path / EXPORTS[form]
        if not source.exists():
            raise UserError(f"{run.path} has no report yet: `t2iprobe hypernymy report {run.path}` writes it")
        data = source.read_bytes()
    write_output(path, data)
    return path
