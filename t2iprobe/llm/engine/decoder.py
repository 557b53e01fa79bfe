"""A language model that computes a whole tree of guesses in one pass (SpecExec, arXiv 2406.02532; Sequoia,
arXiv 2402.12374): every node sees the text and its own ancestors, and its position is its depth."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from t2iprobe.errors import UserError
from t2iprobe.llm.engine.cache import RowCache
from t2iprobe.llm.models import LanguageModel, decoder_layers

__all__ = ["Decoder", "GrowingCache", "LayerStore", "Lending"]

# Rows of one pass of a prompt: many, since with weights in slow memory each pass reads them all again.
CHUNK = 2048
_MASKED_KINDS = ("full_attention", "sliding_attention")


class GrowingCache(Protocol):
    """What a pass needs of a cache beside what Transformers asks of it."""

    def advance(self, rows: int) -> None:
        """Count the rows that a whole pass has added."""


class LayerStore(Protocol):
    """Where a model's layers are when they are not in the model, such as a `WeightStore`."""

    @property
    def layers(self) -> int:
        """How many layers there are."""

    def acquire(self, layer: int) -> dict[str, torch.Tensor]:
        """Return the layer's tensors, name → tensor; valid until `release`."""

    def release(self, layer: int) -> None:
        """Say that the layer's tensors are not needed now."""


class Decoder:
    """A Hugging Face causal language model that runs trees; with a `store`, its layers come from there.

    Raises UserError for a model whose tokens know their place by other means than positions and a mask.
    """

    def __init__(self, model: LanguageModel, store: LayerStore | None = None) -> None:
        self.model = model.eval()
        self.config = model.config.get_text_config()
        self.passes = 0
        _check_trees(model)
        if model.config._attn_implementation not in ("sdpa", "eager"):  # the others take no mask of ours
            model.set_attn_implementation("sdpa")
        self.windows = _find_windows(self.config)
        self._lending = Lending(model, store) if store is not None else None
        if self._lending is not None:
            self._lending.attach()

    @property
    def vocabulary(self) -> int:
        """How many tokens the logits are about."""
        return self.config.vocab_size

    @property
    def context_length(self) -> int | None:
        """How many tokens a text may have, None where there is no limit.

        A longrope model turns all positions of a longer text another way than those of a shorter one, by the
        last position of the whole pass: a tree's deepest guess, or a text beside, would change this one's
        rows, and their keys in the cache. So a text ends where the other way begins.
        """
        limits = getattr(self.config, "max_position_embeddings", None), _find_turn(self.config)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def context_end(self) -> str:
        """Where the model's context ends, and why it is not where the model says."""
        limit = self.context_length
        why = ", where its longrope begins to turn all positions another way"
        return f"the model's context ends at {limit}{why if limit == _find_turn(self.config) else ''}"

    @property
    def device(self) -> torch.device:
        """Where tokens go in and logits come out."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.model.get_input_embeddings().weight.dtype

    def new_cache(self, batch: int, capacity: int) -> RowCache:
        """Return an empty cache for `batch` texts of about `capacity` tokens with their trees."""
        return RowCache(batch, capacity, self.device)

    @torch.no_grad()
    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        tree_mask: torch.Tensor,
        cache: RowCache,
        keep: int | None = None,
    ) -> torch.Tensor:
        """Run n new rows a text in one pass; return the logits [B, n or the last `keep`, V] of what follows.

        `tokens` and `positions` are int64 [B, n]. The rows see the committed text and what `tree_mask` bool
        [B, n, pending + n] names of the cache's pending rows and their own; they are pending afterwards. Rows
        of padding may see nothing; their logits are finite and mean nothing. Positions beyond the context
        count as its last one: cut the text there. Logits are float32, or float64 from a float64 model.
        """
        if self.context_length is not None:
            positions = positions.clamp(max=self.context_length - 1)
        positions, tree_mask = positions.to(self.device), tree_mask.to(self.device)
        cache.reserve(positions)
        masks = {kind: cache.mask(tree_mask, self.dtype, window) for kind, window in self.windows.items()}
        return self.run(tokens, positions, masks, cache, keep)

    @torch.no_grad()
    def run(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        masks: Mapping[str, torch.Tensor],
        cache: GrowingCache,
        keep: int | None = None,
    ) -> torch.Tensor:
        """Run rows [B, n] under masks of one's own: kind of layer (see `windows`) → [B, 1, n, slots].

        A mask is added to attention's logits. Otherwise as `forward`.
        """
        inputs = {
            "input_ids": tokens.to(self.device),
            "attention_mask": dict(masks) if len(masks) > 1 else next(iter(masks.values())),
            "position_ids": positions.to(self.device),
            "past_key_values": cache,
            "use_cache": True,
        }
        try:
            if keep == 0:
                self.model.base_model(**inputs)
                logits = torch.empty(len(tokens), 0, self.vocabulary, dtype=self.dtype, device=self.device)
            else:
                logits = self.model(**inputs, logits_to_keep=keep or 0).logits
        finally:
            if self._lending is not None:  # after an exception
                self._lending.take_back_all()
        cache.advance(tokens.shape[1])
        self.passes += 1
        return logits if logits.dtype == torch.float64 else logits.float()

    def prefill(
        self, tokens: Sequence[torch.Tensor], cache: RowCache | None = None
    ) -> tuple[RowCache, torch.Tensor]:
        """Commit texts [T_b] of any lengths to `cache` (a new one), behind what it holds.

        Returns the cache and the logits [B, V] of what follows each text; those of an empty one mean nothing.
        Raises UserError for a text longer than the context.
        """
        if cache is None:
            cache = self.new_cache(len(tokens), 2 * max(map(len, tokens)))
        lengths = torch.tensor([len(text) for text in tokens])
        starts, longest = torch.tensor(cache.lengths), int(lengths.max())
        limit, total = self.context_length, int((starts + lengths).max())
        if limit is not None and total > limit:
            raise UserError(f"the prompt has {total} tokens: {self.context_end}, shorten it")
        # Padding stands in front, so that the last row is every text's last token.
        padded = torch.zeros(len(tokens), longest, dtype=torch.int64)
        for row, text in enumerate(tokens):
            padded[row, longest - len(text) :] = text
        places = torch.arange(longest) - (longest - lengths)[:, None]
        logits = torch.zeros(len(tokens), 1, self.vocabulary)
        for begin in range(0, longest, CHUNK):
            part = slice(begin, begin + CHUNK)
            real = places[:, part] >= 0
            positions = (places[:, part] + starts[:, None]).clamp(min=0)
            size = real.shape[1]
            causal = torch.ones(size, size, dtype=torch.bool).tril() & real[:, None, :]
            is_last = begin + size == longest
            logits = self.forward(padded[:, part], positions, causal, cache, keep=int(is_last))
            cache.keep([row.nonzero()[:, 0] for row in real])
        return cache, logits[:, -1]


class Lending:
    """Lets a store's tensors stand in for those of a model's layers, one layer at a time or more.

    `layers` are some of the model's, all without. Raises UserError for a store of another number of layers.
    """

    def __init__(
        self, model: LanguageModel, store: LayerStore, layers: Sequence[nn.Module] | None = None
    ) -> None:
        self._layers = list(decoder_layers(model) if layers is None else layers)
        if len(self._layers) != store.layers:
            raise UserError(f"the model has {len(self._layers)} layers and its weight store {store.layers}")
        self._store = store
        # Buffers that are stored were learned, too, such as Gemma 4's scale of a layer.
        self._own = [layer.state_dict(keep_vars=True) for layer in self._layers]
        self._lent: set[int] = set()

    def attach(self) -> None:
        """Lend each layer's tensors when the model comes to it, and take them back behind it."""
        for number, layer in enumerate(self._layers):
            layer.register_forward_pre_hook(lambda *_, number=number: self.lend(number))
            layer.register_forward_hook(lambda *_, number=number: self.take_back(number))

    def lend(self, number: int) -> None:
        """Let the store's tensors stand in for a layer's own."""
        self._lent.add(number)
        own, tensors = self._own[number], self._store.acquire(number)
        if lacking := sorted(own.keys() - tensors.keys()):
            raise UserError(f"the weight store's layer {number} lacks {lacking[0]}: pack the model again")
        _set_tensors(self._layers[number], {name: tensors[name].to(each.dtype) for name, each in own.items()})

    def take_back(self, number: int) -> None:
        """Give a layer its own tensors back, and the store its."""
        self._lent.discard(number)
        _set_tensors(self._layers[number], self._own[number])
        self._store.release(number)

    def take_back_all(self) -> None:
        """Take back whatever is lent, as after an exception."""
        for number in sorted(self._lent):
            self.take_back(number)


