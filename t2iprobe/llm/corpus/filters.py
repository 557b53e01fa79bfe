"""Filters as data: a recipe of rules over signals keeps or drops each row, and says which rule and why."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from t2iprobe.errors import UserError, suggest
from t2iprobe.llm.corpus.documents import Row, Source, number_of
from t2iprobe.llm.corpus.signals import Signals
from t2iprobe.llm.corpus.streaming import dump_lines
from t2iprobe.storage import explain_full_disk, open_exclusively

_EXAMPLES = 3
_FOLDER = Path(__file__).parent / "recipes"

Reduce = Literal["mean", "sum", "min", "max", "count"]


class Rule(BaseModel):
    """What a signal must be for a row to stay.

    signal: its name. times: another signal, multiplied. reduce: how several spans become one number; a
    signal of the document has one. min, max: bounds, both allowed. keep_top: the share of rows with the
    highest values that stay; with gumbel, drawn by them (DSIR's resampling) by `seed`. missing: what
    happens where the score is None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    signal: str
    times: str | None = None
    reduce: Reduce = "mean"
    min: float | None = None
    max: float | None = None
    keep_top: float | None = Field(None, gt=0, le=1)
    gumbel: bool = False
    seed: int = 0
    missing: Literal["keep", "drop"] = "drop"

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if (self.min is None and self.max is None) == (self.keep_top is None):
            raise ValueError("a rule has min or max, or keep_top")
        return self

    def __str__(self) -> str:
        name = self.signal if self.times is None else f"{self.signal} × {self.times}"
        if self.keep_top is not None:
            return f"{name}, {'drawn' if self.gumbel else 'highest'} {self.keep_top:.0%}"
        low = "" if self.min is None else f"{self.min:g} ≤ "
        high = "" if self.max is None else f" ≤ {self.max:g}"
        return f"{low}{name}{high}"


class Recipe(BaseModel):
    """Rules for whole rows, and rules for lines: those of a row that break one are cut out of the copy."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    about: str = ""
    rules: tuple[Rule, ...] = ()
    lines: tuple[Rule, ...] = ()

    @model_validator(mode="after")
    def _useful(self) -> Self:
        if not self.rules and not self.lines:
            raise ValueError("a recipe has rules, lines or both")
        if any(rule.keep_top is not None or rule.times is not None for rule in self.lines):
            raise ValueError("rules of lines have min and max only")
        return self


def list_recipes() -> dict[str, Path]:
    """Return name → file of the recipes that came with the package."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}


def load_recipe(name: str) -> Recipe:
    """Read a packaged recipe by name, or a YAML file. Raises UserError for anything that is no recipe."""
    path = list_recipes().get(name, Path(name))
    if not path.is_file():
        near = suggest(name, list_recipes()) or f": there are {', '.join(list_recipes())}"
        raise UserError(f"there is no recipe or file {name!r}{near}")
    try:
        return Recipe(**yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, OSError, UnicodeDecodeError, TypeError) as error:
        raise UserError(f"cannot read the recipe {path}: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} is no recipe: {where}: {first['msg']}") from None


def measure(rule: Rule, signals: Signals) -> float | None:
    """Return the number that a rule looks at, None where it has none. Raises KeyError for no signal."""
    value = _reduce(rule.reduce, signals[rule.signal])
    if rule.times is None or value is None:
        return value
    other = _reduce(rule.reduce, signals[rule.times])
    return None if other is None else value * other


def _reduce(how: str, spans: list[list[Any]]) -> float | None:
    if how == "count":
        return len(spans)
    scores = [score for _, _, score in spans if score is not None]
    if not scores:
        return None
    if how == "mean":
        return sum(scores) / len(scores)
    if how == "sum":
        return sum(scores)
    return min(scores) if how == "min" else max(scores)


def passes(rule: Rule, value: float | None, least: float | None = None) -> bool:
    """Tell whether a value is within a rule; `least` is the lowest that keep_top leaves."""
    if value is None:
        return rule.missing == "keep"
    if rule.keep_top is not None:
        return least is None or value >= least
    return (rule.min is None or value >= rule.min) and (rule.max is None or value <= rule.max)


@dataclass
class Removed:
    """What a rule removed: rows, those that no other rule would have, and examples of these rows."""

    rows: int = 0
    alone: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)


