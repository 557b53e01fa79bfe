"""The cost model: bytes as packed, FLOPs as counted, published sizes, seconds by hand."""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_toys import FAMILIES, random_tokens, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from t2iprobe.errors import UserError
from t2iprobe.llm.engine.decoder import Decoder
from t2iprobe.llm.memory import schedule
from t2iprobe.llm.memory.cost import (
    BUFFERS,
    PROMPT_ROWS,
    VARIABLES,
    Hardware,
    ModelShape,
    Workload,
    _Passes,
    count_costs,
    count_placed,
    forecast,
    hardware_from_json,
    hardware_to_json,
    interpolate,
    line,
    measure_hardware,
    without_noise,
)
from t2iprobe.llm.memory.packing import Packed, pack_layers, pack_quantized, read_rest
from t2iprobe.llm.memory.placement import Placement, Shares
from t2iprobe.llm.memory.sources import padded
from t2iprobe.llm.models import (
    LanguageModelFiles,
    find_language_model,
    load_without_layers,
    name_tensors,
)

HERE, AWAY = Shares(1, 0, 0), Shares(0, 0, 1)
MACHINE = Hardware(
    layer_seconds={1: 1e-3, 101: 11e-3},  # 0.9 ms and 0.1 ms a row
    end_seconds={1: 2e-3},
    token_seconds=5e-3,
    attention_flops=1e9,
    attention_read=1e9,
    disk_read=1e8,
    file_read=1e8,
    file_write=5e7,
    dequantize=2e8,
    cache_copy=1e9,
    cache_dequantize=1e8,
)


def opt(hidden: int, layers: int, heads: int) -> ModelShape:
    from transformers import OPTConfig

    config = OPTConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, ffn_dim=4 * hidden,
        word_embed_proj_dim=hidden, max_position_embeddings=2048, vocab_size=50272,
    )  # fmt: skip
    return ModelShape.from_config(config, torch.float16)


def llama(**changes: Any) -> ModelShape:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return ModelShape.from_config(LlamaConfig(**sizes | heads | changes))


def test_the_schedules_own_numbers() -> None:
    assert (schedule.PROMPT_ROWS, schedule.BUFFERS) == (PROMPT_ROWS, BUFFERS)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_bytes_are_those_of_the_packed_files(family: str, bits: int | None, tmp_path: Path) -> None:
    model = tiny_model(family, torch.float32)
    model.save_pretrained(tmp_path / "model")
    packed = pack_layers(tmp_path / "model", tmp_path / "packed")
    stored = packed if bits is None else pack_quantized(packed, tmp_path / "quantized", bits)
    shape = ModelShape.from_model(model, packed)
    assert shape == ModelShape.from_model(model)
    assert {file.nbytes for file in stored.layers} == {shape.traffic(bits)}
    assert shape.rest_bytes == sum(
        parameter.nbytes for parameter in model.parameters()
    ) - shape.layers * shape.traffic(None)


@pytest.mark.parametrize("bits", [None, 4])
def test_bytes_of_experts_are_those_of_the_packed_files(bits: int | None, tmp_path: Path) -> None:
    model = tiny_model("qwen3 with experts", torch.float32)
    model.save_pretrained(tmp_path / "model")
    files = find_language_model(str(tmp_path / "model"))
    packed = pack_layers(files.folder, tmp_path / "packed", None, lambda: name_tensors(files))
    stored = packed if bits is None else pack_quantized(packed, tmp_path / "quantized", bits)
    shape = ModelShape.from_model(model, packed)
    assert shape == ModelShape.from_model(model)
    assert {file.nbytes for file in stored.layers} == {shape.traffic(bits)}


def test_layers_of_several_sizes_count_as_the_largest_and_are_measured() -> None:
    model = tiny_model("gemma4", torch.float32)
    shape = ModelShape.from_model(model)
    assert (shape.kv_heads, shape.head_dim) == (2, 16)  # others have 8
    passes = _Passes(Decoder(model), shape, time.perf_counter)
    assert all(seconds > 0 for seconds in passes.prepare(2, 3, 4)())


