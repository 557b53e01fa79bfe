"""Prompts for all 860 synsets, 4 each, in one command under 300 MB, killed midway and continued.

    python benchmarks/throughput_synsets.py [--work DIR] [--json FILE] [--memory 300MB] [--synsets 860]

The command is `t2iprobe llm generate --prompts … --throughput --memory 300MB`. When half of the texts are
there it gets SIGKILL, and is given once more. Then it is checked that every prompt has its text once, in
order, and that what had been written before is still there, byte for byte.

The memory that the process grows by is its greatest resident memory, as the system counts it, less that of
the same command with a model of next to no weights and the same tokenizer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from language_common import (
    check_identity,
    list_verdicts,
    run_command,
    save_weightless,
    tell,
)

from t2iprobe.errors import UserError
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.llm.commands import parse_bytes
from t2iprobe.llm.models import DEFAULT_MODEL, find_language_model
from t2iprobe.machine import list_versions
from t2iprobe.storage import write_atomically
from t2iprobe.wordnet import synset

KINDS = ("photo", "painting", "drawing", "close-up")
SYSTEM = "You write captions."
FEW = 64  # prompts of the command with next to no weights


def make_rows(synsets: int) -> list[dict[str, Any]]:
    """Return the prompts: for each synset that is no leaf of ImageNet's hierarchy, one of each kind."""
    hierarchy = Hierarchy.imagenet()
    rows = []
    for name in hierarchy.synsets[:synsets]:
        word = synset(name)
        gloss = word.definition().partition(";")[0]
        for kind in KINDS:
            lemma = word.lemma_names()[0].replace("_", " ")
            text = f"Write a caption for a {kind} of: {lemma} ({gloss})."
            rows.append({"synset": name, "kind": kind, "prompt": text})
    return rows


def count_lines(path: Path) -> int:
    """Return how many whole lines a file has."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Write, kill, continue, check."""
    work, rows = options.work, make_rows(options.synsets)
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    check_identity(
        work,
        {
            "model": find_language_model(options.model).hash,
            "prompts": hashlib.sha256(content.encode()).hexdigest(),
            "settings": [options.memory, options.new_tokens, options.temperature],
        },
    )
    prompts, out = work / "prompts.jsonl", work / "texts.jsonl"
    write_atomically(prompts, content.encode())
    words = ["llm", "generate", "--throughput", "--json", "--memory", options.memory, "--system", SYSTEM]
    words += ["--max-new-tokens", str(options.new_tokens), "--temperature", str(options.temperature)]
    words += ["--device", "cpu"]
    for name in ("batch", "block"):
        if getattr(options, name) is not None:
            words += [f"--{name}", str(getattr(options, name))]
    command = [*words, "--prompts", str(prompts), "--out", str(out), "--model", options.model]
    before = work / "before.jsonl"
    if not before.exists():
        enough = round(options.kill_at * len(rows))
        tell(f"{len(rows)} prompts; killed when {enough} texts are there")
        first = run_command(command, until=lambda: count_lines(out) >= enough)
        if not first["killed"]:
            raise UserError(f"it ended before it was killed ({first['status']}): {first['error'][-1000:]}")
        write_atomically(before, out.read_bytes())
        write_atomically(work / "killed.json", json.dumps(first).encode())
    if not (work / "continued.json").exists():
        tell(f"continued behind {count_lines(out)} texts")
        second = run_command(command)
        if second["status"]:
            raise UserError(f"the command failed: {second['error'][-1000:]}")
        write_atomically(work / "continued.json", json.dumps(second).encode())
    runs = [json.loads((work / name).read_text()) for name in ("killed.json", "continued.json")]
    few = work / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in rows[:FEW]))
    small = save_weightless(options.model, work / "weightless")
    (work / "few_texts.jsonl").unlink(missing_ok=True)
    base = run_command(
        [*words, "--prompts", str(few), "--out", str(work / "few_texts.jsonl"), "--model", str(small)]
    )
    if base["status"]:
        raise UserError(f"the command failed: {base['error'][-1000:]}")
    return compare(rows, before.read_bytes(), out.read_bytes(), runs, base, options)


