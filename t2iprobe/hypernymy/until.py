"""What a run may draw for: ``isp ± 0.005``, ``isp - RUN ± 0.005``, ``unknown``. Text in, a typed rule out."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2iprobe.errors import UserError

TOLERANCE = 0.2

FORMS = '"isp ± 0.005", "isp - RUN ± 0.005" (RUN: the directory of a run) or "unknown"'
_MEAN = re.compile(r"isp\s*(?:-\s*(?P<run>\S.*?)\s*)?(?:±|\+/?-)\s*(?P<half_width>\S+)")
_UNKNOWN = re.compile(r"unknown\s*(?:<\s*(?P<tolerance>\S+))?")


@dataclass(frozen=True)
class Until:
    """When a run has drawn enough.

    Attributes:
        question: ``isp``, ``difference`` or ``unknown``.
        half_width: of the 95 % interval that is asked for; None for ``unknown``.
        run: the run that the mean is compared with.
        tolerance: of ``unknown``: how far above chance, as a share of what lies above it, a word may be and
            still be called unknown.
    """

    question: str
    half_width: float | None = None
    run: Path | None = None
    tolerance: float | None = None

    def __str__(self) -> str:
        if self.question == "unknown":
            return f"unknown < {self.tolerance:g}"
        other = f" - {self.run}" if self.run else ""
        return f"isp{other} ± {self.half_width:g}"

    def identify(self) -> dict[str, Any]:
        """Return what a manifest says of the rule: no path, since the same run may lie elsewhere."""
        found = {"question": self.question, "half_width": self.half_width, "tolerance": self.tolerance}
        return {key: value for key, value in found.items() if value is not None}


def read_until(text: str) -> Until:
    """Read a rule. Raises UserError for what is none, and for a mean that no such rule holds for."""
    stripped = text.strip()
    if match := _MEAN.fullmatch(stripped):
        half_width = _read_share(match["half_width"], text)
        run = Path(match["run"]) if match["run"] else None
        return Until("difference" if run else "isp", half_width=half_width, run=run)
    if match := _UNKNOWN.fullmatch(stripped):
        return Until("unknown", tolerance=_read_share(match["tolerance"] or str(TOLERANCE), text))
    if stripped.lower().startswith("scs"):
        raise UserError(
            f"--until cannot take {text!r}: SCS depends on the number of pictures a synset, which such a run "
            f"chooses by what it sees; it takes {FORMS}"
        )
    raise UserError(f"--until cannot take {text!r}: it takes {FORMS}")


def _read_share(text: str, whole: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise UserError(f"--until cannot take {whole!r}: {text!r} is no number between 0 and 1")
    return value
