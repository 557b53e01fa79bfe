"""The zig-zag block schedule: a layer is loaded once for all batches of a block (FlexGen, arXiv 2303.06865,
section 3.2).

    for each pass: for each layer: load it; for each batch of the block: compute

The model's own code runs a batch from its first layer to its last. So each batch runs in a greenlet, which
stops before every layer until all batches have come there; no family of models is known here. One thread
computes. Beside it the weight store's reader loads the coming layers and the disk tier's thread reads and
writes keys, values and hidden states.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import greenlet
import torch
from torch import Tensor

from t2iprobe.errors import UserError
from t2iprobe.llm.engine.decoder import Decoder, Lending
from t2iprobe.llm.engine.generation import Ending, Generated, check_texts, count_room, make_generator
from t2iprobe.llm.engine.processing import Processing, Sampling
from t2iprobe.llm.engine.verification import make_draw
from t2iprobe.llm.memory.cost import ModelShape
from t2iprobe.llm.memory.ledger import Ledger
from t2iprobe.llm.memory.packing import Packed, pack_quantized
from t2iprobe.llm.memory.placement import Placement, Realised, realise
from t2iprobe.llm.memory.sources import Capped, DequantizedSource, DiskSource, HeldSource, Source, padded
from t2iprobe.llm.memory.store import WeightStore
from t2iprobe.llm.memory.tiers import BatchCache, DiskTier, HiddenStates, computing_where_keys_lie
from t2iprobe.llm.models import LanguageModel, decoder_layers

__all__ = ["PROMPT_ROWS", "BlockReport", "arrange", "open_source", "open_store", "write_batches"]

# Tokens of a batch that are read in one pass of a prompt: their activations are all in memory at once.
PROMPT_ROWS = 2048
# Prompts among which those of one length look for each other, if the block is smaller.
WINDOW = 32
BUFFERS = 2


def open_source(
    packed: Packed, bits: int | None = None, link: float | None = None, layers: slice = slice(None)
) -> Source:
    """Return a packed model's layers on the disk: as they are, or in `bits` bits, packed so first.

    `link` is the bytes a second of a simulated link to them; `layers`, which of them.
    """
    stored_as = packed
    if bits is not None:
        stored_as = pack_quantized(packed, packed.folder.with_name(f"{packed.folder.name}-{bits}bit"), bits)
    stored: Source = DiskSource(replace(stored_as, layers=stored_as.layers[layers]))
    if link is not None:
        stored = Capped(stored, link)
    if bits is None:
        return stored
    return DequantizedSource(stored, replace(packed, layers=packed.layers[layers]), bits)


def open_store(
    placement: Placement,
    source: Source,
    device: torch.device | str = "cpu",
    ledger: Ledger | None = None,
    *,
    buffers: int = BUFFERS,
    prefetch: bool = True,
) -> WeightStore:
    """Open layers where a placement has them; what that takes is taken from the `ledger` first.

    Layers in RAM, and those in few bits that stay, are read once and held. The store's traffic is what comes
    from the disk, through `buffers` buffers, ahead of its use unless ``prefetch=False``. Whoever runs a model
    has a placement's weights from here: blocks of prompts, a speculative target, a server of some layers.
    Raises UserError for a budget that is too small.
    """
    ledger, device = ledger or Ledger(), torch.device(device)
    realised = realise_weights(placement, source)
    here = "device" if device.type == "cpu" else "ram"
    resident = realised.resident
    if placement.weight_bits is not None:
        if not isinstance(source, DequantizedSource):
            raise ValueError("layers in few bits come from a source in few bits: see open_source")
        held = sorted({*resident, *realised.in_ram})
        ledger.take(here, "layers that stay", sum(source.stored.nbytes(layer) for layer in held))
        ledger.take(here, "a layer in few bits", source.buffer_bytes)
        source, resident = source.hold(held), ()
    elif realised.in_ram:
        ledger.take("ram", "layers in RAM", sum(map(source.nbytes, realised.in_ram)))
        source = HeldSource(source, realised.in_ram)
    ledger.take("device", "layers that stay", sum(padded(source.nbytes(layer)) for layer in resident))
    streamed = [source.nbytes(layer) for layer in range(source.layers) if layer not in resident]
    ring = min(buffers, len(streamed))
    ledger.take("device", "layers on their way", ring * padded(max(streamed, default=0)))
    return WeightStore(source, resident, max(1, ring), device, prefetch)


def realise_weights(placement: Placement, source: Source) -> Realised:
    """Return what can be realised of a placement with these layers."""
    stored = source.stored if isinstance(source, DequantizedSource) else source
    return realise(placement, [stored.nbytes(layer) for layer in range(stored.layers)])


@dataclass
class BlockReport:
    """What was done: blocks, passes over the layers, loads of layers that do not stay, tokens, seconds."""

    blocks: int = 0
    passes: int = 0
    loads: int = 0
    tokens: int = 0
    seconds: float = 0.0
    prompt_seconds: float = 0.0  # of the passes in which a batch still read its prompts


def arrange(lengths: Sequence[int], batch: int, batches: int) -> Iterator[list[list[list[int]]]]:
    """Yield windows of blocks of batches of the numbers of prompts, those of one length together.

    A window is as many consecutive prompts as fill a block, or several blocks where these are small; the
    longest come first, so that what does not fit is told early.
    """
    block = batch * batches
    window = block * max(1, WINDOW // block)
    for start in range(0, len(lengths), window):
        numbers = sorted(range(start, min(start + window, len(lengths))), key=lambda n: -lengths[n])
        parts = [numbers[first : first + batch] for first in range(0, len(numbers), batch)]
        yield [parts[first : first + batches] for first in range(0, len(parts), batches)]


def write_batches(
    model: LanguageModel,
    store: WeightStore,
    placement: Placement,
    texts: Sequence[Tensor],
    *,
    sampling: Sampling | None = None,
    max_new_tokens: int = 128,
    eos_token_ids: Collection[int] = (),
    stop: Sequence[str] = (),
    tokenizer: Any = None,
    processors: Sequence[Any] = (),
    first: int = 0,
    ledger: Ledger | None = None,
    disk: Path | None = None,
    realised: Realised | None = None,
    on_results: Callable[[list[tuple[int, Generated]]], None],
) -> BlockReport:
    """Continue prompts, int64 [T_b] each, block by block; each text is what `generate` without a tree writes.

    Args:
        model: a causal language model; its layers come from the store.
        store: the layers.
        placement: the shape of a block, and where cache and hidden states lie.
        texts: the prompts.
        sampling: how tokens are drawn; greedy without.
        max_new_tokens: of each prompt; fewer where the model's context ends.
        eos_token_ids: tokens that end a text, and belong to it.
        stop: strings that end a text, and do not belong to it; they need a `tokenizer`.
        tokenizer: if given, `text` is decoded.
        processors: Transformers logits processors beside the sampling's own (see `Processing`).
        first: number of the first prompt: a prompt's noise comes from its number.
        ledger: what is allocated is taken from it before.
        disk: a folder for what the placement has on the disk.
        realised: the placement in what can be moved, if not by the store's layers as they are.
        on_results: called with numbers and outcomes, in the prompts' order, after each block or few.

    Raises UserError for prompts that cannot be continued, a budget that does not suffice, a full disk.
    """
    if stop and tokenizer is None:
        raise UserError("stop strings need the tokenizer that they are looked for with")
    sampling = sampling or Sampling()
    with ExitStack() as stack:
        writer = _Writer(
            model, store, placement, realised or realise_weights(placement, store.source),
            Processing(sampling, processors), Ending(frozenset(eos_token_ids), tuple(stop), tokenizer),
            max_new_tokens, ledger or Ledger(), disk, stack,
        )  # fmt: skip
        check_texts(writer.decoder, None, texts, max_new_tokens)
        for blocks in arrange([len(text) for text in texts], placement.batch, placement.batches):
            numbers = (number for block in blocks for part in block for number in part)
            rows = {number: writer.begin_row(first + number, texts[number]) for number in numbers}
            for block in blocks:
                writer.write_block([[rows[number] for number in part] for part in block])
            on_results([(rows[number].number, rows[number].made) for number in sorted(rows)])
        return writer.report


@dataclass
class _Row:
    """A prompt and what becomes of it."""

    number: int
    tokens: Tensor
    most: int
    is_short: bool
    draw: Callable[[Tensor], int]
    made: Generated = field(default_factory=Generated)


class _Job(greenlet.greenlet):
    """A batch's pass; it stops before each layer."""

    layer = -1
    hidden: Tensor | None = None


