"""The same stages on a cluster, by Ray Data: every machine reads its own chunks, the output is the same."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from t2iprobe.cluster import connect, import_ray
from t2iprobe.errors import UserError
from t2iprobe.llm.corpus.documents import Chunk, Position, Rejected, Source
from t2iprobe.llm.corpus.streaming import Executor, Made, Stage, work


def on_ray(address: str) -> Executor:
    """Do chunks on the Ray cluster at `address` (``local``, ``auto``, ``ray://HOST:PORT``).

    The machines need the input at the same path and this package. Only places of chunks are sent to them, and
    what is made of each comes back in order. Raises UserError without Ray, and where there is no cluster.
    """
    import_ray()

    def execute(stage: Stage, source: Source, chunks: Iterator[Chunk]) -> Iterator[Made]:
        if source.path.suffix == ".gz":
            raise UserError(
                f"{source.path} is zipped as a whole, and cannot be read from the middle: unzip it"
            )
        connect(address)
        from ray import data

        places = [{"line": place.line, "byte": place.byte} for place in _places(source, chunks)]
        if not places:
            return
        data.DataContext.get_current().execution_options.preserve_order = True
        begins: Any = data.from_items(places, override_num_blocks=len(places))
        rows = begins.map(_work_at, fn_kwargs={"stage": stage, "source": source})
        for row in rows.iter_rows():
            yield Made(
                Position(row["line"], row["byte"]),
                row["output"],
                [Rejected(*each) for each in json.loads(row["rejected"])],
                Counter(json.loads(row["counts"])),
            )

    return execute


def _places(source: Source, chunks: Iterator[Chunk]) -> Iterator[Position]:
    """Yield where each chunk begins."""
    begin: int | None = None
    for chunk in chunks:
        if begin is None:
            begin = chunk.end.byte - sum(map(len, chunk.lines)) if chunk.end.byte else 0
        yield Position(chunk.first, begin)
        begin = chunk.end.byte


def _work_at(place: dict[str, Any], stage: Stage, source: Source) -> dict[str, Any]:
    chunk = next(source.read(Position(place["line"], place["byte"])))
    made = work(stage, source, chunk)
    return {
        "line": made.end.line,
        "byte": made.end.byte,
        "output": made.output,
        "rejected": json.dumps(made.rejected),
        "counts": json.dumps(made.counts),
    }
