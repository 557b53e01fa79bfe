"""The page that compares two runs, from the comparison and both runs' results and pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from t2iprobe import __version__
from t2iprobe.hypernymy import facts, views
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.hypernymy.report_page import Entries, Shown, embed_synsets
from t2iprobe.hypernymy.views import Row
from t2iprobe.pages import charts, render_page
from t2iprobe.pages.thumbnails import BUDGET_BYTES, Pictures, make_strips

SECTIONS = (
    ("overview", "In short"),
    ("scatter", "Synset by synset"),
    ("concepts", "What each knows"),
    ("synsets", "All synsets"),
    ("settings", "The two runs"),
)
SIDE = 460  # of the scatter plot, in its own units
ALPHA = 0.05


@dataclass(frozen=True)
class Side:
    """One run of a comparison: its (complete) results, its kept pictures, their plan entries."""

    results: Mapping[str, Any]
    pictures: Pictures
    entries: Entries = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The model's name."""
        return facts.name_model(self.results)


def render_comparison(
    comparison: Mapping[str, Any],
    sides: Sequence[Side],
    *,
    classifier: str,
    hierarchy: Hierarchy | None = None,
) -> str:
    """Return the page that compares runs A and B as one HTML text; differences are B minus A.

    Args:
        comparison: what `statistics.compare` returned.
        sides: A and B.
        classifier: the judge of both.
        hierarchy: of its classes (ImageNet's by default).
    """
    hierarchy = hierarchy or Hierarchy.imagenet()
    names = name_sides(sides)
    shown = []
    for name, side in zip(names, sides, strict=True):
        side_rows = views.enrich_rows(side.results, hierarchy)
        synsets = [row["synset"] for row in side_rows]
        strips = make_strips(synsets, side.pictures, BUDGET_BYTES // 2)
        shown.append(Shown(side.results, side_rows, side.entries, strips, name))
    nodes = views.build_nodes([row for side in shown for row in side.rows])
    rows = [describe_row(row, nodes) for row in comparison["synsets"]]
    data = embed_synsets(nodes, shown)
    for row in rows:
        data["synsets"][row["synset"]] |= {"difference": row["difference"], "q": row["q"]}
    return render_page(
        "hypernymy_comparison.html",
        version=__version__,
        title=f"{names[0]} and {names[1]}: hypernymy probe",
        sections=SECTIONS,
        names=names,
        comparison=comparison,
        classifier=facts.name_classifier(classifier),
        samples=facts.count_samples(comparison),
        rows=rows,
        measures=[{"label": label, **comparison["results"][key]} for key, label in facts.MEASURES.items()],
        known=[sum(row[f"known_{side}"] for row in rows) for side in "ab"],
        significant=[
            sum(row["significant"] and row["difference"] < 0 for row in rows),
            sum(row["significant"] and row["difference"] > 0 for row in rows),
        ],
        points=place_points(rows),
        groups=choose_differences(rows, names),
        has_strips=[set(side.strips) for side in shown],
        settings=compare_settings(sides),
        data=data,
        strips=[{name: vars(strip) for name, strip in side.strips.items()} for side in shown],
    )


def name_sides(sides: Sequence[Side]) -> list[str]:
    """Return the two runs' names, with A and B where they would be the same."""
    names = [side.name for side in sides]
    return names if names[0] != names[1] else [f"{names[0]} (A)", f"{names[1]} (B)"]


def describe_row(row: Row, nodes: Mapping[str, views.Node]) -> Row:
    """Return a row of the comparison with the words of its synset."""
    node = nodes[row["synset"]]
    significant = row["q"] is not None and row["q"] <= ALPHA
    words = {"lemma": node.lemma, "lemmas": node.lemmas, "gloss": node.gloss, "kind": node.kind}
    return {**row, **words, "significant": significant}


def place_points(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the points of the scatter plot, on logarithmic axes."""
    return [
        {
            "synset": row["synset"],
            "x": charts.place_on_log_axis(row["isp_a"], SIDE),
            "y": charts.place_on_log_axis(row["isp_b"], SIDE),
            "a": row["isp_a"],
            "b": row["isp_b"],
        }
        for row in rows
    ]


def choose_differences(rows: Sequence[Row], names: Sequence[str], count: int = 9) -> list[dict[str, Any]]:
    """Return the groups of cards: what only one of the two knows, and where they differ most."""
    by_difference = sorted(rows, key=lambda row: row["difference"])
    groups = []
    for name, other, key, ordered in (
        (names[0], names[1], "a", by_difference),
        (names[1], names[0], "b", by_difference[::-1]),
    ):
        opposite = "b" if key == "a" else "a"
        alone = [row for row in ordered if row[f"known_{key}"] and not row[f"known_{opposite}"]]
        better = [row for row in ordered if (row["difference"] > 0) == (key == "b") and row["difference"]]
        groups += [
            {
                "id": f"only-{key}",
                "label": f"Known to {name} alone ({len(alone)})",
                "text": f"Above chance in {name}, not above chance in {other}; largest difference first.",
                "rows": alone[:count],
                "more": alone[count:],
            },
            {
                "id": f"better-{key}",
                "label": f"Where {name} is ahead",
                "text": "The largest differences in ISP.",
                "rows": better[:count],
                "more": [],
            },
        ]
    return groups


def compare_settings(sides: Sequence[Side]) -> list[dict[str, Any]]:
    """Return every setting, identity and version of both runs, those that differ first."""
    flat: list[dict[str, str]] = []
    for side in sides:
        parts = {key: side.results[key] for key in ("identity", "versions", "created")}
        flat.append(dict(facts.list_settings(side.results) + facts.flatten(parts)))
    keys = list(dict.fromkeys([*flat[0], *flat[1]]))
    pairs = [{"name": key, "a": flat[0].get(key, "–"), "b": flat[1].get(key, "–")} for key in keys]
    return sorted(pairs, key=lambda pair: pair["a"] == pair["b"])
