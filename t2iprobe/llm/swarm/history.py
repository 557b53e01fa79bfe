"""What a client keeps of what went into its servers' spans, so that others can read it again."""

import torch
from torch import Tensor

from t2iprobe.llm.engine.cache import RowCache

__all__ = ["History"]


class History(RowCache):
    """What went into some blocks: it is kept, cut and grows as the caches on the servers do.

    The inputs of block b are this cache's keys of layer b; a token has one head, and no value.
    """

    def put(self, block: int, hidden: Tensor) -> None:
        """Put the inputs [B, n, hidden] of a pass behind the pending ones. `reserve` was called before."""
        self.update(hidden[:, None], hidden[:, None, :, :0], block)

    def fill(self, block: int, slots: Tensor, hidden: Tensor) -> None:
        """Write inputs [B, n, hidden] of old rows, whose slots are [B, n]."""
        if block not in self._layers:
            shape = (hidden.shape[0], 1, self.capacity)
            self._layers[block] = [hidden.new_zeros(*shape, hidden.shape[2]), hidden.new_zeros(*shape, 0)]
        rows = torch.arange(len(hidden), device=hidden.device)[:, None]
        self._layers[block][0][rows, 0, slots.to(hidden.device)] = hidden

    def rows(self, block: int, slots: Tensor) -> Tensor:
        """Return the inputs [B, n, hidden] of the rows in slots [B, n]."""
        stored = self._layers[block][0][:, 0]
        rows = torch.arange(len(stored), device=stored.device)[:, None]
        return stored[rows, slots.to(stored.device)]

    def blocks(self) -> list[int]:
        """Return the blocks whose inputs are kept."""
        return sorted(self._layers)

    def drop(self, block: int) -> None:
        """Forget the inputs of a block."""
        self._layers.pop(block, None)
