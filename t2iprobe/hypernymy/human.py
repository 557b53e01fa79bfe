"""What people prefer: pairs of pictures, of which several workers say A, B or neither.

As in arXiv 2310.09247: the share of A among the answers that prefer one, the share of "none" among all, and
Krippendorff's alpha (nominal) with and without "none". Intervals resample the tasks, since the answers to one
task depend on each other.
"""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2iprobe.errors import UserError
from t2iprobe.intervals import RESAMPLES, interval

__all__ = ["analyse_answers", "describe_answers", "krippendorff_alpha"]

#: What a column may be called, the published files' name last.
COLUMNS = {
    "task": ("task", "task_id", "ASSIGNMENT:task_id"),
    "worker": ("worker", "worker_id", "ASSIGNMENT:worker_id"),
    "answer": ("answer", "result", "OUTPUT:result"),
    "swapped": ("swapped", "INPUT:label"),
}
ANSWERS = {"a": 0, "b": 1, "none": 2, "equal": 2, "tie": 2}
TRUE, FALSE = ("1", "true", "yes"), ("0", "false", "no", "")

Counts = NDArray[np.int64]  # [tasks, 3]: how many said A, B, none


def analyse_answers(path: Path) -> dict[str, Any]:
    """Read a CSV or TSV of answers and describe them (see `describe_answers`).

    Columns: task, worker, answer (a, b or none), and where the two stood the other way round for some,
    swapped (1: the answer ``a`` means B). Raises UserError for what cannot be read so.
    """
    counts, workers = read_answers(path)
    return {"file": str(path), "workers": workers, **describe_answers(counts)}


def read_answers(path: Path) -> tuple[Counts, int]:
    """Return how many workers of each task said A, B, none, int [tasks, 3], and the number of workers."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    head = text.partition("\n")[0]
    rows = list(csv.DictReader(text.splitlines(), delimiter="\t" if "\t" in head else ","))
    if not rows:
        raise UserError(f"{path} holds no answers")
    names = {}
    for column, known in COLUMNS.items():
        names[column] = next((name for name in known if name in rows[0]), None)
        if names[column] is None and column != "swapped":
            raise UserError(f"{path} has no column {column}: it has {', '.join(map(str, rows[0]))}")
    tasks: dict[str, list[int]] = {}
    seen: set[tuple[str, str]] = set()
    for number, row in enumerate(rows, 2):
        task, worker = row[names["task"]], row[names["worker"]]
        if (task, worker) in seen:
            raise UserError(f"line {number} of {path}: worker {worker} answers task {task} twice")
        seen.add((task, worker))
        answer = ANSWERS.get((row[names["answer"]] or "").strip().lower())
        if answer is None:
            given = row[names["answer"]]
            raise UserError(f"line {number} of {path}: the answer {given!r} is none of {', '.join(ANSWERS)}")
        if names["swapped"] and _is_swapped(row[names["swapped"]], number, path) and answer < 2:
            answer = 1 - answer
        tasks.setdefault(task, [0, 0, 0])[answer] += 1
    return np.array(list(tasks.values()), np.int64), len({worker for _, worker in seen})


def _is_swapped(value: str | None, number: int, path: Path) -> bool:
    text = (value or "").strip().lower()
    if text not in (*TRUE, *FALSE):
        raise UserError(f"line {number} of {path}: swapped is {value!r}, not 0 or 1")
    return text in TRUE


def describe_answers(counts: Counts, *, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Return what the answers [tasks, 3] (A, B, none) say, each number with its 95 % interval over tasks.

    `prefer_a`: share of A among A and B; `equal`: share of none; `alpha` over all answers, `alpha_unequal`
    over those that prefer one; None where there is nothing to tell it from.
    """
    rng = np.random.default_rng(seed)
    draws = [counts[rng.integers(0, len(counts), len(counts))] for _ in range(resamples)]

    def describe(measure: Callable[[Counts], float]) -> dict[str, Any]:
        low, high = interval(np.array([measure(draw) for draw in draws]))
        value = measure(counts)
        return {
            "value": None if np.isnan(value) else value,
            "interval": None if np.isnan(low) or np.isnan(value) else [low, high],
        }

    return {
        "tasks": len(counts),
        "answers": {
            name: int(total) for name, total in zip(("a", "b", "none"), counts.sum(axis=0), strict=True)
        },
        "prefer_a": describe(lambda c: _share(c[:, 0].sum(), c[:, :2].sum())),
        "equal": describe(lambda c: _share(c[:, 2].sum(), c.sum())),
        "alpha": describe(krippendorff_alpha),
        "alpha_unequal": describe(lambda c: krippendorff_alpha(c[:, :2])),
    }


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")


def krippendorff_alpha(counts: NDArray[np.int64]) -> float:
    """Return Krippendorff's alpha (nominal) of counts [tasks, answers]; NaN where it does not exist.

    It does not where no task has two answers, or all answers are the same.
    """
    import krippendorff

    pairable = counts[counts.sum(axis=1) > 1]
    if not len(pairable) or (pairable.sum(axis=0) > 0).sum() < 2:
        return float("nan")
    return float(krippendorff.alpha(value_counts=pairable, level_of_measurement="nominal"))


def write_lines(found: Sequence[dict[str, Any]]) -> list[str]:
    """Return the numbers of each file as lines of text."""
    lines = []
    for one in found:
        lines.append(
            f"{one['file']}: {one['tasks']} tasks, {one['workers']} workers, "
            f"{sum(one['answers'].values())} answers"
        )
        for key, label, percent in (
            ("prefer_a", "A preferred (without none)", True),
            ("equal", "equal", True),
            ("alpha", "Krippendorff's alpha", False),
            ("alpha_unequal", "alpha without none", False),
        ):
            lines.append(f"  {label:28}{_write(one[key], percent)}")
    return lines


def _write(number: dict[str, Any], percent: bool) -> str:
    if number["value"] is None:
        return "–"
    values = [number["value"], *(number["interval"] or [])]
    texts = [f"{100 * value:.2f} %" if percent else f"{value:.3f}" for value in values]
    return texts[0] + (f"  [{texts[1]}, {texts[2]}]" if len(texts) > 1 else "")
