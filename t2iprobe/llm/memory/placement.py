"""Where weights, cache and hidden states lie, and how many prompts go through a layer together.

FlexGen, arXiv 2303.06865, section 4: a block of `batches` batches shares each load of a layer.
"""

import math
from dataclasses import dataclass

from t2iprobe.errors import UserError

__all__ = ["TIERS", "Forecast", "Placement", "Shares"]

TIERS = ("device", "ram", "disk")


@dataclass(frozen=True)
class Shares:
    """Which part of something lies on each tier: 0 or more each, 1 together. Raises UserError otherwise."""

    device: float
    ram: float
    disk: float

    def __post_init__(self) -> None:
        parts = (self.device, self.ram, self.disk)
        if min(parts) < 0 or not math.isclose(sum(parts), 1, abs_tol=1e-6):
            raise UserError(f"shares of device, RAM and disk are 0 or more and 1 together, not {parts}")


@dataclass(frozen=True)
class Placement:
    """How prompts are written in batches under a memory budget. Raises UserError for an empty block.

    batch: prompts of one forward; batches: those that share each load of a layer; weights: shares of the
    layers, by bytes; cache: of the chunks (layer, batch) of keys and values; hidden: of the batches' hidden
    states; cpu_attention: whether attention is computed where the keys and values lie; bits: 4, or None for
    the dtype that is computed in.
    """

    batch: int
    batches: int
    weights: Shares
    cache: Shares
    hidden: Shares
    cpu_attention: bool = False
    weight_bits: int | None = None
    cache_bits: int | None = None

    def __post_init__(self) -> None:
        if self.batch < 1 or self.batches < 1:
            raise UserError(f"a block has 1 batch of 1 prompt or more, not {self.batches} of {self.batch}")

    @property
    def block(self) -> int:
        """Prompts that share each load of a layer."""
        return self.batch * self.batches


@dataclass(frozen=True)
class Forecast:
    """What the cost model says of a placement.

    peak_bytes: tier → bytes at most; binding: what limits it, in words, such as "disk link" or "compute".
    """

    seconds: float
    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float
    peak_bytes: dict[str, int]
    binding: str
