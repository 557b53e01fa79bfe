"""What a placement costs: every byte and FLOP of a block of batches, and the seconds they take here.

The model is FlexGen's (arXiv 2303.06865, section 4.3) for today's decoders, with machines that were measured.
A pass takes as long as the busiest of what works side by side: the computation, the reader of weights, the
thread that reads and writes caches. Costs are lines over whole numbers (layers, chunks of the cache and
hidden states that are not on the device), so that a forecast and a linear program are the same arithmetic.

Symbols: B texts of a batch; n rows of each in a pass; p positions that a row's attention covers; h hidden;
d head_dim; b bytes of a number.
"""

import itertools
import json
import math
import statistics
import tempfile
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from t2iprobe.llm.engine.cache import RowCache
from t2iprobe.llm.engine.decoder import Decoder
from t2iprobe.llm.engine.processing import Processing, Sampling
from t2iprobe.llm.engine.verification import make_draw
from t2iprobe.llm.memory.packing import Packed
from t2iprobe.llm.memory.placement import TIERS, Forecast, Placement, realise
from t2iprobe.llm.memory.quantization import row_bytes
from t2iprobe.llm.memory.sources import DiskSource, QuantizedSource, Source, empty_buffer, padded
from t2iprobe.llm.memory.store import WeightStore
from t2iprobe.llm.memory.tiers import BatchCache
from t2iprobe.llm.models import check_parts, decoder_layers

__all__ = ["Costs", "Hardware", "ModelShape", "Workload", "count_costs", "forecast", "measure_hardware"]

GROUP = 64
# The schedule's, which says what they are.
PROMPT_ROWS = 2048
BUFFERS = 2
# Records of chunks on their way at once: what is written, what is unpacked, what comes next.
ON_THEIR_WAY = 3

# What the lines are over: 1; layers in RAM and on disk, chunks of the cache there, batches' hidden states
# there; and whether any layers, any chunks, any hidden states are not on the device.
VARIABLES = (
    *("one", "weights_ram", "weights_disk", "cache_ram", "cache_disk", "hidden_ram", "hidden_disk"),
    *("streams", "moves", "drifts"),
)


