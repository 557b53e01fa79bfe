"""The best shape of a draft tree, computed from how often each child is accepted (Sequoia, arXiv 2402.12374).

The acceptance vector [W] holds, for the children of an accepted node by rank, how often each is the one that
is accepted; its sum is at most 1. A pass of the target yields on average, in tokens, the sum over the tree's
nodes of the product of acceptance[rank] along the path. The root counts 1: the token that the target adds
itself.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class TreeShape:
    """A tree without tokens: `parents` (the root's: -1), `ranks` and `depths`, int64 [n], level by level."""

    parents: np.ndarray
    ranks: np.ndarray
    depths: np.ndarray

    def __len__(self) -> int:
        return len(self.parents)


def chain_shape(length: int) -> TreeShape:
    """Return the shape of `length` guesses one after the other, below the root."""
    nodes = np.arange(length + 1)
    return TreeShape(parents=nodes - 1, ranks=np.zeros_like(nodes), depths=nodes)


def expected_tokens(shape: TreeShape, acceptance: Sequence[float] | np.ndarray) -> float:
    """Return the tokens that a pass of the target yields on average. Ranks from W on are never accepted."""
    chances = np.append(_check(acceptance), 0.0)
    reached = np.ones(len(shape))
    for node in range(1, len(shape)):
        rank = min(shape.ranks[node], len(chances) - 1)
        reached[node] = reached[shape.parents[node]] * chances[rank]
    return float(reached.sum())


def optimal_shape(acceptance: Sequence[float] | np.ndarray, nodes: int, depth: int) -> TreeShape:
    """Return the tree with the most expected tokens (Sequoia, section 4.1).

    It has at most `nodes` nodes with the root, and `depth` levels below it.
    """
    return _build(_plan(acceptance, nodes, depth)[1], nodes, depth)


def best_expected_tokens(acceptance: Sequence[float] | np.ndarray, nodes: int, depth: int) -> np.ndarray:
    """Return what the best trees yield on average: [depth + 1, nodes + 1], in tokens a pass of the target."""
    return _plan(acceptance, nodes, depth)[0]


def _check(acceptance: Sequence[float] | np.ndarray) -> np.ndarray:
    chances = np.asarray(acceptance, dtype=np.float64)
    if chances.ndim != 1 or not (chances >= 0).all() or not chances.sum() <= 1 + 1e-6:
        raise ValueError(f"an acceptance vector holds shares that sum to at most 1, not {chances.tolist()}")
    return chances


def _plan(acceptance: Sequence[float] | np.ndarray, nodes: int, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Fill the tables of the dynamic programme.

    best[d, m] is what a tree of at most m nodes and d levels yields. choice[d, r, s] is how many of the s
    nodes that are left for the children from rank r on go to the child of rank r; 0: there is no such child,
    nor any of a higher rank.
    """
    chances = _check(acceptance)[: nodes - 1]
    best = np.zeros((depth + 1, nodes + 1))
    best[:, 1:] = 1.0
    choice = np.zeros((depth + 1, len(chances) + 1, nodes), dtype=np.int64)
    left = np.arange(nodes)[:, None] - np.arange(nodes)  # [s, y]: y of s go to the child of this rank
    for level in range(1, depth + 1):
        rest = np.zeros(nodes)  # what the children from the next rank on add, by the nodes left for them
        for rank in range(len(chances) - 1, -1, -1):
            values = np.where(left >= 0, chances[rank] * best[level - 1, :nodes] + rest[left], -np.inf)
            values[:, 0] = 0.0
            choice[level, rank] = values.argmax(1)
            rest = values.max(1)
        best[level, 1:] = 1.0 + rest
    return best, choice


def _build(choice: np.ndarray, nodes: int, depth: int) -> TreeShape:
    parents, ranks, depths, sizes = [-1], [0], [0], [nodes]
    node = 0
    while node < len(parents):
        left, level = sizes[node] - 1, depth - depths[node]
        for rank, size in enumerate(_split(choice[level], left)):
            parents.append(node)
            ranks.append(rank)
            depths.append(depths[node] + 1)
            sizes.append(size)
        node += 1
    return TreeShape(np.array(parents), np.array(ranks), np.array(depths))


def _split(choice: np.ndarray, nodes: int) -> Iterable[int]:
    """Yield how many of the nodes below a node go to each of its children, by rank."""
    for of_rank in choice:
        size = int(of_rank[nodes])
        if size == 0:
            return
        yield size
        nodes -= size


@dataclass(frozen=True)
class TreeSize:
    """A row of the table that `choose_size` makes. A round is a draft tree and a pass of the target."""

    budget: int  # guesses, without the root
    depth: int
    expected_tokens: float  # a round
    draft_seconds: float  # a round
    target_seconds: float  # a round

    @property
    def token_seconds(self) -> float:
        """Seconds a token."""
        return (self.draft_seconds + self.target_seconds) / self.expected_tokens


def choose_size(
    target_seconds: Mapping[int, float],
    draft_seconds: float | Mapping[int, float],
    acceptance: Sequence[float] | np.ndarray,
    budgets: Iterable[int],
    depths: Iterable[int],
) -> tuple[TreeSize, list[TreeSize]]:
    """Return the size with the least predicted seconds a token, and the whole table (Sequoia, section 4.3).

    `target_seconds` maps tokens in a pass of the target to its measured seconds; in between it is
    interpolated. So does `draft_seconds`, unless a pass of the draft always takes the same. A level of the
    tree costs one pass of the draft. Plain decoding, without guesses, is the table's first row. Raises
    ValueError for a tree that is larger than what was measured.
    """
    budgets, depths = sorted(set(budgets)), sorted(set(depths))
    largest, deepest = max([0, *budgets]), max([0, *depths])
    _, choice = _plan(acceptance, largest + 1, deepest)
    sizes = [(0, 0), *((budget, depth) for budget in budgets for depth in depths if budget and depth)]
    table = []
    for budget, depth in sizes:
        shape = _build(choice, budget + 1, depth)
        if isinstance(draft_seconds, Mapping):
            drafting = sum(_interpolate(draft_seconds, expanded) for expanded in _expanded(shape))
        else:
            drafting = draft_seconds * len(_expanded(shape))
        table.append(
            TreeSize(
                budget=budget,
                depth=depth,
                expected_tokens=expected_tokens(shape, acceptance),
                draft_seconds=drafting,
                target_seconds=_interpolate(target_seconds, len(shape)),
            )
        )
    return min(table, key=lambda size: size.token_seconds), table


def _expanded(shape: TreeShape) -> list[int]:
    """Return how many nodes of each level have children."""
    return np.bincount(shape.depths[np.unique(shape.parents[1:])]).tolist()


def _interpolate(seconds: Mapping[int, float], tokens: int) -> float:
    measured = sorted(seconds)
    if not measured or not measured[0] <= tokens <= measured[-1]:
        raise ValueError(f"a pass over {tokens} tokens lies outside of what was measured: {measured}")
    return float(np.interp(tokens, measured, [seconds[size] for size in measured]))
