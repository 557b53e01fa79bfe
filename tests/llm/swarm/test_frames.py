"""The wire: what goes in comes out, and nothing else is believed."""

import asyncio
import json
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch

from t2iprobe.llm.swarm.codec import BLOCK, BrokenFrame, decode_tensor, encode_tensor, round_trip
from t2iprobe.llm.swarm.frames import (
    HEAD_BYTES,
    Frame,
    Kind,
    Limits,
    decode_frame,
    encode_frame,
    read_frame,
)


def random_frame(seed: int = 0) -> Frame:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, 5, 33, generator=generator)
    mask = torch.rand(2, 5, 7, generator=generator) > 0.5
    return Frame(Kind.STEP, {"step": 3, "before": [["keep", [2, [0, 1]]]]}, (hidden, mask, torch.arange(4)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 4), (1,), (2, 3, 65)])
def test_a_tensor_comes_out_as_it_went_in(dtype, shape):
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 100).to(dtype)
    about, data = encode_tensor(tensor)
    found, used = decode_tensor(json.loads(json.dumps(about)), memoryview(data + b"more"))
    assert used == len(data)
    assert found.dtype == dtype
    assert torch.equal(found, tensor)


def test_masks_take_a_bit_each():
    mask = torch.rand(3, 5, 11, generator=torch.Generator().manual_seed(0)) > 0.5
    about, data = encode_tensor(mask)
    assert len(data) == -(-3 * 5 * 11 // 8)
    assert torch.equal(decode_tensor(about, memoryview(data))[0], mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 64), (4, 65), (2, 200), (0, 9)])