def _set_tensors(layer: nn.Module, tensors: dict[str, Any]) -> None:
    """Put parameters and buffers in their places."""
    for name, tensor in tensors.items():
        path, _, attribute = name.rpartition(".")
        module = layer.get_submodule(path)
        if isinstance(getattr(module, attribute), nn.Parameter) and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        setattr(module, attribute, tensor)


def _find_windows(config: Any) -> dict[str, int | None]:
    """Return how far each kind of attention layer that the model has looks back, None for no limit."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"]
    if unknown := sorted(set(kinds) - set(_MASKED_KINDS)):
        raise UserError(f"{config.model_type} models cannot verify trees: they have {unknown[0]} layers")
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(set(kinds))}


def _find_turn(config: Any) -> int | None:
    """Return from how many tokens on longrope turns all positions another way, None without longrope."""
    found = getattr(config, "rope_parameters", None) or {}
    kinds = [found] if "rope_type" in found else found.values()  # or of each kind of layer
    turning = [kind for kind in kinds if isinstance(kind, dict) and kind.get("rope_type") == "longrope"]
    return min((kind["original_max_position_embeddings"] for kind in turning), default=None)


def _check_trees(model: LanguageModel) -> None:
    """Raise UserError for a model in which rows know their order by other means than positions and mask."""
    accepted = inspect.signature(model.forward).parameters
    reason = ""
    if not {"position_ids", "past_key_values"} <= accepted.keys() or getattr(model.config, "alibi", False):
        reason = "their tokens' positions cannot be told"
    # Such as GPT-Neo's, a triangle over the slots.
    if any(buffer.dtype == torch.bool and buffer.ndim > 1 for buffer in model.buffers()):
        reason = "they have a mask of their own"
    if reason:
        raise UserError(f"{model.config.model_type} models cannot verify trees: {reason}")
