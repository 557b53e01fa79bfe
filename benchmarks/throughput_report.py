"""What came of benchmarks/throughput.py: rows, verdicts, tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from language_common import judge_least, judge_texts, list_verdicts, show

from t2iprobe.intervals import RESAMPLES, interval

THEIRS = ("accelerate", "accelerate, whole model")
# Bits that the planner may choose for weights and cache; those by hand hold weights in the last.
GRIDS: dict[str, tuple[int | None, ...]] = {"lossless": (None,), "4 bits allowed": (None, 4)}
CHOSEN = "chosen"
LEAST = 5.0  # times accelerate
ERROR = 0.25  # of a prediction
BYTES = 0.05  # of the weights' bytes a token
NEAR = 0.9  # of the best placement by hand


def resample(values: Sequence[float]) -> np.ndarray:
    """Return the median: as measured, then of RESAMPLES resamples."""
    found = np.asarray(values, np.float64)
    drawn = np.random.default_rng(0).integers(len(found), size=(RESAMPLES, len(found)))
    return np.append(np.median(found), np.median(found[drawn], axis=1))


def describe(values: np.ndarray, turns: int) -> dict[str, Any]:
    """Return the first value, with the interval of the others where there were turns enough."""
    return {"value": float(values[0]), "interval": list(interval(values[1:])) if turns > 1 else None}


def compare(kept: Mapping[str, Any], budget: int) -> dict[str, Any]:
    """Return a row for each contestant and each policy, and what the turns say of the texts."""
    names = dict.fromkeys(key.partition("/")[2] for key in kept if "/" in key)
    names.pop("hardware", None)
    turns = {name: [kept[key] for key in sorted(kept) if key.partition("/")[2] == name] for name in names}
    rates = {
        name: resample([each["tokens"] / each["seconds"] for each in found]) for name, found in turns.items()
    }
    rows = {name: describe_row(found, rates[name]) for name, found in turns.items()}
    theirs = [name for name in THEIRS if name in rows]
    if theirs:
        best = max(theirs, key=lambda name: rates[name][0])
        for name, row in rows.items():
            if not is_policy(name):
                row["times_accelerate"] = describe(rates[name] / rates[best], row["turns"])
    policies = {}
    for grid in GRIDS:
        hand = [name for name in rows if name.startswith(f"{grid}: ") and name != f"{grid}: {CHOSEN}"]
        if hand and f"{grid}: {CHOSEN}" in rows:
            best = max(hand, key=lambda name: rates[name][0])
            ratio = rates[f"{grid}: {CHOSEN}"] / rates[best]
            policies[grid] = {"best": best, "of_the_best": describe(ratio, rows[best]["turns"])}
    return {
        "budget_bytes": budget,
        "turns": max((row["turns"] for row in rows.values()), default=0),
        "rows": rows,
        "policies": policies,
        "placements": {
            **kept.get("sizes", {}).get("placements", {}),
            **{f"{grid}: {CHOSEN}": found["chosen"] for grid, found in kept.get("policies", {}).items()},
        },
        "memory": kept.get("memory", {}),
        "differences": [each for found in turns.values() for turn in found for each in turn["differs"] or []],
        "texts_compared": sum(len(turn["differs"] or []) for found in turns.values() for turn in found),
    }


def describe_row(found: Sequence[Mapping[str, Any]], rate: np.ndarray) -> dict[str, Any]:
    """Return what the turns of one contestant say."""
    first = found[0]
    row = {
        "turns": len(found),
        "texts": first["texts"],
        "tokens_per_second": describe(rate, len(found)),
        "prompt_seconds": float(np.median([each["prompt_seconds"] for each in found])),
        "seconds": float(np.median([each["seconds"] for each in found])),
        "weight_bytes_per_token": first["bytes"] / first["tokens"],
        "limit": float(np.median([each["limit"] for each in found])),
        "bound_by": first["bound_by"],
    }
    if "predicted" in first:
        row["predicted"] = float(np.median([each["predicted"] for each in found]))
        row["error"] = row["predicted"] / float(rate[0]) - 1
        row["bytes_per_token_of_a_block"] = first["streamed_bytes"] / first["texts"]
        row["peak_bytes"] = max(each["peak_bytes"] for each in found)
    return row


def is_policy(name: str) -> bool:
    """Whether a row belongs to the comparison of policies."""
    return name.partition(": ")[0] in GRIDS


def judge(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the verdicts that the rows allow."""
    rows, budget = found["rows"], found["budget_bytes"]
    verdicts = []
    if found["texts_compared"]:
        verdicts.append(judge_texts(found["differences"], "all lossless texts are the model's own"))
    blocks = {name: row for name, row in rows.items() if "predicted" in row}
    ours = [name for name in blocks if not is_policy(name) and "times_accelerate" in blocks[name]]
    for with_bits in (False, True):
        of_kind = [name for name in ours if ("bits" in name) == with_bits]
        if of_kind:
            largest = max(of_kind, key=lambda name: blocks[name]["texts"])
            claim = f"{largest}: at least {LEAST:g} times the faster accelerate"
            verdicts.append(judge_least(claim, blocks[largest]["times_accelerate"], LEAST, " times"))
    if blocks:
        off = {
            name: row["weight_bytes_per_token"] / row["bytes_per_token_of_a_block"] - 1
            for name, row in blocks.items()
            if row["bytes_per_token_of_a_block"]
        }
        worst = max(off, key=lambda name: abs(off[name]), default=None)
        detail = "nothing streams" if worst is None else f"off by {off[worst]:+.1%} at most: {worst}"
        holds = all(abs(each) <= BYTES for each in off.values())
        claim = f"weight bytes a token within {BYTES:.0%} of W / block"
        verdicts.append({"claim": claim, "holds": holds, "detail": detail})
        errors = {name: row["error"] for name, row in blocks.items()}
        worst = max(errors, key=lambda name: abs(errors[name]))
        median = float(np.median([abs(each) for each in errors.values()]))
        verdicts.append(
            {
                "claim": f"predicted tokens a second within {ERROR:.0%} of those measured",
                "holds": abs(errors[worst]) <= ERROR,
                "detail": f"{len(errors)} blocks, off by {median:.0%} in the median, "
                f"{errors[worst]:+.0%} at most: {worst}",
            }
        )
        peak = max(row["peak_bytes"] for row in blocks.values())
        verdicts.append(
            {
                "claim": f"no block takes more than the budget of {budget / 1e6:.0f} MB",
                "holds": peak <= budget,
                "detail": f"{peak / 1e6:.1f} MB at most by the ledger",
            }
        )
    for grid, policy in found["policies"].items():
        claim = f"{grid}: the chosen placement at least {NEAR:g} times as fast as the best by hand, measured"
        verdicts.append(judge_least(claim, policy["of_the_best"], NEAR, f" times {policy['best']}"))
    for name, memory in found["memory"].items():
        verdicts.append(
            {
                "claim": f"the command's process grows by less than the budget, {name}",
                "holds": memory["grown_bytes"] <= budget,
                "detail": f"{memory['grown_bytes'] / 1e6:.0f} MB by the system's count, "
                f"{memory['ledger_bytes'] / 1e6:.0f} by the ledger's, of {budget / 1e6:.0f}",
            }
        )
    return verdicts


