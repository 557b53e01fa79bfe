"""A client's way through a swarm: a session on each server of a chain, and what replaces one that fails.

The client keeps what went into each span. When a server fails, others take its blocks over, read that again
at its own positions, and the pass goes on where it stood (Petals, section 3.2).
"""

import asyncio
import contextlib
import time
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from t2iprobe.errors import UserError
from t2iprobe.llm.engine.decoder import CHUNK
from t2iprobe.llm.swarm.frames import Frame, Kind, encode_frame
from t2iprobe.llm.swarm.history import History
from t2iprobe.llm.swarm.registry import Announcement, ModelKey, find_servers
from t2iprobe.llm.swarm.routing import Hop, MissingBlocks, describe_blocks, find_holes, find_route
from t2iprobe.llm.swarm.settings import Counters, Settings
from t2iprobe.llm.swarm.taught import Taught
from t2iprobe.llm.swarm.transport import Node, PeerError, Stream

__all__ = ["Counters", "Settings", "Swarm", "SwarmCache"]


class Swarm:
    """The servers of a model as a client sees them: who holds what, how far away, who failed."""

    def __init__(self, node: Node, key: ModelKey, settings: Settings | None = None) -> None:
        self.node, self.key = node, key
        self.settings = settings or Settings()
        self.counters = Counters()
        self.servers: dict[str, Announcement] = {}
        self.rtt: dict[str, float] = {}
        self._banned: dict[str, tuple[float, int]] = {}  # until when, and how often

    def refresh(self) -> None:
        """Look who is there, and measure how far away those are that are new."""
        with contextlib.suppress(TimeoutError):  # what is known so far may do
            self.servers = find_servers(self.node, self.key)
        new = [each for each in self.usable() if each.peer not in self.rtt]
        self.node.run(self._ping_all(new))

    async def _ping_all(self, servers: Sequence[Announcement]) -> None:
        async def ping(server: Announcement) -> None:
            try:
                stream = await asyncio.wait_for(
                    self.node.connect(server.peer, server.addresses), self.settings.ping_seconds
                )
                try:
                    asked, began = [encode_frame(Frame(Kind.PING))], time.perf_counter()
                    seconds = self.settings.ping_seconds
                    await stream.ask(asked, seconds, seconds, self.settings.delay_seconds, None)
                    self.rtt[server.peer] = time.perf_counter() - began
                finally:
                    stream.close()
            except (PeerError, TimeoutError):
                self.ban(server.peer)

        for start in range(0, len(servers), 16):
            await asyncio.gather(*map(ping, servers[start : start + 16]))

    def ban(self, peer: str) -> None:
        """Avoid a peer for a while, longer each time."""
        times = self._banned.get(peer, (0.0, 0))[1]
        self._banned[peer] = (time.monotonic() + self.settings.ban_seconds * 2 ** min(times, 5), times + 1)
        self.rtt.pop(peer, None)  # measured anew when it is taken again

    def forgive(self, peer: str) -> None:
        """A peer that works is no longer avoided longer each time."""
        self._banned.pop(peer, None)

    def usable(self) -> list[Announcement]:
        """Return the servers that are not avoided now."""
        now = time.monotonic()
        return [
            each
            for peer, each in self.servers.items()
            if each.state != "joining" and self._banned.get(peer, (0.0, 0))[0] <= now
        ]

    def route(self, first: int, last: int, tokens: int) -> list[Hop]:
        """Return the cheapest hops now. Raises MissingBlocks."""
        offers = [each.offer() for each in self.usable()]
        staying = [each.offer() for each in self.usable() if each.state == "online"]
        try:
            return find_route(staying, first, last, self.rtt, tokens)
        except MissingBlocks:
            return find_route(offers, first, last, self.rtt, tokens)

    def missing(self, first: int, last: int) -> list[int]:
        """Return the blocks that no server offers that is not avoided."""
        return find_holes([each.offer() for each in self.usable()], first, last)

    def ask(self, stream: Stream, frames: Sequence[bytes], rows: int) -> Frame:
        """Ask a server for a pass over so many rows, and count it."""
        settings, sent, got = self.settings, stream.sent_bytes, stream.received_bytes
        seconds = settings.step_seconds * max(1.0, rows / 256)
        try:
            return self.node.run(
                stream.ask(frames, seconds, settings.stall_seconds, settings.delay_seconds, settings.link)
            )
        finally:
            self.counters.round_trips += 1
            self.counters.sent_bytes += stream.sent_bytes - sent
            self.counters.received_bytes += stream.received_bytes - got

    def connect(self, peer: str) -> Stream:
        """Open a stream to a server. Raises PeerError."""
        if peer not in self.servers:
            raise PeerError(peer, "gone", "is not there")
        seconds = self.settings.stall_seconds
        return self.node.run(self._connect(self.servers[peer], seconds))

    async def _connect(self, server: Announcement, seconds: float) -> Stream:
        try:
            return await asyncio.wait_for(self.node.connect(server.peer, server.addresses), seconds)
        except TimeoutError:
            raise PeerError(server.peer, "stalled", "does not open a stream") from None

    def failed(self, error: PeerError) -> None:
        """Note a failure and avoid the peer; only for a moment where it had a reason to refuse."""
        if error.kind == "refused":
            until = time.monotonic() + self.settings.ban_seconds / 8
            self._banned[error.peer] = (until, self._banned.get(error.peer, (0.0, 0))[1])
        else:
            self.ban(error.peer)
        self.counters.failures.append(str(error))

    def insist(self, first: int, last: int, attempt: Callable[[], Any], because: object = "") -> Any:
        """Return what `attempt` does, made again for each PeerError or missing block as long as it may be.

        `because` is what it is needed for. Raises UserError when attempts or time are over, with the blocks
        that nobody serves.
        """
        settings = self.settings
        deadline, pause = time.monotonic() + settings.recover_seconds, 0.0
        last_error = str(because)
        failures = 0
        while True:
            try:
                return attempt()
            except PeerError as error:
                self.failed(error)
                failures, last_error = failures + 1, str(error)
            except MissingBlocks:
                time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
                pause = min(2 * pause + 0.1, 5.0)
            over = failures >= settings.attempts
            if over or time.monotonic() >= deadline:
                self.refresh()
                raise UserError(self._explain(first, last, last_error, over))
            self.refresh()

    def _explain(self, first: int, last: int, last_error: str, over: bool) -> str:
        reason = f"; last: {last_error}" if last_error else ""
        missing = self.missing(first, last)
        if missing:
            return (
                f"nobody serves {describe_blocks(missing)} of {self.key.name} "
                f"(looked for {self.settings.recover_seconds:g} s{reason}): "
                f"t2iprobe llm swarm join {self.key.name} --blocks {missing[0]}:{missing[-1] + 1}"
            )
        what = f"{self.settings.attempts} attempts" if over else f"{self.settings.recover_seconds:g} s"
        return f"the swarm does not answer after {what}{reason}: try again later"


