"""What a taught word costs and what it is worth: four procedures on the same concepts, interleaved.

    python benchmarks/inversion.py [--work DIR] [--json FILE] [--concepts A,B,C] [--arms abcd] [--seeds 0,1]
    python benchmarks/inversion.py --flops          # FLOPs at the sizes of SD 1.5 and SDXL, on no device
    python benchmarks/inversion.py --throughput     # seconds at the size of SD 1.5, random weights, on a GPU

(a) is the procedure of the diffusers example (examples/textual_inversion, commit 000280f) with its defaults:
AdamW on the whole embedding matrix, all other rows put back after each step, 16 pictures encoded at each
step, 5000 steps, nothing watched. (b) is published DVAR (arXiv 2302.04841) with its settings for textual
inversion: one row, 2 pictures encoded at each step, 4 fixed items looked at after each backward, window 310,
eps .15, 6100 steps at most. Both are in `published_inversion.py`. (c) is `train_concepts` with its defaults,
(d) the same with all packaged concepts, eight in one pass. Asked for with --arms abecd, (e) is (b) at our
rate.

The arms advance in turn, the one that has done the least share of its work next, and each has a clock that
runs in its turns only. Killed, the same command continues.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inversion_flops import SIZES, count, count_parts, make_sd15, table_flops
from inversion_report import BLOCK, NAMES, OURS, compare, group_blocks, table_arms
from inversion_turns import Arm, Clock, Unit, take_turns, tell
from published_inversion import SD_RMS, GentleDVAR, PublishedDVAR, Reference, Stock

from t2iprobe.errors import UserError
from t2iprobe.inversion.backbones import Backbone, make_backbone
from t2iprobe.inversion.commands import load_backbone, load_training, name_token, read_concept
from t2iprobe.inversion.concepts import Concept, encode_moments
from t2iprobe.inversion.drawing import draw_pictures
from t2iprobe.inversion.embeddings import Rows
from t2iprobe.inversion.evaluation import COMPANIONS, choose_prompts, measure, plan_pictures
from t2iprobe.inversion.features import load_features
from t2iprobe.inversion.formats import Embedding, fit_vectors, read_embedding, write_embedding
from t2iprobe.inversion.initialization import nearest_words
from t2iprobe.inversion.methods import TextualInversion
from t2iprobe.inversion.settings import Training
from t2iprobe.inversion.training import train_concepts
from t2iprobe.machine import list_versions
from t2iprobe.pipelines import model_hash, place_pipeline
from t2iprobe.storage import write_atomically

ASSETS = Path(str(files("t2iprobe"))) / "assets" / "concepts"
CONCEPTS = ("harp.n.01", "soccer_ball.n.01", "teapot.n.01")
STATE_SECONDS = 60.0


# -- training ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """What the arms share: how a model is loaded, the concepts and their words, where everything lies."""

    load: Callable[[], Backbone]
    concepts: Mapping[str, Concept]
    words: Mapping[tuple[str, int], str]  # by concept and seed
    settings: Training
    work: Path
    references: Mapping[str, type[Reference]]

    def folder(self, arm: str, seed: int) -> Path:
        """Return where an arm's trainings with a seed lie."""
        return self.work / arm / f"seed_{seed}"

    def _file(self, unit: Unit) -> Path:
        name = unit.names[0] if len(unit.names) == 1 else "together"
        return self.folder(unit.arm, unit.seed) / f"{name}.json"

    def recall(self, unit: Unit) -> bool:
        """Fill in what came of a unit. Returns whether it has been trained."""
        path = self._file(unit)
        if path.exists():
            vars(unit).update(json.loads(path.read_text()))
        return path.exists()

    def train(self, unit: Unit, clock: Clock) -> None:
        """Train a unit where that has not been done."""
        if self.recall(unit):
            return
        path = self._file(unit)
        path.parent.mkdir(parents=True, exist_ok=True)
        backbone = self.load()
        (self._train_ours if unit.arm in OURS else self._train_reference)(backbone, unit, clock)
        write_atomically(path, json.dumps(asdict(unit)).encode())

    def _train_reference(self, backbone: Backbone, unit: Unit, clock: Clock) -> None:
        (name,) = unit.names
        out = self.folder(unit.arm, unit.seed) / name
        out.mkdir(exist_ok=True)
        concept, kept = self.concepts[name], out / "state.pt"
        clock.begin()
        learner = self.references[unit.arm](backbone, concept, self.words[name, unit.seed], unit.seed)
        if kept.exists():
            state = torch.load(kept, map_location=backbone.device, weights_only=True)
            learner.restore(state["learner"])
            unit.seconds = state["seconds"]
            clock.begin()
        written, over = time.monotonic(), False
        while not over:
            over = learner.step()
            clock.tick()
            if time.monotonic() - written > STATE_SECONDS:
                content = io.BytesIO()
                torch.save({"learner": learner.state(), "seconds": unit.seconds}, content)
                write_atomically(kept, content.getvalue())
                written = time.monotonic()
                clock.begin()
        unit.steps, unit.reasons = [learner.done], [learner.reason]
        row = Embedding(concept.token, dict.fromkeys(backbone.encoders, learner.row()), {})
        write_embedding(out / "learned_embeds.safetensors", row, "diffusers")
        kept.unlink(missing_ok=True)

    def _train_ours(self, backbone: Backbone, unit: Unit, clock: Clock) -> None:
        out = self.folder(unit.arm, unit.seed)
        for name in unit.names:  # a clock that was stopped in the middle says nothing
            shutil.rmtree(out / name, ignore_errors=True)
        forget_words()
        clock.begin()
        outcomes = train_concepts(
            backbone,
            [(self.concepts[name], out / name) for name in unit.names],
            self.settings.model_copy(update={"seed": unit.seed}),
            progress=lambda *_: clock.tick(),
        )
        unit.steps = [found["steps"] for found in outcomes]
        unit.reasons = [found["stop"]["reason"] for found in outcomes]
        for name, found in zip(unit.names, outcomes, strict=True):
            if found["initial"]["words"] != [self.words[name, unit.seed]]:
                raise RuntimeError(f"{name} began at another word than in the other arms")


