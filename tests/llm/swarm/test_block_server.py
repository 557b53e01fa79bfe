"""A server without a network: its budgets, its moves, its memory of what it is told."""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import decoder_toys as toys
import pytest
import torch

from t2iprobe.llm.swarm import transport
from t2iprobe.llm.swarm.blocks import Blocks
from t2iprobe.llm.swarm.frames import HEAD_BYTES, Frame, Kind, Limits, encode_frame, read_frame
from t2iprobe.llm.swarm.registry import Announcement, ModelKey
from t2iprobe.llm.swarm.server import BlockServer, ServerSettings, measure_blocks

KEY = ModelKey("abc", "float64", None, 3, "toy")
CPU = torch.device("cpu")


def make_server(first: int = 0, last: int = 3, **settings) -> BlockServer:
    blocks = Blocks(toys.tiny_model("llama"), first, last, CPU)
    return BlockServer(KEY, blocks, ServerSettings(**settings), state="online")


def open_frame(**changes) -> bytes:
    fields = {"model": str(KEY), "first": 0, "last": 2, "batch": 2, "capacity": 4} | changes
    return encode_frame(Frame(Kind.OPEN, fields))


def step_frame(step: int = 0, rows: int = 1, batch: int = 2, before=(), mask_rows: int = 0) -> bytes:
    fields = {"step": step, "before": list(before), "wanted": rows}
    hidden = torch.zeros(batch, rows, 32, dtype=torch.float64)
    mask = torch.ones(batch, rows, mask_rows + rows, dtype=torch.bool)
    return encode_frame(Frame(Kind.STEP, fields, (hidden, torch.zeros(batch, rows, dtype=torch.int64), mask)))


def talk(server: BlockServer, *asks, between=None) -> list[Frame]:
    """Say frames one after another and return the answers; `between` runs after each."""

    async def run() -> list[Frame]:
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours)
        task = asyncio.create_task(server.accept("peer", *await asyncio.open_connection(sock=theirs)))
        answers = []
        for ask in asks:
            writer.write(ask)
            answers.append((await asyncio.wait_for(read_frame(reader, Limits()), 10))[0])
            if between is not None:
                await between(len(answers))
        writer.close()
        await asyncio.wait_for(task, 10)
        return answers

    return asyncio.run(run())


def ask_and_never_read(
    asks: bytes, accept: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
) -> asyncio.StreamWriter:
    """Send what is asked and read nothing; return the server's side of the stream when `accept` has ended."""

    async def run() -> asyncio.StreamWriter:
        ours, theirs = socket.socketpair()
        with ours:
            ours.setblocking(False)
            reader, writer = await asyncio.open_connection(sock=theirs)
            task = asyncio.create_task(accept(reader, writer))
            async with asyncio.timeout(10):
                with contextlib.suppress(OSError):  # it may have ended before it was told all
                    await asyncio.get_running_loop().sock_sendall(ours, asks)
                await task
        return writer

    return asyncio.run(run())


def test_a_session_takes_what_it_was_promised_and_gives_it_back():
    server, seen = make_server(), []

    async def note(_: int) -> None:
        await asyncio.sleep(0.01)
        seen.append((server.budget.taken, server.sessions, server.inbox.taken))

    slot = server.blocks.slot_bytes
    keep = ("keep", [1, 1])
    answers = talk(
        server,
        open_frame() + step_frame(),
        step_frame(1, 4, before=[keep]),
        step_frame(2, 1, 1, before=[("keep", [4, 4]), ("select", [1])]),
        between=note,
    )
    assert [answer.kind for answer in answers] == [Kind.RESULT] * 3
    # Two texts of four slots in two blocks; then twice as many slots; then one text.
    assert seen == [(2 * 4 * 2 * slot, 1, 0), (2 * 8 * 2 * slot, 1, 0), (8 * 2 * slot, 1, 0)]
    assert (server.budget.taken, server.inbox.taken, server.sessions, server.streams) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("settings", "ask", "reason"),
    [
        ({"cache_bytes": 100}, open_frame(), "the cache has 100 of"),
        ({"frame_bytes": 500}, step_frame(rows=8), "the inbox has 500 of"),
        ({"most_rows": 4}, open_frame(capacity=9) + step_frame(rows=5), "1 to 4 rows, not 10"),
        ({"most_waiting": 0}, open_frame() + step_frame(), "too many passes wait"),
        ({"most_streams": 0}, open_frame(), "too many streams"),
    ],
)
def test_what_is_too_much_is_refused_and_leaves_nothing(settings, ask, reason):
    server = make_server(**settings)
    (answer,) = talk(server, ask)
    assert answer.kind == Kind.ERROR
    assert reason in answer.fields["error"]
    assert (server.budget.taken, server.inbox.taken, server.sessions, server.streams) == (0, 0, 0, 0)


@pytest.mark.parametrize("count", [1, 9])
def test_a_peer_that_does_not_read_loses_its_session(monkeypatch, count):
    monkeypatch.setattr(transport, "SLOWEST_LINK", 10_000_000)
    server, batch = make_server(frame_seconds=0.2), 4000  # 1 MB an answer: more than a socket holds
    asks = open_frame(batch=batch, capacity=1) + step_frame(batch=batch)
    asks += b"".join(
        step_frame(step, batch=batch, before=[("crop", [0] * batch)]) for step in range(1, count)
    )
    writer = ask_and_never_read(asks, lambda *stream: server.accept("peer", *stream))
    assert (server.budget.taken, server.inbox.taken, server.sessions, server.streams) == (0, 0, 0, 0)
    assert writer.transport.get_write_buffer_size() == 0


