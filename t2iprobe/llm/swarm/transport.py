"""Peers that find and talk to each other: hivemind's libp2p daemon (streams) and DHT (records that expire).

All of it runs in one asyncio loop in a thread of the node's own; the methods may be called from any thread.
"""

import asyncio
import contextlib
import logging
import threading
import time
import warnings
import weakref
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from t2iprobe.errors import UserError
from t2iprobe.llm.swarm.frames import (
    SLOWEST_LINK,
    BrokenFrame,
    Frame,
    Kind,
    Limits,
    encode_frame,
    read_frame,
)

__all__ = ["Accept", "Node", "PeerError", "Stream"]

PROTOCOL = "t2iprobe-swarm-1"
# Of records in the DHT: a peer can fill another's memory only so far.
MOST_RECORD_BYTES, MOST_RECORDS, MOST_RECORD_SECONDS = 4096, 20_000, 3600.0
_START_SECONDS, _ASK_SECONDS, _CLOSE_SECONDS = 60.0, 15.0, 15.0
T = TypeVar("T")
# Called with the remote peer's id, and reader and writer of its stream.
Accept = Callable[[str, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class PeerError(Exception):
    """A peer is gone, stalls, sends what is broken, or refuses. `kind` is one of these four words."""

    def __init__(self, peer: str, kind: str, text: str) -> None:
        super().__init__(f"peer …{peer[-6:]} {text}")
        self.peer, self.kind = peer, kind


class Node:
    """A peer of a swarm: it has an id, an address, records that others find and streams to others.

    Args:
        peers: addresses of some that are there, none to begin a swarm.
        host: address to listen on.
        port: 0 for any free one.
        accept: who speaks to peers that open a stream; without, nobody can.
        allowed: ids of the only peers that may open streams and are spoken to; None for all.
        identity: file with the private key that the id comes from, made where it is not there.
        limits: of a frame.

    Raises UserError where hivemind is not installed, or none of `peers` answers.
    """

    def __init__(
        self,
        peers: Sequence[str] = (),
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        accept: Accept | None = None,
        allowed: Collection[str] | None = None,
        identity: Path | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.allowed = None if allowed is None else frozenset(allowed)
        self._accept = accept
        self._p2p: Any = None
        self._dht: Any = None
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._loop = asyncio.new_event_loop()
        # hivemind's own tasks end in errors when their daemon does, as by Ctrl-C, and nobody asks for them.
        self._loop.set_exception_handler(_note_error)
        self._thread = threading.Thread(target=self._loop.run_forever, name="swarm node", daemon=True)
        self._thread.start()
        try:
            self.run(self._start(peers, host, port, identity), _START_SECONDS)
        except BaseException as error:
            self.close()
            if isinstance(error, Exception) and not isinstance(error, UserError):
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                where = f"join the swarm at {', '.join(peers)}" if peers else "begin a swarm"
                raise UserError(
                    f"cannot {where} ({reason[:200]}): is the address right, and its server alive?"
                ) from error
            raise

    async def _start(self, peers: Sequence[str], host: str, port: int, identity: Path | None) -> None:
        with _quiet_hivemind():
            try:
                from hivemind.dht.node import DHTNode
                from hivemind.p2p import P2P, P2PDaemonError
            except ImportError:
                raise UserError("a swarm needs hivemind: pip install 't2iprobe[swarm]'") from None
        family = "ip6" if ":" in host else "ip4"
        for pause in (0.2, 1.0, None):  # where many join at once, a peer may be too busy to answer
            try:
                self._p2p = await P2P.create(
                    initial_peers=list(peers),
                    host_maddrs=[f"/{family}/{host}/tcp/{port}"],
                    identity_path=None if identity is None else str(identity),
                    check_if_identity_free=False,
                    # Nothing that would look for ways through the network on its own.
                    auto_nat=False,
                    nat_port_map=False,
                    use_relay=False,
                )
                break
            except P2PDaemonError:
                if pause is None:
                    raise
                await asyncio.sleep(pause)
        if self._accept is not None:
            await self._p2p.add_binary_stream_handler(PROTOCOL, self._answer)
        self._dht = await DHTNode.create(
            self._p2p,
            initial_peers=list(peers),
            record_validator=_make_validator(),
            client_mode=self._accept is None,
            cache_locally=False,
            cache_on_store=False,
            cache_nearest=0,
            cache_size=1000,
        )
        self.peer_id = str(self._p2p.peer_id)
        self.addresses = tuple(str(each) for each in await self._p2p.get_visible_maddrs())

    @property
    def address(self) -> str:
        """What others are given to join: /ip4/…/tcp/…/p2p/ID."""
        return self.addresses[0]

    def run(self, coroutine: Coroutine[Any, Any, T], seconds: float | None = None) -> T:
        """Run a coroutine in the node's loop and wait for what it returns. Raises TimeoutError."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(seconds)
        except BaseException:
            future.cancel()
            raise

    def store(self, key: str, subkey: str, value: Any, seconds: float) -> bool:
        """Let all find `value` (of lists, dicts, texts and numbers) under key and subkey for so long."""
        from hivemind.utils.timed_storage import get_dht_time

        until = get_dht_time() + seconds
        return bool(self.run(self._dht.store(key, value, until, subkey=subkey), _ASK_SECONDS))

    def find(self, key: str) -> dict[str, Any]:
        """Return subkey → value of all records under a key that have not expired."""
        found = self.run(self._dht.get(key, latest=True), _ASK_SECONDS)
        if found is None or not isinstance(found.value, dict):
            return {}
        return {str(subkey): record.value for subkey, record in found.value.items()}

    def may_speak(self, peer: str) -> bool:
        """Whether a peer is on the list of those allowed."""
        return self.allowed is None or peer in self.allowed

    async def connect(self, peer: str, addresses: Sequence[str]) -> "Stream":
        """Open a stream to a peer. Raises PeerError."""
        from hivemind.p2p import PeerID
        from hivemind.utils.multiaddr import Multiaddr

        if not self.may_speak(peer):
            raise PeerError(peer, "refused", "is not on the list of peers")
        try:
            peer_id = PeerID.from_base58(peer)
            maddrs = [Multiaddr(address.rpartition("/p2p/")[0]) for address in addresses]
            with contextlib.suppress(Exception):  # it may be connected, or found by other ways
                await self._p2p._client.connect(peer_id, maddrs)
            _, reader, writer = await self._p2p.call_binary_stream_handler(peer_id, PROTOCOL)
        except Exception as error:
            raise PeerError(peer, "gone", f"cannot be reached ({type(error).__name__})") from error
        stream = Stream(self, peer, reader, writer)
        self._streams.add(stream)
        return stream

    async def _answer(self, info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = str(info.peer_id)
        assert self._accept is not None
        try:
            if self.may_speak(peer):
                await self._accept(peer, reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(writer.wait_closed(), _CLOSE_SECONDS)
            writer.transport.abort()  # what is still not read would be kept for ever

    async def _stop(self) -> bool:
        """End the daemon and all tasks. Returns whether all have ended."""
        for stream in self._streams:
            stream._writer.close()
        with contextlib.suppress(Exception):
            if self._dht is not None:
                await asyncio.wait_for(self._dht.shutdown(), 2)
        with contextlib.suppress(Exception):
            if self._p2p is not None:
                await asyncio.wait_for(self._p2p.shutdown(), 2)
        child = None if self._p2p is None else self._p2p._child
        if child is not None and child.returncode is None:  # it may hang in its own farewell
            with contextlib.suppress(ProcessLookupError):
                child.kill()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        return not others or not (await asyncio.wait(others, timeout=2))[1]

    def close(self) -> None:
        """End the daemon and the loop."""
        if self._loop.is_closed():
            return
        ended = False
        with contextlib.suppress(Exception):
            ended = self.run(self._stop(), 10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        if ended and not self._loop.is_running():  # what has not ended would complain of a closed loop
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Stream:
    """A stream to a peer, over which questions are asked one after another."""

    def __init__(
        self, node: Node, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.node, self.peer = node, peer
        self._reader, self._writer = reader, writer
        self.sent_bytes = self.received_bytes = 0

    async def ask(
        self,
        frames: Sequence[bytes],
        seconds: float,
        stall_seconds: float,
        delay_seconds: float = 0.0,
        link: float | None = None,
    ) -> Frame:
        """Send frames, and return what the last is answered with.

        The peer has `seconds` for its answer, and gives a sign of life (BUSY) every second: after
        `stall_seconds` of silence, and the time that the slowest of links needs for so many bytes, it counts
        as gone. `delay_seconds` are those of a simulated round trip, over a simulated `link` of so many bytes
        a second. Raises PeerError.
        """
        nbytes = sum(map(len, frames))
        slack = nbytes / SLOWEST_LINK
        deadline = time.monotonic() + seconds + slack + delay_seconds
        try:
            await asyncio.sleep(delay_seconds / 2 + (nbytes / link if link else 0))
            for frame in frames:
                self._writer.write(frame)
            self.sent_bytes += nbytes
            await asyncio.wait_for(self._writer.drain(), stall_seconds + slack)
            while True:
                left = min(stall_seconds + slack, deadline - time.monotonic())
                frame_, nbytes = await asyncio.wait_for(
                    read_frame(self._reader, self.node.limits, stall_seconds), max(left, 0.001)
                )
                self.received_bytes += nbytes
                if frame_.kind != Kind.BUSY:
                    break
            await asyncio.sleep(delay_seconds / 2 + (nbytes / link if link else 0))
        except TimeoutError:
            silent = "takes too long" if time.monotonic() >= deadline else "is silent"
            raise PeerError(self.peer, "stalled", silent) from None
        except BrokenFrame as error:
            raise PeerError(self.peer, "broken", f"sent {error}") from None
        except (asyncio.IncompleteReadError, OSError, RuntimeError) as error:
            raise PeerError(self.peer, "gone", "has gone") from error
        if frame_.kind == Kind.ERROR:
            raise PeerError(self.peer, "refused", f"refuses: {str(frame_.fields.get('error'))[:200]}")
        if frame_.kind != Kind.RESULT:
            raise PeerError(self.peer, "broken", f"answered with {frame_.kind.name}")
        return frame_

    def close(self) -> None:
        """Give the stream up, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended before
            self.node._loop.call_soon_threadsafe(self._writer.close)


def _note_error(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what a task ended in that nobody waits for."""
    logging.getLogger(__name__).debug(context["message"], exc_info=context.get("exception"))


async def send_frame(
    writer: asyncio.StreamWriter, frame: Frame, seconds: float, eight_bits: Sequence[int] = ()
) -> None:
    """Send a frame within `seconds`, and what the slowest link needs for it.

    Raises TimeoutError where it is not read; the stream has ended then, and what was not sent is forgotten.
    """
    data = encode_frame(frame, eight_bits)
    writer.write(data)
    try:
        await asyncio.wait_for(writer.drain(), seconds + len(data) / SLOWEST_LINK)
    except TimeoutError:
        writer.transport.abort()
        raise


def _make_validator() -> Any:
    """Return what refuses records that are too large, too lasting or too many."""
    from hivemind.dht.validation import DHTRecord, RecordValidatorBase
    from hivemind.utils.timed_storage import get_dht_time

    class Bounded(RecordValidatorBase):
        def __init__(self) -> None:
            self.known: dict[tuple[bytes, bytes], float] = {}

        def validate(self, record: DHTRecord) -> bool:
            name, now = (record.key, record.subkey), get_dht_time()
            if name not in self.known and len(self.known) >= MOST_RECORDS:
                self.known = {each: until for each, until in self.known.items() if until > now}
            has_room = name in self.known or len(self.known) < MOST_RECORDS
            is_small = len(record.value) + len(record.subkey) <= MOST_RECORD_BYTES
            if not has_room or not is_small or record.expiration_time > now + MOST_RECORD_SECONDS:
                return False
            self.known[name] = record.expiration_time
            return True

    return Bounded()


@contextlib.contextmanager
def _quiet_hivemind() -> Any:
    """Import hivemind without its warnings, and its log without what peers that go away leave there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.getLogger("hivemind").setLevel(logging.CRITICAL)
