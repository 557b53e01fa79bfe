"""A training, or a teaching → its page: one HTML file beside its JSON, written again at any time."""

import json
from pathlib import Path
from typing import Any

from t2iprobe.errors import UserError
from t2iprobe.inversion.teaching_page import render as render_teaching
from t2iprobe.inversion.training_page import render as render_training
from t2iprobe.storage import write_output

__all__ = ["write_report", "write_teaching_report"]


def write_report(out: Path) -> Path:
    """Write OUT/report.html from OUT/training.json and the pictures that it names. Returns the page's path.

    Pictures that are gone are left out. Raises UserError where there is no finished training, or a picture
    is damaged.
    """
    training = _read(out / "training.json", "train")
    return _write(out, render_training(training, out))


def write_teaching_report(out: Path) -> Path:
    """Write OUT/report.html from the OUT/results.json of a teaching. Returns the page's path; see above."""
    results = _read(out / "results.json", "teach")
    return _write(out, render_teaching(results, out))


def _read(path: Path, command: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path.parent} holds no {path.name}: finish `t2iprobe inversion {command}` first"
        ) from None
    except ValueError:
        raise UserError(f"{path} is damaged: repeat `t2iprobe inversion {command}`") from None


def _write(out: Path, page: str) -> Path:
    write_output(out / "report.html", page.encode())
    return out / "report.html"
