"""A file of texts and the file of its signals, read side by side: each row with the line that is its own."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from t2iprobe.errors import UserError
from t2iprobe.llm.corpus.documents import START, Chunk, Position, Rejected, Row, Source
from t2iprobe.llm.corpus.signals import Signals


class SignalsError(UserError):
    """The signals are not of this file, or lack one."""


@dataclass(frozen=True)
class Pairs(Source):
    """A file of texts whose chunks hold the lines of its signals, too: one for each row, in order."""

    signals: Source = None  # type: ignore[assignment]  # it has no default, but what it is like has

    @classmethod
    def join(cls, source: Source, signals: Path) -> "Pairs":
        """Read `signals`, JSON lines, beside `source`."""
        other = Source.open(signals)
        if other.form != "jsonl":
            raise UserError(f"{signals} is not what corpus signals writes, JSON lines")
        return cls(**vars(source), signals=other)

    @property
    def fingerprint(self) -> str:
        """Return what tells both from others."""
        return hashlib.sha256(f"{super().fingerprint}\0{self.signals.fingerprint}".encode()).hexdigest()

    @property
    def zipped(self) -> bool:
        """Tell whether either cannot be read from the middle."""
        return super().zipped or self.signals.zipped

    def read(self, start: Position = START) -> Iterator[Chunk]:
        """Yield chunks of the texts with the lines of signals that are their rows'."""
        begin = start
        try:
            with self.signals.open_file() as file:
                file.seek(start.beside)
                for chunk in super().read(start):
                    rows, _ = super().parse(chunk)
                    beside = tuple(file.readline() for _ in rows)
                    end = chunk.end._replace(beside=file.tell())
                    yield Chunk(begin, chunk.lines, end, beside)
                    begin = end
                left = file.readline()
        except (OSError, EOFError) as error:
            raise SignalsError(f"cannot read {self.signals.path}: {error}") from None
        if left:
            name, _ = read_signals(left, self.signals.path)
            raise SignalsError(f"{self.signals.path} goes on with {name} behind the end of {self.path}")

    def parse(self, chunk: Chunk) -> tuple[list[Row], list[Rejected]]:
        """Return the rows of a chunk with their lines of signals, and what is no row."""
        rows, rejected = super().parse(chunk)
        return [row._replace(beside=line) for row, line in zip(rows, chunk.beside, strict=True)], rejected


def read_signals(line: bytes, path: Path) -> tuple[str, Signals]:
    """Return the id and the signals of a line of `path`."""
    try:
        row = json.loads(line)
        return row["id"], row["quality_signals"]
    except (ValueError, LookupError, TypeError):
        begin = line[:60].decode("utf-8", "replace").strip()
        raise SignalsError(f"{path} holds a line that is no row of corpus signals: {begin}") from None
