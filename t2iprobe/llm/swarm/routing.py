"""Which servers a pass goes through: the cheapest path over (peer, block)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Hop", "MissingBlocks", "Offer", "find_holes", "find_route", "hop_seconds"]

# What a hop costs beside the network and the blocks: frames, streams, queues.
OVERHEAD_SECONDS = 0.002
# Of a peer whose round trip has not been measured.
UNKNOWN_SECONDS = 0.15
# A server without room for the cache is taken only where there is no other (Petals).
FULL_SECONDS = 10.0


@dataclass(frozen=True)
class Offer:
    """What a peer offers: blocks first … last − 1, seconds a block and pass, bytes for caches.

    `slot_bytes` are those of one token in one block; `waiting` are the passes that stand in its queue.
    """

    peer: str
    first: int
    last: int
    block_seconds: float = 0.0
    cache_bytes_left: int = 1 << 62
    slot_bytes: int = 0
    waiting: int = 0


@dataclass(frozen=True)
class Hop:
    """Blocks first … last − 1 by one peer."""

    peer: str
    first: int
    last: int


class MissingBlocks(Exception):
    """Nobody serves these blocks."""

    def __init__(self, blocks: Sequence[int]) -> None:
        super().__init__(describe_blocks(blocks))
        self.blocks = tuple(blocks)


def describe_blocks(blocks: Sequence[int]) -> str:
    """Return "block 3" or "blocks 3–5, 9"."""
    runs: list[list[int]] = []
    for block in sorted(blocks):
        if runs and block == runs[-1][1] + 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    listed = ", ".join(f"{first}" if first == last else f"{first}–{last}" for first, last in runs)
    return f"block{'s' if len(blocks) > 1 else ''} {listed}"


def find_holes(offers: Iterable[Offer], first: int, last: int) -> list[int]:
    """Return the blocks of first … last − 1 that nobody offers."""
    served = {block for offer in offers for block in range(offer.first, offer.last)}
    return [block for block in range(first, last) if block not in served]


def hop_seconds(offer: Offer, blocks: int, tokens: int, rtt: Mapping[str, float]) -> float:
    """Return what entering a server costs before its blocks: the round trip, its queue, a lack of room."""
    seconds = rtt.get(offer.peer, UNKNOWN_SECONDS) + OVERHEAD_SECONDS
    seconds += offer.waiting * offer.block_seconds * (offer.last - offer.first)
    if tokens * offer.slot_bytes * blocks > offer.cache_bytes_left:
        seconds += FULL_SECONDS
    return seconds


def find_route(
    offers: Iterable[Offer],
    first: int,
    last: int,
    rtt: Mapping[str, float] | None = None,
    tokens: int = 0,
) -> list[Hop]:
    """Return the cheapest hops through blocks first … last − 1: the shortest path over (peer, block).

    `rtt` holds seconds of a round trip by peer; `tokens` is what a cache must hold. All hops begin at the
    client, so each costs a round trip. A peer may be entered and left at any of its blocks. Raises
    MissingBlocks.
    """
    offers = sorted(offers, key=lambda offer: offer.peer)
    rtt = rtt or {}
    if holes := find_holes(offers, first, last):
        raise MissingBlocks(holes)
    # best[b]: the least seconds to have blocks first … b − 1 behind one, and the last hop of that path.
    best: dict[int, float] = {first: 0.0} | dict.fromkeys(range(first + 1, last + 1), math.inf)
    came: dict[int, Hop] = {}
    for begin in range(first, last):
        for offer in offers:
            if not offer.first <= begin < offer.last:
                continue
            for end in range(begin + 1, min(offer.last, last) + 1):
                count = end - begin
                cost = best[begin] + hop_seconds(offer, count, tokens, rtt) + count * offer.block_seconds
                if cost < best[end]:
                    best[end], came[end] = cost, Hop(offer.peer, begin, end)
    hops: list[Hop] = []
    while not hops or hops[0].first > first:
        hops.insert(0, came[hops[0].first if hops else last])
    return hops


def route_seconds(
    hops: Sequence[Hop], offers: Iterable[Offer], rtt: Mapping[str, float], tokens: int = 0
) -> float:
    """Return what a route costs."""
    by_peer = {offer.peer: offer for offer in offers}
    return sum(
        hop_seconds(by_peer[hop.peer], hop.last - hop.first, tokens, rtt)
        + (hop.last - hop.first) * by_peer[hop.peer].block_seconds
        for hop in hops
    )
