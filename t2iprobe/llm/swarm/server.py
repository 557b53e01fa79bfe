"""A server of blocks: sessions with caches under a budget of bytes, and passes one after another.

A session belongs to a stream and ends with it; one that is not used for a while ends, too. Whatever a peer
sends is checked before memory is taken for it.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from t2iprobe.llm.engine.cache import RowCache
from t2iprobe.llm.swarm.blocks import Blocks
from t2iprobe.llm.swarm.frames import BrokenFrame, Frame, Kind, Limits, read_frame
from t2iprobe.llm.swarm.registry import Announcement, ModelKey
from t2iprobe.llm.swarm.transport import send_frame

__all__ = ["BlockServer", "Refused", "ServerSettings", "measure_blocks"]

# How often a peer that waits for a pass is told that it goes on.
BUSY_SECONDS = 1.0
LINGER_SECONDS = 2.0


@dataclass(frozen=True)
class ServerSettings:
    """What a server allows: bytes of all caches and of all frames that are being answered with their masks,
    seconds that a session may rest and a frame may take, rows of a pass, streams, passes that wait."""

    cache_bytes: int = 1 << 30
    frame_bytes: int = 1 << 30
    session_seconds: float = 300.0
    frame_seconds: float = 30.0
    most_rows: int = 1 << 15
    most_streams: int = 256
    most_waiting: int = 64


class Refused(Exception):
    """What was asked for is not given; told to the peer, whose session ends."""


@dataclass
class _Session:
    """A peer's cache for blocks `span`, and the bytes that it was promised."""

    span: range
    batch: int
    cache: RowCache
    capacity: int
    reserved: int
    steps: int = 0

    @property
    def columns(self) -> int:
        """Texts times blocks."""
        return self.batch * len(self.span)


@dataclass
class _Budget:
    """Bytes that are shared."""

    name: str
    total: int
    taken: int = 0

    @property
    def left(self) -> int:
        return self.total - self.taken

    def take(self, nbytes: int) -> None:
        """Raises Refused where that much is not left."""
        if nbytes > self.left:
            raise Refused(f"full: the {self.name} has {self.left} of {nbytes} bytes left")
        self.taken += nbytes

    @contextlib.contextmanager
    def lend(self, nbytes: int) -> Iterator[None]:
        """Take that much for a while. Raises Refused where it is not left."""
        self.take(nbytes)
        try:
            yield
        finally:
            self.taken -= nbytes


