"""Seconds and bytes a token when weights come from slow memory, against its bandwidth: ours and accelerate's.

    python benchmarks/offload.py [--work DIR] [--json FILE] [--levels disk,0.1,0.25,0.5,1,2,4]

`disk` is the real disk, read around the page cache by us, and with dropped pages by accelerate. A number is a
link of that many GB/s, simulated: one token bucket, through which everybody reads files that lie in RAM (the
page cache). Only decoder layers cross it, in float32; embedding and head stay, in all rows but "whole model",
which is what `accelerate.disk_offload` does to a model as it is.

A turn is a prompt: its first pass reads it (prefill, told apart), the next ones are timed. The contestants
take turns prompt by prompt, and write the same greedy text. What a pass with a tree yields does not depend on
the level: it is counted over more prompts and whole texts, replayed as in speculation.py. Sizes are chosen,
and seconds predicted, from passes that were timed at the same level and from an acceptance vector of other
prompts. Killed, the same command continues.

llama.cpp takes its turns where its package is installed (pip install xllamacpp): the packaged model as it is
stored, in 4 bits, wholly in RAM. It has no budget for weights and cannot read them through the link: its file
is mapped, and what stays of it is the kernel's choice. So it is not asked to.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_align_device_hook
from accelerate.utils.offload import OffloadedWeightsLoader, offload_state_dict
from language_common import (
    OTHER_TASKS,
    PROMPTS,
    Kept,
    Text,
    acceptance_vector,
    check_identity,
    choose_rows,
    compare_texts,
    decode,
    identify_draft,
    is_recorded,
    judge_least,
    judge_texts,
    list_verdicts,
    record_guesses,
    show,
    tell,
    write_texts_plainly,
)
from llama_yardstick import Llama, find_packaged_file, is_installed
from speculation import KnownDraft, KnownTarget
from transformers.generation.streamers import BaseStreamer

from t2iprobe.errors import UserError
from t2iprobe.intervals import RESAMPLES, interval
from t2iprobe.llm.commands import Engine, load_engine, pack_model
from t2iprobe.llm.engine.decoder import Decoder
from t2iprobe.llm.engine.drafts import ModelDraft
from t2iprobe.llm.engine.generation import Trees, generate
from t2iprobe.llm.engine.sizing import Acceptance, MeasuredSizer, PassTimes, measure_passes
from t2iprobe.llm.memory.packing import Packed, read_rest
from t2iprobe.llm.memory.sources import Capped, DiskSource, Link, Source, empty_buffer
from t2iprobe.llm.memory.store import WeightStore
from t2iprobe.llm.models import DEFAULT_MODEL, decoder_layers, load_language_model, load_without_layers
from t2iprobe.machine import list_versions
from t2iprobe.storage import hash_files, write_atomically

LEVELS = "disk,0.1,0.25,0.5,1,2,4"
SIZES = (1, 9, 17, 33, 65, 129)  # tokens in the passes that are timed for the sizes' choice
BUDGETS = (8, 16, 32, 64, 128)
CHECKED = ((8, 4), (64, 8))  # budget and depth of trees that are predicted and measured beside the choice
JUDGED = 64
SLOW = 0.25e9  # at this many bytes a second and below a tree must pay
MOST = 256  # tokens, more than any turn makes
PLAIN, ACCELERATE, WHOLE = "plain, in RAM", "accelerate", "accelerate, whole model"
UNREAD, READ, TREE = "ours, no prefetch", "ours, prefetch", f"ours, prefetch, tree of {JUDGED}"
JUDGED_TREES = Trees("best-first", JUDGED)
LLAMA = "llama.cpp, 4 bits in RAM"


# -- accelerate behind a link --------------------------------------------------------------------------


class SlowWeights(Mapping[str, torch.Tensor]):
    """accelerate's offloaded weights, counted, and read through a link or from the disk itself."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._loader = folder, OffloadedWeightsLoader(save_folder=str(folder))
        self.link: Link | None = None
        self.drops_pages = False
        self.bytes_read = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        began = time.perf_counter()
        tensor = self._loader[name]
        self.bytes_read += tensor.nbytes
        if self.drops_pages:
            drop_pages(self._folder / f"{name}.dat")
        if self.link is not None:
            self.link.wait(tensor.nbytes, began)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._loader)

    def __len__(self) -> int:
        return len(self._loader)


