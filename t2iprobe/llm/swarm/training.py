"""Gradients through a swarm: remote blocks as one differentiable function, whoever dies between the ways.

Servers keep nothing between a forward and a backward pass: the client keeps what went in, and asks whoever
serves the blocks then. So a server that dies in between costs one more forward pass.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from t2iprobe.errors import UserError
from t2iprobe.llm.swarm.blocks import Blocks
from t2iprobe.llm.swarm.frames import Frame, Kind, encode_frame
from t2iprobe.llm.swarm.routing import Hop
from t2iprobe.llm.swarm.session import Swarm
from t2iprobe.llm.swarm.transport import PeerError, Stream

__all__ = ["BlockChain", "LocalChain", "SwarmChain", "run_blocks"]


class BlockChain(Protocol):
    """Whoever computes blocks of a model forward and backward."""

    @property
    def blocks(self) -> int:
        """How many blocks the model has."""

    def forward(self, rows: "Rows", first: int, last: int) -> Tensor:
        """Return what leaves block last − 1, [B, n, hidden]."""

    def backward(self, rows: "Rows", gradient: Tensor, first: int, last: int) -> Tensor:
        """Return the gradient at the input of block `first` from that at the output of block last − 1."""


@dataclass(frozen=True)
class Rows:
    """What goes into blocks: hidden [B, n, hidden], positions int64 [B, n], mask bool [B, n, n]."""

    hidden: Tensor
    positions: Tensor
    mask: Tensor

    def of(self, hidden: Tensor) -> "Rows":
        """Return the same places with other hidden states."""
        return Rows(hidden, self.positions, self.mask)


def run_blocks(chain: BlockChain, rows: Rows, first: int, last: int) -> Tensor:
    """Return what leaves block last − 1; gradients pass through to `rows.hidden`."""
    return _Remote.apply(rows.hidden, rows, chain, first, last)


class _Remote(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: Rows, chain: BlockChain, first: int, last: int) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.rest = rows, chain, first, last
        return chain.forward(rows.of(hidden.detach()), first, last).to(hidden.device)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        rows, chain, first, last = ctx.rest
        (hidden,) = ctx.saved_tensors
        gradient = chain.backward(rows.of(hidden), gradients[0], first, last)
        return gradient.to(hidden.device), None, None, None, None


class LocalChain:
    """All blocks of a model in this process."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks

    @property
    def blocks(self) -> int:
        """How many blocks the model has."""
        return self._blocks.last

    def forward(self, rows: Rows, first: int, last: int) -> Tensor:
        """Return what leaves block last − 1."""
        return self._blocks.forward(rows.hidden, rows.positions, rows.mask, range(first, last))

    def backward(self, rows: Rows, gradient: Tensor, first: int, last: int) -> Tensor:
        """Return the gradient at the input of block `first`."""
        return self._blocks.backward(rows.hidden, rows.positions, rows.mask, gradient, range(first, last))


class SwarmChain:
    """The blocks of a model as a swarm serves them."""

    def __init__(self, swarm: Swarm) -> None:
        self.swarm = swarm
        self._streams: dict[str, Stream] = {}
        self._failures = 0  # one after another

    @property
    def blocks(self) -> int:
        """How many blocks the model has."""
        return self.swarm.key.blocks

    def begins(self) -> list[int]:
        """Return where the spans of the route through all blocks begin now. Raises UserError as `forward`."""
        found, block = [], 0
        while block < self.blocks:
            found.append(block)
            block = self._next_hop(block, self.blocks).last
        return found

    def forward(self, rows: Rows, first: int, last: int) -> Tensor:
        """Return what leaves block last − 1. Raises UserError where nobody serves blocks for too long."""
        hidden, block = rows.hidden, first
        while block < last:
            hop, hidden = self._send_next(rows.of(hidden), block, last)
            block = hop.last
        return hidden

    def backward(self, rows: Rows, gradient: Tensor, first: int, last: int) -> Tensor:
        """Return the gradient at the input of block `first`; the inputs between servers are computed anew."""
        entered, hops, block = [rows.hidden], [], first
        while block < last:
            hop = self._next_hop(block, last)
            if hop.last < last:  # the way there, but for the last server's blocks
                hop, out = self._send_next(rows.of(entered[-1]), block, last)
                if hop.last < last:
                    entered.append(out)
            hops.append(hop)
            block = hop.last
        for hop, inputs in zip(reversed(hops), reversed(entered), strict=True):
            gradient = self._backward_span(rows.of(inputs), gradient, hop)
        return gradient

    def _next_hop(self, first: int, last: int) -> Hop:
        """Return who is asked for block `first`. Raises UserError where nobody serves it for too long."""

        def attempt() -> Hop:
            if not self.swarm.servers:
                self.swarm.refresh()
            return self.swarm.route(first, last, 0)[0]

        found: Hop = self.swarm.insist(first, last, attempt)
        return found

    def _send_next(self, rows: Rows, first: int, last: int) -> tuple[Hop, Tensor]:
        """Send rows forward through a hop from block `first` on; through another one for each that fails."""

        def attempt() -> tuple[Hop, Tensor]:
            hop = self._next_hop(first, last)
            try:
                return hop, self._send(rows, hop)
            except PeerError:
                self._drop(hop.peer)
                self.swarm.counters.reroutes += 1
                raise

        found: tuple[Hop, Tensor] = self.swarm.insist(first, last, attempt)
        return found

    def _backward_span(self, rows: Rows, gradient: Tensor, hop: Hop) -> Tensor:
        """Go back through a hop's blocks: by that server, or by others if it has gone meanwhile."""
        try:
            found = self._send(rows, hop, gradient)
            self._failures = 0
            return found
        except PeerError as error:
            self.swarm.failed(error)
            self._failures += 1
            if self._failures > self.swarm.settings.attempts:
                raise UserError(
                    f"the swarm fails a pass again and again ({error}): try again later"
                ) from None
            self._drop(hop.peer)
            self.swarm.counters.reroutes += 1
            self.swarm.counters.replayed_tokens += rows.positions.numel()
        return self.backward(rows, gradient, hop.first, hop.last)

    def _send(self, rows: Rows, hop: Hop, *gradient: Tensor) -> Tensor:
        swarm, kind = self.swarm, Kind.BACKWARD if gradient else Kind.FORWARD
        eight = swarm.settings.eight_bits
        fields = {"model": str(swarm.key), "first": hop.first, "last": hop.last, "eight_bits": eight}
        frame = Frame(kind, fields, (rows.hidden, rows.positions, rows.mask, *gradient))
        if hop.peer not in self._streams:
            self._streams[hop.peer] = swarm.connect(hop.peer)
        data = encode_frame(frame, (0, 3) if eight else ())
        answer = swarm.ask(self._streams[hop.peer], [data], rows.positions.numel())
        if len(answer.tensors) != 1 or answer.tensors[0].shape != rows.hidden.shape:
            raise PeerError(hop.peer, "broken", "answered with something else")
        if not bool(torch.isfinite(answer.tensors[0]).all()):
            raise PeerError(hop.peer, "broken", "answered with numbers that are none")
        swarm.forgive(hop.peer)
        return answer.tensors[0].to(rows.hidden.dtype)

    def _drop(self, peer: str) -> None:
        if peer in self._streams:
            self._streams.pop(peer).close()

    def close(self) -> None:
        """Give the streams up."""
        for peer in list(self._streams):
            self._drop(peer)
