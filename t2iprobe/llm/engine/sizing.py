"""How large a tree pays: how often each child is accepted, and how long passes take on this machine."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from t2iprobe.llm.engine.decoder import Decoder
from t2iprobe.llm.engine.shapes import TreeSize, choose_size
from t2iprobe.llm.engine.tree import DraftTree

__all__ = ["BUDGETS", "DEPTHS", "Acceptance", "MeasuredSizer", "PassTimes", "measure_passes"]

WIDTH = 16
BUDGETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16)
# What is assumed of a draft that nothing is known of: rank by rank, of what the ranks before have left.
_PRIOR = np.array([0.55, 0.3, 0.2, 0.16, 0.13, 0.11, 0.1, 0.09] + [0.08] * (WIDTH - 8))
_WEIGHT = 4.0  # visits that the prior counts for


class Acceptance:
    """How often a node's child of each rank is the accepted one, learned from verified trees.

    A node with few children does not tell whether a further one would have been accepted. So what is counted,
    rank by rank, is how many of the visited nodes that had such a child, and had accepted none before it,
    accepted it (the product-limit estimate, Kaplan & Meier 1958); `vector` multiplies these out.
    """

    def __init__(self, vector: Sequence[float] | None = None, weight: float = _WEIGHT) -> None:
        hazards = _PRIOR if vector is None else _to_hazards(vector)
        self.accepted, self.tried = weight * hazards, np.full(WIDTH, weight)

    def update(self, tree: DraftTree, path: Sequence[int]) -> None:
        """Learn from a tree and its accepted nodes, without the root."""
        for node, accepted in zip([0, *path], [*path, None], strict=True):
            children = min(len(tree.successors[node]), WIDTH)
            if accepted is None:
                self.tried[:children] += 1
                continue
            rank = int(tree.ranks[accepted])
            self.tried[: min(rank + 1, WIDTH)] += 1
            if rank < WIDTH:
                self.accepted[rank] += 1

    def vector(self) -> np.ndarray:
        """Return the estimate [W]; its sum is at most 1."""
        hazards = self.accepted / self.tried
        return hazards * np.cumprod([1.0, *(1 - hazards[:-1])])


def _to_hazards(vector: Sequence[float]) -> np.ndarray:
    """Return the share of what the ranks before have left; ranks that are not told have the last one's."""
    hazards, left = [], 1.0
    for share in vector[:WIDTH]:
        hazards.append(min(1.0, share / left) if left > 1e-9 else 0.0)
        left -= share
    return np.array(hazards + [hazards[-1] if hazards else 0.0] * (WIDTH - len(hazards)))


@dataclass(frozen=True)
class PassTimes:
    """Seconds of a pass, by the tokens in it: of the target as it stands in memory, and of the draft."""

    target: Mapping[int, float]
    draft: Mapping[int, float]

    def shared(self, prompts: int) -> "PassTimes":
        """Return the same by the tokens of each of so many prompts that share every pass."""

        def divide(seconds: Mapping[int, float]) -> dict[int, float]:
            measured = sorted(seconds)
            most = max(1, measured[-1] // prompts)
            sizes = sorted({1, most, *(size for size in measured if size < most)})
            whole = np.multiply(sizes, prompts)
            found = np.interp(whole, measured, [seconds[size] for size in measured])
            return dict(zip(sizes, found.tolist(), strict=True))

        return PassTimes(divide(self.target), divide(self.draft))


class MeasuredSizer:
    """Chooses the tree size with the least predicted seconds a token (Sequoia, section 4.3)."""

    def __init__(
        self, times: PassTimes, budgets: Sequence[int] = BUDGETS, depths: Sequence[int] = DEPTHS
    ) -> None:
        most = max(times.target) - 1
        self.times, self.depths = times, depths
        self.budgets = [budget for budget in budgets if budget <= most]

    def table(self, acceptance: Acceptance) -> tuple[TreeSize, list[TreeSize]]:
        """Return the best size and all."""
        return choose_size(
            self.times.target, self.times.draft, acceptance.vector(), self.budgets, self.depths
        )

    def choose(self, acceptance: Acceptance) -> tuple[int, int]:
        """Return the best budget and depth; 0, 0 where no tree pays."""
        best, _ = self.table(acceptance)
        return best.budget, best.depth


def measure_passes(
    decoder: Decoder,
    sizes: Sequence[int],
    context: int = 128,
    repeats: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, float]:
    """Return the median seconds of a pass over each number of tokens, behind a text of `context` tokens."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> torch.Tensor:
        return torch.randint(decoder.vocabulary, (1, count), generator=generator)

    limit = decoder.context_length
    context = min(context, limit // 2) if limit else context
    cache, _ = decoder.prefill([draw(context)[0]])
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for repeat in range(repeats + 1):  # the first is a warm-up
        for size in sizes:
            mask = torch.ones(1, size, size, dtype=torch.bool).tril()
            positions = (context + torch.arange(size))[None]
            began = clock()
            logits = decoder.forward(draw(size), positions, mask, cache)
            logits[0, -1, 0].item()  # waits for a GPU
            if repeat:
                seconds[size].append(clock() - began)
            cache.keep([[]])
    return {size: statistics.median(found) for size, found in seconds.items()}
