"""The page of a sweep: scores along each axis, the trade-off of the two, every cell, every neighbour."""

from collections.abc import Mapping, Sequence
from typing import Any

from t2iprobe.hypernymy.sweep_results import PAIRED, best_cell
from t2iprobe.pages import (
    flatten,
    format_interval,
    format_p,
    format_score,
    format_signed,
    format_signed_interval,
    name_classifier,
    write_value,
)
from t2iprobe.pages.sections import (
    Cell,
    Chart,
    Figure,
    Mark,
    Section,
    Table,
    draw_lines,
    number,
    render_sections,
)

Results = Mapping[str, Any]

NAMES = {"isp": "ISP", "scs": "SCS"}
#: More lines than this cannot be told apart.
MOST_LINES = 6


def render(results: Results) -> str:
    """Return the page of a sweep as one HTML text."""
    cells = results["cells"]
    samples = {cell["coverage"]["samples_min"] for cell in cells}
    synsets = cells[0]["coverage"]["synsets"]
    return render_sections(
        kicker="Hypernymy probe · sweep",
        title=f"{cells[0]['model']} over {' × '.join(results['axes'])}",
        standfirst=f"{len(cells)} cells of {synsets} synsets with "
        f"{' or '.join(map(str, sorted(samples)))} pictures each, judged by "
        f"{name_classifier(results['classifier'])}.",
        content=[
            _show_overview(results),
            *(_show_axis(results, axis) for axis in results["axes"] if _is_numeric(results, axis)),
            _show_trade(results),
            Section("cells", "All cells", tables=[_list_cells(results)]),
            *([_show_neighbours(results)] if results["neighbours"] else []),
            Section("settings", "What the cells have in common", facts=flatten(results["configuration"])),
            Section("meanings", "What it means", meanings=_MEANINGS),
        ],
    )


def _is_numeric(results: Results, axis: str) -> bool:
    values = results["axes"][axis]
    return axis != "seed" and len(values) > 1 and all(isinstance(value, int | float) for value in values)


def _show_overview(results: Results) -> Section:
    figures = []
    for metric, text in (
        ("isp", "The share of what the classifier sees that lies below the word."),
        ("scs", "How far pictures of a word differ within its kinds."),
    ):
        cell = best_cell(results, metric)
        if cell[metric]["value"] is None:
            continue
        figures.append(
            Figure(
                f"Highest {NAMES[metric]}",
                format_score(cell[metric]["value"]),
                f"{format_interval(cell[metric]['interval'])} at {_write_place(cell['place'])}",
                text,
            )
        )
    return Section("overview", "In short", figures=figures, notices=_write_findings(results))


def _write_findings(results: Results) -> list[str]:
    texts = []
    for metric in PAIRED:
        for axis in results["axes"]:
            rows = [row for row in results["neighbours"] if row["axis"] == axis]
            tested = [row for row in rows if row[metric]["p_holm"] is not None]
            found = [row for row in tested if row[metric]["p_holm"] <= 0.05]
            if tested:
                up = sum(row[metric]["difference"] > 0 for row in found)
                texts.append(
                    f"{NAMES[metric]} along {axis}: of {len(tested)} pairs of neighbours {up} rise and "
                    f"{len(found) - up} fall beyond chance (p ≤ 0.05 for other words, Holm)."
                )
    return texts


def _write_place(place: Mapping[str, Any]) -> str:
    return ", ".join(f"{axis} {_write(value)}" for axis, value in place.items())


