"""Keys, values and hidden states of the batches of a block, each where the placement says.

What lies elsewhere than it is computed with comes before it is needed and goes back behind it. The disk is
read and written by one thread, in order, beside the computation; its files have no name and so are gone
with the process, however that ends. The system may keep pages of them in memory that nobody else wants.
"""

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from t2iprobe.errors import UserError
from t2iprobe.llm.engine.cache import HIDDEN
from t2iprobe.llm.memory.ledger import Ledger
from t2iprobe.llm.memory.quantization import dequantize_rows, quantize_rows, row_bytes
from t2iprobe.storage import explain_full_disk

__all__ = ["BatchCache", "DiskTier", "HiddenStates", "attend_where_keys_lie", "computing_where_keys_lie"]

_ON_ITS_WAY = "between memory and disk"
# Numbers that are packed together.
_TOGETHER = 1 << 18
_WHERE_KEYS_LIE = "t2iprobe: where the keys lie"


class DiskTier:
    """A folder for what is in no memory, and the one thread that reads and writes there. Close it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(f"cannot write in {folder}: {error.strerror}") from None
        self._thread = ThreadPoolExecutor(1, "disk tier")
        self._writes: deque[Future[Any]] = deque()

    def open(self) -> "_File":
        """Return a new file without a name, empty."""
        return _File(self)

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Let the thread do something behind all that it was asked for before."""
        return self._thread.submit(work, *arguments)

    def write(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Let the thread write; what goes wrong is raised by `wait`, or by the next write.

        Two writes are on their way at most: a disk that is slower than the computation holds it up, and not
        the memory of what it still has to write.
        """
        self.wait()
        self._writes.append(self.submit(work, *arguments))

    def wait(self, most: int = 1) -> None:
        """Return when `most` writes are left to be done."""
        while self._writes and (len(self._writes) > most or self._writes[0].done()):
            self._writes.popleft().result()

    def close(self) -> None:
        """End the thread behind all that it was asked for."""
        self._thread.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _File:
    """Bytes on the disk, without a name."""

    def __init__(self, tier: DiskTier) -> None:
        self._tier = tier
        self._file = tempfile.TemporaryFile(dir=tier.folder, buffering=0)  # noqa: SIM115  # kept open

    def read(self, offset: int, out: torch.Tensor) -> Future[Any]:
        """Fill `out` uint8 in the CPU's memory, behind all writes."""
        return self._tier.submit(self._read, offset, out)

    def write(self, offset: int, data: torch.Tensor, then: Callable[[], None]) -> None:
        """Write `data` uint8 in the CPU's memory, which is not to be changed, and call `then`."""
        self._tier.write(self._write, offset, data, then)

    def close(self) -> None:
        """Give the disk's space back, behind all that was asked for."""
        try:
            self._tier.submit(self._file.close)
        except RuntimeError:  # the thread has ended
            self._file.close()

    def _read(self, offset: int, out: torch.Tensor) -> None:
        memory = out.view(-1).numpy().data
        while len(memory):
            count = os.preadv(self._file.fileno(), [memory], offset)
            if not count:
                raise UserError(f"a file of the cache in {self._tier.folder} is truncated")
            memory, offset = memory[count:], offset + count

    def _write(self, offset: int, data: torch.Tensor, then: Callable[[], None]) -> None:
        memory = data.view(-1).numpy().data
        try:
            with explain_full_disk(self._tier.folder):
                while len(memory):
                    count = os.pwrite(self._file.fileno(), memory, offset)
                    memory, offset = memory[count:], offset + count
        except OSError as error:
            raise UserError(f"cannot write in {self._tier.folder}: {error.strerror}") from None
        finally:
            then()


class _Account:
    """What one owner has taken of a ledger, so that it can give all back."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._has: dict[tuple[str, str], int] = {}

    def take(self, tier: str, name: str, nbytes: int) -> None:
        self._ledger.take(tier, name, nbytes)
        self._has[tier, name] = self._has.get((tier, name), 0) + nbytes

    def give(self, tier: str, name: str, nbytes: int) -> None:
        self._ledger.give(tier, name, nbytes)
        self._has[tier, name] -= nbytes

    def close(self) -> None:
        for (tier, name), nbytes in self._has.items():
            self._ledger.give(tier, name, nbytes)
        self._has.clear()


class _Chunk:
    """Keys and values of a layer of a batch: `near` [B, heads, slots, D] each, or records far away, or both.

    A record is what a slot holds: of each text its keys and values beside each other, as they are or in 4
    bits. In memory records are uint8 [capacity, B, bytes]; in the batch's file they lie from `offset` on.
    """

    def __init__(self, tier: str, keys: torch.Tensor, values: torch.Tensor, bits: int | None) -> None:
        self.tier, self.bits, self.dtype = tier, bits, keys.dtype
        self.shapes = [(part.shape[1], part.shape[3]) for part in (keys, values)]
        self.widths = [heads * size for heads, size in self.shapes]
        self.sizes = [row_bytes(width) if bits else width * self.dtype.itemsize for width in self.widths]
        self.record_bytes = sum(self.sizes)
        self.slot_bytes = sum(self.widths) * self.dtype.itemsize  # of a text, as it is computed with
        self.stays = False
        self.near: list[torch.Tensor] | None = None
        self.near_bytes = 0
        self.records: torch.Tensor | None = None
        self.offset = 0
        self.rows = 0  # texts in a slot of the file
        self.wanted: list[int] | None = None  # those that have not ended, where some have
        self.coming: tuple[Future[Any], torch.Tensor] | None = None

    def allocate(self, batch: int, slots: int, device: torch.device) -> None:
        self.near = [
            torch.empty(batch, heads, slots, size, dtype=self.dtype, device=device)
            for heads, size in self.shapes
        ]

    def pack(self, slots: slice) -> torch.Tensor:
        """Return the records of slots [n, B, bytes]."""
        assert self.near is not None
        count, batch = slots.stop - slots.start, self.near[0].shape[0]
        records = torch.empty(count, batch, self.record_bytes, dtype=torch.uint8, device=self.near[0].device)
        for begin, end in self._pieces(count, batch):
            first = 0
            for part, size in zip(self.near, self.sizes, strict=True):
                rows = part[:, :, slots.start + begin : slots.start + end].permute(2, 0, 1, 3)
                flat = rows.reshape((end - begin) * batch, -1)
                held = quantize_rows(flat) if self.bits else flat.view(torch.uint8)
                records[begin:end, :, first : first + size] = held.view(end - begin, batch, size)
                first += size
        return records

    def unpack(self, records: torch.Tensor) -> None:
        """Fill the first slots of `near` with records [n, B, bytes]."""
        assert self.near is not None
        count, batch = records.shape[:2]
        for begin, end in self._pieces(count, batch):
            flat = records[begin:end].reshape((end - begin) * batch, -1).split(self.sizes, 1)
            for part, held, width, shape in zip(self.near, flat, self.widths, self.shapes, strict=True):
                rows = dequantize_rows(held, width) if self.bits else held.contiguous().view(self.dtype)
                part[:, :, begin:end] = rows.view(end - begin, batch, *shape).permute(1, 2, 0, 3)

    def _pieces(self, slots: int, batch: int) -> Iterator[tuple[int, int]]:
        """Yield parts of slots, so that what is made in between is small."""
        step = max(1, _TOGETHER // (batch * max(self.widths)))
        return ((begin, min(begin + step, slots)) for begin in range(0, slots, step))


class BatchCache(Cache):
    """Keys and values of a batch of texts that end in the same slot: shorter ones have padding in front.

    `tier` says where a layer's chunk lies. With `bits` 4 it lies there in groups of 64 numbers: of one text's
    keys or values in one slot, so that whatever is new consists of whole groups at once and nothing waits in
    full precision. The rows of a pass are used as they were computed, and packed behind it.

    A pass is, layer by layer, `fetch` when the layer comes near, the model's own `update`, and `settle`; then
    `advance`. Of the chunks that do not stay, only those between `fetch` and `settle` are in memory. `select`
    forgets texts that have ended. Whatever is allocated is taken from the `ledger` before; close the cache.
    """

    def __init__(
        self,
        padding: Sequence[int],
        capacity: int,
        tier: Callable[[int], str] = lambda layer: "device",
        *,
        bits: int | None = None,
        device: torch.device | str = "cpu",
        ledger: Ledger | None = None,
        disk: DiskTier | None = None,
        cpu_attention: bool = False,
    ) -> None:
        super().__init__(layers=[])
        if bits not in (None, 4):
            raise UserError(f"a cache is held as it is or in 4 bits, not in {bits}")
        self.padding = torch.tensor(padding)
        self.capacity, self.length = capacity, 0
        self._tier, self._bits, self._device = tier, bits, torch.device(device)
        self._ledger = ledger or Ledger()
        self._account, self._disk, self._cpu_attention = _Account(self._ledger), disk, cpu_attention
        self._file: _File | None = None
        self._file_end = 0
        self._chunks: dict[int, _Chunk] = {}
        self._new: dict[int, int] = {}  # layer → rows that were added and are not settled

    @property
    def batch(self) -> int:
        """How many texts there still are."""
        return len(self.padding)

    def mask(self, rows: int, dtype: torch.dtype, window: int | None = None) -> torch.Tensor:
        """Return what `rows` new rows see, to be added to attention's logits: [B, 1, rows, slots].

        A row of padding sees nothing; what comes of it is finite and means nothing.
        """
        end = self.length + rows
        slots, own = torch.arange(end), torch.arange(self.length, end)[:, None]
        seen = slots <= own
        if window is not None:
            seen &= own - slots < window
        seen = seen & (slots >= self.padding[:, None, None])
        added = torch.zeros(seen.shape, dtype=dtype)
        return added.masked_fill_(~seen, HIDDEN[dtype])[:, None].to(self._device)

    def positions(self, rows: int) -> torch.Tensor:
        """Return the places of `rows` new rows in their texts, int64 [B, rows]; 0 for padding."""
        return (torch.arange(self.length, self.length + rows) - self.padding[:, None]).clamp(min=0)

    def fetch(self, layer: int) -> None:
        """Begin to read a layer's keys and values from the disk, if they lie there."""
        chunk = self._chunks.get(layer)
        if chunk is None or chunk.tier != "disk" or chunk.coming is not None or not self.length:
            return
        assert self._file is not None
        nbytes = self.length * chunk.rows * chunk.record_bytes
        self._account.take("device", _ON_ITS_WAY, nbytes)
        buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        chunk.coming = (self._file.read(chunk.offset, buffer), buffer)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put a layer's new keys and values [B, heads, n, D] behind those before; return views of all."""
        rows = key_states.shape[2]
        end = self.length + rows
        chunk = self._chunks.get(layer_idx)
        if chunk is None:
            chunk = self._chunks[layer_idx] = self._begin(layer_idx, key_states, value_states)
        if not chunk.stays:
            self._bring(layer_idx, chunk, end)
        assert chunk.near is not None
        for part, states in zip(chunk.near, (key_states, value_states), strict=True):
            part[: self.batch, :, self.length : end] = states
        self._new[layer_idx] = rows
        if chunk.stays and chunk.tier == "ram" and not self.length:
            return key_states, value_states  # a prompt's first rows see nothing that lies elsewhere
        keys, values = chunk.near
        return keys[: self.batch, :, :end], values[: self.batch, :, :end]

    def settle(self, layer: int) -> None:
        """Put what a layer's `update` brought where the chunk lies."""
        chunk, rows = self._chunks.get(layer), self._new.pop(layer, 0)
        if chunk is None or chunk.stays or not rows:
            return
        new = chunk.pack(slice(self.length, self.length + rows))
        if chunk.records is not None:
            chunk.records[self.length : self.length + rows, : self.batch] = new
        else:
            self._write(chunk.offset + self.length * self.batch * chunk.record_bytes, new)
        chunk.near = None
        self._account.give("device", "cache in use", chunk.near_bytes)

    def advance(self, rows: int) -> None:
        """Count the rows that a whole pass has added, and settle what is not."""
        for layer in list(self._new):
            self.settle(layer)
        self.length += rows

    def select(self, texts: Sequence[int]) -> None:
        """Let the texts of these numbers be texts 0, 1, …, and forget the others.

        None may move to a place whose text is still to move.
        """
        self.padding = self.padding[list(texts)]
        for chunk in self._chunks.values():
            stored = chunk.near if chunk.stays else [chunk.records] if chunk.records is not None else []
            assert stored is not None
            for tensor in stored:
                by_text = tensor if chunk.stays else tensor.transpose(0, 1)
                for new, old in enumerate(texts):  # in place: no more memory is needed
                    if new != old:
                        by_text[new].copy_(by_text[old])
            if not stored:
                before = chunk.wanted if chunk.wanted is not None else range(chunk.rows)
                chunk.wanted = [before[text] for text in texts]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots in use, which models ask for; they are told positions and a mask all the same."""
        return self.length

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        """Slots and their offset, for models that ask although they are given masks."""
        return self.length, 0

    def close(self) -> None:
        """Give memory and disk back."""
        for chunk in self._chunks.values():
            if chunk.coming is not None:
                chunk.coming[0].cancel()
        self._chunks.clear()
        if self._file is not None:
            self._file.close()
            self._file = None
        self._account.close()

    @property
    def _disk_tier(self) -> DiskTier:
        if self._disk is None:
            raise UserError("a part of the cache lies on the disk: say in which folder")
        return self._disk

    def _begin(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> _Chunk:
        """Make room for a layer where it shall lie."""
        tier = self._tier(layer)
        chunk = _Chunk(tier, keys, values, self._bits)
        at = self._device if tier == "device" else torch.device("cpu")
        chunk.stays = self._bits is None and (tier == "device" or (tier == "ram" and self._cpu_attention))
        each = chunk.slot_bytes if chunk.stays else chunk.record_bytes
        nbytes = self.batch * self.capacity * each
        self._account.take(tier, "cache", nbytes)
        if chunk.stays:
            chunk.allocate(self.batch, self.capacity, at)
        elif tier == "disk":
            self._file = self._file or self._disk_tier.open()
            chunk.offset, self._file_end = self._file_end, self._file_end + nbytes
            chunk.rows = self.batch
        else:
            chunk.records = torch.empty(
                self.capacity, self.batch, chunk.record_bytes, dtype=torch.uint8, device=at,
                pin_memory=tier == "ram" and self._device.type == "cuda",
            )  # fmt: skip
        return chunk

    def _bring(self, layer: int, chunk: _Chunk, end: int) -> None:
        """Allocate `near` for `end` slots and fill it with what there is."""
        chunk.near_bytes = self.batch * end * chunk.slot_bytes
        self._account.take("device", "cache in use", chunk.near_bytes)
        chunk.allocate(self.batch, end, self._device)
        if not self.length:
            return
        if chunk.records is not None:
            chunk.unpack(chunk.records[: self.length, : self.batch].to(self._device, non_blocking=True))
            return
        self.fetch(layer)
        assert chunk.coming is not None
        coming, buffer = chunk.coming
        if coming.exception() is not None:
            self._disk_tier.wait(0)  # maybe for want of what was not written
        coming.result()
        records = buffer.view(self.length, chunk.rows, chunk.record_bytes)
        if chunk.wanted is not None:
            self._disk_tier.wait(0)  # no other write has a buffer beside
            records = records[:, chunk.wanted]
            self._write(chunk.offset, records)
            chunk.rows, chunk.wanted = len(chunk.wanted), None
        chunk.unpack(records.to(self._device, non_blocking=True))
        chunk.coming = None
        self._account.give("device", _ON_ITS_WAY, buffer.nbytes)

    def _write(self, offset: int, records: torch.Tensor) -> None:
        assert self._file is not None
        self._disk_tier.wait()
        self._ledger.take("device", _ON_ITS_WAY, records.nbytes)
        data = records.to("cpu").contiguous()
        self._file.write(offset, data, lambda: self._ledger.give("device", _ON_ITS_WAY, data.nbytes))


class HiddenStates:
    """What a batch carries from layer to layer, put away while other batches compute.

    The tensor itself stays, and whoever has it, but its memory is given back: the model's own code holds on
    to it meanwhile.
    """

    def __init__(self, tier: str, ledger: Ledger, disk: DiskTier | None = None) -> None:
        """Put hidden states away on `tier`: device (they stay), ram or disk."""
        if tier == "disk" and disk is None:
            raise UserError("a part of the hidden states lies on the disk: say in which folder")
        self._tier = tier
        self._ledger, self._account, self._disk = ledger, _Account(ledger), disk
        self._file: _File | None = None
        self._storage: torch.UntypedStorage | None = None
        self._nbytes = self._taken = self._beside = 0
        self._device = torch.device("cpu")
        self._far: torch.Tensor | None = None
        self._coming: Future[Any] | None = None

    def begin(self, nbytes: int, beside: int = 0) -> None:
        """Take the bytes of a pass's hidden states, and of masks `beside` them, which are not put away."""
        self._taken, self._beside = nbytes, beside
        self._account.take("device", "hidden states", nbytes)
        self._account.take("device", "masks", beside)

    def end(self) -> None:
        """Give the bytes back behind a pass."""
        self._account.give("device", "hidden states", self._taken)
        self._account.give("device", "masks", self._beside)

    def put_away(self, hidden: torch.Tensor) -> None:
        """Give the memory of `hidden` back until `restore`."""
        if self._tier == "device":
            return
        storage = hidden.untyped_storage()
        self._storage, self._nbytes, self._device = storage, storage.nbytes(), hidden.device
        self._account.take(self._tier, "hidden states", self._nbytes)
        if self._disk is not None and self._tier == "disk":
            self._disk.wait()
        copy = torch.empty(self._nbytes, dtype=torch.uint8, pin_memory=hidden.device.type == "cuda")
        copy.copy_(self._view())
        storage.resize_(0)
        self._account.give("device", "hidden states", self._taken)
        if self._tier == "ram":
            self._far = copy
        else:
            assert self._disk is not None
            self._file = self._file or self._disk.open()
            nbytes = self._nbytes
            self._ledger.take("device", _ON_ITS_WAY, nbytes)
            self._file.write(0, copy, lambda: self._ledger.give("device", _ON_ITS_WAY, nbytes))

    def fetch(self) -> None:
        """Begin to read what is on the disk."""
        if self._storage is not None and self._file is not None and self._coming is None:
            self._account.take("device", _ON_ITS_WAY, self._nbytes)
            self._far = torch.empty(self._nbytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
            self._coming = self._file.read(0, self._far)

    def restore(self) -> None:
        """Let the tensor have its numbers again."""
        if self._storage is None:
            return
        self.fetch()
        if self._coming is not None:
            self._coming.result()
        assert self._far is not None
        self._account.take("device", "hidden states", self._taken)
        self._storage.resize_(self._nbytes)
        self._view().copy_(self._far, non_blocking=True)
        if self._coming is not None:
            self._account.give("device", _ON_ITS_WAY, self._nbytes)
        self._account.give(self._tier, "hidden states", self._nbytes)
        self._storage = self._far = self._coming = None

    def close(self) -> None:
        """Give memory and disk back."""
        self._storage = self._far = self._coming = None
        self._account.close()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _view(self) -> torch.Tensor:
        assert self._storage is not None
        return torch.empty(0, dtype=torch.uint8, device=self._device).set_(self._storage)


def attend_where_keys_lie(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention on the keys' device: the query goes there, [B, n, heads, D] comes back.

    In decoding that moves two rows a text instead of all its keys and values (FlexGen, section 3.4).
    """
    there = key.device
    mask = None if attention_mask is None else attention_mask.to(there)
    outcome, weights = sdpa_attention_forward(module, query.to(there), key, value, mask, **options)
    return outcome.to(query.device), weights


@contextmanager
def computing_where_keys_lie(model: Any) -> Iterator[None]:
    """Let a model's attention be computed where the keys lie. Raises UserError for one that has its own."""
    before = model.config._attn_implementation
    if before != "sdpa":
        raise UserError(f"{before} attention cannot be computed on the CPU: choose another placement")
    AttentionInterface.register(_WHERE_KEYS_LIE, attend_where_keys_lie)
    AttentionMaskInterface.register(_WHERE_KEYS_LIE, sdpa_mask)
    model.set_attn_implementation(_WHERE_KEYS_LIE)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
