"""Coordinates for the hand-made SVG charts of the pages (the drawing itself is in charts.html)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import floor, isfinite, log10
from typing import Any, TypeGuard

#: Probabilities below this are drawn on the left edge of a logarithmic axis.
SMALLEST = 1e-4
DECADES = 4


def place_on_log_axis(value: float, width: float) -> float:
    """Return where a probability lies on an axis from 0.0001 (0) to 1 (`width`)."""
    return width * (log10(min(1.0, max(value, SMALLEST))) + DECADES) / DECADES


def count_bins(values: Sequence[float], bins_per_decade: int = 4) -> list[dict[str, Any]]:
    """Return the logarithmic histogram of probabilities: {low, high, count}; the first bin is open below."""
    total = DECADES * bins_per_decade
    edges = [10 ** (-DECADES + index / bins_per_decade) for index in range(total + 1)]
    counts = [0] * total
    for value in values:
        position = (log10(max(value, SMALLEST)) + DECADES) * bins_per_decade
        # 1e-9: an edge such as 0.01 belongs to the bin that it opens, whatever log10 rounds to.
        counts[min(total - 1, floor(position + 1e-9))] += 1
    return [
        {"low": 0.0 if index == 0 else edges[index], "high": edges[index + 1], "count": count}
        for index, count in enumerate(counts)
    ]


def choose_ticks(highest: float, most: int = 5) -> list[float]:
    """Return round ticks from 0 to at least `highest`."""
    if highest <= 0:
        return [0.0, 1.0]
    power = 10 ** floor(log10(highest))
    step = next(s for s in (power * f for f in (0.1, 0.2, 0.25, 0.5, 1, 2)) if highest / s <= most)
    count = int(-(-highest // step))
    return [round(index * step, 10) for index in range(count + 1)]


def choose_range_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round ticks within `low` … `high`, at least two; the ends need not be round themselves."""
    if not high > low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    power = 10 ** floor(log10(high - low))
    steps = (power * factor for factor in (0.1, 0.2, 0.25, 0.5, 1, 2))
    step = next(step for step in steps if (high - low) / step <= most)
    first = -int(-low // step)
    return [round(index * step, 12) for index in range(first, int(high // step) + 1)]


def write_ticks(ticks: Sequence[float]) -> list[str]:
    """Return ticks as texts with as many decimals as tell them apart, all alike."""
    decimals = max(len(f"{tick:.12f}".rstrip("0").partition(".")[2]) for tick in ticks)
    return [f"{tick:.{decimals}f}".replace("-", "−") for tick in ticks]


@dataclass(frozen=True)
class Mark:
    """A dot on a line, the interval of its y, a word beside it, and what is read when it is pointed at."""

    x: float
    y: float
    interval: Sequence[float] | None = None
    text: str = ""
    title: str = ""


Points = Sequence[Sequence[float | None]]  # (x, y) pairs; y may be None


def plot_lines(
    series: Mapping[str, Points],
    *,
    last_x: float,
    first_x: float = 0.0,
    include: Sequence[float] = (),
    marks: Mapping[str, Sequence[Mark]] | None = None,
    width: float = 340.0,
    height: float = 190.0,
) -> dict[str, Any]:
    """Return lines over `first_x` … `last_x` in SVG coordinates; the y axis covers what is there, not zero.

    Args:
        series: name → points; one without a finite y breaks its line.
        last_x: right end of the x axis.
        first_x: its left end.
        include: y values that must lie on the chart too, such as a threshold.
        marks: name → dots on that line, each with its interval and a word beside it.
        width: of the plotted area, in SVG units.
        height: of the plotted area, in SVG units.

    Returns width, height, lines [{name, path, label_y, marks}], x_ticks and y_ticks [(place, text)], and the
    functions x_of and y_of from values to places.
    """
    marks = marks or {}
    values = [y for points in series.values() for _, y in points if _is_number(y)]
    values += [end for dots in marks.values() for dot in dots for end in dot.interval or ()]
    low, high = min([*values, *include], default=0.0), max([*values, *include], default=1.0)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    low, high = low - margin, high + margin

    def x_of(value: float) -> float:
        return width * (value - first_x) / ((last_x - first_x) or 1)

    def y_of(value: float) -> float:
        return height * (high - value) / (high - low)

    placed = {
        name: [(x_of(x), y_of(y) if _is_number(y) else None) for x, y in thin(points)]
        for name, points in series.items()
    }
    ends = [next((y for _, y in reversed(points) if y is not None), height) for points in placed.values()]
    lines = [
        {
            "name": name,
            "path": write_path(points),
            "label_y": label_y,
            "marks": [
                {
                    "x": x_of(dot.x),
                    "y": y_of(dot.y),
                    "ends": [y_of(end) for end in dot.interval or ()],
                    "text": dot.text,
                    "title": dot.title,
                }
                for dot in marks.get(name, ())
            ],
        }
        for (name, points), label_y in zip(placed.items(), spread(ends), strict=True)
    ]
    x_ticks, y_ticks = choose_range_ticks(first_x, last_x), choose_range_ticks(low, high)
    return {
        "width": width,
        "height": height,
        "lines": lines,
        "x_ticks": list(zip(map(x_of, x_ticks), write_ticks(x_ticks), strict=True)),
        "y_ticks": list(zip(map(y_of, y_ticks), write_ticks(y_ticks), strict=True)),
        "x_of": x_of,
        "y_of": y_of,
    }


def _is_number(value: float | None) -> TypeGuard[float]:
    return value is not None and isfinite(value)


def thin(points: Points, most: int = 700) -> list[Any]:
    """Return every k-th of the points, and the last, so that there are about `most`."""
    stride = max(1, len(points) // most)
    return [*points[:-1:stride], *points[-1:]]


def write_path(points: Sequence[tuple[float, float | None]]) -> str:
    """Return an SVG path through the points, broken where y is None."""
    parts, pen = [], "M"
    for x, y in points:
        if y is not None:
            parts.append(f"{pen}{x:.1f} {y:.1f}")
        pen = "M" if y is None else "L"
    return "".join(parts)


def spread(places: Sequence[float], gap: float = 15.0) -> list[float]:
    """Return where labels stand that are wanted at `places`: in that order, at least `gap` apart."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    result = list(places)
    for before, after in pairwise(order):
        result[after] = max(result[after], result[before] + gap)
    # what was pushed down is taken back by half, so that the labels stay around their lines
    excess = max((result[index] - places[index] for index in order), default=0.0) / 2
    return [value - excess for value in result]
