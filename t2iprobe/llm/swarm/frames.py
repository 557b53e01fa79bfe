"""What peers say to each other: frames with a fixed head, a bounded JSON header and raw tensors.

A frame is magic, version, kind, the header's and the body's bytes, a CRC-32 of both; then the header, then
the tensors. Nothing in it is ever unpickled or evaluated, and nothing is read beyond what `Limits` allow.
"""

import asyncio
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, TypeVar

import torch

from t2iprobe.llm.swarm.codec import BrokenFrame, decode_tensor, decoded_bytes, encode_tensor

__all__ = ["BrokenFrame", "Frame", "Kind", "Limits", "decode_frame", "encode_frame", "read_frame"]

MAGIC, VERSION = b"T2IS", 1
# Bytes a second; nothing slower counts as alive.
SLOWEST_LINK = 100_000
_HEAD = struct.Struct("<4sBBIQI")
T = TypeVar("T")
HEAD_BYTES = _HEAD.size


class Kind(IntEnum):
    """What a frame asks or tells."""

    PING = 1  # who are you, how busy?
    OPEN = 2  # begin a session; answered by the first step's result
    STEP = 3  # rows through the session's blocks
    FORWARD = 4  # rows through blocks, without a session
    BACKWARD = 5  # and the gradient back
    RESULT = 6
    BUSY = 7  # alive, and computing
    ERROR = 8


@dataclass(frozen=True)
class Limits:
    """The most bytes that a frame may have."""

    header_bytes: int = 1 << 20
    body_bytes: int = 256 << 20


@dataclass(frozen=True)
class Frame:
    """One message."""

    kind: Kind
    fields: dict[str, Any] = field(default_factory=dict)
    tensors: tuple[torch.Tensor, ...] = ()


def encode_frame(frame: Frame, eight_bits: Sequence[int] = ()) -> bytes:
    """Return a frame's bytes; the tensors of these numbers go in 8 bits (see `encode_tensor`)."""
    encoded = [encode_tensor(tensor, place in eight_bits) for place, tensor in enumerate(frame.tensors)]
    header = json.dumps([frame.fields, [about for about, _ in encoded]], allow_nan=False).encode()
    body = b"".join(data for _, data in encoded)
    checksum = zlib.crc32(body, zlib.crc32(header))
    return b"".join([_HEAD.pack(MAGIC, VERSION, frame.kind, len(header), len(body), checksum), header, body])


def decode_head(head: bytes, limits: Limits) -> tuple[Kind, int, int, int]:
    """Return kind, header bytes, body bytes and checksum. Raises BrokenFrame for what is no frame of ours."""
    magic, version, kind, header_bytes, body_bytes, checksum = _HEAD.unpack(head)
    if magic != MAGIC or version != VERSION:
        raise BrokenFrame(f"no frame of version {VERSION}")
    if header_bytes > limits.header_bytes or body_bytes > limits.body_bytes:
        raise BrokenFrame(f"a frame of {header_bytes} + {body_bytes} bytes is too large")
    try:
        return Kind(kind), header_bytes, body_bytes, checksum
    except ValueError:
        raise BrokenFrame(f"a frame of the unknown kind {kind}") from None


def decode_frame(data: bytes, limits: Limits | None = None) -> Frame:
    """Return the frame that `data` is. Raises BrokenFrame where it is damaged or of another form."""
    if len(data) < HEAD_BYTES:
        raise BrokenFrame("a truncated frame")
    kind, header_bytes, body_bytes, checksum = decode_head(data[:HEAD_BYTES], limits or Limits())
    if len(data) != HEAD_BYTES + header_bytes + body_bytes:
        raise BrokenFrame("a truncated frame")
    content = memoryview(data)[HEAD_BYTES:]
    return _decode_body(kind, content[header_bytes:], *_decode_header(content, header_bytes, checksum))


def _decode_header(content: memoryview, header_bytes: int, checksum: int) -> tuple[dict[str, Any], list[Any]]:
    """Return a frame's fields, and what it says of its tensors."""
    if zlib.crc32(content) != checksum:
        raise BrokenFrame("a corrupted frame")
    try:
        fields, abouts = json.loads(bytes(content[:header_bytes]))
    except (ValueError, RecursionError):
        raise BrokenFrame("a header that is no JSON") from None
    if not isinstance(fields, dict) or not isinstance(abouts, list):
        raise BrokenFrame("a header of another form")
    return fields, abouts


def _decode_body(kind: Kind, body: memoryview, fields: dict[str, Any], abouts: list[Any]) -> Frame:
    tensors = []
    for about in abouts:
        tensor, used = decode_tensor(about, body)
        tensors.append(tensor)
        body = body[used:]
    if len(body):
        raise BrokenFrame(f"{len(body)} bytes too many")
    return Frame(kind, fields, tuple(tensors))


async def read_frame(
    reader: asyncio.StreamReader,
    limits: Limits,
    seconds: float | None = None,
    admit: Callable[[int], None] = lambda nbytes: None,
) -> tuple[Frame, int]:
    """Read one frame; return it and its bytes. Memory is taken as data arrives, not as it is promised.

    `admit` is told a frame's size before its content is read, then by how much its tensors are larger before
    these are made, and may raise. A frame that has begun must be whole within `seconds`, and what the slowest
    link needs for it. Raises BrokenFrame, TimeoutError, or asyncio.IncompleteReadError at the stream's end.
    """
    head = await reader.readexactly(HEAD_BYTES)
    kind, header_bytes, body_bytes, checksum = decode_head(head, limits)
    size = header_bytes + body_bytes
    admit(size)
    patience = None if seconds is None else seconds + size / SLOWEST_LINK
    content = memoryview(await asyncio.wait_for(reader.readexactly(size), patience))
    fields, abouts = await _aside(size, _decode_header, content, header_bytes, checksum)
    grown = sum(map(decoded_bytes, abouts)) - body_bytes
    admit(max(grown, 0))
    frame = await _aside(size + grown, _decode_body, kind, content[header_bytes:], fields, abouts)
    return frame, HEAD_BYTES + size


async def _aside(nbytes: int, function: Callable[..., T], *args: Any) -> T:
    """Call a function, in a thread where so many bytes would keep others waiting."""
    return await asyncio.to_thread(function, *args) if nbytes > 1 << 20 else function(*args)
