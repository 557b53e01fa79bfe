"""Placements: what is rounded fits, what is chosen is the best, what binds binds."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from t2iprobe.errors import UserError
from t2iprobe.llm.memory.cost import Hardware, ModelShape, Workload, count_costs, forecast
from t2iprobe.llm.memory.placement import TIERS, Forecast, Placement, Shares, choose_placement, realise

HERE = Shares(1, 0, 0)
WORKLOAD = Workload(None, 12, 6)
MACHINE = Hardware(
    layer_seconds={1: 1e-3, 101: 2e-3},
    end_seconds={1: 1e-3, 101: 5e-3},
    token_seconds=1e-4,
    attention_flops=1e9,
    attention_read=1e9,
    disk_read=2e7,
    file_read=5e7,
    file_write=2e7,
    dequantize=2e8,
    cache_copy=1e9,
    cache_dequantize=1e8,
    read_steals=1e-9,
    file_steals=2e-9,
    dequantize_steals=1e-9,
)
GPU = replace(MACHINE, to_device=1e8, from_device=5e7, ram_attention=2e8)


def toy_shape(layers: int = 4, **changes: Any) -> ModelShape:
    """A shape that no model needs to have: layers of 100 KB, 256 bytes of cache a position."""
    sizes: dict[str, Any] = {
        **{"layers": layers, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 96},
        **{"gated": True, "vocabulary": 100, "tied": False, "value_bytes": 4},
        **{"matrices": ((160, 160),), "vector_values": 64},
        **{"largest_layer": 4 * (160 * 160 + 64), "rest_bytes": 50_000},
    }
    return ModelShape(**sizes | changes)


def whole_shares(total: int, tiers: int) -> Iterator[Shares]:
    """All ways to lay `total` things on device and disk, or on all three tiers."""
    for device in range(total + 1):
        for ram in range(total - device + 1) if tiers == 3 else (0,):
            yield Shares(device / total, ram / total, (total - device - ram) / total)


def fits(found: Forecast, budgets: Mapping[str, int | None]) -> bool:
    limits = {tier: budgets.get(tier) for tier in TIERS}
    return all(limit is None or found.peak_bytes[tier] <= limit for tier, limit in limits.items())


CASES = {
    "a CPU": (MACHINE, 4, {"device": 700_000, "ram": 0, "disk": None}),
    "a CPU with little memory": (MACHINE, 4, {"device": 480_000, "ram": 0, "disk": None}),
    "a CPU with a little disk": (MACHINE, 4, {"device": 520_000, "ram": 0, "disk": 60_000}),
    "a CPU behind a slow link": (MACHINE.behind_link(1e6), 4, {"device": 600_000, "ram": 0, "disk": None}),
    "a CPU with slow files": (
        replace(MACHINE, file_read=1e6, file_write=1e6),
        3,
        {"device": 560_000, "ram": 0, "disk": None},
    ),
    "a GPU": (GPU, 3, {"device": 480_000, "ram": 250_000, "disk": None}),
    "a GPU behind a slow link": (
        replace(GPU, to_device=1e6),
        2,
        {"device": 420_000, "ram": 10**6, "disk": None},
    ),
}


@pytest.mark.parametrize("bits", [(None,), (None, 4)])
@pytest.mark.parametrize("case", CASES)
def test_no_placement_of_a_grid_is_better(case: str, bits: tuple[int | None, ...]) -> None:
    """Every way to lay layers, chunks and hidden states, for some blocks: none that fits is faster."""
    machine, layers, budgets = CASES[case]
    shape = toy_shape(layers)
    tiers = 3 if machine.to_device else 2
    best, tried = 0.0, 0
    blocks = (
        [(1, 1), (2, 1), (2, 2), (8, 1)] if tiers == 3 else [(1, 1), (1, 2), (2, 2), (3, 3), (8, 2), (16, 1)]
    )
    for batch, batches in blocks:
        for kind in itertools.product(bits, bits, (False, True) if machine.ram_attention else (False,)):
            costs = count_costs(shape, machine, WORKLOAD, [batch] * batches, *kind)
            parts = [[*whole_counts(total, tiers)] for total in (layers, layers * batches, batches)]
            counts = np.array(
                [
                    [1, *a, *b, *c, sum(a) > 0, sum(b) > 0, sum(c) > 0]
                    for a, b, c in itertools.product(*parts)
                ],
                dtype=float,
            )
            keeps = np.ones(len(counts), dtype=bool)
            for tier, limit in budgets.items():
                keeps &= counts @ costs.nbytes[tier] <= (np.inf if limit is None else limit)
            seconds = sum(
                phase.passes * np.max([counts @ row for row in phase.seconds.values()], axis=0)
                for phase in costs.phases.values()
            )
            tried += int(keeps.sum())
            if keeps.any():
                best = max(best, batch * batches * WORKLOAD.new_tokens / seconds[keeps].min())
    choice = choose_placement(shape, machine, WORKLOAD, budgets, bits=bits)
    assert tried > 20
    assert fits(choice.forecast, budgets)
    assert choice.forecast.tokens_per_second >= best * (1 - 2e-3)
    assert (
        replace(forecast(shape, machine, WORKLOAD, choice.placement), binding=choice.binding)
        == choice.forecast
    )


def whole_counts(total: int, tiers: int) -> Iterator[tuple[int, int]]:
    """How many of `total` things lie in RAM and on disk, in all ways."""
    for disk in range(total + 1):
        for ram in range(total - disk + 1) if tiers == 3 else (0,):
            yield ram, disk


@pytest.mark.parametrize("seed", range(12))
def test_the_best_of_one_block_is_found_exactly(seed: int) -> None:
    """With the block given, brute force over every share finds nothing better on random machines."""
    random = np.random.default_rng(seed)
    scale = {
        name: getattr(MACHINE, name) * float(10 ** random.uniform(-1.5, 1.5))
        for name in ("disk_read", "file_read", "file_write", "attention_read", "cache_copy")
    }
    machine, shape = replace(MACHINE, **scale), toy_shape(int(random.integers(2, 6)))
    batch, batches = int(random.integers(1, 9)), int(random.integers(1, 4))
    totals = (shape.layers, shape.layers * batches, batches)
    grid = [
        forecast(shape, machine, WORKLOAD, Placement(batch, batches, *shares))
        for shares in itertools.product(*(whole_shares(total, 2) for total in totals))
    ]
    low, high = (extreme(found.peak_bytes["device"] for found in grid) for extreme in (min, max))
    budgets = {"device": int(random.uniform(low, high)) + 1000, "ram": 0, "disk": None}
    best = max(found.tokens_per_second for found in grid if fits(found, budgets))
    choice = choose_placement(shape, machine, WORKLOAD, budgets, bits=(None,), block=batches, batch=batch)
    assert (choice.placement.batch, choice.placement.batches) == (batch, batches)
    assert choice.forecast.tokens_per_second == pytest.approx(best, rel=1e-3)
    assert fits(choice.forecast, budgets)


@pytest.mark.parametrize("seed", range(40))
def test_rounding_never_takes_more_of_a_faster_tier(seed: int) -> None:
    random = np.random.default_rng(seed)
    layers, batches = int(random.integers(1, 40)), int(random.integers(1, 9))
    sizes = [int(size) for size in random.integers(10**3, 10**10, layers)]
    asked = [Shares(*random.dirichlet([0.5, 0.5, 0.5])) for _ in range(3)]
    found = realise(Placement(3, batches, *asked), sizes)
    for name, share in zip(("weights", "cache", "hidden"), asked, strict=True):
        real = found.shares[name]
        assert real.device <= share.device + 1e-9
        assert real.device + real.ram <= share.device + share.ram + 1e-9
    assert not set(found.resident) & set(found.in_ram)
    chunks = [found.cache_tier(layer, batch) for layer in range(layers) for batch in range(batches)]
    assert chunks.count("device") == int(asked[1].device * len(chunks))
    assert {found.hidden_tier(batch) for batch in range(batches)} <= set(TIERS)


@pytest.mark.parametrize("layer_bytes", [1, 14_160_384, 1_710_000_001, 10**12 + 7])
def test_whole_shares_are_realised_whole(layer_bytes: int) -> None:
    """What the planner counted must not be lost by the rounding of floats, however large layers are."""
    for layers in (1, 3, 30, 80):
        for count in range(layers + 1):
            shares = Shares(count / layers, 0, (layers - count) / layers)
            found = realise(Placement(1, 3, shares, shares, HERE), [layer_bytes] * layers)
            assert len(found.resident) == count
            assert found.chunks.count("device") == 3 * count


def test_what_binds_is_what_helps() -> None:
    """Twice of what binds is faster, twice of what does not is not."""
    shape = toy_shape(8)
    small = {"device": 700_000, "ram": 0, "disk": None}

    def choose(machine: Hardware, budgets: Mapping[str, int | None]) -> Any:
        return choose_placement(shape, machine, WORKLOAD, budgets, bits=(None,), block=1, batch=4)

    def double(machine: Hardware, *names: str) -> Hardware:
        return replace(machine, **{name: 2 * getattr(machine, name) for name in names})

    def computes_twice(machine: Hardware) -> Hardware:
        tables = {
            name: {size: seconds / 2 for size, seconds in getattr(machine, name).items()}
            for name in ("layer_seconds", "end_seconds")
        }
        return double(replace(machine, **tables), "attention_flops", "attention_read")

    slow = replace(MACHINE.behind_link(5e6), read_steals=0.0)
    linked = choose(slow, small)
    rate = linked.forecast.tokens_per_second
    assert linked.binding in ("disk link", "device memory")
    assert linked.saved["disk link"] > 0 < linked.saved["device memory"]
    assert choose(double(slow, "disk_read"), small).forecast.tokens_per_second > 1.5 * rate
    assert choose(computes_twice(slow), small).forecast.tokens_per_second < 1.01 * rate
    assert linked.more_memory[2.0] > linked.more_memory[1.1] >= rate
    assert linked.more_memory[2.0] > 1.2 * rate

    roomy = {"device": 10**8, "ram": 0, "disk": None}
    computing = choose(slow, roomy)
    rate = computing.forecast.tokens_per_second
    assert computing.binding == "compute"
    assert computing.saved["device memory"] == computing.saved.get("disk link", 0.0) == 0
    assert choose(double(slow, "disk_read"), roomy).forecast.tokens_per_second == pytest.approx(rate)
    assert choose(computes_twice(slow), roomy).forecast.tokens_per_second == pytest.approx(2 * rate)
    assert computing.more_memory[2.0] == pytest.approx(rate)


def test_the_dual_is_the_gain_of_a_little_more() -> None:
    """A tenth of the saved share is what one hundredth more of the link buys."""
    shape = toy_shape(30)
    machine = replace(MACHINE.behind_link(5e6), read_steals=0.0, end_seconds={1: 0.0})
    budgets = {"device": 1_000_000, "ram": 0, "disk": None}
    choice = choose_placement(shape, machine, WORKLOAD, budgets, bits=(None,), block=1, batch=4)
    faster = replace(machine, disk_read=machine.disk_read / 0.99)
    found = forecast(shape, faster, WORKLOAD, choice.placement)
    gained = 1 - found.seconds / choice.forecast.seconds
    assert choice.saved["disk link"] == pytest.approx(10 * gained, rel=0.05)


def test_a_large_cache_goes_where_there_is_room() -> None:
    shape = toy_shape(16)
    workload = Workload(None, 400, 50)
    budgets = {"device": 3_600_000, "ram": 0, "disk": None}
    fast_files = replace(MACHINE, file_read=1e10, file_write=1e10, file_steals=0.0, cache_copy=1e10)
    moved = choose_placement(shape, fast_files, workload, budgets, bits=(None,))
    kept = choose_placement(shape, fast_files, workload, {**budgets, "disk": 0}, bits=(None,))
    assert moved.placement.cache.disk > 0
    assert kept.placement.cache.disk == 0
    assert kept.forecast.peak_bytes["disk"] == 0
    assert moved.forecast.tokens_per_second > kept.forecast.tokens_per_second
    with pytest.raises(UserError, match="more memory, or more disk space"):
        choose_placement(
            shape, fast_files, workload, {"device": 2_500_000, "ram": 0, "disk": 0}, bits=(None,)
        )


def test_a_block_is_no_larger_than_there_are_prompts() -> None:
    budgets = {"device": 10**8, "ram": 0, "disk": None}
    slow = MACHINE.behind_link(1e5)
    choice = choose_placement(toy_shape(), slow, replace(WORKLOAD, prompts=5), budgets, bits=(None,))
    assert choice.placement.batch <= 5
    assert choice.placement.block < 5 + choice.placement.batch
    fixed = choose_placement(
        toy_shape(), slow, replace(WORKLOAD, prompts=64), budgets, bits=(None,), block=3, batch=2
    )
    assert (fixed.placement.batches, fixed.placement.batch) == (3, 2)


def test_bits_are_used_where_they_pay_and_are_allowed() -> None:
    slow, shape = MACHINE.behind_link(2e5), toy_shape(6)
    budgets = {"device": 600_000, "ram": 0, "disk": 0}
    lossless = choose_placement(shape, slow, WORKLOAD, budgets, bits=(None,))
    free = choose_placement(shape, slow, WORKLOAD, budgets)
    assert (lossless.placement.weight_bits, lossless.placement.cache_bits) == (None, None)
    assert free.placement.weight_bits == 4
    assert free.forecast.tokens_per_second > 2 * lossless.forecast.tokens_per_second
    forced = choose_placement(shape, MACHINE, WORKLOAD, {"device": 10**8}, bits=(4,))
    assert (forced.placement.weight_bits, forced.placement.cache_bits) == (4, 4)


def test_the_least_memory_is_told_and_suffices() -> None:
    shape = toy_shape()
    with pytest.raises(
        UserError, match=r"memory budget of 1000 bytes is too small.*give \d+ or more"
    ) as refusal:
        choose_placement(shape, MACHINE, WORKLOAD, {"device": 1000, "ram": 0, "disk": None})
    least = int(str(refusal.value).split("give ")[1].split()[0])
    found = choose_placement(shape, MACHINE, WORKLOAD, {"device": least, "ram": 0, "disk": None})
    assert found.forecast.peak_bytes["device"] <= least
    with pytest.raises(UserError, match="too small"):
        choose_placement(shape, MACHINE, WORKLOAD, {"device": least - 100, "ram": 0, "disk": None})


def test_what_is_spared_is_planned_for_nothing_and_counts_as_used() -> None:
    shape, budgets = toy_shape(), {"device": 800_000, "ram": 0, "disk": None}

    def choose(device: int, **more: Any) -> Any:
        return choose_placement(shape, MACHINE, WORKLOAD, {**budgets, "device": device}, **more)

    spared, less = choose(800_000, spared=lambda device: device // 8), choose(700_000)
    assert spared.placement == less.placement
    assert spared.forecast.tokens_per_second == less.forecast.tokens_per_second
    assert spared.forecast.peak_bytes["device"] == less.forecast.peak_bytes["device"] + 100_000 <= 800_000
    assert spared.more_memory[2.0] == choose(1_400_000).forecast.tokens_per_second
    with pytest.raises(UserError, match=r"of 80000 bytes.*give \d+ or more") as refusal:
        choose(80_000, spared=lambda device: min(device // 8, 50_000))
    least = int(str(refusal.value).split("give ")[1].split()[0])
    choose(least, spared=lambda device: min(device // 8, 50_000))
    with pytest.raises(UserError, match="too small"):
        choose(least - 100, spared=lambda device: min(device // 8, 50_000))


def test_shares_and_blocks_that_cannot_be_are_refused() -> None:
    for shares in ((0.5, 0.2, 0.2), (1.2, 0, -0.2)):
        with pytest.raises(UserError, match="1 together"):
            Shares(*shares)
    for batch, batches in ((0, 1), (1, 0)):
        with pytest.raises(UserError, match="1 batch of 1 prompt or more"):
            Placement(batch, batches, HERE, HERE, HERE)
    assert Placement(3, 4, HERE, HERE, HERE).block == 12
