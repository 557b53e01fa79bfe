"""Rows of a corpus as they lie in a file: JSON lines, plain lines or parquet, read in chunks, in order."""

import gzip
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from t2iprobe.errors import UserError
from t2iprobe.storage import is_utf8

FORMS = ("jsonl", "txt", "parquet")
CHUNK_LINES, CHUNK_BYTES = 512, 4 << 20
LONGEST_LINE = 64 << 20


class Position(NamedTuple):
    """Where reading goes on: the next line's number from 0, its byte (of plain files), `Pairs`' other."""

    line: int = 0
    byte: int = 0
    beside: int = 0


START = Position()


class Chunk(NamedTuple):
    """Lines in a row, where they begin and end, and what `Pairs` has beside their rows."""

    begin: Position
    lines: list[bytes]
    end: Position
    beside: tuple[bytes, ...] = ()

    @property
    def first(self) -> int:
        """Return the first line's number from 0."""
        return self.begin.line


class Row(NamedTuple):
    """A row that was read: its number, id, text, other fields, the line as it stood, and the one beside."""

    number: int
    id: str
    text: str
    fields: dict[str, Any]
    line: bytes
    beside: bytes = b""


class Rejected(NamedTuple):
    """A line that is no row: its number from 1, why, and how it begins."""

    line: int
    why: str
    begins: str


@dataclass(frozen=True)
class Source:
    """A file of texts.

    form: jsonl, txt or parquet, by default from the name. field: which one holds the text. longest: bytes
    of a line; a longer one is set aside, never held in memory. chunk_lines: fewer than CHUNK_LINES, for slow
    work.
    """

    path: Path
    form: str
    field: str = "text"
    longest: int = LONGEST_LINE
    chunk_lines: int | None = None

    @classmethod
    def open(cls, path: Path, field: str = "text", longest: int = LONGEST_LINE) -> "Source":
        """Find out the form of a file. Raises UserError where it is not there or of no known kind."""
        if not path.is_file():
            raise UserError(f"there is no file {path}")
        if longest < 2:
            raise UserError(f"a line may be 2 bytes or longer, not {longest}")
        suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
        ending = suffixes[-1].removeprefix(".") if suffixes else ""
        form = {"json": "jsonl", "ndjson": "jsonl", "text": "txt", "pq": "parquet"}.get(ending, ending)
        if form not in FORMS:
            raise UserError(f"{path} is none of {', '.join(FORMS)} (with .gz or without), by its name")
        return cls(path, form, field, longest)

    @property
    def fingerprint(self) -> str:
        """Return what tells one input from another without reading all of it: size, both ends, field."""
        size = self.path.stat().st_size
        digest = hashlib.sha256(f"{size}\0{self.field}\0{self.longest}\0".encode())
        with open(self.path, "rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(size - (1 << 20), 0))
            digest.update(file.read())
        return digest.hexdigest()

    @property
    def zipped(self) -> bool:
        """Tell whether it cannot be read from the middle."""
        return self.path.suffix == ".gz"

    @property
    def prefix(self) -> str:
        """Return what the ids of rows without one begin with: the file's name."""
        return self.path.name

    def read(self, start: Position = START) -> Iterator[Chunk]:
        """Yield the lines from `start` on, in chunks that are the same wherever reading starts."""
        begin, end, lines, size = start, start, [], 0
        for number, line, byte in self._read_lines(start):
            lines.append(line)
            size += len(line)
            end = Position(number + 1, byte)
            if len(lines) >= (self.chunk_lines or CHUNK_LINES) or size >= CHUNK_BYTES:
                yield Chunk(begin, lines, end)
                begin, lines, size = end, [], 0
        if lines:
            yield Chunk(begin, lines, end)

    def _read_lines(self, start: Position) -> Iterator[tuple[int, bytes, int]]:
        if self.form == "parquet":
            yield from self._read_parquet(start)
            return
        try:
            with self.open_file() as file:
                if self.zipped:
                    for _ in range(start.line):
                        _read_line(file, self.longest)
                else:
                    file.seek(start.byte)
                number, byte = start.line, start.byte
                while True:
                    line, length = _read_line(file, self.longest)
                    if not length:
                        return
                    byte += length
                    yield number, line, byte
                    number += 1
        except (OSError, EOFError) as error:
            raise UserError(f"cannot read {self.path}: {error}") from None

    def open_file(self) -> IO[bytes]:
        """Open the file, unzipped."""
        return gzip.open(self.path) if self.path.suffix == ".gz" else open(self.path, "rb")  # type: ignore[return-value]

    def _read_parquet(self, start: Position) -> Iterator[tuple[int, bytes, int]]:
        import pyarrow
        from pyarrow import parquet

        try:
            file = parquet.ParquetFile(self.path)
            if self.field not in file.schema_arrow.names:
                raise UserError(f"{self.path} has no column {self.field!r}: {file.schema_arrow.names}")
            number = 0
            for batch in file.iter_batches(CHUNK_LINES):
                rows = batch.slice(max(start.line - number, 0)).to_pylist()
                number = max(number, min(start.line, number + batch.num_rows))
                for row in rows:
                    yield number, json.dumps(row, ensure_ascii=False, default=str).encode(), 0
                    number += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"cannot read {self.path}: {error}") from None

    def parse(self, chunk: Chunk) -> tuple[list[Row], list[Rejected]]:
        """Return the rows of a chunk, and its lines that are none. Blank lines are neither."""
        rows, rejected = [], []
        for number, line in enumerate(chunk.lines, chunk.first):
            if not line.strip():
                continue
            try:
                rows.append(self._parse(number, line))
            except ValueError as error:
                rejected.append(Rejected(number + 1, str(error), line[:200].decode("utf-8", "replace")))
        return rows, rejected

    def _parse(self, number: int, line: bytes) -> Row:
        if len(line) > self.longest:
            raise ValueError(f"longer than {self.longest} bytes")
        try:
            content = line.decode("utf-8-sig" if number == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"byte {error.start} is not UTF-8") from None
        if self.form == "txt":
            return Row(number, f"{self.prefix}/{number}", content.rstrip("\r\n"), {}, line)
        try:
            fields = json.loads(content)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError("not an object")
        text = fields.get(self.field)
        if not isinstance(text, str):
            raise ValueError(f"no text in {self.field!r}")
        if b"\\ud" in line or b"\\uD" in line:
            for key, value in fields.items():
                if not is_utf8({key: value}):
                    where = "the text" if key == self.field else repr(key)
                    raise ValueError(f"{where} holds half of a surrogate pair")
        name = fields.get("id")
        return Row(number, f"{self.prefix}/{number}" if name is None else str(name), text, fields, line)


def _read_line(file: IO[bytes], longest: int) -> tuple[bytes, int]:
    """Return the next line, of which no more than `longest` + 1 bytes are kept, and its whole length."""
    line = file.readline(longest + 1)
    length = len(line)
    while length > longest and not line.endswith(b"\n"):
        more = file.readline(1 << 20)
        length += len(more)
        if not more or more.endswith(b"\n"):
            break
    return line, length


def number_of(name: str) -> int:
    """Return the published number of an id: the first eight bytes of its SHA-1, in this machine's order."""
    return int.from_bytes(hashlib.sha1(name.encode()).digest()[:8], sys.byteorder)
