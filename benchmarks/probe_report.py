"""What came of benchmarks/probe.py: rates, parts, verdicts, tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from language_common import judge_least, list_verdicts, show
from throughput_report import describe, resample

LEAST_ON_CPU, LEAST_ON_GPU = 6.0, 2.0  # times the stock loop
LEAST_OF_PEAK = 0.55  # on a GPU
LEAST_METRICS = 100.0  # times the published code
ERROR = 0.2  # of a prediction
PROTOCOL = (860 * 32, 50)  # pictures and steps of the published protocol
AGREE = 0.98  # of the two judges' logits on the same pictures, at least


def compare(kept: Mapping[str, Any]) -> dict[str, Any]:
    """Return rates by pictures a synset, parts, metrics and predictions, as far as they were measured."""
    found: dict[str, Any] = {"rates": {}}
    turns: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for key in sorted(kept):
        kind, _, rest = key.partition("/")
        if kind == "pictures":
            samples, _, name = rest.split("/")
            turns.setdefault(samples, {}).setdefault(name, []).append(kept[key])
    for samples, by_name in turns.items():
        rates = {
            name: np.asarray([each["pictures"] / each["seconds"] for each in rows])
            for name, rows in by_name.items()
        }
        row: dict[str, Any] = {
            name: describe(resample(list(values)), len(values)) for name, values in rates.items()
        }
        last = by_name["ours"][-1]
        for name in rates.keys() - {"stock"}:  # in turns: what slows the machine down slows all
            row[f"{name}_times"] = describe(resample(list(rates[name] / rates["stock"])), len(rates[name]))
        row |= {
            "pictures": last["pictures"],
            "batch": last["batch"],
            "lanes": last["lanes"],
            "judges_agree": min(each["judges_agree"] for each in by_name["stock"]),
        }
        found["rates"][samples] = row
    if "parts" in kept:
        found["parts"] = dict(kept["parts"])
        if found["rates"]:
            first = max(found["rates"], key=int)
            work = sum(kept["parts"]["gflop"].values())
            for name in found["rates"][first].keys() & {"stock", "ours", "compiled"}:
                rate, peak = found["rates"][first][name], kept["parts"]["peak_gflops"]
                ends = rate["interval"]
                found["parts"][f"{name}_of_peak"] = {
                    "value": rate["value"] * work / peak,
                    "interval": None if ends is None else [end * work / peak for end in ends],
                }
    if "metrics" in kept:
        theirs = sum(kept["metrics"]["theirs"].values())
        times = resample([theirs / seconds for seconds in kept["metrics"]["ours"]])
        found["metrics"] = {**kept["metrics"], "times": describe(times, len(kept["metrics"]["ours"]))}
    found["predictions"] = [kept[key] for key in sorted(kept) if key.startswith("prediction/")]
    return found


def judge(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the verdicts that the figures allow."""
    verdicts = []
    on_gpu = found["setting"]["on_gpu"]
    least = LEAST_ON_GPU if on_gpu else LEAST_ON_CPU
    for samples, row in found["rates"].items():
        claim = f"at least {least:g} times the stock loop, {samples} pictures a synset"
        for name, how in (("ours", ""), ("compiled", ", compiled")):
            if name in row:
                verdicts.append(judge_least(claim + how, row[f"{name}_times"], least, " times"))
    if found["rates"]:
        least_agreement = min(row["judges_agree"] for row in found["rates"].values())
        verdicts.append(
            {
                "claim": "both judges say the same of the same pictures",
                "holds": least_agreement >= AGREE,
                "detail": f"logits correlate by {least_agreement:.4f} at least",
            }
        )
    if "parts" in found and "ours_of_peak" in found["parts"]:
        share = found["parts"]["ours_of_peak"]
        if on_gpu:
            claim = f"at least {LEAST_OF_PEAK:.0%} of the matrix peak measured in the same run"
            verdicts.append(judge_least(claim, share, LEAST_OF_PEAK, " of it"))
    if "metrics" in found:
        claim = f"metrics from logits at least {LEAST_METRICS:g} times as fast as the published way"
        metrics = found["metrics"]
        verdicts.append(judge_least(claim, metrics["times"], LEAST_METRICS, " times"))
        verdicts.append(
            {
                "claim": "and the same values",
                "holds": metrics["off"] < 1e-4,
                "detail": f"off by {metrics['off']:.1e} at most: the published way computes in float32",
            }
        )
    if found["predictions"]:
        errors = [each["predicted"] / each["seconds"] - 1 for each in found["predictions"]]
        verdicts.append(
            {
                "claim": f"--dry-run within {ERROR:.0%} of the run",
                "holds": max(map(abs, errors)) <= ERROR,
                "detail": ", ".join(
                    f"{each['predicted']:.0f} s predicted, {each['seconds']:.0f} s taken"
                    for each in found["predictions"]
                ),
            }
        )
    return verdicts