@dataclass
class BlockServer:
    """Serves blocks of a model to whom a `Node` lets speak. Its `accept` is what the node is made with."""

    key: ModelKey
    blocks: Blocks
    settings: ServerSettings = field(default_factory=ServerSettings)
    limits: Limits = field(default_factory=Limits)
    state: str = "joining"
    block_seconds: float = 0.0
    throughput: float = 0.0
    waiting: int = 0
    streams: int = 0
    sessions: int = 0
    planned: tuple[int, int] | None = None  # where it is about to be

    def __post_init__(self) -> None:
        self.budget = _Budget("cache", self.settings.cache_bytes)
        self.inbox = _Budget("inbox", self.settings.frame_bytes)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="blocks")

    def announcement(self, peer: str, addresses: Sequence[str]) -> Announcement:
        """Return what the server says of itself now."""
        blocks = self.blocks
        first, last = self.planned or (blocks.first, blocks.last)
        return Announcement(
            peer, tuple(addresses[:4]), first, last, self.state, self.block_seconds,
            self.throughput, self.budget.total, self.budget.left, blocks.slot_bytes, self.waiting,
            self.sessions,
        )  # fmt: skip

    def close(self) -> None:
        """Finish the pass that runs and give the weights back."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.blocks.close()

    async def move(self, load: Callable[[], Blocks]) -> None:
        """Give the blocks up for others. Open sessions are refused their next step."""

        def swap() -> None:
            self.blocks.close()
            self.blocks = load()

        await asyncio.get_running_loop().run_in_executor(self._pool, swap)

    async def accept(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer a stream's frames until it ends, rests too long or breaks a rule."""
        if self.streams >= self.settings.most_streams:
            await send_frame(writer, Frame(Kind.ERROR, {"error": "too many streams"}), LINGER_SECONDS)
            return
        self.streams += 1
        speaker, held = _Speaker(self, writer), 0

        def admit(nbytes: int) -> None:
            nonlocal held
            self.inbox.take(nbytes)
            held += nbytes

        try:
            while True:
                frame, _ = await asyncio.wait_for(
                    read_frame(reader, self.limits, self.settings.frame_seconds, admit),
                    self.settings.session_seconds,
                )
                await speaker.answer(frame)
                self.inbox.taken -= held
                held = 0
        except (Refused, BrokenFrame) as error:
            await _refuse(reader, writer, str(error))
        except (TimeoutError, asyncio.IncompleteReadError, OSError):
            pass  # the session rests too long, or its peer has gone or does not read
        except Exception as error:  # a pass that failed ends one session, not the server
            await _refuse(reader, writer, f"failed: {error!r}")
        finally:
            self.streams -= 1
            self.inbox.taken -= held
            speaker.end()

    async def compute(self, writer: asyncio.StreamWriter, function: Callable[[], Any]) -> Any:
        """Run a pass when its turn comes; meanwhile tell the peer every second that it goes on."""
        if self.waiting >= self.settings.most_waiting:
            raise Refused("busy: too many passes wait")
        self.waiting += 1
        blocks = self.blocks

        def run() -> Any:
            if self.blocks is not blocks:  # moved while this was waiting
                raise Refused(f"moved: these are blocks {self.blocks.first}:{self.blocks.last}")
            return function()

        task = asyncio.get_running_loop().run_in_executor(self._pool, run)
        try:
            while not (await asyncio.wait({task}, timeout=BUSY_SECONDS))[0]:
                await send_frame(writer, Frame(Kind.BUSY), self.settings.frame_seconds)
            return task.result()
        finally:
            # A pass whose peer has gone still ends before its session's cache is given up.
            await asyncio.wait({task})
            self.waiting -= 1


async def _refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, reason: str) -> None:
    """Tell a peer why its stream ends; read on for a moment, since what it still sends would drown that."""
    with contextlib.suppress(OSError, RuntimeError, TimeoutError):
        await send_frame(writer, Frame(Kind.ERROR, {"error": reason[:500]}), LINGER_SECONDS)
        async with asyncio.timeout(LINGER_SECONDS):
            while await reader.read(1 << 16):
                pass


