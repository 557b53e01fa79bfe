"""The hallucination table: each task's score with its interval and cost, and the two means."""

from collections.abc import Mapping
from typing import Any

from t2iprobe.pages import flatten
from t2iprobe.pages.sections import Cell, Figure, Section, Table, draw_dots, number, render_sections

Results = Mapping[str, Any]


def render(results: Results) -> str:
    """Return the page as one HTML text, from what results.json holds."""
    lines = results["t2iprobe"]
    scored = [line for line in lines if "kind" in line]
    content = []
    if scored:
        figures = [_figure(kind, results[kind]) for kind in ("factuality", "faithfulness") if results[kind]]
        dots = [(line["name"], line["value"], 0.0, line["interval"]) for line in scored]
        chart = draw_dots(
            "scores", "Score of each task", "With 95 % intervals over documents.", "score", dots
        )
        content.append(Section("overview", "In short", figures=figures, charts=[chart]))
    content.append(Section("tasks", "Task by task", tables=[_list_tasks(lines), _list_metrics(lines)]))
    if results["left_out"]:
        facts = list(results["left_out"].items())
        texts = ["These tasks of the suite are not counted in the means."]
        content.append(Section("left-out", "Left out", texts=texts, facts=facts))
    content.append(Section("settings", "How to repeat it", facts=flatten(results["settings"])))
    content.append(Section("definitions", "What the numbers mean", meanings=_MEANINGS))
    return render_sections(
        kicker="Evaluation",
        title=f"{results.get('model_name', 'A language model')}: how far to trust what it says",
        standfirst=f"{len(lines)} tasks of lm-evaluation-harness "
        f"{results.get('lm_eval_version', '')}, answered by the engine.",
        content=content,
    )


def _figure(kind: str, found: Mapping[str, Any]) -> Figure:
    within = "" if found["interval"] is None else "{:.3f} to {:.3f}".format(*found["interval"])
    return Figure(kind.capitalize(), f"{found['value']:.3f}", within, f"The mean of {found['tasks']} tasks.")


def _list_tasks(lines: Any) -> Table:
    rows = []
    for line in lines:
        cost, scored = line["cost"], "kind" in line
        rows.append(
            [
                Cell(line["name"], line["name"]),
                Cell(line.get("kind", "–")),
                Cell(line["task"] + (f" ({line['note']})" if line.get("note") else ""), line["task"]),
                Cell(line.get("metric", "–")),
                number(line["value"], 3, line["interval"]) if scored else Cell("–"),
                number(line["documents"], 0),
                number(line["shots"], 0),
                number(cost["scored_tokens_per_second"], 0),
                number(cost["written_tokens_per_second"], 1),
                number(cost["tokens_per_pass"], 2),
            ]
        )
    columns = (
        *("Name", "Class", "Task", "Metric", "Score", "Documents", "Shots"),
        *("Scored tokens a s", "Written tokens a s", "Tokens a pass"),
    )
    caption = "Scores with 95 % intervals over documents, and what they cost."
    return Table("task-table", caption, columns, rows, words=4)


def _list_metrics(lines: Any) -> Table:
    rows = [
        [Cell(line["name"], line["name"]), Cell(key.partition(",")[0]), number(value, 4)]
        for line in lines
        for key, value in line["metrics"].items()
        if isinstance(value, int | float) and "," in key
    ]
    return Table(
        "metric-table", "Every metric, as the harness gives it.", ("Name", "Metric", "Value"), rows, 2
    )


_MEANINGS = (
    ("Factuality", "Is what it says true of the world? The plain mean of its tasks' primary metrics."),
    ("Faithfulness", "Does it keep to what it was given? The plain mean of its tasks' primary metrics."),
    (
        "Self-check",
        "How far the worst sentence of an answer is borne out by five more; an empty answer counts 0.",
    ),
    ("Tokens a pass", "Tokens written for each pass of the model: what the draft's guesses save."),
)