def drop_pages(path: Path) -> None:
    """Make the next read of a file come from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def offload(model: Any, folder: Path, whole: bool) -> SlowWeights:
    """Do what `accelerate.disk_offload` does, with weights that go through a link; return these.

    Not `whole`: only to the decoder layers.
    """
    if not (folder / "index.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        offload_state_dict(folder, model.state_dict())
        os.sync()  # pages that are not written yet are not dropped
    weights = SlowWeights(folder)
    layers = decoder_layers(model)
    name = next(name for name, module in model.named_modules() if module is layers)
    if whole:
        add_hook_to_module(model, AlignDevicesHook(io_same_device=True), append=True)
    attach_align_device_hook(
        model if whole else layers,
        execution_device=torch.device("cpu"),
        offload=True,
        weights_map=weights,
        module_name="" if whole else name,
    )
    return weights


# -- turns ---------------------------------------------------------------------------------------------


class Clock(BaseStreamer):
    """Notes when tokens come, and how many bytes had been read by then."""

    def __init__(self, read: Callable[[], int]) -> None:
        self._read = read
        self.marks: list[tuple[float, int]] = []

    def put(self, value: Any) -> None:
        """Note the moment; the first is that before the prompt is read."""
        self.marks.append((time.perf_counter(), self._read()))

    def end(self) -> None:
        """Nothing to do."""

    def passes(self) -> dict[str, Any]:
        """Return the seconds of the first pass, and seconds and bytes of the others."""
        steps = np.diff(np.array(self.marks), axis=0)
        return {
            "prefill": float(steps[0, 0]),
            "seconds": steps[1:, 0].tolist(),
            "bytes": steps[1:, 1].tolist(),
        }


class _EnoughError(Exception):
    """A turn is over."""


def time_transformers(model: Any, read: Callable[[], int], text: Text, passes: int) -> dict[str, Any]:
    """Let Transformers' `generate` have a turn of so many timed passes."""
    clock = Clock(read)
    made = decode(model, text.begin, passes + 1, (), streamer=clock)
    tokens = made.sequences[0, len(text.prompt) :].tolist()
    return clock.passes() | {"tokens": [1] * passes, "differs": compare_texts(text, tokens, whole=False)}


def time_engine(
    target: Decoder, draft: Any, trees: Trees, read: Callable[[], int], text: Text, passes: int
) -> dict[str, Any]:
    """Let the engine have a turn of so many timed rounds."""
    clock, rounds = Clock(read), []

    def note(_: int, tokens: list[int]) -> None:
        clock.put(None)
        rounds.append(tokens)
        if len(rounds) > passes:
            raise _EnoughError

    clock.put(None)
    with suppress(_EnoughError):
        generate(target, draft, [text.begin], trees=trees, max_new_tokens=MOST, on_tokens=note)
    made = [token for tokens in rounds for token in tokens]
    return clock.passes() | {
        "tokens": [len(tokens) for tokens in rounds[1:]],
        "differs": compare_texts(text, made, whole=False),
    }


def time_llama(llama: Llama, text: Text, passes: int) -> dict[str, Any]:
    """Let llama.cpp have a turn. Its text is another one: it computes with other numbers."""
    found = llama.take_turn(text.prompt, passes)
    return found | {"bytes": [0] * passes, "tokens": [1] * passes, "differs": None}


Turn = Callable[[Text, int], dict[str, Any]]


