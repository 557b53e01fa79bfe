"""The trained student → t2iprobe/assets/draft_model: its own layers in 8 bits, config, and a few greedy texts
for the test.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from generate import WORK
from measure import read_texts
from prompts import WORDINGS
from safetensors.torch import save
from torch import Tensor

from t2iprobe.llm.engine.student import FOLDER
from t2iprobe.llm.memory.quantization import quantize
from t2iprobe.llm.models import find_language_model
from t2iprobe.storage import write_atomically

GROUP = 192  # divides the rows of every matrix: no padding
TESTS = Path(__file__).parents[2] / "tests" / "llm" / "engine" / "student_texts.json"


def pack(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices as codes, scales and minima of 8-bit groups; vectors as they are."""
    packed = {}
    for name, tensor in weights.items():
        if tensor.dim() < 2:
            packed[name] = tensor.float()
            continue
        quantized = quantize(tensor, 8, GROUP)
        (packed[f"{name}.codes"],) = quantized.planes
        packed[f"{name}.scale"], packed[f"{name}.minimum"] = quantized.scale, quantized.minimum
    return packed


def main() -> None:
    """Write the assets. The card beside them is written by hand."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK)
    given = parser.parse_args()
    state = torch.load(given.work / "student.pt", weights_only=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    files = find_language_model("smollm2")
    config = json.loads((files.folder / "config.json").read_text())
    config |= {"num_hidden_layers": len(state["layers"])}
    write_atomically(FOLDER / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    description = {"steps": str(state["step"]), "copied_layers": json.dumps(state["layers"])}
    write_atomically(FOLDER / "model.safetensors", save(pack(state["student"]), description))
    texts = [text for text in read_texts(given.work / "held_out") if text["greedy"]]
    shown = [next(each for each in texts if each["task"] == task) for task in tuple(WORDINGS)[:4]]
    rows = [
        {"prompt_length": text["prompt_length"], "tokens": text["tokens"].tolist()} | {"task": text["task"]}
        for text in shown
    ]
    TESTS.write_text(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