def test_layers_that_read_each_others_keys_are_not_planned_for() -> None:
    with pytest.raises(UserError, match="not in parts"):
        ModelShape.from_model(tiny_model("gemma4 with shared keys"))


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2", "gpt-neox"])
def test_flops_are_those_that_torch_counts(family: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation("eager")  # whose products are counted one by one
    shape = ModelShape.from_model(model)
    batch, rows = 3, 11
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(random_tokens(batch, rows), use_cache=False, logits_to_keep=1)
    counts = counter.get_flop_counts()["Global"]
    rotations = 0 if family == "opt" else count_rotations(model, rows)
    counted = sum(counts.values()) - rotations
    expected = shape.layers * (
        shape.layer_flops(batch * rows) + shape.attention_flops(batch * rows, rows)
    ) + shape.head_flops(batch)
    assert counted == expected
    workload = Workload(batch, rows, 1)
    assert count_costs(shape, MACHINE, workload, [batch]).phases["prefill"].flops == expected


def count_rotations(model: Any, rows: int) -> int:
    """The products of frequencies and positions, one for all texts: no part of the model of costs."""
    rotary = next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))
    with FlopCounterMode(display=False) as counter:
        rotary(torch.zeros(1, rows, 4, dtype=torch.float64), torch.arange(rows)[None])
    return counter.get_total_flops()


@pytest.mark.parametrize(("hidden", "layers", "heads"), [(7168, 48, 56), (12288, 96, 96)])
def test_published_sizes_of_opt(hidden: int, layers: int, heads: int) -> None:
    """FlexGen, section 3: OPT-175B has 325 GB of weights, and 1.2 TB of cache for 512 texts of 512 + 32."""
    shape = opt(hidden, layers, heads)
    published = 8 * hidden**2 + 4 * hidden * (4 * hidden)
    matrices = 2 * sum(map(math.prod, shape.matrices))
    assert (matrices, shape.position_bytes(), shape.gated) == (published, 4 * hidden, False)
    assert shape.traffic(None) == matrices + 2 * shape.vector_values
    if layers == 96:
        assert layers * shape.traffic(None) / 2**30 == pytest.approx(324, abs=1)  # 325 with the embedding
        assert 512 * 544 * layers * shape.position_bytes() / 2**40 == pytest.approx(1.2, abs=0.05)


def test_grouped_queries_and_gates() -> None:
    shape = llama()
    h, kv, ffn = 64, 2 * 16, 96
    assert shape.gated
    assert sum(map(math.prod, shape.matrices)) == 2 * h * h + 2 * h * kv + 3 * h * ffn
    assert shape.position_bytes() == 2 * kv * 4
    assert shape.position_bytes(4) == 2 * (32 + 8)  # a group of 64 numbers, its step and its least value
    assert shape.layer_flops(1) == 2 * sum(map(math.prod, shape.matrices))


def test_tables_are_straight_between_and_beyond_their_sizes() -> None:
    table = {1: 1.0, 3: 2.0, 7: 4.0}
    assert [interpolate(table, size) for size in (0.5, 1, 2, 3, 5, 11)] == [1, 1, 1.5, 2, 3, 6]
    assert interpolate({1: 2.0}, 9) == 2.0


def test_a_block_by_hand() -> None:
    """Two batches of 3, everything but the weights here."""
    shape, machine = llama(), MACHINE
    workload = Workload(6, 10, 5)
    placement = Placement(3, 2, AWAY, HERE, HERE)
    found = forecast(shape, machine, workload, placement)
    layer = shape.traffic(None)
    positions = shape.position_bytes()
    read = 4 * layer / 1e8

    def attention(rows: int, seen: float) -> float:
        return 3 * seen * positions / 1e9 + 3 * rows * seen * 4 * 64 / 1e9

    prefill = 2 * (4 * (1e-3 + 29e-4 + attention(10, 10)) + 2e-3)
    decode = 2 * (4 * (1e-3 + 2e-4 + attention(1, 10 + 5 / 2)) + 2e-3)
    idle = max(0.0, 2 * 2e-3 - layer / 1e8)
    assert found.prefill_seconds == pytest.approx(max(prefill, read + idle))
    assert found.decode_seconds == pytest.approx(4 * max(decode, read + idle))
    assert found.tokens_per_second == pytest.approx(30 / found.seconds)
    assert found.binding == "compute"
    slow = forecast(shape, machine.behind_link(1e6), workload, placement)
    assert slow.seconds == pytest.approx(5 * (4 * layer / 1e6))
    assert slow.binding == "disk link"


