"""Which blocks to write prompts in: this machine measured once, and the best placement for a budget."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from t2iprobe.errors import UserError
from t2iprobe.llm.commands import Engine, pack_model
from t2iprobe.llm.memory.cost import (
    Hardware,
    ModelShape,
    Workload,
    hardware_from_json,
    hardware_to_json,
    measure_hardware,
)
from t2iprobe.llm.memory.ledger import allocator_losses
from t2iprobe.llm.memory.packing import Packed, read_rest
from t2iprobe.llm.memory.placement import Choice, Forecast, Placement, choose_placement, realise
from t2iprobe.llm.models import (
    LanguageModel,
    LanguageModelFiles,
    cache_folder,
    find_language_model,
    load_without_layers,
    share_rest,
)
from t2iprobe.storage import write_atomically

if TYPE_CHECKING:
    from t2iprobe.llm.throughput import Block

__all__ = ["choose_block", "find_hardware", "plan_placement"]

# Of the memory that nobody else has, where no budget is given.
_PART = 0.75
_MEASURED = 3  # raised whenever what is measured changes


def plan_placement(
    model: str,
    *,
    memory: int | None = None,
    link: float | None = None,
    prompt_tokens: int = 64,
    new_tokens: int = 32,
    prompts: int | None = None,
    block: int | None = None,
    batch: int | None = None,
    bits: int | None = None,
    disk: Path | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    measure: bool = False,
) -> dict[str, Any]:
    """Return the best placement for throughput, as `llm plan` prints it.

    Args:
        model: smollm2, a folder or a hub id.
        memory: bytes for all that the device holds; None: three quarters of what is free.
        link: bytes a second of a simulated link to the weights.
        prompt_tokens: of each prompt.
        new_tokens: written behind each.
        prompts: how many there are; None: as many as a block has room for.
        block: batches that share each load of a layer; None: what is best.
        batch: prompts of a forward; None: what is best.
        bits: 4: weights and cache may be held in 4 bits.
        disk: a folder for caches that do not fit; the cache folder's without.
        dtype: of the computation.
        device: where.
        measure: measure the machine again, whatever is kept.

    Raises UserError for numbers below 1, and a budget in which nothing fits.
    """
    given = {"prompt tokens": prompt_tokens, "new tokens": new_tokens, "prompts": prompts, "block": block}
    for name, value in (given | {"batch": batch}).items():
        if value is not None and value < 1:
            raise UserError(f"{name}: give 1 or more, not {value}")
    files = find_language_model(model)
    packed = pack_model(files, dtype, device)
    whole = load_without_layers(files, read_rest(packed), dtype=dtype, device=device)
    disk = disk or cache_folder("blocks")
    shape, hardware = find_hardware(files, packed, whole, disk, fresh=measure)
    choice = choose_placement(
        shape,
        hardware if link is None else hardware.behind_link(link),
        Workload(prompts, prompt_tokens, new_tokens),
        find_budgets(memory, device, disk),
        bits=(None,) if bits is None else (None, bits),
        block=block,
        batch=batch,
        spared=allocator_losses,
    )
    return describe_choice(choice, packed, memory)


def choose_block(
    engine: Engine,
    block: "Block",
    lengths: Sequence[int],
    new_tokens: int,
    link: float | None = None,
    *,
    disk: Path | None = None,
    sampled: bool = False,
) -> tuple[Placement, Forecast]:
    """Return the best placement for prompts of these lengths, and its forecast.

    `engine` has no layers in memory. `block` says what is not chosen; with its bits, weights and cache are in
    4 bits both. Raises UserError for a budget in which nothing fits.
    """
    assert engine.packed is not None
    disk, model = disk or cache_folder("blocks"), engine.target.model
    shape, hardware = find_hardware(engine.files, engine.packed, model, disk)
    workload = Workload(
        len(lengths), max(1, round(sum(lengths) / len(lengths))), new_tokens, max(lengths), sampled
    )
    choice = choose_placement(
        shape,
        hardware if link is None else hardware.behind_link(link),
        workload,
        find_budgets(engine.memory, str(engine.target.device), disk),
        bits=(block.bits,),
        block=block.batches,
        batch=block.batch,
        spared=allocator_losses,
    )
    return choice.placement, choice.forecast


def find_budgets(memory: int | None, device: str, disk: Path) -> dict[str, int | None]:
    """Return the bytes of each tier: what was given, else what is free. On a CPU, RAM is the device."""
    free = int(_PART * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    on_cpu = torch.device(device).type == "cpu"
    if memory is None:
        memory = free if on_cpu else _free_on(device)
    there = next(folder for folder in (disk, *disk.parents) if folder.exists())
    return {"device": memory, "ram": 0 if on_cpu else free, "disk": shutil.disk_usage(there).free}


def _free_on(device: str) -> int | None:
    if torch.device(device).type != "cuda":
        return None
    return int(_PART * torch.cuda.mem_get_info(torch.device(device))[0])


def find_hardware(
    files: LanguageModelFiles, packed: Packed, model: LanguageModel, disk: Path, *, fresh: bool = False
) -> tuple[ModelShape, Hardware]:
    """Return the shape of a model, which was loaded without layers, and what this machine does with it.

    Measured once for this model, device, dtype, number of threads and folder, and kept in the cache folder;
    again where that is damaged or all should be `fresh`.
    """
    weight = model.get_input_embeddings().weight
    key = {
        "version": _MEASURED,
        "model": files.hash,
        "device": str(weight.device),
        "dtype": str(weight.dtype),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "disk": str(disk),
    }
    name = sha256(json.dumps(key).encode()).hexdigest()[:24]
    file, shape = cache_folder("hardware", f"{name}.json"), ModelShape.from_model(model, packed)
    if not fresh:
        try:
            return shape, hardware_from_json(file.read_text())
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            pass  # measured again
    hardware = measure_hardware(_share_rest(files, model), packed, disk)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, hardware_to_json(hardware).encode())
    return shape, hardware


def _share_rest(files: LanguageModelFiles, model: LanguageModel) -> LanguageModel:
    """Return another model without layers that has this one's embedding, norm and head."""
    weight = model.get_input_embeddings().weight
    dtype = str(weight.dtype).removeprefix("torch.")
    return load_without_layers(files, share_rest(model), dtype=dtype, device=str(weight.device))


def describe_choice(choice: Choice, packed: Packed, memory: int | None) -> dict[str, Any]:
    """Return what is told of a placement."""
    placement, forecast = choice.placement, choice.forecast
    realised = realise(placement, [file.nbytes for file in packed.layers])
    return {
        "placement": asdict(placement)
        | {
            "block": placement.block,
            "asked": {name: asdict(getattr(placement, name)) for name in realised.shares},
            "realised": {name: asdict(shares) for name, shares in realised.shares.items()},
        },
        "predicted_tokens_per_second": forecast.tokens_per_second,
        "predicted_seconds": {"prefill": forecast.prefill_seconds, "decode": forecast.decode_seconds},
        "predicted_peak_bytes": forecast.peak_bytes,
        "binding": choice.binding,
        "saved_by_a_tenth_more": {name: share for name, share in choice.saved.items() if share > 0},
        "more_memory": [
            {
                "factor": factor,
                "memory": None if memory is None else int(factor * memory),
                "predicted_tokens_per_second": rate,
            }
            for factor, rate in choice.more_memory.items()
        ],
    }
