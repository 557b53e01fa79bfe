"""Servers that do what servers should not; each a real one with one fault."""

import asyncio
from dataclasses import dataclass
from typing import Any

from t2iprobe.llm.swarm.frames import Kind, decode_frame
from t2iprobe.llm.swarm.server import BlockServer


class _Tampering:
    """A writer that changes the frame number `place` of those that answer."""

    def __init__(self, writer: Any, server: "_Faulty") -> None:
        self._writer, self._server = writer, server

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def write(self, data: bytes) -> None:
        if data[5] == Kind.RESULT and "step" in decode_frame(data).fields:
            self._server.answers += 1
            if self._server.answers == self._server.at:
                data = self._server.tamper(data)
        self._writer.write(data)


@dataclass
class _Faulty(BlockServer):
    at: int = 3
    answers: int = 0

    async def accept(self, peer: str, reader: Any, writer: Any) -> None:
        await super().accept(peer, reader, _Tampering(writer, self))

    def tamper(self, data: bytes) -> bytes:
        raise NotImplementedError


class Corrupting(_Faulty):
    """Flips a bit of an answer."""

    def tamper(self, data: bytes) -> bytes:
        return data[:-9] + bytes([data[-9] ^ 4]) + data[-8:]


class Babbling(_Faulty):
    """Answers with what is no frame."""

    def tamper(self, data: bytes) -> bytes:
        return b"HTTP/1.1 200 OK\r\n\r\n" + data


class Huge(_Faulty):
    """Promises more than a frame may hold."""

    def tamper(self, data: bytes) -> bytes:
        return data[:10] + (1 << 60).to_bytes(8, "little") + data[18:]


class Halting(_Faulty):
    """Sends half an answer, and nothing ever after."""

    def tamper(self, data: bytes) -> bytes:
        return data[: len(data) // 2]


@dataclass
class Slow(_Faulty):
    """Says that it computes, and never ends."""

    async def compute(self, writer: Any, function: Any) -> Any:
        if self.answers == self.at - 1:
            await super().compute(writer, lambda: __import__("time").sleep(600))
        return await super().compute(writer, function)

    def tamper(self, data: bytes) -> bytes:
        return data


class Refusing(_Faulty):
    """Breaks with an error of its own."""

    async def compute(self, writer: Any, function: Any) -> Any:
        if self.answers == self.at - 1:
            await asyncio.sleep(0)
            raise MemoryError("no memory")
        return await super().compute(writer, function)


FAULTS = {
    "corrupt": Corrupting,
    "babble": Babbling,
    "huge": Huge,
    "half": Halting,
    "slow": Slow,
    "fail": Refusing,
}
