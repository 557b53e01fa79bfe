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
import heapq
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.resources import files
from pathlib import Path
from subprocess import PIPE
from typing import Any

import numpy as np
import torch
from inversion_flops import SIZES, count, count_parts, make_sd15, table_flops
from published_inversion import METHOD, SD_RMS, GentleDVAR, PublishedDVAR, Reference, Stock

from t2iprobe.errors import UserError
from t2iprobe.intervals import describe_difference, describe_mean, interval
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
from t2iprobe.inversion.stopping import PRESETS
from t2iprobe.inversion.training import train_concepts
from t2iprobe.machine import list_versions
from t2iprobe.pipelines import model_hash, place_pipeline
from t2iprobe.storage import write_atomically

ASSETS = Path(str(files("t2iprobe"))) / "assets" / "concepts"
CONCEPTS = ("harp.n.01", "soccer_ball.n.01", "teapot.n.01")
TOGETHER = 8  # concepts in a pass of (d), our default
BLOCK = 2 * PRESETS[METHOD]["plateau"]["every"]  # passes with two looks of ours
STATE_SECONDS = 60.0
REPORT_SECONDS = 30.0
RESAMPLES = 1000
NAMES = {
    "0": "the word that all begin at",
    "a": "(a) diffusers' example",
    "b": "(b) published DVAR",
    "e": "(e) DVAR at our rate",
    "c": "(c) ours, one concept",
    "d": "(d) ours, eight in one pass",
}
OURS = "cd"


# -- turns ---------------------------------------------------------------------------------------------


@dataclass
class Unit:
    """One training of one or several concepts in a pass.

    `seconds` has one entry a pass, the first with all that was done before it; `steps` one a concept.
    """

    arm: str
    seed: int
    names: list[str]
    steps: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def active(self, number: int) -> int:
        """Return how many concepts shared the pass of that number; who waits takes the next free place."""
        places = [0] * TOGETHER  # the pass in which each is free
        count = 0
        for steps in self.steps:
            began = heapq.heappop(places)
            heapq.heappush(places, began + steps)
            count += began <= number < began + steps
        return count


class Clock:
    """Times the passes of an arm, which works in a process of its own and in its turns only.

    Threads of one process would do, but each has its own team of OpenMP threads, which slow each other.
    A turn begins with a line on stdin, its seconds; it ends with a line on stdout, units and passes done.
    """

    def __init__(self) -> None:
        self.finished = 0
        self.running: Unit | None = None
        self._slice = self._turn_began = self._began = 0.0

    def wait(self) -> None:
        """Hand the turn back, and wait for the next."""
        print(self.finished, len(self.running.seconds) if self.running else 0, flush=True)
        line = sys.stdin.readline()
        if not line:
            sys.exit(1)  # whoever gives the turns is gone
        self._slice, self._turn_began = float(line), time.perf_counter()

    def begin(self) -> None:
        """Start the clock of the unit's first pass, once a model is loaded."""
        self._began = time.perf_counter()

    def tick(self) -> None:
        """Note the end of a pass; hand the turn back if it has lasted long enough."""
        assert self.running is not None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.running.seconds.append(now - self._began)
        if now - self._turn_began > self._slice:
            self.wait()
        self._began = time.perf_counter()


