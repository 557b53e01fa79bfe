"""Filters as data: a recipe of rules over signals keeps or drops each row, and says which rule and why."""

import math
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from t2iprobe.errors import UserError, suggest
from t2iprobe.llm.corpus.documents import Row, Source, number_of
from t2iprobe.llm.corpus.importance import find_target_name
from t2iprobe.llm.corpus.pairs import Pairs, SignalsError, read_signals
from t2iprobe.llm.corpus.signals import Signals
from t2iprobe.llm.corpus.streaming import (
    Executor,
    Show,
    check_target,
    discard,
    dump_lines,
    in_this_process,
    stream,
)

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


@dataclass(frozen=True)
class Filtering:
    """The stage that keeps rows: a line out for each that breaks no rule, as it stood or with lines cut.

    signals: their file, which messages name. form, field: of the texts. least: for each rule the lowest value
    that keep_top leaves (`find_least`).
    """

    recipe: Recipe
    signals: Path
    form: str
    field: str
    least: tuple[float | None, ...]

    @property
    def settings(self) -> Mapping[str, Any]:
        """What is kept depends on."""
        return {"recipe": self.recipe.model_dump(mode="json")}

    def process(self, rows: Sequence[Row]) -> tuple[list[bytes], Counter[str]]:
        """Return the lines that stay, and how many rows each rule removes, and removes alone."""
        lines = []
        counts: Counter[str] = Counter(kept=0, lines_cut=0, without_lines=0)
        for row in rows:
            found = self.read(row)
            broken = self.find_broken(row, found)
            for place, _ in broken:
                counts[f"removed by {place}"] += 1
                counts[f"removed by {place} alone"] += len(broken) == 1
            if not broken and (line := self._cut(row, found, counts)) is not None:
                counts["kept"] += 1
                lines.append(line)
        return lines, counts

    def read(self, row: Row) -> Signals:
        """Return a row's signals. Raises SignalsError where the line beside it is another's."""
        name, found = read_signals(row.beside, self.signals) if row.beside else ("nothing", {})
        if name != row.id:
            raise SignalsError(
                f"{self.signals} has {name} where line {row.number + 1} of the texts is {row.id}: "
                "it is not of this file"
            )
        return found

    def find_broken(self, row: Row, found: Signals) -> list[tuple[int, float | None]]:
        """Return the places of the rules that a row breaks, and the values that do."""
        values = [_draw(rule, _measure(rule, found, self.signals), row.id) for rule in self.recipe.rules]
        return [
            (place, value)
            for place, (rule, value, least) in enumerate(
                zip(self.recipe.rules, values, self.least, strict=True)
            )
            if not passes(rule, value, least)
        ]

    def _cut(self, row: Row, found: Signals, counts: Counter[str]) -> bytes | None:
        """Return the line to write: as it stood, or without the lines of its text that break a rule."""
        as_it_stood = row.line if row.line.endswith(b"\n") else row.line + b"\n"
        broken: set[tuple[int, int]] = set()
        spans: list[tuple[int, int]] = []
        for rule in self.recipe.lines:
            _measure(rule, found, self.signals)  # the signal is there
            spans = [(start, end) for start, end, _ in found[rule.signal]]
            broken |= {(start, end) for start, end, score in found[rule.signal] if not passes(rule, score)}
        counts["lines_cut"] += len(broken)
        if not broken:
            return as_it_stood
        text = "".join(row.text[start:end] for start, end in spans if (start, end) not in broken)
        if not text.strip():
            counts["without_lines"] += 1
            return None
        return text.encode() if self.form == "txt" else dump_lines([{**row.fields, self.field: text}])


def filter_file(
    source: Source,
    signals: Path,
    recipe: Recipe,
    out: Path,
    *,
    report: bool = False,
    execute: Executor = in_this_process,
    show: Show = lambda done, total: None,
) -> dict[str, Any]:
    """Write the rows that a recipe keeps to `out`, as they stand; what stays depends on `signals` alone.

    `out` is whole or absent, and a run that was stopped goes on (see `stream`). Where the recipe has rules
    for lines, the lines that break one are cut out of a row's text in `out`, and a row without any left is
    dropped. With report the rows are read once more, until each rule has examples of what it removed.

    Returns rows, kept, rejected, cut lines, and for each rule what it removed.
    Raises SignalsError where `signals` is not of this file, or lacks a signal that a rule needs.
    """
    pairs = Pairs.join(source, signals)
    for each in (pairs, pairs.signals):
        check_target(each, out)
    least = tuple(find_least(rule, signals) for rule in recipe.rules)
    stage = Filtering(recipe, signals, source.form, source.field, least)
    try:
        found = stream(stage, pairs, out, execute=execute, show=show)
    except SignalsError:
        discard(out)
        raise
    rules = []
    for place, rule in enumerate(recipe.rules):
        removed, alone = (found.pop(f"removed by {place}{end}", 0) for end in ("", " alone"))
        rules.append({"rule": str(rule), "removed": removed, "removed_alone": alone})
    if report:
        wanted = [min(_EXAMPLES, row["removed"]) for row in rules]
        for row, examples in zip(rules, find_examples(stage, pairs, wanted), strict=True):
            row["examples"] = examples
    return found | {"rules": rules}


def find_examples(stage: Filtering, pairs: Pairs, wanted: Sequence[int]) -> list[list[dict[str, Any]]]:
    """Return the first rows that each rule removes, as many as are wanted, and the values that break it."""
    examples: list[list[dict[str, Any]]] = [[] for _ in wanted]
    for chunk in pairs.read():
        if [len(each) for each in examples] == list(wanted):
            break
        for row in pairs.parse(chunk)[0]:
            for place, value in stage.find_broken(row, stage.read(row)):
                if len(examples[place]) < wanted[place]:
                    examples[place].append({"id": row.id, "value": value, "text": row.text[:100]})
    return examples


def _measure(rule: Rule, found: Signals, signals: Path) -> float | None:
    try:
        return measure(rule, found)
    except KeyError as error:
        name = error.args[0]
        raise SignalsError(
            f"{signals} has no signal {name}{explain_target(name) or suggest(name, found)}, which the rule "
            f"{str(rule)!r} needs"
        ) from None


def explain_target(signal: str) -> str:
    """Return how a signal that needs a target comes about, nothing for others."""
    name = find_target_name(signal)
    return f" (llm corpus train --name {name} makes it, corpus signals --target adds it)" if name else ""


def _draw(rule: Rule, value: float | None, name: str) -> float | None:
    """Add Gumbel noise of the row's own, so that the highest values are a sample by exp(value)."""
    if not rule.gumbel or value is None:
        return value
    uniform = ((number_of(f"{rule.seed}\0{name}") >> 11) + 0.5) / 2.0**53
    return value - math.log(-math.log(uniform))


def find_least(rule: Rule, signals: Path) -> float | None:
    """Return the lowest value that a rule of the highest share keeps: a pass over the signals."""
    if rule.keep_top is None:
        return None
    values = array("d")  # eight bytes a row are all that is held of them
    for chunk in Source.open(signals).read():
        for line in chunk.lines:
            name, found = read_signals(line, signals)
            if (value := _draw(rule, _measure(rule, found, signals), name)) is not None:
                values.append(value)
    if not values:
        return None
    keep = max(1, round(rule.keep_top * len(values)))
    return float(np.partition(np.array(values), len(values) - keep)[len(values) - keep])
