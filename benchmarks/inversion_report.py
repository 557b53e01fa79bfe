"""What came of benchmarks/inversion.py: seconds of a concept, ratios, verdicts, the table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from inversion_turns import Unit
from published_inversion import METHOD

from t2iprobe.intervals import describe_difference, describe_mean, interval
from t2iprobe.inversion.stopping import PRESETS

BLOCK = 2 * PRESETS[METHOD]["plateau"]["every"]  # passes with two looks of ours
RESAMPLES = 1000
NAMES = {
    "0": "the word that all begin at",
    "a": "(a) diffusers' example",
    "b": "(b) published DVAR",
    "e": "(e) DVAR at our rate",
    "c": "(c) ours, one concept",
    "d": "(d) ours, eight in one pass",
}
OURS = "cd"


def group_blocks(units: Iterable[Unit]) -> dict[int, np.ndarray]:
    """Return the mean seconds of a pass in each block of BLOCK, by how many concepts shared it.

    The first pass of a unit, with all that comes before it, is left out.
    """
    blocks: dict[int, list[float]] = {}
    for unit in units:
        for start in range(0, len(unit.seconds), BLOCK):
            part = unit.seconds[max(start, 1) : start + BLOCK]
            if part:
                blocks.setdefault(unit.active(start), []).append(float(np.mean(part)))
    return {active: np.array(values) for active, values in blocks.items()}


def estimate_seconds(units: Sequence[Unit], blocks: Mapping[int, np.ndarray]) -> np.ndarray:
    """Return the seconds of units by the medians of their arm's `blocks`; then by RESAMPLES of the blocks."""
    rng = np.random.default_rng(0)
    passes: dict[int, int] = {}
    for unit in units:
        for number in range(1, len(unit.seconds)):
            active = unit.active(number - number % BLOCK)
            passes[active] = passes.get(active, 0) + 1
    total = np.full(1 + RESAMPLES, sum(unit.seconds[0] for unit in units))
    for active, times in passes.items():
        values = blocks[active]
        drawn = rng.choice(values, (RESAMPLES, len(values)))
        total += times * np.concatenate([[np.median(values)], np.median(drawn, axis=1)])
    return total


def describe_ratio(numerator: np.ndarray, denominator: np.ndarray) -> dict[str, Any]:
    """Return the ratio of two `estimate_seconds` with the interval of its resamples."""
    ratio = numerator / denominator
    return {"value": float(ratio[0]), "interval": list(interval(ratio[1:]))}


def resample_concepts(slow: Sequence[Unit], fast: Sequence[Unit]) -> list[float]:
    """Return the interval over concepts of the ratio of two arms that train the same ones, one by one."""
    seconds = np.array([[sum_median(one), sum_median(other)] for one, other in zip(slow, fast, strict=True)])
    drawn = np.random.default_rng(0).integers(len(seconds), size=(RESAMPLES, len(seconds)))
    sums = seconds[drawn].sum(1)
    return list(interval(sums[:, 0] / sums[:, 1]))


def sum_median(unit: Unit) -> float:
    """Return a training's seconds, every pass but the first as long as the median one."""
    return unit.seconds[0] + (len(unit.seconds) - 1) * float(np.median(unit.seconds))


def compare(
    arms: Mapping[str, Sequence[Unit]],
    flops: Mapping[str, Mapping[str, float]],
    measured: Mapping[str, Mapping[str, Sequence[float]]],
) -> dict[str, Any]:
    """Return the table and the verdicts. Times are of a concept, likeness is of the same concepts in all."""
    seconds: dict[str, np.ndarray] = {}
    found: dict[str, dict[str, Any]] = {letter: {} for letter in ("0", *arms)}
    for letter, units in arms.items():
        blocks = group_blocks(units)
        count = sum(len(unit.names) for unit in units)
        seconds[letter] = estimate_seconds(units, blocks) / count
        steps = [steps for unit in units for steps in unit.steps]
        found[letter] = {
            "steps": steps,
            "reasons": [reason for unit in units for reason in unit.reasons],
            "seconds": float(seconds[letter][0]),
            "seconds_of_the_clock": sum(sum(unit.seconds) for unit in units) / count,
            "seconds_before": sum(unit.seconds[0] for unit in units) / count,
            "concepts_a_minute": 60 / float(seconds[letter][0]),
            "concepts_timed": count,
            "concepts_in_a_pass": max(len(unit.names) for unit in units),
            "flops_a_step": flops[letter]["step"],
            "flops": flops[letter]["once"] + flops[letter]["step"] * float(np.mean(steps)),
        }
        if "a" in seconds:
            found[letter]["times_faster_than_a"] = describe_ratio(seconds["a"], seconds[letter])
            found[letter]["flops_ratio"] = found["a"]["flops"] / found[letter]["flops"]
    for letter, values in measured.items():
        quality = {name: describe_mean(each) for name, each in values.items()}
        if "a" in measured:
            for name, each in values.items():
                quality[name]["minus_a"] = describe_difference(measured["a"][name], each)
        found[letter] |= quality
    verdicts = judge(found, seconds)
    if {"b", "c"} <= set(arms) and len(arms["b"]) > 1:
        ends = resample_concepts(arms["b"], arms["c"])
        for verdict in verdicts:
            if verdict["claim"].endswith("(c) at least 2 times faster than (b)"):
                verdict["over_concepts"] = ends
                verdict["detail"] += f"; over concepts [{ends[0]:.1f}, {ends[1]:.1f}]"
    return {"arms": found, "verdicts": verdicts}