def forget_words() -> None:
    """Empty the cache of nearest words, so that ours looks for its word in the time it is given."""
    shutil.rmtree(Path(os.environ["XDG_CACHE_HOME"]) / "t2iprobe" / "nearest_words", ignore_errors=True)


def find_words(
    backbone: Backbone, concepts: Mapping[str, Concept], settings: Training, seeds: Sequence[int], file: Path
) -> dict[tuple[str, int], str]:
    """Return the word that each concept begins at in all arms: the one that our default finds."""
    found = json.loads(file.read_text()) if file.exists() else {}
    for name, concept in concepts.items():
        for seed in seeds:
            if settings.init != "nearest":
                found[f"{name}/{seed}"] = settings.init
            elif f"{name}/{seed}" not in found:
                moments = encode_moments(backbone, concept)
                rows = Rows(backbone.encoders, {concept.token: 1})
                found[f"{name}/{seed}"] = nearest_words(backbone, rows, concept, moments, seed)[0][0]
                rows.remove()
    write_atomically(file, json.dumps(found, indent=1).encode())
    return {(name, seed): found[f"{name}/{seed}"] for name in concepts for seed in seeds}


# -- FLOPs ---------------------------------------------------------------------------------------------


def count_arms(bench: Bench, letters: Iterable[str], together: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return for each arm the FLOPs of a step and of what is done once, of one concept. Also warms up."""
    name = together[0]
    return {
        letter: count_reference(bench, bench.references[letter], name)
        if letter in bench.references
        else count_ours(bench, together if letter == "d" else [name])
        for letter in letters
    }


def count_reference(bench: Bench, reference: type[Reference], name: str) -> dict[str, float]:
    """Return the FLOPs of a step and of what comes before the first."""
    backbone, learner = bench.load(), []
    _, seed = next(iter(bench.words))

    def begin() -> None:
        learner.append(reference(backbone, bench.concepts[name], bench.words[name, seed], seed))

    return {"once": count(begin), "step": count(lambda: learner[0].step())}


def count_ours(bench: Bench, names: Sequence[str]) -> dict[str, float]:
    """Return the same from two short trainings, one twice as long as the other."""
    backbone = bench.load()

    def count_steps(steps: int) -> float:
        return count(lambda: train_briefly(bench, backbone, names, steps)) / len(names)

    short, long = count_steps(BLOCK), count_steps(2 * BLOCK)
    return {"once": 2 * short - long, "step": (long - short) / BLOCK}


def train_briefly(bench: Bench, backbone: Backbone, names: Sequence[str], steps: int) -> None:
    """Train concepts for some steps, for nothing."""
    forget_words()
    settings = bench.settings.model_copy(update={"max_steps": steps})
    with tempfile.TemporaryDirectory() as folder:
        train_concepts(backbone, [(bench.concepts[n], Path(folder) / n) for n in names], settings)


# -- what came of it -----------------------------------------------------------------------------------


def measure_rows(
    bench: Bench, arms: Mapping[str, Sequence[Unit]], names: Sequence[str], seeds: Sequence[int], samples: int
) -> dict[str, dict[str, list[float]]]:
    """Return for each arm the likeness and obedience of every picture, in the same order for all."""
    backbone = bench.load()
    features = load_features("classifier", str(backbone.device), backbone.dtype)
    found: dict[str, dict[str, list[float]]] = {}
    for letter in ("0", *arms):
        found[letter] = {"likeness": [], "obedience": []}
        for name in names:
            for seed in seeds:
                concept = bench.concepts[name]
                rows = Rows(backbone.encoders, {concept.token: 1})
                if letter == "0":
                    rows.set(concept.token, rows.from_words(concept.token, [bench.words[name, seed]]))
                else:
                    path = bench.folder(letter, seed) / name / "learned_embeds.safetensors"
                    (row,) = read_embedding(path, concept.token)
                    rows.set(concept.token, fit_vectors(row, backbone.encoders))
                kept = bench.folder(letter, seed) / f"{name}_{samples}_pictures.json"
                if not kept.exists():
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    content = json.dumps(measure_token(backbone, bench.settings, concept, features, samples))
                    write_atomically(kept, content.encode())
                for quality, values in json.loads(kept.read_text()).items():
                    found[letter][quality] += values
                rows.remove()
    return found


def measure_token(
    backbone: Backbone, settings: Training, concept: Concept, features: Any, samples: int
) -> dict[str, list[float]]:
    """Draw a token as it stands and return the likeness and obedience of every picture."""
    prompts = choose_prompts(concept.templates, concept.token)
    new = [f"a {word} and a {concept.token}" for word in COMPANIONS]

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        return draw_pictures(backbone, prompts, seeds, settings.steps, settings.guidance)

    plans = [plan_pictures(each, samples, 0) for each in (prompts, new)]
    own = features.pictures(list(concept.pictures.permute(0, 2, 3, 1).numpy()))
    made = measure(draw, plans, own, concept.token, features, COMPANIONS)
    assert made.obedience is not None
    return {"likeness": made.likeness.tolist(), "obedience": made.obedience.tolist()}


# -- running it ----------------------------------------------------------------------------------------


def shorten(references: Mapping[str, type[Reference]], steps: int) -> dict[str, type[Reference]]:
    """Return the references with few steps, and a window that fits into them."""
    more = {"most": steps, "options": {"window": steps // 2}}
    return {letter: type(kind.__name__, (kind,), more) for letter, kind in references.items()}


def plan_units(
    letters: str, names: Sequence[str], together: Sequence[str], seeds: Sequence[int]
) -> dict[str, list[Unit]]:
    """Return the trainings of each arm: (a), whose steps are as many for each, trains `names` alone."""
    groups = {"a": [[name] for name in names], "d": [list(together)]}
    single = [[name] for name in together]
    return {
        letter: [Unit(letter, seed, group) for seed in seeds for group in groups.get(letter, single)]
        for letter in letters
    }


def run_arms(
    bench: Bench, units: Mapping[str, Sequence[Unit]], options: argparse.Namespace
) -> Mapping[str, Sequence[Unit]]:
    """Train everything, in turn, each arm in a process of its own; fill in what came of it."""
    guess = {"a": bench.references["a"].most, "b": min(600, bench.references["b"].most)}
    command = [sys.executable, __file__, *options.arguments]
    arms = {}
    for letter, arm in units.items():
        own = [*command, "--only", letter, "--work", str(bench.work)]
        arms[letter] = Arm(own, len(arm), guess.get(letter, 500))
    take_turns(arms, options.slice)
    for arm in units.values():
        for unit in arm:
            bench.recall(unit)
    return units


def work_arm(make: Callable[[], tuple[Bench, Mapping[str, Sequence[Unit]]]], letter: str) -> None:
    """Train one arm's units, in turns that whoever started this process gives."""
    clock = Clock()
    clock.wait()
    bench, units = make()
    for unit in units[letter]:
        clock.running = unit
        bench.train(unit, clock)
        clock.running = None
        clock.finished += 1


def check_identity(work: Path, identity: Mapping[str, Any]) -> None:
    """Raise UserError where a folder holds another benchmark."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / "identity.json"
    if path.exists() and json.loads(path.read_text()) != identity:
        raise UserError(f"{work} holds a benchmark of another model or other settings: give another --work")
    write_atomically(path, json.dumps(identity, indent=1).encode())


def make_bench(options: argparse.Namespace) -> tuple[Bench, dict[str, list[Unit]]]:
    """Return what the arms share and what each trains, for a benchmark on a model."""
    short = {"max_steps": 2 * BLOCK} if options.quick else {}
    settings = load_training(
        {"model": options.model or "embedded", "grid": 0, "evaluate": 0, **short}, options.set
    )
    identity = {"model": model_hash(settings.model), "settings": json.loads(settings.model_dump_json())}
    check_identity(options.work, identity | {"threads": torch.get_num_threads()})
    os.environ["XDG_CACHE_HOME"] = str(options.work / f"cache_{options.only or 'all'}")
    names = options.concepts.split(",")
    spare = [path.name for path in sorted(ASSETS.iterdir()) if path.is_dir() and path.name not in names]
    together = [*names, *spare][: 2 if options.quick else None]
    seeds = [int(seed) for seed in options.seeds.split(",")]
    backbone = load_backbone(settings)
    concepts = {
        name: read_concept(ASSETS / name, name_token(name.split(".")[0]), settings, backbone)
        for name in together
    }
    references: dict[str, type[Reference]] = {"a": Stock, "b": PublishedDVAR, "e": GentleDVAR}
    bench = Bench(
        load=lambda: load_backbone(settings),
        concepts=concepts,
        words=find_words(backbone, concepts, settings, seeds, options.work / "words.json"),
        settings=settings,
        work=options.work,
        references=shorten(references, 2 * BLOCK) if options.quick else references,
    )
    return bench, plan_units(options.arms, names, together, seeds)


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Train, measure and compare on a model."""
    bench, units = make_bench(options)
    names, together = options.concepts.split(","), list(bench.concepts)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    kept = options.work / f"flops_{options.arms}.json"
    if not kept.exists():
        tell("counting FLOPs")
        write_atomically(kept, json.dumps(count_arms(bench, options.arms, together)).encode())
    arms = run_arms(bench, units, options)
    tell("drawing and judging")
    measured = measure_rows(bench, arms, names, seeds, 1 if options.quick else options.samples)
    report = compare(arms, json.loads(kept.read_text()), measured)
    backbone = bench.load()
    rms = float(backbone.encoders["clip_l"][1].get_input_embeddings().weight.square().mean().sqrt())
    return report | {
        "concepts": names,
        "together": together,
        "seeds": seeds,
        "words": {f"{name}/{seed}": word for (name, seed), word in bench.words.items()},
        "device": str(backbone.device),
        "dtype": backbone.dtype,
        "threads": torch.get_num_threads(),
        "versions": list_versions(),
        "notes": write_notes(report, names, together, seeds, backbone, rms),
    }


def write_notes(
    report: Mapping[str, Any], names: Sequence[str], together: Sequence[str], seeds: Sequence[int],
    backbone: Backbone, rms: float,
) -> list[str]:  # fmt: skip
    """Return what a reader of the table must know."""
    scale = rms / SD_RMS
    return [
        f"Likeness and obedience of {', '.join(names)}, which (a) is timed on, whose steps are as many for "
        f"each concept; the others are timed on {len(together)}. Seeds {', '.join(map(str, seeds))}. "
        f"{backbone.device.type}, {backbone.dtype}, {torch.get_num_threads()} threads.",
        "",
        f"Seconds: medians of blocks of {BLOCK} passes, times passes, and what a training did before its "
        "first step. The intervals of ratios are over those blocks; where it says so over concepts, whose "
        "trainings take more or fewer steps. (c) and (d) look for the word that they begin at in their own "
        "time, (a) and (b) are given it. Likeness and obedience: by the packaged classifier, of the same "
        "prompts and seeds in all rows, with intervals over pictures.",
        "",
        f"This vocabulary's root mean square is {rms:.3g}: the rates of (a) and (b), 1e-4 and 1e-2 (5e-3 × "
        f"batch 2) at SD's {SD_RMS}, are {Stock.rate * scale:.3g} and {PublishedDVAR.rate * scale:.3g} here, "
        "their weight decay smaller by as much, so that a step is the same part of a row. (a) draws our "
        "captions, keeps its pictures in memory, saves and validates nothing; (b) writes no log and keeps no "
        "second graph. All compute in the same autocast with the same attention.",
    ]


def make_random_sd15(device: str, dtype: str) -> Backbone:
    """Return a backbone of SD 1.5's size with random weights; its tokenizer's words are single letters."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from t2iprobe.testing import tiny_tokenizer

    with torch.device(device):
        (unet, autoencoder, (encoder,)), size = make_sd15()
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=encoder,
        tokenizer=tiny_tokenizer(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    place_pipeline(pipeline, device, dtype)
    return make_backbone(pipeline, dtype=dtype, size=size)


def make_throughput(options: argparse.Namespace) -> tuple[Bench, dict[str, list[Unit]]]:
    """Return what the arms share and train where the weights and the pictures do not matter."""
    settings = {"init": "a", "grid": 0, "evaluate": 0, "stop": "budget", "max_steps": options.steps}
    if options.model is not None:
        settings["model"] = options.model
        load = partial(load_backbone, load_training(settings))
    else:
        load = partial(make_random_sd15, "cuda", "bfloat16")
    size = load().size
    generator = torch.Generator().manual_seed(0)
    concepts = {
        name: Concept(
            token=f"<{name}>",
            pictures=torch.randint(256, (4, 3, size, size), generator=generator, dtype=torch.uint8),
            files=(),
        )
        for name in (f"concept-{letter}" for letter in "abcdefgh")
    }
    os.environ["XDG_CACHE_HOME"] = str(options.work / f"cache_{options.only or 'all'}")
    bench = Bench(
        load=load,
        concepts=concepts,
        words={(name, 0): "a" for name in concepts},
        settings=load_training(settings),
        work=options.work,
        references=shorten({"a": Stock, "b": PublishedDVAR}, options.steps),
    )
    return bench, plan_units(options.arms, list(concepts)[:1], list(concepts), [0])


def measure_throughput(options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of a step of each arm and concept, of a model whose weights do not matter."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        options.work = Path(folder)
        bench, units = make_throughput(options)
        run_arms(bench, units, options)
    for letter, arm in units.items():
        ((active, blocks),) = group_blocks(arm).items()
        batch = bench.references[letter].batch if letter in bench.references else TextualInversion.batch
        found[letter] = {"seconds_a_step": float(np.median(blocks)) / active, "batch": batch}
    return found


def table_throughput(found: Mapping[str, Mapping[str, float]]) -> str:
    """Return the Markdown table."""
    lines = ["| | batch | s a step of a concept | pictures trained on a second |", "|---|---|---|---|"]
    for letter, row in found.items():
        speed = row["batch"] / row["seconds_a_step"]
        lines.append(f"| {NAMES[letter]} | {row['batch']} | {row['seconds_a_step']:.4f} | {speed:.1f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what was asked for and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/inversion_benchmark"))
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--model", help="instead of embedded; with --throughput, of random weights")
    parser.add_argument("--concepts", default=",".join(CONCEPTS))
    parser.add_argument("--arms", default="abcd")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--samples", type=int, default=8, help="pictures a prompt")
    parser.add_argument("--slice", type=float, default=2.0, help="seconds of a turn at least")
    parser.add_argument("--set", action="append", help="a setting of ours, as key=value")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--flops", action="store_true")
    parser.add_argument("--throughput", action="store_true")
    parser.add_argument("--steps", type=int, default=40, help="of --throughput")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # an arm's process
    options = parser.parse_args(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    if options.only:
        work_arm(partial(make_throughput if options.throughput else make_bench, options), options.only)
        return
    if options.flops:
        found: Any = {size: count_parts(size) for size in SIZES}
        text = table_flops(found)
    elif options.throughput:
        if options.model is None and not torch.cuda.is_available():
            raise UserError("--throughput needs a GPU, or a --model")
        found = measure_throughput(options)
        text = table_throughput(found)
    else:
        found = benchmark(options)
        text = table_arms(found)
    if options.json:
        write_atomically(options.json, json.dumps(found, indent=1).encode())
    print(text)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"inversion.py: {error}", file=sys.stderr)
        sys.exit(2)