class _Link:
    """A session on one server of the chain."""

    def __init__(self, swarm: Swarm, hop: Hop, batch: int, capacity: int) -> None:
        self.swarm, self.hop = swarm, hop
        self._stream = swarm.connect(hop.peer)
        self.before: list[tuple[str, Any]] = []  # what the server's cache must do before the next step
        self._steps = 0
        opened = {
            "model": str(swarm.key), "first": hop.first, "last": hop.last, "batch": batch,
            "capacity": capacity, "eight_bits": swarm.settings.eight_bits,
        }  # fmt: skip
        self._first = [encode_frame(Frame(Kind.OPEN, opened))]

    def step(self, hidden: Tensor, positions: Tensor, mask: Tensor, wanted: int) -> Tensor:
        """Run rows [B, n, hidden] on the server; return the last `wanted` of what comes out.

        Raises PeerError, also for an answer of another shape.
        """
        fields = {"step": self._steps, "before": self.before, "wanted": wanted}
        frame = Frame(Kind.STEP, fields, (hidden, positions, mask))
        data = encode_frame(frame, (0,) if self.swarm.settings.eight_bits else ())
        answer = self.swarm.ask(self._stream, [*self._first, data], positions.numel())
        out = answer.tensors[0] if len(answer.tensors) == 1 else None
        shape = (hidden.shape[0], min(wanted, hidden.shape[1]), hidden.shape[2])
        if out is None or tuple(out.shape) != shape or answer.fields.get("step") != self._steps:
            raise PeerError(self.hop.peer, "broken", "answered with something else")
        if not bool(torch.isfinite(out).all()):
            raise PeerError(self.hop.peer, "broken", "answered with numbers that are none")
        self._first, self.before, self._steps = [], [], self._steps + 1
        self.swarm.forgive(self.hop.peer)
        return out.to(hidden.dtype)

    def close(self) -> None:
        self._stream.close()


