"""Exact and near duplicates: fingerprints, MinHash bands (arXiv 2107.06499), true Jaccard, components.

Texts that are equal are one. Of the others, those that meet in a band are candidates; candidates whose sets
of shingles are as similar as asked are joined, and of each connected component the first text stays.
"""

import hashlib
import importlib.util
import itertools
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from t2iprobe.errors import UserError, suggest
from t2iprobe.llm.corpus.documents import Row, Source
from t2iprobe.llm.corpus.minhash import (
    PERMUTATIONS,
    Bands,
    Hashes,
    compute_signatures,
    hash_shingles,
    published_bands,
    shingle,
    sure_bands,
)
from t2iprobe.llm.corpus.signals import Document
from t2iprobe.llm.corpus.streaming import Executor, Show, check_target, dump_lines, in_this_process, stream

Kind = Literal["sha1", "rensa"]
Numbers = NDArray[np.int64]

_BLOCK = np.dtype([("rows", "<u4"), ("signed", "<u4"), ("shingles", "<u4"), ("bands", "<u4")])


@dataclass(frozen=True)
class Fingerprints:
    """The stage that makes a block of fingerprints of a chunk: digests, bands as numbers, hashed shingles.

    hasher: sha1, the published functions, or rensa, the Rust package's, which are several times as fast.
    """

    size: str | int
    bands: Bands
    hasher: Kind = "sha1"

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the fingerprints depend on."""
        return {"shingle": self.size, "bands": [self.bands.count, self.bands.rows], "hasher": self.hasher}

    def process(self, rows: Sequence[Row]) -> tuple[list[bytes], Counter[str]]:
        """Return one block."""
        digests = b"".join(hashlib.blake2b(row.text.encode(), digest_size=16).digest() for row in rows)
        sets = [shingle(Document(row.text).words, row.text, self.size) for row in rows]
        hashes = [np.sort(self._hash(each)) for each in sets]
        signed = [len(each) > 0 for each in hashes]
        signatures = self._sign([each for each in sets if each], [each for each in hashes if len(each)])
        bands = number_bands(signatures, self.bands)
        head = np.array((len(rows), sum(signed), sum(map(len, hashes)), self.bands.count), _BLOCK)
        parts = (
            head,
            np.array([row.number for row in rows], "<i8"),
            np.array([len(each) for each in hashes], "<u4"),
            bands.astype("<u8"),
            np.concatenate([*hashes, np.empty(0, np.uint32)]).astype("<u4"),
        )
        block = [part.tobytes() for part in parts]
        return [*block[:2], digests, *block[2:]], Counter(without_signature=len(rows) - sum(signed))

    def _hash(self, shingles: list[bytes]) -> Hashes:
        if self.hasher == "sha1":
            return hash_shingles(shingles)
        return np.fromiter((zlib.crc32(each) for each in shingles), np.uint32)

    def _sign(self, sets: list[list[bytes]], hashes: list[Hashes]) -> Hashes:
        if self.hasher == "sha1":
            return compute_signatures(hashes)
        from rensa import RMinHash

        digests = RMinHash.digests_from_token_sets(sets, PERMUTATIONS, 42)
        return np.array(digests, np.uint32).reshape(-1, PERMUTATIONS)


def number_bands(signatures: Hashes, bands: Bands) -> NDArray[np.uint64]:
    """Return the bands of signatures [texts, permutations] as numbers [texts, bands]: their hashes."""
    cut = signatures[:, : bands.count * bands.rows].reshape(-1, bands.count, bands.rows)
    numbers = np.zeros(cut.shape[:2], np.uint64)
    for row in range(bands.rows):
        numbers = (numbers ^ cut[:, :, row]) * np.uint64(0x9E3779B97F4A7C15)
        numbers ^= numbers >> np.uint64(29)
    return numbers


class Block(NamedTuple):
    """Fingerprints of a chunk: line numbers, digests [rows, 2], shingles of each row, bands, all shingles."""

    numbers: Numbers
    digests: NDArray[np.uint64]
    lengths: NDArray[np.uint32]
    bands: NDArray[np.uint64]
    shingles: Hashes


def read_blocks(path: Path) -> Iterator[Block]:
    """Yield the blocks of a file of fingerprints, as views into the file."""
    if not path.stat().st_size:
        return
    data = np.memmap(path, np.uint8, "r")
    place = 0

    def take(count: int, kind: str) -> NDArray[Any]:
        nonlocal place
        size = count * np.dtype(kind).itemsize
        part = data[place : place + size].view(kind)
        place += size
        return part

    while place < len(data):
        head = data[place : place + _BLOCK.itemsize].view(_BLOCK)[0]
        place += _BLOCK.itemsize
        rows, signed, shingles, bands = (int(head[name]) for name in _BLOCK.names or ())
        yield Block(
            take(rows, "<i8"),
            take(2 * rows, "<u8").reshape(-1, 2),
            take(rows, "<u4"),
            take(signed * bands, "<u8").reshape(-1, bands),
            take(shingles, "<u4"),
        )


def deduplicate(
    source: Source,
    out: Path,
    *,
    similarity: float = 0.8,
    size: str | int = 2,
    bands: Literal["sure", "published"] = "sure",
    hasher: Kind = "sha1",
    execute: Executor = in_this_process,
    show: Show = lambda done, total: None,
) -> dict[str, Any]:
    """Write the rows of `source` without duplicates to `out`, as they stand, in order.

    Args:
        source: the texts. A text shorter than a shingle has exact duplicates only.
        out: whole or absent; beside it ``.duplicates.jsonl`` says which line is a duplicate of which.
        similarity: Jaccard, of sets of shingles, from which on texts are near duplicates.
        size: of a shingle, see `minhash.read_size`.
        bands: sure lets 99 of 100 pairs at `similarity` meet and then compares their sets; published takes
            RedPajama-V2's bands and whatever meets for a duplicate.
        hasher: see `Fingerprints`.
        execute: who does the work.
        show: called with (done, of).

    Memory holds a few numbers for each text; fingerprints lie beside `out` meanwhile, and a run that was
    stopped goes on with them.
    """
    check_target(source, out)
    cut = sure_bands(similarity) if bands == "sure" else published_bands(similarity)
    prints = out.with_name(f"{out.name}.fingerprints")
    stage = Fingerprints(size, cut, hasher)
    if not prints.exists() or not _is_of(prints, source, stage):
        prints.unlink(missing_ok=True)
        stream(stage, source, prints, execute=execute, show=show)
        _facts(prints).write_text(json.dumps(_describe(source, stage)))
    heads, exact = find_clusters(prints, similarity if bands == "sure" else None, cut)
    numbers = np.concatenate([block.numbers for block in read_blocks(prints)] or [np.empty(0, np.int64)])
    duplicate = heads != np.arange(len(heads))
    of = dict(zip(numbers[duplicate].tolist(), numbers[heads[duplicate]].tolist(), strict=True))
    kind = dict(zip(numbers[duplicate].tolist(), exact[duplicate].tolist(), strict=True))
    beside = out.with_name(f"{out.name}.duplicates.jsonl")
    list_duplicates = _Duplicates(of, kind, wanted=False)
    stream(list_duplicates, source, beside)
    found = stream(_Duplicates(of, kind, wanted=True), source, out, show=show)
    beside.with_name(f"{beside.name}.rejected.jsonl").unlink(missing_ok=True)
    for path in (prints, _facts(prints), prints.with_name(f"{prints.name}.rejected.jsonl")):
        path.unlink(missing_ok=True)
    return found | {
        "kept": int(len(heads) - duplicate.sum()),
        "exact_duplicates": int(exact.sum()),
        "near_duplicates": int(duplicate.sum() - exact.sum()),
        "bands": [cut.count, cut.rows],
        "duplicates_file": str(beside),
    }


def check_choices(bands: str, hasher: str) -> dict[str, Any]:
    """Return the arguments of `deduplicate` for two words. Raises UserError for others than there are."""
    for word, known in ((bands, ("sure", "published")), (hasher, ("sha1", "rensa"))):
        if word not in known:
            raise UserError(f"no choice {word!r}{suggest(word, known)}; there are {' and '.join(known)}")
    if hasher == "rensa" and not importlib.util.find_spec("rensa"):
        raise UserError("the hasher rensa is a package of its own: pip install t2iprobe[corpus]")
    return {"bands": bands, "hasher": hasher}


def _facts(prints: Path) -> Path:
    return prints.with_name(f"{prints.name}.json")


def _describe(source: Source, stage: Fingerprints) -> dict[str, Any]:
    return {"input": source.fingerprint, **stage.settings}


def _is_of(prints: Path, source: Source, stage: Fingerprints) -> bool:
    try:
        return json.loads(_facts(prints).read_text()) == _describe(source, stage)
    except (OSError, ValueError):
        return False


@dataclass(frozen=True)
class _Duplicates:
    """The stage that writes rows that are no duplicates, or says of which line the others are."""

    of: dict[int, int]
    exact: dict[int, bool]
    wanted: bool

    @property
    def settings(self) -> Mapping[str, Any]:
        digest = hashlib.sha256(repr(sorted(self.of.items())).encode()).hexdigest()
        return {"duplicates": digest, "wanted": self.wanted}

    def process(self, rows: Sequence[Row]) -> tuple[list[bytes], Counter[str]]:
        if self.wanted:
            kept = (row.line for row in rows if row.number not in self.of)
            return [line if line.endswith(b"\n") else line + b"\n" for line in kept], Counter()
        return [
            dump_lines(
                {
                    "line": row.number + 1,
                    "id": row.id,
                    "duplicate_of_line": self.of[row.number] + 1,
                    "exact": self.exact[row.number],
                }
                for row in rows
                if row.number in self.of
            )
        ], Counter()


def find_clusters(prints: Path, similarity: float | None, bands: Bands) -> tuple[Numbers, NDArray[np.bool_]]:
    """Return for each text [N] the first of its cluster, and whether it equals an earlier text.

    Candidates are compared by their shingles where `similarity` is given.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    blocks = list(read_blocks(prints))
    if not blocks:
        return np.empty(0, np.int64), np.empty(0, bool)
    first = _first_equal(np.concatenate([block.digests for block in blocks]))
    places = np.arange(len(first))
    lengths = np.concatenate([block.lengths for block in blocks]).astype(np.int64)
    signed = np.flatnonzero(lengths)  # which texts the rows of bands belong to
    alone = first[signed] == signed  # equal texts meet in every band: the first stands for all
    sets = _Sets(blocks)
    edges = [np.stack([places, first], 1)]
    for column in range(bands.count):
        values = np.concatenate([block.bands[:, column] for block in blocks])[alone]
        edges += [_join(group, sets, similarity) for group in _groups(values, signed[alone])]
    every = np.concatenate(edges)
    ones = np.ones(len(every), bool)
    graph = coo_matrix((ones, (every[:, 0], every[:, 1])), (len(first), len(first)))
    _, labels = connected_components(graph, directed=False)
    heads = np.full(labels.max() + 1, len(first), np.int64)
    np.minimum.at(heads, labels, places)
    return heads[labels], first != places


