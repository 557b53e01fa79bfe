"""A model's layers in little fast memory: some stay, the others pass through a ring of buffers.

A background thread reads the streamed layers in order into the ring, ahead of the pass that computes with
them, and wraps into the next pass while a draft is made (SpecExec, arXiv 2406.02532, section 4). What stays
is spread evenly, so that the reader gains time all along the pass.
"""

import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import torch

from t2iprobe.errors import UserError
from t2iprobe.llm.memory.packing import view_tensors
from t2iprobe.llm.memory.sources import Source, empty_buffer, padded


@dataclass(frozen=True)
class Residency:
    """Which layers stay, through how many buffers the others pass, and the bytes of all that."""

    resident: tuple[int, ...]
    buffers: int
    nbytes: int


def choose_resident(
    layer_bytes: Sequence[int], budget_bytes: int, fixed_bytes: int, buffers: int = 2
) -> Residency:
    """Let as many layers stay as `budget_bytes` hold beside `fixed_bytes` (all else that stays) and the ring.

    Where nothing fits but a smaller ring, it is smaller. Where all layers fit, there is none. `nbytes` counts
    the fixed bytes. Raises UserError, with the least that works, for a smaller budget.
    """
    layers = len(layer_bytes)
    for ring in range(buffers, 0, -1):
        for count in range(layers, -1, -1):
            resident = spread_evenly(count, layers)
            streamed = [layer_bytes[layer] for layer in range(layers) if layer not in resident]
            ring_bytes = min(ring, len(streamed)) * max(map(padded, streamed), default=0)
            nbytes = fixed_bytes + sum(padded(layer_bytes[layer]) for layer in resident) + ring_bytes
            if nbytes <= budget_bytes:
                return Residency(resident, min(ring, len(streamed)), nbytes)
    least = fixed_bytes + padded(max(layer_bytes))
    raise UserError(
        f"the memory budget of {budget_bytes} bytes is too small: embedding, head and draft take "
        f"{fixed_bytes} and the largest layer {padded(max(layer_bytes))}; give {least} or more"
    )