def test_a_last_block_that_is_not_full_costs_what_it_is() -> None:
    shape, placement = llama(), Placement(3, 2, HERE, HERE, HERE)

    def seconds(prompts: int, like: Placement = placement) -> float:
        return forecast(shape, MACHINE, Workload(prompts, 10, 5), like).seconds

    assert seconds(12) == pytest.approx(2 * seconds(6))
    assert seconds(10) == pytest.approx(seconds(6) + seconds(4))
    assert seconds(4) == pytest.approx(
        seconds(3, replace(placement, batches=1)) + seconds(1, replace(placement, batch=1, batches=1))
    )


def test_prompts_beyond_a_passs_rows_take_several_passes() -> None:
    shape = llama()
    counted = count_costs(shape, MACHINE, Workload(None, 100, 2), [64, 64]).phases["prefill"]
    assert counted.passes == 4  # 2048 // 64 = 32 rows of a text
    assert count_costs(shape, MACHINE, Workload(None, 100, 2), [8]).phases["prefill"].passes == 1


def test_where_things_lie_takes_their_bytes() -> None:
    shape, workload = llama(), Workload(None, 10, 5)
    chunk = 3 * 14 * shape.position_bytes()
    layer = padded(shape.traffic(None))

    def peak(placement: Placement) -> dict[str, int]:
        return forecast(shape, MACHINE, workload, placement).peak_bytes

    base = Placement(3, 2, HERE, HERE, HERE)
    here = peak(base)
    assert here["device"] > 4 * layer + 8 * chunk + shape.rest_bytes
    half = peak(replace(base, weights=Shares(0.5, 0, 0.5)))
    assert half["device"] == here["device"] - 2 * layer + 2 * layer  # two go, two buffers come
    assert peak(replace(base, weights=AWAY))["device"] == half["device"] - 2 * layer
    moved = [peak(replace(base, cache=Shares(1 - share, 0, share))) for share in (0.5, 1.0)]
    assert moved[0]["device"] - moved[1]["device"] == 4 * chunk
    assert [each["disk"] for each in moved] == [4 * chunk, 8 * chunk]
    twice = peak(replace(base, batches=4))
    assert twice["device"] > here["device"] + 8 * chunk


def test_four_bits_cost_dequantising_and_save_reading() -> None:
    shape, workload = llama(), Workload(None, 10, 5)
    slow = MACHINE.behind_link(1e5)
    plain, packed = (
        forecast(shape, slow, workload, Placement(3, 2, AWAY, HERE, HERE, weight_bits=bits))
        for bits in (None, 4)
    )
    ratio = shape.traffic(None) / shape.traffic(4)
    assert plain.seconds / packed.seconds == pytest.approx(ratio, rel=0.05)
    stays, goes = (
        forecast(
            shape, replace(MACHINE, dequantize=1e5), workload, Placement(3, 2, at, HERE, HERE, weight_bits=4)
        )
        for at in (HERE, AWAY)
    )
    assert stays.binding == goes.binding == "dequantising"
    assert stays.seconds == pytest.approx(5 * 4 * shape.traffic(None) / 1e5, rel=0.01)
    assert stays.peak_bytes["device"] - goes.peak_bytes["device"] == 4 * shape.traffic(4)


