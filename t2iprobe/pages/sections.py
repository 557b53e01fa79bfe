"""Pages of figures, charts and tables in the common look, for results that need no page of their own."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from t2iprobe import __version__
from t2iprobe.pages import SCALE, charts, format_score, render_page
from t2iprobe.pages.charts import Mark

__all__ = [
    "Cell",
    "Chart",
    "Figure",
    "Mark",
    "Section",
    "Table",
    "draw_dots",
    "draw_lines",
    "number",
    "render_sections",
]


@dataclass(frozen=True)
class Figure:
    """A headline number; `within`: its interval or spread, in words."""

    title: str
    value: str
    within: str
    text: str = ""


@dataclass(frozen=True)
class Cell:
    """A table's cell; `sort` is what its column is sorted by."""

    text: str
    sort: float | str = ""
    within: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first `words` columns are words, the others numbers."""

    id: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: int = 1


@dataclass(frozen=True)
class Chart:
    """Dots with a range, or lines (`plot`); `wide` takes the place of two."""

    id: str
    title: str
    caption: str
    label_x: str
    label_y: str = ""
    rows: Sequence[dict[str, Any]] = ()
    ticks: Sequence[float] = ()
    plot: dict[str, Any] | None = None
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """A part of a page, in this order."""

    id: str
    title: str
    texts: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    notices: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    meanings: Sequence[tuple[str, str]] = ()
    command: str = ""
    facts: Sequence[tuple[str, str]] = field(default=())


def number(value: float | None, digits: int = 3, interval: Sequence[float] | None = None) -> Cell:
    """Return a number as a cell, with its interval behind it."""
    within = "" if not interval else f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"
    return Cell(format_score(value, digits), "" if value is None else value, within)


def draw_dots(
    id: str,
    title: str,
    caption: str,
    label: str,
    rows: Iterable[tuple[str, float, float, Sequence[float] | None]],
) -> Chart:
    """Return a chart of rows (name, value ●, reference ○, interval)."""
    placed: list[dict[str, Any]] = [
        {"name": name, "after": value, "before": reference, "interval": interval, "significant": True}
        for name, value, reference, interval in rows
    ]
    highest = max(max([row["after"], row["before"], *(row["interval"] or [])]) for row in placed)
    return Chart(id, title, caption, label, rows=placed, ticks=charts.choose_ticks(highest))


def draw_lines(
    id: str,
    title: str,
    caption: str,
    label_x: str,
    label_y: str,
    series: dict[str, list[tuple[float, float]]],
    marks: Mapping[str, Sequence[Mark]] | None = None,
    *,
    wide: bool = False,
) -> Chart:
    """Return a chart of named lines, with dots on them where `marks` has any.

    Its x axis begins at 0; that of a `wide` one, where the lines do.
    """
    places = [x for points in series.values() for x, _ in points]
    first, last = (min(places), max(places)) if wide else (0, max(places))
    margin = 0.03 * (last - first) if wide else 0
    width, height = (840, 320) if wide else (340, 190)
    plot = charts.plot_lines(
        series, first_x=first - margin, last_x=last + margin, marks=marks, width=width, height=height
    )
    return Chart(id, title, caption, label_x, label_y, plot=plot, wide=wide)


def render_sections(*, kicker: str, title: str, standfirst: str, content: Sequence[Section]) -> str:
    """Return the page as one HTML text."""
    return render_page(
        "sections_report.html",
        version=__version__,
        kicker=kicker,
        title=title,
        standfirst=standfirst,
        content=content,
        sections=[(section.id, section.title) for section in content],
        data={"scale": SCALE, "runs": [], "synsets": {}},
        strips=[],
    )
