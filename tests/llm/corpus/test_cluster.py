"""Ray Data writes what one process writes."""

import importlib.util
import json
from pathlib import Path

import pytest

from t2iprobe.errors import UserError
from t2iprobe.llm.corpus.annotation import Annotation
from t2iprobe.llm.corpus.cluster import on_ray
from t2iprobe.llm.corpus.dedup import deduplicate
from t2iprobe.llm.corpus.documents import CHUNK_LINES, Source
from t2iprobe.llm.corpus.filters import Recipe, Rule, filter_file
from t2iprobe.llm.corpus.streaming import stream

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray is an extra: t2iprobe[cluster]"),
]


@pytest.fixture(scope="module", autouse=True)
def end_ray():
    yield
    import ray

    ray.shutdown()


def test_ray_writes_the_same(tmp_path: Path) -> None:
    count = 3 * CHUNK_LINES + 5
    rows = [json.dumps({"text": f"caption {number % 700}: a red fox in the snow"}) for number in range(count)]
    rows[CHUNK_LINES] = "{broken"
    (tmp_path / "in.jsonl").write_text("\n".join(rows) + "\n")
    source, stage = Source.open(tmp_path / "in.jsonl"), Annotation(captions=False)
    alone = stream(stage, source, tmp_path / "alone.jsonl")
    together = stream(stage, source, tmp_path / "ray.jsonl", execute=on_ray("local"))

    assert (tmp_path / "ray.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    rejected = [Path(found["rejected_file"]).read_bytes() for found in (alone, together)]
    assert rejected[0] == rejected[1]
    assert together["rows"] == alone["rows"] == count - 1

    for name, more in (("alone", {}), ("ray", {"execute": on_ray("local")})):
        deduplicate(source, tmp_path / f"{name}.kept", **more)
    assert (tmp_path / "ray.kept").read_bytes() == (tmp_path / "alone.kept").read_bytes()

    recipe = Recipe(rules=(Rule(signal="rps_doc_unigram_entropy", keep_top=0.5, gumbel=True),))
    for name, more in (("alone", {}), ("ray", {"execute": on_ray("local")})):
        filter_file(source, tmp_path / "alone.jsonl", recipe, tmp_path / f"{name}.filtered", **more)
    assert (tmp_path / "ray.filtered").read_bytes() == (tmp_path / "alone.filtered").read_bytes()
    signals = tmp_path / "other.jsonl"
    signals.write_bytes(b"".join((tmp_path / "alone.jsonl").read_bytes().splitlines(True)[1:]))
    with pytest.raises(UserError, match=r"has in\.jsonl/1 where line 1 of the texts is in\.jsonl/0"):
        filter_file(source, signals, recipe, tmp_path / "no.filtered", execute=on_ray("local"))
    assert not list(tmp_path.glob("no.filtered*"))


def test_zipped_files_are_refused(tmp_path: Path) -> None:
    import gzip

    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n'))
    with pytest.raises(UserError, match="is zipped as a whole"):
        stream(
            Annotation(captions=False),
            Source.open(tmp_path / "in.jsonl.gz"),
            tmp_path / "out",
            execute=on_ray("local"),
        )