class _Speaker:
    """One stream's side of the talk."""

    def __init__(self, server: BlockServer, writer: asyncio.StreamWriter) -> None:
        self.server, self.writer = server, writer
        self.session: _Session | None = None
        self._eight_bits = False

    async def answer(self, frame: Frame) -> None:
        """Answer one frame."""
        handlers = {
            Kind.PING: self._ping,
            Kind.OPEN: self._open,
            Kind.STEP: self._step,
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
        }
        if frame.kind not in handlers:
            raise Refused(f"a frame of the kind {frame.kind.name} is none to ask with")
        try:
            await handlers[frame.kind](frame)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError, AttributeError) as error:
            raise Refused(f"a frame of another form ({type(error).__name__}: {error})") from error

    def end(self) -> None:
        """Give the session's memory back."""
        if self.session is not None:
            self.server.budget.taken -= self.session.reserved
            self.server.sessions -= 1
            self.session = None

    async def _reply(self, fields: dict[str, Any], *tensors: Tensor) -> None:
        places = range(len(tensors)) if self._eight_bits else ()
        frame = Frame(Kind.RESULT, fields, tensors)
        await send_frame(self.writer, frame, self.server.settings.frame_seconds, places)

    async def _ping(self, _: Frame) -> None:
        server = self.server
        await self._reply(
            {
                "model": str(server.key),
                "first": server.blocks.first,
                "last": server.blocks.last,
                "state": server.state,
                "cache_bytes_left": server.budget.left,
                "waiting": server.waiting,
                "sessions": server.sessions,
            }
        )

    async def _open(self, frame: Frame) -> None:
        """Begin a session; the answer comes with the first step, so that opening costs no round trip."""
        span = self._span(frame)
        batch, capacity = _count(frame, "batch"), _count(frame, "capacity")
        self._eight_bits = frame.fields.get("eight_bits") is True
        self.end()
        nbytes = self._cache_bytes(len(span) * batch, capacity)
        self.server.budget.take(nbytes)
        cache = self.server.blocks.new_cache(batch, capacity)
        self.session = _Session(span, batch, cache, capacity, nbytes)
        self.server.sessions += 1

    def _span(self, frame: Frame) -> range:
        blocks = self.server.blocks
        if frame.fields["model"] != str(self.server.key):
            raise Refused(f"this is {self.server.key}")
        span = range(int(frame.fields["first"]), int(frame.fields["last"]))
        if self.server.state == "offline" or not blocks.first <= span.start < span.stop <= blocks.last:
            raise Refused(f"moved: these are blocks {blocks.first}:{blocks.last}")
        return span

    def _cache_bytes(self, columns: int, capacity: int) -> int:
        """Return the bytes of so many slots of each of `columns`, a text's in a block each."""
        return columns * capacity * self.server.blocks.slot_bytes

    async def _step(self, frame: Frame) -> None:
        session = self.session
        if session is None:
            raise Refused("no session")
        if frame.fields["step"] != session.steps:
            # Said twice, or one got lost: neither may leave a trace.
            raise Refused(f"step {frame.fields['step']} where {session.steps} is due")
        hidden, positions, mask = frame.tensors
        server, cache = self.server, session.cache
        if not server.blocks.first <= session.span.start < session.span.stop <= server.blocks.last:
            raise Refused(f"moved: these are blocks {server.blocks.first}:{server.blocks.last}")
        _apply(cache, frame.fields["before"])
        self._shrink(session)
        self._check_rows(hidden, positions)
        batch, rows = hidden.shape[:2]
        pending = cache.pending
        if batch != session.batch or mask.shape != (batch, rows, pending + rows) or mask.dtype != torch.bool:
            raise Refused("a mask of another shape")
        slots = max(cache.lengths) + pending + rows
        self._make_room(session, slots)
        wanted = min(_count(frame, "wanted", least=0), rows)
        began = time.perf_counter()
        with server.inbox.lend(server.blocks.mask_bytes(batch, rows, slots)):
            out = await server.compute(
                self.writer, lambda: server.blocks.step(hidden, positions, mask, cache, session.span)
            )
        session.steps += 1
        await self._reply(
            {"step": session.steps - 1, "seconds": time.perf_counter() - began}, out[:, rows - wanted :]
        )

    def _shrink(self, session: _Session) -> None:
        """Take back the memory of texts that have ended."""
        session.batch = len(session.cache.lengths)
        now = min(session.reserved, self._cache_bytes(session.columns, session.capacity))
        self.server.budget.taken -= session.reserved - now
        session.reserved = now

    def _make_room(self, session: _Session, rows: int) -> None:
        """Promise the memory that a growing cache is about to take."""
        if rows <= session.capacity:
            return
        capacity = max(rows, 2 * session.capacity)
        more = self._cache_bytes(session.columns, capacity) - session.reserved
        self.server.budget.take(more)
        session.reserved += more
        session.capacity = capacity

    def _check_rows(self, hidden: Tensor, positions: Tensor) -> None:
        blocks = self.server.blocks
        if hidden.ndim != 3 or hidden.shape[2] != blocks.hidden_size or not hidden.is_floating_point():
            raise Refused(f"hidden states of another shape: {tuple(hidden.shape)}")
        if positions.shape != hidden.shape[:2] or positions.dtype != torch.int64:
            raise Refused("positions of another shape")
        if not 0 < positions.numel() <= self.server.settings.most_rows:
            raise Refused(f"a pass has 1 to {self.server.settings.most_rows} rows, not {positions.numel()}")
        limit = blocks.context_length or 1 << 40
        if not 0 <= int(positions.min()) <= int(positions.max()) < limit:
            raise Refused("a position outside the model's context")

    async def _forward(self, frame: Frame) -> None:
        await self._compute_without_session(frame, 3)

    async def _backward(self, frame: Frame) -> None:
        await self._compute_without_session(frame, 4)

    async def _compute_without_session(self, frame: Frame, count: int) -> None:
        """Run blocks, forward or backward. The memory for the blocks' inputs is taken from the caches'."""
        span = self._span(frame)
        hidden, positions, mask, *gradient = frame.tensors
        if len(frame.tensors) != count or any(each.shape != hidden.shape for each in gradient):
            raise Refused("tensors of other shapes")
        self._check_rows(hidden, positions)
        batch, rows = positions.shape
        if mask.shape != (batch, rows, rows) or mask.dtype != torch.bool:
            raise Refused("a mask of another shape")
        self._eight_bits = frame.fields.get("eight_bits") is True
        blocks = self.server.blocks
        nbytes = hidden.numel() * blocks.dtype.itemsize * (len(span) + 2)
        run: Callable[..., Tensor] = blocks.backward if gradient else blocks.forward
        masks = blocks.mask_bytes(batch, rows, rows)
        with self.server.budget.lend(nbytes), self.server.inbox.lend(masks):
            out = await self.server.compute(
                self.writer, lambda: run(hidden, positions, mask, *gradient, span)
            )
        await self._reply({}, out)


