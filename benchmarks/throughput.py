"""Tokens a second of many prompts under a RAM budget of a third of the weights: ours and accelerate's.

    python benchmarks/throughput.py [--work DIR] [--json FILE] [--share 0.3333] [--link 0.5] [--turns 3]

Everybody reads the weights, in float32, through the same simulated link of so many GB/s, and has the same
budget for all that is in memory: weights, caches, hidden states, logits. accelerate's `disk_offload` and
our own row by row keep the cache in RAM and get the largest batch that fits, counted for accelerate without
what its allocator loses and with one matrix in memory at a time. The zig-zag blocks lie where the planner has
them, in batches of the largest size at which the largest block fits. Each contestant writes as many texts as
it takes at once; all prompts and texts have the same length.

The contestants take turns. A turn begins with the machine measured as `llm plan --measure` does, so that what
is predicted and what is measured are of the same minute. Then the placement that the planner chooses for 256
prompts takes its turn with a grid of placements by hand, one block each. Killed, the same command continues.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from language_common import (
    PROMPTS,
    Kept,
    Text,
    check_identity,
    decode,
    run_command,
    save_weightless,
    tell,
)
from offload import WHOLE, Clock, SlowWeights, offload
from throughput_report import THEIRS, compare, judge, table
from throughput_setting import Bench, choose_policies, choose_sizes, read_placement

from t2iprobe.errors import UserError
from t2iprobe.llm.commands import Engine, load_engine, pack_model, read_prompts
from t2iprobe.llm.engine.decoder import Decoder
from t2iprobe.llm.engine.generation import Generated, Trees, generate
from t2iprobe.llm.memory.cost import (
    BUFFERS,
    Hardware,
    ModelShape,
    count_costs,
    forecast,
    hardware_from_json,
    hardware_to_json,
    measure_hardware,
)
from t2iprobe.llm.memory.ledger import Ledger, allocator_losses
from t2iprobe.llm.memory.packing import read_rest
from t2iprobe.llm.memory.placement import Placement
from t2iprobe.llm.memory.schedule import open_source, open_store, realise_weights, write_batches
from t2iprobe.llm.memory.sources import Link
from t2iprobe.llm.memory.store import WeightStore
from t2iprobe.llm.models import DEFAULT_MODEL, load_language_model
from t2iprobe.machine import list_versions
from t2iprobe.storage import hash_files, write_atomically

ROWS = "ours, row by row"
CHECKED = 8  # texts of each contestant that are compared with the model's own


# -- turns ---------------------------------------------------------------------------------------------


def time_accelerate(bench: Bench, model: Any, weights: SlowWeights, batch: int) -> dict[str, Any]:
    """Let Transformers' `generate` write a batch with weights that accelerate loads."""
    clock, new = Clock(lambda: weights.bytes_read), bench.options.new_tokens
    before = weights.bytes_read
    made = decode(model, torch.stack(list(bench.texts[:batch])), new, (), streamer=clock)
    seconds = clock.marks[-1][0] - clock.marks[0][0]
    return {
        "texts": batch,
        "tokens": batch * new,
        "seconds": seconds,
        "prompt_seconds": clock.marks[1][0] - clock.marks[0][0],
        "bytes": weights.bytes_read - before,
        "differs": bench.check(made.sequences[:, len(bench.texts[0]) :].tolist()),
    }


def time_rows(bench: Bench, batch: int) -> dict[str, Any]:
    """Let our engine write a batch as `llm generate --memory --batch` does: its layers streamed, no tree."""
    new, marks = bench.options.new_tokens, []
    with WeightStore(open_source(bench.packed, None, bench.link), (), BUFFERS) as store:
        began = time.perf_counter()
        made = generate(
            Decoder(bench.load(), store), None, bench.texts[:batch], trees=Trees("none"), max_new_tokens=new,
            on_tokens=lambda *_: marks.append(time.perf_counter()),
        )  # fmt: skip
        nbytes = store.counters.bytes_used
    return {
        "texts": batch,
        "tokens": sum(len(each.token_ids) for each in made),
        "seconds": marks[-1] - began,
        "prompt_seconds": marks[0] - began,
        "bytes": nbytes,
        "differs": bench.check([each.token_ids for each in made]),
    }