def table(report: Mapping[str, Any]) -> str:
    """Return the Markdown tables, the verdicts and the notes."""
    lines = [
        "| contestant | texts at once | tokens a second | limit | bound by | MB of weights a token "
        "| W / block | times accelerate | predicted | error | prompts s | MB in memory |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for is_other in (False, True):
        for name, row in report["rows"].items():
            if is_policy(name) == is_other:
                lines.append(_show_row(name, row))
    if report["placements"]:
        lines += [
            "",
            "| placement | weights in memory | cache | hidden states | bits of weights, cache |",
            "|---|---|---|---|---|",
        ]
    for name, told in report["placements"].items():
        shares = " | ".join(f"{told[part]['device']:.0%}" for part in ("weights", "cache", "hidden"))
        bits = ", ".join(str(told[part] or "all") for part in ("weight_bits", "cache_bits"))
        lines.append(f"| {name}, {told['batches']} × {told['batch']} | {shares} | {bits} |")
    return "\n".join([*lines, "", *list_verdicts(report["verdicts"]), "", *report["notes"]])


def _show_row(name: str, row: Mapping[str, Any]) -> str:
    cells = [name, str(row["texts"]), show(row["tokens_per_second"], ".1f"), f"{row['limit']:.1f}"]
    cells += [row["bound_by"], f"{row['weight_bytes_per_token'] / 1e6:.2f}"]
    faster = show(row["times_accelerate"]) if "times_accelerate" in row else "–"
    if "predicted" in row:
        cells += [f"{row['bytes_per_token_of_a_block'] / 1e6:.2f}", faster, f"{row['predicted']:.1f}"]
        cells += [f"{row['error']:+.0%}", f"{row['prompt_seconds']:.1f}", f"{row['peak_bytes'] / 1e6:.0f}"]
    else:
        cells += ["–", faster, "–", "–", f"{row['prompt_seconds']:.1f}", "–"]
    return f"| {' | '.join(cells)} |"
