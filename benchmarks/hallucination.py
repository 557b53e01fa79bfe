"""How often does the packaged model hallucinate, and do the scorers put a model without knowledge at chance?

    python benchmarks/hallucination.py [--suite hallucination] [--limit 50] [--work DIR] [--json FILE]

The suite's tasks that have data in packages, answered by the model and by one of random weights with the same
tokenizer. Scores with 95 % intervals over documents. Killed, the same command continues.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from t2iprobe.errors import UserError
from t2iprobe.llm.commands import choose_trees, load_engine
from t2iprobe.llm.evaluation import evaluate, plan_suite
from t2iprobe.llm.models import DEFAULT_MODEL, build_folder_once, find_language_model
from t2iprobe.storage import write_atomically

#: What guessing scores, where there is something to guess.
CHANCE = {
    "truthfulqa_mc1": 0.255,  # the mean over its questions of one over the number of choices
    "fever11": 0.5,
    "truefalse_cieacf": 0.5,
    "halueval_qa": 0.5,
    "halueval_dialogue": 0.5,
    "halueval_summarization": 0.5,
    "gloss swap": 0.5,
    "is a kind of": 0.5,
    "caption trap": 0.5,
}


def make_random_model(model: str, work: Path) -> Path:
    """Write a small model of random weights with the tokenizer of another."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    source = find_language_model(model).folder

    def fill(folder: Path) -> None:
        for path in source.iterdir():
            if path.suffix in (".json", ".txt", ".jinja") and not path.name.startswith("model."):
                shutil.copy(path, folder / path.name)
        config = AutoConfig.from_pretrained(source)
        config.hidden_size, config.intermediate_size, config.num_hidden_layers = 64, 128, 2
        config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 16
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)

    work.mkdir(parents=True, exist_ok=True)
    build_folder_once(work / "random_model", fill)
    return work / "random_model"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate both models."""
    planned, left_out = plan_suite(options.suite)
    if options.tasks:
        planned = [each for each in planned if each.name in options.tasks.split(",")]
    models = {"model": options.model, "random weights": str(make_random_model(options.model, options.work))}
    found = {}
    for name, model in models.items():
        with load_engine(model, options.draft if name == "model" else "none") as engine:
            found[name] = evaluate(
                engine,
                planned,
                options.work / f"{options.suite}-{name.replace(' ', '_')}",
                limit=options.limit,
                left_out=left_out,
                trees=choose_trees(engine, "best-first", options.budget, 24, "auto", options.batch),
                batch=options.batch,
                show=lambda done, total, name=name: print(f"{name}: {done} of {total}", file=sys.stderr),
            )
    return found


def tabulate(found: dict[str, Any]) -> list[str]:
    """Return the table as lines of Markdown."""
    lines = [
        "| task | class | metric | documents | model | random weights | guessing | speed | tokens a pass |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for own, other in zip(found["model"]["t2iprobe"], found["random weights"]["t2iprobe"], strict=True):
        chance = CHANCE.get(own["name"])
        cells = (
            *(own[key] for key in ("name", "kind", "metric", "documents")),
            *(show(own), show(other), "–" if chance is None else chance),
            *show_cost(own["cost"]),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for kind in ("factuality", "faithfulness"):
        own, other = (found[name][kind] for name in ("model", "random weights"))
        if own and other:
            lines.append(f"| **{kind}** | | mean of {own['tasks']} | | {show(own)} | {show(other)} | | | |")
    return lines


def show(line: dict[str, Any]) -> str:
    """Return a score with its interval."""
    within = "" if line["interval"] is None else " [{:.3f}, {:.3f}]".format(*line["interval"])
    return f"{line['value']:.3f}{within}"


def show_cost(cost: dict[str, Any]) -> tuple[str, str]:
    """Return tokens a second, scored or written, and for what was written tokens a pass of the model."""
    if cost["written_tokens"]:
        return f"{cost['written_tokens_per_second']:.1f} written", f"{cost['tokens_per_pass']:.2f}"
    return f"{cost['scored_tokens_per_second']:.0f} scored", "–"


def main(words: list[str] | None = None) -> int:
    """Print the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--draft", default="student")
    parser.add_argument("--budget", type=int, help="guesses a tree; by default as many as pay")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--suite", default="hallucination")
    parser.add_argument("--tasks", help="names of the suite's, by commas; all without")
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--work", type=Path, default=Path("runs/hallucination"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(words)
    try:
        found = run(options)
    except UserError as error:
        print(f"hallucination: {error}", file=sys.stderr)
        return 2
    print("\n".join(tabulate(found)))
    if options.json:
        write_atomically(options.json, json.dumps(found, indent=1).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
