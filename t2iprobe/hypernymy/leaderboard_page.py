"""The leaderboard's page: a sortable table for each classifier, and how the classifiers agree on the runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from t2iprobe.hypernymy.leaderboard import METRICS, SETTINGS, write_rank
from t2iprobe.pages import format_interval, format_score, write_value
from t2iprobe.pages.sections import Cell, Section, Table, draw_dots, number, render_sections

Results = Mapping[str, Any]

NAMES = {"isp": "ISP", "scs": "SCS"}


def render(results: Results) -> str:
    """Return the leaderboard as one HTML text."""
    runs = list(results["settings"])
    judges = list(results["classifiers"])
    return render_sections(
        kicker="Hypernymy probe · leaderboard",
        title="Leaderboard",
        standfirst=f"What models understand of WordNet: {_count(runs, 'run')}, {_count(judges, 'judge')}. "
        "Runs have ranks only among runs that compare.",
        content=[
            *(_show_judge(results, judge, place) for place, judge in enumerate(judges)),
            *([_show_agreement(results)] if results["agreement"]["isp"] else []),
            Section("settings", "Settings", tables=[_list_settings(results)]),
            Section("meanings", "What it means", meanings=_MEANINGS),
        ],
    )


def _count(items: Sequence[Any], word: str) -> str:
    return f"{len(items)} {word}{'s' if len(items) != 1 else ''}"


def _show_judge(results: Results, judge: str, place: int) -> Section:
    table = results["classifiers"][judge]
    notices = [
        f"{row['run']} does not compare: {', '.join(row['differs'])}." for row in table if row["differs"]
    ]
    notices += [
        f"The SCS of {row['run']} does not compare: {', '.join(row['scs_differs'])}."
        for row in table
        if row["scs_differs"] and not row["differs"]
    ]
    if unjudged := results["unjudged"][judge]:
        notices.append(f"Not judged by {judge}: {', '.join(unjudged)}.")
    ranked = [row for row in table if row["ranks"]["isp"]]
    charts = []
    if len(ranked) > 1:
        dots = [
            (row["run"], row["isp"]["value"], row["scs"]["value"] or 0.0, row["isp"]["interval"])
            for row in ranked
        ]
        charts.append(
            draw_dots(
                f"scores-{place}",
                "ISP ● and SCS ○",
                "ISP with its 95 % interval over pictures.",
                "score",
                dots,
            )
        )
    return Section(
        f"judge-{place}", f"By {judge}", notices=notices, charts=charts, tables=[_list_runs(table, place)]
    )


def _list_runs(table: Sequence[Mapping[str, Any]], place: int) -> Table:
    rows = []
    for row in table:
        cells = [Cell(row["run"], row["run"])]
        for metric in METRICS:
            rank = row["ranks"][metric]
            cells += [
                Cell(write_rank(rank), rank["rank"] if rank else ""),
                number(row[metric]["value"], 4, row[metric]["interval"]),
            ]
        low, high = row["samples"]
        cells += [
            number(row["scs_corrected"]["value"], 4),
            Cell(str(low) if low == high else f"{low}–{high}", low),
            Cell(f"{row['known']} of {row['synsets']}", row["known"] / row["synsets"]),
            Cell("; ".join(row["scs_differs"]) or "–", "; ".join(row["scs_differs"])),
        ]
        rows.append(cells)
    columns = ("Run", "Rank", "ISP", "Rank (SCS)", "SCS", "SCS corrected", "N", "Known", "Differs in")
    caption = (
        "With 95 % intervals over pictures. Behind a rank: the ranks that the data allow, all of them "
        "together with 95 % confidence, were other words asked."
    )
    return Table(f"runs-{place}", caption, columns, rows)


def _show_agreement(results: Results) -> Section:
    rows = []
    for metric in METRICS:
        for pair in results["agreement"][metric]:
            rows.append(
                [
                    Cell(f"{pair['a']} and {pair['b']}"),
                    Cell(NAMES[metric]),
                    Cell(
                        format_score(pair["spearman"], 3), "", format_interval(pair["spearman_interval"], 3)
                    ),
                    Cell(format_score(pair["kendall"], 3), "", format_interval(pair["kendall_interval"], 3)),
                    Cell(str(pair["n"]), pair["n"]),
                ]
            )
    table = Table(
        "agreement-table",
        "How two classifiers rank the runs that both judged, with 95 % intervals for more than four runs.",
        ("Classifiers", "By", "Spearman ρ", "Kendall τ", "Runs"),
        rows,
        words=2,
    )
    return Section("agreement", "Do the judges agree?", tables=[table])


def _list_settings(results: Results) -> Table:
    rows = [
        [Cell(run, run), *(Cell(write_value(settings[key]), write_value(settings[key])) for key in SETTINGS)]
        for run, settings in results["settings"].items()
    ]
    columns = ("Run", *(key.capitalize() for key in SETTINGS))
    return Table("settings-table", "What the pictures depend on.", columns, rows, words=len(columns))


_MEANINGS = (
    ("ISP", "In-subtree probability: what the classifier gives, in all, to the classes below the synset."),
    ("SCS", "Subtree coverage score, over its published normaliser; it depends on N, the pictures a synset."),
    (
        "Rank",
        "By the mean. Its range: 1 + the runs that are better beyond chance, to all runs less those that are "
        "worse. Tested on the synsets' differences, corrected for all pairs (Holm).",
    ),
    (
        "Differs in",
        "What keeps a run from being compared: other synsets, other classes, other weights of the "
        "classifier; for SCS also another N.",
    ),
)