def line(**coefficients: float) -> np.ndarray:
    """Return a line by its variables' names: float64 [VARIABLES]."""
    values = np.zeros(len(VARIABLES))
    for name, value in coefficients.items():
        values[VARIABLES.index(name)] = value
    return values


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder.

    matrices: [rows, columns] of each matrix of a layer; vector_values: numbers beside them (norms, biases);
    value_bytes: of a number, as computed with; largest_layer and rest_bytes: bytes of a layer, and of all
    that is none (embedding, last norm, head); ffn: width of the feed-forward part; gated: whether it has a
    gate (SwiGLU) or is classic (GELU); masks: kinds of attention masks that a pass makes.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    gated: bool
    vocabulary: int
    tied: bool
    value_bytes: int
    matrices: tuple[tuple[int, int], ...]
    vector_values: int
    largest_layer: int
    rest_bytes: int
    masks: int = 1

    @classmethod
    def from_model(cls, model: Any, packed: Packed | None = None) -> "ModelShape":
        """Return the shape of a Hugging Face decoder on any device; bytes of layers are those of `packed`.

        Where layers' keys and values differ in size, they count as the largest. Raises UserError for a model
        that cannot run in parts.
        """
        check_parts(model)
        layers = decoder_layers(model)
        inside = {id(parameter) for parameter in layers.parameters()}
        tensors = [tuple(each.shape) for each in layers[0].parameters()]
        largest = max(sum(each.nbytes for each in layer.parameters()) for layer in layers)
        if packed is not None:
            tensors = [place.shape for place in packed.layers[0].layout.values()]
            largest = max(file.nbytes for file in packed.layers)
        matrices = tuple(sorted((math.prod(shape[:-1]), shape[-1]) for shape in tensors if len(shape) > 1))
        config = model.config.get_text_config()
        hidden, heads = config.hidden_size, config.num_attention_heads
        kv_heads, head_dim = map(max, zip(*_cache_sizes(config), strict=True))
        widths = (getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner"))
        ffn = next(filter(None, widths), 4 * hidden)
        attention = 2 * hidden * head_dim * (heads + kv_heads)
        return cls(
            layers=len(layers),
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            ffn=ffn,
            gated=sum(map(math.prod, matrices)) - attention > 2.5 * hidden * ffn,
            vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
            value_bytes=model.get_input_embeddings().weight.dtype.itemsize,
            matrices=matrices,
            vector_values=sum(shape[0] for shape in tensors if len(shape) == 1),
            largest_layer=largest,
            rest_bytes=sum(each.nbytes for each in model.parameters() if id(each) not in inside),
            masks=len(set(getattr(config, "layer_types", None) or [None])),
        )

    @classmethod
    def from_config(cls, config: Any, dtype: torch.dtype = torch.float32) -> "ModelShape":
        """Return the shape of the decoder that a Hugging Face configuration describes."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.tie_weights()
        return cls.from_model(model)

    def traffic(self, bits: int | None) -> int:
        """Bytes of a layer as it is stored: as it is computed with, or its matrices in groups of rows."""
        if bits is None:
            return self.largest_layer
        vectors = self.vector_values * self.value_bytes
        groups = sum(-(-rows // GROUP) * columns for rows, columns in self.matrices)
        return vectors + groups * (GROUP * bits // 8 + 8)  # a group's scale and minimum are float32

    def position_bytes(self, bits: int | None = None) -> int:
        """Bytes of keys and values of one position of one text in one layer."""
        width = self.kv_heads * self.head_dim
        return 2 * (width * self.value_bytes if bits is None else row_bytes(width, GROUP))

    def layer_flops(self, rows: int) -> int:
        """FLOPs of a layer's matrices for `rows` rows."""
        return 2 * rows * sum(map(math.prod, self.matrices))

    def attention_flops(self, rows: float, positions: float) -> float:
        """FLOPs of a layer's attention, masked or not, for `rows` rows that cover `positions` each."""
        return 4 * rows * positions * self.heads * self.head_dim

    def head_flops(self, rows: int) -> int:
        """FLOPs of the head for `rows` rows of logits."""
        return 2 * rows * self.hidden * self.vocabulary

    def work_bytes(self, batch: int, rows: int, slots: int) -> int:
        """Bytes of what B texts of n `rows` that see `slots` make on their way, at most at once.

        Either what all of a layer's matrices make and attention's copies of grouped keys and values, or the
        logits and a row's log-probabilities in float64.
        """
        widths = sum(map(max, self.matrices)) + 2 * self.hidden
        copies = 2 * batch * slots * max(self.hidden, self.heads * self.head_dim) if rows > 1 else 0
        logits = batch * self.vocabulary * self.value_bytes + 3 * 8 * self.vocabulary
        return max((batch * rows * widths + copies) * self.value_bytes, logits)


def _cache_sizes(config: Any) -> list[tuple[int, int]]:
    """Return how many heads of keys and values each layer has, and how wide one is."""
    layers = getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers
    return [
        (
            getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads,
            getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads,
        )
        for layer in layers
    ]


@dataclass(frozen=True)
class Workload:
    """What is to be written: `prompts` texts of `prompt_tokens` tokens, and `new_tokens` behind each.

    prompts: None: as many as there is room for; longest: prompt tokens that memory is kept for, where some
    have more than others; sampled: whether tokens are drawn, or are the most probable ones.
    """

    prompts: int | None
    prompt_tokens: int
    new_tokens: int
    longest: int | None = None
    sampled: bool = False

    @property
    def most_tokens(self) -> int:
        """Tokens of the longest prompt."""
        return max(self.prompt_tokens, self.longest or 0)

    @property
    def slots(self) -> int:
        """Positions of a text whose keys and values are kept: nothing follows its last token."""
        return self.most_tokens + self.new_tokens - 1


@dataclass(frozen=True)
class Hardware:
    """What this machine can do with a model; rates in bytes a second unless named otherwise.

    layer_seconds: rows in a pass → seconds of one layer that is in fast memory, next to no context;
    end_seconds: rows of logits → seconds of all of a batch's pass that is no layer;
    token_seconds: to draw a token from its row of logits, if it is not the most probable one;
    attention_flops: FLOPs a second of attention; attention_read: keys and values that it goes over;
    disk_read: weights; file_read, file_write: files of the cache; shares_disk: whether the two disks are one;
    dequantize: weights of 4 bits, counted as what they become, by the reader;
    cache_copy, cache_dequantize: keys and values from elsewhere, and from 4 bits, by the computation;
    cache_quantize: those that are put into 4 bits; chunk_seconds, packed_chunk_seconds: of a chunk from
    elsewhere, and of one in 4 bits, that is brought and put back, beside its bytes;
    read_steals, dequantize_steals, file_steals: seconds that the computation loses a byte of weights read, a
    byte dequantised, a byte of the cache's files read or written, beside it;
    to_device, from_device: between RAM and the device, None where they are one;
    ram_attention: keys and values that attention on the CPU goes over, where the device is another.
    """

    layer_seconds: Mapping[int, float]
    end_seconds: Mapping[int, float]
    token_seconds: float
    attention_flops: float
    attention_read: float
    disk_read: float
    file_read: float
    file_write: float
    dequantize: float
    cache_copy: float
    cache_dequantize: float
    cache_quantize: float = math.inf
    chunk_seconds: float = 0.0
    packed_chunk_seconds: float = 0.0
    read_steals: float = 0.0
    dequantize_steals: float = 0.0
    file_steals: float = 0.0
    shares_disk: bool = True
    to_device: float | None = None
    from_device: float | None = None
    ram_attention: float | None = None

    def behind_link(self, bytes_per_second: float) -> "Hardware":
        """Return the same machine with its weights behind a simulated link (see `Capped`)."""
        rate = min(self.disk_read, bytes_per_second)
        return replace(self, disk_read=rate, shares_disk=False)


@dataclass(frozen=True)
class Phase:
    """Passes of one kind: how often a block goes through the model, and the seconds of each, by who works.

    A line gives the seconds of one pass from what is where (see VARIABLES); the pass takes as long as the
    greatest.
    """

    passes: int
    seconds: Mapping[str, np.ndarray]
    flops: float  # of one pass: layers, attention, head


@dataclass(frozen=True)
class Costs:
    """What a block costs. phases: prefill, decode; nbytes: tier → bytes at most, as lines."""

    phases: Mapping[str, Phase]
    nbytes: Mapping[str, np.ndarray]


def count_costs(
    shape: ModelShape,
    hardware: Hardware,
    workload: Workload,
    batches: Sequence[int],
    weight_bits: int | None = None,
    cache_bits: int | None = None,
    cpu_attention: bool = False,
) -> Costs:
    """Return the costs of a block whose batches have so many prompts each."""
    prefills = -(-workload.prompt_tokens // max(1, PROMPT_ROWS // max(batches)))
    rows = workload.prompt_tokens / prefills
    kind = (weight_bits, cache_bits, cpu_attention, workload.sampled)
    phases = {
        "prefill": _count_phase(
            shape, hardware, batches, *kind, passes=prefills, rows=rows, before=rows * (prefills - 1) / 2
        ),
        # The first new token comes from the prompt's pass.
        "decode": _count_phase(
            shape, hardware, batches, *kind, passes=workload.new_tokens - 1, rows=1,
            before=workload.prompt_tokens + workload.new_tokens / 2 - 1,
        ),
    }  # fmt: skip
    return Costs(phases, _count_bytes(shape, hardware, workload, batches, weight_bits, cache_bits))


def _count_phase(
    shape: ModelShape,
    hardware: Hardware,
    batches: Sequence[int],
    weight_bits: int | None,
    cache_bits: int | None,
    cpu_attention: bool,
    sampled: bool,
    *,
    passes: int,
    rows: float,
    before: float,
) -> Phase:
    """Count a phase whose passes run so many rows of a text behind, on average, so many before."""
    texts, mean = sum(batches), sum(batches) / len(batches)
    positions = before + rows  # a row covers all that run with it, masked or not
    stored, traffic = shape.position_bytes(cache_bits), shape.traffic(weight_bits)
    # -- the computation
    attention = sum(
        batch * positions * shape.position_bytes() / hardware.attention_read
        + shape.attention_flops(batch * rows, positions) / hardware.attention_flops
        for batch in batches
    )
    matrices: float = sum(interpolate(hardware.layer_seconds, batch * rows) for batch in batches)
    end: float = sum(interpolate(hardware.end_seconds, batch) for batch in batches)
    end += texts * hardware.token_seconds if sampled else 0.0
    if rows > 1:  # only the last pass of a prompt has logits; what the others do beside is little
        end /= max(1, passes)
    computed = shape.layers * (matrices + attention) + end
    near = mean * positions * shape.position_bytes()  # a chunk's keys and values, as they are computed with
    unpacked = near / hardware.cache_copy + hardware.chunk_seconds
    if cache_bits is not None:  # wherever they lie
        position = mean * shape.position_bytes()
        packing = before * position / hardware.cache_dequantize + rows * position / hardware.cache_quantize
        computed += shape.layers * len(batches) * (packing + hardware.packed_chunk_seconds)
        unpacked = 0.0
    # -- the reader of weights
    to_device = 1 / hardware.to_device if hardware.to_device else 0.0
    from_device = 1 / hardware.from_device if hardware.from_device else 0.0
    from_disk, from_ram = traffic / hardware.disk_read, traffic * to_device
    always = 0.0
    if weight_bits is not None:
        # What stays is in few bits, too, and is read from there (see `open_store`).
        dequantized = shape.largest_layer / hardware.dequantize
        always = shape.layers * (dequantized + from_ram)
        computed += shape.layers * shape.largest_layer * hardware.dequantize_steals
        ram_layer, disk_layer, each = 0.0, from_disk, dequantized + from_ram
        reader = "disk link" if from_disk >= dequantized else "dequantising"
    else:
        ram_layer, disk_layer, each = from_ram, from_disk + from_ram, from_disk + from_ram
        reader = "disk link"
    # The last layer is given back behind the logits: until then the reader fills the rest of the ring, and
    # waits.
    idle = max(0.0, end - (BUFFERS - 1) * each)
    # -- caches and hidden states of a batch on their way, in one layer
    read, written = mean * before * stored, mean * rows * stored
    hidden = mean * rows * shape.hidden * shape.value_bytes
    file_chunk = read / hardware.file_read + written / hardware.file_write
    file_hidden = shape.layers * hidden * (1 / hardware.file_read + 1 / hardware.file_write)
    up_chunk, down_chunk, on_cpu = read * to_device, written * from_device, 0.0
    if cpu_attention and rows == 1 and hardware.ram_attention:
        # Queries go down, results come up: keys and values stay where they lie.
        query = mean * shape.heads * shape.head_dim * shape.value_bytes
        up_chunk, down_chunk = query * to_device, down_chunk + query * from_device
        on_cpu = near / hardware.ram_attention - near / hardware.attention_read
        unpacked = 0.0
    up_hidden = shape.layers * hidden * to_device
    down_hidden = shape.layers * hidden * from_device
    seconds = {
        "compute": line(
            one=computed,
            weights_disk=traffic * hardware.read_steals,
            cache_ram=unpacked + on_cpu,
            cache_disk=unpacked + on_cpu + (read + written) * hardware.file_steals,
            hidden_disk=2 * shape.layers * hidden * hardware.file_steals,
        ),
        reader: line(
            one=always + (idle if weight_bits else 0.0),
            weights_ram=ram_layer,
            weights_disk=disk_layer,
            streams=0.0 if weight_bits else idle,
        ),
        "cache files": line(
            weights_disk=from_disk if hardware.shares_disk else 0.0,
            cache_disk=file_chunk,
            hidden_disk=file_hidden,
        ),
        "link to the device": line(
            one=shape.layers * from_ram if weight_bits else 0.0,
            weights_ram=0.0 if weight_bits else from_ram,
            weights_disk=0.0 if weight_bits else from_ram,
            cache_ram=up_chunk,
            cache_disk=up_chunk,
            hidden_ram=up_hidden,
            hidden_disk=up_hidden,
        ),
        "link from the device": line(
            cache_ram=down_chunk, cache_disk=down_chunk, hidden_ram=down_hidden, hidden_disk=down_hidden
        ),
    }
    flops = shape.layers * (
        shape.layer_flops(1) * texts * rows + shape.attention_flops(1, positions) * texts * rows
    )
    return Phase(passes, seconds, flops + shape.head_flops(texts))


def _count_bytes(
    shape: ModelShape,
    hardware: Hardware,
    workload: Workload,
    batches: Sequence[int],
    weight_bits: int | None,
    cache_bits: int | None,
) -> dict[str, np.ndarray]:
    texts, most, size = sum(batches), max(batches), shape.value_bytes
    longest, slots = workload.most_tokens, workload.slots
    rows = min(longest, max(1, PROMPT_ROWS // most))
    layer, traffic = padded(shape.largest_layer), shape.traffic(weight_bits)
    chunk = most * slots * shape.position_bytes(cache_bits)
    near = most * slots * shape.position_bytes()
    hidden = most * rows * shape.hidden * size
    # Beside its hidden states, a batch that waits keeps its masks, cosines and sines, and tokens.
    kept = max(
        texts * (n * seen * shape.masks * size + n * (2 * shape.head_dim * size + 24))
        for n, seen in ((rows, longest), (1, slots))
    )
    work = max(shape.work_bytes(most, n, seen) for n, seen in ((rows, longest), (1, slots)))
    chunks = shape.layers * len(batches)
    fixed = shape.rest_bytes + chunks * chunk + len(batches) * hidden + kept + work
    # What is held in 4 bits is computed with as it was, wherever it lies.
    fixed += near if cache_bits else 0
    # Hidden states that drift: one batch's in use, the next one's coming, two that are being written.
    moves = ON_THEIR_WAY * chunk + (0 if cache_bits else near)
    device = {
        "cache_ram": -chunk, "cache_disk": -chunk, "moves": moves,
        "hidden_ram": -hidden, "hidden_disk": -hidden, "drifts": 4 * hidden,
    }  # fmt: skip
    ram = {"weights_ram": traffic, "cache_ram": chunk, "hidden_ram": hidden}
    if weight_bits is None:
        fixed += shape.layers * layer
        device |= {"weights_ram": -layer, "weights_disk": -layer, "streams": BUFFERS * layer}
    else:
        # All layers pass through the ring; those that stay do so in few bits, in RAM.
        held = {"one": shape.layers * traffic + padded(traffic), "weights_disk": -traffic}
        fixed += BUFFERS * layer
        if hardware.to_device is None:
            fixed += held.pop("one")
            device |= held
        else:
            ram = ram | held | {"weights_ram": 0}
    return {
        "device": line(one=fixed, **device),
        "ram": line(**ram),
        "disk": line(cache_disk=chunk, hidden_disk=hidden),  # the weights' files are there already
    }


def interpolate(table: Mapping[int, float], size: float) -> float:
    """Return a table's value between its sizes, on straight lines; above them, on the last one."""
    sizes = sorted(table)
    if size <= sizes[0] or len(sizes) == 1:
        return table[sizes[0]]
    place = min(bisect_left(sizes, size), len(sizes) - 1)
    low, high = sizes[place - 1], sizes[place]
    return table[low] + (table[high] - table[low]) * (size - low) / (high - low)


def forecast(shape: ModelShape, hardware: Hardware, workload: Workload, placement: Placement) -> Forecast:
    """Return what the model says of a placement, as the runtime can realise it.

    Prompts that do not fill the last block make a smaller one.
    """
    batch = placement.batch
    prompts = placement.block if workload.prompts is None else workload.prompts
    whole, left = divmod(prompts, placement.block)
    last = [batch] * (left // batch) + ([left % batch] if left % batch else [])
    full = [batch] * placement.batches
    kind = (placement.weight_bits, placement.cache_bits, placement.cpu_attention)
    spent: dict[str, dict[str, float]] = {}  # phase → who → seconds; "all": of the passes
    for times, batches in ((whole, full), (1, last)):
        if not times or not batches:
            continue
        counts = count_placed(placement, shape.layers, len(batches))
        for name, phase in count_costs(shape, hardware, workload, batches, *kind).phases.items():
            each = {who: times * phase.passes * float(row @ counts) for who, row in phase.seconds.items()}
            found = spent.setdefault(name, {})
            for who, seconds in (each | {"all": max(each.values())}).items():
                found[who] = found.get(who, 0.0) + seconds
    costs = count_costs(shape, hardware, workload, full if whole else last, *kind)
    counts = count_placed(placement, shape.layers, placement.batches if whole else len(last))
    total = {who: sum(found[who] for found in spent.values()) for who in next(iter(spent.values()))}
    seconds = total.pop("all")
    return Forecast(
        seconds=seconds,
        prefill_seconds=spent["prefill"]["all"],
        decode_seconds=spent["decode"]["all"],
        tokens_per_second=prompts * workload.new_tokens / seconds,
        peak_bytes={tier: round(float(row @ counts)) for tier, row in costs.nbytes.items()},
        binding=max(total, key=lambda who: total[who]),
    )


def count_placed(placement: Placement, layers: int, batches: int) -> np.ndarray:
    """Return the lines' variables for what of a block of so many batches is not on the device."""
    placed = realise(replace(placement, batches=batches), [1] * layers)
    in_ram = len(placed.in_ram)
    counts = {"weights_ram": in_ram, "weights_disk": layers - len(placed.resident) - in_ram}
    for name, tiers in (("cache", placed.chunks), ("hidden", placed.hidden)):
        counts |= {f"{name}_{tier}": tiers.count(tier) for tier in TIERS[1:]}
    for name, flag in (("weights", "streams"), ("cache", "moves"), ("hidden", "drifts")):
        counts[flag] = int(any(counts[f"{name}_{tier}"] for tier in TIERS[1:]))
    return line(one=1, **counts)


# -- measuring -----------------------------------------------------------------------------------------

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
LAYERS = 4  # more than what a CPU's own cache holds of most models
_FILE_BYTES = 64 << 20
_PIECE = 4 << 20
_CONTEXT = 384
_BESIDE_SECONDS = 0.3
# Texts of a chunk; chunks that are brought and put back in turn, more than a CPU's own cache holds; turns.
_BATCH, _CHUNKS, _TURNS = 16, 12, 3


class _First:
    """The first layers of a source."""

    def __init__(self, source: Source, layers: int) -> None:
        self._source, self.layers = source, min(layers, source.layers)
        self.nbytes, self.traffic, self.layout = source.nbytes, source.traffic, source.layout

    def read(self, layer: int, out: torch.Tensor) -> Iterator[int]:
        return self._source.read(layer, out)


def measure_hardware(
    model: Any,
    packed: Packed,
    folder: Path,
    *,
    repeats: int = 3,
    rows: Sequence[int] = ROWS,
    clock: Callable[[], float] = time.perf_counter,
) -> Hardware:
    """Measure what this machine does with the first layers of a packed model.

    `model` was loaded without layers; all but a few of its layers are cut off. Files of the cache are tried
    in `folder`. Takes some seconds of computation, and reads the few layers some times.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = _First(DiskSource(packed), LAYERS)
    shape = ModelShape.from_model(model, packed)
    _cut_layers(model, source.layers)
    like = model.get_input_embeddings().weight
    device = like.device
    with WeightStore(source, range(source.layers), device=device) as store:
        passes = _Passes(Decoder(model, store), shape, clock)
        few = [(size, 1, 1) for size in rows]
        cases = _attention_cases(passes.decoder.context_length)
        found = dict(zip([*few, *cases], passes.measure([*few, *cases], repeats), strict=True))
        layer_seconds = without_noise({case[0]: found[case][0] for case in few})
        read, flops = _fit_attention(shape, layer_seconds, {case: found[case][0] for case in cases})
        token_seconds = passes.measure_draw(repeats)
        disk_read = _measure_reads(source, repeats, clock)
        copy = QuantizedSource(_First(source, 2), 4)
        grows = sum(map(copy.nbytes, range(copy.layers))) / sum(map(copy.traffic, range(copy.layers)))
        read_steals, _ = passes.measure_theft(_read_for_ever(source))
        # While nothing is computed nobody waits for weights: what counts is how fast they come beside it.
        dequantize_steals, dequantized = passes.measure_theft(_read_for_ever(copy))
        file_write, file_read = _measure_files(folder, clock)
        file_steals, _ = passes.measure_theft(_read_file_for_ever(folder))
    moving = _measure_cache(shape, "ram", None, like, clock)
    packing = _measure_cache(shape, "device", 4, like, clock)
    links = _measure_links(device, repeats, clock) if device.type != "cpu" else (None, None)
    return Hardware(
        layer_seconds=layer_seconds,
        end_seconds=without_noise({case[0]: found[case][1] for case in few}),
        token_seconds=token_seconds,
        attention_flops=flops,
        attention_read=read,
        disk_read=disk_read,
        file_read=file_read,
        file_write=file_write,
        dequantize=grows * dequantized,
        cache_copy=moving[0],
        cache_dequantize=packing[0],
        cache_quantize=packing[1],
        chunk_seconds=moving[2],
        packed_chunk_seconds=packing[2],
        read_steals=read_steals,
        dequantize_steals=dequantize_steals / grows,
        file_steals=file_steals,
        to_device=links[0],
        from_device=links[1],
        ram_attention=None if device.type == "cpu" else moving[0],
    )


def without_noise(seconds: Mapping[int, float]) -> dict[int, float]:
    """Return rows → seconds where fewer rows take no longer than more: what was slower was disturbed."""
    sizes = sorted(seconds, reverse=True)
    least = itertools.accumulate((seconds[size] for size in sizes), min)
    return dict(sorted(zip(sizes, least, strict=True)))


def _cut_layers(model: Any, count: int) -> None:
    layers = decoder_layers(model)
    del layers[count:]
    config = model.config.get_text_config()
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]


class _Passes:
    """Passes of a decoder, their seconds taken inside the layers and outside."""

    def __init__(self, decoder: Decoder, shape: ModelShape, clock: Callable[[], float]) -> None:
        self.decoder, self.shape, self.clock = decoder, shape, clock
        self._generator = torch.Generator().manual_seed(0)
        self._marks: list[float] = []
        self._layers = decoder_layers(decoder.model)
        for layer in self._layers:
            layer.register_forward_pre_hook(lambda *_: self._mark())
            layer.register_forward_hook(lambda *_: self._mark(), prepend=True)

    def _mark(self) -> None:
        if self.decoder.device.type == "cuda":
            torch.cuda.synchronize(self.decoder.device)
        self._marks.append(self.clock())

    def prepare(self, batch: int, rows: int, context: int) -> Callable[[], tuple[float, float]]:
        """Return what runs `rows` rows of `batch` texts behind `context` others, and forgets them again.

        It returns the seconds of a layer, and of all else.
        """
        cache = self.decoder.new_cache(batch, context + rows)
        self._fill(cache, batch, context)
        tokens = torch.randint(self.decoder.vocabulary, (batch, rows), generator=self._generator)
        positions = (context + torch.arange(rows)).expand(batch, rows)
        causal = torch.ones(batch, rows, rows, dtype=torch.bool).tril()

        def run() -> tuple[float, float]:
            self._marks.clear()
            began = self.clock()
            logits = self.decoder.forward(tokens, positions, causal, cache, keep=1)
            logits[:, -1].max(-1)[1].tolist()  # waits for a GPU
            seconds = self.clock() - began
            cache.keep([[]] * batch)
            inside = sum(end - start for start, end in zip(self._marks[::2], self._marks[1::2], strict=True))
            return inside / len(self._layers), seconds - inside

        return run

    def _fill(self, cache: RowCache, batch: int, context: int) -> None:
        """Let the cache hold numbers as if it had read a text."""
        cache.reserve(torch.arange(context, device=cache.positions.device).expand(batch, context))
        for layer, (heads, width) in enumerate(_cache_sizes(self.decoder.config)):
            states = torch.randn((batch, heads, context, width), generator=self._generator)
            states = states.to(self.decoder.device, self.decoder.dtype)
            cache.update(states, states, layer)
        cache.advance(context)
        cache.keep([range(context)] * batch)

    def measure(self, cases: Sequence[tuple[int, int, int]], repeats: int) -> list[tuple[float, float]]:
        """Return, of each case, the median seconds of a layer and of all else.

        A case is texts, rows and context. They run in turn, so that a slow moment meets them all; the first
        turn is left out.
        """
        runs = [self.prepare(*case) for case in cases]
        turns = [[run() for run in runs] for _ in range(repeats + 1)][1:]
        return [
            (statistics.median(layer), statistics.median(rest))
            for layer, rest in (zip(*turn, strict=True) for turn in zip(*turns, strict=True))
        ]

    def measure_draw(self, repeats: int) -> float:
        """Return the median seconds to draw a token from a row of logits, without filters."""
        sampling = Sampling(temperature=1.0)
        processing, draw = Processing(sampling), make_draw(sampling, self._generator)
        logits = torch.randn(self.shape.vocabulary, generator=self._generator)
        seconds = []
        for _ in range(4 * repeats):
            began = self.clock()
            draw(processing(logits, ()))
            seconds.append(self.clock() - began)
        return statistics.median(seconds)

    def measure_theft(self, work: Iterator[int]) -> tuple[float, float]:
        """Return what `work`, that a thread does beside passes, costs and gets done.

        The seconds that the passes lose for each of its bytes, and its bytes a second.
        """
        run = self.prepare(16, 1, 1)
        alone = statistics.median(sum(run()) for _ in range(5))
        ends, done = threading.Event(), [0]

        def work_on() -> None:
            for nbytes in work:
                done[0] += nbytes
                if ends.is_set():
                    return

        worker = threading.Thread(target=work_on, daemon=True)
        worker.start()
        try:
            run()
            began, before, passes = self.clock(), done[0], 0
            while self.clock() - began < _BESIDE_SECONDS:
                run()
                passes += 1
            seconds, nbytes = self.clock() - began, max(1, done[0] - before)
        finally:
            ends.set()
            worker.join()
        return max(0.0, seconds - passes * alone) / nbytes, nbytes / seconds


def _read_for_ever(source: Source) -> Iterator[int]:
    out = empty_buffer(max(map(source.nbytes, range(source.layers))))
    for layer in itertools.cycle(range(source.layers)):
        yield from source.read(layer, out)


def _read_file_for_ever(folder: Path) -> Iterator[int]:
    """Write a file without a name in `folder` once, and go on reading it."""
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        into = bytearray(_PIECE)
        for _ in range(0, _FILE_BYTES, _PIECE):
            yield file.write(into)
        while True:
            file.seek(0)
            while count := file.readinto(into):
                yield count


def _attention_cases(limit: int | None) -> list[tuple[int, int, int]]:
    """Return texts, rows and context of passes that see much: a few rows, as in decoding, and many."""
    context = min(_CONTEXT, limit // 2) if limit else _CONTEXT
    some = max(1, min(64, context // 2))
    return [
        (16, 1, context),
        (64, 1, context // 2),
        (4, some, 0),
        (1, context, 0),
        (4, some, context - some),
    ]


def _fit_attention(
    shape: ModelShape, layer_seconds: Mapping[int, float], cases: Mapping[tuple[int, int, int], float]
) -> tuple[float, float]:
    """Return the bytes of keys and values a second that attention goes over, and its FLOPs a second.

    By least squares from the seconds a layer that `cases` (texts, rows, context) take beyond those next to no
    context, each relative to its whole.
    """
    work, beyond = [], []
    for (batch, rows, before), seconds in cases.items():
        read = batch * (before + rows) * shape.position_bytes()
        flops = shape.attention_flops(batch * rows, before + rows)
        work.append([read / seconds, flops / seconds])
        beyond.append(max(0.0, 1 - interpolate(layer_seconds, batch * rows) / seconds))
    table = np.array(work)
    scale = table.max(0)
    found, _ = nnls(table / scale, np.array(beyond))
    read_rate, flops_rate = scale / np.maximum(found, 1e-6)
    return float(read_rate), float(flops_rate)


def _measure_reads(source: Source, repeats: int, clock: Callable[[], float]) -> float:
    """Return the bytes of traffic a second of reading all layers, after a first time that checks them."""
    out = empty_buffer(max(map(source.nbytes, range(source.layers))))
    seconds, nbytes = [], sum(map(source.traffic, range(source.layers)))
    for _ in range(repeats + 1):
        began = clock()
        for layer in range(source.layers):
            for _ in source.read(layer, out):
                pass
        seconds.append(clock() - began)
    return nbytes / statistics.median(seconds[1:])


def _measure_files(folder: Path, clock: Callable[[], float]) -> tuple[float, float]:
    """Return the bytes a second of writing and of reading a file without a name in `folder`."""
    piece = bytes(_PIECE)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        began = clock()
        for _ in range(0, _FILE_BYTES, _PIECE):
            file.write(piece)
        written = clock()
        file.seek(0)
        into, started = bytearray(_PIECE), clock()
        while file.readinto(into):
            pass
        return _FILE_BYTES / (written - began), _FILE_BYTES / (clock() - started)


def _measure_cache(
    shape: ModelShape, tier: str, bits: int | None, like: torch.Tensor, clock: Callable[[], float]
) -> tuple[float, float, float]:
    """Return what a chunk of the cache takes on a tier, in so many bits, beyond one that stays as it is.

    Bytes of keys and values a second that are brought, and that are put back, as they are computed with; and
    the seconds of a chunk beside its bytes.
    """
    few, many = 1, 128
    position = _BATCH * shape.position_bytes()

    def time_chunk(tier: str, bits: int | None, before: int, rows: int) -> float:
        cache = BatchCache([0] * _BATCH, before + rows, lambda _: tier, bits=bits, device=like.device)
        size = (_BATCH, shape.kv_heads, before + rows, shape.head_dim)
        states = torch.randn(size, dtype=like.dtype, device=like.device)
        if before:
            for chunk in range(_CHUNKS):
                cache.update(states[:, :, :before], states[:, :, :before], chunk)
            cache.advance(before)
        seconds = []
        for chunk in [*range(_CHUNKS)] * _TURNS:
            began = clock()
            cache.update(states[:, :, before:], states[:, :, before:], chunk)
            cache.settle(chunk)
            if like.device.type == "cuda":
                torch.cuda.synchronize(like.device)
            seconds.append(clock() - began)
        cache.close()
        return statistics.median(seconds)

    least, brought, put_back = (
        max(0.0, time_chunk(tier, bits, *case) - time_chunk("device", None, *case))
        for case in ((few, few), (many, few), (few, many))
    )
    # A tenth of a microsecond a position: no rate is infinite.
    more = (many - few) * position
    return (
        more / max(brought - least, 1e-7 * many),
        more / max(put_back - least, 1e-7 * many),
        least,
    )


def _measure_links(device: torch.device, repeats: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Return the bytes a second from RAM to the device and back."""
    here = torch.empty(_FILE_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty(_FILE_BYTES, dtype=torch.uint8, device=device)
    rates = []
    for target, origin in ((there, here), (here, there)):
        seconds = []
        for _ in range(repeats + 1):
            began = clock()
            target.copy_(origin)
            there[0].item()
            seconds.append(clock() - began)
        rates.append(_FILE_BYTES / statistics.median(seconds[1:]))
    return rates[0], rates[1]


def hardware_to_json(hardware: Hardware) -> str:
    """Return what `hardware_from_json` reads."""
    return json.dumps(asdict(hardware), indent=1)


def hardware_from_json(text: str) -> Hardware:
    """Read what `hardware_to_json` wrote. Raises ValueError, TypeError or LookupError for anything else."""
    found = json.loads(text)
    for table in ("layer_seconds", "end_seconds"):
        found[table] = {int(size): seconds for size, seconds in found[table].items()}
    return Hardware(**found)
