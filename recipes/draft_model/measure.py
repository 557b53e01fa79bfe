"""How often the student's guesses are what the target writes: the acceptance vector, overall and by task.

Entry b of the vector is the share of positions of greedy, held-out texts whose token is the student's guess
of rank b.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from generate import WORK
from prompts import PROMPT_WRITING, WORDINGS
from torch import Tensor, nn

from t2iprobe.llm.engine.shapes import chain_shape, expected_tokens, optimal_shape
from t2iprobe.storage import write_atomically

WIDTH = 8


def read_texts(folder: Path) -> list[dict]:
    """All texts below `folder` in the files' order: task, prompt_length, tokens, greedy, and of every written
    token guesses and log_probs.
    """
    texts = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as file:
            made = {name: file[name] for name in file.files}
        ends = np.cumsum(made["prompt_lengths"] + made["lengths"])[:-1]
        cuts = np.cumsum(made["lengths"])[:-1]
        rows = zip(
            made["tasks"],
            made["prompt_lengths"],
            np.split(made["tokens"], ends),
            np.split(made["guesses"], cuts),
            np.split(made["log_probs"], cuts),
            strict=True,
        )
        for index, (task, prompt_length, tokens, guesses, log_probs) in enumerate(rows):
            texts.append(
                {
                    "task": tuple(WORDINGS)[task],
                    "prompt_length": int(prompt_length),
                    "tokens": tokens,
                    "greedy": index < len(made["tasks"]) // 2,
                    "guesses": guesses,
                    "log_probs": log_probs,
                }
            )
    return texts


@torch.inference_mode()
def ranks(student: nn.Module, tokens: Tensor, prompt_length: int) -> Tensor:
    """At which rank (0: first) the student guessed each token after the prompt of tokens [T]."""
    hidden = student.model(tokens[None, :-1], use_cache=False).last_hidden_state[0, prompt_length - 1 :]
    logits = student.lm_head(hidden)
    return (logits > logits.gather(1, tokens[prompt_length:, None])).sum(1)


def acceptance(student: nn.Module, texts: list[dict]) -> dict[str, np.ndarray]:
    """Acceptance vectors [WIDTH] over the greedy ones of `texts`: ``all``, ``prompt writing``, each task."""
    found = defaultdict(list)
    for text in texts:
        if text["greedy"]:
            rank = ranks(student, torch.from_numpy(text["tokens"].astype(np.int64)), text["prompt_length"])
            writes = ["prompt writing"] if text["task"] in PROMPT_WRITING else []
            for name in ("all", *writes, text["task"]):
                found[name].append(rank)
    return {
        name: torch.cat(parts).bincount(minlength=WIDTH)[:WIDTH].numpy() / sum(map(len, parts))
        for name, parts in found.items()
    }


def tokens_per_pass(vector: np.ndarray, budget: int = 64) -> tuple[float, float]:
    """What the best tree and the chain of `budget` guesses are expected to yield for an acceptance vector."""
    shape = optimal_shape(vector, budget + 1, 24)
    return expected_tokens(shape, vector), expected_tokens(chain_shape(budget), vector)


def main() -> None:
    """Print the acceptance of the shipped student as a Markdown table, and write it into its config.json."""
    from t2iprobe.llm.engine.student import FOLDER, load_student
    from t2iprobe.llm.models import find_language_model, load_language_model

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK)
    given = parser.parse_args()
    student = load_student(load_language_model(find_language_model("smollm2")))
    print(
        "| text | "
        + " | ".join(f"p{rank + 1}" for rank in range(WIDTH))
        + " | sum | tree of 64 | chain of 64 |"
    )
    print("|---|" + "---|" * (WIDTH + 3))
    found = acceptance(student, read_texts(given.work / "held_out"))
    for name, vector in found.items():
        tree, chain = tokens_per_pass(vector)
        cells = [*(f"{p:.3f}" for p in vector), f"{vector.sum():.3f}", f"{tree:.2f}", f"{chain:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |")
    # Where the estimate of the engine begins.
    config = json.loads((FOLDER / "config.json").read_text())
    config["acceptance"] = [round(share, 3) for share in found["prompt writing"].tolist()]
    write_atomically(FOLDER / "config.json", (json.dumps(config, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
