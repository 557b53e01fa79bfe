"""What the report pages show, as plain data: the tree, the groups, the chosen concepts. No HTML here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import log, sqrt
from typing import Any

import numpy as np

from t2iprobe.hypernymy.hierarchy import Hierarchy

Row = dict[str, Any]

#: The broad kinds a reader thinks in; a synset is of the nearest one above it.
KINDS = {
    "dog.n.01": "dogs",
    "bird.n.01": "birds",
    "reptile.n.01": "reptiles and amphibians",
    "amphibian.n.03": "reptiles and amphibians",
    "fish.n.01": "fish",
    "invertebrate.n.01": "invertebrates",
    "mammal.n.01": "other mammals",
    "animal.n.01": "other animals",
    "plant.n.02": "plants and fungi",
    "fungus.n.01": "plants and fungi",
    "plant_part.n.01": "plants and fungi",
    "food.n.01": "food and drink",
    "food.n.02": "food and drink",
    "vehicle.n.01": "vehicles",
    "clothing.n.01": "clothing",
    "covering.n.02": "clothing",
    "structure.n.01": "buildings and structures",
    "furnishing.n.02": "furnishings",
    "container.n.01": "containers",
    "device.n.01": "devices and instruments",
    "implement.n.01": "tools and equipment",
    "equipment.n.01": "tools and equipment",
    "artifact.n.01": "other artefacts",
    "geological_formation.n.01": "landscape",
    "person.n.01": "people",
}
OTHER_KIND = "broad and abstract"
#: A synset that holds more of the classes than this scores high whatever is drawn.
BROAD = 0.1


@dataclass
class Node:
    """A synset of the tree: where it hangs, what WordNet says of it, its results if it was probed."""

    name: str
    lemma: str
    lemmas: list[str]
    gloss: str
    parents: list[str]
    depth: int
    kind: str
    row: Row | None = None
    children: list[str] = field(default_factory=list)


@lru_cache(maxsize=4096)
def describe(name: str) -> tuple[list[str], str, tuple[str, ...], int, str]:
    """Return (lemmas, gloss, hypernyms, depth, kind) of a synset; a name WordNet lacks describes itself."""
    from t2iprobe.errors import UserError
    from t2iprobe.wordnet import synset

    try:
        found = synset(name)
    except UserError:
        return [name], "", (), 0, OTHER_KIND
    lemmas = [lemma.replace("_", " ") for lemma in found.lemma_names()]
    hypernyms = tuple(parent.name() for parent in found.hypernyms())
    kind = KINDS.get(name) or (describe(hypernyms[0])[4] if hypernyms else OTHER_KIND)
    return lemmas, found.definition(), hypernyms, found.min_depth(), kind


def build_nodes(rows: Sequence[Row]) -> dict[str, Node]:
    """Return every probed synset and everything above it, parents before children, linked both ways."""
    nodes: dict[str, Node] = {}

    def add(name: str) -> None:
        if name in nodes:
            return
        lemmas, gloss, hypernyms, depth, kind = describe(name)
        for parent in hypernyms:
            add(parent)
        nodes[name] = Node(name, lemmas[0], lemmas, gloss, list(hypernyms), depth, kind)
        for parent in hypernyms:
            nodes[parent].children.append(name)

    for row in rows:
        add(row["synset"])
        nodes[row["synset"]].row = row
    for node in nodes.values():
        node.children.sort()
    return nodes


def build_tree(nodes: Mapping[str, Node], open_levels: int) -> list[dict[str, Any]]:
    """Return the tree from its roots; a synset with several parents hangs, whole, under the first of them.

    Each item: {node, children, elsewhere (shown in full under another parent), open}.
    """

    def hang(name: str, parent: str | None, level: int) -> dict[str, Any]:
        node = nodes[name]
        elsewhere = parent is not None and node.parents[0] != parent
        children = [] if elsewhere else [hang(child, name, level + 1) for child in node.children]
        return {"node": node, "children": children, "elsewhere": elsewhere, "open": level < open_levels}

    return [hang(name, None, 1) for name, node in nodes.items() if not node.parents]


def times_chance(row: Row) -> float | None:
    """Return ISP over its chance floor (the share of the classes that lie in the subtree)."""
    return row["isp"] / row["floor"] if row.get("floor") else None


def wilson_interval(hits: int, total: int) -> list[float]:
    """Return the 95 % Wilson interval of a share."""
    if not total:
        return [0.0, 1.0]
    z, share = 1.959964, hits / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return [max(0.0, middle - half), min(1.0, middle + half)]


def average_groups(rows: Sequence[Row], key: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return for each group its mean ISP, a 95 % interval over its synsets (normal), and its mean floor."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key[row["synset"]], []).append(row)
    result = []
    for name, members in groups.items():
        values = np.array([row["isp"] for row in members])
        mean = float(values.mean())
        half = 1.96 * float(values.std(ddof=1)) / sqrt(len(values)) if len(values) > 1 else None
        result.append(
            {
                "name": name,
                "synsets": len(members),
                "mean": mean,
                "interval": [max(0.0, mean - half), min(1.0, mean + half)] if half is not None else None,
                "floor": float(np.mean([row["floor"] for row in members])),
                "known": sum(bool(row["known"]) for row in members),
            }
        )
    return result


def bound_coverage(rows: Sequence[Row], normaliser: float) -> float | None:
    """Return the highest SCS that this many pictures can show: a mean KL is at most ln min(N, classes)."""
    bounds = [log(min(row["samples"], row["classes"])) for row in rows if row["classes"] > 1]
    return float(np.mean(bounds)) / normaliser if bounds else None


def is_narrow(row: Row) -> bool:
    """Tell whether a synset says something: its subtree holds at most a tenth of the classes."""
    return row["floor"] <= BROAD


def choose_concepts(rows: Sequence[Row], count: int = 12) -> list[dict[str, Any]]:
    """Return the best, the worst and the unknown concepts: {id, label, text, rows}."""
    narrow = [row for row in rows if row["floor"] <= BROAD]
    best = sorted((row for row in narrow if row["known"]), key=lambda row: -row["isp"])
    worst = sorted((row for row in narrow if row["known"]), key=lambda row: row["times"])
    unknown = sorted((row for row in rows if not row["known"]), key=lambda row: -row["saw"][0][1])
    return [
        {
            "id": "best",
            "label": "Understood best",
            "text": "The highest ISP among known words. Left out are synsets that hold more than a tenth of "
            "all classes (entity, animal, …): they score high whatever is drawn.",
            "rows": best[:count],
        },
        {
            "id": "worst",
            "label": "Known, but barely",
            "text": "Above chance, and least so: the lowest ISP for their chance.",
            "rows": [row for row in worst if row not in best[:count]][:count],
        },
        {
            "id": "unknown",
            "label": "Unknown, and taken for something else",
            "text": "Not above chance; first those where the classifier is surest of what it sees instead.",
            "rows": unknown[:count],
        },
    ]


def correlate_ranks(first: Sequence[Row], second: Sequence[Row]) -> float | None:
    """Return Spearman's rank correlation of two classifiers' ISP over the synsets that both judged."""
    from scipy.stats import spearmanr

    other = {row["synset"]: row["isp"] for row in second}
    pairs = [(row["isp"], other[row["synset"]]) for row in first if row["synset"] in other]
    if len(pairs) < 3 or any(len(set(column)) == 1 for column in zip(*pairs, strict=True)):
        return None
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def enrich_rows(results: Mapping[str, Any], hierarchy: Hierarchy) -> list[Row]:
    """Return the per-synset rows with what WordNet says of them, the other classifiers' ISP, and `inside`.

    `inside` tells for each class in `saw` whether it lies in the subtree (None where the label is not known).
    """
    labels = {label: index for index, label in enumerate(hierarchy.class_names)}
    others = {
        name: {row["synset"]: row["isp"] for row in analysis["synsets"]}
        for name, analysis in list(results["classifiers"].items())[1:]
    }
    rows = []
    for row in results["synsets"]:
        name = row["synset"]
        lemmas, gloss, _, _, kind = describe(name)
        subtree = hierarchy.subtree(name) if name in hierarchy.hypernyms else None
        inside = [
            bool(subtree[labels[label]]) if subtree is not None and label in labels else None
            for label, _ in row["saw"]
        ]
        extra: Row = {"lemma": lemmas[0], "lemmas": lemmas, "gloss": gloss, "kind": kind, "inside": inside}
        # Of what was seen, what is worth a reader's time: the first, and what has at least one percent.
        extra["seen"] = [
            (label, probability, is_kind)
            for index, ((label, probability), is_kind) in enumerate(zip(row["saw"], inside, strict=True))
            if index == 0 or probability >= 0.01
        ]
        extra["times"] = times_chance(row)
        extra["others"] = {other: isp.get(name) for other, isp in others.items()}
        rows.append({**row, **extra})
    return rows


def group_rows(
    rows: Sequence[Row], nodes: Mapping[str, Node]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the mean ISP by kind (best first) and by depth in WordNet (general first)."""
    kinds = average_groups(rows, {name: node.kind for name, node in nodes.items()})
    depths = average_groups(rows, {name: node.depth for name, node in nodes.items()})
    kinds.sort(key=lambda group: -group["mean"])
    depths.sort(key=lambda group: group["name"])
    for group in depths:
        group["name"] = f"depth {group['name']}"
    return kinds, depths


def find_highest(groups: Sequence[Mapping[str, Any]]) -> float:
    """Return how far the axis of a chart of groups must reach."""
    return min(1.0, max(max(group["floor"], group["mean"], *(group["interval"] or [])) for group in groups))
