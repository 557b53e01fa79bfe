"""Logits made elsewhere: what cannot be scored is told in one line that names the file or the synset."""

from pathlib import Path

import numpy as np
import pytest

from t2iprobe.errors import UserError
from t2iprobe.hypernymy.results import score_file

ROW = np.zeros((2, 1000), np.float32)


def test_names_may_be_wnids_and_lemmas(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", n02084071=ROW, bird=ROW)
    rows = score_file(tmp_path / "a.npz")["synsets"]
    assert [(row["synset"], row["samples"]) for row in rows] == [("bird.n.01", 2), ("dog.n.01", 2)]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "no logits to measure"),
        ({"dog.n.01": ROW[:, :999]}, r"logits of dog.n.01 must be \[N, 1000\].*not \[2, 999\]"),
        ({"dog.n.01": ROW[:0]}, "N at least 1"),
        ({"dog.n.01": ROW[0]}, r"not \[1000\]"),
        ({"dog.n.01": ROW * np.nan}, "logits of dog.n.01 hold NaN"),
        ({"dog.n.01": ROW.astype(int)}, "floating point"),
        ({"dog.n.01": np.array([{}])}, "is not an npz of synset"),
        ({"dgo.n.01": ROW}, "did you mean .*dog.n.01"),
        ({"dog.n.01": ROW, "n02084071": ROW}, "holds dog.n.01 twice, once under the name 'n02084071'"),
    ],
)
def test_bad_logits_are_told(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message):
        score_file(tmp_path / "a.npz")


def test_a_file_that_is_no_archive_is_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", **{"dog.n.01": ROW})
    content = (tmp_path / "whole.npz").read_bytes()
    np.save(tmp_path / "array.npz.npy", ROW)
    for name, bad in {
        "empty": b"",
        "text": b"hello",
        "half": content[: len(content) // 2],
        "changed": content[:2000] + bytes([content[2000] ^ 255]) + content[2001:],
        "array": (tmp_path / "array.npz.npy").read_bytes(),
    }.items():
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(UserError, match=f"{name} is not an npz of synset → logits"):
            score_file(tmp_path / name)
    with pytest.raises(UserError, match="is not an npz"):
        score_file(tmp_path)
    with pytest.raises(UserError, match="there is no file"):
        score_file(tmp_path / "none.npz")