@pytest.mark.parametrize("seed", range(3))
def test_eight_bits_are_off_by_a_254th_of_the_greatest_of_a_block(width, rows, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, width, generator=generator) * torch.rand(rows, 1, generator=generator) * 1e3
    values[:, : width // 3] *= 1e-4
    tensor = values.to(dtype)
    found = round_trip(tensor)
    assert found.dtype == dtype
    assert found.shape == tensor.shape
    for start in range(0, width, BLOCK):
        block, back = tensor[:, start : start + BLOCK].double(), found[:, start : start + BLOCK].double()
        allowed = block.abs().amax(1, keepdim=True) * (1 / 254 + torch.finfo(dtype).eps * 2 + 1e-6)
        assert ((block - back).abs() <= allowed).all()


def test_eight_bits_keep_zeros_and_what_they_have_rounded():
    assert torch.equal(round_trip(torch.zeros(2, 70)), torch.zeros(2, 70))
    once = round_trip(torch.randn(4, 130, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(round_trip(once), once, rtol=1e-6, atol=0)
    _, data = encode_tensor(torch.ones(4, 128), eight_bits=True)
    assert len(data) == 4 * (128 + 2 * 4)


def test_a_frame_comes_out_as_it_went_in():
    frame = random_frame()
    found = decode_frame(encode_frame(frame))
    assert (found.kind, found.fields) == (frame.kind, frame.fields)
    assert all(map(torch.equal, found.tensors, frame.tensors))
    rounded = decode_frame(encode_frame(frame, eight_bits=(0,)))
    assert torch.equal(rounded.tensors[0], round_trip(frame.tensors[0]))
    assert len(encode_frame(frame, eight_bits=(0,))) < 0.5 * len(encode_frame(frame))


def test_every_flipped_byte_is_noticed():
    data = encode_frame(random_frame())
    rng = np.random.default_rng(0)
    places = {*range(HEAD_BYTES), *rng.integers(HEAD_BYTES, len(data), 200).tolist()}
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        if place == 5:  # the kind: another one may be meant
            continue
        with pytest.raises(BrokenFrame):
            decode_frame(bytes(flipped))


def test_a_truncated_frame_is_noticed():
    data = encode_frame(random_frame())
    for size in (0, 3, HEAD_BYTES, len(data) - 1):
        with pytest.raises(BrokenFrame, match="truncated"):
            decode_frame(data[:size])


def test_what_is_about_to_be_read_and_made_is_told():
    frame = Frame(Kind.STEP, {}, (torch.ones(3, 100, dtype=torch.bool), torch.zeros(4, 128)))
    data, told = encode_frame(frame, eight_bits=(1,)), []

    async def read() -> int:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        return (await read_frame(reader, Limits(), admit=told.append))[1]

    assert asyncio.run(read()) == len(data)
    assert told == [len(data) - HEAD_BYTES, (300 + 4 * 128 * 4) - (38 + 4 * (128 + 2 * 4))]


def forge(header: bytes, body: bytes = b"", kind: int = 3) -> bytes:
    checksum = zlib.crc32(header + body)
    return struct.pack("<4sBBIQI", b"T2IS", 1, kind, len(header), len(body), checksum) + header + body


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"{}",
        b"[[], []]",
        b"[{}, {}]",
        b"[{}, [1]]",
        b"[" * 100_000,
        b"\xff\xfe",
        pickle.dumps([{}, []]),
        json.dumps([{}, [{"dtype": "float32", "shape": [1 << 39, 1 << 39]}]]).encode(),
        json.dumps([{}, [{"dtype": "float32", "shape": [-1]}]]).encode(),
        json.dumps([{}, [{"dtype": "float32", "shape": [1.5]}]]).encode(),
        json.dumps([{}, [{"dtype": "float32", "shape": [True]}]]).encode(),
        json.dumps([{}, [{"dtype": "object", "shape": [1]}]]).encode(),
        json.dumps([{}, [{"dtype": "int64", "shape": [8], "bits": 8}]]).encode(),
        json.dumps([{}, [{"dtype": "float32", "shape": [8], "bits": 4}]]).encode(),
        json.dumps([{}, [{"dtype": "float32", "shape": [1, 1, 1, 1, 1]}]]).encode(),
        json.dumps([{}, [{"shape": [1]}]]).encode(),
    ],
)
def test_forged_headers_are_refused_and_take_no_memory(header):
    with pytest.raises(BrokenFrame):
        decode_frame(forge(header, bytes(16)))


def test_bytes_that_no_tensor_claims_are_refused():
    with pytest.raises(BrokenFrame, match="16 bytes too many"):
        decode_frame(forge(b"[{}, []]", bytes(16)))
    with pytest.raises(BrokenFrame, match="unknown kind"):
        decode_frame(forge(b"[{}, []]", kind=77))


def read(data: bytes, limits: Limits, end: bool = True, seconds: float | None = 0.2) -> Frame:
    async def run() -> Frame:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        if end:
            reader.feed_eof()
        return (await read_frame(reader, limits, seconds))[0]

    return asyncio.run(run())


def test_a_stream_is_read_frame_by_frame():
    large = Frame(Kind.RESULT, {}, (torch.randn(600, 600),))
    assert torch.equal(read(encode_frame(large) + b"next", Limits()).tensors[0], large.tensors[0])
    with pytest.raises(asyncio.IncompleteReadError):
        read(encode_frame(large)[:-1], Limits())
    with pytest.raises(TimeoutError):
        read(encode_frame(random_frame())[:-1], Limits(), end=False)


def test_a_frame_that_promises_too_much_is_refused_before_it_is_read():
    data = encode_frame(random_frame())
    with pytest.raises(BrokenFrame, match="too large"):
        read(data[:HEAD_BYTES], Limits(body_bytes=100), end=False, seconds=None)
    with pytest.raises(BrokenFrame, match="too large"):
        read(data[:HEAD_BYTES], Limits(header_bytes=10), end=False, seconds=None)
    with pytest.raises(BrokenFrame, match="no frame"):
        read(b"GET / HTTP/1.1\r\nHost: example\r\n", Limits(), end=False, seconds=None)
