"""How long the pictures of a run or a sweep will take: from measured steps, at its own batch size."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from t2iprobe.config import Study
from t2iprobe.devices import resolve_device
from t2iprobe.hypernymy.drawing import draw
from t2iprobe.hypernymy.sampling import DiffusersSampler
from t2iprobe.hypernymy.scoring import Scorer
from t2iprobe.hypernymy.study import finish, load_sampler, load_scorers
from t2iprobe.hypernymy.sweep import Cell, Networks
from t2iprobe.pipelines import default_steps
from t2iprobe.plans import build_plan
from t2iprobe.runs import Run

FEW, MORE = 2, 4  # steps of the short batches; as many more tell what a step costs


@dataclass(frozen=True)
class Place:
    """What one place, a process or a worker of a cluster, takes for its pictures.

    Attributes:
        seconds: to ``start``, to encode ``prompts``, to draw ``pictures``.
        batch_size: of its lanes.
        lanes: that draw side by side.
        step_seconds: of a batch; None where nobody knows how many steps there are, and of a sweep.
        logits: classifier → float32 [n, C] of what was drawn to measure that.
    """

    seconds: dict[str, float]
    batch_size: int
    lanes: int
    step_seconds: float | None
    logits: dict[str, np.ndarray]

    @property
    def total(self) -> float:
        """Seconds until its last picture is stored."""
        return sum(self.seconds.values())


def measure_run(
    study: Study, manifest: Mapping[str, Any], missing: Sequence[int], classes: int, before: float = 0.0
) -> Place:
    """Measure what this process takes for the plan positions `missing` of a run.

    `before` it came here it took so many seconds already, which the run will take, too; `classes` is how many
    the hierarchy has. Batches of few steps are drawn, judged and stored as the run will do it, in a folder
    that is thrown away: first until their size is settled, then with FEW and with MORE steps.
    """
    begin = time.perf_counter()
    device = resolve_device(study.device)
    scorers = load_scorers(study, device, classes)
    sampler = load_sampler(study, device, manifest["identity"]["dtype"])
    start = before + time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(study, dict(manifest), missing, sampler, scorers, Path(folder))
        drawn, seconds = bench.settle()
        known = set(sampler.encoder.known_prompts)  # encoded while that was measured
        per_prompt = bench.measure_prompts()
        wanted = study.steps or default_steps(sampler.pipeline)
        (few, each), step = bench.measure_pictures([FEW, wanted])
        logits = bench.read_logits()
    plan = build_plan(manifest["plan"], manifest["identity"]["seed"])
    parts = {
        "start": start,
        "prompts": per_prompt * len({plan[position].prompt for position in missing} - known),
        # The run, too, sets its kernels up and begins with small batches.
        "pictures": each * len(missing) + max(0.0, seconds - few * drawn),
    }
    return Place(parts, sampler.sizes.size, sampler.lanes, step, logits)


def measure_sweep(
    study: Study,
    cells: Sequence[Cell],
    manifests: Sequence[Mapping[str, Any]],
    missing: Sequence[range],
    classes: int,
    before: float = 0.0,
) -> Place:
    """Measure what this process takes for the plan positions `missing` of each cell of a sweep.

    As `measure_run`, for each kind of cell (scheduler, size, with or without guidance).
    """
    begin = time.perf_counter()
    networks = Networks(study, manifests[0]["identity"]["dtype"], classes)
    sampler = networks.sampler
    parts = {"start": before + time.perf_counter() - begin, "prompts": 0.0, "pictures": 0.0}
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for index, cell in enumerate(cells):
        if missing[index]:
            kinds.setdefault(_kind(cell.study), []).append(index)
    prompts = set()
    for manifest, lacking in zip(manifests, missing, strict=True):
        plan = build_plan(manifest["plan"], 0)
        prompts |= {plan[position].prompt for position in lacking}
    logits: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, members in enumerate(kinds.values()):
            first = members[0]
            networks.turn_to(cells[first].study)
            of = cells[first].study, dict(manifests[first]), missing[first]
            bench = Bench(*of, sampler, networks.scorers, Path(folder, str(number)))
            drawn, settling = bench.settle()
            if number == 0:
                known = set(sampler.encoder.known_prompts)  # encoded while that was measured
                parts["prompts"] = bench.measure_prompts() * len(prompts - known)
            own = default_steps(sampler.pipeline)
            steps = [FEW, *(cells[index].study.steps or own for index in members)]
            (few, *each), _ = bench.measure_pictures(steps)
            if number == 0:  # the sweep, too, sets its kernels up and begins with small batches
                parts["pictures"] += max(0.0, settling - few * drawn)
                logits = bench.read_logits()
            parts["pictures"] += sum(
                seconds * len(missing[index]) for seconds, index in zip(each, members, strict=True)
            )
    return Place(parts, sampler.sizes.size, sampler.lanes, None, logits)


def _kind(study: Study) -> tuple[Any, ...]:
    """What a step costs the same in."""
    return study.scheduler, study.size, study.guidance is None or study.guidance > 1


def report_on(
    manifest: Mapping[str, Any], logits: Mapping[str, np.ndarray], folder: Path, seed: int = 0
) -> tuple[Run, float]:
    """Write the report of a run in `folder` with logits made of some of it; the run, and the seconds."""
    run = Run.create(folder, dict(manifest))
    rng = np.random.default_rng(seed)
    made = {name: rows[rng.integers(len(rows), size=len(run.plan))] for name, rows in logits.items()}
    run.write_shard(range(len(run.plan)), made)
    begin = time.perf_counter()
    finish(run)
    return run, time.perf_counter() - begin


class Bench:
    """A run that is thrown away, drawn from in pieces and timed."""

    def __init__(
        self,
        study: Study,
        manifest: dict[str, Any],
        missing: Sequence[int],
        sampler: DiffusersSampler,
        scorers: Mapping[str, Scorer],
        folder: Path,
    ) -> None:
        self.study, self.manifest, self.missing = study, manifest, missing
        self.sampler, self.scorers, self.folder = sampler, scorers, folder
        self.run = Run.create(folder / "drawn", manifest)

    def draw(self, count: int, steps: int | None) -> float:
        """Draw the first `count` missing pictures in so many steps; returns seconds."""
        study = self.study
        self.sampler.configure(steps=steps, guidance=study.guidance, size=study.size)
        begin = time.perf_counter()
        draw(self.run, self.missing[:count], self.sampler, self.scorers, study)
        return time.perf_counter() - begin

    def settle(self) -> tuple[int, float]:
        """Draw until the batches have their size, or all pictures were drawn once: how many, and seconds."""
        sizes, count, seconds = self.sampler.sizes, 0, 0.0
        while count < len(self.missing):
            round_ = min(sizes.size * self.sampler.lanes, len(self.missing))
            seconds += self.draw(round_, FEW)
            count += round_
            if sizes.settled:
                break
        sizes.settled = True
        return count, seconds

    def measure_prompts(self) -> float:
        """Return the seconds for each prompt that is new, over at most 32 of them."""
        prompts = dict.fromkeys(self.run.plan[position].prompt for position in self.missing)
        new = [prompt for prompt in prompts if prompt not in self.sampler.encoder.known_prompts][:32]
        begin = time.perf_counter()
        if new:
            self.sampler.encoder.encode(new)
        return (time.perf_counter() - begin) / len(new) if new else 0.0

    def measure_pictures(self, steps: Sequence[int | None]) -> tuple[list[float], float | None]:
        """Return the seconds of a picture in each number of steps, without its prompt, and of a batch's step.

        The step is None where they are drawn as they are: few, or nobody knows how many.
        """
        lanes = self.sampler.lanes
        batch = min(self.sampler.sizes.size, -(-len(self.missing) // lanes))
        count = min(len(self.missing), 2 * batch * lanes)
        self.sampler.encoder.encode([self.run.plan[position].prompt for position in self.missing[:count]])

        def measure(steps: int | None) -> float:
            return float(np.mean([self.draw(count, steps) for _ in range(2)])) / count

        known = [each for each in steps if each is not None]
        if len(known) < len(steps) or max(known) <= FEW + MORE:
            times = {each: measure(each) for each in dict.fromkeys(steps)}
            return [times[each] for each in steps], None
        short, long = measure(FEW), measure(FEW + MORE)
        step = (long - short) / MORE
        return [short + (each - FEW) * step for each in known], step * lanes * batch

    def read_logits(self) -> dict[str, np.ndarray]:
        """Return classifier → float32 [n, C] of all that was drawn."""
        return {name: np.concatenate(list(self.run.logits(name).values())) for name in self.run.classifiers}
