"""A target whose blocks are served by a swarm: to the engine it is a `Decoder`."""

from typing import Any

import torch
from torch import Tensor

from t2iprobe.llm.engine.decoder import Decoder
from t2iprobe.llm.models import LanguageModel
from t2iprobe.llm.swarm.blocks import Ends
from t2iprobe.llm.swarm.session import Swarm, SwarmCache
from t2iprobe.llm.swarm.taught import Taught

__all__ = ["SwarmDecoder"]


class SwarmDecoder(Decoder):
    """A causal language model whose embedding and head are here and whose blocks are on servers.

    `model` is what `load_without_layers` makes; `taught` are a soft prompt before every text and
    adapters between blocks. A tree is verified with one question to each server of the chain.
    """

    def __init__(self, model: LanguageModel, swarm: Swarm, taught: Taught | None = None) -> None:
        super().__init__(model)
        self.swarm, self.taught = swarm, taught or Taught()
        self._ends = Ends(model, self.windows)

    @property
    def context_length(self) -> int | None:
        """How many tokens a text may have beside the soft prompt, None where there is no limit."""
        limit, prompt = super().context_length, self.taught.prompt
        return limit if limit is None or prompt is None else limit - len(prompt)

    def new_cache(self, batch: int, capacity: int) -> Any:
        """Return an empty cache for `batch` texts of about `capacity` tokens with their trees."""
        return SwarmCache(self.swarm, batch, capacity, self.taught)

    @torch.no_grad()
    def forward(
        self, tokens: Tensor, positions: Tensor, tree_mask: Tensor, cache: Any, keep: int | None = None
    ) -> Tensor:
        """As `Decoder.forward`. Raises UserError when a block is served by nobody for too long."""
        if self.context_length is not None:
            positions = positions.clamp(max=self.context_length - 1)
        wanted = tokens.shape[1] if keep is None else keep
        entered = self._ends.embed(tokens.to(self.device), positions.to(self.device) + cache.shift)
        hidden = cache.run(entered.cpu(), positions.cpu(), tree_mask.cpu(), wanted)
        self.passes += 1
        if not wanted:
            return torch.empty(len(tokens), 0, self.vocabulary, dtype=self.dtype, device=self.device)
        logits = self._ends.head(hidden.to(self.device))
        return logits if logits.dtype == torch.float64 else logits.float()

    def run(self, *_: Any, **__: Any) -> Tensor:
        """Masks of one's own would have to be sent whole."""
        raise NotImplementedError("a swarm's decoder is asked with forward")
