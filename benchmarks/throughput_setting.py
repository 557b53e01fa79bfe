"""What contestants of benchmarks/throughput.py share, and the batches and placements they get."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from language_common import Text, compare_texts
from throughput_report import GRIDS

from t2iprobe.errors import UserError
from t2iprobe.llm.commands import Engine
from t2iprobe.llm.memory.cost import BUFFERS, Hardware, ModelShape, Workload, forecast
from t2iprobe.llm.memory.ledger import allocator_losses
from t2iprobe.llm.memory.packing import Packed
from t2iprobe.llm.memory.placement import Placement, Shares, choose_placement
from t2iprobe.llm.memory.sources import padded
from t2iprobe.llm.models import load_without_layers

HERE = Shares(1, 0, 0)
AWAY = Shares(0, 0, 1)


def name_block(batches: int, bits: int | None) -> str:
    """Return what the contestant with so many batches a block is called."""
    return f"ours, zig-zag, block of {batches}" + (f", {bits} bits" if bits else "")


@dataclass
class Bench:
    """What all turns share."""

    options: argparse.Namespace
    plain: Engine
    packed: Packed
    rest: Mapping[str, torch.Tensor]
    shape: ModelShape
    texts: Sequence[torch.Tensor]
    reference: Sequence[Text]
    budget: int

    @property
    def link(self) -> float:
        """Bytes a second."""
        return self.options.link * 1e9

    @property
    def folder(self) -> Path:
        """Where caches lie that memory has no room for."""
        return self.options.work / "blocks"

    def load(self) -> Any:
        """Return the model without its layers; the rest is shared."""
        dtype = str(self.plain.target.dtype).removeprefix("torch.")
        return load_without_layers(self.plain.files, self.rest, dtype=dtype)

    def workload(self, prompts: int, new_tokens: int) -> Workload:
        """Return what is to be written."""
        return Workload(prompts, self.options.prompt_tokens, new_tokens)

    def budgets(self) -> dict[str, int | None]:
        """Return the tiers' bytes: on a CPU, RAM is the device."""
        return {"device": self.budget, "ram": 0, "disk": None}

    def check(self, made: Sequence[Sequence[int]]) -> list[Any]:
        """Return where texts leave the model's own; the first `CHECKED` alone are known."""
        return [
            compare_texts(text, tokens, whole=False)
            for text, tokens in zip(self.reference, made, strict=False)
        ]


def largest_batch(bench: Bench, beside: int) -> int:
    """Return the largest batch whose cache lies in RAM, next to embedding, head and so many bytes."""
    shape, prompt = bench.shape, bench.options.prompt_tokens
    slots = prompt + bench.options.new_tokens - 1
    for batch in range(1, len(bench.texts) + 1):
        cache = batch * slots * shape.position_bytes() * shape.layers
        work = max(shape.work_bytes(batch, rows, seen) for rows, seen in ((prompt, prompt), (1, slots)))
        if shape.rest_bytes + beside + cache + work > bench.budget:
            if batch == 1:
                break
            return batch - 1
    else:
        return len(bench.texts)
    raise UserError(f"the budget of {bench.budget} bytes holds no text: give a larger --share")


def choose_sizes(bench: Bench, hardware: Hardware) -> dict[str, Any]:
    """Return the contestants' batches, and the placements of the zig-zag blocks."""
    largest_matrix = max(place.nbytes for layer in bench.packed.layers for place in layer.layout.values())
    layer = max(padded(file.nbytes) for file in bench.packed.layers)
    most = max(bench.options.blocks)
    batch = 1
    while (batch + 1) * most <= len(bench.texts) and plan_block(bench, hardware, batch + 1, most, None):
        batch += 1
    placements = {
        name_block(batches, bits): plan_block(bench, hardware, batch, batches, bits)
        for bits in (None, 4)
        for batches in bench.options.blocks
    }
    return {
        "theirs": largest_batch(bench, largest_matrix),
        "rows": largest_batch(bench, BUFFERS * layer + allocator_losses(bench.budget)),
        "batch": batch,
        "placements": {name: asdict(each) for name, each in placements.items() if each is not None},
    }


def plan_block(
    bench: Bench, hardware: Hardware, batch: int, batches: int, bits: int | None
) -> Placement | None:
    """Return the best placement of a block, None where none fits."""
    try:
        choice = choose_placement(
            bench.shape, hardware, bench.workload(batch * batches, bench.options.new_tokens),
            bench.budgets(), bits=(bits,), block=batches, batch=batch, spared=allocator_losses,
        )  # fmt: skip
    except UserError:
        return None
    return choice.placement


def choose_policies(bench: Bench, hardware: Hardware) -> dict[str, Any]:
    """Return, for each of GRIDS, the planner's placement and those by hand, as name → placement."""
    workload = bench.workload(bench.options.prompts_planned, bench.options.policy_tokens)
    found = {}
    for grid, bits in GRIDS.items():
        choice = choose_placement(
            bench.shape, hardware, workload, bench.budgets(), bits=bits, spared=allocator_losses
        )
        hand: dict[str, Placement] = {}
        for batch, batches in product(bench.options.grid_batches, bench.options.grid_blocks):
            if batch * batches <= bench.options.prompts_planned:
                for style, placement in place_by_hand(bench, hardware, batch, batches, bits[-1]):
                    if placement not in hand.values():
                        hand[f"{batches} × {batch}, {style}"] = placement
        found[grid] = {
            "chosen": asdict(choice.placement),
            "hand": {name: asdict(each) for name, each in hand.items()},
        }
    return found


def place_by_hand(
    bench: Bench, hardware: Hardware, batch: int, batches: int, bits: int | None
) -> Iterator[tuple[str, Placement]]:
    """Yield what a person would try: weights in memory first, or the cache first, as far as they fit."""
    workload, limit = bench.workload(batch * batches, bench.options.policy_tokens), bench.budget
    limit -= allocator_losses(bench.budget)
    layers = bench.shape.layers

    def fits(placement: Placement) -> bool:
        return forecast(bench.shape, hardware, workload, placement).peak_bytes["device"] <= limit

    for style in ("weights first", "cache first"):
        for hidden in (HERE, AWAY):
            bare = Placement(batch, batches, AWAY, AWAY, hidden, weight_bits=bits)
            parts = [Shares(part / layers, 0, 1 - part / layers) for part in range(layers, -1, -1)]
            if style == "weights first":
                tried = (replace(bare, weights=part) for part in parts)
            else:
                tried = (replace(bare, cache=part) for part in parts)
            if (placement := next(filter(fits, tried), None)) is not None:
                yield style, placement
                break


def read_placement(told: Mapping[str, Any]) -> Placement:
    """Return a placement from what JSON made of it."""
    shares = {name: Shares(**told[name]) for name in ("weights", "cache", "hidden")}
    return Placement(**{**told, **shares})
