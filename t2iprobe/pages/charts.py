"""Coordinates for the hand-made SVG charts of the pages (the drawing itself is in charts.html)."""

from collections.abc import Sequence
from math import floor, log10
from typing import Any

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