def test_what_is_not_read_ends_with_the_stream(monkeypatch):
    monkeypatch.setattr(transport, "_CLOSE_SECONDS", 0.2)

    async def accept(_: str, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(1 << 20))

    node = SimpleNamespace(_accept=accept, may_speak=lambda _: True)
    writer = ask_and_never_read(
        b"", lambda *stream: transport.Node._answer(node, SimpleNamespace(peer_id="peer"), *stream)
    )
    assert writer.transport.get_write_buffer_size() == 0


def test_a_cache_that_cannot_grow_ends_its_session():
    slot = make_server().blocks.slot_bytes
    server = make_server(cache_bytes=2 * 4 * 2 * slot)
    first, second = talk(server, open_frame() + step_frame(), step_frame(1, 4, before=[("keep", [1, 1])]))
    assert first.kind == Kind.RESULT
    assert "full" in second.fields["error"]
    assert server.budget.taken == 0


def test_a_gradients_memory_is_given_back():
    server = make_server()
    hidden = torch.zeros(1, 3, 32, dtype=torch.float64)
    mask = torch.ones(1, 3, 3, dtype=torch.bool).tril()
    tensors = (hidden, torch.arange(3)[None], mask, torch.ones_like(hidden))
    fields = {"model": str(KEY), "first": 0, "last": 3}
    (answer,) = talk(server, encode_frame(Frame(Kind.BACKWARD, fields, tensors)))
    assert answer.tensors[0].shape == hidden.shape
    assert server.budget.taken == 0
    small = make_server(cache_bytes=100)
    (answer,) = talk(small, encode_frame(Frame(Kind.FORWARD, fields, tensors[:3])))
    assert "full" in answer.fields["error"]


def test_masks_are_counted_before_they_are_made():
    rows, fields = 300, {"model": str(KEY), "first": 0, "last": 3}
    hidden, same = torch.zeros(1, rows, 32, dtype=torch.float64), torch.zeros(1, rows, dtype=torch.int64)
    mask = torch.ones(1, rows, rows, dtype=torch.bool)
    forward = encode_frame(Frame(Kind.FORWARD, fields, (hidden, same, mask)))
    step = step_frame(rows=rows, batch=1)
    for before, ask in ((b"", forward), (open_frame(batch=1), step)):
        # The frame; a byte a place of the mask, of which a bit came; eight that are added to the logits; two
        # of who is seen.
        nbytes = len(ask) - HEAD_BYTES + rows * rows * (1 + 8 + 2) - rows * rows // 8
        (answer,) = talk(make_server(frame_bytes=nbytes - 1), before + ask)
        assert "the inbox has" in answer.fields["error"]
        server = make_server(frame_bytes=nbytes)
        (answer,) = talk(server, before + ask)
        assert answer.kind == Kind.RESULT
        assert (server.budget.taken, server.inbox.taken) == (0, 0)


def test_a_frames_tensors_are_counted_before_they_are_made():
    (answer,) = talk(make_server(frame_bytes=100_000), open_frame(batch=1) + step_frame(rows=300, batch=1))
    assert "of 78750 bytes left" in answer.fields["error"]  # 90,000 places of the mask came in 11,250 bytes


def test_who_moves_refuses_the_sessions_that_it_no_longer_has_the_blocks_of():
    server = make_server(0, 2)

    async def move(count: int) -> None:
        if count == 1:
            server.planned = (1, 3)
            assert server.announcement("peer", ["a"]).first == 1
            await server.move(lambda: Blocks(toys.tiny_model("llama"), 1, 3, CPU))
            server.planned = None

    keep = [("keep", [1, 1])]
    answers = talk(server, open_frame() + step_frame(), step_frame(1, before=keep), between=move)
    assert answers[0].kind == Kind.RESULT
    assert answers[1].fields["error"] == "moved: these are blocks 1:3"
    assert server.budget.taken == 0


def test_a_server_says_what_it_measured():
    server = make_server()
    server.block_seconds, server.throughput = measure_blocks(server.blocks)
    assert server.block_seconds * 3 == pytest.approx(1 / server.throughput)
    (answer,) = talk(server, encode_frame(Frame(Kind.PING)))
    assert answer.fields["cache_bytes_left"] == 1 << 30
    said = server.announcement("peer", ["/ip4/127.0.0.1/tcp/1/p2p/x"])
    record = {**said.__dict__, "addresses": list(said.addresses)}
    assert Announcement.parse("peer", record, 3) == said
    for change in (
        {"first": -1}, {"last": 4}, {"first": 3}, {"throughput": float("nan")}, {"state": "great"},
        {"peer": "another"}, {"addresses": [7]}, {"addresses": None}, {"cache_bytes": "much"}, {"last": True},
    ):  # fmt: skip
        assert Announcement.parse("peer", record | change, 3) is None, change
    assert Announcement.parse("peer", [1], 3) is None


def test_records_are_bounded():
    pytest.importorskip("hivemind")
    from hivemind.dht.validation import DHTRecord
    from hivemind.utils.timed_storage import get_dht_time

    validator, now = transport._make_validator(), get_dht_time()
    assert validator.validate(DHTRecord(b"key", b"sub", b"v" * 1000, now + 30))
    assert not validator.validate(DHTRecord(b"key", b"sub", b"v" * 5000, now + 30))
    assert not validator.validate(DHTRecord(b"key", b"sub", b"v", now + 86400))
    for number in range(transport.MOST_RECORDS):
        validator.validate(DHTRecord(b"key", str(number).encode(), b"v", now + 30))
    assert len(validator.known) == transport.MOST_RECORDS
    another = DHTRecord(b"key", b"another", b"v", now + 30)
    assert not validator.validate(another)
    assert validator.validate(DHTRecord(b"key", b"7", b"renewed", now + 31))
    validator.known[b"key", b"sub"] = now - 1  # it has expired
    assert validator.validate(another)
