"""The same stages on a cluster, by Ray Data: every machine reads its own chunks, the output is the same."""

import json
import pickle
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
        if source.zipped:
            raise UserError(
                f"{source.path} is zipped as a whole, and cannot be read from the middle: unzip it"
            )
        connect(address)
        from ray import data

        places = [chunk.begin._asdict() for chunk in chunks]
        if not places:
            return
        data.DataContext.get_current().execution_options.preserve_order = True
        begins: Any = data.from_items(places, override_num_blocks=len(places))
        rows = begins.map(_work_at, fn_kwargs={"stage": stage, "source": source})
        for row in rows.iter_rows():
            if row["mistake"]:
                raise pickle.loads(row["mistake"])
            yield Made(
                Position(row["line"], row["byte"], row["beside"]),
                row["output"],
                [Rejected(*each) for each in json.loads(row["rejected"])],
                Counter(json.loads(row["counts"])),
            )

    return execute


def _work_at(place: dict[str, Any], stage: Stage, source: Source) -> dict[str, Any]:
    chunk, mistake = next(source.read(Position(**place))), b""
    try:
        made = work(stage, source, chunk)
    except UserError as error:  # Ray would wrap it
        made, mistake = Made(chunk.end, b"", [], Counter()), pickle.dumps(error)
    return {
        **made.end._asdict(),
        "output": made.output,
        "rejected": json.dumps(made.rejected),
        "counts": json.dumps(made.counts),
        "mistake": mistake,
    }
