"""RedPajama-V2's signals and bands (arXiv 2411.12372): every score as published, every band to the byte."""

import gzip
import json
from pathlib import Path

import pytest

from t2iprobe.llm.corpus.minhash import band_rows, compute_signatures, hash_shingles, published_bands, shingle
from t2iprobe.llm.corpus.signals import Document, Rules, compute_signals

PUBLISHED = json.loads(gzip.decompress((Path(__file__).parent / "redpajama_signals.json.gz").read_bytes()))


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row["text"][:20])
def test_signals(row: dict) -> None:
    found = compute_signals(Document(row["text"]), Rules())

    for name, spans in row["signals"].items():
        assert [span[:2] for span in found[name]] == [span[:2] for span in spans], name
        for (_, _, score), (_, _, published) in zip(found[name], spans, strict=True):
            assert score == (None if published is None else pytest.approx(published, abs=1e-8, rel=0)), name


def test_bands() -> None:
    hashes = [hash_shingles(shingle(Document(row["text"]).words, row["text"], 13)) for row in PUBLISHED]
    signatures = compute_signatures([each for each in hashes if len(each)])
    found = band_rows(signatures, [len(each) > 0 for each in hashes])

    assert any(row["minhash"]["signature_sim0.8"] is None for row in PUBLISHED)
    for row, bands in zip(PUBLISHED, found, strict=True):
        assert bands.keys() == row["minhash"].keys()
        for name, published in row["minhash"].items():
            if published is None:
                assert bands[name] is None
            else:
                assert [band[:16] for band in bands[name][:2]] == published


def test_bands_and_rows() -> None:
    found = {similarity: published_bands(similarity) for similarity in (1.0, 0.9, 0.8, 0.7)}

    assert {key: (bands.count, bands.rows) for key, bands in found.items()} == {
        1.0: (1, 128), 0.9: (5, 25), 0.8: (9, 13), 0.7: (14, 9),
    }  # fmt: skip
