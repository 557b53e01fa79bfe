"""Pictures a second end to end, ours (as it is, and compiled) and the stock loop's; metrics; where time goes.

    python benchmarks/probe.py [--work DIR] [--json FILE] [--samples 4,1] [--turns 9]

The stock loop calls diffusers once a synset in the default dtype, writes PNG files, reads them by ImageFolder
and classifies them. All draw with the same model, scheduler and steps, in turns; networks are compiled before
the first. What --work holds is not measured again. On a GPU the model is one of SD 1.5's shape with random
weights, at 512 pixels, in float16 and 25 steps; --shape embedded or --model FOLDER choose another.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inversion_flops import make_sd15
from language_common import Kept, check_identity, run_command, tell
from probe_parts import measure_parts
from probe_peers import METRICS, PublishedMetrics, load_stock, time_stock
from probe_report import compare, judge, table

from t2iprobe.config import Study, load_study
from t2iprobe.devices import resolve_device, resolve_dtype
from t2iprobe.errors import UserError
from t2iprobe.hypernymy.drawing import draw, score_pictures
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.hypernymy.metrics import measure
from t2iprobe.hypernymy.sampling import DiffusersSampler
from t2iprobe.hypernymy.study import load_sampler, load_scorers, make_manifest
from t2iprobe.machine import list_versions
from t2iprobe.pictures import read_picture
from t2iprobe.pipelines import default_steps, locate_model, model_hash
from t2iprobe.runs import Run
from t2iprobe.storage import write_atomically

CONTESTANTS = ("stock", "ours", "compiled")
METRIC_SYNSETS, METRIC_SAMPLES = 860, 32  # the published protocol's


class Bench:
    """The contestants, loaded once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = resolve_device("auto")
        on_gpu = self.device.startswith("cuda")
        shape = options.shape or ("sd15" if on_gpu else "embedded")
        if options.model is not None:
            self.name, self.model = str(options.model), str(options.model)
        elif shape == "embedded":
            self.name, self.model = "the embedded model", "embedded"
        else:
            self.name, self.model = "SD 1.5's shape, random weights", str(save_sd15(options.work))
        settings: dict[str, Any] = {"model": self.model, "samples": options.samples[0]}
        if shape == "sd15" and options.model is None:
            settings |= {"steps": 25, "guidance": 7.5, "size": 512}
        settings |= options.settings
        settings |= {"dtype": "float16"} if on_gpu else {}
        self.settings = settings
        self.study = self.of(options.samples[0])
        self.dtype = resolve_dtype(self.study.dtype, self.device)
        self.stock_dtype = "float16" if on_gpu else "float32"

    @cached_property
    def sampler(self) -> DiffusersSampler:
        """Ours."""
        return load_sampler(self.study, self.device, self.dtype)

    @cached_property
    def compiled(self) -> DiffusersSampler:
        """Ours with compiled networks, in batches of the size that suits the others."""
        study = self.study.model_copy(update={"compile": True})
        sampler = load_sampler(study, self.device, self.dtype)
        sampler.sizes = self.sampler.sizes
        return sampler

    @cached_property
    def scorers(self) -> dict[str, Any]:
        """Our judges."""
        return dict(load_scorers(self.study, self.device, 1000))

    @cached_property
    def stock(self) -> ProcessPoolExecutor:
        """The stock loop, in a process of its own: what ours sets there (malloc, threads) is not set here."""
        folder = locate_model(self.model).folder
        study = self.study
        words = folder, self.device, self.stock_dtype, study.steps, study.guidance, study.size
        return ProcessPoolExecutor(1, get_context("spawn"), load_stock, words)

    @property
    def steps(self) -> int:
        """Denoising steps of a picture."""
        return self.study.steps or default_steps(self.sampler.pipeline) or 1

    def of(self, samples: int) -> Study:
        """The study with so many pictures a synset, and as many synsets as a turn's pictures need."""
        rows, count = Hierarchy.imagenet().synsets, max(1, self.options.pictures // samples)
        chosen = [rows[place] for place in np.linspace(0, len(rows) - 1, count).astype(int)]
        return load_study(None, {**self.settings, "samples": samples, "synsets": ",".join(chosen)})


def save_sd15(work: Path) -> Path:
    """Save a pipeline of SD 1.5's shape with random weights in float16, once."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from t2iprobe.testing import tiny_tokenizer

    folder = work / "sd15"
    if not (folder / "model_index.json").exists():
        torch.manual_seed(0)
        (unet, vae, encoders), _ = make_sd15()
        scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
        pipeline: Any = StableDiffusionPipeline(
            vae, encoders[0], tiny_tokenizer(), unet, scheduler, None, None, requires_safety_checker=False
        )
        pipeline.to(torch.float16).save_pretrained(folder)
    return folder


# -- pictures ------------------------------------------------------------------------------------------


def run_turns(bench: Bench, kept: Kept, samples: int, turns: int) -> None:
    """Let all draw and judge the same prompts, in turns; what is kept already is not drawn again."""
    manifest = make_manifest(bench.of(samples))
    draws: dict[str, Callable[[], dict[str, Any]]] = {
        "stock": lambda: draw_stock(bench, manifest, samples),
        "ours": lambda: draw_ours(bench, bench.sampler, manifest, samples),
        "compiled": lambda: draw_ours(bench, bench.compiled, manifest, samples),
    }
    warm = False
    for turn in range(turns):
        for name in bench.options.contestants:
            key = f"pictures/{samples}/{turn}/{name}"
            if key in kept:
                continue
            if not warm:
                for each in bench.options.contestants:  # sets kernels up, settles the batch size, compiles
                    tell(f"{samples} pictures a synset, warm-up: {each}")
                    draws[each]()
                warm = True
            tell(f"{samples} pictures a synset, turn {turn + 1} of {turns}: {name}")
            kept.put(key, draws[name]())


def draw_stock(bench: Bench, manifest: Mapping[str, Any], samples: int) -> dict[str, Any]:
    """Return what the stock loop takes, and whether its judge is ours."""
    prompts = {name: next(iter(texts.values())) for name, texts in manifest["plan"][0]["prompts"].items()}
    with tempfile.TemporaryDirectory() as folder:
        logits, seconds = bench.stock.submit(time_stock, prompts, samples, Path(folder)).result()
        files = sorted(Path(folder).glob("*/*.png"), key=str)
        ours = score_pictures([read_picture(file) for file in files], bench.scorers)["embedded"]
    agree = float(np.corrcoef(logits.ravel(), ours.ravel())[0, 1])
    return {"pictures": len(logits), "seconds": seconds, "judges_agree": agree}


def draw_ours(
    bench: Bench, found: DiffusersSampler, manifest: dict[str, Any], samples: int
) -> dict[str, Any]:
    """Return what our run takes, from prompts to stored shards; its embeddings begin empty."""
    study = bench.of(samples)
    fresh = DiffusersSampler(
        found.pipeline, steps=study.steps, guidance=study.guidance, size=study.size, dtype=bench.dtype
    )
    fresh.sizes = found.sizes
    with tempfile.TemporaryDirectory() as folder:
        run = Run.create(Path(folder) / "run", manifest)
        begin = time.perf_counter()
        draw(run, range(len(run.plan)), fresh, bench.scorers, study)
        seconds = time.perf_counter() - begin
    return {
        "pictures": len(run.plan),
        "seconds": seconds,
        "batch": fresh.sizes.size,
        "lanes": fresh.lanes,
        "settled": fresh.sizes.settled,
    }


# -- metrics, predictions ------------------------------------------------------------------------------


def measure_metrics(synsets: int, samples: int, turns: int) -> dict[str, Any]:
    """Return the seconds of all metrics from logits [synsets, samples, 1000], and how far values differ."""
    hierarchy = Hierarchy.imagenet()
    rng = np.random.default_rng(0)
    names = [hierarchy.synsets[p] for p in np.linspace(0, len(hierarchy.synsets) - 1, synsets).astype(int)]
    logits = {name: 4 * rng.standard_normal((samples, 1000)).astype(np.float32) for name in names}
    published = PublishedMetrics(hierarchy.classes)
    tell("published metrics")
    values, theirs = {}, {}
    for metric in METRICS:
        begin = time.perf_counter()
        values[metric] = published.measure(metric, logits)
        theirs[metric] = time.perf_counter() - begin
    ours = []
    for _ in range(turns):
        begin = time.perf_counter()
        found = measure(logits, hierarchy)
        ours.append(time.perf_counter() - begin)
    columns = {
        "isp": found.isp, "scs": found.scs_raw, "subtree entropy": found.subtree_entropy,
        "marginal entropy": found.marginal_entropy,
    }  # fmt: skip
    places = {name: place for place, name in enumerate(found.synsets)}
    off = max(
        abs(columns[metric][places[name]] - value)
        for metric in METRICS
        for name, value in values[metric].items()
    )
    return {"synsets": synsets, "samples": samples, "theirs": theirs, "ours": ours, "off": float(off)}


def measure_prediction(bench: Bench, kept: Kept, pairs: int) -> None:
    """Let the command predict a run, then run it."""
    study, out = bench.study, bench.options.work / "predicted"
    words = ["hypernymy", "run", "--model", bench.model, "--samples", str(study.samples), "--json"]
    words += ["--synsets", study.synsets, "--out", str(out)]
    words += [f"--set={key}={value}" for key, value in bench.options.settings.items()]
    for pair in range(pairs):
        if f"prediction/{pair}" in kept:
            continue
        tell(f"prediction {pair + 1} of {pairs}")
        shutil.rmtree(out, ignore_errors=True)
        planned, run = run_command([*words, "--dry-run"]), run_command(words)
        if planned["status"] or run["status"]:
            raise RuntimeError(planned["error"] + run["error"])
        plan = json.loads(planned["output"])
        kept.put(
            f"prediction/{pair}",
            {
                "pictures": plan["pictures"],
                "predicted": plan["predicted_seconds"],
                "seconds": run["seconds"],
                "parts": plan["seconds"],
            },
        )


# -- all of it -----------------------------------------------------------------------------------------


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what is not known yet, and compare."""
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    identity = {
        "model": model_hash(bench.model),
        "settings": bench.study.model_dump(mode="json"),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if bench.device.startswith("cuda") else bench.device,
    }
    check_identity(options.work, identity)
    kept = Kept(options.work / "found.json")
    wanted = options.parts
    if "pictures" in wanted:
        for samples in options.samples:
            run_turns(bench, kept, samples, options.turns)
    if "parts" in wanted and "parts" not in kept:
        tell("where the time goes")
        if not bench.sampler.sizes.settled:
            draw_ours(bench, bench.sampler, make_manifest(bench.of(options.samples[0])), options.samples[0])
        kept.put("parts", measure_parts(bench, 3))
    if "metrics" in wanted and "metrics" not in kept:
        synsets, samples = options.metrics
        kept.put("metrics", measure_metrics(synsets, samples, turns=5))
    if "prediction" in wanted:
        measure_prediction(bench, kept, options.pairs)
    found = compare(kept)
    found["setting"] = {
        "model": bench.name,
        "device": identity["device"], "threads": identity["threads"], "steps": bench.steps,
        "guidance": bench.study.guidance, "scheduler": type(bench.sampler.pipeline.scheduler).__name__,
        "dtype": bench.dtype, "stock_dtype": bench.stock_dtype, "pictures": options.pictures,
        "turns": options.turns, "on_gpu": bench.device.startswith("cuda"),
    }  # fmt: skip
    return found | {"verdicts": judge(found), "versions": list_versions()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what was asked for and print its tables."""
    from t2iprobe.config import parse_settings

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/probe_benchmark"))
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--shape", choices=("embedded", "sd15"), help="by default sd15 on a GPU")
    parser.add_argument("--model", type=Path, help="a pipeline folder instead")
    parser.add_argument("--set", action="append", default=[], help="a setting of both, as key=value")
    parser.add_argument("--pictures", type=int, default=96, help="of a turn")
    parser.add_argument(
        "--samples", type=lambda text: [int(each) for each in text.split(",")], default=[4, 1],
        help="pictures a synset; with the first it is told where the time goes",
    )  # fmt: skip
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--pairs", type=int, default=2, help="of predicted and real runs")
    parser.add_argument("--parts", nargs="+", default=["pictures", "parts", "metrics", "prediction"])
    parser.add_argument("--quick", action="store_true", help="little of everything, to see that it runs")
    options = parser.parse_args(arguments)
    options.settings = parse_settings(options.set)
    options.metrics = (METRIC_SYNSETS, METRIC_SAMPLES)
    if options.quick:
        options.turns, options.pairs, options.pictures, options.metrics = 2, 1, 12, (6, 4)
    found = benchmark(options)
    if options.json:
        write_atomically(options.json, json.dumps(found, indent=1).encode())
    print(table(found))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"probe.py: {error}", file=sys.stderr)
        sys.exit(2)