def test_a_chunk_costs_beside_its_bytes() -> None:
    """By hand: 5 passes, 4 layers, 2 batches of 3; the first pass puts 10 positions away, the others 1."""
    shape, workload = llama(), Workload(None, 10, 5)
    slow = replace(
        MACHINE, chunk_seconds=2.0, packed_chunk_seconds=3.0, cache_quantize=7.0, cache_dequantize=11.0
    )
    here = Placement(3, 2, HERE, HERE, HERE)
    stays, moved = (forecast(shape, slow, workload, replace(here, cache=at)).seconds for at in (HERE, AWAY))
    assert moved - stays == pytest.approx(5 * 4 * 2 * 2.0, rel=1e-3)
    packed = forecast(shape, slow, workload, replace(here, cache_bits=4)).seconds
    position = 3 * shape.position_bytes()
    put_away, brought = (10 + 4 * 1) * position, 4 * 11.5 * position  # 11 to 14 positions, less the new one
    expected = 4 * 2 * (5 * 3.0 + put_away / 7.0 + brought / 11.0)
    assert packed - stays == pytest.approx(expected, rel=1e-3)


def test_a_device_of_its_own_is_fed_through_its_link() -> None:
    shape, workload = llama(), Workload(None, 10, 5)
    machine = replace(MACHINE, to_device=1e6, from_device=1e6, ram_attention=1e9)
    in_ram = Shares(0, 1, 0)
    weights = forecast(shape, machine, workload, Placement(3, 2, in_ram, HERE, HERE))
    assert weights.seconds == pytest.approx(5 * 4 * shape.traffic(None) / 1e6)
    assert weights.peak_bytes["ram"] == 4 * shape.traffic(None)
    slower = replace(machine, to_device=2e5)
    up, at_home = (
        forecast(
            shape, slower, Workload(None, 100, 20), Placement(3, 2, HERE, in_ram, HERE, cpu_attention=on)
        )
        for on in (False, True)
    )
    assert up.binding == "link to the device"
    assert at_home.decode_seconds < up.decode_seconds  # queries are smaller than keys and values


def test_counts_are_those_of_what_is_realised() -> None:
    placement = Placement(3, 2, Shares(0.5, 0, 0.5), Shares(0.7, 0, 0.3), Shares(0.6, 0, 0.4))
    found = dict(zip(VARIABLES, count_placed(placement, 4, 2), strict=True))
    assert found == dict.fromkeys(VARIABLES, 0) | {
        **{"one": 1, "weights_disk": 2, "cache_disk": 3, "hidden_disk": 1},
        **{"streams": 1, "moves": 1, "drifts": 1},
    }
    assert line(one=2.0, drifts=3.0).tolist() == [2, 0, 0, 0, 0, 0, 0, 0, 0, 3]


def test_a_machine_is_measured_and_kept(llama: Path, packed: Packed, tmp_path: Path) -> None:
    model = load_without_layers(LanguageModelFiles(llama, "toy"), read_rest(packed))
    found = measure_hardware(model, packed, tmp_path / "files", repeats=1, rows=(1, 8))
    assert set(found.layer_seconds) == set(found.end_seconds) == {1, 8}
    rates = (found.disk_read, found.file_read, found.dequantize, found.attention_flops, found.cache_copy)
    assert all(1e5 < rate < 1e18 for rate in rates)
    assert 1e5 < found.cache_dequantize < 1e18
    assert 1e5 < found.cache_quantize < 1e18
    assert 0 < found.packed_chunk_seconds < 0.1  # a chunk of one row a text in 4 bits is never free
    assert 0 <= found.read_steals < 1e-5
    assert (found.to_device, found.ram_attention) == (None, None)
    assert hardware_from_json(hardware_to_json(found)) == found
    assert list((tmp_path / "files").iterdir()) == []


def test_what_disturbed_a_measurement_is_left_out() -> None:
    assert without_noise({1: 3.0, 2: 9.0, 4: 2.0, 8: 5.0, 16: 7.0, 32: 6.0}) == {
        1: 2.0, 2: 2.0, 4: 2.0, 8: 5.0, 16: 6.0, 32: 6.0
    }  # fmt: skip


def test_the_link_caps_the_weights_alone() -> None:
    capped = MACHINE.behind_link(1e6)
    assert (capped.disk_read, capped.file_read, capped.shares_disk) == (1e6, 1e8, False)
    assert MACHINE.behind_link(1e12).disk_read == MACHINE.disk_read