def spread_evenly(count: int, layers: int) -> tuple[int, ...]:
    """Return `count` of the numbers 0 … layers − 1, spread evenly."""
    return tuple((2 * i + 1) * layers // (2 * count) for i in range(count))


@dataclass
class Counters:
    """What a store did since it was made.

    `bytes_read` is all that crossed the slow link: layers that stay, layers that were read ahead, and those
    that were read in vain. `bytes_used` is what the passes took of it, so it does not depend on timing.
    """

    bytes_read: int = 0
    bytes_used: int = 0
    passes: int = 0  # how often layer 0 was asked for
    stalls: int = 0  # how often a layer was asked for and had to be waited for
    stall_seconds: float = 0.0
    resident_peak_bytes: int = 0  # layers that stay and buffers of the ring


@dataclass
class _Buffer:
    """Memory for a layer; on a GPU, with the event after which it may be written."""

    data: torch.Tensor
    used: torch.cuda.Event | None = None


@dataclass
class _Arrival:
    """What the reader brought for a layer: its buffer, or the error that it met."""

    layer: int
    buffer: _Buffer | None = None
    error: BaseException | None = None


class WeightStore:
    """Layers of `source` on `device`, for one pass at a time.

    The layers in `resident` are read now and stay. The others are read through `buffers` buffers: by a thread
    of the store's own, ahead of their use, or with ``prefetch=False`` when they are asked for. Close the
    store, or use it as a context: the thread ends and the memory is given back.
    """

    def __init__(
        self,
        source: Source,
        resident: Collection[int] = (),
        buffers: int = 2,
        device: torch.device | str = "cpu",
        prefetch: bool = True,
    ) -> None:
        if unknown := set(resident) - set(range(source.layers)):
            raise UserError(f"there is no layer {min(unknown)} to stay: the model has {source.layers}")
        if buffers < 1:
            raise UserError(f"a weight store needs 1 buffer or more, not {buffers}")
        self.source, self.device = source, torch.device(device)
        self.resident = tuple(sorted(set(resident)))
        self._streamed = [layer for layer in range(source.layers) if layer not in self.resident]
        self._counters = Counters()
        self._changed = threading.Condition()
        self._is_closing = False
        self._epoch = 0  # a read that began in an earlier epoch is read in vain
        self._coming = 0  # index in _streamed of the layer that is being read, or is next
        self._is_paused = False  # after an error
        self._ready: deque[_Arrival] = deque()  # in the order of reading
        self._held: dict[int, _Buffer] = {}
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._stay: dict[int, dict[str, torch.Tensor]] = {}
        for layer in self.resident:
            buffer = self._allocate(source.nbytes(layer))
            self._load(layer, buffer)
            self._stay[layer] = self._view(layer, buffer)
        size = max(map(source.nbytes, self._streamed), default=0)
        count = min(buffers, len(self._streamed))
        self._free = deque(self._allocate(size) for _ in range(count))
        self.buffers = count
        self._reader = None
        if prefetch and self._streamed:
            self._reader = threading.Thread(target=self._read_ahead, name="weight reader", daemon=True)
            self._reader.start()

    @property
    def layers(self) -> int:
        """How many layers there are, those that stay included."""
        return self.source.layers

    @property
    def counters(self) -> Counters:
        """A copy of the counters as they are now."""
        with self._changed:
            return replace(self._counters)

    def acquire(self, layer: int) -> dict[str, torch.Tensor]:
        """Return the layer's tensors, name → view, as soon as they are here; valid until `release`.

        Layers are asked for in order. Asking for an earlier one, as after a pass that was broken off, gives
        up what was not released and reads on from there. An error of the reader is raised here, and the store
        stays usable. Raises RuntimeError when the store is closed, or all its buffers are in use.
        """
        with self._changed:
            self._check_open()
            self._counters.passes += layer == 0
            if layer in self._stay:
                return self._stay[layer]
            if layer not in self._held:
                for later in [held for held in self._held if held > layer]:
                    self._give_back(self._held.pop(later))
                if len(self._held) == self.buffers:
                    raise RuntimeError(f"layers {sorted(self._held)} hold all buffers: release one first")
                self._held[layer] = self._take(layer)
                self._counters.bytes_used += self.source.traffic(layer)
            return self._view(layer, self._held[layer])

    def release(self, layer: int) -> None:
        """Let the layer's buffer be filled again. For a layer that stays, or is not held: nothing."""
        with self._changed:
            if layer in self._held:
                self._give_back(self._held.pop(layer))

    def close(self) -> None:
        """End the reader, even inside a layer, and give all memory back."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._reader is not None:
            self._reader.join()
        for held in (self._stay, self._held, self._ready, self._free):
            held.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._is_closing:
            raise RuntimeError("the weight store is closed")

    def _allocate(self, nbytes: int) -> _Buffer:
        data = empty_buffer(nbytes, self.device)
        self._counters.resident_peak_bytes += data.nbytes
        return _Buffer(data, self._record())

    def _record(self) -> torch.cuda.Event | None:
        """Mark, on a GPU, what was asked of it so far."""
        return None if self._stream is None else torch.cuda.current_stream(self.device).record_event()

    def _view(self, layer: int, buffer: _Buffer) -> dict[str, torch.Tensor]:
        return view_tensors(self.source.layout(layer), buffer.data)

    def _give_back(self, buffer: _Buffer) -> None:
        buffer.used = self._record()
        self._free.append(buffer)
        self._changed.notify_all()

    def _take(self, layer: int) -> _Buffer:
        """Return the buffer that holds a streamed layer, as soon as it does."""
        while self._ready and self._ready[0].layer != layer:
            self._discard(self._ready.popleft())
        if not self._ready and (self._is_paused or self._streamed[self._coming] != layer):
            self._seek(layer)
        if not self._ready:
            self._wait_for_arrival(layer)
        arrival = self._ready.popleft()
        if arrival.buffer is None:
            assert arrival.error is not None
            raise arrival.error
        return arrival.buffer

    def _discard(self, arrival: _Arrival) -> None:
        if arrival.buffer is not None:
            self._free.append(arrival.buffer)
            self._changed.notify_all()

    def _seek(self, layer: int) -> None:
        """Read on from `layer`, and forget what is being read."""
        self._coming = self._streamed.index(layer)
        self._epoch += 1
        self._is_paused = False
        self._changed.notify_all()

    def _wait_for_arrival(self, layer: int) -> None:
        began = time.perf_counter()
        try:
            if self._reader is None:
                self._fetch(layer, self._free.popleft(), self._epoch)
            while not self._ready:
                self._changed.wait()
                self._check_open()
        finally:
            self._counters.stalls += 1
            self._counters.stall_seconds += time.perf_counter() - began

    def _read_ahead(self) -> None:
        """The reader's thread: fill free buffers with the coming layers until the store is closed."""
        while True:
            with self._changed:
                while not self._is_closing and (self._is_paused or not self._free):
                    self._changed.wait()
                if self._is_closing:
                    return
                layer, buffer, epoch = self._streamed[self._coming], self._free.popleft(), self._epoch
            self._fetch(layer, buffer, epoch)

    def _fetch(self, layer: int, buffer: _Buffer, epoch: int) -> None:
        """Read a layer and queue it, or the error; in vain if the caller went elsewhere meanwhile."""
        caught = None
        try:
            self._load(layer, buffer, epoch)
        except BaseException as error:  # whatever it is, the caller waits for it
            caught = error
        with self._changed:
            if epoch != self._epoch:
                self._free.append(buffer)
            elif caught is not None:
                self._free.append(buffer)
                self._ready.append(_Arrival(layer, error=caught))
                self._is_paused = True
            else:
                self._ready.append(_Arrival(layer, buffer))
                self._coming = (self._coming + 1) % len(self._streamed)
            self._changed.notify_all()

    def _load(self, layer: int, buffer: _Buffer, epoch: int = 0) -> None:
        """Read a layer into a buffer; break off when the store closes or the caller goes elsewhere."""
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            if self._stream is not None and buffer.used is not None:
                self._stream.wait_event(buffer.used)
            try:
                for nbytes in self.source.read(layer, buffer.data):
                    with self._changed:
                        self._counters.bytes_read += nbytes
                        if self._is_closing or epoch != self._epoch:
                            return
            finally:
                if self._stream is not None:
                    self._stream.synchronize()
