"""Files of fastText: one is written here byte by byte, so that its probabilities are known."""

import math
import struct
from pathlib import Path

import numpy as np
import pytest

from t2iprobe.errors import UserError
from t2iprobe.llm.corpus.annotation import make_annotation
from t2iprobe.llm.corpus.classifiers import load_classifier, score_classifier
from t2iprobe.llm.corpus.documents import Row
from t2iprobe.llm.corpus.signals import Document

WORDS = {"fox": (1.0, 0.5), "snow": (0.5, -2.0), "pills": (-2.0, 1.0)}
LABELS = {"__label__cc": (-1.0, 0.3), "__label__wiki": (0.8, 0.2)}
SUPERVISED, SKIP_GRAM = 3, 2


def write_model(path: Path, kind: int = SUPERVISED) -> Path:
    """Write a model of two dimensions as fastText does: arguments, dictionary, both matrices."""
    # magic, version; dim, ws, epoch, min count, neg, word n-grams, softmax, kind, buckets, min n, max n, rate
    parts = [
        struct.pack("<14i", 793712314, 12, 2, 5, 1, 1, 5, 1, 3, kind, 0, 0, 0, 100),
        struct.pack("<d", 1e-4),
    ]
    parts.append(struct.pack("<3i2q", len(WORDS) + len(LABELS), len(WORDS), len(LABELS), 100, -1))
    for entry in (*WORDS, *LABELS):
        parts.append(entry.encode() + b"\0" + struct.pack("<qb", 10, entry in LABELS))
    for rows in (WORDS, LABELS):
        matrix = np.array(list(rows.values()), "<f4")
        parts.append(struct.pack("<?2q", False, *matrix.shape) + matrix.tobytes())
    path.write_bytes(b"".join(parts))
    return path


def probability(words: list[str], label: str) -> float:
    hidden = np.mean([WORDS[word] for word in words], axis=0)
    powers = {name: math.exp(float(np.dot(hidden, weights))) for name, weights in LABELS.items()}
    return powers[label] / sum(powers.values())


@pytest.mark.parametrize("text", ["fox snow", "pills\nfox\r\npills", " pills  unheard pills ", "snow"])
def test_the_score_is_that_of_the_target_whatever_wins(tmp_path: Path, text: str) -> None:
    classifier = load_classifier(write_model(tmp_path / "wikiref.bin"))
    known = [word for word in text.split() if word in WORDS]

    ((start, end, score),) = score_classifier(classifier, Document(text))["rps_doc_ml_wikiref_score"]

    assert (start, end) == (0, len(text))
    # fastText adds 1e-5 to a probability before its logarithm.
    assert score == pytest.approx(probability(known, "__label__wiki"), abs=2e-5)


def test_a_classifier_beside_the_other_signals(tmp_path: Path) -> None:
    path = write_model(tmp_path / "wikiref.bin")
    stage = make_annotation("en", None, False, "none", 13, [path])
    lines, _ = stage.process([Row(0, "a", "", {}, b""), Row(1, "b", "unheard", {}, b"")])

    assert lines[0].count(b'"rps_doc_ml_wikiref_score": [[0, 0, null]]') == 1
    assert lines[0].count(b'"rps_doc_ml_wikiref_score": [[0, 7, null]]') == 1
    with pytest.raises(UserError, match="two targets have the same name"):
        make_annotation("en", None, False, "none", 13, [path, path])


@pytest.mark.parametrize("left", [0, 10, 80, 120, 150, 180, 200, 225, -1, 1])
def test_files_that_are_cut_off(tmp_path: Path, left: int) -> None:
    path = write_model(tmp_path / "wikiref.bin")
    whole = path.read_bytes()
    path.write_bytes(whole + b"x" if left == 1 else whole[:left])
    with pytest.raises(UserError, match=r"cannot read the classifier .*wikiref\.bin"):
        load_classifier(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "broken.bin").write_bytes(b"x" * 100)
    write_model(tmp_path / "words.bin", SKIP_GRAM)
    for name, message in (
        ("broken.bin", "it is no classifier"),
        ("words.bin", "it is no classifier"),
        ("nowhere.bin", "No such file"),
        ("My-Model.bin", r"a word in lower case such as wikiref\.bin, not My-Model\.bin"),
    ):
        with pytest.raises(UserError, match=message):
            load_classifier(tmp_path / name)
