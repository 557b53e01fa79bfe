"""A machine that joins a swarm: which blocks it takes, what it says of itself, when it moves, how it goes."""

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from t2iprobe.errors import UserError
from t2iprobe.llm.commands import pack_model
from t2iprobe.llm.memory.placement import Placement
from t2iprobe.llm.models import find_language_model
from t2iprobe.llm.swarm.balancing import Placed, block_throughputs, choose_first, decide_move, may_leave
from t2iprobe.llm.swarm.blocks import Blocks, load_blocks
from t2iprobe.llm.swarm.registry import ModelKey, announce, find_servers
from t2iprobe.llm.swarm.server import BlockServer, ServerSettings, measure_blocks
from t2iprobe.llm.swarm.transport import Node

__all__ = ["Joining", "join", "parse_blocks"]

# A record outlives so many renewals that did not come.
_LIVES = 3


@dataclass(frozen=True)
class Joining:
    """How a server joins.

    `blocks`: "0:10" are held for good; "10" are so many, held where the swarm is weakest, and moved; None:
    all. `period_seconds`: between two announcements; `balance_seconds`: between two looks whether to move, on
    average. `bits`, `memory`: of the weights; without a `placement`, as many blocks stay as that memory holds
    (see `load_blocks`).
    """

    blocks: str | None = None
    peers: Sequence[str] = ()
    host: str = "127.0.0.1"
    port: int = 0
    dtype: str = "auto"
    device: str = "cpu"
    bits: int | None = None
    memory: int | None = None
    placement: Placement | None = None
    allowed: Collection[str] | None = None
    identity: Path | None = None
    period_seconds: float = 10.0
    balance_seconds: float = 60.0
    settings: ServerSettings = field(default_factory=ServerSettings)


def parse_blocks(text: str | None, count: int) -> tuple[int | None, int]:
    """Return the first block (None: wherever it is best) and how many. Raises UserError."""
    if text is None:
        return 0, count
    first, colon, last = text.partition(":")
    try:
        if not colon:
            length = int(first)
            if 0 < length <= count:
                return None, length
        elif 0 <= int(first) < int(last) <= count:
            return int(first), int(last) - int(first)
    except ValueError:
        pass
    raise UserError(f"the model has blocks 0:{count}: write --blocks 0:{count}, or how many, not {text!r}")


def join(
    model: str,
    how: Joining,
    *,
    ready: Callable[[Node, BlockServer], None],
    stop: threading.Event | None = None,
    make_server: Callable[..., BlockServer] = BlockServer,
) -> None:
    """Serve blocks of a model until SIGTERM or SIGINT, or until `stop` is set.

    `ready` is called as soon as others find the server. Raises UserError for a model, blocks or an address
    that there are not.
    """
    stop = stop or threading.Event()
    files = find_language_model(model)
    packed = pack_model(files, how.dtype, how.device)
    count = len(packed.layers)
    first, length = parse_blocks(how.blocks, count)
    key = ModelKey.of(files, packed, how.bits if how.placement is None else how.placement.weight_bits)
    speaker: list[BlockServer] = []

    async def accept(peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if speaker:  # its blocks are there
            await speaker[0].accept(peer, reader, writer)

    with _stopped_by_signals(stop), contextlib.ExitStack() as stack:
        node = stack.enter_context(
            Node(
                how.peers, host=how.host, port=how.port, accept=accept, allowed=how.allowed,
                identity=how.identity,
            )
        )  # fmt: skip
        is_fixed = first is not None
        if first is None:
            first = choose_first(block_throughputs(_placed(node, key), count), length)

        def load(begin: int) -> Callable[[], Blocks]:
            return lambda: load_blocks(
                files, begin, begin + length, dtype=how.dtype, device=how.device, bits=how.bits,
                memory=how.memory, placement=how.placement,
            )  # fmt: skip

        blocks = load(first)()
        server = make_server(key, blocks, settings=how.settings)
        stack.callback(server.close)
        server.block_seconds, server.throughput = measure_blocks(server.blocks)
        speaker.append(server)
        server.state = "online"
        _announce(node, server, how)
        ready(node, server)
        mover = None if is_fixed else _Mover(node, server, how, load)
        while not stop.wait(how.period_seconds):
            try:
                _announce(node, server, how)
                if mover is not None:
                    mover.look(stop)
            except TimeoutError:
                pass  # the next one may come through
            except Exception:
                if not stop.wait(1):  # Ctrl-C has ended the daemon, too
                    raise
        server.state = "offline"
        with contextlib.suppress(Exception):  # the daemon may have ended before
            _announce(node, server, how)


def _announce(node: Node, server: BlockServer, how: Joining, lives: float = _LIVES) -> None:
    announcement = server.announcement(node.peer_id, node.addresses)
    announce(node, server.key, announcement, lives * how.period_seconds)


def _placed(node: Node, key: ModelKey) -> list[Placed]:
    return [
        Placed(peer, each.first, each.last, each.throughput, each.state == "leaving")
        for peer, each in find_servers(node, key).items()
    ]


class _Mover:
    """Looks now and then whether its server does more good elsewhere, and moves it."""

    def __init__(
        self, node: Node, server: BlockServer, how: Joining, load: Callable[[int], Callable[[], Blocks]]
    ) -> None:
        self.node, self.server, self.how, self.load = node, server, how, load
        self.rng = np.random.default_rng()
        self._plan()

    def _plan(self) -> None:
        # At random, so that servers do not all look at the same moment.
        self.due = time.monotonic() + self.rng.uniform(0, 2 * self.how.balance_seconds)

    def look(self, stop: threading.Event) -> None:
        """Move if it is time and worth it; first tell, so that two servers do not leave the same blocks."""
        if time.monotonic() < self.due:
            return
        self._plan()
        server, key = self.server, self.server.key
        first = decide_move(self._seen(), self.node.peer_id, key.blocks, self.rng)
        if first is None:
            return
        server.state = "leaving"
        _announce(self.node, server, self.how)
        if not stop.wait(self.how.period_seconds):  # others that left have told by now
            if may_leave(self._seen(), self.node.peer_id, key.blocks):
                self._move(first)
        server.state = "online"
        _announce(self.node, server, self.how)

    def _move(self, first: int) -> None:
        """Load other blocks. Meanwhile others count the server where it will be, and do not go there too."""
        server = self.server
        server.state, server.planned = "joining", (first, first + server.blocks.last - server.blocks.first)
        _announce(self.node, server, self.how, lives=10 * _LIVES)  # nobody renews it while blocks are loaded
        self.node.run(server.move(self.load(first)))
        server.planned = None
        server.block_seconds, server.throughput = measure_blocks(server.blocks)

    def _seen(self) -> list[Placed]:
        others = [each for each in _placed(self.node, self.server.key) if each.peer != self.node.peer_id]
        blocks = self.server.blocks
        own = Placed(self.node.peer_id, blocks.first, blocks.last, self.server.throughput)
        return [*others, replace(own, is_leaving=self.server.state == "leaving")]


@contextlib.contextmanager
def _stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    """Let SIGTERM and SIGINT end the serving; only a process's main thread hears them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
