import ctypes
import errno
import mmap
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from t2iprobe.errors import UserError
from t2iprobe.llm.memory import sources
from t2iprobe.llm.memory.packing import BLOCK, Packed, pack_layers, pack_quantized, view_tensors
from t2iprobe.llm.memory.quantization import dequantize, quantize
from t2iprobe.llm.memory.sources import (
    Capped,
    DequantizedSource,
    DiskSource,
    Link,
    QuantizedSource,
    RamSource,
    Source,
    empty_buffer,
    padded,
)


def read_layer(source: Source, layer: int) -> tuple[dict[str, torch.Tensor], list[int]]:
    """A layer's tensors, and the traffic of each chunk."""
    out = empty_buffer(source.nbytes(layer)).fill_(0xAA)
    chunks = list(source.read(layer, out))
    return view_tensors(source.layout(layer), out), chunks


def assert_holds(source: Source, packed: Packed) -> None:
    """Every layer is byte by byte what its file holds, and every byte is counted."""
    assert source.layers == len(packed.layers)
    for layer, file in enumerate(packed.layers):
        tensors, chunks = read_layer(source, layer)
        expected = load_file(file.path)
        assert tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensors[name].view(torch.uint8), tensor.view(torch.uint8))
        assert sum(chunks) == source.traffic(layer) == source.nbytes(layer) == file.nbytes


