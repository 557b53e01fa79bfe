"""Where the time of benchmarks/probe.py goes: what each part of a picture takes, and the matrix peak."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from inversion_flops import count
from probe_peers import load_plain_lite

from t2iprobe.devices import inference_context, set_threads
from t2iprobe.hypernymy.drawing import score_pictures
from t2iprobe.hypernymy.sampling import DiffusersSampler
from t2iprobe.hypernymy.study import make_manifest
from t2iprobe.runs import Run

if TYPE_CHECKING:
    from probe import Bench

PEAK_SIDES = (1024, 2048, 4096, 8192)  # of the square products that the matrix peak is taken from


def measure_parts(bench: Bench, turns: int) -> dict[str, Any]:
    """Return ms of one lane and GFLOP of a picture for each part of the work, and the matrix peak."""
    study, sampler = bench.study, bench.sampler
    manifest = make_manifest(study)
    plan = Run(Path("."), manifest).plan
    entries = plan[: sampler.sizes.size]
    threads = torch.get_num_threads()
    set_threads(max(1, threads // sampler.workers))
    judge_ = bench.scorers["embedded"]
    try:
        pictures = sampler.sample(entries)
        found: dict[str, list[float]] = {}
        for _ in range(turns):
            seconds = time_sampling(bench, entries)
            begin = time.perf_counter()
            judge_._prepare(pictures)
            prepared = time.perf_counter()
            logits = score_pictures(pictures, bench.scorers)
            scored = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                run = Run.create(Path(folder) / "run", manifest)
                created = time.perf_counter()
                run.write_shard(range(len(entries)), logits, pictures)
                stored = time.perf_counter()
            seconds |= {
                "pictures to the judge's input": prepared - begin,
                "judge": scored - prepared - (prepared - begin),
                "store (behind the lanes' backs)": stored - created,
            }
            for name, value in seconds.items():
                found.setdefault(name, []).append(1000 * value / len(entries))
        peak = measure_peak(bench)
    finally:
        set_threads(threads)
    return {
        "milliseconds": {name: statistics.median(values) for name, values in found.items()},
        "gflop": count_work(bench, entries[0]),
        "peak_gflops": peak,
        "samples": study.samples,
    }


def time_sampling(bench: Bench, entries: Sequence[Any]) -> dict[str, float]:
    """Return the seconds of a batch: text, denoiser, decoder, all else."""
    pipeline = bench.sampler.pipeline
    parts = {
        "prompts": pipeline.text_encoder,
        "denoiser": pipeline.unet,
        "decoder": pipeline.vae.decoder,
    }
    begin = time.perf_counter()
    with clocks(bench.device, parts) as seconds:
        fresh = DiffusersSampler(
            pipeline, steps=bench.study.steps, guidance=bench.study.guidance, size=bench.study.size,
            dtype=bench.dtype, lanes=bench.sampler.lanes,
        )  # fmt: skip
        fresh.sample(entries)
    whole = time.perf_counter() - begin
    # Each prompt is encoded once, for all of its pictures.
    rest = whole - sum(seconds.values())
    return seconds | {"prompts": seconds["prompts"] / bench.study.samples, "scheduler and copies": rest}


@contextmanager
def clocks(device: str, parts: Mapping[str, torch.nn.Module]) -> Iterator[dict[str, float]]:
    """Add up the seconds in which each of the networks computes."""
    seconds, begun = dict.fromkeys(parts, 0.0), dict.fromkeys(parts, 0.0)

    def wait() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(name: str) -> Callable[..., None]:
        return lambda *_: begun.update({name: wait()})

    def stop(name: str) -> Callable[..., None]:
        return lambda *_: seconds.update({name: seconds[name] + wait() - begun[name]})

    hooks = []
    for name, network in parts.items():
        hooks += [network.register_forward_pre_hook(start(name)), network.register_forward_hook(stop(name))]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def count_work(bench: Bench, entry: Any) -> dict[str, float]:
    """Return the GFLOP of one picture for the networks, multiplying and adding counted as two."""
    pipeline, seen = bench.sampler.pipeline, {}

    def note(name: str) -> Callable[..., None]:
        return lambda _, inputs, named: seen.update({name: (inputs, named)})

    networks = {"denoiser": pipeline.unet, "decoder": pipeline.vae.decoder}
    hooks = [
        network.register_forward_pre_hook(note(name), with_kwargs=True) for name, network in networks.items()
    ]
    bench.sampler.sample([entry])
    for hook in hooks:
        hook.remove()
    with inference_context(bench.device, bench.dtype):
        found = {}
        for name, network in networks.items():
            inputs, named = seen[name]
            found[name] = count(partial(network, *inputs, **named)) / 1e9
    found["denoiser"] *= bench.steps
    # Ours fuses layers that the counter does not know; the plain network does the same work.
    found["judge"] = count(partial(load_plain_lite(), torch.zeros(1, 3, 224, 224))) / 1e9
    return found


def measure_peak(bench: Bench) -> float:
    """Return the GFLOP/s of the fastest square product in our dtype, on all lanes at once."""
    dtype = getattr(torch, bench.dtype)
    lanes = bench.sampler.lanes if bench.device == "cpu" else 1
    best = 0.0
    for side in PEAK_SIDES if bench.device != "cpu" else PEAK_SIDES[:2]:
        left, right = (torch.randn(side, side, device=bench.device).to(dtype) for _ in range(2))

        def multiply(_: int, left: torch.Tensor = left, right: torch.Tensor = right) -> None:
            for _ in range(4):
                left @ right
            if bench.device != "cpu":
                torch.cuda.synchronize()

        with ThreadPoolExecutor(lanes, initializer=set_threads, initargs=(torch.get_num_threads(),)) as pool:
            list(pool.map(multiply, range(lanes)))
            for _ in range(5):
                begin = time.perf_counter()
                list(pool.map(multiply, range(lanes)))
                best = max(best, 4 * lanes * 2 * side**3 / (time.perf_counter() - begin) / 1e9)
    return best