def table(found: Mapping[str, Any]) -> str:
    """Return the Markdown tables, the verdicts and the notes."""
    setting = found["setting"]
    lines = [
        "| pictures a synset | stock, pictures a second | ours | times | compiled | times | at once |",
        "|---|---|---|---|---|---|---|",
    ]
    for samples, row in found["rates"].items():
        cells = [samples, show(row["stock"], ".1f")]
        for name in ("ours", "compiled"):
            cells += [show(row[name], ".1f"), show(row[f"{name}_times"])] if name in row else ["–", "–"]
        lines.append(f"| {' | '.join(cells)} | {row['lanes']} × {row['batch']} |")
    if "parts" in found:
        lines += ["", *_list_parts(found["parts"])]
    if "metrics" in found:
        metrics = found["metrics"]
        theirs = ", ".join(f"{name} {seconds:.1f}" for name, seconds in metrics["theirs"].items())
        lines += [
            "",
            f"All metrics of {metrics['synsets']} synsets, {metrics['samples']} pictures each: "
            f"{1000 * float(np.median(metrics['ours'])):.0f} ms; the published way {theirs} seconds: "
            f"{show(metrics['times'], '.0f')} times.",
        ]
    lines += ["", *list_verdicts(found["verdicts"]), "", *_list_notes(found, setting)]
    return "\n".join(lines)


def _list_parts(parts: Mapping[str, Any]) -> list[str]:
    milliseconds, work = parts["milliseconds"], parts["gflop"]
    whole = sum(milliseconds.values())
    lines = ["| a picture's | ms of a lane | share | GFLOP | GFLOP/s |", "|---|---|---|---|---|"]
    for name, value in milliseconds.items():
        cells = [name, f"{value:.2f}", f"{value / whole:.0%}"]
        cells += [f"{work[name]:.2f}", f"{1000 * work[name] / value:.0f}"] if name in work else ["–", "–"]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(f"| all | {whole:.2f} | 100% | {sum(work.values()):.2f} | – |")
    return lines


def _list_notes(found: Mapping[str, Any], setting: Mapping[str, Any]) -> list[str]:
    notes = [
        f"{setting['model']} on {setting['device']}, {setting['threads']} threads: {setting['scheduler']}, "
        f"{setting['steps']} steps, guidance {setting['guidance']}; ours {setting['dtype']}, stock "
        f"{setting['stock_dtype']}. {setting['pictures']} pictures a turn, {setting['turns']} turns, medians "
        "with 95 % intervals over turns; prompts are encoded anew in each."
    ]
    if "parts" in found:
        parts = found["parts"]
        work = sum(parts["gflop"].values())
        text = f"Matrix peak in {setting['dtype']}: {parts['peak_gflops']:.0f} GFLOP/s."
        if "ours_of_peak" in parts:
            shares = [
                f"{name} takes {show(parts[f'{name}_of_peak'])}"
                for name in ("ours", "compiled", "stock")
                if f"{name}_of_peak" in parts
            ]
            text += (
                f" Of it {', '.join(shares)}: a picture is {work:.2f} GFLOP, so that no {setting['dtype']} "
                f"run draws more than {parts['peak_gflops'] / work:.0f} a second."
            )
        notes.append(text)
        if setting["on_gpu"] and found["rates"]:
            pictures, steps = PROTOCOL
            rate = found["rates"][max(found["rates"], key=int)]["ours"]["value"]
            hours = pictures / rate * steps / setting["steps"] / 3600
            notes.append(
                f"The published protocol ({pictures} pictures of {steps} steps) would take {hours:.1f} h."
            )
    return notes
