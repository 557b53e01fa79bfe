"""Where a model's layers come from: the disk, RAM, RAM in few bits, or any of these through a capped link.

A layer is one flat run of bytes; its tensors are views into it. Whatever a source is, a reader hands it a
buffer and takes what arrives chunk by chunk, so that bytes are counted, a cap is kept and a read can be
broken off inside a layer.
"""

import os
import time
import zlib
from collections.abc import Collection, Iterator
from typing import Protocol

import numpy as np
import torch

from t2iprobe.errors import UserError
from t2iprobe.llm.memory.packing import BLOCK, Packed, PackedFile, Place, check_sum, view_tensors
from t2iprobe.llm.memory.quantization import Quantized, count_planes, dequantize, quantize

# Large enough that a disk reads at full speed, small enough that closing a store never waits for long.
CHUNK = 4 << 20


class Source(Protocol):
    """A model's layers in slow memory, numbered from 0."""

    @property
    def layers(self) -> int:
        """How many layers there are."""

    def nbytes(self, layer: int) -> int:
        """Bytes of the layer as it is computed with."""

    def traffic(self, layer: int) -> int:
        """Bytes that cross the slow link when the layer is read."""

    def layout(self, layer: int) -> dict[str, Place]:
        """Tensor name (within the layer) → where it lies in the layer's bytes."""

    def read(self, layer: int, out: torch.Tensor) -> Iterator[int]:
        """Fill `out` uint8 [`padded`(nbytes) or more] and yield the traffic of each chunk that arrived.

        The layer is whole when the iterator ends, and only then. Raises UserError for a damaged file.
        """


