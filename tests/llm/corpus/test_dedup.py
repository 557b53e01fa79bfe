"""Duplicates: planted ones are found, others stay, whatever the hashes, processes and interruptions."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from t2iprobe.llm.corpus import documents
from t2iprobe.llm.corpus.dedup import Fingerprints, deduplicate, find_clusters, read_blocks
from t2iprobe.llm.corpus.documents import Source
from t2iprobe.llm.corpus.minhash import Bands, shingle
from t2iprobe.llm.corpus.signals import Document
from t2iprobe.llm.corpus.streaming import in_processes, stream

VOCABULARY = [f"w{number}" for number in range(3000)]


def jaccard(one: str, other: str, size: str | int) -> float:
    first, second = (set(shingle(Document(text).words, text, size)) for text in (one, other))
    return len(first & second) / len(first | second)


def plant(seed: int, count: int, words: int, changes: int) -> list[str]:
    """Texts in pairs: each and a copy with some words changed."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        own = rng.choices(VOCABULARY, k=words)
        copy = list(own)
        for place in rng.sample(range(words), changes):
            copy[place] = rng.choice(VOCABULARY)
        texts += [" ".join(own), " ".join(copy)]
    return texts


def write(path: Path, texts: list[str]) -> Source:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Source.open(path)


def kept(out: Path) -> list[str]:
    return [json.loads(line)["text"] for line in out.read_text().splitlines()]


@pytest.mark.parametrize("hasher", ["sha1", "rensa"])
@pytest.mark.parametrize(("size", "words", "changes"), [(13, 700, 4), (2, 40, 2), ("char-5", 14, 1)])
def test_planted_pairs_are_found_and_no_others(
    tmp_path: Path, size: str | int, words: int, changes: int, hasher: str
) -> None:
    texts = plant(3, 150, words, changes)
    near = {number for number in range(0, len(texts), 2) if jaccard(*texts[number : number + 2], size) >= 0.8}
    assert len(near) > 100  # pairs around the limit, most above it

    deduplicate(write(tmp_path / "in.jsonl", texts), tmp_path / "out", size=size, hasher=hasher)

    there = set(kept(tmp_path / "out"))
    found = {number for number in range(0, len(texts), 2) if texts[number + 1] not in there}
    assert len(found & near) >= 0.95 * len(near)
    assert found <= near  # none without
    assert set(texts[::2]) <= there


def test_published_bands_join_whatever_meets(tmp_path: Path) -> None:
    texts = plant(4, 200, 60, 1)
    found = deduplicate(
        write(tmp_path / "in.jsonl", texts), tmp_path / "out", similarity=0.7, size=5, bands="published"
    )
    similar = [jaccard(*texts[place : place + 2], 5) for place in range(0, 400, 2)]
    expected = sum(map(Bands(14, 9).probability, similar))

    assert found["bands"] == [14, 9]
    assert abs(found["near_duplicates"] - expected) < 4 * 7


def test_the_first_of_each_component_stays(tmp_path: Path) -> None:
    a = [f"w{number}" for number in range(40)]
    b, c = [*a[:-2], "x", "y"], [*a[4:-2], "x", "y", "p", "q"]
    texts = ["short", " ".join(b), " ".join(a), "short", " ".join(c), " ".join(b), "other"]
    assert (
        jaccard(texts[2], texts[4], 2)
        < 0.8
        < min(jaccard(texts[1], texts[2], 2), jaccard(texts[1], texts[4], 2))
    )

    found = deduplicate(write(tmp_path / "in.jsonl", texts), tmp_path / "out")

    assert kept(tmp_path / "out") == ["short", " ".join(b), "other"]
    assert (found["exact_duplicates"], found["near_duplicates"], found["kept"]) == (2, 2, 3)
    rows = [json.loads(line) for line in Path(found["duplicates_file"]).read_text().splitlines()]
    assert [(row["line"], row["duplicate_of_line"], row["exact"]) for row in rows] == [
        (3, 2, False), (4, 1, True), (5, 2, False), (6, 2, True),
    ]  # fmt: skip


def test_processes_and_broken_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "CHUNK_LINES", 11)
    source = write(tmp_path / "in.jsonl", plant(5, 40, 30, 1))
    with open(source.path, "a") as file:
        file.write('{"text"\n{"text": "the end"}\n')
    found = [deduplicate(source, tmp_path / f"{count}", execute=in_processes(count)) for count in (1, 3)]

    assert (tmp_path / "1").read_bytes() == (tmp_path / "3").read_bytes()
    assert kept(tmp_path / "1")[-1] == "the end"
    assert found[0]["rejected"] == 1
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted(
        [
            "in.jsonl",
            *(f"{count}{more}" for count in (1, 3) for more in ("", ".duplicates.jsonl", ".rejected.jsonl")),
        ]
    )


def test_fingerprints_of_a_stopped_run_are_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, calls = write(tmp_path / "in.jsonl", plant(6, 20, 30, 1)), []
    process = Fingerprints.process
    monkeypatch.setattr(
        Fingerprints, "process", lambda self, rows: calls.append(len(rows)) or process(self, rows)
    )
    with monkeypatch.context() as patch:
        patch.setattr("t2iprobe.llm.corpus.dedup.find_clusters", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            deduplicate(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    deduplicate(source, tmp_path / "out")
    assert sum(calls) == 40

    (tmp_path / "in.jsonl").write_text('{"text": "another"}\n')
    deduplicate(Source.open(tmp_path / "in.jsonl"), tmp_path / "out")
    assert kept(tmp_path / "out") == ["another"]


def test_components_are_those_of_all_pairs(tmp_path: Path) -> None:
    rng = random.Random(7)
    base = [rng.choices(VOCABULARY, k=30) for _ in range(6)]
    texts = []
    for _ in range(80):
        words = list(rng.choice(base))
        words[rng.randrange(30)] = rng.choice(VOCABULARY)
        texts.append(" ".join(words))
    source = write(tmp_path / "in.jsonl", texts)
    stream(Fingerprints(1, Bands(64, 2)), source, tmp_path / "prints")
    heads, _ = find_clusters(tmp_path / "prints", 0.8, Bands(64, 2))

    expected = list(range(80))
    for later in range(80):
        for earlier in range(later):
            if jaccard(texts[later], texts[earlier], 1) >= 0.8:
                old, new = sorted((expected[later], expected[earlier]))[::-1]
                expected = [new if head == old else head for head in expected]
    assert heads.tolist() == expected


def test_blocks_read_back_what_was_written(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", ["a b c", "a", "c d e f"])
    stream(Fingerprints(2, Bands(4, 3)), source, tmp_path / "prints")
    [block] = read_blocks(tmp_path / "prints")

    assert block.numbers.tolist() == [0, 1, 2]
    assert block.lengths.tolist() == [2, 0, 3]
    assert block.bands.shape == (2, 4)
    assert len(block.shingles) == 5
    assert np.unique(block.digests, axis=0).shape == (3, 2)


def test_nothing_at_all(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("")

    assert deduplicate(Source.open(tmp_path / "in.jsonl"), tmp_path / "out")["kept"] == 0
    assert (tmp_path / "out").read_bytes() == b""
