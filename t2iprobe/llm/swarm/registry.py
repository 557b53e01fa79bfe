"""Who holds what: records in the DHT that expire unless they are renewed.

What a record says is its peer's own word: it is checked for form, and believed otherwise.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from t2iprobe.llm.memory.packing import Packed
from t2iprobe.llm.models import LanguageModelFiles
from t2iprobe.llm.swarm.routing import Offer
from t2iprobe.llm.swarm.transport import Node

__all__ = ["Announcement", "ModelKey", "announce", "find_models", "find_servers"]

MODELS = "t2iprobe/models"
STATES = ("joining", "online", "leaving", "offline")
# Of a model; no span is checked against a larger number.
MOST_BLOCKS = 4096
_MOST_ADDRESSES = 8


@dataclass(frozen=True)
class ModelKey:
    """What servers must share to serve one model: its files, the dtype computed in, the bits of weights."""

    hash: str
    dtype: str
    bits: int | None
    blocks: int
    name: str = ""

    @classmethod
    def of(cls, files: LanguageModelFiles, packed: Packed, bits: int | None = None) -> "ModelKey":
        """Return the key of a model's files, packed in the dtype that is computed in."""
        dtype = str(next(iter(packed.rest.layout.values())).dtype).removeprefix("torch.")
        return cls(files.hash.removeprefix("sha256:")[:32], dtype, bits, len(packed.layers), files.name)

    def __str__(self) -> str:
        return f"{self.hash}-{self.dtype}-{self.bits or 'full'}"


@dataclass(frozen=True)
class Announcement:
    """What a server says of itself: its span, its speed, its room.

    block_seconds: of a pass over one token, a block; throughput: tokens a second through the whole span;
    cache_bytes_left of cache_bytes; slot_bytes: of a token's keys and values in one block; waiting: passes in
    the queue; state: joining, online, leaving or offline.
    """

    peer: str
    addresses: tuple[str, ...]
    first: int
    last: int
    state: str
    block_seconds: float
    throughput: float
    cache_bytes: int
    cache_bytes_left: int
    slot_bytes: int
    waiting: int = 0
    sessions: int = 0

    def offer(self) -> Offer:
        """Return what routes are made of."""
        return Offer(
            self.peer, self.first, self.last, self.block_seconds, self.cache_bytes_left, self.slot_bytes,
            self.waiting,
        )  # fmt: skip

    @classmethod
    def parse(cls, peer: str, value: Any, blocks: int) -> "Announcement | None":
        """Return what a record says, None if it is of another form."""
        try:
            numbers = {
                name: _number(value[name], kind, most)
                for name, kind, most in (
                    *(("first", int, blocks), ("last", int, blocks)),
                    *(("block_seconds", float, 1e6), ("throughput", float, 1e12)),
                    *(("cache_bytes", int, 1 << 62), ("cache_bytes_left", int, 1 << 62)),
                    *(("slot_bytes", int, 1 << 40), ("waiting", int, 1 << 20), ("sessions", int, 1 << 20)),
                )
            }
            addresses = tuple(value["addresses"])
            are_texts = all(isinstance(each, str) for each in addresses)
            right = are_texts and len(addresses) <= _MOST_ADDRESSES and value["state"] in STATES
            if not right or not numbers["first"] < numbers["last"] or value["peer"] != peer:
                return None
            return cls(peer=peer, addresses=addresses, state=value["state"], **numbers)
        except (KeyError, TypeError, ValueError):
            return None


def _number(value: Any, kind: type, most: float) -> Any:
    if type(value) not in (int, kind) or not math.isfinite(value) or not 0 <= value <= most:
        raise ValueError(value)
    return kind(value)


def announce(node: Node, key: ModelKey, announcement: Announcement, seconds: float) -> None:
    """Let all find a server for `seconds`."""
    about = {"blocks": key.blocks, "name": key.name[-200:], "dtype": key.dtype, "bits": key.bits or 0}
    node.store(MODELS, str(key), about | {"hash": key.hash}, max(seconds, 60))
    record = asdict(announcement) | {"addresses": list(announcement.addresses)}
    node.store(f"t2iprobe/{key}", announcement.peer, record, seconds)


def find_models(node: Node) -> list[ModelKey]:
    """Return the models that were served within the last minute."""
    found = []
    for subkey, value in node.find(MODELS).items():
        key = _parse_key(value)
        if key is not None and str(key) == subkey:
            found.append(key)
    return sorted(found, key=str)


def _parse_key(value: Any) -> ModelKey | None:
    try:
        texts = [value[name] for name in ("hash", "dtype", "name")]
        if not all(isinstance(text, str) for text in texts):
            return None
        return ModelKey(
            texts[0], texts[1], _number(value["bits"], int, 16) or None,
            _number(value["blocks"], int, MOST_BLOCKS), texts[2],
        )  # fmt: skip
    except (KeyError, TypeError, ValueError):
        return None


def find_servers(node: Node, key: ModelKey) -> dict[str, Announcement]:
    """Return peer → what it says of itself, of all servers of a model that may be spoken to and are there."""
    found: Mapping[str, Any] = node.find(f"t2iprobe/{key}")
    parsed = {peer: Announcement.parse(peer, value, key.blocks) for peer, value in found.items()}
    return {
        peer: each
        for peer, each in parsed.items()
        if each is not None and each.state != "offline" and node.may_speak(peer)
    }