def judge(
    found: Mapping[str, Mapping[str, Any]],
    seconds: Mapping[str, np.ndarray],
) -> list[dict[str, Any]]:
    """Return {claim, holds, detail} for the arms that were run; a ratio holds if all of its interval does."""
    verdicts = []
    for letter in OURS:
        if {"a", letter} <= set(seconds):
            low = found["a"]["likeness"]["interval"][0]
            value, difference = found[letter]["likeness"]["value"], found[letter]["likeness"]["minus_a"]
            ends = difference["interval"]
            verdicts.append(
                {
                    "claim": f"likeness of ({letter}) no lower than of (a) within its interval",
                    "holds": value >= low and ends[1] >= 0,
                    "detail": f"{value:.3f}, (a)'s interval begins at {low:.3f}; "
                    f"paired difference {difference['value']:+.3f} [{ends[0]:+.3f}, {ends[1]:+.3f}]",
                }
            )
    for slow, fast, least in (("a", "c", 15), ("b", "c", 2), ("e", "c", 2), ("c", "d", 2)):
        if {slow, fast} <= set(seconds):
            ratio = describe_ratio(seconds[slow], seconds[fast])
            low, high = ratio["interval"]
            what = "the concepts a minute of" if fast == "d" else "faster than"
            verdicts.append(
                {
                    "claim": f"({fast}) at least {least} times {what} ({slow})",
                    "holds": low >= least,
                    "detail": f"{ratio['value']:.1f} [{low:.1f}, {high:.1f}]",
                    "ratio": ratio,
                }
            )
    return verdicts


def table_arms(report: Mapping[str, Any]) -> str:
    """Return the Markdown table, the verdicts and the notes."""
    lines = [
        "| | steps | s a concept | times faster than (a) | GFLOP a step | TFLOP in all | of (a)'s "
        "| likeness | obedience | concepts a minute |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for letter, row in report["arms"].items():
        quality = " | ".join(show(row[name]) for name in ("likeness", "obedience"))
        if letter == "0":
            lines.append(f"| {NAMES[letter]} | 0 | – | – | – | – | – | {quality} | – |")
            continue
        steps = row["steps"]
        ratio = show(row["times_faster_than_a"], ".1f") if "times_faster_than_a" in row else "–"
        share = f"1/{row['flops_ratio']:.1f}" if "flops_ratio" in row else "–"
        lines.append(
            f"| {NAMES[letter]} | {np.mean(steps):.0f} ({min(steps)}–{max(steps)}) | {row['seconds']:.1f} "
            f"| {ratio} | {row['flops_a_step'] / 1e9:.2f} | {row['flops'] / 1e12:.2f} | {share} | {quality} "
            f"| {row['concepts_a_minute']:.2f} ({row['concepts_timed']}) |"
        )
    lines.append("")
    lines += [
        f"- {verdict['claim']}: **{'yes' if verdict['holds'] else 'no'}** ({verdict['detail']})"
        for verdict in report["verdicts"]
    ]
    return "\n".join([*lines, "", *report["notes"]])


def show(cell: Mapping[str, Any], form: str = ".3f") -> str:
    """Return a value and its interval."""
    if cell["interval"] is None:
        return f"{cell['value']:{form}}"
    return f"{cell['value']:{form}} [{cell['interval'][0]:{form}}, {cell['interval'][1]:{form}}]"