def _count(frame: Frame, name: str, least: int = 1) -> int:
    value = frame.fields[name]
    if type(value) is not int or not least <= value < 2**31:
        raise Refused(f"{name} is {value!r}")
    return value


def _apply(cache: RowCache, operations: Any) -> None:
    """Do to the cache what was done to the text since the last step: rows kept, or lengths cut."""
    for name, rows in operations:
        if name == "select":
            if not _are_rows(rows, len(cache.lengths)) or not rows:
                raise Refused("texts to go on with that there are not")
            cache.select(rows)
        elif name == "crop":
            if len(rows) != len(cache.lengths) or not all(
                type(new) is int and 0 <= new <= old for new, old in zip(rows, cache.lengths, strict=True)
            ):
                raise Refused("a cut that there is not")
            cache.crop(rows)
        elif name == "keep":
            if len(rows) != len(cache.lengths) or not all(_are_rows(row, cache.pending) for row in rows):
                raise Refused("rows to keep that there are not")
            cache.keep([list(range(row)) if type(row) is int else row for row in rows])
        else:
            raise Refused(f"unknown operation {name!r}")


def _are_rows(row: Any, pending: int) -> bool:
    """Whether these are pending rows: numbers, or how many of the first."""
    if type(row) is int:
        return 0 <= row <= pending
    return len(set(row)) == len(row) and all(type(each) is int and 0 <= each < pending for each in row)


def measure_blocks(blocks: Blocks, repeats: int = 5) -> tuple[float, float]:
    """Return the seconds of a pass over one token, a block, and tokens a second through the whole span."""
    span = range(blocks.first, blocks.last)
    cache = blocks.new_cache(1, repeats + 2)
    row = torch.zeros(1, 1, blocks.hidden_size, device=blocks.device, dtype=blocks.dtype)
    seconds = []
    for number in range(repeats + 1):
        began = time.perf_counter()
        blocks.step(
            row, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, 1, dtype=torch.bool), cache, span
        )
        cache.keep([[0]])
        if number:  # the first warms up
            seconds.append(time.perf_counter() - began)
    least = sorted(seconds)[len(seconds) // 2]
    return least / len(span), 1 / least
