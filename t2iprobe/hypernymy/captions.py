"""Captions from files: lines of text, JSON lines, COCO's annotations, CSV, TSV, parquet; gzipped or not."""

import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from t2iprobe.errors import UserError, suggest

__all__ = ["ENDINGS", "read_captions"]

ENDINGS = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
#: Columns that hold captions in published data, in order of preference.
COLUMNS = ("caption", "text", "TEXT", "prompt")
BATCH = 4096


def read_captions(path: Path, column: str | None = None) -> Iterator[str]:
    """Yield the captions of a file, line breaks within one as spaces.

    ``.txt`` holds one a line; ``.jsonl``, ``.csv``, ``.tsv`` and ``.parquet`` hold them in `column` (by
    default the first of COLUMNS that is there); ``.json`` is a list of texts or COCO's ``annotations``. All
    but parquet may be gzipped. Raises UserError where a file cannot be read so.
    """
    ending = next((end for end in ENDINGS if path.name.removesuffix(".gz").endswith(end)), None)
    if ending is None:
        raise UserError(
            f"{path} is no file of captions that is known: use {', '.join(ENDINGS)}, or .gz of them"
        )
    try:
        if ending == ".parquet":
            yield from map(_join_lines, _read_parquet(path, column))
            return
        opened = gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # noqa: SIM115
        with opened as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
            yield from map(_join_lines, _read_text(file, ending, column, path))
    except (OSError, EOFError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read captions from {path} ({' '.join(str(error).split())[:200]})") from None


def _join_lines(text: str) -> str:
    return " ".join(text.split())


def _read_text(file: IO[str], ending: str, column: str | None, path: Path) -> Iterator[str]:
    if ending == ".txt":
        yield from (line for line in file if line.strip())
    elif ending == ".jsonl":
        for line in file:
            if line.strip():
                row = json.loads(line)
                yield row if isinstance(row, str) else _take(row, column, path)
    elif ending == ".json":
        content = json.loads(file.read())
        rows = content.get("annotations") if isinstance(content, dict) else content
        if not isinstance(rows, list):
            raise UserError(f"{path} holds neither a list of captions nor COCO's annotations")
        yield from (row if isinstance(row, str) else _take(row, column, path) for row in rows)
    else:
        rows = csv.DictReader(file, delimiter="\t" if ending == ".tsv" else ",")
        yield from (_take(row, column, path) for row in rows)


def _take(row: Any, column: str | None, path: Path) -> str:
    if not isinstance(row, dict):
        raise UserError(f"a row of {path} is neither a text nor a mapping: {str(row)[:60]!r}")
    name = column or next((known for known in COLUMNS if known in row), None)
    if name is None or name not in row:
        keys = [str(key) for key in row]
        near = suggest(str(column), keys) or f": it has {', '.join(keys)}"
        raise UserError(f"{path} has no column {column or ' or '.join(COLUMNS)}{near}; give one by --column")
    return str(row[name]) if row[name] is not None else ""


def _read_parquet(path: Path, column: str | None) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise UserError("parquet needs pyarrow: pip install 't2iprobe[corpus]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            name = column or next((known for known in COLUMNS if known in names), None)
            if name not in names:
                raise UserError(
                    f"{path} has no column {column or ' or '.join(COLUMNS)}: it has {', '.join(names)}; "
                    "give one by --column"
                )
            for batch in file.iter_batches(BATCH, columns=[name]):
                yield from (str(value) for value in batch.column(0).to_pylist() if value is not None)
    except ArrowException as error:
        raise UserError(f"cannot read captions from {path} ({str(error).splitlines()[0][:200]})") from None