def filter_file(source: Source, signals: Path, recipe: Recipe, out: Path) -> dict[str, Any]:
    """Write the rows that a recipe keeps to `out`, as they stand; what stays depends on `signals` alone.

    `out` is whole or absent. Where the recipe has rules for lines, the lines that break one are cut out of a
    row's text in `out`, and a row without any left is dropped.

    Returns rows, kept, rejected, cut lines, and for each rule what it removed, with examples.
    Raises UserError where `signals` is not of this file, or lacks a signal that a rule needs.
    """
    least = [_find_least(rule, signals) for rule in recipe.rules]
    removed = [Removed() for _ in recipe.rules]
    counts = {"rows": 0, "kept": 0, "rejected": 0, "lines_cut": 0, "without_lines": 0}
    partial = out.with_name(f"{out.name}.partial")
    aside = out.with_name(f"{out.name}.rejected.jsonl")
    if out.resolve() in (source.path.resolve(), signals.resolve()) or out.is_dir():
        raise UserError(f"{out} is an input or a folder: write elsewhere")
    rejects = bytearray()
    with open_exclusively(partial) as file, explain_full_disk(out):
        try:
            file.truncate(0)
            for row, found in _pair(source, signals, counts, rejects):
                broken = []
                for place, rule in enumerate(recipe.rules):
                    value = _draw(rule, _measure(rule, found, signals), row.id)
                    if not passes(rule, value, least[place]):
                        broken.append((place, value))
                for place, value in broken:
                    _note(removed[place], row, value, alone=len(broken) == 1)
                if not broken and (line := _cut(row, source, recipe, found, signals, counts)) is not None:
                    counts["kept"] += 1
                    file.write(line)
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, out)
            aside.unlink(missing_ok=True)
            if rejects:
                aside.write_bytes(rejects)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    return {
        "out": str(out),
        **counts,
        **({"rejected_file": str(aside)} if rejects else {}),
        "rules": [
            {"rule": str(rule), "removed": each.rows, "removed_alone": each.alone, "examples": each.examples}
            for rule, each in zip(recipe.rules, removed, strict=True)
        ],
    }


def _pair(
    source: Source, signals: Path, counts: dict[str, int], rejects: bytearray
) -> Iterator[tuple[Row, Signals]]:
    """Yield each row with its signals."""
    annotated = _read_signals(signals)
    for chunk in source.read():
        rows, rejected = source.parse(chunk)
        counts["rejected"] += len(rejected)
        rejects += dump_lines(each._asdict() for each in rejected)
        for row in rows:
            name, found = next(annotated, ("nothing", {}))
            if name != row.id:
                raise UserError(
                    f"{signals} has {name} where line {row.number + 1} of {source.path} is {row.id}: "
                    "it is not of this file"
                )
            counts["rows"] += 1
            yield row, found
    if (left := next(annotated, None)) is not None:
        raise UserError(f"{signals} goes on with {left[0]} behind the end of {source.path}")


def _read_signals(path: Path) -> Iterator[tuple[str, Signals]]:
    source = Source.open(path)
    for chunk in source.read():
        for number, line in enumerate(chunk.lines, chunk.first + 1):
            try:
                row = json.loads(line)
                yield row["id"], row["quality_signals"]
            except (ValueError, LookupError, TypeError):
                raise UserError(f"{path}, line {number} is no row of corpus signals") from None


def _measure(rule: Rule, found: Signals, signals: Path) -> float | None:
    try:
        return measure(rule, found)
    except KeyError as error:
        raise UserError(
            f"{signals} has no signal {error.args[0]}{suggest(error.args[0], found)}, which the rule "
            f"{str(rule)!r} needs"
        ) from None


def _draw(rule: Rule, value: float | None, name: str) -> float | None:
    """Add Gumbel noise of the row's own, so that the highest values are a sample by exp(value)."""
    if not rule.gumbel or value is None:
        return value
    uniform = ((number_of(f"{rule.seed}\0{name}") >> 11) + 0.5) / 2.0**53
    return value - math.log(-math.log(uniform))


def _find_least(rule: Rule, signals: Path) -> float | None:
    """Return the lowest value that a rule of the highest share keeps: a pass over the signals."""
    if rule.keep_top is None:
        return None
    values = []
    for name, found in _read_signals(signals):
        if (value := _draw(rule, _measure(rule, found, signals), name)) is not None:
            values.append(value)
    if not values:
        return None
    keep = max(1, round(rule.keep_top * len(values)))
    return float(np.partition(np.array(values), len(values) - keep)[len(values) - keep])


def _note(removed: Removed, row: Row, value: float | None, alone: bool) -> None:
    removed.rows += 1
    removed.alone += alone
    if len(removed.examples) < _EXAMPLES:
        removed.examples.append({"id": row.id, "value": value, "text": row.text[:100]})


def _cut(
    row: Row, source: Source, recipe: Recipe, found: Signals, signals: Path, counts: dict[str, int]
) -> bytes | None:
    """Return the line to write: as it stood, or without the lines of its text that break a rule."""
    as_it_stood = row.line if row.line.endswith(b"\n") else row.line + b"\n"
    broken: set[tuple[int, int]] = set()
    spans: list[tuple[int, int]] = []
    for rule in recipe.lines:
        _measure(rule, found, signals)  # the signal is there
        spans = [(start, end) for start, end, _ in found[rule.signal]]
        broken |= {(start, end) for start, end, score in found[rule.signal] if not passes(rule, score)}
    counts["lines_cut"] += len(broken)
    if not broken:
        return as_it_stood
    text = "".join(row.text[start:end] for start, end in spans if (start, end) not in broken)
    if not text.strip():
        counts["without_lines"] += 1
        return None
    return text.encode() if source.form == "txt" else dump_lines([{**row.fields, source.field: text}])