class _Writer:
    """Runs blocks."""

    def __init__(
        self,
        model: LanguageModel,
        store: WeightStore,
        placement: Placement,
        realised: Realised,
        processing: Processing,
        ending: Ending,
        max_new_tokens: int,
        ledger: Ledger,
        disk: Path | None,
        stack: ExitStack,
    ) -> None:
        self.decoder = Decoder(model)
        self.placement, self.realised, self.ledger = placement, realised, ledger
        self.processing, self.ending, self.max_new_tokens = processing, ending, max_new_tokens
        self.report = BlockReport()
        self._store = store
        self._lending = Lending(model, store)
        self.shape = ModelShape.from_model(model)
        uses_disk = placement.cache.disk > 0 or placement.hidden.disk > 0
        if uses_disk and disk is None:
            raise UserError("cache or hidden states lie on the disk: say in which folder")
        self._disk = stack.enter_context(DiskTier(disk)) if uses_disk and disk is not None else None
        if placement.cpu_attention:
            stack.enter_context(computing_where_keys_lie(model))
        for number, layer in enumerate(decoder_layers(model)):
            hook = layer.register_forward_pre_hook(partial(_stop_before, number), with_kwargs=True)
            stack.callback(hook.remove)

    def begin_row(self, number: int, text: Tensor) -> _Row:
        """Return a prompt that nothing was written for yet."""
        tokens = text.to("cpu", torch.int64)
        most = count_room(self.decoder, tokens, self.max_new_tokens)
        sampling = self.processing.sampling
        draw = make_draw(sampling, make_generator(sampling.seed, number, "verify"))
        return _Row(number, tokens, most, most < self.max_new_tokens, draw)

    @torch.no_grad()
    def write_block(self, block: Sequence[Sequence[_Row]]) -> None:
        """Write all texts of a block to their ends."""
        began = time.perf_counter()
        with ExitStack() as stack:
            batches = []
            for number, rows in enumerate(block):
                batches.append(_Batch(self, number, rows))
                stack.callback(batches[-1].close)
            while batches:
                started = time.perf_counter()
                is_reading = any(batch.is_reading for batch in batches)
                self._run_pass(batches)
                if is_reading:
                    self.report.prompt_seconds += time.perf_counter() - started
                for batch in batches:
                    batch.drop_ended(time.perf_counter() - began)
                batches = [batch for batch in batches if batch.rows]
        self.report.blocks += 1
        self.report.tokens += sum(len(row.made.token_ids) for rows in block for row in rows)
        self.report.seconds += time.perf_counter() - began

    def _run_pass(self, batches: Sequence["_Batch"]) -> None:
        """Take every batch through all layers."""
        jobs = [_Job(batch.step) for batch in batches]
        workspace = max(self.count_workspace(batch) for batch in batches)
        with self.ledger.hold("device", "workspace", workspace):
            try:
                for batch, job in zip(batches, jobs, strict=True):
                    batch.begin_pass()
                    self._switch(job, 0)
                    batch.hidden.put_away(_hidden(job))
                for layer in range(self._store.layers):
                    self._lending.lend(layer)
                    self.report.loads += layer not in self._store.resident
                    batches[0].cache.fetch(layer)
                    for number, (batch, job) in enumerate(zip(batches, jobs, strict=True)):
                        coming, next_layer = (
                            (batches[number + 1], layer)
                            if number + 1 < len(batches)
                            else (batches[0], layer + 1)
                        )
                        batch.hidden.restore()
                        if next_layer < self._store.layers:
                            batch.cache.fetch(layer)
                            coming.hidden.fetch()
                            coming.cache.fetch(next_layer)
                        job.hidden = None  # the layer's input may go when the model lets it go
                        self._switch(job, layer + 1)
                        batch.cache.settle(layer)
                        if job.dead:
                            batch.hidden.end()  # at once: the batches that follow need the room
                        else:
                            batch.hidden.put_away(_hidden(job))
                    self._lending.take_back(layer)
            finally:
                for job in jobs:
                    job.throw()
                self._lending.take_back_all()
        self.report.passes += 1

    def _switch(self, job: _Job, layer: int) -> None:
        """Let a job run until it stops before `layer`, or to its end behind the last one."""
        job.switch()
        arrived = self._store.layers if job.dead else job.layer
        if arrived != layer:
            raise RuntimeError(f"the model came to layer {arrived} instead of {layer}")

    def count_workspace(self, batch: "_Batch") -> int:
        """Return the bytes of what a batch's pass makes on its way, at most at once."""
        rows = batch.count_rows()
        return self.shape.work_bytes(batch.cache.batch, rows, batch.cache.length + rows)

    @property
    def is_plain(self) -> bool:
        """Whether the next token is simply the one with the highest logit."""
        return self.processing.sampling.temperature == 0 and not self.processing.reads_history