def padded(nbytes: int) -> int:
    """Return the size of a buffer that the disk can read `nbytes` into: whole blocks."""
    return -(-nbytes // BLOCK) * BLOCK


def empty_buffer(nbytes: int, device: torch.device | str = "cpu", pin: bool = False) -> torch.Tensor:
    """Return uint8 [`padded`(nbytes)], in the CPU's memory at the start of a block."""
    if torch.device(device).type != "cpu":
        return torch.empty(padded(nbytes), dtype=torch.uint8, device=device)
    memory = torch.empty(padded(nbytes) + BLOCK, dtype=torch.uint8, pin_memory=pin)
    start = -memory.data_ptr() % BLOCK
    return memory[start : start + padded(nbytes)]


class DiskSource:
    """A packed model on the disk. `direct`: read around the page cache, as a model larger than RAM is read.

    Where the file system refuses direct reads, pages are dropped after use instead (`drops_pages`). The first
    read of a layer checks its checksum.
    """

    def __init__(self, packed: Packed, direct: bool = True) -> None:
        self._packed = packed
        self._checked: set[int] = set()
        self.direct = direct and _reads_directly(packed.layers[0])
        self.drops_pages = direct and not self.direct
        self._bounce = torch.empty(0, dtype=torch.uint8)

    @property
    def layers(self) -> int:
        return len(self._packed.layers)

    def nbytes(self, layer: int) -> int:
        return self._packed.layers[layer].nbytes

    def traffic(self, layer: int) -> int:
        return self.nbytes(layer)

    def layout(self, layer: int) -> dict[str, Place]:
        return self._packed.layers[layer].layout

    def read(self, layer: int, out: torch.Tensor) -> Iterator[int]:
        file = self._packed.layers[layer]
        checksum = None if layer in self._checked else 0
        try:
            descriptor = _open(file, self.direct)
            try:
                for offset in range(0, file.nbytes, CHUNK):
                    size = min(CHUNK, file.nbytes - offset)
                    target = self._choose_target(out, offset, size)
                    memory = target.numpy().data
                    _read_exactly(descriptor, memory, size, file, offset, self.direct)
                    if checksum is not None:
                        checksum = zlib.crc32(memory[:size], checksum)
                    if target is self._bounce:
                        out[offset : offset + size].copy_(target[:size])
                    yield size
                if self.drops_pages and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UserError(f"cannot read {file.path}: {error.strerror}") from None
        if checksum is not None:
            check_sum(file, checksum)
            self._checked.add(layer)

    def _choose_target(self, out: torch.Tensor, offset: int, size: int) -> torch.Tensor:
        """Return the part of `out` that a chunk fills, or a buffer of ours where it cannot be read there."""
        if out.device.type == "cpu":
            part = out[offset : offset + padded(size)]
            if len(part) == padded(size) and part.data_ptr() % BLOCK == 0:
                return part
        if not len(self._bounce):
            self._bounce = empty_buffer(CHUNK, pin=torch.cuda.is_available())
        return self._bounce


def _open(file: PackedFile, direct: bool) -> int:
    descriptor = os.open(file.path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    size = os.fstat(descriptor).st_size
    if size != file.start + file.nbytes:
        os.close(descriptor)
        raise UserError(
            f"{file.path} has {size} bytes instead of {file.start + file.nbytes}: "
            f"delete {file.path.parent}, it is made again"
        )
    return descriptor


def _reads_directly(file: PackedFile) -> bool:
    """Try a direct read: some file systems refuse to open, others to read."""
    if not hasattr(os, "O_DIRECT"):
        return False
    try:
        descriptor = os.open(file.path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return False
    try:
        os.preadv(descriptor, [empty_buffer(BLOCK).numpy().data], 0)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _read_exactly(
    descriptor: int, memory: memoryview, size: int, file: PackedFile, offset: int, direct: bool
) -> None:
    """Read the file's tensor bytes from `offset` on, into the first `size` of `memory`."""
    done = 0
    while done < size:
        # A direct read asks for whole blocks, also at the file's end.
        part = memory[done : padded(size) if direct else size]
        count = os.preadv(descriptor, [part], file.start + offset + done)
        done += count
        if not count or (direct and done < size and done % BLOCK):
            raise UserError(f"{file.path} is truncated: delete {file.path.parent}, it is made again")


class RamSource:
    """The layers of another source, held in RAM; in page-locked RAM where there is a GPU to feed."""

    def __init__(self, source: Source) -> None:
        self._layouts = [source.layout(layer) for layer in range(source.layers)]
        self._data = []
        for layer in range(source.layers):
            data = empty_buffer(source.nbytes(layer), pin=torch.cuda.is_available())
            for _ in source.read(layer, data):
                pass
            self._data.append(data[: source.nbytes(layer)])

    @property
    def layers(self) -> int:
        return len(self._data)

    def nbytes(self, layer: int) -> int:
        return len(self._data[layer])

    def traffic(self, layer: int) -> int:
        return self.nbytes(layer)

    def layout(self, layer: int) -> dict[str, Place]:
        return self._layouts[layer]

    def read(self, layer: int, out: torch.Tensor) -> Iterator[int]:
        data = self._data[layer]
        for offset in range(0, len(data), CHUNK):
            chunk = data[offset : offset + CHUNK]
            _copy(chunk, out[offset : offset + len(chunk)])
            yield len(chunk)


def _copy(data: torch.Tensor, out: torch.Tensor) -> None:
    if out.device.type == "cpu":
        # numpy copies with one thread: torch would take those that the pass computes with.
        np.copyto(out.numpy(), data.numpy())
    else:
        out.copy_(data, non_blocking=True)


class QuantizedSource:
    """The matrices of another source in 2, 3, 4 or 8 bits in RAM; reading dequantises them.

    Vectors (norms, biases) stay as they are. The traffic is what is stored, not what is computed with.
    """

    def __init__(self, source: Source, bits: int, group: int = 64) -> None:
        self._layouts = [source.layout(layer) for layer in range(source.layers)]
        self._sizes = [source.nbytes(layer) for layer in range(source.layers)]
        self._tensors: list[dict[str, Quantized | torch.Tensor]] = []
        buffer = empty_buffer(max(self._sizes))
        for layer, layout in enumerate(self._layouts):
            for _ in source.read(layer, buffer):
                pass
            tensors = view_tensors(layout, buffer)
            self._tensors.append({name: _hold(tensor, bits, group) for name, tensor in tensors.items()})

    @property
    def layers(self) -> int:
        return len(self._tensors)

    def nbytes(self, layer: int) -> int:
        return self._sizes[layer]

    def traffic(self, layer: int) -> int:
        return sum(tensor.nbytes for tensor in self._tensors[layer].values())

    def layout(self, layer: int) -> dict[str, Place]:
        return self._layouts[layer]

    def read(self, layer: int, out: torch.Tensor) -> Iterator[int]:
        places = view_tensors(self._layouts[layer], out)
        for name, tensor in self._tensors[layer].items():
            if isinstance(tensor, Quantized):
                dequantize(tensor, places[name].flatten(0, -2))
            else:
                places[name].copy_(tensor, non_blocking=True)
            yield tensor.nbytes


class HeldSource:
    """Another source, some layers of which are held in RAM: reading those crosses no slow link."""

    def __init__(self, source: Source, layers: Collection[int]) -> None:
        self._source = source
        self._data: dict[int, torch.Tensor] = {}
        for layer in layers:
            data = empty_buffer(source.nbytes(layer), pin=torch.cuda.is_available())
            for _ in source.read(layer, data):
                pass
            self._data[layer] = data[: source.nbytes(layer)]

    @property
    def layers(self) -> int:
        return self._source.layers

    def nbytes(self, layer: int) -> int:
        return self._source.nbytes(layer)

    def traffic(self, layer: int) -> int:
        return 0 if layer in self._data else self._source.traffic(layer)

    def layout(self, layer: int) -> dict[str, Place]:
        return self._source.layout(layer)

    def read(self, layer: int, out: torch.Tensor) -> Iterator[int]:
        if layer not in self._data:
            yield from self._source.read(layer, out)
            return
        data = self._data[layer]
        for offset in range(0, len(data), CHUNK):
            chunk = data[offset : offset + CHUNK]
            _copy(chunk, out[offset : offset + len(chunk)])
            yield 0


class DequantizedSource:
    """A model whose layers lie in `stored` as `pack_quantized` wrote them, as it is computed with."""

    def __init__(self, stored: Source, packed: Packed, bits: int, group: int = 64) -> None:
        self.stored, self._packed = stored, packed
        self._layouts = [file.layout for file in packed.layers]
        self._sizes = [file.nbytes for file in packed.layers]
        self._bits, self._group = bits, group
        self._buffer = torch.empty(0, dtype=torch.uint8)

    @property
    def layers(self) -> int:
        return self.stored.layers

    def hold(self, layers: Collection[int]) -> "DequantizedSource":
        """Return the same with some layers held in RAM, in few bits."""
        return DequantizedSource(HeldSource(self.stored, layers), self._packed, self._bits, self._group)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffer in which a layer arrives before it is dequantised."""
        return padded(max(map(self.stored.nbytes, range(self.layers))))

    def nbytes(self, layer: int) -> int:
        return self._sizes[layer]

    def traffic(self, layer: int) -> int:
        return self.stored.traffic(layer)

    def layout(self, layer: int) -> dict[str, Place]:
        return self._layouts[layer]

    def read(self, layer: int, out: torch.Tensor) -> Iterator[int]:
        if not len(self._buffer):
            self._buffer = empty_buffer(self.buffer_bytes)
        yield from self.stored.read(layer, self._buffer)
        tensors = view_tensors(self.stored.layout(layer), self._buffer)
        for name, place in view_tensors(self._layouts[layer], out).items():
            if name in tensors:
                place.copy_(tensors[name])
                continue
            planes = tuple(tensors[f"{name}|{plane}"] for plane in range(count_planes(self._bits)))
            scale, minimum = tensors[f"{name}|scale"], tensors[f"{name}|minimum"]
            held = Quantized(planes, scale, minimum, self._bits, self._group)
            dequantize(held, place.flatten(0, -2))


def _hold(tensor: torch.Tensor, bits: int, group: int) -> Quantized | torch.Tensor:
    is_matrix = tensor.dim() > 1 and tensor.is_floating_point()
    # Experts' matrices lie one behind the other: groups are rows of one, not the same row of many.
    held = quantize(tensor.flatten(0, -2), bits, group) if is_matrix else tensor.clone()
    return held.pin_memory() if torch.cuda.is_available() else held


class Link:
    """A simulated link that carries `bytes_per_second`: a token bucket that saves nothing while it is idle.

    One transfer at a time. A wait that the system ended late is made up for by the next one, so that a row of
    transfers takes as long as their bytes, however small the pieces.
    """

    def __init__(self, bytes_per_second: float) -> None:
        if not bytes_per_second > 0:
            raise UserError(f"a link cannot carry {bytes_per_second} bytes a second")
        self.bytes_per_second = bytes_per_second
        self._late = 0.0

    def wait(self, nbytes: int, began: float) -> None:
        """Return when `nbytes` have passed whose transfer began at time.perf_counter() == `began`."""
        due = began - self._late + nbytes / self.bytes_per_second
        if (left := due - time.perf_counter()) > 0:
            time.sleep(left)
            self._late = time.perf_counter() - due
        else:
            # A slow read earns no credit: only waits do.
            self._late = min(self._late, -left)


class Capped:
    """Another source, read through a simulated link."""

    def __init__(self, source: Source, bytes_per_second: float) -> None:
        self._source = source
        self.link = Link(bytes_per_second)

    @property
    def layers(self) -> int:
        return self._source.layers

    def nbytes(self, layer: int) -> int:
        return self._source.nbytes(layer)

    def traffic(self, layer: int) -> int:
        return self._source.traffic(layer)

    def layout(self, layer: int) -> dict[str, Place]:
        return self._source.layout(layer)

    def read(self, layer: int, out: torch.Tensor) -> Iterator[int]:
        # In pieces of a tenth of a second at most, so that a slow link can be left, too.
        most = max(1, int(self.link.bytes_per_second / 10))
        began = time.perf_counter()
        for nbytes in self._source.read(layer, out):
            for offset in range(0, nbytes, most):
                piece = min(most, nbytes - offset)
                self.link.wait(piece, began)
                yield piece
                began = time.perf_counter()
