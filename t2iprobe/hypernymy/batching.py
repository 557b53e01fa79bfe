"""How many pictures are drawn at once: as fast as a device can, within its memory, found while drawing."""

import contextlib
import threading
from pathlib import Path
from typing import Protocol

FIRST, MOST = 2, 64  # pictures of a batch: where the search begins and ends
MOST_ON_CPU = 16  # beyond it a layer's pictures no longer fit the cache
FASTER = 0.05  # by which share a doubled batch must beat the one before, or the search is over
SHARE = 0.85  # of the free memory that a predicted batch may take: the prediction is a straight line


class Memory(Protocol):
    """What a device has and what was taken at most."""

    def peak_bytes(self) -> int | None:
        """Return the most memory that was taken since the last `reset`; None where nobody knows."""
        ...

    def free_bytes(self) -> int:
        """Return what can still be taken."""
        ...

    def used_bytes(self) -> int:
        """Return what is taken now."""
        ...

    def reset(self) -> None:
        """Forget the peak."""
        ...


class CudaMemory:
    """The memory of one GPU, as torch's allocator counts it."""

    def __init__(self, device: str) -> None:
        self.device = device

    def peak_bytes(self) -> int | None:
        import torch

        return torch.cuda.max_memory_allocated(self.device)

    def free_bytes(self) -> int:
        import torch

        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + kept

    def used_bytes(self) -> int:
        import torch

        return torch.cuda.memory_allocated(self.device)

    def reset(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats(self.device)


class ProcessMemory:
    """The RAM of this process, as Linux counts it; elsewhere the peak is not known."""

    def peak_bytes(self) -> int | None:
        return self._read("VmHWM")

    def free_bytes(self) -> int:
        import psutil

        return psutil.virtual_memory().available

    def used_bytes(self) -> int:
        return self._read("VmRSS") or 0

    def reset(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def _read(self, name: str) -> int | None:
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith(f"{name}:"):
                    return int(line.split()[1]) * 1024
        return None


def find_memory(device: str) -> Memory | None:
    """Return the memory of a device; None where it cannot be asked."""
    if device.startswith("cuda"):
        return CudaMemory(device)
    return ProcessMemory() if device == "cpu" else None


class BatchSizes:
    """Say how many pictures the next batch takes, and learn from each one that was drawn.

    A fixed size stays. Otherwise every batch drawn is a measurement: sizes double from FIRST as long as the
    doubled batch is expected to fit and the last doubling made a picture cheaper. Safe to use from threads.
    """

    def __init__(
        self, fixed: int | None = None, *, memory: Memory | None = None, lanes: int = 1, most: int = MOST
    ) -> None:
        """Begin with `fixed`, or search up to `most`, where `lanes` batches are drawn at the same time."""
        self.size = fixed or FIRST
        self.settled = fixed is not None
        self._memory = memory
        self._lanes = lanes
        self._most = fixed or most
        self._seconds: dict[int, list[float]] = {}
        self._base: int | None = None
        self._begun = 0  # batches since the size is settled
        self._lock = threading.Lock()

    def next(self, left: int) -> int:
        """Return the size of the next batch where `left` pictures remain.

        Once it is known which size pays, all batches are about as large, and every lane gets as many.
        """
        with self._lock:
            if self._base is None and self._memory is not None and not self.settled:
                self._memory.reset()
                self._base = self._memory.used_bytes()
            if not self.settled:
                return max(1, min(self.size, -(-left // self._lanes)))
            batches = self._lanes - self._begun % self._lanes  # of this round, then of whole ones
            batches += self._lanes * max(0, -(-(left - batches * self.size) // (self._lanes * self.size)))
            self._begun += 1
            return max(1, -(-left // batches))

    def learn(self, size: int, seconds: float) -> None:
        """Take note that a batch of `size` pictures took so long."""
        with self._lock:
            if self.settled or size != self.size:
                return
            times = self._seconds.setdefault(size, [])
            times.append(seconds / size)
            if len(times) < max(2, self._lanes):  # the first of a size also sets kernels up
                return
            before = self._seconds.get(size // 2)
            if before is not None and min(times) > (1 - FASTER) * min(before):
                self.settled = True
                self.size = size if min(times) < min(before) else size // 2
            elif 2 * size > self._most or not self._fits(2 * size):
                self.settled = True
            else:
                self.size = 2 * size

    def shrink(self, size: int) -> None:
        """Take note that `size` pictures did not fit the memory."""
        with self._lock:
            self.size = self._most = max(1, min(self._most, size // 2))
            self.settled = True

    def _fits(self, size: int) -> bool:
        peak = None if self._memory is None else self._memory.peak_bytes()
        if peak is None or self._memory is None or self._base is None:
            return True
        grown = max(0, peak - self._base)
        spare = self._memory.free_bytes() + self._memory.used_bytes() - self._base
        return grown * size / self.size <= SHARE * spare
