"""The best shape of a draft tree, computed from how often each child is accepted (Sequoia, arXiv 2402.12374).

The acceptance vector [W] holds, for the children of an accepted node by rank, how often each is the one
that is accepted; its sum is at most 1. A pass of the target yields on average, in tokens, the sum over the
tree's nodes of the product of acceptance[rank] along the path. The root counts 1: the token that the target
adds itself.
"""

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
