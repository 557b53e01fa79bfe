"""The same stages on a cluster, by Ray Data: every machine reads its own chunks, the output is the same."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from t2iprobe.errors import UserError
from t2iprobe.llm.corpus.documents import Chunk, Position, Rejected, Source
from t2iprobe.llm.corpus.streaming import Executor, Made, Stage, work

LOCAL = "local"  # a cluster of this machine alone, started for the call


def on_ray(address: str) -> Executor:
    """Do chunks on the Ray cluster at `address` (``local``, ``auto``, ``ray://HOST:PORT``).

    The machines need the input at the same path and this package. Only places of chunks are sent to them, and
    what is made of each comes back in order. Raises UserError without Ray, and where there is no cluster.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise UserError("a cluster needs Ray: pip install t2iprobe[cluster]") from None

    def execute(stage: Stage, source: Source, chunks: Iterator[Chunk]) -> Iterator[Made]:
        if source.path.suffix == ".gz":
            raise UserError(
                f"{source.path} is zipped as a whole, and cannot be read from the middle: unzip it"
            )
        _connect(ray, address)
        places = [{"line": place.line, "byte": place.byte} for place in _places(source, chunks)]
        if not places:
            return
        ray.data.DataContext.get_current().execution_options.preserve_order = True
        begins: Any = ray.data.from_items(places, override_num_blocks=len(places))
        rows = begins.map(_work_at, fn_kwargs={"stage": stage, "source": source})
        for row in rows.iter_rows():
            yield Made(
                Position(row["line"], row["byte"]),
                row["output"],
                [Rejected(*each) for each in json.loads(row["rejected"])],
                Counter(json.loads(row["counts"])),
            )

    return execute


def _connect(ray: Any, address: str) -> None:
    if ray.is_initialized():
        return
    try:
        ray.init(
            address=None if address == LOCAL else address,
            include_dashboard=False if address == LOCAL else None,
            log_to_driver=False,
            logging_level="error",
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"no Ray cluster at {address}: {first}") from None


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
