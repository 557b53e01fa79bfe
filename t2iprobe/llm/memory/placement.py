"""Where weights, cache and hidden states lie, and how many prompts go through a layer together.

FlexGen, arXiv 2303.06865, section 4: a block of `batches` batches shares each load of a layer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from t2iprobe.errors import UserError
from t2iprobe.llm.memory.store import spread_evenly

__all__ = ["TIERS", "Forecast", "Placement", "Realised", "Shares", "realise"]

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


@dataclass(frozen=True)
class Realised:
    """A placement in what can be moved: whole layers, chunks (layer, batch) of the cache, whole batches.

    resident: layers on the device; in_ram: layers in RAM, the others are on the disk; shares: what became of
    each of weights, cache and hidden.
    """

    resident: tuple[int, ...]
    in_ram: tuple[int, ...]
    shares: dict[str, Shares]
    layers: int
    batches: int
    chunks: tuple[str, ...]
    hidden: tuple[str, ...]

    def cache_tier(self, layer: int, batch: int) -> str:
        """Return where the keys and values of a layer of a batch lie."""
        return self.chunks[layer * self.batches + batch]

    def hidden_tier(self, batch: int) -> str:
        """Return where a batch's hidden states lie while other batches compute."""
        return self.hidden[batch]


def realise(placement: Placement, layer_bytes: Sequence[int]) -> Realised:
    """Round a placement to what can be moved, spread evenly; never more on a faster tier than was asked."""
    layers, total = len(layer_bytes), sum(layer_bytes)

    def fits(count: int, share: float, among: Sequence[int]) -> bool:
        return sum(layer_bytes[among[i]] for i in spread_evenly(count, len(among))) <= (share + 1e-9) * total

    def choose(share: float, among: Sequence[int]) -> tuple[int, ...]:
        count = max(n for n in range(len(among) + 1) if fits(n, share, among))
        return tuple(among[i] for i in spread_evenly(count, len(among)))

    resident = choose(placement.weights.device, range(layers))
    rest = [layer for layer in range(layers) if layer not in resident]
    in_ram = tuple(rest) if not placement.weights.disk else choose(placement.weights.ram, rest)
    on_device, in_memory = (sum(layer_bytes[layer] for layer in part) / total for part in (resident, in_ram))
    chunks = _spread_tiers(placement.cache, layers * placement.batches)
    hidden = _spread_tiers(placement.hidden, placement.batches)
    shares = {
        "weights": Shares(on_device, in_memory, max(0.0, 1 - on_device - in_memory)),
        "cache": _count_shares(chunks),
        "hidden": _count_shares(hidden),
    }
    return Realised(resident, in_ram, shares, layers, placement.batches, chunks, hidden)


def _spread_tiers(shares: Shares, count: int) -> tuple[str, ...]:
    """Return a tier for each of `count` equal things, the faster tiers rounded down."""
    on_device = int(shares.device * count + 1e-6)
    in_ram = int(shares.ram * count + 1e-6) if shares.disk else count - on_device
    tiers = ["disk"] * count
    for place in spread_evenly(on_device, count):
        tiers[place] = "device"
    rest = [place for place in range(count) if tiers[place] != "device"]
    for place in spread_evenly(in_ram, len(rest)):
        tiers[rest[place]] = "ram"
    return tuple(tiers)


def _count_shares(tiers: Sequence[str]) -> Shares:
    return Shares(*(sum(each == tier for each in tiers) / len(tiers) for tier in TIERS))