def compare(
    rows: Sequence[dict[str, Any]],
    before: bytes,
    after: bytes,
    runs: Sequence[dict[str, Any]],
    base: dict[str, Any],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Return what came of it, and the verdicts."""
    killed, continued = runs
    whole = before[: before.rfind(b"\n") + 1]
    lines = [json.loads(line) for line in after.splitlines()]
    told = json.loads(continued["output"])
    is_complete = [line["index"] for line in lines] == list(range(len(rows)))
    own = all(
        {key: line.get(key) for key in row} == row and line["token_ids"]
        for row, line in zip(rows, lines, strict=False)
    )
    kept = whole.count(b"\n")
    grown = max(run["peak_bytes"] for run in runs) - base["peak_bytes"]
    tokens = sum(len(line["token_ids"]) for line in lines)
    budget = parse_bytes(options.memory)
    return {
        "prompts": len(rows),
        "tokens": tokens,
        "killed_by": killed["killed"],
        "texts_when_killed": kept,
        "bytes_cut_off": len(before) - len(whole),
        "continued_behind": told["done_before"],
        "seconds": [run["seconds"] for run in runs],
        "tokens_per_second": told["tokens_per_second"],
        "predicted_tokens_per_second": told["predicted_tokens_per_second"],
        "weight_bytes_per_token": told["weight_bytes_per_token"],
        "placement": told["placement"],
        "budget_bytes": budget,
        "ledger_peak_bytes": told["peak_bytes"]["device"],
        "grown_bytes": grown,
        "peak_bytes": {"command": max(r["peak_bytes"] for r in runs), "weightless": base["peak_bytes"]},
        "different_texts": len({line["text"] for line in lines}),
        "verdicts": [
            {
                "claim": "killed midway and continued, every prompt has its text once, in order",
                "holds": bool(killed["killed"]) and is_complete and own and told["done_before"] >= kept,
                "detail": f"{len(lines)} texts of {len(rows)}, {kept} before SIGKILL",
            },
            {
                "claim": "what had been written before the kill is still there, byte for byte",
                "holds": after.startswith(whole),
                "detail": f"{len(whole)} bytes",
            },
            {
                "claim": f"the process grew by less than the budget of {budget / 1e6:.0f} MB",
                "holds": grown <= budget,
                "detail": f"{grown / 1e6:.0f} MB by the system's count, "
                f"{told['peak_bytes']['device'] / 1e6:.0f} by the ledger's",
            },
        ],
        "versions": list_versions(),
    }


def table(report: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    where = report["placement"]
    lines = [
        "| texts | tokens | seconds to the kill, and behind it | tokens a second | predicted | blocks "
        "| MB read a token |",
        "|---|---|---|---|---|---|---|",
        f"| {report['prompts']} | {report['tokens']} "
        f"| {' + '.join(f'{each:.0f}' for each in report['seconds'])} "
        f"| {report['tokens_per_second']:.1f} | {report['predicted_tokens_per_second']:.1f} "
        f"| {where['batches']} × {where['batch']} | {report['weight_bytes_per_token'] / 1e6:.2f} |",
        "",
        *list_verdicts(report["verdicts"]),
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it and print what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/throughput_synsets"))
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--memory", default="300MB")
    parser.add_argument("--synsets", type=int, default=860)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--kill-at", type=float, default=0.5, help="when such a part of the texts is there")
    parser.add_argument("--batch", type=int, help="prompts of a forward, if not what is planned")
    parser.add_argument("--block", type=int, help="batches of a block, if not what is planned")
    parser.add_argument("--temperature", type=float, default=0.7)
    options = parser.parse_args(arguments)
    found = benchmark(options)
    if options.json:
        write_atomically(options.json, json.dumps(found, indent=1, default=float).encode())
    print(table(found))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"throughput_synsets.py: {error}", file=sys.stderr)
        sys.exit(2)
