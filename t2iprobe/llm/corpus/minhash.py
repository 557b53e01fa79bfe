"""MinHash signatures in bands: RedPajama-V2's to the byte, and shingles of the size that captions have."""

import functools
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2iprobe.errors import UserError

PERMUTATIONS = 128
SHINGLE = 13  # words, as published: a text that is shorter has no signature
SIMILARITIES = (1.0, 0.9, 0.8, 0.7)
_SEED = 42
_PRIME = (1 << 61) - 1
_ALMOST = np.uint64((_PRIME - 7) << 3)  # from where on three bits more may reach the prime
_ROWS_AT_ONCE = 64  # shingles whose permutations stay in the processor's cache

Hashes = NDArray[np.uint32]


def shingle(words: Sequence[str], text: str, size: str | int) -> list[bytes]:
    """Return the distinct shingles of a text: `size` words in a row, or characters for ``char-5``.

    A text shorter than a shingle has none.
    """
    if isinstance(size, str):
        count = int(size.removeprefix("char-"))
        return list({text[place : place + count].encode() for place in range(len(text) - count + 1)})
    encoded = list(map(str.encode, words))
    # Cut out of the words' line, which is faster than joining the words of each.
    line = b" ".join(encoded)
    ends = list(itertools.accumulate(len(word) + 1 for word in encoded))
    return list({line[start : end - 1] for start, end in zip([0, *ends], ends[size - 1 :], strict=False)})


def read_size(text: str | int) -> str | int:
    """Read the size of a shingle: a number of words, or ``char-5``. Raises UserError for anything else."""
    given = str(text)
    number = given.removeprefix("char-")
    if not number.isdecimal() or int(number) < 1:
        raise UserError(f"a shingle is a number of words, or of characters as in char-5, not {given!r}")
    return given if given.startswith("char-") else int(given)


def hash_shingles(shingles: Iterable[bytes]) -> Hashes:
    """Return the first four bytes of each one's SHA-1, read as a little-endian number."""
    joined = b"".join([hashlib.sha1(each).digest()[:4] for each in shingles])
    return np.frombuffer(joined, "<u4").astype(np.uint32)


@functools.cache
def _permutations(count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    draw = np.random.RandomState(_SEED)  # the published generator and order: a, b, a, b, …
    pairs = [
        (draw.randint(1, _PRIME, dtype=np.uint64), draw.randint(0, _PRIME, dtype=np.uint64))
        for _ in range(count)
    ]
    return np.array([a for a, _ in pairs], np.uint64), np.array([b for _, b in pairs], np.uint64)


def compute_signatures(hashes: Sequence[Hashes], permutations: int = PERMUTATIONS) -> Hashes:
    """Return the signatures [texts, permutations] of texts' hashed shingles, of which each has one or more.

    A permutation is ``((h·a + b) mod 2**61 − 1) mod 2**32``, where h·a + b wraps at 2**64 as in the published
    code.
    """
    a, b = _permutations(permutations)
    signatures = np.full((len(hashes), permutations), np.uint32(0xFFFFFFFF))
    for signature, own in zip(signatures, hashes, strict=True):
        for begin in range(0, len(own), _ROWS_AT_ONCE):
            permuted = _permute(own[begin : begin + _ROWS_AT_ONCE].astype(np.uint64), a, b)
            np.minimum(signature, permuted.min(axis=0), out=signature)
    return signatures


def _permute(hashes: NDArray[np.uint64], a: NDArray[np.uint64], b: NDArray[np.uint64]) -> Hashes:
    values = hashes[:, None] * a
    values += b
    # 2**61 ≡ 1, so the three highest bits are added to the rest; only the low 32 bits of the sum are kept.
    reduced = values >> np.uint64(61)
    reduced += values
    kept = reduced.astype(np.uint32)
    # The sum may reach the prime once in 2**58 numbers: then that is subtracted.
    np.left_shift(values, np.uint64(3), out=reduced)
    if reduced.max() >= _ALMOST:
        for place in zip(*np.nonzero(reduced >= _ALMOST), strict=True):
            kept[place] = (int(values[place]) % _PRIME) & 0xFFFFFFFF
    return kept


@dataclass(frozen=True)
class Bands:
    """How a signature is cut: two texts meet where all `rows` numbers of one of `count` bands agree."""

    count: int
    rows: int

    def probability(self, similarity: float) -> float:
        """Return the chance that two texts of this Jaccard similarity meet."""
        return 1 - (1 - similarity**self.rows) ** self.count


@functools.cache
def published_bands(similarity: float, permutations: int = PERMUTATIONS) -> Bands:
    """Return the bands that minimise false positives plus false negatives around `similarity`, as published.

    For 128 permutations 1.0, 0.9, 0.8 and 0.7 have 1 × 128, 5 × 25, 9 × 13 and 14 × 9.
    """
    from scipy.integrate import quad

    if not 0 < similarity <= 1:
        raise UserError(f"a similarity is above 0 and at most 1, not {similarity}")

    def error(bands: Bands) -> float:
        found, _ = quad(bands.probability, 0.0, similarity)
        missed, _ = quad(lambda s: 1 - bands.probability(s), similarity, 1.0)
        return 0.5 * found + 0.5 * missed

    choices = (
        Bands(count, rows)
        for count in range(1, permutations + 1)
        for rows in range(1, permutations // count + 1)
    )
    return min(choices, key=error)


@functools.cache
def sure_bands(similarity: float, recall: float = 0.99, permutations: int = PERMUTATIONS) -> Bands:
    """Return the most selective bands that let a pair at `similarity` meet with probability `recall`."""
    if not 0 < similarity <= 1:
        raise UserError(f"a similarity is above 0 and at most 1, not {similarity}")
    fitting = (Bands(permutations // rows, rows) for rows in range(permutations, 0, -1))
    return next(bands for bands in fitting if bands.rows == 1 or bands.probability(similarity) >= recall)


def cut_bands(signature: Hashes, bands: Bands) -> list[bytes]:
    """Return the bands of a signature [permutations], each number as four big-endian bytes."""
    return _cut(signature.astype(">u4").tobytes(), bands)


def _cut(whole: bytes, bands: Bands) -> list[bytes]:
    width = 4 * bands.rows
    return [whole[place * width : (place + 1) * width] for place in range(bands.count)]


def band_rows(
    signatures: Hashes, present: Sequence[bool], similarities: Sequence[float] = SIMILARITIES
) -> list[dict[str, Any]]:
    """Return for each text ``{"signature_sim0.9": [hexadecimal band, …]}``, None without a signature."""
    rows, place = [], 0
    bands = {f"signature_sim{similarity}": published_bands(similarity) for similarity in similarities}
    for there in present:
        if not there:
            rows.append(dict.fromkeys(bands))
            continue
        whole = signatures[place].astype(">u4").tobytes()
        rows.append({name: [band.hex() for band in _cut(whole, cut)] for name, cut in bands.items()})
        place += 1
    return rows