class Arm:
    """An arm at work: `command` trains so many units, `guess` is how many passes one may take."""

    def __init__(self, command: Sequence[str], units: int, guess: int) -> None:
        self.units, self.guess = units, guess
        self.finished = self.passes = 0
        self.over = False
        self._process = subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True)
        self._hear()

    @property
    def share(self) -> float:
        """How much of its work is done, 0..1."""
        return (self.finished + min(self.passes / self.guess, 0.99)) / self.units

    def _hear(self) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            self.finished, self.passes = map(int, line.split())
            return
        self.over = True
        if self._process.wait():
            raise RuntimeError(f"an arm ended with exit code {self._process.returncode}: see above")

    def advance(self, seconds: float) -> None:
        """Give it a turn and wait for the end of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        self._hear()

    def stop(self) -> None:
        """End its process, whatever it does."""
        self._process.kill()
        self._process.wait()


def take_turns(arms: Mapping[str, Arm], slice_seconds: float) -> None:
    """Let the arms work in turn, the one that has done the least share of its work next."""
    told = time.monotonic()
    try:
        while active := [arm for arm in arms.values() if not arm.over]:
            min(active, key=lambda arm: arm.share).advance(slice_seconds)
            if time.monotonic() - told > REPORT_SECONDS:
                told = time.monotonic()
                tell("  ".join(f"({letter}) {describe_progress(arm)}" for letter, arm in arms.items()))
    finally:
        for arm in arms.values():
            arm.stop()


def describe_progress(arm: Arm) -> str:
    """Return what an arm has done, in words."""
    passes = f", {arm.passes} steps of the next" if arm.passes else ""
    return f"{arm.finished} of {arm.units}{passes}"


def tell(line: str) -> None:
    """Say something about the progress, where results do not go."""
    print(line, file=sys.stderr, flush=True)


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


def group_blocks(units: Iterable[Unit]) -> dict[int, np.ndarray]:
    """Return the mean seconds of a pass in each block of BLOCK, by how many concepts shared it.

    The first pass of a unit, with all that comes before it, is left out.
    """
    blocks: dict[int, list[float]] = {}
    for unit in units:
        for start in range(0, len(unit.seconds), BLOCK):
            part = unit.seconds[max(start, 1) : start + BLOCK]
            if part:
                blocks.setdefault(unit.active(start), []).append(float(np.mean(part)))
    return {active: np.array(values) for active, values in blocks.items()}


def estimate_seconds(units: Sequence[Unit], blocks: Mapping[int, np.ndarray]) -> np.ndarray:
    """Return the seconds of units by the medians of their arm's `blocks`; then by RESAMPLES of the blocks."""
    rng = np.random.default_rng(0)
    passes: dict[int, int] = {}
    for unit in units:
        for number in range(1, len(unit.seconds)):
            active = unit.active(number - number % BLOCK)
            passes[active] = passes.get(active, 0) + 1
    total = np.full(1 + RESAMPLES, sum(unit.seconds[0] for unit in units))
    for active, times in passes.items():
        values = blocks[active]
        drawn = rng.choice(values, (RESAMPLES, len(values)))
        total += times * np.concatenate([[np.median(values)], np.median(drawn, axis=1)])
    return total


def describe_ratio(numerator: np.ndarray, denominator: np.ndarray) -> dict[str, Any]:
    """Return the ratio of two `estimate_seconds` with the interval of its resamples."""
    ratio = numerator / denominator
    return {"value": float(ratio[0]), "interval": list(interval(ratio[1:]))}


def resample_concepts(slow: Sequence[Unit], fast: Sequence[Unit]) -> list[float]:
    """Return the interval over concepts of the ratio of two arms that train the same ones, one by one."""
    seconds = np.array([[sum_median(one), sum_median(other)] for one, other in zip(slow, fast, strict=True)])
    drawn = np.random.default_rng(0).integers(len(seconds), size=(RESAMPLES, len(seconds)))
    sums = seconds[drawn].sum(1)
    return list(interval(sums[:, 0] / sums[:, 1]))


def sum_median(unit: Unit) -> float:
    """Return a training's seconds, every pass but the first as long as the median one."""
    return unit.seconds[0] + (len(unit.seconds) - 1) * float(np.median(unit.seconds))


def compare(
    arms: Mapping[str, Sequence[Unit]],
    flops: Mapping[str, Mapping[str, float]],
    measured: Mapping[str, Mapping[str, Sequence[float]]],
) -> dict[str, Any]:
    """Return the table and the verdicts. Times are of a concept, likeness is of the same concepts in all."""
    seconds: dict[str, np.ndarray] = {}
    found: dict[str, dict[str, Any]] = {letter: {} for letter in ("0", *arms)}
    for letter, units in arms.items():
        blocks = group_blocks(units)
        count = sum(len(unit.names) for unit in units)
        seconds[letter] = estimate_seconds(units, blocks) / count
        steps = [steps for unit in units for steps in unit.steps]
        found[letter] = {
            "steps": steps,
            "reasons": [reason for unit in units for reason in unit.reasons],
            "seconds": float(seconds[letter][0]),
            "seconds_of_the_clock": sum(sum(unit.seconds) for unit in units) / count,
            "seconds_before": sum(unit.seconds[0] for unit in units) / count,
            "concepts_a_minute": 60 / float(seconds[letter][0]),
            "concepts_timed": count,
            "concepts_in_a_pass": max(len(unit.names) for unit in units),
            "flops_a_step": flops[letter]["step"],
            "flops": flops[letter]["once"] + flops[letter]["step"] * float(np.mean(steps)),
        }
        if "a" in seconds:
            found[letter]["times_faster_than_a"] = describe_ratio(seconds["a"], seconds[letter])
            found[letter]["flops_ratio"] = found["a"]["flops"] / found[letter]["flops"]
    for letter, values in measured.items():
        quality = {name: describe_mean(each) for name, each in values.items()}
        if "a" in measured:
            for name, each in values.items():
                quality[name]["minus_a"] = describe_difference(measured["a"][name], each)
        found[letter] |= quality
    verdicts = judge(found, seconds)
    if {"b", "c"} <= set(arms) and len(arms["b"]) > 1:
        ends = resample_concepts(arms["b"], arms["c"])
        for verdict in verdicts:
            if verdict["claim"].endswith("(c) at least 2 times faster than (b)"):
                verdict["over_concepts"] = ends
                verdict["detail"] += f"; over concepts [{ends[0]:.1f}, {ends[1]:.1f}]"
    return {"arms": found, "verdicts": verdicts}


