"""One file to another: the same from any number of processes, after a kill, with broken lines set aside."""

import contextlib
import fcntl
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from t2iprobe.errors import UserError
from t2iprobe.llm.corpus import documents
from t2iprobe.llm.corpus.annotation import Annotation
from t2iprobe.llm.corpus.documents import Chunk, Position, Row, Source
from t2iprobe.llm.corpus.pairs import Pairs
from t2iprobe.llm.corpus.streaming import Made, Stage, in_processes, stream, work

PLAIN = Annotation(captions=False)


@dataclass(frozen=True)
class Upper:
    """A stage that writes texts in capitals."""

    mark: str = ""
    settings = {}  # noqa: RUF012

    def process(self, rows: Sequence[Row]) -> tuple[list[bytes], Counter[str]]:
        return [f"{row.id}\t{row.text.upper()}\n".encode() for row in rows], Counter(letters=len(rows))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "CHUNK_LINES", 7)


def write_rows(path: Path, count: int, broken: bool = True) -> Path:
    lines = [
        json.dumps({"text": f"a photo of {number} red foxes\nin the snow, " * (number % 5), "id": number})
        for number in range(count)
    ]
    if broken:
        lines[3], lines[20], lines[21] = "{", '["text"]', "   "
    path.write_text("\n".join(lines) + "\n")
    return path


def test_processes_write_the_same(tmp_path: Path) -> None:
    source = Source.open(write_rows(tmp_path / "in.jsonl", 90))
    found = [
        stream(PLAIN, source, tmp_path / f"{count}.jsonl", execute=in_processes(count)) for count in (1, 4)
    ]

    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "4.jsonl").read_bytes()
    assert found[0]["rows"] == found[1]["rows"] == 87
    assert found[0]["rejected"] == 2
    rejected = [json.loads(line) for line in Path(found[1]["rejected_file"]).read_text().splitlines()]
    assert [(row["line"], row["begins"]) for row in rejected] == [(4, "{\n"), (21, '["text"]\n')]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "1.jsonl", "1.jsonl.rejected.jsonl", "4.jsonl", "4.jsonl.rejected.jsonl", "in.jsonl",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["out.txt", "out.txt.gz"])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_stopped_file_goes_on_where_it_was(tmp_path: Path, name: str, zipped: bool) -> None:
    path = write_rows(tmp_path / "in.jsonl", 60)
    if zipped:
        path = tmp_path / "in.jsonl.gz"
        path.write_bytes(gzip.compress((tmp_path / "in.jsonl").read_bytes()))
    source, out = Source.open(path), tmp_path / name
    seen: list[int] = []

    def stop_after(chunks_done: int) -> Any:
        def execute(stage: Stage, source: Source, chunks: Iterator[Chunk]) -> Iterator[Made]:
            for number, chunk in enumerate(chunks):
                if number == chunks_done:
                    raise KeyboardInterrupt
                seen.append(chunk.first)
                yield work(stage, source, chunk)

        return execute

    for chunks_done in (3, 0, 2):
        with pytest.raises(KeyboardInterrupt):
            stream(Upper(), source, out, execute=stop_after(chunks_done))
        assert not out.exists()
        with open(tmp_path / f"{name}.partial", "ab") as file:
            file.write(b"half a li")  # what the disk may hold of a chunk that was not finished
    found = stream(Upper(), source, out, execute=stop_after(99))
    whole = stream(Upper(), source, tmp_path / f"again-{name}")

    assert seen == list(range(0, 60, 7))
    assert out.read_bytes() == (tmp_path / f"again-{name}").read_bytes()
    assert {**found, "out": "", "rejected_file": ""} == {**whole, "out": "", "rejected_file": ""}
    assert Path(found["rejected_file"]).read_text() == Path(whole["rejected_file"]).read_text()


