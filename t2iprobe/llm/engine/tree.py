"""A tree of guessed tokens: flat tensors, parents before children."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class DraftTree:
    """A tree of n nodes, all tensors on the CPU; `make_tree` builds one.

    Node 0, the root, is the last token of the text: accepted already, not yet in the target's cache.
    `tokens`, `parents` (the root's: -1), `depths` and `ranks` (order among siblings; the root's: 0) are int64
    [n]. `log_probs` float64 [n] sums log q along the path from the root, which has 0. `origin` int64 [n] is
    the number under which a node was expanded while the tree grew, -1 where it never was.

    `draft_probs` is there where siblings were drawn at random, without replacement: node → the q float64 [V],
    after processing, that its children were drawn from. Without it the tree is deterministic.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    log_probs: Tensor
    ranks: Tensor
    origin: Tensor
    draft_probs: Mapping[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def budget(self) -> int:
        """Nodes below the root: the guesses."""
        return len(self) - 1

    @cached_property
    def successors(self) -> list[dict[int, int]]:
        """Each node's children, token → node, by rank."""
        found: list[dict[int, int]] = [{} for _ in range(len(self))]
        for node, (parent, token) in enumerate(zip(self.parents.tolist(), self.tokens.tolist(), strict=True)):
            if parent >= 0:
                found[parent][token] = node
        return found

    def children(self, node: int) -> Tensor:
        """Return the children of `node` by rank: int64 [children]."""
        return torch.tensor(list(self.successors[node].values()), dtype=torch.int64)

    def path(self, node: int) -> Tensor:
        """Return the tokens from below the root to `node`, which is the last: int64 [depth]."""
        parents, nodes = self.parents.tolist(), []
        while node > 0:
            nodes.append(node)
            node = parents[node]
        return self.tokens[nodes[::-1]]

    def ancestors(self) -> Tensor:
        """Return which nodes lie on the path to each node, itself included: bool [n, n], a row a node."""
        nodes = torch.arange(len(self))
        seen = torch.zeros(len(self), len(self), dtype=torch.bool)
        above = nodes
        for _ in range(int(self.depths.max()) + 1):
            seen[nodes, above] = True
            above = self.parents[above].clamp(min=0)
        return seen


def make_tree(
    tokens: Sequence[int],
    parents: Sequence[int],
    log_probs: Sequence[float] | None = None,
    origin: Sequence[int] | None = None,
    draft_probs: Mapping[int, Tensor] | None = None,
) -> DraftTree:
    """Build a tree from its tokens and parents [n], parents before children, siblings by rank.

    Without `log_probs` all are 0; without `origin` each node keeps its number. Raises ValueError where that
    is no tree or two siblings hold the same token.
    """
    if not tokens or parents[0] != -1:
        raise ValueError("a draft tree begins with its root, of which the parent is -1")
    depths, ranks = [0], [0]
    siblings: list[set[int]] = [set()]
    for node in range(1, len(tokens)):
        parent, token = parents[node], tokens[node]
        if not 0 <= parent < node:
            raise ValueError(f"node {node} has parent {parent}: parents stand before their children")
        if token in siblings[parent]:
            raise ValueError(f"two children of node {parent} hold the token {token}")
        depths.append(depths[parent] + 1)
        ranks.append(len(siblings[parent]))
        siblings[parent].add(token)
        siblings.append(set())
    origin = range(len(tokens)) if origin is None else origin
    rows = torch.tensor([[*tokens], [*parents], depths, ranks, [*origin]])
    return DraftTree(
        tokens=rows[0],
        parents=rows[1],
        depths=rows[2],
        log_probs=torch.tensor([0.0] * len(tokens) if log_probs is None else log_probs, dtype=torch.float64),
        ranks=rows[3],
        origin=rows[4],
        draft_probs=draft_probs,
    )