def judge(
    found: Mapping[str, Mapping[str, Any]],
    seconds: Mapping[str, np.ndarray],
) -> list[dict[str, Any]]:
    """Return {claim, holds, detail} for the arms that were run; a ratio holds if all of its interval does."""
    verdicts = []
    for letter in OURS:
        if {"a", letter} <= set(seconds):
            low = found["a"]["likeness"]["interval"][0]
            value, difference = found[letter]["likeness"]["value"], found[letter]["likeness"]["minus_a"]
            ends = difference["interval"]
            verdicts.append(
                {
                    "claim": f"likeness of ({letter}) no lower than of (a) within its interval",
                    "holds": value >= low and ends[1] >= 0,
                    "detail": f"{value:.3f}, (a)'s interval begins at {low:.3f}; "
                    f"paired difference {difference['value']:+.3f} [{ends[0]:+.3f}, {ends[1]:+.3f}]",
                }
            )
    for slow, fast, least in (("a", "c", 15), ("b", "c", 2), ("e", "c", 2), ("c", "d", 2)):
        if {slow, fast} <= set(seconds):
            ratio = describe_ratio(seconds[slow], seconds[fast])
            low, high = ratio["interval"]
            what = "the concepts a minute of" if fast == "d" else "faster than"
            verdicts.append(
                {
                    "claim": f"({fast}) at least {least} times {what} ({slow})",
                    "holds": low >= least,
                    "detail": f"{ratio['value']:.1f} [{low:.1f}, {high:.1f}]",
                    "ratio": ratio,
                }
            )
    return verdicts


def table_arms(report: Mapping[str, Any]) -> str:
    """Return the Markdown table, the verdicts and the notes."""
    lines = [
        "| | steps | s a concept | times faster than (a) | GFLOP a step | TFLOP in all | of (a)'s "
        "| likeness | obedience | concepts a minute |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for letter, row in report["arms"].items():
        quality = " | ".join(show(row[name]) for name in ("likeness", "obedience"))
        if letter == "0":
            lines.append(f"| {NAMES[letter]} | 0 | – | – | – | – | – | {quality} | – |")
            continue
        steps = row["steps"]
        ratio = show(row["times_faster_than_a"], ".1f") if "times_faster_than_a" in row else "–"
        share = f"1/{row['flops_ratio']:.1f}" if "flops_ratio" in row else "–"
        lines.append(
            f"| {NAMES[letter]} | {np.mean(steps):.0f} ({min(steps)}–{max(steps)}) | {row['seconds']:.1f} "
            f"| {ratio} | {row['flops_a_step'] / 1e9:.2f} | {row['flops'] / 1e12:.2f} | {share} | {quality} "
            f"| {row['concepts_a_minute']:.2f} ({row['concepts_timed']}) |"
        )
    lines.append("")
    lines += [
        f"- {verdict['claim']}: **{'yes' if verdict['holds'] else 'no'}** ({verdict['detail']})"
        for verdict in report["verdicts"]
    ]
    return "\n".join([*lines, "", *report["notes"]])


def show(cell: Mapping[str, Any], form: str = ".3f") -> str:
    """Return a value and its interval."""
    if cell["interval"] is None:
        return f"{cell['value']:{form}}"
    return f"{cell['value']:{form}} [{cell['interval'][0]:{form}}, {cell['interval'][1]:{form}}]"


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