@pytest.fixture
def without_direct_open(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuse(path: str, flags: int, *args: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(path, flags, *args)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.parametrize("chunk", [BLOCK, 5 * BLOCK, sources.CHUNK])
@pytest.mark.parametrize("direct", [True, False])
def test_the_disk_gives_every_byte(
    packed: Packed, direct: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "CHUNK", chunk)
    source = DiskSource(packed, direct)
    assert_holds(source, packed)
    assert_holds(source, packed)  # again, with checksums that were checked
    assert len(list(source.read(0, empty_buffer(source.nbytes(0))))) == -(-source.nbytes(0) // chunk)


def count_cached_pages(path: Path) -> int:
    """How many of a file's pages the page cache holds."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        pages = (ctypes.c_ubyte * -(-len(memory) // mmap.PAGESIZE))()
        view = np.frombuffer(memory, np.uint8)
        address = ctypes.c_void_p(view.ctypes.data)
        refused = ctypes.CDLL(None).mincore(address, ctypes.c_size_t(len(memory)), pages)
        del view
        assert not refused
        return sum(page & 1 for page in pages)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="cannot drop pages")
def test_a_direct_read_leaves_the_page_cache_alone(packed: Packed) -> None:
    source, path = DiskSource(packed), packed.layers[0].path
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if not source.direct or count_cached_pages(path):
        pytest.skip("this file system refuses direct reads, or keeps its pages")
    read_layer(source, 0)
    assert not count_cached_pages(path)
    read_layer(DiskSource(packed, direct=False), 0)
    assert count_cached_pages(path)


@pytest.mark.usefixtures("without_direct_open")
def test_where_a_direct_open_is_refused_pages_are_dropped(
    packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    advice = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: advice.append(args[1:]))
    source = DiskSource(packed)
    assert not source.direct
    assert source.drops_pages
    assert_holds(source, packed)
    assert advice == [(0, 0, os.POSIX_FADV_DONTNEED)] * source.layers


def test_where_a_direct_read_is_refused_pages_are_dropped(
    packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", refuse)
        source = DiskSource(packed)
    assert not source.direct
    assert source.drops_pages
    assert_holds(source, packed)


def test_cached_reads_drop_nothing(packed: Packed) -> None:
    source = DiskSource(packed, direct=False)
    assert not source.direct
    assert not source.drops_pages


def test_a_buffer_that_is_not_aligned_is_filled_as_well(
    packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = DiskSource(packed)
    read = os.preadv

    def read_as_a_strict_disk(descriptor: int, parts: list[memoryview], offset: int) -> int:
        for part in parts if source.direct else ():
            if np.frombuffer(part, np.uint8).ctypes.data % BLOCK or len(part) % BLOCK or offset % BLOCK:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return read(descriptor, parts, offset)

    monkeypatch.setattr(os, "preadv", read_as_a_strict_disk)
    for start, size in (
        (8, 0),
        (0, 0),
        (512, BLOCK),
    ):
        memory = empty_buffer(padded(source.nbytes(1)) + 2 * BLOCK)
        out = memory[start : start + source.nbytes(1) + size]
        assert sum(source.read(1, out)) == source.nbytes(1)
        expected = packed.layers[1].path.read_bytes()[packed.layers[1].start :]
        assert bytes(out[: source.nbytes(1)].numpy()) == expected


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda raw: raw[:-1], "instead of"),
        (lambda raw: raw[:BLOCK], "instead of"),
        (lambda raw: raw + b"\0", "instead of"),
        (lambda raw: raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:], "is damaged"),
        (None, "cannot read"),
    ],
)
def test_a_file_that_was_damaged_after_opening_is_named(
    packed: Packed, damage: Callable[[bytes], bytes] | None, told: str, direct: bool
) -> None:
    source = DiskSource(packed, direct)
    path = packed.layers[2].path
    raw = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(raw))
    read_layer(source, 1)
    with pytest.raises(UserError, match=rf"layer_002.safetensors.*{told}|{told}.*layer_002") as error:
        read_layer(source, 2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_that_is_cut_while_it_is_read_is_named(
    packed: Packed, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "CHUNK", 2 * BLOCK)
    source = DiskSource(packed, direct)
    reading = source.read(0, empty_buffer(source.nbytes(0)))
    next(reading)
    os.truncate(packed.layers[0].path, packed.layers[0].start + 3 * BLOCK + 5)
    with pytest.raises(UserError, match="layer_000.safetensors is truncated"):
        list(reading)


def test_a_broken_disk_is_told_in_a_line(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    source = DiskSource(packed)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(UserError, match="cannot read .*layer_000.safetensors: Input/output error"):
        read_layer(source, 0)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_no_file_stays_open(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK", BLOCK)
    before = os.listdir("/proc/self/fd")
    source = DiskSource(packed)
    read_layer(source, 0)
    reading = source.read(1, empty_buffer(source.nbytes(1)))
    next(reading)
    del reading  # broken off
    os.truncate(packed.layers[2].path, BLOCK)
    with pytest.raises(UserError):
        read_layer(source, 2)
    assert os.listdir("/proc/self/fd") == before


def test_ram_gives_every_byte_without_the_disk(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    source = RamSource(DiskSource(packed))
    monkeypatch.setattr(sources, "CHUNK", 3000)
    assert_holds(source, packed)
    packed.layers[3].path.unlink()
    assert sum(read_layer(source, 3)[1]) == source.nbytes(3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_matrices_come_dequantised_and_vectors_as_they_are(packed: Packed, bits: int) -> None:
    source = QuantizedSource(DiskSource(packed), bits, group=32)
    for layer, file in enumerate(packed.layers):
        tensors, chunks = read_layer(source, layer)
        traffic = 0
        for name, tensor in load_file(file.path).items():
            if tensor.dim() == 1:
                expected, stored = tensor, tensor.nbytes
            else:
                quantized = quantize(tensor, bits, group=32)
                expected, stored = torch.empty_like(tensor), quantized.nbytes
                dequantize(quantized, expected)
            assert torch.equal(tensors[name], expected)
            traffic += stored
        assert sum(chunks) == source.traffic(layer) == traffic < source.nbytes(layer) == file.nbytes


def test_each_experts_matrix_has_groups_of_its_own(tmp_path: Path) -> None:
    experts = torch.randn(3, 64, 5, generator=torch.Generator().manual_seed(0))
    (tmp_path / "model").mkdir()
    save_file({"layers.0.experts": experts}, tmp_path / "model" / "model.safetensors")
    packed = pack_layers(tmp_path / "model", tmp_path / "packed")
    stored = DiskSource(pack_quantized(packed, tmp_path / "quantized"))
    for source in (QuantizedSource(DiskSource(packed), 4), DequantizedSource(stored, packed, 4)):
        found = read_layer(source, 0)[0]["experts"]
        expected = torch.empty_like(experts)
        for matrix, out in zip(experts, expected, strict=True):
            dequantize(quantize(matrix, 4), out)
        assert torch.equal(found, expected)
        assert source.traffic(0) == sum(quantize(matrix, 4).nbytes for matrix in experts)


class Clock:
    """Time that passes when it is slept away, and a little more than asked for; or when told."""

    def __init__(self, oversleep: Callable[[], float] = lambda: 0.0) -> None:
        self.now = 100.0
        self.oversleep = oversleep

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds + self.oversleep()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    draw = random.Random(0)
    clock = Clock(lambda: draw.uniform(0, 3e-4))
    monkeypatch.setattr(sources, "time", clock)
    return clock


def transfer(clock: Clock, link: Link, nbytes: int, seconds: float = 0.0) -> float:
    """Read for `seconds`, then wait for the link; return how long both took."""
    began = clock.now
    clock.now += seconds
    link.wait(nbytes, began)
    return clock.now - began


@pytest.mark.parametrize("nbytes", [100, 10_000, 4 << 20])
def test_a_row_of_transfers_takes_as_long_as_its_bytes(clock: Clock, nbytes: int) -> None:
    link, began = Link(1e8), clock.now
    for count in range(1, 2000):
        transfer(clock, link, nbytes, seconds=0.3 * nbytes / 1e8)
        assert 0 <= clock.now - began - count * nbytes / 1e8 + 1e-9 < 3.1e-4


def test_an_idle_link_saves_nothing(clock: Clock) -> None:
    link = Link(1e8)
    transfer(clock, link, 1_000_000)
    clock.now += 60
    total = sum(transfer(clock, link, 1_000_000) for _ in range(10))
    assert total >= 0.1 - 3e-4  # the first wait's lateness is the only credit


def test_a_source_that_is_slower_than_the_link_earns_no_credit(clock: Clock) -> None:
    link = Link(1e8)
    for _ in range(10):
        assert transfer(clock, link, 1_000_000, seconds=0.05) == pytest.approx(0.05)
    assert transfer(clock, link, 1_000_000) >= 0.01


def test_a_capped_source_is_paced_chunk_by_chunk(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK", BLOCK)
    source = Capped(RamSource(DiskSource(packed)), 4e6)
    assert_holds(Capped(DiskSource(packed), 1e9), packed)
    arrived = []
    began = time.perf_counter()
    for nbytes in source.read(0, empty_buffer(source.nbytes(0))):
        arrived.append((nbytes, time.perf_counter() - began))
    total = 0
    for nbytes, seconds in arrived:
        total += nbytes
        assert seconds >= total / 4e6 - 1e-6  # no chunk before its time
    assert len(arrived) == -(-source.nbytes(0) // BLOCK)


def test_a_slow_link_can_be_left_inside_a_chunk(packed: Packed, clock: Clock) -> None:
    source = Capped(RamSource(DiskSource(packed)), 1e4)
    arrived, began = [], clock.now
    for nbytes in source.read(0, empty_buffer(source.nbytes(0))):
        arrived.append(nbytes)
        assert 0 <= clock.now - began - sum(arrived) / 1e4 + 1e-9 < 3.1e-4
    assert sum(arrived) == source.traffic(0)
    assert max(arrived) == 1000  # a tenth of a second


def test_capped_traffic_is_that_of_the_source(packed: Packed) -> None:
    quantized = QuantizedSource(DiskSource(packed), 4)
    source = Capped(quantized, 1e9)
    assert sum(read_layer(source, 0)[1]) == source.traffic(0) == quantized.traffic(0) < source.nbytes(0)


@pytest.mark.parametrize("speed", [0, -1, float("nan")])
def test_a_link_that_carries_nothing(speed: float) -> None:
    with pytest.raises(UserError, match=re.escape(f"a link cannot carry {speed}")):
        Link(speed)


def test_buffers_start_and_end_with_a_block() -> None:
    for nbytes in (1, BLOCK - 1, BLOCK, BLOCK + 1, 10 * BLOCK):
        buffer = empty_buffer(nbytes)
        assert buffer.data_ptr() % BLOCK == 0
        assert nbytes <= len(buffer) == padded(nbytes) < nbytes + BLOCK