# -- levels --------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """What all levels share."""

    plain: Engine
    packed: Packed
    rest: Mapping[str, torch.Tensor]
    offloaded: Mapping[str, tuple[Any, SlowWeights]]
    texts: Sequence[Text]
    counted: Sequence[Text]
    acceptance: Sequence[float]
    disk_rate: float
    llama: Llama | None

    def rate(self, level: str) -> float:
        """Bytes a second of a level."""
        return self.disk_rate if level == "disk" else float(level) * 1e9

    def open_source(self, level: str) -> Source:
        """Return the packed model's layers as that level has them."""
        if level == "disk":
            return DiskSource(self.packed)
        return Capped(DiskSource(self.packed, direct=False), self.rate(level))

    def open_target(self, level: str, prefetch: bool, stack: ExitStack) -> tuple[Decoder, WeightStore]:
        """Return a target whose layers come from there."""
        store = stack.enter_context(WeightStore(self.open_source(level), (), prefetch=prefetch))
        dtype = str(self.plain.target.dtype).removeprefix("torch.")
        return Decoder(load_without_layers(self.plain.files, self.rest, dtype=dtype), store), store


def run_level(bench: Bench, level: str, kept: Kept, yields: Kept, options: argparse.Namespace) -> None:
    """Measure a level: what passes take, what they yield, then turns of all contestants."""
    with ExitStack() as stack:
        streamed, store = bench.open_target(level, True, stack)
        if "passes" not in kept:
            tell(f"{level}: passes of the target and of the draft")
            kept.put("passes", time_passes(bench, streamed, options.repeats))
        if "sizes" not in kept:
            kept.put("sizes", predict(bench, kept["passes"]))
        named = {name_size(size): shape_trees(bench, size) for size in kept["sizes"]}
        for name, trees in ({TREE: JUDGED_TREES} | named).items():
            if name not in yields:
                tell(f"tokens a pass: {name}")
                yields.put(name, count_tokens(bench, trees))
        contestants = enter(bench, level, streamed, store, kept["sizes"], stack)
        names = list(contestants)
        for turn in range(options.turns):
            text = bench.texts[turn % len(bench.texts)]
            begin = turn % len(names)
            for name in names[begin:] + names[:begin]:  # nobody always comes after the same
                if f"{turn}/{name}" not in kept:
                    tell(f"{level}: {name}, turn {turn + 1} of {options.turns}")
                    kept.put(f"{turn}/{name}", contestants[name](text, options.passes))


def time_passes(bench: Bench, streamed: Decoder, repeats: int) -> dict[str, Any]:
    """Return the seconds of passes: of the target here and in RAM, and of the draft; as [[size, seconds]].

    All of them at each level, since a machine is not the same all day.
    """
    decoders = {"target": streamed, "ram": bench.plain.target}
    found = {name: measure_passes(each, SIZES, repeats=repeats) for name, each in decoders.items()}
    found["draft"] = {1: 0.0, max(SIZES): 0.0}
    if isinstance(bench.plain.draft, ModelDraft):
        found["draft"] = measure_passes(bench.plain.draft.decoder, SIZES, repeats=repeats)
    return {name: list(seconds.items()) for name, seconds in found.items()}