def _first_equal(digests: NDArray[np.uint64]) -> Numbers:
    """Return for each digest [N, 2] the place of the first that equals it."""
    _, first, inverse = np.unique(digests, axis=0, return_index=True, return_inverse=True)
    return first[inverse.ravel()].astype(np.int64)


def _groups(values: NDArray[np.uint64], texts: Numbers) -> Iterator[Numbers]:
    """Yield the texts [k ≥ 2], in order, that share a value."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    cuts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1], True]) if len(values) else np.empty(0, int)
    for begin, end in itertools.pairwise(cuts):
        if end - begin > 1:
            yield texts[order[begin:end]]


class _Sets:
    """The hashed shingles of a text, out of the file of fingerprints."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = blocks
        self._starts = np.cumsum([0, *(len(block.numbers) for block in blocks)])
        self._ends: dict[int, Numbers] = {}

    def __getitem__(self, text: int) -> frozenset[int]:
        place = int(np.searchsorted(self._starts, text, "right")) - 1
        block = self._blocks[place]
        if place not in self._ends:
            self._ends[place] = np.cumsum(block.lengths, dtype=np.int64)
        row = text - int(self._starts[place])
        end = int(self._ends[place][row])
        return frozenset(block.shingles[end - int(block.lengths[row]) : end].tolist())


def _join(group: Numbers, sets: _Sets, similarity: float | None) -> Numbers:
    """Return edges [k, 2] among texts that met: each to the first that it is similar to."""
    if similarity is None:
        return np.stack([group[1:], np.full(len(group) - 1, group[0])], 1)
    leaders: list[tuple[int, frozenset[int]]] = []
    edges: list[tuple[int, int]] = []
    for text in group.tolist():
        own = sets[text]
        for leader, other in leaders:
            shared = len(own & other)
            if shared >= similarity * (len(own) + len(other) - shared):
                edges.append((text, leader))
                break
        else:
            leaders.append((text, own))
    return np.array(edges, np.int64).reshape(-1, 2)
