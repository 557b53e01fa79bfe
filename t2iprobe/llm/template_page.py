"""The page of a template study: how far accuracy moves with the template, and what ensembles make of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from t2iprobe.pages import flatten
from t2iprobe.pages.sections import (
    Cell,
    Chart,
    Figure,
    Section,
    Table,
    draw_dots,
    draw_lines,
    number,
    render_sections,
)

Results = Mapping[str, Any]
Run = Mapping[str, Any]


def render(results: Results) -> str:
    """Return the page as one HTML text, from what results.json holds."""
    runs, chance = results["runs"], results["chance"]
    return render_sections(
        kicker="Prompt templates",
        title=f"{results['data']}: {len(runs[0]['scores'])} ways to ask the same",
        standfirst=f"{results['texts']} texts, classified under templates that a person would take for "
        f"equal. Chance is {chance:.3f}; always the most frequent label would be {results['majority']:.3f}.",
        content=[
            Section("overview", "In short", figures=[_figure(run) for run in runs]),
            Section(
                "templates",
                "Template by template",
                charts=[_chart(run, chance, place) for place, run in enumerate(runs)],
                tables=[_list_templates(runs)],
            ),
            Section("ensembles", "Ensembles", charts=_plot_gain(results), tables=[_list_ensembles(results)]),
            Section("ranks", "Does the best template stay the best?", tables=[_list_ranks(results)]),
            Section("settings", "How to repeat it", facts=flatten(results.get("settings", {}))),
            Section("definitions", "What the numbers mean", meanings=_MEANINGS),
        ],
    )


def _name(run: Run) -> str:
    return f"{run['model']}, {run['method']}, {run['shots']} shots"


def _figure(run: Run) -> Figure:
    low, high = min(run["scores"]), max(run["scores"])
    mean = sum(run["scores"]) / len(run["scores"])
    return Figure(
        _name(run), f"{mean:.3f}", f"{low:.3f} to {high:.3f}, by template", f"A range of {high - low:.3f}."
    )


def _write(template: Mapping[str, str]) -> str:
    text = (template["input"] + template["separator"] + template["output"]).replace("\n", "⏎")
    return text + (f" ‖ {template['big_separator']!r}" if template["big_separator"] else "")


def _chart(run: Run, chance: float, place: int) -> Chart:
    rows = [
        (_write(template)[:38], score, chance, interval)
        for template, score, interval in zip(run["templates"], run["scores"], run["intervals"], strict=True)
    ]
    return draw_dots(
        f"dots-{place}",
        _name(run),
        "Accuracy under each template with its 95 % interval over texts, beside chance.",
        "accuracy ● and chance ○",
        sorted(rows, key=lambda row: -row[1]),
    )


def _list_templates(runs: Sequence[Run]) -> Table:
    rows = [
        [Cell(_write(template), _write(template)), Cell(_name(run), _name(run)), number(score, 3, interval)]
        for run in runs
        for template, score, interval in zip(run["templates"], run["scores"], run["intervals"], strict=True)
    ]
    caption = "Accuracy with 95 % intervals over texts. ⏎ is a line break, ‖ what parts demonstrations."
    return Table("template-table", caption, ("Template", "Run", "Accuracy"), rows, words=2)


def _plot_gain(results: Results) -> list[Chart]:
    series = {_name(row): [(s["size"], s["mean"]) for s in row["sizes"]] for row in results["ensembles"]}
    if max(len(points) for points in series.values()) < 2:
        return []
    caption = "Mean accuracy over ensembles of so many templates."
    return [draw_lines("gain", "Gain of ensembles", caption, "templates", "accuracy", series)]


def _list_ensembles(results: Results) -> Table:
    rows = [
        [Cell(_name(row), _name(row)), number(size["size"], 0), number(size["mean"]), number(size["sd"]),
         number(size["min"]), number(size["max"]), number(size["gain"]["value"], 3, size["gain"]["interval"]),
         number(size["first"]), number(size["subsets"], 0)]
        for row in results["ensembles"]
        for size in row["sizes"]
    ]  # fmt: skip
    columns = ("Run", "Templates", "Mean", "sd", "Least", "Greatest", "Gain", "The first drawn", "Subsets")
    caption = (
        "Accuracy over ensembles of so many templates: all subsets, or 200 drawn at random. The gain is "
        "over single templates, with its 95 % interval over texts."
    )
    return Table("ensemble-table", caption, columns, rows)


def _list_ranks(results: Results) -> Table:
    rows = [
        [
            Cell(f"{row['method']}, {question}", row["method"]),
            number(found["spearman"], 2),
            number(found["kendall"], 2),
            number(found["pairs"], 0),
        ]
        for row in results["ranks"]
        for question, found in (
            ("templates between models", row["templates_between_models"]),
            ("models between templates", row["models_between_templates"]),
        )
    ]
    rows += [
        [
            Cell(f"{row['method']} → {row['other']}, templates", row["method"]),
            number(row.get(results["data"]), 2),
            Cell("–"),
            Cell("–"),
        ]
        for row in results["transfer"]
    ]
    caption = "Mean rank correlations; – where there is a single model, or none that differ."
    return Table("rank-table", caption, ("Ranks of", "Spearman ρ", "Kendall τ", "Pairs"), rows)


_MEANINGS = (
    ("Template", "How text and label are written and parted; see arXiv 2401.06766."),
    ("Direct", "The label with which the whole text surprises the model least."),
    ("Channel", "The label stands first; the one after which the text surprises least."),
    ("Calibrate", "The label's probability, divided by what the model gives it for texts without content."),
    ("Ensemble", "The label of the greatest mean probability over several templates."),
)