def predict(bench: Bench, passes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the chosen size and those that are checked beside it, with what is predicted of them."""
    sizer = MeasuredSizer(PassTimes(dict(passes["target"]), dict(passes["draft"])), BUDGETS)
    best, table = sizer.table(Acceptance(bench.acceptance, weight=1e6))
    sizes = [best, *(size for size in table if (size.budget, size.depth) in CHECKED and size is not best)]
    return [asdict(size) for size in sizes]


def name_size(size: Mapping[str, Any]) -> str:
    """Return what the contestant with a tree of that size is called."""
    return f"ours, prefetch, optimal {size['budget']}, depth {size['depth']}"


def shape_trees(bench: Bench, size: Mapping[str, Any]) -> Trees:
    """Return how trees of that size grow."""
    growth = "optimal" if size["budget"] else "none"
    return Trees(growth, size["budget"], size["depth"], acceptance=bench.acceptance)


def count_tokens(bench: Bench, trees: Trees) -> list[list[int]]:
    """Return the tokens and the passes of each counted text: of all passes but the first, which reads the
    prompt, and the last, which the text's end cuts. The passes are replayed over the known text.
    """
    found = []
    for text in bench.counted:
        target: Any = KnownTarget(bench.plain.target, text)
        draft: Any = bench.plain.draft
        if trees.growth == "optimal" and is_recorded(draft):
            draft = KnownDraft(record_guesses(draft, text), text, target.vocabulary)
        (made,) = generate(target, draft, [text.begin], trees=trees, max_new_tokens=len(text.tokens))
        if made.token_ids != text.tokens:
            raise RuntimeError("a replayed text is not the known one")
        rounds = made.rounds[1:-1]
        found.append([sum(rounds), len(rounds)])
    return found


def enter(
    bench: Bench,
    level: str,
    streamed: Decoder,
    store: WeightStore,
    sizes: Sequence[Mapping[str, Any]],
    stack: ExitStack,
) -> dict[str, Turn]:
    """Return the contestants of a level."""
    for _, weights in bench.offloaded.values():
        weights.link = None if level == "disk" else Link(bench.rate(level))
        weights.drops_pages = level == "disk"
    unread, unread_store = bench.open_target(level, False, stack)
    draft, alone = bench.plain.draft, Trees("none")

    def read() -> int:
        return store.counters.bytes_used

    found: dict[str, Turn] = {PLAIN: partial(time_transformers, bench.plain.target.model, int)}
    if bench.llama is not None:
        found[LLAMA] = partial(time_llama, bench.llama)
    for name, (model, weights) in bench.offloaded.items():
        found[name] = partial(time_transformers, model, lambda weights=weights: weights.bytes_read)
    found[UNREAD] = partial(time_engine, unread, None, alone, lambda: unread_store.counters.bytes_used)
    found[READ] = partial(time_engine, streamed, None, alone, read)
    found[TREE] = partial(time_engine, streamed, draft, JUDGED_TREES, read)
    for size in sizes:
        found[name_size(size)] = partial(time_engine, streamed, draft, shape_trees(bench, size), read)
    return found


def measure_disk(packed: Packed) -> tuple[float, str]:
    """Return the bytes a second at which the disk gives the layers, and how it is read."""
    source = DiskSource(packed)
    sizes = [source.nbytes(layer) for layer in range(source.layers)]
    buffer = empty_buffer(max(sizes))
    seconds = 0.0
    for _ in range(2):  # the first one computes checksums
        began = time.perf_counter()
        for layer in range(source.layers):
            for _ in source.read(layer, buffer):
                pass
        seconds = time.perf_counter() - began
    return sum(sizes) / seconds, "O_DIRECT" if source.direct else "pages dropped after use"


def compare_llama(llama: Llama, texts: Sequence[Text]) -> list[list[int]]:
    """Return of each text how many of its first tokens llama.cpp writes, too; how many it writes behind those
    of ours before them; and how many there are.
    """
    found = []
    for text in texts:
        left = compare_texts(text, llama.write(text.prompt, len(text.tokens)))
        agreed = sum(
            llama.write([*text.prompt, *text.tokens[:place]], 1) == [token]
            for place, token in enumerate(text.tokens)
        )
        found.append([len(text.tokens) if left is None else left["at"], agreed, len(text.tokens)])
    return found


# -- what came of it -----------------------------------------------------------------------------------


@dataclass
class Timed:
    """A contestant's timed passes at a level, and tokens and passes of each prompt on which it was counted
    what a pass yields: [passes] and [prompts, 2]."""

    seconds: np.ndarray
    nbytes: np.ndarray
    yields: np.ndarray
    prefill: float

    @classmethod
    def collect(cls, kept: Mapping[str, Any], name: str, yields: Mapping[str, Any]) -> Timed | None:
        """Gather the turns of that name; None where there are none. Without a tree a pass yields 1 token."""
        turns = [turn for key, turn in kept.items() if key.partition("/")[2] == name]
        if not turns:
            return None
        columns = [np.concatenate([turn[key] for turn in turns]) for key in ("seconds", "bytes")]
        prefill = float(np.median([turn["prefill"] for turn in turns]))
        return cls(*columns, yields=np.array(yields.get(name, [[1, 1]])), prefill=prefill)

    def resample(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the median seconds of a pass and its mean tokens: as found, then of RESAMPLES resamples."""
        tokens, passes = self.yields[_draw_rows(len(self.yields))].sum(1).T
        return np.median(self.seconds[_draw_rows(len(self.seconds))], axis=1), tokens / passes

    def token_seconds(self) -> np.ndarray:
        """Return the seconds a token: as found, then of resamples."""
        seconds, tokens = self.resample()
        return seconds / tokens


def _draw_rows(count: int) -> np.ndarray:
    """Return all rows, then RESAMPLES draws of as many: int64 [1 + RESAMPLES, count]."""
    drawn = np.random.default_rng(count).integers(count, size=(RESAMPLES, count))
    return np.vstack([np.arange(count), drawn])


def describe(values: np.ndarray) -> dict[str, Any]:
    """Return the first value, with the interval of the others."""
    return {"value": float(values[0]), "interval": list(interval(values[1:]))}


def compare_level(
    kept: Mapping[str, Any], yields: Mapping[str, Any], level: str, rate: float
) -> dict[str, Any]:
    """Return what came of a level: a row a contestant, and the predictions."""
    ram = dict(kept["passes"]["ram"])
    names = dict.fromkeys(key.partition("/")[2] for key in kept if "/" in key)
    timed = {name: found for name in names if (found := Timed.collect(kept, name, yields)) is not None}
    rows: dict[str, Any] = {}
    for name, found in timed.items():
        seconds, tokens = found.resample()
        nbytes = float(np.mean(found.nbytes))
        computing = compute_seconds(name, ram)
        rows[name] = {
            "seconds_a_token": describe(seconds / tokens),
            "seconds_a_pass": float(seconds[0]),
            "tokens_a_pass": float(tokens[0]),
            "tokens_a_pass_interval": list(interval(tokens[1:])),
            "bytes_a_token": nbytes / float(tokens[0]),
            "prefill_seconds": found.prefill,
            "passes": len(found.seconds),
        }
        if name == LLAMA:
            turns = [turn for key, turn in kept.items() if key.endswith(f"/{LLAMA}")]
            rows[name]["ram_bytes"] = max(turn["ram_bytes"] for turn in turns)
        else:  # llama.cpp computes otherwise
            # The most that any engine could do with these passes: nothing overlaps better than fully.
            rows[name]["roofline_seconds_a_token"] = float(max(nbytes / rate, computing) / tokens[0])
            rows[name]["bound_by"] = "link" if nbytes / rate > computing else "compute"
        if ACCELERATE in timed:
            faster = timed[ACCELERATE].token_seconds() / (seconds / tokens)
            rows[name]["times_faster_than_accelerate"] = describe(faster)
            rows[name]["faster_by_its_tokens"] = describe(faster / tokens)
    differences = [turn["differs"] for key, turn in kept.items() if "/" in key and LLAMA not in key]
    return {
        "level": level,
        "rate": rate,
        "ram": ram,
        "rows": rows,
        "predictions": compare_predictions(kept.get("sizes", []), rows),
        "differences": differences,
    }


def compute_seconds(name: str, ram: Mapping[int, float]) -> float:
    """Return what a contestant's pass takes with all weights in RAM, by the seconds of each size there."""
    nodes = 1
    if name == TREE:
        nodes = JUDGED + 1
    elif "optimal" in name:
        nodes = int(name.split("optimal ")[1].split(",")[0]) + 1
    return float(np.interp(nodes, sorted(ram), [ram[size] for size in sorted(ram)]))


def compare_predictions(
    sizes: Sequence[Mapping[str, Any]], rows: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return predicted and measured seconds a token, and the error of each of its two factors."""
    found = []
    for number, size in enumerate(sizes):
        row = rows.get(name_size(size))
        if row is None:
            continue
        seconds = size["draft_seconds"] + size["target_seconds"]
        found.append(
            {
                "budget": size["budget"],
                "depth": size["depth"],
                "is_chosen": number == 0,
                "predicted": seconds / size["expected_tokens"],
                "measured": row["seconds_a_token"]["value"],
                "error": seconds / size["expected_tokens"] / row["seconds_a_token"]["value"] - 1,
                "error_of_pass": seconds / row["seconds_a_pass"] - 1,
                "error_of_tokens": size["expected_tokens"] / row["tokens_a_pass"] - 1,
            }
        )
    return found


def judge(levels: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the verdicts that the levels allow."""
    verdicts = [judge_texts([d for level in levels for d in level["differences"]], "all write the same text")]
    for level in levels:
        rows = level["rows"]
        if ACCELERATE not in rows:
            continue
        where = name_level(level)
        if TREE in rows and level["rate"] <= SLOW:
            row = rows[TREE]
            beside = (
                f" times its tokens a pass: {show(row['times_faster_than_accelerate'])} times faster "
                f"with {row['tokens_a_pass']:.2f} tokens a pass"
            )
            claim = f"{where}: tree and prefetch faster than accelerate by at least 0.8 × its tokens a pass"
            verdicts.append(judge_least(claim, row["faster_by_its_tokens"], 0.8, beside))
        if READ in rows:
            faster = rows[READ]["times_faster_than_accelerate"]
            claim = f"{where}: prefetch alone no slower than accelerate"
            verdicts.append(judge_least(claim, faster, 1.0, " times faster"))
    return verdicts


def name_level(level: Mapping[str, Any]) -> str:
    """Return what a level is called in tables."""
    if level["level"] == "disk":
        return f"real disk ({level['rate'] / 1e9:.2f} GB/s)"
    return f"simulated {level['level']} GB/s"


def table(report: Mapping[str, Any]) -> str:
    """Return the Markdown tables, the verdicts and the notes."""
    lines = [
        "| weights from | contestant | s a token | of the roofline | tokens a pass | MB a token "
        "| times accelerate | prefill s | bound by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for level in report["levels"]:
        for name, row in level["rows"].items():
            faster = row.get("times_faster_than_accelerate")
            roof = row.get("roofline_seconds_a_token")
            share = f"{roof:.3f} ({roof / row['seconds_a_token']['value']:.0%})" if roof else "–"
            lines.append(
                f"| {name_level(level)} | {name} | {show(row['seconds_a_token'], '.3f')} | {share} "
                f"| {row['tokens_a_pass']:.2f} | {row['bytes_a_token'] / 1e6:.1f} "
                f"| {show(faster) if faster else '–'} | {row['prefill_seconds']:.2f} "
                f"| {row.get('bound_by', '–')} |"
            )
    lines += [
        "",
        "| weights from | tree | predicted s a token | measured | error | of the pass | of the tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for level in report["levels"]:
        for row in level["predictions"]:
            chosen = ", chosen" if row["is_chosen"] else ""
            lines.append(
                f"| {name_level(level)} | {row['budget']}, depth {row['depth']}{chosen} "
                f"| {row['predicted']:.3f} | {row['measured']:.3f} | {row['error']:+.0%} "
                f"| {row['error_of_pass']:+.0%} | {row['error_of_tokens']:+.0%} |"
            )
    return "\n".join([*lines, "", *list_verdicts(report["verdicts"]), "", *report["notes"]])


def describe_crossover(levels: Sequence[Mapping[str, Any]], nbytes: int) -> str:
    """Return, in words, from which bandwidth on computing is what takes the time."""
    sizes = {
        size: nbytes / float(np.median([level["ram"][size] for level in levels])) for size in levels[0]["ram"]
    }
    bounds = ", ".join(f"{size} tokens from {rate / 1e9:.2f} GB/s" for size, rate in sorted(sizes.items()))
    text = f"Compute-bound by the roofline: a pass over {bounds}."
    pays = [
        level["rate"]
        for level in levels
        if {TREE, READ} <= level["rows"].keys()
        and level["rows"][TREE]["seconds_a_token"]["value"] < level["rows"][READ]["seconds_a_token"]["value"]
    ]
    if pays:
        text += f" A tree of {JUDGED} paid up to {max(pays) / 1e9:.2f} GB/s of those measured."
    return text


def write_notes(
    bench: Bench, options: argparse.Namespace, levels: Sequence[Mapping[str, Any]], setup: Mapping[str, Any]
) -> list[str]:
    """Return what a reader of the tables must know."""
    nbytes = sum(layer.nbytes for layer in bench.packed.layers)
    errors = [abs(row["error"]) for level in levels for row in level["predictions"]]
    passes = [abs(row["error_of_pass"]) for level in levels for row in level["predictions"]]
    vector = " ".join(f"{share:.3f}" for share in bench.acceptance[:8])
    notes = [
        f"Target {options.model}, {bench.plain.target.dtype}, {torch.get_num_threads()} threads; draft "
        f"{options.draft}, acceptance {vector} …. A pass reads {nbytes / 1e6:.0f} MB in "
        f"{len(bench.packed.layers)} layers. {options.turns} turns of {options.passes} timed passes, "
        f"medians; tokens a pass are counted over {len(bench.counted)} prompts, "
        f"{sum(len(text.tokens) for text in bench.counted)} tokens; intervals over passes and prompts. Real "
        f"disk: {bench.disk_rate / 1e9:.2f} GB/s ({setup['disk'][1]}).",
        "",
        "Roofline: the bytes over the bandwidth or the pass's computation in RAM, whichever takes longer; "
        "drafting is not in it. " + describe_crossover(levels, nbytes),
    ]
    if errors:
        notes[-1] += (
            f" Predicted against measured seconds a token: off by {np.median(errors):.0%} in the median and "
            f"{max(errors):.0%} at most; seconds a pass by {np.median(passes):.0%} and {max(passes):.0%}."
        )
    return [*notes, "", describe_llama(levels, setup.get("llama"), options.dtype)]


def describe_llama(levels: Sequence[Mapping[str, Any]], found: Mapping[str, Any] | None, dtype: str) -> str:
    """Return, in words, what llama.cpp took and wrote, and where it was faster than ours."""
    rows = [level["rows"] for level in levels]
    if found is None or not all(LLAMA in each for each in rows):
        return "llama.cpp is not here as a yardstick: its package (xllamacpp) or a file for it is missing."
    same, agreed, tokens = np.sum(found["equal"], 0)
    whole = sum(same == every for same, _, every in found["equal"])
    times = []
    for level, each in zip(levels, rows, strict=True):
        ours = min(row["seconds_a_token"]["value"] for name, row in each.items() if name.startswith("ours"))
        times.append(f"{ours / each[LLAMA]['seconds_a_token']['value']:.1f} ({name_level(level)})")
    ram = max(row[LLAMA]["ram_bytes"] for row in rows)
    return (
        f"llama.cpp reads the model as it is stored, a file of {found['file_bytes'] / 1e6:.0f} MB in 4 bits, "
        f"and takes {ram / 1e6:.0f} MB of RAM; ours computes with the same weights in {dtype}. Of {tokens} "
        f"greedy tokens of ours it would write {agreed} behind the same beginning; left alone, it writes "
        f"{same} before it first leaves our texts, and {whole} of these {len(found['equal'])} to their end. "
        f"The fastest of ours that reads its weights from slow memory takes {', '.join(times)} times as long "
        "a token. Its own weights in slow memory were not measured: its file is mapped, without a budget or "
        "a link that could be set."
    )


# -- running it ----------------------------------------------------------------------------------------


def make_bench(options: argparse.Namespace, plain: Engine, setup: Kept, llama: Llama | None) -> Bench:
    """Prepare what all levels share."""
    # A task's second prompt tells acceptance; on the others the yield is counted, and the first are timed.
    rows = [
        each
        for each in choose_rows(options.prompts, options.per_task)
        if each[1].get("task") not in OTHER_TASKS
    ]
    texts = write_texts_plainly(plain, rows, options.tokens, (), Kept(options.work / "texts.json"))
    timed = [text for text in texts if text.number == 0]
    others = [text for text in texts if text.number == 1] or timed
    counted = [cut_text(text, plain.eos_token_ids) for text in texts if text.number != 1]
    if "acceptance" not in setup:
        tell("how often the draft is right")
        assert plain.draft is not None
        ranks = [record_guesses(plain.draft, text).ranks(text) for text in others]
        setup.put("acceptance", acceptance_vector(ranks))
    packed = pack_model(plain.files, options.dtype)
    if "disk" not in setup:
        setup.put("disk", measure_disk(packed))
    offloaded = {}
    for name, whole in ((ACCELERATE, False), (WHOLE, True)):
        model = load_language_model(plain.files, dtype=options.dtype)
        offloaded[name] = model, offload(model, options.work / "accelerate", whole)
    acceptance, rate = setup["acceptance"], setup["disk"][0]
    return Bench(plain, packed, read_rest(packed), offloaded, timed, counted, acceptance, rate, llama)


def cut_text(text: Text, eos: Collection[int]) -> Text:
    """Return a text as far as the token that ends it."""
    end = next((place for place, token in enumerate(text.tokens, 1) if token in eos), len(text.tokens))
    return replace(text, tokens=text.tokens[:end])


def start_llama(options: argparse.Namespace, stack: ExitStack) -> Llama | None:
    """Return llama.cpp with the packaged file, None where its package or the file is not there."""
    path = options.gguf or (find_packaged_file() if options.model == DEFAULT_MODEL else None)
    if path is None or not is_installed():
        return None
    return stack.enter_context(Llama(path, torch.get_num_threads()))


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what is not known yet, and compare."""
    draft = identify_draft(options.draft)
    with load_engine(options.model, options.draft, dtype=options.dtype) as plain, ExitStack() as stack:
        identity = {
            "model": plain.files.hash,
            "draft": draft,
            "prompts": hash_files({"prompts": options.prompts}),
            "threads": torch.get_num_threads(),
            "settings": [
                *(options.dtype, options.tokens, options.turns, options.passes, options.repeats),
                options.per_task,
            ],
        }
        check_identity(options.work, identity)
        setup, yields = Kept(options.work / "setup.json"), Kept(options.work / "yields.json")
        bench = make_bench(options, plain, setup, start_llama(options, stack))
        if bench.llama is not None and "llama" not in setup:
            tell("llama.cpp's own texts")
            equal = compare_llama(bench.llama, bench.counted)
            setup.put("llama", {"file_bytes": bench.llama.file_bytes, "equal": equal})
        levels = []
        for level in options.levels:
            kept = Kept(options.work / f"level_{level}.json")
            run_level(bench, level, kept, yields, options)
            levels.append(compare_level(kept, yields, level, bench.rate(level)))
        return {
            "levels": levels,
            "verdicts": judge(levels),
            "acceptance": setup["acceptance"],
            "llama": setup.get("llama"),
            "versions": list_versions(),
            "notes": write_notes(bench, options, levels, setup),
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what was asked for and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/offload_benchmark"))
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--draft", default="student")
    parser.add_argument("--levels", default=LEVELS, help="disk, and GB/s of simulated links")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="JSONL")
    parser.add_argument("--tokens", type=int, default=96, help="of the texts that are compared")
    parser.add_argument("--turns", type=int, default=3, help="of each contestant at each level")
    parser.add_argument("--passes", type=int, default=3, help="timed in a turn")
    parser.add_argument("--per-task", type=int, default=3, help="prompts of each task")
    parser.add_argument("--repeats", type=int, default=2, help="of the passes that sizes are chosen by")
    parser.add_argument("--gguf", type=Path, help="file for llama.cpp, instead of the packaged one")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quick", action="store_true", help="little of everything, to see that it runs")
    options = parser.parse_args(arguments)
    options.levels = options.levels.split(",")
    if options.quick:
        options.tokens, options.turns, options.passes, options.repeats = min(options.tokens, 32), 2, 2, 1
    found = benchmark(options)
    if options.json:
        write_atomically(options.json, json.dumps(found, indent=1, default=float).encode())
    print(table(found))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"offload.py: {error}", file=sys.stderr)
        sys.exit(2)
