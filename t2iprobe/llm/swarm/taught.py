"""What a user has taught to a model that others serve: rows before every text, and adapters between blocks.

Both are the user's own, and used on the user's side: servers see the hidden states that come of them.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2iprobe.errors import UserError
from t2iprobe.llm.swarm.registry import ModelKey
from t2iprobe.storage import explain_full_disk, write_atomically

__all__ = ["Adapters", "SoftPrompt", "Taught", "load_taught", "save_taught"]


class SoftPrompt(nn.Module):
    """Rows [P, hidden] before every text; none are none."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows.clone())


class Adapters(nn.Module):
    """h + B A h before each of the blocks `borders`, arXiv 2106.09685: A is down [rank, hidden], B up.

    B begins at zero, so that nothing is changed at first.
    """

    def __init__(self, hidden: int, rank: int, borders: Sequence[int], dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.borders = tuple(sorted(set(borders)))
        self.down = nn.ParameterList(
            torch.randn(rank, hidden, generator=generator).to(dtype) / math.sqrt(hidden) for _ in self.borders
        )
        self.up = nn.ParameterList(torch.zeros(hidden, rank, dtype=dtype) for _ in self.borders)

    def forward(self, hidden: Tensor, block: int) -> Tensor:
        """Return what enters a block, [B, n, hidden], for what comes to it."""
        if block not in self.borders:
            return hidden
        place = self.borders.index(block)
        return hidden + hidden @ self.down[place].T @ self.up[place].T


@dataclass(frozen=True)
class Taught:
    """A soft prompt [P, hidden], and adapters: None where there are none."""

    prompt: Tensor | None = None
    adapters: Adapters | None = None


def save_taught(
    path: Path, prompt: SoftPrompt, adapters: Adapters | None, key: ModelKey, about: dict[str, Any]
) -> None:
    """Write what was taught as safetensors, with the model that it is for."""
    from safetensors.torch import save

    tensors = {"soft_prompt": prompt.rows}
    for place, border in enumerate(() if adapters is None else adapters.borders):
        assert adapters is not None
        tensors |= {f"down.{border}": adapters.down[place], f"up.{border}": adapters.up[place]}
    metadata = {"model": key.hash, "name": key.name, "about": json.dumps(about)}
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with explain_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(held, metadata))


def load_taught(path: Path, key: ModelKey) -> Taught:
    """Read what `save_taught` wrote. Raises UserError for another file, or one of another model."""
    import safetensors

    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        rows = tensors["soft_prompt"]
    except (OSError, safetensors.SafetensorError, KeyError) as error:
        raise UserError(f"{path} is no soft prompt ({error}): t2iprobe llm swarm tune makes one") from None
    if metadata.get("model") != key.hash:
        raise UserError(f"{path} was taught to {metadata.get('name')!r}, not to {key.name!r}")
    borders = sorted(int(name.removeprefix("up.")) for name in tensors if name.startswith("up."))
    adapters = None
    if borders:
        hidden, rank = tensors[f"up.{borders[0]}"].shape
        adapters = Adapters(hidden, rank, borders, rows.dtype, seed=0).requires_grad_(False)
        for place, border in enumerate(borders):
            adapters.down[place].copy_(tensors[f"down.{border}"])
            adapters.up[place].copy_(tensors[f"up.{border}"])
    return Taught(rows if len(rows) else None, adapters)
