"""Keys and values of a text and of a tree of guesses behind it, of which the accepted ones stay."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

__all__ = ["HIDDEN", "RowCache"]

# Not -inf, with which a row of padding that sees nothing would become NaN. Half the lowest number leaves room
# for the logit that it is added to; float64's would be -inf to a softmax that some models take in float32.
HIDDEN = {
    dtype: max(torch.finfo(dtype).min, torch.finfo(torch.float32).min) / 2
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}


class RowCache(Cache):
    """Keys and values of all layers for a batch of texts, in slots that are allocated once.

    In batch row b the slots below ``lengths[b]`` hold the committed text; the `pending` slots behind them
    hold what ran since, such as a tree's nodes, until `keep` commits some and forgets the others. A pass is
    `reserve`, the model's own calls of `update`, and `advance`: one that is broken off leaves no trace.
    """

    def __init__(self, batch: int, capacity: int, device: torch.device | str = "cpu") -> None:
        super().__init__(layers=[])
        self.lengths = [0] * batch
        self.pending = 0
        self.positions = torch.zeros(batch, max(capacity, 1), dtype=torch.int64, device=device)
        self._layers: dict[int, list[torch.Tensor]] = {}  # keys and values [B, heads, capacity, D]

    @property
    def capacity(self) -> int:
        """Slots of each batch row; doubled whenever they do not suffice."""
        return self.positions.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, those of empty slots included."""
        return sum(tensor.nbytes for tensors in self._layers.values() for tensor in tensors)

    def reserve(self, positions: torch.Tensor) -> None:
        """Make room for the next pending rows and remember their `positions` [B, n] in the text."""
        end = self._end(positions.shape[1])
        if end > self.capacity:
            capacity = max(end, 2 * self.capacity)
            self.positions = _lengthen(self.positions, 1, capacity)
            for tensors in self._layers.values():
                tensors[:] = [_lengthen(tensor, 2, capacity) for tensor in tensors]
        self._write(self.positions[:, None, :, None], positions[:, None, :, None])

    def mask(self, tree_mask: torch.Tensor, dtype: torch.dtype, window: int | None = None) -> torch.Tensor:
        """Return what n new rows see, to be added to attention's logits: [B, 1, n, slots], 0 or very low.

        They see the committed rows and, of the pending and new ones, those that `tree_mask` bool
        [B, n, pending + n] names; all of them only less than `window` positions away, where there is one.
        """
        rows = tree_mask.shape[1]
        end = self._end(rows)
        seen = torch.zeros(len(self.lengths), rows, end, dtype=torch.bool, device=self.positions.device)
        for row, length in enumerate(self.lengths):
            seen[row, :, :length] = True
            seen[row, :, length : length + self.pending + rows] = tree_mask[row]
        if window is not None:
            # The new rows' own positions, which lie in their slots.
            slots = torch.tensor(self.lengths, device=seen.device)[:, None] + self.pending
            own = self.positions.gather(1, slots + torch.arange(rows, device=seen.device))
            seen &= own[:, :, None] - self.positions[:, None, :end] < window
        added = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return added.masked_fill_(~seen, HIDDEN[dtype])[:, None]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put a layer's new keys and values [B, heads, n, D] behind the pending ones; return views of all."""
        if layer_idx not in self._layers:
            # Zeros: slots that a shorter row never filled are masked, and 0 · NaN would not be.
            self._layers[layer_idx] = [
                states.new_zeros(*states.shape[:2], self.capacity, states.shape[3])
                for states in (key_states, value_states)
            ]
        keys, values = self._layers[layer_idx]
        self._write(keys, key_states)
        self._write(values, value_states)
        end = self._end(key_states.shape[2])
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, rows: int) -> None:
        """Count the `rows` that a whole pass has added as pending."""
        self.pending += rows

    def keep(self, rows: Sequence[torch.Tensor | Sequence[int]]) -> None:
        """Commit, for each batch row, the pending rows of these numbers in this order; forget the others."""
        for row, chosen in enumerate(rows):
            chosen = torch.as_tensor(chosen, dtype=torch.int64)
            moved = chosen != torch.arange(len(chosen))
            first = int(moved.int().argmax()) if moved.any() else len(chosen)
            start = self.lengths[row]
            if first < len(chosen):
                for tensor in self._tensors():
                    source = (start + chosen[first:]).to(tensor.device)
                    tensor[row, :, start + first : start + len(chosen)] = tensor[row].index_select(1, source)
            self.lengths[row] += len(chosen)
        self.pending = 0

    def select(self, rows: Sequence[int]) -> None:
        """Go on with the texts of these batch rows only, in this order."""
        chosen = torch.tensor(rows, dtype=torch.int64)
        self.lengths = [self.lengths[row] for row in rows]
        self.positions = self.positions[chosen.to(self.positions.device)]
        for tensors in self._layers.values():
            for place, tensor in enumerate(tensors):  # one at a time: no more than that is there twice
                tensors[place] = tensor[chosen.to(tensor.device)]

    def crop(self, lengths: Sequence[int]) -> None:  # type: ignore[override]  # theirs knows one length
        """Forget what is pending, and all but the first ``lengths[b]`` committed rows."""
        if any(new > old for new, old in zip(lengths, self.lengths, strict=True)):
            raise ValueError(f"a cache of {self.lengths} rows cannot be cut to {list(lengths)}")
        self.lengths = list(lengths)
        self.pending = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots in use, which models ask for; they are told positions and a mask all the same."""
        return self._end(0)

    def _end(self, rows: int) -> int:
        return max(self.lengths) + self.pending + rows

    def _tensors(self) -> list[torch.Tensor]:
        """Return all that is kept for a slot, as [B, heads, capacity, D]."""
        stored = [tensor for tensors in self._layers.values() for tensor in tensors]
        return [*stored, self.positions[:, None, :, None]]

    def _write(self, slots: torch.Tensor, new: torch.Tensor) -> None:
        """Write `new` [B, heads, n, D] behind the pending rows of `slots` [B, heads, capacity, D]."""
        rows = new.shape[2]
        if len(set(self.lengths)) == 1:
            start = self.lengths[0] + self.pending
            slots[:, :, start : start + rows] = new
            return
        for row, length in enumerate(self.lengths):
            slots[row, :, length + self.pending : length + self.pending + rows] = new[row]


def _lengthen(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """Return a copy of `tensor` that is `size` long along `dim`, with zeros at the end."""
    shape = list(tensor.shape)
    shape[dim] = size
    longer = tensor.new_zeros(shape)
    longer.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return longer
