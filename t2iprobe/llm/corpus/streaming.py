"""One file to another, in constant memory: several processes, resume, broken lines set aside."""

import gzip
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from time import monotonic
from typing import IO, Any, NamedTuple, Protocol

from t2iprobe.errors import UserError
from t2iprobe.llm.corpus.documents import START, Chunk, Position, Rejected, Row, Source
from t2iprobe.storage import check_output, explain_full_disk, open_exclusively, write_atomically

STATE_SECONDS = 2.0  # how much work a kill can cost
_AHEAD = 3  # chunks that wait for each process, so that none waits for the writer

Executor = Callable[["Stage", Source, Iterator[Chunk]], Iterator["Made"]]
Show = Callable[[int, int], None]


class Stage(Protocol):
    """What is done with rows. It is sent to other processes; its lines depend on nothing else."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the output depends on, as JSON."""
        ...

    def process(self, rows: list[Row]) -> tuple[list[bytes], Counter[str]]:
        """Return lines to write, in the rows' order, and what is to be counted."""
        ...


class Made(NamedTuple):
    """What became of a chunk."""

    end: Position
    output: bytes
    rejected: list[Rejected]
    counts: Counter[str]


def work(stage: Stage, source: Source, chunk: Chunk) -> Made:
    """Do a chunk."""
    rows, rejected = source.parse(chunk)
    lines, counts = stage.process(rows)
    counts["rows"] += len(rows)
    counts["rejected"] += len(rejected)
    return Made(chunk.end, b"".join(lines), rejected, counts)


def in_this_process(stage: Stage, source: Source, chunks: Iterator[Chunk]) -> Iterator[Made]:
    """Do chunks one after the other."""
    return (work(stage, source, chunk) for chunk in chunks)


def in_processes(count: int) -> Executor:
    """Do chunks in `count` processes; results come in the chunks' order, so that the output is the same."""
    if count < 1:
        raise UserError(f"there is 1 process or more, not {count}")
    if count == 1:
        return in_this_process

    def execute(stage: Stage, source: Source, chunks: Iterator[Chunk]) -> Iterator[Made]:
        pool = ProcessPoolExecutor(count, get_context("spawn"), _prepare, (stage, source))
        waiting: deque[Future[Made]] = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_work, chunk))
                if len(waiting) >= count * _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    return execute


_prepared: tuple[Stage, Source]


def _prepare(stage: Stage, source: Source) -> None:
    global _prepared
    _prepared = (stage, source)


def _work(chunk: Chunk) -> Made:
    return work(*_prepared, chunk)


class State(NamedTuple):
    """How far a file is: position in the input, bytes that are right in the output, what was counted."""

    settings: dict[str, Any]
    position: Position
    written: int
    set_aside: int
    counts: Counter[str]


def stream(
    stage: Stage,
    source: Source,
    out: Path,
    *,
    execute: Executor = in_this_process,
    show: Show = lambda done, total: None,
) -> dict[str, Any]:
    """Write what `stage` makes of `source` to `out`, gzipped if it ends in .gz. It is whole or absent.

    Until then it is beside, as ``.partial``; a run that was stopped goes on there. Lines that are no rows
    go to ``out.rejected.jsonl`` with their numbers. Raises UserError for a partial file of something else.

    Returns counts: rows, rejected, what the stage counted, and the files.
    """
    settings = {"input": source.fingerprint, **stage.settings}
    partial, aside = out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.rejected.jsonl")
    beside = out.with_name(f"{out.name}.partial.json")
    check_target(source, out)
    with open_exclusively(partial) as file, explain_full_disk(out):
        state = _continue(file, beside, settings)
        with open(aside, "ab" if state.set_aside else "wb") as rejects:
            rejects.truncate(state.set_aside)
            state = _write(stage, source, execute, state, file, rejects, beside, out.suffix == ".gz", show)
        if not state.set_aside:
            aside.unlink()
        os.replace(partial, out)
        beside.unlink(missing_ok=True)
    found = {"out": str(out), **{name: state.counts[name] for name in ("rows", "rejected")}}
    found |= {name: count for name, count in sorted(state.counts.items()) if name not in found}
    return found | ({"rejected_file": str(aside)} if state.set_aside else {})


def check_target(source: Source, out: Path) -> None:
    """Raise UserError where `out` cannot be written, or is what is read."""
    check_output(out)
    if source.path.resolve() == out.resolve():
        raise UserError(f"{out} is the input: write elsewhere")


def discard(out: Path) -> None:
    """Delete what `stream` has of a file that will never be whole."""
    for ending in (".partial", ".partial.json", ".rejected.jsonl"):
        out.with_name(out.name + ending).unlink(missing_ok=True)


def _write(
    stage: Stage,
    source: Source,
    execute: Executor,
    state: State,
    file: IO[bytes],
    rejects: IO[bytes],
    beside: Path,
    zipped: bool,
    show: Show,
) -> State:
    size = source.path.stat().st_size

    def keep() -> None:
        for stream in (file, rejects):
            stream.flush()
            os.fsync(stream.fileno())
        write_atomically(beside, json.dumps(state._asdict(), ensure_ascii=False, indent=1).encode())

    made = execute(stage, source, source.read(state.position))
    kept = monotonic()
    try:
        for done in made:
            if done.output:
                # One member a chunk, so that a stopped file can be cut behind any of them.
                file.write(gzip.compress(done.output, 6, mtime=0) if zipped else done.output)
            rejects.write(dump_lines(rejected._asdict() for rejected in done.rejected))
            # All at once: whatever stops this, the state is that of whole chunks.
            counts = Counter(state.counts)
            counts.update(done.counts)  # a + b would lose what is 0
            state = State(state.settings, done.end, file.tell(), rejects.tell(), counts)
            show(done.end.byte or done.end.line, size if done.end.byte else 0)
            if monotonic() - kept > STATE_SECONDS:
                keep()
                kept = monotonic()
    finally:
        keep()  # what was stopped goes on here
    return state


def _continue(file: IO[bytes], beside: Path, settings: dict[str, Any]) -> State:
    """Return where a partial file goes on, cut to what is known to be right; a new one begins."""
    file.seek(0, os.SEEK_END)
    state = State(settings, START, 0, 0, Counter())
    if file.tell():
        try:
            stored = json.loads(beside.read_bytes())
            before = State(
                stored["settings"], Position(*stored["position"]), stored["written"], stored["set_aside"],
                Counter(stored["counts"]),
            )  # fmt: skip
        except (OSError, ValueError, LookupError, TypeError):
            before = None
        if before is not None:
            changed = sorted(
                name
                for name in settings.keys() | before.settings.keys()
                if settings.get(name) != before.settings.get(name)
            )
            if changed:
                raise UserError(
                    f"{file.name} was begun with another {changed[0].replace('_', ' ')}: "
                    "delete it, or write elsewhere"
                )
            state = before
    file.truncate(state.written)
    file.seek(state.written)
    return state


_encode = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode


def dump_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Return rows as JSON lines."""
    return b"".join(_encode(row).encode() + b"\n" for row in rows)
