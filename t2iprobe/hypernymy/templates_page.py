"""The page of a run under several templates: spread, ensembles, ranks."""

from collections.abc import Mapping
from typing import Any

from t2iprobe.pages import format_p
from t2iprobe.pages.sections import (
    Cell,
    Figure,
    Section,
    Table,
    draw_dots,
    draw_lines,
    number,
    render_sections,
)

Results = Mapping[str, Any]
NAMES = {"isp": "ISP", "scs": "SCS", "hit": "Hits"}


def render(results: Results) -> str:
    """Return the page as one HTML text, from what `analyse_templates` returns."""
    runs = results["runs"]
    content = []
    for place, run in enumerate(runs):
        suffix = "" if len(runs) == 1 else f": {run['run']}"
        content += _show(run, suffix, place)
    if len(runs) > 1:
        content.append(_show_ranks(results))
    content.append(Section("definitions", "What the numbers mean", meanings=_MEANINGS))
    first = runs[0]
    count = len(first["templates"])
    return render_sections(
        kicker="Prompt templates",
        title=f"{count} ways to ask for the same picture",
        standfirst=f"{first['synsets']} synsets, {first['samples']} pictures each under every template, with "
        "the same noise. No single-template number is more certain than its spread.",
        content=content,
    )


def _show(run: Results, suffix: str, place: int) -> list[Section]:
    rows = run["templates"]
    dots = [(row["prompt"][:38], row["isp"]["value"], 0.0, row["isp"]["interval"]) for row in rows]
    spread = [
        Figure(
            f"{NAMES[metric]} by template",
            f"{found['mean']:.4f}",
            f"{found['min']:.4f} to {found['max']:.4f}",
            f"sd {found['sd']:.4f}, range {found['range']:.4f}.",
        )
        for metric, found in run["spread"].items()
    ]
    return [
        Section(f"overview-{place}", f"In short{suffix}", figures=spread, notices=_notices(run)),
        Section(
            f"templates-{place}",
            f"Template by template{suffix}",
            charts=[
                draw_dots(
                    f"isp-{place}",
                    "ISP under each template",
                    "With the 95 % interval over synsets, by the prompt for the first synset.",
                    "ISP",
                    sorted(dots, key=lambda dot: -dot[1]),
                )
            ],
            tables=[_list_templates(run, place)],
        ),
        Section(
            f"ensembles-{place}",
            f"Ensembles{suffix}",
            charts=[
                draw_lines(
                    f"hits-{place}",
                    "Hits of picture-side ensembles",
                    "Share of pictures whose likeliest class lies in the subtree, mean over subsets.",
                    "templates",
                    "hits",
                    {"ensemble": [(row["size"], row["hit"]["mean"]) for row in run["ensembles"]]},
                )
            ],
            tables=[_list_ensembles(run, place)],
        ),
    ]


def _notices(run: Results) -> list[str]:
    ranking = run["ranking"]
    texts = [
        f"Two halves of the synsets agree on which templates are good with ρ = "
        f"{ranking['synsets']['spearman']:.2f}."
        if ranking["synsets"]["spearman"] is not None
        else "Halves of the synsets do not differ between templates."
    ]
    if mixed := run["mixed"]:
        texts.append(
            f"Pictures of different templates have {mixed['difference']['value']:+.4f} SCS against as many "
            f"pictures of one template (p {format_p(mixed['difference']['p'])})."
        )
    if mean := run["conditioning"]:
        found = mean["isp"]
        texts.append(
            f"The mean of the embeddings has an ISP of {found['value']:.4f}: "
            f"{found['against_mean']['value']:+.4f} against the templates' mean "
            f"(p {format_p(found['against_mean']['p'])}), {found['against_best']['value']:+.4f} against the "
            f"best of them."
        )
    return texts


def _list_templates(run: Results, place: int) -> Table:
    metrics = list(run["spread"])
    rows = [
        [
            Cell(row["template"], row["template"]),
            Cell(row["prompt"][:90], row["prompt"]),
            *(number(row[metric]["value"], 4, row[metric]["interval"]) for metric in metrics),
            number(row.get("isp_difference", {}).get("value"), 4),
            Cell(format_p(row.get("isp_difference", {}).get("p"))),
        ]
        for row in run["templates"]
    ]
    names = [NAMES[metric] for metric in metrics]
    columns = ("Template", "Such as", *names, "ISP − the first's", "p")
    caption = "With 95 % intervals over synsets; differences to the first template are paired by synset."
    return Table(f"template-table-{place}", caption, columns, rows, words=2)


def _list_ensembles(run: Results, place: int) -> Table:
    metrics = list(run["spread"])
    rows = [
        [
            number(row["size"], 0),
            *(number(row[metric][part], 4) for metric in metrics for part in ("mean", "sd")),
            number(row["isp"]["subsets"], 0),
        ]
        for row in run["ensembles"]
    ]
    columns = ("Templates", *(NAMES[m] + part for m in metrics for part in ("", ", sd")), "Subsets")
    caption = "Picture-side ensembles: means and standard deviations over subsets of the templates."
    return Table(f"ensemble-table-{place}", caption, columns, rows)


def _show_ranks(results: Results) -> Section:
    rows = [
        [Cell(name.replace("_", " ")), number(found["spearman"], 2), number(found["kendall"], 2)]
        for name, found in results["ranks"].items()
    ]
    caption = "Mean rank correlation of ISP over all pairs."
    table = Table("rank-table", caption, ("Ranks of", "Spearman ρ", "Kendall τ"), rows)
    return Section("ranks", "Does the best template stay the best?", tables=[table])


_MEANINGS = (
    ("ISP", "In-subtree probability: what the classifier gives, in all, to the classes below the synset."),
    ("SCS", "Subtree coverage score at this number of pictures, over its published normaliser."),
    ("Hits", "The share of pictures whose likeliest class lies in the subtree."),
    (
        "Picture-side ensemble",
        "The mean of the class probabilities of pictures from several templates, the same noise in each. Its "
        "ISP is the mean of theirs: it takes the choice away, not the mean up.",
    ),
    ("Conditioning-side ensemble", "One picture from the mean of the templates' prompt embeddings."),
)
