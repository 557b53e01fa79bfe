"""The shared look of every HTML report: one file, no network, light and dark, screen and paper."""

import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

#: Upper ends of the colour steps for a probability; the last step is open. Shown in every legend.
SCALE = (0.01, 0.03, 0.1, 0.3, 0.6)


def colour_step(value: float) -> int:
    """Return which of the six colour steps (0 palest … 5 deepest) shows `value`, a probability."""
    return sum(value >= end for end in SCALE)


def format_score(value: float | None, digits: int = 4) -> str:
    """Return a score with a fixed number of decimals, an en dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def format_interval(interval: list[float | None] | None, digits: int = 4) -> str:
    """Return ``lo to hi``, an en dash where there is no interval."""
    if not interval or any(end is None or not math.isfinite(end) for end in interval):
        return "–"
    return f"{format_score(interval[0], digits)} to {format_score(interval[1], digits)}"


def format_signed(value: float | None, digits: int = 4) -> str:
    """Return a difference with its sign, an en dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:+.{digits}f}".replace("-", "−")


def format_signed_interval(interval: list[float] | None) -> str:
    """Return ``lo to hi`` of a difference, an en dash where there is no interval."""
    return f"{format_signed(interval[0])} to {format_signed(interval[1])}" if interval else "–"


def format_p(value: float | None) -> str:
    """Return a p or q value with three decimals, ``< 0.001`` below that."""
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def format_times(value: float | None) -> str:
    """Return a ratio as ``×3.2``."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"×{value:.0f}" if value >= 9.95 else f"×{value:.1f}" if value >= 0.95 else f"×{value:.2f}"


def format_seconds(seconds: float) -> str:
    """Return a duration as ``0.4 s``, ``42 s``, ``3 min 20 s`` or ``1 h 5 min``."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def name_classifier(name: str) -> str:
    """Return a classifier's name for people."""
    return "EfficientNet-Lite0" if name == "embedded" else name


def flatten(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested settings as (dotted name, text) pairs."""
    pairs: list[tuple[str, str]] = []
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            pairs += flatten(value, f"{name}.")
        else:
            pairs.append((name, write_value(value)))
    return pairs


def write_value(value: Any) -> str:
    """Return a setting as text; a long list as its length."""
    if isinstance(value, list | tuple):
        texts = [write_value(item) for item in value]
        return f"{len(texts)} in all" if len(texts) > 12 else ", ".join(texts) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {write_value(item)}" for key, item in value.items()) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not set" if value is None else str(value)


def embed_json(data: Any) -> Markup:
    """Return `data` as JSON that is safe inside a ``<script type="application/json">`` element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def read_asset(name: str) -> Markup:
    """Return one of the package's own css, js or svg files, to be inlined as it is."""
    return Markup((files(__package__) / name).read_text(encoding="utf-8"))


@cache
def environment() -> Environment:
    """Return the jinja2 environment of the pages: everything escaped, undefined names are errors."""
    result = Environment(
        loader=PackageLoader("t2iprobe.pages", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable] = {
        "score": format_score,
        "interval": format_interval,
        "p": format_p,
        "times": format_times,
        "seconds": format_seconds,
        "signed": format_signed,
        "signed_interval": format_signed_interval,
        "capitalize_first": lambda text: text[:1].upper() + text[1:],
        "step": colour_step,
        "embed_json": embed_json,
    }
    result.filters.update(filters)
    result.globals.update(read_asset=read_asset, SCALE=SCALE)
    return result


def render_page(template: str, **context: Any) -> str:
    """Return a whole page as one HTML text."""
    return environment().get_template(template).render(**context)