def _write(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else write_value(value)


def _group(results: Results, axis: str) -> dict[str, list[Any]]:
    """Return the cells by their place on the other axes, as many as can be drawn, spread evenly."""
    lines: dict[str, list[Any]] = {}
    for cell in results["cells"]:
        others = {key: value for key, value in cell["place"].items() if key != axis}
        lines.setdefault(_write_place(others) or "all", []).append(cell)
    names = list(lines)
    if len(names) > MOST_LINES:
        step = (len(names) - 1) / (MOST_LINES - 1)
        names = [names[round(index * step)] for index in range(MOST_LINES)]
    return {name: lines[name] for name in names}


def _show_axis(results: Results, axis: str) -> Section:
    lines = _group(results, axis)
    charts = [chart for metric in PAIRED if (chart := _draw_metric(lines, axis, metric)) is not None]
    return Section(f"by-{axis}", f"Along {axis}", charts=charts)


def _draw_metric(lines: Mapping[str, Sequence[Any]], axis: str, metric: str) -> Chart | None:
    series, marks = {}, {}
    for name, cells in lines.items():
        known = [cell for cell in cells if cell[metric]["value"] is not None]
        if known:
            series[name] = [(cell["place"][axis], cell[metric]["value"]) for cell in known]
            marks[name] = [
                Mark(
                    cell["place"][axis],
                    cell[metric]["value"],
                    cell[metric]["interval"],
                    title=f"{_write_place(cell['place'])}: {format_score(cell[metric]['value'])} "
                    f"({format_interval(cell[metric]['interval'])})",
                )
                for cell in known
            ]
    if not series:
        return None
    caption = "With 95 % intervals over pictures."
    return draw_lines(
        f"{metric}-{axis}", f"{NAMES[metric]} and {axis}", caption, axis, NAMES[metric], series, marks
    )


def _show_trade(results: Results) -> Section:
    numeric = [axis for axis in results["axes"] if _is_numeric(results, axis)]
    axis = "guidance" if "guidance" in numeric else (numeric or list(results["axes"]))[0]
    series, marks = {}, {}
    for name, cells in _group(results, axis).items():
        known = [cell for cell in cells if cell["scs"]["value"] is not None]
        if known:
            series[name] = [(cell["isp"]["value"], cell["scs"]["value"]) for cell in known]
            marks[name] = [
                Mark(
                    cell["isp"]["value"],
                    cell["scs"]["value"],
                    cell["scs"]["interval"],
                    _write(cell["place"][axis]),
                    f"{_write_place(cell['place'])}: ISP {format_score(cell['isp']['value'])}, "
                    f"SCS {format_score(cell['scs']['value'])}",
                )
                for cell in known
            ]
    if not series:
        return Section("trade-off", "The trade-off", notices=["One picture a synset has no SCS."])
    chart = draw_lines(
        "trade",
        "SCS over ISP",
        f"A line follows {axis}, whose value stands beside each dot; up and right is better.",
        "ISP",
        "SCS",
        series,
        marks,
        wide=True,
    )
    return Section("trade-off", "The trade-off", charts=[chart])


def _list_cells(results: Results) -> Table:
    axes = list(results["axes"])
    classifiers = list(results["cells"][0]["classifiers"])[1:]
    rows = [
        [
            *(_cell(cell["place"][axis]) for axis in axes),
            *(number(cell[metric]["value"], 4, cell[metric]["interval"]) for metric in PAIRED),
            number(cell["scs_corrected"]["value"], 4, cell["scs_corrected"]["interval"]),
            Cell(str(cell["known"]), cell["known"]),
            Cell(str(cell["coverage"]["samples_min"]), cell["coverage"]["samples_min"]),
            *(number(cell["classifiers"][name]["isp"], 4) for name in classifiers),
        ]
        for cell in results["cells"]
    ]
    columns = [*axes, "ISP", "SCS", "SCS corrected", "Known words", "N"]
    columns += [f"ISP, {name_classifier(name)}" for name in classifiers]
    return Table("cell-table", "Every cell, with 95 % intervals over pictures.", columns, rows)


def _cell(value: Any) -> Cell:
    return Cell(_write(value), value if isinstance(value, int | float) else write_value(value))


def _show_neighbours(results: Results) -> Section:
    rows = []
    for row in results["neighbours"]:
        cells = [Cell(row["a"], row["a"]), Cell(row["b"], row["b"])]
        for metric in PAIRED:
            found = row[metric]
            cells.append(
                Cell(
                    format_signed(found["difference"]),
                    "" if found["difference"] is None else found["difference"],
                    format_signed_interval(found["interval"]),
                )
            )
            cells.append(Cell(format_p(found["p_holm"]), "" if found["p_holm"] is None else found["p_holm"]))
        rows.append(cells)
    caption = (
        "The second minus the first, paired by synset and picture, with 95 % intervals over pictures; "
        "p asks whether other words would show it, too, corrected for all pairs (Holm)."
    )
    table = Table("pair-table", caption, ("From", "To", "ISP", "p", "SCS", "p (SCS)"), rows, words=2)
    return Section("neighbours", "Neighbours", tables=[table])


_MEANINGS = (
    ("ISP", "In-subtree probability: what the classifier gives, in all, to the classes below the synset."),
    ("SCS", "Subtree coverage score at this number of pictures, over its published normaliser."),
    ("SCS corrected", "An estimate for unlimited pictures (jackknife)."),
    (
        "Same noise",
        "Every cell begins the n-th picture of a word with the same noise, unless the seed is what varies.",
    ),
)
