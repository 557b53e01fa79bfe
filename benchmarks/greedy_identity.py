"""Is greedy text with draft trees the target's own, token for token? Every growth × draft × memory mode.

    python benchmarks/greedy_identity.py [--work DIR] [--json FILE] [--drafts student,lookup,…]

Transformers' plain greedy decoding writes 64 tokens after each of 55 prompts; then the engine does, in
batches, with each kind of tree and draft, the weights in RAM, half of the layers streamed from disk and read
ahead, or all of them streamed without. A text may leave the plain one only where the two best logits are less
than 1e-3 apart: there the order of a sum decides. Killed, the same command continues.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from language_common import (
    PROMPTS,
    TIE,
    Kept,
    Text,
    check_identity,
    choose_rows,
    compare_texts,
    identify_draft,
    judge_texts,
    list_verdicts,
    tell,
    write_texts_plainly,
)

from t2iprobe.errors import UserError
from t2iprobe.llm.commands import Engine, known_acceptance, load_engine, make_draft, pack_model
from t2iprobe.llm.engine.drafts import Draft
from t2iprobe.llm.engine.generation import Trees, generate
from t2iprobe.llm.memory.packing import read_rest
from t2iprobe.llm.memory.sources import DiskSource, padded
from t2iprobe.llm.models import DEFAULT_MODEL, LanguageModelFiles
from t2iprobe.machine import list_versions
from t2iprobe.storage import hash_files, write_atomically

GROWTHS = ("best-first", "optimal", "chain")
DRAFTS = ("student", "early-exit:8", "lookup", "copy:4")
# Share of the layers that stays, and whether the others are read ahead.
MEMORY: dict[str, tuple[float, bool] | None] = {
    "in RAM": None,
    "half streamed": (0.5, True),
    "all streamed": (0.0, False),
}


def load_mode(options: argparse.Namespace, files: LanguageModelFiles, mode: str) -> Engine:
    """Return the target in memory as `mode` says, without a draft."""
    chosen = MEMORY[mode]
    if chosen is None:
        return load_engine(options.model, "none", dtype=options.dtype)
    share, prefetch = chosen
    packed = pack_model(files, options.dtype)
    source = DiskSource(packed)
    layer = padded(max(map(source.nbytes, range(source.layers))))
    fixed = sum(tensor.nbytes for tensor in read_rest(packed).values())
    memory = fixed + (int(share * source.layers) + (2 if prefetch else 1)) * layer
    return load_engine(options.model, "none", memory=memory, dtype=options.dtype, prefetch=prefetch)


def compare_cell(
    engine: Engine, name: str, draft: Draft | None, growth: str, texts: Sequence[Text], options: Any
) -> list[dict[str, Any]]:
    """Write all texts with one growth and draft; return for each how it differs, tokens and passes."""
    trees, found = Trees(growth, options.budget, acceptance=known_acceptance(name)), []
    for start in range(0, len(texts), options.batch):
        part = texts[start : start + options.batch]
        made = generate(
            engine.target,
            draft,
            [text.begin for text in part],
            trees=trees,
            max_new_tokens=options.tokens,
            eos_token_ids=engine.eos_token_ids,
        )
        found += [
            {
                "differs": compare_texts(text, each.token_ids),
                "tokens": len(each.token_ids),
                "target_passes": each.target_passes,
            }
            for text, each in zip(part, made, strict=True)
        ]
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Write what is not written yet, and compare."""
    cells = Kept(options.work / "cells.json")
    for mode in MEMORY:
        missing = [(d, g) for d in options.drafts for g in GROWTHS if f"{mode}/{d}/{g}" not in cells]
        if not missing:
            continue
        with load_engine(options.model, "none", dtype=options.dtype) as plain:
            identity = {
                "model": plain.files.hash,
                "drafts": {name: identify_draft(name) for name in options.drafts},
                "prompts": hash_files({"prompts": options.prompts}),
                "settings": [options.per_task, options.tokens, options.budget, options.dtype],
            }
            check_identity(options.work, identity)
            rows = choose_rows(options.prompts, options.per_task)
            kept = Kept(options.work / "texts.json")
            texts = write_texts_plainly(plain, rows, options.tokens, sorted(plain.eos_token_ids), kept)
            files = plain.files
        with load_mode(options, files, mode) as engine:
            for name in options.drafts:
                draft = None
                for growth in (g for d, g in missing if d == name):
                    tell(f"{mode}, {name}, {growth}")
                    draft = draft or make_draft(name, engine)
                    cells.put(
                        f"{mode}/{name}/{growth}", compare_cell(engine, name, draft, growth, texts, options)
                    )
    return report(cells, options)


def report(cells: Mapping[str, Sequence[Mapping[str, Any]]], options: argparse.Namespace) -> dict[str, Any]:
    """Return the cells' counts and the verdict on all of them."""
    rows = [
        {
            "cell": name,
            "texts": len(found),
            "equal": sum(each["differs"] is None for each in found),
            "tokens_per_pass": sum(e["tokens"] for e in found) / sum(e["target_passes"] for e in found),
        }
        for name, found in cells.items()
    ]
    every = [each["differs"] for found in cells.values() for each in found]
    claim = f"greedy text of {len(rows)} kinds of trees, drafts and memory is the target's own"
    return {
        "rows": rows,
        "verdicts": [judge_texts(every, claim)],
        "versions": list_versions(),
        "notes": [
            f"Target {options.model}, {options.dtype}, {torch.get_num_threads()} threads; trees of "
            f"{options.budget}, batches of {options.batch}, {options.tokens} tokens a text at most. "
            f"A tie: the two best logits less than {TIE:g} apart."
        ],
    }


def table(found: Mapping[str, Any]) -> str:
    """Return the Markdown table, the verdict and the note."""
    lines = ["| memory | draft | tree | texts | equal | tokens a pass |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {' | '.join(row['cell'].split('/'))} | {row['texts']} | {row['equal']} "
        f"| {row['tokens_per_pass']:.2f} |"
        for row in found["rows"]
    ]
    return "\n".join([*lines, "", *list_verdicts(found["verdicts"]), "", *found["notes"]])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/greedy_identity"))
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--drafts", default=",".join(DRAFTS))
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="JSONL")
    parser.add_argument("--per-task", type=int, default=5, help="prompts of each task")
    parser.add_argument("--tokens", type=int, default=64, help="of a text at most")
    parser.add_argument("--budget", type=int, default=8, help="guesses in a tree")
    parser.add_argument("--batch", type=int, default=55, help="prompts that share a pass")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args(arguments)
    options.drafts = options.drafts.split(",")
    found = run(options)
    if options.json:
        write_atomically(options.json, json.dumps(found, indent=1).encode())
    print(table(found))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"greedy_identity.py: {error}", file=sys.stderr)
        sys.exit(2)
