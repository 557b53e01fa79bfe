"""Where a server's span does the most good, and when to move it (Petals, section 3.2): pure functions.

A move never opens a hole, and makes the swarm's weakest blocks stronger; so every row of moves ends.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

__all__ = ["Placed", "block_throughputs", "choose_first", "decide_move"]

# A move must promise a third more than there is.
BALANCE = 0.75
_EPSILON = 1e-9


@dataclass(frozen=True)
class Placed:
    """A server's span, blocks first … last − 1, and the tokens a second that it adds to each of them."""

    peer: str
    first: int
    last: int
    throughput: float
    is_leaving: bool = False

    @property
    def length(self) -> int:
        """How many blocks it holds."""
        return self.last - self.first


def block_throughputs(servers: Sequence[Placed], blocks: int) -> np.ndarray:
    """Return tokens a second of each block, float64 [blocks]."""
    found = np.zeros(blocks)
    for server in servers:
        found[server.first : server.last] += server.throughput
    return found


def choose_first(throughputs: np.ndarray, length: int) -> int:
    """Return where `length` blocks are the weakest: the least window, sorted, in lexical order (Petals)."""
    # Other servers' sums leave rounding behind, which must decide nothing.
    rounded, length = np.round(throughputs, 9), min(length, len(throughputs))
    starts = np.arange(len(rounded) - length + 1)
    ordered = np.sort(rounded[starts[:, None] + np.arange(length)], axis=1).tolist()
    return ordered.index(min(ordered))


def decide_move(
    servers: Sequence[Placed], peer: str, blocks: int, rng: np.random.Generator, balance: float = BALANCE
) -> int | None:
    """Return the block at which `peer` should begin from now on, None where it should stay.

    It stays where it would leave a block to nobody. Else it looks where all servers would end if each moved
    to its best place, and goes if the weakest block of that swarm is so much stronger that now is less than
    `balance` of it, or if its own move alone closes a hole. A server that is leaving counts as gone already.
    """
    own = next(server for server in servers if server.peer == peer)
    others = [server for server in servers if server.peer != peer and not server.is_leaving]
    before = block_throughputs([*others, own], blocks)
    without = block_throughputs(others, blocks)
    if (without[own.first : own.last] <= _EPSILON).any():
        return None
    first = choose_first(without, own.length)
    if first == own.first:
        return None
    after = block_throughputs([*others, replace(own, first=first, last=first + own.length)], blocks)
    if not _is_better(after, before):
        return None
    if (after > _EPSILON).sum() > (before > _EPSILON).sum():
        return first
    settled = settle([*others, own], blocks, rng)
    hope = block_throughputs(settled, blocks).min()
    return first if before.min() < balance * hope - _EPSILON else None


def settle(servers: Sequence[Placed], blocks: int, rng: np.random.Generator) -> list[Placed]:
    """Return where servers end that move one after another, in random order, until none gets better."""
    placed: dict[str, Placed] = {server.peer: server for server in servers}
    total = block_throughputs(servers, blocks)
    moved = True
    while moved:
        moved = False
        for peer in rng.permutation(sorted(placed)):
            total, moved_now = _improve(placed, str(peer), total)
            moved |= moved_now
    return list(placed.values())


def _improve(placed: dict[str, Placed], peer: str, total: np.ndarray) -> tuple[np.ndarray, bool]:
    """Move one server to its best place if that is better for the swarm as a whole."""
    server = placed[peer]
    without = total.copy()
    without[server.first : server.last] -= server.throughput
    first = choose_first(without, server.length)
    after = without.copy()
    after[first : first + server.length] += server.throughput
    if first == server.first or not _is_better(after, total):
        return total, False
    placed[peer] = replace(server, first=first, last=first + server.length)
    return after, True


def _is_better(after: np.ndarray, before: np.ndarray) -> bool:
    """Whether the weakest block, then the next, … is stronger. Finite: every move goes up in this order."""
    gain = np.sort(after) - np.sort(before)
    unequal = np.abs(gain) > _EPSILON + 1e-6 * np.sort(before)
    return bool(unequal.any() and gain[unequal.argmax()] > 0)


def may_leave(servers: Sequence[Placed], peer: str, blocks: int) -> bool:
    """Whether `peer`, which has said that it leaves, may: with it and those before it gone, nothing lacks.

    Of servers that are leaving at the same time the one with the lower name goes first, so that two that
    cover for each other never go together.
    """
    own = next(server for server in servers if server.peer == peer)
    staying = [
        server for server in servers if server.peer != peer and not (server.is_leaving and server.peer < peer)
    ]
    left = block_throughputs(staying, blocks)
    return bool((left[own.first : own.last] > _EPSILON).all())


def describe(servers: Sequence[Placed], blocks: int) -> Mapping[str, float | list[int]]:
    """Return the swarm's throughput, that of its weakest block, and its holes."""
    found = block_throughputs(servers, blocks)
    return {"throughput": float(found.min()), "holes": np.nonzero(found <= _EPSILON)[0].tolist()}