def time_block(bench: Bench, placement: Placement, new_tokens: int) -> dict[str, Any]:
    """Write one block where the placement has it, within the budget."""
    texts, made = bench.texts[: placement.block], list[Generated]()
    ledger = Ledger({"device": bench.budget})
    ledger.take("device", "the allocator's losses", allocator_losses(bench.budget))
    ledger.take("device", "embedding, last norm and head", bench.packed.rest.nbytes)
    model = bench.load()
    source = open_source(bench.packed, placement.weight_bits, bench.link)
    realised = realise_weights(placement, source)
    with open_store(placement, source, "cpu", ledger) as store:
        began = time.perf_counter()  # what stays is read once for all blocks
        report = write_batches(
            model, store, placement, texts, max_new_tokens=new_tokens, ledger=ledger, disk=bench.folder,
            realised=realised, on_results=lambda found: made.extend(each for _, each in found),
        )  # fmt: skip
        seconds, nbytes = time.perf_counter() - began, store.counters.bytes_used
        streamed = sum(store.source.traffic(layer) for layer in range(store.layers))
        stays = sum(store.source.traffic(layer) for layer in store.resident)
    return {
        "texts": len(texts),
        "tokens": report.tokens,
        "seconds": seconds,
        "prompt_seconds": report.prompt_seconds,
        "bytes": nbytes,
        "streamed_bytes": streamed - stays,  # of a pass
        "passes": report.passes,
        "peak_bytes": ledger.peak["device"],
        "differs": None if placement.weight_bits or placement.cache_bits else bench.check(
            [each.token_ids for each in made]
        ),
    }  # fmt: skip


# -- running it ----------------------------------------------------------------------------------------


def measure(bench: Bench) -> Hardware:
    """Measure the machine as it is now, its weights behind the link."""
    repeats = 1 if bench.options.quick else 3
    return measure_hardware(bench.load(), bench.packed, bench.folder, repeats=repeats)


def bound(
    bench: Bench, hardware: Hardware, batches: Sequence[int], nbytes: float, new_tokens: int
) -> dict[str, Any]:
    """Return the tokens a second that no engine exceeds that reads so many bytes a pass.

    Each pass takes as long as its bytes on the link, or as its computation where all is in RAM, as measured,
    whichever is longer.
    """
    costs = count_costs(bench.shape, hardware, bench.workload(sum(batches), new_tokens), batches)
    compute = {name: phase.seconds["compute"][0] for name, phase in costs.phases.items()}
    link = nbytes / bench.link
    passes = {name: phase.passes for name, phase in costs.phases.items()}
    seconds = sum(passes[name] * max(link, compute[name]) for name in passes)
    return {
        "limit": sum(batches) * new_tokens / seconds,
        "bound_by": "link" if link > compute["decode"] else "compute",
    }


def run_turns(bench: Bench, kept: Kept) -> None:
    """Measure what is not known yet, turn by turn."""
    options = bench.options
    offloaded: dict[str, tuple[Any, SlowWeights]] = {}
    for turn in range(options.turns):
        if f"{turn}/hardware" not in kept:
            tell(f"the machine, turn {turn + 1} of {options.turns}")
            kept.put(f"{turn}/hardware", hardware_to_json(measure(bench)))
        hardware = hardware_from_json(kept[f"{turn}/hardware"]).behind_link(bench.link)
        for part, choose in (("sizes", choose_sizes), ("policies", choose_policies)):
            if part not in kept:
                kept.put(part, choose(bench, hardware))
        contestants = enter(bench, kept, hardware, offloaded)
        names = list(contestants)
        begin = turn % len(names)
        for name in names[begin:] + names[:begin]:  # nobody always comes after the same
            if f"{turn}/{name}" not in kept:
                tell(f"{name}, turn {turn + 1} of {options.turns}")
                kept.put(f"{turn}/{name}", contestants[name]())