def test_a_killed_process_goes_on(tmp_path: Path) -> None:
    rows = "".join(
        json.dumps({"text": f"{number} " + "a red fox sleeps in the deep white snow again. " * 150}) + "\n"
        for number in range(1100)
    )
    (tmp_path / "in.jsonl").write_text(rows)
    code = (
        "import sys; from t2iprobe.llm.corpus import streaming; streaming.STATE_SECONDS = 0; "
        "from t2iprobe.cli import main; main()"
    )
    words = ["llm", "corpus", "signals", "in.jsonl", "-o", "out.jsonl", "--no-captions", "--json"]
    command = [sys.executable, "-c", code, *words]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    state = tmp_path / "out.jsonl.partial.json"
    while not state.exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = json.loads(state.read_bytes())["position"][0]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, check=True)

    assert 0 < before < 1100
    assert json.loads(done.stdout)["rows"] == 1100
    ids = [json.loads(line)["id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert ids == [f"in.jsonl/{number}" for number in range(1100)]


def test_other_settings_do_not_go_on(tmp_path: Path) -> None:
    source, out = Source.open(write_rows(tmp_path / "in.jsonl", 30)), tmp_path / "out"

    def stop(stage: Stage, source: Source, chunks: Iterator[Chunk]) -> Iterator[Made]:
        yield work(stage, source, next(chunks))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream(PLAIN, source, out, execute=stop)
    with pytest.raises(UserError, match="was begun with another size"):
        stream(Annotation(captions=False, size=2), source, out)
    write_rows(tmp_path / "in.jsonl", 31)
    with pytest.raises(UserError, match="was begun with another input"):
        stream(PLAIN, source, out)


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    source = Source.open(write_rows(tmp_path / "in.jsonl", 30))
    with open(tmp_path / "out.partial", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process writes"):
            stream(Upper(), source, tmp_path / "out")


def test_the_input_is_not_overwritten(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "in.jsonl", 30)
    with pytest.raises(UserError, match="is the input"):
        stream(Upper(), Source.open(path), tmp_path / "x" / ".." / "in.jsonl")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="it is no plain file"):
        stream(Upper(), Source.open(path), tmp_path / "pipe")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["in.jsonl", "pipe"]


def parse_all(path: Path, **more: Any) -> tuple[list[Row], list[tuple[int, str]]]:
    source = Source.open(path, **more)
    rows, rejected = [], []
    for chunk in source.read():
        good, bad = source.parse(chunk)
        rows += good
        rejected += [(each.line, each.why) for each in bad]
    return rows, rejected


def test_broken_lines_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(
        b'{"text": "good"}\n{"text": "caf\xe9"}\n{"text": "x", \n{"txt": "x"}\n"text"\n'
        b'{"text": "\\ud83d"}\n\n{"text": "' + b"x" * 300 + b'"}\n{"text": "last"}\n'
        b'{"text": "x", "id": "\\uD800"}\n{"text": "x", "\\udfff": 1}\n{"text": "\\ud83e\\udda9"}\n'
    )
    rows, rejected = parse_all(path, longest=100)

    assert [(row.number, row.text) for row in rows] == [(0, "good"), (8, "last"), (11, "🦩")]
    assert [line for line, _ in rejected] == [2, 3, 4, 5, 6, 8, 10, 11]
    assert [why.split(":")[0] for _, why in rejected] == [
        "byte 13 is not UTF-8", "not JSON", "no text in 'text'", "not an object",
        "the text holds half of a surrogate pair", "longer than 100 bytes",
        "'id' holds half of a surrogate pair", r"'\udfff' holds half of a surrogate pair",
    ]  # fmt: skip


def test_a_byte_order_mark_belongs_to_no_text(tmp_path: Path) -> None:
    for name, content in (("in.jsonl", '{"text": "a\u2028b"}\n{"text": "c"}\n'), ("in.txt", "a\u2028b\nc\n")):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        rows, rejected = parse_all(tmp_path / name)
        assert [row.text for row in rows] == ["a\u2028b", "c"]
        assert not rejected


def test_huge_lines_are_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "' + b"x" * 9_000_000 + b'"}\n{"text": "after"}\n')
    source = Source.open(path, longest=1000)
    [chunk] = source.read()

    assert sum(map(len, chunk.lines)) < 1100
    assert [row.text for row in source.parse(chunk)[0]] == ["after"]
    assert chunk.end == Position(2, path.stat().st_size)


def test_a_chunk_is_read_again_from_where_it_begins(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 40).read_bytes().splitlines(True)
    rows[2] = rows[9] = rows[16] = b'{"text": "' + b"x" * 5000 + b'"}\n'
    (tmp_path / "in.jsonl").write_bytes(b"".join(rows))
    source = Source.open(tmp_path / "in.jsonl", longest=1000)
    for each in (source, Pairs.join(source, tmp_path / "rows.jsonl")):
        found = []
        with contextlib.suppress(UserError):  # the signals go on behind the end: three lines are no rows
            for chunk in each.read():
                found.append(chunk)
        assert [chunk.first for chunk in found] == [0, 7, 14, 21, 28, 35]
        assert [next(each.read(chunk.begin)) for chunk in found] == found


def test_lines_of_text_and_parquet_are_rows_too(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    texts = [f"caption {number} é" for number in range(20)]
    (tmp_path / "in.txt").write_text("\r\n".join(texts), newline="")
    parquet.write_table(pyarrow.table({"caption": texts, "n": range(20)}), tmp_path / "in.parquet")
    plain, _ = parse_all(tmp_path / "in.txt")
    columns, _ = parse_all(tmp_path / "in.parquet", field="caption")

    assert [row.text for row in plain] == [row.text for row in columns] == texts
    assert columns[5].fields["n"] == 5
    source = Source.open(tmp_path / "in.parquet", "caption")
    later = list(source.read(Position(14)))
    assert later == list(source.read())[2:]
    with pytest.raises(UserError, match="has no column 'text'"):
        parse_all(tmp_path / "in.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere.jsonl", None, "there is no file"),
        ("in.csv", b"a,b", "is none of jsonl, txt, parquet"),
        ("in.jsonl.gz", b"not zipped", "cannot read"),
        ("in.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9999)[:-30], "cannot read"),
        ("in.parquet", b"PAR1", "cannot read"),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        parse_all(tmp_path / name)
