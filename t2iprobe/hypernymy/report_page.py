"""The report page of one run, from its results and pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from t2iprobe import __version__
from t2iprobe.hypernymy import facts, views
from t2iprobe.hypernymy.agreement import agree_on_synsets
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.hypernymy.metrics import scs_normaliser
from t2iprobe.hypernymy.views import Row
from t2iprobe.pages import SCALE, charts, render_page
from t2iprobe.pages.thumbnails import Pictures, Strip, make_strips

Entries = Mapping[str, Sequence[Any]]  # synset → PlanEntry of its kept pictures, in their order

SECTIONS = (
    ("overview", "In short"),
    ("tree", "The tree"),
    ("concepts", "Best, worst, unknown"),
    ("synsets", "All synsets"),
    ("settings", "How to repeat it"),
    ("definitions", "What it means"),
)


def render(
    results: Mapping[str, Any],
    pictures: Pictures,
    *,
    entries: Entries | None = None,
    hierarchy: Hierarchy | None = None,
) -> str:
    """Return the report of one run as one HTML text.

    Args:
        results: what results.json holds (see pages/results.schema.json).
        pictures: synset → its kept pictures, as files or as bytes; empty where none was kept.
        entries: synset → the plan entries (prompt, seed) of those pictures.
        hierarchy: the classes of the classifier (ImageNet's by default), to tell which of the classes that
            were seen are a kind of the word.
    """
    results = facts.complete(results)
    hierarchy = hierarchy or Hierarchy.imagenet()
    normaliser = scs_normaliser(hierarchy)
    rows = views.enrich_rows(results, hierarchy)
    nodes = views.build_nodes(rows)
    strips = make_strips([row["synset"] for row in rows], pictures)
    concepts, inlined = lay_out_concepts(rows, strips)
    kinds, depths = views.group_rows(rows, nodes)
    model = facts.name_model(results)
    known = sum(row["known"] for row in rows)
    return render_page(
        "hypernymy_report.html",
        version=__version__,
        title=f"{model}: hypernymy probe",
        sections=SECTIONS,
        created=results["created"],
        results=results,
        model=model,
        classifier=next(iter(results["classifiers"])),
        samples=facts.count_samples(results),
        rows=rows,
        floor=results["uniform"]["isp"],
        normaliser=normaliser,
        bound=views.bound_coverage(rows, normaliser),
        known=known,
        known_interval=views.wilson_interval(known, len(rows)),
        warnings=facts.list_warnings(results),
        median=sorted(row["isp"] for row in rows)[(len(rows) - 1) // 2],
        bins=charts.count_bins([row["isp"] for row in rows]),
        kinds=kinds,
        kind_ticks=charts.choose_ticks(views.find_highest(kinds)),
        depths=depths,
        depth_ticks=charts.choose_ticks(views.find_highest(depths)),
        measures=facts.list_measures(results),
        differences=facts.list_differences(results),
        published=facts.compare_published(results),
        tree=views.build_tree(nodes, open_levels=4 if len(nodes) > 80 else len(nodes)),
        concepts=concepts,
        strips_kept=bool(strips),
        unknown_words=sorted((row for row in rows if not row["known"]), key=lambda row: row["lemma"]),
        others=list(results["classifiers"])[1:],
        classifiers=facts.list_classifiers(results),
        agreement=agree_on_synsets(results["classifiers"]),
        command=facts.write_command(results),
        settings=facts.list_settings(results),
        identity=facts.flatten(results["identity"]),
        versions=facts.flatten(results["versions"]),
        seeding=facts.describe_seeding(results),
        test=facts.describe_test(results),
        data=embed_synsets(nodes, [Shown(results, rows, entries or {}, strips)]),
        strips=[{name: vars(strip) for name, strip in strips.items() if name not in inlined}],
    )


def lay_out_concepts(
    rows: Sequence[Row], strips: Mapping[str, Strip]
) -> tuple[list[dict[str, Any]], set[str]]:
    """Return the groups of cards (best, worst, unknown), and the synsets whose strip stands in a card itself.

    A strip is inlined once in the page: in the first card that shows it, else in the page's data.
    """
    inlined: set[str] = set()
    groups = []
    for group in views.choose_concepts(rows):
        cards = []
        for row in group["rows"]:
            strip = strips.get(row["synset"])
            first = strip is not None and row["synset"] not in inlined
            cards.append({"row": row, "strip": strip, "first": first})
            if strip is not None:
                inlined.add(row["synset"])
        groups.append({**group, "cards": cards})
    return groups, inlined


@dataclass(frozen=True)
class Shown:
    """One run on a page: its results, its enriched rows, its plan entries and strips by synset."""

    results: Mapping[str, Any]
    rows: Sequence[Row]
    entries: Entries
    strips: Mapping[str, Strip]
    name: str = ""


def embed_synsets(nodes: Mapping[str, views.Node], sides: Sequence[Shown]) -> dict[str, Any]:
    """Return what the page's script shows of one synset: WordNet's words, and the result in each run."""
    synsets: dict[str, Any] = {}
    rows = [{row["synset"]: row for row in side.rows} for side in sides]
    for name, node in nodes.items():
        synsets[name] = {
            "lemmas": node.lemmas,
            "gloss": node.gloss,
            "parents": node.parents,
            "children": node.children,
            "runs": [describe_result(side, rows[i].get(name)) for i, side in enumerate(sides)],
        }
    return {"scale": SCALE, "runs": [side.name for side in sides], "synsets": synsets}


SHOWN = (
    "isp", "isp_interval", "floor", "classes", "samples", "known", "p", "q", "scs", "scs_stderr",
    "scs_raw", "scs_corrected",
    "subtree_entropy", "marginal_entropy", "chance", "test", "saw", "inside", "others",
)  # fmt: skip


def describe_result(side: Shown, row: Row | None) -> dict[str, Any] | None:
    """Return one synset's result in one run, with what made every picture that is shown."""
    if row is None:
        return None
    strip = side.strips.get(row["synset"])
    entries = side.entries.get(row["synset"], [])[: strip.count if strip else 1]
    if "folder" in side.results["configuration"]:
        pictures = [{"file": entry.prompt} for entry in entries]
    else:
        # Seeds have up to 63 bits: as text, else JavaScript would round them.
        pictures = [{"prompt": entry.prompt, "seed": str(entry.seed)} for entry in entries]
    return {**{key: row[key] for key in SHOWN}, "entries": pictures}
