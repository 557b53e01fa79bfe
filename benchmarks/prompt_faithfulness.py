"""Can a small language model tell a true caption from one about a sibling? And what does rewriting gain?

    python benchmarks/prompt_faithfulness.py [--model MODEL] [--synsets 200] [--out DIR] [--json FILE]

For so many of ImageNet's synsets, chosen by a seed, the model writes a caption, rewrites what is rejected,
and each signal then judges pairs: the caption, and the same with the concept's name swapped for a WordNet
sibling's, or for that of any other synset here. Accuracy .5 is chance. The same is asked of plain captions
("A photo of a heron."), which the model did not write itself. Killed, the same command continues the writing.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

from t2iprobe import wordnet
from t2iprobe.errors import UserError
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.llm.commands import load_engine
from t2iprobe.llm.faithfulness import compare_signals, name_synset
from t2iprobe.llm.models import DEFAULT_MODEL
from t2iprobe.llm.prompts import EngineWriter, Writing, summarise_prompts, write_prompts
from t2iprobe.storage import read_lines, write_atomically

SIGNALS = {"gloss_pmi": "gloss PMI", "isa": "is-a", "unsupported": "unsupported objects"}


def choose_synsets(count: int, seed: int) -> list[Any]:
    """Return so many synsets of ImageNet's, classes and above, by a seed."""
    names = sorted(Hierarchy.imagenet().select("all"))
    return [wordnet.synset(name) for name in sorted(random.Random(seed).sample(names, count))]


def plain_caption(synset: Any) -> str:
    """Return the template's caption."""
    name = name_synset(synset)
    return f"A photo of {wordnet.choose_article(name)} {name}."


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Write the captions that are not written yet, and judge them."""
    synsets = choose_synsets(options.synsets, options.seed)
    out = options.out / "prompts.jsonl"
    with load_engine(options.model, options.draft) as engine:

        def judge(name: str, captions: list[Any], swap: str) -> dict[str, Any]:
            file = options.out / f"{name}-{swap}.json"
            if not file.exists():
                found = compare_signals(engine, captions, swap=swap, seed=options.seed)
                write_atomically(file, json.dumps({"captions": name} | found).encode())
                print(f"{name} captions, swapped for a {swap}", file=sys.stderr)
            return json.loads(file.read_text())

        options.out.mkdir(parents=True, exist_ok=True)
        plain = [(synset, plain_caption(synset)) for synset in synsets]
        compared = [judge("plain", plain, swap) for swap in ("sibling", "stranger")]
        writing = Writing(per_synset=1, rounds=options.rounds, seed=options.seed)
        made = write_prompts(
            synsets,
            out,
            EngineWriter(engine, options.batch, budget=options.budget),
            writing,
            model=options.model,
            show=lambda done, total: print(f"{done} of {total}", file=sys.stderr),
        )
        rows = [json.loads(line) for line in read_lines(out)]
        written = [(wordnet.synset(row["synset"]), row["prompt"]) for row in rows if row["written"]]
        compared.append(judge("written", written, "sibling"))
    return {"model": options.model, "synsets": len(synsets), "writing": made, "signals": compared} | {
        "rewriting": summarise_prompts(rows)
    }


def tabulate(found: dict[str, Any]) -> list[str]:
    """Return the tables as lines of Markdown."""
    lines = [
        "| captions | swapped for | pairs | " + " | ".join(SIGNALS.values()) + " |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["signals"]:
        cells = [
            "{:.3f} [{:.3f}, {:.3f}]".format(row[name]["value"], *row[name]["interval"])
            if name in row
            else "–"
            for name in SIGNALS
        ]
        swap = "its sibling" if row["swap"] == "sibling" else "any other"
        lines.append(f"| {row['captions']} | {swap} | {row['pairs']} | " + " | ".join(cells) + " |")
    gain = found["rewriting"]
    first, last = gain["accepted_first"], gain["accepted"]
    lines += [
        "",
        "passed at first {:.3f} [{:.3f}, {:.3f}]".format(first["value"], *first["interval"])
        + ", after rewriting {:.3f} [{:.3f}, {:.3f}]".format(last["value"], *last["interval"])
        + f"; {gain['attempts']} attempts for {gain['prompts']} captions, "
        f"{gain['plain_templates']} plain templates",
    ]
    if isa := gain["isa_gain"]:
        interval = "" if isa["interval"] is None else " [{:+.3f}, {:+.3f}]".format(*isa["interval"])
        lines.append(
            f"is-a, which plays no part in the choice: {isa['value']:+.3f}{interval} nats, p {isa['p']:.3f}"
        )
    return lines


def main(words: list[str] | None = None) -> int:
    """Print the tables. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--draft", default="none")
    parser.add_argument("--budget", type=int, default=16)
    parser.add_argument("--synsets", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/faithfulness"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(words)
    try:
        found = run(options)
    except UserError as error:
        print(f"prompt_faithfulness: {error}", file=sys.stderr)
        return 2
    print("\n".join(tabulate(found)))
    if options.json:
        write_atomically(options.json, json.dumps(found, indent=1).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
