"""Signatures against permutations in Python's own numbers; bands against the chance they promise."""

import hashlib

import numpy as np
import pytest

from t2iprobe.errors import UserError
from t2iprobe.llm.corpus import minhash
from t2iprobe.llm.corpus.minhash import (
    Bands,
    compute_signatures,
    cut_bands,
    hash_shingles,
    read_size,
    shingle,
    sure_bands,
)


def slowly(hashes: list[int]) -> list[int]:
    a, b = minhash._permutations(128)
    prime = 2**61 - 1
    return [
        min((((h * int(x)) % 2**64 + int(y)) % 2**64) % prime % 2**32 for h in hashes)
        for x, y in zip(a, b, strict=True)
    ]


def test_signatures_of_many_texts_are_those_of_each() -> None:
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 2**32, size, np.uint32) for size in (1, 3, 700, 2, 511, 1, 1200)]

    together = compute_signatures(texts)

    for text, signature in zip(texts, together, strict=True):
        np.testing.assert_array_equal(compute_signatures([text])[0], signature)
    for row in (0, 1, 3):
        assert together[row].tolist() == slowly(texts[row].tolist())
    assert compute_signatures([]).shape == (0, 128)


def test_a_sum_that_reaches_the_prime_is_reduced() -> None:
    prime = 2**61 - 1
    numbers = [prime, prime - 1, prime + 1, 2 * prime, 7 * prime, 2**64 - 1, 7 * prime + 6, 0]

    found = minhash._permute(np.ones(1, np.uint64), np.zeros(8, np.uint64), np.array(numbers, np.uint64))

    assert found[0].tolist() == [number % prime % 2**32 for number in numbers]


def test_shingles_are_hashed_by_the_first_bytes_of_sha1() -> None:
    digest = hashlib.sha1("naïve café".encode()).digest()

    assert hash_shingles(["naïve café".encode()]).tolist() == [int.from_bytes(digest[:4], "little")]


def test_shingles_of_words_and_of_characters() -> None:
    words = ["a", "b", "a", "b", "c"]

    assert sorted(shingle(words, "", 1)) == [b"a", b"b", b"c"]
    assert sorted(shingle(words, "", 2)) == [b"a b", b"b a", b"b c"]
    assert shingle(words, "", 5) == [b"a b a b c"]
    assert sorted(shingle(["é", "漢", "x"], "", 2)) == ["é 漢".encode(), "漢 x".encode()]
    assert shingle(words, "", 6) == []
    assert sorted(shingle([], "abab", "char-3")) == [b"aba", b"bab"]
    assert shingle([], "ab", "char-3") == []


@pytest.mark.parametrize("size", ["0", "-1", "char-", "char-0", "two", ""])
def test_sizes_that_are_none(size: str) -> None:
    with pytest.raises(UserError, match="a shingle is a number of words"):
        read_size(size)


def test_bands_are_cut_big_endian() -> None:
    signature = np.arange(128, dtype=np.uint32)

    assert cut_bands(signature, Bands(2, 3)) == [
        bytes([0, 0, 0, k, 0, 0, 0, k + 1, 0, 0, 0, k + 2]) for k in (0, 3)
    ]


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_sure_bands_let_similar_texts_meet(similarity: float) -> None:
    bands = sure_bands(similarity)

    assert bands.count * bands.rows <= 128
    assert bands.probability(similarity) >= 0.99
    if bands.rows < 128:
        assert Bands(128 // (bands.rows + 1), bands.rows + 1).probability(similarity) < 0.99


def test_pairs_meet_as_often_as_is_said() -> None:
    rng = np.random.default_rng(1)
    bands, met = Bands(14, 9), 0
    for _ in range(300):
        both, ours, theirs = (
            rng.integers(0, 2**32, 80),
            rng.integers(0, 2**32, 10),
            rng.integers(0, 2**32, 10),
        )
        pair = [np.r_[both, ours].astype(np.uint32), np.r_[both, theirs].astype(np.uint32)]
        first, second = compute_signatures(pair)
        met += bool(set(enumerate(cut_bands(first, bands))) & set(enumerate(cut_bands(second, bands))))

    expected = bands.probability(0.8)
    assert abs(met / 300 - expected) < 4 * (expected * (1 - expected) / 300) ** 0.5