class SwarmCache:
    """The caches of a batch of texts, which lie on the servers; to the engine it is a `RowCache`.

    What was `taught` stands before every text, and between blocks: there one server ends and another begins.
    """

    def __init__(self, swarm: Swarm, batch: int, capacity: int, taught: Taught | None = None) -> None:
        taught = taught or Taught()
        self._swarm, self._batch = swarm, batch
        self._prefix, self._adapters = taught.prompt, taught.adapters
        self.shift = 0 if self._prefix is None else len(self._prefix)
        self._history = History(batch, capacity + self.shift, torch.device("cpu"))
        self._links: list[_Link] = []
        self._masks: list[Tensor] = []  # of the passes that are pending
        weakref.finalize(self, _close_all, self._links)

    @property
    def lengths(self) -> list[int]:
        """Committed tokens of each text."""
        return [max(0, length - self.shift) for length in self._history.lengths]

    @property
    def pending(self) -> int:
        """Rows that ran since."""
        return self._history.pending

    @property
    def capacity(self) -> int:
        """Slots of each text."""
        return self._history.capacity - self.shift

    @property
    def history_bytes(self) -> int:
        """Bytes of the inputs that are kept."""
        return self._history.nbytes

    def keep(self, rows: Sequence[Tensor | Sequence[int]]) -> None:
        """As `RowCache.keep`; the servers are told with their next step."""
        self._history.keep(rows)
        self._masks.clear()
        listed = [torch.as_tensor(chosen, dtype=torch.int64).tolist() for chosen in rows]
        self._tell("keep", [len(row) if row == list(range(len(row))) else row for row in listed])

    def select(self, rows: Sequence[int]) -> None:
        """As `RowCache.select`."""
        self._history.select(rows)
        self._batch = len(rows)
        self._masks = [mask[list(rows)] for mask in self._masks]
        if rows:
            self._tell("select", list(rows))
        else:
            self.close()

    def crop(self, lengths: Sequence[int]) -> None:
        """As `RowCache.crop`."""
        lengths = [length + self.shift for length in lengths]
        self._history.crop(lengths)
        self._masks.clear()
        self._tell("crop", lengths)

    def _tell(self, name: str, rows: Any) -> None:
        for link in self._links:
            link.before.append((name, rows))

    def close(self) -> None:
        """End the sessions."""
        _close_all(self._links)

    def run(self, hidden: Tensor, positions: Tensor, tree_mask: Tensor, wanted: int) -> Tensor:
        """Run rows [B, n, hidden] through all blocks; return the last `wanted` rows of what comes out.

        Positions and mask are those of `Decoder.forward`. Raises UserError when a block is served by nobody
        for longer than the settings allow.
        """
        if self._prefix is not None and not any(self._history.lengths) and not self.pending:
            self._run_prefix(self._prefix.to(hidden))
        # As many rows at a time as a frame holds by far; those before are pending for those behind.
        rows, before = hidden.shape[1], self.pending
        step = max(1, self._swarm.node.limits.body_bytes // 4 // max(1, hidden[:, :1].nbytes))
        found = []
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            mask = tree_mask[:, part, : before + part.stop]
            own = max(0, part.stop - max(start, rows - wanted))
            found.append(self._run(hidden[:, part], positions[:, part] + self.shift, mask, own))
        return torch.cat(found, 1)

    def _run_prefix(self, prefix: Tensor) -> None:
        count = len(prefix)
        positions = torch.arange(count).expand(self._batch, -1)
        mask = torch.ones(self._batch, count, count, dtype=torch.bool).tril()
        self._run(prefix.expand(self._batch, -1, -1), positions, mask, 0)
        self.keep([range(count)] * self._batch)

    def _run(self, hidden: Tensor, positions: Tensor, mask: Tensor, wanted: int) -> Tensor:
        self._history.reserve(positions)
        self._spare_memory(hidden)
        blocks, entered = self._swarm.key.blocks, {0: self._adapt(hidden, 0)}
        if not self._links:
            self._swarm.refresh()
            self._replace(0, blocks)
        block, failures = 0, 0
        while block < blocks:
            link = next(each for each in self._links if each.hop.first == block)
            if self._keeps(block, hidden):
                self._history.put(block, entered[block])
            is_last = link.hop.last == blocks
            try:
                out = link.step(entered[block], positions, mask, wanted if is_last else hidden.shape[1])
                block = link.hop.last
                entered[block] = self._adapt(out, block)
            except PeerError as error:
                failures += 1
                if failures > self._swarm.settings.attempts:
                    self.close()
                    raise UserError(
                        f"the swarm fails a pass again and again ({error}): try again later"
                    ) from None
                block = self._recover(link, error)
        self._history.advance(hidden.shape[1])
        self._masks.append(mask)
        return entered[blocks]

    def _keeps(self, block: int, hidden: Tensor) -> bool:
        """Whether a block's inputs are kept: all were so far, and they fit."""
        kept, most = self._history.blocks(), self._swarm.settings.history_bytes
        is_new = not any(self._history.lengths) and not self.pending
        fits = max(len(kept), 1) * self._block_bytes(hidden) <= most
        return block in kept or (is_new and (block == 0 or fits))

    def _block_bytes(self, hidden: Tensor) -> int:
        return self._batch * self._history.capacity * hidden.shape[2] * hidden.element_size()

    def _spare_memory(self, hidden: Tensor) -> None:
        """Forget the inputs of the latest blocks where all take more than they may; the first's stay."""
        most = self._swarm.settings.history_bytes
        while len(self._history.blocks()) > 1 and (
            (len(self._history.blocks()) - 1) * self._block_bytes(hidden) > most
        ):
            self._history.drop(self._history.blocks()[-1])

    def _recover(self, failed: _Link, error: PeerError) -> int:
        """Let others take over what `failed` did and read again what it had; return the block to go on at."""
        began = time.perf_counter()
        self._swarm.failed(error)
        # Where its own inputs were too many to keep, those before it compute them again.
        begins = {link.hop.first for link in self._links}
        first = max(
            block for block in self._history.blocks() if block <= failed.hop.first and block in begins
        )
        self._replace(first, failed.hop.last, error)
        self._swarm.counters.reroutes += 1
        self._swarm.counters.recovery_seconds += time.perf_counter() - began
        return first

    def _replace(self, first: int, last: int, because: object = "") -> None:
        """Open sessions for blocks first … last − 1 in place of those that are there; fill their caches."""
        gone = [link for link in self._links if first <= link.hop.first < last]
        self._links[:] = [link for link in self._links if link not in gone]
        _close_all(gone)
        try:
            made = self._swarm.insist(first, last, lambda: self._open(first, last), because)
        except BaseException:
            self.close()  # a chain with a gap is none
            raise
        self._links[:] = sorted([*self._links, *made], key=lambda link: link.hop.first)
        begins = {link.hop.first for link in self._links}
        for block in set(self._history.blocks()) - begins - {0}:
            self._history.drop(block)

    def _open(self, first: int, last: int) -> list[_Link]:
        tokens = self._batch * self._history.capacity
        made: list[_Link] = []
        try:
            borders = () if self._adapters is None else self._adapters.borders
            cuts = [first, *(border for border in borders if first < border < last), last]
            for hop in [hop for span in pairwise(cuts) for hop in self._swarm.route(*span, tokens)]:
                made.append(_Link(self._swarm, hop, self._batch, self._history.capacity))
            self._replay(made)
        except BaseException:
            _close_all(made)
            raise
        return made

    def _replay(self, links: Sequence[_Link]) -> None:
        """Let new servers read what the text and the pending rows were, each at its own position."""
        lengths = torch.tensor(self._history.lengths)
        longest = int(lengths.max())
        if not longest and not self._masks:
            return
        for place, link in enumerate(links):
            further = links[place + 1].hop.first if place + 1 < len(links) else None
            step = max(1, CHUNK // self._batch)
            for start in range(0, longest, step):
                slots = torch.arange(start, min(start + step, longest)).expand(self._batch, -1)
                size, real = slots.shape[1], slots < lengths[:, None]
                mask = torch.ones(size, size, dtype=torch.bool).tril() & real[:, None, :]
                self._replay_rows(link, slots, mask, further)
                link.before.append(("keep", real.sum(1).tolist()))
            done = 0
            for mask in self._masks:
                count = mask.shape[1]
                slots = lengths[:, None] + done + torch.arange(count)
                self._replay_rows(link, slots, mask, further)
                done += count
        self._swarm.counters.replayed_tokens += int(lengths.sum()) + self._batch * self.pending

    def _replay_rows(self, link: _Link, slots: Tensor, mask: Tensor, further: int | None) -> None:
        history = self._history
        hidden = history.rows(link.hop.first, slots)
        positions = history.positions.gather(1, slots)
        out = link.step(hidden, positions, mask, 0 if further is None else slots.shape[1])
        if further is not None:
            history.fill(further, slots, self._adapt(out, further))

    def _adapt(self, hidden: Tensor, block: int) -> Tensor:
        return hidden if self._adapters is None else self._adapters(hidden, block)


def _close_all(links: list[_Link]) -> None:
    for link in links:
        link.close()
    links.clear()