class _Batch:
    """Texts that share each forward, with their cache and hidden states."""

    def __init__(self, writer: _Writer, number: int, rows: Sequence[_Row]) -> None:
        self.rows = list(rows)
        self._writer = writer
        longest = max(len(row.tokens) for row in rows)
        padding = [longest - len(row.tokens) for row in rows]
        self._tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
        for row, pad, tokens in zip(rows, padding, self._tokens, strict=True):
            tokens[pad:] = row.tokens
        placement, realised = writer.placement, writer.realised
        self.cache = BatchCache(
            padding,
            longest + max(row.most for row in rows) - 1,  # nothing follows the last token
            lambda layer: realised.cache_tier(layer, number),
            bits=placement.cache_bits,
            device=writer.decoder.device,
            ledger=writer.ledger,
            disk=writer._disk,
            cpu_attention=placement.cpu_attention,
        )
        self.hidden = HiddenStates(realised.hidden_tier(number), writer.ledger, writer._disk)

    @property
    def is_reading(self) -> bool:
        """Whether the prompts are not read to their end."""
        return self._tokens.shape[1] > 1 or not self.cache.length

    def count_rows(self) -> int:
        """Return how many rows a text has in the next pass."""
        return min(self._tokens.shape[1], max(1, PROMPT_ROWS // len(self.rows)))

    def begin_pass(self) -> None:
        """Take what the next pass carries from layer to layer, and its masks."""
        decoder, rows = self._writer.decoder, self.count_rows()
        slots = self.cache.length + rows
        shape, size = self._writer.shape, decoder.dtype.itemsize
        kept = shape.masks * slots * size + 2 * shape.head_dim * size + 24  # masks, cosines and sines, tokens
        texts = len(self.rows) * rows
        self.hidden.begin(texts * shape.hidden * size, texts * kept)

    def step(self) -> None:
        """Run the next rows, and choose the tokens that follow where the texts are read to their ends."""
        decoder, rows = self._writer.decoder, self.count_rows()
        positions = self.cache.positions(rows)
        if decoder.context_length is not None:
            positions = positions.clamp(max=decoder.context_length - 1)
        masks = {
            kind: self.cache.mask(rows, decoder.dtype, window) for kind, window in decoder.windows.items()
        }
        is_whole = rows == self._tokens.shape[1]
        logits = decoder.run(self._tokens[:, :rows], positions, masks, self.cache, keep=int(is_whole))
        if is_whole:
            self._choose(logits[:, -1])
        else:
            self._tokens = self._tokens[:, rows:]
        for row in self.rows:
            row.made.target_passes += 1

    def _choose(self, logits: Tensor) -> None:
        """Append to each text a token by its logits [B, V]."""
        writer = self._writer
        if writer.is_plain:
            best, tokens = logits.max(-1)
            if not best.isfinite().all():
                raise UserError("the model's output is not a number")
            chosen = tokens.tolist()
        else:
            chosen = [
                row.draw(writer.processing(each, [row.tokens] if writer.processing.reads_history else ()))
                for row, each in zip(self.rows, logits, strict=True)
            ]
        for row, token in zip(self.rows, chosen, strict=True):
            row.tokens = torch.cat([row.tokens, torch.tensor([token])])
            made = row.made
            made.stop_reason = writer.ending.extend(made.token_ids, [token], row.most, row.is_short)
            made.rounds.append(1)
        self._tokens = torch.tensor(chosen)[:, None]

    def drop_ended(self, seconds: float) -> None:
        """Leave the texts out that have ended; give all memory back behind the last one."""
        for row in self.rows:
            if row.made.stop_reason:
                row.made.seconds = seconds
                if self._writer.ending.tokenizer is not None:
                    row.made.text = self._writer.ending.text(row.made.token_ids, row.made.stop_reason)
        places = [place for place, row in enumerate(self.rows) if not row.made.stop_reason]
        if len(places) == len(self.rows):
            return
        # Only those behind the new end move, each into a gap.
        movers = iter(place for place in places if place >= len(places))
        kept = set(places)
        stay = [place if place in kept else next(movers) for place in range(len(places))]
        self.rows = [self.rows[place] for place in stay]
        self._tokens = self._tokens[stay]
        if stay:
            self.cache.select(stay)
        else:
            self.close()

    def close(self) -> None:
        """Give memory and disk back."""
        self.cache.close()
        self.hidden.close()


def _stop_before(number: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Wait before a layer until the schedule wants it computed; nothing outside of a schedule."""
    job = greenlet.getcurrent()
    if isinstance(job, _Job):
        job.layer, job.hidden = number, args[0] if args else kwargs["hidden_states"]
        assert job.parent is not None
        job.parent.switch()


def _hidden(job: _Job) -> Tensor:
    assert job.hidden is not None
    return job.hidden