def enter(
    bench: Bench, kept: Kept, hardware: Hardware, offloaded: dict[str, tuple[Any, SlowWeights]]
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the contestants of a turn, and the policies."""
    sizes, options = kept["sizes"], bench.options
    found: dict[str, Callable[[], dict[str, Any]]] = {}

    def limited(result: dict[str, Any], batches: Sequence[int], nbytes: float, new: int) -> dict[str, Any]:
        return result | bound(bench, hardware, batches, nbytes, new)

    def accelerate(name: str) -> dict[str, Any]:
        if name not in offloaded:
            model = load_language_model(bench.plain.files, dtype=options.dtype)
            offloaded[name] = model, offload(model, options.work / "accelerate", name == WHOLE)
        model, weights = offloaded[name]
        weights.link = weights.link or Link(bench.link)
        made = time_accelerate(bench, model, weights, sizes["theirs"])
        return limited(made, [sizes["theirs"]], made["bytes"] / options.new_tokens, options.new_tokens)

    def rows() -> dict[str, Any]:
        made = time_rows(bench, sizes["rows"])
        return limited(made, [sizes["rows"]], made["bytes"] / options.new_tokens, options.new_tokens)

    def block(where: Mapping[str, Any], new: int) -> dict[str, Any]:
        placement = read_placement(where)
        made = time_block(bench, placement, new)
        told = forecast(bench.shape, hardware, bench.workload(placement.block, new), placement)
        made["predicted"] = told.tokens_per_second
        return limited(made, [placement.batch] * placement.batches, made["streamed_bytes"], new)

    for name in THEIRS:
        found[name] = partial(accelerate, name)
    found[ROWS] = rows
    for name, told in sizes["placements"].items():
        found[name] = partial(block, told, options.new_tokens)
    for grid, policies in kept["policies"].items():
        found[f"{grid}: chosen"] = partial(block, policies["chosen"], options.policy_tokens)
        for name, told in policies["hand"].items():
            found[f"{grid}: {name}"] = partial(block, told, options.policy_tokens)
    return found


def measure_memory(bench: Bench) -> dict[str, Any]:
    """Return what the command's process grows by under the budget, with and without 4 bits.

    That is its greatest resident memory, as the system counts it, less that of the same command with a model
    of next to no weights.
    """
    options, out = bench.options, bench.options.work / "memory.jsonl"
    words = ["llm", "generate", "--throughput", "--json", "--device", "cpu"]
    words += ["--prompts", str(options.prompts)]
    words += ["--max-new-tokens", str(options.policy_tokens), "--memory", str(bench.budget)]
    words += ["--link", str(round(bench.link)), "--dtype", options.dtype, "--out", str(out)]
    small = save_weightless(options.model, options.work / "weightless")
    kept = Kept(options.work / "memory.json")
    for name, model, more in (
        ("weightless", str(small), ()),
        ("float32", options.model, ()),
        ("4 bits", options.model, ("--bits", "4")),
    ):
        if name in kept:
            continue
        tell(f"the memory of the command, {name}")
        out.unlink(missing_ok=True)
        made = run_command([*words, "--model", model, *more])
        if made["status"]:
            raise UserError(f"the command failed: {made['error'][-1000:]}")
        told = json.loads(made["output"])
        taken = {"peak_bytes": made["peak_bytes"], "ledger_bytes": told["peak_bytes"]["device"]}
        kept.put(name, taken | {"placement": told["placement"]})
    base = kept["weightless"]["peak_bytes"]
    return {
        name: each | {"grown_bytes": each["peak_bytes"] - base}
        for name, each in kept.items()
        if name != "weightless"
    }


def cut_texts(engine: Engine, path: Path, size: int, count: int) -> list[torch.Tensor]:
    """Return prompts of `size` tokens each, int64: the file's own texts, one behind the other, cut."""
    rows = read_prompts(path)
    texts = [row.get("prompt") or row["messages"][-1]["content"] for row in rows]
    stream = [token for text in texts for token in engine.tokenizer(text).input_ids]
    stream *= 1 + size * count // len(stream)
    return list(torch.tensor(stream[: size * count]).view(count, size))


def make_bench(options: argparse.Namespace, plain: Engine) -> Bench:
    """Prepare what all turns share."""
    packed = pack_model(plain.files, options.dtype)
    shape = ModelShape.from_model(plain.target.model, packed)
    count = max(options.prompts_planned, max(options.blocks) * options.most_batch)
    texts = cut_texts(plain, options.prompts, options.prompt_tokens, count)
    reference = write_plainly(plain, texts[:CHECKED], options.new_tokens, Kept(options.work / "texts.json"))
    weights = packed.rest.nbytes + sum(file.nbytes for file in packed.layers)
    budget = round(options.share * weights)
    return Bench(options, plain, packed, read_rest(packed), shape, texts, reference, budget)


def write_plainly(engine: Engine, texts: Sequence[torch.Tensor], new: int, kept: Kept) -> list[Text]:
    """Return what Transformers' own greedy decoding writes behind each prompt, all weights in RAM."""
    for number, text in enumerate(texts):
        if str(number) not in kept:
            made = decode(engine.target.model, text, new, (), output_logits=True)
            best = [logits[0].double().topk(2).values for logits in made.logits]
            gaps = [float(first - second) for first, second in best]
            tokens = made.sequences[0, len(text) :].tolist()
            kept.put(str(number), asdict(Text("", number, text.tolist(), tokens, gaps)))
    return [Text(**kept[str(number)]) for number in range(len(texts))]


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what is not known yet, and compare."""
    with load_engine(options.model, "none", dtype=options.dtype) as plain:
        identity = {
            "model": plain.files.hash,
            "prompts": hash_files({"prompts": options.prompts}),
            "threads": torch.get_num_threads(),
            "settings": [
                options.dtype, options.share, options.link, options.prompt_tokens, options.new_tokens,
                options.policy_tokens, options.blocks, options.prompts_planned,
            ],
        }  # fmt: skip
        check_identity(options.work, identity)
        kept = Kept(options.work / "turns.json")
        bench = make_bench(options, plain)
        if options.part in ("all", "turns"):
            run_turns(bench, kept)
        memory = measure_memory(bench) if options.part in ("all", "memory") else {}
        found = compare(kept | {"memory": memory}, bench.budget)
        nbytes = [sum(file.nbytes for file in bench.packed.layers), bench.packed.rest.nbytes]
        return found | {
            "verdicts": judge(found),
            "versions": list_versions(),
            "notes": [
                f"{options.model}, {bench.plain.target.dtype}, {torch.get_num_threads()} threads: "
                f"{nbytes[0] / 1e6:.0f} MB of layers behind a simulated link of {options.link:g} GB/s, "
                f"{nbytes[1] / 1e6:.0f} MB beside them. Budget {bench.budget / 1e6:.0f} MB for everything. "
                f"Prompts of {options.prompt_tokens} tokens, texts of {options.new_tokens} (policies: "
                f"{options.policy_tokens}). {found['turns']} turns, medians; intervals over turns. The "
                "limit: each pass takes as long as its bytes on the link, or its computation with all in "
                "RAM, whichever is longer."
            ],
        }


def _numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what was asked for and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/throughput_benchmark"))
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="JSONL, cut into pieces of one length")
    parser.add_argument("--share", type=float, default=1 / 3, help="budget, of the weights' bytes")
    parser.add_argument("--link", type=float, default=0.5, help="GB/s of the simulated link")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32, help="of each text")
    parser.add_argument("--policy-tokens", type=int, default=8, help="of each text, to compare policies")
    parser.add_argument("--blocks", type=_numbers, default=[1, 2, 4, 8], help="batches of a block")
    parser.add_argument("--prompts-planned", type=int, default=256, help="that policies are chosen for")
    parser.add_argument("--grid-batches", type=_numbers, default=[8, 16], help="of the placements by hand")
    parser.add_argument("--grid-blocks", type=_numbers, default=[1, 8, 16])
    parser.add_argument("--most-batch", type=int, default=32, help="prompts of a forward at most")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--part", choices=("all", "turns", "memory", "table"), default="all")
    parser.add_argument("--quick", action="store_true", help="little of everything, to see that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.turns, options.new_tokens, options.policy_tokens = 2, 4, 3
        options.blocks, options.prompts_planned, options.most_batch = [1, 2], 8, 4
        options.grid_batches, options.grid_blocks = [1, 2], [1, 2]
    found = benchmark(options)
    if options.json:
        write_atomically(options.json, json.dumps(found, indent=1, default=float).encode())
    print(table(found))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"throughput.py: {error}", file=sys.stderr)
        sys.exit(2)
