"""Some blocks of a Hugging Face decoder, from hidden states to hidden states; and what stands around them.

The model's own forward runs, with all layers but these handing on what they get. So whatever a family does
around its layers (rotary embeddings, kinds of masks, scaled embeddings, soft-capped logits) is right here.
"""

import threading
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from t2iprobe.errors import UserError
from t2iprobe.llm.commands import pack_model
from t2iprobe.llm.engine.cache import RowCache
from t2iprobe.llm.engine.decoder import Decoder, LayerStore, Lending
from t2iprobe.llm.memory.ledger import Ledger
from t2iprobe.llm.memory.packing import read_rest
from t2iprobe.llm.memory.placement import Placement, Shares
from t2iprobe.llm.memory.schedule import BUFFERS, open_source, open_store, realise_weights
from t2iprobe.llm.memory.sources import DequantizedSource, Source, padded
from t2iprobe.llm.memory.store import WeightStore, choose_resident, spread_evenly
from t2iprobe.llm.models import (
    LanguageModel,
    LanguageModelFiles,
    check_parts,
    decoder_layers,
    load_without_layers,
)
from t2iprobe.llm.planning import find_budgets

__all__ = ["Blocks", "Ends", "load_blocks", "place_blocks"]


class _Bypass:
    """A model whose layers run only if they are asked for; hidden states may go in and out at any.

    Raises UserError for a model whose layers need more than those.
    """

    def __init__(self, model: LanguageModel) -> None:
        check_parts(model)
        self.model = model
        self.layers = list(decoder_layers(model))
        self._active = range(0)
        self._given: Tensor | None = None
        self._entered: Tensor | None = None
        self._found: Tensor | None = None
        for number, layer in enumerate(self.layers):
            layer.forward = partial(self._run_layer, number, layer.forward)

    def _run_layer(self, number: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if number == 0:
            self._entered = hidden
        if number not in self._active:
            is_last = number == len(self.layers) - 1
            return self._given if is_last and not self._active and self._given is not None else hidden
        if number == self._active.start:
            hidden = self._given
        out = self._compute(number, forward, hidden, *rest, **kwargs)
        if not isinstance(out, Tensor):
            raise UserError(f"{self.model.config.model_type} models' layers give more than hidden states")
        if number == self._active.stop - 1:
            self._found = out
        return out

    def _compute(self, number: int, forward: Any, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(hidden, *args, **kwargs)


class Ends(_Bypass):
    """What a client holds: the way from tokens to hidden states, and from hidden states to logits."""

    def __init__(self, model: LanguageModel, windows: Collection[str]) -> None:
        super().__init__(model)
        self._kinds = tuple(windows)

    @torch.no_grad()
    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return what enters the first block, [B, n, hidden], for int64 [B, n] tokens and positions."""
        self.model.base_model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=self._empty_masks(*tokens.shape),
            use_cache=False,
        )
        assert self._entered is not None
        return self._entered

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits [B, n, V] of what left the last block, [B, n, hidden]. Gradients pass."""
        self._given = hidden
        try:
            return self.model(
                inputs_embeds=_nothing(self.model, hidden),
                position_ids=torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device),
                attention_mask=self._empty_masks(*hidden.shape[:2]),
                use_cache=False,
            ).logits
        finally:
            self._given = None

    def _empty_masks(self, batch: int, rows: int) -> Any:
        """Return masks that no layer looks at, since the model would make its own."""
        weight = self.model.get_input_embeddings().weight
        mask = torch.zeros((), dtype=weight.dtype, device=weight.device).expand(batch, 1, rows, rows)
        return dict.fromkeys(self._kinds, mask) if len(self._kinds) > 1 else mask


class Blocks(_Bypass):
    """Blocks first … last − 1 of a model. One pass at a time; more than one thread may ask.

    With a `store`, whose layers are these blocks, the weights come from there.
    """

    def __init__(
        self, model: LanguageModel, first: int, last: int, device: torch.device, store: Any = None
    ) -> None:
        decoder = Decoder(model)
        super().__init__(model)
        if not 0 <= first < last <= len(self.layers):
            raise UserError(f"the model has blocks 0 to {len(self.layers)}, not {first}:{last}")
        self.first, self.last, self.device, self.store = first, last, device, store
        self.windows, self.context_length = decoder.windows, decoder.context_length
        self.dtype = decoder.dtype
        self.hidden_size = int(decoder.config.hidden_size)
        self._lending: Lending | None = None
        if store is not None:
            own: LayerStore = store
            self._lending = Lending(model, own, self.layers[first:last])
        self._lock = threading.Lock()
        self.peak_bytes: dict[str, int] = {}  # of weights, by tier
        self.weights = Shares(1, 0, 0)  # that they have of the tiers
        self._holds = False  # after its forward, the layer's weights are needed for its backward
        self.slot_bytes = self._measure_slot()

    def close(self) -> None:
        """Give the weights back."""
        if isinstance(self.store, WeightStore):
            self.store.close()

    def new_cache(self, batch: int, capacity: int) -> RowCache:
        """Return an empty cache for a session."""
        return RowCache(batch, capacity, self.device)

    @torch.no_grad()
    def step(
        self, hidden: Tensor, positions: Tensor, tree_mask: Tensor, cache: RowCache, span: range
    ) -> Tensor:
        """Run rows [B, n, hidden] through the blocks `span`; they are pending in the cache afterwards.

        Positions, mask and cache are those of `Decoder.forward`.
        """
        hidden, positions, tree_mask = (
            self._here(hidden),
            positions.to(self.device),
            tree_mask.to(self.device),
        )
        with self._lock:
            cache.reserve(positions)
            out = self._run(hidden, positions, self._masks(cache, tree_mask), span, cache)
            cache.advance(hidden.shape[1])
        return out

    @torch.no_grad()
    def forward(self, hidden: Tensor, positions: Tensor, mask: Tensor, span: range) -> Tensor:
        """Run rows [B, n, hidden] through blocks without a cache; mask bool [B, n, n]: what each sees."""
        hidden, positions = self._here(hidden), positions.to(self.device)
        with self._lock:
            return self._run(hidden, positions, self._full_masks(positions, mask), span, None)

    def backward(
        self, hidden: Tensor, positions: Tensor, mask: Tensor, gradient: Tensor, span: range
    ) -> Tensor:
        """Return the gradient [B, n, hidden] at the blocks' input from that at their output.

        The blocks are computed again, one at a time, so that the memory is that of one, and weights may pass
        through a store's buffers.
        """
        hidden, positions, gradient = self._here(hidden), positions.to(self.device), self._here(gradient)
        with self._lock, torch.no_grad():
            masks, inputs = self._full_masks(positions, mask), [hidden]
            for block in span[:-1]:
                inputs.append(self._run(inputs[-1], positions, masks, range(block, block + 1), None))
            for block in reversed(span):
                entered = inputs.pop().detach().requires_grad_(True)
                self._holds = True
                try:
                    with torch.enable_grad():
                        out = self._run(entered, positions, masks, range(block, block + 1), None)
                    (gradient,) = torch.autograd.grad(out, entered, gradient)
                finally:
                    self._holds = False
                    if self._lending is not None:
                        self._lending.take_back_all()
        return gradient

    def _run(
        self,
        hidden: Tensor,
        positions: Tensor,
        masks: Mapping[str, Tensor],
        span: range,
        cache: RowCache | None,
    ) -> Tensor:
        self._active, self._given = span, hidden
        try:
            self.model.base_model(
                inputs_embeds=_nothing(self.model, hidden),
                attention_mask=dict(masks) if len(masks) > 1 else next(iter(masks.values())),
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
            )
            assert self._found is not None
            return self._found
        finally:
            if self._lending is not None and not self._holds:
                self._lending.take_back_all()
            self._active, self._given, self._found, self._entered = range(0), None, None, None

    def _compute(self, number: int, forward: Any, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        if self._lending is None:
            return forward(hidden, *args, **kwargs)
        self._lending.lend(number - self.first)
        out = forward(hidden, *args, **kwargs)
        if not self._holds:
            self._lending.take_back(number - self.first)
        return out

    def _here(self, hidden: Tensor) -> Tensor:
        return hidden.to(self.device, self.dtype)

    def _masks(self, cache: RowCache, tree_mask: Tensor) -> dict[str, Tensor]:
        return {kind: cache.mask(tree_mask, self.dtype, window) for kind, window in self.windows.items()}

    def mask_bytes(self, batch: int, rows: int, slots: int) -> int:
        """Return what the masks of so many rows that look at so many slots take while they are made."""
        # Beside the others the last one, who is seen and who is not; or, with a window, distances.
        width, windows = self.dtype.itemsize, self.windows.values()
        last = max(width + 2, 0 if set(windows) == {None} else 10)
        return batch * rows * slots * ((len(windows) - 1) * width + last)

    def _full_masks(self, positions: Tensor, mask: Tensor) -> dict[str, Tensor]:
        cache = RowCache(len(positions), positions.shape[1], self.device)
        cache.reserve(positions)
        return self._masks(cache, mask.to(self.device))

    def _measure_slot(self) -> int:
        """Return the bytes of keys and values of one token in one block, whatever the family's heads are."""
        cache = self.new_cache(1, 1)
        row = torch.zeros(1, 1, self.hidden_size, device=self.device, dtype=self.dtype)
        zero = torch.zeros(1, 1, dtype=torch.int64)
        self.step(row, zero, torch.ones(1, 1, 1, dtype=torch.bool), cache, range(self.first, self.last))
        return -(-cache.nbytes // (self.last - self.first))


def _nothing(model: LanguageModel, hidden: Tensor) -> Tensor:
    """Return embeddings that nobody reads."""
    width = model.get_input_embeddings().weight.shape[1]
    return hidden.new_zeros(*hidden.shape[:2], width)


def load_blocks(
    files: LanguageModelFiles,
    first: int,
    last: int,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    bits: int | None = None,
    memory: int | None = None,
    placement: Placement | None = None,
) -> Blocks:
    """Load blocks first … last − 1 of a model, and nothing else of its layers.

    With `bits` (2, 3, 4 or 8) their weights are held so and dequantised in each pass. `memory` is the bytes
    that the device has for weights: see `place_blocks`. A `placement` says all that itself, as it does for
    blocks of prompts and for a speculative target. Raises UserError for blocks that there are not, and for a
    memory that is too small.
    """
    packed = pack_model(files, dtype, device)
    if not 0 <= first < last <= len(packed.layers):
        raise UserError(f"{files.name} has blocks 0:{len(packed.layers)}, not {first}:{last}")
    model = load_without_layers(files, read_rest(packed), dtype=dtype, device=device, embeds=False)
    around = _hold_alone(model)
    bits = bits if placement is None else placement.weight_bits
    source, buffers = open_source(packed, bits, layers=slice(first, last)), BUFFERS
    if placement is None:
        ram = 0 if memory is None else find_budgets(memory, device, packed.folder)["ram"] or 0
        placement, buffers = place_blocks(source, bits, memory, ram, around)
    ledger = Ledger({"device": memory})
    ledger.take("device", "what stands around the blocks", around)
    store = open_store(placement, source, device, ledger, buffers=buffers)
    try:
        blocks = Blocks(model, first, last, torch.device(device), store)
    except BaseException:
        store.close()
        raise
    blocks.peak_bytes, blocks.weights = ledger.peak, realise_weights(placement, source).shares["weights"]
    return blocks


def _hold_alone(model: LanguageModel) -> int:
    """Copy what stands around the blocks out of the buffer that held the embedding, too; return its bytes."""
    held = [each for each in model.parameters() if not each.is_meta]
    for each in held:
        each.data = each.data.clone()
    return sum(each.nbytes for each in held)


def place_blocks(
    source: Source, bits: int | None, memory: int | None, ram: int = 0, around: int = 0
) -> tuple[Placement, int]:
    """Return a placement that lets as many blocks stay as fit, and the buffers that the others pass through.

    `memory` bytes are there on the device for the blocks and what stands `around` them, None for whatever
    they take; `ram` are those of the machine beside it, 0 where that is the device. The blocks that fit into
    neither are on the disk. Blocks in few bits are held in RAM. Raises UserError for less than a block takes.
    """
    if memory is None:
        return _place(Shares(1, 0, 0), bits), BUFFERS
    largest = max(padded(source.nbytes(layer)) for layer in range(source.layers))
    few = source if isinstance(source, DequantizedSource) else None
    # A block in few bits arrives in a buffer of its own, where it is held.
    arrives = few.buffer_bytes if few and not ram else 0
    if memory < (least := around + arrives + largest):
        raise UserError(
            f"{memory} bytes of memory are too few for blocks that take {largest} each when they compute: "
            f"give {least} or more"
        )
    if few:
        sizes = [few.stored.nbytes(layer) for layer in range(source.layers)]
        free = memory - around - arrives
        buffers = min(BUFFERS, source.layers, free // largest)
        if not ram and free - buffers * largest < sum(map(padded, sizes)) <= free - largest:
            buffers = 1  # nothing is read ahead, but all stay
        room = ram - few.buffer_bytes if ram else free - buffers * largest
        share = _share(sizes, _choose_most(sizes, range(source.layers), room))
        return _place(Shares(share, 0, 1 - share), bits), buffers
    sizes = [source.nbytes(layer) for layer in range(source.layers)]
    fit = choose_resident(sizes, memory, around, BUFFERS)
    rest = [layer for layer in range(source.layers) if layer not in fit.resident]
    here, near = _share(sizes, fit.resident), _share(sizes, _choose_most(sizes, rest, ram))
    return _place(Shares(here, near, max(0.0, 1 - here - near)), bits), max(1, fit.buffers)


def _place(weights: Shares, bits: int | None) -> Placement:
    """Return a placement of weights; a server's passes have no block of prompts."""
    here = Shares(1, 0, 0)
    return Placement(1, 1, weights, here, here, weight_bits=bits)


def _share(sizes: Sequence[int], layers: Sequence[int]) -> float:
    return sum(sizes[layer] for layer in layers) / sum(sizes)


def _choose_most(sizes: Sequence[int], among: Sequence[int], room: int) -> Sequence[int]:
    """Return as many of some layers as have room, spread evenly."""
    for count in range(len(among), 0, -1):
        chosen = [among[place] for place in spread_evenly(count, len(among))]
        if sum(padded(sizes[layer]) for layer in chosen) <= room:
            return chosen
    return []
