"""Is the engine in lm-evaluation-harness the harness's own Hugging Face model? The same items through both.

    python benchmarks/harness_parity.py [--model MODEL] [--items 200] [--texts 24] [--json FILE]

Log-likelihoods of `--items` continuations of the suite's WordNet tasks (gloss swap, and is-a with eight
demonstrations), and greedy texts of the caption task: the largest difference, whether each is the same text,
whether accuracies are identical, and the seconds that both took. Single precision, one thread or more as the
machine has it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from t2iprobe.errors import UserError
from t2iprobe.llm.commands import load_engine
from t2iprobe.llm.engine.generation import Trees
from t2iprobe.llm.evaluation import TASKS, be_quiet
from t2iprobe.llm.models import DEFAULT_MODEL, find_language_model
from t2iprobe.storage import write_atomically

SCORED = ("t2iprobe_wn_swap", "t2iprobe_wn_isa")
WRITTEN = "t2iprobe_wn_supported"
SAME = 1e-3  # nats


def evaluate(model: Any, task: str, limit: int) -> tuple[dict[str, Any], float]:
    """Return a task's results with its samples, and the seconds."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    began = time.perf_counter()
    with be_quiet():
        found = simple_evaluate(
            model=model,
            tasks=[task],
            limit=limit,
            task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
        )
    return found, time.perf_counter() - began


def compare(ours: dict[str, Any], theirs: dict[str, Any], task: str) -> dict[str, Any]:
    """Return how the answers of both models to the same documents differ."""
    pairs = [
        (own[0], other[0])
        for one, two in zip(ours["samples"][task], theirs["samples"][task], strict=True)
        for own, other in zip(one["resps"], two["resps"], strict=True)
    ]
    metrics = [
        {key: value for key, value in found["results"][task].items() if isinstance(value, float)}
        for found in (ours, theirs)
    ]
    row: dict[str, Any] = {"task": task, "items": len(pairs), "same_metrics": metrics[0] == metrics[1]}
    if isinstance(pairs[0][0], str):
        return row | {"same_texts": sum(own == other for own, other in pairs)}
    differences = [abs(float(own[0]) - float(other[0])) for own, other in pairs]
    return row | {
        "largest_difference": max(differences),
        "same_greedy": sum(own[1] == other[1] for own, other in pairs),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Ask both models."""
    from lm_eval.models.huggingface import HFLM

    from t2iprobe.llm.harness import EngineLM

    folder = str(find_language_model(options.model).folder)
    plain = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=options.batch)
    rows = []
    # Four requests a document of the swap, two of is-a.
    plan = [(SCORED[0], options.items // 8), (SCORED[1], options.items // 4), (WRITTEN, options.texts)]
    theirs = {task: evaluate(plain, task, limit) for task, limit in plan}
    del plain
    with load_engine(options.model, options.draft) as engine:
        for task, limit in plan:
            model = EngineLM(engine, Trees("best-first", options.budget), options.batch)
            found, seconds = evaluate(model, task, limit)
            cost = {"seconds": seconds, "their_seconds": theirs[task][1], "cost": model.cost.describe()}
            rows.append(compare(found, theirs[task][0], task) | cost)
    return {"model": options.model, "rows": rows}


def main(words: list[str] | None = None) -> int:
    """Print the table. Returns 1 where the models differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--draft", default="student")
    parser.add_argument("--budget", type=int, default=16)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(words)
    try:
        found = run(options)
    except UserError as error:
        print(f"harness_parity: {error}", file=sys.stderr)
        return 2
    equal = True
    for row in found["rows"]:
        if "same_texts" in row:
            same = row["same_texts"] == row["items"]
            told = f"{row['same_texts']} of {row['items']} texts the same, token for token"
        else:
            same = row["largest_difference"] < SAME and row["same_metrics"]
            metrics = "identical" if row["same_metrics"] else "DIFFER"
            told = (
                f"{row['items']} log-likelihoods, largest difference {row['largest_difference']:.2e}; "
                f"greedy alike in {row['same_greedy']}; metrics {metrics}"
            )
        equal = equal and same
        print(f"{row['task']}: {told}; {row['seconds']:.1f} s, theirs {row['their_seconds']:.1f} s")
    if options.json:
        write_atomically(options.json, json.dumps(found, indent=1, default=str).encode())
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
