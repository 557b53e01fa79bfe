"""Importance weights by their formula, a classifier that learns, both the same everywhere."""

import itertools
import math
import random
import zlib
from pathlib import Path

import numpy as np
import pytest

from t2iprobe.errors import UserError
from t2iprobe.llm.corpus.documents import Source
from t2iprobe.llm.corpus.importance import BUCKETS, hash_features, load_target, score_target, train_target
from t2iprobe.llm.corpus.signals import Document

GOOD = ["a", "photo", "red", "fox", "in", "the", "snow", "with", "trees", "an", "old", "wooden", "bench"]
BAD = ["click", "here", "to", "buy", "cheap", "pills", "now", "best", "price", "free", "win", "money"]


def write(path: Path, words: list[str], count: int, seed: int) -> Source:
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(words, k=rng.randrange(4, 16))) for _ in range(count)]
    path.write_text("".join(text + "\n" for text in texts))
    return Source.open(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("target")
    good, bad = write(folder / "good.txt", GOOD, 200, 0), write(folder / "bad.txt", BAD, 300, 1)
    return folder / "model.npz", train_target("wikiref", good, bad, folder / "model.npz")


def test_the_formula(model: tuple[Path, dict]) -> None:
    counts, lengths = [], []
    for name in ("good.txt", "bad.txt"):
        buckets, words = np.zeros(BUCKETS), []
        for line in (model[0].parent / name).read_text().splitlines():
            raw = line.split()
            words.append(len(raw))
            for gram in [*raw, *(f"{a} {b}" for a, b in itertools.pairwise(raw))]:
                buckets[zlib.crc32(gram.encode()) % BUCKETS] += 1
        counts.append(buckets / buckets.sum())
        lengths.append(sum(words) / len(words))
    raw = ["a", "photo", "in", "cheap", "snow"]
    weight = sum(
        math.log(counts[0][bucket] + 1e-8) - math.log(counts[1][bucket] + 1e-8)
        for bucket in (hash_features(raw) % BUCKETS).tolist()
    )
    chance = [math.exp(-mean) * mean**5 / math.factorial(5) for mean in lengths]

    found = score_target(load_target(model[0]), Document(" ".join(raw)))

    assert found["rps_doc_wikiref_importance"] == [[0, 21, pytest.approx(weight, abs=1e-7)]]
    corrected = weight + math.log(chance[0] + 1e-8) - math.log(chance[1] + 1e-8)
    assert found["rps_doc_wikiref_importance_length_correction"][0][2] == pytest.approx(corrected, abs=1e-7)


def test_the_classifier_tells_them_apart(model: tuple[Path, dict]) -> None:
    assert model[1]["accuracy"]["value"] > 0.95
    target = load_target(model[0])
    good, bad = (
        score_target(target, Document(text))["rps_doc_ml_wikiref_score"][0][2]
        for text in ("a red fox in the snow", "buy cheap pills now")
    )
    assert bad < 0.2 < 0.8 < good


def test_the_same_texts_in_another_order_give_the_same_model(
    model: tuple[Path, dict], tmp_path: Path
) -> None:
    again = train_target(
        "wikiref", *(Source.open(model[0].parent / name) for name in ("good.txt", "bad.txt")),
        tmp_path / "again.npz",
    )  # fmt: skip

    assert again["accuracy"] == model[1]["accuracy"]
    for name in ("log_ratio", "weights"):
        one, other = (getattr(load_target(path), name) for path in (model[0], tmp_path / "again.npz"))
        np.testing.assert_array_equal(one, other)


def test_hashes_do_not_change() -> None:
    assert hash_features(["a", "red", "fox"]).tolist() == [
        zlib.crc32(gram) for gram in (b"a", b"red", b"fox", b"a red", b"red fox")
    ]


def test_a_limit_takes_that_many(model: tuple[Path, dict], tmp_path: Path) -> None:
    sources = (Source.open(model[0].parent / name) for name in ("good.txt", "bad.txt"))

    found = train_target("target", *sources, tmp_path / "small.npz", limit=50)

    assert (found["target_texts"], found["source_texts"]) == (50, 50)


def test_text_without_words_has_no_score(model: tuple[Path, dict]) -> None:
    assert score_target(load_target(model[0]), Document(" \n"))["rps_doc_ml_wikiref_score"] == [[0, 2, None]]


def test_mistakes(model: tuple[Path, dict], tmp_path: Path) -> None:
    few = write(tmp_path / "few.txt", GOOD, 5, 0)
    with pytest.raises(UserError, match="has 5 texts: 20 are the least"):
        train_target("target", few, few, tmp_path / "x.npz")
    with pytest.raises(UserError, match="a target's name is one word"):
        train_target("Wiki ref", few, few, tmp_path / "x.npz")
    (tmp_path / "broken.npz").write_bytes(model[0].read_bytes()[:500])
    with pytest.raises(UserError, match="cannot read the target"):
        load_target(tmp_path / "broken.npz")
