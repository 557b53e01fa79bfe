"""The classes of a classifier and the WordNet synsets above them, as one boolean matrix.

A synset belongs to the hierarchy if a class lies in its hyponym closure (arXiv 2310.09247, section 3;
instance hyponyms do not count). The classifiable subtree of a synset is the set of those classes.
"""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from t2iprobe import wordnet
from t2iprobe.errors import UserError, suggest

# Written by Hierarchy.from_wnids(<timm's imagenet_synsets.txt>).save(...); a test compares the two. It saves
# every start of the program the two seconds in which nltk opens WordNet.
IMAGENET_TABLE = Path(__file__).parent.parent / "assets" / "imagenet_hierarchy.json"


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """C classes in label order and every synset above them.

    Attributes:
        wnids: [C] wnid of each class.
        classes: [C] synset name of each class.
        class_names: [C] label of each class for people.
        hypernyms: synset name → names of its direct hypernyms, for every synset of the hierarchy.
    """

    wnids: list[str]
    classes: list[str]
    class_names: list[str]
    hypernyms: dict[str, list[str]]

    @classmethod
    @cache
    def imagenet(cls) -> Self:
        """The 1000 ImageNet-1k classes in timm's order: 1860 synsets, of which 860 are not leaves."""
        return cls.load(IMAGENET_TABLE)

    @classmethod
    def from_wnids(cls, wnids: Sequence[str], class_names: Sequence[str] | None = None) -> Self:
        """Build the hierarchy above the given noun wnids (or synset names); item i is class i.

        Raises UserError for an unknown, repeated or non-noun synset.
        """
        synsets = [wordnet.synset(wnid) for wnid in wnids]
        if not synsets:
            raise UserError("a hierarchy needs at least one class")
        repeated = [synset.name() for synset, count in Counter(synsets).items() if count > 1]
        if repeated:
            raise UserError(f"the class {repeated[0]} stands more than once in the label set")
        other = [synset.name() for synset in synsets if synset.pos() != "n"]
        if other:
            raise UserError(f"the class {other[0]} is not a noun: only nouns have subtrees of things to see")
        hypernyms: dict[str, list[str]] = {}
        pending = list(synsets)
        while pending:
            synset = pending.pop()
            if synset.name() not in hypernyms:
                above = synset.hypernyms()
                hypernyms[synset.name()] = sorted(parent.name() for parent in above)
                pending.extend(above)
        return cls(
            wnids=[wordnet.wnid(synset) for synset in synsets],
            classes=[synset.name() for synset in synsets],
            class_names=list(class_names) if class_names else _label_classes(synsets),
            hypernyms=dict(sorted(hypernyms.items())),
        )

    @classmethod
    def from_csv(cls, path: str | Path) -> Self:
        """Read a label set: one class a line, in label order.

        With a header line, the columns `wnid` and (if there) `name` are read; without one, the first column
        holds the wnid and the second, if any, the name.
        """
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                rows = [[cell.strip() for cell in row] for row in csv.reader(file) if any(row)]
        except OSError as error:
            raise UserError(f"cannot read the label set {path}: {error.strerror}") from error
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"the label set {path} is not a CSV file in UTF-8: {error}") from error
        header = [cell.lower() for cell in rows[0]] if rows else []
        columns = (0, 1)
        if "wnid" in header:
            columns = (header.index("wnid"), header.index("name") if "name" in header else len(header))
            rows = rows[1:]
        if not rows:
            raise UserError(f"the label set {path} holds no class: write one wnid a line")
        if short := next((i for i, row in enumerate(rows, 1) if len(row) <= columns[0]), None):
            raise UserError(f"the label set {path} has no wnid in class {short}")
        names = [row[columns[1]] for row in rows if len(row) > columns[1]]
        return cls.from_wnids([row[columns[0]] for row in rows], names if len(names) == len(rows) else None)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

    def save(self, path: str | Path) -> None:
        """Write the hierarchy as JSON; `load` reads it without opening WordNet."""
        Path(path).write_text(json.dumps(asdict(self), indent=0, ensure_ascii=False), encoding="utf-8")

    def content_hash(self) -> str:
        """Hash classes, their order and the links between synsets (not the labels for people)."""
        content = json.dumps([self.wnids, self.classes, sorted(self.hypernyms.items())])
        return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"

    @cached_property
    def all_synsets(self) -> list[str]:
        """Every synset with a class in its subtree, sorted; 1860 for ImageNet."""
        return sorted(self.hypernyms)

    @cached_property
    def synsets(self) -> list[str]:
        """The synsets with another synset of the hierarchy below them, sorted; 860 for ImageNet."""
        above = {parent for parents in self.hypernyms.values() for parent in parents}
        return sorted(above)

    @cached_property
    def leaves(self) -> list[str]:
        """The synsets with nothing below them, sorted; the 1000 classes for ImageNet."""
        return sorted(set(self.hypernyms) - set(self.synsets))

    @cached_property
    def subtrees(self) -> NDArray[np.bool_]:
        """[S, C]: is class c in the subtree of `synsets[s]`?"""
        return self.subtrees_of(self.synsets)

    def subtrees_of(self, names: Sequence[str]) -> NDArray[np.bool_]:
        """[len(names), C] classifiable subtrees of the named synsets."""
        return self._reach[[self._position(name) for name in names]]

    def subtree(self, name: str) -> NDArray[np.bool_]:
        """[C] classifiable subtree of one synset, given by name; a class is in its own subtree."""
        return self._reach[self._position(name)]

    def parents(self, name: str) -> list[str]:
        """Direct hypernyms of a synset, sorted."""
        self._position(name)
        return self.hypernyms[name]

    def children(self, name: str) -> list[str]:
        """Direct hyponyms of a synset within the hierarchy, sorted."""
        self._position(name)
        return self._children.get(name, [])

    def descendants(self, name: str) -> list[str]:
        """Every synset of the hierarchy strictly below `name`, sorted."""
        below: set[str] = set()
        pending = self.children(name)
        while pending:
            below.update(pending)
            pending = [child for parent in pending for child in self.children(parent) if child not in below]
        return sorted(below)

    def resolve(self, name: str) -> str:
        """Return the synset of the hierarchy meant by a name, wnid or lemma (its first sense that is there).

        Raises UserError where WordNet has no such synset or no class lies below it.
        """
        name = name.strip()
        if name in self.hypernyms:
            return name
        try:
            found = wordnet.synset(name)
        except UserError as error:
            near = suggest(name, self.all_synsets)
            raise UserError(f"no synset {name!r} in the hierarchy{near}" if near else str(error)) from None
        if found.name() in self.hypernyms:
            return found.name()
        is_lemma = "." not in name and name.lower() != wordnet.wnid(found)
        senses = wordnet.reader().synsets(name.replace(" ", "_"), "n") if is_lemma else []
        for sense in senses:
            if sense.name() in self.hypernyms:
                return sense.name()
        raise UserError(f"no class of the classifier lies below {found.name()}: it cannot be judged")

    def select(self, spec: str | Iterable[str]) -> list[str]:
        """Return the synsets that `spec` names, without repeats.

        Items, separated by commas or given as a list: `nonleaf`, `leaves`, `all`, `subtree:NAME` (NAME and
        everything below it), a name, wnid or lemma, or the path of a file with one of these a line
        (``#`` starts a comment). Raises UserError with near names.
        """
        items = spec.split(",") if isinstance(spec, str) else list(spec)
        names = [name for item in items if item.strip() for name in self._expand(item.strip())]
        if not names:
            raise UserError(f"no synset is selected by {spec!r}")
        return list(dict.fromkeys(names))

    def _expand(self, item: str) -> list[str]:
        sets = {"nonleaf": self.synsets, "leaves": self.leaves, "all": self.all_synsets}
        if item in sets:
            return sets[item]
        if item.startswith("subtree:"):
            top = self.resolve(item.removeprefix("subtree:"))
            return [top, *self.descendants(top)]
        if Path(item).is_file():
            return [name for line in _read_lines(Path(item)) for name in self._expand(line)]
        if "/" in item or item.endswith((".txt", ".csv")):
            raise UserError(f"there is no file {item} to read synsets from")
        return [self.resolve(item)]

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.all_synsets)}

    def _position(self, name: str) -> int:
        if name not in self._positions:
            raise UserError(f"no synset {name!r} in the hierarchy{suggest(name, self.all_synsets)}")
        return self._positions[name]

    @cached_property
    def _children(self) -> dict[str, list[str]]:
        children: dict[str, list[str]] = {}
        for name in self.all_synsets:
            for parent in self.hypernyms[name]:
                children.setdefault(parent, []).append(name)
        return children

    @cached_property
    def _reach(self) -> NDArray[np.bool_]:
        """[all synsets, C], filled by walking up from each class."""
        reach = np.zeros((len(self.hypernyms), len(self.classes)), dtype=bool)
        for label, name in enumerate(self.classes):
            pending = [name]
            while pending:
                current = pending.pop()
                if not reach[self._positions[current], label]:
                    reach[self._positions[current], label] = True
                    pending.extend(self.hypernyms[current])
        reach.setflags(write=False)
        return reach


def _label_classes(synsets: Sequence["wordnet.Synset"]) -> list[str]:
    """First lemma of each class, with its hypernym in brackets where two share it (crane, maillot)."""
    lemmas = [synset.lemma_names()[0].replace("_", " ") for synset in synsets]
    shared = {lemma for lemma, count in Counter(lemmas).items() if count > 1}
    labels = []
    for lemma, synset in zip(lemmas, synsets, strict=True):
        above = synset.hypernyms()
        kind = above[0].lemma_names()[0].replace("_", " ") if above else synset.name()
        labels.append(f"{lemma} ({kind})" if lemma in shared else lemma)
    return labels


def _read_lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read synsets from {path}: {error}") from error
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]
